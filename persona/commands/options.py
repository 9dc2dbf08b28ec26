"""Click options made from options dataclasses (`persona.core.options.option` fields)."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import click

from persona.core.options import flag_of


def click_options(cls: type, defaults: Mapping[str, Any] | None = None) -> list[click.Option]:
    """One click option per field. Values that were not typed stay None, so that a recipe's or a method's own default
    shows through; the help text tells the default."""
    hints = typing.get_type_hints(cls)
    return [_option(field, hints[field.name], (defaults or {}).get(field.name)) for field in dataclasses.fields(cls)]


def _option(field: dataclasses.Field[Any], hint: Any, own_default: Any) -> click.Option:
    metadata, flag = field.metadata, flag_of(field)
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    multiple = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if multiple else hint
    default = own_default if own_default is not None else _default(field)
    text = metadata.get("help", "")
    if default not in (None, "", (), False, dataclasses.MISSING):
        shown = " ".join(str(item) for item in default) if isinstance(default, tuple) else default
        text += f"  [default: {shown}]"
    if kind is bool:
        off = flag.replace("--", "--no-", 1)
        return click.Option([f"{flag}/{off}", field.name], default=None, help=text)
    choices = metadata.get("choices") or ()
    return click.Option(
        [flag, field.name],
        default=None,
        multiple=multiple,
        type=None if choices else {int: click.INT, float: click.FLOAT}.get(kind, click.STRING),
        metavar=metadata.get("metavar") or ("|".join(choices) if choices else None),
        help=text,
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None


def typed_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that belong to `cls` and were typed."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in names and value is not None and value != ()}
