"""What a killed process leaves beside its target, and who removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import persona
from persona.api import host
from persona.core.host.errors import OutputExists, UnwritableOutput
from persona.exchange import workers
from persona.exchange.batch import Job, convert_all
from persona.exchange.convert import Wish
from persona.formats.containers import temporaries
from persona.formats.containers.atomic import atomic_folder, atomic_write
from persona.formats.containers.temporaries import UNTOUCHED, remove_abandoned, temporary

KOHYA = Path(__file__).parents[2] / "fixtures/torch/kohya_sd15_linear/kohya_sd15_linear.safetensors"
LONG_AGO = 2 * UNTOUCHED
WRITER = """
import sys, time
from pathlib import Path
from persona.formats.containers.temporaries import temporary
with temporary(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as path:
    (path / "half" if path.is_dir() else path).write_bytes(b"half")
    print(path, flush=True)
    time.sleep(60)
"""
pytestmark = pytest.mark.skipif(temporaries.fcntl is None, reason="a system without flock")


@pytest.fixture(params=["file", "folder"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process in the middle of writing, and its temporary."""
    words = [sys.executable, "-c", WRITER, str(tmp_path / "out"), request.param]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_what_a_killed_process_leaves_goes_when_the_next_writes_there(writer, tmp_path: Path) -> None:
    process, left = writer
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left.exists()
    age(left, LONG_AGO)
    persona.convert(KOHYA, tmp_path / "new.safetensors", to="diffusers")
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]


def test_what_somebody_still_writes_stays_however_old_it_looks(writer, tmp_path: Path) -> None:
    _, held = writer
    age(held, LONG_AGO)
    remove_abandoned(tmp_path, untouched=0)
    assert held.exists()


def test_what_was_touched_a_moment_ago_stays(writer, tmp_path: Path) -> None:
    """A network file system need not tell of another machine's locks."""
    process, left = writer
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_abandoned(tmp_path)
    assert left.exists()
    remove_abandoned(tmp_path, untouched=0)
    assert not left.exists()


def test_nothing_but_our_own_names_is_looked_at(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x")
    names = [".persona-0123.tmp", ".persona-0123456789abcdef.tmp.bak", "x.tmp", ".persona-0123456789ABCDEF.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    link = tmp_path / f".persona-{'0' * 16}.tmp"
    link.symlink_to(precious)
    os.mkfifo(tmp_path / f".persona-{'1' * 16}.tmp")  # opening one must not wait for a writer
    remove_abandoned(tmp_path, untouched=0)
    assert precious.exists() and link.is_symlink() and all((tmp_path / name).exists() for name in names)


def test_another_users_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".persona-{'2' * 16}.tmp"
    left.write_bytes(b"x")
    monkeypatch.setattr(os, "getuid", lambda: left.stat().st_uid + 1)
    remove_abandoned(tmp_path, untouched=0)
    assert left.exists()


def test_a_temporary_that_is_removed_before_it_is_held_is_made_again(tmp_path: Path, monkeypatch) -> None:
    real, taken = temporaries.fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not taken:
            (found,) = tmp_path.iterdir()
            found.unlink()
            taken.append(found)
        real(descriptor, how)

    monkeypatch.setattr(temporaries.fcntl, "flock", late)
    with temporary(tmp_path / "out") as path:
        assert path.exists() and path != taken[0]


@pytest.mark.skipif(sys.platform != "linux", reason="threads elsewhere: there is no process to kill")
def test_a_batch_clears_up_after_a_process_of_its_own_at_once(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def dies(sources, destination, *_) -> None:
        with atomic_write(destination) as path:
            path.write_bytes(b"half")
            if sources[0].stem == "3":
                os.kill(os.getpid(), signal.SIGKILL)
        raise OutputExists("told")

    monkeypatch.setattr(workers, "can_fork", lambda: True)
    monkeypatch.setattr("persona.exchange.batch.convert", dies)
    jobs = [Job((tmp_path / str(n),), out / f"{n}.out") for n in range(6)]
    outcomes = convert_all(jobs, Wish(to="kohya"), host(), lambda one: None)
    assert sum("was killed" in str(one.error) for one in outcomes) == 1
    assert sorted(path.name for path in out.iterdir()) == [f"{n}.out" for n in (0, 1, 2, 4, 5)]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "model") as building:
        (building / "part").write_bytes(b"x")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "part"]
    with pytest.raises(OutputExists), atomic_folder(tmp_path / "model"):
        pass
    with pytest.raises(OutputExists, match="appeared meanwhile"), atomic_folder(tmp_path / "second") as building:
        (tmp_path / "second").mkdir()
    with pytest.raises(UnwritableOutput, match="third/part was"), atomic_folder(tmp_path / "third") as building:
        raise UnwritableOutput(f"{building}/part was not written.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "second"]
