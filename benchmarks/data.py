"""What `kdpipe data` costs over a plain loop that decodes the same images: seconds, and memory by how many there are.

    python benchmarks/data.py FOLDER --count 50000 --rounds 4

Makes so many JPEGs of 224 pixels in 100 classes, and a tenth of them, with copies and re-saved images of the test part
among those to learn from. Each measurement is a process of its own, from its start to its end: `kdpipe data` into a
new folder (hashes, decoding, perceptual hashes, leaks, report), one loop that opens and decodes every file, and that
loop by as many threads as kdpipe has. They take turns, forwards and backwards; the first round warms the page cache
and is not counted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

CLASSES, SIDE, TEST_EVERY = 100, 224, 10
LEAKED = 50  # test images of which a copy, and as many of which a re-saved image, is among those to learn from

PLAIN_LOOP = """
import sys
from pathlib import Path
from PIL import Image
for path in sorted(Path(sys.argv[1]).rglob("*.jpg")):
    with Image.open(path) as image:
        image.convert("RGB")
"""
THREADED_LOOP = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image
def decode(path):
    with Image.open(path) as image:
        image.convert("RGB")
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    for _ in pool.map(decode, sorted(Path(sys.argv[1]).rglob("*.jpg")), chunksize=64):
        pass
"""


# ---- images --------------------------------------------------------------------------------------------------


def picture(number: int) -> Any:
    """Coarse shapes, a finer texture and a little noise, as a photograph has them; no two alike."""
    from PIL import Image

    generator = np.random.default_rng(number)
    pixels = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells, strength in ((5, 90), (14, 45), (56, 15)):
        coarse = generator.normal(0, strength, (cells, cells, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels += np.asarray(layer, np.float32) - 128
    pixels += generator.normal(128, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def place(root: Path, number: int) -> Path:
    part = "val" if number % TEST_EVERY == 0 else "train"
    return root / part / f"{number // TEST_EVERY % CLASSES:03d}" / f"{number:06d}.jpg"


def write(root: Path, numbers: range) -> None:
    for number in numbers:
        picture(number).save(place(root, number), quality=90)


def make(root: Path, count: int) -> None:
    """``count`` images; whole or not there."""
    if root.exists():
        return
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for split in ("train", "val"):
        for label in range(CLASSES):
            (part / split / f"{label:03d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write, [part] * 100, [range(at, count, 100) for at in range(100)]))
    for at in range(LEAKED):
        copied, resaved = (place(part, TEST_EVERY * (2 * at + which)) for which in range(2))
        shutil.copy(copied, part / "train" / copied.parent.name / f"copy-{at}.jpg")
        again = picture(int(resaved.stem)).resize((200, 200))
        again.save(part / "train" / resaved.parent.name / f"resaved-{at}.jpg", quality=75)
    part.rename(root)


# ---- measuring -----------------------------------------------------------------------------------------------


def timed(command: list[str]) -> tuple[float, float, str]:
    """Seconds, the largest resident set in MiB, and what a process printed."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)  # of this process alone, not of all that ever ran
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{command[:4]} ended with {process.returncode}")
        printed.seek(0)
        return seconds, used.ru_maxrss / 1024, printed.read().decode()


def measure(root: Path, artifacts: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    commands = {
        "data": [sys.executable, "-m", "kdpipe", "data", str(root), "--artifacts", str(artifacts), "--json"],
        "loop": [sys.executable, "-c", PLAIN_LOOP, str(root)],
        "threads": [sys.executable, "-c", THREADED_LOOP, str(root)],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name in list(commands) if turn % 2 else list(commands)[::-1]:
            shutil.rmtree(artifacts, ignore_errors=True)
            seconds, mebibytes, text = timed(commands[name])
            if name == "data":
                survey = json.loads(text)["survey"]
                found = survey["copies_left_out"], survey["look_alikes"]["images"]
                if found[0] != LEAKED or found[1] < LEAKED / 2:
                    raise RuntimeError(f"wanted {LEAKED} copies and about as many that look alike, found {found}")
                if not turn:
                    print(f"{root.name} images: {found[0]} copies and {found[1]} look-alikes of {LEAKED} each found")
            if turn:
                taken[name].append((seconds, mebibytes))
                print(f"{root.name} {name:<8} {seconds:7.1f} s {mebibytes:6.0f} MiB", flush=True)
    return taken


def main(
    folder: Annotated[Path, typer.Argument(help="where images and artifacts go")],
    count: Annotated[int, typer.Option(help="images")] = 50_000,
    rounds: Annotated[int, typer.Option(help="that are counted")] = 6,
) -> None:
    from kdpipe.core.stats import ratio_interval

    peaks = {}
    for images in (count // 10, count):
        root = folder.absolute() / str(images)
        make(root, images)
        taken = measure(root, folder.absolute() / "artifacts", rounds)
        peaks[images] = max(mebibytes for _, mebibytes in taken["data"])
        seconds = {name: [each for each, _ in rows] for name, rows in taken.items()}
        for name, words in (("loop", "a plain loop"), ("threads", "the same loop by threads")):
            ratio = ratio_interval(seconds["data"], seconds[name])
            print(f"{images} images: kdpipe data takes {ratio.value:.2f} [{ratio.low}, {ratio.high}] of {words}")
    few, many = peaks.items()
    growth = (many[1] - few[1]) * 2**20 / (many[0] - few[0])
    print(f"peak memory: {few[1]:.0f} MiB of {few[0]} images, {many[1]:.0f} of {many[0]}: {growth:.0f} bytes an image")
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
