"""The report stage: one measurement and the checkpoints behind it to a page that opens anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.artifact import Artifact, Checkpoint, Measurement, Report, drafting, write_json
from ..core.config import ReportConfig
from . import tables, words
from .compression import Sources, thumbnail


def report(
    config: ReportConfig, measurement: Measurement, checkpoints: Mapping[str, Checkpoint], sources: Sources, out: Path
) -> Report:
    """Write ``report.html`` (self-contained) and ``report.json`` (the same numbers).

    Args:
        checkpoints: by name, the teacher and every student run that the page compares.
        sources: what else lies beside the measurement and stands behind it.

    Raises:
        UserError: a shipped student that was tested on other images than the bundles.
    """
    inputs: dict[str, Artifact] = {"measurement": measurement, **checkpoints, **sources.as_inputs()}
    with drafting(Report, out, stage="report", config=config, inputs=inputs) as draft:
        numbers = tables.collect(config, measurement, checkpoints, sources)
        write_json(draft.path / "report.json", numbers)
        (draft.path / "report.html").write_text(render(numbers, _pictures(numbers, sources)), encoding="utf-8")
        draft.facts.update(
            trusted=numbers["trust"]["trusted"],
            bundles=len(numbers["bundles"]),
            pareto=[row["name"] for row in numbers["bundles"] if row["pareto"]],
            gains=[{name: gain[name] for name in ("method", "gain_points")} for gain in numbers["gains"]],
        )
    return draft.artifact


def _pictures(numbers: tables.Numbers, sources: Sources) -> list[str]:
    """The flipped images, one for each row of ``numbers["flips"]``."""
    samples = sources.dataset.samples("test") if sources.dataset else []
    return [thumbnail(samples[flip["position"]].path) for flip in numbers["flips"]]


def render(numbers: tables.Numbers, pictures: Sequence[str]) -> str:
    """The page of ``numbers``; everything is escaped but the figures drawn here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from .plots import figures

    def picture(svg: str) -> Markup:
        return Markup(svg)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(picture=picture, pretty=pretty)
    return environment.get_template("page.html").render(
        **numbers, words=words, numbers=numbers, figures=figures(numbers), pictures=pictures
    )


def pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)
