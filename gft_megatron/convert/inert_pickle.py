"""Read a pickle as data: nothing that it names is imported, called or built.

torch writes a checkpoint's list of tensors and the form of every tensor as pickles. Here a class or function becomes a
`Name` and whatever would have been called becomes a `Made`, which say what the pickle asked for and do nothing.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Name(NamedTuple):
    """A class or function that the pickle names."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """An object that the pickle wanted to make; equal to itself only."""

    maker: Any
    """A `Name`, or None for a persistent id (a storage of torch)."""
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    """What was set on it like in a dictionary."""


_MARK = object()
_MOST_SHOWN = 80
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE", "BINBYTES", "BINBYTES8", "SHORT_BINBYTES"),
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_inert(content: bytes) -> Any:
    """The object of a pickle, made of Python's own types, `Name` and `Made`.

    Raises:
        ValueError: damaged, or with an instruction that torch's checkpoints do not use.
    """
    try:
        return _read(content)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a pickle of a checkpoint: {type(error).__name__}: {error}") from error


def _read(content: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def after_mark() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = stack[at + 1 :]
        del stack[at:]
        return values

    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _SHORT_TUPLES:
            count = _SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(after_mark()))
        elif name == "APPEND":
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif name == "APPENDS":
            values = after_mark()
            _list(stack[-1]).extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = after_mark()
            _set_items(stack[-1], values)
        elif name == "ADDITEMS":
            values = after_mark()
            if not isinstance(stack[-1], set):
                raise ValueError("items added to what is no set")
        elif name == "GLOBAL":
            module, _, what = argument.partition(" ")
            stack.append(Name(module, what))
        elif name == "STACK_GLOBAL":
            what, module = stack.pop(), stack.pop()
            if type(what) is not str or type(module) is not str:
                raise ValueError("a name that is no text")
            stack.append(Name(module, what))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, maker = stack.pop(), stack.pop()
            stack.append(Made(maker, arguments))
        elif name == "BINPERSID":
            stack.append(Made(None, stack.pop()))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Made):
                raise ValueError("a state for what has none")
            stack[-1].state = state
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            break
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"instruction {name}")
    (value,) = stack
    return value


def shown(value: Any) -> str:
    """For a message: a name or a short text as it is, of anything else its type. A few hundred bytes of pickle can nest
    what takes forever to print, or to hash."""
    if isinstance(value, Name):
        return f"{value.module}.{value.name}"[:_MOST_SHOWN]
    return repr(value[:_MOST_SHOWN]) if type(value) is str else type(value).__name__


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("values appended to what is no list")
    return value


def _set_items(target: Any, keys_and_values: list[Any]) -> None:
    items = target.items if isinstance(target, Made) else target
    if not isinstance(items, dict) or len(keys_and_values) % 2:
        raise ValueError("items set on what is no dictionary")
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        if not isinstance(key, (str, int, Made)):
            raise ValueError(f"a key of type {type(key).__name__}")
        items[key] = value
