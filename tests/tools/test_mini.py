"""The embedded base model: a folder every framework reads, and the maker's pictures, captions and tokenizer."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the maker is a program beside the package, not a part of it

from tools.mini import pictures  # noqa: E402
from tools.mini import tokenizer as maker_tokenizer  # noqa: E402

MODEL = ROOT / "persona" / "assets" / "mini"

# What a config may hold: the parameters of __init__ that diffusers 0.42.1 (models/unets/unet_2d_condition.py,
# models/autoencoders/autoencoder_kl.py, schedulers/scheduling_ddim.py), ppdiffusers 0.29.0
# (models/unet_2d_condition.py, models/autoencoder_kl.py, schedulers/scheduling_ddim.py) and mindone 0.3.0 (its port of
# diffusers) have in common.
UNET = {
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "only_cross_attention", "block_out_channels",
    "layers_per_block", "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn", "norm_num_groups",
    "norm_eps", "cross_attention_dim", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
    "encoder_hid_dim", "encoder_hid_dim_type", "attention_head_dim", "num_attention_heads",
    "dual_cross_attention", "use_linear_projection", "class_embed_type", "addition_embed_type",
    "addition_time_embed_dim", "num_class_embeds", "upcast_attention", "resnet_time_scale_shift",
    "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_type", "time_embedding_dim",
    "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel",
    "projection_class_embeddings_input_dim", "attention_type", "class_embeddings_concat",
    "mid_block_only_cross_attention", "cross_attention_norm", "addition_embed_type_num_heads",
}  # fmt: skip
# Not mid_block_add_attention: ppdiffusers does not know it and always has it.
AUTOENCODER = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "act_fn", "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor",
    "latents_mean", "latents_std", "force_upcast", "use_quant_conv", "use_post_quant_conv",
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "clip_sample",
    "set_alpha_to_one", "steps_offset", "prediction_type", "thresholding", "dynamic_thresholding_ratio",
    "clip_sample_range", "sample_max_value", "timestep_spacing", "rescale_betas_zero_snr",
}  # fmt: skip
# transformers 4.46 (mindone's) and 5 CLIPTextConfig, paddlenlp 2.8.1 transformers/clip/configuration.py, and the fields
# of every PretrainedConfig.
TEXT_ENCODER = {
    "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
    "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout",
    "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id", "architectures",
    "model_type", "torch_dtype",
}  # fmt: skip
BLOCKS = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn"}


def config(path: str) -> dict[str, object]:
    """A JSON file of the model folder."""
    values: dict[str, object] = json.loads((MODEL / path).read_text(encoding="utf-8"))
    return values


def options(path: str) -> set[str]:
    """The names of a config's options, without the class and version diffusers writes."""
    return {name for name in config(path) if not name.startswith("_")}


def header(path: str) -> dict[str, dict[str, object]]:
    """A safetensors header, read by hand: eight bytes of length, then JSON."""
    with (MODEL / path).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        values: dict[str, dict[str, object]] = json.loads(file.read(length))
    return values


@pytest.mark.parametrize(
    ("path", "known", "required"),
    [
        ("unet/config.json", UNET, {"block_out_channels", "attention_head_dim", "cross_attention_dim"}),
        ("vae/config.json", AUTOENCODER, {"scaling_factor", "latent_channels", "norm_num_groups"}),
        ("scheduler/scheduler_config.json", SCHEDULER, SCHEDULER),
        ("text_encoder/config.json", TEXT_ENCODER, TEXT_ENCODER),
    ],
)
def test_configs_hold_only_options_that_the_three_frameworks_know(
    path: str, known: set[str], required: set[str]
) -> None:
    assert options(path) <= known
    assert required <= options(path)


def test_unet_has_blocks_that_the_three_frameworks_have() -> None:
    unet = config("unet/config.json")
    assert {*unet["down_block_types"], *unet["up_block_types"], unet["mid_block_type"]} <= BLOCKS  # type: ignore[misc]


def test_scheduler_states_the_schedule_the_model_was_trained_with() -> None:
    scheduler = config("scheduler/scheduler_config.json")
    assert scheduler["_class_name"] == "DDIMScheduler"
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["beta_schedule"]) == (
        0.00085,
        0.012,
        "scaled_linear",
    )
    assert (scheduler["prediction_type"], scheduler["num_train_timesteps"]) == ("v_prediction", 1000)
    assert (scheduler["clip_sample"], scheduler["set_alpha_to_one"], scheduler["steps_offset"]) == (False, False, 1)


def test_parts_fit_together() -> None:
    unet, vae, text = config("unet/config.json"), config("vae/config.json"), config("text_encoder/config.json")
    assert unet["in_channels"] == unet["out_channels"] == vae["latent_channels"] == 16
    assert (unet["sample_size"], vae["sample_size"], vae["block_out_channels"]) == (8, 64, [16, 32, 64, 96])
    assert unet["cross_attention_dim"] == text["hidden_size"]
    vocabulary = config("tokenizer/vocab.json")
    assert text["vocab_size"] == len(vocabulary)
    assert config("tokenizer/tokenizer_config.json")["model_max_length"] == text["max_position_embeddings"] == 24
    assert text["bos_token_id"] == vocabulary["<|startoftext|>"] == len(vocabulary) - 2
    assert text["eos_token_id"] == text["pad_token_id"] == vocabulary["<|endoftext|>"] == len(vocabulary) - 1


def test_folder_is_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 24_000_000


def test_text_encoder_keeps_the_prefix_without_which_other_frameworks_load_random_weights() -> None:
    # Measured: transformers 5 writes no prefix; paddlenlp 2.8.1 and mindone 0.3.0 only warn of "newly initialized".
    names = set(header("text_encoder/model.safetensors")) - {"__metadata__"}
    assert names and all(name.startswith("text_model.") for name in names)


@pytest.mark.parametrize(
    "path",
    [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_weights_are_half_precision_in_the_layout_of_torch(path: str) -> None:
    entries = header(path)
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert {entry["dtype"] for entry in entries.values()} == {"F16"}


def test_card_names_the_font_its_licence_and_where_it_comes_from() -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    for words in ("Noto Color Emoji", "SIL Open", "fonts-noto-color-emoji"):
        assert words in card


def test_transformers_reads_the_tokenizer_as_its_maker_does() -> None:
    transformers = pytest.importorskip("transformers", reason="needs pip install 'persona[torch]'")
    theirs = transformers.CLIPTokenizer.from_pretrained(MODEL / "tokenizer", local_files_only=True)
    ours = maker_tokenizer.read_tokenizer(MODEL / "tokenizer")
    texts = [
        "a red apple on a blue background",
        "a jack-o-lantern, on a WHITE   background",
        "clock face two-thirty",
        "a photo of sks robot's friend",
        "一只 <cat-toy> ünïcode 42",
        "",
    ]
    for text in texts:
        encoded = theirs(text, padding="max_length", truncation=True, max_length=24).input_ids
        assert encoded == ours.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.start, ours.end, ours.end)
    assert theirs.decode(theirs(texts[0]).input_ids, skip_special_tokens=True) == texts[0]


def test_every_word_of_the_captions_is_one_token() -> None:
    ours = maker_tokenizer.read_tokenizer(MODEL / "tokenizer")
    words = "a an on background red green cyan apple face robot dog strawberry locomotive grinning thirty"
    for word in words.split():
        assert len(ours.encode_word(word)) == 1, word
    assert len(ours.encode_word("zyxwv")) > 1  # any other word is spelt out, not unknown


def test_every_byte_has_a_token() -> None:
    # From OpenAI's clip/simple_tokenizer.py: 188 printable bytes stand for themselves, the others start at U+0100.
    alphabet = maker_tokenizer.byte_alphabet()
    assert len(set(alphabet.values())) == 256
    assert (alphabet[ord("a")], alphabet[0], alphabet[ord(" ")]) == ("a", "Ā", "Ġ")


def test_merges_make_each_word_whole_and_start_with_what_is_frequent() -> None:
    made = maker_tokenizer.make_tokenizer(["low lower", "low"])
    assert made.merges[:2] == (("l", "o"), ("lo", "w</w>"))
    assert [len(made.encode_word(word)) for word in ("low", "lower", "lo")] == [1, 1, 2]
    assert (made.start, made.end) == (len(made.ids) - 2, len(made.ids) - 1)


def test_captions_say_what_a_person_would_say() -> None:
    assert pictures.with_article("red apple") == "a red apple"
    assert pictures.with_article("owl") == "an owl"
    assert pictures.with_article("unicorn face") == "a unicorn face"
    assert pictures.with_article("eyes") == "eyes"
    assert pictures.with_article("cactus") == "a cactus"
    captions = {pictures.caption("red apple", "orange", np.random.default_rng(seed)) for seed in range(100)}
    assert captions == {
        "",
        "red apple",
        "a red apple",
        "red apple on an orange background",
        "a red apple on an orange background",
    }


def test_pictograms_are_single_pictures() -> None:
    assert pictures.is_pictogram("🍎")
    # A skin tone, a flag letter, joiners, a blank.
    for character in (
        "\U0001f3fd",
        "\U0001f1e6",
        "\ufe0f",
        "\u200d",
        "\u20e3",
        " ",
    ):
        assert not pictures.is_pictogram(character)


@pytest.mark.skipif(not pictures.FONT_PATH.exists(), reason="needs the font of Debian's fonts-noto-color-emoji")
def test_glyphs_are_drawn_where_and_on_what_the_composition_says() -> None:
    glyphs = {glyph.name: glyph for glyph in pictures.load_glyphs()}
    assert 1300 <= len(glyphs) <= 1450
    assert "lion" in glyphs["lion face"].names
    assert not glyphs["leftwards black arrow"].mirrors and glyphs["red apple"].mirrors
    square = glyphs["large red square"]
    picture = pictures.draw(square, pictures.Composition("cyan", 44, 10, 10, mirrored=False))
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[0, 0]) == tuple(picture[63, 63]) == pictures.COLOURS["cyan"]
    red, green, blue = (int(value) for value in picture[32, 32])
    assert red > 150 > max(green, blue)


def test_diffusers_loads_every_weight_and_draws() -> None:
    torch = pytest.importorskip("torch", reason="needs pip install 'persona[torch]'")
    diffusers = pytest.importorskip("diffusers", reason="needs pip install 'persona[torch]'")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    for component, path in (
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("vae", "vae/diffusion_pytorch_model.safetensors"),
        ("text_encoder", "text_encoder/model.safetensors"),
    ):
        stored = {name.removeprefix("text_model.") for name in header(path)} - {"__metadata__"}
        loaded = {name.removeprefix("text_model.") for name in getattr(pipeline, component).state_dict()}
        assert stored == loaded
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a red apple on a blue background",
        height=64,
        width=64,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    red, green, blue = np.asarray(picture)[:3].reshape(-1, 3).mean(0)
    assert blue > 150 > max(red, green)  # the background's upper edge


@pytest.mark.skipif(not pictures.FONT_PATH.exists(), reason="needs the font of Debian's fonts-noto-color-emoji")
def test_training_the_decoder_on_leaves_the_encoder_alone(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs pip install 'persona[torch]'")
    from safetensors.numpy import load_file

    from tools.mini.autoencoder import Training
    from tools.mini.decoder import refine

    glyphs = pictures.load_glyphs()[:4]
    folder = refine(MODEL / "vae", tmp_path, Training(seconds=1, batch=2, warm_up_steps=1), glyphs, "cpu")
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(MODEL / "vae" / name), load_file(folder / name)
    assert set(before) == set(after)
    changed = {name.partition(".")[0] for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert told["scaling_factor"] == config("vae/config.json")["scaling_factor"]


def test_the_border_tells_the_background() -> None:
    pytest.importorskip("diffusers", reason="needs pip install 'persona[torch]'")
    from tools.mini.measure import background_of

    picture = np.full((64, 64, 3), (40, 90, 220), np.uint8)
    picture[4:60, 4:60] = (222, 40, 40)
    picture[0, :20] = 255  # a corner that something reaches into
    assert background_of(picture) == "blue"


@pytest.mark.skipif(not pictures.FONT_PATH.exists(), reason="needs the font of Debian's fonts-noto-color-emoji")
def test_the_nearest_drawing_is_the_picture_itself() -> None:
    pytest.importorskip("torch", reason="needs pip install 'persona[torch]'")
    from tools.mini import nearest

    glyphs = pictures.load_glyphs()[100:112]
    colours = np.array([4, 0, 4])
    asked = np.array([2, 7, 3])
    drawn = [
        nearest.centred(glyphs[glyph], list(pictures.COLOURS)[colour], 51)
        for glyph, colour in zip(asked, colours, strict=True)
    ]
    assert nearest.places(np.stack(drawn), asked, colours, glyphs).tolist() == [0, 0, 0]
    assert nearest.places(np.stack(drawn), (asked + 1) % 12, colours, glyphs).min() >= 1
