"""The CPU kernels give the same results with four threads and with one, in every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_xlstm import ops
from flash_xlstm.ops import linear


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def mlstm(lanes: tuple[int, int] = (2, 3), dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads = lanes
    q, k, v = (torch.randn(batch, 300, heads, dim).to(dtype).requires_grad_() for dim in (24, 24, 40))
    i, f = randn(batch, 300, heads), randn(batch, 300, heads)
    h, last = ops.mlstm(q, k, v, i, f + 2, return_final_state=True)
    return [h, *last, *torch.autograd.grad([h, *last], [q, k, v, i, f], [torch.ones_like(t) for t in (h, *last)])]


def mlstm_whole_lanes() -> list[Tensor]:  # two for each of four threads
    return mlstm((2, 4))


def mlstm_bfloat16() -> list[Tensor]:
    return [*mlstm((1, 3), torch.bfloat16), *mlstm((2, 4), torch.bfloat16)]


def mlstm_state() -> list[Tensor]:
    inputs = randn(2, 300, 3, 24), randn(2, 300, 3, 40), randn(2, 300, 3), randn(2, 300, 3)
    outputs = ops.mlstm_state(*inputs)
    return [*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])]


def mlstm_step() -> list[Tensor]:
    state = torch.randn(3, 4, 64, 96), torch.randn(3, 4, 64), torch.randn(3, 4)
    with torch.no_grad():
        q, k, v, i, f = randn(3, 4, 64), randn(3, 4, 64), randn(3, 4, 96), randn(3, 4), randn(3, 4)
        return [ops.mlstm_step(q, k, v, i, f, state)[0], *state]


def slstm(rows: int = 9, dim: int = 40, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (rows, 20, 4, 3, dim), (4, 3, dim, dim), (4, 3, dim)
    x, R, b = (randn(*shape).detach().to(dtype).requires_grad_() for shape in shapes)
    h = ops.slstm(x, R * 0.1, b)
    return [h, *torch.autograd.grad(h, [x, R, b], torch.ones_like(h))]


def slstm_blocks() -> list[Tensor]:  # several blocks of rows, on packed operands where the CPU has products of them
    return [*slstm(70, 64), *slstm(70, 40, torch.bfloat16), *slstm(5, 64, torch.bfloat16)]


def causal_conv1d() -> list[Tensor]:
    inputs = [randn(2, 200, 300), randn(300, 4), randn(300)]  # three tasks of the backward
    y = ops.causal_conv1d(*inputs, activation="silu")
    return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def pointwise() -> list[Tensor]:
    x, y, weight, h = randn(50, 512), randn(50, 512), randn(512), randn(50, 4, 128)
    outputs = [
        ops.rms_norm(x, weight),
        *ops.rms_norm(x, weight, 1e-6, y),
        ops.gated_head_norm(h, x, weight),
        ops.swiglu(x, y),
        ops.soft_cap(x, 3.0),
    ]
    return [*outputs, *torch.autograd.grad(outputs, [x, y, weight, h], [torch.ones_like(t) for t in outputs])]


def linear_rows() -> list[Tensor]:
    with torch.no_grad():
        return [ops.linear_rows(randn(2, 1000), randn(333, 1000), randn(333))]


def mm() -> list[Tensor]:
    with torch.no_grad():
        outs = []
        for rows in (100, 500):
            a, bs = torch.randn(rows, 600), [torch.randn(600, 90), torch.randn(300, 600).t()]
            outs += [torch.empty(rows, b.shape[1]) for b in bs]
            linear.mm(a, bs, outs[-2:])
        return outs if linear._TILES else []  # torch's own products need not agree


def linear_cross_entropy() -> list[Tensor]:
    hidden, weight, labels = randn(90, 32), randn(1000, 32), torch.randint(1000, (90,))
    loss = ops.linear_cross_entropy(hidden, weight, labels, soft_cap=5.0, label_smoothing=0.1)
    return [loss, *torch.autograd.grad(loss, [hidden, weight])]


@pytest.mark.parametrize(
    "run",
    [
        mlstm,
        mlstm_whole_lanes,
        mlstm_bfloat16,
        mlstm_state,
        mlstm_step,
        slstm,
        slstm_blocks,
        causal_conv1d,
        pointwise,
        linear_rows,
        mm,
        linear_cross_entropy,
    ],
    ids=lambda run: run.__name__,
)
def test_threads_change_nothing(run):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 4, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for one, four, again in zip(*found, strict=True):
        assert torch.equal(four, again) and torch.equal(four, one)
