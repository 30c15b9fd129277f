"""The reference forms against each other, and against an explicit gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from flash_xlstm import reference

FORMS = {
    "parallel": reference.mlstm_parallel,
    "chunks of 64": reference.mlstm_chunkwise,
    "chunks of 7": lambda *a, **b: reference.mlstm_chunkwise(*a, chunk_size=7, **b),
    "chunks of 1": lambda *a, **b: reference.mlstm_chunkwise(*a, chunk_size=1, **b),
}
EXACT = {"rtol": 1e-9, "atol": 1e-12}


def problem(seq=70, batch=2, heads=2, dqk=5, dv=7, gates="normal", seed=0, states=None):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    states = batch if states is None else states
    q, k, v = (normal(batch, seq, heads, dim) for dim in (dqk, dqk, dv))
    i, f = (normal(batch, seq, heads) * {"small": 0.1, "normal": 1.0, "large": 7.0}[gates] for _ in range(2))
    c, n, m = normal(states, heads, dqk, dv), normal(states, heads, dqk), normal(states, heads)
    return [t.requires_grad_() for t in (q, k, v, i, f, c, n, m)]


def results(form, inputs, **options):
    h, last = form(*inputs[:5], initial_state=tuple(inputs[5:]), return_final_state=True, **options)
    return [h, *last]


def gradients(outputs, inputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents), cotangents


@pytest.mark.parametrize("gates", ["small", "normal", "large"])
@pytest.mark.parametrize("eps", [1e-6, 0.1, 0.0])
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_in_values_and_gradients(form, gates, eps):
    inputs = problem(gates=gates)
    expected = results(reference.mlstm_recurrent, inputs, eps=eps)
    actual = results(FORMS[form], inputs, eps=eps)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, **EXACT)
    for a, b in zip(gradients(actual, inputs)[0], gradients(expected, inputs)[0], strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("form", [reference.mlstm_recurrent, *FORMS.values()])
def test_gate_soft_cap_is_a_soft_cap_before(form):
    inputs = problem(gates="large")
    q, k, v, i, f, *state = inputs
    capped = [q, k, v, reference.soft_cap(i, 3.0), reference.soft_cap(f, 3.0), *state]
    expected, actual = results(form, capped), results(form, inputs, gate_soft_cap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for a, b in zip(gradients(actual, inputs)[0], gradients(expected, inputs)[0], strict=True):
        assert torch.allclose(a, b, **EXACT)


def test_the_definition_by_hand():
    """Two tokens of one head, dqk = dv = 1, from zero states: every number can be checked on paper."""
    q, k, v = (
        torch.tensor(values, dtype=torch.float64).view(1, 2, 1, 1) for values in ([2.0, 3.0], [0.5, -1.0], [4.0, 5.0])
    )
    i, f = (torch.tensor(values, dtype=torch.float64).view(1, 2, 1) for values in ([1.0, 0.0], [0.0, 0.0]))
    h, (c, n, m) = reference.mlstm_recurrent(q, k, v, i, f, eps=0.0, return_final_state=True)
    # m_1 = max(-ln 2 + 0, 1) = 1, c_1 = 0.5 * 4 = 2, n_1 = 0.5, s_1 = 1 > e^-1
    # m_2 = max(1 - ln 2, 0), c_2 = c_1 - 5 e^-m_2, n_2 = n_1 - e^-m_2, |s_2| = 0.71 < e^-m_2 = 0.74
    m2 = 1 - torch.tensor(2.0, dtype=torch.float64).log()
    c2, n2 = 2 - 5 * torch.exp(-m2), 0.5 - torch.exp(-m2)
    for got, want in ((h[0, 0, 0, 0], 4.0), (h[0, 1, 0, 0], 3 * c2 / torch.exp(-m2)), (c, c2), (n, n2), (m, m2)):
        assert torch.allclose(got, torch.as_tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 70])
def test_m_does_not_depend_on_the_chunks(chunk_size):
    q, k, v, i, f, c, n, m = (t.detach() for t in problem(gates="large"))
    running = m
    for t in range(70):
        running = torch.maximum(F.logsigmoid(f[:, t]) + running, i[:, t])
        if t + 1 in (1, 2, 63, 64, 65, 70):
            part = (x[:, : t + 1] for x in (q, k, v, i, f))
            options = {"initial_state": (c, n, m), "chunk_size": chunk_size, "return_final_state": True}
            assert torch.allclose(reference.mlstm_chunkwise(*part, **options)[1][2], running, **EXACT)


def explicit_gradients(inputs, h, last, dh, dc, dn, dm, scale, eps):
    """The gradient as the kernels take it: three scalars a token, two identities for the gates, and a walk."""
    q, k, v, i, f, c0, n0, m0 = (t.detach() for t in inputs)
    q, k, v, h, dh = (t.detach().transpose(1, 2) for t in (q, k, v, h, dh))
    i, f = i.transpose(1, 2), f.transpose(1, 2)
    lf = F.logsigmoid(f)
    b, seq = lf.cumsum(-1), lf.shape[-1]
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    log_d = (b[..., :, None] - b[..., None, :] + i[..., None, :]).masked_fill(~causal, -torch.inf)
    m = torch.maximum(log_d.amax(-1), b + m0[..., None])
    decay = torch.exp(log_d - m[..., None])
    w, g = scale * (q @ k.mT) * decay, torch.exp(b + m0[..., None] - m)
    s = w.sum(-1) + scale * g * (q @ n0[..., None])[..., 0]
    d = torch.maximum(s.abs(), torch.exp(-m)) + eps

    u = (dh * h).sum(-1)
    delta = -(u / d) * s.sign() * (s.abs() >= torch.exp(-m))
    e = -u * eps / d
    r = dh / d[..., None]
    x = decay * (r @ v.mT + delta[..., None])
    wj, g_last = torch.exp(b[..., -1:] - b + i - m[..., -1:]), g[..., -1]
    state = r @ c0.mT + delta[..., None] * n0[..., None, :]
    dq = scale * x @ k + scale * g[..., None] * state
    dk = scale * x.mT @ q + wj[..., None] * (v @ dc.mT + dn[..., None, :])
    dv = w.mT @ r + wj[..., None] * (k @ dc)
    dc0 = g_last[..., None, None] * dc + scale * (g[..., None] * q).mT @ r
    dn0 = g_last[..., None] * dn + scale * ((g * delta)[..., None] * q).sum(-2)

    final = (last[0].detach() * dc).sum((-1, -2)) + (last[1].detach() * dn).sum(-1)
    di = (k * dk).sum(-1)
    dlf = ((q * dq).sum(-1) - di).flip(-1).cumsum(-1).flip(-1) + final[..., None]
    a = dm - final
    before = torch.cat([m0[..., None], m[..., :-1]], -1)
    for t in reversed(range(seq)):
        a = a + e[..., t]
        takes_input = i[..., t] >= lf[..., t] + before[..., t]
        di[..., t] += torch.where(takes_input, a, 0.0)
        dlf[..., t] += torch.where(takes_input, 0.0, a)
        a = torch.where(takes_input, 0.0, a)
    dm0 = a + (scale * g * (q * state).sum(-1)).sum(-1) + g_last * ((c0 * dc).sum((-1, -2)) + (n0 * dn).sum(-1))
    df = dlf * torch.sigmoid(-f)
    return *(t.transpose(1, 2) for t in (dq, dk, dv, di, df)), dc0, dn0, dm0


@pytest.mark.parametrize("gates", ["small", "normal", "large"])
@pytest.mark.parametrize("eps", [1e-6, 0.1, 0.0])
def test_explicit_gradient(gates, eps):
    inputs, scale = problem(gates=gates), 0.6
    h, *last = results(reference.mlstm_recurrent, inputs, scale=scale, eps=eps)
    expected, (dh, *dlast) = gradients([h, *last], inputs)
    explicit = explicit_gradients(inputs, h, last, dh, *dlast, scale, eps)
    for name, a, b in zip("qkvifcnm", explicit, expected, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm(), name


@pytest.mark.parametrize("form", [reference.mlstm_recurrent, *FORMS.values()])
def test_packed_equals_separate_calls(form):
    offsets = (0, 1, 1, 40, 70)
    inputs = problem(batch=1, states=4)
    h, *last = results(form, inputs, cu_seqlens=torch.tensor(offsets))
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        state = tuple(t[s : s + 1] for t in inputs[5:])
        if start == stop:
            assert all(torch.equal(t[s : s + 1], first) for t, first in zip(last, state, strict=True))
            continue
        own, mine = form(*(t[:, start:stop] for t in inputs[:5]), initial_state=state, return_final_state=True)
        assert torch.allclose(h[:, start:stop], own, **EXACT)
        assert all(torch.allclose(t[s : s + 1], part, **EXACT) for t, part in zip(last, mine, strict=True))


@pytest.mark.parametrize("cap", [None, 0.7])
def test_step_is_the_recurrence(cap):
    q, k, v, i, f, *state = (t.detach() for t in problem(seq=6))
    options = {"initial_state": tuple(state), "gate_soft_cap": cap, "return_final_state": True}
    h, last = reference.mlstm_recurrent(q, k, v, i, f, **options)
    pool = tuple(torch.cat([torch.zeros_like(t), t.flip(0)]) for t in state)  # slots 3 and 2
    rows = torch.tensor([3, 2], dtype=torch.int32)
    for t in range(6):
        step = reference.mlstm_step(*(x[:, t] for x in (q, k, v, i, f)), pool, state_indices=rows, gate_soft_cap=cap)
        assert torch.allclose(step, h[:, t], **EXACT)
    for part, want in zip(pool, last, strict=True):
        assert torch.allclose(part[[3, 2]], want, **EXACT) and not part[:2].any()


def test_step_leaves_rows_out():
    q, k, v, i, f, *state = (t.detach() for t in problem(seq=1))
    before = [t.clone() for t in state]
    rows = torch.tensor([-1, 0], dtype=torch.int32)
    h = reference.mlstm_step(*(x[:, 0] for x in (q, k, v, i, f)), tuple(state), state_indices=rows)
    assert not h[0].any() and h[1].any()
    assert all(
        torch.equal(t[1], was[1]) and not torch.equal(t[0], was[0]) for t, was in zip(state, before, strict=True)
    )


@pytest.mark.parametrize("form", [reference.mlstm_recurrent, *FORMS.values()])
def test_runs_in_narrow_dtypes(form):
    inputs = problem()
    expected = results(reference.mlstm_recurrent, inputs)
    narrow = [t.detach().bfloat16() for t in inputs[:3]] + [t.detach().float() for t in inputs[3:]]
    h, *last = results(form, narrow)
    assert h.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in last)
    assert (h.double() - expected[0]).norm() <= 2e-2 * expected[0].norm()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_padding(cap):
    q, k, v, i, f, *state = (t.detach() for t in problem(seq=20))
    kept = torch.arange(20) % 3 != 1
    i[:, ~kept], f[:, ~kept] = -torch.inf, torch.inf
    for form in (reference.mlstm_recurrent, reference.mlstm_chunkwise):
        options = {"initial_state": tuple(state), "gate_soft_cap": cap, "return_final_state": True}
        h, last = form(q, k, v, i, f, **options)
        own, mine = form(*(t[:, kept] for t in (q, k, v, i, f)), **options)
        assert h.isfinite().all() and torch.allclose(h[:, kept], own, **EXACT)
        assert all(torch.allclose(a, b, **EXACT) for a, b in zip(last, mine, strict=True))
