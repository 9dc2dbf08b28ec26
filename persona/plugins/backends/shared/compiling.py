"""When a framework's compiler refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from persona.core.host.errors import PersonaError, TrainingError
from persona.plugins.backends.shared.memory import is_about_memory


@contextmanager
def compiling(framework: str, warns: str) -> Iterator[None]:
    """Context of a step that is compiled: a compiler raises whatever it likes, with a page of its own. Raises
    TrainingError with the first line of it, and running out of memory as it is. `warns` is how the warnings begin that
    a compiler gives for nothing, "" for none."""
    try:
        with warnings.catch_warnings():
            if warns:
                warnings.filterwarnings("ignore", message=warns)
            yield
    except Exception as error:
        if isinstance(error, PersonaError) or is_about_memory(error):
            raise
        reason = next((line for line in str(error).splitlines() if line.strip(" -")), type(error).__name__)
        raise TrainingError(f"{framework} cannot compile this denoiser: {reason}",
                            hint="Train without: --no-compile") from error  # fmt: skip
