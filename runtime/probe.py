"""What a machine is, read from its kernel; whatever can't be read is "unavailable", never 0.

Every reader of the kernel's files takes the folder that stands for ``/``. Jetson, Raspberry Pi, big and little cores,
batteries and version 1 of control groups were never read on hardware by this project's tests, only from such folders.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from . import RUNTIMES, is_available

UNAVAILABLE = "unavailable"
ROOT = Path("/")
CPUS = "sys/devices/system/cpu"
TOOL_SECONDS = 10  # in which a tool of the system answers

# CPU flags that decide how fast small precisions run, by architecture.
FLAGS = {
    "x86_64": ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "fphp", "sve"),
}


def read(path: str | Path) -> str:
    """The text of a file of the kernel, or that it is unavailable."""
    try:
        return Path(path).read_text(errors="replace").strip("\0\n ") or UNAVAILABLE
    except OSError:
        return UNAVAILABLE


def read_int(path: Path) -> int | None:
    """The number in a file of the kernel, decimal or as 0x..., or None."""
    try:
        return int(read(path), 0)
    except ValueError:
        return None


def listed(text: str) -> list[int]:
    """CPU numbers as the kernel lists them: "0-3,8" is [0, 1, 2, 3, 8]. Raises ValueError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def runtime_versions() -> dict[str, str]:
    """Versions of the distributions that open models here, without importing them."""
    versions = {}
    for name in sorted({name for runtime in RUNTIMES.values() for name in runtime.needs}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ---- cores -------------------------------------------------------------------------------------------------


def siblings(cpu: int, root: Path = ROOT) -> list[int]:
    """The CPUs that share a core with ``cpu``, itself among them."""
    with contextlib.suppress(ValueError):
        return listed(read(root / CPUS / f"cpu{cpu}/topology/thread_siblings_list"))
    return [cpu]


def speed(cpu: int, root: Path = ROOT) -> int:
    """How fast a CPU is beside the others: the kernel's capacity (of 1024), else its highest clock; 0 if neither."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        found = read_int(root / CPUS / f"cpu{cpu}" / name)
        if found is not None:
            return found
    return 0


def classes(cpus: list[int], root: Path = ROOT) -> list[list[int]]:
    """``cpus`` by how fast they are, fastest first; one class where they do not differ by a tenth.

    Cores of one kind have clocks that differ a little from each other, of two kinds they differ by much more.
    """
    found: list[list[int]] = []
    least = 0.0
    for cpu in sorted(cpus, key=lambda cpu: (-speed(cpu, root), cpu)):
        if not found or speed(cpu, root) < 0.9 * least:
            found.append([])
            least = speed(cpu, root)
        found[-1].append(cpu)
    return found


def quota_cores(root: Path = ROOT) -> float | None:
    """How many cores' time the control group of this process may take; None without a limit.

    Reads version 2 (``cpu.max``) and version 1 (``cpu.cfs_quota_us``), in every group from this process's to the root.
    """
    limits = []
    names: tuple[str, ...]
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("cpu.max",)
        elif "cpu" in controllers.split(","):
            base, names = root / "sys/fs/cgroup" / controllers, ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            base = base if base.is_dir() else root / "sys/fs/cgroup/cpu"
        else:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            words = " ".join(read(base.joinpath(*parts[:depth], name)) for name in names).split()
            with contextlib.suppress(ValueError, ZeroDivisionError):
                share = int(words[0]) / int(words[1])
                if share > 0:  # version 1 says -1 for no limit
                    limits.append(share)
    return min(limits) if limits else None


def place(threads: int, usable: list[int], root: Path = ROOT) -> tuple[int, list[int], list[int], list[int]]:
    """Which CPUs a process of so many threads is kept to.

    One CPU a core, fastest class first; the highest numbers among equals, since interrupts go to the low ones. More
    threads than that take slower cores, then siblings. With 0 there are as many threads as fast cores, and no more than
    the control group's quota.

    Args:
        usable: CPUs that this process may use.

    Returns:
        Threads, CPUs, and of those left out: siblings of CPUs that were taken, and slower ones.
    """
    first = [cpu for cpu in usable if cpu == min(set(siblings(cpu, root)) & set(usable), default=cpu)]
    by_class = classes(first, root)
    if threads <= 0:
        quota = quota_cores(root)
        threads = len(by_class[0]) if quota is None else max(1, min(len(by_class[0]), int(quota + 0.5)))
    ordered = [cpu for each in by_class for cpu in sorted(each, reverse=True)]
    ordered += sorted(set(usable) - set(first), reverse=True)
    taken = sorted(ordered[:threads])
    beside = {other for cpu in taken for other in siblings(cpu, root)} - set(taken)
    fastest = set(by_class[0])
    slower = [cpu for cpu in first if cpu not in taken and cpu not in fastest]
    return threads, taken, sorted(beside & set(usable)), slower


# ---- clocks, heat, power -----------------------------------------------------------------------------------


def clocks_khz(root: Path = ROOT) -> dict[str, int] | str:
    """The clock of every CPU now, by its name."""
    found = {}
    for path in _sorted(root / CPUS, "cpu[0-9]*"):
        khz = read_int(path / "cpufreq/scaling_cur_freq")
        if khz is not None:
            found[path.name] = khz
    return found or UNAVAILABLE


def temperatures(root: Path = ROOT) -> dict[str, int] | str:
    """Thousandths of a degree Celsius by thermal zone, or by sensor of the hardware monitors where there is no zone."""
    found = {}
    for path in _sorted(root / "sys/class/thermal", "thermal_zone*"):
        heat = read_int(path / "temp")
        if heat is not None:
            found[f"{path.name} {read(path / 'type')}"] = heat
    if not found:
        for path in _sorted(root / "sys/class/hwmon", "hwmon*/temp*_input"):
            heat = read_int(path)
            if heat is not None:
                found[f"{path.parent.name} {read(path.parent / 'name')} {path.name}"] = heat
    return found or UNAVAILABLE


def throttle_events(root: Path = ROOT) -> int | str:
    """How often the CPUs of an x86 machine have throttled themselves for heat, since it started."""
    counts = [read_int(path) for path in _sorted(root / CPUS, "cpu[0-9]*/thermal_throttle/*_throttle_count")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else UNAVAILABLE


def throttle_bits(root: Path = ROOT) -> int | str:
    """A Raspberry Pi's ``get_throttled``: bits 0 to 3 are of now, 16 to 19 of since it started."""
    for path in _sorted(root / "sys/devices/platform", "soc*/*firmware/get_throttled"):
        with contextlib.suppress(ValueError):
            return int(read(path), 16)
    return throttle_bits_in(answer("vcgencmd", "get_throttled")) if root == ROOT else UNAVAILABLE


def throttle_bits_in(told: str) -> int | str:
    """The bits in what ``vcgencmd get_throttled`` prints: "throttled=0x50005"."""
    found = re.search(r"throttled=(0x[0-9a-fA-F]+)", told)
    return int(found[1], 16) if found else UNAVAILABLE


def energy_uj(root: Path = ROOT) -> dict[str, int] | str:
    """Microjoules that the packages of the CPU have taken (RAPL), by domain; they start again at some point."""
    found = {}
    for path in _sorted(root / "sys/class/powercap", "*-rapl:[0-9]*"):
        energy = read_int(path / "energy_uj")
        if energy is not None and path.name.count(":") == 1:  # a second one is a part of the first
            found[f"{path.name} {read(path / 'name')}"] = energy
    return found or UNAVAILABLE


def power_mw(root: Path = ROOT) -> dict[str, int] | str:
    """Milliwatts by rail of a Jetson's INA3221 meters: voltage times current of each labelled channel."""
    found = {}
    for path in _sorted(root / "sys/class/hwmon", "hwmon*"):
        if read(path / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            millivolt, milliampere = (read_int(path / f"{kind}{channel}_input") for kind in ("in", "curr"))
            if millivolt is not None and milliampere is not None:
                label = read(path / f"in{channel}_label")
                found[f"{path.name} {label}"] = round(millivolt * milliampere / 1000)
    return found or UNAVAILABLE


def _sorted(folder: Path, pattern: str) -> list[Path]:
    def key(path: Path) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]

    return sorted(folder.glob(pattern), key=key) if folder.is_dir() else []


# ---- what needs a tool of the system -----------------------------------------------------------------------


def answer(*command: str) -> str:
    """What a tool of the system prints, or that it is unavailable: not there, failed, or silent for ten seconds."""
    if shutil.which(command[0]) is None:
        return UNAVAILABLE
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNAVAILABLE
    return done.stdout.decode(errors="replace").strip() or UNAVAILABLE


def gpus(root: Path = ROOT) -> list[str] | str:
    """Names of NVIDIA GPUs with driver and memory, as nvidia-smi tells them; on a Jetson the board's model."""
    told = answer("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if told != UNAVAILABLE:
        return told.splitlines()
    board = read(root / "proc/device-tree/model")
    return [board] if "jetson" in board.lower() or "orin" in board.lower() else UNAVAILABLE


def power_mode_in(told: str) -> str:
    """The mode in what ``nvpmodel -q`` prints: "NV Power Mode: MAXN" and its number on a line of its own."""
    found = re.search(r"NV Power Mode:\s*(\S.*)", told)
    if not found:
        return UNAVAILABLE
    number = re.search(r"^\s*(\d+)\s*$", told, re.MULTILINE)
    return found[1].strip() + (f" ({number[1]})" if number else "")


def battery(root: Path = ROOT) -> dict[str, Any] | str:
    """Charge in percent, whether it is charging, and temperature, of the first battery."""
    for path in _sorted(root / "sys/class/power_supply", "*"):
        if read(path / "type") == "Battery":
            percent, heat = read_int(path / "capacity"), read_int(path / "temp")
            return {
                "percent": UNAVAILABLE if percent is None else percent,
                "status": read(path / "status"),
                "celsius": UNAVAILABLE if heat is None else heat / 10,
            }
    return UNAVAILABLE


def is_emulated() -> bool:
    """Whether another machine's instructions are translated for this process, as far as the kernel tells.

    qemu shows a process its own file where that asks for itself, and its core's name; not so by these two ways.
    """
    with contextlib.suppress(OSError):
        if Path("/proc/thread-self/exe").readlink().name.startswith("qemu-"):
            return True
    kernel, machine = read("/proc/sys/kernel/arch"), platform.machine()
    families = [{"x86_64", "i386", "i686"}, {"aarch64", "armv7l", "armv8l"}]
    return any(kernel in family and machine not in family for family in families)


# ---- all of it ---------------------------------------------------------------------------------------------


def probe(root: Path = ROOT) -> dict[str, Any]:
    """CPU, cores, memory, kernel, governor, runtimes, clocks, heat and what else decides how fast this machine is."""
    cpu: dict[str, str] = {}
    for line in read(root / "proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            cpu.setdefault(name.strip(), value.strip())
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    machine = platform.machine()
    memory = re.search(r"^MemTotal:\s+(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    usable = sorted(os.sched_getaffinity(0)) if root == ROOT else _present(root)
    quota = quota_cores(root)
    clocks = clocks_khz(root)
    return {
        "system": platform.platform(),
        "distribution": _distribution(root),
        "python": platform.python_version(),
        "machine": machine,
        "cpu": cpu.get("model name") or read(root / "proc/device-tree/model"),
        "board": read(root / "proc/device-tree/model"),
        "cores": len(_present(root)) or UNAVAILABLE,
        "usable_cores": len(usable),
        "core_classes": [
            {"cpus": each, "speed": speed(each[0], root) or UNAVAILABLE} for each in classes(usable, root)
        ],
        "siblings": sorted({tuple(siblings(each, root)) for each in usable}),
        "quota_cores": UNAVAILABLE if quota is None else quota,
        "flags": {flag: flag in flags for flag in FLAGS.get(machine, ())} if flags else UNAVAILABLE,
        "memory_bytes": int(memory[1]) * 1024 if memory else UNAVAILABLE,
        "governor": read(root / CPUS / "cpu0/cpufreq/scaling_governor"),
        "runtimes": runtime_versions(),
        "targets": [name for name in RUNTIMES if is_available(name)],
        "current_khz": str(clocks["cpu0"]) if isinstance(clocks, dict) and "cpu0" in clocks else UNAVAILABLE,
        "clocks_khz": clocks,
        "temperatures_millicelsius": temperatures(root),
        "throttle_events": throttle_events(root),
        "throttle_bits": throttle_bits(root),
        "gpus": gpus(root),
        "power_mode": power_mode_in(answer("nvpmodel", "-q")),
        "battery": battery(root),
        "energy_meters": _meters(root),
        "load_average": list(os.getloadavg()),
        "emulated": is_emulated(),
    }


def _present(root: Path) -> list[int]:
    with contextlib.suppress(ValueError):
        return listed(read(root / CPUS / "present"))
    return list(range(os.cpu_count() or 0)) if root == ROOT else []


def _distribution(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', read(root / "etc/os-release"), re.MULTILINE)
    return found[1] if found else UNAVAILABLE


def _meters(root: Path) -> list[str] | str:
    found = [name for told in (energy_uj(root), power_mw(root)) if isinstance(told, dict) for name in told]
    return found or UNAVAILABLE
