"""CLIP's own tokenizer, written beside models that came without one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from persona.core.adapters.tensor import in_memory
from persona.core.training.clip_words import ClipWords
from persona.formats.models.clip_tokenizer import clip_tokenizer, padding
from persona.formats.models.schedulers import PROBE, prediction_type, scheduler_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in clip_tokenizer("<|endoftext|>").items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


PUBLISHED = {  # openai/CLIP's README and tests, transformers' documentation of CLIPTokenizer
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "a photo of a dog": [320, 1125, 539, 320, 1929],
    "a diagram": [320, 22697],
    "hello world!": [3306, 1002, 256],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_ids(text: str, folder: Path) -> None:
    assert ClipWords.read(folder).ids(text) == PUBLISHED[text]


def test_it_is_what_transformers_reads(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs pip install 'persona[torch]'")
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder))
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (49408, 49406, 49407, 49407)
    assert theirs.model_max_length == 77
    for text in (*PUBLISHED, "naïve café 123, it's ok", "a painting by 北斎 🙂"):
        assert theirs(text).input_ids[1:-1] == ClipWords.read(folder).ids(text)


@pytest.mark.parametrize(
    ("family", "encoder", "pad"),
    [("sd1", "text_encoder", "<|endoftext|>"), ("sd2", "text_encoder", "!"), ("sdxl", "text_encoder", "<|endoftext|>"),
     ("sdxl", "text_encoder_2", "!")],
)  # fmt: skip
def test_what_it_pads_with(family: str, encoder: str, pad: str) -> None:
    files = clip_tokenizer(padding(family, encoder))
    assert json.loads(files["tokenizer_config.json"])["pad_token"] == pad


def test_what_a_model_predicts() -> None:
    flat, spread = in_memory(np.full(8, 0.02, np.float32)), in_memory(np.linspace(-1, 1, 8).astype(np.float32))
    assert prediction_type("sd1", {}, {}, {})[0] == "epsilon"
    assert prediction_type("sd2", {PROBE: flat}, {}, {})[0] == "epsilon"
    assert prediction_type("sd2", {PROBE: spread}, {}, {})[0] == "v_prediction"
    assert prediction_type("sdxl", {}, {"v_pred": flat}, {})[0] == "v_prediction"
    assert prediction_type("sd2", {PROBE: spread}, {}, {"modelspec.prediction_type": "epsilon"})[0] == "epsilon"
    assert scheduler_config("flux1", "epsilon") is None
