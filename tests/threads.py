"""Several processes of a run, as threads of one: what needs `Processes` and no framework is tested with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Threads:
    """Processes that are threads of this one: `sum` waits for all of them."""

    def __init__(self, count: int) -> None:
        self.count, self._held, self._meeting = count, [np.zeros(0)] * count, threading.Barrier(count)

    def seen_from(self, rank: int) -> Any:
        """One of them."""
        return _Thread(self, rank)

    def sum(self, rank: int, values: Any) -> Any:
        """Everybody's values, added."""
        self._held[rank] = np.asarray(values, np.float64)
        self._meeting.wait(10)
        total = np.sum(self._held, axis=0)
        self._meeting.wait(10)
        return total

    def each(self, work: Callable[[Any], Any]) -> list[Any]:
        """What `work` gives or raises in each."""
        found: list[Any] = [None] * self.count

        def run(rank: int) -> None:
            try:
                found[rank] = work(self.seen_from(rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class _Thread:
    def __init__(self, all_: Threads, rank: int) -> None:
        self.rank, self.count, self._all = rank, all_.count, all_

    def sum(self, values: Any) -> Any:
        return self._all.sum(self.rank, values)

    def barrier(self) -> None:
        self.sum(np.zeros(1))

    def leave(self) -> None:
        """Nothing to leave."""
