"""Which of timm's families every target can take: one small model of each, exported and compared with torch.

    python benchmarks/coverage.py docs/coverage.md                  every family, in half an hour or so
    python benchmarks/coverage.py table.md --model resnet18         some

Weights are random but not degenerate: timm starts the last BatchNorm of a residual block at zero, where an export could
be wrong unseen, so scales are drawn and statistics are taken from the images. Each model has a process of its own, so
that a converter that crashes is a row of the table and not the end of it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, ExportConfig, InputSettings, TeacherPlan
from kdpipe.core.errors import KdpipeError
from kdpipe.export import TARGETS

_FAMILIES = """
resnet10t resnext26ts skresnet18 resnest14d res2net50_14w_8s regnetx_002 regnety_002 nf_regnet_b0 densenet121 dla46_c
hrnet_w18_small ese_vovnet19b_dw selecsls42b cs3darknet_focus_s hgnetv2_b0 repvgg_a0 tresnet_m
mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0
mnasnet_small fbnetc_100 spnasnet_100 hardcorenas_a lcnet_050 tinynet_e mixnet_s rexnet_100 ghostnet_100 ghostnetv2_100
repghostnet_050 mobileone_s0 repvit_m0_9 starnet_s1 fasternet_t0
convnext_atto convnextv2_atto edgenext_xx_small inception_next_atto mambaout_femto poolformer_s12 convformer_s18
mobilevit_xxs mobilevitv2_050 efficientvit_b0 efficientvit_m0 efficientformer_l1 efficientformerv2_s0 fastvit_t8
tiny_vit_5m_224 levit_128s swiftformer_xs shvit_s1 mobilenetv4_hybrid_medium
vit_tiny_patch16_224 deit_tiny_patch16_224 xcit_nano_12_p16_224 pit_ti_224 pvt_v2_b0 coat_lite_tiny crossvit_tiny_240
swin_tiny_patch4_window7_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224
"""
FAMILIES = _FAMILIES.split()
LIMIT_SECONDS = 600


def prepared(model: str, path: Path, size: int, images: list[Path]) -> None:
    """Weights of ``model`` as trained ones could be: every scale drawn, BatchNorm's statistics those of ``images``."""
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from torch import nn

    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=10)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            nn.init.uniform_(weight, 0.5, 1.5)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    for norm in norms:
        norm.momentum = None  # a plain mean
    network.eval()
    for norm in norms:
        norm.train()
    batch = np.stack([np.asarray(Image.open(file).resize((size, size)), np.float32) / 255 for file in images])
    mean, std = (np.array(network.pretrained_cfg[name], np.float32) for name in ("mean", "std"))
    with torch.no_grad():
        network(torch.from_numpy((batch - mean) / std).permute(0, 3, 1, 2))
    save_file({name: tensor.clone().contiguous() for name, tensor in network.state_dict().items()}, path)


def photos(folder: Path) -> None:
    """A few pictures that differ: coloured shapes on coloured ground."""
    from PIL import Image, ImageDraw

    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            for at in range(count):
                image = Image.fromarray(generator.integers(0, 255, (8, 8, 3), np.uint8)).resize((256, 256))
                draw = ImageDraw.Draw(image)
                for _ in range(label + 2):
                    corners = np.sort(generator.integers(0, 256, (2, 2)), axis=0).ravel().tolist()
                    draw.ellipse(corners, fill=tuple(generator.integers(0, 255, 3).tolist()))
                image.save(folder / part / str(label) / f"{at}.png")


def one(model: str, folder: Path) -> dict[str, Any]:
    """Export one model to every target; what went wrong, or the seconds and the parity."""
    import timm

    base = timm.models.get_pretrained_cfg(model)
    size = base.input_size[-1] if base and base.fixed_input_size else 224
    weights = folder / f"{model}.safetensors"
    photos(folder / "photos")
    prepared(model, weights, size, sorted((folder / "photos").rglob("*.png")))
    chain = Chain(folder / model)
    dataset = chain.data(DataPlan(source=str(folder / "photos"), val_fraction=0))
    plan = TeacherPlan(model=model, checkpoint=weights, input=InputSettings(size=size))
    network = chain.teacher(plan, dataset)
    rows: dict[str, Any] = {}
    for target in TARGETS:
        begun = time.monotonic()
        try:
            made = chain.export(ExportConfig(target=target, parity_images=8, hop_images=4), network, dataset)
            rows[target] = {
                "seconds": time.monotonic() - begun,
                "relative_difference": made.facts.parity.relative_difference if made.facts.parity else None,
            }
        except KdpipeError as error:
            rows[target] = {"failed": str(error)}
    return {"model": model, "parameters": network.facts.parameters, "size": size, "targets": rows}


def table(found: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "timm", "onnx", "onnxslim", "onnxruntime", "openvino", "litert-torch", "ai-edge-litert")
    )
    lines = [
        "# Coverage",
        "",
        f"Made by `python benchmarks/coverage.py docs/coverage.md` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d} "
        f"with {versions}.",
        "One model of each family, random but not degenerate weights, 10 classes, its own input size where that is "
        "fixed, else 224 pixels. A figure is the seconds of the export with its parity check (largest difference of 8 "
        "images within 1e-3 of the logits' spread); the ONNX that the first three share is made in "
        "the first column. A failure says why below. TensorRT: the graph and its lint, not built here. Seconds of a "
        "shared machine that did other work too.",
        "",
        "| model | million parameters | " + " | ".join(TARGETS) + " |",
        "|---|---|" + "---|" * len(TARGETS),
    ]
    reasons = []
    passed = dict.fromkeys(TARGETS, 0)
    for row in found:
        cells = []
        for target in TARGETS:
            result = row["targets"].get(target, {"failed": row.get("failed", "not tried")})
            if "failed" in result:
                cells.append("**failed**")
                reason = re.sub(r"\S*/(site-packages|photos)/", "", result["failed"])
                reasons.append(f"- {row['model']}, {target}: {reason}")
            else:
                passed[target] += 1
                cells.append(f"{result['seconds']:.1f}")
        millions = f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else ""
        lines.append(f"| {row['model']} | {millions} | " + " | ".join(cells) + " |")
    shares = " | ".join(f"{passed[target]} of {len(found)} ({passed[target] / len(found):.0%})" for target in TARGETS)
    lines += [f"| **passed** | | {shares} |", ""]
    return "\n".join([*lines, *(["## Failures", "", *reasons, ""] if reasons else [])])


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="the page to write; raw results go beside it with --keep")],
    model: Annotated[list[str] | None, typer.Option(help="only this one (repeatable)")] = None,
    results: Annotated[
        Path | None, typer.Option(help="folder of raw results: a model that is there is not run again")
    ] = None,
    alone: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Export every family to every target."""
    if alone:
        assert model is not None
        with tempfile.TemporaryDirectory() as scratch:
            out.write_text(json.dumps(one(model[0], Path(scratch))))
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = results or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        for name in model or FAMILIES:
            answer = kept / f"{name}.json"
            if not answer.is_file():
                command = [sys.executable, __file__, str(answer), "--model", name, "--alone"]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
                    failure = (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
                except subprocess.TimeoutExpired:
                    failure = f"not done in {LIMIT_SECONDS} s"
                if failure:
                    answer.write_text(json.dumps({"model": name, "failed": failure, "targets": {}}))
            found.append(json.loads(answer.read_text()))
            states = {target: "failed" if "failed" in row else "ok" for target, row in found[-1]["targets"].items()}
            print(name, states or found[-1].get("failed"), flush=True)
    out.write_text(table(found))


if __name__ == "__main__":
    app()
