"""int8-full of TFLite, and holding a bundle against a microcontroller: real interpreters, real images."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import Trained, assert_one_line, kdpipe, quantize, replace_file, rewrite_manifest, system_command

from kdpipe.chain import Chain
from kdpipe.core.config import ExportConfig, McuConfig, QuantizeConfig, Recipe
from kdpipe.core.errors import GateFailed
from kdpipe.core.kinds import Bundle, McuCheck, Model
from kdpipe.data.dataset import load_images
from kdpipe.deploy.micro import compared, lines
from kdpipe.deploy.native import asked
from kdpipe.devices import find_device
from kdpipe.quantize.calibrate import CalibrationInputs
from kdpipe.quantize.flatbuffer import Flatbuffer
from kdpipe.quantize.integers import float_operators, fold_normalisation
from kdpipe.quantize.layers import signal_to_noise_db
from kdpipe.quantize.micro import FoldedActivations, FullInt8
from kdpipe.quantize.tflite import TfliteActivations
from kdpipe.quantize.work import Work
from kdpipe.runtime import open_session, predict

IMAGENET = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255


class Full(NamedTuple):
    float32: Model
    int8: Model
    model: Model
    bundle: Bundle
    chain: Chain
    trained: Trained


@pytest.fixture(scope="module")
def full(small: tuple[Recipe, Path], trained: Trained) -> Full:
    """What the small recipe makes for TFLite."""
    recipe, folder = small
    chain, dataset = Chain(folder), trained.dataset
    float32 = chain.export(ExportConfig.of(recipe.export, target="tflite"), trained.student, dataset)
    plan = recipe.quantize.model_copy(update={"variants": ("int8", "int8-full")})
    variants = chain.variants(plan, float32, dataset, find_device("local").probe())
    by_name = {each.facts.variant: each for each in variants}
    model = by_name["int8-full"]
    return Full(float32, by_name["int8"], model, chain.package(recipe.package, model, dataset), chain, trained)


def images_of(full: Full, count: int) -> np.ndarray:
    samples = full.trained.dataset.balanced("test", count, seed=1)
    return load_images(samples, full.float32.facts.input.model_dump())


def normalising(full: Full, mean: np.ndarray, std: np.ndarray, out: Path, first: str | None = None) -> Path:
    """The float32 file with another mean and standard deviation, and perhaps an operator before its first layer."""
    file = Flatbuffer(full.float32.entry)
    [subtract, multiply] = file.graph.operators[:2]
    assert [file.kind(each) for each in (subtract, multiply)] == ["SUB", "MUL"]
    for operator, values in ((subtract, mean), (multiply, 1 / std)):
        operator.inputs = np.array([operator.inputs[0], file.add_constant(values)], np.int32)
    if first is not None:
        shape = file.graph.tensors[int(multiply.outputs[0])].shape
        made = file.add_tensor(first, shape, file.schema.TensorType.FLOAT32)
        [user] = file.users(int(multiply.outputs[0]))
        user.inputs = np.array([made, *user.inputs[1:]], np.int32)
        file.graph.operators.insert(2, file.operator(first, [int(multiply.outputs[0])], made))
    file.write(out)
    return out


# ---- folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "first", "into", "least_db"),
    [
        # 127 is a level, 127.5 is half a one off.
        (np.full(3, 127.0), np.full(3, 127.5), None, "convolution", 100),
        (np.full(3, 127.5), np.full(3, 127.5), None, "convolution", 45),
        (np.zeros(3), np.full(3, 255.0), None, "convolution", 100),
        (np.full(3, 127.0), np.array([55.0, 60.0, 65.0]), None, "convolution", 100),
        (*IMAGENET, None, "convolution with a channel of ones", 100),
        (np.full(3, 127.5), np.full(3, 127.5), "RELU", "input", 40),
        (*IMAGENET, "RELU", "kept", 100),
    ],
)
def test_normalisation_leaves_nothing_behind(
    full: Full, tmp_path: Path, mean: np.ndarray, std: np.ndarray, first: str | None, into: str, least_db: float
) -> None:
    """The folded file computes what the file with its normalisation computes; where it pads too."""
    whole = normalising(full, mean, std, tmp_path / "whole.tflite", first)
    found = fold_normalisation(whole, tmp_path / "folded.tflite")
    assert found.into == into
    assert found.padded_with_levels <= 0.5
    kinds = [layer.kind for layer in TfliteActivations(tmp_path / "folded.tflite").layers]
    assert ("SUB" in kinds, "MUL" in kinds) == (False, into == "kept")
    before, after = TfliteActivations(whole), FoldedActivations(tmp_path / "folded.tflite", found)
    pixels = images_of(full, 24).astype(np.float32)
    expected, actual = (
        np.concatenate([graph(image[None])[graph.layers[-1].output] for image in pixels]) for graph in (before, after)
    )
    assert signal_to_noise_db(expected, actual - expected) >= least_db


@pytest.mark.parametrize(
    ("mean", "std", "into"), [(np.full(3, 127.5), np.full(3, 127.5), "input"), (*IMAGENET, "kept")]
)
def test_without_a_convolution_to_take_it(
    full: Full, tmp_path: Path, mean: np.ndarray, std: np.ndarray, into: str
) -> None:
    """Integers only, all the same: normalisation that is kept is rounded as any other operator."""
    shutil.copytree(full.float32.path, tmp_path / "float32")
    whole = normalising(full, mean, std, tmp_path / "whole.tflite", "RELU")
    replace_file(tmp_path / "float32", "model.tflite", whole.read_bytes())
    config = QuantizeConfig(variant="int8-full", calibrate={"images": 16}, correct_biases=False, allow_damage=True)
    found = quantize(config, Model.open(tmp_path / "float32"), full.trained.dataset, tmp_path / "made")
    assert found.facts.settings["normalisation"]["folded_into"] == into
    assert float_operators(found.entry) == []
    assert found.facts.against_float32.signal_to_noise_db >= 12
    assert ("MUL" in [layer.kind for layer in TfliteActivations(found.entry).layers]) == (into == "kept")


def test_what_the_channel_of_ones_is_for(full: Full, tmp_path: Path) -> None:
    """Control: with ImageNet's means and the sum in the bias alone, the edges are another image's."""
    whole = normalising(full, *IMAGENET, tmp_path / "whole.tflite")
    found = fold_normalisation(whole, tmp_path / "folded.tflite")
    file = Flatbuffer(tmp_path / "folded.tflite")
    [ones] = [each for each in file.graph.operators if file.kind(each) == "PADV2"][:1]
    [padding] = file.users(int(ones.outputs[0]))
    # What is padded is ones too: as if the bias had all of it.
    value = file.constant(int(ones.inputs[2]))
    padding.inputs = np.array([*padding.inputs, file.add_constant(value)], np.int32)
    plain = file.operator("PADV2", [int(at) for at in padding.inputs], int(padding.outputs[0]))
    file.graph.operators[file.graph.operators.index(padding)] = plain
    file.write(tmp_path / "control.tflite")
    graphs = TfliteActivations(whole), FoldedActivations(tmp_path / "control.tflite", found)
    pixels = images_of(full, 24).astype(np.float32)
    expected, actual = (
        np.concatenate([graph(image[None])[graph.layers[-1].output] for image in pixels]) for graph in graphs
    )
    assert signal_to_noise_db(expected, actual - expected) < 40


def test_fully_connected_layers_are_convolutions(full: Full, tmp_path: Path) -> None:
    """Of one row [1, C] as the last layer is, and of every place of a map."""
    whole = normalising(full, np.full(3, 127.0), np.full(3, 127.5), tmp_path / "whole.tflite", "RELU")
    file = Flatbuffer(whole)
    [relu] = [each for each in file.graph.operators if file.kind(each) == "RELU"]
    weights = np.array([[0.9, 0.2, -0.1], [0.1, 0.8, 0.2], [-0.2, 0.1, 1.1]])
    mixing = file.operator(
        "FULLY_CONNECTED", [int(relu.inputs[0]), file.add_constant(weights), -1], int(relu.outputs[0])
    )
    mixing.builtinOptionsType = file.schema.BuiltinOptions.FullyConnectedOptions
    mixing.builtinOptions = file.schema.FullyConnectedOptionsT()
    mixing.builtinOptions.keepNumDims = True
    file.graph.operators[file.graph.operators.index(relu)] = mixing
    file.write(whole)
    found = fold_normalisation(whole, tmp_path / "folded.tflite")
    before, after = TfliteActivations(whole), FoldedActivations(tmp_path / "folded.tflite", found)
    assert sum(layer.kind == "FULLY_CONNECTED" for layer in before.layers) == 2
    assert [layer.kind for layer in after.layers if layer.kind in ("FULLY_CONNECTED", "RESHAPE")] == ["RESHAPE"] * 2
    pixels = images_of(full, 8).astype(np.float32)
    expected, actual = (
        np.concatenate([graph(image[None])[graph.layers[-1].output] for image in pixels]) for graph in (before, after)
    )
    assert signal_to_noise_db(expected, actual - expected) >= 100


def test_float_is_named(full: Full) -> None:
    assert float_operators(full.model.entry) == []
    assert float_operators(full.int8.entry) == ["SUB", "MUL"]  # normalisation, which int8 leaves to the CPU


# ---- the file, and the bundle like any other ---------------------------------------------------------------


def test_bytes_go_in_and_logits_come_out(full: Full) -> None:
    session = open_session(full.bundle.path, full.bundle.facts.for_runtime())
    images = images_of(full, 48)
    prepared = session.prepare(images[:1])
    assert prepared.dtype == np.uint8 and np.array_equal(prepared, images[:1])
    expected = predict(open_session(full.float32.path, full.float32.facts.for_runtime()), images)
    actual = predict(session, images)
    assert actual.dtype == np.float32
    assert (actual.argmax(1) == expected.argmax(1)).mean() >= 0.9
    plain = predict(open_session(full.int8.path, full.int8.facts.for_runtime()), images)
    # As good as INT8 with normalisation in float, of which it saves what the image's two roundings cost.
    noise = [signal_to_noise_db(expected, each - expected) for each in (actual, plain)]
    assert noise[0] >= noise[1] - 3
    assert session.describe()["input_dtype"] == "uint8"


def test_names_are_short_and_nothing_is_left_over(full: Full) -> None:
    """Flash is dear: the converter's names, and the constants that folding replaced, are gone."""
    file = Flatbuffer(full.model.entry)
    used = {int(at) for each in file.graph.operators for at in (*each.inputs, *each.outputs)}
    assert len(used - {-1}) == len(file.graph.tensors)
    assert max(len(tensor.name) for tensor in file.graph.tensors) < 60
    assert full.model.size_bytes < full.int8.size_bytes


@pytest.fixture(scope="module")
def variant(full: Full) -> FullInt8:
    samples = full.trained.dataset.balanced("train", 16, seed=0)
    inputs = CalibrationInputs(samples, full.float32.facts.input.model_dump(), "calibrating")
    config = QuantizeConfig(variant="int8-full", correct_biases=False)
    return FullInt8(Work(full.float32, None, inputs, config, lambda _: None))


@pytest.mark.parametrize("kept", ["none", "first", "last", "all"])
def test_layers_that_stay_float(full: Full, variant: FullInt8, tmp_path: Path, kept: str) -> None:
    """The guard may keep any layer in float: bytes go in and out all the same."""
    layers = variant.activations(full.float32.entry).layers
    convolutions = [layer.name for layer in layers if layer.kind == "CONV_2D"]
    names = {"none": [], "first": convolutions[:1], "last": convolutions[-1:], "all": [each.name for each in layers]}
    taken = variant.write(names[kept], tmp_path)
    facts = full.model.facts.model_copy(update={"runtime": taken.runtime}).for_runtime()
    images = images_of(full, 32)
    expected = predict(open_session(full.float32.path, full.float32.facts.for_runtime()), images)
    actual = predict(open_session(tmp_path, facts), images)
    assert signal_to_noise_db(expected, actual - expected) >= 12
    assert bool(float_operators(tmp_path / "model.tflite")) == (kept != "none")
    file = Flatbuffer(tmp_path / "model.tflite")
    for port in (*file.graph.inputs, *file.graph.outputs):
        assert file.graph.tensors[int(port)].type == file.schema.TensorType.UINT8


def test_the_guard_of_it(full: Full, tmp_path: Path) -> None:
    config = QuantizeConfig(
        variant="int8-full", calibrate={"images": 16}, max_drop=20, guard_part="test", correct_biases=False
    )
    guard = quantize(config, full.float32, full.trained.dataset, tmp_path / "guarded").facts.guard
    assert guard is not None and guard.confirmed.answer != "fails"


# ---- the check ---------------------------------------------------------------------------------------------


def test_the_same_integers_on_a_microcontroller(full: Full, tmp_path: Path) -> None:
    config = McuConfig(images=40, accelerators=["ethos-u55-128", "ethos-u85-256"])
    found = full.chain.check_mcu(config, full.bundle, full.trained.dataset, tmp_path / "checked")
    facts = found.facts
    assert facts.images == 40 + full.bundle.facts.golden_images
    assert facts.different == facts.largest_difference == 0 and facts.refused == () and facts.in_float == {}
    assert facts.arena.total >= facts.arena.head + facts.arena.tail
    assert facts.model_bytes == full.bundle.file("model.tflite").stat().st_size
    assert facts.input.type == facts.output.type == "uint8"
    for estimate in facts.estimates:
        assert estimate.fault is None and estimate.operators_on_cpu == 0
        assert estimate.inference_ms == pytest.approx(1e3 * estimate.cycles / estimate.clock_hz, rel=1e-3)
    told = list(lines(facts))
    assert sum("an estimate and no measurement" in line for line in told) == 2
    assert told[-1].startswith("no firmware was built")
    # The array is the model.
    text = found.file(McuCheck.SOURCE).read_text()
    assert (
        bytes(int(value, 16) for value in re.findall(r"0x([0-9a-f]{2}),", text))
        == full.bundle.file("model.tflite").read_bytes()
    )
    header = found.file(McuCheck.HEADER).read_text()
    assert f'#define KDPIPE_MODEL_SHA256 "{facts.sha256}"' in header
    assert f"#define KDPIPE_MODEL_BYTES {facts.model_bytes}\n" in header
    # It is found again, and not done again.
    assert full.chain.check_mcu(config, full.bundle, full.trained.dataset, tmp_path / "checked").key == found.key


def test_an_arena_of_less_does_not_do(full: Full, tmp_path: Path) -> None:
    """What is said of the arena is measured: it runs in so many bytes, and not in fewer."""
    np.save(tmp_path / "inputs.npy", images_of(full, 2))
    given = ("--inputs", tmp_path / "inputs.npy", "--outputs", tmp_path / "outputs.npy")
    model = full.bundle.file("model.tflite")
    total = asked("micro", model, *given)["total"]
    assert asked("micro", model, *given, "--arena-bytes", total)["total"] == total
    with pytest.raises(GateFailed, match="TFLM refuses the file: "):
        asked("micro", model, *given, "--arena-bytes", total - 16)


@pytest.fixture
def bundle(full: Full, tmp_path: Path) -> Path:
    """A copy to be bent."""
    shutil.copytree(full.bundle.path, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_limits_are_kept_or_refused(bundle: Path, tmp_path: Path) -> None:
    arguments = ("check", bundle, "--mcu", "--accelerators", "[]", "--json")
    done = kdpipe(*arguments, "--ram", "256k", "--flash", "1M")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)["facts"]
    exact = kdpipe(*arguments, "--ram", facts["arena"]["total"], "--flash", facts["model_bytes"])
    assert exact.returncode == 0, exact.stderr
    refused = kdpipe(*arguments, "--ram", facts["arena"]["total"] - 1, "--flash", facts["model_bytes"] - 1)
    assert_one_line(refused, 1, "--ram", "--flash", f"{facts['model_bytes']:,} bytes")
    said = json.loads(refused.stdout)
    assert len(said["facts"]["refused"]) == 2
    assert McuCheck.open(said["artifact"]).manifest.files == {}, "what does not fit is handed to nobody"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("--mcu",)),
        (("--mcu", "--ram", "1x"), ("ram", "256k")),
        (("--mcu", "--ram", "0"), ("ram",)),
        (("--mcu", "--accelerators", "ethos-u99"), ("accelerators",)),
        (("--mcu", "--data", "."), ("manifest",)),
    ],
)
def test_mistakes(bundle: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(kdpipe("check", bundle, *arguments), 2, *words)


def test_another_variant_is_told_how(full: Full, small: tuple[Recipe, Path]) -> None:
    other = full.chain.package(small[0].package, full.int8, full.trained.dataset)
    assert_one_line(kdpipe("check", other.path, "--mcu"), 2, "int8 of tflite", "--variant int8-full")


def test_a_bundle_in_a_release_stays_alone(full: Full, tmp_path: Path) -> None:
    inside = tmp_path / "release" / "bundles" / "one"
    shutil.copytree(full.bundle.path, inside)
    shutil.copy(full.bundle.path / "manifest.json", tmp_path / "release")
    assert_one_line(kdpipe("check", inside, "--mcu"), 2, "--out")
    assert sorted(path.name for path in inside.parent.iterdir()) == ["one"]


def test_other_integers_are_counted() -> None:
    expected = np.array([[1, 2], [3, 4], [5, 255]], np.uint8)
    assert compared(expected, expected.copy()) == (0, 0)
    actual = expected.copy()
    actual[1, 0], actual[2, 1] = 0, 0
    assert compared(expected, actual) == (2, 255)
    with pytest.raises(GateFailed, match="wanted integers"):
        compared(expected.astype(np.float32), actual.astype(np.float32))
    with pytest.raises(GateFailed, match="shape"):
        compared(expected, actual[:2])


# ---- files of strangers ------------------------------------------------------------------------------------


def test_operators_that_it_lacks_are_one_line(bundle: Path, tmp_path: Path) -> None:
    """All of them at once, though the interpreter stops at the first."""
    file = Flatbuffer(bundle / "model.tflite")
    places = [at for at, each in enumerate(file.graph.operators) if file.kind(each) == "CONV_2D"]
    for at, kind in zip(places[1:3], ("GELU", "ATAN2"), strict=True):
        operator = file.graph.operators[at]
        file.graph.operators[at] = file.operator(kind, [int(operator.inputs[0])], int(operator.outputs[0]))
    file.write(tmp_path / "odd.tflite")
    np.save(tmp_path / "inputs.npy", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(GateFailed, match=r"^TFLM lacks GELU, ATAN2: choose"):
        asked("micro", tmp_path / "odd.tflite", "--inputs", tmp_path / "inputs.npy", "--outputs", tmp_path / "o.npy")


def test_a_crash_is_one_line(full: Full, tmp_path: Path) -> None:
    np.save(tmp_path / "inputs.npy", images_of(full, 1))
    given = ("--inputs", tmp_path / "inputs.npy", "--outputs", tmp_path / "outputs.npy")
    with pytest.raises(GateFailed, match=r"^TFLM crashed \(SIG"):
        asked("micro", full.bundle.file("model.tflite"), *given, "--arena-bytes", 16)  # its interpreter takes no care
    with pytest.raises(GateFailed, match=r"^TFLM did not end in 0 s"):
        asked("micro", full.bundle.file("model.tflite"), *given, seconds=0.01)
    (tmp_path / "none.tflite").write_bytes(b"\x00" * 64)
    for engine in ("micro", "reference", "ethos"):
        with pytest.raises(GateFailed):
            asked(engine, tmp_path / "none.tflite", *given)


def test_bent_files_crash_nothing_here(bundle: Path) -> None:
    """Bytes of the graph are changed together with the hashes, as a stranger can: one line, whatever becomes of it."""
    whole = (bundle / "model.tflite").read_bytes()
    generator, codes = np.random.default_rng(4), set()
    for _ in range(4):
        bent = bytearray(whole)
        for at in generator.integers(len(bent) - 30_000, len(bent), 40):
            bent[at] = generator.integers(256)
        replace_file(bundle, "model.tflite", bytes(bent))
        done = kdpipe("check", bundle, "--mcu", "--accelerators", "ethos-u55-32")
        codes.add(done.returncode)
        assert done.returncode in (0, 1, 2) and "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            assert_one_line(done, done.returncode)
    assert codes - {0}, "nothing was bent enough: the test shows nothing"


def test_an_altered_bundle_is_not_run(bundle: Path) -> None:
    (bundle / "model.tflite").write_bytes(b"\x00" * 64)
    assert_one_line(kdpipe("check", bundle, "--mcu"), 2, "model.tflite")


def test_a_manifest_that_promises_bytes(full: Full, small: tuple[Recipe, Path], tmp_path: Path) -> None:
    """The file takes something else: refused by what it is."""
    other = full.chain.package(small[0].package, full.int8, full.trained.dataset)
    shutil.copytree(other.path, tmp_path / "bundle")
    rewrite_manifest(tmp_path / "bundle", lambda value: value["facts"]["runtime"].update(bytes_input=True))
    assert_one_line(kdpipe("check", tmp_path / "bundle", "--mcu"), 1, "LiteRT refuses the file")


# ---- the array ---------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_the_array_compiles_and_is_the_model(full: Full, tmp_path: Path) -> None:
    found = full.chain.check_mcu(McuConfig(accelerators=[]), full.bundle, None, tmp_path / "checked")
    (tmp_path / "main.cc").write_text(
        f'#include <cstdio>\n#include <cstdint>\n#include "{McuCheck.HEADER}"\n'
        "int main() {\n"
        "  std::fwrite(kdpipe_model, 1, KDPIPE_MODEL_BYTES, stdout);\n"
        "  return reinterpret_cast<std::uintptr_t>(kdpipe_model) % KDPIPE_MODEL_ALIGNMENT != 0;\n}\n"
    )
    compiled = [system_command("g++"), "-std=c++11", "-Wall", "-Wextra", "-Werror", "-I", found.path, "main.cc"]
    subprocess.run([*compiled, found.file(McuCheck.SOURCE), "-o", "main"], check=True, cwd=tmp_path)
    done = subprocess.run([tmp_path / "main"], capture_output=True, check=True)
    assert done.stdout == full.bundle.file("model.tflite").read_bytes()
    assert hashlib.sha256(done.stdout).hexdigest() == found.facts.sha256
