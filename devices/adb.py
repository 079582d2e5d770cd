"""A phone, or anything else behind Android's debug bridge, by the user's own ``adb`` and the keys that it has.

Its shell has no Python, so one is brought (see ``phone``). Exercised with Google's client against a daemon of the lab's
own and an emulated arm64 userland, never on a phone.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DeviceLost, UserError
from ..core.kinds import Probe
from ..core.progress import note
from ..core.sealed import printable
from .runner import RunnerDevice

if TYPE_CHECKING:
    from .bootstrap import Kept

ADDRESS = re.compile(r"\S+:\d+")  # of a device in the network; everything else is a serial
# At the end of every answer: adb's own exit code is 0 where the device went away in the middle.
ENDED = b"kdpipe ended with "
CONNECT_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 200_000  # below it a transfer is taken for a hanging one
ARM64 = "arm64-v8a"  # what Android calls the instructions that the folder is made of
CURES = {
    "unauthorized": "confirm this machine's key on its screen",
    "authenticate": "confirm this machine's key on its screen",
    "authorizing": "confirm this machine's key on its screen",
    "more than one": "give the serial of one as its address (adb devices -l lists them)",
    "no devices": "plug it in and allow USB debugging, or give host:port as its address",
    "not found": "plug it in and allow USB debugging; adb devices -l lists what is there",
    "offline": "unplug it and plug it in again",
}
# Android's own names of what its services tell by numbers.
BATTERY_STATUS = {"1": "unknown", "2": "charging", "3": "discharging", "4": "not charging", "5": "full"}
THERMAL_STATUS = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
UNAVAILABLE = "unavailable"


class AdbDevice(RunnerDevice):
    """Reached by ``adb``: a serial, ``host:port``, or nothing where only one device is there."""

    FOLDER = "/data/local/tmp/kdpipe"  # the one place where the shell's user may write and start programs

    _connected = False

    # ---- the link ----

    def argv(self, command: str) -> list[str]:
        self._connect()
        return [*self._adb, "shell", command]

    def attempt(self, command: str, timeout_seconds: float, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        marked = f"({command}\n); code=$?; echo '{ENDED.decode()}'$code >&2; exit $code"
        done = super().attempt(marked, timeout_seconds, stdin)
        said, ended, _ = done.stderr.rpartition(ENDED)
        if not ended:
            raise self._lost(b"it went away in the middle of a command")
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout, said)

    def lost(self, returncode: int, stderr: bytes) -> str | None:
        if ENDED in stderr:
            return None
        state = self._run(CONNECT_SECONDS, *self._adb, "get-state")
        if state.stdout.strip() == b"device":
            return None
        self._connected = False
        return _with_cure(state.stderr or stderr)

    def send(self, source: Path, path: str) -> None:
        size = source.stat().st_size
        if source.is_dir():  # into a folder that is there its contents are put, and nothing of them twice
            self.shell(f"mkdir -p {shlex.quote(path)}")
            size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
        self.check_space(size, path)
        try:
            self._transfer(size, "push", "--sync", f"{source}/." if source.is_dir() else str(source), path)
        except UserError as error:
            self.check_space(size, path, said=str(error))
            raise

    def receive(self, path: str, target: Path) -> None:
        size = int(self.shell(f"wc -c <{shlex.quote(path)}"))
        try:
            self._transfer(size, "pull", path, str(target))
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    @property
    def _adb(self) -> list[str]:
        return ["adb", *(["-s", self.settings.address] if self.settings.address else [])]

    def _connect(self) -> None:
        """Tell adb of a device in the network; what is plugged in it finds by itself."""
        if shutil.which("adb") is None:
            raise UserError(
                "no 'adb' on this machine, which devices of kind adb need: apt-get install adb, or Android's "
                "platform-tools"
            )
        if self._connected or not self.settings.address or not ADDRESS.fullmatch(self.settings.address):
            return
        # A device that was away is connected by name, though its link is dead: that has to be given up first.
        for first in ((), ("adb", "disconnect", self.settings.address)):
            if first:
                self._run(CONNECT_SECONDS, *first)
            said = self._run(CONNECT_SECONDS, "adb", "connect", self.settings.address).stdout
            state = self._run(CONNECT_SECONDS, *self._adb, "get-state")
            self._connected = state.stdout.strip() == b"device"
            if self._connected:
                return
        raise self._lost(state.stderr if said.startswith((b"connected to", b"already connected to")) else said)

    def _transfer(self, size_bytes: int, *arguments: str) -> None:
        self._connect()
        done = self._run(CONNECT_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND, *self._adb, *arguments)
        if done.returncode != 0:
            told = [line for line in (done.stderr + done.stdout).splitlines() if b"error" in line]
            reason = told[-1] if told else done.stderr
            if b": remote " in reason or b"does not exist" in reason or b"cannot stat" in reason:
                raise UserError(f"'{self.name}' refused: {_line(reason)}")
            raise self._lost(reason)

    def _run(self, timeout_seconds: float, *command: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_seconds, env=self.environment()
            )
        except subprocess.TimeoutExpired:
            raise self._lost(f"adb did not end in {timeout_seconds:.0f} s".encode()) from None

    def _lost(self, said: bytes) -> DeviceLost:
        self._connected = False
        return DeviceLost(f"'{self.name}' cannot be reached: {_with_cure(said)}")

    # ---- what is brought ----

    def own_python(self, targets: Sequence[str]) -> Kept:
        from . import phone

        kinds = self.shell("getprop ro.product.cpu.abilist64 2>/dev/null || uname -m")
        if ARM64 not in kinds and phone.MACHINE not in kinds:
            raise UserError(f"'{self.name}' runs {printable(kinds, 80)}: wanted a 64-bit ARM one ({ARM64})")
        return phone.folder(targets)

    def no_python(self, reason: str) -> UserError:
        return UserError(
            f"'{self.name}' has no Python ({reason}): bring one, kdpipe devices prepare {self.name}; or name its own "
            "with `python:` in devices.yaml"
        )

    # ---- what it is ----

    def probe(self) -> Probe:
        return Probe.model_validate(super().probe().model_dump() | self._services())

    def open(self, scratch: Path) -> None:
        super().open(scratch)
        found = self._services()
        if found["screen"] == "off":
            note(f"the screen of '{self.name}' is off, which slows what runs there: wake it and keep it on")
        if found["thermal_status"] not in (UNAVAILABLE, THERMAL_STATUS[0]):
            note(f"'{self.name}' holds itself back ({found['thermal_status']} by its thermal service): let it cool")

    def _services(self) -> dict[str, Any]:
        """What Android's services say of screen, heat and battery, as far as there are such."""
        told = {name: self._dumpsys(name) for name in ("power", "thermalservice", "battery")}
        return services(told["power"], told["thermalservice"], told["battery"])

    def _dumpsys(self, service: str) -> str:
        done = self.attempt(f"dumpsys {service}", CONNECT_SECONDS)
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def services(power: str, thermal: str, battery: str) -> dict[str, Any]:
    """The fields of a ``Probe`` in what ``dumpsys`` prints of three services; what it does not say is unavailable."""
    wakefulness = re.search(r"^\s*mWakefulness=(\w+)", power, re.MULTILINE)
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    found: dict[str, Any] = {"screen": UNAVAILABLE, "thermal_status": UNAVAILABLE}
    if wakefulness:
        found["screen"] = "on" if wakefulness[1] == "Awake" else "off"
    if status and int(status[1]) < len(THERMAL_STATUS):
        found["thermal_status"] = THERMAL_STATUS[int(status[1])]
    current = thermal.partition("Current temperatures from HAL")[2].partition("Current cooling")[0]
    heat = re.findall(r"Temperature\{mValue=(-?[\d.]+), mType=-?\d+, mName=([^,}]+)", current)
    read = {name: round(1000 * float(value)) for value, name in heat if float(value)}  # 0: no such sensor
    if read:
        found["temperatures_millicelsius"] = read
    values = dict(re.findall(r"^\s*(level|status|temperature): (-?\d+)\s*$", battery, re.MULTILINE))
    if values:
        found["battery"] = {
            "percent": int(values["level"]) if "level" in values else UNAVAILABLE,
            "status": BATTERY_STATUS.get(values.get("status", ""), UNAVAILABLE),
            "celsius": int(values["temperature"]) / 10 if "temperature" in values else UNAVAILABLE,
        }
    return found


def _with_cure(said: bytes) -> str:
    """What adb said of a link that is not there, and what may help."""
    text = _line(said)
    cure = next((cure for word, cure in CURES.items() if word in text), None)
    return f"{text}; {cure}" if cure else text


def _line(said: bytes) -> str:
    """The line of what adb said that tells most: its first one with an error."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error" in line or "failed" in line] or lines or ["adb said nothing"]
    return printable(told[0].removeprefix("adb: ").removeprefix("error: "), 300)
