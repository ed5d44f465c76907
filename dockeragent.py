#!/usr/bin/env python3
"""dockeragent: a small, safe HTTP API in front of one Docker Engine.

    API_KEY=... python3 dockeragent.py

Whoever holds the key is root on the host: creating a container can mount the host's filesystem,
and POST /api/v1/files writes any file under HOST_ROOT. There are no users, no roles, no sandbox.

Trusted: the environment, the Engine, the process's own files. Not trusted: whoever reaches the
port (before the key is checked), what a container prints, and the tree under HOST_ROOT, where
somebody else may be swapping folders for links while a file is being written.

The file reads top to bottom; each section uses only names defined above it:

    Constants, Errors, Configuration, Logging, Rate limiter, Validation, Request schemas,
    Sockets, Engine client, Containers and images, Files, Logs, Endpoints, Routes,
    HTTP handler, Server, Command line

Invariants, each stated again on the line that keeps it:
 1. The key is compared in one place, on bytes, in constant time; without it only /health answers.
 2. A request head is matched byte for byte by the grammar below before any other code sees it, and
    unread body bytes always close the connection.
 3. No size, count or wait comes from a peer without a constant that bounds it.
 4. No path is checked and then used: the walk that checks is the walk that opens.
 5. Container output reaches an event stream only through the function that splits CR.
 6. Ids and names match a regex before they are put in an Engine URL, and are quoted there.
 7. The key, request bodies and file contents never reach a log line.
"""

from __future__ import annotations

import array
import base64
import binascii
import bisect
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import hmac
import http.client
import http.server
import ipaddress
import itertools
import json
import math
import os
import re
import resource
import secrets
import select
import signal
import socket
import socketserver
import ssl
import stat
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Optional, Union
from urllib.parse import quote, unquote, urlencode

# --------------------------------------------------------------------------------------------------
# Constants: every limit and wait, with its unit and reason; the grammars
# --------------------------------------------------------------------------------------------------

VERSION = "1.0.0"
API = "/api/v1"

# What a client may send, and how long it may take (seconds, for the whole step, not per read).
MAX_REQUEST_LINE = 8 * 1024  # bytes; past it 414
MAX_FIELD_BLOCK = 32 * 1024  # bytes; past it 431
MAX_FIELDS = 100  # field lines; past it 431
MAX_BODY = 10 * 1024 * 1024  # bytes, decoded; past it 413
MAX_CHUNK_LINE = 1024  # bytes; a size and its extensions
MAX_TRAILER = 8 * 1024  # bytes; trailer fields are checked and dropped
MAX_DEPTH = 32  # nested arrays and objects; the decoder recurses on the C stack
MAX_DIGITS = 20  # of one JSON number; int() of thousands of digits is quadratic
HEAD_TIMEOUT = 10.0  # and for the TLS handshake
BODY_TIMEOUT = 60.0
IDLE_TIMEOUT = 75.0  # between two requests of one connection
WRITE_TIMEOUT = 30.0  # without a byte taken by the client
HALF_CLOSED = 2.0  # of silence, after which a client that sends no more is taken for gone
LINGER_TIMEOUT = 3.0  # for the client to read an answer that came before its body was read
GRACE = 10.0  # from SIGTERM to the exit, for requests in flight
RECEIVE = 64 * 1024  # bytes asked of a socket at once
STREAM_BUFFER = 128 * 1024  # bytes the kernel holds for a slow reader of a stream
SHORT_KEY = 8  # characters; answers may have the words that a shorter one is in
MAX_MESSAGE = 2000  # characters of an error's message; it may repeat what a client sent
REFUSALS = 256  # refused connections left open for a moment so that their 503 is read

RATE_WINDOW = 60.0  # seconds
MAX_CLIENTS = 10_000  # windows kept; past it the least recently used is forgotten

# What the Engine may take.
NEWEST_API = (1, 51)  # the newest Engine API this file was written against
CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 30.0
START_TIMEOUT = 120.0  # create and start, and to undo them
PING_TIMEOUT = 3.0
PULL_SILENCE = 120.0  # between two words about a pull
DEFAULT_STOP = 10  # seconds, the Engine's own default
MAX_STOP = 86_400  # seconds; no wait here is unbounded
MAX_ANSWER = 64 * 1024 * 1024  # bytes of one answer that is not a stream
MAX_IDLE_CONNECTIONS = 16  # kept open to the Engine
IDLE_CONNECTION = 2.0  # seconds that each is kept
VERSION_KEPT = 2.0  # seconds; the Engine may be upgraded while nobody asks it anything
HEALTH_CACHE = 1.0  # seconds
MEMOIZED = 256 * 1024  # bytes of an answer that is not decoded again while it stays the same

MAX_LINE = 1024 * 1024  # bytes of one log line; the rest goes on as the next
MAX_FRAME = 4 * 1024 * 1024  # bytes; the Engine's own hold up to 16 KiB and a timestamp
RECENT_STAMPS = 2000  # whose lines are counted, for the ids
ENTRY_SIZE = 16 * 1024  # bytes; the Engine's log drivers cut longer lines into entries of this size
RETRY = 3000  # milliseconds before an event stream's client reconnects
PING_INTERVAL = 15.0  # seconds of silence before a comment keeps an event stream's proxies awake
# The Engine writes each log entry by itself. In a burst, a read this long after the one before
# finds some 200 together, which takes a third off the time of the whole log.
BURST_PAUSE = 0.0004  # seconds
# Resuming reads the log again from this long before the last line: an entry that was begun earlier
# may have been finished later, and is stamped with its beginning.
RESUME_MARGIN = 3600  # seconds
REST_ENTRIES = 500  # read again at the end of a followed log
TAIL_MARGIN = 1000  # entries that may be written between two looks at a log's tail
RESUME_JITTER = 10_000_000  # nanoseconds by which stdout and stderr may be stored out of order

WALKS = 20  # attempts at a path whose folders another request takes away, one after the other
MAX_LINKS = 40  # symbolic links in one path, as Linux has it
MAX_PATH = 4096  # bytes, PATH_MAX

# RFC 9110 section 5.6.2 and 5.5, RFC 9112 section 3: no control but HTAB in a value, so a bare CR,
# a bare LF or a NUL never matches; no white space before the colon, so no folded line does either.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-\"$-~]+) HTTP/([0-9]\.[0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [\t -~\x80-\xff]*)?")
FIELD_LINES = rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*"
FIELD_BLOCK = re.compile(FIELD_LINES + rb"\r\n")
FIELD_BLOCK_BEGUN = re.compile(FIELD_LINES + rb"(?:" + TOKEN + rb"(?::[\t -~\x80-\xff]*)?)?\r?")
HOST_VALUE = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")  # before a request: RFC 9112 section 2.2
LONE_CONTROL = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\0")
CHUNK_LINE = re.compile(rb"\r\n([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n")

HOP_PORT = re.compile(r"^\[(.*)\](?::[0-9]+)?$|^([0-9.]+):[0-9]+$")  # what some proxies add
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CONTAINER = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
TIMESTAMP = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
LOG_STAMP = re.compile(TIMESTAMP.pattern.encode() + b" ")
UNIX_TIME = re.compile(r"([0-9]{1,11})(?:\.([0-9]{1,9}))?")
DURATION = re.compile(r"(?=\.?[0-9])([0-9]{0,15})(?:\.([0-9]{0,15}))?(ns|us|µs|μs|ms|s|m|h)")
UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9}  # nanoseconds
UNITS.update(m=60 * UNITS["s"], h=3600 * UNITS["s"])
EVENT_ID = re.compile(r"([0-9]{1,11})\.([0-9]{9})-([1-9][0-9]{0,14})")

# Python's phrases changed between 3.9 and 3.13 (413, 414, 416, 422); these are RFC 9110's.
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
PHRASES.update({413: "Content Too Large", 414: "URI Too Long"})

# --------------------------------------------------------------------------------------------------
# Errors: one class a client is told about, one envelope
# --------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """A refusal the client is told about: one status, one sentence, perhaps headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


class EngineError(ApiError):
    """The Engine refused, is not there (503), is silent (504) or answers nonsense (502)."""


class ClientGone(Exception):
    """The client has hung up or stopped reading. Raised by what reads from and writes to it."""


class Stopping(ApiError):
    """The agent is being stopped; raised in waits that would outlast it."""

    def __init__(self) -> None:
        super().__init__(503, "the agent is being stopped; try again later")


def envelope(status: int, message: str) -> dict[str, Any]:
    """Return the JSON object that every error is answered with."""
    message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
    return {"error": PHRASES.get(status, "Error"), "message": message, "status": status}


def encode_json(value: Any) -> bytes:
    """Return value as compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# Configuration: the environment to one frozen Config; every problem names its variable
# --------------------------------------------------------------------------------------------------

Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

SOCKET = "unix:///var/run/docker.sock"
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class ConfigError(Exception):
    """What is wrong with the environment, a line for each problem."""


class Address(NamedTuple):
    """Where to listen or to find the Engine: a Unix socket's path, or a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0
    scheme: str = "tcp"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.path}" if self.path else f"{self.scheme}://{host}:{self.port}"


def integer(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of integers in ASCII digits; it raises ValueError."""

    def parse(text: str) -> int:
        if not (re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most):
            raise ValueError(f"{text!r} is not an integer from {least} to {most}")
        return int(text)

    return parse


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """Return a parser of what the pattern matches; it raises ValueError."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{text!r} is not {rule}")
        return text

    return parse


def parse_listen(text: str) -> Address:
    """Return the address of ":3000", "127.0.0.1:3000", "[::1]:3000" or "unix:///run/a.sock"."""
    if re.fullmatch("unix:///.*[^/]", text):
        return Address(path=text[len("unix://") :])
    match = re.fullmatch(r"(localhost|[0-9.]*|\[([0-9a-fA-F:.]+)\]):([^:]*)", text)
    if not match:
        raise ValueError("write :3000, 127.0.0.1:3000, [::1]:3000 or unix:///path/to/socket")
    host = match[2] or match[1]
    if host not in ("", "localhost"):
        host = str(ipaddress.ip_address(host))
    return Address(host=host, port=integer(0, 65535)(match[3]))


def parse_engine(text: str) -> Address:
    """Return the Engine's address from DOCKER_HOST's forms. Raises ValueError."""
    if re.fullmatch("unix:///.*[^/]", text):
        return Address(path=text[len("unix://") :])
    name = r"[a-zA-Z0-9._-]+|\[([0-9a-fA-F:.]+)\]"
    match = re.fullmatch(f"(tcp|https?)://({name})(?::([0-9]+))?/?", text)
    if not match:
        raise ValueError(f"{text!r} is not unix:///path, tcp://host:port, http:// or https://")
    port = integer(1, 65535)(match[4]) if match[4] else 0
    return Address(host=match[3] or match[2], port=port, scheme=match[1])


def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a comma-separated list of CIDRs. Raises ValueError."""
    networks = [ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip()]
    for network in networks:
        if getattr(network.network_address, "ipv4_mapped", None):
            raise ValueError(f"{network} never matches; write it as an IPv4 network")
    return tuple(networks)


def read_key_file(path: str) -> bytes:
    """Return the key in a file, less one trailing newline. Raises OSError or ValueError."""
    if not path:
        return b""
    with open(path, "rb") as file:
        key = file.read(MAX_REQUEST_LINE + 1)
    if not key.strip() or len(key) > MAX_REQUEST_LINE:
        raise ValueError(f"{path} holds no key, or more than a header can carry")
    return key[:-1] if key.endswith(b"\n") else key


class Setting(NamedTuple):
    """One environment variable: its name, default, meaning and parser."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], Any] = str


parse_version = matching(r"(1\.[0-9]{1,3})?", "an Engine API version such as 1.41")
parse_root = matching("(?s:/.*)", "an absolute path")
parse_level = matching("|".join(LEVELS), "debug, info, warning or error")

SETTINGS = (
    Setting("API_KEY", "", "the key that clients send as X-API-Key; required", os.fsencode),
    Setting("API_KEY_FILE", "", "file to read the key from instead", read_key_file),
    Setting("LISTEN_ADDR", ":3000", "or 127.0.0.1:3000, [::1]:3000, unix:///path", parse_listen),
    Setting("DOCKER_HOST", SOCKET, "or tcp://host:port, http://, https://", parse_engine),
    Setting("DOCKER_TLS_VERIFY", "", "when not empty, tcp:// speaks TLS"),
    Setting("DOCKER_CERT_PATH", "", "folder of ca.pem, cert.pem and key.pem (~/.docker)"),
    Setting("DOCKER_API_VERSION", "", "such as 1.41; else negotiated", parse_version),
    Setting("HOST_ROOT", "/host", "where the host's / is mounted; / on a bare host", parse_root),
    Setting("RATE_LIMIT", "100", "requests a minute and client; 0: no limit", integer(0, 10**8)),
    Setting("TRUSTED_PROXIES", "", "CIDRs whose X-Forwarded-For is believed", parse_networks),
    Setting("TLS_CERT_FILE", "", "certificate (chain) to serve HTTPS with"),
    Setting("TLS_KEY_FILE", "", "its private key"),
    Setting("TLS_CLIENT_CA_FILE", "", "require a client certificate signed by this CA"),
    Setting("MAX_CONNECTIONS", "1024", "served at once; one more gets 503", integer(1, 10**6)),
    Setting("LOG_LEVEL", "info", "or debug, warning, error", parse_level),
)


class Config(NamedTuple):
    """What SETTINGS parse to, under the variables' names in lower case, and two TLS contexts."""

    api_key: bytes
    api_key_file: bytes
    listen_addr: Address
    docker_host: Address
    docker_tls_verify: str
    docker_cert_path: str
    docker_api_version: str
    host_root: str
    rate_limit: int
    trusted_proxies: tuple[Network, ...]
    tls_cert_file: str
    tls_key_file: str
    tls_client_ca_file: str
    max_connections: int
    log_level: str
    server_tls: Optional[ssl.SSLContext] = None
    engine_tls: Optional[ssl.SSLContext] = None


def describe(error: Exception) -> str:
    """Return one line for an error, without the number Python puts before an OSError's text."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return name + (getattr(error, "reason", None) or error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def load_config(environ: Mapping[str, str]) -> Config:
    """Return the configuration in environ; an empty variable counts as not set.

    Raises ConfigError with a line for each variable that is missing or wrong.
    """
    values: dict[str, Any] = {}
    problems = []
    for setting in SETTINGS:
        try:
            value = setting.parse(environ.get(setting.name) or setting.default)
        except (OSError, ValueError) as error:
            value = None
            problems.append(f"{setting.name}: {describe(error)}")
        values[setting.name.lower()] = value
    if not problems:
        config = Config(**values)
        for check in (check_key, with_server_tls, with_engine_tls):
            try:
                config = check(config)
            except ConfigError as error:
                problems += error.args
    if problems:
        raise ConfigError(*problems)
    return config


def check_key(config: Config) -> Config:
    """Return config with the key, wherever it comes from. Raises ConfigError, without the key."""
    name = "API_KEY_FILE" if config.api_key_file else "API_KEY"
    key = config.api_key_file or config.api_key
    if config.api_key and config.api_key_file:
        raise ConfigError("API_KEY_FILE: set this or API_KEY, not both")
    if not key:
        raise ConfigError("API_KEY: is required; try API_KEY=$(openssl rand -hex 32)")
    if re.search(rb"[\x00-\x1f\x7f]", key) or key != key.strip(b" "):
        raise ConfigError(f"{name}: no header can carry a control character, or a space at an end")
    return config._replace(api_key=key)


def load(variable: str, path: str, use: Callable[[], object]) -> None:
    """Use the file at path in a TLS context. Raises ConfigError that names the variable."""
    try:
        with open(path, "rb"):
            use()
    except ssl.SSLError as error:
        raise ConfigError(f"{variable}: {path} is not what it should be: {error}") from error
    except OSError as error:
        place = "" if error.filename else f"{path}: "
        raise ConfigError(f"{variable}: {place}{describe(error)}") from error


def refuse_password() -> str:
    """Refuse an encrypted key: OpenSSL would ask for its password on the terminal."""
    raise OSError(errno.EINVAL, "the private key is encrypted")


def tls_context(
    protocol: Any, cert: tuple[str, str], key: tuple[str, str], ca: tuple[str, str]
) -> ssl.SSLContext:
    """Return a context from three files, each as (variable, path or ""). Raises ConfigError.

    Not create_default_context, which from Python 3.13 on refuses certificates made as Docker's
    manual says. PROTOCOL_TLS_CLIENT verifies the certificate and the host's name, too.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # which costs a stranger less than us
    if cert[1]:
        chain = functools.partial(context.load_cert_chain, cert[1], key[1], refuse_password)
        load(*cert, lambda: ssl.SSLContext(protocol).load_verify_locations(cert[1]))
        load(*key, chain)
    if ca[1]:
        load(*ca, lambda: context.load_verify_locations(ca[1]))
        # Invariant: with a CA set, nobody without its certificate gets past the handshake.
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def with_server_tls(config: Config) -> Config:
    """Return config with the listener's TLS context, if it has one. Raises ConfigError."""
    cert = ("TLS_CERT_FILE", config.tls_cert_file)
    key = ("TLS_KEY_FILE", config.tls_key_file)
    ca = ("TLS_CLIENT_CA_FILE", config.tls_client_ca_file)
    given = [name for name, path in (cert, key, ca) if path]
    for name, path in (cert, key):
        if given and not path:
            raise ConfigError(f"{name}: is required with {given[0]}")
    if not given:
        return config
    return config._replace(server_tls=tls_context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca))


def with_engine_tls(config: Config) -> Config:
    """Return config with the TLS context for the Engine, if it takes one. Raises ConfigError."""
    scheme, folder = config.docker_host.scheme, config.docker_cert_path
    if scheme == "https" and not (folder or config.docker_tls_verify):
        return config._replace(engine_tls=ssl.create_default_context())
    if scheme != "https" and not (scheme == "tcp" and config.docker_tls_verify):
        return config
    folder = folder or os.path.expanduser("~/.docker")
    ca, cert, key = (os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem"))
    if not (os.path.exists(cert) or os.path.exists(key)):
        cert = ""
    files = (("DOCKER_CERT_PATH", path) for path in (cert, key, ca))
    return config._replace(engine_tls=tls_context(ssl.PROTOCOL_TLS_CLIENT, *files))


# --------------------------------------------------------------------------------------------------
# Logging: one JSON object a line on standard output
# --------------------------------------------------------------------------------------------------


def timestamp(now: float, timespec: str = "milliseconds") -> str:
    """Return Unix seconds as RFC 3339 in UTC: "2026-02-21T10:00:00.000Z"."""
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


CLIENT_TEXT = {"method", "path", "request_id", "error", "traceback"}  # may hold what clients sent


class Log:
    """Writes log lines to stdout; drops them, and counts, rather than wait for a reader."""

    def __init__(self, level: str, secret: bytes) -> None:
        self._rank = LEVELS[level]
        text = secret.decode("latin-1")  # as what clients send is
        self._secrets = {text, secret.decode("utf-8", "replace"), quote(secret, safe="")}
        descriptor = 1
        with contextlib.suppress(OSError):
            if os.isatty(descriptor):
                # A terminal polls writable while one byte fits, and may be held (Ctrl-S). By an
                # open of our own, so that it stays blocking for whoever else has it.
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                descriptor = os.open(f"/proc/self/fd/{descriptor}", flags)
        self._descriptor = descriptor
        self._mend = b""  # ends the line that a full disk cut short
        self._dropped = 0
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def __call__(self, level: str, msg: str, **fields: Any) -> None:
        """Write one line: time, level, msg and the fields."""
        if LEVELS[level] < self._rank:
            return
        # Invariant: the key is in no log line, not even where a client put it in a path.
        for name in CLIENT_TEXT & fields.keys():
            fields[name] = self.redact(fields[name])
        record = {"time": timestamp(time.time()), "level": level, "msg": msg, **fields}
        with self._lock:
            if self._dropped:
                record["dropped"] = self._dropped
            line = fit_line(record)
            # A full disk, a closed pipe, a reader that is gone: none may end a request.
            with contextlib.suppress(OSError):
                # Invariant: a full pipe never blocks: it polls writable only while PIPE_BUF bytes
                # fit, and no line is longer.
                if self._poll.poll(0):
                    line = self._mend + line
                    is_whole = os.write(self._descriptor, line) == len(line)
                    self._mend = b"" if is_whole else b"\n"
                    if is_whole:
                        self._dropped = 0
                        return
            self._dropped += 1

    def redact(self, text: str, least: int = 1) -> str:
        """Return text without the key in it, unless that has less than `least` characters."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if len(secret) >= least else text
        return text


def describe_bug(error: BaseException | None) -> str:
    """Return where an error was raised, and its class; its text could hold what a client sent."""
    places = traceback.format_tb(error.__traceback__ if error else None)
    return "".join(places) + type(error).__name__


def fit_line(record: dict[str, Any]) -> bytes:
    """Return record as one line of ASCII JSON of at most PIPE_BUF bytes, its strings cut to fit.

    ASCII JSON has every control and every non-ASCII character escaped: no field can end its line.
    """
    line = json.dumps(record)
    for longest in (2000, 600, 100):
        if len(line) < select.PIPE_BUF:
            break
        line = json.dumps({k: v[-longest:] if isinstance(v, str) else v for k, v in record.items()})
    return line.encode() + b"\n"


# --------------------------------------------------------------------------------------------------
# Rate limiter: who a client is, and its sliding window
# --------------------------------------------------------------------------------------------------


def parse_ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, an IPv4-mapped one as the IPv4 one it is; None for anything else."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0] if ":" in text else text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_address(peer: str, forwarded: str, trusted: tuple[Network, ...]) -> str:
    """Return the address a request is counted under; peer is "" on a Unix socket.

    forwarded: X-Forwarded-For, believed only as far as the hop that wrote it is trusted: the
    right-most address that no trusted proxy has is the client.
    """
    client = parse_ip(peer)
    if client is None:
        return "unix"
    for hop in reversed(forwarded.split(",")):
        if not any(client in network for network in trusted):
            break
        address = parse_ip(HOP_PORT.sub(r"\1\2", hop.strip()))
        if address is None:
            break
        client = address
    return str(client)


class RateLimiter:
    """Exact sliding windows: no RATE_WINDOW seconds ever admit more than `limit` of one client."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, bool], array.array[float]] = {}  # least recent first

    def admit(self, client: str, has_key: bool) -> dict[str, str]:
        """Count one request and return its X-RateLimit headers; none with the limit off.

        Requests with the key and without have windows of their own, so that a stranger behind the
        same address cannot lock a key holder out. Raises ApiError (429), which counts nothing.
        """
        if not self._limit:
            return {}
        with self._lock:
            now = self._clock()
            times = self._window(client, has_key, now)
            admitted = len(times) < self._limit
            if admitted:
                times.append(now)
            left, reset = self._limit - len(times), math.ceil(times[0] + RATE_WINDOW - now)
        wait = str(max(1, reset))
        numbers = {"Limit": str(self._limit), "Remaining": str(left), "Reset": wait}
        headers = {f"X-RateLimit-{name}": value for name, value in numbers.items()}
        if not admitted:
            message = f"more than {self._limit} requests in 60 seconds; retry in {wait} s"
            raise ApiError(429, message, {**headers, "Retry-After": wait})
        return headers

    def _window(self, client: str, has_key: bool, now: float) -> array.array[float]:
        """Return the moments that still count, oldest first; forget the clients long gone."""
        if ":" in client:  # one IPv6 client may use its whole /64
            client = str(ipaddress.IPv6Network((client, 64), strict=False))
        times = self._windows.pop((client, has_key), None) or array.array("d")
        del times[: bisect.bisect_right(times, now - RATE_WINDOW)]
        self._windows[client, has_key] = times
        while len(self._windows) > 1:
            key, oldest = next(iter(self._windows.items()))
            # Invariant: the table is bounded, whoever comes from however many addresses.
            if oldest and oldest[-1] > now - RATE_WINDOW and len(self._windows) <= MAX_CLIENTS:
                break
            del self._windows[key]
        return times


# --------------------------------------------------------------------------------------------------
# Validation: a subset of JSON Schema, strict JSON, query strings
# --------------------------------------------------------------------------------------------------

Schema = dict[str, Any]

# By type(), not isinstance(): to Python, a boolean is an integer.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
KEYWORDS = {"type", "properties", "required", "values", "items", "enum", "pattern", "minimum"}
KEYWORDS |= {"maximum", "maxLength", "raw", "unique", "description"}


def check_schema(schema: Schema) -> Schema:
    """Return schema. Raises ValueError for a keyword that `validate` would not enforce."""
    if unknown := set(schema) - KEYWORDS:
        raise ValueError(f"unknown keywords {unknown} in {schema}")
    nested = [schema[key] for key in ("items", "values") if key in schema]
    for child in (*schema.get("properties", {}).values(), *nested):
        check_schema(child)
    return schema


def refuse(path: str, rule: str) -> NoReturn:
    """Raise the ApiError (400) for the field at path."""
    raise ApiError(400, f"{path or 'body'}: {rule}")


class NotJson(NamedTuple):
    """Stands for a value that Python's decoder lets through, until its path is known."""

    rule: str


def validate(schema: Schema, value: Any, path: str = "") -> Any:
    """Return value as schema allows it, less the members that are null.

    Raises ApiError (400) that names the path and the rule: "ports[0].host_port: must be ...".
    """
    if isinstance(value, NotJson):
        refuse(path, value.rule)
    types = schema["type"].split("|")
    if not any(type(value) in TYPES[name] for name in types):
        names = " or ".join(("an " if name[0] in "aio" else "a ") + name for name in types)
        refuse(path, f"must be {schema.get('description') or names}")
    if isinstance(value, str):
        validate_string(schema, value, path)
    elif type(value) in TYPES["number"]:
        low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
        if not low <= value <= high:
            limits = f"between {low:,} and {high:,}" if high < math.inf else f"at least {low:,}"
            refuse(path, f"must be {schema.get('description') or limits}")
    elif isinstance(value, dict):
        return validate_object(schema, value, path)
    elif isinstance(value, list):
        items = [validate(schema["items"], item, f"{path}[{i}]") for i, item in enumerate(value)]
        if schema.get("unique") and len(set(items)) < len(items):
            refuse(path, "must not name the same twice")
        return items
    return value


def validate_string(schema: Schema, value: str, path: str) -> None:
    """Check one string. Raises ApiError (400)."""
    if "\0" in value and not schema.get("raw"):
        refuse(path, "must not contain a NUL character")
    if re.search(r"[\ud800-\udfff]", value):
        refuse(path, "must not contain a lone surrogate")
    if "enum" in schema and value not in schema["enum"]:
        refuse(path, f"must be one of {', '.join(schema['enum'])}")
    if len(value) > schema.get("maxLength", MAX_BODY):
        refuse(path, f"must be at most {schema['maxLength']} characters")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        refuse(path, f"must be {schema['description']}")


def validate_object(schema: Schema, value: dict[str, Any], path: str) -> dict[str, Any]:
    """Return one object's members that are not null. Raises ApiError (400)."""
    properties, result = schema.get("properties", {}), {}
    for name, member in value.items():
        if "values" in schema:
            validate_string({}, name, path)
        elif name not in properties:
            known = f"known here: {', '.join(properties)}" if properties else "none is known here"
            refuse(f"{path}.{name}" if path else name, f"is unknown; {known}")
        if member is not None:
            rule = schema.get("values") or properties[name]
            result[name] = validate(rule, member, f"{path}.{name}" if path else name)
    for name in schema.get("required", ()):
        if name not in result:
            refuse(f"{path}.{name}" if path else name, "is required")
    return result


def decode_json(body: bytes) -> Any:
    """Return the value of strict JSON (RFC 8259, and I-JSON's unique keys), or one with NotJson in
    it, which `validate` refuses. Raises ApiError (400).
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: is not UTF-8 at byte {error.start}") from error
    # Invariant: the depth is known before the decoder, which recurses, sees it: all that is left
    # without escapes and strings are brackets and scalars.
    bare = re.sub(rb'"[^"]*"?', b"", re.sub(rb"\\.", b"", body, flags=re.DOTALL))
    depth = 0
    for bracket in re.finditer(rb"[\[{\]}]", bare):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"body: is nested more than {MAX_DEPTH} deep")
    try:
        return json.loads(
            text,
            object_pairs_hook=unique_object,
            parse_constant=lambda name: NotJson(f"{name} is not JSON"),
            parse_int=bounded_int,
        )
    except ValueError as error:
        raise ApiError(400, f"body: is not JSON: {error}") from error


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | NotJson:
    """Return pairs as a dict, unless a key comes twice."""
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            return NotJson(f"has the key {json.dumps(name)} more than once")
        result[name] = value
    return result


def bounded_int(digits: str) -> int | NotJson:
    """Return an integer's value, unless no field could mean it."""
    if len(digits) > MAX_DIGITS:
        return NotJson(f"has a number of more than {MAX_DIGITS} digits")
    return int(digits)


def decode_query(query: str, schema: Schema) -> dict[str, Any]:
    """Return the parameters of a query string, typed as schema says. Raises ApiError (400)."""
    values: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        raw_name, _, raw_value = part.partition("=")
        name, value = (unquote(raw, errors="replace") for raw in (raw_name, raw_value))
        if name in values:
            raise ApiError(400, f"query parameter {name} is given more than once")
        values[name] = value
        if schema["properties"].get(name, {}).get("type") == "boolean":
            values[name] = BOOLEANS.get(value.lower(), value)
    checked: dict[str, Any] = validate(schema, values, "query")
    return checked


# --------------------------------------------------------------------------------------------------
# Request schemas: the tables, nothing else
# --------------------------------------------------------------------------------------------------

SIGNALS = (
    "ABRT|ALRM|BUS|CHLD|CONT|FPE|HUP|ILL|INT|KILL|PIPE|POLL|PROF|QUIT|SEGV|STOP|SYS|TERM|TRAP|TSTP"
    "|TTIN|TTOU|URG|USR1|USR2|VTALRM|WINCH|XCPU|XFSZ"
)
PORT = (
    "0{0,9}(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
)
PORT_RULE = "a port from 1 to 65535, in ASCII digits"
NAME_RULE = "letters, digits, '_', '.' or '-', beginning with a letter or digit"
# The distribution project's reference grammar: [domain[:port]/]path[:tag][@digest]
IMAGE = (
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
)
IMAGE_RULE = "an image such as nginx, nginx:1.27, host:5000/team/app:tag or name@sha256:..."


def text(pattern: str = "(?s:.*)", rule: str = "a string", longest: int = 4096) -> Schema:
    """Return the schema of a string that the pattern matches whole."""
    return {"type": "string", "pattern": pattern, "description": rule, "maxLength": longest}


def one_of(*words: str) -> Schema:
    """Return the schema of one of several words."""
    return {"type": "string", "enum": words}


def whole(low: int, high: int) -> Schema:
    """Return the schema of an integer."""
    return {"type": "integer", "minimum": low, "maximum": high}


def many(item: Schema, **more: Any) -> Schema:
    """Return the schema of an array."""
    return {"type": "array", "items": item, **more}


def record(required: str, **properties: Schema) -> Schema:
    """Return the checked schema of an object with these members."""
    return check_schema({"type": "object", "properties": properties, "required": required.split()})


STRINGS = many({"type": "string"})
BOOLEAN = {"type": "boolean", "description": "true or false"}
PORT_NUMBER = {**text(PORT, PORT_RULE), **whole(1, 65535), "type": "string|integer"}
SIGNAL = text(f"(?ai:(SIG)?({SIGNALS}))", "a POSIX signal name such as SIGTERM or HUP")
USER_ID = whole(0, 2**32 - 2)  # one more means "no change"
NETWORK = text(CONTAINER.pattern, f"a network's name: {NAME_RULE}", 255)
MOMENT = text(longest=64)
PLATFORM = text(r"[a-z0-9_]+(/[a-zA-Z0-9_.]+){0,2}", "os/arch such as linux/amd64", 64)
EVENT = text(EVENT_ID.pattern, "an id that a log stream sent: 1700000000.000000000-1")

PORTS = record(
    "container_port",
    container_port=PORT_NUMBER,
    host_port={**PORT_NUMBER, "pattern": f"({PORT})?"},  # empty: the Engine picks one
    protocol=one_of("tcp", "udp", "sctp"),
    host_ip=text(longest=45),
)
VOLUMES = record(
    "target",
    source=text("(?s:.+)", "a path or a volume's name"),
    target=text(r"/+[^/](?s:.*)", "an absolute path other than /"),
    read_only=BOOLEAN,
    type=one_of("bind", "volume", "tmpfs"),
)
RESTART = record(
    "name",
    name=one_of("no", "always", "on-failure", "unless-stopped"),
    max_retry_count=whole(0, 2**31 - 1),
)
RESOURCES = record(
    "",
    # A hundredth is the Engine's own floor; much less would round to "no limit".
    cpus={"type": "number", "minimum": 0.01, "maximum": 1_000_000},
    memory_mb=whole(6, 2**40),
    cpu_shares=whole(2, 262_144),
)
CREATE = record(
    "image",
    image=text(f"{IMAGE}|(?:sha256:)?[0-9a-f]{{64}}", f"{IMAGE_RULE}, or an image's id", 512),
    name=text(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", f"at least two {NAME_RULE}", 255),
    cmd=STRINGS,
    entrypoint=STRINGS,
    env=many(text("(?s:[^=]+=.*)", "NAME=value", MAX_BODY)),
    labels={"type": "object", "values": {"type": "string"}},
    working_dir=text("(?s:/.*)", "an absolute path"),
    user=text(r"[^\s:]+(:[^\s:]+)?", "user, uid, user:group or uid:gid", 255),
    hostname=text(r"[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?", "letters, digits, '.' and '-'", 64),
    ports=many(PORTS),
    volumes=many(VOLUMES),
    networks=many(NETWORK, unique=True),
    network_mode=text(f"(container:)?{CONTAINER.pattern}", "bridge, container:ID or a name", 255),
    restart_policy=RESTART,
    resources=RESOURCES,
    pull=one_of("missing", "always", "never"),
)
PULL = record("image", image=text(IMAGE, IMAGE_RULE, 512), platform=PLATFORM)
STOP = record("", timeout=whole(0, MAX_STOP), signal=SIGNAL)
KILL = record("", signal=SIGNAL)
NOTHING = record("")
FILE = record(
    "path content",
    path=text(longest=MAX_PATH),
    content={"type": "string", "raw": True},
    encoding=one_of("utf-8", "base64"),
    permission=text("0?[0-7]{1,4}", "an octal mode up to 7777, such as 0644"),
    uid=USER_ID,
    gid=USER_ID,
    atomic=BOOLEAN,
)
LIST_QUERY = record("", all=BOOLEAN)
REMOVE_QUERY = record("", force=BOOLEAN, v=BOOLEAN)
LOGS_QUERY = record(
    "",
    follow=BOOLEAN,
    tail=text("all|[0-9]{1,9}", "all or an integer of at least 0"),
    since=MOMENT,
    until=MOMENT,
    timestamps=BOOLEAN,
    stdout=BOOLEAN,
    stderr=BOOLEAN,
    format=one_of("text", "json"),
    last_event_id=EVENT,
)

# --------------------------------------------------------------------------------------------------
# Sockets: field lines, body framing and waits, for clients and Engine alike
# --------------------------------------------------------------------------------------------------

Fields = dict[str, list[str]]


class BadMessage(ApiError):
    """What a peer sent is not HTTP, or ended too early: for a client 400."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


def parse_fields(block: bytes) -> Fields:
    """Return field values by lower-case name, in order, of lines that end in an empty one.

    Raises BadMessage (RFC 9112 section 5).
    """
    if not FIELD_BLOCK.fullmatch(block):
        raise BadMessage("a header line is not of the form Name: value")
    fields: Fields = {}
    for line in block.decode("latin-1").split("\r\n")[:-2]:
        name, _, value = line.partition(":")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    return fields


def framing(fields: Fields) -> int | None:
    """Return a body's length in bytes; None for a chunked one (RFC 9112 section 6).

    Raises BadMessage for every framing that two parsers might read in two ways, ApiError (501) for
    a coding other than chunked.
    """
    lengths, codings = fields.get("content-length", []), fields.get("transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        raise BadMessage("more than one Content-Length or Transfer-Encoding")
    if codings:
        if codings[0].lower() != "chunked":
            raise ApiError(501, "Transfer-Encoding: only chunked is understood")
        return None
    length = lengths[0] if lengths else "0"
    if not (length.isascii() and length.isdigit()):
        raise BadMessage("Content-Length must be plain digits")
    # 18 digits are past every limit here; int() of thousands would take its time.
    return int(length.lstrip("0")[:18] or "0")


@functools.lru_cache(maxsize=512)
def chunk_size(line: bytes) -> int:
    """Return the size that a chunk's line gives. Raises BadMessage (RFC 9112 section 7.1)."""
    match = CHUNK_LINE.fullmatch(line)
    if not match or len(line) > MAX_CHUNK_LINE:
        raise BadMessage("body: bad chunked coding")
    return int(match[1], 16)


class Body:
    """Decodes a message body from bytes as they come; what follows it is left in `rest`.

    length: in bytes; None for a chunked body, -1 for one that ends with the connection.
    """

    def __init__(self, length: int | None) -> None:
        self.done = length == 0
        self._chunked = length is None
        # Each chunk's line begins with the CRLF that ends the chunk before; so does the first's.
        self.rest = b"\r\n" if self._chunked else b""
        self._left = length or 0  # bytes of the body, or of the chunk being read
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """Return the body's bytes in data. Raises BadMessage for bad chunked coding."""
        if not self._chunked:
            if self._left < 0:
                return data
            piece, self.rest = data[: self._left], data[self._left :]
            self._left -= len(piece)
            self.done = not self._left
            return piece
        data, position, pieces, left = self.rest + data, 0, [], self._left
        length = len(data)
        while not self._last:
            end = position + left
            pieces.append(data[position:end])
            if end > length:
                position, left = length, end - length
                break
            position, left = end, 0
            end = data.find(b"\n", position + 2) + 1
            if not end:
                rest = data[position:]
                # Invariant: neither a chunk's line nor the trailer is waited for without a bound.
                if len(rest) > MAX_CHUNK_LINE or not b"\r\n".startswith(rest[:2]):
                    raise BadMessage("body: bad chunked coding")
                break
            left = chunk_size(data[position:end])
            position, self._last = end, not left
        if self._last:
            position = self._trailer_end(data, position)
        self.rest, self._left = data[position:], left
        return b"".join(pieces)

    def _trailer_end(self, data: bytes, start: int) -> int:
        """Return where the trailer ends, or start if it goes on. Its fields are dropped."""
        match = FIELD_BLOCK.match(data, start)
        end = match.end() if match else len(data)
        if end - start > MAX_TRAILER or not (match or FIELD_BLOCK_BEGUN.fullmatch(data, start)):
            raise BadMessage("body: bad chunked coding")
        self.done = bool(match)
        return end if match else start

    def end(self) -> None:
        """Take the end of the connection. Raises BadMessage if the body was not whole."""
        if self._left >= 0 and not self.done:
            raise BadMessage("the body ended early")
        self.done = True


class Watch(NamedTuple):
    """Whom a wait must not outlive: a client, and (by a socket that tells of its end) the agent."""

    client: Optional[socket.socket] = None
    stop: Optional[socket.socket] = None

    def wait(self, sock: socket.socket, deadline: float) -> bool:
        """Wait until sock can be read; return False if it cannot at deadline (monotonic).

        Raises ClientGone or Stopping.
        """
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        poll = select.poll()  # select() cannot take descriptors past 1023
        poll.register(sock, select.POLLIN)
        if self.client:  # its end is shut, whatever is still to be read from it
            poll.register(self.client, select.POLLRDHUP)
        if self.stop:
            poll.register(self.stop, select.POLLIN)
        seconds = deadline - time.monotonic()
        ready = {descriptor for descriptor, _ in poll.poll(max(0, math.ceil(seconds * 1000)))}
        if self.stop and self.stop.fileno() in ready:
            raise Stopping
        if sock.fileno() in ready or not ready:
            return bool(ready)
        # The client has gone, or has shut only its half of the connection (nc -N): who waits for
        # an answer gets what comes soon.
        patience = time.monotonic() + HALF_CLOSED
        came = self._replace(client=None).wait(sock, min(deadline, patience))
        if not came and patience <= deadline:
            raise ClientGone
        return came


NOBODY = Watch()


def receive(sock: socket.socket, deadline: float, watch: Watch = NOBODY) -> bytes:
    """Return what comes next, b"" at the end. Raises socket.timeout past deadline (monotonic).

    A TLS socket can be readable with nothing in it for us, so it must not block.
    """
    sock.setblocking(False)
    # Invariant: a peer that never stops sending is held to the deadline, too.
    while watch.wait(sock, deadline) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            return sock.recv(RECEIVE)
    raise socket.timeout("timed out")


def connect(address: Address, tls: ssl.SSLContext | None) -> socket.socket:
    """Return a socket connected to an address, TLS done. Raises OSError or ValueError."""
    with contextlib.ExitStack() as on_error:
        if address.path:
            sock = on_error.enter_context(socket.socket(socket.AF_UNIX))
            # Not settimeout(), with which a full backlog is an error at once.
            patience = struct.pack("@qq", int(CONNECT_TIMEOUT), 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            sock.connect(address.path)
            sock.settimeout(CONNECT_TIMEOUT)
        else:
            there = (address.host, address.port)
            sock = on_error.enter_context(socket.create_connection(there, CONNECT_TIMEOUT))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            # Invariant: the Engine's certificate is verified, and is for the host asked for.
            sock = tls.wrap_socket(sock, server_hostname=address.host or None)
        on_error.pop_all()
    return sock


# --------------------------------------------------------------------------------------------------
# Engine client: calls (JSON) and streams (bytes) over a Unix socket, TCP or TLS
# --------------------------------------------------------------------------------------------------

Query = Optional[Mapping[str, Any]]

# Statuses of the Engine that the caller is given as they are; any other is 502.
KEPT = (400, 401, 403, 404, 409, 500, 501)
CUT = "the Engine broke off its answer"


class Answer:
    """An answer of the Engine, its head read; its body comes whole or piece by piece.

    http.client's own forgives bad framing, waits anew for each byte, and cannot be polled.
    """

    def __init__(self, sock: socket.socket, watch: Watch, deadline: float) -> None:
        """Read the head. Raises EngineError, OSError, and what Watch.wait raises."""
        self.sock, self._watch, self._deadline = sock, watch, deadline
        self.until_end = False
        self.close: Callable[[], None] = sock.close  # or what keeps the connection, if it can
        self._rest = b""
        self._read_at = 0.0
        self._read_head()
        while 100 <= self.status < 200 and self.status != 101:  # interim: RFC 9110 section 15.2
            self._read_head()
        try:
            length = framing(self.fields)
        except ApiError as error:
            raise EngineError(502, f"the Engine's answer is not HTTP: {error}") from error
        if self.status in (101, 204, 304):
            length = 0
        elif length == 0 and "content-length" not in self.fields:
            length = -1
        self.until_end = length == -1  # whether only the end of the connection ends the body
        self._body = Body(length)

    def _read_head(self) -> None:
        """Read one head into status and fields."""
        head = self._rest
        while b"\r\n\r\n" not in head:
            data = self._receive(self._deadline)
            if data is None:
                raise EngineError(504, "the Engine did not answer in time")
            if not data:
                raise ConnectionResetError("it hung up without an answer")
            head += data
            if len(head) > MAX_FIELD_BLOCK + RECEIVE:
                raise EngineError(502, "the Engine's answer has too large a head")
        head, end, self._rest = head.partition(b"\r\n\r\n")
        first, _, block = (head + end).partition(b"\r\n")
        match = STATUS_LINE.fullmatch(first)
        if not match:
            raise EngineError(502, "the Engine's answer is not HTTP")
        try:
            self.status, self.fields = int(match[1]), parse_fields(block)
        except BadMessage as error:
            raise EngineError(502, f"the Engine's answer is not HTTP: {error}") from error

    def read(self, deadline: float) -> bytes | None:
        """Return bytes of the body, b"" at its end, None if none came until deadline (monotonic).

        Raises EngineError (502) if the body is cut short, and what Watch.wait raises.
        """
        while not self._body.done:
            try:
                data = self._rest or self._receive(deadline)
                if data is None:
                    return None
                self._rest = b""
                piece = self._body.feed(data)
                if not data:
                    self._body.end()
            except (OSError, BadMessage) as error:
                raise EngineError(502, f"{CUT}: {describe(error)}") from error
            if piece:
                return piece
        return b""

    def _receive(self, deadline: float) -> bytes | None:
        """Return what the Engine sends next, b"" if it hung up, None if it stayed silent."""
        since = time.monotonic() - self._read_at
        if since < BURST_PAUSE and self.until_end:
            time.sleep(BURST_PAUSE - since)
        try:
            return receive(self.sock, deadline, self._watch)
        except socket.timeout:
            return None
        finally:
            self._read_at = time.monotonic()

    def read_all(self) -> bytes:
        """Return the whole body. Raises EngineError past MAX_ANSWER or the deadline."""
        pieces, size = [], 0
        while piece := self.read(self._deadline):
            pieces.append(piece)
            size += len(piece)
            # Invariant: no answer is read past a bound.
            if size > MAX_ANSWER:
                raise EngineError(502, "the Engine's answer is too large")
        if piece is None:
            raise EngineError(504, "the Engine did not finish its answer in time")
        return b"".join(pieces)

    def is_reusable(self) -> bool:
        """Return whether the connection can take the next request."""
        closing = self.until_end or "close" in self.fields.get("connection", [])
        return self._body.done and not self._body.rest and not closing


class Engine:
    """The Docker Engine at one address; remembers its API version and idle connections."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, version: str = "") -> None:
        port = 2376 if tls else 2375
        self.address = address if address.path or address.port else address._replace(port=port)
        self._tls = tls
        self._pinned = version
        self._version = ("", 0.0)  # in use, and since when
        self._idle: list[tuple[float, socket.socket]] = []  # when it became so, connection
        self._health_lock = threading.Lock()
        self._health = (-HEALTH_CACHE, False)

    def call(self, method: str, path: str, *args: Any, **options: Any) -> bytes:
        """Return the body of the Engine's answer, b"" if it has none; as `open` otherwise."""
        with contextlib.closing(self.open(method, path, *args, **options)) as answer:
            return answer.read_all()

    def json(self, method: str, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Return the JSON object the Engine answers with; as `open` otherwise."""
        answer: dict[str, Any] = decode_answer(self.call(method, path, *args, **options))
        return answer

    def open(
        self,
        method: str,
        path: str,
        query: Query = None,
        body: Any = None,
        seconds: float = CALL_TIMEOUT,
        **options: Any,
    ) -> Answer:
        """Return an answer whose body is still to be read. Raises EngineError for a refusal.

        path: after the version, made of constants and quoted parts. seconds: for all of it, or
        until a stream begins. options: as `_ask` has them.
        An Engine that was upgraded refuses a version with 400 before it does anything, so that
        even what changes something can be tried again with the version that it speaks by now.
        """
        if body is not None:
            json_type = {"Content-Type": "application/json"}
            options.update(body=encode_json(body), headers=json_type)
        target = path + ("?" + urlencode(query) if query else "")
        deadline = time.monotonic() + seconds
        version = self.version(deadline)
        for last in (False, True):
            answer = self._ask(method, f"/v{version}{target}", deadline, **options)
            if answer.status in (200, 201, 204, 304):
                break
            with contextlib.closing(answer):
                error = engine_error(answer.status, answer.read_all())
            if last or self._pinned or error.status != 400:
                raise error
            used, version = version, self.version(deadline, again=True)
            if used == version:
                raise error
        return answer

    def version(self, deadline: float, again: bool = False) -> str:
        """Return the API version in use, such as "1.41", asked for if it may be another by now."""
        version, asked = self._version
        if self._pinned:
            return self._pinned
        if again or not version or time.monotonic() - asked > VERSION_KEPT:
            version = self._negotiate(deadline)
            self._version = version, time.monotonic()
        return version

    def healthy(self) -> bool:
        """Return whether the Engine answers; it is asked at most once in HEALTH_CACHE seconds."""
        with self._health_lock:
            asked, healthy = self._health
            if time.monotonic() - asked >= HEALTH_CACHE:
                healthy = True
                try:
                    self._negotiate(time.monotonic() + PING_TIMEOUT)
                except EngineError:
                    healthy = False
                self._health = (time.monotonic(), healthy)
            return healthy

    def close_idle(self, before: float = math.inf) -> None:
        """Close the connections that have been idle since before a time (monotonic)."""
        with contextlib.suppress(IndexError):  # another thread took the last one
            while self._idle[0][0] < before:
                self._idle.pop(0)[1].close()

    def _negotiate(self, deadline: float) -> str:
        """Return the API version both sides speak (Engine API, "Ping"). Raises EngineError."""
        with contextlib.closing(self._ask("GET", "/_ping", deadline)) as answer:
            answer.read_all()
        offered = answer.fields.get("api-version", [""])[0]
        if answer.status != 200 or not re.fullmatch(r"1\.[0-9]{1,3}", offered):
            raise EngineError(502, f"{self.address} does not answer as a Docker Engine does")
        newest = min(tuple(map(int, offered.split("."))), NEWEST_API)
        return "{}.{}".format(*newest)

    def _ask(
        self,
        method: str,
        target: str,
        deadline: float,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        watch: Watch = NOBODY,
        plain: bool = False,
        again: bool = False,
    ) -> Answer:
        """Return an answer whose head was read before deadline. A GET has no headers of its own.

        plain: as HTTP/1.0, which the Engine does not cut in chunks: a fifth quicker to read, but
        whether it is whole has to be found out. Raises EngineError, and what Watch.wait raises.
        """
        # Invariant: what changes something is never sent twice. Only a GET goes out on a connection
        # that was idle, and once more on a new one if the Engine had closed that.
        idle = None if plain or again or method != "GET" else self._idle_connection()
        sock = idle or self._connect()
        with contextlib.ExitStack() as on_error:
            on_error.callback(sock.close)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                if method == "GET":
                    # In a fifth of the time that http.client takes to put these three lines.
                    request = f"GET {target} HTTP/1.{0 if plain else 1}\r\nHost: docker\r\n\r\n"
                    sock.sendall(request.encode())
                else:
                    connection = http.client.HTTPConnection("docker")
                    connection.sock = sock
                    connection.request(method, target, body, headers or {})
                answer = Answer(sock, watch, deadline)
                if method == "GET":
                    answer.close = functools.partial(self._keep, answer)
                on_error.pop_all()
                return answer
            except socket.timeout as error:
                raise EngineError(504, "the Engine did not take the request in time") from error
            except OSError as error:
                self._version = ("", 0.0)  # perhaps it was restarted as another version
                if not (idle and isinstance(error, ConnectionError)):
                    raise EngineError(502, f"{CUT}: {describe(error)}") from error
        return self._ask(method, target, deadline, body, headers, watch, again=True)

    def _idle_connection(self) -> socket.socket | None:
        """Return a connection that the Engine has kept, and is silent on; None if there is none."""
        with contextlib.suppress(IndexError):  # when there is none, or none any more
            while True:
                _, sock = self._idle.pop()
                if not NOBODY.wait(sock, 0):
                    return sock
                sock.close()
        return None

    def _keep(self, answer: Answer) -> None:
        """Keep a connection whose answer was read whole, close any other."""
        if answer.is_reusable() and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append((time.monotonic(), answer.sock))
        else:
            answer.sock.close()

    def _connect(self) -> socket.socket:
        """Return a connection to the Engine, TLS done. Raises EngineError (503)."""
        try:
            return connect(self.address, self._tls)
        except (OSError, ValueError) as error:
            self._version = ("", 0.0)  # what comes back may be another version
            message = f"the Engine at {self.address} is not reachable: {describe(error)}"
            raise EngineError(503, message) from error


def engine_error(status: int, body: bytes) -> EngineError:
    """Return the error for a refusal of the Engine, whose body is {"message": ...}."""
    message = None
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        message = json.loads(body)["message"]
    if not isinstance(message, str):
        return EngineError(502, f"the Engine answered {status} without saying why")
    return EngineError(status if status in KEPT else 502, message)


def decode_answer(body: bytes, kind: type = dict) -> Any:
    """Return the JSON object (or list) in an answer of the Engine. Raises EngineError (502)."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EngineError(502, "the Engine's answer is not JSON") from error
    if not isinstance(answer, kind):
        raise EngineError(502, "the Engine's answer is not the JSON that was asked for")
    return answer


def member(answer: dict[str, Any], name: str, kind: type) -> Any:
    """Return one member of an Engine's answer. Raises EngineError (502)."""
    if not isinstance(answer.get(name), kind):
        raise EngineError(502, f"the Engine's answer has no {name}")
    return answer[name]


def member_id(answer: dict[str, Any]) -> str:
    """Return the id in an Engine's answer about a container. Raises EngineError (502)."""
    if not CONTAINER.fullmatch(member(answer, "Id", str)):
        raise EngineError(502, "the Engine's answer has no Id")
    return str(answer["Id"])


# --------------------------------------------------------------------------------------------------
# Containers and images: our requests to the Engine's, its answers to ours
# --------------------------------------------------------------------------------------------------


# Our fields and the Engine's: a create's, those of its resources with our unit, a list's.
CREATED = {"image": "Image", "cmd": "Cmd", "entrypoint": "Entrypoint", "env": "Env"}
CREATED.update(labels="Labels", working_dir="WorkingDir", user="User", hostname="Hostname")
RESOURCE_UNITS = {"cpus": ("NanoCpus", 10**9), "memory_mb": ("Memory", 2**20)}
RESOURCE_UNITS.update(cpu_shares=("CpuShares", 1))
LISTED = {"id": "Id", "names": "Names", "image": "Image", "image_id": "ImageID"}
LISTED.update(command="Command", created="Created", state="State", status="Status")
LISTED.update(ports="Ports", labels="Labels")
LISTED_PORT = {"ip": "IP", "private_port": "PrivatePort", "public_port": "PublicPort"}
LISTED_PORT.update(type="Type")


def container_path(name: str, action: str = "") -> str:
    """Return the Engine's path for a container. Raises ApiError (400) for what is no id or name."""
    # Invariant: only what matches reaches an Engine URL, and it is quoted there all the same.
    if not CONTAINER.fullmatch(name):
        raise ApiError(400, f"a container's id or name is {NAME_RULE}")
    return f"/containers/{quote(name, safe='')}" + (f"/{action}" if action else "")


def engine_ports(ports: list[dict[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """Return the Engine's PortBindings: {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}."""
    bindings: dict[str, list[dict[str, str]]] = {}
    for index, port in enumerate(ports):
        host_ip = port.get("host_ip", "")
        if "host_ip" in port and ("%" in host_ip or parse_ip(host_ip) is None):
            refuse(f"ports[{index}].host_ip", "must be an IPv4 or IPv6 address")
        host_port = port.get("host_port", "")
        exposed = f"{int(port['container_port'])}/{port.get('protocol', 'tcp')}"
        published = str(int(host_port)) if host_port != "" else ""
        bindings.setdefault(exposed, []).append({"HostIp": host_ip, "HostPort": published})
    return bindings


def engine_mount(volume: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the Engine's Mount. Mounts, not Binds: no colon in a path can become an option."""
    source = volume.get("source", "")
    kind = volume.get("type") or ("bind" if source.startswith("/") else "volume")
    if kind == "tmpfs" and source:
        refuse(f"{path}.source", "must be absent for a tmpfs")
    if kind == "bind" and not source.startswith("/"):
        refuse(f"{path}.source", "must be an absolute path for a bind")
    if kind == "volume" and not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", source):
        refuse(f"{path}.source", f"must be a volume's name: at least two {NAME_RULE}")
    there = {"Target": volume["target"], "ReadOnly": volume.get("read_only", False)}
    return {"Type": kind, "Source": source, **there}


def engine_networks(body: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the network mode and the networks to join, the first of them at create."""
    names, mode = body.get("networks", []), body.get("network_mode", "")
    if not names:
        return mode, []
    if mode in ("host", "none") or ":" in mode:
        refuse("networks", f"cannot be joined in network_mode {mode}")
    if mode in ("", names[0]):
        return names[0], names
    if mode in ("bridge", "default"):
        return mode, names
    return mode, [mode, *(name for name in names if name != mode)]


def engine_container(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the body of "Create a container" and the networks to connect before the start.

    Every value comes from a validated field. Raises ApiError (400) for fields that contradict.
    """
    ports = engine_ports(body.get("ports", []))
    mode, networks = engine_networks(body)
    host: dict[str, Any] = {"PortBindings": ports}
    if volumes := body.get("volumes"):
        host["Mounts"] = [engine_mount(v, f"volumes[{i}]") for i, v in enumerate(volumes)]
    if mode:
        host["NetworkMode"] = mode
    if policy := body.get("restart_policy"):
        if "max_retry_count" in policy and policy["name"] != "on-failure":
            refuse("restart_policy.max_retry_count", "goes only with on-failure")
        retries = policy.get("max_retry_count", 0)
        host["RestartPolicy"] = {"Name": policy["name"], "MaximumRetryCount": retries}
    for ours, (theirs, unit) in RESOURCE_UNITS.items():
        if ours in (resources := body.get("resources", {})):
            host[theirs] = round(resources[ours] * unit)
    container = {theirs: body[ours] for ours, theirs in CREATED.items() if ours in body}
    container.update(ExposedPorts={port: {} for port in ports}, HostConfig=host)
    if networks:
        container["NetworkingConfig"] = {"EndpointsConfig": {networks[0]: {}}}
    return container, networks[1:]


def create_container(
    engine: Engine, body: dict[str, Any], auth: str, watch: Watch
) -> dict[str, Any]:
    """Create and start a container; return {"Id", "Warnings"}. Nothing is left if that fails."""
    container, networks = engine_container(body)
    query = {"name": body["name"]} if "name" in body else {}
    create = functools.partial(
        engine.json, "POST", "/containers/create", query, container, seconds=START_TIMEOUT
    )
    pull = body.get("pull", "missing")
    if pull == "always":
        pull_image(engine, body, auth, watch)
    try:
        created = create()
    except EngineError as error:
        if error.status != 404 or pull != "missing" or has_image(engine, body["image"]):
            raise
        pull_image(engine, body, auth, watch)
        created = create()
    path = container_path(member_id(created))
    try:
        for network in networks:
            target = f"/networks/{quote(network, safe='')}/connect"
            engine.call("POST", target, body={"Container": created["Id"]})
        engine.call("POST", f"{path}/start", seconds=START_TIMEOUT)
    except EngineError as error:
        try:
            engine.call("DELETE", path, {"force": 1, "v": 1}, seconds=START_TIMEOUT)
        except EngineError as left:
            message = f"{error}; and container {created['Id'][:12]} is left behind: {left}"
            raise EngineError(error.status, message) from error
        raise
    return created


def has_image(engine: Engine, image: str) -> bool:
    """Return whether the Engine has an image."""
    try:
        engine.call("GET", f"/images/{quote(image)}/json")
    except EngineError as error:
        if error.status != 404:
            raise
        return False
    return True


def split_image(image: str) -> tuple[str, str]:
    """Return an image's name and its digest, tag, or "latest": without one, all tags are pulled."""
    name, _, digest = image.partition("@")
    slash = name.rfind("/") + 1  # a colon before it belongs to the registry's port
    repository, _, tag = name[slash:].partition(":")
    return name[:slash] + repository, digest or tag or "latest"


def pull_progress(
    engine: Engine, body: dict[str, Any], auth: str, watch: Watch
) -> Iterator[dict[str, Any] | None]:
    """Yield the words of a pull as they come, None after PING_INTERVAL of silence.

    body: {"image", "platform"?}; auth: X-Registry-Auth, checked. Raises EngineError for a pull
    that fails; closing the generator ends the pull.
    """
    name, tag = split_image(body["image"])
    if re.fullmatch("(sha256:)?[0-9a-f]{64}", body["image"]):
        raise EngineError(404, f"no such image: {body['image']}; an id cannot be pulled")
    query = {"fromImage": name, "tag": tag, **{k: body[k] for k in ("platform",) if k in body}}
    headers = {"X-Registry-Auth": auth} if auth else {}
    try:
        answer = engine.open(
            "POST", "/images/create", query, headers=headers, watch=watch, seconds=PULL_SILENCE
        )
    except EngineError as error:
        raise pull_error(error.status, error.message) from error
    rest, heard = b"", time.monotonic()
    with contextlib.closing(answer):
        while (data := answer.read(time.monotonic() + PING_INTERVAL)) != b"":
            if data is None:
                if time.monotonic() - heard > PULL_SILENCE:
                    raise EngineError(504, f"the Engine said nothing for {PULL_SILENCE:.0f} s")
                yield None
                continue
            heard = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE:
                raise EngineError(502, "the Engine's answer has too long a line")
            yield from map(pull_word, filter(bytes.strip, lines))
    if rest.strip():
        yield pull_word(rest)


def pull_word(line: bytes) -> dict[str, Any]:
    """Return one object of a pull's stream. Raises EngineError if it tells of one."""
    word: dict[str, Any] = decode_answer(line)
    if error := word.get("error") or word.get("errorDetail"):
        raise pull_error(502, str(error.get("message") if isinstance(error, dict) else error))
    return word


def pull_error(status: int, message: str) -> EngineError:
    """Return the error for a failed pull.

    The Engine reports most of a registry's refusals as 500, or inside a 200, with nothing but a
    sentence to tell them apart: the one place where an error's text is looked at.
    """
    for words, meaning in (
        ("unauthorized|authentication required|no basic auth|(incorrect|invalid) username", 401),
        ("denied:|is denied|access denied|forbidden", 403),
        ("(manifest|name) unknown|(?<!file )not found|no (such image|matching manifest)", 404),
        ("does not exist", 404),
        ("https?://|dial tcp|lookup |x509|timeout|EOF", 502),
    ):
        if status in (500, 502) and re.search(words, message, re.IGNORECASE):
            return EngineError(meaning, message)
    return EngineError(status, message)


def pull_image(engine: Engine, body: dict[str, Any], auth: str, watch: Watch) -> dict[str, Any]:
    """Pull an image; return {"image", "digest", "status"}. Raises EngineError."""
    status = digest = ""
    for word in pull_progress(engine, body, auth, watch):
        status = (word or {}).get("status") or status
        digest = told_digest(word) or digest
    return {**pull_result(engine, body["image"], digest), "status": status}


def told_digest(word: dict[str, Any] | None) -> str:
    """Return the digest that one object of a pull's stream tells of, "" for none."""
    match = re.fullmatch("Digest: (sha256:[0-9a-f]{64})", str((word or {}).get("status")))
    return match[1] if match else ""


def pull_result(engine: Engine, image: str, digest: str) -> dict[str, Any]:
    """Return {"image", "digest"} of a pulled image; digest: as the pull told it, if it did."""
    name, tag = split_image(image)
    full = image if image.endswith((f":{tag}", f"@{tag}")) else f"{name}:{tag}"
    if digest or ":" in tag:
        return {"image": full, "digest": digest or tag}
    found = engine.json("GET", f"/images/{quote(full)}/json").get("RepoDigests")
    default = re.compile("^(?:(?:index[.])?docker[.]io/)?(?:library/)?")  # names may leave it out
    for entry in found if isinstance(found, list) else ():
        repository, _, digest = str(entry).partition("@")
        if default.sub("", repository) == default.sub("", name):
            return {"image": full, "digest": digest}
    return {"image": full, "digest": None}


def shape_list(found: bytes) -> bytes:
    """Return our list of containers, as JSON, from the Engine's. Raises EngineError."""
    try:
        containers = [listed_container(entry) for entry in decode_answer(found, list)]
    except (AttributeError, KeyError, TypeError) as error:
        raise EngineError(502, "the Engine's answer is no list of containers") from error
    return encode_json({"containers": containers}) + b"\n"


# Those who ask for these ask over and over, and the Engine's answer is mostly the same.
container_list = functools.lru_cache(maxsize=4)(shape_list)
check_object = functools.lru_cache(maxsize=8)(decode_answer)


def listed_container(found: dict[str, Any]) -> dict[str, Any]:
    """Return one row of our list from one of "List containers"."""
    row = {ours: found.get(theirs) for ours, theirs in LISTED.items()}
    ports = found.get("Ports") or []
    row["ports"] = [{o: port.get(t) for o, t in LISTED_PORT.items()} for port in ports]
    row.update(id=found["Id"], names=row["names"] or [], labels=row["labels"] or {})
    return row


# --------------------------------------------------------------------------------------------------
# Files: written whole or not at all, and never outside the root
# --------------------------------------------------------------------------------------------------

# What each failure of a system call is to the client, and what may help.
FILE_ERRORS = {
    errno.EACCES: (403, "the agent may not: check the owner, or run the agent as root"),
    errno.EPERM: (403, "the agent may not: it lacks a capability, or the file is immutable"),
    errno.EROFS: (403, "mount the host's filesystem without :ro"),
    errno.ENOSPC: (507, "make room on the disk"),
    errno.EDQUOT: (507, "the owner's quota is used up"),
    errno.EFBIG: (507, "the filesystem or a limit allows no file of this size"),
    errno.ENAMETOOLONG: (400, "a name has at most 255 bytes on most filesystems"),
    errno.EINVAL: (400, "the filesystem does not take this name"),
    errno.EILSEQ: (400, "the filesystem does not take this name"),
    errno.ENOENT: (409, "something in the path is gone, or its filesystem makes no files"),
    errno.ENOTDIR: (409, "a part of the path is not a folder"),
    errno.EISDIR: (409, "there is a folder in the file's place"),
    errno.EEXIST: (409, "the path was changed by somebody else meanwhile; try again"),
    errno.ELOOP: (409, "the path was changed by somebody else meanwhile; try again"),
    errno.ENODATA: (409, "the path was changed by somebody else meanwhile; try again"),
    errno.ENXIO: (409, "there is something other than a regular file"),
    errno.ENODEV: (409, "there is something other than a regular file"),
    errno.ESPIPE: (409, "there is something other than a regular file"),
    errno.EAGAIN: (409, "another program holds a lease on the file; try again"),
    errno.ETXTBSY: (409, "the file is being executed; write it with atomic true"),
    errno.EBUSY: (409, "the file is a mount point; write it with atomic false"),
    errno.EMFILE: (503, "the agent has too many files open"),
    errno.ENFILE: (503, "the host has too many files open"),
}

WRITING = threading.Lock()  # held by who uses a temporary name or writes in place
ACCESS_LIST = "system.posix_acl_access"
FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def split_path(path: str) -> list[bytes]:
    """Return the components of a path on the host. Raises ApiError (400)."""
    parts = path.split("/")
    if not path.startswith("/") or ".." in parts or parts[-1] in ("", ".") or "\0" in path:
        refuse("path", "must be absolute, name a file, and have no .. component or trailing slash")
    encoded = [part.encode() for part in parts if part not in ("", ".")]
    if len(path.encode()) > MAX_PATH or any(len(part) > 255 for part in encoded):
        refuse("path", f"must have at most {MAX_PATH} bytes, and a name at most 255")
    return encoded


class Walk:
    """Descends from the root by held descriptors, making missing folders.

    A path is never looked at twice: each component is opened relative to the descriptor of the one
    before, and the kernel is told to follow no link. Links are read and resolved here, as the host
    would see them.
    """

    def __init__(self, root: str) -> None:
        try:
            self._stack = [os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
        except OSError as error:
            remedy = "run the agent's container with -v /:/host, or set HOST_ROOT=/ on a bare host"
            message = f"HOST_ROOT={root} is not there ({error.strerror}): {remedy}"
            raise ApiError(503, message) from error
        self._made: list[tuple[int, bytes]] = []  # (own descriptor of the parent, name)
        self._missing = self._links = 0

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close every held descriptor; on failure, remove the folders that were made first."""
        for parent, name in reversed(self._made):
            if kind:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    os.rmdir(name, dir_fd=parent)
            os.close(parent)
        for descriptor in self._stack:
            os.close(descriptor)

    def descend(self, parts: list[bytes]) -> int:
        """Return the descriptor of the folder that parts lead to; it is the walk's to close.

        Raises ApiError (400, 409) or OSError.
        """
        todo = [(part, False) for part in reversed(parts)]  # (component, whether from a link)
        while todo:
            part, linked = todo.pop()
            if part == b"..":
                # Invariant: .. is never opened, as a folder may be moved meanwhile; the way back
                # up is the way that was taken down, and ends at the root.
                if len(self._stack) == 1:
                    raise ApiError(400, "path: a link in it climbs above HOST_ROOT")
                os.close(self._stack.pop())
                continue
            try:
                # Invariant: a name is only resolved against a held descriptor, with O_NOFOLLOW.
                self._stack.append(os.open(part, FOLDER, dir_fd=self._stack[-1]))
            except FileNotFoundError:
                if linked:
                    raise ApiError(409, "path: a link in it leads nowhere") from None
                self._make(part)
                todo.append((part, linked))
            except NotADirectoryError:
                todo.extend((piece, True) for piece in reversed(self._read_link(part)))
        return self._stack[-1]

    def _make(self, name: bytes) -> None:
        self._missing += 1
        # Invariant: a folder that is made, removed and made again ends some time.
        if self._missing > MAX_PATH:
            raise ApiError(409, "path: is being changed by somebody else; try again")
        parent = os.dup(self._stack[-1])
        try:
            os.mkdir(name, 0o755, dir_fd=parent)
        except OSError as error:
            os.close(parent)
            if error.errno != errno.EEXIST:  # somebody else was faster: open theirs
                raise
        else:
            self._made.append((parent, name))

    def _read_link(self, name: bytes) -> list[bytes]:
        """Return the components of a link's target, back at the root if it is absolute."""
        try:
            target = os.readlink(name, dir_fd=self._stack[-1])
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
            raise
        self._links += 1
        if self._links > MAX_LINKS:
            raise ApiError(400, f"path: has more than {MAX_LINKS} links in it")
        if target.startswith(b"/"):
            while len(self._stack) > 1:
                os.close(self._stack.pop())
        return [part for part in target.split(b"/") if part not in (b"", b".")]


class FileWrite(NamedTuple):
    """What is to be in a file; None for mode, uid and gid means as it was."""

    content: bytes
    mode: Optional[int] = None
    uid: Optional[int] = None
    gid: Optional[int] = None
    atomic: bool = True


def write_beneath(root: str, path: str, write: FileWrite) -> None:
    """Write a file at an absolute path as the host with its filesystem at root sees it.

    Missing parents are made, 0755. Two writers of one path: the last rename wins. On failure
    nothing has changed. Raises ApiError: 400, 403, 409, 503, 507, and 500 for an I/O error.
    """
    *parents, name = split_path(path)
    for attempts_left in reversed(range(WALKS)):
        try:
            with Walk(root) as walk:
                write_in(walk.descend(parents), name, write)
            return
        except OSError as error:
            if attempts_left and error.errno == errno.ENOENT:
                continue  # another request made a folder here, failed and undid it
            status, advice = FILE_ERRORS.get(error.errno or 0, (500, "see the host's kernel log"))
            raise ApiError(status, f"path: {error.strerror}: {advice}") from error


def write_in(parent: int, name: bytes, write: FileWrite) -> None:
    """Write the file called name in the folder held open. Raises ApiError or OSError."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        found = None
    if found:
        check_regular(found)
    if found and not write.atomic:
        overwrite(parent, name, write)
    else:
        replace(parent, name, found, write)


def check_regular(found: os.stat_result) -> None:
    """Raise ApiError unless found is a regular file."""
    if stat.S_ISLNK(found.st_mode):
        raise ApiError(400, "path: is a link; write to what it points at")
    if not stat.S_ISREG(found.st_mode):
        raise ApiError(409, "path: there is something other than a regular file")


def write_all(descriptor: int, content: bytes) -> None:
    """Write content from the descriptor's position on. Raises OSError."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


@contextlib.contextmanager
def if_supported() -> Iterator[None]:
    """Go on without what the filesystem cannot do. Raises any other OSError."""
    try:
        yield
    except OSError as error:
        # EBADF: the C library would imitate posix_fallocate by reading, which we may not.
        if error.errno not in (errno.EBADF, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def set_owner_and_mode(descriptor: int, write: FileWrite, found: os.stat_result | None) -> None:
    """Give an open file what was asked for, else what was found, else 0644. Raises OSError."""
    now = os.fstat(descriptor)
    old = found or now
    uid = old.st_uid if write.uid is None else write.uid
    gid = old.st_gid if write.gid is None else write.gid
    if (uid, gid) != (now.st_uid, now.st_gid):
        os.fchown(descriptor, uid, gid)
    mode = stat.S_IMODE(found.st_mode) if found else 0o644
    mode = mode if write.mode is None else write.mode
    # After the owner: fchown clears the set-id bits. By descriptor, so the umask has no say.
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        os.fchmod(descriptor, mode)
        # Some filesystems have but one mode; without CAP_FSETID the kernel drops a set-group-id
        # bit and says nothing.
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode and (found or write.mode is not None):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def keep_attributes(descriptor: int, parent: int, name: bytes) -> None:
    """Give an open file the extended attributes of the one it is to replace, if it may have them.

    Raises OSError if not its access list, without which a file's group gets what the mask allows.
    """
    old = b"/proc/self/fd/%d/%b" % (parent, name)  # a name in a held folder, and not followed
    with if_supported():
        names = os.listxattr(old, follow_symlinks=False)
        if ACCESS_LIST not in names and ACCESS_LIST in os.listxattr(descriptor):
            os.removexattr(descriptor, ACCESS_LIST)  # it came from the folder
        for attribute in names:
            try:
                value = os.getxattr(old, attribute, follow_symlinks=False)
                os.setxattr(descriptor, attribute, value)
            except OSError:
                if attribute == ACCESS_LIST:
                    raise


@contextlib.contextmanager
def temporary_name(parent: int, name: bytes) -> Iterator[bytes]:
    """Give a name for what is to be renamed to `name`, and take it away again if it was not.

    It is made from the target's, so that the next write clears away what a killed agent leaves.
    """
    temporary = b".dockeragent-%08x" % binascii.crc32(name)
    with WRITING:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
        except OSError:  # somebody else has it
            temporary += secrets.token_hex(8).encode()
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=parent)


def replace(parent: int, name: bytes, found: os.stat_result | None, write: FileWrite) -> None:
    """Put a new file in the place of name, in one step. Raises OSError.

    The file has no name until it is complete, so that a killed agent leaves nothing; where the
    filesystem cannot do that (O_TMPFILE), it has a temporary one.
    """
    temporary = b""
    flags = os.O_WRONLY | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(b".", flags | os.O_TMPFILE, 0o600, dir_fd=parent)
        except OSError as error:
            if not os.fstat(parent).st_nlink:  # removed meanwhile, which ext4 calls EPERM
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
            temporary = stack.enter_context(temporary_name(parent, name))
            # Invariant: O_EXCL opens nothing that somebody else has put there.
            flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
        stack.callback(os.close, descriptor)
        write_all(descriptor, write.content)
        if found:
            set_owner_and_mode(descriptor, write, found)  # a change of owner takes capabilities
            keep_attributes(descriptor, parent, name)
        set_owner_and_mode(descriptor, write, found)
        with if_supported():
            os.fsync(descriptor)
        if temporary:
            os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        else:
            publish(descriptor, parent, name, is_new=not found)
    sync_folder(parent)


def publish(descriptor: int, parent: int, name: bytes, is_new: bool) -> None:
    """Give a complete file that has no name this one, in one step. Raises OSError."""
    source = f"/proc/self/fd/{descriptor}"
    if is_new:
        with contextlib.suppress(FileExistsError):
            os.link(source, name, dst_dir_fd=parent)
            return
    # A file can only be renamed over another from a name.
    with temporary_name(parent, name) as temporary:
        os.link(source, temporary, dst_dir_fd=parent)
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def sync_folder(parent: int) -> None:
    """Make a rename last, if the folder may be opened, not only written to. Raises OSError."""
    try:
        descriptor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
    except OSError:  # no reason to call a failure what is in place
        return
    try:
        with if_supported():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def overwrite(parent: int, name: bytes, write: FileWrite) -> None:
    """Write into the file that is there, keeping its inode. Raises ApiError or OSError."""
    # O_NONBLOCK: a FIFO put there meanwhile must not hold the thread.
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        with WRITING:  # or the file would end as one writer's text and another's length
            found = os.fstat(descriptor)
            check_regular(found)
            make_room(descriptor, write, found)
            write_all(descriptor, write.content)
            os.ftruncate(descriptor, len(write.content))
            set_owner_and_mode(descriptor, write, found)  # writing has cleared the set-id bits
        with if_supported():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_room(descriptor: int, write: FileWrite, found: os.stat_result) -> None:
    """Have owner, mode and room settled while the old content is still whole. Raises OSError."""
    if found.st_mode & (stat.S_ISUID | stat.S_ISGID):
        os.fchmod(descriptor, stat.S_IMODE(found.st_mode))  # or we could not give them back
    try:
        set_owner_and_mode(descriptor, write, found)
        with if_supported():
            os.posix_fallocate(descriptor, 0, len(write.content))
    except OSError:
        os.ftruncate(descriptor, found.st_size)
        with contextlib.suppress(OSError):
            set_owner_and_mode(descriptor, FileWrite(b""), found)
        raise


# --------------------------------------------------------------------------------------------------
# Logs: from the Engine's frames to lines, to server-sent events and JSON
# --------------------------------------------------------------------------------------------------

Entry = tuple[int, bytes]  # stream type, "STAMP text\n" as the Engine logged it; no \n: goes on
Line = tuple[bytes, int, int, bytes]  # stamp, its number among lines of that stamp, type, text

STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
FRAME_HEADER = struct.Struct(">BxxxL")
NEWLINE, RETURN = b"\n\r"
STAMP_SIZE = len("2026-02-21T10:00:00.000000000Z")


class Demultiplexer:
    """Takes frames out of bytes: {type, 0, 0, 0, size as big-endian uint32}, then the payload.

    Docker Engine API, "Attach to a container", section "Stream format".
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the entries that are complete. Raises EngineError after those before an error."""
        data, position = self._rest + data, 0
        entries: list[Entry] = []
        last = len(data) - FRAME_HEADER.size
        while position <= last:
            kind, size = FRAME_HEADER.unpack_from(data, position)
            start = position + FRAME_HEADER.size
            payload = data[start : start + size]
            if kind > 2 or size > MAX_FRAME:
                if not entries:
                    raise frame_error(kind, payload)
                break  # the next call finds the frame again, first of all
            if len(payload) < size:
                break
            if size:
                entries.append((kind, payload))
            position = start + size
        self._rest = data[position:]
        return entries

    def end(self) -> list[Entry]:
        """Return what is left at the end of the stream. Raises EngineError in mid-frame."""
        if self._rest:
            self.feed(b"")
            raise EngineError(502, "the Engine broke off in the middle of a frame")
        return []


class TtyDemultiplexer:
    """Takes entries out of a terminal's log, which has no frames but each entry's stamp."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the entries that are complete. Raises EngineError for one without a stamp."""
        data, position, entries = self._rest + data, 0, []
        while position < len(data):
            newline = data.find(b"\n", position)
            stamp = LOG_STAMP.match(data, position)
            if not stamp:
                if newline < 0 and len(data) - position < 64:
                    break
                raise EngineError(502, "the Engine's log has no timestamps")
            # An entry of a long line ends where the very same stamp is put in again: after
            # ENTRY_SIZE bytes of the container's, each of which the Engine may have made U+FFFD.
            line_end = newline if newline >= 0 else len(data)
            cut = stamp.end() + ENTRY_SIZE
            again = data.find(stamp[0], cut, min(line_end, cut + 2 * ENTRY_SIZE + len(stamp[0])))
            if again >= 0:
                end = again
            elif newline >= 0:
                end = newline + 1
            elif len(data) - position > MAX_LINE:
                entries.append((1, data[position:]))
                data, position = stamp[0], 0
                break
            else:
                break
            entries.append((1, data[position:end]))
            position = end
        self._rest = data[position:]
        return entries

    def end(self) -> list[Entry]:
        """Return what is left at the end of the stream: a line with no newline."""
        return [(1, self._rest)] if self._rest else []


def frame_error(kind: int, payload: bytes) -> EngineError:
    """Return the error for a frame that holds no entry; kind 3 is the Engine's own word."""
    if kind != 3:
        return EngineError(502, "the Engine's log is not made of frames")
    reason = payload.decode(errors="replace").strip()
    return EngineError(502, f"the Engine failed to read the log: {reason}")


class LineAssembler:
    """Puts entries together to whole lines, stdout and stderr apart, and numbers the lines."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[bytes, bytearray]] = {}  # a stream's stamp and text so far
        self.counts: dict[bytes, int] = {}  # stamp: lines that had it

    def feed(self, entries: list[Entry]) -> list[Line]:
        """Return the lines that are complete. Raises EngineError for an entry without a stamp."""
        lines: list[Line] = []
        counts, parts = self.counts, self.parts
        for kind, payload in entries:
            if payload[29:31] != b"Z ":
                stamp, text = split_entry(payload)
                payload = b"%b %b" % (stamp, text)
            stamp = payload[:STAMP_SIZE]
            if payload[-1] != NEWLINE or kind in parts or len(payload) > MAX_LINE:
                lines += self._join(kind, stamp, payload[STAMP_SIZE + 1 :])
                continue
            counts[stamp] = number = counts.get(stamp, 0) + 1
            text = payload[STAMP_SIZE + 1 : -2 if payload[-2] == RETURN else -1]
            lines.append((stamp, number, kind, text))
        if len(counts) > 2 * RECENT_STAMPS:
            kept = [*list(counts)[-RECENT_STAMPS:], *(stamp for stamp, _ in parts.values())]
            self.counts = {stamp: counts.get(stamp, 0) for stamp in kept}
        return lines

    def end(self) -> list[Line]:
        """Return the lines that the end of the log left without a newline."""
        held = [(kind, stamp) for kind, (stamp, text) in self.parts.items() if text]
        return [line for kind, stamp in held for line in self._join(kind, stamp, b"\n")]

    def _join(self, kind: int, stamp: bytes, text: bytes) -> list[Line]:
        """Add an entry to its line; return the line if complete, and what exceeds MAX_LINE."""
        stamp, held = self.parts.pop(kind, (stamp, bytearray()))
        held += text
        whole = held.endswith(b"\n")
        if whole:
            del held[-2 if held.endswith(b"\r\n") else -1 :]
        texts = []
        # Invariant: no line is held past MAX_LINE; two bytes more may be its CR LF.
        while len(held) > (MAX_LINE if whole else MAX_LINE + 2):
            size = MAX_LINE
            while size > MAX_LINE - 4 and held[size] & 0xC0 == 0x80:
                size -= 1  # not in the middle of a UTF-8 character
            texts.append(bytes(held[:size]))
            del held[:size]
        if whole:
            texts.append(bytes(held))
        else:
            self.parts[kind] = stamp, held
        number = self.counts.get(stamp, 0)
        self.counts[stamp] = number + len(texts)
        return [(stamp, number + i, kind, text) for i, text in enumerate(texts, 1)]


def split_entry(payload: bytes) -> tuple[bytes, bytes]:
    """Return an entry's stamp, brought to nine digits and UTC, and text. Raises EngineError."""
    match = LOG_STAMP.match(payload)
    if not match:
        raise EngineError(502, "the Engine's log has no timestamps")
    try:
        return stamp_from(parse_timestamp(match[0].strip().decode())), payload[match.end() :]
    except ValueError as error:
        raise EngineError(502, "the Engine's log has no timestamps") from error


def parse_timestamp(moment: str) -> int:
    """Return RFC 3339 as Unix nanoseconds. Raises ValueError."""
    match = TIMESTAMP.fullmatch(moment)
    if not match:
        raise ValueError(f"{moment!r} is not an RFC 3339 timestamp")
    second, fraction, zone = match.groups()
    zone = "+00:00" if zone in "Zz" else zone
    whole = datetime.datetime.fromisoformat(second.upper() + zone)
    return int(whole.timestamp()) * 10**9 + int((fraction or "").ljust(9, "0"))


def stamp_from(nanoseconds: int) -> bytes:
    """Return Unix nanoseconds as the Engine stamps log entries: STAMP_SIZE bytes."""
    second, fraction = divmod(nanoseconds, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{whole}.{fraction:09d}Z".encode()


def engine_time(nanoseconds: int) -> str:
    """Return Unix nanoseconds as the Engine's since and until take them."""
    return "{}.{:09d}".format(*divmod(max(0, nanoseconds), 10**9))


def nanoseconds(moment: str) -> int:
    """Return what `engine_time` made as Unix nanoseconds."""
    return int(moment.replace(".", ""))


@functools.lru_cache(maxsize=64)
def unix_second(second: bytes) -> bytes:
    """Return the Unix time of a stamp's first 20 bytes: b"1700000000.". Raises EngineError."""
    try:
        return b"%d." % (parse_timestamp(second[:-1].decode() + "Z") // 10**9)
    except ValueError as error:
        raise EngineError(502, "the Engine's log has no timestamps") from error


def unix_time(stamp: bytes) -> str:
    """Return a stamp as the Engine's since takes it. Raises EngineError."""
    return (unix_second(stamp[:20]) + stamp[20:29]).decode()


def parse_moment(name: str, value: str, now: int) -> str:
    """Return since or until as the Engine takes it. now: Unix nanoseconds.

    Unix seconds, RFC 3339, or a Go duration meaning that long ago. No float ever touches it: that
    would lose the nanoseconds. Raises ApiError (400).
    """
    if match := UNIX_TIME.fullmatch(value):
        return f"{match[1]}.{(match[2] or '').ljust(9, '0')}"
    if re.fullmatch(f"(?:{DURATION.pattern})+", value):
        parts = DURATION.findall(value)
        ago = sum(int(a + b.ljust(15, "0")) * UNITS[unit] // 10**15 for a, b, unit in parts)
        return engine_time(now - ago)
    try:
        return engine_time(parse_timestamp(value))
    except ValueError:
        refuse(name, "must be Unix seconds, an RFC 3339 time such as 2026-02-21T10:00:00Z, or 10m")


class ResumePoint:
    """Leaves out the lines up to the one whose id a client had last."""

    def __init__(self, event_id: str) -> None:
        match = EVENT_ID.fullmatch(event_id)
        if not match:
            raise ApiError(400, "Last-Event-ID: must be an id that a log stream sent")
        moment = int(match[1]) * 10**9 + int(match[2])
        self.since = engine_time(moment - RESUME_MARGIN * 10**9)
        self.found = False  # the very line, or that the Engine has it no longer
        self.met = False  # the very line, after one of another stamp: its number is right
        self.held: list[Line] = []  # came after the point unless the very line is still to come
        self._stamp, self._number = stamp_from(moment), int(match[3])
        self._late = stamp_from(moment + RESUME_JITTER)
        self._first = b""  # the stamp of the first line that came
        self._has_same = False  # whether lines of the very stamp came, fewer so far

    def after(self, lines: list[Line], begun: list[bytes]) -> list[Line]:
        """Return those of lines that come after the point. begun: the stamps of unfinished lines.

        Lines come in the order in which they were finished, so what comes before the last line
        seen was seen, whatever its stamp. A line that the Engine no longer has is not waited for.
        """
        if self.found:
            return lines
        self._first = self._first or (lines[0][0] if lines else b"")
        for index, (stamp, number, _, _) in enumerate(lines):
            if stamp == self._stamp and number == self._number:
                self.found, self.met = True, self._first != stamp
                return lines[index + 1 :]
        if self._stamp in begun:
            self.held.clear()
            return []
        for index, line in enumerate(lines):
            self._has_same = self._has_same or line[0] == self._stamp
            if line[0] > self._stamp:
                self.held.append(line)
                # The very line is gone, unless this one is only stored before it: lines of the two
                # streams may be, by a little.
                if line[0] > self._late or self._has_same:
                    self.found = True
                    return [*self.held, *lines[index + 1 :]]
        return []


class LogReader:
    """The lines of one container's log, from the Engine's answer to a query."""

    def __init__(
        self, answer: Answer, tty: bool, query: dict[str, Any], skip: int, resume: str
    ) -> None:
        self.done = False
        self.query = query
        self.skip = skip  # lines still to be left out
        self.entries = 0  # so far
        self.close = answer.close
        self.until_end = answer.until_end  # whether a cut looks like the end
        self._answer = answer
        self._demultiplexer = TtyDemultiplexer() if tty else Demultiplexer()
        self._assembler = LineAssembler()
        self._last = resume  # the id of the last line that came
        self._ahead: list[Line] = []  # read already, by begins_at
        self._resume_id = resume
        self._resume = ResumePoint(resume) if resume else None

    def read(self, deadline: float) -> list[Line] | None:
        """Return the lines that came, None if nothing did until deadline; `done` tells the end.

        Raises EngineError, and what Watch.wait raises.
        """
        if self._ahead:
            lines, self._ahead = self._ahead, []
            return lines
        data = self._answer.read(deadline)
        if data is None:
            return None
        self.done = not data
        entries = self._demultiplexer.feed(data) if data else self._demultiplexer.end()
        self.entries += len(entries)
        return self._passed(self._assembler.feed(entries))

    def lines(self, *, whole: bool = True) -> Iterator[list[Line]]:
        """Yield the lines of a log that is not followed. Raises EngineError.

        whole: its end is the log's, so that what it left without a newline is a line, too.
        """
        while not self.done:
            lines = self.read(time.monotonic() + CALL_TIMEOUT)
            if lines is None:
                raise EngineError(504, "the Engine did not finish the log in time")
            yield lines
        if whole:
            yield self.unfinished()

    def begins_at(self, moment: str) -> bool:
        """Return whether a line of this time is among the first of a log that is not followed."""
        for lines in self.lines(whole=False):
            self._ahead += lines
            if self.entries:
                break
        begun = (stamp for stamp, _ in self._assembler.parts.values())
        return any(unix_time(stamp) == moment for stamp in (*self._assembler.counts, *begun))

    def unfinished(self) -> list[Line]:
        """Return the lines that the end of the log left without a newline, or held back."""
        lines = self._passed(self._assembler.end())
        return self._resume.held if self._resume and not self._resume.found else lines

    def _passed(self, lines: list[Line]) -> list[Line]:
        """Return those of lines that were asked for."""
        if lines:
            stamp, number, _, _ = lines[-1]
            self._last = f"{unix_time(stamp)}-{number}"
        if self._resume:
            begun = [stamp for stamp, _ in self._assembler.parts.values()]
            lines = self._resume.after(lines, begun)
        skipped = min(self.skip, len(lines))
        self.skip -= skipped
        return lines[skipped:] if skipped else lines

    def last_id(self) -> str:
        """Return the id after which this log goes on, "" for its beginning."""
        return self._last if not self._resume or self._resume.found else self._resume_id

    def is_begun(self) -> bool:
        """Return whether a line has begun whose end has not come."""
        return any(text for _, text in self._assembler.parts.values())

    def is_resumed(self) -> bool:
        """Return whether the very line to resume after came, and what precedes it."""
        return bool(self._resume and self._resume.met)


class LogSource(NamedTuple):
    """One container's log as a request asked for it."""

    engine: Engine
    container: str  # the full id: a name may pass to another container
    tty: bool
    query: dict[str, Any]
    watch: Watch

    def open(self, skip: int = 0, resume: str = "", plain: bool = True, **query: Any) -> LogReader:
        """Return a reader of the log, timestamps and all. Raises EngineError.

        plain: quicker, but whether the log came whole is only known by `rest`.
        """
        path = container_path(self.container, "logs")
        since = {"since": ResumePoint(resume).since} if resume else {}
        query = {k: v for k, v in {**self.query, **since, **query}.items() if v != ""}
        answer = self.engine.open("GET", path, query, watch=self.watch, plain=plain)
        return LogReader(answer, self.tty, query, skip, resume)

    def rest(self, reader: LogReader) -> Iterator[list[Line]]:
        """Yield what the log had after the lines that came. Raises EngineError.

        The end of a connection does not tell whether it was the log's, and the Engine may end the
        stream of a container that exits before its last lines (seen with 20.10 and some 100
        followers). So they are looked for in the log itself, by an answer that tells its end.
        """
        query = {**reader.query, "follow": 0, "plain": False, "tail": ""}
        last, begun = reader.last_id(), reader.is_begun()
        if begun:  # its beginning may be before what is read again otherwise
            query.setdefault("since", "")
        try:
            if last and not begun:
                near = {**query, "tail": REST_ENTRIES}
                with contextlib.closing(self.open(reader.skip, last, **near)) as static:
                    lines = [line for some in static.lines() for line in some]
                    if static.is_resumed():
                        yield lines
                        return
            with contextlib.closing(self.open(reader.skip, last, **query)) as static:
                yield from static.lines()
        except EngineError as error:
            if error.status not in (404, 409):
                raise
            yield reader.unfinished()  # the container was removed meanwhile

    def open_tail(self, wanted: int) -> LogReader:
        """Return a reader of the last `wanted` lines. Raises EngineError.

        The Engine's own tail counts entries, of which a long line has several, and may begin in
        the middle of one. So ask it only for a stamp early enough, and count the lines since. It
        finds that stamp from the end, too: from the beginning it would read the whole log.
        """
        scale, follow = 1, bool(self.query["follow"])
        while True:
            entries, margin, scale = scale * (wanted + 1), scale * TAIL_MARGIN, 8 * scale
            # Of both streams: the Engine counts its tail before it leaves one out.
            since, last, _, found = self._count(tail=entries, until="", stdout=1, stderr=1)
            if not last and found < entries:
                return self.open()
            if not last:
                continue
            bounds: dict[str, Any] = {"since": since, "tail": 2 * entries + margin}
            if not follow:  # what is written from now on is not in the tail
                bounds["until"] = min(self.query.get("until", last), last, key=nanoseconds)
            earliest, _, lines, _ = self._count(**bounds)
            if found < entries or (lines > wanted and earliest == since):
                with contextlib.ExitStack() as otherwise:
                    reader = self.open(max(0, lines - wanted), plain=follow, **bounds)
                    otherwise.callback(reader.close)
                    if follow or found < entries or reader.begins_at(since):
                        otherwise.pop_all()
                        return reader

    def _count(self, **query: Any) -> tuple[str, str, int, int]:
        """Return the first and last times as since takes them, the numbers of lines and entries."""
        first, last, count = b"Z", b"", 0
        with contextlib.closing(self.open(follow=0, plain=False, **query)) as reader:
            for lines in reader.lines():
                for stamp, _, kind, _ in lines:
                    if self.query.get(STREAMS[kind], 1):
                        first, last, count = min(first, stamp), max(last, stamp), count + 1
        if not count:
            return "", "", 0, reader.entries
        return unix_time(first), unix_time(last), count, reader.entries


def line_texts(lines: list[Line], stamps: bool, as_json: bool) -> list[bytes]:
    """Return what each line is shown as; JSON objects are UTF-8 already."""
    if as_json:
        texts = []
        for stamp, _, kind, text in lines:
            shown = {"time": stamp.decode("ascii", "replace"), "stream": STREAMS[kind]}
            shown["line"] = text.decode("utf-8", "replace")
            texts.append(encode_json(shown))
        return texts
    if stamps:
        return [b"%b %b" % (stamp, text) for stamp, _, _, text in lines]
    return [text for _, _, _, text in lines]


def render_events(lines: list[Line], stamps: bool, as_json: bool) -> bytes:
    """Return lines as server-sent events (HTML Standard, section 9.2.5), one each."""
    texts = line_texts(lines, stamps, as_json)
    # Invariant: a CR or LF ends a line of an event stream, so that a container could forge fields;
    # it becomes one more data field here, before any text is put in an event.
    whole = b"".join(texts)
    if b"\r" in whole or b"\n" in whole:
        texts = [b"\ndata: ".join(re.split(b"[\r\n]", text)) for text in texts]
    events: list[bytes] = []
    for (stamp, number, _, _), text in zip(lines, texts):
        data = b"-1\ndata: " if number == 1 else b"-%d\ndata: " % number
        events += (b"id: ", unix_second(stamp[:20]), stamp[20:29], data, text, b"\n\n")
    return b"".join(events).decode("utf-8", "replace").encode()


def render_items(lines: list[Line], stamps: bool, as_json: bool) -> bytes:
    """Return lines as items of a JSON array, without its brackets."""
    texts = line_texts(lines, stamps, as_json)
    if as_json or not texts:
        return b",".join(texts)
    return encode_json(b"\n".join(texts).decode("utf-8", "replace").split("\n"))[1:-1]


def event(name: str, data: Any) -> bytes:
    """Return one named server-sent event; JSON holds no bare line end."""
    return f"event: {name}\ndata: ".encode() + encode_json(data) + b"\n\n"


def log_document(
    source: LogSource, reader: LogReader, render: Callable[[list[Line]], bytes]
) -> Generator[bytes, None, None]:
    """Yield {"lines": [...]} as it is read. Raises EngineError, which leaves it broken off."""
    with contextlib.closing(reader):
        separator = b'{"lines":['
        rest = source.rest(reader) if reader.until_end else ()
        for lines in itertools.chain(reader.lines(whole=not reader.until_end), rest):
            if lines:
                yield separator + render(lines)
                separator = b","
        yield (b"" if separator == b"," else separator) + b"]}\n"


def log_events(
    source: LogSource, reader: LogReader, render: Callable[[list[Line]], bytes]
) -> Generator[bytes, None, None]:
    """Yield the event stream of a log that is followed."""
    with contextlib.closing(reader):
        try:
            yield f"retry: {RETRY}\n\n".encode()
            due = time.monotonic() + PING_INTERVAL
            while not reader.done:
                lines = reader.read(due)
                if lines or time.monotonic() >= due:
                    yield render(lines) if lines else b": ping\n\n"
                    due = time.monotonic() + PING_INTERVAL
            ending = log_ending(source)
            yield from map(render, filter(None, source.rest(reader)))
            yield event("end", ending)
        except Stopping:
            yield event("shutdown", {"reason": "the agent is being stopped; reconnect"})
        except EngineError as error:
            yield event("error", envelope(error.status, error.message))


def log_ending(source: LogSource) -> dict[str, Any]:
    """Return why a followed log ended. Raises EngineError if nothing says that it should have."""
    try:
        found = source.engine.json("GET", container_path(source.container, "json"))
    except EngineError as error:
        if error.status != 404:
            raise
        return {"reason": "removed", "exit_code": None}
    state = member(found, "State", dict)
    if state.get("Running") or state.get("Restarting"):
        if "until" in source.query and nanoseconds(source.query["until"]) <= time.time_ns():
            return {"reason": "until", "exit_code": None}
        raise EngineError(502, "the Engine ended the log of a container that runs; reconnect")
    reason = "removed" if state.get("Status") in ("removing", "dead") else "exited"
    return {"reason": reason, "exit_code": state.get("ExitCode")}


# --------------------------------------------------------------------------------------------------
# Endpoints: one function an operation
# --------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One request, checked, and what an endpoint may use to answer it."""

    engine: Engine
    host_root: str
    watch: Watch
    id: str
    query: dict[str, Any]
    body: dict[str, Any]
    fields: Fields

    def field(self, name: str) -> str:
        """Return a header's value, "" if it is absent. Raises ApiError (400) if it is repeated."""
        values = self.fields.get(name.lower(), [""])
        if len(values) > 1:
            raise ApiError(400, f"{name}: is given more than once")
        return values[0]


class Response(NamedTuple):
    """An answer: bytes, or a stream of them. Anything else but bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    stream: Optional[Generator[bytes, None, None]] = None
    content_type: str = "application/json"


def health(call: Call) -> Response:
    healthy = call.engine.healthy()
    body = {
        "status": "ok" if healthy else "degraded",
        "docker": "connected" if healthy else "unreachable",
        "timestamp": timestamp(time.time(), "seconds"),
    }
    return Response(body, 200 if healthy else 503)


def create(call: Call) -> Response:
    auth = registry_auth(call)
    created = create_container(call.engine, call.body, auth, call.watch._replace(stop=None))
    body = {"id": created["Id"], "warnings": created.get("Warnings") or []}
    return Response(body, 201, {"Location": f"{API}/containers/{created['Id']}"})


def registry_auth(call: Call) -> str:
    """Return X-Registry-Auth as the Engine takes it: base64url, padded, of a JSON object; or "".

    Raises ApiError (400) without repeating the value.
    """
    value = call.field("X-Registry-Auth")
    if not value:
        return ""
    bare = value.rstrip("=")
    with contextlib.suppress(ApiError, ValueError):
        decoded = base64.b64decode(bare + "=" * (-len(bare) % 4), b"-_", validate=True)
        # Invariant: decode_json bounds the depth; Python's decoder alone may overflow the C stack.
        if isinstance(decode_json(decoded), dict):
            return base64.urlsafe_b64encode(decoded).decode()
    raise ApiError(400, "X-Registry-Auth: must be the base64url of a JSON object")


def list_containers(call: Call) -> Response:
    found = call.engine.call("GET", f"/containers/json?all={int(call.query.get('all', False))}")
    return Response((container_list if len(found) < MEMOIZED else shape_list)(found))


def inspect(call: Call) -> Response:
    body = call.engine.call("GET", container_path(call.id, "json"))
    (check_object if len(body) < MEMOIZED else decode_answer)(body)
    return Response(body)


def act(call: Call, action: str, done: str, **options: Any) -> Response:
    call.engine.call("POST", container_path(call.id, action), **options)
    return Response({"message": f"container {done}"})


start = functools.partial(act, action="start", done="started", seconds=START_TIMEOUT)
pause = functools.partial(act, action="pause", done="paused")
unpause = functools.partial(act, action="unpause", done="unpaused")


def kill(call: Call) -> Response:
    query = {"signal": engine_signal(call.body.get("signal", "KILL"))}
    return act(call, "kill", "killed", query=query)


def stop_or_restart(call: Call, action: str, done: str) -> Response:
    """Have the Engine do either, which may take the container's own time. Raises ApiError."""
    query: dict[str, Any] = {}
    if "signal" in call.body:
        version = call.engine.version(time.monotonic() + CALL_TIMEOUT, again=True)
        if tuple(map(int, version.split("."))) < (1, 42):
            rule = f"this Engine (API {version}) cannot {action} with a signal"
            refuse("signal", f"{rule}, which takes API 1.42; use /kill")
        query["signal"] = engine_signal(call.body["signal"])
    if "timeout" in call.body:
        query["t"] = wait = int(call.body["timeout"])
    else:
        found = call.engine.json("GET", container_path(call.id, "json"))
        own = member(found, "Config", dict).get("StopTimeout")
        # Invariant: a container's own timeout makes no wait longer than a client could ask for.
        wait = min(MAX_STOP, max(0, own)) if own and isinstance(own, int) else DEFAULT_STOP
    return act(call, action, done, query=query, seconds=wait + CALL_TIMEOUT)


stop = functools.partial(stop_or_restart, action="stop", done="stopped")
restart = functools.partial(stop_or_restart, action="restart", done="restarted")


def engine_signal(name: str) -> str:
    return name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"


def remove(call: Call) -> Response:
    query = {name: int(value) for name, value in call.query.items()}
    call.engine.call("DELETE", container_path(call.id), query)
    return Response({"message": "container removed"})


def logs(call: Call) -> Response:
    asked = call.query
    stdout, stderr = asked.get("stdout", True), asked.get("stderr", True)
    if not (stdout or stderr):
        refuse("stdout", "and stderr cannot both be false")
    now, follow = time.time_ns(), asked.get("follow", False)
    query: dict[str, Any] = {"stdout": int(stdout), "stderr": int(stderr)}
    query.update(timestamps=1, follow=int(follow))
    for name in ("since", "until"):
        if name in asked:
            moment = parse_moment(name, asked[name], now)
            if asked[name].strip("0."):  # 0 is no limit, as in Docker's own API
                query[name] = moment
    # The header first: a browser that reconnects sends it beside the URL it began with.
    last = call.field("Last-Event-ID") or asked.get("last_event_id", "")
    if last:
        ResumePoint(last)
    found = call.engine.json("GET", container_path(call.id, "json"))
    watch = call.watch if follow else call.watch._replace(stop=None)
    tty = bool(member(found, "Config", dict).get("Tty"))
    source = LogSource(call.engine, member_id(found), tty, query, watch)
    tail = asked.get("tail", "all")
    whole = tail == "all" or last
    reader = source.open(resume=last) if whole else source.open_tail(int(tail))
    shape = {"stamps": asked.get("timestamps", False), "as_json": asked.get("format") == "json"}
    if not follow:
        render = functools.partial(render_items, **shape)
        return Response(stream=log_document(source, reader, render))
    render = functools.partial(render_events, **shape)
    return event_stream(log_events(source, reader, render))


def event_stream(events: Generator[bytes, None, None]) -> Response:
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    return Response(stream=events, headers=headers, content_type="text/event-stream")


def pull(call: Call) -> Response:
    auth = registry_auth(call)
    accepted = ",".join(call.fields.get("accept", []))
    if "text/event-stream" not in accepted.lower():
        watch = call.watch._replace(stop=None)
        return Response(pull_image(call.engine, call.body, auth, watch))
    words = pull_progress(call.engine, call.body, auth, call.watch)
    return event_stream(pull_events(call.engine, call.body["image"], words))


def pull_events(
    engine: Engine, image: str, words: Iterator[dict[str, Any] | None]
) -> Generator[bytes, None, None]:
    """Yield the event stream of a pull."""
    try:
        yield f"retry: {RETRY}\n\n".encode()
        digest = ""
        for word in words:
            digest = told_digest(word) or digest
            if word is None:
                yield b": ping\n\n"
                continue
            detail = word.get("progressDetail")
            detail = detail if isinstance(detail, dict) else {}
            sizes = {name: detail.get(name) for name in ("current", "total")}
            yield event("progress", {"id": word.get("id"), "status": word.get("status"), **sizes})
        yield event("done", pull_result(engine, image, digest))
    except Stopping:
        yield event("shutdown", {"reason": "the agent is being stopped; reconnect"})
    except EngineError as error:
        yield event("error", envelope(error.status, error.message))


def write_file(call: Call) -> Response:
    body = call.body
    content = text = body["content"].encode()
    if body.get("encoding") == "base64":
        with contextlib.suppress(binascii.Error):
            content = base64.b64decode(text)
        if base64.b64encode(content) != text:  # what Python's decoder forgives differs by version
            raise ApiError(400, "content: must be base64, padded and without line breaks")
    mode = int(body["permission"], 8) if "permission" in body else None
    write = FileWrite(content, mode, body.get("uid"), body.get("gid"), body.get("atomic", True))
    write_beneath(call.host_root, body["path"], write)
    message = "file written successfully"
    return Response({"path": body["path"], "size": len(content), "message": message}, 201)


# --------------------------------------------------------------------------------------------------
# Routes: the table and its lookup
# --------------------------------------------------------------------------------------------------

PUBLIC = "public"
KEY = "key"


class Route(NamedTuple):
    """All that is known of one operation."""

    method: str
    path: str  # "{id}" stands for a container's id or name
    endpoint: Callable[[Call], Response]
    permission: str = KEY
    body: Optional[Schema] = None  # None: a body is refused
    query: Schema = NOTHING


ROUTES = (
    Route("GET", "/health", health, PUBLIC),
    Route("POST", f"{API}/containers", create, body=CREATE),
    Route("GET", f"{API}/containers", list_containers, query=LIST_QUERY),
    Route("GET", f"{API}/containers/{{id}}", inspect),
    Route("DELETE", f"{API}/containers/{{id}}", remove, query=REMOVE_QUERY),
    Route("GET", f"{API}/containers/{{id}}/logs", logs, query=LOGS_QUERY),
    Route("POST", f"{API}/containers/{{id}}/start", start, body=NOTHING),
    Route("POST", f"{API}/containers/{{id}}/stop", stop, body=STOP),
    Route("POST", f"{API}/containers/{{id}}/restart", restart, body=STOP),
    Route("POST", f"{API}/containers/{{id}}/kill", kill, body=KILL),
    Route("POST", f"{API}/containers/{{id}}/pause", pause, body=NOTHING),
    Route("POST", f"{API}/containers/{{id}}/unpause", unpause, body=NOTHING),
    Route("POST", f"{API}/images/pull", pull, body=PULL),
    Route("POST", f"{API}/files", write_file, body=FILE),
)
TEMPLATES = [(route, route.path.split("/")) for route in ROUTES]


def split_target(target: str) -> tuple[list[str], str]:
    """Return a request target's path segments, decoded once, and its query."""
    target = re.sub("(?i)^https?://[^/?]*", "", target)  # RFC 9112 section 3.2.2, "absolute-form"
    path, _, query = target.partition("?")
    path = path or "/"
    return [unquote(segment, errors="replace") for segment in path.split("/")], query


def is_api(segments: list[str]) -> bool:
    """Return whether a path is under /api/v1, where nothing is told without the key."""
    return segments[:3] == API.split("/")


def find_route(method: str, segments: list[str]) -> tuple[Route, str]:
    """Return a route and the {id} in its path. Raises ApiError (404, 405)."""
    method = "GET" if method == "HEAD" else method
    allowed = []
    for route, template in TEMPLATES:
        if len(template) != len(segments):
            continue
        if all(a in ("{id}", b) for a, b in zip(template, segments)):
            if route.method == method:
                name = segments[template.index("{id}")] if "{id}" in template else ""
                return route, name
            allowed += ["GET", "HEAD"] if route.method == "GET" else [route.method]
    if allowed:
        options = ", ".join(allowed)
        raise ApiError(405, f"use {options} here", {"Allow": options})
    raise ApiError(404, "there is nothing at this path; the README lists the endpoints")


# --------------------------------------------------------------------------------------------------
# HTTP handler: read the head, limit, authorise, route, read the body, answer
# --------------------------------------------------------------------------------------------------


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def head_end(data: bytes, scanned: int = 0) -> int:
    """Return the length of the head that data begins with, 0 if it goes on.

    scanned: bytes of it that were here before, so that a head in tiny pieces costs no more.
    Raises ApiError (400, 414, 431) as soon as it can be no head: nobody waits for its end.
    """
    start = max(0, scanned - 3)
    end = data.find(b"\r\n\r\n", start)
    size = end + 4 if end >= 0 else len(data)
    line = data.find(b"\r\n", 0, MAX_REQUEST_LINE + 2)
    # Invariant: the head is bounded before any of it is looked at.
    if line < 0 and size > MAX_REQUEST_LINE + data[: MAX_REQUEST_LINE + 1].endswith(b"\r"):
        raise ApiError(414, f"the request line is longer than {MAX_REQUEST_LINE} bytes")
    if size - max(line, 0) - 4 > MAX_FIELD_BLOCK:
        raise ApiError(431, f"the headers are longer than {MAX_FIELD_BLOCK} bytes")
    if LONE_CONTROL.search(data, start, size):
        raise ApiError(400, "the head has a bare CR, a bare LF or a NUL in it")
    return size if end >= 0 else 0


def body_length(fields: Fields, minor: int) -> int | None:
    """Return the body's length, None for a chunked one. Raises ApiError (400, 501).

    What two parsers may frame differently is refused: behind a proxy it smuggles requests in.
    """
    hosts = fields.get("host", [])
    if len(hosts) > 1 or (minor and not hosts):
        raise ApiError(400, "Host: must be given once")
    if hosts and not HOST_VALUE.fullmatch(hosts[0].encode("latin-1")):
        raise ApiError(400, "Host: is not a host and port")
    if not minor and "transfer-encoding" in fields:
        raise ApiError(400, "Transfer-Encoding: HTTP/1.0 has none")
    return framing(fields)


@functools.lru_cache(maxsize=1)
def http_date(now: int) -> str:
    return email.utils.formatdate(now, usegmt=True)


class Handler(socketserver.BaseRequestHandler):
    """One connection: its requests one after the other, each logged.

    Not http.server's BaseHTTPRequestHandler: nothing of its lax parser or HTML errors is reachable.
    """

    server: Server

    def setup(self) -> None:
        self.sock: socket.socket = self.request
        self.buffer = b""
        self.keep = True
        self.answered = False  # so that the last answer is given time to be read
        self.neighbour = client_address(self.client_address, "", ())

    def handle(self) -> None:
        if self.client_address:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine has died is given up after as long as one that reads nothing.
            timeout = int(WRITE_TIMEOUT * 1000)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
        deadline = time.monotonic() + HEAD_TIMEOUT
        tls = self.server.config.server_tls
        if tls and not self.shake_hands(tls, deadline):
            return
        while self.keep and self.wait_for_request(deadline):
            self.serve()
            deadline = time.monotonic() + IDLE_TIMEOUT

    def shake_hands(self, tls: ssl.SSLContext, deadline: float) -> bool:
        """Return whether the connection is a TLS one by now."""
        try:
            if not Watch(stop=self.server.stopping).wait(self.sock, deadline):
                return False
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            self.sock = tls.wrap_socket(self.sock, server_side=True)
        except (Stopping, OSError, ValueError) as error:
            self.server.log("debug", "handshake failed", error=describe(error))
            return False
        return True

    def finish(self) -> None:
        """Half-close, then drain: no reset may take an answer away (RFC 9112 section 9.6)."""
        with contextlib.suppress(OSError, ValueError), contextlib.closing(self.sock):
            deadline = time.monotonic() + LINGER_TIMEOUT
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.settimeout(1.0)
                with contextlib.suppress(OSError, ValueError):
                    self.sock = self.sock.unwrap()
            self.sock.shutdown(socket.SHUT_WR)
            while self.answered and receive(self.sock, deadline):
                pass

    def wait_for_request(self, deadline: float) -> bool:
        """Return whether a request begins before deadline; False too if the agent stops."""
        skipped = 0
        with contextlib.suppress(OSError, Stopping):
            # Invariant: even empty lines are taken up to a bound only.
            while True:
                skipped += len(self.buffer)
                self.buffer = EMPTY_LINES.sub(b"", self.buffer)
                skipped -= len(self.buffer)
                if skipped > MAX_REQUEST_LINE:
                    break
                if self.buffer not in (b"", b"\r"):
                    return True
                data = receive(self.sock, deadline, Watch(stop=self.server.stopping))
                if not data:
                    break
                self.buffer += data
        self.answered = self.answered and NOBODY.wait(self.sock, 0)  # else there is no more to read
        return False

    def serve(self) -> None:
        """Answer one request and log it. The one place where errors become answers."""
        self.started = time.monotonic()
        self.id = secrets.token_hex(8)
        self.method, self.path, self.client = "", "", self.neighbour
        self.headers: dict[str, str] = {}
        self.minor, self.status, self.sent = 1, 0, 0
        self.unread = True  # until the request's end is known and reached
        try:
            try:
                self.respond(self.answer(self.read_head()))
            except ApiError as error:
                self.respond_error(error)
        except ClientGone:
            self.keep = False
        except Exception as error:
            self.server.log("error", "bug", request_id=self.id, traceback=describe_bug(error))
            with contextlib.suppress(ClientGone):
                message = f"an error of the agent's own; its log has it under {self.id}"
                self.respond_error(ApiError(500, message))
        self.server.log(
            "error" if self.status >= 500 else "info",
            "request",
            method=self.method,
            path=self.path,
            status=self.status,
            latency_ms=round((time.monotonic() - self.started) * 1000, 3),
            request_id=self.id,
            client_ip=self.client,
            bytes=max(0, self.sent),
        )

    def fill(self, deadline: float, what: str, watch: Watch) -> bytes:
        """Return more of the request. Raises ApiError (400, 408) or ClientGone."""
        try:
            data = receive(self.sock, deadline, watch)
        except socket.timeout as error:
            raise ApiError(408, f"the {what} did not arrive in time") from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ApiError(400, f"the connection ended within the {what}")
        return data

    def read_head(self) -> Fields:
        """Take the next request's head out of the buffer, return its fields. Raises ApiError."""
        deadline, scanned, end = time.monotonic() + HEAD_TIMEOUT, 0, 0
        while not end:
            line, whole, _ = self.buffer[: MAX_REQUEST_LINE + 2].partition(b"\r\n")
            if not self.path:  # not even an answer that refuses a HEAD has a body
                self.method = "HEAD" if line.startswith(b"HEAD ") else ""
            if whole and not self.path:
                self.read_request_line(line)
            end, scanned = head_end(self.buffer, scanned), len(self.buffer)
            if not end:
                self.buffer += self.fill(deadline, "head", Watch(stop=self.server.stopping))
        block, self.buffer = self.buffer[len(line) + 2 : end], self.buffer[end:]
        if block.count(b"\n") - 1 > MAX_FIELDS:
            raise ApiError(431, f"there are more than {MAX_FIELDS} headers")
        return parse_fields(block)

    def read_request_line(self, line: bytes) -> None:
        # Invariant: the head is matched by the grammar before any other code sees it.
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise ApiError(400, "the request line is not of the form: GET /path HTTP/1.1")
        self.method, self.path, version = (part.decode() for part in match.groups())
        if version not in ("1.0", "1.1"):
            raise ApiError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        self.minor = int(version[-1])

    def answer(self, fields: Fields) -> Response:
        """Check one request, in the order that tells a stranger least, and have it answered."""
        own = ",".join(fields.get("x-request-id", []))
        if REQUEST_ID.fullmatch(own) and self.server.log.redact(own, SHORT_KEY) == own:
            self.id = own
        config = self.server.config
        if forwarded := ",".join(fields.get("x-forwarded-for", [])):
            self.client = client_address(self.client_address, forwarded, config.trusted_proxies)
        length = body_length(fields, self.minor)
        self.unread = length != 0
        connection = ",".join(fields.get("connection", [])).lower()
        closing = "close" in [option.strip() for option in connection.split(",")]
        self.keep = self.keep and bool(self.minor) and not closing
        segments, query = split_target(self.path)
        if is_api(segments):
            self.authorise(fields)
        route, name = find_route(self.method, segments)
        # Read off the table: whatever is not public has been authorised above.
        if route.permission != PUBLIC and not is_api(segments):
            raise ApiError(401, "this path needs the key")
        if "{id}" in route.path:
            container_path(name)
        parameters = decode_query(query, route.query)
        body = self.read_body(fields, route, length)
        watch = Watch(self.sock, self.server.stopping)
        call = Call(self.server.engine, config.host_root, watch, name, parameters, body, fields)
        return route.endpoint(call)

    def authorise(self, fields: Fields) -> None:
        """Count the request and check its key. Raises ApiError (401, 429)."""
        keys = [value.encode("latin-1") for value in fields.get("x-api-key", [])]
        # Invariant: the one place where keys are compared: on bytes, in constant time.
        valid = len(keys) == 1 and hmac.compare_digest(keys[0], self.server.config.api_key)
        self.headers = self.server.limiter.admit(self.client, valid)
        if not valid:
            rule = "is wrong" if len(keys) == 1 else "must be given once"
            headers = {"WWW-Authenticate": 'ApiKey realm="dockeragent", header="X-API-Key"'}
            raise ApiError(401, f"X-API-Key: {rule}", headers)

    def read_body(self, fields: Fields, route: Route, length: int | None) -> dict[str, Any]:
        """Return the checked JSON of the body, {} if the route takes none. Raises ApiError."""
        expected = fields.get("expect", [])
        if self.minor and expected and [value.lower() for value in expected] != ["100-continue"]:
            raise ApiError(417, "Expect: only 100-continue is understood")
        if length is not None and length > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
        if route.body is None:
            if length != 0:
                raise ApiError(400, "body: none is taken here")
            return {}
        data = b""
        if length != 0:
            if self.minor and expected and not self.buffer:
                self.write(CONTINUE, len(CONTINUE))
            data = self.receive_body(Body(length))
        self.unread = False
        if not data.strip(b" \t\r\n") and not route.body["required"]:
            return {}
        value = decode_json(data)
        if value is None and not route.body["required"]:
            return {}
        checked: dict[str, Any] = validate(route.body, value)
        return checked

    def receive_body(self, body: Body) -> bytes:
        """Return the whole body; what follows it stays in the buffer. Raises ApiError."""
        deadline, pieces, size = time.monotonic() + BODY_TIMEOUT, [], 0
        data, self.buffer = self.buffer, b""
        while True:
            piece = body.feed(data)
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY:
                raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
            if body.done:
                break
            data = self.fill(deadline, "body", NOBODY)
        self.buffer = body.rest
        return b"".join(pieces)

    def respond_error(self, error: ApiError) -> None:
        if self.status:  # a head is out: nothing but the missing end can tell now
            self.keep = False
            level = "warning" if error.status < 500 else "error"
            self.server.log(level, "broken off", request_id=self.id, error=error.message)
            return
        # Invariant: no answer holds the key, not even one that repeats what a client sent.
        body = envelope(error.status, self.server.log.redact(error.message, SHORT_KEY))
        self.respond(Response(body, error.status, error.headers))

    def respond(self, response: Response) -> None:
        """Send an answer. Raises ClientGone, and ApiError from within a stream."""
        if response.stream is None:
            body = response.body
            if not isinstance(body, bytes):
                body = encode_json(body) + b"\n"
            head = self.head(response, f"Content-Length: {len(body)}\r\n")
            self.write(head + (b"" if self.method == "HEAD" else body), len(head))
            return
        with contextlib.closing(response.stream) as stream:
            first = next(stream, b"")
            coding = "Transfer-Encoding: chunked\r\n" if self.minor else ""
            self.keep = self.keep and bool(self.minor)
            head = self.head(response, coding)
            if self.method == "HEAD":
                self.write(head, len(head))
                return
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER)
            self.write(head + self.chunk(first), len(head))
            for piece in stream:
                self.write(self.chunk(piece))
            if self.minor:
                self.write(b"0\r\n\r\n")

    def chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.minor else data

    def head(self, response: Response, framed: str) -> bytes:
        """Return the head of an answer. No text of the request's is in it that no regex passed."""
        # Invariant: after an answer that leaves body bytes unread, the connection closes.
        self.keep = self.keep and not self.unread
        self.status = response.status
        headers = {
            "Date": http_date(int(time.time())),
            "Content-Type": response.content_type,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Request-ID": self.id,
            **self.headers,
            **response.headers,
        }
        if not self.keep:
            headers["Connection"] = "close"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        phrase = PHRASES.get(response.status, "Unknown")
        return f"HTTP/1.1 {response.status} {phrase}\r\n{lines}{framed}\r\n".encode("latin-1")

    def write(self, data: bytes, uncounted: int = 0) -> None:
        """Send data. Raises ClientGone when the client hangs up or takes nothing for too long."""
        left = memoryview(data)
        self.sent -= uncounted
        self.answered = True
        try:
            self.sock.settimeout(WRITE_TIMEOUT)
            while left:
                size = self.sock.send(left)
                self.sent += size
                left = left[size:]
        except OSError as error:
            self.answered = False
            raise ClientGone from error


# --------------------------------------------------------------------------------------------------
# Server: connection slots, stop and wait
# --------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves each connection in a thread, MAX_CONNECTIONS of them at once."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_port = False  # another process could share the port and take the keys

    def __init__(self, config: Config, engine: Engine, log: Log, listener: socket.socket) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.config = config
        self.engine = engine
        self.log = log
        self.limiter = RateLimiter(config.rate_limit)
        self.active = 0  # connections being served
        self.stopping, self._stop = socket.socketpair()  # the first can be read once we stop
        self._lock = threading.Lock()
        self._refused: collections.deque[tuple[float, socket.socket]] = collections.deque()

    def get_request(self) -> tuple[socket.socket, str]:
        """Return a connection and the client's IP address, "" over a Unix socket."""
        try:
            sock, address = self.socket.accept()
            return sock, address[0] if isinstance(address, tuple) else ""
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection stays queued; do not spin until one ends
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it, without blocking the next one."""
        with self._lock:
            # Invariant: no more threads than MAX_CONNECTIONS, however many connect.
            free = self.active < self.config.max_connections
            self.active += free
        try:
            if free:
                super().process_request(request, client_address)
                return
        except RuntimeError:  # no thread to be had
            self._free_slot()
        self._refuse(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free_slot()

    def _free_slot(self) -> None:
        with self._lock:
            self.active -= 1

    def _refuse(self, request: socket.socket, peer: str) -> None:
        """Send a 503 without waiting, and leave the connection for a moment so that it is read."""
        request_id = secrets.token_hex(8)
        body = encode_json(envelope(503, "too many connections; try again later")) + b"\n"
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\n"
            "Retry-After: 1\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            request.setblocking(False)
            if not self.config.server_tls:  # without a handshake a TLS client can be told nothing
                request.send(head.encode() + body)
            request.shutdown(socket.SHUT_WR)
        self._refused.append((time.monotonic() + 1, request))
        self.service_actions()
        fields = {"method": "", "path": "", "status": 503, "latency_ms": 0, "bytes": len(body)}
        client = client_address(peer, "", ())
        self.log("warning", "request", **fields, request_id=request_id, client_ip=client)

    def service_actions(self) -> None:
        """Close what has had its moment, here and at the Engine; called twice a second."""
        now = time.monotonic()
        self.engine.close_idle(now - IDLE_CONNECTION)
        while self._refused and (self._refused[0][0] < now or len(self._refused) > REFUSALS):
            self._refused.popleft()[1].close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log("error", "bug", traceback=describe_bug(sys.exc_info()[1]))

    def stop(self) -> None:
        """Stop accepting; wake the streams and the idle connections."""
        self.shutdown()
        self.socket.close()
        if self.config.listen_addr.path:
            with contextlib.suppress(OSError):
                os.unlink(self.config.listen_addr.path)
        self._stop.send(b"x")

    def server_close(self) -> None:
        """Close what the server has opened."""
        super().server_close()
        for sock in (*(sock for _, sock in self._refused), self.stopping, self._stop):
            sock.close()
        self.engine.close_idle()


# --------------------------------------------------------------------------------------------------
# Command line: listen, signals, healthcheck, exit codes
# --------------------------------------------------------------------------------------------------

ENDING = {signal.SIGTERM, signal.SIGINT}


def complain(*lines: str) -> None:
    """Print lines on standard error, whatever the values that they repeat are made of."""
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


def listen(address: Address) -> socket.socket:
    """Return a listening socket; a Unix one has mode 0660. Raises OSError."""
    backlog = Server.request_queue_size
    if not address.path:
        dual = not address.host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in address.host else socket.AF_INET
        there = (address.host, address.port)
        return socket.create_server(there, family=family, backlog=backlog, dualstack_ipv6=dual)
    remove_stale(address.path)
    with contextlib.ExitStack() as on_error:
        listener = on_error.enter_context(socket.socket(socket.AF_UNIX))
        mask = os.umask(0o117)
        try:
            listener.bind(address.path)
        finally:
            os.umask(mask)
        listener.listen(backlog)
        on_error.pop_all()
    return listener


def remove_stale(path: str) -> None:
    """Remove a Unix socket that nobody listens at. Raises OSError for anything else there."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "something other than a socket is there")
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            raise OSError(errno.EADDRINUSE, "another server listens there")


def notify(state: str) -> None:
    """Tell systemd, if it started us with Type=notify: sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)


def prepare_process() -> None:
    """Set what the whole process shares: signals, umask, open files, stack size."""
    # Blocked before the first thread starts, so that no handler ever runs inside other code.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    os.umask(0)  # every mode here is explicit
    # The same everywhere: musl's default is too little, and json's decoder needs over 1 MiB.
    threading.stack_size(4 * 1024 * 1024)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def healthcheck(config: Config) -> int:
    """Return 0 if the server that this environment configures answers that it is well, else 1."""
    address, context = config.listen_addr, None
    address = address._replace(host=address.host or "localhost")
    if config.server_tls:
        # To ourselves: whether the certificate names this host does not matter.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
    connection = http.client.HTTPConnection("localhost")
    try:
        connection.sock = connect(address, context)
    except (OSError, ValueError) as error:
        complain(f"{address}: {describe(error)}")
        return 1
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health")
            return 0 if connection.getresponse().status == 200 else 1
        except (OSError, http.client.HTTPException) as error:
            complain(f"{address}: {describe(error)}")
            # With the handshake done, a server that takes another CA's certificates refuses ours.
            is_refusal = isinstance(error, (ssl.SSLError, ConnectionError))
            return 0 if is_refusal and config.tls_client_ca_file else 1


def announce(log: Log, address: Address, engine: Engine) -> None:
    where = {"address": str(address), "engine": str(engine.address)}
    log("info", "listening", version=VERSION, **where, engine_answers=engine.healthy())


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    prepare_process()
    address = config.listen_addr
    try:
        listener = listen(address)
    except OSError as error:
        complain(f"LISTEN_ADDR: {address}: {describe(error)}")
        return 2
    if not address.path:
        address = address._replace(port=listener.getsockname()[1])
    log = Log(config.log_level, config.api_key)
    engine = Engine(config.docker_host, config.engine_tls, config.docker_api_version)
    if len(config.api_key) < 32:
        log("warning", "the key is shorter than 32 characters; try openssl rand -hex 32")
    with Server(config, engine, log, listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notify("READY=1")
        # In a thread: an Engine that is silent must not keep us from being stopped.
        threading.Thread(target=announce, args=(log, address, engine), daemon=True).start()
        signal.sigwait(ENDING)
        notify("STOPPING=1")
        log("info", "stopping")
        server.stop()
        deadline = time.monotonic() + GRACE
        while server.active and time.monotonic() < deadline:
            if signal.sigtimedwait(ENDING, 0.05):
                log("warning", "stopped at once")
                os._exit(1)
    log("info", "stopped")
    return 0


def usage() -> str:
    """Return the text of --help."""
    rows = [f"  {s.name:<20} {s.meaning}\n{'':<22} default: {s.default or '-'}" for s in SETTINGS]
    return (
        "usage: dockeragent.py [--help | --version | healthcheck]\n\n"
        "Serves a small HTTP API in front of a Docker Engine. With healthcheck, asks the running\n"
        "server's /health and exits 0 or 1. Configured by the environment:\n\n" + "\n".join(rows)
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a wrong use or environment."""
    # /dev/null where standard descriptors are closed: a client's socket must not become one.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--help"], ["-h"], ["--version"]):
        print(f"dockeragent {VERSION}" if arguments == ["--version"] else usage())
        return 0
    if arguments not in ([], ["healthcheck"]):
        complain(f"unknown arguments {' '.join(arguments)}; try --help")
        return 2
    try:
        if arguments:  # asks what needs no key
            return healthcheck(load_config({**os.environ, "API_KEY": "-", "API_KEY_FILE": ""}))
        return run(load_config(os.environ))
    except ConfigError as error:
        complain(*error.args)
        return 1 if arguments else 2


if __name__ == "__main__":
    sys.exit(main())
