"""What can be made here and run on a device, and what to do about the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .core.artifact import tool_versions
from .core.errors import choice
from .core.kinds import Probe
from .core.proc import is_installed
from .devices import Device, find_device
from .export import TARGETS
from .quantize import VARIANTS
from .runtime import RUNTIMES
from .runtime.probe import UNAVAILABLE


@dataclass(frozen=True)
class TargetState:
    """Whether one target can be exported and quantised here and run on a device, and the packages that it lacks."""

    target: str
    exports: bool
    quantizes: bool
    runs: bool
    missing: tuple[str, ...]
    cure: str


def examine_target(target: str, device: Device) -> TargetState:
    """Look for the packages behind ``target`` without importing them. Raises UserError."""
    if target not in TARGETS:
        raise choice("target", target, TARGETS)
    export, int8 = (
        [name for name in needs if not is_installed(name)]
        for needs in (TARGETS[target].needs, VARIANTS[target]["int8"].needs)
    )
    run = [] if device.runs(target) else list(RUNTIMES[target].needs)
    makes = not export and not int8
    cure = "" if makes else f"pip install 'kdpipe[{target}]'"
    if makes and run:
        cure = "run its bundle on a device that has " + " and ".join(run)
        if device.name != "local" and target != "tensorrt":  # which comes with a Jetson's own system
            cure = f"kdpipe devices prepare {device.name} --runtime {target}"
    missing = tuple(dict.fromkeys([*export, *int8, *run]))
    return TargetState(target, not export, not int8, not run, missing, cure)


def advice(found: Probe) -> list[str]:
    """What the CPU's flags and clocks mean for someone who ships models for it and measures there."""
    flags = found.known_flags
    lines = []
    if found.flags == UNAVAILABLE:
        lines.append("CPU flags are unavailable: INT8 may or may not be fast there, measure it")
    elif found.machine == "x86_64":
        if not (flags["avx512_vnni"] or flags["avx_vnni"]):
            lines.append("no VNNI: INT8 may be slower than float32 and may saturate; measure both")
        if flags["amx_bf16"] or flags["avx512_bf16"]:
            lines.append("bf16 units: OpenVINO would take bf16 by itself; kdpipe's bundles state their precision")
    elif not flags.get("asimddp"):
        lines.append("no dot-product instructions: INT8 gains little there; measure both")
    if found.governor not in (UNAVAILABLE, "performance"):
        lines.append(f"the clock governor is '{found.governor}': latencies will wander, 'performance' is steadier")
    load, cores = found.load_average, found.usable_cores
    if isinstance(load, list) and isinstance(cores, int) and load[0] > 0.5 * cores:
        lines.append(f"load average {load[0]:.1f} on {cores} cores: measure later")
    return lines


def examine(device_name: str = "local") -> dict[str, Any]:
    """Everything ``kdpipe doctor`` prints, JSON-serialisable. Raises UserError for an unknown device."""
    device = find_device(device_name)
    found = device.probe()
    return {
        "device": device_name,
        "targets": [vars(examine_target(target, device)) for target in TARGETS],
        "training": is_installed("torch") and is_installed("timm"),
        "tools": tool_versions(),
        "machine": found.model_dump(),
        "advice": advice(found),
    }
