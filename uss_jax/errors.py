"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input, said in one sentence: what was wrong with which file or key, and what to do.

    The command line prints the sentence on standard error and exits with 1; a traceback is for
    our own mistakes only.
    """
