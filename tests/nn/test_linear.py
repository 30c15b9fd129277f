from __future__ import annotations

import pytest
import torch

from flash_xlstm.nn import linear


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that the op takes."""
    seen = []
    original = torch.ops.flash_xlstm.linear_rows
    call = lambda *args, **options: seen.append(args) or original(*args, **options)  # noqa: E731
    monkeypatch.setattr("flash_xlstm.ops.linear_rows", call)
    return seen


@pytest.fixture
def layer(device):
    torch.manual_seed(0)
    return torch.nn.Linear(64, 24).to(device, torch.bfloat16)


def _x(device, rows, dtype=torch.bfloat16):
    return torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def test_few_rows_without_gradients_take_the_op(device, layer, calls):
    x = _x(device, 2)
    with torch.no_grad():
        y = linear(layer, x)
    assert len(calls) == 1
    assert (y - layer(x)).norm() < 1e-2 * y.norm()


def test_everything_else_takes_the_layer(device, layer, calls):
    x = _x(device, 2)
    assert linear(layer, x).requires_grad
    with torch.no_grad():
        linear(layer, _x(device, 17))
        with torch.autocast(device, torch.bfloat16):
            linear(layer, x)
        linear(torch.nn.Sequential(layer), x)
        with pytest.raises(RuntimeError):  # torch's own error for mixed dtypes
            linear(layer, x.half())
        hook = layer.register_forward_hook(lambda module, args, y: y + 1)
        assert torch.equal(linear(layer, x), layer(x))
        hook.remove()
        linear(layer.double(), x.double())
    assert not calls
