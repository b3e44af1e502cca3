"""Banks: .npz files of named condition vectors.

Letters: `n` vectors, `d` condition width.
"""

import dataclasses
import os
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from uss_jax.bundles.model import Model
from uss_jax.disk.atomic import replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError, counted
from uss_jax.models.query import KINDS


@dataclasses.dataclass(frozen=True)
class Bank:
    """Stored condition vectors.

    Attributes:
      name: [n] names of the sounds.
      vectors: [n, d] conditions.
      kind: one of models/query.py's KINDS.
      net_hash: hash of the query net that computed them.
      how: how they were made, in words.
    """

    name: tuple[str, ...]
    vectors: Float[np.ndarray, "n d"]
    kind: str
    net_hash: str
    how: str = ""

    def select(self, names: Sequence[str], where: str) -> list[int]:
        """Returns the rows of the vectors with these names.

        Without an exact match, case and "_" for spaces are ignored.

        Raises:
          UserError: a name is missing, ambiguous or given twice.
        """
        rows = [self._row(name, where) for name in names]
        for row in rows:
            if rows.count(row) > 1:
                raise UserError(f'"{self.name[row]}" is given twice; give it once')
        return rows

    def _row(self, name: str, where: str) -> int:
        if name in self.name:
            return self.name.index(name)
        alike = [row for row, other in enumerate(self.name) if _folded(other) == _folded(name)]
        if not alike:
            raise UserError(f'{where} has no vector called "{name}"; it has {", ".join(self.name)}')
        if len(alike) > 1:
            choices = " or ".join(f'"{self.name[row]}"' for row in alike)
            raise UserError(
                f'"{name}" is ambiguous: it could be {choices} of {where}; give the exact name'
            )
        return alike[0]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).replace("_", " ").casefold()


def write_bank(path: str | os.PathLike, bank: Bank) -> None:
    """Writes an .npz file with `name`, `vectors`, `kind`, `net_hash` and `how`."""
    require_npz(path)
    with replacing(path) as temporary:
        np.savez(
            temporary,
            name=np.array(bank.name, np.str_),
            vectors=bank.vectors.astype(np.float32),
            kind=bank.kind,
            net_hash=bank.net_hash,
            how=bank.how,
        )


def require_npz(path: str | os.PathLike) -> None:
    """Raises a UserError if a path lacks the suffix .npz, which numpy would append."""
    if not os.fspath(path).endswith(".npz"):
        raise UserError(f"{path}: the file name of a query bank must end in .npz")


_COLUMNS = {
    "name": Column("U", "n"),
    "vectors": Column("f4", "n d"),
    "kind": Column("U"),
    "net_hash": Column("U"),
    "how": Column("U", optional=True),
}


def load_bank(path: str | os.PathLike) -> Bank:
    """Reads a bank, without checking that it fits a model."""
    try:
        with open(path, "rb", opener=at_once) as file:
            stored = read_npz(file, _COLUMNS)
        texts = {key: str(stored.get(key, "")) for key in ("kind", "net_hash", "how")}
        if texts["kind"] not in KINDS:
            raise ValueError(f"its kind is {texts['kind'][:20]!r}, expected {', '.join(KINDS)}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a bank that `uss-jax query make` wrote"
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read as a query bank ({error}); it needs the arrays name, vectors, "
            "kind and net_hash, as `uss-jax query make` writes them"
        ) from error
    bank = Bank(tuple(stored["name"].tolist()), stored["vectors"], **texts)
    if not bank.name:
        raise UserError(f"{path} holds no vector; make it again")
    if twice := [name for name in bank.name if bank.name.count(name) > 1]:
        raise UserError(f'{path} holds two vectors called "{twice[0]}"; make it again')
    return bank


def read_bank(path: str | os.PathLike, model: Model) -> Bank:
    """Reads a bank; raises a UserError unless this model's query net made its vectors."""
    bank = load_bank(path)
    width = model.separator.module.condition_width
    if bank.vectors.shape[1] != width:
        raise UserError(
            f"{path} holds vectors of shape {bank.vectors.shape} for "
            f"{counted(len(bank.name), 'name')}, {model.path} takes conditions of width "
            f"{width}; make the bank with this model"
        )
    kind = model.query.module.kind
    if bank.kind != kind:
        raise UserError(
            f"{path} holds conditions of the kind {bank.kind}, {model.path} takes the kind {kind}; "
            "make the bank with this model"
        )
    if bank.net_hash != model.query_hash:
        raise UserError(
            f"{path} was made with another query net than {model.path} has; make the bank with "
            "this model"
        )
    return bank
