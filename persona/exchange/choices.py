"""Which container and which spelling a destination gets when nothing else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.host.host import Host

EMBEDDING_FORMS = {".pdparams": "ppdiffusers"}
"""The spelling of a textual inversion by extension; diffusers' for every other."""
ADAPTER_DIALECTS = {".pdparams": "ppdiffusers", ".ckpt": "mindone"}
"""The spelling of low-rank deltas by extension; diffusers' for every other."""


def container_for(path: Path, host: Host) -> Any:
    """The container that writes files of this extension. Raises UsageError naming those that exist."""
    suffix = path.suffix.lower()
    for name, descriptor in host.provided("container").items():
        if suffix in descriptor.suffixes:
            return host.load("container", name)()
    known = [suffix for found in host.provided("container").values() for suffix in found.suffixes]
    raise UsageError(
        f"Nothing is written as {suffix or 'a file without an ending'} ({path.name}). {did_you_mean(suffix, known)}",
        hint="Give the destination a known ending, for example .safetensors",
    )


def containers(host: Host) -> list[Any]:
    """Every container that is plugged in, in the order they are asked."""
    return [host.load("container", name)() for name in host.provided("container")]
