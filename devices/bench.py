"""The bench stage: every bundle measured in one session, interleaved, each time in a fresh process."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import MeasureSettings
from ..core.errors import UserError
from ..core.kinds import Bundle, Measurement, MeasurementFacts, Result, Samples, float32_by_bundle
from ..core.progress import note, progress
from ..core.stats import Interval, percentile_interval
from ..data.dataset import Dataset, load_labels, write_images
from ..runtime.task import TASKS
from . import Device, find_device, opened
from .session import BenchConfig
from .trust import assess, control_name, controlled


def bench(order: Order[BenchConfig], bundles: Mapping[str, Bundle], dataset: Dataset, out: Path) -> Measurement:
    """Measure accuracy on the test part and single-image latency of every bundle.

    Each round measures all bundles and, as A/A controls, the float32 one of each target again (see ``turns``). A
    bundle whose runtime is not installed gets its accuracy from a stand-in where one reads the same file, and no
    latency.

    Raises:
        UserError: no bundles, bundles of other data, or a runner that fails.
    """
    config = order.config
    if not bundles:
        raise UserError("nothing to measure: give at least one bundle")
    for bundle in bundles.values():
        dataset.check_classes_of(bundle, "the bundle")
    device = find_device(config.device)
    timed = [name for name, bundle in bundles.items() if device.runs(bundle.facts.target)]
    for name in bundles.keys() - set(timed):
        note(f"{name}: {bundles[name].facts.target} is not installed on '{config.device}': no latency")
    float32 = float32_by_bundle({name: bundle.manifest for name, bundle in bundles.items()})
    controls = controlled({name: bundles[name].facts.target for name in timed}, float32)
    repeated = {control_name(name): name for name in controls.values()}
    with (
        drafting(Measurement, order, out) as draft,
        tempfile.TemporaryDirectory() as scratch,
    ):
        for name in bundles:
            for file in (Measurement.outputs_name(name), Measurement.samples_name(name)):
                (draft.path / file).parent.mkdir(exist_ok=True)
        before = device.probe()
        with opened(device, Path(scratch)):
            images = _push_inputs(device, bundles, dataset, Path(scratch), draft.path)
            rounds = turns([*timed, *repeated], config.rounds)
            with progress("measuring", len(bundles) + sum(map(len, rounds))) as advance:
                results: dict[str, Result] = {}
                for name, bundle in bundles.items():
                    advance(0, f"accuracy of {name}")
                    results[name] = _accuracy(device, name, bundle, images[name], dataset, draft.path)
                    advance(1, "")
                runs: dict[str, list[Samples]] = {}
                for at, names in enumerate(rounds):
                    for name in names:
                        advance(0, f"round {at + 1}, {name}")
                        measured = repeated.get(name, name)
                        samples = device.measure(measured, images[measured], MeasureSettings.of(config))
                        runs.setdefault(name, []).append(samples)
                        advance(1, "")
        for name, repeats in runs.items():
            write_json(draft.path / Measurement.samples_name(name), [samples.model_dump() for samples in repeats])
            if name in results:
                results[name] = results[name].model_copy(update=summary(repeats))
        draft.facts = MeasurementFacts(
            task=dataset.facts.task,
            device=config.device,
            emulated=device.emulated,
            probe_before=before,
            probe_after=device.probe(),
            **assess(by_round(runs), results, controls, float32, config.resolution, emulated=device.emulated),
        )
    return draft.artifact


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Who is measured when: a shuffled round, the same backwards, another shuffled one, ...

    Backwards, so that a drift hits all alike; shuffled anew (seeded), because a process is slowed by what ran
    just before it, and must not always follow the same one.
    """
    planned: list[list[str]] = []
    for pair in range((rounds + 1) // 2):
        shuffled = [names[at] for at in np.random.default_rng(pair).permutation(len(names))]
        planned += [shuffled, shuffled[::-1]]
    return planned[:rounds]


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


def _accuracy(device: Device, name: str, bundle: Bundle, images: str, dataset: Dataset, draft: Path) -> Result:
    stand_in = not device.runs(bundle.facts.target)
    if stand_in and bundle.facts.stand_in is None:
        return Result(status=f"{bundle.facts.target} is not installed on this device")
    written = draft / Measurement.outputs_name(name)
    answer = device.predict(name, images, written, stand_in)
    outputs = np.load(written, allow_pickle=False)
    labels = load_labels(dataset.samples("test"), bundle.facts.input.model_dump())
    wanted = (len(labels), len(bundle.labels))
    if outputs.shape[:2] != wanted or not np.isfinite(outputs).all():
        raise UserError(f"{bundle.path} gives outputs of shape {outputs.shape}: wanted {wanted}, of finite numbers")
    task = TASKS[bundle.facts.task]
    return Result(
        status="not built here" if stand_in else "measured",
        accuracy_by=answer.session.runtime,
        accuracy=Interval(*task.summary(task.scores(outputs, labels))),
        session=answer.session,
    )


def summary(repeats: Sequence[Samples]) -> dict[str, Any]:
    """Numbers of one bundle over its processes, nothing trimmed: the fields of its ``Result``.

    Inferences of one process resemble each other more than those of two, so the process is the unit: a
    percentile is taken in each, and its median over processes is given with the order-statistic interval.
    """
    milliseconds = [np.asarray(samples.latency_ns) / 1e6 for samples in repeats]
    numbers: dict[str, Any] = {}
    for percent in (50, 90):
        by_process = [percentile_interval(values, percent).value for values in milliseconds]
        numbers[f"latency_p{percent}_ms"] = percentile_interval(by_process, 50)
        numbers[f"latency_p{percent}_by_process_ms"] = by_process
    return {
        **numbers,
        "inferences": sum(map(len, milliseconds)),
        "import_ms": [samples.import_ns / 1e6 for samples in repeats],
        "load_ms": [samples.load_ns / 1e6 for samples in repeats],
        "first_inference_ms": [samples.first_ns / 1e6 for samples in repeats],
        "prepare_ms": float(np.median(np.concatenate([samples.prepare_ns for samples in repeats]))) / 1e6,
        "peak_memory_bytes": max(samples.peak_memory_bytes for samples in repeats),
        "memory_before_open_bytes": max(samples.memory_before_open_bytes for samples in repeats),
        "warm_up_settled": all(samples.warm_up.settled for samples in repeats),
        "session": repeats[0].session,
    }


def by_round(runs: Mapping[str, Sequence[Samples]]) -> dict[str, list[float | None]]:
    """The median latency of every process in ms, which bundles are compared by."""
    return {name: [float(np.median(samples.latency_ns)) / 1e6 for samples in each] for name, each in runs.items()}
