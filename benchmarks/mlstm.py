"""Subject mlstm: forward, and forward + backward, beside the peers of peers.py in the same run.

A row holds the median time of a call and its peak memory. TFLOP/s count the products that the mLSTM needs
(`Point.flops`: chunks of 128 tokens, nothing computed twice), whatever a peer computes. GB/s count each input and
output once (`Point.bytes_moved`). The floor is the larger of both at the rates that the same run measured (row
`rates`); `share_of_floor` is the floor over the time.

Attention and Mamba-2 compute other functions of the same width, and have times only. Attention has heads of 128, as
many as make heads x dv. Mamba-2 has heads of 64 with a state of 64, twice as wide, as in its layers. `simple_gla` has
neither normalizer nor input gate. Rows `host` have the host's time of one of our forward calls. Take them in a process
without peers, whose packages slow Python down.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Iterator

import torch

import triton_warmup
from peers import DTYPES, OTHER_WORK, PEERS, Call, Point, memory_estimate, other_heads, refusal, tensors
from run import (
    describe,
    device_rates,
    measured,
    median_time_ms,
    pair,
    peak_memory_bytes,
    summarize_speedups,
    timed_call,
)

SHAPES = ((128, 512), (32, 2048), (8, 8192), (1, 65536))
DIMS = ((64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 1024))
HEADS = (8, 4, 16, 32)
SMALL = (Point(2, 256, 2, 32, 64), Point(1, 512, 2, 64, 64))
GRID_PEERS = ("flash_xlstm", "tfla", "simple_gla")
PASSES = ("forward", "forward+backward")
KEY = ("peer", "pass", "batch", "seq", "heads", "dqk", "dv", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", choices=("headline", "grid", "small"), default="headline")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all; three for the grid")
    parser.add_argument("--heads", nargs="+", type=int, help="grid: number of heads")
    parser.add_argument("--dims", nargs="+", type=pair, help="grid: dqk x dv, as 256x512")
    parser.add_argument("--shapes", nargs="+", type=pair, help="batch x seq, as 8x8192")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=600.0, help="stop measuring after this time")
    parser.add_argument("--seconds-each", type=float, default=0.2, help="time for the calls of one measurement")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile Triton peers beforehand")
    parser.add_argument("--warmup-seconds", type=float, default=60.0, help="time for those")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def points(args: argparse.Namespace) -> list[Point]:
    """The grid in a fixed random order, so that a run that is cut by its time limit has a sample of the whole."""
    if args.settings == "small":
        return list(SMALL)
    shapes, heads, dims = args.shapes or SHAPES, args.heads or HEADS, args.dims or DIMS
    if args.settings == "headline":
        return [Point(*shape, 8, 256, 512) for shape in shapes]
    grid = [Point(*shape, h, *d) for shape, h, d in itertools.product(shapes, heads, dims)]
    random.Random(0).shuffle(grid)
    return grid


def _row(name: str, pass_name: str, point: Point, dtype: str) -> dict:
    row = {"what": "mlstm", "peer": name, "pass": pass_name, **vars(point), "dtype": dtype}
    if PEERS[name].layout in OTHER_WORK:
        row[f"{PEERS[name].layout}_heads"] = other_heads(name, point)
    return row


def _measure(row: dict, call: Call, point: Point, rates: dict, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    backward = row["pass"] != "forward"
    reason = refusal(row["peer"], point)
    if reason is None and device.type == "cuda":
        needed, free = memory_estimate(row["peer"], point, backward, dtype.itemsize), torch.cuda.mem_get_info()[0]
        if needed > 0.95 * free:
            reason = f"needs about {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"
    if reason is not None:
        row["skipped"] = reason
        return
    function = timed_call(call, tensors(row["peer"], point, dtype, device), backward)
    if device.type == "cuda":
        begin = time.perf_counter()
        function()  # compiles; tunes
        torch.cuda.synchronize()
        row["first_call_s"] = time.perf_counter() - begin
        row["peak_memory_mib"] = peak_memory_bytes(function) / 2**20
    row["time_ms"] = median_time_ms(function, device, budget_s=args.seconds_each)
    if PEERS[row["peer"]].layout in OTHER_WORK:
        return
    flops, moved = point.flops(backward), point.bytes_moved(backward, dtype.itemsize)
    floor_ms = max(moved / rates["copy_gb_per_s"] / 1e6, flops / rates["matmul_tflops"] / 1e9)
    row["tflops"] = flops / row["time_ms"] / 1e9
    row["gb_per_s"] = moved / row["time_ms"] / 1e6
    row["floor_ms"] = floor_ms
    row["share_of_floor"] = floor_ms / row["time_ms"]


def _load(names: list[str], device: torch.device) -> tuple[dict[str, Call], list[dict]]:
    calls, absent = {}, []
    for name in names:
        try:
            if device.type != "cuda" and (PEERS[name].triton or PEERS[name].layout == "attention"):
                raise RuntimeError("needs a GPU")
            calls[name] = PEERS[name].load()
        except Exception as error:
            absent.append({"what": "absent", "peer": name, "error": describe(error)})
    return calls, absent


def _host_rows(call: Call, device: torch.device) -> Iterator[dict]:
    """The host's microseconds of one forward call, for a problem so small that the device keeps up."""
    leaves = tensors("flash_xlstm", Point(1, 256, 4, 64, 64), torch.bfloat16, device)
    for gradients in (False, True):
        leaves = [t.detach().requires_grad_(gradients) for t in leaves]
        times = []
        with torch.set_grad_enabled(gradients):
            for _ in range(30):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(100):
                    call(*leaves)
                times.append((time.perf_counter() - begin) / 100 * 1e6)
        yield {"what": "host", "peer": "flash_xlstm", "gradients": gradients, "host_us": statistics.median(times)}


def run(args: argparse.Namespace) -> Iterator[dict]:
    deadline = time.perf_counter() + args.seconds
    device = torch.device(args.device)
    wanted = points(args)
    names = args.peers or (GRID_PEERS if args.settings == "grid" else list(PEERS))
    earlier = {tuple(row[k] for k in KEY) for row in args.earlier_rows if row["what"] == "mlstm"}

    compiled = [name for name in names if PEERS[name].triton]
    if args.workers and compiled and device.type == "cuda":
        backward = PASSES[1] in args.passes
        tasks: list[dict] = []
        for name in compiled:
            possible = [tuple(vars(p).values()) for p in wanted if refusal(name, p) is None]
            tasks += triton_warmup.tasks(name, possible, backward, args.dtype)
        yield triton_warmup.warm(tasks, args.workers, min(args.warmup_seconds, args.seconds / 2))
    calls, absent = _load(names, device)
    gc.freeze()  # the peers' imports would add a third of a second to each row's collection
    yield from absent
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    if "flash_xlstm" in calls and device.type == "cuda":
        yield from _host_rows(calls["flash_xlstm"], device)

    for point, pass_name, name in itertools.product(wanted, args.passes, calls):
        row = _row(name, pass_name, point, args.dtype)
        if tuple(row[k] for k in KEY) in earlier:
            continue
        if time.perf_counter() > deadline:
            yield {"what": "stopped", "error": f"{args.seconds:.0f} s were over"}
            return
        yield from measured(row, functools.partial(_measure, row, calls[name], point, rates, args), device)


def summarize(rows: list[dict]) -> list[dict]:
    """Every peer's time and our speedup over it (:func:`run.summarize_speedups`), with our share of the floor. Then
    whether we are faster than TFLA and simple_gla everywhere, and twice as fast as TFLA in the median."""
    lines = summarize_speedups(rows, "mlstm", KEY, "share_of_floor")
    for line in [x for x in lines if x.get("speedup_over") in ("tfla", "simple_gla")]:
        claims = {"ahead everywhere": line["least"] > 1.0}
        if line["speedup_over"] == "tfla":
            claims["twice as quick in the median"] = line["median"] >= 2.0
        for claim, holds in claims.items():
            over, settings = line["speedup_over"], line["settings"]
            lines.append({"pass": line["pass"], "claim": f"{claim}, over {over}", "settings": settings, "holds": holds})
    return lines
