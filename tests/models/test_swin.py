import jax
import jax.numpy as jnp
import numpy as np

from tests.golden.weights import relative_index, shift_mask
from uss_jax.models.swin import (
    WindowAttention,
    cut_windows,
    join_windows,
    relative_positions,
    side_labels,
)


def test_windows_are_cut_row_by_row_and_joined_again():
    grid = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype(np.float32)
    windows = np.asarray(cut_windows(jnp.asarray(grid), 8))
    assert windows.shape == (2, 4, 64, 3)
    np.testing.assert_array_equal(windows[1, 1].reshape(8, 8, 3), grid[1, :8, 8:])
    np.testing.assert_array_equal(join_windows(jnp.asarray(windows), 16), grid)


def test_positions_and_labels_are_those_of_the_published_buffers():
    np.testing.assert_array_equal(relative_positions(8), relative_index(8))
    for side in (16, 32, 64):
        labels = side_labels(side, 8, 4)
        apart = labels[:, :, None] != labels[:, None, :]
        np.testing.assert_array_equal(apart, shift_mask(side, side, 8, 4) < 0)


def test_attention_is_that_of_a_loop_over_windows_and_heads():
    net = WindowAttention(heads=2, window=4, dtype="float32")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 16, 6)).astype(np.float32)
    labels = side_labels(8, 4, 2)
    shapes = jax.eval_shape(lambda key: net.init(key, jnp.asarray(x), labels), jax.random.key(0))
    variables = jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), shapes)
    params = variables["params"]
    expected = np.empty_like(x)
    index = relative_index(4)
    for b in range(2):
        for w in range(4):
            qkv = x[b, w] @ params["qkv"]["kernel"] + params["qkv"]["bias"]
            heads = []
            for h in range(2):
                q, k, v = (qkv[:, 6 * i + 3 * h : 6 * i + 3 * h + 3] for i in range(3))
                logits = q @ k.T / np.sqrt(3) + params["relative_position_bias"][index, h]
                logits = logits - 100.0 * (labels[w][:, None] != labels[w][None, :])
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                heads.append(weights / weights.sum(axis=1, keepdims=True) @ v)
            y = np.concatenate(heads, axis=1)
            expected[b, w] = y @ params["projection"]["kernel"] + params["projection"]["bias"]
    np.testing.assert_allclose(
        net.apply(variables, jnp.asarray(x), labels), expected, rtol=1e-4, atol=1e-4
    )
