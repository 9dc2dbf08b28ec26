"""What `persona doctor` looks at: versions, files, disks. Gathered without importing a framework; the checks, which are
pure functions of these facts, are in checks.py."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from persona.environments.places import data_folder, packages_in
from persona.environments.remote import clean_environment
from persona.environments.state import Found

PROBED = ("torchvision", "torch_npu")
"""Installed packages that break others when they cannot be imported, and are therefore tried, in another process."""


@dataclass(frozen=True)
class Facts:
    """One environment. `where` is "here" or a backend's name; `packages` normalised names with versions; `wants` what
    some of them require, as their metadata says; `cuda` the CUDA version a package was built for ("" for none), by
    package; `imports` what importing a probed package said, "" when it worked."""

    where: str = "here"
    python: str = "3.11"
    packages: Mapping[str, str] = field(default_factory=dict)
    wants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cuda: Mapping[str, str] = field(default_factory=dict)
    imports: Mapping[str, str] = field(default_factory=dict)

    def version(self, package: str) -> tuple[int, ...] | None:
        """The numbers of a package's version; None when it is not there."""
        found = self.packages.get(package)
        return None if found is None else numbers(found)


@dataclass(frozen=True)
class Machine:
    """What is the same for all environments: folders by what they are for with why they cannot be written ("" when they
    can) and their free bytes, the Ascend toolkit, an NVIDIA driver, environments, broken plugins (name, reason)."""

    folders: Mapping[str, tuple[str, str, int]] = field(default_factory=dict)  # purpose: path, complaint, free bytes
    ascend: str = ""
    nvidia: bool = False
    environments: Mapping[str, Found] = field(default_factory=dict)
    plugins: tuple[tuple[str, str], ...] = ()


def numbers(version: str) -> tuple[int, ...]:
    """`4.46.3.post1+cpu` as (4, 46, 3)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def normalised(name: str) -> str:
    """A package's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def facts_of(where: str, python: Path, places: Iterable[str], *, probe: Iterable[str] = PROBED) -> Facts:
    """The facts of the environment whose packages lie in `places`."""
    places = list(places)
    packages: dict[str, str] = {}
    wants: dict[str, tuple[str, ...]] = {}
    for found in importlib.metadata.distributions(path=places):
        name = normalised(found.metadata["Name"] or "")
        if name in packages:
            continue  # the first on the path is the one that is imported
        packages[name] = found.version
        if name in ("torchvision", "torch-npu"):
            wants[name] = tuple(found.requires or ())
    imports = {name: why_not_imported(python, name) for name in probe if normalised(name) in packages}
    cuda = {name: tag for name in ("torch", "torchvision") if (tag := cuda_of(name, places)) is not None}
    return Facts(where, _python_version(where, python), packages, wants, cuda, imports)


def cuda_of(package: str, places: Iterable[str]) -> str | None:
    """The CUDA that torch or torchvision was built for, as its version.py says; None when it does not."""
    for place in places:
        try:
            text = Path(place, package, "version.py").read_text(encoding="utf-8")
        except OSError:
            continue
        found = re.search(r"^cuda(?:: Optional\[str\])? = (?:'([\d.]+)'|None)", text, re.MULTILINE)
        return None if found is None else found[1] or ""
    return None


def why_not_imported(python: Path, module: str, seconds: float = 60) -> str:
    """What importing says in a process of its own, "" when it works."""
    code = f"import {module}"
    try:
        done = subprocess.run(
            [str(python), "-c", code], capture_output=True, text=True, timeout=seconds, env=clean_environment()
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {seconds:.0f} s"
    except OSError as error:
        return str(error)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return "" if done.returncode == 0 else (lines[-1][:300] if lines else f"exit code {done.returncode}")


def facts_here() -> Facts:
    """Of the environment this persona runs in."""
    return facts_of("here", Path(sys.executable), sys.path)


def facts_there(name: str, found: Found) -> Facts | None:
    """Of a framework's own environment; None when there is nothing to look at."""
    packages = packages_in(found.python.parent.parent)
    return None if packages is None else facts_of(name, found.python, [str(packages)])


def machine(
    environments: Mapping[str, Found], plugins: Iterable[tuple[str, str]], folders: Mapping[str, Path]
) -> Machine:
    """The facts that are no environment's own."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or ""
    nvidia = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    told = {"environments": data_folder(), **folders}
    looked = {purpose: (str(path), why_not_writable(path), free_bytes(path)) for purpose, path in told.items()}
    return Machine(looked, home if home and Path(home).is_dir() else "", nvidia, dict(environments), tuple(plugins))


def why_not_writable(folder: Path) -> str:
    """Why nothing can be written there (or where it would be made), "" when it can."""
    place = _existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} may not be written to"


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where a folder is, or would be made."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _python_version(where: str, python: Path) -> str:
    if where == "here":
        return ".".join(str(number) for number in sys.version_info[:3])
    try:
        text = (python.parent.parent / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^version(?:_info)?\s*=\s*([\d.]+)", text, re.MULTILINE)
    return found[1] if found else ""
