import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from uss_jax.audio.resampling import mono
from uss_jax.bundles.model import Model, Net
from uss_jax.devices.mesh import make_mesh
from uss_jax.errors import UserError
from uss_jax.models.bandsplit import BandSplit
from uss_jax.models.resunet import ResUNet
from uss_jax.separation import windows as windows_module
from uss_jax.separation.windows import Layout, Target, separate_blocks, tag_segments

ALWAYS = np.ones(1, bool)


def target(model, active=ALWAYS, seed=0, rows=1):
    width = model.separator.module.condition_width
    conditions = np.random.default_rng(seed).random((rows, width), np.float32)
    return Target("sound", conditions, np.asarray(active))


def run(model, layout, blocks, targets, batch_size=1):
    return np.concatenate(list(separate_blocks(model, layout, blocks, targets, batch_size)), axis=2)


def test_devices_share_windows_and_give_the_same(model, monkeypatch):
    layout, waveform = Layout.windows(model, 8000), tiny.noise(0, 20)[None]
    asked = [target(model, seed=seed) for seed in range(3)]
    whole = run(model, layout, [waveform], asked)
    separate, windows_of = windows_module._separate, []

    def watched(net, windows, conditions):
        windows_of.append([shard.data.shape[0] for shard in windows.addressable_shards])
        return separate(net, windows, conditions)

    monkeypatch.setattr(windows_module, "_separate", watched)
    shared = list(separate_blocks(model, layout, [waveform], asked, 16, make_mesh()))
    np.testing.assert_allclose(np.concatenate(shared, axis=2), whole, rtol=0, atol=1e-6)
    assert windows_of == [[2] * 8] * len(windows_of)
    assert len(windows_of) > 1


def test_windows_that_do_not_fit_into_memory_are_separated_in_smaller_batches(model, monkeypatch):
    layout, waveform = Layout.windows(model, 8000), tiny.noise(0, 20)[None]
    asked = [target(model, seed=seed) for seed in range(3)]
    whole = run(model, layout, [waveform], asked)
    separate, tried, fit = windows_module._separate, [], 3

    def separate_in_memory(net, windows, conditions):
        tried.append(len(windows))
        if len(windows) > fit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return separate(net, windows, conditions)

    monkeypatch.setattr(windows_module, "_separate", separate_in_memory)
    np.testing.assert_allclose(run(model, layout, [waveform], asked, 8), whole, rtol=0, atol=1e-6)
    assert tried[:2] == [8, 4]
    assert set(tried[2:]) == {2}
    fit = 0
    with pytest.raises(UserError, match=r"too little memory for this; a window of .* needs more"):
        run(model, layout, [waveform], asked, 8)


def pieces(waveform, sizes):
    edges = np.cumsum([0, *sizes])
    return [waveform[:, a:b] for a, b in itertools.pairwise(edges)]


@pytest.fixture
def identity(monkeypatch):
    """A net that gives the mixture back; counts its runs."""
    runs = []

    def separate(net, windows, conditions):
        runs.append(len(windows))
        return windows

    monkeypatch.setattr(windows_module, "_separate", separate)
    return runs


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    window=st.integers(1, 12),
    context=st.integers(0, 3),
    batch=st.integers(1, 4),
)
def test_kept_parts_make_the_recording_however_it_comes(model, sizes, window, context, batch):
    layout = Layout((window + 2 * context) * 50, context * 50, segment=100, fade=7)
    waveform = tiny.noise(0, 1)[None].repeat(2, 0)[:, : sum(sizes)]
    waveform = np.pad(waveform, ((0, 0), (0, sum(sizes) - waveform.shape[1])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "_separate", lambda net, w, c: w)
        both = [target(model), target(model, seed=1)]
        out = run(model, layout, pieces(waveform, sizes), both, batch)
    np.testing.assert_array_equal(out, np.stack([waveform, waveform]))


@pytest.mark.parametrize("net", [ResUNet(), BandSplit(), BandSplit(time_span=0)])
def test_a_recording_is_computed_little_more_than_once(net, identity):
    """No window begins for an end that the one before holds whole."""

    class Netted(Model):
        sample_rate, segment_samples, separator = 32000, 64000, Net(net, {})

        def __init__(self):
            pass

    for seconds, most in ((3, 2.0), (9, 1.8), (20, 1.6), (120, 1.35)):
        if net == BandSplit(time_span=0) and seconds > 3:
            continue  # it keeps half of each window
        identity.clear()
        samples = 32000 * seconds
        layout = Layout.windows(Netted(), samples)
        asked = [Target("sound", np.zeros((1, 1), np.float32), np.ones(1, bool))]
        run(Netted(), layout, [np.zeros((1, samples), np.float32)], asked)
        assert sum(identity) * layout.window <= most * samples
        assert sum(identity) == max(1, -(-(samples - 2 * layout.context) // layout.step))


def test_one_sample_is_separated(model):
    layout = Layout.windows(model, 1)
    out = run(model, layout, [np.full((1, 1), 0.5, np.float32)], [target(model)])
    assert out.shape == (1, 1, 1)
    assert np.isfinite(out).all()


def test_windows_on_the_pooling_grid_agree_with_one_pass(model):
    waveform = (tiny.noise(1, 9) + tiny.tone(440, 9))[None]
    asked = [target(model)]
    whole = run(model, Layout(2**17, 0, tiny.SEGMENT, 0), [waveform], asked)
    windows = Layout.windows(model, waveform.shape[1])
    assert windows.step < waveform.shape[1] // 2  # several windows
    # The tiny net sees less far than the context, so nothing is left to differ.
    np.testing.assert_allclose(run(model, windows, [waveform], asked), whole, atol=1e-6)
    off_grid = Layout(windows.window, windows.context + 32, windows.segment, 0)
    rest = run(model, off_grid, [waveform], asked) - whole
    assert np.mean(rest**2) > 1e-5 * np.mean(whole**2)


def test_estimates_do_not_depend_on_the_batch(model):
    waveform = np.stack([tiny.noise(1, 7), tiny.tone(300, 7)])
    layout = Layout(4096, 512, tiny.SEGMENT, 400)
    active = np.resize([True, False, False, True, True], 14)
    asked = [target(model, active, seed, rows=14) for seed in range(3)]
    one = run(model, layout, [waveform], asked)
    np.testing.assert_allclose(run(model, layout, [waveform], asked, 5), one, atol=1e-6)


def test_silent_segments_cost_nothing_and_fade(model, identity):
    layout = Layout(4096, 512, tiny.SEGMENT, 400)
    active = np.array([False] * 4 + [True] + [False] * 7)
    waveform = np.ones((1, 12 * tiny.SEGMENT), np.float32)
    out = run(model, layout, [waveform], [target(model, active)])[0, 0]
    assert sum(identity) <= 3  # of 16 windows
    begin, end = 4 * tiny.SEGMENT, 5 * tiny.SEGMENT
    np.testing.assert_array_equal(out[begin:end], 1)
    assert not out[: begin - 400].any()
    assert not out[end + 400 :].any()
    rising = out[begin - 399 : begin]
    assert (np.diff(rising) > 0).all()
    assert np.abs(np.diff(out)).max() < 0.003  # no click


def test_a_window_takes_the_mean_condition_of_its_active_segments(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        windows_module, "_separate", lambda net, w, conditions: (seen.append(conditions), w)[1]
    )
    layout = Layout(2 * tiny.SEGMENT, 0, tiny.SEGMENT, 0)
    asked = target(model, [True, True, False, True, False, False], rows=3)
    run(model, layout, [np.ones((1, 6 * tiny.SEGMENT), np.float32)], [asked])
    np.testing.assert_allclose(seen[0][0], asked.conditions[:2].mean(axis=0))
    np.testing.assert_allclose(seen[1][0], asked.conditions[2])
    assert len(seen) == 2  # nothing is active in the third window


def test_tagging_grid_is_the_segments(model):
    waveform = tiny.noise(3, 2.3)
    given = pieces(waveform[None], [100, 9000, len(waveform) - 9100])
    padded, probabilities = (tag_segments(model, given, padded) for padded in (True, False))
    assert padded.shape == probabilities.shape == (5, 527)
    np.testing.assert_array_equal(padded[:4], probabilities[:4])
    rest = np.zeros((8, tiny.SEGMENT), np.float32)
    rest[0, : len(waveform) - 4 * tiny.SEGMENT] = waveform[4 * tiny.SEGMENT :]
    np.testing.assert_allclose(padded[4], model.tagger(rest)["clipwise"][0], atol=1e-6)
    # The rest of a recording is heard with what comes before it.
    rest[0] = waveform[-tiny.SEGMENT :]
    np.testing.assert_allclose(probabilities[4], model.tagger(rest)["clipwise"][0], atol=1e-6)
    for much in (1000, tiny.SEGMENT, tiny.SEGMENT + 1):
        one, other = (tag_segments(model, [waveform[None, :much]], by) for by in (True, False))
        assert one.shape == other.shape == (-(-much // tiny.SEGMENT), 527)
        np.testing.assert_array_equal(one[0], other[0])


def test_a_folder_of_files_needs_few_shapes(model):
    lengths = np.random.default_rng(0).integers(1, 10**6, 300).tolist()
    layouts = [Layout.windows(model, length) for length in lengths]
    assert len({layout.window for layout in layouts}) <= 4
    grid = model.separator.module.hop_samples * 2
    for layout in layouts:
        assert layout.step % grid == layout.context % grid == 0
        assert layout.step > 0


@pytest.mark.parametrize(
    "net",
    [
        ResUNet(n_fft=2048, hop_samples=320, channels=(32, 64, 128, 256, 384, 384)),
        ResUNet(n_fft=2048, hop_samples=320, channels=(4,) * 11),
        ResUNet(n_fft=64, hop_samples=64, channels=(4,)),
        BandSplit(),
    ],
)
def test_windows_of_any_net_go_on(net, identity):
    class Netted(Model):
        sample_rate, segment_samples, separator = 32000, 64000, Net(net, {})

        def __init__(self):
            pass

    for samples in (1, 33 * net.hop_samples, 10**5, 10**6):
        layout = Layout.windows(Netted(), samples)
        assert layout.step >= net.grid_samples
        assert layout.step % net.grid_samples == layout.context % net.grid_samples == 0
        # A recording that is longer than its header says.
        waveform = np.random.default_rng(0).standard_normal((1, samples + 9000)).astype(np.float32)
        asked = [Target("sound", np.zeros((1, 1), np.float32), np.ones(1, bool))]
        np.testing.assert_array_equal(run(Netted(), layout, [waveform], asked)[0], waveform)


def test_equal_channels_are_separated_as_one_and_opposite_ones_do_not_cancel(model):
    mono = tiny.noise(5, 1)
    layout = Layout.windows(model, len(mono))
    one = run(model, layout, [mono[None]], [target(model)])[0, 0]
    same = run(model, layout, [np.stack([mono, mono])], [target(model)])[0]
    opposite = run(model, layout, [np.stack([mono, -mono])], [target(model)])[0]
    np.testing.assert_allclose(same, np.stack([one, one]), atol=1e-6)
    np.testing.assert_allclose(opposite, np.stack([one, -one]), atol=1e-6)


def test_channels_that_cancel_are_heard_by_the_tagging_net(model):
    one = tiny.noise(0, 0.5)[None]
    alone = tag_segments(model, iter([one]))
    np.testing.assert_array_equal(tag_segments(model, iter([np.concatenate([one, -one])])), alone)
    beside = np.concatenate([one, 0.5 * one])
    np.testing.assert_allclose(mono(beside), 0.75 * one[0], atol=1e-7)
