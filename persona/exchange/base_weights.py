"""The weights of a base model by the names adapters use: `component.path` -> the weight of that module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef
from persona.core.host.errors import BaseModelError

Array = np.ndarray[Any, np.dtype[Any]]
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


class BaseWeights(Mapping[str, Array]):
    """Lazy mapping from `unet.down_blocks.….to_q` to its weight, [out, in(, kh, kw)]; `refs` has the tensors with
    their `.weight` and `.bias`."""

    def __init__(self, refs: Mapping[str, TensorRef], name: str) -> None:
        self.refs, self.name = refs, name

    def __getitem__(self, module: str) -> Array:
        return self.refs[f"{module}.weight"].read()

    def __contains__(self, module: object) -> bool:
        return f"{module}.weight" in self.refs

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".weight") for name in self.refs if name.endswith(".weight"))

    def __len__(self) -> int:
        return sum(name.endswith(".weight") for name in self.refs)


def base_weights(name: str) -> BaseWeights:
    """The weights of a base: a registry name, a diffusers folder (or one component's folder), or one weight file whose
    names are diffusers'. Raises BaseModelError."""
    path = Path(name).expanduser()
    if path.is_file():
        return BaseWeights(_named(_tensors(path), _component_of(path)), name)
    if not path.is_dir():
        from persona.hub.bases import locate

        path = locate(name)
    parts = {part: path / part for part in COMPONENTS if (path / part).is_dir()} or {_component_of(path): path}
    refs: dict[str, TensorRef] = {}
    for component, folder in parts.items():
        for file in _weight_files(folder):
            refs.update(_named(_tensors(file), component))
    if not refs:
        raise BaseModelError(f"{name} holds no weights.", hint="Give a diffusers folder, or --base mini")
    return BaseWeights(refs, name)


def _weight_files(folder: Path) -> list[Path]:
    files = [file for ending in ("*.safetensors", "*.bin", "*.pdparams") for file in sorted(folder.glob(ending))]
    plain = [file for file in files if ".fp16." not in file.name and ".non_ema." not in file.name] or files
    same_kind = [file for file in plain if file.suffix == plain[0].suffix] if plain else []
    return same_kind


def _component_of(path: Path) -> str:
    names = (path.stem, path.name, path.parent.name)
    return next((part for name in names for part in COMPONENTS if name == part), "unet")


def _tensors(file: Path) -> Mapping[str, TensorRef]:
    from persona.api import read_state

    return read_state(file)


def _named(tensors: Mapping[str, TensorRef], component: str) -> dict[str, TensorRef]:
    """Names with their component in front; text encoders spelt with `text_model.`"""
    named = {}
    for key, ref in tensors.items():
        if key.split(".")[0] in COMPONENTS:
            named[key if key.endswith((".weight", ".bias")) else f"{key}.weight"] = ref
            continue
        named[canonical_name(key, component)] = ref
    return named


def canonical_name(key: str, component: str) -> str:
    """`component.key`, with the `text_model.` that transformers 5 leaves out of CLIP's names."""
    flattened = component.startswith("text_encoder") and key.startswith(("encoder.", "embeddings.", "final_layer"))
    return f"{component}.text_model.{key}" if flattened else f"{component}.{key}"
