"""What pictures are called: templates around a placeholder, .txt files beside pictures, and metadata tables.

Text is UTF-8, with or without a byte order mark, and may be in any script; captions without spaces are fine.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.core.host.errors import DataError, UsageError, did_you_mean

_OBJECT = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}",
    "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}", "a photo of the cool {}",
    "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}", "a photo of the {}",
    "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}", "a rendition of the {}",
    "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}", "a good photo of a {}",
    "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}", "a photo of the large {}",
    "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
_STYLE = (
    "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
    "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
    "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
    "a close-up painting in the style of {}", "a bright painting in the style of {}",
    "a good painting in the style of {}", "a rendition in the style of {}", "a nice painting in the style of {}",
    "a small painting in the style of {}", "a weird painting in the style of {}",
    "a large painting in the style of {}",
)  # fmt: skip
_FACE = (
    "a photo of {}", "a portrait of {}", "a close-up photo of {}", "a photo of the face of {}", "a cropped photo of {}",
    "a bright photo of {}", "a dark photo of {}", "a good photo of {}", "a close-up portrait of {}",
    "a photo of {} smiling", "a photo of {} looking at the camera", "a picture of {}",
)  # fmt: skip

TEMPLATES: Mapping[str, tuple[str, ...]] = {"object": _OBJECT, "style": _STYLE, "face": _FACE}
"""Captions for pictures that have none, by what is learned. object and style are the sentences of textual inversion
(arXiv 2208.01618, its CLIP ImageNet templates); face names a person, so it has no article before the placeholder."""


def fill(template: str, placeholder: str) -> str:
    """`template` with `placeholder` in every `{}`. Raises UsageError when there is none, since nothing would be learned
    from such a caption."""
    if "{}" not in template:
        raise UsageError(
            f"The template {template!r} has no {{}} where {placeholder!r} should stand.",
            hint='Write it as in "a photo of a {}"',
        )
    return template.replace("{}", placeholder)


def templates_for(name: str, placeholder: str) -> tuple[str, ...]:
    """The filled captions of one list of TEMPLATES. Raises UsageError for an unknown name."""
    if name not in TEMPLATES:
        raise UsageError(f"There are no templates called {name!r}.", hint=did_you_mean(name, TEMPLATES))
    return tuple(fill(template, placeholder) for template in TEMPLATES[name])


SIDECAR_SUFFIXES = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
PICTURE_COLUMNS = ("file_name", "image", "images")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")
MARKS = ("<__dj__image>", "<|__dj__eoc|>")
"""Data-Juicer's marks of where a picture stands and a chunk ends, which are no part of a caption."""

MAX_CAPTION_BYTES = 1 << 20


def sidecar_of(picture: Path) -> Path | None:
    """The caption file of a picture: the same name with .txt or .caption, or None."""
    return next((path for suffix in SIDECAR_SUFFIXES if (path := picture.with_suffix(suffix)).is_file()), None)


def read_sidecar(path: Path) -> tuple[str, ...]:
    """The captions in a caption file, one a line; empty lines are none. Raises DataError when it is not UTF-8 text."""
    if path.stat().st_size > MAX_CAPTION_BYTES:
        raise DataError(f"{path} is too large for a caption ({path.stat().st_size} bytes).")
    return tuple(line.strip() for line in _text(path).splitlines() if line.strip())


@dataclass(frozen=True)
class Row:
    """One row of a metadata table: the picture as the table names it, its captions, and where that stands."""

    picture: str
    captions: tuple[str, ...]
    line: int


def read_metadata(path: Path) -> tuple[Row, ...]:
    """The rows of a metadata table, a .jsonl (an object a line) or .csv (a header line) file.

    The picture is in `file_name`, `image` or `images` (a name, or a list of names as Data-Juicer writes it), the
    caption in `text`, `caption`, `captions` or `prompt` (a text, or a list to draw from). Raises DataError with the
    line.
    """
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
    found: list[Row] = []
    for line, fields in rows:
        captions = tuple(clean for text in _values(fields, CAPTION_COLUMNS, path, line) if (clean := _clean(text)))
        found += [Row(name, captions, line) for name in _values(fields, PICTURE_COLUMNS, path, line)]
    return tuple(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}).",
            hint=f"If it is GBK, say: iconv -f GBK -t UTF-8 {path}",
        ) from error


def _json_rows(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise DataError(f"{path}, line {number} is not a JSON object.", hint=_JSON_EXAMPLE)
        yield number, fields


_JSON_EXAMPLE = 'Write a row as {"file_name": "0.jpg", "text": "a photo of …"}'


def _csv_rows(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for fields in reader:
            if None in fields:
                raise DataError(
                    f"{path}, line {reader.line_num} has more columns than the header.",
                    hint='A caption with commas stands in quotes: 0.jpg,"red, round"',
                )
            yield reader.line_num, {key: value for key, value in fields.items() if value is not None}
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}.") from error


def _values(fields: Mapping[str, Any], columns: tuple[str, ...], path: Path, line: int) -> list[str]:
    """The texts of the first of `columns` that the row has."""
    for column in columns:
        value = fields.get(column)
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        if value is not None:
            raise DataError(f"{path}, line {line}: {column!r} is neither text nor a list of texts.", hint=_JSON_EXAMPLE)
    raise DataError(
        f"{path}, line {line} has no {' or '.join(columns)}; it has {', '.join(map(str, fields)) or 'nothing'}.",
        hint=_JSON_EXAMPLE if path.suffix.lower() == ".jsonl" else "The first line should be: file_name,text",
    )


def _clean(text: str) -> str:
    for mark in MARKS:
        text = text.replace(mark, "")
    return text.strip()


_ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def alternatives(text: str) -> tuple[str, ...]:
    """Every text that `{a|b|c}` in it stands for, in order: "a {red|blue} hat" is a red hat and a blue hat.

    The notation is that of kohya's wildcards and of dynamic prompts. Braces without a bar stay as they are."""
    found = _ALTERNATIVES.search(text)
    if not found:
        return (text,)
    before, after = text[: found.start()], text[found.end() :]
    return tuple(
        "".join((before, choice, rest)) for choice in found.group(1).split("|") for rest in alternatives(after)
    )
