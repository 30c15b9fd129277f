"""Subject mlstm_counters: hardware counters of the mLSTM's kernels, by Nsight Compute (`ncu`).

A row is a kernel of one forward and backward, in the order of the launches. It has the kernel's time, its bytes from
and to DRAM, and its share of the limits of DRAM, L2 cache, tensor pipes and instruction issue, in percent. ncu controls
the clocks, so that the times differ from those of subject mlstm. ncu needs permission to read the counters
(NVreg_RestrictProfilingToAdminUsers=0, or root).
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from peers import DTYPES, Point, tensors
from run import timed_call

# ncu's name: our name, the divisor of ncu's base unit, and that unit (its name depends on ncu's version)
METRICS = {
    "gpu__time_duration.sum": ("time_us", 1e3, ("nsecond", "ns")),
    "dram__bytes.sum": ("dram_mb", 1e6, ("byte",)),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", 1.0, ("%",)),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("l2_percent", 1.0, ("%",)),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("tensor_percent", 1.0, ("%",)),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("issue_percent", 1.0, ("%",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dqk", type=int, default=256)
    parser.add_argument("--dv", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this time")


def command(args: argparse.Namespace) -> list[str]:
    """Runs ncu on :func:`main`, which starts and stops the profiling."""
    words = ["ncu", "--profile-from-start", "off", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    words += [sys.executable, str(Path(__file__).resolve())]
    return words + [str(getattr(args, name)) for name in ("batch", "seq", "heads", "dqk", "dv", "dtype")]


def parse(text: str) -> list[dict]:
    """Rows of ncu's CSV, which has a line for each kernel and metric. Lines that begin with ``==`` precede it."""
    lines = text.splitlines()
    header = next((x for x, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        return []
    kernels: dict[str, dict] = {}
    for line in csv.DictReader(lines[header:]):
        if line["Metric Name"] in METRICS:
            name, divisor, units = METRICS[line["Metric Name"]]
            if line["Metric Unit"] not in units:
                raise ValueError(f"ncu's unit of {line['Metric Name']} is {line['Metric Unit']}; it must be {units[0]}")
            row = kernels.setdefault(line["ID"], {"what": "mlstm_counters", "kernel": line["Kernel Name"]})
            row[name] = float(line["Metric Value"].replace(",", "")) / divisor
    return list(kernels.values())


def run(args: argparse.Namespace) -> Iterator[dict]:
    words = command(args)
    if shutil.which("ncu") is None or not torch.cuda.is_available():
        yield {"what": "absent", "error": "needs a GPU and Nsight Compute's ncu on the PATH"}
        return
    done = subprocess.run(words, capture_output=True, text=True, timeout=args.seconds)
    rows = parse(done.stdout)
    yield from rows
    if done.returncode or not rows:
        lines = (done.stdout + done.stderr).strip().splitlines()
        yield {"what": "failed", "error": lines[-1] if lines else f"ncu ended with {done.returncode}"}


def main() -> None:
    """One forward and backward after one to warm up: batch, seq, heads, dqk, dv, dtype."""
    from flash_xlstm import ops

    *sizes, dtype = sys.argv[1:]
    device = torch.device("cuda")
    leaves = tensors("flash_xlstm", Point(*map(int, sizes)), DTYPES[dtype], device)
    function = timed_call(ops.mlstm, leaves, True)
    function()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    function()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
