from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_xlstm._build import few_rows
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
        linear(layer, _x(device, few_rows(device)[1] + 1))
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


def _half(function):
    return lambda *args, **options: function(*args, **options) / 2


class _HalfParameter(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


class _HalfTensor(torch.Tensor):
    """Halves the products of a layer."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs or {})
        return y / 2 if function is F.linear else y


class _HalfMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return y / 2 if function is F.linear else y


class _HalfDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        return y / 2 if "mm" in str(function) else y


@contextlib.contextmanager
def _registered(handle):
    yield
    handle.remove()


def _accelerate_hook(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hook = hooks.ModelHook()
    hook.post_forward = lambda module, output: output / 2
    hooks.add_hook_to_module(layer, hook)


def _half_weight(layer, x):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(_HalfTensor), requires_grad=False)


# Ways to halve the output of a layer without bias. Each is called with (layer, x) and returns a context or None.
_CHANGES = {
    "forward of the instance": lambda layer, x: setattr(layer, "forward", _half(layer.forward)),
    "call of the instance": lambda layer, x: setattr(layer, "_call_impl", _half(layer._call_impl)),
    "accelerate's hook": lambda layer, x: _accelerate_hook(layer),
    "hook": lambda layer, x: _registered(layer.register_forward_hook(lambda m, args, y: y / 2)),
    "hook before": lambda layer, x: _registered(layer.register_forward_pre_hook(lambda m, args: (args[0] / 2,))),
    "hook with keywords": lambda layer, x: _registered(
        layer.register_forward_hook(lambda m, args, kwargs, y: y / 2, with_kwargs=True)
    ),
    "hook always called": lambda layer, x: _registered(
        layer.register_forward_hook(lambda m, args, y: y / 2, always_call=True)
    ),
    "hook of all": lambda layer, x: _registered(module.register_module_forward_hook(lambda m, args, y: y / 2)),
    "hook before all": lambda layer, x: _registered(
        module.register_module_forward_pre_hook(lambda m, args: (args[0] / 2,))
    ),
    "forward of the class": lambda layer, x: mock.patch.object(
        torch.nn.Linear, "forward", lambda self, x: F.linear(x, self.weight) / 2
    ),
    "call of all modules": lambda layer, x: mock.patch.object(
        torch.nn.Module, "__call__", lambda self, *args: self.forward(*args) / 2
    ),
    "torch's function": lambda layer, x: mock.patch.object(F, "linear", _half(F.linear)),
    "subclass": lambda layer, x: setattr(
        layer, "__class__", type("Half", (torch.nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight) / 2})
    ),
    "parametrization": lambda layer, x: (
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", _HalfParameter()) and None
    ),
    "tensor class of the weight": _half_weight,
    "function mode": lambda layer, x: _HalfMode(),
    "dispatch mode": lambda layer, x: _HalfDispatch(),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
@torch.no_grad()
def test_what_changes_the_layer_is_seen(device, calls, change):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 24, bias=False).to(device, torch.bfloat16), _x(device, 2)
    expected = linear(layer, x) / 2
    assert len(calls) == 1
    with change(layer, x) or contextlib.nullcontext():
        y = linear(layer, x)
    assert (y - expected).norm() <= 1e-2 * expected.norm()
    assert len(calls) == 1


def test_a_bias_of_another_kind_is_seen(device, calls, layer):
    x = _x(device, 2)
    expected = layer(x).detach()
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias  # an attribute in place of a parameter, as torch's pruning makes
    with torch.no_grad():
        assert torch.equal(linear(layer, x), expected)
    assert not calls


@torch.no_grad()
def test_what_looks_on_sees_torchs_own_product(device, layer, calls):
    layer.requires_grad_(False)
    x = _x(device, 2)
    with FlopCounterMode(display=False) as counter:
        linear(layer, x)
    assert counter.get_total_flops() == 2 * 2 * 64 * 24
    traced = torch.jit.trace(lambda x: linear(layer, x), (x,), check_trace=False)
    assert traced(_x(device, 20)).shape == (1, 20, 24)
    y, tangent = torch.func.jvp(lambda x: linear(layer, x), (x,), (x,))
    assert torch.equal(tangent + layer.bias, y) or (tangent + layer.bias - y).norm() < 1e-2 * y.norm()
    with forward_ad.dual_level():
        dual = linear(layer, forward_ad.make_dual(x, x))
        assert forward_ad.unpack_dual(dual).tangent.norm() > 0
    assert torch.func.vmap(lambda x: linear(layer, x))(x).shape == (1, 2, 24)
    assert torch.func.functional_call(layer, {"weight": 0 * layer.weight}, (x,)).equal(layer.bias.expand(1, 2, 24))
    assert not calls


@torch.no_grad()
@pytest.mark.parametrize("weight", [lambda w: w.t().contiguous().t(), lambda w: w.to_sparse_csr()], ids=["t", "sparse"])
def test_weights_of_another_layout_take_the_layer(calls, weight):
    layer = torch.nn.Linear(64, 24, bias=False)
    x = _x("cpu", 2, torch.float32)[0]
    expected = layer(x)
    layer.weight = torch.nn.Parameter(weight(layer.weight.detach()), requires_grad=False)
    assert torch.allclose(linear(layer, x), expected, atol=1e-5)
    assert not calls


@torch.no_grad()
def test_a_default_device_changes_nothing(device, layer, calls):
    x = _x(device, 2)
    with torch.device(device):
        linear(layer, x)
    linear(layer, x[:0])
    assert len(calls) == 2
