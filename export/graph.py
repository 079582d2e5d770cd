"""The graph stage: a checkpoint to ONNX, compared with torch as written and again simplified."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import EVIDENCE, Order, drafting
from ..core.config import GraphConfig, Output
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.kinds import Checkpoint, Graph, GraphFacts, HopParity, Tuned
from ..core.proc import first_line, quiet, require
from ..core.progress import progress
from ..data.dataset import Dataset, Sample, load_images, predict_samples
from ..runtime import Session, open_session, predict
from ..runtime.task import TASKS, Task
from .onnx import NEEDS, simplify, write_onnx
from .parity import check, compare, float32_error, keep_worst, torch_outputs
from .written import Written

AS_WRITTEN = "raw.onnx"  # the file before it is simplified
MOST_CLASSES_A_BYTE = 256


@dataclass(frozen=True)
class Wanted:
    """What a graph is to compute."""

    task: Task
    spec: InputSpec  # what it takes
    images: np.ndarray  # uint8 [N, H, W, 3]
    outputs: np.ndarray  # what is right of them [N, ...]
    paths: Sequence[Path]  # their files
    error_of_torch: Callable[[], float | None]  # as ``check`` has it


def trace(order: Order[GraphConfig], student: Checkpoint | Tuned, dataset: Dataset, out: Path) -> Graph:
    """Write the student as ONNX with its normalisation folded in, compare, simplify, compare again.

    Raises:
        UserError: an operator that ONNX lacks, control flow, weights that are not finite, a missing package.
        GateFailed: a graph computes something else than torch on real images.
    """
    require("ONNX", NEEDS, "onnxruntime")
    dataset.check_classes_of(student, "the checkpoint")
    config = order.config
    check_output(config.output, student)
    with drafting(Graph, order, out) as draft:
        with progress("exporting to ONNX", 4) as advance:
            import torch

            from ..networks import models
            from .rewrites import FOR_ONNX, AsTorchComputes

            network, spec = models.restore(student)
            whole = models.Normalise(network, spec, config.output).eval()
            samples = dataset.balanced("train", config.parity_images, seed=0)
            paths = [sample.path for sample in samples]
            images = load_images(samples, spec.model_dump())
            expected = torch_outputs(whole, images, str(student.path))
            images, paths = images[: len(expected)], paths[: len(expected)]
            error_of_torch = cache(partial(float32_error, whole, images, expected))
            raw = draft.path / AS_WRITTEN
            seconds, begun = {}, time.monotonic()
            with quiet(), torch.no_grad(), AsTorchComputes(FOR_ONNX):
                try:
                    write_onnx(models.Normalise(models.deployed(network), spec, config.output).eval(), spec, raw)
                except Exception as error:  # the exporter raises its own
                    reason = first_line(error)
                    raise UserError(f"{student.facts.model} cannot be exported to ONNX: {reason}") from error
            seconds["export"] = time.monotonic() - begun
            advance(1, "simplifying")
            begun = time.monotonic()
            with quiet():
                simplify(raw, draft.path / Graph.ONNX)
            seconds["simplify"] = time.monotonic() - begun
            advance(1, "comparing")
            wanted = Wanted(TASKS[student.facts.task], spec, images, expected, paths, error_of_torch)
            parity = compare_hops(draft.path, wanted, dataset, config, advance)
        shutil.copyfile(student.file(student.LABELS), draft.path / Graph.LABELS)
        draft.facts = GraphFacts(
            task=student.facts.task,
            model=student.facts.model,
            input=spec,
            nodes_by_kind=nodes_by_kind(draft.path / Graph.ONNX),
            parity=parity,
            export_seconds=round(seconds["export"], 2),
            simplify_seconds=round(seconds["simplify"], 2),
        )
    return draft.artifact


def compare_hops(
    folder: Path, wanted: Wanted, dataset: Dataset, config: GraphConfig, advance: Callable[[int, str], None]
) -> HopParity:
    """Compare the graph in ``folder`` and ``AS_WRITTEN`` beside it, and write what both say of test images.

    The file as it was written is removed then.

    Raises:
        GateFailed: one of them computes something else.
    """
    hops = dataset.positions("test", config.hop_images, seed=0)
    test = dataset.samples("test")
    tested = [test[at] for at in hops]
    parity, said = {}, {}
    for hop, name in (("exported", AS_WRITTEN), ("simplified", Graph.ONNX)):
        with quiet():
            session = open_session(folder, _as_model(name, wanted.spec), threads=0)
            actual = predict(session, wanted.images)
            said[hop] = _said(session, tested, wanted)
        found = compare(wanted.task, wanted.outputs, actual, wanted.paths)
        parity[hop] = check(found, config, f"{hop} ONNX graph", wanted.error_of_torch).facts()
        keep_worst(found, folder / EVIDENCE / hop)
        advance(1, "")
    (folder / AS_WRITTEN).unlink()
    np.save(folder / Graph.PARITY_OUTPUTS, wanted.outputs)
    np.savez(folder / Graph.HOPS, positions=hops, exported=said["exported"], simplified=said["simplified"])
    return HopParity(**parity)


def _said(session: Session, samples: Sequence[Sample], wanted: Wanted) -> np.ndarray:
    """What is kept of the outputs [N, ...], of which a few images' are in memory at a time."""
    spec, task = wanted.spec.model_dump(), wanted.task
    starts = range(0, len(samples), task.together)
    parts = (predict_samples(session, samples[at : at + task.together], spec) for at in starts)
    return np.concatenate([task.kept(part, wanted.spec.sides) for part in parts])


def check_output(output: Output, source: Checkpoint | Graph | Tuned) -> None:
    """Refuse what a network cannot give. Raises UserError."""
    outputs = TASKS[source.facts.task].outputs
    if output not in outputs:
        raise UserError(
            f"output '{output}' is nothing that a network for {source.facts.task} gives, as {source.path} is: wanted "
            f"{' or '.join(outputs)}"
        )
    if output == "classes" and (count := len(source.labels)) > MOST_CLASSES_A_BYTE:
        raise UserError(f"output 'classes' is a byte a pixel, {source.path} tells {count} classes apart: wanted logits")


def of_graph(graph: Graph) -> Written:
    """What is known of every model that is made from ``graph``."""
    error = graph.facts.parity.simplified.float32_error
    return Written(np.asarray(graph.array(graph.PARITY_OUTPUTS, "fu", 2)), graph.facts.nodes_by_kind, lambda: error)


def _as_model(entry: str, spec: InputSpec) -> dict[str, Any]:
    """What ONNX Runtime must know of a graph to open it."""
    return {"target": "onnxruntime", "entry": entry, "input": spec.model_dump(mode="json")}


def nodes_by_kind(path: Path) -> dict[str, int]:
    """How many operators of which kind an ONNX file has."""
    import onnx

    return dict(Counter(node.op_type for node in onnx.load(path).graph.node).most_common())
