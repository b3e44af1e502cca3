"""Wording shared by the messages of all commands."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun: "1 file", "2 files", "1,000 files".

    Args:
      number: count.
      one: what follows 1, such as "file" or "file is".
      many: what follows any other number, such as "files are"; None: `one` with an "s".
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
