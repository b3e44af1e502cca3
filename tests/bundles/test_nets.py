import jax
import pytest

from tests.models.test_separator import Gains
from tests.tiny import TAGGER
from uss_jax.bundles import nets
from uss_jax.bundles.nets import build_query, build_sed, differences, fields_of
from uss_jax.errors import UserError
from uss_jax.models.cnn14 import Cnn14DecisionLevelMax


def test_windows_follow_the_net():
    """Of its own grid, window and context."""
    net = nets.build_separator({"net": "resunet", "hop_samples": 64, "channels": [4, 4, 4]})
    assert net.grid_samples == 64 * 4
    assert nets.fields_of(net)["net"] == "resunet"
    assert jax.tree.leaves(nets.layout(Gains(128, 64))["batch_stats"]) == []


def test_a_section_without_a_name_is_cnn14_and_another_name_is_refused():
    fields = fields_of(TAGGER)
    assert fields.pop("net") == "cnn14"
    assert build_sed(fields) == Cnn14DecisionLevelMax(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    )
    with pytest.raises(UserError, match=r"sed\.model\.net is 'ast', expected cnn14 or htsat"):
        build_sed({"net": "ast"})
    with pytest.raises(UserError, match="HTSAT has no such field; did you mean depths"):
        build_sed({"net": "htsat", "depth": (2, 2)})


def test_differences_of_sections_are_named_and_of_nets_of_two_kinds_only_that():
    before = {"separator": {"net": "resunet", "channels": [4]}, "query": {"kind": "soft", "x": 1}}
    now = {"separator": {"net": "bandsplit", "bands": [8]}, "query": {"kind": "soft", "y": 2}}
    assert list(differences(before, before)) == []
    assert list(differences(before, now)) == [
        ("separator.net", "resunet", "bandsplit"),
        ("query.y", None, 2),
        ("query.x", 1, None),
    ]
    assert list(differences(before["query"], now["query"], "query", ignored=("x",))) == [
        ("query.y", None, 2)
    ]
    assert list(differences(before, {})) == [
        ("separator", before["separator"], None),
        ("query", before["query"], None),
    ]


@pytest.mark.parametrize("kind", ["soft", "class_vectors", "embedding"])
def test_a_query_without_its_tagging_net_is_refused(kind):
    with pytest.raises(UserError, match=rf"query\.model is missing: query\.kind={kind} needs"):
        build_query({"kind": kind}, None)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "text", "trained": [3, 527]}, "has class 527, but there are 527 classes"),
        ({"kind": "one_hot", "trained": [-1]}, "query.trained"),
        ({"kind": "one_hot", "trained": "all"}, "query.trained"),
        ({"kind": "one_hot", "by_names": True}, "which query.kind=one_hot does not take"),
    ],
)
def test_classes_and_names_that_a_query_net_lacks_are_refused(section, said):
    with pytest.raises(UserError, match=said):
        build_query(section, None)
