"""The bench stage: every bundle measured in one session a device, interleaved, each time in a fresh process."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..core.artifact import Busy, Order, drafting, write_json
from ..core.config import BenchConfig, Corruption
from ..core.errors import DeviceLost, KdpipeError, UserError
from ..core.kinds import (
    Bundle,
    FreshStart,
    Measurement,
    MeasurementFacts,
    Result,
    Runnable,
    Samples,
    StartUp,
    WholeFrame,
    float32_by_bundle,
)
from ..core.proc import end_groups
from ..core.progress import progress
from ..core.stats import (
    Interval,
    early_stopping,
    median_interval,
    percentile_interval,
    percentile_within,
    ratio_interval,
)
from ..data.dataset import Dataset, load_labels
from ..runtime.measure import longest_seconds
from ..runtime.task import TASKS
from . import find_device, opened
from .accuracy import (
    ALONE,
    PIECE,
    SLACK,
    SLACK_SECONDS,
    Asked,
    HostOutputs,
    against_host,
    ask,
    batch_one,
    block_count,
    gather,
    image_seconds,
    on_host,
    part,
    push,
    push_frames,
    twice,
)
from .conditions import conditions, seen_around
from .journal import Journal
from .lock import WAIT_SECONDS, held
from .session import settings_of, threads_of
from .surroundings import Watch, fell_back
from .talk import Talk, together
from .trust import assess, control_name, controlled

LINK_TRIES, LINK_WAIT_SECONDS = 3, 5.0  # before a device counts as lost
HOST = "local"
CLEANING_SECONDS = 2.0  # that a session which is stopped has to tidy its device
RANDOM_INPUT = "measured on random input"

T = TypeVar("T")


@dataclass(frozen=True)
class _Run:
    """One session: what the bundles are asked, and how they are timed."""

    asked: Asked
    config: BenchConfig

    @property
    def journal(self) -> Journal:
        return self.asked.journal

    @cached_property
    def float32(self) -> dict[str, str]:
        """For each bundle the float32 one of its target, student and threads, where there is one."""
        bundles = {name: each.manifest for name, each in self.asked.bundles.items() if isinstance(each, Bundle)}
        return float32_by_bundle(bundles)


def bench(
    order: Order[BenchConfig],
    bundles: Mapping[str, Runnable],
    dataset: Dataset | None,
    out: Path,
    talk: Talk | None = None,
    host: Mapping[str, HostOutputs] | None = None,
) -> Measurement:
    """Measure accuracy on the test part and single-image latency of every bundle on one device.

    Each round measures all bundles and, as A/A controls, some of them again (see ``turns`` and ``controlled``). A
    bundle whose runtime is not installed gets its accuracy from a stand-in where one reads the same file, and no
    latency. A process that fails is started once more, then its bundle is marked as failed and the others go on.
    What was measured outlives a kill and a lost link: the same call goes on from there (see ``Journal``).

    Args:
        talk: where several devices are measured side by side; else this session has a progress of its own.
        host: what the same bundles said on the host, by key, to compare with.

    Raises:
        UserError: no bundles, bundles of other data, or whatever can be run failed.
        DeviceLost: the link is gone, and did not come back.
    """
    config = order.config
    if not bundles:
        raise UserError("nothing to measure: give at least one bundle")
    if dataset is None and config.corruptions:
        raise UserError("corruptions are of images, and there are none: give --data and --input")
    if dataset is not None:
        for bundle in bundles.values():
            dataset.check_classes_of(bundle, "the bundle")
        _check_seen_alike(bundles)
    if talk is None:
        with progress("measuring", step_count(config, bundles, dataset)) as advance:
            return bench(order, bundles, dataset, out, Talk(advance), host)
    device = find_device(config.device)
    with (
        held(device.settings, talk),
        drafting(Measurement, order, out, resumable=True) as draft,
        # Below the draft: what a kill leaves there goes with it.
        tempfile.TemporaryDirectory(dir=draft.path.absolute()) as scratch,
    ):
        assert draft.resume is not None  # the draft was begun as a resumable one
        journal = Journal(draft.resume)
        before = device.probe()
        asked = Asked(device, bundles, dataset, journal, Path(scratch), talk, config)
        run = _Run(asked, config)
        for name, bundle in bundles.items():
            if not device.runs(bundle.facts.target):
                talk.note(
                    f"{name}: {bundle.facts.target} is not installed on '{config.device}': no latency "
                    f"(kdpipe doctor --device {config.device} says what is missing)"
                )

        def all_of_it() -> tuple[dict[str, Result], dict[str, list[str]], dict[str, list[FreshStart]]]:
            with opened(device, Path(scratch)), device.watching() as watch:
                push(asked)
                given_up = ask(asked)
                if dataset is not None:
                    write_labels(asked.bundles.values(), dataset, draft.path / Measurement.LABELS)
                results = _accuracies(run, given_up, draft.path, host or {})
                timed = [name for name, result in results.items() if not result.failed and not asked.stand_in(name)]
                judged_by = _controls(run, timed)
                frames = push_frames(asked) if timed else None
                _measure_rounds(run, timed, judged_by, watch, frames)
                if (
                    frames
                    and journal.runs
                    and not device.emulated
                    and all(each.frames is None for each in journal.runs.values())
                ):
                    talk.note(f"whole frames are not timed on '{config.device}': that takes Pillow there")
                starts = _start_fresh(run, timed)
            return results, judged_by, starts

        results, judged_by, starts = _patiently(talk, all_of_it)
        failures = [f"{name} {result.status}" for name, result in results.items() if result.failed]
        if failures and all(result.failed for result in results.values() if result.session or result.failed):
            shutil.rmtree(draft.resume)  # nothing to go on from
            raise UserError(f"no bundle could be run: {failures[0]}")
        if dataset is not None and (images := dataset.digests("test")) is not None:
            np.save(draft.path / Measurement.IMAGES, images)
        after = device.probe()
        runs = _collect(run, results, judged_by, starts, draft.path, after.cores)
        draft.facts = MeasurementFacts(
            task=next(iter(bundles.values())).facts.task,
            device=config.device,
            emulated=device.emulated,
            probe_before=before,
            probe_after=after,
            order_seed=journal.order_seed,
            pauses_seconds=journal.pauses_seconds,
            **assess(
                by_round(runs),
                results,
                judged_by,
                run.float32,
                config.resolution,
                frames=frames_by_round(runs),
                emulated=device.emulated,
                cores=after.usable_cores,
                pauses_seconds=journal.pauses_seconds,
            ),
        )
    return draft.artifact


def _check_seen_alike(bundles: Mapping[str, Runnable]) -> None:
    """Refuse networks that would be judged by different parts of an image. Raises UserError."""
    shown: dict[object, str] = {}
    for name, bundle in bundles.items():
        part = TASKS[bundle.facts.task].part_judged(bundle.facts.input.model_dump())
        if part is not None:
            shown.setdefault(part, name)
    if len(shown) > 1:
        first, second, *_ = shown.values()
        raise UserError(
            f"'{first}' and '{second}' are shown different parts of an image, and their answers cannot be compared: "
            "measure them one after the other, or give all of them the same input.resize and crop_fraction"
        )


def step_count(config: BenchConfig, bundles: Mapping[str, Runnable], dataset: Dataset | None) -> int:
    """How many steps of progress a session takes."""
    rounds = config.rounds + config.cold_starts + (1 if config.sustained else 0)
    return block_count(bundles, dataset) * (1 + len(config.corruptions)) + rounds * len(bundles)


def bench_side_by_side(
    sessions: Mapping[Path, tuple[Order[BenchConfig], Mapping[str, Runnable]]],
    dataset: Dataset | None,
    host_folder: Path,
) -> dict[Path, Measurement | KdpipeError]:
    """One session on each of several devices, each in a thread of its own; a lost one leaves the others' whole.

    Outputs of the same bundles on this host are computed before, to compare those of other devices with.

    Args:
        sessions: by where each measurement is written.
        host_folder: where the host's outputs are kept; the next session finds them there.

    Returns:
        Of each its measurement, or why there is none.
    """
    total = sum(step_count(order.config, bundles, dataset) for order, bundles in sessions.values())
    stopped = threading.Event()
    with progress("measuring", total) as advance:
        devices = [order.config.device for order, _ in sessions.values()]
        alone = len(devices) == 1
        talks = {devices[0]: Talk(advance)} if alone else together(advance, devices, stopped)
        elsewhere = {path for path, (order, _) in sessions.items() if _is_elsewhere(order.config.device)}
        compared = {bundle.key: bundle for path in elsewhere for bundle in sessions[path][1].values()}
        host: dict[str, HostOutputs] = {}
        if compared and dataset is not None:
            host = on_host(compared, dataset, host_folder, Talk(lambda _, detail: advance(0, f"host: {detail}")))

        def one(path: Path) -> Measurement | KdpipeError:
            order, bundles = sessions[path]
            talk = talks[order.config.device]
            try:
                made = _one_writer(
                    lambda: bench(order, bundles, dataset, path, talk, host if path in elsewhere else {})
                )
            except KdpipeError as error:
                talk.advance(0, "given up")
                return error
            talk.advance(0, "done")
            return made

        if alone:
            return {path: one(path) for path in sessions}
        with ThreadPoolExecutor(len(sessions)) as pool:
            futures = {path: pool.submit(one, path) for path in sessions}
            try:
                return {path: future.result() for path, future in futures.items()}
            except BaseException:
                stopped.set()
                end_groups()  # what the threads wait for
                while wait(futures.values(), timeout=CLEANING_SECONDS).not_done:
                    end_groups()  # what a thread had started at that very moment
                raise


def _one_writer(call: Callable[[], Measurement]) -> Measurement:
    """What ``call`` measures; or what another process did, that has measured the same session on the same device."""
    while True:
        try:
            return call()
        except Busy as busy:
            if busy.out.exists():
                return Measurement.open(busy.out)
            time.sleep(WAIT_SECONDS)


def _is_elsewhere(device: str) -> bool:
    """Whether it is another machine than this host, with outputs of its own to compare."""
    return find_device(device).settings.kind not in (HOST, "null")


def _patiently(talk: Talk, call: Callable[[], T]) -> T:
    """A link that comes back at once costs a few seconds, and what was under way. Raises DeviceLost."""
    for _ in range(LINK_TRIES - 1):
        try:
            return call()
        except DeviceLost as error:
            talk.check()
            talk.note(f"{error}; trying again")
            time.sleep(LINK_WAIT_SECONDS)
    return call()


def _controls(run: _Run, timed: Sequence[str]) -> dict[str, list[str]]:
    """For each timed bundle those that are measured again in every round and judge it."""
    targets, seconds = {}, {}
    for name in timed:
        alone = run.journal.answer(name, ALONE)
        assert alone is not None  # only what was run is timed
        targets[name] = f"{run.asked.bundles[name].facts.target} {threads_of(run.config, name)}"
        seconds[name] = image_seconds(alone)
    return controlled(targets, run.float32, seconds)


def write_labels(bundles: Iterable[Runnable], dataset: Dataset, file: Path) -> None:
    """What is right of the test images, some at a time, as networks of the finest input are judged.

    Whatever the order of the bundles: on a coarser grid the small things that it loses would be nobody's mistake.
    """
    spec = max(
        (bundle.facts.input for bundle in bundles), key=lambda spec: (math.prod(spec.sides), spec.sides)
    ).model_dump()
    samples = dataset.samples("test")
    first = load_labels(samples[:1], spec)
    whole = np.lib.format.open_memmap(file, "w+", first.dtype, (len(samples), *first.shape[1:]))
    for at in range(0, len(samples), PIECE):
        whole[at : at + PIECE] = load_labels(samples[at : at + PIECE], spec)
    whole.flush()


def _accuracies(
    run: _Run, given_up: Mapping[str, str], folder: Path, host: Mapping[str, HostOutputs]
) -> dict[str, Result]:
    """How right every bundle is, from the outputs in the journal, which become files of the measurement."""
    asked, found = run.asked, {}
    for name, bundle in asked.bundles.items():
        stand_in, task = asked.stand_in(name), TASKS[bundle.facts.task]
        if name in given_up:
            found[name] = Result(**_failed(given_up[name]))
            continue
        if stand_in and bundle.facts.stand_in is None:
            found[name] = Result(status=f"{bundle.facts.target} is not installed on this device")
            continue
        if asked.dataset is None:
            alone = asked.journal.answer(name, ALONE)
            found[name] = Result(status=RANDOM_INPUT, session=None if alone is None else alone.session)
            continue
        said = [Measurement.outputs_name(name, corruption) for corruption in run.config.corruptions]
        for file in (Measurement.outputs_name(name), Measurement.mismatches_name(name), *said):
            (folder / file).parent.mkdir(exist_ok=True)
        outputs = gather(asked, name, folder / Measurement.outputs_name(name))
        # In one size for all bundles: what they say is enlarged to it, so that they are compared pixel by pixel.
        labels = np.load(folder / Measurement.LABELS, mmap_mode="r", allow_pickle=False)
        apart, answer = batch_one(asked, name, outputs), asked.journal.answer(name, part(0))
        assert answer is not None  # outputs were gathered
        if not apart.within_tolerance:
            asked.talk.note(
                f"{name}: one image at a time its outputs are off by {apart.max_difference:.3g} from those in batches, "
                f"allowed {apart.tolerance:.3g}: its accuracy may not be that of what is timed"
            )
        compared = None
        if bundle.key in host and host[bundle.key].outputs.shape == outputs.shape:
            compared, rows = against_host(bundle, asked.dataset, labels, outputs, host[bundle.key])
            write_json(folder / Measurement.mismatches_name(name), [row.model_dump() for row in rows])
        found[name] = Result(
            status="not built here" if stand_in else "measured",
            accuracy_by=answer.session.runtime,
            accuracy=Interval(*task.summary(task.scores(outputs, labels))),
            corrupted=_corrupted(run, name, labels, folder) or None,
            batch_one=apart,
            against_host=compared,
            session=answer.session,
        )
    return found


def _corrupted(run: _Run, name: str, labels: np.ndarray, folder: Path) -> dict[Corruption, Interval]:
    """How right a bundle is about the images with each fault; its outputs become files of the measurement."""
    task = TASKS[run.asked.bundles[name].facts.task]
    found: dict[Corruption, Interval] = {}
    for corruption in run.config.corruptions:
        outputs = gather(run.asked, name, folder / Measurement.outputs_name(name, corruption), corruption)
        found[corruption] = Interval(*task.summary(task.scores(outputs, labels)))
    return found


def _measure_rounds(
    run: _Run,
    timed: Sequence[str],
    judged_by: Mapping[str, Sequence[str]],
    watch: Watch | None,
    frames: str | None = None,
) -> None:
    """Measure what the journal lacks of every round, each process into the journal as it ends.

    Long runs are one more round after the others, without controls: they heat the device.

    Args:
        frames: what the pictures of whole frames are called on the device.
    """
    journal, talk, asked = run.journal, run.asked.talk, run.asked
    repeated = _repeated(judged_by)
    longest = max((_longest_seconds(run, name) for name in timed), default=0.0)
    forgotten = journal.begin([*timed, *repeated], longest)
    if forgotten:
        talk.note(
            f"{forgotten} processes are of another session (too long ago, or other bundles): measuring them again"
        )
    elif journal.runs:
        talk.note(f"{len(journal.runs)} processes were measured before, going on")
    planned = turns([*timed, *repeated], run.config.rounds, journal.order_seed)
    for at, names in enumerate([*planned, timed] if run.config.sustained else planned):
        for name in names:
            measured = repeated.get(name, name)
            talk.advance(0, f"round {at + 1}, {name}")
            if measured not in journal.failed and (at, name) not in journal.runs:
                talk.check()
                settings, limit = settings_of(run.config, measured), _time_limit(run, measured)
                if at < run.config.rounds:
                    settings = settings.model_copy(update={"sustained": 0.0})
                look = None if watch is None else watch.look()
                try:
                    call = partial(asked.device.measure, measured, asked.timing[measured], settings, limit)
                    samples = twice(talk, name, call, frames=frames)
                except DeviceLost:
                    raise
                except KdpipeError as error:
                    talk.check()
                    talk.note(f"{measured}: given up in round {at + 1}: {error}")
                    journal.give_up(at, measured, str(error))
                else:
                    around = None if watch is None or look is None else seen_around(look, watch.look(), samples.steady)
                    journal.add(at, name, samples, around)
            talk.advance(int(name not in repeated), "")
        talk.advance(len(asked.bundles) - len(timed), "")


def _start_fresh(run: _Run, timed: Sequence[str]) -> dict[str, list[FreshStart]]:
    """Start every bundle in fresh processes, in turns; one that fails twice starts no more, its latencies stand."""
    asked, starts = run.asked, {name: list[FreshStart]() for name in timed if name not in run.journal.failed}
    for at in range(run.config.cold_starts):
        for name in timed:
            asked.talk.advance(0, f"start {at + 1}, {name}")
            if name in starts and len(starts[name]) == at:
                asked.talk.check()
                limit, settings = _time_limit(run, name), settings_of(run.config, name)
                call = partial(asked.device.start_fresh, name, asked.timing[name], settings, limit, examine=at == 0)
                try:
                    starts[name].append(twice(asked.talk, name, call))
                except DeviceLost:
                    raise
                except KdpipeError as error:
                    asked.talk.check()
                    asked.talk.note(f"{name}: not started again: {error}")
            asked.talk.advance(1, "")
        asked.talk.advance(len(asked.bundles) - len(timed), "")
    return starts


def _repeated(judged_by: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The controls, each by the bundle that it measures again."""
    return {control_name(name): name for name in dict.fromkeys(itertools.chain.from_iterable(judged_by.values()))}


def _collect(
    run: _Run,
    results: dict[str, Result],
    judged_by: Mapping[str, Sequence[str]],
    starts: Mapping[str, Sequence[FreshStart]],
    folder: Path,
    cores: int | str,
) -> dict[str, list[Samples]]:
    """Raw samples into files, what they come to into ``results``; returns those of what did not fail."""
    journal, repeated = run.journal, _repeated(judged_by)
    runs: dict[str, list[Samples]] = {}
    for name in [*judged_by, *repeated]:
        rounds = [at for at in range(run.config.rounds) if (at, name) in journal.runs]
        repeats = [journal.runs[at, name] for at in rounds]
        (folder / Measurement.samples_name(name)).parent.mkdir(exist_ok=True)
        write_json(folder / Measurement.samples_name(name), [samples.model_dump() for samples in repeats])
        failure = journal.failed.get(repeated.get(name, name))
        if failure is None:
            runs[name] = repeats
        if name in results:
            began, precision = starts.get(name, []), run.asked.bundles[name].facts.precision
            (folder / Measurement.starts_name(name)).parent.mkdir(exist_ok=True)
            write_json(folder / Measurement.starts_name(name), [start.model_dump() for start in began])
            long = journal.runs.get((run.config.rounds, name))
            found = _failed(failure) if failure is not None else summary(repeats, began, precision, long)
            if run.asked.dataset is None:  # random inputs are made, not prepared from an image
                found |= {"prepare_ms": None, "end_to_end_ms": None}
            if failure is None and not run.asked.device.emulated:
                found["conditions"] = conditions([journal.around[at, name] for at in rounds], cores)
            results[name] = results[name].model_copy(update=found)
    return runs


def _failed(reason: str) -> dict[str, Any]:
    """The fields of the ``Result`` of a bundle that was given up."""
    return {"status": f"failed: {reason}", "failed": True}


def _longest_seconds(run: _Run, name: str) -> float:
    """How long a process that measures takes at most: by how long the timing images took, one at a time."""
    alone = run.journal.answer(name, ALONE)
    assert alone is not None  # only what was run is timed
    return longest_seconds(alone.open_seconds, image_seconds(alone), run.config)


def _time_limit(run: _Run, name: str) -> float:
    """Seconds after which a process that measures hangs."""
    return SLACK_SECONDS + SLACK * _longest_seconds(run, name)


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


def summary(
    repeats: Sequence[Samples],
    starts: Sequence[FreshStart] = (),
    precision: str = "",
    long: Samples | None = None,
) -> dict[str, Any]:
    """Numbers of one bundle over its processes, nothing trimmed: the fields of its ``Result``.

    Inferences of one process resemble each other more than those of two, so the process is the unit: a
    percentile is taken in each, and its median over processes is given with the order-statistic interval. A percentile
    that the inferences of some process are too few for is None.

    Args:
        starts: its processes that only started. Without them what opening took is told of those that timed, and the
            time since the start of the process is not, which holds the check of the hashes there.
        precision: what the bundle says that it is.
        long: the process that went on.
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
    since_start = [start.process_ns / 1e6 for start in starts if start.process_ns is not None]
    compiled = [start.compile_ns / 1e6 for start in began if start.compile_ns is not None]
    executed = next((start.executed for start in starts if start.executed is not None), None)
    return {
        **numbers,
        "early_stopping_p90_by_process_ms": [early_stopping(values, 90) for values in milliseconds],
        "inferences": sum(map(len, milliseconds)),
        "end_to_end_ms": median_interval(end_to_end) if end_to_end else None,
        "prepare_ms": float(np.median(np.concatenate([samples.prepare_ns for samples in repeats]))) / 1e6,
        "whole_frame": whole_frame(repeats),
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
        "sustained": None if long is None else long.sustained,
        "session": repeats[0].session,
    }


def whole_frame(repeats: Sequence[Samples]) -> WholeFrame | None:
    """What whole frames took over the processes of one bundle; None where some process has none."""
    timed = [samples.frames for samples in repeats if samples.frames is not None]
    if not timed or len(timed) < len(repeats):
        return None
    whole, alone = (
        [float(np.median(nanoseconds)) / 1e6 for nanoseconds in each]
        for each in ([frames.whole_ns for frames in timed], [frames.alone_ns for frames in timed])
    )
    steps = {
        step: float(np.median(np.concatenate([frames.steps_ns.get(step, [0]) for frames in timed]))) / 1e6
        for step in timed[0].steps_ns
    }
    return WholeFrame(
        latency_ms=median_interval(whole),
        latency_by_process_ms=whole,
        network_ms=median_interval(alone),
        over_network=ratio_interval(whole, alone),
        steps_ms=steps,
        sizes=timed[0].sizes,
    )


def frames_by_round(runs: Mapping[str, Sequence[Samples]]) -> dict[str, list[float | None]]:
    """The median whole frame of every process in ms, of bundles and controls; None where a process has none."""
    return {
        name: [None if each.frames is None else float(np.median(each.frames.whole_ns)) / 1e6 for each in repeats]
        for name, repeats in runs.items()
    }


def by_round(runs: Mapping[str, Sequence[Samples]]) -> dict[str, list[float | None]]:
    """The median latency of every process in ms, which bundles are compared by."""
    return {name: [float(np.median(samples.latency_ns)) / 1e6 for samples in each] for name, each in runs.items()}
