"""How right bundles are about the test images with a camera's faults, the smaller ones against their float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..core.kinds import Measurement, float32_by_bundle
from ..core.sealed import printable
from ..data.corrupt import CORRUPTING, SEVERITIES
from ..runtime.task import TASKS
from . import words
from .answers import scores
from .compression import Packed

if TYPE_CHECKING:
    from rich.table import Table

Numbers = dict[str, Any]


def faults(measurement: Measurement, bundles: Mapping[str, Packed]) -> Numbers | None:
    """Accuracy by fault of every bundle that was asked, and a variant's difference to its float32, image by image.

    None where no fault was asked about.
    """
    asked: list[Any] = list(measurement.settings.get("corruptions", ()))
    if not asked:
        return None
    task = TASKS[measurement.facts.task]
    float32 = float32_by_bundle({name: bundle.source for name, bundle in bundles.items()})
    rows = []
    for name in bundles:
        if any(measurement.outputs_name(name, corruption) not in measurement.manifest.files for corruption in asked):
            continue
        base = float32.get(name)
        found = {}
        for corruption in asked:
            mine = scores(measurement, name, corruption)
            difference = None
            other = None if base in (None, name) else measurement.outputs_name(str(base), corruption)
            if base is not None and other in measurement.manifest.files:
                change = task.change(scores(measurement, base, corruption), mine)
                difference = {"value": change.difference, "low": change.low, "high": change.high, "n": change.n}
            found[corruption] = {"accuracy": task.summary(mine)._asdict(), "difference": difference}
        rows.append({"name": name, "faults": found})
    severities = SEVERITIES if measurement.settings.get("corrupting") == CORRUPTING else {}
    return {"asked": {corruption: severities.get(corruption, "") for corruption in asked}, "rows": rows}


def faults_table(device: Numbers) -> Table:
    """One line a bundle, a column a fault, within 110 columns: accuracy, and in brackets points against float32."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found, plain = device["faults"], {row["name"]: row["accuracy"] for row in device["bundles"]}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("with a camera's faults, %", no_wrap=True)
    for head in ("as it is", *found["asked"]):
        table.add_column(head, justify="right", no_wrap=True)
    for row in found["rows"]:
        accuracy = plain.get(row["name"])
        as_it_is = words.percent(accuracy["value"], 1) if accuracy else words.NOTHING
        name = Text(printable(row["name"]))  # no markup of anybody's
        table.add_row(name, as_it_is, *(cell(row["faults"][corruption]) for corruption in found["asked"]))
    return table


def cell(found: Mapping[str, Any]) -> str:
    """An accuracy in per cent, and in brackets the points that it differs by from float32's."""
    text = words.percent(found["accuracy"]["value"], 1)
    return text if found["difference"] is None else f"{text} ({words.points(100 * found['difference']['value'], 1)})"
