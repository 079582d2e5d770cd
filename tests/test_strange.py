"""Models of others: timed on random input of their own shapes, judged with data where their user says how."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, assert_one_line, kdpipe

from kdpipe.runtime import RUNTIMES, open_session
from kdpipe.runtime.strange import random_values

QUICK = ["--rounds", 2, "--seconds", 0.02, "--max-seconds", 0.05, "--min-samples", 10, "--warm-up-seconds", 0.02]
QUICK += ["--images", 4, "--cold-starts", 1]


def two_inputs(path: Path, open_side: bool = False) -> Path:
    """An ONNX network of an oblong grey picture and of indices, which answers with two outputs."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    side = "side" if open_side else 7
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["n", 1, 5, side])
    words = helper.make_tensor_value_info("words", TensorProto.INT64, ["n", 3])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("mean", "found")]
    nodes = [
        helper.make_node("ReduceMean", ["picture"], ["mean"], keepdims=0),
        helper.make_node("Gather", ["table", "words"], ["found"]),
    ]
    table = numpy_helper.from_array(np.eye(2, 4, dtype=np.float32), "table")  # of two rows: any other index is wrong
    graph = helper.make_graph(nodes, "two", [picture, words], outputs, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def theirs(made: Made, folder: Path) -> dict[str, Path]:
    """One model for each runtime as another tool leaves it: a file, no manifest."""
    found = {"two.onnx": two_inputs(folder / "two.onnx")}
    for name, suffix in (("tflite-int8", ".tflite"), ("openvino-float32", ".xml")):
        entry = made.models[name].entry
        for file in (entry, entry.with_suffix(".bin")):
            if file.exists():
                shutil.copyfile(file, folder / f"net{file.suffix}")
        found[f"net{suffix}"] = folder / f"net{suffix}"
    return found


def test_any_model_is_timed_on_random_input(made: Made, tmp_path: Path) -> None:
    done = kdpipe("bench", *theirs(made, tmp_path).values(), *QUICK)
    assert done.returncode == 75, done.stderr
    measurement, *lines = done.stdout.strip().splitlines()
    assert [line.split(" on ")[0] for line in lines] == ["two.onnx", "net.tflite", "net.xml"]
    assert all(" on local: p50 " in line and " ms on random input, " in line for line in lines)
    manifest = json.loads((Path(measurement) / "manifest.json").read_text())
    assert "data" not in manifest["inputs"] and not list(Path(measurement).glob("logits/*"))
    for name, result in manifest["facts"]["results"].items():
        assert result["status"] == "measured on random input" and result["accuracy"] is None
        assert result["session"]["random_input"] and result["end_to_end_ms"] is result["prepare_ms"] is None
        assert result["latency_p50_ms"]["value"] > 0 and result["memory_growth_bytes"] > 0, name
        assert result["over_float32"] is None, "they have nothing to do with each other"
    assert_one_line(kdpipe("report", measurement), 2, "was made from no bundle")
    # Nothing of it stays beside their files but what was measured.
    kinds = {path.suffix for path in tmp_path.iterdir() if path.is_file()}
    assert kinds == {".onnx", ".tflite", ".xml", ".bin"} and Path(measurement).parent == tmp_path


def test_with_data_it_is_judged_like_a_bundle(made: Made, tmp_path: Path) -> None:
    """The exported student as a file: what it takes is 0..255, said with --input, or the same in another spelling."""
    shutil.copyfile(made.models["onnxruntime-float32"].entry, tmp_path / "student.onnx")
    spec = made.bundles["onnxruntime-float32"].facts.input
    told = f"{{size: 32, crop_fraction: {spec.crop_fraction}, interpolation: {spec.interpolation}}}"
    call = ["bench", tmp_path / "student.onnx", "--data", made.dataset.path, *QUICK, "--json"]
    done = kdpipe(*call, "--input", told)
    assert done.returncode == 75, done.stderr
    [measured] = json.loads(done.stdout)["measurements"]
    found = measured["facts"]["results"]["student.onnx"]
    assert found["accuracy"]["value"] == made.student.facts.test_accuracy and found["batch_one"]["within_tolerance"]
    outputs = np.load(Path(measured["artifact"]) / "logits" / "student.onnx.npy")
    np.testing.assert_allclose(outputs, made.measurement.outputs("onnxruntime-float32"), atol=1e-3)
    assert_one_line(kdpipe(*call), 2, "--data and --input go together")
    assert_one_line(kdpipe(*call, "--input", "{size: 32, sice: 4}"), 2, "unknown key 'sice'", "did you mean 'size'")
    assert_one_line(kdpipe(*call, "--input", "[32]"), 2, "wanted a mapping")


def test_normalised_input_is_what_its_user_says(made: Made) -> None:
    """Fed what mean and std make of 0..255, in place of raw values."""
    model = made.models["onnxruntime-float32"]
    facts = model.facts.for_runtime()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    facts["input"] |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25]}
    raw = open_session(model.path, facts).prepare(images)
    facts["runtime"]["normalised_input"] = True
    found = open_session(model.path, facts).prepare(images)
    mean, std = (np.array(facts["input"][name])[:, None, None] for name in ("mean", "std"))
    np.testing.assert_allclose(found, (raw / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert found.dtype == np.float32


def test_what_is_no_model_of_its_own_is_refused(made: Made, tmp_path: Path) -> None:
    import onnx

    files, bundle = theirs(made, tmp_path), made.bundles["onnxruntime-float32"].path
    assert_one_line(kdpipe("bench", bundle, files["two.onnx"]), 2, "measured apart")
    assert_one_line(kdpipe("bench", tmp_path / "none.onnx"), 2, "no file at", "none.onnx")
    assert_one_line(kdpipe("bench", bundle, "--input", "{size: 32}"), 2, "a bundle says by itself")
    (tmp_path / "net.bin").unlink()
    assert_one_line(kdpipe("bench", files["net.xml"]), 2, "the weights of net.xml")
    (tmp_path / "text.tflite").write_text("hello")
    assert_one_line(kdpipe("bench", tmp_path / "text.tflite"), 2, "no TFLite model")
    model = onnx.load(made.models["onnxruntime-float32"].entry)
    onnx.save(model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert_one_line(kdpipe("bench", tmp_path / "outside.onnx"), 2, "keeps weights outside itself")
    two_inputs(tmp_path / "open.onnx", open_side=True)
    done = kdpipe("bench", tmp_path / "open.onnx", *QUICK)
    assert_one_line(done, 2, "its input 'picture' is [?, 1, 5, ?]: wanted fixed dimensions but for the first")
    assert not list(tmp_path.glob("measurement-*"))


def test_random_values_fit_every_type() -> None:
    generator = np.random.default_rng(0)
    for dtype in ("float32", "float16", "float64", "bool", "uint8", "int8", "int32", "int64"):
        found = random_values(generator, "x", [None, 40, 40], dtype)
        assert found.shape == (1, 40, 40) and found.dtype == dtype
        assert found.min() >= 0 or dtype == "int8"
        assert (found.max() <= 1) == (dtype not in ("uint8", "int8"))
    assert random_values(generator, "x", [], "float32").shape == ()
    for shape, dtype in (([1, -1], "float32"), ([1, "side"], "float32"), ([1], "object")):
        with pytest.raises(ValueError, match="its input 'x'"):
            random_values(generator, "x", shape, dtype)
    assert set(RUNTIMES) == {"onnxruntime", "openvino", "tensorrt", "tflite"}
