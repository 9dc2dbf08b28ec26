"""What each method can do on each backend: asked before a run begins, and printed by `persona backends`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from persona.core.host.capabilities import CAPABILITIES, SWITCHES, needs_of, refuse, refuse_optimizer
from persona.core.host.errors import UsageError
from persona.core.host.host import Host
from persona.core.options import flag_of
from persona.core.training.base import Base
from persona.core.training.plan import TrainingPlan
from persona.core.training.settings import TrainSettings
from persona.environments.places import environment_folder
from persona.environments.smoke import capabilities_of
from persona.environments.state import find_for
from persona.runs.backends import usable

Row = tuple[str, str]
"""What is typed, and the capability it needs."""
METHOD_NEEDS = {"lora": "low_rank", "dreambooth": "weights", "textual-inversion": "new_tokens", "full": "weights"}
"""What a method trains when no switch says otherwise. Of others' methods only their plan tells."""


def refuse_unable(backend: Any, plan: TrainingPlan, base: Base, device: str) -> None:
    """Raises UsageError, naming the flag, for a plan that the backend cannot execute on that device."""
    refuse_optimizer(plan, backend.name)
    _refuse(backend, needs_of(plan, base), device)


def refuse_unable_to_sample(backend: Any, sampler: str, precision: str, device: str) -> None:
    """Raises UsageError for a sampler or a precision that the backend has not."""
    needs = {precision: f"--precision {precision}", f"sampler:{sampler}": f"--sampler {sampler}"}
    _refuse(backend, needs, device)


def _refuse(backend: Any, needs: Mapping[str, str], device: str) -> None:
    able = backend.capabilities(device)
    if not all(able.get(name, True) for name in needs):
        refuse(needs, able, backend.name, taken(backend, device))


def taken(backend: Any, device: str) -> str:
    """The device that the words of the user mean: for "auto" the one the backend takes, where it can tell."""
    if device != "auto" or not hasattr(backend, "devices"):
        return device
    try:
        return str(backend.devices(device, 1)[0])
    except UsageError:  # a backend in another environment that knows one device only
        return device


def backends_known(host: Host) -> list[dict[str, Any]]:
    """Every backend: where it is or what is missing, its size, the line to type, and its capabilities by device."""
    listed = []
    for name, descriptor in host.provided("backend").items():
        found, reason, hint = usable(host, name)
        elsewhere = find_for(name)
        told: dict[str, Any] = {"name": name, "summary": descriptor.summary, "usable": found is not None}
        if found is None:
            told |= {"reason": reason, "hint": hint}
        elif elsewhere is not None and found.__class__.__name__ == "RemoteBackend":
            told |= {"where": str(elsewhere.python), "version": found.availability().version}
        else:
            told |= {"where": "here", "version": found.availability().version}
        told |= _sizes(name, elsewhere)
        told["capabilities"] = _capabilities(found, elsewhere)
        told["optimizers"] = ["adamw", *optimizers_for(host, name)]
        listed.append(told)
    return listed


def _sizes(name: str, elsewhere: Any) -> dict[str, Any]:
    from persona.environments.frameworks import FRAMEWORKS

    if name not in FRAMEWORKS or elsewhere is None:
        return {}
    return {
        "state": elsewhere.state,
        "folder": str(environment_folder(name)),
        "bytes": int(elsewhere.told.get("bytes", 0)),
        "download_bytes": FRAMEWORKS[name].download_bytes,
        "disk_bytes": FRAMEWORKS[name].disk_bytes,
    }


def _capabilities(backend: Any, elsewhere: Any) -> dict[str, dict[str, bool]]:
    if backend is None:
        return {}
    known: dict[str, dict[str, bool]] | None = elsewhere.told.get("capabilities") if elsewhere is not None else None
    return known or capabilities_of(backend)


def optimizers_for(host: Host, backend: str) -> list[str]:
    """The optimizers of other packages that have a class for a backend."""
    return [name for name in host.provided("optimizer") if backend in host.load("optimizer", name).classes]


def rows(host: Host) -> list[Row]:
    """Method by method, what may be switched on and which capability that needs."""
    found: list[Row] = []
    for name in host.provided("method"):
        options = host.load("method", name).Options
        found.append((name, METHOD_NEEDS.get(name, "")))
        fields = {field.name: field for field in (*dataclasses.fields(options), *dataclasses.fields(TrainSettings))}
        for option, capability in SWITCHES.items():
            if option in fields and option in {field.name for field in dataclasses.fields(options)}:
                found.append((f"{name} {flag_of(fields[option])}", capability))
    shared = {field.name: field for field in dataclasses.fields(TrainSettings)}
    found += [(flag_of(shared[option]), capability) for option, capability in SWITCHES.items() if option in shared]
    found += [("--devices N", "devices"), ("--accelerate-config FILE", "sharding")]
    return [*found, *((f"--precision {name}", name) for name in ("fp32", "bf16", "fp16"))]


def table(host: Host, backends: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(columns, rows): what is typed against backend and device, with "yes", "no", or "?" where nobody has said."""
    columns = [(told["name"], device, able) for told in backends for device, able in told["capabilities"].items()]
    samplers = sorted({name for _, _, able in columns for name in able if name.startswith("sampler:")})
    asked = [*rows(host), *((f"--sampler {name.partition(':')[2]}", name) for name in samplers)]
    body = [(typed, [_word(able, need) for _, _, able in columns]) for typed, need in asked]
    named = dict.fromkeys(name for told in backends for name in told["optimizers"])
    by_name = {told["name"]: told["optimizers"] for told in backends}
    body += [(f"--optimizer {name}", ["yes" if name in by_name[b] else "no" for b, _, _ in columns]) for name in named]
    return [f"{name} {device}" for name, device, _ in columns], body


def _word(able: Mapping[str, bool], need: str) -> str:
    assert not need or need in CAPABILITIES or ":" in need, need
    return "?" if need not in able else "yes" if able[need] else "no"
