import pytest

from uss_jax.data.label_map import read_label_map
from uss_jax.data.labels import groups_of, read_file_list, read_labels, ungrouped
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


def _read(tmp_path, text, split="train", encoding="utf-8", whole=False, **options):
    (tmp_path / "audio").mkdir(exist_ok=True)
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    labels = read_labels(tmp_path / "labels.csv", tmp_path / "audio", split, **options)
    return labels if whole else [clip[:3] for clip in labels.clips]


def test_names_mids_and_indexes_are_labels(tmp_path):
    rows = _read(tmp_path, f"file,labels\na b.wav,Bark; dog;\n\nsub/ö.ogg,/m/09x0r;;{BARK};Bark\n")
    assert rows == [
        ("a b.wav", tuple(sorted((DOG, BARK))), 2),
        ("sub/ö.ogg", tuple(sorted((SPEECH, BARK))), 4),
    ]


def test_a_column_split_selects_rows_and_other_columns_are_ignored(tmp_path):
    text = "seconds,split,labels,file\n1,train,Dog,a\n2,test,Speech,b\n"
    assert _read(tmp_path, text) == [("a", (DOG,), 2)]
    assert _read(tmp_path, text, split="test") == [("b", (SPEECH,), 3)]
    with pytest.raises(
        UserError, match=r'has no line with "dev" in the column "split"; it has "test", "train"'
    ):
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
    assert _read(tmp_path, AUDIOSET)[0][0] == "Y--PJHxphWEs.wav"


@pytest.mark.parametrize(
    "name",
    [
        *("x_30_40", "Yx_30_40", "x_30000_40000", "x_30.000", "x_30.0_40.0", "x_000030"),
        *("x-30.000-40.000", "x-30-40", "x_30000", "x-30000", "Yx_000030_000040"),
    ],
)
@pytest.mark.parametrize("suffix", [".wav", ".opus", ".AIFF", ".m4a", ".w64"])
def test_names_of_common_downloaders_are_found(tmp_path, name, suffix):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / f"{name}{suffix}").touch()
    text = '# YTID\nx, 30.000, 40.000, "/m/09x0r"\n'
    labels = _read(tmp_path, text, whole=True)
    assert [clip[:4] for clip in labels.clips] == [(f"{name}{suffix}", (SPEECH,), 2, None)]
    assert not labels.unlisted


def test_a_file_without_times_may_be_the_whole_video(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("x.wav", "Yz.opus", "z_1_2.wav", "other.flac", "notes.txt", "._x.wav"):
        (tmp_path / "audio" / name).touch()
    text = '# YTID\nx, 30.000, 40.000, "/m/09x0r"\nz, 1, 2, "/m/09x0r"\n'
    labels = _read(tmp_path, text, whole=True)
    assert [clip[:4] for clip in labels.clips] == [
        ("x.wav", (SPEECH,), 2, (30.0, 40.0)),
        ("z_1_2.wav", (SPEECH,), 3, None),
    ]
    assert [str(path) for path in labels.unlisted] == ["Yz.opus", "other.flac"]
    assert [path.name for path in labels.others] == ["notes.txt"]


def test_several_segments_of_one_video_are_several_clips(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("Yvideo.wav", "other_30_40.wav"):
        (tmp_path / "audio" / name).touch()
    spans = [("video", 30, 40), ("video", 5000.125, 5010), ("other", 30, 40), ("none", 0, 10)]
    spans.append(("none", 10, 20))
    lines = ["# YTID, ...", *(f'{name}, {begin}, {end}, "{DOG}"' for name, begin, end in spans)]
    clips = _read(tmp_path, "\n".join(lines), whole=True).clips
    assert [(clip.file, clip.id, clip.shared) for clip in clips] == [
        ("Yvideo.wav", "Yvideo.wav#t=30,40", True),
        ("Yvideo.wav", "Yvideo.wav#t=5000.125,5010", True),
        ("other_30_40.wav", "other_30_40.wav", False),
        ("Ynone.wav", "Ynone.wav#t=0,10", True),
        ("Ynone.wav", "Ynone.wav#t=10,20", True),
    ]
    with pytest.raises(UserError, match=r"line 7: Yvideo.wav#t=30,40 was listed in line 2"):
        _read(tmp_path, "\n".join([*lines, lines[1]]))


def test_one_file_has_one_name(tmp_path):
    assert _read(tmp_path, "file,labels\n./sub//a.wav,Dog\n")[0][0] == "sub/a.wav"
    with pytest.raises(UserError, match=r"line 3: a.wav was listed in line 2"):
        _read(tmp_path, "file,labels\n./a.wav,Dog\na.wav,Dog\n")


def test_the_header_may_be_in_any_case(tmp_path):
    assert _read(tmp_path, "File, Labels\na,Dog\n") == [("a", (DOG,), 2)]


def test_all_unknown_labels_are_told_with_counts(tmp_path):
    text = "file,labels\na,Dgo;Speech\nb,wuff\nc,Dgo\nd,Dog\n"
    with pytest.raises(UserError, match=r'line 2: no sound class is called "Dgo"') as error:
        _read(tmp_path, text)
    assert '"Dgo" (2), "wuff" (1)' in str(error.value)
    assert "--skip-unknown-labels" in str(error.value)
    labels = _read(tmp_path, text, whole=True, skip_unknown=True)
    assert [clip.labels for clip in labels.clips] == [(SPEECH,), (), (), (DOG,)]
    assert labels.unknown == {"Dgo": [2, 4], "wuff": [3]}


def test_unknown_labels_of_other_lines_do_not_count(tmp_path):
    text = "file,labels\na.wav,Dog;Wuff\nb.wav,Wuff;Miau\nc.wav,Speech\n"
    labels = _read(tmp_path, text, whole=True, skip_unknown=True, files=["a.wav", "c.wav"])
    assert labels.unknown == {"Wuff": [2]}
    assert _read(tmp_path, text, files=["c.wav"]) == [("c.wav", (SPEECH,), 4)]
    with pytest.raises(UserError, match=r'line 3: .*"Wuff" \(1\), "Miau" \(1\)'):
        _read(tmp_path, text, files=["b.wav"])


def test_recordings_of_other_splits_and_lines_are_listed(tmp_path):
    (tmp_path / "audio").mkdir()
    for name in ("a.wav", "b.wav", "c.wav", "d.wav"):
        (tmp_path / "audio" / name).touch()
    text = "file,split,labels\na.wav,train,Dog\n./b.wav,test,Dog\nc.wav,train,Speech\n"
    for files in (None, ["a.wav"]):
        labels = _read(tmp_path, text, whole=True, files=files)
        assert [str(name) for name in labels.unlisted] == ["d.wav"]


def test_labels_joined_by_commas_are_named_as_such(tmp_path):
    with pytest.raises(UserError, match=r'"Dog,Speech"; put ";" between labels'):
        _read(tmp_path, 'file,labels\na,"Dog,Speech"\n')


def test_own_names_stand_for_classes(tmp_path):
    (tmp_path / "map.csv").write_text("name,class\nWuff,Bark;Dog\nnoise,\n大声,/m/09x0r\n")
    own = read_label_map(tmp_path / "map.csv")
    text = "file,labels\na,wuff;大声\nb,noise;Dog\nc,noise\n"
    labels = _read(tmp_path, text, whole=True, label_map=own)
    found = [clip.labels for clip in labels.clips]
    assert found == [tuple(sorted((SPEECH, DOG, BARK))), (DOG,), ()]
    assert not labels.unknown


def test_a_list_of_files_chooses_lines(tmp_path):
    (tmp_path / "list.txt").write_text("b.wav\n\n./sub/c.wav\n")
    wanted = read_file_list(tmp_path / "list.txt")
    text = "file,labels\na.wav,Dog\nb.wav,Dog\nsub/c.wav,Dog\n"
    assert [clip[0] for clip in _read(tmp_path, text, files=wanted)] == ["b.wav", "sub/c.wav"]
    with pytest.raises(UserError, match=r"no line for 1 of the 2 requested files, such as x.wav"):
        _read(tmp_path, text, files=["a.wav", "x.wav"])
    (tmp_path / "list.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=r"list.txt contains no file names"):
        read_file_list(tmp_path / "list.txt")


def test_blanks_around_fields_do_not_count(tmp_path):
    text = "file,labels,split\na.wav ,Dog , train \nb.wav,Dog,test \n"
    assert [clip[0] for clip in _read(tmp_path, text)] == ["a.wav"]
    with pytest.raises(UserError, match='it has "other", "test"'):
        _read(tmp_path, "file,labels,split\na.wav,Dog,test \nb.wav,Dog,other\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("file;labels\na.wav;Dog\n", "its columns are separated by semicolons"),
        ("File\tLabels\na.wav\tDog\n", "its columns are separated by tabs"),
        ("file,labels,File\na,Dog,b\n", "line 1: expected a header"),
        ("# YTID\nabc, nan, 2, x\n", "line 2: expected YTID"),
        ("# YTID\nabc, 5, 2, x\n", "line 2: expected YTID"),
        ("# YTID\nabc, 1, inf, x\n", "line 2: expected YTID"),
        ("file,labels\na.wav,%s\n" % ("9" * 5000), "line 2: no sound class"),
        ("file,labels\n", "lists no clips"),
        ("a.wav,Dog\n", "line 1: expected a header"),
        ("file,labels\na.wav,Dog\nb.wav,Dgo\n", r"line 3: no sound class.*\"Dog\""),
        ("file,labels\na.wav,\n", "line 2: a.wav has no labels"),
        ("file,labels\na.wav,; ;\n", "line 2: a.wav has no labels"),
        ("file,labels\na.wav,527\n", "line 2: .*from 0 to 526"),
        ("file,labels\na.wav,Male speech, man speaking\n", "line 2: 3 fields"),
        ("file,labels\na.wav\n", "line 2: 1 field,"),
        ("file,labels\n,Dog\n", "line 2: the column"),
        ('file,labels\n"a.wav,Dog\n', "line 2: not valid CSV"),
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
    with pytest.raises(UserError, match=r"labels.csv, line 2: not valid CSV in UTF-8 \(byte 0xf6"):
        _read(tmp_path, "file,labels\nö.wav,Dog\n", encoding="latin-1")
    with pytest.raises(UserError, match="cannot be read"):
        read_labels(tmp_path / "nothing.csv", tmp_path, "train")
    with pytest.raises(UserError, match="is not a folder"):
        read_labels(tmp_path / "labels.csv", tmp_path / "nowhere", "train")


@pytest.mark.parametrize("header", ["file,group", "File, Labels, Group", "group,FILE,split"])
def test_groups_are_read_as_labels_are(tmp_path, header):
    """What `prepare` takes as one file is one file here too."""
    place = tmp_path / "groups.csv"
    fields = [name.strip().lower() for name in header.split(",")]
    values = [
        {"file": "./sub//a.wav", "group": " s1", "labels": "Dog", "split": "test"},
        {"file": "b.wav ", "group": "s1", "labels": "Dog", "split": "train"},
        {"file": "c.wav", "group": "", "labels": "Dog", "split": "train"},
    ]
    lines = [",".join(value[name] for name in fields) for value in values]
    place.write_text("\ufeff" + "\n".join([header, *lines]) + "\n")
    ids = ["sub/a.wav", "b.wav", "b.wav#t=30,40", "c.wav", "d.wav", "b#t=1.wav"]
    groups = groups_of(place, ids)
    assert groups == ["s1", "s1", "s1", "", "", ""]
    assert ungrouped(place, groups).startswith("3 of 6 clips have no group in ")
    assert ungrouped(place, groups[:3]) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", 'with the columns "file" and "group", each once$'),
        ("file,labels\na.wav,Dog\n", 'with the columns "file" and "group", each once$'),
        ("file;group\na.wav;1\n", "separated by semicolons"),
        ("file,group\na.wav\n", "line 2: 1 field, the header has 2"),
        ("file,group\n,1\n", "line 2: the column"),
        ("file,group\na.wav,1\n./a.wav,2\n", 'line 3: a.wav is in the groups "1" and "2"'),
        ("file,group\nb.wav,1\n", "has no line for any record .the first is a.wav"),
    ],
)
def test_bad_groups_are_named(tmp_path, text, said):
    (tmp_path / "groups.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        groups_of(tmp_path / "groups.csv", ["a.wav"])
    with pytest.raises(UserError, match="cannot be read"):
        groups_of(tmp_path / "none.csv", ["a.wav"])
