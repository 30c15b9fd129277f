"""Products after a kernel that lets the next kernel start, sleeps, and then writes the products' inputs."""

from __future__ import annotations

import functools

import pytest
import torch

from flash_xlstm.nn import FeedForward, linear, mLSTMBlock, mLSTMLayer

pytestmark = pytest.mark.cuda

SOURCE = r"""
extern "C" __global__ void late_writer(unsigned short* to, int count, int value, long long cycles) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
  for (int x = blockIdx.x * blockDim.x + threadIdx.x; x < count; x += gridDim.x * blockDim.x) {
    to[x] = static_cast<unsigned short>(value);
  }
}
"""
ONE = 0x3F80  # 1 as bfloat16


@functools.cache
def late_writer():
    if not hasattr(torch.cuda, "_compile_kernel"):
        pytest.skip("this torch compiles no kernels from source")
    return torch.cuda._compile_kernel(SOURCE, "late_writer")


def write_late(t, value=ONE, milliseconds=2):
    late_writer()((8, 1, 1), (256, 1, 1), (t, t.numel(), value, int(milliseconds * 1.5e6)))


def test_the_writer_is_late():
    t = torch.zeros(1024, dtype=torch.bfloat16, device="cuda")
    write_late(t)
    assert (t == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_linear(rows):
    layer = torch.nn.Linear(2048, 2048, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.ones(1, rows, 2048, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        layer.weight.zero_()
        linear(layer, x)
        torch.cuda.synchronize()
        write_late(layer.weight)
        assert (linear(layer, x) == 2048).all()


@torch.no_grad()
@pytest.mark.parametrize("part", ["q", "out_proj", "proj_up", "proj_down", "igate_preact"])
def test_block_step(part):
    torch.manual_seed(0)
    layer, ffn = mLSTMLayer(512, 4, qk_dim=256, v_dim=512), FeedForward(512, 1408)
    block = mLSTMBlock(512, layer, ffn).cuda().bfloat16()
    weight = next(m for name, m in block.named_modules() if name.endswith(part)).weight
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    shapes = (1, 4, 64, 128), (1, 4, 64), (1, 4)
    state = lambda: tuple(torch.zeros(shape, device="cuda") for shape in shapes)  # noqa: E731
    before, zero = weight.clone(), state()
    weight.fill_(1)
    expected, _ = block(x, state(), inplace=True, return_state=True)
    weight.copy_(before)
    block(x, state(), inplace=True)
    for _ in range(3):
        weight.copy_(before)
        torch.cuda.synchronize()
        write_late(weight)
        y, _ = block(x, zero, inplace=True, return_state=True)
        assert torch.equal(y, expected)
        zero = state()


@torch.no_grad()
def test_state_of_a_block_step():
    torch.manual_seed(0)
    layer, ffn = mLSTMLayer(512, 4, qk_dim=256, v_dim=512), FeedForward(512, 1408)
    block = mLSTMBlock(512, layer, ffn).cuda().bfloat16()
    x = torch.randn(1, 1, 512, device="cuda", dtype=torch.bfloat16)
    shapes = (1, 4, 64, 128), (1, 4, 64), (1, 4)
    make = lambda value: tuple(  # noqa: E731
        torch.full(s, v, device="cuda", dtype=d)
        for s, v, d in zip(shapes, (value, 1, 0), (torch.bfloat16, torch.float32, torch.float32), strict=True)
    )
    expected = block(x, make(1), inplace=True)[0]
    block(x, make(0), inplace=True)
    for _ in range(3):
        state = make(0)
        torch.cuda.synchronize()
        write_late(state[0])
        assert torch.equal(block(x, state, inplace=True)[0], expected)
