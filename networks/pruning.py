"""Narrower networks: channels are taken out of a trained one, and what is left is built again from its weights alone.

Which channels belong together (those of layers whose outputs are added, of a convolution and its normalisation) is
found by torch-pruning's dependency graph (Fang et al. 2023, arXiv 2301.12900), and of each such group the channels go
whose weights are smallest: the mean, over the layers of a group, of the squared norm of what makes or takes a channel.
Every group gives up about the same share of its channels, in steps of ``round_to``; the last layer keeps its outputs.

Nothing of that library is kept: what is left is a state dict, and the network is built again from it as every
checkpoint's is (``narrow``).
"""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.config import PruneSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.kinds import PrunedFacts, as_name
from ..core.proc import first_line
from ..core.progress import progress
from .models import multiply_accumulates
from .narrow import narrow
from .weights import head_layers

Counted = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # the layers whose products are counted
OUTPUTS, INPUTS = 0, 1  # the sides of a layer
MOST_TRIES = 8
CLOSE = 0.01  # of the share that may be left: what is so near to it is taken
SAME = 1e-6  # of two outputs in double precision, over the larger one's largest value


class _Group(NamedTuple):
    """Channels that go together: ``order`` says which first, ``levels`` how many may be left, the most first.

    ``parts``: each of these is so many channels, since all parts of a grouped convolution lose the same ones.
    ``sides``: per layer and side how many of its channels one of these is.
    """

    root: str
    parts: int
    order: list[int]
    levels: list[int]
    sides: dict[tuple[str, int], float]

    @property
    def width(self) -> int:
        """How many there are."""
        return len(self.order)

    def gone(self, level: int) -> list[int]:
        """The channels of the root that go where ``level`` of these are left."""
        first = self.order[: self.width - level]
        return [channel + part * self.width for part in range(self.parts) for channel in first]


Level = tuple[_Group, int]  # and how many of its channels are left


def prune(network: nn.Module, name: str, spec: InputSpec, settings: PruneSettings) -> PrunedFacts:
    """Take channels out of ``network`` until it takes at most ``settings.keep`` of its multiply-accumulates.

    What is left computes what the whole network computes without those channels: that is looked at, in double
    precision, and layers of which it is not so (as attention, or normalisation over channels) are spared.

    Args:
        network: with its weights; it is changed where it stands.
        name: what it is called.

    Raises:
        UserError: a network of whose layers none can be made narrower, or not as far.
    """
    with progress(f"pruning {name}", None) as advance:
        return _prune(network.eval(), name, spec, settings, advance)


def _prune(
    network: nn.Module, name: str, spec: InputSpec, settings: PruneSettings, advance: Callable[[int, str], object]
) -> PrunedFacts:
    assert settings.keep is not None
    whole, parameters = multiply_accumulates(network, spec), _parameters(network)
    if not whole:
        raise UserError(f"'{name}' cannot be pruned: its multiply-accumulates cannot be counted")
    cut = _Cut(network, name, spec, settings.round_to)
    groups = able = cut.groups()
    if not cut.computes_without([(group, group.levels[0]) for group in groups]):
        able = []
        for number, group in enumerate(groups, 1):
            advance(1, f"layers {number}/{len(groups)}")
            if cut.computes_without([(group, group.levels[0])]):
                able.append(group)
    if not able:
        raise UserError(
            f"'{name}' cannot be pruned: none of its layers can do with fewer channels, in multiples of "
            f"{settings.round_to}; wanted a wider network of convolutions, or a smaller prune.round_to"
        )
    best: tuple[float, dict[str, Tensor]] | None = None
    target, low, high = settings.keep, 0.0, 1.0
    for _ in range(MOST_TRIES):
        advance(1, f"{target:.2f}")
        levels = cut.levels(able, target)
        if levels is None:
            break
        state = cut.without(levels)
        share = _deployed(network, name, state, spec) / whole
        if share > settings.keep:
            high = target
        else:
            low = target
            if (best is None or share > best[0]) and cut.computes_without(levels):
                best = share, state
            if share > settings.keep - CLOSE:
                break
        # What counts is the network as it is deployed, branches merged, with products that no layer makes.
        target *= settings.keep / share
        target = target if low < target < high else (low + high) / 2
    if best is not None:
        share, state = best
        _fill(network, state)
        return PrunedFacts(
            of=as_name(name),
            keep=settings.keep,
            round_to=settings.round_to,
            macs_share=share,
            parameters_share=_parameters(network) / parameters,
            groups=len(able),
            spared_groups=len(groups) - len(able),
        )
    least = cut.products([(group, group.levels[-1]) for group in able]) / cut.products([])
    raise UserError(
        f"prune.keep {settings.keep:g}: '{name}' keeps {math.ceil(least * 100) / 100:g} of its multiply-accumulates "
        f"where {settings.round_to} channels are left in every layer that can be pruned: wanted more than that, a "
        "smaller prune.round_to, or a smaller network"
    )


def _deployed(network: nn.Module, name: str, state: Mapping[str, Tensor], spec: InputSpec) -> int:
    """Multiply-accumulates of the narrower network of these weights. Raises UserError where it cannot be deployed."""
    narrower = copy.deepcopy(network)
    _fill(narrower, state)
    found = multiply_accumulates(narrower, spec)
    if not found:
        raise UserError(f"'{name}' cannot be pruned: its branches cannot be merged where they are narrower")
    return found


def _fill(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make ``network`` the narrower one of these weights."""
    narrow(network, {key: tuple(value.shape) for key, value in state.items()})
    network.load_state_dict(state)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class _Layer(NamedTuple):
    """A layer whose products are counted: ``each`` of them for a channel of its outputs and one of its inputs."""

    each: float
    widths: tuple[int, int]  # outputs, inputs
    by_itself: bool  # each channel: there are as many outputs as inputs, and products for one of the two


class _Cut:
    """A network and what torch-pruning sees in it. The network is never changed: copies of it are."""

    def __init__(self, network: nn.Module, name: str, spec: InputSpec, round_to: int) -> None:
        self.network, self.name, self.spec, self._round_to = network, name, spec, round_to
        self._layers = _counted(network, spec)

    def groups(self) -> list[_Group]:
        """Every group of channels of which some can go. Raises UserError where the network cannot be looked through."""
        import torch_pruning

        whole = copy.deepcopy(self.network)
        names = {module: name for name, module in whole.named_modules()}
        heads = [module for module, name in names.items() if name in head_layers(whole)]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        found = []
        try:
            graph = _graph(whole, self.spec)
            for group in graph.get_all_groups(ignored_layers=[each for head in heads for each in head.modules()]):
                scores = importance(group)
                if scores is None:
                    continue
                layers = [dep.target.module for dep, _ in group]
                parts = max([1, *(each.groups for each in layers if _is_grouped(each))])
                width = len(scores) // parts
                step = self._round_to // math.gcd(self._round_to, parts)
                levels = list(range((width - 1) // step * step, 0, -step))
                order = scores.view(parts, -1).mean(0).argsort(stable=True).tolist()
                sides: dict[tuple[str, int], float] = {}
                for dep, indices in group:
                    layer = dep.target.module
                    if isinstance(layer, Counted):
                        sides[names[layer], _side(graph, dep)] = len(indices) / width
                if levels:
                    found.append(_Group(names[group[0].dep.target.module], parts, order, levels, sides))
        except Exception as error:  # of the library, of a network that it does not understand
            raise UserError(
                f"'{self.name}' cannot be pruned: which of its channels belong together is not to be told "
                f"({first_line(error) or type(error).__name__})"
            ) from error
        return found

    def without(self, levels: Sequence[Level]) -> dict[str, Tensor]:
        """The state dict where so many channels are left of each group. Raises what the library raises."""
        narrower = copy.deepcopy(self.network)
        graph = _graph(narrower, self.spec)
        for group, level in levels:
            _group_of(graph, narrower.get_submodule(group.root), group.gone(level)).prune()
        return {name: tensor.detach() for name, tensor in narrower.state_dict().items()}

    def computes_without(self, levels: Sequence[Level]) -> bool:
        """Whether the network without these channels gives what the whole one gives if nothing looks at them.

        So that whatever lies between who makes a channel and who takes it is that channel's own.
        """
        narrower, whole = copy.deepcopy(self.network), copy.deepcopy(self.network)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, *self.spec.shape, generator=generator, dtype=torch.float64)
        try:
            _fill(narrower, self.without(levels))
            graph = _graph(whole, self.spec)
            for group, level in levels:
                for dep, indices in _group_of(graph, whole.get_submodule(group.root), group.gone(level)):
                    layer = dep.target.module
                    if isinstance(layer, Counted) and _side(graph, dep) == INPUTS:
                        _forget(layer, indices)
            with torch.no_grad():
                found, wanted = (each.double().eval()(images) for each in (narrower, whole))
        except Exception:  # of any layer that is not made for it
            return False
        if not levels or found.shape != wanted.shape or not torch.isfinite(wanted).all():
            return False
        return bool((found - wanted).abs().max() <= SAME * wanted.abs().max())

    def products(self, levels: Iterable[Level]) -> float:
        """The products of all layers where so many channels are left of each group, and all of the others."""
        gone: dict[tuple[str, int], float] = defaultdict(float)
        for group, level in levels:
            for side, channels in group.sides.items():
                gone[side] += (group.width - level) * channels
        total = 0.0
        for name, layer in self._layers.items():
            out, taken = (width - gone[name, side] for side, width in enumerate(layer.widths))
            total += layer.each * out * (1 if layer.by_itself else taken)
        return total

    def levels(self, groups: Sequence[_Group], keep: float) -> list[Level] | None:
        """How many channels are left of each group, so that at most ``keep`` of the products are; None: it cannot be.

        Step by step the one goes that leaves its group the largest share, so that all give up about the same. What the
        last ones took too much is given back where there is room, the latest first.
        """
        room = keep * self.products([])
        steps = sorted(
            (1 - level / group.width, number, level) for number, group in enumerate(groups) for level in group.levels
        )

        def after(count: int) -> list[int]:
            """What is left of each group after so many steps."""
            left = [group.width for group in groups]
            for _, number, level in steps[:count]:
                left[number] = level
            return left

        def fits(left: Sequence[int]) -> bool:
            return self.products(zip(groups, left, strict=True)) <= room

        count = bisect_left(range(len(steps) + 1), True, key=lambda count: fits(after(count)))
        if count > len(steps):
            return None
        left = after(count)
        settled: set[int] = set()
        for _, number, level in reversed(steps[:count]):
            if number in settled:
                continue
            left[number] = next(
                (more for more in reversed(groups[number].levels) if more > level), groups[number].width
            )
            if not fits(left):
                left[number] = level
                settled.add(number)
        return [(group, level) for group, level in zip(groups, left, strict=True) if level < group.width]


def _counted(network: nn.Module, spec: InputSpec) -> dict[str, _Layer]:
    """The layers whose products are counted, by name."""
    places: dict[str, int] = defaultdict(int)
    whole = copy.deepcopy(network)
    named = {name: module for name, module in whole.named_modules() if isinstance(module, Counted)}

    def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        counted, side = (inputs[0], INPUTS) if isinstance(layer, nn.ConvTranspose2d) else (output, OUTPUTS)
        places[name] += counted.numel() // _widths(layer)[side]

    for name, module in named.items():
        module.register_forward_hook(partial(count, name=name))
    with torch.no_grad():
        whole(torch.zeros(1, *spec.shape))
    found = {}
    for name, layer in named.items():
        widths, alone = _widths(layer), _by_itself(layer)
        products = places[name] * layer.weight.numel()
        found[name] = _Layer(products / widths[OUTPUTS] / (1 if alone else widths[INPUTS]), widths, alone)
    return found


def _graph(network: nn.Module, spec: InputSpec) -> Any:
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which are looked after
        network.requires_grad_(True)  # what depends on what is told by what the gradients pass through
        return torch_pruning.DependencyGraph().build_dependency(network, torch.zeros(1, *spec.shape))


def _group_of(graph: Any, root: nn.Module, channels: list[int]) -> Any:
    """What loses something with these outputs of ``root``."""
    return graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, channels)


def _side(graph: Any, dep: Any) -> int:
    """Which of its sides a layer loses channels of; one that makes each from one has outputs alone."""
    takes = graph.is_in_channel_pruning_fn(dep.handler) and not _by_itself(dep.target.module)
    return INPUTS if takes else OUTPUTS


def _widths(layer: Any) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _by_itself(layer: nn.Module) -> bool:
    """Whether a convolution makes each of its channels from one."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.out_channels


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and not _by_itself(layer)


def _forget(layer: nn.Module, indices: Sequence[int]) -> None:
    """Make a layer take nothing from these of its inputs."""
    with torch.no_grad():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.weight[list(indices)] = 0
        elif isinstance(layer, nn.Conv2d):
            inside, outside = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            for index in indices:
                first = index // inside * outside
                layer.weight[first : first + outside, index % inside] = 0
        elif isinstance(layer, nn.Linear):
            layer.weight[:, list(indices)] = 0
