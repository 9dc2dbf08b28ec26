"""What a file is: everything persona can tell without running it and without the model it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona.core.adapters.entry import Adapter, Entry
from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import PersonaError, UnreadableFile
from persona.core.host.host import Host
from persona.exchange.load import load_adapter, open_state
from persona.exchange.places import adapter_files

LONGEST_TEXT = 300


def inspect_path(path: Path, host: Host, *, quick: bool = False) -> dict[str, Any]:
    """One file, or one adapter folder, as JSON data. `quick` reads the header only: no hashes, norms or NaN counts.
    Raises UnreadableFile for what no container knows; what is no adapter is still described."""
    if path.is_dir() and (path / "model_index.json").is_file():
        return _inspect_model_folder(path, host, quick=quick)
    files = adapter_files(path) if path.is_dir() else [path]
    states = [open_state(file, host) for file in files]
    tensors = _tensors(files, [state for _, state in states])
    found: dict[str, Any] = {
        "path": str(path),
        "files": [file.name for file in files] if path.is_dir() else [],
        "size": sum(file.stat().st_size for file in files),
        "container": states[0][0],
    }
    adapter, why_not = _adapter(path, host)
    found |= about_adapter(adapter) if adapter else about_state(states[0][1], why_not)
    if not adapter:
        found |= about_model(path, host)
    found |= about_tensors(tensors)
    found |= about_metadata(states[0][1].metadata)
    if adapter:
        from persona.exchange.consumers import verdicts

        found["tools"] = [asdict(verdict) for verdict in verdicts(adapter)]
    if not quick:
        found |= about_values(files, tensors, adapter)
    notes = adapter.notes if adapter else list(states[0][1].notes)
    return {**found, "notes": list(notes)}


def _tensors(files: Iterable[Path], states: Iterable[State]) -> dict[str, TensorRef]:
    """Every tensor of all files; names of the second and later files are marked with their file when they clash."""
    found: dict[str, TensorRef] = {}
    for file, state in zip(files, states, strict=True):
        for name, ref in state.tensors.items():
            found[name if name not in found else f"{file.parent.name}/{file.name}: {name}"] = ref
    return found


def _adapter(path: Path, host: Host) -> tuple[Adapter | None, str]:
    try:
        return load_adapter(path, host), ""
    except PersonaError as error:
        return None, error.message


def about_adapter(adapter: Adapter) -> dict[str, Any]:
    """Dialect, family, algorithms, ranks, alphas, modules and words."""
    entries = list(adapter.entries.values())
    scales = [entry.scale for entry in entries if entry.scale.origin != "not applicable"]
    kind = "adapter with words" if entries and adapter.embeddings else "adapter" if entries else "embedding"
    return {
        "kind": kind,
        "dialect": adapter.source.dialect if adapter.source else "",
        "family": adapter.family,
        "families": sorted(adapter.families),
        "family_evidence": family_evidence(adapter),
        "algorithms": dict(Counter(_algorithm(entry) for entry in entries)),
        "ranks": _counted(scale.rank for scale in scales),
        "alphas": _counted(scale.alpha for scale in scales if scale.alpha is not None),
        "alpha_from": dict(Counter(scale.origin for scale in scales)),
        "scales": _counted(round(scale.value, 6) for scale in scales),
        "modules": dict(Counter(entry.component for entry in entries)),
        "embeddings": [
            {
                "token": one.token,
                "vectors": {
                    name: {"shape": list(ref.shape), "dtype": str(ref.dtype)} for name, ref in one.vectors.items()
                },
            }
            for one in adapter.embeddings
        ],
        "leftovers": [asdict(one) for one in adapter.leftovers],
    }


def _algorithm(entry: Entry) -> str:
    """The algorithm as people call it: lora, lora (tucker), lora + dora …"""
    tucker = " (tucker)" if {"mid", "t1", "t2"} & entry.factors.keys() else ""
    convolution = " (conv)" if entry.algorithm == "lora" and _has_kernel(entry) else ""
    dora = f" + dora ({entry.magnitude.axis}put axis)" if entry.magnitude else ""
    return f"{entry.algorithm}{tucker or convolution}{dora}"


def _has_kernel(entry: Entry) -> bool:
    shape = entry.factors["down"].shape if "down" in entry.factors else ()
    return len(shape) == 4 and shape[2:] != (1, 1)


def _counted(values: Iterable[Any]) -> dict[str, int]:
    return {f"{value:g}": count for value, count in sorted(Counter(values).items())}


def family_evidence(adapter: Adapter) -> list[str]:
    """Why the family is what it is."""
    if not adapter.entries:
        widths = sorted({ref.shape[-1] for one in adapter.embeddings for ref in one.vectors.values()})
        return [f"vectors are {', '.join(map(str, widths))} wide"] if widths else []
    from persona.core.adapters.evidence import decide
    from persona.formats.models.families import FAMILIES

    return list(decide(adapter.entries.values(), FAMILIES).reasons)


def about_state(state: State, why_not: str) -> dict[str, Any]:
    """What is told about a file that is no adapter."""
    from persona.exchange.kinds import kind_of

    name, words = kind_of(state.tensors)
    texts = {key: ref.python for key, ref in state.tensors.items() if isinstance(ref.python, (str, int, float, bool))}
    return {
        "kind": name,
        "looks_like": words,
        "why_not_an_adapter": "" if words.startswith("a whole") else why_not,
        "keys": [key[:LONGEST_TEXT] for key in list(state.tensors)[:10]],
        "values": {key[:80]: value for key, value in list(texts.items())[:20]},
    }


def about_model(path: Path, host: Host) -> dict[str, Any]:
    """Family, spelling and components of a whole model; nothing when it is not one."""
    from persona.exchange.models import whole_model

    try:
        model = whole_model(path, host)
    except PersonaError:
        return {}
    if model is None:
        return {}
    return {
        "looks_like": "a whole model" if len(model.components) > 1 else f"a whole {', '.join(model.components)}",
        "why_not_an_adapter": "",
        "family": model.family,
        "spelling": model.source.dialect if model.source else "",
        "components": {name: len(parameters) for name, parameters in model.components.items()},
    }


def _inspect_model_folder(path: Path, host: Host, *, quick: bool) -> dict[str, Any]:
    """A diffusers folder as one thing; the files of its components are its files."""
    from persona.exchange.places import weight_files

    files = weight_files(path)
    if not files:
        raise UnreadableFile(f"{path} holds no weights.", hint=f"ls -R {path}")
    states = [open_state(file, host) for file in files]
    tensors = _tensors(files, [state for _, state in states])
    found: dict[str, Any] = {
        "path": str(path),
        "files": [str(file.relative_to(path)) for file in files],
        "size": sum(file.stat().st_size for file in files),
        "container": "folder",
        **about_state(states[0][1], ""),
        **about_model(path, host),
        **about_tensors(tensors),
        **about_metadata({}),
    }
    found |= {} if quick else about_values(files, tensors, None)
    return {**found, "kind": "model", "keys": [], "notes": []}


def about_tensors(tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    """How many tensors and numbers, and in which dtypes."""
    real = [ref for ref in tensors.values() if ref.python is None]
    return {
        "tensors": len(real),
        "parameters": sum(ref.nbytes // max(ref.dtype.itemsize, 1) for ref in real),
        "dtypes": dict(Counter(str(ref.dtype) for ref in real)),
    }


def about_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Trainer, base and words the text names, and the text itself, cut short."""
    from persona.exchange.origins import base_named, plain, trainer, trigger_words

    return {
        "trainer": trainer(metadata),
        "base_named": base_named(metadata),
        "trigger_words": trigger_words(metadata),
        "metadata": {plain(key, 80): plain(text, LONGEST_TEXT) for key, text in metadata.items()},
    }


def about_values(files: list[Path], tensors: Mapping[str, TensorRef], adapter: Adapter | None) -> dict[str, Any]:
    """Hashes, values that are not finite, sizes of the deltas: needs to read the whole."""
    from persona.exchange.figures import delta_norms, not_finite
    from persona.exchange.hashes import hashes

    bad = not_finite(tensors)
    digests = [hashes(file) for file in files]
    found: dict[str, Any] = {"hashes": dict(digests[0])} if len(files) == 1 else {"hashes": {}}
    if len(files) > 1:
        found["hashes_by_file"] = {f"{file.parent.name}/{file.name}": d for file, d in zip(files, digests, strict=True)}
    found["not_finite"] = {"nan": bad.nan, "infinite": bad.infinite, "tensors": list(bad.tensors)}
    found["delta_norms"] = delta_norms(adapter) if adapter else {}
    return found
