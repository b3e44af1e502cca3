import pytest

from uss_jax.data.label_map import read_label_map
from uss_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("own,class\na,Dog\n", 'line 1: expected a header with the columns "name,class"'),
        ("", "line 1: expected a header"),
        ("name,class\na,Dgo\n", r'line 2: no sound class is called "Dgo"; did you mean "Dog"'),
        ("name,class\na\n", "line 2: 1 field,"),
        (
            "name,class\na,Dog\nA,Bark\n",
            "line 3: 'A' was mapped to other classes in an earlier line",
        ),
    ],
)
def test_bad_label_maps_are_said(tmp_path, text, said):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_label_map(tmp_path / "map.csv")


def test_every_wrong_class_of_a_label_map_is_said(tmp_path):
    lines = ["name,class", "bark,Dogg", "speech,Speech", "purr,Purrr;Catt", *13 * ["x,Mewo"]]
    (tmp_path / "map.csv").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        read_label_map(tmp_path / "map.csv")
    said = str(raised.value)
    for part in ('line 2: no sound class is called "Dogg"', 'called "Purrr"', 'called "Catt"'):
        assert part in said
    assert said.endswith("; and 6 more")
    assert said.count("line 4") == 2
