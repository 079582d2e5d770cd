"""A folder of artifacts: finds what is sealed, makes what is not, knows what lies beside what."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from .core.artifact import (
    MANIFEST,
    Artifact,
    Bundle,
    Cache,
    Checkpoint,
    Graph,
    Measurement,
    Model,
    Report,
    artifact_key,
    find_ancestors,
    read_manifest,
    sha256_file,
)
from .core.config import (
    AdoptConfig,
    BenchPlan,
    CacheConfig,
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
    training_inputs,
)
from .core.errors import UserError, choice
from .core.proc import require
from .core.progress import progress
from .data.dataset import Dataset
from .data.fingerprints import fingerprint_folder
from .runtime.probe import flags_of, probe

if TYPE_CHECKING:
    from .report.compression import Sources

A = TypeVar("A", bound=Artifact)
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
        stage: str,
        config: BaseModel,
        inputs: Mapping[str, Artifact],
        make: Callable[[Path], A],
        out: Path | None = None,
        companions: Mapping[Path, str] | None = None,
    ) -> A:
        """The sealed artifact of this stage, configuration and inputs; made now if there is none.

        ``companions``: artifacts that were made now along with another one, and its name.
        """
        key = artifact_key(stage, config, inputs)
        path = out or self.path(name, stage, config, inputs)
        begun = time.monotonic()
        if path.exists():
            artifact, sealed = kind.open(path), True
            if artifact.key != key:
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

    def path(self, name: str, stage: str, config: BaseModel, inputs: Mapping[str, Artifact]) -> Path:
        return self.folder / f"{name}-{artifact_key(stage, config, inputs)[:12]}"

    def data(self, config: DataPlan, out: Path | None = None) -> Dataset:
        if Path(config.source).is_dir():
            fingerprint = fingerprint_folder(Path(config.source), self._memory(config.source))
        else:  # named sources are known by their names
            fingerprint = "by name"
        unlabeled = None
        if config.unlabeled is not None and config.unlabeled.is_dir():
            unlabeled = fingerprint_folder(config.unlabeled, self._memory(str(config.unlabeled)))
        if config.classes is not None and not config.classes.is_file():
            raise UserError(f"data.classes: no file at {config.classes}: wanted a text file with one class a line")
        full = DataConfig.of(
            config,
            fingerprint=fingerprint,
            unlabeled_fingerprint=unlabeled,
            classes_fingerprint=sha256_file(config.classes) if config.classes is not None else None,
        )

        def make(path: Path) -> Dataset:
            require("reading data", (*TRAIN_NEEDS, *(("scikit-learn",) if config.source == "digits" else ())), "train")
            from .data.prepare import prepare

            return prepare(full, path)

        return self.step("data", Dataset, "data", full, {}, make, out)

    def _memory(self, source: str) -> Path:
        name = hashlib.sha256(str(Path(source).absolute()).encode()).hexdigest()[:12]
        return self.folder / ".fingerprints" / f"{name}.json"

    def cache(self, config: CacheConfig, dataset: Dataset, teacher: Checkpoint, out: Path | None = None) -> Cache:
        def make(path: Path) -> Cache:
            require("asking the teacher", TRAIN_NEEDS, "train")
            from .distill.cache import build

            return build(config, dataset, teacher, path)

        return self.step("cache", Cache, "cache", config, {"data": dataset, "teacher": teacher}, make, out)

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

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import train

            return train(config, dataset, teacher, path, cache or self._cache_of(config, dataset, teacher))

        return self.step(name, Checkpoint, "train", config, training_inputs(config, dataset, teacher, cache), make, out)

    def train_all(
        self, configs: Mapping[str, TrainConfig], dataset: Dataset, teacher: Checkpoint | None, together: bool
    ) -> dict[str, Checkpoint]:
        """Every run by name; with ``together`` those that see the same views are trained side by side."""
        made: dict[Path, str] = {}  # by whose step
        paths = {
            self.path(name, "train", config, training_inputs(config, dataset, teacher)): config
            for name, config in configs.items()
        }
        missing = {path: config for path, config in paths.items() if not path.exists()}

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import companions, train_together

            parts = companions(missing, dataset) if together else [{path: missing[path]}]
            part = next(part for part in parts if path in part)
            made.update(dict.fromkeys(part, path.name))
            taught = next((each for each in part.values() if each.needs_teacher), missing[path])
            return train_together(part, dataset, teacher, self._cache_of(taught, dataset, teacher))[path]

        found = {}
        for name, config in configs.items():
            inputs = training_inputs(config, dataset, teacher)
            found[name] = self.step(name, Checkpoint, "train", config, inputs, make, companions=made)
        return found

    def teacher(self, config: TeacherPlan, dataset: Dataset, out: Path | None = None) -> Checkpoint:
        """The user's weights, timm's, or a network trained here on all training images."""
        if config.is_trained:
            return self.train("teacher", TrainConfig.of(config, method="labels"), dataset, None, out)
        if config.checkpoint is not None and not config.checkpoint.is_file():
            raise UserError(f"teacher.checkpoint: no file at {config.checkpoint}: wanted .safetensors or .pth")
        sha256 = sha256_file(config.checkpoint) if config.checkpoint else None
        if config.checkpoint_sha256 not in (None, sha256):
            raise UserError(
                f"teacher.checkpoint: {config.checkpoint} has sha256 {sha256}, wanted {config.checkpoint_sha256}"
            )
        adopted = AdoptConfig.of(config, checkpoint_sha256=sha256)

        def make(path: Path) -> Checkpoint:
            require("reading weights", TRAIN_NEEDS, "train")
            from .distill.train import adopt

            return adopt(adopted, dataset, path)

        return self.step("teacher", Checkpoint, "adopt", adopted, {"data": dataset}, make, out)

    def graph(self, config: GraphConfig, student: Checkpoint, dataset: Dataset) -> Graph:
        """The student as ONNX, made once for every target that starts from it."""
        of_graph = GraphConfig.of(config)

        def make(path: Path) -> Graph:
            from .export.graph import trace

            return trace(of_graph, student, dataset, path)

        inputs = {"student": student, "data": dataset}
        path = self.path("graph", "graph", of_graph, inputs)
        if path not in self._graphs:
            self._graphs[path] = self.step("graph", Graph, "graph", of_graph, inputs, make)
        return self._graphs[path]

    def export(self, config: ExportConfig, student: Checkpoint, dataset: Dataset, out: Path | None = None) -> Model:
        from .export import TARGETS

        if config.target not in TARGETS:
            raise choice("target", config.target, TARGETS)
        from_graph = TARGETS[config.target].source is Graph
        source = self.graph(config, student, dataset) if from_graph else student

        def make(path: Path) -> Model:
            from .export.stage import export

            return export(config, source, dataset, path)

        inputs = {source.kind: source, "data": dataset}
        return self.step(f"{config.target}-float32", Model, "export", config, inputs, make, out)

    def quantize(self, config: QuantizeConfig, model: Model, dataset: Dataset, out: Path | None = None) -> Model:
        machine = probe()
        full = suited(config, machine["machine"], flags_of(machine))

        def make(path: Path) -> Model:
            from .quantize.stage import quantize

            return quantize(full, model, dataset, path, self._nearest(model, Graph), self._teacher_of(model))

        inputs = {"model": model, "data": dataset}
        return self.step(f"{model.facts['target']}-{config.variant}", Model, "quantize", full, inputs, make, out)

    def variants(self, plan: QuantizePlan, model: Model, dataset: Dataset) -> list[Model]:
        """Every variant of the plan that ``model``'s target has; with auto, those that could be the best here."""
        from .quantize import VARIANTS

        flags = flags_of(probe())
        made = []
        for name, kind in VARIANTS[model.facts["target"]].items():
            if kind.suits(model.facts, flags) if plan.variants == "auto" else name in plan.variants:
                made.append(self.quantize(QuantizeConfig.of(plan, variant=name), model, dataset))
        return made

    def _nearest(self, artifact: Artifact, kind: type[A]) -> A | None:
        """The nearest ancestor of ``kind``, if it lies beside ``artifact``."""
        wanted = [found.key for found in find_ancestors(artifact.manifest.provenance(), kind.kind)]
        found = beside(artifact, kind, set(wanted[:1]))
        return next(iter(found.values()), None)

    def _teacher_of(self, model: Model) -> Checkpoint | None:
        """The checkpoint that taught the student of ``model``, if it lies beside it."""
        student = next(iter(find_ancestors(model.manifest.provenance(), Checkpoint.kind)), None)
        if student is None or "teacher" not in student.inputs:
            return None
        return next(iter(beside(model, Checkpoint, {student.inputs["teacher"].key}).values()), None)

    def package(self, config: PackageConfig, model: Model, dataset: Dataset, out: Path | None = None) -> Bundle:
        def make(path: Path) -> Bundle:
            from .deploy.bundle import package

            return package(config, model, dataset, path)

        name = f"bundle-{model.facts['target']}-{model.facts['variant']}"
        return self.step(name, Bundle, "package", config, {"model": model, "data": dataset}, make, out)

    def bench(
        self, config: BenchPlan, bundles: Mapping[str, Bundle], dataset: Dataset, out: Path | None = None
    ) -> Measurement:
        from .devices.session import bench_config

        session = bench_config(config)

        def make(path: Path) -> Measurement:
            from .devices.bench import bench

            return bench(session, bundles, dataset, path)

        return self.step("measurement", Measurement, "bench", session, {**bundles, "data": dataset}, make, out)

    def report(
        self,
        config: ReportConfig,
        measurement: Measurement,
        checkpoints: Mapping[str, Checkpoint],
        out: Path | None = None,
    ) -> Report:
        def make(path: Path) -> Report:
            require("the report", ("jinja2", "matplotlib"), "report")
            from .report.page import report

            return report(config, measurement, checkpoints, sources, path)

        sources = self._sources(measurement)
        inputs = {"measurement": measurement, **checkpoints, **sources.as_inputs()}
        return self.step("report", Report, "report", config, inputs, make, out)

    def _sources(self, measurement: Measurement) -> Sources:
        """Graphs, models and dataset behind ``measurement`` that lie beside it."""
        from .report.compression import Sources

        lineage = measurement.manifest.provenance()
        graphs, models, datasets = (
            beside(measurement, kind, {found.key for found in find_ancestors(lineage, kind.kind)})
            for kind in (Graph, Model, Dataset)
        )
        return Sources(
            {graph.key: graph for graph in graphs.values() if isinstance(graph, Graph)},
            {model.key: model for model in models.values() if isinstance(model, Model)},
            next((dataset for dataset in datasets.values() if isinstance(dataset, Dataset)), None),
        )


def dataset_of(artifact: Artifact) -> Dataset:
    """The dataset that ``artifact`` was made from, found beside it. Raises UserError."""
    wanted = find_ancestors(artifact.manifest.provenance(), Dataset.kind)
    if not wanted:
        raise UserError(f"{artifact.path} was not made from a dataset: name one with --data")
    found = beside(artifact, Dataset, {wanted[0].key})
    if not found:
        raise UserError(f"no dataset {wanted[0].key[:12]} beside {artifact.path}: name its folder with --data")
    return next(iter(found.values()))


def checkpoints_beside(measurement: Measurement) -> dict[str, Checkpoint]:
    """The checkpoints next to ``measurement`` that share a dataset with it, by folder name without the key."""
    datasets = {found.key for found in find_ancestors(measurement.manifest.provenance(), Dataset.kind)}
    return {
        path.name.rpartition("-")[0]: checkpoint
        for path, checkpoint in sorted(beside(measurement, Checkpoint, None).items())
        if checkpoint.manifest.inputs["data"].key in datasets
    }


def open_checkpoints(paths: Sequence[Path]) -> dict[str, Checkpoint]:
    return {path.name.rpartition("-")[0] or path.name: Checkpoint.open(path) for path in paths}


def beside(artifact: Artifact, kind: type[A], keys: set[str] | None) -> dict[Path, A]:
    """Sealed artifacts of ``kind`` in the same folder (only those with one of ``keys``, if given)."""
    found = {}
    for path in artifact.path.absolute().parent.iterdir():
        if (path / MANIFEST).is_file() and not path.name.endswith(".part"):
            manifest = read_manifest(path)
            if manifest.kind == kind.kind and (keys is None or manifest.key in keys):
                found[path] = kind.open(path)
    return found
