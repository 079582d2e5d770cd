"""Segmenters: a decoder of segmentation-models-pytorch over an encoder of timm, logits at the decoder's own stride.

A segmenter gives its intermediate features as timm's networks do (``feature_info``, ``forward_intermediates``,
``forward_head``): the stages of its encoder from the first on, then the blocks of its decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import timm
import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..core.config import ModelSettings
from ..core.errors import UserError, did_you_mean
from ..core.inputs import InputSpec, size_words
from ..core.kinds import Checkpoint
from ..core.proc import first_line, require
from .names import DECODERS
from .weights import load_encoder

# The parts of each decoder whose outputs are features of their own, from its input to its output.
BLOCKS: dict[str, tuple[str, ...]] = {
    "unet": ("blocks.?",),
    "unetplusplus": ("blocks.x_0_?",),
    "manet": ("blocks.?",),
    "linknet": ("blocks.?",),
    "fpn": ("p4", "p3", "p2", "merge"),
    "pan": ("fpa", "gau?"),
    "upernet": ("psp", "fpn_lateral_blocks.?", "fusion_block"),
    "segformer": ("fuse_stage",),
    "deeplabv3": ("aspp", "relu"),
    "deeplabv3plus": ("aspp", "block2"),
    "pspnet": ("psp", "conv"),
}
# What a network's maker says by other settings, or must not say at all: which files are read, what comes out.
OWN_ARGUMENTS = frozenset(
    ("encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params", "upsampling",
     "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes",
     "features_only", "out_indices", "in_chans")
)  # fmt: skip


class _Enough(Exception):
    """What was asked for is there: the rest is not run."""


class Segmenter(nn.Module):
    """Images float32 [B, 3, H, W], normalised, to logits [B, K, H / stride, W / stride]; never enlarged in the end.

    Its state dict has the names of the library's own networks.
    """

    def __init__(self, network: nn.Module, decoder: str, classes: int, sides: tuple[int, int]) -> None:
        """Take the parts of a network of segmentation-models-pytorch over an encoder of timm.

        Args:
            decoder: its name, of ``BLOCKS``.
            sides: height and width of the images it is for.

        Raises:
            RuntimeError: whatever the network raises at images of that size.
        """
        super().__init__()
        self.num_classes = classes
        self.encoder, self.decoder = network.get_submodule("encoder"), network.get_submodule("decoder")
        self.segmentation_head = nn.Sequential(network.get_submodule("segmentation_head.0"))
        self._look(BLOCKS[decoder], sides)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, K, H / stride, W / stride]."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] to what the decoder gives [B, C, H / stride, W / stride]."""
        decoded: Tensor = self.decoder(self.encoder(image))
        return decoded

    def forward_head(self, final: Tensor) -> Tensor:
        """What the decoder gave to logits [B, K, H / stride, W / stride]."""
        logits: Tensor = self.segmentation_head(final)
        return logits

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What the decoder gives together with features on the way, as timm's networks do.

        Args:
            indices: of ``feature_info``: the last n, these, or all of them.
            norm: of no meaning here, since every feature is as the network itself goes on with it.
            stop_early: don't run what lies behind the last one that is wanted; that one is then what is given first.
            output_fmt: "NCHW" and nothing else.
            intermediates_only: leave out what the decoder gives.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}': wanted 'NCHW'")
        taken, last = feature_take_indices(len(self.feature_info), indices)
        found: dict[int, Tensor] = {}
        final: Tensor | None = None
        try:
            with self._tapped(set(taken), found, last if stop_early else None):
                final = self.forward_features(image)
        except _Enough:
            final = found[last]
        maps = [found[at] for at in taken]
        assert final is not None
        return maps if intermediates_only else (final, maps)

    def _look(self, patterns: Sequence[str], sides: tuple[int, int]) -> None:
        """Find the modules that give the features, by running the network once, and note what they are like."""
        extractor = self.encoder.get_submodule("model")
        names = {f"encoder.model.{name}": module for name, module in extractor.named_modules() if name}
        said: dict[str, Any] = {}
        was_training = self.training
        with ExitStack() as stack, torch.no_grad():
            for name, module in names.items():
                stack.enter_context(_hooked(module, partial(said.__setitem__, name)))
            stages = self.eval().encoder.model(torch.zeros(1, 3, *sides))  # type: ignore[operator]
            self.train(was_training)
        self._stages = len(stages)
        self._channels_last = bool(getattr(self.encoder, "_is_channel_last", False))
        # Of several that hand on one and the same tensor the outermost, and of those the last: an activation that
        # works in place follows what made its tensor. A stage that no module gives by itself is the whole encoder's.
        taps: list[str] = []
        for stage in stages:
            giving = [name for name, output in said.items() if output is stage]
            outermost = min((name.count(".") for name in giving), default=0)
            taps.append(next((name for name in reversed(giving) if name.count(".") == outermost), "encoder.model"))
        inside = [name for name, _ in self.decoder.named_modules() if name]
        taps += [f"decoder.{name}" for pattern in patterns for name in inside if fnmatchcase(name, pattern)]
        # As timm's have it; no channels or strides of their own are known before they have been run.
        self.feature_info: list[dict[str, Any]] = [{"module": name} for name in taps]
        with torch.no_grad():
            _, maps = self.eval().forward_intermediates(torch.zeros(1, 3, *sides))
            self.train(was_training)
        for info, features in zip(self.feature_info, maps, strict=True):
            info["num_chs"] = features.shape[1]
            info["reduction"] = 2 ** round(math.log2(max(sides) / max(features.shape[2:])))

    @contextmanager
    def _tapped(self, wanted: set[int], found: dict[int, Tensor], last: int | None) -> Iterator[None]:
        """Put the features of these numbers into ``found`` as they are computed; raise behind number ``last``."""
        by_module: dict[str, list[int]] = {}
        for at, info in enumerate(self.feature_info):
            if at in wanted:
                by_module.setdefault(info["module"], []).append(at)

        def tap(numbers: list[int], output: Any) -> None:
            for at in numbers:
                features = output[at] if isinstance(output, (list, tuple)) else output
                found[at] = features.permute(0, 3, 1, 2) if self._channels_last and at < self._stages else features
            if last in numbers:
                raise _Enough

        with ExitStack() as stack:
            for name, numbers in by_module.items():
                stack.enter_context(_hooked(self.get_submodule(name), partial(tap, numbers)))
            yield


@contextmanager
def _hooked(module: nn.Module, take: Callable[[Any], object]) -> Iterator[None]:
    """Hand what ``module`` gives to ``take``, inside the block."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        take(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def input_defaults(config: ModelSettings) -> dict[str, Any]:
    """What its encoder takes, in timm's words, and how segmenters see an image: all of it, stretched.

    Raises:
        UserError: an unknown encoder.
    """
    encoder = config.encoder or ""
    if not timm.is_model(encoder):
        raise UserError(
            f"unknown encoder '{encoder}': wanted a name of timm{did_you_mean(encoder, timm.list_models())}"
        )
    base = timm.models.get_pretrained_cfg(encoder)
    known = base.to_dict() if base else NO_PRETRAINED_CFG
    given = given_encoder(config)
    colours = {} if given is None else given.facts.input.model_dump(include={"mean", "std"})  # as its weights know them
    return {**known, **colours, "crop_pct": 1.0, "resize": "stretch"}


def make(config: ModelSettings, spec: InputSpec, classes: int) -> Segmenter:
    """The decoder ``config.model`` over ``config.encoder``, pretrained ones with timm's weights in the encoder alone.

    Raises:
        UserError: an unknown or unfit argument or encoder, sides that its stride does not divide, weights out of reach.
    """
    require(f"'{config.model}'", ("segmentation-models-pytorch",), "train")
    import segmentation_models_pytorch as library

    encoder, arguments, given = config.encoder or "", dict(config.model_args), given_encoder(config)
    if taken := sorted(arguments.keys() & OWN_ARGUMENTS):
        raise UserError(
            f"model_args: '{taken[0]}' is not one of the network's own: weights come by the checkpoint alone"
        )
    if config.pretrained and not timm.models.is_model_pretrained(encoder):
        raise UserError(f"timm has no pretrained weights for '{encoder}': set pretrained to false")
    base = timm.models.get_pretrained_cfg(encoder)
    if base and base.fixed_input_size:
        arguments.setdefault("img_size", spec.sides)
    kind = getattr(library, DECODERS[config.model])
    try:
        whole = kind(
            encoder_name=f"tu-{encoder}",
            encoder_weights=True if config.pretrained else None,
            classes=classes,
            **arguments,
        )
    except (OSError, ConnectionError) as error:
        raise UserError(f"cannot fetch the pretrained weights of '{encoder}': {first_line(error)}") from error
    except Exception as error:  # of the library or of timm, each its own
        raise UserError(
            f"cannot make '{config.model}' over '{encoder}' with {config.model_args or 'no arguments'}: "
            f"{first_line(error)}; wanted a network whose features halve from stage to stage, five times unless "
            "model_args have encoder_depth"
        ) from error
    stride = whole.encoder.output_stride
    if kind.requires_divisible_input_shape and any(side % stride for side in spec.sides):
        height, width = (max(stride, round(side / stride) * stride) for side in spec.sides)
        raise UserError(
            f"'{config.model}' over '{encoder}' takes sides that are multiples of {stride}, input.size is "
            f"{size_words(spec.size)}: set it to [{height}, {width}]"
        )
    try:
        network = Segmenter(whole, config.model, classes, spec.sides)
    except Exception as error:  # of any of its modules
        raise UserError(
            f"'{config.model}' over '{encoder}' cannot take inputs of {size_words(spec.size)} pixels: "
            f"{first_line(error)}"
        ) from error
    if config.encoder_checkpoint is not None:
        weights = config.encoder_checkpoint if given is None else given.file(Checkpoint.WEIGHTS)
        load_encoder(network.encoder.get_submodule("model"), weights, encoder)
    return network


def given_encoder(config: ModelSettings) -> Checkpoint | None:
    """The checkpoint that the weights of the encoder are from; None where they are no checkpoint's.

    Raises:
        UserError: what is no checkpoint, or one of another network.
    """
    path = config.encoder_checkpoint
    if path is None or path.is_file():
        return None
    if not path.is_dir():
        raise UserError(f"encoder_checkpoint: nothing at {path}: wanted a checkpoint's folder, .safetensors or .pth")
    given = Checkpoint.open(path)
    known = given.settings.get("encoder") or given.settings["model"]
    if given.facts.pruned is not None:
        raise UserError(
            f"encoder_checkpoint: {path} is pruned, and narrower than '{config.encoder}': wanted a network that is not"
        )
    if known.partition(".")[0] != (config.encoder or "").partition(".")[0]:
        raise UserError(
            f"encoder_checkpoint: {path} is of '{known}', the encoder is '{config.encoder}': wanted the same network"
        )
    return given


NO_PRETRAINED_CFG = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
