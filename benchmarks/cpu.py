"""Subject cpu: the sLSTM and the mLSTM on the CPU, with and without gradients, beside a bare chain of products.

The chain is torch.bmm on the op's own products, and nothing else: for the sLSTM one product with R a token, backward
another, and one for R's gradient over all tokens; for the mLSTM four products a chunk, and three times that with
gradients. `share` is the chain's time over ours. `vs_lstm` is the time of torch.nn.LSTM of the same dim over ours, with
heads as rows and its input's product included. Calls take turns, and a row's ratios are medians over the turns, so that
other load on the machine affects both sides. On one thread times are of the thread's own CPU clock.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from flash_xlstm import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLSTM = ("1x64x4x128", "16x64x4x64", "16x64x4x256", "128x64x4x128")
MLSTM = ("1x2048x4x128x128", "32x64x4x64x128", "1x1024x8x256x512")
CHUNK = 64  # of the CPU's mLSTM
PASSES = ("forward", "forward+backward")


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slstm", nargs="*", default=SLSTM, metavar="ROWSxTOKENSxHEADSxDIM")
    parser.add_argument("--mlstm", nargs="*", default=MLSTM, metavar="ROWSxTOKENSxHEADSxDQKxDV")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each row")


def turns(functions: dict[str, Callable[[], object]], threads: int, budget_s: float) -> dict[str, list[float]]:
    """Times in ms of calls that take turns: on one thread its CPU time, else the wall clock's."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(), function()
    deadline = time.perf_counter() + budget_s
    while len(next(iter(times.values()))) < 7 or time.perf_counter() < deadline:
        for name, function in functions.items():
            begin = clock()
            function()
            times[name].append((clock() - begin) * 1e3)
    return times


def _with_gradients(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], object]:
    for leaf in leaves:
        leaf.requires_grad_()
    dh = torch.randn_like(call().detach())
    return lambda: torch.autograd.grad(call(), leaves, dh)


def slstm_calls(rows: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, backward: bool) -> dict:
    new = functools.partial(torch.randn, dtype=dtype)
    x, R, b = new(rows, tokens, 4, heads, dim), new(4, heads, dim, dim) * dim**-0.5, new(4, heads, dim)
    lstm, lstm_x = torch.nn.LSTM(dim, dim, batch_first=True, dtype=dtype), new(rows * heads, tokens, dim)
    weights, h = new(heads, dim, 4 * dim), new(heads, rows, dim)
    dgates, all_dgates = new(heads, rows, 4 * dim), new(heads, 4 * dim, rows * tokens)
    back, all_h = new(heads, 4 * dim, dim), new(heads, rows * tokens, dim)
    out, dh, dR = torch.empty_like(dgates), torch.empty_like(h), torch.empty_like(back)

    def chain() -> None:
        with torch.no_grad():
            for _ in range(tokens):
                torch.bmm(h, weights, out=out)
            if backward:
                for _ in range(tokens):
                    torch.bmm(dgates, back, out=dh)
                torch.bmm(all_dgates, all_h, out=dR)

    ours, peer = functools.partial(ops.slstm, x, R, b), lambda: lstm(lstm_x)[0]
    if backward:
        return {
            "flash_xlstm": _with_gradients(ours, [x, R, b]),
            "chain": chain,
            "lstm": _with_gradients(peer, [lstm_x, *lstm.parameters()]),
        }
    return {"flash_xlstm": torch.no_grad()(ours), "chain": chain, "lstm": torch.no_grad()(peer)}


def mlstm_calls(rows: int, tokens: int, heads: int, dqk: int, dv: int, dtype: torch.dtype, backward: bool) -> dict:
    new = functools.partial(torch.randn, dtype=dtype)
    shape = (rows, tokens, heads)
    leaves = [new(*shape, dqk), new(*shape, dqk), new(*shape, dv), new(*shape), new(*shape) + 3.0]
    items = rows * heads * (tokens // CHUNK)
    q, k, v, w = (new(items, CHUNK, d) for d in (dqk, dqk, dv, CHUNK))
    c = new(items, dqk, dv)
    out_w, out_v, out_c = torch.empty_like(w), torch.empty_like(v), torch.empty_like(c)

    def chain() -> None:
        with torch.no_grad():
            for _ in range(3 if backward else 1):
                torch.bmm(q, k.transpose(1, 2), out=out_w)
                torch.bmm(w, v, out=out_v)
                torch.bmm(q, c, out=out_v)
                torch.bmm(k.transpose(1, 2), v, out=out_c)

    ours = functools.partial(ops.mlstm, *leaves)
    return {"flash_xlstm": _with_gradients(ours, leaves) if backward else torch.no_grad()(ours), "chain": chain}


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(times[name], times["flash_xlstm"], strict=True))


def run(args: argparse.Namespace) -> Iterator[dict]:
    before = torch.get_num_threads()
    for op, calls, shapes in (("slstm", slstm_calls, args.slstm), ("mlstm", mlstm_calls, args.mlstm)):
        for shape in shapes:
            for dtype in args.dtypes:
                for passes in args.passes:
                    for threads in dict.fromkeys(args.threads):
                        torch.manual_seed(0)
                        torch.set_num_threads(threads)
                        functions = calls(*sizes(shape), DTYPES[dtype], passes == PASSES[1])
                        times = turns(functions, threads, args.seconds)
                        row = {"what": op, "size": shape, "dtype": dtype, "pass": passes, "threads": threads}
                        row |= {f"{name}_ms": statistics.median(taken) for name, taken in times.items()}
                        row["share"] = _ratio(times, "chain")
                        if "lstm" in times:
                            row["vs_lstm"] = _ratio(times, "lstm")
                        yield {**row, "calls_each": len(times["chain"])}
    torch.set_num_threads(before)
