import pytest

from uss_jax.data.labels import read_labels
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology

SPEECH, DOG, BARK = (load_ontology().resolve(name) for name in ("Speech", "Dog", "Bark"))
AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=22160, num_segs=22160, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/0bt9lr"
--ZhevVpy1s, 50.000, 60.000, "/m/05tny_"
-0RWZT-miFs, 0.500, 10.500, "/m/09x0r"
"""


def _read(tmp_path, text, split="train", encoding="utf-8"):
    (tmp_path / "audio").mkdir(exist_ok=True)
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    return read_labels(tmp_path / "labels.csv", tmp_path / "audio", split)


def test_names_mids_and_indexes_are_labels(tmp_path):
    rows = _read(tmp_path, f"file,labels\na b.wav,Bark; dog\n\nsub/ö.ogg,/m/09x0r;{BARK};Bark\n")
    assert rows == [
        ("a b.wav", tuple(sorted((DOG, BARK))), 2),
        ("sub/ö.ogg", tuple(sorted((SPEECH, BARK))), 4),
    ]


def test_a_column_split_selects_rows_and_other_columns_are_ignored(tmp_path):
    text = "seconds,split,labels,file\n1,train,Dog,a\n2,test,Speech,b\n"
    assert _read(tmp_path, text) == [("a", (DOG,), 2)]
    assert _read(tmp_path, text, split="test") == [("b", (SPEECH,), 3)]
    with pytest.raises(UserError, match=r'"split" says "dev"; it has test, train'):
        _read(tmp_path, text, split="dev")


def test_quoted_names_with_commas_and_a_byte_order_mark(tmp_path):
    text = 'file,labels\r\n"a,b.wav","Male speech, man speaking;Speech"\r\n'
    assert _read(tmp_path, text, encoding="utf-8-sig") == [("a,b.wav", (0, 1), 2)]


def test_audiosets_own_segments_are_read_as_published(tmp_path):
    (tmp_path / "audio" / "part0").mkdir(parents=True)
    (tmp_path / "audio" / "part0" / "Y--PJHxphWEs.wav").touch()
    (tmp_path / "audio" / "--ZhevVpy1s_50_60.flac").touch()
    (tmp_path / "audio" / "-0RWZT-miFs_500_10500.mp3").touch()
    assert _read(tmp_path, AUDIOSET) == [
        ("part0/Y--PJHxphWEs.wav", tuple(sorted((SPEECH, DOG))), 4),
        ("--ZhevVpy1s_50_60.flac", (BARK,), 5),
        ("-0RWZT-miFs_500_10500.mp3", (SPEECH,), 6),
    ]


def test_segments_without_a_file_stay_listed(tmp_path):
    assert _read(tmp_path, AUDIOSET)[0].file == "Y--PJHxphWEs.wav"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("file,labels\n", "lists no clips"),
        ("a.wav,Dog\n", "line 1: expected a header"),
        ("file,labels\na.wav,Dog\nb.wav,Dgo\n", r"line 3: no sound class.*\"Dog\""),
        ("file,labels\na.wav,\n", "line 2: no sound class"),
        ("file,labels\na.wav,527\n", "line 2: .*from 0 to 526"),
        ("file,labels\na.wav,Male speech, man speaking\n", "line 2: 3 fields"),
        ("file,labels\na.wav\n", "line 2: 1 fields"),
        ("file,labels\n,Dog\n", "line 2: the column"),
        ('file,labels\n"a.wav,Dog\n', "line 2: not a line of a CSV"),
        ("file,labels\na.wav,Dog\na.wav,Bark\n", "line 3: a.wav was listed in line 2"),
        ("# YTID\nabc, 1, 2\n", "line 2: expected YTID"),
        ('# YTID\nabc, one, 2, "/m/09x0r"\n', "line 2: expected YTID"),
        ('# YTID\nabc, 1, 2, "/m/nothing"\n', "line 2: no sound class"),
    ],
)
def test_bad_lines_are_named(tmp_path, text, said):
    with pytest.raises(UserError, match=said) as error:
        _read(tmp_path, text)
    assert str(tmp_path / "labels.csv") in str(error.value)
    assert "\n" not in str(error.value)


def test_other_encodings_and_missing_files_are_said(tmp_path):
    with pytest.raises(UserError, match="CSV file in UTF-8"):
        _read(tmp_path, "file,labels\nö.wav,Dog\n", encoding="latin-1")
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "nothing.csv", tmp_path, "train")
    with pytest.raises(UserError, match="is not a folder"):
        read_labels(tmp_path / "labels.csv", tmp_path / "nowhere", "train")
