import io
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import check_words, damaged, fuzz, json_values
from uss_jax.disk.checked_json import (
    either,
    list_of,
    mapping_of,
    number,
    parse_json,
    record,
    text,
    whole,
)
from uss_jax.disk.checked_npz import Column, read_npz

RULE = record(
    {"a": whole(0, 9), "b": either(text("x"), list_of(number()))},
    {"c": mapping_of(number(0, 1))},
    others=True,
)
GOOD_JSON = json.dumps({"a": 1, "b": [1.5, -2e9], "c": {"d": 0.5, "é": 1}, "z": None}).encode()
COLUMNS = {"n": Column("U", "r"), "v": Column("f4", "r 3"), "k": Column("i8")}


def _good_npz():
    memory = io.BytesIO()
    np.savez(memory, n=np.array(["a", "bb"]), v=np.zeros((2, 3), np.float32), k=7)
    return memory.getvalue()


@fuzz
@given(damaged(GOOD_JSON) | st.binary(max_size=99) | json_values().map(json.dumps))
def test_json_is_right_or_refused(data):
    try:
        value = parse_json(data, RULE)
    except ValueError as error:
        check_words(error)
    else:
        assert type(value["a"]) is int
        assert 0 <= value["a"] <= 9


@fuzz
@given(damaged(_good_npz()) | st.binary(max_size=99))
def test_npz_is_right_or_refused(data):
    try:
        arrays = read_npz(io.BytesIO(data), COLUMNS)
    except ValueError as error:
        check_words(error)
    else:
        assert arrays["v"].shape == (len(arrays["n"]), 3)
        assert arrays["v"].dtype == np.float32
