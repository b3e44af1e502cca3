"""HTS-AT, a shifted-window transformer for tagging and detection (Chen et al., arXiv:2202.00874).

The log-mel spectrogram of a clip is resized to a fixed number of frames and folded into a square
image of time segments stacked vertically. The transformer of swin.py maps its patches to tokens. A
convolution over the last stage's tokens gives the logits of each time step.

Letters: `b` batch, `t` samples, `n` frames, `m` mel bands, `v` views of a clip (one, unless it is
longer than the image), `y` and `x` rows and columns of the token grid, `s` time steps, `k` classes,
`e` embedding.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from uss_jax.models.compute_dtype import flax_dtype
from uss_jax.models.norm import BatchNorm
from uss_jax.models.swin import PATCH, WINDOW, PatchEmbedding, Stage, layer_norm
from uss_jax.models.tagging import TAGGING_MOMENTUM, Augment, front_end


class HTSAT(nn.Module):
    """Transformer for tagging and detection; implements `TaggingNet`.

    The image is `image_size` pixels per side and holds image_size^2 / mel_bins frames: 1024
    (10.24 s) as published. Clips of other lengths are mapped to 1024 frames as follows.

    - Shorter: the frames are repeated as often as they fit (`repeat_short`), then stretched by
      bicubic interpolation. The reference repeats in separation and only stretches in tagging; for
      AudioSet's clips of 10 s both are the same.
    - Up to twice as long: three views of half the clip, a quarter of the clip apart, are each
      stretched, and their results averaged. The reference omits the third view if the number of
      frames minus one is a multiple of four, and so never sees the last quarter of such a clip.
    - Longer, where the reference fails: views of 1024 frames, 512 frames apart; the last one ends
      with the clip.

    In training, a clip longer than the image is cut to 1024 frames from a random start, drawn per
    item, as in the reference.

    Attributes:
      sample_rate: sampling rate in Hz.
      n_fft: STFT window length in samples.
      hop_samples: STFT hop in samples.
      mel_bins: number of mel bands; divides `image_size`.
      f_min: lowest frequency in Hz.
      f_max: highest frequency in Hz.
      image_size: pixels per side.
      token_width: channels of the first stage, doubled by every further one; 96 as published, 256
        in the query net of the authors' separator.
      depths: blocks of each stage.
      heads: attention heads of each stage.
      classes: k.
      repeat_short: see above.
      stochastic_depth: drop rate of the last block's residual branches in training; the rate rises
        linearly from 0 in the first block.
      dtype: compute dtype of the linear maps and of attention, "float32" or "bfloat16"; log-mel,
        residual sums, norms, softmax and outputs are float32.
      norm_momentum: weight of a batch in the running statistics.
    """

    sample_rate: int = 32000
    n_fft: int = 1024
    hop_samples: int = 320
    mel_bins: int = 64
    f_min: float = 50.0
    f_max: float = 14000.0
    image_size: int = 256
    token_width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    classes: int = 527
    repeat_short: bool = True
    stochastic_depth: float = 0.1
    dtype: str = "float32"
    norm_momentum: float = TAGGING_MOMENTUM

    def setup(self) -> None:
        self._check()
        rates = np.linspace(0, self.stochastic_depth, sum(self.depths)).tolist()
        ends = np.cumsum(self.depths).tolist()
        self.bn0 = BatchNorm(momentum=self.norm_momentum)
        self.patch_embedding = PatchEmbedding(self.token_width, self.dtype)
        self.stage = [
            Stage(
                self.heads[i],
                tuple(rates[end - depth : end]),
                merges=i < len(self.depths) - 1,
                dtype=self.dtype,
                name=f"stage{i + 1}",
            )
            for i, (depth, end) in enumerate(zip(self.depths, ends, strict=True))
        ]
        self.norm = layer_norm(self.dtype)
        bands = self.mel_bins // self.token_pixels
        self.token_semantic = nn.Conv(
            self.classes, (bands, 3), padding=((0, 0), (1, 1)), dtype=flax_dtype(self.dtype)
        )

    def __call__(
        self,
        waveform: Float[Array, "b t"],
        train: bool = False,
        augment: Augment | None = None,
    ) -> dict[str, Array]:
        """Tags clips and detects events.

        Args:
          waveform: samples in [-1, 1].
          train: use batch statistics, stochastic depth and random cuts (random keys "augment").
          augment: applied to the normalised log-mel, [b, n, m] to [b', n, m].

        Returns:
          `clipwise` [b, k] in [0, 1], from the logits averaged over time steps; `framewise`
          [b, n, k] for the n frames of the log-mel, or of its cut; `embedding` [b, e], the mean of
          the last stage's tokens (`latent_output` in the reference).
        """
        mel = front_end(self, waveform)
        x = self.bn0(mel, train)
        x = augment(x) if augment else x
        if train and x.shape[1] > self.image_frames:
            x = random_frames(self.make_rng("augment"), x, self.image_frames)
        tokens = self.tokens(x, train)
        logits = self.logits(tokens)
        framewise = jnp.einsum(
            "ns,bsk->bnk",
            steps_of_frames(x.shape[1], self.image_frames, logits.shape[2], self.repeat_short),
            nn.sigmoid(logits).reshape(logits.shape[0], -1, self.classes),
            precision=jax.lax.Precision.HIGHEST,
        )
        return {
            "clipwise": jnp.mean(nn.sigmoid(jnp.mean(logits, axis=2)), axis=1),
            "framewise": framewise.astype(mel.dtype),
            "embedding": jnp.mean(tokens, axis=(1, 2, 3)),
        }

    def tokens(self, mel: Float[Array, "b n m"], train: bool) -> Float[Array, "b v y x e"]:
        """Computes the last stage's tokens for each view of a normalised log-mel."""
        views = cut_views(mel, self.image_frames, self.repeat_short)
        image = fold(views.reshape(-1, *views.shape[2:]), self.image_size)
        x = self.patch_embedding(image)
        for stage in self.stage:
            x = stage(x, train)
        x = self.norm(x).astype(mel.dtype)
        return x.reshape(*views.shape[:2], *x.shape[1:])

    def logits(self, tokens: Float[Array, "b v y x e"]) -> Float[Array, "b v s k"]:
        """Applies the token-semantic head: logits of each time step.

        Grid rows are ordered by time segment, then frequency. Unfolded, the columns are time steps
        and the rows frequencies, all spanned by the convolution's kernel.
        """
        b, v, _, columns, e = tokens.shape
        bands = self.mel_bins // self.token_pixels
        x = tokens.reshape(b * v, -1, bands, columns, e).swapaxes(1, 2)
        x = self.token_semantic(x.reshape(b * v, bands, -1, e))
        return x.astype(tokens.dtype).reshape(b, v, -1, self.classes)

    def class_vectors(self) -> Float[Array, "k e"]:
        """Returns the head's vector of each class, summed over the positions of its kernel."""
        return jnp.sum(self.token_semantic.variables["params"]["kernel"], axis=(0, 1)).T

    @property
    def embedding_width(self) -> int:
        """Width of the embedding: channels of the last stage's tokens."""
        return self.token_width * 2 ** (len(self.depths) - 1)

    @property
    def frame_hop_samples(self) -> int:
        """Samples between frames of `framewise`."""
        return self.hop_samples

    @property
    def image_frames(self) -> int:
        """Number of frames that an image holds."""
        return self.image_size * (self.image_size // self.mel_bins)

    @property
    def token_pixels(self) -> int:
        """Mel bands, and frames, covered by a token of the last stage."""
        return PATCH * 2 ** (len(self.depths) - 1)

    def frames_of_image(self, frames: int) -> np.ndarray:
        """Maps each image frame to a clip frame with the same `framewise`, int [image_frames].

        The probability of image frames is constant over each token, so any frame of the token
        serves.

        Args:
          frames: number of frames in the clip.

        Raises:
          ValueError: the image does not hold the clip exactly once.
        """
        if not self.image_frames < 2 * frames <= 2 * self.image_frames:
            raise ValueError(
                f"clips of {frames} frames, expected {self.image_frames // 2 + 1} to "
                f"{self.image_frames}"
            )
        steps = self.image_frames // self.token_pixels
        shares = steps_of_frames(frames, self.image_frames, steps, self.repeat_short)
        return np.repeat(np.argmax(shares, axis=0), self.token_pixels)

    def _check(self) -> None:
        if len(self.heads) != len(self.depths):
            raise ValueError(f"heads has {len(self.heads)} values for {len(self.depths)} stages")
        for i, heads in enumerate(self.heads):
            grid, width = self.image_size // PATCH // 2**i, self.token_width * 2**i
            if grid > WINDOW and grid % WINDOW:
                raise ValueError(
                    f"image_size {self.image_size} gives stage {i + 1} a side of {grid} tokens, "
                    f"not a multiple of the window of {WINDOW}"
                )
            if width % heads:
                raise ValueError(
                    f"stage {i + 1} has {width} channels, not a multiple of {heads} heads"
                )
        if self.image_size % self.mel_bins or self.mel_bins % self.token_pixels:
            raise ValueError(
                f"mel_bins {self.mel_bins} must divide image_size {self.image_size} and be a "
                f"multiple of {self.token_pixels}"
            )


def view_frames(frames: int, capacity: int, repeat_short: bool) -> list[np.ndarray]:
    """Returns, for each view, the indices of the clip frames it shows, before stretching.

    Args:
      frames: number of frames in the clip.
      capacity: number of frames in the image.
      repeat_short: whether a clip that fits more than once is repeated.
    """
    if frames <= capacity:
        times = capacity // frames if repeat_short else 1
        return [np.tile(np.arange(frames), times)]
    half, quarter = (frames - 1) // 2, (frames - 1) // 4
    if half <= capacity:
        return [begin + np.arange(half) for begin in (0, quarter, 2 * quarter)]
    begins = [*range(0, frames - capacity, capacity // 2), frames - capacity]
    return [begin + np.arange(capacity) for begin in begins]


def cut_views(
    mel: Float[Array, "b n m"], capacity: int, repeat_short: bool
) -> Float[Array, "b v N m"]:
    """Cuts clips into views, each stretched to `capacity` frames."""
    frames = mel.shape[1]
    shown = view_frames(frames, capacity, repeat_short)
    if frames <= capacity:
        views = jnp.tile(mel, (1, len(shown[0]) // frames, 1))[:, None]
    else:
        views = jnp.stack([mel[:, of_view[0] : of_view[-1] + 1] for of_view in shown], axis=1)
    length = views.shape[2]
    if length == capacity:
        return views
    resize = bicubic_matrix(length, capacity).astype(mel.dtype)
    return jnp.einsum("Nn,bvnm->bvNm", resize, views, precision=jax.lax.Precision.HIGHEST)


def random_frames(key: Array, mel: Float[Array, "b n m"], count: int) -> Float[Array, "b N m"]:
    """Cuts `count` consecutive frames out of each item, from a random start.

    Items must have more frames. As in the reference, no cut includes the last frame.
    """
    begin = jax.random.randint(key, (mel.shape[0],), 0, mel.shape[1] - count)
    return jnp.take_along_axis(mel, (begin[:, None] + jnp.arange(count))[:, :, None], axis=1)


def bicubic_matrix(length: int, size: int) -> np.ndarray:
    """Returns the interpolation from `length` to `size` values, float64 [size, length].

    End points are kept. As in the reference: a = -0.75, ends replicated, and positions in float32,
    whose rounding is the largest rounding error in the net.
    """
    step = np.float32(length - 1) / np.float32(size - 1)
    position = step * np.arange(size, dtype=np.float32)
    left = np.floor(position)
    fraction = (position - left).astype(np.float64)
    matrix = np.zeros((size, length))
    for tap in range(-1, 3):
        at = np.clip(left.astype(np.int64) + tap, 0, length - 1)
        np.add.at(matrix, (np.arange(size), at), _cubic(np.abs(fraction - tap)))
    return matrix


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Returns the weight of a value at this distance (Keys' kernel with a = -0.75)."""
    a, u = -0.75, distance
    near = ((a + 2) * u - (a + 3)) * u * u + 1
    far = a * (((u - 5) * u + 8) * u - 4)
    return np.where(u <= 1, near, np.where(u < 2, far, 0.0))


def fold(views: Float[Array, "b N m"], image_size: int) -> Float[Array, "b Y X"]:
    """Folds frames into an image: segments of `image_size` frames stacked, low bands first."""
    b, _, m = views.shape
    return views.reshape(b, -1, image_size, m).swapaxes(2, 3).reshape(b, image_size, image_size)


def steps_of_frames(frames: int, capacity: int, steps: int, repeat_short: bool) -> np.ndarray:
    """Returns the weight of each view's time steps per frame, float32 [frames, views * steps].

    A frame takes the probability of its nearest step, averaged over the views and repetitions that
    show it. The last frames, which views of half a clip may omit, repeat the last frame shown.
    """
    shown = view_frames(frames, capacity, repeat_short)
    shares = np.zeros((frames, len(shown), steps), np.float32)
    for view, of_view in enumerate(shown):
        column = np.linspace(0, capacity - 1, len(of_view))
        step = np.floor((column + 0.5) * (steps / capacity)).astype(np.int64)
        np.add.at(shares, (of_view, view, step), 1.0)
    shares = shares.reshape(frames, -1)
    last = np.flatnonzero(shares.any(axis=1))[-1]
    shares[last + 1 :] = shares[last]
    return shares / shares.sum(axis=1, keepdims=True)
