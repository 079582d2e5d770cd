"""The report in a real browser, without a network: what a person sees."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, system_command

pytestmark = pytest.mark.lab


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open ``page`` in headless Chromium; every request beyond the file itself ends at a closed port."""
    arguments = [
        *(system_command("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"),
        *("--virtual-time-budget=5000", *options, page.as_uri()),
    ]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn(made: Made, tmp_path: Path, scheme: str, width: int) -> None:
    """Not blank, in the colours that were asked for, and no wider than the window."""
    from PIL import Image

    shot = tmp_path / "page.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    page = tmp_path / "framed.html"
    # A window is no narrower than 500 pixels: a frame is.
    source = made.report.file(made.report.PAGE).as_uri()
    page.write_text(f'<body style="margin:0"><iframe src="{source}" style="border:0;width:{width}px;height:2400px">')
    browse(page, tmp_path / "profile", *dark, f"--window-size={max(width, 500)},2400", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L"), float)[:, :width]
    assert pixels.shape[0] >= 2000 and pixels.std() > 10, "the page is blank"
    ground = np.median(pixels)
    assert ground < 80 if scheme == "dark" else ground > 200
    if width == 400:
        assert np.ptp(pixels[:, -4:]) < 60, "something runs out of the page"
