"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
STATE = "trainer_state.pt"  # of a run, in its folder checkpoint-STEP


def partial(path: Path) -> Path:
    """The hidden name under which a file or folder is written."""
    return path.with_name(f".{path.name}{PARTIAL}")


def publish(folder: Path) -> None:
    """Flushes a folder that was written under its hidden name, then gives it its name."""
    for file in partial(folder).iterdir():
        flush(file)
    flush(partial(folder))
    os.replace(partial(folder), folder)
    flush(folder.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process that locks the folder gets it before the context ends. A file system without locks is used
    without.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the descriptor is closed
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":  # this file system cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
