"""The report stage: one measurement and the checkpoints behind it to a page that opens anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.artifact import Order, drafting, write_json
from ..core.config import ReportConfig
from ..core.kinds import Checkpoint, DeviceReport, GainFacts, Measurement, Report, ReportFacts
from . import tables, words
from .compression import Packed, Sources, thumbnail
from .images import contact_sheet
from .maps import ABOUT, ASKED_HERE, Explained
from .masks import Masks, masks
from .pooled import pool
from .templates import filled
from .terms import TERMS

MOST_CLASSES = 1000  # rows of the page; report.json has all
LONGEST_SETTING = 120  # characters of one on the page; report.json has it whole


def report(
    order: Order[ReportConfig],
    sessions: Mapping[str, Sequence[Measurement]],
    checkpoints: Mapping[str, Checkpoint],
    sources: Sources,
    out: Path,
    explain: Callable[[Sequence[tables.Numbers], Mapping[str, Packed]], Explained] | None = None,
) -> Report:
    """Write ``report.html`` (self-contained) and ``report.json`` (the same numbers).

    Args:
        sessions: by device every attempt at one session, in their order.
        checkpoints: by name, the teacher and every student run that the page compares.
        sources: what else lies beside the measurements and stands behind them.
        explain: draws maps for the images that changed, given their rows and the bundles by name.

    Raises:
        UserError: a shipped student that was tested on other images than the bundles.
    """
    with drafting(Report, order, out) as draft:
        numbers = tables.collect(order.config, sessions, checkpoints, sources)
        write_json(draft.path / Report.NUMBERS, numbers)
        first = pool(next(iter(sessions.values()))).shown
        bundles = tables.bundles_of(first)
        drawn = masks(numbers, first, bundles, sources)
        pictures = {} if drawn.legend else _pictures(numbers, sources)
        explained = explain(numbers["flips"], bundles) if explain else Explained()
        page = render(numbers, pictures, contact_sheet(sources.dataset), drawn, explained)
        (draft.path / Report.PAGE).write_text(page, encoding="utf-8")
        draft.facts = ReportFacts(
            devices=[
                DeviceReport(
                    device=device["device"],
                    trust=device["trust"]["word"],
                    sessions=device["trust"]["sessions"],
                    bundles=len(device["bundles"]),
                    ship=device["decision"]["bundle"],
                    pareto=device["front"],
                )
                for device in numbers["devices"]
            ],
            gains=[GainFacts(method=gain["method"], gain_points=gain["gain_points"]) for gain in numbers["gains"]],
        )
    return draft.artifact


def _pictures(numbers: tables.Numbers, sources: Sources) -> dict[int, str]:
    """The test images that the page shows, by position: those that changed, and the worst mistakes."""
    shown = [*numbers["flips"], *(numbers["answers"]["mistakes"] if numbers["answers"] else [])]
    samples = sources.dataset.samples("test") if sources.dataset else []
    return {each["position"]: thumbnail(samples[each["position"]].image()) for each in shown}


def render(
    numbers: tables.Numbers,
    pictures: Mapping[int, str],
    sheet: str = "",
    masks: Masks | None = None,
    explained: Explained | None = None,
) -> str:
    """The page of ``numbers``; everything is escaped but the figures drawn here.

    Args:
        pictures: test images as URIs, by position.
        sheet: the contact sheet of the data, as a data URI.
        masks: what is drawn in place of the pictures where answers are masks.
        explained: maps in place of the pictures of images that changed.
    """
    from .plots import figures, gain_names, pareto_name
    from .settings import chosen

    rows, defaults = chosen(numbers["lineage"])
    values = {
        **numbers,
        "words": words,
        "numbers": numbers,
        "figures": figures(numbers),
        "gain_names": gain_names(numbers["gains"]),
        "pareto_name": pareto_name,
        "pictures": pictures,
        "masks": masks or Masks(),
        "explained": explained or Explained(),
        "about_maps": (*ABOUT, ASKED_HERE),
        "sheet": sheet,
        "chosen": rows,
        "defaults": defaults,
        "terms": TERMS,
        "most_classes": MOST_CLASSES,
    }
    return filled("page.html", values, pretty=pretty, brief=brief)


def pretty(value: Any) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False)


def brief(value: Any) -> str:
    """A setting as JSON in one line, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_SETTING else text[: LONGEST_SETTING - 1] + "\N{HORIZONTAL ELLIPSIS}"
