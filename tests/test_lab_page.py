"""The report in a real browser, without a network: what a person sees, on a desk and on a phone, light and dark."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made, system_command
from test_answers import many, pictures, with_decision

from kdpipe.report import words
from kdpipe.report.page import render
from kdpipe.report.terms import TERMS

pytestmark = pytest.mark.lab

FOLD = 800  # pixels that a person sees before scrolling
SIZES = pytest.mark.parametrize(("width", "scheme"), [(w, s) for w in (1280, 400) for s in ("light", "dark")])

# Runs beside the page, which has no script of its own; tells what only a browser knows.
LOOK = """
const frame = document.querySelector("iframe"), page = frame.contentDocument, found = {};
const box = (element) => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
const seen = (element) => element.checkVisibility() && element.getBoundingClientRect().width > 0;
found.width = page.documentElement.scrollWidth;
found.ground = getComputedStyle(page.body).backgroundColor;
const headline = page.querySelector(".headline");
found.decision = { text: headline.textContent, bottom: box(headline)[3] };
found.decision.size = parseFloat(getComputedStyle(headline).fontSize);
const file = page.querySelector(".file");
found.file = file ? box(file)[3] : 0;
found.figures = [...page.querySelectorAll("figure svg")].map((svg) => ({
  texts: [...svg.querySelectorAll("text")].filter(seen).map((text) => [text.textContent, ...box(text)]),
  frame: box(svg),
}));
const tables = [...page.querySelectorAll("table")].filter(seen);
found.tables = tables.map((table) => ({
  wider: table.scrollWidth - table.parentElement.clientWidth,
  heads: [...table.querySelectorAll("th")].filter(seen).length,
  cells: [...table.querySelectorAll("td")].filter((td) => seen(td) && td.textContent.trim()).map((td) => ({
    text: td.textContent.trim(), box: box(td), says: getComputedStyle(td, "::before").content,
  })),
}));
found.meanings = [...page.querySelectorAll(".meanings summary")].filter(seen).length;
const word = [...page.querySelectorAll("dfn")].filter(seen)[0];
if (word) {
  frame.contentWindow.focus();
  word.focus();
  found.explained = getComputedStyle(word, "::after").content;
}
found.width_explained = page.documentElement.scrollWidth;
document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
document.querySelector("#found").textContent = btoa(unescape(encodeURIComponent(JSON.stringify(found))));
"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open ``page`` in headless Chromium; every request beyond the file itself ends at a closed port."""
    arguments = [
        *(system_command("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"),
        *("--virtual-time-budget=5000", *options, page.as_uri()),
    ]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=1800, check=True)


def dark(scheme: str) -> list[str]:
    return ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []


def look(text: str, width: int, scheme: str, folder: Path) -> dict[str, Any]:
    """What ``LOOK`` finds on a page in a window of that width."""
    import base64

    # A window is no narrower than 500 pixels: a frame is.
    frame = f'<iframe style="border:0;width:{width}px;height:{FOLD}px" srcdoc="{html.escape(text)}"></iframe>'
    script = f"<script>onload = () => {{ {LOOK} }}</script>"
    page = folder / "framed.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}{script}', encoding="utf-8")
    done = browse(page, folder / "profile", *dark(scheme), f"--window-size={max(width, 500)},{FOLD}", "--dump-dom")
    found = re.search(r'<pre id="found">([^<]+)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(base64.b64decode(found[1]))


def overlapping(texts: list[list[Any]]) -> list[tuple[str, str]]:
    """Pairs of texts whose boxes share more than a pixel each way."""
    pairs = []
    for at, (first, *a) in enumerate(texts):
        for second, *b in texts[at + 1 :]:
            if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1:
                pairs.append((first, second))
    return pairs


def test_the_page_shows_every_bundle_and_says_no_error(made: Made, tmp_path: Path) -> None:
    done = browse(made.report.file(made.report.PAGE), tmp_path, "--dump-dom")
    numbers = json.loads(made.report.file(made.report.NUMBERS).read_text())
    for bundle in numbers["devices"][0]["bundles"]:
        assert f"{bundle['name']}" in done.stdout
    assert done.stdout.count("<svg") >= 3 and "</html>" in done.stdout
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console


def test_the_page_fetches_nothing(made: Made) -> None:
    text = made.report.file(made.report.PAGE).read_text()
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["'(]?\s*(?:https?:)?//""", text)


@SIZES
def test_the_page_fits_and_decides_above_the_fold(made: Made, tmp_path: Path, scheme: str, width: int) -> None:
    """Crowded, with names and a path that are long: no wider than the window, the decision seen at once."""
    folder = "/home/somebody/projects/traffic/artifacts/bundle-openvino-int8-0123456789ab"
    numbers = many(with_decision(made.report.numbers, folder), 24)
    numbers["title"] = "traffic-signs-with-a-name-that-somebody-thought-about"
    found = look(render(numbers, pictures(made)), width, scheme, tmp_path)
    assert found["width"] <= width and found["width_explained"] <= width
    assert found["decision"]["text"] == words.decision_sentence(numbers["devices"][0]["decision"])
    assert found["decision"]["bottom"] < found["file"] < FOLD and found["decision"]["size"] >= 18
    red = int(re.findall(r"\d+", found["ground"])[0])
    assert red < 60 if scheme == "dark" else red > 200
    assert found["meanings"] >= 4
    if width > 640:  # a phone has no heads of columns, but the folds
        assert found["explained"].strip('"') == TERMS["variant"]
    # Labels of points, ticks and legends: none lies on another, none is cut off.
    assert len(found["figures"]) >= 5
    for figure in found["figures"]:
        assert len(figure["texts"]) > 5
        assert not overlapping(figure["texts"])
        left, top, right, bottom = figure["frame"]
        for text, *box in figure["texts"]:
            assert box[0] >= left - 1 and box[2] <= right + 1 and box[1] >= top - 1 and box[3] <= bottom + 1, text
    # On a phone a row is a card: every cell is there, and says what it is.
    assert len(found["tables"]) >= 6
    for table in found["tables"]:
        cells = table["cells"]
        assert cells and table["wider"] <= 0
        if width == 400:
            assert table["heads"] == 0
            assert all(cell["says"] not in ("none", '""', "normal") for cell in cells), cells
            assert all(cell["box"][0] >= 0 and cell["box"][2] <= width for cell in cells)
        else:
            assert table["heads"] >= 3
            assert all(cell["says"] == "none" for cell in cells)


def test_what_is_looked_for_would_be_found(made: Made, tmp_path: Path) -> None:
    """A page with two labels on one another, a line that is too long and the decision far down."""
    page = render(with_decision(made.report.numbers), pictures(made))
    spoilt = page.replace("<header>", '<div style="height:900px;width:1500px"></div><header>', 1)
    label = re.search(r"<text [^>]*>", spoilt)
    assert label is not None
    spoilt = spoilt.replace(label[0], f"{label[0]}one</text>{label[0]}", 1)
    found = look(spoilt, 400, "light", tmp_path)
    assert found["width"] > 400 and found["decision"]["bottom"] > FOLD
    assert any(overlapping(figure["texts"]) for figure in found["figures"])


@SIZES
def test_the_page_is_drawn(made: Made, tmp_path: Path, scheme: str, width: int) -> None:
    """Not blank, in the colours that were asked for, and no wider than the window."""
    from PIL import Image

    shot = tmp_path / "page.png"
    page = tmp_path / "framed.html"
    # A window is no narrower than 500 pixels: a frame is.
    source = made.report.file(made.report.PAGE).as_uri()
    page.write_text(f'<body style="margin:0"><iframe src="{source}" style="border:0;width:{width}px;height:2400px">')
    browse(page, tmp_path / "profile", *dark(scheme), f"--window-size={max(width, 500)},2400", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L"), float)[:, :width]
    assert pixels.shape[0] >= 2000 and pixels.std() > 10, "the page is blank"
    ground = np.median(pixels)
    assert ground < 80 if scheme == "dark" else ground > 200
    if width == 400:
        assert np.ptp(pixels[:, -4:]) < 60, "something runs out of the page"
