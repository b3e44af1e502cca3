"""FSDKaggle2018: Freesound recordings of 41 classes (https://zenodo.org/records/2552860).

Layout of the three unpacked archives:

    FSDKaggle2018.audio_train/*.wav    FSDKaggle2018.audio_test/*.wav
    FSDKaggle2018.meta/train_post_competition.csv                  fname,label,manually_verified,...
    FSDKaggle2018.meta/test_post_competition_scoring_clips.csv     fname,label,usage,...

Published: SDRi of 2 s mixtures of two recordings at equal energy, 100 per class, queried with the
condition averaged over the sources of such mixtures in the training split.
"""

import functools
import pathlib

from uss_jax.bundles.model import Model
from uss_jax.evaluation.suite import Results
from uss_jax.evaluation.suites.mixing import (
    Mixed,
    Recording,
    class_index_of,
    mixed_neighbours,
    read_table,
    require_files,
    score_splits,
)

_TABLES = {"train": "train_post_competition.csv", "test": "test_post_competition_scoring_clips.csv"}


def run(
    model: Model, data: str, out: str, *, text_encoder: str | None, texts: str | None
) -> tuple[Results, str]:
    """Evaluates separation on the mixtures of the test split."""
    of_split = functools.partial(items, pathlib.Path(data))
    return score_splits(model, out, of_split, {}, text_encoder=text_encoder, texts=texts)


def items(folder: pathlib.Path, split: str) -> list[Mixed]:
    """Returns the mixtures of a split, `train` or `test`.

    Raises:
      UserError: files are missing.
    """
    table = folder / "FSDKaggle2018.meta" / _TABLES[split]
    audio = folder / f"FSDKaggle2018.audio_{split}"
    require_files([table, audio], "FSDKaggle2018")
    recordings = [
        Recording(audio / row["fname"], (row["label"],), (class_index_of(row["label"]),))
        for row in read_table(table, ("fname", "label"))
    ]
    require_files([recording.path for recording in recordings], "FSDKaggle2018")
    return mixed_neighbours(recordings)
