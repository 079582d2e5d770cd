"""What a teacher says of every view, stored once: students then learn from it without asking the teacher.

A cache holds one file a view number: a record of fixed size for each image, in the order of ``images.npy``. A
view is a function of (seed, view number, image), so what was stored for it is what the student will see. Of a teacher
that says something of every place an image has a record a place, row by row, at the grid of the student's outputs.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.artifact import (
    MANIFEST,
    Draft,
    Order,
    drafting,
    sha256_file,
    tool_versions,
)
from ..core.config import CacheConfig, CachePlan, ModelSettings, TrainConfig
from ..core.errors import GateFailed, UserError
from ..core.inputs import InputSpec
from ..core.kinds import Cache, CacheFacts, Checkpoint
from ..core.proc import children_signal_kept
from ..core.progress import note, progress
from ..core.remote import RemoteFolder, is_url
from ..data.dataset import Dataset
from ..data.views import TrainingViews, seeded, training_images
from ..networks.models import create, input_spec
from ..runtime.task import TASKS
from .features import by_place, in_places, output_grid, resized
from .precision import Precision
from .ranks import Ranks, join
from .teacher import Address, Teacher, TeacherOutput, open_teacher

BATCH = 64
PLACES_BATCH = 16  # images, of a teacher that says something of every place
ALL_CLASSES = 256  # up to so many classes every logit is stored, above the largest TOP alone
TOP = 100
ALL_CLASSES_OF_PLACES, TOP_OF_PLACES = 32, 16  # likewise, of which an image has thousands
TIMED_BATCHES = 4
TRANSFORMERS = ("torch", "torchvision", "timm", "pillow", "numpy")  # whose versions can change a view
AGREES = 4e-3  # float16 has 11 bits; a teacher in another batch differs in the last bits of float32


def top_count(config: CacheConfig, classes: int, dense: bool = False) -> int | None:
    """How many of the largest logits are stored, or None for all of them; ``dense``: of every place."""
    most, usual = (ALL_CLASSES_OF_PLACES, TOP_OF_PLACES) if dense else (ALL_CLASSES, TOP)
    wanted = config.top or (None if classes <= most else usual)
    return None if wanted is None or wanted >= classes else wanted


def record_type(classes: int, top: int | None, dense: bool = False) -> np.dtype[Any]:
    """All logits less the largest; or the largest ones' classes, log-probabilities and the mass of the rest.

    Of a place also the level, what was taken off its logits: ``cwd`` compares a class at one place and another.
    """
    level = [("level", "<f4")] if dense else []
    if top is None:
        return np.dtype([("logits", "<f2", (classes,)), *level])
    columns = [("classes", "<u4", (top,)), ("below", "<f2", (top,)), ("largest", "<f4"), ("rest", "<f4")]
    return np.dtype([*columns, *level])


def encode(logits: Tensor, kind: np.dtype[Any]) -> np.ndarray:
    """Logits [B, K], of images or of places, as records [B]."""
    records, names = np.empty(len(logits), kind), kind.names or ()
    if "level" in names:
        records["level"] = (logits.amax(1) if "logits" in names else logits.double().logsumexp(1)).cpu().numpy()
    if "logits" in names:
        below = logits - logits.amax(1, keepdim=True)
        records["logits"] = below.clamp(min=float(np.finfo(np.float16).min)).cpu().numpy()
        return records
    values, classes = logits.double().log_softmax(1).topk(kind["classes"].shape[0], dim=1)
    records["classes"], records["largest"] = classes.cpu().numpy(), values[:, 0].cpu().numpy()
    records["below"] = (values - values[:, :1]).cpu().numpy()
    records["rest"] = (1 - values.exp().sum(1)).clamp(min=1e-12).float().cpu().numpy()
    return records


def decode(records: np.ndarray, classes: int) -> Tensor:
    """Records [B] as float32 logits [B, K], up to a constant a row without ``level``; the rest's mass spread evenly."""
    level = records["level"][:, None] if "level" in (records.dtype.names or ()) else np.float32(0)
    if "logits" in (records.dtype.names or ()):
        return torch.from_numpy(records["logits"].astype(np.float32) + level)
    top = records["classes"].shape[1]
    with np.errstate(invalid="ignore", divide="ignore"):  # of a mass that none can be; whoever decodes looks at it
        logits = np.repeat(np.log(records["rest"] / (classes - top))[:, None], classes, axis=1)
        largest = records["largest"][:, None] + records["below"].astype(np.float32)
    np.put_along_axis(logits, records["classes"].astype(np.int64), largest, axis=1)
    return torch.from_numpy(logits.astype(np.float32) + level)


@dataclass(frozen=True)
class RemoteCache(Cache):
    """A cache at a URL: a file is fetched into ``path`` when it is first wanted, and checked."""

    source: RemoteFolder

    def file(self, name: str) -> Path:
        local = self.path / name
        record = self.manifest.files.get(name)
        if record is None:
            raise UserError(f"{self.source} has no file '{name}': build the cache again")
        if not local.is_file():
            fetched = local.with_name(f"{name}.{os.getpid()}.new")
            self.source.fetch(name, record, fetched)
            fetched.replace(local)
        return local


def open_cache(location: str, mirrors: Path) -> Cache:
    """The cache in a folder, or at a URL that fsspec can read (s3://, hf://, https://), copied on use into ``mirrors``.

    Raises:
        UserError: none there, or one that is not whole.
    """
    if not is_url(location):
        return Cache.open(location)
    source = RemoteFolder(location.rstrip("/"))
    mirrors.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=mirrors) as asking:
        manifest = source.manifest(Path(asking))  # each time: another one has files of its own
        if manifest.kind != Cache.kind:
            raise UserError(f"{source} is a {manifest.kind}, wanted a cache")
        folder = mirrors / manifest.digest
        folder.mkdir(exist_ok=True)
        (Path(asking) / MANIFEST).replace(folder / MANIFEST)
    for path in folder.iterdir():
        record = manifest.files.get(path.name)
        if record is not None and sha256_file(path) != record.sha256:
            path.unlink()
    return RemoteCache(folder, manifest, source)


class CachedTeacher(nn.Module):
    """A teacher that remembers: asked about views by their numbers, it gives the output that was stored for them."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        facts = cache.facts
        self.views = facts.views
        self._grid = facts.grid or ()
        self._classes, self._kind = facts.classes, record_type(facts.classes, facts.top, dense=bool(self._grid))
        self._places = (math.prod(self._grid),) if self._grid else ()
        self._cache = cache
        self._images = image_numbers(cache)
        self._shards: dict[int, np.memmap[Any, Any]] = {}

    def forward(self, view: Tensor, address: Address) -> TeacherOutput:
        """The output for the views [B, 3, H, W] of these numbers, on their device; the pixels are not looked at."""
        views, images = address
        shards = {int(number): self._shard(int(number)) for number in np.unique(views.numpy())}
        records = np.empty((len(images), *self._places), self._kind)  # no larger than the files that were looked at
        rows = np.minimum(np.searchsorted(self._images, images.numpy()), len(self._images) - 1)
        if not np.array_equal(self._images[rows], images.numpy()):
            raise UserError(f"{self._cache.path} knows nothing of some of the images: build it again")
        for number, shard in shards.items():
            here = views.numpy() == number
            records[here] = shard[rows[here]]
        if "classes" in (self._kind.names or ()) and (records["classes"] >= self._classes).any():
            raise UserError(f"{self._cache.path} has records of classes that it has not: build it again")
        logits = decode(records.reshape(-1), self._classes)
        if not torch.isfinite(logits).all():
            raise UserError(f"{self._cache.path} has records that are not finite: build it again")
        return TeacherOutput(in_places(logits, (len(images), *self._grid)).to(view.device))

    def _shard(self, view: int) -> np.memmap[Any, Any]:
        if view not in self._shards:
            path, shape = self._cache.shard(view), (len(self._images), *self._places)
            if path.stat().st_size != (wanted := math.prod(shape) * self._kind.itemsize):
                raise UserError(f"{path} has {path.stat().st_size} bytes, wanted {wanted}: build the cache again")
            self._shards[view] = np.memmap(path, self._kind, "r", shape=shape)
        return self._shards[view]


def image_numbers(cache: Cache) -> np.ndarray:
    """The numbers of the images [N], ascending, of which every shard has a record. Raises UserError."""
    facts, images = cache.facts, np.asarray(cache.array(cache.IMAGES, "iu", 1))
    dense = facts.grid is not None
    record_bytes = record_type(facts.classes, facts.top, dense).itemsize * math.prod(facts.grid or ())
    if images.shape != (facts.images,) or (np.diff(images.astype(np.int64)) <= 0).any() or images[0] < 0:
        raise UserError(f"{cache.path / cache.IMAGES} is not the {facts.images} ascending numbers: build it again")
    config = CacheConfig.model_validate(cache.settings)
    promised = (config.views, top_count(config, facts.classes, dense), record_bytes, config.grid or facts.grid)
    if (facts.views, facts.top, facts.record_bytes, facts.grid) != promised:
        raise UserError(f"{cache.path} does not hold the views and records that its settings promise: build it again")
    return images


def config_for(run: TrainConfig, spec: InputSpec) -> CacheConfig:
    """The cache that ``run``, a network of ``spec``, learns from."""
    assert run.cache_views is not None
    train = run.train
    drawn_by = run.seed if run.label_fraction < 1 else 0  # all images are the same ones for every seed
    return CacheConfig(
        views=run.cache_views, view_seed=run.views_by, label_fraction=run.label_fraction, seed=drawn_by,
        input=spec, grid=answers_grid(run), versions=_versions(), augment=train.augment, mixup=train.mixup,
        cutmix=train.cutmix, workers=train.workers,
    )  # fmt: skip


def config_of(plan: CachePlan) -> CacheConfig:
    """The cache that a plan means, its network's input spelled out. Raises UserError for an unknown network."""
    drawn_by = plan.seed if plan.label_fraction < 1 else 0  # all images are the same ones for every seed
    return CacheConfig.of(plan, seed=drawn_by, input=input_spec(plan), grid=answers_grid(plan), versions=_versions())


def answers_grid(config: ModelSettings) -> tuple[int, int] | None:
    """Height and width at which a cache for students like this one holds logits; None: as the teacher gives them.

    Where a decoder is named the network is made to see what it gives. Raises UserError.
    """
    if config.encoder is None:
        return None
    bare = config.model_copy(update={"pretrained": False, "encoder_checkpoint": None})
    with seeded(0):
        network, spec = create(bare, None)
    height, width = output_grid(network, spec.sides)
    return height, width


def _versions() -> dict[str, str]:
    return {name: version for name, version in tool_versions().items() if name in TRANSFORMERS}


def check_fit(
    cache: Cache, run: TrainConfig, spec: InputSpec, images: np.ndarray, dataset: Dataset, teacher: Checkpoint
) -> None:
    """Refuse a cache of anything else than what ``run`` will see of ``images``. Raises UserError."""
    config, wanted = CacheConfig.model_validate(cache.settings), config_for(run, spec)
    inputs = cache.manifest.inputs
    others = [role for role, key in (("teacher", teacher.key), ("data", dataset.key)) if inputs[role].key != key]
    others += [
        f"{name} ({getattr(config, name)}, not {getattr(wanted, name)})"
        for name in ("views", "view_seed", "input", "grid", "augment", "mixup", "cutmix")
        if getattr(config, name) != getattr(wanted, name)
    ]
    here, there = wanted.versions, config.versions
    others += [f"{name} ({there.get(name)}, not {here[name]})" for name in here if here[name] != there.get(name)]
    stored = image_numbers(cache)
    if cache.facts.classes != len(dataset.classes):
        others.append(f"number of classes ({cache.facts.classes}, not {len(dataset.classes)})")
    if np.setdiff1d(images, stored).size:
        others.append("share of the images")
    elif (config.mixup or config.cutmix) and not np.array_equal(images, stored):
        others.append("choice of images, from which mixed views take their partners")
    if others:
        raise UserError(
            f"the cache {cache.path} was made for another {'; another '.join(others)}: build one for this run"
        )


@dataclass(frozen=True)
class Forecast:
    """What building a cache would take on this machine."""

    images: int
    views: int
    bytes: int
    free_bytes: int
    view_seconds: float  # to make a view
    teacher_seconds: float  # to ask the teacher about it
    build_seconds: float
    break_even_epochs: float  # of all students together

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dict(vars(self))


def build(order: Order[CacheConfig], dataset: Dataset, teacher: Checkpoint, out: Path) -> Cache:
    """Ask the teacher about every view and seal its outputs. Killed, it goes on with the view it was at.

    Under torchrun every process calls this and asks about views of its own; the folder must be shared.

    Raises:
        UserError: no room on the disk, a teacher of other classes, a builder that is at it already.
    """
    config, ranks = order.config, join()
    job = _Job(config, dataset, teacher, ranks)
    with contextlib.ExitStack() as stack:
        draft = None
        if ranks.leads:
            draft = stack.enter_context(drafting(Cache, order, out, resumable=True))
            _check_room(job, draft)
        job.write_shards(ranks.shared(draft.resume if draft else None))
        ranks.from_leader(None)  # all of them are written
        if draft is not None:
            assert draft.resume is not None
            for shard in job.shards(draft.resume):
                shard.rename(draft.path / shard.name)
            np.save(draft.path / Cache.IMAGES, job.images)
            draft.facts = CacheFacts(
                views=config.views, images=len(job.images), classes=job.classes, top=job.top, bytes=job.bytes,
                record_bytes=job.record_bytes, grid=job.grid or None,
            )  # fmt: skip
    ranks.from_leader(None)  # and sealed
    return draft.artifact if draft else Cache.open(out)


def forecast(config: CacheConfig, dataset: Dataset, teacher: Checkpoint, out: Path) -> Forecast:
    """Time a few batches and reckon what ``build`` would take; writes nothing."""
    job = _Job(config, dataset, teacher, join())
    view_seconds, teacher_seconds = job.timed()
    count = len(job.images)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    build_seconds = config.views * count * (view_seconds + teacher_seconds)
    return Forecast(
        count, config.views, job.bytes, shutil.disk_usage(existing).free, view_seconds, teacher_seconds, build_seconds,
        build_seconds / (count * teacher_seconds),
    )  # fmt: skip


def verify(cache: Cache, dataset: Dataset, teacher: Checkpoint, share: float, seed: int = 0) -> dict[str, Any]:
    """Ask the teacher again about a random ``share`` of the records.

    Raises:
        GateFailed: an output that is not the stored one, beyond rounding.
    """
    config = CacheConfig.model_validate(cache.settings)
    job = _Job(config, dataset, teacher, Ranks())
    total = config.views * len(job.images)
    count = max(1, round(share * total))
    chosen = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
    addresses = [(int(at) // len(job.images), int(job.images[at % len(job.images)])) for at in chosen]
    cached = CachedTeacher(cache)
    task, worst, agree = TASKS[teacher.facts.task], 0.0, 0.0
    for address, output in job.outputs(addresses, "asking again"):
        stored = cached(output.logits, address).logits
        places = encode(by_place(output.logits), job.kind)
        again = in_places(decode(places, job.classes), (len(stored), *job.grid))
        worst = max(worst, float(((stored - again).abs() / again.abs().clamp(min=1)).max()))
        agree += task.agreement(stored.numpy(), again.numpy()) * len(again)
    found = {"checked": count, "of": total, "largest_relative_difference": worst, "agreement": agree / count}
    if worst > AGREES:
        raise GateFailed(
            f"{cache.path} is not what its teacher says: of {count} records one differs by {worst:.2g} of its logit "
            f"(allowed {AGREES}): build it again"
        )
    return found


class _Job:
    """The views to be asked about, and the teacher that is asked."""

    def __init__(self, config: CacheConfig, dataset: Dataset, teacher: Checkpoint, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.classes = len(dataset.classes)
        source = training_images(dataset, config.label_fraction, config.seed, with_unlabeled=True)
        self.images = source.numbers
        spec = config.input
        self.views = TrainingViews(source, config.view_settings(), spec, self.classes, config.view_seed)
        self.teacher: Teacher = open_teacher(teacher, dataset, spec).to(ranks.device)
        self.precision = Precision(config.precision)
        given = tuple(self.teacher(torch.zeros(1, *spec.shape, device=ranks.device)).logits.shape[2:])
        self.grid: tuple[int, ...] = (config.grid or given) if given else ()
        self.top = top_count(config, self.classes, dense=bool(given))
        self.kind = record_type(self.classes, self.top, dense=bool(given))
        self.batch = PLACES_BATCH if given else BATCH

    @property
    def record_bytes(self) -> int:
        return int(self.kind.itemsize) * math.prod(self.grid)

    @property
    def bytes(self) -> int:
        return self.config.views * len(self.images) * self.record_bytes

    def shards(self, folder: Path) -> list[Path]:
        """The files of all views in ``folder``."""
        return [folder / Cache.shard_name(view) for view in range(self.config.views)]

    def write_shards(self, folder: Path) -> None:
        """Write this process's share of the views' files into ``folder``; those that are there are whole."""
        mine = range(self.ranks.rank, self.config.views, self.ranks.count)
        missing = [view for view in mine if not (folder / Cache.shard_name(view)).is_file()]
        for done, view in enumerate(missing):
            addresses = [(view, int(image)) for image in self.images]
            draft = folder / f"{Cache.shard_name(view)}.new"
            with draft.open("wb") as stream:
                for _, output in self.outputs(addresses, f"asking the teacher, view {done + 1} of {len(missing)}"):
                    stream.write(encode(by_place(output.logits), self.kind).tobytes())
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(folder / Cache.shard_name(view))

    def outputs(self, addresses: Sequence[tuple[int, int]], what: str) -> Iterator[tuple[Address, TeacherOutput]]:
        """The teacher's outputs for these views, batch by batch, with their numbers."""
        batches = [list(addresses[at : at + self.batch]) for at in range(0, len(addresses), self.batch)]
        loader = DataLoader(self.views, batch_sampler=batches, num_workers=self.config.workers)
        with children_signal_kept(), progress(what, len(addresses)) as advance:
            for image, _, _, (views, images) in loader:
                yield (views, images), self.ask(image)
                advance(len(images), "")

    def ask(self, image: Tensor) -> TeacherOutput:
        """The teacher's float32 logits [B, K, ...] for views [B, 3, H, W], at the grid and on the CPU."""
        with self.precision.context(self.ranks.device_kind):
            output = self.teacher(image.to(self.ranks.device))
        return TeacherOutput(resized(output.logits.float(), self.grid).cpu())

    def timed(self) -> tuple[float, float]:
        """Seconds to make a view, and to ask about it."""
        making, asking = [], []
        for at in range(TIMED_BATCHES + 1):
            begun = time.perf_counter()
            images = self.images[(at * self.batch + np.arange(self.batch)) % len(self.images)]
            batch = torch.stack([self.views[(0, int(image))].image for image in images])
            made = time.perf_counter()
            self.ask(batch)
            making.append((made - begun) / len(images))
            asking.append((time.perf_counter() - made) / len(images))
        return float(np.median(making[1:])), float(np.median(asking[1:]))  # the first warms up


def _check_room(job: _Job, draft: Draft[Cache]) -> None:
    assert draft.resume is not None
    written = sum(path.stat().st_size for path in job.shards(draft.resume) if path.is_file())
    free = shutil.disk_usage(draft.path).free
    if job.bytes - written > free:
        raise UserError(
            f"the cache needs {job.bytes / 2**20:.0f} MiB and {draft.path} has {free / 2**20:.0f} MiB left: lower "
            "cache_views, take fewer images, or another disk"
        )
    note(f"the cache of {job.config.views} views of {len(job.images)} images takes {job.bytes / 2**20:.1f} MiB")
