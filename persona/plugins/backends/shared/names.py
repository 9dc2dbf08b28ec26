"""The published spelling of parameters: outside a session (plans, adapters, states, files) a CLIP text encoder's names
start with `text_model.`, whatever the files and the library that reads them say."""

from __future__ import annotations

TOKEN_EMBEDDING = "text_model.embeddings.token_embedding"
_CLIP_ROOTS = ("embeddings.", "encoder.", "final_layer_norm.")
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.18


def published(component: str, stored: str) -> str:
    """The published spelling of a key `stored` in a weights file of `component`, old and flattened ones included."""
    if component.startswith("text_encoder") and stored.startswith(_CLIP_ROOTS):
        return f"text_model.{stored}"
    if component == "vae" and ".attentions." in stored:
        path, _, parameter = stored.rpartition(".")
        parent, _, last = path.rpartition(".")
        return f"{parent}.{_OLD_ATTENTION.get(last, last)}.{parameter}"
    return stored


def is_bookkeeping(name: str) -> bool:
    """Whether a stored key is a buffer that every release of the libraries makes by itself."""
    return name.endswith(".position_ids")
