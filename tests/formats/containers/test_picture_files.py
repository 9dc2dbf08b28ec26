"""Pictures with embeddings inside, made here by the steps that dialects.md §6.6 gives (written a second time)."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from persona.core.host.errors import ConversionError, UnreadableFile
from persona.formats.containers.open import read_state
from persona.formats.containers.picture import Picture, nibble_stream
from persona.formats.dialects.embeddings import read_embeddings

RNG = np.random.default_rng(0)


def embedding(vectors: np.ndarray[Any, Any], name: str = "cat") -> bytes:
    data = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, "name": name}
    return json.dumps({**data, "step": 7, "sd_checkpoint": None, "sd_checkpoint_name": None}).encode()


def hidden(data: bytes, height: int = 40) -> np.ndarray[Any, Any]:
    """The picture that A1111's image_embedding.insert_image_data_embed makes of the bytes."""
    packed = zlib.compress(data, 9)
    width = -(-len(packed) // (height * 3))
    packed += packed[:1] * (width * height * 3 - len(packed))
    low, high = [], []
    state = 0
    for byte in packed:
        state = (1664525 * state + 1013904223) % 2**32
        mask = state % 255 & 15
        low.append(byte & 15 ^ mask)
        high.append(byte >> 4 ^ mask)
    decoration = 16 * RNG.integers(1, 16, (height, width, 3))
    blocks = [np.array(part).reshape(height, width, 3) + decoration for part in (low, high)]
    black = np.zeros((height, 1, 3), np.int64)
    middle = RNG.integers(0, 256, (height, 50, 3)) | 1
    return np.concatenate([blocks[0], black, middle, black, blocks[1]], axis=1).astype(np.uint8)


def with_border(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    framed = np.zeros((pixels.shape[0] + 20, pixels.shape[1] + 12, 3), np.uint8)
    framed[10:-10, 5:-7] = pixels
    return framed


def test_the_first_values_of_the_stream_are_the_known_ones() -> None:
    raw, state = [], 0
    for _ in range(10):
        state = (1664525 * state + 1013904223) % 2**32
        raw.append(state % 255)
    assert raw == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79]  # dialects.md §6.6
    assert nibble_stream(10).tolist() == [value & 15 for value in raw]
    long = nibble_stream(1000)
    for _ in range(990):
        state = (1664525 * state + 1013904223) % 2**32
    assert long[-1] == state % 255 & 15


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_vectors_come_back_from_the_pixels(tmp_path: Path, suffix: str) -> None:
    vectors = RNG.normal(size=(3, 768)).astype(np.float32)
    path = tmp_path / f"cat.{suffix}"
    Image.fromarray(with_border(hidden(embedding(vectors)))).save(path, lossless=True)
    (found,) = read_embeddings(read_state(path), file_stem="cat") or []
    assert found.token == "cat"
    assert np.array_equal(np.asarray(found.vectors["text_encoder"]), vectors)


def test_vectors_come_back_from_the_text_chunk(tmp_path: Path) -> None:
    vectors = RNG.normal(size=(2, 8)).astype(np.float32)
    for compressed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text("sd-ti-embedding", base64.b64encode(embedding(vectors, "犬")).decode(), zip=compressed)
        Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png", pnginfo=info)
        state = read_state(tmp_path / "x.png")
        assert np.array_equal(np.asarray(state.tensors["string_to_param.*"]), vectors)
        assert state.tensors["name"].python == "犬"
        assert state.tensors["step"].python == 7


def picture_with(path: Path, data: bytes) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(data).decode())
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"not JSON",
        b"[1]",
        b"{}",
        b"[" * 100_000,
        b'{"string_to_param": {"*": {"TORCHTENSOR": []}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[1, 2], [3]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [["a"]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [[[1]]]}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": {"x": 1}}}}',
        b'{"string_to_param": {"*": {"TORCHTENSOR": [1e999, ' + b"9" * 400 + b"]}}}",
        b'{"name": "only a name"}',
    ],
)
def test_damaged_embeddings_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UnreadableFile):
        read_state(picture_with(tmp_path / "x.png", data))


def test_ordinary_and_broken_pictures_are_refused_in_words(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for number, array in enumerate((pixels, np.zeros_like(pixels), np.full_like(pixels, 255), hidden(b"x" * 500) ^ 1)):
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        with pytest.raises(UnreadableFile, match="without an embedding"):
            read_state(tmp_path / f"{number}.png")
    whole = (tmp_path / "0.png").read_bytes()
    for length in range(12, len(whole), 500):
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(UnreadableFile):
            read_state(tmp_path / "cut.png")


def test_a_picture_bomb_is_refused(tmp_path: Path) -> None:
    header = b"\0\0\xff\xff" * 2 + b"\x08\x02\0\0\0"
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + len(header).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(png + bytes(100))
    with pytest.raises(UnreadableFile):
        read_state(tmp_path / "x.png")


def test_an_inflate_bomb_in_the_pixels_is_refused(tmp_path: Path) -> None:
    Image.fromarray(hidden(b" " * (70 << 20))).save(tmp_path / "x.png")
    with pytest.raises(UnreadableFile, match="larger than"):
        read_state(tmp_path / "x.png")


def test_embeddings_are_not_written_into_pictures(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="safetensors"):
        Picture().write(tmp_path / "x.png", {}, {})
