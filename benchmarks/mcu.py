"""What int8-full costs over int8, what its two tricks are for, and whether a microcontroller would answer the same.

    python benchmarks/mcu.py artifacts/tflite-float32-… artifacts/data-… --images 2000

Of one float32 model of TFLite: INT8 as it is; int8-full; and as controls int8-full with all of normalisation in the
bias (no channel of ones) and with its fully connected layer (no convolution in its place). Each is compared with
float32 on the whole test part, and run by TFLM and LiteRT's reference kernels on some of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.core.artifact import Order
from kdpipe.core.config import QuantizeConfig
from kdpipe.core.kinds import Model
from kdpipe.core.proc import quiet
from kdpipe.data.dataset import Dataset, load_images, load_labels
from kdpipe.deploy.micro import compared
from kdpipe.deploy.native import asked
from kdpipe.export import TARGETS
from kdpipe.quantize import integers
from kdpipe.quantize.layers import signal_to_noise_db
from kdpipe.quantize.stage import quantize
from kdpipe.runtime import open_session, predict
from kdpipe.runtime.task import TASKS

FLOAT32 = "float32"


@contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """Something of ``integers`` is another thing meanwhile."""
    before = getattr(integers, name)
    setattr(integers, name, value)
    try:
        yield
    finally:
        setattr(integers, name, before)


def nothing(*_: object) -> None:
    """In place of what a control goes without."""


CONTENDERS: dict[str, tuple[str, tuple[str, Any] | None]] = {
    "int8": ("int8", None),
    "int8-full": ("int8-full", None),
    "without the channel of ones": ("int8-full", ("LEAST_LEVELS", float("inf"))),
    "with its fully connected layer": ("int8-full", ("as_convolution", nothing)),
}


def made(model: Model, dataset: Dataset, variant: str, out: Path) -> Model:
    order = Order("quantize", QuantizeConfig(variant=variant), {"model": model, "data": dataset})
    return quantize(order, model, dataset, out, TARGETS[model.facts.target].check)


def different(model: Model, images: np.ndarray, scratch: Path) -> int:
    """Of how many images TFLM gives another integer than LiteRT's reference kernels."""
    np.save(scratch / "inputs.npy", images)
    outputs = []
    for engine in ("reference", "micro"):
        given = ("--inputs", scratch / "inputs.npy", "--outputs", scratch / f"{engine}.npy")
        asked(engine, model.entry, *given, seconds=3600)
        outputs.append(np.load(scratch / f"{engine}.npy"))
    return compared(outputs[0], outputs[1])[0]


def main(
    model: Annotated[Path, typer.Argument(help="folder of a float32 model of TFLite")],
    data: Annotated[Path, typer.Argument(help="folder of its dataset")],
    images: Annotated[int, typer.Option(help="that both interpreters run")] = 2000,
) -> None:
    whole, dataset = Model.open(model), Dataset.open(data)
    spec, task = whole.facts.input.model_dump(), TASKS[whole.facts.task]
    samples = dataset.samples("test")
    pixels, labels = load_images(samples, spec), load_labels(samples, spec)

    def outputs_of(found: Model) -> np.ndarray:
        with quiet():
            return predict(open_session(found.path, found.facts.for_runtime(), threads=1), pixels)

    tell: Callable[..., None] = typer.echo
    expected = outputs_of(whole)
    scores = task.scores(expected, labels)
    tell(f"float32: {100 * scores.mean():.2f} % of {len(samples)} test images")
    for name, (variant, control) in CONTENDERS.items():
        with tempfile.TemporaryDirectory() as folder:
            with replaced(*(control or ("LEAST_LEVELS", integers.LEAST_LEVELS))):
                found = made(whole, dataset, variant, Path(folder) / "made")
            actual = outputs_of(found)
            change = task.change(scores, task.scores(actual, labels))
            points = [100 * value for value in (change.difference, change.low, change.high)]
            line = (
                f"{name}: {signal_to_noise_db(expected, actual - expected):.2f} dB, "
                f"{points[0]:+.2f} [{points[1]:+.2f}, {points[2]:+.2f}] points, {found.size_bytes} bytes"
            )
            if variant == "int8-full":
                count = different(found, pixels[:images], Path(folder))
                line += f"; other integers in TFLM for {count} of {min(images, len(pixels))} images"
        tell(line)


if __name__ == "__main__":
    typer.run(main)
