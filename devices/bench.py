"""The bench stage: every bundle measured in one session, interleaved, each time in a fresh process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import BenchConfig
from ..core.errors import KdpipeError, UserError
from ..core.kinds import (
    BatchOne,
    Bundle,
    FreshStart,
    Measurement,
    MeasurementFacts,
    Prediction,
    Result,
    Samples,
    StartUp,
    float32_by_bundle,
)
from ..core.proc import first_line
from ..core.progress import note, progress
from ..core.stats import Interval, early_stopping, median_interval, percentile_interval, percentile_within
from ..data.dataset import Dataset, load_labels, write_images
from ..runtime.measure import longest_seconds
from ..runtime.task import TASKS
from . import Device, find_device, opened
from .journal import Accuracy, Journal
from .session import settings_of
from .surroundings import fell_back
from .trust import assess, control_name, controlled

SLACK, SLACK_SECONDS = 10, 60.0  # a process that takes so many times what it should, and a minute, hangs
FIRST_SECONDS = 3600.0  # of the first process of a bundle, of which nothing is known

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class _Run:
    """One session: where it runs, what the bundles are asked about, what is known so far."""

    device: Device
    dataset: Dataset
    config: BenchConfig
    journal: Journal
    images: Mapping[str, str]  # by bundle: the pushed file of its test images
    timing: Mapping[str, str]  # by bundle: that of the images that are timed

    @cached_property
    def positions(self) -> np.ndarray:
        """Where the timing images are among the test images, in their order."""
        return _timing_positions(self.dataset, self.config.images)


def bench(order: Order[BenchConfig], bundles: Mapping[str, Bundle], dataset: Dataset, out: Path) -> Measurement:
    """Measure accuracy on the test part and single-image latency of every bundle.

    Each round measures all bundles and, as A/A controls, the float32 one of each target again (see ``turns``). A
    bundle whose runtime is not installed gets its accuracy from a stand-in where one reads the same file, and no
    latency. A process that fails is started once more, then its bundle is marked as failed and the others go on.
    What was measured outlives a kill: the same call goes on from there (see ``Journal``).

    Raises:
        UserError: no bundles, bundles of other data, or whatever can be run failed.
    """
    config = order.config
    if not bundles:
        raise UserError("nothing to measure: give at least one bundle")
    for bundle in bundles.values():
        dataset.check_classes_of(bundle, "the bundle")
    device = find_device(config.device)
    installed = [name for name, bundle in bundles.items() if device.runs(bundle.facts.target)]
    for name in bundles.keys() - set(installed):
        note(f"{name}: {bundles[name].facts.target} is not installed on '{config.device}': no latency")
    float32 = float32_by_bundle({name: bundle.manifest for name, bundle in bundles.items()})
    with (
        drafting(Measurement, order, out, resumable=True) as draft,
        tempfile.TemporaryDirectory() as scratch,
    ):
        assert draft.resume is not None  # the draft was begun as a resumable one
        journal = Journal(draft.resume)
        before = device.probe()
        with opened(device, Path(scratch)):
            images = _push_inputs(device, bundles, dataset, Path(scratch), draft.path)
            timing = _push_timing_images(device, bundles, images, dataset, config.images, Path(scratch))
            run = _Run(device, dataset, config, journal, images, timing)
            processes = len(installed) + len({bundles[name].facts.target for name in installed})  # and the controls
            steps = len(bundles) + config.rounds * processes + config.cold_starts * len(installed)
            with progress("measuring", steps) as advance:
                results: dict[str, Result] = {}
                for name, bundle in bundles.items():
                    advance(0, f"accuracy of {name}")
                    results[name] = _accuracy(run, name, bundle)
                    advance(1, "")
                timed = [name for name in installed if not results[name].failed]
                controls = controlled({name: bundles[name].facts.target for name in timed}, float32)
                repeated = {control_name(name): name for name in controls.values()}
                _measure_rounds(run, timed, repeated, advance)
                starts = _start_fresh(run, timed, advance)
        for name in bundles:
            for file in (Measurement.outputs_name(name), Measurement.samples_name(name), Measurement.starts_name(name)):
                (draft.path / file).parent.mkdir(exist_ok=True)
            if journal.accuracy(name) is not None:
                journal.outputs(name).rename(draft.path / Measurement.outputs_name(name))
        runs: dict[str, list[Samples]] = {}
        for name in [*timed, *repeated]:
            repeats = [journal.runs[at, name] for at in range(config.rounds) if (at, name) in journal.runs]
            write_json(draft.path / Measurement.samples_name(name), [samples.model_dump() for samples in repeats])
            failure = journal.failed.get(repeated.get(name, name))
            if failure is None:
                runs[name] = repeats
            if name in results:
                began = starts.get(name, [])
                write_json(draft.path / Measurement.starts_name(name), [start.model_dump() for start in began])
                precision = bundles[name].facts.precision
                found = summary(repeats, began, precision) if failure is None else _failed(failure)
                results[name] = results[name].model_copy(update=found)
        failures = [f"{name} {result.status}" for name, result in results.items() if result.failed]
        if failures and not any(result.accuracy for result in results.values()):
            shutil.rmtree(draft.resume)  # nothing to go on from
            raise UserError(f"no bundle could be run: {failures[0]}")
        draft.facts = MeasurementFacts(
            task=dataset.facts.task,
            device=config.device,
            emulated=device.emulated,
            probe_before=before,
            probe_after=device.probe(),
            order_seed=journal.order_seed,
            pauses_seconds=journal.pauses_seconds,
            **assess(by_round(runs), results, controls, float32, config.resolution, emulated=device.emulated),
        )
    return draft.artifact


def _measure_rounds(
    run: _Run, timed: Sequence[str], repeated: Mapping[str, str], advance: Callable[[int, str], None]
) -> None:
    """Measure what the journal lacks of every round, each process into the journal as it ends.

    Args:
        repeated: the controls, each by the bundle that it measures again.
    """
    journal = run.journal
    forgotten = journal.begin(timed)
    if forgotten:
        note(f"{forgotten} processes are of another session (too long ago, or other bundles): measuring them again")
    elif journal.runs:
        note(f"{len(journal.runs)} processes were measured before, going on")
    for at, names in enumerate(turns([*timed, *repeated], run.config.rounds, journal.order_seed)):
        for name in names:
            measured = repeated.get(name, name)
            advance(0, f"round {at + 1}, {name}")
            if measured not in journal.failed and (at, name) not in journal.runs:
                limit = _time_limit(run, measured)
                try:
                    settings = settings_of(run.config, measured)
                    samples = _twice(name, run.device.measure, measured, run.timing[measured], settings, limit)
                except KdpipeError as error:
                    note(f"{measured}: given up in round {at + 1}: {error}")
                    journal.give_up(at, measured, str(error))
                else:
                    journal.add(at, name, samples)
            advance(1, "")


def _start_fresh(run: _Run, timed: Sequence[str], advance: Callable[[int, str], None]) -> dict[str, list[FreshStart]]:
    """Start every bundle in fresh processes, in turns; one that fails twice starts no more, its latencies stand."""
    starts: dict[str, list[FreshStart]] = {name: [] for name in timed if name not in run.journal.failed}
    for at in range(run.config.cold_starts):
        for name in timed:
            advance(0, f"start {at + 1}, {name}")
            if name in starts and len(starts[name]) == at:
                limit, settings = _time_limit(run, name), settings_of(run.config, name)
                call = partial(run.device.start_fresh, name, run.timing[name], settings, limit, examine=at == 0)
                try:
                    starts[name].append(_twice(name, call))
                except KdpipeError as error:
                    note(f"{name}: not started again: {error}")
            advance(1, "")
    return starts


def _twice(what: str, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """A process may fail for a reason that is gone at once: the second failure counts. Raises KdpipeError."""
    try:
        return call(*arguments, **options)
    except KdpipeError as error:
        note(f"{what}: {error}; once more")
        return call(*arguments, **options)


def _failed(reason: str) -> dict[str, Any]:
    """The fields of the ``Result`` of a bundle that was given up."""
    return {"status": f"failed: {reason}", "failed": True}


def _time_limit(run: _Run, name: str) -> float:
    """Seconds after which a process that measures hangs: by how long the timing images took, one at a time."""
    found, config = run.journal.accuracy(name), run.config
    assert found is not None  # only what was run is timed
    return SLACK_SECONDS + SLACK * longest_seconds(found.alone.open_seconds, _image_seconds(found.alone), config)


def _image_seconds(alone: Prediction) -> float:
    return alone.predict_seconds / max(1, alone.images)


def turns(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """Who is measured when: a shuffled round, the same backwards, another shuffled one, ...

    Backwards, so that a drift hits all alike (hence an even number of ``rounds``); shuffled anew (by ``seed``),
    because a process is slowed by what ran just before it, and must not always follow the same one.
    """
    generator = np.random.default_rng(seed)
    planned: list[list[str]] = []
    for _ in range(rounds // 2):
        shuffled = [names[at] for at in generator.permutation(len(names))]
        planned += [shuffled, shuffled[::-1]]
    return planned


def _push_inputs(
    device: Device, bundles: Mapping[str, Bundle], dataset: Dataset, scratch: Path, draft: Path
) -> dict[str, str]:
    """Put bundles and test images onto the device; images are decoded once per kind of input."""
    samples = dataset.samples("test")
    spec = next(iter(bundles.values())).facts.input.model_dump()
    np.save(draft / Measurement.LABELS, load_labels(samples, spec))
    pushed: dict[str, str] = {}
    images = {}
    for name, bundle in bundles.items():
        device.push(bundle.path, name)
        spec = bundle.facts.input.model_dump(exclude={"layout"})
        kind = repr(sorted(spec.items()))
        if kind not in pushed:
            pushed[kind] = f"images-{len(pushed)}.npy"
            ready = dataset.fitted_file("test", spec)
            if ready is None:
                ready = scratch / pushed[kind]
                write_images(ready, samples, spec)
            device.push(ready, pushed[kind])
        images[name] = pushed[kind]
    return images


def _push_timing_images(
    device: Device,
    bundles: Mapping[str, Bundle],
    images: Mapping[str, str],
    dataset: Dataset,
    count: int,
    scratch: Path,
) -> dict[str, str]:
    """Put the images that are timed onto the device, once per kind of input: seeded, spread over the classes.

    A file of their own, in the order of their positions: a process that times opens nothing else.
    """
    samples = dataset.samples("test")
    chosen = [samples[int(at)] for at in _timing_positions(dataset, count)]
    pushed: dict[str, str] = {}
    for name, bundle in bundles.items():
        if images[name] not in pushed:
            pushed[images[name]] = f"timing-{images[name]}"
            file = scratch / pushed[images[name]]
            write_images(file, chosen, bundle.facts.input.model_dump())
            device.push(file, file.name)
    return {name: pushed[images[name]] for name in bundles}


def _timing_positions(dataset: Dataset, count: int) -> np.ndarray:
    return dataset.positions("test", count, seed=0)


def _accuracy(run: _Run, name: str, bundle: Bundle) -> Result:
    """What a bundle says of the test images, kept in the journal, and how right that is."""
    stand_in = not run.device.runs(bundle.facts.target)
    if stand_in and bundle.facts.stand_in is None:
        return Result(status=f"{bundle.facts.target} is not installed on this device")
    found = run.journal.accuracy(name)
    if found is None:
        try:
            found = _twice(name, _predict, run, name, bundle, stand_in)
        except KdpipeError as error:
            note(f"{name}: given up: {error}")
            return Result(**_failed(str(error)))
        run.journal.add_accuracy(name, found)
    outputs = np.load(run.journal.outputs(name), allow_pickle=False)
    labels = load_labels(run.dataset.samples("test"), bundle.facts.input.model_dump())
    task, apart = TASKS[bundle.facts.task], found.batch_one
    if not apart.within_tolerance:
        note(
            f"{name}: one image at a time its outputs are off by {apart.max_difference:.3g} from those in batches, "
            f"allowed {apart.tolerance:.3g}: its accuracy may not be that of what is timed"
        )
    return Result(
        status="not built here" if stand_in else "measured",
        accuracy_by=found.answer.session.runtime,
        accuracy=Interval(*task.summary(task.scores(outputs, labels))),
        batch_one=apart,
        session=found.answer.session,
    )


def _predict(run: _Run, name: str, bundle: Bundle, stand_in: bool) -> Accuracy:
    """Outputs of the test images into the journal; before, those of the timing images one at a time, as they are timed.

    How long one image takes alone bounds how long all may take. Raises KdpipeError.
    """
    device, written, count = run.device, run.journal.outputs(name), run.dataset.facts.images["test"]
    threads = settings_of(run.config, name).threads
    alone = device.predict(name, run.timing[name], written, FIRST_SECONDS, stand_in=stand_in, batch=1, threads=threads)
    one_by_one = _read_outputs(written, name, len(run.positions), bundle)
    limit = SLACK_SECONDS + SLACK * (alone.open_seconds + count * _image_seconds(alone))
    answer = device.predict(name, run.images[name], written, limit, stand_in=stand_in)
    batched = _read_outputs(written, name, count, bundle)[run.positions]
    difference, tolerance = float(np.abs(one_by_one - batched).max()), bundle.facts.golden_tolerance
    return Accuracy(
        answer=answer,
        alone=alone,
        batch_one=BatchOne(
            images=len(run.positions),
            max_difference=difference,
            tolerance=tolerance,
            agreement=TASKS[bundle.facts.task].agreement(one_by_one, batched),
            within_tolerance=difference <= tolerance,
        ),
    )


def _read_outputs(path: Path, name: str, count: int, bundle: Bundle) -> np.ndarray:
    """Outputs [N, ...] as a device wrote them. Raises UserError for anything else."""
    try:
        outputs = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"the outputs of {name} are no array ({first_line(error)})") from None
    if len(outputs.shape) < 2 or outputs.shape[:2] != (count, len(bundle.labels)) or outputs.dtype != np.float32:
        wanted = f"float32 [{count}, {len(bundle.labels)}, ...]"
        raise UserError(f"the outputs of {name} are {outputs.dtype} {list(outputs.shape)}, wanted {wanted}")
    if not np.isfinite(outputs).all():
        raise UserError(f"the outputs of {name} are not all finite")
    return np.asarray(outputs)


def summary(repeats: Sequence[Samples], starts: Sequence[FreshStart] = (), precision: str = "") -> dict[str, Any]:
    """Numbers of one bundle over its processes, nothing trimmed: the fields of its ``Result``.

    Inferences of one process resemble each other more than those of two, so the process is the unit: a
    percentile is taken in each, and its median over processes is given with the order-statistic interval. A percentile
    that the inferences of some process are too few for is None.

    Args:
        starts: its processes that only started; without them starting is told of those that timed.
        precision: what the bundle says that it is.
    """
    milliseconds = [np.asarray(samples.latency_ns) / 1e6 for samples in repeats]
    numbers: dict[str, Any] = {}
    for percent in (50, 90, 95, 99):
        if percent == 50:
            by_process = [percentile_interval(values, percent).value for values in milliseconds]
        else:
            known = [percentile_within(values, percent) for values in milliseconds]
            by_process = [value for value in known if value is not None]
        whole = len(by_process) == len(repeats)
        numbers[f"latency_p{percent}_ms"] = median_interval(by_process) if whole else None
        if percent in (50, 90):
            numbers[f"latency_p{percent}_by_process_ms"] = by_process if whole else None
    end_to_end = [float(np.median(samples.end_to_end_ns)) / 1e6 for samples in repeats if samples.end_to_end_ns]
    began: Sequence[StartUp] = starts or repeats
    since_start = [start.process_ns / 1e6 for start in began if start.process_ns is not None]
    compiled = [start.compile_ns / 1e6 for start in began if start.compile_ns is not None]
    executed = next((start.executed for start in starts if start.executed is not None), None)
    sustained = [samples.sustained for samples in repeats if samples.sustained is not None]
    return {
        **numbers,
        "early_stopping_p90_by_process_ms": [early_stopping(values, 90) for values in milliseconds],
        "inferences": sum(map(len, milliseconds)),
        "end_to_end_ms": median_interval(end_to_end) if end_to_end else None,
        "prepare_ms": float(np.median(np.concatenate([samples.prepare_ns for samples in repeats]))) / 1e6,
        "page_cache": starts[0].page_cache if starts else None,
        "start_ms": median_interval(since_start) if since_start else None,
        "import_ms": [start.import_ns / 1e6 for start in began],
        "load_ms": [start.load_ns / 1e6 for start in began],
        "compile_ms": compiled or None,
        "first_inference_ms": [start.first_ns / 1e6 for start in began],
        "memory_before_open_bytes": max((start.memory_before_open_bytes for start in starts), default=None),
        "memory_growth_bytes": max((start.memory_growth_bytes for start in starts), default=None),
        "executed": executed,
        "fell_back": fell_back(precision, repeats[0].session, executed),
        "placement": repeats[0].placement,
        "warm_up_settled": all(samples.warm_up.settled for samples in repeats),
        "warm_up_settled_by_process": [samples.warm_up.settled for samples in repeats],
        "stable": 2 * sum(samples.stable for samples in repeats) > len(repeats),
        "p50_known_within_by_process": [samples.p50_known_within for samples in repeats],
        "sustained": sustained or None,
        "session": repeats[0].session,
    }


def by_round(runs: Mapping[str, Sequence[Samples]]) -> dict[str, list[float | None]]:
    """The median latency of every process in ms, which bundles are compared by."""
    return {name: [float(np.median(samples.latency_ns)) / 1e6 for samples in each] for name, each in runs.items()}
