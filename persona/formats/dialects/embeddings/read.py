"""Any spelling of textual inversion to `Embedding`s: no arithmetic, original dtype."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from persona.core.adapters.entry import Embedding, Leftover
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError
from persona.formats.dialects.embeddings import forms


@dataclass(frozen=True)
class EmbeddingReading:
    """What a file of embeddings says: its form, the embeddings, notes for the user, keys that no rule explained."""

    form: str
    embeddings: list[Embedding]
    notes: list[str] = field(default_factory=list)
    leftovers: list[Leftover] = field(default_factory=list)


def read_embeddings(state: State, *, file_stem: str) -> list[Embedding] | None:
    """The embeddings of a file, or None when it is not one of embeddings alone.

    `file_stem` names the token where the file does not. Raises ConversionError for what looks like embeddings and
    cannot be understood as such."""
    reading = recognise(state, file_stem=file_stem)
    return reading.embeddings if reading else None


def recognise(state: State, *, file_stem: str) -> EmbeddingReading | None:
    """As `read_embeddings`, with the form's name, notes and leftovers."""
    for reader in _READERS:
        reading = reader(state, file_stem)
        if reading is not None:
            _check(reading)
            return reading
    return None


def split_bundle(state: State, *, file_stem: str) -> tuple[list[Embedding], State]:
    """The embeddings that travel inside an adapter's file, and the state without them (dialects.md §6.4): keys under
    `bundle_emb.`, and cloneofsimo's tokens, which the header marks `<embed>`."""
    bundled = {key: ref for key, ref in state.tensors.items() if key.startswith(forms.BUNDLE_PREFIX)}
    marked = {key: ref for key, ref in state.tensors.items() if state.metadata.get(key) == forms.EMBED_MARK}
    if not bundled and not marked:
        return [], state
    embeddings = _bundled(bundled) + [
        _embedding(key, {_by_width(ref, file_stem): (key, ref)}) for key, ref in marked.items()
    ]
    rest = {key: ref for key, ref in state.tensors.items() if key not in bundled and key not in marked}
    metadata = {key: text for key, text in state.metadata.items() if key not in marked}
    _check(EmbeddingReading("bundle", embeddings))
    return embeddings, replace(state, tensors=rest, metadata=metadata)


# One reader a form; each gives None where the file is not its own.


def _read_a1111(state: State, stem: str) -> EmbeddingReading | None:
    prefix = forms.A1111_PARAMS + "."
    vectors = {key[len(prefix) :]: (key, ref) for key, ref in state.tensors.items() if key.startswith(prefix)}
    if forms.A1111_PARAMS in state.tensors:  # CompVis: the tensor itself in place of the dictionary
        vectors[forms.A1111_ANY_TOKEN] = (forms.A1111_PARAMS, state.tensors[forms.A1111_PARAMS])
    if not vectors:
        return None
    name = state.tensors.get("name")
    called = name.python if name is not None and isinstance(name.python, str) and name.python else stem
    embeddings = [
        _embedding(called if token == forms.A1111_ANY_TOKEN else token, {_by_width(ref, stem): (key, ref)})
        for token, (key, ref) in vectors.items()
    ]
    known = {"step", *forms.A1111_TEXTS}
    notes = [f"{key} = {ref.python}" for key, ref in state.tensors.items() if key in known and ref.python is not None]
    rest = {
        key: ref
        for key, ref in state.tensors.items()
        if key not in {k for k, _ in vectors.values()} | known and not key.startswith(forms.A1111_TOKENS)
    }
    return EmbeddingReading("a1111", embeddings, notes, _leftovers(rest, "no part of an A1111 embedding"))


def _read_by_encoder(state: State, stem: str) -> EmbeddingReading | None:
    """kohya, A1111 for SDXL, advanced DreamBooth, ai-toolkit, OneTrainer: the key says the encoder, not the token."""
    keys = state.tensors.keys()
    known = {*forms.SD12_KEYS, *forms.ENCODER_KEYS}
    if not keys & known or not all(key.removesuffix(forms.OUTPUT_SUFFIX) in known for key in keys):
        return None
    outputs = {key: ref for key, ref in state.tensors.items() if key.endswith(forms.OUTPUT_SUFFIX)}
    found = {key: ref for key, ref in state.tensors.items() if key not in outputs}
    if not found:
        return None
    token = state.metadata.get("name") or stem
    if "emp_params" in keys or outputs:
        form = "onetrainer"
    else:
        form = "kohya" if "emb_params" in keys else "clip-pair"
    notes = [] if state.metadata.get("name") else [f"no token in the file: it is called {token!r}, as the file"]
    reason = "output embeddings (OneTrainer): no other tool has a place for them"
    return EmbeddingReading(form, [_by_encoder(token, found)], notes, _leftovers(outputs, reason))


def _read_mindone(state: State, stem: str) -> EmbeddingReading | None:
    if forms.MINDONE_TOKEN not in state.tensors:
        return None
    token = state.tensors[forms.MINDONE_TOKEN].python
    tables = {key: ref for key, ref in state.tensors.items() if key.endswith(forms.MINDONE_TABLE)}
    if not isinstance(token, str) or not tables:
        return None
    words = {key: ref for key, ref in tables.items() if "position" not in key}
    vectors: dict[str, tuple[str, TensorRef]] = {}
    for key, ref in words.items():
        component = "text_encoder_2" if ".embedders.1." in key else "text_encoder"
        if component in vectors:
            raise ConversionError(f"{key} and {vectors[component][0]} are both the words of {component}.")
        vectors[component] = (key, ref)
    used = {*words, forms.MINDONE_TOKEN, forms.MINDONE_COUNT}
    rest = {key: ref for key, ref in state.tensors.items() if key not in used}
    return EmbeddingReading("mindone-ti", [_embedding(token, vectors)], [], _leftovers(rest, "not a word's vectors"))


def _read_bundle(state: State, stem: str) -> EmbeddingReading | None:
    keys = state.tensors.keys()
    marked = all(state.metadata.get(key) == forms.EMBED_MARK for key in keys)
    if not keys or not (marked or all(key.startswith(forms.BUNDLE_PREFIX) for key in keys)):
        return None
    embeddings, _ = split_bundle(state, file_stem=stem)
    return EmbeddingReading("safeloras" if marked else "bundle", embeddings)


def _read_token_keys(state: State, stem: str) -> EmbeddingReading | None:
    """diffusers, ppdiffusers, mindone.diffusers: every key is a token. A word is told by its brackets, by the file's
    name or by its width; what has none of these is no word (see `unmarked`)."""
    tensors = state.tensors
    if tensors.keys() == forms.XTI_KEYS:
        raise ConversionError(
            "These are embeddings for each layer of the UNet (kohya's XTI); no other tool reads them."
        )
    if not _shaped_as_words(state):
        return None
    named = stem.startswith(forms.LEARNED)
    guessed = [key for key in tensors if not named and not forms.is_marked(key)]
    if not all(forms.is_plausible_word(key, tensors[key]) for key in guessed):
        return None
    width = next(iter(tensors.values())).shape[-1]
    notes = [
        f"{key!r} was taken for a word because it is {width} wide, as a text encoder's are: nothing else says so"
        for key in guessed
    ]
    renamed = {}
    for key in tensors:
        renamed[key] = stem if len(tensors) == 1 and key in ("learned_embeds", "0") else key
        if renamed[key] != key:
            notes.append(f"no token in the file: it is called {stem!r}, as the file")
    embeddings = [_embedding(renamed[key], {_by_width(ref, stem): (key, ref)}) for key, ref in tensors.items()]
    return EmbeddingReading("diffusers", embeddings, notes)


def _shaped_as_words(state: State) -> bool:
    """Whether every tensor of a file could be a word by its shape and is no parameter by its name."""
    tensors = state.tensors
    return (
        0 < len(tensors) <= forms.MOST_TOKENS
        and all(forms.looks_like_a_token(key) and forms.is_vectors(ref) for key, ref in tensors.items())
        and forms.same_width(tensors.values())
    )


def unmarked(state: State) -> str | None:
    """Why a file that might hold words was not read as such, or None where it does not look like one at all."""
    if not _shaped_as_words(state):
        return None
    key, ref = next(iter(state.tensors.items()))
    if forms.is_encoders_width(ref.shape[-1]):
        return f"{key[:60]!r}, {list(ref.shape)}, has an encoder's width, but neither the name nor the length of a word"
    return (
        f"{key[:60]!r}, {list(ref.shape)}, might be a word, but no encoder that persona knows is {ref.shape[-1]} wide"
    )


_READERS: tuple[Callable[[State, str], EmbeddingReading | None], ...] = (
    _read_a1111,
    _read_mindone,
    _read_bundle,
    _read_by_encoder,
    _read_token_keys,
)


def _by_encoder(token: str, found: Mapping[str, TensorRef], prefix: str = "") -> Embedding:
    vectors: dict[str, tuple[str, TensorRef]] = {}
    for key, ref in found.items():
        component = (forms.SD12_KEYS | forms.ENCODER_KEYS)[key]
        if key == "t5" and "clip_g" not in found:
            component = "text_encoder_2"  # Flux has no clip_g
        if component in vectors:
            raise ConversionError(f"{token}: {key} and {vectors[component][0]} are both the vectors of {component}.")
        vectors[component] = (prefix + key, ref)
    return _embedding(token, vectors)


def _bundled(tensors: Mapping[str, TensorRef]) -> list[Embedding]:
    """Names may contain dots, so keys are parsed from the right (A1111 PR#13568)."""
    groups: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        name, tail = _bundle_name(key)
        groups.setdefault(name, {})[tail] = ref
    embeddings = []
    for name, found in groups.items():
        prefix = f"{forms.BUNDLE_PREFIX}{name}."
        if found.keys() <= forms.SD12_KEYS.keys() | forms.ENCODER_KEYS.keys():
            embeddings.append(_by_encoder(name, found, prefix))
            continue
        for tail, ref in found.items():
            token = tail.removeprefix(forms.A1111_PARAMS + ".")
            called = name if token in (forms.A1111_ANY_TOKEN, name) else token
            embeddings.append(_embedding(called, {_by_width(ref, ""): (prefix + tail, ref)}))
    return embeddings


def _bundle_name(key: str) -> tuple[str, str]:
    rest = key.removeprefix(forms.BUNDLE_PREFIX)
    inside = re.fullmatch(rf"(.+?)\.({forms.A1111_PARAMS}\..+)", rest)
    if inside:
        return inside[1], inside[2]
    name, dot, tail = rest.rpartition(".")
    if not dot or not name or not tail:
        raise ConversionError(f"{key} does not name an embedding inside an adapter.")
    return name, tail


def _by_width(ref: TensorRef, stem: str) -> str:
    """Which encoder a tensor without a name belongs to: only clip_g is 1,280 wide; diffusers' SDXL script puts the
    second encoder's vectors into learned_embeds_2."""
    second = ref.shape[-1:] == (forms.CLIP_G_WIDTH,) or re.match(r"learned_embeds.*_2($|[-.])", stem)
    return "text_encoder_2" if second else "text_encoder"


def _embedding(token: str, vectors: Mapping[str, tuple[str, TensorRef]]) -> Embedding:
    for key, ref in vectors.values():
        if not forms.is_vectors(ref):
            raise ConversionError(
                f"{key[:80]} cannot be an embedding: {ref.dtype} of shape {list(ref.shape)}, not [n, dim] numbers."
            )
    return Embedding(
        token,
        {component: _as_rows(ref) for component, (_, ref) in vectors.items()},
        {component: key for component, (key, _) in vectors.items()},
    )


def _as_rows(ref: TensorRef) -> TensorRef:
    """[dim] becomes [1, dim]: the same bytes."""
    if len(ref.shape) == 2:
        return ref
    shape = (1, *ref.shape)
    return TensorRef(ref.dtype, shape, lambda: ref.read().reshape(shape), ref.span)


def _leftovers(tensors: Mapping[str, TensorRef], reason: str) -> list[Leftover]:
    return [Leftover(key, ref.shape, str(ref.dtype), reason) for key, ref in tensors.items()]


def _check(reading: EmbeddingReading) -> None:
    """One token means one thing, and every encoder has one width (dialects.md §6.3)."""
    seen: set[tuple[str, str]] = set()
    widths: dict[str, int] = {}
    for embedding in reading.embeddings:
        if not embedding.token.strip() or len(embedding.token) > 4096:
            raise ConversionError("An embedding in the file has no name, or a name far too long.")
        for component, ref in embedding.vectors.items():
            if (embedding.token, component) in seen:
                raise ConversionError(f"The file holds two embeddings for {embedding.token!r} ({component}).")
            seen.add((embedding.token, component))
            if widths.setdefault(component, ref.shape[-1]) != ref.shape[-1]:
                raise ConversionError(f"{embedding.token!r} is {ref.shape[-1]} wide, another one {widths[component]}.")
            if math.prod(ref.shape[:-1]) > forms.MOST_VECTORS:
                reading.notes.append(
                    f"{embedding.token} has {ref.shape[0]} vectors; a prompt holds {forms.MOST_VECTORS}"
                )
