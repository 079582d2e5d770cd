"""One contract over every target: real exporters, real quantisers, real runtimes, real images."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from conftest import EVERY_MODEL, Made, export, quantize

from kdpipe.core.config import ExportConfig, QuantizeConfig
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Checkpoint, Model
from kdpipe.data.dataset import load_images
from kdpipe.export import TARGETS
from kdpipe.export.parity import compare
from kdpipe.export.written import Written
from kdpipe.networks import models
from kdpipe.quantize import VARIANTS
from kdpipe.quantize.stage import damage
from kdpipe.runtime import RUNTIMES, open_session, predict
from kdpipe.runtime.task import TASKS

TASK = TASKS["classification"]


def session_of(model: Model, threads: int = 1):
    return open_session(model.path, model.facts.for_runtime(), threads, stand_in=model.facts.stand_in is not None)


def images_of(made: Made, part: str = "test", count: int = 64) -> np.ndarray:
    samples = made.dataset.balanced(part, count, seed=1)  # type: ignore[arg-type]
    return load_images(samples, made.student.facts.input.model_dump())


def torch_logits(made: Made, images: np.ndarray) -> np.ndarray:
    network, spec = models.restore(made.student)
    with torch.inference_mode():
        return models.Normalise(network, spec).eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()


def test_a_target_is_one_entry_in_each_room() -> None:
    assert set(TARGETS) == set(VARIANTS) == set(RUNTIMES)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_computes_what_torch_computes(made: Made, target: str) -> None:
    model = made.models[f"{target}-float32"]
    images = images_of(made)
    expected = torch_logits(made, images)
    actual = predict(session_of(model), images)
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
    assert (actual.argmax(1) == expected.argmax(1)).all()
    assert model.facts.parity.agreement == 1


@pytest.mark.parametrize(("target", "variant"), EVERY_MODEL)
def test_raw_images_go_in(made: Made, target: str, variant: str) -> None:
    """Normalisation is inside: the runner's input is 0..255, and a black image differs from a white one."""
    model = made.models[f"{target}-{variant}"]
    assert model.facts.input.layout == TARGETS[target].layout
    session = session_of(model)
    black, white = (np.full((1, 32, 32, 3), value, np.uint8) for value in (0, 255))
    # Float as it is, or the top of int8.
    assert np.asarray(session.prepare(white).data).max() in (255, 127)
    assert np.abs(predict(session, black) - predict(session, white)).max() > 0.1


@pytest.mark.parametrize(("target", "variant"), EVERY_MODEL)
def test_every_variant_and_torch_agree_on_most_images(made: Made, target: str, variant: str) -> None:
    images = images_of(made)
    agreement = (
        predict(session_of(made.models[f"{target}-{variant}"]), images).argmax(1)
        == torch_logits(made, images).argmax(1)
    ).mean()
    assert agreement >= 0.75  # a small network of few epochs has narrow margins


@pytest.mark.parametrize("target", TARGETS)
def test_int8_is_smaller_and_different(made: Made, target: str) -> None:
    whole, small = made.models[f"{target}-float32"], made.models[f"{target}-int8"]
    assert small.size_bytes < 0.6 * whole.size_bytes
    images = images_of(made)
    assert np.abs(predict(session_of(small), images) - predict(session_of(whole), images)).max() > 1e-3


@pytest.mark.parametrize("name", ["onnxruntime-float32", "onnxruntime-int8", "openvino-float32", "openvino-int8"])
def test_batch_is_free(made: Made, name: str) -> None:
    session = session_of(made.models[name])
    images = images_of(made, count=5)
    together = predict(session, images)
    apart = predict(session, images, batch=1)
    np.testing.assert_allclose(together, apart, atol=1e-4 * float(apart.std()) + 1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_sessions_say_what_they_are(made: Made, target: str) -> None:
    found = session_of(made.models[f"{target}-float32"], threads=1).describe()
    assert found["threads"] == 1
    assert found["version"]
    if target == "openvino":
        assert found["inference_precision"] == "f32"  # not the bf16 that the plugin likes


def test_onnx_is_one_file_of_the_agreed_opset(made: Made) -> None:
    import onnx

    path = made.models["onnxruntime-float32"].file("model.onnx")
    model = onnx.load(path, load_external_data=False)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def initializers(model) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_onnxruntime_int8_is_u8s8_per_channel(made: Made) -> None:
    import onnx

    model = onnx.load(made.models["onnxruntime-int8"].file("model.onnx"))
    values = initializers(model)
    weights = [
        values[node.input[0]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in values
    ]
    assert any(weight.dtype == np.int8 and weight.ndim == 4 for weight in weights)
    zero_points = [values[node.input[2]].dtype for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert set(zero_points) == {np.dtype(np.uint8)}
    scales = [values[n.input[1]] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in values]
    assert any(scale.size > 1 for scale in scales)


def test_tensorrt_int8_is_explicit_and_symmetric(made: Made) -> None:
    import onnx

    model = onnx.load(made.models["tensorrt-int8"].file("model.onnx"))
    values = initializers(model)
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(nodes) > 20
    for node in nodes:
        zero_point = values[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert node.input[0] not in values or values[node.input[0]].dtype != np.int32


def test_tensorrt_says_that_it_is_not_built(made: Made) -> None:
    model = made.models["tensorrt-float32"]
    assert model.facts.not_built_here is True
    assert "engine" not in [path.suffix for path in model.path.iterdir()]


def test_tflite_int8_keeps_the_whole_input_range(made: Made) -> None:
    session = session_of(made.models["tflite-int8"])
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(2, 1).repeat(2, 2).repeat(3, 3)
    assert len(np.unique(session.prepare(ramp))) == 256


def test_a_file_that_differs_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose file really computes something else: one weight moved."""

    class Broken(TARGETS["onnxruntime"]):  # type: ignore[misc]
        def write(self, source, spec, images, output, folder):
            import onnx
            from onnx import numpy_helper

            written = super().write(source, spec, images, output, folder)
            model = onnx.load(folder / self.entry)
            weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
            moved = numpy_helper.to_array(weight).copy()
            moved[0] += 0.5
            weight.CopyFrom(numpy_helper.from_array(moved, weight.name))
            onnx.save(model, folder / self.entry)
            return written

    monkeypatch.setitem(TARGETS, "onnxruntime", Broken)
    with pytest.raises(GateFailed, match="differs from torch by"):
        export(ExportConfig(target="onnxruntime"), made.graph, made.dataset, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["float32", "int8", "int8-qdq"])
def test_a_file_of_openvino_does_not_depend_on_what_was_made_before(made: Made, variant: str, tmp_path: Path) -> None:
    """OpenVINO counts nodes through a whole process: who goes on with a killed run would make another file."""
    first = made.models[f"openvino-{variant}"]
    if variant == "float32":
        again = export(ExportConfig(target="openvino"), made.graph, made.dataset, tmp_path / "again")
    else:
        config = QuantizeConfig(**first.manifest.config)
        again = quantize(config, made.models["openvino-float32"], made.dataset, tmp_path / "again", made.graph)
    for name in (first.facts.entry, "model.bin"):
        assert again.manifest.files[name].sha256 == first.manifest.files[name].sha256, name


def test_a_new_target_is_one_class_a_room(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target of the tests' own (torch's weights in numpy, opened by numpy) goes through the same stages."""

    class LookupTarget:
        needs = ("numpy",)
        source = Checkpoint
        layout = "NHWC"
        entry = "model.npz"
        runtime = MappingProxyType({})
        stand_in = None
        not_built_here = False

        def write(self, source, spec, images, output, folder):
            logits = torch_logits(made, images)
            np.savez(folder / self.entry, images=images, logits=logits)
            return Written(logits, {"lookup": 1})

        @staticmethod
        def check(entry):
            assert entry.is_file()

    class LookupSession:
        needs = modules = ("numpy",)
        batched = False

        def __init__(self, folder, facts, threads):
            with np.load(folder / facts["entry"]) as table:
                self.images, self.logits = table["images"].astype(int), table["logits"]

        def prepare(self, images):
            return images.astype(int)

        def infer(self, prepared):
            return self.logits[np.abs(self.images - prepared).sum((1, 2, 3)).argmin()][None]

        def describe(self):
            return {"runtime": "lookup", "version": "1", "threads": 1}

    monkeypatch.setitem(TARGETS, "lookup", LookupTarget)
    monkeypatch.setitem(RUNTIMES, "lookup", LookupSession)
    model = export(ExportConfig(target="lookup"), made.student, made.dataset, tmp_path / "model")
    assert model.facts.parity.max_difference < 1e-5


def test_unknown_target(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown target 'tensorflow', wanted onnxruntime, openvino, tensorrt, tflite"):
        export(ExportConfig(target="tensorflow"), made.student, made.dataset, tmp_path / "model")


def test_missing_package_is_said_first(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TARGETS["tflite"], "needs", ("torch", "litert-nowhere"))
    with pytest.raises(UserError, match=r"target 'tflite' needs litert-nowhere: pip install 'kdpipe\[tflite\]'"):
        export(ExportConfig(target="tflite"), made.student, made.dataset, tmp_path / "model")


def test_int8_of_int8(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is int8 already"):
        quantize(QuantizeConfig(), made.models["onnxruntime-int8"], made.dataset, tmp_path / "model")


def test_calibration_comes_from_the_training_part(made: Made) -> None:
    import json

    training = {sample.path.name for sample in made.dataset.samples("train")}
    for target in TARGETS:
        used = json.loads(made.models[f"{target}-int8"].file("evidence/calibration.json").read_text())["files"]
        assert len(used) == 64
        assert set(used) <= training


def test_dead_outputs_are_refused() -> None:
    alive = np.random.default_rng(0).normal(size=(8, 10)).astype(np.float32)
    assert damage(TASK, alive, alive).agreement == 1
    for dead in (np.ones_like(alive), np.full_like(alive, np.nan)):
        with pytest.raises(GateFailed):
            damage(TASK, alive, dead)


def test_parity_refuses_to_say_nothing() -> None:
    constant, paths = np.ones((4, 3), np.float32), [Path(str(at)) for at in range(4)]
    with pytest.raises(GateFailed, match="do not depend"):
        compare(TASK, constant, constant, paths)
    with pytest.raises(GateFailed, match="shape"):
        compare(TASK, np.zeros((4, 3)), np.zeros((4, 2)), paths)
    broken = compare(TASK, np.eye(3), np.full((3, 3), np.nan), paths)
    assert broken.relative > 1e3


def test_a_rewritten_module_computes_the_same() -> None:
    """MobileViTv2's attention as litert-torch can take it."""
    import timm

    from kdpipe.export.rewrites import for_tflite

    network = timm.create_model("mobilevitv2_050", num_classes=10).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(image)
        after = for_tflite(network)(image)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert not torch.equal(after, network(image + 1))
