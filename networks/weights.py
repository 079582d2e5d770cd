"""Weights of the user's: which of a file's state dicts, under which names, and in one line why they do not fit."""

from __future__ import annotations

import argparse
import json
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import UserError, choice
from ..core.proc import first_line
from ..core.progress import note
from ..core.sealed import printable

State = Mapping[str, Tensor]
USUAL = ("", "state_dict", "model", "model_state_dict")  # "": the file itself
AVERAGED = re.compile(r"(^|[._])(ema|swa)([._]|$)|averag")
MOST_NESTED = 4  # of mappings in a file that are looked into
COUNTER = "num_batches_tracked"  # of a BatchNorm: files of old have none, and nothing is computed by it
ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02\x8a\n"  # how files of torch begin; before 1.6 they were pickles
LARGEST_HEADER_BYTES = 10**8  # of safetensors, by its own rule


def load_weights(network: nn.Module, path: Path, entry: str | None = None) -> None:
    """Read weights from .safetensors, or from .pth and the like (tensors only), into ``network``.

    One prefix that all of the names have (``module.``, Lightning's ``model.``) is left off; what lies outside of it is
    told and left out.

    Args:
        network: of ``num_classes`` outputs.
        entry: which of several state dicts in the file, or which prefix of the names, is meant.

    Raises:
        UserError: a missing, broken or unreadable file, several networks in it, weights of another architecture or
            class count or of no head at all, or weights that are not finite.
    """
    wanted: State = network.state_dict()
    state = _fitting(_chosen(read_state_dicts(path), path, entry, wanted), path, entry, wanted)
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing and not unknown and set(missing) <= set(_head(network, wanted)):
        raise UserError(
            f"{path} has no head: it lacks '{missing[0]}' and so tells no classes apart, all else fits; wanted a "
            "network that was trained on these classes: fine-tune it first"
        )
    if missing or unknown:
        example = f"lacks '{missing[0]}'" if missing else f"has '{unknown[0]}'"
        raise UserError(
            f"{path} is of another architecture than '{type(network).__name__}' "
            f"({len(missing)} tensors missing, {len(unknown)} unknown; it {example}): name the model it was made with"
        )
    _check_tensors(state, path, wanted, _head(network, wanted))
    network.load_state_dict(state)


def load_body(network: nn.Module, path: Path, with_head: bool) -> bool:
    """Read all but the head of a network's weights into ``network``, and the head too if wanted and of as many classes.

    Returns:
        Whether the head came along; what it was before stays where it did not.

    Raises:
        UserError: a missing, broken or unreadable file, another network, or weights that are not finite.
    """
    wanted: State = network.state_dict()
    head = _head(network, wanted)
    body = {name: tensor for name, tensor in wanted.items() if name not in head}
    state = _fitting(_chosen(read_state_dicts(path), path, None, body), path, None, body)
    missing, unknown = sorted(body.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        example = f"lacks '{missing[0]}'" if missing else f"has '{unknown[0]}'"
        raise UserError(
            f"{path} is of another architecture than '{type(network).__name__}' "
            f"({len(missing)} tensors missing, {len(unknown)} unknown; it {example}): wanted the same network"
        )
    with_head = with_head and all(name in state and state[name].shape == wanted[name].shape for name in head)
    taken = {name: state[name] if name not in head or with_head else wanted[name] for name in wanted}
    _check_tensors(taken, path, wanted, ())
    network.load_state_dict(taken)
    return with_head


def load_encoder(encoder: nn.Module, path: Path, what: str) -> None:
    """Read a classifier's weights into ``encoder``, what timm makes of the same network for its features alone.

    Every tensor of the encoder must be found; what the classifier has besides, its head, is left out.

    Args:
        path: of weights as ``load_weights`` takes them; or of a network around such an encoder.
        what: name of the network.

    Raises:
        UserError: a missing, broken or unreadable file, another network, or weights that are not finite.
    """
    own = encoder.state_dict()
    found, names = read_state_dicts(path), {name: name for name in own}
    if len({name.partition(".")[0] for name in own}) == 1:  # of a network that timm keeps whole, inside of another
        inside = {name: name.partition(".")[2] for name in own}
        if any(_whole(_respelled(state, inside.values()), inside.values()) for state in found.values()):
            names = inside
    wanted = {names[name]: tensor for name, tensor in own.items()}
    states = {place: _respelled(state, wanted) for place, state in found.items()}
    state = _fitting(_chosen(states, path, None, wanted), path, None, wanted)
    if missing := sorted(wanted.keys() - state.keys()):
        raise UserError(
            f"{path} is not of '{what}': it lacks {len(missing)} of the {len(wanted)} tensors of that encoder, such as "
            f"'{missing[0]}'; wanted weights of the same network"
        )
    _check_tensors(state, path, wanted, ())
    encoder.load_state_dict({name: state[names[name]] for name in own})


def _respelled(state: State, wanted: Iterable[str]) -> dict[str, Tensor]:
    """With the names of ``wanted`` where they differ by a point in the place of a line.

    timm joins the first two levels of a network that it takes apart: ``stages.0.conv`` is ``stages_0.conv`` there.
    """
    known = {name.replace(".", "_"): name for name in wanted}

    def spelled(name: str) -> str:
        ends = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
        at = next((at for at in ends if name[at:].replace(".", "_") in known), None)
        return name if at is None else name[:at] + known[name[at:].replace(".", "_")]

    return {spelled(name): tensor for name, tensor in state.items()}


def _check_tensors(state: State, path: Path, wanted: State, head: Collection[str]) -> None:
    """Refuse tensors of other shapes, or with values that are none. Raises UserError."""
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            found, want = tuple(state[name].shape), tuple(tensor.shape)
            if found[1:] == want[1:] and name in head:
                raise UserError(
                    f"{path}: its head '{name}' is of {found[0]} classes, wanted {want[0]} (another class count): "
                    "fine-tune it on these classes, or list its own with data.classes"
                )
            hint = "another class count" if found[1:] == want[1:] else "another architecture"
            raise UserError(f"{path}: '{name}' has shape {found}, wanted {want} ({hint})")
        if state[name].is_complex():
            raise UserError(f"{path}: '{name}' is not of numbers like a network's ({state[name].dtype})")
        if not torch.isfinite(state[name].float()).all():
            raise UserError(
                f"{path}: '{name}' has values that are not finite: take a checkpoint from before they broke"
            )


def read_state_dicts(path: Path) -> dict[str, State]:
    """Every state dict in a file of the user, by its place in it ("" is the file itself, ``a.b`` is inside of ``a``).

    Nothing is ever unpickled but tensors, plain values and the options of a command line.

    Raises:
        UserError: no file, a broken one, or one without a state dict.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: wanted a .safetensors or .pth file")
    try:
        content = _read(path)
    except Exception as error:  # each format raises its own
        if _is_cut_short(path, error):
            size = path.stat().st_size
            raise UserError(f"{path} is cut short ({size:,} bytes): copy or download it again") from None
        raise UserError(
            f"cannot read weights from {path} ({_reason(error)}): wanted .safetensors, or .pth with tensors only"
        ) from None
    found = dict(_state_dicts(content, set()))
    if isinstance(content, dict) and not content:
        found = {"": {}}
    if not found:
        raise UserError(f"{path} holds no state dict: wanted a mapping from names to tensors")
    for state in found.values():
        for name, tensor in state.items():
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
                raise UserError(f"{path}: '{name}' is no plain tensor with values of its own: wanted dense weights")
    return found


def _read(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[:4] not in (ZIP, PICKLE):
        if start[8:] != b"{":  # safetensors: the length of a JSON header, and the header
            raise ValueError("it begins as neither of them does")
        return load_file(path)
    if start[:4] == ZIP:
        with zipfile.ZipFile(path) as archive:
            packed = {entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED}
        # torch packs nothing but the code of TorchScript, which is not read: what is packed may unpack to anything.
        if odd := sorted(name for name in packed if "/code/" not in name):
            raise ValueError(f"'{printable(odd[0], 80)}' in it is packed")
    # What timm and torchvision save beside the weights is harmless. A stream, because torch goes by names too.
    with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as stream:
        return torch.load(stream, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    text = str(error).lower()
    if "torchscript" in text:
        return "a TorchScript archive: save its state_dict()"
    if "weights_only" in text or "weights only" in text:
        return "it holds more than tensors, which could run code: save its state_dict() alone"
    return first_line(error)


def _is_cut_short(path: Path, error: Exception) -> bool:
    """Whether a file that could not be read begins as weights do and ends before it should."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(9)
        if not start or start[:4] == ZIP:  # the list of a zip's contents is at its end
            try:
                return not zipfile.is_zipfile(path)
            except zipfile.BadZipFile:
                return False
        if start[8:] == b"{" and start[:4] != PICKLE:
            stream.seek(8)
            length = int.from_bytes(start[:8], "little")
            header = stream.read(min(length, LARGEST_HEADER_BYTES))
            if 8 + length > size:
                return length <= LARGEST_HEADER_BYTES
            try:
                ends = [each["data_offsets"][1] for name, each in json.loads(header).items() if name != "__metadata__"]
                return bool(8 + length + max(ends, default=0) > size)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
                return False
        # What reads a pickle runs into the end.
        return isinstance(error, (EOFError, IndexError, struct.error)) or "unexpected EOF" in str(error)


def _state_dicts(value: Any, seen: set[int], place: str = "", level: int = 0) -> Iterable[tuple[str, State]]:
    """Mappings from names to tensors in what a file held, with their places; each once."""
    if not isinstance(value, dict) or not value or level > MOST_NESTED or id(value) in seen:
        return
    seen.add(id(value))
    if all(isinstance(name, str) and isinstance(each, Tensor) for name, each in value.items()):
        yield place, value
        return
    for name, each in value.items():
        if isinstance(name, str):
            yield from _state_dicts(each, seen, f"{place}.{name}" if place else name, level + 1)


def _is_averaged(name: str) -> bool:
    return AVERAGED.search(name) is not None


def _chosen(found: Mapping[str, State], path: Path, entry: str | None, wanted: State) -> State:
    """The state dict that ``entry`` names, or the usual one. Raises UserError."""
    if entry is not None:
        if entry in found:
            return found[entry]
        for state in found.values():
            if any(name.startswith(f"{entry}.") for name in state):
                return state  # whose prefix it is
        prefixes = {name.partition(".")[0] for state in found.values() for name in state if "." in name}
        raise choice(f"checkpoint_entry of {path}", entry, {name for name in found if name} | prefixes)
    plain = [name for name in found if not _is_averaged(name)] or list(found)
    fitting = [name for name in plain if _whole(found[name], wanted)] or plain
    usual = [name for name in USUAL if name in fitting]
    if not usual and len(fitting) > 1:
        raise UserError(
            f"{path} holds {len(fitting)} state dicts ({_listed(fitting)}): say which with checkpoint_entry"
        )
    chosen = (usual or fitting)[0]
    _tell_averaged(path, [name for name in found if name != chosen and _is_averaged(name)], _is_averaged(chosen))
    return found[chosen]


def _fitting(state: State, path: Path, entry: str | None, wanted: State) -> dict[str, Tensor]:
    """What lies under the prefix by which the names are those of ``wanted``, without it. Raises UserError."""
    counts = _prefixes(state, wanted)
    whole = _whole(state, wanted)
    named = [prefix for prefix in counts if entry is not None and f".{prefix}".find(f".{entry}.") >= 0]
    if named:
        whole = [prefix for prefix in whole if prefix in named]
        counts = Counter({prefix: counts[prefix] for prefix in named})
    plain = [prefix for prefix in whole if not _is_averaged(prefix)] or whole
    if len(plain) > 1 and "" not in plain:
        raise UserError(
            f"{path} holds {len(plain)} networks that fit ({_listed(plain)}): say which with checkpoint_entry"
        )
    if plain:
        prefix = "" if "" in plain else plain[0]
        _tell_averaged(path, [each for each in whole if each != prefix and _is_averaged(each)], _is_averaged(prefix))
    else:  # it will be refused: by the prefix of most of the names, where that is one
        [(likely, count)] = counts.most_common(1) or [("", 0)]
        prefix = likely if 2 * count >= len(wanted) else ""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if plain and (outside := [name for name in state if not name.startswith(prefix)]):
        note(printable(f"{path.name}: {len(outside)} tensors outside '{prefix}' are left out, such as '{outside[0]}'"))
    return found | {name: wanted[name] for name in wanted.keys() - found.keys() if name.endswith(COUNTER)}


def _prefixes(state: Iterable[str], wanted: Iterable[str]) -> Counter[str]:
    """By prefix, how many of the wanted names stand behind it; shorter ones first."""
    known, counts = set(wanted), Counter[str]()
    for name in state:
        ends = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
        counts.update(name[:at] for at in ends if name[at:] in known)
    return Counter(dict(sorted(counts.items(), key=lambda item: len(item[0]))))


def _whole(state: State, wanted: Iterable[str]) -> list[str]:
    """The prefixes behind which every wanted name stands."""
    needed = {name for name in wanted if not name.endswith(COUNTER)}
    return [prefix for prefix, count in _prefixes(state, needed).items() if count == len(needed)]


def head_layers(network: nn.Module) -> list[str]:
    """Names of the layers that give a network's outputs: as timm knows them, else the one that stands last."""
    known = getattr(network, "pretrained_cfg", None)
    named = known.get("classifier") if isinstance(known, dict) else None
    layers = [named] if isinstance(named, str) else list(named or ())
    if not layers and (names := list(network.state_dict())):
        layers = [names[-1].rpartition(".")[0]]
    return layers


def _head(network: nn.Module, wanted: State) -> list[str]:
    """Names of the tensors of the classifier."""
    layers = head_layers(network)
    return [name for name in wanted if name.rpartition(".")[0] in layers]


def _tell_averaged(path: Path, others: list[str], is_averaged: bool) -> None:
    if is_averaged:
        note(printable(f"{path.name} holds averaged weights, which are taken"))
    elif others:
        entry = others[0].removesuffix(".")
        note(
            printable(
                f"{path.name} also holds averaged weights, which may be better: checkpoint_entry '{entry}' takes them"
            )
        )


def _listed(names: Iterable[str]) -> str:
    return printable(", ".join(f"'{name.removesuffix('.')}'" for name in sorted(names)), 300)
