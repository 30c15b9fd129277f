"""Casts to float8: the plain form, bit for bit, which is torchao's; sizes, layouts and parts; and what is refused."""

import pytest
import torch

from flash_xlstm import reference
from flash_xlstm.ops.float8 import float8_cast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix(rows, columns, dtype, device):
    """Rows of very different sizes, with zeros, and with what is not finite where there is room for it."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    x = torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).mul(4).exp2()
    if rows > 20 and columns > 20:
        x[2] = 0
        x[:, 6] = -0.0
        x[5, 3], x[9, 2], x[7, 1] = torch.inf, -torch.inf, torch.nan
        x[11] *= 1e-20
    return x.to(device, dtype)


def same(got, expected):
    """Bit for bit, except for the signs of NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    got, expected = got.float().cpu(), expected.float().cpu()
    signs = (t.signbit() & ~t.isnan() for t in (got, expected))
    return torch.equal(got.nan_to_num(1e30), expected.nan_to_num(1e30)) and torch.equal(*signs)


def check(x, form, x_of_all=None):
    whole = x[0] if x_of_all is None else x_of_all
    rows, row_scales, columns, column_scales = float8_cast(x, True, True)
    expected, scales = form(whole, 1)
    assert same(rows, expected) and same(row_scales, scales)
    expected, scales = form(whole, 0)
    assert same(columns, expected.t()) and same(column_scales, scales.t())
    assert rows.is_contiguous() and columns.is_contiguous()
    alone = *float8_cast(x, True, False)[:2], *float8_cast(x, False, True)[2:]
    assert all(same(a, b) for a, b in zip(alone, (rows, row_scales, columns, column_scales), strict=True))


# On CUDA: rows of one and of several thousand elements, of which a block takes one, several or a part; odd sizes, which
# go by single elements; and rows that are longer than a block's registers.
SIZES = [(1, 1), (3, 5), (24, 48), (33, 130), (64, 64), (200, 264), (129, 1032), (16, 4096), (40, 25000), (300, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", SIZES)
def test_values_and_scales(device, rows, columns, dtype):
    x = matrix(rows, columns, dtype, device)
    check([x], reference.float8.float8_cast)


@pytest.mark.cuda
@pytest.mark.parametrize("rows, columns", [(8192, 4096), (8192, 10944), (2048, 21888), (12288, 4096), (3000, 24576)])
def test_large(rows, columns):
    x = matrix(rows, columns, torch.bfloat16, "cuda")
    check([x], reference.float8.float8_cast)
    first, second = float8_cast([x], True, True), float8_cast([x], True, True)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_parts(device, dtype):
    for columns, start in ((64, 16), (64, 3), (50, 0)):
        wide = matrix(160, columns + 32, dtype, device)
        x = wide[:, start : start + columns]
        check([x], reference.float8.float8_cast)
        for sizes in ([160], [32, 128], [64, 64, 16, 16], [1, 150, 9]):
            check(list(x.split(sizes)), reference.float8.float8_cast, x)
    check([x.t()], reference.float8.float8_cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_largest_value(device, dtype):
    x = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None].to(device)
    check([x], reference.float8.float8_cast)
    check([x.t().contiguous()], reference.float8.float8_cast)


def test_largest_values_at_which_the_logarithm_rounds(device):
    """A little above 1.75 times a power of 2, where the scale is next to one."""
    at = (torch.arange(-60, 120).float().exp2() * 1.75).view(torch.int32)
    x = (at[:, None] + torch.arange(1, 600, 7, dtype=torch.int32)).view(torch.float32).reshape(-1, 1).to(device)
    check([x], reference.float8.float8_cast)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao(device, dtype):
    float8 = pytest.importorskip("torchao.float8.float8_scaling_utils", reason="torchao is not installed")
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_training_tensor import LinearMMConfig

    def cast(x, dim):
        t = float8.hp_tensor_to_float8_dynamic(
            x,
            torch.float8_e4m3fn,
            LinearMMConfig(),
            scaling_granularity=ScalingGranularity.AXISWISE,
            axiswise_dim=0 if dim == 0 else -1,
            round_scales_to_power_of_2=True,
        )
        return t._data, t._scale.reciprocal()

    for rows, columns in SIZES:
        check([matrix(rows, columns, dtype, device)], cast)


def test_compile_and_autograd_know_it(device):
    x = [matrix(16, 48, torch.bfloat16, device) for _ in range(2)]  # finite: opcheck compares NaN as unequal
    for by_row, by_column in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.flash_xlstm.float8_cast, (x, by_row, by_column))
    x[1].requires_grad_()
    scales = torch.ops.flash_xlstm.float8_cast(x, True, False)[1]
    with pytest.raises(RuntimeError, match="double backward"):
        scales.sum().backward()


def test_what_is_wrong_is_named():
    x = torch.randn(4, 6)
    for arguments, message in (
        (([x] * 5, True, True), "x has 5 tensors"),
        (([x], False, False), "by_row and by_column are both False"),
        (([x[0]], True, True), r"x\[0\] has shape \(6,\); it must be \(rows, columns\)"),
        (([x, x[:, 1:]], True, True), r"x\[1\] has shape \(4, 5\); it must be \(rows, columns\) = \(any, 6\)"),
        (([x, x[:0]], True, True), r"x\[1\] has shape \(0, 6\); it must have elements"),
        (([x, x.half()], True, True), r"x\[1\] has dtype float16; it must be float32, as x\[0\]"),
        (([x.double()], True, True), r"x\[0\] has dtype float64; it must be float32, bfloat16 or float16"),
        (([x, x.to("meta")], True, True), r"x\[1\] is on meta; it must be on the device of x\[0\], cpu"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            float8_cast(*arguments)
