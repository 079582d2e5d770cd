"""A recipe over this machine and one behind a real sshd, which goes away in the middle and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import SMALL_RECIPE, Made, assert_one_line, copied_steps, kdpipe
from lab import Computer, serve

from kdpipe.core import progress
from kdpipe.core.kinds import Measurement
from kdpipe.devices import bench

pytestmark = pytest.mark.lab

QUICK = {
    "rounds": 2, "seconds": 0.05, "max_seconds": 0.05, "min_samples": 10, "warm_up_seconds": 0.05, "images": 8,
    "cold_starts": 1,
}  # fmt: skip


class WhenItMeasures(progress.Silence):
    """Does something once, when the session of a device has come to some point."""

    def __init__(self, at: str, do: object) -> None:
        self.at, self.do, self.done = at, do, False

    def advance(self, steps: int, detail: str) -> None:
        if self.at in detail and not self.done:
            self.done = True
            self.do()  # type: ignore[operator]


def test_a_run_with_an_ssh_device_ends_in_a_report_with_its_rows(
    made: Made, tmp_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer = Computer()
    try:
        sshd = serve(computer)
        described = {"kind": "ssh", "address": "device", "ssh_config": str(sshd.config), "python": computer.python()}
        (workdir / "devices.yaml").write_text(yaml.safe_dump({"pi": described}))
        recipe = {
            **SMALL_RECIPE,
            "export": {"targets": ["onnxruntime"]},
            "bench": {**QUICK, "devices": ["local", "pi"]},
        }
        recipe["quantize"] = {"variants": ["int8"], "calibrate": {"images": 64}, "check_images": 32}
        (workdir / "two.yaml").write_text(yaml.safe_dump(recipe))
        folder = copied_steps(made, tmp_path / "artifacts", "measurement", "report")
        call = ["run", "two.yaml", "--artifacts", folder, "--json"]

        monkeypatch.setattr(bench, "LINK_WAIT_SECONDS", 0.1)
        cutter = WhenItMeasures("pi: round 2", sshd.stop)
        monkeypatch.setattr("kdpipe.terminal.listener", lambda: cutter)
        done = kdpipe(*call, cwd=workdir)
        assert cutter.done
        assert_one_line(done, 2, "'pi' was not measured", "cannot be reached", "the others are reported")
        [local] = json.loads(done.stdout)["numbers"]["devices"]
        assert local["device"] == "local" and [row["variant"] for row in local["bundles"]] == ["float32", "int8"]
        before = {path.name for path in folder.glob("measurement-*-1")}

        sshd.start()
        done = kdpipe(*call, cwd=workdir)
        assert done.returncode == 75, done.stderr  # two rounds bound nothing
        answer = json.loads(done.stdout)
        assert [device["device"] for device in answer["numbers"]["devices"]] == ["local", "pi"]
        pi = answer["numbers"]["devices"][1]
        assert "Bundles on pi" in Path(answer["report"]).read_text() and len(pi["bundles"]) == 2
        for row in pi["bundles"]:
            assert row["latency_p50_ms"]["value"] > 0 and row["against_host"]["mismatches"] == 0
        [new] = {path.name for path in folder.glob("measurement-*-1")} - before
        facts = Measurement.open(folder / new).facts
        assert facts.device == "pi" and len(facts.pauses_seconds) >= 1, "gone on with, not begun anew"
        assert facts.results["onnxruntime-int8"].conditions.others_cores != "unavailable"
    finally:
        computer.close()
