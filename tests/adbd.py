"""A small daemon that Google's adb client talks to, for the lab: pushes, pulls and runs shell lines as Android's does.

Written from the protocol's public description: messages of 24 bytes and a payload, streams with one write under way at
a time, the shell's second protocol (standard error apart, exit codes) and the first one of file transfer. It is no
Android: there is no bionic and no service behind it, only a folder and a shell.

    python adbd.py PORT KEY.pub    (as root: it becomes the shell's user)
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import struct
import sys
from pathlib import Path

VERSION, LARGEST = 0x01000000, 256 * 1024
TOKEN, SIGNATURE, PUBLIC_KEY = 1, 2, 3  # kinds of AUTH
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)  # kinds of packets of a shell
SHELL_USER = 2000
# What stands before a SHA-1 in a signature (PKCS #1 v1.5).
SHA1 = bytes.fromhex("3021300906052b0e03021a05000414")


def read_public_key(path: Path) -> tuple[int, int]:
    """Modulus and exponent of a key as adb writes it: words, a constant, 256 bytes of modulus, 256 more, exponent."""
    data = base64.b64decode(path.read_text().split()[0])
    return int.from_bytes(data[8:264], "little"), struct.unpack("<I", data[520:524])[0]


def is_signed(token: bytes, signature: bytes, key: tuple[int, int]) -> bool:
    modulus, exponent = key
    digest = SHA1 + token  # the token is taken for the hash
    padded = b"\0\1" + b"\xff" * (253 - len(digest)) + b"\0" + digest
    return pow(int.from_bytes(signature, "big"), exponent, modulus).to_bytes(256, "big") == padded


class Stream:
    """One of the streams of a connection: bytes from the host, writes to it that wait for the one before."""

    def __init__(self, connection: Connection, mine: int, theirs: int) -> None:
        self.connection, self.mine, self.theirs = connection, mine, theirs
        self.incoming = asyncio.StreamReader(limit=2**26)
        self.ready = asyncio.Semaphore(1)
        self.closed = False

    async def write(self, data: bytes) -> None:
        for at in range(0, len(data), LARGEST):
            await self.ready.acquire()
            self.connection.send(b"WRTE", self.mine, self.theirs, data[at : at + LARGEST])

    async def close(self) -> None:
        if not self.closed:
            await self.ready.acquire()  # the last write has arrived
            self.closed = True
            self.connection.send(b"CLSE", self.mine, self.theirs)


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: tuple[int, int]) -> None:
        self.reader, self.writer, self.key = reader, writer, key
        self.streams: dict[int, Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        head = struct.pack("<6I", number, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        self.writer.write(head + data)

    async def serve(self) -> None:
        token = os.urandom(20)
        trusted = False
        while True:
            command, first, second, size, _, _ = struct.unpack("<6I", await self.reader.readexactly(24))
            name, data = command.to_bytes(4, "little"), await self.reader.readexactly(size)
            if name == b"CNXN":
                self.send(b"AUTH", TOKEN, 0, token)
            elif name == b"AUTH" and first == SIGNATURE:
                trusted = is_signed(token, data, self.key)
                if trusted:
                    self.send(b"CNXN", VERSION, LARGEST, b"device::ro.product.model=lab;features=cmd,shell_v2")
                else:
                    token = os.urandom(20)
                    self.send(b"AUTH", TOKEN, 0, token)
            elif not trusted:
                continue  # a key that nobody has confirmed on the screen
            elif name == b"OPEN":
                self._open(first, data.rstrip(b"\0").decode())
            elif (stream := self.streams.get(second)) is not None:
                if name == b"OKAY":
                    stream.ready.release()
                elif name == b"WRTE":
                    stream.incoming.feed_data(data)
                    self.send(b"OKAY", stream.mine, stream.theirs)
                elif name == b"CLSE":
                    stream.incoming.feed_eof()
                    del self.streams[second]
                    if not stream.closed:
                        stream.closed = True
                        self.send(b"CLSE", stream.mine, stream.theirs)

    def _open(self, theirs: int, service: str) -> None:
        mine = theirs  # as good a number as any
        stream = self.streams[mine] = Stream(self, mine, theirs)
        kind, _, line = service.partition(":")
        self.send(b"OKAY", mine, theirs)
        if kind == "sync":
            work = transfer(stream)
        elif kind.split(",")[:2] == ["shell", "v2"]:
            work = shell(stream, line)
        else:
            self.send(b"CLSE", 0, theirs)
            return
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


async def shell(stream: Stream, line: str) -> None:
    """Run a shell line: packets of a kind, a length and bytes, both ways."""
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", line), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None

    async def forward(kind: int, source: asyncio.StreamReader) -> None:
        while data := await source.read(LARGEST - 5):
            await stream.write(struct.pack("<BI", kind, len(data)) + data)

    async def feed(target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, size = struct.unpack("<BI", await stream.incoming.readexactly(5))
                data = await stream.incoming.readexactly(size)
                if kind == STDIN:
                    target.write(data)
                    await target.drain()
                elif kind == CLOSE_STDIN:
                    target.close()
        target.close()

    feeding = asyncio.create_task(feed(process.stdin))
    await asyncio.gather(forward(STDOUT, process.stdout), forward(STDERR, process.stderr))
    code = await process.wait()
    await stream.write(struct.pack("<BIB", EXIT, 1, code if code >= 0 else 128 - code))
    await stream.close()
    feeding.cancel()


async def transfer(stream: Stream) -> None:
    """Push, pull, list and stat files until the host is done."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            kind, size = struct.unpack("<4sI", await stream.incoming.readexactly(8))
            if kind == b"QUIT":
                break
            name = (await stream.incoming.readexactly(size)).decode()
            try:
                await TRANSFERS[kind](stream, name)
            except OSError as error:
                text = f"{error.strerror}: {error.filename}".encode()
                await stream.write(struct.pack("<4sI", b"FAIL", len(text)) + text)
                if kind == b"SEND":
                    break  # what is still under way of the file is not for us
    await stream.close()


def status(path: Path) -> tuple[int, int, int]:
    with contextlib.suppress(OSError):
        found = path.lstat()
        return found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)
    return 0, 0, 0


async def send_status(stream: Stream, name: str) -> None:
    await stream.write(struct.pack("<4s3I", b"STAT", *status(Path(name))))


async def send_listing(stream: Stream, name: str) -> None:
    if Path(name).is_dir():
        for path in [Path(name, "."), Path(name, ".."), *Path(name).iterdir()]:
            entry = os.fsencode(path.name or ".")
            await stream.write(struct.pack("<4s4I", b"DENT", *status(path), len(entry)) + entry)
    await stream.write(struct.pack("<4s4I", b"DONE", 0, 0, 0, 0))


async def take_file(stream: Stream, name: str) -> None:
    name, _, mode = name.rpartition(",")
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while True:
            kind, size = struct.unpack("<4sI", await stream.incoming.readexactly(8))
            if kind == b"DONE":
                break
            file.write(await stream.incoming.readexactly(size))
    path.chmod(int(mode) & 0o777)
    os.utime(path, (size, size))
    await stream.write(struct.pack("<4sI", b"OKAY", 0))


async def send_file(stream: Stream, name: str) -> None:
    with Path(name).open("rb") as file:
        while data := file.read(64 * 1024):
            await stream.write(struct.pack("<4sI", b"DATA", len(data)) + data)
    await stream.write(struct.pack("<4sI", b"DONE", 0))


TRANSFERS = {b"STAT": send_status, b"LIST": send_listing, b"SEND": take_file, b"RECV": send_file}


async def main(port: int, key: tuple[int, int]) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await Connection(reader, writer, key).serve()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=2**26)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    trusted_key = read_public_key(Path(sys.argv[2]))
    os.setgid(SHELL_USER)
    os.setuid(SHELL_USER)
    asyncio.run(main(int(sys.argv[1]), trusted_key))
