"""`persona data check` as it is typed."""

import json

import numpy as np
import pytest
from PIL import Image

from persona.cli import run


@pytest.fixture
def folder(tmp_path):
    for name, size in (("wide.png", (400, 100)), ("square.jpg", (128, 128))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / name)
    (tmp_path / "wide.txt").write_text("一个红色的长方形")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_the_table_shows_sizes_captions_and_what_is_odd(folder, capsys):
    assert run(["data", "check", str(folder), "--size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["picture", "size", "resized", "to", "crop", "lost", "caption"]
    assert lines[1].split() == ["square.jpg", "128x128", "64x64", "0%", "(none)"]
    assert lines[2].split() == ["wide.png", "400x100", "256x64", "75%", "一个红色的长方形"]
    assert lines[3] == f"{folder}: 2 pictures to train on at 64x64, 1 with captions of their own; 1 left out"
    assert "  wide.png: the crop takes 75% of it away" in lines
    assert any(line.startswith("  left out: broken.png: cannot be read as a picture") for line in lines)


def test_buckets_masks_and_repeats_have_columns_when_there_is_something_in_them(tmp_path, capsys):
    place = tmp_path / "3_sks dog"
    (place / "mask").mkdir(parents=True)
    Image.new("RGB", (1200, 800)).save(place / "a.png")
    Image.new("L", (1200, 800), 255).save(place / "mask" / "a.png")
    assert run(["data", "check", str(tmp_path), "--size", "512", "--buckets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-4:] == ["bucket", "repeats", "mask", "caption"]
    assert lines[1].split() == ["a.png", "1200x800", "640x427", "10%", "640x384", "3", "yes", "sks", "dog"]


def test_a_warning_that_all_share_is_told_once(tmp_path, capsys):
    for number in range(20):
        Image.fromarray(np.full((64, 64), number, np.uint8)).save(tmp_path / f"{number:02d}.png")
    assert run(["data", "check", str(tmp_path), "--size", "64"]) == 0
    assert "  00.png and 19 more: greyscale" in capsys.readouterr().out.splitlines()


def test_json_has_everything(folder, capsys):
    assert run(["data", "check", str(folder), "--size", "96x64", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    square, wide = document["pictures"]
    assert document["size"] == [96, 64]
    assert (wide["size"], wide["resized"], wide["crop"], wide["trained_at"]) == (
        [400, 100],
        [256, 64],
        [80, 0],
        [96, 64],
    )
    assert wide["captions"] == ["一个红色的长方形"] and square["captions"] == [] and len(square["sha256"]) == 64
    (problem,) = document["problems"]
    assert problem["path"].endswith("broken.png") and problem["used"] is False


def test_nothing_usable_is_exit_code_1_with_the_line_to_type(folder, tmp_path, capsys):
    (tmp_path / "x" / "train").mkdir(parents=True)
    (folder / "square.jpg").rename(tmp_path / "x" / "train" / "a.jpg")
    assert run(["data", "check", str(tmp_path / "x"), "--size", "64"]) == 1
    errors = capsys.readouterr().err
    assert "sub-folder train has 1." in errors and f"--data {tmp_path}/x/train" in errors
    assert run(["data", "check", str(tmp_path / "x"), "--size", "64", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["pictures"] == [] and "--data" in document["hint"]


@pytest.mark.parametrize("size", ["0", "big", "64x0", "-3"])
def test_a_size_that_is_none_is_bad_use(folder, size, capsys):
    assert run(["data", "check", str(folder), f"--size={size}"]) == 2
    assert "write 512 or 768x512" in capsys.readouterr().err
