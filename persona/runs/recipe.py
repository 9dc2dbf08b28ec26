"""Recipes: a flat YAML mapping of what could also be typed. Keys are the options' names; an unknown one is an error
with its line and the nearest known key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.core.host.contracts import Sharding
from persona.core.host.errors import UsageError, closest
from persona.core.options import flag_of
from persona.core.training.settings import TrainSettings

HEAD = ("method", "backend", "base", "data", "output", "device", "devices", "accelerate_config")
"""Keys of a recipe that are not options of the method or of training."""


@dataclass(frozen=True)
class Recipe:
    """What was asked for, complete: `options` are the method's, `settings` the shared ones. `data` is a folder."""

    method: str
    data: str
    options: Any
    settings: TrainSettings
    base: str = "mini"
    backend: str | None = None
    device: str = "auto"
    devices: int = 1
    output: str | None = None
    accelerate_config: str | None = None
    sharding: Sharding | None = None  # what that file says


def read_recipe(path: Path) -> dict[str, tuple[Any, int]]:
    """Key -> (value, line) of a recipe file. Raises UsageError when it is not a flat YAML mapping."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise UsageError(f"There is no recipe {path}.", hint="Name a YAML file, or use --plugin METHOD") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: a recipe is a list of 'key: value' lines.", hint="For example: method: dreambooth")
    found: dict[str, tuple[Any, int]] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in found:
            raise UsageError(f"{path} line {line}: {key} is given twice (first in line {found[key][1]}).")
        found[key] = (values[key], line)
    return found


def parse_assignments(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words behind a recipe, values read as YAML."""
    import yaml

    found = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign:
            raise UsageError(f"{word!r} is not of the form key=value.", hint="For example: steps=500")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"The value of {key} cannot be read: {value!r}") from error
    return found


def check_keys(found: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises UsageError for a key that nothing knows. `found` maps keys to where they stand: "my.yaml line 3"."""
    for key, place in found.items():
        if key not in known:
            near = closest(key, known, count=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(sorted(known))}"
            raise UsageError(f"{place}: unknown key {key}.", hint=hint)


def build_options(cls: type, values: Mapping[str, Any], places: Mapping[str, str] | None = None) -> Any:
    """An options dataclass from plain values, each checked against its field's type, choices and bounds. `places` says
    of keys where they stand ("my.yaml line 3"), for the errors."""
    hints = typing.get_type_hints(cls)
    checked = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        try:
            checked[field.name] = checked_value(field, hints[field.name], values[field.name])
        except UsageError as error:
            place = (places or {}).get(field.name)
            raise UsageError(f"{place}: {error.message}" if place else error.message, hint=error.hint) from error
    return cls(**checked)


def checked_value(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the field's type. Raises UsageError naming the flag, the value and what is allowed."""
    flag = flag_of(field)
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    if optional:
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_of_type(flag, typing.get_args(hint)[0], item) for item in items)
    value = _of_type(flag, hint, value)
    allowed = field.metadata.get("choices") or ()
    if allowed and value not in allowed:
        near = closest(str(value), allowed, count=1)
        raise UsageError(
            f"{flag} {value} is not known. It is one of: {', '.join(allowed)}.",
            hint=f"Did you mean {flag} {near[0]}?" if near else f"For example: {flag} {allowed[0]}",
        )
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if low is not None and value < low:
        raise UsageError(f"{flag} {value} is too small.", hint=f"Give at least {flag} {low:g}")
    if high is not None and value > high:
        raise UsageError(f"{flag} {value} is too large.", hint=f"Give at most {flag} {high:g}")
    return value


def _of_type(flag: str, kind: Any, value: Any) -> Any:
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if kind in (int, float):
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
            if number != number or number in (float("inf"), float("-inf")):
                raise ValueError
            if kind is int:
                if number != int(number):
                    raise ValueError
                return int(number)
            return number
        if kind is str:
            if isinstance(value, dict | list):
                raise ValueError
            return str(value)
    except (TypeError, ValueError) as error:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
        example = {bool: f"{flag} or --no-{flag[2:]}", int: f"{flag} 10", float: f"{flag} 0.5", str: f"{flag} word"}[
            kind
        ]
        raise UsageError(f"{flag} {value!r} is not {words}.", hint=f"For example: {example}") from error
    return value


def device_count(value: Any) -> int:
    """`devices` of a recipe or a line. Raises UsageError for anything but a whole number from 1 on."""
    count: int = _of_type("--devices", int, value)
    if count < 1:
        raise UsageError(f"--devices {count} is too small.", hint="Give at least --devices 1")
    return count


def known_keys(options: type) -> list[str]:
    """Every key a recipe of that method may have."""
    fields = (*dataclasses.fields(options), *dataclasses.fields(TrainSettings))
    return [*HEAD, *(field.name for field in fields)]


def method_defaults(options: type) -> dict[str, Any]:
    """Shared settings for which the method has its own default: its Options' attribute `setting_defaults`."""
    return dict(getattr(options, "setting_defaults", {}))


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML that `persona train` reads back to the same run."""
    import yaml

    head = {key: getattr(recipe, key) for key in HEAD if key != "output"}
    body = dataclasses.asdict(recipe.options) | dataclasses.asdict(recipe.settings)
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in (head | body).items()}
    return yaml.safe_dump(plain, allow_unicode=True, sort_keys=False)
