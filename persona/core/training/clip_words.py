"""How a CLIP text encoder reads a word: byte-pair encoding from the base's vocab.json and merges.txt, without a
framework. Planning needs it (an initializer that is not one token, a placeholder that is a word already); a backend
tokenizes with its framework's own.

Source: openai/CLIP, clip/simple_tokenizer.py; lower case, letters, single digits and runs of signs apart, `</w>` at the
end of a word.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from persona.core.host.errors import BaseModelError

END_OF_WORD = "</w>"
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


@dataclass(frozen=True)
class ClipWords:
    """The vocabulary of one tokenizer: `tokens` to ids, and the rank of every merge."""

    tokens: Mapping[str, int]
    ranks: Mapping[tuple[str, str], int]

    @classmethod
    def read(cls, folder: Path) -> ClipWords:
        """From a tokenizer folder of a diffusers base. Raises BaseModelError when it is not a CLIP tokenizer."""
        try:
            tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"{folder} has no CLIP vocabulary: {error}.",
                hint="Fetch the base again; it needs vocab.json, merges.txt",
            ) from error
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        pairs = [(pair[0], pair[1]) for pair in merges if len(pair) == 2]
        return cls(tokens, {pair: rank for rank, pair in enumerate(pairs)})

    def split(self, text: str) -> list[str]:
        """The tokens of a text, as the vocabulary spells them: `cat</w>` is a whole word, `ca` a beginning."""
        return [token for piece in pieces(text) for token in self._merged(_letters(piece))]

    def ids(self, text: str) -> list[int]:
        """The same as ids, without start and end. A token the vocabulary lacks is left out."""
        return [self.tokens[token] for token in self.split(text) if token in self.tokens]

    def knows(self, word: str) -> bool:
        """Whether the vocabulary has this very word, whole or as the beginning of one."""
        return word in self.tokens or f"{word.lower()}{END_OF_WORD}" in self.tokens

    def _merged(self, letters: str) -> list[str]:
        parts = [*letters[:-1], letters[-1] + END_OF_WORD]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            parts = _joined(parts, best)
        return parts


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every neighbouring `pair` made one."""
    found: list[str] = []
    place = 0
    while place < len(parts):
        if tuple(parts[place : place + 2]) == pair:
            found.append(pair[0] + pair[1])
            place += 2
        else:
            found.append(parts[place])
            place += 1
    return found


def pieces(text: str) -> Iterator[str]:
    """A text in lower case, cut where CLIP cuts: 's and the like, runs of letters, single digits, runs of signs."""
    text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
    place = 0
    while place < len(text):
        contraction = next((word for word in CONTRACTIONS if text.startswith(word, place)), None)
        end = place + len(contraction) if contraction else _end_of_run(text, place)
        if not text[place].isspace():
            yield text[place:end]
        place = end


def _end_of_run(text: str, start: int) -> int:
    kind = _kind(text[start])
    if kind == "N":
        return start + 1
    end = start + 1
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    return end


def _kind(character: str) -> str:
    """L for a letter, N for a number, Z for white space, S for any other sign."""
    if character.isspace():
        return "Z"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "S"


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_LETTER_OF = _byte_letters()


def _letters(piece: str) -> str:
    return "".join(_LETTER_OF[byte] for byte in piece.encode("utf-8"))
