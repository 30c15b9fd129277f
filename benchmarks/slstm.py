"""Subject slstm: forward, and forward + backward, beside flashrnn's kernels and plain PyTorch in the same run.

A row holds the median time of a call, the microseconds of a step (the time over seq), and GB/s. GB/s count each input
and output once (`Point.bytes_moved`), without the values that a kernel keeps for its backward. The latency between two
steps bounds the loop over the tokens, not a rate of the device: there is no share of a floor. flashrnn keeps n at 1 or
above, ours has no such bound. Both do the same work.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peers import DTYPES
from processes import outputs
from run import describe, measured, median_time_ms, pair, peak_memory_bytes, summarize_speedups, timed_call

PASSES = ("forward", "forward+backward")
KEY = ("peer", "pass", "batch", "seq", "heads", "dim", "dtype")


@dataclass(frozen=True, order=True)
class Point:
    """One setting of the sLSTM."""

    batch: int
    seq: int
    heads: int
    dim: int

    def bytes_moved(self, backward: bool, item: int) -> float:
        """x read and h written; backward reads x, h and dh and writes dx."""
        units = self.batch * self.seq * self.heads * self.dim
        return float(units * item * (5 + (10 if backward else 0)))


HEADLINE = (Point(16, 1024, 4, 256), Point(16, 1024, 12, 64))
SMALL = (Point(2, 64, 2, 32), Point(3, 32, 1, 64))
BATCHES, HEADS_AND_DIMS = (1, 4, 16, 64, 256), ((24, 32), (12, 64), (6, 128), (4, 256), (2, 512), (1, 768))

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours() -> Call:
    return importlib.import_module("flash_xlstm.ops").slstm


def _plain() -> Call:
    return importlib.import_module("flash_xlstm.reference").slstm


def _flashrnn(backend: str) -> Callable[[], Call]:
    def load() -> Call:
        kernel = importlib.import_module("flashrnn").flashrnn
        # it waits a random time of up to 10 s before it loads a module, once for each batch size
        importlib.import_module("flashrnn.flashrnn.cuda_init").time = types.SimpleNamespace(sleep=lambda seconds: None)
        names = {dtype: name for name, dtype in DTYPES.items()}

        def call(x: Tensor, R: Tensor, b: Tensor) -> Tensor:
            return kernel(x, R, b, function="slstm", backend=backend, dtype=names[x.dtype])[0][0]

        return call

    return load


PEERS: dict[str, Callable[[], Call]] = {
    "flash_xlstm": _ours,
    "flashrnn_cuda": _flashrnn("cuda"),
    "flashrnn_triton_fused": _flashrnn("triton_fused"),
    "plain_pytorch": _plain,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", choices=("headline", "grid", "small"), default="headline")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="grid: batch sizes")
    parser.add_argument("--dims", nargs="+", type=pair, default=HEADS_AND_DIMS, help="grid: heads x dim, as 4x256")
    parser.add_argument("--seq", type=int, default=1024, help="grid: tokens")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop measuring after this time")
    parser.add_argument("--seconds-each", type=float, default=0.2, help="time for the calls of one measurement")
    parser.add_argument("--workers", type=int, default=0, help="processes that build flashrnn's modules beforehand")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def points(args: argparse.Namespace) -> list[Point]:
    if args.settings != "grid":
        return list(SMALL if args.settings == "small" else HEADLINE)
    return [Point(batch, args.seq, *pair) for pair, batch in itertools.product(args.dims, args.batches)]


def _tensors(point: Point, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, R, b: standard normal pre-activations, f around 3; R is scaled so that R h is of the size of h."""
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float32, device=device)  # noqa: E731
    x = new(point.batch, point.seq, 4, point.heads, point.dim)
    x[:, :, 1] += 3.0
    R = new(4, point.heads, point.dim, point.dim) * point.dim**-0.5
    return [t.to(dtype) for t in (x, R, torch.zeros(4, point.heads, point.dim, device=device))]


def _build_ahead(wanted: list[Point], dtype: str, workers: int, seconds: float) -> dict:
    """Builds flashrnn's `cuda` modules in `workers` processes before the measurement. It compiles half a minute for
    each batch, heads and dim."""
    begin = time.perf_counter()
    shares = [wanted[x::workers] for x in range(workers) if wanted[x::workers]]
    script = [sys.executable, str(Path(__file__).resolve()), dtype]
    commands = [[*script, *(f"{p.batch}x{p.heads}x{p.dim}" for p in share)] for share in shares]
    done = sum(output.count("built\n") for output, _ in outputs(commands, seconds))
    return {"what": "flashrnn_build", "modules": len(wanted), "done": done, "seconds": time.perf_counter() - begin}


def _measure(row: dict, call: Call, point: Point, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    backward = row["pass"] != "forward"
    function = timed_call(call, _tensors(point, dtype, device), backward)
    function()  # compiles; tunes
    if device.type == "cuda":
        row["peak_memory_mib"] = peak_memory_bytes(function) / 2**20
    row["time_ms"] = median_time_ms(function, device, budget_s=args.seconds_each)
    row["step_us"] = 1e3 * row["time_ms"] / point.seq
    row["gb_per_s"] = point.bytes_moved(backward, dtype.itemsize) / row["time_ms"] / 1e6


def run(args: argparse.Namespace) -> Iterator[dict]:
    deadline = time.perf_counter() + args.seconds
    device = torch.device(args.device)
    earlier = {tuple(row[k] for k in KEY) for row in args.earlier_rows if row["what"] == "slstm"}
    calls: dict[str, Call] = {}
    for name in args.peers:
        try:
            if device.type != "cuda" and name.startswith("flashrnn"):
                raise RuntimeError("needs a GPU")
            calls[name] = PEERS[name]()
        except Exception as error:
            yield {"what": "absent", "peer": name, "error": describe(error)}
    if args.workers and "flashrnn_cuda" in calls:
        key = lambda p, name: ("flashrnn_cuda", name, *vars(p).values(), args.dtype)  # noqa: E731
        wanted = [p for p in points(args) if any(key(p, name) not in earlier for name in args.passes)]
        yield _build_ahead(wanted, args.dtype, args.workers, args.seconds / 2)
    for point, pass_name, name in itertools.product(points(args), args.passes, calls):
        row = {"what": "slstm", "peer": name, "pass": pass_name, **vars(point), "dtype": args.dtype}
        if tuple(row[k] for k in KEY) in earlier:
            continue
        if time.perf_counter() > deadline:
            yield {"what": "stopped", "error": f"{args.seconds:.0f} s were over"}
            return
        yield from measured(row, functools.partial(_measure, row, calls[name], point, args), device)


def summarize(rows: list[dict]) -> list[dict]:
    """Every peer's time and our speedup over it (:func:`run.summarize_speedups`), with our time of a step."""
    return summarize_speedups(rows, "slstm", KEY, "step_us")


def main() -> None:
    """Builds flashrnn's modules: a dtype, then batch x heads x dim."""
    call, device = PEERS["flashrnn_cuda"](), torch.device("cuda")
    for text in sys.argv[2:]:
        batch, heads, dim = (int(n) for n in text.split("x"))
        with torch.no_grad():
            call(*_tensors(Point(batch, 2, heads, dim), DTYPES[sys.argv[1]], device))
        print("built", flush=True)


if __name__ == "__main__":
    main()
