"""What a base architecture consists of: a family is a few short configs, and each config generates its inventory.

An inventory lists every module with weights under diffusers' dotted paths, in registration order (dialects.md §2). No
table of a thousand names is stored; narrow models of the same topology are described by the same generators, from
their config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

Kind = Literal["linear", "conv", "group_norm", "layer_norm", "rms_norm", "embedding"]


@dataclass(frozen=True)
class Module:
    """One module with weights.

    `path` is diffusers' dotted path inside the component, `shape` that of its weight in torch layout: linear
    [out, in], conv [out, in, kh, kw], norm [width], embedding [rows, width].
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    bias: bool = True

    @property
    def kernel(self) -> tuple[int, ...]:
        """(kh, kw) of a convolution, () of anything else."""
        return self.shape[2:]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its parameters: `path.weight` and, where it has one, `path.bias`."""
        return (f"{self.path}.weight", f"{self.path}.bias") if self.bias else (f"{self.path}.weight",)


class Component(Protocol):
    """A network's config: enough to list its modules."""

    def modules(self) -> tuple[Module, ...]:
        """Every module with weights, in registration order."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Family:
    """A base architecture.

    `components` maps diffusers' component names to the configs seen under that name (SD3 comes in three sizes);
    `architecture` is its modelspec id and `base_version` what kohya's trainers write as `ss_base_model_version`.
    """

    name: str
    title: str
    components: Mapping[str, tuple[Component, ...]]
    architecture: str = ""
    base_version: str = ""

    @property
    def denoiser(self) -> str:
        """`unet` or `transformer`."""
        return "unet" if "unet" in self.components else "transformer"


@lru_cache(maxsize=64)
def inventory(component: Component) -> dict[str, Module]:
    """Path to module, in registration order. The dictionary is shared: do not change it."""
    return {module.path: module for module in component.modules()}


def linear(path: str, out: int, into: int, *, bias: bool = True) -> Module:
    """A linear layer, weight [out, into]."""
    return Module(path, "linear", (out, into), bias)


def conv(path: str, out: int, into: int, kernel: int, *, bias: bool = True) -> Module:
    """A convolution, weight [out, into, kernel, kernel]."""
    return Module(path, "conv", (out, into, kernel, kernel), bias)


def group_norm(path: str, width: int) -> Module:
    """A GroupNorm with weight and bias [width]."""
    return Module(path, "group_norm", (width,))


def layer_norm(path: str, width: int) -> Module:
    """A LayerNorm with weight and bias [width]."""
    return Module(path, "layer_norm", (width,))


def rms_norm(path: str, width: int) -> Module:
    """An RMSNorm, weight [width], no bias."""
    return Module(path, "rms_norm", (width,), bias=False)
