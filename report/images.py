"""The data report on the page: what the images are, and a few of each class."""

from __future__ import annotations

import base64
from typing import Any

from ..core.errors import UserError
from ..core.sealed import printable
from ..data.dataset import Dataset
from ..data.survey import findings, summary

LARGEST_SHEET_BYTES = 4 * 2**20


def image_numbers(dataset: Dataset | None) -> dict[str, Any] | None:
    """Lines on the images, and how many of each class there are by part; None where nobody looked at them.

    Raises:
        UserError: a survey that is not what kdpipe writes.
    """
    survey = None if dataset is None else dataset.survey
    if dataset is None or survey is None:
        return None
    names = [printable(name, 200) for name in dataset.classes]
    rows = zip(*survey.by_class.values(), strict=True)
    return {
        "summary": summary(survey, dataset.classes),
        "findings": findings(survey, dataset.classes),
        "parts": list(survey.by_class),
        "classes": [{"name": name, "images": list(counts)} for name, counts in zip(names, rows, strict=True)],
    }


def contact_sheet(dataset: Dataset | None) -> str:
    """The contact sheet as a data URI; empty where there is none. Raises UserError for one that cannot be ours."""
    if dataset is None or dataset.SHEET not in dataset.manifest.files:
        return ""
    path = dataset.file(dataset.SHEET)
    content = path.read_bytes() if path.stat().st_size <= LARGEST_SHEET_BYTES else b""
    if not content.startswith(b"\xff\xd8\xff"):
        raise UserError(f"{path} is not what kdpipe writes: make the data again")
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()
