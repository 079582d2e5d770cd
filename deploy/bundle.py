"""The package stage and its opposite: pack a model so that it stands alone, and check such a bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import runtime
from ..core.artifact import EVIDENCE, Order, drafting, write_json
from ..core.config import PackageConfig
from ..core.errors import GateFailed, UserError, choice
from ..core.kinds import Bundle, BundleFacts, Model
from ..core.proc import RUNNER_SECONDS, ask_runner, quiet
from ..data.dataset import Dataset, Sample, images_shape, load_images
from ..devices.runner import copy_runner
from ..runtime.bundle import GOLDEN, LARGEST_STEP, TOLERANCES, spread, thinned
from ..runtime.layout import to_input
from ..runtime.preprocess import decode, fit
from ..runtime.task import TASKS

MOST_GOLDEN_BYTES = 4 * 2**20  # of inputs and outputs that have places
LARGEST_KIT_SIDE = 1024  # pixels: a bundle is no place for a whole photograph


def package(order: Order[PackageConfig], model: Model, dataset: Dataset, out: Path) -> Bundle:
    """Pack model, labels, golden inputs with expected outputs, a conformance kit, and the runner.

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
            count, step = _golden(images, runtime.predict(session, images[:1]))
            images = images[:count]
            outputs = thinned(runtime.predict(session, images), step)
        tolerance = TOLERANCES[facts.precision] * spread(outputs)
        np.savez(draft.path / GOLDEN, images=images, logits=outputs)
        write_conformance(draft.path / Bundle.CONFORMANCE, samples[0], model, session, float(tolerance))
        draft.facts = BundleFacts(
            **facts.model_dump(),
            size_bytes=model.size_bytes,
            golden_images=len(images),
            golden_step=step,
            golden_tolerance=float(tolerance),
        )
    return draft.artifact


def _golden(images: np.ndarray, output: np.ndarray) -> tuple[int, int]:
    """How many of these images to ship, and every so manieth place of outputs like this one.

    Of outputs without places all. Else what is shipped stays below a bound, as far as one place and two images allow.
    """
    if output.ndim < 3:
        return len(images), 1
    least = min(len(images), 2)
    for step in range(1, LARGEST_STEP + 1):
        count = int(MOST_GOLDEN_BYTES // (images[0].nbytes + thinned(output, step).nbytes))
        if count >= least:
            break
    return min(len(images), max(least, count)), step


def write_conformance(folder: Path, sample: Sample, model: Model, session: runtime.Session, tolerance: float) -> None:
    """What an integration written from scratch is checked against, in files that any language reads.

    ``image.jpg``: one test image; ``input.bin``: what the model is to be fed for it, a byte a value, in the model's
    layout; ``outputs.bin``: what it answers, little-endian float32, or a byte a pixel where it gives classes;
    ``expected.json``: shapes, type of the outputs, tolerance, the answer. Of a network that draws masks ``mask.png``
    too: the class of every pixel of its input.
    """
    from PIL import Image

    folder.mkdir()
    image, spec = sample.image(), model.facts.input.model_dump()
    image.thumbnail((LARGEST_KIT_SIDE, LARGEST_KIT_SIDE))
    image.save(folder / "image.jpg", quality=90)
    pixels = fit(decode(folder / "image.jpg"), spec)[None]
    stored = to_input(pixels, {**spec, "dtype": "uint8"})
    (folder / "input.bin").write_bytes(stored.tobytes())
    with quiet():
        outputs = runtime.predict(session, pixels)
    kind = "<f4" if outputs.dtype.kind == "f" else "u1"
    (folder / "outputs.bin").write_bytes(outputs.astype(kind).tobytes())
    task = TASKS[model.facts.task]
    decided = task.decide_at(outputs, model.facts.input.sides)[0]
    for name, picture in task.pictures(decided).items():
        Image.fromarray(picture).save(folder / name)
    expected = {
        "input_shape": list(stored.shape),
        "outputs_shape": list(outputs.shape),
        "outputs_type": "float32" if outputs.dtype.kind == "f" else "uint8",
        "tolerance": tolerance,
        "says": task.tell(decided, model.labels),
        "class": int(decided) if decided.ndim == 0 else None,
    }
    write_json(folder / "expected.json", expected)


def check_known(model: Model | Bundle) -> None:
    """Refuse a model of a target, stand-in or task that this version does not know. Raises UserError."""
    for name in (model.facts.target, model.facts.stand_in):
        if name is not None and name not in runtime.RUNTIMES:
            raise choice(f"target of {model.path}", name, runtime.RUNTIMES)
    check_task(model.path, model.facts.task)


def check_task(path: Path, task: str) -> None:
    """Refuse an artifact of a task that this version does not know. Raises UserError."""
    if task not in TASKS:
        raise choice(f"task of {path}", task, TASKS)


def verify(path: Path, seconds: float = RUNNER_SECONDS) -> tuple[Bundle, dict[str, Any]]:
    """Check hashes, open the model and replay the golden inputs, in a process of its own.

    Nothing of the bundle is executed: the runner is this package's.

    Args:
        seconds: after which that process is ended.

    Returns:
        The bundle and what the replay found; ``stand_in`` says that another runtime replayed it.

    Raises:
        UserError: an altered bundle, or no runtime to open it with.
        GateFailed: the model cannot be opened and run, or its golden outputs are off.
    """
    bundle = Bundle.open(path)
    check_known(bundle)
    return bundle, _ask("verify", bundle, (), seconds)


def try_model(model: Model) -> None:
    """Open and run a model in a process of its own, so that one that crashes its runtime does not crash this one.

    Raises:
        UserError: no runtime to open it with.
        GateFailed: it cannot be opened and run, or answers something else than one output a class.
    """
    shape = images_shape(1, model.facts.input.model_dump())
    with tempfile.TemporaryDirectory() as scratch:
        images, outputs = Path(scratch) / "images.npy", Path(scratch) / "outputs.npy"
        np.save(images, np.zeros(shape, np.uint8))
        _ask("predict", model, ("--images", str(images), "--logits", str(outputs)))
        found = np.load(outputs, allow_pickle=False)
    wanted = TASKS[model.facts.task].misfit(found, 1, len(model.labels))
    if wanted is not None or not np.isfinite(found).all():
        raise GateFailed(
            f"{model.path} gives outputs of shape {found.shape}, {found.dtype}: wanted {wanted or 'finite numbers'}"
        )


def _ask(what: str, model: Model | Bundle, more: Sequence[str], seconds: float = RUNNER_SECONDS) -> dict[str, Any]:
    target, stand_in = model.facts.target, model.facts.stand_in
    arguments = [what, str(model.path.absolute()), "--threads", "1", *more]
    if not runtime.is_available(target):
        if stand_in is None or not runtime.is_available(stand_in):
            needs = " and ".join(runtime.RUNTIMES[target].needs)
            raise UserError(f"{model.kind} {model.path} needs {needs}: pip install 'kdpipe[{target}]'")
        arguments.append("--stand-in")
    try:
        return ask_runner(arguments, seconds)
    except GateFailed as error:
        named = str(model.path) in str(error)
        raise error if named else GateFailed(f"{model.path}: {error}") from None
