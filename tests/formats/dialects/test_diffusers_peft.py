"""diffusers' own dialect: names, alpha in the header, patterns (dialects.md §5.1)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from persona.core.adapters.entry import Adapter
from persona.core.adapters.tensor import in_memory
from persona.core.host.contracts import State, Told
from persona.core.host.errors import UnreadableFile, UsageError
from persona.formats.dialects.diffusers_peft import DIALECT
from persona.formats.dialects.lora_config import alpha_from, matching
from tests.formats.dialects.written import adapter_of, expected_delta, lora_entry, state_of

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def written_and_read(adapter: Adapter) -> Adapter:
    (output,) = DIALECT.write(adapter)
    return DIALECT.read(state_of(output), Told())


def test_every_layer_keeps_its_own_alpha_and_rank_through_the_header() -> None:
    entries = [
        lora_entry("unet", QUERY, 8, 8, rank=2, alpha=1.0),
        lora_entry("unet", KEY, 8, 12, rank=4, alpha=3.0),
        lora_entry("text_encoder", CLIP, 12, 12, rank=2, alpha=0.5),
    ]
    again = written_and_read(adapter_of(entries))
    for entry in entries:
        assert again.entries[(entry.component, entry.path)].scale.value == entry.scale.value
        np.testing.assert_allclose(again.deltas()[entry.name], expected_delta(entry), rtol=1e-6)


def test_the_embedded_base_whose_blocks_no_family_has_is_read_and_written() -> None:
    entries = [
        lora_entry("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 96, 96, alpha=4.0),
        lora_entry("unet", "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", 160, 192, alpha=4.0),
        lora_entry("unet", "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj", 1280, 160, alpha=4.0),
    ]
    again = written_and_read(adapter_of(entries, None))
    assert again.leftovers == []
    assert set(again.entries) == {(entry.component, entry.path) for entry in entries}
    assert again.families == {"sd1", "sd2", "wukong"}


def test_scale_one_and_one_rank_need_no_header() -> None:
    (output,) = DIALECT.write(adapter_of([lora_entry("unet", QUERY, 8, 8)]))
    assert output.metadata == {"format": "pt", "persona.family": "sd1"}
    assert sorted(output.tensors) == [f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"]


def test_the_header_names_every_component_or_none() -> None:
    """T46: a component without fields of its own would get PEFT's defaults, rank 8 and alpha 8."""
    entries = [lora_entry("unet", QUERY, 8, 8, alpha=1.0), lora_entry("text_encoder", CLIP, 12, 12)]
    (output,) = DIALECT.write(adapter_of(entries))
    fields = json.loads(output.metadata["lora_adapter_metadata"])
    assert fields["text_encoder.lora_alpha"] == 2 and fields["text_encoder.r"] == 2
    assert fields["unet.lora_alpha"] == 1 and fields["unet.target_modules"] == [QUERY]


def test_patterns_are_anchored_at_the_whole_path() -> None:
    """T13: a bare `proj_out` would also hit `single_transformer_blocks.0.proj_out`."""
    entries = [
        lora_entry("transformer", "proj_out", 8, 16, rank=4, alpha=4.0),
        lora_entry("transformer", "single_transformer_blocks.0.proj_out", 16, 80, rank=2, alpha=2.0),
        lora_entry("transformer", "single_transformer_blocks.1.proj_out", 16, 80, rank=2, alpha=2.0),
    ]
    (output,) = DIALECT.write(adapter_of(entries))
    patterns = json.loads(output.metadata["lora_adapter_metadata"])["transformer.rank_pattern"]
    assert [path for path in ("proj_out", "single_transformer_blocks.0.proj_out") if matching(patterns, path)] == [
        "proj_out"
    ]


def test_patterns_are_matched_as_peft_matches_them() -> None:
    config = {"lora_alpha": 8, "alpha_pattern": {"to_k": 2, "attn1.to_k": 4}}
    assert alpha_from(config, "a.attn1.to_k") == (2.0, "rank")  # the first pattern that matches wins
    assert alpha_from(config, "a.to_q") == (8.0, "rank")
    assert alpha_from({**config, "use_rslora": True}, "a.to_q") == (8.0, "sqrt_rank")


def test_mixed_ranks_without_alpha_all_have_scale_one() -> None:
    """T3, diffusers PR#14409: the first layer's rank is not everybody's alpha."""
    tensors = {}
    for entry in (lora_entry("unet", QUERY, 8, 8, rank=2), lora_entry("unet", KEY, 8, 12, rank=4)):
        tensors[f"{entry.name}.lora_A.weight"] = entry.factors["down"]
        tensors[f"{entry.name}.lora_B.weight"] = entry.factors["up"]
    read = DIALECT.read(State(tensors, {}), Told())
    assert [entry.scale.value for entry in read.entries.values()] == [1.0, 1.0]
    assert any("alpha = rank was assumed" in note for note in read.notes)


def test_alpha_that_was_told_fills_what_is_absent_and_contradicts_only_when_asked_to() -> None:
    entry = lora_entry("unet", QUERY, 8, 8, rank=2, alpha=1.0)
    (output,) = DIALECT.write(adapter_of([entry]))
    with pytest.raises(UsageError, match="alpha 1"):
        DIALECT.read(state_of(output), Told(alpha=4))
    told = DIALECT.read(state_of(output), Told(alpha=4, override_alpha=True)).entries[("unet", QUERY)].scale
    assert (told.value, told.origin) == (2.0, "told")
    bare = State(dict(output.tensors), {})
    assert DIALECT.read(bare, Told(alpha=4)).entries[("unet", QUERY)].scale.value == 2.0


def test_a_text_encoder_flattened_by_transformers_5_is_spelt_with_text_model() -> None:
    entry = lora_entry("text_encoder", CLIP, 12, 12)
    tensors = {
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight": entry.factors["down"],
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_B.weight": entry.factors["up"],
    }
    assert list(DIALECT.read(State(tensors, {}), Told()).entries) == [("text_encoder", CLIP)]


def test_simpletuner_keeps_alpha_in_the_header_alone() -> None:
    """T4, Comfy#12191."""
    entry = lora_entry("transformer", "transformer_blocks.0.attn.to_q", 16, 16, rank=4)
    tensors = {f"{entry.name}.lora_A.weight": entry.factors["down"], f"{entry.name}.lora_B.weight": entry.factors["up"]}
    read = DIALECT.read(State(tensors, {"transformer.lora_alpha": "8", "transformer.r": "4"}), Told())
    assert read.entries[("transformer", "transformer_blocks.0.attn.to_q")].scale.value == 2.0


def test_alpha_keys_in_a_diffusers_file_are_read_as_alpha() -> None:
    """T7, diffusers#14088."""
    entry = lora_entry("unet", QUERY, 8, 8, rank=2)
    tensors = {
        f"{entry.name}.lora_A.weight": entry.factors["down"],
        f"{entry.name}.lora_B.weight": entry.factors["up"],
        f"{entry.name}.alpha": in_memory(np.float32(1.0)),
    }
    assert DIALECT.read(State(tensors, {}), Told()).entries[("unet", QUERY)].scale.value == 0.5


def test_half_an_entry_is_refused_with_its_name() -> None:
    entry = lora_entry("unet", QUERY, 8, 8)
    with pytest.raises(UnreadableFile, match=r"attn1\.to_q"):
        DIALECT.read(State({f"{entry.name}.lora_A.weight": entry.factors["down"]}, {}), Told())


def test_a_dora_vector_travels_as_pefts_magnitude_vector() -> None:
    entry = lora_entry("unet", QUERY, 8, 8, alpha=1.0, dora="out")
    convolution = lora_entry("unet", "down_blocks.0.resnets.0.conv1", 8, 8, kernel=3, alpha=1.0, dora="out")
    (output,) = DIALECT.write(adapter_of([entry, convolution]))
    assert output.tensors[f"{entry.name}.lora_magnitude_vector"].shape == (8,)
    assert output.tensors[f"{convolution.name}.lora_magnitude_vector"].shape == (1, 8, 1, 1)
    again = DIALECT.read(state_of(output), Told())
    magnitude = again.entries[("unet", "down_blocks.0.resnets.0.conv1")].magnitude
    assert magnitude is not None and magnitude.axis == "out" and magnitude.vector.shape == (8,)
