"""The one interpreter for pickles: it walks the opcodes and builds inert values; no class is looked up, nothing runs.

The opcodes are those of CPython's Lib/pickletools.py; what they act on is a `Machine`. Byte strings and long texts stay
in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.core.host.errors import UnreadableFile
from persona.formats.containers.byte_ranges import file_size, reading
from persona.formats.containers.cursor import Cursor, CutShort
from persona.formats.containers.pickle_machine import LONGEST_NAME, Machine
from persona.formats.containers.pickle_symbols import ALLOWED, Malformed, is_key, set_state
from persona.formats.containers.pickle_values import BytesInFile

MOST_OPCODES = 3_000_000
LONGEST_BYTES = 256
LONGEST_INTEGER = 255
STOP = ord(".")
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
        return _run(Machine(path, Cursor(file, start, min(size, end) if end is not None else size)))


def _run(machine: Machine) -> Pickled:
    try:
        for _ in range(MOST_OPCODES):
            code = machine.byte()
            if code == STOP:
                break
            _BY_CODE[code](machine)
        else:
            machine.refuse(f"the pickle has more than {MOST_OPCODES} opcodes")
    except CutShort:
        raise UnreadableFile(
            f"{machine.path} is cut short: its pickle does not end.", hint="Fetch the file again."
        ) from None
    except (Malformed, struct.error) as error:
        machine.refuse(str(error))
    except (IndexError, KeyError):
        machine.refuse("an opcode needs a value that is not there")
    if len(machine.stack) != 1 or machine.marks:
        machine.refuse("the pickle ends with values left over")
    return Pickled(machine.stack[0], machine.cursor.position)


def _protocol(pickle: Machine) -> None:
    version = pickle.number(1)
    if not 2 <= version <= 5:
        raise Malformed(f"pickle protocol {version} is not 2 to 5")


def _frame(pickle: Machine) -> None:
    length = pickle.number(8)
    if length > pickle.cursor.end - pickle.cursor.position:
        raise UnreadableFile(
            f"{pickle.path} is cut short: its pickle needs {length} bytes more.", hint="Fetch the file again."
        )


def _integer(pickle: Machine, length_bytes: int) -> None:
    length = pickle.number(length_bytes)
    if length > LONGEST_INTEGER:
        raise Malformed(f"a number of {length} bytes is no part of a weight file")
    pickle.stack.append(int.from_bytes(pickle.take(length), "little", signed=True))


def _bytes(pickle: Machine, length_bytes: int) -> None:
    length = pickle.number(length_bytes)
    if length <= LONGEST_BYTES:
        pickle.stack.append(pickle.take(length))
    else:
        pickle.stack.append(BytesInFile(pickle.skip(length), length))


def _old_string(pickle: Machine, length_bytes: int) -> None:
    """A Python 2 string: text in a weight file."""
    length = pickle.number(length_bytes)
    pickle.stack.append(pickle.text(length))


def _unicode(pickle: Machine, length_bytes: int) -> None:
    pickle.stack.append(pickle.text(pickle.number(length_bytes)))


def _tuple_of(pickle: Machine, count: int) -> None:
    if len(pickle.stack) < count:
        raise IndexError
    items = tuple(pickle.stack[-count:])
    del pickle.stack[-count:]
    pickle.stack.append(items)


def _global(pickle: Machine) -> None:
    offset = pickle.cursor.position - 1
    ahead = pickle.cursor.ahead(LONGEST_NAME)
    length = ahead.find(b"\n", ahead.find(b"\n") + 1)
    symbol = _BY_LINES.get(ahead[:length]) if length > 0 else None
    if symbol is None:
        pickle.push_symbol(pickle.line(), pickle.line(), offset)
        return
    pickle.cursor.position += length + 1
    pickle.stack.append(symbol)


def _stack_global(pickle: Machine) -> None:
    name, module = pickle.stack.pop(), pickle.stack.pop()
    pickle.push_symbol(module, name, pickle.cursor.position - 1)


def _reduce(pickle: Machine) -> None:
    arguments = pickle.stack.pop()
    pickle.call(pickle.stack.pop(), arguments)


def _build(pickle: Machine) -> None:
    state = pickle.stack.pop()
    set_state(pickle.stack[-1], state)


def _append(pickle: Machine) -> None:
    item = pickle.stack.pop()
    pickle.append(pickle.stack[-1], [item])


def _appends(pickle: Machine) -> None:
    items = pickle.since_mark()
    pickle.append(pickle.stack[-1], items)


def _set_item(pickle: Machine) -> None:
    value, key = pickle.stack.pop(), pickle.stack.pop()
    pickle.set_items(pickle.stack[-1], [key, value])


def _set_items(pickle: Machine) -> None:
    items = pickle.since_mark()
    pickle.set_items(pickle.stack[-1], items)


def _add_items(pickle: Machine) -> None:
    items = pickle.since_mark()
    if not isinstance(pickle.stack[-1], set) or not all(is_key(item) for item in items):
        raise Malformed("a set is filled with something that is not plain")
    pickle.stack[-1].update(items)


def _tuple_from_mark(pickle: Machine) -> None:
    items = tuple(pickle.since_mark())
    pickle.stack.append(items)


def _list_from_mark(pickle: Machine) -> None:
    items = pickle.since_mark()
    pickle.stack.append(items)


def _dict_from_mark(pickle: Machine) -> None:
    items = pickle.since_mark()
    pickle.stack.append({})
    pickle.set_items(pickle.stack[-1], items)


def _push(make: Callable[[], Any]) -> Callable[[Machine], None]:
    return lambda pickle: pickle.stack.append(make())


def _unknown(code: int) -> Callable[[Machine], None]:
    return lambda pickle: pickle.refuse(f"pickle opcode {bytes([code])!r}, which no weight file uses")


_ACTIONS: dict[bytes, Callable[[Machine], Any]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": Machine.push_mark,
    b"0": lambda pickle: pickle.stack.pop(),
    b"1": Machine.since_mark,
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
