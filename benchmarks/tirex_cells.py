"""TiRex-2's cells on the CPU, as shipped and with our ops: `python benchmarks/tirex_cells.py [--out FILE]`.

A cell is PyPI's tirex-2 (with flashrnn and mlstm_kernels, installed by hand): width 512, 4 heads, its projections and
norm included. As shipped on a CPU, the sLSTM is flashrnn's "vanilla" and the mLSTM mlstm_kernels' chunkwise native one.
Ours replaces that call and nothing else. Rows "cell" time the whole cell, rows "op" that call by itself. Weights are
random, without gradients. Calls take turns, `ratio` is the median of their times over ours, and `difference` is the
outputs' relative difference.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tirex2.model.component import flashrnn_slstm, mlstm_block
from tirex2.model.component.xlstm_mixed_config import xLSTMMixedConfig

import run as runner
from flash_xlstm import ops


def our_slstm(layer):
    """In place of the layer's call of flashrnn, whose R is (heads, in, gates, out). Weights are laid out once."""
    weights, bias = layer.get_R().permute(2, 0, 3, 1).contiguous(), layer.get_bias().permute(1, 0, 2).contiguous()

    def call(Wx, R, b, config, states=None):
        assert states is None
        return ops.slstm(Wx, weights, bias)[None], None

    return call


class OurBackend(torch.nn.Module):
    """In place of mLSTMBackend: tensors are (batch, heads, seq, dim)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, q, k, v, i, f):
        q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))
        return ops.mlstm(q, k, v, i, f, eps=self.eps).transpose(1, 2)


def cells(width: int) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    """Of each kind: as shipped, and with our op."""
    config = xLSTMMixedConfig(embedding_dim=width, num_heads=4, num_blocks=12, vocab_size=0, num_slstm_heads=4)
    slstm = flashrnn_slstm.init_cell(config, block_idx=1, num_blocks=12, device="cpu")
    torch.nn.init.normal_(slstm._recurrent_kernel_, std=slstm.config.head_dim**-0.5)
    mlstm = mlstm_block.init_cell(config, device="cpu")
    our_s, our_m = copy.deepcopy(slstm), copy.deepcopy(mlstm)
    our_s.slstm_flashrnn = our_slstm(our_s)
    our_m.mlstm_backend = OurBackend(config.eps)
    return {"slstm": (slstm, our_s), "mlstm": (mlstm, our_m)}


def op_calls(name: str, pair: tuple[torch.nn.Module, torch.nn.Module], batch: int, patches: int) -> list[Callable]:
    """The calls that ours replaces, on random inputs."""
    config = pair[0].config
    if name == "slstm":
        Wx = torch.randn(batch, patches, 4, config.num_heads, config.head_dim)
        return [functools.partial(lambda cell, Wx: cell.recurrence(Wx)[0][0], cell, Wx) for cell in pair]
    shape = (batch, config.num_heads, patches)
    q, k, v = (torch.randn(*shape, dim // config.num_heads) for dim in (pair[0].qk_dim, pair[0].qk_dim, pair[0].v_dim))
    gates = torch.randn(shape), torch.randn(shape) + 3.0
    return [functools.partial(cell.mlstm_backend, q=q, k=k, v=v, i=gates[0], f=gates[1]) for cell in pair]


def measure(theirs: Callable, ours: Callable, seconds: float) -> dict:
    times: tuple[list[float], list[float]] = ([], [])
    want, got = theirs(), ours()
    deadline = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < deadline:
        for cell, taken in zip((theirs, ours), times, strict=True):
            begin = time.perf_counter()
            cell()
            taken.append((time.perf_counter() - begin) * 1e3)
    return {
        "tirex_ms": statistics.median(times[0]),
        "flash_xlstm_ms": statistics.median(times[1]),
        "ratio": statistics.median(t / o for t, o in zip(*times, strict=True)),
        "difference": float((got - want).norm() / want.norm()),
        "calls_each": len(times[0]),
    }


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
                whole = [functools.partial(cell, x) for cell in pair]
                for part, calls in (("cell", whole), ("op", op_calls(name, pair, batch, args.patches))):
                    row = {"what": name, "part": part, "batch": batch, "patches": args.patches, "width": args.width}
                    rows.append({**row, "threads": args.threads, **measure(*calls, args.seconds)})
    runner.print_table(rows)
    if args.out is not None:
        runner.write_json(args.out, document)


if __name__ == "__main__":
    main()
