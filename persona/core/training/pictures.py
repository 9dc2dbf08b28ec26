"""The training pictures in a folder, as a trainer will see them, and what is wrong with the others.

Understood are a folder of pictures (captions in .txt files beside them, or in metadata.jsonl / metadata.csv), a folder
of kohya's `N_name` folders (N repeats; `name` is the caption of pictures without one), and a metadata table itself.
Masks lie in `mask/` under the picture's name. Nothing is skipped silently: whatever is not used is a Problem.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from persona.core.host.errors import DataError
from persona.core.training.captions import METADATA_NAMES, read_metadata, read_sidecar, sidecar_of
from persona.core.training.decode import decode
from persona.core.training.plan import Picture

SUFFIXES = frozenset(
    (
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".avif",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".tga",
    )
)
"""Names that are taken for pictures; what they really are is decided by their bytes."""

UNREADABLE_SUFFIXES = frozenset(
    (".heic", ".heif", ".psd", ".svg", ".eps", ".cr2", ".nef", ".arw", ".dng", ".jxl", ".mp4", ".mov")
)
"""Kinds that people keep among their pictures and that are not read."""

MASK_FOLDER = "mask"
KOHYA_FOLDER = re.compile(r"^(\d{1,3})_(.+)$")  # three digits at most: 2024_holiday is a year, not repeats


@dataclass(frozen=True)
class Problem:
    """Something about a file or folder that its owner should know. When `used` is false, the picture is left out."""

    path: str
    message: str
    hint: str = ""
    used: bool = True


@dataclass(frozen=True)
class Scan:
    """What a folder holds: the usable pictures in the order of their names, and what to know about them and others."""

    pictures: tuple[Picture, ...]
    problems: tuple[Problem, ...] = ()


@dataclass
class _Found:
    """What is being collected while a folder is read."""

    pictures: list[Picture] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def tell(self, path: Path, message: str, hint: str = "", *, used: bool = True) -> None:
        self.problems.append(Problem(str(path), message, hint, used))


def scan(folder: str | Path) -> Scan:
    """Read every picture in `folder` (or those a .jsonl or .csv table names) with its captions, mask and SHA-256.

    Raises DataError, with the line to type, when there is no such folder, when pictures lie in its sub-folders only
    (and these are not kohya's), when there are none, or when none can be read, and for a broken metadata table.
    """
    root = Path(folder).expanduser().absolute()
    if root.is_file() and root.suffix.lower() in (".jsonl", ".csv"):
        found = _scan_folder(root.parent, root)
        return _finished(root, found)
    if root.is_file():
        raise DataError(f"{root} is a file, not a folder of pictures.", hint=_data_line(root.parent))
    if not root.is_dir():
        raise DataError(f"{root} does not exist.", hint=_nearest_folder(root))
    table = next((root / name for name in METADATA_NAMES if (root / name).is_file()), None)
    kohya = _kohya_folders(root)
    if table is None and not _files(root, SUFFIXES) and kohya:
        return _finished(root, _scan_kohya(kohya))
    found = _scan_folder(root, table)
    if not found.pictures and not any(not problem.used for problem in found.problems):
        raise _no_pictures(root)
    return _finished(root, found)


def _finished(root: Path, found: _Found) -> Scan:
    if not found.pictures:
        unusable = [problem for problem in found.problems if not problem.used]
        first = unusable[0] if unusable else Problem(str(root), "it names no pictures", "")
        raise DataError(
            f"Nothing of {root} can be used ({len(unusable)} tried). {first.path}: {first.message}",
            hint=first.hint or f"Look at each of them: persona data check {shlex.quote(str(root))}",
        )
    _tell_duplicates(found)
    if root.is_dir():
        _tell_unused_folders(root, found)
    return Scan(tuple(found.pictures), tuple(found.problems))


def _scan_kohya(folders: Iterable[tuple[Path, int, str]]) -> _Found:
    found = _Found()
    for folder, repeats, name in folders:
        part = _scan_folder(folder, next((folder / n for n in METADATA_NAMES if (folder / n).is_file()), None))
        bare = sum(not picture.captions for picture in part.pictures)
        found.pictures += [
            dataclasses.replace(picture, repeats=repeats, captions=picture.captions or (name,))
            for picture in part.pictures
        ]
        said = f"; {bare} of them, without a caption, called {name!r}" if bare else ""
        found.tell(folder, f"pictures: {len(part.pictures)}, each used {repeats} times an epoch{said}")
        found.problems += part.problems
    return found


def _scan_folder(folder: Path, table: Path | None) -> _Found:
    """The pictures directly in `folder`, with those that `table` names elsewhere."""
    found = _Found()
    captions = {} if table is None else _table_captions(folder, table, found)
    masks = {path.stem: path for path in _files(folder / MASK_FOLDER, SUFFIXES)}
    own = _files(folder, SUFFIXES) if table is None or table.name in METADATA_NAMES else []
    paths = sorted({*own, *captions}, key=str)
    for path in paths:
        mask = masks.get(path.stem)
        picture = _read(path, captions.get(path), mask, found)
        if picture is not None:
            found.pictures.append(picture)
    for path in _files(folder, UNREADABLE_SUFFIXES):
        found.tell(path, f"{path.suffix} files are not read", "Save it as JPEG or PNG.", used=False)
    for stem in masks.keys() - {path.stem for path in paths}:
        found.tell(masks[stem], "this mask belongs to no picture")
    return found


def _read(path: Path, captions: tuple[str, ...] | None, mask: Path | None, found: _Found) -> Picture | None:
    try:
        decoded = decode(path)
        text = _captions(path, captions, found)
        for note in decoded.notes:
            found.tell(path, note)
        if mask is not None:
            size = decode(mask).size
            if abs(size[0] * decoded.size[1] - size[1] * decoded.size[0]) > max(size) * 2:
                found.tell(mask, f"this mask is {size[0]}x{size[1]}, of other proportions than its picture")
    except DataError as error:
        found.tell(path, error.message.removeprefix(f"{path} "), error.hint, used=False)
        return None
    return Picture(str(path), text, str(mask) if mask else None, sha256_of(path), decoded.size)


def _captions(path: Path, from_table: tuple[str, ...] | None, found: _Found) -> tuple[str, ...]:
    sidecar = sidecar_of(path)
    if from_table is not None:
        if sidecar is not None:
            found.tell(path, f"its caption is in the metadata table; {sidecar.name} is not used")
        return from_table
    if sidecar is None:
        return ()
    captions = read_sidecar(sidecar)
    if not captions:
        found.tell(sidecar, "this caption file is empty")
    return captions


def _table_captions(folder: Path, table: Path, found: _Found) -> dict[Path, tuple[str, ...]]:
    """Captions by the picture's path. A name is looked for in the folder; an absolute one where it says, then under its
    last part in the folder, since data sets get moved."""
    captions: dict[Path, tuple[str, ...]] = {}
    for row in read_metadata(table):
        places = [folder / row.picture, folder / re.split(r"[/\\]", row.picture)[-1]]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            found.tell(table, f"line {row.line} names {row.picture}, which is not there", used=False)
            continue
        captions[path] = (*captions.get(path, ()), *row.captions)
    return captions


def _tell_duplicates(found: _Found) -> None:
    first: dict[str, str] = {}
    for picture in found.pictures:
        same = first.setdefault(picture.sha256, picture.path)
        if same != picture.path:
            other = os.path.relpath(same, Path(picture.path).parent)
            found.tell(Path(picture.path), f"the same file as {other}; it counts twice")


def _tell_unused_folders(root: Path, found: _Found) -> None:
    met = {picture.path for picture in found.pictures} | {problem.path for problem in found.problems}
    for folder in _folders(root):
        files = _files(folder, SUFFIXES)
        if files and folder.name != MASK_FOLDER and not any(str(path) in met for path in files):
            found.tell(folder, f"this sub-folder is not used; pictures in it: {len(files)}", _data_line(folder))


def _no_pictures(root: Path) -> DataError:
    """The error for a folder without pictures, naming what was probably meant."""
    for folder in _below(root, depth=2):
        if _kohya_folders(folder):
            return DataError(f"{root} has no pictures, but {folder} has folders of them.", hint=_data_line(folder))
        if count := len(_files(folder, SUFFIXES)):
            return DataError(
                f"{root} has no pictures itself, but its sub-folder {folder.relative_to(root)} has {count}.",
                hint=_data_line(folder),
            )
    others = sorted({path.suffix.lower() or path.name for path in root.iterdir() if path.is_file()})
    return DataError(
        f"{root} has no pictures" + (f" (only {', '.join(others[:5])})." if others else "; it is empty."),
        hint="Name a folder with JPEG, PNG or WebP files: --data DIR",
    )


def _below(root: Path, depth: int) -> Iterator[Path]:
    for folder in _folders(root):
        if folder.name != MASK_FOLDER:
            yield folder
            if depth > 1:
                yield from _below(folder, depth - 1)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _kohya_folders(root: Path) -> list[tuple[Path, int, str]]:
    """The sub-folders named `N_name` that hold pictures: (folder, repeats, name)."""
    matches = [(folder, KOHYA_FOLDER.match(folder.name)) for folder in _folders(root)]
    return [
        (folder, int(match[1]), match[2].strip())
        for folder, match in matches
        if match and int(match[1]) > 0 and (_files(folder, SUFFIXES) or _files(folder, UNREADABLE_SUFFIXES))
    ]


def kohya_name(picture: Picture) -> str:
    """The `name` of the `N_name` folder a picture lies in; "" for one that lies elsewhere."""
    match = KOHYA_FOLDER.match(Path(picture.path).parent.name)
    return match[2].strip() if match else ""


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files with one of these suffixes, by name; hidden ones (macOS leaves `._` files behind) are no pictures."""
    if not folder.is_dir():
        return []
    wanted = frozenset(suffixes)
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in wanted and not path.name.startswith(".") and path.is_file()
    )


def _data_line(folder: Path) -> str:
    return f"Train on it: --data {shlex.quote(str(folder))}"


def _nearest_folder(root: Path) -> str:
    from persona.core.host.errors import closest

    parent = root.parent
    near = closest(root.name, [path.name for path in _folders(parent)], count=1) if parent.is_dir() else []
    return f"Did you mean --data {shlex.quote(str(parent / near[0]))}?" if near else "Name a folder: --data DIR"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
