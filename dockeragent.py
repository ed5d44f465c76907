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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
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
RECV_SIZE = 64 * 1024  # bytes asked of a socket at once
STREAM_BUFFER = 128 * 1024  # bytes the kernel holds for a slow reader of a stream
SHORT_KEY = 32  # characters; a shorter one might be guessed
MAX_MESSAGE = 2000  # characters of an error's message; it may repeat what a client sent
MAX_LINGERING_REFUSALS = 256  # refused connections left open for a moment so that their 503 is read

RATE_WINDOW = 60.0  # seconds
MAX_CLIENTS = 10_000  # windows kept; past it the least recently used is forgotten

# What the Engine may take.
NEWEST_API = 51  # 1.51 is the newest Engine API this file was written against
CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 30.0
START_TIMEOUT = 120.0  # create and start, and to undo them
PING_TIMEOUT = 3.0
PULL_SILENCE = 120.0  # between two words about a pull
DEFAULT_STOP = 10  # seconds, the Engine's own default
MAX_STOP = 86_400  # seconds; no wait here is unbounded
MAX_RESPONSE = 64 * 1024 * 1024  # bytes of one answer that is not a stream
MAX_IDLE_CONNECTIONS = 16  # kept open to the Engine
IDLE_CONNECTION = 2.0  # seconds that each is kept
VERSION_KEPT = 2.0  # seconds; the Engine may be upgraded while nobody asks it anything
HEALTH_CACHE = 1.0  # seconds
MEMOIZED = 256 * 1024  # bytes of an answer that is not decoded again while it stays the same

MAX_LINE = 1024 * 1024  # bytes of one log line; the rest goes on as the next
MAX_FRAME = 4 * 1024 * 1024  # bytes; the Engine's own hold up to 16 KiB and a timestamp
NUMBERED = 4096  # lines; a stamp that none of so many had counts anew, for the ids
ENTRY_SIZE = 16 * 1024  # bytes; the Engine's log drivers cut longer lines into entries of this size
# Sent at the start of an event stream, with the milliseconds before its client reconnects. No empty
# line follows it or a ping: some clients would dispatch that as an empty message.
STREAM_START = b"retry: 3000\n"
PING = b": ping\n"
PING_INTERVAL = 15.0  # seconds of silence before a comment keeps an event stream's proxies awake
# The Engine writes each log entry by itself. In a burst, a read this long after the one before
# finds some 200 together, which takes a third off the time of the whole log.
BURST_PAUSE = 0.0004  # seconds
HEAD_WAIT = 1.0  # seconds for the Engine to refuse a log, before an event stream begins
LOOK = NUMBERED + 1024  # entries at a log's end, among which a line is looked for first
MAX_KEPT = 256 * 1024  # bytes of lines that one request keeps, to find the last so many
LINE_COST = 200  # bytes that Python needs for a line, its text aside

MAX_PATH_RETRIES = (
    20  # attempts at a path whose folders another request takes away, one after the other
)
MAX_LINKS = 40  # symbolic links in one path, as Linux has it
MAX_PATH = 4096  # bytes, PATH_MAX

# RFC 9110 section 5.6.2 and 5.5, RFC 9112 section 3: no control but HTAB in a value, so a bare CR,
# a bare LF or a NUL never matches; no white space before the colon, so no folded line does either.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-\"$-~]+) HTTP/([0-9]\.[0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [\t -~\x80-\xff]*)?\r\n")
FIELD_LINES = rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*"
FIELD_BLOCK = re.compile(FIELD_LINES + rb"\r\n")
HOST_VALUE = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")  # before a request: RFC 9112 section 2.2
LONE_CONTROL = re.compile(rb"\n(?<!\r\n)|\r(?!\n|\Z)|\0")
# The rest is compiled when it is first used: no start should wait for it.
FIELD_BLOCK_BEGUN = FIELD_LINES + rb"(?:" + TOKEN + rb"(?::[\t -~\x80-\xff]*)?)?\r?"
CHUNK_LINE = rb"\r\n([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?\r\n"
CHUNK_LINE_BEGUN = rb"\r?|\r\n[^\n]*"

HOP_PORT = r"^\[(.*)\](?::[0-9]+)?$|^([0-9.]+):[0-9]+$"  # what some proxies add
REQUEST_ID = r"[A-Za-z0-9._-]{1,64}"
CONTAINER = r"[a-zA-Z0-9][a-zA-Z0-9_.-]*"
TIMESTAMP = (
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
LOG_STAMP = TIMESTAMP.encode() + b" "
UNIX_TIME = r"([0-9]{1,11})(?:\.([0-9]{1,9}))?"
DURATION = r"(?=\.?[0-9])([0-9]{0,15})(?:\.([0-9]{0,15}))?(ns|us|µs|μs|ms|s|m|h)"
UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9}  # nanoseconds
UNITS.update(m=60 * UNITS["s"], h=3600 * UNITS["s"])
EVENT_ID = r"([0-9]{1,11})\.([0-9]{9})-([1-9][0-9]{0,14})"

# Python's phrases changed between 3.9 and 3.13 (413, 414, 416, 422); these are RFC 9110's.
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
PHRASES.update({413: "Content Too Large", 414: "URI Too Long"})

# --------------------------------------------------------------------------------------------------
# Errors: one class a client is told about, one envelope
# --------------------------------------------------------------------------------------------------

Json = dict[str, Any]  # an object


class ApiError(Exception):
    """A refusal the client is told about: one status, one sentence, perhaps headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class EngineError(ApiError):
    """The Engine refused, is not there (503), is silent (504) or answers nonsense (502)."""


class ClientGone(Exception):
    """The client has hung up or stopped reading. Raised by what reads from and writes to it."""


class Stopping(ApiError):
    """The agent is being stopped (503); raised in waits that would outlast it."""


def envelope(status: int, message: str) -> Json:
    """Return the JSON object that every error is answered with."""
    message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
    return {"error": PHRASES[status], "message": message, "status": status}


def encode_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# Validation: a subset of JSON Schema, strict JSON, query strings
# --------------------------------------------------------------------------------------------------

Schema = dict[str, Any]

# By type(), not isinstance(): to Python, a boolean is an integer.
KINDS: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
KINDS |= {list: "array", dict: "object"}
BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
KEYWORDS = {"type", "description", "properties", "required", "values", "items", "unique"}
KEYWORDS |= {"pattern", "maxLength", "raw", "minimum", "maximum"}


def check_schema(schema: Schema) -> Schema:
    """Return schema. Raises ValueError for a keyword that `validate` would not enforce."""
    if unknown := set(schema) - KEYWORDS:
        raise ValueError(f"unknown keywords {unknown} in {schema}")
    nested = [schema[key] for key in ("items", "values") if key in schema]
    for child in (*schema.get("properties", {}).values(), *nested):
        check_schema(child)
    return schema


def refuse(path: str, rule: str) -> NoReturn:
    raise ApiError(400, f"{path or 'body'}: {rule}")


class NotJson(str):
    """What is wrong with a value that Python's decoder lets through, until its path is known."""


def validate(schema: Schema, value: Any, path: str = "") -> Any:
    """Return value as schema allows it, less the members that are null. Raises ApiError (400)."""
    if isinstance(value, NotJson):
        refuse(path, value)
    rule = f"must be {schema.get('description', 'an ' + schema['type'])}"
    if KINDS.get(type(value)) not in schema["type"].split("|"):
        refuse(path, rule)
    if isinstance(value, dict):
        return validate_object(schema, value, path)
    if isinstance(value, list):
        items = [validate(schema["items"], item, f"{path}[{i}]") for i, item in enumerate(value)]
        if schema.get("unique") and len(set(items)) < len(items):
            refuse(path, "must not name the same twice")
        return items
    if isinstance(value, str):
        if "\0" in value and not schema.get("raw"):
            refuse(path, "must not contain a NUL character")
        if re.search(r"[\ud800-\udfff]", value):
            refuse(path, "must not contain a lone surrogate")
        if len(value) > schema["maxLength"]:
            refuse(path, f"must be at most {schema['maxLength']} characters")
        if not re.fullmatch(schema["pattern"], value):
            refuse(path, rule)
    if "maximum" in schema and value != "":  # a port may be written as a string
        low, high = schema["minimum"], schema["maximum"]
        if not low <= float(value) <= high:
            refuse(path, f"must be between {low:,} and {high:,}")
    return value


def validate_object(schema: Schema, value: Json, path: str) -> Json:
    """Return one object's members that are not null. Raises ApiError (400)."""
    properties, result = schema.get("properties", {}), {}
    prefix = f"{path}." if path else ""
    for name, member in value.items():
        if "values" in schema:
            validate(schema["values"], name, path)
        elif name not in properties:
            refuse(prefix + name, f"is unknown; known here: {', '.join(properties) or 'nothing'}")
        if member is not None:
            rule = schema.get("values") or properties[name]
            result[name] = validate(rule, member, prefix + name)
    for name in schema.get("required", ()):
        if name not in result:
            refuse(prefix + name, "is required")
    return result


# One function for each kind of value; it returns the value's schema.
def string_schema(pattern: str = "(?s:.*)", rule: str = "a string", longest: int = 4096) -> Schema:
    return {"type": "string", "pattern": pattern, "description": rule, "maxLength": longest}


def one_of(*words: str) -> Schema:
    return string_schema("|".join(words), f"one of {', '.join(words)}")


def integer_schema(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def array_of(item: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": item, **more}


def object_schema(required: str, **properties: Schema) -> Schema:
    return check_schema({"type": "object", "properties": properties, "required": required.split()})


NOTHING = object_schema("")


def decode_json(body: bytes) -> Any:
    """Return the value of JSON (RFC 8259), NotJson for what `validate` refuses. Raises ApiError."""
    # Invariant: the depth is known before the decoder, which recurses, sees it: without escapes,
    # strings and scalars all that is left are brackets.
    brackets = re.sub(rb'"[^"]*"?|[^"\[{\]}]+', b"", re.sub(rb"(?s)\\.", b"", body))
    depths = itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets)
    if any(depth > MAX_DEPTH for depth in depths):
        refuse("", f"is nested more than {MAX_DEPTH} deep")
    too_long = NotJson(f"has a number of more than {MAX_DIGITS} digits")
    try:
        return json.loads(
            body.decode(),
            object_pairs_hook=unique_object,
            parse_constant=lambda name: NotJson(f"{name} is not JSON"),
            parse_int=lambda digits: int(digits) if len(digits) <= MAX_DIGITS else too_long,
        )
    except ValueError as error:
        raise ApiError(400, f"body: is not JSON in UTF-8: {error}") from error


def unique_object(pairs: list[tuple[str, Any]]) -> Json | NotJson:
    """Return pairs as a dict, unless a key comes twice (RFC 7493 section 2.3)."""
    result: Json = {}
    for name, value in pairs:
        if name in result:
            return NotJson(f"has {json.dumps(name)} more than once")
        result[name] = value
    return result


def decode_query(query: str, schema: Schema) -> Json:
    """Return the parameters of a query string, typed as schema says. Raises ApiError (400)."""
    pairs: list[tuple[str, Any]] = []
    for part in filter(None, query.split("&")):
        name, _, value = (unquote(raw, errors="replace") for raw in part.partition("="))
        is_boolean = schema["properties"].get(name, {}).get("type") == "boolean"
        pairs.append((name, BOOLEANS.get(value.lower(), value) if is_boolean else value))
    checked: Json = validate(schema, unique_object(pairs), "query")
    return checked


# --------------------------------------------------------------------------------------------------
# Keys and policy: who asks, and whether he may
# --------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """One key's entry: its name, and what a limited key may do."""

    name: str
    master: bool = False

    def covers(self, kind: str, name: str) -> bool:
        """Return whether the key may see the container, image, network or volume of this name.

        kind: "containers", "images", "networks" or "volumes".
        """
        return self.master


MASTER = Key("master", master=True)

# --------------------------------------------------------------------------------------------------
# Configuration: the environment to one frozen Config; every problem names its variable
# --------------------------------------------------------------------------------------------------

Networks = tuple[Union[ipaddress.IPv4Network, ipaddress.IPv6Network], ...]
SOCKET = "unix:///var/run/docker.sock"
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# What a value must match, and what its variable's line says if it does not.
API_VERSION = (r"(1\.[0-9]{1,3})?", "an Engine API version such as 1.41")
PATH = ("(?s:/.*)", "an absolute path")
LEVEL = ("|".join(LEVELS), "debug, info, warning or error")


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


def parse_int(least: int, most: int, text: str) -> int:
    """Return an integer in ASCII digits. Raises ValueError."""
    if not (re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most):
        raise ValueError(f"{text!r} is not an integer from {least} to {most}")
    return int(text)


def parse_matching(pattern: str, rule: str, text: str) -> str:
    """Return text. Raises ValueError, which tells the rule, if the pattern does not match it."""
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text!r} is not {rule}")
    return text


def parse_listen(text: str) -> Address:
    """Return the address of ":3000", "127.0.0.1:3000", "[::1]:3000" or "unix:///run/a.sock"."""
    match = re.fullmatch(r"unix://(/.*[^/])|(localhost|[0-9.]*|\[[0-9a-fA-F:.]+\]):([^:]*)", text)
    if not match:
        raise ValueError("write :3000, 127.0.0.1:3000, [::1]:3000 or unix:///path/to/socket")
    path, host, port = match.groups("")
    host = host.strip("[]")
    if host not in ("", "localhost"):
        host = str(ipaddress.ip_address(host))
    return Address(path, host, 0 if path else parse_int(0, 65535, port))


def parse_engine(text: str) -> Address:
    """Return the Engine's address from DOCKER_HOST's forms. Raises ValueError."""
    name = r"[a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\]"
    match = re.fullmatch(f"unix://(/.*[^/])|(tcp|https?)://({name})(?::([0-9]+))?/?", text)
    if not match:
        raise ValueError(f"{text!r} is not unix:///path, tcp://host:port, http:// or https://")
    path, scheme, host, port = match.groups("")
    return Address(
        path, host.strip("[]"), parse_int(1, 65535, port) if port else 0, scheme or "tcp"
    )


def parse_networks(text: str) -> Networks:
    """Return the networks of a comma-separated list of CIDRs. Raises ValueError."""
    networks = tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    for network in networks:
        if getattr(network.network_address, "ipv4_mapped", None):
            raise ValueError(f"{network} never matches; write it as an IPv4 network")
    return networks


def read_key_file(path: str) -> bytes:
    """Return the key in a file, less one trailing newline. Raises OSError or ValueError."""
    if not path:
        return b""
    with open(path, "rb") as file:
        key = file.read(MAX_REQUEST_LINE + 1)
    if not key.strip() or len(key) > MAX_REQUEST_LINE:
        raise ValueError(f"{path} holds no key, or more than a header can carry")
    return key.removesuffix(b"\n")


def variable(default: str, meaning: str, parse: Callable[..., Any] = str, *rule: Any) -> Any:
    """Return how a field of Config is read; Any, to stand where the value will be."""
    return default, meaning, functools.partial(parse, *rule)


class Config(NamedTuple):
    """The environment, under the variables' names in lower case, and two TLS contexts."""

    api_key: bytes = variable("", "the key that clients send as X-API-Key; required", os.fsencode)
    api_key_file: bytes = variable("", "file to read the key from instead", read_key_file)
    listen_addr: Address = variable(
        ":3000", "or 127.0.0.1:3000, [::1]:3000, unix:///path", parse_listen
    )
    docker_host: Address = variable(SOCKET, "or tcp://host:port, http://, https://", parse_engine)
    docker_tls_verify: str = variable("", "when not empty, tcp:// speaks TLS")
    docker_cert_path: str = variable("", "folder of ca.pem, cert.pem and key.pem (~/.docker)")
    docker_api_version: str = variable(
        "", "such as 1.41; else negotiated", parse_matching, *API_VERSION
    )
    host_root: str = variable(
        "/host", "where the host's / is mounted; / on a bare host", parse_matching, *PATH
    )
    rate_limit: int = variable(
        "100", "requests a minute and client; 0: no limit", parse_int, 0, 10**8
    )
    trusted_proxies: Networks = variable(
        "", "CIDRs whose X-Forwarded-For is believed", parse_networks
    )
    tls_cert_file: str = variable("", "certificate (chain) to serve HTTPS with")
    tls_key_file: str = variable("", "its private key")
    tls_client_ca_file: str = variable("", "require a client certificate signed by this CA")
    max_connections: int = variable(
        "1024", "served at once; one more gets 503", parse_int, 1, 10**6
    )
    log_level: str = variable("info", "or debug, warning, error", parse_matching, *LEVEL)
    server_tls: Optional[ssl.SSLContext] = None
    engine_tls: Optional[ssl.SSLContext] = None


class Setting(NamedTuple):
    """One environment variable: its name, default, meaning and parser."""

    name: str
    default: str
    meaning: str
    parse: Callable[[str], Any]


SETTINGS = [Setting(name.upper(), *row) for name, row in Config._field_defaults.items() if row]


def describe(error: Exception) -> str:
    """Return one line for an error, without the number Python puts before an OSError's text."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return name + (getattr(error, "reason", None) or error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def load_config(environ: Mapping[str, str]) -> Config:
    """Return what environ says; "" is as good as not set. Raises ConfigError: a line a problem."""
    values: Json = {}
    problems = []
    for setting in SETTINGS:
        text = environ.get(setting.name) or setting.default
        try:
            values[setting.name.lower()] = setting.parse(text)
        except (OSError, ValueError) as error:
            problems.append(f"{setting.name}: {describe(error)}")
    if not problems:
        config = Config(**values)
        for name, use in ("api_key", use_key), ("server_tls", serve_tls), ("engine_tls", speak_tls):
            try:
                values[name] = use(config)
            except ConfigError as error:
                problems += error.args
    if problems:
        raise ConfigError(*problems)
    return Config(**values)


def use_key(config: Config) -> bytes:
    """Return the key, wherever it comes from. Raises ConfigError, without the key."""
    name = "API_KEY_FILE" if config.api_key_file else "API_KEY"
    key = config.api_key_file or config.api_key
    if config.api_key and config.api_key_file:
        raise ConfigError("API_KEY_FILE: set this or API_KEY, not both")
    if not key:
        raise ConfigError("API_KEY: is required; try API_KEY=$(openssl rand -hex 32)")
    if re.search(rb"[\x00-\x1f\x7f]", key) or key != key.strip(b" "):
        raise ConfigError(f"{name}: no header can carry a control character, or a space at an end")
    return key


def serve_tls(config: Config) -> ssl.SSLContext | None:
    """Return the listener's TLS context, if it has one. Raises ConfigError."""
    cert = ("TLS_CERT_FILE", config.tls_cert_file)
    key = ("TLS_KEY_FILE", config.tls_key_file)
    ca = ("TLS_CLIENT_CA_FILE", config.tls_client_ca_file)
    given = [name for name, path in (cert, key, ca) if path]
    missing = [name for name, path in (cert, key) if not path]
    if given and missing:
        raise ConfigError(f"{missing[0]}: is required with {given[0]}")
    return tls_context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca) if given else None


def speak_tls(config: Config) -> ssl.SSLContext | None:
    """Return the TLS context for the Engine, if it takes one. Raises ConfigError."""
    scheme, verify = config.docker_host.scheme, config.docker_tls_verify
    if scheme != "https" and not (scheme == "tcp" and verify):
        return None
    if not (verify or config.docker_cert_path):
        return ssl.create_default_context()
    folder = config.docker_cert_path or os.path.expanduser("~/.docker")
    names = ("cert.pem", "key.pem", "ca.pem")
    cert, key, ca = (("DOCKER_CERT_PATH", os.path.join(folder, name)) for name in names)
    if not (os.path.exists(cert[1]) or os.path.exists(key[1])):
        cert = key = ("DOCKER_CERT_PATH", "")
    return tls_context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)


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
        with config_errors(*cert):
            ssl.SSLContext(protocol).load_verify_locations(cert[1])
        with config_errors(*key):
            context.load_cert_chain(cert[1], key[1], refuse_password)
    if ca[1]:
        with config_errors(*ca):
            context.load_verify_locations(ca[1])
        # Invariant: with a CA set, nobody without its certificate gets past the handshake.
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@contextlib.contextmanager
def config_errors(variable: str, path: str) -> Iterator[None]:
    """Have what fails in using the file at path name the variable. Raises ConfigError."""
    try:
        with open(path, "rb"):
            yield
    except OSError as error:
        message = f"{variable}: {path} cannot be used: {error.strerror or error}"
        raise ConfigError(message) from error


def refuse_password() -> str:
    """Refuse an encrypted key: OpenSSL would ask for its password on the terminal."""
    raise OSError(errno.EINVAL, "the private key is encrypted")


# --------------------------------------------------------------------------------------------------
# Logging: one JSON object a line on standard output
# --------------------------------------------------------------------------------------------------

CLIENT_TEXT = {"method", "path", "request_id", "error", "traceback"}  # may hold what clients sent


def timestamp(now: float, timespec: str = "milliseconds") -> str:
    """Return Unix seconds as RFC 3339 in UTC: "2026-02-21T10:00:00.000Z"."""
    moment = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


class Log:
    """Writes log lines to stdout; drops them, and counts, rather than wait for a reader."""

    def __init__(self, level: str, secret: bytes) -> None:
        self._rank = LEVELS[level]
        self._length = len(secret)
        text = secret.decode("latin-1")  # as what clients send is
        self._secrets = {text, secret.decode("utf-8", "replace"), quote(secret, safe="")}
        self._descriptor = 1
        with contextlib.suppress(OSError):
            if os.isatty(1):
                # A terminal polls writable while one byte fits, and may be held (Ctrl-S). By an
                # open of our own, so that it stays blocking for whoever else has it.
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._descriptor = os.open("/proc/self/fd/1", flags)
        self._mend = b""  # ends the line that a full disk cut short
        self._dropped = 0
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

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
            line, written = self._mend + fit_line(record), 0
            # A full disk, a closed pipe, a reader that is gone: none may end a request.
            with contextlib.suppress(OSError):
                # Invariant: a full pipe never blocks: it polls writable only while PIPE_BUF bytes
                # fit, and no line is longer.
                if self._poll.poll(0):
                    written = os.write(self._descriptor, line)
                    self._mend = b"\n" if written < len(line) else b""
            self._dropped = self._dropped + 1 if written < len(line) else 0

    def redact(self, text: str, least: int = 1) -> str:
        """Return text without the key in it, unless it has less than `least` characters."""
        for secret in self._secrets if self._length >= least else ():
            text = text.replace(secret, "***")
        return text


def describe_bug(error: BaseException | None) -> str:
    """Return where an error was raised, and its class; its text could hold what a client sent."""
    import traceback  # here: no start should wait for it

    places = traceback.format_tb(error.__traceback__ if error else None)
    return "".join(places) + type(error).__name__


def fit_line(record: Json) -> bytes:
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


def client_address(peer: str, forwarded: str, trusted: Networks) -> str:
    """Return the address a request is counted under; peer is "" on a Unix socket.

    forwarded: X-Forwarded-For, believed only as far as the hop that wrote it is trusted: the
    right-most address that no trusted proxy has is the client.
    """
    client = parse_ip(peer)
    if client is None:
        return "unix"
    for hop in reversed(forwarded.split(",")):
        address = parse_ip(re.sub(HOP_PORT, r"\1\2", hop.strip()))
        if address is None or not any(client in network for network in trusted):
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
        if ":" in client:  # one IPv6 client may use its whole /64
            client = str(ipaddress.IPv6Network((client, 64), strict=False))
        with self._lock:
            now = self._clock()
            times = self._windows.pop((client, has_key), None) or array.array("d")
            del times[: bisect.bisect_right(times, now - RATE_WINDOW)]
            admitted = len(times) < self._limit
            if admitted:
                times.append(now)
            left, reset = self._limit - len(times), math.ceil(times[0] + RATE_WINDOW - now)
            self._windows[client, has_key] = times
            # Invariant: the table is bounded, whoever comes from however many addresses. None of
            # its windows is empty, and the newest stays.
            while True:
                key, oldest = next(iter(self._windows.items()))
                if oldest[-1] > now - RATE_WINDOW and len(self._windows) <= MAX_CLIENTS:
                    break
                del self._windows[key]
        wait = str(max(1, reset))
        numbers = {"Limit": str(self._limit), "Remaining": str(left), "Reset": wait}
        headers = {f"X-RateLimit-{name}": value for name, value in numbers.items()}
        if not admitted:
            message = f"more than {self._limit} requests in 60 seconds; retry in {wait} s"
            raise ApiError(429, message, {**headers, "Retry-After": wait})
        return headers


# --------------------------------------------------------------------------------------------------
# Sockets: field lines, body framing and waits, for clients and Engine alike
# --------------------------------------------------------------------------------------------------

Fields = dict[str, list[str]]


class BadMessage(ApiError):
    """What a peer sent is not HTTP, or ended too early."""


def parse_fields(block: bytes) -> Fields:
    """Return a block's field values by lower-case name (RFC 9112 section 5). Raises BadMessage."""
    if not FIELD_BLOCK.fullmatch(block):
        raise BadMessage(400, "a header line is not of the form Name: value")
    fields: Fields = {}
    for line in block.decode("latin-1").split("\r\n")[:-2]:
        name, _, value = line.partition(":")
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    return fields


def framing(fields: Fields, otherwise: int = 0) -> int | None:
    """Return a body's length in bytes; None for a chunked one (RFC 9112 section 6).

    otherwise: what it is with neither given. Raises BadMessage for every framing that two parsers
    might read in two ways (400), and for a coding other than chunked (501).
    """
    lengths, codings = fields.get("content-length", []), fields.get("transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        raise BadMessage(400, "more than one Content-Length or Transfer-Encoding")
    if codings:
        if codings[0].lower() != "chunked":
            raise BadMessage(501, "Transfer-Encoding: only chunked is understood")
        return None
    if not lengths:
        return otherwise
    if not (lengths[0].isascii() and lengths[0].isdigit()):
        raise BadMessage(400, "Content-Length must be plain digits")
    # 18 digits are past every limit here; int() of thousands would take its time.
    return int(lengths[0].lstrip("0")[:18] or "0")


@functools.lru_cache(maxsize=512)
def chunk_size(line: bytes) -> int | None:
    """Return the size that a chunk's line gives, None if the line goes on. Raises BadMessage."""
    match = re.fullmatch(CHUNK_LINE, line)
    # Invariant: a chunk's line is not waited for without a bound; nor is the trailer, in `feed`.
    if len(line) > MAX_CHUNK_LINE or not (match or re.fullmatch(CHUNK_LINE_BEGUN, line)):
        raise BadMessage(400, "body: bad chunked coding")
    return int(match[1], 16) if match else None


class Body:
    """Decodes a message body from bytes as they come; what follows it is left in `rest`."""

    def __init__(self, length: int | None) -> None:  # None: chunked, RFC 9112 section 7.1
        self.done = length == 0
        self._chunked = length is None
        # Each chunk's line begins with the CRLF that ends the chunk before; so does the first's.
        self.rest = b"\r\n" if self._chunked else b""
        self._left = length or 0  # bytes of the body, or of the chunk being read
        self._last = False

    def feed(self, data: bytes) -> bytes:
        """Return the body's bytes in data. Raises BadMessage for bad chunked coding."""
        data, position, pieces, left = self.rest + data, 0, [], self._left
        length = len(data)
        while not self._last:
            pieces.append(data[position : position + left])
            position += left
            if position > length or not self._chunked:  # without chunks, all is one
                self.done = position <= length
                break
            end = data.find(b"\n", position + 2) + 1 or length
            size = chunk_size(data[position:end])
            if size is None:
                break
            position, left, self._last = end, size, not size
        if self._last:
            whole = FIELD_BLOCK.match(data, position)
            trailer = whole or re.compile(FIELD_BLOCK_BEGUN).fullmatch(data, position)
            if not trailer or trailer.end() - position > MAX_TRAILER:
                raise BadMessage(400, "body: bad chunked coding")
            if whole:  # its fields are dropped
                position, self.done = whole.end(), True
        self.rest, self._left = data[position:], max(0, position - length)
        return b"".join(pieces)


class Interrupts(NamedTuple):
    """Whom a wait must not outlive: a client, and (by a socket that tells of its end) the agent."""

    client: Optional[socket.socket] = None
    stop: Optional[socket.socket] = None

    def wait_readable(self, sock: socket.socket, deadline: float) -> bool:
        """Return whether sock can be read by deadline (monotonic). Raises ClientGone, Stopping."""
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
            raise Stopping(503, "the agent is being stopped; try again later")
        if sock.fileno() in ready or not ready:
            return bool(ready)
        # The client has gone, or has shut only its half of the connection (nc -N): who waits for
        # an answer gets what comes soon.
        patience = time.monotonic() + HALF_CLOSED
        came = self._replace(client=None).wait_readable(sock, min(deadline, patience))
        if not came and patience <= deadline:
            raise ClientGone
        return came


NEVER = Interrupts()


def receive(sock: socket.socket, deadline: float, interrupts: Interrupts = NEVER) -> bytes:
    """Return what comes next, b"" at the end. Raises socket.timeout past deadline (monotonic)."""
    sock.setblocking(False)  # for a TLS socket can be readable with nothing in it for us
    # Invariant: a peer that never stops sending is held to the deadline, too.
    while interrupts.wait_readable(sock, deadline) and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
            return sock.recv(RECV_SIZE)
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
# HTTP handler: read the head, limit, authorise, route, read the body, answer
# --------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """One request, checked."""

    key: Key
    interrupts: Interrupts
    name: str  # {id} in the path
    query: Json
    body: Json
    fields: Fields
    target: Json  # what is acted upon, for the log: {"id", "name"}, {"image"}, {"path"}...

    def header(self, name: str) -> str:
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
    stream: Optional[Stream] = None


PUBLIC, KEY = "public", "key"


class Route(NamedTuple):
    """All that is known of one operation."""

    method: str
    path: str  # "{id}" stands for a container's id or name
    endpoint: Callable[[Request, Any], Response]
    permission: str = KEY
    body: Optional[Schema] = None  # None: a body is refused
    query: Schema = NOTHING


def split_target(target: str) -> tuple[list[str], str]:
    """Return a request target's path segments, decoded once, and its query."""
    target = re.sub("(?i)^https?://[^/?]*", "", target)  # RFC 9112 section 3.2.2, "absolute-form"
    path, _, query = target.partition("?")
    return [unquote(segment, errors="replace") for segment in path.split("/")], query


def is_api(segments: list[str]) -> bool:
    """Return whether a path is under /api/v1, where nothing is told without the key."""
    return segments[:3] == API.split("/")


def find_route(routes: Iterable[Route], method: str, segments: list[str]) -> tuple[Route, str]:
    """Return a route and the {id} in its path. Raises ApiError (404, 405)."""
    allowed: list[str] = []
    for route in routes:
        template = route.path.split("/")
        if len(template) != len(segments):
            continue
        if all(a in ("{id}", b) for a, b in zip(template, segments)):
            methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
            if method in methods:
                return route, dict(zip(template, segments)).get("{id}", "")
            allowed += methods
    if allowed:
        options = ", ".join(allowed)
        raise ApiError(405, f"use {options} here", {"Allow": options})
    raise ApiError(404, "there is nothing at this path; the README lists the endpoints")


http_date = functools.lru_cache(maxsize=1)(functools.partial(email.utils.formatdate, usegmt=True))


class Handler(socketserver.BaseRequestHandler):
    """One connection: its requests one after the other, each logged.

    Not http.server's BaseHTTPRequestHandler: nothing of its lax parser or HTML errors is reachable.
    """

    server: Server
    buffer = b""  # received, and not taken yet
    keep = True
    answered = False  # so that the last answer is given time to be read

    def handle(self) -> None:
        self.sock: socket.socket = self.request
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine has died is given up after as long as one that reads nothing.
            timeout = int(WRITE_TIMEOUT * 1000)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
        deadline = time.monotonic() + HEAD_TIMEOUT
        if tls := self.server.config.server_tls:
            self.keep = self.shake_hands(tls, deadline)
        while self.keep and self.wait_for_request(deadline):
            self.serve()
            deadline = time.monotonic() + IDLE_TIMEOUT

    def shake_hands(self, tls: ssl.SSLContext, deadline: float) -> bool:
        """Return whether the connection is a TLS one by now."""
        try:
            if Interrupts(stop=self.server.stopping).wait_readable(self.sock, deadline):
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))
                self.sock = tls.wrap_socket(self.sock, server_side=True)
                return True
        except (Stopping, OSError, ValueError) as error:
            self.server.log("debug", "handshake failed", error=describe(error))
        return False

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
        with contextlib.suppress(OSError, Stopping):
            while True:
                begun = EMPTY_LINES.sub(b"", self.buffer)
                # Invariant: even empty lines are taken up to a bound only.
                if len(self.buffer) - len(begun) > MAX_REQUEST_LINE:
                    break
                if begun not in (b"", b"\r"):
                    self.buffer = begun
                    return True
                if not (
                    data := receive(self.sock, deadline, Interrupts(stop=self.server.stopping))
                ):
                    break
                self.buffer += data
        self.answered = self.answered and NEVER.wait_readable(
            self.sock, 0
        )  # else there is no more to read
        return False

    def serve(self) -> None:
        """EngineResponse one request and log it. The one place where errors become answers."""
        started = time.monotonic()
        self.id = secrets.token_hex(8)
        self.method, self.path, self.client = "", "", self.client_address
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
        fields: Json = {"method": self.method, "path": self.path, "status": self.status}
        fields["latency_ms"] = round((time.monotonic() - started) * 1000, 3)
        fields.update(request_id=self.id, client_ip=self.client, bytes=max(0, self.sent))
        self.server.log("error" if self.status >= 500 else "info", "request", **fields)

    def receive_more(self, deadline: float, what: str, interrupts: Interrupts) -> bytes:
        """Return more of the request. Raises ApiError (400, 408) or ClientGone."""
        try:
            data = receive(self.sock, deadline, interrupts)
        except socket.timeout as error:
            raise ApiError(408, f"the {what} did not arrive in time") from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ApiError(400, f"the connection ended within the {what}")
        return data

    def head_until(self, end: bytes, limit: int, status: int, what: str, deadline: float) -> bytes:
        """Return what is before end; take neither. Raises ApiError as soon as it can be told."""
        scanned = 0  # so that a head in tiny pieces costs no more
        while True:
            # Invariant: the head is bounded before any of it is looked at. What may be the
            # beginning of end does not count; more CRs and LFs are refused below.
            part, found, _ = self.buffer[: limit + len(end)].partition(end)
            if len(part.rstrip(b"\r\n")) > limit:
                raise ApiError(status, f"the {what} longer than {limit} bytes")
            if LONE_CONTROL.search(part + found, scanned):
                raise ApiError(400, "the head has a bare CR, a bare LF or a NUL in it")
            if found:
                return part
            scanned = len(part) - 1
            self.buffer += self.receive_more(
                deadline, "head", Interrupts(stop=self.server.stopping)
            )

    def read_head(self) -> Fields:
        """Take the next request's head out of the buffer, return its fields. Raises ApiError."""
        deadline = time.monotonic() + HEAD_TIMEOUT
        line = self.head_until(b"\r\n", MAX_REQUEST_LINE, 414, "request line is", deadline)
        # Invariant: the head is matched by the grammar before any other code sees it.
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise ApiError(400, "the request line is not of the form: GET /path HTTP/1.1")
        self.method, self.path, version = (part.decode() for part in match.groups())
        if version not in ("1.0", "1.1"):
            raise ApiError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        self.minor = int(version[-1])
        self.buffer = self.buffer[len(line) :]  # its CRLF stays: it ends a head without fields
        block = self.head_until(b"\r\n\r\n", MAX_FIELD_BLOCK, 431, "headers are", deadline)
        self.buffer = self.buffer[len(block) + 4 :]
        if block.count(b"\n") > MAX_FIELDS:
            raise ApiError(431, f"there are more than {MAX_FIELDS} headers")
        return parse_fields((block + b"\r\n\r\n")[2:])

    def check_head(self, fields: Fields) -> int | None:
        """Note who asks; return the body's length, None if chunked. Raises ApiError (400, 501).

        What two parsers may frame differently is refused: behind a proxy it smuggles requests in.
        """
        own = ",".join(fields.get("x-request-id", []))
        if re.fullmatch(REQUEST_ID, own) and self.server.log.redact(own, SHORT_KEY) == own:
            self.id = own
        if forwarded := ",".join(fields.get("x-forwarded-for", [])):
            trusted = self.server.config.trusted_proxies
            self.client = client_address(self.client_address, forwarded, trusted)
        hosts = fields.get("host", [])
        if len(hosts) > 1 or (self.minor and not hosts):
            raise ApiError(400, "Host: must be given once")
        if not HOST_VALUE.fullmatch("".join(hosts)):
            raise ApiError(400, "Host: is not a host and port")
        if not self.minor and "transfer-encoding" in fields:
            raise ApiError(400, "Transfer-Encoding: HTTP/1.0 has none")
        length = framing(fields)
        self.unread = length != 0
        options = ",".join(fields.get("connection", [])).lower().split(",")
        self.keep = self.minor == 1 and "close" not in map(str.strip, options)
        return length

    def answer(self, fields: Fields) -> Response:
        """Check one request, in the order that tells a stranger least, and have it answered."""
        length = self.check_head(fields)
        segments, query = split_target(self.path)
        if is_api(segments):
            self.authorise(fields)
        route, name = find_route(self.server.routes, self.method, segments)
        # Read off the table: whatever is not public has been authorised above.
        if route.permission != PUBLIC and not is_api(segments):
            raise ApiError(401, "this path needs the key")
        if "{id}" in route.path:
            container_path(name)
        parameters = decode_query(query, route.query)
        body = self.read_body(fields, route, length)
        interrupts = Interrupts(self.sock, self.server.stopping)
        request = Request(MASTER, interrupts, name, parameters, body, fields, {})
        return route.endpoint(request, self.server.agent)

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

    def read_body(self, fields: Fields, route: Route, length: int | None) -> Json:
        """Return the checked JSON of the body, {} if the route takes none. Raises ApiError."""
        expected = [value.lower() for value in fields.get("expect", ()) if self.minor]
        if expected not in ([], ["100-continue"]):
            raise ApiError(417, "Expect: only 100-continue is understood")
        if length is not None and length > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
        if route.body is None:
            if length != 0:
                raise ApiError(400, "body: none is taken here")
            return {}
        if expected and length != 0 and not self.buffer:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.sent = 0
        deadline, body = time.monotonic() + BODY_TIMEOUT, Body(length)
        received = bytearray(body.feed(self.buffer))
        while len(received) <= MAX_BODY and not body.done:
            received += body.feed(self.receive_more(deadline, "body", NEVER))
        if len(received) > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
        data, self.buffer = bytes(received), body.rest
        self.unread = False
        if not route.body["required"] and data.strip(b" \t\r\n") in (b"", b"null"):
            return {}
        checked: Json = validate(route.body, decode_json(data))
        return checked

    def respond_error(self, error: ApiError) -> None:
        if not self.path and self.buffer.startswith(b"HEAD "):
            self.method = "HEAD"  # not even an answer that refuses one has a body
        if self.status:  # a head is out: nothing but the missing end can tell now
            self.keep = False
            level = "warning" if error.status < 500 else "error"
            self.server.log(level, "broken off", request_id=self.id, error=error.message)
            return
        # Invariant: no answer holds the key, not even one that repeats what a client sent. But from
        # what is missing there, a stranger could tell that he has guessed a short one.
        body = envelope(error.status, self.server.log.redact(error.message, SHORT_KEY))
        self.respond(Response(body, error.status, error.headers))

    def respond(self, response: Response) -> None:
        """Send an answer. Raises ClientGone, and ApiError from within a stream."""
        if response.stream is None:
            as_is = isinstance(response.body, bytes)
            body = response.body if as_is else encode_json(response.body) + b"\n"
            self.send_head(response, {"Content-Length": str(len(body))}, body)
            return
        with contextlib.closing(response.stream) as stream:
            pieces = filter(None, stream)  # an empty chunk is the last
            first = self.chunk(next(pieces))
            self.send_head(response, {"Transfer-Encoding": "chunked"} if self.minor else {}, first)
            if self.method == "HEAD":
                return
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER)
            for piece in itertools.chain(pieces, (b"",)):
                self.write(self.chunk(piece))

    def chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.minor else data

    def send_head(self, response: Response, framed: Mapping[str, str], body: bytes) -> None:
        """Send the head and what there is of the body, which a HEAD is not sent."""
        # Invariant: after an answer that leaves body bytes unread, the connection closes.
        self.keep = self.keep and not self.unread
        self.status = response.status
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", **self.headers}
        headers |= {**response.headers, **framed}
        if not self.keep:
            headers["Connection"] = "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        # No text of the request's is in it that no regex passed.
        head = (
            f"HTTP/1.1 {self.status} {PHRASES[self.status]}\r\n{lines}X-Request-ID: {self.id}\r\n"
            f"Date: {http_date(int(time.time()))}\r\nX-Content-Type-Options: nosniff\r\n\r\n"
        ).encode("latin-1")
        self.sent = -len(head)  # so that the body's bytes are counted
        self.write(head + (b"" if self.method == "HEAD" else body))

    def write(self, data: bytes) -> None:
        """Send data. Raises ClientGone when the client hangs up or takes nothing for too long."""
        left = memoryview(data)
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
    allow_reuse_port = False  # another process could share the port and take the keys

    def __init__(
        self,
        config: Config,
        engine: Engine,
        log: Log,
        listener: socket.socket,
        routes: Iterable[Route],
        agent: Any,
    ) -> None:
        super().__init__(("", 0), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.config, self.engine, self.log = config, engine, log
        self.routes, self.agent = routes, agent
        self.limiter = RateLimiter(config.rate_limit)
        self.active: set[socket.socket] = set()  # connections being served
        self.stopping, self._stop = socket.socketpair()  # the first can be read once we stop
        self._refused: collections.deque[tuple[float, socket.socket]] = collections.deque()

    def get_request(self) -> tuple[socket.socket, str]:
        """Return a connection and the client's IP address, "unix" over a Unix socket."""
        try:
            sock, address = self.socket.accept()
            return sock, client_address(address[0] if isinstance(address, tuple) else "", "", ())
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection stays queued; do not spin until one ends
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it, without blocking the next one."""
        # Invariant: no more threads than MAX_CONNECTIONS, however many connect: one thread adds.
        if len(self.active) < self.config.max_connections:
            self.active.add(request)
            try:
                super().process_request(request, client_address)
                return
            except RuntimeError:  # no thread to be had
                self.active.discard(request)
        self._refuse(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.active.discard(request)

    def _refuse(self, request: socket.socket, client: str) -> None:
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
        fields = {"method": "", "path": "", "status": 503, "latency_ms": 0, "bytes": len(body)}
        self.log("warning", "request", **fields, request_id=request_id, client_ip=client)

    def service_actions(self) -> None:
        """Close what has had its moment, here and at the Engine; also called twice a second."""
        now = time.monotonic()
        self.engine.close_idle(now - IDLE_CONNECTION)
        while self._refused and (
            self._refused[0][0] < now or len(self._refused) > MAX_LINGERING_REFUSALS
        ):
            self._refused.popleft()[1].close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log("error", "bug", traceback=describe_bug(sys.exc_info()[1]))

    def stop(self) -> None:
        """Stop accepting; wake the streams and the idle connections."""
        self.shutdown()
        self.socket.close()
        if path := self.config.listen_addr.path:
            with contextlib.suppress(OSError):
                os.unlink(path)
        self._stop.close()

    def server_close(self) -> None:
        super().server_close()
        for _, sock in self._refused:
            sock.close()
        self.stopping.close()
        self.engine.close_idle()


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
FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


def split_path(path: str) -> list[bytes]:
    """Return the components of a path on the host. Raises ApiError (400)."""
    encoded = path.encode()
    parts = encoded.split(b"/")
    if parts[0] or b".." in parts or parts[-1] in (b"", b".") or "\0" in path:
        refuse("path", "must be absolute, name a file, and have no .. component or trailing slash")
    if len(encoded) > MAX_PATH or any(len(part) > 255 for part in parts):
        refuse("path", f"must have at most {MAX_PATH} bytes, and a name at most 255")
    return [part for part in parts if part not in (b"", b".")]


class Walk:
    """Descends from the root by held descriptors, making missing folders.

    A path is never looked at twice: each component is opened relative to the descriptor of the one
    before, and the kernel is told to follow no link. Links are read and resolved here, as the host
    would see them.
    """

    def __init__(self, root: str) -> None:
        try:
            self._stack = [os.open(root, os.O_PATH | os.O_DIRECTORY)]
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
    for attempts_left in reversed(range(MAX_PATH_RETRIES)):
        try:
            with Walk(root) as walk:
                write_in(walk.descend(parents), name, write)
            return
        except OSError as error:
            # Another request made a folder here, failed and undid it; or another agent on this host
            # has used the same temporary name.
            if attempts_left and error.errno in (errno.ENOENT, errno.EEXIST):
                continue
            status, advice = FILE_ERRORS.get(error.errno or 0, (500, "see the host's kernel log"))
            raise ApiError(status, f"path: {error.strerror}: {advice}") from error


def write_in(parent: int, name: bytes, write: FileWrite) -> None:
    """Write the file called name in the folder held open. Raises ApiError or OSError."""
    found = None
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        check_regular(found)
    if found and not write.atomic:
        overwrite(parent, name, write)
    else:
        replace(parent, name, found, write)
        sync_folder(parent)


def check_regular(found: os.stat_result) -> None:
    """Raise ApiError unless found is a regular file."""
    if stat.S_ISLNK(found.st_mode):
        raise ApiError(400, "path: is a link; write to what it points at")
    if not stat.S_ISREG(found.st_mode):
        raise ApiError(409, "path: there is something other than a regular file")


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
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(b".", os.O_WRONLY | os.O_TMPFILE, 0o600, dir_fd=parent)
        except OSError as error:
            if not os.fstat(parent).st_nlink:  # removed meanwhile, which ext4 calls EPERM
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                raise
            temporary = stack.enter_context(temporary_name(parent, name))
            # Invariant: O_EXCL opens nothing that somebody else has put there.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
        file = stack.enter_context(open(descriptor, "wb"))
        file.write(write.content)
        file.flush()
        if found:
            set_owner_and_mode(descriptor, write, found)  # a change of owner takes capabilities
            keep_attributes(descriptor, parent, name)
        set_owner_and_mode(descriptor, write, found)
        with if_supported():
            os.fsync(descriptor)
        if not temporary:
            source = f"/proc/self/fd/{descriptor}"
            if not found:
                with contextlib.suppress(FileExistsError):
                    os.link(source, name, dst_dir_fd=parent)
                    return
            # A file can only be renamed over another from a name.
            temporary = stack.enter_context(temporary_name(parent, name))
            os.link(source, temporary, dst_dir_fd=parent)
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def sync_folder(parent: int) -> None:
    """Make a rename last, if the folder may be opened, not only written to. Raises OSError."""
    try:
        descriptor = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent)
    except OSError:  # no reason to call a failure what is in place
        return
    with contextlib.ExitStack() as stack, if_supported():
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


def overwrite(parent: int, name: bytes, write: FileWrite) -> None:
    """Write into the file that is there, keeping its inode. Raises ApiError or OSError."""
    # O_NONBLOCK: a FIFO put there meanwhile must not hold the thread.
    descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    with open(descriptor, "wb", buffering=0) as file:  # unbuffered: its end writes nothing
        with WRITING:  # or the file would end as one writer's text and another's length
            found = os.fstat(descriptor)
            check_regular(found)
            if found.st_mode & (stat.S_ISUID | stat.S_ISGID):
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode))  # or we could not give them back
            try:  # owner, mode and room are settled while the old content is still whole
                set_owner_and_mode(descriptor, write, found)
                with if_supported():
                    os.posix_fallocate(descriptor, 0, len(write.content))
            except OSError:
                os.ftruncate(descriptor, found.st_size)
                with contextlib.suppress(OSError):
                    set_owner_and_mode(descriptor, FileWrite(b""), found)
                raise
            left = memoryview(write.content)
            while left:
                left = left[file.write(left) :]
            file.truncate(len(write.content))
            set_owner_and_mode(descriptor, write, found)  # writing has cleared the set-id bits
        with if_supported():
            os.fsync(descriptor)


# --------------------------------------------------------------------------------------------------
# Request schemas: the tables, nothing else
# --------------------------------------------------------------------------------------------------

SIGNALS = (
    "ABRT|ALRM|BUS|CHLD|CONT|FPE|HUP|ILL|INT|KILL|PIPE|POLL|PROF|QUIT|SEGV|STOP|SYS|TERM|TRAP|TSTP"
    "|TTIN|TTOU|URG|USR1|USR2|VTALRM|WINCH|XCPU|XFSZ"
)
NAME_RULE = "letters, digits, '_', '.' or '-', beginning with a letter or digit"
# The distribution project's reference grammar: [domain[:port]/]path[:tag][@digest]
IMAGE = (
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
)
IMAGE_RULE = "an image such as nginx, nginx:1.27, host:5000/team/app:tag or name@sha256:..."


STRING = string_schema(longest=MAX_BODY)
BOOLEAN = {"type": "boolean", "description": "true or false"}
PORT = string_schema("0{0,9}[1-9][0-9]{0,4}", "a port from 1 to 65535, in ASCII digits")
PORT |= {**integer_schema(1, 65535), "type": "string|integer"}
SIGNAL = string_schema(f"(?ai:(SIG)?({SIGNALS}))", "a POSIX signal name such as SIGTERM or HUP")
USER_ID = integer_schema(0, 2**32 - 2)  # one more means "no change"
PLATFORM = string_schema(r"[a-z0-9_]+(/[a-zA-Z0-9_.]+){0,2}", "os/arch such as linux/amd64", 64)

PORTS = object_schema(
    "container_port",
    container_port=PORT,
    host_port={**PORT, "pattern": f"({PORT['pattern']})?"},  # empty: the Engine picks one
    protocol=one_of("tcp", "udp", "sctp"),
    host_ip=string_schema(longest=45),
)
VOLUMES = object_schema(
    "target",
    source=string_schema("(?s:.+)", "a path or a volume's name"),
    target=string_schema(r"/+[^/](?s:.*)", "an absolute path other than /"),
    read_only=BOOLEAN,
    type=one_of("bind", "volume", "tmpfs"),
)
# A hundredth is the Engine's own floor; much less would round to "no limit".
CPUS = {"type": "integer|number", "minimum": 0.01, "maximum": 10**6, "description": "a number"}
RESTART = one_of("no", "always", "on-failure", "unless-stopped")
CREATE = object_schema(
    "image",
    image=string_schema(
        f"{IMAGE}|(?:sha256:)?[0-9a-f]{{64}}", f"{IMAGE_RULE}, or an image's id", 512
    ),
    name=string_schema(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", f"at least two {NAME_RULE}", 255),
    cmd=array_of(STRING),
    entrypoint=array_of(STRING),
    env=array_of(string_schema("(?s:[^=]+=.*)", "NAME=value", MAX_BODY)),
    labels={"type": "object", "values": STRING},
    working_dir=string_schema("(?s:/.*)", "an absolute path"),
    user=string_schema(r"[^\s:]+(:[^\s:]+)?", "user, uid, user:group or uid:gid", 255),
    hostname=string_schema(
        r"[a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?", "letters, digits, '.' and '-'", 64
    ),
    ports=array_of(PORTS),
    volumes=array_of(VOLUMES),
    networks=array_of(string_schema(CONTAINER, f"a network's name: {NAME_RULE}", 255), unique=True),
    network_mode=string_schema(f"(container:)?{CONTAINER}", "bridge, container:ID or a name", 255),
    restart_policy=object_schema(
        "name", name=RESTART, max_retry_count=integer_schema(0, 2**31 - 1)
    ),
    resources=object_schema(
        "", cpus=CPUS, memory_mb=integer_schema(6, 2**40), cpu_shares=integer_schema(2, 262_144)
    ),
    pull=one_of("missing", "always", "never"),
)
PULL = object_schema("image", image=string_schema(IMAGE, IMAGE_RULE, 512), platform=PLATFORM)
STOP = object_schema("", timeout=integer_schema(0, MAX_STOP), signal=SIGNAL)
KILL = object_schema("", signal=SIGNAL)
FILE = object_schema(
    "path content",
    path=string_schema(longest=MAX_PATH),
    content={**STRING, "raw": True},
    encoding=one_of("utf-8", "base64"),
    permission=string_schema("0?[0-7]{1,4}", "an octal mode up to 7777, such as 0644"),
    uid=USER_ID,
    gid=USER_ID,
    atomic=BOOLEAN,
)
LIST_QUERY = object_schema("", all=BOOLEAN)
REMOVE_QUERY = object_schema("", force=BOOLEAN, v=BOOLEAN)
LOGS_QUERY = object_schema(
    "",
    follow=BOOLEAN,
    tail=string_schema("all|[0-9]{1,9}", "all or an integer of at least 0"),
    since=string_schema(longest=64),
    until=string_schema(longest=64),
    timestamps=BOOLEAN,
    stdout=BOOLEAN,
    stderr=BOOLEAN,
    format=one_of("text", "json"),
    last_event_id=string_schema(EVENT_ID, "an id that a log stream sent: 1700000000.000000000-1"),
)

# --------------------------------------------------------------------------------------------------
# Engine client: calls (JSON) and streams (bytes) over a Unix socket, TCP or TLS
# --------------------------------------------------------------------------------------------------

Pool = list[tuple[float, socket.socket]]  # idle connections, and since when each is
PASSED_THROUGH_STATUSES = (
    400,
    401,
    403,
    404,
    409,
    500,
    501,
)  # statuses the caller is given, too; any other is 502
BROKEN = "the Engine gave no proper answer"
UNTIL_END = 10**18  # the length of a body that only the end of the connection ends


class EngineResponse:
    """An answer of the Engine, its head read; its body comes whole or piece by piece.

    http.client's own forgives bad framing, waits anew for each byte, and cannot be polled.
    """

    def __init__(self, sock: socket.socket, interrupts: Interrupts, deadline: float) -> None:
        """Read the head. Raises BadMessage, OSError, and what Interrupts.wait_readable raises."""
        self._sock, self._interrupts, self._deadline = sock, interrupts, deadline
        self.pool: Pool | None = None  # where `close` leaves the connection, if anywhere
        self._read_at, self._rest = 0.0, b""
        self.status = 100
        while 100 <= self.status < 200 and self.status != 101:  # interim: RFC 9110 section 15.2
            while b"\r\n\r\n" not in self._rest:
                data = receive(sock, deadline, interrupts)
                if not data:
                    raise ConnectionResetError("it hung up")
                self._rest += data
                if len(self._rest) > MAX_FIELD_BLOCK + RECV_SIZE:
                    raise BadMessage(400, "its head is too large")
            head, end, self._rest = self._rest.partition(b"\r\n\r\n")
            line = STATUS_LINE.match(head + end)
            if not line:
                raise BadMessage(400, "it is not HTTP")
            self.status, self.fields = int(line[1]), parse_fields((head + end)[line.end() :])
        length = framing(self.fields, UNTIL_END)
        if self.status in (101, 204, 304):
            length = 0
        self.until_end = length == UNTIL_END
        self._body = Body(length)

    def read(self, deadline: float) -> bytes | None:
        """Return bytes of the body, b"" at its end, None if none came until deadline (monotonic).

        Raises EngineError (502) if the body is cut short, and what Interrupts.wait_readable raises.
        """
        while not self._body.done:
            if self.until_end:
                time.sleep(max(0, self._read_at + BURST_PAUSE - time.monotonic()))
            try:
                data = self._rest or receive(self._sock, deadline, self._interrupts)
                self._rest, self._read_at = b"", time.monotonic()
                if not (data or self.until_end):
                    raise BadMessage(400, "the body ended early")
                if (piece := self._body.feed(data)) or not data:
                    return piece
            except socket.timeout:
                return None
            except (OSError, BadMessage) as error:
                raise EngineError(502, f"{BROKEN}: {describe(error)}") from error
        return b""

    def read_all(self) -> bytes:
        """Return the whole body. Raises EngineError past MAX_RESPONSE or the deadline."""
        whole = bytearray()
        while piece := self.read(self._deadline):
            whole += piece
            # Invariant: no answer is read past a bound.
            if len(whole) > MAX_RESPONSE:
                raise EngineError(502, "the Engine's answer is too large")
        if piece is None:
            raise EngineError(504, "the Engine did not finish its answer in time")
        return bytes(whole)

    def close(self) -> None:
        """Leave the connection for another request if it can take one, else close it."""
        whole = self._body.done and not (self._rest or self._body.rest)
        kept = whole and "close" not in self.fields.get("connection", [])
        if kept and self.pool is not None and len(self.pool) < MAX_IDLE_CONNECTIONS:
            self.pool.append((time.monotonic(), self._sock))
        else:
            self._sock.close()


class Engine:
    """The Docker Engine at one address; remembers its API version and idle connections."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, version: str = "") -> None:
        self.address = address._replace(port=address.port or (2376 if tls else 2375))
        self._tls = tls
        self._pinned = version
        self._version, self._asked = "", -math.inf  # the one in use, and since when
        self.is_podman = False
        self._idle: Pool = []
        self._health_lock = threading.Lock()
        self._health = (-HEALTH_CACHE, False)

    def call(self, method: str, path: str, *args: Any, **options: Any) -> bytes:
        """Return the body of the Engine's answer, b"" if it has none; as `open` otherwise."""
        with contextlib.closing(self.open(method, path, *args, **options)) as answer:
            return answer.read_all()

    def json(self, method: str, path: str, *args: Any, **options: Any) -> Json:
        """Return the JSON object the Engine answers with; as `open` otherwise."""
        answer: Json = decode_response(self.call(method, path, *args, **options))
        return answer

    def open(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        seconds: float = CALL_TIMEOUT,
        **options: Any,
    ) -> EngineResponse:
        """Return an answer whose body is still to be read. Raises EngineError for a refusal.

        path: after the version, made of constants and quoted parts. seconds: for all of it, or
        until a stream begins. options: as `_ask` has them.
        An Engine that was upgraded refuses a version with 400 before it does anything, so that
        even what changes something can be tried again with the version that it speaks by now.
        """
        if body is not None:
            options.update(body=encode_json(body), headers={"Content-Type": "application/json"})
        target = path + ("?" + urlencode(query) if query else "")
        deadline = time.monotonic() + seconds
        version = self.version(deadline)
        for last in (False, True):
            answer = self._ask(method, f"/v{version}{target}", deadline, **options)
            if answer.status in (200, 201, 204, 304):
                break
            with contextlib.closing(answer):
                error = engine_error(answer.status, answer.read_all())
            used = version
            if not last and error.status == 400:
                version = self.version(deadline, again=True)
            if used == version:
                raise error
        return answer

    def version(self, deadline: float, again: bool = False) -> str:
        """Return the API version in use, such as "1.41", asked for if it may be another by now."""
        is_old = again or time.monotonic() - self._asked > VERSION_KEPT
        if is_old and not self._pinned:
            self._negotiate(deadline)
        return self._pinned or self._version

    def healthy(self) -> bool:
        """Return whether the Engine answers; it is asked at most once in HEALTH_CACHE seconds."""
        with self._health_lock:
            asked, healthy = self._health
            if time.monotonic() - asked >= HEALTH_CACHE:
                healthy = False
                with contextlib.suppress(EngineError):
                    self._negotiate(time.monotonic() + PING_TIMEOUT)
                    healthy = True
                self._health = (time.monotonic(), healthy)
            return healthy

    def close_idle(self, before: float = math.inf) -> None:
        """Close the connections that have been idle since before a time (monotonic)."""
        with contextlib.suppress(IndexError):  # another thread took the last one
            while self._idle[0][0] < before:
                self._idle.pop(0)[1].close()

    def _negotiate(self, deadline: float) -> None:
        """Find the API version both sides speak (Engine API, "Ping"). Raises EngineError."""
        with contextlib.closing(self._ask("GET", "/_ping", deadline)) as answer:
            answer.read_all()
        offered = re.fullmatch(r"1\.([0-9]{1,3})", answer.fields.get("api-version", [""])[0])
        if answer.status != 200 or not offered:
            raise EngineError(502, f"{self.address} does not answer as a Docker Engine does")
        self.is_podman = "libpod-api-version" in answer.fields
        self._version = f"1.{min(int(offered[1]), NEWEST_API)}"
        self._asked = time.monotonic()

    def _ask(
        self,
        method: str,
        target: str,
        deadline: float,
        interrupts: Interrupts = NEVER,
        http10: bool = False,
        again: bool = False,
        **content: Any,
    ) -> EngineResponse:
        """Return an answer whose head was read before deadline.

        http10: as HTTP/1.0, which the Engine does not cut in chunks: a fifth quicker to read, but
        whether it is whole has to be found out. content: body and headers, none for a GET. Raises
        EngineError, and what Interrupts.wait_readable raises.
        """
        # Invariant: what changes something is never sent twice. Only a GET goes out on a connection
        # that was idle, and once more on a new one if the Engine had closed that.
        reuse = method == "GET" and not http10
        sock, was_idle = self._connection(reuse and not again)
        with contextlib.ExitStack() as on_error:
            on_error.callback(sock.close)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                if method == "GET":
                    # In a fifth of the time that http.client takes to put these three lines.
                    request = f"GET {target} HTTP/1.{0 if http10 else 1}\r\nHost: docker\r\n\r\n"
                    sock.sendall(request.encode())
                else:
                    connection = http.client.HTTPConnection("docker")
                    connection.sock = sock
                    connection.request(method, target, **content)
                answer = EngineResponse(sock, interrupts, deadline)
                answer.pool = self._idle if reuse else None
                on_error.pop_all()
                return answer
            except socket.timeout as error:
                raise EngineError(504, "the Engine did not answer in time") from error
            except (OSError, BadMessage) as error:
                self._asked = -math.inf  # perhaps it was restarted as another version
                if not (was_idle and isinstance(error, ConnectionError)):
                    raise EngineError(502, f"{BROKEN}: {describe(error)}") from error
        return self._ask(method, target, deadline, interrupts, again=True)

    def _connection(self, reuse: bool) -> tuple[socket.socket, bool]:
        """Return a connection, and whether it is one that was idle. Raises EngineError (503)."""
        while reuse and self._idle:
            with contextlib.suppress(IndexError):  # another thread took the last one
                _, sock = self._idle.pop()
                if not NEVER.wait_readable(
                    sock, 0
                ):  # the Engine has neither closed it nor said a word
                    return sock, True
                sock.close()
        try:
            return connect(self.address, self._tls), False
        except (OSError, ValueError) as error:
            self._asked = -math.inf  # what comes back may be another version
            message = f"the Engine at {self.address} is not reachable: {describe(error)}"
            raise EngineError(503, message) from error


def engine_error(status: int, body: bytes) -> EngineError:
    """Return the error for a refusal of the Engine, whose body is {"message": ...}."""
    try:
        message = require(decode_response(body), "message", str)
    except EngineError:
        return EngineError(502, f"the Engine answered {status} without saying why")
    return EngineError(status if status in PASSED_THROUGH_STATUSES else 502, message)


def decode_response(body: bytes, kind: type = dict) -> Any:
    """Return the JSON object (or list) in an answer of the Engine. Raises EngineError (502)."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise EngineError(502, "the Engine's answer is not JSON") from error
    if not isinstance(answer, kind):
        raise EngineError(502, "the Engine's answer is not the JSON that was asked for")
    return answer


def require(answer: Json, name: str, kind: type) -> Any:
    """Return one member of an Engine's answer. Raises EngineError (502)."""
    if not isinstance(answer.get(name), kind):
        raise EngineError(502, f"the Engine's answer has no {name}")
    return answer[name]


def container_id(answer: Json) -> str:
    """Return the id in an Engine's answer about a container. Raises EngineError (502)."""
    if not re.fullmatch(CONTAINER, require(answer, "Id", str)):
        raise EngineError(502, "the Engine's answer has no Id")
    return str(answer["Id"])


# --------------------------------------------------------------------------------------------------
# Containers and images: our requests to the Engine's, its answers to ours
# --------------------------------------------------------------------------------------------------

# Our fields and the Engine's: a create's, those of its resources with our unit, a list's.
CREATE_FIELDS = {"image": "Image", "cmd": "Cmd", "entrypoint": "Entrypoint", "env": "Env"}
CREATE_FIELDS.update(labels="Labels", working_dir="WorkingDir", user="User", hostname="Hostname")
RESOURCE_FIELDS = {
    "cpus": ("NanoCpus", 1e9),
    "memory_mb": ("Memory", 2**20),
    "cpu_shares": ("CpuShares", 1),
}
LIST_FIELDS = {"id": "Id", "names": "Names", "image": "Image", "image_id": "ImageID"}
LIST_FIELDS.update(command="Command", created="Created", state="State", status="Status")
LIST_FIELDS.update(ports="Ports", labels="Labels")
PORT_FIELDS = {
    "ip": "IP",
    "private_port": "PrivatePort",
    "public_port": "PublicPort",
    "type": "Type",
}


def container_path(name: str, action: str = "") -> str:
    """Return the Engine's path for a container. Raises ApiError (400) for what is no id or name."""
    # Invariant: only what matches reaches an Engine URL, and it is quoted there all the same.
    if not re.fullmatch(CONTAINER, name):
        raise ApiError(400, f"a container's id or name is {NAME_RULE}")
    return f"/containers/{quote(name, safe='')}" + (f"/{action}" if action else "")


def engine_ports(ports: list[Json]) -> dict[str, list[dict[str, str]]]:
    """Return the Engine's PortBindings: {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}."""
    bindings: dict[str, list[dict[str, str]]] = {}
    for index, port in enumerate(ports):
        host_ip = port.get("host_ip", "")
        if "host_ip" in port and ("%" in host_ip or parse_ip(host_ip) is None):
            refuse(f"ports[{index}].host_ip", "must be an IPv4 or IPv6 address")
        exposed = f"{int(port['container_port'])}/{port.get('protocol', 'tcp')}"
        published = str(port.get("host_port", "")).lstrip("0")
        bindings.setdefault(exposed, []).append({"HostIp": host_ip, "HostPort": published})
    return bindings


def engine_mount(volume: Json, path: str) -> Json:
    """Return the Engine's Mount. Mounts, not Binds: no colon in a path can become an option."""
    source = volume.get("source", "")
    kind = volume.get("type") or ("bind" if source.startswith("/") else "volume")
    if kind == "tmpfs" and source:
        refuse(f"{path}.source", "must be absent for a tmpfs")
    if kind == "bind" and not source.startswith("/"):
        refuse(f"{path}.source", "must be an absolute path for a bind")
    if kind == "volume" and not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", source):
        refuse(f"{path}.source", f"must be a volume's name: at least two {NAME_RULE}")
    read_only = volume.get("read_only", False)
    return {"Type": kind, "Source": source, "Target": volume["target"], "ReadOnly": read_only}


def engine_networks(body: Json) -> tuple[str, list[str]]:
    """Return the network mode and the networks to join, the first of them at create."""
    names, mode = body.get("networks", []), body.get("network_mode", "")
    if not names or mode in ("bridge", "default"):
        return mode, names
    if mode in ("host", "none") or ":" in mode:
        refuse("networks", f"cannot be joined in network_mode {mode}")
    mode = mode or names[0]
    return mode, [mode, *(name for name in names if name != mode)]


def engine_container(body: Json) -> tuple[Json, list[str]]:
    """Return the body of "Create a container" and the networks to connect before the start.

    Every value comes from a validated field. Raises ApiError (400) for fields that contradict.
    """
    ports = engine_ports(body.get("ports", []))
    mode, networks = engine_networks(body)
    mounts = [engine_mount(v, f"volumes[{i}]") for i, v in enumerate(body.get("volumes", []))]
    host: Json = {"PortBindings": ports, "Mounts": mounts, "NetworkMode": mode}
    if policy := body.get("restart_policy"):
        if "max_retry_count" in policy and policy["name"] != "on-failure":
            refuse("restart_policy.max_retry_count", "goes only with on-failure")
        retries = policy.get("max_retry_count", 0)
        host["RestartPolicy"] = {"Name": policy["name"], "MaximumRetryCount": retries}
    for ours, amount in body.get("resources", {}).items():
        theirs, unit = RESOURCE_FIELDS[ours]
        host[theirs] = round(amount * unit)
    container = {theirs: body[ours] for ours, theirs in CREATE_FIELDS.items() if ours in body}
    container.update(ExposedPorts={port: {} for port in ports}, HostConfig=host)
    if networks:
        container["NetworkingConfig"] = {"EndpointsConfig": {networks[0]: {}}}
    return container, networks[1:]


def create_container(engine: Engine, body: Json, auth: str, interrupts: Interrupts) -> Json:
    """Create and start a container; return {"Id", "Warnings"}. Nothing is left if that fails."""
    container, networks = engine_container(body)
    query = {"name": body["name"]} if "name" in body else {}
    create = ("POST", "/containers/create", query, container, START_TIMEOUT)
    pull = body.get("pull", "missing")
    if pull == "always":
        pull_image(engine, body, auth, interrupts)
    try:
        created = engine.json(*create)
    except EngineError as error:
        if error.status != 404 or pull != "missing" or has_image(engine, body["image"]):
            raise
        pull_image(engine, body, auth, interrupts)
        created = engine.json(*create)
    path = container_path(container_id(created))
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
    engine: Engine, body: Json, auth: str, interrupts: Interrupts
) -> Iterator[Json | None]:
    """Yield the words of a pull as they come, None after PING_INTERVAL of silence.

    Raises EngineError for a pull that fails; closing the generator ends the pull.
    """
    name, tag = split_image(body["image"])
    if re.fullmatch("(sha256:)?[0-9a-f]{64}", body["image"]):
        raise EngineError(404, f"no such image: {body['image']}; an id cannot be pulled")
    query = {"fromImage": name, "tag": tag, **{k: body[k] for k in ("platform",) if k in body}}
    create = ("POST", "/images/create", query, None, PULL_SILENCE)
    headers = {"X-Registry-Auth": auth} if auth else {}
    try:
        answer = engine.open(*create, headers=headers, interrupts=interrupts)
    except EngineError as error:
        raise pull_error(error.status, error.message) from error
    rest, heard = b"", time.monotonic()
    with contextlib.closing(answer):
        while (data := answer.read(time.monotonic() + PING_INTERVAL)) != b"":
            heard = time.monotonic() if data else heard
            if time.monotonic() - heard > PULL_SILENCE:
                raise EngineError(504, f"the Engine said nothing for {PULL_SILENCE:.0f} s")
            if data is None:
                yield None
                continue
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE:
                raise EngineError(502, "the Engine's answer has too long a line")
            yield from map(pull_message, filter(bytes.strip, lines))
    if rest.strip():
        yield pull_message(rest)


def pull_message(line: bytes) -> Json:
    """Return one object of a pull's stream. Raises EngineError if it tells of one."""
    word: Json = decode_response(line)
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
        ("does not exist|does not match the specified platform", 404),
        ("https?://|dial tcp|lookup |x509|timeout|EOF", 502),
    ):
        if status in (500, 502) and re.search(words, message, re.IGNORECASE):
            return EngineError(meaning, message)
    return EngineError(status, message)


def pull_image(engine: Engine, body: Json, auth: str, interrupts: Interrupts) -> Json:
    """Pull an image; return {"image", "digest", "status"}. Raises EngineError."""
    status = digest = ""
    for word in filter(None, pull_progress(engine, body, auth, interrupts)):
        status = word.get("status") or status
        digest = digest_in(word) or digest
    return {**pull_result(engine, body["image"], digest), "status": status}


def digest_in(word: Json) -> str:
    """Return the digest that one object of a pull's stream tells of, "" for none."""
    match = re.fullmatch("Digest: (sha256:[0-9a-f]{64})", str(word.get("status")))
    return match[1] if match else ""


def pull_result(engine: Engine, image: str, digest: str) -> Json:
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
    rows = []
    try:
        for container in decode_response(found, list):
            row = {ours: container.get(theirs) for ours, theirs in LIST_FIELDS.items()}
            ports = row["ports"] or []
            row["ports"] = [{o: port.get(t) for o, t in PORT_FIELDS.items()} for port in ports]
            row.update(id=container["Id"], names=row["names"] or [], labels=row["labels"] or {})
            rows.append(row)
    except (AttributeError, KeyError, TypeError) as error:
        raise EngineError(502, "the Engine's answer is no list of containers") from error
    return encode_json({"containers": rows}) + b"\n"


# Those who ask for these ask over and over, and the Engine's answer is mostly the same.
container_list = functools.lru_cache(maxsize=4)(shape_list)
check_object = functools.lru_cache(maxsize=8)(decode_response)

# --------------------------------------------------------------------------------------------------
# Logs: from the Engine's frames to lines, to server-sent events and JSON
# --------------------------------------------------------------------------------------------------

# A log loses nothing but its beginning. So a line that a client has is either there, and what
# follows it is new, or it is gone, and all that is left came after it. Which of the two holds is
# found out by a read that ends, by what the line is: its stamp, and its number among the lines of
# that stamp, of both streams. Invariant: nothing compares the order of stamps; clocks step back.

Entry = tuple[int, bytes]  # stream type, "STAMP text\n" as the Engine logged it; no \n: goes on
# Stamp in Docker's form, number among the lines of that stamp, stream type, text. The number is 0
# where it is not known.
Line = tuple[bytes, int, int, bytes]
Point = Optional[tuple[bytes, int]]  # a line's stamp and number; None: before the oldest line
Render = Callable[[list[Line]], bytes]
Ending = tuple[str, Json]  # the last event's name and data
Stream = Generator[bytes, None, None]  # of a response's body

STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
FRAME_HEADER = struct.Struct(">BxxxL")
NEWLINE, RETURN = b"\n\r"
STAMP_SIZE = len("2026-02-21T10:00:00.000000000Z")


class LogDamaged(EngineError):
    """The Engine reports that it cannot read on in a log: a frame of type 3."""


class Demultiplexer:
    """Takes frames out of bytes: {type, 0, 0, 0, size as big-endian uint32}, then the payload.

    Docker Engine API, "Attach to a container", section "Stream format".
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the complete entries. Raises EngineError, once those before it were returned."""
        data, position = self._rest + data, 0
        entries: list[Entry] = []
        last = len(data) - FRAME_HEADER.size
        while position <= last:
            kind, size = FRAME_HEADER.unpack_from(data, position)
            start = position + FRAME_HEADER.size
            payload = data[start : start + size]
            if kind > 2 or size > MAX_FRAME:
                if entries:
                    break  # the next call finds the frame again, first of all
                if kind == 3:
                    words = payload.decode(errors="replace").strip()
                    raise LogDamaged(502, f"the Engine failed to read the log: {words}")
                raise EngineError(502, "the Engine's log is not made of frames")
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


class TtyDemultiplexer(Demultiplexer):
    """Takes entries out of a terminal's log, which has no frames but each entry's stamp."""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the complete entries. Raises EngineError for one without a stamp."""
        data, position, entries = self._rest + data, 0, []
        stamp_at = re.compile(LOG_STAMP).match
        while position < len(data):
            end = data.find(b"\n", position) + 1
            stamp = stamp_at(data, position)
            if not stamp:
                if not end and len(data) - position < 64:
                    break
                raise EngineError(502, "the Engine's log has no timestamps")
            # An entry of a long line ends where the very same stamp is put in again: after
            # ENTRY_SIZE bytes of the container's, each of which the Engine may have made U+FFFD.
            # Invariant: only a stamp to the nanosecond, which no container can know beforehand.
            cut, again = stamp.end() + ENTRY_SIZE, -1
            latest = cut + 2 * ENTRY_SIZE + len(stamp[0])
            if len(stamp[0]) == STAMP_SIZE + 1:
                again = data.find(stamp[0], cut, min(end or latest, latest))
            if again >= 0:
                end = again
            elif not end:
                if len(data) - position <= MAX_LINE:
                    break
                data, end = data + stamp[0], len(data)  # the line goes on as another entry
            entries.append((1, data[position:end]))
            position = end
        self._rest = data[position:]
        return entries

    def end(self) -> list[Entry]:
        """Return what is left at the end of the stream: a line with no newline."""
        return [(1, self._rest)] if self._rest else []


class LineAssembler:
    """Joins entries to lines, stdout and stderr apart, and numbers the lines of each stamp.

    A stamp that the last NUMBERED lines did not have counts anew: so wherever in a log reading
    begins, a line has the same number. unknown: of how many lines at the beginning the numbers are
    not known, as there may be others of their stamps before; they are numbered 0.
    """

    def __init__(self, unknown: int = 0, *, is_podman: bool = False) -> None:
        self.unfinished: dict[int, tuple[bytes, bytearray, bool]] = {}
        self.seen: dict[bytes, int] = {}  # stamp: how many lines there were when it came last
        self._numbers: dict[bytes, int] = {}  # stamp: the number it had then, if not 1
        self._count = 0  # lines so far
        self._unknown, self._is_podman = unknown, is_podman
        self._second = b""  # of the stamp before: its first 20 bytes

    def feed(self, entries: list[Entry]) -> list[Line]:
        """Return the complete lines. Raises EngineError for an entry without a stamp."""
        if len(self.seen) > NUMBERED + NUMBERED // 2:
            oldest = self._count - NUMBERED
            self.seen = {stamp: at for stamp, at in self.seen.items() if at >= oldest}
            self._numbers = {stamp: n for stamp, n in self._numbers.items() if stamp in self.seen}
        lines: list[Line] = []
        unfinished, second = self.unfinished, self._second
        for kind, payload in entries:
            # Invariant: a stamp is matched in full before any byte of it is used.
            if payload[:20] != second or payload[29:31] != b"Z " or not payload[20:29].isdigit():
                payload = restamp(payload)
                self._second = second = payload[:20]
            stamp = payload[:STAMP_SIZE]
            if payload[-1] != NEWLINE or kind in unfinished or len(payload) > MAX_LINE:
                lines += self._join(kind, stamp, payload[STAMP_SIZE + 1 :])
                continue
            text = payload[STAMP_SIZE + 1 : -2 if payload[-2] == RETURN else -1]
            lines.append((stamp, self._number(stamp), kind, text))
        return lines

    def end(self) -> list[Line]:
        """Return the lines that the end of the log left without a newline."""
        held = [(kind, stamp) for kind, (stamp, text, _) in self.unfinished.items() if text]
        return [line for kind, stamp in held for line in self._join(kind, stamp, b"\n")]

    def _number(self, stamp: bytes) -> int:
        """Count a line of this stamp, and return its number."""
        self._count = count = self._count + 1
        at = self.seen.get(stamp)
        self.seen[stamp] = count
        if at is None or count - at > NUMBERED:
            number = 1 if count > self._unknown else 0
            self._numbers.pop(stamp, None)
        else:
            number = self._numbers.get(stamp, 1)
            number += number > 0
        if number != 1:
            self._numbers[stamp] = number
        return number

    def _join(self, kind: int, stamp: bytes, text: bytes) -> list[Line]:
        """Add an entry to its line; return the line if complete, and what exceeds MAX_LINE."""
        held_stamp, held, goes_on = self.unfinished.pop(kind, (stamp, bytearray(), True))
        lines = []
        # Docker's entries of one line have one stamp, or are full, as the log driver journald's;
        # else the container ended there, and ran again. podman stamps each entry.
        if stamp != held_stamp and not (goes_on or self._is_podman):
            lines.append((held_stamp, self._number(held_stamp), kind, bytes(held)))
            held_stamp, held = stamp, bytearray()
        held += text
        if whole := held.endswith(b"\n"):
            del held[-2 if held.endswith(b"\r\n") else -1 :]
        # Invariant: no line is held past MAX_LINE; two bytes more may be its CR LF.
        while len(held) > (MAX_LINE if whole else MAX_LINE + 2):
            size = MAX_LINE
            while size > MAX_LINE - 4 and held[size] & 0xC0 == 0x80:
                size -= 1  # not in the middle of a UTF-8 character
            lines.append((held_stamp, self._number(held_stamp), kind, bytes(held[:size])))
            del held[:size]
        if whole:
            lines.append((held_stamp, self._number(held_stamp), kind, bytes(held)))
        else:
            self.unfinished[kind] = held_stamp, held, len(text) >= ENTRY_SIZE
        return lines


def restamp(payload: bytes) -> bytes:
    """Return an entry with its stamp in Docker's form: podman's has a zone, and fewer digits.

    Raises EngineError for one without a stamp.
    """
    stamp = re.match(LOG_STAMP, payload)
    if not stamp:
        raise EngineError(502, "the Engine's log has no timestamps")
    return docker_stamp(stamp[0][:-1]) + payload[stamp.end() - 1 :]


@functools.lru_cache(maxsize=64)
def docker_stamp(stamp: bytes) -> bytes:
    return stamp_from(stamp_time(stamp))


def stamp_from(nanoseconds: int) -> bytes:
    """Return Unix nanoseconds as the Engine stamps log entries: STAMP_SIZE bytes."""
    second, fraction = divmod(nanoseconds, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{whole}.{fraction:09d}Z".encode()


def stamp_time(stamp: bytes) -> int:
    """Return a stamp, which is RFC 3339, as Unix nanoseconds. Raises EngineError."""
    with contextlib.suppress(ValueError):
        if match := re.fullmatch(TIMESTAMP, stamp.decode()):
            second, fraction, zone = match.groups("")
            whole = datetime.datetime.fromisoformat((second + zone).upper().replace("Z", "+00:00"))
            return int(whole.timestamp()) * 10**9 + int(fraction.ljust(9, "0"))
    raise EngineError(502, "the Engine's log has no timestamps")


@functools.lru_cache(maxsize=64)
def unix_second(second: bytes) -> bytes:
    """Return the Unix time of a stamp's first 20 bytes: b"1700000000.". Raises EngineError."""
    return b"%d." % (stamp_time(second[:-1] + b"Z") // 10**9)


def parse_moment(name: str, value: str) -> int:
    """Return since or until as Unix nanoseconds. Raises ApiError (400).

    Unix seconds, RFC 3339, or a Go duration meaning that long ago; never a float, too coarse.
    """
    if match := re.fullmatch(UNIX_TIME, value):
        return int(match[1] + (match[2] or "").ljust(9, "0"))
    if re.fullmatch(f"(?:{DURATION})+", value):
        parts = re.findall(DURATION, value)
        ago = sum(int(a + b.ljust(15, "0")) * UNITS[unit] // 10**15 for a, b, unit in parts)
        return time.time_ns() - ago
    with contextlib.suppress(EngineError):
        return stamp_time(value.encode())
    refuse(name, "must be Unix seconds, an RFC 3339 time such as 2026-02-21T10:00:00Z, or 10m")


def moment_asked(name: str, value: str) -> int:
    """Return since or until as Unix nanoseconds; 0 is no limit, as in Docker's own API."""
    moment = parse_moment(name, value)
    return moment if value.strip("0.") else 0


class LogSource(NamedTuple):
    """One container's log, as a request asked for it."""

    engine: Engine
    container: str  # the full id: a name may pass to another container
    tty: bool
    kinds: frozenset[int]  # the types of the streams asked for
    since: int  # Unix nanoseconds; 0: no limit
    until: int
    interrupts: Interrupts

    def open(self, tail: int | None, **options: Any) -> EngineResponse:
        """Return the Engine's response for the last entries (None: all) of both streams.

        As HTTP/1.0: it is quicker, but a response that was cut short looks complete.
        """
        query = {"stdout": 1, "stderr": 1, "timestamps": 1, "tail": "all" if tail is None else tail}
        query["follow"] = int(options.pop("follow", False))
        for name in ("since", "until"):
            if moment := options.pop(name, getattr(self, name)):
                query[name] = "{}.{:09d}".format(*divmod(moment, 10**9))
        path = container_path(self.container, "logs")
        options = {"http10": True, "interrupts": self.interrupts, **options}
        return self.engine.open("GET", path, query, **options)

    def check(self) -> None:
        """Raise EngineError if the Engine refuses at once: with a status, before the stream begins.

        The stream does not wait for an Engine that takes longer.
        """
        try:
            self.open(0, seconds=HEAD_WAIT).close()
        except EngineError as error:
            if error.status != 504:
                raise

    def inspect(self) -> Json | None:
        """Return the container's inspect JSON, None if it was removed. Raises EngineError."""
        try:
            return self.engine.json("GET", container_path(self.container, "json"))
        except EngineError as error:
            if error.status != 404:
                raise
            return None


class LogReading:
    """The lines of both streams in one response of the Engine, those after the line `point`.

    unknown: of how many lines at the beginning the number is not known, as it is not the log's; the
    first line of each stream may lack its beginning then. With a point, reading ends before such a
    doubtful line; else it begins anew behind it.
    """

    def __init__(
        self,
        source: LogSource,
        response: EngineResponse,
        unknown: int | None,
        point: Point = None,
        whole: Iterable[int] = (),  # streams that had no unfinished line at the point
        mark: Entry | None = None,
    ) -> None:
        self.entries = 0  # that came
        self.done = self.doubtful = False
        self.met = point is None  # whether the point came
        self.rest: list[Line] = []  # what the end left without a newline
        self._response, self._point, self._at_point = response, point, whole
        self.first: Optional[Entry] = None
        self.final: Optional[Entry] = None
        self.marked = 0  # entries from `mark` on; from the first on without one
        self._mark = mark
        self._begun = set(
            STREAMS if unknown is None else ()
        )  # streams of which a line began in here
        self._demultiplexer = TtyDemultiplexer() if source.tty else Demultiplexer()
        self._assembler = LineAssembler(unknown or 0, is_podman=source.engine.is_podman)

    def __iter__(self) -> Iterator[list[Line]]:
        """Yield lines, [] at times, until the response ends. Raises EngineError."""
        with contextlib.closing(self._response):
            while not (self.done or (self._point and self.doubtful)):
                lines = self.read(time.monotonic() + CALL_TIMEOUT)
                if lines is None:
                    raise EngineError(504, "the Engine did not finish the log in time")
                yield lines

    def read(self, deadline: float) -> list[Line] | None:
        """Return the lines that came, None if none came until deadline. Raises EngineError."""
        data = self._response.read(deadline)
        if data is None:
            return None
        self.done = not data
        entries = self._demultiplexer.feed(data) if data else self._demultiplexer.end()
        self.entries += len(entries)
        if entries:
            self.first, self.final = self.first or entries[0], entries[-1]
        if self.marked or not self._mark:
            self.marked += len(entries)
        elif self._mark in entries:
            self.marked = len(entries) - entries.index(self._mark)
        lines = self._known(self._after(self._assembler.feed(entries)))
        if self.done:
            self.rest = self._known(self._after(self._assembler.end()))
        return lines

    def exhaust(self) -> LogReading:
        for _ in self:
            continue
        return self

    def unfinished(self) -> Iterator[list[Line]]:
        yield self.rest

    def whole(self) -> set[int]:
        """Return the streams that have no unfinished line here, for certain."""
        return set() if self.doubtful else self._begun - self._assembler.unfinished.keys()

    def _after(self, lines: list[Line]) -> list[Line]:
        """Return those of the lines that come after the point."""
        if self.met or not self._point:
            return lines
        points = [line[:2] for line in lines] if self._point[0] in self._assembler.seen else []
        self.met = self._point in points
        index = points.index(self._point) + 1 if self.met else len(lines)
        self._begun.update([line[2] for line in lines[:index]], self._at_point if self.met else ())
        return lines[index:]

    def _known(self, lines: list[Line]) -> list[Line]:
        """Return the lines before the first doubtful one, without a point those after the last."""
        start = 0
        for index, (_, number, kind, _) in enumerate(lines if len(self._begun) < 3 else ()):
            if not number or kind not in self._begun:
                self.doubtful, start = True, index + 1
                if self._point:
                    return lines[:index]
                self._begun.add(kind)
        return lines[start:]


class LogTail(NamedTuple):
    """The last lines of a reading, and where they leave a cursor; see LogCursor."""

    found: int  # lines in the reading that were asked for
    lines: Optional[list[Line]]  # None: too large to be kept; the cursor stands before them
    last: Point
    whole: set[int]
    skip: int
    reach: int


class LogCursor:
    """A place in a log, behind the line `last`; it moves on as lines are handed out."""

    def __init__(self, source: LogSource, last: Point) -> None:
        self.last = last
        self.due = time.monotonic() + PING_INTERVAL  # until when to wait for lines
        self.ending: Ending = ("end", {})
        self._source = source
        self._whole: set[int] = set()  # streams that have no unfinished line here
        self._skip, self._limit = 0, sys.maxsize  # lines to leave out, and then to hand out
        self._reach = LOOK  # among how many of the last entries to look for `last` first
        self._is_short = False  # whether there were not as many
        self._dropped = False  # whether the Engine ended the response that was followed

    def read(self, wanted: int | None) -> Iterator[list[Line]]:
        """Yield the lines that the log has, the last `wanted` of them. Raises EngineError."""
        if wanted is not None and not self.last:
            # The numbers matter only where `last` has to be found again, since lines are too many.
            for unknown in (0, NUMBERED) if wanted < LOOK else (NUMBERED,):
                lines = self._tail(wanted, unknown=unknown, unfinished=True)
                if lines is not None:
                    yield lines
                    return
            self._limit = wanted
        for lines in self._stored(unfinished=True):
            yield lines
            if not self._limit:
                return

    def follow(self, found: Json, wanted: int | None) -> Iterator[list[Line]]:
        """Yield lines until the container ends, [] at times; set `ending`. Raises EngineError.

        found: the container. wanted: how many of its last lines to begin with; None: all.
        """
        started = require(found, "State", dict).get("StartedAt")
        ending, lines = log_ending(found, started), None
        if wanted is not None and not self.last:
            lines = self._tail(wanted, unknown=NUMBERED, unfinished=bool(ending))
            yield lines or []
        elif not (ending or self.last):
            yield from self._find()
        while not (ending or self._is_over()):
            lines = None
            yield from self._find(follow=True)
            ending = log_ending(self._source.inspect(), started)
            if self._dropped and not (ending or self._is_over()):
                raise EngineError(502, "the Engine ended the log of a running container; reconnect")
        self.ending = ending or ("end", {"reason": "until", "exit_code": None})
        if lines is not None:
            return
        try:
            yield from self._stored(unfinished=self.ending[0] == "end")
        except EngineError as error:
            if error.status not in (404, 409):  # the container is removed, or being removed
                raise

    def _stored(self, *, unfinished: bool) -> Iterator[list[Line]]:
        """Yield the lines after `last` that the log has by now, [] at times. Raises EngineError.

        unfinished: also what its end left without a newline.
        """
        http10 = True
        while True:
            before = self.last
            reading = yield from self._find(http10=http10)
            # What was cut off, or written since, is left. In HTTP/1.1 a cut is an error; and what
            # the Engine did not give twice, because its log is damaged, it will not give.
            if before == self.last or not http10 or reading.final == self._final():
                yield self._hand_out(reading, reading.rest if unfinished else [])
                return
            http10 = False

    def _find(
        self, *, follow: bool = False, http10: bool = True
    ) -> Generator[list[Line], None, LogReading]:
        """Yield the lines after `last` from a reading that has it; return the reading.

        follow: also the lines that come after those, until the Engine ends its response.
        """
        damage, self._dropped = None, False
        for tail in self._tails():
            unknown = NUMBERED if tail and tail >= LOOK else None
            with contextlib.ExitStack() as stack:
                # The follower comes first: what the reading has, or will have, is then in it, too.
                follower = self._open_follower(tail) if follow else None
                if follower:
                    stack.callback(follower.close)
                reading = self._reading(self._open(tail, http10=http10), unknown)
                try:
                    for lines in reading:
                        yield self._hand_out(reading, lines)
                except LogDamaged as error:
                    damage = error
                    continue
                self._is_short = reading.done and reading.entries < (tail or LOOK)
                if reading.doubtful or not reading.met:
                    continue
                if follower:
                    yield from self._arriving(self._reading(follower, unknown and 1))
                return reading
        if damage:
            raise damage
        self.last = None  # it is gone, so all that is left came after it
        return (yield from self._find(follow=follow, http10=http10))

    def _tails(self) -> Iterator[int | None]:
        """Yield among how many of the last entries to look for `last`; None: all."""
        if self.last and not self._is_short:
            yield self._reach
            if not self._is_short:
                yield 4 * self._reach
        yield None
        if not self.last:
            return
        # Damage hides all behind it from a reading that begins before it.
        low, high = 0, LOOK
        while high - low > 1:
            middle = (low + high) // 2
            reading = LogReading(self._source, self._open(middle), None)
            with contextlib.suppress(LogDamaged):
                reading.exhaust()
            low, high = (middle, high) if reading.entries >= middle else (low, middle)
        if high < LOOK:
            yield low

    def _arriving(self, follower: LogReading) -> Iterator[list[Line]]:
        """Yield the lines as they come, [] when none did for a while. Raises EngineError."""
        while not (follower.done or follower.doubtful or self._is_over()):
            lines = follower.read(self._deadline())
            if lines is None and not follower.met:
                return
            yield self._hand_out(follower, lines or [])
        self._dropped = follower.done

    def _hand_out(self, reading: LogReading, lines: list[Line]) -> list[Line]:
        """Move behind the lines; return those of them that were asked for."""
        if lines:
            self.last, self._whole, self._reach = lines[-1][:2], reading.whole(), LOOK
        if len(self._source.kinds) < len(STREAMS):
            lines = [line for line in lines if line[2] in self._source.kinds]
        skip, self._skip = self._skip, max(0, self._skip - len(lines))
        lines = lines[skip : skip + self._limit]
        self._limit -= len(lines)
        return lines

    def _open(self, tail: int | None, **options: Any) -> EngineResponse:
        """Ask for the log; after a line that was found, nothing but its order counts."""
        return self._source.open(tail, since=0 if self.last else self._source.since, **options)

    def _open_follower(self, tail: int | None) -> EngineResponse | None:
        """Return a response that goes on, None if it has not begun after PING_INTERVAL.

        podman before 5 sends no head until there is a line. Raises EngineError.
        """
        try:
            return self._open(tail, follow=True, seconds=PING_INTERVAL)
        except EngineError as error:
            if error.status != 504:
                raise
            return None

    def _reading(self, response: EngineResponse, unknown: int | None) -> LogReading:
        """Return the lines of a response that come after `last`."""
        return LogReading(self._source, response, unknown, self.last, self._whole)

    def _final(self) -> Entry | None:
        """Return the log's last entry, None if there is none."""
        response = self._source.open(1, http10=False)
        return LogReading(self._source, response, None).exhaust().final

    def _is_over(self) -> bool:
        return bool(self._source.until) and time.time_ns() >= self._source.until

    def _deadline(self) -> float:
        """Return until when to wait for lines (monotonic): until a ping is due, or `until`."""
        if not self._source.until:
            return self.due
        return min(self.due, time.monotonic() + (self._source.until - time.time_ns()) / 10**9)

    def _tail(self, wanted: int, *, unknown: int, unfinished: bool) -> list[Line] | None:
        """Go behind the last `wanted` lines and return them; before them, and None, if too many.

        The Engine's own tail counts entries, of which a long line has several, and of both streams.
        So a larger one is asked for, too, unless it ended by damage: it must have all of the first.
        """
        collect = functools.partial(self._collect, wanted, unfinished)
        theirs, found = collect(wanted, None)
        tail: int | None = wanted + wanted // 8 + 64 + unknown
        with contextlib.suppress(LogDamaged):
            while theirs.entries in (0, wanted) or self._source.until:
                reading, larger = collect(tail, unknown if tail else None, theirs.first)
                is_full = tail is not None and reading.entries >= tail
                if not is_full and reading.marked < theirs.entries:
                    break
                if tail is None or (is_full and larger.found >= wanted and larger.last):
                    found = larger
                    break
                # podman takes longer for a large tail than for the whole log.
                is_larger = is_full and not self._source.engine.is_podman
                tail = 16 * tail if tail and is_larger else None
        _, lines, self.last, self._whole, self._skip, self._reach = found
        return lines

    def _collect(
        self,
        wanted: int,
        unfinished: bool,
        tail: int | None,
        unknown: int | None,
        mark: Entry | None = None,
    ) -> tuple[LogReading, LogTail]:
        """Return a reading that was read to its end, and the last `wanted` lines in it."""
        reading = LogReading(self._source, self._source.open(tail), unknown, mark=mark)
        kept: collections.deque[Line] = collections.deque()
        size = count = 0
        first: Optional[Line] = None
        last: Point = None
        for lines in itertools.chain(reading, reading.unfinished() if unfinished else ()):
            if reading.doubtful:
                kept.clear()
                size, count, first, last, reading.doubtful = 0, 0, None, None, False
            if lines:
                first, last = first or lines[0], lines[-1][:2]
            asked = [line for line in lines if line[2] in self._source.kinds]
            kept.extend(asked)
            count += len(asked)
            size += sum(LINE_COST + len(line[3]) for line in asked)
            while size > MAX_KEPT:
                size -= LINE_COST + len(kept.popleft()[3])
        if len(kept) >= min(wanted, count):
            lines = list(kept)[max(0, len(kept) - wanted) :]
            return reading, LogTail(count, lines, last, reading.whole(), 0, LOOK)
        following = count - (first is not None and first[2] in self._source.kinds)
        point = first[:2] if first and following >= wanted else None
        skip, reach = max(0, following - wanted), reading.entries + LOOK
        return reading, LogTail(count, None, point, set(), skip, reach)


def line_texts(lines: list[Line], stamps: bool, as_json: bool) -> list[bytes]:
    """Return what each line is shown as; JSON objects are UTF-8 already."""
    if as_json:
        texts = []
        for stamp, _, kind, text in lines:
            shown = {"time": stamp.decode("ascii"), "stream": STREAMS[kind]}
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
    if as_json:
        return b",".join(texts)
    items = b"\n".join(texts).decode("utf-8", "replace").split("\n")
    if len(items) != len(texts):  # some drivers keep a newline inside an entry
        items = [text.decode("utf-8", "replace") for text in texts]
    return encode_json(items)[1:-1]


def event(name: str, data: Any) -> bytes:
    """Return one named server-sent event; JSON holds no bare line end."""
    return f"event: {name}\ndata: ".encode() + encode_json(data) + b"\n\n"


def log_document(batches: Iterator[list[Line]], render: Render) -> Stream:
    """Yield {"lines": [...]} as it is read. Raises EngineError, which leaves it broken off."""
    separator = b'{"lines":['
    for items in map(render, filter(None, batches)):
        yield separator + items
        separator = b","
    yield (b"" if separator == b"," else separator) + b"]}\n"


def log_events(cursor: LogCursor, batches: Iterator[list[Line]], render: Render) -> Stream:
    """Yield the event stream of a log that is followed. Raises EngineError or Stopping."""
    yield STREAM_START
    for lines in batches:
        if not lines and time.monotonic() < cursor.due:
            continue
        yield render(lines) if lines else PING
        cursor.due = time.monotonic() + PING_INTERVAL
    yield event(*cursor.ending)


def log_ending(found: Json | None, started: Any) -> Ending | None:
    """Return the event that ends a followed log; None while the container runs as it did.

    started: when the run began that is followed, as the Engine has it.
    """
    if found is None:
        return "end", {"reason": "removed", "exit_code": None}
    state = require(found, "State", dict)
    exit_code = state.get("ExitCode")
    if state.get("Status") in ("removing", "dead"):
        return "end", {"reason": "removed", "exit_code": exit_code}
    restart = {"exit_code": exit_code, "restart_count": found.get("RestartCount")}
    if state.get("Restarting"):
        return "restart", restart
    if state.get("Running"):
        is_same = state.get("StartedAt") == started
        return None if is_same else ("restart", {**restart, "exit_code": None})
    if state.get("Status") == "created":
        return "end", {"reason": "created", "exit_code": None}
    return "end", {"reason": "exited", "exit_code": exit_code}


# --------------------------------------------------------------------------------------------------
# Endpoints: one function an operation
# --------------------------------------------------------------------------------------------------


class Agent(NamedTuple):
    """What the endpoints act upon."""

    engine: Engine
    host_root: str


def find_container(request: Request, agent: Agent) -> Json:
    """Return the Engine's inspect JSON of the container in the path. Raises EngineError."""
    found = agent.engine.json("GET", container_path(request.name, "json"))
    request.target.update(id=container_id(found), name=str(found.get("Name")).removeprefix("/"))
    return found


def health(request: Request, agent: Agent) -> Response:
    code, status, docker = 200, "ok", "connected"
    if not agent.engine.healthy():
        code, status, docker = 503, "degraded", "unreachable"
    now = timestamp(time.time(), "seconds")
    return Response({"status": status, "docker": docker, "timestamp": now}, code)


def create(request: Request, agent: Agent) -> Response:
    auth = registry_auth(request)
    created = create_container(
        agent.engine, request.body, auth, request.interrupts._replace(stop=None)
    )
    body = {"id": created["Id"], "warnings": created.get("Warnings") or []}
    return Response(body, 201, {"Location": f"{API}/containers/{created['Id']}"})


def registry_auth(request: Request) -> str:
    """Return X-Registry-Auth as padded base64url of a JSON object, or "". Raises ApiError (400)."""
    if not (value := request.header("X-Registry-Auth")):
        return ""
    bare = value.rstrip("=")
    with contextlib.suppress(ApiError, ValueError):
        decoded = base64.b64decode(bare + "=" * (-len(bare) % 4), b"-_", validate=True)
        # Invariant: decode_json bounds the depth; Python's decoder alone may overflow the C stack.
        if isinstance(decode_json(decoded), dict):
            return base64.urlsafe_b64encode(decoded).decode()
    raise ApiError(400, "X-Registry-Auth: must be the base64url of a JSON object")


def list_containers(request: Request, agent: Agent) -> Response:
    found = agent.engine.call("GET", f"/containers/json?all={int(request.query.get('all', False))}")
    return Response((container_list if len(found) < MEMOIZED else shape_list)(found))


def inspect(request: Request, agent: Agent) -> Response:
    body = agent.engine.call("GET", container_path(request.name, "json"))
    (check_object if len(body) < MEMOIZED else decode_response)(body)
    return Response(body)


def post_action(
    request: Request, agent: Agent, action: str, done: str, seconds: float = CALL_TIMEOUT
) -> Response:
    """Have the Engine do something to a container, with the signal and timeout in the body."""
    query: Json = {}
    if "signal" in request.body:
        query["signal"] = "SIG" + request.body["signal"].upper().removeprefix("SIG")
    if "timeout" in request.body:
        query["t"] = request.body["timeout"]
    agent.engine.call("POST", container_path(request.name, action), query, seconds=seconds)
    return Response({"message": f"container {done}"})


def stop_or_restart(request: Request, agent: Agent, action: str, done: str) -> Response:
    """Have the Engine do either, which may take the container's own time. Raises ApiError."""
    if "signal" in request.body:
        version = agent.engine.version(time.monotonic() + CALL_TIMEOUT, again=True)
        if tuple(map(int, version.split("."))) < (1, 42):
            refuse("signal", f"takes API 1.42, and this Engine has {version}; use /kill")
    if (wait := request.body.get("timeout")) is None:
        found = find_container(request, agent)
        own = require(found, "Config", dict).get("StopTimeout")
        # Invariant: a container's own timeout makes no wait longer than a client could ask for.
        wait = min(MAX_STOP, max(0, own)) if own and isinstance(own, int) else DEFAULT_STOP
    return post_action(request, agent, action, done, wait + CALL_TIMEOUT)


start = functools.partial(post_action, action="start", done="started", seconds=START_TIMEOUT)
stop = functools.partial(stop_or_restart, action="stop", done="stopped")
restart = functools.partial(stop_or_restart, action="restart", done="restarted")
kill = functools.partial(post_action, action="kill", done="killed")
pause = functools.partial(post_action, action="pause", done="paused")
unpause = functools.partial(post_action, action="unpause", done="unpaused")


def remove(request: Request, agent: Agent) -> Response:
    query = {name: int(value) for name, value in request.query.items()}
    agent.engine.call("DELETE", container_path(request.name), query)
    return Response({"message": "container removed"})


def logs(request: Request, agent: Agent) -> Response:
    asked = {"stdout": True, "stderr": True, "follow": False, "tail": "all", **request.query}
    if not (asked["stdout"] or asked["stderr"]):
        refuse("stdout", "and stderr cannot both be false")
    kinds = frozenset(k for k, name in STREAMS.items() if asked.get(name, asked["stdout"]))
    since, until = (moment_asked(name, asked.get(name, "0")) for name in ("since", "until"))
    # The header first: a browser that reconnects sends it beside the URL it began with.
    event_id = request.header("Last-Event-ID") or asked.get("last_event_id", "")
    match = re.fullmatch(EVENT_ID, event_id)
    if event_id and not match:
        refuse("Last-Event-ID", "must be an id that a log stream sent")
    last = (stamp_from(int(match[1] + match[2])), int(match[3])) if match else None
    found = find_container(request, agent)
    tty = bool(require(found, "Config", dict).get("Tty"))
    interrupts = request.interrupts if asked["follow"] else request.interrupts._replace(stop=None)
    source = LogSource(agent.engine, container_id(found), tty, kinds, since, until, interrupts)
    cursor = LogCursor(source, last)
    wanted = None if asked["tail"] == "all" else int(asked["tail"])
    shape = {"stamps": asked.get("timestamps", False), "as_json": asked.get("format") == "json"}
    if asked["follow"]:
        source.check()
        render = functools.partial(render_events, **shape)
        return event_stream(log_events(cursor, cursor.follow(found, wanted), render))
    return Response(
        stream=log_document(cursor.read(wanted), functools.partial(render_items, **shape))
    )


def event_stream(events: Stream) -> Response:
    headers = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}
    headers["Content-Type"] = "text/event-stream"
    return Response(stream=with_ending(events), headers=headers)


def with_ending(events: Stream) -> Stream:
    """Yield events, and one more that tells a client what broke them off."""
    try:
        yield from events
    except Stopping:
        yield event("shutdown", {"reason": "the agent is being stopped; reconnect"})
    except EngineError as error:
        yield event("error", envelope(error.status, error.message))


def pull(request: Request, agent: Agent) -> Response:
    auth = registry_auth(request)
    if "text/event-stream" in ",".join(request.fields.get("accept", [])).lower():
        return event_stream(pull_events(request, agent, auth))
    return Response(
        pull_image(agent.engine, request.body, auth, request.interrupts._replace(stop=None))
    )


def pull_events(request: Request, agent: Agent, auth: str) -> Stream:
    """Yield the event stream of a pull. Raises EngineError or Stopping."""
    yield STREAM_START
    digest = ""
    for word in pull_progress(agent.engine, request.body, auth, request.interrupts):
        if word is None:
            yield PING
            continue
        digest = digest_in(word) or digest
        detail = word.get("progressDetail")
        shown = {**detail, **word} if isinstance(detail, dict) else word
        names = ("id", "status", "current", "total")
        yield event("progress", {name: shown.get(name) for name in names})
    yield event("done", pull_result(agent.engine, request.body["image"], digest))


def write_file(request: Request, agent: Agent) -> Response:
    body = request.body
    content = text = body["content"].encode()
    if body.get("encoding") == "base64":
        with contextlib.suppress(binascii.Error):
            content = base64.b64decode(text)
        if base64.b64encode(content) != text:  # what Python's decoder forgives differs by version
            raise ApiError(400, "content: must be base64, padded and without line breaks")
    mode = int(body["permission"], 8) if "permission" in body else None
    write = FileWrite(content, mode, body.get("uid"), body.get("gid"), body.get("atomic", True))
    write_beneath(agent.host_root, body["path"], write)
    message = "file written successfully"
    return Response({"path": body["path"], "size": len(content), "message": message}, 201)


# --------------------------------------------------------------------------------------------------
# Routes: the table
# --------------------------------------------------------------------------------------------------

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

# --------------------------------------------------------------------------------------------------
# Command line: listen, signals, healthcheck, exit codes
# --------------------------------------------------------------------------------------------------

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def print_error(*lines: str) -> None:
    """Print lines on standard error, whatever the values that they repeat are made of."""
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


def listen(address: Address) -> socket.socket:
    """Return a listening socket; a Unix one has mode 0660. Raises OSError."""
    if not address.path:
        dual = not address.host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in address.host else socket.AF_INET
        there = (address.host, address.port)
        return socket.create_server(there, family=family, dualstack_ipv6=dual)
    # A socket that nobody listens at any more is removed, and nothing else that is there.
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if not stat.S_ISSOCK(os.lstat(address.path).st_mode):
            raise OSError(errno.EEXIST, "something other than a socket is there")
        with contextlib.suppress(ConnectionRefusedError):
            probe.connect(address.path)
            raise OSError(errno.EADDRINUSE, "another server listens there")
        os.unlink(address.path)
    with socket.socket(socket.AF_UNIX) as listener:
        os.umask(0o117)  # for the socket's mode; no thread has started
        listener.bind(address.path)
        os.umask(0)
        listener.listen()
        return listener.dup()  # which the end of `with` leaves open


def notify(state: str) -> None:
    """Tell systemd, if it started us with Type=notify: sd_notify(3)."""
    if path := os.environ.get("NOTIFY_SOCKET", ""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(state.encode(), "\0" + path[1:] if path[0] == "@" else path)


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
    sock = None
    try:
        sock = connection.sock = connect(address, context)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return 0 if connection.getresponse().status == 200 else 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print_error(f"{address}: {describe(error)}")
        # With the handshake done, a server that takes another CA's certificates refuses ours.
        is_refusal = sock and isinstance(error, (ssl.SSLError, ConnectionError))
        return 0 if is_refusal and config.tls_client_ca_file else 1


def announce(log: Log, address: Address, engine: Engine) -> None:
    where = {"address": str(address), "engine": str(engine.address)}
    log("info", "listening", version=VERSION, **where, engine_answers=engine.healthy())


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Raises ConfigError."""
    # Blocked before the first thread starts, so that no handler ever runs inside other code.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.umask(0)  # every mode here is explicit
    # The same everywhere: musl's default is too little, and json's decoder needs over 1 MiB.
    threading.stack_size(4 * 1024 * 1024)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address = config.listen_addr
    try:
        listener = listen(address)
    except OSError as error:
        raise ConfigError(f"LISTEN_ADDR: {address}: {describe(error)}") from error
    if not address.path:
        address = address._replace(port=listener.getsockname()[1])
    log = Log(config.log_level, config.api_key)
    engine = Engine(config.docker_host, config.engine_tls, config.docker_api_version)
    if len(config.api_key) < SHORT_KEY:
        log("warning", f"the key is shorter than {SHORT_KEY} characters; try openssl rand -hex 32")
    agent = Agent(engine, config.host_root)
    with Server(config, engine, log, listener, ROUTES, agent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        notify("READY=1")
        # In a thread: an Engine that is silent must not keep us from being stopped.
        threading.Thread(target=announce, args=(log, address, engine), daemon=True).start()
        signal.sigwait(STOP_SIGNALS)
        notify("STOPPING=1")
        log("info", "stopping")
        server.stop()
        deadline = time.monotonic() + GRACE
        while server.active and time.monotonic() < deadline:
            if signal.sigtimedwait(STOP_SIGNALS, 0.05):
                log("warning", "stopped at once")
                os._exit(1)
    log("info", "stopped")
    return 0


def usage() -> str:
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
        print_error(f"unknown arguments {' '.join(arguments)}; try --help")
        return 2
    try:
        if arguments:  # asks what needs no key
            return healthcheck(load_config({**os.environ, "API_KEY": "-", "API_KEY_FILE": ""}))
        return run(load_config(os.environ))
    except ConfigError as error:
        print_error(*error.args)
        return 1 if arguments else 2


if __name__ == "__main__":
    sys.exit(main())
