"""The digests people search an adapter by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

CHUNK = 1 << 20
LEGACY_OFFSET, LEGACY_LENGTH = 0x100000, 0x10000


def hashes(path: Path) -> Mapping[str, str]:
    """sha256 of the file; `autov2`, its first 10 digits (A1111's short hash); `autov3`, the first 12 digits of the
    sha256 of a safetensors file's tensor data without the header (kohya's `sshs_model_hash`, the additional-networks
    hash); `legacy`, A1111's first hash: 8 digits over 64 KiB at 1 MiB. One pass over the file.

    Source: AUTOMATIC1111/stable-diffusion-webui modules/hashes.py, kohya-ss/sd-scripts library/train_util.py;
    dialects.md §7.1."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        head = file.read(9)
        length = int.from_bytes(head[:8], "little")
        size = path.stat().st_size
        is_safetensors = len(head) == 9 and head[8:] == b"{" and 8 + length <= size
        skip = 8 + length if is_safetensors else size
        file.seek(LEGACY_OFFSET)
        legacy = hashlib.sha256(file.read(LEGACY_LENGTH)).hexdigest()[:8]
        file.seek(0)
        position = 0
        while piece := file.read(CHUNK):
            whole.update(piece)
            if position + len(piece) > skip:
                data.update(memoryview(piece)[max(0, skip - position) :])
            position += len(piece)
    found = {"sha256": whole.hexdigest(), "autov2": whole.hexdigest()[:10], "legacy": legacy}
    if is_safetensors:
        found["autov3"] = data.hexdigest()[:12]
    return found
