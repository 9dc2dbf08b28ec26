"""What a product says of itself, the dialects it is written in besides, and its card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from persona.api import host, load
from persona.core.adapters.entry import Adapter, Embedding, Entry, Scale
from persona.core.adapters.tensor import in_memory
from persona.core.host.errors import UsageError
from persona.core.training.plan import LowRank, NewToken, NewTokens, Picture, Stream, TrainingPlan, Weights
from persona.hub.bases import open_base
from persona.runs.about import architecture, data_hash, product_words, thumbnail
from persona.runs.card import model_card
from persona.runs.products import check_also, write_adapter, write_also

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def mini() -> Any:
    return open_base("mini")


def deltas(mini: Any, *, embeddings: bool = False) -> Adapter:
    out, width = mini.parameters["unet"][f"{PATH}.weight"].shape
    random = np.random.default_rng(0)
    factors = {
        "down": random.standard_normal((2, width), np.float32),
        "up": random.standard_normal((out, 2), np.float32),
    }
    entry = Entry(
        "unet", PATH, "lora", {name: in_memory(v) for name, v in factors.items()}, Scale(1.0, 2, origin="trained")
    )
    words = [Embedding("<toy>", {"text_encoder": in_memory(random.standard_normal((2, 192), np.float32))})]
    return Adapter("sd1", {("unet", PATH): entry}, words if embeddings else [])


def plan_of(*trains: Any, **options: Any) -> TrainingPlan:
    pictures = (Picture("/p/a.png", ("a sks toy",), sha256="a" * 64), Picture("/p/b.png", ("sks",), sha256="b" * 64))
    metadata = {"trigger": "sks toy"}
    return TrainingPlan(
        "lora", trains, (Stream("pictures", pictures),), 7, width=64, height=64, metadata=metadata, **options
    )


LOW_RANK = LowRank("unet", (PATH,), 2, 1.0, 1e-3)
TOKENS = NewTokens(("text_encoder",), (NewToken("<toy>", "robot", 2),), 1e-3)


def test_the_file_tells_base_data_word_and_hash_of_its_tensors(mini: Any, tmp_path: Path) -> None:
    """bmaltais/kohya_ss#577, willmiao/ComfyUI-Lora-Manager#147: trigger word, base and hash belong into the file."""
    words = product_words(plan_of(LOW_RANK), mini, title="My toy", steps=7)
    file = write_adapter(deltas(mini), tmp_path / "adapter.safetensors", words)
    with safe_open(file, "numpy") as opened:
        told = opened.metadata()
    assert told["modelspec.title"] == "My toy" and told["modelspec.trigger_phrase"] == "sks toy"
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora" and told["modelspec.prediction_type"] == "v"
    assert told["persona.base_hash"] == mini.hash and told["persona.data_hash"] == data_hash(plan_of(LOW_RANK))
    content = file.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert told["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    scale = next(iter(load(file).entries.values())).scale
    assert (scale.alpha, scale.rank) == (1.0, 2), "alpha is not lost on the way"


def test_the_same_run_gives_the_same_bytes(mini: Any, tmp_path: Path) -> None:
    words = product_words(plan_of(LOW_RANK), mini, title="t", steps=7)
    one = write_adapter(deltas(mini), tmp_path / "one.safetensors", words)
    two = write_adapter(deltas(mini), tmp_path / "two.safetensors", words)
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_data_are_told_apart_by_pictures_and_captions_not_by_their_folder(mini: Any) -> None:
    plan = plan_of(LOW_RANK)

    def moved(**changed: Any) -> TrainingPlan:
        first = Picture(**{"path": "/elsewhere/x.png", "captions": ("a sks toy",), "sha256": "a" * 64, **changed})
        stream = Stream("pictures", (plan.streams[0].pictures[1], first))
        return TrainingPlan("lora", (), (stream,), 9)

    assert data_hash(moved()) == data_hash(plan)
    assert data_hash(moved(sha256="c" * 64)) != data_hash(plan) != data_hash(moved(captions=("else",)))


def test_kinds_of_products_have_their_architecture(mini: Any) -> None:
    assert architecture(plan_of(TOKENS), mini) == "stable-diffusion-v1/textual-inversion"
    assert architecture(plan_of(LOW_RANK, TOKENS), mini) == "stable-diffusion-v1/lora"
    assert architecture(plan_of(Weights("unet", 1e-4)), mini) == "stable-diffusion-v1"


def test_new_words_alone_are_one_plain_tensor_a_word(mini: Any, tmp_path: Path) -> None:
    adapter = deltas(mini, embeddings=True)
    adapter.entries.clear()
    file = write_adapter(adapter, tmp_path / "adapter.safetensors", {"persona.method": "textual-inversion"})
    assert {name: array.shape for name, array in load_file(file).items()} == {"<toy>": (2, 192)}


def test_new_words_beside_deltas_are_not_lost(mini: Any, tmp_path: Path) -> None:
    write_adapter(deltas(mini, embeddings=True), tmp_path / "adapter.safetensors", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.safetensors", "adapter_emb.safetensors"]
    assert load(tmp_path / "adapter_emb.safetensors").embeddings[0].token == "<toy>"


def test_other_dialects_mean_the_same(mini: Any, tmp_path: Path) -> None:
    adapter = deltas(mini)
    entry = adapter.entries["unet", PATH]
    expected = 0.5 * entry.factors["up"].read().astype(np.float64) @ entry.factors["down"].read()
    file = write_adapter(adapter, tmp_path / "adapter.safetensors", {"modelspec.title": "t"})
    for path in (*write_also(file, ("kohya", "peft"), host(), mini), *write_also(file, ("kohya",), host(), mini)):
        np.testing.assert_allclose(dict(load(path).deltas())[f"unet.{PATH}"], expected, rtol=1e-5)
    keys = load_file(tmp_path / "adapter-kohya.safetensors")
    module = f"lora_unet_{PATH.replace('.', '_')}"
    assert set(keys) == {f"{module}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert float(keys[f"{module}.alpha"]) == 1.0
    assert json.loads((tmp_path / "adapter-peft" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize(
    ("dialect", "kinds", "said"),
    [
        ("koya", {"whole_weights": False, "words_only": False}, "no dialect called koya"),
        ("kohya", {"whole_weights": True, "words_only": False}, "no adapter"),
        ("xlabs", {"whole_weights": False, "words_only": True}, "no spelling for new words"),
    ],
)
def test_a_dialect_that_cannot_be_written_is_told_before_training(dialect: str, kinds: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_also((dialect,), host=host(), **kinds)


def test_a_thumbnail_is_a_small_jpeg_in_the_metadata(tmp_path: Path) -> None:
    import base64
    import io

    Image.new("RGBA", (1024, 512), (200, 30, 30, 255)).save(tmp_path / "p.png")
    url = thumbnail(tmp_path / "p.png")
    head, _, data = url.partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert head == "data:image/jpeg;base64" and picture.format == "JPEG" and picture.size == (256, 128)


def test_the_card_has_a_head_that_hubs_read_and_commands_that_parse(mini: Any, tmp_path: Path) -> None:
    from persona.commands.generate import generate

    file = tmp_path / "adapter.safetensors"
    card = model_card(plan_of(LOW_RANK), mini, title="My toy", product=file, prompts=("it's a sks toy",))
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["base_model"] == "mini" and told["instance_prompt"] == "sks toy" and "lora" in told["tags"]
    import shlex

    line = next(line for line in body.splitlines() if line.startswith("persona generate"))
    context = generate.make_context("generate", shlex.split(line)[2:])
    assert context.params["prompts"] == ("it's a sks toy",) and context.params["adapters"] == ("adapter.safetensors",)
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "load_lora_weights('adapter.safetensors')" in code
    both = model_card(plan_of(LOW_RANK, TOKENS), mini, title="t", product=file, prompts=())
    assert "--adapter adapter.safetensors --adapter adapter_emb.safetensors" in both
    whole = model_card(plan_of(Weights("unet", 1e-4)), mini, title="t", product=tmp_path / "model", prompts=())
    assert "--base ." in whole and "persona convert" not in whole
