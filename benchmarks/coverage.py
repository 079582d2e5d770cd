"""Which of timm's families every target takes, in float32 and in INT8: one small model of each, compared with torch.

    nice -n 10 python benchmarks/coverage.py docs/coverage.md PHOTOS --results RUNS     every family, in hours
    python benchmarks/coverage.py table.md PHOTOS --model resnet18                      some
    python benchmarks/coverage.py docs/coverage-masks.md MASKS --masks                  decoders over encoders

MASKS is a folder of images and masks, as data.task segmentation takes it; PHOTOS is any folder of a few hundred
photographs. Weights are random but not degenerate: timm starts the last BatchNorm of a residual block at zero and
LayerScale at a millionth, where an export could be wrong unseen and outputs differ from image to image by hardly more
than rounding; so scales are drawn and statistics are taken from the photographs. Each model has a process of its own
with limits on time and memory, so that a converter that crashes is a row of the table and not the end of it. What lies
in RUNS is not run again; the page is written after every model.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, DrawConfig, ExportConfig, InputSettings, QuantizeConfig, validated
from kdpipe.core.errors import KdpipeError
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.proc import first_line
from kdpipe.data.dataset import Dataset
from kdpipe.devices import find_device
from kdpipe.export import TARGETS

# Those come first that were once refused, or tried last.
_FAMILIES = """
mobileone_s0 repghostnet_050 test_vit ghostnetv3_050 ghostnetv2_100 mobilevit_xxs repvit_m0_9 convnextv2_atto
efficientvit_b0 fastvit_t8 vit_tiny_patch16_224 csatv2 mobilenetv4_hybrid_medium starnet_s050 fasternet_t0
edgenext_xx_small inception_next_atto mambaout_femto poolformer_s12 convnext_atto efficientvit_m0 efficientformer_l1
efficientformerv2_s0 tiny_vit_5m_224 levit_128s swiftformer_xs shvit_s1 cait_xxs24_224 convit_tiny cpubone_nano
cspnext_tiny darknet17 deit3_small_patch16_224 dpn48b efficientvim_m1 eva02_tiny_patch14_224 gcvit_xxtiny iformer_t
lcnetv2_small lowformer_b0 coatnet_nano_rw_224 maxvit_pico_rw_256 regnetz_005 resnetv2_18 legacy_seresnet18
visformer_tiny vit_tiny_r_s16_p8_224 test_vit_relpos lambda_resnet26t eca_botnext26ts_256 halonet26t hgnet_tiny
poolformerv2_s12 gernet_s resnet18 seresnext26t_32x4d ecaresnet26t efficientnet_es efficientnet_b0_gn
efficientnet_cc_b0_4e fbnetv3_b mobilenet_edgetpu_100 mobilenetv1_100 resnetblur18 semnasnet_075
vit_wee_patch16_reg1_gap_256 rexnetr_100 gcresnext26ts bat_resnext26ts haloregnetz_b nf_resnet26 nest_tiny
eca_nfnet_l0 gmixer_12_224 flexivit_small vit_relpos_small_patch16_224 vit_small_patch16_rope_224
vit_small_patch16_dinov3 vit_small_patch14_dinov2 convformer_s18 caformer_s18 mvitv2_tiny rdnet_tiny
vitamin_small_224 volo_d1_224 twins_svt_small twins_pcpvt_small tnt_s_patch16_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 swin_s3_tiny_224 davit_tiny focalnet_tiny_srf hiera_tiny_224 sequencer2d_s convmixer_768_32
inception_v3 xception41p nextvit_small hieradet_small sam2_hiera_tiny resnet50_clip resnet10t resnext26ts skresnet18
resnest14d res2net50_14w_8s regnetx_002 regnety_002 nf_regnet_b0 densenet121 dla46_c hrnet_w18_small
ese_vovnet19b_dw selecsls42b cs3darknet_focus_s hgnetv2_b0 repvgg_a0 tresnet_m mobilenetv2_100 mobilenetv3_small_050
mobilenetv4_conv_small efficientnet_b0 efficientnet_lite0 tf_efficientnetv2_b0 mnasnet_small fbnetc_100 spnasnet_100
hardcorenas_a lcnet_050 tinynet_e mixnet_s rexnet_100 ghostnet_100 mobilevitv2_050 deit_tiny_patch16_224
xcit_nano_12_p16_224 pit_ti_224 pvt_v2_b0 coat_lite_tiny crossvit_tiny_240 swin_tiny_patch4_window7_224
mixer_s32_224 resmlp_12_224 gmlp_ti16_224 inception_v4 beit_base_patch16_224 vgg11_bn samvit_base_patch16_224
naflexvit_base_patch16_gap mobilenetv5_base
"""
FAMILIES = _FAMILIES.split()
# Every decoder at least once, over encoders of several kinds.
_PAIRS = """
unet+test_resnet unet+mobilenetv4_conv_small unet+mobileone_s0 unet+convnext_atto unetplusplus+resnet10t
manet+efficientnet_lite0 linknet+regnetx_002 linknet+efficientnet_lite0 fpn+mobilenetv3_small_100 fpn+vgg11_bn
fpn+edgenext_xx_small pspnet+mobilenetv2_100 pan+mobilenetv3_small_050 deeplabv3+lcnet_050
deeplabv3plus+mobilenetv4_conv_small upernet+mobilenetv4_conv_small upernet+swin_tiny_patch4_window7_224
segformer+pvt_v2_b0 segformer+mobilenetv4_conv_small
"""
PAIRS = _PAIRS.split()
CLASSES, CALIBRATING, CHECKED = 10, 32, 64
LIMIT_SECONDS, LIMIT_BYTES = 900, 8 * 2**30  # of processor time, and resident
LIMIT_WALL_SECONDS = 4 * 3600  # for one that hangs
INT8 = "int8"
EXPLAINED = f"""
One small model of each family; random but not degenerate weights; 10 classes; 128 pixels where the network can take
them. A figure of float32 is the processor's seconds of the export with its parity check, as the product has it: the
largest difference of 64 images within 1e-3 of the logits' spread, or within twice what torch's own float32 is off its
double precision, up to 2e-2. The ONNX that the first three share is made in the first column. A figure of INT8 is the
signal to noise of its logits against float32's on {CHECKED} photographs that set no range ({CALIBRATING} others did),
and on how many of them both name the same class; since the weights are random, the decibels count and agreement is an
aside. A failure says why below. TensorRT: the graph and its lint, not built here.
"""
EXPLAINED_MASKS = f"""
Decoders of segmentation-models-pytorch over encoders of timm; random but not degenerate weights; logits at the
decoder's stride; inputs of so many pixels as the table says. Figures are as in coverage.md, of CamVid's images:
agreement is the share of pixels of which both say the same, on {CHECKED} images that set no range. A failure says why
below. TensorRT: the graph and its lint, not built here. A pair that is not listed was not run; FPN over test_resnet
goes through every target in every form in the tests.
"""


def dealt(photos: Path, folder: Path) -> None:
    """``photos`` dealt over ten classes, for networks that know nothing."""
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    counts = {"train": CALIBRATING + CHECKED + CLASSES, "val": 2 * CLASSES}
    if len(files) < sum(counts.values()):
        raise SystemExit(f"{photos} holds {len(files)} photographs, wanted {sum(counts.values())}")
    drawn = iter(np.random.default_rng(0).permutation(len(files)))
    for part, count in counts.items():
        for at in range(count):
            file = files[next(drawn)]
            place = folder / part / str(at % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{at}{file.suffix}").symlink_to(file.absolute())


def settings_of(model: str) -> dict[str, Any]:
    """A network by its name here: of a decoder over an encoder both."""
    decoder, _, encoder = model.partition("+")
    return {"model": decoder, "encoder": encoder or None}


def drawn(chain: Chain, model: str, size: int, dataset: Dataset) -> Checkpoint:
    """The network with random weights, on ``size`` pixels where it can take that, else on its own."""
    from kdpipe.networks import models

    config = DrawConfig(**settings_of(model), images=CALIBRATING)
    wanted = config.model_copy(update={"input": InputSettings(size=size)})
    try:
        models.create(wanted, len(dataset.classes))
    except KdpipeError:
        wanted = config
    return chain.draw(wanted, dataset)


def one(model: str, photos: Path, size: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """Export one model to every target and make its INT8; tell what went wrong, or seconds, parity and damage."""
    told: dict[str, Any] = {"model": model, "doing": "making the network", "targets": {}}

    def step(target: str, what: str, do: Callable[[], Any]) -> Any:
        told["doing"] = f"{target} {what}"
        tell(told)
        rows = told["targets"].setdefault(target, {})
        begun = time.process_time()
        try:
            artifact = do()
            rows[what] = {"seconds": round(time.process_time() - begun, 1)}
            return artifact
        except KdpipeError as error:
            rows[what] = {"failed": first_line(error)}
            return None

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        chain = Chain(folder / "artifacts")
        if "+" in model:
            plan = DataPlan(task="segmentation", source=str(photos), most_images=CALIBRATING + CHECKED + CLASSES)
        else:
            dealt(photos, folder / "photos")
            plan = DataPlan(source=str(folder / "photos"), val_fraction=0)
        dataset = chain.data(plan)
        tell(told)
        network = drawn(chain, model, size, dataset)
        told["size"], told["parameters"] = network.facts.input.size, network.facts.parameters
        device = find_device("local").probe()
        # Weights are random: what they say of an image hangs by a thread.
        settings = {"calibrate": {"images": CALIBRATING}, "check_images": CHECKED, "allow_damage": True}
        small = validated(QuantizeConfig, {"variant": INT8, **settings}, "coverage")
        for target in TARGETS:
            config = ExportConfig(target=target, hop_images=2 * CLASSES)
            whole = step(target, "float32", partial(chain.export, config, network, dataset))
            if whole is None:
                continue
            parity = whole.facts.parity
            told["targets"][target]["float32"] |= {
                "relative_difference": parity.relative_difference,
                "images": parity.images,
            }
            quantized = step(target, INT8, partial(chain.quantize, small, whole, dataset, device))
            if quantized is not None:
                told["targets"][target][INT8] |= quantized.facts.against_float32.model_dump()
        told["doing"] = None
        tell(told)


def watched(command: list[str]) -> str:
    """Run a process within the limits; what went wrong, or nothing."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL)
        begun, failure = time.monotonic(), ""
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/statm")
            try:
                resident = int(status.read_text().split()[1]) * 4096
            except (OSError, IndexError):  # it ended just now
                resident = 0
            if time.monotonic() - begun > LIMIT_WALL_SECONDS:
                failure = f"not done in {LIMIT_WALL_SECONDS} s"
            elif resident > LIMIT_BYTES:
                failure = f"took more than {LIMIT_BYTES / 2**30:.0f} GiB of memory"
            if failure:
                process.kill()
                process.wait()
                return failure
            time.sleep(0.2)
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines() or ["no message"]
    if process.returncode == -signal.SIGXCPU:
        return f"not done in {LIMIT_SECONDS} s of processor time"
    if process.returncode < 0:
        return f"the process ended by signal {-process.returncode}"
    return lines[-1] if process.returncode else ""


def table(found: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in (
            *("torch", "timm", "segmentation-models-pytorch", "onnx", "onnxslim", "onnxruntime", "openvino", "nncf"),
            *("litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
        )
    )
    masks = any("+" in row["model"] for row in found)
    made_by = "docs/coverage-masks.md MASKS --masks" if masks else "docs/coverage.md PHOTOS"
    shown = "" if masks else "; the photographs are 1,000 of ImageNet"
    lines = [
        f"# Coverage{' of networks that draw masks' if masks else ''}",
        "",
        f"Made by `python benchmarks/coverage.py {made_by}` on "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} with {versions}{shown}.",
        "",
        " ".join((EXPLAINED_MASKS if masks else EXPLAINED).split()),
        "",
        f"| model | million parameters | pixels | {' | '.join(f'{target} | INT8' for target in TARGETS)} |",
        "|---|---|---|" + "---|---|" * len(TARGETS),
    ]
    reasons: dict[str, list[str]] = {}
    passed = {(target, what): 0 for target in TARGETS for what in ("float32", INT8)}
    for row in found:
        cells = []
        for target in TARGETS:
            for what in ("float32", INT8):
                result = row["targets"].get(target, {}).get(what) or {}
                if "seconds" in result:
                    passed[target, what] += 1
                    decibels = result.get("signal_to_noise_db")
                    cells.append(
                        f"{result['seconds']:.1f}"
                        if decibels is None
                        else f"{decibels:.1f} dB, {result['agreement']:.0%}"
                    )
                elif what == INT8 and "seconds" not in (row["targets"].get(target, {}).get("float32") or {}):
                    cells.append("")
                else:
                    cells.append("**failed**")
                    reason = result.get("failed") or row.get("failed") or "not tried"
                    reason = re.sub(r"\S*/(site-packages|photos)/", "", reason)
                    reasons.setdefault(f"{row['model']}: {reason}", []).append(f"{target} {what}")
        millions = f"{row['parameters'] / 1e6:.1f}" if "parameters" in row else ""
        lines.append(f"| {row['model']} | {millions} | {row.get('size', '')} | " + " | ".join(cells) + " |")
    shares = []
    for target in TARGETS:
        for what, total in (("float32", len(found)), (INT8, passed[target, "float32"])):
            shares.append(f"{passed[target, what]} of {total} ({passed[target, what] / max(total, 1):.0%})")
    lines += [f"| **passed** | | | {' | '.join(shares)} |", ""]
    failures = [f"- {reason} ({', '.join(where)})" for reason, where in reasons.items()]
    return "\n".join([*lines, *(["## Failures", "", *failures, ""] if failures else [])])


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="the page to write")],
    photos: Annotated[Path, typer.Argument(help="folder of photographs, at any depth")],
    model: Annotated[list[str] | None, typer.Option(help="only this one (repeatable)")] = None,
    masks: Annotated[bool, typer.Option("--masks", help="decoders over encoders; PHOTOS has images and masks")] = False,
    size: Annotated[int, typer.Option(help="pixels, where the network can take them; else its own")] = 128,
    results: Annotated[
        Path | None, typer.Option(help="folder of raw results: a model that is there is not run again")
    ] = None,
    alone: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Export every family to every target, and make its INT8."""
    if alone:
        assert model is not None
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 60))
        one(model[0], photos, size, lambda told: _write(out, told))
        return
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = results or Path(scratch)
        kept.mkdir(parents=True, exist_ok=True)
        for name in model or (PAIRS if masks else FAMILIES):
            answer, draft = kept / f"{name}.json", kept / f"{name}.part"
            if not answer.is_file():
                _write(draft, {"model": name, "doing": "starting", "targets": {}})
                command = [sys.executable, __file__, str(draft), str(photos), "--model", name, "--size", str(size)]
                failure = watched([*command, "--alone"])
                told = json.loads(draft.read_text())
                if failure:
                    told["failed"] = f"{failure}, at: {told['doing']}"
                _write(answer, told)
                draft.unlink()
            found.append(json.loads(answer.read_text()))
            said = {
                f"{target} {what}": row.get("failed") or row.get("signal_to_noise_db", "ok")
                for target, rows in found[-1]["targets"].items()
                for what, row in rows.items()
            }
            print(name, found[-1].get("failed", ""), said, flush=True)
            out.write_text(table(found))


def _write(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value))
    draft.rename(path)


if __name__ == "__main__":
    app()
