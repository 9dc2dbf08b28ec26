"""A backend that is elsewhere, in numpy and without waiting: the one of docs/add-a-backend.md, in an "environment" that
is this Python with another folder of packages, and with ways to misbehave."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from persona.environments.remote import RemoteBackend

ROOT = Path(__file__).parents[2]
MISBEHAVING = '''
import os, sys, signal
import numpy as np
from persona.core.host.errors import ConversionError, TrainingError
from persona.core.adapters.entry import Adapter
import biased


class StubSession(biased.BiasedSession):
    """Does what is asked, and on request what it should not."""

    def __init__(self, base, plan, bias):
        super().__init__(base, plan, bias)
        self.notes = ["opened"]
        print("chatter of a library", flush=True)
        os.write(1, b"chatter of its C part\\n")

    def accumulate(self, batch):
        if os.environ.get("STUB_KILLED_AT") == str(self.optimizer.step + 1):
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().accumulate(batch)

    def fails(self, how):
        self.notes.append(how)
        raise {"persona": ConversionError("no room", hint="make room"), "other": ZeroDivisionError("0/0")}[how]

    def where(self):
        return [os.getpid(), "torch" in sys.modules, [p for p in sys.path if "site-packages" in p]]

    def back(self, value):
        return value

    def exits(self):
        os._exit(7)


class StubBackend(biased.BiasedBackend):
    name = "stub"
    summary = "a stub"

    def capabilities(self, device):
        return {"fp32": True, "bf16": False, "weights": True, "ema": False, "sampler:ddim": True, "sampler:lcm": False}

    def free_memory(self, device):
        return 1 << 40

    def open(self, base, plan, runtime):
        return StubSession(base, plan, biased.read_bias(base))
'''


@pytest.fixture(scope="session")
def stub_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the plugin "stub": a script that adds its folder of packages."""
    folder = tmp_path_factory.mktemp("stub")
    text = (ROOT / "docs" / "add-a-backend.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(# biased\.py\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (folder / "biased.py").write_text(example, encoding="utf-8")
    (folder / "stub.py").write_text(MISBEHAVING, encoding="utf-8")
    (folder / "stub_plugin.py").write_text(
        "from persona import Descriptor, hookimpl\n\n\n@hookimpl\ndef persona_backends():\n"
        '    return [Descriptor("stub", "numpy, elsewhere", "stub:StubBackend")]\n'
    )
    about = folder / "persona_stub-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: persona-stub\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[persona]\nstub = stub_plugin\n")
    python = folder / "python"
    # -I keeps PYTHONPATH out, so the folder comes in as an argument; -S leaves this Python's own plugins out.
    code = f"import sys, runpy; sys.path.append({str(folder)!r}); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -I -c "{code}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def stub(stub_python: Path) -> Iterator[RemoteBackend]:
    """The stub as a backend that is elsewhere."""
    backend = RemoteBackend("stub", "numpy, elsewhere", stub_python)
    yield backend
    backend.close()


@pytest.fixture
def stub_is_known(stub_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--backend stub` in this process, executed in its own environment."""
    import persona.api

    monkeypatch.syspath_prepend(str(stub_python.parent))
    monkeypatch.setenv("PERSONA_STUB_PYTHON", str(stub_python))
    persona.api.host.cache_clear()


def alive(process: int) -> bool:
    """Whether a process is there (and no zombie)."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
