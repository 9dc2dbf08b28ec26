"""Which container and which spelling a destination gets when nothing else is said. docs/formats.md has the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter
from persona.core.host.errors import UsageError, did_you_mean
from persona.core.host.host import Host

ADAPTER_DIALECTS = {".pdparams": "ppdiffusers", ".ckpt": "mindone"}
"""The spelling of low-rank deltas by extension; diffusers' for every other."""
ADAPTER_CONTAINERS: dict[str, tuple[str, ...]] = {".ckpt": ("mindspore", "torch")}
"""Extensions that two containers write: the first that the spelling's readers open, in this order."""
EMBEDDING_FORMS = {".pdparams": "ppdiffusers"}
"""The spelling of a textual inversion by extension; diffusers' for every other."""
EMBEDDING_NAMES: dict[tuple[str, str], str] = {
    ("kohya", ".safetensors"): "bundle",
    ("a1111", ".safetensors"): "kohya",
    ("comfy", ".safetensors"): "kohya",
    ("sd-scripts", ".safetensors"): "kohya",
    ("mindone", ".ckpt"): "diffusers",
    ("mindone", ".safetensors"): "diffusers",
}
"""What people say, and the extension -> the form of embeddings that is meant: `--to kohya` bundles them as a LoRA file
does (`bundle_emb.…`), `--to a1111` writes the safetensors form that A1111, ComfyUI and sd-scripts open."""
ALIASES = {
    "a1111": "kohya",
    "automatic1111": "kohya",
    "forge": "kohya",
    "sd-scripts": "kohya",
    "comfyui": "comfy",
    "diffusers-peft": "diffusers",
    "paddle": "ppdiffusers",
    "mindspore": "mindone",
    "wukong": "mindpet",
}
"""Other names of dialects, taken when no dialect is called so."""


def dialect_called(name: str, host: Host) -> str:
    """The dialect's own name for what the user typed. Raises UsageError naming those that exist."""
    known = host.provided("dialect")
    if name in known:
        return name
    if ALIASES.get(name) in known:
        return ALIASES[name]
    containers_too = host.provided("container")
    if name in containers_too:
        endings = " ".join(containers_too[name].suffixes)
        raise UsageError(
            f"{name} is a file format, not a dialect.", hint=f"Name the output {endings}; --to is one of {_list(known)}"
        )
    raise UsageError(f"There is no dialect called {name}. {did_you_mean(name, known)}", hint=f"--to {_list(known)}")


def _list(known: dict[str, Any]) -> str:
    return " | ".join(known)


def default_dialect(suffix: str, host: Host) -> str:
    """The dialect of an extension when the user named none."""
    wanted = ADAPTER_DIALECTS.get(suffix, "diffusers")
    return wanted if wanted in host.provided("dialect") else "diffusers"


def same_dialect(adapter: Adapter, path: Path, host: Host) -> str | None:
    """The dialect an adapter was read in, when it is one that is written to files like `path`; else None."""
    name = adapter.source.dialect if adapter.source else ""
    if not adapter.entries or name not in host.provided("dialect"):
        return None
    dialect = host.load("dialect", name)
    if dialect.slots.folder or getattr(dialect, "names", True) is None:
        return None
    fitting = [one for one in dialect.slots.containers if path.suffix.lower() in _suffixes(one, host)]
    return name if fitting and dialect.slots.algorithms & {"lora"} else None


def _suffixes(container: str, host: Host) -> tuple[str, ...]:
    found = host.provided("container").get(container)
    return tuple(found.suffixes) if found else ()


def container_for(path: Path, host: Host, preferred: Sequence[str] = ()) -> Any:
    """The container that writes files of this extension; of several, the first of `preferred` (names).
    Raises UsageError naming the extensions that exist."""
    suffix = path.suffix.lower()
    described = host.provided("container")
    fitting = [name for name, descriptor in described.items() if suffix in descriptor.suffixes]
    if not fitting:
        known = [ending for found in described.values() for ending in found.suffixes]
        raise UsageError(
            f"Nothing is written as {suffix or 'a file without an ending'} ({path.name}). "
            f"{did_you_mean(suffix, known)}",
            hint=f"Give the output a known ending, for example {path.stem or 'adapter'}.safetensors",
        )
    order = [name for name in (*preferred, *ADAPTER_CONTAINERS.get(suffix, ())) if name in fitting]
    return host.load("container", (order or fitting)[0])()


def suffix_for(dialect: Any, host: Host) -> str:
    """The file ending a dialect's files usually have: that of the container its readers open first."""
    first = next((name for name in dialect.slots.containers if name in host.provided("container")), "safetensors")
    suffixes: tuple[str, ...] = host.provided("container")[first].suffixes
    if first == "mindspore":
        return ".ckpt"
    return suffixes[0] if suffixes else ".safetensors"


def containers(host: Host) -> Iterator[Any]:
    """Every container that is plugged in, in the order they are asked; each is imported when it is its turn."""
    return (host.load("container", name)() for name in host.provided("container"))
