"""The one exception type that means "the caller can mend this"."""


class InputError(ValueError):
    """Bad input: the message is one line that says what was wrong, what was expected and what came.

    The command line prints it without a traceback; every other exception is a defect of ours.
    """


def printable(value: object, most: int = 200) -> str:
    """`str(value)` as one line that a terminal shows as it is: what does not print is escaped, a long text is cut.

    most: characters of the result, at least 1; a cut text ends in "...".
    """
    text = str(value)
    cut = text[: most + 1]  # escaping only lengthens it
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    if len(text) <= most and len(cut) <= most:
        return cut
    return cut[: max(0, most - 3)] + "..."[:most]
