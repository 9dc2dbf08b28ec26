"""What --compile costs and gives: a LoRA on mini, batch 2, with and without, each in a process of its own.

    python benchmarks/speed.py compile                        torch
    python benchmarks/speed.py compile --backend paddle       in its environment (persona backends setup paddle)

Seconds are the processor's, of the process and of the compilers it starts. Losses have to agree within 1e-5."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from speed import Result, Row

AGREE = 1e-5
"""How far the losses of a step may be apart, relative."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The backend and how many steps."""
    parser.add_argument("--backend", default="torch", choices=("torch", "paddle", "mindspore"))
    parser.add_argument("--steps", type=int, default=12)


def measure(arguments: argparse.Namespace) -> Result:
    """First step, later steps and memory of both, and how far their losses are apart. They step by turns, so that
    whatever else the machine does slows both alike."""
    with tempfile.TemporaryDirectory() as folder:  # so that nothing is found that was compiled before
        both = [Variant(arguments.backend, compile_it, folder) for compile_it in (False, True)]
        for _ in range(arguments.steps):
            for variant in both:
                variant.step()
        plain, compiled = both
        for variant in both:
            variant.close()
    found = np.array([variant.losses for variant in both])  # [2, steps, batch]
    apart = float(np.abs(found[1] / found[0] - 1).max())
    rows = [
        Row("a step", plain.seconds[1:]),
        Row("a step, compiled", compiled.seconds[1:], beside="a step"),
        Row("the first step", plain.seconds[:1]),
        Row("the first step, compiled", compiled.seconds[:1], beside="the first step"),
    ]
    facts = {
        "backend": arguments.backend,
        "peak memory, MiB": f"{plain.peak >> 20}, compiled {compiled.peak >> 20}",
        "losses apart, relative": f"{apart:.1e}",
    }
    return Result(rows, facts, [] if apart <= AGREE else [f"losses are {apart:.1e} apart, more than {AGREE:g}"])


class Variant:
    """A process that makes a step whenever it is told to."""

    def __init__(self, backend: str, compile_it: bool, folder: str) -> None:
        from persona.environments.state import find_for

        elsewhere = find_for(backend)
        python = str(elsewhere.python) if elsewhere is not None else sys.executable
        self._process = subprocess.Popen(
            [python, str(Path(__file__)), backend, str(int(compile_it))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "GLOG_v": "3"},
        )
        self.seconds: list[float] = []
        self.losses: list[list[float]] = []
        self.peak = 0

    def step(self) -> None:
        """One step."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print("step", file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            sys.exit("The process that was measured has ended; what it said is above.")
        told = json.loads(line)
        self.seconds.append(told["seconds"])
        self.losses.append(told["losses"])
        self.peak = told["peak"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def child(backend: str, compile_it: bool) -> None:
    """Open the session; for every line that comes in a step, and its seconds, losses and the peak of memory as JSON."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints
    from persona.api import host
    from persona.core.host.contracts import Runtime
    from persona.core.training.batch import Batch
    from persona.core.training.noise import normal
    from persona.core.training.plan import LowRank, TrainingPlan
    from persona.core.training.targets import ATTENTION, resolve_targets
    from persona.hub.bases import open_base

    base = open_base("mini")
    lora = LowRank(base.denoiser, resolve_targets(base, base.denoiser, ATTENTION), 4, 4.0, 1e-3)
    plan = TrainingPlan("lora", (lora,), (), 1000, batch=2, compile=compile_it)
    session = host().load("backend", backend)().open(base, plan, Runtime("cpu"))
    encoded = session.encode_text(["a photo of a toy", "a toy on a blue background"])
    a = np.array([0.5, 0.8], np.float32)
    s = np.sqrt(1 - a**2)
    side = base.native_size // base.latent_factor
    for step, _ in enumerate(sys.stdin):
        latents, noise = (normal(0, name, step, 0, (2, base.latent_channels, side, side)) for name in ("x", "noise"))
        batch = Batch(latents=latents, noise=noise, timesteps=np.array([700, 300]), a=a, s=s, p=-s, q=a,
                      w=np.full(2, 0.5, np.float32), embeddings=encoded)  # fmt: skip
        begun = processor()
        losses = session.accumulate(batch).tolist()
        session.update([1e-3], 1.0)
        found = {"seconds": processor() - begun, "losses": losses, "peak": session.peak_memory()}
        print(json.dumps(found), file=told, flush=True)
    session.close()


def processor() -> float:
    """Seconds of processor time, of this process and of those it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2] == "1")
