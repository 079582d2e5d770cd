"""What a machine is, read from its kernel; whatever can't be read is "unavailable", never 0."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from . import RUNTIMES, is_available

UNAVAILABLE = "unavailable"

# CPU flags that decide how fast small precisions run, by architecture.
FLAGS = {
    "x86_64": ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "fphp", "sve"),
}


def read(path: str) -> str:
    """The text of a file of the kernel, or that it is unavailable."""
    try:
        return Path(path).read_text().strip("\0\n ") or UNAVAILABLE
    except OSError:
        return UNAVAILABLE


def runtime_versions() -> dict[str, str]:
    """Versions of the distributions that open models here, without importing them."""
    versions = {}
    for name in sorted({name for runtime in RUNTIMES.values() for name in runtime.needs}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


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


def probe() -> dict[str, Any]:
    """CPU, its flags, memory, kernel, governor, runtimes, clocks and temperatures of this machine."""
    cpu: dict[str, str] = {}
    for line in read("/proc/cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            cpu.setdefault(name.strip(), value.strip())
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    machine = platform.machine()
    memory = next((line.split()[1] for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal")), None)
    zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp")) if Path("/sys/class/thermal").is_dir() else []
    return {
        "system": platform.platform(),
        "machine": machine,
        "cpu": cpu.get("model name") or read("/proc/device-tree/model"),
        "cores": os.cpu_count() or UNAVAILABLE,
        "usable_cores": len(os.sched_getaffinity(0)),
        "flags": {flag: flag in flags for flag in FLAGS.get(machine, ())} if flags else UNAVAILABLE,
        "memory_bytes": int(memory) * 1024 if memory else UNAVAILABLE,
        "governor": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "runtimes": runtime_versions(),
        "targets": [name for name in RUNTIMES if is_available(name)],
        "current_khz": read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"),
        "temperatures_millicelsius": {zone.parent.name: read(str(zone)) for zone in zones} or UNAVAILABLE,
        "load_average": list(os.getloadavg()),
        "emulated": is_emulated(),
    }
