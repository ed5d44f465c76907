#!/usr/bin/env python3
"""dockeragent: a small, safe HTTP API for one Docker Engine.

    API_KEY_FILE=agent.key python3 -I dockeragent.py

Whoever has the master key is root on the host: creating a container can mount the host's
filesystem, and POST /api/v1/files writes any file under HOST_ROOT. A limited key (KEYS_FILE) may
do what its entry lists, and is not root.

Trusted: the environment, the Engine, the process's own files. Not trusted: whoever reaches the
port, the holder of a limited key, what a container prints, an image's own configuration, and the
tree under HOST_ROOT, where another program may swap folders for links while a file is written.

The file reads top to bottom; each section uses only names defined above it. What must be trusted
stands first, up to line 2462, and a reviewer may stop there:

    Constants, Errors
    B, what decides for a key: Validation, Keys, Policy, Configuration
    A, what a client without a key reaches: Logging, Rate limiter, Sockets, Requests (its bodies
       with a key only), HTTP handler, Server
    C, what touches the host's files: Files

Nothing up to that line names anything below it: Server is handed the table of routes, and `decide`
a function that asks the Engine. The code below is reached by a checked request or by the start, and
acts on the Engine alone. Two parts deserve a look all the same: `send_create` (what a limited key's
image brings) and Deployment.recover (which acts on names that a limited key chose).

Invariants, each stated again on the line that keeps it:
 1. Keys are compared in one place, as digests, in constant time; without one only /health answers.
 2. A request's head is matched byte for byte by the grammar below before any other code sees it,
    and unread body bytes always close the connection.
 3. No size, count or wait comes from a peer without a constant that bounds it.
 4. No path is checked and then used: the walk that checks is the walk that opens.
 5. Container output reaches an event stream only through the function that splits CR.
 6. Ids and names match a pattern before they are put in an Engine URL, and are quoted there.
 7. Keys, request bodies and file contents never reach a log line, nor does anything that a client
    without a key sent but its method and X-Request-ID.
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
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import math
import os
import queue
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
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, NoReturn, Optional, Union
from urllib.parse import quote, unquote, unquote_plus, urlencode

# --------------------------------------------------------------------------------------------------
# Constants: every limit and wait, with its unit and reason; the grammars
# --------------------------------------------------------------------------------------------------

VERSION = "2.0.0"
API = "/api/v1"

# What a client may send, and how long it may take (seconds, for the whole step, not per read).
MAX_REQUEST_LINE = 8 * 1024  # bytes; past it 414
MAX_FIELD_BLOCK = 32 * 1024  # bytes; past it 431
MAX_FIELDS = 100  # field lines; past it 431
MAX_BODY = 10 * 1024 * 1024  # bytes, decoded; past it 413
MAX_LIMITED_CONFIG = 128 * 1024  # bytes of JSON that describe a limited key's container
MAX_CHUNK_LINE = 1024  # bytes; a size and its extensions
MAX_TRAILER = 8 * 1024  # bytes; trailer fields are checked and dropped
MAX_DEPTH = 32  # nested arrays and objects; the decoder recurses on the C stack
MAX_VALUES = 200_000  # in one JSON text, roughly; 3 bytes of it may take 100 in memory
MAX_DIGITS = 20  # of one JSON number; int() of thousands of digits is quadratic
MAX_MEGABYTES = 2**25  # 32 TiB; refuses a size over 32 MiB that was written in bytes
HEAD_TIMEOUT = 10.0  # and for the TLS handshake
BODY_TIMEOUT = 60.0
IDLE_TIMEOUT = 75.0  # between two requests of one connection
STRANGER_IDLE_TIMEOUT = 10.0  # the same, for a connection that has not shown a valid key
WRITE_TIMEOUT = 30.0  # without a byte taken by the client
HALF_CLOSED = 2.0  # of waiting before a client that has half-closed counts as disconnected
LINGER_TIMEOUT = 3.0  # for a client to read a TLS alert or a connection's last response
GRACE = 10.0  # from SIGTERM to the exit, for requests in flight
RECV_SIZE = 64 * 1024  # bytes of one recv()
STREAM_BUFFER = 128 * 1024  # bytes of SO_SNDBUF: what the kernel holds for a stream's slow reader
SHORT_KEY = 32  # characters; a warning for a shorter one, which might be guessed
MAX_MESSAGE = 2000  # characters of an error's message; it may repeat what a client sent
MAX_LINGERING_REFUSALS = 32  # connections left open for a moment so that their 503 is read
DESCRIPTORS_KEPT = 64  # for refusals, the listener, the log, files, idle connections to the Engine

RATE_WINDOW = 60.0  # seconds
MAX_CLIENTS = 10_000  # windows kept; past it the least recently used is forgotten

# How long the Engine may take, and how much it may send.
NEWEST_API = 51  # 1.51 is the newest Engine API this file was written against
CONNECT_TIMEOUT = 5.0
CALL_TIMEOUT = 30.0
START_TIMEOUT = 120.0  # create and start, and to undo them
PING_TIMEOUT = 3.0
PULL_SILENCE = 120.0  # between two progress messages
RUN_TIMEOUT = 3600  # of a one-off run that names none
STOP_POLL = HALF_CLOSED + 0.5  # a wait in a run; a shorter one would never see its client leave
DEFAULT_STOP = 10  # seconds, the Engine's own default
MAX_STOP = 86_400  # seconds; no wait here is unbounded
MAX_RESPONSE = 64 * 1024 * 1024  # bytes of one response that is not a stream
MAX_KEPT_BODY = 512 * 1024  # bytes; what a longer response decodes to is not cached
MAX_IDLE_CONNECTIONS = 16  # kept open to the Engine
IDLE_CONNECTION = 2.0  # seconds; the Engine may have closed one that was idle for longer
VERSION_KEPT = 2.0  # seconds before the Engine, perhaps upgraded, is asked for its version again
HEALTH_CACHE = 1.0  # seconds during which the Engine is not asked again
GATE_INTERVAL = 0.2  # seconds between two looks at a new container
MAX_GATE = 3600  # seconds
MAX_DEPLOYS = 25  # of one limited key at once
LATE_CREATE = 5.0  # seconds after a start; by then most creates of a killed agent are done
RETRY_TIME = 12.0  # seconds during which a step of a deploy that the Engine fails is repeated
RECOVERY_INTERVAL = 2.0  # seconds before an Engine that did not respond is asked again
MAX_PROGRESS = 1000  # events of a pull, queued for a client that does not read them
FAILED_LINES = 50  # of a failed deploy's log, in the response
HEALTH_KEPT = 4.0  # seconds; up to this age /health gives the last result while the next is awaited
METRICS_TIMEOUT = 5.0  # for the list of containers; shorter than a scrape's own timeout

MAX_LINE = 1024 * 1024  # bytes of one log line; the rest becomes the next line
MAX_FRAME = 4 * 1024 * 1024  # bytes; the Engine's own hold up to 16 KiB and a timestamp
NUMBERED = 4096  # log entries; after so many others, a timestamp is numbered from 1 again
ENTRY_SIZE = 16 * 1024  # bytes; the Engine's log drivers cut longer lines into entries of this size
STREAM_START = b"retry: 3000\n"  # milliseconds before a client reconnects
PING = b": ping\n"  # no empty line after either: some clients would dispatch an empty message
PING_INTERVAL = 15.0  # seconds of silence before a comment keeps an event stream's proxies awake
# The Engine writes each log entry by itself. After a read that waited less than this, the agent
# waits this long: the next read finds some 200 entries, and a whole log takes a third less time.
BURST_PAUSE = 0.0004  # seconds
HEAD_WAIT = 1.0  # seconds for the Engine to refuse a log, before an event stream begins
RESTART_WAIT = 1.0  # seconds for a container that was stopped to run again; it takes some 0.2
LOOK = NUMBERED + 1024  # entries at a log's end that are searched first for a line
MAX_KEPT = 256 * 1024  # bytes of lines that one request keeps in memory, to find the last ones
LINE_COST = 200  # bytes that Python needs for a line, its text aside

MAX_PATH_RETRIES = 20  # while others remove the folders that a path leads through
MAX_LINKS = 40  # symbolic links in one path, as Linux has it
MAX_PATH = 4096  # bytes, PATH_MAX
MAX_SOCKET_PATH = 107  # bytes; unix(7), sun_path less its NUL
LOCK_TIMEOUT = 30.0  # seconds to wait for other writes to the same filesystem

# RFC 9110 section 5.6.2 and 5.5, RFC 9112 section 3: no control but HTAB in a value, so a bare CR,
# a bare LF or a NUL never matches; no white space before the colon, so no folded line does either.
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(TOKEN + rb" [!-\"$-~]+ HTTP/[0-9]\.[0-9]")
FIELD_BLOCK = re.compile(rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
# RFC 3986 section 3.2.2: a name or an IPv4 address, or an IPv6 address in brackets; then a port.
HOST_VALUE = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._~-]+)?\]|[A-Za-z0-9._~!$&'()*+,;=%-]*)(?::[0-9]*)?"
)
ABSOLUTE_FORM = re.compile(r"(?i)^https?://([^/?]*)")  # RFC 9112 section 3.2.2
EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")  # before a request: RFC 9112 section 2.2
LONE_CONTROL = re.compile(rb"\n(?<!\r\n)|\r(?!\n|\Z)|\0")
# The patterns below are compiled when first used, so that no start waits for them.
CHUNK_LINE = rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?"
HOP_PORT = r"^\[(.*)\](?::[0-9]+)?$|^([0-9.]+):[0-9]+$"  # [::1], [::1]:80 or 10.0.0.1:80
REQUEST_ID = r"[A-Za-z0-9._-]{1,64}"
CONTAINER = r"[a-zA-Z0-9][a-zA-Z0-9_.-]*"
IMAGE_ID = "(?:sha256:)?[0-9a-f]{64}"
NAME_RULE = "letters, digits, '_', '.' or '-', beginning with a letter or digit"
TIMESTAMP = (
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
LOG_STAMP = TIMESTAMP.encode() + b" "
UNIX_TIME = r"([0-9]{1,11})(?:\.([0-9]{1,9}))?"
DURATION = r"(?=\.?[0-9])([0-9]{0,15})(?:\.([0-9]{0,15}))?(ns|us|µs|μs|ms|s|m|h)"
UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9}  # nanoseconds
UNITS.update(m=60 * UNITS["s"], h=3600 * UNITS["s"])
# Up to the year 9999; an entry without a time has the year 1.
EVENT_ID = r"([12]?[0-9]{1,11}|-62135596800)\.([0-9]{9})-([1-9][0-9]{0,14})"
ENGINE_EVENT_ID = r"([0-9]{1,19})-[1-9][0-9]{0,14}"

# Python's phrases changed between 3.9 and 3.13 (413, 414, 416, 422); these are RFC 9110's.
PHRASES = {status.value: status.phrase for status in http.HTTPStatus}
PHRASES.update({413: "Content Too Large", 414: "URI Too Long", 422: "Unprocessable Content"})

# --------------------------------------------------------------------------------------------------
# Errors: one class a client is told about, one envelope
# --------------------------------------------------------------------------------------------------

Json = dict[str, Any]  # an object


class ApiError(Exception):
    """A refusal the client is told about: one status, one sentence, perhaps headers and members."""

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] = {}, **members: Any
    ) -> None:
        super().__init__(message)
        self.status, self.headers, self.members = status, headers, members
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."


class EngineError(ApiError):
    """The Engine refused, is unreachable (503), timed out (504) or sent a bad response (502)."""


@contextlib.contextmanager
def tolerate(*statuses: int) -> Iterator[None]:
    """Suppress an EngineError with one of these statuses."""
    try:
        yield
    except EngineError as error:
        if error.status not in statuses:
            raise


@contextlib.contextmanager
def hold(lock: Any, seconds: float, message: str) -> Iterator[None]:
    """Hold a lock. Raises ApiError (503), with this message, if that takes too long."""
    # Invariant: no request waits for others without a bound: it could long outlive its client.
    if not lock.acquire(timeout=max(0, seconds)):
        raise ApiError(503, message)
    try:
        yield
    finally:
        lock.release()


class ClientGone(Exception):
    """The client has disconnected or stopped reading."""


class Stopping(ApiError):
    """The agent is stopping (503). Raised from any wait that the stop interrupts."""


def envelope(error: ApiError) -> Json:
    """Return the JSON object that is the response to every error."""
    head = {"error": PHRASES[error.status], "message": error.message, "status": error.status}
    return {**head, **error.members}


def describe(error: Exception) -> str:
    """Return one line for an error; for an OSError, without its number and its file."""
    if isinstance(error, OSError) and error.strerror:
        texts = [getattr(error, name, "") for name in ("verify_message", "reason")]  # of ssl's
        return str(next(filter(None, texts), error.strerror))
    return " ".join(str(error).split()) or type(error).__name__


def encode_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# Validation: a subset of JSON Schema, strict JSON, query strings, image references
# --------------------------------------------------------------------------------------------------

Schema = dict[str, Any]
TEXT = "(?s:.*)"

# By type(), not isinstance(): to Python, a boolean is an integer.
KINDS: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
KINDS |= {list: "array", dict: "object"}
BOOLEANS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
KEYWORDS = "type description example properties required names values items pattern maxLength raw"
KEYWORDS += " minimum maximum zero check place convert since"  # the last three are read by `fill`
# Names of docker run, compose and the Engine, without - and _, that are not nearly ours.
OTHER_NAMES = dict.fromkeys(("binds", "mount", "mounts", "tmpfs"), "volumes")
OTHER_NAMES.update(environment="env", containername="name", rm="auto_remove", test="cmd")
OTHER_NAMES.update(publish="ports", exposedports="ports", portbindings="ports", net="networks")
OTHER_NAMES.update(memlimit="memory_mb", pidslimit="pids", pid="pid_mode", ipc="ipc_mode")
OTHER_NAMES.update(addhost="extra_hosts", stopgraceperiod="stop_timeout", pullpolicy="pull")
OTHER_NAMES.update(privateport="container_port", published="host_port", publicport="host_port")
OTHER_NAMES.update(logconfig="log", destination="target", dst="target", mode="permission")
OTHER_NAMES.update(networkingconfig="networks", devicerequests="gpus", args="cmd")
OTHER_NAMES.update(repo="image", tag="image", ip="host_ip", type="driver", stream="follow")
OTHER_NAMES.update(host="host_port", lines="tail", nohealthcheck="disable", nostream="follow=false")
OTHER_NAMES.update(hostconfig="volumes, ports, resources and so on, beside image")
OTHER_NAMES.update(command="cmd", restart="restart_policy", envfile="env", src="source")
OTHER_NAMES.update(logging="log", logopt="log", logdriver="driver", networkalias="networks")
OTHER_NAMES.update(health="healthcheck", healthcmd="shell", healthretries="retries")
OTHER_NAMES.update(healthinterval="interval", healthtimeout="timeout", size="size_mb")
OTHER_NAMES.update(healthstartperiod="start_period", readonlyrootfs="read_only", ro="read_only")
OTHER_NAMES.update(workdir="working_dir", target="container_port", hosts="extra_hosts")
OTHER_NAMES.update(memswaplimit="memory_swap_mb", nanocpus="cpus", limits="cpus, memory_mb, pids")
# Nearly ours, but something else: no name here is hinted at.
NOT_OURS = "userns cpuset gpus startinterval external services volumesfrom"
OTHER_NAMES.update(dict.fromkeys(NOT_OURS.split(), ""))


def check_schema(schema: Schema) -> Schema:
    """Return schema. Raises ValueError for a keyword that nothing would enforce."""
    if unknown := schema.keys() - KEYWORDS.split():
        raise ValueError(f"unknown keywords {unknown} in {schema}")
    nested = [schema[key] for key in ("items", "names", "values") if key in schema]
    for child in (*schema.get("properties", {}).values(), *nested):
        check_schema(child)
    return schema


def refuse(path: str, rule: str) -> NoReturn:
    raise ApiError(400, f"{path or 'body'}: {rule}")


class NotJson(str):
    """Stands for a wrong value, and says what is wrong; `validate` refuses it by its path."""


def validate(schema: Schema, value: Any, path: str = "") -> Any:
    """Return value in the one form that all code after this sees. Raises ApiError (400).

    Members that are null are left out. A schema's `check` may change the value or raise ValueError.
    """
    example = f", such as {json.dumps(schema['example'])}" if schema.get("example") else ""
    rule = f"must be {schema['description']}{example}"
    if isinstance(value, NotJson):
        refuse(path, f"{value}; it {rule}")
    kinds = schema["type"]
    if KINDS.get(type(value)) not in kinds.split("|"):
        refuse(path, f"must be a string{example}" if kinds == "string" and example else rule)
    if isinstance(value, str):
        validate_string(schema, value, path, rule)
    elif isinstance(value, dict):
        value = validate_object(schema, value, path)
    elif isinstance(value, list):
        value = [validate(schema["items"], item, f"{path}[{i}]") for i, item in enumerate(value)]
    else:
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        if not (low <= value <= high or (value == 0 and schema["zero"])):
            refuse(path, rule)
    check = schema.get("check")
    try:
        return check(value, path) if check else value
    except ValueError as error:
        refuse(path, f"{rule}: {error}")


def validate_string(schema: Schema, value: str, path: str, rule: str) -> None:
    if "\0" in value and not schema.get("raw"):
        refuse(path, "must not contain a NUL character")
    if re.search(r"[\ud800-\udfff]", value):
        refuse(path, "must not contain a lone surrogate, or a byte that is not UTF-8")
    if len(value) > schema["maxLength"]:
        refuse(path, f"must be at most {schema['maxLength']} characters")
    if not re.fullmatch(schema["pattern"], value):
        refuse(path, rule)


def validate_object(schema: Schema, value: Json, path: str) -> Json:
    properties, result = schema["properties"], {}
    prefix = f"{path}." if path else ""
    for name, member in value.items():
        if "names" in schema:
            validate(schema["names"], name, prefix + name)
        elif name not in properties:
            refuse(prefix + name, f"is unknown; {suggest_name(name, properties)}")
        if member is not None:
            result[name] = validate(schema.get("values") or properties[name], member, prefix + name)
    for name in schema["required"]:
        if name not in result:
            refuse(prefix + name, "is required")
    return result


def suggest_name(name: str, properties: Json) -> str:
    """Return what to write instead of an unknown name: the nearest known one, or all of them."""
    import difflib  # here: no start should wait for it

    rows = properties.items()
    known = {name: f"{outer}.{name}" for outer, row in rows for name in row.get("properties", ())}
    known.update(zip(properties, properties))
    hints = {word: known.get(other, other) for word, other in OTHER_NAMES.items()}
    hints.update((name.replace("_", ""), hint) for name, hint in known.items())
    hints = {word: hint for word, hint in hints.items() if re.split(r"\W", hint)[0] in properties}
    word = re.sub("[-_]", "", name[:64].lower())
    left_out = {name: row["description"] for name, row in rows if row["type"] == "nothing"}
    # A slip of the hand among the names here; other hints must be nearly the same, as
    # oom_kill_disable is not healthcheck.disable.
    found = difflib.get_close_matches(word, hints, 1, 0.85)
    here = [name.replace("_", "") for name in properties if word not in OTHER_NAMES]
    for nearest in found or difflib.get_close_matches(word, here, 1, 0.75):
        hint = hints[nearest]
        more = f" It must be {left_out[hint]}" if hint in left_out else ""
        return f"did you mean {hint}?{more}"
    names = [name for name in properties if name not in left_out]
    return f"known here: {', '.join(names)}" if names else "nothing can be set here"


def string_schema(
    pattern: str = TEXT, rule: str = "a string", most: int = 4096, example: Any = None
) -> Schema:
    schema = {"type": "string", "pattern": pattern, "description": rule, "maxLength": most}
    return {**schema, "example": example}


def one_of(*words: str) -> Schema:
    return string_schema("|".join(words), f"one of {', '.join(words)}")


def integer_schema(
    low: float, high: int, zero: str = "", kind: str = "integer", unit: str = ""
) -> Schema:
    """zero: what 0 means, if it is allowed outside of the bounds."""
    noun = "an integer" if kind == "integer" else "a number"
    rule = (f"0 ({zero}) or " if zero else "") + f"{noun} from {low:,} to {high:,}"
    rule += f", in {unit}" if unit else ""
    return {"type": kind, "description": rule, "minimum": low, "maximum": high, "zero": zero}


def array_of(item: Schema, example: Any = None) -> Schema:
    rule = f"an array of {item['type'].replace('|', 's or ')}s"
    example = example or (item.get("example") and [item["example"]])
    return {"type": "array", "description": rule, "items": item, "example": example}


def map_of(names: Schema, values: Schema, example: Json) -> Schema:
    return {**object_schema("", example), "names": names, "values": values}


def object_schema(required: str, example: Any = None, check: Any = None, **rows: Schema) -> Schema:
    schema: Schema = {"type": "object", "description": "a JSON object", "properties": rows}
    schema.update(required=required.split(), example=example, check=check)
    return check_schema(schema)


NOTHING = object_schema("")
BOOLEAN = {"type": "boolean", "description": "true or false"}
NO_MARKS = bytes(set(range(256)) - set(b"[{]},"))  # bytes that neither nest nor separate


def decode_json(body: bytes) -> Any:
    """Return the value of JSON (RFC 8259), with NotJson for what is wrong. Raises ApiError."""
    if not body.strip(b" \t\r\n"):
        return NotJson("is empty")
    # Invariant: the depth and the number of values are bounded before the decoder sees them: it
    # recurses, and makes an object of each. With the escapes removed, quotes only begin and end
    # strings, so every second part is one: no mark in it counts.
    parts = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * MAX_VALUES)
    marks = b"".join(parts[::2]).translate(None, NO_MARKS)
    if len(parts) // 2 + len(marks) > MAX_VALUES:
        refuse("", f"has more than {MAX_VALUES} values")
    depths = itertools.accumulate((mark in b"[{") - (mark in b"]}") for mark in marks)
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
    except json.JSONDecodeError as error:
        octal = re.compile(r"\b0[0-9]+").match(error.doc, max(0, error.pos - 1))
        hint = f'write "{octal[0]}" in quotes' if octal else error.msg
        return NotJson(f"is not JSON: line {error.lineno}, column {error.colno}: {hint}")
    except UnicodeDecodeError as error:
        refuse("", f"is not UTF-8: {error}")


def unique_object(pairs: list[tuple[str, Any]]) -> Json | NotJson:
    """Return pairs as a dict, unless a key comes twice (RFC 7493 section 2.3)."""
    result: Json = {}
    for name, value in pairs:
        if name in result:
            return NotJson(f"has {json.dumps(name)} more than once")
        result[name] = value
    return result


def decode_query(query: str, schema: Schema, body: Schema | None = None) -> Json:
    """Return a query's typed parameters; a field of the body is refused. Raises ApiError (400)."""
    rows, fields, pairs = schema["properties"], (body or NOTHING)["properties"], []
    for part in filter(None, query.split("&")):
        # A byte that is not UTF-8 becomes a lone surrogate, which `validate` refuses.
        name, _, value = (unquote_plus(t, errors="surrogateescape") for t in part.partition("="))
        if name in fields and name not in rows:
            refuse(f"query.{name}", f'goes into the body, as in {{"{name}": ...}}')
        if fields and not rows:
            refuse(f"query.{name}", f"is unknown; the body takes {', '.join(fields)}")
        is_boolean = rows.get(name, {}).get("type") == "boolean"
        pairs.append((name, BOOLEANS.get(value.lower(), value) if is_boolean else value))
    parameters = unique_object(pairs)
    if isinstance(parameters, NotJson):
        refuse("query", parameters)
    checked: Json = validate(schema, parameters, "query")
    return checked


def full_reference(image: str, tag: str = ":latest") -> str:
    """Return an image's reference in full: nginx is docker.io/library/nginx:latest."""
    # Invariant: the rules are the Engine's own (distribution/reference: ParseNormalizedNamed,
    # TagNameOnly), so both mean the same registry.
    host, slash, rest = image.partition("/")
    if not slash or not (re.search("[.:A-Z]", host) or host == "localhost"):
        host, rest = "docker.io", image
    if host in ("docker.io", "index.docker.io"):
        host, rest = "docker.io", rest if "/" in rest or not rest else f"library/{rest}"
    has_tag = "@" in rest or ":" in rest.rpartition("/")[2]
    return f"{host}/{rest}{'' if has_tag else tag}"


# --------------------------------------------------------------------------------------------------
# Keys: what a key is and what its patterns cover, and the one place where keys are compared
# --------------------------------------------------------------------------------------------------

OWN_LABELS = "dockeragent."  # what the agent's own labels begin with: no client sets one
HELPER_NAMES = (".next", ".prev", ".old")  # how a deploy ends the names of its helper containers
HELPER_NAME = re.compile(r"\.(?:next|prev|old)\Z")


class Key(NamedTuple):
    """One key: its name, and what it may do. A limited key has patterns of names; see README."""

    name: str
    digest: bytes = b""  # SHA-256 of the key
    master: bool = False
    expires: float = math.inf  # Unix seconds
    allow: tuple[str, ...] = ()
    containers: tuple[str, ...] = ()
    images: tuple[str, ...] = ()  # in full: docker.io/library/nginx:1.27, ghcr.io/acme/*
    networks: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    binds: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()  # ranges
    labels: tuple[str, ...] = ()
    cache: bool = False
    limits: Mapping[str, Any] = {}

    def covers(self, kind: str, name: str) -> bool:
        """Return whether a pattern of the key allows this name. kind: "containers", "images"..."""
        if kind == "containers":
            name = HELPER_NAME.sub("", name)
        if kind == "images":  # an id is no name, though sha256:... also reads as a name and tag
            name = "" if re.fullmatch(IMAGE_ID, name) else full_reference(name)
        # No pattern covers the agent's own labels, nor an empty name: the Engine would choose one.
        if self.master or not name or (kind == "labels" and name.startswith(OWN_LABELS)):
            return self.master
        return any(
            name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
            for pattern in getattr(self, kind)
        )

    def permit(self, condition: object, field: str, what: object, status: int = 403) -> None:
        if not condition:
            raise ApiError(status, f"key {self.name}: {field}: {what} is not allowed")

    def permit_name(self, kind: str, name: str, field: str = "") -> None:
        """Raise ApiError (403) unless the key covers a name, or a permission (kind "allow")."""
        self.permit(self.covers(kind, name), field or kind, name or "no name")


STRANGER = Key("")  # whoever has not shown a valid key


def find_key(keys: Iterable[Key], shown: bytes) -> Key:
    """Return the key that was shown, STRANGER if there is no such key or it has expired."""
    digest, found = hashlib.sha256(shown).digest(), STRANGER
    for key in keys:
        # Invariant: the one place where keys are compared: in constant time, with each of them.
        if hmac.compare_digest(digest, key.digest) and time.time() < key.expires:
            found = key
    return found


# --------------------------------------------------------------------------------------------------
# Policy: the one function that decides what a limited key may do
# --------------------------------------------------------------------------------------------------

PUBLIC, MASTER_ONLY = "public", "what is for the master key"  # in place of a permission
KEY_LABEL = "dockeragent.key"  # the name of the limited key that created a container
Ask = Callable[[str], Optional[Json]]  # returns the Engine's JSON for a path, None for a 404
# Each function below raises ApiError (403), or changes the body into what a limited key gets.


def decide(request: Request, permission: str, ask: Ask) -> None:
    """Raise ApiError unless a rule allows the key what the checked request asks for."""
    if not request.key.master:
        DECISIONS[permission](request, ask)


def config_of(inspected: Json | None, member: str) -> Json:
    """Return a member of an inspected container's or image's configuration, {} for none."""
    return ((inspected or {}).get("Config") or {}).get(member) or {}


def find_own(key: Key, name: str, ask: Ask) -> Json:
    """Return the inspect JSON of a container whose name is in scope, {} if there is none."""
    found = None
    # 400, 500: the ids of several containers begin with this name, which the key must not learn.
    with tolerate(400, 500):
        found = ask(f"/containers/{quote(name, safe='')}/json")
    # By its name alone: a label can be forged, and an id does not tell whose it is.
    return found if found and key.covers("containers", found.get("Name", "")[1:]) else {}


def decide_container(request: Request, ask: Ask) -> None:
    """Let the request act on a container in scope, by its full id. A list checks its own rows."""
    if request.name:
        found = find_own(request.key, request.name, ask)
        if not found:  # another's, or none: the response is the same
            raise ApiError(404, f"no such container: {request.name}")
        request.name = found["Id"]  # a name could be another's a moment later


def decide_create(request: Request, ask: Ask) -> None:
    key, body = request.key, request.body
    key.permit_name("containers", request.name or body.get("name", ""))
    key.permit(not request.query.get("adopt"), "adopt", "what was not deployed here")
    for field in body.keys() - LIMITED_FIELDS:
        key.permit(False, field, "a field for the master key")
    for rule in RULES:
        rule(key, body, ask)


def decide_named(request: Request, ask: Ask) -> None:
    """Check the image or volume that is named. Each row of a list is checked with `covers`."""
    for values in request.query, request.body:
        if "image" in values:
            values["image"] = check_image(request.key, values["image"])
    if repository := request.body.get("repository"):
        request.key.permit_name("images", repository)
    if request.name:
        request.key.permit_name("volumes", request.name)


def decide_file(request: Request, ask: Ask) -> None:
    """Hold the request to the listed folder that its path lies beneath."""
    path, mode = {**request.query, **request.body}["path"], request.body.get("permission", "0")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    folders = [f for f in request.key.files if f"/{'/'.join(parts)}".startswith(f"{f}/")]
    request.key.permit(folders and ".." not in parts, "files", path)
    request.folder = min(folders)  # the outermost: no link below it is followed
    # A set-id file of root's, in a folder that a container mounts, would make its processes root.
    request.key.permit(int(mode, 8) <= 0o777, "permission", mode)


# By the permission that a route names, which is what a limited key's `allow` may have in it.
DECISIONS: dict[str, Callable[[Request, Ask], None]] = {
    **dict.fromkeys("read inspect logs operate remove metrics".split(), decide_container),
    **dict.fromkeys(("create", "deploy"), decide_create),
    **dict.fromkeys(("images", "networks", "volumes"), decide_named),
    "files": decide_file,
}


def check_image(key: Key, image: str) -> str:
    """Return the reference in full, which cannot also be the beginning of an id."""
    # An id or a digest may be another's private image in the cache: no registry checks who asks.
    is_named = not re.fullmatch(IMAGE_ID, image) and (key.cache or "@" not in image)
    key.permit(is_named, "images", f"{image}, which is no name and tag,")
    key.permit_name("images", full_reference(image))
    return full_reference(image)


def restrict_image(key: Key, body: Json, ask: Ask) -> None:
    body["image"] = check_image(key, body["image"])
    # A cached image may be another's private one: the registry is always asked.
    if not key.cache:
        key.permit(body.setdefault("pull", "always") == "always", "pull", body["pull"])


def restrict_volumes(key: Key, body: Json, ask: Ask) -> None:
    volumes = body.get("volumes", ())
    key.permit(len(volumes) <= 32, "volumes", "more than 32 of them")  # each is asked about below
    for volume in volumes:
        source = volume.get("source", "")
        if volume["type"] == "bind":
            # Exact paths: whoever can write in a listed folder can plant a link below it.
            key.permit(source in key.binds, "binds", source)
            # Read-only for the same reason; not recursive, as a disk mounted below is writable.
            key.permit(volume.get("read_only", True), "binds", f"{source}, writable,")
            volume.update(read_only=True, non_recursive=True)
        elif source:
            key.permit_name("volumes", source)
            if (found := ask(f"/volumes/{quote(source, safe='')}")) is not None:
                # A volume with options may be a bind of any folder: o=bind,device=/.
                is_plain = found.get("Driver") == "local" and not found.get("Options")
                key.permit(is_plain, "volumes", f"{source}, which has options,")


def restrict_networks(key: Key, body: Json, ask: Ask) -> None:
    mode = body.get("network_mode", "")  # host, none or container:X
    if mode.startswith("container:"):
        body["network_mode"] = f"container:{find_peer(key, mode.partition(':')[2], ask)}"
    else:
        key.permit(mode in ("", "none"), "network_mode", mode)
    networks = [] if mode else body.setdefault("networks", [{"name": "bridge", "aliases": []}])
    aliases = [body["hostname"]] if "hostname" in body else []
    for network in networks:
        aliases += network["aliases"]
        name = network["name"]
        # On the default bridge every container hears every other, so no pattern includes it.
        is_covered = name in key.networks if name == "bridge" else key.covers("networks", name)
        key.permit(is_covered, "networks", name)
        # Found by its exact name, used by its id: the Engine takes the beginning of an id, too.
        found = ask(f"/networks/{quote(name, safe='')}")
        if not found or found.get("Name") != name:
            raise ApiError(404, f"no such network: {name}")
        network["name"] = name if name == "bridge" else found["Id"]
    key.permit(len(aliases) <= 32, "networks", "more than 32 aliases")
    # All containers on a network resolve them: one could be api.stripe.com, or another's container.
    for alias in aliases:
        key.permit_name("containers", alias, "hostname or alias")


def image_path(image: str, platform: Json) -> str:
    """Return the Engine's path of an image; platform: which of several (Engine API 1.49), or {}."""
    query = f"?platform={quote(json.dumps(platform))}" if "architecture" in platform else ""
    return f"/images/{quote(image, errors='replace')}/json{query}"


def find_brought(container: Json, ask: Ask) -> Json | None:
    """Return the image of a container, a row of a list or inspected, None if it is gone."""
    # Invariant: its own platform's, as each of an image with several has labels of its own.
    platform = container.get("ImageManifestDescriptor", {}).get("platform", {})
    return ask(image_path(container.get("ImageID") or container["Image"], platform))


def find_peer(key: Key, name: str, ask: Ask) -> str:
    """Return the id of a container whose network a limited key may share."""
    found = find_own(key, name, ask)
    image = find_brought(found, ask) if found else None
    # One that a master key made may be on any network. A label of its image proves nothing.
    maker = config_of(found, "Labels").get(KEY_LABEL)
    is_own = image and maker and maker != config_of(image, "Labels").get(KEY_LABEL)
    key.permit(is_own, "network_mode", f"container:{name}")
    return str(found["Id"])


def restrict_numbers(key: Key, body: Json, ask: Ask) -> None:
    numbers = [port["host_port"] for port in body.get("ports", ())]
    key.permit(len(numbers) <= 32, "ports", "more than 32 of them")  # each may be a process
    for number in numbers:  # 0: the Engine picks one, which takes any range
        is_listed = any(low <= number <= high or not number for low, high in key.ports)
        key.permit(is_listed, "ports", number or "one that the Engine picks")
    resources = body.setdefault("resources", {})
    for name in key.limits.keys() - {"containers"}:
        most, wanted = key.limits[name], resources.get(name, 0)
        key.permit(wanted <= most, name, f"more than {most}")
        resources[name] = wanted or most  # 0 is no limit to the Engine
    if "memory_mb" in key.limits:
        memory = resources["memory_mb"]
        swap = resources["memory_swap_mb"] = resources.get("memory_swap_mb", 0) or memory
        # -1 is no limit to the Engine.
        key.permit(0 < swap <= memory, "memory_swap_mb", f"more than memory_mb, {memory},")
    for name in resources.get("ulimits", ()):
        key.permit(name in ("nofile", "nproc", "core", "stack", "fsize"), "ulimits", name)


def restrict_rest(key: Key, body: Json, ask: Ask) -> None:
    # Other tools act on labels: a proxy's routes, a scheduler's jobs on the host.
    for label in body.get("labels", ()):
        key.permit_name("labels", label)
    # Other drivers send to any address; without rotation a log fills the host's disk.
    log = {"driver": "json-file", "max_size_mb": 10, "max_files": 3, **body.get("log", {})}
    key.permit(log["driver"] in ("json-file", "local"), "log.driver", log["driver"])
    # NET_RAW forges packets on a shared network, MKNOD makes device files.
    body.update(log=log, cap_drop=[*body.get("cap_drop", []), "NET_RAW", "MKNOD"])
    for path, most in MOST.items():
        group, _, field = path.rpartition(".")
        asked = (body[group] if group else body).get(field, 0)
        key.permit(asked <= most, path, f"more than {most}")
    # Each check starts a process: one a millisecond would use up the host's processors.
    interval = body.get("healthcheck", {}).get("interval", 0)
    key.permit(not 0 < interval < 1, "healthcheck.interval", "under 1 second")


# The most that any limited key's container may ask for.
MOST = {"stop_timeout": 120, "resources.cpu_shares": 1024}
MOST.update({"log.max_size_mb": 100, "log.max_files": 10})
RULES = (restrict_image, restrict_volumes, restrict_networks, restrict_numbers, restrict_rest)
# What the rules look at, then what is free. Any other field is for the master key.
LIMITED_FIELDS = set(
    "image pull volumes networks network_mode hostname ports labels resources log healthcheck"
    " stop_timeout cap_drop name cmd entrypoint env working_dir user init tty read_only dns deploy"
    " restart_policy stop_signal extra_hosts platform auto_remove timeout no_new_privileges".split()
)


def restrict_brought(key: Key, container: Json, image: Json) -> None:
    """Empty the image's labels that the key may not set; refuse what else it may not bring."""
    labels, health = config_of(image, "Labels"), config_of(image, "Healthcheck")
    emptied = {name: "" for name in labels if not key.covers("labels", name)}
    container["Labels"] = {**emptied, **container["Labels"]}
    asked = {name: value for name, value in container.get("Healthcheck", {}).items() if value}
    config = {**(image.get("Config") or {}), **container, "Healthcheck": {**health, **asked}}
    config["Labels"] = {**labels, **container["Labels"]}
    check_created(key, {"Config": config}, container, 403)


def check_created(key: Key, created: Json, container: Json, status: int = 409) -> None:
    """Check what the image brings, in the created container too: its tag may have been moved."""
    # The list of all containers has labels and commands in it, and fails past MAX_RESPONSE bytes.
    size = len(encode_json(created["Config"]))
    key.permit(size <= MAX_LIMITED_CONFIG, "size", f"more than {MAX_LIMITED_CONFIG} bytes", status)
    for name, value in config_of(created, "Labels").items():
        is_own = container["Labels"].get(name) == value or key.covers("labels", name)
        key.permit(is_own, "labels", f"the image's {name}", status)
    # Each becomes an anonymous volume: thousands take the Engine minutes, and stay.
    volumes = config_of(created, "Volumes")
    key.permit(len(volumes) <= 32, "volumes", "more than 32 of the image's", status)
    health = config_of(created, "Healthcheck")
    for name in "Interval", "StartInterval":  # nanoseconds; 0 is the default, below 0 at once
        is_slow = (health.get(name) or 10**9) >= 10**9 or health.get("Test") == ["NONE"]
        key.permit(is_slow, "healthcheck", "a check that is run more than once a second", status)


def check_count(key: Key, name: str, names: Iterable[str]) -> None:
    """Refuse one more container in the key's scope. names: of all that are or are being made."""
    others = {HELPER_NAME.sub("", other) for other in names if key.covers("containers", other)}
    most = key.limits.get("containers", math.inf)
    is_free = len(others - {HELPER_NAME.sub("", name)}) < most
    key.permit(is_free, "limits", f"more than {most} containers")


# --------------------------------------------------------------------------------------------------
# Configuration: the environment and the keys file to one Config; every problem names its variable
# --------------------------------------------------------------------------------------------------

Networks = tuple[Union[ipaddress.IPv4Network, ipaddress.IPv6Network], ...]
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
ENGINE_SOCKET = "unix:///var/run/docker.sock"
DOCKER_FOLDER = "~/.docker"  # where Docker's own certificates are by default


class ConfigError(Exception):
    """The environment is wrong; one argument, a line, for each problem."""


class Address(NamedTuple):
    """Where to listen, or where the Engine is: a Unix socket's path, or a host and port."""

    path: str = ""
    host: str = ""
    port: int = 0
    scheme: str = "tcp"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix://{self.path}" if self.path else f"{self.scheme}://{host}:{self.port}"


class Config(NamedTuple):
    """The checked environment: variables in lower case, and what the files they name hold."""

    listen_addr: Address
    docker_host: Address
    docker_api_version: str
    host_root: str
    rate_limit: int
    trusted_proxies: Networks
    tls_cert_file: str
    tls_key_file: str
    tls_client_ca_file: str
    max_connections: int
    log_level: str
    keys: tuple[Key, ...]
    server_tls: Optional[ssl.SSLContext]
    engine_tls: Optional[ssl.SSLContext]
    warnings: tuple[str, ...]


class Setting(NamedTuple):
    name: str
    default: str
    meaning: str
    parse: Callable[[str], Any] = str  # raises ValueError


def parse_int(least: int, most: int, text: str) -> int:
    if not (re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= most):
        raise ValueError(f"{text!r} is not an integer from {least} to {most}")
    return int(text)


def parse_text(pattern: str, rule: str, text: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text!r} is not {rule}")
    return text


def parse_socket(path: str) -> str:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"a socket's path has at most {MAX_SOCKET_PATH} bytes")
    return path


def parse_listen(text: str) -> Address:
    """Return the address of ":3000", "127.0.0.1:3000", "[::1]:3000" or "unix:///run/a.sock"."""
    match = re.fullmatch(r"unix://(/.*[^/])|(localhost|[0-9.]*|\[[0-9a-fA-F:.]+\]):([^:]*)", text)
    if not match:
        raise ValueError("write :3000, 127.0.0.1:3000, [::1]:3000 or unix:///path/to/socket")
    path, host, port = match.groups("")
    host = host.strip("[]")
    if host not in ("", "localhost"):
        host = str(ipaddress.ip_address(host))
    return Address(parse_socket(path), host, 0 if path else parse_int(0, 65535, port))


def parse_engine(text: str) -> Address:
    name = r"[a-zA-Z0-9._-]+|\[[0-9a-fA-F:.]+\]"
    match = re.fullmatch(f"unix://(/.*[^/])|(tcp|https?)://({name})(?::([0-9]+))?/?", text)
    if not match:
        raise ValueError(f"{text!r} is not unix:///path, tcp://host:port, http:// or https://")
    path, scheme, host, port = match.groups("")
    number = parse_int(1, 65535, port) if port else 0
    return Address(parse_socket(path), host.strip("[]"), number, scheme or "tcp")


def parse_networks(text: str) -> Networks:
    networks = tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())
    for network in networks:
        if getattr(network.network_address, "ipv4_mapped", None):
            raise ValueError(f"{network} never matches; write it as an IPv4 network")
    return networks


def parse_range(text: str, path: str) -> tuple[int, int]:
    low, high = int(text.split("-")[0]), int(text.split("-")[-1])
    if not 1 <= low <= high <= 65535:
        refuse(path, "must be ports from 1 to 65535, the lower one first")
    return low, high


def parse_expiry(text: str, path: str) -> float:
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()


def full_pattern(pattern: str, path: str) -> str:
    if not pattern.endswith("*"):
        return full_reference(pattern)
    return pattern if pattern == "*" else full_reference(pattern[:-1], tag="") + "*"


parse_version = functools.partial(parse_text, r"(1\.[0-9]{1,3})?", "an API version such as 1.41")
parse_path = functools.partial(parse_text, "(?s:/.*)", "an absolute path")
parse_level = functools.partial(parse_text, "|".join(LEVELS), "debug, info, warning or error")
parse_limit = functools.partial(parse_int, 0, 10**8)
parse_count = functools.partial(parse_int, 1, 10**6)

SETTINGS = (
    Setting("API_KEY", "", "the master key; or set one of the next two"),
    Setting("API_KEY_FILE", "", "file to read the master key from"),
    Setting("KEYS_FILE", "", "JSON file of named keys with limits"),
    Setting("LISTEN_ADDR", ":3000", "or 127.0.0.1:3000, [::1]:3000, unix:///path", parse_listen),
    Setting("DOCKER_HOST", ENGINE_SOCKET, "or tcp://host:port, http://, https://", parse_engine),
    Setting("DOCKER_TLS_VERIFY", "", "when not empty, tcp:// uses TLS"),
    Setting("DOCKER_CERT_PATH", "", "folder of ca.pem, cert.pem and key.pem (~/.docker)"),
    Setting("DOCKER_API_VERSION", "", "such as 1.41; negotiated by default", parse_version),
    Setting("HOST_ROOT", "/host", "where the host's / is mounted; / on a bare host", parse_path),
    Setting("RATE_LIMIT", "100", "requests per 60 s per client; 0 turns it off", parse_limit),
    Setting("TRUSTED_PROXIES", "", "CIDRs whose X-Forwarded-For is believed", parse_networks),
    Setting("TLS_CERT_FILE", "", "certificate (chain) to serve HTTPS with"),
    Setting("TLS_KEY_FILE", "", "its private key"),
    Setting("TLS_CLIENT_CA_FILE", "", "require a client certificate signed by this CA"),
    Setting("MAX_CONNECTIONS", "1024", "connections served at once", parse_count),
    Setting("LOG_LEVEL", "info", "or debug, warning, error", parse_level),
)

KEY_NAME = r"(?!master\Z)[A-Za-z0-9._-]{1,64}"
KEY_NAME_RULE = "1 to 64 of A-Z a-z 0-9 . _ -, and not master"
# A container that mounts one of these, or a folder that holds one, is root on the host.
FORBIDDEN_PATHS = "/proc /sys /dev /run /var/run /var/lib/docker /var/lib/containerd".split()
KEY_PATTERN = r"\*|[a-zA-Z0-9][a-zA-Z0-9_.-]*\*?"
NAMES = array_of(string_schema(KEY_PATTERN, "a name, or its beginning and *", 255, "web-*"))
ABSOLUTE_PATH = r"(?:/(?!\.\.?(?:/|\Z))[^/*:\0]+)+"
PATHS = array_of(string_schema(ABSOLUTE_PATH, "like /srv/web.d: no *, :, /./, /../ or last /"))
# The host part stands in full: ghcr.io* would be ghcr.io.evil.com too.
IMAGE_PATTERN = r"\*|[^*\s]*/[^*\s]*\*?|[^*./\s]+\*?|[^*/\s]+(:[^*/\s]*\*?)?"
EXPIRY = r"(?a:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d))"
PORT_RANGE = string_schema("[0-9]{1,5}(-[0-9]{1,5})?", "8000 or 8000-8099")
LIMITS = {"memory_mb": integer_schema(6, MAX_MEGABYTES), "pids": integer_schema(1, 2**22)}
LIMITS["cpus"] = integer_schema(0.01, 10**6, kind="integer|number")
LIMITS["containers"] = integer_schema(0, 2**31)
KEY_ENTRY = object_schema(
    "name sha256",
    name=string_schema(KEY_NAME, KEY_NAME_RULE),
    sha256=string_schema("[0-9a-f]{64}", "64 digits of 0-9 and a-f; see new-key"),
    master=BOOLEAN,
    expires={**string_schema(EXPIRY, "a time such as 2027-06-30T00:00:00Z"), "check": parse_expiry},
    allow=array_of(one_of(*DECISIONS), ["read", "logs"]),
    images=array_of({**string_schema(IMAGE_PATTERN, "like ghcr.io/a/*"), "check": full_pattern}),
    **dict.fromkeys(("containers", "networks", "volumes"), NAMES),
    **dict.fromkeys(("binds", "files"), PATHS),
    ports=array_of({**PORT_RANGE, "check": parse_range}),
    labels=array_of(string_schema(r"[^*]+\*?|\*", "a label, or its beginning and *")),
    cache=BOOLEAN,
    limits=object_schema("", **LIMITS),
)
KEYS = object_schema("keys", keys=array_of(KEY_ENTRY))


def load_config(environ: Mapping[str, str]) -> Config:
    """Parse the environment; an empty variable counts as unset. Raises ConfigError."""
    values: Json = {}
    problems: list[str] = []
    for name, default, _, parse in SETTINGS:
        try:
            values[name.lower()] = parse(environ.get(name) or default)
        except ValueError as error:
            problems.append(f"{name}: {describe(error)}")
    loaders = {"keys": load_keys, "server_tls": serve_tls, "engine_tls": engine_tls}
    for name, load in ({} if problems else loaders).items():
        try:
            values[name] = load(values)
        except ConfigError as error:
            problems += error.args
    if problems:
        raise ConfigError(*problems)
    values["warnings"] = tuple(config_warnings(values))
    return Config(**{name: values[name] for name in Config._fields})


def config_warnings(values: Json) -> Iterator[str]:
    """Yield a line for each setting that is allowed and unwise."""
    if 0 < len(values["api_key"]) < SHORT_KEY:
        yield f"the master key has under {SHORT_KEY} characters; make one with openssl rand -hex 32"
    for name in "api_key_file", "keys_file":
        if values[name] and os.stat(values[name]).st_mode & stat.S_IROTH:
            yield f"{name.upper()}: others can read {values[name]}; use chmod 600"
    address = values["listen_addr"]
    is_local = address.path or address.host in ("localhost", "::1") or address.host[:4] == "127."
    if not (is_local or values["server_tls"]):
        yield f"LISTEN_ADDR: keys cross the network unencrypted at {address}; set TLS_CERT_FILE"
    if not os.path.isdir(values["host_root"]):
        yield f"HOST_ROOT: {values['host_root']} is not there, so /api/v1/files answers 503"


def load_keys(values: Json) -> tuple[Key, ...]:
    """Return the keys. Raises ConfigError, without any key in it."""
    key, path = os.fsencode(values["api_key"]), values["api_key_file"]
    variable = "API_KEY_FILE" if path else "API_KEY"
    if key and path:
        raise ConfigError(f"{variable}: set this or API_KEY, not both")
    if path:
        with config_errors(variable, path):
            key = read_file(path).removesuffix(b"\n")
        if not key:
            raise ConfigError(f"{variable}: {path} has no key in it")
    if re.search(rb"[\x00-\x1f\x7f]", key) or key != key.strip(b" "):
        raise ConfigError(f"{variable}: remove control characters and outer spaces from the key")
    values["api_key"] = key  # `config_warnings` looks at its length
    keys = [Key("master", hashlib.sha256(key).digest(), master=True)] if key else []
    if path := values["keys_file"]:
        with config_errors("KEYS_FILE", path):
            keys += parse_keys(read_file(path), values)
            for field in "name", "digest":
                if len({getattr(key, field) for key in keys}) < len(keys):
                    refuse("keys", f"two have the same {field}")
    if not keys:
        raise ConfigError("API_KEY: is required; try API_KEY=$(openssl rand -hex 32)")
    return tuple(keys)


def parse_keys(text: bytes, values: Json) -> tuple[Key, ...]:
    """Return the keys of a keys file. Raises ApiError, whose message names the wrong field."""
    keys = []
    for index, entry in enumerate(validate(KEYS, decode_json(text))["keys"]):
        here = f"keys[{index}]"
        if entry.get("master") and not entry.keys() <= {"name", "sha256", "master", "expires"}:
            refuse(f"{here}.master", "stands with expires alone: a master key has no limits")
        for field, path in [(f, path) for f in ("binds", "files") for path in entry.get(f, ())]:
            if place := forbidden_place(path, values):
                refuse(f"{here}.{field}", f"{path} would give away {place}")
        if entry["sha256"] == hashlib.sha256().hexdigest():  # of an unset shell variable
            refuse(f"{here}.sha256", "is that of an empty key, which anybody has")
        entry = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
        keys.append(Key(digest=bytes.fromhex(entry.pop("sha256")), **entry))
    return tuple(keys)


def forbidden_place(path: str, values: Json) -> str:
    """Return the forbidden place that path lies in or contains, "" if there is none."""
    root = os.path.realpath(values["host_root"]).rstrip("/")
    # The agent's own secrets and sockets are forbidden, too.
    paths = [values[name] for name in values if name.endswith(("_file", "_path"))]
    paths += [values["docker_host"].path, values["listen_addr"].path]
    paths.append(os.path.expanduser(DOCKER_FOLDER))
    # abspath leaves two slashes at the beginning as they are.
    absolute: list[str] = ["/" + os.path.abspath(path).lstrip("/") for path in paths if path]
    reals = real_paths(path, root)
    for place in FORBIDDEN_PATHS + absolute:
        # Invariant: both are compared as written, and by where links lead, here and on the host.
        pairs = itertools.product(reals, real_paths(place, root))
        if any(os.path.commonpath(pair) in pair for pair in pairs):
            return place
    return ""


def real_paths(path: str, root: str) -> list[str]:
    """Return a path as written, and where its links lead: here, and on the host below root."""
    paths = [path]
    for each in paths:  # those added here, too: on the host, a link may lead to a link
        for real in os.path.realpath(each), os.path.realpath(root + each):
            real = (real[len(root) :] or "/") if f"{real}/".startswith(f"{root}/") else real
            paths += [real] if real not in paths and len(paths) < 40 else []
    return paths


def read_file(path: str) -> bytes:
    """Return a small file's content. Raises OSError or ValueError."""
    with open(path, "rb") as file:
        content = file.read(MAX_BODY + 1)
    if len(content) > MAX_BODY:
        raise ValueError("the file is too large")
    return content


def serve_tls(values: Json) -> ssl.SSLContext | None:
    """Return the listener's TLS context, if it has one. Raises ConfigError."""
    names = "TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE"
    files = [(name, values[name.lower()]) for name in names]
    given = [name for name, path in files if path]
    for name in names[:2]:
        if given and name not in given:
            raise ConfigError(f"{name}: is required with {given[0]}")
    return tls_context(ssl.PROTOCOL_TLS_SERVER, *files) if given else None


def engine_tls(values: Json) -> ssl.SSLContext | None:
    """Return the TLS context for the Engine, if it uses TLS. Raises ConfigError."""
    scheme, verify = values["docker_host"].scheme, values["docker_tls_verify"]
    if scheme != "https" and not (scheme == "tcp" and verify):
        return None
    if not (verify or values["docker_cert_path"]):  # https:// alone: the system's authorities
        return ssl.create_default_context()
    folder = values["docker_cert_path"] or os.path.expanduser(DOCKER_FOLDER)
    paths = [os.path.join(folder, name) for name in ("cert.pem", "key.pem", "ca.pem")]
    if not any(map(os.path.exists, paths[:2])):  # a client's certificate is optional
        paths[:2] = "", ""
    return tls_context(ssl.PROTOCOL_TLS_CLIENT, *(("DOCKER_CERT_PATH", path) for path in paths))


def tls_context(protocol: Any, *files: tuple[str, str]) -> ssl.SSLContext:
    """Return a context; files: certificate, key, CA, each (variable, path). Raises ConfigError."""
    # Not create_default_context, which from Python 3.13 on refuses certificates made as Docker's
    # manual says. PROTOCOL_TLS_CLIENT verifies the certificate and the host's name, too.
    cert, key, ca = files
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Renegotiation costs the server more than the client, so it would be a way to overload it.
    context.options |= ssl.OP_NO_RENEGOTIATION
    if cert[1]:
        with config_errors(*cert):  # by itself: below, an error would be taken for the key's
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
def config_errors(variable: str, value: object) -> Iterator[None]:
    """Turn an error into a ConfigError that names the variable and its value."""
    try:
        yield
    except (OSError, ValueError, ApiError) as error:
        rule = describe(error).removeprefix("body: ")  # said of a request, not of a file
        raise ConfigError(f"{variable}: {value}: {rule}") from error


def refuse_password() -> str:
    """Refuse an encrypted key: OpenSSL would ask for its password on the terminal."""
    raise OSError(errno.EINVAL, "the private key is encrypted")


# --------------------------------------------------------------------------------------------------
# Logging: one JSON object a line on standard output
# --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def utc_time(second: int) -> str:
    """Return Unix seconds as RFC 3339 in UTC, without the Z: "2026-02-21T10:00:00"."""
    moment = datetime.datetime.fromtimestamp(second, datetime.timezone.utc)
    return moment.isoformat().replace("+00:00", "")


class Log:
    """Writes log lines to stdout; drops and counts them rather than wait for a slow reader."""

    def __init__(self, level: str) -> None:
        self._rank, self._descriptor = LEVELS[level], 1
        with contextlib.suppress(OSError):
            if os.isatty(1):
                # A terminal polls writable while one byte fits, and may be stopped (Ctrl-S). It is
                # opened anew, so that it stays blocking for the other programs on it.
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._descriptor = os.open("/proc/self/fd/1", flags)
        self._mend = b""  # ends the line that a full disk cut short
        self._dropped, self._lock = 0, threading.Lock()
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def __call__(self, level: str, msg: str, **fields: Any) -> None:
        if LEVELS[level] < self._rank:
            return
        second, millisecond = divmod(time.time_ns() // 10**6, 1000)
        moment = f"{utc_time(second)}.{millisecond:03d}Z"
        record = {"time": moment, "level": level, "msg": msg, **fields}
        with self._lock:
            if self._dropped:
                record["dropped"] = self._dropped
            line, written = self._mend + fit_line(record), 0
            # A full disk, a closed pipe or a stopped reader must not end a request.
            with contextlib.suppress(OSError):
                # Invariant: a full pipe never blocks. It polls writable only while PIPE_BUF bytes
                # fit, and no line is longer.
                if self._poll.poll(0):
                    written = os.write(self._descriptor, line)
                    self._mend = b"\n" if written < len(line) else b""
            self._dropped = self._dropped + 1 if written < len(line) else 0


def describe_bug(error: BaseException | None) -> str:
    """Return where an error was raised, and its class; its message may contain client data."""
    import traceback  # loaded here because no start should wait for it

    places = traceback.format_tb(error.__traceback__ if error else None, limit=-8)
    return "".join(places) + type(error).__name__


def fit_line(record: Json) -> bytes:
    """Return record as one line of at most PIPE_BUF bytes of JSON, its strings cut to fit."""
    line = json.dumps(record)  # in ASCII, every control escaped: no field can end its line
    for longest in (2000, 500, 100, 20):
        if len(line) < select.PIPE_BUF:
            break
        line = json.dumps(cut_strings(record, longest))
    return line.encode() + b"\n"


def cut_strings(value: Any, longest: int) -> Any:
    if isinstance(value, dict):
        return {name: cut_strings(member, longest) for name, member in value.items()}
    return value[:longest] if isinstance(value, str) else value


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
    """Return the address a request is counted under; peer is "" on a Unix socket."""
    client = parse_ip(peer)
    if client is None:
        return "unix"
    # X-Forwarded-For is believed only as far as the hop that wrote it is trusted: the right-most
    # address that no trusted proxy has is the client.
    for hop in reversed(forwarded.split(",")):
        address = parse_ip(re.sub(HOP_PORT, r"\1\2", hop.strip()))
        if address is None or not any(client in network for network in trusted):
            break
        client = address
    return str(client)


class RateLimiter:
    """Exact sliding windows: no RATE_WINDOW seconds admit more than `limit` of one client."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # By client and key name, the least recently used first.
        self._windows: dict[tuple[str, str], array.array[float]] = {}

    def admit(self, client: str, key: str) -> dict[str, str]:
        """Count one request, unless it is refused; return its headers. Raises ApiError (429)."""
        # Each key ("": none) has a window of its own, so that a stranger behind the same address
        # cannot lock a key holder out.
        if not self._limit:
            return {}
        if ":" in client:  # one IPv6 client may use its whole /64
            client = str(ipaddress.IPv6Network((client, 64), strict=False))
        with self._lock:
            now = self._clock()
            times = self._windows.pop((client, key), None) or array.array("d")
            del times[: bisect.bisect_right(times, now - RATE_WINDOW)]
            is_admitted = len(times) < self._limit
            if is_admitted:
                times.append(now)
            left = self._limit - len(times)
            wait = max(1, math.ceil(times[0] - now + RATE_WINDOW))
            self._windows[client, key] = times
            # Invariant: the table is bounded. None of its windows is empty, and the newest stays.
            while True:
                least_recent, oldest = next(iter(self._windows.items()))
                if oldest[-1] > now - RATE_WINDOW and len(self._windows) <= MAX_CLIENTS:
                    break
                del self._windows[least_recent]
        numbers = {"Limit": self._limit, "Remaining": left, "Reset": wait}
        headers = {f"X-RateLimit-{name}": str(number) for name, number in numbers.items()}
        if not is_admitted:
            message = f"more than {self._limit} requests in 60 seconds; retry in {wait} s"
            raise ApiError(429, message, {**headers, "Retry-After": str(wait)})
        return headers


# --------------------------------------------------------------------------------------------------
# Sockets: waits with a deadline
# --------------------------------------------------------------------------------------------------


class Interrupts(NamedTuple):
    """What ends a wait early: the client disconnecting, or the agent stopping."""

    client: Optional[socket.socket] = None
    stop: Optional[socket.socket] = None  # becomes readable when the agent stops

    def wait_readable(self, sock: socket.socket, deadline: float) -> bool:
        """Return whether sock can be read by deadline (monotonic). Raises ClientGone, Stopping."""
        if isinstance(sock, ssl.SSLSocket) and sock.pending():
            return True
        poll = select.poll()  # select() cannot take descriptors past 1023
        poll.register(sock, select.POLLIN)
        if self.client:  # POLLRDHUP is reported even while there are bytes to read
            poll.register(self.client, select.POLLRDHUP)
        if self.stop:
            poll.register(self.stop, select.POLLIN)
        seconds = deadline - time.monotonic()
        ready = dict(poll.poll(max(0, math.ceil(seconds * 1000))))
        if self.stop and self.stop.fileno() in ready:
            raise Stopping(503, "the agent is stopping; try again later")
        if sock.fileno() in ready or not ready:
            return bool(ready)
        # The client has disconnected, or has only shut down its sending half (as nc -N does) and
        # waits for the response: it gets one that comes within HALF_CLOSED seconds.
        patience = time.monotonic() + HALF_CLOSED
        is_readable = self._replace(client=None).wait_readable(sock, min(deadline, patience))
        if not is_readable and patience <= deadline:
            raise ClientGone
        return is_readable


NEVER = Interrupts()


def receive(
    sock: socket.socket, deadline: float, interrupts: Interrupts = NEVER, size: int = RECV_SIZE
) -> bytes:
    """Return the next bytes of a non-blocking socket, b"" at the end.

    Raises socket.timeout past deadline (monotonic), OSError, ClientGone and Stopping.
    """
    # Invariant: a peer that never stops sending is held to the deadline, too.
    while interrupts.wait_readable(sock, deadline) and time.monotonic() < deadline:
        try:
            return sock.recv(size)
        except (BlockingIOError, ssl.SSLWantReadError):
            continue  # a TLS socket can be readable with nothing in it for us
    raise socket.timeout("timed out")


def send(sock: socket.socket, data: memoryview, deadline: float) -> int:
    """Send a first part of data; return its size. Raises OSError, a timeout at the deadline."""
    while True:
        # Only TLS renegotiation, which is turned off, would have to read before it can send.
        try:
            return sock.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError):
            poll = select.poll()
        poll.register(sock, select.POLLOUT)
        if not poll.poll(max(0, math.ceil((deadline - time.monotonic()) * 1000))):
            raise socket.timeout("timed out")


# --------------------------------------------------------------------------------------------------
# Requests: one request, its route, its response and its body
# --------------------------------------------------------------------------------------------------

Fields = dict[str, list[str]]  # header values by lower-case name


class Request:
    """One request and its outcome; Connection.answer sets the attributes in this order."""

    def __init__(self, client: str, interrupts: Interrupts, slots: Collection[Slot]) -> None:
        self.started = time.monotonic()
        self.id = secrets.token_hex(8)
        self.client = client  # the address that the limiter and the log know
        self.interrupts = interrupts
        self.slots = slots  # all connections being served
        self.method = ""
        self.minor = 1  # of the HTTP version
        self.path = ""  # as it was sent, with the query
        self.fields: Fields = {}
        self.length: int | None = 0  # of the body in bytes; None if it is chunked
        self.is_unread = True  # whether bytes of the body may still come
        self.key = STRANGER  # until a valid key was shown
        self.limit_headers: Mapping[str, str] = {}
        self.route: Route | None = None
        self.name = ""  # the parameter in the path
        self.query: Json = {}
        self.body: Json = {}
        self.folder: str | None = None  # where a limited key's files are
        self.target: Json = {}  # what is acted upon, for the log: {"id", "name"}, {"path"}...
        self.status = 0  # once a response has begun
        self.error = ""  # what is wrong, for the log
        self.sent = 0  # bytes of the response's body

    def header(self, name: str) -> str:
        """Return a header's value, "" if it is absent. Raises ApiError (400) if it is repeated."""
        values = self.fields.get(name.lower(), [""])
        if len(values) > 1:
            raise ApiError(400, f"{name}: is given more than once")
        return values[0]

    def log_fields(self, seconds: float | None = None) -> Json:
        """Return the request's fields of a log line. seconds: how long it took, at its end."""
        # Invariant: no path as sent, query, header or body is here; a name, with a valid key only.
        fields: Json = {"method": self.method[:16], "route": self.route.path if self.route else ""}
        fields.update(status=self.status, request_id=self.id, client_ip=self.client)
        if self.key.name:
            asked = {"name": self.name} if self.name else {}  # of a request that was refused
            fields.update(key=self.key.name, target=self.target or asked)
        if seconds is not None:
            fields.update(latency_ms=round(seconds * 1000, 3), bytes=max(0, self.sent))
        return {**fields, "error": self.error} if self.error else fields


class Response(NamedTuple):
    """A response: bytes, or a stream of them. A body other than bytes is sent as JSON."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = {}
    stream: Optional[Generator[bytes, None, None]] = None


def refusal(error: ApiError) -> Response:
    return Response(envelope(error), error.status, error.headers)


class Route(NamedTuple):
    """All that is known of one operation."""

    method: str
    path: str  # "{id}" stands for a container's id or name, "{name}" for a name
    endpoint: Callable[[Request, Any], Response]
    permission: str  # the word that a limited key must name, or PUBLIC
    body: Optional[Schema] = None  # None: a body is refused
    query: Schema = NOTHING


def check_routes(*routes: Route) -> tuple[Route, ...]:
    """Return routes. Raises ValueError for one with no permission that `decide` knows."""
    for route in routes:
        if route.permission not in (PUBLIC, MASTER_ONLY, *DECISIONS):
            raise ValueError(f"{route.method} {route.path} has no permission")
    return routes


def read_chunks(connection: Connection) -> bytes:
    """Return the content of a chunked body (RFC 9112 section 7.1). Raises ApiError, ClientGone."""
    content = bytearray()
    while True:
        # Invariant: neither a chunk's line nor the trailer is waited for without a bound.
        line = connection.receive_until(b"\r\n", MAX_CHUNK_LINE, 400, "line of a chunk is")
        match = re.fullmatch(CHUNK_LINE, line)
        if not match:
            raise ApiError(400, "body: bad chunked coding")
        size = int(match[1], 16)
        if len(content) + size > MAX_BODY:
            raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
        connection.take(len(line))
        if not size:
            connection.take_fields(MAX_TRAILER, 400, "trailer is")
            return bytes(content)
        chunk = connection.take(size + 4)  # with the CRLF before it and the one behind it
        if not chunk.endswith(b"\r\n"):
            raise ApiError(400, "body: bad chunked coding")
        content += chunk[2:-2]


def read_body(connection: Connection, request: Request, route: Route) -> None:
    """Read and check the JSON of the body. Raises ApiError or ClientGone."""
    expected = [value.lower() for value in request.fields.get("expect", ()) if request.minor]
    if expected not in ([], ["100-continue"]):
        raise ApiError(417, "Expect: only 100-continue is understood")
    if request.length is not None and request.length > MAX_BODY:
        raise ApiError(413, f"the body is longer than {MAX_BODY} bytes")
    if route.body is None:
        if request.length != 0:
            raise ApiError(400, "body: none is taken here; parameters go into the URL: ?name=value")
        return
    if expected and request.length != 0 and not connection.buffer:
        connection.write(request, b"HTTP/1.1 100 Continue\r\n\r\n")
    # A stop lets a request in flight finish, so it does not interrupt this.
    connection.deadline, connection.interrupts = time.monotonic() + BODY_TIMEOUT, NEVER
    data = read_chunks(connection) if request.length is None else connection.take(request.length)
    request.is_unread = False
    if route.body["required"] or data.strip(b" \t\r\n") not in (b"", b"null"):
        request.body = validate(route.body, decode_json(data))


# --------------------------------------------------------------------------------------------------
# HTTP handler: read the head, limit, authorise, route, read the body, respond
# --------------------------------------------------------------------------------------------------

PARAMETER = 4  # where in a path its parameter is: /api/v1/containers/{id}/logs
# By the segments of a path, with None for its parameter; then by method.
RouteTable = dict[tuple[Optional[str], ...], dict[str, Route]]


def route_table(routes: Iterable[Route]) -> RouteTable:
    table: RouteTable = {}
    for route in routes:
        segments = tuple(None if part[:1] == "{" else part for part in route.path.split("/"))
        methods = ("GET", "HEAD") if route.method == "GET" else (route.method,)
        table.setdefault(segments, {}).update(dict.fromkeys(methods, route))
    return table


def find_route(table: RouteTable, method: str, segments: list[str]) -> tuple[Route, str]:
    """Return a route and the parameter in its path. Raises ApiError (400, 404, 405)."""
    methods, name = table.get(tuple(segments)), None
    if not methods and len(segments) > PARAMETER:
        name = segments[PARAMETER]
        methods = table.get((*segments[:PARAMETER], None, *segments[PARAMETER + 1 :]))
    if not methods:
        raise ApiError(404, "there is no such path: most begin with /api/v1, none ends in a slash")
    if method not in methods:
        options = ", ".join(methods)
        raise ApiError(405, f"use {options} here", {"Allow": options})
    # Invariant: only what matches reaches an Engine URL, and it is quoted there anyway.
    if name is not None and not re.fullmatch(CONTAINER, name):
        raise ApiError(400, f"an id or name in the path is {NAME_RULE}")
    return methods[method], name or ""


def body_length(fields: Fields) -> int | None:
    """Return the length of a body in bytes; None: chunked (RFC 9112 section 6). Raises ApiError."""
    # Framing that two parsers may read differently would smuggle requests in, behind a proxy.
    lengths, codings = fields.get("content-length", []), fields.get("transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        raise ApiError(400, "more than one Content-Length or Transfer-Encoding")
    if codings:
        if codings[0].lower() != "chunked":
            raise ApiError(501, "Transfer-Encoding: only chunked is understood")
        return None
    if not lengths:
        return 0
    if not re.fullmatch("[0-9]+", lengths[0]):
        raise ApiError(400, "Content-Length must be plain digits")
    # 18 digits are past every limit here; int() of thousands would take its time.
    return int(lengths[0].lstrip("0")[:18] or "0")


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    return email.utils.formatdate(second, usegmt=True)


class Connection(socketserver.BaseRequestHandler):
    """One connection: its requests, one after the other, each logged.

    Not http.server's BaseHTTPRequestHandler: none of its lax parsing or HTML errors is reachable.
    """

    server: Server

    def setup(self) -> None:
        self.slot: Slot = self.request
        self.sock = self.slot.sock
        self.until_stop = Interrupts(stop=self.server.stopping)
        self.buffer = bytearray()  # received, and not yet taken
        self.deadline = time.monotonic() + HEAD_TIMEOUT  # monotonic; for the next bytes received
        self.interrupts = self.until_stop  # what ends a wait for them early
        self.is_kept = True  # whether another request is read
        self.has_answered = False  # whether `finish` gives the client time to read what was sent
        self.sock.setblocking(False)
        if self.sock.family != socket.AF_UNIX:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A client whose machine has died is dropped as soon as one that reads nothing.
            timeout = int(WRITE_TIMEOUT * 1000)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)

    def handle(self) -> None:
        if context := self.server.config.server_tls:
            self.is_kept = self.shake_hands(context)
        while self.is_kept and self.wait_for_request():
            self.serve()
            idle = STRANGER_IDLE_TIMEOUT if self.slot.key is STRANGER else IDLE_TIMEOUT
            self.deadline = time.monotonic() + idle

    def shake_hands(self, context: ssl.SSLContext) -> bool:
        """Return whether the connection is a TLS one now."""
        try:
            tls = context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock = self.slot.sock = tls
            while self.until_stop.wait_readable(self.sock, self.deadline):
                with contextlib.suppress(ssl.SSLWantReadError):
                    self.sock.do_handshake()
                    # Invariant: nothing is read before the handshake has happened. Some Pythons
                    # skip it for a socket that was reset, and read plain text (CVE-2023-40217).
                    return self.sock.version() is not None
        except (Stopping, OSError, ValueError) as error:
            # A TLS alert says why, such as that a certificate is required: let it be read.
            self.has_answered = isinstance(error, ssl.SSLError)
            self.server.log("debug", "handshake failed", error=describe(error))
        return False

    def finish(self) -> None:
        """Half-close, then drain: a reset would discard the response (RFC 9112 section 9.6)."""
        with contextlib.suppress(OSError, ValueError, Stopping):
            deadline = time.monotonic() + LINGER_TIMEOUT
            if isinstance(self.sock, ssl.SSLSocket):
                with contextlib.suppress(OSError, ValueError):
                    self.sock.unwrap()  # sends close_notify, and does not wait for the client's
            self.sock.shutdown(socket.SHUT_WR)
            while self.has_answered and receive(self.sock, deadline, self.interrupts):
                pass

    def wait_for_request(self) -> bool:
        """Return whether a request begins in time; False too if the agent stops."""
        with contextlib.suppress(OSError, Stopping):
            while True:
                start = EMPTY_LINES.sub(b"", self.buffer)
                # Invariant: even empty lines are taken only up to a bound.
                if len(self.buffer) - len(start) > MAX_REQUEST_LINE:
                    break
                if start not in (b"", b"\r"):
                    self.buffer = bytearray(start)
                    return True
                if not (data := receive(self.sock, self.deadline, self.until_stop)):
                    break
                self.buffer += data
        # Only if there are bytes that nobody has read does the close discard the last response.
        self.has_answered = self.has_answered and NEVER.wait_readable(self.sock, 0)
        return False

    def serve(self) -> None:
        """Answer one request and log it. The one place where errors become responses."""
        interrupts = Interrupts(self.sock, self.server.stopping)
        request = Request(self.client_address, interrupts, self.server.slots)
        try:
            try:
                self.respond(request, self.answer(request))
            except ApiError as error:
                request.error = error.message
                self.respond_error(request, error)
        except ClientGone:
            self.is_kept = False
        except Exception as bug:
            self.server.log("error", "bug", request_id=request.id, traceback=describe_bug(bug))
            request.error = f"an internal error; the agent's log has it under {request.id}"
            with contextlib.suppress(ClientGone):
                self.respond_error(request, ApiError(500, request.error))
        finally:
            self.slot.request, self.slot.is_streaming = None, False
        seconds = time.monotonic() - request.started
        level = "error" if request.status >= 500 else "info"
        self.server.log(level, "request", **request.log_fields(seconds))
        self.server.agent.metrics.observe(request, seconds)

    def receive_more(self) -> None:
        try:
            data = receive(self.sock, self.deadline, self.interrupts)
        except socket.timeout as error:
            raise ApiError(408, "the rest of the request did not arrive in time") from error
        except OSError as error:
            raise ClientGone from error
        if not data:
            raise ApiError(400, "the connection ended within the request")
        self.buffer += data

    def take(self, size: int) -> bytes:
        """Receive so many bytes and remove them from the buffer. Raises ApiError, ClientGone."""
        while len(self.buffer) < size:
            self.receive_more()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def receive_until(self, end: bytes, limit: int, status: int, what: str) -> bytes:
        """Return the bytes before end; remove neither. Raises ApiError as early as possible."""
        scanned = 0  # so that a head in tiny pieces costs no more
        while True:
            # Invariant: the head is bounded before any of it is parsed. CRs and LFs at the end of
            # the part do not count: they may be the beginning of `end`, or are refused below.
            part, found, _ = self.buffer[: limit + len(end)].partition(end)
            if len(part.rstrip(b"\r\n")) > limit:
                raise ApiError(status, f"the {what} longer than {limit} bytes")
            if found:
                return bytes(part)
            if LONE_CONTROL.search(part, scanned):
                raise ApiError(400, "there is a bare CR, a bare LF or a NUL in the request")
            scanned = len(part) - 1
            self.receive_more()

    def take_fields(self, limit: int, status: int, what: str) -> Fields:
        """Take header lines and the CRLF before them (RFC 9112 section 5). Raises ApiError."""
        block = self.take(len(self.receive_until(b"\r\n\r\n", limit, status, what)) + 4)[2:-2]
        if block.count(b"\n") > MAX_FIELDS:
            raise ApiError(431, f"there are more than {MAX_FIELDS} headers")
        # Invariant: header lines are matched by the grammar before any other code sees them.
        if not FIELD_BLOCK.fullmatch(block):
            raise ApiError(400, "a header line is not of the form Name: value")
        fields: Fields = {}
        for line in block.decode("latin-1").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            fields.setdefault(name.lower(), []).append(value.strip(" \t"))
        return fields

    def read_head(self, request: Request) -> None:
        """Take the next request's head from the buffer. Raises ApiError."""
        self.deadline, self.interrupts = time.monotonic() + HEAD_TIMEOUT, self.until_stop
        line = self.receive_until(b"\r\n", MAX_REQUEST_LINE, 414, "request line is")
        # Invariant: the line is matched by the grammar before any other code sees it.
        if not REQUEST_LINE.fullmatch(line):
            raise ApiError(400, "the request line is not of the form: GET /path HTTP/1.1")
        request.method, request.path, version = line.decode().split(" ")
        if version not in ("HTTP/1.0", "HTTP/1.1"):
            raise ApiError(505, "use HTTP/1.1 or HTTP/1.0")
        request.minor = int(version[-1])
        self.take(len(line))  # its CRLF stays: it ends a head without headers
        request.fields = self.take_fields(MAX_FIELD_BLOCK, 431, "headers are")

    def check_head(self, request: Request) -> None:
        """Take the client and the body's length from the headers. Raises ApiError (400, 501)."""
        fields = request.fields
        request_id = ",".join(fields.get("x-request-id", []))
        if re.fullmatch(REQUEST_ID, request_id):
            request.id = request_id
        if forwarded := ",".join(fields.get("x-forwarded-for", [])):
            trusted = self.server.config.trusted_proxies
            request.client = client_address(request.client, forwarded, trusted)
        hosts = fields.get("host", [])
        if len(hosts) > 1 or (request.minor and not hosts):
            raise ApiError(400, "Host: must be given once")
        if not HOST_VALUE.fullmatch("".join(hosts)):
            raise ApiError(400, "Host: is not a host and port")
        target = ABSOLUTE_FORM.match(request.path)
        if target and not (target[1] and HOST_VALUE.fullmatch(target[1])):
            raise ApiError(400, "the request line has no valid host in it")
        if not request.minor and "transfer-encoding" in fields:
            raise ApiError(400, "Transfer-Encoding: HTTP/1.0 has none")
        request.length = body_length(fields)
        request.is_unread = request.length != 0
        options = ",".join(fields.get("connection", [])).lower().split(",")
        self.is_kept = request.minor == 1 and "close" not in map(str.strip, options)

    def answer(self, request: Request) -> Response:
        """Check one request, in the order that reveals least to a stranger; return its response."""
        self.read_head(request)
        self.check_head(request)
        self.server.begin_answer(self.slot, request)
        path, _, query = ABSOLUTE_FORM.sub("", request.path).partition("?")
        segments = [unquote(segment, errors="replace") for segment in path.split("/")]
        is_public = segments[:3] != API.split("/") and segments != ["", "metrics"]
        if not is_public:
            self.authorise(request)
        request.route, request.name = find_route(self.server.routes, request.method, segments)
        if is_public:
            # Invariant: nothing that a stranger sent is repeated, so no name in a query is.
            if query or request.length != 0:
                raise ApiError(400, "neither a query nor a body is taken here")
            return request.route.endpoint(request, self.server.agent)
        request.key.permit_name("allow", request.route.permission)
        request.query = decode_query(query, request.route.query, request.route.body)
        read_body(self, request, request.route)
        # Invariant: before a rule allows this, the Engine is asked only what the rule must know.
        decide(request, request.route.permission, self.server.agent.engine.ask)
        return request.route.endpoint(request, self.server.agent)

    def authorise(self, request: Request) -> None:
        """Count the request and find its key. Raises ApiError (401, 429, 503)."""
        shown = request.fields.get("x-api-key", [])
        for value in request.fields.get("authorization", []):
            scheme, _, credentials = value.partition(" ")
            if scheme.lower() == "bearer":  # another scheme is a proxy's concern
                shown = [*shown, credentials.strip(" ")]
        if len(shown) == 1:
            request.key = find_key(self.server.config.keys, shown[0].encode("latin-1"))
        request.limit_headers = self.server.limiter.admit(request.client, request.key.name)
        if request.key is STRANGER:
            problems = ("a key is needed", "the key is wrong", "the key is given more than once")
            message = f"{problems[min(len(shown), 2)]}; send X-API-Key: KEY"
            raise ApiError(401, message, {"WWW-Authenticate": 'Bearer realm="dockeragent"'})
        if not self.server.note_key(self.slot, request.key):
            self.is_kept = False
            message = f"key {request.key.name} has too many connections; close some of them"
            raise ApiError(503, message, {"Retry-After": "1"})

    def respond_error(self, request: Request, error: ApiError) -> None:
        if not request.method and self.buffer.startswith(b"HEAD "):
            request.method = "HEAD"  # not even a response that refuses its head has a body
        if request.status:  # the head was sent: only the missing end of the body can tell now
            self.is_kept = False
        else:
            self.respond(request, refusal(error))

    def respond(self, request: Request, response: Response) -> None:
        """Send a response. Raises ClientGone, and ApiError from within a stream."""
        if response.stream is None:
            is_bytes = isinstance(response.body, bytes)
            body = response.body if is_bytes else encode_json(response.body) + b"\n"
            self.send_head(request, response, {"Content-Length": str(len(body))}, body)
            return
        chunk = (lambda data: b"%x\r\n%b\r\n" % (len(data), data)) if request.minor else bytes
        with contextlib.closing(response.stream) as stream:
            pieces = filter(None, stream)  # an empty chunk is the last: RFC 9112 section 7.1
            first = chunk(next(pieces))
            framed = {"Transfer-Encoding": "chunked"} if request.minor else {}
            self.slot.is_streaming = True
            request.status = response.status
            self.server.log("info", "stream", **request.log_fields())
            self.send_head(request, response, framed, first)
            if request.method == "HEAD":
                return
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER)
            for piece in itertools.chain(pieces, (b"",)):
                self.write(request, chunk(piece))

    def send_head(
        self, request: Request, response: Response, framed: Mapping[str, str], body: bytes
    ) -> None:
        """Send the head and the first part of the body (no body for HEAD)."""
        # Invariant: after a response that leaves body bytes unread, the connection closes.
        self.is_kept = self.is_kept and not request.is_unread
        request.status = response.status
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
        headers |= {**request.limit_headers, **response.headers, **framed}
        if not self.is_kept:
            headers["Connection"] = "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        # No text from the request is in it that has not matched a pattern.
        head = (
            f"HTTP/1.1 {request.status} {PHRASES[request.status]}\r\n{lines}"
            f"X-Request-ID: {request.id}\r\nDate: {http_date(int(time.time()))}\r\n"
            "X-Content-Type-Options: nosniff\r\n\r\n"
        ).encode("latin-1")
        request.sent = -len(head)  # so that the body's bytes are counted
        left = memoryview(b"" if request.method == "HEAD" else body)
        # In two parts: no copy is held of a large body that a client reads slowly.
        self.write(request, head + left[:RECV_SIZE])
        self.write(request, left[RECV_SIZE:])

    def write(self, request: Request, data: bytes | memoryview) -> None:
        """Send data. Raises ClientGone if the client disconnects or reads nothing for too long."""
        left = memoryview(data)
        self.has_answered, self.interrupts = True, NEVER  # `finish` lets it be read, at a stop too
        # Responses to strangers are small and fit the socket's buffer, so a stranger that does not
        # read is dropped at once: it must not hold its connection's slot.
        patience = 0 if self.slot.key is STRANGER else WRITE_TIMEOUT
        try:
            while left:
                size = send(self.sock, left, time.monotonic() + patience)
                request.sent += size
                left = left[size:]
        except OSError as error:
            self.has_answered = False
            raise ClientGone from error


# --------------------------------------------------------------------------------------------------
# Server: connection slots, stop and wait
# --------------------------------------------------------------------------------------------------


class Slot:
    """A connection's right to a thread, and what decides whether it must make room for another."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.key = STRANGER  # the last valid key that was shown on it
        self.since = time.monotonic()  # when it was opened, or its last complete request came
        self.request: Request | None = None  # the one in flight
        self.is_streaming = False


class Server(http.server.ThreadingHTTPServer):
    """Serves each connection in a thread, MAX_CONNECTIONS of them at once."""

    daemon_threads = True

    def __init__(
        self, config: Config, log: Log, listener: socket.socket, routes: Iterable[Route], agent: Any
    ) -> None:
        """agent: handed to the endpoints; its metrics observe each request and its seconds."""
        super().__init__(("", 0), Connection, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.config, self.log, self.agent = config, log, agent
        self.routes = route_table(routes)
        self.limiter = RateLimiter(config.rate_limit)
        self.slots: set[Slot] = set()
        self.stopping, self._stop = socket.socketpair()  # the first can be read once we stop
        self._lock = threading.Lock()  # of the slots
        self._refused: collections.deque[tuple[float, socket.socket]] = collections.deque()

    def get_request(self) -> tuple[Any, str]:
        """Return a connection's slot and the client's IP address, "unix" over a Unix socket."""
        try:
            sock, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)  # the connection stays queued; do not spin until one ends
            raise
        return Slot(sock), client_address(address[0] if isinstance(address, tuple) else "", "", ())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection (request: its Slot), or refuse it without waiting."""
        # Invariant: never more slots than MAX_CONNECTIONS. Only this thread adds one.
        if len(self.slots) < self.config.max_connections or self._make_room():
            self.slots.add(request)
            try:
                super().process_request(request, client_address)
                return
            except RuntimeError:  # no thread can be started until another ends
                self.slots.discard(request)
                self._make_room()
        self._refuse(request.sock, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and free its slot: its thread ends, or could not be started."""
        request.sock.close()
        self.slots.discard(request)

    def _make_room(self) -> bool:
        """Revoke the slot of the stranger who was idle longest; return whether there was one."""
        # Invariant: strangers cannot keep a key holder out by holding connections.
        with self._lock:
            slots = [s for s in list(self.slots) if s.key is STRANGER and not s.request]
            if not slots:
                return False
            slot = min(slots, key=lambda slot: slot.since)
            self.slots.discard(slot)
            # The connection's own thread closes it: here the descriptor could be another's by now.
            # Not SSLSocket.shutdown, after which that thread would read plain text.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(slot.sock, socket.SHUT_RDWR)
        return True

    def begin_answer(self, slot: Slot, request: Request) -> None:
        """Note that a complete request came. Raises ClientGone if its slot has been revoked."""
        with self._lock:
            slot.since, slot.request = time.monotonic(), request
            if slot not in self.slots:
                raise ClientGone

    def note_key(self, slot: Slot, key: Key) -> bool:
        """Note that a valid key was shown on a connection; return whether the key may have it."""
        # Invariant: one limited key cannot keep the others out, nor all of them the master. One
        # holds at most a quarter of all connections, all together three quarters.
        with self._lock:
            if slot.key is not key and not key.master:
                limited = [s.key for s in list(self.slots) if s.key.name and not s.key.master]
                most = max(1, self.config.max_connections // 4)
                if limited.count(key) >= most or len(limited) >= 3 * most:
                    return False
            slot.key = key
        return True

    def _refuse(self, sock: socket.socket, client: str) -> None:
        """Send a 503 without waiting, and leave the connection open a moment so that it is read."""
        refused = Request(client, NEVER, self.slots)
        refused.status, refused.error = 503, "too many connections; try again later"
        body = encode_json(envelope(ApiError(503, refused.error))) + b"\n"
        refused.sent = len(body)
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-ID: {refused.id}\r\n"
            "Retry-After: 1\r\nConnection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            sock.setblocking(False)
            if not self.config.server_tls:  # nothing can be sent before a handshake
                sock.send(head.encode() + body)
            sock.shutdown(socket.SHUT_WR)
        self._refused.append((time.monotonic() + 1, sock))
        self.log("warning", "request", **refused.log_fields(0))
        self.agent.metrics.observe(refused, 0)

    def service_actions(self) -> None:
        """Close refused connections. `serve_forever` calls this at least twice a second."""
        now, refused = time.monotonic(), self._refused
        while len(refused) > MAX_LINGERING_REFUSALS or (refused and refused[0][0] < now):
            refused.popleft()[1].close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.log("error", "bug", traceback=describe_bug(sys.exc_info()[1]))

    def stop(self) -> None:
        """Stop accepting; wake the streams and the idle connections."""
        if path := self.config.listen_addr.path:  # first: later it may be the next agent's
            with contextlib.suppress(OSError):
                os.unlink(path)
        with contextlib.suppress(OSError):  # makes it readable, which wakes serve_forever
            self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.socket.close()
        self._stop.close()

    def server_close(self) -> None:
        super().server_close()
        for _, sock in self._refused:
            sock.close()
        self.stopping.close()


# --------------------------------------------------------------------------------------------------
# Files: written completely or not at all, and never outside the root
# --------------------------------------------------------------------------------------------------

FILE_ERRORS = {
    errno.EACCES: (403, "check the file's owner, or run the agent as root"),
    errno.EPERM: (403, "check lsattr, the mount's options and the agent's capabilities"),
    errno.EROFS: (403, "mount the host's filesystem without :ro"),
    errno.ENOSPC: (507, "make room on the disk"),
    errno.EDQUOT: (507, "the owner's quota is used up"),
    errno.EFBIG: (507, "the filesystem or a limit allows no file of this size"),
    errno.ENAMETOOLONG: (400, "a name has at most 255 bytes on most filesystems"),
    errno.EINVAL: (400, "the filesystem does not take this name or content"),
    errno.ENOENT: (404, "check the path"),
    errno.ENOTDIR: (409, "a part of the path is not a folder"),
    errno.EISDIR: (409, "there is a folder in the file's place"),
    errno.ENOTEMPTY: (409, "there is a folder in the file's place"),
    errno.EAGAIN: (409, "another program holds a lease on the file; try again"),
    errno.ETXTBSY: (409, "the file is being executed; write it with atomic true"),
    errno.EBUSY: (409, "the file is a mount point; write it with atomic false"),
    errno.EMFILE: (503, "the agent has too many files open"),
    errno.ENFILE: (503, "the host has too many files open"),
}
FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
ACCESS_LIST = "system.posix_acl_access"
Attributes = tuple[int, int, int]  # uid, gid, mode


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Turn an OSError into the ApiError that tells the client what to do."""
    try:
        yield
    except OSError as error:
        status, advice = FILE_ERRORS.get(error.errno or 0, (500, "see the host's kernel log"))
        raise ApiError(status, f"path: {error.strerror}: {advice}") from error


@contextlib.contextmanager
def if_supported() -> Iterator[None]:
    """Go on without what the filesystem cannot do. Raises any other OSError."""
    try:
        yield
    except OSError as error:
        # EBADF, ESPIPE: the C library would imitate posix_fallocate by reading, which we may not.
        unsupported = errno.EBADF, errno.ESPIPE, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS
        if error.errno not in (*unsupported, errno.ENODATA):  # ENODATA: it has no such attribute
            raise


def components(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def split_path(path: str) -> list[bytes]:
    """Return the components of a path on the host. Raises ApiError (400)."""
    encoded = path.encode()
    parts = encoded.split(b"/")
    if parts[0] or b".." in parts or parts[-1] in (b"", b"."):
        refuse("path", "must be absolute, name a file, and have no .. component or trailing slash")
    if len(encoded) > MAX_PATH or any(len(part) > 255 for part in parts):
        refuse("path", f"must have at most {MAX_PATH} bytes, and a name at most 255")
    return components(encoded)


class Tree(NamedTuple):
    """The files that a request may use."""

    root: str  # where the host's filesystem is mounted
    locks: dict[tuple[int, Optional[str]], threading.RLock]  # by st_dev and folder
    folder: Optional[str] = None  # of a limited key: the files beneath it, through no link


class Walk(contextlib.ExitStack):
    """Descends from the root by held descriptors; with make, missing folders are made.

    A path is never looked at twice: each component is opened relative to the descriptor of the one
    before, and the kernel is told to follow no link. Links are read and resolved here, as the host
    would see them. Whatever the walk opens or locks, its end closes and unlocks.
    """

    def __init__(self, tree: Tree, *, make: bool = False) -> None:
        super().__init__()
        self._tree, self._make = tree, make
        try:
            self._stack = [os.open(tree.root, os.O_PATH | os.O_DIRECTORY)]
        except OSError as error:
            remedy = "run the agent's container with -v /:/host, or set HOST_ROOT=/ on a bare host"
            message = f"HOST_ROOT={tree.root} is not there ({error.strerror}): {remedy}"
            raise ApiError(503, message) from error
        self._made: list[tuple[int, bytes]] = []  # (descriptor of the parent, name)
        self._links = 0
        self._is_limited = False  # to what is beneath the folder that the walk has reached

    def __exit__(self, *failure: Any) -> None:
        for parent, name in reversed(self._made if failure[0] else []):
            with contextlib.suppress(OSError):  # another program uses it by now
                os.rmdir(name, dir_fd=parent)
        for descriptor in self._stack:
            os.close(descriptor)
        super().__exit__(*failure)

    def lock(self, descriptor: int) -> None:
        """Lock a descriptor's filesystem until the walk ends. Raises ApiError (503)."""
        rule = f"other writes to its filesystem have taken over {LOCK_TIMEOUT:g} s"
        message = f"path: {rule}; check whether it hangs, or try again later"
        # Writes beneath a limited key's folder queue up first: only one at a time delays others'.
        for folder in dict.fromkeys((self._tree.folder, None)):
            place = os.fstat(descriptor).st_dev, folder
            lock = self._tree.locks.setdefault(place, threading.RLock())
            self.enter_context(hold(lock, LOCK_TIMEOUT, message))

    def enter(self, path: str) -> tuple[int, bytes]:
        """Return the descriptor of the file's folder, and its name. Raises ApiError or OSError."""
        *parents, name = split_path(path)
        listed = components((self._tree.folder or "").encode())
        if parents[: len(listed)] != listed:
            raise ApiError(403, f"path: must be beneath {self._tree.folder}")
        self._descend(listed)
        self._is_limited = self._tree.folder is not None
        self._descend(parents[len(listed) :])
        return self._stack[-1], name

    def find(self, name: bytes) -> int:
        """Return a descriptor (O_PATH) of a regular file. Raises ApiError or OSError."""
        # Invariant: O_PATH opens no FIFO or device. The file is looked at, and then only read or
        # written through this descriptor, whatever takes its name meanwhile.
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._stack[-1])
        self.callback(os.close, found)
        info = os.fstat(found)
        if stat.S_ISLNK(info.st_mode):
            status = 403 if self._is_limited else 400
            raise ApiError(status, "path: is a link; use the path of the file that it points at")
        if not stat.S_ISREG(info.st_mode):
            raise ApiError(409, "path: there is something other than a regular file")
        # It may be a program with other rights, or a file outside (README: fs.protected_hardlinks).
        is_special = info.st_mode & 0o7000 or info.st_nlink > 1
        if self._is_limited and (is_special or extended(found, "security.capability")):
            rule = "a mode above 0777, file capabilities or hard links"
            raise ApiError(403, f"path: a limited key may not use a file that has {rule}")
        return found

    def _descend(self, parts: list[bytes]) -> None:
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
                if not self._make:
                    raise
                if linked:
                    raise ApiError(409, "path: a link in it leads nowhere") from None
                self._make_folder(part)
            except NotADirectoryError:
                todo.extend((piece, True) for piece in reversed(self._read_link(part)))
            while self._is_limited and len(self._stack) > 1:  # no link leads up again
                os.close(self._stack.pop(0))

    def _make_folder(self, name: bytes) -> None:
        """Make a folder and enter it. Raises OSError, also if another program is faster."""
        self.lock(self._stack[-1])
        parent = os.dup(self._stack[-1])
        self.callback(os.close, parent)
        os.mkdir(name, 0o755, dir_fd=parent)
        self._made.append((parent, name))
        self._stack.append(os.open(name, FOLDER, dir_fd=parent))

    def _read_link(self, name: bytes) -> list[bytes]:
        """Return the components of a link's target, back at the root if it is absolute."""
        try:
            target = os.readlink(name, dir_fd=self._stack[-1])
        except OSError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        if self._is_limited:
            raise ApiError(403, f"path: no link beneath {self._tree.folder} is followed")
        self._links += 1
        if self._links > MAX_LINKS:
            raise ApiError(400, f"path: has more than {MAX_LINKS} links in it")
        if target.startswith(b"/"):
            while len(self._stack) > 1:
                os.close(self._stack.pop())
        return components(target)


def extended(found: int, name: str) -> bytes:
    """Return an extended attribute of a file, empty if it has none. Raises OSError."""
    with if_supported():
        return os.getxattr(f"/proc/self/fd/{found}", name)
    return b""


def reopen(found: int, flags: int) -> int:
    """Return a new descriptor of the file that a descriptor (O_PATH) holds. Raises OSError."""
    # O_NONBLOCK: a read of some files under /proc would never return.
    return os.open(f"/proc/self/fd/{found}", flags | os.O_NONBLOCK)


def read_content(found: int, longest: int) -> bytes:
    """Return a file's content, of a longer one the first longest + 1 bytes. Raises OSError."""
    try:
        descriptor = reopen(found, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:  # only the owner may leave the time of access as it is
        descriptor = reopen(found, os.O_RDONLY)
    with open(descriptor, "rb") as file:
        return file.read(longest + 1) or b""  # None if a read would wait


def read_beneath(tree: Tree, path: str) -> tuple[bytes, os.stat_result]:
    """Return a file's content and status. Raises ApiError: 400, 403, 404, 409, 413, 503."""
    with file_errors(), Walk(tree) as walk:
        _, name = walk.enter(path)
        found = walk.find(name)
        content = read_content(found, MAX_BODY)
        if len(content) > MAX_BODY:
            raise ApiError(413, f"path: the file is longer than {MAX_BODY} bytes")
        return content, os.fstat(found)


def remove_beneath(tree: Tree, path: str) -> None:
    """Remove a regular file. Raises ApiError: 400, 403, 404, 409, 503."""
    with file_errors(), Walk(tree) as walk:
        parent, name = walk.enter(path)
        walk.lock(parent)
        walk.find(name)  # 404 also where unlink(2) would only say that the filesystem is read-only
        os.unlink(name, dir_fd=parent)  # or a link or a FIFO that has just taken the file's place
        sync_folder(parent)


class FileWrite(NamedTuple):
    """What to write. None keeps what the file has; a new one gets 0644 and the agent's owner."""

    content: bytes
    mode: Optional[int] = None
    uid: Optional[int] = None
    gid: Optional[int] = None
    atomic: bool = True
    most: int = 0o7777  # the bits of a mode that may be set


def write_beneath(tree: Tree, path: str, write: FileWrite) -> bool:
    """Write a file at an absolute path as the host sees it; return whether anything was changed.

    Missing parents are made, 0755. Of two writers the last wins. On failure nothing has changed,
    unless it is a write in place that fails half-way. Raises ApiError (400, 403, 409, 500 to 507).
    """
    with file_errors():
        for _ in range(MAX_PATH_RETRIES):
            # Another request, or another agent, has made or removed the same name meanwhile.
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                return try_write(tree, path, write)
    raise ApiError(409, "path: another program is changing it, or its filesystem makes no files")


def try_write(tree: Tree, path: str, write: FileWrite) -> bool:
    # Invariant: a limited key makes no set-id file, even if the old one becomes one just now.
    write = write._replace(most=0o7777 if tree.folder is None else 0o777)
    with Walk(tree, make=True) as walk:
        parent, name = walk.enter(path)
        if write.atomic:
            walk.lock(parent)
        found = None
        with contextlib.suppress(FileNotFoundError):
            found = walk.find(name)
        if not write.atomic:  # the lock of the file's own filesystem: it may be mounted by itself
            walk.lock(parent if found is None else found)
        if found is not None and is_written(found, write):
            return False
        if found is None or write.atomic:
            replace(parent, name, found, write)
            sync_folder(parent)
        else:
            overwrite(found, write)
        return True


def is_written(found: int, write: FileWrite) -> bool:
    info = os.fstat(found)
    if info.st_size != len(write.content) or attributes(info) != wanted_attributes(info, write):
        return False
    # It may be writable and not readable, or under the lease of a container that mounts it.
    with contextlib.suppress(PermissionError, BlockingIOError):
        return read_content(found, info.st_size) == write.content
    return False


def attributes(info: os.stat_result) -> Attributes:
    return info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)


def wanted_attributes(info: os.stat_result, write: FileWrite) -> Attributes:
    asked = (write.uid, write.gid, write.mode)
    uid, gid, mode = (old if new is None else new for old, new in zip(attributes(info), asked))
    return uid, gid, mode & write.most


def set_attributes(descriptor: int, wanted: Attributes) -> None:
    """Give an open file its owner and mode. Raises OSError, also if it does not take them."""
    uid, gid, mode = wanted
    with if_supported():  # to a user namespace, an owner that is not in its map is invalid
        if attributes(os.fstat(descriptor))[:2] != (uid, gid):
            os.fchown(descriptor, uid, gid)
        # After the owner: fchown clears the set-id bits. By descriptor, so the umask has no say.
        if attributes(os.fstat(descriptor)) != wanted:
            os.fchmod(descriptor, mode)
    # Some filesystems ignore both calls; so does the kernel a set-group-id bit without CAP_FSETID.
    if attributes(os.fstat(descriptor)) != wanted:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def copy_extended(descriptor: int, found: int) -> None:
    """Give an open file the extended attributes of the one it replaces. Raises OSError."""
    # Only the access list must be copied: without it, the group gets what the list's mask allows.
    with contextlib.suppress(OSError):  # a file's owner may give it more than can be listed
        for name in sorted(os.listxattr(f"/proc/self/fd/{found}"))[:100]:
            with contextlib.suppress(OSError):
                os.setxattr(descriptor, name, extended(found, name))
    with if_supported():  # to set an empty list removes the one that came from the folder
        os.setxattr(descriptor, ACCESS_LIST, extended(found, ACCESS_LIST))


@contextlib.contextmanager
def temporary_name(parent: int, name: bytes) -> Iterator[bytes]:
    """Yield a temporary name beside `name`; unlink it on exit if it was not renamed."""
    # In an append-only folder no temporary name could be removed again: there rmdir(2) raises EPERM
    # first. Elsewhere it leaves a file alone, and removes an empty folder that just replaced it.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.rmdir(name, dir_fd=parent)
    # Made from the target's, so that the next write clears away what a killed agent has left.
    temporary = b".dockeragent-%08x" % binascii.crc32(name)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=parent)
    except IsADirectoryError:
        temporary += secrets.token_hex(8).encode()
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=parent)


def replace(parent: int, name: bytes, found: int | None, write: FileWrite) -> None:
    """Put a new file in the place of name, in one step. Raises OSError."""
    # It has no name until it is complete, so that a killed agent leaves nothing; where the
    # filesystem cannot do that (O_TMPFILE), it has a temporary one.
    temporary = b""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(b".", os.O_WRONLY | os.O_TMPFILE, 0o600, dir_fd=parent)
        except OSError:  # most likely there is no O_TMPFILE; any other error comes again
            temporary = stack.enter_context(temporary_name(parent, name))
            # Invariant: O_EXCL opens nothing that another program has put there.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            descriptor = os.open(temporary, flags, 0o600, dir_fd=parent)
        file = stack.enter_context(open(descriptor, "wb"))
        file.write(write.content)
        file.flush()
        if found is None and write.mode is None:  # else others could open a secret for a moment
            with contextlib.suppress(OSError):  # some filesystems have only one mode
                os.fchmod(descriptor, 0o644)
        wanted = wanted_attributes(os.fstat(descriptor if found is None else found), write)
        set_attributes(descriptor, wanted)
        if found is not None:
            copy_extended(descriptor, found)  # after a change of owner, which removes some of them
            set_attributes(descriptor, wanted)  # an access list has changed the mode
        with if_supported():
            os.fsync(descriptor)
        if not temporary:
            source = f"/proc/self/fd/{descriptor}"
            if found is None:
                os.link(source, name, dst_dir_fd=parent)
                return
            # A file can only be renamed over another from a name.
            temporary = stack.enter_context(temporary_name(parent, name))
            os.link(source, temporary, dst_dir_fd=parent)
        os.replace(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def sync_folder(parent: int) -> None:
    """Write a change of names to disk, if the folder can be opened for reading. Raises OSError."""
    try:
        descriptor = reopen(parent, os.O_RDONLY)
    except OSError:  # the change itself is done: this is no reason to call it a failure
        return
    with contextlib.ExitStack() as stack, if_supported():
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


def overwrite(found: int, write: FileWrite) -> None:
    """Write into the file that is there, keeping its inode. Raises OSError."""
    with open(reopen(found, os.O_WRONLY), "wb", buffering=0) as file:
        descriptor = file.fileno()  # unbuffered, so that closing it writes nothing
        info = os.fstat(descriptor)
        wanted = wanted_attributes(info, write)
        if info.st_mode & (stat.S_ISUID | stat.S_ISGID):
            os.fchmod(descriptor, stat.S_IMODE(info.st_mode))  # fails if we cannot set them
        try:  # owner, mode and room are settled while the old content is still complete
            set_attributes(descriptor, wanted)
            with if_supported():
                os.posix_fallocate(descriptor, 0, len(write.content))
        except OSError:
            os.ftruncate(descriptor, info.st_size)
            with contextlib.suppress(OSError):
                set_attributes(descriptor, attributes(info))
            raise
        left = memoryview(write.content)
        while left:
            # Not file.write: it raises nothing if it would have to wait, so this would never end.
            left = left[os.write(descriptor, left) :]
        file.truncate(len(write.content))
        set_attributes(descriptor, wanted)  # writing has cleared the set-id bits
        with if_supported():
            os.fsync(descriptor)


# --------------------------------------------------------------------------------------------------
# Request schemas: the tables, the rules between fields, and what a value is to the Engine
# --------------------------------------------------------------------------------------------------

SIGNALS = "ABRT|ALRM|BUS|CHLD|CONT|FPE|HUP|ILL|INT|KILL|PIPE|POLL|PROF|QUIT|SEGV|STOP|SYS|TERM|TRAP"
SIGNALS += "|TSTP|TTIN|TTOU|URG|USR1|USR2|VTALRM|WINCH|XCPU|XFSZ"
REAL_TIME = r"RTMIN(\+([1-9]|1[0-5]))?|RTMAX(-([1-9]|1[0-4]))?"  # systemd's own is RTMIN+3
# The distribution project's reference grammar: [domain[:port]/]path[:tag][@digest]
REGISTRY = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = f"(?:{REGISTRY}/)?{PART}(?:/{PART})*"
IMAGE = REPOSITORY + "(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?"
IMAGE += "(?:@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
IMAGE_RULE = "an image in lower case: nginx, nginx:1.27, host:5000/team/app:tag or name@sha256:..."
NO_LIMIT = "no limit"
VOLUME_RULE = f"a name of at least two {NAME_RULE}; a bind's source begins with a /"
ULIMIT_RULE = "an integer, or [soft, hard] with soft at most hard"
SOURCES = {
    # Any other path the Engine would clean into one that nobody has checked.
    "bind": (r"/|(/(?!\.\.?(/|\Z))[^/]+)+/?", "an absolute path with no '.', '..' or empty part"),
    "volume": ("([a-zA-Z0-9][a-zA-Z0-9_.-]+)?", VOLUME_RULE),
    "tmpfs": ("", "absent for a tmpfs"),
}


def check_port(port: str | int, path: str, least: int = 1) -> int:
    if not least <= int(port or 0) <= 65535:
        refuse(path, f"must be a port from {least} to 65535")
    return int(port or 0)


def check_volume(volume: Json, path: str) -> Json:
    """Return volume with its type, and a bind's source without a slash at its end."""
    source = volume.get("source", "")
    kind = volume.setdefault("type", "bind" if source.startswith("/") else "volume")
    pattern, rule = SOURCES[kind]
    if not re.fullmatch(pattern, source):
        refuse(f"{path}.source", f"must be {rule} (type {kind})")
    if kind != "tmpfs" and (extra := {"size_mb", "mode"} & volume.keys()):
        refuse(f"{path}.{min(extra)}", "goes only with a tmpfs")
    return {**volume, "source": source.rstrip("/") or "/"} if kind == "bind" else volume


def check_ulimit(limit: Any, path: str) -> list[int]:
    """Return [soft, hard]; -1 is no limit."""
    soft, hard = limit if isinstance(limit, list) and len(limit) == 2 else (limit, limit)
    if isinstance(soft, list) or (hard != -1 and not 0 <= soft <= hard):
        refuse(path, f"must be {ULIMIT_RULE}")
    return [soft, hard]


def check_health(health: Json, path: str) -> Json:
    """Return health without a `disable` that is false."""
    health = {name: value for name, value in health.items() if value is not False}
    given = {"cmd", "shell", "disable"} & health.keys()
    if len(given) > 1 or ("disable" in given and len(health) > 1):
        refuse(path, "must have at most one of cmd, shell and disable, which takes no times")
    if health.get("cmd", [""])[:1] in ([], ["CMD"], ["CMD-SHELL"], ["NONE"]):
        refuse(f"{path}.cmd", "must begin with the program; CMD-SHELL is shell here, NONE disable")
    return health


def check_networks(body: Json) -> Json:
    """Return body with all its `networks`, or with `network_mode` host, none or container:X."""
    # With neither it joins the default, bridge. The mode bridge means nothing beside networks.
    networks, mode = body.pop("networks", []), body.pop("network_mode", "default")
    names = {network["name"] for network in networks}
    if len(names) < len(networks):
        refuse("networks", "must not name the same network twice")
    if mode not in names and mode != "default" and not (mode == "bridge" and names):
        networks.append({"name": mode, "aliases": []})
    networks.sort(key=lambda network: network["name"] != mode)  # its own is the first
    for network in networks:
        if re.fullmatch("host|none|.*:.*", network["name"]):
            if len(networks) > 1 or network["aliases"]:
                refuse("networks", f"cannot be joined in network_mode {network['name']}")
            return {**body, "network_mode": network["name"]}
    return {**body, "networks": networks} if networks else body


def check_create(body: Json, path: str) -> Json:
    policy, resources = body.get("restart_policy", {"name": "no"}), body.get("resources", {})
    if policy.get("max_retry_count") and policy["name"] != "on-failure":
        refuse("restart_policy.max_retry_count", "goes only with on-failure")
    if body.get("auto_remove") and policy["name"] != "no":
        refuse("auto_remove", "goes only with the restart_policy no")
    swap = resources.get("memory_swap_mb", 0)
    if swap > 0 and not 0 < resources.get("memory_mb", 0) <= swap:
        rule = "is memory and swap together: it needs memory_mb, and must be at least as much"
        refuse("resources.memory_swap_mb", rule)
    return check_networks(body)


def check_run(body: Json, path: str) -> Json:
    if body.get("restart_policy", {"name": "no"})["name"] != "no":
        refuse("restart_policy.name", "must be no: a run ends once")
    if body.get("log", {}).get("driver") == "none":
        refuse("log.driver", "must not be none: a run's lines are read from its log")
    return check_create(body, path)


def times(unit: int) -> Callable[[Any], int]:
    return lambda amount: round(amount * unit) if amount > 0 else int(amount)  # -1: no limit


def engine_ports(ports: list[Json]) -> Json:
    """Return the Engine's PortBindings: {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}."""
    bindings: Json = {}
    for port in ports:
        places = bindings.setdefault(f"{port['container_port']}/{port['protocol']}", [])
        places.append({"HostIp": port["host_ip"], "HostPort": str(port["host_port"] or "")})
    return bindings


def engine_endpoint(networks: list[Json]) -> Json:
    """Return the first network's endpoint: before API 1.44 a create takes no more than one."""
    # None without aliases: the mode names the network already; to podman, bridge is only a mode.
    return {n["name"]: {"Aliases": n["aliases"]} for n in networks[:1] if n["aliases"]}


def engine_ulimits(limits: Json) -> list[Json]:
    return [{"Name": name, "Soft": soft, "Hard": hard} for name, (soft, hard) in limits.items()]


def engine_device(text: str) -> Json:
    """Return the Engine's device mapping of /dev/a[:/dev/b][:rwm]."""
    host, inside, access = re.findall(DEVICE_PATTERN, text)[0]
    paths = {"PathOnHost": host, "PathInContainer": inside or host}
    return {**paths, "CgroupPermissions": access or "rwm"}


def engine_gpus(gpus: Any) -> list[Json]:
    return [{"Count": -1 if gpus == "all" else gpus, "Capabilities": [["gpu"]]}]


def signal_name(word: str) -> str:
    """Return a signal's name as the Engine writes it: SIGTERM."""
    return "SIG" + word.upper().removeprefix("SIG")


def absent(why: str) -> Schema:
    return {"type": "nothing", "description": f"left out: {why}"}


def at(place: str, schema: Schema, convert: Any = None, since: int = 0) -> Schema:
    """Return a row of CREATE: its place in the Engine's request, its value there, its first API."""
    return {**schema, "place": place, "convert": convert, "since": since}


STRING = string_schema(most=MAX_BODY)
STRINGS = array_of({**STRING, "example": "60"}, ["sleep", "60"])
COMMAND = string_schema("(?s:.+)", "a command of the shell", MAX_BODY, "exit 0")
PORT = string_schema("[0-9]+", "a port from 1 to 65535, in ASCII digits", 15)
PORT.update(type="string|integer", check=check_port)
HOST_PORT = {**PORT, "pattern": "[0-9]*", "check": functools.partial(check_port, least=0)}
SIGNAL = string_schema(f"(?ai:(SIG)?({SIGNALS}))", "a POSIX signal name", 16, "SIGTERM")
STOP_SIGNAL = {**SIGNAL, "pattern": f"(?ai:(SIG)?({SIGNALS}|{REAL_TIME}))"}
USER_ID = integer_schema(0, 2**32 - 2)  # one more means "no change"
COUNT = integer_schema(0, 2**31 - 1)
PLATFORM = string_schema(r"[a-z0-9_]+(/[a-zA-Z0-9_.]+){0,2}", "os/arch such as linux/amd64", 64)
NAMED_IMAGE = string_schema(IMAGE, IMAGE_RULE, 512)
ANY_IMAGE = {**NAMED_IMAGE, "pattern": f"{IMAGE}|{IMAGE_ID}"}
OWN_LABEL_RULE = f"a label that does not begin with {OWN_LABELS}, as the agent's own do"
LABEL = string_schema(rf"(?s:(?!{re.escape(OWN_LABELS)}).*)", OWN_LABEL_RULE, MAX_BODY)
LABELS = map_of(LABEL, {**STRING, "example": "true"}, {"com.example.team": "web"})
HOST_PATTERN = "[a-zA-Z0-9_]([a-zA-Z0-9_.-]*[a-zA-Z0-9_])?"
HOST_NAME = string_schema(HOST_PATTERN, "letters, digits and '_', '.' or '-' in between", 253)
IP = string_schema("[^%]+", "an IPv4 or IPv6 address", 45, "10.0.0.5")
IP["check"] = lambda ip, path: ipaddress.ip_address(ip) and ip
HOST_IP = {**IP, "description": "an IPv4 or IPv6 address, or host-gateway"}
HOST_IP["check"] = lambda ip, path: ip if ip == "host-gateway" else IP["check"](ip, path)
HOSTS = map_of(HOST_NAME, HOST_IP, {"db": "10.0.0.5"})
NAME_END = f"not end in {', '.join(HELPER_NAMES)}, which deploys use"
NAME_PATTERN = f"(?!.*{HELPER_NAME.pattern})[a-zA-Z0-9][a-zA-Z0-9_.-]+"
NAME = string_schema(NAME_PATTERN, f"at least two {NAME_RULE}, and {NAME_END}", 255)
NETWORK_NAME = string_schema(CONTAINER, f"a network's name: {NAME_RULE}", 255, "front")
MODE_RULE = "bridge, host, none, container:ID or a network's name"
NETWORK_MODE = string_schema(f"(container:)?{CONTAINER}", MODE_RULE)
CAPABILITY = string_schema("[A-Za-z][A-Za-z0-9_]*", "a capability", 64)
SECONDS = integer_schema(0.001, 10**6, "the image's own", "integer|number", "seconds")
STOP_TIMEOUT = integer_schema(0, MAX_STOP, unit="seconds")
ULIMIT = {**array_of(integer_schema(-1, 2**63 - 1)), **integer_schema(-1, 2**63 - 1)}
ULIMIT.update(type="integer|array", description=ULIMIT_RULE, check=check_ulimit)
# As docker run has them (go-units, ulimit.go): any other would fail at the start, as a 500.
ULIMIT_NAMES = "core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime"
ULIMIT_NAMES += " sigpending stack"
ULIMITS = map_of(one_of(*ULIMIT_NAMES.split()), ULIMIT, {"nofile": 65536})
DEVICE_PATTERN = "(/[^:]+)(?::(/[^:]+))?(?::([rwm]{1,3}))?"
DEVICE = string_schema(DEVICE_PATTERN, "a path, or path:path:rwm", 4096, "/dev/fuse")
GPUS = {**integer_schema(1, 1024), **string_schema("all", '"all" or a number from 1 to 1,024')}
GPUS["type"] = "string|integer"
SYSCTL = string_schema("[a-zA-Z0-9_./-]+", "a sysctl")
SYSCTLS = map_of(SYSCTL, {**STRING, "example": "1024"}, {"net.core.somaxconn": "1024"})
SHARED = f"host|container:{CONTAINER}"  # the host's or another container's namespace
IPC_RULE = "host, none, private, shareable or container:ID"
MODE = string_schema("0*[1-7][0-7]{0,3}", "an octal mode, 1 to 7777 (ro: read_only)", 15, "1777")

PORTS = object_schema(
    "container_port",
    {"container_port": 80, "host_port": 8080},
    lambda port, path: {"host_port": 0, "protocol": "tcp", "host_ip": "", **port},
    container_port=PORT,
    host_port=HOST_PORT,
    protocol=one_of("tcp", "udp", "sctp"),
    host_ip=IP,
)
JOINED = object_schema("name", name=NETWORK_NAME, aliases=array_of(HOST_NAME, ["db"]))
JOINED.update({**NETWORK_NAME, "type": "string|object"})
JOINED["check"] = lambda n, path: {"aliases": [], **(n if isinstance(n, dict) else {"name": n})}

# Each field of a create is one row: its place in the Engine's request is below its parent's.
VOLUMES = object_schema(
    "target",
    {"source": "/data", "target": "/data"},
    check_volume,
    source=at("Source", string_schema("(?s:.+)", "a path or a volume's name")),
    target=at("Target", string_schema(r"/+[^/](?s:.*)", "an absolute path other than /")),
    read_only=at("ReadOnly", BOOLEAN),
    type=at("Type", one_of("bind", "volume", "tmpfs")),
    size_mb=at("TmpfsOptions.SizeBytes", integer_schema(0, MAX_MEGABYTES), times(2**20)),
    mode=at("TmpfsOptions.Mode", MODE, functools.partial(int, base=8)),
    non_recursive=at("BindOptions.NonRecursive", absent("the policy alone sets it"), since=40),
)
RESTART_POLICY = object_schema(
    "name",
    {"name": "always"},
    name=at("Name", one_of("no", "always", "on-failure", "unless-stopped")),
    max_retry_count=at("MaximumRetryCount", COUNT),
)
RESOURCES = object_schema(
    "",
    {"cpus": 1.5, "memory_mb": 512},
    # A hundredth is the Engine's own floor; much less would round to "no limit".
    cpus=at("NanoCpus", integer_schema(0.01, 10**6, NO_LIMIT, "integer|number"), times(10**9), 25),
    memory_mb=at("Memory", integer_schema(6, MAX_MEGABYTES, NO_LIMIT), times(2**20)),
    memory_swap_mb=at("MemorySwap", integer_schema(-1, MAX_MEGABYTES), times(2**20)),
    cpu_shares=at("CpuShares", integer_schema(2, 262_144, NO_LIMIT)),
    pids=at("PidsLimit", integer_schema(1, 2**22, NO_LIMIT), since=23),
    shm_size_mb=at("ShmSize", integer_schema(0, MAX_MEGABYTES), times(2**20), since=22),
    ulimits=at("Ulimits", ULIMITS, engine_ulimits),
)
HEALTH_CMD = array_of(STRING, ["curl", "-f", "http://localhost/"])
HEALTH_CMD["description"] += " (a command of the shell goes into shell)"
HEALTHCHECK = object_schema(
    "",
    {"cmd": ["curl", "-f", "http://localhost/"], "interval": 10},
    check_health,
    cmd=at("Test", HEALTH_CMD, lambda cmd: ["CMD", *cmd]),
    shell=at("Test", COMMAND, lambda shell: ["CMD-SHELL", shell]),
    disable=at("Test", BOOLEAN, lambda disable: ["NONE"]),
    interval=at("Interval", SECONDS, times(10**9)),
    timeout=at("Timeout", SECONDS, times(10**9)),
    start_period=at("StartPeriod", SECONDS, times(10**9), since=29),
    retries=at("Retries", COUNT),
)
LOG = object_schema(
    "",
    {"driver": "json-file", "max_size_mb": 10, "max_files": 3},
    driver=at("Type", string_schema("[a-zA-Z0-9_./:-]+", "a log driver, such as local")),
    max_size_mb=at("Config.max-size", integer_schema(1, 2**20), "{}m".format),
    max_files=at("Config.max-file", integer_schema(1, 10_000), str),
)
CREATE = object_schema(
    "image",
    {"image": "nginx:1.27"},
    check_create,
    image=at("Image", ANY_IMAGE),
    name=at("query.name", NAME),
    cmd=at("Cmd", STRINGS),
    entrypoint=at("Entrypoint", STRINGS),
    env=at("Env", array_of(string_schema("(?s:[^=]+=.*)", "NAME=value", MAX_BODY, "TZ=UTC"))),
    labels=at("Labels", LABELS),
    working_dir=at("WorkingDir", string_schema("(?s:/.*)", "an absolute path")),
    user=at("User", string_schema(r"[^\s:]+(:[^\s:]+)?", "user or user:group", 255, "1000:1000")),
    hostname=at("Hostname", {**HOST_NAME, "maxLength": 64}),  # the kernel takes no more
    ports=at("HostConfig.PortBindings", array_of(PORTS), engine_ports),
    # Not Binds: no colon in a path can become an option.
    volumes=at("HostConfig.Mounts", array_of(VOLUMES), since=25),
    networks=at("NetworkingConfig.EndpointsConfig", array_of(JOINED), engine_endpoint),
    network_mode=at("HostConfig.NetworkMode", NETWORK_MODE),
    restart_policy=at("HostConfig.RestartPolicy", RESTART_POLICY),
    resources=at("HostConfig", RESOURCES),
    healthcheck=at("Healthcheck", HEALTHCHECK, since=24),
    log=at("HostConfig.LogConfig", LOG),
    init=at("HostConfig.Init", BOOLEAN, since=25),
    tty=at("Tty", BOOLEAN),
    read_only=at("HostConfig.ReadonlyRootfs", BOOLEAN),
    cap_drop=at("HostConfig.CapDrop", array_of(CAPABILITY, ["ALL"])),
    no_new_privileges=at("HostConfig.SecurityOpt", BOOLEAN, lambda on: ["no-new-privileges"] * on),
    stop_signal=at("StopSignal", STOP_SIGNAL, signal_name, since=21),
    stop_timeout=at("StopTimeout", STOP_TIMEOUT, since=25),
    extra_hosts=at("HostConfig.ExtraHosts", HOSTS, lambda hosts: [*map(":".join, hosts.items())]),
    dns=at("HostConfig.Dns", array_of(IP)),
    platform=at("query.platform", PLATFORM, since=41),
    auto_remove=at("HostConfig.AutoRemove", BOOLEAN, since=25),
    pull=one_of("missing", "always", "never"),
    # For the master key alone: LIMITED_FIELDS has none of these.
    privileged=at("HostConfig.Privileged", BOOLEAN),
    cap_add=at("HostConfig.CapAdd", array_of(CAPABILITY, ["NET_ADMIN"])),
    devices=at("HostConfig.Devices", array_of(DEVICE), lambda d: [*map(engine_device, d)]),
    gpus=at("HostConfig.DeviceRequests", GPUS, engine_gpus, since=40),
    security_opt=at("HostConfig.SecurityOpt", array_of(STRING, ["seccomp=unconfined"])),
    sysctls=at("HostConfig.Sysctls", SYSCTLS, since=23),
    pid_mode=at("HostConfig.PidMode", string_schema(SHARED, "host or container:ID")),
    ipc_mode=at("HostConfig.IpcMode", string_schema(f"{SHARED}|none|private|shareable", IPC_RULE)),
)
RUN_ROWS = {"timeout": integer_schema(1, MAX_STOP, unit="seconds"), **CREATE["properties"]}
RUN_ROWS["auto_remove"] = absent("the container of a run is always removed")
RUN = object_schema("image", {"image": "nginx:1.27", "cmd": ["nginx", "-t"]}, check_run, **RUN_ROWS)
GATE_TIME = integer_schema(0, MAX_GATE, kind="integer|number", unit="seconds")
DEPLOY_ROWS = {**CREATE["properties"], "name": absent("the path has it")}
DEPLOY_ROWS["deploy"] = object_schema("", {"stable": 5}, timeout=GATE_TIME, stable=GATE_TIME)
DEPLOY_ROWS["auto_remove"] = absent("nothing could bring the container back")
DEPLOY = object_schema("image", {"image": "nginx:1.27"}, check_create, **DEPLOY_ROWS)
DEPLOY_QUERY = object_schema("", adopt=BOOLEAN)
POLICY = object_schema("Name", Name=STRING, MaximumRetryCount=integer_schema(0, 2**63 - 1))
# The labels of a deploy whose values are JSON.
JOURNAL = {
    "restart": POLICY,
    "was": object_schema("running restart", running=BOOLEAN, restart=POLICY),
    "gate": object_schema("timeout stable", timeout=GATE_TIME, stable=GATE_TIME),
}
PULL = object_schema("image", {"image": "nginx:1.27"}, image=NAMED_IMAGE, platform=PLATFORM)
STOP = object_schema("", timeout=STOP_TIMEOUT, signal=SIGNAL)
KILL = object_schema("", signal=SIGNAL)
FILE_PATH = string_schema("(?s:.*)", "an absolute path", MAX_PATH, "/etc/app.conf")
FILE_QUERY = object_schema("path", path=FILE_PATH)
FILE = object_schema(
    "path",
    {"path": "/etc/app.conf", "content": "a=1"},
    path=FILE_PATH,
    content={**STRING, "raw": True},
    encoding=one_of("utf-8", "base64"),
    permission=string_schema("0?[0-7]{1,4}", 'a string, such as "0644" (octal, up to 7777)'),
    uid=USER_ID,
    gid=USER_ID,
    atomic=BOOLEAN,
)
WITHOUT_TAG = string_schema(REPOSITORY, "a repository without a tag", 255, "ghcr.io/acme/web")
PRUNE = object_schema("", repository=WITHOUT_TAG, keep=integer_schema(0, 1000), dry_run=BOOLEAN)
IMAGE_QUERY = object_schema("image", image=ANY_IMAGE)
SUBNET = string_schema("[0-9a-fA-F.:]+/[0-9]{1,3}", "a subnet", 64, "172.30.0.0/16")
SUBNET["check"] = lambda subnet, path: str(ipaddress.ip_network(subnet))
NEW_NETWORK = object_schema(
    "name", {"name": "front"}, name=NETWORK_NAME, internal=BOOLEAN, subnet=SUBNET, labels=LABELS
)
LABEL_QUERY = string_schema("(?s:[^=]+(=.*)?)", "key or key=value")
NAME_QUERY = string_schema("(?s:.+)", "a part of a container's name")
LIST_QUERY = object_schema("", all=BOOLEAN, label=LABEL_QUERY, name=NAME_QUERY)
REMOVE_QUERY = object_schema("", force=BOOLEAN, v=BOOLEAN)
TIME = string_schema(most=64)
TIME["check"] = lambda text, path: text.replace(" ", "+")  # of a time zone, sent unescaped
TIMES = dict.fromkeys(("since", "until"), TIME)
LOGS_QUERY = object_schema(
    "",
    follow=BOOLEAN,
    tail=string_schema("all|[0-9]{1,99}", "all or an integer of at least 0"),
    **TIMES,
    **dict.fromkeys(("timestamps", "stdout", "stderr"), BOOLEAN),
    format=one_of("text", "json"),
    last_event_id=string_schema(EVENT_ID, "an id that a log stream sent: 1700000000.000000000-1"),
)
STATS_QUERY = object_schema("", follow=BOOLEAN)
EVENT_TYPES = "container image network volume daemon builder plugin service node secret config"
EVENTS_QUERY = object_schema(
    "",
    **TIMES,
    type=one_of(*EVENT_TYPES.split()),
    action=string_schema("(?s:.+)", "an action such as die", 512),
    container=string_schema(CONTAINER, f"a container's id or name: {NAME_RULE}", 255),
    last_event_id=string_schema(ENGINE_EVENT_ID, "an id such as 1700000000000000000-1"),
)

# --------------------------------------------------------------------------------------------------
# Engine client: http.client over a Unix socket, TCP or TLS
# --------------------------------------------------------------------------------------------------

Pool = list[tuple[float, socket.socket]]  # idle connections, and since when each is
BROKEN = "the Engine sent an invalid response"
LINE_TOO_LONG: Json = {"error": "the Engine's response has too long a line"}
# OverflowError: http.client takes the size of a chunk for an integer, which may be negative.
FAILURES = (OSError, http.client.HTTPException, OverflowError)

# What is read of the objects in the Engine's responses, whatever they describe: each member's type
# or pattern, [its items' shape] or {its members}, with "*" for any name. A member may be missing.
ID = re.compile("[a-zA-Z0-9][a-zA-Z0-9_.:-]*")
TEXTS = {"*": str}
STATE = {"Running": bool, "Status": str, "StartedAt": str, "Health": {"Status": str}}
CONFIG = {"Labels": TEXTS, "Image": str, "Tty": bool, "StopTimeout": int, "Volumes": {}}
CONFIG["Healthcheck"] = {"Test": [str], "Interval": int, "StartInterval": int}
CONFIG["StopSignal"] = str
HOST_CONFIG = {"AutoRemove": bool, "RestartPolicy": {"Name": str, "MaximumRetryCount": int}}
OBJECT = {"Id": ID, "State": STATE, "Config": CONFIG, "HostConfig": HOST_CONFIG, "timeNano": int}
OBJECT.update(dict.fromkeys("Name Image ImageID Driver Type status error".split(), str))
OBJECT.update(Names=[str], Warnings=[str], RepoTags=[str], RepoDigests=[str])
OBJECT.update(Labels=TEXTS, Options=TEXTS, Metadata={}, progressDetail={})
OBJECT["Mounts"] = [{"Type": str, "Name": str, "Destination": str, "RW": bool}]
OBJECT["Volumes"] = [{"Name": str, "Labels": TEXTS}]
OBJECT.update(Actor={"ID": str, "Attributes": TEXTS}, errorDetail={"message": str})
OBJECT["NetworkSettings"] = {"Networks": {"*": {"NetworkID": str}}}
OBJECT.update(IPAM={"Config": [{"Subnet": str}]}, Ports=[{}])
OBJECT["ImageManifestDescriptor"] = {"platform": {}}
# In a list of containers their state is a word.
OBJECTS = [{**OBJECT, "State": str, "Status": str, "Size": int, "Created": int}]


class Call(NamedTuple):
    """One request to the Engine. path: after the version, made of constants and quoted parts."""

    method: str
    path: str
    query: Mapping[str, Any] = {}
    body: Any = None  # sent as JSON
    seconds: float = CALL_TIMEOUT  # for all of it, or until a stream begins
    headers: Mapping[str, str] = {}
    interrupts: Interrupts = NEVER
    # HTTP/1.0 is not chunked: a log takes a third of the time, but a truncated body looks complete.
    http10: bool = False


class EngineStream(io.RawIOBase):
    """One request to the Engine and its response; to http.client, the socket and its file."""

    def __init__(self, sock: socket.socket, deadline: float, interrupts: Interrupts) -> None:
        # One deadline for all reads together; the interrupts end any of them early.
        self.sock, self.deadline, self.interrupts = sock, deadline, interrupts
        self.has_ended = False

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self, RECV_SIZE)

    def sendall(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[send(self.sock, left, self.deadline) :]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = receive(self.sock, self.deadline, self.interrupts, len(buffer))
        buffer[: len(data)] = data
        self.has_ended = not data
        return len(data)


class EngineResponse(http.client.HTTPResponse):
    """A response of the Engine; the body comes in one piece or in several."""

    def __init__(self, stream: EngineStream, pool: Pool | None) -> None:
        """pool: where `close` leaves the connection if that can take another request."""
        sock: Any = stream
        super().__init__(sock)
        self._stream, self._pool = stream, pool
        self._is_done = False
        self._next_read = 0.0  # monotonic; the body is not read before

    def read_head(self) -> None:
        """Read the status and the headers. Raises FAILURES, ClientGone and Stopping."""
        no_headers: Any = None
        self.begin()
        while self.status < 200 and self.status != 101:  # interim: RFC 9110 section 15.2
            self.headers = no_headers  # so that `begin` reads the next head
            self.begin()
        if self._stream.has_ended:  # http.client takes a truncated head for a complete one
            raise ConnectionResetError("it disconnected")
        self._is_done = self.length == 0
        self.until_end = not self.chunked and self.length is None

    def read_part(self, deadline: float) -> bytes | None:
        """Return bytes of the body, b"" at its end, None if none came until deadline (monotonic).

        Raises EngineError (502) if the body is cut short, ClientGone and Stopping.
        """
        if self._is_done:
            return b""
        if (pause := self._next_read - time.monotonic()) > 0:
            time.sleep(pause)
        try:
            asked, self._stream.deadline = time.monotonic(), deadline
            try:
                self.fp.peek(1)  # waits, so that no time runs out in the middle of a chunk
            except socket.timeout:
                return None
            now = time.monotonic()
            if self.until_end and now - asked < BURST_PAUSE:
                self._next_read = now + BURST_PAUSE
            self._stream.deadline = now + CALL_TIMEOUT
            return self._read_part()
        except FAILURES as error:
            raise engine_failure(error) from error

    def _read_part(self) -> bytes:
        """Return the next bytes of the body, of which some are buffered. Raises FAILURES."""
        part = self.read1(RECV_SIZE)
        if self.chunked and self.chunk_left == 0:
            # http.client would look for this line end only with the next chunk.
            if self.fp.read(2) != b"\r\n":
                raise http.client.IncompleteRead(b"")
            self.chunk_left = None
        if self.length and not part:
            raise http.client.IncompleteRead(b"", self.length)
        self._is_done = not part or self.length == 0
        return part

    def read_all(self) -> bytes:
        """Return the complete body. Raises EngineError past MAX_RESPONSE or the call's deadline."""
        body = bytearray()
        try:
            while not self._is_done:
                self.fp.peek(1)  # or `read1` would take the rest of a chunk and leave its line end
                body += self._read_part()
                # Invariant: at most MAX_RESPONSE bytes of a response are buffered.
                if len(body) > MAX_RESPONSE:
                    raise EngineError(502, "the Engine's response is too large")
        except FAILURES as error:
            raise engine_failure(error) from error
        return bytes(body)

    def close(self) -> None:
        """Leave the connection for another request if it can take one, else end it."""
        if self.closed:  # Invariant: no connection is left to two requests
            return
        super().close()
        pool, sock = self._pool, self._stream.sock
        is_reusable = self._is_done and not self.will_close and self.status >= 200
        if is_reusable and pool is not None and len(pool) < MAX_IDLE_CONNECTIONS:
            pool.append((time.monotonic(), sock))
        else:
            sock.close()


def exchange(
    sock: socket.socket, call: Call, target: str, deadline: float, pool: Pool | None = None
) -> EngineResponse:
    """Send a request; return its response. Raises FAILURES, ClientGone and Stopping."""
    connection = http.client.HTTPConnection("docker")
    connection.sock = stream = EngineStream(sock, deadline, call.interrupts)
    response = EngineResponse(stream, pool)
    try:
        if call.http10:
            connection.send(f"{call.method} {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        else:
            data = b"" if call.body is None else encode_json(call.body)
            headers = {"Content-Type": "application/json"} if data else {}
            if call.method != "GET":
                headers["Content-Length"] = str(len(data))
            connection.putrequest(call.method, target, skip_accept_encoding=True)
            for header in {**call.headers, **headers}.items():
                connection.putheader(*header)
            connection.endheaders(data or None)
        response.read_head()
        return response
    except (*FAILURES, ClientGone, Stopping):
        response.close()
        raise


def connect(address: Address, tls: ssl.SSLContext | None, deadline: float) -> socket.socket:
    """Return a non-blocking socket, connected and its TLS done by deadline (monotonic).

    Raises OSError and ValueError.
    """
    with contextlib.ExitStack() as on_error:
        if address.path:
            sock = on_error.enter_context(socket.socket(socket.AF_UNIX))
            # Not settimeout(), with which a full backlog is an error at once. Whole seconds, or a
            # 32-bit kernel, which takes half of these bytes, would read 0: without a bound.
            seconds = max(1, math.ceil(deadline - time.monotonic()))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@qq", seconds, 0))
            sock.connect(address.path)
        else:
            sock = on_error.enter_context(connect_tcp(address, deadline))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        if tls:
            # Invariant: the Engine's certificate is verified, and is for the host asked for.
            sock = tls.wrap_socket(sock, server_hostname=address.host or None)
        sock.setblocking(False)
        on_error.pop_all()
    return sock


def start_thread(work: Callable[..., object], *arguments: Any) -> None:
    """Call a function in a thread that holds up no exit. Raises OSError if none can be started."""
    try:
        threading.Thread(target=work, args=arguments, daemon=True).start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no more threads can be started") from error


def connect_tcp(address: Address, deadline: float) -> socket.socket:
    """Connect to the first of a host's addresses that accepts. Raises OSError."""
    found: queue.Queue[Any] = queue.Queue()

    def look_up() -> None:
        try:
            found.put(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as error:
            found.put(describe(error))

    # In a thread: it alone knows no timeout, and a dead name server costs it half a minute.
    start_thread(look_up)
    try:
        result: Any = found.get(timeout=max(0, deadline - time.monotonic()))
    except queue.Empty:
        raise socket.timeout("its name is not resolved in time") from None
    if isinstance(result, str):
        raise OSError(result)
    *others, last = [there[:2] for *_, there in result]  # all share the time
    for left, there in zip(range(len(others) + 1, 1, -1), others):
        with contextlib.suppress(OSError):
            return socket.create_connection(there, max(0.001, (deadline - time.monotonic()) / left))
    return socket.create_connection(last, max(0.001, deadline - time.monotonic()))


class Engine:
    """The Docker Engine at one address; remembers its API version and idle connections."""

    def __init__(self, address: Address, tls: ssl.SSLContext | None, version: str = "") -> None:
        self.address = address._replace(port=address.port or (2376 if tls else 2375))
        self._tls = tls
        self._pinned = version
        self._version, self._asked = "", -math.inf  # the one in use, and since when
        self.is_podman = False
        self._idle: Pool = []
        # Images and networks with which containers are being created, and that are being removed:
        # the Engine removes one that a create is just about to use (seen with 20.10 and 28.5).
        self.used: list[str] = []
        self.removed: list[str] = []
        self.released = threading.Condition()  # also the lock of both
        # Held while a network is looked for and created: older Engines allow two of one name.
        self.networking = threading.Lock()
        # By a key's name: it removes one volume at a time, and holds up no other key's requests.
        self.key_locks: dict[str, threading.Lock] = {}
        self.unchecked: list[str] = []  # names of new containers that nobody may start yet
        self._health_lock = threading.Lock()
        self._health = -math.inf, ""  # when it was asked, and what is wrong

    def call(self, method: str, path: str, *args: Any, **options: Any) -> bytes:
        """Return the response's body, b"" if it has none; arguments as Call has them."""
        with self.open(method, path, *args, **options) as response:
            return response.read_all()

    def json(self, method: str, path: str, *args: Any, **options: Any) -> Json:
        """Return the JSON object that is the response's body; arguments as Call has them."""
        decoded: Json = decode_response(self.call(method, path, *args, **options))
        return decoded

    def ask(self, path: str) -> Json | None:
        """Return the JSON object at a path, None if there is no such thing. Raises EngineError."""
        with tolerate(404):
            return self.json("GET", path)
        return None

    def open(self, method: str, path: str, *args: Any, **options: Any) -> EngineResponse:
        """Return a response that is still to be read. Raises EngineError, ClientGone, Stopping."""
        call = Call(method, path, *args, **options)
        deadline = time.monotonic() + call.seconds
        version = self.version(deadline)
        response = self._send(call, version, deadline)
        # An Engine that was upgraded refuses a version with 400 before it does anything, so even a
        # request that changes something can be sent again with the version it speaks now.
        if response.status == 400:
            with response:
                error = engine_error(400, response.read_all())
            if (newer := self.version(deadline, refresh=True)) == version:
                raise error
            response = self._send(call, newer, deadline)
        if response.status not in (200, 201, 204, 304):
            with response:
                raise engine_error(response.status, response.read_all())
        return response

    def version(self, deadline: float, refresh: bool = False) -> str:
        """Return the API version in use, such as "1.41"; refresh: ask anew. Raises EngineError."""
        if refresh or time.monotonic() - self._asked > VERSION_KEPT:
            self._ping(deadline)
        return self._pinned or self._version

    def problem(self) -> str:
        """Return why the Engine cannot be used, "" if it can."""
        # While one request waits for the Engine, others get the result before, if it is not old.
        told, problem = self._health
        if self._health_lock.acquire(blocking=time.monotonic() - told >= HEALTH_KEPT):
            try:
                told, problem = self._health
                if time.monotonic() - told >= HEALTH_CACHE:
                    problem = ""
                    try:
                        self._ping(time.monotonic() + PING_TIMEOUT)
                    except EngineError as error:
                        problem = error.message
                    # Invariant: counted from its end, or all who waited for it would ping in turn.
                    self._health = time.monotonic(), problem
            finally:
                self._health_lock.release()
        return problem

    @contextlib.contextmanager
    def reserve(self, ids: Collection[str], *, removes: bool = False) -> Iterator[None]:
        """Keep what a create uses from removals, or a removal from creates. Raises ApiError."""
        # Invariant: nobody waits for a create or a removal of other images and networks, however
        # long a limited key's take.
        own, others = (self.removed, self.used) if removes else (self.used, self.removed)
        ids = [each for each in ids if each]  # what is not there, or not named, holds up nothing
        with self.released:
            if not self.released.wait_for(lambda: set(ids).isdisjoint(others), CALL_TIMEOUT):
                doing = "a container is being created with it" if removes else "it is being removed"
                raise ApiError(409, f"{doing}; try again later", {"Retry-After": "5"})
            own += ids
        try:
            yield
        finally:
            with self.released:
                for each in ids:
                    own.remove(each)
                self.released.notify_all()

    def close(self) -> None:
        for _, sock in self._idle:
            sock.close()

    def _ping(self, deadline: float) -> None:
        """Find the API version that both sides know (Engine API, "Ping"). Raises EngineError."""
        with self._send(Call("GET", "/_ping"), self._pinned, deadline) as pong:
            body = pong.read_all()
        if self._pinned and pong.status == 400:
            message = engine_error(400, body).message
            raise EngineError(502, f"DOCKER_API_VERSION={self._pinned} is refused: {message}")
        offered = re.fullmatch(r"1\.([0-9]{1,3})", pong.getheader("Api-Version") or "")
        if pong.status != 200 or not offered:
            raise EngineError(502, f"{self.address} does not respond as a Docker Engine does")
        self.is_podman = pong.getheader("Libpod-Api-Version") is not None
        self._version = f"1.{min(int(offered[1]), NEWEST_API)}"
        self._asked = time.monotonic()

    def _send(self, call: Call, version: str, deadline: float) -> EngineResponse:
        """Return a response, whatever its status. Raises EngineError, ClientGone and Stopping."""
        target = (f"/v{version}" if version else "") + call.path
        if call.query:
            target += "?" + urlencode(call.query)
        # Invariant: a request that changes something is never sent twice. Only a GET is sent on an
        # idle connection, and again on a new one if the Engine had closed that.
        pool = self._idle if call.method == "GET" and not call.http10 else None
        try:
            if pool and (idle := self._idle_connection()):
                with contextlib.suppress(ConnectionError):
                    return exchange(idle, call, target, deadline, pool)
            return exchange(self._connect(deadline), call, target, deadline, pool)
        except FAILURES as error:
            raise engine_failure(error) from error

    def _idle_connection(self) -> socket.socket | None:
        """Return a connection that is still open, and on which nothing waits to be read."""
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread took the last one
                since, sock = self._idle.pop()
                if time.monotonic() - since < IDLE_CONNECTION and not NEVER.wait_readable(sock, 0):
                    return sock
                sock.close()
        return None

    def _connect(self, deadline: float) -> socket.socket:
        """Return a new connection. Raises EngineError (503)."""
        try:
            deadline = min(deadline, time.monotonic() + CONNECT_TIMEOUT)
            return connect(self.address, self._tls, deadline)
        except (OSError, ValueError) as error:
            self._asked = -math.inf  # it may come back as another version
            message = f"the Engine at {self.address} is not reachable: {describe(error)}"
            if isinstance(error, PermissionError) and self.address.path:
                message += f"; {socket_access(self.address.path)}"
            raise EngineError(503, message) from error


def socket_access(path: str) -> str:
    """Return who may use a Unix socket, as advice."""
    import grp  # loaded here because it is rarely needed

    group = "the group of its socket"
    with contextlib.suppress(OSError, KeyError):
        group = f"the group {grp.getgrgid(os.stat(path).st_gid).gr_name}"
    return f"run the agent as root or as a member of {group}"


def engine_failure(error: Exception) -> EngineError:
    """Return the error for one of FAILURES."""
    if isinstance(error, socket.timeout):
        return EngineError(504, "the Engine did not respond in time")
    return EngineError(502, f"{BROKEN}: {describe(error)}")


def engine_error(status: int, body: bytes) -> EngineError:
    """Return the error for a refusal of the Engine, whose body is {"message": ...}."""
    try:
        message = decode_response(body, {"message": str})["message"]
    except EngineError:
        # As a proxy in between sends it, and the Engine itself of a version it no longer knows.
        return EngineError(502, f"{BROKEN}: status {status} with {body[:200]!r}")
    return EngineError(status if status in (400, 401, 403, 404, 409, 500, 501) else 502, message)


class Answer(dict[str, Any]):
    """An object in a response of the Engine: that a member is missing is the Engine's fault."""

    def __missing__(self, name: str) -> NoReturn:
        raise EngineError(502, f"{BROKEN}: it has no {name}")


def decode_response(body: bytes, shape: Any = OBJECT) -> Any:
    """Return the JSON in a response of the Engine. Raises EngineError (502)."""
    try:
        decoded = json.loads(body, object_pairs_hook=Answer)
    except (ValueError, RecursionError) as error:
        raise EngineError(502, f"{BROKEN}: it is not JSON") from error
    # Invariant: each member is missing or what `shape` says: nobody looks at its type again.
    check_shape(decoded, shape)
    return decoded


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Raise EngineError (502) for a value of another shape; a member that is null is removed."""
    if isinstance(shape, re.Pattern):
        is_right = isinstance(value, str) and shape.fullmatch(value) is not None
    else:
        is_right = isinstance(value, shape if isinstance(shape, type) else type(shape))
    if not is_right:
        raise EngineError(502, f"{BROKEN}: {name} is not of the expected shape")
    if isinstance(shape, list):
        for item in value:
            check_shape(item, shape[0], name)
    elif isinstance(shape, dict) and "*" in shape:
        for item in value.values():
            check_shape(item, shape["*"], name)
    elif isinstance(shape, dict):
        for each in shape.keys() & value:
            if value[each] is None:
                del value[each]
            else:
                check_shape(value[each], shape[each], each)


def json_lines(response: EngineResponse, silence: float = math.inf) -> Iterator[Json | None]:
    """Yield the objects of a body that has one on each line, and None each PING_INTERVAL.

    silence: seconds without a byte, after which it raises EngineError (504); 502 for another body.
    """
    rest, heard = b"", time.monotonic()
    due = heard + PING_INTERVAL
    data: bytes | None = None
    while data != b"":
        data = response.read_part(min(due, heard + silence))
        heard = heard if data is None else time.monotonic()
        if time.monotonic() >= heard + silence:
            raise EngineError(504, f"the Engine said nothing for {silence:.0f} s")
        came = b"\n" if data == b"" else data or b""  # the end of the body ends a line, too
        *lines, rest = (rest + came).split(b"\n")
        rest = rest[: MAX_LINE + 1]  # Invariant: no more of a line of the Engine's is held
        # An image's labels can make an event too long: that must not end the stream.
        for line in filter(bytes.strip, lines):
            yield LINE_TOO_LONG if len(line) > MAX_LINE else decode_response(line)
        if time.monotonic() >= due:
            yield None
            due = time.monotonic() + PING_INTERVAL


# --------------------------------------------------------------------------------------------------
# Containers and images: our requests to the Engine's, its answers to ours
# --------------------------------------------------------------------------------------------------

LIST_FIELDS = {"id": "Id", "names": "Names", "image": "Image", "image_id": "ImageID"}
LIST_FIELDS |= {n.lower(): n for n in "Command Created State Status Ports Labels".split()}
PORT_FIELDS = {"ip": "IP", "private_port": "PrivatePort", "public_port": "PublicPort"}
PORT_FIELDS["type"] = "Type"
Event = tuple[str, Any]  # what an operation tells as it goes on: the event's name and data
NO_NEWS: Event = ("", {})  # comes each PING_INTERVAL, and becomes a ping
# The labels that the agent sets, after OWN_LABELS.
AGENT_LABELS = ("key", "run", "name", "spec", "restart", "replaces", "was", "gate")

# What the Engine's words for a failed pull mean. Those that come first in a message decide: what
# follows may be the registry's own text, or a page of HTML. If none is there, it is 502.
PULL_ERRORS = (
    (502, r"dial tcp|lookup |x509:|unexpected (http )?status.* (429|5\d\d)|error parsing http"),
    (502, "(^|: )(toomanyrequests|unknown): (?!failed to resolve)"),
    (502, "unexpected media type|could not fetch content"),  # a page of HTML, a part that is gone
    (500, "failed to register layer|no space left|read-only file system|(open|mkdir|rename) /"),
    (401, "(pull access denied.*)?no basic auth"),
    (401, "unauthorized|authentication required|(incorrect|invalid) username"),
    (403, r"(^|: )denied\b|is denied|access denied|forbidden"),
    (404, "(manifest|name) unknown|(?<!file )not found|no (such image|matching manifest)"),
    (404, "does not exist|does not match the specified platform"),
)


def container_path(name: str, action: str = "") -> str:
    """Return the Engine's path for a container. Raises ApiError (400) for what is no id or name."""
    # Invariant: only what matches reaches an Engine URL, and it is quoted there all the same.
    if not re.fullmatch(CONTAINER, name):
        raise ApiError(400, f"a container's id or name is {NAME_RULE}")
    return f"/containers/{quote(name, safe='')}" + (f"/{action}" if action else "")


def own_stop_timeout(config: Json) -> int:
    """Return the seconds that a stop takes at most if none are given."""
    wait = config.get("StopTimeout", -1)
    # Invariant: a container makes no wait longer than a client could. -1 is for ever to the Engine.
    return min(MAX_STOP, wait) if wait >= 0 else DEFAULT_STOP


def agent_labels(key: Key, **values: str) -> dict[str, str]:
    """Return the labels that the agent sets on a container. values: those of a deploy or a run."""
    # The others are "", so that none of an image's counts.
    labels = {**dict.fromkeys(AGENT_LABELS, ""), "key": "" if key.master else key.name, **values}
    return {OWN_LABELS + name: value for name, value in labels.items()}


def fill(request: Json, schema: Schema, body: Json, version: int, path: str = "") -> Json:
    """Put a checked body's fields into the Engine's request; return it. Raises ApiError (400)."""
    for name, value in body.items():
        row, here = schema["properties"].get(name, {}), f"{path}{name}"
        if "place" not in row:
            continue
        if row["since"] > version:
            refuse(here, f"needs Engine API 1.{row['since']}; 1.{version} is in use")
        *folders, last = row["place"].split(".")
        place = functools.reduce(lambda above, part: above.setdefault(part, {}), folders, request)
        items = row.get("items", {})
        if row["convert"]:
            value = row["convert"](value)
        elif row.get("properties"):
            value = fill(place.get(last, {}), row, value, version, f"{here}.")
        elif items.get("properties"):
            value = [fill({}, items, v, version, f"{here}[{i}].") for i, v in enumerate(value)]
        # Two fields of ours may be one list of the Engine's: SecurityOpt.
        place[last] = place.get(last, []) + value if isinstance(value, list) else value
    return request


def engine_container(engine: Engine, body: Json) -> tuple[Json, Json]:
    """Return the query and the body of "Create a container" for ours. Raises ApiError (400)."""
    version = int(engine.version(time.monotonic() + CALL_TIMEOUT, refresh=True).partition(".")[2])
    for index, volume in enumerate(body.get("volumes", ())):
        # Invariant: podman writes a mount as source=a,target=b: no path may begin another option.
        paths = volume.get("source", "") + volume["target"]
        if engine.is_podman and re.search("[,\"'\n\r]", paths):
            refuse(f"volumes[{index}]", "must have no comma, quote or line break for podman")
    request = fill({"query": {}, "HostConfig": {}}, CREATE, body, version)
    # What the Engine wants to be told twice.
    request["ExposedPorts"] = {port: {} for port in request["HostConfig"].get("PortBindings", ())}
    for network in body.get("networks", [])[:1]:
        request["HostConfig"]["NetworkMode"] = network["name"]
    return request.pop("query"), request


def find_image(engine: Engine, image: str, platform: str = "") -> Json:
    """Return an inspected image, {} if there is none. Raises EngineError."""
    named = dict(zip(("os", "architecture", "variant"), platform.split("/")))
    return engine.ask(image_path(image, named)) or {}


def find_containers(engine: Engine, **filters: str) -> list[Json]:
    query = {"all": 1, "filters": json.dumps({kind: [value] for kind, value in filters.items()})}
    rows: list[Json] = decode_response(engine.call("GET", "/containers/json", query), OBJECTS)
    return rows


def ids_by_name(engine: Engine, pattern: str) -> dict[str, str]:
    """Return the ids of containers whose names match a regex, by name."""
    rows = find_containers(engine, name=pattern)
    # Not the names that the links of others give it: /other/alias.
    return {n[1:]: row["Id"] for row in rows for n in row.get("Names", ()) if n.count("/") < 2}


def look_up_networks(engine: Engine, body: Json) -> None:
    """Raise EngineError (404) for a network that is not there: the Engine notices at the start."""
    names = [network["name"] for network in body.get("networks", ())]
    for name in {*names, body.get("network_mode", "none")} - {"default", "bridge", "host", "none"}:
        if name.startswith("container:"):
            engine.call("GET", container_path(name.partition(":")[2], "json"))
        else:
            engine.call("GET", f"/networks/{quote(name, safe='')}")


def send_create(engine: Engine, key: Key, query: Json, container: Json) -> Json:
    """Send "Create a container" with the agent's own labels; return {"Id", "Warnings"}."""
    # What a limited key's container is, its image included, is checked before it can start.
    body = {**container, "Labels": {**agent_labels(key), **container.get("Labels", {})}}
    image = find_image(engine, body["Image"], query.get("platform", ""))
    with contextlib.ExitStack() as held:
        if not key.master:
            restrict_brought(key, body, image)
            # Until it was looked at, no other request may start it: see `found_to_change`. Creates
            # of limited keys that come after it count it, too: the Engine may not list it yet.
            engine.unchecked.append(query["name"])
            held.callback(engine.unchecked.remove, query["name"])
            check_count(key, query["name"], [*engine.unchecked, *ids_by_name(engine, ".")])
        used = [image.get("Id", ""), body["HostConfig"].get("NetworkMode", "")]
        held.enter_context(engine.reserve(used))
        created = engine.json("POST", "/containers/create", query, body, START_TIMEOUT)
        if not key.master:
            with removed_on_failure(engine, created["Id"]):
                check_created(key, engine.json("GET", container_path(created["Id"], "json")), body)
    return created


def has_image(engine: Engine, body: Json) -> bool:
    """Return whether the body's image is there, for its platform if it names one."""
    image = find_image(engine, body["image"], body.get("platform", ""))
    found = [image.get(name) for name in ("Os", "Architecture", "Variant")]
    wanted = body["platform"].split("/") if "platform" in body else []
    return bool(image) and found[: len(wanted)] == wanted


@contextlib.contextmanager
def removed_on_failure(engine: Engine, container: str) -> Iterator[None]:
    """Remove a new container, of this id, if what is done within fails."""
    try:
        yield
    except ApiError as error:
        try:
            remove_container(engine, container)
        except EngineError as left:
            message = f"{error}; and container {container[:12]} is left behind: {left.message}"
            raise EngineError(error.status, message) from error
        raise


def remove_container(engine: Engine, container: str) -> None:
    """Remove a container of this id and its anonymous volumes, if it is still there."""
    query = {"force": 1, "v": 1}
    with tolerate(404, 409):  # auto_remove: the Engine itself removes it
        engine.call("DELETE", container_path(container), query, seconds=START_TIMEOUT)


def connect_networks(engine: Engine, container: str, body: Json) -> None:
    """Connect a new container, of this id, to all of its networks but the first."""
    for network in body.get("networks", [])[1:]:
        path = f"/networks/{quote(network['name'], safe='')}/connect"
        endpoint = {"Aliases": network["aliases"]}
        engine.call("POST", path, body={"Container": container, "EndpointConfig": endpoint})


def repeat(call: Callable[[], object], seconds: float, *statuses: int) -> None:
    """Call; for some seconds, call again if that raises an EngineError with one of the statuses."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with tolerate(*statuses):
            call()
            return
        time.sleep(0.5)  # also while the agent is being stopped: its next start goes on
    call()


def start_container(engine: Engine, container: str) -> None:
    engine.call("POST", container_path(container, "start"), seconds=START_TIMEOUT)


def split_image(image: str) -> tuple[str, str]:
    """Return an image's name and its digest, tag, or "latest": without one, all tags are pulled."""
    name, _, digest = image.partition("@")
    slash = name.rfind("/") + 1  # a colon before it belongs to the registry's port
    repository, _, tag = name[slash:].partition(":")
    return name[:slash] + repository, digest or tag or "latest"


def full_repository(image: str) -> str:
    """Return the full name of an image's repository: "docker.io/library/nginx" for "nginx:1"."""
    return split_image(full_reference(image))[0]


def pull_events(engine: Engine, body: Json, auth: str, interrupts: Interrupts) -> Iterator[Event]:
    """Yield ("progress", {...}) and at last ("done", {"image", "digest"}). Raises EngineError."""
    image = body["image"]
    name, tag = split_image(image)
    if re.fullmatch(IMAGE_ID, image):
        raise EngineError(404, f"no such image: {image}; an id cannot be pulled")
    query = {"fromImage": name, "tag": tag, **{k: body[k] for k in ("platform",) if k in body}}
    how = (query, None, PULL_SILENCE, {"X-Registry-Auth": auth} if auth else {}, interrupts)
    try:
        response = engine.open("POST", "/images/create", *how)
    except EngineError as error:
        raise pull_error(error.status, error.message) from error
    digest = tag if ":" in tag else None
    with response:
        for word in json_lines(response, PULL_SILENCE):
            if word is None:
                yield NO_NEWS
                continue
            if told := word.get("error") or word.get("errorDetail", {}).get("message"):
                raise pull_error(500, told)
            shown = {**word.get("progressDetail", {}), **word}
            yield "progress", {n: shown.get(n) for n in ("id", "status", "current", "total")}
            if match := re.fullmatch("Digest: (sha256:[0-9a-f]{64})", word.get("status", "")):
                digest = match[1]
    # With the tag that was pulled, also if the body names none.
    full = image if image.endswith((f":{tag}", f"@{tag}")) else f"{name}:{tag}"
    if not digest:
        digest = find_digest(engine.json("GET", f"/images/{quote(full)}/json"), name)
    yield "done", {"image": full, "digest": digest}


def pull_error(status: int, message: str) -> EngineError:
    """Return the error for a failed pull."""
    if status != 500:
        return EngineError(status, message)
    # The Engine reports most of a registry's refusals as 500, or inside a 200, with nothing but a
    # sentence to tell them apart: the one place where an error's text is looked at.
    # Invariant: only so much of a registry's text is searched: the time grows with its square.
    text = message[:MAX_MESSAGE]
    found = [(re.search(words, text, re.IGNORECASE), code) for code, words in PULL_ERRORS]
    starts = [(match.start(), code) for match, code in found if match]
    return EngineError(min(starts, default=(0, 502))[1], message)


def pull_image(engine: Engine, body: Json, auth: str, interrupts: Interrupts) -> Json:
    """Pull an image; return {"image", "digest", "status"}. Raises EngineError."""
    status = ""
    for _, told in pull_events(engine, body, auth, interrupts):
        status = told.get("status") or status
    return {**told, "status": status}


def find_digest(image: Json, repository: str) -> str | None:
    """Return the digest that an inspected image has in a repository, None if it has none there."""
    for entry in image.get("RepoDigests", ()):
        name, _, digest = entry.partition("@")
        if full_repository(name) == full_repository(repository):
            return str(digest)
    return None


@functools.lru_cache(maxsize=4)
def shape_rows(body: bytes, master: bool) -> list[tuple[Json, bytes]]:
    """Return our rows of the Engine's list, each also as JSON. Cached, so nothing changes one."""
    rows = []
    for container in decode_response(body, OBJECTS):
        row: Json = {ours: container.get(theirs) for ours, theirs in LIST_FIELDS.items()}
        row.update(id=container["Id"], names=row["names"] or [], labels=row["labels"] or {})
        ports = row["ports"] or ()
        row["ports"] = [{k: port.get(v) for k, v in PORT_FIELDS.items()} for port in ports]
        if not master:
            row["names"] = [f"/{own_name(row)}"]
            row["labels"] = {k: v for k, v in row["labels"].items() if not k.startswith(OWN_LABELS)}
        rows.append((row, encode_json(row)))
    return rows


def own_name(row: Json) -> str:
    """Return a container's name, "" for none. One that is linked to has /other/alias, too."""
    return next((name[1:] for name in row["names"] if name.rfind("/") == 0), "")


def is_listed(row: Json, key: Key, query: Json) -> bool:
    label, has_value, value = query.get("label", "").partition("=")
    if label and (label not in row["labels"] or (has_value and row["labels"][label] != value)):
        return False
    name = own_name(row)
    return query.get("name", "") in name and key.covers("containers", name)


# --------------------------------------------------------------------------------------------------
# Images, networks, volumes: lists, removal, prune
# --------------------------------------------------------------------------------------------------

KEPT_IMAGES = 3  # of each repository, by a prune that names no number


def count_users(engine: Engine) -> collections.Counter[tuple[str, str]]:
    """Return how many containers, stopped ones included, use each thing: {("volume", name): 2}."""
    # Images are counted by id; networks by id, or by what a container that never ran calls them.
    users: collections.Counter[tuple[str, str]] = collections.Counter()
    for container in find_containers(engine):
        networks = container["NetworkSettings"].get("Networks", {})
        used = {("network", value["NetworkID"] or name) for name, value in networks.items()}
        mounts = container.get("Mounts", ())
        used |= {("volume", mount["Name"]) for mount in mounts if mount["Type"] == "volume"}
        users.update(used | {("image", container["ImageID"])})
    return users


def read_images(engine: Engine) -> list[Json]:
    """Return all images as we list them, except the intermediate ones of builds."""
    images = []
    found = decode_response(engine.call("GET", "/images/json"), OBJECTS)
    users = count_users(engine)  # after the images, so that no user of theirs is missed
    for row in found:
        image: Json = {"id": row["Id"]}
        for kind, names in ("tags", "RepoTags"), ("digests", "RepoDigests"):
            # Before API 1.43 "<none>:<none>" stands for none.
            image[kind] = [name for name in row.get(names, ()) if "<none>" not in name]
        # containerd's store lists what was pulled by its digest among the tags, too.
        image["tags"] = [name for name in image["tags"] if "@" not in name]
        image.update(size=row["Size"], created=row["Created"])
        images.append({**image, "containers": users["image", image["id"]]})
    return images


def remove_reference(engine: Engine, reference: str) -> dict[str, list[str]]:
    """Untag an image, and remove it with its last tag; return {"untagged", "deleted"}."""
    # Invariant: never forced, so that the Engine itself refuses (409) an image in use.
    with engine.reserve([find_image(engine, reference).get("Id", "")], removes=True):
        body = engine.call("DELETE", f"/images/{quote(reference)}", seconds=START_TIMEOUT)
    rows = decode_response(body, OBJECTS)
    return {w.lower(): [row[w] for row in rows if w in row] for w in ("Untagged", "Deleted")}


def creation_key(engine: Engine, image: Json) -> tuple[int, str, str, str]:
    """Return a sort key: when an image was created; of reproducible builds, when it was tagged."""
    found = find_image(engine, image["id"])
    fraction = re.sub(r"^[^.]*\.?([0-9]*).*", r"\1", str(found.get("Created")))
    tagged = str(found.get("Metadata", {}).get("LastTagTime")).rstrip("Z")
    return image["created"], fraction, tagged, image["id"]


def prune_images(engine: Engine, key: Key, repository: str, keep: int, *, dry_run: bool) -> Json:
    """Remove old images; return {"removed", "reclaimed"}. Raises EngineError."""
    # Of each repository that the key's patterns cover (or the named one alone) the newest `keep`
    # images stay, and so does every image in use. An unused image with neither tag nor digest goes,
    # unless one repository is named.
    removed: list[Json] = []
    reclaimed = 0  # bytes of the images that lost their last reference
    counts: collections.Counter[str] = collections.Counter()  # images of a repository so far
    images = read_images(engine)
    for image in sorted(images, key=functools.partial(creation_key, engine), reverse=True):
        own = image["tags"] or image["digests"]
        counts.update({full_repository(reference) for reference in own})
        if image["containers"] or not (image["tags"] or key.master):
            continue
        # A pattern that covers every tag of a repository covers the empty tag, too.
        names = {name for name in map(full_repository, own) if counts[name] > keep}
        names = {n for n in names if repository in ("", n) and key.covers("images", f"{n}:")}
        going = [reference for reference in own if full_repository(reference) in names]
        if not (own or repository):
            going = [image["id"]]
        gone = []
        for reference in going:
            with tolerate(404, 409):  # it is gone already, or its image in use by now
                if not dry_run:
                    remove_reference(engine, reference)
                gone.append(reference)
        removed += [{"image": name, "id": image["id"], "size": image["size"]} for name in gone]
        every = {full_repository(reference) for reference in image["tags"] + image["digests"]}
        if gone and gone == going and names == every:
            reclaimed += image["size"]
    return {"removed": removed, "reclaimed": reclaimed}


def read_networks(engine: Engine) -> list[Json]:
    networks = []
    for found in decode_response(engine.call("GET", "/networks"), [OBJECT]):
        row = {name.lower(): found[name] for name in ("Id", "Name", "Driver", "Internal")}
        subnets = [pool["Subnet"] for pool in found["IPAM"].get("Config", ()) if "Subnet" in pool]
        networks.append({**row, "subnets": subnets, "labels": found.get("Labels", {})})
    return networks


def find_network(engine: Engine, name: str) -> Json | None:
    """Return the network of exactly this name; the Engine's own filter takes a part of it."""
    return next((row for row in read_networks(engine) if row["name"] == name), None)


def read_volumes(engine: Engine) -> list[Json]:
    volumes = []
    found = engine.json("GET", "/volumes").get("Volumes", ())
    users = count_users(engine)
    for row in found:
        volume = {"name": row["Name"], "driver": row["Driver"], "created": row.get("CreatedAt")}
        count = users["volume", row["Name"]]
        volumes.append({**volume, "labels": row.get("Labels", {}), "containers": count})
    return volumes


# --------------------------------------------------------------------------------------------------
# Logs: from the Engine's frames to lines, to server-sent events and JSON
# --------------------------------------------------------------------------------------------------

# A log loses nothing but its beginning. So a line that a client has is either there, and what
# follows it is new, or it is gone, and all that is left came after it. A line is found by what it
# is: its stamp, and its number among the lines of that stamp, of both streams.
# Whatever is asked, what follows a line or the last so many lines, is answered by a reading of the
# log's last entries to their end. A line is in doubt where the entries before may have had its
# beginning or others of its stamp; if the answer has one, or lacks its line, more entries are read,
# and at last all. A follower has what comes later: it is opened before the reading, and what it has
# up to the reading's last line is left out. An entry that is damaged ends a reading; so where all
# that is longer fails, the entries behind it are read alone.
# Invariant: nothing compares the order of stamps; clocks step back.

Entry = tuple[int, bytes]  # stream type, "STAMP text\n" as the Engine logged it; no \n: goes on
# Stamp in Docker's form, number among the lines of that stamp (0: in doubt), stream type, text.
Line = tuple[bytes, int, int, bytes]
Point = Optional[tuple[bytes, int]]  # a line's stamp and number; None: before the oldest line
# The number of a log's last entries that are read, and of the first of these whose lines' numbers
# are in doubt. None: no number is, or no longer tail could settle it.
Tail = tuple[int, Optional[int]]
Render = Callable[[list[Line]], bytes]
Ending = tuple[str, Json]  # the last event's name and data
Stream = Generator[bytes, None, None]  # of a response's body

STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
FRAME_HEADER = struct.Struct(">BxxxL")
NEWLINE, RETURN = b"\n\r"
STAMP_SIZE = len("2026-02-21T10:00:00.000000000Z")
ALL = sys.maxsize  # entries, or lines
WHOLE: Tail = (ALL, None)
NEAR: Tail = (LOOK, NUMBERED)
REMOVED: Ending = ("end", {"reason": "removed", "exit_code": None})


class LogDamaged(EngineError):
    """The Engine reports that it cannot read on in a log: a frame of type 3, or no stamp."""


class Demultiplexer:
    """Takes frames out of bytes: {type, 0, 0, 0, size as big-endian uint32}, then the payload.

    Docker Engine API, "Attach to a container", section "Stream format".
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the complete entries; b"": the end. Raises EngineError, after those before it."""
        is_end, data, position = not data, self._rest + data, 0
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
        if is_end and self._rest:
            raise EngineError(502, "the Engine broke off in the middle of a frame")
        return entries


class TtyDemultiplexer(Demultiplexer):
    """Takes entries out of a terminal's log, which has no frames but each entry's stamp."""

    def feed(self, data: bytes) -> list[Entry]:
        """Return the complete entries; b"": the end, which ends a line without a newline, too."""
        is_end, data, position = not data, self._rest + data, 0
        entries: list[Entry] = []
        stamp_at = re.compile(LOG_STAMP).match
        while position < len(data):
            end = data.find(b"\n", position) + 1
            stamp = stamp_at(data, position)
            if not stamp:
                if entries or (not end and len(data) < 64):
                    break
                words = data[:end].decode(errors="replace").strip() or "it has no timestamps"
                raise LogDamaged(502, f"the Engine failed to read the log: {words}")
            # An entry of a long line ends where the very same stamp is put in again: after
            # ENTRY_SIZE bytes of the container's, or more where the Engine put U+FFFD for one.
            # Invariant: only a stamp to the nanosecond, which no container can know beforehand.
            again = data.find(stamp[0], stamp.end() + ENTRY_SIZE, end or len(data))
            if again >= 0 and len(stamp[2] or b"") == 9:
                end = again
            elif not end:
                if len(data) - position <= MAX_LINE:
                    break
                data, end = data + stamp[0], len(data)  # the line goes on as another entry
            entries.append((1, data[position:end]))
            position = end
        self._rest = data[position:]
        if is_end and self._rest:
            entries.append((1, self._rest))
        return entries


class LineAssembler:
    """Joins entries to lines, stdout and stderr apart, and numbers the lines of each stamp.

    A stamp that the last NUMBERED entries did not have counts anew: so wherever in a log reading
    begins, a line has the same number, once that many entries were read. doubt: as Tail has it. A
    line in doubt has the number 0: one of the first entries, and the first line of each stream, as
    it may lack its beginning.
    """

    def __init__(self, doubt: int | None = None, *, is_podman: bool = False) -> None:
        # Stream type: after how many entries its unfinished line began, 0 if in doubt; its stamp,
        # its text, and whether it may go on in an entry of another stamp.
        self.unfinished: dict[int, tuple[int, bytes, bytearray, bool]] = {}
        if doubt is not None:
            self.unfinished = {kind: (0, b"", bytearray(), True) for kind in STREAMS}
        self._seen: dict[bytes, tuple[int, int]] = {}  # stamp: the last entry with it, its number
        self._count = 0  # entries so far
        self._doubt, self._is_podman = doubt or 0, is_podman
        self._second = b""  # of the stamp before: its first 20 bytes

    def feed(self, entries: list[Entry]) -> list[Line]:
        """Return the complete lines. Raises EngineError for an entry without a stamp."""
        if len(self._seen) > NUMBERED + NUMBERED // 2:
            oldest = self._count - NUMBERED
            self._seen = {stamp: seen for stamp, seen in self._seen.items() if seen[0] >= oldest}
        lines: list[Line] = []
        unfinished, second = self.unfinished, self._second
        for at, (kind, payload) in enumerate(entries, self._count + 1):
            # Invariant: a stamp is matched in full before any byte of it is used.
            if payload[:20] != second or payload[29:31] != b"Z " or not payload[20:29].isdigit():
                stamp = payload[: payload.find(b" ") + 1]  # b"" without a space
                # In Docker's form: podman's has a zone, and fewer digits.
                payload = stamp_from(stamp_time(stamp[:-1])) + payload[len(stamp) - 1 :]
                self._second = second = payload[:20]
            stamp = payload[:STAMP_SIZE]
            if payload[-1] != NEWLINE or kind in unfinished or len(payload) > MAX_LINE:
                lines += self._join(at, kind, stamp, payload[STAMP_SIZE + 1 :])
                continue
            text = payload[STAMP_SIZE + 1 : -2 if payload[-2] == RETURN else -1]
            lines.append((stamp, self._number(at, stamp), kind, text))
        self._count += len(entries)
        return lines

    def end(self) -> list[Line]:
        """Return the lines that the end of the log left without a newline."""
        begun = self.unfinished.items()
        return self.feed([(kind, stamp + b" \n") for kind, (_, stamp, text, _) in begun if text])

    def _number(self, at: int, stamp: bytes, begun: int = 1) -> int:
        """Count a line of this stamp, which entry `at` ends, and return its number."""
        seen = self._seen.get(stamp)
        if not seen or at - seen[0] > NUMBERED:
            number = 1 if at > self._doubt else 0
        else:
            number = seen[1] and seen[1] + 1
        self._seen[stamp] = at, number
        return number if begun else 0

    def _join(self, at: int, kind: int, stamp: bytes, text: bytes) -> list[Line]:
        """Add an entry to its line; return the line if complete, and what exceeds MAX_LINE."""
        new = at, stamp, bytearray(), True
        begun, held_stamp, held, goes_on = self.unfinished.pop(kind, new)
        # Docker's entries of one line have one stamp, or are full, as the log driver journald's;
        # else the container ended there, and ran again. podman stamps each entry.
        if stamp != held_stamp and not (goes_on or self._is_podman):
            self.unfinished[kind] = begun, held_stamp, held, True
            ended = self._join(at, kind, held_stamp, b"\n")
            return ended + self._join(at, kind, stamp, text)
        held_stamp = held_stamp or stamp
        held += text
        if whole := held.endswith(b"\n"):
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
            self.unfinished[kind] = begun, held_stamp, held, len(text) >= ENTRY_SIZE
        return [(held_stamp, self._number(at, held_stamp, begun), kind, text) for text in texts]


def stamp_from(nanoseconds: int) -> bytes:
    """Return Unix nanoseconds as the Engine stamps log entries: STAMP_SIZE bytes."""
    second, fraction = divmod(nanoseconds, 10**9)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    # An entry without a time has the year 1, which %Y gives no zeros on Linux.
    return f"{whole:0>19}.{fraction:09d}Z".encode()


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


def parse_moment(path: str, value: str) -> int:
    """Return since or until as Unix nanoseconds; a float is too coarse. Raises ApiError (400)."""
    if match := re.fullmatch(UNIX_TIME, value):
        return int(match[1] + (match[2] or "").ljust(9, "0"))
    if re.fullmatch(f"(?:{DURATION})+", value):
        parts = re.findall(DURATION, value)
        ago = sum(int(a + b.ljust(15, "0")) * UNITS[unit] // 10**15 for a, b, unit in parts)
        return time.time_ns() - ago
    with contextlib.suppress(EngineError):
        return stamp_time(value.encode())
    refuse(path, "must be Unix seconds, RFC 3339 (2026-02-21T10:00:00Z), or how long ago (10m, 1h)")


class LogSource(NamedTuple):
    """One container's log, as a request asked for it."""

    engine: Engine
    container: str  # the full id: a name may pass to another container
    tty: bool
    kinds: frozenset[int] = frozenset(STREAMS)  # the types of the streams asked for
    since: int = 0  # Unix nanoseconds; 0: no limit, as in Docker's own API
    until: int = 0
    interrupts: Interrupts = NEVER

    def inspect(self) -> Json | None:
        """Return the container's inspect JSON, None if it was removed. Raises EngineError."""
        return self.engine.ask(container_path(self.container, "json"))


class LogReading:
    """The lines of one response of the Engine, which has a tail of the log."""

    def __init__(self, source: LogSource, response: EngineResponse, tail: Tail) -> None:
        self.point: Point = None  # the line behind which to begin; None once it came
        self.mark: Optional[Entry] = None  # the entry from which on they are counted; None: all
        self.marked = 0  # of those
        self.is_done = self.is_doubtful = False  # it ended; a line in doubt may be the point
        self.entries = 0  # that came
        self.first: Optional[Entry] = None  # of them
        self.final: Optional[Entry] = None
        self.rest: list[Line] = []  # what the end left without a newline
        self.reach = WHOLE  # the tail in which to look for what comes after the last line
        # Set by keep_last, for the lines after the last one in doubt: the first and the last line,
        # the number of those that are of the streams asked for, and the last of those.
        self.oldest: Optional[Line] = None
        self.newest: Point = None
        self.total = 0
        self.kept: collections.deque[Line] = collections.deque()
        self.response, self.tail, self._kinds = response, tail, source.kinds
        is_podman = source.engine.is_podman
        is_raw = source.tty and not is_podman
        self._demultiplexer = TtyDemultiplexer() if is_raw else Demultiplexer()
        self._assembler = LineAssembler(tail[1], is_podman=is_podman)

    def __iter__(self) -> Iterator[list[Line]]:
        """Yield lines, [] at times, until the response ends. Raises EngineError."""
        with self.response:
            while not (self.is_done or self.is_doubtful):
                lines = self.read(time.monotonic() + CALL_TIMEOUT)
                if lines is None:
                    raise EngineError(504, "the Engine did not finish the log in time")
                yield lines

    def read(self, deadline: float) -> list[Line] | None:
        """Return the lines that came, None if none came until deadline. Raises EngineError."""
        data = self.response.read_part(deadline)
        if data is None:
            return None
        entries = self._demultiplexer.feed(data)
        lines = self._assembler.feed(entries)
        self.entries += len(entries)
        if entries:
            self.first, self.final = self.first or entries[0], entries[-1]
        if self.marked or not self.mark:
            self.marked += len(entries)
        elif self.mark in entries:
            self.marked = len(entries) - entries.index(self.mark)
        if not data:
            self.is_done = True
            self.rest = self._assembler.end()
            if self.entries >= min(self.tail[0], LOOK) and not self.rest:
                self.reach = NEAR if self.tail[1] or self.tail[0] > LOOK else self.tail
        return lines

    def certain(self, lines: list[Line]) -> list[Line]:
        """Return those of the lines that come after the point, up to the first in doubt."""
        if self.tail[1] is None and not self.point:
            return lines
        start, end = 0, len(lines)
        for index, (stamp, number, _, _) in enumerate(lines):
            if (stamp, number) == self.point:
                self.point, start = None, index + 1
            elif not number and (not self.point or stamp == self.point[0]):
                self.is_doubtful, end = True, index
                break
        return [] if self.point else lines[start:end]

    def keep_last(self, wanted: int = 0, *, unfinished: bool = False) -> LogReading:
        """Read to the end, keeping lines; unfinished: also what that left without a newline."""
        size = 0
        for lines in self:
            if unfinished and self.is_done:
                lines += self.rest
            for line in lines:
                if not line[1]:
                    self.kept.clear()
                    size, self.total, self.oldest = 0, 0, None
                    continue
                self.oldest, self.newest = self.oldest or line, line[:2]
                if line[2] in self._kinds:
                    self.kept.append(line)
                    self.total += 1
                    size += LINE_COST + len(line[3])
                # Invariant: no more is kept than MAX_KEPT, or one line, however many are asked for.
                while len(self.kept) > wanted or (size > MAX_KEPT and len(self.kept) > 1):
                    size -= LINE_COST + len(self.kept.popleft()[3])
        return self


class LogCursor:
    """A place in a log, behind the line `last`; it moves on as lines are handed out."""

    def __init__(self, source: LogSource, last: Point = None, wanted: int = ALL) -> None:
        """wanted: how many of the log's last lines to begin with, if there is no `last`."""
        self.last = last
        self.due = time.monotonic() + PING_INTERVAL  # until when to wait for lines
        self.ending = REMOVED  # unless the Engine still has the container
        self._source, self._wanted = source, wanted
        self._since = 0 if last else source.since  # after `last`, nothing counts but the order
        # The tail in which to look for `last` first.
        self._reach = WHOLE if last is None and wanted == ALL else NEAR
        self._skip, self._left = 0, ALL  # lines to leave out, and then to hand out
        # How many more entries of a tail are read for the numbers of its lines.
        self._doubt = NUMBERED if wanted * LINE_COST > MAX_KEPT else 0

    def read(self) -> Iterator[list[Line]]:
        """Yield the lines that the log has, the last `wanted` of them. Raises EngineError."""
        unfinished = self.ending[0] == "end"
        if self._wanted < ALL and (yield from self._tail(unfinished=unfinished)):
            return
        self._left = self._wanted
        reading = yield from self._find()
        theirs = self._reading((1, None), http10=False).keep_last()
        if not reading.entries or reading.final != theirs.final:
            reading = yield from self._find(http10=False)  # it was cut, or more was written
        if unfinished:
            yield self._hand_out(reading.rest)

    def check(self) -> None:
        """Raise EngineError if the Engine refuses the log."""
        # podman 4.3 may begin its response later, but refuses at once. A stop becomes an event.
        with tolerate(504), contextlib.suppress(Stopping):
            self._reading((0, None), seconds=HEAD_WAIT).response.close()

    def follow(self, found: Json | None, patience: float = 0) -> Generator[list[Line], None, None]:
        """Yield lines until the container ends, [] at times; set `ending`. Raises EngineError.

        found: the container; None: it was removed. patience: seconds in which it may run again; 0:
        it runs once, and is followed for as long, however often the Engine ends its response.
        """
        started = found["State"].get("StartedAt") if found else None
        self._doubt = NUMBERED
        with tolerate(404, 409):  # it is removed, or being removed while it still runs
            ending = log_ending(found, started)
            if not ending and self._reach == WHOLE:  # so that a follower begins near the end
                yield from self._find()
            while not (ending or self._seconds_left() <= 0):
                was_dropped = yield from self._arriving()
                ending = log_ending(self._source.inspect(), started)
                if patience and ending and ending[1].get("reason") == "exited":
                    time.sleep(patience)  # a restart stops it first, and looks the same until then
                    later = log_ending(self._source.inspect(), started)
                    ending = later if later and later[0] == "restart" else ending
                if was_dropped and not ending and self._seconds_left() > 0:
                    if patience:
                        message = "the Engine ended the log of a running container; reconnect"
                        raise EngineError(502, message)
                    time.sleep(HEAD_WAIT)  # a proxy may have ended it, as it was quiet
            self.ending = ending or ("end", {"reason": "until", "exit_code": None})
            yield from self.read()

    def _find(self, *, http10: bool = True) -> Generator[list[Line], None, LogReading]:
        """Yield the lines after `last` from a reading that has it; return the reading."""
        damage = None
        for tail in self._tails():
            reading = self._reading(tail, http10=http10)
            reading.point = self.last
            try:
                for lines in reading:
                    yield self._hand_out(reading.certain(lines))
            except LogDamaged as error:
                damage = error
                continue
            reading.rest = reading.certain(reading.rest)
            if not (reading.point or reading.is_doubtful):
                self._reach = reading.reach
                return reading
            if http10 and tail == WHOLE:  # it may have been cut, which is an error in chunks
                return (yield from self._find(http10=False))
        if damage:
            raise damage
        # It is gone, so all that is left came after it.
        self.last, self._since, self._reach, self._skip = None, self._source.since, WHOLE, 0
        return (yield from self._find(http10=http10))

    def _tails(self) -> Iterator[Tail]:
        """Yield the tails in which to look for `last`."""
        if self._reach != WHOLE:
            yield self._reach
        yield WHOLE
        # The longest tail that comes in full begins behind the last damaged entry.
        low, middle, high = 0, LOOK, LOOK + 1
        while self.last and high - low > 1:
            reading = self._reading((middle, None))
            with contextlib.suppress(LogDamaged):
                reading.keep_last()
            low, high = (middle, high) if reading.entries >= middle else (low, middle)
            middle = (low + high) // 2
        if low and high <= LOOK:
            yield low, None

    def _arriving(self) -> Generator[list[Line], None, bool]:
        """Yield the lines after `last`, [] at times; return whether the Engine's response ended."""
        follower, reading, reach = None, None, self._reach
        seconds = max(HEAD_WAIT, self.due - time.monotonic())
        with contextlib.ExitStack() as stack:
            # The follower comes first: what the reading has, or will have, is then in it, too.
            with tolerate(504):  # podman before 5 sends no head until there is a line
                follower = self._reading(reach, follow=1, seconds=seconds)
                stack.enter_context(follower.response)
            if self._wanted < ALL:
                reading = yield from self._tail()
                self._wanted = ALL  # they are handed out, or come next
            reading = reading or (yield from self._find())
            if not follower or self._reach not in (reach, WHOLE):
                return False
            follower.point = self.last
            while not (follower.is_done or follower.is_doubtful or self._seconds_left() <= 0):
                lines = follower.read(min(self.due, time.monotonic() + self._seconds_left()))
                # The line is among the first so many, unless an Engine whose log rotates lost it.
                if follower.point and (lines is None or follower.entries > reading.entries + LOOK):
                    break
                yield self._hand_out(follower.certain(lines or []))
            if not follower.point:
                # What was left unfinished may have begun before the follower's first entry.
                self._reach = WHOLE if reading.rest else follower.reach
            return follower.is_done

    def _hand_out(self, lines: list[Line]) -> list[Line]:
        """Move behind the lines; return those of them that were asked for."""
        if lines:
            self.last = lines[-1][:2]
        if len(self._source.kinds) < len(STREAMS):
            lines = [line for line in lines if line[2] in self._source.kinds]
        skip, self._skip = self._skip, max(0, self._skip - len(lines))
        lines = lines[skip : skip + self._left]
        self._left -= len(lines)
        return lines

    def _reading(
        self, tail: Tail, *, follow: int = 0, http10: bool = True, seconds: float = CALL_TIMEOUT
    ) -> LogReading:
        """Ask for those of a tail's entries that since and until leave."""
        source, since = self._source, self._since
        path = container_path(source.container, "logs")
        if source.engine.is_podman:
            # podman's tails join a line's first entry to the line before, and its stamps have no
            # fractions: all of a second is read. Only its own API frames a terminal's log.
            tail, since = WHOLE, since - since % 10**9
            path = "/libpod" + path if source.tty else path
        query: dict[str, Any] = {"stdout": 1, "stderr": 1, "timestamps": 1, "follow": follow}
        query["tail"] = tail[0] if tail != WHOLE else "all"
        for name, moment in (("since", since), ("until", source.until)):
            if moment:
                query[name] = "{}.{:09d}".format(*divmod(moment, 10**9))
        response = source.engine.open(
            "GET", path, query, http10=http10, seconds=seconds, interrupts=source.interrupts
        )
        return LogReading(source, response, tail)

    def _seconds_left(self) -> float:
        until = self._source.until
        return (until - time.time_ns()) / 10**9 if until else math.inf

    def _tail(self, *, unfinished: bool = False) -> Generator[list[Line], None, LogReading | None]:
        """Yield the last `wanted` lines; move before them and return None if they are too many."""
        # The Engine's own tail counts entries, of which a long line has several, and of both
        # streams. So larger ones are read, up to one that has a line more. If damage takes from one
        # what the Engine's own has, that is the answer.
        wanted = self._wanted
        least = max(wanted, 1)  # what comes after no line at all is found behind the last
        found = theirs = self._reading((least, None), http10=False)
        theirs.keep_last(wanted, unfinished=unfinished)
        size = wanted + wanted // 8 + 64 + self._doubt
        with contextlib.suppress(LogDamaged):
            is_cut = self._source.until or len(theirs.kept) < min(wanted, theirs.total)
            while is_cut or theirs.entries in (0, least):
                larger = self._reading(WHOLE if size >= ALL else (size, self._doubt), http10=False)
                larger.mark = theirs.first
                larger.keep_last(wanted, unfinished=unfinished)
                is_full = larger.entries >= size
                if not is_full and larger.marked < theirs.entries:
                    break
                if size >= ALL or (is_full and larger.total > wanted):
                    found = larger
                    break
                size = 16 * size if is_full else ALL
        if len(found.kept) == min(wanted, found.total):
            self.last, self._reach = found.newest, found.reach
            yield list(found.kept)
            return found
        if not self._doubt:  # no number by which to find them again
            self._doubt = NUMBERED
            return (yield from self._tail(unfinished=unfinished))
        self._reach = found.tail
        if found.oldest and found.total > wanted:
            self.last, self._reach = found.oldest[:2], (found.entries + LOOK, NUMBERED)
            self._skip = found.total - wanted - (found.oldest[2] in self._source.kinds)
        return None


def line_object(line: Line, *, timed: bool) -> bytes:
    """Return a line as JSON, in which no CR or LF is left to forge a field of an event."""
    stamp, _, kind, text = line
    shown = {"time": stamp.decode()} if timed else {}
    shown.update(stream=STREAMS[kind], line=text.decode("utf-8", "replace"))
    return encode_json(shown)


def line_texts(lines: list[Line], stamps: bool, as_json: bool) -> list[bytes]:
    """Return what each line is shown as; JSON objects are UTF-8 already."""
    if as_json:
        return [line_object(line, timed=True) for line in lines]
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
    return encode_json([text.decode("utf-8", "replace") for text in texts])[1:-1]


def event(name: str, data: Any) -> bytes:
    """Return one named server-sent event; JSON holds no bare line end."""
    return f"event: {name}\ndata: ".encode() + encode_json(data) + b"\n\n"


def log_document(batches: Iterator[list[Line]], render: Render) -> Stream:
    """Yield {"lines": [...]} as it is read. Raises EngineError, which leaves it broken off."""
    items = map(render, filter(None, batches))
    # The first lines are read before any byte is sent: a failure until then has a status.
    yield b'{"lines":[' + next(items, b"")
    yield from (b"," + more for more in items)
    yield b"]}\n"


def log_events(cursor: LogCursor, found: Json, render: Render) -> Stream:
    """Yield the event stream of a log that is followed. Raises EngineError or Stopping."""
    yield STREAM_START
    for lines in cursor.follow(found, RESTART_WAIT):
        if lines or time.monotonic() >= cursor.due:
            yield render(lines) if lines else PING
            cursor.due = time.monotonic() + PING_INTERVAL
    yield event(*cursor.ending)


def log_ending(found: Json | None, started: Any) -> Ending | None:
    """Return the event that ends a followed log; None while the run since `started` goes on."""
    if found is None:
        return REMOVED
    state, status = found["State"], found["State"].get("Status")
    exit_code = state.get("ExitCode")
    # podman: "stopping" still runs; "stopped" has ended, and its restart policy is not applied yet.
    is_running = state.get("Running") or status == "stopping"
    restarts = restart_policy(found.get("HostConfig", {})) != NO_RESTART
    is_restarting = state.get("Restarting") or (status == "stopped" and restarts)
    if is_restarting or (is_running and state.get("StartedAt") != started):
        exit_code = exit_code if is_restarting else None
        return "restart", {"exit_code": exit_code, "restart_count": found.get("RestartCount")}
    if is_running:
        return None
    reason = {"removing": "removed", "dead": "removed", "created": "created"}.get(status, "exited")
    return "end", {"reason": reason, "exit_code": None if reason == "created" else exit_code}


# --------------------------------------------------------------------------------------------------
# Deploy: the state machine, the gate, recovery
# --------------------------------------------------------------------------------------------------

# All state is in names and labels. The new container is created as NAME.next; the old one becomes
# NAME.prev and, which is the commit, NAME.old. Both have the restart policy "no" from the old one's
# stop until the gate is passed, so that an Engine that restarts in between starts neither.
NEXT, PREV, OLD = HELPER_NAMES
NO_RESTART = {"Name": "no", "MaximumRetryCount": 0}
NEVER_STARTED = "0001-01-01T00:00:00Z"
GATE = {"timeout": 60, "stable": 10}  # seconds
NO_EVIDENCE: Json = {"rolled_back": False, "exit_code": None, "health": None, "logs": []}
UNREACHABLE = (502, 503, 504)  # statuses of an Engine that has to be waited for

# The last is "done" or "error", with a Response: an exception would keep the request's body.
Told = queue.SimpleQueue[Event]


class Journal(NamedTuple):
    """What a deploy wrote into the labels of the container that it created."""

    name: str  # that was deployed; "" if no deploy created the container
    spec: str  # the body's hash
    restart: Json  # the container's own restart policy
    replaces: str  # the id of the old container, "" for none
    was: Json  # the old one: {"running": bool, "restart": policy}
    gate: Json  # {"timeout": seconds, "stable": seconds}


class Found(NamedTuple):
    id: str
    container: Json  # as inspected
    image: Json  # {} if it was removed
    journal: Journal


class GateError(ApiError):
    """The new container exited, is unhealthy, or did not become healthy in time."""


NO_JOURNAL = Journal("", "", NO_RESTART, "", {"running": False, "restart": NO_RESTART}, GATE)


def read_journal(labels: Json) -> Journal:
    """Return what a deploy wrote, NO_JOURNAL if these are not the labels of a deploy."""
    values: Json = {field: labels.get(OWN_LABELS + field, "") for field in Journal._fields}
    with contextlib.suppress(ApiError):
        for field, schema in JOURNAL.items():
            values[field] = validate(schema, decode_json(values[field].encode()))
        return Journal(**values)
    return NO_JOURNAL


def restart_policy(host_config: Json) -> Json:
    policy: Json = host_config.get("RestartPolicy", {})
    # An update to an empty name does nothing.
    return {**NO_RESTART, **policy} if policy.get("Name") else NO_RESTART


def health_of(container: Json) -> str:
    """Return "healthy", "unhealthy" or "starting", "" without a health check."""
    return str(container["State"].get("Health", {}).get("Status", "")).replace("none", "")


def own_container() -> str:
    """Return the id of the container that this process runs in, "" for none."""
    # The Engine mounts these files from a folder named by the id, whatever network and hostname.
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        path = rb"/([0-9a-f]{64})/\S* /etc/(?:hostname|hosts|resolv\.conf) "
        if match := re.search(path, file.read()):
            return match[1].decode()
    return ""


class Deployment:
    """The containers of one name; each step is one Engine call, perhaps the last before a crash."""

    def __init__(self, engine: Engine, name: str, stopping: threading.Event) -> None:
        """stopping: is set once no swap may begin."""
        self.engine, self.name, self.stopping = engine, name, stopping
        self.told: Told = queue.SimpleQueue()
        self.is_unfinished = False  # something is left that recovery has to finish
        self.failed = False  # the new container is known to be bad
        self.outcome = ""  # "rolled back", "committed", ...
        self.problem = ""  # what went wrong in a recovery, as when the old container does not start
        self.passed = ""  # how the gate was passed: "healthy" or "stable"; "" if it was not
        self.warnings: list[str] = []

    def look(self) -> dict[str, str]:
        """Return the ids of the containers that have the name or a helper name, by suffix."""
        names = {self.name + suffix: suffix for suffix in ("", *HELPER_NAMES)}
        ids = ids_by_name(self.engine, f"^/?({'|'.join(map(re.escape, names))})$")
        found = {suffix: ids[name] for name, suffix in names.items() if name in ids}
        if len(set(found.values())) < len(found):  # it has two names, and nobody can tell which
            raise EngineError(503, f"the Engine is renaming a container of {self.name}")
        return found

    def inspect(self, container: str) -> Json:
        return self.engine.json("GET", container_path(container, "json"))

    def find(self, container: str, image: Json | None = None) -> Found:
        """Return a container by its id or name. image: one that is at hand, as inspected."""
        inspected = self.inspect(container)
        has_several = "ImageManifestDescriptor" in inspected  # then its platform's is asked for
        if has_several or not image or image.get("Id") != inspected["Image"]:
            image = find_brought(inspected, self.engine.ask) or {}
        labels = config_of(inspected, "Labels")
        own = {name: text for name, text in labels.items() if name.startswith(OWN_LABELS)}
        # Invariant: no image passes for a deploy: a foreign container has just its image's labels.
        is_deployed = not own.items() <= config_of(image, "Labels").items()
        journal = read_journal(own) if is_deployed else NO_JOURNAL
        return Found(inspected["Id"], inspected, image, journal)

    def settle(self, error: ApiError) -> None:
        """Give an Engine that has not answered time to do what it was asked all the same."""
        if error.status in UNREACHABLE:
            self.stopping.wait(RECOVERY_INTERVAL)

    # The steps

    def post(self, found: Found, action: str, **options: Any) -> None:
        """Have the Engine do something to a container, again if it fails. Raises EngineError."""
        path = container_path(found.id, action)
        call = functools.partial(self.engine.call, "POST", path, **options)
        repeat(call, RETRY_TIME, 500)  # it has just exited, or containerd is being restarted

    def rename(self, found: Found, suffix: str) -> None:
        if found.container["Name"] != f"/{self.name}{suffix}":
            self.post(found, "rename", query={"name": self.name + suffix})

    def set_restart(self, found: Found, policy: Json) -> None:
        if restart_policy(found.container["HostConfig"]) != policy:  # podman 4 cannot change it
            self.post(found, "update", body={"RestartPolicy": policy})

    def stop(self, found: Found) -> None:
        wait = own_stop_timeout(found.container["Config"])
        self.post(found, "stop", query={"t": wait}, seconds=wait + CALL_TIMEOUT)

    def remove_old(self, old: Found) -> None:
        """Remove what was replaced, without its volumes. Raises ApiError (409, 503)."""
        try:  # not by force: if it runs, somebody has started it
            with tolerate(404):
                self.engine.call("DELETE", container_path(old.id), seconds=START_TIMEOUT)
        except EngineError as error:
            message = f"{self.name}{OLD} could not be removed: {error.message}"
            # Recovery waits for an Engine that is away; anything else somebody has to look at.
            raise ApiError(503 if error.status == 503 else 409, message) from error

    def pass_gate(self, new: Found) -> None:
        self.told.put(("step", {"step": "gate"}))
        self.passed, begun, since = "", time.monotonic(), None
        while not self.passed:
            container = self.inspect_running(new)
            state, health = container["State"], health_of(container)
            since = since or state.get("StartedAt")
            if health == "unhealthy" or since != state.get("StartedAt"):
                reason = "is unhealthy" if health == "unhealthy" else "was restarted"
                raise GateError(422, f"the new container {reason}")
            waited, gate = time.monotonic() - begun, new.journal.gate
            if health == "healthy" or (not health and waited >= gate["stable"]):
                self.passed = health or "stable"
            elif health and waited >= gate["timeout"]:
                raise GateError(422, f"the new container is not healthy after {gate['timeout']} s")
            elif self.stopping.wait(GATE_INTERVAL):
                raise Stopping(503, "the agent is being stopped, before the gate is passed")

    def inspect_running(self, new: Found) -> Json:
        container = self.inspect(new.id)
        if not container["State"]["Running"]:
            self.passed = ""
            code = container["State"].get("ExitCode")
            raise GateError(422, f"the new container exited with code {code}")
        return container

    def swap(self, new: Found, old: Found | None) -> None:
        """Put the new container in the old one's place. Raises GateError, EngineError, Stopping."""
        if old:
            self.told.put(("step", {"step": "stop"}))
            self.set_restart(old, NO_RESTART)
            self.stop(old)
            self.rename(old, PREV)
            self.rename(new, "")
        self.told.put(("step", {"step": "start"}))
        start_container(self.engine, new.id)
        self.commit(new, old)

    def commit(self, new: Found, old: Found | None) -> None:
        """Let the new container stay, once it has passed the gate; raises what `swap` does."""
        self.pass_gate(new)
        try:
            self.set_restart(new, new.journal.restart)
        finally:  # the policy would not start it again if it exited just before
            self.inspect_running(new)
        if old:
            self.stop(old)  # again: a restart that was under way before may have started it since
            self.rename(old, OLD)  # the commit: from here on nothing brings the old one back
        else:
            self.rename(new, "")
        self.outcome = "committed"
        if old:
            self.remove_old(old)

    # Recovery

    def roll_back(self, new: Found, old: Found) -> None:
        """Give the old container back its name, policy and run; remove the new one."""
        was = new.journal.was
        self.told.put(("step", {"step": "rollback"}))
        try:
            self.stop(new)
            self.set_restart(new, NO_RESTART)  # a commit may have begun
            self.rename(new, NEXT)
        except EngineError as error:
            names = old.container["Name"], old.journal.name
            is_told = was["running"] and names == (f"/{self.name}{PREV}", self.name)
            if error.status != 500 or not is_told:
                raise
            self.inspect(old.id)  # Invariant: one of the two stays; somebody may have removed it
            # It may have filled the disk. Without it, the old one's name and labels tell enough.
            remove_container(self.engine, new.id)
            self.give_back(None, old, was["restart"])
            return
        self.rename(old, "")
        self.revive(old, was["restart"], running=was["running"])
        remove_container(self.engine, new.id)  # last: its labels tell how the old one was
        self.outcome = "rolled back"

    def revive(self, old: Found, policy: Json, *, running: bool) -> None:
        """Give the old container back its policy and its run. That it does not start is told."""
        has_policy = restart_policy(old.container["HostConfig"]) == policy != NO_RESTART
        if has_policy and old.container["State"]["Running"]:
            return  # Its policy is "no" from before its first stop to after its last.
        self.stop(old)  # again: the first stop may still be under way in the Engine
        self.set_restart(old, policy)
        if running:
            try:
                self.post(old, "start", seconds=START_TIMEOUT)
            except EngineError as error:
                if error.status in UNREACHABLE:
                    raise
                self.problem = f"the old container does not start: {error.message}"

    def judge(self, new: Found, old: Found) -> None:
        """Commit if the new container passes the gate, else roll back."""
        if not self.failed and new.container["State"].get("StartedAt") != NEVER_STARTED:
            with contextlib.suppress(GateError):
                return self.commit(new, old)
        # As they are now: a commit may have begun, and somebody may have removed the old one.
        return self.roll_back(self.find(new.id), self.find(old.id))

    def finish(self, new: Found, _: None) -> None:
        """Remove what a first deploy left; start a container that has lost its old one."""
        if not new.journal.replaces:
            remove_container(self.engine, new.id)
            self.outcome = "removed"
            return
        try:
            self.swap(new, None)
        except GateError as error:
            rule = f"is all that is left, but {error.message}: remove it"
            raise ApiError(409, f"{self.name}{NEXT} {rule}") from error

    def give_back(self, _: None, old: Found, policy: Json | None = None) -> None:
        """Start the old container again, which has lost its new one; policy: if not its label's."""
        self.revive(old, policy or old.journal.restart, running=True)
        self.rename(old, "")  # last: its helper name is all that tells that this is to be done
        self.outcome = "rolled back"

    # What is done, by the names that are there.
    STEPS: ClassVar[dict[tuple[str, ...], Callable[..., None]]] = {
        ("", NEXT): roll_back,  # crashed before the swap, or in a rollback
        (NEXT, PREV): roll_back,  # between the renames
        ("", PREV): judge,  # after the swap
        (NEXT,): finish,  # in a first deploy; or somebody removed the old one
        (PREV,): give_back,  # somebody removed the new one
    }

    def recover(self) -> None:
        """Finish or undo what is unfinished. Raises ApiError (409) for what no deploy has left."""
        ids = self.look()
        if ids.keys() <= {""}:
            return
        found = {suffix: self.find(container) for suffix, container in ids.items()}
        here, replaced = found.get(""), found.get(OLD)
        is_known = replaced and here and here.journal.replaces == replaced.id
        if replaced and (is_known or replaced.journal.name == self.name):
            self.outcome = "committed"
            self.remove_old(found.pop(OLD))
        if found.keys() <= {""}:
            return
        step = self.STEPS.get(tuple(found))
        # Where only one of the two has a helper name, the other has the name itself.
        new, old = found.get(NEXT, here), found.get(PREV, here)
        owner = (new or old or found[OLD]).journal
        if not step or owner.name != self.name or (new and old and owner.replaces != old.id):
            names = " and ".join(self.name + suffix for suffix in found if suffix)
            raise ApiError(409, f"no deploy of {self.name} has left {names}: remove or rename it")
        self.problem = ""  # of the attempt before
        step(self, new, old)

    # The deploy

    def deploy(self, request: Request, auth: str) -> Response:
        """Return the response to a request. Raises ApiError."""
        body = request.body
        Deployment(self.engine, self.name, self.stopping).recover()
        image = self.get_image(body, auth, request.interrupts._replace(client=None))
        old = self.find_old(image, adopt=request.query.get("adopt", False))
        spec = {field: value for field, value in body.items() if field not in ("deploy", "pull")}
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        if old and (old.journal.spec, old.container["Image"]) == (digest, image["Id"]):
            running = old.container["State"].get("Status") == "running"
            if running and health_of(old.container) != "unhealthy":
                return self.answer(old, image, old)
        new = self.create(request, digest, image, old)
        request.target.update(id=new.id)
        try:
            self.swap(new, old)
        except ApiError as error:
            if self.outcome != "committed":
                self.undo(new, old, error)
            self.is_unfinished = True  # it was committed, but the old container may be left
            self.warnings.append(error.message)
        self.told.put(("step", {"step": "done"}))
        return self.answer(new, image, old)

    def get_image(self, body: Json, auth: str, interrupts: Interrupts) -> Json:
        """Return the inspected image, pulled if the body says so. Raises EngineError."""
        name = body["image"]
        is_fixed = "@" in name or re.fullmatch(IMAGE_ID, name)
        pull = body.get("pull", "missing" if is_fixed else "always")
        if pull == "always" or (pull == "missing" and not has_image(self.engine, body)):
            self.told.put(("step", {"step": "pull"}))
            for kind, data in pull_events(self.engine, body, auth, interrupts):
                # Invariant: what a client does not read is bounded; all other events are few.
                if kind == "progress" and self.told.qsize() < MAX_PROGRESS:
                    self.told.put((kind, data))
        return self.engine.json("GET", f"/images/{quote(name)}/json")

    def find_old(self, image: Json, *, adopt: bool) -> Found | None:
        """Return the container that has the name. Raises ApiError (409) if it must stay."""
        old, ids = None, self.look()  # not by its name, which may begin the ids of others
        with tolerate(404):  # it is just being created, or removed
            old = self.find(ids[""], image) if "" in ids else None
        if not old:
            return None
        if old.id == own_container():
            raise ApiError(409, f"{self.name} is the container that the agent itself runs in")
        if old.container["HostConfig"].get("AutoRemove"):
            raise ApiError(409, f"{self.name} has auto_remove: nothing could bring it back")
        if old.journal.name != self.name and not adopt:
            rule = "remove it, or replace it with ?adopt=true"
            raise ApiError(409, f"{self.name} was not deployed by this agent; {rule}")
        return old

    def create(self, request: Request, digest: str, image: Json, old: Found | None) -> Found:
        """Return the new container, created beside the old one."""
        key, body = request.key, request.body
        look_up_networks(self.engine, body)
        query, container = engine_container(self.engine, body)
        host, was = container["HostConfig"], NO_JOURNAL.was
        if old:
            running = bool(old.container["State"].get("Running"))
            was = {"running": running, "restart": restart_policy(old.container["HostConfig"])}
            host["Mounts"] = self.carry_volumes(old, host.get("Mounts", []))
        gate, replaces = {**GATE, **body.get("deploy", {})}, old.id if old else ""
        journal = Journal(self.name, digest, restart_policy(host), replaces, was, gate)
        fields = journal._asdict().items()
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields}
        container["Labels"] = {**container.get("Labels", {}), **agent_labels(key, **texts)}
        host["RestartPolicy"] = NO_RESTART
        query["name"] = self.name + NEXT
        self.told.put(("step", {"step": "create"}))
        made: Json = {}
        try:
            made = send_create(self.engine, key, query, container)
            connect_networks(self.engine, made["Id"], body)
            new = self.find(made["Id"], image)
            if new.journal != journal:
                raise ApiError(409, f"the image must not carry labels that begin with {OWN_LABELS}")
            if self.stopping.is_set():
                raise Stopping(503, "the agent is being stopped; try again later")
        except ApiError as error:
            self.settle(error)
            self.is_unfinished = True
            with contextlib.suppress(EngineError):
                left = self.look().get(NEXT)  # it may be there even after a timeout
                if left and (left == made.get("Id") or self.find(left).journal == journal):
                    remove_container(self.engine, left)
                self.is_unfinished = False
            raise
        self.warnings += made.get("Warnings", [])
        return new

    def carry_volumes(self, old: Found, mounts: list[Json]) -> list[Json]:
        """Return mounts, with the old container's anonymous volumes at their targets."""
        result = {os.path.normpath(mount["Target"].lstrip("/")): mount for mount in mounts}
        for mount in old.container.get("Mounts", ()):
            name, target = mount.get("Name", ""), mount.get("Destination", "")
            if mount.get("Type") != "volume" or not re.fullmatch("[0-9a-f]{64}", name):
                continue
            volume = self.engine.json("GET", f"/volumes/{name}")
            if volume.get("Driver") == "local" and not volume.get("Options"):
                # By its name, so that a rollback's removal of the new container leaves it.
                carried = {"Type": "volume", "Target": target, "ReadOnly": not mount.get("RW")}
                carried = result.setdefault(os.path.normpath(target.lstrip("/")), carried)
                if carried["Type"] == "volume" and not carried.get("Source"):
                    carried["Source"] = name
        return list(result.values())

    def undo(self, new: Found, old: Found | None, error: ApiError) -> None:
        """Put back what was there and raise error. Returns if the commit happened all the same."""
        self.settle(error)
        known = self.evidence(new)
        is_stop, message = isinstance(error, Stopping), error.message
        try:
            ids = self.look()
            if self.passed and ids.get("") == new.id and PREV not in ids:
                return
            if not old:
                remove_container(self.engine, new.id)
            elif not is_stop:
                self.failed = True
                repeat(self.recover, RETRY_TIME, 404)  # somebody removes one of them meanwhile
        except ApiError as second:
            self.is_unfinished = True
            self.settle(second)
            message = f"{message}; and this could not be undone yet: {second.message}"
        if self.outcome == "committed":  # by a recovery: somebody has removed the old container
            return
        known["rolled_back"] = self.outcome == "rolled back" and not self.problem
        message = "; and ".join(filter(None, (message, self.problem)))
        raise ApiError(503 if is_stop else 422, message, **known) from error

    def evidence(self, new: Found) -> Json:
        """Return what the Engine knows of a container that failed."""
        known = dict(NO_EVIDENCE)
        with contextlib.suppress(ApiError):
            container = self.inspect(new.id)
            state, tty = container["State"], bool(container["Config"].get("Tty"))
            known["health"] = health_of(container) or None
            code = state.get("ExitCode")
            if not state.get("Running") and (code or state.get("Status") != "created"):
                known["exit_code"] = code
            batches = LogCursor(LogSource(self.engine, new.id, tty), wanted=FAILED_LINES).read()
            texts = (text[:ENTRY_SIZE] for lines in batches for *_, text in lines)
            known["logs"] = [text.decode(errors="replace") for text in texts]
        return known

    def answer(self, here: Found, image: Json, old: Found | None) -> Response:
        """Return the response. here: the container with the name; old: the one that had it."""
        changed = here is not old
        answer = {**self.describe(here, image), "name": self.name, "changed": changed}
        answer["replaced"] = self.describe(old, image) if old and changed else None
        answer.update(gate=self.passed or None, warnings=self.warnings)
        return Response(answer, 200 if old else 201)

    def describe(self, found: Found, image: Json) -> Json:
        """Return a container's id, image and image digest; image: what the tag names now."""
        # Without a call: after the commit nothing may fail.
        reference = found.container["Config"].get("Image", "")
        repository, _ = split_image(reference)
        digest = find_digest(found.image, repository)
        if not digest and find_digest(image, repository) == image.get("Id"):
            # containerd's store: ids are digests, and go without names if a tag moves
            digest = found.container["Image"]
        by_digest = f"{repository}@{digest}" if digest else None
        return {"id": found.id, "image": reference, "image_digest": by_digest}


def check_free(name: str, held: Collection[str], what: str) -> None:
    if name in held:
        raise ApiError(409, f"{name} is being {what}; try again later", {"Retry-After": "5"})


class Deploys:
    """The names that are being deployed or recovered, each in a thread of its own."""

    def __init__(self, engine: Engine, log: Log) -> None:
        self.stopping = threading.Event()  # to be set when the agent is stopped
        self._engine, self._log = engine, log
        self._lock = threading.Lock()
        self.busy: dict[str, Key] = {}  # by name: whose deploy it is, STRANGER for a recovery
        self._changing: list[str] = []  # names that other requests write to

    @contextlib.contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Recover a name, and let no deploy of it begin meanwhile. Raises ApiError."""
        deployment = Deployment(self._engine, HELPER_NAME.sub("", name), self.stopping)
        with self._lock:
            check_free(deployment.name, self.busy, "deployed")
            # A restart that goes on would start what a deploy has stopped.
            self._changing.append(deployment.name)
        try:
            if not deployment.look().keys() <= {""}:
                self._claim(deployment.name)
                self._run(deployment, functools.partial(self._recover, deployment, retries=False))
            yield
        finally:
            self._changing.remove(deployment.name)

    def begin(self, request: Request, auth: str) -> Told:
        """Start a deploy, which its client cannot end; return its events. Raises ApiError."""
        deployment = Deployment(self._engine, request.name, self.stopping)
        act = functools.partial(self._deploy, deployment, request, auth)
        self._start(deployment, act, request.key)
        return deployment.told

    def recover_all(self) -> None:
        """Begin to recover what a killed agent has left of deploys. Raises EngineError."""
        pattern = f"({'|'.join(map(re.escape, HELPER_NAMES))})$"
        for name in {HELPER_NAME.sub("", name) for name in ids_by_name(self._engine, pattern)}:
            deployment = Deployment(self._engine, name, self.stopping)
            with contextlib.suppress(ApiError):  # it is being deployed
                self._start(deployment, functools.partial(self._recover, deployment))

    def _claim(self, name: str, key: Key = STRANGER) -> None:
        with self._lock:
            check_free(name, self.busy, "deployed")
            if key is not STRANGER:
                check_free(name, self._changing, "changed")
            # Invariant: no limited key starts threads without bound, or takes those of another.
            if key.name and not key.master and list(self.busy.values()).count(key) >= MAX_DEPLOYS:
                message = f"key {key.name} has too many deploys; try again later"
                raise ApiError(503, message, {"Retry-After": "5"})
            self.busy[name] = key

    def _start(self, deployment: Deployment, act: Callable[[], Any], key: Key = STRANGER) -> None:
        self._claim(deployment.name, key)
        try:
            start_thread(self._run, deployment, act)
        except OSError as error:
            del self.busy[deployment.name]
            raise ApiError(503, "the agent has no more threads; try again later") from error

    def _run(self, deployment: Deployment, act: Callable[[], Any]) -> None:
        end: Any = "error", refusal(ApiError(500, "an error of the agent's own; see its log"))
        try:
            end = act()
        finally:
            del self.busy[deployment.name]
            deployment.told.put(end)

    def _deploy(self, deployment: Deployment, request: Request, auth: str) -> Event:
        """Return the event that tells how a deploy ended."""
        fields: Json = {"container": deployment.name, "key": request.key.name}
        try:
            end: Event = "done", deployment.deploy(request, auth)
        except ApiError as error:
            if isinstance(error, (EngineError, Stopping)):  # nothing was touched
                error.members = known = dict(NO_EVIDENCE)
                with contextlib.suppress(EngineError):
                    known["rolled_back"] = deployment.look().keys() == {""}
            end, fields["error"] = ("error", refusal(error)), error.message
        self._log("warning" if "error" in fields else "info", "deploy", **fields)
        if deployment.is_unfinished:
            deployment.told.put(end)
            self._recover(deployment)
        return end

    def _recover(self, deployment: Deployment, *, retries: bool = True) -> None:
        """Recover a name and log it. retries: while the Engine is unreachable."""
        while not self.stopping.is_set():
            try:
                repeat(deployment.recover, RETRY_TIME if retries else 0, 500)
            except ApiError as error:
                if retries and error.status in UNREACHABLE:
                    deployment.settle(error)
                    continue
                deployment.problem = error.message
            break
        outcome, problem = deployment.outcome, deployment.problem
        fields = {"container": deployment.name, "outcome": outcome, "error": problem}
        if outcome or problem:
            self._log("warning", "recovery", **fields)


# --------------------------------------------------------------------------------------------------
# One-off runs: a container that lives no longer than its request
# --------------------------------------------------------------------------------------------------

RUN_LABEL = "dockeragent.run"  # of a run's container; its value is a random token
# Lines are read from the log, so it must be one that can be read, and not rotate before it is.
RUN_LOG = {"driver": "json-file", "max_size_mb": 2**20}
RunPart = Union[list[Line], Json]  # lines, or at last how the run ended


def run_parts(
    source: LogSource, deadline: float, stop: socket.socket | None, removal: contextlib.ExitStack
) -> Iterator[RunPart]:
    """Yield a run's lines, [] at times, and at last, its container removed, how it ended.

    At the deadline (monotonic) the container is killed. Raises EngineError, ClientGone, Stopping.
    """
    timed_out, due = False, time.monotonic() + PING_INTERVAL
    with removal:
        cursor = LogCursor(source)
        batches = cursor.follow(source.inspect())
        removal.callback(batches.close)
        for lines in batches:
            if lines or time.monotonic() >= due:
                yield lines
                due = time.monotonic() + PING_INTERVAL
            is_stopping = stop and NEVER.wait_readable(stop, 0)
            if is_stopping:
                deadline = min(deadline, time.monotonic() + GRACE / 2)
            if time.monotonic() >= deadline:
                if is_stopping:
                    raise Stopping(503, "the agent is being stopped; the run was killed")
                if timed_out:
                    break
                with tolerate(404, 409):  # it has ended by itself
                    source.engine.call("POST", container_path(source.container, "kill"))
                    timed_out = True
                deadline = time.monotonic() + CALL_TIMEOUT  # for the lines from before the kill
            cursor.due = min(due, deadline, time.monotonic() + STOP_POLL)
        ending: Json = {"exit_code": cursor.ending[1].get("exit_code")}
        if timed_out:
            ending = {"exit_code": None, "timed_out": True}
        elif ending["exit_code"] is None:
            raise EngineError(502, "the container was removed before it ended")
    yield ending


def run_texts(parts: Iterator[RunPart], *, events: bool) -> Stream:
    """Yield one event a line and at last the end, or {"lines": [...], "exit_code": 0}."""
    yield STREAM_START if events else b'{"lines":['
    separator = b""
    for part in parts:
        if isinstance(part, dict):
            yield event("end", part) if events else b"],%b\n" % encode_json(part)[1:]
        elif not part:
            yield PING if events else b"\n"  # white space keeps the connection awake
        else:
            items = [line_object(line, timed=False) for line in part]
            if events:
                yield b"".join(b"data: %b\n\n" % item for item in items)
            else:
                yield separator + b",".join(items)
                separator = b","


def remove_run(engine: Engine, token: str) -> None:
    for container in find_containers(engine, label=f"{RUN_LABEL}={token}"):
        remove_container(engine, container["Id"])


def remove_left_runs(engine: Engine, log: Log, live: Collection[str]) -> None:
    """Remove what a killed agent left of runs; live: the tokens of those that go on."""
    for container in find_containers(engine, label=RUN_LABEL):
        token = container["Labels"][RUN_LABEL]
        if not token or token in live:  # other containers of the agent's have it empty
            continue
        # A label of the image's own says nothing: anybody may have put it there.
        image = find_brought(container, engine.ask)
        if not image or config_of(image, "Labels").get(RUN_LABEL) == token:
            continue
        target = {"id": container["Id"], "name": own_name({"names": container["Names"]})}
        try:
            remove_container(engine, container["Id"])
            log("warning", "removed what a killed agent left of a run", target=target)
        except EngineError as error:
            log("error", "cannot remove what a killed agent left of a run", error=error.message)


# --------------------------------------------------------------------------------------------------
# Sight: stats, events, metrics
# --------------------------------------------------------------------------------------------------

NO_TIME = "0001-01-02"  # sorts after the year 1, which the Engine puts where it has no time
INACTIVE_FILES = ("total_inactive_file", "inactive_file")  # in cgroups v1, in cgroups v2
NAMED_TYPES = ("container", "image", "network", "volume")  # of events; a key covers them by name
COUNTED_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE")
BUCKETS = (0.005, 0.025, 0.1, 0.25, 1, 2.5, 10, 60, math.inf)  # seconds
ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})  # in a label's value
REQUESTS_TOTAL = "dockeragent_http_requests_total"
REQUEST_SECONDS = "dockeragent_http_request_duration_seconds"
METRICS = {
    "dockeragent_build_info": ("gauge", "1 for the version that runs."),
    "dockeragent_connections": ("gauge", "Open connections of clients."),
    "dockeragent_streams": ("gauge", "Responses that are being streamed."),
    "dockeragent_rate_limited_total": ("counter", "Requests refused by the rate limit."),
    "process_resident_memory_bytes": ("gauge", "Resident memory in bytes."),
    "process_cpu_seconds_total": ("counter", "User and system CPU time in seconds."),
    "process_open_fds": ("gauge", "Open file descriptors."),
    "process_start_time_seconds": ("gauge", "Start of the process in Unix seconds."),
    REQUESTS_TOTAL: ("counter", "Requests by the status of their response."),
    REQUEST_SECONDS: ("histogram", "Seconds from a request to the end of its response."),
    "dockeragent_engine_up": ("gauge", "Whether the Engine listed its containers in time."),
    "dockeragent_container_state": ("gauge", "1 for the state that the container is in."),
    "dockeragent_container_health": ("gauge", "Whether the container's health check passes."),
}


def stats_sample(raw: Json) -> Json:
    """Return a sample of the Engine's statistics as `docker stats` computes it.

    Engine API, "Get container stats based on resource usage". Raises EngineError (502).
    """
    try:
        cpu, before, memory = raw["cpu_stats"], raw["precpu_stats"], raw["memory_stats"]
        busy = cpu["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]
        elapsed = cpu.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0)
        cpus = cpu.get("online_cpus") or len(cpu["cpu_usage"].get("percpu_usage") or ())
        usage, limit = memory.get("usage", 0), memory.get("limit", 0)
        # The kernel takes these pages back when it needs memory: they do not count as used.
        inactive = [(memory.get("stats") or {}).get(name, usage) for name in INACTIVE_FILES]
        used = usage - next((size for size in inactive if size < usage), 0)
        networks = (raw.get("networks") or {}).values()
        blocks = raw["blkio_stats"].get("io_service_bytes_recursive") or ()
        return {
            "time": stamp_from(stamp_time(raw["read"].encode())).decode(),
            "cpu_percent": busy / elapsed * cpus * 100 if busy > 0 and elapsed > 0 else 0.0,
            "memory_bytes": used,
            "memory_limit_bytes": limit,
            "memory_percent": used / limit * 100 if limit else 0.0,
            "network_rx_bytes": sum(network["rx_bytes"] for network in networks),
            "network_tx_bytes": sum(network["tx_bytes"] for network in networks),
            "block_read_bytes": sum(b["value"] for b in blocks if b["op"].lower() == "read"),
            "block_write_bytes": sum(b["value"] for b in blocks if b["op"].lower() == "write"),
            "pids": raw["pids_stats"].get("current", 0),
        }
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EngineError(502, f"{BROKEN}: it is not of the expected shape") from error


def is_running(found: Json | None) -> bool:
    """Return whether a container has a process, by its inspect JSON; None: it was removed."""
    state = found["State"] if found else {}
    return bool(state.get("Running")) and not state.get("Restarting")


def stats_events(engine: Engine, container: str, interrupts: Interrupts) -> Stream:
    """Yield a container's statistics as server-sent events until it stops. Raises EngineError."""
    # The Engine sends empty samples of a container that has stopped, but also when it could not
    # measure one. So after each, and at the end, it is asked whether the container runs.
    yield STREAM_START
    path, query = container_path(container, "stats"), {"stream": "true"}
    with engine.open("GET", path, query, interrupts=interrupts) as response:
        for raw in itertools.chain(json_lines(response), [{}]):
            if raw is None:
                yield PING
            elif str(raw.get("read", "")) < NO_TIME:
                if not is_running(engine.ask(container_path(container, "json"))):
                    yield event("end", {"reason": "exited"})
                    return
            # The first sample is left out: its CPU time cannot be compared with one before it.
            elif str(raw.get("preread", "")) > NO_TIME:
                yield b"data: %b\n\n" % encode_json(stats_sample(raw))
    raise EngineError(502, "the Engine ended the statistics of a running container; reconnect")


def engine_events(engine: Engine, query: Json, until: float, request: Request) -> Stream:
    """Yield events as server-sent events until a time in nanoseconds. Raises EngineError."""
    yield STREAM_START
    last = number = 0
    with engine.open("GET", "/events", query, interrupts=request.interrupts) as response:
        for message in json_lines(response):
            if message is None:
                yield PING
            elif message is LINE_TOO_LONG or message["timeNano"] > until:
                continue
            elif data := event_data(message, request.key):
                number = number + 1 if message["timeNano"] == last else 1
                last = message["timeNano"]
                # Invariant: JSON has no line ends in it, so no label or name can forge a field.
                yield b"id: %d-%d\ndata: %b\n\n" % (last, number, encode_json(data))
    if time.time_ns() < until - 10**9:  # the Engine's clock may be a little ahead
        raise EngineError(502, "the Engine ended its stream of events; reconnect")
    yield event("end", {"reason": "until"})


def event_data(message: Json, key: Key) -> Json | None:
    """Return what a key is shown of an Engine's event, or None. Raises EngineError (502)."""
    actor, kind = message["Actor"], message["Type"]
    attributes = actor.get("Attributes", {})
    identity = actor.get("ID", "")
    # The attribute "name" is a container's name, even if it has a label "name". A volume's id is
    # its name; a pulled image's is its reference (on podman the image's id).
    is_pull = message.get("Action") == "pull" and not re.fullmatch(IMAGE_ID, identity)
    name = identity if kind == "volume" or is_pull else attributes.get("name", "")
    if not key.master:
        # Invariant: a limited key is sent only events of what it covers by name. An event of a
        # network or volume names the container that uses it by its id alone.
        is_known = kind == "container" or "container" not in attributes
        if kind not in NAMED_TYPES or not (is_known and key.covers(f"{kind}s", name)):
            return None
        # Before it was renamed a container may have been another's.
        hidden = (OWN_LABELS, "oldName")
        attributes = {k: v for k, v in attributes.items() if not k.startswith(hidden)}
    moment = stamp_from(message["timeNano"] % 2**63).decode()
    shown = {"time": moment, "type": kind, "action": message.get("Action")}
    return {**shown, "id": identity, "name": name, "attributes": attributes}


def series(metric: str, **labels: Any) -> str:
    """Return a metric with its labels in Prometheus's text format 0.0.4."""
    # Invariant: a label's value ends neither its quotes nor its line.
    pairs = [f'{name}="{str(value).translate(ESCAPED)}"' for name, value in labels.items()]
    return f"{metric}{{{','.join(pairs)}}}"


class Metrics:
    """Counts the requests, by method, route and status, and their seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.time()
        self._requests: collections.Counter[tuple[str, str, int]] = collections.Counter()
        # By method and route: the requests of each bucket alone, and then the sum of their seconds.
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def observe(self, request: Request, seconds: float) -> None:
        # Invariant: no label holds what a client sent, or a stranger could make endless series.
        method = request.method if request.method in COUNTED_METHODS else "other"
        route = request.route.path if request.route else "other"
        with self._lock:
            self._requests[method, route, request.status] += 1
            counts = self._seconds.setdefault((method, route), [0] * (len(BUCKETS) + 1))
            counts[bisect.bisect_left(BUCKETS, seconds)] += 1
            counts[-1] += seconds

    def samples(self) -> dict[str, float]:
        result = {series("dockeragent_build_info", version=VERSION): 1.0}
        result["dockeragent_rate_limited_total"] = 0
        result["process_start_time_seconds"] = self._started
        result["process_cpu_seconds_total"] = time.process_time()
        with self._lock:
            for (method, route, code), count in self._requests.items():
                result[series(REQUESTS_TOTAL, method=method, route=route, code=code)] = count
                result["dockeragent_rate_limited_total"] += count * (code == 429)
            for (method, route), (*counts, total) in self._seconds.items():
                labels = {"method": method, "route": route}
                for bound, below in zip(BUCKETS, itertools.accumulate(counts)):
                    le = f"{bound:g}".replace("inf", "+Inf")
                    result[series(f"{REQUEST_SECONDS}_bucket", **labels, le=le)] = below
                result[series(f"{REQUEST_SECONDS}_sum", **labels)] = total
                result[series(f"{REQUEST_SECONDS}_count", **labels)] = sum(counts)
        # proc(5), /proc/pid/statm. Suppressed: that no descriptor is free.
        with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
            result["process_resident_memory_bytes"] = pages * resource.getpagesize()
            result["process_open_fds"] = len(os.listdir("/proc/self/fd"))
        return result


def container_samples(found: bytes, key: Key) -> dict[str, float]:
    """Return the values by series of the containers that a key covers, from the Engine's list."""
    samples: dict[str, float] = {}
    for row, _ in shape_rows.__wrapped__(found, key.master):
        name = own_name(row)
        if name and key.covers("containers", name):
            labels = {"name": name, "image": row["image"]}
            samples[series("dockeragent_container_state", **labels, state=row["state"])] = 1
            # "Up 5 minutes (healthy)", "(unhealthy)" or "(health: starting)"
            if match := re.search(r"\((healthy|unhealthy|health: \w+)\)$", row["status"] or ""):
                health = series("dockeragent_container_health", **labels)
                samples[health] = int(match[1] == "healthy")
    return samples


def exposition(samples: Mapping[str, float]) -> bytes:
    """Return values by series in Prometheus's text format 0.0.4, those of one metric together."""
    rows: dict[str, list[str]] = {}
    for name, value in samples.items():
        metric = re.sub(r"(?s)(_bucket|_sum|_count)?({.*)?$", "", name, count=1)
        kind, meaning = METRICS[metric]
        head = [f"# HELP {metric} {meaning}", f"# TYPE {metric} {kind}"]
        rows.setdefault(metric, head).append(f"{name} {value}")
    return "\n".join([*itertools.chain(*rows.values()), ""]).encode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# Endpoints: one function an operation
# --------------------------------------------------------------------------------------------------

EVENT_HEADERS = {"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"}
EVENT_HEADERS["Cache-Control"] = "no-cache, no-transform"


class Agent(NamedTuple):
    """What the endpoints act upon."""

    engine: Engine
    host_root: str
    file_locks: dict[tuple[int, Optional[str]], threading.RLock]  # held by Walk
    metrics: Metrics
    runs: set[str]  # the tokens of one-off runs that go on
    deploys: Deploys


@functools.lru_cache(maxsize=16)
def identity(body: bytes) -> tuple[tuple[str, str], ...]:
    """Return ("id", id) and ("name", name) from a container's inspect JSON, for the log."""
    found = decode_response(body)
    return ("id", found.get("Id", "")), ("name", found.get("Name", "").removeprefix("/"))


def inspect_container(request: Request, agent: Agent) -> bytes:
    """Return the inspect JSON of the container in the path, as it came."""
    body = agent.engine.call("GET", container_path(request.name, "json"))
    identify = identity if len(body) <= MAX_KEPT_BODY else identity.__wrapped__
    request.target.update(identify(body))
    return body


@contextlib.contextmanager
def found_to_change(request: Request, agent: Agent) -> Iterator[Json]:
    """Yield the container in the path; no deploy of it begins meanwhile. Raises ApiError (409)."""
    inspect_container(request, agent)  # for its name
    with agent.deploys.changing(request.target["name"]):
        # Anew: after a deploy or a recovery the name is another container's.
        found = decode_response(inspect_container(request, agent))
        check_free(request.target["name"], agent.engine.unchecked, "created")
        yield found


def health(request: Request, agent: Agent) -> Response:
    code, status, docker = 200, "ok", "connected"
    request.error = agent.engine.problem()  # told by the log alone
    if request.error:
        code, status, docker = 503, "degraded", "unreachable"
    now = f"{utc_time(int(time.time()))}Z"
    return Response({"status": status, "docker": docker, "timestamp": now}, code)


def create_new(request: Request, agent: Agent, body: Json, held: contextlib.ExitStack) -> Json:
    """Create a container, without starting it; return {"Id", "Warnings"}. Raises ApiError."""
    engine, auth = agent.engine, registry_auth(request)
    request.target.update(name=body.get("name", ""), image=body["image"])
    if "name" in body:  # no deploy of it begins before `held` is closed
        held.enter_context(agent.deploys.changing(body["name"]))
    pull = functools.partial(pull_image, engine, body, auth, request.interrupts._replace(stop=None))
    query, container = engine_container(engine, body)
    rule = body.get("pull", "missing")
    if rule == "always":
        pull()
    try:
        created = send_create(engine, request.key, query, container)
    except EngineError as error:
        if error.status != 404 or rule != "missing" or has_image(engine, body):
            raise
        pull()
        created = send_create(engine, request.key, query, container)
    request.target.update(id=created["Id"])
    return created


def create(request: Request, agent: Agent) -> Response:
    with contextlib.ExitStack() as held:
        created = create_new(request, agent, request.body, held)
        with removed_on_failure(agent.engine, created["Id"]):
            connect_networks(agent.engine, created["Id"], request.body)
            start_container(agent.engine, created["Id"])
    answer = {"id": created["Id"], "warnings": created.get("Warnings", [])}
    return Response(answer, 201, {"Location": f"{API}/containers/{created['Id']}"})


def registry_auth(request: Request) -> str:
    """Return X-Registry-Auth, an object in any base64, as padded base64url. Raises ApiError."""
    value = request.header("X-Registry-Auth")
    if value in ("", "null"):
        return ""
    bare = value.rstrip("=").replace("-", "+").replace("_", "/")
    with contextlib.suppress(ApiError, ValueError):
        decoded = base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
        # Invariant: decode_json bounds the depth; Python's decoder alone may overflow the C stack.
        credentials = decode_json(decoded)
        if credentials is None:
            return ""
        if isinstance(credentials, dict):
            return base64.urlsafe_b64encode(decoded).decode()
    message = 'must be the base64url of JSON, such as {"username": "u", "password": "p"}'
    raise ApiError(400, f"X-Registry-Auth: {message}")


def list_containers(request: Request, agent: Agent) -> Response:
    query, key = request.query, request.key
    body = agent.engine.call("GET", f"/containers/json?all={int(query.get('all', False))}")
    # Invariant: nothing is kept of a large answer. __wrapped__ is the function without its cache.
    shape = shape_rows if len(body) <= MAX_KEPT_BODY else shape_rows.__wrapped__
    rows = shape(body, key.master)
    # Filtered here, not by the Engine: by what the key may see, and with no regular expression.
    is_whole = key.master and not {"label", "name"} & query.keys()
    shown = [text for row, text in rows if is_whole or is_listed(row, key, query)]
    return Response(b'{"containers":[%b]}\n' % b",".join(shown))


def inspect(request: Request, agent: Agent) -> Response:
    return Response(inspect_container(request, agent))


def post_action(
    request: Request, agent: Agent, action: str, done: str, seconds: float = CALL_TIMEOUT
) -> Response:
    """Do something to a container, by its full id. Raises ApiError."""
    body, key = request.body, request.key
    with found_to_change(request, agent) as found:
        # The create that looks at a limited key's container is what starts it first. One that timed
        # out may have been done all the same, and nobody has looked.
        is_new = found.get("State", {}).get("StartedAt", NEVER_STARTED) == NEVER_STARTED
        is_unseen = is_new and config_of(found, "Labels").get(KEY_LABEL)
        key.permit(key.master or not is_unseen, "operate", "what has never run")
        config: Json = {}
        query = {"t": body["timeout"]} if "timeout" in body else {}
        if action in ("stop", "restart"):
            config = found["Config"]
            seconds += body.get("timeout", own_stop_timeout(config))
        if "signal" in body and takes_signal(agent.engine, body["signal"], config, action):
            query["signal"] = signal_name(body["signal"])
        agent.engine.call("POST", container_path(found["Id"], action), query, seconds=seconds)
    return Response({"message": f"container {done}"})


def takes_signal(engine: Engine, wanted: str, config: Json, action: str) -> bool:
    """Return whether to name a signal in a request; it is the container's own if not.

    Before API 1.42 a stop takes none, and podman ignores it. Raises ApiError (400) for another.
    """
    if action == "kill":
        return True
    # Asked anew: it may be another by now.
    version = engine.version(time.monotonic() + CALL_TIMEOUT, refresh=True)
    if int(version.partition(".")[2]) >= 42 and not engine.is_podman:
        return True
    own = config.get("StopSignal") or "SIGTERM"
    if signal_number(own) != signal_number(wanted):
        when = f"before Engine API 1.42 ({version} is in use), and with podman,"
        refuse("signal", f"{when} a {action} can only send the container's own, {own}; use kill")
    return False


def signal_number(word: str) -> int:
    """Return the number of a signal's name or number; 0 for a name without a number here."""
    if re.fullmatch("[0-9]{1,3}", word):
        return int(word)
    return int(getattr(signal, signal_name(word), 0))


start = functools.partial(post_action, action="start", done="started", seconds=START_TIMEOUT)
stop = functools.partial(post_action, action="stop", done="stopped")
restart = functools.partial(post_action, action="restart", done="restarted")
kill = functools.partial(post_action, action="kill", done="killed")
pause = functools.partial(post_action, action="pause", done="paused")
unpause = functools.partial(post_action, action="unpause", done="unpaused")


def remove(request: Request, agent: Agent) -> Response:
    query = {name: int(value) for name, value in request.query.items()}
    with found_to_change(request, agent) as found:
        agent.engine.call("DELETE", container_path(found["Id"]), query)
    return Response({"message": "container removed"})


def last_event_id(request: Request, pattern: str) -> re.Match[str] | None:
    """Return the match of the id after which a client goes on, if any. Raises ApiError (400)."""
    # The header first: a browser that reconnects sends it beside the URL it began with.
    given = request.header("Last-Event-ID") or request.query.get("last_event_id", "")
    match = re.fullmatch(pattern, given)
    if given and not match:
        refuse("Last-Event-ID", "must be an id that this stream sent")
    return match


def logs(request: Request, agent: Agent) -> Response:
    asked = {"stdout": True, "stderr": True, "follow": False, "tail": "all", **request.query}
    if not (asked["stdout"] or asked["stderr"]):
        refuse("query.stdout", "and stderr cannot both be false")
    kinds = frozenset(k for k, name in STREAMS.items() if asked.get(name, asked["stdout"]))
    since, until = (parse_moment(f"query.{n}", asked.get(n, "0")) for n in ("since", "until"))
    last = None
    if match := last_event_id(request, EVENT_ID):
        second, fraction, number = map(int, match.groups())
        last = stamp_from(second * 10**9 + fraction), number
    found = decode_response(inspect_container(request, agent))
    tty = bool(found["Config"].get("Tty"))
    interrupts = request.interrupts if asked["follow"] else request.interrupts._replace(stop=None)
    source = LogSource(agent.engine, found["Id"], tty, kinds, since, until, interrupts)
    wanted = ALL if last or asked["tail"] == "all" else int(asked["tail"])
    cursor = LogCursor(source, last, wanted)
    shape = {"stamps": asked.get("timestamps", False), "as_json": asked.get("format") == "json"}
    render = functools.partial(render_events if asked["follow"] else render_items, **shape)
    if asked["follow"]:
        cursor.check()  # while a status is still possible
        return event_stream(log_events(cursor, found, render))
    return Response(stream=log_document(cursor.read(), render))


def deploy(request: Request, agent: Agent) -> Response:
    name = request.name
    validate(CREATE["properties"]["name"], name, "name")
    request.target.update(name=name, image=request.body["image"])
    told = agent.deploys.begin(request, registry_auth(request))
    if wants_events(request):
        return event_stream(event_texts(deploy_events(told)))
    end: Response = next(end for _, end in iter(told.get, None) if isinstance(end, Response))
    request.error = end.body.get("message", "")
    return end


def deploy_events(told: Told) -> Iterator[Event]:
    data: Any = None
    while not isinstance(data, Response):
        kind, data = NO_NEWS
        with contextlib.suppress(queue.Empty):
            kind, data = told.get(timeout=PING_INTERVAL)
        yield kind, data.body if isinstance(data, Response) else data


def event_texts(events: Iterator[Event]) -> Stream:
    yield STREAM_START
    for kind, data in events:
        yield event(kind, data) if kind else PING


def wants_events(request: Request) -> bool:
    return "text/event-stream" in ",".join(request.fields.get("accept", [])).lower()


def event_stream(events: Stream) -> Response:
    return Response(stream=with_ending(events), headers=EVENT_HEADERS)


def with_ending(events: Stream) -> Stream:
    """Yield events, and one more that tells a client what broke them off."""
    try:
        yield from events
    except Stopping as error:
        yield event("shutdown", {"reason": error.message})
    except EngineError as error:
        yield event("error", envelope(error))


def pull(request: Request, agent: Agent) -> Response:
    engine, body, auth = agent.engine, request.body, registry_auth(request)
    request.target.update(image=body["image"])
    if wants_events(request):
        return event_stream(event_texts(pull_events(engine, body, auth, request.interrupts)))
    return Response(pull_image(engine, body, auth, request.interrupts._replace(stop=None)))


def stats(request: Request, agent: Agent) -> Response:
    found = decode_response(inspect_container(request, agent))
    stopped = ApiError(409, f"container {request.target['name']} is not running")
    if not is_running(found):
        raise stopped
    engine, container = agent.engine, found["Id"]
    if request.query.get("follow"):
        return event_stream(stats_events(engine, container, request.interrupts))
    call = ("GET", container_path(container, "stats"), {"stream": "false"})
    raw = engine.json(*call)
    if engine.is_podman:  # its sample has none before it
        time.sleep(1)
        raw = {**engine.json(*call), "precpu_stats": raw.get("cpu_stats")}
    if str(raw.get("read", "")) < NO_TIME:  # it has stopped meanwhile
        raise stopped
    return Response(stats_sample(raw))


def events(request: Request, agent: Agent) -> Response:
    asked = request.query
    moments = {n: parse_moment(f"query.{n}", asked[n]) for n in ("since", "until") if n in asked}
    if match := last_event_id(request, ENGINE_EVENT_ID):
        moments["since"] = int(match[1])
    until = moments.get("until", math.inf)
    if moments.get("since", 0) > until:
        refuse("query.until", "must not be before since")
    query: Json = {}
    for name, moment in moments.items():  # the Engine counts nanoseconds in 63 bits
        query[name] = "{}.{:09d}".format(*divmod(min(max(0, moment), 2**63 - 1), 10**9))
    names = {"type": "type", "action": "event", "container": "container"}
    if filters := {theirs: [asked[ours]] for ours, theirs in names.items() if ours in asked}:
        query["filters"] = json.dumps(filters)
    # If the Engine is away: a status, 503.
    agent.engine.version(time.monotonic() + CALL_TIMEOUT, refresh=True)
    if agent.engine.is_podman and until < time.time_ns():
        del query["until"]  # podman would stop at once, whatever it has read by then
        query["stream"] = 0
    return event_stream(engine_events(agent.engine, query, until, request))


def metrics(request: Request, agent: Agent) -> Response:
    slots = list(request.slots)
    samples = {**agent.metrics.samples(), "dockeragent_connections": len(slots)}
    samples["dockeragent_streams"] = sum(slot.is_streaming for slot in slots)
    samples["dockeragent_engine_up"] = 0
    with contextlib.suppress(EngineError):
        found = agent.engine.call("GET", "/containers/json", {"all": 1}, seconds=METRICS_TIMEOUT)
        samples.update(dockeragent_engine_up=1, **container_samples(found, request.key))
    headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
    return Response(exposition(samples), headers=headers)


def file_tree(request: Request, agent: Agent, path: str) -> Tree:
    """Return where the request may use the file at path, and note the path for the log."""
    request.target["path"] = path
    # Invariant: without a folder only the master key goes on, whatever was decided before.
    request.key.permit(request.key.master or request.folder, "files", path)
    return Tree(agent.host_root, agent.file_locks, request.folder)


def run_stream(request: Request, agent: Agent, *, events: bool) -> Stream:
    """Yield the response of a run. Raises ApiError or ClientGone."""
    # The first piece comes once the container has started: until then an error is a status. However
    # the stream ends, the container is removed first.
    engine, body, token = agent.engine, request.body, secrets.token_hex(16)
    labels = {**body.get("labels", {}), RUN_LABEL: token}
    log = body.get("log", {})
    if log.get("driver", "json-file") in ("json-file", "local"):
        log = {**RUN_LOG, **log}
    body = {**body, "labels": labels, "log": log}
    # Else the removal would wait for an Engine that is away.
    engine.version(time.monotonic() + CALL_TIMEOUT, refresh=True)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as removal:
        agent.runs.add(token)
        removal.callback(agent.runs.discard, token)
        # By its label, which it has even if the response with its id was lost.
        remove = functools.partial(remove_run, engine, token)
        removal.callback(repeat, remove, START_TIMEOUT, 500, *UNREACHABLE)
        container = create_new(request, agent, body, held)["Id"]
        connect_networks(engine, container, body)
        client = request.interrupts._replace(stop=None)  # being stopped, the run has time to end
        source = LogSource(engine, container, body.get("tty", False), interrupts=client)
        LogCursor(source).check()  # a run whose log turned out to be unreadable would be killed
        start_container(engine, container)
        deadline = time.monotonic() + body.get("timeout", RUN_TIMEOUT)
        parts = run_parts(source, deadline, request.interrupts.stop, removal)
        texts = run_texts(parts, events=events)
        yield from with_ending(texts) if events else texts


def post_run(request: Request, agent: Agent) -> Response:
    events = wants_events(request)
    headers = EVENT_HEADERS if events else {}
    return Response(stream=run_stream(request, agent, events=events), headers=headers)


def list_covered(
    request: Request, agent: Agent, kind: str, read: Callable[[Engine], list[Json]]
) -> Response:
    rows = [row for row in read(agent.engine) if request.key.covers(kind, row["name"])]
    return Response({kind: rows})


list_networks = functools.partial(list_covered, kind="networks", read=read_networks)
list_volumes = functools.partial(list_covered, kind="volumes", read=read_volumes)


def list_images(request: Request, agent: Agent) -> Response:
    images = read_images(agent.engine)
    for image in images:
        for kind in ("tags", "digests"):
            image[kind] = [name for name in image[kind] if request.key.covers("images", name)]
    shown = [i for i in images if request.key.master or i["tags"] or i["digests"]]
    return Response({"images": shown})


@contextlib.contextmanager
def in_use_by(key: Key) -> Iterator[None]:
    """Tell the master alone in the Engine's own words why something cannot be removed."""
    try:
        yield
    except EngineError as error:
        # Invariant: no limited key is told which container of another's uses its image or volume.
        if error.status == 409 and not key.master:
            raise ApiError(409, "a container uses it") from error
        raise


def remove_image(request: Request, agent: Agent) -> Response:
    image = request.query["image"]
    request.target.update(image=image)
    with in_use_by(request.key):
        return Response(remove_reference(agent.engine, image))


def prune(request: Request, agent: Agent) -> Response:
    repository, keep = request.body.get("repository", ""), request.body.get("keep", KEPT_IMAGES)
    if repository:
        request.target.update(image=repository)
        repository = full_repository(repository)
    dry_run = request.body.get("dry_run", False)
    return Response(prune_images(agent.engine, request.key, repository, keep, dry_run=dry_run))


def create_network(request: Request, agent: Agent) -> Response:
    """Return the network of a name with 201 if it was created, else 200. Raises ApiError."""
    engine, body, name = agent.engine, request.body, request.body["name"]
    request.target.update(network=name)
    options: Json = {"Name": name, "CheckDuplicate": True, "Labels": body.get("labels", {})}
    options["Internal"] = body.get("internal", False)
    if subnet := body.get("subnet"):
        options.update(EnableIPv6=":" in subnet, IPAM={"Config": [{"Subnet": subnet}]})
    with hold(engine.networking, CALL_TIMEOUT, "other networks are being created; try again later"):
        if found := find_network(engine, name):
            return Response(found)
        try:
            engine.call("POST", "/networks/create", body=options)
        except EngineError as error:
            # Another client of the Engine's may have created it meanwhile.
            if error.status == 409 and (found := find_network(engine, name)):
                return Response(found)
            raise
    return Response(find_network(engine, name) or {}, 201)


def remove_network(request: Request, agent: Agent) -> Response:
    """Remove a network that no container uses. Raises ApiError (404, 409)."""
    engine, name = agent.engine, request.name
    request.target.update(network=name)
    network = find_network(engine, name)
    if not network:
        raise ApiError(404, f"no such network: {name}")
    names = network["id"], network["id"][:12], name
    with engine.reserve(names, removes=True):
        users = count_users(engine)
        # The Engine minds only running containers; a stopped one could not start again. Why a
        # predefined network stays, the Engine says itself.
        if any(users["network", n] for n in names) and name not in ("bridge", "host", "none"):
            raise ApiError(409, f"network {name} is used by a container")
        engine.call("DELETE", f"/networks/{quote(network['id'], safe='')}")
    return Response({"message": "network removed"})


def delete_volume(request: Request, agent: Agent) -> Response:
    request.target.update(volume=request.name)
    lock = agent.engine.key_locks.setdefault(request.key.name, threading.Lock())
    # One at a time, and only what is there: podman would remove another, whose name begins so.
    with in_use_by(request.key), hold(lock, CALL_TIMEOUT, "another volume is being removed"):
        for method in "GET", "DELETE":
            agent.engine.call(method, f"/volumes/{quote(request.name, safe='')}")
    return Response({"message": "volume removed"})


def write_file(request: Request, agent: Agent) -> Response:
    body = request.body
    content = text = body.pop("content", "").encode()  # pop: a copy less while the write waits
    if body.get("encoding") == "base64":
        with contextlib.suppress(binascii.Error):
            content = base64.b64decode(text)
        if base64.b64encode(content) != text:  # what Python's decoder forgives differs by version
            raise ApiError(400, "content: must be base64, padded and without line breaks")
    mode = int(body["permission"], 8) if "permission" in body else None
    write = FileWrite(content, mode, body.get("uid"), body.get("gid"), body.get("atomic", True))
    path = body["path"]
    changed = write_beneath(file_tree(request, agent, path), path, write)
    answer = {"path": path, "size": len(content), "changed": changed}
    return Response({**answer, "message": "file written successfully"}, 201)


def get_file(request: Request, agent: Agent) -> Response:
    path = request.query["path"]
    content, status = read_beneath(file_tree(request, agent, path), path)
    etag, mode = hashlib.sha256(content).hexdigest(), stat.S_IMODE(status.st_mode)
    headers = {"Content-Type": "application/octet-stream", "ETag": f'"{etag}"'}
    headers.update({"X-File-Mode": f"{mode:04o}", "X-File-Uid": str(status.st_uid)})
    headers["X-File-Gid"] = str(status.st_gid)
    return Response(content, headers=headers)


def remove_file(request: Request, agent: Agent) -> Response:
    path = request.query["path"]
    remove_beneath(file_tree(request, agent, path), path)
    return Response({"message": "file removed"})


# --------------------------------------------------------------------------------------------------
# Routes: the table
# --------------------------------------------------------------------------------------------------

ROUTES = check_routes(
    Route("GET", "/health", health, PUBLIC),
    Route("POST", f"{API}/containers", create, "create", body=CREATE),
    Route("GET", f"{API}/containers", list_containers, "read", query=LIST_QUERY),
    Route("PUT", f"{API}/containers/{{name}}", deploy, "deploy", body=DEPLOY, query=DEPLOY_QUERY),
    Route("GET", f"{API}/containers/{{id}}", inspect, "inspect"),
    Route("DELETE", f"{API}/containers/{{id}}", remove, "remove", query=REMOVE_QUERY),
    Route("GET", f"{API}/containers/{{id}}/logs", logs, "logs", query=LOGS_QUERY),
    Route("POST", f"{API}/containers/{{id}}/start", start, "operate", body=NOTHING),
    Route("POST", f"{API}/containers/{{id}}/stop", stop, "operate", body=STOP),
    Route("POST", f"{API}/containers/{{id}}/restart", restart, "operate", body=STOP),
    Route("POST", f"{API}/containers/{{id}}/kill", kill, "operate", body=KILL),
    Route("POST", f"{API}/containers/{{id}}/pause", pause, "operate", body=NOTHING),
    Route("POST", f"{API}/containers/{{id}}/unpause", unpause, "operate", body=NOTHING),
    Route("GET", f"{API}/containers/{{id}}/stats", stats, "read", query=STATS_QUERY),
    Route("POST", f"{API}/run", post_run, "create", body=RUN),
    Route("POST", f"{API}/images/pull", pull, "images", body=PULL),
    Route("GET", f"{API}/images", list_images, "images"),
    Route("DELETE", f"{API}/images", remove_image, "images", query=IMAGE_QUERY),
    Route("POST", f"{API}/images/prune", prune, "images", body=PRUNE),
    Route("GET", f"{API}/networks", list_networks, "networks"),
    Route("POST", f"{API}/networks", create_network, MASTER_ONLY, body=NEW_NETWORK),
    Route("DELETE", f"{API}/networks/{{name}}", remove_network, MASTER_ONLY),
    Route("GET", f"{API}/volumes", list_volumes, "volumes"),
    Route("DELETE", f"{API}/volumes/{{name}}", delete_volume, "volumes"),
    Route("POST", f"{API}/files", write_file, "files", body=FILE),
    Route("GET", f"{API}/files", get_file, "files", query=FILE_QUERY),
    Route("DELETE", f"{API}/files", remove_file, "files", query=FILE_QUERY),
    Route("GET", f"{API}/events", events, "read", query=EVENTS_QUERY),
    Route("GET", "/metrics", metrics, "metrics"),
)

# --------------------------------------------------------------------------------------------------
# Command line: listen, signals, healthcheck, new-key, check, exit codes
# --------------------------------------------------------------------------------------------------

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def print_error(*lines: str) -> None:
    """Print lines on standard error; no value in them ends its line or controls a terminal."""
    for line in lines:
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)


def listen(address: Address) -> socket.socket:
    """Return a listening socket; a Unix one has mode 0660. Raises OSError."""
    if not address.path:
        dual = not address.host and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in address.host else socket.AF_INET
        there = (address.host, address.port)
        return socket.create_server(there, family=family, dualstack_ipv6=dual)
    # Only a socket on which nobody listens any more is removed.
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
    """Return 0 if the server that this environment configures is healthy, else 1."""
    address, context = config.listen_addr, None
    address = address._replace(host=address.host or "127.0.0.1")
    if config.server_tls:
        # This is our own server: its certificate needs no check.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
    deadline = time.monotonic() + CONNECT_TIMEOUT
    sock: socket.socket | None = None
    try:
        with connect(address, context, deadline) as sock:
            return 0 if exchange(sock, Call("GET", ""), "/health", deadline).status == 200 else 1
    except (*FAILURES, ValueError) as error:
        print_error(f"{address}: {describe(error)}")
        # A server that accepts only another CA's certificates refuses ours after the handshake.
        is_refusal = sock and isinstance(error, (ssl.SSLError, ConnectionError))
        return 0 if is_refusal and config.tls_client_ca_file else 1


def new_key(name: str) -> int:
    """Print a new key, and its entry for KEYS_FILE; return the exit status."""
    if not re.fullmatch(KEY_NAME, name):
        print_error(f"{name}: a key's name must be {KEY_NAME_RULE}")
        return 2
    key = secrets.token_hex(32)
    entry = {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    print(key)
    print(json.dumps({**entry, "allow": ["read", "logs"], "containers": []}))
    return 0


def start_up(log: Log, address: Address, agent: Agent) -> None:
    """Log where the agent listens; then clean up after a killed agent: its deploys, its runs."""
    problem = agent.engine.problem()
    where = {"address": str(address), "engine": str(agent.engine.address)}
    log("info", "listening", version=VERSION, **where, engine_answers=not problem)
    if problem:
        log("warning", f"the Engine does not answer: {problem}")
    # At once and once more: the Engine may still be working on a create of the killed agent's.
    pauses = [LATE_CREATE, 0]  # the next one last
    while pauses and not agent.deploys.stopping.wait(pauses.pop()):
        try:
            agent.deploys.recover_all()
            remove_left_runs(agent.engine, log, agent.runs)
        except EngineError:
            pauses.append(RECOVERY_INTERVAL)


def raise_open_files(wanted: int) -> int:
    """Raise the limit on open files; return how many connections it allows, at most `wanted`."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    # A connection may need a second descriptor, to the Engine.
    return max(1, min(wanted, (soft - DESCRIPTORS_KEPT) // 2))


def finish_requests(server: Server, agent: Agent, log: Log) -> int:
    """Stop accepting, and wait up to GRACE for the requests to end; return the exit status."""
    agent.deploys.stopping.set()
    server.stop()
    deadline, status = time.monotonic() + GRACE, 0
    while (server.slots or agent.deploys.busy) and time.monotonic() < deadline:
        if signal.sigtimedwait(STOP_SIGNALS, 0.05):  # a second one ends the wait
            deadline, status = 0, 1
    # Those that are cut off are logged: the Engine may still carry them out.
    for request in filter(None, [slot.request for slot in list(server.slots)]):
        request.error = "cut off by the stop"
        log("warning", "request", **request.log_fields(time.monotonic() - request.started))
    return status


def run(config: Config) -> int:
    """Serve until a stop signal; return the exit status. Raises ConfigError."""
    # Blocked before the first thread starts, and taken by sigwait: no handler interrupts any code.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.umask(0)  # every mode here is explicit
    # The same everywhere: musl's default is too little, and json's decoder needs over 1 MiB.
    threading.stack_size(4 * 1024 * 1024)
    address, log = config.listen_addr, Log(config.log_level)
    # A bug in a thread without a request, such as a deploy's.
    threading.excepthook = lambda bug: log("error", "bug", traceback=describe_bug(bug.exc_value))
    with config_errors("LISTEN_ADDR", address):
        listener = listen(address)
    if not address.path:
        address = address._replace(port=listener.getsockname()[1])
    for line in config.warnings:
        log("warning", line)
    allowed = raise_open_files(config.max_connections)
    if allowed < config.max_connections:
        log("warning", f"MAX_CONNECTIONS: lowered to {allowed} by the limit on open files")
    config = config._replace(max_connections=allowed)
    engine = Engine(config.docker_host, config.engine_tls, config.docker_api_version)
    agent = Agent(engine, config.host_root, {}, Metrics(), set(), Deploys(engine, log))
    with Server(config, log, listener, ROUTES, agent) as server:
        try:
            start_thread(server.serve_forever)
            # In a thread: an Engine that does not answer must not delay a stop.
            start_thread(start_up, log, address, agent)
        except OSError as error:
            advice = "raise the limit on processes, or update Docker"
            raise ConfigError(f"{describe(error)}: {advice}") from error
        notify("READY=1")
        signal.sigwait(STOP_SIGNALS)
        notify("STOPPING=1")
        log("info", "stopping")
        status = finish_requests(server, agent, log)
    engine.close()
    log("info", "stopped")
    return status


def usage() -> str:
    rows = [f"  {s.name:<20} {s.meaning}\n{'':<22} default: {s.default or '-'}" for s in SETTINGS]
    return (
        "usage: dockeragent.py [--help | --version | check | healthcheck | new-key NAME]\n\n"
        "Serves a small HTTP API in front of a Docker Engine.\n"
        "  check         loads the configuration as a start would; prints ok or what is wrong\n"
        "  healthcheck   asks the running server's /health and exits 0 or 1\n"
        "  new-key NAME  prints a new key, and its entry for KEYS_FILE\n\n"
        "Configured by the environment:\n\n" + "\n".join(rows)
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
    if len(arguments) == 2 and arguments[0] == "new-key":
        return new_key(arguments[1])
    if arguments not in ([], ["healthcheck"], ["check"]):
        print_error(f"unknown arguments {' '.join(arguments)}; try --help")
        return 2
    is_healthcheck = arguments == ["healthcheck"]
    # healthcheck needs no key, so it may run as a user that cannot read one.
    unneeded = {"API_KEY": "-", "API_KEY_FILE": "", "KEYS_FILE": ""} if is_healthcheck else {}
    try:
        config = load_config({**os.environ, **unneeded})
        if arguments == ["check"]:
            print_error(*(f"warning: {line}" for line in config.warnings))
            print("ok")
            return 0
        return healthcheck(config) if is_healthcheck else run(config)
    except ConfigError as error:
        print_error(*error.args)
        return 1 if is_healthcheck else 2


if __name__ == "__main__":
    sys.exit(main())
