"""Where the curves of a run can be watched besides its own ``history.jsonl``."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ..core.config import TrainConfig
from ..core.errors import UserError
from ..core.proc import first_line, require

FOLDER = "curves"  # beside the artifacts
PROJECT = "kdpipe"


class Tracker(Protocol):
    """Made when a run begins or goes on; told every row of its history, those of before a kill included."""

    needs: ClassVar[tuple[str, ...]]  # packages

    def row(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Losses, accuracies and speed of one epoch, by name."""

    def close(self) -> None:
        """The run is over: write what is still held back."""


class Nothing:
    """Nobody watches."""

    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *_: object) -> None:
        """Ignore."""

    def row(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Ignore."""

    def close(self) -> None:
        """Ignore."""


class TensorBoard:
    """Event files: ``tensorboard --logdir ARTIFACTS/curves``."""

    needs: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def __init__(self, name: str, config: TrainConfig, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / name, ignore_errors=True)  # all rows are told again
        self._writer = SummaryWriter(str(folder / name))

    def row(self, epoch: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases by its own client, which reads WANDB_MODE, WANDB_API_KEY and the like."""

    needs: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, name: str, config: TrainConfig, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=PROJECT,
            name=name,
            id=hashlib.sha256(name.encode()).hexdigest()[:16],  # a run that goes on stays the same run
            resume="allow",
            config=config.model_dump(mode="json"),
            dir=str(folder),
            reinit="create_new",  # several runs may train side by side
            settings=wandb.Settings(silent=True),
        )

    def row(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=epoch)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow by its own client, which reads MLFLOW_TRACKING_URI."""

    needs: ClassVar[tuple[str, ...]] = ("mlflow-skinny",)

    def __init__(self, name: str, config: TrainConfig, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        known = self._client.get_experiment_by_name(PROJECT)
        experiment = known.experiment_id if known else self._client.create_experiment(PROJECT)
        # A run that was killed is still called running: it goes on.
        wanted = f"attributes.run_name = '{name}' and attributes.status = 'RUNNING'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        run = found[0] if found else self._client.create_run(experiment, run_name=name)
        self._run: str = run.info.run_id
        for key, value in _flat(config.model_dump(mode="json")).items():
            self._client.log_param(self._run, key, value)

    def row(self, epoch: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._client.log_metric(self._run, key, value, step=epoch)

    def close(self) -> None:
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Any] = {"none": Nothing, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def tracker(config: TrainConfig, out: Path) -> Tracker:
    """The tracker that ``config`` names, for the run that becomes ``out``.

    Raises:
        UserError: it is not installed, or does not start.
    """
    kind = TRACKERS[config.tracker]
    require(f"tracker '{config.tracker}'", kind.needs, config.tracker)
    try:
        made: Tracker = kind(out.name, config, out.parent / FOLDER)
    except Exception as error:  # every client raises its own
        raise UserError(f"tracker '{config.tracker}' does not start: {first_line(error)}") from error
    return made


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
