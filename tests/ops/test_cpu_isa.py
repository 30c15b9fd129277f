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
