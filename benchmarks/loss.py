"""Subject loss: a language model's loss from hidden states and the head's weight, forward and backward, beside peers.

`time_ms` is of one loss and both its gradients; `peak_gib` is what that allocates at its peak beyond the inputs,
gradients included. `floor_ms` is the operations of the three products (the logits, and both gradients) at the rate of
a large product that the same run measured; peer `products` is these products alone, each of all tokens at once. The
errors are how far the loss and the gradients are, by their norms, from those of float32 products and logits.

Peers: `logits`, a linear layer, `ops.soft_cap` and torch's cross entropy in float32; `torch`, the same of torch's
functions; `liger`, LigerFusedLinearCrossEntropyLoss, and `liger_float32`, which sums the weight's gradient in float32;
`cce_exact`, cut-cross-entropy without its filter; `torch_chunked`, torch.nn.functional.linear_cross_entropy, which has
no soft cap.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_xlstm import ops, reference
from run import describe, device_rates, measured, median_time_ms, peak_memory_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ours(cap: float | None) -> Loss:
    return functools.partial(ops.linear_cross_entropy, soft_cap=cap)


def _logits(cap: float | None) -> Loss:
    return lambda h, w, y: F.cross_entropy(ops.soft_cap((h @ w.T).float(), cap), y)


def _torch(cap: float | None) -> Loss:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = (h @ w.T).float()
        return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), y)

    return loss


def _liger(cap: float | None, accum_dtype: torch.dtype | None = None) -> Loss:
    make = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    loss = make(softcap=cap, accum_dtype=accum_dtype)
    return lambda h, w, y: loss(w, h, y)


def _cce_exact(cap: float | None) -> Loss:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return functools.partial(loss, softcap=cap, filter_eps=None)


def _torch_chunked(cap: float | None) -> Loss:
    if cap is not None:
        raise ValueError("it has no soft cap")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)


PEERS: dict[str, Callable[[float | None], Loss]] = {
    "flash_xlstm": _ours,
    "logits": _logits,
    "torch": _torch,
    "liger": _liger,
    "liger_float32": functools.partial(_liger, accum_dtype=torch.float32),
    "cce_exact": _cce_exact,
    "torch_chunked": _torch_chunked,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384] if cuda else [512])
    parser.add_argument("--dim", type=int, default=2048 if cuda else 64)
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[50304] if cuda else [1000])
    parser.add_argument("--soft-caps", nargs="+", type=float, default=[30.0, 0.0], help="0: none")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seconds-each", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")


def _inputs(tokens: int, vocabulary: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, args.dim, device=args.device).to(DTYPES[args.dtype])
    weight = (2 * torch.randn(vocabulary, args.dim, device=args.device) / args.dim**0.5).to(DTYPES[args.dtype])
    labels = torch.randint(vocabulary, (tokens,), device=args.device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _exact(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> list[Tensor]:
    """Loss and gradients in float32, of 512 tokens at a time."""
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    total = torch.zeros((), device=hidden.device)
    for part in range(0, len(labels), 512):
        some = slice(part, part + 512)
        loss = reference.linear_cross_entropy(wide[0][some], wide[1], labels[some], soft_cap=cap, reduction="sum")
        (loss / len(labels)).backward()
        total += loss.detach() / len(labels)
    return [total, *(t.grad for t in wide if t.grad is not None)]


def _off(value: Tensor, exact: Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def _measure(row: dict, cap: float | None, rates: dict, args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    hidden, weight, labels = _inputs(row["tokens"], row["vocabulary"], args)
    row["floor_ms"] = 6 * row["tokens"] * args.dim * row["vocabulary"] / rates["matmul_tflops"] / 1e9
    if row["peer"] == "products":
        dlogits = torch.randn(row["tokens"], row["vocabulary"], device=device).to(hidden.dtype)
        with torch.no_grad():
            products = lambda: (hidden @ weight.T, dlogits @ weight, dlogits.T @ hidden)  # noqa: E731
            row["time_ms"] = median_time_ms(products, device, budget_s=args.seconds_each)
        return
    form = PEERS[row["peer"]](cap)

    def run() -> list[Tensor]:
        loss = form(hidden, weight, labels)
        return [loss, *torch.autograd.grad(loss, (hidden, weight))]

    row["time_ms"] = median_time_ms(run, device, budget_s=args.seconds_each)
    if device.type == "cuda":
        row["peak_gib"] = peak_memory_bytes(run) / 2**30
    found = [t.detach() for t in run()]
    exact = _exact(hidden, weight, labels, cap)
    for name, value, right in zip(("loss", "dhidden", "dweight"), found, exact, strict=True):
        row[f"{name}_error"] = _off(value, right)


def run(args: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(args.device)
    rates = device_rates(device)
    yield {"what": "rates", **rates}
    settings = itertools.product(args.tokens, args.vocabulary, args.soft_caps)
    for tokens, vocabulary, cap in settings:
        for peer in [*args.peers, "products"]:
            row = {"what": "loss", "peer": peer, "tokens": tokens, "dim": args.dim, "vocabulary": vocabulary}
            row |= {"soft_cap": cap or None, "dtype": args.dtype}
            if peer != "products":
                try:
                    PEERS[peer](cap or None)
                except Exception as error:
                    yield {**row, "what": "absent", "error": describe(error)}
                    continue
            yield from measured(row, functools.partial(_measure, row, cap or None, rates, args), device)
