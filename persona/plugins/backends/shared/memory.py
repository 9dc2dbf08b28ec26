"""Main memory, and running out of any."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from persona.core.host.errors import TrainingError

_MEMORY_WORDS = ("out of memory", "allocate memory", "not enough memory")


def is_about_memory(error: Exception) -> bool:
    """Whether memory ran out. Not every device has an error class for it."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _MEMORY_WORDS)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn running out of memory into a TrainingError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_about_memory(error):
            raise
        text = str(error)
        asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
        more = f": {asked[1]} more were asked for" if asked else ""
        raise TrainingError(
            f"Out of memory{more}.",
            hint="Lower --batch (and raise --accumulation), --width and --height or --rank, or add "
            "--gradient-checkpointing or --precision bf16.",
        ) from error


def largest_process() -> int:
    """The most memory this process had, in bytes; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def free_main_memory() -> int:
    """Bytes of this machine's memory that are free; 0 where it cannot be asked."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "0")
    return int(found) * 1024
