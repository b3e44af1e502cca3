"""The exceptions that the command line turns into a sentence and an exit status."""

import unicodedata


class UserError(Exception):
    """Bad input, said in one sentence: what was wrong with which file or key, and what to do.

    The command line prints the sentence on standard error and exits with 1; a traceback is for
    our own mistakes only. Line breaks and other control characters, which names and values of the
    input may hold, are shown as escapes.
    """

    def __init__(self, sentence: str):
        super().__init__("".join(map(_visible, sentence)))


def _visible(character: str) -> str:
    # Names that are not UTF-8 keep their bytes, as surrogates.
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return character.encode("unicode_escape").decode()


class Stopped(Exception):
    """A run was asked to stop by SIGTERM and has saved all; the same command goes on.

    The command line prints the sentence and exits with 143, as a process does that SIGTERM ends:
    schedulers then start it again.
    """


class NotHeard(Exception):
    """All was written, but a sound that was asked for by its class is not heard in a recording.

    The command line prints the sentence and exits with 3, so that a script can tell.
    """


def one_line(text: str) -> str:
    """Returns a text that prints on one line and can be written as UTF-8.

    Control characters become escapes such as "\\n", and so do bytes of a file name that are not
    UTF-8, which Python holds as surrogates.
    """
    return "".join(
        character
        if character.isprintable() or unicodedata.category(character) == "Zs"
        else character.encode("unicode_escape").decode()
        for character in text
    )
