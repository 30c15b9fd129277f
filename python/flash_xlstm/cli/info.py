"""``flash-xlstm info``."""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flash_xlstm import ops
from flash_xlstm._build import build_info

_OPS = [name for name in ops.__all__ if name.islower() and name != "kernel_for"]


def run(args: argparse.Namespace) -> int:
    """Prints the facts of the build, the GPUs seen, and the kernel each op takes."""
    for line in _lines():
        print(line)
    return 0


def environment() -> dict[str, Any]:
    """The machine and the versions of a run, for its results file."""
    return {
        "date": datetime.date.today().isoformat(),
        "flash_xlstm": build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    """The CPU's name from /proc/cpuinfo, or from Python's platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines() -> Iterator[str]:
    facts = build_info()
    yield "flash-xlstm"
    yield from _table({name.replace("_", " "): value or "none" for name, value in facts.items()})
    yield ""
    count = torch.cuda.device_count()
    yield "GPUs" if count else "GPUs: none seen by torch"
    yield from _table({f"cuda:{index}": _gpu(index) for index in range(count)})
    for device in ["cpu", *(f"cuda:{index}" for index in range(count))]:
        yield ""
        yield f"kernels on {device}"
        yield from _table({op: ops.kernel_for(op, device) for op in _OPS})


def _gpu(index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    capability = f"{facts.major}.{facts.minor}"
    return f"{facts.name}, compute capability {capability}, {facts.total_memory / 2**30:.0f} GiB"


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in rows.items()]
