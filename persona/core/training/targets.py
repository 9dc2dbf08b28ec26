"""From target patterns to module paths. The modules are read off the base's stored parameter names and shapes, so the
same code serves every family, narrow models and models we have never seen."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

from persona.core.host.errors import UsageError, did_you_mean
from persona.core.training.base import Base, ParameterShape

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""What LoRA trains in a denoiser unless told otherwise, as diffusers' and kohya's scripts do."""
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The same for a CLIP text encoder."""


def linear_modules(parameters: Mapping[str, ParameterShape]) -> dict[str, tuple[int, ...]]:
    """Modules a low-rank delta fits on: those with a 2-D (linear) or 4-D (convolution) weight that are not embeddings
    or norms. Path -> shape of the weight."""
    found = {}
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and len(parameter.shape) in (2, 4) and "embedding" not in path.rsplit(".", 1)[-1]:
            found[path] = parameter.shape
    return found


def matches(path: str, pattern: str) -> bool:
    """Whether a pattern names a module: its last parts (`to_q`, `attn2.to_k`), a full path, or a wildcard over the
    whole path (`down_blocks.*.attn1.*`)."""
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")
    return path == pattern or path.endswith(f".{pattern}")


def names(component: str, path: str, pattern: str) -> bool:
    """Whether a pattern names a module, with or without its component in front."""
    return matches(path, pattern) or matches(f"{component}.{path}", pattern)


def resolve_targets(base: Base, component: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """The module paths of `component` that the patterns name, in the model's order. Raises UsageError for a pattern
    that names nothing, with the nearest names."""
    modules = linear_modules(base.parameters[component])
    for pattern in patterns:
        if not any(matches(path, pattern) for path in modules):
            raise UsageError(
                f"The target {pattern} names no module of {component}. {did_you_mean(pattern, _names(modules))}",
                hint="Attention layers are the default: leave --target out, or give for example --target to_q",
            )
    return tuple(path for path in modules if any(matches(path, pattern) for pattern in patterns))


def _names(modules: Iterable[str]) -> list[str]:
    """What can be typed as a target, shortest first: the last part, the last two, the whole path; no bare numbers."""
    found: dict[str, None] = {}
    for parts in (1, 2, 99):
        found |= dict.fromkeys(".".join(path.rsplit(".", parts)[-parts:]) for path in modules)
    return [name for name in found if not name[0].isdigit()]


def resolve_weights(base: Base, component: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """The modules of `component`, outermost first, that the patterns name, for training their whole weights: every
    weight below them is trained. Raises UsageError for a pattern that names nothing, with the nearest names."""
    parents = dict.fromkeys(path for name in base.parameters[component] for path in _ancestors(name.rpartition(".")[0]))
    found: dict[str, None] = {}
    for pattern in patterns:
        named = [path for path in parents if matches(path, pattern)]
        if not named:
            endings = {path.rsplit(".", 1)[-1] for path in parents}
            raise UsageError(
                f"The target {pattern} names no module of {component}. {did_you_mean(pattern, endings)}",
                hint="Leave --target out to train all of it, or give for example --target attn2",
            )
        found |= dict.fromkeys(named)
    return tuple(path for path in found if not any(path.startswith(f"{other}.") for other in found))


def _ancestors(path: str) -> list[str]:
    """a, a.b, a.b.c for a.b.c."""
    parts = path.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def check_rank(base: Base, component: str, targets: Sequence[str], rank: int) -> None:
    """Raises UsageError when `rank` is above the width of a target: a larger one can hold nothing more."""
    modules = linear_modules(base.parameters[component])
    for path in targets:
        shape = modules[path]
        widest = min(shape[0], shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1))
        if rank > widest:
            raise UsageError(
                f"Rank {rank} is above the width {widest} of {component}.{path}.",
                hint=f"Take at most --rank {widest}, or name layers without it: --target PATTERN",
            )
