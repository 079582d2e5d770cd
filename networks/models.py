"""Networks by their names in timm, and their weights in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..core.config import InputSettings, ModelSettings
from ..core.errors import UserError, did_you_mean
from ..core.inputs import InputSpec, sides, size_words
from ..core.kinds import Checkpoint
from ..core.proc import first_line
from . import cifar  # noqa: F401 (registers its networks with timm)


def resolve_input(config: InputSettings, pretrained: dict[str, Any]) -> InputSpec:
    """The user's InputSettings completed from timm's configuration of the model."""
    size = config.size or tuple(pretrained["input_size"][-2:])
    # Cropping away a border is an ImageNet habit: where the user sets a small size, the whole image counts.
    whole = config.size is not None and max(sides(config.size)) <= 64
    crop = config.crop_fraction or (1.0 if whole else pretrained.get("crop_pct") or 0.875)
    interpolation = config.interpolation or pretrained.get("interpolation") or "bicubic"
    return InputSpec(
        size=size,
        mean=config.mean or tuple(pretrained["mean"]),
        std=config.std or tuple(pretrained["std"]),
        crop_fraction=crop,
        interpolation=interpolation,
    )


def input_spec(config: ModelSettings) -> InputSpec:
    """What the network takes, without making it. Raises UserError for an unknown name."""
    if not timm.is_model(config.model):
        raise UserError(
            f"unknown model '{config.model}': wanted a name of timm{did_you_mean(config.model, timm.list_models())}"
        )
    base = timm.models.get_pretrained_cfg(config.model)
    return resolve_input(config.input, base.to_dict() if base else _NO_PRETRAINED_CFG)


def create(config: ModelSettings, classes: int) -> tuple[nn.Module, InputSpec]:
    """A network with ``classes`` outputs, random or pretrained weights, and its InputSpec.

    Raises:
        UserError: an unknown name or argument, a size the network can't take, weights out of reach.
    """
    spec = input_spec(config)
    if config.pretrained and not timm.models.is_model_pretrained(config.model):
        raise UserError(
            f"timm has no pretrained weights for '{config.model}': set pretrained to false or train a teacher"
        )
    base = timm.models.get_pretrained_cfg(config.model)
    overlay = {"mean": spec.mean, "std": spec.std, "input_size": (3, *spec.sides)}
    arguments = dict(config.model_args)
    if own := sorted(arguments.keys() & _OWN_ARGUMENTS):
        raise UserError(f"model_args: '{own[0]}' is not one of the network's own: weights come by the checkpoint alone")
    if base and base.fixed_input_size:
        arguments.setdefault("img_size", spec.size)
    try:
        network = timm.create_model(
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
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, *spec.sides))
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"'{config.model}' cannot take inputs of {size_words(spec.size)} pixels: {first_line(error)}"
        ) from error
    return network, spec


# Of create_model itself: a stranger's checkpoint must not say which files are read.
_OWN_ARGUMENTS = frozenset(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")
)
_NO_PRETRAINED_CFG = {"input_size": (3, 224, 224), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def load_weights(network: nn.Module, path: Path) -> None:
    """Read a state dict from .safetensors or .pth (tensors only) into ``network``.

    Raises:
        UserError: a missing or unreadable file, or weights of another architecture or class count.
    """
    state = read_state(path)
    wanted = network.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        example = f"lacks '{missing[0]}'" if missing else f"has '{unknown[0]}'"
        raise UserError(
            f"{path} is of another architecture than '{type(network).__name__}' "
            f"({len(missing)} tensors missing, {len(unknown)} unknown; it {example}): name the model it was made with"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            found, want = tuple(state[name].shape), tuple(tensor.shape)
            hint = "another class count" if found[1:] == want[1:] else "another architecture"
            raise UserError(f"{path}: '{name}' has shape {found}, wanted {want} ({hint})")
        if state[name].is_complex():
            raise UserError(f"{path}: '{name}' is not of numbers like a network's ({state[name].dtype})")
    network.load_state_dict(state)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file of the user; never unpickles anything but tensors. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: wanted a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format raises its own
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else first_line(error)
        raise UserError(
            f"cannot read weights from {path} ({reason}): wanted .safetensors, or .pth with tensors only"
        ) from None
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path} holds no state dict: wanted a mapping from names to tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise UserError(f"{path}: '{name}' is no plain tensor with values of its own: wanted dense weights")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors; tied tensors are stored apart."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}, path)


def restore(checkpoint: Checkpoint) -> tuple[nn.Module, InputSpec]:
    """The network of a sealed checkpoint, in eval mode, with its InputSpec. Raises UserError."""
    facts = checkpoint.facts
    spec = facts.input
    config = ModelSettings(
        model=facts.model,
        model_args=facts.model_args,
        input=InputSettings(size=spec.size, mean=spec.mean, std=spec.std),
    )
    network, _ = create(config, facts.classes)
    load_weights(network, checkpoint.file(checkpoint.WEIGHTS))
    return network.eval(), spec


class Normalise(nn.Module):
    """A network that takes RGB in 0..255 and normalises by itself: what is evaluated and exported."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            values = torch.tensor(getattr(spec, name)).view(1, 3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] in 0..255 to logits [N, K]."""
        logits: torch.Tensor = self.network((image - self.mean) / self.std)
        return logits
