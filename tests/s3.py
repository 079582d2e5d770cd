"""An object store on loopback, in a process of its own (moto's server speaks S3), and a link to it that can be cut."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import s3fs

BUCKET = "models"


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


@dataclass
class Link:
    """Carries what is said to the server and back; told to, it breaks, or is slow where a bucket is listed."""

    target: int  # port of the server
    requests: list[str] = field(default_factory=list)  # method and path of each
    left_bytes: int | None = None  # until it breaks; None: it holds
    list_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    @property
    def is_cut(self) -> bool:
        return self.left_bytes is not None and self.left_bytes <= 0

    def mend(self) -> None:
        self.left_bytes, self.requests, self.list_seconds = None, [], 0.0

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listening.accept()
                if self.is_cut:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink, source is near), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError), contextlib.closing(source), contextlib.closing(sink):
            while data := source.recv(1 << 16):
                found = re.match(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP", data) if asks else None
                if found:
                    self.requests.append(f"{found[1].decode()} {found[2].decode()}")
                    if b"list-type" in found[2]:
                        time.sleep(self.list_seconds)
                with self._lock:
                    if self.left_bytes is not None:
                        self.left_bytes -= len(data)
                if self.is_cut:
                    break
                sink.sendall(data)
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def object_store() -> Iterator[Link]:
    """A bucket ``models`` at the end of a link; this process and its children find both by their environment."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    link = Link(port)
    try:
        begun = time.monotonic()
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert server.poll() is None and time.monotonic() - begun < 300, "moto's server does not come up"
            time.sleep(0.05)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
                patch.delenv(name)
            patch.setenv("AWS_ENDPOINT_URL", link.url)
            patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t/of+somebody")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_CONFIG_FILE", os.devnull)
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
            patch.setenv("AWS_MAX_ATTEMPTS", "2")  # what is cut stays so
            patch.setenv("NO_PROXY", "127.0.0.1")
            patch.setattr(s3fs.S3FileSystem, "retries", 1)
            s3fs.S3FileSystem.clear_instance_cache()  # of clients of another server
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield link
            s3fs.S3FileSystem.clear_instance_cache()
    finally:
        link.close()
        server.kill()
        server.wait()
