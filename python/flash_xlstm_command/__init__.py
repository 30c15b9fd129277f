"""The ``flash-xlstm`` command. A package of its own, since importing flash_xlstm, and with it torch, takes a while in
which Ctrl-C must end it in one line too."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def main() -> int:
    """Runs the command line; the exit code is that of :func:`flash_xlstm.cli.main`."""
    with interrupt_ends_imports():
        from flash_xlstm.cli import main as run
    return run()


@contextlib.contextmanager
def interrupt_ends_imports() -> Iterator[None]:
    """While it is entered, Ctrl-C ends the process at once. Some imports lose an exception: that of numpy by torch."""
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
