"""Errors of a run, each told in one line."""

from __future__ import annotations

import errno

from torch import Tensor


class TrainingError(ValueError):
    """A wrong setting, data, file or loss. The text is one line. Names of settings and options are in backquotes."""


def reason(error: BaseException) -> str:
    """An error in a few words, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    if f"os error {errno.ENOSPC}" in str(error):  # safetensors' text (Rust) for an OSError
        return "No space left on device"
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__


def short(value: object) -> str:
    """A value on one line of an error."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
