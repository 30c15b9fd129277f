from __future__ import annotations

import pytest
import torch

from flash_xlstm import reference
from flash_xlstm.reference.pointwise import cap_gate


def test_soft_cap():
    x = torch.linspace(-50, 50, 101, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reference.soft_cap(x, 15.0), 15 * torch.tanh(x / 15))
    assert torch.autograd.gradcheck(lambda t: reference.soft_cap(t, 15.0), x)
    assert reference.soft_cap(x, None) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_soft_cap_rounds_once(dtype):
    x = torch.linspace(-50, 50, 101).to(dtype)
    assert torch.equal(reference.soft_cap(x, 15.0), (15 * torch.tanh(x.float() / 15)).to(dtype))


def test_cap_gate_keeps_infinities():
    x = torch.tensor([-torch.inf, -3.0, 0.5, torch.inf], dtype=torch.float64, requires_grad=True)
    y = cap_gate(x, 2.0)
    assert torch.equal(y[1:3], reference.soft_cap(x[1:3], 2.0)) and torch.equal(y[[0, 3]], x[[0, 3]])
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(dx, torch.where(x.isinf(), 0.0, 1 - torch.tanh(x / 2) ** 2), rtol=1e-12)
    assert cap_gate(x, None) is x
