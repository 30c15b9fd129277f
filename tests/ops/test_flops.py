"""torch's counter of operations beside products counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flash_xlstm import ops

BATCH, SEQ, HEADS, DQK, DV, DIM, CHANNELS = 2, 150, 3, 4, 6, 5, 7
ROWS = BATCH * SEQ * HEADS


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def gates(*shape):
    return [randn(*shape, DQK), randn(*shape, DQK), randn(*shape, DV), randn(*shape), randn(*shape)]


def state(rows=BATCH):
    return randn(rows, HEADS, DQK, DV), randn(rows, HEADS, DQK), randn(rows, HEADS)


def product(m, k, n):
    """Operations of an (m, k) matrix times a (k, n) one."""
    return 2 * m * k * n


def chunks(length):
    """Of the mLSTM with chunks of `length`, counted product by product: forward, backward."""
    L, count = length, ROWS / length
    forward = product(L, DQK, L) + product(L, L, DV)  # q k^T, w v
    forward += product(L, DQK, DV) + product(DQK, L, DV)  # q c, k^T v
    backward = product(L, DQK, L) + product(L, DV, L)  # q k^T, dh v^T
    backward += 2 * product(L, L, DQK) + product(L, L, DV)  # dw k, dw^T q, w^T dh
    backward += 2 * product(L, DV, DQK) + product(L, DQK, DV) + product(DQK, L, DV)  # dq, dk, dv; q^T dh
    return round(count * forward), round(count * backward)


MLSTM = chunks(128)
SLSTM = BATCH * SEQ * 4 * HEADS * product(1, DIM, DIM)
CONV = BATCH * SEQ * CHANNELS * product(1, 4, 1)
OFFSETS = torch.tensor([0, 50, 300], dtype=torch.int32)
# A function, its tensors, and the operations of forward and backward.
SEQUENCES = {
    "mlstm": (ops.mlstm, gates(BATCH, SEQ, HEADS), MLSTM),
    "mlstm with states": (
        lambda *t: ops.mlstm(*t[:5], initial_state=t[5:], return_final_state=True)[0],
        [*gates(BATCH, SEQ, HEADS), *state()], MLSTM,
    ),
    "mlstm, packed": (lambda *t: ops.mlstm(*t, cu_seqlens=OFFSETS), gates(1, BATCH * SEQ, HEADS), MLSTM),
    "mlstm, few tokens": (ops.mlstm, gates(ROWS // HEADS // 5, 5, HEADS), chunks(5)),
    "mlstm_sig": (ops.mlstm_sig, gates(BATCH, SEQ, HEADS), MLSTM),
    "mlstm_state": (
        lambda *t: ops.mlstm_state(*t)[0], gates(BATCH, SEQ, HEADS)[1:],
        (ROWS * product(DQK, 1, DV), ROWS * (product(1, DV, DQK) + product(1, DQK, DV))),
    ),
    "slstm": (
        ops.slstm, [randn(BATCH, SEQ, 4, HEADS, DIM), randn(4, HEADS, DIM, DIM), randn(4, HEADS, DIM)],
        (SLSTM, 2 * SLSTM),
    ),
    "causal_conv1d": (
        ops.causal_conv1d, [randn(BATCH, SEQ, CHANNELS), randn(CHANNELS, 4), randn(CHANNELS)], (CONV, 2 * CONV),
    ),
}  # fmt: skip
STEPS = {
    "mlstm_step": (
        lambda: ops.mlstm_step(*gates(BATCH, HEADS), state()),
        BATCH * HEADS * (product(DQK, 1, DV) + product(1, DQK, DV)),
    ),
    "mlstm_prefill": (
        lambda: ops.mlstm_prefill(*gates(BATCH, SEQ, HEADS), state(4), state_indices=torch.tensor([3, 0]).int()),
        MLSTM[0],
    ),
    "slstm_step": (
        lambda: ops.slstm_step(
            randn(BATCH, 4, HEADS, DIM), randn(4, HEADS, DIM, DIM), randn(4, HEADS, DIM),
            tuple(randn(BATCH, HEADS, DIM) for _ in range(4)),
        ),
        SLSTM // SEQ,
    ),
    "causal_conv1d_step": (
        lambda: ops.causal_conv1d_step(randn(BATCH, CHANNELS), randn(CHANNELS, 4), None, randn(BATCH, 3, CHANNELS)),
        CONV // SEQ,
    ),
    "linear_rows": (lambda: ops.linear_rows(randn(2, 3, 8), randn(5, 8)), product(6, 8, 5)),
    "fused_linear_rows": (
        lambda: ops.fused_linear_rows(randn(2, 3, 8), [randn(5, 8), randn(9, 8)]), product(6, 8, 5 + 9),
    ),
}  # fmt: skip


def count(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name):
    form, given, (forward, backward) = SEQUENCES[name]
    with torch.no_grad():
        assert count(lambda: form(*given))[0] == forward
    leaves = [t.clone().requires_grad_() for t in given]
    counted, result = count(lambda: form(*leaves))
    assert counted == forward
    assert count(result.sum().backward)[0] == backward


@pytest.mark.parametrize("name", STEPS)
@torch.no_grad()
def test_steps(name):
    run, expected = STEPS[name]
    assert count(run)[0] == expected


def test_gates_and_norm_in_one():
    from flash_xlstm.ops.mlstm_gated import mlstm_gated

    z, weight = randn(BATCH, SEQ, 2 * HEADS * (DQK + DV)).requires_grad_(), randn(HEADS * DV)
    given = z, randn(BATCH, SEQ, HEADS), randn(BATCH, SEQ, HEADS), weight, None, HEADS, HEADS * DQK
    forward, result = count(lambda: mlstm_gated(*given, None, 1e-6, None, 0, 1e-6)[0])
    assert (forward, count(result.sum().backward)[0]) == MLSTM


def test_a_backward_in_two_parts():
    from flash_xlstm.ops.mlstm import _mlstm_forward, mlstm_initial_backward, mlstm_remaining_backward

    given = [*gates(BATCH, SEQ, HEADS), *state(), None]
    h, kept = _mlstm_forward(*given, None, 1e-6, None, 0)
    options = *given, h, kept, None, 1e-6, None, 0
    first, (*_, begun) = count(lambda: mlstm_initial_backward(h, None, None, *options))
    assert first == ROWS * product(DQK, 1, DV)  # q^T dh
    assert first + count(lambda: mlstm_remaining_backward(h, None, None, None, *options, begun))[0] == MLSTM[1]


def test_every_op_with_products_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    pointwise = ("rms_norm", "gated_head_norm", "swiglu", "soft_cap", "scaled", "float8_cast", "cross_entropy_rows")
    names = {
        name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("flash_xlstm::")
    }  # fmt: skip
    left = {name for name in names if getattr(torch.ops.flash_xlstm, name) not in flop_registry}
    assert left and all(any(kind in name for kind in pointwise) for name in left - {"linear_cross_entropy_backward"})
