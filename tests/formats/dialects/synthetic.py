"""Adapters on every family's own module names, with the real widths or with narrow ones, and seeded values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from persona.core.adapters.entry import Adapter, Entry, Scale
from persona.core.adapters.family import Component, Module
from persona.core.adapters.tensor import TensorRef
from persona.core.adapters.text_encoder import T5, Clip
from persona.core.adapters.transformer import Flux, MMDiT
from persona.core.adapters.unet import UNet
from persona.formats.models.families import FAMILIES


def narrow(config: Component) -> Component:
    """The same topology, a few numbers wide, so that ΔW costs nothing."""
    if isinstance(config, UNet):
        widths = {width: 8 * (n + 1) for n, width in enumerate(sorted(set(config.channels)))}
        channels = tuple(widths[width] for width in config.channels)
        return replace(config, channels=channels, context=12, added=20 if config.added else 0)
    if isinstance(config, Clip):
        return replace(config, width=12, intermediate=24, vocabulary=30, projection=12 if config.projection else 0)
    if isinstance(config, T5):
        return replace(config, width=12, intermediate=20, vocabulary=30, layers=4)
    if isinstance(config, MMDiT):
        return replace(config, width=12, context=10, pooled=14)
    assert isinstance(config, Flux)
    return replace(config, width=12, context=10, pooled=14)


def factor(shape: tuple[int, ...], seed: int, dtype: str) -> TensorRef:
    """Seeded normal values, made when read."""
    kind = np.dtype(dtype)
    return TensorRef(kind, shape, lambda: np.random.default_rng(seed).standard_normal(shape).astype(kind))


def lora(component: str, module: Module, *, rank: int, alpha: float | None, seed: int, dtype: str) -> Entry:
    """A LoRA entry for one module of an inventory."""
    point = (1, 1) if module.kind == "conv" else ()
    factors = {
        "down": factor((rank, *module.shape[1:]), seed, dtype),
        "up": factor((module.shape[0], rank, *point), seed + 1, dtype),
    }
    scale = Scale(alpha, rank, "rank", "assumed" if alpha is None else "told")
    return Entry(component, module.path, "lora", factors, scale, kernel=module.kernel)


def wanted(component: str, module: Module, *, convolutions: bool) -> bool:
    """What trainers put LoRA on: attention blocks and feed-forwards, with `convolutions` also resnets and samplers."""
    if module.kind not in ("linear", "conv"):
        return False
    if component == "unet":
        beyond = ("resnets.", "samplers.") if convolutions else ()
        return any(part in module.path for part in ("attentions.", *beyond))
    if component == "transformer":
        return module.kind == "linear"
    return ".layers." in module.path or ".block." in module.path


def family_adapter(
    family: str,
    *,
    rank: int = 2,
    alpha: float | None = 1.0,
    components: Iterable[str] | None = None,
    convolutions: bool = False,
    every: int = 1,
    dtype: str = "float32",
    config: int = 0,
    real: bool = False,
) -> Adapter:
    """An adapter on every `every`-th trained module of a family's components."""
    known = FAMILIES[family].components
    adapter = Adapter(family, {}, families=frozenset({family}))
    seed = 1
    for component in components or known:
        configs = known[component]
        chosen = configs[min(config, len(configs) - 1)]
        network = chosen if real else narrow(chosen)
        modules = [m for m in network.modules() if wanted(component, m, convolutions=convolutions)]
        for module in modules[::every]:
            seed += 2
            entry = lora(component, module, rank=rank, alpha=alpha, seed=seed, dtype=dtype)
            adapter.entries[(component, module.path)] = entry
    return adapter
