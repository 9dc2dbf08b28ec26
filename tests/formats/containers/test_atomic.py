"""A file appears whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from persona.core.host.errors import OutputExists, UnreadableFile, UnwritableOutput
from persona.formats.containers.atomic import atomic_write


def test_the_file_is_there_when_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"whole")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o644)])
def test_the_mode_is_0644_less_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "out") as temporary:
            temporary.write_bytes(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with pytest.raises(OutputExists, match="exists already"), atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    with atomic_write(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputExists, match="appeared meanwhile"), atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
        target.write_bytes(b"somebody else's")
    assert target.read_bytes() == b"somebody else's"
    assert list(tmp_path.iterdir()) == [target]


def test_without_hard_links_it_still_does_not_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links on this file system")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "out"
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"new")
    assert target.read_bytes() == b"new"
    with pytest.raises(OutputExists), atomic_write(tmp_path / "other") as temporary:
        (tmp_path / "other").write_bytes(b"theirs")
    assert (tmp_path / "other").read_bytes() == b"theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), UnreadableFile("the source broke")])
def test_nothing_is_left_behind_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_write(tmp_path / "out") as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnwritableOutput, match="disk is full") as caught, atomic_write(tmp_path / "out") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "Free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named_with_the_line_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UnwritableOutput, match="no folder") as caught, atomic_write(tmp_path / "a" / "out"):
        pass
    assert caught.value.hint == f"mkdir -p {tmp_path / 'a'}"


def test_a_file_is_not_a_folder_and_a_folder_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnwritableOutput, match="is not a folder"), atomic_write(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputExists, match="is a folder"), atomic_write(tmp_path, overwrite=True):
        pass


def test_a_folder_without_permission_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> int:  # the tests may run as root, whom no mode stops
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UnwritableOutput, match="Permission denied"), atomic_write(tmp_path / "out"):
        pass


def test_a_symlink_is_replaced_and_what_it_points_to_is_not(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"precious")
    (tmp_path / "out").symlink_to(elsewhere)
    with atomic_write(tmp_path / "out", overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert elsewhere.read_bytes() == b"precious"
    assert not (tmp_path / "out").is_symlink()


def test_a_real_full_file_system_leaves_nothing_half_written(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    with pytest.raises(UnwritableOutput, match="disk is full"), atomic_write(tmp_path / "out"):
        Path("/dev/full").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []
