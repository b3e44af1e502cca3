import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from uss_jax.anchors.detect import (
    TIE,
    anchor_scores,
    choose_anchor,
    choose_anchors,
    cut,
    random_begin,
    segment_loudness,
)
from uss_jax.models.htsat import HTSAT, steps_of_frames

HOP = 320
# Clips of 40 frames, segments of 8 frames, in samples; small hops keep the arrays small.
SMALL = dict(clip_samples=400, segment_samples=80, hop_samples=10)

choose = jax.jit(
    choose_anchor, static_argnames=("clip_samples", "segment_samples", "hop_samples", "min_dbfs")
)


@pytest.fixture(scope="module", params=["clip10_seg2", "clip5_seg1"])
def curves(golden, request):
    """The reference's probability curves and what it makes of them."""
    prefix = request.param + "/"
    with np.load(golden / "anchor.npz") as fixture:
        return {k.removeprefix(prefix): fixture[k] for k in fixture if k.startswith(prefix)}


def in_samples(curves):
    seconds = (curves["clip_seconds"], curves["segment_seconds"])
    return tuple(round(float(s) * 32000) for s in seconds)


def choices(curves):
    clip_samples, segment_samples = in_samples(curves)
    prob = jnp.asarray(curves["prob"])
    return choose(
        prob,
        jnp.full(len(prob), clip_samples),
        clip_samples=clip_samples,
        segment_samples=segment_samples,
        hop_samples=HOP,
    )


def exact_scores(prob, width):
    padded = np.pad(np.asarray(prob, np.float64), ((0, 0), (width // 2, width // 2)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=1).mean(axis=2)


@pytest.mark.golden
def test_golden_scores(curves):
    width = int(curves["segment_frames"])
    scores = anchor_scores(jnp.asarray(curves["prob"]), width)
    np.testing.assert_allclose(scores, curves["scores"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(scores, exact_scores(curves["prob"], width), rtol=0, atol=1e-5)


@pytest.mark.golden
def test_golden_positions(curves):
    begin, score = choices(curves)
    sole = curves["near_ties"] == 1
    assert 0.3 < sole.mean() < 1
    np.testing.assert_array_equal(begin[sole], curves["bgn_sample"][sole])
    exact = exact_scores(curves["prob"], int(curves["segment_frames"]))
    np.testing.assert_allclose(score, exact.max(axis=1), rtol=0, atol=1e-5)

    # Elsewhere one of the frames that tie, moved inside the clip, as the reference's is.
    clip_samples, segment_samples = in_samples(curves)
    half = segment_samples // HOP // 2
    ties = exact >= exact.max(axis=1, keepdims=True) - TIE
    frames = np.clip(np.arange(exact.shape[1]), half, clip_samples // HOP - half) - half
    for name, chosen, tied in zip(curves["names"], np.asarray(begin), ties, strict=True):
        assert chosen in frames[tied] * HOP, name


def test_the_first_of_exact_ties_is_taken():
    prob = np.zeros((2, 41), np.float32)
    prob[:, 10:32] = 0.7  # a plateau of scores from frame 14 on
    prob[1, 30] = 0.7 + 5e-6  # nine frames' mean, then, is higher by less than the tolerance
    begin, _ = choose(jnp.asarray(prob), jnp.full(2, 400), **SMALL)
    assert begin.tolist() == [100, 100]


@pytest.mark.golden
def test_golden_cut(curves):
    clip_samples, segment_samples = in_samples(curves)
    sole = curves["near_ties"] == 1
    begin = jnp.asarray(curves["bgn_sample"])[sole]
    clip = jnp.broadcast_to(jnp.arange(clip_samples), (sole.sum(), clip_samples))
    segment = jax.jit(cut, static_argnums=2)(clip, begin, segment_samples)
    np.testing.assert_array_equal(segment[:, [0, -1]], curves["segment_first_last"][sole])
    np.testing.assert_array_equal(curves["end_sample"] - curves["bgn_sample"], segment_samples)


def literal_choice(prob, samples, *, clip_samples, segment_samples, hop_samples):
    """(begin sample, score) of one clip, by the rules in words."""
    half = segment_samples // hop_samples // 2
    prob = np.where(np.arange(len(prob)) * hop_samples <= samples, prob, 0)
    scores = exact_scores(prob[None], 2 * half + 1)[0]
    frame = int(np.argmax(scores >= scores.max() - TIE))
    frame = min(max(frame, half), clip_samples // hop_samples - half)
    return min((frame - half) * hop_samples, max(samples - segment_samples, 0)), scores.max()


@settings(max_examples=100)
@given(st.integers(0, 400), st.integers(0, 2**32 - 1))
def test_anchor_lies_in_the_true_samples_where_the_class_sounds_most(samples, seed):
    prob = np.random.default_rng(seed).random((1, 41)).astype(np.float32)
    begin, score = choose(jnp.asarray(prob), jnp.array([samples]), **SMALL)
    expected_begin, expected_score = literal_choice(prob[0], samples, **SMALL)
    assert begin[0] == expected_begin
    assert 0 <= begin[0] <= max(0, samples - 80)
    np.testing.assert_allclose(score[0], expected_score, rtol=1e-5)


def test_probability_beyond_the_true_end_does_not_count():
    prob = np.full((2, 41), 0.2, np.float32)
    prob[:, 5] = 0.5
    prob[:, 24:] = 1.0
    begin, _ = choose(jnp.asarray(prob), jnp.array([400, 239]), **SMALL)
    assert begin[0] == 240  # nine frames of 1 around frame 28
    assert begin[1] == 0  # frames 0 to 9 hold the 0.5


def literal_loudness(clip, samples, segment_samples, hop):
    levels = []
    for begin in range(0, len(clip) - segment_samples + 1, hop):
        true = min(max(samples - begin, 1), segment_samples)
        power = np.sum(clip[begin : begin + segment_samples].astype(np.float64) ** 2) / true
        levels.append(10 * np.log10(max(power, 1e-20)))
    return levels


@pytest.mark.parametrize("clip_samples", [400, 407])
def test_loudness_is_over_the_true_samples(clip_samples):
    samples = np.array([clip_samples, 250, 30, 0])
    clip = np.random.default_rng(0).standard_normal((4, clip_samples)).astype(np.float32)
    clip[np.arange(clip_samples) >= samples[:, None]] = 0
    actual = segment_loudness(
        jnp.asarray(clip), jnp.asarray(samples), segment_samples=80, hop_samples=10
    )
    for row in range(4):
        expected = literal_loudness(clip[row], samples[row], 80, 10)
        np.testing.assert_allclose(actual[row], expected, atol=1e-4)
    assert (actual[3] == -200).all()


def test_quiet_segments_are_passed_over():
    # The class is most likely in silence, less in a sound of -40 dB, least in one of -20 dB.
    prob = jnp.asarray(np.repeat([0.9, 0.5, 0.2], [14, 14, 13]).astype(np.float32)[None])
    level = np.repeat([0.0, 0.01, 0.1], [140, 140, 120]).astype(np.float32)
    samples = jnp.array([400])
    loudness = segment_loudness(
        jnp.asarray(level[None]), samples, segment_samples=80, hop_samples=10
    )
    begin_at = lambda dbfs: choose(prob, samples, loudness=loudness, min_dbfs=dbfs, **SMALL)[0][0]  # noqa: E731
    assert choose(prob, samples, **SMALL)[0][0] == 0
    assert begin_at(-200.0) == 0
    assert begin_at(-60.0) == 70  # the first with ten samples of the sound: -49 dB
    assert begin_at(-41.0) == 140 - 10
    assert begin_at(-30.0) == 210
    assert begin_at(0.0) == 0  # nothing is as loud: the first


# Of each of the 1024 frames of HTS-AT's image, the frame of a clip of 10 seconds.
IMAGE_ANCHORS = np.array([math.floor(j * 320_000 / HOP / 1024) for j in range(1024)])


def htsat_scores(curve, samples):
    """HTS-AT's own: the class's image frames, summed over 200; as a mean, in float64."""
    curve = np.where(samples < IMAGE_ANCHORS * HOP, 0, curve.astype(np.float64))
    return np.convolve(curve, np.ones(200), mode="same") / 200


def htsat_begin(anchor, samples):
    """And where segments of 2 seconds then begin."""
    begin, end = (anchor - 100) * HOP, (anchor + 100) * HOP
    if begin < 0:
        return 0
    return max(samples - 64_000, 0) if end > samples else begin


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", ["any", "sparse", "plateaus"])
def test_htsat_s_own_rule_is_followed(kind, short):
    rng, draws = np.random.default_rng(0), 400
    tokens = rng.random((draws, 32))
    if kind == "sparse":
        tokens **= 8
    if kind == "plateaus":  # whose sums are exact, and often equal
        tokens = np.round(2 * tokens) / 2
    tokens = tokens.astype(np.float32)
    samples = rng.integers(0, 320_001, draws) if short else np.full(draws, 320_000)
    framewise = tokens @ steps_of_frames(1001, 1024, 32, True).T
    begin, score = choose(
        jnp.asarray(framewise),
        jnp.asarray(samples),
        clip_samples=320_000,
        segment_samples=64_000,
        hop_samples=HOP,
        image=HTSAT().frames_of_image(1001),
    )
    begin, score = begin.tolist(), score.tolist()
    alike = 0
    for row in range(draws):
        scores = htsat_scores(np.repeat(tokens[row], 32), samples[row])
        best = np.argmax(scores)
        assert score[row] == pytest.approx(scores[best], abs=2e-6)
        tied = IMAGE_ANCHORS[scores >= scores[best] - 1.3 * TIE]  # with room for rounding
        begins = {htsat_begin(anchor, samples[row]) for anchor in tied}
        assert begin[row] in begins
        # Exact ties, too, go to the first.
        sole = len(begins) == 1 or kind == "plateaus"
        assert not sole or begin[row] == htsat_begin(IMAGE_ANCHORS[best], samples[row])
        alike += sole
    assert alike > 0.8 * draws


def test_htsat_s_own_rule_passes_over_quiet_segments_and_has_runners_up():
    # An image of 50 frames for the clip's 41: frame j of it is frame 0.8 j of the clip.
    image = np.minimum(np.arange(50) * 4 // 5, 40)
    prob = jnp.asarray(np.repeat([0.9, 0.5, 0.2], [14, 14, 13]).astype(np.float32)[None])
    samples = jnp.array([400])
    level = np.repeat([0.0, 0.01, 0.1], [140, 140, 120]).astype(np.float32)
    loudness = segment_loudness(
        jnp.asarray(level[None]), samples, segment_samples=80, hop_samples=10
    )

    def found(**options):
        return map(
            np.asarray,
            jax.jit(functools.partial(choose_anchors, **options, **SMALL))(
                prob, samples, loudness=loudness, image=image
            ),
        )

    begin, score = found(count=5, min_dbfs=-1000.0)
    assert begin[0, 0] == 0
    there = score[0] >= 0
    assert there.sum() >= 3
    assert (np.diff(np.sort(begin[0, there])) >= 80).all()
    assert (np.diff(score[0]) <= 0).all()
    begin, _ = found(count=1, min_dbfs=-60.0)
    assert begin[0, 0] in (70, 80)
    begin, _ = found(count=1, min_dbfs=-30.0)
    assert begin[0, 0] in (210, 220)


@pytest.mark.parametrize(("samples", "latest"), [(400, 320), (85, 5), (80, 0), (30, 0), (0, 0)])
def test_random_anchors_are_uniform_over_what_the_true_samples_allow(samples, latest):
    draws = 20_000
    begin = random_begin(jax.random.key(0), jnp.full(draws, samples), segment_samples=80)
    counts = np.bincount(begin, minlength=latest + 1)
    assert counts.size == latest + 1
    if latest:  # a fixed key: passes or fails for ever
        assert stats.chisquare(counts).pvalue > 1e-3


def test_random_anchors_of_clips_differ():
    begin = functools.partial(random_begin, samples=jnp.full(8, 320_000), segment_samples=64_000)
    first, again, other = (begin(jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(set(first.tolist()) | set(other.tolist())) == 16
