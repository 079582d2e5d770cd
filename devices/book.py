"""devices.yaml: the machines that a person measures on, each under its name.

Read from the project's folder (where the command runs), then from the user's configuration folder; the nearer one
wins. ``local`` and ``null`` are always there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.config import DeviceSettings, parse_yaml, validated
from ..core.errors import UserError, choice

FILE = "devices.yaml"
BUILT_IN = ("local", "null")


def places() -> tuple[Path, Path]:
    """Where devices.yaml may lie: here, and in the user's configuration folder."""
    configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(FILE).absolute(), Path(configuration) / "kdpipe" / FILE


def read(path: Path, kinds: Mapping[str, object]) -> dict[str, DeviceSettings]:
    """The devices of one file by name; none where there is no file. Raises UserError.

    Args:
        kinds: of device that there are.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    values = parse_yaml(text, str(path)) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: wanted a mapping from names to devices, found {type(values).__name__}")
    return {str(name): described(str(name), value, str(path), kinds) for name, value in values.items()}


def described(name: str, values: Any, where: str, kinds: Mapping[str, object]) -> DeviceSettings:
    """What a mapping says of one device. Raises UserError."""
    if name in BUILT_IN:
        raise UserError(f"{where}: '{name}' is there by itself, choose another name")
    if not isinstance(values, dict):
        raise UserError(f"{where}: '{name}': wanted a mapping such as {{kind: ssh, address: pi@pi5}}")
    settings = validated(DeviceSettings, {**values, "name": name}, f"{where}: '{name}'")
    if settings.kind not in kinds:
        raise choice(f"kind of device of '{name}'", settings.kind, kinds)
    if settings.kind == "ssh" and not settings.address:
        raise UserError(f"{where}: '{name}' needs an address, such as pi@pi5")
    return settings


def known(kinds: Mapping[str, object]) -> dict[str, DeviceSettings]:
    """Every device by name, those that are there by themselves first. Raises UserError for a wrong file."""
    found = {name: DeviceSettings(name=name, kind=name) for name in BUILT_IN}
    for path in reversed(places()):
        found |= read(path, kinds)
    return found


def add(settings: DeviceSettings, kinds: Mapping[str, object]) -> Path:
    """Write a device into the project's file if there is one, else into the user's; returns which.

    Raises:
        UserError: the name is taken, or nothing could be written.
    """
    here, of_user = places()
    path = here if here.exists() else of_user
    kept = read(path, kinds)
    values = settings.model_dump(exclude={"name"}, exclude_defaults=True) | {"kind": settings.kind}
    described(settings.name, values, "devices add", kinds)
    if settings.name in kept:
        raise UserError(f"{path} has a '{settings.name}' already: remove it first, or choose another name")
    _write(path, {**kept, settings.name: settings})
    return path


def remove(name: str, kinds: Mapping[str, object]) -> Path:
    """Take a device out of the nearest file that has it; returns which. Raises UserError."""
    for path in places():
        kept = read(path, kinds)
        if name in kept:
            _write(path, {its: settings for its, settings in kept.items() if its != name})
            return path
    raise choice("device", name, set(known(kinds)) - set(BUILT_IN))


def _write(path: Path, devices: Mapping[str, DeviceSettings]) -> None:
    import yaml

    values = {
        name: {"kind": settings.kind} | settings.model_dump(exclude={"name", "kind"}, exclude_defaults=True)
        for name, settings in devices.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = path.with_name(path.name + ".new")
    ready.write_text(yaml.safe_dump(values, sort_keys=False))
    ready.replace(path)
