"""Tables that people write: label files, label maps, groups, lists of files, manifests of pairs."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.damage import check_words, damaged, fuzz
from uss_jax.data.label_map import read_label_map
from uss_jax.data.labels import groups_of, read_file_list, read_groups, read_labels
from uss_jax.errors import UserError
from uss_jax.evaluation.suites.pairs import find_pairs

TABLE = 'file,labels,split\n"a,b.wav",Dog;"Speech",train\nsub/é.ogg,/m/09x0r;5,train\n'.encode()
SEGMENTS = (
    b'# YTID, start\n--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/m/0bt9lr"\nx, 0, 9.5, /m/09x0r\n'
)
GROUPS = b"file,labels,group\n./a.wav,Dog,s1\nv.wav,Bark,s2\nw.wav,Cat,\n"
MANIFEST = b"file,class_index,partner_class_index,group\nclass_id=3/0,3,7,a\nclass_id=3/1,3,9,\n"
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


@fuzz
@given(damaged(GROUPS) | WORDS.map(lambda x: b"file,group\n" + x))
@example(GROUPS)
def test_groups_are_right_or_refused(audio, data):
    path = audio.parent / "groups.csv"
    path.write_bytes(data)
    try:
        groups = groups_of(path, ["a.wav", "v.wav#t=30,40", "other.wav"])
    except UserError as error:
        check_words(error)
        return
    assert len(groups) == 3
    of_file = read_groups(path)
    assert of_file.keys() & {"a.wav", "v.wav#t=30,40", "v.wav", "other.wav"}
    assert groups == [
        of_file.get("a.wav", ""),
        of_file.get("v.wav#t=30,40", of_file.get("v.wav", "")),
        of_file.get("other.wav", ""),
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "class_id=3").mkdir()
    for name in ("0.mixture.wav", "0.source.wav", "1.mixture.wav", "1.source.wav"):
        (folder / "class_id=3" / name).touch()
    return folder


@fuzz
@given(damaged(MANIFEST) | WORDS.map(lambda x: b"file,group,partner_class_index\n" + x))
def test_a_manifest_of_pairs_is_right_or_refused(pairs, data):
    (pairs / "manifest.csv").write_bytes(data)
    try:
        found = find_pairs(pairs)
    except UserError as error:
        check_words(error)
        return
    assert [pair.class_index for pair in found] == [3, 3]
    for pair in found:
        assert pair.other_class_index is None or 0 <= pair.other_class_index < 527
        assert isinstance(pair.group, str)
