"""The package stage and its opposite: pack a model so that it stands alone, and check such a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .. import runtime
from ..core.artifact import EVIDENCE, Order, drafting
from ..core.config import PackageConfig
from ..core.errors import GateFailed, UserError
from ..core.kinds import Bundle, BundleFacts, Model
from ..core.proc import first_line, quiet
from ..data.dataset import Dataset, load_images
from ..runtime.bundle import GOLDEN, BundleError, replay_golden

# Largest difference of a golden output, over the spread of the logits. INT8 kernels differ between
# instruction sets by a few steps of 1/256 of the range.
TOLERANCES = {"float32": 1e-3, "float16": 0.01, "bf16": 0.05, "int8": 0.05}


def package(order: Order[PackageConfig], model: Model, dataset: Dataset, out: Path) -> Bundle:
    """Pack model, labels, golden inputs with expected outputs, and the runner.

    Raises:
        UserError: the model's runtime is not installed, images of other classes.
    """
    dataset.check_classes_of(model, "the model")
    facts = model.facts
    with drafting(Bundle, order, out) as draft:
        for name in model.manifest.files:
            if not name.startswith(f"{EVIDENCE}/"):
                shutil.copy(model.file(name), draft.path / name)
        copy_runner(draft.path / Bundle.RUNNER)
        samples = dataset.balanced("test", order.config.golden_images, seed=0)
        images = load_images(samples, facts.input.model_dump())
        with quiet():
            session = runtime.open_session(draft.path, facts.for_runtime(), stand_in=facts.stand_in is not None)
            logits = runtime.predict(session, images)
        np.savez(draft.path / GOLDEN, images=images, logits=logits)
        draft.facts = BundleFacts(
            **facts.model_dump(),
            size_bytes=model.size_bytes,
            golden_images=len(images),
            golden_tolerance=float(TOLERANCES[facts.precision] * logits.std()),
        )
    return draft.artifact


def copy_runner(folder: Path) -> None:
    """Copy the sources of ``kdpipe.runtime``, which run anywhere as ``python -m runtime``."""
    folder.mkdir()
    for source in sorted(Path(runtime.__file__).parent.glob("*.py")):
        shutil.copyfile(source, folder / source.name)


def verify(path: Path) -> tuple[Bundle, dict[str, Any]]:
    """Check hashes, open the model, replay the golden inputs; nothing of the bundle is executed.

    Returns:
        The bundle and what the replay found; ``stand_in`` says that another runtime replayed it.

    Raises:
        UserError: an altered bundle, or no runtime to open it with.
        GateFailed: the golden outputs are off.
    """
    bundle = Bundle.open(path)
    stand_in = bundle.facts.stand_in is not None and not runtime.is_available(bundle.facts.target)
    try:
        with quiet():
            return bundle, replay_golden(bundle.path, bundle.facts.for_runtime(), stand_in=stand_in)
    except BundleError as error:
        raise GateFailed(f"{path}: {error}") from None
    except ImportError as error:
        raise UserError(f"bundle {path} needs {error.name}: pip install 'kdpipe[{bundle.facts.target}]'") from None
    except Exception as error:  # runtimes raise their own
        raise GateFailed(f"{path}: the model cannot be opened and run: {first_line(error)}") from error
