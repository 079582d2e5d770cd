"""The quantize stage: a float32 model to a sealed INT8 one, with what it changed on real images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ..core.artifact import Model, drafting, write_json
from ..core.config import QuantizeConfig
from ..core.data import Dataset
from ..core.errors import GateFailed, KdpipeError, UserError
from ..core.proc import first_line, quiet, require
from ..runtime import open_session, predict
from ..runtime.preprocess import load_images
from . import QUANTIZERS
from .calibrate import CalibrationInputs


def quantize(config: QuantizeConfig, model: Model, dataset: Dataset, out: Path) -> Model:
    """Quantise ``model`` to INT8, calibrated on training images.

    Raises:
        UserError: not a float32 model, too few images, a missing package, an operator the quantiser lacks.
        GateFailed: the INT8 model's outputs are not finite or do not depend on the image.
    """
    target = model.facts["target"]
    if model.facts["precision"] != "float32":
        raise UserError(f"{model.path} is {model.facts['precision']} already: give the float32 model")
    quantizer = QUANTIZERS[target]()
    require(f"INT8 for '{target}'", quantizer.needs, target)
    spec = model.facts["input"]
    calibration = dataset.balanced("train", config.calibration_images, config.seed)
    checked = dataset.balanced("train", config.check_images, config.seed, skip=len(calibration))
    with drafting(Model, out, stage="quantize", config=config, inputs={"model": model, "data": dataset}) as draft:
        inputs = CalibrationInputs(calibration, spec, f"calibrating {target}")
        with quiet():
            try:
                settings = quantizer.write(model, inputs, config, draft.path)
            except KdpipeError:
                raise
            except Exception as error:  # every quantiser raises its own
                raise UserError(
                    f"{model.facts['model']} cannot be quantised for {target}: {first_line(error)}"
                ) from error
        draft.facts.update(
            {name: model.facts[name] for name in model.facts.keys() - {"parity"}},
            precision="int8",
            int8=settings,
            calibration_images=len(calibration),
        )
        write_json(draft.path / "calibration.json", {"part": "train", "files": [s.path.name for s in calibration]})
        if checked:
            images = load_images((sample.path for sample in checked), spec)
            stand_in = "stand_in" in model.facts
            with quiet():
                before = predict(open_session(model.path, model.facts, stand_in=stand_in), images)
                after = predict(open_session(draft.path, draft.facts, stand_in=stand_in), images)
            draft.facts["against_float32"] = damage(before, after)
        shutil.copyfile(model.file("labels.json"), draft.path / "labels.json")
    return draft.artifact


def damage(before: np.ndarray, after: np.ndarray) -> dict[str, float | int]:
    """What INT8 changed in logits [N, K]: signal-to-noise ratio in dB and top-1 agreement.

    Raises:
        GateFailed: outputs that are not finite or the same for every image.
    """
    if not np.isfinite(after).all() or not after.std(axis=0).any():
        raise GateFailed("the INT8 model's outputs are not finite or do not depend on the image: it is not sealed")
    noise = float(((after - before) ** 2).mean())
    signal = float((before**2).mean())
    return {
        "images": len(before),
        "signal_to_noise_db": round(10 * float(np.log10(signal / max(noise, 1e-30))), 2),
        "top1_agreement": float((before.argmax(1) == after.argmax(1)).mean()),
    }
