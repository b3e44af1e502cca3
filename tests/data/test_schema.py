import pytest

from uss_jax.data.schema import read_schema
from uss_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 10**5, "is nested deeper"),
        ("[]", "is a list of 0, expected an object"),
        ('{"idd": "a"}', "unknown key 'idd'; expected id, audio"),
        ('{"sample_rate": "8000"}', "sample_rate is '8000', expected a whole number"),
        ('{"sample_rate": 0}', "sample_rate is 0, expected a whole number from 1,000 to 768,000"),
        ('{"sample_rate": %s}' % ("9" * 30), "expected a whole number from 1,000"),
        ('{"encoding": "mp3"}', "encoding is 'mp3', expected pcm_s16le, flac"),
        ('{"split": "../x"}', "split is '../x', expected letters, digits"),
        ('{"split": ""}', "split is '', expected letters, digits"),
        ('{"split": "a\\nb"}', r"split is 'a\\nb', expected letters, digits"),
        ('{"split": "%s"}' % ("x" * 300), "expected letters, digits"),
        ('{"split": "test"}', "split has no effect without shards"),
        ('{"id": ""}', "id is '', expected 1 to 200 printable characters"),
        ('{"id": "%s"}' % ("x" * 10**6), "expected 1 to 200 printable characters"),
        ('{"id": "\\ud800"}', "expected 1 to 200 printable characters"),
        ('{"label_form": "words"}', "label_form is 'words', expected index, mid, name, multi_hot"),
    ],
)
def test_bad_schemas_are_said(tmp_path, text, said):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_schema(tmp_path / "s.json")
    assert str(tmp_path / "s.json") in str(error.value)
