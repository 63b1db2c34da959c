"""What a chat template may do while it renders one conversation: a bounded amount of work.

A chat template is a program of a stranger. jinja2's sandbox keeps it from Python's internals, but
not from endless work: loops in loops, macros that call themselves twice, ``'a' * 10**10``. The
environment (chat_environment.py) reports each operation to a `Work`, which limits

- the **steps**: one for each round of a loop, each call and each filter;
- the **characters** of all text and lists that the template makes, and so its memory;
- the **size of one value**, with everything inside it. A list that holds another list twice counts
  it twice, because its text and its comparison are as long as that.

Steps and characters depend on the template and the conversation alone, so a conversation is refused
on every machine or on none. The processor time is limited too, for operations that are slow and
count little.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from itertools import chain, permutations
from typing import Any, TypeVar

from jinja2.exceptions import SecurityError

T = TypeVar("T")

STEPS = 1 << 23  # enough for a loop over 2,900 messages in a loop over these messages
CHARACTERS = 1 << 27  # of all values that a template makes
LARGEST = 1 << 24  # characters of one value, and of a rendered conversation
SECONDS = 10.0  # of processor time
WIDEST = 1 << 16  # bits of a number, the width of a format, and the input of slow filters

_ITEM = 32  # an item of a list counts as this many characters
_EVERY = 63  # the clock is read once in 64 steps
_CONTAINERS = (list, tuple, dict, set, frozenset, deque, KeysView, ValuesView, ItemsView)
_PADDED = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "to_bytes"}
_REPEATED = {"batch": _ITEM, "slice": 2 * _ITEM, "round": 1 << 14}
"""How much each unit of the largest argument counts."""
_SLOW = {"wordwrap", "urlize", "striptags", "xmlattr", "pprint", "strftime"}
"""Filters and methods whose time or result is no small multiple of their input."""
_WIDTH = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\d+|\*)?(?:\.(\d+|\*))?")


class WorkLimit(SecurityError):
    """A template does more than it may."""


def fits(size: int) -> None:
    """Refuse a value of more characters than one value may have."""
    if size > LARGEST:
        raise WorkLimit(f"it makes a value of more than {LARGEST:,} characters")


class Work:
    """The work of a template since `begin`."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget the last conversation."""
        self._steps = self._characters = 0
        self._until = time.thread_time() + SECONDS
        self._weights: dict[int, tuple[Any, int]] = {}  # the value too: its id stays its own

    def step(self, characters: int = 0) -> bool:
        """Count a step, and the characters that it writes. Return True."""
        self._steps += 1
        if self._steps > STEPS:
            raise WorkLimit(f"it takes more than {STEPS:,} steps")
        if not self._steps & _EVERY and time.thread_time() > self._until:
            raise WorkLimit(f"it takes more than {SECONDS:g} seconds")
        if characters:
            self._spend(characters)
        return True

    def _spend(self, characters: int) -> None:
        self._characters += characters
        if self._characters > CHARACTERS:
            raise WorkLimit(f"it makes more than {CHARACTERS:,} characters")

    def made(self, value: T) -> T:
        """Count a value that an operation has made, and return the value."""
        if isinstance(value, (str, bytes)):
            return self.written(value)
        self.weight(value)
        return value

    def written(self, value: T) -> T:
        """Count the text of a value that is written, and return the value."""
        size = self.weight(value)
        fits(size)
        self._spend(size)
        return value

    def weight(self, value: Any) -> int:
        """Return the size of a value in characters, with everything inside it."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, int):
            return max(_ITEM, value.bit_length() // 3)
        if not isinstance(value, _CONTAINERS):
            return _ITEM
        known = self._weights.get(id(value))
        if known is None:
            self._spend(_ITEM * len(value))
            total = _ITEM
            for item in _items(value):
                total += _ITEM + self.weight(item)
                fits(total)
            known = self._weights[id(value)] = value, total
        return known[1]

    def check_call(
        self, name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]
    ) -> None:
        """Refuse a method or a filter whose result would be too large, before it is made.

        ``value``: the object of the method, or the input of the filter.
        ``args``, ``named``: the other arguments."""
        given = [*args, *named.values()]
        widest = max((_width(argument) for argument in given), default=0)
        if name in _PADDED:
            lines = value.count("\n") + value.count("\t") if isinstance(value, str) else 0
            fits((1 + lines) * widest)
        elif name in _REPEATED:
            fits(_REPEATED[name] * widest)
        elif name == "replace":
            kind: type[Any] = bytes if isinstance(value, bytes) else str
            text: Any = value if isinstance(value, kind) else str(value)
            parts = [x if isinstance(x, kind) else str(x) for x in given[:3]]
            grown = (text.count(old) * len(new) for old, new in permutations(parts, 2))
            fits(len(text) + max(grown, default=0))
        elif name == "translate":
            longest = (self.weight(new) for table in given for new in _items(table))
            fits(self.weight(value) * max(longest, default=1))
        elif name == "tojson":
            fits(self.weight(value) * (_ITEM + sum(map(_width, given))) // _ITEM)
        elif name == "format":
            self.check_format(value, dict(named) or list(args))
        elif name in _SLOW and self.weight(value) + sum(map(self.weight, given)) > WIDEST:
            raise WorkLimit(f"{name} has an input of more than {WIDEST:,} characters")

    def check_join(self, items: Any, separator: Any) -> Any:
        """Refuse to join too much text. Return the items: an iterator can be read only once."""
        items = list(items) if isinstance(items, Iterator) else items
        if isinstance(items, (str, bytes, *_CONTAINERS)):
            fits(len(items) * self.weight(separator) + self.weight(items))
        return items

    def check_keys(self, keys: list[Any]) -> None:
        """Refuse to sort or to compare items by too much text: a text is copied in lower case."""
        fits(sum(_ITEM + self.weight(key) for key in keys))

    def check_sum(self, items: list[Any], start: Any) -> None:
        """Refuse to add up lists for too long."""
        if isinstance(start, _CONTAINERS):
            fits(len(items) * (self.weight(items) + self.weight(start)))

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Refuse a binary operator whose result would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (bits[0] * abs(right) if operator == "**" else sum(bits)) > WIDEST:
                raise WorkLimit(f"it makes a number of more than {WIDEST:,} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, (int, float)):
                    fits(self.weight(value) * abs(times))
        elif operator == "+":
            fits(self.weight(left) + self.weight(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            self.check_format(left, right)

    def check_format(self, pattern: Any, values: Any) -> None:
        """Refuse a ``%`` format whose result would be too large."""
        text = pattern.decode("latin1") if isinstance(pattern, bytes) else str(pattern)
        widths = [width for match in _WIDTH.finditer(text) for width in match.groups() if width]
        for width in widths:
            check_width(width)
        fits(len(text) + len(widths) * WIDEST + text.count("%") * self.weight(values))


def check_width(width: str) -> None:
    """Refuse a width in a format: a large number, or one that an argument has (``*``)."""
    if not width.isdecimal() or len(width) > 9 or int(width) > WIDEST:
        raise WorkLimit(f"a format has a width over {WIDEST:,}, or the width *")


def _width(argument: Any) -> int:
    """Return what an argument may add: a number of spaces, or a text."""
    if isinstance(argument, int):
        return abs(argument)
    return len(argument) if isinstance(argument, (str, bytes)) else 0


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    return value if isinstance(value, _CONTAINERS) else ()
