"""What a study means: which runs, at which cost, in which order; several processes and machines may share its folder.

A part of a study is all runs of one share, seed and teacher: they see the same views and are trained side by side.
Whoever comes takes the next part that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .chain import CELL, PRECISIONS, TRAIN_NEEDS, Chain, tolerated, train_order
from .core.artifact import Order, Record, canonical, drafting, write_json
from .core.claims import METHOD, Claim, detectable_deviations, parse_claim
from .core.config import (
    DataPlan,
    ExportConfig,
    Method,
    ModelSettings,
    QuantizeConfig,
    StudentSettings,
    StudyConfig,
    StudyPlan,
    TrainConfig,
    changed_student,
    control_of,
    in_epochs,
)
from .core.errors import KdpipeError, UserError, choice
from .core.kinds import Checkpoint, ClaimFacts, Model, Study, StudyFacts
from .core.proc import require
from .core.progress import note, progress
from .core.sealed import printable
from .data.dataset import Dataset
from .devices import find_device
from .forecast import duration
from .networks.names import check_network
from .runtime.task import TASKS

STUDIES = ".studies"  # what a study decided, and the locks of its parts
LOOK_SECONDS = 1.0  # between two looks whether another process has made its part
LABELS, OWN_SIZE = "labels", "own-size"
TEACHES_NOTHING = "method masked teaches no answers: name the checkpoint that it made with --starts"
ALIASES = {"deep": "deep_supervision"}
SMOOTHED = {"smoothing": {"method": "labels", "train": {"label_smoothing": 0.1}}}
# Of the teacher's answer, what is left in each.
OF_TEACHER: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffled_teacher": True},
    "flattened": {"teacher_control": "flattened"},
    "smoothing-teacher": {"teacher_control": "smoothing"},
}
LARGEST_DECISION_BYTES = 2**20
TESTED_IMAGES = 16  # of which all outputs are in memory together


@dataclass(frozen=True)
class Arm:
    """What is compared: a method, perhaps for more views, by another teacher or from other weights."""

    name: str
    kind: str  # method, control, longer, teacher or start
    method: str
    times: int = 1  # the views
    guide: str = ""
    start: str = ""
    control: str = LABELS  # the labels alone that it is compared with: for as many views, from the same weights


@dataclass(frozen=True)
class Cell:
    """A run of a study: a method on a share of the images with a seed, by a teacher."""

    method: str
    kind: str  # as of its arm
    control: str  # as of its arm
    fraction: float
    seed: int
    guide: str  # name of the teacher; nothing for the study's own
    images: int  # that it learns from
    planned_views: int  # by the plan's cost, before they are made whole epochs
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its folder, before the key."""
        return f"{CELL}{self.method}-{self.fraction:g}-seed{self.seed}"

    @property
    def part(self) -> tuple[float, int, str]:
        """What it shares with the runs that see the same views."""
        return self.fraction, self.seed, self.guide

    @property
    def views(self) -> int:
        """That it sees in all."""
        return self.config.train.epochs * self.images


class Decision(Record):
    """What was decided once for all that take part in a study: views a run, and the pace that says so."""

    views: int
    # By method, and by the arms of other teachers, as measured; empty where nobody asked.
    view_seconds: dict[str, float]
    test_seconds: float | None = None


class Design:
    """A study before it runs: every name checked, every run known."""

    def __init__(self, plan: StudyPlan, dataset: Dataset, teacher: Checkpoint, chain: Chain) -> None:
        """Raises UserError: an unknown method, claim or teacher, or images that not all methods can learn from."""
        if len(dataset.samples("unlabeled")):
            raise UserError(
                f"{dataset.path} has images without labels, which not all methods can learn from: a study compares on "
                "the same ones, make the data without data.unlabeled"
            )
        if plan.distill.label_fraction != 1:
            raise UserError("distill.label_fraction: a study has --fractions in its place")
        check_network(plan.student)
        self.budget_seconds = None if plan.budget is None else read_seconds(plan.budget)
        self.plan, self.dataset, self.teacher, self.chain = plan, dataset, teacher, chain
        self.base = TrainConfig.of(plan.student, plan.distill)
        self.changes, self.kinds = self._methods()
        self.configs = {
            name: changed_student(self.base, change, f"method '{name}'") for name, change in self.changes.items()
        }
        self.configs = {LABELS: control_of(self.base), **self.configs}
        if any(each.method == "stagewise" and each.stagewise.epochs is not None for each in self.configs.values()):
            raise UserError(
                "distill.stagewise.epochs is of each stage, and a study gives every run the same cost: leave it out, "
                "so that the stages share a run's epochs"
            )
        self.claims = self._claims()
        for name in [*plan.teachers, *plan.starts]:
            if not re.fullmatch(METHOD, name) or name == OWN_SIZE:
                raise UserError(f"'{printable(name)}' can be no name here: wanted letters, digits and . _ -")
        self.guides = {name: Checkpoint.open(path) for name, path in plan.teachers.items()}
        for guide in (teacher, *self.guides.values()):
            dataset.check_classes_of(guide, f"the teacher {guide.path.name}")
        self.images = {share: self._images(share) for share in sorted(plan.fractions)}
        for before, share in itertools.pairwise(self.images):
            if self.images[before] == self.images[share]:
                raise UserError(
                    f"fractions: {before:g} and {share:g} are the same {self.images[share]} images, since each class "
                    "has one at least: name one of them"
                )

    @cached_property
    def middle(self) -> float:
        """The temperature of the controls."""
        return sorted(self.plan.temperatures)[len(self.plan.temperatures) // 2]

    def _methods(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What differs, and the kind, of every method by name."""
        found: dict[str, dict[str, Any]] = {}
        for name in self.plan.methods:
            method = ALIASES.get(name, name)
            if method == LABELS:
                continue  # is in every study
            if method == "masked":
                raise UserError(TEACHES_NOTHING)
            if method not in get_args(Method):
                raise choice("method", name, [*get_args(Method), *ALIASES])
            if method == "kd":
                for at in self.plan.temperatures:
                    if f"kd-T{at:g}" in found:
                        raise UserError(f"temperatures: two of them are called {at:g}: name one of them")
                    found[f"kd-T{at:g}"] = {"method": "kd", "temperature": at}
            else:
                found[name] = {"method": method}
        for name, change in self.plan.further.items():
            if not re.fullmatch(METHOD, name) or name in {*found, LABELS, *SMOOTHED, *OF_TEACHER}:
                raise UserError(f"further: the name '{name}' is taken, or has other letters than a-z, 0-9 and . _ -")
            if others := sorted(change.keys() & {*StudentSettings.model_fields, "label_fraction", "seed"}):
                raise UserError(
                    f"further: '{name}' changes {', '.join(others)}, but a study compares methods on one network, on "
                    "its own shares and seeds (--student, --fractions, --seeds; --starts for other weights)"
                )
            if change.get("method") == "masked":
                raise UserError(TEACHES_NOTHING)
            found[name] = change
        kinds = dict.fromkeys(found, "method")
        for name in self.plan.controls:
            if name in SMOOTHED:
                found[name] = dict(SMOOTHED[name])
            elif name in OF_TEACHER:
                found[name] = {"method": "kd", "temperature": self.middle, **OF_TEACHER[name]}
            else:
                raise choice("control", name, [*SMOOTHED, *OF_TEACHER])
            kinds[name] = "control"
        return found, {LABELS: "control", **kinds}

    def _claims(self) -> tuple[Claim, ...]:
        """Those that were named; else that methods beat labels where there are fewest images, and why kd does."""
        least = min(self.plan.fractions)
        if not self.plan.claims:
            # Of one method at several temperatures one: a claim for each would cost the others their power.
            hot = [name for name, config in self.configs.items() if config.method == "kd" and name.startswith("kd-T")]
            left_out = {name for name in hot if name != f"kd-T{self.middle:g}"}
            taken = [name for name, kind in self.kinds.items() if kind == "method" and name not in left_out]
            claims = [Claim(name, LABELS, least) for name in taken[:4]]
            if "shuffled" in self.kinds and f"kd-T{self.middle:g}" in self.configs:
                claims.append(Claim(f"kd-T{self.middle:g}", "shuffled", least))
            return tuple(claims)
        claims = [parse_claim(text) for text in self.plan.claims]
        shares = self.plan.fractions
        for at, claim in enumerate(claims):
            for name in claim[:2]:
                if name not in self.names:
                    raise choice(f"claim '{claim}': method", name, self.names)
            near = [share for share in shares if math.isclose(share, claim.fraction, rel_tol=1e-6)]
            if not near:
                told = ", ".join(f"{share:g}" for share in shares)
                raise UserError(f"claim '{claim}': the study has no share {claim.fraction:g}: wanted one of {told}")
            claims[at] = claim._replace(fraction=near[0])
        if len({claim[:3] for claim in claims}) < len(claims):
            raise UserError("claims: the same is claimed twice: a study corrects for each that is named")
        return tuple(claims)

    @cached_property
    def names(self) -> list[str]:
        """Of everything that is compared, by which a claim may call it."""
        return [arm.name for arm in self.arms]

    @cached_property
    def arms(self) -> list[Arm]:
        """What has a run on every share with every seed."""
        found = [Arm(name, self.kinds[name], name) for name in self.configs]
        main = [name for name in self.configs if name == LABELS or self.kinds[name] == "method"]
        if self.plan.longer:
            found += [self._varied(name, f"x{self.plan.longer}", "longer", times=self.plan.longer) for name in main]
        for guide in [*self.plan.teachers, *([OWN_SIZE] if self.plan.own_size else [])]:
            taught = [name for name in main if self.configs[name].needs_teacher]
            found += [Arm(f"{name}-by-{guide}", "teacher", name, guide=guide) for name in taught]
        for start in self.plan.starts:
            found += [self._varied(name, f"from-{start}", "start", start=start) for name in main]
        names = [arm.name for arm in found]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two methods would be called '{twice}': choose other names")
        return found

    @staticmethod
    def _varied(name: str, how: str, kind: str, **what: Any) -> Arm:
        """A method in another way, compared with the labels in that way; those themselves with the plain ones."""
        return Arm(f"{name}-{how}", kind, name, control=LABELS if name == LABELS else f"{LABELS}-{how}", **what)

    def _images(self, share: float) -> int:
        """How many a student learns from on that share."""
        from .data.views import training_images

        return training_images(self.dataset, share, 0, with_unlabeled=False).labeled

    def wants_int8(self, cell: Cell) -> bool:
        """Whether the plan wants INT8 of that run."""
        if self.plan.int8 == "claims":
            return any(claim.fraction == cell.fraction and cell.method in claim[:2] for claim in self.claims)
        return self.plan.int8 == "all"

    def path(self, cell: Cell, guides: Mapping[str, Checkpoint] | None = None) -> Path | None:
        """Where the run lies once it is made; None where its teacher is not known before it is trained."""
        guide = {"": self.teacher, **self.guides, **(guides or {})}.get(cell.guide)
        if guide is None:
            if not self.own_size_path.exists():
                return None
            guide = Checkpoint.open(self.own_size_path)
        return self.chain.path(cell.name, train_order(cell.config, self.dataset, guide))

    @cached_property
    def own_size_path(self) -> Path:
        """Where the teacher of the student's own size lies once it is trained."""
        own = train_order(control_of(self.base), self.dataset, None)
        return self.chain.path(f"teacher-{OWN_SIZE}", own)

    # ---- cost --------------------------------------------------------------------------------------------

    @property
    def memory(self) -> Path:
        """Where it is written what was decided."""
        guides = {name: guide.key for name, guide in self.guides.items()}
        starts = {name: str(path.absolute()) for name, path in self.plan.starts.items()}
        known = [self.dataset.key, self.teacher.key, guides, starts]
        identity = canonical([self.plan.model_dump(mode="json"), self.plan.budget, known])
        return self.chain.folder / STUDIES / f"{hashlib.sha256(identity).hexdigest()[:12]}.json"

    def decided(self, *, keep: bool) -> Decision:
        """Views a run: as asked, as a budget has room for, or as many as ``train.epochs`` passes over all images.

        What rests on the pace of a machine is decided once: by who comes first, if it is to be kept.

        Raises:
            UserError: too few for a pass over the largest share.
        """
        if self.memory.is_file():
            found = _read(self.memory)
            if keep or found.view_seconds:
                return found
            return self.measured().model_copy(update={"views": found.views})
        largest = max(self.images.values())
        needs_pace = self.plan.cost == "seconds" or (self.budget_seconds is not None and self.plan.views is None)
        found = self.measured() if needs_pace or not keep else Decision(views=0, view_seconds={})
        # In equal seconds labels alone see more of them before the slowest method has seen all once.
        least = max(math.ceil(largest * self._slowness(arm, found) / arm.times) for arm in self.arms)
        views = self.plan.views or self.plan.distill.train.epochs * len(self.dataset.samples("train"))
        if self.budget_seconds is not None and self.plan.views is None:
            seconds, fixed = self.budget_seconds, self._seconds(0, found)
            a_view = self._seconds(1, found) - fixed
            views = int((seconds - fixed) / a_view) // largest * largest
            if views < least:
                wanted = duration(fixed + a_view * math.ceil(least / largest) * largest)
                raise UserError(
                    f"budget {self.plan.budget} is too short for a pass over the largest share in each of "
                    f"{self.count} runs: that takes about {wanted}; take fewer methods, seeds or a smaller share"
                )
        if views < least:
            whose = "" if least == largest else f" by the slowest method: in equal seconds it takes {least:,}"
            raise UserError(
                f"{views:,} views are less than a pass over the {largest:,} images of the largest share{whose}"
            )
        found = found.model_copy(update={"views": views})
        return found if not keep else _written(self.memory, found)

    @cached_property
    def count(self) -> int:
        """Of all runs."""
        return len(self.arms) * len(self.plan.fractions) * self.plan.seeds

    def measured(self) -> Decision:
        """The pace of every method here. Raises UserError as training does."""
        require("training", TRAIN_NEEDS, "train")
        from .core import code
        from .distill.pace import test_seconds, view_seconds

        choices, paces = self.chain.folder / PRECISIONS, dict[str, float]()
        # Another teacher has a pace of its own; that of the student's own size is not trained yet.
        others = [arm for arm in self.arms if arm.guide in self.guides]
        with (
            progress("measuring the pace", len(self.configs) + len(others)) as advance,
            code.allowing(self.chain.allow_code),
        ):
            for name, config in self.configs.items():
                paces[name] = view_seconds(config, self.dataset, self.teacher, choices)
                advance(1, name)
            for arm in others:
                paces[arm.name] = view_seconds(self.configs[arm.method], self.dataset, self.guides[arm.guide], choices)
                advance(1, arm.name)
            return Decision(views=0, view_seconds=paces, test_seconds=test_seconds(self.base, self.dataset))

    @staticmethod
    def _pace(arm: Arm, found: Decision) -> float:
        """Seconds a view."""
        return found.view_seconds.get(arm.name, found.view_seconds[arm.method])

    def _slowness(self, arm: Arm, found: Decision) -> float:
        """How many views labels alone see while this one sees one, in a study of equal seconds."""
        return self._pace(arm, found) / found.view_seconds[LABELS] if self.plan.cost == "seconds" else 1.0

    def _seconds(self, views: int, found: Decision) -> float:
        """All runs at so many views, one after the other, and the teacher that is trained for them."""
        total = 0.0
        for arm in self.arms:
            pace = self._pace(arm, found) / self._slowness(arm, found)
            total += arm.times * views * pace + (found.test_seconds or 0.0) * self._looks(self.configs[arm.method])
        total *= len(self.plan.fractions) * self.plan.seeds
        if self.plan.own_size and not self.own_size_path.exists():
            total += self.base.train.epochs * len(self.dataset.samples("train")) * found.view_seconds[LABELS]
        return total

    def _looks(self, config: TrainConfig) -> float:
        """How often a run looks at held-out images, in passes over the test part."""
        validated, tested = (len(self.dataset.samples(part)) for part in ("val", "test"))
        times = 1 if config.train.select == "last" else config.train.epochs // config.train.validate_every
        return 1 + times * validated / max(1, tested)

    def seconds(self, found: Decision) -> float | None:
        """What all runs take here, one after the other; None where the pace is not known."""
        return self._seconds(found.views, found) if found.view_seconds else None

    def cells(self, found: Decision) -> list[Cell]:
        """Every run, those first that tell most: seed by seed, from the smallest share on."""
        cells = []
        for seed in range(self.plan.seeds):
            for share in sorted(self.plan.fractions):
                for arm in self.arms:
                    views = int(found.views * arm.times / self._slowness(arm, found))
                    config = in_epochs(self.configs[arm.method], max(1, round(views / self.images[share])))
                    differs: dict[str, Any] = {"label_fraction": share, "seed": seed}
                    if arm.start:
                        differs["start"] = self.plan.starts[arm.start]
                    config = config.model_copy(update=differs)
                    images = self.images[share]
                    cells.append(Cell(arm.name, arm.kind, arm.control, share, seed, arm.guide, images, views, config))
        return cells


def read_seconds(text: str) -> float:
    """A time such as 2h, 90m or 45s. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?(h|m|min|s)", text.strip())
    if found is None or not float(found[1]):
        raise UserError(f"budget: wanted a time such as 2h, 90m or 45s, found '{text}'")
    return float(found[1]) * {"h": 3600, "m": 60, "min": 60, "s": 1}[found[2]]


def _read(path: Path) -> Decision:
    try:
        with path.open("rb") as stream:
            return Decision.model_validate_json(stream.read(LARGEST_DECISION_BYTES))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read what the study decided ({error.__class__.__name__}): remove {path}") from None


def _written(path: Path, found: Decision) -> Decision:
    """What lies at ``path`` in the end: ``found``, or what another process wrote before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        write_json(draft, found.model_dump(mode="json"))
        with contextlib.suppress(FileExistsError):
            path.hardlink_to(draft)
    finally:
        draft.unlink(missing_ok=True)
    return _read(path)


# ---- the plan --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a study would do: its runs, what they take, what is sealed, what it can tell."""

    design: Design
    decision: Decision
    cells: list[Cell]
    sealed: list[bool]

    @cached_property
    def seconds_left(self) -> float | None:
        """What the runs that are lacking take here, one after the other."""
        whole = self.design.seconds(self.decision)
        return None if whole is None else whole * (1 - sum(self.sealed) / max(1, len(self.sealed)))

    @cached_property
    def bytes_left(self) -> int:
        """Disk that the runs that are lacking take, by the teacher's own files where nothing is sealed: about."""
        sizes = [
            sum(file.size_bytes for file in Checkpoint.open(path).manifest.files.values())
            for cell, is_sealed in zip(self.cells, self.sealed, strict=True)
            if is_sealed and (path := self.design.path(cell)) is not None
        ][:1]
        own = sizes[0] if sizes else sum(file.size_bytes for file in self.design.teacher.manifest.files.values())
        return own * self.sealed.count(False)

    @property
    def detectable(self) -> float | None:
        """The difference that it would tell, in standard deviations of a run over seeds."""
        plan = self.design.plan
        return detectable_deviations(plan.seeds, len(self.design.claims), len(self.design.names))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "runs": [
                {
                    "name": cell.name, "method": cell.method, "kind": cell.kind, "fraction": cell.fraction,
                    "seed": cell.seed, "images": cell.images, "epochs": cell.config.train.epochs,
                    "views": cell.views, "sealed": is_sealed,
                }
                for cell, is_sealed in zip(self.cells, self.sealed, strict=True)
            ],
            "views": self.decision.views,
            "cost": self.design.plan.cost,
            "view_seconds": self.decision.view_seconds,
            "seconds_left": self.seconds_left,
            "bytes_left": self.bytes_left,
            "claims": list(map(str, self.design.claims)),
            "detectable_deviations": self.detectable,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For a person."""
        plan, views = self.design.plan, self.decision.views
        equal = "views" if plan.cost == "views" else "seconds"
        found = [
            f"{len(self.cells)} runs, {sum(self.sealed)} sealed: {len(self.design.names)} methods and controls x "
            f"{len(plan.fractions)} shares x {plan.seeds} seed{'s' * (plan.seeds > 1)}, equal {equal} a run: "
            f"{views:,} views{' of labels alone' * (plan.cost == 'seconds')}"
        ]
        for share in sorted(plan.fractions):
            its = [cell for cell in self.cells if cell.fraction == share and cell.seed == 0]
            epochs = sorted({cell.config.train.epochs for cell in its})
            seen = sorted({cell.views for cell in its})
            found.append(
                f"  {100 * share:g} % of the images: {its[0].images:,}, {_range(epochs)} epochs, {_range(seen)} views"
            )
        found.append("  methods: " + ", ".join(self.design.names))
        if (seconds := self.seconds_left) is not None:
            slowest = max(self.decision.view_seconds.items(), key=lambda each: each[1])
            found.append(
                f"  about {duration(seconds)} of this machine one after the other, less side by side; the slowest "
                f"is {slowest[0]} with {1 / slowest[1]:,.0f} views a second"
            )
        else:
            found.append("  time: nobody measured it (--dry-run does)")
        if small := sum(
            not done and self.design.wants_int8(cell) for cell, done in zip(self.cells, self.sealed, strict=True)
        ):
            found.append(f"  INT8 of {small} runs comes on top (--int8 none leaves it out)")
        here = self.design.chain.folder.absolute()
        free = shutil.disk_usage(next(each for each in (here, *here.parents) if each.is_dir())).free
        found.append(f"  about {self.bytes_left / 2**20:.0f} MiB of {free / 2**30:.1f} GiB free")
        found += [f"claim {at}: {claim}" for at, claim in enumerate(self.design.claims, 1)]
        if self.detectable is None:
            found.append("one seed is one draw: no claim can hold; take --seeds 3 or more")
        else:
            found.append(
                f"{plan.seeds} seeds tell a difference of about {self.detectable:.1f} standard deviations of a run, "
                "where the test images are many"
            )
        return found


def _range(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def plan(settings: StudyPlan, dataset: Dataset, teacher: Checkpoint, chain: Chain) -> Plan:
    """What a study would do; nothing is made, the pace is measured. Raises UserError."""
    return _plan(Design(settings, dataset, teacher, chain), keep=False)


def _plan(design: Design, *, keep: bool) -> Plan:
    decision = design.decided(keep=keep)
    cells = design.cells(decision)
    paths = [design.path(cell) for cell in cells]
    return Plan(design, decision, cells, [path is not None and path.exists() for path in paths])


# ---- the runs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether this process has the lock for the block; the kernel releases it however the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(
    settings: StudyPlan,
    dataset: Dataset,
    teacher: Checkpoint,
    chain: Chain,
    failed: dict[str, KdpipeError] | None = None,
) -> Study:
    """Make what is lacking of a study, share by share and seed by seed, and its page.

    Several processes that share the folder each take a part that nobody holds; the page is made by one of them.

    Args:
        failed: takes why a run failed, which the others go on without; None: the first failure is raised.

    Raises:
        UserError: what the plan refuses, or nothing is left to compare.
    """
    design = Design(settings, dataset, teacher, chain)
    planned = _plan(design, keep=True)
    for line in planned.lines():
        note(line)
    failures: dict[str, KdpipeError] = {}
    guides = _guides(design)
    _take_parts(design, planned.cells, guides, failures)
    if failures and failed is None:
        raise next(iter(failures.values()))
    (failed if failed is not None else {}).update(failures)
    return _sealed(design, planned, guides, failures)


def _guides(design: Design) -> dict[str, Checkpoint]:
    """The teachers by name; that of the student's own size is trained, unless it is there."""
    guides = {"": design.teacher, **design.guides}
    if design.plan.own_size:
        config = control_of(design.base)
        guides[OWN_SIZE] = design.chain.train(f"teacher-{OWN_SIZE}", config, design.dataset, None)
    return guides


def _take_parts(
    design: Design, cells: Sequence[Cell], guides: Mapping[str, Checkpoint], failed: dict[str, KdpipeError]
) -> None:
    parts: dict[tuple[float, int, str], list[Cell]] = {}
    for cell in cells:
        parts.setdefault(cell.part, []).append(cell)
    left, told = list(parts), False
    with progress("study", len(parts)) as advance:
        while left:
            before = len(left)
            for part in list(left):
                name = canonical([design.memory.stem, *part])
                lock = design.memory.parent / f"{hashlib.sha256(name).hexdigest()[:12]}.lock"
                with _held(lock) as mine:
                    if not mine:
                        continue
                    _make(design, parts[part], guides[part[2]], failed)
                    left.remove(part)
                    advance(1, f"{100 * part[0]:g} % of the images, seed {part[1]}")
            if len(left) == before:
                if not told:
                    note("other processes make what is left: waiting")
                    told = True
                time.sleep(LOOK_SECONDS)


def _make(design: Design, cells: Sequence[Cell], guide: Checkpoint, failed: dict[str, KdpipeError]) -> None:
    """The runs of one part, and INT8 of those of which it is wanted."""
    chain, failures = design.chain, dict[str, KdpipeError]()
    configs = {cell.name: cell.config for cell in cells}
    made = chain.train_all(configs, design.dataset, guide, together=True, failed=failures)
    for cell in cells:
        if cell.name in made and design.wants_int8(cell):
            with tolerated(f"{cell.name}-int8", failures):
                _int8(design, made[cell.name])
    failed.update(failures)


def _int8(design: Design, student: Checkpoint) -> Model:
    """For ONNX Runtime, calibrated as a recipe is; sealed also where it damages: that is what is asked."""
    chain = design.chain
    whole = chain.export(ExportConfig(), student, design.dataset)
    return chain.quantize(QuantizeConfig(allow_damage=True), whole, design.dataset, find_device("local").probe())


# ---- what came out ---------------------------------------------------------------------------------------


def _sealed(
    design: Design, planned: Plan, guides: Mapping[str, Checkpoint], failed: Mapping[str, KdpipeError]
) -> Study:
    from .report.study import Ran

    runs: list[tuple[Cell, Checkpoint]] = []
    for cell in planned.cells:
        path = design.path(cell, guides)
        if path is not None and path.exists():
            runs.append((cell, Checkpoint.open(path)))
    if not runs:
        raise UserError(
            "no run of the study could be made: " + next(iter(map(str, failed.values())), "nothing is there")
        )
    config = StudyConfig(
        plan=design.plan,
        views=planned.decision.views,
        claims=tuple(map(str, design.claims)),
        cells={cell.name: checkpoint.key for cell, checkpoint in runs},
        failed={name: str(error) for name, error in failed.items()},
    )
    order = Order("study", config, {"data": design.dataset, "teacher": design.teacher})

    def make(path: Path) -> Study:
        require("the page of a study", ("matplotlib", "jinja2"), "report")
        from .report import study as page

        def nothing() -> None:
            return None

        with drafting(Study, order, path) as draft:
            rows = []
            for cell, checkpoint in runs:
                small = partial(_int8_outputs, design, checkpoint) if design.wants_int8(cell) else nothing
                rows.append(
                    Ran(
                        cell.method,
                        cell.kind,
                        cell.control,
                        cell.fraction,
                        cell.seed,
                        cell.images,
                        cell.views,
                        cell.planned_views,
                        checkpoint,
                        guides[cell.guide],
                        small,
                    )
                )
            asked = page.Asked(design.dataset, design.teacher, design.claims, design.middle, planned.detectable)
            numbers = page.collect(config, rows, asked)
            write_json(draft.path / Study.NUMBERS, numbers)
            advised = numbers["advice"]["method"]
            (draft.path / Study.RECIPE).write_text(
                _recipe(design, planned.cells, advised, numbers["advice"]["sentence"], path.parent), encoding="utf-8"
            )
            (draft.path / Study.PAGE).write_text(page.render(numbers), encoding="utf-8")
            draft.facts = StudyFacts(
                student=runs[0][1].facts.model,
                teacher=design.teacher.facts.model,
                runs=len(runs),
                views=planned.decision.views,
                claims=[ClaimFacts(claim=each["claim"], answer=each["answer"]) for each in numbers["claims"]],
                advice=advised,
            )
        return draft.artifact

    return design.chain.step("study", Study, order, make)


def _int8_outputs(design: Design, student: Checkpoint) -> Any:
    """What its INT8 says of the test images [N, ...], as the task keeps it; None where there is none."""
    from .data.dataset import predict_samples
    from .runtime import open_session

    try:
        model = _int8(design, student)
        session = open_session(model.path, model.facts.for_runtime(), len(os.sched_getaffinity(0)))
    except KdpipeError:
        return None  # it was tried with its run, and told there
    task, spec = TASKS[model.facts.task], model.facts.input
    samples, step, found = design.dataset.samples("test"), TESTED_IMAGES, []
    for at in range(0, len(samples), step):
        outputs = predict_samples(session, samples[at : at + step], spec.model_dump())
        found.append(task.kept(outputs, spec.sides))
    return np.concatenate(found)


def _recipe(design: Design, cells: Sequence[Cell], method: str, sentence: str, folder: Path) -> str:
    """What ``kdpipe run`` trains as the study advises: on the largest share, with its epochs."""
    import yaml

    largest = max(design.plan.fractions)
    config = next(cell.config for cell in cells if cell.method == method and cell.fraction == largest)
    distill = {
        name: value
        for name, value in config.model_dump(mode="json", exclude_defaults=True).items()
        if name in type(design.plan.distill).model_fields and name != "label_fraction"
    }
    distill["method"] = config.method
    if largest < 1:
        distill["label_fraction"] = largest
    file = Checkpoint.ONNX if Checkpoint.ONNX in design.teacher.manifest.files else Checkpoint.WEIGHTS
    weights = os.path.relpath(design.teacher.path.absolute() / file, folder.absolute() / "study")
    data = {
        name: value
        for name, value in design.dataset.settings.items()
        if name in DataPlan.model_fields and value != DataPlan.model_fields[name].default
    }
    student = _network(config.model_dump(mode="json"))
    # What a key knows by its hash is no part of a dump.
    student |= {
        name: str(path.absolute())
        for name in ("start", "encoder_checkpoint")
        if (path := getattr(config, name)) is not None
    }
    if config.prune.keep is not None:
        student["prune"] = config.prune.model_dump(mode="json", exclude_defaults=True)
    teacher = _network(design.teacher.settings)
    values = {
        "name": "advised",
        "data": data,
        "teacher": {**teacher, "checkpoint": weights},
        "student": student,
        "distill": distill,
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return (
        f"# {printable(sentence, 1000)}\n# kdpipe run THIS, with what it is to run on under bench and export.\n{text}"
    )


def _network(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of a network, without what stands at its default or is worked out."""
    kept = {
        name: value
        for name, value in settings.items()
        if name in ModelSettings.model_fields and not name.endswith("_sha256") and name != "pretrained"
    }
    return ModelSettings.model_validate(kept).model_dump(mode="json", exclude_defaults=True)
