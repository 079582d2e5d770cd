"""The graph stage: a checkpoint to ONNX, compared with torch as written and again simplified."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import EVIDENCE, Checkpoint, Draft, Graph, drafting
from ..core.config import GraphConfig
from ..core.errors import UserError
from ..core.proc import first_line, quiet, require
from ..core.progress import progress
from ..data.dataset import Dataset
from ..runtime import open_session, predict, predict_files
from ..runtime.preprocess import load_images
from .onnx import NEEDS, simplify, write_onnx
from .parity import check, compare, keep_worst
from .written import Written

GRAPH = "model.onnx"
HOPS = "hops.npz"  # accuracy by hop: which test images, and what each graph says of them
TORCH_LOGITS = "torch_logits.npy"  # of the parity images


def trace(config: GraphConfig, student: Checkpoint, dataset: Dataset, out: Path) -> Graph:
    """Write the student as ONNX with its normalisation folded in, compare, simplify, compare again.

    Raises:
        UserError: an operator that ONNX lacks, control flow, weights that are not finite, a missing package.
        GateFailed: a graph computes something else than torch on real images.
    """
    require("ONNX", NEEDS, "onnxruntime")
    dataset.check_classes_of(student, "the checkpoint")
    with drafting(Graph, out, stage="graph", config=config, inputs={"student": student, "data": dataset}) as draft:
        with progress("exporting to ONNX", 4) as advance:
            import torch

            from ..networks import models

            network, spec = models.restore(student)
            whole = models.Normalise(network, spec).eval()
            samples = dataset.balanced("train", config.parity_images, seed=0)
            paths = [sample.path for sample in samples]
            images = load_images(paths, spec.model_dump())
            with torch.inference_mode():
                expected = whole(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
            if not np.isfinite(expected).all():
                raise UserError(f"{student.path}: its outputs are not finite on real images: nothing to export")
            raw = draft.path / "raw.onnx"
            seconds, begun = {}, time.monotonic()
            with quiet(), torch.no_grad():
                try:
                    write_onnx(whole, spec, raw)
                except Exception as error:  # the exporter raises its own
                    reason = first_line(error)
                    raise UserError(f"{student.facts['model']} cannot be exported to ONNX: {reason}") from error
            seconds["export"] = time.monotonic() - begun
            advance(1, "simplifying")
            begun = time.monotonic()
            with quiet():
                simplify(raw, draft.path / GRAPH)
            seconds["simplify"] = time.monotonic() - begun
            advance(1, "comparing")
            hops = dataset.positions("test", config.hop_images, seed=0)
            test = dataset.samples("test")
            tested = [test[at].path for at in hops]
            parity, logits = {}, {}
            for hop, file in (("exported", raw), ("simplified", draft.path / GRAPH)):
                with quiet():
                    session = open_session(file.parent, _facts(file.name, spec.model_dump(mode="json")), threads=0)
                    actual = predict(session, images)
                    logits[hop] = predict_files(session, tested, spec.model_dump())
                found = compare(expected, actual, paths)
                parity[hop] = check(found, config, f"{hop} ONNX graph").as_dict()
                keep_worst(found, draft.path / EVIDENCE / hop)
                advance(1, "")
        raw.unlink()
        np.save(draft.path / TORCH_LOGITS, expected)
        np.savez(draft.path / HOPS, positions=hops, exported=logits["exported"], simplified=logits["simplified"])
        _finish(draft, student, spec.model_dump(mode="json"), parity, seconds)
    return draft.artifact


def of_graph(graph: Graph) -> Written:
    """What is known of every model that is made from ``graph``."""
    return Written(np.load(graph.file(TORCH_LOGITS), allow_pickle=False), graph.facts["nodes_by_kind"])


def _facts(entry: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"target": "onnxruntime", "entry": entry, "input": spec}


def _finish(
    draft: Draft[Graph], student: Checkpoint, spec: dict[str, Any], parity: dict[str, Any], seconds: dict[str, float]
) -> None:
    import onnx

    kinds = Counter(node.op_type for node in onnx.load(draft.path / GRAPH).graph.node)
    draft.facts.update(
        model=student.facts["model"],
        input=spec,
        nodes_by_kind=dict(kinds.most_common()),
        parity=parity,
        seconds={name: round(value, 2) for name, value in seconds.items()},
    )
    shutil.copyfile(student.file("labels.json"), draft.path / "labels.json")
