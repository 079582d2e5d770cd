"""This machine as a device: the same files, the same runner, a fresh process each time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import runtime
from ..core.config import DeviceSettings
from ..core.errors import KdpipeError, UserError
from ..core.kinds import Probe
from ..runtime.probe import probe
from .runner import RunnerDevice


class LocalDevice(RunnerDevice):
    def __init__(self, settings: DeviceSettings) -> None:
        super().__init__(settings)
        self._folder = Path()

    def probe(self) -> Probe:
        return Probe.model_validate(probe())

    def runs(self, target: str) -> bool:
        return runtime.is_available(target)

    def open(self, scratch: Path) -> None:
        self._folder = scratch / "device"
        self._folder.mkdir()
        self.push_runner()

    def push(self, source: Path, name: str) -> None:
        # Nothing is copied to where it already is; the runner checks the hashes through the link.
        (self._folder / name).symlink_to(source.absolute())

    def pull(self, name: str, target: Path) -> None:
        try:
            shutil.move(self._folder / name, target)
        except FileNotFoundError:
            raise UserError(f"the runner on 'local' wrote no '{name}'") from None

    def run(self, arguments: Sequence[str], timeout_seconds: float) -> bytes:
        command = [sys.executable, "-m", "runtime", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
        try:
            done = subprocess.run(
                command, cwd=self._folder, env=environment, capture_output=True, timeout=timeout_seconds
            )
        except subprocess.TimeoutExpired:
            raise KdpipeError(
                f"the runner did not end in {timeout_seconds:.0f} s: is the machine overloaded?"
            ) from None
        if done.returncode != 0:
            raise UserError(f"the runner failed on 'local': {_reason(done.returncode, done.stderr)}")
        return done.stdout

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _reason(returncode: int, stderr: bytes) -> str:
    if returncode < 0:  # what it printed before is not why
        return f"killed by signal {-returncode} ({signal.strsignal(-returncode)})"
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {returncode}"
