from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils

from flash_xlstm import ops, reference

# The result of a float32 computation rounded once: half a unit in the last place, and a few of float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(device, *shape, dtype=torch.float32, seed=0, size=1.0):
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def assert_close(actual, expected, dtype):
    """Element by element."""
    tiny = torch.finfo(dtype).smallest_normal
    wrong = (actual.double() - expected).abs() > 1.01 * TOLERANCE[dtype] * expected.abs() + tiny
    assert actual.dtype == dtype and not wrong.any(), f"{wrong.sum()} of {wrong.numel()}"


@DTYPES
@pytest.mark.parametrize("cap", [0.5, 15.0, 30.0, 1e-3, 1e4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_value_and_gradient(device, dtype, cap, size):
    x = normal(device, 3, 1001, dtype=dtype, size=size).requires_grad_()
    y = ops.soft_cap(x, cap)
    assert_close(y.detach(), reference.soft_cap(x.detach().double(), cap), dtype)
    dy = normal(device, 3, 1001, dtype=dtype, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy)
    slope = 1 - torch.tanh(x.detach().double() / cap) ** 2
    # Where tanh is next to 1, 1 - tanh^2 in float32 is known to a unit of 1.
    error = (dx.double() - dy.double() * slope).abs()
    assert (error <= TOLERANCE[dtype] * (dy.double() * slope).abs() * 1.01 + 4e-7 * dy.double().abs() + 6e-8).all()


def test_gradient_is_the_slope(device):
    """Against differences of the op's own values."""
    x, step = torch.linspace(-40, 40, 401, device=device), 1e-2
    slope = (ops.soft_cap(x + step, 15.0).double() - ops.soft_cap(x - step, 15.0).double()) / (2 * step)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(ops.soft_cap(x, 15.0).sum(), x)
    assert (dx.double() - slope).abs().max() < 5e-4


@DTYPES
def test_extremes(device, dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 6e4, -6e4], dtype=dtype, device=device)
    x.requires_grad_()
    y = ops.soft_cap(x, 15.0)
    expected = [15.0, -15.0, torch.nan, 0.0, 15.0, -15.0]
    assert torch.equal(y.detach().float().nan_to_num(99.0), torch.tensor(expected, device=device).nan_to_num(99.0))
    (dx,) = torch.autograd.grad(y.sum(), x)
    slopes = torch.tensor([0.0, 0.0, torch.nan, 1.0, 0.0, 0.0], device=device)
    assert torch.equal(dx.float().nan_to_num(99.0), slopes.nan_to_num(99.0))


def test_stays_within_the_cap(device):
    x = normal(device, 10_000, size=100.0)
    assert ops.soft_cap(x, 15.0).abs().max() <= 15.0


def test_no_cap_returns_x(device):
    x = normal(device, 5)
    assert ops.soft_cap(x, None) is x


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (2, 3, 4, 5), (70_001,)], ids=str)
def test_shapes(device, shape):
    x = normal(device, *shape)
    y = ops.soft_cap(x, 2.0)
    assert y.shape == x.shape
    assert_close(y, reference.soft_cap(x.double(), 2.0), torch.float32)


@DTYPES
def test_strides(device, dtype):
    base = normal(device, 6, 10, 8, dtype=dtype)
    for x in (base.transpose(0, 2), base[::2, 1:, ::3], base[:1].expand(4, -1, -1)):
        x = x.detach().requires_grad_()
        y = ops.soft_cap(x, 2.0)
        assert torch.equal(y, ops.soft_cap(x.contiguous(), 2.0))
        dy = normal(device, *reversed(y.shape), dtype=dtype, seed=1).permute(2, 1, 0)
        (dx,) = torch.autograd.grad(y, x, dy)
        dense = x.detach().contiguous().requires_grad_()
        (expected,) = torch.autograd.grad(ops.soft_cap(dense, 2.0), dense, dy.contiguous())
        assert torch.equal(dx, expected)


@DTYPES
def test_writes_everything_and_repeats_itself(device, nan_memory, dtype):
    x = normal(device, 40_003, dtype=dtype).requires_grad_()

    def run():
        y = ops.soft_cap(x, 2.0)
        return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]

    first = run()
    with nan_memory():
        second = run()
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("x", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)
def test_opcheck(device, x):
    for t in (normal(device, 4, 5, **x), normal(device, 5, 4, **x).t(), normal(device, 0, **x), normal(device, **x)):
        torch.library.opcheck(torch.ops.flash_xlstm.soft_cap, (t.detach().requires_grad_(), 2.0))
        torch.library.opcheck(torch.ops.flash_xlstm.soft_cap_backward, (torch.ones_like(t), t, 2.0))


def test_double_backward_raises(device):
    x = normal(device, 5).requires_grad_()
    (dx,) = torch.autograd.grad(ops.soft_cap(x, 2.0).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def test_compiles_once_for_every_shape(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: ops.soft_cap(2 * x, 3.0), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((3, 5), (2, 70), (64, 9)):
        x = normal(device, rows, columns).requires_grad_()
        y = compiled(x)
        assert torch.equal(y, ops.soft_cap(2 * x, 3.0))
        assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, ops.soft_cap(2 * x, 3.0))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.soft_cap(x, 3.0)

    program = torch.export.export(
        Module(), (normal(device, 4, 5),), dynamic_shapes=[{0: torch.export.Dim("rows", min=2)}]
    )
    x = normal(device, 9, 5)
    assert torch.equal(program.module()(x), ops.soft_cap(x, 3.0))


def test_autocast_leaves_x_its_dtype(device):
    x = normal(device, 5)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(ops.soft_cap(x, 3.0), ops.soft_cap(x, 3.0)) and ops.soft_cap(x, 3.0).dtype == torch.float32


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_caps(device, cap, compiled):
    torch._dynamo.reset()
    form = torch.compile(ops.soft_cap, fullgraph=True, backend="aot_eager") if compiled else ops.soft_cap
    with pytest.raises(ValueError, match=r"^cap is .*finite and greater than 0"):
        form(normal(device, 3), cap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_dtypes(device, dtype, compiled):
    torch._dynamo.reset()
    form = torch.compile(ops.soft_cap, fullgraph=True, backend="aot_eager") if compiled else ops.soft_cap
    with pytest.raises(TypeError, match=r"^x has dtype .*float32, bfloat16 or float16"):
        form(torch.zeros(3, dtype=dtype, device=device), 1.0)


def test_bad_gradients(device):
    x = normal(device, 3)
    backward = torch.ops.flash_xlstm.soft_cap_backward
    with pytest.raises(ValueError, match=r"^dy has shape"):
        backward(normal(device, 4), x, 1.0)
    with pytest.raises(TypeError, match=r"^dy has dtype"):
        backward(normal(device, 3, dtype=torch.bfloat16), x, 1.0)
    with pytest.raises(ValueError, match=r"^cap is"):
        backward(x, x, -1.0)
