"""A whole Python for an arm64 device that has none, such as a phone: Debian's loader, libc and Python, and wheels.

The device needs nothing but a kernel: Python is started through the loader that lies beside it, so neither a C library
nor a root file system of Debian's has to be there. Shown on an emulated arm64 userland; never tried on a phone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from ..core.progress import note, progress
from ..core.sealed import printable
from ..runtime.sealed import sha256_file
from .bootstrap import SITE, Interpreter, Kept, Part, Parts, fetch_wheels, kept, requirements

MACHINE = "aarch64"
LIBRARIES = "aarch64-linux-gnu"  # what Debian calls their folder
LOADER = "lib/ld-linux-aarch64.so.1"
# With these comes all that they need, as Debian's packages say; the wheels need the last two.
PACKAGES = ("python3", "libstdc++6", "libgomp1")
# Of Python's own library: what no runner imports.
LEFT_OUT = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "venv"}


def folder(targets: Sequence[str]) -> Kept:
    """The folder for arm64 with Python, numpy and the runtimes of ``targets``, made the first time.

    Raises:
        UserError: this host has no apt, or it finds no packages for arm64; there are no such wheels.
    """
    wanted = requirements(targets)
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"no '{tool}' on this machine: a folder for phones is made of Debian's packages, make it on Debian"
            )
    found = kept({"phone": PACKAGES, "wanted": wanted}, lambda place: _make(wanted, place))
    note("what a phone is brought was shown on an emulated arm64 userland, never on a phone")
    return found


def _make(wanted: Sequence[str], place: Path) -> Parts:
    with tempfile.TemporaryDirectory() as scratch:
        debs = _fetch(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        for deb in debs:
            subprocess.run(["dpkg-deb", "--extract", deb, unpacked], check=True)
        version = _copy_python(unpacked, place)
        libc = next(deb.name.split("_")[1] for deb in debs if deb.name.startswith("libc6_"))
        parts = [Part(name=deb.name, size_bytes=deb.stat().st_size, sha256=sha256_file(deb)) for deb in debs]
    interpreter = Interpreter(
        executable="", version=version, implementation="cpython", machine=MACHINE, bits=64, libc=f"glibc {libc}"
    )
    parts += fetch_wheels(interpreter, wanted, place / SITE)
    python = f"python{version[0]}.{version[1]}"
    loader = f'"$here/{LOADER}" --argv0 "$0" --library-path "$here/lib" "$here/bin/{python}"'
    # The name that Python gets is the script's: so whatever it starts anew is started through the loader, too.
    start = f'PYTHONHOME="$here" exec {loader} "$@"'
    return Parts(parts=parts, python=str(interpreter), start=start, programs=[LOADER])


def _fetch(scratch: Path) -> list[Path]:
    """Download the packages and all that they need, for arm64, without a trace in this host's own apt."""
    state, cache = scratch / "state", scratch / "cache"
    for made in (state / "lists/partial", cache / "archives/partial"):
        made.mkdir(parents=True)
    settings = {
        "Dir::State": state,
        "Dir::State::status": os.devnull,
        "Dir::Cache": cache,
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-q", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    install = ["install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES]
    with progress("fetching Debian's packages for arm64", None):
        for command in (["update"], install):
            done = subprocess.run([*apt, *command], capture_output=True, text=True, errors="replace")
            if done.returncode != 0:
                said = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["it said nothing"]
                raise UserError(f"apt-get finds no {', '.join(PACKAGES)} for arm64: {printable(said[0], 300)}")
    return sorted((cache / "archives").glob("*.deb"))


def _copy_python(unpacked: Path, place: Path) -> tuple[int, int]:
    """Put loader, libraries, Python and its own library where the script looks for them; returns its version."""
    found = [re.fullmatch(r"python(\d+)\.(\d+)", path.name) for path in (unpacked / "usr/bin").glob("python*")]
    version = next((int(match[1]), int(match[2])) for match in found if match)
    name = "python{}.{}".format(*version)
    for made in ("bin", "lib"):
        (place / made).mkdir()
    shutil.copyfile(unpacked / "usr/bin" / name, place / "bin" / name)
    shutil.copytree(unpacked / "usr/lib" / name, place / "lib" / name, ignore=_left_out)
    # Older Debians have the C library in /lib, newer ones all in /usr/lib.
    for folder in (unpacked / "lib" / LIBRARIES, unpacked / "usr/lib" / LIBRARIES):
        behind = {str(library.readlink()) for library in folder.glob("*.so*") if library.is_symlink()}
        for library in folder.glob("*.so*"):
            # Under the names by which libraries ask for each other; links themselves are not pushed.
            if library.is_file() and not _leads_away(library) and (library.is_symlink() or library.name not in behind):
                shutil.copyfile(library, place / "lib" / library.name)
    return version


def _left_out(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in LEFT_OUT or _leads_away(Path(folder, name))}


def _leads_away(path: Path) -> bool:
    """Whether it is a link to where it would lie once installed: here that may be this host's own file."""
    return path.is_symlink() and path.readlink().is_absolute()
