"""Files with adapter-like names and any shapes: read and converted, or refused with persona's own error (P7)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import persona
from persona.api import host
from persona.exchange.choices import suffix_for

PREFIXES = [
    ".",
    "unet.",
    "text_encoder.",
    "text_encoder_2.",
    "transformer.",
    "base_model.model.",
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_unet.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lycoris_",
    "bundle_emb.cat.",
    "text_encoders.clip_l.",
    "lora_transformer_",
    "module.",
]
PATHS = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "down_blocks.1.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks_0_resnets_0_norm1",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model_encoder_layers_0_mlp_fc1",
    "double_blocks_0_img_attn_qkv",
    "double_blocks.0.img_attn.qkv",
    "single_blocks_3_linear1",
    "double_blocks.0.processor.qkv_lora1",
    "transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.0.proj_mlp",
    "joint_blocks.0.x_block.attn.qkv",
    "final_layer_adaLN_modulation_1",
    "blocks.7.transformer_blocks.0.attn1.to_out",
    "emb_params",
    "clip_l",
    "nowhere",
    "",
]
SUFFIXES = [
    ".lora_down.weight",
    ".lora_up.weight",
    ".lora_mid.weight",
    ".alpha",
    ".dora_scale",
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_A.default.weight",
    ".lora_B.default.weight",
    ".lora.down.weight",
    ".lora.up.weight",
    "_lora.down.weight",
    "_lora.up.weight",
    ".lora_linear_layer.down.weight",
    ".lora_linear_layer.up.weight",
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".hada_t1",
    ".hada_t2",
    ".lokr_w1",
    ".lokr_w1_a",
    ".lokr_w1_b",
    ".lokr_w2",
    ".lokr_w2_a",
    ".lokr_w2_b",
    ".lokr_t2",
    ".diff",
    ".diff_b",
    ".w_norm",
    ".b_norm",
    ".weight",
    ".on_input",
    ".oft_blocks",
    ".a1.weight",
    ".a2.weight",
    ".b1.weight",
    ".b2.weight",
    ".scalar",
    ".lora_magnitude_vector",
    ".lora_magnitude_vector.weight",
    ".lora_B.bias",
    ".mindpet_delta_lora_a",
    ".mindpet_delta_lora_b",
    ".set_weight",
    ".down.weight",
    ".up.weight",
    ".",
]
PAIRS = [
    (".lora_down.weight", ".lora_up.weight", ".alpha"),
    (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
    (".lora_A.default.weight", ".lora_B.default.weight", ""),
    (".lora.down.weight", ".lora.up.weight", ".alpha"),
    ("_lora.down.weight", "_lora.up.weight", ""),
    (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".alpha"),
    (".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha"),
    (".mindpet_delta_lora_a", ".mindpet_delta_lora_b"),
    (".lora_down.weight", ".lora_up.weight", ".dora_scale", ".alpha"),
    (".diff", ".diff_b"),
]
DTYPES = [np.float16, np.float32, np.int32, np.bool_]
sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 12]), max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)
single = st.tuples(st.sampled_from(PREFIXES), st.sampled_from(PATHS), st.sampled_from(SUFFIXES), sizes, dtypes).map(
    lambda parts: [("".join(parts[:3]).strip("."), parts[3], parts[4])]
)


@st.composite
def module(draw):
    """The keys of one module, mostly in shapes that fit."""
    stem = draw(st.sampled_from(PREFIXES)).removeprefix(".") + draw(st.sampled_from(PATHS))
    suffixes = draw(st.sampled_from(PAIRS))
    width, rank, out = draw(st.tuples(*[st.sampled_from([1, 2, 4, 12])] * 3))
    fitting = [(rank, width), (out, rank), (rank, width), (out, rank), (), (out,), (out, 1)]
    found = []
    for number, suffix in enumerate(suffixes):
        shape = draw(sizes) if draw(st.integers(0, 7)) == 0 else fitting[number]
        shape = () if suffix == ".alpha" and len(shape) == 2 else shape
        found.append((stem + suffix, shape, draw(dtypes) if draw(st.integers(0, 9)) == 0 else np.float32))
    return found


files = st.lists(st.one_of(module(), module(), single), min_size=1, max_size=4).map(
    lambda parts: [key for part in parts for key in part]
)
metadata = st.dictionaries(
    st.sampled_from(["lora_adapter_metadata", "ss_network_dim", "ss_network_args", "ss_base_model_version", "format"]),
    st.sampled_from(['{"unet.r": 4, "unet.lora_alpha": 2}', "{}", "[]", "{", "None", "4", "sdxl_base", "pd", "np", ""]),
    max_size=2,
)


def values(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    counted = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    return np.asarray((counted % 7 / 8 - 0.25).astype(dtype))


@given(files, metadata)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_only_personas_own_error_comes_out(keys, words):
    dialects = list(host().provided("dialect"))
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.safetensors"
        save_file({key: values(shape, dtype) for key, shape, dtype in keys if key}, source, metadata=words or None)
        try:
            adapter = persona.load(source)
        except persona.PersonaError as error:
            assert "\n" not in error.message
            return
        persona.inspect(source)
        for number, dialect in enumerate(dialects):
            spoken = host().load("dialect", dialect)
            ending = "" if spoken.slots.folder else suffix_for(spoken, host())
            try:
                persona.convert(source, Path(name) / f"out{number}{ending}", to=dialect, allow_leftovers=True)
                persona.load(Path(name) / f"out{number}{ending}")
            except persona.PersonaError as error:
                assert "\n" not in error.message
        for module_name in getattr(adapter, "deltas", dict)():
            try:
                adapter.deltas()[module_name]
            except persona.PersonaError:
                continue
