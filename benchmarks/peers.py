"""One checkpoint through the other tools' defaults and through ours: accuracy, latency, size, seconds, in one session.

    python benchmarks/peers.py CHECKPOINT --data DATA --out runs

CHECKPOINT is the folder of a student or an adopted teacher. Every contender becomes a bundle and all bundles of a
runtime are measured together, interleaved, by ``kdpipe bench``. All calibrate on the same training images. Peers: the
defaults of ONNX Runtime's quantiser, of NNCF, of ai-edge-quantizer and, where it is installed, of Olive.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.chain import Chain
from kdpipe.core.artifact import Order, drafting
from kdpipe.core.config import (
    BenchPlan,
    CalibrateSettings,
    Config,
    ExportConfig,
    PackageConfig,
    QuantizePlan,
    ReportConfig,
)
from kdpipe.core.kinds import Bundle, Checkpoint, Model
from kdpipe.core.proc import quiet
from kdpipe.data.dataset import Dataset
from kdpipe.devices import find_device
from kdpipe.quantize.calibrate import CalibrationInputs
from kdpipe.report.compression import advice
from kdpipe.report.tables import surely_faster

IMAGES = 256
TARGETS = ("onnxruntime", "openvino", "tflite")
Write = Callable[[Path, CalibrationInputs, Path], None]


class PeerConfig(Config):
    peer: str


def ort_static(source: Path, images: CalibrationInputs, out: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._images: Iterator[np.ndarray] = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._images, None)
            return None if image is None else {"image": image}

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(str(prepared), str(out), Reader())
    prepared.unlink()


def ort_dynamic(source: Path, _: CalibrationInputs, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(out))


def olive_static(source: Path, images: CalibrationInputs, out: Path) -> None:
    """Olive's pass with nothing set but what it asks for."""
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry
    from olive.hardware import DEFAULT_CPU_ACCELERATOR
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    class Images:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, at: int) -> tuple[dict[str, np.ndarray], int]:
            return {"image": images[at][0]}, 0

    Registry.register_dataset("kdpipe_images")(lambda **_: Images())
    data = DataConfig(name="calibration", load_dataset_config=DataComponentConfig(type="kdpipe_images"))
    folder = out.parent / "olive"
    run = create_pass_from_dict(
        OnnxStaticQuantization, {"data_config": data}, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR
    )
    made = run.run(ONNXModelHandler(str(source)), str(folder))
    Path(made.model_path).rename(out)
    for left in sorted(folder.rglob("*"), reverse=True):
        left.rmdir() if left.is_dir() else left.unlink()
    folder.rmdir()


def nncf_default(source: Path, images: CalibrationInputs, out: Path) -> None:
    import nncf
    import openvino

    openvino.save_model(nncf.quantize(openvino.Core().read_model(source), nncf.Dataset(images)), out)


def aeq(recipe_name: str) -> Write:
    def write(source: Path, images: CalibrationInputs, out: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe

        work = quantizer.Quantizer(str(source))
        work.load_quantization_recipe(getattr(recipe, recipe_name)())
        ranges = None
        if work.need_calibration:
            [(signature, names)] = Interpreter(str(source)).get_signature_list().items()
            [argument] = names["inputs"]
            ranges = work.calibrate({signature: [{argument: image} for image in images]})
        work.quantize(ranges).export_model(str(out), overwrite=True)

    return write


PEERS: dict[str, dict[str, Write]] = {
    "onnxruntime": {"ort-static": ort_static, "ort-dynamic": ort_dynamic},
    "openvino": {"nncf-default": nncf_default},
    "tflite": {"aeq-static": aeq("static_wi8_ai8"), "aeq-dynamic": aeq("dynamic_wi8_afp32")},
}
if importlib.util.find_spec("olive") is not None:
    PEERS["onnxruntime"]["olive-static"] = olive_static


def peer(chain: Chain, name: str, write: Write, model: Model, dataset: Dataset) -> Model:
    """What ``write`` makes of the float32 model, as an artifact like ours."""
    order = Order("peer", PeerConfig(peer=name), {"model": model, "data": dataset})

    def make(out: Path) -> Model:
        samples = dataset.balanced("train", IMAGES, 0)
        images = CalibrationInputs(samples, model.facts.input.model_dump(), name)
        with drafting(Model, order, out) as draft, quiet():
            write(model.entry, images, draft.path / model.facts.entry)
            shutil.copyfile(model.file(Model.LABELS), draft.path / Model.LABELS)
            draft.facts = model.facts.model_copy(update={"parity": None, "variant": name, "precision": "int8"})
        return draft.artifact

    return chain.step(f"{model.facts.target}-{name}", Model, order, make)


def rows(numbers: dict[str, Any], seconds: dict[str, float], ours: set[str]) -> list[dict[str, Any]]:
    steps = {step["bundle"]: step for hop in numbers["hops"] for step in hop["steps"] if step["bundle"]}
    return [
        {
            "bundle": row["name"],
            "ours": row["name"] in ours,
            "top1": row["accuracy"]["value"],
            "difference": steps[row["name"]]["difference"],
            "p": steps[row["name"]]["mcnemar_p"],
            "over_float32": row["latency_over_float32"],
            "mib": row["size_bytes"] / 2**20,
            "seconds": seconds.get(row["name"]),
        }
        for row in numbers["bundles"]
    ]


def beaten(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether a peer is faster and no less accurate, or more accurate and no slower, by the point values."""
    speed = [1.0 if each["over_float32"] is None else each["over_float32"]["value"] for each in (mine, theirs)]
    return (
        theirs["top1"] >= mine["top1"]
        and speed[1] <= speed[0]
        and (theirs["top1"] > mine["top1"] or speed[1] < speed[0])
    )


def main(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a student or an adopted teacher")],
    data: Annotated[Path, typer.Option(help="folder of its dataset")],
    out: Annotated[Path, typer.Option(help="folder of artifacts; what is there is not made again")],
    target: Annotated[list[str] | None, typer.Option(help="runtime (repeatable); left out, all")] = None,
    rounds: Annotated[int, typer.Option(help="fresh processes for each bundle")] = 8,
    seconds: Annotated[float, typer.Option(help="steady time of one measurement")] = 0.5,
    threads: Annotated[int, typer.Option(help="of the runtime; 0: every core")] = 0,
    peers: Annotated[bool, typer.Option(help="the other tools too, or what kdpipe makes alone")] = True,
) -> None:
    """Compare, print a table a runtime and write out/peers.json."""
    student, dataset = Checkpoint.open(checkpoint), Dataset.open(data)
    chain = Chain(out, tell=lambda step: print(f"{step.name:32} {step.seconds:7.1f} s", flush=True))
    found: dict[str, Any] = {}
    for name in target or TARGETS:
        float32 = chain.export(ExportConfig(target=name), student, dataset)
        models = {f"{name}-float32": float32}
        device = find_device("local").probe()
        for made in chain.variants(QuantizePlan(calibrate=CalibrateSettings(images=IMAGES)), float32, dataset, device):
            models[f"{name}-{made.facts.variant}"] = made
        ours = set(models)
        for title, write in PEERS[name].items() if peers else ():
            models[f"{name}-{title}"] = peer(chain, title, write, float32, dataset)
        bundles: dict[str, Bundle] = {
            title: chain.package(PackageConfig(), model, dataset) for title, model in models.items()
        }
        begun = time.monotonic()
        plan = BenchPlan(effort="quick", rounds=rounds, seconds=seconds, threads=(threads,))
        [measured] = chain.bench(plan, bundles, dataset).one_of_each
        page = chain.report(ReportConfig(title=f"peers, {name}"), [measured], {"student": student})
        [numbers] = page.numbers["devices"]
        made_in = {title: model.manifest.seconds for title, model in models.items()}
        table = rows(numbers, made_in, ours)
        # What the report of a chain without peers would advise.
        mine = [row for row in numbers["bundles"] if row["name"] in ours]
        faster = surely_faster(measured.facts.comparisons)
        [shipped] = advice(mine, numbers["hops"], ReportConfig().max_drop, faster)
        advised = next(row for row in table if row["bundle"] == shipped["bundle"])
        found[name] = {
            "rows": table,
            "advised": shipped["bundle"],
            "trust": numbers["trust"],
            "ahead_of_advised": [row["bundle"] for row in table if not row["ours"] and beaten(advised, row)],
            "session_seconds": time.monotonic() - begun,
        }
        tell(name, found[name])
    (out / "peers.json").write_text(json.dumps(found, indent=1))


def tell(name: str, found: dict[str, Any]) -> None:
    trust = found["trust"]
    print(f"\n{name}: {trust['word']}, A/A controls {trust['controls']}")
    print("| bundle | top-1 % | difference, points | over float32 latency | MiB | seconds |")
    print("|---|---|---|---|---|---|")
    for row in found["rows"]:
        change, ratio = row["difference"], row["over_float32"]
        drop = (
            f"{100 * change['value']:+.2f} [{100 * change['low']:+.2f}, {100 * change['high']:+.2f}]" if change else ""
        )
        speed = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio else ""
        mark = "" if row["ours"] else " (peer)"
        cells = [row["bundle"] + mark, f"{100 * row['top1']:.2f}", drop, speed, f"{row['mib']:.2f}"]
        print("| " + " | ".join([*cells, f"{row['seconds']:.1f}"]) + " |")
    print(f"advised: {found['advised']}; peers ahead of it: {', '.join(found['ahead_of_advised']) or 'none'}")


if __name__ == "__main__":
    typer.run(main)
