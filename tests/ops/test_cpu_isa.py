"""The CPU kernels in every instruction set that this machine has, not only in the best one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
import torch
from flash_xlstm import build_info, ops, reference

torch.manual_seed(0)
q, k, v = torch.randn(2, 200, 2, 16), torch.randn(2, 200, 2, 16), torch.randn(2, 200, 2, 24)
i, f = torch.randn(2, 200, 2), torch.randn(2, 200, 2)
padding = torch.arange(200) < torch.tensor([3, 130])[:, None]
i[padding], f[padding] = -torch.inf, torch.inf
dh = torch.randn(2, 200, 2, 24)
dh[padding] = 0.0


def results(form, dtype):
    inputs = [t.to(dtype).requires_grad_() for t in (q, k, v, i, f)]
    h = form(*inputs)
    return [h, *torch.autograd.grad(h, inputs, dh.to(dtype))]


for form, plain in ((ops.mlstm, reference.mlstm_chunkwise), (ops.mlstm_sig, reference.mlstm_sig_chunkwise)):
    got, want = results(form, torch.float32), results(plain, torch.float64)
    for name, a, b in zip(("h", "dq", "dk", "dv", "di", "df"), got, want):
        error = (a.double() - b).norm() / b.norm()
        assert error <= 1e-5, (form.__name__, name, float(error))

# dims of no, of one and of several registers and panels, rows of every tile
for rows, dim in ((1, 5), (2, 16), (3, 40), (7, 72), (26, 33)):
    x, R, b = torch.randn(rows, 9, 4, 2, dim), torch.randn(4, 2, dim, dim) * dim**-0.5, torch.randn(4, 2, dim)
    padding = torch.arange(9) < (torch.arange(rows) % 5)[:, None]
    x[:, :, 0][padding], x[:, :, 1][padding] = -torch.inf, torch.inf
    dh = torch.randn(rows, 9, 2, dim)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        values = []
        for form, wide in ((ops.slstm, dtype), (reference.slstm, torch.float64)):
            inputs = [t.to(dtype).to(wide).detach().requires_grad_() for t in (x, R, b)]
            h = form(*inputs)
            values.append([h, *torch.autograd.grad(h, inputs, dh.to(dtype).to(wide))])
        for name, a, want in zip(("h", "dx", "dR", "db"), *values):
            error = (a.double() - want).norm() / want.norm()
            assert error <= bound, ("slstm", rows, dim, dtype, name, float(error))
    state = [torch.zeros(rows, 2, dim) for _ in range(4)]
    for t in range(9):
        step = ops.slstm_step(x[:, t], R, b, state)
    error = (step - ops.slstm(x, R, b)[:, -1]).norm() / step.norm()
    assert error <= 1e-5, ("slstm_step", rows, dim, float(error))
print(build_info()["cpu_isa"])
"""


def _run(program, isa):
    environment = {**os.environ, "FLASH_XLSTM_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_exact_with_fewer_instructions(isa):
    done = _run(_PROGRAM, isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().lower() in (isa, "baseline")


def test_an_empty_limit_is_none():
    program = "import flash_xlstm; print(flash_xlstm.build_info()['cpu_isa'])"
    assert _run(program, "").stdout == _run(program, "avx512").stdout != ""


def test_an_unknown_instruction_set_is_an_error():
    done = _run("import flash_xlstm.ops", "avx-2")
    assert "ValueError: FLASH_XLSTM_CPU_ISA is 'avx-2'; it must be baseline, avx2 or avx512" in done.stderr
