"""Prompts to token ids, with words the tokenizer has never heard of."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from persona.core.host.errors import BaseModelError
from persona.core.training.clip_words import ClipWords

Array = np.ndarray[Any, np.dtype[Any]]


class Tokenizer(Protocol):
    """A CLIP tokenizer: the ids of a text without start and end, and those of start, end and padding."""

    begin: int
    end: int
    pad: int

    def ids(self, text: str) -> list[int]: ...


class CoreTokenizer:
    """The core's own reading of a CLIP vocabulary, for backends whose libraries have none that reads as transformers
    does. `folder` is a tokenizer folder with vocab.json, merges.txt and tokenizer_config.json or
    special_tokens_map.json, or with special tokens as CLIP's. Raises BaseModelError for anything else."""

    def __init__(self, folder: Path) -> None:
        self._vocabulary = ClipWords.read(folder)
        special = _special_tokens(folder)
        try:
            tokens = self._vocabulary.tokens
            self.begin, self.end = tokens[special["bos_token"]], tokens[special["eos_token"]]
            self.pad = tokens[special["pad_token"]]
        except KeyError as error:
            raise BaseModelError(f"{folder}'s vocabulary has no special token {error}.") from error
        self._special = {special[key]: tokens[special[key]] for key in special}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(re.escape(token) for token in longest_first)})")

    def ids(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens in it are themselves, as in transformers: SDXL's second tokenizer pads with
        "!", so there an exclamation mark is another token than in the first."""
        found: list[int] = []
        for part in self._cut.split(text):
            found += [self._special[part]] if part in self._special else self._vocabulary.ids(part)
        return found


def _special_tokens(folder: Path) -> dict[str, str]:
    found = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for key in found:
            token = told.get(key)
            if token:
                found[key] = token["content"] if isinstance(token, dict) else str(token)
    return found


class Words:
    """A CLIP tokenizer and its new words. A placeholder in a prompt becomes all of its vectors' ids, which go on
    after the vocabulary's; the prompt is cut around placeholders before it is tokenized, so that the tokenizer itself
    stays as it was (added tokens of a CLIP tokenizer behave likewise). `window` is the length of a prompt in ids,
    `vocabulary` the number of rows of the encoder's own embedding."""

    def __init__(self, tokenizer: Tokenizer, window: int, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self.window, self.vocabulary = window, vocabulary
        self._new: dict[str, list[int]] = {}
        self._pattern: re.Pattern[str] | None = None

    @property
    def end(self) -> int:
        """Id of the token that ends a prompt."""
        return self._tokenizer.end

    def add(self, placeholder: str, vectors: int) -> None:
        """Make `placeholder` a word of `vectors` ids."""
        first = self.vocabulary + sum(len(ids) for ids in self._new.values())
        self._new[placeholder.lower()] = list(range(first, first + vectors))
        longest_first = sorted(self._new, key=len, reverse=True)
        self._pattern = re.compile("|".join(_as_word(word) for word in longest_first), re.IGNORECASE)

    def knows(self, placeholder: str) -> bool:
        """Whether the placeholder was added."""
        return placeholder.lower() in self._new

    def split(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
        ids: list[int] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += self._known(text[position : match.start()]) + self._new[match.group().lower()]
            position = match.end()
        return ids + self._known(text[position:])

    def ids(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """The ids [n, window] int64 of the prompts with start, end and padding, and the prompts that had to be cut."""
        rows, cut = [], []
        for prompt in prompts:
            ids = self.split(prompt)
            if len(ids) > self.window - 2:
                cut.append(prompt)
            row = [self._tokenizer.begin, *ids[: self.window - 2], self.end]
            rows.append(row + [self._tokenizer.pad] * (self.window - len(row)))
        return np.array(rows, np.int64), cut

    def _known(self, text: str) -> list[int]:
        return self._tokenizer.ids(text) if text.strip() else []


def attention_mask(ids: Array, end: int) -> Array:
    """1 where a prompt still speaks, up to and with its end; 0 over the padding. [n, window] int64."""
    is_end = ids == end
    padding = np.cumsum(is_end, axis=1) > is_end
    mask: Array = (~padding).astype(np.int64)
    return mask


def cut_note(caption: str, window: int) -> str:
    """What the user is told about a prompt that was cut."""
    return f'Only the first {window - 2} tokens of a prompt are read, and this one is longer: "{caption[:60]}…"'


def _as_word(placeholder: str) -> str:
    """A pattern that finds the placeholder, but no "sks" inside "flasks"."""
    before = r"(?<!\w)" if placeholder[0].isalnum() else ""
    after = r"(?!\w)" if placeholder[-1].isalnum() else ""
    return before + re.escape(placeholder) + after
