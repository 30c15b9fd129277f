"""Subject pointwise: the pointwise ops, forward and backward, beside the same in PyTorch's own functions.

`gb_per_s` counts every input read and every output written once (a backward reads the inputs again), `share_of_copy` is
that over the copy bandwidth of the same run, of 2 GiB. A launch is a large part of a small tensor's copy: op `copy` is
PyTorch's `copy_` of one (rows, columns) tensor, and `share_of_same_size_copy` compares with a `copy_` that moves as
many bytes as the op. The cache is overwritten before each call.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm import ops
from run import describe, device_rates, free_memory, median_time_ms

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = 8


def _torch_gated(h: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(gate) * (F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(-2) * weight)


# ours, PyTorch's, big inputs, big outputs; the inputs are (rows, columns), then a weight where there is one.
OPS: dict[str, tuple[Callable, Callable, int, int]] = {
    "rms_norm": (ops.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), 1, 1),
    "add_rms_norm": (
        lambda x, r, w: ops.rms_norm(x, w, 1e-6, r),
        lambda x, r, w: (F.rms_norm(x + r, w.shape, w, 1e-6), x + r),
        2,
        2,
    ),
    "gated_head_norm": (ops.gated_head_norm, _torch_gated, 2, 1),
    "swiglu": (ops.swiglu, lambda x, y: F.silu(x) * y, 2, 1),
    "soft_cap": (lambda x: ops.soft_cap(x, 15.0), lambda x: 15.0 * torch.tanh(x / 15.0), 1, 1),
}
WEIGHTED = ("rms_norm", "add_rms_norm", "gated_head_norm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--columns", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds-each", type=float, default=0.2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _inputs(op: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    inputs = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(OPS[op][2])]
    if op == "gated_head_norm":
        inputs[0] = inputs[0].view(rows, HEADS, columns // HEADS)
    return inputs + ([torch.ones(columns, device=device, dtype=dtype)] if op in WEIGHTED else [])


def _copy_gb_per_s(rows: int, columns: int, args: argparse.Namespace) -> float:
    source = torch.randn(rows, columns, device=args.device).to(DTYPES[args.dtype])
    target = torch.empty_like(source)
    time_ms = median_time_ms(lambda: target.copy_(source), source.device, budget_s=args.seconds_each)
    return 2 * source.nbytes / time_ms / 1e6


def _measure_copy(row: dict, rates: dict, args: argparse.Namespace) -> None:
    row["gb_per_s"] = _copy_gb_per_s(row["rows"], row["columns"], args)
    row["time_us"] = 2e-3 * row["rows"] * row["columns"] * DTYPES[args.dtype].itemsize / row["gb_per_s"]
    row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]


def _measure(row: dict, form: Callable, rates: dict, args: argparse.Namespace, same_size: Callable) -> None:
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    inputs = _inputs(row["op"], row["rows"], row["columns"], dtype, device)
    _, _, read, written = OPS[row["op"]]
    if row["pass"] == "forward":
        with torch.no_grad():
            time_ms = median_time_ms(lambda: form(*inputs), device, budget_s=args.seconds_each)
        tensors = read + written
    else:
        leaves = [t.requires_grad_() for t in inputs]
        outputs = form(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [torch.randn_like(t) for t in outputs]
        time_ms = median_time_ms(
            lambda: torch.autograd.grad(outputs, leaves, given, retain_graph=True), device, budget_s=args.seconds_each
        )
        # The sum of add_rms_norm stands for both its inputs, and so does its gradient.
        tensors = 4 if row["op"] == "add_rms_norm" else written + 2 * read
    moved = tensors * row["rows"] * row["columns"] * dtype.itemsize
    row["time_us"] = time_ms * 1e3
    row["gb_per_s"] = moved / time_ms / 1e6
    row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]
    if row["peer"] == "flash_xlstm":
        row["share_of_same_size_copy"] = row["gb_per_s"] / same_size((row["rows"] * tensors + 1) // 2, row["columns"])


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    same_size = functools.cache(functools.partial(_copy_gb_per_s, args=args))
    for rows, columns in itertools.product(args.rows, args.columns):
        row = {"what": "pointwise", "op": "copy", "pass": "forward", "peer": "torch", "rows": rows, "columns": columns}
        row["dtype"] = args.dtype
        try:
            _measure_copy(row, rates, args)
        except Exception as error:
            row["error"] = describe(error)
        free_memory(device)
        yield row
    passes = ("forward", "backward")
    for op, rows, columns, name, peer in itertools.product(
        args.ops, args.rows, args.columns, passes, ("flash_xlstm", "torch")
    ):
        row = {"what": "pointwise", "op": op, "pass": name, "peer": peer, "rows": rows, "columns": columns}
        row["dtype"] = args.dtype
        try:
            _measure(row, OPS[op][peer == "torch"], rates, args, same_size)
        except Exception as error:
            row["error"] = describe(error)
        free_memory(device)
        yield row
