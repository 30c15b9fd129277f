"""The repository that `make kernels` builds, by Hugging Face's package `kernels`; `make test-kernels` runs this."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from flash_xlstm import ops

kernels = pytest.importorskip("kernels")
if "KERNEL_REPOSITORY" not in os.environ:
    pytest.skip("KERNEL_REPOSITORY names no repository; see `make test-kernels`", allow_module_level=True)
REPOSITORY = Path(os.environ["KERNEL_REPOSITORY"]).resolve()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernel():
    return kernels.get_local_kernel(REPOSITORY, backend=None if DEVICE == "cuda" else "cpu")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def cell_inputs(*lead):
    q, k, v = randn(*lead, 2, 8), randn(*lead, 2, 8), randn(*lead, 2, 16)
    return q, k, v, randn(*lead, 2), randn(*lead, 2) + 3.0


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_operators_have_a_namespace_of_their_own(kernel):
    name = kernel._ops.add_op_namespace_prefix("mlstm")
    assert name.startswith("_flash_xlstm_") and name.endswith("::mlstm")
    assert kernel._ops.ops.mlstm is not torch.ops.flash_xlstm.mlstm


@torch.no_grad()
def test_functions_are_the_packages(kernel):
    inputs = cell_inputs(3, 70)
    h, state = ops.mlstm(*inputs, return_final_state=True)
    equal(kernel.mlstm(*inputs), (h, state))
    token, states = cell_inputs(3), [tuple(t.clone() for t in state) for _ in range(2)]
    equal(kernel.mlstm_step(*token, states[0]), ops.mlstm_step(*token, states[1]))
    equal(states[0], states[1])
    x, R, b = randn(2, 9, 4, 2, 8), randn(4, 2, 8, 8), randn(4, 2, 8)
    h, state = ops.slstm(x, R, b, return_final_state=True)
    equal(kernel.slstm(x, R, b), (h, state))
    states = [tuple(t.clone() for t in state) for _ in range(2)]
    equal(kernel.slstm_step(x[:, 0], R, b, states[0]), ops.slstm_step(x[:, 0], R, b, states[1]))
    x, weight = randn(5, 32), randn(32)
    equal(kernel.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    equal(kernel.swiglu(x, x + 1), ops.swiglu(x, x + 1))


def test_wrong_calls_are_errors(kernel):
    with pytest.raises((ValueError, RuntimeError), match="weight"):  # torch 2.15 makes them all a RuntimeError
        kernel.rms_norm(randn(5, 32), randn(31))
    with pytest.raises(RuntimeError, match="no gradients"):
        kernel.swiglu(randn(5, 32).requires_grad_(), randn(5, 32))


@kernels.use_kernel_forward_from_hub("RMSNorm")
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(randn(32)), 1e-5

    def forward(self, hidden_states):
        return torch.rms_norm(hidden_states, (32,), self.weight, self.variance_epsilon)


@kernels.use_kernel_forward_from_hub("SiluAndMul")
class Gated(nn.Module):
    def forward(self, x):
        x, y = x.chunk(2, dim=-1)
        return torch.nn.functional.silu(x) * y


@kernels.use_kernel_forward_from_hub("mLSTM")
class Cell(nn.Module):
    def forward(self, q, k, v, i, f):
        raise AssertionError("not replaced")


def test_kernelize_takes_the_layers(kernel, monkeypatch):
    def layer(name):
        repository = kernels.LocalLayerRepository(REPOSITORY, layer_name=name)
        return {DEVICE: {kernels.Mode.INFERENCE: repository}}

    mapping = {name: layer(name) for name in ("RMSNorm", "SiluAndMul", "mLSTM")}
    model = nn.ModuleList([Norm(), Gated(), Cell()]).eval()
    x, inputs = randn(5, 32), cell_inputs(2, 70)
    with torch.no_grad():
        expected = model[0](x), model[1](x)
        with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
            model = kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device=DEVICE)
        assert type(model[0].forward.__self__) is Norm and "layers" in model[0].forward.__module__
        torch.testing.assert_close((model[0](x), model[1](x)), expected)
        equal(model[2](*inputs), ops.mlstm(*inputs))
