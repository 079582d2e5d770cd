"""The export stage: a checkpoint (or its graph) to one sealed model, refused when it computes something else."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..core.artifact import EVIDENCE, Order, drafting
from ..core.config import ExportConfig
from ..core.errors import KdpipeError, UserError, choice
from ..core.kinds import Checkpoint, Graph, Model, ModelFacts, Tuned
from ..core.proc import first_line, quiet, require
from ..core.progress import progress
from ..data.dataset import Dataset, load_images
from ..runtime import open_session, predict
from ..runtime.task import TASKS
from . import TARGETS
from .graph import check_output
from .parity import check, compare, keep_worst


def export(order: Order[ExportConfig], source: Checkpoint | Graph | Tuned, dataset: Dataset, out: Path) -> Model:
    """Write the student for ``config.target`` in float32, normalisation folded in, and check parity with torch.

    Args:
        source: the checkpoint, or its graph, whichever the target is made from (``Target.source``).

    Raises:
        UserError: an unknown target, a package that is missing, an operator that the target lacks.
        GateFailed: the file computes something else than torch on real images.
    """
    config = order.config
    if config.target not in TARGETS:
        raise choice("target", config.target, TARGETS)
    target = TARGETS[config.target]()
    require(f"target '{config.target}'", target.needs, config.target)
    dataset.check_classes_of(source, "the checkpoint")
    check_output(config.output, source)
    with drafting(Model, order, out) as draft:
        spec = source.facts.input.model_copy(update={"layout": target.layout})
        samples = dataset.balanced("train", config.parity_images, seed=0)
        paths = [sample.path for sample in samples]
        with progress(f"exporting to {config.target}", 2) as advance:
            images = load_images(samples, spec.model_dump())
            with quiet():
                try:
                    written = target.write(source, spec, images, config.output, draft.path)
                    target.check(draft.path / target.entry)
                except KdpipeError:
                    raise
                except Exception as error:  # every converter raises its own
                    raise UserError(
                        f"{source.facts.model} cannot be exported to {config.target}: {first_line(error)}"
                    ) from error
            images = images[: len(written.torch_outputs)]
            advance(1, "parity")
            facts = ModelFacts(
                task=source.facts.task,
                target=config.target,
                variant="float32",
                precision="float32",
                entry=target.entry,
                input=spec,
                model=source.facts.model,
                nodes_by_kind=written.nodes_by_kind,
                output=config.output if written.torch_outputs.dtype.kind == "f" else "classes",
                runtime=dict(target.runtime),
                stand_in=target.stand_in,
                not_built_here=target.not_built_here,
            )
            with quiet():
                session = open_session(draft.path, facts.for_runtime(), stand_in=facts.stand_in is not None)
                actual = predict(session, images)
            advance(1, "")
        parity = compare(TASKS[facts.task], written.torch_outputs, actual, paths)
        parity = check(parity, config, f"{config.target} file", written.float32_error)
        keep_worst(parity, draft.path / EVIDENCE)
        draft.facts = facts.model_copy(update={"parity": parity.facts(session.describe())})
        shutil.copyfile(source.file(source.LABELS), draft.path / Model.LABELS)
    return draft.artifact
