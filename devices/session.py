"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from typing import Any

from ..core.config import BenchPlan
from ..core.errors import choice
from ..runtime.probe import fingerprint
from . import DEVICES


class BenchConfig(BenchPlan):
    """The configuration with the device that it was run on: another machine makes another key."""

    device_fingerprint: dict[str, Any]


def bench_config(config: BenchPlan) -> BenchConfig:
    """Name the device behind ``config``. Raises UserError for an unknown one."""
    if config.device not in DEVICES:
        raise choice("device", config.device, DEVICES)
    return BenchConfig.of(config, device_fingerprint=fingerprint(DEVICES[config.device]().probe()))
