"""Files that other programs wrote, by the rows of tests/fixtures/index.json: containers and embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import PersonaError, UnreadableFile
from persona.formats.containers.open import identify, read_state
from persona.formats.dialects.embeddings import recognise

FIXTURES = Path(__file__).parent.parent / "fixtures"
ROWS: list[dict[str, Any]] = json.loads((FIXTURES / "index.json").read_text("utf-8"))
WEIGHTS = {".safetensors", ".bin", ".pt", ".ckpt", ".pdparams"}


def rows(kind: str) -> list[Any]:
    return [
        pytest.param(row, id=f"{row['file']}:{row.get('token', '')}".rstrip(":")) for row in ROWS if row["kind"] == kind
    ]


@pytest.mark.parametrize("row", rows("embedding"))
def test_embedding_has_the_vectors_its_own_framework_reads(row: dict[str, Any]) -> None:
    path = FIXTURES / row["file"]
    reading = recognise(read_state(path), file_stem=path.stem)
    assert reading is not None
    found = {embedding.token: embedding for embedding in reading.embeddings}[row["token"]]
    expected = np.load(FIXTURES / row["expected"])
    assert found.vectors.keys() == row["vectors"].keys()
    for component, key in row["vectors"].items():
        wanted = expected[key]
        assert np.array_equal(np.asarray(found.vectors[component]), wanted.reshape(-1, wanted.shape[-1]))
    assert not reading.leftovers


@pytest.mark.parametrize("row", rows("state"))
def test_state_has_the_values_its_own_framework_wrote(row: dict[str, Any]) -> None:
    path = FIXTURES / row["file"]
    tensors = read_state(path).tensors
    expected = np.load(FIXTURES / row["expected"])
    listed = path.parent / "linear_keys.txt"
    transposed = set(row.get("linear", listed.read_text().split() if listed.exists() else []))
    names_there = {torch_name: name for name, torch_name in row.get("rename", {}).items()}
    assert len(expected.files) > 0
    for name in expected.files:
        ref = tensors[names_there.get(name, name)]
        found = np.asarray(ref)
        assert ref.shape == found.shape
        assert ref.dtype == found.dtype
        found = found.T if name in transposed else found
        if found.dtype.kind == "U":
            assert found == expected[name]
        else:
            wanted = expected[name].astype(np.float64)
            np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=row.get("atol", 0))
    if "with_optimizer" not in row["file"]:  # its expected.npz leaves the optimizer's state out
        assert len(tensors) == len(expected.files)


@pytest.mark.parametrize("row", rows("refuse"))
def test_refused_in_one_clear_line(row: dict[str, Any]) -> None:
    with pytest.raises(UnreadableFile) as caught:
        read_state(FIXTURES / row["file"])
    assert Path(row["file"]).name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals_say_why() -> None:
    reasons = {
        "paddle/formats-pd33/dense_uses_eval_global.pdparams": "builtins.eval' at byte 37",
        "paddle/formats-pd26/binary_format_not_pickle.pdparams": "use_binary_format",
        "mindspore/encrypted/enc_aes_gcm.ckpt": "encrypted MindSpore checkpoint",
    }
    for file, reason in reasons.items():
        with pytest.raises(UnreadableFile, match=reason):
            read_state(FIXTURES / file)


@pytest.mark.parametrize("row", rows("readable"))
def test_readable_is_read_as_what_it_is(row: dict[str, Any]) -> None:
    path = FIXTURES / row["file"]
    tensors = read_state(path).tensors
    assert tensors
    for ref in tensors.values():
        assert np.asarray(ref).shape == ref.shape
    if "token" in row:
        reading = recognise(read_state(path), file_stem=path.stem)
        assert reading is not None
        assert [embedding.token for embedding in reading.embeddings] == [row["token"]]


def test_tensors_outside_a_plain_paddle_state_keep_their_names() -> None:
    folder = FIXTURES / "paddle/formats-pd33"
    assert list(read_state(folder / "bare_tensor.pdparams").tensors) == ["embedding_0.w_0"]
    assert list(read_state(folder / "mixed.pdparams").tensors) == ["w", "step"]
    assert "m.lst.0" in read_state(folder / "nested.pdparams").tensors


@pytest.mark.parametrize("row", [*rows("lora"), *rows("model"), *rows("state")])
def test_adapters_and_models_are_not_taken_for_embeddings(row: dict[str, Any]) -> None:
    path = FIXTURES / row["file"]
    files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
    assert files
    for file in files:
        assert recognise(read_state(file), file_stem=file.stem) is None


def test_every_weight_file_has_a_row() -> None:
    named = {FIXTURES / row[key] for row in ROWS for key in ("file", "equals") if key in row}
    for path in FIXTURES.rglob("*"):
        if path.suffix in WEIGHTS and path.is_file():
            assert path in named or named & set(path.parents), path


def test_bytes_decide_and_not_the_suffix(tmp_path: Path) -> None:
    signs = {
        "torch/kohya_sd15_linear/kohya_sd15_linear.safetensors": "safetensors",
        "torch/ti_sd15/learned_embeds.bin": "torch",
        "paddle/ti-single/learned_embeds.pdparams": "paddle",
        "mindspore/lora_fp16/lora_fp16.ckpt": "mindspore",
        "torch/ti_sd15/expected.npz": "npz",
    }
    for file, name in signs.items():
        other = tmp_path / "weights.ckpt"
        other.write_bytes((FIXTURES / file).read_bytes())
        assert identify(other).name == name


def test_every_fixture_that_is_cut_anywhere_is_refused_or_read_right(tmp_path: Path) -> None:
    """At every fiftieth of its length: persona's own error, and never a value that the whole file does not hold."""
    files = {FIXTURES / row["file"] for row in ROWS if row["kind"] in ("embedding", "state", "readable")}
    files |= {FIXTURES / "mindspore/lora_fp16/lora_fp16.ckpt", FIXTURES / "torch/peft_lora/adapter_model.safetensors"}
    for path in sorted(files):
        if path.stat().st_size > 100_000:
            continue
        whole, data = read_state(path).tensors, path.read_bytes()
        cut = tmp_path / path.name
        for part in range(50):
            cut.write_bytes(data[: len(data) * part // 50])
            try:
                tensors = read_state(cut).tensors
                values = {name: np.asarray(ref) for name, ref in tensors.items()}
            except PersonaError as error:
                assert "\n" not in str(error)
                continue
            for name, value in values.items():
                assert np.array_equal(value, np.asarray(whole[name])), (path, part, name)
