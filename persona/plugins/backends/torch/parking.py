"""Components that are not trained wait in main memory and come to an accelerator only while they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


class Parking:
    """Who is where. On a cpu nothing ever moves. `components` is the session's own mapping."""

    def __init__(self, components: Mapping[str, nn.Module], device: torch.device, residents: Iterable[str]) -> None:
        self._components, self._device, self._residents = components, device, frozenset(residents)
        self._visitors: set[str] = set()

    def fetch(self, names: Iterable[str]) -> None:
        """Bring components to the device; they stay until they are parked."""
        if self._device.type == "cpu":
            return
        for name in set(names) - self._residents - self._visitors:
            self._components[name].to(self._device)
            self._visitors.add(name)

    def park(self, *, keep: Iterable[str] = ()) -> None:
        """Send every visitor home but those in `keep`."""
        for name in self._visitors - set(keep):
            self._components[name].to("cpu")
            self._visitors.discard(name)
