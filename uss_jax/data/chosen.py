"""A fixed list of records to read in sequence."""

import dataclasses

import numpy as np
from jaxtyping import Integer


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Records with one class each, as an `Order` of the data pipeline.

    Attributes:
      records, classes: [n] record numbers and class indexes.
    """

    records: Integer[np.ndarray, " n"]
    classes: Integer[np.ndarray, " n"]

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns records and classes; the last record is repeated to fill up the last batch."""
        at = np.minimum(positions, len(self.records) - 1)
        return self.records[at], self.classes[at]
