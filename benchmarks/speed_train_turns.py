"""One process in which persona and the bare loop train the same thing by turns, a few steps each, so that whatever else
the machine does slows both alike. speed_train.py starts it with its wish as JSON; it prints its figures as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from bare_loop import BareLoop, peak_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))


class Turns:
    """Listens to persona's run; after every `block` steps of it, makes as many of the bare loop."""

    def __init__(self, wish: dict[str, Any]) -> None:
        self.wish, self.block = wish, wish["block"]
        self.bare: BareLoop | None = None
        self.first: dict[str, float] = {}
        self.peak = 0
        self.seconds: dict[str, list[tuple[float, float]]] = {"persona": [], "bare": []}
        self.aside = 0.0  # seconds of the run that were not persona's
        self.begun = (0.0, 0.0)

    def hear(self, event: Any) -> None:
        """An event of the run."""
        if type(event).__name__ != "StepDone":
            return
        if event.step == 1:
            self.first = {"wall": time.time() - self.wish["started"], "cpu": time.process_time()}
        if event.step % self.block:
            return
        theirs = time.perf_counter()
        if self.bare is None:  # the first turn of each warms up and does not count
            self.peak = peak_bytes()
            pictures = sorted(Path(self.wish["pictures"]).glob("*.png"))
            self.bare = BareLoop(Path(self.wish["base"]), self.wish["method"], pictures, self.wish["batch"])
            self.bare.step()
        else:
            self.seconds["persona"].append(since(self.begun, self.block))
        begun = now()
        for _ in range(self.block):
            self.bare.step()
        self.seconds["bare"].append(since(begun, self.block))
        self.aside += time.perf_counter() - theirs
        self.begun = now()


def now() -> tuple[float, float]:
    """Clock and processor time, seconds."""
    return time.perf_counter(), time.process_time()


def since(begun: tuple[float, float], steps: int) -> tuple[float, float]:
    """Seconds a step since then, by both."""
    wall, cpu = now()
    return (wall - begun[0]) / steps, (cpu - begun[1]) / steps


def main() -> None:
    """Train by turns."""
    wish = json.loads(sys.argv[1])
    import persona

    turns = Turns(wish)
    run = persona.train(wish["method"], wish["pictures"], base=wish["base"], emit=turns.hear, **wish["options"])
    facts = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
    disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    found = {"first_step": turns.first, "peak_bytes": turns.peak, "turns": turns.seconds, "disk_bytes": disk}
    found |= {"seconds": facts["seconds"] - turns.aside}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
