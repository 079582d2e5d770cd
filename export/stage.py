"""The export stage: a checkpoint to one sealed model, refused when it computes something else."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.artifact import Checkpoint, Model, drafting
from ..core.config import ExportConfig
from ..core.data import Dataset
from ..core.errors import GateFailed, KdpipeError, UserError, choice
from ..core.proc import first_line, quiet, require
from ..core.progress import progress
from ..runtime import open_session, predict
from ..runtime.preprocess import load_images
from . import TARGETS
from .parity import Parity, compare


def export(config: ExportConfig, student: Checkpoint, dataset: Dataset, out: Path) -> Model:
    """Write the student for ``config.target`` in float32, normalisation folded in, and check parity.

    Raises:
        UserError: an unknown target, a package that is missing, an operator that the target lacks.
        GateFailed: the file computes something else than torch on real images.
    """
    if config.target not in TARGETS:
        raise choice("target", config.target, TARGETS)
    target = TARGETS[config.target]()
    require(f"target '{config.target}'", target.needs, config.target)
    with drafting(Model, out, stage="export", config=config, inputs={"student": student, "data": dataset}) as draft:
        import torch

        from ..networks import models

        with progress(f"exporting to {config.target}", 2) as advance:
            network, torch_spec = models.restore(student)
            spec = torch_spec.model_copy(update={"layout": target.layout})
            whole = models.Normalise(network, spec).eval()
            with quiet(), torch.no_grad():
                try:
                    target.write(whole, spec, draft.path)
                except KdpipeError:
                    raise
                except Exception as error:  # every converter raises its own
                    raise UserError(
                        f"{student.facts['model']} cannot be exported to {config.target}: {first_line(error)}"
                    ) from error
            advance(1, "parity")
            draft.facts.update(
                target=config.target,
                precision="float32",
                entry=target.entry,
                input=spec.model_dump(mode="json"),
                model=student.facts["model"],
                **target.facts,
            )
            samples = dataset.balanced("train", config.parity_images, seed=0)
            images = load_images((sample.path for sample in samples), spec.model_dump())
            with torch.inference_mode():
                expected = whole(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
            with quiet():
                session = open_session(draft.path, draft.facts, stand_in="stand_in" in draft.facts)
                actual = predict(session, images)
            advance(1, "")
        draft.facts["parity"] = {**check(compare(expected, actual), config).as_dict(), "session": session.describe()}
        shutil.copyfile(student.file("labels.json"), draft.path / "labels.json")
    return draft.artifact


def check(parity: Parity, config: ExportConfig) -> Parity:
    """Refuse a file that differs. Raises GateFailed."""
    if parity.relative > config.parity_tolerance:
        raise GateFailed(
            f"the {config.target} file differs from torch by {parity.relative:.1e} of the logits' spread "
            f"(allowed {config.parity_tolerance:.0e}), top-1 agrees on {parity.top1_agreement:.1%} of {parity.images} "
            f"images; worst image number {parity.worst_image}"
        )
    return parity
