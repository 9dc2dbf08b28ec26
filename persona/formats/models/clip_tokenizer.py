"""The tokenizer of every published CLIP text encoder, for models whose file has none (LDM's one file, MindSpore's
checkpoint).

49,408 tokens: the 256 bytes as signs, the same at the end of a word, 48,894 merges, and the two special ones. Source:
openai/CLIP, clip/simple_tokenizer.py and bpe_simple_vocab_16e6.txt.gz (MIT), of which assets/clip has the lines that
CLIP uses. What it pads with differs: the end of the text in SD1 and in the first encoder of SDXL and SD3, "!" in SD2
and in the second encoder of SDXL and SD3 (their tokenizer folders on the hub)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MERGES = Path(__file__).resolve().parents[2] / "assets" / "clip" / "merges.txt.gz"
SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


def padding(family: str, encoder: str) -> str:
    """What the tokenizer of a text encoder pads with."""
    return "!" if family == "sd2" or encoder == "text_encoder_2" else END


def clip_tokenizer(pad: str, window: int = 77) -> dict[str, bytes]:
    """The files of a tokenizer folder, as transformers' CLIPTokenizer reads it, by their names."""
    merges = gzip.decompress(MERGES.read_bytes())
    special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": window,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    return {
        "vocab.json": _json(vocabulary(merges.decode("utf-8"))),
        "merges.txt": merges,
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(config),
    }


def vocabulary(merges: str) -> dict[str, int]:
    """Tokens to ids: signs, signs that end a word, merges in their order, start and end."""
    signs = list(_signs())
    pairs = ["".join(line.split()) for line in merges.splitlines()[1:]]
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *pairs, START, END]
    return {token: number for number, token in enumerate(tokens)}


def _signs() -> Iterator[str]:
    """The 256 bytes as printable signs: those that are printable first, the others as letters from 256 on (GPT-2's
    bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    yield from (chr(code) for code in printable)
    yield from (chr(256 + number) for number in range(256 - len(printable)))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")
