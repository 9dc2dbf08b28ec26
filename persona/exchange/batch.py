"""Many conversions side by side: which file goes where, and one bad file does not stop the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from persona.core.adapters.conversion import Step
from persona.core.host.errors import OutputExists, PersonaError, UnreadableFile, UsageError
from persona.core.host.host import Host
from persona.exchange.convert import Wish, convert
from persona.exchange.load import reason
from persona.exchange.places import is_one_folder, weight_files
from persona.exchange.report import Report
from persona.exchange.workers import side_by_side
from persona.formats.containers.temporaries import remove_abandoned


@dataclass(frozen=True)
class Job:
    """Sources that are one adapter, and where it goes."""

    sources: tuple[Path, ...]
    destination: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a job: a report, or the error."""

    job: Job
    report: Report | None = None
    error: BaseException | None = None


def jobs_into_folder(sources: Sequence[Path], folder: Path, ending: str) -> list[Job]:
    """One job for each source, named after it, with `ending` ("" for a folder of its own). A source folder that is
    PEFT's or a whole model is one job, any other one for each weight file in it. Raises UsageError when two would get
    one name."""
    found = [path for source in sources for path in _adapters_in(source)]
    if not found:
        raise UnreadableFile("There is no weight file in what was given.")
    names = _names(found)
    jobs = [Job((path,), folder / f"{names[path]}{ending}") for path in found]
    taken: dict[Path, Path] = {}
    for job in jobs:
        before = taken.setdefault(job.destination, job.sources[0])
        if before != job.sources[0]:
            raise UsageError(
                f"{job.sources[0]} and {before} would both become {job.destination}.",
                hint="Convert them one at a time.",
            )
    return jobs


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each: its stem; where others have it too, with the folder before it or the ending behind."""
    stems = {path: path.name if path.is_dir() else path.stem for path in paths}
    result = {}
    for path, stem in stems.items():
        others = [other for other in stems if stems[other] == stem and other != path]
        name = stem
        if any(other.absolute().parent != path.absolute().parent for other in others):
            name = f"{path.absolute().parent.name}_{stem}"
        if any(other.absolute().parent == path.absolute().parent for other in others):
            name = f"{name}_{path.suffix[1:]}"
        result[path] = name
    return result


def _adapters_in(source: Path) -> list[Path]:
    return weight_files(source) if source.is_dir() and not is_one_folder(source) else [source]


def convert_all(jobs: Sequence[Job], wish: Wish, host: Host, done: Callable[[Outcome], None]) -> list[Outcome]:
    """Convert all, several at a time; `done` is told of each as it ends, in this thread. Errors stay with their job.
    An interruption waits for the files that are being written, so that nothing half-written stays."""
    if len(jobs) == 1:
        outcome = attempt(jobs[0], wish, host)
        done(outcome)
        return [outcome]
    outcomes = []
    with contextlib.closing(side_by_side(lambda number: _told(attempt(jobs[number], wish, host)), len(jobs))) as ends:
        for number, told in ends:
            outcome = _heard(jobs[number], told)
            if told is None:  # its process was killed, and all the others hold what they write
                remove_abandoned(outcome.job.destination.parent, untouched=0)
            outcomes.append(outcome)
            done(outcome)
    return outcomes


def _told(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON data, for another process."""
    if outcome.report is None:
        assert outcome.error is not None
        return {"error": reason(outcome.error), "hint": getattr(outcome.error, "hint", "")}
    report = {one.name: getattr(outcome.report, one.name) for one in fields(Report)}
    steps = [(step.module, step.action, step.cost, step.detail) for step in outcome.report.steps]
    return {**report, "written": [str(path) for path in outcome.report.written], "steps": steps}


def _heard(job: Job, told: dict[str, Any] | None) -> Outcome:
    """The outcome again. Its error has the message and the hint of what was raised."""
    if told is None:
        return Outcome(job, error=_killed(job))
    if "error" in told:
        return Outcome(job, error=PersonaError(told["error"], hint=told["hint"]))
    lists = {
        "written": tuple(map(Path, told["written"])),
        "steps": tuple(Step(*step) for step in told["steps"]),
        "notes": tuple(told["notes"]),
    }
    return Outcome(job, report=Report(**{**told, **lists}))


def _killed(job: Job) -> PersonaError:
    return PersonaError(
        f"{job.sources[0]}: the process that converted it was killed, as happens when memory runs out.",
        hint="Convert it by itself.",
    )


def attempt(job: Job, wish: Wish, host: Host) -> Outcome:
    """One conversion whose error is kept instead of raised."""
    try:
        return Outcome(job, report=convert(job.sources, job.destination, wish, host))
    except (PersonaError, OSError) as error:
        return Outcome(job, error=error)
    except MemoryError as error:
        return Outcome(job, error=error)
    except Exception as error:  # a bug with one file must not lose the others
        return Outcome(job, error=error)


def make_folder(folder: Path) -> None:
    """The folder of a batch, made when it is not there. Raises OutputExists when a file has its name."""
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"{folder} is a file, not a folder.", hint="Choose another folder for the results.")
    folder.mkdir(parents=True, exist_ok=True)
