"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from typing import Any

from ..core.config import BenchPlan
from . import find_device


class BenchConfig(BenchPlan):
    """The configuration with the device as it is now, and which attempt at it this is: a measurement is an event.

    Another machine, kernel, governor or version of a runtime makes another session, another attempt another key.
    """

    device_fingerprint: dict[str, Any]
    attempt: int = 0  # from 1 on; 0 names the session itself


def bench_config(config: BenchPlan) -> BenchConfig:
    """Name the device behind ``config``. Raises UserError for an unknown one."""
    return BenchConfig.of(config, device_fingerprint=find_device(config.device).probe().fingerprint)
