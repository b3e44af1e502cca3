"""Maps labels to class indexes: names, mids or indexes of classes, and custom names by a file."""

import os
from collections.abc import Collection, Mapping

from uss_jax.data.csv_rows import read_rows
from uss_jax.disk.checked_json import shown
from uss_jax.errors import UserError, counted
from uss_jax.ontology import load_ontology

_UNKNOWN_SHOWN = 10
_ADVISED = 3  # wrong classes of a label map with advice; of others, the name alone is shown


def read_label_map(path: str | os.PathLike) -> dict[str, str]:
    """Reads a CSV file that maps custom label names to classes, with columns `name` and `class`.

    Several classes are separated by ";"; labels mapped to none are ignored.
    """
    rows = read_rows(path)
    line, header = next(rows, (1, []))
    if [field.strip().lower() for field in header] != ["name", "class"]:
        raise UserError(f'{path}, line {line}: expected a header with the columns "name,class"')
    found: dict[str, str] = {}
    wrong: list[str] = []
    for line, row in rows:
        if len(row) != 2:
            raise UserError(
                f"{path}, line {line}: {counted(len(row), 'field')}, expected name and class; "
                "put quotes around a name that has commas"
            )
        name, classes = row
        for word in filter(str.strip, classes.split(";")):
            try:
                load_ontology().resolve(word)
            except UserError as error:
                advice = str(error) if len(wrong) < _ADVISED else shown(word)
                wrong.append(f"line {line}: {advice}")
        if found.setdefault(name.strip().casefold(), classes) != classes:
            raise UserError(
                f"{path}, line {line}: {name!r} was mapped to other classes in an earlier line"
            )
    if wrong:
        more = len(wrong) - _UNKNOWN_SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        raise UserError(f"{path}, {'; '.join(wrong[:_UNKNOWN_SHOWN])}{rest}")
    return found


class Resolver:
    """Maps labels to class indexes and records the unknown labels, with their lines."""

    def __init__(self, label_map: Mapping[str, str]):
        self._map = label_map
        self._known: dict[str, tuple[int, ...]] = {}
        self.unknown: dict[str, list[int]] = {}
        self._advice: dict[str, str] = {}

    def __call__(self, line: int, labels: list[str]) -> tuple[int, ...]:
        found: set[int] = set()
        for label in labels:
            if label not in self._known:
                self._known[label] = self._resolve(label)
            found.update(self._known[label])
            if label in self._advice:
                self.unknown.setdefault(label, []).append(line)
        return tuple(sorted(found))

    def _resolve(self, label: str) -> tuple[int, ...]:
        own = self._map.get(label.strip().casefold())
        words = [label] if own is None else list(filter(str.strip, own.split(";")))
        try:
            return tuple(load_ontology().resolve(word) for word in words)
        except UserError as error:
            self._advice[label] = str(error)
            parts = label.split(",")
            if len(parts) > 1 and all(map(_is_class, parts)):
                self._advice[label] = f'no sound class is called "{label}"; put ";" between labels'
            return ()

    def forget_other_lines(self, lines: Collection[int]) -> None:
        """Drops unknown labels of all lines but these."""
        kept = {label: [at for at in where if at in lines] for label, where in self.unknown.items()}
        self.unknown = {label: where for label, where in kept.items() if where}

    def complaint(self) -> str:
        """Returns an error text: the line of the first unknown label, and counts of all."""
        (first, lines), *rest = self.unknown.items()
        said = f"line {lines[0]}: {self._advice[first]}"
        if rest:
            counts = [f'"{name}" ({len(at)})' for name, at in list(self.unknown.items())]
            more = ", ..." if len(counts) > _UNKNOWN_SHOWN else ""
            said += (
                f" (unknown labels and how many lines have them: "
                f"{', '.join(counts[:_UNKNOWN_SHOWN])}{more})"
            )
        return f"{said}; or give --label-map or --skip-unknown-labels"


def _is_class(label: str) -> bool:
    try:
        load_ontology().resolve(label)
    except UserError:
        return False
    return True
