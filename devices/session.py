"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from ..core.config import BenchConfig, BenchPlan
from . import find_device


def bench_config(config: BenchPlan) -> BenchConfig:
    """Name the device behind ``config``. Raises UserError for an unknown one."""
    return BenchConfig.of(config, device_fingerprint=find_device(config.device).probe().fingerprint)
