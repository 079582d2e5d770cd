"""Artifacts from strangers, who can recompute every hash: whatever they write ends in one line, here and on a device.

Each case is how an artifact was altered and sealed again, the command, its exit code and words of its line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ROOT, Made, assert_one_line, replace_file, rewrite_manifest
from conftest import kdpipe as kdpipe_command

import kdpipe.runtime.__main__
from kdpipe.core import sealed
from kdpipe.core.artifact import MANIFEST
from kdpipe.core.errors import GateFailed
from kdpipe.core.kinds import Bundle
from kdpipe.deploy.bundle import verify
from kdpipe.runtime.bundle import read_facts
from kdpipe.runtime.preprocess import decode

Alter = Callable[[Path], object]


class Case(NamedTuple):
    """How an artifact was altered, and the exit code and words that the command must end with."""

    alter: Alter
    exit_code: int
    words: tuple[str, ...]


# ---- altering ----------------------------------------------------------------------------------------------


def manifest(change: Callable[[dict[str, Any]], object]) -> Alter:
    return lambda folder: rewrite_manifest(folder, change)


def facts(**change: Any) -> Alter:
    return manifest(lambda value: value["facts"].update(change))


def without(*path: str) -> Alter:
    def drop(value: dict[str, Any]) -> None:
        for name in path[:-1]:
            value = value[name]
        del value[path[-1]]

    return manifest(drop)


def text(change: Callable[[str], str]) -> Alter:
    """The manifest's text, whose digest is not made to fit: what is refused before it is looked at."""

    def alter(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(change(path.read_text()))

    return alter


def file(name: str, content: bytes | Callable[[bytes], bytes]) -> Alter:
    def alter(folder: Path) -> None:
        replace_file(folder, name, content if isinstance(content, bytes) else content((folder / name).read_bytes()))

    return alter


def rename_entry(name: str) -> Alter:
    """The model lies elsewhere, and every record of it with it."""

    def alter(folder: Path) -> None:
        def change(value: dict[str, Any]) -> None:
            value["files"][name] = value["files"].pop(value["facts"]["entry"])
            value["facts"]["entry"] = name

        entry = json.loads((folder / MANIFEST).read_text())["facts"]["entry"]
        target = folder / name
        if ".." not in name:
            target.parent.mkdir(exist_ok=True)
            (folder / entry).rename(target)
        rewrite_manifest(folder, change)

    return alter


def in_place_of_manifest(make: Callable[[Path], object]) -> Alter:
    def alter(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        make(folder / MANIFEST)

    return alter


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def sparse(name: str, size_bytes: int) -> Alter:
    """A file that takes no room and would take minutes to read."""

    def alter(folder: Path) -> None:
        with (folder / name).open("wb") as stream:
            stream.truncate(size_bytes)
        record = {"sha256": "0" * 64, "size_bytes": size_bytes}
        rewrite_manifest(folder, lambda value: value["files"].update({name: record}))

    return alter


def golden(change: Callable[[dict[str, np.ndarray]], object], save: Callable[..., None] = np.savez) -> Alter:
    def alter(folder: Path) -> None:
        with np.load(folder / "golden.npz") as saved:
            arrays = dict(saved)
        change(arrays)
        stream = io.BytesIO()
        save(stream, **arrays)
        replace_file(folder, "golden.npz", stream.getvalue())

    return alter


def both(*alters: Alter) -> Alter:
    return lambda folder: [alter(folder) for alter in alters]


def npy_that_claims(shape: tuple[int, ...]) -> bytes:
    """An array that says it has this shape and holds nothing."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz_that_claims(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("images", "logits"):
            archive.writestr(f"{name}.npy", npy_that_claims(shape))
    return stream.getvalue()


def scrambled(content: bytes) -> bytes:
    """The same graph with other weights."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(content)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            tensor.CopyFrom(numpy_helper.from_array(values[::-1].copy(), tensor.name))
    return bytes(model.SerializeToString())


def external(location: str, where: str = "initializer") -> Callable[[bytes], bytes]:
    """Weights that the file says are elsewhere: in an initializer, a node's constant, or a function's."""

    def change(content: bytes) -> bytes:
        import onnx

        model = onnx.load_from_string(content)
        tensor = onnx.TensorProto(name="stray", data_type=1, dims=[1 << 20], data_location=1)
        tensor.external_data.add(key="location", value=location)
        tensor.external_data.add(key="offset", value="4096")
        tensor.external_data.add(key="length", value=str(4 << 20))
        node = onnx.helper.make_node("Constant", [], ["stray"], value=tensor)
        if where == "initializer":
            model.graph.initializer.append(tensor)
        elif where == "constant":
            model.graph.node.insert(0, node)
        elif where == "branch":
            inner = onnx.helper.make_graph([node], "inner", [], [onnx.ValueInfoProto(name="stray")])
            model.graph.node.insert(0, onnx.helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner))
        else:
            model.functions.add(name="f", domain="d", node=[node])
        return bytes(model.SerializeToString())

    return change


def endless(content: bytes) -> bytes:
    """A network of the same input and output that first counts to 2^60."""
    import onnx
    from onnx import helper

    model = onnx.load_from_string(content)
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_"]), helper.make_node("Sin", ["x"], ["x_"])],
        "body",
        [value("turn", 7, []), value("on", 9, []), value("x", 1, [1])],
        [value("on_", 9, []), value("x_", 1, [1])],
    )
    given, wanted = model.graph.input[0].name, model.graph.output[0]
    nodes = [
        helper.make_node("Loop", ["count", "on", "one"], ["turned"], body=body),
        helper.make_node("GlobalAveragePool", [given], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("ReduceSum", ["flat", "axes"], ["sum"], keepdims=1),
        helper.make_node("Add", ["sum", "turned"], ["added"]),
        helper.make_node("Expand", ["added", "shape"], [wanted.name]),
    ]
    constants = [
        helper.make_tensor("count", 7, [], [1 << 60]),
        helper.make_tensor("on", 9, [], [True]),
        helper.make_tensor("one", 1, [1], [1.0]),
        helper.make_tensor("axes", 7, [1], [1]),
        helper.make_tensor("shape", 7, [2], [1, 10]),
    ]
    graph = helper.make_graph(nodes, "endless", list(model.graph.input), [wanted], constants)
    return bytes(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8).SerializeToString())


def of_shape(*shape: int) -> Callable[[bytes], bytes]:
    """A network of the same input whose output always has this shape."""

    def change(content: bytes) -> bytes:
        import onnx
        from onnx import helper

        model = onnx.load_from_string(content)
        output = helper.make_tensor_value_info("answer", 1, list(shape))
        values = helper.make_tensor("answer_", 1, list(shape), np.zeros(shape).ravel())
        nodes = [
            helper.make_node("ReduceMean", [model.graph.input[0].name], ["mean"], keepdims=0),
            helper.make_node("Add", ["mean", "answer_"], ["answer"]),
        ]
        graph = helper.make_graph(nodes, "shape", list(model.graph.input), [output], [values])
        return bytes(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8).SerializeToString())

    return change


def greedy(content: bytes) -> bytes:
    """A network that asks for 4 TiB."""
    import onnx
    from onnx import helper

    model = onnx.load_from_string(content)
    shape = helper.make_tensor("shape", 7, [2], [1 << 20, 1 << 20])
    nodes = [
        helper.make_node("GlobalAveragePool", [model.graph.input[0].name], ["pooled"]),
        helper.make_node("ReduceMean", ["pooled"], ["scalar"], keepdims=0),
        helper.make_node("Expand", ["scalar", "shape"], [model.graph.output[0].name]),
    ]
    graph = helper.make_graph(nodes, "greedy", list(model.graph.input), list(model.graph.output), [shape])
    return bytes(helper.make_model(graph, opset_imports=model.opset_import, ir_version=8).SerializeToString())


# ---- bundles -----------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07"

# Refused by whoever reads the bundle, host and runner alike, before anything of it is opened.
UNREADABLE: dict[str, Case] = {
    # what becomes a path, a command or a module
    "variant with ..": Case(facts(variant="v/../../numpy"), 2, ("variant", "wanted a name")),
    "variant that climbs": Case(facts(variant="x/../../../../planted"), 2, ("variant", "wanted a name")),
    "variant that is empty": Case(facts(variant=""), 2, ("variant", "wanted a name")),
    "variant with a newline": Case(facts(variant="int8\n"), 2, ("control characters",)),
    "target that climbs": Case(facts(target="../../x"), 2, ("target", "wanted a name")),
    "model with a slash": Case(facts(model="a/b"), 2, ("model", "wanted a name")),
    "stand-in that climbs": Case(facts(stand_in="../x"), 2, ("stand_in", "wanted a name")),
    "absolute entry": Case(facts(entry="/etc/passwd"), 2, ("entry", "wanted a name")),
    "entry with ..": Case(facts(entry="../model.onnx"), 2, ("entry", "wanted a name")),
    "entry below": Case(rename_entry("runtime/model.onnx"), 2, ("entry", "wanted a name")),
    "a file's name with ..": Case(rename_entry("../model.onnx"), 2, ("entry", "wanted a name")),
    "kind that climbs": Case(manifest(lambda value: value.update(kind="../bundle")), 2, ("kind", "wanted a name")),
    "an ancestor's variant": Case(
        manifest(lambda value: value["inputs"]["model"]["facts"].update(variant="v/../../numpy")), 2, ("variant",)
    ),
    "an input's role": Case(
        manifest(lambda value: value["inputs"].update({"../x": value["inputs"]["data"]})), 2, ("no name of an input",)
    ),
    "key that is no hash": Case(manifest(lambda value: value.update(key="../../x")), 2, ("key",)),
    # what a terminal obeys
    "escape in kind": Case(manifest(lambda value: value.update(kind=ESCAPE)), 2, ("control characters", "\\x1b")),
    "escape in variant": Case(facts(variant=ESCAPE), 2, ("control characters", "\\x1b")),
    "escape in a setting": Case(facts(settings={"how": [[ESCAPE]]}), 2, ("control characters", "\\x1b")),
    "escape in a name of JSON": Case(facts(settings={ESCAPE: 1}), 2, ("control characters", "\\x1b")),
    "escape in the host": Case(manifest(lambda value: value["host"].update(cpu="\x9b2J")), 2, ("control characters",)),
    "text that turns around": Case(facts(settings={"a": "\u202eexe"}), 2, ("control characters", "\\u202e")),
    "half a character": Case(facts(settings={"a": "\ud800"}), 2, ("control characters", "\\ud800")),
    # JSON that two readers take for two things, or that has no end
    "a name twice": Case(text(lambda value: value.replace("{", '{"kind": "x",', 1)), 2, ("'kind' is given twice",)),
    "a fact twice": Case(text(lambda value: value.replace('"entry"', '"task": "x", "entry"', 1)), 2, ("given twice",)),
    "NaN": Case(text(lambda value: value.replace('"seconds":', '"seconds": NaN, "x":', 1)), 2, ("not finite",)),
    "1e999": Case(text(lambda value: value.replace('"seconds":', '"seconds": 1e999, "x":', 1)), 2, ("not finite",)),
    "6000 digits": Case(
        text(lambda value: value.replace('"seconds":', f'"x": {"9" * 6000}, "seconds":', 1)), 2, ("6000 digits",)
    ),
    "200,000 levels": Case(text(lambda value: "[" * 200_000 + "]" * 200_000), 2, ("too many levels",)),
    "levels that fit JSON": Case(text(lambda value: '{"a":' * 400 + "1" + "}" * 400), 2, ("not a manifest",)),
    "levels of lists": Case(facts(settings={"a": json.loads("[" * 300 + "]" * 300)}), 2, ("too many levels",)),
    "a list": Case(text(lambda value: "[]"), 2, ("not a manifest",)),
    "null": Case(text(lambda value: "null"), 2, ("not a manifest",)),
    "nothing": Case(text(lambda value: ""), 2, ("not a manifest",)),
    "UTF-16": Case(lambda folder: (folder / MANIFEST).write_bytes("{}".encode("utf-16")), 2, ("not UTF-8",)),
    "schema version true": Case(manifest(lambda value: value.update(schema_version=True)), 2, ("version is True",)),
    "schema version 2.0": Case(manifest(lambda value: value.update(schema_version=2.0)), 2, ("version is 2.0",)),
    "schema version text": Case(manifest(lambda value: value.update(schema_version="2")), 2, ("version is '2'",)),
    "no schema version": Case(without("schema_version"), 2, ("version is None",)),
    "another version": Case(manifest(lambda value: value.update(schema_version=3)), 2, ("has schema version 3",)),
    # a manifest that is no plain file
    "a fifo": Case(in_place_of_manifest(os.mkfifo), 2, ("special file",)),
    "a link to /dev/zero": Case(in_place_of_manifest(lambda path: path.symlink_to("/dev/zero")), 2, ("link",)),
    "a link to itself": Case(in_place_of_manifest(lambda path: path.symlink_to(path)), 2, ("link",)),
    "a folder": Case(in_place_of_manifest(Path.mkdir), 2, ("special file",)),
    "a socket": Case(in_place_of_manifest(bind_socket), 2, ("manifest.json", "wanted a plain file")),
    "a sparse manifest": Case(
        in_place_of_manifest(lambda path: path.open("wb").truncate(20 * 2**30)), 2, ("bytes: wanted at most",)
    ),
    # files
    "an edited manifest": Case(text(lambda value: value.replace("classification", "xlassification")), 2, ("edited",)),
    "a number in other signs": Case(text(lambda value: re.sub(r"(\d)e-", r"\1E-", value)), 2, ("edited",)),
    "a digit too many": Case(text(lambda value: re.sub(r"(\.\d+)", r"\g<1>0", value, count=1)), 2, ("edited",)),
    "a line's end for a space": Case(text(lambda value: value.replace('": ', '":\n', 1)), 2, ("edited",)),
    "a space for a line's end": Case(text(lambda value: value.replace("\n", " ", 1)), 2, ("edited",)),
    "a line more": Case(text(lambda value: value + "\n"), 2, ("edited",)),
    "a file too many": Case(lambda folder: (folder / "extra").touch(), 2, ("holds 'extra'",)),
    "a compiled module": Case(
        lambda folder: [(folder / "x.cpython-311.pyc").write_bytes(b"x")], 2, ("which its manifest does not name",)
    ),
    "a file too few": Case(lambda folder: (folder / "labels.json").unlink(), 2, ("lacks 'labels.json'",)),
    "a file that is a link": Case(
        lambda folder: [(folder / "labels.json").unlink(), (folder / "labels.json").symlink_to("/etc/passwd")],
        2,
        ("labels.json", "link"),
    ),
    "a file that is a fifo": Case(
        lambda folder: [(folder / "labels.json").unlink(), os.mkfifo(folder / "labels.json")], 2, ("special file",)
    ),
    "a folder that is a link": Case(lambda folder: (folder / "more").symlink_to("/usr"), 2, ("link",)),
    "folders without end": Case(
        lambda folder: (folder / "/".join("a" * 150)).mkdir(parents=True), 2, ("folders inside each other",)
    ),
    "20 GiB of nothing": Case(sparse("labels.json", 20 * 2**30), 2, ("labels.json", "wanted at most")),
    "a size that is true": Case(
        manifest(lambda value: value["files"]["labels.json"].update(size_bytes=True)), 2, ("number of bytes",)
    ),
    "a size that is negative": Case(
        manifest(lambda value: value["files"]["labels.json"].update(size_bytes=-1)), 2, ("number of bytes",)
    ),
    "a hash that is none": Case(
        manifest(lambda value: value["files"]["labels.json"].update(sha256="")), 2, ("the hash of 'labels.json'",)
    ),
    "a record that is none": Case(manifest(lambda value: value["files"].update({"labels.json": 7})), 2, ("no size",)),
    "files that are none": Case(manifest(lambda value: value.update(files=[])), 2, ("files is no mapping",)),
    "facts that are none": Case(manifest(lambda value: value.update(facts=[])), 2, ("no mappings",)),
    "the manifest among its files": Case(
        manifest(lambda value: value["files"].update({MANIFEST: value["files"]["labels.json"]})), 2, ("outside itself",)
    ),
}  # fmt: skip

# Readable, and refused before the model is run: here or in the process that opens it.
REFUSED: dict[str, Case] = {
    "an entry that no hash covers": Case(facts(entry="other.onnx"), 1, ("no file 'other.onnx'",)),
    "an unknown target": Case(facts(target="toaster"), 2, ("unknown target", "toaster", "onnxruntime")),
    "an unknown stand-in": Case(facts(stand_in="toaster"), 2, ("unknown target", "toaster")),
    "an unknown precision": Case(facts(precision="int3"), 2, ("precision",)),
    "no variant": Case(without("facts", "variant"), 2, ("'variant'", "field required")),
    "no entry": Case(without("facts", "entry"), 2, ("'entry'", "field required")),
    "no model before it": Case(without("inputs", "model"), 2, ("names no 'model' of a bundle",)),
    "an ancestor's facts": Case(
        manifest(lambda value: value["inputs"]["model"]["facts"].update(input=7)), 2, ("'input'",)
    ),
    "an input of a billion pixels": Case(
        manifest(lambda value: value["facts"]["input"].update(size=10**9)), 2, ("'input.size'",)
    ),
    "another number type": Case(manifest(lambda value: value["facts"]["input"].update(dtype="float64")), 2, ("dtype",)),
    # golden inputs
    "NaN and scrambled weights": Case(
        both(
            file("model.onnx", scrambled),
            golden(lambda arrays: arrays.update(logits=np.full_like(arrays["logits"], np.nan))),
        ),
        1,
        ("not finite",),
    ),
    "scrambled weights": Case(file("model.onnx", scrambled), 1, ("golden outputs are off",)),
    "a tolerance of 1e300": Case(
        both(file("model.onnx", scrambled), facts(golden_tolerance=1e300)), 1, ("tolerance of 1e+300", "at most")
    ),
    "twice the tolerance": Case(
        manifest(lambda value: value["facts"].update(golden_tolerance=2 * value["facts"]["golden_tolerance"])),
        1,
        ("tolerance", "at most"),
    ),
    "a tolerance of nothing": Case(facts(golden_tolerance=0), 1, ("tolerance",)),
    "logits whose spread has no end": Case(
        both(
            golden(lambda arrays: arrays.update(logits=np.sign(arrays["logits"]) * np.float32(3e38))),
            facts(golden_tolerance=1e300),
        ),
        1,
        ("tolerance of 1e+300", "at most"),
    ),
    "logits of more digits": Case(
        both(
            golden(lambda arrays: arrays.update(logits=1e300 * np.sign(arrays["logits"]).astype(np.float64))),
            facts(golden_tolerance=1e300),
        ),
        1,
        ("are not the 8",),
    ),
    "logits that broadcast": Case(
        golden(lambda arrays: arrays.update(logits=arrays["logits"][:1])), 1, ("shape (1, 10)",)
    ),
    "logits of one class": Case(
        golden(lambda arrays: arrays.update(logits=arrays["logits"][:, :1])), 1, ("the model gives float32 (8, 10)",)
    ),
    "no golden image": Case(
        both(golden(lambda arrays: arrays.update(images=arrays["images"][:0])), facts(golden_images=0)),
        1,
        ("golden.npz", "not what is wanted"),
    ),
    "fewer images than promised": Case(facts(golden_images=9), 1, ("the 9 of 32x32 pixels",)),
    "images of text": Case(
        golden(lambda arrays: arrays.update(images=np.full((8, 32, 32, 3), "x"))), 1, ("not what is wanted",)
    ),
    "images that are packed": Case(golden(lambda arrays: None, np.savez_compressed), 1, ("packed",)),
    "a bomb": Case(
        golden(lambda arrays: arrays.update(images=np.zeros((60_000, 32, 32, 3), np.uint8)), np.savez_compressed),
        1,
        ("packed",),
    ),
    "an array of 4 TiB": Case(file("golden.npz", npz_that_claims((2**20, 2**20))), 1, ("its header says",)),
    "an array of negative size": Case(file("golden.npz", npz_that_claims((-1, 4))), 1, ("golden.npz",)),
    "golden inputs that are none": Case(file("golden.npz", b"PK"), 1, ("golden.npz holds no arrays",)),
    "an array too many": Case(golden(lambda arrays: arrays.update(more=np.zeros(1))), 1, ("other arrays",)),
    # the model's file
    "an address in memory": Case(
        file("model.onnx", external("*/_ORT_MEM_ADDR_/*")), 1, ("weights outside itself",)
    ),
    "a file elsewhere": Case(file("model.onnx", external("../../etc/passwd")), 1, ("weights outside itself",)),
    "a constant elsewhere": Case(file("model.onnx", external("x", "constant")), 1, ("weights outside itself",)),
    "a branch's constant elsewhere": Case(file("model.onnx", external("x", "branch")), 1, ("weights outside itself",)),
    "a function's constant elsewhere": Case(
        file("model.onnx", external("x", "function")), 1, ("weights outside itself",)
    ),
    "half a model": Case(file("model.onnx", lambda content: content[: len(content) // 2]), 1, ("no ONNX file",)),
    "an empty model": Case(file("model.onnx", b""), 1, ("is empty",)),
    "text for a model": Case(file("model.onnx", b"\x0b" * 100), 1, ("no ONNX file",)),
    "a model of another runtime": Case(rename_entry("model.ort"), 1, ("wanted a model that ends in",)),
}  # fmt: skip

NAMED = "onnxruntime-int8"


@pytest.fixture
def bundle(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundles[NAMED].path, tmp_path / "bundle"))


def runner(*arguments: object) -> subprocess.CompletedProcess[str]:
    """``python -m runtime`` as a device starts it, but in this process."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["runtime", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = kdpipe.runtime.__main__.main()
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, stdout.getvalue(), stderr.getvalue())


def assert_runner_says(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("runtime: ")
    assert not sealed.UNPRINTABLE.search(done.stderr.rstrip("\n"))
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr!r}"


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_folder_that_no_one_sealed_is_refused_on_the_host_and_on_a_device(bundle: Path, name: str) -> None:
    case = UNREADABLE[name]
    case.alter(bundle)
    for command in ("verify", "bench"):
        done = run(command, bundle)
        assert_one_line(done, case.exit_code, *case.words)
        assert not sealed.UNPRINTABLE.search(done.stderr.rstrip("\n"))
        assert len(done.stderr) < 2100
    assert_runner_says(runner("verify", bundle), *case.words)


@pytest.mark.parametrize("name", REFUSED)
def test_a_bundle_that_does_not_keep_its_word_is_refused(bundle: Path, name: str) -> None:
    case = REFUSED[name]
    case.alter(bundle)
    if case.exit_code == 1:  # what the host hears from the process that opens the model
        assert_runner_says(runner("verify", bundle), *case.words)
    else:
        assert_one_line(run("verify", bundle), case.exit_code, *case.words)


@pytest.mark.parametrize("name", ["an address in memory", "NaN and scrambled weights", "an array of 4 TiB"])
def test_the_host_tells_what_that_process_said(bundle: Path, name: str) -> None:
    case = REFUSED[name]
    case.alter(bundle)
    assert_one_line(run("verify", bundle), case.exit_code, *case.words)


def test_no_target_reads_weights_from_elsewhere(made: Made, tmp_path: Path) -> None:
    """OpenVINO ended with a fault where ONNX names an address in memory."""
    copy = Path(shutil.copytree(made.bundles["onnxruntime-int8"].path, tmp_path / "bundle"))
    facts(target="openvino", runtime={"inference_precision": "f32"})(copy)
    file("model.onnx", external("*/_ORT_MEM_ADDR_/*"))(copy)
    assert_one_line(run("verify", copy), 1, "keeps weights outside itself")
    copy = Path(shutil.copytree(made.bundles["openvino-float32"].path, tmp_path / "xml"))
    file("model.xml", lambda content: b"<!DOCTYPE net [<!ENTITY a 'b'>]>" + content)(copy)
    assert_runner_says(runner("verify", copy), "no OpenVINO model")
    replace_file(copy, "model.xml", b"<?xml version='1.0'?><!DOCTYPE net [<!ENTITY a 'b'>]>")
    assert_runner_says(runner("verify", copy), "defines entities")
    copy = Path(shutil.copytree(made.bundles["tflite-float32"].path, tmp_path / "tflite"))
    file("model.tflite", b"\x08\x00\x00\x00TFL2" + bytes(99))(copy)
    assert_runner_says(runner("verify", copy), "no TFLite model")


def test_models_that_are_whole_pass_the_walk(made: Made) -> None:
    for model in made.models.values():
        assert read_facts(model.path)["entry"] == model.facts.entry


def test_a_model_without_end_is_ended(bundle: Path) -> None:
    file("model.onnx", endless)(bundle)
    with pytest.raises(GateFailed, match="did not end in 3 s"):
        verify(bundle, seconds=3)


def test_a_model_that_wants_all_memory_gets_none(bundle: Path) -> None:
    file("model.onnx", greedy)(bundle)
    assert_one_line(run("verify", bundle), 1, str(bundle))


def test_a_crash_of_a_runtime_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever crashes it: here the process that opens the model is ended as by a fault, from inside."""
    package = bundle.parent / "crashing"
    package.mkdir()
    (package / "onnxruntime.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(package))
    assert_one_line(run("verify", bundle), 1, "crashed (SIGSEGV)", str(bundle))


def run(command: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    """The command on an altered bundle, in a folder where it must leave nothing."""
    here = bundle.parent / "here"
    here.mkdir(exist_ok=True)
    done = kdpipe_command(command, bundle, cwd=here)
    assert not list(here.iterdir())
    assert {path.name for path in bundle.parent.iterdir()} <= {"here", "bundle", "xml", "tflite", "crashing"}
    return done


# ---- other artifacts -----------------------------------------------------------------------------------------


def entry(name: str, value: Any) -> Alter:
    """One entry of the configuration."""
    return manifest(lambda whole: whole["config"].update({name: value}))


def npz(name: str, **change: Any) -> Alter:
    def alter(folder: Path) -> None:
        with np.load(folder / name) as saved:
            arrays = {**saved, **{key: make(saved[key]) for key, make in change.items()}}
        stream = io.BytesIO()
        np.savez(stream, **arrays)
        replace_file(folder, name, stream.getvalue())

    return alter


def npy(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Alter:
    def alter(folder: Path) -> None:
        stream = io.BytesIO()
        np.save(stream, make(np.load(folder / name)))
        replace_file(folder, name, stream.getvalue())

    return alter


LOGITS = f"logits/{NAMED}.npy"
MODELS: dict[str, Case] = {
    "variant that climbs": Case(facts(variant="x/../../../../planted"), 2, ("variant", "wanted a name")),
    "an unknown target": Case(facts(target="toaster"), 2, ("unknown target", "toaster")),
    "labels that are none": Case(file("labels.json", b"{}"), 2, ("labels.json is broken", "valid list")),
    "labels that are numbers": Case(file("labels.json", b"[1, 2]"), 2, ("labels.json is broken", "valid string")),
    "labels that are no JSON": Case(file("labels.json", b"[1"), 2, ("labels.json", "not JSON")),
    "labels with escapes": Case(file("labels.json", b'["\\u001b[2J"]'), 2, ("labels.json", "control characters")),
    "weights elsewhere": Case(file("model.onnx", external("x")), 1, ("weights outside itself",)),
    "a model that is none": Case(file("model.onnx", b"\x0b"), 1, ("no ONNX file",)),
    "outputs of three classes": Case(file("model.onnx", of_shape(1, 3)), 1, ("outputs of shape (1, 3)",)),
    "one number for all": Case(file("model.onnx", of_shape(1)), 1, ("outputs of shape (1,)",)),
}
MEASUREMENTS: dict[str, Case] = {
    "a task that is none": Case(facts(task="a task"), 2, ("task", "wanted a name")),
    "an unknown task": Case(facts(task="toasting"), 2, ("unknown task", "toasting")),
    "rounds that are none": Case(entry("rounds", "many"), 2, ("'rounds'",)),
    "no results": Case(facts(results={}), 2, ("no result of",)),
    "another stage": Case(manifest(lambda value: value.update(stage="magic")), 2, ("made by 'magic'",)),
    "labels of text": Case(npy("labels.npy", lambda labels: labels.astype(str)), 2, ("labels.npy",)),
    "labels of half a header": Case(
        file("labels.npy", b"\x93NUMPY\x01\x00\x20\x00{'descr': (                    \n"), 2, ("labels.npy", "no array")
    ),
    "fewer labels": Case(npy("labels.npy", lambda labels: labels[1:]), 2, ("wanted",)),
    "labels of no class": Case(npy("labels.npy", lambda labels: labels + 1000), 2, ("labels beyond its outputs",)),
    "outputs of 4 TiB": Case(file(LOGITS, npy_that_claims((2**20, 2**20))), 2, (LOGITS, "holds no array")),
    "outputs that are not finite": Case(npy(LOGITS, lambda logits: logits * np.nan), 2, (LOGITS, "not finite")),
    "outputs of one number": Case(npy(LOGITS, lambda logits: logits[0, 0]), 2, (LOGITS,)),
    "outputs of no class": Case(npy(LOGITS, lambda logits: logits[:, :0]), 2, (LOGITS,)),
    "an ancestor without its own": Case(without("inputs", NAMED, "inputs", "model"), 2, ("names no 'model'",)),
}
CHECKPOINTS: dict[str, Case] = {
    "a seed that is none": Case(entry("seed", "x"), 2, ("'seed'",)),
    "training that is none": Case(entry("train", 7), 2, ("'train'",)),
    "no data": Case(without("inputs", "data"), 2, ("names no 'data'",)),
    "an accuracy of text": Case(facts(test_accuracy="good"), 2, ("'test_accuracy'",)),
    "a history that is none": Case(file("history.jsonl", b"[]\n"), 2, ("history.jsonl is broken",)),
    "half a history": Case(file("history.jsonl", lambda content: content[: len(content) // 2]), 2, ("not JSON",)),
    "outputs that are packed": Case(file("test_logits.npz", b"PK"), 2, ("test_logits.npz",)),
    "fewer labels": Case(npz("test_logits.npz", labels=lambda labels: labels[1:]), 2, ("test_logits.npz",)),
}


def refused(case: Case, source: Path, tmp_path: Path, *arguments: object) -> None:
    copy = Path(shutil.copytree(source, tmp_path / source.name))
    case.alter(copy)
    done = kdpipe_command(*[copy if argument is ... else argument for argument in arguments])
    assert_one_line(done, case.exit_code, *case.words)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_strangers(made: Made, tmp_path: Path, name: str) -> None:
    refused(MODELS[name], made.models[NAMED].path, tmp_path, "package", ..., "--data", made.dataset.path)


@pytest.mark.parametrize("name", ["an unknown target", "weights elsewhere"])
def test_models_of_strangers_are_not_quantised(made: Made, tmp_path: Path, name: str) -> None:
    source = made.models["onnxruntime-float32"].path
    refused(MODELS[name], source, tmp_path, "quantize", ..., "--data", made.dataset.path)


def test_outputs_of_other_classes_are_not_measured(made: Made, bundle: Path) -> None:
    file("model.onnx", of_shape(1, 3))(bundle)
    done = kdpipe_command(
        "bench", bundle, "--data", made.dataset.path, "--effort", "quick", "--rounds", 2, "--out", bundle.parent / "m"
    )
    assert_one_line(done, 2, "the outputs of", "wanted float32 [")


def test_a_picture_that_unpacks_to_gigabytes_is_no_picture(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "bomb.bmp")
    content = bytearray((tmp_path / "bomb.bmp").read_bytes())
    content[18:26] = (200_000).to_bytes(4, "little") * 2  # width and height
    (tmp_path / "bomb.bmp").write_bytes(content)
    with pytest.raises(OSError, match="decompression bomb"):
        decode(tmp_path / "bomb.bmp")


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_of_strangers(made: Made, tmp_path: Path, name: str) -> None:
    for path in (made.dataset.path, made.teacher.path, made.student.path, made.graph.path):
        (tmp_path / path.name).symlink_to(path)
    refused(MEASUREMENTS[name], made.measurement.path, tmp_path, "report", ...)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_of_strangers(made: Made, tmp_path: Path, name: str) -> None:
    refused(
        CHECKPOINTS[name], made.student.path, tmp_path, "report", made.measurement.path, ..., "--out", tmp_path / "r"
    )


def test_names_that_mathtext_cannot_draw_are_drawn_as_they_are(made: Made, tmp_path: Path) -> None:
    """A person may call a folder anything; only control characters are refused."""
    student = Path(shutil.copytree(made.student.path, tmp_path / "student-$x^{_[red]-seed0-1234"))
    done = kdpipe_command("report", made.measurement.path, student, "--title", "$^{ [red]<b>", "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "r" / "report.html").read_text()
    assert "$^{ [red]&lt;b&gt;" in page and "[red]<b>" not in page
    assert "$x^{_[red]" in done.stdout
    refuse = kdpipe_command("report", made.measurement.path, student, "--title", ESCAPE, "--out", tmp_path / "r2")
    assert_one_line(refuse, 2, "control characters")


# ---- a bundle is as it was after it was used -----------------------------------------------------------------


def test_running_a_bundle_writes_nothing_into_it(made: Made, tmp_path: Path) -> None:
    """As the guide says, with an environment that lets Python write compiled modules, as everybody's does."""
    for name in ("onnxruntime-int8", "openvino-float32", "tflite-int8"):
        bundle = Path(shutil.copytree(made.bundles[name].path, tmp_path / name))
        before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [sys.executable, "-m", "runtime", "verify", "."],
            cwd=bundle, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
        Bundle.open(bundle)


# ---- one rule ------------------------------------------------------------------------------------------------


def test_host_and_runner_read_by_the_same_rules() -> None:
    """Neither may import the other, so the rules stand in both, byte for byte."""
    assert (ROOT / "core" / "sealed.py").read_bytes() == (ROOT / "runtime" / "sealed.py").read_bytes()
