"""Training steps with the denoiser compiled (`torch.compile`)."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from persona.core.host.errors import UsageError

COMPILER = "inductor"
SHAPES = 64
"""Shapes of batches that one run may have, each compiled for itself."""


def require_compiler(kind: str) -> None:
    """Raises UsageError, with what to type, where inductor lacks what it compiles with: a C++ compiler with Python's
    headers, and Triton on CUDA."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual
    if kind == "cuda" and find_spec("triton") is None:
        _refuse("Triton", "is not installed", "pip install triton")
    if shutil.which(compiler) is None:
        _refuse(f"a C++ compiler, {compiler},", "is not there", "On Debian and Ubuntu: sudo apt install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        _refuse("Python.h", "is not there", "On Debian and Ubuntu: sudo apt install python3-dev")


def _refuse(what: str, how: str, line: str) -> None:
    raise UsageError(f"--compile: torch compiles with {what} which {how}.", hint=f"{line}; or leave --compile out")


def compiled(model: nn.Module) -> Callable[..., Any]:
    """The model's forward pass, compiled when it is called first, and again for every other shape of a batch: code for
    shapes that vary would depend on which came first, and a resumed run has to make the same bits. The module itself,
    its names and what calls it stay as they are."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    forward: Callable[..., Any] = torch.compile(model.forward, dynamic=False, fullgraph=True, backend=COMPILER)
    return forward
