"""The ops under torch.func's transforms and forward-mode differentiation, and autograd's version counters of steps."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from flash_xlstm import ops

BATCH, SEQ, HEADS, DQK, DV, DIM, CHANNELS = 2, 5, 2, 4, 6, 3, 5


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(*shapes):
    return [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def first(result):
    while isinstance(result, (tuple, list)):
        result = result[0]
    return result


MLSTM = [(BATCH, SEQ, HEADS, DQK)] * 2 + [(BATCH, SEQ, HEADS, DV)] + [(BATCH, SEQ, HEADS)] * 2
MLSTM_STEP = [(BATCH, HEADS, DQK)] * 2 + [(BATCH, HEADS, DV)] + [(BATCH, HEADS)] * 2
STATE = [(BATCH, HEADS, DQK, DV), (BATCH, HEADS, DQK), (BATCH, HEADS)]
SLSTM = [(4, HEADS, DIM, DIM), (4, HEADS, DIM)]
SLSTM_STATE = [(BATCH, HEADS, DIM)] * 4
CONV = [(CHANNELS, 4), (CHANNELS,)]
SLOTS = torch.tensor([1, 0], dtype=torch.int32)
LABELS = torch.tensor([0, 4, -100, 2])
# A function of tensors, and their shapes.
DIFFERENTIABLE = {
    "soft_cap": (lambda x: ops.soft_cap(x, 2.0), [(3, 4)]),
    "rms_norm": (ops.rms_norm, [(3, 4), (4,)]),
    "add_rms_norm": (lambda x, w, r: ops.rms_norm(x, w, 1e-6, r), [(3, 4), (4,), (3, 4)]),
    "gated_head_norm": (ops.gated_head_norm, [(3, 2, 4), (3, 8), (8,)]),
    "swiglu": (ops.swiglu, [(3, 4), (3, 4)]),
    "linear_cross_entropy": (lambda h, w: ops.linear_cross_entropy(h, w, LABELS, soft_cap=2.0), [(4, 3), (5, 3)]),
    "linear_cross_entropy of each": (
        lambda h, w: ops.linear_cross_entropy(h, w, LABELS, reduction="none"), [(4, 3), (5, 3)],
    ),
    "causal_conv1d": (ops.causal_conv1d, [(BATCH, SEQ, CHANNELS), *CONV]),
    "mlstm": (ops.mlstm, MLSTM),
    "mlstm with a state": (
        lambda *t: ops.mlstm(*t[:5], initial_state=t[5:], return_final_state=True)[1], [*MLSTM, *STATE],
    ),
    "mlstm_state": (ops.mlstm_state, MLSTM[1:]),
    "mlstm_sig": (ops.mlstm_sig, MLSTM),
    "slstm": (ops.slstm, [(BATCH, SEQ, 4, HEADS, DIM), *SLSTM]),
}  # fmt: skip
STEPS = {
    "mlstm_step": (lambda *t: ops.mlstm_step(*t[:5], t[5:]), [*MLSTM_STEP, *STATE]),
    "slstm_step": (lambda *t: ops.slstm_step(*t[:3], t[3:]), [(BATCH, 4, HEADS, DIM), *SLSTM, *SLSTM_STATE]),
    "causal_conv1d_step": (ops.causal_conv1d_step, [(BATCH, CHANNELS), *CONV, (BATCH, 3, CHANNELS)]),
}
PLAIN = {
    "linear_rows": (ops.linear_rows, [(2, 8), (3, 8)]),
    "mlstm_prefill": (lambda *t: ops.mlstm_prefill(*t[:5], t[5:], state_indices=SLOTS), [*MLSTM, *STATE]),
    "fused_linear_rows": (lambda x, w: ops.fused_linear_rows(x, [w]), [(2, 8), (3, 8)]),
}
ALL = {**DIFFERENTIABLE, **STEPS, **PLAIN}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("op", ALL)
def test_forward_mode_is_refused(op, which):
    form, shapes = ALL[op]
    given = tensors(*shapes)
    which = min(which, len(given) - 1)
    tangents = tuple(torch.ones_like(t) if place == which else torch.zeros_like(t) for place, t in enumerate(given))
    with torch.no_grad(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(form, tuple(given), tangents)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
        form(*given)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jacfwd(lambda x: first(form(*given[:which], x, *given[which + 1 :])))(randn(*shapes[which]))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_over_reverse_mode_is_refused(op):
    form, shapes = DIFFERENTIABLE[op]
    x, *others = tensors(*shapes)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.hessian(lambda x: first(form(x, *others)).sum())(x)


@pytest.mark.parametrize("op", ALL)
def test_what_has_no_tangent_goes_through_forward_mode(op):
    form, shapes = ALL[op]
    x = randn(3)
    expected = first(form(*tensors(*shapes)))
    _, tangent = torch.func.jvp(lambda x: x * first(form(*tensors(*shapes))).sum(), (x,), (torch.ones(3),))
    with forward_ad.dual_level():
        assert torch.equal(first(form(*tensors(*shapes))), expected)
    assert torch.allclose(tangent, expected.sum().expand(3))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_grad_and_vmap(op):
    form, shapes = DIFFERENTIABLE[op]
    rows = [
        tuple(torch.randn(shape, generator=torch.Generator().manual_seed(row)) for shape in shapes) for row in (1, 2)
    ]
    batched = [torch.stack(pair) for pair in zip(*rows, strict=True)]
    loss = lambda *t: first(form(*t)).square().sum()  # noqa: E731
    argnums = tuple(range(len(shapes)))

    def expected(row):
        leaves = [t.clone().requires_grad_() for t in row]
        return torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)

    for row in rows:
        for actual, want in zip(torch.func.grad(loss, argnums)(*row), expected(row), strict=True):
            assert torch.equal(actual, want)
    values = torch.func.vmap(lambda *t: first(form(*t)))(*batched)
    gradients = torch.func.vmap(torch.func.grad(loss, argnums))(*batched)
    for place, row in enumerate(rows):
        assert torch.equal(values[place], first(form(*row)))
        for actual, want in zip(gradients, expected(row), strict=True):
            assert torch.allclose(actual[place], want, rtol=1e-5, atol=1e-6)


OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
PACKED_STATE = [(3, HEADS, DQK, DV), (3, HEADS, DQK), (3, HEADS)]
ONE = [(1, *shape[1:]) for shape in MLSTM]
PACKED = {
    "mlstm": (
        lambda *t: ops.mlstm(*t[:5], initial_state=t[5:], cu_seqlens=OFFSETS, return_final_state=True),
        [*ONE, *PACKED_STATE],
    ),
    "mlstm_sig": (
        lambda *t: ops.mlstm_sig(*t[:5], initial_state=t[5:], cu_seqlens=OFFSETS, return_final_state=True),
        [*ONE, *PACKED_STATE[:2]],
    ),
    "mlstm_state": (lambda *t: ops.mlstm_state(*t, cu_seqlens=OFFSETS), ONE[1:]),
    "slstm": (
        lambda *t: ops.slstm(*t[:3], initial_state=t[3:], cu_seqlens=OFFSETS, return_final_state=True),
        [(1, SEQ, 4, HEADS, DIM), *SLSTM, *[(3, HEADS, DIM)] * 4],
    ),
    "causal_conv1d": (
        lambda *t: ops.causal_conv1d(*t[:3], initial_state=t[3], cu_seqlens=OFFSETS, return_final_state=True),
        [(1, SEQ, CHANNELS), *CONV, (3, 3, CHANNELS)],
    ),
}  # fmt: skip


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else [t for part in results for t in flat(part)]


@pytest.mark.parametrize(("op", "packed"), [*((op, False) for op in DIFFERENTIABLE), *((op, True) for op in PACKED)])
def test_vmap_over_some_arguments(op, packed):
    """Over one argument, over all others, over two levels: as one call for each."""
    form, shapes = (PACKED if packed else DIFFERENTIABLE)[op]
    loss = lambda *t: sum(part.square().sum() for part in flat(form(*t)))  # noqa: E731
    everything = lambda *t: (flat(form(*t)), torch.func.grad(loss, tuple(range(len(t))))(*t))  # noqa: E731
    given = tensors(*shapes)
    for which, shape in enumerate(shapes):
        for only in (True, False):
            mapped = [(place == which) == only for place in range(len(shapes))]
            if not any(mapped):
                continue
            args = [
                torch.stack([t, randn(*t.shape, seed=9)], -1) if m else t for t, m in zip(given, mapped, strict=True)
            ]
            got = torch.func.vmap(everything, tuple(-1 if m else None for m in mapped))(*args)
            for n in range(2):
                want = everything(*(t[..., n].contiguous() if m else t for t, m in zip(args, mapped, strict=True)))
                for a, b in zip(flat(got), flat(want), strict=True):
                    assert torch.allclose(a[n], b, rtol=1e-4, atol=1e-5), (shape, only)
    twice = [torch.stack([torch.stack([t, 0.5 * t]), torch.stack([0.7 * t, 0.1 * t])]) for t in given]
    values = torch.func.vmap(torch.func.vmap(lambda *t: flat(form(*t))))(*twice)
    for a in range(2):
        for b in range(2):
            for value, want in zip(values, flat(form(*(t[a, b] for t in twice))), strict=True):
                assert torch.allclose(value[a, b], want, rtol=1e-5, atol=1e-6)


class Calls(TorchDispatchMode):
    """Counts calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "flash_xlstm":
            self.counter[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "packed"),
    [*((op, packed) for op in PACKED for packed in (False, True)), ("soft_cap", False), ("swiglu", False)],
)
def test_vmap_is_one_call(op, packed):
    form, shapes = (PACKED if packed else DIFFERENTIABLE)[op]
    loss = lambda *t: flat(form(*t))[0].square().sum()  # noqa: E731
    batched = [torch.stack([t, t, t]) for t in tensors(*shapes)]
    with Calls() as calls:
        torch.func.vmap(torch.func.grad(loss, tuple(range(len(shapes)))))(*batched)
    assert len(calls.counter) == 2 and set(calls.counter.values()) == {1}


def test_vmap_over_nothing_is_refused():
    with pytest.raises(ValueError, match="vmap maps over 0 entries of an argument of flash_xlstm::soft_cap"):
        torch.func.vmap(lambda x: ops.soft_cap(x, 2.0))(torch.zeros(0, 3))


def test_jacobian():
    form, shapes = DIFFERENTIABLE["mlstm"]
    q, *others = tensors(*shapes)
    jacobian = torch.func.jacrev(lambda q: form(q, *others).sum((0, 2)))(q)
    for t in range(SEQ):
        assert not jacobian[t][:, :, torch.arange(SEQ) != t].any() and jacobian[t, :, :, t].any()
        leaf = q.clone().requires_grad_()
        form(leaf, *others).sum((0, 2))[t, 0].backward()
        assert torch.allclose(jacobian[t, 0], leaf.grad, atol=1e-6)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_are_refused(op):
    form, shapes = DIFFERENTIABLE[op]
    x, *others = tensors(*shapes)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.func.jacrev(torch.func.grad(lambda x: first(form(x, *others)).sum()))(x)


@pytest.mark.parametrize("op", [*STEPS, "mlstm_prefill"])
def test_steps_are_refused_under_vmap(op):
    form, shapes = ALL[op]
    with torch.no_grad(), pytest.raises(RuntimeError, match="writes its state in place"):
        torch.func.vmap(form)(*(torch.stack([t, t]) for t in tensors(*shapes)))


def test_a_step_after_a_sequence_from_the_same_state(device):
    """Without the version counter, dq would silently use the state after the step."""
    q, k, v, i, f = (t.to(device).requires_grad_() for t in tensors(*MLSTM))
    state = tuple(t.to(device) for t in tensors(*STATE))
    h = ops.mlstm(q, k, v, i, f, initial_state=state)
    with torch.no_grad():
        ops.mlstm_step(*(t.to(device) for t in tensors(*MLSTM_STEP)), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("op", STEPS)
def test_steps_count_as_changes(device, op, direct):
    form, shapes = STEPS[op]
    given = [t.to(device) for t in tensors(*shapes)]
    extra = {"mlstm_step": (None, None, 1e-6, None), "slstm_step": (), "causal_conv1d_step": (False,)}[op]
    written = {"mlstm_step": (5, 6, 7), "slstm_step": (3, 4, 5, 6), "causal_conv1d_step": (3,)}[op]
    before = [t._version for t in given]
    with torch.no_grad():
        getattr(torch.ops.flash_xlstm, op)(*given, *extra) if direct else form(*given)
    assert [t._version - b for t, b in zip(given, before, strict=True)] == [
        int(place in written) for place in range(len(given))
    ]
    saved = [t for place, t in enumerate(given) if place in written]
    weights = [torch.ones_like(t, requires_grad=True) for t in saved]
    products = [t * w for t, w in zip(saved, weights, strict=True)]
    with torch.no_grad():
        form(*given)
    for product in products:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
