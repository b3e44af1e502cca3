import pytest

from uss_jax.data.csv_rows import read_columns
from uss_jax.errors import UserError


def _read(path, content):
    path.write_bytes(content)
    return read_columns(path, ("file", "label"), "unpack it again")


def test_lines_become_dicts_of_all_columns(tmp_path):
    rows = _read(
        tmp_path / "a.csv", b'\xef\xbb\xbffile,label,more\r\na,"Dog, barking",\r\n\r\nb,Cat,1'
    )
    assert rows == [
        {"file": "a", "label": "Dog, barking", "more": ""},
        {"file": "b", "label": "Cat", "more": "1"},
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", 'no column "file" in its first line; unpack it again'),
        (b"\nfile,label\na,Dog\n", 'no column "file"'),
        (b"file,labels\na,Dog\n", 'no column "label"'),
        (b"file,label\na\n", "line 2: expected 2 fields"),
        (b"file,label\n\na,Dog,\n", "line 3: expected 2 fields"),
        (b"file,label\n\xff,Dog\n", "cannot be read as a CSV file"),
    ],
)
def test_what_would_lose_a_field_is_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=said):
        _read(tmp_path / "a.csv", content)


def test_names_that_are_not_utf_8_can_be_kept(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"file\n\xff.wav\n")
    (row,) = read_columns(tmp_path / "a.csv", ["file"], "", errors="surrogateescape")
    assert row["file"].encode(errors="surrogateescape") == b"\xff.wav"
