"""FSD50K: 200 classes of Freesound's recordings (https://zenodo.org/records/4060432).

As its archives unpack:

    FSD50K.dev_audio/<fname>.wav    FSD50K.eval_audio/<fname>.wav
    FSD50K.ground_truth/dev.csv     fname,labels,mids,split
    FSD50K.ground_truth/eval.csv    fname,labels,mids

Labels and mids are lists joined by commas. Published: as FSDKaggle2018, by the first label alone. A
variant of ours asks for every label of a recording, beside another one of unrelated labels.
"""

import pathlib

from uss_jax.evaluation.suites.mixing import (
    Mixed,
    Recording,
    mixed_neighbours,
    read_table,
    require_files,
)
from uss_jax.ontology import load_ontology

_PARTS = {"train": "dev", "test": "eval"}


def items(folder: pathlib.Path, split: str, *, all_labels: bool = False) -> list[Mixed]:
    """The mixtures of a split, `train` (dev) or `test` (eval), checked to be there.

    Args:
      folder: of the data set.
      split: of it.
      all_labels: our variant.
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
