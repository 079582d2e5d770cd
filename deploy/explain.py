"""Where checkpoints and bundles see what they say of images: of image files, or of those on which variants differ."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.artifact import read_manifest
from ..core.errors import KdpipeError, UserError, choice
from ..core.inputs import InputSpec
from ..core.kinds import Bundle, Checkpoint
from ..core.proc import first_line
from ..core.progress import track
from ..core.sealed import printable
from ..data.copies import read
from ..devices import Device, find_device
from ..devices.accuracy import block_images
from ..report.compression import Packed, Sources
from ..report.maps import (
    BLOCK,
    Explained,
    Map,
    Maps,
    activation_maps,
    caption,
    check_explained,
    drawn,
    occlusion_maps,
    page,
)
from ..report.masks import Strip, Tile, photo
from ..runtime.preprocess import fit
from .bundle import check_task
from .predict import answering, stand_in

MARK = '<meta name="generator" content="kdpipe explain">'  # of the pages that may be written anew

Network = Checkpoint | Bundle
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What one network says of one image and where it sees that, or why the image cannot be read.

    ``pixels`` uint8 [H, W, 3]: what the network was shown.
    """

    image: Path
    network: str
    label: str = ""
    pixels: np.ndarray | None = None
    map: Map | None = None
    fault: str | None = None


def open_networks(folders: Sequence[Path]) -> dict[str, Network]:
    """Checkpoints and bundles by the names of their folders, without the keys where that tells them apart.

    Raises:
        UserError: another artifact, or one that is not whole.
    """
    found: dict[str, Network] = {}
    kinds: dict[str, type[Network]] = {Checkpoint.kind: Checkpoint, Bundle.kind: Bundle}
    for folder in dict.fromkeys(folders):
        kind = read_manifest(folder).kind
        if kind not in kinds:
            raise UserError(f"{folder} is a {kind}: wanted checkpoints and bundles, then images")
        network = kinds[kind].open(folder)
        check_task(folder, network.facts.task)
        names = [re.sub(r"-[0-9a-f]{12}$", "", folder.name), folder.name, str(folder)]
        found[next(name for name in names if name and name not in found)] = network
    return found


def explain(
    networks: Mapping[str, Network], images: Sequence[Path], device: Device, of_class: str | None = None
) -> Iterator[Seen]:
    """Where each of ``networks`` sees what it says of image files: network by network, the images in their order.

    Args:
        of_class: of which class every map is to be, in place of what the network says.

    Raises:
        UserError: a network that answers with masks, that has no such class, or that cannot be opened here.
        DeviceLost: the link is gone.
    """
    for name, network in networks.items():
        check_explained(network.facts.task, name)
        if of_class is not None and of_class not in network.labels:
            raise choice(f"class of {name}", of_class, network.labels)
    for name, network in networks.items():
        spec, labels = network.facts.input, [printable(label) for label in network.labels]
        wanted = None if of_class is None else network.labels.index(of_class)
        with _maps(network, device) as maps:
            for at in track(range(0, len(images), BLOCK), f"explaining {name}", -(-len(images) // BLOCK)):
                block = [(path, *_shown(path, spec)) for path in images[at : at + BLOCK]]
                shown = [pixels for _, pixels, _ in block if pixels is not None]
                found = iter(maps(shown, None if wanted is None else [wanted] * len(shown)))
                for path, pixels, fault in block:
                    if pixels is None:
                        yield Seen(path, name, fault=fault)
                    else:
                        map_ = next(found)
                        yield Seen(path, name, labels[map_.label], pixels, map_)


def _shown(path: Path, spec: InputSpec) -> tuple[np.ndarray | None, str | None]:
    try:
        return fit(read(path), spec.model_dump()), None
    except UserError as error:
        return None, str(error)


@contextlib.contextmanager
def _maps(network: Network, device: Device) -> Iterator[Maps]:
    """What gives the maps of images uint8 [H, W, 3]. Raises UserError, DeviceLost."""
    if isinstance(network, Checkpoint):
        from ..networks.models import restore

        yield activation_maps(*restore(network), network.facts.task)
        return
    with answering(network, device) as asked:
        step = block_images(network)

        def ask(images: np.ndarray) -> np.ndarray:
            return np.concatenate([asked(list(images[at : at + step])) for at in range(0, len(images), step)])

        yield occlusion_maps(ask, network.facts.input, network.facts.task)


def described(seen: Seen) -> Numbers:
    """What was found of one image for machines."""
    assert seen.map is not None
    return {
        "image": printable(str(seen.image)),
        "network": printable(seen.network),
        "label": seen.label,
        "probability": round(seen.map.probability, 6),
        "how": seen.map.how,
        "map": [[float(f"{value:.4g}") for value in row] for row in seen.map.evidence],
    }


def strips(seen: Sequence[Seen]) -> list[Strip]:
    """What ``explain`` found as pictures: a row an image that could be read, the networks side by side."""
    rows: dict[Path, list[Tile]] = {}
    for each in seen:
        if each.pixels is not None and each.map is not None:
            tiles = rows.setdefault(each.image, [Tile("image", photo(each.pixels))])
            tiles.append(_tile(each.network, each.label, each.pixels, each.map))
    named = Counter(image.name for image in rows)
    # Where a name alone would be two images, the folder tells them apart.
    return [
        Strip(printable(image.name if named[image.name] == 1 else str(image)), "", tiles)
        for image, tiles in rows.items()
    ]


def _tile(name: str, label: str, pixels: np.ndarray, found: Map) -> Tile:
    return Tile(caption(printable(name), label, found), photo(drawn(pixels, found.evidence)))


def stand_in_lines(networks: Mapping[str, Network], device: Device) -> list[str]:
    """Which bundles another runtime answers for, a line each."""
    bundles = {name: network for name, network in networks.items() if isinstance(network, Bundle)}
    others = {name: stand_in(bundle, device) for name, bundle in bundles.items()}
    return [
        f"{name}: {other} answers here in place of {bundles[name].facts.target}"
        for name, other in others.items()
        if other
    ]


def asked_lines(networks: Mapping[str, Network], device: Device) -> list[str]:
    """Where bundles were asked, if there are some, and which another runtime answers for."""
    if not any(isinstance(network, Bundle) for network in networks.values()):
        return []
    return [f"Bundles were asked on '{printable(device.name)}'.", *stand_in_lines(networks, device)]


# ---- a page of its own -----------------------------------------------------------------------------------


def check_place(out: Path) -> None:
    """Refuse to write over what is no such page. Raises UserError."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: wanted a file for the page, such as {out / 'explained.html'}, with --out")
    if out.exists() or out.is_symlink():
        try:
            with out.open("rb") as stream:
                ours = MARK.encode() in stream.read(1000) and not out.is_symlink()
        except OSError:
            ours = False
        if not ours:
            raise UserError(f"{out} is there already, and no page of kdpipe explain: name another file with --out")


def write(out: Path, title: str, rows: Sequence[Strip], lines: Sequence[str]) -> None:
    """Write the page, whole or not at all. Raises UserError."""
    part = out.with_name(f".{secrets.token_hex(8)}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page(title, rows, lines), encoding="utf-8")
        part.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {printable(str(out))} ({first_line(error)}): name another file with --out"
        ) from None


# ---- those that changed ----------------------------------------------------------------------------------


def explain_flips(
    rows: Sequence[Numbers], bundles: Mapping[str, Packed], checkpoints: Mapping[str, Checkpoint], sources: Sources
) -> Explained:
    """Maps for the rows of ``report.compression.flips``: of teacher and student, and of both bundles by occlusion.

    Bundles are asked on this host, whatever device they were measured on. What cannot be opened here is left out, and
    a line says why.
    """
    samples = sources.dataset.samples("test") if sources.dataset else []
    wanted = [(row, _looking(row, bundles, checkpoints)) for row in rows]
    local, lines = find_device("local"), []
    photos: dict[int, str] = {}
    tiles: dict[tuple[_Looking, int], Tile] = {}
    for each in dict.fromkeys(each for _, some in wanted for each in some):
        positions = list(dict.fromkeys(row["position"] for row, some in wanted if each in some))
        try:
            network = each.open(bundles, checkpoints, sources)
            spec, labels = network.facts.input.model_dump(), [printable(label) for label in network.labels]
            shown = [samples[at].fitted(spec) for at in positions]
            with _maps(network, local) as maps:
                found = track(maps(shown, None), f"explaining {each.name}", len(shown))
                for at, pixels, map_ in zip(positions, shown, found, strict=True):
                    photos.setdefault(at, photo(pixels))
                    tiles[each, at] = _tile(each.name, labels[map_.label], pixels, map_)
            lines += stand_in_lines({each.name: network}, local)
        except KdpipeError as error:
            lines.append(f"{each.name} is left out: {printable(str(error))}")
    strips_ = []
    for row, some in wanted:
        at = row["position"]
        said = f"Label: {row['label']}. {row['against']}: {row['float32']}. {row['bundle']}: {row['variant']}."
        maps_ = [tiles[each, at] for each in some if (each, at) in tiles]
        strips_.append(Strip(row["image"], said, [Tile("image", photos[at]), *maps_] if at in photos else []))
    return Explained(strips_, lines)


class _Looking(NamedTuple):
    """One of the networks behind a row, by kind and name."""

    kind: str
    name: str

    def open(self, bundles: Mapping[str, Packed], checkpoints: Mapping[str, Checkpoint], sources: Sources) -> Network:
        """The network. Raises UserError where it does not lie beside the others, or is not whole."""
        if self.kind == Checkpoint.kind:
            return checkpoints[self.name]
        key = bundles[self.name].source.key
        if key not in sources.bundles:
            raise UserError(f"bundle {key[:12]} does not lie beside its measurement")
        return Bundle.open(sources.bundles[key])


def _looking(row: Numbers, bundles: Mapping[str, Packed], checkpoints: Mapping[str, Checkpoint]) -> list[_Looking]:
    """Teacher and student of the row's bundle, of what is there, then the bundle of float32 and the row's own."""
    key = bundles[row["bundle"]].student_key
    student = next((name for name, checkpoint in checkpoints.items() if checkpoint.key == key), None)
    taught = None if student is None else checkpoints[student].manifest.inputs.get("teacher")
    teacher = next((name for name, each in checkpoints.items() if taught is not None and each.key == taught.key), None)
    found = [_Looking(Checkpoint.kind, name) for name in (teacher, student) if name is not None]
    return [*found, _Looking(Bundle.kind, row["against"]), _Looking(Bundle.kind, row["bundle"])]
