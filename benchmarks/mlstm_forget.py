"""Subject mlstm_forget: forward, and forward + backward, with forget gates of several sizes.

With few heads the Hopper kernels skip states that the forget gates have erased, so that their time depends on the
gates. Gates f are standard normal around `forget_gate`. Around 3 a state is erased after about 12 chunks; around 20 all
of it is kept.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Iterator

import torch

from mlstm import PASSES, SHAPES, SMALL
from peers import DTYPES, PEERS, Point, tensors
from run import measured, median_time_ms, pair, timed_call

KEY = ("forget_gate", "pass", "batch", "seq", "heads", "dqk", "dv", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", choices=("headline", "small"), default="headline")
    parser.add_argument("--forget-gates", nargs="+", type=float, default=[3.0, 6.0, 20.0], help="means of f")
    parser.add_argument("--shapes", nargs="+", type=pair, default=SHAPES, help="headline: batch x seq, as 8x8192")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop measuring after this time")
    parser.add_argument("--seconds-each", type=float, default=0.2, help="time for the calls of one measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _measure(row: dict, point: Point, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    leaves = tensors("flash_xlstm", point, DTYPES[args.dtype], device, row["forget_gate"])
    function = timed_call(PEERS["flash_xlstm"].load(), leaves, row["pass"] != "forward")
    row["time_ms"] = median_time_ms(function, device, budget_s=args.seconds_each)


def run(args: argparse.Namespace) -> Iterator[dict]:
    deadline = time.perf_counter() + args.seconds
    points = SMALL if args.settings == "small" else [Point(*shape, 8, 256, 512) for shape in args.shapes]
    earlier = {tuple(row.get(k) for k in KEY) for row in args.earlier_rows}
    for forget_gate, point, pass_name in itertools.product(args.forget_gates, points, args.passes):
        row = {"what": "mlstm_forget", "forget_gate": forget_gate, "pass": pass_name, **vars(point)}
        row["dtype"] = args.dtype
        if tuple(row[k] for k in KEY) in earlier:
            continue
        if time.perf_counter() > deadline:
            yield {"what": "stopped", "error": f"{args.seconds:.0f} s were over"}
            return
        yield from measured(row, functools.partial(_measure, row, point, args), torch.device(args.device))
