"""TiRex-2's cells on the CPU, as shipped and accelerated: `python benchmarks/tirex_cells.py [--out FILE]`.

A cell is PyPI's tirex-2 (with flashrnn and mlstm_kernels, installed by hand): width 512, 4 heads, its projections and
norm included. As shipped on a CPU, the sLSTM is flashrnn's "vanilla" and the mLSTM mlstm_kernels' chunkwise native one.
Ours is `flash_xlstm.integrations.accelerate`. Rows "cell" time the whole cell without gradients, rows "training" its
forward and backward, rows "op" the call that our op replaces. `op_in_place_ms` is the cell's own forward around our op,
and `products_ms` a bare chain of the products of the cell's weights, into memory that is there. Weights are random.
Calls take turns in random order, the second of two calls is timed, and `ratio` is the median of the shipped times over
that of ours. `difference` is the outputs' relative difference, with gradients that of the input's gradient.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tirex2.model.component import flashrnn_slstm, mlstm_block
from tirex2.model.component.xlstm_mixed_config import xLSTMMixedConfig

import run as runner
from flash_xlstm.integrations import accelerate

Calls = dict[str, Callable[[], torch.Tensor]]
NAMES = ("tirex", "flash_xlstm", "op_in_place")


def cells(width: int) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """Of each kind: as shipped, and accelerated."""
    config = xLSTMMixedConfig(embedding_dim=width, num_heads=4, num_blocks=12, vocab_size=0, num_slstm_heads=4)
    slstm = flashrnn_slstm.init_cell(config, block_idx=1, num_blocks=12, device="cpu")
    torch.nn.init.normal_(slstm._recurrent_kernel_, std=slstm.config.head_dim**-0.5)
    mlstm = mlstm_block.init_cell(config, device="cpu")
    torch.nn.init.normal_(mlstm.igate_preact.weight, std=width**-0.5)
    torch.nn.init.normal_(mlstm.fgate_preact.weight, std=width**-0.5)
    pairs = {"slstm": (slstm, copy.deepcopy(slstm)), "mlstm": (mlstm, copy.deepcopy(mlstm))}
    for _, ours in pairs.values():
        accelerate(ours)
    return pairs


def op_calls(name: str, pair: tuple[torch.nn.Module, torch.nn.Module], batch: int, patches: int) -> Calls:
    """The calls that our op replaces, on random inputs."""
    config = pair[0].config
    if name == "slstm":
        Wx = torch.randn(batch, patches, 4, config.num_heads, config.head_dim)
        calls = [functools.partial(lambda cell, Wx: cell.recurrence(Wx)[0][0], cell, Wx) for cell in pair]
    else:
        shape, heads = (batch, config.num_heads, patches), config.num_heads
        q, k, v = (torch.randn(*shape, dim // heads) for dim in (pair[0].qk_dim, pair[0].qk_dim, pair[0].v_dim))
        gates = torch.randn(shape), torch.randn(shape) + 3.0
        calls = [functools.partial(cell.mlstm_backend, q=q, k=k, v=v, i=gates[0], f=gates[1]) for cell in pair]
    return dict(zip(("tirex", "flash_xlstm"), calls, strict=True))


def cell_calls(pair: tuple[torch.nn.Module, torch.nn.Module], x: torch.Tensor) -> Calls:
    shipped, ours = pair
    own = functools.partial(type(ours).forward, ours)
    return {name: functools.partial(call, x) for name, call in zip(NAMES, (shipped, ours, own), strict=True)}


def training_calls(pair: tuple[torch.nn.Module, torch.nn.Module], x: torch.Tensor) -> Calls:
    """Forward and backward; they return the input's gradient."""
    x, dy = x.clone().requires_grad_(), torch.randn_like(x)

    def train(forward: Callable) -> torch.Tensor:
        x.grad = None
        for cell in pair:
            cell.zero_grad()
        with torch.enable_grad():
            forward().backward(dy)
        assert x.grad is not None
        return x.grad

    return {name: functools.partial(train, call) for name, call in cell_calls(pair, x).items()}


def products(name: str, cell: torch.nn.Module, x: torch.Tensor) -> Callable:
    """All products of the cell's weights, which the op's own do not count among."""
    rows = x.flatten(0, 1)
    if name == "slstm":
        heads = rows.unflatten(1, (cell.config.num_heads, -1)).transpose(0, 1)
        weights = [gate.weight.mT for gate in (cell.fgate, cell.igate, cell.zgate, cell.ogate)]
        outs = [torch.empty(*heads.shape[:2], w.shape[2]) for w in weights]
        return lambda: [torch.bmm(heads, w, out=out) for w, out in zip(weights, outs, strict=True)]
    names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact", "out_proj")
    weights = [getattr(cell, name).weight.t() for name in names]
    outs = [torch.empty(len(rows), w.shape[1]) for w in weights]
    return lambda: [torch.mm(rows, w, out=out) for w, out in zip(weights, outs, strict=True)]


def measure(calls: Calls, seconds: float) -> dict:
    times: dict[str, list[float]] = {name: [] for name in calls}
    want, got = calls["tirex"](), calls["flash_xlstm"]()
    difference = float((got - want).norm() / want.norm())
    order, deadline = list(calls), time.perf_counter() + seconds
    while len(times["tirex"]) < 5 or time.perf_counter() < deadline:
        random.shuffle(order)
        for name in order:
            calls[name]()  # or the time would depend on the memory that the call before left
            begin = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - begin) * 1e3)
    medians = {f"{name}_ms": statistics.median(taken) for name, taken in times.items()}
    ratio = medians["tirex_ms"] / medians["flash_xlstm_ms"]
    return {**medians, "ratio": ratio, "difference": difference, "calls_each": len(times["tirex"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--patches", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    document = {"subject": "tirex", "environment": runner.environment(), "results": []}
    document["environment"]["tirex-2"] = importlib.metadata.version("tirex-2")
    rows = document["results"]
    with torch.no_grad():
        for name, pair in cells(args.width).items():
            for batch in args.batches:
                x = torch.randn(batch, args.patches, args.width)
                bare = {"products": products(name, pair[0], x)}
                parts = {
                    "cell": cell_calls(pair, x) | bare,
                    "op": op_calls(name, pair, batch, args.patches),
                    "training": training_calls(pair, x),
                }
                for part, calls in parts.items():
                    row = {"what": name, "part": part, "batch": batch, "patches": args.patches, "width": args.width}
                    rows.append({**row, "threads": args.threads, **measure(calls, args.seconds)})
    runner.print_table(rows)
    if args.out is not None:
        runner.write_json(args.out, document)


if __name__ == "__main__":
    main()
