"""The reference sLSTM against numbers on paper, its edge cases, and the gradient by differences."""

from __future__ import annotations

import math

import pytest
import torch

from flash_xlstm import reference

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape, seed=0, size=1.0):
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(batch=2, seq=6, heads=2, dim=3, gates=1.0):
    x, R, b = normal(batch, seq, 4, heads, dim, size=gates), normal(4, heads, dim, dim, seed=1), normal(4, heads, dim)
    h, c, m = (normal(batch, heads, dim, seed=seed) for seed in (2, 3, 4))
    return [x, R, b, h, c, normal(batch, heads, dim, seed=5).abs() + 0.5, m]


def test_the_definition_by_hand():
    """Two tokens of one unit from zero states."""
    x = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, -0.5, math.log(3)]], dtype=torch.float64).view(1, 2, 4, 1, 1)
    R = torch.tensor([0.0, 0.0, 2.0, 0.0], dtype=torch.float64).view(4, 1, 1, 1)
    b = torch.tensor([0.0, 0.0, 0.1, 0.0], dtype=torch.float64).view(4, 1, 1)
    h, (h_last, c, n, m) = reference.slstm(x, R, b, return_final_state=True)
    # Fresh: m_1 = i_1 = 1, c_1 = tanh(0.6), n_1 = 1, h_1 = c_1 / 2. Then lf = -ln 2: m_2 = 1 - ln 2 = 0.31 > i_2 = 0.
    c1 = math.tanh(0.6)
    take = math.exp(-(1 - math.log(2)))
    c2 = c1 + take * math.tanh(-0.5 + 2 * c1 / 2 + 0.1)
    n2 = 1 + take
    for got, want in ((h[0, 0], c1 / 2), (h[0, 1], 0.75 * c2 / n2), (c, c2), (n, n2), (m, 1 - math.log(2))):
        assert torch.allclose(got.flatten(), torch.tensor([want], dtype=torch.float64), **EXACT)
    assert torch.equal(h_last[0], h[0, 1])


def test_r_is_indexed_by_output_then_input():
    x, b, R = torch.zeros(1, 1, 4, 1, 2), torch.zeros(4, 1, 2), torch.zeros(4, 1, 2, 2)
    R[2, 0, 0, 1] = 1.0  # z of unit 0 sees h of unit 1
    state = (torch.tensor([[[0.0, 0.7]]]), *(torch.zeros(1, 1, 2) for _ in range(3)))
    _, (_, c, _, _) = reference.slstm(x, R, b, initial_state=state, return_final_state=True)
    assert torch.allclose(c, torch.tensor([[[math.tanh(0.7), 0.0]]]))


def test_gradients_by_differences():
    leaves = [t.requires_grad_() for t in inputs(seq=4)]

    def form(x, R, b, *state):
        h, last = reference.slstm(x, R, b, initial_state=state, return_final_state=True)
        return h, *last

    torch.autograd.gradcheck(form, leaves, fast_mode=True)


def test_gradients_from_a_fresh_state_by_differences():
    leaves = [t.requires_grad_() for t in inputs(seq=4)[:3]]
    torch.autograd.gradcheck(lambda *a: reference.slstm(*a), leaves, fast_mode=True)


def test_the_stabilizer_does_not_show():
    """Shifting m and scaling c and n with it changes no h."""
    x, R, b, h, c, n, m = inputs()
    want = reference.slstm(x, R, b, initial_state=(h, c, n, m))
    shift = normal(*m.shape, seed=9)
    got = reference.slstm(x, R, b, initial_state=(h, c * torch.exp(-shift), n * torch.exp(-shift), m + shift))
    assert torch.allclose(got, want, **EXACT)


@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_large_gates_from_a_fresh_state(size):
    x, R, b, *_ = inputs()
    x[:, :, 0] += size
    x[:, :, 1] -= size
    x.requires_grad_()
    h, last = reference.slstm(x, R, b, return_final_state=True)
    (dx,) = torch.autograd.grad([h, *last], x, [torch.ones_like(t) for t in (h, *last)])
    assert all(t.isfinite().all() for t in (h, *last, dx))


def test_padding_passes_everything_through():
    x, R, b, *state = inputs(seq=9)
    kept = torch.tensor([1, 4, 5, 8])
    padding = torch.ones(9, dtype=torch.bool)
    padding[kept] = False
    padded = x.clone()
    padded[:, padding] = torch.nan
    padded[:, padding, 0], padded[:, padding, 1] = -torch.inf, torch.inf
    padded.requires_grad_()
    h, last = reference.slstm(padded, R, b, initial_state=tuple(state), return_final_state=True)
    want, want_last = reference.slstm(x[:, kept], R, b, initial_state=tuple(state), return_final_state=True)
    assert torch.equal(h[:, kept], want)
    assert all(torch.equal(p, q) for p, q in zip(last, want_last, strict=True))
    assert torch.equal(h[:, 0], state[0]) and torch.equal(h[:, 2], h[:, 1])
    (dx,) = torch.autograd.grad(h.sum(), padded)
    assert not dx[:, padding].any() and dx.isfinite().all()


def test_packed_sequences_are_separate_calls():
    x, R, b, *_ = inputs(batch=1, seq=9)
    _, _, _, *state = inputs(batch=4)
    offsets = [0, 0, 2, 8, 9]
    h, last = reference.slstm(
        x, R, b, initial_state=tuple(state), cu_seqlens=torch.tensor(offsets), return_final_state=True
    )
    for s in range(4):
        first = tuple(t[s : s + 1] for t in state)
        part = slice(offsets[s], offsets[s + 1])
        if s == 0:
            end = first
        else:
            alone, end = reference.slstm(x[:, part], R, b, initial_state=first, return_final_state=True)
            assert torch.equal(h[:, part], alone)
        assert all(torch.equal(p[s : s + 1], q) for p, q in zip(last, end, strict=True))


def test_clips_what_passes_through_r_alone():
    x, R, b, h, c, n, m = inputs(seq=1)
    h.requires_grad_()
    dh0 = lambda **clip: torch.autograd.grad(reference.slstm(x, R, b, initial_state=(h, c, n, m), **clip).sum(), h)[0]  # noqa: E731
    whole = dh0()
    assert torch.equal(dh0(recurrent_grad_clip=0.01), whole.clamp(-0.01, 0.01)) and whole.abs().max() > 0.01


def test_step_is_a_sequence_of_one():
    x, R, b, *state = inputs(seq=1)
    want, last = reference.slstm(x, R, b, initial_state=tuple(state), return_final_state=True)
    h = reference.slstm_step(x[:, 0], R, b, tuple(state))
    assert torch.equal(h, want[:, 0])
    assert all(torch.equal(p, q) for p, q in zip(state, last, strict=True))
