"""Subject cpu: every op and a model on the CPU, with and without gradients, beside others' plain forms.

The sLSTM and the mLSTM have a bare chain of products beside them.

The chain is torch.bmm on the op's own products, and nothing else: for the sLSTM one product with R a token, backward
another, and one for R's gradient over all tokens; for the mLSTM four products a chunk, and three times that with
gradients. `share` is the chain's time over ours. `vs_lstm` is the time of torch.nn.LSTM of the same dim over ours, with
heads as rows and its input's product included. Other peers, where they are installed: flashrnn's "vanilla" sLSTM (with
`--slow`, because it takes seconds), the mLSTM of transformers and of mlstm_kernels ("chunkwise--native_autograd"),
PyTorch's functions for the other ops, and transformers' xLSTM for the model. `vs_PEER` is their time over ours.

Calls take turns, and a row's ratios are medians over the turns, so that other load on the machine affects both sides.
On one thread times are of the thread's own CPU clock. `--quick` takes a few minutes: one size of each, one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import dropin
import pointwise
from flash_xlstm import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLSTM = ("1x64x4x128", "16x64x4x64", "16x64x4x256", "128x64x4x128")
MLSTM = ("1x2048x4x128x128", "32x64x4x64x128", "1x1024x8x256x512")
CHUNK = 64  # of the CPU's mLSTM
PASSES = ("forward", "forward+backward")
ROWS, COLUMNS, VOCABULARY, BATCH, HEADS, DIM = 1024, 512, 4096, 8, 4, 128  # of the other ops
OTHERS = (*pointwise.OPS, "linear_cross_entropy", "mlstm_step", "slstm_step", "causal_conv1d_step", "linear_rows")
Calls = dict[str, Callable[[], object]]


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slstm", nargs="*", default=SLSTM, metavar="ROWSxTOKENSxHEADSxDIM")
    parser.add_argument("--mlstm", nargs="*", default=MLSTM, metavar="ROWSxTOKENSxHEADSxDQKxDV")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--passes", nargs="+", default=PASSES, choices=PASSES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--others", nargs="*", default=OTHERS, choices=OTHERS, help="the other ops")
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument("--slow", action="store_true", help="flashrnn too")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each row")
    parser.add_argument("--quick", action="store_true", help="one size of each, one thread, a second a row")


def turns(functions: Calls, threads: int, budget_s: float) -> dict[str, list[float]]:
    """Times in ms of calls that take turns: on one thread its CPU time, else the wall clock's."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function(), function()
    deadline = time.perf_counter() + budget_s
    while len(next(iter(times.values()))) < 5 or time.perf_counter() < deadline:
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


def _installed(module: str) -> object | None:
    with contextlib.suppress(ImportError):
        return importlib.import_module(module)
    return None


def _transformers_kernel(name: str) -> Callable | None:
    """None also where the package xlstm is installed, which transformers then uses instead of kernels of its own."""
    return getattr(_installed("transformers.models.xlstm.modeling_xlstm"), name, None)


def slstm_calls(
    rows: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, backward: bool, slow: bool = False
) -> Calls:
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
    calls: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        "flash_xlstm": (ours, [x, R, b]),
        "lstm": (peer, [lstm_x, *lstm.parameters()]),
    }
    if slow and (flashrnn := _installed("flashrnn")):
        name = str(dtype).removeprefix("torch.")
        plain = functools.partial(flashrnn.flashrnn, x, R, b, function="slstm", backend="vanilla", dtype=name)
        calls["flashrnn"] = lambda: plain()[0][0], [x, R, b]
    return {"chain": chain} | {name: _passes(*call, backward) for name, call in calls.items()}


def _passes(call: Callable[[], torch.Tensor], leaves: list[torch.Tensor], backward: bool) -> Callable[[], object]:
    return _with_gradients(call, leaves) if backward else torch.no_grad()(call)


def mlstm_calls(rows: int, tokens: int, heads: int, dqk: int, dv: int, dtype: torch.dtype, backward: bool) -> Calls:
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

    calls = {"flash_xlstm": _passes(functools.partial(ops.mlstm, *leaves), leaves, backward), "chain": chain}
    peers: dict[str, Callable] = {}
    if native := _transformers_kernel("mlstm_chunkwise_native_autograd"):
        peers["transformers"] = native
    if (kernels := _installed("mlstm_kernels.torch")) and _installed("einops"):  # which it needs
        peers["mlstm_kernels"] = kernels.get_mlstm_kernel("chunkwise--native_autograd")
    for name, kernel in peers.items():
        theirs = [t.detach().transpose(1, 2).contiguous() for t in leaves]
        calls[name] = _passes(functools.partial(kernel, *theirs, chunk_size=CHUNK), theirs, backward)
    return calls


def _conv_token(state: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    taps = torch.cat([state, x[:, None]], 1)
    state.copy_(taps[:, 1:])
    return F.silu((taps * weight.T).sum(1))


def other_calls(op: str, dtype: torch.dtype, backward: bool) -> Calls | None:
    """None: the op has no gradients."""
    new = functools.partial(torch.randn, dtype=dtype)
    pair: tuple[Callable, Callable | None]
    if op in pointwise.OPS:
        pair, leaves = pointwise.OPS[op][:2], pointwise._inputs(op, ROWS, COLUMNS, dtype, torch.device("cpu"))
    elif op == "linear_cross_entropy":
        targets = torch.randint(VOCABULARY, (ROWS,))
        leaves = [new(ROWS, COLUMNS), new(VOCABULARY, COLUMNS) * COLUMNS**-0.5]
        pair = (
            lambda x, w: ops.linear_cross_entropy(x, w, targets),
            lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets),
        )
    elif backward:
        return None
    elif op == "linear_rows":
        pair, leaves = (ops.linear_rows, F.linear), [new(1, COLUMNS), new(4 * COLUMNS, COLUMNS)]
    elif op == "causal_conv1d_step":
        state = new(BATCH, pointwise.KERNEL - 1, COLUMNS)
        pair = (
            lambda x, w: ops.causal_conv1d_step(x, w, None, state, activation="silu"),
            lambda x, w: _conv_token(state, x, w),
        )
        leaves = [new(BATCH, COLUMNS), new(COLUMNS, pointwise.KERNEL)]
    elif op == "slstm_step":
        states = [torch.zeros(BATCH, HEADS, DIM) for _ in range(4)]
        pair = (lambda *given: ops.slstm_step(*given, tuple(states)), None)
        leaves = [new(BATCH, 4, HEADS, DIM), new(4, HEADS, DIM, DIM) * DIM**-0.5, new(4, HEADS, DIM)]
    else:
        states = [torch.zeros(BATCH, HEADS, *shape) for shape in ((DIM, DIM), (DIM,), ())]
        theirs = [states[0].clone(), states[1].clone(), states[2].clone()[..., None]]
        step = _transformers_kernel("mlstm_recurrent_step_native")

        def native(q, k, v, i, f):
            h, theirs[:] = step(q, k, v, i[..., None], f[..., None], *theirs)
            return h

        pair = (lambda *given: ops.mlstm_step(*given, tuple(states)), native if step else None)
        leaves = [*(new(BATCH, HEADS, DIM) for _ in range(3)), new(BATCH, HEADS), new(BATCH, HEADS) + 3.0]
    peer = "transformers" if op == "mlstm_step" else "pytorch"
    first = lambda form: lambda: y[0] if isinstance(y := form(*leaves), tuple) else y  # noqa: E731
    return {
        name: _passes(first(form), leaves, backward)
        for name, form in zip(("flash_xlstm", peer), pair, strict=True)
        if form
    }


def model_calls(backward: bool) -> Calls:
    """transformers' xLSTM as it is, and the same accelerated by flash_xlstm.integrations."""
    (theirs, ours), runs = dropin._pair("transformers", dropin.SIZES["small"], torch.device("cpu"))
    pairs = {"flash_xlstm": ours, "transformers": theirs}
    if backward:
        return {name: functools.partial(dropin._train, runs["sequence"], model) for name, model in pairs.items()}
    return {
        name: torch.no_grad()(functools.partial(runs["sequence"], model.requires_grad_(False)))
        for name, model in pairs.items()
    }


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(times[name], times["flash_xlstm"], strict=True))


def cases(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], Callable[[], Calls | None]]]:
    for op, calls, shapes in (("slstm", slstm_calls, args.slstm), ("mlstm", mlstm_calls, args.mlstm)):
        for shape, dtype, passes in itertools.product(shapes, args.dtypes, args.passes):
            options = {"slow": args.slow} if op == "slstm" else {}
            make = functools.partial(calls, *sizes(shape), DTYPES[dtype], passes == PASSES[1], **options)
            yield {"what": op, "size": shape, "dtype": dtype, "pass": passes}, make
    for op, dtype, passes in itertools.product(args.others, args.dtypes, args.passes):
        make = functools.partial(other_calls, op, DTYPES[dtype], passes == PASSES[1])
        yield {"what": op, "dtype": dtype, "pass": passes}, make
    if not args.no_model and _installed("transformers"):
        for passes in args.passes:
            make = functools.partial(model_calls, passes == PASSES[1])
            yield {"what": "model", "size": "small", "dtype": "float32", "pass": passes}, make


def run(args: argparse.Namespace) -> Iterator[dict]:
    if args.quick:
        args.slstm, args.mlstm, args.dtypes = args.slstm[1:2], args.mlstm[1:2], list(DTYPES)
        args.threads, args.seconds = [1], 1.0
    before = torch.get_num_threads()
    for row, make in cases(args):
        for threads in dict.fromkeys(args.threads):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            functions = make()
            if functions is None:
                continue
            times = turns(functions, threads, args.seconds)
            times_ms = {f"{name}_ms": statistics.median(taken) for name, taken in times.items()}
            ratios = {"share" if n == "chain" else f"vs_{n}": _ratio(times, n) for n in times if n != "flash_xlstm"}
            yield {**row, "threads": threads, **times_ms, **ratios, "calls_each": len(times["flash_xlstm"])}
    torch.set_num_threads(before)
