"""How a command ends early."""


class CommandError(Exception):
    """An error that the user can correct. The command prints its text as one line."""


class Interrupted(Exception):  # noqa: N818 - a stop on request is not an error
    """The user asked to stop; the text says what was kept."""
