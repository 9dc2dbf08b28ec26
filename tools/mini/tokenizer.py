"""A small byte-pair tokenizer in CLIP's own layout (vocab.json, merges.txt), one token for every word of the captions.

Layout of the ids, as in OpenAI's CLIP: 256 bytes, 256 bytes that end a word (`</w>`), one id a merge,
`<|startoftext|>`, `<|endoftext|>`.
Source of the byte alphabet: openai/CLIP clip/simple_tokenizer.py, bytes_to_unicode.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
from numpy.typing import NDArray

START = "<|startoftext|>"
END = "<|endoftext|>"
END_OF_WORD = "</w>"
MAX_LENGTH = 24
"""Tokens of a padded caption with start and end: the longest caption has 18, so new words of an adapter find room."""

WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
"""CLIP's splitting of a text into words: letters, single digits, runs of punctuation."""


@cache
def byte_alphabet() -> dict[int, str]:
    """One printable character for each byte, as GPT-2 and CLIP write them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(printable))
    return alphabet


def words_of(text: str) -> list[str]:
    """The words CLIP sees in a text, lower-cased."""
    words: list[str] = WORD.findall(text.lower())
    return words


@cache
def symbols_of(word: str) -> tuple[str, ...]:
    """The word as byte characters, the last one marked as the end of the word."""
    alphabet = byte_alphabet()
    characters = [alphabet[byte] for byte in word.encode("utf-8")]
    return (*characters[:-1], characters[-1] + END_OF_WORD)


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al., 2016), most frequent pair first, until every word is one symbol.

    Each word counts once a text it is in, so that common pieces come first and unseen words split well.
    """
    counts = Counter(words)
    pieces = {word: symbols_of(word) for word in counts}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in pieces.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: merge(symbols, best) for word, symbols in pieces.items()}


def merge(symbols: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """The symbols with every occurrence of the pair joined, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] = joined[-1] + symbol
        else:
            joined.append(symbol)
    return tuple(joined)


@dataclass(frozen=True)
class Tokenizer:
    """Vocabulary and merges; encodes as CLIPTokenizer does (a test compares the two)."""

    ids: dict[str, int]
    merges: tuple[tuple[str, str], ...]

    @property
    def start(self) -> int:
        """Id of the start token."""
        return self.ids[START]

    @property
    def end(self) -> int:
        """Id of the end token, which also pads, as in Stable Diffusion."""
        return self.ids[END]

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word: one for a known word, its pieces or bytes for any other."""
        symbols = symbols_of(word)
        whole = self.ids.get("".join(symbols))
        if whole is not None:
            return [whole]
        for pair in self.merges:
            symbols = merge(symbols, pair)
        return [self.ids[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """Start, the text's ids, end; cut to MAX_LENGTH and padded with the end token."""
        ids = [token for word in words_of(text) for token in self.encode_word(word)][: MAX_LENGTH - 2]
        return [self.start, *ids, *[self.end] * (MAX_LENGTH - 1 - len(ids))]

    def batch(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Ids [texts, 24]."""
        return np.array([self.encode(text) for text in texts], dtype=np.int64)

    def write(self, folder: Path) -> None:
        """The four files of a CLIP tokenizer's folder, as transformers 4, paddlenlp and mindone read them."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        special = {
            "bos_token": {"content": START, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
            "eos_token": {"content": END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
            "pad_token": END,
            "unk_token": {"content": END, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
        }
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")
        config = {
            "add_prefix_space": False,
            "bos_token": START,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "eos_token": END,
            "errors": "replace",
            "model_max_length": MAX_LENGTH,
            "pad_token": END,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": END,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """The tokenizer in which every word of the texts is one token."""
    merges = learn_merges(word for text in texts for word in words_of(text))
    alphabet = list(byte_alphabet().values())
    symbols = [
        *alphabet,
        *(character + END_OF_WORD for character in alphabet),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    ids = {symbol: number for number, symbol in enumerate(symbols)}
    if len(ids) != len(symbols):
        raise ValueError("two merges make the same symbol")
    return Tokenizer(ids, tuple(merges))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer as `Tokenizer.write` left it."""
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return Tokenizer(ids, tuple((first, second) for first, second in (line.split(" ") for line in lines)))
