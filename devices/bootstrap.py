"""A Python of kdpipe's own on a device that lacks numpy and a runtime, and may have no internet to get them from.

What it needs is found, unpacked and kept on this host, and pushed by content. There is nothing to install: Python is
started with a folder of unpacked wheels in its path, by a script that lies below the device's root and nowhere else::

    python/store/DIGEST   the folder: ``site`` with the wheels, and for a device without a Python one of those
    python/python3        the script that starts it, written by one rename; where it is, it is used
    python/compiled/      modules as that Python compiled them: the folder itself stays as it was pushed
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.artifact import Record, write_json
from ..core.errors import UserError, choice
from ..core.proc import is_installed
from ..core.progress import note, progress
from ..core.sealed import parse_json, printable
from ..runtime import RUNTIMES
from ..runtime.sealed import canonical, sha256_file
from ..runtime.store import StoreError, digest
from .runner import OLDEST_PYTHON, OWN_PYTHON, PROBE_SECONDS, RUNNER, Received, RunnerDevice, failure

SITE = "site"
FORM = 1  # of the folders in the cache; another number makes them all anew
SLOW_SECONDS = 1800.0  # for what takes minutes on a slow link or board
# What an interpreter says of itself, for the tags of the wheels that it takes.
DESCRIBE = """
import json, os, platform, struct, sys, sysconfig
libc = ""
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except (AttributeError, OSError, ValueError):
    pass
if not libc and "musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or ""):
    libc = "musl 1.2"
print(json.dumps({"executable": sys.executable, "version": list(sys.version_info[:2]),
    "implementation": sys.implementation.name, "machine": platform.machine(), "bits": 8 * struct.calcsize("P"),
    "libc": libc}))
"""


class Interpreter(Record):
    """A Python, as far as it decides which wheels it takes; ``libc`` is such as ``glibc 2.36``."""

    executable: str
    version: tuple[int, int]
    implementation: str
    machine: str
    bits: int
    libc: str

    def platforms(self) -> list[str]:
        """The platform tags of its wheels (PEP 600 and 656), the newest first. Raises UserError: none are made."""
        name, _, number = self.libc.partition(" ")
        found = re.match(r"(\d+)\.(\d+)", number)
        if self.bits != 64 or found is None:
            raise UserError(f"no wheels are made for {self}: wanted a 64-bit Python on glibc or musl")
        major, minor = int(found[1]), int(found[2])
        if name == "musl":
            return [f"musllinux_{major}_{each}_{self.machine}" for each in range(minor, 0, -1)]
        oldest = 5 if self.machine == "x86_64" else 17  # of glibc 2, for which such wheels are made
        tags = [f"manylinux_2_{each}_{self.machine}" for each in range(minor, oldest - 1, -1)]
        old = ("manylinux2014", "manylinux2010", "manylinux1") if self.machine == "x86_64" else ("manylinux2014",)
        return [*tags, *(f"{tag}_{self.machine}" for tag in old)]

    def __str__(self) -> str:
        return (
            f"{self.implementation} {'.'.join(map(str, self.version))} ({self.bits} bit) on {self.machine} with "
            f"{self.libc or 'an unknown libc'}"
        )


class Part(Record):
    """A package that a folder was made of."""

    name: str
    size_bytes: int
    sha256: str


class Parts(Record):
    """What a folder was made of, the Python that it is for, and the line of a script that starts that.

    In the line ``$here`` is the folder; ``programs`` are the files in it that the line needs to be executable.
    """

    parts: list[Part]
    python: str
    start: str
    programs: list[str]


@dataclass(frozen=True)
class Kept:
    """A folder in the cache of this host, ready to be pushed: its digest, by which a device knows it; what is in it."""

    folder: Path
    digest: str
    parts: Parts

    @property
    def size_bytes(self) -> int:
        """Of its files, unpacked."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def cache_folder() -> Path:
    """Where this host keeps what it fetched for devices."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdpipe" / "devices"


def kept(key: object, make: Callable[[Path], Parts]) -> Kept:
    """The folder of ``key`` in the cache; ``make`` fills it where it is not there, or not as it was made."""
    name = hashlib.sha256(canonical([FORM, key])).hexdigest()[:16]
    place = cache_folder() / name
    found = _read(place)
    if found is not None:
        note(f"taken from {place}; remove that folder to have it made anew")
        return found
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{name}.") as scratch:
        part = Path(scratch) / name
        (part / "folder").mkdir(parents=True)
        parts = make(part / "folder")
        write_json(part / "made.json", {"digest": digest(part / "folder"), "parts": parts.model_dump()})
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(place)
    found = _read(place)
    if found is None:
        raise UserError(f"{place} does not stay as it was made: is something else writing there?")
    return found


def _read(place: Path) -> Kept | None:
    """What is in the cache at ``place``, if it is there and as it was made."""
    try:
        made = parse_json((place / "made.json").read_bytes())
        found = Kept(place / "folder", made["digest"], Parts.model_validate(made["parts"]))
        return found if digest(found.folder) == found.digest else None
    except (OSError, ValueError, TypeError, KeyError, StoreError):
        return None


def requirements(targets: Sequence[str]) -> list[str]:
    """The distributions that open models of ``targets``. Raises UserError for an unknown one."""
    for target in targets:
        if target not in RUNTIMES:
            raise choice("runtime", target, RUNTIMES)
    return sorted({"numpy", *(name for target in targets for name in RUNTIMES[target].needs)})


def packages(interpreter: Interpreter, targets: Sequence[str]) -> Kept:
    """A folder with the wheels of numpy and the runtimes of ``targets`` for that Python.

    Raises:
        UserError: there are no such wheels, or there is no pip here.
    """
    wanted = requirements(targets)

    def make(folder: Path) -> Parts:
        return Parts(
            parts=fetch_wheels(interpreter, wanted, folder / SITE), python=str(interpreter), start="", programs=[]
        )

    found = kept({"wanted": wanted, "interpreter": interpreter.model_dump(exclude={"executable"})}, make)
    start = f'exec {shlex.quote(interpreter.executable)} "$@"'  # wherever it lies: the wheels are the same
    return replace(found, parts=found.parts.model_copy(update={"start": start}))


def fetch_wheels(interpreter: Interpreter, wanted: Sequence[str], site: Path) -> list[Part]:
    """Unpack the wheels of ``wanted`` and all that they need into ``site``. Raises as ``packages`` does.

    pip chooses them by the tags of that interpreter; conditions on a dependency (``; python_version < ...``) it takes
    from the Python that it runs on, so what was pushed is imported on the device before it is used.
    """
    platforms = [word for tag in interpreter.platforms() for word in ("--platform", tag)]
    with tempfile.TemporaryDirectory() as scratch, progress(f"fetching {', '.join(wanted)}", None):
        command = [
            *(*_pip(), "download", "--dest", scratch, "--only-binary=:all:", "--no-input"),
            *("--disable-pip-version-check", "--progress-bar", "off", "--quiet", *platforms),
            *("--implementation", "cp", "--python-version", ".".join(map(str, interpreter.version)), *wanted),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip said nothing"]
            raise UserError(f"no wheels of {', '.join(wanted)} for {interpreter}: {printable(said[-1], 300)}")
        parts = []
        for wheel in sorted(Path(scratch).glob("*.whl")):
            unpack(wheel, site)
            parts.append(Part(name=wheel.name, size_bytes=wheel.stat().st_size, sha256=sha256_file(wheel)))
        return parts


def unpack(wheel: Path, site: Path) -> None:
    """Unpack a wheel as installing it would, without its scripts."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for data in site.glob("*.data"):
        for library in ("purelib", "platlib"):
            if (data / library).is_dir():
                shutil.copytree(data / library, site, dirs_exist_ok=True)
        shutil.rmtree(data)


def _pip() -> list[str]:
    """The words that start pip here; any will do, since it is told what to fetch for."""
    if is_installed("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip") or shutil.which("pip3")
    if found is None:
        raise UserError(f"no pip on this machine, which finds wheels for a device: {sys.executable} -m ensurepip")
    return [found]


def interpreter_of(device: RunnerDevice) -> Interpreter:
    """The Python that the device has by itself. Raises UserError: none, too old a one, no CPython."""
    done = device.attempt(f"{device.settings.python} -c {shlex.quote(DESCRIBE)}", PROBE_SECONDS)
    try:
        found = Interpreter.model_validate(parse_json(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise device.no_python(failure(done)) from None
    if found.version < OLDEST_PYTHON or found.implementation != "cpython":
        raise UserError(f"'{device.name}' has {found}: wanted CPython {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return found


def bring(device: RunnerDevice, targets: Sequence[str]) -> Kept:
    """Give the device a Python of our own that opens models of ``targets``, in place of the one brought before.

    Raises:
        UserError: no wheels for it, no space, or it does not run there; what was in use before stays in use.
        DeviceLost: the link is gone; the next call goes on with what arrived.
    """
    brought = device.own_python(targets)
    name = brought.digest
    own = f"{device.root}/{OWN_PYTHON}"
    folder, trial = str(Path(own).parent), f"{own}.new"
    compiled = f"{folder}/compiled"
    place = f"{folder}/store/{name}"
    shell = device.shell(f"mkdir -p {shlex.quote(folder)}/store && command -v sh").splitlines()[-1]
    new = [trial]
    if device.attempt(f"test -e {shlex.quote(place)}", PROBE_SECONDS).returncode != 0:
        new += [place, f"{place}.part"]
        device.shell(f"rm -rf {shlex.quote(compiled)}", SLOW_SECONDS)  # of what was there before
        with progress(f"sending {brought.size_bytes / 1e6:.0f} MB to '{device.name}'", None):
            device.send(brought.folder, f"{place}.part")
        for program in brought.parts.programs:  # not every link brings more than contents
            device.shell(f"chmod +x {shlex.quote(f'{place}.part/{program}')}")
    text = script(shell, place, compiled, brought.parts.start)
    device.shell(f"cat >{shlex.quote(trial)} && chmod +x {shlex.quote(trial)}", stdin=text.encode())
    # What was sent now starts, checks itself and opens what it is for, before anything else is asked of it.
    device.python = shlex.quote(trial)
    try:
        device.ask(Received, ["receive", folder, name], SLOW_SECONDS)
        _check_imports(device, targets)
    except UserError:
        del device.python
        device.shell(f"rm -rf {shlex.join(new)}", SLOW_SECONDS)
        raise
    others = f'for each in *; do test "$each" = {name} || rm -rf "$each"; done'
    device.shell(
        f"mv -f {shlex.quote(trial)} {shlex.quote(own)} && cd {shlex.quote(folder)}/store && {others}", SLOW_SECONDS
    )
    device.python = shlex.quote(own)
    return brought


def script(shell: str, place: str, compiled: str, start: str) -> str:
    """What starts the Python in the folder ``place`` there; before that folder is whole, as far as it was sent."""
    return f"""#!{shell}
here={shlex.quote(place)}
test -d "$here" || here="$here.part"
export PYTHONPATH="$here/{SITE}" PYTHONPYCACHEPREFIX={shlex.quote(compiled)} PYTHONNOUSERSITE=1
{start}
"""


def _check_imports(device: RunnerDevice, targets: Sequence[str]) -> None:
    """Import there what opens models of ``targets``, as the runner would. Raises UserError."""
    modules = [alternatives[0] for target in targets for alternatives in RUNTIMES[target].modules]
    code = f"import {RUNNER}, {', '.join(modules)}"
    line = f"cd {shlex.quote(device.runner)} && {device.python} -c {shlex.quote(code)}"
    done = device.attempt(line, PROBE_SECONDS)
    if done.returncode != 0:
        raise UserError(f"what was brought does not run on '{device.name}': {failure(done)}")
