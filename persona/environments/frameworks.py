"""The frameworks that get an environment of their own: what is in it, on which Python, how large it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from persona.core.host.errors import UsageError, did_you_mean

PINS = Path(__file__).with_name("pins")


@dataclass(frozen=True)
class Framework:
    """One of them. `packages` are those that decide what is computed, with the versions persona was tested with;
    `pythons` the Python versions that all pins have wheels for, best first. Sizes were measured on Linux x86-64."""

    name: str
    title: str
    packages: Mapping[str, str]
    pythons: tuple[str, ...]
    download_bytes: int
    disk_bytes: int

    @property
    def pins(self) -> Path:
        """Every package of the environment with its version; also what `pip install --no-deps -r` takes."""
        return PINS / f"{self.name}.txt"

    @property
    def digest(self) -> str:
        """Of the pins: an environment that was built with others is of another version of persona."""
        return hashlib.sha256("\n".join(f"{k}=={v}" for k, v in sorted(self.pinned().items())).encode()).hexdigest()

    def pinned(self) -> dict[str, str]:
        """Package -> version of all pins."""
        lines = self.pins.read_text(encoding="utf-8").splitlines()
        pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
        return {name.strip(): version.strip() for name, _, version in pairs}


FRAMEWORKS: dict[str, Framework] = {
    framework.name: framework
    for framework in (
        Framework(
            "paddle",
            "PaddlePaddle with ppdiffusers",
            {"paddlepaddle": "3.3.1", "ppdiffusers": "0.29.0", "paddlenlp": "2.8.1"},
            ("3.11", "3.12", "3.13"),
            download_bytes=383_000_000,
            disk_bytes=1_398_000_000,
        ),
        Framework(
            "mindspore",
            "MindSpore with mindone",
            {"mindspore": "2.7.0", "mindone": "0.3.0"},
            ("3.11",),
            download_bytes=907_000_000,
            disk_bytes=2_963_000_000,
        ),
    )
}


def untested(name: str, versions: Mapping[str, str]) -> str:
    """What to tell the user when a backend's packages are of other versions than persona was tested with, "" when they
    are those: a patch of the framework itself is taken as the same, of the model libraries nothing is."""
    if name not in FRAMEWORKS:
        return ""
    other = []
    for number, (package, tested) in enumerate(FRAMEWORKS[name].packages.items()):
        found = versions.get(package) or versions.get(f"{package}-gpu", "")
        alike = found.split(".")[:2] == tested.split(".")[:2] if number == 0 else found.partition("+")[0] == tested
        if found and not alike:
            other.append(f"{package} {found} (tested: {tested})")
    if not other:
        return ""
    return f"not tested with {' and '.join(other)}; an environment that is: persona backends setup {name}"


def framework_called(name: str) -> Framework:
    """Raises UsageError for a name that is none of them."""
    if name not in FRAMEWORKS:
        own = name == "torch"
        note = "Torch lives in persona's own environment." if own else did_you_mean(name, FRAMEWORKS)
        hint = 'pip install "persona[torch]"' if own else f"persona backends setup {' | '.join(FRAMEWORKS)}"
        raise UsageError(f"There is no environment of {name} to set up. {note}", hint=hint)
    return FRAMEWORKS[name]
