"""Subject cpu_vs_transformers: our ops beside the native kernels of transformers' xLSTM, on the CPU, in one run.

Our layout is (batch, seq, heads, dim), theirs (batch, heads, seq, dim). Calls alternate, so that other load on the
machine affects both. `ratio` is their median time over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers.models.xlstm import modeling_xlstm as peer

from flash_xlstm import ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128, help="dqk and dv")
    parser.add_argument("--forward-seq", type=int, default=2048)
    parser.add_argument("--backward-seq", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement")


def _compare(name: str, ours: Callable, theirs: Callable, seconds: float) -> dict:
    times: tuple[list[float], list[float]] = ([], [])
    for function in (ours, theirs):
        for _ in range(3):
            function()
    deadline = time.perf_counter() + seconds
    while len(times[0]) < 10 or time.perf_counter() < deadline:
        for function, out in ((ours, times[0]), (theirs, times[1])):
            begin = time.perf_counter()
            function()
            out.append((time.perf_counter() - begin) * 1e3)
    our_ms, their_ms = map(statistics.median, times)
    return {
        "what": name,
        "flash_xlstm_ms": our_ms,
        "transformers_ms": their_ms,
        "ratio": their_ms / our_ms,
        "calls_each": len(times[0]),
    }


def _inputs(args: argparse.Namespace, seq: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q, k, v = (new(1, seq, args.heads, args.dim) for _ in range(3))
    return [q, k, v, new(1, seq, args.heads), new(1, seq, args.heads) + 3.0]


def _heads_first(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.transpose(1, 2).contiguous() for t in tensors]


def _forward(args: argparse.Namespace) -> dict:
    ours = _inputs(args, args.forward_seq)
    theirs = _heads_first(ours)
    with torch.no_grad():
        return _compare(
            f"forward, {args.forward_seq} tokens",
            lambda: ops.mlstm(*ours),
            lambda: peer.mlstm_chunkwise_native_autograd(*theirs),
            args.seconds,
        )


def _forward_backward(args: argparse.Namespace) -> dict:
    tensors = _inputs(args, args.backward_seq)
    ours = [t.requires_grad_() for t in tensors]
    theirs = [t.detach().requires_grad_() for t in _heads_first(tensors)]
    dh = torch.randn_like(tensors[2])
    dh_theirs = dh.transpose(1, 2).contiguous()
    return _compare(
        f"forward+backward, {args.backward_seq} tokens",
        lambda: torch.autograd.grad(ops.mlstm(*ours), ours, dh),
        lambda: torch.autograd.grad(peer.mlstm_chunkwise_native_autograd(*theirs), theirs, dh_theirs),
        args.seconds,
    )


def _step(args: argparse.Namespace) -> dict:
    q, k, v, i, f = (t[:, 0].contiguous() for t in _inputs(args, 1))
    state = tuple(torch.zeros(1, args.heads, *shape) for shape in ((args.dim, args.dim), (args.dim,), ()))
    their_state = [state[0].clone(), state[1].clone(), state[2].clone()[..., None]]

    def theirs() -> None:
        _, their_state[:] = peer.mlstm_recurrent_step_native(q, k, v, i[..., None], f[..., None], *their_state)

    with torch.no_grad():
        return _compare("step", lambda: ops.mlstm_step(q, k, v, i, f, state), theirs, args.seconds)


def run(args: argparse.Namespace) -> list[dict]:
    if peer.external_xlstm:
        error = "it uses the installed xlstm package; uninstall that to measure the native kernels"
        return [{"what": "absent", "peer": "transformers", "error": error}]
    torch.set_num_threads(args.threads)
    shape = {"heads": args.heads, "dqk": args.dim, "dv": args.dim, "dtype": "float32", "threads": args.threads}
    return [{**measure(args), **shape} for measure in (_forward, _forward_backward, _step)]
