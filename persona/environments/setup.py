"""Building the environment of a framework: a Python, the pinned packages, a picture made as proof, then the mark that
it is ready. A build that was cut short is thrown away and begun anew; what was downloaded lies in the installer's
cache."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from persona import __version__
from persona.core.host.errors import BackendMissing, OutputExists, PersonaError, UnwritableOutput
from persona.core.training.run import clear_disk_errors, write_atomically
from persona.environments.frameworks import Framework
from persona.environments.places import data_folder, environment_folder, own_python, python_in, variable_of
from persona.environments.remote import clean_environment
from persona.environments.smoke import smoke_run
from persona.environments.state import READY, find, read_ready, source_digest

Tell = Callable[[str], None]
LOG = "setup.log"
BUILDING = "building"
"""A file that says: this folder is a build of persona's, and may be thrown away."""
_ELSEWHERE = "PERSONA_DATA=/another/folder persona backends setup"
_NO_NETWORK = re.compile(
    r"dns error|name resolution|Name or service not known|nodename nor servname|Connection refused|unreachable|"
    r"error sending request|Failed to fetch|Max retries exceeded|Could not connect|timed out|ProxyError|"
    r"from versions: none|tcp connect error",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded", re.IGNORECASE)


def set_up(framework: Framework, tell: Tell) -> dict[str, Any]:
    """Build what is not there yet; what the environment says of itself. `tell` is given lines for the user.

    Raises UnwritableOutput when the disk is too small, BackendMissing for no fitting Python, no network, and an
    environment that does not pass its smoke run."""
    name, folder = framework.name, environment_folder(framework.name)
    if own_python(name) is not None:
        raise BackendMissing(
            f"{variable_of(name)} names a Python of your own ({own_python(name)}), so there is nothing to set up.",
            hint=f"To have persona build one: unset {variable_of(name)}",
        )
    with sole_builder(framework):
        found = find(framework)
        if found.state == "ready":
            tell(f"{name} is set up already: {folder}")
            return found.told
        tell(
            f"{framework.title}: downloads {size(framework.download_bytes)}, takes {size(framework.disk_bytes)} on disk"
        )
        tell(f"in {folder}")
        refuse_without_room(framework)
        if folder.exists():
            tell(f"what is there is {found.state}: beginning anew, with what was downloaded")
            throw_away(folder)
        begun = time.monotonic()
        make_environment(framework, folder, tell)
        built = time.monotonic()
        tell("trying it: one picture from the embedded base")
        told = smoke_run(framework, python_in(folder), folder / LOG)
        told |= {
            "pins": framework.digest,
            "persona": __version__,
            "source": source_digest(name),
            "bytes": bytes_in(folder),
            "seconds": {"install": round(built - begun, 1), "smoke_run": round(time.monotonic() - built, 1)},
        }
        write_atomically(folder / READY, json.dumps(told, indent=1).encode(), elsewhere=f"{_ELSEWHERE} {name}")
        (folder / BUILDING).unlink(missing_ok=True)
        return told


def remove(framework: Framework) -> int:
    """Take an environment away, whole or half built; the bytes that are free again. Raises OutputExists for a folder
    that persona has not made, BackendMissing when there is none."""
    folder = environment_folder(framework.name)
    if not folder.is_dir():
        raise BackendMissing(
            f"{framework.name} is not set up: there is no {folder}.", hint="What there is: persona backends"
        )
    with sole_builder(framework):
        freed = bytes_in(folder)
        throw_away(folder)
    return freed


def throw_away(folder: Path) -> None:
    """Remove a build, its mark first, so that what a kill leaves is half built. Raises OutputExists for a folder that
    is no build."""
    if any(folder.iterdir()) and read_ready(folder) is None and not (folder / BUILDING).is_file():
        raise OutputExists(
            f"{folder} is there, and persona has not made it.", hint=f"Take it away yourself, if it can go: {folder}"
        )
    with clear_disk_errors(folder):
        (folder / BUILDING).touch()
        (folder / READY).unlink(missing_ok=True)
        shutil.rmtree(folder)


def make_environment(framework: Framework, folder: Path, tell: Tell) -> None:
    """A virtual environment with the pinned packages, by uv where that is found, else by venv and pip."""
    with clear_disk_errors(folder, elsewhere=f"{_ELSEWHERE} {framework.name}"):
        folder.mkdir(parents=True)
        (folder / BUILDING).write_text("made by persona backends setup; without ready.json beside it, half built\n")
    uv, log, python = find_uv(), folder / LOG, python_in(folder)
    if uv is not None:
        wanted = sys.executable if _fits(framework) else framework.pythons[0]
        run([uv, "venv", "--allow-existing", "--python", wanted, str(folder)], framework, log, tell)
        install = [uv, "pip", "install", "--python", str(python)]
    else:
        run([find_python(framework), "-m", "venv", str(folder)], framework, log, tell)
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    run([*install, "--no-deps", "-r", str(framework.pins)], framework, log, tell)


def find_uv() -> str | None:
    """uv on the path, or the one beside this Python."""
    found = shutil.which("uv")
    if found is None and importlib.util.find_spec("uv") is not None:
        beside = Path(sys.executable).with_name("uv.exe" if sys.platform == "win32" else "uv")
        found = str(beside) if beside.is_file() else None
    return found


def find_python(framework: Framework) -> str:
    """A Python that the pins have wheels for: this one, else one on the path. Raises BackendMissing."""
    if _fits(framework):
        return sys.executable
    for version in framework.pythons:
        found = shutil.which(f"python{version}")
        if found and _answers(found):
            return found
    here = ".".join(str(number) for number in sys.version_info[:2])
    raise BackendMissing(
        f"{framework.title} needs Python {' or '.join(framework.pythons)}; this is {here}, and no other was found.",
        hint=f"uv brings one by itself: pip install uv, then persona backends setup {framework.name}",
    )


def _fits(framework: Framework) -> bool:
    return ".".join(str(number) for number in sys.version_info[:2]) in framework.pythons


def _answers(python: str) -> bool:
    """Whether it runs: a version manager's stand-in may be on the path for a Python that is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True, timeout=60).returncode == 0
    return False


def run(words: Sequence[str], framework: Framework, log: Path, tell: Tell) -> None:
    """Run an installer, its lines into the log and, those that tell how far it is, to the user. Raises BackendMissing
    or UnwritableOutput when it fails, by what it said."""
    said: list[str] = []
    with log.open("a", encoding="utf-8") as kept:
        print("$", *words, file=kept, flush=True)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=clean_environment() | {"NO_COLOR": "1"},
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            said.append(line.rstrip())
            if re.match(r"\s*(Downloading|Building|Prepared|Installed|Installing collected|Successfully)\b", line):
                tell(line.strip()[:100])
    if process.wait() != 0:
        raise failure(framework, "\n".join(said[-200:]), log)


def failure(framework: Framework, said: str, log: Path) -> PersonaError:
    """Why an installer gave up, by what it said."""
    again = f"persona backends setup {framework.name}"
    if _DISK_FULL.search(said):
        return UnwritableOutput(
            f"The disk is full: {log.parent} could not be filled.",
            hint=f"Make room, or take another disk ({_ELSEWHERE} {framework.name}), then: {again}",
        )
    if _NO_NETWORK.search(said):
        line = next(line.strip() for line in said.splitlines() if _NO_NETWORK.search(line))
        return BackendMissing(
            f"The package index cannot be reached: {line[:200]}",
            hint=f"Once there is a network (or a mirror: UV_INDEX_URL, PIP_INDEX_URL), go on with: {again}",
        )
    last = "\n    ".join(line[:300] for line in said.splitlines()[-6:])
    return BackendMissing(f"The installer failed:\n    {last}", hint=f"All it said is in {log}. Try again: {again}")


def refuse_without_room(framework: Framework) -> None:
    """Raises UnwritableOutput when the disk cannot take packages and their download."""
    place = environment_folder(framework.name)
    while not place.is_dir():
        place = place.parent
    needed, free = framework.disk_bytes + framework.download_bytes, shutil.disk_usage(place).free
    if free < needed:
        raise UnwritableOutput(
            f"{framework.title} needs {size(needed)} with its download, and {place} has {size(free)} free.",
            hint=f"Make room, or take another disk: {_ELSEWHERE} {framework.name}",
        )


@contextlib.contextmanager
def sole_builder(framework: Framework) -> Iterator[None]:
    """Keep a second process from building or removing the same environment. Raises BackendMissing when one does."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    place = data_folder() / "environments"
    with clear_disk_errors(place, elsewhere=f"{_ELSEWHERE} {framework.name}"):
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / f".{framework.name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BackendMissing(
                f"Another process is setting {framework.name} up.", hint="Wait until it is done"
            ) from error
        yield
    finally:
        os.close(lock)


def bytes_in(folder: Path) -> int:
    """What a folder takes on disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            found = os.lstat(Path(place, name))
            if (found.st_dev, found.st_ino) not in seen:
                seen.add((found.st_dev, found.st_ino))
                total += found.st_size
    return total


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
