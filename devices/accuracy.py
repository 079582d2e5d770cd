"""What bundles say of the test images on a device: in blocks, each kept when it is done, so that a cut goes on."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np

from ..core.config import BenchConfig, Corruption
from ..core.errors import DeviceLost, KdpipeError, UserError
from ..core.kinds import AgainstHost, BatchOne, Bundle, Mismatch, Prediction, Runnable
from ..core.proc import first_line
from ..core.sealed import printable
from ..core.stats import Interval
from ..data.dataset import Dataset, images_shape, write_images
from ..runtime.bundle import TOLERANCES, apart, spread
from ..runtime.task import TASKS
from . import Device, find_device, opened
from .journal import Journal
from .session import threads_of
from .talk import Talk

BLOCK_BYTES = 128 * 2**20  # of images, or of what is said of them, that lie on a device at a time
LEAST_BLOCK = 8  # images
SLACK, SLACK_SECONDS = 10, 60.0  # a process that takes so many times what it should, and a minute, hangs
FIRST_SECONDS = 3600.0  # of the first process of a bundle, of which nothing is known
FRAMES_FILE, MOST_FRAMES, FRAMES_BYTES = "frames.npz", 8, 64 * 2**20  # pictures of whole frames that are pushed
# Share of the images that have to be within a tolerance: where a number of INT8 lies between two integers, another
# order of summation takes the other, and a whole channel of that image moves by a few steps (seen in one of 233).
LEAST_WITHIN = 0.95
PIECE = 64  # images whose outputs are looked at together
ALONE = "alone"  # the part of a bundle's outputs that is of the timing images, one at a time

P = ParamSpec("P")
T = TypeVar("T")


class Kind(NamedTuple):
    """Bundles whose networks are shown the same: images are decoded and sent once for all of those."""

    names: list[str]
    block: int  # images that are sent at a time


@dataclass(frozen=True)
class Asked:
    """Bundles on an opened device, and what they are asked about."""

    device: Device
    bundles: Mapping[str, Runnable]
    dataset: Dataset | None  # None: nothing is known of what is right, inputs are random
    journal: Journal
    scratch: Path
    talk: Talk
    config: BenchConfig

    @cached_property
    def kinds(self) -> list[Kind]:
        """The bundles by what their networks are shown."""
        return kinds_of(self.bundles)

    @cached_property
    def timing(self) -> dict[str, str]:
        """By bundle what its pushed timing images are called."""
        return {name: f"timing-{at}.npy" for at, kind in enumerate(self.kinds) for name in kind.names}

    @cached_property
    def positions(self) -> np.ndarray:
        """Where the timing images are among the test images, in their order."""
        if self.dataset is None:
            return np.arange(self.config.images)
        return self.dataset.positions("test", self.config.images, seed=0)

    @property
    def count(self) -> int:
        """Of test images."""
        return 0 if self.dataset is None else self.dataset.facts.images["test"]

    def blocks(self, name: str) -> list[tuple[int, int]]:
        """The test images of a bundle in order, from the first to before the last of each block."""
        [step] = [kind.block for kind in self.kinds if name in kind.names]
        return [(at, min(self.count, at + step)) for at in range(0, self.count, step)]

    def has(self, name: str, start: int, stop: int, corruption: Corruption | None) -> bool:
        """Whether the outputs of a block lie in the journal."""
        answer = self.journal.answer(name, part(start, corruption))
        return answer is not None and answer.images == stop - start

    def stand_in(self, name: str) -> bool:
        """Whether the device runs another runtime in the place of the bundle's own."""
        return not self.device.runs(self.bundles[name].facts.target)


def block_images(bundle: Runnable) -> int:
    """How many images of its input are sent at a time."""
    facts, image_bytes = bundle.facts, int(np.prod(images_shape(1, bundle.facts.input.model_dump())))
    said_bytes = TASKS[facts.task].output_bytes(len(bundle.labels), facts.input.sides, facts.output)
    return max(LEAST_BLOCK, BLOCK_BYTES // max(image_bytes, said_bytes))


def kinds_of(bundles: Mapping[str, Runnable]) -> list[Kind]:
    """The bundles by what their networks are shown; a block is as small as the one that says most of it needs."""
    found: dict[str, list[str]] = {}
    for name, bundle in bundles.items():
        shown = sorted(bundle.facts.input.model_dump(exclude={"layout"}).items())
        found.setdefault(repr(shown), []).append(name)
    return [Kind(names, min(block_images(bundles[name]) for name in names)) for names in found.values()]


def block_count(bundles: Mapping[str, Runnable], dataset: Dataset | None) -> int:
    """How many steps ``ask`` takes."""
    if dataset is None:
        return 0
    return sum(len(kind.names) * -(-dataset.facts.images["test"] // kind.block) for kind in kinds_of(bundles))


def push(asked: Asked) -> None:
    """Put the bundles and the images that are timed onto the device.

    Those are seeded, spread over the classes, in a file of their own: a process that times opens nothing else.
    """
    for names, _ in asked.kinds:
        file, spec = asked.scratch / asked.timing[names[0]], asked.bundles[names[0]].facts.input.model_dump()
        if asked.dataset is None:
            np.save(file, np.zeros(images_shape(len(asked.positions), spec), np.uint8))
        else:
            samples = asked.dataset.samples("test")
            write_images(file, [samples[int(at)] for at in asked.positions], spec)
        asked.device.push(file, file.name)
    for name, bundle in asked.bundles.items():
        asked.device.push(bundle.path, name)


def push_frames(asked: Asked) -> str | None:
    """Put some of the timed images, decoded, at their own size, onto the device; returns what they are called there.

    None where there are none, or their files cannot be read any more.
    """
    if asked.dataset is None:
        return None
    samples, frames, left = asked.dataset.samples("test"), list[np.ndarray](), FRAMES_BYTES
    try:
        for at in asked.positions[:MOST_FRAMES]:
            frame = np.asarray(samples[int(at)].image())
            left -= frame.nbytes
            if frames and left < 0:
                break
            frames.append(frame)
    except UserError as error:  # what the networks are shown may be kept where the images are gone
        asked.talk.note(f"whole frames are not timed: {error}")
        return None
    file = asked.scratch / FRAMES_FILE
    np.savez(file, *frames)
    asked.device.push(file, file.name)
    return file.name


def ask(asked: Asked) -> dict[str, str]:
    """Outputs of all test images into the journal, block by block; first those of the timing images one at a time.

    How long one image takes alone bounds how long a block may take. Then the same images with each fault.

    Returns:
        By bundle why it was given up. One that cannot be run on the device at all is left out silently.

    Raises:
        DeviceLost: what was asked so far is kept.
    """
    failed: dict[str, str] = {}
    journal = asked.journal
    for names, _ in asked.kinds:
        able = [name for name in names if not asked.stand_in(name) or asked.bundles[name].facts.stand_in]
        for name in able:
            if journal.answer(name, ALONE) is None:
                asked.talk.advance(0, f"accuracy of {name}")
                _keep(asked, name, ALONE, asked.timing[name], len(asked.positions), FIRST_SECONDS, failed)
        for corruption, (start, stop) in itertools.product((None, *asked.config.corruptions), asked.blocks(names[0])):
            lacking = [name for name in able if name not in failed and not asked.has(name, start, stop, corruption)]
            if lacking:
                with _block(asked, lacking[0], start, stop, corruption) as images:
                    for name in lacking:
                        asked.talk.check()
                        which = f"{'' if corruption is None else f'{corruption} '}images {start + 1} to {stop}"
                        asked.talk.advance(0, f"accuracy of {name}, {which} of {asked.count}")
                        alone = journal.answer(name, ALONE)
                        assert alone is not None  # else it had failed
                        limit = SLACK_SECONDS + SLACK * (alone.open_seconds + (stop - start) * image_seconds(alone))
                        _keep(asked, name, part(start, corruption), images, stop - start, limit, failed)
            asked.talk.advance(len(names), "")
    return failed


def part(start: int, corruption: Corruption | None = None) -> str:
    """The part of a bundle's outputs that is of the block from image ``start`` on, with a fault or as it is."""
    return f"{start:08d}" if corruption is None else f"{corruption}-{start:08d}"


def image_seconds(alone: Prediction) -> float:
    """How long an image took of those that were run one at a time."""
    return alone.predict_seconds / max(1, alone.images)


@contextmanager
def _block(asked: Asked, name: str, start: int, stop: int, corruption: Corruption | None) -> Iterator[str]:
    """What a block of images is called on the device, where it lies for as long as this takes."""
    assert asked.dataset is not None  # else there are no blocks
    spec = asked.bundles[name].facts.input.model_dump()
    ready = asked.dataset.fitted_file("test", spec) if corruption is None else None
    whole, file = stop - start == asked.count, asked.scratch / f"images-{part(start, corruption)}.npy"
    if ready is None:
        samples = asked.dataset.samples("test")
        write_images(file, [samples[at] for at in range(start, stop)], spec, corruption)
    elif not whole:
        np.save(file, np.load(ready, mmap_mode="r", allow_pickle=False)[start:stop])
    asked.device.push(ready if ready is not None and whole else file, file.name)
    try:
        yield file.name
    finally:
        file.unlink(missing_ok=True)
        if not whole or corruption is not None:  # a set that is small stays: the next session has it
            asked.device.drop(file.name)


def _keep(
    asked: Asked, name: str, what: str, images: str, count: int, limit_seconds: float, failed: dict[str, str]
) -> None:
    """Ask about some images; the outputs go into the journal, or why there are none into ``failed``."""
    written = asked.journal.outputs(name, what)

    def predict() -> Prediction:
        how = {"batch": 1, "threads": threads_of(asked.config, name)} if what == ALONE else {}
        answer = asked.device.predict(name, images, written, limit_seconds, stand_in=asked.stand_in(name), **how)
        if asked.dataset is not None:
            read_outputs(written, name, count, asked.bundles[name])
        return answer

    try:
        asked.journal.add_answer(name, what, twice(asked.talk, name, predict))
    except DeviceLost:
        raise
    except KdpipeError as error:
        asked.talk.check()
        asked.talk.note(f"{name}: given up: {error}")
        failed[name] = str(error)


def twice(talk: Talk, what: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """A process may fail for a reason that is gone at once: the second failure counts. Raises KdpipeError."""
    try:
        return call(*arguments, **options)
    except KdpipeError as error:
        talk.check()
        talk.note(f"{what}: {error}; once more")
        return call(*arguments, **options)


def read_outputs(path: Path, name: str, count: int, bundle: Runnable) -> np.ndarray:
    """Outputs [N, ...] as a device wrote them, mapped. Raises UserError for anything else."""
    try:
        outputs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the outputs of {name} are no array ({first_line(error)})") from None
    wanted = TASKS[bundle.facts.task].misfit(outputs, count, len(bundle.labels))
    if wanted is not None:
        raise UserError(f"the outputs of {name} are {outputs.dtype} {list(outputs.shape)}, wanted {wanted}")
    if not all(np.isfinite(outputs[at : at + PIECE]).all() for at in range(0, count, PIECE)):
        raise UserError(f"the outputs of {name} are not all finite")
    return np.asarray(outputs)


def gather(asked: Asked, name: str, out: Path, corruption: Corruption | None = None) -> np.ndarray:
    """A bundle's outputs of all blocks as one file, mapped [N, ...]. Raises UserError where they do not fit.

    Args:
        corruption: the fault that the images had, if they had one.
    """
    parts = [read_outputs(asked.journal.outputs(name, part(at, corruption)), name, stop - at, asked.bundles[name])
             for at, stop in asked.blocks(name)]  # fmt: skip
    if len({(found.shape[1:], found.dtype) for found in parts}) > 1:
        raise UserError(f"the outputs of {name} are of several shapes")
    whole = np.lib.format.open_memmap(out, "w+", parts[0].dtype, (asked.count, *parts[0].shape[1:]))
    for (start, stop), found in zip(asked.blocks(name), parts, strict=True):
        whole[start:stop] = found
    whole.flush()
    return whole


def batch_one(asked: Asked, name: str, outputs: np.ndarray) -> BatchOne:
    """The timing images one at a time, as they are timed, against the same among all ``outputs``."""
    bundle, count = asked.bundles[name], len(asked.positions)
    one_by_one, batched = (
        read_outputs(asked.journal.outputs(name, ALONE), name, count, bundle),
        outputs[asked.positions],
    )
    if one_by_one.shape != batched.shape or one_by_one.dtype != batched.dtype:
        raise UserError(f"the outputs of {name} are of another shape in batches than one image at a time")
    by_image = _farthest(one_by_one, batched)
    if isinstance(bundle, Bundle):
        tolerance = bundle.facts.golden_tolerance
    else:  # as a bundle's is set when it is packed
        tolerance = float(TOLERANCES[bundle.facts.precision] * spread(batched))
    return BatchOne(
        images=count,
        max_difference=float(by_image.max()),
        tolerance=tolerance,
        agreement=TASKS[bundle.facts.task].agreement(one_by_one, batched),
        within_tolerance=float(np.quantile(by_image, LEAST_WITHIN, method="higher")) <= tolerance,
    )


def _farthest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far apart two mapped outputs are, image by image [N]: where they are farthest."""
    starts = range(0, len(first), PIECE)
    return np.concatenate([apart(first[at : at + PIECE], second[at : at + PIECE]) for at in starts])


# ---- against the host ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HostOutputs:
    """What the same bundles said of the same images on this host."""

    by: str
    outputs: np.ndarray  # [N, ...]


def on_host(bundles: Mapping[str, Runnable], dataset: Dataset, folder: Path, talk: Talk) -> dict[str, HostOutputs]:
    """Outputs of all test images on this host, by bundle key; of those that it can run.

    Before any device is timed: this host may be one of them.
    """
    device = find_device("local")
    by_key = {bundle.key: bundle for bundle in bundles.values()}
    with tempfile.TemporaryDirectory() as scratch, opened(device, Path(scratch)):
        config = BenchConfig(device=device.name, device_fingerprint={}, images=1)
        asked = Asked(device, by_key, dataset, Journal(folder), Path(scratch), talk, config)
        push(asked)
        ask(asked)
        found = {}
        for key in by_key:
            answers = [asked.journal.answer(key, part(start)) for start, _ in asked.blocks(key)]
            if answers and None not in answers:
                outputs = gather(asked, key, folder / f"{key}.npy")
                found[key] = HostOutputs(answers[0].session.runtime, outputs)  # type: ignore[union-attr]
    return found


def against_host(
    bundle: Runnable, dataset: Dataset, labels: np.ndarray, outputs: np.ndarray, host: HostOutputs
) -> tuple[AgainstHost, list[Mismatch]]:
    """How far ``outputs`` [N, ...] are from those of the host, and the images that the two call something else."""
    task, samples = TASKS[bundle.facts.task], dataset.samples("test")
    change = task.change(task.scores(host.outputs, labels), task.scores(outputs, labels))
    classes = [printable(name) for name in dataset.classes]
    rows = []
    for at in task.differing(host.outputs, outputs).tolist():
        here, there = (task.decide(each[at : at + 1])[0] for each in (host.outputs, outputs))
        rows.append(
            Mismatch(
                position=at,
                image=printable(samples[at].path.name),
                label=task.tell(labels[at], classes),
                host=task.tell(here, classes),
                device=task.tell(there, classes),
            )
        )
    found = AgainstHost(
        by=host.by,
        max_difference=float(_farthest(host.outputs, outputs).max()),
        mismatches=len(rows),
        lost=change.lost,
        won=change.won,
        difference=Interval(change.difference, change.low, change.high, change.n),
        mcnemar_p=change.p_value,
    )
    return found, rows
