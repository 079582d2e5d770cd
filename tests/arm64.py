"""An arm64 userland of the lab's own: Debian's packages under qemu-user, in a namespace that ends with the test.

The kernel's table of binary formats is a private one of that namespace, so that the machine's own is never touched. Its
/proc/cpuinfo is an ARM core's: the runtimes choose their kernels by it, and crash on an x86 one.
What runs in there is emulated: its numbers are right, its times mean nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from conftest import system_command

SUITE = "bookworm"
PACKAGES = (
    *("base-passwd", "bash", "coreutils", "dash", "findutils", "gzip", "procps", "tar", "util-linux"),
    *("libgomp1", "libstdc++6", "openssh-server", "openssh-sftp-server", "python3", "rsync"),
)
QEMU = "/usr/lib/binfmt.d/qemu-aarch64.conf"  # Debian's own line for the kernel's table
# qemu's default core has vectors (SVE) that it emulates ten times slower.
CORE = {"QEMU_CPU": "cortex-a72"}
FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
USER = "pi"
PASSWD = f"""root:x:0:0:root:/root:/bin/bash
sshd:x:102:65534::/run/sshd:/usr/sbin/nologin
{USER}:x:1000:1000::/home/{USER}:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""


def kept_folder() -> Path:
    """Where the lab keeps what it fetched, from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdpipe-lab"


def root_file_system() -> Path:
    """A folder with Debian's packages for arm64, unpacked and never configured: none of their code has run."""
    command = system_command("mmdebstrap")
    key = hashlib.sha256(" ".join((SUITE, *PACKAGES)).encode()).hexdigest()[:12]
    folder = kept_folder() / f"arm64-{key}"
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
    part.rename(folder)
    return folder


def cpu_information(cores: int) -> str:
    """What an ARM kernel says of that many Cortex-A72 cores in /proc/cpuinfo."""
    core = (
        f"processor\t: {{}}\nBogoMIPS\t: 108.00\nFeatures\t: {FEATURES}\nCPU implementer\t: 0x41\n"
        "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    )
    return "".join(core.format(at) for at in range(cores))


@contextlib.contextmanager
def inside(scratch: Path, script: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A shell ``script`` in a user and mount namespace of its own, where arm64 programs run; ended with the block.

    Args:
        scratch: a folder for the files that it is shown in place of the machine's own.
    """
    system_command("qemu-aarch64-static")
    (scratch / "cpuinfo").write_text(cpu_information(os.cpu_count() or 1))
    prepare = f"""
        set -e
        echo in
        read -r mapped
        mount -t proc proc /proc
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
        cat {QEMU} >/proc/sys/fs/binfmt_misc/register
        mount --bind {scratch}/cpuinfo /proc/cpuinfo
    """
    unshare = ["unshare", "--user", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*unshare, "sh", "-c", prepare + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **CORE, **environment},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"in\n"
        for name in ("uid_map", "gid_map"):  # every user is whom it is outside: sshd must become one
            Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536\n")
        process.stdin.write(b"mapped\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()  # and with it all that runs in there
        process.wait(20)
