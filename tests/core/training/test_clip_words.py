"""The framework-free reading of a CLIP vocabulary, against transformers' own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from persona.core.host.errors import BaseModelError
from persona.core.training.clip_words import ClipWords
from persona.hub.registry import packaged

FOLDER = packaged("assets/mini/tokenizer")
OURS, THEIRS = ClipWords.read(FOLDER), CLIPTokenizer.from_pretrained(str(FOLDER))

TEXTS = (
    "a red apple on a blue background",
    "A Photo of the  robot's toy, 1024 pixels!!",
    "it's we'll they've I'd i'm you're don't 'tis",
    "<cat-toy> and 猫の絵 in the style of Ünïcödé — ½ x² ﬁ…",
    "don''t ''s 's",
    "smörgåsbord\n\tnaïve façade",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_splits_as_transformers_splits_it(text: str) -> None:
    assert OURS.split(text) == THEIRS.tokenize(text)
    assert OURS.ids(text) == THEIRS(text, add_special_tokens=False).input_ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Co", "Cc", "Cf")), max_size=24))
def test_any_text_splits_as_transformers_splits_it(text: str) -> None:
    if "<|" not in text:
        assert OURS.split(text) == THEIRS.tokenize(text)


def test_a_folder_without_a_vocabulary_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"has no CLIP vocabulary.*vocab\.json"):
        ClipWords.read(tmp_path)


def test_known_words_are_known_whole_only() -> None:
    assert OURS.knows("apple") and not OURS.knows("<robot>") and not OURS.knows("zxqv")
