"""What the manifests and raw logits of a chain say, as plain numbers; the same on the page and in a terminal.

Accuracies are shares (0..1), everything else carries its unit in its name. An interval is a mapping of
value, low, high and n, where a bound of None means "n too small". What could not be read is None.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import AnyArtifact, Provenance, find_ancestors
from ..core.config import ReportConfig, TrainConfig, control_of, validated
from ..core.errors import UserError
from ..core.kinds import (
    Bundle,
    Checkpoint,
    Comparison,
    Damage,
    Graph,
    Measurement,
    Model,
    ParityFacts,
    float32_by_bundle,
    may_guess,
)
from ..core.sealed import printable
from ..core.stats import Interval, holm_levels, mean_interval
from ..data.dataset import Dataset
from ..runtime.task import TASKS, Task
from . import words
from .answers import answers, judged, scores
from .compression import Packed, Sources, advice, flips, guards, noise_by_layer
from .decision import decision
from .faults import faults, faults_table
from .images import image_numbers
from .pooled import Pooled, pool

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TASK_FIELDS = ("name", "metric", "unit", "counted", "summary_note", "change_note")

Numbers = dict[str, Any]
Checkpoints = Mapping[str, Checkpoint]
Shown = Callable[[str, str], bool]  # of the first of two bundles, over the second


def collect(
    config: ReportConfig, sessions: Mapping[str, Sequence[Measurement]], checkpoints: Checkpoints, sources: Sources
) -> Numbers:
    """Every number of the report, JSON-serialisable and finite.

    What is measured is told by device, never one device's beside another's: nothing is ranked over devices.

    Args:
        sessions: by device every attempt at one session, in their order.

    Raises:
        UserError: a checkpoint that was tested on other images than the bundles.
    """
    for measurement in itertools.chain.from_iterable(sessions.values()):
        check_results(measurement)
    devices = {device: pool(attempts) for device, attempts in sessions.items()}
    shown = {device: pooled.shown for device, pooled in devices.items()}
    first = next(iter(shown.values()))
    task = TASKS[first.facts.task]
    bundles = each_bundle(shown)
    told = [device_numbers(config, pooled, checkpoints, sources) for pooled in devices.values()]
    return {
        "schema_version": config.version,
        "title": config.title,
        "smoke": config.smoke,
        "missing": list(config.missing),
        "task": {name: getattr(task, name) for name in TASK_FIELDS},
        "measured_utc": max(measurement.manifest.created_utc for measurement in shown.values()),
        "chain": chain(shown.values(), checkpoints),
        "devices": told,
        "answers": told_answers(task, first, told[0], sources),
        "networks": networks(shown.values(), checkpoints),
        "flips": flips(first, _variants(told[0]["hops"], bundles_of(first)), first.labels, sources),
        "noise_by_layer": noise_by_layer(bundles, sources),
        "guards": guards(bundles),
        "gains": distillation_gains(checkpoints),
        "curves": curves(checkpoints),
        "images": image_numbers(sources.dataset),
        "lineage": lineage(shown, checkpoints),
        "environment": environment(shown.values(), checkpoints),
    }


def device_numbers(config: ReportConfig, pooled: Pooled, checkpoints: Checkpoints, sources: Sources) -> Numbers:
    """What was measured on one device, and what it comes to."""
    shown, facts = pooled.shown, pooled.facts
    faster, rows = surely_faster(facts.comparisons), bundle_rows(pooled)
    better = surely_better(shown, believed(rows))
    front = pareto_front(rows, faster, better)
    hops = name_students(accuracy_hops(shown, checkpoints, sources.graphs), checkpoints)
    rows = name_students(rows, checkpoints)
    advised = [
        _guessing(each, rows, shown)
        for student in dict.fromkeys(row["student"] for row in rows)
        for each in advice([row for row in rows if row["student"] == student], hops, config.max_drop, faster, student)
    ]
    decided = decision(advised, rows, config.max_drop, faster, better, facts.emulated)
    return {
        "device": facts.device,
        "decision": {**decided, "file": file_of(decided["bundle"], shown, sources)},
        "trust": trust(pooled),
        "bundles": [{**row, "pareto": any(row["name"] in place for place in front)} for row in rows],
        "front": front,
        "advice": advised,
        "hops": hops,
        "faults": faults(shown, bundles_of(shown)),
        "probe_before": shown.facts.probe_before.model_dump(),
        "probe_after": shown.facts.probe_after.model_dump(),
        "runtimes": {
            name: result.session.model_dump() for name, result in facts.results.items() if result.session is not None
        },
    }


def _guessing(advised: Numbers, rows: Sequence[Numbers], shown: Measurement) -> Numbers:
    """``advised``, with the figure of guessing where it is not shown to be better."""
    task = TASKS[shown.facts.task]
    accuracy = next(row["accuracy"] for row in rows if row["name"] == advised["bundle"])
    share = None if accuracy is None else task.guessing(shown.labels)
    guesses = accuracy is not None and may_guess(Interval(**accuracy), share)
    found = {"share": share, "metric": task.metric, "unit": task.unit} if guesses else None
    return {**advised, "guessing": found}


def name_students(rows: Sequence[Numbers], checkpoints: Checkpoints) -> list[Numbers]:
    """The rows with the names of their students in place of the keys; none where there is one student alone."""
    if len({row["student"] for row in rows}) < 2:
        return [{**row, "student": ""} for row in rows]
    names = {found.key: name for name, found in checkpoints.items()}
    return [{**row, "student": names.get(row["student"], row["student"][:12])} for row in rows]


def file_of(name: str | None, measurement: Measurement, sources: Sources) -> Numbers | None:
    """Where the bundle lies, and which file of it the runtime opens; None where it was not found."""
    bundle = None if name is None else bundles_of(measurement)[name]
    folder = None if bundle is None else sources.bundles.get(bundle.source.key)
    return None if bundle is None or folder is None else {"folder": str(folder), "entry": bundle.facts.entry}


def told_answers(task: Task, measurement: Measurement, device: Numbers, sources: Sources) -> Numbers | None:
    """The answers of the bundle to ship, else of the first smaller one, else of the first; None where none was run."""
    bundles = bundles_of(measurement)
    run = [name for name in bundles if measurement.outputs_name(name) in measurement.manifest.files]
    smaller = [name for name in run if bundles[name].facts.precision != "float32"]
    name = next((name for name in (device["decision"]["bundle"], *smaller, *run) if name in run), None)
    if name is None:
        return None
    base = float32_of(name, bundles)
    return answers(task, measurement, name, base if base in run and base != name else None, sources)


def _variants(hops: Sequence[Numbers], bundles: Mapping[str, Packed]) -> list[tuple[str, str]]:
    """Pairs of a float32 bundle and a variant of it."""
    return [
        (base, step["bundle"])
        for hop in hops
        for step in hop["steps"]
        if step["variant"] and (base := float32_of(step["bundle"], bundles)) is not None
    ]


def bundles_of(measurement: Measurement) -> dict[str, Packed]:
    """The bundles that were measured, by name."""
    return {
        name: Packed(Bundle.facts_of(source), source)
        for name, source in measurement.manifest.inputs.items()
        if source.kind == Bundle.kind
    }


def each_bundle(measurements: Mapping[str, Measurement]) -> dict[str, Packed]:
    """Every bundle of several devices once; one whose name another has on an earlier device is called after its own.

    One that is timed on several numbers of threads stands under its first row.
    """
    found: dict[str, Packed] = {}
    keys = set()
    for device, measurement in measurements.items():
        for name, bundle in bundles_of(measurement).items():
            if bundle.source.key not in keys:
                keys.add(bundle.source.key)
                found[name if name not in found else f"{name} on {device}"] = bundle
    return found


def check_results(measurement: Measurement) -> None:
    """See that there is a result of every bundle, and that they can be paired by process. Raises UserError."""
    results, bundles = measurement.facts.results, bundles_of(measurement)
    if not bundles:
        raise UserError(f"{measurement.path} was made from no bundle: nothing to report")
    for name in bundles:
        if name not in results:
            raise UserError(f"{measurement.path} has no result of '{name}': measure again")
    timed = [results[name].latency_p50_by_process_ms for name in bundles]
    if len({len(processes) for processes in timed if processes}) > 1:
        raise UserError(f"{measurement.path} timed its bundles in different numbers of processes: measure again")


def teacher_names(checkpoints: Checkpoints) -> set[str]:
    """Checkpoints that taught another one, and the one that is called so; not those that one began as."""
    taught_by = {
        source.key
        for student in checkpoints.values()
        for role, source in student.manifest.inputs.items()
        if role == "teacher"
    }
    return {name for name, checkpoint in checkpoints.items() if name == "teacher" or checkpoint.key in taught_by}


def chain(measurements: Iterable[Measurement], checkpoints: Checkpoints) -> Numbers:
    """Who taught whom on what, and where the result went."""
    inputs = [source for measurement in measurements for source in measurement.manifest.inputs.values()]
    bundles = [Packed(Bundle.facts_of(source), source) for source in inputs if source.kind == Bundle.kind]
    shipped = {bundle.student_key for bundle in bundles}
    data = next((source for source in inputs if source.kind == Dataset.kind), None)
    teachers = teacher_names(checkpoints)
    return {
        "teachers": [network(name, checkpoints[name]) for name in checkpoints if name in teachers],
        "students": [network(name, found) for name, found in checkpoints.items() if found.key in shipped],
        "data": data.facts if data else None,
        "targets": list(dict.fromkeys(bundle.facts.target for bundle in bundles)),
        "variants": list(dict.fromkeys(bundle.facts.variant for bundle in bundles)),
    }


def networks(measurements: Iterable[Measurement], checkpoints: Checkpoints) -> list[Numbers]:
    """Every network that is compared: the teachers, then the students, and which of those were shipped."""
    shipped = {bundle.student_key for measurement in measurements for bundle in bundles_of(measurement).values()}
    teachers = teacher_names(checkpoints)
    found = [
        {**network(name, checkpoint), "teacher": name in teachers, "shipped": checkpoint.key in shipped}
        for name, checkpoint in checkpoints.items()
    ]
    return sorted(found, key=lambda row: not row["teacher"])


def network(name: str, checkpoint: Checkpoint) -> Numbers:
    facts, config = checkpoint.facts, checkpoint.settings
    return {
        "name": name,
        "model": facts.model,
        "parameters": facts.parameters,
        "macs": facts.macs,
        "method": facts.method,
        "training_images": facts.training_images,
        "label_fraction": config.get("label_fraction"),
        "seed": config.get("seed"),
        "accuracy": _torch_accuracy(checkpoint),
    }


def _torch_accuracy(checkpoint: Checkpoint) -> Numbers:
    task = TASKS[checkpoint.facts.task]
    outputs, labels = checkpoint.tested
    return task.summary(_tested_scores(task, checkpoint, outputs, labels))._asdict()


def _tested_scores(task: Task, checkpoint: Checkpoint, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if (wanted := task.mislabeled(labels, outputs)) is not None:
        raise UserError(f"{checkpoint.path} was tested on labels beyond its outputs: wanted {wanted}; make it again")
    return task.scores(outputs, labels)


def trust(pooled: Pooled) -> Numbers:
    """The device's worst word, whose latencies are not to be believed, and what its A/A controls leave open."""
    facts, config = pooled.facts, pooled.shown.settings
    return {
        "device": facts.device,
        "emulated": facts.emulated,
        "word": facts.trust,
        "timed": sum(result.trust is not None for result in facts.results.values()),
        "untrusted": [{"name": name, **found.model_dump()} for name, found in facts.untrusted.items()],
        "resolution": facts.resolution,
        "controls": {name: control.as_dict() for name, control in facts.controls.items()},
        "rounds": config["rounds"],
        "threads": config["threads"],
        "effort": config["effort"],
        "cold_starts": config["cold_starts"],
        "page_cache": config["page_cache"],
        "attempt": config["attempt"],
        "attempts": len(pooled.attempts),
        "sessions": max(pooled.sessions.values(), default=0),
    }


def bundle_rows(pooled: Pooled) -> list[Numbers]:
    rows, shown = [], pooled.shown
    task, bundles = TASKS[shown.facts.task], bundles_of(shown)
    said = {
        name: judged(task, outputs, shown.labels, scores(shown, name)) for name, outputs in shown.all_outputs(bundles)
    }
    for name, bundle in bundles.items():
        result = pooled.facts.results[name]
        student = next(iter(find_ancestors(bundle.source, Checkpoint)), None)
        made_of = None if student is None else Checkpoint.facts_of(student)
        rows.append(
            {
                "name": name,
                "target": bundle.facts.target,
                "variant": bundle.facts.variant,
                "student": bundle.student_key or "",
                "status": result.status,
                "trust": None if result.trust is None else result.trust.model_dump(),
                "sessions": pooled.sessions[name],
                "against_host": None if result.against_host is None else result.against_host.model_dump(),
                "accuracy": _plain(result.accuracy),
                **said.get(name, {"balanced": None, "calibration": None}),
                "parameters": None if made_of is None else made_of.parameters,
                "macs": None if made_of is None else made_of.macs,
                "latency_p50_ms": _plain(result.latency_p50_ms),
                "latency_p90_ms": _plain(result.latency_p90_ms),
                "latency_p95_ms": _plain(result.latency_p95_ms),
                "latency_p99_ms": _plain(result.latency_p99_ms),
                "latency_over_float32": _plain(result.over_float32),
                "end_to_end_ms": _plain(result.end_to_end_ms),
                "prepare_ms": result.prepare_ms,
                "whole_frame": None if result.whole_frame is None else result.whole_frame.model_dump(mode="json"),
                "size_bytes": bundle.facts.size_bytes,
                "start_ms": _plain(result.start_ms),
                "import_ms": _median(result.import_ms),
                "load_ms": _median(result.load_ms),
                "compile_ms": _median(result.compile_ms),
                "first_inference_ms": _median(result.first_inference_ms),
                "memory_growth_bytes": result.memory_growth_bytes,
                "warm_up_settled": result.warm_up_settled,
                "stable": result.stable,
                "slowed_after_seconds": None if result.sustained is None else result.sustained.slowed_after_seconds,
                "executed": result.executed,
                "threads": None if result.placement is None else result.placement.threads,
                "cpus": None if result.placement is None else result.placement.cpus,
            }
        )
    return rows


def float32_of(name: str, bundles: Mapping[str, Packed]) -> str | None:
    """The float32 bundle of the same target and student."""
    return float32_by_bundle({other: bundle.source for other, bundle in bundles.items()}).get(name)


def _plain(interval: Interval | None) -> Numbers | None:
    return None if interval is None else interval.as_dict()


def _median(values: Sequence[float] | None) -> float | None:
    return float(np.median(values)) if values else None


def believed(rows: Sequence[Numbers]) -> list[str]:
    """Names of the rows whose latency is trusted: what may be ranked."""
    return [row["name"] for row in rows if row["trust"] and row["trust"]["word"] == "trusted"]


def surely_faster(comparisons: Sequence[Comparison]) -> Shown:
    """Whether the session shows the first of two bundles to be faster than the second."""
    found = set()
    for each in comparisons:
        if each.differ:
            found.add((each.first, each.second) if each.ratio.value < 1 else (each.second, each.first))
    return lambda first, second: (first, second) in found


def surely_better(measurement: Measurement, names: Sequence[str]) -> Shown:
    """Whether the first of two bundles of ``names`` is shown to be more accurate, corrected for all pairs (Holm)."""
    task = TASKS[measurement.facts.task]
    found = {name: scores(measurement, name) for name, _ in measurement.all_outputs(names)}
    pairs = list(itertools.combinations(found, 2))
    changes = [task.change(found[first], found[second]) for first, second in pairs]
    differ, _ = holm_levels([change.p_value for change in changes])
    better = {
        pair[::-1] if change.difference > 0 else pair
        for pair, change, shown in zip(pairs, changes, differ, strict=True)
        if shown
    }
    return lambda first, second: (first, second) in better


def pareto_front(rows: Sequence[Numbers], faster: Shown, better: Shown) -> list[list[str]]:
    """The places on the front of accuracy and median latency, fastest first; those who share a place tie.

    A row is beaten by one that is shown to be faster or more accurate, and not shown to be slower or less accurate.
    Rows whose latency is not trusted take no part. Each of those who share a place ties with all of the others.
    """
    latency = {row["name"]: row["latency_p50_ms"]["value"] for row in rows if row["accuracy"] and row["latency_p50_ms"]}
    names = sorted((name for name in believed(rows) if name in latency), key=latency.__getitem__)

    def beats(mine: str, other: str) -> bool:
        worse = faster(other, mine) or better(other, mine)
        return not worse and (faster(mine, other) or better(mine, other))

    def tie(mine: str, other: str) -> bool:
        return not any(shown(*pair) for shown in (faster, better) for pair in ((mine, other), (other, mine)))

    places: list[list[str]] = []
    for name in names:
        if any(beats(other, name) for other in names):
            continue
        shared = next((place for place in places if all(tie(name, other) for other in place)), None)
        if shared is None:
            places.append([name])
        else:
            shared.append(name)
    return places


def accuracy_hops(measurement: Measurement, checkpoints: Checkpoints, graphs: Mapping[str, Graph]) -> list[Numbers]:
    """Per target: torch, ONNX as exported and simplified, the float32 file; then every variant.

    Each against the one before, variants against the float32 file, image by image. The ONNX hops may have been
    tested on fewer images.
    """
    task, bundles, labels = TASKS[measurement.facts.task], bundles_of(measurement), measurement.labels
    found = {name: scores(measurement, name) for name, _ in measurement.all_outputs(bundles)}
    chains: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(found, key=lambda name: bundles[name].facts.precision != "float32"):
        chains.setdefault((bundles[name].facts.target, bundles[name].student_key), []).append(name)
    hops = []
    for (target, key), names in chains.items():
        student = next((found for found in checkpoints.values() if found.key == key), None)
        torch_scores = None if student is None else _torch_scores(task, student, labels)
        steps = [] if torch_scores is None else [_step(task, "torch", None, torch_scores)]
        ancestors = find_ancestors(bundles[names[0]].source, Graph)
        graph = next((graphs[found.key] for found in ancestors if found.key in graphs), None)
        if graph is not None and torch_scores is not None:
            steps += _graph_steps(task, graph, torch_scores, labels)
        for name in names:
            base, facts = float32_of(name, bundles), bundles[name].facts
            before = found[base] if base in found and base != name else torch_scores
            step = _step(task, facts.variant, before, found[name], facts.parity, facts.against_float32)
            steps.append({**step, "bundle": name, "variant": base in found and base != name})
        ran = _where_run(measurement, names[0], bundles[names[0]])
        hops.append({"target": target, "student": key or "", "ran": ran, "steps": steps})
    return hops


def _graph_steps(task: Task, graph: Graph, torch_scores: np.ndarray, labels: np.ndarray) -> list[Numbers]:
    steps, parity = [], graph.facts.parity
    hops = graph.hops
    positions = hops["positions"]
    if positions.min() < 0 or positions.max() >= len(labels):
        raise UserError(f"{graph.path} was tested on other images than the bundles: make it again")
    before = torch_scores[positions]
    for name, found in (("exported", parity.exported), ("simplified", parity.simplified)):
        after = task.scores(hops[name], labels[positions])
        steps.append(_step(task, name, before, after, found))
        before = after
    return steps


def _torch_scores(task: Task, student: Checkpoint, labels: np.ndarray) -> np.ndarray:
    outputs, tested = student.tested
    # Labels of every pixel come in the size of a network's input: in another size their images are known by number.
    comparable = tested.shape == labels.shape or not task.dense or tested.ndim != labels.ndim
    if len(tested) != len(labels) or (comparable and not np.array_equal(tested, labels)):
        raise UserError(
            f"{student.path} was tested on other images than the bundles: give the measurement's own student"
        )
    return _tested_scores(task, student, outputs, labels)


def _where_run(measurement: Measurement, name: str, bundle: Packed) -> str:
    """Empty on this host with the target's own runtime."""
    ran_by = measurement.facts.results[name].accuracy_by
    if ran_by == bundle.facts.stand_in:
        return f"by {ran_by}"
    device = measurement.facts.device
    return "" if device == "local" else f"on {device}"


def _step(
    task: Task,
    at: str,
    before: np.ndarray | None,
    after: np.ndarray,
    parity: ParityFacts | None = None,
    damage: Damage | None = None,
) -> Numbers:
    """One hop: accuracy and flips on the test images, and what export and quantize found on training images."""
    return {
        "at": at,
        "bundle": None,
        "variant": False,
        "accuracy": task.summary(after)._asdict(),
        **_change(task, before, after),
        "parity_max_difference": parity and parity.max_difference,
        "parity_relative_difference": parity and parity.relative_difference,
        "signal_to_noise_db": damage and damage.signal_to_noise_db,
    }


def _change(task: Task, before: np.ndarray | None, after: np.ndarray) -> Numbers:
    if before is None:
        return {"lost": None, "won": None, "difference": None, "mcnemar_p": None}
    found = task.change(before, after)
    difference = {"value": found.difference, "low": found.low, "high": found.high, "n": found.n}
    return {"lost": found.lost, "won": found.won, "difference": difference, "mcnemar_p": found.p_value}


def distillation_gains(checkpoints: Checkpoints) -> list[Numbers]:
    """Per method (and setting): each seed against its control, and the gain over the seeds.

    A control differs in the method alone; where there is none, also in the epochs. With images without labels there is
    one of as many steps too, and a gain against each. A seed without a control has no gain.
    """
    teachers = teacher_names(checkpoints)
    runs = [found for name, found in checkpoints.items() if found.manifest.stage == "train" and name not in teachers]
    controls: dict[tuple[int, bool], dict[str, Checkpoint]] = {}  # by how long they train, then by the rest
    for run in sorted(runs, key=lambda run: run.facts.steps):
        if run.facts.method == "labels":
            controls.setdefault(_length(run), {})[_setting(run)] = run
    names = {found.key: name for name, found in checkpoints.items()}
    groups: dict[str, list[Checkpoint]] = {}
    for run in runs:
        if run.facts.method != "labels":
            settings = {name: value for name, value in run.settings.items() if name != "seed"} | _begun_as(run)
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    found = []
    for group in groups.values():
        name, wanted = _student_name(names[group[0].key], group[0]), {_setting(run) for run in group}
        able = {length: alone for length, alone in controls.items() if wanted & alone.keys()}
        alike = {length: alone for length, alone in able.items() if length[0] == _length(group[0])[0]}
        if not any(not as_many_steps for _, as_many_steps in alike):
            alike |= {length: alone for length, alone in able.items() if not length[1]}
        found += [_gain(name, group, alone) for alone in alike.values() or [{}]]
    return found


def _student_name(name: str, run: Checkpoint) -> str:
    """What the recipe calls it, or its method."""
    found = re.fullmatch(r"student-(.+)-seed\d+", name)
    return found[1] if found else str(run.facts.method)


def _config(run: Checkpoint) -> TrainConfig:
    return validated(TrainConfig, run.manifest.config, str(run.path))


def _setting(run: Checkpoint) -> str:
    """What ``run`` shares with its control, but for how long that trains.

    In one spelling: whoever leaves the views' seed to the rule has the same views as who names it.
    """
    control = control_of(_config(run), epochs=1)
    shared = control.model_copy(update={"view_seed": control.views_by}).model_dump(mode="json")
    return json.dumps(shared | _begun_as(run))


def _begun_as(run: Checkpoint) -> dict[str, str]:
    """Keys of the checkpoints that its weights began as, by their role."""
    given = ("encoder", "start")
    return {role: source.key for role, source in run.manifest.inputs.items() if role in given}


def _length(run: Checkpoint) -> tuple[int, bool]:
    """How many epochs it was to train, and whether to make as many steps as with images without labels."""
    config = _config(run)
    return config.train.epochs, config.steps_as_unlabeled


def _gain(name: str, runs: Sequence[Checkpoint], controls: Mapping[str, Checkpoint]) -> Numbers:
    seeds, compared = [], []
    for run in runs:
        control = controls.get(_setting(run))
        accuracy, alone = run.facts.test_accuracy, control.facts.test_accuracy if control else None
        points = None if alone is None else 100 * (accuracy - alone)
        seed = run.settings["seed"]
        compared += [(run, control)] if control else []
        seeds.append({"seed": seed, "accuracy": accuracy, "labels_accuracy": alone, "gain_points": points})
    gains = [seed["gain_points"] for seed in seeds if seed["gain_points"] is not None]
    teacher = runs[0].manifest.inputs.get("teacher")
    return {
        "method": name,
        "model": runs[0].facts.model,
        "training_images": runs[0].facts.training_images,
        "label_fraction": runs[0].settings["label_fraction"],
        "test_images": runs[0].facts.test_images,
        "teacher_accuracy": Checkpoint.facts_of(teacher).test_accuracy if teacher else None,
        "seeds": sorted(seeds, key=lambda seed: seed["seed"]),
        "gain_points": mean_interval(gains).as_dict() if gains else None,
        "steps": runs[0].facts.steps,
        "control_steps": compared[0][1].facts.steps if compared else None,
    }


def curves(checkpoints: Checkpoints) -> list[Numbers]:
    """Loss and validation accuracy by epoch of everything that was trained here."""
    teachers = teacher_names(checkpoints)
    found = []
    for name, checkpoint in checkpoints.items():
        rows = checkpoint.history
        if not rows:
            continue
        looked = [row for row in rows if row.validation_accuracy is not None]
        found.append(
            {
                "name": name,
                "group": "teacher" if name in teachers else checkpoint.facts.method,
                "epochs": [row.epoch for row in rows],
                "loss": [row.loss for row in rows],
                "validation_epochs": [row.epoch for row in looked],
                "validation_accuracy": [row.validation_accuracy for row in looked],
            }
        )
    return found


def lineage(measurements: Mapping[str, Measurement], checkpoints: Checkpoints) -> list[Numbers]:
    """Every stage behind the numbers, inputs first."""
    names = {artifact.key: name for name, artifact in checkpoints.items()}
    found: dict[str, Numbers] = {}
    roots = {name: item.manifest for name, item in checkpoints.items()}
    for device, measurement in measurements.items():
        roots["measurement" if len(measurements) == 1 else f"measurement on {device}"] = measurement.manifest
    for role, root in roots.items():
        for name, source in _inputs_first(role, root):
            stage = {"name": names.get(source.key, name), "stage": source.stage, "seconds": source.seconds}
            found.setdefault(source.key, {**stage, "key": source.key, "config": source.config})
    return list(found.values())


def _inputs_first(role: str, source: Provenance) -> Iterator[tuple[str, Provenance]]:
    for name, before in source.inputs.items():
        yield from _inputs_first(name, before)
    # A bundle's and an INT8 model's input are both called "model".
    if source.kind == Model.kind:
        facts = Model.facts_of(source)
        role = f"{facts.target}-{facts.variant}"
    yield (f"{role} ({source.kind})" if source.kind in (Model.kind, Bundle.kind) else role), source


def environment(measurements: Iterable[Measurement], checkpoints: Checkpoints) -> Numbers:
    """Tool versions (all that took part, where artifacts differ), and this host."""
    tools: dict[str, list[str]] = {}
    artifacts: list[AnyArtifact] = [*checkpoints.values(), *measurements]
    for artifact in artifacts:
        for tool, version in artifact.manifest.tools.items():
            if version not in tools.setdefault(tool, []):
                tools[tool].append(version)
    return {"tools": tools, "host": artifacts[-1].manifest.host}


def summary_table(device: Numbers, task: Numbers) -> Table:
    """One line a bundle of one device, within 110 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("bundle", no_wrap=True, min_width=max(len(row["name"]) for row in device["bundles"]) + 2)
    for head in (f"{task['metric']} {task['unit']}", "p50 ms", "trust", "x float32", "MiB"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in device["bundles"]:
        table.add_row(
            row["name"] + (" *" if row["pareto"] else ""),
            words.shares(row["accuracy"], 1),
            words.interval(row["latency_p50_ms"]),
            row["trust"]["word"] if row["trust"] else words.NOTHING,
            words.interval(row["latency_over_float32"]),
            words.mebibytes(row["size_bytes"]),
        )
    return table


def print_summary(console: Console, numbers: Numbers) -> None:
    """The report in a terminal: of each device main table, ``device_lines`` and what to take, then the rest."""
    for line in words.caveats(numbers):
        console.print(line, markup=False, highlight=False)
    for device in numbers["devices"]:
        if len(numbers["devices"]) > 1:
            console.print(words.device_heading(device), markup=False, highlight=False)
        console.print(summary_table(device, numbers["task"]))
        if device.get("faults"):  # a report of before has none
            console.print(faults_table(device))
        for line in device_lines(device):
            console.print(line, markup=False, highlight=False)
        if device["decision"]["file"]:  # in one line, however long, so that it can be copied
            taken = from_here(Path(device["decision"]["file"]["folder"]))
            console.print(printable(f"take: {taken}"), markup=False, highlight=False, soft_wrap=True)
    for line in closing_lines(numbers):
        console.print(line, markup=False, highlight=False)


def from_here(path: Path) -> Path:
    """As a person would type it: relative where it lies below the folder that they are in."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def device_lines(device: Numbers) -> Iterator[str]:
    """What is said below a device's table: accuracy by hop, advice, and whether to believe the latencies."""
    if device["front"]:
        yield "* on the Pareto front of accuracy and p50: " + words.front(device["front"])
    yield from words.untrusted_lines(device["trust"]["untrusted"])
    for row in device["bundles"]:
        if row["status"] != "measured":
            yield f"{row['name']}: {row['status']}"
    for hop in device["hops"]:
        yield from words.hop_lines(hop)
    yield from words.host_lines(device["bundles"])
    yield from words.frame_lines(device)
    for advised in device["advice"]:
        yield words.advice_sentence(advised)
    yield words.trust_sentence(device["trust"])
    if device["trust"]["emulated"]:
        yield words.emulated_sentence(device["trust"])
    yield words.decision_sentence(device["decision"])


def closing_lines(numbers: Numbers) -> Iterator[str]:
    """What is said of all devices together: answers by class, what distillation added, that no device is ranked."""
    yield from words.answers_lines(numbers)
    for gain in numbers["gains"]:
        yield words.gain_sentence(gain)
    if len(numbers["devices"]) > 1:
        yield words.APART
