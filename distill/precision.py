"""Which floating-point format trains this network fastest on this machine."""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.artifact import canonical, host_record, write_json
from ..core.config import ModelSettings, TrainConfig

TIMED_STEPS = 4
CANDIDATES = [(name, channels_last) for name in ("float32", "bf16") for channels_last in (False, True)]


@dataclass(frozen=True)
class Precision:
    """A format, a memory layout, and how long a step took in each candidate if they were timed."""

    name: str
    channels_last: bool = False
    seconds_a_step: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON and the saved state."""
        return dict(vars(self))

    def context(self, device: str) -> AbstractContextManager[object]:
        """Autocast to this format; weights, gradients and losses stay float32."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        return nullcontext() if kind is None else torch.autocast(device, dtype=kind)

    def place(self, tensor: Tensor) -> Tensor:
        """Images [B, C, H, W] in this layout."""
        return tensor.contiguous(memory_format=torch.channels_last) if self.channels_last else tensor

    def prepare(self, module: nn.Module) -> None:
        """Lay out the weights of ``module`` in this memory format."""
        if self.channels_last:
            module.to(memory_format=torch.channels_last)


class Choices:
    """What ``precision: auto`` took, by network and data, remembered in a folder.

    A run and its control are to be trained alike, also where they are trained one after the other, or anew.
    """

    def __init__(self, folder: Path | None, dataset: str, device: str) -> None:
        """Nothing is remembered without ``folder``; ``dataset`` is a key, ``device`` as torch calls it."""
        self._folder = folder
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else host_record()["cpu"]
        self._where = [dataset, name, torch.__version__]

    def of(self, config: TrainConfig) -> Precision | None:
        """What this network was trained in, or None where that is not known."""
        if self._folder is None:
            return None
        with suppress(OSError, ValueError, TypeError):  # unreadable is unknown: it is chosen again
            found = Precision(**json.loads(self._file(self._folder, config).read_text()))
            return found if (found.name, found.channels_last) in CANDIDATES else None
        return None

    def keep(self, config: TrainConfig, precision: Precision) -> None:
        """Remember what this network is trained in."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._file(self._folder, config)
            draft = file.with_suffix(".tmp")
            write_json(draft, precision.as_dict())
            draft.replace(file)

    def _file(self, folder: Path, config: TrainConfig) -> Path:
        network = ModelSettings.of(config, pretrained=False).model_dump(mode="json")
        if config.prune.keep is not None:
            network["prune"] = config.prune.model_dump(mode="json")
        identity = canonical([network, config.train.batch_size, *self._where])
        return folder / f"{hashlib.sha256(identity).hexdigest()[:12]}.json"


def fastest(method: nn.Module, step: Callable[[nn.Module, Precision], None], device: str) -> Precision:
    """Time ``step`` (a whole training step) on copies of ``method`` in every candidate; interleaved, medians.

    Args:
        device: its kind, as torch calls it; a step is over when the device has done it.
    """
    synchronize = torch.get_device_module(device).synchronize
    candidates = [Precision(name, last) for name, last in CANDIDATES]
    copies = []
    for candidate in candidates:
        clone = copy.deepcopy(method)
        candidate.prepare(clone)
        copies.append(clone)
    names = [candidate.name + (" channels-last" if candidate.channels_last else "") for candidate in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(1 + TIMED_STEPS):
        for at, (candidate, clone) in enumerate(zip(candidates, copies, strict=True)):
            synchronize()
            begun = time.perf_counter()
            step(clone, candidate)
            synchronize()
            times[at].append(time.perf_counter() - begun)
    medians = [statistics.median(each[1:]) for each in times]  # the first step of each warms up
    best = min(range(len(candidates)), key=medians.__getitem__)
    return Precision(candidates[best].name, candidates[best].channels_last, dict(zip(names, medians, strict=True)))
