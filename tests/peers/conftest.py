"""Which of these tests an environment can run: those whose consumer is installed there.

`make test-peers` builds an environment for each and names its files, so that nothing is left out there."""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {
    "test_diffusers.py": "diffusers",
    "test_peft.py": "peft",
    "test_peft_methods.py": "peft",
    "test_whole_transformers.py": "diffusers",
    "test_lycoris.py": "lycoris",
    "test_paddle.py": "ppdiffusers",
    "test_mindspore.py": "mindone",
}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]
