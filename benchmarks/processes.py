"""Concurrent processes that prepare a measurement."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence


def outputs(commands: Sequence[list[str]], seconds: float, env: dict | None = None) -> Iterator[tuple[str, bool]]:
    """Starts all. Returns each process's output with its errors, and whether it ended within `seconds` of the start."""
    begin = time.perf_counter()
    pipe = subprocess.PIPE
    running = [subprocess.Popen(c, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True) for c in commands]
    for process in running:
        try:
            yield process.communicate(timeout=max(0.1, begin + seconds - time.perf_counter()))[0], True
        except subprocess.TimeoutExpired:
            process.kill()
            yield process.communicate()[0], False
