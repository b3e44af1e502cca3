"""Names of files: different texts give different names, and nothing that reads well is changed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uss_jax.ontology import load_ontology
from uss_jax.separation.names import file_name


@pytest.mark.parametrize(
    "text",
    [
        "Dog",
        "Human sounds",
        "a_b",
        "Speech + Singing",
        "狗",
        "Türklopfer",
        "v1.2 barks",
        "☃",
        "שופר",
    ],
)
def test_what_file_systems_take_is_kept(text):
    assert file_name(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", "a/b", "a:b", "a\nb", "CON", "x. ", "é" * 200])
def test_what_they_do_not_take_is_replaced_and_stays_distinct(text):
    name = file_name(text)
    assert name != text
    assert len(name.encode()) < 200
    assert not set(name) & set('/\\:*?"<>|\n\0')
    assert not name.startswith(".")
    assert name == file_name(text)


@given(st.text(max_size=300), st.text(max_size=300))
def test_different_texts_have_different_names(one, other):
    names = file_name(one), file_name(other)
    assert (names[0] == names[1]) == (one == other)
    for name in names:
        assert name
        assert len(name.encode()) < 200
        assert not name.startswith(".")
        assert "/" not in name


def test_all_kinds_of_sound_keep_their_names():
    kinds = [node.name for node in load_ontology().nodes.values()]
    assert len({file_name(kind) for kind in kinds}) == len(kinds)
    changed = [kind for kind in kinds if file_name(kind) != kind]
    assert changed == ["Bee, wasp, etc."]  # Windows drops a full stop at the end
