"""From words on a line, a recipe file and defaults to one complete Recipe. What is typed wins over the recipe, the
recipe over the method's defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.core.host.errors import UsageError
from persona.core.host.host import Host
from persona.core.training.run import RunFolder
from persona.core.training.settings import TrainSettings
from persona.hub.registry import packaged, registry
from persona.runs.accelerate_file import Told, read_accelerate
from persona.runs.recipe import (
    HEAD,
    Recipe,
    build_options,
    check_keys,
    device_count,
    known_keys,
    method_defaults,
    parse_assignments,
    read_recipe,
)


@dataclass(frozen=True)
class Wanted:
    """What is to be done: a recipe, perhaps in a run that is there already, and what the user should be told."""

    recipe: Recipe
    run: RunFolder | None = None
    notes: tuple[str, ...] = ()


def assemble(host: Host, words: Sequence[str], typed: Mapping[str, Any], *, default_recipe: Path | None) -> Wanted:
    """Put the parts together. `words` are RECIPE.yaml and key=value; `typed` the options by field name.

    Raises UsageError for unknown keys, values out of range, and when nothing says which method."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    run = None
    words = list(words)
    file = None
    if typed.get("resume_path"):
        run = RunFolder(Path(typed["resume_path"]))
        run.check()
        file = run.recipe
        _check_same_run(run, typed)
    elif words and "=" not in words[0]:
        file = Path(words.pop(0))
    elif default_recipe is not None and default_recipe.is_file():
        its = read_recipe(default_recipe).get("method", (None, 0))[0]
        if its is None or typed.get("method", its) == its:
            file = default_recipe
            notes.append(f"using {default_recipe} of this folder")
        else:
            notes.append(f"{default_recipe} of this folder is for {its}, not {typed['method']}: it is not used")
    assigned = parse_assignments(words)
    found = read_recipe(file) if file else {}
    values |= {key: value for key, (value, _) in found.items()}
    values |= assigned
    values |= {key: value for key, value in typed.items() if key not in ("resume_path", "allow_change", "dry_run")}
    method = values.get("method")
    if not method:
        raise UsageError(
            f"No method is named. There are: {', '.join(host.provided('method'))}.",
            hint="For example: persona train --plugin dreambooth",
        )
    options_class = host.load("method", str(method)).Options
    places = {key: f"{file} line {line}" for key, (_, line) in found.items()}
    places |= {key: f"{key}={assigned[key]}" for key in assigned}
    places |= {key: key for key in typed if key not in ("resume_path", "allow_change", "dry_run")}
    check_keys(places, known_keys(options_class))
    places = {key: place for key, place in places.items() if key not in typed}
    from_file = {key for key in found if key not in assigned and key not in typed}
    if str(values.get("accelerate_config")).lower() == "none":
        values.pop("accelerate_config", None)
    values = with_whole_paths(values, options_class, from_file, file.parent if file else Path())
    if not values.get("data"):
        values, note = with_example(values, options_class)
        notes.append(note)
    now = {**assigned, **{key: value for key, value in typed.items() if value is not None}}
    values = with_one_length(values, now)
    values, told = with_accelerate(values, now)
    defaults = base_defaults(str(values.get("base", "mini")), str(method))
    values = defaults | optimizer_defaults(host, values.get("optimizer")) | values
    settings = build_options(TrainSettings, method_defaults(options_class) | values, places)
    if told is not None:
        told.refuse_other(settings.precision, settings.gradient_checkpointing)
        notes += told.notes
    recipe = Recipe(
        method=str(method),
        data=str(values["data"]),
        options=build_options(options_class, values, places),
        settings=settings,
        devices=device_count(values.get("devices", 1)),
        sharding=told.sharding if told is not None else None,
        **{key: values[key] for key in HEAD if key not in ("method", "data", "devices") and values.get(key)},
    )
    return Wanted(recipe, run, tuple(notes))


def with_one_length(values: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The values with steps or epochs, whichever was said last: a run of epochs can be trained further by steps.

    Raises UsageError when both were said `now`."""
    if now.get("steps") is not None and now.get("epochs") is not None:
        raise UsageError("--steps and --epochs both say how long to train.", hint="Give one of them")
    return {**values, "epochs": None} if "steps" in now else dict(values)


def with_accelerate(values: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], Told | None]:
    """The values with processes and device of accelerate's file, and what else it says; None without such a file.

    Raises UsageError when --devices or --device says something else. What was said of devices before is forgotten when
    the file is named `now`."""
    if not values.get("accelerate_config"):
        return dict(values), None
    told = read_accelerate(Path(values["accelerate_config"]))
    forgotten = "accelerate_config" in now and "devices" not in now
    count = told.devices if forgotten else device_count(values.get("devices", told.devices))
    if count != told.devices:
        raise UsageError(
            f"--devices {count}, and {told.path} has num_processes {told.devices}.",
            hint="Leave --devices out, or the file: --accelerate-config none",
        )
    device = told.device(str(values.get("device") or "auto"))
    return {**values, "devices": told.devices, "device": device}, told


def optimizer_defaults(host: Host, name: Any) -> dict[str, Any]:
    """The learning rate that another optimizer than AdamW wants, when it has one of its own."""
    if name not in host.provided("optimizer"):
        return {}
    rate = getattr(host.load("optimizer", str(name)), "learning_rate", None)
    return {} if rate is None else {"learning_rate": rate}


def _check_same_run(run: RunFolder, typed: Mapping[str, Any]) -> None:
    """Raises UsageError for what makes another run of it: another method, another place."""
    its = read_recipe(run.recipe).get("method", ("", 0))[0]
    if typed.get("method", its) != its:
        raise UsageError(
            f"{run.path} is a run of {its}, not of {typed['method']}.",
            hint=f"Leave --plugin out: persona train --resume {run.path}",
        )
    if typed.get("output"):
        raise UsageError(
            f"--resume goes on in {run.path} itself; --output has no place beside it.",
            hint=f"Leave it out, or copy the run first: cp -r {run.path} {typed['output']}",
        )


def with_whole_paths(
    values: Mapping[str, Any], options_class: type, from_file: Collection[str], folder: Path
) -> dict[str, Any]:
    """The values with absolute paths, so that a run can be gone on with from anywhere. Relative ones in a recipe start
    where the recipe is (`folder`), so that it can be shared with its pictures; typed ones in the current folder."""
    made = dict(values)
    fields = (*dataclasses.fields(options_class), *dataclasses.fields(TrainSettings))
    keys = {field.name for field in fields if field.metadata.get("metavar") == "DIR"}
    for key in {"data", "base", "accelerate_config", *keys} & made.keys():
        if not isinstance(made[key], str | Path):
            continue
        path = ((folder if key in from_file else Path()) / Path(made[key]).expanduser()).absolute()
        if key != "base" or (made[key] not in registry()["bases"] and path.is_dir()):
            made[key] = str(path)
    return made


def base_defaults(base: str, method: str) -> dict[str, Any]:
    """The settings that registry.yaml recommends for a method on a base; none for a base it does not know."""
    found: dict[str, Any] = registry()["bases"].get(base, {}).get("defaults", {}).get(method, {})
    return dict(found)


def own_words(options_class: type) -> str:
    """What one's own pictures need beside their folder, as it is typed."""
    fields = {field.name for field in dataclasses.fields(options_class)}
    if "class_word" in fields:
        return " --class WORD"
    if "placeholder" in fields:
        return " --placeholder '<my-word>' --initializer WORD"
    return ' --prompt "a photo of …"' if "prompt" in fields else ""


def with_example(values: Mapping[str, Any], options_class: type) -> tuple[dict[str, Any], str]:
    """The values with the shipped example subject filled in, and the line that says so."""
    import yaml

    name, entry = next(iter(registry()["subjects"].items()))
    folder = packaged(entry["folder"])
    recipe = (
        yaml.safe_load((packaged("assets/recipes") / f"{values['method']}-example.yaml").read_text("utf-8"))
        if (packaged("assets/recipes") / f"{values['method']}-example.yaml").is_file()
        else {}
    )
    fields = set(known_keys(options_class))
    # A plugin's method has no recipe here; what the subject is called it can be told all the same.
    subject = {"token": entry["token"], "class_word": entry["class"]}
    filled = {key: value for key, value in (subject | recipe).items() if key in fields} | dict(values)
    filled["data"] = str(folder)
    note = (
        f"no pictures were named: training the shipped example subject ({name}) on {filled.get('base', 'mini')}.\n"
        f"For your own: persona train --plugin {values['method']} --data FOLDER{own_words(options_class)}"
    )
    return filled, note
