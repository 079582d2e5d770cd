"""What the manifests and raw logits of a chain say, as plain numbers; the same on the page and in a terminal.

Accuracies are shares (0..1), everything else carries its unit in its name. An interval is a mapping of
value, low, high and n, where a bound of None means "n too small". What could not be read is None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import AnyArtifact, Provenance, find_ancestors
from ..core.config import ReportConfig
from ..core.errors import UserError
from ..core.kinds import Bundle, Checkpoint, Damage, Graph, Measurement, Model, ParityFacts, Result
from ..core.stats import Interval, mean_interval, ratio_interval
from ..data.dataset import Dataset
from ..runtime.task import TASKS, Task
from . import words
from .compression import Packed, Sources, advice, flips, guards, noise_by_layer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA_VERSION = 1
Numbers = dict[str, Any]
Checkpoints = Mapping[str, Checkpoint]

# A run on the labels alone is a control only where all of these are the same.
SHARED_BY_CONTROL = ("model", "model_args", "pretrained", "input", "label_fraction", "train", "seed")


def collect(config: ReportConfig, measurement: Measurement, checkpoints: Checkpoints, sources: Sources) -> Numbers:
    """Every number of the report, JSON-serialisable and finite.

    Raises:
        UserError: a checkpoint that was tested on other images than the bundles.
    """
    check_results(measurement)
    task, bundles, rows = TASKS[measurement.facts.task], bundles_of(measurement), bundle_rows(measurement)
    hops = accuracy_hops(measurement, checkpoints, sources.graphs)
    labels = measurement.labels
    pairs = [
        (base, step["bundle"])
        for hop in hops
        for step in hop["steps"]
        if step["variant"] and (base := float32_of(step["bundle"], bundles)) is not None
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "title": config.title,
        "task": {name: getattr(task, name) for name in ("name", "metric", "unit", "summary_note", "change_note")},
        "measured_utc": measurement.manifest.created_utc,
        "chain": chain(measurement, checkpoints),
        "trust": trust(measurement),
        "bundles": rows,
        "advice": advice(rows, hops, config.max_drop) if measurement.facts.trusted else [],
        "hops": hops,
        "flips": flips(measurement, pairs, labels, sources),
        "noise_by_layer": noise_by_layer(bundles, sources),
        "guards": guards(bundles),
        "gains": distillation_gains(checkpoints),
        "curves": curves(checkpoints),
        "lineage": lineage(measurement, checkpoints),
        "environment": environment(measurement, checkpoints),
    }


def bundles_of(measurement: Measurement) -> dict[str, Packed]:
    """The bundles that were measured, by name."""
    return {
        name: Packed(Bundle.facts_of(source), source)
        for name, source in measurement.manifest.inputs.items()
        if source.kind == Bundle.kind
    }


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
    """Checkpoints that taught another one, and the one that is called so."""
    taught_by = {
        student.manifest.inputs[role].key for student in checkpoints.values() for role in student.manifest.inputs
    }
    return {name for name, checkpoint in checkpoints.items() if name == "teacher" or checkpoint.key in taught_by}


def chain(measurement: Measurement, checkpoints: Checkpoints) -> Numbers:
    """Who taught whom on what, and where the result went."""
    bundles = bundles_of(measurement)
    shipped = {bundle.student_key for bundle in bundles.values()}
    data = next((source for source in measurement.manifest.inputs.values() if source.kind == Dataset.kind), None)
    teachers = teacher_names(checkpoints)
    return {
        "teachers": [network(name, checkpoints[name]) for name in checkpoints if name in teachers],
        "students": [network(name, found) for name, found in checkpoints.items() if found.key in shipped],
        "data": data.facts if data else None,
        "targets": list(dict.fromkeys(bundle.facts.target for bundle in bundles.values())),
        "variants": list(dict.fromkeys(bundle.facts.variant for bundle in bundles.values())),
    }


def network(name: str, checkpoint: Checkpoint) -> Numbers:
    facts, config = checkpoint.facts, checkpoint.settings
    return {
        "name": name,
        "model": facts.model,
        "parameters": facts.parameters,
        "method": facts.method,
        "training_images": facts.training_images,
        "label_fraction": config.get("label_fraction"),
        "seed": config.get("seed"),
        "accuracy": _torch_accuracy(checkpoint),
    }


def _torch_accuracy(checkpoint: Checkpoint) -> Numbers:
    task = TASKS[checkpoint.facts.task]
    return task.summary(task.scores(*checkpoint.tested))._asdict()


def trust(measurement: Measurement) -> Numbers:
    """The A/A control: the reference bundle measured against itself in every round."""
    facts, config = measurement.facts, measurement.settings
    control, resolution = facts.control, None
    if control is not None and control.low is not None and control.high is not None:
        # Whatever differs by less could be the machine: a wide interval holds 1 easily.
        resolution = max(control.high, 1 / control.low)
    return {
        "device": facts.device,
        "emulated": facts.emulated,
        "trusted": facts.trusted,
        "reference": facts.reference,
        "control": _plain(control),
        "control_limit": facts.control_limit,
        "resolution_factor": resolution,
        "rounds": config["rounds"],
        "threads": config["threads"],
    }


def bundle_rows(measurement: Measurement) -> list[Numbers]:
    bundles, results = bundles_of(measurement), measurement.facts.results
    rows = []
    for name, bundle in bundles.items():
        result = results[name]
        rows.append(
            {
                "name": name,
                "target": bundle.facts.target,
                "variant": bundle.facts.variant,
                "status": result.status,
                "accuracy": _plain(result.accuracy),
                "latency_p50_ms": _plain(result.latency_p50_ms),
                "latency_p90_ms": _plain(result.latency_p90_ms),
                "latency_over_float32": _over_float32(name, bundles, results),
                "size_bytes": bundle.facts.size_bytes,
                "load_ms": _median(result.load_ms),
                "first_inference_ms": _median(result.first_inference_ms),
                "peak_memory_bytes": _peak_memory(result),
                "warm_up_settled": result.warm_up_settled,
            }
        )
    front = pareto_front(rows) if measurement.facts.trusted else set()
    return [{**row, "pareto": row["name"] in front} for row in rows]


def float32_of(name: str, bundles: Mapping[str, Packed]) -> str | None:
    """The float32 bundle of the same target and student."""
    mine = bundles[name]
    for other, bundle in bundles.items():
        same = bundle.facts.target == mine.facts.target and bundle.student_key == mine.student_key
        if same and bundle.facts.precision == "float32":
            return other
    return None


def _over_float32(name: str, bundles: Mapping[str, Packed], results: Mapping[str, Result]) -> Numbers | None:
    base = float32_of(name, bundles)
    if base is None or base == name:
        return None
    variant, float32 = results[name].latency_p50_by_process_ms, results[base].latency_p50_by_process_ms
    return _plain(ratio_interval(variant, float32)) if variant and float32 else None


def _plain(interval: Interval | None) -> Numbers | None:
    return None if interval is None else interval.as_dict()


def _median(values: Sequence[float] | None) -> float | None:
    return float(np.median(values)) if values else None


def _peak_memory(result: Result) -> int | None:
    """The peak, unless it was reached before the model was opened: then it says nothing of the model."""
    peak, before = result.peak_memory_bytes, result.memory_before_open_bytes
    return peak if peak is not None and before is not None and peak > before else None


def pareto_front(rows: Sequence[Numbers]) -> set[str]:
    """Names of the rows that no other row beats in accuracy and median latency alike."""
    points = {
        row["name"]: (row["accuracy"]["value"], -row["latency_p50_ms"]["value"])
        for row in rows
        if row["accuracy"] and row["latency_p50_ms"]
    }

    def beaten(mine: tuple[float, float]) -> bool:
        return any(theirs != mine and theirs[0] >= mine[0] and theirs[1] >= mine[1] for theirs in points.values())

    return {name for name, point in points.items() if not beaten(point)}


def accuracy_hops(measurement: Measurement, checkpoints: Checkpoints, graphs: Mapping[str, Graph]) -> list[Numbers]:
    """Per target: torch, ONNX as exported and simplified, the float32 file; then every variant.

    Each against the one before, variants against the float32 file, image by image. The ONNX hops may have been
    tested on fewer images.
    """
    task, bundles, labels = TASKS[measurement.facts.task], bundles_of(measurement), measurement.labels
    scores = {name: task.scores(outputs, labels) for name, outputs in measurement.all_outputs(bundles)}
    chains: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(scores, key=lambda name: bundles[name].facts.precision != "float32"):
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
            before = scores[base] if base in scores and base != name else torch_scores
            step = _step(task, facts.variant, before, scores[name], facts.parity, facts.against_float32)
            steps.append({**step, "bundle": name, "variant": base in scores and base != name})
        ran = _where_run(measurement, names[0], bundles[names[0]])
        hops.append({"target": target, "student": key, "ran": ran, "steps": steps})
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
    if not np.array_equal(tested, labels):
        raise UserError(
            f"{student.path} was tested on other images than the bundles: give the measurement's own student"
        )
    return task.scores(outputs, labels)


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

    A control differs in the method only; a seed without one has no gain.
    """
    teachers = teacher_names(checkpoints)
    runs = [found for name, found in checkpoints.items() if found.manifest.stage == "train" and name not in teachers]
    controls = {_setting(run): run for run in runs if run.facts.method == "labels"}
    names = {found.key: name for name, found in checkpoints.items()}
    groups: dict[str, list[Checkpoint]] = {}
    for run in runs:
        if run.facts.method != "labels":
            settings = {name: value for name, value in run.settings.items() if name != "seed"}
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return [_gain(_student_name(names[group[0].key], group[0]), group, controls) for group in groups.values()]


def _student_name(name: str, run: Checkpoint) -> str:
    """What the recipe calls it, or its method."""
    found = re.fullmatch(r"student-(.+)-seed\d+", name)
    return found[1] if found else str(run.facts.method)


def _setting(run: Checkpoint) -> str:
    return json.dumps([run.settings[name] for name in SHARED_BY_CONTROL], sort_keys=True)


def _gain(name: str, runs: Sequence[Checkpoint], controls: Mapping[str, Checkpoint]) -> Numbers:
    seeds = []
    for run in runs:
        control = controls.get(_setting(run))
        accuracy, alone = run.facts.test_accuracy, control.facts.test_accuracy if control else None
        points = None if alone is None else 100 * (accuracy - alone)
        seed = run.settings["seed"]
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


def lineage(measurement: Measurement, checkpoints: Checkpoints) -> list[Numbers]:
    """Every stage behind the numbers, inputs first."""
    names = {artifact.key: name for name, artifact in checkpoints.items()}
    found: dict[str, Numbers] = {}
    roots = {**{name: item.manifest for name, item in checkpoints.items()}, "measurement": measurement.manifest}
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


def environment(measurement: Measurement, checkpoints: Checkpoints) -> Numbers:
    """Tool versions (all that took part, where artifacts differ), host, device before and after, runtimes."""
    tools: dict[str, list[str]] = {}
    artifacts: list[AnyArtifact] = [*checkpoints.values(), measurement]
    for artifact in artifacts:
        for tool, version in artifact.manifest.tools.items():
            if version not in tools.setdefault(tool, []):
                tools[tool].append(version)
    facts = measurement.facts
    return {
        "tools": tools,
        "host": measurement.manifest.host,
        "device_before": facts.probe_before.model_dump(),
        "device_after": facts.probe_after.model_dump(),
        "runtimes": {
            name: result.session.model_dump() for name, result in facts.results.items() if result.session is not None
        },
    }


def summary_table(numbers: Numbers) -> Table:
    """One line a bundle, within 100 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("bundle", no_wrap=True, min_width=max(len(row["name"]) for row in numbers["bundles"]) + 2)
    task = numbers["task"]
    for head in (f"{task['metric']} {task['unit']}", "p50 ms", "p90 ms", "x float32", "MiB"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in numbers["bundles"]:
        p90 = row["latency_p90_ms"]
        table.add_row(
            row["name"] + (" *" if row["pareto"] else ""),
            words.shares(row["accuracy"], 1),
            words.interval(row["latency_p50_ms"]),
            words.figure(p90["value"]) if p90 else words.NOTHING,
            words.interval(row["latency_over_float32"]),
            words.mebibytes(row["size_bytes"]),
        )
    return table


def print_summary(console: Console, numbers: Numbers) -> None:
    """The report in a terminal: main table and ``summary_lines``."""
    console.print(summary_table(numbers))
    for line in summary_lines(numbers):
        console.print(line, markup=False, highlight=False)


def summary_lines(numbers: Numbers) -> Iterator[str]:
    """What is said below the main table: accuracy by hop, advice, gain, and whether to believe the latencies."""
    if any(row["pareto"] for row in numbers["bundles"]):
        yield "* on the Pareto front of accuracy and p50"
    for row in numbers["bundles"]:
        if row["status"] != "measured":
            yield f"{row['name']}: {row['status']}"
    for hop in numbers["hops"]:
        yield from words.hop_lines(hop)
    for advised in numbers["advice"]:
        yield words.advice_sentence(advised)
    for gain in numbers["gains"]:
        yield words.gain_sentence(gain)
    yield words.trust_sentence(numbers["trust"])
    if numbers["trust"]["emulated"]:
        yield words.emulated_sentence(numbers["trust"])
