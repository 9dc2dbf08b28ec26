"""How a run's events look: a bar on a terminal, plain lines elsewhere, JSON lines when asked for."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from persona.core.training.events import CheckpointSaved, Event, Note, Sampled, Stage, StepDone


class PlainReporter:
    """A line now and then: every stage, every tenth of the steps, every file."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.stage = ""
        self.first_step = 0
        self.steps_begun = 0.0

    def note(self, text: str) -> None:
        """Something the user should know."""
        print(text, file=sys.stderr, flush=True)

    def event(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Note):
            self.note(event.text)
        elif isinstance(event, Stage):
            line = f"{event.name}" + (f" {event.done} of {event.total}" if event.total else "")
            if event.name != self.stage or (event.total and event.done == event.total):
                self.note(f"{line} …" if event.done < event.total or not event.total else line)
            self.stage = event.name
        elif isinstance(event, StepDone):
            self.step(event)
        elif isinstance(event, Sampled):
            self.note(f"samples of step {event.step}: {event.paths[0].rsplit('/', 1)[0] if event.paths else ''}")
        elif isinstance(event, CheckpointSaved):
            self.note(f"checkpoint: {event.path}")

    def step(self, event: StepDone) -> None:
        """A line every tenth of the way."""
        if not self.first_step:
            self.first_step, self.steps_begun = event.step, time.monotonic() - event.values.get("seconds", 0.0)
        if event.step % max(1, event.total // 10) == 0 or event.step == event.total:
            self.note(f"step {event.step} of {event.total}  {figures(event)}  {self.remaining(event)}")

    def remaining(self, event: StepDone) -> str:
        """How long the steps took so far, and will."""
        made = event.step - self.first_step + 1
        pace = (time.monotonic() - self.steps_begun) / made
        left = pace * (event.total - event.step)
        return f"{1 / pace:.2f} steps/s, {clock(left)} to go" if left else f"{1 / pace:.2f} steps/s"

    def finished(self, run: Any) -> None:
        """Where everything is, and what to type next."""
        print(f"done in {clock(time.monotonic() - self.begun)}: {run.path}", file=sys.stderr)
        if (run.path / "sheet.png").is_file():
            print(f"sheet:   {run.path / 'sheet.png'}")
        print(f"product: {run.product}")
        print(f'use it:  persona generate {how_to_use(run)} --prompt "…"')

    def close(self) -> None:
        """Nothing to put away."""


def how_to_use(run: Any) -> str:
    """The options of `persona generate` that take a run's product: with its base, where that is not the default."""
    if run.product != run.adapter:
        return f"--base {shlex.quote(str(run.path))}"
    base = str(run.facts().get("base", "mini"))
    words = run.adapter.with_name(f"{run.adapter.stem}_emb{run.adapter.suffix}")  # new words that came with deltas
    files = [run.adapter, *([words] if words.is_file() else [])]
    options = [f"--adapter {shlex.quote(str(file))}" for file in files]
    return " ".join([*([] if base == "mini" else [f"--base {shlex.quote(base)}"]), *options])


class JsonReporter(PlainReporter):
    """Events as JSON lines on standard output."""

    def note(self, text: str) -> None:
        """A note is an event too."""
        self.event(Note(text))

    def event(self, event: Event) -> None:
        """One line an event."""
        print(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}), flush=True)

    def finished(self, run: Any) -> None:
        """The last line."""
        print(json.dumps({"event": "Finished", "run": str(run.path), "product": str(run.product)}), flush=True)


class TerminalReporter(PlainReporter):
    """A rich progress bar."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
        )
        self.task: Any = None
        self.bar.start()

    def note(self, text: str) -> None:
        """Above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)  # a path stays one word

    def event(self, event: Event) -> None:
        """Stages and steps move the bar; the rest is printed above it."""
        if isinstance(event, Stage):
            self._move(event.name, event.done, event.total or None)
        elif isinstance(event, StepDone):
            self._move("training", event.step, event.total, figures(event))
        else:
            super().event(event)

    def _move(self, name: str, done: int, total: int | None, words: str = "") -> None:
        if self.task is None or self.stage != name:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(name, total=total or 1, figures="")
            self.stage = name
        self.bar.update(self.task, completed=done, total=total or 1, figures=words)

    def close(self) -> None:
        """Give the terminal back."""
        self.bar.stop()


def figures(event: StepDone) -> str:
    """Loss, learning rate and gradient norm in a few characters."""
    values = event.values
    return f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2g}  grad {values['grad_norm']:.3g}"


def clock(seconds: float) -> str:
    """Minutes and seconds, hours when there are some."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def reporter(as_json: bool) -> Iterator[PlainReporter]:
    """The reporter that fits where standard error goes."""
    found: PlainReporter
    if as_json:
        found = JsonReporter()
    else:
        found = TerminalReporter() if sys.stderr.isatty() else PlainReporter()
    try:
        yield found
    finally:
        found.close()
