"""arm64 computers of the lab: Debian's packages under qemu-user, in namespaces that end with the test.

The kernel's table of binary formats is a private one of the namespace: the machine's own is never touched. Its
/proc/cpuinfo is an ARM core's, since the runtimes choose their kernels by it, and crash on another's.
What runs in there is emulated: its numbers are right, its times mean nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import system_command
from lab import clean_environment, free_port, make_key, wait_until

SUITE = "bookworm"
PACKAGES = (
    *("base-passwd", "bash", "coreutils", "dash", "findutils", "procps", "util-linux"),
    *("libgomp1", "libstdc++6", "openssh-server", "openssh-sftp-server", "python3", "rsync"),
)
QEMU = "/usr/lib/binfmt.d/qemu-aarch64.conf"  # Debian's own line for the kernel's table
CORE = {"QEMU_CPU": "cortex-a72"}  # qemu's default core has vectors (SVE) that it emulates ten times slower
FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
USER = "pi"
PASSWD = f"""root:x:0:0:root:/root:/bin/bash
sshd:x:102:65534::/run/sshd:/usr/sbin/nologin
{USER}:x:1000:1000::/home/{USER}:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
# What a phone's shell finds: a few commands, and no Python among them.
PHONE_COMMANDS = "cat chmod df du echo env find head id kill ls mkdir mv pwd rm sh sleep stat test touch uname wc"


def root_file_system() -> Path:
    """A folder with Debian's packages for arm64, unpacked and never configured: nothing of them has run.

    It is kept from one run of the lab to the next.
    """
    command = system_command("mmdebstrap")
    key = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdpipe-lab"
    folder = kept / f"arm64-{key}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    wanted = ["--mode=root", "--arch=arm64", "--variant=extract", "--include=" + ",".join(PACKAGES)]
    subprocess.run([command, "--quiet", *wanted, SUITE, part], check=True)
    (part / "etc/passwd").write_text(PASSWD)
    (part / "etc/group").write_text(f"root:x:0:\n{USER}:x:1000:\nnogroup:x:65534:\n")
    (part / "etc/shadow").write_text("".join(f"{line.partition(':')[0]}:*:1::::::\n" for line in PASSWD.splitlines()))
    (part / "etc/nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    for name in ("root", "home", f"home/{USER}"):
        (part / name).mkdir(exist_ok=True)
    os.chown(part / f"home/{USER}", 1000, 1000)
    part.rename(folder)
    return folder


def assert_same_outputs(here: np.ndarray, there: np.ndarray, variant: str) -> None:
    """Float32 outputs [N, K] within 1e-5 of their range, of static INT8 within one step; the same class wins."""
    limit = 1e-5 * float(np.ptp(here))
    if variant == "int8":
        step = float(np.diff(np.unique(here)).min())  # its outputs are whole multiples of it
        assert step > np.ptp(here) / 256
        limit = 1.01 * step
    assert float(np.abs(here - there).max()) <= limit
    assert (here.argmax(1) == there.argmax(1)).all()


def cpu_information(cores: int) -> str:
    """What an ARM kernel says of so many Cortex-A72 cores in /proc/cpuinfo."""
    core = (
        f"processor\t: {{}}\nBogoMIPS\t: 108.00\nFeatures\t: {FEATURES}\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    )
    return "".join(core.format(at) for at in range(cores))


@contextlib.contextmanager
def inside(script: str, environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A shell ``script`` in user, mount and process namespaces of its own, where arm64 programs run.

    All that runs in there ends with the block: with the shell, the first process of its namespace, which the kernel
    ends with its parent as long as it is the same user (so the script does not replace it by another's).
    """
    if os.geteuid() != 0:
        pytest.fail("the lab's computers are namespaces: run 'make lab' as root")
    system_command("qemu-aarch64-static")
    information = log.with_name("cpuinfo")
    information.write_text(cpu_information(os.cpu_count() or 1))
    prepare = f"""
        set -e
        echo made
        read -r mapped
        mount -t proc proc /proc
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
        cat {QEMU} >/proc/sys/fs/binfmt_misc/register
        mount --bind {shlex.quote(str(information))} /proc/cpuinfo
    """
    namespaces = ["--user", "--mount", "--pid", "--propagation", "private", "--fork", "--kill-child"]
    with log.open("ab") as written:
        process = subprocess.Popen(
            [system_command("unshare"), *namespaces, "sh", "-c", f"{prepare}\n{script}\nexit $?"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=written,
            env={**clean_environment(), **CORE, **environment},
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"made\n", log.read_text()
        for name in ("uid_map", "gid_map"):  # every user is the one that it is outside: an sshd must become another
            Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536\n")
        process.stdin.write(b"mapped\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait(120)


@dataclass
class Board:
    """An arm64 computer behind its own sshd; a client with the configuration ``config`` calls it ``board``."""

    config: Path
    changed: Path  # every file that is other than in the packages, below this folder

    def changes(self) -> set[str]:
        """What was written there outside the user's .kdpipe."""
        files = {path.relative_to(self.changed).as_posix() for path in self.changed.rglob("*") if not path.is_dir()}
        return {name for name in files if not name.startswith(f"home/{USER}/.kdpipe/")}


@contextlib.contextmanager
def board() -> Iterator[Board]:
    """An arm64 computer with Python, without numpy and pip, behind an sshd on loopback."""
    root = root_file_system()
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as name:
        folder, port = Path(name), free_port()
        for made in ("changed", "work", "root"):
            (folder / made).mkdir()
        (folder / "changed").chmod(0o755)
        for key in ("host_key", "key"):
            make_key(folder / key)
        options = {
            "ListenAddress": "127.0.0.1",
            "Port": port,
            "HostKey": "/etc/ssh/host_key",
            "AuthorizedKeysFile": "/etc/ssh/authorized_keys",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "MaxStartups": 100,
            "Subsystem": "sftp internal-sftp",
            "SetEnv": " ".join(f"{key}={value}" for key, value in CORE.items()),  # sessions start without ours
        }
        (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host_key.pub').read_text()}")
        (folder / "config").write_text(
            f"Host board\nHostName 127.0.0.1\nPort {port}\nUser {USER}\nIdentityFile {folder}/key\nIdentitiesOnly yes\n"
            f"IdentityAgent none\nUserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile /dev/null\n"
        )
        script = f"""
            mount -t overlay overlay -o lowerdir={root},upperdir={folder}/changed,workdir={folder}/work {folder}/root
            cd {folder}/root
            mount --rbind /proc proc
            mount --rbind /dev dev
            mount -t tmpfs tmpfs run
            mkdir run/sshd
            chmod 1777 tmp
            cp {folder}/host_key {folder}/sshd_config etc/ssh/
            cp {folder}/key.pub etc/ssh/authorized_keys
            chroot . /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
        """
        with inside(script, {}, folder / "log"):
            connect = [system_command("ssh"), "-F", folder / "config", "-o", "BatchMode=yes", "board", "true"]
            wait_until(lambda: subprocess.run(connect, capture_output=True).returncode == 0, 300, "an sshd for arm64")
            yield Board(folder / "config", folder / "changed")


@dataclass
class Phone:
    """A folder behind an adb daemon of the lab's own, where arm64 programs run, and the client's own home."""

    folder: Path  # the phone's own storage is below, in ``storage``
    port: int
    environment: dict[str, str]  # of this client, with a key that the phone knows
    running: contextlib.ExitStack

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def storage(self) -> Path:
        return self.folder / "storage"

    def start(self) -> None:
        """Switch it on."""
        program = [
            sys.executable,
            Path(__file__).with_name("adbd.py"),
            self.port,
            self.folder / "home/.android/adbkey.pub",
        ]
        line = shlex.join(map(str, program))
        # Of its own it finds no more than a phone's shell would.
        small = f"mount -t tmpfs -o size=16m,mode=777 tmpfs {self.storage}/small"
        script = f"{small}; cd {self.storage}; env -i PATH={self.folder}/bin QEMU_CPU={CORE['QEMU_CPU']} {line}"
        process = self.running.enter_context(inside(script, {}, self.folder / "log"))
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n", (self.folder / "log").read_text()

    def stop(self) -> None:
        """Pull the battery: nothing in it runs any more, the link is gone, its storage stays."""
        self.running.close()

    def adb(self, *arguments: object) -> str:
        done = subprocess.run(
            ["adb", *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=1800
        )
        return done.stdout + done.stderr


@contextlib.contextmanager
def phone() -> Iterator[Phone]:
    """A phone that is on, with a client (and its server) of the test's own that it trusts."""
    adb = system_command("adb")
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/tmp") as name, contextlib.ExitStack() as running:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "home/.android").mkdir(parents=True)
        (folder / "storage" / "small").mkdir(parents=True)  # a disk of 16 MiB
        (folder / "storage").chmod(0o777)
        (folder / "bin").mkdir()
        for command in PHONE_COMMANDS.split():
            (folder / "bin" / command).symlink_to(system_command(command))
        properties = folder / "bin/getprop"  # of all that a phone would say, only of what it is
        properties.write_text('#!/bin/sh\ntest "$1" = ro.product.cpu.abilist64 && echo arm64-v8a\n')
        properties.chmod(0o755)
        environment = {
            **clean_environment(),
            "HOME": str(folder / "home"),
            "ANDROID_ADB_SERVER_PORT": str(free_port()),
        }
        subprocess.run(
            [adb, "keygen", folder / "home/.android/adbkey"], env=environment, capture_output=True, check=True
        )
        made = Phone(folder, free_port(), environment, running)
        made.start()
        try:
            yield made
        finally:
            made.adb("kill-server")
