"""Command-line options made from a configuration: one field, one name, everywhere.

``train.epochs`` in YAML is ``--train.epochs`` here; help and default come from the field itself.
"""

from __future__ import annotations

import functools
import inspect
import json
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from .core.config import nested, parse_yaml, validated

F = TypeVar("F", bound=Callable[..., Any])


def walk(kind: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every leaf field of ``kind`` with its path; a configuration inside a configuration is walked into."""
    for name, info in kind.model_fields.items():
        inner = nested(info.annotation)
        if inner is not None:
            yield from walk(inner, (*path, name))
        else:
            yield (*path, name), info


def metavar(annotation: Any) -> str:
    """What the value of a field of this type is called in help and documents."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is Annotated:
        return metavar(arguments[0])
    if origin in (types.UnionType, Union):
        return "|".join(metavar(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"[{metavar(arguments[0])},...]"
    return getattr(annotation, "__name__", str(annotation)).upper() if origin is None else "{...}"


def choices(annotation: Any) -> list[str]:
    """The words that a field of this type takes, if it takes a few only."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    inner = get_args(annotation) if get_origin(annotation) in (Annotated, types.UnionType, Union) else ()
    return [word for each in inner for word in choices(each)]


def _parse(text: str, info: FieldInfo, option: str) -> Any:
    """The text of an option as YAML would read it, or 1,2,3 for a list; fields of plain text take it as it is."""
    if _takes_plain_text(info) and (info.annotation is str or text.lower() != "null"):
        return text
    value = parse_yaml(text, option)
    if isinstance(value, str) and "," in value and _takes_several(info.annotation):
        return [parse_yaml(each, option) for each in text.split(",")]
    return value


def _takes_several(annotation: Any) -> bool:
    """Whether a field of this type takes a list of any length."""
    if get_origin(annotation) is tuple:
        return Ellipsis in get_args(annotation)
    inner = get_args(annotation) if get_origin(annotation) in (Annotated, types.UnionType, Union) else ()
    return any(map(_takes_several, inner))


def configured(kind: type[BaseModel], leave_out: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Give a command an option for every field of ``kind`` and hand it the validated ``config``.

    Args:
        kind: the configuration; its nested configurations become panels of the help page.
        leave_out: fields that the command sets by itself: top-level ones, or dotted ones further in.
    """
    leaves = {
        "__".join(path): (path, info)
        for path, info in walk(kind)
        if path[0] not in leave_out and ".".join(path) not in leave_out
    }

    def decorate(command: F) -> F:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> Any:
            values: dict[str, Any] = {}
            for name, (path, info) in leaves.items():
                text = arguments.pop(name)
                if text is not None:
                    place = values
                    for part in path[:-1]:
                        place = place.setdefault(part, {})
                    place[path[-1]] = _parse(text, info, "--" + ".".join(path))
            return command(config=functools.partial(_complete, kind, values), **arguments)

        made = [_parameter(name, path, info) for name, (path, info) in leaves.items()]
        wrapper.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *made]}
        return wrapper  # type: ignore[return-value]

    return decorate


def options_of(config: BaseModel, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The options that make ``config`` on a command line, as few as do; ``leave_out`` are given in another way.

    A field that is left out may follow another one (what an effort means), so that it is looked at what comes out.
    """
    kind = type(config)
    own = {name: getattr(config, name) for name in leave_out}
    leaves: dict[tuple[str, ...], FieldInfo] = {path: info for path, info in walk(kind) if path[0] not in leave_out}
    wanted = {path: _value_at(config, path) for path in leaves}
    given: set[tuple[str, ...]] = {path for path, info in leaves.items() if len(path) == 1 and info.is_required()}
    while True:
        values: dict[str, Any] = dict(own)
        for path in given:
            place = values
            for part in path[:-1]:
                place = place.setdefault(part, {})
            place[path[-1]] = wanted[path]
        made = kind.model_validate(values)
        lacking = {path for path in leaves if path not in given and _value_at(made, path) != wanted[path]}
        if not lacking:
            break
        given |= lacking
    return [
        text
        for path, info in leaves.items()
        if path in given
        for text in ("--" + ".".join(path).replace("_", "-"), _text(wanted[path], info))
    ]


def _value_at(config: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        config = getattr(config, part)
    return config


def _text(value: Any, info: FieldInfo) -> str:
    """The opposite of ``_parse``."""
    if isinstance(value, str) and _takes_plain_text(info):
        return value
    return json.dumps(to_jsonable_python(value), ensure_ascii=False)


def _takes_plain_text(info: FieldInfo) -> bool:
    """Whether a text is the field's value as it stands, and no YAML."""
    return info.annotation is str or (
        get_origin(info.annotation) in (types.UnionType, Union) and str in get_args(info.annotation)
    )


def _complete(kind: type[BaseModel], values: dict[str, Any], /, **more: Any) -> Any:
    """The options with what the command adds, validated; of a section what it adds to it. Raises UserError."""
    sections = {name: {**values[name], **its} for name, its in more.items() if name in values and isinstance(its, dict)}
    return validated(kind, {**values, **more, **sections}, "options")


def _parameter(name: str, path: tuple[str, ...], info: FieldInfo) -> inspect.Parameter:
    default = None if info.default is PydanticUndefined else info.default
    words = choices(info.annotation)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if default in (None, ()):
        shown = "none"
    option = typer.Option(
        "--" + ".".join(path).replace("_", "-"),
        help=f"{info.description or ''}; " + ("required" if info.is_required() else f"default {shown}"),
        metavar=metavar(info.annotation),
        show_default=False,
        autocompletion=(lambda: words) if words else None,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
