"""The kinds of artifacts: what each stage found out, and what the files of its artifact are called.

The record of an artifact's findings is the ``facts`` of its manifest, validated whenever it is read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator

from .artifact import EVIDENCE, Artifact, Provenance, Record, canonical, find_ancestors
from .config import (
    AdoptConfig,
    BenchConfig,
    CacheConfig,
    Corruption,
    DrawConfig,
    GateConfig,
    McuConfig,
    Output,
    PickConfig,
    QadConfig,
    ReleaseConfig,
    RestartConfig,
    StudyConfig,
    TrainConfig,
)
from .errors import UserError
from .inputs import InputSpec, Side, Size
from .rules import Counted, Unit
from .sealed import LARGEST_MODEL_BYTES, NAME
from .stats import Interval, NoWorse, no_worse

F = TypeVar("F", bound=Record)

Precision = Literal["float32", "float16", "bf16", "int8"]


class RuntimeSession(Record):
    """What a runtime says of itself: its settings as they were really taken."""

    model_config = ConfigDict(frozen=True, extra="allow")  # each runtime has settings of its own

    runtime: str
    version: str
    threads: int
    inference_precision: str | None = None


MOST_CLASSES = 10**6


def as_name(text: str) -> str:
    """``text`` as a manifest may call a model: letters, digits and ``. _ -``."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text, flags=re.ASCII).lstrip("_.-")[:128] or "model"


def same_length(path: Path, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of as many images. Raises UserError."""
    if len(first) != len(second):
        raise UserError(f"{path} is of {len(first)} images, wanted {len(second)}: make the artifact again")
    return first, second


class Labelled(Artifact[F]):
    """What knows the names of its outputs."""

    LABELS = "labels.json"

    @property
    def labels(self) -> list[str]:
        """The classes, in the order of the outputs."""
        return self.rows(self.LABELS, str)


def may_guess(accuracy: Interval | None, guessing: float | None) -> bool:
    """Whether an accuracy is not shown to be better than that of the best answer that looks at no image."""
    return accuracy is not None and accuracy.low is not None and guessing is not None and accuracy.low <= guessing


# ---- checkpoint ------------------------------------------------------------------------------------------


DRAWN = "drawn"  # how a network of random weights came to them: what it says means nothing


class TrainingPrecision(Record):
    """In which format a network was trained, and what a step took in each candidate where they were timed."""

    name: str
    channels_last: bool
    seconds_a_step: dict[str, float]


class BestEpoch(Record):
    """The epoch that did best on the validation part."""

    epoch: int
    validation_accuracy: float


class PrunedFacts(Record):
    """How much of another network is left: asked for, and reached."""

    of: str = Field(pattern=f"^{NAME.pattern}$")  # its name
    keep: float = Field(gt=0, lt=1)  # the share of its multiply-accumulates that may be left
    round_to: int = Field(ge=1)  # multiple that widths of layers are of
    macs_share: float = Field(gt=0, le=1)
    parameters_share: float = Field(gt=0, le=1)
    groups: int = Field(ge=1)  # of layers that lose channels together
    spared_groups: int = Field(ge=0)  # that cannot do without some of theirs

    @property
    def name(self) -> str:
        """What the narrower network is called."""
        suffix = f"-pruned-to-{self.keep:.2f}"
        return self.of[: 128 - len(suffix)] + suffix

    def __str__(self) -> str:
        """What is left, as a reader is told."""
        return (
            f"{self.macs_share:.1%} of the multiply-accumulates and {self.parameters_share:.1%} of the parameters of "
            f"{self.of}"
        )


class CheckpointFacts(Record):
    """What is known of a network: what it is, how it came to its weights, how it does on the test images."""

    task: str
    model: str
    model_args: dict[str, Any]
    classes: int
    input: InputSpec
    parameters: int
    macs: int | None = Field(None, ge=0)  # multiply-accumulates for one image, as it is deployed
    test_accuracy: float
    test_images: int
    test_interval: Interval | None = None  # of the accuracy
    guessing: float | None = None  # accuracy of the best answer that looks at no image
    method: str
    training_images: int
    unlabeled_images: int = 0
    license: str | None = None  # of the weights that it began with, where that is known
    epochs: int
    steps: int = 0  # of the optimiser
    selected: str
    best_validation: BestEpoch | None = None
    last_validation: float | None = None
    precision: TrainingPrecision | None = None  # None where it was not trained here
    cache: str | None = None  # key of the cache it learned from
    pruned: PrunedFacts | None = None  # None: it is as wide as its name says

    @property
    def may_guess(self) -> bool:
        """Whether it is not shown to do better than one that looks at no image."""
        return may_guess(self.test_interval, self.guessing)


class Epoch(BaseModel):
    """One row of a training's history, of which there is more; None where the validation part was not looked at."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    epoch: int
    loss: float
    validation_accuracy: float | None = None


class Checkpoint(Labelled[CheckpointFacts]):
    """Weights of a teacher or a student, with its InputSpec and labels."""

    kind = "checkpoint"
    Facts = CheckpointFacts
    Configs: ClassVar = {"train": TrainConfig, "adopt": AdoptConfig, "restart": RestartConfig, "draw": DrawConfig}
    roles = frozenset({"data"})
    WEIGHTS = "model.safetensors"
    ONNX = "model.onnx"  # in place of weights, of a network that is a file
    HISTORY = "history.jsonl"  # one row an epoch
    IMAGES = "images.npy"  # which training images it learned from: positions in the training part, ascending
    # Of the test part: ``logits`` [N, K], or class maps [N, H, W] of every place, and ``labels`` [N, ...].
    TEST_OUTPUTS = "test_logits.npz"

    @property
    def tested(self) -> tuple[np.ndarray, np.ndarray]:
        """Outputs [N, ...] and labels [N, ...] of the test part. Raises UserError."""
        found = self.arrays(self.TEST_OUTPUTS, logits=("fu", 2), labels=("iu", 1))
        return same_length(self.path / self.TEST_OUTPUTS, found["logits"], found["labels"])

    @property
    def history(self) -> list[Epoch]:
        """Every epoch of its training; none where it was not trained here. Raises UserError."""
        return self.lines(self.HISTORY, Epoch) if self.HISTORY in self.manifest.files else []


# ---- tuned -----------------------------------------------------------------------------------------------


class TunedRange(Record):
    """The 8-bit grid of what a call of the network's forward gives: unsigned, its integer ``zero_point`` is zero."""

    place: int = Field(ge=0)  # the number of the call, of those that give a tensor
    scale: float = Field(gt=0)
    zero_point: int = Field(ge=0, le=255)


class TunedFacts(Record):
    """How a student was trained for 8 bits."""

    task: str
    model: str
    input: InputSpec
    steps: int = Field(ge=1)
    training_images: int = Field(ge=0)
    unlabeled_images: int = Field(0, ge=0)
    weights: int = Field(ge=0)  # tensors of weights on a grid
    places: int = Field(ge=0)  # tensors between layers on a grid
    unplaced: int = Field(ge=0)  # that the file has on a grid and training has not found in the network
    first_loss: float  # the means of the first and the last tenth of the steps
    last_loss: float


class Tuned(Labelled[TunedFacts]):
    """A student's weights trained for 8 bits, BatchNorms folded, on their grids, and the ranges between its layers.

    All targets whose files quantise alike are written from it. Or its control, trained as long in float32.
    """

    kind = "tuned"
    Facts = TunedFacts
    Configs: ClassVar = {"tune": QadConfig}
    roles = frozenset({"data", "student"})
    WEIGHTS = Checkpoint.WEIGHTS  # of the student as it is deployed, branches merged
    RANGES = "ranges.json"
    HISTORY = Checkpoint.HISTORY  # the loss of every step

    @property
    def ranges(self) -> list[TunedRange]:
        """Of every place that was trained. Raises UserError."""
        return self.rows(self.RANGES, TunedRange)

    @property
    def student(self) -> Provenance:
        """The checkpoint that it began as."""
        return self.manifest.inputs["student"]

    @property
    def of_student(self) -> CheckpointFacts:
        """What is known of that, and so of this network."""
        return Checkpoint.facts_of(self.student)


# ---- cache -----------------------------------------------------------------------------------------------


class CacheFacts(Record):
    """How much a teacher was asked, and how its outputs are stored.

    ``top`` None: all of them. ``grid``: height and width of those that say something of every place.
    """

    views: int = Field(ge=1)
    images: int = Field(ge=1)
    classes: int = Field(ge=1, le=MOST_CLASSES)
    top: int | None = Field(ge=1, le=MOST_CLASSES)
    bytes: int = Field(ge=0)
    record_bytes: int = Field(ge=1)  # of an image
    grid: tuple[Side, Side] | None = None


class Cache(Artifact[CacheFacts]):
    """What a teacher said of so many views of every image."""

    kind = "cache"
    Facts = CacheFacts
    Configs: ClassVar = {"cache": CacheConfig}
    roles = frozenset({"data", "teacher"})
    IMAGES = "images.npy"  # numbers of the images, ascending: a record each in every shard

    def shard(self, view: int) -> Path:
        """The file of one view number."""
        return self.file(self.shard_name(view))

    @staticmethod
    def shard_name(view: int) -> str:
        """The name of the file of one view number."""
        return f"view-{view:05d}.bin"


# ---- graph -----------------------------------------------------------------------------------------------


class ParityFacts(Record):
    """How far a file's outputs are from torch's on real images.

    Of logits by the largest difference, and that over their spread; where the file gives classes, by the share of
    pixels that change, of the worst image and of all of them.
    """

    images: int
    max_difference: float
    logit_spread: float  # of classes 1
    relative_difference: float
    agreement: float  # of what both say of an image, 0 to 1
    worst_image: str
    # Of torch's own float32 outputs, from those in double precision, over their spread; None: not known.
    float32_error: float | None = None
    session: RuntimeSession | None = None


class HopParity(Record):
    """Parity of the graph as torch wrote it, and simplified."""

    exported: ParityFacts
    simplified: ParityFacts


class GraphFacts(Record):
    """What a graph is of and made of, how far it is from torch, what it took to write."""

    task: str
    model: str
    input: InputSpec
    nodes_by_kind: dict[str, int]
    parity: HopParity
    export_seconds: float
    simplify_seconds: float
    accuracy: Interval | None = None  # of somebody's file, on the test images that were looked at
    guessing: float | None = None  # that of the best answer that looks at no image


class Graph(Labelled[GraphFacts]):
    """One student as ONNX, simplified: what most targets are made from."""

    kind = "graph"
    Facts = GraphFacts
    largest_bytes = LARGEST_MODEL_BYTES
    ONNX = "model.onnx"
    # Accuracy by hop: ``positions`` of test images, and what the graph says of them, ``exported`` and ``simplified``.
    HOPS = "hops.npz"
    PARITY_OUTPUTS = "torch_logits.npy"  # torch's of the parity images

    @property
    def hops(self) -> dict[str, np.ndarray]:
        """``positions`` [N] among the test images, outputs [N, ...] ``exported`` and ``simplified``.

        Raises:
            UserError: other arrays, or of different lengths.
        """
        found = self.arrays(self.HOPS, positions=("iu", 1), exported=("fu", 2), simplified=("fu", 2))
        for name in ("exported", "simplified"):
            same_length(self.path / self.HOPS, found[name], found["positions"])
        return found


# ---- model -----------------------------------------------------------------------------------------------


class Damage(Record):
    """What a variant changed in its outputs: of classes, the noise is that of the logits that they are decided by.

    None where those cannot be seen.
    """

    images: int
    signal_to_noise_db: float | None
    agreement: float  # of what both say of an image, 0 to 1


class Mix(Record):
    """One mix of float and small layers: how many stay float, and what that costs and gives.

    ``over_float32`` is the latency as a share of float32's; None where it cannot be timed here.
    """

    kept: int
    drop_points: float  # of accuracy against float32, on the held-out images; negative is a gain
    drop_low: float | None
    drop_high: float | None
    images: int
    over_float32: float | None
    size_bytes: int

    def verdict(self, max_drop: float) -> NoWorse:
        """Whether these images show that it loses at most so many points."""
        low, high = (None if drop is None else -drop / 100 for drop in (self.drop_high, self.drop_low))
        return no_worse(Interval(-self.drop_points / 100, low, high, self.images), max_drop)


class GuardFacts(Record):
    """The drop that was allowed, every mix that was tried, the layers that stayed float, and how sure that is.

    ``confirmed`` is what the mix that was taken loses on images that the search did not use; the images that it
    needs are counted with those to search on.
    """

    max_drop_points: float
    curve: tuple[Mix, ...]
    kept_float: tuple[str, ...]
    shown: bool  # that it loses at most so much
    confirmed: NoWorse


class Control(Record):
    """What one way to 8 bits changed of the float32 model, on the images that all ways are compared on."""

    against_float32: Damage | None = None
    accuracy: Interval | None = None  # its own less the float32 model's on held-out images, where there are any


class TrainedFacts(Record):
    """A variant that was trained, beside its two controls, written by the same tool."""

    tuned: str  # key of what was trained
    placed: int = Field(ge=0)  # tensors of the file whose ranges were trained
    from_images: int = Field(ge=0)  # those whose ranges come from images, as without training
    own: Control
    untrained: Control  # the float32 model, with ranges from images
    float32_steps: Control  # as many steps in float32, then ranges from images
    over_untrained: Interval | None = None  # its accuracy less that of the untrained, on held-out images


class LayerNoise(Record):
    """A layer's signal-to-noise ratio, in decibels; None where the tensor is exact or does not exist when small."""

    name: str
    kind: str
    in_db: float | None
    out_db: float | None


class ModelFacts(Record):
    """What a model is and how a runtime must open it; what making it found."""

    task: str
    target: str
    variant: str
    precision: Precision
    entry: str  # the file that the runtime opens
    input: InputSpec
    model: str
    nodes_by_kind: dict[str, int]
    output: Output = "logits"
    runtime: dict[str, Any]  # settings that the runtime must take
    stand_in: str | None = None  # the runtime that reads the same file where the target's own cannot run
    not_built_here: bool = False
    parity: ParityFacts | None = None  # of the float32 file
    settings: dict[str, Any] = Field({})  # the quantiser's own
    calibration_images: int = 0
    against_float32: Damage | None = None
    guard: GuardFacts | None = None
    trained: TrainedFacts | None = None

    def for_runtime(self) -> dict[str, Any]:
        """The same as plain values, as ``runtime`` takes it on every machine."""
        return self.model_dump(mode="json")


class Model(Labelled[ModelFacts]):
    """One student for one target in one variant: float32, or what was made of that."""

    kind = "model"
    Facts = ModelFacts
    largest_bytes = LARGEST_MODEL_BYTES
    NOISE_BY_LAYER = f"{EVIDENCE}/layers.json"
    CALIBRATION = f"{EVIDENCE}/calibration.json"

    @property
    def entry(self) -> Path:
        """The file that the runtime opens."""
        return self.file(self.facts.entry)

    @property
    def size_bytes(self) -> int:
        """Size of the model itself: its entry and, for OpenVINO, the weights beside it."""
        stem = Path(self.facts.entry).stem
        return sum(record.size_bytes for name, record in self.manifest.files.items() if Path(name).stem == stem)

    @property
    def noise_by_layer(self) -> list[LayerNoise]:
        """Noise of every layer in the order they run; none where the target has no single layers."""
        if self.NOISE_BY_LAYER not in self.manifest.files:
            return []
        return self.rows(self.NOISE_BY_LAYER, LayerNoise)


class RefusalFacts(Record):
    """Which variant of which model was tried for a target, and why it was refused."""

    model: str
    target: str
    variant: str
    reason: str

    def __str__(self) -> str:
        return f"{self.target} goes without {self.variant}: {self.reason}"


class Refusal(Artifact[RefusalFacts]):
    """In place of a variant that was tried and refused, under the key that it would have: no run has to try it again.

    Whoever names the variant tries it all the same, and once it is made this says nothing any more.
    """

    kind = "refusal"
    Facts = RefusalFacts
    roles = frozenset({"model"})

    @staticmethod
    def name_of(variant: str) -> str:
        """Of its folder, for that of the variant."""
        return f"{variant}-refused"


def unshown(models: Iterable[Model]) -> str:
    """Which guarded models are not shown to keep their accuracy, and what would show it; empty if there are none."""
    return "; ".join(
        f"{model.facts.target} {model.facts.variant} is not shown to lose at most "
        f"{guard.max_drop_points:g} points: it {guard.confirmed.words()}"
        for model in models
        if (guard := model.facts.guard) is not None and not guard.shown
    )


# ---- bundle ----------------------------------------------------------------------------------------------


class BundleFacts(ModelFacts):
    """The model's, and what the bundle promises of its golden inputs."""

    size_bytes: int
    golden_images: int
    golden_step: int = 1  # of outputs that have places every so manieth is kept, in both directions
    golden_tolerance: float


class Bundle(Labelled[BundleFacts]):
    """A model with labels, golden inputs and the runner: what goes onto a device."""

    kind = "bundle"
    Facts = BundleFacts
    largest_bytes = LARGEST_MODEL_BYTES
    roles = frozenset({"model"})
    RUNNER = "runtime"  # folder of the runner's sources
    CONFORMANCE = "conformance"  # folder of an image and what is right of it, for whoever writes their own


Runnable = Bundle | Model  # what a device runs; a model by itself is somebody else's

AT_THREADS = "@"  # between a bundle's name and its threads, in a session that measures it on several numbers of them


def student_of(bundle: Provenance) -> str | None:
    """Key of the checkpoint that ``bundle`` was made from; of the graph, where somebody's file was adopted."""
    nearest = [*find_ancestors(bundle, Checkpoint), *find_ancestors(bundle, Graph)]
    return nearest[0].key if nearest else None


def float32_by_bundle(bundles: Mapping[str, Provenance]) -> dict[str, str]:
    """For each bundle the float32 one of its target, output, student and threads, if any: itself perhaps."""
    facts = {name: Bundle.facts_of(source) for name, source in bundles.items()}
    kinds = {
        name: (facts[name].target, facts[name].output, student_of(source), name.partition(AT_THREADS)[2])
        for name, source in bundles.items()
    }
    whole = {kind: name for name, kind in reversed(kinds.items()) if facts[name].precision == "float32"}
    return {name: whole[kind] for name, kind in kinds.items() if kind in whole}


# ---- measurement -----------------------------------------------------------------------------------------


Unavailable = Literal["unavailable"]  # what could not be read, never 0
UNAVAILABLE: Unavailable = "unavailable"


class CoreClass(Record):
    """Cores that are as fast as each other: capacity by the kernel (of 1024), else highest clock in kHz."""

    cpus: list[int]
    speed: int | Unavailable


class Battery(Record):
    """Of a phone or a laptop: its charge, whether it takes or gives, how warm it is."""

    percent: int | Unavailable
    status: str
    celsius: float | Unavailable


class Probe(Record):
    """What a device is, read from its kernel and its tools."""

    system: str
    distribution: str = UNAVAILABLE
    python: str = UNAVAILABLE
    machine: str
    cpu: str
    board: str = UNAVAILABLE
    cores: int | Unavailable
    usable_cores: int | Unavailable
    core_classes: list[CoreClass] | Unavailable = UNAVAILABLE  # fastest first
    siblings: list[list[int]] | Unavailable = UNAVAILABLE  # CPUs that share a core, core by core
    quota_cores: float | Unavailable = UNAVAILABLE  # of the control group
    flags: dict[str, bool] | Unavailable  # of the CPU, that decide how fast small precisions run
    memory_bytes: int | Unavailable
    governor: str
    runtimes: dict[str, str] | Unavailable  # versions of those installed
    targets: list[str]  # whose bundles it can open with their own runtime
    gpus: list[str] | Unavailable = UNAVAILABLE
    power_mode: str = UNAVAILABLE  # of a Jetson
    energy_meters: list[str] | Unavailable = UNAVAILABLE
    current_khz: str
    clocks_khz: dict[str, int] | Unavailable = UNAVAILABLE
    temperatures_millicelsius: dict[str, int] | Unavailable
    throttle_events: int | Unavailable = UNAVAILABLE
    throttle_bits: int | Unavailable = UNAVAILABLE
    battery: Battery | Unavailable = UNAVAILABLE
    load_average: list[float] | Unavailable
    emulated: bool = False  # another machine's instructions are translated: times mean nothing
    screen: str = "unavailable"  # of a phone: on or off
    thermal_status: str = "unavailable"  # of a phone, as its thermal service calls it: none, light, ... shutdown

    @property
    def known_flags(self) -> dict[str, bool]:
        """The CPU's flags; none where they could not be read."""
        return self.flags if isinstance(self.flags, dict) else {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The part that names the device and what runs on it: other on another machine, or after an update."""
        lasting = {"machine", "cpu", "cores", "usable_cores", "flags", "memory_bytes", "system", "governor", "runtimes"}
        return self.model_dump(include=lasting | {"python", "quota_cores", "power_mode", "gpus"})


class Prediction(Record):
    """That so many images were run, by what, and how long it took: opening, and all the images together."""

    images: int = Field(ge=0)
    open_seconds: float = Field(ge=0, allow_inf_nan=False)
    predict_seconds: float = Field(ge=0, allow_inf_nan=False)
    session: RuntimeSession


class WarmUp(Record):
    """Medians of windows of inferences until three agree, or not within the limit (not ``settled``)."""

    window_median_ns: list[float]
    calls: int
    seconds: float
    settled: bool


class Placement(Record):
    """Which CPUs a process kept to: one a core, the fastest where cores differ; and how threads were told to wait.

    ``siblings_left_out`` share a core with one of ``cpus``, ``slower_left_out`` are of a slower kind. ``environment``
    holds what OpenMP and the like were told (``OMP_...``, ``KMP_...``).
    """

    threads: int
    cpus: list[int] | Unavailable
    siblings_left_out: list[int]
    slower_left_out: list[int]
    environment: dict[str, str]


class StartUp(Record):
    """What a process took until its first inference was done, in nanoseconds.

    ``import_ns`` is the runtime's modules, ``load_ns`` opening the model, of which ``compile_ns`` is compiling or
    building where the runtime does that apart (else None). ``process_ns`` goes from the start of the process, which
    the kernel tells to 10 ms, to the end of the first inference; None where it cannot be read.
    """

    process_ns: int | None = None
    import_ns: int
    load_ns: int
    compile_ns: int | None = None
    first_ns: int
    session: RuntimeSession


class FreshStart(StartUp):
    """One process that opened the model, ran one image and did nothing else: no hash was checked, nothing timed again.

    ``memory_before_open_bytes`` is the largest resident set once the runtime's modules were imported, the baseline of
    an empty runtime; ``peak_memory_bytes`` the largest when a few inferences were done. ``page_cache`` says whether the
    bundle's files lay in memory when it began. ``executed`` counts the layers with weights by the precision in which
    they really ran, None where the runtime does not say or was not asked.
    """

    page_cache: Literal["warm", "dropped"]
    memory_before_open_bytes: int
    peak_memory_bytes: int
    executed: dict[str, int] | None = None

    @property
    def memory_growth_bytes(self) -> int:
        """What opening and running the model added to the empty runtime."""
        return self.peak_memory_bytes - self.memory_before_open_bytes


class Phase(Record):
    """A stretch of time by the device's monotonic clock, and the CPU time that all threads of a process took in it."""

    begun_ns: int
    ended_ns: int
    cpu_ns: int


class Sustained(Record):
    """The median of every window of a long run, after the steady phase.

    ``slowed_after_seconds`` is when the medians became 5 % slower than the steady one for three windows in a row; None
    where they never did.
    """

    window_seconds: float
    window_median_ns: list[float]
    slowed_after_seconds: float | None


class FrameSamples(Record):
    """Whole frames in one process, in nanoseconds: from a decoded picture at its own size to what a person is shown.

    ``alone_ns``: after each of them the network alone, on the same picture. ``steps_ns``: of each its steps, by name.
    ``sizes``: height and width of the pictures that were rotated through.
    """

    sizes: list[tuple[int, int]] = Field(min_length=1)
    whole_ns: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    alone_ns: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    steps_ns: dict[str, Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]]


class Samples(StartUp):
    """One measurement in one process: durations in nanoseconds, nothing trimmed.

    ``latency_ns`` is from the runtime's own input to float32 outputs; ``prepare_ns`` makes that input of a decoded
    uint8 image, ``end_to_end_ns`` is both in one. ``p50_known_within`` is the share within which the median of this
    process is known, None where it has too few inferences to tell; ``stable`` whether that is as narrow as was wanted.
    """

    prepare_ns: list[int] = Field(min_length=1)
    warm_up: WarmUp
    latency_ns: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)
    end_to_end_ns: list[int] = Field([])
    frames: FrameSamples | None = None  # None where no pictures were given, or nothing could resize them
    p50_known_within: float | None = None
    stable: bool = True
    steady: Phase | None = None  # the timed inferences, first to last
    sustained: Sustained | None = None
    placement: Placement | None = None

    @property
    def overhead_ns(self) -> float | None:
        """What the runner took for each inference outside the timed call, the mean; where no rate made it wait."""
        if self.steady is None:
            return None
        return (self.steady.ended_ns - self.steady.begun_ns - sum(self.latency_ns)) / len(self.latency_ns)


class Sight(Record):
    """What ``watch`` saw of a device at one moment of its monotonic clock, from outside the timed process.

    ``busy_ns``, ``idle_ns`` and ``steal_ns`` are those of all CPUs together since the kernel started, told in its ticks
    (10 ms mostly). The rest is read less often, None in between: the clock of every CPU, temperatures by sensor, how
    often the CPU throttled itself, a Raspberry Pi's throttle bits, meters of energy (cumulative) and of power.
    """

    monotonic_ns: int
    busy_ns: int | Unavailable
    idle_ns: int | Unavailable
    steal_ns: int | Unavailable
    khz: dict[str, int] | Unavailable | None = None
    millicelsius: dict[str, int] | Unavailable | None = None
    throttle_events: int | Unavailable | None = None
    throttle_bits: int | Unavailable | None = None
    energy_uj: dict[str, int] | Unavailable | None = None
    power_mw: dict[str, int] | Unavailable | None = None


class Sights(Record):
    """What ``watch`` saw since it was last asked, with the CPU time that it took itself."""

    sights: list[Sight]
    own_cpu_ns: int
    cpus: int


class Surroundings(Record):
    """What a device did in one stretch of time, besides what was timed.

    Shares are of the time of all CPUs. ``throttled`` says that the device held itself back in it, by its own word.
    """

    seconds: float
    others_share: float | Unavailable
    steal_share: float | Unavailable
    lowest_khz: int | Unavailable
    highest_khz: int | Unavailable
    highest_celsius: float | Unavailable
    throttled: bool | Unavailable
    watts: float | Unavailable  # of all that its meters cover


class BatchOne(Record):
    """Outputs of the timing images one at a time, as they are timed, against those of the accuracy's batches.

    ``tolerance`` is the bundle's own, of its precision: where more than one image in twenty is beyond it, what is timed
    is not what is judged.
    """

    images: int
    max_difference: float
    tolerance: float
    agreement: float  # of what both say of an image, 0 to 1
    within_tolerance: bool


class Conditions(Record):
    """What else the device did while a bundle's processes were timed, seen from outside of them: over all of them.

    CPU time of others, and time that the host of a virtual machine took away, in cores: 0.5 is half of one core's.
    ``frequency_drop``: by which share the clock of its slowest process lay below that of its fastest one.
    """

    others_cores: float | Unavailable
    steal_cores: float | Unavailable
    frequency_drop: float | Unavailable
    throttled: bool | Unavailable


class AgainstHost(Record):
    """A bundle's outputs on the device against those of the same bundle on the host that measured it, image by image.

    ``lost``: right on the host alone; ``won``: right on the device alone. ``mismatches`` counts the images of which the
    two say something else, right or wrong: their names are in a file of the measurement.
    """

    by: str  # the runtime that ran it on the host
    max_difference: float
    mismatches: int
    lost: int
    won: int
    difference: Interval  # of the metric, the device less the host
    mcnemar_p: float


class Mismatch(Record):
    """A test image of which a bundle says something else on the device than on the host."""

    position: int  # among the test images
    image: str
    label: str
    host: str
    device: str


# Of every latency. Trusted: known as well as was asked for. Noisy: not so well, and measuring again may cure it.
# Invalid: not a latency of this device, however often it is measured.
TrustWord = Literal["trusted", "noisy", "invalid"]


class Trust(Record):
    """Whether a latency is to be believed, and if not, why."""

    word: TrustWord
    reason: str = ""


class Comparison(Record):
    """Two bundles of one session, paired by round.

    ``ratio`` is the first one's latency over the second's, its interval at the level of its step in Holm's
    correction over all pairs; they differ where it lies beyond what the session's controls leave open, a share.
    """

    first: str
    second: str
    ratio: Interval
    differ: bool
    left_open: float | None  # None where a control bounds nothing


class WholeFrame(Record):
    """What a whole frame takes, from the decoded picture at its own size to the answer that a person is shown.

    Medians of each process, over processes. ``over_network`` is over the network alone, which took turns with it,
    paired by process; ``steps_ms`` is the median of each step over all processes. ``sizes``: height and width of the
    pictures. It has a trust of its own: by its own width and A/A controls, and what else the machine did.
    """

    latency_ms: Interval
    latency_by_process_ms: list[PositiveFloat]
    network_ms: Interval
    over_network: Interval
    steps_ms: dict[str, float]
    sizes: list[tuple[int, int]]
    trust: Trust | None = None


class Result(Record):
    """What was measured of one bundle; None where it was not.

    ``failed``: a process of it failed twice, ``status`` says why. Its accuracy stands if it was measured before;
    latencies of its processes that ended are among the samples, no figure is made of them.
    """

    status: str
    failed: bool = False
    accuracy: Interval | None = None
    accuracy_by: str | None = None  # the runtime that ran the test images
    corrupted: dict[Corruption, Interval] | None = None  # accuracy on the same images, each with a fault
    batch_one: BatchOne | None = None
    session: RuntimeSession | None = None
    latency_p50_ms: Interval | None = None
    latency_p90_ms: Interval | None = None
    latency_p50_by_process_ms: list[PositiveFloat] | None = None
    latency_p90_by_process_ms: list[PositiveFloat] | None = None
    latency_p95_ms: Interval | None = None
    latency_p99_ms: Interval | None = None
    early_stopping_p90_by_process_ms: list[PositiveFloat | None] | None = (
        None  # as ``core.stats.early_stopping`` has it
    )
    inferences: int | None = None
    end_to_end_ms: Interval | None = None  # from the decoded image to the outputs
    prepare_ms: float | None = None
    whole_frame: WholeFrame | None = None
    page_cache: Literal["warm", "dropped"] | None = None  # of the processes that only started; None: those that timed
    start_ms: Interval | None = None  # from the start of a process to its first outputs, of those that only started
    import_ms: list[float] | None = None
    load_ms: list[float] | None = None
    compile_ms: list[float] | None = None
    first_inference_ms: list[float] | None = None
    memory_before_open_bytes: int | None = None
    memory_growth_bytes: int | None = None  # from before opening to the peak, the largest of the processes
    executed: dict[str, int] | None = None  # layers by the precision in which they ran
    fell_back: str = ""  # what the runtime did in silence in place of what was asked for
    placement: Placement | None = None
    stable: bool | None = None  # in more than half of the processes
    p50_known_within_by_process: list[float | None] | None = None
    sustained: Sustained | None = None
    warm_up_settled: bool | None = None  # in every process
    warm_up_settled_by_process: list[bool] | None = None
    over_float32: Interval | None = None  # latency over that of the same target's float32, paired by round
    conditions: Conditions | None = None
    against_host: AgainstHost | None = None  # of another device than the host itself
    trust: Trust | None = None


class MeasurementFacts(Record):
    """One session on one device: results by bundle, A/A controls, and which bundles differ in latency.

    A control is a bundle over itself, measured twice in every round; ``judged_by`` names those that each bundle is
    judged by. ``resolution`` is the share within which a latency had to be known. ``order_seed`` drew who was measured
    when. ``pauses_seconds``: the session was stopped and went on after so long.
    """

    task: str
    device: str
    emulated: bool
    probe_before: Probe
    probe_after: Probe
    results: dict[str, Result]
    resolution: float
    controls: dict[str, Interval]
    judged_by: dict[str, list[str]]
    comparisons: list[Comparison]
    order_seed: int
    pauses_seconds: list[float]

    @field_validator("results")
    @classmethod
    def _every_latency_is_judged(cls, results: dict[str, Result]) -> dict[str, Result]:
        if any(result.latency_p50_ms is not None and result.trust is None for result in results.values()):
            raise ValueError("a latency without a word on its trust")
        return results

    @property
    def untrusted(self) -> dict[str, Trust]:
        """The bundles whose latencies are not to be believed."""
        found = {name: result.trust for name, result in self.results.items()}
        return {name: trust for name, trust in found.items() if trust is not None and trust.word != "trusted"}

    @property
    def trust(self) -> TrustWord | None:
        """The worst word of any bundle; None where nothing was timed."""
        words = {result.trust.word for result in self.results.values() if result.trust is not None}
        return next((word for word in get_args(TrustWord)[::-1] if word in words), None)


class Measurement(Artifact[MeasurementFacts]):
    """Raw latency samples and outputs of several bundles, measured in one session on one device."""

    kind = "measurement"
    Facts = MeasurementFacts
    Configs: ClassVar = {"bench": BenchConfig}
    LABELS = "labels.npy"  # of the test part
    IMAGES = "images.npy"  # the first 64 bits of the hash of every file of the test part

    @property
    def labels(self) -> np.ndarray:
        """Of the test part [N, ...], in its order."""
        return np.asarray(self.array(self.LABELS, "iu", 1))

    @cached_property
    def worked_out(self) -> dict[str, np.ndarray]:
        """What was worked out of its arrays, by name: what takes seconds is asked for again and again."""
        return {}

    @property
    def images(self) -> np.ndarray | None:
        """What tells the images of the test part from others, uint64 [N], in its order; None where it was not kept."""
        if self.IMAGES not in self.manifest.files:
            return None
        images = np.asarray(self.array(self.IMAGES, "u", 1))
        return same_length(self.path / self.IMAGES, images, self.labels)[0]

    def outputs(self, bundle: str, corruption: Corruption | None = None) -> np.ndarray:
        """What a bundle said of the test part [N, ...]; of the images with a fault, where one is named."""
        name = self.outputs_name(bundle, corruption)
        outputs = np.asarray(self.array(name, "fu", 2))
        return same_length(self.path / name, outputs, self.labels)[0]

    def all_outputs(self, bundles: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Those of ``bundles`` that were run at all, one at a time."""
        for name in bundles:
            if self.outputs_name(name) in self.manifest.files:
                yield name, self.outputs(name)

    @staticmethod
    def outputs_name(bundle: str, corruption: Corruption | None = None) -> str:
        """The file of a bundle's outputs [N, ...] for the test part, as it is or with a fault."""
        return f"{'logits' if corruption is None else f'logits-{corruption}'}/{bundle}.npy"

    def mismatches(self, bundle: str) -> list[Mismatch]:
        """Test images of which a bundle says something else here than on the host; none where that was not asked."""
        name = self.mismatches_name(bundle)
        return self.rows(name, Mismatch) if name in self.manifest.files else []

    @staticmethod
    def mismatches_name(bundle: str) -> str:
        """The file of those images."""
        return f"mismatches/{bundle}.json"

    @staticmethod
    def starts_name(bundle: str) -> str:
        """The file of what a bundle's fresh processes took to start."""
        return f"starts/{bundle}.json"

    @staticmethod
    def samples_name(bundle: str) -> str:
        """The file of a bundle's raw latencies, in nanoseconds, by process."""
        return f"latency_ns/{bundle}.json"


# ---- report ----------------------------------------------------------------------------------------------


class GainFacts(Record):
    """What a method added over the labels alone, in points; None without a control."""

    method: str
    gain_points: Interval | None


class DeviceReport(Record):
    """One device in a few words: its worst word, and how many sessions stand behind its numbers, at most.

    ``ship`` is the bundle to take, None where that is not decided. Each of ``pareto`` is one place on the front, with
    those that tie for it.
    """

    device: str
    trust: TrustWord | None
    sessions: int
    bundles: int
    ship: str | None = None
    pareto: list[list[str]]


class ReportFacts(Record):
    """The report in a few words."""

    devices: list[DeviceReport]
    gains: list[GainFacts]


class Report(Artifact[ReportFacts]):
    """The page and the numbers a person reads."""

    kind = "report"
    Facts = ReportFacts
    PAGE = "report.html"
    NUMBERS = "report.json"

    @property
    def page(self) -> Path:
        """The page, a file that opens anywhere."""
        return self.file(self.PAGE)

    @property
    def numbers(self) -> dict[str, Any]:
        """Every number of the page, as ``report.tables.collect`` describes them."""
        return dict(self.json(self.NUMBERS))


# ---- study -----------------------------------------------------------------------------------------------


class ClaimFacts(Record):
    """A claim that was named before the runs, and its verdict."""

    claim: str
    answer: Literal["holds", "does not hold", "not enough data", "one draw"]


class StudyFacts(Record):
    """What a study compared, what became of its claims, and the method that it advises ("labels" for no teacher)."""

    student: str
    teacher: str
    runs: int = Field(ge=0)
    views: int = Field(ge=1)  # a run
    claims: list[ClaimFacts]
    advice: str


class Study(Artifact[StudyFacts]):
    """Methods, shares of the images and seeds compared at equal cost: numbers, page, and the recipe that it advises."""

    kind = "study"
    Facts = StudyFacts
    Configs: ClassVar = {"study": StudyConfig}
    PAGE = "study.html"
    NUMBERS = "study.json"
    RECIPE = "recipe.yaml"

    @property
    def page(self) -> Path:
        """The page, a file that opens anywhere."""
        return self.file(self.PAGE)

    @property
    def numbers(self) -> dict[str, Any]:
        """Every number of the page, as ``report.study.collect`` describes them."""
        return dict(self.json(self.NUMBERS))


# ---- verdict ---------------------------------------------------------------------------------------------


Answer = Literal["pass", "fail", "cannot tell"]
Compared = Literal["value", "difference", "ratio"]


class RuleVerdict(Record):
    """What one rule of a gate comes to for one target on one device.

    ``candidate`` and ``baseline`` are in ``unit``. ``estimate`` is of what was ``compared`` with the rule's ``bound``:
    the candidate's value itself, its difference from the baseline's, or its ratio to it. ``p_broken`` is of the
    hypothesis that the rule is kept. ``detectable`` is the smallest change of the estimate (a share of it, for a ratio)
    that so much data shows nine times of ten; ``needed`` about how many ``counted`` would tell.
    """

    rule: str
    figure: str
    device: str
    target: str
    answer: Answer
    why: str
    unit: Unit
    candidate: float | None = None
    baseline: float | None = None
    compared: Compared
    estimate: Interval | None = None
    bound: float
    p_broken: float = Field(1.0, ge=0, le=1)
    detectable: float | None = Field(None, ge=0)
    counted: Counted
    count: int = Field(0, ge=0)
    needed: int | None = Field(None, ge=1)


class Moved(Record):
    """Something in the provenance of two artifacts that is not the same; None where one of them has no such thing."""

    about: Literal["tools", "device", "data", "settings"]
    what: str
    before: str | None
    after: str | None

    def words(self) -> str:
        """As in "onnxruntime 1.31 to 1.32"."""
        if self.before is None or self.after is None:
            return f"{self.what}: {self.after} is new" if self.before is None else f"{self.what}: {self.before} is gone"
        return f"{self.what} {self.before} to {self.after}"


class VerdictFacts(Record):
    """What a gate says of a candidate: its answer, every rule's, and what changed since the baseline.

    ``changed`` is between the two, ``since`` between what was measured of the baseline before and now. ``apart`` names
    the bundles that only one of the two has.
    """

    answer: Answer
    candidate: str
    baseline: str | None
    rules: list[RuleVerdict]
    changed: dict[str, list[Moved]]  # by target
    since: dict[str, list[Moved]]  # by device
    apart: list[str]


class Verdict(Artifact[VerdictFacts]):
    """What a gate said, for whoever merges: a machine, a pull request, a test report."""

    kind = "verdict"
    Facts = VerdictFacts
    Configs: ClassVar = {"gate": GateConfig}
    NUMBERS = "verdict.json"
    COMMENT = "comment.md"
    JUNIT = "junit.xml"


# ---- microcontrollers ------------------------------------------------------------------------------------


class Port(Record):
    """The one input or output of a flatbuffer. Values stand for ``scale`` times (value - ``zero_point``)."""

    shape: tuple[int, ...]
    type: str
    scale: float = Field(ge=0, allow_inf_nan=False)  # 0: they are classes, and stand for themselves
    zero_point: int


class Arena(Record):
    """Bytes of the smallest arena that an interpreter ran in, and the parts that its allocator counts."""

    total: int
    head: int  # activations
    tail: int  # bookkeeping, whose pointers have 8 bytes on the host that counted


class Estimate(Record):
    """What a compiler reckons of an accelerator, without one. ``fault`` says why it reckons nothing."""

    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: float | None = None
    cycles: int | None = None
    inference_ms: float | None = None
    sram_bytes: int | None = None
    flash_bytes: int | None = None
    operators_on_npu: int | None = None
    operators_on_cpu: int | None = None
    fault: str | None = None


class McuFacts(Record):
    """What a bundle's model takes in the interpreter of microcontrollers, and whether it computes the same there.

    ``different`` counts the images of which any output is another integer than by LiteRT's reference kernels.
    ``refused`` has a line for each limit that is not kept.
    """

    model: str
    images: int
    different: int
    largest_difference: int
    arena: Arena
    ram_bytes: int
    model_bytes: int
    flash_bytes: int
    sha256: str  # of the model
    input: Port
    output: Port
    operators: dict[str, int]
    in_float: dict[str, int]  # of them those that compute in float
    estimates: tuple[Estimate, ...]
    refused: tuple[str, ...]


class McuCheck(Artifact[McuFacts]):
    """A bundle held against a microcontroller; where nothing is refused, its model as an array in C++."""

    kind = "mcu-check"
    Facts = McuFacts
    Configs: ClassVar = {"check": McuConfig}
    HEADER = "kdpipe_model.h"
    SOURCE = "kdpipe_model.cc"


# ---- pick ------------------------------------------------------------------------------------------------


class Picked(Record):
    """A network that could be chosen, at one size: what is known of it and what became of it.

    ``p90_ms`` is of another session, with the interval of one: measured in ``sessions`` of them, or where there are
    none predicted from those of the others. ``chance`` is that of being within the limit then. ``prior`` is in points
    of whatever it is of; ``validation`` is the accuracy after the short training, as a share.
    """

    name: str
    model: str
    size: Size
    prior: float
    macs: int = Field(ge=1)
    activations: int = Field(ge=1)
    parameters: int = Field(ge=0)
    p90_ms: Interval | None = None
    sessions: int = Field(0, ge=0)
    trust: Trust | None = None
    chance: float | None = Field(None, ge=0, le=1)
    on_front: bool = False
    validation: float | None = Field(None, ge=0, le=1)
    why: str  # what became of it, in a few words


class LeftOut(Record):
    """What could not be chosen, and why."""

    name: str
    why: str


class PickFacts(Record):
    """Which network is the best within a latency, as far as a prior and a few measurements tell.

    ``chosen`` is None where nothing is within the limit; ``measured`` counts networks, ``left_out`` those that could
    not be candidates.
    """

    task: str
    device: str
    emulated: bool
    target: str
    variant: str
    limit_ms: PositiveFloat
    chosen: str | None
    fastest: str | None
    front: tuple[str, ...]
    candidates: int
    measured: int
    left_out: int


class Pick(Artifact[PickFacts]):
    """A student that was chosen by what it takes on a device; with the recipe that trains it."""

    kind = "pick"
    Facts = PickFacts
    Configs: ClassVar = {"pick": PickConfig}
    ROWS = "networks.json"  # a ``Picked`` each
    LEFT_OUT = "left-out.json"  # a ``LeftOut`` each
    RECIPE = "recipe.yaml"
    FIGURE = "pick.svg"

    @property
    def networks(self) -> dict[str, Picked]:
        """Every candidate by name. Raises UserError."""
        return {found.name: found for found in self.rows(self.ROWS, Picked)}

    @property
    def left_out(self) -> dict[str, str]:
        """By name why one could not be chosen. Raises UserError."""
        return {found.name: found.why for found in self.rows(self.LEFT_OUT, LeftOut)}


# ---- release ---------------------------------------------------------------------------------------------

# Semantic Versioning 2.0.0 without build metadata: two versions that differ in it would stand in no order.
_IDENTIFIER = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
VERSION = re.compile(
    rf"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*))?", re.ASCII
)
LONGEST_VERSION = 64
MOST_BUNDLES = 1000  # of a release
BundleName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
UNKNOWN_LICENCE = "unknown"


class ReleaseFacts(Record):
    """What a release is called, what it holds, who judged it, and under which licences lies what it was made from.

    ``verdict`` is the answer of the gate, None where nothing judged it. ``licences`` are by what they are of, as SPDX
    writes them, or "unknown".
    """

    name: str = Field(pattern=f"^{NAME.pattern}$")
    version: str = Field(pattern=f"^{VERSION.pattern}$", max_length=LONGEST_VERSION)
    bundles: tuple[BundleName, ...] = Field(min_length=1, max_length=MOST_BUNDLES)
    verdict: Answer | None = None
    licences: dict[str, str]

    @property
    def title(self) -> str:
        """Its name and version in one word."""
        return f"{self.name}@{self.version}"


class Release(Artifact[ReleaseFacts]):
    """Bundles that go out together under one version, with all that a stranger needs to know of them."""

    kind = "release"
    Facts = ReleaseFacts
    Configs: ClassVar = {"release": ReleaseConfig}
    largest_bytes = 16 * LARGEST_MODEL_BYTES
    SIGNATURE = "model.sig"  # over everything else in the folder, the manifest included
    beside = frozenset({SIGNATURE})
    BUNDLES = "bundles"
    REPORT = "report"
    VERDICT = "verdict"
    CARD = "README.md"
    BILL = "bom.cdx.json"
    PROVENANCE = "provenance.json"
    SUMS = "SHA256SUMS"
    CHANGES = "CHANGELOG.md"

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        """The bundles by name. Raises UserError for one that is not whole."""
        return {name: Bundle.open(self.path / self.BUNDLES / name) for name in self.facts.bundles}

    def digest(self, bundle: str) -> str:
        """What a device will call that bundle: the digest of its contents, as the manifest has them."""
        prefix = f"{self.BUNDLES}/{bundle}/"
        files = self.manifest.files.items()
        hashes = {name.removeprefix(prefix): file.sha256 for name, file in files if name.startswith(prefix)}
        return hashlib.sha256(canonical(hashes)).hexdigest()

    @property
    def is_signed(self) -> bool:
        """Whether a signature lies there; whose it is and of what, nobody has looked at."""
        return os.path.lexists(self.path / self.SIGNATURE)
