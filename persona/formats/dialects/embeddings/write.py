"""`Embedding`s to any spelling of textual inversion: names and shapes change, bytes do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from persona.core.adapters.entry import Embedding
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import ConversionError
from persona.formats.dialects.embeddings import forms

Written = tuple[dict[str, TensorRef], dict[str, str]]


def write_embeddings(embeddings: Sequence[Embedding], form: str) -> Written:
    """Named tensors and metadata of one file in a form of `forms.FORMS`.

    Raises ConversionError when the form cannot hold these embeddings; the hint names one that can."""
    if not embeddings:
        raise ConversionError("There is no embedding to write.")
    writer = _WRITERS.get(form)
    if writer is None:
        known = ", ".join(sorted(_WRITERS))
        raise ConversionError(f"Embeddings cannot be written as {form!r}.", hint=f"Known forms: {known}.")
    described = forms.BY_NAME[form]
    if len(embeddings) > 1 and not described.several_tokens:
        raise ConversionError(
            f"{form} holds one token a file, not {len(embeddings)}: {', '.join(e.token for e in embeddings)}.",
            hint="Write diffusers or bundle, or one file for each token.",
        )
    components = _components(embeddings)
    if len(components) > 1 and not described.several_encoders:
        raise ConversionError(
            f"{form} holds the vectors of one text encoder a file, and there are {', '.join(components)}.",
            hint="Write kohya, clip-pair or bundle, or one file an encoder (learned_embeds and learned_embeds_2).",
        )
    return writer(embeddings)


def by_encoder(embeddings: Sequence[Embedding]) -> dict[str, list[Embedding]]:
    """The same embeddings, one list for each text encoder: what goes into learned_embeds, learned_embeds_2, …"""
    return {
        component: [
            replace(embedding, vectors={component: embedding.vectors[component]})
            for embedding in embeddings
            if component in embedding.vectors
        ]
        for component in _components(embeddings)
    }


def join_bundle(tensors: Mapping[str, TensorRef], embeddings: Sequence[Embedding]) -> dict[str, TensorRef]:
    """An adapter's tensors with the embeddings put beside them, as kohya and A1111 read them (`bundle_emb.…`)."""
    bundled, _ = write_embeddings(embeddings, "bundle") if embeddings else ({}, {})
    if clash := tensors.keys() & bundled.keys():
        raise ConversionError(f"The adapter has {min(clash)} already.")
    return {**tensors, **bundled}


def _components(embeddings: Sequence[Embedding]) -> list[str]:
    return sorted({component for embedding in embeddings for component in embedding.vectors})


def _token_keys(embeddings: Sequence[Embedding]) -> Written:
    tensors = {embedding.token: ref for embedding in embeddings for ref in embedding.vectors.values()}
    if len(tensors) != len(embeddings):
        raise ConversionError("Two embeddings have the same token.")
    return tensors, {"format": "pt"}


def _encoder_keys(embedding: Embedding) -> dict[str, TensorRef]:
    """clip_l, clip_g and t5; what sits where is decided as in `read`."""
    vectors = embedding.vectors
    flux = "text_encoder_2" in vectors and _width(vectors["text_encoder_2"]) == 4096
    keys = {component: key for key, component in forms.ENCODER_KEYS.items()}
    if flux:
        keys["text_encoder_2"] = "t5"
    unknown = vectors.keys() - keys.keys()
    if unknown:
        raise ConversionError(f"There is no place for the vectors of {min(unknown)}.")
    return {keys[component]: ref for component, ref in vectors.items()}


def _width(ref: TensorRef) -> int:
    return ref.shape[-1]


def _pair(embeddings: Sequence[Embedding]) -> Written:
    (embedding,) = embeddings
    found = _encoder_keys(embedding)
    if "clip_g" in found and "clip_l" not in found:
        raise ConversionError(
            f"{embedding.token} has vectors for text_encoder_2 alone; readers need both, and zeros are not neutral.",
            hint="Give the file of the other encoder too.",
        )
    return found, {"name": embedding.token, "format": "pt"}


def _kohya(embeddings: Sequence[Embedding]) -> Written:
    (embedding,) = embeddings
    if embedding.vectors.keys() == {"text_encoder"}:
        return {"emb_params": embedding.vectors["text_encoder"]}, {"name": embedding.token, "format": "pt"}
    return _pair(embeddings)


def _a1111(embeddings: Sequence[Embedding]) -> Written:
    (embedding,) = embeddings
    (ref,) = embedding.vectors.values()
    return {
        f"{forms.A1111_TOKENS}.{forms.A1111_ANY_TOKEN}": _python(265),  # CLIP's id of "*"
        f"{forms.A1111_PARAMS}.{forms.A1111_ANY_TOKEN}": ref,
        "name": _python(embedding.token),
        "step": _python(0),
    }, {}


def _mindone(embeddings: Sequence[Embedding]) -> Written:
    (embedding,) = embeddings
    if embedding.vectors.keys() != {"text_encoder"}:
        raise ConversionError(
            "MindONE's names for the second text encoder are not known.",
            hint="Write diffusers: mindone.diffusers reads it.",
        )
    ref = embedding.vectors["text_encoder"]
    count = np.asarray(ref.shape[0], np.int64)
    return {
        forms.MINDONE_SD: ref,
        forms.MINDONE_TOKEN: _python(embedding.token),
        forms.MINDONE_COUNT: TensorRef(count.dtype, (), lambda: count),
    }, {}


def _bundle(embeddings: Sequence[Embedding]) -> Written:
    tensors: dict[str, TensorRef] = {}
    for embedding in embeddings:
        name = embedding.token.replace(".", "_")  # A1111 splits at the first dot
        alone = embedding.vectors.keys() == {"text_encoder"}
        found = {"emb_params": embedding.vectors["text_encoder"]} if alone else _encoder_keys(embedding)
        for key, ref in found.items():
            whole = f"{forms.BUNDLE_PREFIX}{name}.{key}"
            if whole in tensors:
                raise ConversionError(f"Two embeddings are called {name!r}.")
            tensors[whole] = ref
    return tensors, {}


def _python(value: str | int) -> TensorRef:
    array = np.asarray(value)
    return TensorRef(array.dtype, (), lambda: array, python=value)


_WRITERS: dict[str, Callable[[Sequence[Embedding]], Written]] = {
    "diffusers": _token_keys,
    "ppdiffusers": _token_keys,
    "kohya": _kohya,
    "clip-pair": _pair,
    "a1111": _a1111,
    "mindone-ti": _mindone,
    "bundle": _bundle,
}
