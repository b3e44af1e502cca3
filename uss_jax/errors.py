"""Exceptions and the wording of messages for people.

The command line reports each exception as one sentence and an exit status.
"""

import sys
import unicodedata


class UserError(Exception):
    """Invalid input, in one sentence: the file or key, what is wrong with it, and what to do.

    The command line prints the sentence on standard error and exits with 1; tracebacks are only
    for bugs. Line breaks and other control characters, which may come from the input, are escaped.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(map(_visible, sentence)))


def _visible(character: str) -> str:
    # Surrogates stand for the bytes of names that are not UTF-8; they are kept.
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return character.encode("unicode_escape").decode()


class Stopped(Exception):
    """A run has saved its state and stopped on SIGTERM; the same command resumes it.

    The command line prints the sentence and exits with 143, the status of a process that SIGTERM
    ends, so that schedulers restart it.
    """


class NotHeard(Exception):
    """All output was written, but a requested class was not detected in a recording.

    The command line prints the sentence and exits with 3, for scripts to check.
    """


def tell(sentence: str) -> None:
    """Writes the last sentence of a command to standard error, as a line.

    In one write, since hosts may share a terminal or a log: of an unbuffered stream, `print` writes
    text and line break one after the other, and the sentences of two hosts would run together.
    """
    sys.stderr.write(f"uss-jax: {sentence}\n")


def one_line(text: str) -> str:
    """Escapes a text so that it prints on one line and can be encoded as UTF-8.

    Escapes control characters, such as "\\n", and surrogates, which stand for the bytes of a file
    name that are not UTF-8.
    """
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def counted(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun: "1 file", "2 files", "1,000 files".

    Args:
      number: count.
      one: what follows 1, such as "file" or "file is".
      many: what follows any other number, such as "files are"; None: `one` with an "s".
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
