"""Tests of dockeragent: over real sockets, and on a real Engine wherever one can show it.

DOCKER_HOST names the Engine, which needs an image busybox:test; without one, what takes a real
Engine is skipped. How an Engine fails is shown by FakeEngine, scripted, on a Unix socket.
"""

from __future__ import annotations

import ast
import base64
import binascii
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import queue
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple
from urllib.parse import parse_qs, quote, unquote

import pytest

import dockeragent as da

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "dockeragent.py"
KEY = "0123456789abcdef0123456789abcdef"
ENGINE_HOST = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
IMAGE = "busybox:test"
LABEL = "dockeragent-test-" + secrets.token_hex(4)  # of what this run makes
PODMAN = "Api-Version: 1.41\r\nLibpod-Api-Version: 5.4.2\r\n"  # the head of its ping
WAIT = 10.0  # seconds before a test that waits for something fails
MIB = 1024 * 1024


class Reply(NamedTuple):
    """One answer: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return condition() once it is true; fail the test when even a busy machine had the time."""
    deadline, pause = time.monotonic() + 3 * WAIT, 0.005
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)  # most of them ask the Engine, which costs it time
    pytest.fail(f"waited in vain for {what}")


class UnixConnection(http.client.HTTPConnection):
    """http.client over a Unix socket."""

    def __init__(self, path: str, timeout: float = 60) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Agent:
    """A dockeragent process on a loopback port, and a client for it.

    env is added to a plain environment: LISTEN_ADDR is 127.0.0.1:0, RATE_LIMIT is 0.
    """

    def __init__(self, **env: str) -> None:
        self.env = {
            "PATH": os.environ["PATH"],
            "PYTHONMALLOC": "pymalloc",  # -X dev would look for errors in C, too, and be slower
            "API_KEY": KEY,
            "LISTEN_ADDR": "127.0.0.1:0",
            "RATE_LIMIT": "0",
            "DOCKER_HOST": ENGINE_HOST,
            **env,
        }
        self.process = subprocess.Popen(
            # As a module it is compiled once; the file by itself would be at each start.
            [sys.executable, "-W", "error", "-X", "dev", "-m", "dockeragent"],
            cwd=HERE,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.log: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        line = until(lambda: self.lines("listening") or self.process.poll() is not None, "a start")
        assert line is not True, self.process.stderr.read()
        self.address = line[0]["address"]
        self.port = int(self.address.rpartition(":")[2]) if "tcp://" in self.address else 0

    def _read_log(self) -> None:
        for line in self.process.stdout:
            self.log.append(json.loads(line))

    def lines(self, msg: str) -> list[dict[str, Any]]:
        """The log lines with this msg, so far."""
        return [line for line in list(self.log) if line["msg"] == msg]

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self.process.wait()
        self._reader.join()
        stderr = self.process.stderr.read().decode()
        self.process.stdout.close()
        self.process.stderr.close()
        # No descriptor or thread leaked (-X dev), no traceback, nothing but log lines.
        assert stderr == ""
        assert not self.lines("bug"), self.lines("bug")

    def connect(self) -> socket.socket:
        """A plain socket to the agent."""
        if self.port:
            return socket.create_connection(("127.0.0.1", self.port), WAIT)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT)
        sock.connect(self.address[len("unix://") :])
        return sock

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        key: str = KEY,
        timeout: float = 60,
    ) -> Reply:
        """One request on a connection of its own. body: bytes as they are, else sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = (
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            if self.port
            else UnixConnection(self.address[len("unix://") :], timeout)
        )
        with contextlib.closing(connection):
            key_header = {"X-API-Key": key} if key else {}
            connection.request(method, path, data, {**key_header, **(headers or {})})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())

    def get(self, path: str, **kwargs: Any) -> Reply:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Reply:
        return self.request("POST", path, body, **kwargs)

    def delete(self, path: str, **kwargs: Any) -> Reply:
        return self.request("DELETE", path, **kwargs)

    def raw(self, data: bytes, half_close: bool = False) -> bytes:
        """Send bytes, and return all that comes until the agent closes."""
        with self.connect() as sock:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
            return read_to_end(sock)


def read_to_end(sock: socket.socket) -> bytes:
    """All bytes until the other side closes."""
    pieces = []
    while piece := sock.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def at_once(call: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """What a call returns for each of the arguments, in threads that run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        return list(threads.map(call, *arguments))


def assert_envelope(reply: Reply, status: int, *words: str) -> None:
    """Every error is the same JSON; words must be in its message."""
    assert reply.status == status, reply.body
    body = reply.json()
    assert set(body) == {"error", "message", "status"}
    assert body["status"] == status
    assert reply.headers["content-type"] == "application/json"
    for word in words:
        assert word in body["message"]


class Seen(NamedTuple):
    """One request that FakeEngine saw."""

    method: str
    target: str  # without the version: "/containers/json?all=0"
    headers: dict[str, str]
    body: bytes
    version: str = "HTTP/1.1"


def is_own_look(target: str) -> bool:
    """Whether an agent asks this by itself: for unfinished deploys, or for left runs."""
    return target.startswith("/containers/json?all=1&filters=%7B%22name") or (
        "%22dockeragent.run%22" in target
    )


class FakeEngine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """An Engine as seen from its socket: scripted answers, every request recorded.

    script maps "METHOD /path" (no version, no query) to bytes to send, or to a function of the
    connected socket that sends what it likes; afterwards the connection is closed. _ping is
    answered on its own (API 1.41) unless scripted.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, path: Path) -> None:
        self.script: dict[str, bytes | Callable[[socket.socket], None]] = {}
        self.seen: queue.Queue[Seen] = queue.Queue()
        self.url = f"unix://{path}"
        super().__init__(str(path), FakeEngineHandler)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def requests(self) -> list[Seen]:
        """What was asked since the last call, but pings and what an agent looks for by itself."""
        found = []
        while not self.seen.empty():
            found.append(self.seen.get())
        return [seen for seen in found if seen.target != "/_ping" and not is_own_look(seen.target)]

    def changes(self) -> list[Seen]:
        """What was to change something, since the last call."""
        return [seen for seen in self.requests() if seen.method != "GET"]


class FakeEngineHandler(socketserver.StreamRequestHandler):
    server: FakeEngine

    def handle(self) -> None:
        method, target, version = self.rfile.readline().decode().split()
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        target = re.sub(r"^/v1\.[0-9]+/", "/", target)
        self.server.seen.put(Seen(method, target, headers, body, version))
        answer = self.server.script.get(f"{method} {target.partition('?')[0]}")
        if is_own_look(target):
            answer = self.server.script.get("its own look", http_answer([]))
        if answer is None and target == "/_ping":
            answer = http_answer(b"OK", extra="Api-Version: 1.41\r\n", content_type="text/plain")
        if answer is None:
            answer = http_answer({"message": "page not found"}, 404)
        with contextlib.suppress(OSError):
            if isinstance(answer, bytes):
                self.connection.sendall(answer)
            else:
                answer(self.connection)


def http_answer(
    body: Any, status: int = 200, extra: str = "", content_type: str = "application/json"
) -> bytes:
    """An HTTP answer with a Content-Length; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n"
    return f"{head}{extra}Connection: close\r\n\r\n".encode() + data


def chunked_answer(*pieces: bytes, end: bool = True) -> bytes:
    """An HTTP answer in chunks; end=False leaves the last one out, as a broken Engine does."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + chunks + (b"0\r\n\r\n" if end else b"")


def frame(kind: int, text: bytes, stamp: bytes = b"2026-02-21T10:00:00.000000001Z") -> bytes:
    """One frame of the Engine's log stream: text with its timestamp."""
    payload = stamp + b" " + text
    return struct.pack(">BxxxL", kind, len(payload)) + payload


class RealEngine:
    """The real Engine, spoken to without the agent."""

    logs_fail = False  # whether the last log ended with the Engine's own complaint

    def __init__(self, url: str) -> None:
        self.path = url[len("unix://") :]

    def call(
        self, method: str, path: str, body: Any = None, timeout: float = 60
    ) -> tuple[int, Any]:
        connection = UnixConnection(self.path, timeout)
        with contextlib.closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        with contextlib.suppress(ValueError):
            return response.status, json.loads(data)
        return response.status, data

    def inspect(self, name: str) -> Any:
        return self.call("GET", f"/containers/{name}/json")[1]

    def logs(self, name: str, query: str = "") -> bytes:
        """The log of a container without a terminal, stdout and stderr as they come."""
        data, text = self.call("GET", f"/containers/{name}/logs?stdout=1&stderr=1{query}")[1], b""
        while data:
            kind, size = struct.unpack(">BxxxL", data[:8])
            text, data = text + data[8 : 8 + size], data[8 + size :]
            self.logs_fail = kind == 3
        return text

    def run(self, *cmd: str, tty: bool = False, wait: bool = True, **config: Any) -> str:
        """Start a container of the test image and return its id; wait for its end if told to."""
        body = {
            "Image": IMAGE,
            "Cmd": list(cmd),
            "Tty": tty,
            "Labels": {LABEL: "1"},
            "HostConfig": {"NetworkMode": "none"},
            "StopTimeout": 0,
            **config,
        }
        status, created = self.call("POST", "/containers/create", body)
        assert status == 201, created
        status, answer = self.call("POST", f"/containers/{created['Id']}/start")
        assert status == 204, answer
        if wait:
            self.call("POST", f"/containers/{created['Id']}/wait")
        return created["Id"]

    def remove(self, name: str) -> None:
        self.call("DELETE", f"/containers/{name}?force=1&v=1")


@pytest.fixture(scope="session")
def engine() -> Iterator[RealEngine]:
    """The real Engine; what tests have left there is removed at the end."""
    real = RealEngine(ENGINE_HOST)
    try:
        status, _ = real.call("GET", f"/images/{IMAGE}/json")
    except OSError as error:
        pytest.skip(f"no Engine at {ENGINE_HOST}: {error}")
    if status != 200:
        pytest.skip(f"the Engine at {ENGINE_HOST} has no image {IMAGE}")
    yield real
    filters = json.dumps({"label": [LABEL]}, separators=(",", ":"))
    for container in real.call("GET", f"/containers/json?all=1&filters={filters}")[1]:
        real.remove(container["Id"])


@pytest.fixture(scope="session")
def host_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the shared agent takes for the host's filesystem."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def agent(engine: RealEngine, host_root: Path) -> Iterator[Agent]:
    """One agent on the real Engine, shared by the tests that change nothing of it."""
    with Agent(HOST_ROOT=str(host_root)) as running:
        yield running


@pytest.fixture
def fake_engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with FakeEngine(tmp_path / "engine.sock") as fake:
        yield fake


@pytest.fixture
def fake_agent(fake_engine: FakeEngine, tmp_path: Path) -> Iterator[Agent]:
    """An agent whose Engine is fake_engine; its HOST_ROOT is tmp_path / "host"."""
    (tmp_path / "host").mkdir()
    with Agent(DOCKER_HOST=fake_engine.url, HOST_ROOT=str(tmp_path / "host")) as running:
        yield running


@pytest.fixture
def name(engine: RealEngine) -> Iterator[str]:
    """A container's name that is free, and free again after the test."""
    chosen = "da-" + secrets.token_hex(6)
    yield chosen
    engine.remove(chosen)


# What takes an agent's own timeouts: begun at the start, and looked at by the last test.
LONG_WAITS: list[Callable[[Path, Pki], None]] = []


@pytest.fixture(scope="session")
def long_waits(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Any, concurrent.futures.Future[None]]]:
    names = {item.name for item in request.session.items}
    wanted = [each for each in LONG_WAITS if f"test_long_wait[{each.__name__}]" in names]
    pki = request.getfixturevalue("pki") if wanted else None
    with concurrent.futures.ThreadPoolExecutor() as threads:
        folders = [tmp_path_factory.mktemp("waits") for _ in wanted]
        yield {each: threads.submit(each, *more, pki) for each, *more in zip(wanted, folders)}


def cases(*rows: tuple[Any, ...]) -> list[Any]:
    """pytest parameters from rows whose first item is the id."""
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


# Started once: it forks for each command line, which costs much less than a start of Python.
COMMANDS = """
import json, os, signal, sys, tempfile
import dockeragent as da
for line in sys.stdin:
    arguments, environment = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            signal.alarm(10)
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            os.environ.clear(), os.environ.update(environment)
            sys.exit(da.main(arguments))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [file.seek(0) or file.read().decode() for file in (out, err)]
        print(json.dumps([status, *texts]), flush=True)
"""


class Done(NamedTuple):
    """What came of one command line."""

    returncode: int
    stdout: str
    stderr: str


@functools.cache
def commands() -> subprocess.Popen[str]:
    arguments = [sys.executable, "-X", "dev", "-c", COMMANDS]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, cwd=HERE, stdin=pipe, stdout=pipe, text=True)


def command(*arguments: str, **env: str) -> Done:
    """Run dockeragent.py to its end, with env added to a working environment ("" takes out)."""
    full = {"PATH": os.environ["PATH"], "API_KEY": KEY, "LISTEN_ADDR": "127.0.0.1:0", **env}
    kept = {name: value for name, value in full.items() if value}
    print(json.dumps([arguments, kept]), file=commands().stdin, flush=True)
    return Done(*json.loads(commands().stdout.readline()))


def split_replies(data: bytes) -> list[Reply]:
    """The answers (with Content-Length, or none of a body) that these bytes are made of."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end and head.startswith(b"HTTP/1.1 "), head[:200]
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", 0))
        assert len(data) >= size
        found.append(Reply(int(status.split(" ")[1]), headers, data[:size]))
        data = data[size:]
    return found


def send_in_pieces(agent: Agent, data: bytes, size: int, half_close: bool = False) -> bytes:
    """Send data in pieces that arrive one by one; return all that comes until the agent closes."""
    with agent.connect() as sock:
        if agent.port:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for start in range(0, len(data), size):
                sock.sendall(data[start : start + size])
                time.sleep(0)  # let the agent read
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)


def message(line: str, *fields: str, body: bytes = b"", key: str = KEY) -> bytes:
    """One request's bytes, with Host and key."""
    lines = [line + " HTTP/1.1", "Host: agent", *([f"X-API-Key: {key}"] if key else []), *fields]
    return "\r\n".join([*lines, "", ""]).encode() + body


NO_CONTENT = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"
# What must never be answered or reach the Engine when it hides behind a refused request.
SMUGGLED = message("DELETE /api/v1/containers/smuggled")
LAST = "Connection: close"


class Pair(NamedTuple):
    agent: Agent
    engine: FakeEngine


@pytest.fixture(scope="session")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """An agent and its fake Engine, shared by the tables of what is refused before the Engine."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "host").mkdir()
    with FakeEngine(folder / "engine.sock") as fake:
        fake.script["GET /containers/web/json"] = http_answer({"Id": "web", "Config": {}})
        fake.script["POST /containers/web/kill"] = NO_CONTENT
        fake.script["POST /containers/web/start"] = NO_CONTENT
        fake.script["GET /containers/json"] = http_answer([])
        with Agent(DOCKER_HOST=fake.url, HOST_ROOT=str(folder / "host")) as running:
            yield Pair(running, fake)
            assert KEY not in json.dumps(running.log)


@pytest.fixture
def pair(shared_pair: Pair) -> Pair:
    """The shared pair, with nothing left of what reached the Engine in the test before."""
    shared_pair.engine.requests()
    return shared_pair


# Configuration


@pytest.mark.usefixtures("long_waits")  # the first test: they begin here
@pytest.mark.parametrize("variable, env, word", cases(
    ("no key at all", "API_KEY", {"API_KEY": ""}, "required"),
    ("key with a newline", "API_KEY", {"API_KEY": "a\nb" * 20}, "control"),
    ("key with a space at its end", "API_KEY", {"API_KEY": KEY + " "}, "space"),
    ("both keys", "API_KEY_FILE", {"API_KEY_FILE": str(SOURCE.parent / "key")}, ""),
    ("key file missing", "API_KEY_FILE", {"API_KEY": "", "API_KEY_FILE": "/none"}, "No such"),
    ("key file a folder", "API_KEY_FILE", {"API_KEY": "", "API_KEY_FILE": "/"}, "directory"),
    ("key file empty", "API_KEY_FILE", {"API_KEY": "", "API_KEY_FILE": "/dev/null"}, "no key"),
    ("no colon", "LISTEN_ADDR", {"LISTEN_ADDR": "3000"}, ""),
    ("no port", "LISTEN_ADDR", {"LISTEN_ADDR": "127.0.0.1:"}, "65535"),
    ("port too high", "LISTEN_ADDR", {"LISTEN_ADDR": ":65536"}, "65535"),
    ("port with a sign", "LISTEN_ADDR", {"LISTEN_ADDR": ":+80"}, "65535"),
    ("port in Arabic digits", "LISTEN_ADDR", {"LISTEN_ADDR": ":٣٠٠٠"}, "65535"),
    ("IPv6 without brackets", "LISTEN_ADDR", {"LISTEN_ADDR": "::1:3000"}, ""),
    ("not an address", "LISTEN_ADDR", {"LISTEN_ADDR": "999.0.0.1:3000"}, ""),
    ("relative socket", "LISTEN_ADDR", {"LISTEN_ADDR": "unix://a.sock"}, "unix:///"),
    ("folder of the socket missing", "LISTEN_ADDR", {"LISTEN_ADDR": "unix:///none/s"}, ""),
    ("no socket there", "LISTEN_ADDR", {"LISTEN_ADDR": "unix:///dev/null"}, "other than a socket"),
    ("foreign address", "LISTEN_ADDR", {"LISTEN_ADDR": "192.0.2.1:0"}, ""),
    ("path of a socket too long", "LISTEN_ADDR", {"LISTEN_ADDR": f"unix:///{'é' * 54}"}, "107"),
    ("Engine's path too long", "DOCKER_HOST", {"DOCKER_HOST": f"unix:///{'x' * 107}"}, "107"),
    ("ssh", "DOCKER_HOST", {"DOCKER_HOST": "ssh://host"}, "ssh://"),
    ("npipe", "DOCKER_HOST", {"DOCKER_HOST": "npipe:////./pipe/x"}, "npipe://"),
    ("bare path", "DOCKER_HOST", {"DOCKER_HOST": "/run/docker.sock"}, ""),
    ("Engine without a host", "DOCKER_HOST", {"DOCKER_HOST": "tcp://:2375"}, ""),
    ("Engine without a path", "DOCKER_HOST", {"DOCKER_HOST": "unix:///"}, ""),
    ("Engine port 0", "DOCKER_HOST", {"DOCKER_HOST": "tcp://h:0"}, "65535"),
    ("Engine with a user", "DOCKER_HOST", {"DOCKER_HOST": "tcp://@h:1"}, ""),
    ("Engine with a fragment", "DOCKER_HOST", {"DOCKER_HOST": "tcp://h:1#x"}, ""),
    ("Engine with a newline", "DOCKER_HOST", {"DOCKER_HOST": "tcp://h\no:1"}, ""),
    ("file with a newline", "API_KEY_FILE", {"API_KEY": "", "API_KEY_FILE": "/a\nb\x1b"}, "/a?b?"),
    ("Engine port too high", "DOCKER_HOST", {"DOCKER_HOST": "tcp://h:65536"}, ""),
    ("no certificates for the Engine", "DOCKER_CERT_PATH",
     {"DOCKER_HOST": "tcp://h:1", "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": "/none"},
     "No such"),
    ("Engine version", "DOCKER_API_VERSION", {"DOCKER_API_VERSION": "v1.41"}, "1.41"),
    ("relative root", "HOST_ROOT", {"HOST_ROOT": "host"}, "absolute"),
    ("negative limit", "RATE_LIMIT", {"RATE_LIMIT": "-1"}, "integer"),
    ("limit as a float", "RATE_LIMIT", {"RATE_LIMIT": "1.5"}, "integer"),
    ("limit with an underscore", "RATE_LIMIT", {"RATE_LIMIT": "1_0"}, "integer"),
    ("proxy by name", "TRUSTED_PROXIES", {"TRUSTED_PROXIES": "10.0.0.0/8,proxy"}, "proxy"),
    ("proxy as a mapped address", "TRUSTED_PROXIES", {"TRUSTED_PROXIES": "::ffff:1.2.3.0/120"}, ""),
    ("proxy with host bits", "TRUSTED_PROXIES", {"TRUSTED_PROXIES": "10.0.0.1/8"}, "host bits"),
    ("certificate alone", "TLS_KEY_FILE", {"TLS_CERT_FILE": "/dev/null"}, "required"),
    ("TLS key alone", "TLS_CERT_FILE", {"TLS_KEY_FILE": "/dev/null"}, "required"),
    ("client CA alone", "TLS_CERT_FILE", {"TLS_CLIENT_CA_FILE": "/dev/null"}, "CA_FILE"),
    ("certificate missing", "TLS_CERT_FILE", {"TLS_CERT_FILE": "/none", "TLS_KEY_FILE": "/none"},
     "No such"),
    ("certificate that is none", "TLS_CERT_FILE",
     {"TLS_CERT_FILE": str(SOURCE), "TLS_KEY_FILE": str(SOURCE)}, ""),
    ("no connections", "MAX_CONNECTIONS", {"MAX_CONNECTIONS": "0"}, "from 1"),
    ("unknown level", "LOG_LEVEL", {"LOG_LEVEL": "trace"}, "debug, info, warning or error"),
))  # fmt: skip
def test_wrong_value_is_one_line_that_names_its_variable(variable, env, word, tmp_path):
    if env.get("API_KEY_FILE", "").endswith("/key"):
        (tmp_path / "key").write_text(KEY)
        env = {"API_KEY_FILE": str(tmp_path / "key")}
    done = command(**env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{variable}: ") and done.stderr.count("\n") == 1
    assert word in done.stderr
    assert KEY not in done.stderr and "Traceback" not in done.stderr


def test_port_in_use_is_one_line_and_status_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command(LISTEN_ADDR=f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 2
    assert done.stderr.startswith("LISTEN_ADDR: ") and done.stderr.count("\n") == 1
    assert "in use" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
def test_start_without_a_thread_to_be_had_is_one_line_and_status_2():
    become = "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)); os.setuid(4001)\n"
    become += "os.environ.update(API_KEY='k' * 32, LISTEN_ADDR='127.0.0.1:0', HOST_ROOT='/')\n"
    printed = in_child(become + "sys.stderr = sys.stdout; print(da.main([]))")
    assert re.fullmatch("no more threads can be started: .*\n2\n", printed)


def test_help_names_every_variable_and_wrong_usage_is_refused():
    done = command("--help", API_KEY="")
    assert (done.returncode, done.stderr) == (0, "")
    for setting in da.SETTINGS:
        assert setting.name in done.stdout
        assert setting.default in done.stdout
    assert command("--version", API_KEY="").stdout.strip() == f"dockeragent {da.VERSION}"
    for arguments in (["--nonsense"], ["healthcheck", "--help"], ["serve"]):
        done = command(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_program_exits_with_its_status_and_run_by_its_name_keeps_a_compiled_copy(tmp_path):
    shutil.copy(SOURCE, tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": WAIT}
        done = subprocess.run([sys.executable, *arguments], env={}, **options)
        return done.returncode, done.stdout, done.stderr

    status, printed, error = run("-I", "dockeragent.py")
    assert (status, printed, error.count("\n")) == (2, "", 1) and error.startswith("API_KEY: ")
    assert run("-m", "dockeragent", "--version") == (0, f"dockeragent {da.VERSION}\n", "")
    assert list(tmp_path.glob("__pycache__/dockeragent.*.pyc"))


@pytest.mark.parametrize(
    "content, sent",
    cases(
        ("one newline is dropped", b"s3cret\n", "s3cret"),
        ("no newline is needed", b"s3cret", "s3cret"),
        ("bytes that are not ASCII", "clé-ß\n".encode(), "clé-ß".encode().decode("latin-1")),
    ),
)
def test_key_file(content, sent, fake_engine, tmp_path):
    (tmp_path / "key").write_bytes(content)
    fake_engine.script["GET /containers/json"] = http_answer([])
    with Agent(DOCKER_HOST=fake_engine.url, API_KEY="", API_KEY_FILE=str(tmp_path / "key")) as it:
        assert it.get("/api/v1/containers", key=sent).status == 200
        assert it.get("/api/v1/containers", key=sent + "x").status == 401
        assert it.get("/api/v1/containers", key=sent[:-1]).status == 401
        # Shorter than 32 characters: it starts, with a warning.
        assert [line for line in it.log if line["level"] == "warning" and "32" in line["msg"]]
    assert len(fake_engine.requests()) == 1


def test_second_newline_of_a_key_file_is_an_error(tmp_path):
    (tmp_path / "key").write_text(KEY + "\n\n")
    done = command(API_KEY="", API_KEY_FILE=str(tmp_path / "key"))
    assert done.returncode == 2 and done.stderr.startswith("API_KEY_FILE: ")
    assert KEY not in done.stderr


# Keys, Policy


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def keys_file(folder: Path, *entries: dict[str, Any]) -> str:
    """A keys file with these entries; "key" in one stands for its sha256."""
    path = folder / "keys.json"
    rows = [
        {**entry, "sha256": digest(entry["key"])} if "key" in entry else entry for entry in entries
    ]
    for row in rows:
        row.pop("key", None)
    path.write_text(json.dumps({"keys": rows}))
    path.chmod(0o600)
    return str(path)


ENTRY = {"name": "ci", "sha256": "a" * 64}


def one_key(**fields: Any) -> dict[str, Any]:
    return {"keys": [{**ENTRY, **fields}]}


@pytest.mark.parametrize(
    "text, word",
    cases(
        ("not JSON", "{", "keys.json: is not JSON"),
        ("no keys", {}, "keys: is required"),
        ("an unknown field", {"keys": [], "kays": []}, "kays"),
        ("an unknown field of a key", one_key(containres=[]), "keys[0].containres"),
        ("a repeated field", '{"keys": [], "keys": []}', "more than once"),
        ("no name", {"keys": [{"sha256": "a" * 64}]}, "keys[0].name"),
        ("the name of the master", one_key(name="master"), "and not master"),
        ("a name with a space", one_key(name="c i"), "keys[0].name"),
        ("the key itself", one_key(sha256=KEY), "keys[0].sha256"),
        ("no key at all", one_key(sha256="EMPTY"), "keys[0].sha256"),
        ("a name twice", {"keys": [ENTRY, {**ENTRY, "sha256": "b" * 64}]}, "same name"),
        ("a key twice", {"keys": [ENTRY, {**ENTRY, "name": "b"}]}, "same digest"),
        ("the master's key", one_key(sha256="MASTER"), "same digest"),
        ("a master with limits", one_key(master=True, allow=["read"]), "keys[0].master"),
        ("master as a string", one_key(master="true"), "keys[0].master"),
        ("an unknown permission", one_key(allow=["root"]), "keys[0].allow[0]"),
        ("a star in the middle", one_key(containers=["a*b"]), "containers[0]"),
        ("a star in a host", one_key(images=["ghcr.io*"]), "images[0]"),
        ("a star in a host and port", one_key(images=["ghcr.io:5*/x"]), "images[0]"),
        ("a star in the middle of an image", one_key(images=["ghcr.io/*/x"]), "images[0]"),
        ("a relative bind", one_key(binds=["srv"]), "must be like /srv/web"),
        ("a bind with a slash at its end", one_key(binds=["/srv/web/"]), "or last /"),
        ("a bind that climbs", one_key(binds=["/srv/../etc"]), "binds[0]"),
        ("a bind with a star", one_key(binds=["/srv/*"]), "binds[0]"),
        ("a bind with a colon", one_key(binds=["/srv:rw"]), "binds[0]"),
        ("the root", one_key(binds=["/"]), "binds[0]"),
        ("a folder above the Engine's", one_key(binds=["/var/lib"]), "/var/lib/docker"),
        ("a folder of the Engine's", one_key(files=["/var/lib/docker/volumes"]), "/var/lib/docker"),
        ("the kernel's", one_key(files=["/proc/sys"]), "/proc"),
        ("the folder of the socket", one_key(binds=["/var/run"]), "/var/run"),
        ("the socket's real folder", one_key(binds=["/run/docker"]), "/run"),
        ("a folder with the keys file", one_key(files=["FOLDER"]), "keys.json"),
        ("the Engine's keys", one_key(binds=["FOLDER/.docker"]), "/.docker"),
        ("a link to the root", one_key(binds=["FOLDER/link"]), "/proc"),
        ("a port range of words", one_key(ports=["http"]), "ports[0]"),
        ("a port range backwards", one_key(ports=["90-80"]), "lower one first"),
        ("a port range that never ends", one_key(ports=["1-65536"]), "65535"),
        ("a port of 0", one_key(ports=["0"]), "ports[0]"),
        ("an unknown limit", one_key(limits={"memory": 1}), "limits.memory"),
        ("a limit in bytes", one_key(limits={"memory_mb": 64 * MIB}), "limits.memory_mb"),
        ("a time without a zone", one_key(expires="2027-01-01T00:00:00"), "expires"),
        ("a time that cannot be", one_key(expires="2027-13-01T00:00:00Z"), "expires"),
        ("a time with a short month", one_key(expires="2027-6-30T00:00:00Z"), "expires"),
        ("a time in other digits", one_key(expires="\u0662027-06-30T00:00:00Z"), "expires"),
        ("a zone without a colon", one_key(expires="2027-06-30T00:00:00+0100"), "expires"),
    ),
)
def test_wrong_keys_file_is_one_line(text, word, tmp_path):
    content = text if isinstance(text, str) else json.dumps(text)
    (tmp_path / "link").symlink_to("/")
    path = tmp_path / "keys.json"
    words = {"MASTER": digest(KEY), "EMPTY": digest(""), "FOLDER": str(tmp_path)}
    for written, meaning in words.items():
        content = content.replace(written, meaning)
    path.write_text(content)
    for arguments in ([], ["check"]):
        done = command(*arguments, KEYS_FILE=str(path), HOME=str(tmp_path))
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"KEYS_FILE: {path}: ") and word in done.stderr
        assert digest(KEY) not in done.stderr


def test_new_key_is_an_entry_that_a_check_accepts(tmp_path):
    done = command("new-key", "ci", API_KEY="")
    key, entry = done.stdout.splitlines()
    assert re.fullmatch("[0-9a-f]{64}", key) and json.loads(entry)["sha256"] == digest(key)
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [json.loads(entry)]}))
    done = command("check", API_KEY="", KEYS_FILE=str(path), HOST_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "ok\n")
    assert done.stderr.count("warning: ") == 1 and "chmod 600" in done.stderr
    for name in ("master", "c i", "", "x" * 65):
        done = command("new-key", name)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert "and not master" in done.stderr


def test_keys_are_found_by_their_digest_and_expire(fake_engine, tmp_path):
    fake_engine.script["GET /containers/json"] = http_answer([])
    path = keys_file(
        tmp_path,
        {"name": "ops", "key": "ops", "master": True},
        {"name": "old", "key": "old", "master": True, "expires": "2020-01-01T00:00:00Z"},
        {"name": "new", "key": "new", "allow": ["read"], "expires": "2120-01-01T01:00:00+01:00"},
        {"name": "none", "key": "none"},
    )
    with Agent(DOCKER_HOST=fake_engine.url, API_KEY="", KEYS_FILE=path) as agent:
        wrong = agent.get("/api/v1/containers", key="x")
        found = {
            key: agent.get("/api/v1/containers", key=key) for key in ("ops", "old", "new", "none")
        }
        assert {key: reply.status for key, reply in found.items()} == {
            "ops": 200,
            "old": 401,
            "new": 200,
            "none": 403,
        }
        assert found["old"].body == wrong.body
        assert_envelope(found["none"], 403, "key none: allow: read is not allowed")
        assert_envelope(agent.get("/api/v1/containers", key=digest("ops")), 401)
        lines = until(lambda: agent.lines("request")[5:], "the log") and agent.lines("request")
    # In any order: each is written after its response.
    assert sorted(line.get("key", "") for line in lines) == ["", "", "", "new", "none", "ops"]


def test_each_key_has_a_window_of_its_own(fake_engine, tmp_path):
    fake_engine.script["GET /containers/json"] = http_answer([])
    path = keys_file(tmp_path, *({"name": n, "key": n, "allow": ["read"]} for n in ("a", "b")))
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=path, RATE_LIMIT="2") as agent:
        for key, status in (("a", 200), ("b", 200), (KEY, 200), ("x", 401)):
            statuses = [agent.get("/api/v1/containers", key=key).status for _ in range(3)]
            assert statuses == [status, status, 429]


def test_one_limited_key_holds_a_quarter_of_the_connections(fake_engine, tmp_path):
    fake_engine.script["GET /containers/json"] = http_answer([])
    path = keys_file(tmp_path, {"name": "ci", "key": "ci", "allow": ["read"]})
    env = {"DOCKER_HOST": fake_engine.url, "KEYS_FILE": path, "MAX_CONNECTIONS": "8"}
    with Agent(**env) as agent, contextlib.ExitStack() as stack:
        ask = message("GET /api/v1/containers", key="ci")
        held = [stack.enter_context(agent.connect()) for _ in range(2)]
        for sock in held:
            sock.sendall(ask)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        for _ in range(8):
            with agent.connect() as late:
                late.sendall(ask)
                assert_envelope(split_replies(read_to_end(late))[0], 503, "key ci")
        assert agent.get("/api/v1/containers").status == 200
        held[0].close()
        until(lambda: agent.get("/api/v1/containers", key="ci").status == 200, "a free connection")


def test_limited_keys_together_leave_the_master_a_quarter_of_the_connections(fake_engine, tmp_path):
    fake_engine.script["GET /containers/json"] = http_answer([])
    entries = [{"name": name, "key": name, "allow": ["read"]} for name in "abcd"]
    env = {"KEYS_FILE": keys_file(tmp_path, *entries), "MAX_CONNECTIONS": "8"}
    with Agent(DOCKER_HOST=fake_engine.url, **env) as agent, contextlib.ExitStack() as stack:
        for name, status in zip("aabbccdd", [200] * 6 + [503] * 2):
            sock = stack.enter_context(agent.connect())
            sock.sendall(message("GET /api/v1/containers", key=name))
            assert sock.recv(12) == f"HTTP/1.1 {status}".encode()
        assert agent.get("/api/v1/containers").status == 200


@pytest.mark.parametrize("pattern, image, whole", cases(
    ("no host is Docker Hub", "nginx:1", "nginx:1", "docker.io/library/nginx:1"),
    ("no tag is latest", "nginx", "docker.io/nginx", "docker.io/library/nginx:latest"),
    ("the Hub's other host", "nginx", "index.docker.io/nginx", "docker.io/library/nginx:latest"),
    ("a port is no tag", "localhost:5000/a", "localhost:5000/a", "localhost:5000/a:latest"),
    ("any tag", "nginx:*", "nginx:2", "docker.io/library/nginx:2"),
    ("any repository", "acme/*", "acme/a/b:2", "docker.io/acme/a/b:2"),
    ("any image", "*", "x.io/a", "x.io/a:latest"),
    ("capitals make a host", "*", "ACME/a", "ACME/a:latest"),
    ("an id's beginning is a name", "*", "19fb8dfd23d8", "docker.io/library/19fb8dfd23d8:latest"),
    ("another tag", "nginx:1", "nginx:2", None),
    ("a tag that begins alike", "nginx:1", "nginx:1.2", None),
    ("another repository of the Hub", "nginx", "evil/nginx", None),
    ("a repository that begins alike", "nginx:*", "nginx-evil", None),
    ("a user of the Hub named as a host", "ghcr.io/acme/*", "acme/a", None),
    ("a host that begins alike", "ghcr.io/acme/*", "ghcr.io.evil.com/acme/a", None),
    ("a host in capitals", "ghcr.io/acme/*", "GHCR.IO/acme/a", None),
    ("a host with a port", "ghcr.io/acme/*", "ghcr.io:443/acme/a", None),
    ("a user that begins alike", "ghcr.io/acme/*", "ghcr.io/acme-evil/a", None),
    ("the host in the path", "ghcr.io/acme/*", "evil.com/ghcr.io/acme/a", None),
    ("the Hub in the path", "nginx", "evil.com/library/nginx", None),
    ("an id", "*", "sha256:" + "a" * 64, None),
    ("an id's digits", "*", "a" * 64, None),
    ("a digest", "nginx*", "nginx@sha256:" + "a" * 64, None),
    ("a tag and a digest", "nginx*", "nginx:1@sha256:" + "a" * 64, None),
))  # fmt: skip
def test_image_is_compared_and_sent_in_full(pattern, image, whole, pair, tmp_path):
    entry = {"name": "ci", "key": "ci", "allow": ["images"], "images": [pattern]}
    keys = da.parse_keys(Path(keys_file(tmp_path, entry)).read_bytes(), CONFIG)
    request = da.Request("", da.NEVER, ())
    request.key, request.query = keys[0], {"image": image}
    try:
        da.decide(request, "images", ask=pytest.fail)
        assert request.query == {"image": whole}
    except da.ApiError as error:
        assert (error.status, whole) == (403, None)
        assert error.message.startswith("key ci: images: ")


# What parse_keys looks at beside the keys.
CONFIG = {"host_root": "/none", "docker_host": da.Address(), "listen_addr": da.Address()}
CONFIG.update(
    dict.fromkeys("api_key_file keys_file tls_cert_file tls_key_file docker_cert_path".split(), "")
)
CONFIG["tls_client_ca_file"] = ""


@pytest.mark.parametrize("variable", ["API_KEY_FILE", "KEYS_FILE"])
def test_key_file_that_is_too_large_is_refused_by_name(tmp_path, variable):
    (tmp_path / "file").write_bytes(b"a" * (da.MAX_BODY + 1))
    with pytest.raises(da.ConfigError, match=f"{variable}: .* is too large"):
        da.load_config({variable: str(tmp_path / "file")})


def test_path_of_a_key_is_resolved_as_the_host_sees_it(tmp_path):
    root = tmp_path / "host"
    build(root, ["dir srv/conf", "link srv/up ../run", "link srv/run /var/run", "dir run"])
    build(root, ["dir var/lib", "dir data/docker", "link var/lib/docker /data/docker"])
    build(root, ["dir disk/c", "link moved /disk", "link var/lib/containerd /moved/c"])
    build(root, ["link srv/twice /srv/up", "link loop /loop/loop"])
    named = {**CONFIG, "host_root": str(root), "keys_file": str(root / "srv/conf/keys.json")}
    moved = "/data/docker/volumes", "/disk", "/srv/twice"
    for path in ("/srv/up", "/srv/run", "/srv/conf", "/srv", *moved):
        for field in ("binds", "files"):
            text = json.dumps(one_key(**{field: [path]})).encode()
            with pytest.raises(da.ApiError, match=rf"keys\[0\].{field}: {path} would give away"):
                da.parse_keys(text, named)
    text = json.dumps(one_key(binds=["/srv/con", "/loop"])).encode()
    assert da.parse_keys(text, named)[0].binds == ("/srv/con", "/loop")


@pytest.mark.parametrize("name", sorted(CONFIG.keys() - {"host_root"}))
def test_folder_of_what_is_configured_is_for_no_limited_key(name):
    place = "/srv/app/secret"
    written = f"/{place}"  # as good as with one slash
    is_address = name in ("docker_host", "listen_addr")
    named = {**CONFIG, name: da.Address(written) if is_address else written}
    for path in ("/srv/app", place, f"{place}/x"):
        text = json.dumps(one_key(files=[path])).encode()
        with pytest.raises(da.ApiError, match=f"{path} would give away {place}"):
            da.parse_keys(text, named)
        assert da.parse_keys(text, CONFIG)


def test_route_needs_its_permission(fake_engine, tmp_path):
    """A key with every other permission, and the widest patterns, gets no further."""
    every = [route.permission for route in da.ROUTES if route.permission in da.DECISIONS]
    wide = {name: ["*"] for name in ("containers", "images", "networks", "volumes")}
    entries = [
        {"name": f"k{n}", "key": word, "allow": sorted({*every} - {word}), **wide}
        for n, word in enumerate({*every, da.MASTER_ONLY})
    ]
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, *entries)) as agent:
        limited = [route for route in da.ROUTES if route.permission != da.PUBLIC]
        for route in limited:
            path = re.sub("{.*}", "web", route.path)
            reply = agent.request(route.method, path, key=route.permission)
            assert_envelope(reply, 403, f": allow: {route.permission} is not allowed")
        until(lambda: len(agent.lines("request")) == len(limited), "a log line for each")
        for line in agent.lines("request"):
            assert line["target"] == ({"name": "web"} if "{" in line["route"] else {})
        assert fake_engine.requests() == []


class Policed(NamedTuple):
    """An agent with limited keys on the real Engine, among things that are another's.

    The names in scope of the key "ci" begin with `scope`. words: what a word in a row stands for.
    """

    agent: Agent
    engine: RealEngine
    scope: str
    folder: Path
    words: dict[str, str]

    def fill(self, value: Any) -> Any:
        text = json.dumps(value)
        for word, meaning in self.words.items():
            text = text.replace(word, meaning)
        return json.loads(text)

    def containers(self) -> dict[str, str]:
        """The ids of the containers in scope and of another's, by name, as the Engine sees them."""
        filters = quote(json.dumps({"name": [self.scope]}))
        rows = self.engine.call("GET", f"/containers/json?all=1&filters={filters}")[1]
        return {row["Names"][0][1:]: row["Id"] for row in rows}

    def things(self) -> set[str]:
        """What the Engine has of containers, volumes, networks and images with these names."""
        found = [self.engine.call("GET", path)[1] for path in ("/volumes", "/networks")]
        found.append([row["RepoTags"] for row in self.engine.call("GET", "/images/json")[1]])
        names = re.findall(r'"([^" ]+)"', json.dumps([found, self.containers()]))
        return {name for name in names if self.scope in name or name == IMAGE}

    def create(
        self, way: str, name: str, fields: dict[str, Any], key: str = "ci", query: str = ""
    ) -> Reply:
        body = {"image": IMAGE, "cmd": LOOP, "network_mode": "none", "pull": "never", **fields}
        body = self.fill(body)
        if way == "deploy":
            body = {"deploy": {"stable": 0}, **body}
            return put(self.agent, name, body, query, key=key)
        if way == "run":
            body["cmd"] = ["true"]
        return self.agent.post(f"/api/v1/{way}", {"name": name or None, **body}, key=key)


WAYS = ("containers", "run", "deploy")
EVERY = ["read", "inspect", "logs", "operate", "create", "deploy", "remove", "images", "files"]
EVERY += ["networks", "volumes", "metrics"]


@functools.cache
def exported_files(engine: RealEngine) -> bytes:
    """The files of the test image, as a layer."""
    created = engine.call("POST", "/containers/create", {"Image": IMAGE, "Cmd": LOOP})[1]
    layer = engine.call("GET", f"/containers/{created['Id']}/export")[1]
    engine.remove(created["Id"])
    return layer


def load_image(engine: RealEngine, tag: str, **config: Any) -> None:
    """Make an image of the test image's files with any configuration, as its author could."""
    layer = exported_files(engine)
    digests = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}
    config = {"Env": ["PATH=/bin"], "Cmd": LOOP, **config}
    document = {"architecture": "amd64", "os": "linux", "config": config, "rootfs": digests}
    tags = [f"docker.io/library/{tag}"]  # podman takes a name without a host for a local one
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": ["layer.tar"]}]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, data in (
            ("config.json", json.dumps(document).encode()),
            ("layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with contextlib.closing(UnixConnection(engine.path)) as connection:
        headers = {"Content-Type": "application/x-tar"}
        connection.request("POST", "/images/load", archive.getvalue(), headers)
        assert b"Loaded image" in connection.getresponse().read()


@pytest.fixture(scope="module")
def policed(engine: RealEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policed]:
    folder, scope = tmp_path_factory.mktemp("policed"), f"ky{secrets.token_hex(4)}"
    build(folder, ["dir static", "dir static2", "dir host/conf", "dir host/conf2"])
    full = f"docker.io/library/{IMAGE}"
    ci = {"name": "ci", "key": "ci", "allow": EVERY, "containers": [f"{scope}*"], "cache": True}
    ci.update(images=[full, f"{scope}*", "ghcr.io/acme/*"], networks=[f"{scope}-front"])
    ci.update(volumes=[f"{scope}*"], binds=[str(folder / "static")], files=["/conf", "/conf/out"])
    ci.update(ports=["20000-20003", "20010"], labels=["com.acme.*"])
    ci["limits"] = {"memory_mb": 64, "cpus": 0.5, "pids": 50}
    bare = {"name": "bare", "key": "bare", "allow": EVERY, "containers": [f"{scope}*"]}
    bare.update(images=[full], cache=True)
    wide = {**bare, "name": "wide", "key": "wide", "networks": ["*"], "volumes": ["*"]}
    wide.update(labels=["*"], images=["*"])
    few = {**bare, "name": "few", "key": "few", "containers": [f"{scope}-few*"]}
    few["limits"] = {"containers": 3}
    star = {**bare, "name": "star", "key": "star", "containers": ["*"]}
    with contextlib.ExitStack() as stack:
        networks = {}
        for name in (f"{scope}-front", f"{scope}-back"):
            made = engine.call("POST", "/networks/create", {"Name": name, "Internal": True})[1]
            networks[name] = made["Id"]
            stack.callback(engine.call, "DELETE", f"/networks/{name}")
        options = {"type": "none", "o": "bind", "device": "/"}
        for name, body in ((f"{scope}-plain", {}), (f"{scope}-root", {"DriverOpts": options})):
            engine.call("POST", "/volumes/create", {"Name": name, **body})
            stack.callback(engine.call, "DELETE", f"/volumes/{name}?force=1")
        engine.call("POST", "/volumes/create", {"Name": f"un{scope}"})
        stack.callback(engine.call, "DELETE", f"/volumes/un{scope}?force=1")
        forged = f"{scope}:forged"
        load_image(engine, forged, Labels={"dockeragent.key": "ci"})
        stack.callback(forget, engine, forged)
        other = run_by_hand(engine, f"un{scope}")
        for name, image in ((f"{scope}-hand", IMAGE), (f"{scope}-forged", forged)):
            run_by_hand(engine, name, Image=image)
        for name in (f"un{scope}", f"{scope}-hand", f"{scope}-forged"):
            stack.callback(engine.remove, name)
        image = engine.call("GET", f"/images/{IMAGE}/json")[1]["Id"]
        words = {"SCOPE": scope, "FOLDER": str(folder), "IMAGEDIGITS": image[7:], "IMAGEID": image}
        words.update(OTHERID=other, FRONTID=networks[f"{scope}-front"][:12])
        path = keys_file(folder, ci, bare, wide, few, star)
        agent = stack.enter_context(Agent(KEYS_FILE=path, HOST_ROOT=str(folder / "host")))
        scene = Policed(agent, engine, scope, folder, words)
        assert scene.create("containers", f"{scope}-master", {}, KEY).status == 201
        yield scene
        for name in names_of(engine, scope):
            engine.remove(name)


def volumes(**fields: Any) -> dict[str, Any]:
    return {"volumes": [{"target": "/v", **fields}]}


def many_volumes(count: int) -> dict[str, Any]:
    return {"volumes": [{"target": f"/v{number}"} for number in range(count)]}


def limits(**fields: Any) -> dict[str, Any]:
    return {"resources": fields}


def joined(*networks: Any) -> dict[str, Any]:
    return {"network_mode": None, "networks": list(networks)}


def peer(name: str) -> dict[str, Any]:
    return {"network_mode": f"container:{name}"}


def ports(*numbers: Any) -> dict[str, Any]:
    return {"ports": [{"container_port": 80, "host_port": number} for number in numbers]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key, fields, word", cases(
    ("another's image", "ci", {"image": "redis"}, "images: docker.io/library/redis:latest"),
    ("an image by its id", "ci", {"image": "IMAGEID"}, "images: "),
    ("an image by its id's digits", "ci", {"image": "IMAGEDIGITS"}, "images: "),
    ("a look-alike registry", "ci", {"image": "ghcr.io.evil.com/acme/a"}, "images: "),
    ("a bind of the root", "ci", volumes(source="/"), "binds: /"),
    ("a bind of the root by its type", "ci", volumes(source="/", type="bind"), "binds: /"),
    ("a bind that no list has", "bare", volumes(source="FOLDER/static"), "binds: "),
    ("a link below a listed bind", "ci", volumes(source="FOLDER/static/l"), "binds: "),
    ("a folder above it", "ci", volumes(source="FOLDER"), "binds: "),
    ("a folder that begins alike", "ci", volumes(source="FOLDER/static2"), "binds: "),
    ("a bind that can be written", "ci", volumes(source="FOLDER/static", read_only=False),
     "writable"),
    ("another's volume", "ci", volumes(source="unSCOPE"), "volumes: un"),
    ("a volume that no list has", "bare", volumes(source="SCOPE-plain"), "volumes: "),
    ("a volume that is a bind of the root", "ci", volumes(source="SCOPE-root"),
     "which has options"),
    ("the host's network", "wide", {"network_mode": "host"}, "network_mode: host"),
    ("the host's network in the list", "wide", joined("host"), "network_mode: host"),
    ("another's network", "ci", joined("SCOPE-back"), "networks: "),
    ("another's network as the second", "ci", joined("SCOPE-front", "SCOPE-back"), "-back"),
    ("another's network as the mode", "ci", {"network_mode": "SCOPE-back"}, "networks: "),
    ("a network that no list has", "bare", joined("SCOPE-front"), "networks: "),
    ("the default network", "ci", {"network_mode": None}, "networks: bridge"),
    ("the default network for a star", "wide", {"network_mode": "bridge"}, "networks: bridge"),
    ("a website as alias", "ci", joined({"name": "SCOPE-front", "aliases": ["api.stripe.com"]}),
     "stripe"),
    ("thousands of aliases", "ci",
     joined({"name": "SCOPE-front", "aliases": [f"SCOPE-{n}" for n in range(33)]}),
     "networks: more than 32 aliases"),
    ("another's name as hostname", "ci", {"hostname": "unSCOPE"}, "hostname or alias: un"),
    ("another's name as hostname, networked", "ci", {**joined("SCOPE-front"), "hostname": "db"},
     "alias: db"),
    ("the network of another's container", "ci", peer("unSCOPE"), "container:un"),
    ("the same by its id", "ci", peer("OTHERID"), "container:"),
    ("the network of nobody", "ci", peer("SCOPE-none"), "container:"),
    ("that of one made with more rights", "ci", peer("SCOPE-hand"), "container:"),
    ("that of one whose image says so", "ci", peer("SCOPE-forged"), "container:"),
    ("that of a master's", "ci", peer("SCOPE-master"), "container:"),
    ("a port below its range", "ci", ports(19999), "ports: 19999"),
    ("a port above its range", "ci", ports(20000, 20004), "ports: 20004"),
    ("a port beside a single one", "ci", ports("20011"), "ports: 20011"),
    ("any port, without a range", "bare", ports(0), "ports: one that the Engine picks"),
    ("hundreds of ports", "ci", ports(*[0] * 33), "ports: more than 32"),
    ("hundreds of volumes", "ci", many_volumes(33), "volumes: more than 32"),
    ("what makes the list of all too long", "ci", {"env": ["A=" + "a" * 2**17]}, "size: more than"),
    ("what makes it so by its mounts", "ci",
     {"volumes": [{"target": f"/{number}/{'a' * 4090}"} for number in range(32)]},
     "size: more than"),
    ("a proxy's label", "ci", {"labels": {"traefik.enable": "true"}}, "labels: traefik.enable"),
    ("a label that no list has", "bare", {"labels": {"com.acme.a": "1"}}, "labels: com.acme.a"),
    ("too much memory", "ci", limits(memory_mb=65), "memory_mb: more than 64"),
    ("too many processors", "ci", limits(cpus=0.51), "cpus: more than 0.5"),
    ("too many processes", "ci", limits(pids=51), "pids: more than 50"),
    ("swap without end", "ci", limits(memory_swap_mb=-1), "memory_swap_mb: "),
    ("swap beside the memory", "ci", limits(memory_mb=64, memory_swap_mb=65), "memory_swap_mb: "),
    ("a large share", "ci", limits(cpu_shares=1025), "cpu_shares: more than 1024"),
    ("locked memory", "ci", limits(ulimits={"memlock": -1}), "ulimits: memlock"),
    ("real time", "ci", limits(ulimits={"nofile": 9, "rtprio": 9}), "ulimits: rtprio"),
    ("a check each millisecond", "ci", {"healthcheck": {"cmd": ["a"], "interval": 0.001}},
     "interval"),
    ("a check just too often", "ci", {"healthcheck": {"cmd": ["a"], "interval": 0.999}},
     "interval"),
    ("a long stop", "ci", {"stop_timeout": 121}, "stop_timeout: more than 120"),
    ("a log that calls out", "ci", {"log": {"driver": "syslog"}}, "log.driver: syslog"),
    ("a large log", "ci", {"log": {"max_size_mb": 101}}, "log.max_size_mb: more than 100"),
    ("many log files", "ci", {"log": {"max_files": 11}}, "log.max_files: more than 10"),
    ("all privileges", "wide", {"privileged": True}, "privileged: "),
    ("a capability", "wide", {"cap_add": ["NET_ADMIN"]}, "cap_add: "),
    ("a disk", "wide", {"devices": ["/dev/sda"]}, "devices: "),
    ("a processor of graphics", "wide", {"gpus": "all"}, "gpus: "),
    ("no seccomp", "wide", {"security_opt": ["seccomp=unconfined"]}, "security_opt: "),
    ("a sysctl", "wide", {"sysctls": {"net.core.somaxconn": "1"}}, "sysctls: "),
    ("the host's processes", "wide", {"pid_mode": "host"}, "pid_mode: "),
    ("the host's shared memory", "wide", {"ipc_mode": "host"}, "ipc_mode: "),
    ("no privileges, in so many words", "wide", {"privileged": False}, "privileged: "),
))  # fmt: skip
def test_limited_key_is_refused(policed, way, key, fields, word):
    before = policed.things()
    reply = policed.create(way, f"{policed.scope}-a", fields, key)
    assert_envelope(reply, 403, f"key {key}: ", word, " is not allowed")
    assert policed.things() == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key, name, fields, query, status, word", cases(
    ("another's name", "ci", "unSCOPE", {}, "", 403, "containers: unSCOPE"),
    ("a name that begins another", "few", "SCOPE-fe", {}, "", 403, "containers: "),
    ("no name", "ci", "", {}, "", 403, "containers: no name"),
    ("no name for a star", "star", "", {}, "", 403, "containers: no name"),
    ("a deploy's helper name", "ci", "SCOPE-hand.old", {}, "", 400, "name"),
    ("a container that no deploy made", "ci", "SCOPE-hand", {}, "", 409, ""),
    ("the same, adopted", "ci", "SCOPE-hand", {}, "?adopt=true", 403, "adopt: "),
    ("a network by the beginning of its id", "wide", "SCOPE-a", joined("FRONTID"), "", 404,
     "FRONTID"),
    ("a network that is not there", "wide", "SCOPE-a", joined("SCOPE-none"), "", 404, "-none"),
    ("the agent's own label", "ci", "SCOPE-a", {"labels": {"dockeragent.key": ""}}, "", 400, ""),
    ("a path that the Engine would clean", "ci", "SCOPE-a", volumes(source="FOLDER/static/../../x"),
     "", 400, ""),
    ("doubled slashes", "ci", "SCOPE-a", volumes(source="FOLDER//static"), "", 400, ""),
))  # fmt: skip
def test_limited_key_creates_nothing_else(policed, way, key, name, fields, query, status, word):
    if (way == "deploy" and not name) or (way != "deploy" and query):
        return
    before = policed.containers(), policed.things()
    reply = policed.create(way, policed.fill(name), fields, key, query)
    assert reply.status == status and policed.fill(word) in reply.json()["message"], reply.body
    assert (policed.containers(), policed.things()) == before


def test_what_a_limited_container_gets_unasked(policed):
    """From an image that brings labels and a check of its own."""
    engine, name, image = policed.engine, f"{policed.scope}-b", f"{policed.scope}-labels:1"
    labels = {"traefik.enable": "true", "dockeragent.was": "x", "dockeragent.x": "y"}
    check = {"Test": ["CMD", "true"], "Interval": 10**9}
    brought = {**labels, "com.acme.team": "web", "dockeragent.key": "cd"}
    load_image(engine, image, Labels=brought, Healthcheck=check)
    try:
        bind = {"source": f"{policed.folder}/static", "target": "/b"}
        named = {"source": f"{policed.scope}-plain", "target": "/n"}
        fields = {"image": image, "volumes": [bind, named, {"target": "/anonymous"}]}
        assert policed.create("containers", name, fields).status == 201
        found = engine.inspect(name)
        host, config = found["HostConfig"], found["Config"]
        assert config["Image"] == f"docker.io/library/{image}"
        memory = 64 * 2**20
        assert (host["Memory"], host["MemorySwap"]) == (memory, memory)
        assert (host["NanoCpus"], host["PidsLimit"]) == (500_000_000, 50)
        log = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
        assert host["LogConfig"] == log
        assert {word.removeprefix("CAP_") for word in host["CapDrop"]} == {"NET_RAW", "MKNOD"}
        mounts = {mount["Target"]: mount for mount in host["Mounts"]}
        assert mounts["/b"]["ReadOnly"] and mounts["/b"]["BindOptions"]["NonRecursive"]
        assert not mounts["/n"].get("ReadOnly") and not host["Privileged"]
        assert config["Labels"].pop("dockeragent.key") == "ci"
        assert config["Labels"].pop("com.acme.team") == "web"
        assert set(config["Labels"]) > set(labels) and set(config["Labels"].values()) == {""}
    finally:
        engine.remove(name)
        forget(engine, image)


@pytest.mark.parametrize("fields, place, value", cases(
    ("0 is no way around the memory", limits(memory_mb=0), "Memory", 64 * 2**20),
    ("0 is no way around the swap", limits(memory_mb=32, memory_swap_mb=0), "MemorySwap",
     32 * 2**20),
    ("0 is no way around the processors", limits(cpus=0), "NanoCpus", 5 * 10**8),
    ("0 is no way around the processes", limits(pids=0), "PidsLimit", 50),
    ("null is as good as not asked", {"resources": None, "log": None}, "Memory", 64 * 2**20),
    ("less is less", limits(memory_mb=32, pids=5), "PidsLimit", 5),
    ("its own log", {"log": {"driver": "local", "max_size_mb": 100, "max_files": 10}},
     "LogConfig.Type", "local"),
    ("half a log is rotated", {"log": {"max_files": 2}}, "LogConfig.Config",
     {"max-size": "10m", "max-file": "2"}),
    ("the last port of a range", ports(20003, 20010, 0), "PortBindings.80/tcp", None),
    ("a listed network", joined("SCOPE-front"), "NetworkMode", "FRONT"),
    ("without privileges to gain", {"cap_drop": ["ALL"]}, "CapDrop", ["ALL", "NET_RAW", "MKNOD"]),
))  # fmt: skip
def test_limited_key_asks_for_what_it_may(policed, fields, place, value):
    name = f"{policed.scope}-c"
    try:
        assert policed.create("containers", name, fields).status == 201
        found = policed.engine.inspect(name)["HostConfig"]
        for part in place.split("."):
            found = found[part]
        if value == "FRONT":
            assert found.startswith(policed.words["FRONTID"])
        elif value is None:
            assert {binding["HostPort"] for binding in found} == {"20003", "20010", ""}
        else:
            assert (
                [str(v).removeprefix("CAP_") for v in found] == value
                if "Cap" in place
                else found == value
            )
    finally:
        policed.engine.remove(name)


def test_no_pattern_lets_an_image_bring_the_agents_labels(policed):
    name, image = f"{policed.scope}-own", f"{policed.scope}-own:1"
    labels = {"dockeragent.was": "x", "dockeragent.any": "y", "traefik.enable": "true"}
    load_image(policed.engine, image, Labels=labels)
    try:
        assert policed.create("containers", name, {"image": image}, "wide").status == 201
        found = policed.engine.inspect(name)["Config"]["Labels"]
        values = (found["dockeragent.was"], found["dockeragent.any"], found["traefik.enable"])
        assert values == ("", "", "true")
    finally:
        policed.engine.remove(name)
        forget(policed.engine, image)


@pytest.mark.parametrize(
    "brought",
    cases(
        ("labels", {"Labels": {"com.acme.a": "a" * 2**17}}),
        ("the names of labels", {"Labels": {"b" * 2**17: "1"}}),
        ("an environment", {"Env": ["PATH=/bin", "A=" + "a" * 2**17]}),
        ("volumes", {"Volumes": {f"/v{number}": {} for number in range(33)}}),
    ),
)
def test_image_brings_no_more_than_a_body_may(policed, brought):
    name, image = f"{policed.scope}-s", f"{policed.scope}-size:1"
    load_image(policed.engine, image, **brought)
    word = "volumes: more than 32" if "Volumes" in brought else "size: more than 131072"
    try:
        for way in WAYS:
            reply = policed.create(way, name, {"image": image})
            assert_envelope(reply, 403, f"key ci: {word}")
            assert name not in policed.containers()
    finally:
        policed.engine.remove(name)
        forget(policed.engine, image)


def test_disk_below_a_bind_is_not_in_it(policed):
    """A recursive bind would hold it, and writable: read-only is only the uppermost mount."""
    below = policed.folder / "static/disk"
    below.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(below)], check=True)
    try:
        (below / "secret").touch()
        fields = volumes(source="FOLDER/static", read_only=True)
        script = "ls /v/disk; touch /v/disk/x /v/x || echo refused"
        body = policed.fill({"image": IMAGE, "cmd": ["sh", "-c", script], **fields})
        body.update(name=f"{policed.scope}-d", network_mode="none")
        reply = policed.agent.post("/api/v1/run", body, key="ci")
        told = [line["line"] for line in reply.json()["lines"] if line["stream"] == "stdout"]
        assert told == ["refused"]
        assert b"secret" not in reply.body
        assert sorted(os.listdir(below)) == ["secret"]
        assert os.listdir(policed.folder / "static") == ["disk"]
    finally:
        subprocess.run(["umount", str(below)], check=True)


@pytest.mark.parametrize(
    "brought, fields, is_refused",
    cases(
        ("each nanosecond", {"Interval": 1}, {}, True),
        ("below zero, which is at once", {"Interval": -1}, {}, True),
        ("at first each millisecond", {"StartInterval": 10**6, "Interval": 10**9}, {}, True),
        ("its times, with a check of ours", {"Interval": 10**6}, {"cmd": ["true"]}, True),
        ("its times, which 0 leaves as they are", {"Interval": 10**6}, {"interval": 0}, True),
        ("its check, with times of ours", {"Interval": 10**6}, {"interval": 1}, False),
        ("its check, turned off", {"Interval": 10**6}, {"disable": True}, False),
    ),
)
def test_check_that_an_image_brings(policed, brought, fields, is_refused):
    engine, name, image = policed.engine, f"{policed.scope}-e", f"{policed.scope}-check:1"
    if "StartInterval" in brought and engine.call("GET", "/version")[1]["ApiVersion"] < "1.44":
        is_refused = False  # such an Engine knows nothing of it
    load_image(engine, image, Healthcheck={"Test": ["CMD", "true"], **brought})
    try:
        for way in WAYS:
            more = {"healthcheck": fields} if fields else {}
            reply = policed.create(way, name, {"image": image, **more})
            if is_refused:
                assert_envelope(reply, 403, "key ci: healthcheck: ")
                assert name not in policed.containers()
            else:
                assert reply.status in (200, 201)
            engine.remove(name)
    finally:
        engine.remove(name)
        forget(engine, image)


def test_ten_creates_at_once_are_no_more_than_three(policed):
    def create(number: int) -> Reply:
        name = f"{policed.scope}-few{number}"
        return policed.create(WAYS[number % 2 * 2], name, {}, "few")

    replies = at_once(create, range(10))
    try:
        made = [name for name in policed.containers() if "-few" in name]
        assert sorted(reply.status for reply in replies) == [201] * 3 + [403] * 7
        assert len(made) == 3
        for way in WAYS:
            reply = policed.create(way, f"{policed.scope}-few", {}, "few")
            assert_envelope(reply, 403, "limits: more than 3 containers")
        deployed = [name for name in made if int(name[-1]) % 2]
        for name in deployed[:1]:  # its helpers do not count
            assert policed.create("deploy", name, {"env": ["A=1"]}, "few").status == 200
        assert len([name for name in policed.containers() if "-few" in name]) == 3
    finally:
        for name in policed.containers():
            if "-few" in name:
                policed.engine.remove(name)


def test_deploys_helpers_do_not_count():
    key = da.Key("few", containers=("few*",), limits={"containers": 2})
    for name in ("few1", "few1.next", "few2", "few2.next"):
        da.check_count(key, name, ["few1", "few1.prev", "few1.next", "other"])
    with pytest.raises(da.ApiError, match="more than 2 containers"):
        da.check_count(key, "few3", ["few1", "few2.next"])


def test_network_of_an_own_container_may_be_shared(policed):
    own, second = f"{policed.scope}-f", f"{policed.scope}-g"
    try:
        assert policed.create("containers", own, {}).status == 201
        reply = policed.create("containers", second, {"network_mode": f"container:{own}"})
        assert reply.status == 201
        mode = policed.engine.inspect(second)["HostConfig"]["NetworkMode"]
        assert mode == f"container:{policed.engine.inspect(own)['Id']}"
    finally:
        policed.engine.remove(second)
        policed.engine.remove(own)


CONTAINER_ROUTES = [route for route in da.ROUTES if "{id}" in route.path]


@pytest.mark.parametrize(
    "route", CONTAINER_ROUTES, ids=[f"{r.method} {r.path[7:]}" for r in CONTAINER_ROUTES]
)
def test_container_of_another_is_as_if_it_were_not_there(policed, route):
    def ask(name: str) -> dict[str, Any]:
        path = route.path.replace("{id}", name)
        reply = policed.agent.request(route.method, path, key="ci")
        assert_envelope(reply, 404)
        assert set(reply.headers) == headers
        return {**reply.json(), "message": reply.json()["message"].replace(name, "")}

    other = policed.words["OTHERID"]
    headers = set(policed.agent.get("/api/v1/containers/none", key="ci").headers)
    nobody = ask("none")
    before = policed.engine.inspect(other)
    for name in (f"un{policed.scope}", other, other[:12], f"un{policed.scope}%2e"[:-3]):
        assert ask(name) == nobody
    assert policed.engine.inspect(other) == before


def test_own_container_is_known_by_its_id_too(policed):
    name = f"{policed.scope}-h"
    try:
        identity = policed.create("containers", name, {}).json()["id"]
        for given in (name, identity, identity[:12]):
            assert (
                policed.agent.get(f"/api/v1/containers/{given}", key="ci").json()["Id"] == identity
            )
        reply = policed.agent.delete(f"/api/v1/containers/{identity[:12]}?force=1", key="ci")
        assert reply.status == 200 and name not in policed.containers()
    finally:
        policed.engine.remove(name)


@pytest.mark.parametrize("status", [400, 404, 500])
def test_beginning_of_two_ids_is_no_container(fake_engine, tmp_path, status):
    entry = {"name": "ci", "key": "ci", "allow": ["inspect", "create"], "containers": ["*"]}
    message = {"message": "Multiple IDs found with provided prefix: a"}
    fake_engine.script["GET /containers/a/json"] = http_answer(message, status)
    entry.update(images=["a"], cache=True)
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, entry)) as agent:
        assert_envelope(agent.get("/api/v1/containers/a", key="ci"), 404, "no such container: a")
        body = {"image": "a", "name": "bb", "network_mode": "container:a"}
        assert_envelope(agent.post("/api/v1/containers", body, key="ci"), 403, "container:a")
        assert fake_engine.changes() == []


def test_action_is_for_the_container_that_was_checked(fake_engine, tmp_path):
    """Its name may be another's by the time that the Engine is asked to act."""
    own, other = ({"Id": digit * 64, "Name": "/web", "Config": {}} for digit in "12")
    fake_engine.script["GET /containers/web/json"] = inspected(own, other)
    fake_engine.script[f"GET /containers/{own['Id']}/json"] = http_answer(own)
    entry = {"name": "ci", "key": "ci", "allow": ["operate"], "containers": ["web"]}
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, entry)) as agent:
        agent.post("/api/v1/containers/web/kill", key="ci")
    assert [seen.target for seen in fake_engine.changes()] == [f"/containers/{own['Id']}/kill"]


@pytest.mark.parametrize(
    "created, word",
    cases(
        ("a label of a moved tag", {"Labels": {"traefik.enable": "1"}}, "traefik.enable"),
        ("a check of a moved tag", {"Healthcheck": {"Interval": 1}}, "healthcheck"),
        ("its check at the start", {"Healthcheck": {"StartInterval": 1}}, "healthcheck"),
        ("its volumes", {"Volumes": {f"/v{number}": {} for number in range(33)}}, "volumes"),
        ("its size", {"Cmd": ["a" * 2**17]}, "size"),
    ),
)
def test_container_is_looked_at_before_anybody_can_start_it(fake_engine, tmp_path, created, word):
    """The tag is moved between the look at the image and the create."""
    identity, starts = "1" * 64, []
    found = {"Id": identity, "Name": "/web", "Config": created}
    entry = {"name": "ci", "key": "ci", "allow": ["create", "operate"], "containers": ["web*"]}
    entry.update(images=["a"], cache=True, limits={"containers": 1})
    fake_engine.script["GET /images/docker.io/library/a%3Alatest/json"] = http_answer({"Id": "i"})
    linked = {"Id": "l", "Names": ["/web/db", "/other"]}  # the link's name is no container's
    fake_engine.script["its own look"] = http_answer([linked])
    for name in ("web", identity):
        fake_engine.script[f"GET /containers/{name}/json"] = http_answer(found)
    fake_engine.script[f"DELETE /containers/{identity}"] = NO_CONTENT
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, entry)) as agent:

        def start_meanwhile(sock: socket.socket) -> None:
            starts.append(agent.post("/api/v1/containers/web/start", key="ci"))
            sock.sendall(http_answer({"Id": identity, "Warnings": []}, 201))

        fake_engine.script["POST /containers/create"] = start_meanwhile
        body = {"image": "a", "name": "web", "network_mode": "none"}
        assert_envelope(agent.post("/api/v1/containers", body, key="ci"), 409, word)
        assert_envelope(starts[0], 409, "is being created")
    asked = [f"{seen.method} {seen.target.partition('?')[0]}" for seen in fake_engine.changes()]
    assert asked == ["POST /containers/create", f"DELETE /containers/{identity}"]


@pytest.mark.parametrize("action", ["start", "restart"])
@pytest.mark.parametrize(
    "maker, key, status", [("", "ci", 200), ("ci", "ci", 403), ("", KEY, 200), ("ci", KEY, 200)]
)
def test_container_that_nobody_has_looked_at_is_started_by_no_limited_key(
    policed, action, maker, key, status
):
    """The Engine may do a create that has timed out, all the same."""
    name = f"{policed.scope}-late"
    body = {"Image": IMAGE, "Cmd": LOOP, "Labels": {LABEL: "1", "dockeragent.key": maker}}
    policed.engine.call("POST", f"/containers/create?name={name}", body)
    try:
        reply = policed.agent.post(f"/api/v1/containers/{name}/{action}", key=key)
        assert reply.status == status
        assert (b"what has never run" in reply.body) == (status == 403)
    finally:
        policed.engine.remove(name)


@pytest.mark.parametrize("state", [None, {}, {"StartedAt": None}])
def test_container_that_may_never_have_run_is_started_by_no_limited_key(
    fake_engine, tmp_path, state
):
    entry = {"name": "ci", "key": "ci", "allow": ["operate"], "containers": ["web"]}
    found = {"Id": "c1", "Name": "/web", "Config": {"Labels": {"dockeragent.key": "ci"}}}
    for name in ("web", "c1"):
        fake_engine.script[f"GET /containers/{name}/json"] = http_answer({**found, "State": state})
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, entry)) as agent:
        reply = agent.post("/api/v1/containers/web/start", key="ci")
    assert_envelope(reply, 403, "what has never run")
    assert fake_engine.changes() == []


def test_slow_create_of_a_key_holds_up_no_other_key(fake_engine, tmp_path):
    """But counts for it while it goes on; nor does one of its name that fails let it be started."""
    identity, began, release = "1" * 64, threading.Event(), threading.Event()

    def create(sock: socket.socket) -> None:
        if not began.is_set():
            began.set()
            assert release.wait(WAIT)
        sock.sendall(http_answer({"message": "in use"}, 409))

    more = {"allow": ["create", "operate"], "containers": ["w*"], "images": ["a"], "cache": True}
    more["limits"] = {"containers": 1}
    entries = [{"name": key, "key": key, **more} for key in ("ci", "cd")]
    fake_engine.script["GET /images/docker.io/library/a%3Alatest/json"] = http_answer({"Id": "i"})
    fake_engine.script["GET /containers/json"] = http_answer([])
    fake_engine.script["POST /containers/create"] = create
    found = http_answer({"Id": identity, "Name": "/web", "Config": {}})
    for name in ("web", identity):
        fake_engine.script[f"GET /containers/{name}/json"] = found
    body = {"image": "a", "name": "web", "network_mode": "none"}
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, *entries)) as agent:
        slow = threading.Thread(
            target=agent.post, args=("/api/v1/containers", body), kwargs={"key": "ci"}
        )
        slow.start()
        assert began.wait(WAIT)
        assert_envelope(
            agent.post("/api/v1/containers", body, key="cd", timeout=WAIT), 409, "in use"
        )
        started = agent.post("/api/v1/containers/web/start", key="cd")
        assert_envelope(started, 409, "is being created")

        def look(sock: socket.socket) -> None:  # at what there was just before it was created
            if "%22.%22" in fake_engine.seen.queue[-1].target:  # for any name
                release.set()
                slow.join()
            sock.sendall(http_answer([]))

        fake_engine.script["its own look"] = look
        for status, word in ((403, "more than 1 containers"), (409, "in use")):
            second = agent.post("/api/v1/containers", {**body, "name": "w2"}, key="cd")
            assert_envelope(second, status, word)


def test_lists_leave_out_what_is_anothers(policed):
    agent, scope, begun = policed.agent, policed.scope, time.time()
    run_by_hand(policed.engine, f"un{scope}2")
    policed.engine.remove(f"un{scope}2")
    load_image(policed.engine, f"un{scope}:1", User="another")
    policed.engine.call("POST", f"/images/{IMAGE}/tag?repo=un{scope}&tag=2")
    name = f"{scope}-i"
    try:
        assert policed.create("containers", name, {}).status == 201
        for query in ("all=1", f"all=1&name={scope}", "all=1&label=" + LABEL):
            rows = agent.get(f"/api/v1/containers?{query}", key="ci").json()["containers"]
            assert rows and all(row["names"][0][1:].startswith(scope) for row in rows)
            assert "dockeragent." not in json.dumps(rows)
        for query in ("label=dockeragent.key", "label=dockeragent.key=ci", f"name=un{scope}"):
            rows = agent.get(f"/api/v1/containers?all=1&{query}", key="ci").json()["containers"]
            assert rows == []
        found = parse_metrics(agent.get("/metrics", key="ci").body)
        names = {labels["name"] for labels in with_name(found, CONTAINER_STATE)}
        assert name in names and all(each.startswith(scope) for each in names)
        query = f"since={int(begun)}&until={int(time.time()) + 1}"
        heard = parse_events(agent.get(f"/api/v1/events?{query}", key="ci").body)
        seen = [json.loads(event.data) for event in heard if "name" in json.loads(event.data)]
        assert name in {event["name"] for event in seen} and "dockeragent." not in str(seen)
        assert all(event["name"].startswith(scope) for event in seen)
        for kind in ("networks", "volumes"):
            rows = agent.get(f"/api/v1/{kind}", key="ci").json()[kind]
            assert {row["name"] for row in rows} == {
                "networks": {f"{scope}-front"},
                "volumes": {f"{scope}-plain", f"{scope}-root"},
            }[kind]
        images = agent.get("/api/v1/images", key="ci").json()["images"]
        assert sorted(row["tags"] for row in images) == [[IMAGE], [f"{scope}:forged"]]
    finally:
        for tag in "12":
            forget(policed.engine, f"un{scope}:{tag}")
        policed.engine.remove(name)


def test_limited_key_is_not_told_which_container_of_another_is_in_the_way(policed):
    scope, engine = policed.scope, policed.engine
    name, image = f"un{scope}3", f"{scope}:used"
    load_image(engine, image, WorkingDir="/used")
    host = {"NetworkMode": "none", "Binds": [f"{scope}-plain:/v"]}
    identity = run_by_hand(engine, name, Image=image, HostConfig=host)
    try:
        for path in (f"volumes/{scope}-plain", f"images?image={image}"):
            told = policed.agent.delete(f"/api/v1/{path}")
            assert_envelope(told, 409, identity[:12])  # the master key is
            refused = policed.agent.delete(f"/api/v1/{path}", key="ci")
            assert_envelope(refused, 409, "a container uses it")
    finally:
        engine.remove(name)
        forget(engine, image)


@pytest.mark.parametrize("method, path, body, status", cases(
    ("another's volume", "DELETE", "volumes/unSCOPE", None, 403),
    ("a network, though listed", "DELETE", "networks/SCOPE-front", None, 403),
    ("a network of its own", "POST", "networks", {"name": "SCOPE-new"}, 403),
    ("another's image", "DELETE", "images?image=redis", None, 403),
    ("its own image by its id", "DELETE", "images?image=IMAGEID", None, 403),
    ("its own image by the beginning of its id", "DELETE", "images?image=IMAGESHORT", None, 403),
    ("another's images", "POST", "images/prune", {"repository": "redis"}, 403),
    ("a pull of another's", "POST", "images/pull", {"image": "redis"}, 403),
    ("a pull of an id", "POST", "images/pull", {"image": "IMAGEDIGITS"}, 403),
))  # fmt: skip
def test_limited_key_changes_nothing_that_is_anothers(policed, method, path, body, status):
    before = policed.things()
    path = policed.fill(path).replace("IMAGESHORT", policed.words["IMAGEDIGITS"][:12])
    reply = policed.agent.request(method, f"/api/v1/{path}", policed.fill(body), key="ci")
    assert_envelope(reply, status, "key ci: ")
    assert policed.things() == before


@pytest.mark.parametrize(
    "key, path, fields, status",
    cases(
        ("a new file", "ci", "/conf/new", {}, 201),
        ("a path that is cleaned", "ci", "//conf/./sub//new", {}, 201),
        ("all modes up to 0777", "ci", "/conf/new", {"permission": "0777"}, 201),
        ("a file elsewhere", "ci", "/etc/cron.d/x", {}, 403),
        ("a folder that begins alike", "ci", "/conf2/x", {}, 403),
        ("the folder itself", "ci", "/conf", {}, 403),
        ("climbing out", "ci", "/conf/../conf2/x", {}, 403),
        ("no path", "ci", "", {}, 403),
        ("any file, without a list", "bare", "/conf/new", {}, 403),
        ("a program of root's", "ci", "/conf/new", {"permission": "4755"}, 403),
        ("a program of a group's", "ci", "/conf/new", {"permission": "02755"}, 403),
        ("a sticky file", "ci", "/conf/new", {"permission": "1777"}, 403),
        ("through a link that a container has planted", "ci", "/conf/out/x", {}, 403),
        ("over such a link", "ci", "/conf/file", {}, 403),
    ),
)
def test_files_of_a_limited_key(policed, key, path, fields, status):
    root = policed.folder / "host"
    shutil.rmtree(root / "conf")
    build(root, ["dir conf", "link conf/out ../conf2", "link conf/file ../conf2/file"])
    before = snapshot(policed.folder)
    reply = policed.agent.post("/api/v1/files", {"path": path, **fields}, key=key)
    assert reply.status == status, reply.body
    if status != 201:
        assert snapshot(policed.folder) == before
        quoted = quote(path)
        for method in ("GET", "DELETE"):
            reply = policed.agent.request(method, f"/api/v1/files?path={quoted}", key=key)
            assert reply.status == (404 if "permission" in fields else 403)
    assert os.listdir(root / "conf2") == []


def test_limited_key_for_which_no_folder_was_decided_gets_no_file(tmp_path):
    request = da.Request("", da.NEVER, ())
    agent = da.Agent(None, str(tmp_path), {}, None, set(), None)
    request.key = da.Key("ci", files=("/a",))
    with pytest.raises(da.ApiError, match="key ci: files: /a/x is not allowed"):
        da.file_tree(request, agent, "/a/x")
    request.key = da.Key("master", master=True)
    assert da.file_tree(request, agent, "/a/x").folder is None


@pytest.mark.parametrize(
    "path, is_covered",
    [("/a/b/x", True), ("//a/./b//x", True)]
    + [(path, False) for path in ("/a/b", "/a/b/", "/a/bb/x", "/a/b/../x", "/a", "b/x", "")],
)
def test_path_of_a_file_is_decided_upon_before_the_walk(path, is_covered):
    request = da.Request("", da.NEVER, ())
    request.key, request.body = da.Key("ci", files=("/a/b",)), {"path": path}
    refused = contextlib.nullcontext() if is_covered else pytest.raises(da.ApiError, match="files")
    with refused:
        da.decide(request, "files", ask=pytest.fail)


@pytest.mark.parametrize(
    "volume", [{"Driver": "rexray"}, {"Driver": "local", "Options": {"o": ""}}, {}]
)
def test_volume_with_options_or_of_a_plugin_is_refused(volume):
    request = da.Request("", da.NEVER, ())
    request.key = da.Key("ci", containers=("a",), images=("*",), volumes=("v",), cache=True)
    request.body = {"name": "a", "image": "a", "network_mode": "none"}
    request.body["volumes"] = [{"type": "volume", "source": "v", "target": "/v"}]
    with pytest.raises(da.ApiError, match="volumes: v, which has options"):
        da.decide(request, "create", ask=lambda path: volume)


@pytest.mark.parametrize(
    "maker, brought, is_shared",
    cases(
        ("of a limited key", "cd", {"Id": "i"}, True),
        ("of the master", "", {"Id": "i"}, False),
        ("of its image", "cd", {"Config": {"Labels": {"dockeragent.key": "cd"}}}, False),
        ("of an image that is gone", "cd", None, False),
    ),
)
def test_network_is_shared_by_the_label_of_the_agent_and_by_id(maker, brought, is_shared):
    """A name could be another's by the time that the Engine looks for it."""
    request, identity = da.Request("", da.NEVER, ()), "1" * 64
    request.key = da.Key("ci", containers=("a*",), images=("*",), cache=True)
    request.body = {"name": "a", "image": "a", "network_mode": "container:ab"}
    found = {"Id": identity, "Name": "/ab", "Image": "i"}
    found["Config"] = {"Labels": {"dockeragent.key": maker}}
    found["ImageManifestDescriptor"] = {"platform": {"architecture": "386"}}
    # Of an image with several platforms, what is asked without one is the host's own.
    answers = {"/containers/ab/json": found, "/images/i/json": {"Id": "i"}}
    answers[f"/images/i/json?platform={quote(json.dumps({'architecture': '386'}))}"] = brought
    refused = pytest.raises(da.ApiError, match="network_mode: container:ab")
    with contextlib.nullcontext() if is_shared else refused:
        da.decide(request, "create", ask=answers.__getitem__)
        assert request.body["network_mode"] == f"container:{identity}"


class PrivateImage(NamedTuple):
    agent: Agent
    image: str  # in the host's cache, from a registry that wants a password
    digest: str


@pytest.fixture(scope="module")
def private(
    engine: RealEngine, registries: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateImage]:
    image = f"{registries.locked}:1"
    repository = registries.locked.rpartition("/")[0]
    entry = {
        "allow": ["create", "deploy", "images"],
        "containers": ["*"],
        "images": [f"{repository}/*"],
    }
    strict = {"name": "strict", "key": "strict", **entry}
    cached = {"name": "cached", "key": "cached", "cache": True, **entry}
    path = keys_file(tmp_path_factory.mktemp("private"), strict, cached)
    with Agent(KEYS_FILE=path) as agent:
        reply = agent.post("/api/v1/images/pull", {"image": image}, headers=encode_auth())
        yield PrivateImage(agent, image, reply.json()["digest"])
    forget(engine, image)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "key, suffix, pull, password, status",
    cases(
        ("no password", "strict", ":1", None, "", 401),
        ("a wrong password", "strict", ":1", "always", "wrong", 401),
        ("from the cache", "strict", ":1", "never", "pass", 403),
        ("from the cache if it is there", "strict", ":1", "missing", "pass", 403),
        ("by its digest", "strict", "DIGEST", None, "pass", 403),
        ("with its password", "strict", ":1", None, "pass", 201),
        ("from the cache, allowed", "cached", ":1", "never", "", 201),
        ("by its digest, allowed", "cached", "DIGEST", "missing", "", 201),
    ),
)
def test_private_image_of_another_stays_private(
    private, engine, name, way, key, suffix, pull, password, status
):
    auth = encode_auth({"username": "user", "password": password}) if password else {}
    image = private.image.removesuffix(":1") + suffix.replace("DIGEST", f"@{private.digest}")
    body = {"image": image, "cmd": ["true"] if way == "run" else LOOP, "network_mode": "none"}
    if way == "deploy":
        body["deploy"] = {"stable": 0}
        reply = put(private.agent, name, {**body, "pull": pull}, key=key, headers=auth)
    else:
        body.update(name=name, pull=pull)
        reply = private.agent.post(f"/api/v1/{way}", body, key=key, headers=auth)
    assert reply.status == (200 if (status, way) == (201, "run") else status), reply.body
    is_there = engine.call("GET", f"/containers/{name}/json")[0] == 200
    assert is_there == (reply.status == 201)


def test_digest_is_no_way_to_remove_or_pull(private, engine):
    image = f"{private.image.removesuffix(':1')}@{private.digest}"
    for reply in (
        private.agent.delete(f"/api/v1/images?image={quote(image)}", key="strict"),
        private.agent.post("/api/v1/images/pull", {"image": image}, key="strict"),
    ):
        assert_envelope(reply, 403, "images: ")
    assert engine.call("GET", f"/images/{private.image}/json")[0] == 200


def test_limited_key_holds_up_no_deploys_but_its_own(fake_engine, tmp_path):
    release = threading.Event()
    fake_engine.script["POST /images/create"] = lambda sock: release.wait(WAIT)
    more = {"allow": ["deploy"], "containers": ["*"], "images": ["a"]}
    entries = [{"name": key, "key": key, **more} for key in ("ci", "cd")]
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, *entries)) as agent:
        with contextlib.ExitStack() as stack:

            def begin(name: str, key: str) -> bytes:
                sock = stack.enter_context(agent.connect())
                body = b'{"image": "a", "network_mode": "none"}'
                fields = ("Accept: text/event-stream", f"Content-Length: {len(body)}")
                line = f"PUT /api/v1/containers/{name}"
                sock.sendall(message(line, *fields, body=body, key=key))
                return sock.recv(100)

            for number in range(da.MAX_DEPLOYS):
                assert b" 200 " in begin(f"web{number}", "ci")
            assert b" 503 " in begin("one-more", "ci")
            for key in ("cd", KEY):
                assert b" 200 " in begin(f"of-{key}", key)
        release.set()


# Logging


def test_every_request_is_one_json_line(fake_agent):
    fake_agent.get("/health", headers={"X-Request-ID": "my-id.1_2"}, key="")
    until(lambda: len(fake_agent.lines("request")) == 1, "the first line")
    body = fake_agent.get("/api/v1/containers/none?x=1").body
    until(lambda: len(fake_agent.lines("request")) == 2, "the second line")
    fake_agent.raw(b"GET /a\r\n\r\n")
    until(lambda: len(fake_agent.lines("request")) == 3, "the third line")
    lines = fake_agent.lines("request")
    fields = set("time level msg method route status latency_ms request_id client_ip bytes".split())
    for line, more in zip(lines, (set(), {"key", "target", "error"}, {"error"})):
        assert set(line) == fields | more
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["client_ip"] == "127.0.0.1"
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("GET", "/health", 200),
        ("GET", "/api/v1/containers/{id}", 400),
        ("", "", 400),
    ]
    assert lines[0]["request_id"] == "my-id.1_2"
    assert lines[1]["key"] == "master" and lines[1]["error"].startswith("query.x: ")
    assert lines[1]["bytes"] == len(body)
    assert len({line["request_id"] for line in lines}) == 3


def test_log_and_health_tell_what_time_it_is(fake_agent):
    """Twice: what is kept of one second must not be told in the next."""
    for told in (0, 1):
        before = time.time()
        stamp = fake_agent.get("/health", key="").json()["timestamp"]
        line = until(lambda told=told: fake_agent.lines("request")[told:], "its line")[0]
        after = time.time()
        assert int(before) <= float(seconds(stamp[:-1])) <= after
        assert before - 0.001 <= float(seconds(line["time"][:-1])) <= after
        until(lambda after=after: time.time() > int(after) + 1, "the next second")


@pytest.mark.parametrize("data, status", cases(
    ("in a path", message("GET /%b"), 404),
    ("in a query of the public path", message("GET /health?%b=1", key=""), 400),
    ("in the value of one", message("GET /health?a=%b", key=""), 400),
    ("in a body of the public path",
     message("GET /health", "Content-Length: 40", key="", body=b"%b"), 400),
    ("in a path under the API", message("GET /api/v1/%b", key=""), 401),
    ("as an id", message("DELETE /api/v1/containers/%b?x=%b", key=""), 401),
    ("as a key", message("GET /api/v1/containers", "X-API-Key: %b", key=""), 401),
    ("as a bearer token", message("GET /api/v1/containers", "Authorization: Bearer %b", key=""),
     401),
    ("as two keys",
     message("GET /api/v1/containers", "X-API-Key: %b", "Authorization: Bearer %b", key=""), 401),
    ("on the metrics", message("GET /metrics?%b", key=""), 401),
    ("as a header's name",
     message("GET /health", "%b: 1", "X-Forwarded-For: %b", "User-Agent: %b", key=""), 200),
    ("in a wrong host", message("GET /health", "Host: %b", key=""), 400),
    ("in an absolute form", message("GET http://[%b/health", key=""), 400),
    ("in a bad version", b"GET / HTTP/%b\r\n\r\n", 400),
    ("in an expectation", message("GET /api/v1/containers", "Expect: %b", key=""), 401),
    ("in a coding", message("POST /health", "Transfer-Encoding: %b", key=""), 501),
))  # fmt: skip
def test_nothing_that_a_stranger_sent_is_repeated(data, status, pair):
    secret = secrets.token_hex(20)
    for shown in (secret, "%" + secret.encode().hex("%")):
        reply = pair.agent.raw(data.replace(b"%b", shown.encode()), half_close=True)
        assert shown != secret or reply.startswith(b"HTTP/1.1 %d " % status)
        request_id = split_head(reply).headers["x-request-id"]
        until(lambda wanted=request_id: wanted in json.dumps(pair.agent.log), "the log line")
        for text in (reply.decode(), json.dumps(pair.agent.log)):
            assert secret not in text and shown not in text
    assert pair.engine.requests() == []


def test_log_tells_who_did_what(fake_engine, tmp_path):
    fake_engine.script["GET /containers/web/json"] = http_answer({"Id": "c" * 64, "Name": "/web"})
    fake_engine.script[f"POST /containers/{'c' * 64}/start"] = NO_CONTENT
    fake_engine.script["POST /containers/web/start"] = NO_CONTENT
    with Agent(DOCKER_HOST=fake_engine.url, HOST_ROOT=str(tmp_path)) as agent:
        assert agent.post("/api/v1/containers/web/start").status == 200
        assert agent.post("/api/v1/files", {"path": "/f", "content": "secret"}).status == 201
        lines = until(lambda: agent.lines("request")[1:], "the log lines") and agent.lines(
            "request"
        )
    assert [(line["key"], line["target"]) for line in lines] == [
        ("master", {"id": "c" * 64, "name": "web"}),
        ("master", {"path": "/f"}),
    ]
    assert "secret" not in json.dumps(agent.log)


@pytest.mark.parametrize(
    "data",
    cases(
        ("quotes and a brace in the path", message('GET /"},{"msg":"forged"')),
        ("percent-coded newline in the path", message("GET /%0a%7b%22msg%22:%22forged%22%7d")),
        ("quotes in a refused request id", message("GET /", 'X-Request-ID: ","msg":"forged')),
        ("escape sequence in a bad request line", b'GET /\x1b[2J"\\ \r\n\r\n'),
        ("bytes over 127 in a bad request line", b'GET /\xff\xe2\x80\xa8"forged" HTTP/1.1\r\n\r\n'),
        ("newline in a bad request line", b'GET /x\n{"msg":"forged"} HTTP/1.1\r\n\r\n'),
        ("longer than a pipe takes at once", b"GET /" + b'"' * 60_000 + b"\r\n\r\n"),
    ),
)
def test_client_cannot_forge_a_log_line(data, pair):
    before = len(pair.agent.log)
    for reply in split_replies(pair.agent.raw(data, half_close=True)):
        assert reply.status in (400, 404, 414)
    until(lambda: len(pair.agent.log) > before, "the log line")
    assert [line["msg"] for line in pair.agent.log[before:]] == ["request"]
    assert len(json.dumps(pair.agent.log[before])) < 4096


@pytest.mark.parametrize(
    "data",
    cases(
        ("empty line in the middle of a head", message("GET /health", key="") + b"X-API-Key: %b"),
        ("body longer than its length", message("GET /health", key="") + b'{"env":["A=%b"]}'),
        ("key on the request line", b"GET / X-API-Key: %b"),
    ),
)
def test_secret_in_a_malformed_request_is_not_logged(data, pair):
    secret = secrets.token_hex(16)
    data = data.replace(b"%b", secret.encode()) + b"\r\n\r\n"
    before = len(pair.agent.lines("request"))
    assert split_replies(pair.agent.raw(data))[-1].status == 400
    sent = data.count(b"HTTP/1.1") + 1
    until(lambda: len(pair.agent.lines("request")) == before + sent, "the log lines")
    assert secret not in json.dumps(pair.agent.log)


@pytest.mark.parametrize(
    "kind", ["closed by its reader", "full", "full disk", "not open at all", "held terminal"]
)
def test_dead_stdout_never_takes_the_server_down(kind, fake_engine, tmp_path):
    path = str(tmp_path / "agent.sock")
    reader, writer = os.openpty() if kind == "held terminal" else os.pipe()
    stdout = os.open("/dev/full", os.O_WRONLY) if kind == "full disk" else writer
    start = [sys.executable, "-I", str(SOURCE)]
    code = f"import os; os.close(1); os.execv({sys.executable!r}, {start})"
    process = subprocess.Popen(
        [sys.executable, "-c", code] if kind == "not open at all" else start,
        env={
            "API_KEY": KEY,
            "LISTEN_ADDR": f"unix://{path}",
            "DOCKER_HOST": fake_engine.url,
            "RATE_LIMIT": "0",
        },
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT)
            until(lambda: sock.connect_ex(path) == 0, "a start")
            if kind == "closed by its reader":
                os.close(reader)
            # Of a key holder: a stranger would be dropped when his reading falls behind.
            line = "GET /api/v1/x"
            requests = message(line) * 999 + message(line, LAST)
            sender = threading.Thread(target=sock.sendall, args=(requests,))
            sender.start()
            assert [reply.status for reply in split_replies(read_to_end(sock))] == [404] * 1000
            sender.join()
        if kind == "full":  # what is in the pipe are whole lines; the next one tells of the rest
            os.set_blocking(reader, False)
            lines = os.read(reader, 1 << 20).splitlines(keepends=True)
            assert 10 < len(lines) < 1000
            assert all(json.loads(line) and line.endswith(b"\n") for line in lines)
            with contextlib.closing(UnixConnection(path)) as connection:
                connection.request("GET", "/x")
                assert connection.getresponse().status == 404
            until(lambda: select_readable(reader), "a line")
            assert json.loads(os.read(reader, 4096).splitlines()[0])["dropped"] > 0
        process.terminate()
        assert process.wait(WAIT) == 0
        assert process.stderr.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        if stdout != writer:
            os.close(stdout)
        if kind != "closed by its reader":
            os.close(reader)


def test_line_that_a_full_disk_cut_short_stays_a_line_of_its_own(fake_engine, tmp_path):
    with mounted("tmpfs", tmp_path / "small", "size=12k"):
        log, ballast = tmp_path / "small/log", tmp_path / "small/ballast"
        ballast.write_bytes(b"x" * 8192)
        path = f"{tmp_path}/agent.sock"
        with log.open("ab") as stdout:
            process = subprocess.Popen(
                [sys.executable, str(SOURCE)],
                env={
                    "API_KEY": KEY,
                    "LISTEN_ADDR": f"unix://{path}",
                    "DOCKER_HOST": fake_engine.url,
                },
                stdout=stdout,
            )
        try:
            with contextlib.closing(UnixConnection(path)) as connection:
                until(lambda: os.path.exists(path) and b"listening" in log.read_bytes(), "a start")

                def ask() -> None:
                    connection.request("GET", "/x")
                    assert connection.getresponse().read()

                while log.stat().st_size < 4096:
                    ask()
                ask()
                ballast.unlink()
                ask()
                ask()
        finally:
            process.terminate()
            process.wait()
        lines = log.read_text().splitlines()
        cut = [number for number, line in enumerate(lines) if not line.endswith("}")]
        assert len(cut) == 1 and json.loads(lines[cut[0] + 1])["dropped"] >= 1
        assert all(json.loads(line) for line in lines if line.endswith("}"))


def select_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


# Rate limiter


def test_no_minute_ever_admits_more_than_the_limit():
    now, admitted, chance = [1000.0], [], random.Random(7)
    limiter = da.RateLimiter(5, lambda: now[0])
    for _ in range(3000):
        now[0] += chance.choice([0.0, 0.01, 1.0, 7.0, 11.999, 12.0, 59.99])
        try:
            left = limiter.admit("192.0.2.1", True)
        except da.ApiError as error:
            # Refused for as long as it says, and not a second longer.
            assert error.status == 429
            wait = int(error.headers["Retry-After"])
            assert 1 <= wait <= 60
            assert admitted[-5] + 60 - now[0] <= wait < admitted[-5] + 61 - now[0]
        else:
            admitted.append(now[0])
            recent = [moment for moment in admitted if moment > now[0] - 60]
            assert int(left["X-RateLimit-Remaining"]) == 5 - len(recent)
    assert all(later - early >= 60 for early, later in zip(admitted, admitted[5:]))
    assert len(admitted) > 1000


def test_reset_is_never_longer_than_the_window():
    # 250.1 + 60 rounds up, in binary.
    headers = da.RateLimiter(2, lambda: 250.1).admit("192.0.2.1", "ci")
    assert headers["X-RateLimit-Reset"] == "60"


@pytest.mark.parametrize("first, second, shared", cases(
    ("two IPv4 clients", ("192.0.2.1", True), ("192.0.2.2", True), False),
    ("stranger behind a key holder's address", ("192.0.2.1", False), ("192.0.2.1", True), False),
    ("another address of one /64", ("2001:db8::1", True), ("2001:db8::ffff:2", True), True),
    ("another /64", ("2001:db8::1", True), ("2001:db8:0:1::1", True), False),
    ("two clients on a Unix socket", ("unix", True), ("unix", True), True),
))  # fmt: skip
def test_who_shares_a_window(first, second, shared):
    limiter = da.RateLimiter(1, lambda: 1000.0)
    limiter.admit(*first)
    with pytest.raises(da.ApiError) if shared else contextlib.nullcontext():
        limiter.admit(*second)


def test_table_of_clients_is_bounded_but_holds_10000():
    now = [1000.0]
    limiter = da.RateLimiter(1, lambda: now[0])
    clients = [f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}" for i in range(10_001)]
    for client in clients[:10_000]:
        limiter.admit(client, False)
    with pytest.raises(da.ApiError):
        limiter.admit(clients[1], False)  # still known
    limiter.admit(clients[10_000], False)
    limiter.admit(clients[0], False)  # the least recently seen had to make room


@pytest.mark.parametrize(
    "peer, forwarded, client",
    cases(
        ("no proxy", "192.0.2.1", "", "192.0.2.1"),
        ("spoofed by a stranger", "192.0.2.1", "198.51.100.1", "192.0.2.1"),
        ("one proxy", "10.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("spoofed through the proxy", "10.0.0.1", "127.0.0.1, 192.0.2.1", "192.0.2.1"),
        ("two proxies", "10.0.0.1", "203.0.113.9, 192.0.2.1, 10.9.9.9", "192.0.2.1"),
        ("all trusted", "10.0.0.1", "10.0.0.3,10.0.0.2", "10.0.0.3"),
        ("nonsense", "10.0.0.1", "192.0.2.1, unknown", "10.0.0.1"),
        ("nonsense further left", "10.0.0.1", "<script>, 10.0.0.2", "10.0.0.2"),
        ("empty", "10.0.0.1", " , ", "10.0.0.1"),
        ("mapped peer that is a proxy", "::ffff:10.0.0.1", "::ffff:192.0.2.1", "192.0.2.1"),
        ("IPv6 proxy and client", "2001:db8::1", "2001:DB8:1::0001", "2001:db8:1::1"),
        ("link-local with a zone", "fe80::1%eth0", "", "fe80::1"),
        ("with a port", "10.0.0.1", "203.0.113.9, 192.0.2.1:4711", "192.0.2.1"),
        ("IPv6 with a port", "10.0.0.1", "[2001:db8:1::1]:443", "2001:db8:1::1"),
        ("IPv4 with a zone", "10.0.0.1", "192.0.2.1%eth0", "10.0.0.1"),
        ("Unix socket", "", "192.0.2.1", "unix"),
    ),
)
def test_client_behind_proxies(peer, forwarded, client):
    trusted = da.load_config({"API_KEY": KEY, "TRUSTED_PROXIES": "10.0.0.0/8, 2001:db8::/64"})
    assert da.client_address(peer, forwarded, trusted.trusted_proxies) == client


def test_limit_over_http_with_its_headers(fake_engine):
    fake_engine.script["GET /containers/json"] = http_answer([])
    with Agent(DOCKER_HOST=fake_engine.url, RATE_LIMIT="2", LISTEN_ADDR=":0") as agent:
        path, spoofed = "/api/v1/containers", {"X-Forwarded-For": "192.0.2.77"}
        for left in ("1", "0"):
            reply = agent.get(path)
            assert reply.status == 200
            assert reply.headers["x-ratelimit-limit"] == "2"
            assert reply.headers["x-ratelimit-remaining"] == left
            assert 1 <= int(reply.headers["x-ratelimit-reset"]) <= 60
        for headers in ({}, spoofed):
            reply = agent.get(path, headers=headers)
            assert_envelope(reply, 429)
            assert reply.headers["x-ratelimit-remaining"] == "0"
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        # Without the key, another window; 401s and what has no route count too.
        reply = agent.get(path, key="")
        assert reply.status == 401 and reply.headers["x-ratelimit-remaining"] == "1"
        assert agent.get("/api/v1/nonsense", key="wrong").status == 401
        assert agent.get(path, key="").status == 429
        for _ in range(5):
            assert agent.get("/health", key="").status == 200
        # The same machine over IPv6 is another client, over a mapped address it is not.
        assert {line["client_ip"] for line in agent.lines("request")} == {"127.0.0.1"}
    assert len(fake_engine.requests()) == 2


def test_trusted_proxy_is_believed_over_http(fake_engine):
    env = {"TRUSTED_PROXIES": "127.0.0.0/8", "RATE_LIMIT": "1"}
    with Agent(DOCKER_HOST=fake_engine.url, **env) as agent:
        for client, status in (("192.0.2.1", 404), ("192.0.2.1", 429), ("192.0.2.2", 404)):
            forwarded = {"X-Forwarded-For": f"203.0.113.1, {client}"}
            assert agent.get("/api/v1/x", headers=forwarded).status == status
        # Two header lines are one list.
        two = message(
            "GET /api/v1/x", "X-Forwarded-For: 1.1.1.1", "X-Forwarded-For: 192.0.2.1", LAST
        )
        assert split_replies(agent.raw(two))[0].status == 429
    clients = sorted(line["client_ip"] for line in agent.lines("request"))
    assert clients == ["192.0.2.1"] * 3 + ["192.0.2.2"]


# Strict JSON and query strings

CREATE, STOP, KILL = (
    "/api/v1/containers",
    "/api/v1/containers/web/stop",
    "/api/v1/containers/web/kill",
)
PULL, FILES = "/api/v1/images/pull", "/api/v1/files"


def image(**fields: Any) -> dict[str, Any]:
    return {"image": "a", **fields}


def port(number: Any, **fields: Any) -> dict[str, Any]:
    return image(ports=[{"container_port": number, **fields}])


def volume(**fields: Any) -> dict[str, Any]:
    return image(volumes=[fields])


@pytest.mark.parametrize("path, body, word", cases(
    ("no body", CREATE, b"", "JSON"),
    ("not JSON", CREATE, b"image=nginx", "JSON"),
    ("two values", KILL, b"{}{}", "JSON"),
    ("comma at the end", KILL, b'{"signal":"HUP",}', "JSON"),
    ("byte order mark", KILL, b"\xef\xbb\xbf{}", "JSON"),
    ("list", KILL, b"[]", "body: must be a JSON object"),
    ("string", CREATE, b'"nginx"', "body: must be a JSON object"),
    ("UTF-16", KILL, '{"signal":"HUP"}'.encode("utf-16"), "UTF-8"),
    ("invalid UTF-8", FILES, b'{"path":"/a","content":"\xff"}', "UTF-8"),
    ("overlong UTF-8", FILES, b'{"path":"/a","content":"\xc0\xaf"}', "UTF-8"),
    ("surrogate as UTF-8", FILES, b'{"path":"/a","content":"\xed\xa0\x80"}', "UTF-8"),
    ("lone surrogate", FILES, b'{"path":"/a","content":"\\ud800"}', "content"),
    ("lone surrogate in a label's name", CREATE, b'{"image":"a","labels":{"\\udfff":""}}',
     "labels"),
    ("unknown field with a surrogate", KILL, b'{"\\ud800":1}', "is unknown"),
    ("NUL in a path", FILES, {"path": "/a\0", "content": ""}, "path: "),
    ("control character in a string", FILES, b'{"path":"/a\n","content":""}', "JSON"),
    ("NaN", CREATE, b'{"image":"a","resources":{"cpus":NaN}}', "NaN"),
    ("infinity", CREATE, b'{"image":"a","resources":{"cpus":-Infinity}}', "Infinity"),
    ("more than a double holds", CREATE, b'{"image":"a","resources":{"cpus":1e999}}',
     "resources.cpus: "),
    ("number of a million digits", STOP, b'{"timeout":' + b"1" * 1_000_000 + b"}", "digits"),
    ("repeated key", KILL, b'{"signal":"HUP","signal":"KILL"}', '"signal"'),
    ("repeated key, written in two ways", KILL, b'{"signal":"HUP","sign\\u0061l":"KILL"}',
     '"signal"'),
    ("repeated key further down", CREATE, b'{"image":"a","labels":{"a":"","a":""}}', '"a"'),
    ("arrays nested too deep", KILL, b"[" * 100_000 + b"]" * 100_000, "deep"),
    ("objects nested too deep", KILL, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "deep"),
    ("deep behind an escaped quote", KILL, b'["\\"",' + b"[" * 50_000, "deep"),
    ("millions of arrays", KILL, b"[" + b"[]," * 3_000_000 + b"[]]", "values"),
    ("millions of strings", KILL, b'["",' + b'"",' * 2_000_000 + b'""]', "values"),
    ("millions of numbers", KILL, b"[1" + b",1" * 4_000_000 + b"]", "values"),
    ("NaN, with its path", CREATE, b'{"image":"a","resources":{"cpus":NaN}}',
     "resources.cpus: NaN"),
    ("key twice in a list", CREATE, b'{"image":"a","ports":[{"a":1,"a":2}]}', "ports[0]: has"),
    ("digits without an end", CREATE, b'{"image":"a","resources":{"memory_mb":%s}}' % (b"9" * 30),
     "resources.memory_mb: has"),
    ("wait for ever", STOP, {"timeout": -1}, "timeout: "),
    ("wait for days", STOP, {"timeout": 86_401}, "timeout: "),
    ("timeout as a string", STOP, {"timeout": "10"}, "timeout: "),
    ("timeout true", STOP, {"timeout": True}, "timeout: "),
    ("timeout as a float", STOP, {"timeout": 1.0}, "timeout: "),
    ("signal by number", KILL, {"signal": "9"}, "signal: "),
    ("number as a signal", KILL, {"signal": 9}, "signal: "),
    ("unknown signal", KILL, {"signal": "SIGFOO"}, "signal: "),
    ("long s, which is S in capitals", KILL, {"signal": "\u017fIGKILL"}, "signal: "),
    ("kelvin sign, which is k in small letters", KILL, {"signal": "\u212aILL"}, "signal: "),
    ("dotless i, which is I in capitals", KILL, {"signal": "K\u0131LL"}, "signal: "),
    ("field of another endpoint", KILL, {"timeout": 1}, "timeout: is unknown"),
    ("pull without an image", PULL, {"platform": "linux/amd64"}, "image: is required"),
    ("platform", PULL, image(platform="linux/amd64&a=b"), "platform: "),
    ("path that climbs", FILES, {"path": "/a/../b", "content": ""}, "path: "),
    ("relative path", FILES, {"path": "a", "content": ""}, "path: "),
    ("mode past 7777", FILES, {"path": "/a", "content": "", "permission": "17777"}, "permission: "),
    ("no base64", FILES, {"path": "/a", "content": "_-", "encoding": "base64"}, "content: "),
    ("encoding", FILES, {"path": "/a", "content": "", "encoding": "latin-1"}, "encoding: "),
    ("owner below 0", FILES, {"path": "/a", "content": "", "uid": -1}, "uid: "),
    ("owner that means no change", FILES, {"path": "/a", "content": "", "gid": 2**32 - 1}, "gid: "),
    ("atomic as a number", FILES, {"path": "/a", "content": "", "atomic": 1}, "atomic: "),
))  # fmt: skip
def test_bad_body_is_400_with_the_path_and_reaches_nothing(path, body, word, pair):
    assert_envelope(pair.agent.post(path, body), 400, word)
    assert pair.engine.requests() == []
    assert os.listdir(pair.agent.env["HOST_ROOT"]) == []


def resources(**fields: Any) -> dict[str, Any]:
    return image(resources=fields)


def health(**fields: Any) -> dict[str, Any]:
    return image(healthcheck=fields)


ANON = {"target": "/t"}
LONG = "a" * 253  # the longest name of DNS
PORT_PATH = "ports[0].container_port: "


@pytest.mark.parametrize("body, word", cases(
    ("NUL", image(env=["A=\0"]), "env[0]: "),
    ("NUL in a label's name", image(labels={"\0": ""}), "labels"),
    ("misspelt read_only", volume(read_onyl=True, **ANON), "volumes[0].read_onyl: is unknown"),
    ("null for what is required", {"image": None}, "image: is required"),
    ("null in a list", image(cmd=[None]), "cmd[0]: "),
    ("empty image", {"image": ""}, "image: "),
    ("image with a query in it", {"image": "a?tag=b"}, "image: "),
    ("image in capitals", {"image": "Nginx:1"}, "image: "),
    ("name with a slash", image(name="a/b"), "name: "),
    ("name with a newline at its end", image(name="ab\n"), "name: "),
    ("number in cmd", image(cmd=["sleep", 1]), "cmd[1]: must be a string"),
    ("environment without =", image(env=["A"]), "env[0]: "),
    ("label that is no string", image(labels={"k": 1}), "labels.k: "),
    ("relative folder", image(working_dir="srv"), "working_dir: "),
    ("port 0", port(0), PORT_PATH),
    ("port 65536", port("65536"), PORT_PATH),
    ("port in Arabic digits", port("٨٠"), PORT_PATH),
    ("port as a float", port(80.0), PORT_PATH),
    ("port true", port(True), PORT_PATH),
    ("port with a sign", port("+80"), PORT_PATH),
    ("port of 5,000 digits", port("0" * 5000 + "1"), PORT_PATH),
    ("range of ports", port("80-90"), PORT_PATH),
    ("protocol", port(1, protocol="TCP"), "ports[0].protocol: "),
    ("host address",
     image(ports=[{"container_port": 1}, {"container_port": 2, "host_ip": "1.2.3"}]),
     "ports[1].host_ip: "),
    ("option in a bind's source", volume(source="a:/etc", **ANON), "volumes[0].source: "),
    ("relative bind", volume(source="a", type="bind", **ANON), "volumes[0].source: "),
    ("tmpfs with a source", volume(source="/a", type="tmpfs", **ANON), "volumes[0].source: "),
    ("relative target", volume(source="/a", target="a"), "volumes[0].target: "),
    ("read_only as a string", volume(source="/a", read_only="false", **ANON),
     "volumes[0].read_only: "),
    ("retries without on-failure", image(restart_policy={"name": "always", "max_retry_count": 1}),
     "restart_policy.max_retry_count: "),
    ("restart policy", image(restart_policy={"name": "never"}), "restart_policy.name: "),
    ("cpus as a string", resources(cpus="1"), "resources.cpus: "),
    ("too little memory", resources(memory_mb=5), "resources.memory_mb: "),
    ("half a megabyte", resources(memory_mb=6.5), "resources.memory_mb: "),
    ("too few shares", resources(cpu_shares=1), "resources.cpu_shares: "),
    ("pull", image(pull="sometimes"), "pull: "),
    ("network twice", image(networks=["a", "a"]), "networks: "),
    ("port range as in docker run", image(ports=["80:80"]), "ports[0]: must be a JSON object"),
    ("host port 65536", port(80, host_port=65536), "ports[0].host_port: "),
    ("host port below 0", port(80, host_port=-1), "ports[0].host_port: "),
    ("host address with a zone", port(80, host_ip="fe80::1%eth0"), "ports[0].host_ip: "),
    ("empty host address", port(80, host_ip=""), "ports[0].host_ip: "),
    ("parent in a bind", volume(source="/a/../b", target="/t"), "volumes[0].source: "),
    ("dot in a bind", volume(source="/a/./b", target="/t"), "volumes[0].source: "),
    ("parent at a bind's end", volume(source="/a/..", target="/t"), "volumes[0].source: "),
    ("two slashes in a bind", volume(source="/a//b", target="/t"), "volumes[0].source: "),
    ("two slashes at a bind's end", volume(source="/a//", target="/t"), "volumes[0].source: "),
    ("bind of two slashes", volume(source="//", target="/t"), "volumes[0].source: "),
    ("bind without a source", volume(type="bind", **ANON), "volumes[0].source: "),
    ("path of a volume", volume(type="volume", source="/a", **ANON), "volumes[0].source: "),
    ("size of a bind", volume(source="/a", size_mb=1, **ANON), "volumes[0].size_mb: "),
    ("mode of a volume", volume(source="ab", mode="700", **ANON), "volumes[0].mode: "),
    ("mode 0, which is none", volume(type="tmpfs", mode="0", **ANON), "volumes[0].mode: "),
    ("what the policy sets", volume(source="/a", non_recursive=False, **ANON), "left out"),
    ("network twice in two forms", image(networks=["a", {"name": "a"}]), "networks: "),
    ("network beside host", image(networks=["a"], network_mode="host"), "networks: "),
    ("host among networks", image(networks=["a", "host"]), "networks: "),
    ("aliases on none", image(networks=[{"name": "none", "aliases": ["a"]}]), "networks: "),
    ("alias with a space", image(networks=[{"name": "a", "aliases": ["a b"]}]), "aliases[0]: "),
    ("no container", image(network_mode="container:"), "network_mode: "),
    ("agent's own label", image(labels={"dockeragent.key": "x"}), "labels.dockeragent.key: "),
    ("name of a deploy's helper", image(name="web.next"), "name: "),
    ("name of what a deploy replaces", image(name="web.prev"), "name: "),
    ("name of what a deploy replaced", image(name="web.old"), "name: "),
    ("hostname with a space", image(hostname="a b"), "hostname: "),
    ("longer hostname than the kernel takes", image(hostname="a" * 65), "hostname: "),
    ("longer name than DNS allows", image(extra_hosts={"a" * 254: "::1"}), "253 characters"),
    ("cpus below the Engine's floor", resources(cpus=0.009), "resources.cpus: "),
    ("cpus below 0", resources(cpus=-1), "resources.cpus: "),
    ("memory in bytes", resources(memory_mb=64 * MIB), "resources.memory_mb: "),
    ("swap in bytes", resources(memory_mb=64, memory_swap_mb=64 * MIB), "memory_swap_mb: "),
    ("shared memory in bytes", resources(shm_size_mb=64 * MIB), "resources.shm_size_mb: "),
    ("tmpfs in bytes", volume(type="tmpfs", size_mb=64 * MIB, **ANON), "volumes[0].size_mb: "),
    ("swap without memory", resources(memory_swap_mb=64), "resources.memory_swap_mb: "),
    ("less than memory", resources(memory_mb=64, memory_swap_mb=63), "memory_swap_mb: "),
    ("processes below 0", resources(pids=-1), "resources.pids: "),
    ("soft above hard", resources(ulimits={"core": [2, 1]}), "resources.ulimits.core: "),
    ("no limit above a hard one", resources(ulimits={"core": [-1, 1]}), "ulimits.core: "),
    ("three limits", resources(ulimits={"core": [1, 2, 3]}), "resources.ulimits.core: "),
    ("limit in an array of its own", resources(ulimits={"core": [[1]]}), "ulimits.core"),
    ("name of a limit", resources(ulimits={"files": 1}), "resources.ulimits.files: must be one"),
    ("two checks", health(cmd=["a"], shell="a"), "healthcheck: "),
    ("check and none", health(cmd=["a"], disable=True), "healthcheck: "),
    ("times of none", health(disable=True, interval=1), "at most one of cmd"),
    ("empty check", health(cmd=[]), "healthcheck.cmd: "),
    ("empty shell check", health(shell=""), "healthcheck.shell: "),
    ("check more often than the Engine can", health(interval=0.0001), "healthcheck.interval: "),
    ("time as text", health(timeout="3s"), "healthcheck.timeout: "),
    ("log of no size", image(log={"max_size_mb": 0}), "log.max_size_mb: "),
    ("no log files", image(log={"max_files": 0}), "log.max_files: "),
    ("removed and restarted", image(auto_remove=True, restart_policy={"name": "always"}), "auto"),
    ("stop signal by number", image(stop_signal="15"), "stop_signal: "),
    ("wait of days", image(stop_timeout=86_401), "stop_timeout: "),
    ("no address", image(extra_hosts={"a": "b"}), "extra_hosts.a: "),
    ("colon in a host's name", image(extra_hosts={"a:b": "1.2.3.4"}), "extra_hosts.a:b: "),
    ("name server by name", image(dns=["localhost"]), "dns[0]: "),
    ("no graphics cards", image(gpus=0), "gpus: "),
    ("relative device", image(devices=["dev/sda"]), "devices[0]: "),
    ("device's access", image(devices=["/dev/sda:/dev/sda:x"]), "devices[0]: "),
    ("sysctl with a value in its name", image(sysctls={"a=b": "1"}), "sysctls.a=b: "),
    ("processes of a network", image(pid_mode="web"), "pid_mode: "),
))  # fmt: skip
def test_create_is_refused_before_it_reaches_anything(body, word, pair):
    assert_envelope(pair.agent.post(CREATE, body), 400, word)
    assert pair.engine.requests() == []


@pytest.mark.parametrize("path, body, message", cases(
    ("empty body", CREATE, b" ", "body: is empty; it must be a JSON object, such as "),
    ("single quotes", CREATE, b"{'image': 'a'}", 'must be a JSON object, such as {"image": "nginx'),
    ("compose's ./a", CREATE, volume(source="./a", **ANON), "a bind's source begins with a /"),
    ("CMD of compose's test", CREATE, health(cmd=["CMD", "a"]), "must begin with the program"),
    ("compose's CMD-SHELL", CREATE, health(cmd=["CMD-SHELL", "a"]), "CMD-SHELL is shell here"),
    ("compose's NONE", CREATE, health(cmd=["NONE"]), "NONE disable"),
    ("array", CREATE, image(cmd="sleep 1"), 'cmd: must be an array of strings, such as ["s'),
    ("map of env", CREATE, image(env={"A": "1"}), 'env: must be an array of strings, such as ["'),
    ("policy", CREATE, image(restart_policy="no"), "restart_policy: must be a JSON object, such"),
    ("number for a user", CREATE, image(user=1000), 'user: must be a string, such as "1000:'),
    ("port", CREATE, image(ports=[80]), 'ports[0]: must be a JSON object, such as {"container'),
    ("mode as a number", FILES, {"path": "/a", "content": "", "permission": 644}, '"0644"'),
    ("mode without quotes", FILES, b'{"permission":0644}', 'write "0644" in quotes'),
    ("compose's environment", CREATE, image(environment={}),
     "environment: is unknown; did you mean env?"),
    ("compose's restart", CREATE, image(restart="no"), "did you mean restart_policy?"),
    ("compose's command", CREATE, image(command="a"), "did you mean cmd?"),
    ("compose's mem_limit", CREATE, image(mem_limit="5m"), "did you mean resources.memory_mb?"),
    ("the Engine's Image", CREATE, {"Image": "a"}, "did you mean image?"),
    ("the Engine's HostConfig", CREATE, image(HostConfig={}), "did you mean volumes, ports"),
    ("docker run's --net", CREATE, image(net="host"), "did you mean networks?"),
    ("a letter less", CREATE, image(port=[]), "port: is unknown; did you mean ports?"),
    ("compose's ro", CREATE, volume(target="/a", ro=True), "did you mean read_only?"),
    ("mounts", CREATE, image(mounts=[]), "mounts: is unknown; did you mean volumes?"),
    ("the Engine's Binds", CREATE, image(Binds=[]), "Binds: is unknown; did you mean volumes?"),
    ("docker run's --tmpfs", CREATE, image(tmpfs=["/a"]), "did you mean volumes?"),
    ("docker run's --pids-limit", CREATE, image(**{"pids-limit": 5}), "mean resources.pids?"),
    ("the same inside", CREATE, image(resources={"mem_limit": 5}), "did you mean memory_mb?"),
    ("compose's test", CREATE, image(healthcheck={"test": ["CMD", "a"]}), "did you mean cmd?"),
    ("our list's port", CREATE, image(ports=[{"public_port": 80}]), "did you mean host_port?"),
    ("the Engine's DeviceRequests", CREATE, image(DeviceRequests=[]), "did you mean gpus?"),
    ("the Engine's log Type", CREATE, image(log={"Type": "local"}), "did you mean driver?"),
    ("the Engine's tag", PULL, image(tag="1"), "did you mean image?"),
    ("mode of a file", FILES, {"path": "/a", "mode": "0644"}, "did you mean permission?"),
    ("letters that changed places", CREATE, image(lables={}), "did you mean labels?"),
    ("the same in a short name", CREATE, image(prots=[]), "did you mean ports?"),
    ("a misspelt name of compose's", CREATE, image(enviroment={}), "did you mean env?"),
    ("compose's target", CREATE, image(ports=[{"target": 80}]), "did you mean container_port?"),
    ("compose's limits", CREATE, image(resources={"limits": {}}), "did you mean cpus, memory_"),
    ("docker run's --health-cmd", CREATE, image(**{"health-cmd": "a"}), "healthcheck.shell?"),
    ("docker run's --no-healthcheck", CREATE, image(no_healthcheck=1), "healthcheck.disable?"),
    ("docker run's --log-driver", CREATE, image(**{"log-driver": "a"}), "mean log.driver?"),
    ("docker run's --workdir", CREATE, image(workdir="/a"), "did you mean working_dir?"),
    ("test as a string", CREATE, health(cmd="a"), 'shell goes into shell), such as ["curl'),
    ("mode of a mount that is read-only", CREATE, volume(mode="ro", **ANON), "(ro: read_only)"),
    ("end of a host's name", CREATE, image(hostname="web-"), "'.' or '-' in between"),
    ("alias", CREATE, image(networks=[{"name": "a", "aliases": "b"}]), 'such as ["db"]'),
    ("number in a command", CREATE, image(cmd=["sleep", 60]), 'a string, such as "60"'),
    ("true as a label", CREATE, image(labels={"a": True}), 'a string, such as "true"'),
    ("sysctl as a number", CREATE, image(sysctls={"a": 1}), 'a string, such as "1024"'),
    ("compose's interval", CREATE, health(interval="30s"), "1,000,000, in seconds"),
    ("compose's stop_grace_period", CREATE, image(stop_timeout="1m"), "86,400, in seconds"),
    ("a capability", CREATE, image(cap_add="SYS_TIME"), 'as ["NET_ADMIN"]'),
    ("field that is left out", "/api/v1/run", image(rm=1),
     "auto_remove? It must be left out: the con"),
    ("nested field at the top", CREATE, image(memory_mb=5), "did you mean resources.memory_mb?"),
    ("a name like no other", CREATE, image(qqq=1), "qqq: is unknown; known here: image, name, "),
    ("where nothing is known", f"{CREATE}/web/start", {"a": 1},
     "a: is unknown; nothing can be set"),
    ("signal in the query", f"{KILL}?signal=HUP", b"", "query.signal: goes into the body"),
    ("image in the query", f"{PULL}?image=a", b"", "query.image: goes into the body"),
    ("the Engine's ?t= of a stop", f"{CREATE}/web/stop?t=5", b"", "body takes timeout, signal"),
))  # fmt: skip
def test_message_says_what_to_write(path, body, message, pair):
    assert_envelope(pair.agent.post(path, body), 400, message)
    assert pair.engine.requests() == []


# None of them has a counterpart here: what a hint would name does something else.
NOT_HERE = "oom_kill_disable group_add cpuset cpu_period label_file uts interactive adopt scale"
NOT_HERE += " driver_opts volume-driver memory-swappiness dns_opt userns blkio_config configs ip"
NOT_HERE += " services volumes-from"


@pytest.mark.parametrize("name", NOT_HERE.split())
def test_no_hint_to_a_field_that_does_something_else(pair, name):
    for body, first in ((image(**{name: 1}), "image"), (health(**{name: 1}), "cmd")):
        reply = pair.agent.post(CREATE, body)
        assert_envelope(reply, 400, f"{name}: is unknown; known here: {first}, ")


@pytest.mark.parametrize(
    "path, body, word",
    [
        pytest.param(CREATE, image(resources={"gpus": 1}), "resources.gpus", id="gpus"),
        pytest.param(CREATE, image(resources={"cpuset": "0"}), "resources.cpuset", id="cpuset"),
        pytest.param(CREATE, health(start_interval=1), "healthcheck.start_interval", id="interval"),
        pytest.param("/api/v1/networks", {"external": True}, "external", id="external"),
    ],
)
def test_no_hint_to_a_neighbour_that_does_something_else(pair, path, body, word):
    assert_envelope(pair.agent.post(path, body), 400, f"{word}: is unknown; known here: ")


def test_no_list_of_names_has_one_that_must_be_left_out(pair):
    reply = pair.agent.post(CREATE, volume(bind={}))
    known = "source, target, read_only, type, size_mb, mode"
    assert reply.json()["message"] == f"volumes[0].bind: is unknown; known here: {known}"


@pytest.mark.parametrize("fields, checked", cases(
    ("labels", {"labels": {"": "", "a.b/c": "\n"}}, {"labels": {"": "", "a.b/c": "\n"}}),
    ("ports as strings", {"ports": [{"container_port": "65535", "host_port": "001"}]},
     {"ports": [{"container_port": 65535, "host_port": 1, "protocol": "tcp", "host_ip": ""}]}),
    ("port that the Engine picks",
     {"ports": [{"container_port": 1, "host_port": p} for p in ("", "0", 0, None)]},
     {"ports": [{"container_port": 1, "host_port": 0, "protocol": "tcp", "host_ip": ""}] * 4}),
    (
        "types of volumes",
        {"volumes": [{"source": "/a/", **ANON}, {"source": "ab", **ANON}, ANON]},
        {
            "volumes": [
                {"source": "/a", "type": "bind", **ANON},
                {"source": "ab", "type": "volume", **ANON},
                {"type": "volume", **ANON},
            ]
        },
    ),
    (
        "bind of everything, and of names with dots",
        {"volumes": [{"source": "/", **ANON}, {"source": "/..a/b./...", **ANON}]},
        {
            "volumes": [
                {"source": "/", "type": "bind", **ANON},
                {"source": "/..a/b./...", "type": "bind", **ANON},
            ]
        },
    ),
    ("networks", {"networks": ["a", {"name": "b", "aliases": ["c_d"]}]},
     {"networks": [{"name": "a", "aliases": []}, {"name": "b", "aliases": ["c_d"]}]}),
    ("names as long as DNS allows, and the kernel",
     {"extra_hosts": {LONG: "::1"}, "networks": [{"name": "a", "aliases": [LONG]}],
      "hostname": LONG[:64]},
     {"extra_hosts": {LONG: "::1"}, "networks": [{"name": "a", "aliases": [LONG]}],
      "hostname": LONG[:64]}),
    ("mode is the first of the networks", {"networks": ["a", "b"], "network_mode": "b"},
     {"networks": [{"name": "b", "aliases": []}, {"name": "a", "aliases": []}]}),
    ("mode is one more network", {"networks": ["a"], "network_mode": "b"},
     {"networks": [{"name": "b", "aliases": []}, {"name": "a", "aliases": []}]}),
    ("default bridge gives way to networks", {"networks": ["a"], "network_mode": "bridge"},
     {"networks": [{"name": "a", "aliases": []}]}),
    ("default bridge by its name", {"networks": [], "network_mode": "bridge"},
     {"networks": [{"name": "bridge", "aliases": []}]}),
    ("default", {"networks": [], "network_mode": "default"}, {}),
    ("host as a network", {"networks": ["host"]}, {"network_mode": "host"}),
    ("none", {"network_mode": "none"}, {"network_mode": "none"}),
    ("another's", {"network_mode": "container:ab"}, {"network_mode": "container:ab"}),
    ("no limit", {"resources": {"cpus": 0, "memory_mb": 0, "cpu_shares": 0, "pids": 0}},
     {"resources": {"cpus": 0, "memory_mb": 0, "cpu_shares": 0, "pids": 0}}),
    ("most", {"resources": {"cpus": 10**6, "memory_mb": 2**25, "cpu_shares": 262_144}},
     {"resources": {"cpus": 10**6, "memory_mb": 2**25, "cpu_shares": 262_144}}),
    ("limits in three forms",
     {"resources": {"ulimits": {"nofile": 5, "core": [0, -1], "stack": 2**63 - 1}}},
     {"resources": {"ulimits": {"nofile": [5, 5], "core": [0, -1], "stack": [2**63 - 1] * 2}}}),
    ("check that is not off", {"healthcheck": {"disable": False}}, {"healthcheck": {}}),
    ("retries with any policy", {"restart_policy": {"name": "always", "max_retry_count": 0}},
     {"restart_policy": {"name": "always", "max_retry_count": 0}}),
))  # fmt: skip
def test_checked_body_has_one_form(fields, checked):
    assert da.validate(da.CREATE, {"image": "a", **fields}) == {"image": "a", **checked}


def test_schema_with_a_keyword_that_nothing_enforces_is_no_schema():
    with pytest.raises(ValueError, match="maxLenght"):
        da.object_schema("", a={"type": "string", "maxLenght": 5})


def test_every_field_for_the_master_key_is_no_field_of_a_limited_one():
    words = "privileged cap_add devices gpus security_opt sysctls pid_mode ipc_mode".split()
    assert set(words) <= set(da.CREATE["properties"]) and not da.LIMITED_FIELDS & set(words)


def test_depth_is_bounded():
    assert da.decode_json(b"[" * da.MAX_DEPTH + b"]" * da.MAX_DEPTH)
    for text in (r"\[[[", r'"\"[[[', r'\\"[[[', r"\n\"[[[", ",[]" * 99):  # brackets in a string
        assert da.decode_json(json.dumps(text * 99).encode()) == text * 99
    with pytest.raises(da.ApiError, match="deep"):
        da.decode_json(b'{"a":' * da.MAX_DEPTH + b"[]" + b"}" * da.MAX_DEPTH)


def test_repeated_key_among_many_is_found_in_one_pass():
    code = (
        "body = ','.join(f'\"{i}\":1' for i in range(90_000)) + ',\"89999\":1'\n"
        "try: da.validate(da.KILL, da.decode_json(b'{%b}' % body.encode()))\n"
        "except da.ApiError as error: print(error.message)"
    )
    assert '"89999" more than once' in in_child(code)


@pytest.mark.parametrize(
    "body, target",
    cases(
        ("none", b"", ""),
        ("white space", b" \r\n", ""),
        ("no fields", {}, ""),
        ("null is absent", {"signal": None}, ""),
        ("any case, no SIG", {"signal": "uSr1"}, "?signal=SIGUSR1"),
        ("escaped letters", b'{"signal":"\\u0048UP"}', "?signal=SIGHUP"),
    ),
)
def test_good_body(body, target, pair):
    assert pair.agent.post(KILL, body, headers={"Content-Type": "x/y"}).status == 200
    assert [seen.target for seen in pair.engine.changes()] == [f"/containers/web/kill{target}"]


@pytest.mark.parametrize(
    "path, word",
    cases(
        ("unknown", "/api/v1/containers?al=1", "query.al: "),
        ("unknown, where none is known", "/api/v1/containers/web?size=1", "query.size: "),
        ("docker's --no-stream", f"{CREATE}/web/stats?no-stream=1", "mean follow=false?"),
        ("lines of a log", f"{CREATE}/web/logs?lines=1", "mean tail?"),
        ("repeated", "/api/v1/containers?all=1&all=0", "all"),
        ("repeated, written in two ways", "/api/v1/containers?all=1&%61ll=1", "all"),
        ("boolean without a value", "/api/v1/containers?all", "query.all: "),
        ("boolean yes", "/api/v1/containers?all=yes", "all: "),
        ("boolean with a space", "/api/v1/containers?all=1%20", "all: "),
        ("tail below 0", "/api/v1/containers/web/logs?tail=-1", "tail: "),
        ("tail in Arabic digits", "/api/v1/containers/web/logs?tail=%D9%A3", "tail: "),
        ("NUL", "/api/v1/containers/web/logs?since=%00", "since: "),
        ("a byte that is not UTF-8", "/api/v1/files?path=/a%FF", "byte that is not UTF-8"),
        ("invalid UTF-8", "/api/v1/containers/web/logs?since=%ff", "since: "),
        ("no moment", "/api/v1/containers/web/logs?since=noon", "query.since: "),
        ("no moment for events", "/api/v1/events?until=noon", "query.until: "),
        ("until before since", "/api/v1/events?since=2&until=1", "query.until: "),
        ("nothing to show", "/api/v1/containers/web/logs?stdout=0&stderr=F", "query.stdout: "),
    ),
)
def test_bad_query_is_400_and_named(path, word, pair):
    assert_envelope(pair.agent.get(path), 400, word)
    assert pair.engine.requests() == []


@pytest.mark.parametrize(
    "value, sent", [("T", 1), ("TRUE", 1), ("1", 1), ("f", 0), ("False", 0), ("0", 0)]
)
def test_booleans_in_any_case(value, sent, pair):
    assert pair.agent.get(f"/api/v1/containers?all={value}").status == 200
    assert [seen.target for seen in pair.engine.requests()] == [f"/containers/json?all={sent}"]


# Routes


@pytest.mark.parametrize(
    "method, path, key, status, allow",
    cases(
        ("unknown path", "GET", "/", "", 404, None),
        ("slash at the end", "GET", "/health/", "", 404, None),
        ("unknown path under the API, no key", "GET", "/api/v1/x", "", 401, None),
        ("unknown method under the API, no key", "PUT", "/api/v1/containers", "", 401, None),
        ("API path in percent codes, no key", "GET", "/%61pi/v1/containers", "", 401, None),
        ("API path behind a host, no key", "GET", "http://x/api/v1/containers", "", 401, None),
        ("two slashes are another path", "GET", "//api/v1/containers", KEY, 404, None),
        ("other version", "GET", "/api/v2/containers", KEY, 404, None),
        ("wrong key", "GET", "/api/v1/containers", KEY[:-1], 401, None),
        ("key and a bit", "GET", "/api/v1/containers", KEY + ", " + KEY, 401, None),
        ("wrong method", "POST", "/health", "", 405, "GET, HEAD"),
        ("wrong method of two", "PUT", "/api/v1/containers", KEY, 405, "POST, GET, HEAD"),
        ("wrong method with an id", "GET", "/api/v1/containers/x/stop", KEY, 405, "POST"),
        ("HEAD where only POST goes", "HEAD", "/api/v1/images/pull", KEY, 405, "POST"),
        ("method in small letters", "get", "/health", "", 405, "GET, HEAD"),
        ("empty id", "DELETE", "/api/v1/containers/", KEY, 400, None),
        ("dots", "DELETE", "/api/v1/containers/..", KEY, 400, None),
        ("dots in percent codes", "DELETE", "/api/v1/containers/%2e%2e", KEY, 400, None),
        ("no id before an action", "POST", "/api/v1/containers//stop", KEY, 400, None),
        ("slash in percent codes", "DELETE", "/api/v1/containers/a%2Fb", KEY, 400, None),
        ("query in percent codes", "DELETE", "/api/v1/containers/a%3Fforce=1", KEY, 400, None),
        ("decoded twice it would be an a", "DELETE", "/api/v1/containers/%2561", KEY, 400, None),
        ("newline at the end of an id", "DELETE", "/api/v1/containers/a%0A", KEY, 400, None),
        ("id of invalid UTF-8", "DELETE", "/api/v1/containers/a%ff", KEY, 400, None),
        ("half a percent code", "DELETE", "/api/v1/containers/a%6", KEY, 400, None),
    ),
)
def test_route_refused(method, path, key, status, allow, pair):
    reply = split_head(pair.agent.raw(message(f"{method} {path}", LAST, key=key)))
    assert reply.status == status
    assert reply.headers.get("allow") == allow
    assert ("www-authenticate" in reply.headers) == (status == 401)
    assert (reply.body == b"") == (method == "HEAD")
    assert pair.engine.requests() == []


@pytest.mark.parametrize(
    "fields, body, word",
    cases(
        ("body where none is taken", ["Content-Length: 2"], b"{}", "body: none is taken here"),
        ("header twice", ["Last-Event-ID: 1.000000000-1"] * 2, b"", "Last-Event-ID: is given more"),
    ),
)
def test_what_a_route_does_not_take_is_refused(fields, body, word, pair):
    data = message("GET /api/v1/containers/x/logs", *fields, LAST) + body
    assert_envelope(split_replies(pair.agent.raw(data))[0], 400, word)
    assert pair.engine.requests() == []


def test_route_without_a_permission_cannot_exist():
    with pytest.raises(ValueError, match="GET /x has no permission"):
        da.check_routes(da.Route("GET", "/x", da.health, ""))


def test_head_of_a_stream_has_no_body(agent, engine):
    path = f"/api/v1/containers/{engine.run('echo', 'one')}/logs"
    assert agent.request("HEAD", path)[::2] == (200, b"")


def split_head(data: bytes) -> Reply:
    """The one answer in data, whatever its body's length."""
    head, _, body = data.partition(b"\r\n\r\n")
    reply = split_replies(re.sub(rb"(?i)content-length", b"X-Length", head) + b"\r\n\r\n")[0]
    return reply._replace(body=body)


def test_repeated_key_header_is_401(pair):
    data = message("GET /api/v1/containers", f"X-API-Key: {KEY}", LAST)
    assert [reply.status for reply in split_replies(pair.agent.raw(data))] == [401]
    assert pair.engine.requests() == []


def test_id_is_decoded_once_and_head_is_get_without_a_body(pair):
    assert pair.agent.post("/api/v1/containers/%77%65b/start").status == 200
    reply = split_head(pair.agent.raw(message("HEAD /api/v1/containers", LAST)))
    assert (reply.status, reply.body) == (200, b"") and int(reply.headers["x-length"]) > 2
    assert list(dict.fromkeys(seen.target for seen in pair.engine.requests())) == [
        "/containers/web/json",
        "/containers/web/start",
        "/containers/json?all=0",
    ]


@pytest.mark.parametrize(
    "sent, kept",
    [
        ("a.B-c_9", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("é", False),
        ("", False),
    ],
)
def test_request_id(sent, kept, pair):
    for line in ("GET /x", "GET /api/v1/containers?x=1", "GET /health"):
        reply = split_replies(pair.agent.raw(message(line, f"X-Request-ID: {sent}", LAST)))[0]
        assert (reply.headers["x-request-id"] == sent) is kept
        assert re.fullmatch("[A-Za-z0-9._-]{1,64}", reply.headers["x-request-id"])


# Heads

HEAD = message("POST /api/v1/containers/web/start")
HOST = b"Host: agent\r\n"


@pytest.mark.parametrize("old, new, status", cases(
    ("bare LF after the request line", b"1.1\r\n", b"1.1\n", 400),
    ("bare LF after a header", HOST, b"Host: agent\n", 400),
    ("bare LF alone ends the head", b"\r\n\r\n", b"\n\n", 400),
    ("bare CR in a value", HOST, b"Host: agent\rX: y\r\n", 400),
    ("bare CR before CRLF", HOST, b"Host: agent\r\r\n", 400),
    ("bare CR in the request line", b" HTTP", b"\r HTTP", 400),
    ("NUL in a value", HOST, b"Host: ag\0ent\r\n", 400),
    ("NUL in a name", HOST, HOST + b"X\0: y\r\n", 400),
    ("vertical tab in a value", HOST, HOST + b"X: a\x0bb\r\n", 400),
    ("folded line", HOST, b"Host: agent\r\n folded\r\n", 400),
    ("folded line with a tab", HOST, b"X: y\r\n\tfolded\r\n" + HOST, 400),
    ("first header begins with a space", HOST, b" " + HOST, 400),
    ("space before the colon", HOST, b"Host : agent\r\n", 400),
    ("tab before the colon", HOST, HOST + b"Content-Length\t: 5\r\n", 400),
    ("no colon", HOST, HOST + b"Content-Length 5\r\n", 400),
    ("no name", HOST, HOST + b": 5\r\n", 400),
    ("name that is no token", HOST, HOST + b"Content(Length): 5\r\n", 400),
    ("no Host", HOST, b"", 400),
    ("two Hosts", HOST, HOST * 2, 400),
    ("Host that is two", HOST, b"Host: a b\r\n", 400),
    ("Host with a path", HOST, b"Host: agent/x\r\n", 400),
    ("two lengths", HOST, HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n", 400),
    ("two different lengths", HOST, HOST + b"Content-Length: 5\r\ncontent-length: 6\r\n", 400),
    *(
        (f"length {value!r}", HOST, HOST + b"Content-Length: " + value + b"\r\n", 400)
        for value in (
            b"+5",
            b"-1",
            b"0x5",
            b"5, 5",
            b"",
            b"5 5",
            b"1_0",
            b"5.0",
            b"\xb2",
            b"five",
        )
    ),
    ("coding and length", HOST, HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", 400),
    ("length and coding", HOST, HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
    ("coding twice", HOST, HOST + b"Transfer-Encoding: chunked\r\n" * 2, 400),
    ("coding in HTTP/1.0", b"1.1\r\n", b"1.0\r\nTransfer-Encoding: chunked\r\n", 400),
    *(
        (f"coding {value!r}", HOST, HOST + b"Transfer-Encoding: " + value + b"\r\n", 501)
        for value in (
            b"gzip",
            b"gzip, chunked",
            b"chunked, gzip",
            b"identity",
            b"xchunked",
            b"chunked;a=b",
            b"",
        )
    ),
    ("no version", b" HTTP/1.1", b"", 400),
    ("small letters in the version", b"HTTP/1.1", b"http/1.1", 400),
    ("space after the version", b"1.1\r\n", b"1.1 \r\n", 400),
    ("long version", b"HTTP/1.1", b"HTTP/1.10", 400),
    ("HTTP/2.0", b"HTTP/1.1", b"HTTP/2.0", 505),
    ("two spaces", b" HTTP", b"  HTTP", 400),
    ("tab for a space", b"POST ", b"POST\t", 400),
    ("space before the method", b"POST", b" POST", 400),
    ("no target", b"/api/v1/containers/web/start ", b"", 400),
    ("target that is not ASCII", b"web", b"w\xc3\xa9b", 400),
    ("control character in the target", b"web", b"w\x7fb", 400),
    ("target of 9,000 bytes", b"web", b"w" * 9000, 414),
    ("101 headers", HOST, HOST + b"X: y\r\n" * 99, 431),
    ("33 KiB of headers", HOST, HOST + b"X: " + b"y" * 33 * 1024 + b"\r\n", 431),
    ("33 KiB of a header's name", HOST, HOST + b"X" * 33 * 1024, 431),
    ("TLS", b"POST", bytes.fromhex("160301020001"), 400),
))  # fmt: skip
def test_hostile_head_has_one_answer_and_is_the_last(old, new, status, pair):
    assert old in HEAD
    head = HEAD.replace(old, new, 1)
    for size in (1 << 20, 1 if len(head) < 2000 else 1000):
        # A valid request behind it must not be answered either.
        replies = split_replies(send_in_pieces(pair.agent, head + SMUGGLED, size, half_close=True))
        assert len(replies) == 1
        assert_envelope(replies[0], status)
        assert replies[0].headers["connection"] == "close" and "x-request-id" in replies[0].headers
    assert pair.engine.requests() == []


@pytest.mark.parametrize("size", [3, len(HEAD) // 2, len(HEAD) - 2, len(HEAD) - 1])
def test_end_within_the_head(size, pair):
    assert_envelope(split_replies(pair.agent.raw(HEAD[:size], half_close=True))[0], 400)
    assert pair.engine.requests() == []


@pytest.mark.parametrize("rest", [b"\rX", b"\nX", b"\0"], ids=["bare CR", "bare LF", "NUL"])
@pytest.mark.parametrize("size", [5, len(HEAD) - 5], ids=["request line", "headers"])
def test_head_that_can_be_none_is_refused_before_its_end(size, rest, pair):
    with pair.agent.connect() as sock:
        sock.sendall(HEAD[:size] + rest[:1])
        time.sleep(0.05)  # so that they are two reads
        sock.sendall(rest[1:])
        assert sock.recv(12) == b"HTTP/1.1 400"
    assert pair.engine.requests() == []


LONG_LINE = len(message("GET /?", key="").partition(b"\r\n")[0])


@pytest.mark.parametrize("data, status", cases(
    ("as it is", message("GET /x", LAST), 404),
    ("white space around values", message("GET /x", "Connection: \t close \t"), 404),
    ("empty line first", b"\r\n" + message("GET /x", LAST), 404),
    ("HTTP/1.0 without a Host", b"GET /x HTTP/1.0\r\n\r\n", 404),
    ("bytes over 127 in a value", message("GET /x", "X: é", LAST), 404),
    ("request line of 8 KiB", message("GET /?" + "a" * (8192 - LONG_LINE), LAST, key=""), 404),
    ("request line of a byte more", message("GET /?" + "a" * (8193 - LONG_LINE), LAST, key=""),
     414),
    ("100 headers", message("GET /x", *["X: y"] * 97, LAST), 404),
    ("32 KiB of headers", b"GET /x HTTP/1.0\r\nX: " + b"y" * (32 * 1024 - 5) + b"\r\n\r\n", 404),
    ("32 KiB and a byte", b"GET /x HTTP/1.0\r\nX: " + b"y" * (32 * 1024 - 4) + b"\r\n\r\n", 431),
))  # fmt: skip
def test_head_at_its_limits_however_it_is_cut(data, status, pair):
    ends = [data.find(b"\r\n") + 1, data.find(b"\r\n") + 2, len(data) - 3, len(data) - 1]
    for cuts in ([0], *([end] for end in ends), range(len(data) if len(data) < 500 else 0)):
        with pair.agent.connect() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start, end in zip([0, *cuts], [*cuts, len(data)]):
                with contextlib.suppress(OSError):
                    sock.sendall(data[start:end])
                time.sleep(0.001 if len(cuts) > 1 else 0.05)  # so that it is read before the rest
            replies = split_replies(read_to_end(sock))
            assert [reply.status for reply in replies] == [status], list(cuts)[:2]


# Bodies

CHUNKED = message("POST /api/v1/containers/web/kill", "Transfer-Encoding: chunked")


@pytest.mark.parametrize("body", cases(
    ("one chunk", b'10\r\n{"signal":"HUP"}\r\n0\r\n\r\n'),
    ("many chunks", b'1\r\n{\r\nF\r\n"signal":"HUP"}\r\n0\r\n\r\n'),
    ("zeros, capitals, extensions",
     b'00000001\r\n{\r\n0f;a="b" ; c\r\n"signal":"HUP"}\r\n000;x\r\n\r\n'),
    ("trailer", b'10\r\n{"signal":"HUP"}\r\n0\r\nX-API-Key: a\r\nY:\r\n\r\n'),
))  # fmt: skip
def test_good_chunks(body, pair):
    for size in (1 << 20, 1):
        data = CHUNKED + body + message("GET /next", LAST)
        assert [r.status for r in split_replies(send_in_pieces(pair.agent, data, size))] == [
            200,
            404,
        ]
        assert [seen.target for seen in pair.engine.changes()] == [
            "/containers/web/kill?signal=SIGHUP"
        ]


@pytest.mark.parametrize(
    "body",
    cases(
        ("no size", b"\r\n{}\r\n0\r\n\r\n"),
        ("size with 0x", b"0x2\r\n{}\r\n0\r\n\r\n"),
        ("size with a sign", b"+2\r\n{}\r\n0\r\n\r\n"),
        ("size below 0", b"-2\r\n{}\r\n0\r\n\r\n"),
        ("size with an underscore", b"0_2\r\n{}\r\n0\r\n\r\n"),
        ("space before the size", b" 2\r\n{}\r\n0\r\n\r\n"),
        ("space after the size", b"2 \r\n{}\r\n0\r\n\r\n"),
        ("size of too many digits", b"000000002\r\n{}\r\n0\r\n\r\n"),
        ("size that overflows", b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
        ("bare LF after the size", b"2\n{}\r\n0\r\n\r\n"),
        ("bare LF in an extension", b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
        ("bare CR in an extension", b"2;a\rb\r\n{}\r\n0\r\n\r\n"),
        ("bare LF after the data", b"2\r\n{}\n0\r\n\r\n"),
        ("two other bytes after the data", b"2\r\n{}xx0\r\n\r\n"),
        ("data longer than its size", b"2\r\n{}}\r\n0\r\n\r\n"),
        ("data shorter than its size", b"3\r\n{}\r\n0\r\n\r\n"),
        ("extension without an end", b"2;" + b"a" * 2000),
        ("extension that is too long", b"2;" + b"a" * 2000 + b"\r\n{}\r\n0\r\n\r\n"),
        ("bare LF in the trailer", b"2\r\n{}\r\n0\r\nA: b\n\r\n"),
        ("bare LF for the trailer", b"2\r\n{}\r\n0\r\n\n"),
        ("nameless trailer", b"2\r\n{}\r\n0\r\n: x\r\n"),
        ("trailer that is too long", b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 2000 + b"\r\n"),
        ("trailer that is none", b"2\r\n{}\r\n0\r\nno colon\r\n\r\n"),
        ("folded trailer", b"2\r\n{}\r\n0\r\nA: b\r\n c\r\n\r\n"),
        ("trailer without an end", b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 2000),
        ("end within a chunk", b"20\r\n{}"),
        ("end before the last chunk", b"2\r\n{}\r\n"),
        ("end before the last line", b"2\r\n{}\r\n0\r\n"),
    ),
)
def test_bad_chunks_are_400_and_the_last(body, pair):
    tail = b"" if body.endswith((b"{}", b"{}\r\n", b"}\r\n0\r\n")) else SMUGGLED
    for size in (1 << 20, 1 if len(body) < 500 else 700):
        data = CHUNKED + body + tail
        replies = split_replies(send_in_pieces(pair.agent, data, size, half_close=not tail))
        assert len(replies) == 1
        assert_envelope(replies[0], 400)
    assert pair.engine.requests() == []


@pytest.mark.parametrize("head, status", cases(
    ("wrong key", message("POST /api/v1/files", "Content-Length: %d", key="x"), 401),
    ("unknown path", message("POST /nowhere", "Content-Length: %d"), 404),
    ("wrong method", message("PUT /api/v1/files", "Content-Length: %d"), 405),
    ("bad query", message("POST /api/v1/files?a=b", "Content-Length: %d"), 400),
    ("where no body is taken", message("GET /health", "Content-Length: %d"), 400),
    ("unknown expectation", message("POST /api/v1/files", "Content-Length: %d", "Expect: x"), 417),
))  # fmt: skip
def test_request_behind_an_unread_body_is_never_answered(head, status, pair):
    data = head.replace(b"%d", b"%d" % len(SMUGGLED)) + SMUGGLED
    for size in (1 << 20, 1):
        replies = split_replies(send_in_pieces(pair.agent, data + SMUGGLED, size))
        assert [reply.status for reply in replies] == [status]
        assert replies[0].headers["connection"] == "close"
    assert pair.engine.requests() == []


def test_body_too_large(pair):
    declared = message("POST /api/v1/files", "Content-Length: 10485761", "Expect: 100-continue")
    assert [reply.status for reply in split_replies(pair.agent.raw(declared))] == [413]
    huge = message("POST /api/v1/files", "Content-Length: " + "9" * 5000)
    assert [reply.status for reply in split_replies(pair.agent.raw(huge))] == [413]
    # Whoever sends all of it gets the answer, and no reset takes it away.
    assert_envelope(pair.agent.post("/api/v1/files", b"x" * 30_000_000), 413)
    chunked = message("POST /api/v1/files", "Transfer-Encoding: chunked")
    data = chunked + b"ffffff\r\n" + b"x" * 0xFFFFFF + b"\r\n0\r\n\r\n"
    assert [reply.status for reply in split_replies(pair.agent.raw(data))] == [413]
    with pair.agent.connect() as sock:  # as soon as it is, whatever is still to come
        sock.sendall(chunked + b"ffffff\r\n" + b"x" * 10_485_761)
        assert int(sock.recv(12).split(b" ")[1]) == 413
    largest = json.dumps({"path": "/../x", "content": ""}).encode()
    assert_envelope(pair.agent.post("/api/v1/files", largest.ljust(10_485_760)), 400, "path")


@pytest.mark.parametrize(
    "line, key, first",
    cases(
        ("wanted", "POST /api/v1/containers/web/kill", KEY, 100),
        ("without the key", "POST /api/v1/containers/web/kill", "", 401),
        ("no such path", "POST /api/v1/x", KEY, 404),
    ),
)
def test_continue_comes_only_once_the_key_has_passed(line, key, first, pair):
    with pair.agent.connect() as sock:
        sock.sendall(message(line, "Content-Length: 2", "Expect: 100-Continue", LAST, key=key))
        assert int(sock.recv(12).split(b" ")[1]) == first
        if first == 100:
            assert pair.engine.requests() == []
            sock.sendall(b"{}")
        read_to_end(sock)
    assert len(pair.engine.changes()) == (first == 100)


# Connections


def test_pipelined_requests_are_answered_in_order(pair):
    kill = message("POST " + KILL, "Content-Length: 2", body=b"{}")
    data = (message("GET /a") + kill) * 50
    data += message("GET /last", "X-Request-ID: last", LAST) + SMUGGLED
    for size in (1 << 20, 1000, 7):
        replies = split_replies(send_in_pieces(pair.agent, data, size))
        assert [reply.status for reply in replies] == [404, 200] * 50 + [404]
        assert replies[-1].headers["x-request-id"] == "last"
        assert len(pair.engine.changes()) == 50


def test_refused_head_has_no_body(pair):
    lines = "HEAD /x#y HTTP/1.1", f"HEAD /{'x' * 9000} HTTP/1.1"
    for line, first in itertools.product(lines, (0, 2)):
        with pair.agent.connect() as sock:
            sock.sendall(line[:first].encode())
            time.sleep(0.05)  # the agent reads that by itself
            sock.sendall(f"{line[first:]}\r\nHost: a\r\n\r\n".encode())
            data = read_to_end(sock)
        assert data.startswith(b"HTTP/1.1 4") and data.endswith(b"\r\n\r\n")
        assert b"Content-Length: 0" not in data


def test_empty_lines_are_no_request(pair):
    kill = message("POST " + KILL, "Content-Length: 2", body=b"{}")
    for data in (kill + b"\r\n", kill + b"\r\n\r\n", b"\r\n\r\n" + kill, b"\r\n"):
        for size in (1 << 20, 1):
            replies = split_replies(send_in_pieces(pair.agent, data, size, half_close=True))
            assert [reply.status for reply in replies] == [200] * data.count(b"POST")
    assert len(pair.engine.changes()) == 6
    # But not without an end.
    assert pair.agent.raw(b"\r\n" * 5000 + kill) == b""


def test_message_is_bounded(pair):
    assert len(pair.agent.post(KILL, {"x" * 5_000_000: 1}).body) < 5000


def test_answer_is_never_altered(fake_engine):
    with Agent(DOCKER_HOST=fake_engine.url, API_KEY="web") as agent:
        reply = agent.get("/web", key="web", headers={"X-Request-ID": "web-1"})
        assert reply.headers["x-request-id"] == "web-1"
        assert_envelope(agent.post(KILL, {"web": 1}, key="web"), 400, "web: is unknown")


@pytest.mark.parametrize("fields, status, word", cases(
    ("X-API-Key", [f"X-API-Key: {KEY}"], 200, ""),
    ("bearer", [f"Authorization: Bearer {KEY}"], 200, ""),
    ("bearer in small letters, two spaces", [f"authorization: bearer  {KEY}"], 200, ""),
    ("a proxy's own scheme beside it", ["Authorization: Basic YTpi", f"X-API-Key: {KEY}"], 200, ""),
    ("a proxy's own scheme alone", ["Authorization: Basic YTpi"], 401, "a key is needed"),
    ("none", [], 401, "a key is needed"),
    ("wrong", ["X-API-Key: x"], 401, "the key is wrong"),
    ("empty", ["X-API-Key:"], 401, "the key is wrong"),
    ("empty bearer", ["Authorization: Bearer"], 401, "the key is wrong"),
    ("twice", [f"X-API-Key: {KEY}"] * 2, 401, "more than once"),
    ("in both places", [f"X-API-Key: {KEY}", f"Authorization: Bearer {KEY}"], 401,
     "more than once"),
    ("right beside wrong", [f"X-API-Key: {KEY}", "Authorization: Bearer x"], 401, "more than once"),
    ("with a bit more", [f"X-API-Key: {KEY}x"], 401, "the key is wrong"),
    ("in capitals", [f"X-API-Key: {KEY.upper()}"], 401, "the key is wrong"),
))  # fmt: skip
def test_key_is_sent_once_in_one_of_two_headers(fields, status, word, pair):
    data = message("GET /api/v1/containers", *fields, LAST, key="")
    reply = split_replies(pair.agent.raw(data))[0]
    assert reply.status == status and word in reply.body.decode()
    assert ("www-authenticate" in reply.headers) == (status == 401)
    assert len(pair.engine.requests()) == (status == 200)


def test_http_1_0_is_answered_and_closed(pair):
    data = b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + SMUGGLED
    assert [reply.status for reply in split_replies(pair.agent.raw(data))] == [404]
    assert pair.engine.requests() == []


def test_http_1_0_has_no_chunks(pair):
    head = f"POST /api/v1/containers/web/start HTTP/1.0\r\nHost: agent\r\nX-API-Key: {KEY}\r\n"
    data = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert_envelope(split_replies(pair.agent.raw(data))[0], 400, "Transfer-Encoding")
    assert pair.engine.requests() == []


@pytest.mark.parametrize("options", ["close", "CLOSE", "keep-alive, close", "x ,\tClose\t, y"])
def test_close_is_one_of_the_connections_options(options, pair):
    data = message("GET /x", f"Connection: {options}") + SMUGGLED
    assert [reply.status for reply in split_replies(pair.agent.raw(data))] == [404]
    assert pair.engine.requests() == []


def test_connection_past_the_cap_gets_503(fake_engine):
    release = threading.Event()
    fake_engine.script["GET /containers/json"] = held(release)
    with Agent(DOCKER_HOST=fake_engine.url, MAX_CONNECTIONS="2", LISTEN_ADDR=":0") as agent:
        with agent.connect() as first, agent.connect() as second:
            first.sendall(message("GET /x"))
            assert b"404" in read_some(first)  # of a path for which no key is looked at
            for sock in (first, second):
                sock.sendall(message("GET /api/v1/containers"))
            asked: list[Seen] = []
            until(lambda: asked.extend(fake_engine.requests()) or len(asked) == 2, "both requests")
            reply = split_replies(agent.raw(b""))[0]
            assert_envelope(reply, 503)
            assert reply.headers["connection"] == "close" and reply.headers["x-request-id"]
            refused = until(lambda: agent.lines("request")[1:], "the log line")
            assert [line["status"] for line in refused] == [503]
            assert (refused[0]["client_ip"], refused[0]["latency_ms"]) == ("127.0.0.1", 0)
            release.set()
            # Both have shown the key: they stay, though nothing is being answered.
            assert b"200 OK" in read_some(first) and b"200 OK" in read_some(second)
            assert split_replies(agent.raw(b""))[0].status == 503
        reply = until(lambda: (r := agent.get("/metrics")).status == 200 and r, "a free slot")
        name, other = "dockeragent_http_requests_total", {"method": "other", "route": "other"}
        assert value_of(parse_metrics(reply.body), name, code="503", **other) >= 2


def test_refused_connections_take_no_descriptor_that_a_key_holder_needs(fake_engine, tmp_path):
    env = {"DOCKER_HOST": fake_engine.url, "HOST_ROOT": str(tmp_path), "MAX_CONNECTIONS": "18"}
    ask = message("GET /api/v1/files?path=/x")
    with Agent(**env) as agent, contextlib.ExitStack() as stack:
        holders = [stack.enter_context(agent.connect()) for _ in range(18)]
        for sock in holders:
            sock.sendall(ask)
            assert b"404 Not Found" in read_some(sock)
        for _ in range(100):
            stack.enter_context(agent.connect())
        until(lambda: len(agent.lines("request")) == 118, "the log line of each")
        # That is enough for 18 connections. Those that were refused are left open for a moment.
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (100, 100))
        for sock in holders:
            sock.sendall(ask)
            assert b"404 Not Found" in read_some(sock)


def read_some(sock: socket.socket) -> bytes:
    """What has come by the end of a body that ends in a brace."""
    data = b""
    while not data.endswith(b"}\n"):
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


@pytest.mark.parametrize("transport", ["plain", "TLS"])
def test_strangers_make_room_for_a_key_holder(transport, pki, fake_engine):
    fake_engine.script["GET /containers/json"] = http_answer([])
    env = {"MAX_CONNECTIONS": "8"}
    start = (
        pki.agent if transport == "TLS" else lambda fake, **env: Agent(DOCKER_HOST=fake.url, **env)
    )
    with start(fake_engine, **env) as agent, contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(
                pki.connect(agent) if transport == "TLS" else agent.connect()
            )

        strangers = [connect() for _ in range(6)]
        for sock in strangers:  # each is as lively as a stranger can be
            sock.sendall(message("GET /health", key=""))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        strangers += [stack.enter_context(agent.connect()) for _ in range(2)]  # silent
        holders = [connect() for _ in range(8)]
        for sock in holders:
            sock.sendall(message("GET /api/v1/containers"))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        for sock in strangers:  # the longest without a complete request went first; now all
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                assert sock.recv(1) == b""
        for sock in holders:  # and the strangers that come now do not take them away
            late = agent.connect()
            stack.enter_context(late)
            with contextlib.suppress(ConnectionError):
                late.sendall(message("GET /health", key=""))
            sock.sendall(message("GET /api/v1/containers"))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_stranger_who_went_longest_without_a_request_makes_room_first(fake_engine):
    with (
        Agent(DOCKER_HOST=fake_engine.url, MAX_CONNECTIONS="3") as agent,
        contextlib.ExitStack() as stack,
    ):
        first, second, third = (stack.enter_context(agent.connect()) for _ in range(3))
        for sock in (second, third, first):
            sock.sendall(message("GET /health", key=""))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        until(lambda: len(agent.lines("request")) == 3, "the end of each request")
        assert agent.get("/x").status == 404
        assert second.recv(1) == b""
        for sock in (first, third):
            sock.sendall(message("GET /health", key=""))
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_stranger_who_reads_nothing_is_dropped(fake_engine):
    with Agent(DOCKER_HOST=fake_engine.url) as agent, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before the connect: it stays
        sock.settimeout(6 * WAIT)
        sock.connect(("127.0.0.1", agent.port))
        with pytest.raises(ConnectionError):
            sock.sendall(message("GET /health", key="") * 1_000_000)


def test_deadline_holds_while_there_is_something_to_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(b"x")
        assert da.receive(ours, time.monotonic() + WAIT) == b"x"
        theirs.sendall(b"x")
        with pytest.raises(socket.timeout):
            da.receive(ours, time.monotonic() - 1)


@LONG_WAITS.append
def drips_and_silence_are_cut_off(folder, pki):
    def drip(agent: Agent, data: bytes, more: bytes) -> bytes:
        """Send data, then more every 0.4 s, until the agent answers or hangs up."""
        deadline = time.monotonic() + 3 * WAIT
        with agent.connect() as sock:
            sock.sendall(data)
            sock.settimeout(0.4)
            while time.monotonic() < deadline:
                try:
                    return sock.recv(65536)
                except ConnectionResetError:
                    return b""
                except OSError:  # nothing yet
                    with contextlib.suppress(OSError):
                        sock.sendall(more)
        return b"was never cut off"

    with contextlib.ExitStack() as stack:
        fake = stack.enter_context(FakeEngine(folder / "e.sock"))
        plain = stack.enter_context(Agent(DOCKER_HOST=fake.url))
        tls = stack.enter_context(pki.agent(fake))
        jobs: dict[str, Callable[[], bytes]] = {
            "head": lambda: drip(plain, b"GET /x HTTP/1.1\r\nHost: ", b"a"),
            "line": lambda: drip(plain, b"G", b"E"),
            "silent": lambda: drip(plain, b"", b""),
            "handshake": lambda: drip(tls, b"\x16\x03\x01\x02\x00\x01", b"a"),
        }
        found = dict(zip(jobs, at_once(lambda job: job(), jobs.values())))
    assert [reply.status for reply in split_replies(found["head"])] == [408]
    assert [reply.status for reply in split_replies(found["line"])] == [408]
    assert found["silent"] == b"" and not found["handshake"].startswith(b"HTTP")
    assert fake.requests() == []


# TLS


class Pki(NamedTuple):
    """Certificates: a server's, a client CA and a client of it, made with openssl."""

    folder: Path

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def agent(self, fake: FakeEngine, **env: str) -> Agent:
        files = {"TLS_CERT_FILE": self.file("server.pem"), "TLS_KEY_FILE": self.file("server.key")}
        return Agent(DOCKER_HOST=fake.url, **{**files, **env})

    def connect(self, agent: Agent, client: str = "") -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=self.file("server.pem"))
        if client:
            context.load_cert_chain(self.file(f"{client}.pem"), self.file(f"{client}.key"))
        return context.wrap_socket(agent.connect(), server_hostname="localhost")

    def raw(self, agent: Agent, data: bytes, client: str = "") -> bytes:
        with self.connect(agent, client) as sock:
            sock.sendall(data)
            return read_to_end(sock)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    made = Pki(tmp_path_factory.mktemp("pki"))

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=made.folder, check=True, capture_output=True)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "9"]
    for name in ("server", "ca", "stranger"):
        subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost"]
        openssl(*new, "-nodes", *subject, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl(*new, "-passout", "pass:x", "-subj", "/CN=x", "-keyout", "secret.key", "-out", "x.pem")
    openssl("req", "-new", "-key", "stranger.key", "-subj", "/CN=client", "-out", "client.csr")
    openssl(
        *"x509 -req -in client.csr -CA ca.pem -CAkey ca.key -set_serial 1 -out client.pem".split()
    )
    (made.folder / "client.key").write_bytes((made.folder / "stranger.key").read_bytes())
    return made


@pytest.mark.parametrize(
    "variable, env",
    cases(
        ("key of another certificate", "TLS_KEY_FILE", {"TLS_KEY_FILE": "ca.key"}),
        ("key with a password", "TLS_KEY_FILE", {"TLS_KEY_FILE": "secret.key"}),
        ("key that is a certificate", "TLS_KEY_FILE", {"TLS_KEY_FILE": "server.pem"}),
        ("certificate that is a key", "TLS_CERT_FILE", {"TLS_CERT_FILE": "server.key"}),
        ("client CA that is none", "TLS_CLIENT_CA_FILE", {"TLS_CLIENT_CA_FILE": "ca.key"}),
    ),
)
def test_wrong_certificate_is_one_line(variable, env, pki):
    files = {"TLS_CERT_FILE": "server.pem", "TLS_KEY_FILE": "server.key", **env}
    done = command(**{name: pki.file(value) for name, value in files.items()})
    assert done.returncode == 2
    assert done.stderr.startswith(f"{variable}: ") and done.stderr.count("\n") == 1


def test_https_with_events_and_a_large_upload(pki, fake_engine):
    state = {"Running": False, "ExitCode": 3, "Status": "exited"}
    inspected = {"Id": "0a1b", "Config": {"Tty": False}, "State": state}
    for name in ("web", "0a1b"):
        fake_engine.script[f"GET /containers/{name}/json"] = http_answer(inspected)
        fake_engine.script[f"GET /containers/{name}/logs"] = chunked_answer(
            *(frame(1, b"line %d\n" % i) for i in range(2000))
        )
    with pki.agent(fake_engine) as agent:
        replies = split_replies(pki.raw(agent, message("GET /a") * 3 + message("GET /b", LAST)))
        assert [reply.status for reply in replies] == [404] * 4
        events = pki.raw(agent, message("GET /api/v1/containers/web/logs?follow=1", LAST))
        assert b"text/event-stream" in events and events.endswith(b"\r\n0\r\n\r\n")
        assert events.count(b"data: line ") == 2000
        assert b'event: end\ndata: {"reason":"exited","exit_code":3}' in events
        fake_engine.requests()
        upload = message("POST /api/v1/files", "Content-Length: 30000000") + b"x" * 30_000_000
        assert [reply.status for reply in split_replies(pki.raw(agent, upload))] == [413]
        # Plain HTTP gets nothing, and takes nothing down.
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in agent.raw(message("GET /api/v1/containers"))
        assert split_replies(pki.raw(agent, message("GET /b", LAST)))[0].status == 404
    assert fake_engine.requests() == []


def test_large_response_over_tls_waits_for_its_reader(pki, fake_engine):
    found = {"Id": "x", "Config": {"Env": ["x" * 16 * MIB]}}
    fake_engine.script["GET /containers/x/json"] = http_answer(found)
    with pki.agent(fake_engine) as agent, pki.connect(agent) as sock:
        sock.sendall(message("GET /api/v1/containers/x", LAST))
        time.sleep(1)  # until no buffer takes any more
        (reply,) = split_replies(read_to_end(sock))
    assert (reply.status, json.loads(reply.body)) == (200, found)


def test_client_without_a_certificate_of_the_ca_gets_no_answer(pki, fake_engine):
    fake_engine.script["GET /containers/json"] = http_answer([])
    data = message("GET /api/v1/containers", LAST)
    with pki.agent(fake_engine, TLS_CLIENT_CA_FILE=pki.file("ca.pem")) as agent:
        for client in ("", "stranger"):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                pki.raw(agent, data, client)
        assert fake_engine.requests() == []
        assert split_replies(pki.raw(agent, data, "client"))[0].status == 200
    assert len(fake_engine.requests()) == 1


def test_client_without_a_certificate_is_told_so(pki, fake_engine):
    """Its first request comes with the end of the handshake; a reset would discard the alert."""
    context = ssl.create_default_context(cafile=pki.file("server.pem"))
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(inward, outward, server_hostname="localhost")
    with pki.agent(fake_engine, TLS_CLIENT_CA_FILE=pki.file("ca.pem")) as agent:
        with agent.connect() as sock:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outward.read())
                    inward.write(sock.recv(65536))
            tls.write(message("GET /health", LAST))
            sock.sendall(outward.read())
            while data := sock.recv(65536):
                inward.write(data)
            poll = select.poll()
            poll.register(sock, 0)
            assert poll.poll(500) == []  # neither POLLERR nor POLLHUP: no reset has followed
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            tls.read()


def test_plain_text_before_a_reset_is_not_taken_for_decrypted(pki, fake_engine):
    """On some Pythons a socket that was reset skips the handshake: CVE-2023-40217."""
    start = message("POST " + KILL, "Content-Length: 2", LAST, body=b"{}")
    with pki.agent(fake_engine, TLS_CLIENT_CA_FILE=pki.file("ca.pem")) as agent:
        for _ in range(50):
            sock = agent.connect()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.sendall(start)
            sock.close()  # with a reset
        with pytest.raises((ssl.SSLError, ConnectionError)):
            pki.raw(agent, start)
    assert fake_engine.requests() == [] and not agent.lines("request")


# Listening, stopping, healthcheck


@pytest.mark.parametrize(
    "listen, reached",
    cases(
        ("all interfaces, both families", ":0", ["127.0.0.1", "::1"]),
        ("one IPv4 address", "127.0.0.1:0", ["127.0.0.1"]),
        ("one IPv6 address", "[::1]:0", ["::1"]),
    ),
)
def test_listen_addr(listen, reached, fake_engine):
    with Agent(DOCKER_HOST=fake_engine.url, LISTEN_ADDR=listen) as agent:
        for host in ("127.0.0.1", "::1"):
            if host not in reached:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((host, agent.port), WAIT)
                continue
            with socket.create_connection((host, agent.port), WAIT) as sock:
                sock.sendall(message("GET /x", LAST))
                assert split_replies(read_to_end(sock))[0].status == 404
        until(lambda: len(agent.lines("request")) == len(reached), "the log lines")
        assert sorted(line["client_ip"] for line in agent.lines("request")) == reached


def test_unix_socket_replaces_a_stale_one_only(fake_engine, tmp_path):
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    env = {"DOCKER_HOST": fake_engine.url, "LISTEN_ADDR": f"unix://{path}"}
    with Agent(**env) as agent:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        done = command(**env)
        assert done.returncode == 2 and done.stderr.startswith("LISTEN_ADDR: ")
        assert done.stderr.count("\n") == 1
        assert agent.get("/x").status == 404  # the one that lives was left alone
        until(lambda: agent.lines("request"), "the log line")
        assert agent.lines("request")[0]["client_ip"]
    assert not path.exists()


def held(release: threading.Event) -> Callable[[socket.socket], None]:
    """An Engine's answer, an empty list, that comes once release is set."""

    def answer(sock: socket.socket) -> None:
        release.wait(3 * WAIT)
        sock.sendall(http_answer([]))

    return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_closes_idle_connections_and_lets_the_rest_finish(number, fake_engine):
    release = threading.Event()
    fake_engine.script["GET /containers/json"] = held(release)
    with Agent(DOCKER_HOST=fake_engine.url) as agent, agent.connect() as idle:
        with agent.connect() as silent, agent.connect() as busy, agent.connect() as refused:
            refused.sendall(message("POST /x", "Content-Length: 2", body=b"x"))
            assert refused.recv(12) == b"HTTP/1.1 404"
            idle.sendall(message("GET /x"))
            assert idle.recv(12) == b"HTTP/1.1 404"
            busy.sendall(message("GET /api/v1/containers"))
            until(fake_engine.requests, "the request in flight")
            agent.process.send_signal(number)
            read_to_end(idle)
            assert read_to_end(silent) == b""
            refused.sendall(b"x")  # it would fail if the response could have been discarded
            refused.sendall(b"x")
            assert agent.process.poll() is None
            with pytest.raises(ConnectionRefusedError):
                agent.connect()
            release.set()
            assert split_replies(read_to_end(busy))[0].json() == {"containers": []}
        assert agent.process.wait(WAIT) == 0
    assert fake_engine.requests() == []


def test_handshake_does_not_hold_up_the_stop(pki, fake_engine):
    with contextlib.ExitStack() as stack, pki.agent(fake_engine) as agent:
        # A client that says nothing, one that says the beginning of a hello, one without TLS.
        for data in b"", b"\x16\x03\x01\x02\x00\x01", message("GET /x"):
            sock = stack.enter_context(agent.connect())
            sock.sendall(data)
        assert read_to_end(sock) == b""  # it failed, and is kept open for the client to read why
        agent.process.terminate()
        # Requests in flight have 10 s and responses 3 s; there are none.
        assert agent.process.wait(WAIT / 4) == 0


def test_tls_connection_ends_with_a_close_notify(pki, fake_engine):
    """Without one, a client could take a response that an attacker has cut off for a whole one."""
    context = ssl.create_default_context(cafile=pki.file("server.pem"))
    strict = {"server_hostname": "localhost", "suppress_ragged_eofs": False}
    with pki.agent(fake_engine) as agent:
        with context.wrap_socket(agent.connect(), **strict) as last:
            last.sendall(message("GET /x", LAST))
            assert split_replies(read_to_end(last))[0].status == 404
        with context.wrap_socket(agent.connect(), **strict) as idle:
            idle.sendall(message("GET /x"))
            assert idle.recv(65536).startswith(b"HTTP/1.1 404")
            agent.process.terminate()
            assert idle.recv(1) == b""


@pytest.mark.parametrize("address", ["127.0.0.1:0", "unix://{}/agent.sock"])
def test_stop_waits_for_no_look_of_the_accepting_thread(address, tmp_path):
    code = """
import socket, threading
config = da.load_config({"API_KEY": "k" * 40, "LISTEN_ADDR": sys.argv[2]})
agent = da.Agent(None, "/", {}, da.Metrics(), set(), None)
with da.listen(config.listen_addr) as listener:
    server = da.Server(config, da.Log("error"), listener, (), agent)
    threading.Thread(target=server.serve_forever, args=(3600,), daemon=True).start()
    with socket.socket(listener.family) as client:
        client.connect(listener.getsockname())
        client.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
        print(client.recv(12).decode(), flush=True)
    server.stop()
print("stopped")
"""
    assert in_child(code, "/", address.format(tmp_path)) == "HTTP/1.1 404\nstopped\n"


def test_request_that_comes_as_its_slot_is_revoked_is_not_answered(tmp_path):
    code = """
import socket
config = da.load_config({"API_KEY": "k" * 40, "LISTEN_ADDR": sys.argv[2]})
with da.listen(config.listen_addr) as listener, socket.socket() as client:
    server = da.Server(config, da.Log("error"), listener, (), None)
    slot = da.Slot(client)
    server.slots.add(slot)
    server.begin_answer(slot, None)
    server.slots.discard(slot)
    try: server.begin_answer(slot, None)
    except da.ClientGone: print("gone")
"""
    assert in_child(code, "/", f"unix://{tmp_path}/agent.sock") == "gone\n"


@pytest.mark.parametrize("name", ["{}/notify", "@dockeragent{}"])
def test_systemd_is_told_of_the_start_and_the_stop(name, fake_engine, tmp_path):
    name = name.format(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(WAIT)
        systemd.bind(name.replace("@", "\0"))
        with Agent(DOCKER_HOST=fake_engine.url, NOTIFY_SOCKET=name):
            assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"STOPPING=1"


def test_open_files_bound_the_connections():
    code = "resource.setrlimit(resource.RLIMIT_NOFILE, (50, {most})); print("
    code += "da.raise_open_files(500), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    for most, printed in ((2000, "500 2000\n"), (1000, "468 1000\n"), (60, "1 60\n")):
        assert in_child(code.format(most=most)) == printed


def test_connections_past_the_limit_on_open_files_are_lowered_with_a_warning(fake_engine):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = (hard - da.DESCRIPTORS_KEPT) // 2
    if not 0 < most < 10**6:
        pytest.skip("there is no limit on open files to speak of")
    with Agent(DOCKER_HOST=fake_engine.url, MAX_CONNECTIONS="1000000") as agent:
        assert agent.lines(f"MAX_CONNECTIONS: lowered to {most} by the limit on open files")


def test_bug_of_a_handler_is_a_500_that_shows_none_of_it_and_the_server_goes_on():
    code = """
import socket, threading
def endpoint(request, agent): raise KeyError("a sec" "ret")
config = da.load_config({"API_KEY": "k" * 40, "LISTEN_ADDR": "127.0.0.1:0"})
agent = da.Agent(None, "/", {}, da.Metrics(), set(), None)
with da.listen(config.listen_addr) as listener:
    routes = [da.Route("GET", "/health", endpoint, da.PUBLIC)]
    server = da.Server(config, da.Log("error"), listener, routes, agent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"GET /health HTTP/1.1\\r\\nHost: h\\r\\n\\r\\nGET /x HTTP/1.0\\r\\n\\r\\n")
        while data := client.recv(65536): sys.stderr.buffer.write(data)
"""
    done = subprocess.run([sys.executable, "-c", CHILD + code, "/"], cwd=HERE, capture_output=True)
    bug, other = split_replies(done.stderr)
    assert_envelope(bug, 500, bug.headers["x-request-id"])
    assert other.status == 404 and b"secret" not in done.stdout + done.stderr
    logged, request = map(json.loads, done.stdout.splitlines())
    assert (logged["msg"], logged["request_id"]) == ("bug", bug.headers["x-request-id"])
    assert "in endpoint" in logged["traceback"] and "KeyError" in logged["traceback"]
    assert (request["status"], request["error"]) == (500, bug.json()["message"])


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
def test_strangers_who_hold_all_threads_make_room_too():
    code = """
import encodings.idna, socket, threading
resource.setrlimit(resource.RLIMIT_NPROC, (8, 8))
os.setuid(4002)
config = da.load_config({"API_KEY": "k" * 40, "LISTEN_ADDR": "127.0.0.1:0"})
agent = da.Agent(None, "/", {}, da.Metrics(), set(), None)
with da.listen(config.listen_addr) as listener:
    server = da.Server(config, da.Log("error"), listener, (), agent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    strangers = [socket.create_connection(listener.getsockname()) for _ in range(8)]
    for _ in range(1000):  # each one that is refused has made room for the next
        with socket.create_connection(listener.getsockname()) as late:
            late.sendall(b"GET /x HTTP/1.0\\r\\n\\r\\n")
            status = late.recv(12).decode()
        if "404" in status: break
    for sock in strangers: sock.close()
    for _ in range(1000):  # nor does one that was refused hold a slot
        if not server.slots: break
        threading.Event().wait(0.01)
    print(status, len(server.slots), flush=True)
"""
    assert in_child(code, "/") == "HTTP/1.1 404 0\n"


def test_second_signal_ends_it_at_once_and_logs_what_it_cuts_off(fake_engine):
    release = threading.Event()
    fake_engine.script["GET /containers/json"] = held(release)
    with Agent(DOCKER_HOST=fake_engine.url) as agent, agent.connect() as busy:
        busy.sendall(message("GET /api/v1/containers"))
        until(fake_engine.requests, "the request in flight")
        agent.process.terminate()
        until(lambda: agent.lines("stopping"), "the log line")
        agent.process.terminate()
        assert agent.process.wait(WAIT / 2) != 0  # the request would have had 10 s
        release.set()
        (line,) = agent.lines("request")  # what was asked for is known all the same
        assert (line["route"], line["key"]) == ("/api/v1/containers", "master")
        assert "cut off" in line["error"] and line["latency_ms"] > 0 and agent.lines("stopped")


def test_healthcheck_of_all_interfaces_needs_no_name_to_be_known(fake_engine):
    """An image without a shell may have neither /etc/hosts nor a name server."""
    hide = "for file in hosts resolv.conf; do mount --bind /dev/null /etc/$file; done; exec "
    with Agent(LISTEN_ADDR=":0", DOCKER_HOST=fake_engine.url) as agent:
        env = {"PATH": os.environ["PATH"], "LISTEN_ADDR": f":{agent.port}"}
        script = ["unshare", "-m", "sh", "-c", f"{hide} {sys.executable} {SOURCE} healthcheck"]
        done = subprocess.run(script, env=env, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("kind", ["tcp", "all interfaces", "unix", "TLS", "client CA"])
def test_healthcheck(kind, pki, fake_engine, tmp_path):
    listen = {"unix": f"unix://{tmp_path}/agent.sock", "all interfaces": ":0"}
    env = {"LISTEN_ADDR": listen.get(kind, "127.0.0.1:0"), "DOCKER_HOST": fake_engine.url}
    if kind in ("TLS", "client CA"):
        env.update(TLS_CERT_FILE=pki.file("server.pem"), TLS_KEY_FILE=pki.file("server.key"))
    if kind == "client CA":
        env["TLS_CLIENT_CA_FILE"] = pki.file("ca.pem")
    with Agent(**env) as agent:
        if agent.port:
            env["LISTEN_ADDR"] = env["LISTEN_ADDR"].rpartition(":")[0] + f":{agent.port}"
        done = command("healthcheck", **env)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        # The Engine's state is remembered for a second; without a certificate it cannot be asked.
        fake_engine.script["GET /_ping"] = http_answer({"message": "no"}, 500)
        ill = 0 if kind == "client CA" else 1
        until(lambda: command("healthcheck", **env).returncode == ill, "an Engine that is ill")
    done = command("healthcheck", **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_healthcheck_needs_no_key_and_knows_a_stranger(pki, fake_engine, tmp_path):
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        env = {"LISTEN_ADDR": f"127.0.0.1:{agent.port}", "API_KEY": "", "API_KEY_FILE": "/none"}
        assert command("healthcheck", **env).returncode == 0
        # A server without TLS is not the one that this environment configures.
        names = ("TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE")
        env.update(zip(names, map(pki.file, ("server.pem", "server.key", "ca.pem"))))
        assert command("healthcheck", **env).returncode == 1
    done = command("healthcheck", LISTEN_ADDR="x")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_healthcheck_of_a_server_that_drips_ends(fake_engine):
    def drip(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"H")
            time.sleep(0.1)

    fake_engine.script["GET /health"] = drip
    done = command("healthcheck", LISTEN_ADDR=fake_engine.url)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_large_answer_of_an_engine_that_closes_the_connection_is_read_whole(pair):
    rows = [{"Id": f"{i:064x}"} for i in range(20_000)]
    pair.engine.script["GET /containers/json"] = http_answer(rows)  # with Connection: close
    reply = pair.agent.get("/api/v1/containers")
    pair.engine.script["GET /containers/json"] = http_answer([])
    assert reply.status == 200, reply.body[:200]
    assert len(reply.json()["containers"]) == 20_000


def test_logged_bytes_are_the_bodys(pair):
    with pair.agent.connect() as sock:
        fields = ("Content-Length: 2", "Expect: 100-continue", "X-Request-ID: counted", LAST)
        sock.sendall(message("POST " + KILL, *fields))
        assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        sock.sendall(b"[]")
        body = split_replies(read_to_end(sock))[0].body
    found = until(
        lambda: [line for line in pair.agent.lines("request") if line["request_id"] == "counted"],
        "the log line",
    )
    assert found[0]["bytes"] == len(body)
    assert pair.engine.requests() == []


# --------------------------------------------------------------------------------------------------
# The Engine client, against an Engine that fails
# --------------------------------------------------------------------------------------------------

ONE = "/api/v1/containers/c1"  # a container as the agent has it
INSPECT = "GET /containers/c1/json"  # and as FakeEngine's script has it
LIST = "GET /containers/json"
SSE = {"Accept": "text/event-stream"}
HEAD_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def ping(version: str) -> bytes:
    """The answer to _ping of an Engine with this API version."""
    return http_answer(b"OK", extra=f"Api-Version: {version}\r\n", content_type="text/plain")


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakeEngine, Agent]]:
    """A FakeEngine and its agent, shared by the rows of tables."""
    path = tmp_path_factory.mktemp("fakes") / "engine.sock"
    with FakeEngine(path) as fake, Agent(DOCKER_HOST=fake.url) as agent:
        yield fake, agent


@pytest.fixture
def lasting_engine(fakes: tuple[FakeEngine, Agent]) -> FakeEngine:
    """The FakeEngine of `fakes`, with nothing scripted or seen so far."""
    fakes[0].script = {}
    fakes[0].requests()
    return fakes[0]


@pytest.fixture
def lasting_agent(fakes: tuple[FakeEngine, Agent]) -> Agent:
    return fakes[1]


def cut_short(sock: socket.socket) -> None:
    sock.sendall(HEAD_OK + b'Content-Length: 100\r\n\r\n[{"Id": "')


@pytest.mark.parametrize("answer, status, words", [
    pytest.param(b"", 502, "", id="hangs up without a word"),
    pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", 502, "", id="is not HTTP at all"),
    pytest.param(b"HTTP/1.1 200", 502, "", id="head cut short"),
    pytest.param(HEAD_OK, 502, "disconnected", id="headers cut short"),
    pytest.param(HEAD_OK + b"X: 7\r\n" * 9000, 502, "", id="head without an end"),
    pytest.param(http_answer(b"<html>"), 502, "not JSON", id="200 that is not JSON"),
    pytest.param(http_answer(b""), 502, "not JSON", id="200 with nothing in it"),
    pytest.param(cut_short, 502, "", id="half a body"),
    pytest.param(HEAD_OK + b"Content-Length: 9\r\n\r\n{}", 502, "", id="half a body, valid JSON"),
    pytest.param(chunked_answer(b"[]", end=False), 502, "", id="no last chunk, valid JSON"),
    pytest.param(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 502, "", id="bad chunk"),
    *(
        pytest.param(
            HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n{}",
            502,
            "",
            id=f"chunk of {len(size)} characters below zero",
        )
        for size in (b"-5", b"-" + b"f" * 40)
    ),
    pytest.param(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n", 502, "",
                 id="chunk with no line end"),
    pytest.param(http_answer(b"<html>", 500), 502, "500", id="500 of a proxy in between"),
    pytest.param(http_answer(b"Forbidden", 403), 502, "Forbidden", id="403 of a proxy"),
    pytest.param(http_answer({"message": "why", "status": 403}, 403), 403, "why",
                 id="403 of another API"),
    pytest.param(http_answer({"message": None}, 404), 502, "404", id="404 that says null"),
    pytest.param(http_answer(b"null", 404), 502, "404", id="404 whose JSON is no object"),
    pytest.param(http_answer({"message": "why"}, 302), 502, "why", id="redirect not followed"),
    pytest.param(http_answer({"message": "why"}, 503), 502, "why", id="503 is not the agent's"),
    *(
        pytest.param(
            http_answer({"message": "ünique"}, kept), kept, "ünique", id=f"{kept} stays"
        )
        for kept in (400, 401, 403, 404, 409, 500, 501)
    ),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["call", "stream"])
def test_engine_failures(fakes, answer, status, words, stream):
    fake, agent = fakes
    if stream:
        fake.script["POST /images/create"] = answer
        reply = agent.post("/api/v1/images/pull", {"image": "x"})
        if answer == http_answer(b""):  # a pull with nothing to say is no failure
            status, words = 404, ""  # but the image is not there afterwards
        if status == 500:  # nothing says that it was not the registry
            status = 502
    else:
        fake.script[INSPECT] = answer
        reply = agent.get(ONE)
    assert_envelope(reply, status, words)
    assert agent.get("/health").status == 200


@pytest.mark.parametrize("asked, path, answer", [
    pytest.param("GET", "/containers/json", http_answer({}), id="list is an object"),
    pytest.param("GET", "/containers/json", http_answer([1]), id="list of numbers"),
    pytest.param("GET", "/containers/json", http_answer([{}]), id="container has no id"),
    pytest.param("POST", "/containers/create", http_answer([], 201), id="created is a list"),
    pytest.param("POST", "/containers/create", http_answer({}, 201), id="created has no id"),
    pytest.param("POST", "/containers/create", http_answer({"Id": "../x"}, 201),
                 id="id that is none"),
    pytest.param("POST", "/containers/c1/stop", b"", id="container is null"),
])  # fmt: skip
def test_json_of_another_shape_is_no_bug_of_the_agent(fakes, asked, path, answer):
    fake_engine, fake_agent = fakes
    fake_engine.script[f"{asked} {path}"] = answer
    fake_engine.script[INSPECT] = http_answer(None)
    target = "/api/v1/containers" if "c1" not in path else f"{ONE}/stop"
    body = {"image": "x"} if path.endswith("create") else None
    assert_envelope(fake_agent.request(asked, target, body), 502)


# What an Engine sends of one container and all that belongs to it, as far as the agent reads it.
LABELS = {"a": "b", "dockeragent.key": "ci", "dockeragent.was": "{}"}
OF_IMAGE = {"Labels": {"a": "b"}, "Volumes": {"/v": {}}}
OF_IMAGE["Healthcheck"] = {"Test": ["CMD", "true"], "Interval": 10**10, "StartInterval": 0}
USED = {"Mounts": [{"Type": "volume", "Name": "vol", "Destination": "/v", "RW": True}]}
INSPECTED = {
    "Id": "c1",
    "Name": "/web",
    "Image": "sha256:1",
    "Config": {**OF_IMAGE, "Labels": LABELS, "Image": "a", "StopTimeout": 1, "StopSignal": "KILL"},
    "HostConfig": {"AutoRemove": False, "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}},
    "State": {"Running": True, "Status": "running", "StartedAt": "2026", "Health": {"Status": ""}},
    "ImageManifestDescriptor": {"platform": {"architecture": "386"}},
    **USED,
}
LISTED = {"Id": "c1", "Names": ["/web"], "Image": "a", "ImageID": "sha256:1", "Labels": LABELS}
LISTED.update(State="running", Status="Up (healthy)", Ports=[{"PrivatePort": 1}], Created=1)
LISTED.update(NetworkSettings={"Networks": {"net": {"NetworkID": "f"}}}, **USED)
NETWORK = {"Id": "f", "Name": "net", "Driver": "bridge", "Internal": False, "Labels": LABELS}
NETWORK["IPAM"] = {"Config": [{"Subnet": "10.0.0.0/8"}]}
IMAGE_ROW = {"Id": "sha256:1", "RepoTags": ["a:1"], "RepoDigests": ["a@b"], "Size": 1, "Created": 1}
SHAPED = {
    "GET /containers/c1/json": INSPECTED,
    "GET /containers/web/json": INSPECTED,
    "GET /containers/json": [LISTED],
    "GET /images/json": [IMAGE_ROW],
    "GET /images/docker.io/library/a%3Alatest/json": {"Id": "sha256:1", "Config": OF_IMAGE},
    "GET /images/sha256%3A1/json": {"Id": "sha256:1", "Created": "2026", "Metadata": {}},
    "GET /networks": [NETWORK],
    "GET /networks/net": NETWORK,
    "GET /volumes": {"Volumes": [{"Name": "vol", "Driver": "local", "Labels": {"a": "b"}}]},
    "GET /volumes/vol": {"Name": "vol", "Driver": "local", "Options": {}},
    "POST /containers/create": {"Id": "c1", "Warnings": ["w"]},
    "POST /containers/c1/start": {"message": "why"},
}
SHAPED_BODY = {"image": "a", "name": "web", "networks": ["net"]}
SHAPED_BODY["volumes"] = [{"source": "vol", "target": "/v"}]
OTHERS = (None, 7, "\ud800", [], [None], {"a": 7})


def changed_somewhere(value: Any) -> Iterator[Any]:
    """Copies of a JSON value, each with another value somewhere in it, or with a member less."""
    yield from OTHERS
    if isinstance(value, list):
        yield from ([other] for other in changed_somewhere(value[0]))
    if isinstance(value, dict):
        yield from ({k: v for k, v in value.items() if k != name} for name in value)
        yield from ({**value, k: new} for k, v in value.items() for new in changed_somewhere(v))


def test_value_of_another_type_is_no_bug_of_the_agent(fake_engine, tmp_path):
    allow = ["read", "inspect", "operate", "create", "images", "networks", "volumes", "metrics"]
    entry = {"name": "ci", "key": "ci", "allow": allow, "cache": True, "containers": ["web"]}
    entry.update(images=["a"], networks=["net"], volumes=["vol"], labels=["*"])
    kinds = ("containers/web", "containers", "images", "networks", "volumes")
    asked: list[Any] = [("GET", f"/api/v1/{kind}", None) for kind in kinds]
    asked += [("GET", "/metrics", None), ("POST", "/api/v1/containers", SHAPED_BODY)]
    joined = {"image": "a", "name": "web", "network_mode": "container:web"}
    asked += [("POST", "/api/v1/containers", joined)]
    asked += [("POST", "/api/v1/containers/web/start", None)]
    asked += [("POST", "/api/v1/images/prune", {"keep": 0, "dry_run": True})]
    sound = {name: http_answer(value) for name, value in SHAPED.items()}
    env = {"DOCKER_HOST": fake_engine.url, "KEYS_FILE": keys_file(tmp_path, entry)}
    with Agent(**env) as agent, contextlib.ExitStack() as stack:
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=60)
        stack.callback(connection.close)

        def ask(key: str, method: str, target: str, body: Any) -> tuple[int, bytes]:
            data = body and json.dumps(body)  # on one connection: they are thousands
            connection.request(method, target, data, {"X-API-Key": key})
            response = connection.getresponse()
            return response.status, response.read()

        def read_by(key: str, call: tuple[str, str, Any]) -> set[str]:
            ask(key, *call)
            return {f"{each.method} {each.target.partition('?')[0]}" for each in seen()}

        seen, fake_engine.script = fake_engine.requests, {**sound}
        pairs = [(key, call, read_by(key, call)) for key in (KEY, "ci") for call in asked]
        for path, shape in SHAPED.items():
            assert any(path in paths for *_, paths in pairs)
            for value in changed_somewhere(shape):
                fake_engine.script = {**sound, path: http_answer(value)}
                for key, call, paths in pairs:
                    if path in paths:
                        status, text = ask(key, *call)
                        assert status in (200, 201, 403, 404, 409, 502), (value, call, text)


@pytest.mark.parametrize("options", [0, False, "", [], {"o": None}, {"o": 7}])
def test_options_that_are_none_do_not_pass_for_no_options(options):
    """With options a volume may be any folder of the host."""
    with pytest.raises(da.EngineError, match="Options is not of the expected shape"):
        da.decode_response(json.dumps({"Driver": "local", "Options": options}).encode())


def test_timeout_of_the_containers_own_is_bounded(fakes):
    fake_engine, fake_agent = fakes
    config = {"Id": "c1", "Config": {"StopTimeout": 3_000_000}}
    fake_engine.script[INSPECT] = http_answer(config)
    fake_engine.script["POST /containers/c1/stop"] = http_answer(b"", 204)
    assert fake_agent.post(f"{ONE}/stop").status == 200


def test_absolute_form_has_the_path_it_says(fakes):
    _, fake_agent = fakes
    query = "http://a?x=/api/v1/containers"
    for target, status in ((query, b"404"), ("http://a/api/v1/containers", b"401")):
        request = f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        assert fake_agent.raw(request.encode())[9:12] == status


@pytest.mark.parametrize("size", [100, 300_000, 20_000_000])
@pytest.mark.parametrize(
    "framing", [b"Content-Length: %d\r\nConnection: close\r\n", b"", b"Content-Length: %d\r\n"]
)
def test_answer_of_any_size_and_framing_is_whole(fakes, size, framing):
    fake_engine, fake_agent = fakes
    body = b'{"Id": "' + b"x" * size + b'"}'
    head = framing % len(body) if framing else b""
    fake_engine.script[INSPECT] = HEAD_OK + head + b"\r\n" + body
    reply = fake_agent.get(ONE)
    assert (reply.status, len(reply.body)) == (200, len(body))
    assert reply.body == body


def test_answer_past_64_mib_is_not_read_to_its_end(fake_engine, fake_agent):
    sent = queue.Queue()

    def endless(sock: socket.socket) -> None:
        sock.sendall(HEAD_OK + b"\r\n[")
        size = 0
        with contextlib.suppress(OSError):
            while size < 200 * 2**20:
                size += sock.send(b" " * 2**20)
        sent.put(size)

    fake_engine.script[LIST] = endless
    assert_envelope(fake_agent.get("/api/v1/containers"), 502, "too large")
    assert 64 * 2**20 <= sent.get(timeout=WAIT) < 80 * 2**20


@LONG_WAITS.append
def silence_and_drips_end_in_504(folder, _):
    """It takes the 30 s of a call's timeout: all three at once."""
    over = threading.Event()

    def drip(sock: socket.socket) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: 1000\r\n\r\n")
        while not over.wait(1):
            sock.sendall(b" ")

    def drip_head(sock: socket.socket) -> None:
        while not over.wait(1):
            sock.sendall(b"HTTP/1.1 200 OK"[:1])

    scripts = {"silent": lambda sock: over.wait(60), "drip": drip, "head": drip_head}
    with FakeEngine(folder / "e.sock") as fake, Agent(DOCKER_HOST=fake.url) as agent:
        fake.script = {f"GET /containers/{what}/json": scripts[what] for what in scripts}
        replies = at_once(lambda what: agent.get(f"/api/v1/containers/{what}"), scripts)
        over.set()
    assert [reply.status for reply in replies] == [504] * 3


@pytest.mark.parametrize("times, status", [(1, 200), (2, 502)], ids=["once", "but not twice"])
def test_get_is_retried_when_the_idle_connection_was_closed(fake_engine, fake_agent, times, status):
    """The Engine closes it at the very moment that the agent asks: no poll can foresee that."""
    dropped = []

    def keep_then_drop(sock: socket.socket) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: 2\r\n\r\n{}")
        dropped.append(sock.recv(65536))

    answers = [keep_then_drop, *[b""] * (times - 1), *[http_answer({})] * 9]

    def script(sock: socket.socket) -> None:
        answer = answers.pop(0)
        sock.sendall(answer) if isinstance(answer, bytes) else answer(sock)

    fake_engine.script[INSPECT] = script
    assert fake_agent.get(ONE).status == 200
    assert fake_agent.get(ONE).status == status
    assert dropped[0].startswith(b"GET ") and len(fake_engine.requests()) == 2
    assert fake_agent.get(ONE).status == 200


def test_connections_that_a_burst_has_left_are_closed_by_the_next_request(fake_engine, fake_agent):
    all_are_here, is_over = threading.Barrier(8), threading.Event()

    def answer(sock: socket.socket) -> None:
        all_are_here.wait(WAIT)
        sock.sendall(HEAD_OK + b"Content-Length: 2\r\n\r\n[]")
        is_over.wait(3 * WAIT)

    def open_files() -> int:
        return len(os.listdir(f"/proc/{fake_agent.process.pid}/fd"))

    before = open_files()
    fake_engine.script[LIST] = answer
    replies = at_once(lambda _: fake_agent.get("/api/v1/containers"), range(8))
    assert [reply.status for reply in replies] == [200] * 8
    left = open_files()
    fake_engine.script[LIST] = http_answer([])
    time.sleep(da.IDLE_CONNECTION)
    assert fake_agent.get("/api/v1/containers").status == 200
    is_over.set()
    most = min(before + 1, left - 7)  # before may count some of its start, and left has eight
    until(lambda: open_files() <= most, "no more open files than one connection")


def test_what_the_engine_says_unasked_is_nobodys_answer(fake_engine, fake_agent):
    forged = HEAD_OK + b"Content-Length: 11\r\n\r\n" + b'{"Id":"XX"}'
    said = threading.Event()

    def twice(sock: socket.socket) -> None:
        sock.sendall(HEAD_OK + b"Content-Length: 2\r\n\r\n{}")
        time.sleep(0.05)
        sock.sendall(forged)
        said.set()
        sock.recv(1)

    fake_engine.script[INSPECT] = twice
    assert fake_agent.get(ONE).json() == {}
    assert said.wait(WAIT)
    fake_engine.script[INSPECT] = http_answer({"Id": "own"})
    assert fake_agent.get(ONE).json() == {"Id": "own"}


def test_interim_answers_are_skipped(fakes):
    fake, agent = fakes
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n"
    fake.script[INSPECT] = interim + http_answer({"Id": "x"})
    assert agent.get(ONE).json() == {"Id": "x"}
    fake.script[INSPECT] = b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 200 OK\r\n\r\n{}"
    assert_envelope(agent.get(ONE), 502)


@pytest.mark.parametrize("answer, kept", [
    pytest.param(HEAD_OK + b"Content-Length: 2\r\n\r\n{}", 1, id="whole"),
    pytest.param(HEAD_OK + b"Content-Length: 3\r\n\r\n{}", 0, id="not read to its end"),
    pytest.param(HEAD_OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", 0,
                 id="the last one"),
    pytest.param(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", 0, id="no longer HTTP"),
])  # fmt: skip
def test_connection_is_kept_once_for_another_request(answer, kept):
    """Kept twice, it would be two requests' at once."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(answer)
        pool: list[Any] = []
        response = da.exchange(ours, da.Call("GET", "/"), "/", time.monotonic() + WAIT, pool)
        response.read_part(time.monotonic() + WAIT)
        response.close()
        response.close()
    assert [sock for _, sock in pool] == [ours] * kept


def test_chunk_that_has_begun_is_read_past_the_deadline():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(HEAD_OK + b"Transfer-Encoding: chunked\r\n\r\n")
        response = da.exchange(ours, da.Call("GET", "/"), "/", time.monotonic() + WAIT)
        assert response.read_part(time.monotonic()) is None
        theirs.sendall(b"5\r\nabcde")
        rest = threading.Timer(1, theirs.sendall, [b"\r\n"])
        rest.start()
        assert until(lambda: response.read_part(time.monotonic() + 0.5), "the chunk") == b"abcde"
        rest.join()
        response.close()


def test_response_that_does_not_come_is_closed_at_once(monkeypatch):
    """Left to the garbage collector, its file may be closed before it, which Python reports."""
    reports: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        try:
            da.exchange(ours, da.Call("GET", "/"), "/", time.monotonic() + 0.01)
        except OSError as error:
            cycle = {"error": error}
            cycle["itself"] = cycle
        del cycle
        gc.collect()
    assert reports == []


def test_full_backlog_of_the_engine_is_waited_for(tmp_path):
    """Linux refuses a connect that must not block at once, where others would wait for room."""
    with FakeEngine(tmp_path / "engine.sock") as fake, Agent(DOCKER_HOST=fake.url) as agent:
        fake.script["GET /containers/c1/json"] = http_answer({"Id": "c1", "Name": "/c1"})
        fake.script["POST /containers/c1/kill"] = http_answer(b"", 204)
        fake.script[INSPECT] = http_answer({"Id": "c1", "Name": "/c1"})
        assert agent.post(f"{ONE}/kill").status == 200
        fake.socket.listen(0)
        replies = at_once(agent.post, [f"{ONE}/kill"] * 60)
    assert [reply.status for reply in replies] == [200] * 60


def test_engine_on_tcp_is_unreachable_without_a_thread_for_the_look_up_of_its_name():
    code = "threading.stack_size(2**46)  # of which no address space has room\n"
    code += "print(da.Engine(da.Address(host='localhost', port=9), None).problem())"
    assert "not reachable: no more threads" in in_child("import threading;" + code)


def test_post_is_sent_once_whatever_becomes_of_it(fake_engine, fake_agent):
    idle = threading.Event()

    def keep(sock: socket.socket) -> None:
        sock.sendall(HEAD_OK + b'Content-Length: 11\r\n\r\n{"Id":"c1"}')
        assert sock.recv(65536)[:3] in (b"", b"GET")  # no POST on a connection that may be dying
        idle.set()

    fake_engine.script[INSPECT] = keep
    fake_engine.script["POST /containers/c1/kill"] = b""
    assert fake_agent.get(ONE).status == 200
    assert_envelope(fake_agent.post(f"{ONE}/kill"), 502)
    assert [seen.method for seen in fake_engine.requests()].count("POST") == 1
    assert fake_agent.get(ONE).status == 200 and idle.wait(WAIT)


class VersionHandler(FakeEngineHandler):
    """As FakeEngineHandler; also notes the version in each target but of an agent's own looks."""

    def setup(self) -> None:
        first = self.request.recv(4096, socket.MSG_PEEK).decode()
        found = re.match(r"\w+ /v([0-9.]+)(/\S+)", first)
        if found and not is_own_look(found[2]):
            self.server.versions.append(found[1])
        super().setup()


@pytest.fixture
def versions(fake_engine: FakeEngine) -> list[str]:
    """The versions that the agent asks fake_engine with."""
    fake_engine.RequestHandlerClass = VersionHandler
    fake_engine.versions = []
    fake_engine.script[LIST] = http_answer([])
    return fake_engine.versions


@pytest.mark.parametrize(
    "offered, used",
    [
        pytest.param("1.24", "1.24", id="old Engine"),
        pytest.param("1.41", "1.41", id="Engine of the tests"),
        pytest.param("1.9", "1.9", id="numbers, not strings, are compared"),
        pytest.param("1.999", "1.51", id="Engine from the future"),
    ],
)
def test_version_is_negotiated(fake_engine, versions, offered, used):
    fake_engine.script["GET /_ping"] = ping(offered)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert agent.get("/api/v1/containers").status == 200
    assert versions == [used]


@pytest.mark.parametrize("answer", [ping("x"), http_answer(b"OK"), http_answer({}, 500)])
def test_ping_of_something_else(fake_engine, versions, answer):
    fake_engine.script["GET /_ping"] = answer
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert_envelope(agent.get("/api/v1/containers"), 502)
        assert agent.get("/health").status == 503
    assert versions == []


@pytest.mark.parametrize("pinned", ["", "1.30"], ids=["negotiated", "pinned"])
def test_upgraded_engine_is_asked_again_with_its_new_version(fake_engine, versions, pinned):
    too_old = "client version is too old. Minimum supported API version is 1.44"

    def choosy(sock: socket.socket) -> None:
        good = versions[-1] == "1.47"
        sock.sendall(http_answer({}, 200) if good else http_answer({"message": too_old}, 400))

    fake_engine.script[INSPECT] = http_answer({"Id": "c1"})
    fake_engine.script["POST /containers/c1/start"] = choosy
    with Agent(DOCKER_HOST=fake_engine.url, DOCKER_API_VERSION=pinned) as agent:
        assert agent.get("/api/v1/containers").status == 200
        fake_engine.script["GET /_ping"] = ping("1.47")
        reply = agent.post(f"{ONE}/start")
        if pinned:
            assert_envelope(reply, 400, too_old)
            assert set(versions) == {pinned}
            return
        assert reply.status == 200
        assert versions == [*["1.41"] * 4, "1.47"]  # of a list, of two looks, and of the start
        fake_engine.script[INSPECT] = http_answer({"message": "a real one"}, 400)
        assert_envelope(agent.get(ONE), 400, "a real one")
        assert versions[5:] == ["1.47"]  # the same version again would be the same refusal


def test_pinned_version_that_the_engine_refuses_is_nobodys_fault_but_the_variables(engine):
    with Agent(DOCKER_API_VERSION="1.99") as agent:
        for reply in (agent.get("/api/v1/containers"), agent.post("/api/v1/containers/x/start")):
            assert_envelope(reply, 502, "DOCKER_API_VERSION=1.99")
        assert agent.get("/health", key="").status == 503
        until(lambda: "DOCKER_API_VERSION=1.99" in json.dumps(agent.log), "a warning")
    with Agent(DOCKER_API_VERSION="1.40") as agent:
        assert agent.get("/health", key="").status == 200
        assert_envelope(agent.get("/api/v1/containers/none-such"), 404)


@LONG_WAITS.append
def health_answers_within_4_seconds_of_an_engine_that_swallows_everything(folder, _):
    with FakeEngine(folder / "e.sock") as fake, Agent(DOCKER_HOST=fake.url) as agent:
        fake.script["GET /_ping"] = lambda sock: time.sleep(3 * WAIT)
        ask = functools.partial(agent.get, key="", timeout=4)
        time.sleep(da.HEALTH_KEPT)  # what the start was told is too old by now
        # One result is for all of them.
        assert [reply.status for reply in at_once(ask, ["/health"] * 3)] == [503] * 3
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        # Linux takes one more than the backlog; further connections hang without an answer.
        port, crowd = full.getsockname()[1], []
        for _ in range(3):
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(("127.0.0.1", port))
        with Agent(DOCKER_HOST=f"tcp://127.0.0.1:{port}") as agent:
            assert agent.get("/health", key="", timeout=4).status == 503
        for sock in crowd:
            sock.close()


def test_name_server_that_swallows_everything_holds_up_no_health():
    code = """
import socket, threading
socket.getaddrinfo = lambda *arguments, **options: threading.Event().wait()
print(da.Engine(da.parse_engine("tcp://engine:2375"), None).problem())
"""
    assert "its name is not resolved in time" in in_child(code)


@pytest.mark.parametrize("hosts", [("127.0.0.2", "127.0.0.3"), ("127.0.0.3", "127.0.0.2")])
def test_each_address_of_a_host_is_tried(monkeypatch, hosts):
    look_up = socket.getaddrinfo

    def several(host: str, *arguments: Any, **options: Any) -> list[Any]:
        names = {"engine": hosts}.get(host, [host])
        return [found for name in names for found in look_up(name, *arguments, **options)]

    with socket.create_server(("127.0.0.2", 0)) as server:
        monkeypatch.setattr(socket, "getaddrinfo", several)
        address = da.parse_engine(f"tcp://engine:{server.getsockname()[1]}")
        with da.connect_tcp(address, time.monotonic() + WAIT) as sock:
            assert sock.getpeername() == server.getsockname()


def test_host_that_is_no_name_is_told_at_once():
    code = 'print(da.Engine(da.parse_engine("tcp://a..b:2375"), None).problem())'
    assert "idna" in in_child(code)


def test_turn_that_does_not_come_is_503_and_each_turn_ends():
    lock = threading.Lock()
    with da.hold(lock, 0, "others"):
        with pytest.raises(da.ApiError, match="others") as refused, da.hold(lock, -1, "others"):
            pytest.fail("it was held twice")
        assert refused.value.status == 503 and lock.locked()
    with contextlib.suppress(KeyError), da.hold(lock, 0, "others"):
        raise KeyError
    assert not lock.locked()


@contextlib.contextmanager
def outlived_by_nothing(thing: Any) -> Iterator[None]:
    """Fail if something holds a thing afterwards, until Python looks for such cycles by itself."""
    trace = weakref.ref(thing)
    del thing
    gc.disable()
    try:
        yield
        until(lambda: trace() is None, "the end of all that held it")
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "host",
    cases(
        ("it is refused", ""),
        ("there is no connection", "tcp://127.0.0.1:1"),
        ("the host has no address", "tcp://a..b:1"),
    ),
)
def test_call_leaves_nothing_behind_when(host, fakes):
    engine = da.Engine(da.parse_engine(host or fakes[0].url), None)
    ours, theirs = socket.socketpair()
    with theirs, outlived_by_nothing(ours):
        with ours, contextlib.suppress(da.EngineError):
            engine.call("POST", "/x", interrupts=da.Interrupts(ours))
        del ours


def test_waiting_for_the_engine_costs_one_stranger_at_a_time(fake_engine):
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert agent.get("/health", key="").status == 200
        release = threading.Event()
        asked = threading.Event()

        def hang(sock: socket.socket) -> None:
            asked.set()
            release.wait(WAIT)

        fake_engine.script["GET /_ping"] = hang
        first = threading.Thread(target=agent.get, args=("/health",), kwargs={"key": ""})
        until(
            lambda: first.is_alive() or asked.is_set() or time.sleep(1.1) or first.start() or True,
            "",
        )
        until(asked.is_set, "the one who waits")
        assert agent.get("/health", key="", timeout=1).status == 200
        release.set()
        first.join()


def test_refusal_is_tried_again_once_whatever_version_is_offered_next(fake_engine, versions):
    offers = itertools.cycle(["1.44", "1.45"])
    fake_engine.script["GET /_ping"] = lambda sock: sock.sendall(ping(next(offers)))
    fake_engine.script[INSPECT] = http_answer({"Id": "c1"})
    fake_engine.script["POST /containers/c1/start"] = http_answer({"message": "no"}, 400)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert_envelope(agent.post(f"{ONE}/start"), 400, "no")
    # Once, if what the agent looks for by itself has used up the other offer meanwhile.
    assert 1 <= len(fake_engine.changes()) <= 2


def test_upgrade_that_no_request_met_is_noticed(fake_engine, versions):
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert agent.get("/api/v1/containers").status == 200
        fake_engine.script["GET /_ping"] = ping("1.45")
        until(lambda: agent.get("/api/v1/containers") and versions[-1] == "1.45", "the new version")


def test_engine_goes_and_comes_back(tmp_path):
    path = tmp_path / "engine.sock"
    with Agent(DOCKER_HOST=f"unix://{path}") as agent:  # it starts without the Engine too
        assert_envelope(agent.get("/api/v1/containers"), 503, str(path))
        for version in ("1.41", "1.44"):
            with FakeEngine(path) as fake:
                fake.RequestHandlerClass, fake.versions = VersionHandler, []
                fake.script.update({"GET /_ping": ping(version), LIST: http_answer([])})
                assert agent.get("/api/v1/containers").status == 200
                assert fake.versions == [version]
                until(lambda: agent.get("/health").status == 200, "a good health")
            assert_envelope(agent.get("/api/v1/containers"), 503, str(path))
            sick = until(
                lambda: (r := agent.get("/health")).status == 503 and r, "a bad one"
            ).json()
            assert sick.pop("timestamp")
            assert sick == {"status": "degraded", "docker": "unreachable"}
            # The log alone says why.
            probes = [line for line in agent.lines("request") if line["route"] == "/health"]
            assert {line["status"] for line in probes if "error" not in line} == {200}
            assert str(path) in [line for line in probes if line["status"] == 503][-1]["error"]
            path.unlink()


def test_engine_upgraded_between_two_stops(fake_engine, fake_agent):
    fake_engine.script[INSPECT] = http_answer({"Id": "c1", "Config": {}})
    fake_engine.script["POST /containers/c1/stop"] = http_answer(b"", 204)
    stop = {"timeout": 1, "signal": "usr1"}
    assert_envelope(fake_agent.post(f"{ONE}/stop", stop), 400, "signal", "1.42")
    assert fake_engine.changes() == []
    fake_engine.script["GET /_ping"] = ping("1.44")
    assert fake_agent.post(f"{ONE}/stop", stop).status == 200
    assert [seen.target for seen in fake_engine.changes()] == [
        "/containers/c1/stop?t=1&signal=SIGUSR1"
    ]


def test_health_asks_the_engine_once_a_second(fake_engine, fake_agent):
    asked = threading.Semaphore(0)
    fake_engine.script["GET /_ping"] = lambda sock: (asked.release(), sock.sendall(ping("1.41")))
    until(lambda: fake_agent.get("/health") and asked.acquire(blocking=False), "a ping")
    began = time.monotonic()
    at_once(lambda _: [fake_agent.get("/health", key="") for _ in range(40)], range(8))
    most = int(time.monotonic() - began) + 2
    assert sum(asked.acquire(blocking=False) for _ in range(400)) <= most


# --------------------------------------------------------------------------------------------------
# The life of a container on the real Engine
# --------------------------------------------------------------------------------------------------

TEST_LABEL = {LABEL: "1"}
AGENT_LABELS = dict.fromkeys((da.OWN_LABELS + name for name in da.AGENT_LABELS), "")


def dig(value: Any, path: str) -> Any:
    """What is at a path such as "HostConfig.Memory" in an inspect."""
    for name in path.split("."):
        value = value[int(name) if isinstance(value, list) else name]
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def fetch(port: int, path: str) -> bytes:
    """The answer of a container's httpd at a published port, b"" while there is none."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return read_to_end(sock)
    return b""


@pytest.fixture
def network(engine: RealEngine) -> Iterator[Callable[[], str]]:
    """Makes networks, and removes them after the test; to be asked for before `name`."""
    made = []

    def make() -> str:
        made.append("da-" + secrets.token_hex(4))
        status, answer = engine.call("POST", "/networks/create", {"Name": made[-1]})
        assert status == 201, answer
        return made[-1]

    yield make
    for one in made:
        engine.call("DELETE", f"/networks/{one}")
        engine.call("DELETE", f"/volumes/{one}")  # where a test has named one so


PROBE = """exec 2>&1
id -u; id -g; hostname; pwd; echo "$A|$EMPTY|$0"
echo no > /ro/x || cat /ro/seen; echo out > /data/out && echo bind-rw
grep -c " /vol " /proc/mounts; touch /scratch/x && grep " /scratch " /proc/mounts | cut -d " " -f 3
exec httpd -f -p 8080 -h /data
"""


def test_every_field_reaches_the_engine(agent, engine, network, name, tmp_path):
    front, back = network(), network()
    tcp = free_port()
    tmp_path.chmod(0o755)
    for folder in ("data", "ro: and colon"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder).chmod(0o777)
        (tmp_path / folder / "seen").write_text("seen\n")
    ro = str(tmp_path / "ro: and colon")
    created = agent.post(
        "/api/v1/containers",
        {
            "image": IMAGE,
            "name": name,
            "entrypoint": ["/bin/sh", "-c", PROBE],
            "cmd": ["zero"],
            "env": ["A=1=2 ü", "EMPTY="],
            "labels": {**TEST_LABEL, "a.b/c": 'ü "quoted"'},
            "working_dir": "/srv",
            "user": "1000:1001",
            "hostname": "web.example",
            "ports": [
                {"container_port": "8080", "host_port": str(tcp), "host_ip": "127.0.0.1"},
                {"container_port": 8080, "host_port": "", "host_ip": "127.0.0.1"},
                {"container_port": 53, "protocol": "udp", "host_ip": "127.0.0.1"},
            ],
            "volumes": [
                {"source": str(tmp_path / "data"), "target": "/data"},
                {"source": ro, "target": "/ro", "read_only": True, "type": "bind"},
                {"source": front, "target": "/vol"},
                {"target": "/scratch", "type": "tmpfs"},
            ],
            "networks": [front, back],
            "restart_policy": {"name": "on-failure", "max_retry_count": 3},
            "resources": {"cpus": 1.5, "memory_mb": 64, "cpu_shares": 512},
        },
    )
    assert created.status == 201, created.body
    container = created.json()["id"]
    assert created.headers["location"] == f"/api/v1/containers/{container}"
    assert created.json() == {"id": container, "warnings": []}
    inspect = engine.inspect(name)
    expected = {
        "Id": container,
        "State.Status": "running",
        "Config.Image": IMAGE,
        "Config.Entrypoint": ["/bin/sh", "-c", PROBE],
        "Config.Cmd": ["zero"],
        "Config.WorkingDir": "/srv",
        "Config.User": "1000:1001",
        "Config.Hostname": "web.example",
        f"Config.Labels.{LABEL}": "1",
        "Config.ExposedPorts": {"8080/tcp": {}, "53/udp": {}},
        "HostConfig.PortBindings": {
            "8080/tcp": [
                {"HostIp": "127.0.0.1", "HostPort": str(tcp)},
                {"HostIp": "127.0.0.1", "HostPort": ""},
            ],
            "53/udp": [{"HostIp": "127.0.0.1", "HostPort": ""}],
        },
        "HostConfig.NetworkMode": front,
        "HostConfig.RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "HostConfig.NanoCpus": 1_500_000_000,
        "HostConfig.Memory": 64 * 2**20,
        "HostConfig.CpuShares": 512,
        "HostConfig.Privileged": False,
        "HostConfig.AutoRemove": False,
    }
    assert {path: dig(inspect, path) for path in expected} == expected
    assert inspect["Config"]["Labels"]["a.b/c"] == 'ü "quoted"'
    assert {"A=1=2 ü", "EMPTY="} <= set(inspect["Config"]["Env"])
    assert set(inspect["NetworkSettings"]["Networks"]) == {front, back}
    mounts = {
        (mount["Type"], mount["Source"] if mount["Type"] == "bind" else mount.get("Name", ""))
        + (mount["Destination"], mount["RW"])
        for mount in inspect["Mounts"]
    }
    assert mounts == {
        ("bind", str(tmp_path / "data"), "/data", True),
        ("bind", ro, "/ro", False),
        ("volume", front, "/vol", True),
        ("tmpfs", "", "/scratch", True),
    }
    picked = {p["HostPort"] for p in inspect["NetworkSettings"]["Ports"]["8080/tcp"]} - {str(tcp)}
    for port in (tcp, int(picked.pop())):
        assert until(lambda port=port: fetch(port, "/seen"), "httpd").endswith(b"\r\n\r\nseen\n")
    assert (tmp_path / "data" / "out").read_text() == "out\n"
    said = engine.logs(name).decode().splitlines()
    assert "Read-only file system" in said.pop(5)
    assert said == (
        ["1000", "1001", "web.example", "/srv", "1=2 ü||zero"] + ["seen", "bind-rw", "1", "tmpfs"]
    )


HOST, SERVE = "HostConfig.", {"cmd": ["sleep", "600"]}
LOCAL = {"host_ip": "127.0.0.1"}


FIELDS = (
    ("hostname with an underscore", {"hostname": "web_1"}, {"Config.Hostname": "web_1"}, ""),
    ("port that the Engine picks", {"ports": [{"container_port": 80, "host_port": 0, **LOCAL}]},
     {f"{HOST}PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}}, ""),
    ("bind with a slash at its end",
     {"volumes": [{"source": "/tmp/", "target": "/d", "read_only": True}]},
     {"Mounts.0.Source": "/tmp", "Mounts.0.RW": False}, ""),
    ("anonymous volume", {"volumes": [{"target": "/v"}]},
     {"Mounts.0.Type": "volume", "Mounts.0.Destination": "/v", "Mounts.0.RW": True}, ""),
    ("size and mode of a tmpfs",
     {"volumes": [{"type": "tmpfs", "target": "/t", "size_mb": 8, "mode": "1750"}]},
     {f"{HOST}Mounts.0.TmpfsOptions": {"SizeBytes": 8 * 2**20, "Mode": 0o1750}},
     "/t size=8192k,mode=1750"),
    ("no limits", {"resources": {"cpus": 0, "memory_mb": 0, "cpu_shares": 0}},
     {f"{HOST}NanoCpus": 0, f"{HOST}Memory": 0, f"{HOST}CpuShares": 0}, ""),
    (
        "limits",
        {"resources": {"memory_mb": 64, "memory_swap_mb": 96, "pids": 99, "shm_size_mb": 32}},
        {
            f"{HOST}Memory": 64 * 2**20,
            f"{HOST}MemorySwap": 96 * 2**20,
            f"{HOST}PidsLimit": 99,
            f"{HOST}ShmSize": 32 * 2**20,
        },
        "/dev/shm size=32768k",
    ),
    ("swap without a limit", {"resources": {"memory_mb": 64, "memory_swap_mb": -1}},
     {f"{HOST}MemorySwap": -1}, ""),
    (
        "ulimits",
        {"resources": {"ulimits": {"nofile": 1000, "core": [0, 0]}}},
        {
            f"{HOST}Ulimits": [
                {"Name": "nofile", "Soft": 1000, "Hard": 1000},
                {"Name": "core", "Soft": 0, "Hard": 0},
            ]
        },
        "files 1000",
    ),
    (
        "check",
        {"healthcheck": {"cmd": ["true"], "interval": 10, "timeout": 0.25, "retries": 3}},
        {
            "Config.Healthcheck.Test": ["CMD", "true"],
            "Config.Healthcheck.Interval": 10 * 10**9,
            "Config.Healthcheck.Timeout": 25 * 10**7,
            "Config.Healthcheck.Retries": 3,
        },
        "",
    ),
    (
        "check of a shell",
        {"healthcheck": {"shell": "exit 0", "start_period": 5}},
        {
            "Config.Healthcheck.Test": ["CMD-SHELL", "exit 0"],
            "Config.Healthcheck.StartPeriod": 5 * 10**9,
        },
        "",
    ),
    ("no check", {"healthcheck": {"disable": True}}, {"Config.Healthcheck.Test": ["NONE"]}, ""),
    ("log with rotation", {"log": {"driver": "json-file", "max_size_mb": 10, "max_files": 3}},
     {f"{HOST}LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}},
     ""),
    ("init", {"init": True}, {f"{HOST}Init": True}, "docker-init"),
    ("terminal", {"tty": True}, {"Config.Tty": True}, ""),
    ("read-only", {"read_only": True}, {f"{HOST}ReadonlyRootfs": True}, "Read-only file system"),
    ("no capability", {"cap_drop": ["ALL"]}, {f"{HOST}CapDrop": ["ALL"]},
     "CapPrm: 0000000000000000"),
    ("no new privileges, beside another option",
     {"no_new_privileges": True, "security_opt": ["seccomp=unconfined"]},
     {f"{HOST}SecurityOpt": ["no-new-privileges", "seccomp=unconfined"]}, "NoNewPrivs: 1"),
    ("how it stops", {"stop_signal": "quit", "stop_timeout": 0},
     {"Config.StopSignal": "SIGQUIT", "Config.StopTimeout": 0}, ""),
    ("hosts", {"extra_hosts": {"db": "10.0.0.5", "six": "fd00::1", "up": "host-gateway"}},
     {f"{HOST}ExtraHosts": ["db:10.0.0.5", "six:fd00::1", "up:host-gateway"]}, "10.0.0.5 db"),
    ("name server", {"dns": ["10.0.0.2"]}, {f"{HOST}Dns": ["10.0.0.2"]}, "nameserver 10.0.0.2"),
    ("platform", {"platform": "linux/amd64"}, {"Platform": "linux"}, ""),
    ("removed at its end", {"auto_remove": True}, {f"{HOST}AutoRemove": True}, ""),
    ("capability", {"cap_add": ["CAP_SYS_TIME"]}, {f"{HOST}CapAdd": ["CAP_SYS_TIME"]}, ""),
    (
        "devices",
        {"devices": ["/dev/zero:/dev/xzero:r", "/dev/full"]},
        {
            f"{HOST}Devices": [
                {
                    "PathOnHost": "/dev/zero",
                    "PathInContainer": "/dev/xzero",
                    "CgroupPermissions": "r",
                },
                {
                    "PathOnHost": "/dev/full",
                    "PathInContainer": "/dev/full",
                    "CgroupPermissions": "rwm",
                },
            ]
        },
        "/dev/xzero",
    ),
    ("sysctl", {"sysctls": {"net.ipv4.ip_forward": "1"}, "network_mode": "none"},
     {f"{HOST}Sysctls": {"net.ipv4.ip_forward": "1"}}, ""),
    ("the host's processes and memory", {"pid_mode": "host", "ipc_mode": "host"},
     {f"{HOST}PidMode": "host", f"{HOST}IpcMode": "host"}, ""),
)  # fmt: skip
# What another field would change, or what changes another.
ALONE = {"terminal", "capability", "sysctl", "the host's processes and memory"}


def containers_of(rows: Iterable[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """The rows by the containers that have them: as few as have each field once."""
    groups: list[list[tuple[Any, ...]]] = []
    for row in rows:
        for group in groups:
            fields = {field for other in group for field in other[1]}
            if not {row[0], group[0][0]} & ALONE and not row[1].keys() & fields:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


@pytest.mark.parametrize("rows", containers_of(FIELDS), ids=lambda rows: rows[0][0])
def test_field_is_what_docker_run_would_make_of_it(agent, engine, name, rows):
    probe = """exec 2>&1; grep -E "NoNewPrivs|CapPrm" /proc/1/status | tr "\t" " "
echo files $(ulimit -n); touch /x; cat /etc/hosts | tr "\t" " "; cat /etc/resolv.conf /proc/1/comm
awk '{print $2, $4}' /proc/mounts | sed -E 's/(rw|nosuid|nodev|noexec|relatime),//g'; ls -d /dev/x*
exec sleep 600"""
    body = {"image": IMAGE, "name": name, "cmd": ["sh", "-c", probe], "labels": TEST_LABEL}
    for _, fields, *_ in rows:
        body.update(fields)
    reply = agent.post("/api/v1/containers", body)
    assert (reply.status, reply.json().get("warnings")) == (201, []), reply.body
    inspect = engine.inspect(name)
    for _, _, expected, _ in rows:
        assert {path: dig(inspect, path) for path in expected} == expected
    wanted = [said.encode() for *_, said in rows if said]

    def is_said() -> bool:
        text = engine.logs(name) if wanted else b""
        return all(said in text for said in wanted)

    until(is_said, f"{wanted}")


def test_several_networks_with_aliases(agent, engine, network, name):
    front, back = network(), network()
    networks = [{"name": front, "aliases": ["db"]}, {"name": back, "aliases": ["db_2", "x"]}]
    body = {"image": IMAGE, "name": name, **SERVE, "networks": networks}
    assert agent.post("/api/v1/containers", body).status == 201
    found = engine.inspect(name)["NetworkSettings"]["Networks"]
    assert set(found) == {front, back}
    assert "db" in found[front]["Aliases"] and {"db_2", "x"} <= set(found[back]["Aliases"])
    assert engine.call("DELETE", f"/networks/{back}")[0] == 403  # it is in use


@pytest.mark.parametrize(
    "version, fields, word",
    cases(
        ("platform", "1.40", {"platform": "linux/amd64"}, "platform: needs Engine API 1.41"),
        ("graphics cards", "1.39", {"gpus": "all"}, "gpus: needs Engine API 1.40"),
        ("init", "1.24", {"init": False}, "init: needs Engine API 1.25"),
        ("nested", "1.28", health(start_period=1)["healthcheck"], "healthcheck.start_period: "),
        ("volumes", "1.24", volume(target="/t"), "volumes: needs Engine API 1.25"),
    ),
)
def test_field_that_the_engine_does_not_know_is_refused(fake_engine, version, fields, word):
    fake_engine.script["GET /_ping"] = ping(version)
    body = image(healthcheck=fields) if "start_period" in fields else image(**fields)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert_envelope(agent.post("/api/v1/containers", body), 400, word)
    assert fake_engine.requests() == []


def test_bind_of_a_limited_key_needs_an_engine_that_leaves_out_what_is_below(fake_engine, tmp_path):
    fake_engine.script["GET /_ping"] = ping("1.39")
    fake_engine.script["GET /images/docker.io/library/a%3Alatest/json"] = http_answer({"Id": "i"})
    entry = {"name": "ci", "key": "ci", "allow": ["create"], "containers": ["web"]}
    entry.update(images=["a"], cache=True, binds=["/srv/a"])
    mounts = [{"source": "/srv/a", "target": "/a"}]
    body = {"image": "a", "name": "web", "network_mode": "none", "volumes": mounts}
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=keys_file(tmp_path, entry)) as agent:
        reply = agent.post("/api/v1/containers", body, key="ci")
    assert_envelope(reply, 400, "volumes[0].non_recursive: needs Engine API 1.40")
    assert fake_engine.changes() == []


@pytest.mark.parametrize("path", ["/t,source=/etc", '/t"', "/t\nsource=/etc"])
def test_path_becomes_no_option_of_a_mount_of_podmans(fake_engine, path):
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        for mount in {"source": "/a", "target": path}, {"source": path, "target": "/a"}:
            reply = agent.post("/api/v1/containers", volume(**mount))
            assert_envelope(reply, 400, "volumes[0]: ", "podman")
    assert fake_engine.requests() == []


def test_bridge_and_tmpfs_are_told_as_docker_run_tells_them(fakes):
    """podman has no network of that name, and takes an empty TmpfsOptions for a mode of 0000."""
    fake, agent = fakes
    fake.script["POST /containers/create"] = http_answer({"message": "seen"}, 409)
    body = {**volume(type="tmpfs", target="/t"), "network_mode": "bridge"}
    fake.requests()
    assert_envelope(agent.post("/api/v1/containers", body), 409, "seen")
    sent = json.loads(fake.changes()[0].body)
    mount = {"Type": "tmpfs", "Target": "/t"}
    assert sent["HostConfig"] == {"Mounts": [mount], "NetworkMode": "bridge"}
    assert sent["NetworkingConfig"] == {"EndpointsConfig": {}}


@pytest.mark.parametrize("gpus, count", [("all", -1), (2, 2)])
def test_graphics_cards_are_told_as_docker_run_tells_them(fakes, gpus, count):
    fake, agent = fakes
    fake.script["POST /containers/create"] = http_answer({"message": "seen"}, 409)
    fake.requests()
    assert_envelope(agent.post("/api/v1/containers", image(gpus=gpus)), 409, "seen")
    sent = json.loads(fake.changes()[0].body)["HostConfig"]
    assert sent == {"DeviceRequests": [{"Count": count, "Capabilities": [["gpu"]]}]}


def test_image_by_an_id_that_is_not_there_is_404_and_not_pulled(fakes):
    fake, agent = fakes
    fake.script["POST /containers/create"] = http_answer({"message": "No such image"}, 404)
    fake.script[f"GET /images/{'f' * 64}/json"] = http_answer({"message": "No such image"}, 404)
    fake.requests()
    reply = agent.post("/api/v1/containers", image(image="f" * 64))
    assert_envelope(reply, 404, "no such image: ffff", "an id cannot be pulled")
    assert [seen.target for seen in fake.changes()] == ["/containers/create"]


def test_inspect_is_byte_for_byte(agent, engine):
    container = engine.run("true")
    with contextlib.closing(UnixConnection(engine.path)) as connection:
        version = engine.call("GET", "/version")[1]["ApiVersion"]
        connection.request("GET", f"/v{version}/containers/{container}/json")
        expected = connection.getresponse().read()
    assert agent.get(f"/api/v1/containers/{container}").body == expected
    assert agent.get(f"/api/v1/containers/{container[:12]}").body == expected


def test_what_is_not_asked_for_is_not_set(agent, engine):
    body = {"image": IMAGE, "cmd": ["true"], "name": None, "labels": TEST_LABEL}
    created = agent.post("/api/v1/containers", body)
    assert created.status == 201, created.body
    inspect = engine.inspect(created.json()["id"])
    agent.delete(f"/api/v1/containers/{created.json()['id']}?force=true")
    assert inspect["State"]["StartedAt"] > "2000"
    host = inspect["HostConfig"]
    assert (host["PortBindings"] or {}, host["Memory"], host["NanoCpus"]) == ({}, 0, 0)
    assert host["NetworkMode"] in ("default", "bridge") and not inspect["Mounts"]


def test_list_has_its_documented_shape(agent, engine, network, name):
    port = free_port()
    agent.post(
        "/api/v1/containers",
        {
            "image": IMAGE,
            "name": name,
            "cmd": ["sleep", "600"],
            "labels": TEST_LABEL,
            "networks": [network()],
            "ports": [{"container_port": "80", "host_port": port, "host_ip": "127.0.0.1"}],
        },
    )

    def row(query: str = "") -> dict[str, Any]:
        rows = agent.get(f"/api/v1/containers{query}").json()["containers"]
        return next((row for row in rows if row["names"] == [f"/{name}"]), {})

    found, inspect = row(), engine.inspect(name)
    assert found.pop("labels").items() >= TEST_LABEL.items()
    assert re.fullmatch("Up .*", found.pop("status")) and isinstance(found.pop("created"), int)
    assert found == {
        "id": inspect["Id"],
        "names": [f"/{name}"],
        "image": IMAGE,
        "image_id": inspect["Image"],
        "command": "sleep 600",
        "state": "running",
        "ports": [{"ip": "127.0.0.1", "private_port": 80, "public_port": port, "type": "tcp"}],
    }
    engine.call("POST", f"/containers/{name}/kill")
    engine.call("POST", f"/containers/{name}/wait")
    assert row() == row("?all=0") == {}
    assert row("?all=T")["state"] == "exited" and row("?all=true")["ports"] == []


ROWS = [
    {"Id": "1" * 64, "Names": ["/web-1"], "Labels": {"tier": "front", "dockeragent.key": "ci"}},
    {"Id": "2" * 64, "Names": ["/db/web-x", "/web-2"], "Labels": {"tier": "back", "a": "b=c"}},
    {"Id": "3" * 64, "Names": ["/webserver"], "Labels": {"note": "a b+c"}},
    {"Id": "4" * 64, "Names": None, "Labels": None},
]


FILTERED = {
    "": "1234",
    "label=tier": "12",
    "label=tier=back": "2",
    "label=a=b%3Dc": "2",  # a value with a =
    "label=note%3Da+b%2bc": "3",  # as curl and browsers encode it
    "label=tier=ba": "",
    "label=tier=": "",
    "name=eb-": "12",  # a part of a name
    "name=w.b": "",  # no pattern
    "name=web-x": "",  # the name of a link
    "name=web&label=tier=front": "1",
    "label=dockeragent.key": "1",
}
# Of another's it sees nothing, nor what is hidden from it.
FILTERED_FOR_CI = {"": "12", "name=webserver": "", "label=dockeragent.key=ci": ""}


def test_list_is_filtered_by_label_name_and_key(fake_engine, tmp_path):
    fake_engine.script["GET /containers/json"] = http_answer(ROWS)
    limited = {"name": "ci", "key": "ci", "allow": ["read"], "containers": ["web-*"]}
    path = keys_file(tmp_path, limited)
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=path) as agent:
        for key, table in ((KEY, FILTERED), ("ci", FILTERED_FOR_CI)):
            for query, names in table.items():
                rows = agent.get(f"/api/v1/containers?{query}", key=key).json()["containers"]
                assert "".join(row["id"][0] for row in rows) == names, query
                labels = {name for row in rows for name in row["labels"]}
                assert ("dockeragent.key" in labels) == (key == KEY and "1" in names), query


@pytest.mark.parametrize("size, is_kept", [(100, True), (600_000, False)])
def test_rows_of_a_large_list_are_not_kept(fake_engine, size, is_kept):
    kept = da.shape_rows.cache_info
    da.shape_rows.cache_clear()
    fake_engine.script[LIST] = http_answer([{"Id": "a", "Labels": {"a": "b" * size}}])
    engine = da.Engine(da.parse_engine(fake_engine.url), None)
    agent = da.Agent(engine, "/", {}, da.Metrics(), set(), None)
    request = da.Request("", da.NEVER, ())
    request.key = da.Key("master", master=True)
    for _ in range(2):
        shown = json.loads(da.list_containers(request, agent).body)["containers"]
        assert shown[0]["labels"] == {"a": "b" * size}
    engine.close()
    assert (kept().currsize, kept().hits) == (int(is_kept), int(is_kept))


@pytest.mark.parametrize(
    "method, path, sent",
    [
        *(("POST", f"/{action}", f"/{action}") for action in "start kill pause unpause".split()),
        ("POST", "/stop", "/stop"),
        ("POST", "/restart", "/restart"),
        ("DELETE", "?force=1", "?force=1"),
    ],
)
def test_action_goes_to_the_full_id_and_is_logged_with_the_name(fakes, method, path, sent):
    fake, agent = fakes
    full = secrets.token_hex(32)
    fake.script["GET /containers/web/json"] = http_answer(
        {"Id": full, "Name": "/web", "Config": {}}
    )
    target = f"/containers/{full}{sent}"
    fake.script[f"{method} {target.partition('?')[0]}"] = http_answer(b"", 204)
    fake.requests()
    assert agent.request(method, f"/api/v1/containers/web{path}").status == 200
    assert [seen.target for seen in fake.changes()] == [target]
    line = until(lambda: [x for x in agent.lines("request") if full in json.dumps(x)], "a line")
    assert line[0]["target"] == {"id": full, "name": "web"}


def test_action_goes_to_the_container_that_has_the_name_once_no_deploy_can_begin(fakes):
    """A deploy has ended between the two looks."""
    fake, agent = fakes
    ids = iter(["a" * 64, "b" * 64])
    fake.script["GET /containers/web/json"] = lambda sock: sock.sendall(
        http_answer({"Id": next(ids), "Name": "/web", "Config": {}})
    )
    fake.script[f"POST /containers/{'b' * 64}/stop"] = http_answer(b"", 204)
    assert agent.post("/api/v1/containers/web/stop").status == 200


def start_failures() -> list[Any]:
    """Rows of fields that the Engine refuses; BUSY is a port in use, FRONT a network."""
    ports = [{"container_port": 80, "host_port": "BUSY", "host_ip": "127.0.0.1"}]
    connected = ["FRONT", "no-such-network"]
    volumes = [{"source": "/proc/no/such", "target": "/x"}]
    first = {"networks": ["no-such"], "network_mode": None}
    return [
        pytest.param({"ports": ports}, 500, "address already in use", id="port in use"),
        pytest.param({"cmd": ["/no/such"]}, 400, "no such file or directory", id="no such command"),
        pytest.param(
            {"working_dir": "/bin/busybox"}, None, "not a directory", id="working_dir is a file"
        ),
        pytest.param({"user": "nobody-here"}, None, "unable to find user", id="no such user"),
        pytest.param(first, 404, "no-such", id="no first network"),
        pytest.param({"networks": connected}, 404, "no-such-network", id="no second network"),
        pytest.param({"volumes": volumes}, 400, "/no/such", id="no source to bind"),
        pytest.param(
            {"resources": {"cpus": 1_000_000}}, 400, "CPUs", id="more cpus than there are"
        ),
        pytest.param(
            {"network_mode": "container:no-such"}, None, "no-such", id="no such container"
        ),
        pytest.param(
            {"cmd": ["/no/such"], "auto_remove": True}, 400, "", id="the Engine removes it, too"
        ),
        pytest.param(
            {"network_mode": None, "networks": [{"name": "bridge", "aliases": ["a"]}]},
            400,
            "alias",
            id="alias on the default bridge",
        ),
    ]


@pytest.mark.parametrize("fields, status, words", start_failures())
def test_failed_start_leaves_nothing(agent, engine, network, name, fields, status, words):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port, front = busy.getsockname()[1], network()
        text = json.dumps(fields).replace('"BUSY"', str(port)).replace("FRONT", front)
        body = {"image": IMAGE, "name": name, "cmd": ["true"], "labels": TEST_LABEL}
        body["network_mode"] = front
        reply = agent.post("/api/v1/containers", {**body, **json.loads(text)})
    assert_envelope(reply, status or reply.status, words)
    assert reply.status in (400, 404, 409, 500)
    assert engine.call("GET", f"/containers/{name}/json")[0] == 404
    assert agent.post("/api/v1/containers", body).status == 201  # a retry with the same name works
    assert_envelope(agent.post("/api/v1/containers", body), 409, name)
    assert engine.inspect(name)["State"]  # and the refused one did not take the first one away


def test_what_cannot_be_rolled_back_is_named(fakes):
    fake, agent = fakes
    fake.script["POST /containers/create"] = http_answer({"Id": "feed" * 16, "Warnings": None}, 201)
    start, whole = f"POST /containers/{'feed' * 16}/start", f"DELETE /containers/{'feed' * 16}"
    fake.script.update({start: http_answer({"message": "no port"}, 500), whole: b""})
    reply = agent.post("/api/v1/containers", {"image": "x"})
    assert_envelope(reply, 500, "no port", "feedfeedfeed", "left behind")
    for status in (404, 409):  # the Engine has removed it, or is about to: auto_remove
        fake.script[whole] = http_answer({"message": "removal in progress"}, status)
        reply = agent.post("/api/v1/containers", {"image": "x"})
        assert (reply.status, reply.json()["message"]) == (500, "no port")
    fake.script[start] = http_answer(b"", 204)
    assert agent.post("/api/v1/containers", {"image": "x"}).json()["warnings"] == []


def in_state(engine: RealEngine, state: str) -> str:
    """Start a container, bring it into a state, and return its id."""
    if state == "absent":
        return "no-such-container"
    container = engine.run("sleep", "600", wait=False)
    call = {"paused": "pause", "exited": "kill"}.get(state)
    if call:
        engine.call("POST", f"/containers/{container}/{call}")
    if state == "exited":
        engine.call("POST", f"/containers/{container}/wait")
    return container


@pytest.mark.parametrize(
    "state, action, status, after",
    [
        ("running", "stop", 200, "exited"),
        ("exited", "stop", 200, "exited"),
        ("running", "start", 200, "running"),  # 304 of the Engine
        ("exited", "start", 200, "running"),
        ("running", "restart", 200, "running"),
        ("exited", "restart", 200, "running"),
        ("running", "kill", 200, "exited"),
        ("exited", "kill", 409, "exited"),
        ("running", "pause", 200, "paused"),
        ("exited", "pause", 409, "exited"),
        ("paused", "pause", 409, "paused"),
        ("paused", "unpause", 200, "running"),
        ("running", "unpause", 500, "running"),
        *(("absent", a, 404, "") for a in "stop start restart kill pause unpause".split()),
    ],
)
def test_lifecycle(agent, engine, state, action, status, after):
    body = {"running": b"", "exited": {}}.get(state)  # an empty one, and none, are all the same
    container = in_state(engine, state)
    reply = agent.post(f"/api/v1/containers/{container}/{action}", body)
    if status == 200:
        done = {"stop": "stopped"}.get(action, action.rstrip("e") + "ed")
        assert (reply.status, reply.json()) == (200, {"message": f"container {done}"})
    else:
        refusal = engine.call("POST", f"/containers/{container}/{action}")
        assert_envelope(reply, status)
        assert reply.status == refusal[0] and reply.json()["message"] in refusal[1]["message"]
    if after:
        until(lambda: engine.inspect(container)["State"]["Status"] == after, after)
        engine.remove(container)


@pytest.mark.parametrize(
    "action, body, said, code",
    [
        ("stop", {"timeout": 1}, b"", 137),
        ("stop", {"timeout": 0}, b"", 137),
        ("kill", {"signal": "usr1"}, b"usr1\n", 0),
        ("kill", {"signal": "SigUsr1"}, b"usr1\n", 0),
        ("kill", {"signal": None}, b"", 137),
    ],
)
def test_timeouts_and_signals(agent, engine, action, body, said, code):
    script = "trap '' TERM; trap 'echo usr1; exit' USR1; echo; while :; do sleep 0.1; done"
    container = engine.run("sh", "-c", script, wait=False, StopTimeout=300)
    until(lambda: engine.logs(container), "the traps")
    assert agent.post(f"/api/v1/containers/{container}/{action}", body).status == 200
    assert engine.call("POST", f"/containers/{container}/wait")[1]["StatusCode"] == code
    assert engine.logs(container)[1:] == said
    engine.remove(container)


def test_signal_on_stop(agent, engine):
    """It is sent where the Engine can, and refused, never ignored, where it cannot."""
    script = "trap 'echo usr1; exit 3' USR1; echo; while :; do sleep 0.1; done"
    container = engine.run("sh", "-c", script, wait=False)
    until(lambda: engine.logs(container), "the trap")
    body = {"timeout": 10, "signal": "USR1"}
    reply = agent.post(f"/api/v1/containers/{container}/stop", body)
    api = engine.call("GET", "/version")[1]["ApiVersion"]
    state = engine.inspect(container)["State"]
    if int(api[2:]) < 42:
        assert_envelope(reply, 400, "signal", api, "1.42", "use kill")
        assert state["Running"]
    else:
        assert (reply.status, state["ExitCode"]) == (200, 3)
    engine.remove(container)


@pytest.mark.parametrize(
    "own, wanted, status",
    cases(
        ("none named", None, "term", 200),
        ("the same", "SIGQUIT", "SIGQUIT", 200),
        ("without SIG", "QUIT", "SIGQUIT", 200),
        ("by number", "3", "quit", 200),
        ("none with a number", "NOSUCH", "TERM", 400),
        ("another", "SIGQUIT", "TERM", 400),
        ("another number", "15", "QUIT", 400),
        ("of a system container", "SIGRTMIN+3", "TERM", 400),
    ),
)
@pytest.mark.parametrize("extra", ["", "Libpod-Api-Version: 5.0.0\r\n"], ids=["1.41", "podman"])
@pytest.mark.parametrize("action", ["stop", "restart"])
def test_signal_of_the_containers_own_needs_none_to_be_sent(
    fakes, own, wanted, status, extra, action
):
    fake, agent = fakes
    version = f"Api-Version: {'1.44' if extra else '1.41'}\r\n"
    fake.script["GET /_ping"] = http_answer(b"OK", extra=version + extra)
    fake.script[INSPECT] = http_answer({"Id": "c1", "Config": {"StopSignal": own}})
    fake.script[f"POST /containers/c1/{action}"] = http_answer(b"", 204)
    fake.requests()
    reply = agent.post(f"{ONE}/{action}", {"timeout": 3, "signal": wanted})
    assert reply.status == status, reply.body
    sent = [f"/containers/c1/{action}?t=3"] if status == 200 else []
    assert [seen.target for seen in fake.changes()] == sent
    assert status == 200 or "use kill" in reply.json()["message"]
    del fake.script["GET /_ping"]
    agent.post(f"{ONE}/{action}", {"signal": wanted})  # it looks anew what the Engine is


@pytest.mark.parametrize("word", ["\u212aILL", "\u017fIGTERM", "9", "SIGSIGTERM", " TERM", "", 9])
@pytest.mark.parametrize("action", ["kill", "stop", "restart"])
def test_what_is_no_signal_never_reaches_the_engine(fakes, action, word):
    fake, agent = fakes
    fake.requests()
    assert_envelope(agent.post(f"{ONE}/{action}", {"signal": word}), 400, "signal")
    assert fake.requests() == []


def test_stop_of_a_container_with_a_negative_timeout_of_its_own(fakes):
    fake, agent = fakes
    fake.script[INSPECT] = http_answer({"Id": "c1", "Config": {"StopTimeout": -100}})
    fake.script["POST /containers/c1/stop"] = http_answer(b"", 204)
    assert agent.post(f"{ONE}/stop").status == 200


def test_remove(agent, engine):
    config = {"Volumes": {"/v": {}}}
    container = engine.run("sleep", "600", wait=False, **config)
    volume = engine.inspect(container)["Mounts"][0]["Name"]
    path = f"/api/v1/containers/{container}"
    refusal = engine.call("DELETE", f"/containers/{container}")
    reply = agent.delete(path)
    assert_envelope(reply, 409)
    assert (409, reply.json()["message"]) == (refusal[0], refusal[1]["message"])
    assert agent.delete(f"{path}?force=0").status == 409
    reply = agent.delete(f"{path}?force=T")
    assert (reply.status, reply.json()) == (200, {"message": "container removed"})
    assert_envelope(agent.delete(path), 404, container)
    assert engine.call("GET", f"/volumes/{volume}")[0] == 200  # no v: the volume stays
    engine.call("DELETE", f"/volumes/{volume}")
    container = engine.run("true", **config)
    volume = engine.inspect(container)["Mounts"][0]["Name"]
    assert agent.delete(f"/api/v1/containers/{container}?v=1").status == 200
    assert engine.call("GET", f"/volumes/{volume}")[0] == 404


# --------------------------------------------------------------------------------------------------
# TLS to the Engine: a proxy that ends TLS stands before the real one
# --------------------------------------------------------------------------------------------------


class TlsProxy(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Speaks TLS on a loopback port, asks for a client certificate, and passes on to the Engine."""

    daemon_threads = True

    def __init__(self, context: ssl.SSLContext, engine_path: str) -> None:
        self.context, self.engine_path = context, engine_path
        super().__init__(("127.0.0.1", 0), TlsProxyHandler)


class TlsProxyHandler(socketserver.BaseRequestHandler):
    server: TlsProxy

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as engine:
            client = self.server.context.wrap_socket(self.request, server_side=True)
            with client:
                engine.connect(self.server.engine_path)
                threading.Thread(target=self.back, args=(engine, client), daemon=True).start()
                while data := client.recv(65536):
                    engine.sendall(data)

    def back(self, engine: socket.socket, client: ssl.SSLSocket) -> None:
        with contextlib.suppress(OSError):
            while data := engine.recv(65536):
                client.sendall(data)


def openssl(folder: Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of folders as DOCKER_CERT_PATH has them, and server.pem, other.pem."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for ca in ("ca", "other"):
        openssl(folder, *f"req -x509 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem".split(), *new)
    for one in ("server", "client"):
        openssl(folder, *f"req -subj /CN={one} -keyout {one}.key -out {one}.csr".split(), *new)
        sign = f"x509 -req -in {one}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile ext"
        openssl(folder, *sign.split(), "-out", f"{one}.pem")
    for kind, ca in (("good", "ca"), ("wrong", "other"), ("bare", "ca")):
        (folder / kind).mkdir()
        (folder / kind / "ca.pem").write_bytes((folder / f"{ca}.pem").read_bytes())
        if kind != "bare":
            (folder / kind / "cert.pem").write_bytes((folder / "client.pem").read_bytes())
            (folder / kind / "key.pem").write_bytes((folder / "client.key").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tls_engine(engine: RealEngine, certificates: Path) -> Iterator[TlsProxy]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with TlsProxy(context, engine.path) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        yield proxy
        proxy.shutdown()


@pytest.mark.parametrize(
    "certs, host, verify, scheme, status, word",
    [
        pytest.param("good", "127.0.0.1", "1", "tcp", 200, "", id="both sides verified"),
        pytest.param("good", "127.0.0.1", "", "https", 200, "", id="https:// without VERIFY"),
        pytest.param("wrong", "127.0.0.1", "1", "tcp", 503, "certificate", id="other CA"),
        pytest.param("good", "localhost", "1", "tcp", 503, "localhost'", id="for another host"),
        pytest.param("bare", "127.0.0.1", "1", "tcp", None, "", id="no client certificate"),
        pytest.param("good", "127.0.0.1", "", "tcp", 502, "", id="plain HTTP to a TLS port"),
    ],
)
def test_tls(tls_engine, certificates, certs, host, verify, scheme, status, word):
    with Agent(
        DOCKER_HOST=f"{scheme}://{host}:{tls_engine.server_address[1]}",
        DOCKER_TLS_VERIFY=verify,
        DOCKER_CERT_PATH=str(certificates / certs),
    ) as agent:
        for _ in range(2):
            reply = agent.get("/api/v1/containers?all=1")
            if status == 200:
                assert "containers" in reply.json()
            else:
                assert_envelope(reply, status or reply.status, word)
                assert reply.status in (502, 503)


def test_silence_of_a_stream_over_tls_is_no_failure(tls_engine, certificates):
    """A TLS 1.3 session ticket makes the socket readable when there is nothing to be read."""
    with Agent(
        DOCKER_HOST=f"tcp://127.0.0.1:{tls_engine.server_address[1]}",
        DOCKER_TLS_VERIFY="1",
        DOCKER_CERT_PATH=str(certificates / "good"),
    ) as agent:
        registry = socket.create_server(("127.0.0.1", 0))
        threading.Timer(6, registry.close).start()  # until then it takes connections, and is silent
        body = {"image": f"127.0.0.1:{registry.getsockname()[1]}/no/such:1"}
        reply = agent.post("/api/v1/images/pull", body)
        assert_envelope(reply, 502, "connection re")  # "refused" or "reset by peer": of the Engine


# --------------------------------------------------------------------------------------------------
# Pull, from real registries and from a scripted Engine
# --------------------------------------------------------------------------------------------------


class Registries(NamedTuple):
    """Two registries over one storage: one open, one that wants user and pass."""

    plain: str
    locked: str


AUTH = {"username": "user", "password": "pass"}


def encode_auth(value: Any = AUTH, padding: str = "=") -> dict[str, str]:
    coded = base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
    return {"X-Registry-Auth": coded if padding else coded.rstrip("=")}


@pytest.fixture(scope="module")
def registries(
    engine: RealEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registries]:
    found = ["sh", "-c", "command -v docker-registry && command -v htpasswd"]
    if subprocess.run(found, stdout=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("needs docker-registry and htpasswd")
    folder = tmp_path_factory.mktemp("registry")
    passwords = subprocess.run(
        ["htpasswd", "-Bbn", "user", "pass"], stdout=subprocess.PIPE, check=True
    )
    (folder / "htpasswd").write_bytes(passwords.stdout)
    auth = {"htpasswd": {"realm": "r", "path": str(folder / "htpasswd")}}
    ports, processes = (free_port(), free_port()), []
    for port, extra in zip(ports, ({}, {"auth": auth})):
        config = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": f"127.0.0.1:{port}"},
            **extra,
        }
        (folder / f"{port}.yml").write_text(json.dumps(config))  # JSON is YAML
        command = ["docker-registry", "serve", str(folder / f"{port}.yml")]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        until(lambda port=port: fetch(port, "/v2/"), "a registry")
    found = Registries(*(f"127.0.0.1:{port}/team/app" for port in ports))
    for tag in ("1", "latest"):
        engine.call("POST", f"/images/{IMAGE}/tag?repo={found.plain}&tag={tag}")
        with contextlib.closing(UnixConnection(engine.path)) as connection:
            push = f"/images/{found.plain}/push?tag={tag}"
            connection.request("POST", push, headers={"X-Registry-Auth": "e30="})
            assert b"digest: sha256:" in connection.getresponse().read()
        forget(engine, f"{found.plain}:{tag}")
    yield found
    for image in (f"{name}:{tag}" for name in found for tag in ("1", "latest")):
        forget(engine, image)
    for process in processes:
        process.terminate()
        process.wait()


def forget(engine: RealEngine, image: str) -> None:
    engine.call("DELETE", f"/images/{image}?force=1")


def events(body: bytes) -> list[tuple[str, Any]]:
    """The named events of an event stream."""
    blocks = [block for block in body.decode().split("\n\n") if "event:" in block]
    fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    return [(field["event"], json.loads(field["data"])) for field in fields]


@pytest.mark.parametrize("registry, suffix, headers, status, words", [
    pytest.param("plain", ":1", {}, 200, "", id="tag"),
    pytest.param("plain", "", {}, 200, "", id="no tag is latest, not every tag"),
    pytest.param("plain", "@DIGEST", {}, 200, "", id="digest"),
    pytest.param("locked", ":1", encode_auth(), 200, "", id="with its password"),
    pytest.param("locked", ":1", encode_auth(padding=""), 200, "", id="auth without padding"),
    pytest.param("locked", ":1", {}, 401, "", id="no password given"),
    pytest.param("locked", ":1", encode_auth({**AUTH, "password": "x"}), 401, "", id="wrong one"),
    pytest.param("plain", ":no-such", {}, 404, "no-such", id="no such tag"),
    pytest.param("plain", "/no/such:1", {}, 404, "", id="no such repository"),
])  # fmt: skip
@pytest.mark.parametrize("accept", [{}, SSE], ids=["one answer", "event stream"])
def test_pull(agent, engine, registries, registry, suffix, headers, status, words, accept):
    digest = "sha256:" + digest_of(registries.plain)
    name = getattr(registries, registry)
    image = name + suffix.replace("DIGEST", digest)
    local = image if suffix else f"{image}:latest"
    forget(engine, local)
    assert engine.call("GET", f"/images/{local}/json")[0] == 404
    reply = agent.post("/api/v1/images/pull", {"image": image}, headers={**headers, **accept})
    if accept and reply.status == 200:
        *progress, (last, result) = events(reply.body)
        assert {kind for kind, _ in progress} <= {"progress"}
        assert reply.headers["content-type"] == "text/event-stream"
        if status == 200:
            assert last == "done" and result == {"image": local, "digest": digest}
            assert progress and all(
                set(word) == {"id", "status", "current", "total"} for _, word in progress
            )
        else:
            assert last == "error" and result["status"] == status and words in result["message"]
    elif status == 200:
        result = reply.json()
        assert reply.status == 200, reply.body
        assert (reply.status, result.pop("status")[:6]) == (200, "Status")
        assert result == {"image": local, "digest": digest}
    else:
        assert_envelope(reply, status, words)
    assert engine.call("GET", f"/images/{local}/json")[0] == (200 if status == 200 else 404)
    if not suffix:
        assert engine.call("GET", f"/images/{name}:1/json")[0] == 404
    forget(engine, local)
    secret = [*headers.values(), "pass", "wrong"][0]
    assert not headers or secret not in json.dumps(agent.log) + reply.body.decode()


def digest_of(image: str) -> str:
    """The hexadecimal digest of tag 1 in the plain registry."""
    port, _, path = image.partition("/")
    kinds = ("docker.distribution.manifest.v2", "oci.image.manifest.v1")
    accept = "Accept: " + ", ".join(f"application/vnd.{kind}+json" for kind in kinds)
    with socket.create_connection(("127.0.0.1", int(port.partition(":")[2]))) as sock:
        sock.sendall(f"HEAD /v2/{path}/manifests/1 HTTP/1.0\r\n{accept}\r\n\r\n".encode())
        return re.search(rb"Docker-Content-Digest: sha256:(\w+)", read_to_end(sock))[1].decode()


@pytest.mark.parametrize(
    "pull, here, status",
    [
        (None, False, 201),
        ("missing", False, 201),
        ("missing", True, 201),
        ("always", False, 201),
        ("always", True, 401),
        ("never", False, 404),
        ("never", True, 201),
    ],
)
def test_create_pulls(agent, engine, registries, name, pull, here, status):
    """From the locked registry: with its password unless the image is here; so a pull shows."""
    image = f"{registries.locked}:1"
    if here:
        tag = f"/images/{IMAGE}/tag?repo={registries.locked}&tag=1"
        assert engine.call("POST", tag)[0] == 201
    body = {"image": image, "name": name, "cmd": ["true"], "network_mode": "none"}
    headers = {} if here else encode_auth()
    reply = agent.post("/api/v1/containers", {**body, "pull": pull}, headers=headers)
    assert reply.status == status, reply.body
    assert engine.call("GET", f"/containers/{name}/json")[0] == (200 if status == 201 else 404)
    engine.remove(name)
    forget(engine, image)
    assert not headers or headers["X-Registry-Auth"] not in json.dumps(agent.log)


@pytest.mark.parametrize("platform, asked", [
    (None, ""),
    ("linux", ""),  # the Engine wants both
    ("linux/386", {"os": "linux", "architecture": "386"}),
    ("linux/arm/v7", {"os": "linux", "architecture": "arm", "variant": "v7"}),
])  # fmt: skip
def test_image_is_looked_at_as_the_platform_that_is_asked_for(
    fake_agent, fake_engine, platform, asked
):
    """Of an image with several platforms each has its own labels and health check."""
    fake_engine.script["GET /images/a/json"] = http_answer({"Id": "i", "Os": "linux"})
    fake_agent.post("/api/v1/containers", {"image": "a", "platform": platform})
    looks = [seen.target for seen in fake_engine.requests() if "/images/a/" in seen.target]
    query = asked and f"?platform={quote(json.dumps(asked))}"
    assert looks and set(looks) == {f"/images/a/json{query}"}


def test_image_that_is_here_is_not_pulled_however_its_platform_is_spelled(agent, engine, name):
    """The Engine alone knows that AMD64, x86_64 and amd64/v1 are amd64."""
    image = engine.call("GET", f"/images/{IMAGE}/json")[1]
    platform = f"{image['Os']}/{image['Architecture'].upper()}"
    body = {"image": IMAGE, "name": name, "cmd": ["true"], "platform": platform}
    reply = agent.post("/api/v1/containers", body)
    assert reply.status == 201, reply.body


REGISTRY_BODIES = {
    "html": b"<html><title>Access denied: not found, unauthorized</title></html>",
    "json": b'{"errors": [{"code": "CODE", "message": "not found, denied"}]}',
    "none": b"",
}
REGISTRY_CODES = {401: b"UNAUTHORIZED", 404: b"MANIFEST_UNKNOWN", 429: b"TOOMANYREQUESTS"}


class BrokenRegistry(http.server.BaseHTTPRequestHandler):
    """A registry that answers as the repository that is asked for says: 503-html."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that a TLS handshake is answered in HTTP

    def do_GET(self) -> None:
        status, _, kind = self.path.split("/")[2].partition("-")
        code = REGISTRY_CODES.get(int(status or 200), b"UNKNOWN")
        body = REGISTRY_BODIES.get(kind, b"{}").replace(b"CODE", code)
        self.send_response(int(status or 200))
        self.send_header("Content-Type", "text/html" if kind == "html" else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at what the agent says."""


@pytest.fixture(scope="module")
def broken_registry() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BrokenRegistry) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    "repository, status",
    [
        *((f"{status}-{kind}", 502) for status in (500, 503, 429) for kind in ("html", "json")),
        *((f"{status}-none", 502) for status in (500, 502, 504)),
        ("200-html", 502),
        ("200-json", 502),
        ("200-none", 502),
        ("418-html", 502),
        ("401-json", 401),
        ("404-json", 404),
        ("404-html", 502),
    ],
)
def test_registrys_failure_is_502_whatever_it_answers(
    agent, engine, broken_registry, repository, status
):
    image = f"{broken_registry}/{repository}:1"
    storage = str(engine.call("GET", "/info")[1]["DriverStatus"])
    if "containerd" in storage and repository in ("200-html", "200-json", "200-none", "404-html"):
        pytest.skip("containerd's store takes this for an image that is not there, or not right")
    assert_envelope(agent.post("/api/v1/images/pull", {"image": image}), status)
    assert_envelope(agent.post("/api/v1/containers", {"image": image}), status)
    reply = agent.post("/api/v1/images/pull", {"image": image}, headers=SSE)
    assert events(reply.body)[-1][1]["status"] == status


def test_digest_is_the_one_of_the_repository_that_was_asked_for(fakes):
    fake, agent = fakes
    fake.script["POST /images/create"] = chunked_answer(b'{"status":"Status: ok"}')
    letters = {"a/a": "a", "d": "d", "b.io/d": "b", "c/c": "c", "e": "e"}
    letters["docker.io/library/f"] = "f"
    digests = [f"{repository}@sha256:{letter * 64}" for repository, letter in letters.items()]
    for image in ("d:1", "b.io/d:1", "c/c:1", "docker.io/library/e:1", "f:1"):
        digest = letters.get(image[:-2], image[-3])
        coded = image.replace(":", "%3A")
        fake.script[f"GET /images/{coded}/json"] = http_answer({"RepoDigests": digests})
        reply = agent.post("/api/v1/images/pull", {"image": image})
        assert reply.json()["digest"] == "sha256:" + digest * 64
    told = b'{"status":"Digest: sha256:' + b"9" * 64 + b'"}\n{"status":"Status: ok"}'
    fake.script["POST /images/create"] = chunked_answer(told)
    assert agent.post("/api/v1/images/pull", {"image": "f:1"}).json() == {
        "image": "f:1",
        "digest": "sha256:" + "9" * 64,
        "status": "Status: ok",
    }
    fake.script["POST /images/create"] = chunked_answer(b'{"status":"Status: ok"}')
    fake.script["GET /images/latest%3Alatest/json"] = http_answer({"RepoDigests": None})
    fake.script["GET /images/latest/json"] = http_answer({"RepoDigests": None})
    assert agent.post("/api/v1/images/pull", {"image": "latest"}).json()["image"] == "latest:latest"


def test_pull_with_an_empty_error_succeeds(fakes):
    """As podman before 3.2 answers each pull that succeeds."""
    fake, agent = fakes
    told = {"status": "pulled", "error": "", "progress": "", "progressDetail": {}, "id": "a" * 64}
    fake.script["POST /images/create"] = http_answer(told)
    fake.script["GET /images/x%3A1/json"] = http_answer({"RepoDigests": None})
    assert agent.post("/api/v1/images/pull", {"image": "x:1"}).json()["status"] == "pulled"


@pytest.mark.parametrize("auth", ["null", "bnVsbA", "bnVsbA=="])
def test_auth_of_null_is_none(fakes, auth):
    fake, agent = fakes
    fake.script["POST /images/create"] = chunked_answer(
        b'{"status":"Digest: sha256:%b"}' % (b"a" * 64)
    )
    fake.requests()
    reply = agent.post("/api/v1/images/pull", {"image": "x"}, headers={"X-Registry-Auth": auth})
    assert reply.status == 200
    assert ["x-registry-auth" in seen.headers for seen in fake.changes()] == [False]


@pytest.mark.parametrize("auth", ["eyJhIjoifn5+Pz8/Pj4+In0=", "eyJhIjoifn5-Pz8_Pj4-In0"])
def test_auth_in_either_alphabet_of_base64_is_passed_on_as_base64url(fakes, auth):
    fake, agent = fakes
    fake.script["POST /images/create"] = chunked_answer(b'{"status":"Status: ok"}')
    fake.script["GET /images/x%3A1/json"] = http_answer({"RepoDigests": None})
    fake.requests()
    reply = agent.post("/api/v1/images/pull", {"image": "x:1"}, headers={"X-Registry-Auth": auth})
    assert reply.status == 200
    [seen] = fake.changes()
    assert seen.headers["x-registry-auth"] == "eyJhIjoifn5-Pz8_Pj4-In0="


DEEP = base64.urlsafe_b64encode(b"[" * 20_000).decode()  # no decoder may recurse on that


@pytest.mark.parametrize(
    "auth",
    [
        "{}",
        DEEP,
        "e30 =",
        "W10=",
        "bm9wZQ==",
        "e30=\te30=",
        "\xff\xfe",
        "e30=e30=",
        "dHJ1ZQ",
        "eyJhIjoi",
    ],
)
@pytest.mark.parametrize("path", ["/api/v1/images/pull", "/api/v1/containers"])
def test_bad_auth_is_refused_and_not_repeated(fakes, path, auth):
    fake, agent = fakes
    fake.requests()
    reply = agent.post(path, {"image": "x"}, headers={"X-Registry-Auth": auth})
    assert_envelope(reply, 400, "X-Registry-Auth")
    assert fake.requests() == []
    text = json.dumps(agent.log[-3:]) + reply.body.decode()
    assert auth not in text.replace("{}", "") or auth == "{}"


@pytest.mark.parametrize(
    "pieces, end, status, words",
    [
        ([b'{"error":"manifest for x:1 not found: manifest unknown"}'], True, 404, "manifest"),
        ([b'{"error":"unauthorized: authentication required"}'], True, 401, "unauthorized"),
        ([b'{"error":"denied: requested access is denied"}\r\n'], True, 403, "denied"),
        ([b'{"error":"toomanyrequests: slow down"}'], True, 502, "toomanyrequests"),
        ([b'{"errorDetail":{"message":"name unknown: x"}}'], True, 404, "name unknown"),
        ([b'{"error":"x does not match the specified platform: y"}'], True, 404, "platform"),
        ([b'{"errorDetail":{"message":"x is denied"}, "error":""}'], True, 403, "denied"),
        ([b'{"error":"exec: executable file not found in $PATH"}'], True, 502, "executable"),
        ([b'{"status":"a"}\n{"err', b'or":"lookup x: no such host"}\n'], True, 502, "no such host"),
        ([b'{"status":"Downloading"}\n'], False, 502, ""),
        ([b'{"status":"Downloading"}\n<html>\n'], True, 502, "JSON"),
        ([b'{"status":"a"}\n["no object"]\n'], True, 502, "shape"),
        ([b'{"errorDetail":{"message":7}}'], True, 502, "shape"),
        ([b'{"status":"a"}\n', b'{"error":"%b"}' % (b"a" * 2**20)], True, 502, "too long"),
        ([b'{"error":"%b"}\n' % (b"a" * 2**20), b'{"status":"a"}\n'], True, 502, "too long"),
        ([b'{"error":"%b"}' % (b"unexpected status " * 50_000)], True, 502, "unexpected status"),
    ],
)
def test_error_inside_a_pull(fakes, pieces, end, status, words):
    fake, agent = fakes
    fake.script["POST /images/create"] = chunked_answer(*pieces, end=end)
    assert_envelope(agent.post("/api/v1/images/pull", {"image": "x:1"}), status, words)
    reply = agent.post("/api/v1/images/pull", {"image": "x:1"}, headers=SSE)
    kind, error = events(reply.body)[-1]
    assert (kind, error["status"], set(error)) == ("error", status, {"error", "message", "status"})
    assert words in error["message"]
    assert [seen.target for seen in fake.requests()][-1] == "/images/create?fromImage=x&tag=1"


@pytest.mark.parametrize(
    "message, status",
    [
        ('Get "https://r.io/v2/": dial tcp 10.0.0.1:443: connect: connection refused', 502),
        ("pull access denied for x, repository does not exist", 403),
        # With containerd's store:
        ("pull access denied, or may require authorization: no basic auth credentials", 401),
        ("unknown: failed to resolve reference: HEAD http://r:5055/v2/: 401 Unauthorized", 401),
        ("unexpected status from HEAD request to http://r:5055/v2/: 401 Unauthorized", 401),
        ("unknown: failed to resolve reference: unexpected status from HEAD: 503 x", 502),
        ("failed to unpack image: unexpected media type text/html for sha256:0: not found", 502),
        ("failed to copy: could not fetch content descriptor sha256:0 from remote: not found", 502),
        ("manifest for x:1 not found: manifest unknown", 404),
        ("failed to register layer: write /usr/x: no space left on device", 500),
        ("whatever a registry may say", 502),
        ("toomanyrequests: <title>access denied</title>", 502),
        ('error parsing HTTP 429 response body: "<title>not found</title>"', 502),
    ],
)
def test_refused_pull_is_sorted_by_what_the_engine_says(fakes, message, status):
    fake, agent = fakes
    fake.script["POST /images/create"] = http_answer({"message": message}, 500)
    assert_envelope(agent.post("/api/v1/images/pull", {"image": "x:1"}), status, message)


def test_no_more_of_a_registrys_text_is_searched_than_is_told(fakes):
    fake, agent = fakes
    message = "x" * da.MAX_MESSAGE + " 401 Unauthorized"
    fake.script["POST /images/create"] = http_answer({"error": message})
    assert_envelope(agent.post("/api/v1/images/pull", {"image": "x:1"}), 502, "xxx...")


@pytest.mark.parametrize("begun", [True, False], ids=["after some progress", "before the head"])
@pytest.mark.parametrize("accept", [{}, SSE], ids=["one answer", "event stream"])
@pytest.mark.parametrize("leaver", ["client", "agent"])
def test_pull_ends_with_its_client_and_with_the_agent(fake_engine, tmp_path, begun, accept, leaver):
    started, ended = threading.Event(), threading.Event()

    def pull(sock: socket.socket) -> None:
        if begun:
            sock.sendall(chunked_answer(b'{"status":"Downloading","id":"x"}\n', end=False))
        started.set()
        sock.settimeout(WAIT)
        with contextlib.suppress(ConnectionError):  # reset, if it left before it had read all
            assert sock.recv(1) == b""
        ended.set()

    fake_engine.script["POST /images/create"] = pull
    with Agent(DOCKER_HOST=fake_engine.url) as agent, agent.connect() as sock:
        head = "".join(f"{name}: {value}\r\n" for name, value in accept.items())
        body = b'{"image": "x"}'
        sock.sendall(
            f"POST /api/v1/images/pull HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\n{head}"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert started.wait(WAIT)
        if leaver == "client":
            sock.close()
            assert ended.wait(WAIT)
            return
        if not accept:
            sock.close()  # an ordinary request in flight may finish: not what is shown here
            return
        agent.process.terminate()
        answer = read_to_end(sock)
        assert ended.wait(WAIT)
        assert b" 500 " not in answer.partition(b"\r\n")[0]
        assert (b"event: shutdown" in answer) or (not begun and b" 503 " in answer)


# --------------------------------------------------------------------------------------------------
# Images, networks, volumes
# --------------------------------------------------------------------------------------------------

DIGEST = "sha256:" + "d" * 64


@pytest.fixture
def repository(engine: RealEngine) -> Iterator[str]:
    """A repository's name that is free; its images are removed after the test."""
    chosen = "da-" + secrets.token_hex(6) + "/web"
    yield chosen
    for image in engine.call("GET", "/images/json")[1]:
        for tag in image["RepoTags"] or []:
            if tag.startswith(chosen.partition("/")[0]):
                forget(engine, tag)


def make_image(engine: RealEngine, reference: str, *instructions: str, **labels: str) -> str:
    """Make an image of its own from the test image, and return its id."""
    container = engine.run("true", Labels={LABEL: secrets.token_hex(4), **labels})
    repository, _, tag = reference.partition(":")
    query = f"container={container}&repo={repository}&tag={tag}"
    status, answer = engine.call("POST", f"/commit?{query}", {})
    assert status == 201, answer
    engine.remove(container)
    return "sha256:" + answer["Id"].removeprefix("sha256:")  # podman's commit leaves it out


def image_row(agent: Agent, image: str) -> dict[str, Any]:
    """The row of an image by its id, {} if it is not there."""
    rows = agent.get("/api/v1/images").json()["images"]
    return next((row for row in rows if row["id"] == image), {})


def test_image_in_the_list_and_its_removal(agent, engine, repository):
    image = make_image(engine, f"{repository}:1")
    engine.call("POST", f"/images/{image}/tag?repo={repository}&tag=2")
    container = engine.run("true", Image=f"{repository}:1")
    inspect = engine.call("GET", f"/images/{image}/json")[1]
    listed = engine.call("GET", "/images/json")[1]  # containerd's store counts more than inspect
    (size,) = (row["Size"] for row in listed if row["Id"] == image)
    row = image_row(agent, image)
    assert isinstance(row.pop("created"), int) and sorted(row.pop("tags")) == inspect["RepoTags"]
    expected = {"digests": inspect["RepoDigests"], "size": size, "containers": 1}
    assert row == {"id": image, **expected}
    path = "/api/v1/images?image="
    assert_envelope(agent.delete(path + image), 409)  # two tags: not by its id
    untagged = {"untagged": [f"{repository}:1"], "deleted": []}
    assert agent.delete(f"{path}{repository}:1").json() == untagged
    assert_envelope(agent.delete(f"{path}{repository}:2"), 409, container[:12])
    assert image_row(agent, image)["tags"] == [f"{repository}:2"]
    engine.remove(container)
    removed = agent.delete(f"{path}{repository}:2").json()
    assert removed["untagged"] == [f"{repository}:2"] and image in removed["deleted"]
    assert image_row(agent, image) == {}
    assert_envelope(agent.delete(f"{path}{repository}:2"), 404, repository)
    target = {"image": f"{repository}:2"}
    until(lambda: agent.lines("request")[-1]["target"] == target, "a log line with its target")


@pytest.mark.parametrize("method, path, body, word", cases(
    ("no image", "DELETE", "/images", None, "query.image: is required"),
    ("an image in capitals", "DELETE", "/images?image=WEB", None, "query.image: "),
    ("an image that climbs", "DELETE", "/images?image=../networks/x", None, "query.image: "),
    ("forced", "DELETE", "/images?image=x&force=1", None, "query.force: is unknown"),
    ("a tag of a repository", "POST", "/images/prune", {"repository": "web:1"}, "repository: "),
    ("keep below 0", "POST", "/images/prune", {"keep": -1}, "keep: "),
    ("a misspelt dry run", "POST", "/images/prune", {"dryrun": True}, "dryrun: is unknown"),
    ("a network without a name", "POST", "/networks", {}, "name: is required"),
    ("a name with a slash", "POST", "/networks", {"name": "a/b"}, "name: "),
    ("bits of a host", "POST", "/networks", {"name": "a", "subnet": "10.0.0.1/8"}, "subnet: "),
    ("no prefix", "POST", "/networks", {"name": "a", "subnet": "10.0.0.0"}, "subnet: "),
    ("the agent's own label", "POST", "/networks", {"name": "a", "labels": {"dockeragent.x": ""}},
     "labels.dockeragent.x: "),
    ("a network's name that climbs", "DELETE", "/networks/..", None, ""),
    ("a volume's name that climbs", "DELETE", "/volumes/a%2F..%2Fb", None, ""),
))  # fmt: skip
def test_bad_name_of_an_image_network_or_volume_reaches_nothing(method, path, body, word, pair):
    assert_envelope(pair.agent.request(method, f"/api/v1{path}", body), 400, word)
    assert pair.engine.requests() == []


class Shelf:
    """Images on a FakeEngine, as (tags, digests, seconds of creation, fraction, when tagged)."""

    def __init__(self, fake: FakeEngine, used: tuple[str, ...] = (), **images: Any) -> None:
        self.fake, self.removed = fake, []
        rows = [
            {
                "Id": f"sha256:{name}",
                "RepoTags": tags or None,
                "RepoDigests": [f"{where}@{DIGEST}" for where in digests] or ["<none>@<none>"],
                "Size": 10,
                "Created": created,
            }
            for name, (tags, digests, created, *_) in images.items()
        ]
        users = [
            {"ImageID": f"sha256:{name}", "Mounts": [], "NetworkSettings": {"Networks": {}}}
            for name in used
        ]
        fake.script["GET /images/json"] = http_answer(rows)
        fake.script["GET /containers/json"] = http_answer(users)
        for name, (tags, digests, _, *times) in images.items():
            fraction, tagged = times or ("", "")
            inspect = {"Created": f"2026-02-21T10:00:00{fraction}Z"}
            inspect["Metadata"] = {"LastTagTime": f"2026-02-21T10:00:0{tagged}Z"}
            fake.script[f"GET /images/sha256%3A{name}/json"] = http_answer(inspect)
            for reference in (*tags, *(f"{d}@{DIGEST}" for d in digests), f"sha256:{name}"):
                self.answers(reference, http_answer([{"Deleted": f"sha256:{name}"}]))

    def answers(self, reference: str, answer: bytes) -> None:
        self.fake.script[f"DELETE /images/{quote(reference)}"] = answer

    def taken(self) -> list[str]:
        """What was asked to be removed, without force."""
        found = [seen for seen in self.fake.requests() if seen.method == "DELETE"]
        return [unquote(seen.target.removeprefix("/images/")) for seen in found]


PRUNES = cases(
    ("a digest among the tags is none of them",
     {"a": (["web:1", f"web@{DIGEST}"], ["web"], 1), "b": (["web:2"], [], 2)}, {"keep": 1},
     ["web:1"], 10),
    ("the newest stay, whatever their order in the list",
     {"b": (["web:2"], [], 2), "c": (["web:3"], [], 3), "a": (["web:1"], [], 1)}, {"keep": 1},
     ["web:2", "web:1"], 20),
    ("three stay by default", {n: ([f"web:{n}"], [], i) for i, n in enumerate("abcd")}, {},
     ["web:a"], 10),
    ("each repository keeps its own", {"a": (["web:1", "db:1"], [], 1), "b": (["web:2"], [], 2)},
     {"keep": 1}, ["web:1"], 0),
    ("all tags of an old image go",
     {"a": (["web:1", "web:one", "x/web:1"], [], 1), "b": (["web:2", "x/web:2"], [], 2)},
     {"keep": 1}, ["web:1", "web:one", "x/web:1"], 10),
    ("another repository is left alone",
     {"a": (["web:1"], [], 1), "b": (["x.io/web:1"], [], 2), "c": ([], [], 1)},
     {"keep": 0, "repository": "docker.io/library/web"}, ["web:1"], 10),
    ("an image of nobody goes", {"a": ([], [], 9), "b": (["<none>:<none>"], [], 9)}, {},
     ["sha256:b", "sha256:a"], 20),
    ("without a tag it belongs to the repository of its digest",
     {"a": ([], ["web"], 1), "b": (["web:2"], [], 2), "c": ([], ["db"], 1)}, {"keep": 1},
     [f"web@{DIGEST}"], 10),
    ("a digest elsewhere keeps the image", {"a": (["web:1"], ["db"], 1), "b": (["web:2"], [], 2)},
     {"keep": 1}, ["web:1"], 0),
    ("one second, told apart by its fraction",
     {"a": (["web:1"], [], 1, ".9", ""), "b": (["web:2"], [], 1, ".10000001", "")}, {"keep": 1},
     ["web:2"], 10),
    ("reproducible builds, told apart by their tagging",
     {"a": (["web:2"], [], 0, "", "2.5"), "b": (["web:1"], [], 0, "", "2")}, {"keep": 1}, ["web:1"],
     10),
)  # fmt: skip


@pytest.mark.parametrize("images, body, taken, reclaimed", PRUNES)
def test_prune(lasting_agent, lasting_engine, images, body, taken, reclaimed):
    shelf = Shelf(lasting_engine, **images)
    planned = lasting_agent.post("/api/v1/images/prune", {**body, "dry_run": True}).json()
    assert shelf.taken() == []
    result = lasting_agent.post("/api/v1/images/prune", body).json()
    assert shelf.taken() == taken == [row["image"] for row in result["removed"]]
    assert result == planned
    assert result["reclaimed"] == reclaimed
    assert {row["size"] for row in result["removed"]} == {10}


def test_prune_leaves_what_is_used_or_becomes_so(lasting_agent, lasting_engine):
    images = {name: ([f"web:{name}"], [], age) for age, name in enumerate("abcdef")}
    shelf = Shelf(lasting_engine, used=("b", "f"), **images)
    shelf.answers("web:c", http_answer({"message": "in use by now"}, 409))
    shelf.answers("web:d", http_answer({"message": "gone by now"}, 404))
    result = lasting_agent.post("/api/v1/images/prune", {"keep": 1}).json()
    assert shelf.taken() == ["web:e", "web:d", "web:c", "web:a"]
    assert [row["image"] for row in result["removed"]] == ["web:e", "web:a"]
    assert result["reclaimed"] == 20
    shelf.answers("web:e", http_answer({"message": "disk is gone"}, 500))
    assert_envelope(lasting_agent.post("/api/v1/images/prune", {"keep": 1}), 500, "disk is gone")


def test_prune_of_images_without_a_time_takes_none(lasting_agent, lasting_engine):
    shelf = Shelf(lasting_engine, a=(["web:1"], [], None), b=(["web:2"], [], 2))
    reply = lasting_agent.post("/api/v1/images/prune", {"keep": 0})
    assert_envelope(reply, 502, "Created")
    assert shelf.taken() == []


def test_limited_key_prunes_what_it_covers_and_nothing_untagged(fake_engine, tmp_path):
    tags = {
        "a": "web:1",
        "b": "web:2",
        "c": "x.io/acme/web:1",
        "d": "x.io/other:1",
        "e": "db:latest",
    }
    shelf = Shelf(
        fake_engine,
        nobody=([], [], 1),
        digest=([], ["x.io/acme/web"], 1),
        **{name: ([tag], [], 1) for name, tag in tags.items()},
    )
    key = {"name": "ci", "sha256": hashlib.sha256(b"limited").hexdigest(), "allow": ["images"]}
    (tmp_path / "keys").write_text(
        json.dumps({"keys": [{**key, "images": ["web:1", "db", "x.io/acme/*"]}]})
    )
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=str(tmp_path / "keys")) as agent:
        rows = agent.get("/api/v1/images", key="limited").json()["images"]
        assert sorted(row["tags"] + row["digests"] for row in rows) == [
            ["db:latest"],
            ["web:1"],
            ["x.io/acme/web:1"],
            [f"x.io/acme/web@{DIGEST}"],
        ]
        reply = agent.post("/api/v1/images/prune", {"keep": 0}, key="limited")
        assert shelf.taken() == ["x.io/acme/web:1"] == [r["image"] for r in reply.json()["removed"]]
        for image in ("web:2", "sha256:" + "a" * 64, "a" * 64, "abc"):
            assert_envelope(agent.delete(f"/api/v1/images?image={image}", key="limited"), 403)
        assert_envelope(agent.post("/api/v1/networks", {"name": "n"}, key="limited"), 403)
        assert shelf.taken() == []
        assert agent.delete("/api/v1/images?image=web:1", key="limited").status == 404
        assert shelf.taken() == ["docker.io/library/web:1"]  # in full, never the beginning of an id


def test_prune_beside_creates_takes_no_image_away_from_a_container(agent, engine, repository):
    images = {f"{repository}:{n}": make_image(engine, f"{repository}:{n}") for n in range(8)}
    made: list[str] = []

    def create(tags: list[str]) -> None:
        for tag in tags:
            body = {"image": tag, "cmd": ["true"], "pull": "never", "network_mode": "none"}
            reply = agent.post("/api/v1/containers", {**body, "labels": TEST_LABEL})
            assert reply.status in (201, 404), reply.body
            if reply.status == 201:
                made.append(reply.json()["id"])

    tags = sorted(images, reverse=True)
    creators = [threading.Thread(target=create, args=(tags[n::2],)) for n in range(2)]
    for creator in creators:
        creator.start()
    removed: list[str] = []
    while any(creator.is_alive() for creator in creators):
        reply = agent.post("/api/v1/images/prune", {"repository": repository, "keep": 0})
        assert reply.status == 200, reply.body
        removed += [row["id"] for row in reply.json()["removed"]]
    used = {engine.inspect(container)["Image"] for container in made}
    for container in made:
        engine.remove(container)
    assert {row["Id"] for row in engine.call("GET", "/images/json")[1]} >= used
    assert not used & set(removed) and used | set(removed) <= set(images.values())
    assert len(images) - len(made) <= len(removed)


@pytest.mark.parametrize(
    "slow, other, image, status",
    cases(
        ("a removal beside a create", "create", "remove", "b", 200),
        ("a removal of what is not there", "create", "remove", "c", 404),
        ("a create beside a removal", "remove", "create", "b", 404),
    ),
)
def test_slow_create_or_removal_holds_up_no_other_image(fake_engine, slow, other, image, status):
    """A limited key's image may take the Engine minutes."""
    began, release = threading.Event(), threading.Event()

    def take_long(sock: socket.socket) -> None:
        began.set()
        release.wait(3 * WAIT)
        sock.sendall(http_answer({"message": "in use"}, 409))

    for name in "ab":
        fake_engine.script[f"GET /images/{name}/json"] = http_answer({"Id": name})
    fake_engine.script["DELETE /images/a"] = take_long
    fake_engine.script["DELETE /images/b"] = http_answer([{"Untagged": "b"}])
    fake_engine.script["POST /containers/create"] = (
        take_long if slow == "create" else http_answer({"message": "gone"}, 404)
    )
    with Agent(DOCKER_HOST=fake_engine.url) as agent:

        def ask(what: str, image: str) -> Reply:
            if what == "remove":
                return agent.delete(f"/api/v1/images?image={image}", timeout=WAIT)
            body = {"image": image, "pull": "never"}
            return agent.post("/api/v1/containers", body, timeout=WAIT)

        first = threading.Thread(target=ask, args=(slow, "a"))
        first.start()
        assert began.wait(WAIT)
        try:
            assert ask(other, image).status == status
        finally:
            release.set()
            first.join()


@pytest.mark.parametrize(
    "slow, other", [("create", "image"), ("create", "net"), ("image", "create")]
)
def test_create_and_removal_of_what_it_uses_wait_for_each_other(fake_engine, slow, other):
    """The Engine itself removes an image or a network with which it is creating a container."""
    began, release, arrived = threading.Event(), threading.Event(), threading.Event()

    def take_long(sock: socket.socket) -> None:
        began.set()
        release.wait(3 * WAIT)
        sock.sendall(http_answer({"message": "in use"}, 409))

    def arrive(sock: socket.socket) -> None:
        arrived.set()
        sock.sendall(http_answer({"message": "gone"}, 404))

    calls = {"create": "POST /containers/create", "image": "DELETE /images/a"}
    calls["net"] = "DELETE /networks/" + "b" * 64
    network = {"Id": "b" * 64, "Name": "net", "Driver": "bridge", "Internal": False}
    network.update(Labels={}, IPAM={"Config": []})
    fake_engine.script["GET /networks"] = http_answer([network])
    fake_engine.script["GET /containers/json"] = http_answer([])
    fake_engine.script["GET /images/a/json"] = http_answer({"Id": "a"})
    fake_engine.script.update({calls[slow]: take_long, calls[other]: arrive})
    with Agent(DOCKER_HOST=fake_engine.url) as agent:

        def ask(what: str) -> Reply:
            if what == "create":
                body = {"image": "a", "pull": "never", "network_mode": "net"}
                return agent.post("/api/v1/containers", body)
            return agent.delete(
                "/api/v1/images?image=a" if what == "image" else "/api/v1/networks/net"
            )

        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            first = threads.submit(ask, slow)
            assert began.wait(WAIT)
            second = threads.submit(ask, other)
            try:
                assert not arrived.wait(0.5)
            finally:
                release.set()
            assert (first.result(WAIT).status, second.result(WAIT).status) == (409, 404)
            assert arrived.is_set()


SHAPES = [b"[]", b"{}", b"[1]", b"[{}]", b"[[]]", b"null", b'{"Volumes":[1]}', b'[{"Id":1}]']


@pytest.mark.parametrize("answer", SHAPES)
@pytest.mark.parametrize("path", ["images", "networks", "volumes"])
def test_list_of_another_shape_is_no_bug_of_the_agent(fakes, path, answer):
    fake, agent = fakes
    fake.script[f"GET /{path}"] = fake.script["GET /images/json"] = http_answer(answer)
    fake.script["GET /containers/json"] = http_answer(b"[]")
    reply = agent.get(f"/api/v1/{path}")
    assert (reply.status, reply.json()) == (200, {path: []}) or reply.status == 502
    if path != "networks":
        fake.script[f"GET /{path}"] = http_answer({"Volumes": []})
        fake.script["GET /images/json"] = http_answer(b"[]")
        fake.script["GET /containers/json"] = http_answer(answer)
        assert agent.get(f"/api/v1/{path}").status in (200, 502)


def network_rows(engine: RealEngine, name: str) -> list[Any]:
    return [row for row in engine.call("GET", "/networks")[1] if row["Name"] == name]


@pytest.fixture
def free_network(engine: RealEngine) -> Iterator[str]:
    """A network's name that is free, and free again after the test."""
    chosen = "da-" + secrets.token_hex(4)
    yield chosen
    for row in network_rows(engine, chosen):
        engine.call("DELETE", f"/networks/{row['Id']}")


def test_network_is_created_once_however_many_ask(agent, engine, free_network):
    body = {"name": free_network, "internal": True, "labels": {"a": "b"}}
    longer = {"name": f"{free_network}-longer"}
    assert agent.post("/api/v1/networks", longer).status == 201  # a part of a name is another's
    replies = at_once(lambda _: agent.post("/api/v1/networks", body), range(8))
    assert sorted(reply.status for reply in replies) == [200] * 7 + [201]
    (found,) = network_rows(engine, free_network)
    expected = {"id": found["Id"], "name": free_network, "driver": "bridge", "internal": True}
    expected.update(subnets=[found["IPAM"]["Config"][0]["Subnet"]], labels={"a": "b"})
    # As lists: the order is part of what is documented.
    assert [list(reply.json().items()) for reply in replies] == [list(expected.items())] * 8
    rows = agent.get("/api/v1/networks").json()["networks"]
    assert expected in rows and {"bridge", "none"} & {row["name"] for row in rows}
    assert agent.delete(f"/api/v1/networks/{free_network}-longer").status == 200
    assert agent.delete(f"/api/v1/networks/{free_network}").json() == {"message": "network removed"}
    assert network_rows(engine, free_network) == []
    assert_envelope(agent.delete(f"/api/v1/networks/{free_network}"), 404, free_network)


@pytest.mark.parametrize("subnet", ["10.213.7.0/24", "fd00:d0c:a9e7::/64"])
def test_network_has_the_subnet_that_was_asked_for(agent, free_network, subnet):
    reply = agent.post("/api/v1/networks", {"name": free_network, "subnet": subnet})
    assert (reply.status, subnet in reply.json()["subnets"]) == (201, True)


def test_network_that_another_client_makes_first_is_found(fake_agent, fake_engine):
    network = {"Id": "f", "Name": "n", "Driver": "bridge", "Internal": False, "Labels": None}
    network["IPAM"] = {"Config": None}
    lists = [http_answer([]), http_answer([network])]
    fake_engine.script["GET /networks"] = lambda sock: sock.sendall(lists.pop(0))
    fake_engine.script["POST /networks/create"] = http_answer({"message": "exists"}, 409)
    reply = fake_agent.post("/api/v1/networks", {"name": "n"})
    assert (reply.status, reply.json()["id"]) == (200, "f")
    (asked,) = [seen for seen in fake_engine.requests() if seen.method == "POST"]
    assert json.loads(asked.body)["CheckDuplicate"] is True  # older Engines make two otherwise
    lists += [http_answer([]), http_answer([])]
    assert_envelope(fake_agent.post("/api/v1/networks", {"name": "n"}), 409, "exists")
    fake_engine.requests()
    lists.append(http_answer([network]))
    assert fake_agent.post("/api/v1/networks", {"name": "n"}).status == 200
    assert [seen.method for seen in fake_engine.requests()] == ["GET"]


@pytest.mark.parametrize("state", ["created", "exited", "running"])
@pytest.mark.parametrize("by", ["Name", "Id"])
def test_used_network_stays(agent, engine, network, state, by):
    name = network()
    (found,) = network_rows(engine, name)
    host = {"NetworkMode": found[by]}
    endpoints = {"EndpointsConfig": {found[by]: {}}}
    body = {"Image": IMAGE, "Cmd": ["sleep", "600"], "Labels": TEST_LABEL, "HostConfig": host}
    created = engine.call("POST", "/containers/create", {**body, "NetworkingConfig": endpoints})[1]
    for action in {"exited": ["start", "kill"], "running": ["start"]}.get(state, []):
        engine.call("POST", f"/containers/{created['Id']}/{action}")
    assert_envelope(agent.delete(f"/api/v1/networks/{name}"), 409, name)
    assert network_rows(engine, name) == [found] or state == "running"
    engine.remove(created["Id"])
    assert agent.delete(f"/api/v1/networks/{name}").status == 200


def test_predefined_network_keeps_the_engines_words(agent, engine):
    engine.run("true")  # uses the bridge
    for name in ("bridge", "none"):
        assert_envelope(agent.delete(f"/api/v1/networks/{name}"), 403, "pre-defined")


def test_volumes(agent, engine):
    name = "da-" + secrets.token_hex(6)
    host = {"Binds": [f"{name}:/a", f"{name}:/b"], "NetworkMode": "none"}
    containers = [engine.run("true", HostConfig=host) for _ in range(2)]

    def row() -> dict[str, Any]:
        rows = agent.get("/api/v1/volumes").json()["volumes"]
        return next((row for row in rows if row["name"] == name), {})

    inspect = engine.call("GET", f"/volumes/{name}")[1]
    expected = {"name": name, "driver": "local", "created": inspect["CreatedAt"], "labels": {}}
    assert row() == {**expected, "containers": 2}
    assert_envelope(agent.delete(f"/api/v1/volumes/{name}"), 409, name)
    for container in containers:
        engine.remove(container)
    assert row() == {**expected, "containers": 0}
    assert agent.delete(f"/api/v1/volumes/{name}").json() == {"message": "volume removed"}
    assert row() == {}
    assert_envelope(agent.delete(f"/api/v1/volumes/{name}"), 404, name)


def test_volume_that_is_not_there_is_no_other_whose_name_begins_so(fakes):
    """podman would remove web-data for web, if no other begins so."""
    fake, agent = fakes
    fake.script["GET /volumes/web"] = http_answer({"message": "no such volume"}, 404)
    fake.script["DELETE /volumes/web"] = http_answer(b"", 204)
    fake.requests()
    assert_envelope(agent.delete("/api/v1/volumes/web"), 404, "no such volume")
    assert fake.changes() == []


def test_volumes_are_removed_one_at_a_time(fakes):
    """Else the second of two removals of web would find it, and podman remove web-data."""
    fake, agent = fakes
    second = threading.Thread(target=agent.delete, args=("/api/v1/volumes/b",))
    order = []

    def find(sock: socket.socket) -> None:
        order.append("found")
        sock.sendall(http_answer({}))

    def remove(sock: socket.socket) -> None:
        if not second.ident:
            second.start()
            time.sleep(0.3)  # until it would look for its own
        order.append("removed")
        sock.sendall(NO_CONTENT)

    for name in "ab":
        fake.script.update({f"GET /volumes/{name}": find, f"DELETE /volumes/{name}": remove})
    assert agent.delete("/api/v1/volumes/a").status == 200
    second.join(WAIT)
    assert order == ["found", "removed"] * 2


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------

TREE = [
    "dir outside",
    "file outside/secret",
    "dir host/app",
    "file host/app/old",
    "dir host/app/full",
    "file host/app/full/kept",
    "dir host/run",
    "dir host/var",
    "link host/var/run /run",
    "link host/current app",
    "link host/nested app/../current/full",
    "link host/abs /app",
    "link host/abs-up /app/../../outside",
    "link host/up ../outside",
    "link host/deep app/full/../../../outside",
    "link host/dangling nowhere",
    "link host/dangling-below app/nowhere/else",
    "link host/dangling-out ../outside/new",
    "link host/loop loop",
    "link host/ping pong",
    "link host/pong ping",
    "link host/to-file app/old",
    "link host/app/last old",
    "link host/app/last-out ../../outside/secret",
    "link host/app/last-dangling gone",
    "fifo host/app/fifo",
    "socket host/app/socket",
    "device host/app/null",
    *(f"link host/hop{n} hop{n + 1}" for n in range(1, 41)),
    "link host/hop41 app",
]


def build(base: Path, lines: list[str]) -> None:
    """Make a tree from its lines: dir NAME, file NAME, link NAME TARGET, and so on."""
    for line in lines:
        kind, name, *rest = line.split(" ")
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "dir":
            path.mkdir(mode=0o755)
        elif kind == "file":
            path.write_text("old")
            path.chmod(0o640)
        elif kind == "link":
            path.symlink_to(rest[0])
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "device":
            os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        else:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(path))


def snapshot(base: Path) -> dict[str, tuple[Any, ...]]:
    """All that is below a folder: mode, owner, inode and content by name."""
    found = {}
    for folder, folders, files in os.walk(base):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            at = os.lstat(path)
            what: Any = os.readlink(path) if stat.S_ISLNK(at.st_mode) else None
            if stat.S_ISREG(at.st_mode):
                what = Path(path).read_bytes()
            found[os.path.relpath(path, base)] = (at.st_mode, at.st_uid, at.st_gid, at.st_ino, what)
    return found


def clear(*folders: Path) -> None:
    if any(map(os.listdir, folders)):
        subprocess.run(["find", *folders, "-mindepth", "1", "-delete"], check=True)


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


@contextlib.contextmanager
def mounted(kind: str, where: Path, options: str) -> Iterator[None]:
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, "none", str(where)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


@pytest.fixture(scope="session")
def tree_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, Path]]:
    """An agent with the strictest umask, and the folder that holds its HOST_ROOT, host."""
    base = tmp_path_factory.mktemp("tree")
    (base / "host").mkdir()
    env = {"HOST_ROOT": str(base / "host"), "DOCKER_HOST": f"unix://{base}/none"}
    with umask(0o077):
        agent = Agent(**env)
    with agent:
        yield agent, base


@pytest.fixture
def tree(tree_agent: tuple[Agent, Path]) -> Iterator[Path]:
    """The folder with TREE in it, built afresh."""
    base = tree_agent[1]
    clear(base / "host")
    with umask(0o022):
        build(base, TREE)
    yield base
    clear(base / "host", base / "outside")
    (base / "outside").rmdir()


def write(tree_agent: tuple[Agent, Path], path: str, content: str = "new", **rest: Any) -> Reply:
    return tree_agent[0].post("/api/v1/files", {"path": path, "content": content, **rest})


@pytest.mark.parametrize("path, place", [
    pytest.param("/app/new", "app/new", id="a new file"),
    pytest.param("/app/old", "app/old", id="an old file is replaced"),
    pytest.param("//app/./new", "app/new", id="empty and dot components mean nothing"),
    pytest.param("/top", "top", id="a file at the root itself"),
    pytest.param("/a/b/c/new", "a/b/c/new", id="missing parents are made"),
    pytest.param("/current/new", "app/new", id="a relative link is followed"),
    pytest.param("/current/x/y", "app/x/y", id="parents are made behind a link"),
    pytest.param("/nested/new", "app/full/new", id="a link with .. that stays beneath the root"),
    pytest.param("/abs/new", "app/new", id="an absolute link starts again at the root"),
    pytest.param("/var/run/x.pid", "run/x.pid", id="/var/run means the host's /run"),
    pytest.param("/hop2/new", "app/new", id="40 links are as many as Linux follows"),
    pytest.param("/app/..new", "app/..new", id="a name that only begins with dots"),
    pytest.param("/app/" + "n" * 255, "app/" + "n" * 255, id="the longest name"),
    pytest.param("/app/\u00e9 \n\\", "app/\u00e9 \n\\", id="any byte in a name but / and NUL"),
])  # fmt: skip
def test_write_lands_where_the_host_sees_it(tree_agent, tree, path, place):
    before = snapshot(tree)
    reply = write(tree_agent, path)
    assert reply.status == 201, reply.body
    message = "file written successfully"
    assert reply.json() == {"path": path, "size": 3, "changed": True, "message": message}
    after = snapshot(tree)
    parents = [str(Path("host", *Path(place).parts[:n])) for n in range(1, len(Path(place).parts))]
    assert after[f"host/{place}"][4] == b"new"
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed == {f"host/{place}", *(name for name in parents if name not in before)}
    # Whatever the umask, parents are 0755 and a new file is 0644.
    for name in changed - before.keys():
        assert stat.S_IMODE(after[name][0]) == (0o755 if name in parents else 0o644), name


REFUSED = [
    pytest.param("/up/x", 400, id="link that climbs above the root"),
    pytest.param("/abs-up/x", 400, id="absolute link that climbs above the root"),
    pytest.param("/deep/x", 400, id="link that goes down and then climbs above the root"),
    pytest.param("/dangling-out/x", 400, id="dangling link that climbs above the root"),
    pytest.param("/hop1/x", 400, id="41 links"),
    pytest.param("/loop/x", 400, id="link to itself"),
    pytest.param("/ping/x", 400, id="two links to each other"),
    pytest.param("/dangling/x", 409, id="folder made through a dangling link"),
    pytest.param("/dangling-below/x", 409, id="folders made through a dangling link"),
    pytest.param("/app/old/x", 409, id="file in the place of a folder"),
    pytest.param("/to-file/x", 409, id="link to a file in the place of a folder"),
    pytest.param("/app/fifo/x", 409, id="FIFO in the place of a folder"),
    pytest.param("/made/app/../x", 400, id=".. in the middle"),
    pytest.param("/../outside/x", 400, id=".. at the root"),
    pytest.param("/app/..", 400, id=".. at the end"),
    pytest.param("/app/last", 400, id="link as the last component"),
    pytest.param("/app/last-out", 400, id="link to the outside as the last component"),
    pytest.param("/app/last-dangling", 400, id="dangling link as the last component"),
    pytest.param("/app/full", 409, id="folder as the last component"),
    pytest.param("/app/fifo", 409, id="FIFO as the last component hangs the agent"),
    pytest.param("/app/socket", 409, id="socket as the last component"),
    pytest.param("/app/null", 409, id="device as the last component"),
    pytest.param("/app/", 400, id="trailing slash"),
    pytest.param("/app/.", 400, id="dot at the end"),
    pytest.param("/", 400, id="the root"),
    pytest.param("//", 400, id="the root in two slashes"),
    pytest.param("", 400, id="no path"),
    pytest.param("app/new", 400, id="relative path"),
    pytest.param("/app/ne\0w", 400, id="NUL"),
    pytest.param("/made/app/" + "n" * 256, 400, id="name of 256 bytes"),
    pytest.param("/app/" + "\u00e9" * 128, 400, id="name of 256 bytes in 128 characters"),
    pytest.param("/made" + "/n" * 2100, 400, id="path over PATH_MAX"),
]


def file_url(path: str) -> str:
    return f"/api/v1/files?path={quote(path)}"


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize("path, status", REFUSED)
def test_refused_write_changes_nothing(tree_agent, tree, path, status, atomic):
    before = snapshot(tree)
    assert_envelope(write(tree_agent, path, atomic=atomic), status)
    assert snapshot(tree) == before


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize(
    "path, status",
    [
        *REFUSED,
        pytest.param("/app/none", 404, id="no such file"),
        pytest.param("/none/at/all", 404, id="no such parent is made"),
    ],
)
def test_refused_read_and_removal_change_nothing(tree_agent, tree, path, status, method):
    before = snapshot(tree)
    # A read makes no folders, so a dangling link has nothing behind it.
    status = 404 if path in ("/dangling/x", "/dangling-below/x") else status
    assert_envelope(tree_agent[0].request(method, file_url(path)), status)
    assert snapshot(tree) == before


def test_read_gives_the_bytes_and_what_is_known_of_them(tree_agent, tree):
    data = bytes(range(256)) * 4000
    old = tree / "host/app/old"
    old.write_bytes(data)
    old.chmod(0o4750)
    for path in ("/app/old", "/current/old", "/abs/old"):
        reply = tree_agent[0].get(file_url(path))
        assert (reply.status, reply.body) == (200, data)
        assert reply.headers["content-type"] == "application/octet-stream"
        assert reply.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
        names = ("x-file-mode", "x-file-uid", "x-file-gid")
        owner = [str(os.getuid()), str(os.getgid())]
        assert [reply.headers[name] for name in names] == ["4750", *owner]
    head = tree_agent[0].request("HEAD", file_url("/app/old"))
    assert head.headers["content-length"] == str(len(data)) and head.body == b""


@pytest.mark.parametrize("size, status", [(10 * 2**20, 200), (10 * 2**20 + 1, 413)])
def test_file_is_read_up_to_ten_mebibytes(tree_agent, tree, size, status):
    with open(tree / "host/app/old", "wb") as file:
        file.truncate(size)
    reply = tree_agent[0].get(file_url("/app/old"))
    assert reply.status == status
    assert len(reply.body) == size or status == 413


def test_files_that_are_read_slowly_are_held_once(tree_agent, tree):
    (tree / "host/app/old").write_bytes(bytes(10 * MIB))
    agent, ask = tree_agent[0], message(f"GET {file_url('/app/old')}")
    before = memory(agent, "VmRSS")
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(agent.connect())
            client.sendall(ask)
            assert client.recv(12) == b"HTTP/1.1 200"
        assert memory(agent, "VmRSS") - before < 6 * 15 * MIB


def test_file_that_is_written_while_read_keeps_the_agent_no_longer():
    """procfs says that its files are regular and empty, and reading the kernel's log would wait."""
    tree = da.Tree("/proc", {})
    assert da.read_beneath(tree, f"/{os.getpid()}/comm")[0] == Path("/proc/self/comm").read_bytes()
    if os.geteuid() == 0 and os.path.exists("/proc/kmsg"):
        with contextlib.suppress(da.ApiError):
            da.read_beneath(tree, "/kmsg")


def test_removed_file_is_gone_and_nothing_else(tree_agent, tree):
    before = snapshot(tree)
    for path, place in (("/app/old", "host/app/old"), ("/current/full/kept", "host/app/full/kept")):
        reply = tree_agent[0].delete(file_url(path))
        assert (reply.status, reply.json()) == (200, {"message": "file removed"})
        assert_envelope(tree_agent[0].delete(file_url(path)), 404)
        del before[place]
    assert snapshot(tree) == before


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize(
    "asked, changed",
    [
        pytest.param({}, False, id="nothing asked for"),
        pytest.param({"permission": "640", "uid": 4001, "gid": 4002}, False, id="all as it is"),
        pytest.param({"permission": "0600"}, True, id="another mode"),
        pytest.param({"uid": 0}, True, id="another user"),
        pytest.param({"gid": 0}, True, id="another group"),
        pytest.param({"content": "odd"}, True, id="other content of the same length"),
        pytest.param({"content": "older"}, True, id="longer content"),
        pytest.param({"content": ""}, True, id="no content"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")
def test_file_that_is_as_asked_for_is_left_alone(tree_agent, tree, asked, changed, atomic):
    old = tree / "host/app/old"
    os.chown(old, 4001, 4002)
    os.utime(old, (1, 2))
    before = old.stat()
    body = {"path": "/app/old", "content": "old", "atomic": atomic, **asked}
    reply = tree_agent[0].post("/api/v1/files", body)
    assert (reply.status, reply.json()["changed"]) == (201, changed)
    after = old.stat()
    assert old.read_text() == body["content"]
    assert (after.st_ino == before.st_ino) is (not (changed and atomic))
    if not changed:
        times = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
        assert [getattr(before, name) for name in times] == [getattr(after, name) for name in times]


def test_lease_on_a_file_keeps_nobody_from_replacing_it(tree_agent, tree):
    """A container can take one with a read-only mount of the folder."""
    old = os.open(tree / "host/app/old", os.O_RDONLY)
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    try:
        fcntl.fcntl(old, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        reply = write(tree_agent, "/app/old", content="odd")  # as long as the old content
        assert (reply.status, reply.json()["changed"]) == (201, True)
    finally:
        os.close(old)
        signal.signal(signal.SIGIO, before)
    assert (tree / "host/app/old").read_text() == "odd"


def test_many_writes_of_a_limited_key_do_not_stand_before_anothers(tree):
    place, done = da.Tree(str(tree / "host"), {}), []

    def put(folder: str | None, name: str) -> None:
        write = da.FileWrite(b"x")
        da.write_beneath(place._replace(folder=folder), f"/app/{name}", write)
        done.append(name)

    threads = [
        threading.Thread(target=put, args=("/app", f"limited{number}")) for number in range(30)
    ]
    threads.append(threading.Thread(target=put, args=(None, "master")))
    with da.Walk(place) as walk:
        parent, _ = walk.enter("/app/old")
        walk.lock(parent)  # until all of them wait
        for thread in threads:
            thread.start()
            time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert len(done) == 31 and done.index("master") < 15


def test_content_is_empty_by_default(tree_agent, tree):
    for path, changed in (("/app/new", True), ("/app/new", False), ("/app/old", True)):
        reply = tree_agent[0].post("/api/v1/files", {"path": path})
        assert (reply.status, reply.json()["size"], reply.json()["changed"]) == (201, 0, changed)
        assert (tree / "host" / path[1:]).read_bytes() == b""


@pytest.mark.parametrize("permission", [644, "rw-r--r--", "0o644", "17777", "0888"])
def test_mode_that_is_no_octal_string_says_what_to_write(tree_agent, tree, permission):
    before = snapshot(tree)
    reply = write(tree_agent, "/app/old", permission=permission)
    assert_envelope(reply, 400, 'permission: must be a string, such as "0644"')
    assert snapshot(tree) == before


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize(
    "path, permission, mode",
    [
        pytest.param("/app/new", None, 0o644, id="new"),
        pytest.param("/app/old", None, 0o640, id="an old file keeps its own"),
        pytest.param("/app/old", "0666", 0o666, id="umask takes nothing away"),
        pytest.param("/app/new", "4755", 0o4755, id="set-user-id"),
        pytest.param("/app/old", "7777", 0o7777, id="all bits"),
        pytest.param("/app/old", "0", 0, id="no bits"),
    ],
)
def test_mode_is_exact(tree_agent, tree, path, permission, mode, atomic):
    reply = write(tree_agent, path, permission=permission, atomic=atomic)
    assert reply.status == 201, reply.body
    assert stat.S_IMODE((tree / "host" / path[1:]).stat().st_mode) == mode


def test_new_file_has_no_other_mode_before_the_one_asked_for(tree):
    """Where there are no files without a name, others could open its temporary one."""
    code = """
sys.addaudithook(lambda event, found: event == "os.chmod" and print(oct(found[1])))
da.write_beneath(tree, "/app/new", da.FileWrite(b"secret", mode=0o640))
"""
    assert in_child(code, str(tree / "host")) == "0o640\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize(
    "asked, owner",
    [
        pytest.param({}, (4001, 4002), id="kept"),
        pytest.param({"uid": 7}, (7, 4002), id="user alone"),
        pytest.param({"gid": 8}, (4001, 8), id="group alone"),
        pytest.param({"uid": 0, "gid": 0}, (0, 0), id="zero is not the same as absent"),
    ],
)
def test_owner_and_set_id_bits(tree_agent, tree, asked, owner, atomic):
    old = tree / "host/app/old"
    os.chown(old, 4001, 4002)
    old.chmod(0o6755)
    assert write(tree_agent, "/app/old", atomic=atomic, **asked).status == 201
    at = old.stat()
    assert (at.st_uid, at.st_gid, stat.S_IMODE(at.st_mode)) == (*owner, 0o6755)


@pytest.mark.parametrize("size", [0, 1, 3, 200_000], ids=["empty", "shorter", "same", "longer"])
def test_in_place_keeps_the_inode_and_atomic_does_not(tree_agent, tree, size):
    old = tree / "host/app/old"
    os.link(old, tree / "outside/same")
    assert write(tree_agent, "/app/old", "x" * size, atomic=False).status == 201
    assert old.samefile(tree / "outside/same")
    assert old.read_text() == "x" * size
    assert write(tree_agent, "/app/old", "y" * size).status == 201
    assert old.read_text() == "y" * size
    assert (tree / "outside/same").read_text() == "x" * size


def test_base64_is_bytes(tree_agent, tree):
    data = bytes(range(256)) * 40
    text = base64.b64encode(data).decode()
    assert write(tree_agent, "/app/new", text, encoding="base64").json()["size"] == len(data)
    assert (tree / "host/app/new").read_bytes() == data
    for bad in (
        "=",
        "==",
        "AAEC=",
        "AAA==",
        "AB==",
        "a",
        "a===",
        "YQ==YQ==",
        "Y Q=",
        "YQ=\n=",
        "\u00e9",
    ):
        before = snapshot(tree)
        assert_envelope(write(tree_agent, "/app/new", bad, encoding="base64"), 400, "content")
        assert snapshot(tree) == before


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize("path", ["/small/old", "/small/new", "/small/a/b/new", "/small/sparse"])
def test_full_disk_leaves_the_old_file_and_no_litter(tree_agent, tree, path, atomic):
    small = tree / "host/small"
    with mounted("tmpfs", small, "size=256k"):
        (small / "old").write_bytes(b"o" * 100_000)
        with open(small / "sparse", "wb") as sparse:
            sparse.truncate(900_000)
        before = snapshot(small)
        assert_envelope(write(tree_agent, path, "x" * 800_000, atomic=atomic), 507)
        assert snapshot(small) == before


def test_in_place_grows_a_file_where_nothing_can_be_reserved(tree_agent, tree):
    # ramfs has no fallocate, as NFS before 4.2 and many FUSE filesystems.
    with mounted("ramfs", tree / "host/plain", "mode=755"):
        (tree / "host/plain/old").write_bytes(b"o" * 5000)
        reply = write(tree_agent, "/plain/old", "x" * 10_000, atomic=False)
        assert reply.status == 201, reply.body
        assert (tree / "host/plain/old").read_bytes() == b"x" * 10_000


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize("path", ["/ro/old", "/ro/new", "/ro/a/b/new"])
def test_read_only_mount(tree_agent, tree, path, atomic):
    ro = tree / "host/ro"
    with mounted("tmpfs", ro, "size=256k"):
        (ro / "old").write_text("old")
        subprocess.run(["mount", "-o", "remount,ro", str(ro)], check=True)
        before = snapshot(ro)
        assert_envelope(write(tree_agent, path, atomic=atomic), 403)
        status = 403 if path == "/ro/old" else 404
        assert tree_agent[0].delete(file_url(path)).status == status
        assert snapshot(ro) == before


class FakeFilesystem:
    """A filesystem as seen from /dev/fuse: one folder of files whose mode is 0755, owner 0:0.

    It has no hard links, no unnamed files and no attributes. To set another owner or mode fails
    with the error `fixed`, as on vfat; with 0 it is ignored. While it is frozen, writes wait.
    The messages are those of linux/fuse.h, version 7.31.
    """

    def __init__(self, where: Path, fixed: int) -> None:
        self.where, self.fixed, self.frozen = where, fixed, False
        self.refusal = 0  # the error of each write
        self.names: dict[bytes, int] = {}
        self.contents: dict[int, bytearray] = {}
        self.waiting: list[bytes] = []
        where.mkdir()
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=40755,user_id=0,group_id=0,default_permissions"
        command = ["mount", "-i", "-t", "fuse", "-o", options, "fake", str(where)]
        subprocess.run(command, check=True, pass_fds=[self.device])
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> FakeFilesystem:
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.where)], check=True)

    def serve(self) -> None:
        with contextlib.suppress(OSError):  # unmounted
            while True:
                message = os.read(self.device, 1 << 20)
                if self.frozen and struct.unpack_from("<L", message, 4) == (16,):  # write
                    self.waiting.append(message)
                else:
                    self.answer(message)

    def files(self) -> dict[bytes, bytes]:
        return {name: bytes(self.contents[node]) for name, node in self.names.items()}

    def thaw(self) -> None:
        self.frozen = False
        while self.waiting:
            self.answer(self.waiting.pop(0))

    def answer(self, message: bytes) -> None:
        _, kind, unique, node = struct.unpack_from("<LLQQ", message)
        if kind in (2, 36, 42):  # forget, interrupt: take no answer
            return
        try:
            error, body = 0, self.reply(kind, node, message[40:])
        except OSError as failure:
            error, body = -failure.errno, b""
        with contextlib.suppress(FileNotFoundError):  # interrupted meanwhile
            os.write(self.device, struct.pack("<LlQ", 16 + len(body), error, unique) + body)

    def attributes(self, node: int) -> bytes:
        size = len(self.contents.get(node, b""))
        mode = stat.S_IFDIR if node == 1 else stat.S_IFREG
        return struct.pack("<6Q10L", node, size, 0, 0, 0, 0, 0, 0, 0, mode | 0o755, 1, *[0] * 5)

    def entry(self, node: int) -> bytes:
        return struct.pack("<4QLL", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def reply(self, kind: int, node: int, body: bytes) -> bytes:
        if kind == 26:  # init
            return struct.pack("<4LHHLLHH8L", 7, 31, 65536, 0, 16, 16, 65536, 1, 16, *[0] * 9)
        if kind in (1, 10) and body[:-1] not in self.names:  # lookup, unlink
            raise FileNotFoundError(errno.ENOENT, "")
        if kind == 1:
            return self.entry(self.names[body[:-1]])
        if kind == 10:
            del self.names[body[:-1]]
            return b""
        if kind == 35:  # create
            name, new = body[16:-1], len(self.contents) + 2
            self.names[name], self.contents[new] = new, bytearray()
            return self.entry(new) + bytes(16)
        if kind == 12:  # rename
            old, new_name = body[8:-1].split(b"\0")
            self.names[new_name] = self.names.pop(old)
            return b""
        if kind == 4:  # setattr: mode is bit 0, owner and group are bits 1 and 2, size is bit 3
            which, size = struct.unpack_from("<L12xQ", body)
            if which & 7 and self.fixed:
                raise OSError(self.fixed, "")
            if which & 8:
                self.contents[node] = self.contents[node][:size].ljust(size, b"\0")
        if kind in (3, 4):  # getattr
            return struct.pack("<QLL", 0, 0, 0) + self.attributes(node)
        if kind in (14, 27):  # open, opendir
            return bytes(16)
        offset, size = struct.unpack_from("<8xQL", body) if kind in (15, 16) else (0, 0)
        if kind == 15:  # read
            return bytes(self.contents[node][offset : offset + size])
        if kind == 16 and self.refusal:
            raise OSError(self.refusal, "")
        if kind == 16:  # write
            self.contents[node][offset : offset + size] = body[40:]
            return struct.pack("<LL", size, 0)
        if kind in (18, 20, 25, 29, 30):  # release, fsync, flush, releasedir, fsyncdir
            return b""
        raise OSError(errno.ENOSYS, "")


@contextlib.contextmanager
def fuse(where: Path, fixed: int) -> Iterator[FakeFilesystem]:
    try:
        fake = FakeFilesystem(where, fixed)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting FUSE takes root: {error}")
    with fake:
        yield fake


@pytest.fixture(params=[errno.EPERM, errno.EINVAL, errno.ENOSYS, 0], ids=errno.errorcode.get)
def one_mode(tree: Path, request: pytest.FixtureRequest) -> Iterator[FakeFilesystem]:
    """A filesystem of one mode at /fat that fails to set another one, or ignores it (0)."""
    with fuse(tree / "host/fat", request.param) as fake:
        yield fake


@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize(
    "asked, status",
    [
        pytest.param({}, 201, id="no mode asked for"),
        pytest.param({"permission": "0755", "uid": 0, "gid": 0}, 201, id="the one there is"),
        pytest.param({"permission": "0644"}, 403, id="mode that does not take"),
        pytest.param({"uid": 7}, 403, id="user that does not take"),
        pytest.param({"gid": 7}, 403, id="group that does not take"),
    ],
)
def test_filesystem_of_one_mode(tree_agent, one_mode, asked, status, atomic):
    for old in ({}, {b"f": b"old"}):
        assert one_mode.files() == old
        for content in ("new", "newer"):
            reply = write(tree_agent, "/fat/f", content, atomic=atomic, **asked)
            assert reply.status == status, reply.body
            assert one_mode.files() == ({b"f": content.encode()} if status == 201 else old)
        assert write(tree_agent, "/fat/f", "old").status == 201
    assert tree_agent[0].get(file_url("/fat/f")).body == b"old"
    assert tree_agent[0].delete(file_url("/fat/f")).status == 200
    assert one_mode.files() == {}


@pytest.mark.parametrize("one_mode", [errno.EPERM], ids=["refuses"], indirect=True)
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
@pytest.mark.parametrize("refusal, status", [("EAGAIN", 409), ("EIO", 500), ("ENOSPC", 507)])
def test_write_that_fails_is_an_answer(tree_agent, one_mode, refusal, status, atomic):
    assert write(tree_agent, "/fat/f", "old").status == 201
    one_mode.refusal = getattr(errno, refusal)
    assert_envelope(write(tree_agent, "/fat/f", "new", atomic=atomic), status)
    assert one_mode.files() == {b"f": b"old"}


def test_folder_that_is_put_in_a_files_place_meanwhile_is_409(tree):
    folder = tree / "host/app"
    (folder / "taken/inside").mkdir(parents=True)
    parent, found = os.open(folder, os.O_PATH), os.open(folder / "old", os.O_PATH)
    with pytest.raises(da.ApiError, match="a folder in the file's place"), da.file_errors():
        da.replace(parent, b"taken", found, da.FileWrite(b"new"))
    os.close(parent)
    os.close(found)
    assert [*folder.glob(".dockeragent-*")] == [] and (folder / "taken/inside").is_dir()


@pytest.mark.parametrize("one_mode", [errno.EPERM], ids=["frozen"], indirect=True)
def test_frozen_filesystem_holds_up_requests_to_itself_alone(tree_agent, tree, one_mode):
    """It takes the agent's 30 s: the first write hangs, the others are refused."""
    assert write(tree_agent, "/fat/f", "old").status == 201
    statuses: dict[str, int] = {}

    def send(method: str, path: str, **body: Any) -> None:
        target = "/api/v1/files" if body else file_url(path)
        reply = tree_agent[0].request(method, target, {"path": path, **body} if body else None)
        statuses[f"{method} {path} {body}"] = reply.status

    def start(method: str, path: str, **body: Any) -> threading.Thread:
        thread = threading.Thread(target=send, args=(method, path), kwargs=body)
        thread.start()
        return thread

    one_mode.frozen = True
    first = start("POST", "/fat/first", content="x")
    until(lambda: one_mode.waiting, "the first write to hang")
    before, large = memory(tree_agent[0], "VmRSS"), "x" * 9 * MIB
    others = [start("POST", "/fat/second", content=large), start("POST", "/fat/f", content=large)]
    others += [start("POST", "/fat/f", content=large, atomic=False), start("DELETE", "/fat/f")]
    others += [start("POST", "/fat/d/e/f", content=large)]
    try:
        for turn in range(50):
            assert write(tree_agent, f"/app/{turn % 5}", str(turn)).status == 201
            assert write(tree_agent, "/app/old", str(turn), atomic=False).status == 201
        assert tree_agent[0].get(file_url("/fat/f")).body == b"old"
        # What waits is held once.
        until(lambda: memory(tree_agent[0], "VmRSS") - before < 4 * 14 * MIB, "little memory")
        assert not statuses
        for thread in others:
            thread.join()
        assert sorted(statuses.values()) == [503] * 5
    finally:
        one_mode.thaw()
    first.join()
    assert sorted(statuses.values()) == [201] + [503] * 5
    assert one_mode.files() == {b"f": b"old", b"first": b"x"}
    assert write(tree_agent, "/fat/f", "new").status == 201


@pytest.mark.parametrize("turns", [3])
def test_append_only_folder_keeps_the_old_file_and_gets_no_litter(tree_agent, tree, turns):
    folder = tree / "host/app/full"
    if os.system(f"chattr +a {folder} 2>/dev/null"):
        pytest.skip("append-only folders take root, chattr, and a filesystem that has them")
    try:
        before = snapshot(folder)
        for _ in range(turns):
            assert_envelope(write(tree_agent, "/app/full/kept"), 403)
            assert_envelope(tree_agent[0].delete(file_url("/app/full/kept")), 403)
            assert snapshot(folder) == before
        for turn in range(turns):
            assert write(tree_agent, f"/app/full/new{turn}").status == 201
        assert write(tree_agent, "/app/full/kept", atomic=False).status == 201
        assert set(snapshot(folder)) == {"kept", *(f"new{turn}" for turn in range(turns))}
        assert (folder / "kept").read_text() == "new"
    finally:
        subprocess.run(["chattr", "-a", str(folder)], check=True)


def test_no_host_root_says_how_to_mount_it(tmp_path):
    with Agent(HOST_ROOT=str(tmp_path / "none"), DOCKER_HOST=f"unix://{tmp_path}/e") as agent:
        reply = agent.post("/api/v1/files", {"path": "/a/b", "content": ""})
        assert_envelope(reply, 503, "-v /:/host")
    assert list(tmp_path.iterdir()) == []


CHILD = "import os, resource, sys; import dockeragent as da\n"
CHILD += "tree = da.Tree((*sys.argv, '/')[1], {})\n"


def in_child(code: str, *arguments: str) -> str:
    """Run code, with `da` imported, in a process of its own; return what it prints."""
    command = [sys.executable, "-c", CHILD + code, *arguments]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, check=True, timeout=60)
    return done.stdout.decode()


ATTEMPT = """
try: da.write_beneath(tree, sys.argv[2], da.FileWrite(b"new", **eval(sys.argv[3])))
except da.ApiError as error: print(error.status)
"""


@pytest.mark.parametrize("most", range(20, 24))
def test_parents_are_removed_when_descriptors_run_out(tree, most):
    before = snapshot(tree)
    limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))"
    assert in_child(limit + ATTEMPT, str(tree / "host"), "/d" * 40, "{}") == "503\n"
    assert snapshot(tree) == before


def test_deep_path_of_a_limited_key_holds_few_descriptors(tree):
    """Many at once would take those of everybody's connections."""
    (tree / "host/app" / ("d/" * 100)).mkdir(parents=True)
    limit = (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20)); tree = tree._replace(folder='/app')"
    )
    assert in_child(limit + ATTEMPT, str(tree / "host"), "/app" + "/d" * 100 + "/new", "{}") == ""


def test_links_down_and_up_again_hold_no_descriptors(tree):
    (tree / "host/zigzag").symlink_to("app/../" * 500 + "app")
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))"
    assert in_child(limit + ATTEMPT, str(tree / "host"), "/zigzag/new", "{}") == ""
    assert (tree / "host/app/new").read_text() == "new"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
@pytest.mark.parametrize("atomic", [True, False], ids=["atomic", "in place"])
def test_owner_that_may_not_be_given_leaves_the_old_content(tree, atomic):
    os.chown(tree / "host/app", 4001, 4001)
    os.chown(tree / "host/app/old", 4001, 4001)
    for folder in (tree, *tree.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o005)
    before = snapshot(tree)
    asked = f"dict(uid=0, atomic={atomic})"
    become = "os.setgroups([]); os.setgid(4001); os.setuid(4001)"
    assert in_child(become + ATTEMPT, str(tree / "host"), "/app/old", asked) == "403\n"
    assert snapshot(tree) == before


def test_reader_never_sees_a_mix(tree_agent, tree):
    old = tree / "host/app/old"
    contents = [letter * 2_000_000 for letter in "ab"]
    old.write_text(contents[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(old.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(40):
            assert write(tree_agent, "/app/old", contents[turn % 2]).status == 201
    finally:
        stop.set()
        reader.join()
    assert seen == set(contents)


def test_one_writer_in_place_at_a_time(tree_agent, tree):
    contents = [letter * size for letter, size in (("a", 300), ("b", 200), ("c", 100), ("d", 50))]
    for _ in range(60):
        at_once(lambda content: write(tree_agent, "/app/old", content, atomic=False), contents)
        assert (tree / "host/app/old").read_text() in contents


@pytest.mark.skipif(os.geteuid() != 0, reason="a file of somebody else's takes root")
def test_access_list_is_kept_and_none_is_inherited(tree_agent, tree):
    """user::rw-, user 1234:rw-, group::r--, mask::rw-, other::---: the mode alone would be 0660."""
    entries = ((1, 6, -1), (2, 6, 1234), (4, 4, -1), (16, 6, -1), (32, 0, -1))
    access = struct.pack("<L", 2) + b"".join(struct.pack("<HHl", *entry) for entry in entries)
    old, plain = tree / "host/app/old", tree / "host/app/plain"
    plain.write_text("x")
    plain.chmod(0o660)
    try:
        os.setxattr(old, "system.posix_acl_access", access)
        os.setxattr(old.parent, "system.posix_acl_default", access)
        os.setxattr(old, "user.kept", b"yes")
    except OSError as error:
        pytest.skip(f"this filesystem has no access lists: {error}")
    assert write(tree_agent, "/app/old").status == write(tree_agent, "/app/plain").status == 201
    assert os.getxattr(old, "system.posix_acl_access") == access
    assert os.getxattr(old, "user.kept") == b"yes"
    assert os.listxattr(plain) == [] and stat.S_IMODE(plain.stat().st_mode) == 0o660


@pytest.mark.parametrize("number, kept", [(150, 100), (9000, 0)], ids=["many", "too many to list"])
def test_attributes_by_the_thousand_do_not_hold_up_a_write(tree, number, kept):
    """A file's owner can set them: as many as the kernel lists took seconds, more were a 500."""
    place, old = da.Tree(str(tree / "host"), {}, "/small"), tree / "host/small/old"
    with mounted("tmpfs", old.parent, "size=64m"):
        old.write_text("old")
        try:
            for name in range(number):
                os.setxattr(old, f"trusted.{name:x}", b"x")
        except OSError as error:
            pytest.skip(f"no attributes here: {error}")
        assert da.read_beneath(place, "/small/old")[0] == b"old"
        assert da.write_beneath(place, "/small/old", da.FileWrite(b"new"))
        assert old.read_text() == "new" and len(os.listxattr(old)) == kept


def test_taken_temporary_name_is_no_obstacle(tree_agent, tree):
    (tree / f"host/app/.dockeragent-{binascii.crc32(b'old'):08x}").mkdir()
    assert write(tree_agent, "/app/old").status == 201
    assert len(list((tree / "host/app").glob(".dockeragent-*"))) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else takes root")
def test_failing_write_does_not_take_the_folder_of_another_away(tree):
    for folder in (tree, *tree.parents):
        folder.chmod(folder.stat().st_mode | 0o005)
    (tree / "host/app").chmod(0o777)
    code = (
        "import threading\n"
        "os.setgroups([]); os.setgid(4001); os.setuid(4001)\n"
        "found = []\n"
        "def put(path, write):\n"
        "    try: da.write_beneath(tree, path, write); found.append(201)\n"
        "    except da.ApiError as error: found.append(error.status)\n"
        "for turn in range(300):\n"
        "    pair = [('a', da.FileWrite(b'', gid=0)), ('b', da.FileWrite(b''))]\n"
        "    at = f'/app/n{turn}/d/e/f/'\n"
        "    jobs = [threading.Thread(target=put, args=(at + name, w)) for name, w in pair]\n"
        "    for job in jobs: job.start()\n"
        "    for job in jobs: job.join()\n"
        "print(sorted(set(found)), found.count(201))\n"
    )
    assert in_child(code, str(tree / "host")) == "[201, 403] 300\n"


def test_refused_write_in_place_leaves_the_set_id_bits(tree):
    for folder in (tree, *tree.parents):
        folder.chmod(folder.stat().st_mode | 0o005)
    old = tree / "host/app/old"
    old.chmod(0o4766)
    become = "os.setgroups([]); os.setgid(4001); os.setuid(4001)"
    assert (
        in_child(become + ATTEMPT, str(tree / "host"), "/app/old", "dict(atomic=False)") == "403\n"
    )
    assert stat.S_IMODE(old.stat().st_mode) == 0o4766 and old.read_text() != "new"


@pytest.mark.parametrize("name", ["oom_score_adj", "comm"])
def test_kernel_setting_is_written_in_place(name):
    """procfs can neither fsync nor reserve room: what took effect is no failure."""
    code = (
        f"path = f'/proc/{{os.getpid()}}/{name}'\n"
        "da.write_beneath(tree, path, da.FileWrite(b'7', atomic=False))\n"
        "print(open(path).read(), end='')\n"
    )
    assert in_child(code) == "7\n"


@pytest.mark.parametrize("names", ["old", "new{turn}"], ids=["replaced", "new names"])
def test_killed_writer_leaves_old_or_new_and_no_litter(tree, names):
    whole = [letter * 300_000 for letter in (b"a", b"b")]
    code = f"""
import itertools, signal, time
for line in sys.stdin:
    if (writer := os.fork()) == 0:
        for turn in itertools.count(os.getpid() * 10_000):
            content = b'ab'[turn % 2 :][:1] * 300_000
            da.write_beneath(tree, f'/app/full/{names}', da.FileWrite(content))
    time.sleep(float(line))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    print("killed", flush=True)
"""
    (tree / "host/app/full/kept").unlink()
    command = [sys.executable, "-c", CHILD + code, str(tree / "host")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=HERE, **pipes) as child:
        for _ in range(30):
            print(secrets.randbelow(20_000) / 1e6, file=child.stdin, flush=True)
            assert child.stdout.readline() == "killed\n"
            # A rename takes two steps: what a kill between them has left goes with the next write.
            if names == "old":
                there = da.Tree(str(tree / "host"), {})
                da.write_beneath(there, "/app/full/old", da.FileWrite(b"c"))
                (tree / "host/app/full/old").write_bytes(whole[0])
            for path in (tree / "host/app/full").iterdir():
                assert path.name.startswith(names[:3]), path.name
                assert path.read_bytes() in whole, path.name
    assert list((tree / "host/app/full").iterdir())


def test_last_of_many_writers_wins_and_none_fails(tree_agent, tree):
    def rewrite(agents: tuple[Agent, Path], letter: str) -> list[int]:
        return [write(agents, "/app/old", letter * 5000).status for _ in range(100)]

    with Agent(**{**tree_agent[0].env, "LISTEN_ADDR": "127.0.0.1:0"}) as other:
        agents = [tree_agent, (other, tree)] * 2
        assert at_once(rewrite, agents, "abcd") == [[201] * 100] * 4
    content = (tree / "host/app/old").read_text()
    assert content == content[0] * 5000
    assert not list((tree / "host/app").glob(".dockeragent-*"))


def test_folder_swapped_for_a_link_leads_nothing_outside(tree_agent, tree):
    host, outside = tree / "host", snapshot(tree / "outside")
    (host / "race/sub").mkdir(parents=True)
    code = (
        "import itertools, os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "os.symlink(sys.argv[2], 'link')\n"
        "swaps = (('sub', 'aside'), ('link', 'sub'), ('sub', 'link'), ('aside', 'sub'))\n"
        "for turn in itertools.count():\n"
        "    for old, new in swaps:\n"
        "        try:\n"
        "            os.rename(old, new)\n"
        "        except OSError:\n"  # the agent was faster, and made the folder that it missed
        "            os.rename(new, f'made{turn}')\n"
        "            os.rename(old, new)\n"
    )
    statuses: set[int] = set()
    command = [sys.executable, "-c", code, str(host / "race"), "../../outside"]
    with subprocess.Popen(command) as child:
        try:
            for turn in itertools.count():
                path = f"/race/sub/{'x/' * (turn % 3)}f{turn % 7}"
                statuses.add(write(tree_agent, path).status)
                # On, until both the folder and the link were met.
                if turn > 2000 and (turn > 50_000 or {201, 400} <= statuses):
                    break
        finally:
            child.kill()
    assert {201, 400} <= statuses <= {201, 400, 409}
    assert snapshot(tree / "outside") == outside


SWAP = """
import ctypes, itertools, os, select, sys
os.chdir(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
os.mkfifo("fifo")
reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
hung_up = select.poll()
hung_up.register(reader, select.POLLHUP)
print("go", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    if libc.renameat2(-100, b"fifo", -100, b"file", 2):  # RENAME_EXCHANGE
        sys.exit(os.strerror(ctypes.get_errno()))
print("opened" if hung_up.poll(0) else "never opened")
"""


def test_fifo_that_is_swapped_in_is_never_opened(tree):
    """A reader of the FIFO is told of the first writer that opens and closes it."""
    folder = tree / "host/race"
    folder.mkdir()
    (folder / "file").write_text("old")
    place, statuses = da.Tree(str(tree / "host"), {}), {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SWAP, str(folder)], **pipes) as child:
        assert child.stdout.readline() == "go\n"
        for turn in range(100_000):
            try:
                write = da.FileWrite(b"%d" % turn, atomic=False)
                status = 201 if da.write_beneath(place, "/race/file", write) else 200
                da.read_beneath(place, "/race/file")
            except da.ApiError as error:
                status = error.status
            statuses[status] = statuses.get(status, 0) + 1
            if turn > 5000 and {201, 409} <= statuses.keys():
                break
        print("stop", file=child.stdin, flush=True)
        assert child.stdout.readline() == "never opened\n"
    assert set(statuses) == {201, 409}, statuses


LIMITED = [
    pytest.param("app/full/new", None, id="a new file"),
    pytest.param("app/full/kept", None, id="an old file"),
    pytest.param("app/full/a/b/new", None, id="a new file in new folders"),
    pytest.param("app/full/in/new", 403, id="link that stays within the folder"),
    pytest.param("app/full/out/secret", 403, id="link that leads out of the folder"),
    pytest.param("app/full/up", 403, id="link as the last component"),
    pytest.param("app/full/to-nowhere/x", 403, id="dangling link"),
    pytest.param("app/full/set-id", 403, id="set-user-id file"),
    pytest.param("app/full/sticky", 403, id="file with a mode above 0777"),
    pytest.param("app/full/second", 403, id="second name of a file outside the folder"),
    pytest.param("app/full/fifo", 409, id="FIFO"),
    pytest.param("app/old", 403, id="file beside the folder"),
    pytest.param("app/fuller/new", 403, id="folder whose name only begins alike"),
    pytest.param("app/full", 403, id="the folder itself"),
    pytest.param("app/full/../old", 400, id="climbing out"),
]


@pytest.mark.parametrize("folder", ["/app/full", "/listed"])
@pytest.mark.parametrize("operation", ["atomic", "in place", "read", "remove"])
@pytest.mark.parametrize("path, refusal", LIMITED)
def test_limited_key_stays_beneath_its_folder(tree, folder, operation, path, refusal):
    lines = ["dir sub", "link in sub", "link out ../../../outside", "link up ../old", "fifo fifo"]
    build(tree / "host/app/full", [*lines, "link to-nowhere none", "file set-id", "file sticky"])
    (tree / "host/app/full/set-id").chmod(0o4755)
    (tree / "host/app/full/sticky").chmod(0o1755)
    (tree / "host/app/fuller").mkdir()
    os.link(tree / "outside/secret", tree / "host/app/full/second")
    (tree / "host/listed").symlink_to("app/full")  # what is above the listed folder is root's
    path = "/" + (path.replace("app/full", "listed", 1) if folder == "/listed" else path)
    place, before = da.Tree(str(tree / "host"), {}, folder), snapshot(tree)
    try:
        if operation == "read":
            status = 200 if da.read_beneath(place, path)[0] == b"old" else 0
        elif operation == "remove":
            status = 200 if da.remove_beneath(place, path) is None else 0
        else:
            write = da.FileWrite(b"new", atomic=operation == "atomic")
            status = 200 if da.write_beneath(place, path, write) else 0
    except da.ApiError as error:
        status = error.status
    is_new = not refusal and "new" in path
    expected = 404 if is_new and operation in ("read", "remove") else refusal or 200
    assert status == expected
    if status != 200 or operation == "read":
        assert snapshot(tree) == before


def test_limited_key_does_not_replace_a_program_with_capabilities(tree):
    place, before = da.Tree(str(tree / "host"), {}, "/app/full"), snapshot(tree)
    try:  # cap_net_raw=ep
        value = struct.pack("<5L", 0x02000001, 1 << 13, 0, 0, 0)
        os.setxattr(tree / "host/app/full/kept", "security.capability", value)
    except OSError as error:
        pytest.skip(f"no file capabilities here: {error}")
    for atomic in (True, False):
        with pytest.raises(da.ApiError) as refusal:
            da.write_beneath(place, "/app/full/kept", da.FileWrite(b"", atomic=atomic))
        assert refusal.value.status == 403
    assert snapshot(tree) == before


@pytest.mark.parametrize("meanwhile, mode", [(0o4755, 0o755), (0o600, 0o600)])
def test_mode_that_a_limited_key_keeps_is_the_last_and_no_set_id_one(tree, meanwhile, mode):
    """Else a file's owner and the key could make a program of root's that runs as root."""
    place, kept = da.Tree(str(tree / "host"), {}), tree / "host/app/full/kept"
    limited, write = place._replace(folder="/app/full"), da.FileWrite(b"new", atomic=False)
    writer = threading.Thread(target=da.write_beneath, args=(limited, "/app/full/kept", write))
    kept.chmod(0o755)
    with da.Walk(place) as walk:
        walk.lock(walk.enter("/app/full/kept")[0])
        writer.start()
        until(lambda: len(place.locks) == 2, "a write that has looked at the file, and waits")
        kept.chmod(meanwhile)
    writer.join()
    assert (kept.read_text(), stat.S_IMODE(kept.stat().st_mode)) == ("new", mode)


# --------------------------------------------------------------------------------------------------
# Logs
# --------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One server-sent event, as a client gets it."""

    type: str
    data: str
    id: str


def parse_events(stream: bytes) -> list[Event]:
    """The events of a stream by the HTML Standard, 9.2.6; a field it does not know is a failure.

    What follows the last blank line is dropped, as the standard has it.
    """
    lines = re.split("\r\n|\n|\r", stream.decode())
    events, kind, data, last = [], "", "", ""
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if not line:
            if data:
                events.append(Event(kind or "message", data[:-1], last))
            kind, data = "", ""
        elif name == "event":
            kind = value
        elif name == "data":
            data += value + "\n"
        elif name == "id":
            assert "\0" not in value
            last = value
        else:
            assert (name, value) in [("retry", "3000"), ("", "ping")], line
    return events


def logs_path(name: str, *query: str) -> str:
    return f"/api/v1/containers/{name}/logs?{'&'.join(query)}"


def read_lines(agent: Agent, name: str, *query: str) -> list[Any]:
    """The lines of a log in JSON."""
    reply = agent.get(logs_path(name, *query))
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/json"
    return reply.json()["lines"]


def follow(agent: Agent, name: str, *query: str, **kwargs: Any) -> list[Event]:
    """The events of a log that ends, the last one checked and left out."""
    reply = agent.get(logs_path(name, "follow=true", *query), **kwargs)
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache, no-transform"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.body.startswith(b"retry: 3000\n")
    *events, end = parse_events(reply.body)
    assert (end.type, json.loads(end.data)) == ("end", {"reason": "exited", "exit_code": 0})
    assert {event.type for event in events} <= {"message"}
    return events


def follow_lines(agent: Agent, name: str, *query: str) -> list[str]:
    return [event.data for event in follow(agent, name, *query)]


def as_lines(written: bytes, tty: bool = False) -> list[str]:
    """The lines of what a container wrote. A terminal puts CR LF for each LF."""
    written = written.replace(b"\n", b"\r\n") if tty else written
    lines = written.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    return [
        (line[:-1] if line[-1:] == b"\r" else line).decode("utf-8", "replace") for line in lines
    ]


def echo(
    engine: RealEngine, out: bytes = b"", err: bytes = b"", then: str = ":", **config: Any
) -> str:
    """Run a container that writes out and err at the same time, and then runs a shell command."""
    env, scripts = [], []
    for name, data in (("OUT", out), ("ERR", err)):
        text = base64.b64encode(data).decode()
        pieces = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
        env += [f"{name}{index}={piece}" for index, piece in enumerate(pieces)]
        words = " ".join(f'"${name}{index}"' for index in range(len(pieces)))
        scripts.append(f"printf %s {words or repr('')} | base64 -d")
    script = f"({scripts[0]}) & ({scripts[1]}) >&2 & wait; {then}"
    return engine.run("sh", "-c", script, Env=env, **config)


HOSTILE = b"\n".join(
    [
        b"\xef\xbb\xbfa byte order mark",
        b"",
        b"",
        b"  spaces kept  ",
        b"\ttab",
        b": not a comment",
        b"data: not a field",
        b"id",
        b"crlf\r",
        b"two carriage returns\r\r",
        b"\r",
        b"\rbegins with one",
        b'progress\rid: 9.000000000-9\revent: end\rdata: {"reason": "exited"}\r\revent: x',
        "é€😀\u2028\u2029\u0085\x0b\x0c".encode(),
        b"not UTF-8 \xff\xfe \xc3( \xed\xa0\x80",
        b"\x00\x1b[31m\x7f",
        b"2026-02-21T10:00:00.000000001Z a stamp",
        b"x" * 16383,
        b"x" * 16384,
        b"x" * 16383 + b"\r",
        b"x" * 16385,
        b"x" * 32768,
        b"\xff" + b"y" * 40_000,
        b"2026-02-21T10:00:00.000000001Z " * 2000,
        b"z" * 100_000,
        b"no newline",
    ]
)


@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
def test_lines_are_exactly_what_the_container_wrote(agent, engine, tty):
    name = echo(engine, HOSTILE, tty=tty)
    lines = as_lines(HOSTILE, tty)
    assert read_lines(agent, name) == lines
    assert follow_lines(agent, name) == [line.replace("\r", "\n") for line in lines]
    objects = read_lines(agent, name, "format=json", "timestamps=true")
    assert [item["line"] for item in objects] == lines
    assert {item["stream"] for item in objects} == {"stdout"}
    assert [json.loads(data) for data in follow_lines(agent, name, "format=json")] == objects
    stamped = [f"{item['time']} {item['line']}" for item in objects]
    assert read_lines(agent, name, "timestamps=1") == stamped
    assert follow_lines(agent, name, "timestamps=1") == [s.replace("\r", "\n") for s in stamped]
    for item in objects:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", item["time"])


def test_streams_are_put_together_apart(agent, engine):
    written = [b"".join(b"%d" % n * 100_000 + b"\n" for n in digits) for digits in ((1, 2), (3, 4))]
    name = echo(engine, *written)
    out, err = as_lines(written[0]), as_lines(written[1])
    assert sorted(read_lines(agent, name)) == sorted(follow_lines(agent, name)) == out + err
    assert read_lines(agent, name, "stderr=false") == follow_lines(agent, name, "stderr=0") == out
    assert read_lines(agent, name, "stdout=f") == follow_lines(agent, name, "stdout=FALSE") == err
    found = read_lines(agent, name, "format=json")
    for stream, lines in (("stdout", out), ("stderr", err)):
        assert [item["line"] for item in found if item["stream"] == stream] == lines


@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
def test_line_over_a_mebibyte_is_cut(agent, engine, tty):
    script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo after"
    name = engine.run("sh", "-c", script, tty=tty)
    lines = read_lines(agent, name)
    assert lines == ["x" * MIB, "x" * MIB, "x" * (3_000_000 - 2 * MIB), "after"]
    events = follow(agent, name)
    assert [event.data for event in events] == lines
    stamps, numbers = zip(*(event.id.split("-") for event in events))
    assert stamps[0] == stamps[1] == stamps[2] and numbers == ("1", "2", "3", "1")


TAILED = [
    pytest.param(b"".join(b"%d\n" % n for n in range(50)), id="short lines"),
    pytest.param(b"a\nb\n" + b"c" * 500_000 + b"\n", id="last line is long"),
    pytest.param(b"a\n" + b"b" * 500_000 + b"\nc\nd\n", id="long line in the middle"),
    pytest.param(b"a" * 100_000 + b"\n" + b"b" * 100_000 + b"\nno newline", id="all long"),
    pytest.param(b"a\n\n\n\n", id="empty lines"),
    pytest.param(b"", id="empty log"),
]


@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
@pytest.mark.parametrize("written", TAILED)
def test_tail_is_the_last_whole_lines(agent, engine, written, tty):
    name = echo(engine, written, tty=tty)
    lines = as_lines(written)
    assert read_lines(agent, name, "tail=all") == lines
    for wanted in (0, 1, 2, 3, 4, 49, 1000, 10**18 - 1):
        expected = lines[len(lines) - min(wanted, len(lines)) :]
        assert read_lines(agent, name, f"tail={wanted}") == expected, wanted
        assert follow_lines(agent, name, f"tail={wanted}") == expected, wanted


def test_tail_of_a_container_that_goes_on_writing_is_no_longer(agent, engine):
    name = engine.run("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; done", wait=False)
    until(lambda: len(read_lines(agent, name, "tail=50")) == 50, "its first lines")
    for wanted in (0, 1, 3, 10, 50):
        for _ in range(4):
            lines = [int(line) for line in read_lines(agent, name, f"tail={wanted}")]
            first = lines[0] if lines else 0
            assert lines == list(range(first, first + wanted))
    engine.call("POST", f"/containers/{name}/kill")
    written = [int(line) for line in read_lines(agent, name)]
    assert written == list(range(1, len(written) + 1))
    events = parse_events(agent.get(logs_path(name, "follow=1", "tail=7")).body)
    assert [event.data for event in events[:-1]] == [str(n) for n in written[-7:]]


class Entry(NamedTuple):
    """One entry of a log, as the Engine stores it."""

    at: int  # nanoseconds after START
    text: str  # without a newline at its end: the line goes on in the stream's next entry
    stream: str = "stdout"


STREAMS = ("stdout", "stderr")
START = 1_771_668_000 * 10**9  # 2026-02-21T10:00:00Z
MS, SECOND, HOUR = 10**6, 10**9, 3600 * 10**9
YEAR_1, YEAR_9999 = -62_135_596_800 * SECOND - START, 253_402_300_799 * SECOND - START


def stored_log(
    engine: RealEngine,
    entries: list[Entry | bytes],
    tty: bool = False,
    script: str = "true",
    **host: Any,
) -> str:
    """A stopped container whose log is made of these entries, or of bytes as they are."""
    config = {"NetworkMode": "none", "LogConfig": JSON_FILE, **host}
    name = engine.run("sh", "-c", script, tty=tty, HostConfig=config)
    store(engine, name, entries)
    return name


def store(engine: RealEngine, name: str, entries: list[Entry | bytes]) -> None:
    """Make the log of a stopped container of these entries, or of bytes as they are."""
    lines = []
    for entry in entries:
        if isinstance(entry, Entry):
            second, fraction = divmod(START + entry.at, 10**9)
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).rjust(19, "0")
            stamp += f".{fraction:09d}Z"
            data = json.dumps({"log": entry.text, "stream": entry.stream, "time": stamp})
            entry = data.encode() + b"\n"
        lines.append(entry)
    log_file(engine, name).write_bytes(b"".join(lines))


def log_file(engine: RealEngine, name: str) -> Path:
    root = engine.call("GET", "/info")[1]["DockerRootDir"]
    path = Path(root, "containers", name, f"{name}-json.log")
    if not os.access(path.parent, os.W_OK):
        pytest.skip(f"the Engine's logs cannot be edited here: {path}")
    return path


JSON_FILE = {"Type": "json-file", "Config": {}}


def lines_of(entries: list[Entry], *streams: str) -> list[str]:
    """The lines of a log, in the order in which they ended."""
    lines: list[tuple[str, str]] = []
    begun: dict[str, str] = {}
    for entry in entries:
        text = begun.pop(entry.stream, "")
        if text and len(text) % 16384:  # the container ended there, and ran again
            lines.append((entry.stream, text))
            text = ""
        text += entry.text
        if text.endswith("\n"):
            lines.append((entry.stream, text[:-1].removesuffix("\r")))
        else:
            begun[entry.stream] = text
    return [text for stream, text in [*lines, *begun.items()] if stream in (streams or STREAMS)]


def numbered(*times: int, stream: str = "stdout") -> list[Entry]:
    return [Entry(at, f"{stream} {n}\n", stream) for n, at in enumerate(times)]


def stepping(step: int, *, at: int = 50, lines: int = 60) -> list[Entry]:
    """A line a millisecond; the clock is set by `step` nanoseconds before line `at`."""
    return numbered(*(n * MS + (step if n >= at else 0) for n in range(lines)))


def two_writers(late: int) -> list[Entry]:
    """Two streams, a line a millisecond each; one is stored `late` lines after the other."""
    out = numbered(*range(0, 60 * MS, MS))
    err = numbered(*range(MS // 2, 60 * MS, MS), stream="stderr")
    pairs = itertools.zip_longest(out, [None] * late + err)
    return [entry for pair in pairs for entry in pair if entry]


def pieces(at: int, letter: str, size: int, stream: str = "stdout") -> list[Entry]:
    """A line of 16 KiB pieces, which have the stamp of the first."""
    text = letter * size + "\n"
    return [Entry(at, text[n : n + 16384], stream) for n in range(0, len(text), 16384)]


def mixed_pieces() -> list[Entry]:
    out = numbered(*range(0, 5 * MS, MS)) + pieces(7 * MS, "o", 70_000) + pieces(9 * MS, "p", 16384)
    err = pieces(2 * MS, "e", 40_000, "stderr") + pieces(2 * MS, "f", 16383, "stderr")
    short = [Entry(8 * MS, f"short {n}\n", "stderr") for n in range(8)]
    pairs = itertools.zip_longest(out, err + short)
    return [entry for pair in pairs for entry in pair if entry] + numbered(10 * MS, 11 * MS)


STEPS = {"50 ms": 50 * MS, "1 s": SECOND, "2 h": 2 * HOUR, "a day": 24 * HOUR}
# fmt: off
STAMP_PATTERNS = {
    **{
        f"clock set {word} {name}": stepping(sign * step)
        for name, step in STEPS.items()
        for word, sign in {"back": -1, "forward": 1}.items()
    },
    "clock set back twice": stepping(-HOUR, at=20) + stepping(-2 * HOUR, at=0, lines=30),
    "host boots in 1970": stepping(0, lines=30) + stepping(5 * SECOND - START, at=0, lines=30),
    "an entry without a time": numbered(0, YEAR_1, YEAR_1, 1, YEAR_1 + 1, 2),
    "a clock in the year 6000": numbered(0, 4000 * 365 * 24 * HOUR, 1),
    "the last second of the year 9999": numbered(0, YEAR_9999, 1, YEAR_9999, 2),
    "all lines of one stamp": numbered(*[0] * 40),
    "five lines of each stamp": numbered(*(n // 5 * MS for n in range(60))),
    "the stamps of ten lines again and again": numbered(*(n % 10 * MS for n in range(60))),
    "streams stored 20 lines apart": two_writers(20),
    "pieces of two streams mixed": mixed_pieces(),
    "a line begun 50 lines before its end": [
        *pieces(HOUR, "x", 16384, "stderr")[:1],
        *stepping(0),
        *pieces(HOUR, "x", 16384, "stderr")[1:],
        *stepping(2 * HOUR),
    ],
    "no newline at the end": [*stepping(0, lines=20), Entry(SECOND, "prompt> ")],
    "a run that ended without a newline": [
        *stepping(0, lines=20), Entry(SECOND, "prompt> "), *stepping(2 * SECOND, at=0, lines=20)
    ],
    "no lines": [],
    "more lines than one look has": stepping(-3 * SECOND, at=5900, lines=6000),
    "a stream silent for longer than one look": [
        *pieces(HOUR, "x", 16384, "stderr")[:1],
        *stepping(0, lines=5500),
        *pieces(HOUR, "x", 16384, "stderr")[1:],
        *stepping(2 * HOUR, at=0, lines=3),
    ],
}
# fmt: on


# Ends at once; started again, it waits to be told, and then writes two lines.
SECOND_RUN = """[ -e /ran ] || { touch /ran; exit; }
until [ -e /told/end ]; do sleep 0.05; done
echo later
echo last"""


@pytest.fixture(scope="module")
def logged(engine: RealEngine, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A stopped container whose log is stored anew by each test, and the file that ends its run."""
    told = tmp_path_factory.mktemp("told")
    return stored_log(engine, [], script=SECOND_RUN, Binds=[f"{told}:/told"]), told / "end"


def some(count: int) -> list[int]:
    """The indices of a list of this length, or of a long one its ends and some between."""
    if count < 150:
        return list(range(count))
    return [0, 1, count // 3, count // 2, *range(count - 30, count)]


@pytest.mark.parametrize("entries", STAMP_PATTERNS.values(), ids=STAMP_PATTERNS)
def test_log_is_read_in_its_own_order_whatever_its_stamps(agent, engine, logged, entries):
    (name, _), lines = logged, lines_of(entries)
    store(engine, name, entries)
    assert read_lines(agent, name) == lines
    for stream in STREAMS:
        asked = f"{({*STREAMS} - {stream}).pop()}=0"
        own = lines_of(entries, stream)
        assert read_lines(agent, name, asked) == follow_lines(agent, name, asked) == own
        assert read_lines(agent, name, asked, "tail=3") == own[-3:]
        assert follow_lines(agent, name, asked, "tail=3") == own[-3:]
    events = follow(agent, name)
    assert [event.data for event in events] == lines
    assert len({event.id for event in events}) == len(lines)
    for wanted in {0, 1, 2, 10, 59, len(lines) // 2, max(0, len(lines) - 1), len(lines), 10**18}:
        last = events[max(0, len(lines) - wanted) :]
        assert read_lines(agent, name, f"tail={wanted}") == [event.data for event in last], wanted
        assert follow(agent, name, f"tail={wanted}") == last, wanted
    for index in some(len(lines)):
        header = {"Last-Event-ID": events[index].id}
        assert follow(agent, name, headers=header) == events[index + 1 :], index
    if lines:
        query = (f"last_event_id={events[0].id}", "stdout=0")
        left = set(lines_of(entries, "stderr")) - {lines[0]}
        assert set(follow_lines(agent, name, *query)) == left


@pytest.mark.parametrize("entries", STAMP_PATTERNS.values(), ids=STAMP_PATTERNS)
def test_log_of_a_container_that_runs_is_followed_in_its_own_order(agent, engine, logged, entries):
    (name, end), lines = logged, lines_of(entries)
    store(engine, name, entries)
    end.unlink(missing_ok=True)
    stopped = follow(agent, name)
    held = 1 if entries and not entries[-1].text.endswith("\n") else 0  # it may still go on
    whole = len(lines) - held
    starts = {"": 0}
    starts.update({f"tail={n}": max(0, whole - n) for n in (0, 1, 3, 10, 59, whole, 10_000)})
    for index in {0, whole // 2, whole - 1} if lines else ():
        starts[f"last_event_id={stopped[index].id}"] = index + 1
    asked = {query: secrets.token_hex(8) for query in starts}
    found: dict[str, Any] = {}

    def keep(query: str) -> None:
        headers = {"X-Request-ID": asked[query]}
        found[query] = follow(agent, name, *filter(None, [query]), headers=headers)

    def are_open() -> bool:
        return {*asked.values()} <= {line["request_id"] for line in agent.lines("stream")}

    engine.call("POST", f"/containers/{name}/start")
    threads = [threading.Thread(target=keep, args=(query,), daemon=True) for query in starts]
    for thread in threads:
        thread.start()
    try:
        until(are_open, "all streams")
    finally:
        end.touch()  # or it would still run in the next test
    for thread in threads:
        thread.join(WAIT)
    events = follow(agent, name)
    assert [event.data for event in events] == [*lines, "later", "last"]
    assert events[: len(lines)] == stopped
    for query, start in starts.items():
        new = len(events) - whole if "tail" in query else 0  # there when the tail was read, or not
        assert found[query] in [events[start + n :] for n in range(new + 1)], query


def test_line_is_not_taken_for_one_of_its_stamp_far_behind_it(agent, engine, logged):
    name, times = logged[0], (*(n * MS for n in range(5180)), 120 * MS, *[6 * SECOND] * 9)
    store(engine, name, numbered(*times))
    events = follow(agent, name)
    assert events[120].id == events[5180].id  # so far apart it counts anew
    assert follow(agent, name, f"last_event_id={events[120].id}") == events[121:]


def test_terminals_log_is_read_in_its_own_order(agent, engine):
    entries = [
        entry._replace(text=entry.text.replace("\n", "\r\n"))
        for entry in stepping(-SECOND) + pieces(SECOND, "x", 70_000) + numbered(5, 6, 6, 6)
    ]
    name, lines = stored_log(engine, entries, tty=True), lines_of(entries)
    events = follow(agent, name)
    assert read_lines(agent, name) == [event.data for event in events] == lines
    for index in range(len(lines)):
        assert follow(agent, name, f"last_event_id={events[index].id}") == events[index + 1 :]
        assert follow(agent, name, f"tail={index}") == events[len(lines) - index :]
        assert read_lines(agent, name, f"tail={index}") == lines[len(lines) - index :]


def test_line_that_a_run_left_unfinished_is_not_joined_with_the_next_run(agent, engine):
    name = engine.run("sh", "-c", "echo a; printf prompt")
    ids = [event.id for event in follow(agent, name)]
    for call in ("start", "wait"):
        engine.call("POST", f"/containers/{name}/{call}")
    assert read_lines(agent, name) == ["a", "prompt", "a", "prompt"]
    assert follow_lines(agent, name, f"last_event_id={ids[0]}") == ["prompt", "a", "prompt"]
    assert follow_lines(agent, name, f"last_event_id={ids[1]}") == ["a", "prompt"]


def test_line_that_one_stream_left_unfinished_far_before_the_end_of_the_log(agent, engine):
    # Lines so short that thousands are on their way to the log when the end of stderr comes there.
    script = "seq 6000; sleep 3; printf other >&2; yes | head -n 60000"
    name = engine.run("sh", "-c", script, wait=False)
    until(lambda: read_lines(agent, name, "tail=1") == ["6000"], "the first lines")
    lines = follow_lines(agent, name)
    assert lines.count("y") == 60000
    assert lines.count("other") == 1


def test_followed_log_has_what_one_stream_left_unfinished_long_before_its_end(agent, engine):
    script = "seq 30000; seq 30000 >&2; printf partial; printf other >&2"
    name = engine.run("sh", "-c", script, wait=False)
    lines = follow_lines(agent, name)
    assert lines == read_lines(agent, name)
    assert len(lines) == 60_002 and {"partial", "other"} < set(lines)


def test_log_that_rotates_faster_than_it_is_read_gives_what_is_there(agent, engine):
    rotating = {"Type": "json-file", "Config": {"max-size": "20k", "max-file": "2"}}
    config = {"NetworkMode": "none", "LogConfig": rotating}
    script = "n=0; while :; do n=$((n+1)); echo $n; done"
    name = engine.run("sh", "-c", script, wait=False, HostConfig=config)
    until(lambda: len(read_lines(agent, name, "tail=10")) == 10, "its first lines")
    for _ in range(50):
        lines = [int(line) for line in read_lines(agent, name, "tail=10")]
        assert lines == list(range(lines[0], lines[0] + len(lines)))
        assert read_lines(agent, name)
    engine.remove(name)


def test_until_ends_the_log_of_a_silent_container(agent, engine):
    name = engine.run("sh", "-c", "echo one; sleep 60", wait=False)
    until(lambda: read_lines(agent, name), "its first line")
    moment = time.time_ns() + 500_000_000
    query = "until={}.{:09d}".format(*divmod(moment, 10**9))
    events = parse_events(agent.get(logs_path(name, "follow=1", query)).body)
    assert time.time_ns() >= moment
    assert [event.data for event in events] == ["one", '{"reason":"until","exit_code":null}']
    engine.remove(name)


DAMAGES = {
    "half an entry": lambda line: line[:40],
    "NULs before an entry": lambda line: b"\0" * 60 + line,
    "a line of NULs": lambda line: b"\0" * 60 + b"\n",
    "an entry that is no JSON": lambda line: b'{"log":"x\n',
}


@pytest.mark.parametrize("distance", [2, 10, 11, 50])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_log_gives_what_the_engine_gives(agent, engine, logged, damage, distance):
    """An Engine ends a read at the damage; some of them with an error, 26.1 now and then."""
    name, tries = logged[0], 20 if engine.call("GET", "/version")[1]["ApiVersion"] > "1.41" else 1
    store(engine, name, stepping(0, lines=100))
    path = log_file(engine, name)
    stored = path.read_bytes().splitlines(keepends=True)
    stored[-distance] = damage(stored[-distance])
    path.write_bytes(b"".join(stored))
    for wanted in (1, 4, 10, 49, 60):
        theirs = engine.logs(name, f"&tail={wanted}").decode().splitlines()
        if not any(engine.logs(name, f"&tail={wanted}") and engine.logs_fail for _ in range(tries)):
            lines = read_lines(agent, name, f"tail={wanted}")
            assert lines[len(lines) - len(theirs) :] == theirs
            events = follow(agent, name, f"tail={wanted}")
            assert [event.data for event in events] == lines
            for index in {0, len(events) // 2, len(events) - 1} if events else ():
                header = {"Last-Event-ID": events[index].id}
                left, found = events[index + 1 :], follow(agent, name, headers=header)
                assert [event for event in found if event in left] == left
                assert events[index] not in found


@pytest.mark.parametrize("places", [(97, 10), (100,)], ids=["twice", "at its end"])
def test_followed_tail_of_a_damaged_log_is_no_longer_than_asked(agent, engine, logged, places):
    entries: list[Any] = stepping(0, lines=100)
    for place in places:
        entries.insert(place, b'{"log":"half')
    name, _ = logged
    store(engine, name, entries)
    for wanted in (0, 1, 2, 5, 10, 50):
        reply = agent.get(logs_path(name, f"tail={wanted}", "follow=1"))
        *lines, _ = parse_events(reply.body)  # the last is an error if the Engine gives one
        assert reply.status == 200 and len(lines) <= wanted


def test_line_comes_at_once_to_who_follows_the_tail_of_a_damaged_log(agent, engine, tmp_path):
    entries: list[Any] = stepping(0)
    entries.insert(57, b'{"log":"half')
    script = SECOND_RUN.replace("echo last", "sleep 1; echo last; sleep 60")
    name = stored_log(engine, entries, script=script, Binds=[f"{tmp_path}:/told"])
    engine.call("POST", f"/containers/{name}/start")
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
    with contextlib.closing(connection):
        path = logs_path(name, "follow=1", "tail=2")
        connection.request("GET", path, headers={"X-API-Key": KEY})
        with contextlib.closing(connection.getresponse()) as response:
            seen = b""
            while b"data: last\n" not in seen:
                seen += response.read1(65536)
                if b"data: stdout 59\n" in seen:
                    (tmp_path / "end").touch()
    lines = [event.data for event in parse_events(seen)]
    assert lines == ["stdout 58", "stdout 59", "later", "last"]
    assert da.PING not in seen
    engine.remove(name)


def test_long_tail_of_a_damaged_log_ends_where_the_engines_does(agent, engine, logged):
    entries: list[Any] = [Entry(n * MS, f"{n} {'x' * 1000}\n") for n in range(3000)]
    entries[-300] = b'{"log":"half\n'
    name, _ = logged
    store(engine, name, entries)
    theirs = engine.logs(name, "&tail=1000").decode().splitlines()
    if not engine.logs_fail:
        lines = read_lines(agent, name, "tail=1000")
        assert len(lines) <= 1000 and lines[len(lines) - len(theirs) :] == theirs
        assert follow_lines(agent, name, "tail=1000") == lines


def test_tail_of_one_stream_whose_lines_are_too_long_to_keep(agent, engine, logged):
    long = [*pieces(2 * HOUR, "y", 200_000, "stderr"), *pieces(3 * HOUR, "z", 200_000, "stderr")]
    first, before = numbered(*range(3), stream="stderr"), Entry(HOUR, "before\n", "stderr")
    name, _ = logged
    store(engine, name, [*first, *stepping(0, lines=5000), before, *long])
    lines = ["y" * 200_000, "z" * 200_000]
    assert read_lines(agent, name, "tail=2", "stdout=0") == lines
    assert follow_lines(agent, name, "tail=2", "stdout=0") == lines


@pytest.fixture(scope="module")
def lopsided(engine: RealEngine) -> str:
    """A log of 50 lines on stderr, then 300 on stdout, one on stderr and two on stdout."""
    numbers = "n=0; while [ $((n+=1)) -le $1 ]; do echo $2$n; done"
    script = f"""w() {{ {numbers}; }}
        w 50 e >&2; usleep 50000; w 300 o; usleep 50000; echo late >&2; usleep 50000; w 2 z"""
    return engine.run("sh", "-c", script)


@pytest.mark.parametrize("wanted", [0, 1, 2, 5, 49, 51, 60])
def test_tail_of_one_stream_is_of_that_stream(agent, lopsided, wanted):
    errors = [f"e{n}" for n in range(1, 51)] + ["late"]
    lines = errors[len(errors) - min(wanted, len(errors)) :]
    query = ("stdout=false", f"tail={wanted}")
    assert read_lines(agent, lopsided, *query) == lines
    assert follow_lines(agent, lopsided, *query) == lines


@pytest.mark.parametrize(
    "begun", ["printf lost-words", "head -c 70000 /dev/zero | tr '\\0' x"], ids=["words", "entries"]
)
def test_line_without_an_end_is_whole_however_much_comes_after(agent, engine, begun):
    rest = "n=0; while [ $((n+=1)) -le 700 ]; do echo $n; done"
    name = engine.run("sh", "-c", f"({begun}) >&2; usleep 100000; {rest}")
    whole = "lost-words" if "words" in begun else "x" * 70_000
    for lines in (read_lines(agent, name), follow_lines(agent, name)):
        assert sorted(lines, key=len)[-1] == whole and len(lines) == 701


def test_tail_has_the_long_line_that_was_begun_earlier(agent, engine):
    short = "for n in 1 2 3 4; do echo $n >&2; done"
    script = f"head -c 40000 /dev/zero | tr '\\0' a; sleep 0.3; {short}; sleep 0.3; echo"
    name = engine.run("sh", "-c", script)
    lines = ["1", "2", "3", "4", "a" * 40_000]
    assert read_lines(agent, name) == lines
    for wanted in range(6):
        assert read_lines(agent, name, f"tail={wanted}") == lines[5 - min(5, wanted) :], wanted


def seconds(stamp: str) -> str:
    """An RFC 3339 time of nine digits as Unix seconds with nine digits."""
    whole = time.strptime(stamp[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    return f"{time.mktime(whole) - time.timezone:.0f}{stamp[19:29]}"


def test_since_and_until_are_exact_to_the_nanosecond(agent, engine):
    name = engine.run("sh", "-c", "for n in 1 2 3 4 5; do echo $n; usleep 2000; done")
    stamps = [item["time"] for item in read_lines(agent, name, "format=json")]
    lines = ["1", "2", "3", "4", "5"]
    for index, stamp in enumerate(stamps):
        zones = [stamp.replace("Z", zone) for zone in ("%2B00:00", "+00:00")]
        for moment in (seconds(stamp), stamp, *zones):
            assert read_lines(agent, name, f"since={moment}") == lines[index:]
            assert read_lines(agent, name, f"until={moment}") == lines[: index + 1]
            assert follow_lines(agent, name, f"since={moment}") == lines[index:]
        second, fraction = seconds(stamp).split(".")
        later = (
            f"{second}.{int(fraction) + 1:09d}" if fraction < "999999999" else f"{int(second) + 1}"
        )
        assert read_lines(agent, name, f"since={later}") == lines[index + 1 :]
    assert read_lines(agent, name, f"since={stamps[1]}", f"until={stamps[3]}") == lines[1:4]
    assert read_lines(agent, name, f"since={stamps[1]}", "tail=2") == lines[3:]
    assert read_lines(agent, name, f"until={stamps[2]}", "tail=2") == lines[1:3]
    for long_ago in ("1h", "1h30m0.5s", "90m", "3600000ms", "999999h", ".5h", "1.h", "36e8\u03bcs"):
        long_ago = da.quote(long_ago.replace("e8", "0" * 8))
        assert read_lines(agent, name, f"since={long_ago}") == lines
        assert read_lines(agent, name, f"until={long_ago}") == []
    for no_limit in ("0", "0.0", "00"):
        assert read_lines(agent, name, f"since={no_limit}", f"until={no_limit}") == lines
    assert read_lines(agent, name, "since=0s") == []
    assert read_lines(agent, name, "until=0s") == lines


@pytest.mark.parametrize(
    "entries", [two_writers(20), stepping(-HOUR)], ids=["stored late", "set back"]
)
def test_since_and_until_are_the_engines_where_stamps_step_back(agent, engine, logged, entries):
    name, _ = logged
    store(engine, name, entries)
    for entry in entries[::5]:
        moment = "{}.{:09d}".format(*divmod(START + entry.at, 10**9))
        for query in (f"since={moment}", f"until={moment}"):
            lines = engine.logs(name, f"&{query}").decode().splitlines()
            assert read_lines(agent, name, query) == follow_lines(agent, name, query) == lines


MOMENTS = [
    "",
    "x",
    "-5",
    "1e9",
    "1.5.5",
    "1.0000000001",
    "1_0",
    "\u0661",
    "+1",
    " 1",
    "nan",
    "h",
    "5x",
]
MOMENTS += ["1h-1m", "-10m", "2026-02-21", "2026-02-30T00:00:00Z", "2026-02-21T10:00:00"]
MOMENTS += ["2026-02-21T25:00:00Z", "2026-02-21T10:00:00.0000000001Z", "1" * 12, "1" * 65]


@pytest.mark.parametrize(
    "query, word",
    [
        *((f"{side}={da.quote(bad)}", side) for bad in MOMENTS for side in ("since", "until")),
        ("tail=-1", "tail"),
        ("tail=1.0", "tail"),
        ("tail=ALL", "tail"),
        ("tail=", "tail"),
        ("tail=%D9%A1", "tail"),
        ("stdout=0&stderr=0", "stderr"),
        ("stdout=yes", "stdout"),
        ("follow=1&follow=1", "follow"),
        ("folow=1", "folow"),
        ("format=xml", "format"),
        ("details=1", "details"),
    ],
)
def test_bad_query_is_named(lasting_agent, lasting_engine, query, word):
    assert_envelope(lasting_agent.get(logs_path("x", query)), 400, word)
    assert lasting_engine.requests() == []


BAD_IDS = ["x", "1", "1.5-1", "1.000000000", "1.000000000-", "1.000000000-0", "-1.000000000-1"]
BAD_IDS += [
    "1.0000000000-1",
    "1.000000000-1 2",
    "1.000000000-1x",
    "1.000000000-\u0661",
    "9" * 12 + ".000000000-1",
]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_malformed_event_id(lasting_agent, lasting_engine, bad):
    quoted = f"last_event_id={da.quote(bad)}"
    assert_envelope(lasting_agent.get(logs_path("x", "follow=1", quoted)), 400)
    header = {"Last-Event-ID": bad.encode().decode("latin-1")}
    assert_envelope(lasting_agent.get(logs_path("x", "follow=1"), headers=header), 400)
    assert lasting_engine.requests() == []


def test_id_is_the_stamp_and_a_number(agent, engine):
    name = echo(engine, b"a\n" * 2000, b"b\n" * 2000)
    events = follow(agent, name, "format=json")
    assert len({event.id for event in events}) == len(events) == 4000
    for event in events:
        stamp, number = event.id.split("-")
        assert stamp == seconds(json.loads(event.data)["time"])
        assert re.fullmatch("[1-9][0-9]*", number)


def read_and_cut(agent: Agent, path: str, headers: dict[str, str], size: int) -> list[Event]:
    """The events in the first `size` bytes of a stream, or in all of it if it ends before."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"X-API-Key": KEY, **headers})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        with contextlib.closing(response):
            return parse_events(response.read(size))


MIXED = """
n=0
while [ $n -lt 1000 ]; do
    echo out $n; echo err $n >&2; n=$((n+1))
    [ $((n % 100)) = 0 ] && { head -c 40000 /dev/zero | tr '\\0' x; echo err >&2; echo $n; PAUSE; }
done
"""


@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
@pytest.mark.parametrize("live", [False, True], ids=["finished", "live"])
def test_resumed_log_is_the_whole_log(agent, engine, live, tty):
    pause = "usleep 300000" if live else ":"
    name = engine.run("sh", "-c", MIXED.replace("PAUSE", pause), wait=not live, tty=tty)
    joined: list[Event] = []
    last, cuts = "", 0
    while True:
        header = {"Last-Event-ID": last} if last and cuts % 2 else {}
        query = [f"last_event_id={last}"] if last and not cuts % 2 else []
        # The last time to the end; until then some 25 pieces of all sizes.
        size = 1000 + secrets.randbelow(60_000) if cuts < 25 else 10**9
        events = read_and_cut(
            agent, logs_path(name, "follow=1", "format=json", *query), header, size
        )
        cuts += 1
        joined += events
        if events and events[-1].type == "end":
            break
        last = events[-1].id if events else last
    assert cuts > 5
    assert joined.pop().type == "end"
    assert len({event.id for event in joined}) == len(joined)
    whole = read_lines(agent, name, "format=json")
    assert len(whole) == 2020
    assert [json.loads(event.data) for event in joined] == whole


def test_resume_after_each_single_line(agent, engine):
    long = "head -c {} /dev/zero | tr '\\0' x; echo"
    out = f"echo a; echo; {long.format(3 * MIB)}; echo c"
    err = f"echo d; {long.format(50_000)}; printf f"
    name = engine.run("sh", "-c", f"({out}) & ({err}) >&2; wait")
    events = follow(agent, name)
    assert len(events) == 9  # of 7 lines, as one is cut in three
    for index, event in enumerate(events):
        header = {"Last-Event-ID": event.id}
        assert follow(agent, name, headers=header) == events[index + 1 :]
        # A browser sends its header beside the URL it began with.
        first = f"last_event_id={events[0].id}"
        assert follow(agent, name, first, "tail=1", headers=header) == events[index + 1 :]
    assert follow(agent, name, "last_event_id=1.000000000-1") == events


def test_exit_code_is_told(agent, engine):
    name = engine.run("sh", "-c", "sleep 0.3; echo last; exit 42", wait=False)
    reply = agent.get(logs_path(name, "follow=1"))
    assert [(event.type, event.data) for event in parse_events(reply.body)] == [
        ("message", "last"),
        ("end", '{"reason":"exited","exit_code":42}'),
    ]


def test_new_lines_come_at_once_and_shutdown_is_told(engine):
    name = engine.run(
        "sh", "-c", "trap 'echo more' USR1; echo one; while :; do usleep 50000; done", wait=False
    )
    with Agent() as agent:
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request("GET", logs_path(name, "follow=1"), headers={"X-API-Key": KEY})
            response = connection.getresponse()
            seen = b""
            while b"data: one\n\n" not in seen:
                seen += response.read1(65536)
            engine.call("POST", f"/containers/{name}/kill?signal=USR1")
            while b"data: more\n\n" not in seen:
                seen += response.read1(65536)
            agent.process.terminate()
            seen += response.read()  # with its last chunk, or this raises
        assert [event.type for event in parse_events(seen)] == ["message", "message", "shutdown"]
        assert agent.process.wait(WAIT) == 0


def log_of(
    fake: FakeEngine,
    answer: bytes | Callable[[socket.socket], None],
    *inspected: Any,
    policy: str = "always",
) -> None:
    """Script container x: its log, and the answers to each inspect (the last one for good)."""
    answers = list(inspected) or [{"Running": True}]
    host_config = {"RestartPolicy": {"Name": policy, "MaximumRetryCount": 0}}

    def inspect(sock: socket.socket) -> None:
        state = answers.pop(0) if len(answers) > 1 else answers[0]
        body = {"Id": "x", "Config": {"Tty": False}, "State": state, "RestartCount": 3}
        body["HostConfig"] = host_config
        sock.sendall(
            http_answer({"message": "no such container: x"}, 404)
            if state is None
            else http_answer(body)
        )

    fake.script = {"GET /containers/x/json": inspect, "GET /containers/x/logs": answer}


FIRST, TWO = frame(1, b"one\n"), frame(2, b"two\n")
BROKEN = [
    pytest.param(chunked_answer(FIRST, TWO, end=False), id="connection cut between frames"),
    pytest.param(chunked_answer(FIRST, TWO, FIRST[:20]), id="ends in the middle of a frame"),
    pytest.param(
        chunked_answer(FIRST, TWO, FIRST[:5]), id="ends in the middle of a frame's header"
    ),
    pytest.param(chunked_answer(FIRST, TWO)[:-12], id="ends in the middle of a chunk"),
    pytest.param(chunked_answer(FIRST, TWO, frame(3, b"disk is gone", b"Error")), id="error frame"),
    pytest.param(chunked_answer(FIRST, TWO, b"\x04\0\0\0\0\0\0\1x"), id="unknown type of frame"),
    pytest.param(chunked_answer(FIRST, TWO, b"\1\0\0\0\xff\xff\xff\xff"), id="frame of 4 GiB"),
    pytest.param(
        chunked_answer(FIRST, TWO, frame(1, b"x\n", b"no stamp")), id="frame with no stamp"
    ),
    pytest.param(chunked_answer(FIRST, TWO, end=False) + b"zz\r\n", id="bad chunk"),
]


@pytest.mark.parametrize("answer", BROKEN)
def test_broken_log_never_looks_whole(lasting_agent, lasting_engine, answer):
    log_of(lasting_engine, answer, {"Running": False, "ExitCode": 0, "Status": "exited"})
    reply = lasting_agent.get(logs_path("x", "follow=1"))
    *lines, last = parse_events(reply.body)
    assert [line.data for line in lines if line.type == "message"] == ["one", "two"][: len(lines)]
    assert last.type == "error"
    assert json.loads(last.data)["status"] == 502
    key = f"X-API-Key: {KEY}\r\nConnection: close"
    head = f"GET {logs_path('x')} HTTP/1.1\r\nHost: a\r\n{key}\r\n\r\n".encode()
    for request in (head, head.replace(b"/1.1", b"/1.0")):
        reply = lasting_agent.raw(request)
        assert b"]" not in reply
        # An error that comes before the first line is told by the status.
        assert reply.startswith(b"HTTP/1.1 502 ") or b'\r\n{"lines":[' in reply
        assert not reply.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("query", [[], ["follow=1"]], ids=["JSON", "events"])
@pytest.mark.parametrize("wanted", [1, 2, 3, 10, 10_000])
def test_tail_that_the_engine_cut_short_never_looks_whole(
    lasting_agent, lasting_engine, wanted, query
):
    def cut(sock: socket.socket) -> None:
        # The end of an HTTP/1.0 response is the connection's, whatever the reason.
        is_old = lasting_engine.requests()[-1].version == "HTTP/1.0"
        sock.sendall(plain_answer(FIRST, TWO) if is_old else chunked_answer(FIRST, TWO, end=False))

    log_of(lasting_engine, cut, EXITED)
    reply = lasting_agent.get(logs_path("x", f"tail={wanted}", *query))
    if query:
        assert [event.type for event in parse_events(reply.body)] == ["error"]
    else:
        assert reply.status == 502


def test_error_frame_keeps_the_engines_words(lasting_agent, lasting_engine):
    log_of(lasting_engine, chunked_answer(struct.pack(">BxxxL", 3, 12) + b"disk is gone"))
    (event,) = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert event.type == "error"
    assert "disk is gone" in json.loads(event.data)["message"]


def plain_answer(*frames: bytes) -> bytes:
    """An answer that only the end of the connection ends, as to an HTTP/1.0 request."""
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + b"".join(frames)


def stored_frames(fake: FakeEngine, frames: list[bytes], *inspected: Any) -> None:
    """Script container x: a log of these frames, and of any number of the last of them."""

    def log(sock: socket.socket) -> None:
        tail = re.search("tail=([0-9]+)", fake.seen.queue[-1].target)
        kept = frames[len(frames) - min(int(tail[1]), len(frames)) :] if tail else frames
        sock.sendall(plain_answer(*kept))

    log_of(fake, log, *inspected)


@pytest.mark.parametrize("look", [1, 2, 3])
def test_tail_of_a_log_that_grows_between_two_looks_is_of_whole_lines(
    lasting_agent, lasting_engine, look
):
    """A line of 32 KiB is two entries: the Engine's tail may begin in the middle of one."""
    frames: list[bytes] = []
    growth = [20, 0, 0, 0]
    growth[look] = 3

    def log(sock: socket.socket) -> None:
        for _ in range(growth.pop(0) if growth else 0):
            stamp = b"2026-02-21T10:00:00.%09dZ" % (len(frames) + 1)
            frames.extend((frame(1, b"a" * 16384, stamp), frame(1, b"b" * 16384 + b"\n", stamp)))
        tail = re.search("tail=([0-9]+)", lasting_engine.seen.queue[-1].target)
        sock.sendall(plain_answer(*frames[-int(tail[1]) if tail else 0 :]))

    log_of(lasting_engine, log, EXITED)
    lines = lasting_agent.get(logs_path("x", "tail=43")).json()["lines"]
    assert len(lines) >= 20 and set(lines) == {"a" * 16384 + "b" * 16384}


def test_tail_that_is_too_long_to_keep_is_no_longer_while_the_log_grows(
    lasting_agent, lasting_engine
):
    stamps = [b"2026-02-21T10:00:0%dZ" % n for n in range(10)]
    frames = [frame(1, b"%d" % n + 200_000 * b"x" + b"\n", stamps[n]) for n in range(10)]
    shown = [4, *range(4, 10)]

    def log(sock: socket.socket) -> None:
        tail = re.search("tail=([0-9]+)", lasting_engine.seen.queue[-1].target)
        kept = frames[: shown.pop(0) if shown else 10]
        sock.sendall(plain_answer(*kept[-int(tail[1]) if tail else 0 :]))

    log_of(lasting_engine, log, EXITED)
    lines = lasting_agent.get(logs_path("x", "tail=3")).json()["lines"]
    first = int(lines[0][0])
    assert [line[:2] for line in lines] == [f"{n}x" for n in range(first, first + 3)]


def test_stop_before_the_first_byte_of_a_followed_log_is_an_event_too(fake_engine):
    """A client that has a status in its place does not reconnect."""
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        stops = iter([agent.process.terminate])  # a second one would end the agent at once

        def log(sock: socket.socket) -> None:
            for stop in stops:
                stop()
            sock.recv(1)  # until the agent gives up

        log_of(fake_engine, log)
        reply = agent.get(logs_path("x", "follow=1"))
        assert [event.type for event in parse_events(reply.body)] == ["shutdown"]


def test_followed_tail_is_read_once_behind_a_follower_that_has_all_that_comes(
    fake_agent, fake_engine
):
    stamps = (b"2026-02-21T10:00:00.%09dZ" % n for n in range(1, 6001))
    frames = [frame(1, b"%d\n" % n, stamp) for n, stamp in enumerate(stamps)]
    late, is_read = frame(1, b"late\n", b"2026-02-21T10:00:01.000000000Z"), threading.Event()

    def log(sock: socket.socket) -> None:
        target = fake_engine.seen.queue[-1].target
        tail = int(re.search("tail=([0-9]+)", target)[1])
        sock.sendall(plain_answer(*frames[len(frames) - tail :]))
        if "follow=1" in target:
            assert is_read.wait(WAIT)
            frames.append(late)
            sock.sendall(late)
        elif tail > 2:
            is_read.set()

    log_of(fake_engine, log, RUNNING, EXITED)
    *events, _ = parse_events(fake_agent.get(logs_path("x", "follow=1", "tail=2")).body)
    assert [event.data for event in events] == ["5998", "5999", "late"]
    targets = [request.target for request in fake_engine.requests()]
    start, end = [at for at, target in enumerate(targets) if target.endswith("/json")][:2]
    asked = [re.findall("(?:follow|tail)=([0-9]+)", target) for target in targets[start + 1 : end]]
    assert asked == [["0", "0"], ["1", f"{da.LOOK}"], ["0", "2"], ["0", f"{66 + da.NUMBERED}"]]


EXITED = {"Running": False, "ExitCode": 7, "Status": "exited"}
RUNNING = {"Running": True, "StartedAt": "2026-02-21T10:00:00Z"}
REMOVED = {"reason": "removed", "exit_code": None}
CREATED = {"reason": "created", "exit_code": None}
BACKOFF = {"Running": True, "Restarting": True, "ExitCode": 7}
AGAIN = {"Running": True, "StartedAt": "2026-02-21T11:00:00Z", "ExitCode": 0}
# podman's: a process was told to end, and it ended, but the restart policy is not applied yet.
STOPPING = {"Running": False, "ExitCode": 0, "Status": "stopping"}
DIED = {"Running": False, "ExitCode": 7, "Status": "stopped"}
# fmt: off
ENDINGS = cases(
    ("exited", RUNNING, EXITED, "", "end", {"reason": "exited", "exit_code": 7}),
    ("has not run since", EXITED, EXITED, "", "end", {"reason": "exited", "exit_code": 7}),
    ("removed", RUNNING, None, "", "end", REMOVED),
    ("never ran", {"Status": "created", "ExitCode": 0}, None, "", "end", CREATED),
    ("about to run again", RUNNING, BACKOFF, "", "restart", {"exit_code": 7, "restart_count": 3}),
    ("waits to run again", BACKOFF, BACKOFF, "", "restart", {"exit_code": 7, "restart_count": 3}),
    ("runs again", RUNNING, AGAIN, "", "restart", {"exit_code": None, "restart_count": 3}),
    ("podman is about to", RUNNING, DIED, "", "restart", {"exit_code": 7, "restart_count": 3}),
    ("log of a running container ends", RUNNING, RUNNING, "", "error", None),
    ("log of a container that podman stops ends", STOPPING, STOPPING, "", "error", None),
    ("until has come", RUNNING, RUNNING, "until=1s", "end", {"reason": "until", "exit_code": None}),
    ("until has not come", RUNNING, RUNNING, "until=9999999999", "error", None),
)  # fmt: skip
# fmt: on


@pytest.mark.parametrize("before, after, query, kind, data", ENDINGS)
def test_end_says_why(lasting_agent, lasting_engine, before, after, query, kind, data):
    log_of(lasting_engine, chunked_answer(FIRST), before, after)
    events = parse_events(
        lasting_agent.get(logs_path("x", "follow=1", *filter(None, [query]))).body
    )
    assert [event.data for event in events[:-1]] == ["one"]
    assert events[-1].type == kind
    assert data is None or json.loads(events[-1].data) == data


def test_container_that_docker_restart_has_stopped_is_about_to_run_again(
    lasting_agent, lasting_engine
):
    log_of(lasting_engine, chunked_answer(FIRST), RUNNING, EXITED, AGAIN)
    _, end = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert (end.type, end.data) == ("restart", '{"exit_code":null,"restart_count":3}')


@pytest.mark.parametrize("later", [None, {**EXITED, "ExitCode": 0}], ids=["removed", "ran again"])
def test_exit_code_is_of_the_run_that_was_followed(lasting_agent, lasting_engine, later):
    log_of(lasting_engine, chunked_answer(FIRST), RUNNING, EXITED, later)
    _, end = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert (end.type, end.data) == ("end", '{"reason":"exited","exit_code":7}')


def test_container_that_podman_stopped_does_not_run_again_without_a_policy(
    lasting_agent, lasting_engine
):
    log_of(lasting_engine, chunked_answer(FIRST), RUNNING, DIED, policy="no")
    _, end = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert (end.type, json.loads(end.data)) == ("end", {"reason": "exited", "exit_code": 7})


@pytest.mark.parametrize("status", [404, 409])
def test_container_removed_at_the_end_is_no_failure(lasting_agent, lasting_engine, status):
    stored_frames(lasting_engine, [FIRST, TWO], RUNNING, EXITED)
    inspect, seen = lasting_engine.script["GET /containers/x/json"], []

    def inspect_and_remove(sock: socket.socket) -> None:
        inspect(sock)
        seen.append(sock)
        if len(seen) == 2:
            lasting_engine.script["GET /containers/x/logs"] = http_answer({"message": "x"}, status)

    lasting_engine.script["GET /containers/x/json"] = inspect_and_remove
    events = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert [event.data for event in events[:-1]] == ["one", "two"]
    assert (events[-1].type, json.loads(events[-1].data)["exit_code"]) == ("end", 7)


@pytest.mark.parametrize("query", [[], ["tail=1"], ["last_event_id=1.000000000-1"]])
def test_stopped_container_removed_while_its_log_is_asked_for_is_no_failure(
    lasting_agent, lasting_engine, query
):
    def log(sock: socket.socket) -> None:
        is_first = "tail=0" in lasting_engine.requests()[-1].target
        sock.sendall(plain_answer() if is_first else http_answer({"message": "x"}, 409))

    log_of(lasting_engine, log, EXITED)
    (end,) = parse_events(lasting_agent.get(logs_path("x", "follow=1", *query)).body)
    assert (end.type, end.data) == ("end", '{"reason":"exited","exit_code":7}')


@pytest.mark.parametrize("status", [404, 409])
@pytest.mark.parametrize(
    "shown, query",
    [(1, []), (0, []), (0, ["tail=1"]), (0, ["last_event_id=1.000000000-1"])],
    ids=["seen", "before its first line", "before its tail", "before a client's line"],
)
def test_container_removed_while_it_is_followed_is_no_failure(
    lasting_agent, lasting_engine, shown, query, status
):
    """The Engine refuses the log of a container to be removed before it has killed it."""

    answers = [plain_answer(FIRST, TWO)] * shown

    def log(sock: socket.socket) -> None:
        if re.search(r"tail=0\b", lasting_engine.requests()[-1].target):
            sock.sendall(plain_answer())
        else:
            sock.sendall(answers.pop() if answers else http_answer({"message": "x"}, status))

    log_of(lasting_engine, log, RUNNING)
    *events, end = parse_events(lasting_agent.get(logs_path("x", "follow=1", *query)).body)
    assert [event.data for event in events] == ["one", "two"][: 2 * shown]
    assert (end.type, end.data) == ("end", '{"reason":"removed","exit_code":null}')


@pytest.mark.parametrize("zone", [b"Z", b"+01:00"])
def test_stamps_of_entries_are_taken_out_of_a_terminals_long_line(
    lasting_agent, lasting_engine, zone
):
    """The log driver local of Docker 20.10 has stamps in the host's time zone."""
    stamp = b"2026-02-21T10:00:00.000000001%b " % zone
    entries = [stamp + b"x" * 20_000, b"y" * 70_000, b"z\r\n"]
    log_of(lasting_engine, plain_answer(*[stamp + entry for entry in entries]))
    terminal = {"Id": "x", "Config": {"Tty": True}, "State": EXITED}
    lasting_engine.script["GET /containers/x/json"] = http_answer(terminal)
    assert read_lines(lasting_agent, "x") == as_lines(b"".join(entries))


def test_stamp_that_a_container_can_know_ends_no_entry_of_a_terminals_line():
    line = b"2026-02-21T10:00:00Z " + b"x" * 20_000 + b"2026-02-21T10:00:00Z y\n"
    assert da.TtyDemultiplexer().feed(line) == [(1, line)]


def test_no_more_than_a_mebibyte_of_a_terminals_line_is_held():
    stamp, demultiplexer = b"2026-02-21T10:00:00.000000001Z ", da.TtyDemultiplexer()
    begun = stamp + b"x" * (MIB + 1)
    assert demultiplexer.feed(begun) == [(1, begun)]
    assert demultiplexer.feed(b"y\n") == [(1, stamp + b"y\n")]


@pytest.mark.parametrize("garbage", [b"garbage", b"2026-02-21T10:00:00.000000001Z a\r\n2026-0"])
def test_garbage_on_a_terminal_never_looks_whole(lasting_agent, lasting_engine, garbage):
    log_of(lasting_engine, chunked_answer(garbage), EXITED)
    terminal = {"Id": "x", "Config": {"Tty": True}, "State": EXITED}
    lasting_engine.script["GET /containers/x/json"] = http_answer(terminal)
    assert b"]" not in lasting_agent.raw(message(f"GET {logs_path('x')}", LAST)).partition(b"[")[2]
    assert parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)[-1].type == "error"


def lines_in(reply: Reply) -> list[str]:
    """The lines of a log, in JSON or as events."""
    if reply.headers["content-type"] == "application/json":
        return reply.json()["lines"]
    return [event.data for event in parse_events(reply.body) if event.type == "message"]


@pytest.mark.parametrize("query", ["follow=1", "follow=0"])
@pytest.mark.parametrize(
    "event_id, left",
    cases(
        ("line that is there", "1771668000.000000003-1", range(4, 10)),
        ("second of a stamp that has one", "1771668000.000000003-2", range(10)),
        ("stamp that no line has", "1771668000.000000002-1", range(10)),
        ("line that was rotated away", "1771667999.000000000-1", range(10)),
        ("last line", "1771668000.000000009-1", []),
    ),
)
def test_resume_goes_on_behind_the_line_or_from_the_oldest(
    lasting_agent, lasting_engine, event_id, left, query
):
    frames = [frame(1, b"%d\n" % n, b"2026-02-21T10:00:00.%09dZ" % n) for n in range(10) if n != 2]
    stored_frames(lasting_engine, frames, EXITED)
    reply = lasting_agent.get(logs_path("x", query, f"last_event_id={event_id}"))
    assert lines_in(reply) == [str(n) for n in left if n != 2]


def test_line_the_engine_left_out_at_the_end_is_fetched(lasting_agent, lasting_engine):
    # Seen with Docker 20.10 and some hundred followers of one container.
    def log(sock: socket.socket) -> None:
        followed = "follow=1" in lasting_engine.requests()[-1].target
        sock.sendall(chunked_answer(FIRST if followed else FIRST + TWO))

    log_of(lasting_engine, log, EXITED)
    events = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert [event.data for event in events[:-1]] == ["one", "two"]
    assert events[-1].type == "end"


@pytest.mark.parametrize("lag", [0, 1], ids=["a reading has them, too", "the follower alone"])
def test_followed_lines_have_the_ids_of_a_later_reading(lasting_agent, lasting_engine, lag):
    # Every thousandth has the same stamp, so that its number comes from the first of them.
    stamps = [b"2026-02-21T10:00:00.%09dZ" % (n if n % 1000 else 0) for n in range(10_010)]
    frames = [frame(1, b"%d\n" % n, stamp) for n, stamp in enumerate(stamps)]
    stored = frames[:10_000]
    targets: list[str] = []

    def log(sock: socket.socket) -> None:
        targets.append(lasting_engine.requests()[-1].target)
        tail = re.search("tail=([0-9]+)", targets[-1])
        kept = stored[-int(tail[1]) :] if tail else stored[:]
        if "follow=1" in targets[-1]:
            kept += frames[len(stored) :]
        if "follow=1" in "".join(targets[: len(targets) - lag]):
            stored[:] = frames
        sock.sendall(plain_answer(*kept))

    log_of(lasting_engine, log, RUNNING, EXITED)
    followed = parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)
    assert [event.data for event in followed[:-1]] == [str(n) for n in range(10_010)]
    assert followed == parse_events(lasting_agent.get(logs_path("x", "follow=1")).body)


def test_follower_that_lacks_the_last_line_does_not_silence_a_busy_log(fake_agent, fake_engine):
    """26.1 leaves out entries of a log that rotates many times a second."""
    frames = [frame(1, b"%d\n" % n, b"2026-02-21T10:00:00.%09dZ" % n) for n in range(9)]
    followers = 0

    def log(sock: socket.socket) -> None:
        nonlocal followers
        if "follow=1" not in fake_engine.requests()[-1].target:
            sock.sendall(plain_answer(*frames))
            return
        followers += 1
        if followers > 1:
            frames.append(frame(1, b"9\n"))
            sock.sendall(plain_answer(*frames))
            return
        sock.sendall(plain_answer(*frames[:-1]))
        with contextlib.suppress(OSError):  # the agent closes it
            while True:
                sock.sendall(FIRST * 100)

    log_of(fake_engine, log, RUNNING, RUNNING, EXITED)
    *events, _ = parse_events(fake_agent.get(logs_path("x", "follow=1")).body)
    assert [event.data for event in events] == [str(n) for n in range(10)]


def test_line_left_unfinished_before_the_follower_began_is_not_lost(fake_agent, fake_engine):
    stamps = [b"2026-02-21T10:00:00.%09dZ" % n for n in range(12_002)]
    texts = [(1, b"%d\n" % n) for n in range(12_000)]
    texts[6_000:6_000] = [(2, b"other")]  # and after it more lines than one look has
    frames = [frame(*text, stamp) for text, stamp in zip([*texts, (1, b"partial")], stamps)]
    length = 6_000

    def log(sock: socket.socket) -> None:
        nonlocal length
        target = fake_engine.requests()[-1].target
        tail = re.search("tail=([0-9]+)", target)
        if "follow=1" in target:  # the Engine's follower drops the end of a log now and then
            length = len(frames) - 1
        kept = frames[:length]
        sock.sendall(plain_answer(*kept[-int(tail[1]) if tail else 0 :]))
        length = length if length == 6_000 else len(frames)

    log_of(fake_engine, log, RUNNING, EXITED)
    followed = parse_events(fake_agent.get(logs_path("x", "follow=1")).body)
    shown = [event.data for event in followed[:-1]]
    assert sorted(shown[12_000:]) == ["other", "partial"]
    assert shown[:12_000] == [str(n) for n in range(12_000)]


def test_resume_finds_the_line_that_was_begun_long_before(fake_agent, fake_engine):
    entries = [(0, 1, b"begun "), (6, 2, b"other\n"), (0, 1, b"and ended\n"), (7, 1, b"after\n")]
    noon = 1771668000  # 2026-02-21T10:00:00Z

    def log(sock: socket.socket) -> None:
        since = re.search("since=([0-9]+)", fake_engine.requests()[-1].target)
        asked = int(since[1]) - noon if since else 0
        kept = [entry for entry in entries if entry[0] >= asked]
        frames = [frame(kind, text, b"2026-02-21T10:00:0%d.5Z" % at) for at, kind, text in kept]
        sock.sendall(chunked_answer(*frames))

    log_of(fake_engine, log, EXITED)
    events = parse_events(fake_agent.get(logs_path("x", "follow=1")).body)
    assert [event.data for event in events[:-1]] == ["other", "begun and ended", "after"]
    for index, event in enumerate(events[:-1]):
        path = logs_path("x", "follow=1", f"last_event_id={event.id}")
        assert [e.data for e in parse_events(fake_agent.get(path).body)] == [
            e.data for e in events[index + 1 :]
        ]


def test_log_is_of_the_container_that_was_inspected(fake_agent, fake_engine):
    log_of(fake_engine, chunked_answer(FIRST), EXITED)
    fake_engine.script["GET /containers/web/json"] = fake_engine.script["GET /containers/x/json"]
    assert read_lines(fake_agent, "web") == ["one"]
    log_of(fake_engine, http_answer({"message": "no such container: x"}, 404), EXITED)
    assert_envelope(fake_agent.get(logs_path("x", "follow=1")), 404, "no such container: x")
    log_of(fake_engine, http_answer({"message": "driver cannot read"}, 501), EXITED)
    start = "last_event_id=1.000000000-1"
    for query in ("", "tail=1", "follow=1", "follow=1&tail=1", f"follow=1&{start}"):
        assert_envelope(fake_agent.get(logs_path("x", query)), 501, "driver cannot read")


@pytest.mark.parametrize("follows", ["follow=1", "follow=0"])
def test_client_that_has_shut_its_half_still_gets_a_log(fake_agent, fake_engine, follows):
    def slow(sock: socket.socket) -> None:
        time.sleep(0.3)
        sock.sendall(chunked_answer(FIRST, end=False))
        time.sleep(0.3)
        sock.sendall(chunked_answer(TWO).partition(b"\r\n\r\n")[2])

    log_of(fake_engine, slow, EXITED)
    reply = fake_agent.raw(message(f"GET {logs_path('x', follows)}"), half_close=True)
    assert b"one" in reply and b"two" in reply and reply.endswith(b"\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("follows", ["follow=1", "follow=0"])
def test_client_that_leaves_takes_the_engines_stream_along(fake_agent, fake_engine, follows):
    closed = threading.Event()

    def silent(sock: socket.socket) -> None:
        is_asked = not re.search(r"tail=0\b", fake_engine.requests()[-1].target)
        sock.sendall(chunked_answer(FIRST, end=False) if is_asked else plain_answer())
        sock.settimeout(WAIT)
        if not sock.recv(1) and is_asked:
            closed.set()

    log_of(fake_engine, silent)
    with fake_agent.connect() as sock:
        head = f"GET {logs_path('x', follows)} HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\n\r\n"
        sock.sendall(head.encode())
        seen = b""
        while b"one" not in seen:
            seen += sock.recv(65536)
        assert not closed.is_set()
    assert closed.wait(WAIT)


def frames_in_pieces(data: bytes, size: int) -> tuple[list[Any], str]:
    """The lines of frames fed in pieces of a size, and the error if they end in one."""
    demultiplexer, assembler, lines = da.Demultiplexer(), da.LineAssembler(), []
    try:
        for start in range(0, len(data), size):
            lines += assembler.feed(demultiplexer.feed(data[start : start + size]))
        lines += assembler.feed(demultiplexer.feed(b"")) + assembler.end()
    except da.EngineError as error:
        return lines, error.message
    return lines, ""


PARTS = frame(1, b"one, ") + frame(2, b"two, ") + frame(1, b"three\n") + frame(2, b"four")


@pytest.mark.parametrize("data, texts, failed", [
    pytest.param(FIRST + TWO, [b"one", b"two"], False, id="whole lines"),
    pytest.param(PARTS, [b"one, three", b"two, four"], False, id="lines in parts, interleaved"),
    pytest.param(frame(1, b"") + FIRST, [b"one"], False, id="empty part"),
    pytest.param(FIRST + frame(1, b"\n") + frame(1, b"\r\n"), [b"one", b"", b""], False,
                 id="blank"),
    pytest.param(frame(1, b"a\r") + frame(1, b"\n"), [b"a"], False, id="CR and LF apart"),
    pytest.param(frame(1, b"\xe2\x82") + frame(1, b"\xac\n"), ["€".encode()], False,
                 id="cut in a character"),
    pytest.param(FIRST + TWO[:-1], [b"one"], True, id="cut short"),
    pytest.param(FIRST + b"\x09" + TWO[1:], [b"one"], True, id="garbage"),
    pytest.param(FIRST + frame(3, b"x"), [b"one"], True, id="error"),
    pytest.param(FIRST + frame(1, b"x" * (MIB + 5) + b"\n"), [b"one", b"x" * MIB, b"xxxxx"], False,
                 id="over 1 MiB"),
    pytest.param(frame(1, b"x" * MIB + b"\r\n"), [b"x" * MIB], False, id="1 MiB and CR LF"),
    pytest.param(frame(1, b"x" * (MIB - 1) + "€\n".encode()), [b"x" * (MIB - 1), "€".encode()],
                 False, id="cut before a character"),
])  # fmt: skip
def test_frames_fed_in_any_pieces_are_the_same_lines(data, texts, failed):
    small = (1, len(FIRST) - 1, len(FIRST) + 1) if len(data) < 10_000 else (999, 16_385)
    for size in (len(data), *small):
        lines, message = frames_in_pieces(data, size)
        assert [text for *_, text in lines] == texts
        assert bool(message) == failed


def memory(agent: Agent, name: str) -> int:
    """A process's memory in bytes: VmRSS now, VmHWM at its most."""
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+([0-9]+) kB", status)[1]) * 1024


@pytest.mark.parametrize("query", [["follow=1"], []], ids=["follow", "json"])
def test_slow_reader_costs_no_memory(engine, query):
    script = "yes 'a line of a log that nobody reads as fast as it was written' | head -n 300000"
    name = engine.run("sh", "-c", script)
    with Agent() as agent:
        agent.get(logs_path(name, "tail=10"))
        before = memory(agent, "VmRSS")
        connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
        with contextlib.closing(connection):
            connection.request("GET", logs_path(name, *query), headers={"X-API-Key": KEY})
            response = connection.getresponse()
            count, piece = 0, b""
            while more := response.read(16384):
                joined = piece[-30:] + more
                count += joined.count(b"a line of a log that nobody") - piece[-30:].count(
                    b"a line of a log that nobody"
                )
                if count < 1000:
                    time.sleep(0.01)
                piece = more
        assert count == 300_000
        assert memory(agent, "VmHWM") - before < 8 * MIB


@pytest.mark.parametrize("query", ["follow=1", "follow=0"], ids=["follow", "json"])
@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
def test_long_tail_is_the_last_lines_if_only_the_whole_log_is_damaged(
    lasting_agent, lasting_engine, query, tty
):
    frames = [frame(1, b"%d %b\n" % (n, b"x" * 9000)) for n in range(100)]
    report = frame(3, b"unexpected EOF", b"Error")
    if tty:
        frames, report = [data[8:] for data in frames], b"Error grabbing logs: unexpected EOF\n"
    stored_frames(lasting_engine, frames, EXITED)
    stored = lasting_engine.script["GET /containers/x/logs"]
    found = {"Id": "x", "Config": {"Tty": tty}, "State": EXITED}
    lasting_engine.script["GET /containers/x/json"] = http_answer(found)

    def log(sock: socket.socket) -> None:
        tail = re.search("tail=([0-9]+)", lasting_engine.seen.queue[-1].target)
        is_whole = not tail or int(tail[1]) >= len(frames)
        sock.sendall(plain_answer(*frames, report)) if is_whole else stored(sock)

    lasting_engine.script["GET /containers/x/logs"] = log
    lines = lines_in(lasting_agent.get(logs_path("x", "tail=50", query)))
    assert [line.split()[0] for line in lines] == [str(n) for n in range(50, 100)]
    reply = lasting_agent.get(logs_path("x", "follow=1"))
    *lines, error = parse_events(reply.body)
    assert [line.data.split()[0] for line in lines] == [str(n) for n in range(100)]
    assert error.type == "error" and "unexpected EOF" in error.data


@pytest.mark.parametrize("query", ["follow=1", "follow=0"], ids=["follow", "json"])
@pytest.mark.parametrize("came", [0, 1, 250, 301])
def test_log_that_was_cut_is_read_to_its_end(lasting_agent, lasting_engine, came, query):
    frames = [frame(1, b"%d\n" % n, b"2026-02-21T10:00:00.%09dZ" % n) for n in range(301)]
    stored_frames(lasting_engine, frames, EXITED)
    log = lasting_engine.script["GET /containers/x/logs"]

    def cut_once(sock: socket.socket) -> None:
        sock.sendall(plain_answer(*frames[:came]))
        lasting_engine.script["GET /containers/x/logs"] = log

    lasting_engine.script["GET /containers/x/logs"] = cut_once
    assert lines_in(lasting_agent.get(logs_path("x", query))) == [str(n) for n in range(301)]


@pytest.mark.parametrize("query", ["follow=1", "follow=0"], ids=["follow", "json"])
@pytest.mark.parametrize("came", [0, 1500])
@pytest.mark.parametrize(
    "asked, start, until",
    cases(
        ("a tail", "tail=3", -3, 5000),
        ("more than is kept", "tail=1400", -1400, 5000),
        ("a tail before until", "tail=3&until=1771668000.000002", -3, 2000),
        ("more than is kept before until", "tail=1400&until=1771668000.000002", -1400, 2000),
        ("all before until", "until=1771668000.000002", 0, 2000),
        ("what comes after a line", "last_event_id=1771668000.000003999-1", 2000, 5000),
    ),
)
def test_log_whose_every_old_response_is_cut_is_read_to_its_end(
    lasting_agent, lasting_engine, asked, start, until, came, query
):
    """The Engine's own tail may have few of the lines asked for, or none."""
    stamps = [b"2026-02-21T10:00:00.%09dZ" % n for n in range(5000)]
    frames = [frame(1 + n % 2, b"%d\n" % n, stamp) for n, stamp in enumerate(stamps)]

    def log(sock: socket.socket) -> None:
        request = lasting_engine.seen.queue[-1]
        tail = re.search("tail=([0-9]+)", request.target)
        kept = frames[max(0, 5000 - int(tail[1])) if tail else 0 : until]
        is_old = request.version == "HTTP/1.0"
        sock.sendall(plain_answer(*kept[:came]) if is_old else chunked_answer(*kept))

    log_of(lasting_engine, log, EXITED)
    lines = lines_in(lasting_agent.get(logs_path("x", "stdout=0", asked, query)))
    assert lines == [str(n) for n in range(1, until, 2)][start:]


FORGING = [b"plain", b"10:00:00Z GET / 200", b"\r\revent:Z forged", b"2026-02-21T10:00:00Z x"]


@pytest.mark.parametrize("stamp", [b"2026-02-21T10:00:00Z", b"2026-02-21T11:00:00.0000000+01:00"])
def test_podmans_stamps_are_matched_in_full(fake_engine, stamp):
    stored_frames(fake_engine, [frame(1, text + b"\n", stamp) for text in FORGING], EXITED)
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    lines = [text.decode() for text in FORGING]
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert read_lines(agent, "x") == lines
        events = parse_events(agent.get(logs_path("x", "follow=1")).body)
        assert [event.data for event in events[:-1]] == [line.replace("\r", "\n") for line in lines]
        ids = [f"1771668000.000000000-{n}" for n in range(1, 5)]
        assert [event.id for event in events[:-1]] == ids
        for index in range(4):
            path = logs_path("x", f"last_event_id={ids[index]}")
            assert agent.get(path).json()["lines"] == lines[index + 1 :]
            assert read_lines(agent, "x", f"tail={index}") == lines[4 - index :]


@pytest.mark.parametrize("query", ["follow=1", "follow=1&tail=5"])
def test_line_begun_while_a_container_restarts_is_not_cut_off(fake_agent, fake_engine, query):
    stored_frames(fake_engine, [FIRST, frame(1, b"x" * 16384)], BACKOFF)
    line, end = parse_events(fake_agent.get(logs_path("x", query)).body)
    assert (line.data, end.type) == ("one", "restart")


def test_podman_is_not_asked_for_a_tail(fake_engine):
    """It joins the first entry of a line to the line before, in the last entries but not in all."""
    resume = "last_event_id=1771668000.000000001-7"
    stored_frames(fake_engine, [frame(1, b"%d\n" % n) for n in range(9)], EXITED)
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        for query, count in (("tail=2", 1), ("follow=1&tail=2", 2), (resume, 2)):
            assert b"7" in agent.get(logs_path("x", query)).body
            asked = [each.target for each in fake_engine.requests() if "/logs?" in each.target]
            assert {re.search("tail=([a-z0-9]+)", target)[1] for target in asked} == {"all"}
            assert len(asked) == count


def test_podman_that_comes_later_is_known_with_a_pinned_version_too(fake_engine):
    stored_frames(fake_engine, [frame(1, b"%d\n" % n) for n in range(9)], EXITED)
    fake_engine.script["GET /_ping"] = http_answer({"message": "no"}, 500)
    with Agent(DOCKER_HOST=fake_engine.url, DOCKER_API_VERSION="1.41") as agent:
        fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
        assert b"7" in agent.get(logs_path("x", "tail=2")).body
    assert not any("tail=2" in request.target for request in fake_engine.requests())


def test_podman_is_asked_for_whole_seconds(fake_engine):
    """Its stamps have no fractions: a line would have another number in a log cut within one."""
    frames = [frame(1, b"%d\n" % n, b"2026-02-21T10:00:00Z") for n in range(3)]
    stored_frames(fake_engine, frames, EXITED)
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        reply = agent.get(logs_path("x", "since=1771668000.5&until=1771668001.5"))
    assert reply.json()["lines"] == ["0", "1", "2"]
    asked = [
        parse_qs(request.target) for request in fake_engine.requests() if "until" in request[1]
    ]
    assert {query["since"][0] for query in asked} == {"1771668000.000000000"}
    assert {query["until"][0] for query in asked} == {"1771668001.500000000"}


@pytest.mark.parametrize("query", ["follow=1", "follow=0"])
def test_podmans_log_of_a_terminal_is_read_in_frames(fake_engine, query):
    """Its own API has them. Without, nothing tells its stamps in a long line from the text."""
    pieces = [b"x" * 2048, b"x" * 4095, b"y\r\n", b"2026-02-21T10:00:00Z z\r\n"]
    frames = [frame(1, piece, b"2026-02-21T10:00:0%dZ" % n) for n, piece in enumerate(pieces)]
    found = {"Id": "x", "Config": {"Tty": True}, "State": EXITED}
    fake_engine.script = {
        "GET /_ping": http_answer(b"OK", extra=PODMAN),
        "GET /containers/x/json": http_answer(found),
        "GET /libpod/containers/x/logs": plain_answer(*frames),
    }
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        lines = lines_in(agent.get(logs_path("x", query)))
    assert lines == ["x" * 6143 + "y", "2026-02-21T10:00:00Z z"]


def test_stream_begins_before_the_engine_answers(fake_agent, fake_engine):
    """podman 4.3 sends no head while a log is empty."""
    log_of(fake_engine, lambda sock: sock.recv(1), RUNNING)
    with fake_agent.connect() as sock:
        sock.sendall(message(f"GET {logs_path('x', 'follow=1')}"))
        seen = b""
        while b"retry: 3000\n" not in seen:
            data = sock.recv(65536)
            assert data
            seen += data


def test_newline_inside_an_entry_forges_nothing(fake_agent, fake_engine):
    forged = frame(1, b"a\nevent: end\rdata: {}\n")
    log_of(fake_engine, chunked_answer(forged), EXITED)
    first, last = parse_events(fake_agent.get(logs_path("x", "follow=1")).body)
    assert (first.type, first.data) == ("message", "a\nevent: end\ndata: {}")
    assert last.type == "end"


# --------------------------------------------------------------------------------------------------
# One-off runs
# --------------------------------------------------------------------------------------------------

EVENT_STREAM = {"Accept": "text/event-stream"}
RUN = {"image": IMAGE, "network_mode": "none", "pull": "never", "labels": TEST_LABEL}


class Ran(NamedTuple):
    """What a run answered: (stream, line) pairs, and how it ended."""

    lines: list[tuple[str, str]]
    ending: Any


def read_run(reply: Reply) -> Ran:
    """What a run's response says, of either form."""
    assert reply.status == 200, reply.body
    if reply.headers["content-type"] == "application/json":
        ending = reply.json()
        items = ending.pop("lines")
    else:
        assert reply.headers["x-accel-buffering"] == "no"
        *events, end = parse_events(reply.body)
        assert end.type == "end" and {event.type for event in events} <= {"message"}
        items, ending = [json.loads(event.data) for event in events], json.loads(end.data)
    assert all(set(item) == {"stream", "line"} for item in items)
    return Ran([(item["stream"], item["line"]) for item in items], ending)


def runs_left(engine: RealEngine) -> list[Any]:
    """The containers of this module's runs."""
    filters = quote(json.dumps({"label": ["dockeragent.run", LABEL]}))
    rows = engine.call("GET", f"/containers/json?all=1&filters={filters}")[1]
    return [row for row in rows if row["Labels"]["dockeragent.run"]]


ACCEPTS = pytest.mark.parametrize("accept", [{}, EVENT_STREAM], ids=["json", "events"])


@pytest.mark.parametrize("tty", [False, True], ids=["frames", "terminal"])
@ACCEPTS
def test_run_has_exactly_the_lines_and_the_exit_code(agent, engine, accept, tty):
    text = base64.b64encode(HOSTILE).decode()
    pieces = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
    words = " ".join(f"$P{index}" for index in range(len(pieces)))
    body = {
        "cmd": ["sh", "-c", f"printf %s {words} | base64 -d; exit 42"],
        "env": [f"P{index}={piece}" for index, piece in enumerate(pieces)],
    }
    ran = read_run(agent.post("/api/v1/run", {**RUN, **body, "tty": tty}, headers=accept))
    assert ran.lines == [("stdout", line) for line in as_lines(HOSTILE, tty)]
    assert ran.ending == {"exit_code": 42}
    assert runs_left(engine) == []


@ACCEPTS
def test_streams_of_a_run_are_told_apart(agent, accept):
    script = "seq 40000 & seq 40000 >&2 & wait; printf partial; printf other >&2"
    ran = read_run(agent.post("/api/v1/run", {**RUN, "cmd": ["sh", "-c", script]}, headers=accept))
    for stream, last in ("stdout", "partial"), ("stderr", "other"):
        lines = [line for name, line in ran.lines if name == stream]
        assert lines == [*map(str, range(1, 40001)), last]
    assert ran.ending == {"exit_code": 0}


@ACCEPTS
def test_run_without_a_line(agent, accept):
    ran = read_run(agent.post("/api/v1/run", {**RUN, "cmd": ["true"]}, headers=accept))
    assert ran == ([], {"exit_code": 0})


@ACCEPTS
def test_run_is_killed_at_its_timeout(agent, engine, accept):
    script = "trap '' TERM; echo one; printf partial; sleep 600"
    body = {**RUN, "cmd": ["sh", "-c", script], "timeout": 1}
    ran = read_run(agent.post("/api/v1/run", body, headers=accept))
    assert ran.lines == [("stdout", "one"), ("stdout", "partial")]
    assert ran.ending == {"exit_code": None, "timed_out": True}
    assert runs_left(engine) == []


@pytest.mark.parametrize(
    "fields, status, word",
    cases(
        ("no such command", {"cmd": ["/no/such"]}, 400, "/no/such"),
        ("no such image", {"image": "no-such:1"}, 404, "no-such:1"),
        ("no such network", {"network_mode": "no-such"}, 404, "no-such"),
    ),
)
@ACCEPTS
def test_run_that_does_not_start_is_a_status_and_leaves_nothing(
    agent, engine, name, accept, fields, status, word
):
    body = {**RUN, "name": name, "cmd": ["true"], **fields}
    reply = agent.post("/api/v1/run", body, headers=accept)
    assert_envelope(reply, status or reply.status, word)
    assert reply.status in (400, 404, 500)
    assert engine.call("GET", f"/containers/{name}/json")[0] == 404
    assert runs_left(engine) == []


def test_run_does_not_wait_for_an_engine_that_is_away(tmp_path):
    with Agent(DOCKER_HOST=f"unix://{tmp_path}/none.sock") as alone:
        assert_envelope(alone.post("/api/v1/run", RUN), 503, "not reachable")


def test_name_that_is_taken_keeps_its_container(agent, engine, name):
    taken = engine.call(
        "POST", f"/containers/create?name={name}", {"Image": IMAGE, "Cmd": ["true"]}
    )[1]["Id"]
    reply = agent.post("/api/v1/run", {**RUN, "name": name, "cmd": ["true"]})
    assert_envelope(reply, 409, name)
    assert engine.inspect(name)["Id"] == taken


@pytest.mark.parametrize(
    "fields, word",
    cases(
        ("asks to be removed", {"auto_remove": True}, "auto_remove: "),
        ("asks not to be removed", {"auto_remove": False}, "auto_remove: "),
        ("starts again", {"restart_policy": {"name": "always"}}, "restart_policy.name: "),
        ("no log to read", {"log": {"driver": "none"}}, "log.driver: "),
        ("no time", {"timeout": 0}, "timeout: "),
        ("more than a day", {"timeout": 86_401}, "timeout: "),
        ("the agent's own label", {"labels": {"dockeragent.run": "x"}}, "labels"),
    ),
)
def test_bad_run_is_400_and_reaches_nothing(fields, word, pair):
    assert_envelope(pair.agent.post("/api/v1/run", {"image": "x", **fields}), 400, word)
    assert pair.engine.requests() == []


def begin_run(agent: Agent, *script: str) -> socket.socket:
    """Ask for a run, and return the connection with nothing read from it."""
    body = json.dumps({**RUN, "cmd": ["sh", "-c", *script]}).encode()
    sock = agent.connect()
    sock.sendall(message("POST /api/v1/run", f"Content-Length: {len(body)}", body=body))
    return sock


def test_client_that_leaves_at_any_moment_takes_its_run_along(engine):
    with Agent() as agent:
        for moment in range(10):
            with begin_run(agent, "sleep 600" if moment % 2 else "yes | head -n 9999; sleep 600"):
                time.sleep(moment * 0.06)
        until(lambda: len(agent.lines("request")) == 10, "the end of each request")
    assert runs_left(engine) == []


REMOVED = "removed what a killed agent left of a run"


def check_killed_runs(engine: RealEngine, bystanders: set[str], seconds: float) -> None:
    with Agent() as agent:
        socks = [begin_run(agent, "echo begun; sleep 600") for _ in range(3)]
        time.sleep(seconds)
        agent.process.kill()
        agent.process.wait()
        for sock in socks:
            sock.close()
    # The Engine may still be working for the agent that was killed, and create one more later.
    time.sleep(1)
    left = {row["Id"] for row in runs_left(engine)} - bystanders
    with Agent() as agent:
        until(lambda: {row["Id"] for row in runs_left(engine)} <= bystanders, "the removals")
        until(lambda: {line["target"]["id"] for line in agent.lines(REMOVED)} >= left, "the log")
        assert bystanders.isdisjoint(line["target"]["id"] for line in agent.lines(REMOVED))
    for bystander in bystanders:
        assert engine.inspect(bystander)["State"]["Running"]


@pytest.mark.parametrize("look", [
    lambda engine: da.remove_left_runs(engine, lambda *_, **__: None, ()),
    lambda engine: da.Deployment(engine, "web", threading.Event()).find("c1", {"Id": "i"}),
], ids=["run", "deploy"])  # fmt: skip
def test_label_is_held_against_the_image_of_the_containers_own_platform(fake_engine, look):
    """Of an image with several platforms only one may have the label: it is the image's own."""
    labels, platform = {"dockeragent.run": "1"}, {"os": "linux", "architecture": "386"}
    row = {"Id": "c1", "Names": ["/c1"], "Image": "i", "ImageID": "i", "Labels": labels}
    row = {**row, "Config": row, "ImageManifestDescriptor": {"platform": platform}}
    fake_engine.script["its own look"] = http_answer([row])
    fake_engine.script[INSPECT] = http_answer(row)
    fake_engine.script["GET /images/i/json"] = http_answer({"Config": {"Labels": labels}})
    look(da.Engine(da.parse_engine(fake_engine.url), None))
    looks = [seen.target for seen in fake_engine.requests() if "c1" not in seen.target]
    assert looks == [f"/images/i/json?platform={quote(json.dumps(platform))}"]


def test_what_a_killed_agent_left_goes_when_the_next_starts(engine):
    label = {"dockeragent.run": secrets.token_hex(16)}
    own = make_image(engine, f"da-{secrets.token_hex(4)}:1", **label)
    bystanders = {
        engine.run("sleep", "600", wait=False, Image=image, Labels={LABEL: "1", **labels})
        for image, labels in (
            (own, {}),
            (own, {"dockeragent.run": ""}),
            (IMAGE, {"dockeragent.run": ""}),
        )
    }
    for seconds in (0.0, 0.1, 0.2, 0.4, 0.8):
        check_killed_runs(engine, bystanders, seconds)
    for bystander in bystanders:
        engine.remove(bystander)
    forget(engine, own)


def test_run_that_outlasts_the_agents_second_look_for_left_ones_goes_on(engine):
    body = {**RUN, "cmd": ["sleep", str(da.LATE_CREATE + 2)]}
    with Agent() as agent:
        assert agent.post("/api/v1/run", body).json() == {"lines": [], "exit_code": 0}


@ACCEPTS
def test_stop_of_the_agent_lets_a_short_run_end_and_kills_a_long_one(engine, accept):
    replies: dict[str, Any] = {}

    def post(seconds: str) -> None:
        body = {**RUN, "cmd": ["sh", "-c", f"echo one; sleep {seconds}; echo two; exit 3"]}
        try:
            replies[seconds] = agent.post("/api/v1/run", body, headers=accept)
        except http.client.IncompleteRead as error:
            replies[seconds] = error

    with Agent() as agent:
        threads = [threading.Thread(target=post, args=(seconds,)) for seconds in ("2", "600")]
        for thread in threads:
            thread.start()
        until(lambda: len(agent.lines("stream")) == 2 or len(runs_left(engine)) == 2, "two runs")
        until(lambda: [row["State"] for row in runs_left(engine)] == ["running"] * 2, "two runs")
        agent.process.terminate()
        for thread in threads:
            thread.join()
        assert agent.process.wait(WAIT) == 0
    assert read_run(replies["2"]) == ([("stdout", "one"), ("stdout", "two")], {"exit_code": 3})
    if accept:
        first, last = parse_events(replies["600"].body)
        assert (first.type, last.type) == ("message", "shutdown")
        # A client that obeyed "reconnect" would run it once more.
        assert json.loads(last.data)["reason"] == "the agent is being stopped; the run was killed"
    else:
        assert isinstance(replies["600"], http.client.IncompleteRead)
    assert runs_left(engine) == []


def test_large_output_of_a_run_costs_no_memory(engine):
    with Agent() as agent:
        read_run(agent.post("/api/v1/run", {**RUN, "cmd": ["seq", "10"]}))
        before = memory(agent, "VmHWM")
        ran = read_run(agent.post("/api/v1/run", {**RUN, "cmd": ["seq", "300000"]}))
        assert memory(agent, "VmHWM") - before < 8 * MIB
    assert ran.lines == [("stdout", str(n)) for n in range(1, 300_001)]


def run_of(fake: FakeEngine, log: bytes | Callable[[socket.socket], None]) -> list[str]:
    """Script a run whose container is x, and return its list of what was done to it."""
    done: list[str] = []

    def note(word: str, answer: bytes) -> Callable[[socket.socket], None]:
        def respond(sock: socket.socket) -> None:
            done.append(word)
            sock.sendall(answer)

        return respond

    fake.script = {
        "POST /containers/create": note("create", http_answer({"Id": "x", "Warnings": []}, 201)),
        "POST /containers/x/start": note("start", NO_CONTENT),
        "GET /containers/x/logs": log,
        "GET /containers/x/json": http_answer({"Id": "x", "State": EXITED}),
        "GET /containers/json": http_answer([{"Id": "x"}]),
        "DELETE /containers/x": note("remove", NO_CONTENT),
    }
    return done


@pytest.mark.parametrize("answer", BROKEN)
def test_broken_log_of_a_run_never_looks_complete_and_the_container_goes(
    lasting_agent, lasting_engine, answer
):
    for accept in ("application/json", "text/event-stream"):
        done = run_of(lasting_engine, answer)
        body = json.dumps({"image": "x"}).encode()
        fields = [f"Accept: {accept}", f"Content-Length: {len(body)}", LAST]
        reply = lasting_agent.raw(message("POST /api/v1/run", *fields, body=body))
        if accept == "application/json":
            assert not reply.endswith(b"0\r\n\r\n") and b'"exit_code"' not in reply
        else:
            assert b"event: error\n" in reply and b"event: end" not in reply
        assert done == ["create", "start", "remove"]
    (removal,) = [s for s in lasting_engine.requests()[-3:] if s.method == "DELETE"]
    assert removal.target == "/containers/x?force=1&v=1"


def test_run_is_followed_again_if_its_log_ends_while_it_runs_on(fake_agent, fake_engine):
    # As behind a proxy that ends what is quiet for some time.
    done = run_of(fake_engine, chunked_answer(FIRST))
    states = [EXITED, *[{"Running": True, "ExitCode": 0}] * 3]
    fake_engine.script["GET /containers/x/json"] = lambda sock: sock.sendall(
        http_answer({"Id": "x", "State": states.pop()})
    )
    reply = fake_agent.post("/api/v1/run", {"image": "x"})
    assert read_run(reply) == ([("stdout", "one")], {"exit_code": 7})
    assert (done, states) == (["create", "start", "remove"], [])


def test_run_whose_log_ends_at_once_again_and_again_is_killed_in_time(fake_agent, fake_engine):
    done = run_of(fake_engine, http_answer(b""))
    running = {"Id": "x", "State": {"Running": True, "ExitCode": 0}}
    fake_engine.script["GET /containers/x/json"] = http_answer(running)

    def kill(sock: socket.socket) -> None:
        done.append("kill")
        fake_engine.script["GET /containers/x/json"] = http_answer({"Id": "x", "State": EXITED})
        sock.sendall(NO_CONTENT)

    fake_engine.script["POST /containers/x/kill"] = kill
    fake_engine.requests()
    reply = fake_agent.post("/api/v1/run", {"image": "x", "timeout": 1})
    assert read_run(reply) == ([], {"exit_code": None, "timed_out": True})
    assert done == ["create", "start", "kill", "remove"]
    asked = [seen for seen in fake_engine.requests() if "/logs" in seen.target]
    assert len(asked) < 20  # not again and again without a pause


def test_run_whose_log_cannot_be_read_is_not_started(fake_agent, fake_engine):
    message = "configured logging driver does not support reading"
    done = run_of(fake_engine, http_answer({"message": message}, 501))
    reply = fake_agent.post("/api/v1/run", {"image": "x"})
    assert_envelope(reply, 501, message)
    assert done == ["create", "remove"]


def test_container_whose_creation_was_answered_by_nobody_is_found_by_its_label(
    fake_agent, fake_engine
):
    done = run_of(fake_engine, chunked_answer(FIRST))
    fake_engine.script["POST /containers/create"] = b""
    assert_envelope(fake_agent.post("/api/v1/run", {"image": "x"}), 502)
    assert done == ["remove"]
    requests = fake_engine.requests()
    (create,) = [seen for seen in requests if seen.target == "/containers/create"]
    token = json.loads(create.body)["Labels"]["dockeragent.run"]
    (search,) = [seen for seen in requests if seen.target.startswith("/containers/json")]
    assert f'["dockeragent.run={token}"]' in unquote(search.target) and len(token) == 32


def test_removal_is_tried_again_until_the_engine_is_back(fake_agent, fake_engine):
    done = run_of(fake_engine, chunked_answer(FIRST))
    answers = [http_answer({"message": "busy"}, 500), b"", NO_CONTENT]
    fake_engine.script["DELETE /containers/x"] = lambda sock: sock.sendall(answers.pop(0))
    reply = fake_agent.post("/api/v1/run", {"image": "x"})
    assert read_run(reply) == ([("stdout", "one")], {"exit_code": 7})
    assert (done, answers) == (["create", "start"], [])


def test_removal_that_the_engine_forbids_is_not_tried_again(fake_agent, fake_engine):
    run_of(fake_engine, chunked_answer(FIRST))
    answers = [http_answer({"message": "forbidden"}, 403), NO_CONTENT]
    fake_engine.script["DELETE /containers/x"] = lambda sock: sock.sendall(answers.pop(0))
    reply = fake_agent.post("/api/v1/run", {"image": "x"}, headers=EVENT_STREAM)
    assert parse_events(reply.body)[-1].type == "error"
    assert answers == [NO_CONTENT]


def test_run_that_did_not_start_is_not_called_left_behind_once_it_is_removed(
    fake_agent, fake_engine
):
    run_of(fake_engine, chunked_answer(FIRST))
    fake_engine.script["POST /containers/x/start"] = http_answer({"message": "no port"}, 500)
    answers = [http_answer({"message": "busy"}, 500), NO_CONTENT]
    fake_engine.script["DELETE /containers/x"] = lambda sock: sock.sendall(answers.pop(0))
    reply = fake_agent.post("/api/v1/run", {"image": "x"})
    assert_envelope(reply, 500)
    assert (reply.json()["message"], answers) == ("no port", [])


# --------------------------------------------------------------------------------------------------
# Sight: stats, events, metrics
# --------------------------------------------------------------------------------------------------

STATS = f"{ONE}/stats"
RAW_STATS = "GET /containers/c1/stats"
EVENTS = "/api/v1/events"
RUNS = {"Id": "c1", "Name": "/c1", "State": {"Running": True}}
STOPPED = {"Id": "c1", "Name": "/c1", "State": {"Running": False, "ExitCode": 3}}
WAITS = {"Id": "c1", "Name": "/c1", "State": {"Running": True, "Restarting": True}}
GONE = None
NO_STAMP = "0001-01-01T00:00:00Z"


PER_CPU = {"total_usage": 1500, "percpu_usage": [1000, 500]}


def cpu_stats(used: int, system: int, **more: Any) -> dict[str, Any]:
    return {"cpu_usage": {"total_usage": used}, "system_cpu_usage": system, **more}


def raw_stats(**changes: Any) -> dict[str, Any]:
    """A sample of the Engine's: half of one of four CPUs, on cgroups v2."""
    return {
        "read": "2026-02-21T10:00:01.000000002Z",
        "preread": "2026-02-21T10:00:00.000000001Z",
        "cpu_stats": cpu_stats(1500, 8000, online_cpus=4),
        "precpu_stats": cpu_stats(1000, 4000, online_cpus=4),
        "memory_stats": {"usage": 1000, "limit": 4000, "stats": {"inactive_file": 200}},
        "networks": {
            "eth0": {"rx_bytes": 1, "tx_bytes": 2},
            "eth1": {"rx_bytes": 10, "tx_bytes": 20},
        },
        "blkio_stats": {
            "io_service_bytes_recursive": [
                {"major": 8, "minor": 0, "op": "read", "value": 100},
                {"major": 8, "minor": 0, "op": "write", "value": 200},
                {"major": 9, "minor": 0, "op": "read", "value": 1000},
            ]
        },
        "pids_stats": {"current": 7},
        **changes,
    }


SHOWN_STATS = {
    "time": "2026-02-21T10:00:01.000000002Z",
    "cpu_percent": 50.0,
    "memory_bytes": 800,
    "memory_limit_bytes": 4000,
    "memory_percent": 20.0,
    "network_rx_bytes": 11,
    "network_tx_bytes": 22,
    "block_read_bytes": 1100,
    "block_write_bytes": 200,
    "pids": 7,
}
V1_BLOCKS = [
    {"op": op, "value": value}
    for op, value in (("Read", 1), ("Write", 2), ("Sync", 4), ("Async", 8), ("Total", 16))
]


def memory_of(usage: int, limit: int = 4000, **stats: int) -> dict[str, Any]:
    return {"memory_stats": {"usage": usage, "limit": limit, "stats": stats}}


def inspected(*answers: Any) -> Callable[[socket.socket], None]:
    """A script that gives each inspect JSON once, the last one for good; GONE is a 404."""
    left = list(answers)

    def script(sock: socket.socket) -> None:
        found = left.pop(0) if len(left) > 1 else left[0]
        missing = http_answer({"message": "No such container: c1"}, 404)
        sock.sendall(missing if found is GONE else http_answer(found))

    return script


class Follower:
    """A client in the middle of a stream."""

    def __init__(self, connection: http.client.HTTPConnection, path: str) -> None:
        connection.request("GET", path, headers={"X-API-Key": KEY})
        self.connection, self.response = connection, connection.getresponse()
        assert self.response.status == 200
        assert self.response.getheader("Content-Type") == "text/event-stream"
        self.seen = b""

    def leave(self) -> None:
        self.response.close()
        self.connection.close()

    def wait_for(self, text: bytes, times: int = 1) -> None:
        while self.seen.count(text) < times:
            piece = self.response.read1(65536)
            assert piece, self.seen
            self.seen += piece

    def rest(self) -> bytes:
        """All of the stream, whose end must be its proper one."""
        self.seen += self.response.read()
        return self.seen


@contextlib.contextmanager
def follower(agent: Agent, path: str) -> Iterator[Follower]:
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
    with contextlib.closing(connection):
        yield Follower(connection, path)


def json_line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


@pytest.mark.parametrize("changes, shown", cases(
    ("cgroups v2", {}, {}),
    (
        "cgroups v1",
        {
            **memory_of(1000, total_inactive_file=300, inactive_file=1, cache=900),
            "blkio_stats": {"io_service_bytes_recursive": V1_BLOCKS},
        },
        {
            "memory_bytes": 700,
            "memory_percent": 17.5,
            "block_read_bytes": 1,
            "block_write_bytes": 2,
        },
    ),
    ("CPUs counted by their times", {"cpu_stats": {**cpu_stats(0, 8000), "cpu_usage": PER_CPU}},
     {"cpu_percent": 25.0}),
    ("started again", {"precpu_stats": cpu_stats(9000, 4000)}, {"cpu_percent": 0.0}),
    ("clock stood still", {"precpu_stats": cpu_stats(0, 8000)}, {"cpu_percent": 0.0}),
    ("more cache than usage", memory_of(100, inactive_file=200),
     {"memory_bytes": 100, "memory_percent": 2.5}),
    ("no limit known", {"memory_stats": {}},
     {"memory_bytes": 0, "memory_limit_bytes": 0, "memory_percent": 0.0}),
    ("network of the host", {"networks": None}, {"network_rx_bytes": 0, "network_tx_bytes": 0}),
    ("no disk was used", {"blkio_stats": {"io_service_bytes_recursive": None}},
     {"block_read_bytes": 0, "block_write_bytes": 0}),
    ("no limit of processes", {"pids_stats": {}}, {"pids": 0}),
    ("time of another zone", {"read": "2026-02-21T11:30:01.5+01:30"},
     {"time": "2026-02-21T10:00:01.500000000Z"}),
))  # fmt: skip
def test_stats_are_computed_as_docker_stats_does(fakes, changes, shown):
    fake, agent = fakes
    fake.script[INSPECT], fake.script[RAW_STATS] = (
        http_answer(RUNS),
        http_answer(raw_stats(**changes)),
    )
    fake.requests()
    reply = agent.get(STATS)
    assert (reply.status, reply.json()) == (200, {**SHOWN_STATS, **shown})
    assert fake.requests()[-1].target == "/containers/c1/stats?stream=false"


def test_podmans_sample_is_compared_with_one_before(fake_engine):
    """Its own has none before it: all CPU time since the boot would count, as 0.0 %."""
    no_sample = {"cpu_usage": {"total_usage": 0}}
    earlier = raw_stats(cpu_stats=cpu_stats(1000, 4000), precpu_stats=no_sample)
    samples = [earlier, raw_stats(precpu_stats=no_sample)]
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    fake_engine.script[INSPECT] = http_answer(RUNS)
    fake_engine.script[RAW_STATS] = lambda sock: sock.sendall(http_answer(samples.pop(0)))
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        assert agent.get(STATS).json() == SHOWN_STATS


@pytest.mark.parametrize(
    "changes",
    cases(
        ("no CPU", {"cpu_stats": None}),
        ("CPU of words", {"cpu_stats": {"cpu_usage": {"total_usage": "much"}}}),
        ("memory of words", {"memory_stats": {"usage": "much"}}),
        ("memory is a list", {"memory_stats": []}),
        ("networks are a list", {"networks": [1]}),
        ("a network of nothing", {"networks": {"eth0": {}}}),
        ("blocks of nothing", {"blkio_stats": {"io_service_bytes_recursive": [{}]}}),
        ("no processes", {"pids_stats": None}),
        ("a time that is none", {"read": "yesterday"}),
        ("a time of half a character", {"read": "2026-\ud800"}),
        ("numbers past a float", memory_of(10**999, 3)),
    ),
)
def test_nonsense_for_stats_is_502_and_no_bug(fakes, changes):
    fake, agent = fakes
    fake.script[INSPECT], fake.script[RAW_STATS] = (
        http_answer(RUNS),
        http_answer(raw_stats(**changes)),
    )
    assert_envelope(agent.get(STATS), 502)


def own_figures(raw: dict[str, Any]) -> dict[str, Any]:
    """What `docker stats` shows for a sample of the Engine's, by its own source."""
    cpu, before, memory = raw["cpu_stats"], raw["precpu_stats"], raw["memory_stats"]
    used = cpu["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]
    passed = cpu["system_cpu_usage"] - before["system_cpu_usage"]
    inactive = (
        "total_inactive_file" if "total_inactive_file" in memory["stats"] else "inactive_file"
    )
    blocks = raw["blkio_stats"]["io_service_bytes_recursive"] or []
    return {
        "cpu_percent": pytest.approx(100 * cpu["online_cpus"] * used / passed),
        "memory_bytes": memory["usage"] - memory["stats"][inactive],
        "memory_limit_bytes": memory["limit"],
        "memory_percent": pytest.approx(
            100 * (memory["usage"] - memory["stats"][inactive]) / memory["limit"]
        ),
        "network_rx_bytes": sum(each["rx_bytes"] for each in raw["networks"].values()),
        "network_tx_bytes": sum(each["tx_bytes"] for each in raw["networks"].values()),
        "block_read_bytes": sum(each["value"] for each in blocks if each["op"] in ("Read", "read")),
        "block_write_bytes": sum(
            each["value"] for each in blocks if each["op"] in ("Write", "write")
        ),
        "pids": raw["pids_stats"]["current"],
    }


def test_stats_are_the_engines_own_figures(agent, engine):
    """Both ask at once; samples of the same moment are the same sample."""
    work = (
        "while :; do dd if=/dev/zero of=/x bs=1M count=4 conv=fsync 2>/dev/null; done & sleep 600"
    )
    container = engine.run("sh", "-c", work, wait=False, HostConfig={"NetworkMode": "bridge"})

    def same_sample() -> Any:
        found: list[Any] = []
        path = f"/containers/{container}/stats?stream=false"
        thread = threading.Thread(target=lambda: found.append(engine.call("GET", path)[1]))
        thread.start()
        shown = agent.get(f"/api/v1/containers/{container}/stats").json()
        thread.join()
        return (found[0], shown) if found[0]["read"] == shown["time"] else None

    raw, shown = until(same_sample, "two samples of one moment")
    assert shown == {"time": raw["read"], **own_figures(raw)}
    assert shown["cpu_percent"] > 0 and shown["memory_bytes"] > 0 and shown["pids"] >= 2
    engine.remove(container)


@pytest.mark.parametrize("query", ["", "?follow=1"], ids=["once", "followed"])
@pytest.mark.parametrize(
    "state, status", [("created", 409), ("exited", 409), ("restarting", 409), ("absent", 404)]
)
def test_stats_of_a_container_that_does_not_run(agent, engine, state, status, query):
    if state == "restarting":
        again = {"NetworkMode": "none", "RestartPolicy": {"Name": "always"}}
        container = engine.run("sh", "-c", "exit 1", wait=False, HostConfig=again)
        # Each pause is twice as long as the one before; in a long one there is time to ask.
        until(lambda: engine.inspect(container)["RestartCount"] >= 4, "some restarts")
        until(lambda: engine.inspect(container)["State"]["Restarting"], "a pause between them")
    elif state == "created":
        created = engine.call(
            "POST", "/containers/create", {"Image": IMAGE, "Cmd": ["x"], "Labels": {LABEL: "1"}}
        )
        container = created[1]["Id"]
    else:
        container = in_state(engine, state)
    words = "is not running" if status == 409 else "No such container"
    assert_envelope(agent.get(f"/api/v1/containers/{container}/stats{query}"), status, words)
    engine.remove(container)


def test_stats_of_a_paused_container(agent, engine):
    container = in_state(engine, "paused")
    reply = agent.get(f"/api/v1/containers/{container}/stats")
    assert reply.status == 200 and reply.json()["cpu_percent"] == 0.0
    engine.remove(container)


def test_stats_of_a_container_that_stops_meanwhile_are_409(fakes):
    fake, agent = fakes
    fake.script[INSPECT] = http_answer(RUNS)
    fake.script[RAW_STATS] = http_answer({"read": NO_STAMP, "preread": NO_STAMP})
    assert_envelope(agent.get(STATS), 409, "c1 is not running")


@pytest.mark.parametrize("way", ["kill", "remove"])
def test_followed_stats_end_when_the_container_stops(agent, engine, way):
    container = engine.run("sleep", "600", wait=False)
    with follower(agent, f"/api/v1/containers/{container}/stats?follow=1") as stream:
        stream.wait_for(b"cpu_percent", 2)
        if way == "kill":
            engine.call("POST", f"/containers/{container}/kill")
        else:
            engine.remove(container)
        *samples, end = parse_events(stream.rest())
    assert (end.type, json.loads(end.data), end.id) == ("end", {"reason": "exited"}, "")
    times = [json.loads(sample.data)["time"] for sample in samples]
    assert times == sorted(set(times)) and len(times) >= 2
    assert {(sample.type, sample.id) for sample in samples} == {("message", "")}
    engine.remove(container)


FIRST_SAMPLE = json_line(raw_stats(preread=NO_STAMP))
SAMPLE, EMPTY = json_line(raw_stats()), json_line({"read": NO_STAMP, "preread": NO_STAMP})


@pytest.mark.parametrize("stream, states, shown, kind", cases(
    ("first sample has none before it", [FIRST_SAMPLE, EMPTY], [RUNS, STOPPED], 0, "end"),
    ("engine goes on with nothing", [SAMPLE, EMPTY, SAMPLE], [RUNS, STOPPED], 1, "end"),
    ("engine could not measure", [SAMPLE, EMPTY, SAMPLE, EMPTY], [RUNS, RUNS, STOPPED], 2, "end"),
    ("container is removed", [SAMPLE], [RUNS, GONE], 1, "end"),
    ("container waits for its restart", [SAMPLE], [RUNS, WAITS], 1, "end"),
    ("engine ends it", [SAMPLE], [RUNS, RUNS], 1, "error"),
    ("engine is cut off", [SAMPLE, None], [RUNS, STOPPED], 1, "error"),
    ("not JSON", [SAMPLE, b"<html>\n", SAMPLE], [RUNS], 1, "error"),
    ("not an object", [SAMPLE, b"[]\n", SAMPLE], [RUNS], 1, "error"),
    ("no statistics", [SAMPLE, b'{"read":"2026-02-21T10:00:01Z","preread":"1"}\n'], [RUNS], 1,
     "error"),
    ("line without an end", [SAMPLE, b" " * (2**20 + 1)], [RUNS], 1, "error"),
    ("last line without its end", [SAMPLE, SAMPLE[:-1]], [RUNS, STOPPED], 2, "end"),
))  # fmt: skip
def test_followed_stats_tell_their_end(fakes, stream, states, shown, kind):
    fake, agent = fakes
    fake.script[INSPECT] = inspected(*states)
    pieces = [piece for piece in stream if piece]
    fake.script[RAW_STATS] = chunked_answer(*pieces, end=pieces == stream)
    *samples, last = parse_events(agent.get(f"{STATS}?follow=1").body)
    assert [json.loads(sample.data) for sample in samples] == [SHOWN_STATS] * shown
    assert last.type == kind
    if kind == "error":
        assert json.loads(last.data)["status"] == 502


@pytest.mark.parametrize("path", [f"{STATS}?follow=1", EVENTS], ids=["stats", "events"])
@pytest.mark.parametrize("leaver", ["client", "agent"])
def test_followed_sight_ends_with_its_client_and_with_the_agent(fake_engine, path, leaver):
    begun, ended = threading.Event(), threading.Event()

    def silent(sock: socket.socket) -> None:
        sock.sendall(chunked_answer(end=False))
        begun.set()
        sock.settimeout(WAIT)
        with contextlib.suppress(ConnectionError):  # reset, if it left before it had read all
            assert sock.recv(1) == b""
        ended.set()

    fake_engine.script = {INSPECT: http_answer(RUNS), RAW_STATS: silent, "GET /events": silent}
    with Agent(DOCKER_HOST=fake_engine.url) as agent, follower(agent, path) as stream:
        assert begun.wait(WAIT)
        if leaver == "client":
            stream.leave()
        else:
            agent.process.terminate()
            assert [event.type for event in parse_events(stream.rest())] == ["shutdown"]
        assert ended.wait(WAIT)


def raw_event(moment: int = 1_700_000_000_123_456_789, **changes: Any) -> dict[str, Any]:
    """An event of the Engine's: the death of web."""
    actor = {"ID": "w1", "Attributes": {"name": "web", "image": "nginx", "exitCode": "1"}}
    return {"Type": "container", "Action": "die", "Actor": actor, "timeNano": moment, **changes}


def actor_of(identity: str = "w1", **attributes: str) -> dict[str, Any]:
    return {"Actor": {"ID": identity, "Attributes": attributes}}


def pulled(identity: str, name: str) -> dict[str, Any]:
    return {"Type": "image", "Action": "pull", **actor_of(identity, name=name)}


def test_event_has_its_documented_shape_and_number(fakes):
    fake, agent = fakes
    moments = [1_700_000_000_000_000_001, 1_700_000_000_000_000_001, 1_700_000_000_000_000_002]
    bare = {"Type": "daemon", "Action": "reload", "Actor": {"ID": "d1"}, "timeNano": 5}
    lines = [json_line(raw_event(moment)) for moment in moments]
    fake.script["GET /events"] = chunked_answer(*lines, json_line(bare))
    reply = agent.get(f"{EVENTS}?until=1700000001")
    *events, end = parse_events(reply.body)
    assert (end.type, json.loads(end.data)) == ("end", {"reason": "until"})
    ids = [f"{moments[0]}-1", f"{moments[0]}-2", f"{moments[2]}-1", "5-1"]
    assert [event.id for event in events] == ids
    assert {event.type for event in events} == {"message"}
    attributes = {"name": "web", "image": "nginx", "exitCode": "1"}
    shown = {"type": "container", "action": "die", "id": "w1", "name": "web"}
    first = {"time": "2023-11-14T22:13:20.000000001Z", **shown, "attributes": attributes}
    assert json.loads(events[0].data) == first
    last = {"time": "1970-01-01T00:00:00.000000005Z", "type": "daemon", "action": "reload"}
    assert json.loads(events[3].data) == {**last, "id": "d1", "name": "", "attributes": {}}


ASKED = "1700000000.5"


@pytest.mark.parametrize("query, headers, asked", cases(
    ("nothing", "", {}, {}),
    ("times", f"since={ASKED}&until=1700000001", {},
     {"since": f"{ASKED}00000000", "until": "1700000001.000000000"}),
    ("RFC 3339", "since=2023-11-14T22:13:20.5Z", {}, {"since": f"{ASKED}00000000"}),
    ("all that there is", "since=0", {}, {"since": "0.000000000"}),
    ("past the Engine's numbers", "since=99999999999", {}, {"since": "9223372036.854775807"}),
    ("before all time", "since=1000000h", {}, {"since": "0.000000000"}),
    ("filters", "type=container&action=die&container=web", {},
     {"filters": {"type": ["container"], "event": ["die"], "container": ["web"]}}),
    ("action that would end its JSON", "action=%22%5D%7D%26%0Adie", {},
     {"filters": {"event": ['"]}&\ndie']}}),
    ("resumed", "", {"Last-Event-ID": "1700000000500000000-3"}, {"since": f"{ASKED}00000000"}),
    ("resumed by curl", "last_event_id=1700000000500000000-3", {}, {"since": f"{ASKED}00000000"}),
    ("resumed by a browser", "since=1&last_event_id=2-1",
     {"Last-Event-ID": "1700000000500000000-3"}, {"since": f"{ASKED}00000000"}),
))  # fmt: skip
def test_events_query_is_the_engines(fakes, query, headers, asked):
    fake, agent = fakes
    fake.script["GET /events"] = chunked_answer()
    fake.requests()
    assert agent.get(f"{EVENTS}?{query}", headers=headers).status == 200
    path, _, sent = fake.requests()[-1].target.partition("?")
    found = {name: value for name, (value,) in parse_qs(sent).items()}
    if "filters" in found:
        found["filters"] = json.loads(found["filters"])
    assert (path, found) == ("/events", asked)


def test_podmans_past_events_come_whole(fake_engine):
    """It stops reading what it has as soon as `until` has come."""
    fake_engine.script["GET /_ping"] = http_answer(b"OK", extra=PODMAN)
    moments = [1_000_000_000, 2_000_000_000, 2_000_000_001]
    lines = [json_line(raw_event(moment)) for moment in moments]
    fake_engine.script["GET /events"] = chunked_answer(*lines)
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        *events, end = parse_events(agent.get(f"{EVENTS}?since=1&until=2").body)
        past = parse_qs(fake_engine.requests()[-1].target.partition("?")[2])
        agent.get(f"{EVENTS}?until=9000000000")
        future = parse_qs(fake_engine.requests()[-1].target.partition("?")[2])
    assert [event.id for event in events] == ["1000000000-1", "2000000000-1"]
    assert end.type == "end"
    assert past == {"since": ["1.000000000"], "stream": ["0"]}
    assert future == {"until": ["9000000000.000000000"]}


@pytest.mark.parametrize(
    "query, headers, word",
    cases(
        ("no time", "since=yesterday", {}, "since"),
        ("ends before it begins", "since=2&until=1", {}, "until"),
        ("type that is none", "type=conteiner", {}, "container"),
        ("empty action", "action=", {}, "action"),
        ("name that is none", "container=../x", {}, "container"),
        ("unknown parameter", "label=x", {}, "label"),
        ("repeated parameter", "type=image&type=volume", {}, "type"),
        ("id of a log", "", {"Last-Event-ID": "1700000000.000000000-1"}, "Last-Event-ID"),
        ("id of a log in the query", "last_event_id=1700000000.000000000-1", {}, "last_event_id"),
        ("id of number 0", "", {"Last-Event-ID": "1700000000000000000-0"}, "Last-Event-ID"),
    ),
)
def test_bad_question_for_events_is_400_and_reaches_nothing(fakes, query, headers, word):
    fake, agent = fakes
    fake.requests()
    assert_envelope(agent.get(f"{EVENTS}?{query}", headers=headers), 400, word)
    assert fake.requests() == []


@pytest.mark.parametrize("pieces, end, words", cases(
    ("stream ends", [], True, "ended its stream"),
    ("stream is cut off", [], False, ""),
    ("not JSON", [b"<html>\n"], True, "JSON"),
    ("not an object", [b"[]\n"], True, "shape"),
    ("no actor", [b'{"Type":"container","timeNano":1}\n'], True, "Actor"),
    ("no type", [json_line(raw_event(Type=None))], True, "Type"),
    ("no time", [json_line(raw_event(timeNano="1"))], True, "timeNano"),
    ("attributes are a list", [json_line(raw_event(Actor={"Attributes": [1]}))], True,
     "Attributes"),
    ("line without an end", [b'{"Type":"' + b"a" * 2**21], True, "ended its stream"),
))  # fmt: skip
def test_broken_stream_of_events_says_so(fakes, pieces, end, words):
    fake, agent = fakes
    fake.script["GET /events"] = chunked_answer(json_line(raw_event()), *pieces, end=end)
    first, last = parse_events(agent.get(EVENTS).body)
    assert (first.type, last.type) == ("message", "error")
    error = json.loads(last.data)
    assert error["status"] == 502 and words in error["message"]


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**23])
def test_event_that_is_too_long_hides_no_other(fakes, size):
    """An image's labels, or the command of a health check that an Engine tells twice, make one."""
    fake, agent = fakes
    padded = json_line(raw_event(3))[:-2].ljust(size) + b"}\n"
    fake.script["GET /events"] = chunked_answer(
        json_line(raw_event(2)), padded, json_line(raw_event(4))
    )
    found = parse_events(agent.get(f"{EVENTS}?until=1").body)
    ids = [event.id for event in found[:-1]]
    assert ids == (["2-1", "3-1", "4-1"] if size < 2**20 else ["2-1", "4-1"])
    assert found[-1].type == "end"


def test_time_past_all_clocks_is_no_bug(fakes):
    fake, agent = fakes
    lines = [json_line(raw_event(moment)) for moment in (-1, 10**30)]
    fake.script["GET /events"] = chunked_answer(*lines)
    assert [event.type for event in parse_events(agent.get(f"{EVENTS}?until=1").body)][-1] == "end"


def test_events_of_an_engine_that_refuses_or_is_away(fakes, tmp_path):
    fake, agent = fakes
    fake.script["GET /events"] = http_answer({"message": "no"}, 400)
    (event,) = parse_events(agent.get(EVENTS).body)
    assert (event.type, json.loads(event.data)["status"]) == ("error", 400)
    for version in "", "1.41":
        away = {"DOCKER_HOST": f"unix://{tmp_path}/none.sock", "DOCKER_API_VERSION": version}
        with Agent(**away) as alone:
            assert_envelope(alone.get(EVENTS), 503)


def test_events_of_an_engine_that_has_just_left_are_refused(tmp_path):
    path = tmp_path / "engine.sock"
    with FakeEngine(path) as fake, Agent(DOCKER_HOST=fake.url) as agent:
        assert agent.get("/health").status == 200
        path.unlink()
        assert_envelope(agent.get(EVENTS), 503)


FORGED = "x\r\n\nid: 9-9\nevent: end\rdata: {}\u2028\r\r"


def test_follower_learns_of_a_death_and_labels_forge_nothing(agent, engine):
    labels = {LABEL: "1", "forged": FORGED, f"event: end\ndata: {FORGED}": "1"}
    container = engine.run("sh", "-c", "read x", wait=False, OpenStdin=True, Labels=labels)
    path = f"{EVENTS}?type=container&action=die&container={container}"
    with follower(agent, path) as stream:
        stream.wait_for(b"retry: 3000\n")
        engine.call("POST", f"/containers/{container}/kill")
        stream.wait_for(b"\n\n")
        (event,) = parse_events(stream.seen)
    data = json.loads(event.data)
    name = engine.inspect(container)["Name"][1:]
    assert (event.type, data["action"], data["id"], data["name"]) == (
        "message",
        "die",
        container,
        name,
    )
    assert data["attributes"]["exitCode"] == "137"
    assert labels.items() <= data["attributes"].items()
    assert re.fullmatch(r"[0-9]{19}-[1-9]", event.id)


def test_events_go_on_from_each_id(agent, engine):
    begun = time.time_ns() - 10**6
    container = engine.run("true")
    since = "{}.{:09d}".format(*divmod(begun, 10**9))

    def death() -> str | None:
        ended = "{}.{:09d}".format(*divmod(time.time_ns(), 10**9))
        bounds = f"container={container}&until={ended}"
        return bounds if b'"die"' in agent.get(f"{EVENTS}?{bounds}&since={since}").body else None

    bounds = until(death, "the event of its death, which may come after the answer to a wait")
    *events, end = parse_events(agent.get(f"{EVENTS}?{bounds}&since={since}").body)
    assert end.type == "end"
    assert [json.loads(event.data)["action"] for event in events] == ["create", "start", "die"]
    for index, event in enumerate(events):
        resumed = agent.get(f"{EVENTS}?{bounds}", headers={"Last-Event-ID": event.id})
        assert parse_events(resumed.body) == [*events[index:], end]


WEB = ("web",)
IMAGES = ("docker.io/library/web:*", "docker.io/library/s*")
LIMITED = da.Key("ci", containers=WEB, images=IMAGES, networks=WEB, volumes=WEB)


@pytest.mark.parametrize("changes, shown", cases(
    ("its own container", {}, True),
    ("another's", actor_of(name="db"), False),
    ("another's that says so in a label", actor_of(name="db", container="web"), False),
    ("one without a name", actor_of("web"), False),
    ("attributes are null", {"Actor": {"ID": "web"}}, False),
    ("its own volume", {"Type": "volume", **actor_of("web", driver="local")}, True),
    ("another's volume", {"Type": "volume", **actor_of("db", driver="local")}, False),
    ("volume of some container", {"Type": "volume", **actor_of("web", container="d1")}, False),
    ("its own network", {"Type": "network", **actor_of("n1", name="web")}, True),
    ("network of some container", {"Type": "network", **actor_of("n1", name="web", container="d1")},
     False),
    ("its own image", {"Type": "image", **actor_of("web", name="web")}, True),
    ("another's image", {"Type": "image", **actor_of("web", name="db")}, False),
    ("a pull of its own image, whatever the name", pulled("web:1", "other"), True),
    ("a pull of another's image, whatever the name", pulled("db:1", "web"), False),
    ("a pull with the image's id, as podman has it", pulled("a" * 64, "web"), True),
    ("an image by its id, as when it is untagged",
     {"Type": "image", **actor_of("web", name="sha256:" + "a" * 64)}, False),
    ("the Engine itself", {"Type": "daemon", **actor_of("web", name="web")}, False),
    ("a kind of its own", {"Type": "pod", **actor_of("web", name="web")}, False),
))  # fmt: skip
def test_limited_key_hears_of_its_own_alone(changes, shown):
    event = raw_event(**changes)
    assert (da.event_data(event, LIMITED) is not None) == shown
    assert da.event_data(event, da.Key("master", master=True)) is not None


def test_limited_key_is_not_shown_the_agents_labels_or_an_earlier_name():
    own = {"dockeragent.spec": "1", "dockeragents": "2", "oldName": "/secret"}
    event = raw_event(**actor_of(name="web", **own))
    limited, master = (
        da.event_data(event, key) for key in (LIMITED, da.Key("master", master=True))
    )
    assert limited["attributes"] == {"name": "web", "dockeragents": "2"}
    assert master["attributes"] == {"name": "web", **own}


# Metrics

NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|Inf)"
METRIC_NAME, LABEL_NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*", "[a-zA-Z_][a-zA-Z0-9_]*"
LABEL_VALUE = r'"((?:[^"\\\n]|\\[\\"n])*)"'
UNESCAPED = {"\\": "\\", '"': '"', "n": "\n"}
Series = tuple[str, frozenset[tuple[str, str]]]


def parse_metrics(body: bytes) -> dict[Series, float]:
    """The samples of text in the format 0.0.4, and nothing that a strict reader could stumble over.

    Each metric has one HELP, one TYPE and then its samples, all together and none of them twice.
    """
    text, found, kinds, current = body.decode(), {}, {}, ""
    assert text.endswith("\n")
    lines = iter(text[:-1].split("\n"))
    for line in lines:
        if line.startswith("#"):
            help_line = re.fullmatch(f"# HELP ({METRIC_NAME}) [^\\\\]+", line)
            current = help_line[1]
            assert current not in kinds, f"{current} comes twice"
            type_line = re.fullmatch(
                f"# TYPE ({METRIC_NAME}) (counter|gauge|histogram)", next(lines)
            )
            assert type_line[1] == current
            kinds[current] = type_line[2]
            assert (kinds[current] == "counter") == current.endswith("_total")
            continue
        pairs = f"{LABEL_NAME}={LABEL_VALUE}(?:,{LABEL_NAME}={LABEL_VALUE})*"
        sample = re.fullmatch(f"({METRIC_NAME})(?:{{({pairs})}})? ({NUMBER})", line)
        assert sample, line
        name, texts = sample[1], re.findall(f"({LABEL_NAME})={LABEL_VALUE}", sample[2] or "")
        suffix = "(_bucket|_sum|_count)" if kinds[current] == "histogram" else ""
        assert re.fullmatch(current + suffix, name), f"{name} is not of {current}"
        labels = [(k, re.sub(r"\\(.)", lambda match: UNESCAPED[match[1]], v)) for k, v in texts]
        assert len(dict(labels)) == len(labels) and (
            ("le" in dict(labels)) == name.endswith("_bucket")
        )
        key = (name, frozenset(labels))
        assert key not in found, f"{line} comes twice"
        found[key] = float(sample[sample.lastindex])
    check_histograms(found)
    return found


def check_histograms(found: dict[Series, float]) -> None:
    """Each has buckets that grow, the last of them without a bound and equal to its count."""
    buckets: dict[Series, list[tuple[float, float]]] = {}
    for (name, labels), value in found.items():
        if name.endswith("_bucket"):
            bound = float(dict(labels)["le"])
            others = frozenset(pair for pair in labels if pair[0] != "le")
            buckets.setdefault((name[: -len("_bucket")], others), []).append((bound, value))
    for (name, labels), pairs in buckets.items():
        assert pairs == sorted(pairs) and [v for _, v in pairs] == sorted(v for _, v in pairs)
        assert pairs[-1] == (float("inf"), found[f"{name}_count", labels])
        assert (f"{name}_sum", labels) in found


def scrape(agent: Agent) -> dict[Series, float]:
    reply = agent.get("/metrics")
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse_metrics(reply.body)


def value_of(found: dict[Series, float], metric: str, /, **labels: str) -> float | None:
    return found.get((metric, frozenset(labels.items())))


def with_name(found: dict[Series, float], name: str) -> list[dict[str, str]]:
    return [dict(labels) for other, labels in found if other == name]


@pytest.fixture
def listed(lasting_engine: FakeEngine, lasting_agent: Agent) -> Callable[..., dict[Series, float]]:
    """Scrapes the agent of an Engine that lists these containers."""

    def scrape_list(*containers: Any) -> dict[Series, float]:
        lasting_engine.script[LIST] = http_answer(list(containers))
        return scrape(lasting_agent)

    return scrape_list


def row(name: str = "/web", status: str = "Up 2 hours", **more: Any) -> dict[str, Any]:
    listed = {"Names": [name], "Image": "nginx", "State": "running", "Status": status}
    return {"Id": "w1", **listed, **more}


CONTAINER_STATE, CONTAINER_HEALTH = "dockeragent_container_state", "dockeragent_container_health"


def test_metrics_of_the_real_engine(agent, engine, name):
    body = {"Image": IMAGE, "Cmd": ["sleep", "600"], "Healthcheck": {"Test": ["CMD", "false"]}}
    body["Healthcheck"].update(Interval=10**9, Retries=1)
    status, created = engine.call("POST", f"/containers/create?name={name}", body)
    assert status == 201, created
    labels = {"name": name, "image": IMAGE}
    found = scrape(agent)
    assert value_of(found, CONTAINER_STATE, state="created", **labels) == 1
    assert value_of(found, CONTAINER_HEALTH, **labels) is None
    engine.call("POST", f"/containers/{name}/start")
    found = scrape(agent)
    assert value_of(found, CONTAINER_STATE, state="running", **labels) == 1
    assert value_of(found, CONTAINER_STATE, state="created", **labels) is None
    assert value_of(found, CONTAINER_HEALTH, **labels) == 0
    assert value_of(found, "dockeragent_engine_up") == 1
    assert value_of(found, "dockeragent_build_info", version=da.VERSION) == 1
    assert value_of(found, "process_resident_memory_bytes") == pytest.approx(
        memory(agent, "VmRSS"), rel=0.2
    )
    open_now = len(os.listdir(f"/proc/{agent.process.pid}/fd"))
    assert abs(value_of(found, "process_open_fds") - open_now) < 10
    assert 0 < value_of(found, "process_cpu_seconds_total") < time.time()
    assert time.time() - 7200 < value_of(found, "process_start_time_seconds") < time.time()


def test_promtool_is_content(agent):
    needs_program("promtool")
    agent.get("/health")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=agent.get("/metrics").body, capture_output=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    "status, value",
    [
        ("Up 2 hours (healthy)", 1),
        ("Up 2 hours (unhealthy)", 0),
        ("Up 1 second (health: starting)", 0),
        ("Up 2 hours", None),
        ("Up 2 hours (Paused)", None),
        ("Exited (0) 2 hours ago", None),
        ("Created", None),
    ],
)
def test_health_is_told_by_the_status(listed, status, value):
    found = listed(row(status=status))
    assert value_of(found, CONTAINER_HEALTH, name="web", image="nginx") == value
    assert value_of(found, CONTAINER_STATE, name="web", image="nginx", state="running") == 1


def test_label_values_forge_no_sample(listed):
    hostile = 'a"} 1\nforged{x="\\" \r\u2028\\n'
    found = listed(row(Image=hostile, State=hostile))
    assert value_of(found, CONTAINER_STATE, name="web", image=hostile, state=hostile) == 1
    assert not [name for name, _ in found if "forged" in name]


def test_each_container_has_one_series(listed):
    linked = row(Names=["/other/alias", "/db"])
    nameless = row(Names=None, State="removing")
    found = listed(row(), row(), linked, nameless, nameless)
    assert sorted(labels["name"] for labels in with_name(found, CONTAINER_STATE)) == ["db", "web"]


@pytest.mark.parametrize(
    "answer",
    cases(
        ("refuses", http_answer({"message": "no"}, 500)),
        ("hangs up", b""),
        ("lists no list", http_answer({})),
        ("lists numbers", http_answer([1])),
        ("lists what has no names", http_answer([{}])),
        ("lists names that are numbers", http_answer([row(Names=[1])])),
    ),
)
def test_engine_that_fails_is_not_up_and_the_rest_is_told(fakes, answer):
    fake, agent = fakes
    fake.script[LIST] = answer
    found = scrape(agent)
    assert value_of(found, "dockeragent_engine_up") == 0
    assert value_of(found, "process_open_fds") > 0 and not with_name(found, CONTAINER_STATE)


def test_engine_that_hangs_costs_five_seconds_and_is_not_up(fakes):
    fake, agent = fakes
    over = threading.Event()
    fake.script[LIST] = lambda sock: over.wait(60)
    found = scrape(agent)
    over.set()
    assert value_of(found, "dockeragent_engine_up") == 0


def test_metrics_need_the_key_and_count_by_template_alone(fake_engine):
    """What a stranger sends makes no series of its own."""
    fake_engine.script[LIST] = http_answer([])
    with Agent(DOCKER_HOST=fake_engine.url) as agent:
        for key in ("", "wrong"):
            assert_envelope(agent.get("/metrics", key=key), 401)
        for index in range(20):
            agent.get(f"/api/v1/containers/stranger{index}", key="")
            agent.request(f"METHOD{index}", f"/stranger{index}")
            agent.get(f"/api/v1/containers/owned{index}")
        agent.raw(b"nonsense\r\n\r\n")
        until(lambda: len(agent.lines("request")) == 63, "the last request's end")
        found = scrape(agent)
    labels = with_name(found, "dockeragent_http_requests_total")
    paths = {route.path for route in da.ROUTES} | {"other"}
    assert {each["route"] for each in labels} <= paths
    assert {each["method"] for each in labels} == {"GET", "other"}
    ours = {"method": "GET", "route": "/api/v1/containers/{id}"}
    assert value_of(found, "dockeragent_http_requests_total", code="404", **ours) == 20
    name = "dockeragent_http_request_duration_seconds"
    assert value_of(found, f"{name}_count", **ours) == 20
    assert 0 < value_of(found, f"{name}_sum", **ours) < 60 * 20
    assert sum(v for (n, _), v in found.items() if n == "dockeragent_http_requests_total") == 63


def test_request_is_in_each_bucket_from_its_own_seconds_on():
    metrics = da.Metrics()
    for status, seconds in ((200, 0.1), (429, 2), (503, 70)):
        request = da.Request("", da.NEVER, ())
        request.status = status
        metrics.observe(request, seconds)
    found = parse_metrics(da.exposition(metrics.samples()))
    name, other = "dockeragent_http_request_duration_seconds", {"method": "other", "route": "other"}
    bounds = ("0.025", "0.1", "1", "2.5", "60", "+Inf")
    counts = [value_of(found, f"{name}_bucket", le=bound, **other) for bound in bounds]
    assert counts == [0, 1, 1, 2, 2, 3]
    assert value_of(found, f"{name}_sum", **other) == 72.1
    assert value_of(found, "dockeragent_rate_limited_total") == 1


def test_refused_and_open_requests_are_counted(fake_engine):
    fake_engine.script[LIST] = http_answer([])
    fake_engine.script["GET /events"] = lambda sock: [
        sock.sendall(chunked_answer(end=False)),
        sock.recv(1),
    ]
    with Agent(DOCKER_HOST=fake_engine.url, RATE_LIMIT="3") as agent:
        for _ in range(5):
            agent.get("/api/v1/nothing", key="")
        with follower(agent, EVENTS) as stream:
            stream.wait_for(b"retry: 3000\n")
            found = scrape(agent)
        assert value_of(found, "dockeragent_rate_limited_total") == 2
        assert value_of(found, "dockeragent_streams") == 1
        assert value_of(found, "dockeragent_connections") >= 2
        until(lambda: len(agent.lines("request")) == 7, "the stream's end")
        found = scrape(agent)
    assert value_of(found, "dockeragent_streams") == 0


def test_limited_key_sees_its_own_alone(fake_engine, tmp_path):
    names = ("web", "db", "web.next", "web2", "db.next")
    events = [json_line(raw_event(n, **actor_of(name=name))) for n, name in enumerate(names)]
    rows = [row(f"/{name}", "Up 1 hour (healthy)") for name in names]
    rows[0]["Names"].insert(0, "/db/alias")  # of a link to it
    fake_engine.script = {
        LIST: http_answer(rows),
        "GET /events": chunked_answer(*events),
        "GET /containers/db/json": http_answer({**RUNS, "Name": "/db"}),
    }
    mine = {"allow": ["read", "metrics"], "containers": ["web"]}
    blind = {"allow": ["logs"], "containers": ["*"]}
    path = keys_file(
        tmp_path, {"name": "a", "key": "a", **mine}, {"name": "b", "key": "b", **blind}
    )
    with Agent(DOCKER_HOST=fake_engine.url, KEYS_FILE=path) as agent:
        for url in (EVENTS, "/metrics", "/api/v1/containers/web/stats"):
            assert_envelope(agent.get(url, key="b"), 403, "is not allowed")
        assert fake_engine.requests() == []
        assert_envelope(agent.get("/api/v1/containers/db/stats", key="a"), 404)
        assert [seen.target for seen in fake_engine.requests()] == ["/containers/db/json"]
        *heard, _ = parse_events(agent.get(f"{EVENTS}?until=1", key="a").body)
        found = parse_metrics(agent.get("/metrics", key="a").body)
    assert [json.loads(event.data)["name"] for event in heard] == ["web", "web.next"]
    for metric in (CONTAINER_STATE, CONTAINER_HEALTH):
        assert {labels["name"] for labels in with_name(found, metric)} == {"web", "web.next"}


def test_prometheus_scrapes_it(engine, tmp_path):
    needs_program("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with Agent() as agent:
        job = {"job_name": "dockeragent", "scrape_interval": "1s"}
        job["authorization"] = {"credentials_file": "key"}
        job["static_configs"] = [{"targets": [f"127.0.0.1:{agent.port}"]}]
        (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]}))
        (tmp_path / "key").write_text(KEY)
        options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data")
        process = subprocess.Popen(
            ["prometheus", *options, f"--web.listen-address={address}"],
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )

        def ask() -> Any:
            connection = http.client.HTTPConnection(address, timeout=WAIT)
            with contextlib.suppress(OSError, ValueError), contextlib.closing(connection):
                connection.request("GET", "/api/v1/query?query=dockeragent_engine_up")
                return json.loads(connection.getresponse().read())["data"]["result"]

        try:
            until(lambda: ask() is not None, "Prometheus")
            (result,) = until(ask, "a scrape")
        finally:
            process.kill()
            process.wait()
    assert result["value"][1] == "1"


# Deploy
# --------------------------------------------------------------------------------------------------

LOOP = ["sh", "-c", "trap 'exit 0' TERM; sleep 9999 & wait"]
HELPERS = (".next", ".prev", ".old")


class FaultyProxy(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Stands between an agent and the real Engine, and harms one call that changes something.

    arm(k, harm): the k-th from now on is given to harm(forward, sock); forward() sends it to the
    Engine and returns the response, sock is the agent's connection. `seen` has all calls.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: Path, engine: RealEngine) -> None:
        self.engine, self.url = engine, f"unix://{path}"
        self.lock = threading.Lock()
        self.seen: list[str] = []
        self.calls: list[str] = []  # that changed something, since it was armed
        self.fault: tuple[int, Callable[..., None]] | None = None
        self.troubled: list[Troubled] = []
        super().__init__(str(path), FaultyProxyHandler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def arm(self, number: int, harm: Callable[..., None]) -> None:
        with self.lock:
            self.calls, self.fault = [], (number, harm)

    def disarm(self) -> list[str]:
        """Do no more harm; return the calls since it was armed."""
        with self.lock:
            self.fault = None
            return self.calls

    def harm_to(self, method: str, target: str) -> Callable[..., None] | None:
        with self.lock:
            self.seen.append(f"{method} {target}")
            if method == "GET":
                return None
        for each in self.troubled:
            if harm := each.harm_to(method, target):
                return harm
        with self.lock:
            if self.fault is None:
                return None
            self.calls.append(f"{method} {target}")
            number, harm = self.fault
            return harm if len(self.calls) == number + 1 else None


class FaultyProxyHandler(socketserver.StreamRequestHandler):
    server: FaultyProxy

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            if not (line := self.rfile.readline()):
                return
            head += line
        length = re.search(rb"(?i)content-length: ([0-9]+)", head)
        body = self.rfile.read(int(length[1]) if length else 0)
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        method, target, _ = head.decode().split(" ", 2)

        def forward() -> bytes:
            with socket.socket(socket.AF_UNIX) as there:
                there.connect(self.server.engine.path)
                there.sendall(head + body)
                return read_to_end(there)

        harm = self.server.harm_to(method, target)
        with contextlib.suppress(OSError):
            if harm:
                harm(forward, self.connection)
            else:
                self.connection.sendall(forward())


def names_of(engine: RealEngine, name: str) -> dict[str, Any]:
    """The containers with a name and its helper names, as inspected, by name."""
    filters = quote(json.dumps({"name": [f"^/?{name}"]}))
    found = engine.call("GET", f"/containers/json?all=1&filters={filters}")[1]
    return {row["Names"][0][1:]: engine.inspect(row["Id"]) for row in found}


def a_site(engine: RealEngine) -> Iterator[str]:
    chosen = "da-" + secrets.token_hex(6)
    yield chosen
    for helper in ("", *HELPERS):
        engine.remove(chosen + helper)


@pytest.fixture
def site(engine: RealEngine) -> Iterator[str]:
    """A name to deploy; it and its helper names are free again after the test."""
    yield from a_site(engine)


def spec(*cmd: str, **fields: Any) -> dict[str, Any]:
    """The body of a deploy that takes no longer than it must."""
    quick = {"image": IMAGE, "cmd": list(cmd) or LOOP, "pull": "never", "network_mode": "none"}
    quick.update(restart_policy={"name": "always"}, stop_timeout=1, deploy={"stable": 0})
    return {**quick, **fields}


def put(agent: Agent, name: str, body: Any, query: str = "", **kwargs: Any) -> Reply:
    return agent.request("PUT", f"/api/v1/containers/{name}{query}", body, **kwargs)


def put_steps(agent: Agent, name: str, body: Any) -> list[tuple[str, Any]]:
    """The events of a deploy, steps as their names."""
    found = events(put(agent, name, body, headers={"Accept": "text/event-stream"}).body)
    return [(kind, data["step"] if kind == "step" else data) for kind, data in found]


GOOD = spec(env=["NEW=1"])
# Its exit fails the gate at once, however late it comes on a busy machine.
BAD = spec("sh", "-c", "echo broken; exit 3", deploy={"stable": 10})
# The calls of a deploy that change something, in their order.
SWAPPING = ["create", "update", "stop", "rename", "rename", "start"]
BACK = ["stop", "rename", "rename", "stop", "update", "start", "DELETE"]
CALLS = {"good": [*SWAPPING, "update", "stop", "rename", "DELETE"], "bad": [*SWAPPING, *BACK]}
EACH_CALL = [(kind, number) for kind, calls in CALLS.items() for number in range(len(calls))]


def body_of(kind: str) -> dict[str, Any]:
    """The body of a deploy that ends well, unlike any that was sent before, or of a bad one."""
    return spec(env=[f"NEW={secrets.token_hex(4)}"]) if kind == "good" else BAD


def settled(engine: RealEngine, site: str) -> Any:
    """The one container of a name, if there is one only and it runs."""
    found = names_of(engine, site)
    return found.keys() == {site} and found[site]["State"]["Running"] and found[site]


def assert_settled(
    engine: RealEngine, site: str, old: str, kind: str, policy: str = "always"
) -> None:
    """One container runs, with the restart policy asked for; the old one if the new one is bad."""
    current = until(lambda: settled(engine, site), "one container that runs")
    assert current["HostConfig"]["RestartPolicy"]["Name"] == policy
    assert kind == "good" or current["Id"] == old


Harm = Callable[[Callable[[], bytes], socket.socket], None]


def crash(agent: Agent, *, after: bool = False) -> Harm:
    """Kill the agent before a call, or after the Engine has done it."""

    def harm(forward: Callable[[], bytes], sock: socket.socket) -> None:
        if after:
            forward()
        agent.process.kill()
        agent.process.wait()

    return harm


def deploy_and_crash(proxy: FaultyProxy, site: str, kind: str, number: int, *, after: bool) -> str:
    """Kill an agent in a deploy, of a container that runs there or else of a new one; its id."""
    with Agent(DOCKER_HOST=proxy.url) as agent:
        current = settled(proxy.engine, site)
        old = current["Id"] if current else put(agent, site, spec()).json()["id"]
        proxy.arm(number, crash(agent, after=after))
        with pytest.raises((OSError, http.client.HTTPException)):
            put(agent, site, body_of(kind))
    calls = proxy.disarm()
    assert len(calls) == number + 1
    assert CALLS[kind][number] in calls[-1]
    return old


@pytest.fixture(scope="module")
def fragile(
    engine: RealEngine, agent: Agent, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FaultyProxy, Agent]]:
    """A faulty proxy, and an agent behind it, which no longer looks for what a killed one left.

    Nor does the shared agent, which would undo deploys of this one: it was started before.
    """
    path = tmp_path_factory.mktemp("proxy") / "p.sock"
    with FaultyProxy(path, engine) as proxy, Agent(DOCKER_HOST=proxy.url) as own:
        until(lambda: sum(da.RUN_LABEL in call for call in proxy.seen) == 2, "its second look")
        yield proxy, own


@pytest.fixture(scope="module")
def shared_site(engine: RealEngine) -> Iterator[str]:
    yield from a_site(engine)


@pytest.fixture
def standing(
    engine: RealEngine, fragile: tuple[FaultyProxy, Agent], shared_site: str
) -> tuple[str, str]:
    """The name and id of a deployed container that runs: the one that the test before has left."""
    proxy, agent = fragile
    proxy.disarm()
    missing = spec(image="da-no-such:1")  # 409 while a recovery goes on
    until(lambda: put(agent, shared_site, missing).status == 404, "the end of what went before")
    found = settled(engine, shared_site)
    if not found or found["HostConfig"]["RestartPolicy"]["Name"] != "always":
        for helper in ("", *HELPERS):
            engine.remove(shared_site + helper)
        return shared_site, put(agent, shared_site, spec()).json()["id"]
    return shared_site, found["Id"]


@pytest.mark.parametrize(
    "kind, number, after",
    [(*call, False) for call in EACH_CALL]
    + [("good", 0, True), ("good", 2, True), ("good", 5, True), ("good", 8, True)]
    + [("bad", 6, True), ("bad", 8, True), ("bad", 10, True), ("bad", 12, True)],
)
def test_killed_agent_leaves_one_container_that_runs(
    engine, standing, tmp_path, kind, number, after
):
    site, _ = standing
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        old = deploy_and_crash(proxy, site, kind, number, after=after)
        with Agent(DOCKER_HOST=proxy.url):
            assert_settled(engine, site, old, kind)


def recover_and_crash(proxy: FaultyProxy, number: int) -> None:
    """Kill an agent in a recovery."""
    agents: queue.Queue[Agent] = queue.Queue()
    proxy.arm(number, lambda forward, sock: crash(agents.get(timeout=WAIT))(forward, sock))
    with Agent(DOCKER_HOST=proxy.url) as agent:
        agents.put(agent)
        assert agent.process.wait(WAIT) == -signal.SIGKILL
    proxy.disarm()


@pytest.mark.parametrize(
    "kind, first, second",
    [("good", 3, 0), ("good", 4, 2), ("good", 6, 0), ("good", 7, 1)]
    + [("bad", 2, 4), ("bad", 4, 5), ("bad", 6, 3), ("bad", 9, 2)],
)
def test_agent_killed_again_while_it_recovers(engine, standing, tmp_path, kind, first, second):
    site, _ = standing
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        old = deploy_and_crash(proxy, site, kind, first, after=False)
        recover_and_crash(proxy, second)
        with Agent(DOCKER_HOST=proxy.url):
            assert_settled(engine, site, old, kind)


def refuse_call(forward: Callable[[], bytes], sock: socket.socket) -> None:
    sock.sendall(http_answer({"message": "harm"}, 403))


def fail_call(forward: Callable[[], bytes], sock: socket.socket) -> None:
    sock.sendall(http_answer({"message": "harm"}, 500))


def cut_after_call(forward: Callable[[], bytes], sock: socket.socket) -> None:
    forward()


@pytest.mark.parametrize(
    "kind, number, harm",
    [(*call, refuse_call) for call in EACH_CALL]
    + [("good", number, cut_after_call) for number in (0, 2, 3, 4, 5, 7, 8)]
    + [("bad", number, cut_after_call) for number in (5, 6, 11, 12)],
)
def test_failing_call_leaves_one_container_that_runs(engine, fragile, standing, kind, number, harm):
    (proxy, agent), (site, old) = fragile, standing
    proxy.arm(number, harm)
    reply = put(agent, site, body_of(kind))
    if (kind, number, harm) == ("bad", 11, refuse_call):  # the old one cannot be started again
        current = names_of(engine, site)[site]
        assert (current["Id"], current["State"]["Running"]) == (old, False)
        assert current["HostConfig"]["RestartPolicy"]["Name"] == "always"
        assert "harm" in reply.json()["message"]
        assert not reply.json()["rolled_back"]
        return
    assert_settled(engine, site, old, kind)
    is_old = engine.inspect(site)["Id"] == old
    assert is_old == (reply.status != 200)
    if kind == "good" and number not in (0, 8):
        assert reply.json().get("rolled_back", False) == is_old


@pytest.mark.parametrize(
    "kind, number",
    [("good", number) for number in (1, 2, 3, 4, 6, 7, 8)]
    + [("bad", number) for number in range(6, 12)],
)
def test_step_that_the_engine_fails_is_repeated(fragile, engine, standing, kind, number):
    (proxy, agent), (site, old) = fragile, standing
    proxy.arm(number, fail_call)
    reply = put(agent, site, body_of(kind))
    calls = proxy.disarm()
    assert calls[number] == calls[number + 1]
    assert (reply.status, reply.json().get("rolled_back")) in ((200, None), (422, True))
    assert_settled(engine, site, old, kind)


@pytest.mark.parametrize("is_killed", [True, False])
def test_container_that_no_deploy_has_stopped_runs_on(engine, site, tmp_path, is_killed):
    """As on a full disk, on which nothing that was stopped starts again."""
    update = CALLS["good"].index("update")
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        if is_killed:
            old = deploy_and_crash(proxy, site, "good", update, after=False)
        with Agent(DOCKER_HOST=proxy.url) as agent:
            if not is_killed:
                old = put(agent, site, spec()).json()["id"]
                proxy.arm(update, refuse_call)
                assert put(agent, site, GOOD).json()["rolled_back"]
            until(lambda: names_of(engine, site).keys() == {site}, "the rollback")
    assert engine.inspect(old)["State"]["FinishedAt"] == da.NEVER_STARTED


@pytest.mark.parametrize("read", ["/images/", "/containers/json", "/json"])
def test_read_that_the_engine_fails_is_repeated_in_a_recovery(
    fragile, engine, standing, monkeypatch, read
):
    """As its store of images does while containerd is being restarted."""
    (proxy, agent), (site, old) = fragile, standing
    harms: list[Harm] = []

    def harm_to(method: str, target: str) -> Callable[..., None] | None:
        if target.endswith("/update"):  # its swap begins, or its rollback is nearly done
            harms.extend([] if harms else [fail_call] * 5)
        return harms.pop() if harms and method == "GET" and read in target else None

    monkeypatch.setattr(proxy, "harm_to", harm_to)  # of this test alone: others share the proxy
    assert put(agent, site, BAD).status == 422
    assert_settled(engine, site, old, "bad")


class Troubled:
    """A deployed container whose next deploy the Engine harms; rule tells how, from its calls."""

    def __init__(
        self, proxy: FaultyProxy, agent: Agent, rule: Callable[[Troubled], Harm | None]
    ) -> None:
        self.proxy, self.engine, self.agent, self.rule = proxy, proxy.engine, agent, rule
        self.site = "da-" + secrets.token_hex(6)
        reply = put(agent, self.site, spec())
        assert reply.status == 201, reply.body
        self.old = reply.json()["id"]
        self.calls: list[str] = []  # that changed something, as "start" or "DELETE"
        self.is_own = functools.cache(  # by id
            lambda identity: self.site in str(self.engine.inspect(identity).get("Name"))
        )
        proxy.troubled.append(self)

    def harm_to(self, method: str, target: str) -> Harm | None:
        identity = re.search("/containers/([0-9a-f]{64})(?:/([a-z]+))?", target)
        if not identity or not self.is_own(identity[1]):
            return None
        self.calls.append(identity[2] or method)
        return self.rule(self)

    def has_begun(self, *calls: str) -> bool:
        """Whether the new one was started, and this is one of these calls."""
        return "start" in self.calls[:-1] and self.calls[-1] in calls

    def deploy_bad(self) -> tuple[int, bool, bool]:
        """The status, whether it was rolled back, and whether a container was removed by then."""
        self.reply = put(self.agent, self.site, BAD, "?adopt=true")
        return self.reply.status, self.reply.json()["rolled_back"], "DELETE" in self.calls

    def heal(self) -> Any:
        """Return the one container that is left in the end."""
        self.rule = lambda _: None
        put(self.agent, self.site, spec(image="da-no-such:1"))  # a write: what is left is done
        until(lambda: names_of(self.engine, self.site).keys() == {self.site}, "the rollback")
        return self.engine.inspect(self.site)


TROUBLES: list[Callable[[FaultyProxy, Agent], None]] = []


@TROUBLES.append
def old_container_that_never_starts_keeps_its_name_and_policy(proxy, agent):
    def rule(it: Troubled) -> Harm | None:
        return fail_call if it.has_begun("start") else None

    it = Troubled(proxy, agent, rule)
    assert it.deploy_bad() == (422, False, True)
    assert "harm" in it.reply.json()["message"]
    [(name, left)] = names_of(it.engine, it.site).items()
    assert (name, left["Id"], left["State"]["Running"]) == (it.site, it.old, False)
    assert left["HostConfig"]["RestartPolicy"]["Name"] == "always"


@TROUBLES.append
def new_container_that_has_filled_the_disk_is_rolled_back(proxy, agent):
    """The Engine then writes nothing of any container until its removal makes room."""

    def rule(it: Troubled) -> Harm | None:
        is_full = it.has_begun("rename", "update", "start") and "DELETE" not in it.calls
        return fail_call if is_full else None

    it = Troubled(proxy, agent, rule)
    changed = {"RestartPolicy": {"Name": "unless-stopped"}}  # by hand: its labels do not tell it
    assert it.engine.call("POST", f"/containers/{it.old}/update", changed)[0] == 200
    assert it.deploy_bad() == (422, True, True)
    assert_settled(it.engine, it.site, it.old, "bad", "unless-stopped")


def fail_renames(it: Troubled) -> Harm | None:
    return fail_call if it.has_begun("rename") else None


def assert_waits(it: Troubled, *, running: bool) -> None:
    """The new one is not removed before the old one is back, which waits for the Engine."""
    assert it.deploy_bad() == (422, False, False)
    state = it.heal()
    assert (state["Id"], state["State"]["Running"]) == (it.old, running)


@TROUBLES.append
def new_container_stays_if_only_its_labels_tell_that_the_old_one_ran(proxy, agent):
    it = Troubled(proxy, agent, fail_renames)
    it.engine.remove(it.site)
    it.old = run_by_hand(it.engine, it.site)
    assert_waits(it, running=True)


@TROUBLES.append
def new_container_stays_if_only_its_labels_tell_that_the_old_one_was_stopped(proxy, agent):
    it = Troubled(proxy, agent, fail_renames)
    assert it.engine.call("POST", f"/containers/{it.old}/stop?t=0")[0] == 204
    assert_waits(it, running=False)


@TROUBLES.append
def new_container_stays_if_the_engine_refuses_what_does_not_show_a_full_disk(proxy, agent):
    def rule(it: Troubled) -> Harm | None:
        return refuse_call if it.has_begun("rename") else None

    it = Troubled(proxy, agent, rule)
    assert_waits(it, running=True)


@TROUBLES.append
def new_container_stays_if_somebody_removes_the_old_one_to_make_room(proxy, agent):
    def rule(it: Troubled) -> Harm | None:
        if not it.has_begun("rename"):
            return None
        it.engine.remove(it.old)
        return fail_call

    it = Troubled(proxy, agent, rule)
    assert it.deploy_bad() == (422, False, False)
    assert names_of(it.engine, it.site).keys() == {it.site}


@TROUBLES.append
def new_container_that_somebody_removes_meanwhile_is_rolled_back(proxy, agent):
    def rule(it: Troubled) -> None:
        if it.has_begun("stop"):
            it.engine.remove(it.site)

    it = Troubled(proxy, agent, rule)
    assert it.deploy_bad() == (422, True, False)
    assert_settled(it.engine, it.site, it.old, "bad")


@TROUBLES.append
def recovery_tells_no_problem_that_its_last_attempt_has_solved(proxy, agent):
    def rule(it: Troubled) -> Harm | None:
        is_first = "DELETE" not in it.calls[:-1]
        return fail_call if is_first and it.has_begun("start", "DELETE") else None

    it = Troubled(proxy, agent, rule)
    it.deploy_bad()
    assert "could not be undone yet" in it.reply.json()["message"]
    assert_settled(it.engine, it.site, it.old, "bad")
    lines = until(lambda: [x for x in agent.lines("recovery") if x["container"] == it.site], "it")
    assert [(line["outcome"], line["error"]) for line in lines] == [("rolled back", "")]


@pytest.fixture(scope="module")
def troubles(engine: RealEngine, fragile: tuple[FaultyProxy, Agent]) -> dict[Any, Any]:
    """All of them at once: what the Engine fails is repeated for 12 s."""
    proxy, agent = fragile
    with concurrent.futures.ThreadPoolExecutor(len(TROUBLES)) as threads:
        found = {each: threads.submit(each, proxy, agent) for each in TROUBLES}
    for it in proxy.troubled:
        for helper in ("", *HELPERS):
            engine.remove(it.site + helper)
    proxy.troubled = []
    return found


@pytest.mark.parametrize("trouble", TROUBLES, ids=[each.__name__ for each in TROUBLES])
def test_trouble_in_a_rollback(troubles, trouble):
    troubles[trouble].result()


def test_recovery_tells_a_problem_that_is_left_even_if_its_last_attempt_finds_nothing_to_do(
    fragile, engine, site, monkeypatch
):
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]
    starts: list[str] = []

    def harm_to(method: str, target: str) -> Callable[..., None] | None:
        if method == "DELETE":
            return cut_after_call
        if target.endswith("/start"):
            starts.append(target)
        return refuse_call if starts[1:] and target.endswith("/start") else None

    monkeypatch.setattr(proxy, "harm_to", harm_to)  # of this test alone: others share the proxy
    assert put(agent, site, BAD).status == 422
    lines = until(lambda: [x for x in agent.lines("recovery") if x["container"] == site], "a line")
    assert [line["error"] for line in lines] == ["the old container does not start: harm"]
    assert names_of(engine, site)[site]["Id"] == old


def test_container_that_is_just_being_renamed_is_not_touched(pair):
    twice = [{"Id": "c" * 64, "Names": ["/renamed", "/renamed.next"]}]
    pair.engine.script["its own look"] = http_answer(twice)
    reply = put(pair.agent, "renamed", spec())
    assert (reply.status, "renaming" in reply.json()["message"]) == (503, True)


@pytest.mark.parametrize(
    "kind, number",
    [("good", number) for number in range(8)] + [("bad", number) for number in (6, 8, 9, 10, 11)],
)
def test_call_that_the_engine_does_late_is_waited_for(engine, fragile, standing, kind, number):
    (proxy, agent), (site, old) = fragile, standing
    calls: queue.Queue[threading.Timer] = queue.Queue()

    def do_late(forward: Callable[[], bytes], sock: socket.socket) -> None:
        calls.put(threading.Timer(0.5, forward))
        calls.queue[0].start()

    proxy.arm(number, do_late)
    reply = put(agent, site, body_of(kind))
    calls.get(timeout=WAIT).join()
    assert_settled(engine, site, old, "good" if reply.status == 200 else "bad")


@pytest.mark.parametrize("number", range(4))
def test_killed_first_deploy_leaves_no_helper(engine, site, tmp_path, number):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        with Agent(DOCKER_HOST=proxy.url) as agent:
            proxy.arm(number, crash(agent))
            with pytest.raises((OSError, http.client.HTTPException)):
                put(agent, site, spec())
        assert len(proxy.disarm()) == number + 1
        with Agent(DOCKER_HOST=proxy.url) as agent:
            until(lambda: not names_of(engine, site), "its removal")
            until(lambda: put(agent, site, spec()).status == 201, "the end of the recovery")
    assert engine.inspect(site)["HostConfig"]["RestartPolicy"]["Name"] == "always"


def test_first_then_unchanged_then_replaced(engine, fragile, site):
    proxy, agent = fragile
    reply = put(agent, site, spec())
    first = reply.json()
    assert reply.status == 201
    assert set(first) == {
        *("id", "name", "changed", "image", "image_digest", "replaced", "gate", "warnings")
    }
    assert (first["changed"], first["replaced"], first["gate"]) == (True, None, "stable")
    target = {name: first[name] for name in ("id", "name", "image")}
    until(lambda: target in [line["target"] for line in agent.lines("request")], "its log line")
    started = engine.inspect(site)["State"]["StartedAt"]
    proxy.seen.clear()
    reply = put(agent, site, spec(deploy={"stable": 1}))
    members = {"changed": False, "replaced": None, "id": first["id"]}
    assert (reply.status, members.items() <= reply.json().items()) == (200, True)
    assert len(proxy.seen) <= 4
    assert engine.inspect(site)["State"]["StartedAt"] == started
    reply = put(agent, site, GOOD)
    assert (reply.status, reply.json()["changed"]) == (200, True)
    assert reply.json()["replaced"]["id"] == first["id"]
    assert names_of(engine, site).keys() == {site}


@pytest.mark.parametrize("kind", CALLS)
def test_order_of_the_calls_that_change_something(fragile, standing, kind):
    (proxy, agent), (site, _) = fragile, standing
    proxy.arm(99, refuse_call)
    put(agent, site, body_of(kind))
    calls = proxy.disarm()
    assert len(calls) == len(CALLS[kind])
    assert all(word in call for word, call in zip(CALLS[kind], calls)), calls


def test_steps_are_told(agent, site):
    assert [kind for kind, _ in put_steps(agent, site, spec())][-1] == "done"
    good, bad = put_steps(agent, site, GOOD), put_steps(agent, site, BAD)
    assert [data for _, data in good[:-1]] == ["create", "stop", "start", "gate", "done"]
    assert good[-1][1]["changed"]
    assert [data for _, data in bad[:-1]] == ["create", "stop", "start", "gate", "rollback"]
    assert bad[-1][0] == "error"
    assert bad[-1][1]["logs"] == ["broken"]


def check(command: str, **more: Any) -> dict[str, Any]:
    return {"shell": command, "interval": 0.1, "timeout": 5, **more}


@pytest.mark.parametrize("fields, gate, word, health", cases(
    ("healthy", {"healthcheck": check("true")}, "healthy", "", None),
    ("no check", {"healthcheck": {"disable": True}, "deploy": {"stable": 0.2}},
     *("stable", "", None)),
    ("unhealthy fails at once",
     {"healthcheck": check("false", retries=1), "deploy": {"timeout": 3600}},
     *(None, "the new container is unhealthy", "unhealthy")),
    ("not healthy in time",
     {"healthcheck": check("false", start_period=60), "deploy": {"timeout": 0.3}},
     *(None, "not healthy after 0.3 s", "starting")),
    ("exit 0", {"cmd": ["true"], "healthcheck": check("true")}, None, "code 0", None),
    ("exit in the time", {"cmd": ["sh", "-c", "sleep 0.1"], "deploy": {"stable": 10}},
     *(None, "code 0", None)),
))  # fmt: skip
def test_gate(agent, engine, standing, fields, gate, word, health):
    site, old = standing
    reply = put(agent, site, spec(**{"env": [f"B={gate}"], **fields}))
    if gate:
        assert (reply.status, reply.json()["gate"]) == (200, gate)
        return
    assert reply.status == 422
    assert word in reply.json()["message"]
    assert reply.json()["rolled_back"]
    assert health in (None, reply.json()["health"])
    assert_settled(engine, site, old, "bad")


def test_policy_that_stays_the_same_is_not_set(fragile, site):
    proxy, agent = fragile
    for policy in None, {"name": "no"}:
        proxy.arm(99, refuse_call)
        body = spec(restart_policy=policy, env=[f"A={policy}"])
        assert put(agent, site, body).status in (200, 201)
        assert not [call for call in proxy.disarm() if call.endswith("/update")]


@pytest.mark.parametrize("is_old_there", [True, False])
def test_exit_between_the_gate_and_the_policy_is_a_failure(fragile, engine, site, is_old_there):
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]

    def exit_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
        if not is_old_there:
            engine.remove(f"{site}.prev")
        engine.call("POST", f"/containers/{site}/kill")
        until(lambda: not engine.inspect(site)["State"]["Running"], "its exit")
        sock.sendall(forward())

    proxy.arm(CALLS["good"].index("update", 3), exit_first)
    reply = put(agent, site, GOOD)
    proxy.disarm()
    assert (reply.status, reply.json()["rolled_back"]) == (422, is_old_there)
    assert "exited with code 137" in reply.json()["message"]
    if is_old_there:
        assert_settled(engine, site, old, "bad")


def test_exit_after_a_commit_began_in_a_recovery_is_rolled_back(engine, site, tmp_path):
    policies: queue.Queue[str] = queue.Queue()
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        old = deploy_and_crash(proxy, site, "good", CALLS["good"].index("update", 3), after=False)

        def note_policy(forward: Callable[[], bytes], sock: socket.socket) -> None:
            policies.put(engine.inspect(site)["HostConfig"]["RestartPolicy"]["Name"])
            sock.sendall(forward())

        def exit_then(forward: Callable[[], bytes], sock: socket.socket) -> None:
            engine.call("POST", f"/containers/{site}/kill")
            until(lambda: not engine.inspect(site)["State"]["Running"], "its exit")
            proxy.arm(BACK.index("rename") + 1, note_policy)  # after an update of its own
            sock.sendall(forward())

        proxy.arm(0, exit_then)
        with Agent(DOCKER_HOST=proxy.url):
            assert_settled(engine, site, old, "bad")
        proxy.disarm()
    # An Engine that restarts starts what was stopped, too, if its policy is "always".
    assert policies.get(timeout=WAIT) == "no"


def test_recovery_takes_no_name_from_the_only_container_there_is(engine, site, tmp_path):
    """Somebody removes the old one while a recovery looks at the new one."""
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        deploy_and_crash(proxy, site, "good", CALLS["good"].index("update", 3), after=False)
        new = names_of(engine, site)[site]["Id"]

        def exit_and_remove(forward: Callable[[], bytes], sock: socket.socket) -> None:
            engine.call("POST", f"/containers/{site}/kill")
            until(lambda: not engine.inspect(site)["State"]["Running"], "its exit")
            engine.remove(f"{site}.prev")
            sock.sendall(forward())

        proxy.arm(0, exit_and_remove)
        with Agent(DOCKER_HOST=proxy.url) as agent:
            line = until(lambda: agent.lines("recovery"), "the recovery")[0]
        assert (line["outcome"], "No such container" in line["error"]) == ("", True)
        assert len(proxy.disarm()) == 1
    assert {name: found["Id"] for name, found in names_of(engine, site).items()} == {site: new}


def test_restart_that_was_under_way_leaves_no_second_container_that_runs(fragile, engine, site):
    """The Engine starts the old one as soon as the deploy has stopped it."""
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]

    def start_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
        engine.call("POST", f"/containers/{old}/start")
        sock.sendall(forward())

    proxy.arm(CALLS["good"].index("rename"), start_first)
    reply = put(agent, site, GOOD)
    proxy.disarm()
    assert (reply.status, reply.json()["warnings"]) == (200, [])
    assert_settled(engine, site, reply.json()["id"], "bad")


def test_what_a_recovery_could_not_finish_is_not_called_rolled_back(engine, site, tmp_path):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        deploy_and_crash(proxy, site, "good", CALLS["good"].index("update", 3), after=False)

        def refuse_all(forward: Callable[[], bytes], sock: socket.socket) -> None:
            proxy.arm(0, refuse_all)
            refuse_call(forward, sock)

        proxy.arm(0, refuse_all)
        with Agent(DOCKER_HOST=proxy.url) as agent:
            until(lambda: agent.lines("recovery"), "the recovery")
            replies: list[Reply] = []

            def is_answered() -> bool:  # the first recovery is over
                replies.append(put(agent, site, GOOD))
                return replies[-1].status != 409

            until(is_answered, "the answer")
    assert names_of(engine, site).keys() == {site, f"{site}.prev"}
    assert (replies[-1].status, replies[-1].json()["rolled_back"]) == (403, False)


def test_old_container_that_was_removed_by_hand_before_the_swap_is_a_warning(fragile, engine, site):
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]

    def remove_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
        engine.remove(old)
        sock.sendall(forward())

    proxy.arm(CALLS["good"].index("stop"), remove_first)
    reply = put(agent, site, GOOD)
    proxy.disarm()
    assert (reply.status, reply.json()["gate"]) == (200, "stable")
    assert [old in warning for warning in reply.json()["warnings"]] == [True]
    assert_settled(engine, site, reply.json()["id"], "bad")


@pytest.mark.parametrize("action", ["start", "remove", "forbid"])
def test_old_container_that_cannot_be_removed_is_one_warning(fragile, engine, site, action):
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]

    def act_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
        if action == "forbid":  # as a proxy that lets no DELETE through
            proxy.arm(0, act_first)
            sock.sendall(http_answer(b"Forbidden", 403, content_type="text/plain"))
            return
        engine.call("POST", f"/containers/{old}/start")
        if action == "remove":
            engine.remove(old)
        sock.sendall(forward())

    proxy.arm(CALLS["good"].index("DELETE"), act_first)
    reply = put(agent, site, GOOD)
    if action != "forbid":
        proxy.disarm()
    assert reply.status == 200
    if action == "remove":
        assert reply.json()["warnings"] == []
        return
    [warning] = reply.json()["warnings"]
    assert warning.startswith(f"{site}.old could not be removed: ")
    lines = until(lambda: [x for x in agent.lines("recovery") if x["container"] == site], "a line")
    assert [(line["outcome"], line["error"]) for line in lines] == [("committed", warning)]
    until(lambda: put(agent, site, spec()).json().get("message") == warning, "the same refusal")
    assert names_of(engine, site)[site]["Id"] == reply.json()["id"]
    proxy.disarm()
    engine.call("POST", f"/containers/{old}/stop")
    assert put(agent, site, spec()).status == 200
    assert names_of(engine, site).keys() == {site}


def test_failure_tells_the_exit_code_and_the_last_lines(agent, engine, site):
    lines = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i; done; exit 7"
    reply = put(agent, site, spec("sh", "-c", lines, deploy={"stable": 10}))
    assert reply.status == 422
    told = reply.json()
    assert (told["rolled_back"], told["exit_code"], told["health"]) == (False, 7, None)
    assert told["logs"] == [str(i) for i in range(11, 61)]
    assert not names_of(engine, site)


@pytest.mark.parametrize("call, code", [("start", 3), ("update", None)])
def test_bad_container_whose_old_one_was_removed_by_hand_is_told_as_a_failure(
    fragile, engine, site, call, code
):
    proxy, agent = fragile
    old = put(agent, site, spec()).json()["id"]

    def remove_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
        engine.remove(old)
        sock.sendall(forward())

    proxy.arm(SWAPPING.index(call), remove_first)
    reply = put(agent, site, BAD)
    proxy.disarm()
    told = reply.json()
    assert (reply.status, told["rolled_back"], told["exit_code"]) == (422, False, code)
    assert ("is all that is left" in told["message"]) == (call == "update")


def test_failure_tells_no_more_of_a_line_than_of_a_log_entry(agent, engine, site):
    """Fifty lines of control characters would be 300 MB in JSON."""
    line = "head -c 20000 /dev/zero | tr '\\0' '\\1'; echo; echo last; exit 7"
    told = put(agent, site, spec("sh", "-c", line, deploy={"stable": 10})).json()
    assert told["logs"] == ["\x01" * da.ENTRY_SIZE, "last"]


def test_stopped_container_stays_stopped_after_a_rollback(agent, engine, site):
    old = put(agent, site, spec()).json()["id"]
    engine.call("POST", f"/containers/{old}/stop")
    assert put(agent, site, BAD).json()["rolled_back"]
    current = names_of(engine, site)[site]
    assert (current["Id"], current["State"]["Running"]) == (old, False)
    assert current["HostConfig"]["RestartPolicy"]["Name"] == "always"


@pytest.mark.parametrize(
    "fields, status",
    cases(
        ("image is not there", {"image": "da-no-such:1"}, 404),
        ("network is not there", {"network_mode": None, "networks": ["da-no-such"]}, 404),
        ("peer is not there", {"network_mode": "container:da-no-such"}, 404),
        ("bind's source is not there", {"volumes": [{"source": "/da/no", "target": "/a"}]}, 400),
    ),
)
def test_what_fails_before_the_swap_touches_nothing(agent, engine, site, fields, status):
    old = put(agent, site, spec()).json()["id"]
    started = engine.inspect(old)["State"]["StartedAt"]
    assert put(agent, site, spec(**fields)).status == status
    assert names_of(engine, site).keys() == {site}
    assert engine.inspect(site)["State"]["StartedAt"] == started


@pytest.mark.parametrize(
    "path, fields, word",
    cases(
        ("helper name of another", "da-x.next", {}, "which deploys use"),
        ("name that a rename refuses", "x", {}, "name: must be"),
        ("container that removes itself", "da-x", {"auto_remove": True}, "auto_remove"),
        ("gate of days", "da-x", {"deploy": {"timeout": 3601}}, "deploy.timeout"),
        ("name in the body", "da-x", {"name": "da-y"}, "name: must be left out: the path"),
        ("label of the agent's", "da-x", {"labels": {"dockeragent.name": "a"}}, "labels"),
        ("adopt in the body", "da-x", {"adopt": True}, "adopt"),
        ("timeout of the gate", "da-x", {"timeout": 5}, "did you mean deploy.timeout?"),
        ("compose's container_name", "da-x", {"container_name": "a"}, "left out: the path has it"),
        ("gate as a duration", "da-x", {"deploy": {"stable": "10s"}}, "3,600, in seconds"),
    ),
)
def test_refused_deploy_reaches_nothing(pair, path, fields, word):
    assert_envelope(put(pair.agent, path, spec(**fields)), 400, word)
    assert not pair.engine.requests()


def run_by_hand(engine: RealEngine, name: str, **config: Any) -> str:
    """Start a container that the agent knows nothing of; return its id."""
    identity = engine.run(*LOOP, wait=False, **config)
    engine.call("POST", f"/containers/{identity}/rename?name={name}")
    return identity


def test_container_of_another_is_adopted_only_on_request(agent, engine, site):
    other = run_by_hand(engine, site)
    assert_envelope(put(agent, site, GOOD), 409, "adopt=true")
    assert names_of(engine, site)[site]["Id"] == other
    assert put(agent, site, BAD, "?adopt=true").json()["rolled_back"]
    current = names_of(engine, site)
    assert current.keys() == {site}
    assert (current[site]["Id"], current[site]["State"]["Running"]) == (other, True)
    assert put(agent, site, GOOD, "?adopt=true").json()["replaced"]["id"] == other
    assert names_of(engine, site).keys() == {site}


@pytest.mark.parametrize("own, sent", [(None, 10), (0, 0), (3, 3), (-1, 10)])
def test_no_container_is_waited_for_without_end(fragile, engine, site, own, sent):
    proxy, agent = fragile
    run_by_hand(engine, site, StopTimeout=own)
    proxy.arm(99, refuse_call)
    assert put(agent, site, GOOD, "?adopt=true").status == 200
    assert f"/stop?t={sent}" in "".join(proxy.disarm())


def test_container_that_removes_itself_is_not_replaced(agent, engine, site):
    host = {"NetworkMode": "none", "AutoRemove": True}
    other = run_by_hand(engine, site, HostConfig=host)
    assert_envelope(put(agent, site, GOOD, "?adopt=true"), 409, "auto_remove")
    assert names_of(engine, site)[site]["Id"] == other


def test_name_that_begins_the_ids_of_others_is_free(agent, engine):
    made: list[str] = []
    body = {"Image": IMAGE, "Cmd": LOOP, "Labels": {LABEL: "1"}}
    while len({identity[:2] for identity in made}) == len(made):  # until two begin alike
        made.append(engine.call("POST", "/containers/create", body)[1]["Id"])
    try:
        assert put(agent, made[-1][:2], spec()).status == 201
        assert put(agent, made[-1][:2], GOOD).status == 200
    finally:
        for identity in (made[-1][:2], *made):
            engine.remove(identity)


def test_container_that_is_listed_and_not_yet_there_is_not_replaced(pair):
    # The Engine lists a name from the moment it is taken, and knows the container a little later.
    pair.engine.script["its own look"] = http_answer([{"Id": "c" * 64, "Names": ["/web"]}])
    pair.engine.script["GET /images/a/json"] = http_answer({"Id": "sha256:" + "a" * 64})
    pair.engine.script[f"GET /containers/{'c' * 64}/json"] = http_answer({"message": "none"}, 404)
    pair.engine.script["POST /containers/create"] = http_answer({"message": "taken"}, 409)
    reply = put(pair.agent, "web", spec(image="a"))
    assert (reply.status, reply.json()["message"]) == (409, "taken")
    of_it = ("request_id", reply.headers["x-request-id"])
    told = until(
        lambda: [each for each in pair.agent.lines("request") if of_it in each.items()], "it"
    )
    assert told[0]["error"] == "taken"


def test_what_is_told_of_a_new_container_is_known_before_it_is_started(pair):
    """The tag was moved meanwhile, so its image has to be asked for."""
    identity, image = "d" * 64, "sha256:" + "b" * 64
    find = f"GET /containers/{identity}/json"

    def created(sock: socket.socket) -> None:
        labels = json.loads(pair.engine.changes()[0].body)["Labels"]
        found = {"Id": identity, "Image": image, "State": {}, "Config": {"Labels": labels}}
        pair.engine.script[find] = http_answer(found)
        sock.sendall(http_answer({"Id": identity}, 201))

    pair.engine.script["its own look"] = http_answer([])
    pair.engine.script["GET /images/a/json"] = http_answer({"Id": "sha256:" + "a" * 64})
    failed = http_answer({"message": "harm"}, 500)
    pair.engine.script[f"GET /images/{quote(image)}/json"] = failed
    pair.engine.script["POST /containers/create"] = created
    reply = put(pair.agent, "moved", spec(image="a"))
    assert (reply.status, reply.json()["message"]) == (500, "harm")
    assert pair.engine.changes() == []


def test_bug_in_a_deploy_is_told_and_leaves_its_name_free():
    class Broken(da.Engine):
        def call(self, *_: Any, **__: Any) -> bytes:
            raise ZeroDivisionError

    request, logged = da.Request("", da.NEVER, ()), []
    request.key, request.name, request.body = da.Key("ci", master=True), "web", {"image": "a"}
    deploys = da.Deploys(Broken(da.Address(), None), lambda *line, **_: logged.append(line))
    bugs = queue.SimpleQueue()
    before, threading.excepthook = threading.excepthook, bugs.put
    try:
        for _ in range(2):  # the name is free again
            kind, response = deploys.begin(request, "").get(timeout=WAIT)
            assert (kind, response.status) == ("error", 500)
            assert response.body["message"] == "an error of the agent's own; see its log"
            assert bugs.get(timeout=WAIT).exc_type is ZeroDivisionError
    finally:
        threading.excepthook = before


def test_deploy_without_a_thread_to_be_had_is_refused_and_leaves_its_name_free():
    code = """
import threading
request, engine = da.Request("", da.NEVER, ()), da.Engine(da.Address(path="/none"), None)
request.key, request.name, request.body = da.Key("ci", master=True), "web", {"image": "a"}
threading.stack_size(2**46)  # of which no address space has room
deploys = da.Deploys(engine, da.Log("error"))
try:
    deploys.begin(request, "")
except da.ApiError as error:
    print(error.status, error, deploys.busy)
"""
    assert in_child(code) == "503 the agent has no more threads; try again later {}\n"


def test_agent_knows_its_own_container(tmp_path):
    identity = secrets.token_hex(32)
    (tmp_path / identity).mkdir()
    (tmp_path / identity / "hostname").write_text("any\n")
    other = tmp_path / os.fsdecode(b"caf\xe9")  # a mount of the host's may have any name
    other.mkdir()
    script = (
        f"mount --bind {other} {other} &&"
        f" mount --bind {tmp_path}/{identity}/hostname /etc/hostname && exec {sys.executable} -c"
    )
    code = "import dockeragent; print(dockeragent.own_container())"
    inside = ["unshare", "-m", "sh", "-c", f'{script} "$0"', code]
    found = subprocess.run(inside, cwd=HERE, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == identity


@pytest.fixture
def labelled(engine: RealEngine, agent: Agent, site: str) -> Iterator[str]:
    """An image with all labels of a deploy of `site`."""
    deployed = put(agent, site, spec()).json()["id"]
    image = f"{site}:labelled"
    query = f"container={deployed}&repo={site}&tag=labelled"
    assert engine.call("POST", f"/commit?{query}", {})[0] == 201
    engine.remove(site)
    yield image
    for helper in ("", *HELPERS):
        engine.remove(site + helper)
    forget(engine, image)


def test_image_cannot_pass_for_a_deploy(agent, engine, labelled, site):
    current = run_by_hand(engine, site, Image=labelled)
    old = run_by_hand(engine, f"{site}.old", Image=labelled)
    engine.call("POST", f"/containers/{old}/kill")
    for query in ("", "?adopt=true"):
        assert_envelope(put(agent, site, GOOD, query), 409, f"{site}.old")
    engine.remove(old)
    assert_envelope(put(agent, site, GOOD), 409, "adopt=true")
    assert names_of(engine, site)[site]["Id"] == current
    engine.remove(current)
    assert put(agent, site, spec(image=labelled)).status == 201
    assert put(agent, site, BAD).json()["rolled_back"]


def test_what_no_deploy_has_left_is_not_touched(agent, engine, site):
    current = put(agent, site, spec()).json()["id"]
    other = run_by_hand(engine, f"{site}.next")
    assert_envelope(put(agent, site, GOOD), 409, f"{site}.next")
    made = {container["Id"] for container in names_of(engine, site).values()}
    assert made == {current, other}
    assert engine.inspect(current)["State"]["Running"]


def test_deploy_of_another_old_container_is_not_rolled_back(engine, site, tmp_path):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        deploy_and_crash(proxy, site, "good", 1, after=False)
    engine.remove(site)
    run_by_hand(engine, site)
    before = {name: found["Id"] for name, found in names_of(engine, site).items()}
    assert before.keys() == {site, f"{site}.next"}
    with Agent() as agent:
        until(lambda: agent.lines("recovery"), "the recovery")
        assert_envelope(put(agent, site, GOOD, "?adopt=true"), 409, f"{site}.next")
    assert {name: found["Id"] for name, found in names_of(engine, site).items()} == before
    assert engine.inspect(site)["State"]["Running"]


@pytest.mark.parametrize(
    "helper, number", [(".prev", 99), (".prev", 1), (".prev", 2), (".next", 99)]
)
def test_container_whose_other_half_was_removed_by_hand(engine, site, tmp_path, helper, number):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        old = deploy_and_crash(proxy, site, "good", 4, after=False)
        removed = ".next" if helper == ".prev" else ".prev"
        left = names_of(engine, site)[site + helper]["Id"]
        engine.remove(site + removed)
        if number < 99:
            recover_and_crash(proxy, number)
        with Agent(DOCKER_HOST=proxy.url):
            assert_settled(engine, site, left, "bad")
    assert (left == old) == (helper == ".prev")


def test_anonymous_volumes_are_carried_over(agent, engine, site):
    keep = {"type": "volume", "target": "/keep"}
    write = spec("sh", "-c", f"date +%N > /keep/a; {LOOP[2]}", volumes=[keep])
    first = put(agent, site, write).json()["id"]
    volume = engine.inspect(first)["Mounts"][0]["Name"]
    own = [{"type": "volume", "target": "/own"}]
    reply = put(agent, site, {**BAD, "volumes": own})
    assert reply.json()["rolled_back"]
    assert engine.call("GET", f"/volumes/{volume}")[0] == 200
    for body in spec(volumes=own), spec(env=["C=1"]), spec(volumes=[{**keep, "target": "/keep/"}]):
        assert put(agent, site, body).status == 200
        mounts = engine.inspect(site)["Mounts"]
        assert volume in {mount["Name"] for mount in mounts if mount["Destination"] == "/keep"}
    tmpfs = {"type": "tmpfs", "target": "/keep"}
    assert put(agent, site, spec(volumes=[tmpfs])).status == 200
    mounts = engine.inspect(site)["Mounts"]
    assert volume not in {mount.get("Name") for mount in mounts}
    assert engine.call("DELETE", f"/volumes/{volume}")[0] == 204  # it was kept, and is free
    engine.call("DELETE", f"/containers/{site}?force=1&v=1")
    for mount in filter(None, (mount.get("Name") for mount in mounts)):
        engine.call("DELETE", f"/volumes/{mount}")


def test_volume_with_options_is_not_taken_for_an_anonymous_one(agent, engine, site):
    """It could be a folder of the host's."""
    volume = secrets.token_hex(32)
    options = {"type": "tmpfs", "device": "tmpfs"}
    engine.call("POST", "/volumes/create", {"Name": volume, "DriverOpts": options})
    try:
        named = [{"type": "volume", "source": volume, "target": "/keep"}]
        assert put(agent, site, spec(volumes=named)).status == 201
        assert put(agent, site, spec()).status == 200
        assert engine.inspect(site)["Mounts"] == []
    finally:
        engine.remove(site)
        engine.call("DELETE", f"/volumes/{volume}")


def test_same_tag_with_a_new_image_is_a_change_and_its_digest_the_way_back(
    agent, engine, registries, site
):
    tag = f"{registries.plain}:{site}"
    body = {**spec(image=tag), "pull": "always"}

    def push(source: str) -> None:
        engine.call("POST", f"/images/{source}/tag?repo={registries.plain}&tag={site}")
        query = f"/images/{registries.plain}/push?tag={site}"
        with contextlib.closing(UnixConnection(engine.path)) as connection:
            connection.request("POST", query, headers={"X-Registry-Auth": "e30="})
            assert b"digest: sha256:" in connection.getresponse().read()

    push(IMAGE)
    first = put(agent, site, body).json()
    assert not put(agent, site, body).json()["changed"]
    assert first["image_digest"].startswith(f"{registries.plain}@sha256:")
    assert engine.call("POST", f"/commit?container={first['id']}&repo={site}&tag=2", {})[0] == 201
    push(f"{site}:2")
    second = put(agent, site, body).json()
    assert second["changed"]
    assert second["image_digest"] != first["image_digest"]
    assert second["replaced"] == {name: first[name] for name in ("id", "image", "image_digest")}
    reply = put(agent, site, {**GOOD, "pull": "missing", "image": first["image_digest"]})
    assert (reply.status, reply.json().get("image_digest")) == (200, first["image_digest"])
    for image in (f"{site}:2", tag, first["image_digest"]):
        forget(engine, image)


def begin(agent: Agent, site: str, body: Any) -> Any:
    """The connection of a PUT that nobody waits for."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.port, timeout=WAIT)
    path = f"/api/v1/containers/{site}"
    connection.request("PUT", path, json.dumps(body), {"X-API-Key": KEY})
    return connection


def test_second_deploy_of_a_name_waits_and_another_name_does_not(fragile, engine, standing, name):
    (proxy, agent), (site, _) = fragile, standing
    asked = threading.Event()

    def hold(forward: Callable[[], bytes], sock: socket.socket) -> None:
        asked.wait(WAIT)
        sock.sendall(forward())

    proxy.arm(CALLS["good"].index("update", 3), hold)  # at the end of its gate
    with contextlib.closing(begin(agent, site, body_of("good"))) as first:
        until(lambda: len(proxy.calls) > len(SWAPPING), "the swap")
        for container in names_of(engine, site).values():  # an Engine that restarts starts neither
            assert container["HostConfig"]["RestartPolicy"]["Name"] == "no"
        reply = put(agent, site, spec())
        assert_envelope(reply, 409, "is being deployed")
        assert reply.headers["retry-after"].isdigit()
        for method, path, body in (
            ("POST", f"/{site}/stop", None),
            ("DELETE", f"/{site}.prev?force=true", None),
            ("POST", "", {"image": IMAGE, "name": site}),
        ):
            reply = agent.request(method, f"/api/v1/containers{path}", body)
            assert_envelope(reply, 409, "is being deployed")
        assert put(agent, name, spec()).status == 201
        assert f"{site}.prev" in names_of(engine, site)
        asked.set()
        assert first.getresponse().status == 200


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("POST", "/containers/{}/restart", 200),
        ("POST", "/containers/{}/start", 200),
        ("DELETE", "/containers/{}?force=true", 200),
        ("POST", "/containers", 201),
        ("POST", "/run", 200),
    ],
)
def test_no_deploy_begins_while_another_request_changes_the_container(
    fragile, engine, site, method, path, status
):
    """A restart would start the old container again, beside the new one."""
    proxy, agent = fragile
    body = None if "{}" in path else {"image": IMAGE, "name": site, "cmd": ["true"]}
    if not body:
        put(agent, site, spec())
    begun, asked = threading.Event(), threading.Event()

    def hold(forward: Callable[[], bytes], sock: socket.socket) -> None:
        begun.set()
        asked.wait(WAIT)
        sock.sendall(forward())

    proxy.arm(0, hold)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        change = threads.submit(agent.request, method, f"/api/v1{path.format(site)}", body)
        assert begun.wait(WAIT)
        reply = put(agent, site, GOOD)
        asked.set()
        assert change.result(WAIT).status == status
    proxy.disarm()
    assert_envelope(reply, 409, "is being changed")
    assert reply.headers["retry-after"].isdigit()
    if path == "/containers":
        engine.remove(site)
    assert put(agent, site, GOOD).status in (200, 201)
    assert names_of(engine, site).keys() == {site}


def test_client_that_hangs_up_does_not_stop_a_deploy(agent, engine, site):
    old = put(agent, site, spec()).json()["id"]
    with contextlib.closing(begin(agent, site, GOOD)):
        until(lambda: names_of(engine, site).keys() != {site}, "the new one")
    until(lambda: settled(engine, site), "the end of the deploy")
    assert engine.inspect(site)["Id"] != old


def test_failed_deploy_does_not_keep_its_request(fakes):
    engine = da.Engine(da.parse_engine(fakes[0].url), None)
    request = da.Request("", da.NEVER, ())
    request.name, request.key, request.body = "web", da.Key("ops", master=True), {"image": IMAGE}
    with outlived_by_nothing(request):
        told = da.Deploys(engine, da.Log("error")).begin(request, "")
        del request
        while told.get(timeout=WAIT)[0] != "error":
            pass


def test_stopped_agent_leaves_a_deploy_to_its_next_start(engine, site):
    with Agent() as agent:
        old = put(agent, site, spec()).json()["id"]
        with contextlib.closing(begin(agent, site, {**GOOD, "deploy": {"stable": 2}})) as waiting:
            until(lambda: f"{site}.prev" in names_of(engine, site), "the swap")
            new = until(
                lambda: engine.inspect(site)["State"]["Running"] and engine.inspect(site)["Id"],
                "its start",
            )
            agent.process.send_signal(signal.SIGTERM)
            assert waiting.getresponse().status == 503
        assert agent.process.wait(WAIT) == 0
    assert engine.inspect(new)["State"]["Running"]
    with Agent():
        assert_settled(engine, site, old, "good")
    assert engine.inspect(site)["Id"] == new


@pytest.mark.parametrize("is_old_there", [True, False])
def test_agent_that_stops_before_the_swap_tells_that_all_is_as_it_was(
    engine, site, tmp_path, is_old_there
):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy, Agent(DOCKER_HOST=proxy.url) as agent:
        if is_old_there:
            put(agent, site, spec())

        def stop_first(forward: Callable[[], bytes], sock: socket.socket) -> None:
            agent.process.terminate()
            until(lambda: agent.lines("stopping"), "the log line")
            sock.sendall(forward())

        proxy.arm(0, stop_first)
        reply = put(agent, site, GOOD)
    assert (reply.status, reply.json()["rolled_back"]) == (503, is_old_there)
    assert names_of(engine, site).keys() == ({site} if is_old_there else set())


def test_stopped_agent_gives_up_no_old_container(engine, site, tmp_path):
    """A host that shuts down ends containerd, the Engine and the agent at once."""
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        with Agent(DOCKER_HOST=proxy.url) as agent:
            old = put(agent, site, spec()).json()["id"]

            def fail_starts(forward: Callable[[], bytes], sock: socket.socket) -> None:
                is_start = proxy.seen[-1].endswith("/start")
                proxy.arm(0, fail_starts)
                sock.sendall(http_answer({"message": "harm"}, 500) if is_start else forward())

            def stop_and_fail_starts(forward: Callable[[], bytes], sock: socket.socket) -> None:
                agent.process.terminate()
                threading.Timer(1, agent.process.terminate).start()  # then it exits at once
                fail_starts(forward, sock)

            proxy.arm(11, stop_and_fail_starts)
            with contextlib.suppress(OSError, http.client.HTTPException):
                put(agent, site, BAD)
            agent.process.wait(WAIT)
            proxy.disarm()
        with Agent(DOCKER_HOST=proxy.url):
            assert_settled(engine, site, old, "bad")


def test_recovery_waits_for_the_engine(engine, site, tmp_path):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        old = deploy_and_crash(proxy, site, "good", 3, after=False)
    with Agent(DOCKER_HOST=f"unix://{tmp_path}/q.sock") as agent:
        assert agent.get("/health").status == 503
        with FaultyProxy(tmp_path / "q.sock", engine):
            assert_settled(engine, site, old, "bad")
        assert until(lambda: agent.lines("recovery"), "a log line")[0]["container"] == site


@pytest.mark.parametrize("policy, number", [("always", 2), ("no", 1)])
def test_stop_that_outlasts_the_agent_does_not_end_the_old_container(
    engine, site, tmp_path, policy, number
):
    stubborn = spec("sh", "-c", "trap '' TERM; while :; do sleep 0.05; done", stop_timeout=2)
    stubborn["restart_policy"] = {"name": policy}
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        with Agent(DOCKER_HOST=proxy.url) as agent:
            old = put(agent, site, stubborn).json()["id"]

            def kill_while_it_stops(forward: Callable[[], bytes], sock: socket.socket) -> None:
                threading.Thread(target=forward, daemon=True).start()
                time.sleep(0.3)  # until the Engine has begun
                crash(agent)(forward, sock)

            proxy.arm(number, kill_while_it_stops)
            with pytest.raises((OSError, http.client.HTTPException)):
                put(agent, site, GOOD)
        with Agent(DOCKER_HOST=proxy.url) as agent:
            until(lambda: agent.lines("recovery"), "the recovery")
            assert_settled(engine, site, old, "bad", policy)
            finished = engine.inspect(old)["State"]["FinishedAt"]
    assert finished > "0002"  # the first stop came to its end


def test_create_that_the_engine_does_after_the_kill_is_removed(engine, site, tmp_path):
    restarted, created = threading.Event(), threading.Event()
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy:
        with Agent(DOCKER_HOST=proxy.url) as agent:
            old = put(agent, site, spec()).json()["id"]

            def kill_and_create_later(forward: Callable[[], bytes], sock: socket.socket) -> None:
                crash(agent)(forward, sock)
                restarted.wait(WAIT)
                forward()
                created.set()

            proxy.arm(0, kill_and_create_later)
            with contextlib.suppress(OSError, http.client.HTTPException):
                put(agent, site, GOOD, timeout=1)
        proxy.seen.clear()
        with Agent(DOCKER_HOST=proxy.url):
            until(lambda: any("filters" in call for call in proxy.seen), "its first look")
            restarted.set()
            assert created.wait(WAIT)
            assert f"{site}.next" in names_of(engine, site)
            assert_settled(engine, site, old, "bad")


def test_limited_key_deploys_within_its_limits(engine, site, name, tmp_path):
    entry = {"name": "ci", "sha256": digest("limited"), "allow": ["deploy"], "cache": True}
    entry.update(containers=[site, name], images=[f"docker.io/library/{IMAGE}"])
    entry["limits"] = {"containers": 1}
    with Agent(KEYS_FILE=keys_file(tmp_path, entry)) as agent:
        assert put(agent, site, spec(), key="limited").status == 201
        assert put(agent, site, GOOD, key="limited").status == 200
        assert engine.inspect(site)["Config"]["Labels"]["dockeragent.key"] == "ci"
        assert_envelope(put(agent, name, spec(), key="limited"), 403, "containers is not allowed")
        assert_envelope(put(agent, site, BAD, "?adopt=true", key="limited"), 403, "adopt")
        assert_envelope(put(agent, "other", spec(), key="limited"), 403, "other is not allowed")
    assert not names_of(engine, name)
    assert "NEW=1" in engine.inspect(site)["Config"]["Env"]


def test_write_recovers_the_name_first(engine, site, tmp_path):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy, Agent() as agent:
        old = deploy_and_crash(proxy, site, "good", 5, after=False)
        assert names_of(engine, site).keys() == {site, f"{site}.prev"}
        assert agent.post(f"/api/v1/containers/{site}/restart").status == 200
        assert_settled(engine, site, old, "bad")


def test_write_does_not_wait_for_reads_that_the_engine_fails(engine, site, tmp_path, monkeypatch):
    with FaultyProxy(tmp_path / "p.sock", engine) as proxy, Agent(DOCKER_HOST=proxy.url) as agent:
        with FaultyProxy(tmp_path / "q.sock", engine) as other:
            deploy_and_crash(other, site, "good", 5, after=False)
        reads: list[str] = []

        def harm_to(method: str, target: str) -> Callable[..., None] | None:
            reads.extend([target] * ("/images/" in target))
            return fail_call if "/images/" in target else None

        with monkeypatch.context() as patch:
            patch.setattr(proxy, "harm_to", harm_to)
            agent.post(f"/api/v1/containers/{site}/restart")
        assert len(reads) == 1  # a recovery of its own would repeat it
        (line,) = (x for x in agent.lines("recovery") if x["container"] == site)
        assert line["error"] == "harm"


# --------------------------------------------------------------------------------------------------
# What is around the file: README, image, unit, proxy
# --------------------------------------------------------------------------------------------------

README = HERE / "README.md"
LINES = 5_967
BASE_IMAGE = os.environ.get("DOCKERAGENT_BASE_IMAGE", "")


def readme_section(heading: str) -> str:
    """The README's text under a heading, up to the next one that is not below it."""
    level = heading.split(" ")[0]
    lines, found, fenced = [], False, False
    for line in README.read_text().splitlines():
        fenced ^= line.startswith("```")
        if re.match(rf"#{{1,{len(level)}}} ", line) and not fenced:
            found = line == heading
        elif found:
            lines.append(line)
    assert lines, heading
    return "\n".join(lines)


def readme_blocks(heading: str, language: str) -> list[str]:
    """The fenced blocks of one language under a heading."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", readme_section(heading))


def table_rows(text: str) -> list[list[str]]:
    """The rows of the tables in text, less their heads, each cell without its white space."""
    rows = re.findall(r"(?m)^\| (.*) \|$", text)
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    return [row for row in cells if row[0].startswith("`") or row[-1].startswith("`")]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def is_healthy(agent: Agent) -> bool:
    """The Engine's proxy of a published port accepts before the agent listens, and then resets."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return agent.get("/health").status == 200
    return False


def shell(script: str, cwd: Path, timeout: float = 120, **env: str) -> str:
    """Run a script in bash; its output. Fails the test if a command of it fails."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "DOCKER_HOST": ENGINE_HOST, "DOCKER_BUILDKIT": "0", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def needs_program(name: str) -> None:
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")


def test_readme_has_every_route() -> None:
    headings = set()
    for method, path, others in re.findall(
        r"(?m)^### ([A-Z]+) (/\S+?)((?:, /\w+)*)$", README.read_text()
    ):
        headings.add((method, path))
        headings |= {(method, path.rpartition("/")[0] + other) for other in others.split(", ")[1:]}
    assert headings == {(route.method, route.path) for route in da.ROUTES}


def test_readme_and_help_have_every_variable_and_its_default() -> None:
    rows = table_rows(readme_section("## Configuration"))
    found = [(row[0].strip("`"), row[1].strip("`")) for row in rows]
    assert found == [(setting.name, setting.default or "-") for setting in da.SETTINGS]
    for setting in da.SETTINGS:
        assert f"  {setting.name} " in da.usage()


def field_names(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, rule in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        if rule["type"] == "nothing":
            continue
        nested = rule["items"] if rule["type"] == "array" else rule
        if nested.get("properties"):
            yield from field_names(nested, path + ("[]." if nested is not rule else "."))
        else:
            yield path


@pytest.mark.parametrize(
    "schema", ["CREATE", "PULL", "STOP", "KILL", "FILE", "LIST_QUERY", "REMOVE_QUERY", "LOGS_QUERY"]
)
def test_readme_has_every_field(schema: str) -> None:
    words = set(re.findall(r"`([^`\s]+)`|[?&](\w+)=", readme_section("## API")))
    known = {word for pair in words for word in pair}
    assert set(field_names(getattr(da, schema))) <= known


def test_readme_has_the_numbers_of_the_constants() -> None:
    rows = table_rows(readme_section("## Errors, limits and timeouts"))
    assert len(rows) > 15
    for what, limit, _, constant in rows:
        value = getattr(da, constant.strip("`"))
        forms = [f"{value:g} s"] if isinstance(value, float) else [f"{value:,}"]
        if value % 1024 == 0:
            forms += [f"{value // 1024} KiB", f"{value / 2**20:g} MiB"]
        assert any(re.search(rf"(?<![\d,.]){form}\b", limit) for form in forms), (what, forms)


def section_lines() -> dict[str, tuple[int, int]]:
    """The first and the last line of each section, by the beginning of its heading."""
    found = re.finditer(r"(?m)^# -+\n# ([\w ,]+).*\n# -+$", SOURCE.read_text())
    starts = [(match[1], SOURCE.read_text()[: match.start()].count("\n") + 1) for match in found]
    ends = [start - 1 for _, start in starts[1:]] + [len(SOURCE.read_text().splitlines())]
    return {name: (start, end) for (name, start), end in zip(starts, ends)}


def test_file_stays_within_its_line_budgets() -> None:
    sections = section_lines()
    size = {name: end - start + 1 for name, (start, end) in sections.items()}
    reached = ("Logging", "Rate limiter", "Sockets", "HTTP handler", "Server")
    assert sum(size[name] for name in reached) < 757  # what a client without a key can reach
    assert sum(size.values()) <= LINES


def test_nothing_that_must_be_trusted_names_what_comes_after_it() -> None:
    tree = ast.parse(SOURCE.read_text())
    (said,) = re.findall(r"up to line (\d+)", ast.get_docstring(tree) or "")
    last = section_lines()["Request schemas"][0] - 1
    assert int(said) == last
    later, named = set(), set()
    for node in tree.body:
        inside = [name for name in ast.walk(node) if isinstance(name, (ast.Name, ast.arg))]
        stored = {name.arg for name in inside if isinstance(name, ast.arg)}
        stored |= {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if node.lineno <= last:  # less its own parameters and local names
            named |= {name.id for name in inside if isinstance(name, ast.Name)} - stored
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            later.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            later |= {name.id for target in targets for name in ast.walk(target) if name in inside}
    assert {"Engine", "ROUTES", "CREATE", "main", "NEXT"} <= later
    assert named & later == set()


def test_file_imports_the_standard_library_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    # -I and -S: neither this folder nor any package that was installed is on the path.
    subprocess.run([sys.executable, "-IS", "-c", f"import {', '.join(sorted(names))}"], check=True)


def test_no_name_of_the_file_is_bound_twice() -> None:
    """A section's constant must not take the place of another's; no linter sees that."""
    names = []
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            bound = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            names += [each.id for each in bound if isinstance(each.ctx, ast.Store)]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_importing_the_file_does_nothing_but_define_names() -> None:
    script = """if True:
        import sys, threading
        import http.server, ssl, json  # what they do when imported is not ours
        events = []
        sys.addaudithook(lambda event, what: events.append(event))
        import dockeragent
        acts = ("socket.", "subprocess.", "os.mkdir", "os.remove", "os.rename", "os.system")
        print([event for event in events if event.startswith(acts)], threading.active_count())
    """
    command = [sys.executable, "-B", "-c", script]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[] 1\n", "")


@contextlib.contextmanager
def readme_registry(folder: Path) -> Iterator[str]:
    """A registry on loopback that has the test image; yields what to write before its name."""
    needs_program("docker-registry")
    needs_program("docker")
    port = free_port()
    (folder / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\n"
    )
    log = (folder / "registry.log").open("wb")
    command = ["docker-registry", "serve", str(folder / "registry.yml")]
    with log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until(lambda: is_open(port), "the registry")
            target = f"127.0.0.1:{port}/busybox:latest"
            shell(f"docker tag {IMAGE} {target}; docker push {target}; docker rmi {target}", folder)
            yield f"127.0.0.1:{port}/"
            shell(f"docker rmi {target}", folder)
        finally:
            process.terminate()


def test_readme_commands_work_pasted_into_one_shell(
    engine: RealEngine, name: str, tmp_path: Path
) -> None:
    sections = ("## Start", "## A day with it", "## Keys", "## API")
    script = "\n".join(block for at in sections for block in readme_blocks(at, "sh"))
    assert script.count("curl") >= 45
    shutil.copy(SOURCE, tmp_path / "dockeragent.py")
    # A file beside the agent must not take a library's place.
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    port = str(free_port())
    with readme_registry(tmp_path) as registry:
        image = f'"{registry}busybox:latest"'
        script = re.sub('"busybox(:latest)?"', image, script).replace("3000", port)
        script = re.sub(r"\b(clock|web|api|job|migrate|front|data)\b(?!/v1)", rf"{name}-\1", script)
        script = script.replace("HOST_ROOT=/ ", f"HOST_ROOT={tmp_path} ")
        script = re.sub(
            r"(?m)curl -sS(?!.*echo broken)", "curl --fail-with-body -sS --max-time 60 ", script
        )
        ends = f"trap 'kill $(jobs -p); docker rm -fv {name}-clock {name}-web {name}-api' EXIT\n"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        output = shell(ends + script, tmp_path, timeout=300, TOKEN="token", PATH=path)
    for action in ("paused", "unpaused", "restarted", "killed", "started", "stopped", "removed"):
        assert f'"message":"container {action}"' in output
    for promised in (
        *("retry: 3000", "event: end", "event: done", "event: step", '"rolled_back":true'),
        *('"digest":"sha256:', '"stream":"stdout"', '"cpu_percent"', '"exit_code":3', "zone = UTC"),
        *('"networks":', '"volumes":', '"images":', '"removed":', "container_state{", '"sha256"'),
        *('"message":"network removed"', '"message":"volume removed"', '"message":"file removed"'),
    ):
        assert promised in output, promised
    assert KEY not in output and not (tmp_path / "etc" / f"{name}-clock/clock.conf").exists()
    for private in ("agent.key", "agent.header", "ci.key"):
        assert stat.S_IMODE((tmp_path / private).stat().st_mode) == 0o600


def test_readme_unit_passes_systemd_analyze(tmp_path: Path) -> None:
    needs_program("systemd-analyze")
    [unit] = readme_blocks("### On the host", "ini")
    path = tmp_path / "dockeragent.service"
    path.write_text(unit)
    command = ["systemd-analyze", "verify", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


PROXIES = {  # what stands around the README's lines, the arguments before the file's name
    "nginx": (
        "daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}}"
        " http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;"
        " fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;"
        " {block} }}",
        ["-e", "stderr", "-c"],
    ),
    "haproxy": ("{block}", ["-f"]),
    "caddy": (
        "{{\nadmin off\nauto_https off\n}}\n{block}",
        ["run", "--adapter", "caddyfile", "--config"],
    ),
}


@contextlib.contextmanager
def readme_proxy(program: str, folder: Path, agent_port: int, pki: Pki) -> Iterator[int]:
    """One of the README's proxies in front of an agent, with the certificate of pki; its port."""
    needs_program(program)
    [block] = readme_blocks("### Behind a proxy", program)
    port, both = free_port(), folder / "both.pem"
    server, key = pki.file("server.pem"), pki.file("server.key")
    both.write_text(Path(server).read_text() + Path(key).read_text())
    for of_readme, ours in (
        ("127.0.0.1:3000", f"127.0.0.1:{agent_port}"),
        ("/etc/ssl/agent.pem", server),
        ("/etc/ssl/agent.key", key),
        ("/etc/ssl/agent-and-key.pem", str(both)),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("bind :443", f"bind 127.0.0.1:{port}"),
        ("agent.example.com {", f"https://localhost:{port} {{\ntls {server} {key}"),
    ):
        block = block.replace(of_readme, ours)
    around, arguments = PROXIES[program]
    (folder / "conf").write_text(around.format(folder=folder, block=block))
    command = [program, *arguments, str(folder / "conf")]
    env = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        until(lambda: is_open(port), program)
        yield port
    finally:
        process.terminate()
        process.wait(WAIT)


@pytest.mark.parametrize("program", PROXIES)
def test_readme_proxy_passes_on_the_client_each_line_and_a_disconnect(
    program: str, engine: RealEngine, name: str, pki: Pki, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=pki.file("server.pem"))
    body = {"image": IMAGE, "name": name, "cmd": ["sh", "-c", "echo one; exec sleep 60"]}
    headers = {"X-API-Key": KEY, "X-Forwarded-For": "192.0.2.1"}
    with Agent(TRUSTED_PROXIES="127.0.0.1/32") as agent:
        assert agent.post("/api/v1/containers", body).status == 201
        with readme_proxy(program, tmp_path, agent.port, pki) as port:
            connection = http.client.HTTPSConnection(
                "localhost", port, timeout=WAIT, source_address=("127.0.0.2", 0), context=context
            )
            with contextlib.closing(connection):
                connection.request("GET", logs_path(name, "follow=true"), headers=headers)
                response = connection.getresponse()
                while b"data: one" not in response.readline():  # the container still runs
                    pass
                response.close()
            line = until(
                lambda: [at for at in agent.lines("request") if at["route"].endswith("/logs")],
                "the end of the stream",
            )
            assert line[0]["client_ip"] == "127.0.0.2"
            context.set_alpn_protocols(["h2"])
            plain = socket.create_connection(("127.0.0.1", port), WAIT)
            with context.wrap_socket(plain, server_hostname="localhost") as sock:
                assert sock.selected_alpn_protocol() == "h2"


def agent_at(port: int) -> Agent:
    """A client for an agent that runs already."""
    agent = Agent.__new__(Agent)
    agent.port = port
    return agent


@pytest.fixture(scope="session")
def agent_image(engine: RealEngine) -> Iterator[str]:
    """The agent's image, made with the Dockerfile on the base that DOCKERAGENT_BASE_IMAGE names."""
    if not BASE_IMAGE:
        pytest.skip("DOCKERAGENT_BASE_IMAGE names no image to build on")
    root = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " / / " in line
    ]
    if not any("shared:" in line or "master:" in line for line in root):
        pytest.skip("the root mount is private here; try mount --make-shared /")
    needs_program("docker")
    tag = "dockeragent:" + secrets.token_hex(6)
    shell(f"docker build --build-arg BASE={BASE_IMAGE} -t {tag} .", HERE)
    yield tag
    shell(f"docker rmi -f {tag}", HERE)


@pytest.mark.parametrize(("index", "root"), [(0, True), (1, False)], ids=["hardened", "not root"])
def test_readme_image_runs(
    agent_image: str, engine: RealEngine, name: str, tmp_path: Path, index: int, root: bool
) -> None:
    blocks = "\n".join(readme_blocks("### In a container", "sh"))
    runs = re.findall(r"(?ms)^docker run .*?[^\\]$", blocks)
    container, sibling = f"{name}-agent", f"{name}-sibling"
    command = runs[index].replace("--name dockeragent", f"--name {container} --health-interval 1s")
    command = command.replace("127.0.0.1:3000:3000", "127.0.0.1::3000").replace(
        "/host:rslave dockeragent", f"/host:rslave {agent_image}"
    )
    command = re.sub(r"/var/run/docker\.sock(?=:|\))", engine.path, command, count=1 + (not root))
    install = "".join(re.findall("(?m)^install -m 640 .*\n", blocks))
    install = install.replace("/var/run/docker.sock", engine.path)
    (tmp_path / "agent.key").write_text(KEY)
    (tmp_path / "agent.key").chmod(0o600)
    # Below /tmp, which others may enter, unlike pytest's own folders.
    host = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        shell(f"{install}{command}", tmp_path)
        until(lambda: engine.inspect(container)["State"]["Health"]["Status"] == "healthy", "health")
        config = engine.inspect(container)
        port = config["NetworkSettings"]["Ports"]["3000/tcp"][0]["HostPort"]
        agent = agent_at(int(port))
        body = {"image": IMAGE, "name": sibling, "cmd": ["sleep", "60"]}
        assert agent.post("/api/v1/containers", body).status == 201
        assert engine.inspect(sibling)["State"]["Running"]
        engine.remove(sibling)
        file = {"path": f"{host}/a/b", "content": "x", "permission": "6755", "uid": 1234, "gid": 5}
        reply = agent.post("/api/v1/files", file)
        if root:
            assert reply.status == 201, reply.body
            found = (host / "a/b").stat()
            assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o6755, 1234, 5)
        else:
            assert_envelope(reply, 403)
            assert not (host / "a").exists()
            host.chmod(0o777)
            assert agent.post("/api/v1/files", {"path": f"{host}/b", "content": "x"}).status == 201
            assert (host / "b").stat().st_uid == 65532
        began = time.monotonic()
        shell(f"docker stop {container}", tmp_path)
        assert time.monotonic() - began < 5
        assert engine.inspect(container)["State"]["ExitCode"] == 0
    finally:
        engine.remove(container)
        engine.remove(sibling)
        shutil.rmtree(host)


def test_readme_stack_runs(agent_image: str, engine: RealEngine, tmp_path: Path) -> None:
    if not os.environ.get("DOCKERAGENT_OWN_ENGINE"):
        pytest.skip("DOCKERAGENT_OWN_ENGINE is not set: the engine is not ours to make a swarm of")
    [stack] = readme_blocks("### On many machines", "yaml")
    [commands] = readme_blocks("### On many machines", "sh")
    agent = agent_at(free_port())
    stack = stack.replace("published: 3000", f"published: {agent.port}")
    (tmp_path / "stack.yml").write_text(
        stack.replace("/var/run/docker.sock:", f"{engine.path}:", 1)
    )
    (tmp_path / "agent.key").write_text(KEY + "\n")
    lock = os.open(tempfile.gettempdir(), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # a swarm has ports that are always the same
    shell("docker swarm init --advertise-addr 127.0.0.1", tmp_path)
    try:
        commands = commands.replace("stack deploy", "stack deploy --resolve-image never")
        shell(commands, tmp_path, IMAGE=agent_image)
        until(lambda: is_healthy(agent), "the agent")
        found = agent.get("/api/v1/containers").json()["containers"]
        assert [row["image"] for row in found if "com.docker.swarm.task" in row["labels"]] == [
            agent_image
        ]
    finally:
        shell("docker stack rm dockeragent || true; docker swarm leave --force", tmp_path)
        os.close(lock)


@pytest.mark.parametrize("waits", LONG_WAITS, ids=[each.__name__ for each in LONG_WAITS])
def test_long_wait(long_waits, waits):
    long_waits[waits].result()
