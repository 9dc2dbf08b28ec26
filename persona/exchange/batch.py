"""Many conversions side by side: which file goes where, and one bad file does not stop the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from persona.core.host.errors import OutputExists, PersonaError, UnreadableFile, UsageError
from persona.core.host.host import Host
from persona.exchange.convert import Wish, convert
from persona.exchange.places import is_one_folder, weight_files
from persona.exchange.report import Report

WORKERS = 4
"""Reading and writing are what takes time, and the kernel does both outside Python's lock."""


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
    """Convert all, WORKERS at a time; `done` is told of each as it ends, in this thread. Errors stay with their job.
    An interruption waits for the files that are being written, so that nothing half-written stays."""
    if len(jobs) == 1:
        outcome = attempt(jobs[0], wish, host)
        done(outcome)
        return [outcome]
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    finished: SimpleQueue[Outcome] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            finished.put(attempt(job, wish, host))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(jobs)))]
    for thread in threads:
        thread.start()
    outcomes = []
    try:
        for outcome in _arriving(finished, len(jobs)):
            outcomes.append(outcome)
            done(outcome)
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    return outcomes


def _arriving(finished: SimpleQueue[Outcome], count: int) -> Iterator[Outcome]:
    for _ in range(count):
        yield finished.get()


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
