"""What has to happen to an adapter so that a target can hold it: the planner, asked with the target's slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from persona.core.adapters.entry import Adapter, Entry

if TYPE_CHECKING:
    from persona.core.adapters.conversion import Plan
    from persona.exchange.save import Target


def plan_for(
    adapter: Adapter,
    target: Target,
    *,
    rank: int | None = None,
    base: Mapping[str, Any] | None = None,
    drop: bool = False,
    dtype: str | None = None,
) -> Plan:
    """The planner's answer for the slots of the target's dialect and container together, in the dtype of that name."""
    from persona.core.adapters.conversion import Wishes, plan

    if dtype is not None and _widens(adapter, dtype):
        adapter = cast(adapter, dtype)
    joined: Callable[[Adapter], Callable[[Entry], str | None]] | None = getattr(target.dialect, "joined", None)
    more: dict[str, Any] = {"fused_path": joined(adapter)} if joined is not None else {}
    if hasattr(target.dialect, "speller"):
        more["spell"] = _lazily(lambda: target.dialect.speller(adapter))
    if hasattr(target.dialect, "apart"):
        more["apart"] = target.dialect.apart
    made = plan(adapter, target.slots, target.name, wishes=Wishes(rank=rank, base=base, drop=drop), **more)
    made.adapter = cast(made.adapter, dtype)
    return made


def _lazily(make: Callable[[], Callable[[Entry], object]]) -> Callable[[Entry], object]:
    """Made at the first module that gets so far: which names a dialect has may depend on what is open otherwise."""
    made: list[Callable[[Entry], object]] = []

    def spell(entry: Entry) -> object:
        if not made:
            made.append(make())
        return made[0](entry)

    return spell


def cast(adapter: Adapter, dtype: str | None) -> Adapter:
    """The adapter in the dtype of that name, or as it is."""
    if dtype is None:
        return adapter
    from persona.exchange.casting import dtype_called, with_dtype

    return with_dtype(adapter, dtype_called(dtype))


def _widens(adapter: Adapter, dtype: str) -> bool:
    """Whether every factor gets more bits: then it is cast before anything is calculated, else after."""
    from persona.exchange.casting import dtype_called

    wanted = dtype_called(dtype).itemsize
    return all(ref.dtype.itemsize <= wanted for entry in adapter.entries.values() for ref in entry.factors.values())
