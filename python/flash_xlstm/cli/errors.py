"""How a command ends early."""


class CommandError(Exception):
    """Something the user can put right; its text is the one line they get to see."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user asked to stop; the text says what was kept."""
