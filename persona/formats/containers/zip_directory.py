"""The central directory of a zip archive, read strictly: an archive that two readers could see differently is refused.

The layout is PKWARE's APPNOTE 6.3; the rules are dialects.md §10.3 rule 3. (Scanners of pickles were fooled by flags
and by names that differ between the local and the central header: CVE-2025-1944, CVE-2025-1945.)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import CHUNK, file_size, read_range, reading

STORED, DEFLATED = 0, 8
MOST_MEMBERS = 1_000_000
LARGEST_DIRECTORY = 256 << 20
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FLAG_ENCRYPTED, _FLAG_DESCRIPTOR, _FLAG_STRONG = 0x1, 0x8, 0x40


@dataclass(frozen=True)
class Member:
    """One file of an archive; its bytes (compressed when `method` is DEFLATED) lie at `offset`."""

    name: str
    method: int
    offset: int
    compressed: int
    size: int
    crc: int


def read_directory(path: Path) -> Mapping[str, Member]:
    """The members of a zip archive by name, in the directory's order. Raises UnreadableFile."""
    size = file_size(path)
    count, start, length = _find_directory(path, size)
    data = read_range(path, start, length)
    members: dict[str, Member] = {}
    places: list[tuple[int, int, str]] = []
    position = 0
    with reading(path, buffering=1 << 12) as file:
        for _ in range(count):
            entry, header, position = _entry(path, data, position)
            if entry.name in members:
                _refuse(path, f"it has two members called {entry.name!r}")
            if header + _LOCAL.size > start:
                _refuse(path, f"its member {entry.name!r} is not where it says")
            file.seek(header)
            member = _member(path, entry, file.read(_LOCAL.size + len(entry.name.encode())), header, start)
            members[member.name] = member
            places.append((header, member.offset + member.compressed, member.name))
    if position != length:
        _refuse(path, "its directory has more in it than it says")
    _require_apart(path, sorted(places), start)
    return members


def read_member(path: Path, member: Member, *, at_most: int) -> bytes:
    """A member's bytes, inflated where needed. Raises UnreadableFile when it is larger than `at_most`, or damaged."""
    if member.size > at_most:
        _refuse(path, f"its member {member.name!r} says it has {member.size} bytes, and {at_most} are the most")
    if member.method == DEFLATED:
        data = b"".join(_inflate(path, member))
    else:
        data = read_range(path, member.offset, member.size)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        _refuse(path, f"its member {member.name!r} is damaged (its size or checksum differs)")
    return data


def read_start(path: Path, member: Member, length: int) -> bytes:
    """The first `length` bytes of a member, or all of a shorter one."""
    if member.method == STORED:
        return read_range(path, member.offset, min(length, member.size))
    pieces: list[bytes] = []
    for piece in _inflate(path, member):
        pieces.append(piece)
        if sum(map(len, pieces)) >= length:
            break
    return b"".join(pieces)[:length]


def _inflate(path: Path, member: Member) -> Iterator[bytes]:
    """Inflate piece by piece, never past the size that the directory declares."""
    inflater = zlib.decompressobj(-15)
    total, position, end = 0, member.offset, member.offset + member.compressed
    while not inflater.eof:
        data = inflater.unconsumed_tail
        if not data:
            if position >= end:
                _refuse(path, f"its member {member.name!r} is cut short")
            data = read_range(path, position, min(CHUNK, end - position))
            position += len(data)
        try:
            piece = inflater.decompress(data, CHUNK)
        except zlib.error as error:
            _refuse(path, f"its member {member.name!r} is damaged ({error})")
        total += len(piece)
        if total > member.size:
            _refuse(path, f"its member {member.name!r} inflates to more than the {member.size} bytes it declares")
        yield piece


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UnreadableFile(f"{path} is not an archive that can be trusted: {reason}.", hint="Fetch the file again.")


def _find_directory(path: Path, size: int) -> tuple[int, int, int]:
    """How many members, and where the central directory begins and how long it is."""
    if size < _END.size:
        _refuse(path, "it is cut short")
    end_at = size - _END.size
    mark, disk, disk_start, here, count, length, start, comment = _END.unpack(read_range(path, end_at, _END.size))
    if mark != b"PK\x05\x06" or comment:
        _refuse(path, "it is cut short, or something follows its end")
    boundary = end_at
    if 0xFFFF in (here, count) or 0xFFFFFFFF in (length, start) or _has_locator(path, end_at):
        short = (disk, disk_start, here, count, length, start)
        boundary, *wide = _end_64(path, end_at)
        full = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if any(few not in (many, limit) for few, many, limit in zip(short, wide, full, strict=True)):
            _refuse(path, "its two directories say different things")
        disk, disk_start, here, count, length, start = wide
    if disk or disk_start or here != count:
        _refuse(path, "it is one part of several")
    if count > MOST_MEMBERS or length > LARGEST_DIRECTORY:
        _refuse(path, f"it says it has {count} members")
    if start + length != boundary:
        _refuse(path, "its directory is not where it says")
    return count, start, length


def _has_locator(path: Path, end_at: int) -> bool:
    return end_at >= _LOCATOR64.size and read_range(path, end_at - _LOCATOR64.size, 4) == b"PK\x06\x07"


def _end_64(path: Path, end_at: int) -> tuple[int, int, int, int, int, int, int]:
    locator_at = end_at - _LOCATOR64.size
    if locator_at < _END64.size:
        _refuse(path, "its 64-bit directory is missing")
    mark, _, record_at, _ = _LOCATOR64.unpack(read_range(path, locator_at, _LOCATOR64.size))
    if mark != b"PK\x06\x07" or record_at + _END64.size != locator_at:
        _refuse(path, "its 64-bit directory is not where it says")
    record = _END64.unpack(read_range(path, record_at, _END64.size))
    mark, _, _, _, disk, disk_start, here, count, length, start = record
    if mark != b"PK\x06\x06":
        _refuse(path, "its 64-bit directory is not where it says")
    return record_at, disk, disk_start, here, count, length, start


def _entry(path: Path, data: bytes, position: int) -> tuple[Member, int, int]:
    """One entry of the directory, where its local header is, and where the next entry begins."""
    if position + _CENTRAL.size > len(data):
        _refuse(path, "its directory is cut short")
    fields = _CENTRAL.unpack_from(data, position)
    mark, flags, method, crc, compressed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
    name_length, extra_length, comment_length, disk, header = *fields[10:14], fields[16]
    position += _CENTRAL.size
    next_entry = position + name_length + extra_length + comment_length
    if mark != b"PK\x01\x02" or next_entry > len(data) or disk:
        _refuse(path, "its directory is damaged")
    raw_name = data[position : position + name_length]
    extra = data[position + name_length : position + name_length + extra_length]
    compressed, size, header = _wide_sizes(path, extra, compressed, size, header)
    name = _safe_name(path, raw_name)
    if flags & (_FLAG_ENCRYPTED | _FLAG_STRONG):
        _refuse(path, f"its member {name!r} is encrypted")
    if method not in (STORED, DEFLATED) or (method == STORED and compressed != size):
        _refuse(path, f"its member {name!r} is kept in an unusual way (method {method})")
    return Member(name, method, 0, compressed, size, crc), header, next_entry


def _wide_sizes(path: Path, extra: bytes, compressed: int, size: int, header: int) -> tuple[int, int, int]:
    """Replace what is 0xFFFFFFFF by the 64-bit values of extra field 1, in the order that APPNOTE 4.5.3 gives."""
    wanted = [value == 0xFFFFFFFF for value in (size, compressed, header)]
    if not any(wanted):
        return compressed, size, header
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            if length < 8 * sum(wanted) or position + 4 + length > len(extra):
                break
            values = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, position + 4))
            size, compressed, header = (
                next(values) if wide else value for wide, value in zip(wanted, (size, compressed, header), strict=True)
            )
            return compressed, size, header
        position += 4 + length
    _refuse(path, "a member's size is missing")


def _safe_name(path: Path, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(path, f"a member's name {raw[:40]!r} is not UTF-8")
    parts = name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or ".." in parts or "\0" in name or parts[0][1:2] == ":":
        _refuse(path, f"its member {name[:80]!r} points outside of it")
    return name


def _member(path: Path, entry: Member, local: bytes, header: int, directory: int) -> Member:
    """Check the local header against the directory's entry, and find where the bytes begin."""
    if len(local) < _LOCAL.size:
        _refuse(path, "it is cut short")
    fields = _LOCAL.unpack_from(local)
    mark, flags, method, crc, compressed, size = fields[0], fields[2], fields[3], *fields[6:9]
    name_length, extra_length = fields[9:11]
    raw_name = entry.name.encode()
    same_name = name_length == len(raw_name) and local[_LOCAL.size :] == raw_name
    if mark != b"PK\x03\x04" or not same_name or method != entry.method or flags & _FLAG_ENCRYPTED:
        _refuse(path, f"its member {entry.name!r} is called otherwise in its own header")
    sizes_follow = flags & _FLAG_DESCRIPTOR or 0xFFFFFFFF in (compressed, size)
    if not sizes_follow and (crc, compressed, size) != (entry.crc, entry.compressed, entry.size):
        _refuse(path, f"its member {entry.name!r} has another size in its own header")
    offset = header + _LOCAL.size + name_length + extra_length
    if offset + entry.compressed > directory:
        _refuse(path, f"its member {entry.name!r} is cut short")
    return Member(entry.name, entry.method, offset, entry.compressed, entry.size, entry.crc)


def _require_apart(path: Path, places: list[tuple[int, int, str]], directory: int) -> None:
    position = 0
    for begin, end, name in places:
        if begin < position or end > directory:
            _refuse(path, f"its member {name!r} overlaps another one")
        position = end
