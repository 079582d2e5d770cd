"""Of many artifacts the settings that somebody chose; those that stand at their defaults are told once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ..core import config as configs

Numbers = dict[str, Any]
# By stage what its settings are; those of another stage are all told.
SETTINGS: dict[str, type[configs.Config]] = {
    "data": configs.DataConfig,
    "fitted": configs.FittedConfig,
    "adopt": configs.AdoptConfig,
    "restart": configs.RestartConfig,
    "train": configs.TrainConfig,
    "cache": configs.CacheConfig,
    "graph": configs.GraphConfig,
    "export": configs.ExportConfig,
    "quantize": configs.QuantizeConfig,
    "package": configs.PackageConfig,
    "bench": configs.BenchConfig,
    "report": configs.ReportConfig,
}


def chosen(lineage: Sequence[Numbers]) -> tuple[list[Numbers], dict[str, Numbers]]:
    """The settings of each artifact that differ from the defaults, by dotted name; and the defaults by stage, once.

    A default stands among those of its stage if any artifact has it.

    Args:
        lineage: artifacts with ``stage`` and ``config``, as ``tables.lineage`` gives them.
    """
    rows: list[Numbers] = []
    standing: dict[str, Numbers] = {}
    for made in lineage:
        stage, config = made["stage"], made["config"]
        own, known = own_settings(stage, config), defaults(stage)
        rows.append({**made, "chosen": own})
        names = [name for name, _ in flat(config, SETTINGS.get(stage)) if name not in own]
        standing.setdefault(stage, {}).update({name: known[name] for name in names})
    return rows, {stage: found for stage, found in standing.items() if found}


def own_settings(stage: str, config: Mapping[str, Any]) -> Numbers:
    """What of a stage's configuration is not at its default, by dotted name."""
    known = defaults(stage)
    settings = flat(config, SETTINGS.get(stage))
    return {name: value for name, value in settings if name not in known or known[name] != value}


def defaults(stage: str) -> Numbers:
    """The defaults of a stage's settings by dotted name; what has none is not among them."""
    kind = SETTINGS.get(stage)
    if kind is None:
        return {}
    return dict(flat(kind.model_construct().model_dump(mode="json", warnings=False), kind))


def flat(settings: Mapping[str, Any], kind: type[BaseModel] | None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name, as far as ``kind`` has settings inside settings."""
    for name, value in settings.items():
        field = None if kind is None else kind.model_fields.get(name)
        inner = None if field is None else configs.nested(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            yield from flat(value, inner, f"{above}{name}.")
        else:
            yield above + name, value
