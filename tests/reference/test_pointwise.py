from __future__ import annotations

import pytest
import torch

from flash_xlstm import reference


def test_soft_cap():
    x = torch.linspace(-50, 50, 101, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reference.soft_cap(x, 15.0), 15 * torch.tanh(x / 15))
    assert torch.autograd.gradcheck(lambda t: reference.soft_cap(t, 15.0), x)
    assert reference.soft_cap(x, None) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_soft_cap_rounds_once(dtype):
    x = torch.linspace(-50, 50, 101).to(dtype)
    assert torch.equal(reference.soft_cap(x, 15.0), (15 * torch.tanh(x.float() / 15)).to(dtype))
