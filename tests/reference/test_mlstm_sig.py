from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from flash_xlstm import reference

FORMS = {
    "parallel": reference.mlstm_sig_parallel,
    "chunks of 64": reference.mlstm_sig_chunkwise,
    "chunks of 7": lambda *a, **b: reference.mlstm_sig_chunkwise(*a, chunk_size=7, **b),
}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
NORMALIZE = pytest.mark.parametrize("normalize", [True, False])


def problem(seq=70, batch=2, heads=2, dqk=5, dv=7, gates=1.0, states=None, normalize=True):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = (normal(batch, seq, heads, dim) for dim in (dqk, dqk, dv))
    i, f = (normal(batch, seq, heads) * gates for _ in range(2))
    states = batch if states is None else states
    state = [normal(states, heads, dqk, dv), *([normal(states, heads, dqk)] if normalize else [])]
    return [t.requires_grad_() for t in (q, k, v, i, f, *state)]


def results(form, inputs, **options):
    """h and the final state, of (c, n), or (c,) without a normalizer."""
    c, n = (*inputs[5:], None)[:2]
    h, last = form(*inputs[:5], initial_state=(c, n), normalize=n is not None, return_final_state=True, **options)
    assert (last[1] is None) == (n is None)
    return [h, *last] if n is not None else [h, last[0]]


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    return torch.autograd.grad(
        outputs, inputs, [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    )


@NORMALIZE
@pytest.mark.parametrize("options", [{}, {"eps": 0.1, "scale": 2.0}, {"gate_soft_cap": 2.0}], ids=str)
@pytest.mark.parametrize("gates", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("form", FORMS)
def test_forms_agree_in_values_and_gradients(form, gates, options, normalize):
    inputs = problem(gates=gates, normalize=normalize)
    expected = results(reference.mlstm_sig_recurrent, inputs, **options)
    actual = results(FORMS[form], inputs, **options)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, **EXACT)
    for a, b in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


@NORMALIZE
def test_the_definition(normalize):
    """The recurrence of c and n in sigmoids, with no log and no stabilizer."""
    q, k, v, i, f, c, *n = problem(seq=5, normalize=normalize)
    h, *last = results(reference.mlstm_sig_recurrent, [q, k, v, i, f, c, *n], scale=1.5, eps=0.25)
    n = n[0] if normalize else None
    for t in range(5):
        keep, take = torch.sigmoid(f[:, t]), torch.sigmoid(i[:, t])
        c = keep[..., None, None] * c + take[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        want = 1.5 * torch.einsum("bhk,bhkv->bhv", q[:, t], c)
        if normalize:
            n = keep[..., None] * n + take[..., None] * k[:, t]
            want = want / ((1.5 * (q[:, t] * n).sum(-1)).abs().clamp(min=1.0) + 0.25)[..., None]
        assert torch.allclose(h[:, t], want, **EXACT)
    for got, want in zip(last, (c, n), strict=False):
        assert torch.allclose(got, want, **EXACT)


def explicit_gradients(inputs, h, last, dh, dc, dn, scale, eps):
    """The gradient as the kernels take it: two scalars a token, and two identities for the gates."""
    q, k, v, i, f, c0, n0 = (t.detach() for t in inputs)
    q, k, v, h, dh = (t.detach().transpose(1, 2) for t in (q, k, v, h, dh))
    i, f = i.transpose(1, 2), f.transpose(1, 2)
    li, lf = F.logsigmoid(i), F.logsigmoid(f)
    b, seq = lf.cumsum(-1), lf.shape[-1]
    causal = torch.ones(seq, seq, dtype=torch.bool).tril()
    decay = torch.exp((b[..., :, None] - b[..., None, :] + li[..., None, :]).masked_fill(~causal, -torch.inf))
    w, g = scale * (q @ k.mT) * decay, torch.exp(b)
    s = w.sum(-1) + scale * g * (q @ n0[..., None])[..., 0]
    d = s.abs().clamp(min=1.0) + eps

    delta = -((dh * h).sum(-1) / d) * s.sign() * (s.abs() >= 1.0)
    r = dh / d[..., None]
    x = decay * (r @ v.mT + delta[..., None])
    wj = torch.exp(b[..., -1:] - b + li)
    dq = scale * x @ k + scale * g[..., None] * (r @ c0.mT + delta[..., None] * n0[..., None, :])
    dk = scale * x.mT @ q + wj[..., None] * (v @ dc.mT + dn[..., None, :])
    dv = w.mT @ r + wj[..., None] * (k @ dc)
    dc0 = g[..., -1, None, None] * dc + scale * (g[..., None] * q).mT @ r
    dn0 = g[..., -1, None] * dn + scale * ((g * delta)[..., None] * q).sum(-2)

    final = (last[0].detach() * dc).sum((-1, -2)) + (last[1].detach() * dn).sum(-1)
    dli = (k * dk).sum(-1)
    dlf = ((q * dq).sum(-1) - dli).flip(-1).cumsum(-1).flip(-1) + final[..., None]
    di, df = dli * torch.sigmoid(-i), dlf * torch.sigmoid(-f)
    return *(t.transpose(1, 2) for t in (dq, dk, dv, di, df)), dc0, dn0


@pytest.mark.parametrize("gates", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("eps", [1e-6, 0.1, 0.0])
def test_explicit_gradient(gates, eps):
    inputs, scale = problem(gates=gates), 0.6
    h, *last = outputs = results(reference.mlstm_sig_recurrent, inputs, scale=scale, eps=eps)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    expected = torch.autograd.grad(outputs, inputs, cotangents)
    for name, a, b in zip(
        "qkvifcn", explicit_gradients(inputs, h, last, *cotangents, scale, eps), expected, strict=True
    ):
        assert (a - b).norm() <= 1e-9 * b.norm(), name


@NORMALIZE
@pytest.mark.parametrize("form", [reference.mlstm_sig_recurrent, *FORMS.values()])
def test_packed_equals_separate_calls(form, normalize):
    offsets = (0, 1, 1, 40, 70)
    inputs = problem(batch=1, states=4, normalize=normalize)
    h, *last = results(form, inputs, cu_seqlens=torch.tensor(offsets))
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        state = [t[s : s + 1] for t in inputs[5:]]
        if start == stop:
            assert all(torch.equal(t[s : s + 1], first) for t, first in zip(last, state, strict=True))
            continue
        own, *mine = results(form, [*(t[:, start:stop] for t in inputs[:5]), *state])
        assert torch.allclose(h[:, start:stop], own, **EXACT)
        assert all(torch.allclose(t[s : s + 1], part, **EXACT) for t, part in zip(last, mine, strict=True))


@NORMALIZE
@pytest.mark.parametrize("gate_soft_cap", [None, 3.0])
def test_padding(gate_soft_cap, normalize):
    q, k, v, i, f, *state = (t.detach() for t in problem(seq=20, normalize=normalize))
    kept = torch.arange(20) % 3 != 1
    i[:, ~kept], f[:, ~kept] = -torch.inf, torch.inf
    for form in (reference.mlstm_sig_recurrent, reference.mlstm_sig_chunkwise):
        inputs = [t.requires_grad_() for t in (q, k, v, i, f, *state)]
        h, *last = results(form, inputs, gate_soft_cap=gate_soft_cap)
        own, *mine = results(form, [*(t[:, kept] for t in inputs[:5]), *state], gate_soft_cap=gate_soft_cap)
        assert h.isfinite().all() and torch.allclose(h[:, kept], own, **EXACT)
        assert all(torch.allclose(a, b, **EXACT) for a, b in zip(last, mine, strict=True))
        _, dk, _, di, df = gradients([h], inputs[:5])
        assert not any(t[:, ~kept].any() for t in (dk, di, df))
