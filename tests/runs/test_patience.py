"""A sign of life while something takes long."""

from __future__ import annotations

import re
import time

import pytest

from persona.core.training.events import Event, Note
from persona.runs.patience import told_while_waiting


def test_waiting_is_told_until_it_is_over() -> None:
    seen: list[Event] = []
    with pytest.raises(ZeroDivisionError), told_while_waiting(seen.append, "compiling", every=0.02):
        until = time.monotonic() + 30
        while len(seen) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        raise ZeroDivisionError
    told = len(seen)
    assert told >= 3
    assert all(isinstance(event, Note) and re.fullmatch(r"compiling … \d+ s", event.text) for event in seen)
    time.sleep(0.1)
    assert len(seen) == told


def test_what_is_quick_is_not_told() -> None:
    seen: list[Event] = []
    with told_while_waiting(seen.append, "compiling"):
        pass
    assert seen == []
