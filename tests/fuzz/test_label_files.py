"""Label files, label maps and lists of files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import check_words, damaged, fuzz
from uss_jax.data.label_map import read_label_map
from uss_jax.data.labels import read_file_list, read_labels
from uss_jax.errors import UserError

TABLE = 'file,labels,split\n"a,b.wav",Dog;"Speech",train\nsub/é.ogg,/m/09x0r;5,train\n'.encode()
SEGMENTS = (
    b'# YTID, start\n--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/0bt9lr"\nx, 0, 9.5, /m/09x0r\n'
)
MAP = b"name,class\nWuff,Dog;Bark\nnoise,\n"
WORDS = st.text(st.sampled_from('abDog;,"\n\r\t\0#/.0é '), max_size=60).map(str.encode)


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    for name in ("a,b.wav", "x.wav", "Y--PJHxphWEs_30_40.opus", "notes.txt"):
        (folder / name).touch()
    return folder


@fuzz
@given(
    damaged(TABLE) | damaged(SEGMENTS) | WORDS | WORDS.map(lambda x: b"file,labels\n" + x),
    st.booleans(),
)
def test_a_label_file_is_right_or_refused(audio, data, skip_unknown):
    path = audio.parent / "labels.csv"
    path.write_bytes(data)
    try:
        labels = read_labels(path, audio, "train", skip_unknown=skip_unknown)
    except UserError as error:
        check_words(error)
        return
    assert labels.clips
    assert len({clip.id for clip in labels.clips}) == len(labels.clips)
    for clip in labels.clips:
        assert all(0 <= label < 527 for label in clip.labels)
        assert clip.labels or skip_unknown
        assert clip.segment is None or 0 <= clip.segment[0] < clip.segment[1]


@fuzz
@given(damaged(MAP) | WORDS.map(lambda x: b"name,class\n" + x))
def test_a_label_map_is_right_or_refused(audio, data):
    path = audio.parent / "map.csv"
    path.write_bytes(data)
    try:
        assert isinstance(read_label_map(path), dict)
    except UserError as error:
        check_words(error)


@fuzz
@given(damaged(MAP) | st.binary())
def test_a_list_of_files_is_read_or_refused(audio, data):
    path = audio.parent / "files.txt"
    path.write_bytes(data)
    try:
        assert all(read_file_list(path))
    except UserError as error:
        check_words(error)
