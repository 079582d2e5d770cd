"""What devices with a Python have in common: they run the shipped runner, ``python -m runtime``.

A kind of device gives three things: how a shell line is run there, and how files get there and back.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import platform
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from .. import runtime
from ..core.artifact import Record
from ..core.config import DeviceSettings, MeasureSettings
from ..core.errors import DeviceLost, KdpipeError, UserError
from ..core.kinds import FreshStart, Prediction, Probe, Samples
from ..core.proc import run_group
from ..core.sealed import parse_json, printable
from ..runtime.measure import Plan

if TYPE_CHECKING:
    from .bootstrap import Kept
    from .surroundings import Watch

R = TypeVar("R", bound=Record)
RUNNER = "runtime"
OUTPUTS = "outputs.npy"
SHELL_SECONDS = 60.0  # for what only looks or makes a folder
PROBE_SECONDS = 120.0  # a slow board imports numpy for many seconds
SLOWEST_BYTES_A_SECOND = 5e6  # to hash what was pushed, and to bring it to a card
BLOCK = 4096  # of a disk, in bytes: a file takes whole ones
SPARE_BLOCKS = 256  # that a push leaves free: folders, and the little files that say what is live
OLDEST_PYTHON = (3, 9)
BEGUN = "kdpipe-begins-here"  # before it a shell may have printed what it likes
OWN_PYTHON = "python/python3"  # below the root: what starts a Python that was brought (see ``bootstrap``)
# A file of this name lies where Python would make a folder for compiled modules: so running a bundle's own runner
# writes nothing into the sealed folder, whatever the device's environment says.
NO_COMPILED_MODULES = ("__pycache__", "Nothing is written into a sealed folder.\n")


def copy_runner(folder: Path) -> None:
    """Copy the sources of ``kdpipe.runtime``, which run anywhere as ``python -m runtime``."""
    folder.mkdir()
    for source in sorted(Path(runtime.__file__).parent.glob("*.py")):
        shutil.copyfile(source, folder / source.name)
    name, text = NO_COMPILED_MODULES
    (folder / name).write_text(text)


class Received(Record):
    """Something that was pushed lies in the store, whole."""

    digest: str


class Lying(Record):
    """Which of the contents asked for lie in the store whole, what of the others arrived, and what is free."""

    have: list[str]
    part_bytes: dict[str, int]
    free_bytes: int


class RunnerDevice(ABC):
    """A device that runs the runner. ``root`` is the folder there in which everything of kdpipe lies."""

    FOLDER = ".kdpipe"  # the root, unless the settings say another; relative to where a shell starts

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self.emulated = settings.emulated
        self._places: dict[str, str] = {}
        self._work = ""

    # ---- what a kind of device gives -----------------------------------------------------------------------

    @abstractmethod
    def argv(self, command: str) -> list[str]:
        """What to run here so that ``command``, a line for a POSIX shell, runs there, in the user's home.

        Its streams are those of that line, and so is its exit code.
        """

    @abstractmethod
    def send(self, source: Path, path: str) -> None:
        """Copy a file or folder of this host to ``path`` there, whose parent exists; what a cut left is gone on with.

        Raises:
            DeviceLost: the link is gone.
            UserError: no space, or no right to write.
        """

    @abstractmethod
    def receive(self, path: str, target: Path) -> None:
        """Copy the file ``path`` there to ``target`` here. Raises as ``send`` does."""

    def lost(self, returncode: int, stderr: bytes) -> str | None:
        """Why the link is gone, if that is what a failure of ``argv`` means."""
        return None

    @cached_property
    def python(self) -> str:
        """The words of a shell line that start Python there: one that was brought, else the settings' own."""
        own = shlex.quote(f"{self.root}/{OWN_PYTHON}")
        return own if self.attempt(f"test -e {own}", SHELL_SECONDS).returncode == 0 else self.settings.python

    def own_python(self, targets: Sequence[str]) -> Kept:
        """What to bring so that there is a Python with numpy and the runtimes of ``targets``. Raises UserError."""
        from .bootstrap import interpreter_of, packages

        return packages(interpreter_of(self), targets)

    # ---- the shell -----------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Of the processes here: nothing of this Python's may reach one that runs on this machine."""
        return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}

    def attempt(self, command: str, timeout_seconds: float, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a shell line there and say how it ended.

        Raises:
            DeviceLost: the link is gone.
            KdpipeError: it did not end in time.
        """
        try:
            done = run_group(self.argv(command), timeout_seconds, stdin, self.environment())
        except subprocess.TimeoutExpired:
            raise KdpipeError(f"'{self.name}' did not answer in {timeout_seconds:.0f} s: is it overloaded?") from None
        if done.returncode != 0 and (reason := self.lost(done.returncode, done.stderr)) is not None:
            raise DeviceLost(f"'{self.name}' cannot be reached: {printable(reason, 500)}")
        return done

    def shell(self, command: str, timeout_seconds: float = SHELL_SECONDS, stdin: bytes = b"") -> str:
        """What a shell line prints there, stripped. Raises as ``attempt`` does, and UserError where it fails."""
        done = self.attempt(command, timeout_seconds, stdin)
        if done.returncode != 0:
            raise UserError(f"'{self.name}' refused: {failure(done)}")
        return done.stdout.decode(errors="replace").strip()

    # ---- the folder there, and the runner in it --------------------------------------------------------------

    @cached_property
    def root(self) -> str:
        """The folder there of everything that is kdpipe's, absolute; it is made. Raises as ``shell`` does."""
        folder = shlex.quote((self.settings.folder or self.FOLDER).removeprefix("~/"))  # a shell starts in the home
        return self.shell(f"mkdir -p {folder}/store {folder}/work && cd {folder} && pwd -P").splitlines()[-1]

    @cached_property
    def runner(self) -> str:
        """The folder there in which the runner lies; it is brought if it is not there.

        Raises:
            UserError: no Python there, too old a one, or one without numpy.
        """
        self._check_python()
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "runner"
            source.mkdir()
            copy_runner(source / RUNNER)
            return self._stored(source, None)

    def _check_python(self) -> None:
        # Any Python can say this, and whatever else is printed there by itself.
        code = "import sys; sys.stdout.write('%d %d\\n' % sys.version_info[:2]); import numpy"
        done = self.attempt(f"{self.python} -c {shlex.quote(code)}", PROBE_SECONDS)
        oldest = ".".join(map(str, OLDEST_PYTHON))
        said = [line.split() for line in done.stdout.decode(errors="replace").splitlines()]
        versions = [words for words in said if len(words) == 2 and all(word.isdecimal() for word in words)]
        if not versions:
            raise self.no_python(failure(done))
        found = versions[-1]
        if (int(found[0]), int(found[1])) < OLDEST_PYTHON:
            raise UserError(f"'{self.name}' has Python {'.'.join(found)}: wanted {oldest} or newer")
        if done.returncode != 0:
            raise UserError(
                f"'{self.name}' has no numpy: run there {self.pip_line('numpy')}, or bring what it lacks from here: "
                f"kdpipe devices prepare {self.name}"
            )

    def no_python(self, reason: str) -> UserError:
        """The mistake of naming a Python that is not there."""
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return UserError(
            f"'{self.name}' has no '{self.settings.python}' ({reason}): wanted Python {oldest} or newer; name it with "
            f"`python:` in devices.yaml"
        )

    def pip_line(self, *distributions: str) -> str:
        """What installs them there."""
        return f"`{self.python} -m pip install {' '.join(distributions)}`"

    def check_space(self, size: int, path: str, said: str = "") -> None:
        """See that ``size`` bytes fit where ``path`` is to lie, less what of them lies there; else nothing is left.

        Args:
            said: by a transfer that failed.

        Raises:
            UserError: they don't, or it failed because they didn't.
            DeviceLost: the link is gone.
        """
        folder, part = shlex.quote(path.rpartition("/")[0]), shlex.quote(path)
        printed = self.shell(f"df -Pk {folder} 2>/dev/null; echo; du -sk {part} 2>/dev/null || echo 0")
        free = re.search(r" (\d+) +\d+% ", printed)  # the last number before the share that is used
        there = int(printed.split("\n\n")[-1].split()[0])
        if said:  # sftp has no word for it, a shell has
            tried = self.attempt(f"head -c 65536 /dev/zero > {part}.try; code=$?; rm -f {part}.try; exit $code", 60)
            said += tried.stderr.decode(errors="replace")
        full = "No space left" in said or "quota exceeded" in said
        if full or (free and size > 1024 * (int(free[1]) + there)):
            self.shell(f"rm -rf {part}")
            raise self._no_space(path.rpartition("/")[0], size, 1024 * int(free[1]) if free else 0)

    def _no_space(self, folder: str, wanted_bytes: int, free_bytes: int) -> UserError:
        return UserError(
            f"no space on '{self.name}': wanted {wanted_bytes / 2**20:.1f} MiB in {folder}, "
            f"{free_bytes / 2**20:.1f} MiB are free: kdpipe devices clean {self.name} removes what nothing needs; "
            "or name another `folder:` in devices.yaml"
        )

    def store(self, source: Path) -> str:
        """Put a file or folder of this host into the store there, by content; returns its path there.

        Only what is not there yet is sent, and it counts once it was compared there.

        Raises:
            UserError: nothing at ``source``, no space, or it arrived changed.
            DeviceLost: the link is gone; the next call goes on with what arrived.
        """
        if not source.exists():
            raise UserError(f"nothing at {source}: wanted a file or folder to push")
        return self._stored(source, self.runner)

    def _stored(self, source: Path, runner: str | None) -> str:
        """``store``, by that runner, or by the one that is being sent."""
        from ..runtime.store import StoreError, digest, sizes

        try:
            found, blocks = digest(source), sum(-(-size // BLOCK) for size in sizes(source).values())
        except StoreError as error:
            raise UserError(str(error)) from None
        place = f"{self.root}/store/{found}"
        arriving, seconds = f"{place}.part", PROBE_SECONDS + blocks * BLOCK / SLOWEST_BYTES_A_SECOND
        for last in (False, True):
            if runner is None:
                if self.attempt(f"test -e {shlex.quote(place)}", SHELL_SECONDS).returncode == 0:
                    return place
            else:
                lying = self.ask(Lying, ["have", self.root, found], seconds, runner)
                if found in lying.have:
                    return place
                wanted = (blocks + SPARE_BLOCKS) * BLOCK - lying.part_bytes.get(found, 0)
                if wanted > lying.free_bytes:
                    raise self._no_space(self.root, wanted, lying.free_bytes)
            try:
                self.send(source, arriving)
                self.ask(Received, ["receive", self.root, found], seconds, runner or arriving)
            except UserError:  # not where the link was lost: the next call goes on with what arrived
                self.attempt(f"rm -rf {shlex.quote(arriving)}", SHELL_SECONDS)
                if last:
                    raise
            else:
                break
        return place

    # ---- asking the runner -----------------------------------------------------------------------------------

    def command(self, arguments: Sequence[str], runner: str | None = None) -> str:
        """The shell line of ``python -m runtime *arguments``."""
        started = f"cd {shlex.quote(runner or self.runner)} && {self.python} -m {RUNNER} {shlex.join(arguments)}"
        return f"{started}; exit $?"  # the shell stays, so that a killed runner has an exit code over every link

    def ask(self, kind: type[R], arguments: Sequence[str], timeout_seconds: float, runner: str | None = None) -> R:
        """What ``python -m runtime *arguments`` answers, in a fresh process, which ends itself in time too.

        Args:
            runner: the folder of another runner than this device's.

        Raises:
            KdpipeError: it failed, answered something else, or did not end in time.
        """
        limited = [*arguments, "--limit-seconds", f"{timeout_seconds:.3f}"]
        # A moment more, so that the device's own limit comes first and its answer says why.
        done = self.attempt(self.command(limited, runner), timeout_seconds + 5)
        if done.returncode == 128 + signal.SIGALRM:
            raise UserError(f"the runner on '{self.name}' did not end in {timeout_seconds:.0f} s: is it overloaded?")
        if done.returncode != 0:
            raise UserError(f"the runner failed on '{self.name}': {failure(done)}")
        try:
            return read_answer(kind, done.stdout)
        except ValueError as error:
            raise UserError(
                f"the runner on '{self.name}' answered '{arguments[0]}' with {error}, wanted one JSON object "
                f"of protocol version {runtime.PROTOCOL_VERSION}: is it this version of kdpipe's?"
            ) from None

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        """``python -m runtime *arguments``, left running; it hears and answers through pipes."""
        process = subprocess.Popen(
            self.argv(f"echo {BEGUN}; {self.command(arguments)}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(),
            start_new_session=True,
        )
        assert process.stdout is not None
        _skip_greeting(process.stdout.fileno(), time.monotonic() + SHELL_SECONDS)
        return process

    # ---- what a device does (see ``Device``) -----------------------------------------------------------------

    def probe(self) -> Probe:
        found = self.ask(Probe, ["probe"], PROBE_SECONDS)
        self.emulated |= found.emulated  # a device that says so is one, whatever devices.yaml says
        return found

    def runs(self, target: str) -> bool:
        return target in self._targets

    @cached_property
    def _targets(self) -> list[str]:
        return self.probe().targets

    def open(self, scratch: Path) -> None:
        self._work = f"{self.root}/work/{secrets.token_hex(8)}"
        self.shell(f"mkdir {shlex.quote(self._work)}")

    def close(self) -> None:
        self.shell(f"rm -rf {shlex.quote(self._work)}")
        self._places = {}

    def push(self, source: Path, name: str) -> None:
        self._places[name] = self.store(source)

    def drop(self, name: str) -> None:
        place = self._places.pop(name)
        if place not in self._places.values():
            self.shell(f"rm -rf {shlex.quote(place)}")

    def watching(self) -> AbstractContextManager[Watch]:
        from .surroundings import Watch

        return Watch(self, f"{self.root}/lock", f"{getpass.getuser()}@{platform.node()}")

    def place(self, name: str) -> str:
        """Where something that was pushed lies there. Raises UserError where nothing was."""
        if name not in self._places:
            raise UserError(f"nothing was pushed to '{self.name}' as '{name}'")
        return self._places[name]

    def predict(
        self,
        bundle: str,
        images: str,
        outputs: Path,
        timeout_seconds: float,
        *,
        stand_in: bool = False,
        batch: int = 64,
        threads: int = 0,
    ) -> Prediction:
        written = f"{self._work}/{OUTPUTS}"
        arguments = [
            *("predict", self.place(bundle), "--images", self.place(images), "--logits", written),
            *("--batch", str(batch), "--threads", str(threads)),
            *(["--stand-in"] if stand_in else []),
        ]
        answer = self.ask(Prediction, arguments, timeout_seconds)
        self.receive(written, outputs)
        return answer

    def measure(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, frames: str | None = None
    ) -> Samples:
        plan = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Plan)}
        plan["image_count"] = plan.pop("images")
        arguments = [
            *("measure", self.place(bundle), "--images", self.place(images), "--threads", str(settings.threads)),
            *(word for name, value in plan.items() for word in (f"--{name.replace('_', '-')}", str(value))),
            *(["--frames", self.place(frames)] if frames is not None else []),
        ]
        return self.ask(Samples, arguments, timeout_seconds)

    def start_fresh(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, examine: bool = False
    ) -> FreshStart:
        arguments = [
            *("start", self.place(bundle), "--images", self.place(images), "--threads", str(settings.threads)),
            *("--page-cache", settings.page_cache),
            *(["--examine"] if examine else []),
        ]
        return self.ask(FreshStart, arguments, timeout_seconds)


def _skip_greeting(stdout: int, until: float) -> None:
    """Read what a shell there prints by itself, to the line that says that what was asked for has ``BEGUN``."""
    said, heard = b"", select.poll()  # which takes descriptors above 1,023 too
    heard.register(stdout, select.POLLIN)
    while not said.endswith(f"{BEGUN}\n".encode()):
        if not heard.poll(1000 * max(0.0, until - time.monotonic())):
            return  # whoever asks for an answer will miss it
        byte = os.read(stdout, 1)  # and no more: the rest is the answer
        if not byte:
            return
        said += byte


def failure(done: subprocess.CompletedProcess[bytes]) -> str:
    """Why a process failed: the signal that ended it, else its last line, else its exit code."""
    # A shell says 128 and the number of a signal that ended its command.
    number = -done.returncode if done.returncode < 0 else done.returncode - 128
    if number in set(signal.Signals):  # what it printed before is not why
        return f"killed by signal {number} ({signal.strsignal(number)})"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return printable(lines[-1], 500) if lines else f"exit code {done.returncode}"


def read_answer(kind: type[R], printed: bytes) -> R:
    """What a runner said in its last line. Raises ValueError, which says what it said instead."""
    try:
        lines = printed.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8") from None
    if not lines:
        raise ValueError("nothing")
    try:
        answer = parse_json(lines[-1].encode())
    except ValueError:
        raise ValueError(f"no JSON ({lines[-1][:80]!r})") from None
    if not isinstance(answer, dict):
        raise ValueError(f"JSON that is no object ({lines[-1][:80]!r})")
    if answer.get("protocol_version") != runtime.PROTOCOL_VERSION:
        raise ValueError(f"protocol version {str(answer.get('protocol_version'))[:80]!r}")
    try:
        return kind.model_validate({name: answer[name] for name in kind.model_fields if name in answer})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"a wrong '{where}' ({fault['msg'].lower()})") from None
