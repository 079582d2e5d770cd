"""An ONNX file as a network that answers and never learns: through ONNX Runtime, its weights unseen by torch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.inputs import RAW, InputSpec, size_words
from ..core.proc import first_line, require
from ..runtime.weights import ModelFileError, refuse_files_elsewhere

# What it takes unless its user says otherwise: the whole square, colours in 0..255.
INPUT: dict[str, Any] = {"input_size": (3, 224, 224), **RAW, "crop_pct": 1.0, "interpolation": "bicubic"}
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class OnnxNetwork(nn.Module):
    """Float images [N, 3, H, W], normalised, to logits float32 [N, K], or [N, K, h, w] of one that draws masks.

    A file that ends in probabilities is asked for their logarithms, which are logits as good as those before a softmax.
    """

    def __init__(self, path: Path, spec: InputSpec) -> None:
        """Open ``path``. Raises UserError for what is no such network."""
        super().__init__()
        require("an ONNX file as the teacher", ("onnx", "onnxruntime"), "onnxruntime")
        if not path.is_file():
            raise UserError(f"no file at {path}: wanted an .onnx file")
        try:
            refuse_files_elsewhere(path)
        except ModelFileError as error:
            raise UserError(f"{path}: {error}") from None
        import onnxruntime

        self.path = path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has many of its own
            raise UserError(f"ONNX Runtime cannot open {path}: {first_line(error)}") from None
        given = self._session.get_inputs()
        if len(given) != 1 or len(given[0].shape) != 4 or given[0].type not in TYPES:
            told = ", ".join(f"{each.name} {each.shape} {each.type}" for each in given)
            raise UserError(f"{path} takes {told}: wanted one image, float [N, 3, H, W]")
        [self._input], self._type = given, TYPES[given[0].type]
        shape = self._input.shape
        self._channels_last = shape[3] == 3 and shape[1] != 3
        self._one_by_one = isinstance(shape[0], int)
        wanted = (*spec.shape[1:], 3) if self._channels_last else spec.shape
        if any(isinstance(has, int) and has != want for has, want in zip(shape[1:], wanted, strict=True)):
            raise UserError(
                f"{path} takes images of {shape[1:]}, input.size {size_words(spec.size)} makes {list(wanted)}: "
                "set input.size"
            )
        if self._one_by_one and shape[0] != 1:
            raise UserError(f"{path} takes {shape[0]} images at a time: wanted any number, or one")
        self._gives_probabilities = False
        self._gives_probabilities = self._look(spec)

    def _look(self, spec: InputSpec) -> bool:
        """Whether what it says of some noise are probabilities."""
        noise = np.random.default_rng(0).normal(size=(2, *spec.shape)).astype(np.float32)
        try:
            said = self(torch.from_numpy(noise)).numpy()
        except Exception as error:  # the runtime has many of its own
            raise UserError(f"ONNX Runtime cannot run {self.path}: {first_line(error)}") from None
        if said.ndim not in (2, 4):
            raise UserError(
                f"{self.path} gives outputs of shape {list(said.shape)}: wanted [N, classes], or [N, classes, H, W]"
            )
        return bool((said >= 0).all() and np.allclose(said.sum(1), 1, atol=1e-3) and said.shape[1] > 1)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """One answer an image, on the device of ``image``."""
        values = image.detach().cpu().float().numpy().astype(self._type)
        if self._channels_last:
            values = values.transpose(0, 2, 3, 1)
        step = 1 if self._one_by_one else len(values)
        parts = [
            self._session.run(None, {self._input.name: np.ascontiguousarray(values[at : at + step])})[0]
            for at in range(0, len(values), step)
        ]
        said = torch.from_numpy(np.concatenate(parts).astype(np.float32))
        if self._gives_probabilities:
            said = said.clamp(min=torch.finfo(torch.float32).tiny).log()
        return said.to(image.device)

    def count_parameters(self) -> int:
        """Numbers in its initialisers."""
        import onnx

        graph = onnx.load(self.path, load_external_data=False).graph
        return sum(math.prod(tensor.dims) for tensor in graph.initializer)

    def __deepcopy__(self, _: dict[int, Any]) -> OnnxNetwork:
        """Itself: it never changes."""
        return self
