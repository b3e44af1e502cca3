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
