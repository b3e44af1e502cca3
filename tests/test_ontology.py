import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology, reference_tree

ONTOLOGY = load_ontology()


def test_reference_tree_equals_golden_in_every_field(golden):
    expected = json.loads((golden / "ontology.json").read_text())
    nodes = [
        {
            "id": node.mid,
            "name": node.name,
            "level": node.level,
            "children": [child.mid for child in node.children],
            "class_index": node.class_index,
            "indexes": node.class_indexes(),
        }
        for node in reference_tree().walk()
    ]
    assert nodes == expected["nodes"]
    for level, counts in expected["levels"].items():
        here = [node for node in nodes if node["level"] == int(level)]
        assert len(here) == counts["nodes"]
        assert sum(not node["children"] for node in here) == counts["leaves"]
        assert sum(bool(node["indexes"]) for node in here) == counts["nodes_with_classes"]


def test_has_632_nodes_and_527_classes_in_audiosets_order():
    assert len(ONTOLOGY.nodes) == 632
    assert len(ONTOLOGY.class_names) == len(ONTOLOGY.class_mids) == 527
    for index, mid in enumerate(ONTOLOGY.class_mids):
        assert ONTOLOGY.nodes[mid].class_index == index
    assert ONTOLOGY.class_names[0] == "Speech"
    assert ONTOLOGY.class_mids[0] == "/m/09x0r"


def test_a_sound_with_two_parents_is_below_both():
    children_shouting = ONTOLOGY.nodes[ONTOLOGY.class_mids[ONTOLOGY.resolve("Children shouting")]]
    assert len(children_shouting.parents) == 2
    for parent in children_shouting.parents:
        assert children_shouting.mid in ONTOLOGY.descendants(parent)
    assert sum(len(node.parents) > 1 for node in ONTOLOGY.nodes.values()) == 38


def test_descendants_and_ancestors_mirror_each_other():
    for mid in ONTOLOGY.nodes:
        assert mid in ONTOLOGY.descendants(mid)
        assert all(mid in ONTOLOGY.ancestors(below) for below in ONTOLOGY.descendants(mid))


def test_every_class_is_below_a_node_of_level_1():
    assert [ONTOLOGY.nodes[mid].name for mid in ONTOLOGY.levels[1]] == [
        "Human sounds",
        "Animal",
        "Music",
        "Natural sounds",
        "Sounds of things",
        "Source-ambiguous sounds",
        "Channel, environment and background",
    ]
    below = set().union(*(ONTOLOGY.class_indexes(mid) for mid in ONTOLOGY.levels[1]))
    assert below == set(range(527))
    assert sum(len(mids) for mids in ONTOLOGY.levels.values()) == 632
    for node in ONTOLOGY.nodes.values():
        above = [ONTOLOGY.nodes[parent].level for parent in node.parents]
        assert node.level == min(above, default=0) + 1


def test_full_ontology_holds_everything_of_the_reference_tree():
    for node in reference_tree().walk()[1:]:
        assert set(node.class_indexes()) <= set(ONTOLOGY.class_indexes(node.mid))


def test_relatives_are_symmetric_and_include_itself():
    for index in range(527):
        assert index in ONTOLOGY.relatives(index)
        assert all(index in ONTOLOGY.relatives(other) for other in ONTOLOGY.relatives(index))
    dog, bark, speech = (ONTOLOGY.resolve(name) for name in ("Dog", "Bark", "Speech"))
    assert bark in ONTOLOGY.relatives(dog)
    assert speech not in ONTOLOGY.relatives(dog)


@given(st.integers(0, 526), st.sampled_from([str.lower, str.upper, str.title, str]))
def test_resolve_takes_names_mids_and_indexes_in_any_case(index, case):
    assert ONTOLOGY.resolve(case(ONTOLOGY.class_names[index])) == index
    assert ONTOLOGY.resolve(case(ONTOLOGY.class_mids[index])) == index
    assert ONTOLOGY.resolve(f" {index} ") == index


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("Vilin, fiddle", '"Violin, fiddle"'),
        ("meowing", '"Meow"'),
        ("527", "from 0 to 526"),
        ("-1", "from 0 to 526"),
        ("", "use one of AudioSet's class names"),
        ("Human voice", "name classes below it, such as Speech"),
        ("qqqqzzz", "use one of AudioSet's class names"),
        ("²", "from 0 to 526"),
    ],
)
def test_unknown_label_is_an_error_with_advice(label, said):
    with pytest.raises(UserError, match=r"class") as error:
        ONTOLOGY.resolve(label)
    assert said in str(error.value)
