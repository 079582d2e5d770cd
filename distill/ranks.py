"""The processes that train together: those that torchrun started, or this one alone."""

from __future__ import annotations

import atexit
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so
from torch import distributed

from ..core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``count``; collective calls must be made by all of them in the same order."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return self.device.partition(":")[0]

    def from_leader(self, value: T) -> T:
        """The leader's ``value``, on every process; what the others give is ignored."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def shared(self, folder: Path | None) -> Path:
        """The leader's ``folder``, in which all of them read or write.

        Raises:
            UserError: on every process, where one does not see it: on another node that does not share it.
        """
        path = Path(self.from_leader("" if folder is None else str(folder)))
        blind = self.total({"blind": float(not path.is_dir())})["blind"]
        if blind:
            raise UserError(
                f"{blind:.0f} of {self.count} processes do not see {path}, where the first one writes: the nodes of "
                "torchrun must share that folder, and be started in the same one"
            )
        return path

    def total(self, values: dict[str, float]) -> dict[str, float]:
        """Each entry summed over the processes."""
        if self.count == 1:
            return values
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))


_joined: list[Ranks] = []  # once a process


def join() -> Ranks:
    """Meet the other processes of torchrun's environment (NCCL on GPUs, Gloo on CPUs); alone without one."""
    if not _joined:
        found: dict[str, Any] = init_distributed_device_so("cuda" if torch.cuda.is_available() else "cpu")
        _joined.append(Ranks(found["global_rank"], found["world_size"], found["device"]))
        if found["distributed"]:
            atexit.register(distributed.destroy_process_group)
    return _joined[0]
