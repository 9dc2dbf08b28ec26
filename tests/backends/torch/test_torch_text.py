"""Prompts become the same conditioning as in diffusers' pipelines, new words included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import plan_of
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from persona.core.adapters.entry import Adapter, Embedding
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import ConversionError
from persona.core.training.plan import NewToken, NewTokens

PROMPTS = ["a photo of a cat", "", "A RED toy, on the background!", "dog " * 100]


def pipeline(base: Any) -> Any:
    cls = StableDiffusionXLPipeline if base.family == "sdxl" else StableDiffusionPipeline
    pipe = cls.from_pretrained(base.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_hidden_states_are_those_of_the_pipeline(kind: str, narrow: Any, opened: Any) -> None:
    session = opened(narrow(kind))
    ours = session.encode_text(PROMPTS)
    theirs, _ = pipeline(narrow(kind)).encode_prompt(PROMPTS, "cpu", 1, False)
    assert set(ours) == {"hidden_states"}
    np.testing.assert_allclose(ours["hidden_states"], theirs.detach().numpy(), atol=1e-5)
    assert len(session.notes) == 1 and "75 tokens" in session.notes[0], "the long prompt is cut, and that is said"


def test_sdxl_conditioning_is_that_of_the_pipeline(narrow: Any, opened: Any) -> None:
    ours = opened(narrow("sdxl")).encode_text(PROMPTS)
    hidden, _, pooled, _ = pipeline(narrow("sdxl")).encode_prompt(PROMPTS, None, "cpu", 1, False)
    assert ours["hidden_states"].shape == (4, 77, 32 + 48)
    np.testing.assert_allclose(ours["hidden_states"], hidden.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours["pooled"], pooled.detach().numpy(), atol=1e-5)


def test_a_word_of_three_vectors_reads_as_in_diffusers(narrow: Any, opened: Any) -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    session = opened(narrow("sd1"))
    embedding = Embedding("<toy>", {"text_encoder": in_memory(vectors)})
    assert session.load_adapters([(Adapter("sd1", {}, [embedding]), 1.0)]) == ["<toy> is a word of 3 vectors."]
    pipe = pipeline(narrow("sd1"))
    pipe.load_textual_inversion({"<toy>": torch.from_numpy(vectors)}, token="<toy>")
    prompts = ["a photo of <toy> on the background", "<toy>", "a cat", "two<toy>s, <toy>"]
    theirs, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    np.testing.assert_allclose(session.encode_text(prompts)["hidden_states"], theirs.detach().numpy(), atol=1e-5)


def test_sdxl_pools_at_the_end_of_the_prompt_although_a_new_word_has_a_higher_id(narrow: Any, opened: Any) -> None:
    base = narrow("sdxl")
    encoders = ("text_encoder", "text_encoder_2")
    session = opened(base, plan_of(NewTokens(encoders, (NewToken("<toy>", "cat"),), 1e-3)))
    ours = session.encode_text(["a photo of <toy> on the background"])
    # the new word starts as a copy of "cat", so the sentence means what it means with "cat"
    theirs = session.encode_text(["a photo of cat on the background"])
    for key in ("hidden_states", "pooled"):
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-6)


def test_a_placeholder_is_found_as_a_word_only(narrow: Any, opened: Any) -> None:
    session = opened(narrow("sd1"), plan_of(NewTokens(("text_encoder",), (NewToken("sks", "cat", 2),), 1e-3)))
    words = session._words["text_encoder"]
    new = [words.vocabulary, words.vocabulary + 1]
    assert words.split("a sks dog") == words.split("a") + new + words.split("dog")
    assert not set(new) & set(words.split("flasks sksx"))
    assert words.split("SKS, sks")[:2] == new, "CLIP's own tokenizer does not tell capitals apart either"


def test_a_word_for_another_model_is_refused(narrow: Any, opened: Any) -> None:
    session = opened(narrow("sdxl"))
    good = {"text_encoder": in_memory(np.zeros((1, 32), np.float32))}
    with pytest.raises(ConversionError, match="no vectors for text_encoder_2"):
        session.load_adapters([(Adapter("sd1", {}, [Embedding("<a>", good)]), 1.0)])
    wide = {"text_encoder": in_memory(np.zeros((1, 99), np.float32)), "text_encoder_2": in_memory(np.zeros((1, 48)))}
    with pytest.raises(ConversionError, match="99 wide"):
        session.load_adapters([(Adapter("sdxl", {}, [Embedding("<b>", wide)]), 1.0)])
    with pytest.raises(ConversionError, match="empty"):
        session.load_adapters([(Adapter("sdxl", {}), 1.0)])
