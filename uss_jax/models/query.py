"""The query net: computes the condition that describes the target to a separator.

Kinds of condition: `one_hot` (the class); of the clean target, `soft` (tagging probabilities),
`class_vectors` (vectors of the tagging net's last layer, weighted by the probabilities) and
`embedding` (its hidden layer); `text` (the vector of a sentence on the target); `text_or_audio`
(either of the last two, each through an adaptor).

Letters: `b` batch, `s` samples, `k` classes, `e` embedding, `t` width of a sentence vector, `d`
width of the condition.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from uss_jax.models.film import scaled_to
from uss_jax.models.minilm import WIDTH as TEXT_WIDTH
from uss_jax.models.tagging import TaggingNet, unknown_classes

_OF_RECORDINGS = (
    '`read("condition.stablehlo").call(recording)` computes conditions from recordings of the '
    "requested sound, [b, {samples}]."
)
_OF_TEXTS = (
    '`read("text_condition.stablehlo").call(vector)` computes conditions from sentence vectors of '
    "all-MiniLM-L6-v2, [b, 384]; names.npy has those of the classes' names."
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of condition: what it is made of, and so what can be asked for with it.

    Attributes:
      reads: output of the tagging net that it is; None: it is made of a class index alone.
      weighs_vectors: what is read are weights of class vectors, see `weighted_vectors`.
      words: how the user of an exported model makes one; `samples` is the length of a segment.
      classes: a class, or set of classes, is a condition by itself.
      probabilities: tagging probabilities, those of some classes alone too, are a condition.
      texts: a sentence vector is a condition; a class is asked for by its name.
    """

    reads: str | None
    weighs_vectors: bool = False
    words: str = _OF_RECORDINGS
    classes: bool = False
    probabilities: bool = False
    texts: bool = False

    @property
    def recordings(self) -> bool:
        """True if the condition of a sound is computed from recordings of it."""
        return self.reads is not None


KINDS = {
    "one_hot": Kind(
        reads=None,
        words="The condition is 1 for the requested class and 0 elsewhere.",
        classes=True,
    ),
    "soft": Kind(reads="clipwise", probabilities=True),
    "class_vectors": Kind(reads="clipwise", weighs_vectors=True, probabilities=True),
    "embedding": Kind(reads="embedding"),
    "text": Kind(reads=None, words=_OF_TEXTS, classes=True, texts=True),
    "text_or_audio": Kind(
        reads="embedding", words=f"{_OF_RECORDINGS}\n{_OF_TEXTS}", classes=True, texts=True
    ),
}

# A queried class is separated where its probability is at least this (as in bytedance/uss).
HEARD = 0.2
# Probabilities well below this one weigh nothing.
_HARDLY_HEARD = 1e-2
# A text is asked for by so many names, which weigh 1/e of the nearest where they are less similar
# by this cosine.
_NEAREST = 5
_LESS_SIMILAR = 0.05


def weights_of(probabilities: Num[Any, "*any"], xp: Any = jnp) -> Num[Any, "*any"]:
    """Returns log(1 + 100 p) / log(101), which is 1 at p = 1 and 0 at 0; `xp` is numpy or JAX's.

    Most probabilities are small, and yet say much.
    """
    return xp.log1p(probabilities / _HARDLY_HEARD) / math.log1p(1 / _HARDLY_HEARD)


def probabilities_of(weights: Num[Any, "*any"], xp: Any = jnp) -> Num[Any, "*any"]:
    """Returns the probabilities of some weights: the inverse of `weights_of`."""
    return _HARDLY_HEARD * xp.expm1(weights * math.log1p(1 / _HARDLY_HEARD))


def weighted_vectors(
    probabilities: Float[Array, "b k"], vectors: Float[Array, "k e"]
) -> Float[Array, "b e"]:
    """Adds up class vectors, weighted by `weights_of` their probabilities.

    Related classes have similar vectors, so a separator knows something of a class that it was
    never trained on. The vectors are centred, as they share a large mean, and have norm 1; those of
    classes without an output stay 0.
    """
    vectors = vectors.astype(jnp.float32)
    known = jnp.any(vectors != 0, axis=1, keepdims=True)
    vectors = jnp.where(known, vectors - jnp.mean(vectors, axis=0), 0)
    vectors = scaled_to(vectors, 1.0)
    return jnp.matmul(weights_of(probabilities), vectors)


def _one_class(
    probabilities: Float[Array, "b k"], class_index: Int[Array, "b"]
) -> Float[Array, "b k"]:
    """Keeps one class's probability, at least that at which a queried class counts as heard."""
    one = jax.nn.one_hot(class_index, probabilities.shape[1], dtype=probabilities.dtype)
    return one * jnp.maximum(probabilities, HEARD)


def nearest_names(vectors: Float[Array, "b t"], names: Float[Array, "n t"]) -> Float[Array, "b t"]:
    """Averages the names nearest to each vector, weighted by similarity; the mean has norm 1.

    A name itself, at cosine 1, stays what it is unless another name says the same.
    """
    names, vectors = scaled_to(names, 1.0), scaled_to(vectors, 1.0)
    cosines = jnp.matmul(vectors, names.T, precision=jax.lax.Precision.HIGHEST)
    nearest, rows = jax.lax.top_k(cosines, min(_NEAREST, len(names)))
    weights = jax.nn.softmax(nearest / _LESS_SIMILAR)
    return scaled_to(jnp.sum(weights[..., None] * names[rows], axis=1), 1.0)


class Adaptor(nn.Module):
    """Two dense layers between tagging net and separator (the reference's adaptive query).

    Its parameters are trained; in the reference they never reach the optimiser.
    """

    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"], train: bool) -> Float[Array, "b _"]:
        for name, features in (("fc1", self.hidden), ("fc2", self.width)):
            x = nn.Dense(features, kernel_init=nn.initializers.xavier_uniform(), name=name)(x)
            x = nn.leaky_relu(x, 0.01)
            x = nn.Dropout(0.5, rng_collection="augment")(x, deterministic=not train)
        return x


class QueryNet(nn.Module):
    """Computes the condition of a target: of its waveform, its class index or a text on it.

    With kinds that take texts, the parameters have the sentence vectors of the classes' names,
    [k, t], under `names`. `text_or_audio` has a second adaptor, `text_adaptor`.

    Attributes:
      tagger: the tagging net; its parameters are under `tagger`. None for kinds that read none.
      kind: one of KINDS.
      classes: number of classes.
      adaptor_width: width of the adaptor's output, the condition; 0 for no adaptor.
      adaptor_hidden: width of the adaptor's hidden layer.
      shortcut: add the adaptor's input to its output (needs equal widths).
      one_class_share: share of items that are asked, in training, with their class's probability
        alone, as `--classes` asks models without means; 0 in the reference. Needs a kind made of
        probabilities.
      dropout: dropout rate of the tagging net's output, or sentence vector, in training. It
        prepares the separator for vectors that no training target produced, such as class averages;
        0 in the reference.
      finetune: whether the tagging net trains; a frozen one always runs in evaluation mode and
        passes no gradient.
      trained: classes that the separator was trained on; () if that is not known.
      by_names: whether it was trained with texts, and these were names of classes only.
    """

    tagger: TaggingNet | None
    kind: str
    classes: int = 527
    adaptor_width: int = 0
    adaptor_hidden: int = 2048
    shortcut: bool = False
    one_class_share: float = 0.0
    dropout: float = 0.0
    finetune: bool = False
    trained: tuple[int, ...] = ()
    by_names: bool = False

    @property
    def takes(self) -> Kind:
        """Returns the kind of this net's conditions."""
        return KINDS[self.kind]

    @property
    def named(self) -> tuple[int, ...]:
        """Classes of whose names texts are asked with the nearest; () for texts' own vectors."""
        return (self.trained or tuple(range(self.classes))) if self.by_names else ()

    @property
    def source_width(self) -> int:
        """Width of a condition before the adaptor; of audio, if texts can be given too."""
        if self.takes.reads is None:
            return TEXT_WIDTH if self.takes.texts else self.classes
        return self.tagger.embedding_width if self.takes.weighs_vectors else self.output_width

    @property
    def output_width(self) -> int:
        """Width of the output of the tagging net that conditions are made of."""
        widths = {"clipwise": self.tagger.classes, "embedding": self.tagger.embedding_width}
        return widths[self.takes.reads]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.adaptor_width or self.source_width

    def __call__(
        self,
        waveform: Float[Array, "b s"],
        class_index: Int[Array, "b"],
        train: bool = False,
        vector: Float[Array, "b _"] | None = None,
        masked: tuple[Bool[Array, "b"], Float[Array, "b s"]] | None = None,
        text: tuple[Bool[Array, "b"], Float[Array, "b t"]] | None = None,
    ) -> Float[Array, "b d"]:
        """Computes the condition of each item.

        Args:
          waveform: clean targets.
          class_index: their classes.
          train: whether dropout, `one_class_share` and a finetuned net are in training mode.
          vector: outputs of the tagging net, computed before; None: those of `waveform`.
          masked: marks the items that are asked with the probability of their class in the mixture,
            all others zero, and the mixtures; None if there are none.
          text: marks the items that are asked with a text, and the sentence vectors; None if there
            are none.
        """
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown condition kind {self.kind!r}, expected one of {', '.join(KINDS)}"
            )
        if vector is not None:
            x = vector
        elif self.takes.reads is None:
            x = self._asked_by(jax.nn.one_hot(class_index, self.classes, dtype=waveform.dtype))
        else:
            x = self.tagger(waveform, train=train and self.finetune)[self.takes.reads]
            x = x if self.finetune else jax.lax.stop_gradient(x)
        if masked is not None:
            where, mixture = masked
            where &= self._can_be_asked(class_index)
            x = jnp.where(where[:, None], self.heard(mixture, class_index), x)
        if train and self.one_class_share:
            key = self.make_rng("augment")
            alone = jax.random.bernoulli(key, self.one_class_share, class_index.shape)
            alone &= self._can_be_asked(class_index)
            x = jnp.where(alone[:, None], _one_class(x, class_index), x)
        if text is None:
            return self.adapt(x, train)
        where, vectors = text
        if self.takes.reads is None:
            return self.adapt(jnp.where(where[:, None], vectors, x), train)
        by_text = self.adapt(vectors, train, text=True)
        return jnp.where(where[:, None], by_text, self.adapt(x, train))

    def heard(
        self, mixture: Float[Array, "b s"], class_index: Int[Array, "b"]
    ) -> Float[Array, "b k"]:
        """Computes the probability of a class in each mixture, all others zero."""
        found = jax.lax.stop_gradient(self.tagger(mixture, train=False)[self.takes.reads])
        return found * jax.nn.one_hot(class_index, self.classes, dtype=found.dtype)

    def of_classes(self, sets: Float[Array, "b k"]) -> Float[Array, "b d"]:
        """Computes the conditions of sets of classes, 1 for a class in the set and 0 elsewhere.

        For kinds that take texts, it is that of the mean of the names' vectors, at norm 1.
        """
        return self.adapt(self._asked_by(sets), text=self.takes.texts)

    def of_texts(self, vectors: Float[Array, "b t"]) -> Float[Array, "b d"]:
        """Computes the conditions of sentence vectors.

        A separator that was trained with names alone follows other texts less well, so it is asked
        with the nearest of these names (measured in configs/README.md).
        """
        if self.named:
            names = self.get_variable("params", "names")[jnp.array(self.named)]
            vectors = nearest_names(vectors, names)
        return self.adapt(vectors, text=True)

    def of_probabilities(
        self, heard: Float[Array, "b k"], means: Float[Array, "k k"]
    ) -> Float[Array, "b d"]:
        """Computes the conditions of classes that are heard in a mixture.

        A class stands for the mean of its training recordings: a separator that was trained with
        conditions of whole sounds follows it better than a probability alone (measured in
        configs/README.md). Several classes weigh as much as they are heard.

        Args:
          heard: the probabilities of the classes that are asked for, 0 elsewhere.
          means: the mean probabilities of each class, such that what an adaptor takes is the mean
            of what it takes; a row of zeros for a class without, which stands for itself alone.
        """
        weights = weights_of if self.takes.weighs_vectors else jnp.asarray
        known = jnp.any(means > 0, axis=1)
        total = jnp.sum(heard, axis=1, keepdims=True)
        share = heard / jnp.where(total > 0, total, 1)
        by_means = jnp.matmul(
            jnp.where(known, share, 0), weights(means), precision=jax.lax.Precision.HIGHEST
        )
        others = jnp.where(known, 0, share).sum(axis=1, keepdims=True)
        mixed = by_means + others * weights(jnp.where(known, 0, heard))
        return self.adapt(probabilities_of(mixed) if self.takes.weighs_vectors else mixed)

    def _asked_by(self, sets: Float[Array, "b k"]) -> Float[Array, "b _"]:
        """Returns what the adaptor takes for sets of classes."""
        if not self.takes.texts:
            return sets
        names = jax.lax.stop_gradient(self.get_variable("params", "names"))
        return scaled_to(jnp.matmul(sets, names, precision=jax.lax.Precision.HIGHEST), 1.0)

    def _can_be_asked(self, class_index: Int[Array, "b"]) -> Bool[Array, "b"]:
        """Returns whether the tagging net has an output for each class."""
        return jnp.all(
            class_index[:, None] != jnp.array(unknown_classes(self.tagger), jnp.int32), axis=1
        )

    @nn.compact
    def adapt(
        self, x: Float[Array, "b _"], train: bool = False, text: bool = False
    ) -> Float[Array, "b d"]:
        """Maps an output of the tagging net, or a vector made by hand, to the condition.

        `text` says that it is a sentence vector, for kinds that take waveforms too.
        """
        if self.dropout:
            x = nn.Dropout(self.dropout, rng_collection="augment")(x, deterministic=not train)
        if self.takes.weighs_vectors:
            vectors = self.tagger.class_vectors()
            x = weighted_vectors(x, vectors if self.finetune else jax.lax.stop_gradient(vectors))
        if not self.adaptor_width:
            return x
        name = "text_adaptor" if text and self.takes.reads else "adaptor"
        adapted = Adaptor(self.adaptor_width, self.adaptor_hidden, name=name)(x, train)
        if not self.shortcut:
            return adapted
        if x.shape[-1] != self.adaptor_width:
            raise ValueError(
                f"a shortcut around the adaptor needs adaptor_width {x.shape[-1]}, "
                f"not {self.adaptor_width}"
            )
        return jnp.add(adapted, x)
