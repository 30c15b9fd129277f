"""Subject step: one token of the mLSTM for a batch, in a CUDA graph, beside mlstm_kernels' Triton step.

`gb_per_s` counts the state read and written once, and q, k, v, h. `share_of_copy` divides it by the copy bandwidth of
the same run (row `rates`), and `floor_us` is the time of as many bytes at that bandwidth. The calls of a graph use so
many states that no cache holds them. A CPU's caches may hold its state, so that a large copy's bandwidth is no bound:
there are neither share nor floor then.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable, Iterator

import torch

from graphs import copies_beyond_cache, time_in_graph_ms
from run import describe, device_rates, free_memory

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256, 1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dqk", type=int, default=256)
    parser.add_argument("--dv", type=int, default=512)
    parser.add_argument("--state-dtypes", nargs="+", choices=STATE_DTYPES, default=["float32"])
    parser.add_argument("--peers", nargs="+", choices=("flash_xlstm", "triton"), default=["flash_xlstm", "triton"])
    parser.add_argument("--seconds-each", type=float, default=0.3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _ours() -> Callable:
    return importlib.import_module("flash_xlstm.ops").mlstm_step


def _triton() -> Callable:
    # Its state layout has m (batch, heads, 1). It works in place where the new state is the old one's memory.
    step = importlib.import_module("mlstm_kernels.torch").get_mlstm_step_kernel("triton")

    def call(q, k, v, i, f, state):
        c, n, m = state
        return step(q, k, v, i[..., None], f[..., None], c, n, m[..., None], dtype_state=c.dtype)

    return call


PEERS = {"flash_xlstm": _ours, "triton": _triton}


def _measure(row: dict, step: Callable, rates: dict, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    batch, heads, dqk, dv, state_dtype = (row[k] for k in ("batch", "heads", "dqk", "dv", "state_dtype"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    new = lambda *shape, dtype=dtype: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    state_bytes = batch * heads * (dqk * dv * STATE_DTYPES[state_dtype].itemsize + dqk * 4 + 4)
    moved = 2 * state_bytes + batch * heads * 2 * (dqk + dv) * dtype.itemsize
    calls: list[Callable[[], object]] = []
    copies = copies_beyond_cache(state_bytes, device)
    options = {}
    if row["peer"] == "flash_xlstm":
        options["settled_state"] = row["settled_state"] = copies > 2  # its last step has ended
    for _ in range(copies):
        given = [new(batch, heads, d) for d in (dqk, dqk, dv)]
        given += [new(batch, heads, dtype=torch.float32), new(batch, heads, dtype=torch.float32) + 3.0]
        state = (
            torch.zeros(batch, heads, dqk, dv, device=device, dtype=STATE_DTYPES[state_dtype]),
            torch.zeros(batch, heads, dqk, device=device),
            torch.zeros(batch, heads, device=device),
        )
        calls.append(lambda given=given, state=state: step(*given, state, **options))
    with torch.no_grad():
        time_ms = time_in_graph_ms(calls, device, args.seconds_each)
    row["time_us"] = time_ms * 1e3
    row["gb_per_s"] = moved / time_ms / 1e6
    if device.type == "cuda":
        row["floor_us"] = moved / rates["copy_gb_per_s"] / 1e3
        row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    for name, state_dtype, batch in itertools.product(args.peers, args.state_dtypes, args.batches):
        shape = {"batch": batch, "heads": args.heads, "dqk": args.dqk, "dv": args.dv, "state_dtype": state_dtype}
        row = {"what": "step", "peer": name, **shape}
        try:
            _measure(row, PEERS[name](), rates, args)
        except Exception as error:
            row["error"] = describe(error)
        free_memory(device)
        yield row
