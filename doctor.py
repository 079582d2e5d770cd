"""What can be made and run here, and what to do about the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .core.artifact import tool_versions
from .core.errors import choice
from .core.proc import is_installed
from .export import TARGETS
from .quantize import VARIANTS
from .runtime import RUNTIMES, is_available
from .runtime.probe import UNAVAILABLE, probe


@dataclass(frozen=True)
class TargetState:
    """Whether one target can be exported, quantised and run on this machine, and the missing packages."""

    target: str
    exports: bool
    quantizes: bool
    runs: bool
    missing: tuple[str, ...]
    cure: str


def examine_target(target: str) -> TargetState:
    """Look for the packages behind ``target`` without importing them. Raises UserError."""
    if target not in TARGETS:
        raise choice("target", target, TARGETS)
    export, int8 = (
        [name for name in needs if not is_installed(name)]
        for needs in (TARGETS[target].needs, VARIANTS[target]["int8"].needs)
    )
    run = [] if is_available(target) else [name for name in RUNTIMES[target].needs if not is_installed(name)]
    makes = not export and not int8
    cure = "" if makes else f"pip install 'kdpipe[{target}]'"
    if makes and run:
        cure = "run its bundle on a device that has " + " and ".join(run)
    missing = tuple(dict.fromkeys([*export, *int8, *run]))
    return TargetState(target, not export, not int8, not run, missing, cure)


def advice(found: dict[str, Any]) -> list[str]:
    """What the CPU's flags and clocks mean for someone who ships and measures models here."""
    flags = found["flags"]
    lines = []
    if flags == UNAVAILABLE:
        lines.append("CPU flags are unavailable: INT8 may or may not be fast here, measure it")
    elif found["machine"] == "x86_64":
        if not (flags["avx512_vnni"] or flags["avx_vnni"]):
            lines.append("no VNNI: INT8 may be slower than float32 and may saturate; measure both")
        if flags["amx_bf16"] or flags["avx512_bf16"]:
            lines.append("bf16 units: OpenVINO would take bf16 by itself; kdpipe's bundles state their precision")
    elif not flags.get("asimddp"):
        lines.append("no dot-product instructions: INT8 gains little here; measure both")
    if found["governor"] not in (UNAVAILABLE, "performance"):
        lines.append(f"the clock governor is '{found['governor']}': latencies will wander, 'performance' is steadier")
    if found["load_average"][0] > 0.5 * found["usable_cores"]:
        lines.append(f"load average {found['load_average'][0]:.1f} on {found['usable_cores']} cores: measure later")
    return lines


def examine() -> dict[str, Any]:
    """Everything ``kdpipe doctor`` prints, JSON-serialisable."""
    found = probe()
    return {
        "targets": [vars(examine_target(target)) for target in TARGETS],
        "training": is_installed("torch") and is_installed("timm"),
        "tools": tool_versions(),
        "machine": found,
        "advice": advice(found),
    }
