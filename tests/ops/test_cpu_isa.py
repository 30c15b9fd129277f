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
# Sizes with and without a rest behind whole vectors and blocks, and rows long enough to be copied before a product.
for dqk, dv in ((16, 24), (37, 300)):
    q, k, v = (torch.randn(2, 200, 2, dim).bfloat16() for dim in (dqk, dqk, dv))
    i, f = torch.randn(2, 200, 2), torch.randn(2, 200, 2)
    padding = torch.arange(200) < torch.tensor([3, 130])[:, None]
    i[padding], f[padding] = -torch.inf, torch.inf
    dh = torch.randn(2, 200, 2, dv).bfloat16()
    dh[padding] = 0.0

    def results(form, dtype):
        gate_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)] + [t.to(gate_dtype).requires_grad_() for t in (i, f)]
        h = form(*inputs)
        return [h, *torch.autograd.grad(h, inputs, dh.to(dtype))]

    for form, plain in ((ops.mlstm, reference.mlstm_chunkwise), (ops.mlstm_sig, reference.mlstm_sig_chunkwise)):
        want = results(plain, torch.float64)
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
            for name, a, b in zip(("h", "dq", "dk", "dv", "di", "df"), results(form, dtype), want):
                error = (a.double() - b).norm() / b.norm()
                assert error <= bound, (form.__name__, dtype, name, float(error))

# Without an input, m after one token is log sigmoid(f), to float32's rounding at every size.
f = torch.cat([torch.linspace(-60, 60, 4001), torch.tensor([-1e4, -750.0, -1e-8, 0.0, 1e-8, 88.0, 750.0, 1e4])])
q, i = torch.zeros(len(f), 1, 1, 8), torch.full((len(f), 1, 1), -torch.inf)
state = tuple(torch.zeros(len(f), 1, *dims) for dims in ((8, 8), (8,), ()))
for cap in (None, 15.0):
    last = ops.mlstm(q, q, q, i, f[:, None, None], gate_soft_cap=cap, initial_state=state, return_final_state=True)[1]
    gate = f.double() if cap is None else cap * torch.tanh(f.double() / cap)
    want = torch.nn.functional.logsigmoid(gate)
    error = (last[2].flatten().double() - want).abs()
    assert (error <= 6e-8 * want.abs() + 1e-45).all(), (cap, error.max())

# dims of no, of one and of several registers and panels, rows of every tile
for rows, dim in ((1, 5), (2, 16), (3, 40), (7, 72), (26, 33), (61, 64)):
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


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        ("baseline", ["baseline"]),
        ("avx2", ["AVX2", "baseline"]),
        ("avx512", ["AVX-512", "AVX2", "baseline"]),
        ("avx512_bf16", ["AVX-512 and BF16", "AVX-512", "AVX2", "baseline"]),
        ("amx", ["AVX-512 and AMX", "AVX-512 and BF16", "AVX-512", "AVX2", "baseline"]),
    ],
)
def test_exact_with_every_instruction_set(limit, names):
    done = _run(_PROGRAM, limit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in names


def test_an_empty_limit_is_none():
    program = "import flash_xlstm; print(flash_xlstm.build_info()['cpu_isa'])"
    assert _run(program, "").stdout == _run(program, "amx").stdout != ""


def test_an_unknown_instruction_set_is_an_error():
    done = _run("import flash_xlstm.ops", "avx-2")
    says = "ValueError: FLASH_XLSTM_CPU_ISA is 'avx-2'; it must be baseline, avx2, avx512, avx512_bf16 or amx"
    assert says in done.stderr
