"""Flat names (every `.` turned into `_`) back to dotted ones.

Substrings are never replaced in order, which is where other converters go wrong (dialects.md §3): a flat name is cut
into the longest words that the field's module names consist of. tests/formats/models checks that this agrees with
looking the name up in a dictionary of every family's inventory, in both spellings.
"""

from __future__ import annotations

import re
from functools import lru_cache

_TEXT = """
down_blocks up_blocks mid_block transformer_blocks single_transformer_blocks double_blocks single_blocks joint_blocks
context_block x_block input_blocks output_blocks middle_block time_embedding add_embedding time_embed label_emb
linear_1 linear_2 time_emb_proj conv_in conv_out conv_norm_out conv_shortcut proj_in proj_out proj_mlp to_q to_k to_v
to_out to_add_out add_q_proj add_k_proj add_v_proj norm1_context ff_context norm_out context_embedder x_embedder
in_layers out_layers emb_layers skip_connection in_layer out_layer img_attn txt_attn img_mlp txt_mlp img_mod txt_mod
img_in txt_in time_in vector_in guidance_in final_layer text_model self_attn q_proj k_proj v_proj out_proj layer_norm1
layer_norm2 final_layer_norm token_embedding position_embedding text_projection time_text_embed timestep_embedder
text_embedder guidance_embedder adaLN_modulation encoder_hid_proj layer_norm wi_0 wi_1 relative_attention_bias norm_q
norm_k norm_added_q norm_added_k query_norm key_norm ln_q ln_k t_embedder y_embedder pos_embed in_proj c_fc c_proj
ln_1 ln_2 ln_final class_embedding add_time_proj group_norm
"""
WORDS = tuple(_TEXT.split())

_WORD = re.compile("(?:" + "|".join(sorted(set(WORDS), key=len, reverse=True)) + r")(?=_|$)|[^_]+")


@lru_cache(maxsize=16384)
def unflatten(flat: str) -> str:
    """`down_blocks_0_attentions_1_proj_in` -> `down_blocks.0.attentions.1.proj_in`. Leading, trailing and doubled
    underscores, which some trainers write (dialects.md §3.3), are passed over."""
    return ".".join(_WORD.findall(flat))


def flatten(dotted: str) -> str:
    """Every `.` turned into `_`."""
    return dotted.replace(".", "_")
