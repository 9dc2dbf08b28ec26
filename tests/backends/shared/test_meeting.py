"""Processes that meet at a table: threads stand for them here."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from persona.core.training.processes import PeerLost
from persona.plugins.backends.shared.meeting import MEETING, Meeting, Table


@pytest.fixture
def seats(monkeypatch: pytest.MonkeyPatch) -> list[Meeting]:
    """Of three processes at one table."""
    monkeypatch.setenv(MEETING, str(Table(3).port))
    return [Meeting(rank) for rank in range(3)]


def together(seats: list[Meeting], act: Any) -> list[Any]:
    """What every process gets from `act(its seat, its rank)`, all at once; an error as itself."""

    def caught(rank: int) -> Any:
        try:
            return act(seats[rank], rank)
        except PeerLost as error:
            return error

    with ThreadPoolExecutor(len(seats)) as pool:
        return list(pool.map(caught, range(len(seats))))


def test_everybody_gets_the_sum_round_after_round_whoever_is_late(seats: list[Meeting]) -> None:
    def act(seat: Meeting, rank: int) -> list[Any]:
        found = []
        for turn in range(20):
            time.sleep(0.002 * ((rank + turn) % 3))
            found.append(seat.sum(np.array([[rank + 0.1, turn], [1.0, 1e-17 * rank]])))
        return found

    everybody = together(seats, act)
    for turn in range(20):
        expected = np.array([[0.1 + 1.1 + 2.1, 3.0 * turn], [3.0, 1e-17 + 2e-17]])
        for found in everybody:
            np.testing.assert_array_equal(found[turn], expected)
    assert together(seats, lambda seat, rank: float(seat.sum(np.array(2.0)))) == [6.0] * 3


def test_the_others_hear_of_one_that_goes(seats: list[Meeting]) -> None:
    def act(seat: Meeting, rank: int) -> Any:
        if rank == 1:
            time.sleep(0.1)  # the others are waiting by then
            seat.leave()
            return None
        return seat.sum(np.zeros(2))

    found = together(seats, act)
    assert found[1] is None
    assert [type(error) for error in (found[0], found[2])] == [PeerLost, PeerLost]
