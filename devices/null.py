"""No machine at all: takes everything, runs nothing. What is left is what measuring itself costs.

Its outputs are zeros in the bundle's own shape and its times those of an empty call, so it is marked as emulated and
never ranked.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from ..core.config import DeviceSettings, MeasureSettings
from ..core.errors import UserError
from ..core.kinds import Bundle, FreshStart, Prediction, Probe, RuntimeSession, Samples, Sustained, WarmUp
from ..runtime import RUNTIMES
from ..runtime.bundle import GOLDEN
from ..runtime.measure import Plan, peak_memory_bytes, sustain, time_calls
from ..runtime.probe import UNAVAILABLE

SESSION = RuntimeSession(runtime="null", version="0", threads=0)


class NullDevice:
    emulated = True

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings
        self.name = settings.name
        self._pushed: dict[str, Path] = {}

    def probe(self) -> Probe:
        return Probe(
            system="null",
            machine="null",
            cpu="null",
            cores=UNAVAILABLE,
            usable_cores=UNAVAILABLE,
            flags=UNAVAILABLE,
            memory_bytes=UNAVAILABLE,
            governor=UNAVAILABLE,
            runtimes=UNAVAILABLE,
            targets=list(RUNTIMES),
            current_khz=UNAVAILABLE,
            temperatures_millicelsius=UNAVAILABLE,
            load_average=UNAVAILABLE,
        )

    def runs(self, target: str) -> bool:
        return True

    def open(self, scratch: Path) -> None:
        self._pushed = {}

    def push(self, source: Path, name: str) -> None:
        if not source.exists():
            raise UserError(f"nothing at {source}: wanted a file or folder to push")
        self._pushed[name] = source

    def drop(self, name: str) -> None:
        del self._pushed[name]

    def watching(self) -> AbstractContextManager[None]:
        return nullcontext()

    def predict(
        self,
        bundle: str,
        images: str,
        outputs: Path,
        timeout_seconds: float,
        *,
        stand_in: bool = False,
        batch: int = 64,
        threads: int = 0,
    ) -> Prediction:
        golden = Bundle.open(self._found(bundle)).arrays(GOLDEN, images=("u", 4), logits=("fu", 2))["logits"]
        count = len(np.load(self._found(images), mmap_mode="r", allow_pickle=False))
        np.save(outputs, np.zeros((count, *golden.shape[1:]), golden.dtype))
        return Prediction(images=count, open_seconds=0, predict_seconds=0, session=SESSION)

    def measure(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, frames: str | None = None
    ) -> Samples:
        self._found(bundle)
        plan = Plan(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Plan)})
        timed = time_calls(lambda _: None, plan)
        return Samples(
            import_ns=0,
            load_ns=0,
            first_ns=0,
            prepare_ns=[0],
            warm_up=WarmUp(window_median_ns=[], calls=0, seconds=0, settled=True),
            end_to_end_ns=[0],
            sustained=Sustained.model_validate(sustain(lambda _: None, plan, 1.0)) if plan.sustained else None,
            session=SESSION,
            **timed,
        )

    def start_fresh(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, examine: bool = False
    ) -> FreshStart:
        self._found(bundle)
        memory = peak_memory_bytes()
        return FreshStart(
            process_ns=0,
            import_ns=0,
            load_ns=0,
            first_ns=0,
            session=SESSION,
            page_cache=settings.page_cache,
            memory_before_open_bytes=memory,
            peak_memory_bytes=memory,
        )

    def close(self) -> None:
        self._pushed = {}

    def _found(self, name: str) -> Path:
        if name not in self._pushed:
            raise UserError(f"nothing was pushed to 'null' as '{name}'")
        return self._pushed[name]
