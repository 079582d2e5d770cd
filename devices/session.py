"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from ..core.config import BenchConfig, BenchPlan
from . import find_device


def bench_config(config: BenchPlan, device: str) -> BenchConfig:
    """Name the device as it is now behind ``config``.

    Raises:
        UserError: an unknown one.
        DeviceLost: it cannot be reached.
    """
    return BenchConfig.of(config, device=device, device_fingerprint=find_device(device).probe().fingerprint)
