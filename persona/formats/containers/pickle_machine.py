"""The stack, the memo and the limits of an interpreted pickle: what an opcode can do, and how much of it.

What a pickle may mention is the list in `pickle_symbols`; everything else is refused by name with its byte offset.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.cursor import Cursor
from persona.formats.containers.pickle_symbols import ALLOWED, STORAGES, Malformed, call, is_key
from persona.formats.containers.pickle_values import Opaque, Storage, Symbol, TextInFile

MOST_MEMO = 1_000_000
MOST_MARKS = 1_000
MOST_COPIED = 10_000_000  # items that calls such as list(x) may copy in all
LONGEST_TEXT = 4_096  # longer texts stay in the file
LONGEST_NAME = 256  # bytes of a global's module or name
MOST_TEXT = 64 << 20  # bytes of text held in memory in all
_SYMBOLS = {(symbol.module, symbol.name): symbol for symbol in ALLOWED}


class Machine:
    """The state of one pickle that is being interpreted, and what may be done to it. Its methods raise Malformed,
    CutShort, UnreadableFile, and IndexError or KeyError where a value is missing."""

    def __init__(self, path: Path, cursor: Cursor) -> None:
        self.path, self.cursor = path, cursor
        self.byte, self.take = cursor.byte, cursor.take
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.text_held = self.copied = 0

    def refuse(self, reason: str, hint: str = "") -> NoReturn:
        """The file is not what it should be: `reason`, and where."""
        raise UnreadableFile(f"{self.path}: {reason} (near byte {self.cursor.position}).", hint=hint)

    # Reading what follows an opcode

    def number(self, length: int) -> int:
        """A little-endian number of `length` bytes."""
        return int.from_bytes(self.take(length), "little")

    def skip(self, length: int) -> int:
        """Pass over `length` bytes; where they begin."""
        start, left = self.cursor.position, self.cursor.end - self.cursor.position
        if length > left:
            raise UnreadableFile(
                f"{self.path} is cut short: {length} bytes should follow byte {start} and {left} do.",
                hint="Fetch the file again.",
            )
        self.cursor.position += length
        return start

    def text(self, length: int) -> str | TextInFile:
        """A text of `length` bytes; a long one stays in the file."""
        if length > LONGEST_TEXT:
            return TextInFile(self.skip(length), length)
        self.text_held += length
        if self.text_held > MOST_TEXT:
            raise Malformed(f"the pickle has more than {MOST_TEXT} bytes of text")
        return self.decode(self.take(length))

    def decode(self, data: bytes) -> str:
        """Strict UTF-8."""
        try:
            return data.decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            raise Malformed(f"the text {data[:40]!r} is not UTF-8") from error

    def line(self) -> str:
        """What is left of a line of text, as protocol 0 writes names."""
        length = self.cursor.ahead(LONGEST_NAME).find(b"\n")
        if length < 0:
            raise Malformed("a global's name does not end")
        return self.decode(self.cursor.take(length + 1)[:-1])

    # Acting on the stack

    def since_mark(self) -> list[Any]:
        """What was pushed since the last mark, and the stack from before it again."""
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push_mark(self) -> None:
        """Begin a list of values whose length is not known yet."""
        if len(self.marks) >= MOST_MARKS:
            raise Malformed(f"the pickle is nested more than {MOST_MARKS} deep")
        self.marks.append(self.stack)
        self.stack = []

    def remember(self, key: int) -> None:
        """Keep the uppermost value under a number."""
        if len(self.memo) >= MOST_MEMO:
            raise Malformed(f"the pickle remembers more than {MOST_MEMO} values")
        self.memo[key] = self.stack[-1]

    def push_symbol(self, module: Any, name: Any, offset: int) -> None:
        """A name from the list of what may be there, inert."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Malformed("a global's name is not text")
        symbol = _SYMBOLS.get((module, name))
        if symbol is None:
            raise UnreadableFile(
                f"{self.path} asks for {f'{module}.{name}'[:120]!r} at byte {offset}, which no weight file needs. "
                "Nothing of the file was run.",
                hint="Do not open it with another program, and get the weights as safetensors.",
            )
        self.stack.append(symbol)

    def call(self, target: Any, arguments: Any) -> None:
        """What the name `target` stands for, made by `pickle_symbols`."""
        if not isinstance(target, Symbol) or not isinstance(arguments, tuple):
            raise Malformed("something is called that is not a name")
        self.copied += sum(len(item) for item in arguments if isinstance(item, (list, tuple, dict, set, str)))
        if self.copied > MOST_COPIED:
            raise Malformed(f"the pickle copies more than {MOST_COPIED} items")
        self.stack.append(call(target, arguments))

    def set_items(self, target: Any, pairs: list[Any]) -> None:
        """Names and values by turns, put into a dictionary."""
        if len(pairs) % 2:
            raise Malformed("a dictionary is filled with a name that has no value")
        items = target.items if isinstance(target, Opaque) else target
        if not isinstance(items, dict):
            raise Malformed("something that is not a dictionary is filled like one")
        for index in range(0, len(pairs), 2):
            if not is_key(pairs[index]):
                raise Malformed(f"a dictionary has a name that is not plain: {type(pairs[index]).__name__!s}")
            items[pairs[index]] = pairs[index + 1]

    def append(self, target: Any, items: list[Any]) -> None:
        """Values put at the end of a list."""
        if not isinstance(target, list):
            raise Malformed("something that is not a list is filled like one")
        target.extend(items)

    def persistent(self, value: Any) -> None:
        """torch's only persistent ids: ("storage", type, key, device, count[, view])."""
        if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
            raise Malformed("a persistent id is not a torch storage")
        kind, key, count = value[1], value[2], value[4]
        if not isinstance(kind, Symbol) or kind.name not in STORAGES:
            raise Malformed(f"a storage has the unknown type {str(kind)[:60]}")
        if not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**62:
            raise Malformed("a storage has no key or no size")
        if len(value) == 6 and value[5] is not None:
            raise Malformed("a storage is a view of another one, as torch before 0.4 wrote it: not supported")
        self.stack.append(Storage(key, STORAGES[kind.name], count))
