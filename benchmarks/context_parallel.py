"""One sequence over ranks, beside the same on one GPU: forward and backward of the mLSTM op alone.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py --seq 131072 --out cp.json

`time_ms` is of one forward and backward; over ranks it is that of the slowest. `peer` is `one` (the whole sequence on
one GPU), `ranks` (a piece each), or a part of what comes on top of a rank's own mLSTM: `state` (ops.mlstm_state),
`initial_backward` (its share of the backward) and `exchange` (an all-gather and a reduce-scatter of the states).
`error` is how far h and the gradients over ranks are, by their norms, from those of one GPU. On the CPU, with gloo, it
runs too, for a test of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import distributed as dist

from flash_xlstm import build_info, ops
from flash_xlstm.distributed import context
from flash_xlstm.ops.mlstm import mlstm_initial_backward


def time_ms(run, device: torch.device, seconds: float) -> float:
    """The median time of a run in which all ranks start together; of the slowest rank."""
    times: list[float] = []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    end = torch.zeros((), device=device)
    begin = time.perf_counter()
    for attempt in range(1000):
        dist.barrier()
        wait()
        start = time.perf_counter()
        run()
        wait()
        took = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if attempt >= 3:  # the first allocate, and load kernels
            times.append(took.item() * 1e3)
        end.fill_(time.perf_counter() - begin > seconds and len(times) >= 5)
        dist.broadcast(end, 0)
        if end:
            break
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dqk", type=int, default=256)
    parser.add_argument("--dv", type=int, default=512)
    parser.add_argument("--seconds-each", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    dtype = torch.bfloat16

    generator = torch.Generator(device).manual_seed(0)  # the same whole sequence on every rank
    new = lambda *shape: torch.randn(1, args.seq, args.heads, *shape, device=device, generator=generator)  # noqa: E731
    whole = [new(d).to(dtype) for d in (args.dqk, args.dqk, args.dv)] + [new(), new() + 4]
    dh_whole = new(args.dv).to(dtype)
    first, stop = args.seq * rank // world, args.seq * (rank + 1) // world
    whole = [t.requires_grad_() for t in whole]
    piece = [t.detach()[:, first:stop].clone().requires_grad_() for t in whole]
    dh = dh_whole[:, first:stop].contiguous()
    options = {"gate_soft_cap": 15.0}

    def one():
        h = ops.mlstm(*whole, **options)
        return h, *torch.autograd.grad(h, whole, dh_whole)

    def ranks():
        h = context.mlstm(*piece, group=dist.group.WORLD, **options)
        return h, *torch.autograd.grad(h, piece, dh)

    def state():
        with torch.no_grad():
            return ops.mlstm_state(*piece[1:], **options)

    *zeros, _ = (torch.zeros_like(t) for t in state())
    rest = None, 1e-6, options["gate_soft_cap"], 0
    with torch.no_grad():
        _, kept, *_ = torch.ops.flash_xlstm.mlstm(*piece, *zeros, None, *rest, False)
    states = torch.cat([t.flatten() for t in state()])
    gathered = states.new_empty(world * states.numel())

    def initial_backward():
        with torch.no_grad():
            return mlstm_initial_backward(dh, None, None, *piece, *zeros, None, None, kept, *rest)

    def exchange():
        context._all_gather(gathered, states)
        context._reduce_scatter(states, gathered)

    base = {"seq": args.seq, "heads": args.heads, "dqk": args.dqk, "dv": args.dv, "dtype": "bfloat16", "world": world}
    names = ("h", "dq", "dk", "dv", "di", "df")
    rows = []
    expected = one()
    for name, got, want in zip(names, ranks(), expected, strict=True):
        want = want[:, first:stop].double()
        squares = torch.stack([(got.double() - want).square().sum(), want.square().sum()])
        dist.all_reduce(squares)
        rows.append({**base, "what": f"error of {name}", "error": (squares[0] / squares[1]).sqrt().item()})
    del expected
    for run in (one, ranks, state, initial_backward, exchange):
        rows.append({**base, "peer": run.__name__, "time_ms": time_ms(run, device, args.seconds_each)})
        if rank == 0:
            print(rows[-1], flush=True)
    if rank == 0:
        document = {"subject": "context_parallel", "environment": build_info(), "results": rows}
        document["environment"]["device"] = torch.cuda.get_device_name() if is_cuda else "cpu"
        if args.out:
            args.out.write_text(json.dumps(document, indent=1, default=str) + "\n")
        for row in rows:
            print(row)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
