"""What names a measuring session, without importing what measures (a sealed one is only looked up)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..core.config import BenchConfig, BenchPlan, MeasureSettings
from ..core.kinds import AT_THREADS, Probe
from ..data.corrupt import CORRUPTING
from . import find_device

B = TypeVar("B")


def bench_config(config: BenchPlan, device: str, probe: Probe | None = None) -> BenchConfig:
    """Name the device as it is now behind ``config``; it is asked unless its ``probe`` is given.

    Raises:
        UserError: an unknown one.
        DeviceLost: it cannot be reached.
    """
    found = find_device(device).probe() if probe is None else probe
    corrupting = CORRUPTING if config.corruptions else None
    return BenchConfig.of(config, device=device, device_fingerprint=found.fingerprint, corrupting=corrupting)


def swept(bundles: Mapping[str, B], threads: Sequence[int]) -> dict[str, B]:
    """A row for each bundle and number of threads, named as in ``student-int8@2``; the bundles as they are for one."""
    if len(threads) == 1:
        return dict(bundles)
    return {f"{name}{AT_THREADS}{count or 'all'}": bundle for name, bundle in bundles.items() for count in threads}


def settings_of(config: BenchConfig, row: str) -> MeasureSettings:
    """How a row of a session is measured: on its own number of threads."""
    return MeasureSettings.of(config, threads=threads_of(config, row))


def threads_of(config: BenchConfig, row: str) -> int:
    """Threads of a row; 0 for all."""
    if len(config.threads) == 1:
        return config.threads[0]
    told = row.rpartition(AT_THREADS)[2]
    return 0 if told == "all" else int(told)
