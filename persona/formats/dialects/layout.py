"""Whether a file's two-dimensional LoRA factors are stored in Paddle's layout: down [in, rank], up [rank, out].

Markers lie (stacks/paddle.md §4.10), so modules whose weight is not square decide for the whole file; the header and
the container only when every module is square. A rank above both widths is no rank: those factors do not fit at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from persona.core.adapters.tensor import TensorRef
from persona.core.host.contracts import State
from persona.core.host.errors import UnreadableFile
from persona.formats.dialects.grammar import Group


@dataclass(frozen=True)
class Layout:
    """The decision for a file, and what to tell the user about it."""

    paddle: bool
    notes: tuple[str, ...] = ()


def decide_layout(groups: Iterable[Group], state: State) -> Layout:
    """Torch or Paddle layout for a whole file. Raises UnreadableFile when its modules contradict each other."""
    tensors = state.tensors
    pairs = [pair for pair in (_pair(group, tensors) for group in groups) if pair is not None]
    torch = sum(d[0] == u[1] and d[1] != u[0] and d[0] <= max(d[1], u[0]) for d, u in pairs)
    paddle = sum(d[1] == u[0] and d[0] != u[1] and d[1] <= max(d[0], u[1]) for d, u in pairs)
    marked = _marked(state)
    if torch and paddle:
        raise UnreadableFile(
            f"{torch} modules are laid out as torch does, [rank, in], and {paddle} as Paddle does, [in, rank]."
        )
    if torch or paddle:
        return Layout(bool(paddle), _disagreement(bool(paddle), marked, state))
    narrow_torch = sum(d[0] < d[1] for d, _ in pairs)
    narrow_paddle = sum(d[1] < d[0] for d, _ in pairs)
    if narrow_torch == narrow_paddle:
        return Layout(bool(marked))
    found = narrow_paddle > narrow_torch
    note = "every weight is square, so the smaller side of a factor was taken for its rank"
    return Layout(found, (note, *_disagreement(found, marked, state)) if marked not in (None, found) else ())


def _pair(group: Group, tensors: Mapping[str, TensorRef]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if not {"down", "up"} <= set(group.keys):
        return None
    down, up = tensors[group.keys["down"]].shape, tensors[group.keys["up"]].shape
    return (down, up) if len(down) == 2 and len(up) == 2 else None


def _marked(state: State) -> bool | None:
    """What the file says about itself: Paddle, torch, or nothing."""
    if state.container == "paddle" or state.metadata.get("format") == "pd":
        return True
    return False if state.metadata.get("format") == "pt" else None


def _disagreement(paddle: bool, marked: bool | None, state: State) -> tuple[str, ...]:
    if marked is None or marked == paddle:
        return ()
    says = f"header says format {state.metadata['format']}" if "format" in state.metadata else "container is Paddle's"
    return (f"the {says}, but the tensors are in {'Paddle' if paddle else 'torch'} layout; the tensors were believed",)
