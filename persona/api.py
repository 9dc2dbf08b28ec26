"""What programs call. Every function imports what it needs when it is called, so that importing this costs nothing."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona.core.host.host import Host


@functools.lru_cache(maxsize=8)
def host(without: tuple[str, ...] = ()) -> Host:
    """The plugin host: persona's own plugins, then the installed ones (PERSONA_PLUGINS names those to take)."""
    from persona.core.host.host import Host
    from persona.plugins import builtin

    wanted = os.environ.get("PERSONA_PLUGINS")
    only = None if wanted is None else [name.strip() for name in wanted.split(",") if name.strip()]
    return Host([("persona", builtin)], only=only, without=without)
