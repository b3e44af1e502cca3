"""The exceptions that the command line turns into a sentence and an exit status."""


class UserError(Exception):
    """Bad input, said in one sentence: what was wrong with which file or key, and what to do.

    The command line prints the sentence on standard error and exits with 1; a traceback is for
    our own mistakes only.
    """


class Stopped(Exception):
    """A run was asked to stop by SIGTERM and has saved all; the same command goes on.

    The command line prints the sentence and exits with 143, as a process does that SIGTERM ends:
    schedulers then start it again.
    """
