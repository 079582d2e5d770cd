"""Choose a student by what it takes on its device, before any is trained: few networks are measured, not all.

Networks of random weights are made, made small and measured as trained ones would be; of the others a regression on
their graphs tells what to expect. What is made lies in a folder below the artifacts, and the next pick on that device
begins with what was measured there.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from .chain import TRAIN_NEEDS, Chain, sealed, versions_of
from .core import choosing, code
from .core.artifact import Busy, Manifest, Order, Provenance, drafting, find_ancestors, part_of, write_json
from .core.choosing import ENOUGH, FIRST, SURE, Known
from .core.config import (
    BenchPlan,
    CalibrateSettings,
    DataPlan,
    DrawConfig,
    ExportConfig,
    InputSettings,
    ModelSettings,
    PackageConfig,
    PickConfig,
    PickPlan,
    QuantizeConfig,
    Recipe,
    SampleConfig,
    TrainConfig,
    in_epochs,
    validated,
)
from .core.errors import DeviceLost, KdpipeError, UserError, choice
from .core.inputs import Size, sides
from .core.kinds import (
    Bundle,
    Checkpoint,
    Measurement,
    Pick,
    Picked,
    PickFacts,
    Probe,
    Trust,
    as_name,
)
from .core.proc import require
from .core.progress import note, progress
from .core.sealed import canonical
from .core.stats import CONFIDENCE, Interval
from .data.dataset import Dataset
from .devices import find_device
from .devices.session import bench_config
from .export import TARGETS
from .networks import prior
from .networks.prior import Prior
from .quantize import VARIANTS
from .report.picks import latency_of

if TYPE_CHECKING:
    from .networks.cost import Cost

WORKSHOP = "picks"  # among the artifacts: what is made to be measured, and nothing else
COSTS, STATE, LOCK = ".costs.json", ".asked", ".lock"


CONFIRMED = 2  # sessions of the one that is chosen
MOST_CONFIRMATIONS = 6
MOST_TRIES = 2  # to make a network, where that ended the process
CALIBRATING, CHECKED = 32, 16
# How long one process of a session times, quick as it is: networks differ by more than that resolves.
SESSION: dict[str, Any] = {
    "effort": "quick", "seconds": 0.3, "max_seconds": 1.5, "warm_up_seconds": 0.3, "cold_starts": 0, "images": 8,
}  # fmt: skip
IMAGENET, RUNS = "imagenet", "runs"
SHORT_VIEWS = 8  # of each image that the teacher answers for all that are trained shortly
MOST_NAMES_BYTES = 2**20
SAVED_EVERY = 25  # graphs that are read


class Candidate(NamedTuple):
    """A network at one size, with what its graph tells."""

    name: str
    model: str
    size: Size
    points: float  # of the prior
    cost: Cost
    family: str


@dataclass(frozen=True)
class Pool:
    """Who can be chosen; and by name why others can't."""

    candidates: list[Candidate]
    left_out: dict[str, str]

    @cached_property
    def position(self) -> dict[str, int]:
        return {each.name: at for at, each in enumerate(self.candidates)}

    @cached_property
    def points(self) -> np.ndarray:
        return np.array([each.points for each in self.candidates])

    @cached_property
    def proxies(self) -> np.ndarray:
        """Multiply-accumulates and activations [N, 2]."""
        return np.array([(each.cost.macs, each.cost.activations) for each in self.candidates], np.float64)

    def best(self, known: Known | None, limit: float) -> str | None:
        """The best by the prior of those that are surely within the log ``limit``; of equal ones the faster."""
        return next(iter(self.within(known, limit)), None)

    def within(self, known: Known | None, limit: float) -> list[str]:
        """Those that are surely within it, the best first."""
        if known is None:
            return []
        sure = [name for name in known.levels if known.chance(name, limit) >= SURE]
        return sorted(sure, key=lambda name: (-self.points[self.position[name]], known.levels[name].value))

    def forecast(self, known: Known) -> choosing.Forecast:
        """Log latencies of all by those that were measured."""
        measured = {self.position[name]: level.value for name, level in known.levels.items()}
        families, models = [each.family for each in self.candidates], [each.model for each in self.candidates]
        return choosing.forecast(self.proxies, families, models, measured)

    def chances(self, known: Known, limit: float) -> np.ndarray:
        """That each is within the log ``limit`` in another session, as predicted, whatever was measured of it."""
        found = self.forecast(known)
        return choosing.chances(found.value, np.hypot(found.scale, known.again_sd), found.freedom, limit)

    def next(self, known: Known | None, limit: float, left: int, done: Collection[str]) -> list[str]:
        """Who is measured next: some that are spread over all, then the one that is worth most; nobody: it is done.

        Args:
            left: how many may still be measured.
            done: those that are not to be measured, again or at all.
        """
        measured = set() if known is None else set(known.levels)
        names = [each.name for each in self.candidates]
        fresh = [name for name in names if name not in measured and name not in done]
        lacking = min(FIRST, len(fresh) + len(measured)) - len(measured)
        if left <= 0 or not fresh:
            return []
        if known is None or lacking > 0:
            at = [self.position[name] for name in names if name in measured or name in fresh]
            spread = choosing.spread_out(self.proxies[at, 1], self.points[at], FIRST)
            first = [names[at[each]] for each in spread if names[at[each]] in fresh] or fresh
            return first[: min(left, lacking)]
        best = self.best(known, limit)
        quality = None if best is None else float(self.points[self.position[best]])
        gains = choosing.expected_gains(self.points, self.chances(known, limit), quality)
        name = max(fresh, key=lambda name: gains[self.position[name]])
        return [name] if gains[self.position[name]] >= ENOUGH else []


class State(BaseModel):
    """What a pick has done so far, so that it goes on after any end."""

    model_config = ConfigDict(extra="forbid")

    anchors: list[str] = []
    asked: list[str] = []  # networks that were measured for it
    pending: list[str] = []  # those of a session that was begun when there were so many
    sessions: int = 0
    confirmed: int = 0
    refused: dict[str, str] = {}
    tries: dict[str, int] = {}


# ---- who can be chosen ---------------------------------------------------------------------------------------


def prior_of(plan: PickPlan, chain: Chain, dataset: Dataset) -> tuple[Mapping[str, Prior], str]:
    """How good each may become, and the hash of that. Raises UserError."""
    if plan.prior == IMAGENET:
        found = prior.imagenet()
    elif plan.prior == RUNS:
        found = _of_runs(chain.folder, dataset)
        if not found:
            raise UserError(
                f"prior: nothing in {chain.folder} was trained on these images with a validation part: wanted --prior "
                f"{IMAGENET}, or a file"
            )
    else:
        found = prior.of_file(Path(plan.prior))
    told = {name: list(each) for name, each in sorted(found.items())}
    return found, hashlib.sha256(canonical(told)).hexdigest()


def _of_runs(folder: Path, dataset: Dataset) -> dict[str, Prior]:
    """The best validation accuracy of each network that was trained here on the same images."""
    found: dict[str, Prior] = {}
    for _, manifest in sealed(folder, skip=UserError):
        data = manifest.inputs.get("data")
        if manifest.kind != Checkpoint.kind or manifest.stage != "train" or data is None or data.key != dataset.key:
            continue
        facts = Checkpoint.facts_of(manifest)
        if facts.last_validation is None:
            continue
        points = 100 * facts.last_validation
        side = round(math.sqrt(math.prod(facts.input.sides)))
        if facts.model not in found or points > found[facts.model].points:
            found[facts.model] = Prior(points, side)
    return found


def names_of(plan: PickPlan, known: Mapping[str, Prior]) -> list[str]:
    """The names that the patterns find, of timm's and of the prior's. Raises UserError for one that finds none."""
    import timm

    patterns: list[str] = []
    for word in plan.candidates:
        path = Path(word)
        if not path.is_file():
            patterns.append(word)
            continue
        if path.stat().st_size > MOST_NAMES_BYTES:
            raise UserError(f"candidates: {path} is larger than {MOST_NAMES_BYTES} bytes: wanted a name a line")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"candidates: cannot read {path} ({type(error).__name__}): wanted a name a line") from None
        patterns += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not patterns:
        raise UserError(
            f"candidates: {', '.join(plan.candidates)} names no network: wanted patterns such as mobilenet*"
        )
    every = list(dict.fromkeys([*timm.list_models(), *known]))
    found: dict[str, None] = {}
    for pattern in patterns:
        # A pattern for all means all that anything is known of.
        among = list(known) if pattern == "*" else every
        matched = fnmatch.filter(among, pattern) or fnmatch.filter(among, prior.without_tag(pattern))
        if not matched:
            raise choice("candidate", pattern, every)
        found |= dict.fromkeys(matched)
    return list(found)


def pool_of(plan: PickPlan, known: Mapping[str, Prior], classes: int, memory: Path) -> Pool:
    """Every network that is asked for, at every size. Raises UserError where none is left.

    Args:
        memory: file of what graphs took before.
    """
    from .networks.cost import cost_of, family_of
    from .networks.models import input_spec

    names = names_of(plan, known)
    left_out = {name: f"the prior ({plan.prior}) says nothing of it" for name in names if name not in known}
    rated = [name for name in names if name in known]
    costs = _Costs(memory, classes)
    candidates: list[Candidate] = []
    with progress("reading graphs", len(rated) * max(1, len(plan.input.size))) as advance, costs.kept():
        for model in rated:
            for wanted in plan.input.size or (None,):
                config = ModelSettings(model=model, input=InputSettings(size=wanted))
                name = as_name(model if wanted is None else f"{model}-{_size_name(wanted)}")
                try:
                    size = input_spec(config).size
                    name = as_name(f"{model}-{_size_name(size)}")
                    cost = costs.of(name, model, partial(cost_of, config, classes))
                except KdpipeError as error:
                    left_out[name] = str(error)
                else:
                    points = known[model].at(math.sqrt(math.prod(sides(size))))
                    candidates.append(Candidate(name, model, size, points, cost, family_of(model)))
                advance(1, name)
    if not candidates:
        name, why = next(iter(left_out.items()))
        raise UserError(f"none of {len(left_out)} candidates can be chosen; {name}: {why}")
    return Pool(candidates, left_out)


def _size_name(size: Size) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


class _Costs:
    """What graphs take, remembered: to make a network only to count takes seconds for the large ones."""

    _KIND = TypeAdapter(dict[str, tuple[int, int, int] | str])

    def __init__(self, file: Path, classes: int) -> None:
        self._file, self._new = file, 0
        versions = versions_of("timm", "torch")
        self._for = f"{classes} {' '.join(versions.values())} "
        self._known: dict[str, Any] = {}
        with suppress(OSError, ValueError, ValidationError):
            self._known = self._KIND.validate_python(json.loads(file.read_text()))

    def of(self, name: str, model: str, count: Callable[[], Cost]) -> Cost:
        """That of a candidate. Raises UserError, also where it was refused before."""
        from .networks.cost import Cost

        found = None if code.is_code(model) else self._known.get(self._for + name)
        if found is None:
            self._new += 1
            try:
                found = tuple(count())
            except UserError as error:
                found = str(error)
            except Exception as error:  # a network that cannot be run alone raises anything
                found = f"it cannot be run: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if not code.is_code(model):  # which may be another tomorrow
                self._known[self._for + name] = found
            if self._new % SAVED_EVERY == 0:
                self._save()
        if isinstance(found, str):
            raise UserError(found)
        return Cost(*found)

    @contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._new:
                self._save()

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._file, self._known)


def _replace(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(value, indent=1))
    draft.replace(path)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One pick at a time: what one makes, measures and removes is another's too."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another pick measures in {folder}: waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(path: Path) -> None:
    """Remove an artifact; whenever this ends, what is left of it is none."""
    gone = part_of(path)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


# ---- measuring -----------------------------------------------------------------------------------------------


class Session(NamedTuple):
    """One sealed session: p90 of each candidate in ms, and whether that is to be believed; who could not be run."""

    measurement: Measurement
    p90_ms: dict[str, float]
    trust: dict[str, Trust]
    failed: dict[str, str]


class Search:
    """A pick under way."""

    def __init__(self, plan: PickPlan, dataset: Dataset, chain: Chain, pool: Pool, prior_sha256: str) -> None:
        self.plan, self.dataset, self.chain, self.pool = plan, dataset, chain, pool
        self.workshop = Chain(chain.folder / WORKSHOP, tell=chain.tell, allow_code=chain.allow_code)
        self.device = find_device(plan.device)
        self.probe: Probe = self.device.probe()
        if self.device.emulated or self.probe.emulated:
            raise UserError(f"'{plan.device}' is an emulator, whose latencies mean nothing: wanted a device")
        if not self.device.runs(plan.target):
            raise UserError(
                f"{plan.target} is not installed on '{plan.device}': kdpipe doctor --device {plan.device} says what "
                "is missing"
            )
        self.limit = math.log(plan.p90)
        self.bench = BenchPlan(devices=(plan.device,), rounds=plan.rounds, threads=(plan.threads,), **SESSION)
        self.fingerprint = bench_config(self.bench, plan.device, self.probe).device_fingerprint
        self.config = PickConfig.of(plan, prior_sha256=prior_sha256, device_fingerprint=self.fingerprint)
        asked = self.config.model_dump(mode="json", exclude={"train", "short", "distill"})
        key = hashlib.sha256(canonical({**asked, "data": dataset.key, **versions_of("timm", "torch")})).hexdigest()
        self._file = self.workshop.folder / STATE / f"{key[:12]}.json"
        self._read_before: dict[Path, Session] = {}
        self.state = State()
        with suppress(OSError, ValidationError):
            self.state = State.model_validate_json(self._file.read_text())
        self.state.anchors = [name for name in self.state.anchors if name in pool.position]
        self.state.pending = [name for name in self.state.pending if name in pool.position]

    @cached_property
    def sample(self) -> Dataset:
        return self.workshop.sample(SampleConfig(), self.dataset)

    def run(self) -> None:
        """Measure until nothing more is to be expected, or as many networks as may be."""
        if self.state.pending and len(self.sessions()) <= self.state.sessions:  # it was ended in the middle of it
            self.measure(self.state.pending)
        self._measured(self.state.pending)
        while (names := self._next()) is not None:
            self.measure(names)

    def sessions(self) -> list[Session]:
        """What was measured of candidates on this device as it is now, for this target, whoever asked for it."""
        found = []
        every = sealed(self.workshop.folder, skip=UserError)
        for path, manifest in sorted(every, key=lambda each: each[1].created_utc):
            names = self._names_in(manifest) if manifest.kind == Measurement.kind else {}
            if names and path not in self._read_before:
                self._read_before[path] = self._read(Measurement.open(path), names)
            if names:
                found.append(self._read_before[path])
        return [session for session in found if session.p90_ms]

    def _names_in(self, manifest: Manifest) -> dict[str, str]:
        """Of a measurement on this device the candidates by role."""
        wanted = {"device": self.plan.device, "device_fingerprint": self.fingerprint, "threads": [self.plan.threads]}
        if any(manifest.config.get(name) != value for name, value in wanted.items()):
            return {}
        return self._names_of(manifest.inputs)

    def _names_of(self, sources: Mapping[str, Provenance]) -> dict[str, str]:
        """Of bundles by role those of candidates, made as they are to be, for as many classes."""
        found = {}
        for role, source in sources.items():
            if source.kind != Bundle.kind:
                continue
            bundle = Bundle.facts_of(source)
            if (bundle.target, bundle.variant) != (self.plan.target, self.plan.variant):
                continue
            student = next(iter(find_ancestors(source, Checkpoint)), None)
            if student is None or Checkpoint.facts_of(student).classes != len(self.dataset.classes):
                continue
            name = as_name(f"{student.config.get('model')}-{_size_name(bundle.input.size)}")
            if name in self.pool.position:
                found[role] = name
        return found

    def _read(self, measurement: Measurement, names: Mapping[str, str]) -> Session:
        p90, trust, failed = {}, {}, {}
        for role, name in names.items():
            result = measurement.facts.results.get(role)
            if result is None or result.latency_p90_ms is None or result.trust is None:
                failed[name] = "no result" if result is None else result.status
                continue
            trust[name] = result.trust
            if result.trust.word != "invalid":
                p90[name] = result.latency_p90_ms.value
        return Session(measurement, p90, trust, failed)

    def known(self) -> Known | None:
        found = [{name: math.log(p90) for name, p90 in each.p90_ms.items()} for each in self.sessions()]
        return choosing.read_together(found) if found else None

    def _next(self) -> list[str] | None:
        """Who is measured next: who is worth it, else the best again until it is sure; None: it is done."""
        known = self.known()
        done = {*self.state.asked, *self.state.refused}
        names = self.pool.next(known, self.limit, self.plan.budget - len(self.state.asked), done)
        if names or known is None:
            return names or None
        best = self.pool.best(known, self.limit)
        if best is None or not self._is_unsure(best, known):
            return None
        self.state.confirmed += 1
        return [best]

    def _is_unsure(self, name: str, known: Known) -> bool:
        return known.levels[name].sessions < CONFIRMED and self.state.confirmed < MOST_CONFIRMATIONS

    def confirm(self, name: str, *, again: bool) -> bool:
        """Measure one until it is sure, or once more whatever is known; whether there was anything to measure."""
        known = self.known()
        assert known is not None  # it was chosen
        if not again and not self._is_unsure(name, known):
            return False
        self.state.confirmed += not again
        self.measure([name])
        self.run()
        return True

    def measure(self, names: Sequence[str], *, anchored: bool = True) -> None:
        """One session of these and the anchors, by which all sessions are read against each other.

        Args:
            anchored: False for these alone.
        """
        known = self.known()
        if anchored and known is not None and not self.state.anchors:
            nearest = sorted(known.levels, key=lambda name: abs(known.levels[name].value - self.limit))
            self.state.anchors = nearest[:2]
        bundles: dict[str, Bundle] = {}
        for name in dict.fromkeys([*names, *(self.state.anchors if anchored else ())]):
            bundle = self._bundle(name)
            if bundle is not None:
                bundles[name] = bundle
        if not any(name in bundles for name in names):
            return
        done = len(self.state.asked)
        note(
            f"measuring {', '.join(name for name in names if name in bundles)} "
            f"({done} of at most {self.plan.budget} networks are measured)"
        )
        self.state.pending = [name for name in names if name in bundles]
        self.state.sessions = len(self.sessions())
        self._save()
        benched = self.workshop.bench(self.bench, bundles, self.sample, again=True)
        if benched.lost:
            raise DeviceLost(f"{benched.told_lost}; the same command goes on from here")
        self._measured(self.state.pending)

    def _measured(self, names: Sequence[str]) -> None:
        """Those count as measured, whatever came of it."""
        self.state.asked += [name for name in names if name not in self.state.asked]
        self.state.pending = []
        self._save()

    def _bundle(self, name: str) -> Bundle | None:
        """A candidate as it would be deployed; None where it can't be made, which is remembered.

        What it was made from, several times as large, goes once it is there.
        """
        if name in self.state.refused:
            return None
        for path, manifest in sealed(self.workshop.folder, skip=UserError):
            if manifest.kind == Bundle.kind and name in self._names_of({"": manifest}).values():
                data = manifest.inputs.get("data")
                if data is not None and data.key == self.sample.key:
                    return Bundle.open(path)
        candidate, plan = self.pool.candidates[self.pool.position[name]], self.plan
        tries = self.state.tries.get(name, 0)
        if tries >= MOST_TRIES:
            self._refuse(name, f"making it for {plan.target} ended the process {tries} times")
            return None
        self.state.tries[name] = tries + 1
        self._save()
        kept, begun = {self.sample.path}, len(self.workshop.steps)
        try:
            drawn = DrawConfig(model=candidate.model, input=InputSettings(size=candidate.size), images=CALIBRATING)
            network = self.workshop.draw(drawn, self.sample)
            export = ExportConfig(target=plan.target, parity_images=8, hop_images=8)
            model = self.workshop.export(export, network, self.sample)
            if plan.variant != "float32":
                # Weights are random: what they say of an image hangs by a thread.
                calibrate = CalibrateSettings(images=CALIBRATING)
                small = QuantizeConfig(
                    variant=plan.variant, calibrate=calibrate, check_images=CHECKED, allow_damage=True
                )
                model = self.workshop.quantize(small, model, self.sample, self.probe)
            bundle = self.workshop.package(PackageConfig(golden_images=2), model, self.sample)
            kept.add(bundle.path)
        except KdpipeError as error:
            if error.stops_all or isinstance(error, (Busy, DeviceLost)):
                raise
            self._refuse(name, f"it cannot be made for {plan.target}: {error}")
            return None
        finally:
            self.state.tries[name] = tries
            for path in {step.path for step in self.workshop.steps[begun:]} - kept:
                _remove(path)
        del self.state.tries[name]
        self._save()
        return bundle

    def _refuse(self, name: str, why: str) -> None:
        note(f"{name} is left out: {why}")
        self.state.refused[name] = why
        self._save()

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._file, self.state.model_dump())


# ---- the answer ----------------------------------------------------------------------------------------------


def pick(
    plan: PickPlan, dataset: Dataset, chain: Chain, teacher: Checkpoint | None = None, *, again: bool = False
) -> Pick:
    """The best network within a latency, as far as a prior and a few measurements tell; and the recipe that trains it.

    What was measured is kept: the same call goes on where it ended, and finds the answer once there is one.

    Args:
        teacher: who teaches those that are trained shortly, and the student of the recipe.
        again: measure the one that is chosen in one session more.

    Raises:
        UserError: unknown names, nothing to choose from, a task or a target that networks are not chosen for.
        DeviceLost: the link to the device is gone.
    """
    check(plan, dataset, teacher)
    workshop = chain.folder / WORKSHOP
    with alone(workshop):
        search = search_of(plan, dataset, chain)
        search.run()
    while True:  # another session may change who is within the limit, and so who is trained
        trained = _trained_shortly(search, teacher) if plan.train else {}
        chosen = _chosen(search, trained)
        with alone(workshop):
            if chosen is None or not search.confirm(chosen, again=again):
                return _answer(search, teacher, trained, chosen)
        again = False


def search_of(plan: PickPlan, dataset: Dataset, chain: Chain) -> Search:
    """A pick, as far as it has come. Raises UserError where nobody can be chosen, or for no such device."""
    known, sha256 = prior_of(plan, chain, dataset)
    with code.allowing(chain.allow_code):
        pool = pool_of(plan, known, len(dataset.classes), chain.folder / WORKSHOP / COSTS)
    return Search(plan, dataset, chain, pool, sha256)


def check(plan: PickPlan, dataset: Dataset, teacher: Checkpoint | None) -> None:
    """Refuse what can be told at once. Raises UserError."""
    if plan.target not in TARGETS:
        raise choice("target", plan.target, TARGETS)
    if plan.variant not in ("float32", *VARIANTS[plan.target]):
        raise choice("variant", plan.variant, ["float32", *VARIANTS[plan.target]])
    if dataset.facts.task != prior.TASK:
        raise UserError(
            f"{dataset.path} is for {dataset.facts.task}: networks are chosen for {prior.TASK}, of which alone a prior "
            "is known; name a network yourself"
        )
    require("making networks", TRAIN_NEEDS, "train")
    require("the figure", ("matplotlib",), "report")
    require(f"target '{plan.target}'", TARGETS[plan.target].needs, plan.target)
    if plan.variant != "float32":
        require(f"{plan.variant} for '{plan.target}'", VARIANTS[plan.target][plan.variant].needs, plan.target)
    if plan.train and teacher is None and plan.distill.method != "labels":
        raise UserError(
            f"train {plan.train} trains by {plan.distill.method}, which takes a teacher: name the folder of its "
            "checkpoint (--teacher), or distill.method labels"
        )
    if plan.train and not len(dataset.samples("val")):
        raise UserError(
            f"train {plan.train} chooses by the validation part and {dataset.path} has none: make the data with "
            "val_fraction 0.1"
        )
    if teacher is not None:
        dataset.check_classes_of(teacher, "the teacher")


def _chosen(search: Search, trained: Mapping[str, Checkpoint]) -> str | None:
    """The best of those that were trained by validation, else of those within the limit by the prior."""
    if trained:
        return max(trained, key=lambda name: _validation(trained[name]))
    known = search.known()
    return None if known is None else search.pool.best(known, search.limit)


def _answer(search: Search, teacher: Checkpoint | None, trained: Mapping[str, Checkpoint], chosen: str | None) -> Pick:
    """Seal what was found."""
    plan, pool = search.plan, search.pool
    sessions, known = search.sessions(), search.known()
    if known is None:
        whys = {**pool.left_out, **search.state.refused}
        name, why = next(iter(whys.items()), ("no candidate", "no latency of it is to be believed"))
        raise UserError(f"nothing could be measured on '{plan.device}'; {name}: {why}")
    inputs: dict[str, Any] = {f"measurement-{at}": each.measurement for at, each in enumerate(sessions, 1)}
    inputs["data"] = search.dataset
    inputs |= {} if teacher is None else {"teacher": teacher}
    inputs |= {f"student-{name}": checkpoint for name, checkpoint in trained.items()}
    order = Order("pick", search.config, inputs)

    def make(path: Path) -> Pick:
        validation = {name: _validation(each) for name, each in trained.items()}
        rows = _rows(search, sessions, known, chosen, validation)
        with drafting(Pick, order, path) as draft:
            fronted = tuple(row.name for row in sorted(rows, key=latency_of) if row.on_front)
            fastest = min(known.levels, key=lambda name: known.levels[name].value)
            draft.facts = PickFacts(
                task=search.dataset.facts.task,
                device=plan.device,
                emulated=False,
                target=plan.target,
                variant=plan.variant,
                limit_ms=plan.p90,
                chosen=chosen,
                fastest=fastest,
                front=fronted,
                candidates=len(rows),
                measured=len(known.levels),
                left_out=len(pool.left_out) + len(search.state.refused),
            )
            write_json(draft.path / Pick.ROWS, [row.model_dump(mode="json") for row in rows])
            left_out = {**pool.left_out, **search.state.refused}
            write_json(draft.path / Pick.LEFT_OUT, [{"name": name, "why": why} for name, why in left_out.items()])
            if chosen is not None:
                (draft.path / Pick.RECIPE).write_text(recipe_text(search, chosen, teacher))
            from .report.picks import drawn

            drawn(rows, draft.facts, plan.prior).save(draft.path / Pick.FIGURE)
        return draft.artifact

    return search.chain.step("pick", Pick, order, make)


def _rows(
    search: Search, sessions: Sequence[Session], known: Known, chosen: str | None, validation: Mapping[str, float]
) -> list[Picked]:
    """What became of every candidate that can be made, the best by the prior first."""
    from scipy.stats import t

    pool = search.pool
    forecast, chances = pool.forecast(known), pool.chances(known, search.limit)
    points = {name: (level.value, pool.points[pool.position[name]]) for name, level in known.levels.items()}
    fronted = set(choosing.front(points))
    wide = np.hypot(forecast.scale, known.again_sd) * float(t.ppf((1 + CONFIDENCE) / 2, forecast.freedom))
    best = None if chosen is None else pool.points[pool.position[chosen]]
    judged = len(search.dataset.samples("val"))
    rows = []
    for at, each in enumerate(pool.candidates):
        name, level = each.name, known.levels.get(each.name)
        if name in search.state.refused:
            continue
        if level is None:
            value, (low, high) = forecast.value[at], (forecast.value[at] - wide[at], forecast.value[at] + wide[at])
            chance, count = float(chances[at]), 0
        else:
            value, (low, high) = level.value, known.bounds(name, CONFIDENCE)
            chance, count = known.chance(name, search.limit), level.sessions
        words = [session.trust[name] for session in sessions if name in session.trust]
        trust = next((word for word in words if word.word == "trusted"), words[-1] if words else None)
        if name == chosen:
            why = "chosen: " + (
                f"the best of {len(validation)} that were trained shortly, by {judged} validation images" if validation
                else "the best by the prior that is within the limit"
            )  # fmt: skip
        elif name in validation:
            why = f"trained shortly, and not as good: {100 * validation[name]:.1f} % of {judged} validation images"
        elif level is None and (failures := [each.failed[name] for each in sessions if name in each.failed]):
            why = f"it could not be run: {failures[-1]}"
        elif level is None and words:
            why = f"measured, and not to be believed: {words[-1].reason}"
        elif level is None and best is not None and each.points <= best:
            why = "not measured: the prior has it no better than the one chosen"
        elif level is None:
            why = f"not measured: {chance:.0%} likely to be within the limit"
        elif chance < 1 - SURE:
            why = "too slow"
        elif chance < SURE:
            why = f"too near the limit: {chance:.0%} likely to be within it another time"
        else:
            why = "within the limit, and no better by the prior"
        interval = Interval(math.exp(value), math.exp(low), math.exp(high), count)
        rows.append(
            Picked(
                name=name, model=each.model, size=each.size, prior=round(each.points, 3), **each.cost._asdict(),
                p90_ms=interval, sessions=count, trust=trust, chance=round(chance, 4), on_front=name in fronted,
                validation=validation.get(name), why=why,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row.prior, latency_of(row)))


# ---- training a few shortly -----------------------------------------------------------------------------------


def student_config(plan: PickPlan, candidate: Candidate, teacher: Checkpoint | None) -> TrainConfig:
    """How a candidate is trained: shown what the teacher is shown, so that one cache serves all of a size."""
    shown: dict[str, Any] = {"size": candidate.size}
    if teacher is not None:
        spec = teacher.facts.input
        shown |= {name: getattr(spec, name) for name in ("mean", "std", "crop_fraction", "interpolation")}
        shown |= {} if spec.resize == "cover" else {"resize": spec.resize}
    own = {name: getattr(plan.distill, name) for name in type(plan.distill).model_fields}
    return TrainConfig(**own, model=candidate.model, input=InputSettings(**shown))


def _trained_shortly(search: Search, teacher: Checkpoint | None) -> dict[str, Checkpoint]:
    """The best few, each for a share of the epochs, from what one teacher said beforehand, where that does."""
    from .distill.methods import METHODS

    plan, known = search.plan, search.known()
    names = [] if known is None else search.pool.within(known, search.limit)[: plan.train]
    epochs = max(1, round(plan.short * plan.distill.train.epochs))
    runs = {}
    for name in names:
        config = in_epochs(student_config(plan, search.pool.candidates[search.pool.position[name]], teacher), epochs)
        if config.needs_teacher and config.cache_views is None and not METHODS[config.method].looks_at_maps(config):
            config = config.model_copy(update={"cache_views": min(epochs, SHORT_VIEWS)})
        runs[f"short-{name}"] = config
    made = search.chain.train_all(runs, search.dataset, teacher, together=False)
    return {name: made[f"short-{name}"] for name in names}


def _validation(checkpoint: Checkpoint) -> float:
    """Accuracy of the weights that were kept, on the validation part. Raises UserError where it was not looked at."""
    facts = checkpoint.facts
    best = facts.best_validation if facts.selected == "best" else None
    found = facts.last_validation if best is None else best.validation_accuracy
    if found is None:
        raise UserError(f"{checkpoint.path} was not judged on the validation part: make the data with val_fraction 0.1")
    return found


# ---- the recipe -----------------------------------------------------------------------------------------------


def recipe_text(search: Search, chosen: str, teacher: Checkpoint | None) -> str:
    """The recipe that trains the chosen one, makes it small and measures it on that device."""
    import yaml

    plan, settings = search.plan, search.dataset.settings
    candidate = search.pool.candidates[search.pool.position[chosen]]
    config = student_config(plan, candidate, teacher)

    data = {
        name: settings[name]
        for name, field in DataPlan.model_fields.items()
        if name in settings and settings[name] != field.default
    }
    values: dict[str, Any] = {"name": as_name(chosen), "data": data}
    if teacher is None:
        values["teacher"] = {"model": "resnet18"}
    else:
        kept = teacher.settings
        file = Checkpoint.ONNX if Checkpoint.ONNX in teacher.manifest.files else Checkpoint.WEIGHTS
        values["teacher"] = {
            "model": kept["model"],
            **({"encoder": kept["encoder"]} if kept.get("encoder") else {}),
            **({"model_args": kept["model_args"]} if kept.get("model_args") else {}),
            "checkpoint": str((teacher.path / file).absolute()),
            "input": _said(InputSettings(**{
                name: getattr(teacher.facts.input, name) for name in InputSettings.model_fields
            })),
        }  # fmt: skip
    values["student"] = {"model": candidate.model, "input": _said(config.input)}
    said = _said(plan.distill)
    if said:
        values["distill"] = said
    values["export"] = {"targets": [plan.target]}
    values["quantize"] = None if plan.variant == "float32" else {"variants": [plan.variant]}
    values["bench"] = {"devices": [plan.device], **({"threads": [plan.threads]} if plan.threads else {})}
    validated(Recipe, values, "the recipe")
    threads = f", with {plan.threads} threads" if plan.threads else ""
    lines = [
        f"# Written by `kdpipe pick`: {chosen} is the best by the prior ({plan.prior}) with a p90 of at most "
        f"{plan.p90:g} ms on '{plan.device}',",
        f"# in {plan.variant} for {plan.target}{threads}. What a run takes: kdpipe run --dry-run; then: kdpipe run.",
    ]
    if teacher is None:
        lines.append("# The teacher is trained here: teacher.checkpoint takes weights of your own.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _said(config: BaseModel) -> dict[str, Any]:
    """What a configuration has that is not its default, as YAML takes it."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    return found
