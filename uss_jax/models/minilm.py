"""MiniLM: a sentence encoder, BERT with mean pooling (Devlin et al. 2018, arXiv:1810.04805; Wang et
al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084).

Defaults are those of sentence-transformers/all-MiniLM-L6-v2. Inference only: there is no dropout.
Letters: `b` sentences, `l` tokens, `d` width, `h` heads.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Width of the vectors of all-MiniLM-L6-v2.
WIDTH = 384


class MiniLM(nn.Module):
    """Maps tokens [b, l] to sentence vectors [b, d] of unit norm.

    Attributes:
      vocabulary: number of token ids.
      positions: maximum number of tokens.
      token_types: rows of the token type table, of which the first is used.
      width: d.
      layers: number of transformer layers.
      heads: h, a divisor of the width.
      hidden_width: width between the two layers of an MLP.
      epsilon: added to the variance by layer norms.
    """

    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    width: int = WIDTH
    layers: int = 6
    heads: int = 12
    hidden_width: int = 1536
    epsilon: float = 1e-12

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b l"], present: Bool[Array, "b l"]
    ) -> Float[Array, "b d"]:
        """Encodes sentences.

        Args:
          tokens: token ids, those of special tokens included.
          present: False for padding, which changes nothing.
        """
        types = nn.Embed(self.token_types, self.width, name="token_types")
        positions = nn.Embed(self.positions, self.width, name="positions")
        x = nn.Embed(self.vocabulary, self.width, name="words")(tokens)
        x = x + types(jnp.zeros_like(tokens)) + positions(jnp.arange(tokens.shape[1]))
        x = _layer_norm(self.epsilon, name="norm")(x)
        for i in range(self.layers):
            x = Layer(self.heads, self.hidden_width, self.epsilon, name=f"layer{i + 1}")(x, present)
        mean = jnp.mean(x, axis=1, where=present[..., None])
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


class Layer(nn.Module):
    """Transformer layer: attention, then an MLP, each followed by a layer norm of the sum.

    Attributes:
      heads, hidden_width, epsilon: as in `MiniLM`.
    """

    heads: int
    hidden_width: int
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], present: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        width = x.shape[-1]
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bihc,bjhc->bhij", query, key) / (width // self.heads) ** 0.5
        weights = nn.softmax(scores, where=present[:, None, None, :])
        mixed = jnp.einsum("bhij,bjhc->bihc", weights, value).reshape(x.shape)
        x = _layer_norm(self.epsilon, name="attention_norm")(x + nn.Dense(width, name="out")(mixed))

        hidden = nn.gelu(nn.Dense(self.hidden_width, name="fc1")(x), approximate=False)
        return _layer_norm(self.epsilon, name="mlp_norm")(x + nn.Dense(width, name="fc2")(hidden))


def _layer_norm(epsilon: float, name: str) -> nn.LayerNorm:
    # The fast variance, of squares less the squared mean, loses precision.
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
