"""The command line: ``flash-xlstm info | prepare | train | generate | demo | tasks | bench | convert``.

This package imports only the standard library. :func:`main` imports torch, which takes seconds, and handles Ctrl-C
meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments; default: the process's.

    Returns:
        The exit code: 0 for success, 2 for an error (printed as one line), 130 if interrupted.
    """
    with interrupt_ends_imports():
        from flash_xlstm.cli.command import run
    return run(argv)


@contextlib.contextmanager
def interrupt_ends_imports() -> Iterator[None]:
    """Within this context Ctrl-C ends the process at once. A KeyboardInterrupt would get lost in torch's import of
    numpy."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nflash-xlstm: interrupted\n")
    os._exit(130)
