"""What a recipe means: which stages, in which order, for which students, targets and devices."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .chain import TRAIN_NEEDS, Chain, Wants, believed_beside
from .core.config import (
    DistillPlan,
    DistillSettings,
    ExportConfig,
    ModelSettings,
    Recipe,
    ReportConfig,
    TrainConfig,
    changed,
    control_of,
)
from .core.errors import DeviceLost, KdpipeError, UserError, choice
from .core.kinds import Bundle, Graph, Measurement, Model, Probe, Report, unshown
from .core.proc import require
from .core.progress import note
from .data.sources import check_source

AGAIN = ("bench",)  # events: other stages give the same when they are done again

if TYPE_CHECKING:
    from .report.plots import Figure
    from .report.shown import Table


def check_names(recipe: Recipe) -> None:
    """Refuse what can be told in a second, without PyTorch: names and files. Raises UserError."""
    from .devices import find_device
    from .export import TARGETS
    from .networks.names import check_name
    from .quantize import VARIANTS

    checkpoint = recipe.teacher.checkpoint
    check_source(recipe.data)
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"teacher.checkpoint: no file at {checkpoint}: wanted .safetensors or .pth")
    for device in recipe.bench.devices:
        find_device(device)
    check_name(recipe.teacher.model)
    for config in student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None).values():
        check_name(config.model)
    for target in recipe.export.targets:
        if target not in TARGETS:
            raise choice("target", target, TARGETS)
    if recipe.quantize is not None and recipe.quantize.variants != "auto":
        known = {name for target in recipe.export.targets for name in VARIANTS[target]}
        for name in recipe.quantize.variants:
            if name not in known:
                raise choice("variant", name, known)


def check_recipe(recipe: Recipe) -> None:
    """Refuse before any work what a later stage would refuse: names, packages, networks. Raises UserError."""
    from .export import TARGETS
    from .export.onnx import NEEDS as GRAPH_NEEDS
    from .quantize import VARIANTS

    check_names(recipe)
    _, lost = probe_all(recipe.bench.devices)
    for device, error in lost.items():
        note(f"'{device}' may be lost when it is to be measured: {error}")
    require("training", TRAIN_NEEDS, "train")
    require("the report", ("jinja2", "matplotlib"), "report")
    for target in recipe.export.targets:
        require(f"target '{target}'", TARGETS[target].needs, target)
        if TARGETS[target].source is Graph:
            require("ONNX", GRAPH_NEEDS, target)
        if recipe.quantize is not None:
            for name, variant in VARIANTS[target].items():
                if recipe.quantize.variants == "auto" or name in recipe.quantize.variants:
                    require(f"{name} for '{target}'", variant.needs, target)
    from .distill.train import check_run

    check_run(recipe.teacher, None if recipe.teacher.checkpoint else recipe.teacher.train)
    if recipe.distill.tracker != "none":
        from .distill.trackers import TRACKERS

        require(f"tracker '{recipe.distill.tracker}'", TRACKERS[recipe.distill.tracker].needs, recipe.distill.tracker)
    of_one_seed = recipe.distill.model_copy(update={"seeds": recipe.distill.seeds[:1]})  # the others are like it
    for config in student_runs(recipe.student, of_one_seed, recipe.data.unlabeled is not None).values():
        check_run(config, config.train)


def student_runs(student: ModelSettings, plan: DistillPlan, unlabeled: bool = False) -> dict[str, TrainConfig]:
    """Every run of the plan by name: per seed the method, each of ``plan.students``, and their controls.

    A student that changes the method has that method's own weights unless it names others. A control has its
    student's network and training, and the labels alone at full weight; with images that are ``unlabeled`` a second
    one makes as many steps as the student that sees them too. Raises UserError.
    """
    main = TrainConfig.of(student, plan)
    students: dict[str, TrainConfig] = {plan.method: main}
    for name, change in plan.students.items():
        # A student's control is called labels-NAME, and with unlabelled images labels-steps-NAME.
        if name in students or name == "labels" or name.partition("-")[0] == "steps":
            raise UserError(f"distill.students: the name '{name}' is taken, choose another")
        students[name] = changed(main, change, f"distill.students.{name}")
        if students[name].method != plan.method:
            own = {field: getattr(DistillSettings(), field) for field in ("label_weight", "kd_weight")}
            students[name] = students[name].model_copy(update={k: v for k, v in own.items() if k not in change})
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


@dataclass(frozen=True)
class Outcome:
    """What a run ends with; ``table`` and ``figure`` show themselves in a notebook.

    ``bundles`` are those of all devices, by name: one that a further device has in a form of its own is called
    ``NAME-DEVICE``. ``measurements`` has of each device one session, ``lost`` says in a line which could not be
    measured and why.
    """

    report: Report
    measurements: dict[str, Measurement]
    bundles: dict[str, Bundle]
    lost: str

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

    The shipped student is the one of the first seed by the method: chosen beforehand, never by its test
    accuracy. Each device measures the variants that suit it. Sessions are measured until there are as many as the
    recipe says; with ``again="bench"`` as many more.

    Raises:
        KdpipeError: as its stages do.
    """
    if again not in (None, *AGAIN):
        raise choice("stage to do again", again, AGAIN)
    check_names(recipe)  # before a folder of images is read, which may take minutes
    chain.check = lambda: check_recipe(recipe)
    dataset = chain.data(recipe.data, wants=lambda: wants(recipe))
    teacher = chain.teacher(recipe.teacher, dataset)
    checkpoints = {"teacher": teacher}
    runs = student_runs(recipe.student, recipe.distill, recipe.data.unlabeled is not None)
    checkpoints |= chain.train_all(runs, dataset, teacher, recipe.distill.together)
    shipped = checkpoints[f"student-{recipe.distill.method}-seed{recipe.distill.seeds[0]}"]

    probes, lost = probe_all(recipe.bench.devices)
    bundles: dict[str, dict[str, Bundle]] = {device: {} for device in probes}
    for target in recipe.export.targets:
        float32 = chain.export(ExportConfig.of(recipe.export, target=target), shipped, dataset)
        variants: dict[str, list[Model]] = {device: [] for device in probes}
        if recipe.quantize is not None:
            variants = chain.variants_of(recipe.quantize, float32, dataset, probes)
        models = {model.key: model for model in [float32, *itertools.chain.from_iterable(variants.values())]}
        if told := unshown(models.values()):
            note(told)
        packed = {key: chain.package(recipe.package, model, dataset) for key, model in models.items()}
        for device, its in variants.items():
            for model in [float32, *its]:
                bundles[device][f"{target}-{model.facts.variant}"] = packed[model.key]
    plan = recipe.bench.model_copy(update={"devices": tuple(probes)})
    benched = chain.bench(plan, bundles, dataset, again=again == "bench")
    page = ReportConfig(title=recipe.name)
    if recipe.quantize is not None and recipe.quantize.max_drop is not None:
        page = page.model_copy(update={"max_drop": recipe.quantize.max_drop})
    report = chain.report(page, benched.one_of_each, checkpoints)
    benched.lost.update(lost)
    measurements = {found.facts.device: found for found in map(believed_beside, benched.one_of_each)}
    return Outcome(report, measurements, _named(bundles), benched.told_lost)


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
