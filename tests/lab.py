"""Computers of the lab: each in namespaces of its own, with a real sshd, gone with the process that holds them.

Nothing of the machine is changed: users, mounts and networks are those of the namespaces. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import system_command

USER = "pi"  # of the lab's computers: unprivileged, known in their namespace only
USER_ID = 4242
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET of sched.h
NAMESPACES = {"--mount": "mnt", "--net": "net", "--pid": "pid"}


def clean_environment() -> dict[str, str]:
    """Nothing of this machine's variables but where its commands lie."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/nonexistent"}


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.02)


class Computer:
    """Mounts, processes, users and perhaps a network of its own.

    Its ``home`` is a folder of this machine too, so that a test sees what lies there (but not what is mounted there:
    that is under ``seen(path)``).
    """

    def __init__(self, own_network: bool = False) -> None:
        if os.geteuid() != 0:
            pytest.fail("the lab's computers are namespaces: run 'make lab' as root")
        self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
        self.folder.chmod(0o755)  # users of the computer pass through
        self.home = self.folder / "home"
        self.home.mkdir()
        os.chown(self.home, USER_ID, USER_ID)
        namespaces = [option for option in NAMESPACES if option != "--net" or own_network]
        # Dies with the process that made it, and all that runs inside dies with it. The shell reaps orphans.
        self._process = subprocess.Popen(
            [
                *(system_command("setpriv"), "--pdeathsig", "KILL", system_command("unshare"), *namespaces),
                *("--propagation", "private", "--fork", "--kill-child", "--mount-proc"),
                *("sh", "-c", "echo ready; while :; do sleep 3600 & wait; done"),
            ],
            stdout=subprocess.PIPE,
            env=clean_environment(),
        )
        assert self._process.stdout is not None and self._process.stdout.readline() == b"ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.pid = int(children[0])
        self._add_user()

    def _add_user(self) -> None:
        lines = {
            "passwd": f"{USER}:x:{USER_ID}:{USER_ID}::{self.home}:/bin/bash",
            "group": f"{USER}:x:{USER_ID}:",
            "shadow": f"{USER}:*:20000:0:99999:7:::",
        }
        for name, line in lines.items():
            (self.folder / name).write_text(f"{Path('/etc', name).read_text().rstrip()}\n{line}\n")
            self.run(f"mount --bind {self.folder}/{name} /etc/{name}")
        self.run("mount -t tmpfs tmpfs /run && mkdir /run/sshd")

    def command(self, *arguments: str | Path) -> list[str]:
        """Arguments that run ``arguments`` in here, as root."""
        options = [f"{option}=/proc/{self.pid}/ns/{name}" for option, name in NAMESPACES.items()]
        return [system_command("nsenter"), *options, *map(str, arguments)]

    def run(self, line: str, check: bool = True, **options: Any) -> str:
        """What a line of shell prints in here, as root."""
        done = subprocess.run(
            self.command("sh", "-c", line), env=clean_environment(), capture_output=True, text=True, **options
        )
        assert not check or done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def seen(self, path: Path | str) -> Path:
        """Where a path of the computer is seen from outside, mounts included."""
        return Path(f"/proc/{self.pid}/root") / str(path).lstrip("/")

    def processes(self, word: str) -> list[int]:
        """Those of the user whose command line has the ``word`` (ids as seen in here)."""
        found = []
        for entry in self.seen("/proc").iterdir():
            try:
                if not entry.name.isdigit() or entry.stat().st_uid != USER_ID:
                    continue
                if word.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return found

    def script(self, name: str, *lines: str) -> str:
        """A program of those lines of shell that every user in here can run."""
        path = self.folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
        return str(path)

    def hide(self, command: str) -> None:
        """Take a command of the system away: no user in here can start it."""
        (self.folder / "nothing").touch(mode=0o600)
        path = Path(system_command(command)).resolve()
        self.run(f"mount --bind {self.folder}/nothing {shlex.quote(str(path))}")

    def bring(self, folder: Path) -> Path:
        """A folder of this machine within reach of every user in here, wherever it lies."""
        place = self.folder / f"brought{str(folder).replace('/', '-')}"
        if not place.exists():
            place.mkdir()
            self.run(f"mount --bind {shlex.quote(str(folder))} {shlex.quote(str(place))}")
        return place

    def python(self, *packages: str) -> str:
        """A Python with these ``packages`` of the test's own and no other; with none named it has all of them.

        Linked, not copied, and within reach of every user wherever the tests' own Python lies.
        """
        place = self.folder / ("python-" + ("-".join(packages) or "all"))
        if not place.exists():
            base, site = self.bring(Path(sys.base_prefix)), self.bring(packages_folder())
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            self.run(f"{shlex.quote(str(base))}/bin/{version} -m venv --without-pip {place}")
            own = place / "lib" / version / "site-packages"
            if packages:
                for name in packages:
                    for found in packages_folder().glob(f"{name}*"):
                        (own / found.name).symlink_to(site / found.name)
            else:
                (own / "all.pth").write_text(f"{site}\n")
        return str(place / "bin" / "python3")

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder)


def packages_folder() -> Path:
    """Where the packages of the tests' own Python lie."""
    import numpy

    return Path(numpy.__file__).resolve().parent.parent


@dataclass
class Sshd:
    """A real sshd in a computer, and a client's configuration (``config``) in which it is the host ``device``."""

    computer: Computer
    address: str
    port: int
    config: Path
    options: dict[str, str]  # of sshd_config, beyond the lab's
    process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return self.computer.folder / f"sshd-{self.port}"

    def start(self) -> None:
        options = {
            "ListenAddress": self.address,
            "Port": str(self.port),
            "HostKey": f"{self.folder}/host_key",
            "AuthorizedKeysFile": f"{self.folder}/authorized_keys",
            "StrictModes": "no",  # the folder lies in /tmp
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PidFile": "none",
            "PrintMotd": "no",
            "MaxStartups": "100",
            "Subsystem": "sftp internal-sftp",
            **self.options,
        }
        (self.folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        log = (self.folder / "log").open("ab")
        # By its whole path: sshd starts itself anew for every connection.
        self.process = subprocess.Popen(
            self.computer.command("/usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"),
            env=clean_environment(),
            stderr=log,
        )
        listens = f"cat /proc/net/tcp /proc/net/tcp6 | grep -q ':{self.port:04X} 0*:0000 0A'"
        wait_until(lambda: self._listens(listens), 60, f"an sshd at port {self.port}")

    def _listens(self, line: str) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()
        return subprocess.run(self.computer.command("sh", "-c", line)).returncode == 0

    def stop(self) -> None:
        """End it and all its sessions at once. No other sshd of the computer outlives it either."""
        self.computer.run("pkill -KILL -x sshd", check=False)
        if self.process is not None:
            self.process.wait()

    def change(self, old: str, new: str) -> None:
        """Change a line of the client's configuration."""
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))


def make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    subprocess.run([system_command("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def serve(
    computer: Computer, address: str = "127.0.0.1", jump: Sshd | None = None, user: str = USER, **options: str
) -> Sshd:
    """A new sshd in ``computer`` with a key of its own, known to the client of ``config``.

    Args:
        jump: another one that the client goes through.
        options: of sshd_config.
    """
    system_command("sshd")
    port = free_port()
    folder = computer.folder / f"sshd-{port}"
    folder.mkdir()
    sshd = Sshd(computer, address, port, folder / "ssh_config", options)
    for name in ("host_key", "key"):
        make_key(folder / name)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[{address}]:{port} {public}")
    lines = [
        "Host device",
        f"HostName {address}",
        f"Port {port}",
        f"User {user}",
        f"IdentityFile {folder}/key",
        "IdentitiesOnly yes",
        "IdentityAgent none",
        f"UserKnownHostsFile {folder}/known_hosts",
        "GlobalKnownHostsFile /dev/null",
    ]
    if jump is not None:
        lines.append("ProxyJump jump")
        lines += jump.config.read_text().replace("Host device", "Host jump").splitlines()
    sshd.config.write_text("\n".join(lines) + "\n")
    sshd.start()
    return sshd


class Link:
    """A cable between two computers with networks of their own, which loses, slows and breaks when told."""

    NEAR, FAR = "10.77.0.1", "10.77.0.2"

    def __init__(self, near: Computer, far: Computer) -> None:
        self.near, self.far = near, far
        for tool in ("ethtool", "nft", "tc"):
            system_command(tool)
        ip = system_command("ip")
        arguments = f"link add name near netns {near.pid} type veth peer name far netns {far.pid}"
        subprocess.run([ip, *arguments.split()], check=True)
        for computer, name, address in ((near, "near", self.NEAR), (far, "far", self.FAR)):
            # What the kernel would send as one large piece is cut into packets, so that packets can be lost.
            computer.run(
                f"ip addr add {address}/24 dev {name} && ip link set {name} up && ip link set lo up "
                f"&& ethtool -K {name} tso off gso off gro off >/dev/null 2>&1"
            )

    def lose(self, percent: int) -> None:
        """Drop so many of a hundred packets that come in at either end; 100 is a black hole."""
        drawn = "" if percent == 100 else f"numgen random mod 100 < {percent} "
        rules = (
            "table inet flaky {\n chain in {\n type filter hook prerouting priority -300; policy accept;\n"
            f" iifname != lo {drawn}counter drop\n }}\n}}\n"
        )
        for computer in (self.near, self.far):
            computer.run("nft delete table inet flaky 2>/dev/null; nft -f -", input=rules)

    def dropped(self) -> int:
        """Packets that were lost since ``lose``."""
        words = self.far.run("nft list table inet flaky").split()
        return int(words[words.index("packets") + 1])

    def limit(self, megabits: float) -> None:
        """The rate towards the far end."""
        self.near.run(f"tc qdisc replace dev near root tbf rate {megabits}mbit burst 32kbit latency 50ms")

    def pull(self) -> None:
        """Pull the plug: the kernel at either end knows that no carrier is there."""
        self.far.run("ip link set far down")

    def plug(self) -> None:
        self.far.run("ip link set far up && ip neigh flush dev far")
        self.near.run("ip neigh flush dev near")  # who did not answer is asked again at once

    def received(self) -> int:
        """Bytes that arrived at the far end so far, headers of the packets included."""
        return int(self._counters()[0])

    def sent(self) -> int:
        """Bytes that left the far end so far, headers of the packets included."""
        return int(self._counters()[8])

    def _counters(self) -> list[str]:
        lines = self.far.run("cat /proc/net/dev").splitlines()
        return next(line.partition(":")[2].split() for line in lines if line.strip().startswith("far:"))


@contextmanager
def network_of(computer: Computer) -> Iterator[None]:
    """This thread, and what it starts, uses the network of ``computer`` for the length of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before, Path(f"/proc/{computer.pid}/ns/net").open() as there:
        assert libc.setns(there.fileno(), NETWORK_NAMESPACE) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), NETWORK_NAMESPACE) == 0
