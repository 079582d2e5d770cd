"""The pages' templates: everything that is put into one is escaped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def filled(name: str, values: dict[str, Any], **filters: Callable[..., Any]) -> str:
    """The page that the template of that name makes of ``values``. Raises jinja2's UndefinedError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name).render(**values)
