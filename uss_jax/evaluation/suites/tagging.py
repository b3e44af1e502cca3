"""Evaluates tagging nets on labelled clips: mean average precision and ROC AUC.

Letters: `n` clips, `k` classes.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from uss_jax.audio.pcm import to_float
from uss_jax.bundles.model import Model, Net
from uss_jax.data.chosen import Chosen
from uss_jax.data.reader import ClipReader
from uss_jax.errors import UserError
from uss_jax.evaluation.clips import batches_of, open_clips
from uss_jax.evaluation.metrics import average_precision, d_prime, per_class, roc_auc
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.text_table import format_table
from uss_jax.models.tagging import unknown_classes
from uss_jax.ontology import load_ontology

DETECTOR = "detector"
TAGGER = "tagging net"


def run(model: Model, data: str, out: str, *, split: str) -> tuple[Results, str]:
    """Evaluates the model on a split of the records."""
    reader, model = open_clips(data, split, model)
    summaries = evaluate_tagging(model, reader)
    text = format_tagging(summaries)
    unknown = {name for summary in summaries for name in summary["classes"]["unknown"]}
    if unknown:
        text += f"\n\nleft out, since the net has no output for them: {'; '.join(sorted(unknown))}"
    return {"rows": summaries, "how": {"split": split}}, text


def evaluate_tagging(model: Model, reader: ClipReader) -> list[dict[str, Any]]:
    """Evaluates the model's detector and tagging net, if present, on all clips of a split.

    The mAP of chance is the mean share of positives. Classes without a positive (for AUC: or
    without a negative), and those that a net cannot tell, are left out.

    Raises:
      UserError: the model has neither net, its number of classes is not that of the labels, or a
        probability is NaN.
    """
    nets: dict[str, Net] = {}
    if "sed" in model.config:
        nets[DETECTOR] = model.sed
    if model.config.get("query", {}).get("model"):
        nets[TAGGER] = model.tagger
    if not nets:
        raise UserError(f"{model.path} holds no tagging net; give a tagger's bundle or workdir")
    probabilities, labels = _tag(nets, model, reader)
    return [
        _summary(name, labels, of_net, unknown_classes(nets[name].module))
        for name, of_net in probabilities.items()
    ]


def _tag(
    nets: dict[str, Net], model: Model, reader: ClipReader
) -> tuple[dict[str, Float[np.ndarray, "n k"]], Bool[np.ndarray, "n k"]]:
    """Returns each net's clipwise probabilities, and the labels."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in nets}
    labels = []
    records = np.arange(len(reader.index))
    chosen = Chosen(records, np.zeros_like(records))  # the class is not used
    for batch, rows in batches_of(reader, chosen, model.segment_samples, labels=True):
        audio = to_float(jnp.asarray(batch["audio"]))
        for name, net in nets.items():
            found[name].append(np.asarray(net(audio)["clipwise"])[:rows])
        labels.append(batch["labels"][:rows] > 0)
    together = {name: np.concatenate(of_net) for name, of_net in found.items()}
    labels = np.concatenate(labels)
    classes = next(iter(together.values())).shape[1]
    if classes != labels.shape[1]:
        raise UserError(
            f"{model.path} has {classes} classes, the labels have {labels.shape[1]}; "
            f"give a net with classes={labels.shape[1]}"
        )
    return together, labels


def _summary(
    name: str,
    labels: Bool[np.ndarray, "n k"],
    probability: Float[np.ndarray, "n k"],
    unknown: tuple[int, ...],
) -> dict[str, Any]:
    if not np.isfinite(probability).all():
        raise UserError(f"the {name} gives probabilities that are NaN or infinite; it has diverged")
    precision, auc = (
        {k: v for k, v in per_class(metric, labels, probability).items() if k not in unknown}
        for metric in (average_precision, roc_auc)
    )
    if not precision:
        raise UserError(f"the {name} can tell none of the classes of these labels")
    mean_auc = float(np.mean(list(auc.values()))) if auc else None
    names = load_ontology().class_names
    return {
        "net": name,
        "map": float(np.mean(list(precision.values()))),
        "map_of_chance": float(labels[:, list(precision)].mean()),
        "auc": mean_auc,
        "d_prime": None if mean_auc is None else d_prime(mean_auc),
        "clips": len(labels),
        "classes": {
            "number": len(precision),
            "without_positive": int((~labels.any(axis=0)).sum()),
            "unknown": [names[k] for k in sorted(unknown) if labels[:, k].any()],
            "average_precision": {names[k]: value for k, value in precision.items()},
            "auc": {names[k]: value for k, value in auc.items()},
        },
    }


def format_tagging(summaries: list[dict[str, Any]]) -> str:
    """Formats the metrics as a table."""
    rows = [
        (
            summary["net"],
            *(f"{summary[key]:.3f}" for key in ("map", "map_of_chance")),
            "-" if summary["auc"] is None else f"{summary['auc']:.3f}",
            summary["d_prime"],
            summary["clips"],
            summary["classes"]["number"],
        )
        for summary in summaries
    ]
    return format_table(("", "mAP", "chance", "AUC", "d'", "clips", "classes"), rows)
