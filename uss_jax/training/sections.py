"""Reads frozen dataclasses from nested mappings such as configs: a dataclass is a section.

A field without a default is a required key. Each key follows its rule, or that of its type.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

from uss_jax.disk.checked_json import Rule, flag, number, record, shown, text, whole
from uss_jax.errors import UserError

Section = TypeVar("Section")
MOST = 2**31 - 1  # step counters are int32

_RULES_OF_TYPES: dict[Any, Rule] = {
    int: whole(1, MOST),
    float: number(),
    str: text(),
    bool: flag(),
    Mapping[str, Any]: record({}, others=True),
    Mapping[str, int]: record({}, others=True),
}


def one_of(*words: str) -> Rule:
    """Accepts one of some words."""

    def check(value: Any, key: str) -> None:
        if value not in words:
            raise ValueError(f"{key} is {shown(value)}, expected {' or '.join(words)}")

    return check


def span(rule: Rule, least: str, most: str) -> Rule:
    """Accepts an object of two values that follow a rule, the first at most the second."""

    def check(value: Any, key: str) -> None:
        record({least: rule, most: rule})(value, key)
        if value[least] > value[most]:
            raise ValueError(
                f"{key}.{least}={value[least]} is above {key}.{most}={value[most]}; change one of "
                "them"
            )

    return check


def read_section(
    kind: type[Section],
    values: Mapping[str, Any],
    rules: Mapping[str, Rule],
    remedy: Callable[[str], str],
    inside: str = "",
) -> Section:
    """Reads a dataclass and its sections from a mapping.

    Args:
      kind: class to read.
      values: values by field name.
      rules: rules by dotted name of the key.
      remedy: maps the dotted name of a missing key to what to do about it.
      inside: dotted name of the section, with a dot at its end; "" for the whole config.

    Raises:
      UserError: a key is missing, unknown, or breaks its rule.
    """
    found = {}
    for field in dataclasses.fields(kind):
        name = f"{inside}{field.name}"
        if field.name not in values:
            if (field.default, field.default_factory) == (dataclasses.MISSING,) * 2:
                raise UserError(f"config.{name} is missing; {remedy(name)}")
            continue
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, Mapping):
                raise UserError(f"config.{name} is {shown(value)}, expected a section of keys")
            value = read_section(field.type, value, rules, remedy, f"{name}.")
        elif value is not None:
            _follow(rules.get(name) or _RULES_OF_TYPES.get(field.type), value, f"config.{name}")
            value = float(value) if field.type is float else value
        found[field.name] = value
    _refuse_unknown(values, {field.name for field in dataclasses.fields(kind)}, inside)
    return kind(**found)


def _refuse_unknown(values: Mapping[str, Any], known: Set[str], inside: str) -> None:
    """Raises a UserError for a key that no field has."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean config.{inside}{near[0]}?" if near else "remove it"
            raise UserError(f"config.{inside}{key} is no key of this run; {hint}")


def _follow(rule: Rule | None, value: Any, key: str) -> None:
    """Raises a UserError if a value breaks its rule."""
    try:
        if rule is not None:
            rule(value, key)
    except ValueError as error:
        raise UserError(str(error)) from None


def default_of(field: dataclasses.Field) -> Any:
    """Returns the default of an optional key, None of a required one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
