import numpy as np

from tests.evaluation.tones import BARK, DOG, PIANO, SPEECH
from tests.tiny import RATE, SEGMENT, noise
from uss_jax.audio.files import write_wav
from uss_jax.bundles.model import Model
from uss_jax.data.index import load_index
from uss_jax.data.reader import ClipReader
from uss_jax.evaluation.averages import averaged, class_vectors, file_averages

QUICK_COMPILATION = True


def test_averages_of_files_are_per_file_then_over_files(place, tmp_path):
    model = Model(place / "embedding")
    short, long = noise(7, 0.3), noise(8, 1.0)  # a segment is half a second
    long[: SEGMENT // 2] = 0
    for name, waveform in (("a", short), ("b", long)):
        write_wav(tmp_path / f"{name}.wav", waveform[None], RATE)
    files = {"Dog": [tmp_path / "a.wav", tmp_path / "b.wav"]}
    segments = np.stack([np.resize(short, SEGMENT), long[:SEGMENT], long[SEGMENT:]])
    vectors = np.asarray(model.condition(segments, np.zeros(3, np.int32)))
    expected = (vectors[0] + (vectors[1] + vectors[2]) / 2) / 2
    found = file_averages(model, files, without_silence=False)["Dog"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    without = file_averages(model, files, without_silence=True)["Dog"]
    assert np.abs(without - expected).max() > 1e-4
    assert file_averages(Model(place / "one_hot"), files, without_silence=False) == {}


def test_class_averages_are_means_over_the_anchors_of_clips(place):
    model = Model(place / "embedding")
    index = load_index(place / "records", "train")
    reader = ClipReader(place / "records", index)
    averages = averaged(class_vectors(model, reader, [SPEECH, DOG, PIANO]))
    assert set(averages) == {SPEECH, DOG}
    # The quiet clip does not count, and clip "c" is two segments long: its anchor is one of many.
    alone = averaged(class_vectors(model, reader, [BARK]))[BARK]
    np.testing.assert_allclose(averages[DOG], alone, atol=1e-5)
