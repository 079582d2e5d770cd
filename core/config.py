"""What can be configured: one frozen model a stage; defaults stand here and nowhere else.

The same field name serves YAML, the command line (``--train.epochs 60``) and Python. ``...Settings`` are a section
that a person sets, ``...Plan`` is what a recipe or a command asks for, ``...Config`` what one stage is told, complete:
it is what the artifact's key is made of.
"""

from __future__ import annotations

import os
import re
import reprlib
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import UserError, did_you_mean
from .inputs import InputSpec, Mean, Resize, Side, Size, Std, sides
from .rules import parse_rules
from .sealed import LONGEST_NUMBER, MOST_LEVELS, NAME, printable

Fraction = Annotated[float, Field(gt=0, le=1)]
ONNX_MODEL = "onnx"  # the model of every network that is a file
Method = Literal[
    "labels",
    "hard",
    "kd",
    "bkd",
    "logit_mse",
    "dkd",
    "dist",
    "cwd",
    "hint",
    "at",
    "rkd",
    "cc",
    "crd",
    "review",
    "deep_supervision",
    "stagewise",
    "masked",
]


WITHOUT_TEACHER = ("labels", "masked")  # methods that learn from the images and what is known of them


def _is_one_of_list(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is a single one where the annotation wants several, however many."""
    if not isinstance(value, (str, int, float)):
        return False
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if any(get_origin(kind) is Literal and value in get_args(kind) for kind in kinds):
        return False
    return any(get_origin(kind) is tuple and Ellipsis in get_args(kind) for kind in kinds)


class Config(BaseModel):
    """The base of every configuration: frozen, and it refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_as_list(cls, values: Any) -> Any:
        """A single value where a list is wanted is a list of one."""
        if not isinstance(values, dict):
            return values
        known = cls.model_fields
        return {
            name: (value,) if name in known and _is_one_of_list(value, known[name].annotation) else value
            for name, value in values.items()
        }

    @classmethod
    def of(cls, *others: BaseModel, **more: Any) -> Self:
        """One of this class from what ``others`` say of its fields, later ones first, and from ``more``."""
        values: dict[str, Any] = {}
        for other in others:
            values |= {name: getattr(other, name) for name in cls.model_fields if name in type(other).model_fields}
        return cls(**values | more)


LICENCE = re.compile(r"[A-Za-z0-9(][A-Za-z0-9.+:() -]{0,199}")  # an SPDX expression, as far as its letters go
Licence = Annotated[str, Field(pattern=f"^{LICENCE.pattern}$")]


class DataPlan(Config):
    """Where the images come from and how they are split."""

    task: str = Field(
        "classification",
        description="what a network is to say of an image: classification, or segmentation (a class for every pixel)",
    )
    source: str = Field(
        description="'digits' (or 'masks', for segmentation), an image folder, or a name of timm's dataset factory "
        "(hfds/..., wds/..., tfds/...)"
    )
    root: str | None = Field(None, description="root folder of a wds/ or tfds/ source, or cache folder of an hfds/ one")
    train_split: str = Field("train", description="name of the part to learn from")
    test_split: str | None = Field(
        "auto",
        description="name of the held-out part; auto takes a folder's test, else its val (of other sources val); null "
        "cuts it from the training part",
    )
    val_split: str | None = Field(
        "auto",
        description="name of the part for selection; auto takes a folder's val where test is held out; null cuts "
        "val_fraction from the training part",
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="cut for testing where there is no test split"
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="cut from the training part for selection"
    )
    unlabeled: Path | None = Field(
        None,
        exclude=True,  # known by its fingerprint
        description="folder of further training images without labels, for the methods that need none",
    )
    classes: Path | None = Field(
        None,
        exclude=True,  # known by its fingerprint
        description="text file with one class a line, in the order of the checkpoint's outputs; some may have no "
        "training image. Left out, the training folders in name order; of masks classes.txt beside its parts",
    )
    palette: Path | None = Field(
        None,
        exclude=True,  # known by its fingerprint
        description="segmentation: text file with a colour and its class a line, such as 128 64 128 road, where masks "
        "are of colours; a colour without a name is not judged. Left out, masks hold numbers of classes",
    )
    ignore_index: int | None = Field(
        None, ge=0, le=65535, description="segmentation: number in masks that is no class; left out, 255"
    )
    check: Literal["all", "sample", "none"] = Field(
        "all", exclude=True, description="which images are decoded beforehand, so that a broken one is named early"
    )
    skip_broken: bool = Field(
        False, exclude=True, description="leave images out that cannot be read, instead of refusing them all"
    )
    duplicates: Literal["drop", "refuse", "allow"] = Field(
        "drop",
        exclude=True,  # known by what it leads to
        description="images to learn from that are the same as validation or test images: left out, refused, or kept",
    )
    store: Literal["auto", "resized", "none"] = Field(
        "auto",
        exclude=True,  # known by what it leads to
        description="resized: images are decoded once, into copies to learn from and arrays to be evaluated on; auto "
        "does so for photographs",
    )
    store_side: int | None = Field(
        None,
        ge=16,
        exclude=True,
        description="shorter side of the copies, pixels; left out, what the recipe's networks need (512 without one)",
    )
    most_images: int | None = Field(
        None,
        ge=1,
        description="images of each part at most, even over the classes and at least one of each; left out, all",
    )
    seed: int = Field(0, description="seed of the splits")
    license: Licence | None = Field(
        None,
        exclude=True,  # says nothing of what is learned
        description="of the images, as SPDX writes it, such as CC-BY-4.0; told with every release",
    )


class DataConfig(DataPlan):
    """The source with the hash of what it holds now, so that changed images make a new key."""

    decoding: int = Field(description="version of the rules by which image files become pixels")
    copies_side: int | None = Field(None, description="shorter side of the copies to learn from, if there are any")
    versions: dict[str, str] = Field({}, description="of the libraries that write the copies")
    fingerprint: str
    unlabeled_fingerprint: str | None = None
    classes_fingerprint: str | None = None
    palette_fingerprint: str | None = None
    held_out_copies: Literal["drop", "allow"] | None = Field(
        None, description="what became of copies of held-out images; nothing where no two images are the same"
    )

    @model_serializer(mode="wrap")
    def _without_what_is_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Neither what would become of copies that are not there nor what is not asked for makes another key."""
        values: dict[str, Any] = serialize(self)
        later = ("held_out_copies", "val_split", "most_images", "ignore_index", "palette_fingerprint")
        return {name: value for name, value in values.items() if name not in later or value is not None}


class FittedConfig(Config):
    """What decides the pixels that a network is shown of an image."""

    size: Size
    crop_fraction: float
    interpolation: str
    resize: Resize = "cover"
    antialias: bool
    decoding: int
    versions: dict[str, str] = Field(description="of the libraries that make the pixels")

    @model_serializer(mode="wrap")
    def _without_the_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """As of an InputSpec."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "resize" or value != "cover"}


SMALLEST_SIDE = 8  # pixels, of what a network is trained on


class InputSettings(Config):
    """How an image becomes the network's input; what is left out comes from timm's data for the model."""

    size: Size | None = Field(None, description="side of the square input, or [height, width], pixels")
    mean: Mean | None = Field(None, description="subtracted from RGB in 0..1")
    std: Std | None = Field(None, description="divides RGB in 0..1")
    crop_fraction: Fraction | None = Field(None, description="side of the centre crop over that of the resized image")
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"] | None = Field(
        None, description="resizing filter"
    )
    resize: Resize | None = Field(
        None,
        description="what becomes of other proportions: the image covers the input and the rest is cut off, it is "
        "stretched, or it is put in whole with grey borders; left out, cover, of masks stretch",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """``resize`` came later: as long as it says nothing it is in no key."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "resize" or value is not None}

    @field_validator("size")
    @classmethod
    def _not_tiny(cls, size: Size | None) -> Size | None:
        if size is not None and min(sides(size)) < SMALLEST_SIDE:
            raise ValueError(f"wanted at least {SMALLEST_SIDE} pixels")
        return size


class AugmentSettings(Config):
    """How random views of an image are made for training."""

    crop: Literal["pad", "resized", "none"] = Field(
        "resized", description="pad and crop (small images), random resized crop, or none"
    )
    pad_fraction: Annotated[float, Field(ge=0, le=0.5)] = Field(0.125, description="padding of crop=pad over the side")
    min_scale: Fraction = Field(0.35, description="smallest area of crop=resized over the whole")
    flip: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    auto_augment: str | None = Field(None, description="timm's policy string, such as rand-m7-mstd0.5")
    erase: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="probability of random erasing")


class TrainSettings(Config):
    """How long, in what steps and on which views a network is trained."""

    epochs: int = Field(60, ge=1, description="passes over the (fraction of the) training images")
    batch_size: int = Field(64, ge=2, description="images a step, over all processes of torchrun")
    repeats: int = Field(
        1, ge=1, description="views of an image side by side in an epoch, of so many times fewer images"
    )
    optimizer: str = Field("adamw", description="any optimiser of timm")
    learning_rate: float = Field(2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.05, ge=0, description="weight decay (not on biases and norms, see decay_all)")
    decay_all: bool = Field(False, description="decay biases and norms too, as the CIFAR literature does")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of the optimisers that have one")
    layer_decay: Fraction | None = Field(
        None, description="factor of the learning rate from each layer to the one below"
    )
    schedule: Literal["cosine", "multistep", "constant"] = Field("cosine", description="of the learning rate")
    milestones: tuple[int, ...] = Field((), description="epochs after which schedule=multistep lowers the rate")
    decay_rate: Fraction = Field(0.1, description="factor of schedule=multistep")
    warmup_epochs: int = Field(4, ge=0, description="epochs of linear warm-up (at most a quarter of the steps)")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="label smoothing of the label loss")
    mixup: float = Field(0.0, ge=0, description="alpha of Mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0 is off")
    clip_gradient: float | None = Field(None, gt=0, description="largest norm of the gradient")
    average: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an exponential moving average of the weights, which is then what is kept"
    )
    precision: Literal["float32", "bf16", "fp16", "auto"] = Field(
        "float32",
        description="auto times float32 and bf16, with and without channels-last, and takes the fastest: once for a "
        "network on a data set, its controls included",
    )
    select: Literal["last", "best"] = Field("last", description="keep the last epoch, or the best by validation")
    validate_every: int = Field(1, ge=1, description="epochs between two looks at the validation part")
    checkpoint_seconds: float = Field(30.0, ge=0, exclude=True, description="time between two states to resume from")
    workers: int = Field(2, ge=0, exclude=True, description="data loading processes")
    augment: AugmentSettings = AugmentSettings()


class ModelSettings(Config):
    """A network by its name, and the input it takes."""

    # What came later: as long as it says no more than its default it is in no key, so that what was made before is
    # found again.
    LATER: ClassVar[tuple[str, ...]] = ("code_sha256", "checkpoint_entry", "encoder", "encoder_checkpoint_sha256")

    model: str = Field(
        description="a name of timm, torchvision/NAME, MODULE:FUNCTION of your own code (with --allow-code), or a "
        "decoder that draws masks (unet, fpn, deeplabv3plus, segformer and others) over an encoder"
    )
    encoder: str | None = Field(None, description="a name of timm: what lies below a decoder, where model names one")
    # Weights are known by their hash, a checkpoint by its key among the inputs.
    encoder_checkpoint: Path | None = Field(
        None,
        exclude=True,
        description="what the encoder's weights are from: the folder of a checkpoint of the same network, such as a "
        "distilled classifier, or weights as a file",
    )
    encoder_checkpoint_sha256: str | None = Field(
        None, description="hash of the encoder's weights, if they are a file; worked out where it is left out"
    )
    model_args: dict[str, Any] = Field({}, description="further arguments of what makes the network")
    pretrained: bool = Field(
        False, description="start from the pretrained weights of timm or torchvision (needs a model hub)"
    )
    code_sha256: str | None = Field(
        None, description="hash of the file of your own code; worked out where it is left out"
    )
    input: InputSettings = InputSettings()

    @model_serializer(mode="wrap")
    def _without_what_is_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        usual = {name: info.default for name, info in type(self).model_fields.items() if name in self.LATER}
        return {name: v for name, v in values.items() if name not in usual or getattr(self, name) != usual[name]}


class Pruning(Config):
    """How much of a trained network is left before it learns on."""

    keep: Annotated[float, Field(ge=0.01, lt=1)] | None = Field(
        None,
        description="share of the multiply-accumulates of the network that is left at most, such as 0.5: channels are "
        "taken out of its layers, those with the smallest weights; left out, it stays whole",
    )
    round_to: int = Field(
        16,
        ge=1,
        le=1024,
        description="multiple that the widths of pruned layers are of, as kernels like them; with less, "
        "networks whose layers are narrow can be pruned further",
    )


if TYPE_CHECKING:

    class PruneSettings(Pruning):
        """Pruning, and of what."""
else:
    # A field whose name is a word of Python.
    PruneSettings = create_model(
        "PruneSettings",
        __base__=Pruning,
        __module__=__name__,
        __doc__="How much of a trained network is left before it learns on.",
        **{
            "from": (
                Path | None,
                Field(
                    None,
                    exclude=True,
                    description="the network that is pruned: the folder of its checkpoint, or its weights as a file; "
                    "the same as start",
                ),
            )
        },
    )


class StudentSettings(ModelSettings):
    """A network that learns, and what its weights begin as."""

    LATER: ClassVar[tuple[str, ...]] = (*ModelSettings.LATER, "prune")

    # Weights are known by their hash, a checkpoint by its key among the inputs.
    start: Path | None = Field(
        None,
        exclude=True,
        description="what the weights begin as: the folder of a checkpoint of the same network, trained for another "
        "task or by method masked, or weights as a file; the head is fresh where the classes are others",
    )
    start_sha256: str | None = Field(
        None, description="hash of the weights to start from, if they are a file; worked out where it is left out"
    )
    prune: PruneSettings = PruneSettings()

    @model_validator(mode="before")
    @classmethod
    def _starts_at_what_is_pruned(cls, values: Any) -> Any:
        """``prune.from`` is where the weights are from, and said once from here on."""
        prune = values.get("prune") if isinstance(values, dict) else None
        if isinstance(prune, Pruning) and (path := getattr(prune, "from", None)) is not None:
            return {**values, "start": path, "prune": prune.model_copy(update={"from": None})}
        if not isinstance(prune, dict) or prune.get("from") is None:
            return values
        if "keep" not in prune:
            raise ValueError("prune.from says what is pruned: wanted prune.keep too, the share that is left")
        if values.get("start") not in (None, prune["from"]):
            raise ValueError("start and prune.from both say where the weights are from: wanted one")
        return {**values, "start": prune["from"], "prune": {**prune, "from": None}}


class AdoptConfig(ModelSettings):
    """A network whose weights the user brings."""

    # The hash stands for the file in keys and lineage, so that neither holds a path of the user's machine.
    checkpoint: Path | None = Field(
        None,
        exclude=True,
        description="weights: .safetensors, or .pth with tensors only; or an .onnx file (model: onnx)",
    )
    checkpoint_sha256: str | None = Field(None, description="hash of the weights; worked out where it is left out")
    checkpoint_entry: str | None = Field(
        None,
        description="which of several state dicts in the file, such as state_dict_ema, or which prefix of its names; "
        "left out, the usual one",
    )
    license: Licence | None = Field(
        None,
        exclude=True,  # says nothing of what is learned
        description="of the weights, as SPDX writes it, such as MIT; left out, what timm says of pretrained ones",
    )


class TeacherPlan(AdoptConfig):
    """The teacher: read from a checkpoint, or trained here on all training images.

    As a control, one that never learned, or whose head forgot what its features know.
    """

    start: Literal["trained", "random_head", "untrained"] = Field(
        "trained",
        description="control: random_head gives a trained teacher's features a fresh head, untrained is its network "
        "with random weights",
    )
    label_fraction: Fraction = Field(
        1.0, description="share of the training images of each class that it learns from, where it is trained here"
    )
    train: TrainSettings = TrainSettings()
    seed: int = Field(0, description="seed of weights, order and views, and of the drawn fraction")

    @property
    def is_trained(self) -> bool:
        """Whether it is trained here: no weights are given, or those of an encoder alone."""
        given = self.checkpoint is not None or (self.pretrained and self.encoder is None)
        return not given and self.start != "untrained"

    def training(self) -> TrainConfig:
        """How it is trained, where it is."""
        return TrainConfig.of(self, method="labels", start=None)


class RestartConfig(ModelSettings):
    """A teacher that is a control: which network, and how much of its weights is random by this seed."""

    start: Literal["random_head", "untrained"]
    seed: int = 0


class DkdSettings(Config):
    """What method dkd weighs; its outputs are softened by ``temperature``."""

    alpha: float = Field(1.0, ge=0, description="weight of the target-class part")
    beta: float = Field(8.0, ge=0, description="weight of the non-target part; 2 to 8 in the literature")
    warmup_epochs: int = Field(20, ge=0, description="epochs over which the loss grows to its weight")


class DistSettings(Config):
    """What method dist weighs; its outputs are softened by ``temperature``."""

    beta: float = Field(1.0, ge=0, description="weight of the correlation within a sample")
    gamma: float = Field(1.0, ge=0, description="weight of the correlation within a class, over the batch")


class RkdSettings(Config):
    """What method rkd weighs."""

    distance_weight: float = Field(25.0, ge=0, description="weight of the distances between samples")
    angle_weight: float = Field(50.0, ge=0, description="weight of the angles between samples")


class CrdSettings(Config):
    """What method crd compares: each image's embedding with those of the images before it."""

    width: int = Field(128, ge=2, description="numbers of an embedding, of the student's and of the teacher's")
    negatives: int = Field(
        16384, ge=2, description="embeddings of earlier images that are remembered; a batch at least"
    )
    temperature: float = Field(0.07, gt=0, description="by which the cosine of two embeddings is divided")


class ReviewSettings(Config):
    """How method review begins."""

    warmup_epochs: int = Field(20, ge=0, description="epochs over which the loss grows to its weight")


class StagewiseSettings(Config):
    """How method stagewise goes: one stage after another learns the teacher's features, then the head the labels."""

    epochs: int | None = Field(
        None, ge=1, description="epochs a stage; left out, all stages and the head share the steps of train.epochs"
    )
    learning_rate: float | None = Field(None, gt=0, description="of the stages; left out, train.learning_rate")
    frozen_batchnorm: Literal["eval", "train"] = Field(
        "eval", description="statistics of frozen stages: kept, or moved on (as the published code does)"
    )
    handover: Literal["last", "best"] = Field(
        "last", description="a stage hands on its last epoch, or its best by loss"
    )


class DeepSettings(Config):
    """What method deep_supervision puts on the student's inner stages: heads that learn what the outputs learn."""

    width: Literal["own", "doubling"] = Field(
        "own",
        description="channels of a head: its stage's, or twice as many after each halving of the map, up to the larger "
        "of the student's and the teacher's deepest (as the heads of OFA-KD)",
    )
    weight: float = Field(1.0, gt=0, description="weight of each head, where that of the student's outputs is 1")
    fade: bool = Field(False, description="the heads' weight falls to nothing, evenly from epoch to epoch")
    labels: bool = Field(False, description="the heads learn the labels too, at label_weight times the heads' weight")


class HintSettings(Config):
    """Which of the teacher's maps method hint compares, how, and when."""

    stages: tuple[int, ...] | None = Field(
        None,
        min_length=1,
        description="numbers of the paired stages, from 1, the shallowest, or back from -1, the deepest; of several "
        "the mean counts; left out, the last but one",
    )
    normalize: bool = Field(
        False,
        description="hint, stagewise and review: each channel of the teacher's maps is brought to mean 0 and standard "
        "deviation 1 over the batch, so that one weight does for every family of networks",
    )
    logits: bool = Field(False, description="kd is added, at weight 1 beside kd_weight of the hints")
    two_stages: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the steps in which the stages up to the hint learn it alone, as the authors train; the "
        "whole network then learns without it, from the labels and, with hint.logits, kd; left out, all at once",
    )

    @field_validator("stages")
    @classmethod
    def _are_stages(cls, stages: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if stages is not None and 0 in stages:
            raise ValueError("stages are counted from 1, or back from -1")
        return stages


class MaskedSettings(Config):
    """What method masked hides of a view; the network learns to paint it from the rest."""

    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(0.6, description="share of the squares that are hidden")
    patch: int | None = Field(
        None, ge=1, description="side of a square, pixels; left out, a seventh of the input's shorter side"
    )


class DistillSettings(Config):
    """What the student learns from, by which method, and with what weight."""

    method: Method = Field("kd", description="what is learned from the teacher; labels is the control")
    label_weight: float = Field(1.0, ge=0, description="weight of the loss against the labels")
    label_loss: Literal["ce", "bce"] = Field("ce", description="cross-entropy, or binary cross-entropy per class")
    kd_weight: float | None = Field(None, ge=0, description="weight of the method's loss; left out, the method's own")
    temperature: float = Field(
        4.0, gt=0, le=1e6, description="temperature T of softened outputs; the loss is scaled by T^2"
    )
    standardize_logits: bool = Field(False, description="kd and dkd: compare standardised logits")
    shuffled_teacher: bool = Field(
        False, description="control: the teacher's non-maximal logits change places, so that only its top-1 is left"
    )
    teacher_control: Literal["flattened", "smoothing"] | None = Field(
        None,
        description="control: flattened spreads what the teacher gives other classes than its top-1 evenly, smoothing "
        "is a teacher made by hand that gives the label 0.9 and all else evenly; left out, the teacher as it is",
    )
    cwd_on: Literal["logits", "features"] | None = Field(
        None,
        description="method cwd: what is compared channel by channel; left out, the logits, or where a network gives "
        "one answer an image the features",
    )
    dkd: DkdSettings = DkdSettings()
    dist: DistSettings = DistSettings()
    rkd: RkdSettings = RkdSettings()
    stagewise: StagewiseSettings = StagewiseSettings()
    deep: DeepSettings = DeepSettings()
    hint: HintSettings = HintSettings()
    crd: CrdSettings = CrdSettings()
    review: ReviewSettings = ReviewSettings()
    masked: MaskedSettings = MaskedSettings()
    label_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of the training images of each class to learn from; 0 leaves data.unlabeled alone"
    )
    cache_views: int | None = Field(
        None,
        ge=1,
        description="so many views of each image take turns and the teacher answers them beforehand, once for all "
        "students; left out, every epoch has new views and the teacher is asked in training",
    )
    view_seed: int | None = Field(None, description="seed of the views; left out, seed, or 0 with cache_views")
    steps_as_unlabeled: bool = Field(
        False,
        description="labels: repeat the images until there were as many steps as with those of data.unlabeled too",
    )
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        "none", exclude=True, description="where else the curves are shown while they grow"
    )
    train: TrainSettings = TrainSettings()

    @field_validator("teacher_control")
    @classmethod
    def _one_control(cls, control: str | None, info: ValidationInfo) -> str | None:
        if control is not None and info.data.get("shuffled_teacher"):
            raise ValueError("wanted one control at a time: leave out shuffled_teacher")
        if control is not None and info.data.get("standardize_logits"):
            raise ValueError("standardised, such a teacher is equally sure of everything: leave out standardize_logits")
        return control


class TrainConfig(DistillSettings, StudentSettings):
    """One training run: a network and how it learns."""

    LATER: ClassVar[tuple[str, ...]] = (
        *StudentSettings.LATER,
        *("start_sha256", "cwd_on", "teacher_control", "masked", "deep", "hint", "crd", "review"),
    )

    seed: int = Field(0, description="seed of weights, order, views and of the drawn fraction")

    @property
    def needs_teacher(self) -> bool:
        """Whether the method learns from a teacher at all."""
        return self.method not in WITHOUT_TEACHER

    @property
    def views_by(self) -> int:
        """Seed of the views."""
        if self.view_seed is not None:
            return self.view_seed
        return self.seed if self.cache_views is None else 0


def changed_student(config: TrainConfig, change: dict[str, Any], where: str) -> TrainConfig:
    """``config`` with a change; another method has its own weights unless the change names them. Raises UserError."""
    found = changed(config, change, where)
    if found.method == config.method:
        return found
    own = {field: getattr(DistillSettings(), field) for field in ("label_weight", "kd_weight")}
    return found.model_copy(update={name: value for name, value in own.items() if name not in change})


def in_epochs(config: TrainConfig, epochs: int) -> TrainConfig:
    """``config`` for so many epochs: what else it says in epochs keeps its share of them.

    The last one is to be kept: nothing is validated before the end. The best one: it is looked for as often.
    """
    train = config.train
    share = epochs / train.epochs

    def scaled(warm_up: int) -> int:
        return max(1, round(share * warm_up)) if warm_up else 0

    every = epochs if train.select == "last" else max(1, round(share * train.validate_every))
    settings = {
        "epochs": epochs,
        "warmup_epochs": scaled(train.warmup_epochs),
        "milestones": tuple(round(share * each) for each in train.milestones),
        "validate_every": every,
    }
    changes: dict[str, Any] = {"train": train.model_copy(update=settings)}
    if config.method in ("dkd", "review"):
        its: DkdSettings | ReviewSettings = getattr(config, config.method)
        changes[config.method] = its.model_copy(update={"warmup_epochs": scaled(its.warmup_epochs)})
    if config.method == "stagewise" and config.stagewise.epochs is not None:
        changes["stagewise"] = config.stagewise.model_copy(update={"epochs": scaled(config.stagewise.epochs)})
    return config.model_copy(update=changes)


def control_of(config: TrainConfig, epochs: int | None = None) -> TrainConfig:
    """The same network trained as ``config`` is, on the labels alone; for so many ``epochs``, if given.

    What a control shares with it stands here.
    """
    kept = ("label_loss", "label_fraction", "cache_views", "view_seed", "tracker", "train", "seed")
    settings = {name: getattr(config, name) for name in kept}
    if epochs is not None:
        settings["train"] = config.train.model_copy(update={"epochs": epochs})
    return TrainConfig.of(StudentSettings.of(config), method="labels", **settings)


class CacheSettings(Config):
    """How many views of which images the teacher is asked about beforehand, and what is kept of its outputs."""

    views: int = Field(16, ge=1, description="views of each image; epochs take them in turn")
    view_seed: int = Field(0, description="seed of the views")
    label_fraction: Annotated[float, Field(ge=0, le=1)] = Field(1.0, description="share of the training images")
    seed: int = Field(0, description="seed of the drawn fraction")
    top: int | None = Field(
        None,
        ge=1,
        description="how many of the largest logits are kept; left out, all up to 256 classes, else 100; of masks all "
        "up to 32 classes, else 16 a place",
    )
    precision: Literal["float32", "bf16"] = Field("float32", description="in which the teacher is asked")
    augment: AugmentSettings = AugmentSettings()
    mixup: float = Field(0.0, ge=0, description="alpha of Mixup; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="alpha of CutMix; 0 is off")
    workers: int = Field(2, ge=0, exclude=True, description="data loading processes")


class CachePlan(CacheSettings, ModelSettings):
    """A cache as a person asks for it: for students that take the inputs of this network."""


class CacheConfig(CacheSettings):
    """A cache as its stage is told: for every student of this input, with these versions of the libraries."""

    input: InputSpec
    grid: tuple[Side, Side] | None = Field(
        None, description="height and width of the logits of masks: the student's; left out, the teacher's own"
    )
    versions: dict[str, str] = Field(description="of the libraries that can change a view")

    @model_serializer(mode="wrap")
    def _without_what_is_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "grid" or value is not None}

    def view_settings(self) -> TrainSettings:
        """What of a training run decides what a view shows."""
        return TrainSettings(augment=self.augment, mixup=self.mixup, cutmix=self.cutmix)


class DistillPlan(DistillSettings):
    """The student runs of a recipe: the method and its control, each with every seed."""

    control: bool = Field(
        True,
        description="also train on the labels alone, so that the gain is measured; with data.unlabeled twice: for as "
        "many epochs of its images, and for as many steps",
    )
    control_epochs: int | None = Field(None, ge=1, description="epochs of the control; left out, those of the method")
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="one pair of runs each; the first seed's student is shipped"
    )
    students: dict[str, dict[str, Any]] = Field(
        {},
        description="further students by name, each with what differs from student and distill; one of another method "
        "has that method's own weights unless it names some",
    )
    together: bool = Field(
        True, description="train students that see the same views side by side, from one forward of the teacher"
    )


class ParitySettings(Config):
    """On how many images, and how closely, an exported file must agree with torch."""

    parity_images: int = Field(64, ge=2, description="real images that torch and the exported file must agree on")
    parity_tolerance: float = Field(
        1e-3, gt=0, description="largest logit difference allowed, over the logits' spread; of classes, share of pixels"
    )


# What a file that draws masks gives: logits as they are, enlarged to the input, or of every pixel its class.
Output = Literal["logits", "logits-full", "classes"]


class GraphConfig(ParitySettings):
    """How a checkpoint becomes ONNX, as torch writes it and simplified."""

    output: Output = Field(
        "logits",
        description="of a network that draws masks: logits at its own stride, enlarged to the input, or classes, a "
        "byte a pixel",
    )
    hop_images: int = Field(
        256, ge=1, description="test images on which the exported graph's accuracy is told beside torch's"
    )

    @model_serializer(mode="wrap")
    def _without_the_usual_output(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Logits as they are have the key that they had before there was anything else."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "output" or value != "logits"}


class ExportConfig(GraphConfig):
    """How a checkpoint becomes a float32 file of one target."""

    target: str = Field("onnxruntime", description="onnxruntime, openvino, tensorrt or tflite")


class NetworkExportPlan(ExportConfig, AdoptConfig):
    """A network that is exported as it comes, without a data set."""

    classes: int | None = Field(
        None, ge=2, description="outputs of the network; left out, those of its pretrained weights"
    )


class RandomConfig(Config):
    """Random images in place of a data set: parity can be told on them, and nothing else."""

    size: Size
    images: int
    classes: int
    seed: int = 0


class SampleConfig(Config):
    """A few images of a data set, to make and to time networks with that nobody judges."""

    images: int = Field(64, ge=1)
    longest_side: int = Field(512, ge=1)  # pixels


class DrawConfig(ModelSettings):
    """A network of random weights that behave as trained ones: what it takes is asked, never what it says."""

    seed: int = 0
    images: int = Field(32, ge=1)  # by which the statistics of its norms are set


class ExportPlan(GraphConfig):
    """The students and the targets of a recipe."""

    students: Literal["method", "all"] | tuple[str, ...] = Field(
        "method",
        description="whose networks are exported: that of distill.method, all, or a list of names: distill.method, and "
        "those of distill.students",
    )
    targets: tuple[str, ...] = Field(("onnxruntime", "openvino", "tensorrt", "tflite"), min_length=1)


class CalibrateSettings(Config):
    """Which training images set the ranges of an INT8 model, and how."""

    images: int = Field(128, ge=2, description="how many")
    select: Literal["random", "balanced", "coverage", "teacher"] = Field(
        "balanced",
        description="drawn; even over the classes; spread over the model's outputs; spread over the teacher's entropy",
    )
    pool: int = Field(2048, ge=2, description="training images that coverage and teacher look at, at most")
    ranges: Literal["mse", "minmax"] = Field(
        "mse", description="ranges of least squared error, or of all values seen (NNCF has its own)"
    )
    seed: int = Field(0, description="seed of the choice")


TRAINED_VARIANT = "int8-qad"  # the one that is trained


class QadSettings(Config):
    """How a student is trained to compute in 8 bits, by what it says itself in float32: no label is asked for."""

    steps: int = Field(2000, ge=1, description="training steps; ranges are learned in the first two thirds of them")
    batch_size: int = Field(64, ge=2, description="images a step")
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate of the weights, which falls as a cosine")
    range_learning_rate: float = Field(
        1e-3, gt=0, description="that of the ranges of activations, as shares of what they begin as"
    )
    temperature: float = Field(2.0, gt=0, description="temperature T of softened outputs; the loss is scaled by T^2")
    learn_from: Literal["student", "teacher"] = Field(
        "student",
        description="whose answers are learned: those of the student itself in float32, or its teacher's, looked up "
        "where the student learned from a cache",
    )
    label_weight: float = Field(0.0, ge=0, description="weight of the loss against the labels, of images that have one")
    unlabeled: bool = Field(True, description="learn from the images of data.unlabeled too, where there are any")
    average: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an exponential moving average of the weights, which is then what is kept"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="of the arithmetic in training; bf16 rounds more coarsely than some 8-bit grids"
    )
    seed: int = Field(0, description="seed of the order and the views of images")
    checkpoint_seconds: float = Field(30.0, ge=0, exclude=True, description="time between two states to resume from")
    workers: int = Field(2, ge=0, exclude=True, description="data loading processes")


class QadConfig(QadSettings):
    """One such training, complete."""

    calibrate: CalibrateSettings = CalibrateSettings()
    quantized: bool = Field(description="false: the same steps in float32, the control")
    symmetric: bool = Field(description="ranges of activations around zero, as TensorRT and INT8 on ARM want them")
    weight_levels: Literal[64, 127] = Field(description="largest integer of a weight; 64 where sums would saturate")


class QuantizeSettings(Config):
    """How a float32 model becomes a smaller one."""

    # What came later: as long as it says no more than its default it is in no key.
    LATER: ClassVar[tuple[str, ...]] = ("qad",)

    calibrate: CalibrateSettings = CalibrateSettings()
    correct_biases: bool = Field(
        True,
        description="move biases against the mean shift of rounding, where that measures better (NNCF has its own)",
    )
    check_images: int = Field(128, ge=1, description="other training images on which it is compared with float32")
    allow_damage: bool = Field(
        False, description="seal a variant although it says something else than float32 of most of these images"
    )
    activations: Literal["auto", "uint8", "int8"] = Field(
        "auto", description="onnxruntime and its file in openvino: auto is uint8 on x86 and int8 on ARM"
    )
    reduce_range: bool | None = Field(
        None,
        description="7-bit weights for x86 CPUs without VNNI, whose INT8 sums saturate; left out, as this CPU needs",
    )
    max_drop: float | None = Field(
        None,
        gt=0,
        description="points of accuracy that may be lost on held-out images, surely; layers stay float until it holds",
    )
    guard_part: Literal["val", "test"] = Field(
        "val", description="held-out images of max_drop: the test part makes its own accuracy look better than it is"
    )
    guard_steps: int = Field(10, ge=1, description="mixes that max_drop tries at most")
    qad: QadSettings = QadSettings()

    @model_serializer(mode="wrap")
    def _without_what_is_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Nor is it in the key of a variant that nobody trains."""
        values: dict[str, Any] = serialize(self)
        trained = getattr(self, "variant", TRAINED_VARIANT) == TRAINED_VARIANT
        said = trained and self.qad.model_dump() != QadSettings().model_dump()
        return values if said else {name: value for name, value in values.items() if name not in self.LATER}


S = TypeVar("S", bound=QuantizeSettings)


class QuantizeConfig(QuantizeSettings):
    """Which variant is made of a float32 model, and how."""

    variant: str = Field(
        "int8",
        description="int8, int8-qad, int8-qdq, int8-full, int8-dynamic, float16 or bf16, as the target has them; auto: "
        "see below",
    )


def suited(config: S, machine: str, flags: Mapping[str, bool]) -> S:
    """``config`` with what it leaves to the CPU it is for decided, so that a key says it."""
    arm = machine.lower() in ("aarch64", "arm64")
    # x86 adds pairs of 8-bit products in 16 bits, which saturate, unless it has VNNI.
    saturates = bool(flags.get("avx2")) and not (flags.get("avx512_vnni") or flags.get("avx_vnni"))
    return config.model_copy(
        update={
            "activations": config.activations if config.activations != "auto" else "int8" if arm else "uint8",
            "reduce_range": saturates if config.reduce_range is None else config.reduce_range,
        }
    )


class QuantizePlan(QuantizeSettings):
    """The variants of a recipe, for every target."""

    variants: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="auto makes what could make sense on this machine; or names, each where a target has it"
    )


class PackageConfig(Config):
    """What a bundle holds besides its model."""

    golden_images: int = Field(
        8, ge=1, description="test inputs shipped with their expected outputs; of masks fewer, where they are large"
    )


def _bytes_of(value: object) -> object:
    """A number of bytes from ``256k`` or ``1M`` (of 1024)."""
    found = re.fullmatch(r"([0-9]{1,9})([kM]?)", value.strip()) if isinstance(value, str) else None
    if isinstance(value, str) and found is None:
        raise ValueError("wanted bytes, as 65536, 256k or 1M")
    return value if found is None else int(found[1]) * {"": 1, "k": 2**10, "M": 2**20}[found[2]]


Accelerator = Literal[
    "ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512",
    "ethos-u85-128", "ethos-u85-256", "ethos-u85-512", "ethos-u85-1024", "ethos-u85-2048",
]  # fmt: skip


class McuConfig(Config):
    """What a bundle is held against on its way to a microcontroller."""

    ram: Annotated[int, BeforeValidator(_bytes_of)] = Field(
        256 * 1024, ge=1, description="that the arena may take: bytes, or as 256k or 1M"
    )
    flash: Annotated[int, BeforeValidator(_bytes_of)] = Field(
        1024 * 1024, ge=1, description="that the model's bytes may take: bytes, or as 256k or 1M"
    )
    images: int = Field(64, ge=1, description="of the test part of --data, besides the bundle's golden ones")
    accelerators: tuple[Accelerator, ...] = Field(
        ("ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u85-256"),
        description="whose cycles vela estimates; [] for none",
    )


class DeviceSettings(Config):
    """A machine that bundles run on, as devices.yaml describes it under its name."""

    name: str = Field("local", pattern=f"^{NAME.pattern}$", max_length=64, description="what it is called here")
    kind: str = Field(
        "local", description="how it is reached: local (this machine), ssh, adb, or null (what measuring itself costs)"
    )
    address: str | None = Field(
        None,
        description="ssh: anything that ssh takes, such as pi@pi5 or a name of ssh_config; adb: serial or host:port",
    )
    ssh_config: str | None = Field(
        None, description="ssh: a configuration of its own for OpenSSH's client [~/.ssh/config and the system's]"
    )
    python: str = Field("python3", description="command that starts Python 3.9 or newer there")
    folder: str | None = Field(
        None, description="where kdpipe keeps what it brings [.kdpipe in the home; adb: /data/local/tmp/kdpipe]"
    )
    keep_versions: int = Field(
        3, ge=1, description="deployed bundles kept there; the live and the previous one stay in any case"
    )
    keep_bytes: int = Field(2**30, ge=0, description="that the deployed bundles may take there; 0: any")
    emulated: bool = Field(False, description="an emulator: its latencies are marked and never ranked")
    benchmark_model: str | None = Field(
        None,
        description="your own benchmark_model of LiteRT's for it, a file here: GPU and NPU latency of tflite bundles",
    )


def _of_unit(units: Mapping[str, float], wanted: str) -> BeforeValidator:
    """Takes a number, or the text of one with its unit."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) ?([a-z]+)", value.strip())
        try:
            return float(value) if found is None else float(found[1]) * units[found[2]]
        except (KeyError, ValueError):
            raise ValueError(f"wanted a number, or one such as {wanted}") from None

    return BeforeValidator(read)


_NUMBER_OR_TEXT = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})
Seconds = Annotated[float, _of_unit({"s": 1, "m": 60, "min": 60, "h": 3600}, "90s, 10m or 1h"), _NUMBER_OR_TEXT]
ImagesPerSecond = Annotated[float, _of_unit({"fps": 1}, "5fps"), _NUMBER_OR_TEXT]
Milliseconds = Annotated[float, _of_unit({"ms": 1, "s": 1000}, "10ms or 0.2s"), _NUMBER_OR_TEXT]

Effort = Literal["quick", "default", "thorough", "mlperf"]
# What an effort means for every field that is not given. mlperf has the duration and the statistic of MLPerf's single
# stream scenario, and none of its other rules: its numbers are no MLPerf results.
EFFORTS: dict[str, dict[str, float]] = {
    "quick": {
        "seconds": 0.5, "min_samples": 64, "max_seconds": 2, "warm_up_seconds": 1, "cold_starts": 3, "rounds": 6
    },
    "default": {
        "seconds": 2, "min_samples": 128, "max_seconds": 10, "warm_up_seconds": 1, "cold_starts": 10, "rounds": 10
    },
    "thorough": {
        "seconds": 10, "min_samples": 1024, "max_seconds": 60, "warm_up_seconds": 3, "cold_starts": 20, "rounds": 10
    },
    "mlperf": {
        "seconds": 600, "min_samples": 1024, "max_seconds": 900, "warm_up_seconds": 3, "cold_starts": 10, "rounds": 2
    },
}  # fmt: skip


class TimingSettings(Config):
    """How long one process times, and when it stops: after the time, the inferences and the certainty asked for."""

    effort: Effort = Field(
        "default",
        description="what is meant by each setting that is left out: quick for a first look, thorough for a claim, "
        "mlperf with that benchmark's durations (its numbers are no MLPerf results)",
    )
    seconds: float = Field(2.0, gt=0, le=86_400, description="steady time of one measurement, at least")
    min_samples: int = Field(128, ge=1, le=1_000_000, description="inferences of one measurement, at least")
    p50_within: float = Field(
        0.01, gt=0, le=1, description="share within which its median must be known before it stops"
    )
    max_seconds: float = Field(
        10.0, gt=0, le=86_400, description="steady time after which it stops all the same and is called unstable"
    )
    warm_up_seconds: float = Field(
        1.0, ge=0, le=3600, description="warm-up before one measurement, at least; and ten calls"
    )
    cold_starts: int = Field(10, ge=0, le=1000, description="fresh processes that only open the model and run it once")
    page_cache: Literal["warm", "dropped"] = Field(
        "warm", description="dropped: the bundle's files are not in memory when such a process starts"
    )
    rate: ImagesPerSecond = Field(
        0.0, ge=0, le=1e6, description="images a second that come in, such as 5fps; 0: the next one at once"
    )
    sustained: Seconds = Field(
        0.0, ge=0, le=86_400, description="how long one more process of each bundle goes on: seconds, or such as 10m"
    )
    images: int = Field(
        64, ge=1, le=1_000_000, description="test images rotated through while timing, spread over the classes"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_effort(cls, values: Any) -> Any:
        """What the effort says of the fields that are not given; a longer ``seconds`` lengthens ``max_seconds``."""
        effort = values.get("effort", "default") if isinstance(values, dict) else None
        if not isinstance(effort, str) or effort not in EFFORTS:
            return values  # the fields say what is wrong
        meant = {name: value for name, value in EFFORTS[effort].items() if name in cls.model_fields}
        given = values.get("seconds")
        if isinstance(given, (int, float)) and given > meant["max_seconds"]:
            meant["max_seconds"] = given
        return meant | values

    @field_validator("max_seconds")
    @classmethod
    def _not_below_seconds(cls, value: float, known: ValidationInfo) -> float:
        if value < known.data.get("seconds", 0):
            raise ValueError(f"wanted at least 'seconds', {known.data['seconds']:g}")
        return value


class MeasureSettings(TimingSettings):
    """How one bundle is measured once, in one process."""

    threads: int = Field(0, ge=0, description="threads of the runtime; 0 takes every core that counts")


def _listed(value: Any) -> Any:
    """Numbers of threads, some of them perhaps as a command line gives them: 1,2,4,all."""
    if not isinstance(value, (list, tuple)):
        return value
    found = [part for each in value for part in (each.split(",") if isinstance(each, str) else (each,))]
    return tuple(0 if isinstance(each, str) and each.strip() == "all" else each for each in found)


def _each_once(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) < len(value):
        raise ValueError("wanted every number of threads once")
    return value


_COUNT = {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 4096}, {"type": "string"}]}
Threads = Annotated[
    tuple[Annotated[int, Field(ge=0, le=4096)], ...],
    BeforeValidator(_listed),
    AfterValidator(_each_once),
    WithJsonSchema({"type": "array", "items": _COUNT}),
]


# What may go wrong between a scene and a network; ``data.corrupt`` makes each.
Corruption = Literal["jpeg", "blur", "noise", "dark"]


def _named(value: Any) -> Any:
    """Names, some of them perhaps as a command line gives them: dark,blur."""
    if not isinstance(value, (list, tuple)):
        return value
    found = [part for each in value for part in (each.split(",") if isinstance(each, str) else (each,))]
    return tuple(part.strip() if isinstance(part, str) else part for part in found)


def _each_corruption_once(value: tuple[Corruption, ...]) -> tuple[Corruption, ...]:
    if len(set(value)) < len(value):
        raise ValueError("wanted every corruption once")
    return value


Corruptions = Annotated[
    tuple[Corruption, ...],
    BeforeValidator(_named),
    AfterValidator(_each_corruption_once),
    WithJsonSchema({"type": "array", "items": {"enum": list(get_args(Corruption))}}),
]


class SessionSettings(TimingSettings):
    """One measuring session: every bundle in a fresh process each time, interleaved."""

    threads: Threads = Field(
        (0,),
        min_length=1,
        description="threads of the runtime; 0 or all takes one a core (of the fast ones, where cores differ); several "
        "such as 1,2,all make a row each",
    )
    rounds: int = Field(
        10,
        ge=2,
        multiple_of=2,
        description="fresh processes for each bundle, an even number (every second round runs backwards); "
        "intervals need 6",
    )
    resolution: float = Field(
        0.1, gt=0, lt=1, description="share within which a latency must be known to be trusted; else it is called noisy"
    )
    corruptions: Corruptions = Field(
        (),
        description="faults of a camera that every test image is shown with too: jpeg, blur, noise, dark; "
        "each takes as long as the accuracy does",
    )

    @model_serializer(mode="wrap")
    def _without_corruptions_where_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A session without corruptions has the key that it had before there were any."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value or name not in ("corruptions", "corrupting")}


class BenchPlan(SessionSettings):
    """Where bundles are measured, and in how many sessions."""

    devices: tuple[str, ...] = Field(
        ("local",),
        min_length=1,
        description="names of the devices, measured side by side: local, those of devices.yaml, or null for what "
        "measuring itself costs",
    )
    sessions: int = Field(
        1, ge=1, le=1000, description="sessions of each device, one after the other: a claim is pooled over them"
    )

    @field_validator("devices")
    @classmethod
    def _each_once(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(devices)) < len(devices):
            raise ValueError("each device can be named once")
        return devices


def _parted(value: Any) -> Any:
    """Words or numbers, some of them perhaps as a command line gives them: a*,b*."""
    if isinstance(value, (str, int)):
        value = (value,)
    if not isinstance(value, (list, tuple)):
        return value
    found = [part.strip() for each in value for part in str(each).split(",")] if _flat(value) else list(value)
    return tuple(int(part) if isinstance(part, str) and part.isdecimal() else part for part in found)


def _flat(value: Sequence[Any]) -> bool:
    return all(isinstance(each, (str, int)) for each in value)


class CandidateInput(Config):
    """On how many pixels networks are tried."""

    size: Annotated[tuple[Size, ...], BeforeValidator(_parted)] = Field(
        (), description="sides of the square input, such as 160,192,224; left out, each network's usual one"
    )

    @field_validator("size")
    @classmethod
    def _each_once(cls, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
        if any(min(sides(size)) < SMALLEST_SIDE for size in sizes):
            raise ValueError(f"wanted at least {SMALLEST_SIDE} pixels")
        return tuple(dict.fromkeys(sizes))


class PickPlan(Config):
    """Which networks a student is chosen from, by what it may take on its device."""

    p90: Milliseconds = Field(
        gt=0, le=1e7, description="latency that nine of ten images may take at most, such as 10ms"
    )
    device: str = Field("local", description="name of the device that it is measured on")
    target: str = Field("onnxruntime", description="what it is exported to")
    variant: str = Field("int8", description="float32, or a variant that the target has")
    candidates: Annotated[str | tuple[str, ...], BeforeValidator(_parted)] = Field(
        ("*",),
        description="patterns of names of timm, such as mobilenet*,repvit*; or a text file with one a line. The usual: "
        "all that the prior knows",
    )
    input: CandidateInput = CandidateInput()
    budget: int = Field(16, ge=1, le=1000, description="networks that are measured at most")
    prior: str = Field(
        "imagenet",
        description="how good each may become, before any is trained: imagenet (public results of timm's weights), "
        "runs (validation of what was trained here on the same images), or a file of lines such as resnet18,71.5",
    )
    threads: int = Field(0, ge=0, le=4096, description="threads of the runtime; 0 takes one a core")
    rounds: int = Field(6, ge=2, multiple_of=2, description="fresh processes for each network in a session")
    train: int = Field(
        0, ge=0, le=100, description="so many of the best are trained shortly, and the validation part decides"
    )
    short: Fraction = Field(0.1, description="share of the epochs that train gives each")
    distill: DistillSettings = DistillSettings()


class PickConfig(PickPlan):
    """A choice, complete: by which prior, and how one is chosen."""

    version: Literal[1] = Field(1, description="of the answer and its files: those of another one are made anew")
    prior_sha256: str
    device_fingerprint: dict[str, Any]


class BenchConfig(SessionSettings):
    """A session on the device as it is now, and which attempt at it this is: a measurement is an event.

    Another machine, kernel, governor or version of a runtime makes another session, another attempt another key.
    """

    device: str = Field(description="name of the device")
    device_fingerprint: dict[str, Any]
    attempt: int = Field(0, ge=0, description="from 1 on; 0 names the session itself")
    corrupting: int | None = Field(None, description="version of the rules by which images are corrupted, if they are")


class StrangeConfig(Config):
    """A model of somebody else's, by content, and what its user says of the images that it takes."""

    sha256: dict[str, str]
    input: InputSpec | None


class AdoptFilePlan(ExportConfig):
    """A model of somebody else's, adopted to be made smaller and measured: what it takes, and for which target."""

    input: InputSettings = InputSettings()


class AdoptFileConfig(StrangeConfig, GraphConfig):
    """Such a model, complete: how its file becomes a graph like any other."""


class ReleaseConfig(Config):
    """A release: its name and version, and by their keys what it tells of besides its bundles."""

    name: str
    version: str
    license: Licence | None = None
    acknowledged: tuple[str, ...] = ()
    report: str | None = None
    verdict: str | None = None
    last: str | None = None


EXPLAIN = "show where teacher, student and bundles see what they say of the images that changed"


class ReportSettings(Config):
    """What a recipe says of its page."""

    explain: bool = Field(False, description=EXPLAIN)


class ReportConfig(Config):
    """What the page is called, and what it advises."""

    version: Literal[3] = Field(3, description="of the numbers and the page: reports of another one are made anew")
    # What came later: as long as it says nothing it is in no key.
    LATER: ClassVar[tuple[str, ...]] = ("missing", "smoke", "explain")

    title: str = Field("kdpipe", description="title of the page")
    max_drop: float = Field(0.5, gt=0, description="points of accuracy that an advised variant may lose to float32")
    missing: tuple[str, ...] = Field((), description="what a run failed to make, which the page names")
    smoke: bool = Field(False, description="of a smoke run: the page says that no number of it is a result")
    explain: bool = Field(False, description=EXPLAIN)

    @model_serializer(mode="wrap")
    def _without_what_is_unsaid(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value or name not in self.LATER}


class GatePlan(Config):
    """What a candidate must keep to be let through, and by how much measuring."""

    rules: tuple[str, ...] = Field(
        ("accuracy >= baseline - 1pp", "latency p50 <= 1.1 x baseline", "size <= 1.1 x baseline"),
        min_length=1,
        description="each FIGURE <= BOUND or FIGURE >= BOUND, with on DEVICE and for TARGET where it is not of all",
    )
    sessions: int = Field(
        4,
        ge=1,
        le=1000,
        description="trusted sessions that measure both where a rule is of latency, memory or starts; one tells only "
        "what lies beyond its resolution",
    )

    @field_validator("rules")
    @classmethod
    def _are_rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        """In their usual spelling, each once."""
        try:
            return tuple(dict.fromkeys(map(str, parse_rules(rules))))
        except UserError as error:
            raise ValueError(str(error)) from None


class GateConfig(Config):
    """What a verdict is told besides what was measured."""

    version: Literal[1] = Field(1, description="of the verdict and its files: those of another one are made anew")
    rules: tuple[str, ...]
    candidate: str
    baseline: str | None
    measured_before: dict[str, str] = Field({}, description="keys of what was measured of the baseline, by device")


def _student_by_name(value: Any) -> Any:
    """A name alone is the network of that name."""
    return {"model": value} if isinstance(value, str) else value


class StudyPlan(Config):
    """What a study compares: methods on shares of the images, by seed, at equal cost a run."""

    student: Annotated[StudentSettings, BeforeValidator(_student_by_name)]
    fractions: tuple[Fraction, ...] = Field(
        (0.02, 0.1, 0.5, 1.0), min_length=1, max_length=20, description="shares of the training images"
    )
    methods: tuple[str, ...] = Field(
        ("kd", "hint", "stagewise"),
        max_length=30,
        description="what is compared with labels alone: methods of distill; deep is deep_supervision",
    )
    temperatures: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = Field(
        (1.0, 4.0, 20.0), min_length=1, max_length=20, description="of method kd, each a method of its own, kd-T4"
    )
    further: dict[str, dict[str, Any]] = Field(
        {}, description="methods of your own by name, each with what differs from distill"
    )
    controls: tuple[str, ...] = Field(
        ("smoothing", "shuffled"),
        max_length=10,
        description="besides labels alone: smoothing (of the labels), and kd at the middle temperature from a teacher "
        "of whom less is left: shuffled, flattened or smoothing-teacher",
    )
    longer: int | None = Field(
        None, ge=2, le=100, description="also labels and every method of methods for so many times the views"
    )
    teachers: dict[str, Path] = Field(
        {},
        exclude=True,  # known by their keys
        description="further teachers by name, each a checkpoint's folder: all that have one are run with them too",
    )
    starts: dict[str, Path] = Field(
        {},
        exclude=True,  # known by their keys
        description="also labels and every method from other weights than the seed's, by name: checkpoints' folders, "
        "such as of another task or of method masked, whose own cost no run counts",
    )
    own_size: bool = Field(
        False, description="also a teacher of the student's own size, trained on the labels of all images as they are"
    )
    seeds: int = Field(3, ge=1, le=100, description="runs of a method on a share")
    cost: Literal["views", "seconds"] = Field(
        "views",
        description="what every run costs alike: views, or seconds, of which the fastest method makes most views",
    )
    views: int | None = Field(
        None, ge=1, description="views a run, of labels alone; left out, what budget has room for, or train.epochs"
    )
    budget: str | None = Field(
        None, exclude=True, description="time for all runs, such as 2h or 90m, by this machine's pace as it is measured"
    )
    claims: tuple[str, ...] = Field(
        (),
        max_length=5,
        description="what is claimed before anything runs, five at most, such as 'kd-T4 > labels at 0.02' or '... by "
        "1' (points); left out, that methods beat labels on the smallest share",
    )
    worth: float = Field(1.0, gt=0, le=100, description="the smallest gain that would matter, points")
    int8: Literal["claims", "all", "none"] = Field(
        "claims", description="of which runs INT8 is made and tested: of the methods that claims name, all, or none"
    )
    distill: DistillSettings = DistillSettings()  # what every method begins with

    @model_validator(mode="after")
    def _one_cost(self) -> Self:
        if self.views is not None and self.budget is not None:
            raise ValueError("wanted views or budget, which says how many views there are, not both")
        return self

    @field_validator("fractions", "temperatures", "methods", "controls")
    @classmethod
    def _each_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError("each can be named once")
        return values


class StudyConfig(Config):
    """A study, complete: its plan, what the runs cost, and by their keys the runs."""

    version: Literal[2] = Field(2, description="of the numbers and the page: those of another one are made anew")
    plan: StudyPlan
    views: int
    claims: tuple[str, ...]
    cells: dict[str, str] = Field(description="keys of the runs by name")
    failed: dict[str, str] = Field({}, description="why a run could not be made, by name")


class GateRecipe(Config):
    """The part of a recipe that judges, of what was made elsewhere."""

    gate: GatePlan = GatePlan()
    bench: BenchPlan = BenchPlan()


class Recipe(Config):
    """A whole chain: ``kdpipe run FILE.yaml``."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the run and its report")
    data: DataPlan
    teacher: TeacherPlan
    student: StudentSettings
    distill: DistillPlan = DistillPlan()
    export: ExportPlan = ExportPlan()
    quantize: QuantizePlan | None = QuantizePlan()
    package: PackageConfig = PackageConfig()
    bench: BenchPlan = BenchPlan()
    report: ReportSettings = ReportSettings()
    gate: GatePlan = GatePlan()


C = TypeVar("C", bound=BaseModel)


def validated(kind: type[C], values: Any, where: str) -> C:
    """``values`` as a ``kind``; the first mistake becomes one line that names the field.

    Raises:
        UserError: unknown key (with the near one), wrong type or value.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: wanted a mapping of {', '.join(kind.model_fields)}, found {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields_at(kind, first["loc"][:-1])
            word = str(first["loc"][-1])
            raise UserError(
                f"{where}: unknown key '{path}'{did_you_mean(word, known)} (known: {', '.join(known)})"
            ) from None
        found = "nothing" if first["type"] == "missing" else _shown(first["input"])
        reason = _lower_first(first["msg"].removeprefix("Value error, ")).replace("tuple", "list")  # as YAML has it
        raise UserError(f"{where}: '{path}': {reason}, found {found}") from None


def changed(config: C, changes: Any, where: str) -> C:
    """``config`` with ``changes``, a mapping of what differs, section by section. Raises UserError."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    if not isinstance(changes, dict):
        return validated(type(config), changes, where)
    for name, change in changes.items():
        section = values.get(name)
        if isinstance(section, BaseModel) and isinstance(change, dict):
            change = changed(section, change, f"{where}.{name}")
        values[name] = change
    return validated(type(config), values, where)


def _shown(value: Any) -> str:
    """A value as an error shows it: its beginning, however much it holds; a single one without the list made of it."""
    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = shown.maxlong = 80
    return printable(shown.repr(value), 200)


def first_of(error: BaseException) -> str:
    """The first line of an error's text."""
    return str(error).partition("\n")[0][:200]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def nested(annotation: Any) -> type[BaseModel] | None:
    """The configuration that a field holds (also when it may be null), or None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _fields_at(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        kind = nested(kind.model_fields[str(part)].annotation) or kind
    return list(kind.model_fields)


LARGEST_RECIPE_BYTES = 2**20
MOST_VALUES = 100_000  # of a YAML text, each counted as often as aliases repeat it


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError for what is no YAML, or would unfold to a value without end."""
    import yaml

    try:
        # First: composing goes down level by level, as far as the limit of recursion, which converters raise.
        level = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            level += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if level > MOST_LEVELS:
                raise ValueError("too many levels inside each other")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or first_of(error)})") from None
    except (ValueError, AttributeError) as error:  # a date or a number that is none
        raise UserError(f"{where}: not YAML ({first_of(error)})") from None


def _count_values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node holds when its aliases are written out.

    Raises:
        ValueError: too many, a key given twice, or a number that is not finite or endless.
    """
    text = getattr(node, "value", "")
    if isinstance(text, str) and node.tag.endswith((":int", ":float")):
        if len(text) > LONGEST_NUMBER:
            raise ValueError(f"a number of {len(text)} digits")
        if text.lower().endswith((".inf", ".nan")):
            raise ValueError(f"a number that is not finite ({text})")
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is counted: a node inside itself has no end
        inside = text if isinstance(text, list) else []
        keys = Counter(item[0].value for item in inside if isinstance(item, tuple) and isinstance(item[0].value, str))
        if twice := [key for key, times in keys.items() if times > 1]:
            raise ValueError(f"'{printable(twice[0], 80)}' is given twice")
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_count_values(part, known) for part in parts)
    if known[id(node)] > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values, aliases written out")
    return known[id(node)]


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read ``kdpipe.yaml``; relative paths in it are taken from its own folder.

    Args:
        changes: each ``KEY=VALUE``, such as ``distill.temperature=2``: as if it stood in the file.

    Raises:
        UserError: no recipe, or a mistake in one.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_RECIPE_BYTES + 1)
        if len(content) > LARGEST_RECIPE_BYTES:
            raise UserError(f"{path} is larger than {LARGEST_RECIPE_BYTES} bytes: wanted a recipe")
        text = content.decode()
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}: wanted a YAML file such as recipes/digits.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): wanted a YAML file") from None
    values = parse_yaml(text, str(path))
    for change in changes:
        values = _changed_by(values, change)
    recipe = validated(Recipe, values, f"{path} with --set" if changes else str(path))
    return _resolve_paths(recipe, path.parent)


def gate_recipe(changes: Sequence[str] = ()) -> GateRecipe:
    """How a candidate that has no recipe is judged, with ``changes`` as in ``read_recipe``. Raises UserError."""
    values: Any = {}
    for change in changes:
        values = _changed_by(values, change)
    return validated(GateRecipe, values, "--set")


def _changed_by(values: Any, change: str) -> Any:
    """``values`` with one ``KEY=VALUE``; what an alias shares with another section is changed in this one alone."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise UserError(f"--set: wanted KEY=VALUE such as distill.temperature=2, found '{change}'")
    made = place = dict(values) if isinstance(values, dict) else {}
    *outer, last = name.split(".")
    for part in outer:
        below = place.get(part)
        if below is not None and not isinstance(below, dict):
            raise UserError(f"--set {name}: '{part}' is {_shown(below)}, wanted a section of settings")
        place[part] = place = dict(below or {})
    place[last] = parse_yaml(text, f"--set {name}")
    return made if isinstance(values, dict) else values


WEIGHTS = ("encoder_checkpoint", "start")  # fields of a network that say where weights lie


def _resolve_paths(recipe: Recipe, folder: Path) -> Recipe:
    source, checkpoint = recipe.data.source, recipe.teacher.checkpoint
    data, teacher = recipe.data, recipe.teacher
    # A source is a path when it looks like one; 'digits' and 'hfds/name' are names.
    if source.startswith((".", "~", os.sep)) or (folder / source).exists():
        data = data.model_copy(update={"source": str(_absolute(folder, Path(source)))})
    if data.unlabeled is not None:
        data = data.model_copy(update={"unlabeled": _absolute(folder, data.unlabeled)})
    if data.classes is not None:
        data = data.model_copy(update={"classes": _absolute(folder, data.classes)})
    if data.palette is not None:
        data = data.model_copy(update={"palette": _absolute(folder, data.palette)})
    if checkpoint is not None:
        teacher = teacher.model_copy(update={"checkpoint": _absolute(folder, checkpoint)})
    students = {name: _weights_from(folder, change) for name, change in recipe.distill.students.items()}
    changes: dict[str, Any] = {"distill": recipe.distill.model_copy(update={"students": students})} if students else {}
    for name, network in (("teacher", teacher), ("student", recipe.student)):
        paths = {field: getattr(network, field, None) for field in WEIGHTS}
        found = {field: _absolute(folder, path) for field, path in paths.items() if isinstance(path, Path)}
        changes[name] = network.model_copy(update=found)
    return recipe.model_copy(update={"data": data, **changes})


def _weights_from(folder: Path, change: dict[str, Any]) -> dict[str, Any]:
    paths = {field: change[field] for field in WEIGHTS if isinstance(change.get(field), str)}
    prune = change.get("prune")
    if isinstance(prune, dict) and isinstance(prune.get("from"), str):
        change = {**change, "prune": {**prune, "from": str(_absolute(folder, Path(prune["from"])))}}
    return {**change, **{field: str(_absolute(folder, Path(path))) for field, path in paths.items()}}


def _absolute(folder: Path, path: Path) -> Path:
    try:
        return (folder / path.expanduser()).absolute()
    except RuntimeError as error:  # ~name of nobody
        raise UserError(f"{path}: {_lower_first(str(error).rstrip('.'))}") from None
