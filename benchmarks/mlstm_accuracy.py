"""Subject mlstm_accuracy: relative errors (Frobenius norms) of h and of the gradients against float64, without a norm
after h.

All get the same inputs, rounded to the dtype. The reference is the chunkwise form in float64 on the same device.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flash_xlstm.reference import mlstm_chunkwise
from peers import DTYPES, PEERS, Point
from run import describe, free_memory, measured

ERRORS = ("error_h", "error_dq", "error_dk", "error_dv", "error_di", "error_df")
POINTS = {"4096": Point(1, 4096, 2, 256, 512), "131072": Point(1, 131072, 1, 256, 512)}
SMALL = Point(1, 256, 2, 32, 64)
# i and f, made from standard normal ones
GATES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "i normal(-3), f normal(3)": lambda i, f: (i - 3.0, f + 3.0),
    "i normal(0), f normal(3)": lambda i, f: (i, f + 3.0),
    "spread to caps of 15": lambda i, f: (15.0 * torch.tanh(1.5 * i), 15.0 * torch.tanh(1.5 * f)),
}
EXPONENTIAL = ("flash_xlstm", "tfla", "tfla_limit_chunk", "plain_pytorch")  # the peers that compute the same function
KEY = ("peer", "gates", "seq", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seq", nargs="+", choices=[*POINTS, "small"], default=list(POINTS))
    parser.add_argument("--peers", nargs="+", choices=EXPONENTIAL, default=EXPONENTIAL[:3])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def _inputs(point: Point, gates: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v, i, f, dh, (batch, seq, heads, ...)."""
    torch.manual_seed(1)
    lead = (point.batch, point.seq, point.heads)
    q, k, v, dh = (torch.randn(*lead, d, device=device).to(dtype) for d in (point.dqk, point.dqk, point.dv, point.dv))
    i, f = GATES[gates](torch.randn(lead, device=device), torch.randn(lead, device=device))
    return [q, k, v, i, f, dh]


def _results(call: Callable, tensors: list[Tensor], heads_first: bool = False) -> list[Tensor]:
    """h, dq, dk, dv, di, df, seq first."""
    turn = (lambda t: t.transpose(1, 2).contiguous()) if heads_first else (lambda t: t)
    *inputs, dh = (turn(t) for t in tensors)
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    h = call(*leaves)
    gradients = torch.autograd.grad(h, leaves, dh.to(h.dtype))
    return [turn(t.detach()) for t in (h, *gradients)]


def _error(found: Tensor, exact: Tensor) -> float:
    return (torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact)).item()


def _measure(row: dict, call: Callable, tensors: list[Tensor], exact: list[Tensor]) -> None:
    found = _results(call, tensors, PEERS[row["peer"]].layout == "heads_first")
    row.update({n: _error(t, e) for n, t, e in zip(ERRORS, found, exact, strict=True)})


def run(args: argparse.Namespace) -> Iterator[dict]:
    deadline = time.perf_counter() + args.seconds
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    earlier = {tuple(row.get(k) for k in KEY) for row in args.earlier_rows}
    calls = {}
    for name in args.peers:
        try:
            if device.type != "cuda" and PEERS[name].triton:
                raise RuntimeError("needs a GPU")
            calls[name] = PEERS[name].load()
        except Exception as error:
            yield {"what": "absent", "peer": name, "error": describe(error)}

    for seq in args.seq:
        point = SMALL if seq == "small" else POINTS[seq]
        for gates in GATES:
            rows = [
                {"what": "mlstm_accuracy", "peer": name, "gates": gates, **vars(point), "dtype": args.dtype}
                for name in calls
            ]
            rows = [row for row in rows if tuple(row[k] for k in KEY) not in earlier]
            if not rows:
                continue
            if time.perf_counter() > deadline:
                yield {"what": "stopped", "error": f"{args.seconds:.0f} s were over"}
                return
            tensors = _inputs(point, gates, dtype, device)
            try:
                chunk = 64 if point.seq <= 4096 else 256
                exact = _results(
                    lambda *t, chunk=chunk: mlstm_chunkwise(*t, chunk_size=chunk), [t.double() for t in tensors]
                )
            except Exception as error:
                yield {"what": "no_reference", "gates": gates, **vars(point), "error": describe(error)}
                free_memory(device)
                continue
            free_memory(device)
            for row in rows:
                yield from measured(row, functools.partial(_measure, row, calls[row["peer"]], tensors, exact), device)
            del exact, tensors
