"""`persona convert` as it is typed."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from persona.cli import run

FIXTURES = Path(__file__).parents[1] / "fixtures"
PADDLE_WORD = FIXTURES / "paddle/ti-multi3/learned_embeds.pdparams"
LORA = FIXTURES / "torch/diffusers_sd15_unet/peft_keys_with_metadata.safetensors"


def expected_word() -> np.ndarray:
    with np.load(FIXTURES / "paddle/ti-multi3/expected.npz") as expected:
        return expected["<multi>"]


def test_the_missions_own_line_and_back(tmp_path, capsys):
    safe, back = tmp_path / "lora.safetensors", tmp_path / "back.pdparams"
    assert run(["convert", str(PADDLE_WORD), str(safe)]) == 0
    written = load_file(safe)  # the safetensors package's own reader
    assert list(written) == ["<multi>"]
    assert np.array_equal(written["<multi>"], expected_word())
    assert run(["convert", str(safe), str(back)]) == 0
    out = capsys.readouterr().out
    assert f"wrote {safe}: diffusers (safetensors)" in out
    assert "the word <multi> [3, 12] for text_encoder" in out
    from persona import read_state

    assert np.array_equal(np.asarray(read_state(back)["<multi>"]), expected_word())


def test_paddle_reads_what_was_written_as_a_plain_pickle_of_numpy_arrays(tmp_path):
    """paddle.load is pickle.load of {name: ndarray} (stacks/paddle.md §4.1): the pickle itself is checked here."""
    import pickle

    source, back = tmp_path / "word.safetensors", tmp_path / "word.pdparams"
    save_file({"<cat>": np.arange(8, dtype=np.float32).reshape(2, 4)}, source)
    assert run(["convert", str(source), str(back)]) == 0
    loaded = pickle.loads(back.read_bytes())  # made by the line above, so not hostile
    assert np.array_equal(loaded["<cat>"], np.arange(8, dtype=np.float32).reshape(2, 4))
    assert loaded["StructuredToParameterName@@"] == {"<cat>": "<cat>"}


def test_nothing_is_overwritten_unless_forced(tmp_path, capsys):
    there = tmp_path / "out.safetensors"
    there.write_bytes(b"mine")
    assert run(["convert", str(PADDLE_WORD), str(there)]) == 1
    assert there.read_bytes() == b"mine"
    assert "--force" in capsys.readouterr().err
    assert run(["convert", str(PADDLE_WORD), str(there), "--force"]) == 0
    assert list(load_file(there)) == ["<multi>"]


def test_even_force_does_not_write_over_what_is_read(tmp_path, capsys):
    source = tmp_path / "word.safetensors"
    save_file({"<cat>": np.zeros((1, 4), np.float32)}, source)
    before = source.read_bytes()
    assert run(["convert", str(source), str(source), "--force"]) == 1
    assert source.read_bytes() == before
    assert "would be lost" in capsys.readouterr().err


def test_one_bad_file_does_not_stop_the_rest_and_the_exit_code_says_so(tmp_path, capsys):
    (tmp_path / "broken.pdparams").write_bytes(b"\x80\x04garbage")
    out = tmp_path / "out"
    paths = [
        str(tmp_path / "broken.pdparams"),
        str(PADDLE_WORD),
        str(FIXTURES / "paddle/ti-single/learned_embeds.pdparams"),
    ]
    assert run(["convert", *paths, "--to", "diffusers", "--out-dir", str(out)]) == 1
    assert sorted(path.name for path in out.iterdir()) == [
        "ti-multi3_learned_embeds.safetensors",
        "ti-single_learned_embeds.safetensors",
    ]
    error = capsys.readouterr().err
    assert "2 of 3 converted; 1 failed" in error
    assert error.count("broken.pdparams") == 1


def test_stdin_and_stdout(tmp_path, capsysbinary, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PADDLE_WORD.read_bytes())))
    assert run(["convert", "-", "-"]) == 0
    captured = capsysbinary.readouterr()
    (tmp_path / "piped.safetensors").write_bytes(captured.out)
    assert np.array_equal(load_file(tmp_path / "piped.safetensors")["<multi>"], expected_word())
    assert b"/tmp" not in captured.err.replace(str(tmp_path).encode(), b"")


def test_json_says_what_was_written(tmp_path, capsys):
    out = tmp_path / "word.safetensors"
    assert run(["convert", str(PADDLE_WORD), str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == [str(out)]
    assert (told["to"], told["container"]) == ("diffusers", "safetensors")


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert run(["convert", str(PADDLE_WORD), str(tmp_path / "word.safetensors"), "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        assert run(["convert", str(PADDLE_WORD), str(tmp_path / "word.safetensors")]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "word.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("to", "keys"),
    [
        ("diffusers", {"<multi>"}),
        ("kohya", {"bundle_emb.<multi>.emb_params"}),
        ("a1111", {"emb_params"}),
        ("comfy", {"emb_params"}),
    ],
)
def test_an_embedding_in_each_tools_spelling(to, keys, tmp_path):
    out = tmp_path / "word.safetensors"
    assert run(["convert", str(PADDLE_WORD), str(out), "--to", to]) == 0
    written = load_file(out)
    assert set(written) == keys
    assert np.array_equal(next(iter(written.values())), expected_word())


def test_a_pair_for_sdxl_becomes_one_file_by_default_and_two_for_diffusers(tmp_path, capsys):
    source = tmp_path / "pair.safetensors"
    pair = {"clip_l": np.ones((2, 768), np.float16), "clip_g": np.full((2, 1280), 2, np.float16)}
    save_file(pair, source)
    one = tmp_path / "one.safetensors"
    assert run(["convert", str(source), str(one)]) == 0
    assert set(load_file(one)) == {"clip_l", "clip_g"}
    two = tmp_path / "two.safetensors"
    assert run(["convert", str(source), str(two), "--to", "diffusers"]) == 0
    assert {key: ref.shape for key, ref in load_file(two).items()} == {"pair": (2, 768)}
    assert {key: ref.shape for key, ref in load_file(tmp_path / "two_2.safetensors").items()} == {"pair": (2, 1280)}
    back = tmp_path / "back.safetensors"
    assert run(["convert", str(two), str(tmp_path / "two_2.safetensors"), str(back)]) == 0
    assert np.array_equal(load_file(back)["clip_g"], pair["clip_g"])
    assert "two_2.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nonesuch.bin", "out.safetensors"], 1, "There is no file nonesuch.bin"),
        (["WORD"], 2, "Say where the result goes"),
        (["WORD", "out.xyz"], 2, "Nothing is written as .xyz"),
        (["WORD", "out"], 2, "a file without an ending"),
        (["WORD", "no/such/folder/out.safetensors"], 1, "mkdir -p"),
        (["WORD", "out.safetensors", "--to", "safetensors"], 2, "a file format, not a dialect"),
        (["WORD", "out.safetensors", "--to", "difusers"], 2, "Did you mean diffusers"),
        (["WORD", "out.safetensors", "--dtype", "int4"], 2, "There is no dtype 'int4'"),
        (["WORD", "out.safetensors", "--alpha", "0"], 2, "above 0"),
        (["WORD", "out.safetensors", "--rank", "0"], 2, "1 or more"),
        (["WORD", "out.safetensors", "--fix", "qkv"], 2, "--fix split-qkv-alpha"),
        (["WORD", "--out-dir", "d"], 2, "--to diffusers"),
        (["LORA", "out.safetensors", "--alpha", "3"], 2, "--override-alpha"),
        (["WORD", "out.pdparams", "--to", "a1111"], 2, "not .pdparams"),
    ],
)
def test_a_mistake_gets_a_clear_line_and_leaves_nothing(arguments, code, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"WORD": str(PADDLE_WORD), "LORA": str(LORA)}
    assert run(["convert", *(places.get(word, word) for word in arguments)]) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error and "unexpected" not in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
