"""From a meaning to files: the spelling asked for, or the default of the extension."""

from __future__ import annotations

from pathlib import Path

from persona.core.adapters.entry import Adapter
from persona.core.host.errors import ConversionError, UsageError
from persona.core.host.host import Host
from persona.exchange.choices import ADAPTER_DIALECTS, EMBEDDING_FORMS, container_for
from persona.formats.containers.atomic import atomic_write
from persona.formats.dialects.embeddings import forms
from persona.formats.dialects.embeddings.write import write_embeddings


def save_adapter(adapter: Adapter, path: Path, host: Host, *, to: str | None = None, force: bool = False) -> str:
    """Write an adapter (or embeddings alone) to `path`; returns the name of the spelling. Nothing is overwritten unless
    `force`. Raises ConversionError when the spelling cannot hold it."""
    container = container_for(path, host)
    suffix = path.suffix.lower()
    if not adapter.entries:
        if not adapter.embeddings:
            raise ConversionError("There is nothing to write: no module and no embedding.")
        form = to or EMBEDDING_FORMS.get(suffix, "diffusers")
        if form in forms.BY_NAME and suffix not in forms.BY_NAME[form].suffixes:
            fitting = [known.name for known in forms.FORMS if suffix in known.suffixes and known.writable]
            raise UsageError(
                f"Embeddings spelt {form} are not kept in {suffix} files.",
                hint=f"Choose --to {' | '.join(fitting)}" if fitting else "Choose another ending",
            )
        tensors, metadata = write_embeddings(adapter.embeddings, form)
        with atomic_write(path, overwrite=force) as temporary:
            container.write(temporary, tensors, metadata)
        return form
    name = to or ADAPTER_DIALECTS.get(suffix, "diffusers")
    dialect = host.load("dialect", name)
    outputs = list(dialect.write(adapter))
    if len(outputs) != 1 or outputs[0].document is not None:
        raise UsageError(
            f"{name} is a folder of files.", hint="Choose a dialect of one file, for example --to diffusers"
        )
    with atomic_write(path, overwrite=force) as temporary:
        container.write(temporary, outputs[0].tensors, outputs[0].metadata)
    return name
