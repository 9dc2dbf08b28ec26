"""The core's own CLIP tokenizer against the one of transformers, which is in every environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona.plugins.backends.shared.words import CoreTokenizer
from tests.narrow_models import END, _write_tokenizer

CLIP = pytest.importorskip("transformers.models.clip.tokenization_clip", reason="transformers is not installed")

TEXTS = ("a photo of a cat", "", "A RED toy, on the background!", "red!cat ! dog", "a <|endoftext|> b", "it's 12 toys")


@pytest.mark.parametrize("pad", [END, "!"], ids=["first encoder", "second of SDXL"])
def test_ids_are_those_of_transformers_special_tokens_in_the_text_included(pad: str, tmp_path: Path) -> None:
    _write_tokenizer(tmp_path, pad)
    ours, theirs = CoreTokenizer(tmp_path), CLIP.CLIPTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert (ours.begin, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
