"""Tests of dockeragent: over real sockets, and on a real Engine wherever one can show it.

DOCKER_HOST names the Engine, which needs an image busybox:test; without one, what takes a real
Engine is skipped. How an Engine fails is shown by FakeEngine, scripted, on a Unix socket.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import queue
import re
import secrets
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import dockeragent as da

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "dockeragent.py"
KEY = "0123456789abcdef0123456789abcdef"
ENGINE_HOST = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
IMAGE = "busybox:test"
WAIT = 10.0  # seconds before a test that waits for something fails


class Reply(NamedTuple):
    """One answer: status, headers by lower-case name, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return condition() once it is true; fail the test when that takes longer than WAIT."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.01)
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
            "API_KEY": KEY,
            "LISTEN_ADDR": "127.0.0.1:0",
            "RATE_LIMIT": "0",
            "DOCKER_HOST": ENGINE_HOST,
            **env,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-X", "dev", str(SOURCE)],
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
        """What was asked since the last call, pings aside."""
        found = []
        while not self.seen.empty():
            found.append(self.seen.get())
        return [seen for seen in found if seen.target != "/_ping"]


class FakeEngineHandler(socketserver.StreamRequestHandler):
    server: FakeEngine

    def handle(self) -> None:
        method, target, _ = self.rfile.readline().decode().split(" ")
        headers = {}
        while line := self.rfile.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = self.rfile.read(int(headers.get("content-length", 0)))
        target = re.sub(r"^/v1\.[0-9]+/", "/", target)
        self.server.seen.put(Seen(method, target, headers, body))
        answer = self.server.script.get(f"{method} {target.partition('?')[0]}")
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

    def __init__(self, url: str) -> None:
        self.path = url[len("unix://") :]

    def call(self, method: str, path: str, body: Any = None, timeout: float = 60) -> tuple[int, Any]:
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

    def logs(self, name: str) -> bytes:
        """The log of a container without a terminal, stdout and stderr as they come."""
        data, text = self.call("GET", f"/containers/{name}/logs?stdout=1&stderr=1")[1], b""
        while data:
            size = struct.unpack(">xxxxL", data[:8])[0]
            text, data = text + data[8 : 8 + size], data[8 + size :]
        return text

    def run(self, *cmd: str, tty: bool = False, wait: bool = True, **config: Any) -> str:
        """Start a container of the test image and return its id; wait for its end if told to."""
        body = {
            "Image": IMAGE,
            "Cmd": list(cmd),
            "Tty": tty,
            "Labels": {"dockeragent-test": "1"},
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
    filters = '{"label":["dockeragent-test=1"]}'
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


def test_smoke(agent, name):
    r = agent.post("/api/v1/containers", {"image": IMAGE, "name": name, "cmd": ["sleep", "100"]})
    assert r.status == 201
    assert agent.get(f"/api/v1/containers/{name}").json()["State"]["Running"]
def test_fake(fake_agent, fake_engine):
    fake_engine.script["GET /containers/json"] = http_answer([])
    assert fake_agent.get("/api/v1/containers").json() == {"containers": []}
    assert_envelope(fake_agent.get("/api/v1/containers", key=""), 401)
    assert fake_engine.requests()[0].target == "/containers/json?all=0"
