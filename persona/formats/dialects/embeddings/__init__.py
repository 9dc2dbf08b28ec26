"""Textual inversion in every spelling (dialects.md §6)."""

from persona.formats.dialects.embeddings.forms import BY_NAME, FORMS, Form
from persona.formats.dialects.embeddings.read import EmbeddingReading, read_embeddings, recognise, split_bundle
from persona.formats.dialects.embeddings.write import by_encoder, join_bundle, write_embeddings

__all__ = [
    "BY_NAME",
    "FORMS",
    "EmbeddingReading",
    "Form",
    "by_encoder",
    "join_bundle",
    "read_embeddings",
    "recognise",
    "split_bundle",
    "write_embeddings",
]
