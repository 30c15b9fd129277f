"""Benchmark runner: `python benchmarks/run.py SUBJECT [--out FILE] [options of the subject]`.

A subject is a module of this folder with `add_arguments(parser)` and `run(args) -> list[dict]`, a dict a measurement.
The runner adds where they were taken (GPU, CPU, versions, commit), writes JSON and prints a table.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import flash_xlstm

SUBJECTS = ("mlstm", "cpu_vs_transformers")


def _cpu_name() -> str:
    """As the kernel calls it, where it says; else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, object]:
    """Where and with what a measurement was taken."""
    facts: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "flash_xlstm": flash_xlstm.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
    }
    for name in ("triton", "transformers", "numpy"):
        try:
            facts[name] = importlib.import_module(name).__version__
        except ImportError:
            facts[name] = None
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda_runtime"] = torch.version.cuda
    return facts


def median_time_ms(function: Callable[[], object], device: torch.device, *, budget_s: float = 1.0) -> float:
    """Median time of a call in ms: device events on CUDA, the wall clock on a CPU; at least 5 and at most 200 calls
    within about `budget_s`, after warm-up."""
    for _ in range(2):
        function()
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
    deadline = time.perf_counter() + budget_s
    while len(times) < 5 or (time.perf_counter() < deadline and len(times) < 200):
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            function()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def peak_memory_bytes(function: Callable[[], object]) -> int:
    """CUDA memory that a call allocates at its peak, beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def print_table(rows: list[dict]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = [[f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[x]) for line in text)) for x, c in enumerate(columns)]
    for line in [columns, *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_json(path: Path, document: dict) -> None:
    """Writes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    sys.path.insert(0, str(Path(__file__).parent))
    subject = importlib.import_module(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] in SUBJECTS else None
    if subject is not None:
        subject.add_arguments(parser)
    args = parser.parse_args()
    assert subject is not None
    rows = subject.run(args)
    print_table(rows)
    if args.out is not None:
        write_json(args.out, {"subject": args.subject, "environment": environment(), "results": rows})
        print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
