"""Adapters put into a base model: a new diffusers folder whose changed weights are W + Σ strength·ΔW."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from persona.core.adapters.delta import Deltas, bias_delta
from persona.core.adapters.entry import Adapter
from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import BaseModelError, ConversionError
from persona.exchange.base_weights import COMPONENTS, base_weights
from persona.formats.containers.atomic import atomic_folder, refuse_existing

Weighted = tuple[Adapter, float]


def merge_into_base(adapters: Sequence[Weighted], base: str, destination: Path) -> list[str]:
    """Write a copy of the base `base` with `adapters` merged; everything else of the folder is copied as it is. Sums in
    float32, one rounding to the dtype the base has. Returns notes. Raises ConversionError when a module has no home in
    the base, UnwritableOutput, OutputExists."""
    from persona.hub.bases import locate

    folder = locate(base)
    refuse_existing(destination)
    weights = base_weights(str(folder))
    changes = _changes(adapters, weights, base)
    with atomic_folder(destination) as building:
        written = sum(_copy_part(part, building / part.name, changes) for part in sorted(folder.iterdir()))
        if written != len(changes):
            raise BaseModelError(
                f"{base}: {len(changes) - written} of the changed weights are not in .safetensors files."
            )
    words = [one.token for adapter, _ in adapters for one in adapter.embeddings]
    notes = [f"{len(changes)} weights of {base} changed"]
    if words:
        notes.append(f"words are not part of a base model and stay outside: {', '.join(words)}")
    return notes


def _changes(adapters: Sequence[Weighted], weights: Mapping[str, object], base: str) -> dict[str, TensorRef]:
    """`component.path.weight` -> the merged tensor, calculated when it is read."""
    refs: dict[str, TensorRef] = weights.refs  # type: ignore[attr-defined]
    parts: dict[str, list[tuple[Deltas, str, float]]] = {}
    biases: dict[str, list[tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], float]]] = {}
    for adapter, strength in adapters:
        deltas = adapter.deltas(weights)
        for name in deltas:
            if f"{name}.weight" not in refs:
                raise ConversionError(
                    f"{base} has no module {name}: the adapter belongs to another base model.",
                    hint="persona inspect FILE",
                )
            parts.setdefault(name, []).append((deltas, name, strength))  # type: ignore[arg-type]
        for entry in adapter.entries.values():
            if (change := bias_delta(entry)) is not None:
                biases.setdefault(entry.name, []).append((change, strength))
    merged = {f"{name}.weight": _merged(refs[f"{name}.weight"], name, found) for name, found in parts.items()}
    for name, shifts in biases.items():
        if f"{name}.bias" not in refs:
            raise ConversionError(f"{base}: {name} has no bias, and the adapter changes it.")
        merged[f"{name}.bias"] = _shifted(refs[f"{name}.bias"], shifts)
    return merged


def _merged(ref: TensorRef, name: str, found: Sequence[tuple[Deltas, str, float]]) -> TensorRef:
    def load() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        total = np.asarray(ref).astype(np.float32)
        for deltas, module, strength in found:
            change = deltas[module]
            if change.size != total.size:
                raise ConversionError(
                    f"{name} is {list(total.shape)} in the base and {list(change.shape)} in the adapter: "
                    "it belongs to another base model."
                )
            total += np.float32(strength) * change.reshape(total.shape)
        return _rounded(total, ref, name)

    return TensorRef(ref.dtype, ref.shape, load)


def _shifted(
    ref: TensorRef, shifts: Sequence[tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], float]]
) -> TensorRef:
    def load() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        total = np.asarray(ref).astype(np.float32)
        for change, strength in shifts:
            total = total + np.float32(strength) * change
        return _rounded(total, ref, "a bias")

    return TensorRef(ref.dtype, ref.shape, load)


def _rounded(
    total: np.ndarray[tuple[int, ...], np.dtype[np.float32]], ref: TensorRef, name: str
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    with np.errstate(over="ignore"):
        result = total.astype(ref.dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        raise ConversionError(f"{name} leaves the range of {ref.dtype} when merged.", hint="Lower the strength.")
    return result


def _copy_part(source: Path, target: Path, changes: Mapping[str, TensorRef]) -> int:
    """Copy a file or component folder; weight files with changed tensors are written anew. Returns how many changed."""
    if source.is_file():
        shutil.copy2(source, target)
        return 0
    if source.name not in COMPONENTS or not any(name.startswith(f"{source.name}.") for name in changes):
        shutil.copytree(source, target)
        return 0
    target.mkdir()
    changed = 0
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            changed += _rewrite(file, target / file.name, source.name, changes)
        elif file.is_file():
            shutil.copy2(file, target / file.name)
    return changed


def _rewrite(source: Path, target: Path, component: str, changes: Mapping[str, TensorRef]) -> int:
    from persona.exchange.base_weights import canonical_name
    from persona.formats.containers.safetensors import Safetensors

    state = Safetensors().read(source)
    found = {key: canonical_name(key, component) for key in state.tensors}
    tensors = {key: changes.get(found[key], ref) for key, ref in state.tensors.items()}
    Safetensors().write(target, tensors, state.metadata)
    return sum(name in changes for name in found.values())
