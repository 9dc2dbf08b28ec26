"""Options as data: a dataclass field carries its help, its flag and its bounds; the command line, the recipe reader
and the documentation are made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    factory: Callable[[], Any] | None = None,
    flag: str = "",
    metavar: str = "",
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> Any:
    """A dataclass field that is also a command-line option.

    `flag` is the spelling on the command line when it is not the field's name with hyphens; `choices` the words that
    are allowed; `minimum`/`maximum` inclusive bounds; `unit` is shown behind the help ("pixels", "steps").
    """
    metadata: Mapping[str, Any] = {
        "help": help, "flag": flag, "metavar": metavar, "choices": choices,
        "minimum": minimum, "maximum": maximum, "unit": unit,
    }  # fmt: skip
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The long flag of a field: `--prior-weight` for `prior_weight`, unless the field names its own."""
    return field.metadata.get("flag") or "--" + field.name.replace("_", "-")
