"""A small run of every CUDA kernel, or of the families named: ``tests/every_kernel.py [FAMILY...]``.

``--families`` lists their names. tests/compute_sanitizer.sh runs this under compute-sanitizer's tools.
"""

from __future__ import annotations

import sys

import torch

from flash_xlstm import ops

BF16 = torch.bfloat16
operators = torch.ops.flash_xlstm
# batch, seq, heads, dqk, dv, dtype, offsets: the Hopper kernels' column tiles, tails, packing and segments;
# the fused forward; portable.
PROBLEMS = [
    (1, 200, 1, 64, 64, BF16, None),
    (1, 150, 1, 128, 128, BF16, None),
    (1, 150, 1, 256, 256, BF16, None),
    (1, 150, 1, 72, 200, BF16, None),
    (1, 150, 1, 128, 64, BF16, None),
    (1, 150, 1, 192, 320, BF16, None),
    (1, 200, 1, 64, 128, BF16, [0, 0, 60, 200]),
    (1, 200, 2, 40, 24, BF16, [0, 0, 60, 200]),
    (7, 390, 4, 256, 512, BF16, None),
    (14, 70, 4, 256, 512, BF16, None),
    (1, 150, 28, 256, 512, BF16, [0, 0, 60, 150]),
    (1, 3200, 1, 64, 64, BF16, None),
    (1, 3200, 1, 128, 256, BF16, None),
    (1, 9000, 1, 64, 64, BF16, None),
    (1, 1200, 1, 64, 64, BF16, [*range(128), 1200]),
    (1, 100, 1, 32, 32, torch.float32, None),
    (1, 100, 1, 65, 130, torch.float32, [0, 30, 100]),
    (1, 100, 1, 33, 16, torch.float16, None),
    (1, 100, 1, 20, 100, BF16, None),
]
# These also run with a sigmoid input gate and with soft-capped gates.
VARIED = [
    (1, 200, 1, 64, 128, BF16, [0, 0, 60, 200]),
    (1, 300, 1, 256, 128, BF16, None),
    (7, 100, 4, 256, 512, BF16, None),
    (1, 100, 1, 65, 130, torch.float32, [0, 30, 100]),
    (1, 100, 1, 33, 16, torch.float16, None),
]

# batch, seq, heads, dim, dtype, offsets of the sLSTM: one block and clusters, one and two warps a group of units, 8 to
# 32 rows a cluster, R in registers only and in registers and shared memory, packing; portable.
SLSTM_PROBLEMS = [
    (9, 6, 2, 64, BF16, None),
    (3, 6, 1, 32, torch.float16, None),
    (9, 5, 1, 128, BF16, None),
    (3, 6, 1, 256, BF16, None),
    (1, 20, 1, 256, BF16, [0, 0, 7, 8, 20]),
    (2, 4, 1, 512, BF16, None),
    (40, 3, 2, 512, BF16, None),
    (70, 3, 2, 512, BF16, None),
    (1, 20, 1, 512, BF16, [0, 0, 7, 8, 20]),
    (9, 4, 1, 128, torch.float16, None),
    (3, 4, 1, 256, torch.float16, None),
    (40, 3, 2, 512, torch.float16, None),
    (2, 3, 1, 640, torch.float16, None),
    (2, 3, 1, 768, BF16, None),
    (60, 3, 1, 520, BF16, None),
    (600, 3, 4, 64, BF16, None),
    (300, 3, 4, 256, BF16, None),
    (5, 6, 2, 40, torch.float32, None),
    (1, 20, 1, 33, torch.float32, [0, 0, 7, 8, 20]),
    (3, 6, 1, 20, torch.float16, None),
]
# batch, seq, channels, kernel, dtype, offsets of the convolution.
CONV_PROBLEMS = [
    (2, 150, 64, 4, BF16, None),
    (1, 150, 64, 4, torch.float32, [0, 0, 3, 66, 150]),
    (2, 70, 64, 8, torch.float16, None),
    (2, 70, 33, 4, BF16, None),
    (2, 70, 8, 1, torch.float32, None),
]


def run(batch, seq, heads, dqk, dv, dtype, offsets, normalize=None, gate_soft_cap=None):
    """`normalize` True or False: mlstm_sig."""
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    q, k, v = (new(batch, seq, heads, d).to(dtype).requires_grad_() for d in (dqk, dqk, dv))
    i, f = new(batch, seq, heads).requires_grad_(), (new(batch, seq, heads) + 3).requires_grad_()
    states = batch if offsets is None else len(offsets) - 1
    state = tuple(
        t.requires_grad_() for t in (new(states, heads, dqk, dv), new(states, heads, dqk), new(states, heads))
    )
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device="cuda")
    op, options = ops.mlstm, {"gate_soft_cap": gate_soft_cap, "cu_seqlens": cu_seqlens, "return_final_state": True}
    if normalize is not None:
        op, options["normalize"] = ops.mlstm_sig, normalize
        state = state[0], state[1] if normalize else None
    h, last = op(q, k, v, i, f, initial_state=state, **options)
    outputs, inputs = ([t for t in tensors if t is not None] for tensors in ((h, *last), (q, k, v, i, f, *state)))
    torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])
    if normalize is None:
        outputs = ops.mlstm_state(k, v, i, f, gate_soft_cap=gate_soft_cap, cu_seqlens=cu_seqlens)
        torch.autograd.grad(outputs, (k, v, i, f), [torch.randn_like(t) for t in outputs])
        in_two_parts(q, k, v, i, f, *state, cu_seqlens, gate_soft_cap)
        for c_dtype in (torch.float32, BF16):
            prefill(q, k, v, i, f, state, cu_seqlens, c_dtype, gate_soft_cap)
    torch.cuda.synchronize()


@torch.no_grad()
def in_two_parts(*inputs):
    """The backward as context parallel runs it, and the states that it exchanges."""
    *inputs, gate_soft_cap = inputs
    options = None, 1e-6, gate_soft_cap, 0
    h, kept, *last = operators.mlstm(*inputs, *options, True)
    dh, rest = torch.randn_like(h), (*inputs, h, kept, *options)
    *_, begun = operators.mlstm_initial_backward(dh, *last[:2], *rest)
    operators.mlstm_remaining_backward(dh, *last, *rest, begun)
    if inputs[-1] is None:
        for from_zero in (False, True):
            operators.mlstm_piece(*inputs[1:5], gate_soft_cap, 0, from_zero)


@torch.no_grad()
def prefill(q, k, v, i, f, state, cu_seqlens, c_dtype, gate_soft_cap):
    """From slots and into them, the last sequence from zero. Then once more, with the last two left out."""
    states = state[0].shape[0]
    c, n, m = (torch.cat([t, t[:1]]) for t in state)
    pool = c.to(c_dtype), n, m
    slots = torch.arange(states, 0, -1, dtype=torch.int32, device="cuda")
    fresh = torch.zeros(states, dtype=torch.bool, device="cuda")
    fresh[-1] = True
    for _ in range(2):
        ops.mlstm_prefill(
            q, k, v, i, f, pool, state_indices=slots, cu_seqlens=cu_seqlens, fresh=fresh, gate_soft_cap=gate_soft_cap
        )
        slots[-2:] = torch.tensor([-1, states + 1], device="cuda")[-states:]


def run_slstm(batch, seq, heads, dim, dtype, offsets):
    new = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    rows = batch if offsets is None else len(offsets) - 1
    x, R = new(batch, seq, 4, heads, dim).to(dtype), (new(4, heads, dim, dim) * dim**-0.5).to(dtype)
    inputs = [t.requires_grad_() for t in (x, R, new(4, heads, dim), *(new(rows, heads, dim) for _ in range(4)))]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device="cuda")
    options = {"initial_state": tuple(inputs[3:]), "cu_seqlens": cu_seqlens, "return_final_state": True}
    h, last = ops.slstm(*inputs[:3], **options)
    outputs = [h, *last]
    torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])
    with torch.no_grad():
        ops.slstm_step(x[:, 0], R, inputs[2], tuple(t[:1].expand(batch, -1, -1).clone() for t in inputs[3:]))
    torch.cuda.synchronize()


def run_conv(batch, seq, channels, kernel, dtype, offsets):
    new = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    rows = batch if offsets is None else len(offsets) - 1
    shapes = (batch, seq, channels), (channels, kernel), (channels,), (rows, kernel - 1, channels)
    inputs = [new(*shape).requires_grad_() for shape in shapes]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32, device="cuda")
    options = {"activation": "silu", "cu_seqlens": cu_seqlens, "return_final_state": True}
    outputs = ops.causal_conv1d(*inputs[:3], initial_state=inputs[3], **options)
    torch.autograd.grad(outputs, inputs, [torch.randn_like(t) for t in outputs])
    with torch.no_grad():
        x, weight, bias, state = inputs
        ops.causal_conv1d_step(x[:, 0], weight, bias, state[:1].expand(batch, -1, -1).clone(), activation="silu")
    torch.cuda.synchronize()


def every_slstm() -> None:
    for problem in SLSTM_PROBLEMS:
        run_slstm(*problem)
        print("ran slstm", *problem, flush=True)


def every_conv() -> None:
    for problem in CONV_PROBLEMS:
        run_conv(*problem)
        print("ran causal_conv1d", *problem, flush=True)


def every_mlstm() -> None:
    for problem in PROBLEMS:
        run(*problem)
        print("ran", *problem, flush=True)
    for problem in VARIED:
        for normalize, gate_soft_cap in ((None, 15.0), (True, None), (True, 15.0), (False, 15.0)):
            run(*problem, normalize, gate_soft_cap)
            print("ran", *problem, "normalize", normalize, "gate_soft_cap", gate_soft_cap, flush=True)


def every_step() -> None:
    for dtype in (torch.float32, BF16, torch.float16):
        q = torch.randn(2, 2, 64, device="cuda", dtype=dtype)
        i = torch.randn(2, 2, device="cuda")
        state = tuple(torch.zeros(2, 2, *shape, device="cuda") for shape in ((64, 64), (64,), ()))
        ops.mlstm_step(q, q, q, i, i, state, gate_soft_cap=15.0)
        for batch, dv, state_dtype in (
            (2, 512, torch.float32),
            (2, 512, BF16),
            (60, 512, torch.float32),
            (30, 400, torch.float32),
            (2, 30, BF16),
        ):
            step(batch, 64, dv, dtype, state_dtype)


def every_pointwise() -> None:
    # A warp to 512 threads a row; single elements.
    for dtype in (torch.float32, BF16, torch.float16):
        ops.soft_cap(torch.randn(2, 2, 64, device="cuda").to(dtype).requires_grad_(), 3.0).sum().backward()
        for dim in (64, 512, 1024, 2048, 4096, 8192, 16384, 35, 201):
            pointwise(dtype, dim)
    pointwise(BF16, 4096, 1500)  # more rows than blocks read ahead
    pointwise(BF16, 256, 17_000)  # and for several rounds of blocks


def every_linear() -> None:
    for rows, size_in, size_out in ((1, 64, 40), (9, 1096, 17), (16, 4096, 32), (3, 200, 3000), (9, 264, 7001)):
        x, weight = (torch.randn(n, size_in, device="cuda").to(BF16) for n in (rows, size_out))
        ops.linear_rows(x, weight, weight[:, 0])
        ops.fused_linear_rows(x, [weight, weight], swiglu=True, constant_weights=True)
        ops.fused_linear_rows(x, [weight, weight[:7]], constant_weights=True)
    # Blocks of one tile, which request all the weights that fit at once; then larger weights.
    for rows, size_in in ((3, 960), (16, 960), (16, 2200)):
        x, weight = (torch.randn(n, size_in, device="cuda", dtype=BF16) for n in (rows, 4200))
        ops.fused_linear_rows(x, [weight], residual=weight[:rows, :1].expand(-1, 4200), constant_weights=True)


@torch.no_grad()
def every_product() -> None:
    # A part of a tile, several tiles a cluster, columns and depth that fill no box.
    for dtype in (BF16, torch.float16):
        for rows, depth, columns in ((70, 64, 128), (300, 200, 392), (5000, 136, 1304)):
            new = lambda *shape, dtype=dtype: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
            a, weight, z = new(rows, depth), new(columns, depth), new(rows, 2 * columns)
            operators.joined_product(a, [weight] if columns % 128 else [weight, new(384, depth), weight])
            operators.added_product(a, weight, z[:, :columns])
            operators.swiglu_product(a, weight, weight)
            for remake in (True, False):
                operators.swiglu_product_backward(a, weight.t(), z, remake)


def every_loss() -> None:
    # A row in one block and in clusters of two, four and eight; read twice.
    for vocabulary in (37, 1000, 50304, 50257, 70001, 131072, 262147):
        for dtype in (torch.float32, BF16, torch.float16):
            hidden, weight = (torch.randn(n, 16, device="cuda").to(dtype).requires_grad_() for n in (9, vocabulary))
            labels = torch.randint(vocabulary, (9,), device="cuda")
            labels[2] = -100
            for options in ({}, {"soft_cap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}):
                ops.linear_cross_entropy(hidden, weight, labels, **options).backward()
                ops.linear_cross_entropy(hidden, weight, labels.int(), reduction="none", **options).sum().backward()


FAMILIES = {
    "slstm": every_slstm,
    "conv": every_conv,
    "mlstm": every_mlstm,
    "step": every_step,
    "pointwise": every_pointwise,
    "linear": every_linear,
    "products": every_product,
    "loss": every_loss,
}


def main() -> None:
    if sys.argv[1:] == ["--families"]:
        print("\n".join(FAMILIES))
        return
    for family in sys.argv[1:] or FAMILIES:
        FAMILIES[family]()
        torch.cuda.synchronize()
        print("ran the family", family, flush=True)


def step(batch, dqk, dv, dtype, state_dtype):
    new = lambda *shape: torch.randn(*shape, device="cuda").to(dtype)  # noqa: E731
    state = tuple(torch.zeros(batch, 2, *shape, device="cuda") for shape in ((dqk, dv), (dqk,), ()))
    state = (state[0].to(state_dtype), *state[1:])
    apart = tuple(torch.cat([t, t], 1)[:, :2] for t in state)  # slots a stride apart
    slots = torch.arange(batch, dtype=torch.int32, device="cuda")
    slots[0] = -1
    q, k, v = new(batch, 2, dqk), new(batch, 2, dqk), new(batch, 2, dv)
    for each in (state, apart):
        ops.mlstm_step(q, k, v, new(batch, 2), new(batch, 2), each, state_indices=slots, gate_soft_cap=15.0)
    torch.cuda.synchronize()


def pointwise(dtype, dim, rows=9):
    new = lambda *shape: torch.randn(*shape, device="cuda").to(dtype).requires_grad_()  # noqa: E731
    x, y, weight, h, gate = new(rows, dim), new(rows, dim), new(dim), new(rows, 2, dim), new(rows, 2 * dim)
    outputs = [
        ops.rms_norm(x, weight),
        *ops.rms_norm(x, weight, 1e-6, y),
        ops.gated_head_norm(h, gate, torch.cat([weight, weight])),
        ops.swiglu(x, y),
    ]
    torch.autograd.grad(outputs, [x, y, weight, h, gate], [torch.randn_like(t) for t in outputs])
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
