"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from typing import Any

from ..core.config import BenchPlan
from . import find_device


class BenchConfig(BenchPlan):
    """The configuration with the device that it was run on: another machine makes another key."""

    device_fingerprint: dict[str, Any]


def bench_config(config: BenchPlan) -> BenchConfig:
    """Name the device behind ``config``. Raises UserError for an unknown one."""
    return BenchConfig.of(config, device_fingerprint=find_device(config.device).probe().fingerprint)
