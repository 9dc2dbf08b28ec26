"""A component's folder in a diffusers base, read strictly: every weight comes from the file, or the base is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.host.errors import BaseModelError
from persona.core.training.base import Base
from persona.formats.containers.safetensors import Safetensors
from persona.plugins.backends.shared.names import is_bookkeeping, published

Array = np.ndarray[Any, np.dtype[Any]]

DEFAULT_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")


def class_name(base: Base, name: str) -> str:
    """The library class of a component: what its config says, else what every Stable Diffusion has there."""
    config = base.components[name]
    architectures = config.get("architectures") or ()
    return str(config.get("_class_name") or (architectures[0] if architectures else DEFAULT_CLASSES.get(name, "?")))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: the plain ones, else the fp16 or bf16 variant; shards in order.

    Raises BaseModelError when there are none."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            index = folder / f"{stem}.safetensors.index{variant}.json"
            if single.is_file():
                return [single]
            if index.is_file():
                table = json.loads(index.read_text(encoding="utf-8"))
                return [folder / shard for shard in sorted(set(table["weight_map"].values()))]
    pickles = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        raise BaseModelError(
            f"{folder} has its weights only as a pickle ({pickles[0]}), which is not opened here.",
            hint=f"Convert the model first: persona convert {folder.parent} {folder.parent}-safetensors",
        )
    raise BaseModelError(f"{folder} has no weights (looked for {_STEMS[0]}.safetensors and {_STEMS[1]}.safetensors).",
                         hint="Is this a diffusers folder? persona models ls lists bases that work.")  # fmt: skip


def read_weights(base: Base, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Array]]:
    """(published name, values in torch layout, as stored) of every weight of the component `name`, one at a time.

    `shapes` are the shapes its model needs, by published names, in torch layout. Raises BaseModelError for a shape
    that differs and, after the last one, for weights that are missing or unknown: a model that was filled from here
    is whole only once the iteration has ended."""
    missing, unknown = set(shapes), []
    for path in weight_files(base.folder(name)):
        for stored, reference in Safetensors().read(path).tensors.items():
            key = published(name, stored)
            if key in shapes:
                missing.discard(key)
                yield key, _fitted(base, name, key, np.asarray(reference.read()), shapes[key])
            elif not is_bookkeeping(key):
                unknown.append(stored)
    refuse_keys(base, name, "has no", missing)
    refuse_keys(base, name, "has weights nobody knows:", unknown)


def _fitted(base: Base, name: str, key: str, values: Array, wanted: tuple[int, ...]) -> Array:
    if is_pointwise(values.shape, wanted):
        return values[:, :, 0, 0]
    if values.shape != wanted:
        refuse_shape(base, name, key, values.shape, wanted)
    return values


def is_pointwise(stored: Iterable[int], wanted: Iterable[int]) -> bool:
    """Whether a linear layer is stored as the 1x1 convolution it once was, as attention in old autoencoders is."""
    return tuple(stored) == (*wanted, 1, 1) and len(tuple(wanted)) == 2


def refuse_shape(base: Base, name: str, key: str, stored: Iterable[int], wanted: Iterable[int]) -> None:
    """Raises the BaseModelError of a weight whose stored shape is not what the config makes it."""
    raise BaseModelError(f"{base.id}: {name}'s {key} is {list(stored)}, and its config makes it {list(wanted)}.",
                         hint="config.json and weights are of two models.")  # fmt: skip


def refuse_keys(base: Base, name: str, complaint: str, keys: Iterable[str]) -> None:
    """Raises BaseModelError when there are `keys` of the component `name` to complain about; up to five are named."""
    found = sorted(keys)
    if found:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise BaseModelError(f"{base.id}: {name} {complaint} {', '.join(found[:5])}{rest}.",
                             hint="Its config.json and weights do not belong together; download it again.")  # fmt: skip
