"""Values that break careless kernels. NaN and infinities stay with their sequence. Zeros, subnormal numbers, and gates
at and beyond their caps give what float64 gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_xlstm import ops, reference

ROWS, SEQ, HEADS, DQK, DV, DIM = 3, 21, 2, 8, 12, 10
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = (ROWS, SEQ)
CELL = (ROWS, HEADS, DIM)
KV = {"k": (*TOKENS, HEADS, DQK), "v": (*TOKENS, HEADS, DV), "i": (*TOKENS, HEADS), "f": (*TOKENS, HEADS)}
QKV = {"q": KV["k"], **KV}
C, N, M = {"c": (ROWS, HEADS, DQK, DV)}, {"n": (ROWS, HEADS, DQK)}, {"m": (ROWS, HEADS)}


def _states(op, count):
    def form(*t):
        h, last = op(*t[:-count], initial_state=t[-count:], return_final_state=True)
        return h, *(s for s in last if s is not None)

    return form


def _capped(op):
    return lambda *t: op(*t, gate_soft_cap=15.0)


_LABELS = torch.tensor([1, 4, 0])
# For each op: a function of tensors, its plain form, the shapes of inputs with a row for each sequence, and of those
# that all rows share.
OPS = {
    "mlstm": (_states(ops.mlstm, 3), _states(reference.mlstm_chunkwise, 3), {**QKV, **C, **N, **M}, {}),
    "mlstm capped": (_capped(ops.mlstm), _capped(reference.mlstm_chunkwise), QKV, {}),
    "mlstm_sig": (_states(ops.mlstm_sig, 2), _states(reference.mlstm_sig_chunkwise, 2), {**QKV, **C, **N}, {}),
    "mlstm_state": (ops.mlstm_state, reference.mlstm_state, KV, {}),
    "slstm": (
        lambda x, h, c, n, m, R, b: ops.slstm(x, R, b, initial_state=(h, c, n, m)),
        lambda x, h, c, n, m, R, b: reference.slstm(x, R, b, initial_state=(h, c, n, m)),
        {"x": (*TOKENS, 4, HEADS, DIM), "h": CELL, "c": CELL, "n": CELL, "m": CELL},
        {"R": (4, HEADS, DIM, DIM), "b": (4, HEADS, DIM)},
    ),
    "causal_conv1d": (
        lambda x, state, *w: ops.causal_conv1d(x, *w, initial_state=state, activation="silu"),
        lambda x, state, *w: reference.causal_conv1d(x, *w, initial_state=state, activation="silu"),
        {"x": (*TOKENS, DIM), "state": (ROWS, 3, DIM)},
        {"weight": (DIM, 4), "bias": (DIM,)},
    ),
    "rms_norm": (ops.rms_norm, reference.rms_norm, {"x": (ROWS, DIM)}, {"weight": (DIM,)}),
    "gated_head_norm": (
        ops.gated_head_norm, reference.gated_head_norm, {"h": CELL, "gate": (ROWS, HEADS * DIM)},
        {"weight": (HEADS * DIM,)},
    ),
    "swiglu": (ops.swiglu, reference.swiglu, {"x": (ROWS, DIM), "y": (ROWS, DIM)}, {}),
    "soft_cap": (lambda x: ops.soft_cap(x, 3.0), lambda x: reference.soft_cap(x, 3.0), {"x": (ROWS, DIM)}, {}),
    "linear_cross_entropy": (
        lambda h, w: ops.linear_cross_entropy(h, w, _LABELS.to(h.device), reduction="none", soft_cap=5.0),
        lambda h, w: reference.linear_cross_entropy(h, w, _LABELS.to(h.device), reduction="none", soft_cap=5.0),
        {"hidden": (ROWS, DIM)}, {"weight": (7, DIM)},
    ),
}  # fmt: skip
# What is float32 in any dtype.
_STATES = ("c", "n", "m")


def _inputs(op, device, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    _, _, rows, shared = OPS[op]
    made = {}
    for name, shape in {**rows, **shared}.items():
        t = torch.randn(shape, generator=generator)
        if op == "slstm" and name == "n":
            t = t.abs() + 0.1
        state = name in _STATES or (op == "slstm" and name == "h")
        made[name] = t.to(device, F32 if state else dtype)
    return made


def _run(op, inputs, form=0):
    """Outputs, and gradients by input."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs.values()]
    outputs = OPS[op][form](*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    into = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, into, materialize_grads=True, allow_unused=True)
    return [t.detach() for t in outputs], dict(zip(inputs, gradients, strict=True))


def test_not_finite_stays_with_its_row(fuzz, device):
    """Outputs and gradients of other rows are the same bits."""
    dtypes = [F32, BF16, F16]

    @fuzz(250)
    @given(
        st.sampled_from(list(OPS)), st.sampled_from(dtypes), st.integers(0, 9), st.integers(0, ROWS - 1),
        st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.integers(0, 10**6), st.integers(0, 9),
    )  # fmt: skip
    def run(op, dtype, which, row, value, place, seed):
        inputs = _inputs(op, device, dtype, seed)
        names = list(OPS[op][2])
        poisoned = {name: t.clone() for name, t in inputs.items()}
        of_row = poisoned[names[which % len(names)]][row].view(-1)
        of_row[place % of_row.numel()] = value
        others = [other for other in range(ROWS) if other != row]
        (clean, clean_gradients), (got, gradients) = _run(op, inputs), _run(op, poisoned)
        for a, b in zip(clean, got, strict=True):
            assert torch.equal(a[others], b[others])
        for name in names:
            assert torch.equal(clean_gradients[name][others], gradients[name][others]), name

    run()


def _least(dtype):
    """A subnormal number of the dtype."""
    return torch.finfo(dtype).tiny / 8


@pytest.mark.filterwarnings("error")
def test_zeros_and_subnormal_numbers(fuzz, device):
    """One of the inputs, whole or a row of it, is zero, minus zero, or at the bottom of its dtype's range."""

    @fuzz(250)
    @given(
        st.sampled_from(list(OPS)), st.sampled_from([F32, BF16, F16]), st.integers(0, 9), st.booleans(),
        st.sampled_from(["0", "-0", "subnormal", "tiny"]), st.integers(0, 9),
    )  # fmt: skip
    def run(op, dtype, which, whole, kind, seed):
        inputs = _inputs(op, device, dtype, seed)
        name = list(inputs)[which % len(inputs)]
        if op == "slstm" and name == "n":
            return  # a state with n of 0 is the fresh one, whatever its m
        t = inputs[name]
        value = {"0": 0.0, "-0": -0.0, "subnormal": _least(t.dtype), "tiny": torch.finfo(t.dtype).tiny}[kind]
        (t if whole else t[0])[...] = value
        outputs, gradients = _run(op, inputs)
        wide, _ = _run(op, {name: t.double() for name, t in inputs.items()}, form=1)
        for got, want in zip(outputs, wide, strict=True):
            eps = max(torch.finfo(got.dtype).eps, torch.finfo(dtype).eps)
            assert (got.double() - want).norm() <= max(1e-5, 2 * eps) * want.norm() + 1e-6, (got, want)
        assert all(g.isfinite().all() for g in gradients.values())

    run()


def test_gates_at_and_beyond_their_caps(fuzz, make_problem, assert_float32_exact):
    """Single gates at a cap of 15, where its slope is 0, and far beyond any weight that float32 holds."""

    @fuzz(150)
    @given(
        st.integers(2, 90), st.sampled_from("if"), st.sampled_from([15.0, -15.0, 60.0, -60.0, 1000.0, -1000.0]),
        st.sampled_from([None, 15.0]), st.sampled_from([1, 5]), st.booleans(), st.integers(0, 99),
    )  # fmt: skip
    def run(seq, name, value, cap, every, state, seed):
        problem = make_problem(seq, 9, 14, heads=1, gates="small", gate_soft_cap=cap, state=state, seed=seed)
        if name == "i" and value > 0 and every > 1:
            # q k > 0. Where a single token counts and its q k is a thousandth of its terms, h is v however that is
            # rounded: no rounding of the inputs moves it, but a sum s that is more exact than q k does.
            for x in "qk":
                problem.inputs[x].abs_()
        problem.inputs[name][:, seed % every :: every] = value
        problem.avoid_kinks()
        if cap is None and abs(value) == 1000.0:  # the stabilizer holds log weights of 1000 to 3e-5
            values = problem(ops.mlstm)
            expected = problem.reference()
            assert all(t.isfinite().all() for t in values.values())
            for part in ("h", "last c", "last n", "last m"):
                error = (values[part].double() - expected[part]).norm()
                assert error <= 1e-3 * expected[part].norm() + 1e-6, part
        else:
            assert_float32_exact(problem, ops.mlstm, strict=False, small=True)

    run()
