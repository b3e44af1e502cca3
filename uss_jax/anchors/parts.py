"""Files of a mining: a part for each record shard, then the table and its conditions.

Parts are in a hidden folder beside the table, `.NAME.parts-DIGEST`, which hosts share. DIGEST is of
detector, records and settings, so that a mining with others never uses these parts.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from uss_jax.anchors import conditions
from uss_jax.anchors.table import COLUMNS, AnchorTable, read_header, read_table, typed, write_table
from uss_jax.data.index import RecordIndex
from uss_jax.disk.atomic import flush_below, move, owner, replacing
from uss_jax.disk.checked_npz import Column, read_npz
from uss_jax.disk.folder import make_folder
from uss_jax.disk.lock import InUse, only_one
from uss_jax.errors import UserError

# Array in a part: the digest of its conditions.
_DIGEST = "conditions_digest"


@dataclasses.dataclass(frozen=True)
class Output:
    """What a mining writes.

    Attributes:
      path: path of the table; its conditions are beside it.
      header: header of the table.
      about: header of the conditions, less the digests of the anchors and shards; None for no
        conditions.
      index: index of the records.
    """

    path: pathlib.Path
    header: dict[str, Any]
    about: dict[str, Any] | None
    index: RecordIndex

    def table(self) -> AnchorTable | None:
        """Returns the table, if it exists and has this header.

        Raises:
          UserError: there is another file in its place, or it is damaged.
        """
        if not self.path.exists():
            return None
        try:
            there = read_header(self.path)
            if not self.index.has_digest(there["index_digest"]):
                return None
            # Older versions did not state the detector's fields.
            alike = {"sed_model": self.header["sed_model"], **there}
            if {**alike, "index_digest": self.index.digest} != self.header:
                return None
            return read_table(self.path, self.index, self.header["segment_samples"])
        except UserError as error:
            raise UserError(
                f"{error}, but first remove this file or choose another --out"
            ) from None

    def complete(self, table: AnchorTable | None) -> bool:
        """Returns whether nothing beside this table is left to mine."""
        return table is not None and (self.about is None or self._has_conditions(table))

    def _has_conditions(self, table: AnchorTable) -> bool:
        """Returns whether undamaged conditions of a table by this query net exist."""
        folder = conditions.folder_of(self.path)
        try:
            found = conditions.open_conditions(folder, table, self.index, verify=True).header
        except UserError:
            return False
        return {**found, **self.about} == found

    def make_parts(self, table: AnchorTable | None) -> "Parts":
        """Creates the folder of parts.

        Args:
          table: the table, if only its conditions are missing.

        Raises:
          UserError: the folder cannot be created, or the place of the conditions is taken.
        """
        what = dict(self.header)
        if self.about:
            what |= {"query": self.about, "anchors_digest": table and table.digest}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        parts = Parts(self.path.with_name(f".{self.path.name}.parts-{digest}"), self)
        make_folder(parts.folder, "choose another --out")
        if self.about:
            make_folder(parts.conditions, "choose another --out")
            there = conditions.folder_of(self.path)
            if there.is_symlink() or (there.exists() and not there.is_dir()):
                raise UserError(
                    f"{there} is where the conditions must be, but is not a folder; remove it or "
                    "choose another --out"
                )
        return parts


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a mining.

    Attributes:
      folder: where they are.
      output: what they become.
    """

    folder: pathlib.Path
    output: Output

    @property
    def conditions(self) -> pathlib.Path:
        """Folder of the conditions of the parts."""
        return self.folder / "conditions"

    def missing(self, numbers: range) -> list[int]:
        """Returns those of these record shards whose part does not exist."""
        return [number for number in numbers if not self._path(number).exists()]

    def write(self, number: int, columns: dict[str, np.ndarray]) -> None:
        """Writes the part of a record shard: columns of the table, and `vector` if there is one."""
        columns, more = dict(columns), {}
        if self.output.about:
            vectors = columns.pop("vector")
            more[_DIGEST] = conditions.write_shard(self.conditions, number, vectors)
        with replacing(self._path(number)) as temporary:
            np.savez(temporary, **typed(columns), **more)

    def finish(self, table: AnchorTable | None) -> bool:
        """Assembles the parts if none is missing and no other host does.

        Args:
          table: the table, if only its conditions are missing.

        Returns:
          Whether everything is written; if not, another host still mines or writes.

        Raises:
          UserError: a part is damaged or of other records, or the output cannot be written.
        """
        output = self.output
        if self.missing(range(len(output.index.shards))):
            return output.complete(output.table())
        try:
            with only_one(self.folder, "it writes the table"):
                self._assemble(table)
        except InUse:
            return False
        except (FileNotFoundError, UserError):
            # Another host may just have assembled and removed the parts.
            if not output.complete(output.table()):
                raise
        return True

    def _assemble(self, table: AnchorTable | None) -> None:
        """Writes the table, unless it is there, and its conditions; removes the parts."""
        output, rows = self.output, self._read()
        columns = {name: np.concatenate([some[name] for some in rows]) for name in COLUMNS}
        if not np.array_equal(columns["class"], output.index.label_class):
            raise UserError(
                f"{self.folder} holds parts that do not match the records; remove that folder and "
                "run the same command again"
            )
        if output.about:
            anchors = table or AnchorTable.of(output.header, columns)
            digests = [str(some[_DIGEST]) for some in rows]
            about = {
                **output.about,
                "anchors_digest": anchors.digest,
                "shard_digests": digests,
            }
            # An interrupted assembly may have moved them already.
            if not dataclasses.replace(output, about=about).complete(anchors):
                conditions.write_header(self.conditions, about)
                _replace_folder(self.conditions, conditions.folder_of(output.path))
        if table is None:
            write_table(output.path, output.header, columns)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> list[dict[str, np.ndarray]]:
        """Reads all parts."""
        rows, wanted = [], {**COLUMNS, **({_DIGEST: Column("U")} if self.output.about else {})}
        for number in range(len(self.output.index.shards)):
            try:
                with open(self._path(number), "rb") as file:
                    rows.append(read_npz(file, wanted))
            except ValueError as error:
                raise UserError(
                    f"{self._path(number)} is damaged ({error}); remove it and run the same "
                    "command again"
                ) from error
        return rows

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05d}.npz"


def _replace_folder(new: pathlib.Path, place: pathlib.Path) -> None:
    """Moves a folder to a place, whose old folder is removed.

    Raises:
      FileNotFoundError: `new` is gone; the old folder stays.
      UserError: in place of another OSError.
    """
    aside = place.with_name(f".{place.name}.{owner()}")
    try:
        flush_below(new)
        if place.is_dir():
            os.rename(place, aside)
        try:
            move(new, place)
        except FileNotFoundError:
            if aside.exists():
                os.rename(aside, place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{place} could not be written ({error.strerror or error}); mend it and run the same "
            "command again"
        ) from error
