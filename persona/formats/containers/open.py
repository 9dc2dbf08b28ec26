"""Which container a file is, by its bytes, and the tensors in it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from persona.core.host.contracts import Container, State
from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import file_size, read_range

HEAD = 4096

# In the order they are asked; each is imported when it is its turn. The host passes its own list instead.
BUILT_IN = (
    "persona.formats.containers.safetensors:Safetensors",
    "persona.formats.containers.paddle:Paddle",
    "persona.formats.containers.torch_pickle:TorchPickle",
    "persona.formats.containers.mindspore:MindSpore",
    "persona.formats.containers.npz:Npz",
    "persona.formats.containers.picture:Picture",
)

# What else a file may turn out to be: first bytes -> (what it is, the line to type)
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"\xd8\x5e\x3a\x7f",
        "an encrypted MindSpore checkpoint",
        "Decrypt it in MindSpore: load_checkpoint(…, dec_key=…), then save_checkpoint without a key.",
    ),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive, whatever its name says", "Malicious pickles travel so; do not unpack it."),
    (b"\x1f\x8b", "gzip-compressed, whatever its name says", "Malicious pickles travel so; do not unpack it."),
    (b"Rar!", "a RAR archive", "Fetch the weights themselves."),
    (
        b"PK\x03\x04",
        "a zip archive with neither torch's data.pkl nor numpy's .npy in it",
        "Fetch the weights themselves.",
    ),
    (b"PK\x05\x06", "an empty zip archive", "Fetch the file again."),
    (b"GGUF", "a GGUF file (quantised weights of a language model)", "Fetch the weights as safetensors."),
    (b"\x89HDF", "an HDF5 file", "Fetch the weights as safetensors."),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"<!DOCTYPE", "a web page", "Download the file itself, not the page about it."),
    (b"<html", "a web page", "Download the file itself, not the page about it."),
    (
        bytes(8),
        "not a weight file: it begins with zeros, as Paddle's use_binary_format=True and broken downloads do",
        "In Paddle, save it again with paddle.save(…) alone; else fetch it again.",
    ),
    (b"\x80\x00", "a pickle of a protocol that no weight file uses", ""),
    (b"\x80\x01", "a pickle of a protocol that no weight file uses", ""),
)


def built_in() -> Iterator[Container]:
    """persona's own containers, each imported when it is reached."""
    for target in BUILT_IN:
        module, _, name = target.partition(":")
        yield getattr(importlib.import_module(module), name)()


def identify(path: Path | str, containers: Iterable[Container] | None = None) -> Container:
    """The container of a file, by its first bytes alone. Raises UnreadableFile with what the file looks like.

    Source of the order and the signs: dialects.md §1.1."""
    path = Path(path)
    size = file_size(path)
    head = read_range(path, 0, min(size, HEAD))
    for container in containers if containers is not None else built_in():
        if container.sniff(head, path):
            return container
    raise _unknown(path, head, size)


def read_state(path: Path | str, containers: Iterable[Container] | None = None) -> State:
    """Names to lazy tensors exactly as the file has them, from any container. Raises UnreadableFile."""
    path = Path(path)
    return identify(path, containers).read(path)


def _unknown(path: Path, head: bytes, size: int) -> UnreadableFile:
    if size == 0:
        return UnreadableFile(f"{path} is empty.", hint="Fetch the file again.")
    for sign, meaning, hint in FOREIGN:
        if head.startswith(sign):
            return UnreadableFile(f"{path} is {meaning}.", hint=hint)
    if size < 8:
        return UnreadableFile(
            f"{path} has only {size} bytes, too few for any weight file.", hint="Fetch the file again."
        )
    begin = head[:8].hex(" ")
    if head.lstrip()[:1] in (b"{", b"["):
        return UnreadableFile(f"{path} is JSON text, not weights (its first 8 bytes are {begin}).")
    return UnreadableFile(
        f"{path} is no kind of weight file persona knows: its first 8 bytes are {begin}.",
        hint="Known: safetensors, torch, Paddle and MindSpore checkpoints, npz, and pictures that carry an embedding.",
    )
