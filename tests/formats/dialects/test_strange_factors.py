# ruff: noqa: E501, SIM105
"""P7: whatever shapes and keys a file pairs up, only persona's own errors come out of reading, measuring and planning."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona.core.adapters.conversion import Wishes, plan
from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State, Told
from persona.core.host.errors import PersonaError, UnreadableFile
from persona.formats.dialects.recognise import DIALECTS, recognise

MODULES = [
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.mid_block.attentions.0.proj_in",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "transformer.transformer_blocks.0.norm1_context.linear",
    "lora_unet_down_blocks_0_resnets_0_conv1",
    "lora_unet_mid_block_attentions_0_proj_in",
    "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1",
    "lora_unet_final_layer_adaLN_modulation_1",
    "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "base_model.model.down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q",
    "blocks.7.transformer_blocks.0.attn1.to_out",
    "double_blocks.0.processor.qkv_lora1",
    "nothing.known",
    "",
]
SUFFIXES = [
    ".lora_down.weight", ".lora_up.weight", ".lora_mid.weight", ".alpha", ".dora_scale", ".lora_A.weight",
    ".lora_B.weight", ".lora_B.bias", ".lora_A.default.weight", ".lora_B.default.weight", "_lora.down.weight",
    "_lora.up.weight", ".lora_magnitude_vector", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1",
    ".hada_t2", ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2", ".diff",
    ".diff_b", ".w_norm", ".b_norm", ".on_input", ".weight", ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight",
    ".oft_blocks", ".scalar", ".mindpet_delta_lora_a", ".mindpet_delta_lora_b", ".set_weight", ".lora_embedding_A",
    ".lora_embedding_B", ".ia3_l", ".down.weight", ".up.weight", "",
]  # fmt: skip
FAMILIES_OF_SUFFIXES = [
    SUFFIXES,
    SUFFIXES[:5],
    SUFFIXES[5:8],
    [*SUFFIXES[13:19], ".alpha", ".dora_scale"],
    [*SUFFIXES[19:26], ".alpha"],
]

shapes = st.one_of(
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
    st.sampled_from([(2, 4), (4, 2), (2, 4, 3, 3), (4, 2, 1, 1), (2, 2), (4, 4), (12, 2), (2, 2, 3, 3), (4,), ()]),
)
dtypes = st.sampled_from([np.float32, np.float16, np.int64, np.float64, np.uint8])


def tensor(shape: tuple[int, ...], dtype: type, fill: float) -> TensorRef:
    return in_memory(np.full(shape, fill).astype(dtype))


@st.composite
def files(draw: st.DrawFn) -> State:
    tensors = {}
    for module in draw(st.lists(st.sampled_from(MODULES), min_size=1, max_size=4, unique=True)):
        family = draw(st.sampled_from(FAMILIES_OF_SUFFIXES))
        for suffix in draw(st.lists(st.sampled_from(family), min_size=1, max_size=7, unique=True)):
            tensors[module + suffix] = tensor(draw(shapes), draw(dtypes), draw(st.sampled_from([0.0, 1.0, 3.0])))
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 99),
        st.text(max_size=4),
        st.lists(st.integers(), max_size=2),
        st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
    )
    names = st.sampled_from(
        [f"{c}.{f}" for c in ("unet", "transformer") for f in ("r", "lora_alpha", "alpha_pattern", "use_rslora")]
        + ["lora_alpha"]
    )
    metadata = {}
    if draw(st.booleans()):
        metadata["lora_adapter_metadata"] = draw(
            st.one_of(st.text(max_size=8), st.dictionaries(names, values, max_size=4).map(json.dumps))
        )
    metadata["format"] = draw(st.sampled_from(["pt", "pd", "np", "ms", ""]))
    return State(tensors, metadata, (), draw(st.sampled_from(["safetensors", "torch", "paddle", "mindspore"])))


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(files(), st.sampled_from(sorted(DIALECTS)), st.sampled_from([None, 1]))
def test_only_personas_own_errors_come_out(state: State, target: str, rank: int | None) -> None:
    for found in recognise(state)[:2]:
        try:
            adapter = found.dialect.read(state, Told())
        except PersonaError:
            continue
        for name in (deltas := adapter.deltas()):
            try:
                assert np.asarray(deltas[name]).dtype == np.float32
            except PersonaError:
                pass
        try:
            dialect = DIALECTS[target]
            slots = dialect.slots.within(dialect.slots.containers[0])
            made = plan(adapter, slots, target, wishes=Wishes(rank=rank, drop=True), fused_path=dialect.joined(adapter))
            for output in dialect.write(made.adapter):
                for ref in output.tensors.values():
                    assert ref.read().shape == ref.shape
        except PersonaError:
            pass


@pytest.mark.parametrize(("down", "up"), [((2, 320), (320, 3)), ((320, 2), (3, 320))])
def test_factors_that_share_no_rank_are_not_taken_for_the_other_frameworks_layout(
    down: tuple[int, int], up: tuple[int, int]
) -> None:
    """One common number is not enough: a rank of 320 for a weight of 3 x 2 is no rank."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": in_memory(np.ones(down, np.float32)),
        f"{name}.lora_up.weight": in_memory(np.ones(up, np.float32)),
    }
    with pytest.raises(UnreadableFile, match="rank"):
        DIALECTS["kohya"].read(State(tensors), Told())
