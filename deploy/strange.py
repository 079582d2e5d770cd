"""A model of somebody else's, wrapped so that a device's runner takes it: never opened here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..core.artifact import Order, drafting, sha256_file, write_json
from ..core.config import StrangeConfig, validated
from ..core.errors import UserError
from ..core.inputs import RAW, InputSpec
from ..core.kinds import Model, ModelFacts, as_name
from ..data.dataset import Dataset
from ..runtime.task import USUAL_TASK
from ..runtime.weights import ModelFileError, refuse_files_elsewhere

TARGETS = {".onnx": "onnxruntime", ".tflite": "tflite", ".xml": "openvino"}
NOTHING = InputSpec(size=1, crop_fraction=1.0, interpolation="bilinear", **RAW)


def wrap(path: Path, folder: Path, spec: InputSpec | None = None, dataset: Dataset | None = None) -> Model:
    """The model in ``path`` as a ``Model`` in a new folder, which a device takes in the place of a bundle.

    Args:
        spec: how images become its input, where they do; else it is asked about random ones.
        dataset: whose classes are its outputs, in their order.

    Raises:
        UserError: no such file, another kind of model, or one that keeps its weights elsewhere.
    """
    if path.suffix not in TARGETS:
        raise UserError(f"{path}: wanted a bundle, or a model that ends in {', '.join(TARGETS)}")
    files = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    for file in files:
        if not file.is_file():
            raise UserError(f"no file at {file}: wanted {'the weights of ' + path.name if file != path else 'a model'}")
    try:
        refuse_files_elsewhere(path)
    except ModelFileError as error:
        raise UserError(f"{path}: {error}") from None
    entries = {file: f"model{file.suffix}" for file in files}
    config = StrangeConfig(sha256={entries[file]: sha256_file(file) for file in files}, input=spec)
    how: dict[str, Any] = {"random_input": True} if spec is None else {"normalised_input": True}
    with drafting(Model, Order("wrap", config, {}), folder) as draft:
        for file, entry in entries.items():
            shutil.copyfile(file, draft.path / entry)
        write_json(draft.path / Model.LABELS, [] if dataset is None else list(dataset.classes))
        draft.facts = ModelFacts(
            task=USUAL_TASK if dataset is None else dataset.facts.task,
            target=TARGETS[path.suffix],
            variant="theirs",
            precision="float32",
            entry=entries[path],
            input=spec or NOTHING,
            model=as_name(path.name),
            nodes_by_kind={},
            runtime={**how, "inference_precision": "f32"},
        )
    return draft.artifact


def described(values: dict[str, Any]) -> InputSpec:
    """What a user says of a model's images, the rest as most take them: bicubic, the whole of what fits, 0..255.

    Raises:
        UserError: an unknown field, or a value that none has.
    """
    usual = {"crop_fraction": 1.0, "interpolation": "bicubic", **RAW}
    return validated(InputSpec, {**usual, **values} if isinstance(values, dict) else values, "--input")
