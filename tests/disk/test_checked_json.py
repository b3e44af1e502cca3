import math
import tracemalloc

import pytest

from uss_jax.disk.checked_json import (
    MAX_DEPTH,
    either,
    flag,
    list_of,
    mapping_of,
    nothing,
    number,
    parse_json,
    record,
    text,
    whole,
)

RULE = record(
    {"rate": whole(1, 768_000)},
    {
        "share": number(0, 1),
        "form": text("a", "b"),
        "on": flag(),
        "limit": either(nothing(), whole(0, 5)),
        "list": list_of(whole(0, 9), most=3),
        "named": mapping_of(number()),
    },
)


def test_right_values_come_back():
    data = b'{"rate": 8000, "share": 0.5, "limit": null, "list": [1, 2], "named": {"x": -1e30}}'
    assert parse_json(data, RULE) == {
        "rate": 8000,
        "share": 0.5,
        "limit": None,
        "list": [1, 2],
        "named": {"x": -1e30},
    }
    assert parse_json(b'\xef\xbb\xbf{"rate": 1}', RULE) == {"rate": 1}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("[]", "the file is a list of 0, expected an object with rate, share"),
        ("{}", "the file has no key 'rate'"),
        ('{"rate": 0}', "rate is 0, expected a whole number from 1 to 768,000"),
        ('{"rate": true}', "rate is True, expected a whole number"),
        ('{"rate": 8000.0}', r"rate is 8000\.0, expected a whole number"),
        ('{"rate": %s}' % ("9" * 300), "rate is a whole number of more than 60 digits"),
        ('{"rate": 1, "share": NaN}', "share is nan, expected a number from 0 to 1"),
        ('{"rate": 1, "named": {"x": 1e999}}', r"named\.x is inf, expected a number$"),
        ('{"rate": 1, "form": "c"}', "form is 'c', expected a, b"),
        ('{"rate": 1, "on": 1}', "on is 1, expected true or false"),
        ('{"rate": 1, "limit": 6}', "limit is 6, expected a whole number from 0 to 5"),
        ('{"rate": 1, "list": [1, -1]}', r"list\[1\] is -1, expected a whole number from 0 to 9"),
        ('{"rate": 1, "list": [1, 1, 1, 1]}', "list is a list of 4, expected a list of 0 to 3"),
        ('{"rate": 1, "rat": 1}', "unknown key 'rat'; expected rate, share"),
        ('{"rate": 1, "rate": 2}', "has the key 'rate' twice"),
        ('{"rate": "%s"}' % ("x\\n" * 10**5), r"rate is '(x\\n)+"),
        ("{", "is not JSON"),
        (b"\xff{}", "is not text in UTF-8"),
        ("9" * 5000, "^has a number with thousands of digits$"),
        ("[" * 10**5, f"is nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 10**5, f"is nested deeper than {MAX_DEPTH} levels"),
        ('"' * 10**5, "is not JSON"),
    ],
)
def test_wrong_values_are_said_with_their_key(data, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_json(data, RULE)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_brackets_in_texts_are_no_depth():
    assert parse_json('{"rate": ["\\"[[[' + "[" * 100 + '", "]"]}')


def test_long_texts_are_refused():
    with pytest.raises(ValueError, match="more than 10 bytes"):
        parse_json(b"[" + b" " * 10, max_bytes=10)


@pytest.mark.parametrize("unit", ["[],", "{},", '{"a":0},', "1.5,", '"abcd",', "-99999,"])
def test_memory_is_a_bounded_multiple_of_the_text(unit):
    data = "[" + unit * 30_000 + "0]"
    tracemalloc.start()
    parse_json(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * len(data)


def test_infinite_bounds_take_no_infinity():
    with pytest.raises(ValueError, match="x is -inf, expected a number"):
        number(-math.inf, 0)(-math.inf, "x")
