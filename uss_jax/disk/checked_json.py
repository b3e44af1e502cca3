"""Reads untrusted JSON: bounded in size and depth, and checked against a rule.

A rule defines the valid values: `whole(1, 8)`, `text("a", "b")`, or, for an object with keys,
`record({"rate": whole(1, 8)})`. It returns nothing, or raises a ValueError that names the key, the
value found and the one expected; the caller adds the file name and the remedy.

Memory: parsed values take at most 32 times the bytes of the text (`[[],[],...]` is the worst case).
"""

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_BYTES = 1 << 24
MAX_DEPTH = 32
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)
_MOST_SHOWN = 60  # characters of a value in an error message

# Checks a value; the string is its key path in the file, "" at the top level.
Rule = Callable[[Any, str], None]


def parse_json(data: bytes | str, rule: Rule | None = None, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parses JSON and checks it against a rule.

    Args:
      data: JSON text; bytes are UTF-8.
      rule: rule for the value; None: accept any.
      max_bytes: maximum length of `data`.

    Raises:
      ValueError: the text is too long, nested deeper than MAX_DEPTH, not JSON, has a duplicate key,
        or breaks the rule.
    """
    if len(data) > max_bytes:
        raise ValueError(f"holds more than {max_bytes:,} bytes of JSON")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):  # Python's limit on digits
            raise
        raise ValueError("has a number with thousands of digits") from None
    if rule is not None:
        rule(value, "")
    return value


def read_json(file: io.IOBase, rule: Rule | None = None, *, max_bytes: int = MAX_BYTES) -> Any:
    """Like `parse_json` for an open file; reads at most `max_bytes` + 1 bytes of it."""
    return parse_json(file.read(max_bytes + 1), rule, max_bytes=max_bytes)


def _check_depth(text: str) -> None:
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += (match[1] is not None) - (match[2] is not None)
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"has the key {shown(key)} twice")
            seen.add(key)
    return found


def shown(value: Any) -> str:
    """Formats a value for an error message: one line, truncated if long."""
    # Large containers and integers are never converted to text as a whole.
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**_MOST_SHOWN:
        return "a whole number of more than 60 digits"
    text = repr(value[: _MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _wrong(value: Any, key: str, expected: str) -> ValueError:
    return ValueError(f"{key or 'the file'} is {shown(value)}, expected {expected}")


def whole(least: int, most: int) -> Rule:
    """Accepts an integer from `least` to `most`, both included."""

    def check(value: Any, key: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(value, key, f"a whole number from {least:,} to {most:,}")

    return check


_LARGEST_FLOAT = int(sys.float_info.max)  # an integer, with which integers compare exactly


def number(least: float | int = -math.inf, most: float | int = math.inf) -> Rule:
    """Accepts a finite float, or an integer that a float can hold, from `least` to `most`."""

    def check(value: Any, key: str) -> None:
        right = type(value) in (int, float) and least <= value <= most
        if not right or not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:
            bounded = (least, most) != (-math.inf, math.inf)
            raise _wrong(value, key, "a number" + f" from {least:g} to {most:g}" * bounded)

    return check


def text(*choices: str) -> Rule:
    """Accepts a string; with `choices`, one of them."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str):
            raise _wrong(value, key, "a string")
        if choices and value not in choices:
            raise _wrong(value, key, ", ".join(choices))

    return check


def flag() -> Rule:
    """Accepts true or false."""

    def check(value: Any, key: str) -> None:
        if type(value) is not bool:
            raise _wrong(value, key, "true or false")

    return check


def either(*rules: Rule) -> Rule:
    """Accepts values that pass any of the rules; else raises the last rule's error."""

    def check(value: Any, key: str) -> None:
        for rule in rules[:-1]:
            try:
                return rule(value, key)
            except ValueError:
                pass
        return rules[-1](value, key)

    return check


def nothing() -> Rule:
    """Accepts only null, for use in `either`."""

    def check(value: Any, key: str) -> None:
        if value is not None:
            raise _wrong(value, key, "null")

    return check


def anything() -> Rule:
    """Accepts any JSON value."""
    return lambda value, key: None


def list_of(item: Rule, least: int = 0, most: int | None = None) -> Rule:
    """Accepts a list of `least` to `most` items that all pass a rule."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= (most or len(value)):
            bound = f" of {least} to {most} items" if most else ""
            raise _wrong(value, key, f"a list{bound}")
        for at, one in enumerate(value):
            item(one, f"{key}[{at}]")

    return check


def mapping_of(item: Rule) -> Rule:
    """Accepts an object with any keys whose values all pass a rule."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, key, "an object")
        for name, one in value.items():
            item(one, _inside(key, name))

    return check


def record(
    required: Mapping[str, Rule],
    optional: Mapping[str, Rule] | None = None,
    *,
    others: bool = False,
) -> Rule:
    """Accepts an object with given keys.

    Args:
      required: required keys, with the rules of their values.
      optional: optional keys, likewise.
      others: ignore all other keys; False: reject them.
    """
    known = {**required, **(optional or {})}

    def check(value: Any, key: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(value, key, f"an object with {_listed(known)}")
        for name in required:
            if name not in value:
                raise ValueError(f"{key or 'the file'} has no key {_inside(key, name)!r}")
        for name, one in value.items():
            if name in known:
                known[name](one, _inside(key, name))
            elif not others:
                raise ValueError(
                    f"unknown key {shown(name)}{f' in {key}' if key else ''}; expected "
                    f"{_listed(known)}"
                )

    return check


def _inside(key: str, name: str) -> str:
    name = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."
    return f"{key}.{name}" if key else name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no keys"
