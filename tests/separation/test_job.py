"""Many recordings through the command line: folders, reports, bad files among good ones."""

import errno
import functools
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
import soundfile

from tests import tiny
from uss_jax.cli.main import main
from uss_jax.disk.atomic import replacing
from uss_jax.errors import UserError
from uss_jax.ontology import load_ontology
from uss_jax.separation import job
from uss_jax.separation.input_files import InputFile
from uss_jax.separation.names import file_name
from uss_jax.separation.queries import parse_classes, without

QUICK_COMPILATION = True


def separate(bundle, out, *words):
    """Whatever is asked for by class is heard."""
    everywhere = [] if "--query" in words else ["--threshold", "0.0"]
    return main(["separate", "--model", bundle, "--out", str(out), *everywhere, *words])


def test_every_recording_gets_a_folder_and_a_report(bundle, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    assert separate(bundle, out, str(recordings), "--classes", "Dog", "Music+Speech") == 0
    made = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    names = ("Dog.wav", "Music + Speech.wav", "report.json", "report.html")
    assert made == {f"recordings/{at}/{name}" for at in ("a", "b", "more/a") for name in names}
    out /= "recordings"
    facts = json.loads((out / "b" / "report.json").read_text())
    assert (facts["recording"], facts["sample_rate"], facts["channels"]) == ("b.flac", 8000, 1)
    assert facts["seconds"] == pytest.approx(1.2)
    assert [sound["name"] for sound in facts["sounds"]] == ["Dog", "Music + Speech"]
    dog, _ = soundfile.read(out / "b" / facts["sounds"][0]["file"])
    assert facts["sounds"][0]["rms"] == pytest.approx(np.sqrt(np.mean(dog**2)), rel=1e-4)
    assert facts["settings"]["classes"] == ["Dog", "Music+Speech"]
    assert len(facts["classes"]) == 527  # with a threshold of 0
    assert {len(row) for row in facts["classes"].values()} == {3}
    said = capsys.readouterr()
    assert "works at 8000 Hz: separated sounds contain nothing above 4000 Hz" in said.out
    assert "3 of" not in said.err


def test_a_bad_file_is_said_and_the_rest_goes_on(bundle, recordings, tmp_path, capsys):
    (recordings / "b.flac").write_bytes(b"fLaC but no more")
    assert separate(bundle, tmp_path / "out", str(recordings), "--classes", "Dog") == 1
    said = capsys.readouterr()
    assert "b.flac cannot be read as audio" in said.err
    assert "1 of 3 recordings could not be separated" in said.err
    made = {str(path.parent) for path in tmp_path.glob("out/**/report.json")}
    assert made == {str(tmp_path / "out/recordings" / at) for at in ("a", "more/a")}


def test_a_full_disk_ends_the_command_at_the_first_recording(tmp_path, capsys):
    tried = []

    def act(recording, number):
        tried.append(str(recording.path))
        with replacing(tmp_path / "sound.wav") as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))

    a, b, c, d = (InputFile(pathlib.Path(name), pathlib.PurePath(name)) for name in "abcd")
    full = functools.partial(act, number=errno.ENOSPC)
    with pytest.raises(UserError, match=r"no space is left to write .*sound\.wav"):
        job.for_each([a, b], full)
    assert tried == ["a"]
    assert job.for_each([c, d], functools.partial(act, number=errno.EACCES)) == 2
    assert tried == ["a", "c", "d"]
    assert capsys.readouterr().err.count("sound.wav could not be written (Permission den") == 2


def test_levels_of_the_ontology(bundle, recordings, tmp_path):
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--levels", "1") == 0
    files = sorted(p.name for p in (tmp_path / "out/a/level=1").iterdir())
    assert len(files) == 7
    assert "Human sounds.wav" in files


def test_example_recordings_and_residual(bundle, recordings, tmp_path, capsys):
    words = (str(recordings / "a.wav"), "--query", str(recordings / "more"), "--residual")
    assert separate(bundle, tmp_path / "out", *words, "--format", "flac") == 0
    sounds = [soundfile.read(tmp_path / f"out/a/{name}.flac")[0] for name in ("more", "residual")]
    mixture, _ = soundfile.read(recordings / "a.wav")
    np.testing.assert_allclose(sum(sounds), mixture, atol=2**-22)
    assert "a.wav: 1 sound and the residual in " in capsys.readouterr().out
    assert separate(bundle, tmp_path / "more", *words[:-1]) == 0
    assert "a.wav: 1 sound in " in capsys.readouterr().out
    words = (*words[:1], "--levels", "1", "--threshold", "1", "--residual")
    assert separate(bundle, tmp_path / "none", *words) == 0
    assert "none of the requested classes is heard" in "".join(capsys.readouterr())


def test_dry_run_says_what_is_heard_and_writes_nothing(bundle, recordings, tmp_path, capsys):
    words = ["separate", "--model", bundle, str(recordings / "*.wav"), "--dry-run"]
    assert main([*words, "--threshold", "0.0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"a\.wav: 1\.2 s\n +\d+ %  .* ###\n", said)
    assert "and 507 more" in said
    assert main([*words, "--threshold", "1.0"]) == 0
    assert "no class reaches 1" in capsys.readouterr().out


def test_dry_run_shows_a_long_recording_to_its_end(bundle, tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", tiny.noise(0, 38.0), tiny.RATE)  # 76 segments of 0.5 s
    words = ["separate", "--model", bundle, str(tmp_path / "long.wav"), "--dry-run"]
    assert main([*words, "--threshold", "0.0"]) == 0
    said = capsys.readouterr().out
    assert re.search(r" %  .* [#.]{38}\n", said)
    assert "each mark is 1 s" in said


def test_dry_run_says_what_is_cut_off_and_prints_names_on_a_line(bundle, tmp_path, capsys):
    path = tmp_path / "two\nlines.wav"
    soundfile.write(path, tiny.noise(0, 1.2), tiny.RATE)
    path.write_bytes(path.read_bytes()[:-4800])
    assert main(["separate", "--model", bundle, str(path), "--dry-run", "--threshold", "1"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert re.search(r"two\\nlines\.wav: 0\.9 s \(the recording is cut off: .+\)$", first)
    assert second == "  no class reaches 1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing.wav", "--classes", "Dog"], "missing.wav does not exist"),
        (["*.nothing", "--classes", "Dog"], "no file matches"),
        (["a.wav"], "--classes, --levels, --without, --text or --query"),
        ([], "no recordings; give files"),
        (["-", "--classes", "Dog"], "standard input cannot be read"),
        (["--files-from", "missing.txt", "--classes", "Dog"], "missing.txt cannot be read"),
        (["a.wav", "--classes", "Dog", "--first-parent"], "--first-parent has no effect"),
        (["a.wav", "--query", "more", "--threshold", "0.5"], "--threshold has no effect"),
        (["a.wav", "--query", "more", "--threshold", "0"], "--threshold has no effect"),
        (
            ["a.wav", "--classes", "Dog", "--residual", "--sum-to-mixture"],
            "--residual has no effect",
        ),
        (["a.wav", "--dry-run", "--classes", "Dog"], "--classes has no effect"),
        (["a.wav", "--classes", "Dgo"], 'did you mean "Dog"'),
        (["a.wav", "--classes", "Dog", "dog"], "is given twice"),
        (["a.wav", "--levels", "9"], "the ontology has no level 9"),
        (["a.wav", "--levels", "1", "--classes", "Dog"], "--levels queries all classes heard"),
        (["a.wav", "--query", "more", "--classes", "Dog"], "use only one"),
        (["a.wav", "--query", "nothing.npz"], "nothing.npz cannot be read"),
        (["a.wav", "--query", "nothing"], "nothing does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    bundle, recordings, monkeypatch, tmp_path, capsys, words, said
):
    monkeypatch.chdir(recordings)
    assert separate(bundle, tmp_path / "out", *words) == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("out/**/*.wav"))


def test_an_out_that_cannot_be_made(bundle, recordings, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert separate(bundle, tmp_path / "out", str(recordings / "a.wav"), "--classes", "Dog") == 1
    assert "cannot be created" in capsys.readouterr().err


def test_two_recordings_of_one_place_are_not_mixed_up(bundle, recordings, tmp_path, capsys):
    words = [str(recordings / "a.wav"), str(recordings / "more/a.wav"), "--classes", "Dog"]
    assert separate(bundle, tmp_path / "out", *words) == 1
    assert f"more/a.wav would share an output folder with {words[0]}" in capsys.readouterr().err
    facts = json.loads((tmp_path / "out/a/report.json").read_text())
    assert facts["seconds"] == pytest.approx(1.2)


def test_the_same_command_again_leaves_what_is_done(bundle, recordings, tmp_path, capsys):
    words = [str(recordings), "--classes", "Dog"]
    assert separate(bundle, tmp_path / "out", *words) == 0
    out = tmp_path / "out/recordings"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    (out / "b/report.json").unlink()
    (out / "b/.unfinished").write_text(json.loads((out / "a/report.json").read_text())["made_of"])
    capsys.readouterr()
    assert separate(bundle, tmp_path / "out", *words) == 1  # not what that run was killed over
    said = capsys.readouterr()
    assert "b/Dog.wav exists; give --overwrite" in said.err
    assert said.out.count("done earlier") == 2
    assert separate(bundle, tmp_path / "out", *words, "--overwrite") == 0
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} == set((out / "b").iterdir())
    soundfile.write(recordings / "a.wav", tiny.noise(9, 1.2), tiny.RATE)
    assert separate(bundle, tmp_path / "out", *words) == 1  # another recording now
    assert "/a/Dog.wav exists" in capsys.readouterr().err


def test_results_of_another_field_or_detector_are_not_taken_for_done(recordings, tmp_path, capsys):
    out, words = tmp_path / "out", [str(recordings / "a.wav"), "--levels", "1", "--threshold", "0"]
    folder = tiny.write_separator(tmp_path / "model", "one_hot")
    model = str(folder)
    assert separate(model, out, *words) == 0
    about = json.loads((folder / "config.json").read_text())

    def edited(section, **fields):
        changed = {**about, section: {**about[section], **fields}}
        (folder / "config.json").write_text(json.dumps(changed))

    for change in (
        lambda: edited("separator", condition_norm=2.0),
        lambda: edited("sed", model={**about["sed"]["model"], "f_max": 3000.0}),
    ):
        change()
        assert separate(model, out, *words) == 1
        assert "exists; give --overwrite" in capsys.readouterr().err
    edited("separator")
    assert separate(model, out, *words) == 0
    assert "done earlier" in capsys.readouterr().out


def test_results_of_other_class_means_are_not_taken_for_done(recordings, tmp_path, capsys):
    models = [str(tmp_path / name) for name in ("none", "dog", "dog_and_music")]
    for model, classes in zip(models, ((), (74,), (74, 137)), strict=True):
        tiny.write_separator(model, means=tiny.class_means(*classes) if classes else None)
    out, words = tmp_path / "out", [str(recordings / "a.wav"), "--classes", "Dog"]
    assert separate(models[1], out, *words) == 0
    for model in (models[0], models[2]):
        assert separate(model, out, *words) == 1
        assert "exists; give --overwrite" in capsys.readouterr().err
    assert separate(models[1], out, *words) == 0
    assert "done earlier" in capsys.readouterr().out


def test_what_a_run_was_killed_over_is_made_again(bundle, recordings, tmp_path, monkeypatch):
    words = [str(recordings / "a.wav"), "--classes", "Dog", "Cat"]

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_report", killed)
    assert separate(bundle, tmp_path / "out", *words) == 130
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "out/a").iterdir()} == {
        "Dog.wav",
        "Cat.wav",
        ".unfinished",
    }
    mark, written = tmp_path / "out/a/.unfinished", (tmp_path / "out/a/.unfinished").read_bytes()
    mark.write_bytes(b"\xff\x00")  # as a power cut may leave it
    assert separate(bundle, tmp_path / "out", *words) == 1
    mark.write_bytes(written)
    assert separate(bundle, tmp_path / "out", *words) == 0
    assert not (tmp_path / "out/a/.unfinished").exists()


def test_a_class_that_is_not_heard_is_reported(bundle, recordings, tmp_path, capsys):
    words = ["separate", "--model", bundle, "--out", str(tmp_path / "out"), "--threshold", "0.999"]
    words += [str(recordings / "a.wav"), "--classes", "Dog"]
    for _ in range(2):  # the second time it is done already
        assert main(words) == 3
        said = capsys.readouterr()
        assert re.search(r"  Dog: not heard \(peak [\d.]+ %, threshold 99.9 %\)", said.out)
        assert "in 1 of 1 recording a queried class is not heard" in said.err
    assert not soundfile.read(tmp_path / "out/a/Dog.wav")[0].any()
    (sound,) = json.loads((tmp_path / "out/a/report.json").read_text())["sounds"]
    assert 0 < sound["peak"] < 0.999
    assert "not heard (peak" in (tmp_path / "out/a/report.html").read_text()


def test_clipped_samples_are_counted(bundle, recordings, tmp_path, capsys):
    loud = recordings / "loud.wav"
    soundfile.write(loud, tiny.noise(0, 1.2, amplitude=1.0), tiny.RATE, subtype="FLOAT")
    words = [str(loud), "--query", str(recordings / "more"), "--residual"]
    for form in ("wav", "wav16", "flac"):
        assert separate(bundle, tmp_path / form, *words, "--format", form) == 0
        said = capsys.readouterr().out
        facts = json.loads((tmp_path / form / "loud/report.json").read_text())
        shares = {sound["name"]: sound["clipped_share"] for sound in facts["sounds"]}
        if form == "wav":
            exact = {
                name: np.mean(np.abs(soundfile.read(tmp_path / f"wav/loud/{name}.wav")[0]) > 1)
                for name in shares
            }
            assert not any(shares.values())
            assert "were clipped" not in said
        else:
            assert exact["residual"] > 0.05
            assert shares == pytest.approx(exact)
            assert "% of its samples are beyond full scale and were clipped" in said


def test_hostile_recordings_leave_the_others_alone(bundle, recordings, tmp_path, capsys):
    soundfile.write(recordings / "integers.wav", tiny.noise(0, 1) * 32768, 8000, subtype="FLOAT")
    soundfile.write(recordings / "huge.wav", np.full(800, 1e30), tiny.RATE, subtype="FLOAT")
    os.mkfifo(recordings / "pipe.wav")
    name = os.fsdecode(b"n\xe9.wav")
    shutil.copy(recordings / "a.wav", recordings / name)
    shutil.copy(recordings / "a.wav", recordings / "two\nlines.wav")
    assert separate(bundle, tmp_path / "out", str(recordings), "--classes", "Dog") == 1
    said = capsys.readouterr()
    assert "3 of 8 recordings could not be separated" in said.err
    assert not list((tmp_path / "out/recordings").glob("*/.unfinished"))
    for words in ("integers.wav has samples of", "huge.wav has samples of", "pipe.wav is not a"):
        assert words in said.err
    assert len(said.err.splitlines()) == 4
    made = {path.parent.name for path in (tmp_path / "out/recordings").rglob("report.json")}
    assert made == {"a", "b", file_name(name[:-4]), file_name("two\nlines")}


def test_a_query_of_the_wrong_kind_is_refused_once(tmp_path, recordings, capsys):
    embedding = tiny.write_separator(tmp_path / "embedding", "embedding")
    assert separate(str(embedding), tmp_path / "out", str(recordings), "--classes", "Dog") == 1
    assert capsys.readouterr().err.count("takes embeddings of example recordings, not classes") == 1


def test_the_same_command_on_a_folder_does_not_separate_its_results(
    bundle, recordings, tmp_path, monkeypatch, capsys
):
    shutil.copytree(recordings, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    words = ["separate", ".", "--model", bundle, "--classes", "Dog", "--threshold", "0"]
    assert main(words) == 0
    sounds = sorted(pathlib.Path("separated").rglob("*.wav"))
    assert sounds
    for report in pathlib.Path("separated").rglob("report.json"):  # as Ctrl-C leaves them
        report.with_name(".unfinished").write_text(json.loads(report.read_text())["made_of"])
        report.unlink()
    assert main(words) == 0
    assert sorted(pathlib.Path("separated").rglob("*.wav")) == sounds
    assert f"passed over {len(sounds)} files that an earlier run" in capsys.readouterr().err
    assert main([words[0], "separated", *words[2:]]) == 1
    assert "to separate these, name them or give another --out" in capsys.readouterr().err
    # Recordings in the output folder itself are no results; named results are recordings.
    assert main([*words, "--out", "."]) == 0
    assert main([words[0], str(sounds[0]), *words[2:], "--out", "again"]) == 0
    assert len(list(pathlib.Path("again").rglob("*.wav"))) == 1


def _read(path):
    return soundfile.read(path, dtype="float32")[0]


def test_everything_but_a_class_and_its_estimate_add_up_to_the_recording(
    bundle, recordings, tmp_path, capsys
):
    stereo = np.stack([tiny.noise(5, 1.2), tiny.tone(300, 1.2)], axis=1)
    soundfile.write(recordings / "stereo.wav", stereo, 11025, "FLOAT")
    audio = str(recordings / "stereo.wav")
    assert separate(bundle, tmp_path / "dog", audio, "--classes", "Dog") == 0
    assert separate(bundle, tmp_path / "rest", audio, "--without", "Dog") == 0
    assert "stereo.wav: without Dog in " in capsys.readouterr().out
    estimate = _read(tmp_path / "dog/stereo/Dog.wav")
    rest = _read(tmp_path / "rest/stereo/without Dog.wav")
    assert np.abs(estimate).max() > 1e-3
    np.testing.assert_allclose(estimate + rest, stereo, atol=2e-7)
    files = {path.name for path in (tmp_path / "rest/stereo").iterdir()}
    assert files == {"without Dog.wav", "report.json", "report.html"}
    (sound,) = json.loads((tmp_path / "rest/stereo/report.json").read_text())["sounds"]
    assert [one["name"] for one in sound["without"]] == ["Dog"]
    assert sound["without"][0]["active_share"] == 1
    assert sound["without"][0]["classes"] == ["Dog"]
    # Finished runs are recognised.
    assert separate(bundle, tmp_path / "rest", audio, "--without", "Dog") == 0
    assert "done earlier" in capsys.readouterr().out
    # Several classes are one sound, as with "+".
    words = ("--without", "Dog", "--without", "Human voice", "dog")
    assert separate(bundle, tmp_path / "two", audio, *words) == 0
    assert separate(bundle, tmp_path / "sum", audio, "--classes", "Dog+Human voice") == 0
    estimate = _read(tmp_path / "sum/stereo/Dog + Human voice.wav")
    rest = _read(tmp_path / "two/stereo/without Dog + Human voice.wav")
    np.testing.assert_allclose(estimate + rest, stereo, atol=2e-7)


def test_without_a_class_that_is_not_heard_leaves_the_recording_as_it_is(
    bundle, recordings, tmp_path, capsys
):
    words = ["separate", "--model", bundle, "--out", str(tmp_path / "out"), "--threshold", "1.0"]
    assert main([*words, str(recordings / "a.wav"), "--without", "Dog"]) == 3
    said = capsys.readouterr()
    assert "Dog: not heard (peak " in said.out
    assert "is not heard, and nothing was taken out for it" in said.err
    assert "the recording: Dog is not heard" in (tmp_path / "out/a/report.html").read_text()
    rest = _read(tmp_path / "out/a/without Dog.wav")
    np.testing.assert_array_equal(rest, _read(recordings / "a.wav"))


def test_a_node_is_all_classes_below_it_less_those_left_out(bundle, recordings, tmp_path, capsys):
    audio = str(recordings / "a.wav")

    def sound(name, *words):
        out = tmp_path / str(len(words))
        assert separate(bundle, out, audio, *words) == 0
        return _read(out / f"a/{name}.wav"), json.loads((out / "a/report.json").read_text())

    ontology = load_ontology()
    below = ontology.class_indexes(ontology.node("Human voice").mid)
    voice, _ = sound("Human voice", "--classes", "Human voice")
    assert parse_classes(["Human voice"]) == {"Human voice": below}
    left, remarks = without({"Human voice": below, "Speech": (0,)}, ["Speech", "Dog"])
    speech = ontology.class_indexes(ontology.node("Speech").mid)
    assert set(left["Human voice"]) == set(below) - set(speech)
    assert left.keys() == {"Human voice"}
    assert remarks == [
        "--without Dog: no query has any of it",
        "--without leaves nothing of Speech, which is not separated",
    ]
    less, facts = sound("Human voice", "--classes", "Human voice", "--without", "Speech", "Dog")
    assert "--without Dog: no query has any of it" in capsys.readouterr().err
    assert facts["settings"]["without"] == ["Speech", "Dog"]
    assert np.abs(less - voice).max() > 1e-5


def test_levels_less_a_node(bundle, recordings, tmp_path):
    words = (str(recordings / "a.wav"), "--levels", "1", "--without", "Music", "Human sounds")
    assert separate(bundle, tmp_path / "out", *words) == 0
    files = sorted(p.name for p in (tmp_path / "out/a/level=1").iterdir())
    assert len(files) == 5
    assert not {"Music.wav", "Human sounds.wav"} & set(files)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "Dog", "--classes", "Cat", "--without", "Pets"], 'is called "Pets"'),
        (["--without", "Human voise"], 'is called "Human voise"; did you mean "Human voice"'),
        (["--classes", "Dog", "--without", "Animal"], "--without Animal leaves nothing of Dog"),
        (["--without", "Dog", "--residual"], "--residual has no effect with --without"),
        (["--without", "Dog", "--sum-to-mixture"], "--sum-to-mixture has no effect with --without"),
        (["--query", "more", "--without", "Dog"], "--without has no effect with --query"),
        (["--without", "Dog", "--dry-run"], "--without has no effect with --dry-run"),
    ],
)
def test_without_what_it_cannot_leave_out_is_said(bundle, recordings, capsys, words, said):
    assert main(["separate", str(recordings / "a.wav"), "--model", bundle, *words]) == 1
    assert said in capsys.readouterr().err


def test_a_sound_that_becomes_the_whole_recording_is_said(bundle, recordings, tmp_path, capsys):
    words = [str(recordings / "a.wav"), "--classes", "Dog", "Music"]
    assert separate(bundle, tmp_path / "both", *words, "--threshold", "0") == 0
    facts = json.loads((tmp_path / "both/a/report.json").read_text())
    (quiet, lower), (loud, higher) = sorted((s["name"], s["peak"]) for s in facts["sounds"])
    if lower > higher:
        quiet, loud = loud, quiet
    words += ["--threshold", str((lower + higher) / 2), "--sum-to-mixture"]
    capsys.readouterr()
    for _ in range(2):  # the second time it is done earlier
        assert separate(bundle, tmp_path / "out", *words) == 3
        said = capsys.readouterr().out
        assert f"{loud}: nothing else is heard, so --sum-to-mixture makes it the whole" in said
    mixture, _ = soundfile.read(recordings / "a.wav", dtype="float32")
    whole, _ = soundfile.read(tmp_path / f"out/a/{loud}.wav", dtype="float32")
    np.testing.assert_allclose(whole, mixture, atol=2e-6)
    assert not soundfile.read(tmp_path / f"out/a/{quiet}.wav")[0].any()
    assert separate(bundle, tmp_path / "all", *words[:-2], "0", "--sum-to-mixture") == 0
    assert "nothing else is heard" not in capsys.readouterr().out
    # Of a level, only what is heard becomes a file.
    facts["sounds"] = [dict(facts["sounds"][0], active_share=1.0)]
    facts["settings"]["sum_to_mixture"] = True
    assert any("nothing else is heard" in remark for remark in job._remarks(facts))


@pytest.mark.parametrize(
    "query",
    [["--classes", "Dog"], ["--classes", "Dog+Cat"], ["--query", "more"], ["--text", "dog"]],
)
def test_a_single_sound_is_not_made_the_whole_recording(
    bundle, recordings, monkeypatch, tmp_path, capsys, query
):
    monkeypatch.chdir(recordings)
    assert separate(bundle, tmp_path / "out", "a.wav", *query, "--sum-to-mixture") == 1
    said = "--sum-to-mixture has no effect with a single sound, whose estimate would be the whole"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["a.wav", "--format", "wav"],
            "--format has no effect with --dry-run, which writes nothing",
        ),
        (["a.wav", "--blocks", "windows"], "--blocks has no effect with --dry-run, which writes"),
        (["a.wav", "--overwrite"], "--overwrite has no effect with --dry-run, which writes"),
        (["a.wav", "--mono"], "--mono has no effect with --dry-run"),
        (["--text", "dog", "--threshold", "0.5"], "--threshold has no effect with --dry-run and"),
        (["--text", "dog", "--precision", "highest"], "--precision has no effect with --dry-run"),
        (["--text", "dog", "--out", "x"], "--out has no effect with --dry-run and --text, without"),
    ],
)
def test_a_dry_run_takes_no_options_of_what_it_does_not_do(words, said, capsys):
    assert main(["separate", "--dry-run", *words]) == 1
    assert said in capsys.readouterr().err
