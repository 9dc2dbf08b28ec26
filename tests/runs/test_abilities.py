"""What a backend cannot do is refused before a run begins."""

from __future__ import annotations

from typing import Any

import pytest

from persona.core.host.errors import UsageError
from persona.core.training.processes import devices_of
from persona.runs.abilities import refuse_unable_to_sample


class Backend:
    """Knows two devices, and bf16 on the second."""

    name = "mine"

    def capabilities(self, device: str) -> dict[str, bool]:
        return {"bf16": device == "cpu"}

    def devices(self, device: str, count: int) -> tuple[str, ...]:
        return (("cuda:0" if device == "auto" else device),) * count


class OneDevice:
    """Cannot tell which."""

    name = "mine"

    def capabilities(self, device: str) -> dict[str, bool]:
        return {"bf16": False}


@pytest.mark.parametrize(
    ("backend", "device", "where"),
    [(Backend(), "auto", "on cuda:0"), (Backend(), "cuda:1", "on cuda:1"), (OneDevice(), "auto", "on auto")],
)
def test_a_refusal_names_the_device_that_was_taken(backend: Any, device: str, where: str) -> None:
    with pytest.raises(UsageError, match=f"the backend mine {where} cannot do this"):
        refuse_unable_to_sample(backend, "ddim", "bf16", device)


def test_nobody_asks_for_the_device_where_nothing_is_refused() -> None:
    refuse_unable_to_sample(Backend(), "ddim", "bf16", "cpu")


def test_a_backend_of_one_device_refuses_more() -> None:
    assert devices_of(Backend(), "cpu", 2) == ("cpu", "cpu")
    with pytest.raises(UsageError, match="The backend mine runs on one device"):
        devices_of(OneDevice(), "cpu", 2)
