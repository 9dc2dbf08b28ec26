"""Pictures that carry a textual inversion, as A1111 makes them (dialects.md §6.6; modules/textual_inversion/
image_embedding.py of AUTOMATIC1111/stable-diffusion-webui): in a text chunk, or in the low bits of the pixels."""

from __future__ import annotations

import base64
import binascii
import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from persona.core.adapters.tensor import TensorRef, in_memory
from persona.core.host.contracts import State
from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.flatten import python_scalar

CHUNK_NAME = "sd-ti-embedding"
MOST_PIXELS = 64_000_000
LARGEST_JSON = 64 << 20
MOST_VALUES = 4_000_000

Array = np.ndarray[Any, np.dtype[Any]]


class Picture:
    """Embeddings inside PNG and WebP pictures; read only."""

    name = "picture"
    suffixes = (".png", ".webp")

    def sniff(self, head: bytes, path: Path) -> bool:
        """A PNG or WebP file."""
        return head.startswith(b"\x89PNG\r\n\x1a\n") or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")

    def read(self, path: Path) -> State:
        """The embedding's tensors under A1111's names. Raises UnreadableFile when there is none in the picture."""
        text, pixels = _open(path)
        data = _from_text(path, text) if text is not None else _from_pixels(path, pixels)
        return State(_tensors(path, _parse(path, data)), {})

    def write(self, path: Path, tensors: Mapping[str, TensorRef], metadata: Mapping[str, str]) -> None:
        """Always raises ConversionError: persona reads such pictures and does not make them."""
        raise ConversionError(
            "Embeddings are not written into pictures.", hint="Write a .safetensors file: A1111 reads it as well."
        )


def _open(path: Path) -> tuple[str | None, Array]:
    """The text chunk, if there is one, and the pixels [h, w, 3] (empty when the text is there)."""
    from PIL import Image  # not before a picture is read: it is slow to import

    nothing = np.empty((0, 0, 3), np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG", "WEBP"]) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise UnreadableFile(f"{path} has {picture.width}x{picture.height} pixels, too many to look into.")
                text = picture.info.get(CHUNK_NAME)
                if text is None:
                    picture.load()  # text chunks may come after the pixels
                    text = picture.info.get(CHUNK_NAME) or getattr(picture, "text", {}).get(CHUNK_NAME)
                if text is not None:
                    return str(text), nothing
                return None, np.asarray(picture.convert("RGB"))
    except UnreadableFile:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged picture
        raise UnreadableFile(f"{path} is a damaged picture: {str(error)[:200]}.") from error


def _from_text(path: Path, text: str) -> bytes:
    if len(text) > 2 * LARGEST_JSON:
        raise UnreadableFile(f"{path} has an embedding of {len(text)} letters.")
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError) as error:
        raise UnreadableFile(f"{path} has a damaged embedding in its text chunk.") from error


def _from_pixels(path: Path, pixels: Array) -> bytes:
    """Low nibbles left of the first black column, high nibbles right of the last one, each under its own stream of
    the same pseudo-random nibbles, and the whole deflated."""
    nothing = UnreadableFile(
        f"{path} is a picture without an embedding in it.",
        hint="Pictures carry one only when A1111 saved them so, and only when nobody saved them as JPEG since.",
    )
    lit: Array = np.asarray((pixels > 0).all(axis=2))
    rows, columns = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if not len(rows):
        raise nothing
    nibbles = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] & 0x0F
    separators = np.flatnonzero(nibbles.sum(axis=(0, 2), dtype=np.int64) == 0)
    if len(separators) < 2:
        raise nothing
    low, high = nibbles[:, : separators[0]], nibbles[:, separators[-1] + 1 :]
    if low.shape != high.shape or not low.size:
        raise nothing
    stream = nibble_stream(low.size).reshape(low.shape)
    data = ((high ^ stream) << 4 | (low ^ stream)).astype(np.uint8).tobytes()
    try:
        inflater = zlib.decompressobj()
        found = inflater.decompress(data, LARGEST_JSON)
    except zlib.error as error:
        raise nothing from error
    if not inflater.eof:
        raise UnreadableFile(f"{path} has an embedding that is cut short, or larger than {LARGEST_JSON} bytes.")
    return found


def nibble_stream(count: int) -> Array:
    """The first `count` values of state ← (1664525·state + 1013904223) mod 2³², each mod 255 and its low four bits.

    Made by doubling: k steps are one step with other factors."""
    states = np.empty(count, np.uint32)
    factor, addend, done = 1664525, 1013904223, 1
    states[:1] = addend
    while done < count:
        step = min(done, count - done)
        states[done : done + step] = states[:step] * np.uint32(factor) + np.uint32(addend)
        factor, addend, done = factor * factor % 2**32, (factor + 1) * addend % 2**32, done + step
    return ((states % 255) & 0x0F).astype(np.uint8)


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data[:LARGEST_JSON].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path} has an embedding that is not JSON.") from error
    if not isinstance(found, dict):
        raise UnreadableFile(f"{path} has an embedding that is not a JSON object.")
    return found


def _tensors(path: Path, data: Mapping[str, Any]) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for key, value in data.items():
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            whole = f"{key}.{name}" if name else key
            if isinstance(part, dict) and "TORCHTENSOR" in part:
                tensors[whole] = in_memory(_vectors(path, whole, part["TORCHTENSOR"]))
            elif isinstance(part, (str, bool, float)) or (isinstance(part, int) and abs(part) < 2**63):
                tensors[whole] = python_scalar(part)
    if not any(ref.python is None for ref in tensors.values()):
        raise UnreadableFile(f"{path} has an embedding without vectors.")
    return tensors


def _vectors(path: Path, name: str, values: Any) -> Array:
    """Nested lists of numbers, [n, dim] or [dim], as float32."""
    rows = values if isinstance(values, list) else []
    flat = rows if rows and not isinstance(rows[0], list) else [number for row in rows for number in _as_list(row)]
    plain = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in flat)
    if not flat or len(flat) > MOST_VALUES or not plain:
        raise UnreadableFile(f"{path}: {name[:80]} in its embedding is not made of numbers.")
    try:
        return np.array(rows, np.float32)
    except (ValueError, OverflowError) as error:
        raise UnreadableFile(f"{path}: {name[:80]} in its embedding has rows of several lengths.") from error


def _as_list(row: Any) -> list[Any]:
    return row if isinstance(row, list) else [row]
