"""Plans of textual inversion, and what becomes of them on the torch backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona.core.host.errors import UsageError
from persona.core.training.plan import NewTokens, Picture
from persona.core.training.settings import TrainSettings
from persona.hub.bases import open_base
from persona.plugins.methods.textual_inversion import TextualInversion, TextualInversionOptions


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def plan(base: Any, *pictures: Picture, **options: Any) -> Any:
    given = {"placeholder": ("<toy>",), "initializer": ("apple",), **options}
    return TextualInversion().plan(TextualInversionOptions(**given), TrainSettings(), base, pictures)


BARE = Picture("/photos/one.png", ())


def test_pictures_without_captions_get_the_templates_of_what_is_learned(mini: Any) -> None:
    captions = plan(mini, BARE).streams[0].pictures[0].captions
    assert "a photo of a <toy>" in captions and "a rendering of a <toy>" in captions
    style = plan(mini, BARE, learnable_property="style").streams[0].pictures[0].captions
    assert "a painting in the style of <toy>" in style and len(style) == 17
    assert "a portrait of <toy>" in plan(mini, BARE, learnable_property="face").streams[0].pictures[0].captions


def test_an_initializer_of_several_tokens_is_shown_and_gets_as_many_vectors(mini: Any) -> None:
    made = plan(mini, BARE, initializer=("apple robot",))
    assert made.trains[0].tokens[0].vectors == 2
    assert any("2 tokens (apple</w> + robot</w>); <toy> gets 2 vectors" in note for note in made.notes)


def test_an_initializer_that_does_not_fit_its_vectors_is_refused_with_its_parts(mini: Any) -> None:
    with pytest.raises(UsageError, match=r"2 tokens \(apple</w> \+ robot</w>\), and <toy> has 1 vector") as refused:
        plan(mini, BARE, initializer=("apple robot",), vectors=1)
    assert "--vectors 2" in refused.value.hint


@pytest.mark.parametrize(
    ("placeholder", "said"), [("apple", "has the word apple already"), ("two words", "not one word"), ("", "not one")]
)
def test_a_placeholder_that_is_no_new_word_is_refused(mini: Any, placeholder: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(mini, BARE, placeholder=(placeholder,))


def test_own_captions_are_used_with_the_word_put_in(mini: Any) -> None:
    told = Picture("/photos/one.png", ("a sks robot on red", "{token} {class} at home", "a <toy>"))
    assert plan(mini, told, replaces=("sks robot",)).streams[0].pictures[0].captions == (
        "a <toy> on red", "<toy> at home", "a <toy>")  # fmt: skip
    with pytest.raises(UsageError, match="does not contain <toy>") as refused:
        plan(mini, Picture("/photos/one.png", ("a dog",)))
    assert "--replaces" in refused.value.hint
    assert len(plan(mini, Picture("/p.png", ("a dog",)), captions=False).streams[0].pictures[0].captions) == 27


def test_several_words_are_told_apart_by_kohyas_folder_names(mini: Any) -> None:
    pictures = (
        Picture("/data/20_toy/a.png", ("toy",), repeats=20),
        Picture("/data/5_my cat/b.png", ("a photo of <cat> at home",), repeats=5),
    )
    made = plan(mini, *pictures, placeholder=("<toy>", "<cat>"), initializer=("robot", "cat"))
    first, second = made.streams[0].pictures
    assert "a photo of a <toy>" in first.captions and first.repeats == 20
    assert second.captions == ("a photo of <cat> at home",)
    assert [(token.placeholder, token.initializer) for token in made.trains[0].tokens] == [
        ("<toy>", "robot"), ("<cat>", "cat")]  # fmt: skip
    with pytest.raises(UsageError, match=r"nothing says which of <toy>, <cat> it shows"):
        plan(mini, BARE, placeholder=("<toy>", "<cat>"), initializer=("robot", "cat"))


def test_both_encoders_of_sdxl_get_the_word(mini: Any) -> None:
    """diffusers#8854, #7511: an SDXL embedding has to be learned and loaded for clip_l and clip_g alike."""
    two = dataclasses.replace(
        mini,
        components={**mini.components, "text_encoder_2": mini.components["text_encoder"]},
        tokenizers={**mini.tokenizers, "tokenizer_2": mini.tokenizers["tokenizer"]},
    )
    (part,) = plan(two, BARE).trains
    assert isinstance(part, NewTokens) and part.components == ("text_encoder", "text_encoder_2")


def test_rows_are_kept_short_on_the_backend(mini: Any) -> None:
    from persona.core.host.contracts import Runtime
    from persona.core.training.batch import Batch
    from persona.plugins.backends.torch import TorchBackend

    made = plan(mini, BARE, vectors=2, norm_limit=1.2)
    session = TorchBackend().open(mini, made, Runtime("cpu"))
    try:
        table = session._components["text_encoder"].get_submodule("embeddings.token_embedding").base
        median = float(np.median(np.linalg.norm(table.weight.numpy(), axis=1)))
        ones = np.ones(1, np.float32)
        batch = Batch(
            latents=np.zeros((1, 16, 8, 8), np.float32), noise=np.ones((1, 16, 8, 8), np.float32),
            timesteps=np.array([500.0], np.float32), a=ones, s=ones, p=ones * 0, q=ones, w=ones,
            captions=("a photo of a <toy>",),
        )  # fmt: skip
        for _ in range(3):
            session.accumulate(batch)
            session.update([0.5], 0.0)
        rows = session.product().embeddings[0].vectors["text_encoder"].read()
    finally:
        session.close()
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(lengths, 1.2 * median, rtol=1e-3)  # steps of 0.5 would make them far longer
    assert not np.allclose(rows[0], rows[1]), "every vector is trained on its own"


def test_diffusers_loads_the_file_as_it_is(mini: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    from persona.core.adapters.entry import Adapter, Embedding
    from persona.core.adapters.tensor import in_memory
    from persona.runs.products import write_adapter

    rows = np.random.default_rng(0).standard_normal((2, 192)).astype(np.float32)
    adapter = Adapter("sd1", {}, [Embedding("<toy>", {"text_encoder": in_memory(rows)})])
    file = write_adapter(adapter, tmp_path / "adapter.safetensors", {})
    pipeline = StableDiffusionPipeline.from_pretrained(str(mini.path), local_files_only=True)
    pipeline.load_textual_inversion(str(file))
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<toy>", "<toy>_1"])
    weight = pipeline.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(weight[ids], rows)


@pytest.mark.parametrize("components", [("text_encoder",), ("text_encoder", "text_encoder_2")])
def test_several_words_travel_in_one_file(components: tuple[str, ...], tmp_path: Path) -> None:
    from persona.api import load
    from persona.core.adapters.entry import Adapter, Embedding
    from persona.core.adapters.tensor import in_memory
    from persona.runs.products import write_adapter

    random = np.random.default_rng(1)
    widths = {"text_encoder": 32, "text_encoder_2": 48}
    given = {
        word: {name: random.standard_normal((2, widths[name]), np.float32) for name in components}
        for word in ("<toy>", "<cat>")
    }
    words = [Embedding(word, {name: in_memory(v) for name, v in rows.items()}) for word, rows in given.items()]
    file = write_adapter(Adapter("sdxl", {}, words), tmp_path / "adapter.safetensors", {"persona.method": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
    back = load(file).embeddings
    assert {embedding.token for embedding in back} == set(given)
    for embedding in back:
        assert set(embedding.vectors) == set(components)
        for name, reference in embedding.vectors.items():
            np.testing.assert_array_equal(reference.read(), given[embedding.token][name])
