from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from flash_xlstm import ops
from flash_xlstm._build import LIMITS
from flash_xlstm.ops import linear

# The supported dtypes of each device.
BF16 = torch.bfloat16
MOST = LIMITS["linear_max_rows"]
ROUNDING = {torch.float32: 2e-6, BF16: 2**-8, torch.float16: 2**-11}
CASES = [("cpu", dtype) for dtype in ROUNDING] + [pytest.param("cuda", BF16, marks=pytest.mark.cuda)]
EVERY = pytest.mark.parametrize(("place", "dtype"), CASES)


def normal(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(device, dtype, rows=3, size_in=64, size_out=40, bias=True):
    x, weight = normal(device, rows, size_in, dtype=dtype), normal(device, size_out, size_in, dtype=dtype, seed=1)
    return x, weight, normal(device, size_out, dtype=dtype, seed=2) if bias else None


def assert_exact(x, weight, bias):
    y = ops.linear_rows(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    scale = (x.double().abs() @ weight.double().abs().t()).clamp_min(1e-30)
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = (y.double() - exact).abs()
    assert (error <= ROUNDING[x.dtype] * exact.abs() + 3e-6 * scale).all()


@EVERY
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8, 9, 16])
@pytest.mark.parametrize(("size_in", "size_out"), [(8, 1), (64, 40), (1000, 33), (1096, 17), (4096, 24), (10944, 16)])
def test_matches_float64(place, dtype, rows, size_in, size_out):
    assert_exact(*arguments(place, dtype, rows, size_in, size_out, bias=rows % 2 == 0))


# Columns for every tile height of the Hopper kernel, and for several tiles a block. The last are for blocks of one
# tile, full and partial, which request all the weights that fit at once.
WIDE = [(200, 3000), (264, 6001), (72, 20003), (1096, 6200), (4096, 4096), (192, 2112), (960, 6336), (4160, 4200)]


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(("size_in", "size_out"), WIDE)
def test_many_columns(rows, size_in, size_out):
    assert_exact(*arguments("cuda", BF16, rows, size_in, size_out))


@EVERY
@pytest.mark.parametrize("rows", [3, 16])
def test_constant_weights_change_nothing(place, dtype, rows):
    x, weight, bias = arguments(place, dtype, rows, 1096, 333)
    expected = ops.linear_rows(x, weight, bias)
    for _ in range(3):  # one behind the other
        assert torch.equal(ops.linear_rows(x, weight, bias, constant_weights=True), expected)
    weights, biases = [weight, weight], [bias, None]
    expected = ops.fused_linear_rows(x, weights, biases, swiglu=True)
    assert torch.equal(ops.fused_linear_rows(x, weights, biases, swiglu=True, constant_weights=True)[0], expected[0])


@pytest.mark.parametrize("size_in", [1, 5, 31, 67, 515])
def test_any_length_on_the_cpu(size_in):
    for dtype in ROUNDING:
        assert_exact(*arguments("cpu", dtype, 5, size_in, 7))


@EVERY
def test_shapes_and_strides(place, dtype):
    x, weight, bias = arguments(place, dtype, 6)
    expected = ops.linear_rows(x, weight, bias)
    assert torch.equal(ops.linear_rows(x.view(2, 1, 3, 64), weight, bias), expected.view(2, 1, 3, 40))
    for row in range(6):  # alone as among others
        assert torch.equal(ops.linear_rows(x[row], weight, bias), expected[row])
    wide = torch.full((6, 99), torch.nan, device=place, dtype=dtype)
    for offset in (0, 8, 3):
        wide[:, offset : offset + 64] = x
        assert torch.equal(ops.linear_rows(wide[:, offset : offset + 64], weight, bias), expected)
    assert torch.equal(ops.linear_rows(x.t().contiguous().t(), weight, bias), expected)
    assert torch.equal(ops.linear_rows(x, weight.t().contiguous().t(), bias), expected)
    assert torch.equal(ops.linear_rows(x[:1].expand(6, 64), weight, bias), expected[:1].expand(6, 40))
    assert ops.linear_rows(x[:0], weight, bias).shape == (0, 40)
    assert ops.linear_rows(x, weight[:0], bias[:0]).shape == (6, 0)


@EVERY
def test_rows_do_not_depend_on_each_other(place, dtype):
    x, weight, bias = arguments(place, dtype, 8, 1096, 40)
    expected = ops.linear_rows(x, weight, bias)
    x[3] = torch.nan
    y = ops.linear_rows(x, weight, bias)
    assert y[3].isnan().all() and torch.equal(y[[0, 1, 2, 4, 5, 6, 7]], expected[[0, 1, 2, 4, 5, 6, 7]])


@EVERY
def test_repeats_itself(place, dtype):
    given = arguments(place, dtype, 16, 4096, 100)
    assert torch.equal(ops.linear_rows(*given), ops.linear_rows(*given))


@EVERY
def test_opcheck(place, dtype):
    for bias in (True, False):
        torch.library.opcheck(torch.ops.flash_xlstm.linear_rows, arguments(place, dtype, bias=bias))


@EVERY
def test_compiles(place, dtype):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, b: ops.linear_rows(2 * x, w, b), fullgraph=True, backend="aot_eager")
    x, weight, bias = arguments(place, dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight, bias), ops.linear_rows(2 * x, weight, bias))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_has_no_gradient_and_says_so(device, which):
    given = [t.requires_grad_(x == which) for x, t in enumerate(arguments(device, BF16))]
    with pytest.raises(RuntimeError, match=r"linear_rows has no gradient.*torch.no_grad\(\)"):
        ops.linear_rows(*given)
    with torch.no_grad():
        ops.linear_rows(*given)


ERRORS = {
    "too many rows": (
        {0: torch.zeros(MOST + 1, 64, dtype=BF16)},
        ValueError,
        f"x has {MOST + 1} rows; it must have at most {MOST}",
    ),
    "no features": ({0: torch.zeros(3, 0, dtype=BF16)}, ValueError, "x has shape"),
    "x in float64": ({0: torch.zeros(3, 64, dtype=torch.float64)}, TypeError, "x has dtype float64"),
    "weight of another length": ({1: torch.zeros(40, 63, dtype=BF16)}, ValueError, "weight has shape"),
    "weight in float32": ({1: torch.zeros(40, 64)}, TypeError, "weight has dtype float32"),
    "bias of another length": ({2: torch.zeros(41, dtype=BF16)}, ValueError, "bias has shape"),
    "bias in float32": ({2: torch.zeros(40)}, TypeError, "bias has dtype float32"),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors(device, wrong):
    changes, error, says = ERRORS[wrong]
    given = list(arguments(device, BF16))
    for place, t in changes.items():
        given[place] = t.to(device)
    with pytest.raises(error, match=f"^{says}"):
        ops.linear_rows(*given)


@pytest.mark.cuda
def test_errors_on_cuda():
    x, weight, bias = arguments("cuda", BF16)
    with pytest.raises(TypeError, match="on CUDA it must be bfloat16"):
        ops.linear_rows(x.float(), weight.float(), bias.float())
    with pytest.raises(ValueError, match="multiple of 8"):
        ops.linear_rows(x[:, :60].contiguous(), weight[:, :60].contiguous())
    with pytest.raises(ValueError, match="weight begins at no multiple of 16 bytes"):
        ops.linear_rows(x, torch.zeros(40 * 64 + 1, device="cuda", dtype=BF16)[1:].view(40, 64))
    with pytest.raises(ValueError, match="weight is on cpu"):
        ops.linear_rows(x, weight.cpu(), bias)
    with pytest.raises(ValueError, match=r"weights\[1\] begins at no multiple of 16 bytes; call weights\[1\].clone"):
        ops.fused_linear_rows(x, [weight, torch.zeros(40 * 64 + 1, device="cuda", dtype=BF16)[1:].view(40, 64)])


# --- with what is around them -----------------------------------------------------------------------------------------


def fused_in_float64(x, weights, biases, residual=None, swiglu=False):
    ys = [x.double() @ w.double().t() + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    if swiglu:
        ys = [torch.nn.functional.silu(ys[0]) * ys[1]]
    return ys if residual is None else [residual.double() + ys[0]]


def fused_arguments(device, dtype, rows, size_in, sizes_out, residual=False, bias=True):
    x = normal(device, rows, size_in, dtype=dtype)
    weights = [normal(device, out, size_in, dtype=dtype, seed=n) / size_in**0.5 for n, out in enumerate(sizes_out, 1)]
    biases = [normal(device, out, dtype=dtype, seed=9) if bias and n != 1 else None for n, out in enumerate(sizes_out)]
    options = {}
    if residual:
        options["residual"] = normal(device, rows, sizes_out[0], dtype=dtype, seed=8)
    return (x, weights, biases), options


@EVERY
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(
    ("size_in", "sizes_out", "more"),
    [
        (64, (40,), {"residual": True}),
        (72, (1,), {"residual": True}),
        (1096, (33, 16, 40, 7, 8, 64, 1, 17), {}),
        (4096, (24, 16), {}),
        (64, (40, 40), {"swiglu": True}),
        (1096, (33, 33), {"swiglu": True}),
        (2056, (8, 8), {"swiglu": True}),
    ],
)
def test_fused_matches_float64(place, dtype, rows, size_in, sizes_out, more):
    more = dict(more)
    residual = more.pop("residual", False)
    given, options = fused_arguments(place, dtype, rows, size_in, sizes_out, residual)
    got = ops.fused_linear_rows(*given, **options, **more)
    expected = fused_in_float64(*given, **options, **more)
    assert len(got) == len(expected)
    for y, exact in zip(got, expected, strict=True):
        assert y.dtype == dtype and y.shape == exact.shape
        # On the CPU each step rounds. A single column may be a small sum of large terms.
        assert (y.double() - exact).norm() <= 2.5 * ROUNDING[dtype] * (exact.norm() + (size_in == 72) * 8)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 16])
@pytest.mark.parametrize(
    ("size_in", "sizes_out", "more"),
    [
        (200, (3000,), {"residual": True}),
        (1096, (6200, 16, 300), {}),
        (72, (4001, 17, 9000, 1, 128), {}),
        (264, (3000, 3000), {"swiglu": True}),
        (72, (10001, 10001), {"swiglu": True}),
        (4096, (4096,), {"residual": True}),
        (960, (2112, 2100), {}),
    ],
)
def test_fused_many_columns(rows, size_in, sizes_out, more):
    test_fused_matches_float64("cuda", BF16, rows, size_in, sizes_out, more)


@EVERY
def test_fused_takes_strides_and_repeats_itself(place, dtype):
    (x, weights, biases), options = fused_arguments(place, dtype, 6, 64, (40,), True)
    (expected,) = ops.fused_linear_rows(x, weights, biases, **options)
    wide = torch.full((6, 99), torch.nan, device=place, dtype=dtype)
    for offset in (0, 8, 3):
        wide[:, offset : offset + 64] = x
        (y,) = ops.fused_linear_rows(wide[:, offset : offset + 64], weights, biases, **options)
        assert torch.equal(y, expected)
    options["residual"] = torch.stack([options["residual"]] * 2, 1)[:, 1]
    assert torch.equal(ops.fused_linear_rows(x, weights, biases, **options)[0], expected)
    (three,) = ops.fused_linear_rows(
        x.view(2, 3, 64), weights, biases, **{**options, "residual": options["residual"].reshape(2, 3, 40)}
    )
    assert torch.equal(three.view(6, 40), expected)
    for row in range(6):  # alone as among others
        options_of_row = {**options, "residual": options["residual"][row]}
        assert torch.equal(ops.fused_linear_rows(x[row], weights, biases, **options_of_row)[0], expected[row])


@EVERY
def test_fused_opcheck(place, dtype):
    op = torch.ops.flash_xlstm.fused_linear_rows
    (x, weights, biases), options = fused_arguments(place, dtype, 3, 64, (40,), True)
    torch.library.opcheck(op, (x, weights, biases, options["residual"], False))
    (x, weights, biases), _ = fused_arguments(place, dtype, 3, 64, (40, 40))
    torch.library.opcheck(op, (x, weights, biases, None, True))
    torch.library.opcheck(op, (x, weights, biases, None, False))


def test_fused_errors(device):
    (x, weights, biases), _ = fused_arguments(device, BF16, 3, 64, (40, 24))
    residual = torch.zeros(3, 40, dtype=BF16, device=device)
    wrong = [
        ((x, [], []), {}, ValueError, "weights has 0 tensors"),
        ((x, weights[:1] * 9, None), {}, ValueError, "weights has 9 tensors"),
        ((x, weights, biases[:1]), {}, ValueError, "biases has 1 tensors"),
        ((x, [weights[0], weights[1].float()]), {}, TypeError, r"weights\[1\] has dtype float32"),
        ((x, weights, [None, biases[0]]), {}, ValueError, r"biases\[1\] has shape \(40,\)"),
        ((x, weights, biases), {"swiglu": True}, ValueError, "weights must be two tensors of one shape"),
        ((x, weights, biases), {"residual": residual}, ValueError, "residual is for one weight"),
        ((x, weights[:1]), {"residual": residual[:2]}, ValueError, "residual has shape"),
        ((x, weights[:1]), {"residual": residual.float()}, TypeError, "residual has dtype float32"),
    ]
    for given, options, error, says in wrong:
        with pytest.raises(error, match=f"^{says}"):
            ops.fused_linear_rows(*given, **options)
    with pytest.raises(RuntimeError, match="fused_linear_rows has no gradient"):
        ops.fused_linear_rows(x.requires_grad_(), weights, biases)


# --- any number of dimensions, random problems ------------------------------------------------------------------------


@EVERY
def test_many_dimensions(place, dtype):
    x, weight, bias = arguments(place, dtype, rows=3)
    deep = x.view([3] + [1] * 9 + [64])
    assert torch.equal(ops.linear_rows(deep, weight, bias).view(3, -1), ops.linear_rows(x, weight, bias))
    (fused,) = ops.fused_linear_rows(deep, [weight, weight], swiglu=True)
    assert fused.shape == (3, *[1] * 9, 40)


@EVERY
def test_random_problems(fuzz, place, dtype):
    @fuzz(35)
    @hypothesis.given(st.integers(1, 16), st.integers(1, 40), st.integers(1, 80), st.booleans())
    def run(rows, size_in, size_out, bias):
        assert_exact(*arguments(place, dtype, rows, size_in * (8 if place == "cuda" else 1), size_out, bias))

    run()


@EVERY
def test_fused_random_problems(fuzz, place, dtype):
    @fuzz(35)
    @hypothesis.given(
        st.integers(1, MOST), st.integers(1, 30), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.booleans(),
        st.booleans(),
    )  # fmt: skip
    def run(rows, size_in, sizes_out, bias, residual):
        size_in *= 8 if place == "cuda" else 1
        x = normal(place, rows, size_in, dtype=dtype)
        weights = [normal(place, size, size_in, dtype=dtype, seed=1 + n) for n, size in enumerate(sizes_out)]
        biases = [normal(place, size, dtype=dtype, seed=9) if bias else None for size in sizes_out]
        options = {}
        if residual and len(weights) == 1:
            options["residual"] = normal(place, rows, sizes_out[0], dtype=dtype, seed=10)
        for n, y in enumerate(ops.fused_linear_rows(x, weights, biases, **options)):
            product = x.double() @ weights[n].double().t() + (biases[n].double() if bias else 0)
            exact = product + options["residual"].double() if options else product
            scale = x.double().abs() @ weights[n].double().abs().t()
            assert y.shape == exact.shape
            roundings = ROUNDING[dtype] * (
                exact.abs() + (1.01 * product.abs() if options else 0)
            )  # on the CPU it has two
            assert ((y.double() - exact).abs() <= roundings + 3e-6 * scale).all()

    run()


# products of many rows


def mm(a, bs, outs):
    """linear.mm, which must have taken the tiles where this machine has them."""
    taken = linear._float_products(a, bs, outs)
    assert taken or not linear._TILES
    if taken:
        products = [out.clone() for out in outs]
        linear.mm(a, bs, outs)
        assert all(map(torch.equal, products, outs)), "two runs differ"
    return taken


# Rows for one and for several blocks, depths of a part of a tile and of two stretches, columns of several panels.
@pytest.mark.parametrize(("rows", "depth"), [(64, 512), (70, 40), (256, 33), (257, 512), (450, 1100), (3000, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_tiles_are_at_least_as_exact_as_float32(rows, depth, scale):
    for a_lies, b_lies in ((0, 1), (1, 0)):
        a = normal("cpu", *((depth, rows) if a_lies else (rows, depth)), seed=3) * scale
        a = a.t() if a_lies else a
        bs, outs = [], []
        for columns in (8, 300, 1):
            b = normal("cpu", *((columns, depth) if b_lies else (depth, columns)), seed=columns)
            bs.append(b.t() if b_lies else b)
            outs.append(torch.full((rows, columns + 3), torch.nan)[:, :columns])
        if not mm(a, bs, outs):
            pytest.skip("this machine has no AMX tiles")
        for b, out in zip(bs, outs, strict=True):
            exact = a.double() @ b.double()
            if b.shape[1] > 1:  # a single column torch sums in parts
                assert (out - exact).norm() <= (a @ b - exact).norm()
            assert ((out - exact).abs() <= 2e-6 * (a.double().abs() @ b.double().abs())).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38, 1e-36, 1e-41])
@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("rows", [70, 300])
def test_what_tiles_cannot_hold_is_as_with_torch(rows, where, value):
    a, b, other = normal("cpu", rows, 96), normal("cpu", 96, 40, seed=1), normal("cpu", 96, 50, seed=2)
    (a if where == "a" else other)[-1, 7] = value
    outs = [torch.zeros(rows, 40), torch.zeros(rows, 50)]
    assert not linear._float_products(a, [b, other], outs)
    linear.mm(a, [b, other], outs)
    for got, right in zip(outs, (b, other), strict=True):
        assert torch.equal(got.nan_to_num(7.0), (a @ right).nan_to_num(7.0))


def test_other_products_of_many_rows_are_torchs():
    for a, b in (
        (normal("cpu", 100, 64, dtype=BF16), normal("cpu", 64, 9, dtype=BF16)),
        (normal("cpu", 3, 64), normal("cpu", 64, 9)),
        (normal("cpu", 100, 0), normal("cpu", 0, 9)),
    ):
        out = torch.full((a.shape[0], 9), torch.nan, dtype=a.dtype)
        linear.mm(a, [b], [out])
        assert torch.equal(out, a @ b)


def test_products_of_strided_matrices():
    a, b, out = normal("cpu", 100, 64, 2)[:, :, 1], normal("cpu", 64, 40, 2)[:, :, 1], torch.empty(100, 40)
    mm(a, [b], [out])
    linear.mm(a, [b], [out])
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"a": torch.zeros(64)}, ValueError, r"a has shape \(64,\); it must be \(rows, depth\)"),
        ({"a": torch.zeros(64, 8).double()}, TypeError, "a has dtype float64; it must be float32"),
        ({"bs": [torch.zeros(9, 5)]}, ValueError, r"bs\[0\] has shape \(9, 5\); it must be \(depth, columns\)"),
        ({"bs": [torch.zeros(8, 5).half()]}, TypeError, r"bs\[0\] has dtype float16"),
        ({"outs": []}, ValueError, "outs has 0 tensors; it must have as many as bs, 1"),
        ({"outs": [torch.zeros(64, 4)]}, ValueError, r"outs\[0\] has shape \(64, 4\)"),
        ({"outs": [torch.zeros(63, 5)]}, ValueError, r"outs\[0\] has shape \(63, 5\)"),
        ({"outs": [torch.zeros(5, 64).t()]}, ValueError, r"outs\[0\] has stride 64 in its last dimension"),
    ],
)
def test_bad_products_name_the_argument(changes, error, text):
    given = {"a": torch.zeros(64, 8), "bs": [torch.zeros(8, 5)], "outs": [torch.zeros(64, 5)]} | changes
    with pytest.raises(error, match=text):
        linear._float_products(*given.values())
