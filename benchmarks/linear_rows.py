"""Subject linear_rows: products of few rows with the weights of the 7B model, beside cuBLAS (torch's linear).

`gb_per_s` counts the weight read once. `share_of_copy` divides it by the copy bandwidth of the same run (read plus
written). Every call of a graph reads a weight of its own, so that no cache holds it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from flash_xlstm import ops
from graphs import copies_beyond_cache, time_in_graph_ms
from run import describe, device_rates, free_memory, pair

# in -> out: q, k, v and output gate together; both gates; output; up and gate, apart and together; down; head.
SHAPES = ((4096, 12288), (4096, 16), (4096, 4096), (4096, 10944), (4096, 21888), (10944, 4096), (4096, 50304))
PEERS: dict[str, Callable] = {
    "flash_xlstm": functools.partial(ops.linear_rows, constant_weights=True),  # as the model calls it
    "torch": F.linear,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=pair, default=SHAPES, help="in x out, as 4096x10944")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds-each", type=float, default=0.2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _measure(row: dict, form: Callable, rates: dict, args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    size = row["in"] * row["out"] * dtype.itemsize
    calls = []
    for _ in range(copies_beyond_cache(size, device)):
        x = torch.randn(row["rows"], row["in"], device=device).to(dtype)
        weight = torch.randn(row["out"], row["in"], device=device, dtype=dtype)
        calls.append(lambda x=x, weight=weight: form(x, weight))
    with torch.no_grad():
        time_ms = time_in_graph_ms(calls, device, args.seconds_each)
    row["time_us"] = time_ms * 1e3
    row["gb_per_s"] = size / time_ms / 1e6
    row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    for (size_in, size_out), rows, peer in itertools.product(args.shapes, args.rows, PEERS):
        row = {"what": "linear_rows", "peer": peer, "rows": rows, "in": size_in, "out": size_out, "dtype": args.dtype}
        try:
            _measure(row, PEERS[peer], rates, args)
        except Exception as error:
            row["error"] = describe(error)
        free_memory(device)
        yield row
