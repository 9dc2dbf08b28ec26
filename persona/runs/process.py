"""What a launched process of a run does (`python boot.py persona.runs.process`; see launching.py)."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from persona.core.host.errors import PersonaError
from persona.core.host.host import Host
from persona.core.training.events import Event
from persona.core.training.processes import Processes
from persona.core.training.run import RunFolder, sole_writer, write_facts
from persona.runs.link import VARIABLE, Lines, error_in_words, event_in_words
from persona.runs.recipe import Recipe


class Line:
    """The line to the command that launched this process; what it says comes in on a thread of its own."""

    def __init__(self) -> None:
        port, _, token = os.environ[VARIABLE].partition(":")
        self._lines = Lines(socket.create_connection(("127.0.0.1", int(port))))
        self._lines.send(token=token, pid=os.getpid())
        self._job: dict[str, Any] = {}
        self._has_job, self._stop, self._end = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def job(self) -> dict[str, Any]:
        """What is to be done."""
        self._has_job.wait()
        return self._job

    def say(self, **message: Any) -> None:
        """Tell the command something; when it is gone, there is nobody to tell."""
        with self._lock:
            try:
                self._lines.send(**message)
            except OSError:
                self._stop.set()

    def event(self, event: Event) -> None:
        """Tell an event."""
        self.say(**event_in_words(event))

    def stop(self) -> bool:
        """Whether the run is to stop after this step: it was asked to, or the command is gone."""
        return self._stop.is_set()

    def wait_for_the_end(self) -> None:
        """After an error: stay until the command has heard of it. Were this process gone, the launcher would end the
        others before the first of them can say what went wrong."""
        self._end.wait(60)

    def _listen(self) -> None:
        while (messages := self._lines.take()) is not None:
            for message in messages:
                if "run" in message:
                    self._job = message
                    self._has_job.set()
                elif "stop" in message:
                    self._stop.set()
                elif "end" in message:
                    self._end.set()
        for happened in (self._stop, self._end, self._has_job):
            happened.set()


def main() -> int:
    """Do the job; 0, or 1 when it failed."""
    line = Line()
    job = line.job()
    if not job:
        return 1
    try:
        work(job, line)
    except BaseException as error:
        known = error if isinstance(error, PersonaError) else _unexpected(error)
        shown = traceback.format_exc() if os.environ.get("PERSONA_DEBUG") else ""
        line.say(**error_in_words(known), traceback=shown)
        line.wait_for_the_end()
        sys.stderr.flush()
        os._exit(1)  # the libraries' own farewell would wait for the other processes
    line.say(finished=True)
    return 0


def work(job: dict[str, Any], line: Line) -> None:
    """Join the other processes and make the run, as the first of them or as one that follows."""
    from persona.api import host as host_of
    from persona.environments.worker import surroundings
    from persona.runs.following import follow
    from persona.runs.preparing import prepare
    from persona.runs.training import execute, resume_in

    host = host_of(without=tuple(job["without"]))
    recipe = recipe_from(job["recipe"], host)
    run = RunFolder(Path(job["run"]))
    backend = host.load("backend", job["backend"])()  # of this environment: the command has chosen it
    processes: Processes = backend.join(recipe.device)
    line.say(rank=processes.rank)
    where = surroundings(backend.name) if job["elsewhere"] else {}
    ready = prepare(recipe, host)
    if processes.rank != 0:
        follow(run, ready, backend, processes, fresh=job["fresh"])
    else:
        with sole_writer(run):
            write_facts(run, {**run.facts(), **where})
            told: dict[str, Any] = {"emit": line.event, "stop": line.stop, "processes": processes}
            if job["fresh"]:
                execute(run, ready, backend, host, done=0, state=None, **told)
            else:
                resume_in(run, ready, backend, host, allow_change=job["allow_change"], **told)
    processes.leave()


def recipe_from(text: str, host: Host) -> Recipe:
    """The recipe that the command sent, as it reads every recipe."""
    from persona.runs.assemble import assemble

    with tempfile.TemporaryDirectory(prefix="persona-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return assemble(host, [str(file)], {}, default_recipe=None).recipe


def _unexpected(error: BaseException) -> PersonaError:
    return PersonaError(f"unexpected {type(error).__name__}: {error}", hint="See where: add --debug")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # some frameworks print thousands of lines when an interpreter ends
