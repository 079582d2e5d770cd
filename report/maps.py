"""Where in an image an answer comes from: class activation maps of networks, occlusion of whatever has no gradients.

Both are of captum (https://captum.ai). A map tells what an answer rests on, not whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..runtime.task import TASKS
from .masks import Strip
from .templates import filled

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NEEDS = ("captum", "jinja2", "matplotlib")
How = Literal["class activation", "occlusion"]
Ask = Callable[[np.ndarray], np.ndarray]  # images uint8 [N, H, W, 3] as a network is shown them to its outputs [N, K]

PATCHES = 4  # along each side of an image: what is hidden is a patch of that size, moved by half of it
CELLS = 8  # along each side of a map by occlusion
COARSEST = 4  # along each side of a class activation map, where the network has one that fine
BLOCK = 8  # images at a time
BLOCK_NUMBERS = 2**24  # of images with something hidden, at a time
LEAST = 1e-300  # of what a logarithm is taken
STRONGEST = 0.65  # how much of a picture is colour where a map is largest

ABOUT = (
    "Colour: what speaks for the answer below each picture, from none (grey) to the most that this one picture has; "
    "pictures are not on one scale.",
    "Class activation (Grad-CAM) is by the gradient of the answer's logit at the deepest layer that is a map, as fine "
    "as the figures say. A packaged model has no gradients; by occlusion each place is hidden by a grey patch of a "
    "quarter of the image's side, and what makes the answer less sure speaks for it. Read float32 by occlusion against "
    "INT8 by occlusion: class activation is another quantity than either.",
    "A map shows what an answer rests on, not whether it is right.",
)
ASKED_HERE = "Bundles were asked on the machine that wrote this page."


@dataclass(frozen=True)
class Map:
    """What a network says of one image, or one class of it, and where in the image it sees that.

    ``evidence`` [h, w]: of a class activation map, how much each place speaks for the class, none negative, in logits
    (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2). Of occlusion, how much smaller the log
    odds of the class are when the place is hidden by a grey patch, in the mean over the patches that hide it;
    negative where hiding it makes the network surer.
    """

    label: int
    probability: float  # by the network's own account, 0 to 1
    how: How
    evidence: np.ndarray


# Images uint8 [H, W, 3] as a network is shown them, and of which class the map of each is to be (None: what the network
# says of it), to their maps.
Maps = Callable[[Sequence[np.ndarray], Sequence[int] | None], Iterator[Map]]


@dataclass(frozen=True)
class Explained:
    """Maps on the report's page: a row of pictures for each flip, in their order, and lines on all of them."""

    flips: Sequence[Strip] = ()
    lines: Sequence[str] = ()


def check_explained(task: str, name: str) -> None:
    """Refuse what does not say one thing of a whole image. Raises UserError."""
    if TASKS[task].dense:
        raise UserError(
            f"{name} says something of every pixel, there is no one answer to explain: wanted a network that says one "
            "thing of a whole image; kdpipe predict --out draws what masks say"
        )


def activation_maps(network: nn.Module, spec: InputSpec, task: str) -> Maps:
    """What tells where ``network`` sees what it says; by occlusion where no layer is a map, as in an ONNX file.

    What it gives raises UserError for a network whose outputs or gradients are not finite.

    Args:
        network: takes images normalised as ``spec`` says; it is changed, and nobody's afterwards.
    """
    import torch

    from ..networks.models import Normalise

    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # own code may have frozen them
    for module in network.modules():
        if getattr(module, "inplace", False):  # what is looked at must not be written over
            module.inplace = False  # type: ignore[assignment]
    layer = _map_layer(network.eval(), spec)
    whole = Normalise(network, spec).eval()

    def ask(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(whole(_as_input(images)).float().numpy())

    if layer is None:
        return occlusion_maps(ask, spec, task)
    from captum.attr import LayerGradCam

    gradients = LayerGradCam(whole, layer)

    def maps(shown: Sequence[np.ndarray], classes: Sequence[int] | None) -> Iterator[Map]:
        for at in range(0, len(shown), BLOCK):
            block = np.stack(shown[at : at + BLOCK])
            labels, shares = _said(ask(block), task, None if classes is None else classes[at : at + BLOCK])
            found = gradients.attribute(_as_input(block), torch.from_numpy(labels), relu_attributions=True)
            evidences = found.detach().float().numpy()[:, 0]
            if not np.isfinite(evidences).all():
                raise UserError("the gradients of what the network says are not finite: there is nothing to explain")
            for label, share, evidence in zip(labels, shares, evidences, strict=True):
                yield Map(int(label), float(share), "class activation", evidence)

    return maps


def occlusion_maps(ask: Ask, spec: InputSpec, task: str) -> Maps:
    """As ``activation_maps``, of anything that can be asked: each place is hidden by a patch of the mean colour.

    What it gives raises as ``ask`` does, and UserError for outputs that are not finite.
    """
    import torch
    from captum.attr import Occlusion
    from torch.nn import functional

    height, width = spec.sides
    patch = (max(1, height // PATCHES), max(1, width // PATCHES))
    step = (max(1, patch[0] // 2), max(1, patch[1] // 2))
    cells = (min(CELLS, height), min(CELLS, width))
    grey = torch.tensor(spec.mean).mul(255).round().view(1, 3, 1, 1)
    at_once = max(1, BLOCK_NUMBERS // (3 * height * width * BLOCK))

    def log_odds(images: Tensor, labels: Tensor) -> Tensor:
        pixels = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        order, shares = TASKS[task].likeliest(*_all_of(ask(pixels)))
        own = order == labels.numpy()[:, None]
        odds = np.log(np.maximum(shares[own], LEAST)) - np.log(np.maximum(np.where(own, 0, shares).sum(1), LEAST))
        return torch.from_numpy(odds)

    def maps(shown: Sequence[np.ndarray], classes: Sequence[int] | None) -> Iterator[Map]:
        for at in range(0, len(shown), BLOCK):
            block = np.stack(shown[at : at + BLOCK])
            labels, shares = _said(ask(block), task, None if classes is None else classes[at : at + BLOCK])
            found = Occlusion(log_odds).attribute(
                _as_input(block),
                sliding_window_shapes=(3, *patch),
                strides=(3, *step),
                baselines=grey.expand(len(block), 3, height, width),
                additional_forward_args=(torch.from_numpy(labels),),
                perturbations_per_eval=at_once,
            )
            evidence = functional.adaptive_avg_pool2d(found.mean(1), cells).float().numpy()
            for label, share, each in zip(labels, shares, evidence, strict=True):
                yield Map(int(label), float(share), "occlusion", each)

    return maps


def _as_input(images: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), np.float32))


def _said(outputs: np.ndarray, task: str, classes: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Classes [N] and how likely each is: what ``outputs`` say, or of the ``classes`` that are asked for.

    Raises:
        UserError: outputs that are not finite.
    """
    if not np.isfinite(outputs).all():
        raise UserError("what the network says of these images is not finite: there is nothing to explain")
    if classes is None:
        labels, shares = TASKS[task].likeliest(outputs, 1)
        return labels[:, 0].astype(np.int64), shares[:, 0]
    labels = np.asarray(classes, np.int64)
    order, shares = TASKS[task].likeliest(*_all_of(outputs))
    return labels, shares[order == labels[:, None]]


def _all_of(outputs: np.ndarray) -> tuple[np.ndarray, int]:
    return outputs, outputs.shape[1]


# ---- the layer -------------------------------------------------------------------------------------------


def _map_layer(network: nn.Module, spec: InputSpec) -> nn.Module | None:
    """The deepest layer whose output is a map [B, C, h, w] of at least COARSEST places a side, else of the most.

    A layer of tokens, or with its channels last, is wrapped so that what it says passes through such a map. Tokens are
    taken from in front of the last block: behind it a class token is all that is looked at. None: there is no layer.
    """
    import torch

    shapes = _shapes(network, torch.zeros(1, *spec.shape))
    stages = [str(entry.get("module")) for entry in getattr(network, "feature_info", None) or ()]
    stages = [name for name in stages if name in shapes]
    last_axis = getattr(network, "output_fmt", "NCHW") == "NHWC"
    found: list[tuple[int, str, _Spread]] = []
    if stages and len(shapes[stages[-1]]) == 3:
        grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
        prefix = getattr(network, "num_prefix_tokens", None)
        for name in stages[:-1]:
            if grid and prefix is not None and shapes[name][1] == prefix + grid[0] * grid[1]:
                found.append((min(grid), name, _Spread(prefix, (grid[0], grid[1]))))
    else:
        for name in stages or shapes:
            shape = shapes[name]
            if len(shape) == 4:
                sides = shape[1:3] if last_axis else shape[2:]
                if sides[0] * sides[1] > 1:
                    found.append((min(sides), name, _Spread(None, (sides[0], sides[1]) if last_axis else None)))
    if not found:
        return None
    fine = [each for each in found if each[0] >= COARSEST]
    _, name, spread = fine[-1] if fine else max(reversed(found), key=lambda each: each[0])
    layer = network.get_submodule(name)
    if spread.grid is None:
        return layer
    wrapped = _through_map(layer, spread)
    network.set_submodule(name, wrapped)
    return wrapped.get_submodule("map")


@dataclass(frozen=True)
class _Spread:
    """How a layer's output lies: in front so many tokens of no place (None: channels last), then ``grid``'s places;
    no grid: as a map already.
    """

    prefix: int | None
    grid: tuple[int, int] | None


def _shapes(network: nn.Module, image: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of those modules that are called once for an image and give a tensor, in order."""
    import torch

    found: dict[str, tuple[int, ...]] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, torch.Tensor):
                found[name] = tuple(output.shape)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return {name: shape for name, shape in found.items() if calls[name] == 1}


def _through_map(layer: nn.Module, spread: _Spread) -> nn.Module:
    """``layer``, whose output passes through a module ``map`` as [B, C, h, w] on its way."""
    import torch
    from torch import nn

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.map = layer, nn.Identity()

        def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
            output = self.layer(*inputs, **named)
            if spread.prefix is None:
                return self.map(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
            front, places = output[:, : spread.prefix], output[:, spread.prefix :]
            spatial = self.map(places.transpose(1, 2).unflatten(2, spread.grid))
            return torch.cat([front, spatial.flatten(2).transpose(1, 2)], 1)

    return Through()


# ---- drawn -----------------------------------------------------------------------------------------------


def drawn(pixels: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """What speaks for an answer [h, w] as colour over its image uint8 [H, W, 3], grey; from none to its largest.

    What speaks against it is left grey.
    """
    import matplotlib
    from PIL import Image

    height, width = pixels.shape[:2]
    grey = np.repeat(np.asarray(Image.fromarray(pixels).convert("L"), np.float64)[..., None], 3, 2)
    strength = np.maximum(evidence, 0).astype(np.float32)
    if strength.max() > 0:
        strength /= strength.max()
    large = Image.fromarray(strength, mode="F").resize((width, height), Image.Resampling.BILINEAR)
    share = np.asarray(large, np.float64)
    colour = 255 * matplotlib.colormaps["plasma"](share)[..., :3]
    much = STRONGEST * share[..., None]
    return np.asarray(np.round(grey * (1 - much) + colour * much), np.uint8)


def caption(name: str, label: str, found: Map) -> str:
    """What stands below the picture of a map."""
    grid = "\N{MULTIPLICATION SIGN}".join(map(str, found.evidence.shape))
    empty = "" if found.evidence.max() > 0 else "; no place speaks for it"
    return f"{name}: {label}, {100 * found.probability:.1f} % sure; {found.how}, {grid}{empty}"


def page(title: str, strips: Sequence[Strip], lines: Sequence[str]) -> str:
    """A self-contained page of maps; everything is escaped."""
    return filled("explained.html", {"title": title, "strips": strips, "lines": lines, "about": ABOUT})
