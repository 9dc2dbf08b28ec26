"""Several files that are one adapter: PEFT's folders by component, embeddings of two encoders, a LoRA and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from persona.core.adapters.entry import Adapter, Embedding, Source
from persona.core.host.errors import ConversionError


def join(adapters: Sequence[Adapter], path: str = "") -> Adapter:
    """One adapter with the entries and embeddings of all. Raises ConversionError when two say something about the same
    module, or belong to different families."""
    first = adapters[0]
    joined = Adapter(None, {}, metadata={}, source=first.source)
    if path and first.source:
        joined.source = Source(path, first.source.container, first.source.dialect)
    for adapter in adapters:
        where = adapter.source.path if adapter.source else "one of the sources"
        clash = joined.entries.keys() & adapter.entries.keys()
        if clash:
            raise ConversionError(
                f"{where} changes {'.'.join(min(clash))}, which another source changes too.",
                hint="To add adapters up: persona merge",
            )
        joined.entries.update(adapter.entries)
        joined.embeddings += adapter.embeddings
        joined.metadata.update({key: text for key, text in adapter.metadata.items() if key not in joined.metadata})
        joined.notes += [note for note in adapter.notes if note not in joined.notes]
        joined.leftovers += adapter.leftovers
    joined.embeddings = _by_token(joined.embeddings)
    _settle_family(joined, adapters)
    return joined


def _settle_family(joined: Adapter, adapters: Sequence[Adapter]) -> None:
    sets = [adapter.families or frozenset({adapter.family} if adapter.family else ()) for adapter in adapters]
    common = frozenset.intersection(*told) if (told := [one for one in sets if one]) else frozenset()
    if told and not common:
        named = " and ".join(dict.fromkeys("/".join(sorted(one)) for one in told))
        raise ConversionError(f"The sources belong to different base models: {named}.")
    joined.families = common
    joined.family = next(iter(common)) if len(common) == 1 else None


def _by_token(embeddings: Sequence[Embedding]) -> list[Embedding]:
    """One embedding for a token, with the vectors of every encoder that some source has."""
    found: dict[str, Embedding] = {}
    for one in embeddings:
        before = found.get(one.token)
        if before is None:
            found[one.token] = one
            continue
        if before.vectors.keys() & one.vectors.keys():
            raise ConversionError(f"Two sources hold vectors for {one.token!r} and the same text encoder.")
        found[one.token] = replace(
            before, vectors={**before.vectors, **one.vectors}, origin={**before.origin, **one.origin}
        )
    return list(found.values())
