"""JSON from files that others may have written: bounded in size and depth, checked against a rule.

A rule says which values are right: `whole(1, 8)`, `text("a", "b")`, or, of an object with keys,
`record({"rate": whole(1, 8)})`. It returns nothing, or raises a ValueError that names the key, what
was found and what was expected; whoever opened the file adds its name and the remedy.

Memory: parsed values take at most 32 times the bytes of the text (`[[],[],...]` is the worst case).
"""

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MAX_BYTES = 1 << 24
MAX_DEPTH = 32
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"|([\[{])|([\]}])', re.DOTALL)
_MOST_SHOWN = 60  # characters of a wrong value

# Checks a value; the text is the name of its place in the file, "" at the top.
Rule = Callable[[Any, str], None]


def parse_json(data: bytes | str, rule: Rule | None = None, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parses JSON and checks it against a rule.

    Args:
      data: the text; bytes are UTF-8.
      rule: what the value must be; None: anything.
      max_bytes: longer texts are refused.

    Raises:
      ValueError: the text is too long, nested deeper than MAX_DEPTH, no JSON, holds a key twice, or
        breaks the rule.
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
        if "integer string conversion" not in str(error):  # Python's own bound
            raise
        raise ValueError("has a number of thousands of digits") from None
    if rule is not None:
        rule(value, "")
    return value


def read_json(file: io.IOBase, rule: Rule | None = None, *, max_bytes: int = MAX_BYTES) -> Any:
    """Like `parse_json`, of an open file; reads no more than `max_bytes` of it."""
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
    """A value as an error may show it: one line, cut where it is long."""
    # Of large containers and numbers not even the whole text is made.
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**_MOST_SHOWN:
        return "a whole number of more than 60 digits"
    text = repr(value[: _MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _wrong(value: Any, key: str, expected: str) -> ValueError:
    return ValueError(f"{key or 'the file'} is {shown(value)}, expected {expected}")


def whole(least: int, most: int) -> Rule:
    """A whole number in a range, both ends included."""

    def check(value: Any, key: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(value, key, f"a whole number from {least:,} to {most:,}")

    return check


def number(least: float | int = -math.inf, most: float | int = math.inf) -> Rule:
    """A finite number, whole or not, in a range, both ends included."""

    def check(value: Any, key: str) -> None:
        right = type(value) in (int, float) and least <= value <= most
        if not right or not -math.inf < value < math.inf:
            bounded = (least, most) != (-math.inf, math.inf)
            raise _wrong(value, key, "a number" + f" from {least:g} to {most:g}" * bounded)

    return check


def text(*choices: str) -> Rule:
    """A text; if choices are given, one of them."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, str):
            raise _wrong(value, key, "a text")
        if choices and value not in choices:
            raise _wrong(value, key, ", ".join(choices))

    return check


def flag() -> Rule:
    """True or false."""

    def check(value: Any, key: str) -> None:
        if type(value) is not bool:
            raise _wrong(value, key, "true or false")

    return check


def either(*rules: Rule) -> Rule:
    """Whatever one of the rules takes; where none does, the last one's error is raised."""

    def check(value: Any, key: str) -> None:
        for rule in rules[:-1]:
            try:
                return rule(value, key)
            except ValueError:
                pass
        return rules[-1](value, key)

    return check


def nothing() -> Rule:
    """Only null: a part of `either`."""

    def check(value: Any, key: str) -> None:
        if value is not None:
            raise _wrong(value, key, "null")

    return check


def anything() -> Rule:
    """Any JSON value."""
    return lambda value, key: None


def list_of(item: Rule, least: int = 0, most: int | None = None) -> Rule:
    """A list whose items all follow a rule, with a bounded number of them."""

    def check(value: Any, key: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= (most or len(value)):
            bound = f" of {least} to {most} items" if most else ""
            raise _wrong(value, key, f"a list{bound}")
        for at, one in enumerate(value):
            item(one, f"{key}[{at}]")

    return check


def mapping_of(item: Rule) -> Rule:
    """An object of any keys, whose values all follow a rule."""

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
    """An object with certain keys.

    Args:
      required: keys that must be there, with the rules of their values.
      optional: keys that may be there.
      others: keys that are in neither are passed over; False: they are refused.
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
                    f"there is no key {shown(name)}{f' in {key}' if key else ''}; there are "
                    f"{_listed(known)}"
                )

    return check


def _inside(key: str, name: str) -> str:
    name = name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."
    return f"{key}.{name}" if key else name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no keys"
