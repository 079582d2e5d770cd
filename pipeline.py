"""What a recipe means: which stages, in which order, for which students, targets and devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel

from . import forecast
from .chain import (
    REPLACED,
    TRAIN_NEEDS,
    Chain,
    Wants,
    adopt_config,
    attempt_of,
    attempts,
    believed,
    believed_beside,
    dataset_for,
    fitted_config,
    given_to,
    has_body,
    refuse_random,
    restart_config,
    restart_name,
    sealed,
    tolerated,
    with_code,
    with_fitted,
    with_weights,
)
from .core.artifact import MANIFEST, AnyArtifact, Manifest, check_provenance, order_key, read_manifest
from .core.config import (
    BenchConfig,
    BenchPlan,
    CachePlan,
    DistillPlan,
    ExportConfig,
    GraphConfig,
    ModelSettings,
    QuantizeConfig,
    Recipe,
    ReportConfig,
    TeacherPlan,
    TrainConfig,
    changed,
    changed_student,
    control_of,
    gate_recipe,
    read_recipe,
    suited,
)
from .core.errors import DeviceLost, KdpipeError, UserError, choice
from .core.inputs import size_words
from .core.kinds import Bundle, Checkpoint, Graph, Measurement, Model, Probe, Refusal, Report, Verdict, unshown
from .core.proc import require
from .core.progress import note
from .core.sealed import NAME
from .data.dataset import Dataset
from .data.labels import check_source
from .data.listing import list_images
from .devices.session import bench_config, swept
from .export import TARGETS
from .forecast import Cost, Forecast, Work
from .options import options_of
from .quantize import VARIANTS

MAKES_NETWORKS = ("teacher", "cache", "distill", "export", "quantize")  # commands that may run code of the user's
# In their order; each is called as its command and what is told to it.
STAGES = ("data", "teacher", "distill", "export", "quantize", "package", "bench", "report")

if TYPE_CHECKING:
    from .deploy.sides import Side
    from .diary import Diary
    from .report.plots import Figure
    from .report.shown import Table


def check_names(recipe: Recipe) -> None:
    """Refuse what can be told in a second, without PyTorch: names and files. Raises UserError."""
    from .devices import find_device
    from .networks.names import check_network
    from .report.maps import check_explained

    checkpoint = recipe.teacher.checkpoint
    check_source(recipe.data)
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"teacher.checkpoint: no file at {checkpoint}: wanted .safetensors or .pth")
    for device in recipe.bench.devices:
        find_device(device)
    check_network(recipe.teacher)
    for config in student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None).values():
        check_network(config)
    exported_runs(recipe)
    if recipe.report.explain:
        check_explained(recipe.data.task, "report.explain: a network of masks")
    for target in recipe.export.targets:
        if target not in TARGETS:
            raise choice("target", target, TARGETS)
    if recipe.quantize is not None and recipe.quantize.variants != "auto":
        known = {name for target in recipe.export.targets for name in VARIANTS[target]}
        for name in recipe.quantize.variants:
            if name not in known:
                raise choice("variant", name, known)


def check_packages(recipe: Recipe) -> None:
    """Refuse where a package is missing that a stage needs; imports none of them. Raises UserError."""
    from .export.onnx import NEEDS as GRAPH_NEEDS
    from .report.maps import NEEDS as EXPLAIN_NEEDS

    require("training", TRAIN_NEEDS, "train")
    require("the report", ("jinja2", "matplotlib"), "report")
    if recipe.report.explain:
        require("report.explain", EXPLAIN_NEEDS, "explain")
    for target in recipe.export.targets:
        require(f"target '{target}'", TARGETS[target].needs, target)
        if TARGETS[target].source is Graph:
            require("ONNX", GRAPH_NEEDS, target)
        if recipe.quantize is not None:
            for name, variant in VARIANTS[target].items():
                if recipe.quantize.variants == "auto" or name in recipe.quantize.variants:
                    require(f"{name} for '{target}'", variant.needs, target)
    if recipe.distill.tracker != "none":
        from .distill.trackers import TRACKERS

        require(f"tracker '{recipe.distill.tracker}'", TRACKERS[recipe.distill.tracker].needs, recipe.distill.tracker)


def check_recipe(recipe: Recipe) -> None:
    """Refuse before any work what a later stage would refuse: names, packages, networks. Raises UserError."""
    check_names(recipe)
    _, lost = probe_all(recipe.bench.devices)
    for device, error in lost.items():
        note(f"'{device}' may be lost when it is to be measured: {error}")
    check_packages(recipe)
    from .distill.train import check_run

    check_run(recipe.teacher, None if recipe.teacher.checkpoint else recipe.teacher.train, recipe.data.task)
    of_one_seed = recipe.distill.model_copy(update={"seeds": recipe.distill.seeds[:1]})  # the others are like it
    for config in student_runs(recipe.student, of_one_seed, recipe.data.unlabeled is not None).values():
        check_run(config, config.train, recipe.data.task)


def student_runs(student: ModelSettings, plan: DistillPlan, unlabeled: bool = False) -> dict[str, TrainConfig]:
    """Every run of the plan by name: per seed the method, each of ``plan.students``, and their controls.

    A student that changes the method has that method's own weights unless it names others. A control has its
    student's network and training, and the labels alone at full weight; with images that are ``unlabeled`` a second
    one makes as many steps as the student that sees them too. Raises UserError.
    """
    main = TrainConfig.of(student, plan)
    if masked := [name for name, method in _methods(plan).items() if method == "masked"]:
        raise UserError(
            f"distill: method masked teaches '{masked[0]}' no answers that could be shipped or compared: train it by "
            "itself (kdpipe distill DATA --method masked) and name its folder as the student's start"
        )
    students: dict[str, TrainConfig] = {plan.method: main}
    for name, change in plan.students.items():
        # A student's control is called labels-NAME, and with unlabelled images labels-steps-NAME.
        if name in students or name == "labels" or name.partition("-")[0] == "steps":
            raise UserError(f"distill.students: the name '{name}' is taken, choose another")
        students[name] = changed_student(main, change, f"distill.students.{name}")
    runs: dict[str, TrainConfig] = {}
    for seed in plan.seeds:
        for name, config in students.items():
            seeded = config.model_copy(update={"seed": seed})
            suffix = "" if name == plan.method else f"-{name}"
            controls = {f"student-labels{suffix}-seed{seed}": control_of(seeded, plan.control_epochs)}
            if unlabeled:
                matched = control_of(seeded).model_copy(update={"steps_as_unlabeled": True})
                controls[f"student-labels-steps{suffix}-seed{seed}"] = matched
            if plan.control and seeded.needs_teacher:
                runs |= {its: control for its, control in controls.items() if control not in runs.values()}
            runs[f"student-{name}-seed{seed}"] = seeded
    return runs


def _methods(plan: DistillPlan) -> dict[str, object]:
    """The method of each student by name."""
    return {plan.method: plan.method, **{name: change.get("method") for name, change in plan.students.items()}}


def wants(recipe: Recipe) -> Wants:
    """What the recipe's networks want of its images."""
    from .data.copies import side_for
    from .networks.models import input_spec

    taught = student_runs(recipe.student, recipe.distill).values()
    learners = [(input_spec(config), config.train) for config in taught]
    teacher = input_spec(recipe.teacher)
    if recipe.teacher.is_trained:
        learners.append((teacher, recipe.teacher.train))
    specs = dict.fromkeys([teacher, *(spec for spec, _ in learners)])
    return Wants(tuple(specs), max(side_for(spec, train.augment) for spec, train in learners))


def made(recipe: Recipe, chain: Chain) -> tuple[list[Bundle], Report | None]:
    """The bundles of a recipe that are sealed, and its report, if that is; nothing is made.

    Raises:
        UserError: no bundle is sealed, or what ``plan`` refuses.
        DeviceLost: no device is left.
    """
    legs = plan(recipe, chain)
    packed = [leg for leg in legs if leg.stage == "package"]
    bundles = [Bundle.open(leg.path) for leg in packed if leg.sealed and leg.path is not None]
    if not bundles:
        raise UserError(f"no bundle of '{recipe.name}' is sealed in {chain.folder}: kdpipe run the recipe first")
    if lacking := [leg.name for leg in packed if not leg.sealed]:
        note(f"not made, and so left out: {', '.join(lacking)}")
    page = next((leg for leg in legs if leg.stage == "report" and leg.sealed), None)
    return bundles, None if page is None or page.path is None else Report.open(page.path)


@dataclass(frozen=True)
class Outcome:
    """What a run ends with; ``table`` and ``figure`` show themselves in a notebook.

    ``bundles`` are those of all devices, by name: one that a further device has in a form of its own is called
    ``NAME-DEVICE``. ``measurements`` has of each device one session, ``lost`` says in a line which could not be
    measured and why, ``failed`` by name what else could not be made and why: the rest is reported without it.
    """

    report: Report
    measurements: dict[str, Measurement]
    bundles: dict[str, Bundle]
    lost: str
    failed: dict[str, KdpipeError] = field(default_factory=dict)

    @property
    def measurement(self) -> Measurement:
        """That of the first device."""
        return next(iter(self.measurements.values()))

    @property
    def table(self) -> Table:
        """What ``kdpipe run`` prints."""
        from .report.shown import table

        return table(self.report)

    def figure(self, name: str) -> Figure:
        """``pareto``, ``accuracy``, ``confusion``, ``noise``, ``curves`` or ``gain METHOD``. Raises UserError."""
        from .report.shown import figure

        return figure(self.report, name)


def run(recipe: Recipe, chain: Chain, again: str | None = None) -> Outcome:
    """The whole chain of ``recipe``.

    The shipped student is the one of the first seed by the method (and each that the recipe exports beside it): chosen
    beforehand, never by its test accuracy. What fails leaves the others' results. Each device measures the variants
    that suit it. Sessions are measured until there are as many as the recipe says.

    Args:
        again: a stage to do again. Of ``bench``, an event, as many sessions more; of another one what is sealed is set
            aside, with all that came from it.

    Raises:
        KdpipeError: as its stages do.
    """
    outcome = run_part(recipe, chain, again)
    assert outcome is not None
    return outcome


def run_part(
    recipe: Recipe,
    chain: Chain,
    again: str | None = None,
    start: str | None = None,
    until: str | None = None,
    ahead: Callable[[str], object] = lambda _: None,
    failed: dict[str, KdpipeError] | None = None,
    diary: Diary | None = None,
) -> Outcome | None:
    """As ``run``, up to and with the stage ``until``; None where that is before the report.

    Args:
        start: what the stages before this one make must be sealed: nothing is trained again by mistake.
        ahead: called with the name of each stage before it is begun, to make side by side what it will find.
        failed: takes by name what could not be made, and why; what comes after it is not made either.
        diary: where it is told how far this run is.

    Raises:
        UserError: an unknown stage, or something before ``start`` is not sealed.
        KdpipeError: as its stages do.
    """
    legs = plan(recipe, chain, again, until)
    check_start(legs, start, until)
    if again is not None and again != "bench":
        keys = {leg.key for leg in legs if leg.stage == again and leg.key is not None}
        if moved := chain.set_aside(keys):
            note(f"{len(moved)} artifacts of '{again}' and after it are set aside in {chain.folder / REPLACED}")
    chain.course = course = _Course(legs, chain, diary)
    stages = _stages(recipe, chain, again == "bench", {} if failed is None else failed)
    while True:
        try:
            stage = next(stages)
        except StopIteration as ended:
            outcome: Outcome = ended.value
            return outcome
        if until is not None and _position(stage) > _position(until):
            return None
        if stage == "quantize" and any(leg.perhaps for leg in legs):  # which the exported models tell now
            course.know(plan(recipe, chain, again if again == "bench" else None, until))
        ahead(stage)


def check_start(legs: Sequence[Leg], start: str | None, until: str | None = None) -> None:
    """Refuse to begin with a stage where something before it is not sealed. Raises UserError."""
    if start is None:
        return
    if _position(start) > _position(until or STAGES[-1]):
        raise UserError(f"--from {start} comes after --until {until}: the stages are {', '.join(STAGES)}")
    before = [leg for leg in legs if _position(leg.stage) < _position(start)]
    if lacking := [leg for leg in before if not leg.sealed and not leg.perhaps]:
        raise UserError(
            f"--from {start}: {len(lacking)} of the {len(before)} artifacts before it are not sealed, the first is "
            f"'{lacking[0].name}': leave --from out, or go back to the settings that made them"
        )


def _position(stage: str) -> int:
    """Raises UserError for an unknown one."""
    if stage not in STAGES:
        raise choice("stage", stage, STAGES)
    return STAGES.index(stage)


def _stages(recipe: Recipe, chain: Chain, again: bool, failed: dict[str, KdpipeError]) -> Generator[str, None, Outcome]:
    """Do one stage after another; gives the name of each before it is begun. ``failed`` takes what the others go on
    without.
    """
    chain.check = lambda: check_recipe(recipe)
    yield "data"
    dataset = chain.data(recipe.data, wants=lambda: wants(recipe))
    yield "teacher"
    teacher = chain.teacher(recipe.teacher, dataset)
    yield "distill"
    checkpoints = {"teacher": teacher}
    runs = student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None)
    checkpoints |= chain.train_all(runs, dataset, teacher, recipe.distill.together, failed)
    exported = exported_runs(recipe)
    shipped = {name: checkpoints[run] for name, run in exported.items() if run in checkpoints}
    _see_that_some_are_left(shipped, failed)

    yield "export"
    legs = list(itertools.product(shipped, recipe.export.targets))
    float32: dict[tuple[str, str], Model] = {}
    for student, target in legs:
        chain.student = student if len(exported) > 1 else ""
        with tolerated(_leg_name(chain.student, target), failed):
            config = ExportConfig.of(recipe.export, target=target)
            float32[student, target] = chain.export(config, shipped[student], dataset)
    _see_that_some_are_left(float32, failed)
    yield "quantize"
    probes, lost = probe_all(recipe.bench.devices)
    variants: dict[tuple[str, str], dict[str, list[Model]]] = {
        leg: {device: [] for device in probes} for leg in float32
    }
    for (student, target), model in float32.items():
        chain.student = student if len(exported) > 1 else ""
        refused: dict[str, KdpipeError] = {}
        if recipe.quantize is not None:
            variants[student, target] = chain.variants_of(recipe.quantize, model, dataset, probes, refused)
        failed |= {_leg_name(chain.student, name): error for name, error in refused.items()}
        found = itertools.chain.from_iterable(variants[student, target].values())
        if told := unshown({each.key: each for each in found}.values()):
            note(told)
    yield "package"
    bundles: dict[str, dict[str, Bundle]] = {device: {} for device in probes}
    for (student, target), whole in float32.items():
        chain.student = student if len(exported) > 1 else ""
        smaller = itertools.chain.from_iterable(variants[student, target].values())
        packed: dict[str, Bundle] = {}
        for key, model in {model.key: model for model in [whole, *smaller]}.items():
            with tolerated(_leg_name(chain.student, "bundle", target, model.facts.variant), failed):
                packed[key] = chain.package(recipe.package, model, dataset)
        for device, its in variants[student, target].items():
            for model in [whole, *its]:
                if model.key in packed:
                    name = _leg_name(chain.student, target, model.facts.variant)
                    bundles[device][name] = packed[model.key]
    bundles = {device: its for device, its in bundles.items() if its}
    _see_that_some_are_left(bundles, failed)
    chain.student = ""
    yield "bench"
    benched = chain.bench(_bench_plan(recipe, bundles), bundles, dataset, again=again)
    yield "report"
    benched.lost.update(lost)
    missing = (*failed, *(f"measurement-{device}" for device in benched.lost))
    config_of_page = _report_config(recipe, chain).model_copy(update={"missing": tuple(sorted(missing))})
    report = chain.report(config_of_page, benched.one_of_each, checkpoints)
    measurements = {found.facts.device: found for found in map(believed_beside, benched.one_of_each)}
    return Outcome(report, measurements, _named(bundles), benched.told_lost, failed)


def _see_that_some_are_left(made: Collection[object], failed: Mapping[str, KdpipeError]) -> None:
    """Raises the first failure where it left nothing to go on with."""
    if not made:
        raise next(iter(failed.values()))


def exported_runs(recipe: Recipe) -> dict[str, str]:
    """Of each student that is exported its run, that of the first seed. Raises UserError."""
    plan, wanted = recipe.distill, recipe.export.students
    known = (plan.method, *plan.students)
    names = (plan.method,) if wanted == "method" else known if wanted == "all" else wanted
    if not names:
        raise UserError(f"export.students: wanted at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise choice("student", name, known)
        if len(names) > 1 and not NAME.fullmatch(name):
            raise UserError(f"export.students: '{name}' names files: wanted letters, digits and . _ - in it")
    return {name: f"student-{name}-seed{plan.seeds[0]}" for name in names}


def _leg_name(*words: str) -> str:
    """A student's name where there are several, a target, a variant."""
    return "-".join(word for word in words if word)


def _bench_plan(recipe: Recipe, devices: Iterable[str]) -> BenchPlan:
    return recipe.bench.model_copy(update={"devices": tuple(devices)})


def _report_config(recipe: Recipe, chain: Chain) -> ReportConfig:
    config = ReportConfig(title=recipe.name, smoke=chain.smoke, explain=recipe.report.explain)
    if recipe.quantize is None or recipe.quantize.max_drop is None:
        return config
    return config.model_copy(update={"max_drop": recipe.quantize.max_drop})


# ---- the gate ------------------------------------------------------------------------------------------------


def gate(
    candidate: Path,
    baseline: Path | None,
    chain: Chain,
    rules: Sequence[str] = (),
    devices: Sequence[str] = (),
    sessions: int | None = None,
    data: Path | None = None,
    changes: Sequence[str] = (),
) -> Verdict:
    """Whether a candidate keeps its rules, measured together with the baseline.

    Args:
        candidate: a recipe, whose bundles must be sealed; or the folder of a bundle or a release.
        baseline: the folder of a release or a bundle.
        rules: in place of those of the recipe, or of the usual ones.
        devices, sessions: in place of the recipe's.
        data: folder of the dataset; left out, what the candidate was made from.
        changes: as in ``read_recipe``; of a candidate without a recipe of its sections gate and bench.

    Raises:
        UserError: neither recipe nor bundle nor release, or whatever ``Chain.gate`` refuses.
        KdpipeError: as ``Chain.bench`` does.
    """
    from .deploy.sides import open_side

    recipe = read_recipe(candidate, changes) if candidate.suffix in (".yaml", ".yml") else None
    settings = gate_recipe(changes) if recipe is None else recipe
    told = {name: value for name, value in (("rules", tuple(rules)), ("sessions", sessions)) if value}
    plan = changed(settings.gate, told, "gate")
    bench = changed(settings.bench, {"devices": tuple(devices)} if devices else {}, "bench")
    side = open_side(candidate) if recipe is None else _sealed_side(recipe.model_copy(update={"bench": bench}), chain)
    against = None if baseline is None else open_side(baseline)
    if data is not None:
        dataset = with_fitted(refuse_random(Dataset.open(data)))
    else:
        dataset = dataset_for(next(iter(side.bundles.values())), chain.folder)
    return chain.gate(plan, bench, side, against, dataset)


def _sealed_side(recipe: Recipe, chain: Chain) -> Side:
    """The bundles that a run of ``recipe`` made, without variants that were refused. Raises UserError before a run."""
    from .deploy.sides import Side

    planner = _Planner(recipe, chain, None)
    planner.legs()
    opened: dict[str, Bundle] = {}
    by_device: dict[str, dict[str, Bundle]] = {device: {} for device in planner.bundles}
    may_lack = recipe.quantize is not None and recipe.quantize.variants == "auto"
    for device, legs in planner.bundles.items():
        for name, leg in legs.items():
            if not leg.sealed or leg.path is None:
                if may_lack and not name.endswith("-float32"):
                    continue
                raise UserError(f"'{leg.name}' of {recipe.name} is not there yet: kdpipe run makes it, then judge it")
            if leg.id not in opened:
                opened[leg.id] = Bundle.open(leg.path)
            by_device[device][name] = opened[leg.id]
    return Side(recipe.name, _named(by_device), by_device)


# ---- what a run would do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leg:
    """One artifact that a run makes, or finds.

    ``key`` and ``path`` are None where only the work before can tell; ``perhaps``: whether it is wanted at all only the
    model before can tell. ``after`` are the names, ``id``, of the legs that it is made from. ``command`` makes exactly
    this artifact by itself once these are there; None where it comes along with the first leg after it. ``refused``:
    why an earlier run refused what would stand here, so that nothing comes after it.
    """

    stage: str
    name: str
    key: str | None
    path: Path | None
    sealed: bool
    after: tuple[str, ...]
    command: tuple[str, ...] | None
    work: Work
    perhaps: bool = False
    refused: str | None = None

    @property
    def id(self) -> str:
        """The name of its folder; where that is not known, its own."""
        return self.name if self.path is None else self.path.name


def levels(legs: Iterable[Leg]) -> dict[str, int]:
    """For each leg, how many must be made before it, one after another: those of a level can be made side by side.

    One without a command comes along with what is made from it, and takes no level of its own.
    """
    found: dict[str, int] = {}
    following: dict[str, int] = {}  # the level of what is made from it
    for leg in legs:  # each comes after those that it is made from
        found[leg.id] = max((following[id] for id in leg.after), default=0)
        following[leg.id] = found[leg.id] + (leg.command is not None)
    return found


def plan(recipe: Recipe, chain: Chain, again: str | None = None, until: str | None = None) -> list[Leg]:
    """What ``run_part`` makes and finds, in its order; nothing is made.

    A key is a function of settings and inputs, so that most are known before the work. What a variant's refusal or a
    lost device would change is not foreseen.

    Raises:
        UserError: an unknown stage, or what ``check_names`` refuses.
        DeviceLost: no device is left.
    """
    if again is not None and _position(again) > _position(until or STAGES[-1]):
        raise UserError(f"--again {again} comes after --until {until}: the stages are {', '.join(STAGES)}")
    check_names(recipe)  # before a folder of images is read, which may take minutes
    planner = _Planner(recipe, chain, again)
    legs = planner.legs()
    last = _position(until or STAGES[-1])
    return [leg for leg in legs if _position(leg.stage) <= last]


class _Planner:
    """Walks through a recipe as ``_stages`` does, with keys in place of artifacts."""

    def __init__(self, recipe: Recipe, chain: Chain, again: str | None) -> None:
        self._recipe, self._chain, self._again = recipe, chain, again
        self._legs: list[Leg] = []
        self._stale: set[str] = set()  # what is to be made again though it is sealed
        self.bundles: dict[str, dict[str, Leg]] = {}  # of each device by name, once the legs are known

    def legs(self) -> list[Leg]:
        """All of them."""
        recipe = self._recipe
        data = self._data()
        teacher = self._teacher(data)
        students = self._students(data, teacher)
        exported = exported_runs(recipe)
        self._runs = student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None)
        legs = list(itertools.product(exported, recipe.export.targets))
        float32 = {
            (student, target): self._export(target, exported[student], students[exported[student]], data)
            for student, target in legs
        }
        probes, _ = probe_all(recipe.bench.devices)
        variants = {leg: self._variants(leg[1], exported[leg[0]], float32[leg], data, probes) for leg in legs}
        bundles: dict[str, dict[str, Leg]] = {device: {} for device in probes}
        for (student, target), whole in float32.items():
            smaller = itertools.chain.from_iterable(its.items() for its in variants[student, target].values())
            every = {leg.id: (variant, leg) for variant, leg in [("float32", whole), *smaller]}
            packed = {
                id: self._package(target, variant, exported[student], leg, data) for id, (variant, leg) in every.items()
            }
            for device, its in variants[student, target].items():
                for variant, leg in [("float32", whole), *its.items()]:
                    name = _leg_name(student if len(exported) > 1 else "", target, variant)
                    bundles[device][name] = packed[leg.id]
        self.bundles = bundles
        stages = ("export", "quantize")
        models = [leg for leg in self._legs if leg.stage in stages and leg.name != "graph" and leg.refused is None]
        self._report(self._bench(bundles, data, probes), {"teacher": teacher, **students}, models)
        return self._legs

    def _leg(
        self,
        stage: str,
        name: str,
        make: str,
        config: BaseModel,
        inputs: Mapping[str, Leg],
        work: Work,
        command: Iterable[object] | None,
        *,
        perhaps: bool = False,
        besides: Iterable[Leg] = (),
        given: Mapping[str, Checkpoint] | None = None,
    ) -> Leg:
        """One more: ``make`` is the stage of its order, ``besides`` it waits for these. ``command`` lacks ``--out``.

        ``given``: further inputs, which no run makes.
        """
        perhaps = perhaps or any(leg.perhaps for leg in inputs.values())
        key = _key(make, config, inputs, given)
        path = None if key is None else self._chain.place(name, key)
        return self._add(stage, name, key, path, [*inputs.values(), *besides], command, work, perhaps)

    def _add(
        self,
        stage: str,
        name: str,
        key: str | None,
        path: Path | None,
        after: Iterable[Leg],
        command: Iterable[object] | None,
        work: Work,
        perhaps: bool = False,
        out: bool = True,
    ) -> Leg:
        ids = tuple(dict.fromkeys(leg.id for leg in after))
        told = list(command or ())
        words: tuple[str, ...] | None = None
        if told and path is not None and None not in told:  # all paths are known
            words = ("kdpipe", *map(str, told), *(("--out", str(path)) if out else ()))
            if told[0] in MAKES_NETWORKS:
                words += tuple(word for code in self._chain.allow_code for word in ("--allow-code", code))
        stale = (stage == self._again and stage != "bench") or bool(self._stale.intersection(ids))
        there = path is not None and not stale and (path / MANIFEST).is_file()
        leg = Leg(stage, name, key, path, there, ids, words, work, perhaps)
        if stale:
            self._stale.add(leg.id)
        if leg.id not in {other.id for other in self._legs}:
            self._legs.append(leg)
        return leg

    def _data(self) -> Leg:
        plan = self._recipe.data
        config = self._chain.data_order(plan, lambda: wants(self._recipe)).config
        side = config.copies_side
        stored = {"store": "none"} if side is None else {"store": "resized", "store_side": side}
        own = options_of(plan.model_copy(update=stored), leave_out=("source", "skip_broken"))
        command = ("data", config.source, *own, *(("--skip-broken",) if plan.skip_broken else ()))
        folder = Path(config.source)
        images = sum(1 for _ in list_images(folder)) if folder.is_dir() else 1
        work = forecast.reading(config.source, side, images)
        data = self._leg("data", "data", "data", config, {}, work, command)
        for spec in () if side is None else wants(self._recipe).specs:
            fitted = fitted_config(spec)
            work = forecast.fitting(fitted.size, data=data.key)
            self._leg("data", f"fitted-{size_words(fitted.size)}", "fitted", fitted, {"data": data}, work, None)
        return data

    def _teacher(self, data: Leg) -> Leg:
        plan = self._recipe.teacher
        if plan.start == "trained":
            return self._trained_teacher(data, plan)
        inputs = {"data": data}
        if has_body(plan):
            inputs["start"] = self._trained_teacher(data, plan.model_copy(update={"start": "trained"}))
        config = restart_config(plan)
        work = forecast.adopting(config.model_dump(mode="json"))
        command = ("teacher", data.path, *options_of(plan))
        return self._leg("teacher", restart_name(plan), "restart", config, inputs, work, command)

    def _trained_teacher(self, data: Leg, plan: TeacherPlan) -> Leg:
        if plan.is_trained:
            config = with_weights(with_code(plan.training()))
            work = forecast.training(config.model_dump(mode="json"), None, data=data.key)
            command = ("teacher", data.path, *options_of(plan))
            given = given_to(config)
            return self._leg("teacher", "teacher", "train", config, {"data": data}, work, command, given=given)
        adopted = adopt_config(plan)
        work = forecast.adopting(adopted.model_dump(mode="json"))
        command = ("teacher", data.path, *options_of(plan, leave_out=("train", "seed")))
        return self._leg("teacher", "teacher", "adopt", adopted, {"data": data}, work, command)

    def _students(self, data: Leg, teacher: Leg) -> dict[str, Leg]:
        recipe = self._recipe
        found = {}
        runs = student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None)
        for name, config in ((name, with_weights(with_code(run))) for name, run in runs.items()):
            taught_by = recipe.teacher.model if config.needs_teacher else None
            inputs = {"data": data} | ({"teacher": teacher} if config.needs_teacher else {})
            work = forecast.training(config.model_dump(mode="json"), taught_by, data=data.key)
            command = ("distill", (teacher if taught_by else data).path, "--data", data.path, *options_of(config))
            given = given_to(config)
            key = _key("train", config, inputs, given)
            there = key is not None and self._chain.place(name, key).exists()
            there = there and not self._stale and self._again != "distill"
            besides = [] if there or config.cache_views is None or not taught_by else [self._cache(config, inputs)]
            found[name] = self._leg(
                "distill", name, "train", config, inputs, work, command, besides=besides, given=given
            )
        return found

    def _cache(self, config: TrainConfig, inputs: Mapping[str, Leg]) -> Leg:
        from .distill.train import cache_config

        wanted = cache_config(config)
        assert wanted is not None
        asked = CachePlan.of(wanted, ModelSettings.of(config))
        command = ("cache", inputs["teacher"].path, "--data", inputs["data"].path, *options_of(asked))
        work = forecast.asking(wanted.model_dump(mode="json"), self._recipe.teacher.model, data=inputs["data"].key)
        return self._leg("distill", "cache", "cache", wanted, inputs, work, command)

    def _export(self, target: str, run: str, student: Leg, data: Leg) -> Leg:
        config = ExportConfig.of(self._recipe.export, target=target)
        source, model = student, self._runs[run].model
        if TARGETS[target].source is Graph:
            work = forecast.tracing(model)
            inputs = {"student": student, "data": data}
            source = self._leg("export", "graph", "graph", GraphConfig.of(config), inputs, work, None)
        command = ("export", student.path, "--data", data.path, *options_of(config))
        inputs = {TARGETS[target].source.kind: source, "data": data}
        work = forecast.writing(target, model)
        return self._leg("export", f"{target}-float32", "export", config, inputs, work, command)

    def _variants(
        self, target: str, run: str, float32: Leg, data: Leg, probes: Mapping[str, Probe]
    ) -> dict[str, dict[str, Leg]]:
        """For each device its variants by name."""
        plan = self._recipe.quantize
        found: dict[str, dict[str, Leg]] = {device: {} for device in probes}
        if plan is None:
            return found
        facts = None
        if float32.sealed and float32.path is not None:
            manifest = read_manifest(float32.path)
            check_provenance(float32.path, manifest)
            facts = Model.facts_of(manifest)
        for device, probe in probes.items():
            for name, kind in VARIANTS[target].items():
                wanted = kind.suits(facts, probe.known_flags) if plan.variants == "auto" else name in plan.variants
                if wanted is False:
                    continue
                config = suited(QuantizeConfig.of(plan, variant=name), probe.machine, probe.known_flags)
                command = ("quantize", float32.path, "--data", data.path, "--device", device, *options_of(config))
                work = forecast.shrinking(config.model_dump(mode="json"), target, self._runs[run].model)
                inputs = {"model": float32, "data": data}
                if plan.variants == "auto" and self._is_refused(f"{target}-{name}", config, inputs, work):
                    continue
                found[device][name] = self._leg(
                    "quantize", f"{target}-{name}", "quantize", config, inputs, work, command, perhaps=wanted is None
                )
        return found

    def _is_refused(self, name: str, config: QuantizeConfig, inputs: Mapping[str, Leg], work: Work) -> bool:
        """Whether an earlier run found a variant refused, which then is a leg that nothing comes after."""
        key, after = _key("quantize", config, inputs), tuple(leg.id for leg in inputs.values())
        if key is None or self._again == "quantize" or self._stale.intersection(after):
            return False
        refusal = self._chain.refusal(name, key)
        if refusal is None:
            return False
        reason = refusal.facts.reason
        leg = Leg("quantize", Refusal.name_of(name), key, refusal.path, True, after, None, work, refused=reason)
        if leg.id not in {other.id for other in self._legs}:  # of another device
            self._legs.append(leg)
        return True

    def _package(self, target: str, variant: str, run: str, model: Leg, data: Leg) -> Leg:
        config = self._recipe.package
        command = ("package", model.path, "--data", data.path, *options_of(config))
        work = forecast.packing(target, variant, self._runs[run].model)
        inputs = {"model": model, "data": data}
        return self._leg("package", f"bundle-{target}-{variant}", "package", config, inputs, work, command)

    def _bench(
        self, bundles: Mapping[str, Mapping[str, Leg]], data: Leg, probes: Mapping[str, Probe]
    ) -> tuple[list[Leg], dict[str, str | None]]:
        """The sessions of this run; and the keys of all that a report is made of, by role."""
        plan = _bench_plan(self._recipe, probes)
        sessions = {device: self._session(plan, device, probes[device], its, data) for device, its in bundles.items()}
        turns = [
            (0 if session.sealed else number, device, number)
            for device, session in sessions.items()
            for number in session.numbers
        ]
        legs = []
        keys: dict[str, str | None] = {}
        for device, session in sessions.items():
            keys |= {f"measurement-{device}-{number}": key for number, key in session.earlier.items()}
        for _, device, number in sorted(turns, key=lambda turn: turn[0]):
            session = sessions[device]
            name = f"measurement-{device}-{number}"
            key, path = None, None
            if session.key is not None:
                attempt = session.config.model_copy(update={"attempt": number})
                key = _key("bench", attempt, session.inputs)
                path = self._chain.place("measurement", session.key, number)
            after = session.inputs.values()
            legs.append(self._add("bench", name, key, path, after, session.command, session.work, out=False))
            keys[name] = key
        return legs, keys

    def _session(self, plan: BenchPlan, device: str, probe: Probe, bundles: Mapping[str, Leg], data: Leg) -> _Session:
        """What is measured of a device, and how often."""
        config = bench_config(plan, device, probe)
        inputs = {**swept(bundles, plan.threads), "data": data}
        key = None if any(leg.perhaps for leg in inputs.values()) else _key("bench", config, inputs)
        earlier: dict[Path, Manifest] = {}
        if key is not None and not self._stale.intersection(leg.id for leg in inputs.values()):
            keys = {role: leg.key for role, leg in inputs.items() if leg.key is not None}
            earlier = attempts(self._chain.folder, config.model_dump(mode="json"), keys)
        last = max(map(attempt_of, earlier.values()), default=0)
        goal = plan.sessions + (last if self._again == "bench" else 0)
        sealed = last >= goal
        numbers = [attempt_of(earlier[believed(earlier)])] if sealed else list(range(last + 1, goal + 1))
        options = options_of(plan.model_copy(update={"sessions": 1}), leave_out=("devices",))
        paths = dict.fromkeys(leg.path for leg in bundles.values())
        return _Session(
            config=config,
            inputs=inputs,
            key=key,
            earlier={attempt_of(manifest): manifest.key for manifest in earlier.values()},
            sealed=sealed,
            numbers=numbers,
            command=("bench", *paths, "--data", data.path, "--device", device, *options),
            work=forecast.benching(config.model_dump(mode="json"), device, len(inputs) - 1),
        )

    def _report(
        self, measured: tuple[list[Leg], dict[str, str | None]], checkpoints: Mapping[str, Leg], models: Iterable[Leg]
    ) -> None:
        sessions, keys = measured
        inputs = {**keys, **{name: leg.key for name, leg in checkpoints.items()}}
        inputs |= {f"model-{str(leg.key)[:12]}": leg.key for leg in models}
        inputs |= {f"graph-{str(leg.key)[:12]}": leg.key for leg in self._legs if leg.name == "graph"}
        inputs |= {leg.name: leg.key for leg in self._legs if leg.name == "data"}
        known = {role: key for role, key in inputs.items() if key is not None}
        config = _report_config(self._recipe, self._chain)
        key = order_key("report", config, known) if len(known) == len(inputs) else None
        path = None if key is None else self._chain.place("report", key)
        last = {leg.name.rpartition("-")[0]: leg for leg in sessions}  # of each device
        after = [*sessions, *checkpoints.values()]
        paths = [leg.path for leg in [*last.values(), *checkpoints.values()]]
        command = ("report", *paths, *options_of(config))
        self._add("report", "report", key, path, after, command, forecast.reporting())


class _Session(NamedTuple):
    """The sessions of a device: which are wanted now, and which there were."""

    config: BenchConfig
    inputs: Mapping[str, Leg]
    key: str | None  # of the session, whatever the attempt
    earlier: Mapping[int, str]  # keys of the attempts that are sealed
    sealed: bool
    numbers: Sequence[int]
    command: Sequence[object]
    work: Work


def _key(
    make: str, config: BaseModel, inputs: Mapping[str, Leg], given: Mapping[str, Checkpoint] | None = None
) -> str | None:
    """The key of an order, where those of its inputs are known; those that are ``given`` are."""
    known = {role: leg.key for role, leg in inputs.items() if leg.key is not None}
    if len(known) < len(inputs):
        return None
    return order_key(make, config, known | {role: checkpoint.key for role, checkpoint in (given or {}).items()})


class _Course:
    """Where a run is among its legs, and about how long the rest takes."""

    def __init__(self, legs: Sequence[Leg], chain: Chain, diary: Diary | None = None) -> None:
        self._chain, self._diary = chain, diary
        self._done: list[str] = []
        self.know(legs)

    def know(self, legs: Sequence[Leg]) -> None:
        """Take what is known of the whole run by now."""
        wanted = (leg for leg in legs if not leg.perhaps and leg.refused is None)
        self._open = {leg.id: leg for leg in wanted if leg.id not in self._done}
        self._total = len(self._done) + len(self._open)

    @cached_property
    def _forecast(self) -> Forecast:
        """Read where something is to be made at all."""
        return forecast_of(self._chain)

    def begin(self, path: Path) -> str:
        """As ``chain.Course`` has it."""
        left = {leg.id: self._forecast.cost(leg.work) for leg in self._open.values() if not leg.sealed}
        if self._diary is not None:
            self._diary.begin(path.name, {id: cost.seconds for id, cost in left.items()}, len(self._done))
        words = forecast.total(left.values()).left()
        place = len(self._done) + 1
        return f"{place} of {max(self._total, place)}" + (f", {words}" if words else "")

    def end(self, artifact: AnyArtifact, *, made: bool) -> str:
        """As ``chain.Course`` has it."""
        self._done.append(artifact.path.name)
        self._open.pop(artifact.path.name, None)
        if made:
            self._forecast.learn(artifact.manifest)
        if self._diary is not None:
            self._diary.end(artifact.path.name)
        place = len(self._done)
        total = max(self._total, place)
        return f"{place:>{len(str(total))}}/{total}"

    def fail(self, path: Path, error: KdpipeError) -> None:
        """As ``chain.Course`` has it."""
        self._open.pop(path.name, None)
        if self._diary is not None:
            self._diary.fail(path.name, str(error), int(error.exit_code))

    def forgive(self, path: Path) -> None:
        """As ``chain.Course`` has it."""
        if self._diary is not None:
            self._diary.forgive(path.name)


def forecast_of(chain: Chain) -> Forecast:
    """What work took so far, by what is sealed in the folder."""
    return Forecast(manifest for _, manifest in sealed(chain.folder, skip=UserError))


def costs(legs: Iterable[Leg], known: Forecast) -> list[Cost]:
    """What each leg takes; nothing where it is sealed."""
    return [forecast.SEALED if leg.sealed else known.cost(leg.work) for leg in legs]


def probe_all(devices: Iterable[str]) -> tuple[dict[str, Probe], dict[str, KdpipeError]]:
    """What each device is, and why some could not be reached. Raises UserError for an unknown one, or none left."""
    from .devices import find_device

    probes: dict[str, Probe] = {}
    lost: dict[str, KdpipeError] = {}
    for device in devices:
        try:
            probes[device] = find_device(device).probe()
        except DeviceLost as error:
            lost[device] = error
    if not probes:
        raise next(iter(lost.values()))
    return probes, lost


def _named(bundles: Mapping[str, Mapping[str, Bundle]]) -> dict[str, Bundle]:
    """The bundles of all devices, each once."""
    found: dict[str, Bundle] = {}
    for device, its in bundles.items():
        for name, bundle in its.items():
            if found.setdefault(name, bundle).key != bundle.key:
                found[f"{name}-{device}"] = bundle
    return found
