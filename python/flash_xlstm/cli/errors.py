"""How a command ends early."""

from __future__ import annotations

import errno


class CommandError(Exception):
    """Something the user can put right; its text is the one line they get to see."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user asked to stop; the text says what was kept."""


def reason(error: BaseException) -> str:
    """An error in a few words, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    if f"os error {errno.ENOSPC}" in str(error):  # how safetensors, written in Rust, says it
        return "No space left on device"
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__
