"""Subject pointwise: the pointwise ops and the causal convolution, forward and backward, beside PyTorch's functions.

`time_us` is the time of a single call after the cache is overwritten. It includes a launch and the write-back of tens
of MB in the cache. `gb_per_s` counts every input read and every output written once; a backward reads the inputs again.
`share_of_copy` divides it by the bandwidth of a copy of 2 GiB in the same run. A launch is a large part of a small
tensor's copy. Therefore op `copy` is PyTorch's `copy_` of one (rows, columns) tensor, and `share_of_same_size_copy`
compares with a `copy_` that moves as many bytes as the op. `chain_time_us` is the time of one of many calls in sequence
in a CUDA graph, as in a model, each with inputs and outputs of its own. `share_of_same_size_copy_in_chain` compares it
with a chain of such copies, or with a single copy where that is faster.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm import ops
from graphs import copies_beyond_cache, time_in_graph_ms
from run import describe, device_rates, free_memory, median_time_ms

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS, KERNEL = 8, 4


def _torch_gated(h: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return torch.sigmoid(gate) * (F.layer_norm(h, h.shape[-1:], eps=1e-6).flatten(-2) * weight)


def _torch_conv(x: Tensor, weight: Tensor) -> Tensor:
    behind = F.pad(x.transpose(1, 2), (KERNEL - 1, 0))
    return F.silu(F.conv1d(behind, weight[:, None], groups=x.shape[2])).transpose(1, 2)


# Ours, PyTorch's, big inputs, big outputs. Inputs are (rows, columns), then a weight if there is one. The convolution's
# rows are the tokens of one sequence.
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
    "causal_conv1d": (lambda x, w: ops.causal_conv1d(x, w, activation="silu"), _torch_conv, 1, 1),
}
_operators = torch.ops.flash_xlstm
# A function of the outputs' gradients, then the inputs, for a chain: a graph cannot contain autograd.
GRADIENTS: dict[str, Callable] = {
    "rms_norm": lambda dy, x, w: _operators.rms_norm_backward(dy, None, x, w, 1e-6, True, False),
    "add_rms_norm": lambda dy, dsum, x, w: _operators.rms_norm_backward(dy, dsum, x, w, 1e-6, True, False),
    "gated_head_norm": lambda dy, h, gate, w: _operators.gated_head_norm_backward(dy, h, gate, w, 1e-6, True),
    "swiglu": lambda dout, x, y: _operators.swiglu_backward(dout, x, y),
    "soft_cap": lambda dy, x: _operators.soft_cap_backward(dy, x, 15.0),
    "causal_conv1d": lambda dy, x, w: _operators.causal_conv1d_backward(dy, None, x, w, None, None, None, True),
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
    if op == "causal_conv1d":
        return [inputs[0][None], torch.full((columns, KERNEL), 1.0 / KERNEL, device=device, dtype=dtype)]
    return inputs + ([torch.ones(columns, device=device, dtype=dtype)] if op in WEIGHTED else [])


def _copy_gb_per_s(rows: int, columns: int, args: argparse.Namespace) -> float:
    source = torch.randn(rows, columns, device=args.device).to(DTYPES[args.dtype])
    target = torch.empty_like(source)
    time_ms = median_time_ms(lambda: target.copy_(source), source.device, budget_s=args.seconds_each)
    return 2 * source.nbytes / time_ms / 1e6


def _chain_ms(form: Callable, make: Callable[[], list[Tensor]], moved: int, args: argparse.Namespace) -> float:
    device = torch.device(args.device)
    sets = [make() for _ in range(max(3, copies_beyond_cache(moved, device)))]
    with torch.no_grad():
        return time_in_graph_ms([lambda s=s: form(*s) for s in sets], device, args.seconds_each)


def _copy_chain_gb_per_s(rows: int, columns: int, args: argparse.Namespace) -> float:
    def make() -> list[Tensor]:
        return [torch.randn(rows, columns, device=args.device).to(DTYPES[args.dtype])]

    moved = 2 * rows * columns * DTYPES[args.dtype].itemsize
    in_chain = moved / _chain_ms(torch.clone, make, moved, args) / 1e6
    # A copy of 500 MB is slower in a graph than by itself.
    return max(in_chain, _copy_gb_per_s(rows, columns, args))


def _measure_copy(row: dict, rates: dict, args: argparse.Namespace) -> None:
    row["gb_per_s"] = _copy_gb_per_s(row["rows"], row["columns"], args)
    row["time_us"] = 2e-3 * row["rows"] * row["columns"] * DTYPES[args.dtype].itemsize / row["gb_per_s"]
    row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]


def _measure(row: dict, form: Callable, rates: dict, args: argparse.Namespace, copies: Sequence[Callable]) -> None:
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
        # add_rms_norm's sum counts for both inputs, and so does its gradient.
        tensors = 4 if row["op"] == "add_rms_norm" else written + 2 * read
    moved = tensors * row["rows"] * row["columns"] * dtype.itemsize
    row["time_us"] = time_ms * 1e3
    row["gb_per_s"] = moved / time_ms / 1e6
    row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]
    if row["peer"] != "flash_xlstm":
        return
    same = (row["rows"] * tensors + 1) // 2, row["columns"]
    row["share_of_same_size_copy"] = row["gb_per_s"] / copies[0](*same)

    def make() -> list[Tensor]:
        new = _inputs(row["op"], row["rows"], row["columns"], dtype, device)
        if row["pass"] == "forward":
            return new
        # The gradient of add_rms_norm reads dy, dsum and the sum.
        return [torch.randn_like(t) for t in given] + (new[1:] if row["op"] == "add_rms_norm" else new)

    chain_ms = _chain_ms(form if row["pass"] == "forward" else GRADIENTS[row["op"]], make, moved, args)
    row["chain_time_us"] = chain_ms * 1e3
    row["share_of_same_size_copy_in_chain"] = moved / chain_ms / 1e6 / copies[1](*same)


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    copies = [functools.cache(functools.partial(form, args=args)) for form in (_copy_gb_per_s, _copy_chain_gb_per_s)]
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
            _measure(row, OPS[op][peer == "torch"], rates, args, copies)
        except Exception as error:
            row["error"] = describe(error)
        free_memory(device)
        yield row
