"""A folder of artifacts: finds what is sealed, makes what is not, knows what lies beside what."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import ValidationError

from .core import code
from .core.artifact import (
    MANIFEST,
    AnyArtifact,
    Busy,
    Manifest,
    Order,
    OtherVersion,
    find_ancestors,
    forget,
    is_held,
    part_of,
    read_manifest,
    sha256_file,
    tool_versions,
)
from .core.config import (
    ONNX_MODEL,
    WEIGHTS,
    AdoptConfig,
    AdoptFileConfig,
    AdoptFilePlan,
    BenchConfig,
    BenchPlan,
    CacheConfig,
    CacheSettings,
    DataConfig,
    DataPlan,
    DrawConfig,
    ExportConfig,
    FittedConfig,
    GateConfig,
    GatePlan,
    GraphConfig,
    McuConfig,
    ModelSettings,
    PackageConfig,
    QadConfig,
    QuantizeConfig,
    QuantizePlan,
    RandomConfig,
    ReportConfig,
    RestartConfig,
    SampleConfig,
    TeacherPlan,
    TrainConfig,
    suited,
    validated,
)
from .core.config import changed as changed_config
from .core.errors import DeviceLost, GateFailed, KdpipeError, UserError, choice
from .core.inputs import InputSpec, size_words
from .core.kinds import (
    DRAWN,
    Bundle,
    Cache,
    Checkpoint,
    Graph,
    McuCheck,
    Measurement,
    Model,
    Probe,
    Refusal,
    Report,
    Runnable,
    Tuned,
    Verdict,
    VerdictFacts,
    as_name,
)
from .core.proc import end_groups, process_count, require
from .core.progress import note, progress
from .core.remote import Store
from .core.rules import Rule, parse_rules
from .data.copies import are_photographs
from .data.dataset import RANDOM, Dataset, Fitted, geometry
from .data.fingerprints import Fingerprint, fingerprint_folder
from .data.labels import LABELS, check_source, completed
from .data.listing import REMEMBERED
from .data.survey import findings
from .deploy import strange
from .deploy.bundle import check_known, check_task, try_model
from .devices.lock import making
from .networks.names import check_network
from .runtime.preprocess import DECODING
from .runtime.task import TASKS

if TYPE_CHECKING:
    from .deploy.gate import Pair
    from .deploy.sides import Side
    from .quantize.work import Retrained, Training
    from .report.compression import Sources
    from .report.pooled import Pooled

A = TypeVar("A", bound=AnyArtifact)
S = TypeVar("S", bound=ModelSettings)
REPLACED = ".replaced"  # what was set aside to be made again
FETCHED = ".fetched"  # what was named by a URL, each in a folder of its own contents
CELL = "cell-"  # how the name of a study's run begins
PRECISIONS = ".precisions"  # what train.precision auto took, so that a network and its controls take one
TRAIN_NEEDS = ("torch", "torchvision", "timm", "safetensors")
LEARNED = frozenset({Cache.kind, Checkpoint.kind, Tuned.kind})  # is made by reading the images many times
SMALLEST_SIDE, USUAL_SIDE = 256, 512  # pixels: of copies for small networks; of those for networks not known yet
WAIT_SECONDS = 0.2  # between two looks whether another process has made it


class Wants(NamedTuple):
    """What the networks of a recipe want of the images."""

    specs: tuple[InputSpec, ...]
    shorter_side: int  # of the images they learn from, pixels


@dataclass
class Step:
    """One line of what a run did."""

    name: str
    path: Path
    seconds: float
    sealed_before: bool
    along_with: str | None = None  # the artifact in whose time this one was made too
    found: tuple[str, ...] = ()  # of a network: how right it is, in a line or two
    fetched: bool = False  # from the store, now
    place: str = ""  # among the steps of a run, such as 3/31

    def __str__(self) -> str:
        """What it made, how long it took or that it was there already; below it what was found."""
        there = "fetched" if self.fetched else "sealed"
        cost = there if self.sealed_before else "in that" if self.along_with else f"{self.seconds:.1f} s"
        line = f"{self.place}{' ' * bool(self.place)}{self.name:<28} {cost:>8}  {self.path}"
        return "\n    ".join((line, *self.found))


class Course(Protocol):
    """Who knows how many steps a run has, and what is left of them."""

    def begin(self, path: Path) -> str:
        """Where the run is when it begins to make ``path``, in a few words."""

    def end(self, artifact: AnyArtifact, *, made: bool) -> str:
        """The place of the step that gave ``artifact``, such as 3/31; ``made`` now, or found."""

    def fail(self, path: Path, error: KdpipeError) -> None:
        """The step that was to make ``path`` failed."""

    def forgive(self, path: Path) -> None:
        """That it failed is an answer: nothing is missing."""


class Chain:
    """A folder of artifacts, and the steps taken through it so far.

    Artifacts lie at ``folder/NAME-KEY``, KEY being the first 12 digits of the key: the same stage with
    the same configuration and inputs is found again, anything else gets a folder of its own. There is a method a
    command, of the same name and configuration; each takes and returns artifacts, and raises what its stage raises.
    """

    def __init__(
        self,
        folder: Path | str,
        tell: Callable[[Step], object] = lambda _: None,
        allow_code: Iterable[str] = (),
        store: str | None = None,
    ) -> None:
        """Take a folder, which is made when something is first written.

        Args:
            tell: called after each step; ``print`` shows a line or two a step.
            allow_code: what may be run of your own code to make networks, each as ``package.module:factory``.
            store: URL or path of a place that several machines share: what it has is fetched, what is made is pushed.
                Not by the processes of torchrun, who would have to agree: what they made is pushed by who finds it.
        """
        self.folder = Path(folder)
        self.tell = tell
        self.allow_code = tuple(allow_code)
        self.steps: list[Step] = []
        self.store = None if store is None or process_count() > 1 else Store(store)
        self._fetched: set[Path] = set()
        # Called once, before the first step that is not sealed: mistakes are told before any work.
        self.check: Callable[[], None] = lambda: None
        self.course: Course | None = None  # of a run, which knows what is still to come
        self.student = ""  # whose steps these are, where a run exports several
        self.smoke = False  # whether what is made here only shows that it can be made
        self.remembered = self.folder  # where the hashes of images are remembered
        self._graphs: dict[Path, Graph] = {}  # opened once for all the targets of a run
        self._told: set[str] = set()  # of the parts of folders
        self._looked_at: set[str] = set()  # keys of data sets whose folder holds what it held when they were made

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

        Args:
            name: of the folder, before the key.
            make: writes it to a path; called only if there is none.
            out: the path, where it is not to lie beside the others.
            companions: artifacts that were made now along with another one, and its name.

        What another process is making now is waited for. What is made waits until nobody measures this host.

        Raises:
            UserError: what lies at ``out`` was made from something else; what ``check`` raises, before any work.
            KdpipeError: as ``make`` does.
        """
        path = out or self.path(name, order)
        begun = time.monotonic()
        try:
            made = None
            if not self._is_there(name, kind, order, path):
                if kind.kind in LEARNED and isinstance(dataset := order.inputs.get("data"), Dataset):
                    self._look_again(dataset)
                made = self._make(name, kind, make, path)
        except KdpipeError as error:
            if self.course and not error.stops_all:  # what is wrong with the recipe is no failure of this leg
                self.course.fail(path, error)
            raise
        artifact = kind.open(path) if made is None else made
        if artifact.key != order.key:
            raise UserError(f"{path} was made from other settings or inputs: choose another --out")
        sealed = made is None
        along_with = (companions or {}).get(path) if sealed else None
        seconds = time.monotonic() - begun
        told = f"{self.student} {name}" if self.student else name
        found = () if self.smoke else found_of(artifact)
        step = Step(told, path, seconds, sealed and along_with is None, along_with, found)
        step.fetched = path in self._fetched
        self._share(name, order, artifact)
        if self.course:
            step.place = self.course.end(artifact, made=not step.sealed_before)
        self.steps.append(step)
        self.tell(step)
        return artifact

    def _make(self, name: str, kind: type[A], make: Callable[[Path], A], path: Path) -> A | None:
        """What ``make`` makes; None where another process made it meanwhile."""
        check, self.check = self.check, lambda: None
        told = self.course.begin(path) if self.course else ""
        # The bar is seen while libraries are being imported.
        with progress(f"{name} ({told})" if told else name, 1), code.allowing(self.allow_code):
            try:
                check()
            except KdpipeError as error:
                error.stops_all = True
                raise
            while not path.exists():
                try:
                    with contextlib.nullcontext() if kind is Measurement else making():
                        return make(path)
                except Busy as busy:
                    if path.exists():
                        break
                    if process_count() > 1:  # the others of torchrun would wait for this one in vain
                        raise
                    _wait_for(busy.out)
        return None

    def path(self, name: str, order: Order[Any], attempt: int | None = None) -> Path:
        """Where the artifact of ``order`` lies; of an event, which attempt at it."""
        return self.place(name, order.key, attempt)

    def place(self, name: str, key: str, attempt: int | None = None) -> Path:
        """As ``path``, for the key of an order."""
        return self.folder / (f"{name}-{key[:12]}" + ("" if attempt is None else f"-{attempt}"))

    def _is_there(self, name: str, kind: type[A], order: Order[Any], path: Path) -> bool:
        """Whether an artifact lies at ``path``; it is fetched from the store, if that has it.

        Not an event, nor what is made from one: under the same key there is another machine's.
        """
        of_event = any(source.kind == Measurement.kind for source in order.inputs.values())
        if path.exists() or self.store is None or kind is Measurement or of_event:
            return path.exists()
        try:
            if self.store.fetch(self.path(name, order).name, path, kind, order.key):
                self._fetched.add(path)
        except Busy as busy:
            _wait_for(busy.out)
        return path.exists()

    def _share(self, name: str, order: Order[Any], artifact: AnyArtifact) -> None:
        """Push what the store may lack; of an event every attempt, for those who name it."""
        if self.store is not None and artifact.path not in self._fetched:
            event = isinstance(artifact, Measurement)
            self.store.push(artifact.path.name if event else self.path(name, order).name, artifact.path)

    def set_aside(self, keys: Collection[str]) -> list[Path]:
        """Move the artifacts of ``keys`` and all that came from them out of sight, into ``.replaced``; returns which.

        What was made from something goes before it, so that a kill leaves nothing that came from what is made anew.
        """
        found = [
            (manifest.depth, path)
            for path, manifest in sealed(self.folder, skip=UserError)
            if not manifest.lineage_keys.isdisjoint(keys)
        ]
        if not found:
            return []
        aside = self.folder / REPLACED / datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
        aside.mkdir(parents=True)
        moved = [path for _, path in sorted(found, reverse=True)]
        for path in moved:
            with contextlib.suppress(FileNotFoundError):  # another process moves the same
                path.rename(aside / path.name)
        return moved

    def data(self, plan: DataPlan, out: Path | None = None, wants: Callable[[], Wants] | None = None) -> Dataset:
        """The images of a source, checked and split.

        Args:
            wants: says what the networks of a recipe want, so that each file is decoded once for all of them; asked
                only where images are to be stored.
        """
        order = self.data_order(plan, wants)
        side = order.config.copies_side

        def make(path: Path) -> Dataset:
            made_here = plan.source == LABELS[plan.task].demo
            wanted = (*TRAIN_NEEDS, *(("scikit-learn",) if made_here else ()))
            require("reading data", wanted, "train")
            from .data.prepare import prepare

            later = side is not None and wants is not None
            return prepare(order, path, held_out_later=later, memory_of=lambda folder: self._memory(str(folder)))

        dataset = self.step("data", Dataset, order, make, out)
        self._tell_findings(plan, dataset)
        self._looked_at.add(dataset.key)
        return dataset if side is None or wants is None else self.fitted(dataset, wants().specs)

    def data_order(self, plan: DataPlan, wants: Callable[[], Wants] | None = None) -> Order[DataConfig]:
        """What reading that source is told, with the hash of what it holds now."""
        if plan.task not in TASKS:
            raise choice("task", plan.task, TASKS)
        check_source(plan)
        if plan.classes is not None and not plan.classes.is_file():
            raise UserError(f"data.classes: no file at {plan.classes}: wanted a text file with one class a line")
        if plan.palette is not None and not plan.palette.is_file():
            raise UserError(
                f"data.palette: no file at {plan.palette}: wanted a text file with a colour and a class a line"
            )
        if plan.skip_broken and plan.check != "all":
            raise UserError("data.skip_broken wants data.check all: what is not looked at cannot be left out")
        fingerprint, unlabeled = Fingerprint(LABELS[plan.task].known_by, 0, ()), None  # a named source, by its name
        if is_folder := Path(plan.source).is_dir():
            plan = plan.model_copy(update={"source": str(Path(plan.source).absolute())})
        plan, lines = completed(plan)
        for line in lines:  # once, however often the same is asked
            if line not in self._told:
                self._told.add(line)
                note(line)
        if is_folder:
            fingerprint = self._contents(plan)
        if plan.unlabeled is not None and plan.unlabeled.is_dir():
            unlabeled = self._contents_unlabeled(plan.unlabeled)
        may_be_copies = [fingerprint.digests, *([] if unlabeled is None else [unlabeled.digests])]
        side = self._copies_side(plan, fingerprint, wants)
        config = DataConfig.of(
            plan,
            decoding=DECODING,
            copies_side=side,
            versions={} if side is None else versions_of("pillow"),
            fingerprint=fingerprint.sha256,
            unlabeled_fingerprint=None if unlabeled is None else unlabeled.sha256,
            classes_fingerprint=sha256_file(plan.classes) if plan.classes is not None else None,
            palette_fingerprint=sha256_file(plan.palette) if plan.palette is not None else None,
            held_out_copies=_held_out_copies(plan.duplicates, may_be_copies if is_folder else None),
        )
        return Order("data", config, {})

    def _look_again(self, dataset: Dataset) -> None:
        """See, once, that a user's folder still holds the images that ``dataset`` was made of; copies are its own.

        What is remembered of each image makes this a look at its size and time.

        Raises:
            UserError: it holds others; also where images came or went.
        """
        config = dataset.manifest.config
        has_its_own = dataset.manifest.stage != "data" or dataset.facts.copies is not None  # a sample has no folder
        if has_its_own or dataset.facts.source == RANDOM or dataset.key in self._looked_at:
            return
        kept = {name: config[name] for name in DataPlan.model_fields if name in config}
        manifest = str(dataset.path / MANIFEST)
        plan = validated(DataPlan, {"val_split": None, **kept}, manifest)  # no val_split where there is none
        found: dict[str, tuple[Path, Fingerprint]] = {}
        if Path(plan.source).is_absolute() and Path(plan.source).is_dir():  # a named source is no path
            found["fingerprint"] = (Path(plan.source), self._contents(plan))
        if plan.unlabeled is not None and plan.unlabeled.is_dir():
            found["unlabeled_fingerprint"] = (plan.unlabeled, self._contents_unlabeled(plan.unlabeled))
        for name, (folder, contents) in found.items():
            if contents.sha256 != config.get(name):
                raise UserError(
                    f"{folder} holds other images than when {dataset.path} was made of it: wanted the same to learn "
                    "from; 'kdpipe data' reads the folder as it is now"
                )
        self._looked_at.add(dataset.key)

    def _contents(self, plan: DataPlan) -> Fingerprint:
        """What the folder that is the source holds now, of what is read of it. Raises UserError."""
        return fingerprint_folder(Path(plan.source), self._memory(plan.source), LABELS[plan.task].names(plan))

    def _contents_unlabeled(self, folder: Path) -> Fingerprint:
        return fingerprint_folder(folder, self._memory(str(folder)))

    def _tell_findings(self, plan: DataPlan, dataset: Dataset) -> None:
        """Say what a person should know of images that were looked at just now. Raises UserError."""
        survey = dataset.survey
        if survey is None:
            return
        if plan.skip_broken and survey.check != "all":
            raise UserError(
                f"{dataset.path} was made with data.check {survey.check}, so that broken images may be in it: "
                "remove it, and the same command makes it anew"
            )
        if not self.steps[-1].sealed_before:
            for line in findings(survey, dataset.classes):
                note(f"data: {line}")
        elif survey.left_out:
            note(f"data: images that cannot be read were left out when it was made: {survey.left_out}")

    def _copies_side(self, plan: DataPlan, fingerprint: Fingerprint, wants: Callable[[], Wants] | None) -> int | None:
        """Shorter side of the copies to learn from, or None for no copies."""
        if plan.store == "none" or (plan.store == "auto" and not are_photographs(fingerprint.sample, SMALLEST_SIDE)):
            return None
        side = plan.store_side or (USUAL_SIDE if wants is None else wants().shorter_side)
        return side if plan.store == "resized" or are_photographs(fingerprint.sample, side) else None

    def fitted(self, dataset: Dataset, specs: Iterable[InputSpec]) -> Dataset:
        """``dataset`` with what networks of these inputs are shown of its held-out images, decoded once for all."""
        orders: dict[str, Order[FittedConfig]] = {}
        for spec in specs:
            if geometry(spec.model_dump()) in dataset.fitted:
                continue
            orders[geometry(spec.model_dump())] = Order("fitted", fitted_config(spec), {"data": dataset})
        names = {shown: f"fitted-{size_words(order.config.size)}" for shown, order in orders.items()}
        paths = {shown: self.path(names[shown], order) for shown, order in orders.items()}
        missing = {
            paths[shown]: order
            for shown, order in orders.items()
            if not self._is_there(names[shown], Fitted, order, paths[shown])
        }
        made: dict[Path, str] = {}
        kept = dict(dataset.fitted)

        def make(path: Path) -> Fitted:
            from .data.copies import fit_all

            made.update(dict.fromkeys(missing, path.name))
            return fit_all(missing, dataset)[path]

        for shown, order in orders.items():
            kept[shown] = self.step(names[shown], Fitted, order, make, paths[shown], made)
        return dataclasses.replace(dataset, fitted=kept)

    def shown(self, dataset: Dataset, network: ModelSettings) -> Dataset:
        """``dataset`` with what that network is shown of the held-out images, where files are to be decoded once."""
        if dataset.facts.copies is None:
            return dataset
        from .distill.ranks import join
        from .networks.models import input_spec

        ranks = join()
        fitted = self.fitted(dataset, [input_spec(network)]) if ranks.leads else dataset
        ranks.from_leader(None)  # until it is sealed
        return fitted if ranks.leads else with_fitted(dataset)

    def _memory(self, source: str) -> Path:
        name = hashlib.sha256(str(Path(source).absolute()).encode()).hexdigest()[:12]
        return self.remembered / REMEMBERED / f"{name}.sqlite"

    def cache(self, config: CacheConfig, dataset: Dataset, teacher: Checkpoint, out: Path | None = None) -> Cache:
        """What the teacher says of so many views of every image."""
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

    def distill(
        self,
        config: TrainConfig,
        dataset: Dataset,
        teacher: Checkpoint | None,
        out: Path | None = None,
        cache: Cache | None = None,
    ) -> Checkpoint:
        """One student; without a teacher by the labels alone. ``cache``: one that lies elsewhere (see ``train``)."""
        return self.train(f"student-{config.method}-seed{config.seed}", config, dataset, teacher, out, cache)

    def train(
        self,
        name: str,
        config: TrainConfig,
        dataset: Dataset,
        teacher: Checkpoint | None,
        out: Path | None = None,
        cache: Cache | None = None,
    ) -> Checkpoint:
        """A network under this name; with ``cache`` from that one, which lies elsewhere than among the artifacts."""
        check_network(config)
        order = train_order(config, dataset, teacher, cache)

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import train

            remembered = cache or self._cache_of(config, dataset, teacher)
            shown = self.shown(dataset, config)
            return train(order, shown, teacher, path, remembered, self.folder / PRECISIONS)

        return self.step(name, Checkpoint, order, make, out)

    def train_all(
        self,
        configs: Mapping[str, TrainConfig],
        dataset: Dataset,
        teacher: Checkpoint | None,
        together: bool,
        failed: dict[str, KdpipeError] | None = None,
    ) -> dict[str, Checkpoint]:
        """Every run by name; with ``together`` those that see the same views are trained side by side.

        Args:
            failed: takes why a run failed, which the others go on without; None: the first failure is raised.
        """
        made: dict[Path, str] = {}  # by whose step
        orders = {name: train_order(config, dataset, teacher) for name, config in configs.items()}
        paths = {self.path(name, order): order for name, order in orders.items()}
        tried: dict[Path, KdpipeError | None] = {}  # what failed among others, and why if that is known
        for name, order in orders.items():  # none of those that are made together is in the store
            self._is_there(name, Checkpoint, order, self.path(name, order))

        def make(path: Path) -> Checkpoint:
            require("training", TRAIN_NEEDS, "train")
            from .distill.train import companions, train_together

            if (known := tried.get(path)) is not None:
                raise known
            missing = {each: order for each, order in paths.items() if each not in tried and not each.exists()}
            missing[path] = paths[path]
            parts = companions(missing, dataset) if together and path not in tried else [{path: missing[path]}]
            part = next(part for part in parts if path in part)
            made.update(dict.fromkeys(part, path.name))
            taught = next((each for each in part.values() if each.config.needs_teacher), missing[path])
            remembered = self._cache_of(taught.config, dataset, teacher)
            try:
                return train_together(part, dataset, teacher, remembered, self.folder / PRECISIONS)[path]
            except KdpipeError as error:
                if isinstance(error, Busy) or error.stops_all:
                    raise
                left = [each for each in part if not each.exists()]
                tried.update(dict.fromkeys(left, error if len(left) == 1 else None))
                if failed is None or path in left:
                    raise
                return Checkpoint.open(path)  # another one of them failed, and says so in its own step

        found: dict[str, Checkpoint] = {}
        for name, order in orders.items():
            with tolerated(name, failed):
                found[name] = self.step(name, Checkpoint, order, make, companions=made)
        return found

    def teacher(
        self, plan: TeacherPlan, dataset: Dataset, out: Path | None = None, name: str = "teacher"
    ) -> Checkpoint:
        """The user's weights, timm's, or a network trained here on all training images."""
        check_network(plan)
        if plan.start != "trained":
            return self._restarted(plan, dataset, out)
        if plan.is_trained:
            return self.train("teacher", plan.training(), dataset, None, out)
        order = Order("adopt", adopt_config(plan), {"data": dataset})

        def make(path: Path) -> Checkpoint:
            require("reading weights", TRAIN_NEEDS, "train")
            from .distill.train import adopt

            return adopt(order, self.shown(dataset, plan), path)

        return self.step(name, Checkpoint, order, make, out)

    def _restarted(self, plan: TeacherPlan, dataset: Dataset, out: Path | None) -> Checkpoint:
        """A teacher with random weights, in its head or altogether."""
        trained = self.teacher(plan.model_copy(update={"start": "trained"}), dataset) if has_body(plan) else None
        order = restart_order(plan, dataset, trained)

        def make(path: Path) -> Checkpoint:
            require("making a network", TRAIN_NEEDS, "train")
            from .distill.train import restart

            return restart(order, self.shown(dataset, plan), trained, path)

        return self.step(restart_name(plan), Checkpoint, order, make, out)

    def sample(self, config: SampleConfig, dataset: Dataset) -> Dataset:
        """A few of a data set's images, to make networks with that nobody judges."""
        order = Order("sample", config, {"data": dataset})

        def make(path: Path) -> Dataset:
            from .data.sample import sample

            return sample(order, dataset, path)

        return self.step("sample", Dataset, order, make)

    def draw(self, config: DrawConfig, dataset: Dataset) -> Checkpoint:
        """A network of random weights, not degenerate ones: what it takes to run can be told before it is trained."""
        check_network(config)
        order = Order("draw", with_code(config), {"data": dataset})

        def make(path: Path) -> Checkpoint:
            require("making networks", TRAIN_NEEDS, "train")
            from .distill.train import draw

            return draw(order, dataset, path)

        return self.step(f"drawn-{as_name(config.encoder or config.model)}", Checkpoint, order, make)

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
        """The student for one target, in float32, compared with torch."""
        from .export import TARGETS

        if config.target not in TARGETS:
            raise choice("target", config.target, TARGETS)
        if student.settings["model"] == ONNX_MODEL:
            raise UserError(f"{student.path} is an ONNX file as it came, and only teaches: see kdpipe adopt")
        from_graph = TARGETS[config.target].source is Graph
        return self._export(config, self.graph(config, student, dataset) if from_graph else student, dataset, out)

    def adopt(self, plan: AdoptFilePlan, file: Path, dataset: Dataset, out: Path | None = None) -> Model:
        """Somebody's ONNX file for one target, in float32: a graph that takes raw colours, like any other from then on.

        Raises:
            UserError: what is no float32 ONNX of one image, cannot be run, or is of other classes than the data's.
            GateFailed: the graph or the target's file computes something else.
        """
        from .export import TARGETS

        if plan.target not in TARGETS:
            raise choice("target", plan.target, TARGETS)
        if TARGETS[plan.target].source is not Graph:
            able = ", ".join(name for name, target in TARGETS.items() if target.source is Graph)
            raise UserError(f"target '{plan.target}' is made from torch, not from ONNX: wanted {able}")
        if file.suffix != ".onnx":
            raise UserError(f"{file}: wanted an .onnx file; other models are measured as they are: kdpipe bench {file}")
        if not file.is_file():
            raise UserError(f"no file at {file}: wanted an .onnx file")
        if plan.output != "logits":
            raise UserError(f"output '{plan.output}': a file gives what it gives, leave it out")
        from .export.adopt import adopt, input_of
        from .export.onnx import NEEDS

        require("ONNX", NEEDS, "onnxruntime")
        spec = input_of(file, plan.input)
        config = AdoptFileConfig.of(plan, sha256={Graph.ONNX: sha256_file(file)}, input=spec)
        order = Order("adopt", config, {"data": dataset})

        def make(path: Path) -> Graph:
            with tempfile.TemporaryDirectory() as scratch:  # opened in a process of its own first
                wrapped = strange.wrap(file, Path(scratch) / "model", spec, dataset)
                try:
                    try_model(wrapped)
                except GateFailed as error:
                    raise UserError(str(error).replace(str(wrapped.path), str(file))) from None
            return adopt(order, file, dataset, path)

        return self._export(plan, self.step("graph", Graph, order, make), dataset, out)

    def bare(self, plan: AdoptConfig, classes: int | None, images: int) -> tuple[Checkpoint, Dataset]:
        """A network as it comes, and random images in place of a data set: only its parity can be told on them.

        Args:
            classes: its outputs; None for those of its pretrained weights.
        """
        require("making networks", TRAIN_NEEDS, "train")
        if plan.encoder is not None:
            raise UserError(
                f"'{plan.model}' draws masks, which random images have none of: wanted a data set of masks; kdpipe "
                "teacher DATA with the same options, then kdpipe export of what it makes"
            )
        from .data.random import random_images
        from .networks.models import input_spec, pretrained_classes

        size = input_spec(plan).size
        config = RandomConfig(size=size, images=images, classes=classes or pretrained_classes(plan.model))
        order = Order("data", config, {})
        teacher = TeacherPlan.of(plan)
        if teacher.is_trained:
            raise UserError(f"'{plan.model}' would have random weights: wanted --pretrained or --checkpoint FILE")
        dataset = self.step("random", Dataset, order, lambda path: random_images(order, path))
        return self.teacher(teacher, dataset, name="network"), dataset

    def _export(
        self, config: ExportConfig, source: Checkpoint | Graph, dataset: Dataset, out: Path | None = None
    ) -> Model:
        config = ExportConfig.of(config)
        order = Order("export", config, {source.kind: source, "data": dataset})

        def make(path: Path) -> Model:
            from .export.stage import export

            return export(order, source, dataset, path)

        return self.step(f"{config.target}-float32", Model, order, make, out)

    def quantize(
        self, config: QuantizeConfig, model: Model, dataset: Dataset, device: Probe, out: Path | None = None
    ) -> Model:
        """One variant for that device, which decides what the configuration leaves to it."""
        check_known(model)
        return self._quantize(suited(config, device.machine, device.known_flags), model, dataset, out)

    def _quantize(
        self,
        config: QuantizeConfig,
        model: Model,
        dataset: Dataset,
        out: Path | None = None,
        refused: Path | None = None,
    ) -> Model:
        """As ``quantize``, with what is told for a device; ``refused``: where it is sealed that the variant is."""
        order = Order("quantize", config, {"model": model, "data": dataset})
        name = f"{model.facts.target}-{config.variant}"
        there = self._is_there(name, Model, order, out or self.path(name, order))
        training = None if there or not is_trained(model, config) else self._trained(config, model, dataset)

        def make(path: Path) -> Model:
            from .export import TARGETS
            from .quantize.stage import quantize, refuse

            self._try(model)
            check = TARGETS[model.facts.target].check
            graph, teacher = self._graph_of(model), self._teacher_of(model)
            try:
                return quantize(order, model, dataset, path, check, graph, teacher, training)
            except GateFailed as error:
                if refused is not None and not refused.exists():
                    refuse(order, model, error, refused)
                    forget(path)  # nobody goes on with it
                raise

        return self.step(name, Model, order, make, out)

    def _trained(self, config: QuantizeConfig, model: Model, dataset: Dataset) -> Training:
        """What the student of ``model`` becomes by training for 8 bits, and its control.

        Trained once for all targets whose files quantise alike; like a cache, a function of settings, student and data.

        Raises:
            UserError: no student to train, or no teacher where it is learned from; as training does.
        """
        from .quantize import VARIANTS
        from .quantize.trained import is_symmetric, weight_levels
        from .quantize.work import Training

        kind = VARIANTS[model.facts.target][config.variant]
        require(f"{config.variant} for '{model.facts.target}'", kind.needs, model.facts.target)
        ancestor = next(iter(find_ancestors(model.manifest.provenance(), Checkpoint)), None)
        if ancestor is None:
            raise UserError(
                f"{config.variant} trains the student, and {model.path} came as an ONNX file: wanted a model that was "
                "exported from a checkpoint"
            )
        student = self._at_hand(model, Checkpoint, ancestor.key, "student")
        if student is None:
            raise UserError(
                f"{config.variant} trains the student, and the checkpoint {ancestor.key[:12]} that {model.path} was "
                "exported from is not beside it: put it there"
            )
        exported = ExportConfig.model_validate(model.manifest.config)
        graph = self._graph_of(model) or self.graph(GraphConfig.of(exported), student, dataset)
        symmetric, levels = is_symmetric(kind, config), weight_levels(kind, config)
        usual = {"calibrate": config.calibrate, "symmetric": False, "weight_levels": 127}
        own = QadConfig.of(config.qad, **usual | {"symmetric": symmetric, "weight_levels": levels}, quantized=True)
        name = "qad" + "-symmetric" * symmetric + "-7-bit" * (levels < 127)

        def became(name: str, settings: QadConfig) -> Retrained:
            tuned = self._tuned(name, settings, model, student, graph, dataset)
            return self._written(name, exported, tuned, dataset)

        return Training(became(name, own), became("qad-control", QadConfig.of(config.qad, **usual, quantized=False)))

    def _tuned(
        self, name: str, config: QadConfig, model: Model, student: Checkpoint, graph: Graph, dataset: Dataset
    ) -> Tuned:
        inputs: dict[str, AnyArtifact] = {"data": dataset, "student": student}
        teacher = self._teacher_of(model) if config.learn_from == "teacher" else None
        if teacher is not None:
            inputs["teacher"] = teacher
        elif config.learn_from == "teacher":
            raise UserError(
                f"quantize.qad.learn_from: the teacher of {model.path} is not beside it: put it there, or student"
            )
        order = Order("tune", config, inputs)

        def make(path: Path) -> Tuned:
            from .distill.train import answers
            from .quantize.training import learned_images, trained_as, tune

            say = None
            if teacher is not None:
                run, images = trained_as(student), learned_images(config, student, dataset).numbers
                cache = None if run is None else self._cache_of(run, dataset, teacher)
                say = answers(teacher, run, student.facts.input, images, dataset, cache)
            return tune(order, student, graph, dataset, path, say)

        return self.step(name, Tuned, order, make)

    def _written(self, name: str, config: ExportConfig, tuned: Tuned, dataset: Dataset) -> Retrained:
        """What was tuned as its target is made from it: as ONNX, or where that is made from torch itself in float32."""
        from .export import TARGETS
        from .quantize.work import Retrained

        if TARGETS[config.target].source is Graph:
            # Its accuracy by hop is nobody's question.
            traced = Order("graph", GraphConfig.of(config, hop_images=1), {"student": tuned, "data": dataset})

            def make_graph(path: Path) -> Graph:
                from .export.graph import trace

                return trace(traced, tuned, dataset, path)

            return Retrained(tuned, self.step(f"graph-{name}", Graph, traced, make_graph))
        order = Order("export", config, {tuned.kind: tuned, "data": dataset})

        def make_model(path: Path) -> Model:
            from .export.stage import export

            return export(order, tuned, dataset, path)

        return Retrained(tuned, model=self.step(f"{config.target}-float32-{name}", Model, order, make_model))

    def _unless_refused(self, config: QuantizeConfig, model: Model, dataset: Dataset) -> Model | None:
        """A variant, or None and a line where it is refused: now, or before, which is known without trying again."""
        key = Order("quantize", config, {"model": model, "data": dataset}).key
        name = f"{model.facts.target}-{config.variant}"
        if (refusal := self.refusal(name, key)) is not None:
            note(f"{refusal.facts} (refused before: --again quantize tries it again)")
            return None
        try:
            return self._quantize(config, model, dataset, refused=self.place(Refusal.name_of(name), key))
        except GateFailed as error:
            note(f"{model.facts.target} goes without {config.variant}: {error}")
            if self.course:
                self.course.forgive(self.place(name, key))
            return None

    def refusal(self, name: str, key: str) -> Refusal | None:
        """That an earlier run found the variant of this name and key refused, if it is not there all the same."""
        path = self.place(Refusal.name_of(name), key)
        return None if self.place(name, key).exists() or not path.exists() else Refusal.open(path)

    def variants(self, plan: QuantizePlan, model: Model, dataset: Dataset, device: Probe) -> list[Model]:
        """Every variant of the plan that ``model``'s target has; with auto, those that could be the best there.

        One that is refused is left out where nobody named it, and that is sealed: the next run does not try it again.

        Raises:
            GateFailed: a named one is refused.
        """
        return self.variants_of(plan, model, dataset, {"": device})[""]

    def variants_of(
        self,
        plan: QuantizePlan,
        model: Model,
        dataset: Dataset,
        devices: Mapping[str, Probe],
        failed: dict[str, KdpipeError] | None = None,
    ) -> dict[str, list[Model]]:
        """For each device its ``variants``; what several want in the same way is made once.

        Args:
            failed: takes why a variant failed, which the others go on without; None: the first failure is raised.
        """
        from .quantize import VARIANTS

        check_known(model)
        made: dict[QuantizeConfig, Model | None] = {}
        found: dict[str, list[Model]] = {device: [] for device in devices}
        for device, probe in devices.items():
            for name, kind in VARIANTS[model.facts.target].items():
                if not (
                    kind.suits(model.facts, probe.known_flags) if plan.variants == "auto" else name in plan.variants
                ):
                    continue
                config = suited(QuantizeConfig.of(plan, variant=name), probe.machine, probe.known_flags)
                if config not in made:
                    made[config] = None
                    with tolerated(f"{model.facts.target}-{name}", failed):
                        if plan.variants == "auto":
                            made[config] = self._unless_refused(config, model, dataset)
                        else:
                            made[config] = self._quantize(config, model, dataset)
                variant = made[config]
                if variant is not None:
                    found[device].append(variant)
        return found

    def _graph_of(self, model: Model) -> Graph | None:
        """The graph that ``model`` was made from, if it lies beside it or in the store."""
        graph = next(iter(find_ancestors(model.manifest.provenance(), Graph)), None)
        return None if graph is None else self._at_hand(model, Graph, graph.key, "graph")

    def _teacher_of(self, model: Model) -> Checkpoint | None:
        """The checkpoint that taught the student of ``model``, if it lies beside it or in the store."""
        student = next(iter(find_ancestors(model.manifest.provenance(), Checkpoint)), None)
        if student is None or "teacher" not in student.inputs:
            return None
        return self._at_hand(model, Checkpoint, student.inputs["teacher"].key, "teacher")

    def _at_hand(self, artifact: AnyArtifact, kind: type[A], key: str, name: str) -> A | None:
        """What lies beside ``artifact`` with this key; else what the store has of it under this name."""
        found = beside(artifact, kind, {key})
        path = self.place(name, key)
        if not found and self.store is not None and self.store.fetch(path.name, path, kind, key):
            return kind.open(path)
        return next(iter(found.values()), None)

    def _try(self, model: Model) -> None:
        """Open a model in another process first, unless it was made here and now. Raises KdpipeError."""
        if not any(step.path == model.path and not step.sealed_before for step in self.steps):
            try_model(model)

    def package(self, config: PackageConfig, model: Model, dataset: Dataset, out: Path | None = None) -> Bundle:
        check_known(model)
        order = Order("package", config, {"model": model, "data": dataset})

        def make(path: Path) -> Bundle:
            from .deploy.bundle import package

            self._try(model)
            return package(order, model, dataset, path)

        return self.step(f"bundle-{model.facts.target}-{model.facts.variant}", Bundle, order, make, out)

    def check_mcu(
        self, config: McuConfig, bundle: Bundle, dataset: Dataset | None = None, out: Path | None = None
    ) -> McuCheck:
        """The bundle held against a microcontroller, on its golden images and on test images of ``dataset``.

        Raises:
            UserError: as ``deploy.micro.check``.
            GateFailed: an interpreter cannot run it. What goes beyond a limit is sealed, and no error here.
        """
        from .deploy import micro

        micro.check_ready(config, bundle, dataset)
        inputs: dict[str, AnyArtifact] = {"bundle": bundle, **({"data": dataset} if dataset else {})}
        order = Order("check", config, inputs)

        def make(path: Path) -> McuCheck:
            return micro.check(order, bundle, dataset, path)

        return self.step("mcu-check", McuCheck, order, make, out)

    def bench(
        self,
        plan: BenchPlan,
        bundles: Mapping[str, Runnable] | Mapping[str, Mapping[str, Runnable]],
        dataset: Dataset | None,
        out: Path | None = None,
        again: bool = True,
        resume: bool = False,
    ) -> Benched:
        """Measure on every device of the plan, side by side: each session is an attempt, ``NAME-KEY-ATTEMPT``.

        KEY is that of the session. A device that is lost, or on which nothing runs, leaves the others' results whole.

        Args:
            bundles: by name, the same for all devices; or for each device its own. Models of somebody else's too.
            dataset: None times models on random input (see ``strange``).
            again: as many new sessions as the plan says; False measures only what is lacking of them.
            resume: only what a device lacks of the sessions that the others have.

        Raises:
            UserError: ``out`` exists or would be of several, or an unknown device.
            KdpipeError: as ``devices.bench`` does, where no device is left.
        """
        from .devices.session import bench_config, swept

        own = {device: swept(_of_device(bundles, device), plan.threads) for device in plan.devices}
        for bundle in {bundle.key: bundle for its in own.values() for bundle in its.values()}.values():
            check_known(bundle)
        if out is not None and (len(own) > 1 or plan.sessions > 1):
            raise UserError("--out names one measurement: several devices or sessions lie beside the bundles")
        if out is not None and out.exists():
            raise UserError(f"{out} exists already: each measurement gets a folder of its own, choose another --out")
        benched = Benched()
        sessions: dict[str, Order[BenchConfig]] = {}
        earlier: dict[str, dict[Path, Manifest]] = {}

        def described(device: str) -> BenchConfig | DeviceLost:
            try:
                return bench_config(plan, device)
            except DeviceLost as error:
                return error

        with ThreadPoolExecutor(len(own)) as pool:  # one that is slow, or off, keeps nobody waiting
            try:
                described_by_device = dict(zip(own, pool.map(described, own), strict=True))
            except BaseException:
                end_groups()
                raise
        for device, its in own.items():
            found = described_by_device[device]
            if isinstance(found, DeviceLost):
                benched.lost[device] = found
                continue
            inputs: dict[str, AnyArtifact] = {**its, **({} if dataset is None else {"data": dataset})}
            session = Order("bench", found, inputs)
            keys = {role: artifact.key for role, artifact in session.inputs.items()}
            config = session.config.model_dump(mode="json")
            earlier[device] = attempts(out.parent if out else self.folder, config, keys)
            sessions[device] = session
        done = {device: max(map(attempt_of, found.values()), default=0) for device, found in earlier.items()}
        goal = max(plan.sessions, *done.values()) if resume and done else plan.sessions
        goals = {device: done[device] + plan.sessions if again and not resume else goal for device in sessions}
        for device, session in sessions.items():
            if done[device] >= goals[device]:
                taken = believed(earlier[device])
                order = attempt_order(session, attempt_of(earlier[device][taken]))
                benched.measured[device] = [self.step("measurement", Measurement, order, Measurement.open, taken)]
        with tempfile.TemporaryDirectory() as host_folder:
            lacking = {device: range(done[device] + 1, goals[device] + 1) for device in sessions}
            for at in range(max(map(len, lacking.values()), default=0)):  # side by side, whatever was measured before
                turn = {
                    out or self.path("measurement", sessions[device], its[at]): (
                        attempt_order(sessions[device], its[at]),
                        own[device],
                    )
                    for device, its in lacking.items()
                    if at < len(its) and device not in benched.lost
                }
                self._measure(turn, dataset, Path(host_folder), benched)
        if not benched.measured:
            raise next(iter(benched.lost.values()))
        return benched

    def _measure(
        self,
        sessions: Mapping[Path, tuple[Order[BenchConfig], Mapping[str, Runnable]]],
        dataset: Dataset | None,
        host_folder: Path,
        benched: Benched,
    ) -> None:
        """One session of each device side by side, as a step each."""
        found: dict[Path, Measurement | KdpipeError] = {}
        along_with: dict[Path, str] = {}

        def make(path: Path) -> Measurement:
            if not found:
                from .devices.bench import bench_side_by_side

                found.update(bench_side_by_side(sessions, dataset, host_folder))
                along_with.update({other: path.name for other in found if other != path})
            made = found[path]
            if isinstance(made, KdpipeError):
                raise made
            return made

        for path, (order, _) in sessions.items():
            device = order.config.device
            try:
                made = self.step("measurement", Measurement, order, make, path, along_with)
            except KdpipeError as error:
                benched.lost[device] = error
            else:
                benched.measured.setdefault(device, []).append(made)

    def gate(
        self,
        plan: GatePlan,
        bench: BenchPlan,
        candidate: Side,
        baseline: Side | None,
        dataset: Dataset,
        out: Path | None = None,
    ) -> Verdict:
        """Whether ``candidate`` keeps the rules of ``plan``: measured together with ``baseline``, then judged.

        Both are in every session, interleaved, on the same images. Sessions that are sealed count; others are measured
        until as many as the rules need are trusted, or as many again were tried.

        Raises:
            UserError: a rule that concerns nothing, a baseline of another task or of other classes, a lost device.
            KdpipeError: as ``bench`` does.
        """
        from .deploy import gate, verdict
        from .deploy.changes import changed, measured_changed

        rules = parse_rules(plan.rules)
        if baseline is None and (relative := [rule for rule in rules if rule.is_relative]):
            if len(relative) == len(rules):
                raise UserError(f"rule '{relative[0]}' asks for a baseline: name one with --baseline, or other rules")
            note(f"{len(relative)} rules ask for a baseline and are left out: name one with --baseline")
            rules = [rule for rule in rules if not rule.is_relative]
        devices = dict.fromkeys([*bench.devices, *(rule.device for rule in rules if rule.device is not None)])
        asked = tuple(name for name in devices if any(rule.device in (None, name) for rule in rules))
        rows: dict[str, dict[str, Bundle]] = {}
        pairs: dict[str, list[Pair]] = {}
        apart: dict[str, None] = {}
        for device in asked:
            rows[device], pairs[device], told = _to_judge(rules, device, candidate, baseline, bench.threads)
            apart |= dict.fromkeys(told)
        counted = any(rule.kind.counted == "sessions" for rule in rules)
        bench = bench.model_copy(update={"devices": asked})
        if parts := [rule.part for rule in rules if rule.part is not None]:
            own = getattr(bench, "corruptions", ())
            bench = changed_config(bench, {"corruptions": tuple(dict.fromkeys([*own, *parts]))}, "bench")
        sessions = self._sessions_of(bench, rows, dataset, plan.sessions if counted else 1, trusted=counted)
        inputs = {f"measurement-{device}-{attempt_of(each.manifest)}": each
                  for device, its in sessions.items() for each in its}  # fmt: skip
        then = {} if baseline is None else {**self._measured_before(baseline, inputs.values()), **baseline.measured}
        config = GateConfig(
            rules=tuple(map(str, rules)),
            candidate=candidate.name,
            baseline=None if baseline is None else baseline.name,
            measured_before={device: each.key for device, each in then.items() if device in sessions},
        )
        order = Order("gate", config, inputs)

        def make(path: Path) -> Verdict:
            verdicts = gate.decide(gate.questions(rules, sessions, pairs))
            since = {
                device: measured_changed(then[device], its[-1].manifest)
                for device, its in sessions.items()
                if device in then
            }
            own = {
                pair.row: changed(rows[device][pair.baseline].manifest, rows[device][pair.candidate].manifest)
                for device, its in pairs.items()
                for pair in its
                if pair.baseline is not None and not pair.same
            }
            facts = VerdictFacts(
                answer=gate.overall(verdicts),
                candidate=candidate.name,
                baseline=config.baseline,
                rules=verdicts,
                changed={row: moved for row, moved in own.items() if moved},
                since={device: moved for device, moved in since.items() if moved},
                apart=list(apart),
            )
            return verdict.write(order, facts, path)

        return self.step("verdict", Verdict, order, make, out)

    def _sessions_of(
        self,
        bench: BenchPlan,
        rows: Mapping[str, Mapping[str, Bundle]],
        dataset: Dataset,
        wanted: int,
        *,
        trusted: bool,
    ) -> dict[str, list[Measurement]]:
        """All sessions of each device; measured is what lacks of as many (trusted) ones, each call so many at most."""
        bench, begun = bench.model_copy(update={"sessions": wanted}), len(self.steps)
        benched = self.bench(bench, rows, dataset, again=False)
        for device, found in list(benched.measured.items()):
            every = attempts_beside(found[-1])
            count = sum(_is_trusted(manifest) for manifest in every.values()) if trusted else len(every)
            new = {step.path.absolute() for step in self.steps[begun:] if not step.sealed_before}
            if count < wanted and not new.intersection(every):
                more = bench.model_copy(update={"devices": (device,), "sessions": wanted - count})
                benched.lost |= self.bench(more, {device: rows[device]}, dataset, again=True).lost
        if benched.lost:
            raise UserError(f"{benched.told_lost}: no verdict without it, run the same again when it is back")
        return {
            device: [Measurement.open(path) for path in attempts_beside(found[-1])]
            for device, found in benched.measured.items()
        }

    def _measured_before(self, side: Side, now: Iterable[Measurement]) -> dict[str, Manifest]:
        """The last measurement of each device that has a bundle of ``side`` and is none of this gate's."""
        bundles, ours = {bundle.key for bundle in side.bundles.values()}, {each.key for each in now}
        found: dict[str, Manifest] = {}
        folders = dict.fromkeys([self.folder, *(each.path.absolute().parent for each in side.bundles.values())])
        for _, manifest in (each for folder in folders for each in sealed(folder, skip=UserError)):
            if manifest.kind != Measurement.kind or manifest.key in ours:
                continue
            if bundles.isdisjoint(source.key for source in manifest.inputs.values()):
                continue
            device = str(manifest.config.get("device"))
            if device not in found or manifest.created_utc > found[device].created_utc:
                found[device] = manifest
        return found

    def report(
        self,
        config: ReportConfig,
        measurements: Iterable[Measurement],
        checkpoints: Mapping[str, Checkpoint],
        out: Path | None = None,
    ) -> Report:
        """The page of one session of each device; with it go the other attempts at that session beside it.

        Raises:
            UserError: two sessions of one device.
        """
        sessions: dict[str, list[Measurement]] = {}
        for measurement in measurements:
            check_task(measurement.path, measurement.facts.task)
            found = {path: measurement if path == measurement.path.absolute() else Measurement.open(path)
                     for path in attempts_beside(measurement)}  # fmt: skip
            device = measurement.facts.device
            if device in sessions and measurement.key not in {other.key for other in sessions[device]}:
                raise UserError(
                    f"{measurement.path} is another session of '{device}': a report takes one of each device"
                )
            sessions[device] = list(found.values())
        for checkpoint in checkpoints.values():
            check_task(checkpoint.path, checkpoint.facts.task)
        everyone = {
            f"measurement-{device}-{attempt_of(each.manifest)}": each
            for device in sessions
            for each in sessions[device]
        }
        sources = self._sources(everyone.values())
        if self.smoke:
            config = config.model_copy(update={"smoke": True})
        order = Order("report", config, {**everyone, **checkpoints, **sources.as_inputs()})

        def make(path: Path) -> Report:
            require("the report", ("jinja2", "matplotlib"), "report")
            from .report.page import report

            explain = None
            if config.explain:
                from .deploy.explain import explain_flips
                from .report.maps import NEEDS, check_explained

                require("--explain", NEEDS, "explain")
                for each in everyone.values():
                    check_explained(each.facts.task, str(each.path))
                explain = partial(explain_flips, checkpoints=checkpoints, sources=sources)
            return report(order, sessions, checkpoints, sources, path, explain)

        return self.step("report", Report, order, make, out)

    def _sources(self, measurements: Collection[Measurement]) -> Sources:
        """Graphs, models, dataset and bundles behind ``measurements`` that lie beside them."""
        from .report.compression import Sources

        def found(kind: type[A]) -> dict[str, A]:
            by_key: dict[str, A] = {}
            for measurement in measurements:
                lineage = measurement.manifest.provenance()
                keys = {ancestor.key for ancestor in find_ancestors(lineage, kind)} - by_key.keys()
                by_key |= {each.key: each for each in beside(measurement, kind, keys).values()}
            return by_key

        folders = {
            manifest.key: path
            for parent in {measurement.path.absolute().parent for measurement in measurements}
            for path, manifest in sealed(parent)
            if manifest.kind == Bundle.kind
        }
        return Sources(found(Graph), found(Model), next(iter(found(Dataset).values()), None), folders)


@dataclass
class Benched:
    """What a call measured, by device: its sessions; and which devices were lost, and why."""

    measured: dict[str, list[Measurement]] = field(default_factory=dict)
    lost: dict[str, KdpipeError] = field(default_factory=dict)

    @property
    def one_of_each(self) -> list[Measurement]:
        """A session of each device that was measured: what a report is made of."""
        return [sessions[-1] for sessions in self.measured.values()]

    @property
    def told_lost(self) -> str:
        """Which devices were lost, and why, in a line; empty where none was."""
        return "; ".join(f"'{device}' was not measured: {error}" for device, error in self.lost.items())


@contextlib.contextmanager
def tolerated(name: str, failed: dict[str, KdpipeError] | None) -> Iterator[None]:
    """Go on without ``name`` where it fails in the block: ``failed`` takes why.

    Args:
        failed: None: nothing is tolerated.
    """
    try:
        yield
    except KdpipeError as error:
        if failed is None or error.stops_all:
            raise
        failed[name] = error
        note(f"{name} failed, the others go on: {error}")


def _wait_for(out: Path) -> None:
    """Wait for another process that writes ``out``, and say so."""
    note(f"{out.name} is being made by another process: waiting")
    while not out.exists() and is_held(part_of(out)):
        time.sleep(WAIT_SECONDS)


def _of_device(
    bundles: Mapping[str, Runnable] | Mapping[str, Mapping[str, Runnable]], device: str
) -> Mapping[str, Runnable]:
    """The bundles of one device, where each has its own."""
    its: dict[str, Runnable] = {}
    for name, found in bundles.items():
        if isinstance(found, (Bundle, Model)):
            its[name] = found
        elif name == device:
            its |= found
    return its


def _to_judge(
    rules: Sequence[Rule], device: str, candidate: Side, baseline: Side | None, threads: Sequence[int]
) -> tuple[dict[str, Bundle], list[Pair], list[str]]:
    """What is measured on a device by the names of its rows; which belong together; what is on one side only."""
    from .deploy.gate import Pair
    from .deploy.sides import together
    from .devices.session import swept

    mine, theirs = candidate.of(device), {} if baseline is None else baseline.of(device)
    both, apart = together(mine, theirs)
    rows: dict[str, Bundle] = {}
    pairs: list[Pair] = []
    for name, bundle in mine.items():
        other = theirs.get(name)
        concerned = [rule for rule in rules if rule.concerns(device, bundle.facts.target, name)]
        if not any(other is not None or not rule.is_relative for rule in concerned):
            continue
        rows[f"candidate-{name}"] = bundle
        if other is not None:
            rows[f"baseline-{name}"] = other
        for row in swept({name: bundle}, threads):
            against = None if other is None else f"baseline-{row}"
            same = other is not None and other.key == bundle.key
            pairs.append(Pair(bundle.facts.target, row, f"candidate-{row}", against, same))
    if not rows:
        listed = ", ".join(both or mine)
        raise UserError(f"rule '{rules[0]}': no rule concerns anything on '{device}': there are {listed}")
    return rows, pairs, apart if baseline is not None else []


def _is_trusted(measurement: Manifest) -> bool:
    """Whether every latency of a session is."""
    try:
        return Measurement.facts_of(measurement).trust == "trusted"
    except ValidationError:
        return False


def attempt_order(session: Order[BenchConfig], number: int) -> Order[BenchConfig]:
    """An attempt at a session."""
    return Order(session.stage, session.config.model_copy(update={"attempt": number}), session.inputs)


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
    return ([path for path, manifest in found.items() if _is_trusted(manifest)] or list(found))[-1]


def believed_beside(measurement: Measurement) -> Measurement:
    """The attempt at the session of ``measurement`` that is to be reported."""
    path = believed(attempts_beside(measurement))
    return measurement if path == measurement.path.absolute() else Measurement.open(path)


def pooled_beside(measurement: Measurement) -> Pooled:
    """All attempts at the session of ``measurement`` as one."""
    from .report.pooled import pool

    return pool([Measurement.open(path) for path in attempts_beside(measurement)])


def is_trained(model: Model, config: QuantizeConfig) -> bool:
    """Whether such a variant of ``model`` is trained."""
    from .quantize import VARIANTS

    kind = VARIANTS.get(model.facts.target, {}).get(config.variant)
    return kind is not None and kind.untrained is not None and model.facts.precision == "float32"


def adopt_config(plan: TeacherPlan) -> AdoptConfig:
    """What adopting the user's weights is told, with their hash. Raises UserError for none, or others than wanted."""
    if plan.checkpoint is not None and not plan.checkpoint.is_file():
        raise UserError(f"teacher.checkpoint: no file at {plan.checkpoint}: wanted .safetensors, .pth or .onnx")
    if plan.checkpoint is not None and (plan.model == ONNX_MODEL) != (plan.checkpoint.suffix == ".onnx"):
        raise UserError(
            f"teacher.checkpoint: {plan.checkpoint} with model '{plan.model}': a network that is an .onnx file "
            f"is model '{ONNX_MODEL}', of any other the model says what makes it"
        )
    sha256 = sha256_file(plan.checkpoint) if plan.checkpoint else None
    if plan.checkpoint_sha256 not in (None, sha256):
        raise UserError(f"teacher.checkpoint: {plan.checkpoint} has sha256 {sha256}, wanted {plan.checkpoint_sha256}")
    return AdoptConfig.of(with_code(plan), checkpoint_sha256=sha256)


def cache_order(config: CacheConfig, dataset: Dataset, teacher: Checkpoint) -> Order[CacheConfig]:
    """What building a cache of ``teacher`` for ``dataset`` is told."""
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
        if cache is not None and any(cache.settings[name] != getattr(usual, name) for name in ("precision", "top")):
            inputs["cache"] = cache
    return Order("train", with_weights(with_code(config)), inputs | given_to(config))


def given_to(config: TrainConfig) -> dict[str, Checkpoint]:
    """The checkpoints that a network begins as, by their role. Raises UserError."""
    from .networks.start import given_start

    given = {"encoder": encoder_of(config), "start": given_start(config)}
    return {role: checkpoint for role, checkpoint in given.items() if checkpoint is not None}


def has_body(plan: TeacherPlan) -> bool:
    """Whether a teacher that is a control has features that were trained."""
    return plan.start == "random_head"


def restart_name(plan: TeacherPlan) -> str:
    """What such a teacher's folder is called, before the key."""
    return f"teacher-{plan.start.replace('_', '-')}"


def restart_config(plan: TeacherPlan) -> RestartConfig:
    """What making such a teacher is told."""
    return RestartConfig.of(with_code(plan))


def restart_order(plan: TeacherPlan, dataset: Dataset, trained: Checkpoint | None) -> Order[RestartConfig]:
    """Making a teacher of random weights, over the features of ``trained`` if there is one."""
    inputs: dict[str, AnyArtifact] = {"data": dataset}
    return Order("restart", restart_config(plan), inputs if trained is None else {**inputs, "start": trained})


def encoder_of(config: ModelSettings) -> Checkpoint | None:
    """The checkpoint that the encoder of a segmenter begins as, if it is one. Raises UserError."""
    if config.encoder_checkpoint is None:
        return None
    from .networks.segmenters import given_encoder

    return given_encoder(config)


def with_weights(config: S) -> S:
    """``config`` with the hashes of the files that its weights begin as, if some are files. Raises UserError."""
    hashes = {}
    for name in WEIGHTS:
        path = getattr(config, name, None)
        if path is None or not path.is_file():
            continue
        hashes[f"{name}_sha256"] = sha256 = sha256_file(path)
        if (wanted := getattr(config, f"{name}_sha256")) not in (None, sha256):
            raise UserError(f"{name}: {path} has sha256 {sha256}, wanted {wanted}")
    return config.model_copy(update=hashes)


def with_code(config: S) -> S:
    """``config`` with the hash of the user's file that makes its network, if one does. Raises UserError."""
    if not code.is_code(config.model):
        return config
    sha256 = code.sha256_of(config.model)
    if config.code_sha256 not in (None, sha256):
        raise UserError(
            f"code_sha256: {code.source_file(config.model)} has sha256 {sha256}, wanted {config.code_sha256}"
        )
    return config.model_copy(update={"code_sha256": sha256})


def found_of(artifact: AnyArtifact) -> tuple[str, ...]:
    """How right a network is, in words; nothing of other artifacts, nor on random images."""
    if not isinstance(artifact, (Checkpoint, Graph)) or artifact.facts.task not in TASKS:
        return ()
    if isinstance(artifact, Checkpoint) and artifact.facts.method == DRAWN:
        return ()
    data = artifact.manifest.inputs.get("data")
    if data is None or data.facts.get("source") == RANDOM:
        return ()
    from .report.words import found_lines

    return tuple(found_lines(artifact.facts, TASKS[artifact.facts.task]))


def _held_out_copies(
    duplicates: Literal["drop", "refuse", "allow"], digests: Sequence[np.ndarray] | None
) -> Literal["drop", "allow"] | None:
    """What a key says of copies of held-out images: nothing where no two images are the same.

    Args:
        digests: of all images, as ``fingerprints.digests`` has them; None where they are not known beforehand.
    """
    if digests is None:
        return "allow" if duplicates == "allow" else None
    images = np.concatenate(digests)
    if len(np.unique(images)) == len(images):
        return None
    return "allow" if duplicates == "allow" else "drop"


def fitted_config(spec: InputSpec) -> FittedConfig:
    """What decides the pixels that networks of this input are shown."""
    return FittedConfig.of(spec, decoding=DECODING, versions=versions_of("pillow", "numpy"))


def versions_of(*tools: str) -> dict[str, str]:
    return {name: version for name, version in tool_versions().items() if name in tools}


def with_fitted(dataset: Dataset) -> Dataset:
    """``dataset`` with what lies beside it of what networks are shown of its held-out images."""
    if dataset.facts.copies is None:
        return dataset
    found = {
        geometry(fitted.settings): fitted
        for fitted in beside(dataset, Fitted, None).values()
        if fitted.manifest.inputs["data"].key == dataset.key
    }
    return dataclasses.replace(dataset, fitted=found)


def dataset_of(artifact: AnyArtifact) -> Dataset:
    """The dataset that ``artifact`` was made from, found beside it. Raises UserError."""
    wanted = find_ancestors(artifact.manifest.provenance(), Dataset)
    if not wanted:
        raise UserError(f"{artifact.path} was not made from a dataset: name one with --data")
    found = beside(artifact, Dataset, {wanted[0].key})
    if not found:
        raise UserError(f"no dataset {wanted[0].key[:12]} beside {artifact.path}: name its folder with --data")
    return with_fitted(refuse_random(next(iter(found.values()))))


def dataset_for(bundle: Bundle, folder: Path) -> Dataset:
    """As ``dataset_of``, looked for in ``folder`` too: a release lies elsewhere. Raises UserError."""
    wanted = find_ancestors(bundle.manifest.provenance(), Dataset)
    for place in dict.fromkeys([bundle.path.absolute().parent, folder.absolute()]):
        for path, manifest in sealed(place, skip=UserError):
            if wanted and manifest.key == wanted[0].key and manifest.kind == Dataset.kind:
                return with_fitted(refuse_random(Dataset.open(path)))
    key = f" {wanted[0].key[:12]}" if wanted else ""
    raise UserError(f"no dataset{key} beside {bundle.path} nor in {folder}: name its folder with --data")


def refuse_random(dataset: Dataset) -> Dataset:
    """``dataset``, unless it is of random images: they stand in where only parity is told. Raises UserError."""
    if dataset.facts.source == RANDOM:
        raise UserError(
            f"{dataset.path} is of random images, on which nothing can be measured: name a data set with --data"
        )
    return dataset


def checkpoints_beside(measurement: Measurement) -> dict[str, Checkpoint]:
    """The checkpoints next to ``measurement`` that share a dataset with it, by folder name without the key.

    Not the runs of studies, which have a page of their own.
    """
    datasets = {found.key for found in find_ancestors(measurement.manifest.provenance(), Dataset)}
    return {
        path.name.rpartition("-")[0]: checkpoint
        for path, checkpoint in sorted(beside(measurement, Checkpoint, None).items())
        if checkpoint.manifest.inputs["data"].key in datasets and not path.name.startswith(CELL)
    }


def open_checkpoints(paths: Sequence[Path]) -> dict[str, Checkpoint]:
    """Checkpoints by the names of their folders, without the keys. Raises UserError."""
    return {path.name.rpartition("-")[0] or path.name: Checkpoint.open(path) for path in paths}


def beside(artifact: AnyArtifact, kind: type[A], keys: set[str] | None) -> dict[Path, A]:
    """Sealed artifacts of ``kind`` in the same folder (only those with one of ``keys``, if given)."""
    return {
        path: kind.open(path)
        for path, manifest in sealed(home(artifact.path.absolute()))
        if manifest.kind == kind.kind and (keys is None or manifest.key in keys)
    }


def home(path: Path) -> Path:
    """The folder of artifacts that one of them belongs to; what was named by a URL lies further down in it."""
    return path.parents[2] if len(path.parents) > 2 and path.parents[1].name == FETCHED else path.parent


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
