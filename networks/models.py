"""Networks by their names: of timm, of torchvision, segmenters, of the user's own code; or a file that is one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn import functional

from ..core import code
from ..core.artifact import settings_of
from ..core.config import ONNX_MODEL, AdoptConfig, InputSettings, ModelSettings, Output
from ..core.errors import UserError, did_you_mean
from ..core.inputs import InputSpec, sides, size_words
from ..core.kinds import Checkpoint, Tuned
from ..core.proc import first_line
from ..runtime.task import TASKS
from . import (
    cifar,  # noqa: F401 (registers its networks with timm)
    onnx,
    own,
    segmenters,
    torchvision,
)
from .names import DECODERS, check_encoder
from .narrow import narrow_as
from .onnx import OnnxNetwork
from .weights import load_weights


def resolve_input(config: InputSettings, pretrained: dict[str, Any]) -> InputSpec:
    """The user's InputSettings completed from timm's configuration of the model."""
    size = config.size or tuple(pretrained["input_size"][-2:])
    # Cropping away a border is an ImageNet habit: where the user sets a small size, the whole image counts.
    whole = config.size is not None and max(sides(config.size)) <= 64
    resize = config.resize or pretrained.get("resize") or "cover"
    whole = whole or resize != "cover"  # nothing is cut off where the image need not cover the input
    crop = config.crop_fraction or (1.0 if whole else pretrained.get("crop_pct") or 0.875)
    interpolation = config.interpolation or pretrained.get("interpolation") or "bicubic"
    return InputSpec(
        size=size,
        mean=config.mean or tuple(pretrained["mean"]),
        std=config.std or tuple(pretrained["std"]),
        crop_fraction=crop,
        interpolation=interpolation,
        resize=resize,
    )


def input_spec(config: ModelSettings) -> InputSpec:
    """What the network takes, without making it or running code of its own. Raises UserError for an unknown name."""
    check_encoder(config)
    if config.model == ONNX_MODEL:
        return resolve_input(config.input, onnx.INPUT)
    if config.model in DECODERS:
        return resolve_input(config.input, segmenters.input_defaults(config))
    if code.is_code(config.model):
        return resolve_input(config.input, own.INPUT)
    if config.model.startswith(torchvision.PREFIX):
        return resolve_input(config.input, torchvision.input_defaults(config.model))
    if not timm.is_model(config.model):
        near = did_you_mean(config.model, [*timm.list_models(), *DECODERS])
        others = "" if near else f", {torchvision.PREFIX}NAME or MODULE:FUNCTION of your own"
        if config.model.endswith(".onnx"):
            near = f"; of a file it is '{ONNX_MODEL}', with checkpoint: {config.model}"
        raise UserError(f"unknown model '{config.model}': wanted a name of timm{others}{near}")
    base = timm.models.get_pretrained_cfg(config.model)
    return resolve_input(config.input, base.to_dict() if base else segmenters.NO_PRETRAINED_CFG)


def license_of(config: ModelSettings) -> str | None:
    """Of the weights that a network begins with: as its user says, else as timm does of those it fetches."""
    said = config.license if isinstance(config, AdoptConfig) else None
    name = config.encoder or config.model
    if said is not None or not config.pretrained or not timm.is_model(name):
        return said
    base = timm.models.get_pretrained_cfg(name)
    return (base.license or None) if base else None


def name_of(config: ModelSettings) -> str:
    """What a network is called: its model, and the encoder below it."""
    return config.model if config.encoder is None else f"{config.model}-{config.encoder}"


def pretrained_classes(name: str) -> int:
    """Outputs of the pretrained weights of a network. Raises UserError where nobody knows them."""
    if name == ONNX_MODEL or name in DECODERS or code.is_code(name):
        raise UserError(f"how many outputs '{name}' has is not known: say it with --classes")
    base = None if name.startswith(torchvision.PREFIX) else timm.models.get_pretrained_cfg(name)
    return torchvision.CLASSES if base is None else int(base.num_classes)


def create(config: ModelSettings, classes: int | None, task: str | None = None) -> tuple[nn.Module, InputSpec]:
    """A network with ``classes`` outputs (None: not known yet), random or pretrained weights, and its InputSpec.

    Args:
        task: what the outputs are to be of; None: of any.

    Raises:
        UserError: an unknown name or argument, code that is not allowed, a size the network can't take, other
            outputs, weights out of reach.
    """
    spec = input_spec(config)
    return make(config, spec, classes, task), spec


def make(config: ModelSettings, spec: InputSpec, classes: int | None, task: str | None = None) -> nn.Module:
    """The network of ``create`` for images of ``spec``; an ONNX file is the configuration's checkpoint."""
    count = 2 if classes is None else classes
    name, arguments = config.model, dict(config.model_args)
    if name == ONNX_MODEL:
        if not isinstance(config, AdoptConfig) or config.checkpoint is None:
            raise UserError(f"model '{ONNX_MODEL}' is a file that is asked, as a teacher: wanted it as checkpoint")
        network: nn.Module = OnnxNetwork(config.checkpoint, spec)
    elif name in DECODERS:
        network = segmenters.make(config, spec, count)
    elif code.is_code(name):
        if config.pretrained:
            raise UserError(f"kdpipe knows no pretrained weights of '{name}': give them as checkpoint")
        network = own.make(name, arguments, count)
    elif name.startswith(torchvision.PREFIX):
        network = torchvision.make(name, arguments, count, spec.sides, config.pretrained)
    else:
        network = _of_timm(config, spec, count)
    if not hasattr(network, "num_classes"):
        network.num_classes = count  # type: ignore[assignment] # timm's networks know it
    try:
        with torch.no_grad():
            outputs = network.eval()(torch.zeros(1, *spec.shape))
    except Exception as error:  # a user's own network raises anything
        line = own.where(error, code.source_file(name)) if code.is_code(name) else ""
        raise UserError(
            f"'{name}' cannot take inputs of {size_words(spec.size)} pixels: {first_line(error)}{line}"
        ) from error
    found = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if classes is not None and (isinstance(found, str) or found[:2] != (1, classes)):
        raise UserError(f"'{name}' gives {found} for an image, wanted logits {(1, classes)}: one output a class")
    if task is not None and isinstance(outputs, torch.Tensor) and outputs.ndim > 1:
        wanted = TASKS[task].misfit(outputs.float().numpy(), 1, outputs.shape[1])
        if wanted is not None:
            cure = f": a decoder draws masks, over an encoder such as {name}" if TASKS[task].dense else ""
            raise UserError(f"'{name}' gives {found} for an image, the data's task is {task}: wanted {wanted}{cure}")
    return network


def _of_timm(config: ModelSettings, spec: InputSpec, classes: int) -> nn.Module:
    if config.pretrained and not timm.models.is_model_pretrained(config.model):
        raise UserError(
            f"timm has no pretrained weights for '{config.model}': set pretrained to false or train a teacher"
        )
    base = timm.models.get_pretrained_cfg(config.model)
    overlay = {"mean": spec.mean, "std": spec.std, "input_size": (3, *spec.sides)}
    arguments = dict(config.model_args)
    if taken := sorted(arguments.keys() & _OWN_ARGUMENTS):
        raise UserError(
            f"model_args: '{taken[0]}' is not one of the network's own: weights come by the checkpoint alone"
        )
    if base and base.fixed_input_size:
        arguments.setdefault("img_size", spec.size)
    try:
        network: nn.Module = timm.create_model(
            config.model,
            pretrained=config.pretrained,
            num_classes=classes,
            pretrained_cfg_overlay=overlay,
            **arguments,
        )
    except (OSError, ConnectionError) as error:
        raise UserError(f"cannot fetch the pretrained weights of '{config.model}': {first_line(error)}") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"cannot make '{config.model}' with {arguments or 'no arguments'}: {first_line(error)}"
        ) from error
    return network


# Of create_model itself: a stranger's checkpoint must not say which files are read.
_OWN_ARGUMENTS = frozenset(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")
)


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors; tied tensors are stored apart."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}, path)


def restore(checkpoint: Checkpoint | Tuned) -> tuple[nn.Module, InputSpec]:
    """The network of a sealed checkpoint, in eval mode, with its InputSpec; of what was tuned as it is deployed.

    Raises:
        UserError: it does not fit; it is of code of its maker's own that is not allowed, or was changed since.
    """
    if isinstance(checkpoint, Tuned):
        facts, settings = checkpoint.of_student, settings_of(checkpoint.student)
    else:
        facts, settings = checkpoint.facts, checkpoint.settings
    config = AdoptConfig(model=settings["model"], encoder=settings.get("encoder"), model_args=facts.model_args)
    input_spec(config)  # a name that is known
    if config.model == ONNX_MODEL:
        config = config.model_copy(update={"checkpoint": checkpoint.file(Checkpoint.ONNX)})
        return make(config, facts.input, facts.classes).eval(), facts.input
    if code.is_code(config.model):
        code.check_allowed(config.model, str(checkpoint.path))
        code.check_same(config.model, settings.get("code_sha256"), str(checkpoint.path))
    network = make(config, facts.input, facts.classes, facts.task if facts.task in TASKS else None)
    network = deployed(network) if isinstance(checkpoint, Tuned) else network
    if facts.pruned is not None:
        narrow_as(network, checkpoint.file(checkpoint.WEIGHTS), facts.input, facts.classes)
    load_weights(network, checkpoint.file(checkpoint.WEIGHTS))
    return network.eval(), facts.input


def deployed(network: nn.Module) -> nn.Module:
    """A copy of ``network`` with branches and BatchNorms merged into convolutions where timm knows how.

    MobileOne, RepVGG, RepViT, FastViT and the like are trained with several branches that one convolution can hold.
    They are merged in double precision: products of float32 weights lose what the network's own arithmetic kept.
    """
    merged: nn.Module = reparameterize_model(deepcopy(network).double(), inplace=True)
    return merged.float()


def multiply_accumulates(network: nn.Module, spec: InputSpec) -> int | None:
    """What one image takes: the products of its convolutions and matrix products, half of torch's count of operations.

    In the form that is deployed, branches merged into convolutions where timm knows how. Activations, normalisation and
    pooling are not counted, as in the papers of most networks. None for a network that cannot be copied or counted: it
    may be anybody's, and no training is lost for a count.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    try:
        deployed = reparameterize_model(network).cpu().eval().requires_grad_(False)
        # Attention as the matrix products that it is: CPU's own kernel has no count.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            deployed(torch.zeros(1, *spec.shape))
    except Exception:
        return None
    return int(counter.get_total_flops()) // 2


class Normalise(nn.Module):
    """A network that takes RGB in 0..255 and normalises by itself: what is evaluated and exported.

    One that draws masks gives logits at its own stride; by ``output`` they are enlarged to the image's sides (bilinear,
    corners not aligned), and decided by the largest.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, spec: InputSpec, output: Output = "logits") -> None:
        super().__init__()
        self.network, self.output, self.sides = network, output, spec.sides
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec, name)).view(1, 3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] in 0..255 to logits [N, K, ...], or to classes, uint8 [N, H, W]."""
        logits: torch.Tensor = self.network((image - self.mean) / self.std)
        if self.output == "logits":
            return logits
        if tuple(logits.shape[2:]) != self.sides:
            logits = functional.interpolate(logits, self.sides, mode="bilinear", align_corners=False)
        return logits if self.output == "logits-full" else logits.argmax(1).to(torch.uint8)
