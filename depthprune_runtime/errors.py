"""The one exception type that means "the caller can mend this"."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, what was expected and what came.

    The command line prints it without a traceback; every other exception is a defect of ours.
    """
