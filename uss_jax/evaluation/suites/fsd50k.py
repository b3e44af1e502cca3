"""FSD50K: Freesound recordings of 200 classes (https://zenodo.org/records/4060432).

Layout of the unpacked archives:

    FSD50K.dev_audio/<fname>.wav    FSD50K.eval_audio/<fname>.wav
    FSD50K.ground_truth/dev.csv     fname,labels,mids,split
    FSD50K.ground_truth/eval.csv    fname,labels,mids

Labels and mids are comma-separated lists. The published protocol is that of FSDKaggle2018, with the
first label only. A variant, which is not published, queries every label of a recording, mixed with
a recording of unrelated labels.
"""

import functools
import pathlib

from uss_jax.bundles.model import Model
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.suites.mixing import (
    Mixed,
    Recording,
    mixed_neighbours,
    read_table,
    require_files,
    score_splits,
)
from uss_jax.ontology import load_ontology

_PARTS = {"train": "dev", "test": "eval"}


def run(
    model: Model,
    data: str,
    out: str,
    *,
    labels: str,
    text_encoder: str | None,
    texts: str | None,
) -> tuple[Results, str]:
    """Evaluates separation on the mixtures of the test split."""
    of_split = functools.partial(items, pathlib.Path(data), all_labels=labels == "all")
    how = {"labels": labels}
    return score_splits(model, out, of_split, how, text_encoder=text_encoder, texts=texts)


def items(folder: pathlib.Path, split: str, *, all_labels: bool = False) -> list[Mixed]:
    """Returns the mixtures of a split.

    Args:
      folder: folder of the data set.
      split: `train` (dev) or `test` (eval).
      all_labels: query every label instead of the first.

    Raises:
      UserError: files are missing.
    """
    part = _PARTS[split]
    table = folder / "FSD50K.ground_truth" / f"{part}.csv"
    audio = folder / f"FSD50K.{part}_audio"
    require_files([table, audio], "FSD50K")
    nodes = load_ontology().nodes
    recordings = []
    for row in read_table(table, ("fname", "labels", "mids")):
        known = [nodes.get(mid) for mid in row["mids"].split(",")]
        recordings.append(
            Recording(
                audio / f"{row['fname']}.wav",
                tuple(row["labels"].split(",")),
                tuple(node and node.class_index for node in known),
            )
        )
    require_files([recording.path for recording in recordings], "FSD50K")
    return mixed_neighbours(recordings, conflict_free=all_labels)
