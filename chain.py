"""A folder of artifacts: finds what is sealed, makes what is not, knows what lies beside what."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from .core.artifact import (
    MANIFEST,
    AnyArtifact,
    Manifest,
    Order,
    OtherVersion,
    find_ancestors,
    read_manifest,
    sha256_file,
)
from .core.config import (
    AdoptConfig,
    BenchPlan,
    CacheConfig,
    CacheSettings,
    DataConfig,
    DataPlan,
    ExportConfig,
    GraphConfig,
    PackageConfig,
    QuantizeConfig,
    QuantizePlan,
    ReportConfig,
    TeacherPlan,
    TrainConfig,
    suited,
)
from .core.errors import UserError, choice
from .core.kinds import Bundle, Cache, Checkpoint, Graph, Measurement, Model, Probe, Report
from .core.proc import require
from .core.progress import progress
from .data.dataset import Dataset
from .data.fingerprints import fingerprint_folder

if TYPE_CHECKING:
    from .report.compression import Sources

A = TypeVar("A", bound=AnyArtifact)
TRAIN_NEEDS = ("torch", "torchvision", "timm", "safetensors")


@dataclass
class Step:
    """One line of what a run did."""

    name: str
    path: Path
    seconds: float
    sealed_before: bool
    along_with: str | None = None  # the artifact in whose time this one was made too


@dataclass
class Chain:
    """A folder of artifacts, and the steps taken through it so far.

    Artifacts lie at ``folder/NAME-KEY``, KEY being the first 12 digits of the key: the same stage with
    the same configuration and inputs is found again, anything else gets a folder of its own.
    """

    folder: Path
    tell: Callable[[Step], None] = lambda _: None
    steps: list[Step] = field(default_factory=list)
    # Called once, before the first step that is not sealed: mistakes are told before any work.
    check: Callable[[], None] = lambda: None
    _graphs: dict[Path, Graph] = field(default_factory=dict)  # opened once for all the targets of a run

    def step(
        self,
        name: str,
        kind: type[A],
        order: Order[Any],
        make: Callable[[Path], A],
        out: Path | None = None,
        companions: Mapping[Path, str] | None = None,
    ) -> A:
        """The sealed artifact of this order; made now if there is none.

        ``companions``: artifacts that were made now along with another one, and its name.
        """
        path = out or self.path(name, order)
        begun = time.monotonic()
        if path.exists():
            artifact, sealed = kind.open(path), True
            if artifact.key != order.key:
                raise UserError(f"{path} was made from other settings or inputs: choose another --out")
        else:
            check, self.check = self.check, lambda: None
            with progress(name, 1):  # seen while libraries are being imported
                check()
                artifact, sealed = make(path), False
        along_with = (companions or {}).get(path) if sealed else None
        self.steps.append(Step(name, path, time.monotonic() - begun, sealed and along_with is None, along_with))
        self.tell(self.steps[-1])
        return artifact

    def path(self, name: str, order: Order[Any], attempt: int | None = None) -> Path:
        """Where the artifact of ``order`` lies; of an event, which attempt at it."""
        return self.folder / (f"{name}-{order.key[:12]}" + ("" if attempt is None else f"-{attempt}"))

    def data(self, plan: DataPlan, out: Path | None = None) -> Dataset:
        if Path(plan.source).is_dir():
            fingerprint = fingerprint_folder(Path(plan.source), self._memory(plan.source))
        else:  # named sources are known by their names
            fingerprint = "by name"
        unlabeled = None
        if plan.unlabeled is not None and plan.unlabeled.is_dir():
            unlabeled = fingerprint_folder(plan.unlabeled, self._memory(str(plan.unlabeled)))
        if plan.classes is not None and not plan.classes.is_file():
            raise UserError(f"data.classes: no file at {plan.classes}: wanted a text file with one class a line")
        config = DataConfig.of(
            plan,
            fingerprint=fingerprint,
            unlabeled_fingerprint=unlabeled,
            classes_fingerprint=sha256_file(plan.classes) if plan.classes is not None else None,
        )
        order = Order("data", config, {})

        def make(path: Path) -> Dataset:
            require("reading data", (*TRAIN_NEEDS, *(("scikit-learn",) if plan.source == "digits" else ())), "train")
            from .data.prepare import prepare

            return prepare(order, path)

        return self.step("data", Dataset, order, make, out)

    def _memory(self, source: str) -> Path:
        name = hashlib.sha256(str(Path(source).absolute()).encode()).hexdigest()[:12]
        return self.folder / ".fingerprints" / f"{name}.json"

    def cache(self, config: CacheConfig, dataset: Dataset, teacher: Checkpoint, out: Path | None = None) -> Cache:
        order = cache_order(config, dataset, teacher)

        def make(path: Path) -> Cache:
            require("asking the teacher", TRAIN_NEEDS, "train")
            from .distill.cache import build

            return build(order, dataset, teacher, path)

        return self.step("cache", Cache, order, make, out)

    def _cache_of(self, config: TrainConfig, dataset: Dataset, teacher: Checkpoint | None) -> Cache | None:
        """What ``config`` learns from instead of a live teacher, if it does: a function of run, data and teacher."""
        from .distill.train import cache_config

        wanted = cache_config(config)
        return None if wanted is None or teacher is None else self.cache(wanted, dataset, teacher)

    def train(
        self,
        name: str,
        config: TrainConfig,
        dataset: Dataset,
        teacher: Checkpoint | None,
        out: Path | None = None,
        cache: Cache | None = None,
    ) -> Checkpoint:
        """One student; with ``cache`` from that one, which lies elsewhere than among the artifacts."""
        order = train_order(config, dataset, teacher, cache)

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import train

            return train(order, dataset, teacher, path, cache or self._cache_of(config, dataset, teacher))

        return self.step(name, Checkpoint, order, make, out)

    def train_all(
        self, configs: Mapping[str, TrainConfig], dataset: Dataset, teacher: Checkpoint | None, together: bool
    ) -> dict[str, Checkpoint]:
        """Every run by name; with ``together`` those that see the same views are trained side by side."""
        made: dict[Path, str] = {}  # by whose step
        orders = {name: train_order(config, dataset, teacher) for name, config in configs.items()}
        paths = {self.path(name, order): order for name, order in orders.items()}
        missing = {path: order for path, order in paths.items() if not path.exists()}

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import companions, train_together

            parts = companions(missing, dataset) if together else [{path: missing[path]}]
            part = next(part for part in parts if path in part)
            made.update(dict.fromkeys(part, path.name))
            taught = next((each for each in part.values() if each.config.needs_teacher), missing[path])
            return train_together(part, dataset, teacher, self._cache_of(taught.config, dataset, teacher))[path]

        return {name: self.step(name, Checkpoint, order, make, companions=made) for name, order in orders.items()}

    def teacher(self, plan: TeacherPlan, dataset: Dataset, out: Path | None = None) -> Checkpoint:
        """The user's weights, timm's, or a network trained here on all training images."""
        if plan.is_trained:
            return self.train("teacher", TrainConfig.of(plan, method="labels"), dataset, None, out)
        if plan.checkpoint is not None and not plan.checkpoint.is_file():
            raise UserError(f"teacher.checkpoint: no file at {plan.checkpoint}: wanted .safetensors or .pth")
        sha256 = sha256_file(plan.checkpoint) if plan.checkpoint else None
        if plan.checkpoint_sha256 not in (None, sha256):
            raise UserError(
                f"teacher.checkpoint: {plan.checkpoint} has sha256 {sha256}, wanted {plan.checkpoint_sha256}"
            )
        order = Order("adopt", AdoptConfig.of(plan, checkpoint_sha256=sha256), {"data": dataset})

        def make(path: Path) -> Checkpoint:
            require("reading weights", TRAIN_NEEDS, "train")
            from .distill.train import adopt

            return adopt(order, dataset, path)

        return self.step("teacher", Checkpoint, order, make, out)

    def graph(self, config: GraphConfig, student: Checkpoint, dataset: Dataset) -> Graph:
        """The student as ONNX, made once for every target that starts from it."""
        order = Order("graph", GraphConfig.of(config), {"student": student, "data": dataset})

        def make(path: Path) -> Graph:
            from .export.graph import trace

            return trace(order, student, dataset, path)

        path = self.path("graph", order)
        if path not in self._graphs:
            self._graphs[path] = self.step("graph", Graph, order, make)
        return self._graphs[path]

    def export(self, config: ExportConfig, student: Checkpoint, dataset: Dataset, out: Path | None = None) -> Model:
        from .export import TARGETS

        if config.target not in TARGETS:
            raise choice("target", config.target, TARGETS)
        from_graph = TARGETS[config.target].source is Graph
        source = self.graph(config, student, dataset) if from_graph else student
        order = Order("export", config, {source.kind: source, "data": dataset})

        def make(path: Path) -> Model:
            from .export.stage import export

            return export(order, source, dataset, path)

        return self.step(f"{config.target}-float32", Model, order, make, out)

    def quantize(
        self, config: QuantizeConfig, model: Model, dataset: Dataset, device: Probe, out: Path | None = None
    ) -> Model:
        """One variant for that device, which decides what the configuration leaves to it."""
        suitable = suited(config, device.machine, device.known_flags)
        order = Order("quantize", suitable, {"model": model, "data": dataset})

        def make(path: Path) -> Model:
            from .export import TARGETS
            from .quantize.stage import quantize

            check = TARGETS[model.facts.target].check
            return quantize(order, model, dataset, path, check, self._nearest(model, Graph), self._teacher_of(model))

        return self.step(f"{model.facts.target}-{config.variant}", Model, order, make, out)

    def variants(self, plan: QuantizePlan, model: Model, dataset: Dataset, device: Probe) -> list[Model]:
        """Every variant of the plan that ``model``'s target has; with auto, those that could be the best there."""
        from .quantize import VARIANTS

        made = []
        for name, kind in VARIANTS[model.facts.target].items():
            if kind.suits(model.facts, device.known_flags) if plan.variants == "auto" else name in plan.variants:
                made.append(self.quantize(QuantizeConfig.of(plan, variant=name), model, dataset, device))
        return made

    def _nearest(self, artifact: AnyArtifact, kind: type[A]) -> A | None:
        """The nearest ancestor of ``kind``, if it lies beside ``artifact``."""
        wanted = [found.key for found in find_ancestors(artifact.manifest.provenance(), kind)]
        found = beside(artifact, kind, set(wanted[:1]))
        return next(iter(found.values()), None)

    def _teacher_of(self, model: Model) -> Checkpoint | None:
        """The checkpoint that taught the student of ``model``, if it lies beside it."""
        student = next(iter(find_ancestors(model.manifest.provenance(), Checkpoint)), None)
        if student is None or "teacher" not in student.inputs:
            return None
        return next(iter(beside(model, Checkpoint, {student.inputs["teacher"].key}).values()), None)

    def package(self, config: PackageConfig, model: Model, dataset: Dataset, out: Path | None = None) -> Bundle:
        order = Order("package", config, {"model": model, "data": dataset})

        def make(path: Path) -> Bundle:
            from .deploy.bundle import package

            return package(order, model, dataset, path)

        return self.step(f"bundle-{model.facts.target}-{model.facts.variant}", Bundle, order, make, out)

    def bench(
        self,
        plan: BenchPlan,
        bundles: Mapping[str, Bundle],
        dataset: Dataset,
        out: Path | None = None,
        again: bool = True,
    ) -> Measurement:
        """Measure: every call is an attempt of its own, ``NAME-KEY-ATTEMPT``, KEY being that of the session.

        Args:
            again: False takes what was measured before, if anything was: see ``believed``.

        Raises:
            UserError: ``out`` exists, or as ``devices.bench`` does.
        """
        from .devices.session import bench_config

        if out is not None and out.exists():
            raise UserError(f"{out} exists already: each measurement gets a folder of its own, choose another --out")
        inputs: dict[str, AnyArtifact] = {**bundles, "data": dataset}
        session = Order("bench", bench_config(plan), inputs)
        keys = {role: artifact.key for role, artifact in inputs.items()}
        earlier = attempts(out.parent if out else self.folder, session.config.model_dump(mode="json"), keys)
        taken = None if again or not earlier else believed(earlier)
        number = 1 + max(map(attempt_of, earlier.values()), default=0) if taken is None else attempt_of(earlier[taken])
        path = taken or out or self.path("measurement", session, number)
        order = Order("bench", session.config.model_copy(update={"attempt": number}), inputs)

        def make(path: Path) -> Measurement:
            from .devices.bench import bench

            return bench(order, bundles, dataset, path)

        return self.step("measurement", Measurement, order, make, path)

    def report(
        self,
        config: ReportConfig,
        measurement: Measurement,
        checkpoints: Mapping[str, Checkpoint],
        out: Path | None = None,
    ) -> Report:
        sources = self._sources(measurement)
        config = config.model_copy(update={"attempts": len(attempts_beside(measurement))})
        order = Order("report", config, {"measurement": measurement, **checkpoints, **sources.as_inputs()})

        def make(path: Path) -> Report:
            require("the report", ("jinja2", "matplotlib"), "report")
            from .report.page import report

            return report(order, measurement, checkpoints, sources, path)

        return self.step("report", Report, order, make, out)

    def _sources(self, measurement: Measurement) -> Sources:
        """Graphs, models and dataset behind ``measurement`` that lie beside it."""
        from .report.compression import Sources

        lineage = measurement.manifest.provenance()

        def found(kind: type[A]) -> list[A]:
            keys = {ancestor.key for ancestor in find_ancestors(lineage, kind)}
            return list(beside(measurement, kind, keys).values())

        return Sources(
            {graph.key: graph for graph in found(Graph)},
            {model.key: model for model in found(Model)},
            next(iter(found(Dataset)), None),
        )


def attempts(folder: Path, config: Mapping[str, Any], input_keys: Mapping[str, str]) -> dict[Path, Manifest]:
    """Every measurement in ``folder`` of one session: the attempts at it, in their order.

    Args:
        config: of any attempt.
        input_keys: of what was measured, by role.
    """
    session = {**config, "attempt": None}
    found = {
        path: manifest
        for path, manifest in sealed(folder, skip=UserError)  # --out may be anywhere, beside anything
        if manifest.kind == Measurement.kind
        and isinstance(manifest.config.get("attempt"), int)
        and {**manifest.config, "attempt": None} == session
        and {role: source.key for role, source in manifest.inputs.items()} == dict(input_keys)
    }
    return dict(sorted(found.items(), key=lambda item: attempt_of(item[1])))


def attempts_beside(measurement: Measurement) -> dict[Path, Manifest]:
    """``measurement`` and the other attempts at its session in the same folder."""
    keys = {role: source.key for role, source in measurement.manifest.inputs.items()}
    return attempts(measurement.path.absolute().parent, measurement.manifest.config, keys)


def attempt_of(measurement: Manifest) -> int:
    return int(measurement.config["attempt"])


def believed(found: Mapping[Path, Manifest]) -> Path:
    """The last trusted attempt, else the last: a rule, so that nobody chooses the one that pleases."""

    def trusted(manifest: Manifest) -> bool:
        try:
            return Measurement.facts_of(manifest).trust == "trusted"
        except ValidationError:
            return False

    return ([path for path, manifest in found.items() if trusted(manifest)] or list(found))[-1]


def believed_beside(measurement: Measurement) -> Measurement:
    """The attempt at the session of ``measurement`` that is to be reported."""
    path = believed(attempts_beside(measurement))
    return measurement if path == measurement.path.absolute() else Measurement.open(path)


def cache_order(config: CacheConfig, dataset: Dataset, teacher: Checkpoint) -> Order[CacheConfig]:
    return Order("cache", config, {"data": dataset, "teacher": teacher})


def train_order(
    config: TrainConfig, dataset: Dataset, teacher: Checkpoint | None, cache: Cache | None = None
) -> Order[TrainConfig]:
    """A training run. A teacher counts only where the method wants one.

    A cache as a run has it by itself is a function of the others and does not count; one whose teacher was asked
    or stored in another way does.
    """
    inputs: dict[str, AnyArtifact] = {"data": dataset}
    if teacher is not None and config.needs_teacher:
        inputs["teacher"] = teacher
        usual = CacheSettings()
        if cache is not None and any(
            cache.manifest.config[name] != getattr(usual, name) for name in ("precision", "top")
        ):
            inputs["cache"] = cache
    return Order("train", config, inputs)


def dataset_of(artifact: AnyArtifact) -> Dataset:
    """The dataset that ``artifact`` was made from, found beside it. Raises UserError."""
    wanted = find_ancestors(artifact.manifest.provenance(), Dataset)
    if not wanted:
        raise UserError(f"{artifact.path} was not made from a dataset: name one with --data")
    found = beside(artifact, Dataset, {wanted[0].key})
    if not found:
        raise UserError(f"no dataset {wanted[0].key[:12]} beside {artifact.path}: name its folder with --data")
    return next(iter(found.values()))


def checkpoints_beside(measurement: Measurement) -> dict[str, Checkpoint]:
    """The checkpoints next to ``measurement`` that share a dataset with it, by folder name without the key."""
    datasets = {found.key for found in find_ancestors(measurement.manifest.provenance(), Dataset)}
    return {
        path.name.rpartition("-")[0]: checkpoint
        for path, checkpoint in sorted(beside(measurement, Checkpoint, None).items())
        if checkpoint.manifest.inputs["data"].key in datasets
    }


def open_checkpoints(paths: Sequence[Path]) -> dict[str, Checkpoint]:
    return {path.name.rpartition("-")[0] or path.name: Checkpoint.open(path) for path in paths}


def beside(artifact: AnyArtifact, kind: type[A], keys: set[str] | None) -> dict[Path, A]:
    """Sealed artifacts of ``kind`` in the same folder (only those with one of ``keys``, if given)."""
    return {
        path: kind.open(path)
        for path, manifest in sealed(artifact.path.absolute().parent)
        if manifest.kind == kind.kind and (keys is None or manifest.key in keys)
    }


def sealed(folder: Path, skip: type[UserError] = OtherVersion) -> Iterator[tuple[Path, Manifest]]:
    """What lies whole in ``folder``, by manifest; not what an upgrade left behind: nothing was made from it.

    Raises:
        UserError: a manifest that cannot be read, unless it is to be skipped.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not (path / MANIFEST).is_file() or path.name.endswith(".part"):
            continue
        try:
            manifest = read_manifest(path)
        except skip:
            continue
        yield path, manifest
