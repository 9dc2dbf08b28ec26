"""What the command line may import before it knows what it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"numpy", "ml_dtypes", "PIL", "torch", "diffusers", "transformers", "peft", "accelerate", "paddle", "mindspore"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins"], ["train", "--help"]], ids=" ".join)
def test_help_imports_no_arrays_and_no_framework(arguments: list[str]) -> None:
    probe = (
        "import sys, persona.cli; code = persona.cli.run(sys.argv[1:]); "
        "print(code, *sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PERSONA_PLUGINS": ""},
    )
    code, *modules = answer.stderr.split()
    assert code == "0", answer.stderr
    assert {"persona", "click"} <= set(modules)
    assert sorted(HEAVY & set(modules)) == []
