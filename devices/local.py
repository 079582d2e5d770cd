"""This machine as a device: the same files, the same runner, a fresh process each time."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sys
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import runtime
from ..core.errors import UserError
from ..core.kinds import Probe
from ..core.proc import first_line
from ..runtime.probe import probe
from .runner import RUNNER, RunnerDevice


class LocalDevice(RunnerDevice):
    """Nothing is copied to where it already is: what is pushed to be measured is used where it lies."""

    def argv(self, command: str) -> list[str]:
        return ["/bin/sh", "-c", command]

    @cached_property
    def python(self) -> str:
        return self.settings.python if self._other_python else shlex.quote(sys.executable)

    @property
    def _other_python(self) -> bool:
        """Whether the settings name one; else it is the Python that runs now, which has the runtimes."""
        return bool(self.settings.python != type(self.settings).model_fields["python"].default)

    @cached_property
    def root(self) -> str:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
        folder = Path(self.settings.folder or Path(data) / "kdpipe").absolute()
        for part in ("store", "work"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        return str(folder)

    @cached_property
    def runner(self) -> str:
        self._runner = TemporaryDirectory()  # gone with this object
        folder = Path(self._runner.name)
        (folder / RUNNER).symlink_to(Path(runtime.__file__).parent)
        return str(folder)

    def probe(self) -> Probe:
        return super().probe() if self._other_python else Probe.model_validate(probe())

    def open(self, scratch: Path) -> None:
        self._work = str(scratch / "device")
        Path(self._work).mkdir()

    def close(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._places = {}

    def push(self, source: Path, name: str) -> None:
        if not source.exists():
            raise UserError(f"nothing at {source}: wanted a file or folder to push")
        self._places[name] = str(source.absolute())

    def drop(self, name: str) -> None:
        del self._places[name]

    def send(self, source: Path, path: str) -> None:
        try:
            if source.is_dir():
                shutil.copytree(source, path, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, path)
        except OSError as error:  # copytree's own has every file's in its text
            reason = os.strerror(errno.ENOSPC) if os.strerror(errno.ENOSPC) in str(error) else first_line(error)
            raise UserError(f"{source} cannot be copied to {path} ({reason})") from None

    def receive(self, path: str, target: Path) -> None:
        try:
            shutil.move(path, target)
        except FileNotFoundError:
            raise UserError(f"the runner on '{self.name}' wrote no '{Path(path).name}'") from None
