"""Which device each process of a run gets."""

from __future__ import annotations

from collections.abc import Sequence

from persona.core.host.errors import BackendMissing, UsageError


def one_each(name: str, kind: str, present: Sequence[str], count: int) -> tuple[str, ...]:
    """The device of each of `count` processes for --device `name`, which means one of `kind`: one each of those that
    are `present`, or the processor for all.

    Raises UsageError for a name that means one device, BackendMissing when so many are not there."""
    if kind == "cpu":
        return ("cpu",) * count
    if ":" in name:
        raise UsageError(f"--device {name} is one device, and --devices {count} needs {count}.",
                         hint=f"--device {kind} --devices {count}")  # fmt: skip
    there = [found for found in present if found.partition(":")[0] == kind]
    if len(there) < count:
        raise BackendMissing(
            f"{count} devices were asked for, and here there {'is' if len(there) == 1 else 'are'} {', '.join(there)}.",
            hint=f"Take what is there: --devices {len(there)}",
        )
    return tuple(there[:count])
