from __future__ import annotations

import pytest
import torch

from flash_xlstm import _C, build_info, ops
from flash_xlstm.ops import kernel_for

OPS = [name for name in ops.__all__ if name.islower() and name != "kernel_for"]


@pytest.mark.parametrize("op", OPS)
def test_names_the_instruction_set_on_the_cpu(op):
    assert kernel_for(op, "cpu") == f"CPU, {build_info()['cpu_isa']}"
    assert kernel_for(op, torch.device("cpu")) == kernel_for(op, "cpu")


@pytest.mark.parametrize("op", OPS)
def test_says_where_there_is_none(op):
    assert kernel_for(op, "meta").startswith("none: flash-xlstm has kernels for CPU and CUDA")


WITH_CUDA = pytest.mark.skipif(not build_info()["cuda"], reason="asks C++ for what a CPU-only build lacks")


@pytest.mark.skipif(bool(build_info()["cuda"]), reason="a build with CUDA kernels")
@pytest.mark.parametrize("op", OPS)
def test_says_when_cuda_was_not_built(op):
    assert kernel_for(op, "cuda") == "none: built without CUDA kernels"


@WITH_CUDA
@pytest.mark.parametrize("op", OPS)
def test_says_when_torch_sees_no_such_gpu(op):
    count = torch.cuda.device_count()
    assert kernel_for(op, f"cuda:{count}") == f"none: torch sees {count} GPUs"


@WITH_CUDA
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_needs_ampere(op, capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    kernel = kernel_for(op, "cuda")
    assert kernel.startswith("CUDA, ") if has else kernel.startswith("none: ") and "8.0" in kernel


@pytest.mark.cuda
@pytest.mark.parametrize("op", OPS)
def test_names_a_kernel_on_this_gpu(op):
    assert kernel_for(op, "cuda").startswith("CUDA, ")


@pytest.mark.skipif("90a" not in build_info()["architectures"], reason="built without Hopper kernels")
@pytest.mark.parametrize("op", ["mlstm", "slstm", "linear_rows"])
def test_names_the_hopper_kernels(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, has in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert ("Hopper" in kernel_for(op, "cuda")) == has


def test_every_op_says_which_kernel_it_takes():
    assert _C.ops() == sorted(OPS)


@pytest.mark.parametrize("op", ["mlstm_backward", "", None])
def test_unknown_op(op):
    with pytest.raises(ValueError, match="it must be one of causal_conv1d, "):
        kernel_for(op, "cpu")
