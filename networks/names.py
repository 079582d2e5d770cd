"""Which names a network can have, read from timm's sources: importing it takes seconds, a wrong name is told at once.

Nothing here imports torch.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path

from ..core.config import ONNX_MODEL, AdoptConfig, ModelSettings, TeacherPlan
from ..core.errors import UserError, did_you_mean
from .start import check_start

# Decoders by name, and what segmentation-models-pytorch calls them.
DECODERS = {
    "unet": "Unet",
    "unetplusplus": "UnetPlusPlus",
    "manet": "MAnet",
    "linknet": "Linknet",
    "fpn": "FPN",
    "pspnet": "PSPNet",
    "pan": "PAN",
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "upernet": "UPerNet",
    "segformer": "Segformer",
}
PLAIN = re.compile(r"\w+(\.\w+)*")  # a name of timm, perhaps with the tag of its weights


def check_network(config: ModelSettings) -> None:
    """Refuse what can be told without making the network: its name, and settings of an encoder that don't belong.

    Raises:
        UserError: with the name that is nearest.
    """
    check_encoder(config)
    check_start(config)
    if isinstance(config, TeacherPlan):
        check_teacher(config)
    check_name(config.encoder or config.model)


def check_teacher(plan: TeacherPlan) -> None:
    """Refuse a control, or a share of the images, that its weights contradict. Raises UserError."""
    if plan.start != "trained" and plan.model == ONNX_MODEL:
        raise UserError(f"teacher.start {plan.start}: the weights of an .onnx file stay as they are: leave it out")
    if plan.start == "untrained":
        for name in ("checkpoint", "pretrained", "encoder_checkpoint"):
            if getattr(plan, name):
                raise UserError(f"teacher.start untrained has random weights: leave out {name}")
    if plan.label_fraction < 1 and not plan.is_trained:
        raise UserError(
            "teacher.label_fraction is of a teacher that is trained here, and this one is not: leave it out"
        )


def check_encoder(config: ModelSettings) -> None:
    """Refuse a decoder without an encoder, or what is said of an encoder where there is none. Raises UserError."""
    if config.model in DECODERS and config.encoder is None:
        raise UserError(
            f"model '{config.model}' is a decoder: wanted a network of timm below it too, such as "
            "encoder: mobilenetv4_conv_small"
        )
    if config.encoder is not None and config.model not in DECODERS:
        near = did_you_mean(config.model, DECODERS)
        raise UserError(
            f"encoder '{config.encoder}' has no decoder in model '{config.model}': wanted {', '.join(DECODERS)}, or no "
            f"encoder{near}"
        )
    if config.encoder_checkpoint is None:
        return
    if config.encoder is None:
        raise UserError(f"encoder_checkpoint: '{config.model}' has no encoder: wanted model: unet and the like")
    if config.pretrained:
        raise UserError("encoder_checkpoint and pretrained both say where the encoder's weights are from: wanted one")
    if isinstance(config, AdoptConfig) and config.checkpoint is not None:
        raise UserError("checkpoint has the weights of the encoder too: leave out encoder_checkpoint")


def check_name(model: str) -> None:
    """Refuse a plain name that nothing is registered under. What passes may be unknown all the same: timm decides.

    Raises:
        UserError: with the name that is nearest.
    """
    if "timm" in sys.modules or model == ONNX_MODEL or not PLAIN.fullmatch(model):  # asking timm itself is quick then
        return
    registered, others = _names()
    if registered and model.partition(".")[0] not in registered | others:
        raise unknown(model, registered)


def unknown(model: str, names: frozenset[str]) -> UserError:
    """The mistake of naming a network that is not among ``names``."""
    return UserError(f"unknown model '{model}': wanted a name of timm{did_you_mean(model, names | DECODERS.keys())}")


@cache
def _names() -> tuple[frozenset[str], frozenset[str]]:
    """Names of registered functions, in timm and here; and whatever else could be one (deprecated names are keys)."""
    registered: set[str] = set()
    others: set[str] = set()
    timm = importlib.util.find_spec("timm")
    folders = [] if timm is None else [Path(place) / "models" for place in timm.submodule_search_locations or ()]
    sources = [path for folder in folders for path in folder.glob("*.py")]
    for path in [*sources, Path(__file__).with_name("cifar.py")] if sources else []:
        text = path.read_text(encoding="utf-8", errors="replace")
        registered.update(re.findall(r"^@register_model\s+def (\w+)\(", text, re.MULTILINE))
        others.update(re.findall(r"^def (\w+)\(", text, re.MULTILINE))
        others.update(key.partition(".")[0] for key in re.findall(r"^\s+['\"]([\w.]+)['\"]\s*:", text, re.MULTILINE))
    return frozenset(registered), frozenset(others)
