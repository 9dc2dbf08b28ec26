"""The one interpreter for pickles: it walks the opcodes and builds inert values; no class is looked up, nothing runs.

The opcodes are those of CPython's Lib/pickletools.py. What a pickle may mention is the list in `pickle_symbols`;
everything else is refused by name with its byte offset. Byte strings and long texts stay in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import file_size, reading
from persona.formats.containers.cursor import Cursor, CutShort
from persona.formats.containers.pickle_symbols import (
    ALLOWED,
    STORAGES,
    Malformed,
    call,
    is_key,
    set_state,
)
from persona.formats.containers.pickle_values import BytesInFile, Opaque, Storage, Symbol, TextInFile

MOST_OPCODES = 3_000_000
MOST_MEMO = 1_000_000
MOST_MARKS = 1_000
MOST_COPIED = 10_000_000  # items that calls such as list(x) may copy in all
LONGEST_TEXT = 4_096  # longer texts stay in the file
LONGEST_BYTES = 256
MOST_TEXT = 64 << 20  # bytes of text held in memory in all
LONGEST_INTEGER = 255
STOP = ord(".")
_SYMBOLS = {(symbol.module, symbol.name): symbol for symbol in ALLOWED}
_BY_LINES = {f"{symbol.module}\n{symbol.name}".encode(): symbol for symbol in ALLOWED}


@dataclass(frozen=True)
class Pickled:
    """One pickle as it was found: its value, and the byte after its last opcode."""

    value: Any
    end: int


def read_pickle(path: Path, start: int = 0, end: int | None = None) -> Pickled:
    """Interpret the pickle that begins at byte `start` of a file and ends before `end` (default: the file's end).

    Raises UnreadableFile for anything that a weight file does not do."""
    size = file_size(path)
    with reading(path) as file:
        return _Interpreter(path, Cursor(file, start, min(size, end) if end is not None else size)).run()


class _Interpreter:
    def __init__(self, path: Path, cursor: Cursor) -> None:
        self.path, self.cursor = path, cursor
        self.byte, self.take = cursor.byte, cursor.take
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.text_held = self.copied = 0

    def run(self) -> Pickled:
        try:
            for _ in range(MOST_OPCODES):
                code = self.byte()
                if code == STOP:
                    break
                _BY_CODE[code](self)
            else:
                self.refuse(f"the pickle has more than {MOST_OPCODES} opcodes")
        except CutShort:
            raise UnreadableFile(
                f"{self.path} is cut short: its pickle does not end.", hint="Fetch the file again."
            ) from None
        except (Malformed, struct.error) as error:
            self.refuse(str(error))
        except (IndexError, KeyError):
            self.refuse("an opcode needs a value that is not there")
        if len(self.stack) != 1 or self.marks:
            self.refuse("the pickle ends with values left over")
        return Pickled(self.stack[0], self.cursor.position)

    def refuse(self, reason: str, hint: str = "") -> NoReturn:
        raise UnreadableFile(f"{self.path}: {reason} (near byte {self.cursor.position}).", hint=hint)

    # Reading what follows an opcode

    def number(self, length: int) -> int:
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
        if length > LONGEST_TEXT:
            return TextInFile(self.skip(length), length)
        self.text_held += length
        if self.text_held > MOST_TEXT:
            raise Malformed(f"the pickle has more than {MOST_TEXT} bytes of text")
        return self.decode(self.take(length))

    def decode(self, data: bytes) -> str:
        try:
            return data.decode("utf-8", "strict")
        except UnicodeDecodeError as error:
            raise Malformed(f"the text {data[:40]!r} is not UTF-8") from error

    def line(self) -> str:
        length = self.cursor.ahead(LONGEST_BYTES).find(b"\n")
        if length < 0:
            raise Malformed("a global's name does not end")
        return self.decode(self.cursor.take(length + 1)[:-1])

    # Acting on the stack

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def push_mark(self) -> None:
        if len(self.marks) >= MOST_MARKS:
            raise Malformed(f"the pickle is nested more than {MOST_MARKS} deep")
        self.marks.append(self.stack)
        self.stack = []

    def remember(self, key: int) -> None:
        if len(self.memo) >= MOST_MEMO:
            raise Malformed(f"the pickle remembers more than {MOST_MEMO} values")
        self.memo[key] = self.stack[-1]

    def push_symbol(self, module: Any, name: Any, offset: int) -> None:
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
        if not isinstance(target, Symbol) or not isinstance(arguments, tuple):
            raise Malformed("something is called that is not a name")
        self.copied += sum(len(item) for item in arguments if isinstance(item, (list, tuple, dict, set, str)))
        if self.copied > MOST_COPIED:
            raise Malformed(f"the pickle copies more than {MOST_COPIED} items")
        self.stack.append(call(target, arguments))

    def set_items(self, target: Any, pairs: list[Any]) -> None:
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


def _protocol(pickle: _Interpreter) -> None:
    version = pickle.number(1)
    if not 2 <= version <= 5:
        raise Malformed(f"pickle protocol {version} is not 2 to 5")


def _frame(pickle: _Interpreter) -> None:
    length = pickle.number(8)
    if length > pickle.cursor.end - pickle.cursor.position:
        raise UnreadableFile(
            f"{pickle.path} is cut short: its pickle needs {length} bytes more.", hint="Fetch the file again."
        )


def _integer(pickle: _Interpreter, length_bytes: int) -> None:
    length = pickle.number(length_bytes)
    if length > LONGEST_INTEGER:
        raise Malformed(f"a number of {length} bytes is no part of a weight file")
    pickle.stack.append(int.from_bytes(pickle.take(length), "little", signed=True))


def _bytes(pickle: _Interpreter, length_bytes: int) -> None:
    length = pickle.number(length_bytes)
    if length <= LONGEST_BYTES:
        pickle.stack.append(pickle.take(length))
    else:
        pickle.stack.append(BytesInFile(pickle.skip(length), length))


def _old_string(pickle: _Interpreter, length_bytes: int) -> None:
    """A Python 2 string: text in a weight file."""
    length = pickle.number(length_bytes)
    pickle.stack.append(pickle.text(length))


def _unicode(pickle: _Interpreter, length_bytes: int) -> None:
    pickle.stack.append(pickle.text(pickle.number(length_bytes)))


def _tuple_of(pickle: _Interpreter, count: int) -> None:
    if len(pickle.stack) < count:
        raise IndexError
    items = tuple(pickle.stack[-count:])
    del pickle.stack[-count:]
    pickle.stack.append(items)


def _global(pickle: _Interpreter) -> None:
    offset = pickle.cursor.position - 1
    ahead = pickle.cursor.ahead(LONGEST_BYTES)
    length = ahead.find(b"\n", ahead.find(b"\n") + 1)
    symbol = _BY_LINES.get(ahead[:length]) if length > 0 else None
    if symbol is None:
        pickle.push_symbol(pickle.line(), pickle.line(), offset)
        return
    pickle.cursor.position += length + 1
    pickle.stack.append(symbol)


def _stack_global(pickle: _Interpreter) -> None:
    name, module = pickle.stack.pop(), pickle.stack.pop()
    pickle.push_symbol(module, name, pickle.cursor.position - 1)


def _reduce(pickle: _Interpreter) -> None:
    arguments = pickle.stack.pop()
    pickle.call(pickle.stack.pop(), arguments)


def _build(pickle: _Interpreter) -> None:
    state = pickle.stack.pop()
    set_state(pickle.stack[-1], state)


def _append(pickle: _Interpreter) -> None:
    item = pickle.stack.pop()
    pickle.append(pickle.stack[-1], [item])


def _appends(pickle: _Interpreter) -> None:
    items = pickle.since_mark()
    pickle.append(pickle.stack[-1], items)


def _set_item(pickle: _Interpreter) -> None:
    value, key = pickle.stack.pop(), pickle.stack.pop()
    pickle.set_items(pickle.stack[-1], [key, value])


def _set_items(pickle: _Interpreter) -> None:
    items = pickle.since_mark()
    pickle.set_items(pickle.stack[-1], items)


def _add_items(pickle: _Interpreter) -> None:
    items = pickle.since_mark()
    if not isinstance(pickle.stack[-1], set) or not all(is_key(item) for item in items):
        raise Malformed("a set is filled with something that is not plain")
    pickle.stack[-1].update(items)


def _tuple_from_mark(pickle: _Interpreter) -> None:
    items = tuple(pickle.since_mark())
    pickle.stack.append(items)


def _list_from_mark(pickle: _Interpreter) -> None:
    items = pickle.since_mark()
    pickle.stack.append(items)


def _dict_from_mark(pickle: _Interpreter) -> None:
    items = pickle.since_mark()
    pickle.stack.append({})
    pickle.set_items(pickle.stack[-1], items)


def _push(make: Callable[[], Any]) -> Callable[[_Interpreter], None]:
    return lambda pickle: pickle.stack.append(make())


def _unknown(code: int) -> Callable[[_Interpreter], None]:
    return lambda pickle: pickle.refuse(f"pickle opcode {bytes([code])!r}, which no weight file uses")


_ACTIONS: dict[bytes, Callable[[_Interpreter], Any]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _Interpreter.push_mark,
    b"0": lambda pickle: pickle.stack.pop(),
    b"1": _Interpreter.since_mark,
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b"]": _push(list),
    b"}": _push(dict),
    b")": _push(tuple),
    b"\x8f": _push(set),
    b"J": lambda pickle: pickle.stack.append(int.from_bytes(pickle.take(4), "little", signed=True)),
    b"K": lambda pickle: pickle.stack.append(pickle.byte()),
    b"M": lambda pickle: pickle.stack.append(pickle.number(2)),
    b"\x8a": lambda pickle: _integer(pickle, 1),
    b"\x8b": lambda pickle: _integer(pickle, 4),
    b"G": lambda pickle: pickle.stack.append(struct.unpack(">d", pickle.take(8))[0]),
    b"\x8c": lambda pickle: _unicode(pickle, 1),
    b"X": lambda pickle: _unicode(pickle, 4),
    b"\x8d": lambda pickle: _unicode(pickle, 8),
    b"U": lambda pickle: _old_string(pickle, 1),
    b"T": lambda pickle: _old_string(pickle, 4),
    b"C": lambda pickle: _bytes(pickle, 1),
    b"B": lambda pickle: _bytes(pickle, 4),
    b"\x8e": lambda pickle: _bytes(pickle, 8),
    b"a": _append,
    b"e": _appends,
    b"s": _set_item,
    b"u": _set_items,
    b"\x90": _add_items,
    b"t": _tuple_from_mark,
    b"l": _list_from_mark,
    b"d": _dict_from_mark,
    b"\x85": lambda pickle: _tuple_of(pickle, 1),
    b"\x86": lambda pickle: _tuple_of(pickle, 2),
    b"\x87": lambda pickle: _tuple_of(pickle, 3),
    b"q": lambda pickle: pickle.remember(pickle.byte()),
    b"r": lambda pickle: pickle.remember(pickle.number(4)),
    b"\x94": lambda pickle: pickle.remember(len(pickle.memo)),
    b"h": lambda pickle: pickle.stack.append(pickle.memo[pickle.byte()]),
    b"j": lambda pickle: pickle.stack.append(pickle.memo[pickle.number(4)]),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,
    b"b": _build,
    b"Q": lambda pickle: pickle.persistent(pickle.stack.pop()),
}
_BY_CODE = [_ACTIONS.get(bytes([code]), _unknown(code)) for code in range(256)]
