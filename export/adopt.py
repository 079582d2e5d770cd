"""Somebody else's ONNX file to a graph like any other: raw colours in, logits out, any number at once where it can."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import AdoptFileConfig, InputSettings
from ..core.errors import UserError
from ..core.inputs import RAW, InputSpec, sides, size_words
from ..core.kinds import Graph, GraphFacts, as_name
from ..core.proc import first_line, quiet, require
from ..core.progress import note, progress
from ..core.stats import Interval
from ..data.dataset import Dataset, load_images, load_labels
from ..data.labels import other_order
from ..runtime import open_session, predict
from ..runtime.task import TASKS, Task
from ..runtime.weights import ModelFileError, refuse_files_elsewhere
from .graph import AS_WRITTEN, Wanted, compare_hops, nodes_by_kind
from .onnx import INPUT, NEEDS, OPSET, OUTPUT, simplify

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

OLDEST_OPSET = 13  # that knows ranges by channel, as INT8 wants them


def input_of(path: Path, settings: InputSettings) -> InputSpec:
    """What the network in an ONNX file takes: its own shape, and of the rest what the user says of it.

    What nobody says is as for models that are only measured: bicubic, the whole image, colours in 0..255.

    Raises:
        UserError: no ONNX, or not of one image in float32.
    """
    taken = _only_input(_read(path), path)
    sizes = [dimension.dim_value or None for dimension in taken.type.tensor_type.shape.dim]
    channels_last = sizes[3] == 3 and sizes[1] != 3
    channels, *own = (sizes[3], sizes[1], sizes[2]) if channels_last else sizes[1:]
    if channels not in (3, None):
        raise UserError(f"{path} takes {channels} channels: wanted the 3 of RGB")
    if sizes[0] not in (1, None):
        raise UserError(f"{path} takes {sizes[0]} images at a time: wanted any number, or one")
    asked = (None, None) if settings.size is None else sides(settings.size)
    known = [{side for side in each if side is not None} for each in zip(own, asked, strict=True)]
    if any(len(each) != 1 for each in known):
        told = "any size" if own == [None, None] else f"{own[0] or '?'}x{own[1] or '?'}"
        said = "" if settings.size is None else f", input.size says {size_words(settings.size)}"
        raise UserError(f"{path} takes images of {told}{said}: wanted one size, say it with input.size")
    height, width = (each.pop() for each in known)
    return InputSpec(
        size=(height, width),
        mean=settings.mean or RAW["mean"],
        std=settings.std or RAW["std"],
        crop_fraction=settings.crop_fraction or 1.0,
        interpolation=settings.interpolation or "bicubic",
        resize=settings.resize or "cover",
        layout="NHWC" if channels_last else "NCHW",
    )


def adopt(order: Order[AdoptFileConfig], path: Path, dataset: Dataset, out: Path) -> Graph:
    """Fold the normalisation into the file, compare with how it was, simplify, compare again.

    What has its batch of one written into what it computes takes one image at a time from then on too.

    Raises:
        UserError: what is no float32 ONNX of one image, cannot be made to take raw colours, or has other outputs than
            one a class.
        GateFailed: what came out computes something else.
    """
    require("ONNX", NEEDS, "onnxruntime")
    config, spec = order.config, order.config.input
    assert spec is not None  # found by ``input_of``
    task = TASKS[dataset.facts.task]
    with drafting(Graph, order, out) as draft:
        with progress("adopting", 4) as advance:
            samples = dataset.balanced("train", config.parity_images, seed=0)
            images = load_images(samples, spec.model_dump())
            expected = _said(path, spec, images, task, len(dataset.classes))
            advance(1, "folding")
            raw_spec = spec.model_copy(update={"layout": "NCHW", **RAW})
            fold_seconds, simplify_seconds = _write(path, spec, raw_spec, images[:2], draft.path)
            advance(1, "comparing")
            paths = [sample.path for sample in samples]
            # No torch stands behind it whose rounding would excuse a difference.
            wanted = Wanted(task, raw_spec, images, expected, paths, lambda: 0.0)
            parity = compare_hops(draft.path, wanted, dataset, config, advance)
        write_json(draft.path / Graph.LABELS, dataset.classes)
        with np.load(draft.path / Graph.HOPS) as hops:
            outputs, test = hops["simplified"], dataset.samples("test")
            labels = load_labels([test[at] for at in hops["positions"]], raw_spec.model_dump())
        other_order(task, outputs, labels)
        draft.facts = GraphFacts(
            task=task.name,
            model=as_name(path.stem),
            input=raw_spec,
            nodes_by_kind=nodes_by_kind(draft.path / Graph.ONNX),
            parity=parity,
            export_seconds=round(fold_seconds, 2),
            simplify_seconds=round(simplify_seconds, 2),
            accuracy=Interval(**task.summary(task.scores(outputs, labels))._asdict()),
            guessing=task.guessing(labels),
        )
    return draft.artifact


def _write(path: Path, spec: InputSpec, raw_spec: InputSpec, images: np.ndarray, folder: Path) -> tuple[float, float]:
    """Fold and simplify into ``folder``, for any number of images, else for one; see that it can be run.

    Returns:
        Seconds of both.

    Raises:
        UserError: as ``fold`` does, or one of the tools cannot do it.
    """
    for one in (False, True):
        begun = time.monotonic()
        with quiet():
            try:
                fold(path, spec, folder / AS_WRITTEN, one=one)
                folded = time.monotonic()
                simplify(folder / AS_WRITTEN, folder / Graph.ONNX)
                simplified = time.monotonic()
                _name_nodes(folder / Graph.ONNX)
                predict(open_session(folder, _facts(Graph.ONNX, raw_spec)), images)
                break
            except UserError:
                raise
            except Exception as error:  # each tool raises its own
                if one:
                    raise UserError(f"{path} cannot be made to take raw colours ({first_line(error)})") from error
                why = first_line(error)
    if one:
        note(
            f"{path} takes one image at a time from here on too, since that is written into what it computes ({why}); "
            "with a dynamic batch dimension what is tested on many images would go faster"
        )
    return folded - begun, simplified - folded


def fold(path: Path, spec: InputSpec, out: Path, *, one: bool = False) -> None:
    """Write the file with its colours normalised inside, NCHW, its ends called as ours.

    Args:
        one: for one image at a time, in place of any number.

    Raises:
        UserError: not of one image in float32, quantised already, or of an operator set that cannot be converted.
    """
    import onnx
    import onnx_ir as ir

    proto = _at_known_opset(_read(path), path)
    name = _only_input(proto, path).name
    model = ir.from_proto(proto)
    graph = model.graph
    taken = next(value for value in graph.inputs if value.name == name)
    for value in [each for each in graph.inputs if each.is_initializer()]:  # as files of old list their weights
        graph.inputs.remove(value)
    for value in [*graph.inputs, *graph.initializers.values(), *(each for node in graph for each in node.outputs)]:
        if value.name in (INPUT, OUTPUT):
            value.name = f"{value.name}.of_the_file"
        if value.producer() is not None:
            value.shape = None  # may hold the one image that it was written for
    if not one and taken.shape is not None and taken.shape[0] == 1:
        _any_batch(graph)
    batch: int | str = 1 if one else "batch"
    image = ir.val(INPUT, dtype=ir.DataType.FLOAT, shape=[batch, *spec.model_copy(update={"layout": "NCHW"}).shape])
    nodes: list[ir.Node] = []

    def then(operator: str, *more: ir.Value, **attributes: Any) -> None:
        before = nodes[-1].outputs[0] if nodes else image
        nodes.append(ir.node(operator, [before, *more], attributes, name=f"normalise:{operator}"))
        nodes[-1].outputs[0].name = f"normalise.{operator}"

    def constant(what: str, colours: tuple[float, ...]) -> ir.Value:
        array = (np.array(colours, np.float64) * 255).astype(np.float32).reshape(1, 3, 1, 1)
        value = ir.val(f"normalise.{what}", const_value=ir.tensor(array, name=f"normalise.{what}"))
        graph.register_initializer(value)
        return value

    if any(spec.mean):
        then("Sub", constant("mean", spec.mean))
    if spec.std != RAW["std"]:
        then("Div", constant("std", spec.std))
    if spec.layout == "NHWC":
        then("Transpose", perm=[0, 2, 3, 1])
    ir.convenience.replace_all_uses_with(taken, nodes[-1].outputs[0] if nodes else image)
    graph.inputs.remove(taken)
    graph.inputs.insert(0, image)
    if nodes:
        graph.insert_before(graph[0], nodes)
    logits = graph.outputs[0]
    logits.name, logits.shape = OUTPUT, None
    while len(graph.outputs) > 1:
        graph.outputs.pop()
    onnx.save(ir.to_proto(model), out)


def _any_batch(graph: ir.Graph) -> None:
    """Let what reshapes one image reshape any number of them: its first dimension is that of what comes in."""
    import onnx_ir as ir

    for at, node in enumerate(list(graph)):
        if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[0].is_initializer():
            continue
        found = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
        shape = [] if found is None else found.numpy().tolist()
        if shape and shape[0] == 1 and 0 not in shape:
            node.attributes.pop("allowzero", None)  # 0 is then: as it comes in
            array = np.array([0, *shape[1:]], np.int64)
            value = ir.val(f"any_batch.{at}", const_value=ir.tensor(array, name=f"any_batch.{at}"))
            graph.register_initializer(value)
            node.replace_input_with(1, value)


def _read(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        refuse_files_elsewhere(path)
        return onnx.load(path, load_external_data=False)
    except ModelFileError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # protobuf's own
        raise UserError(f"{path} is no ONNX file ({first_line(error)})") from None


def _only_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """The input that is no weight. Raises UserError unless it is one image in float32."""
    import onnx

    quantised = [node.op_type for node in model.graph.node if "Quantize" in node.op_type or "QLinear" in node.op_type]
    if quantised:
        raise UserError(
            f"{path} is quantised already ({quantised[0]}): wanted the float32 it was made from; "
            f"as it is it can be measured: kdpipe bench {path}"
        )
    weights = {tensor.name for tensor in model.graph.initializer}
    taken: list[onnx.ValueInfoProto] = [value for value in model.graph.input if value.name not in weights]
    if len(taken) != 1 or not model.graph.node:
        raise UserError(f"{path} takes {len(taken)} inputs: wanted one image")
    kind = taken[0].type.tensor_type
    if len(kind.shape.dim) != 4:
        raise UserError(f"{path} takes an input of {len(kind.shape.dim)} dimensions: wanted images [N, 3, H, W]")
    if kind.elem_type != onnx.TensorProto.FLOAT:
        raise UserError(
            f"{path} takes {onnx.TensorProto.DataType.Name(kind.elem_type).lower()}: wanted a float32 network"
        )
    return taken[0]


def _at_known_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The same in an operator set that all of the tools know, if it is in none of those. Raises UserError."""
    import onnx

    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), OPSET)
    if OLDEST_OPSET <= opset <= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception as error:  # of C++
        raise UserError(
            f"{path} is of opset {opset} and cannot be made {OPSET} ({first_line(error)}): "
            f"export it again with an opset of {OLDEST_OPSET} to {OPSET}"
        ) from None


def _facts(entry: str, spec: InputSpec, **settings: Any) -> dict[str, Any]:
    """What ONNX Runtime must know of a file to open it."""
    return {"target": "onnxruntime", "entry": entry, "input": spec.model_dump(mode="json"), "runtime": settings}


def _said(path: Path, spec: InputSpec, images: np.ndarray, task: Task, classes: int) -> np.ndarray:
    """What the file says as it came, [N, ...], one image at a time. Raises UserError."""
    with quiet():
        session = open_session(path.parent, _facts(path.name, spec, normalised_input=True))
        try:
            said = predict(session, images, batch=1)
        except Exception as error:  # of C++
            raise UserError(f"ONNX Runtime cannot run {path}: {first_line(error)}") from None
    if (wanted := task.misfit(said, len(images), classes)) is not None:
        raise UserError(f"{path} gives {said.dtype} {list(said.shape)} for {len(images)} images: wanted {wanted}")
    if not np.isfinite(said).all():
        raise UserError(f"{path}: its outputs are not finite on real images: look at input.mean and input.std")
    return said


def _name_nodes(path: Path) -> None:
    """Give every node a name of its own: layers are known by them."""
    import onnx

    model = onnx.load(path)
    taken: Counter[str] = Counter()
    for node in model.graph.node:
        wanted = node.name or node.op_type
        taken[wanted] += 1
        node.name = wanted if taken[wanted] == 1 else f"{wanted}~{taken[wanted]}"
    onnx.save(model, path)
