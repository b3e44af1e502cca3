"""Properties of the bundled sounds (uss_jax/assets/demo/ATTRIBUTION.md has the rules)."""

import collections
import csv
import importlib.resources

import pytest
import soundfile

from uss_jax.ontology import load_ontology

ASSETS = importlib.resources.files("uss_jax") / "assets"
DEMO, MORE = ASSETS / "demo", ASSETS / "more"


def _read(folder):
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        clips = list(csv.DictReader(file))
    for clip in clips:
        clip["labels"] = clip["labels"].split(";")
        clip["originals"] = {(clip["package"], name) for name in clip["original"].split("|")}
    return clips


@pytest.fixture(scope="module")
def clips():
    return _read(DEMO)


@pytest.fixture(scope="module")
def more():
    return _read(MORE)


def _of(clips, split):
    return [clip for clip in clips if clip["split"] == split]


@pytest.mark.parametrize(("folder", "seconds"), [(DEMO, 5), (MORE, 10)])
def test_every_clip_is_32_khz_mono_and_short_and_the_whole_is_small(folder, seconds):
    listed = _read(folder)
    for clip in listed:
        info = soundfile.info(str(folder / clip["file"]))
        assert (info.samplerate, info.channels, info.format) == (32000, 1, "OGG"), clip["file"]
        assert info.frames <= seconds * 32000, clip["file"]
        assert round(info.frames / 32000, 3) == float(clip["seconds"]), clip["file"]
    found = {path.name for path in folder.iterdir() if path.name.endswith(".ogg")}
    assert found == {clip["file"] for clip in listed}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6


def test_every_label_is_a_class(clips, more):
    ontology = load_ontology()
    for clip in clips + more:
        for label in clip["labels"]:
            assert ontology.class_names[ontology.resolve(label)] == label


def test_licences_permit_redistribution_and_are_attributed(clips, more):
    permitted = {
        DEMO: {"CC0-1.0", "CC-BY-3.0", "MIT", "public-domain"},
        MORE: {"CC0-1.0", "BSD-4-Clause-like"},
    }
    for folder, of_folder in ((DEMO, clips), (MORE, more)):
        attribution = (folder / "ATTRIBUTION.md").read_text(encoding="utf-8")
        packages = collections.Counter(clip["package"] for clip in of_folder)
        for clip in of_folder:
            assert clip["licence"] in permitted[folder]
            assert clip["attribution"]
        for package, number in packages.items():
            assert f"### {package} ({number} clips)" in attribution
    attribution = (DEMO / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for clip in clips:
        if clip["package"] == "openttd-opensfx":  # an author for each sound
            assert f"`{clip['file']}` ({clip['licence']})" in attribution


def test_no_original_recording_is_in_both_splits(clips):
    train, test = (
        set().union(*(clip["originals"] for clip in _of(clips, split)))
        for split in ("train", "test")
    )
    assert not train & test


def test_the_further_recordings_are_not_among_those_for_testing(clips, more):
    assert {clip["split"] for clip in more} == {"train"}
    tested = set().union(*(clip["originals"] for clip in _of(clips, "test")))
    assert not tested & set().union(*(clip["originals"] for clip in more))


def test_every_label_of_a_test_clip_has_training_clips_and_its_group_is_true(clips):
    packages = collections.defaultdict(set)
    for clip in _of(clips, "train"):
        assert clip["group"] == ""
        for label in clip["labels"]:
            packages[label].add(clip["package"])
    for clip in _of(clips, "test"):
        for label in clip["labels"]:
            assert packages[label], (clip["file"], label)
            seen = clip["package"] in packages[label]
            assert clip["group"] == ("unseen_recording" if seen else "unseen_package")


def test_a_class_of_two_packages_is_split_by_package(clips):
    packages = collections.defaultdict(lambda: {"train": set(), "test": set()})
    for clip in clips:
        for label in clip["labels"]:
            packages[label][clip["split"]].add(clip["package"])
    for label, by_split in packages.items():
        if by_split["test"] and len(by_split["train"] | by_split["test"]) > 1:
            assert not by_split["train"] & by_split["test"], label


def test_both_groups_are_well_filled(clips):
    groups = collections.Counter(clip["group"] for clip in _of(clips, "test"))
    classes = {
        group: {
            label
            for clip in _of(clips, "test")
            if clip["group"] == group
            for label in clip["labels"]
        }
        for group in groups
    }
    print(groups, {group: len(labels) for group, labels in classes.items()})
    assert groups["unseen_package"] >= 12
    assert groups["unseen_recording"] >= 12
    assert len(classes["unseen_package"]) >= 8
    assert len(classes["unseen_recording"]) >= 20
