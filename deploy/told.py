"""What the papers of a release tell: from which lineage its bundles come, and what a report says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.artifact import Provenance, find_ancestors
from ..core.config import ReportConfig
from ..core.errors import UserError
from ..core.kinds import Bundle, Checkpoint, CheckpointFacts, Measurement, Release, ReleaseFacts, Report
from ..data.dataset import Dataset, DatasetFacts
from ..runtime.task import TASKS, Task
from .licences import is_teacher

# ---- lineage -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A release that is being written: what it is made of, and what is known of that."""

    facts: ReleaseFacts
    license: str | None  # of the release itself
    bundles: Mapping[str, Bundle]
    report: Report | None
    last: Release | None

    @property
    def data(self) -> dict[str, DatasetFacts]:
        """Every data set, by key."""
        return {each.key: Dataset.facts_of(each) for each in self._ancestors(Dataset)}

    @property
    def networks(self) -> dict[str, Provenance]:
        """Every network, by key."""
        return {each.key: each for each in self._ancestors(Checkpoint)}

    @property
    def teachers(self) -> list[tuple[Provenance, CheckpointFacts]]:
        """The networks that others learned from."""
        every = self.networks.values()
        found = [each for each in every if any(is_teacher(each, other) for other in every)]
        return [(each, Checkpoint.facts_of(each)) for each in found]

    @property
    def students(self) -> list[tuple[Provenance, CheckpointFacts]]:
        """The networks that the bundles run."""
        nearest = [find_ancestors(bundle.manifest.provenance(), Checkpoint)[:1] for bundle in self.bundles.values()]
        found = {each.key: each for its in nearest for each in its}
        return [(each, Checkpoint.facts_of(each)) for each in found.values()]

    @property
    def task(self) -> Task:
        """What the bundles are asked."""
        return TASKS[next(iter(self.bundles.values())).facts.task]

    def _ancestors(self, kind: type[Any]) -> list[Provenance]:
        found: dict[str, Provenance] = {}
        for bundle in self.bundles.values():
            for each in find_ancestors(bundle.manifest.provenance(), kind):
                found.setdefault(each.key, each)
        return list(found.values())

    def numbers(self) -> Numbers | None:
        """What the report says of these bundles; rows of other ones are left out. Raises UserError."""
        if self.report is None:
            return None
        names = {bundle.key: name for name, bundle in self.bundles.items()}
        return read_numbers(self.report, names)


# ---- a report's numbers ------------------------------------------------------------------------------------


class Part(BaseModel):
    """Some fields of a larger mapping."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Estimate(Part):
    """A value with its interval; a bound is None where n is too small."""

    value: float
    low: float | None
    high: float | None
    n: int


class Believed(Part):
    """Whether a latency is to be believed, and if not, why."""

    word: str
    reason: str = ""


class Sure(Part):
    """How far a network's confidence is from how often it is right, and what chance alone would show."""

    error: float
    by_chance: float


class Row(Part):
    """One bundle on one device."""

    name: str
    accuracy: Estimate | None
    latency_p50_ms: Estimate | None
    latency_p90_ms: Estimate | None
    trust: Believed | None
    sessions: int
    threads: int | None
    calibration: Sure | None
    bundle: str = ""  # what the release calls it


class Attempts(Part):
    """How a device was measured."""

    emulated: bool
    rounds: int


class Machine(Part):
    """What a device is."""

    cpu: str
    machine: str


class DeviceRows(Part):
    """Everything of one device."""

    device: str
    probe_before: Machine
    trust: Attempts
    bundles: list[Row]


class ClassRow(Part):
    """How right a bundle is on the images of one class."""

    name: str = Field(alias="class")
    test_images: int
    accuracy: Estimate | None


class Answers(Part):
    """How right one bundle is, class by class."""

    device: str
    bundle: str
    classes: list[ClassRow]


class Numbers(Part):
    """What of a report goes into a model card."""

    schema_version: int
    devices: list[DeviceRows]
    answers: Answers | None


def read_numbers(report: Report, names: Mapping[str, str]) -> Numbers:
    """The rows of a report that are of these bundles.

    Args:
        names: what the release calls each bundle, by key.

    Raises:
        UserError: a report of another version, or one that is of none of the bundles.
    """
    try:
        found = Numbers.model_validate(report.numbers)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{report.path} says nothing that can be read of '{where}': make the report again") from None
    wanted = ReportConfig().version
    if found.schema_version != wanted:
        raise UserError(f"{report.path} is a report of version {found.schema_version}, wanted {wanted}: make it again")
    keys = _bundle_keys(report)
    devices = []
    for device in found.devices:
        known = keys.get(device.device, {})
        rows = [
            row.model_copy(update={"bundle": names[known[row.name]]})
            for row in device.bundles
            if known.get(row.name) in names
        ]
        devices.append(device.model_copy(update={"bundles": rows}))
    if not any(device.bundles for device in devices):
        raise UserError(f"{report.path} is of none of these bundles: wanted the report that measured them")
    answers = found.answers
    if answers is not None:
        its = keys.get(answers.device, {}).get(answers.bundle)
        answers = answers.model_copy(update={"bundle": names[its]}) if its is not None and its in names else None
    return found.model_copy(update={"devices": devices, "answers": answers})


def _bundle_keys(report: Report) -> dict[str, dict[str, str]]:
    """By device and name of the row, the key of the bundle that was measured."""
    keys: dict[str, dict[str, str]] = {}
    for source in find_ancestors(report.manifest.provenance(), Measurement):
        its = keys.setdefault(Measurement.facts_of(source).device, {})
        its.update({name: each.key for name, each in source.inputs.items() if each.kind == Bundle.kind})
    return keys


def accuracies(numbers: Numbers) -> Sequence[Row]:
    """One row of each bundle that has an accuracy."""
    found: dict[str, Row] = {}
    for device in numbers.devices:
        for row in device.bundles:
            if row.accuracy is not None:
                found.setdefault(row.bundle, row)
    return list(found.values())
