"""Reads CSV files that people write; errors name the file and the line."""

import csv
import os
from collections.abc import Iterable, Iterator

from uss_jax.disk.opening import at_once
from uss_jax.errors import UserError


def read_rows(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of every non-blank line."""
    try:
        with open(path, encoding="utf-8-sig", newline="", opener=at_once) as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            read_lines = 0
            try:
                for row in reader:
                    read_lines = reader.line_num
                    if row:
                        yield read_lines, row
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {read_lines + 1}: not valid CSV in UTF-8 "
                    f"({error}); save the file again as one"
                ) from error
            except UnicodeDecodeError as error:
                line = _undecodable_line(path)
                raise UserError(
                    f"{path}{f', line {line}' if line else ''}: not valid CSV in UTF-8 (byte "
                    f"0x{error.object[error.start]:02x}); save the file again as UTF-8"
                ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a CSV file") from None


def read_columns(
    path: str | os.PathLike, columns: Iterable[str], remedy: str, errors: str = "strict"
) -> list[dict[str, str]]:
    """Reads a CSV file whose first line names its columns; returns a dict for each further line.

    Args:
      path: the file.
      columns: names of columns that it must have.
      remedy: what to do about a file that is refused; ends the message.
      errors: how bytes that are not UTF-8 are read, as for `open`.

    Raises:
      UserError: the file cannot be read, a column is missing, or a line has other fields.
    """
    rows = []
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline="", opener=at_once) as file:
            reader = csv.DictReader(file)
            named = reader.fieldnames or ()
            for column in columns:
                if column not in named:
                    raise UserError(f'{path} has no column "{column}" in its first line; {remedy}')
            for row in reader:
                if None in row or None in row.values():  # more fields, or fewer
                    raise UserError(
                        f"{path}, line {reader.line_num}: expected {len(named)} fields, one for "
                        f"each column of the first line; {remedy}"
                    )
                rows.append(row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a CSV file ({error}); {remedy}") from error
    return rows


def _undecodable_line(path: str | os.PathLike) -> int | None:
    """Returns the number of the first line that is not UTF-8; None for what is read only once."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return number
    return None
