"""Products of many rows in 16 bits, alone or with a residual, SwiGLU or its gradient. The kernels run on Hopper."""

from __future__ import annotations

import re

import pytest
import torch

from flash_xlstm import ops
from flash_xlstm.nn.xlstm_7b import products
from flash_xlstm.ops import linear

BF16 = torch.bfloat16
ROUNDING = {BF16: 2**-8, torch.float16: 2**-11}
# rows, depth, columns: less than a block's tile, and one more than it; one of a cluster; several rounds of tiles; depth
# and columns that fill no box.
SHAPES = [
    (1, 8, 8),
    (64, 64, 128),
    (129, 72, 136),
    (256, 192, 256),
    (257, 200, 264),
    (700, 1000, 392),
    (5000, 320, 1304),
    (16384, 128, 2056),
    # up to nine tiles a cluster: of one piece of depth, and of three and four, which a ring of three stages meets at
    # another stage, and at the same, in each tile
    (16640, 8, 2048),
    (16640, 64, 2184),
    (9000, 192, 1304),
    (9000, 248, 1304),
]
EVERY = pytest.mark.parametrize("dtype", ROUNDING)


@pytest.fixture(autouse=True)
def hopper(request):
    if "cuda" in request.keywords and not linear._has_products(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")


def normal(*shape, dtype=BF16, seed=0, device="cuda"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def poison(*shapes, dtype):
    """Memory for tensors of these shapes, full of NaN, is what the allocator gives next."""
    torch.cuda.synchronize()
    kept = [torch.full(shape, torch.nan, device="cuda", dtype=dtype) for shape in shapes]
    del kept


def check(got, exact, scale, dtype):
    """Rounded once. `scale`: the sum of the products' absolute values, of which float32 sums are exact to a part."""
    assert got.dtype == dtype and got.shape == exact.shape
    bound = ROUNDING[dtype] * exact.abs() + 3e-6 * scale + torch.finfo(dtype).smallest_normal * ROUNDING[dtype]
    assert ((got.double() - exact).abs() <= bound).all()


def exact_product(a, b):
    return a.double() @ b.double(), a.double().abs() @ b.double().abs()


@pytest.mark.cuda
@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_added(shape, dtype):
    rows, depth, columns = shape
    a, weight, residual = normal(rows, depth), normal(columns, depth, seed=1), 9 * normal(rows, columns, seed=2)
    a, weight, residual = a.to(dtype), weight.to(dtype), residual.to(dtype)
    poison((rows, columns), dtype=dtype)
    out = linear.added_product(a, weight, residual)
    exact, scale = exact_product(a, weight.t())
    check(out, exact + residual.double(), scale + residual.double().abs(), dtype)


@pytest.mark.cuda
@EVERY
@pytest.mark.parametrize("parts", [(8,), (264,), (128, 256), (128, 128, 384), (384, 128, 256, 128)])
@pytest.mark.parametrize(("rows", "depth"), [(1, 64), (257, 200), (5000, 328), (60_000, 64), (60_000, 192)])
def test_joined(rows, depth, parts, dtype):
    a, weights = (
        normal(rows, depth, dtype=dtype),
        [normal(n, depth, dtype=dtype, seed=n + at) for at, n in enumerate(parts)],
    )
    poison((rows, sum(parts)), dtype=dtype)
    check(linear.joined_product(a, weights), *exact_product(a, torch.cat(weights).t()), dtype)


@pytest.mark.cuda
@EVERY
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape, dtype):
    rows, depth, columns = shape
    a, left, right = normal(rows, depth, dtype=dtype), *(normal(2, columns, depth, seed=1) * depth**-0.5).to(dtype)
    poison((rows, 2 * columns), (rows, columns), dtype=dtype)
    z, out = linear.swiglu_product(a, left, right)
    check(z, *exact_product(a, torch.cat([left, right]).t()), dtype)
    assert torch.equal(out, ops.swiglu(z))


@pytest.mark.cuda
@EVERY
@pytest.mark.parametrize("remake", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_swiglu(shape, remake, dtype):
    rows, depth, columns = shape
    dout, weight = normal(rows, depth, dtype=dtype), (normal(depth, columns, seed=1) * depth**-0.5).to(dtype)
    z = 2 * normal(rows, 2 * columns, dtype=dtype, seed=2)
    poison((rows, 2 * columns), (rows, columns), dtype=dtype)
    dz, out = linear.swiglu_product_backward(dout, weight, z, remake)
    # Of the product rounded to the dtype, as a kernel of its own leaves it; the sums run in one order in both kernels.
    between = linear.added_product(dout, weight.t().contiguous(), torch.zeros_like(z[:, :columns]))
    check(between, *exact_product(dout, weight), dtype)
    expected, remade = torch.ops.flash_xlstm.swiglu_joined_backward(between, z, remake)
    assert torch.equal(dz, expected) and torch.equal(out.flatten(), remade.flatten())
    assert not remake or torch.equal(out, torch.ops.flash_xlstm.swiglu_joined(z))


@pytest.mark.cuda
@EVERY
def test_strides_and_repeats(dtype):
    rows, depth, columns = 300, 104, 280
    wide = normal(rows, 3 * depth + 1, dtype=dtype)
    a, weight = wide[:, depth + 1 : 2 * depth + 1], normal(depth, 2 * columns, dtype=dtype, seed=1).t()
    left, right = weight[:columns], weight[columns:]
    residual = normal(1, columns, dtype=dtype, seed=2).expand(rows, -1)
    z = normal(2 * columns, rows, dtype=dtype, seed=3).t()
    down = normal(columns, depth, dtype=dtype, seed=4).t()
    calls = [
        lambda *t: (linear.joined_product(t[0], [t[1]]),),
        lambda *t: (linear.added_product(*t[:2], t[3]),),
        lambda *t: linear.swiglu_product(*t[:3]),
        lambda *t: linear.swiglu_product_backward(t[0], t[5], t[4], True),
    ]
    given = a, left, right, residual, z, down
    for call in calls:
        expected = call(*(t.contiguous() for t in given))
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(call(*given), expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [64, 200])
def test_repeats_with_many_tiles_beside_other_work(depth):
    rows, columns = 16_640, 2184
    a, left, right = normal(rows, depth), *normal(2, columns, depth, seed=1)
    down, z, residual = normal(depth, columns, seed=2), normal(rows, 2 * columns, seed=3), normal(rows, columns, seed=4)
    calls = [
        lambda: (linear.joined_product(a, [left]),),
        lambda: (linear.added_product(a, left, residual),),
        lambda: linear.swiglu_product(a, left, right),
        lambda: linear.swiglu_product_backward(a, down, z, True),
    ]
    expected = [call() for call in calls]
    other, busy = torch.cuda.Stream(), normal(4096, 4096)
    for _ in range(15):
        with torch.cuda.stream(other):
            busy @ busy
        for call, results in zip(calls, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(call(), results, strict=True))


@pytest.mark.cuda
def test_chains_read_what_the_kernel_before_has_written():
    """Kernels that start early, and outputs in memory that an input has just left."""
    rows, depth = 5000, 512
    a, down = normal(rows, depth), normal(depth, depth, seed=1) * 0.01
    left, right = normal(2, depth, depth, seed=2) * 0.02

    def chain(wait):
        x = a
        for _ in range(6):
            x = linear.added_product(x, down, x)
            wait()
            z, gated = linear.swiglu_product(x, left, right)
            wait()
            x = linear.added_product(gated, down, x)
            wait()
            dz, _ = linear.swiglu_product_backward(x, down, z, False)
            wait()
            del z, gated
            x = linear.joined_product(dz[:, :depth].contiguous(), [down]) + x
            wait()
        return x

    expected = chain(torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(10):
        assert torch.equal(chain(lambda: None), expected)


@pytest.mark.cuda
def test_sums_beyond_float16():
    """Sums are float32: what cancels may pass through numbers that float16 does not hold; what does not is infinite."""
    rows, depth, columns = 200, 256, 264
    a = torch.ones(rows, depth, device="cuda", dtype=torch.float16)
    weight = torch.full((columns, depth), 600.0, device="cuda", dtype=torch.float16)
    weight[:, depth // 2 :] = -600.0
    weight[3] = 600.0
    zeros = torch.zeros(rows, columns, device="cuda", dtype=torch.float16)
    residual = zeros.clone()
    residual[5, 7], residual[6, 8] = torch.inf, torch.nan
    out = linear.added_product(a, weight, residual)
    assert (out[:, 3] == torch.inf).all() and out[5, 7] == torch.inf and out[6, 8].isnan()
    rest = torch.ones_like(out, dtype=torch.bool)
    rest[:, 3] = rest[5, 7] = rest[6, 8] = False
    assert (out[rest] == 0).all()
    z = normal(rows, 2 * columns, dtype=torch.float16)
    dz, _ = linear.swiglu_product_backward(a, weight.t().contiguous(), z, False)
    between = linear.added_product(a, weight, zeros)
    expected, _ = torch.ops.flash_xlstm.swiglu_joined_backward(between, z, False)
    torch.testing.assert_close(dz, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cuda
def test_columns_do_not_depend_on_each_other():
    rows, depth = 300, 136
    a, parts = normal(rows, depth), [normal(n, depth, seed=n) for n in (128, 384, 256)]
    residual, z, down = normal(rows, 768, seed=1), normal(rows, 1536, seed=2), normal(depth, 768, seed=3)

    def results(weights):
        joined = torch.cat(weights)
        return linear.joined_product(a, weights), linear.added_product(a, joined, residual)

    expected = results(parts)
    for part, row, column in ((0, 127, 127), (1, 0, 128), (1, 383, 511), (2, 255, 767)):
        changed = [w.clone() for w in parts]
        changed[part][row] = torch.nan
        others = torch.arange(768, device="cuda") != column
        for got, before in zip(results(changed), expected, strict=True):
            assert got[:, column].isnan().all() and torch.equal(got[:, others], before[:, others])
    before, _ = linear.swiglu_product_backward(a, down, z, False)
    z[17, 700] = torch.nan
    dz, out = linear.swiglu_product_backward(a, down, z, True)
    touched = torch.zeros_like(dz, dtype=torch.bool)
    touched[17, [700, 768 + 700]] = True
    assert dz[touched].isnan().all() and out[17, 700].isnan() and torch.equal(dz[~touched], before[~touched])


@pytest.mark.cuda
def test_contiguous_tensors_at_any_offset():
    def shifted(t):
        flat = torch.full((t.numel() + 1,), torch.nan, device="cuda", dtype=t.dtype)
        flat[1:] = t.flatten()
        return flat[1:].view(t.shape)

    a, left, right = normal(70, 64), *normal(2, 136, 64, seed=1)
    down, z, residual = normal(64, 136, seed=2), normal(70, 272, seed=3), normal(70, 136, seed=4)
    calls = [
        (lambda *t: (linear.joined_product(t[0], [t[1]]),), (a, left)),
        (lambda *t: (linear.added_product(*t),), (a, left, residual)),
        (linear.swiglu_product, (a, left, right)),
        (lambda *t: linear.swiglu_product_backward(*t, True), (a, down, z)),
    ]
    for call, given in calls:
        expected = call(*given)
        assert all(torch.equal(x, y) for x, y in zip(call(*map(shifted, given)), expected, strict=True))


@pytest.mark.cuda
def test_rows_do_not_depend_on_each_other():
    rows, depth, columns = 600, 256, 520
    a, down = normal(rows, depth), normal(depth, columns, seed=1)
    left, right = normal(2, columns, depth, seed=2)
    z, residual = normal(rows, 2 * columns, seed=3), normal(rows, columns, seed=4)

    def results():
        added = linear.added_product(a, left, residual), linear.joined_product(a, [left])
        return *added, *linear.swiglu_product(a, left, right), *linear.swiglu_product_backward(a, down, z, True)[:1]

    expected = results()
    a[[3, 130, 599]] = torch.nan
    others = torch.ones(rows, dtype=torch.bool)
    others[[3, 130, 599]] = False
    for got, before in zip(results(), expected, strict=True):
        assert got[~others].isnan().all() and torch.equal(got[others], before[others])


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    rows, depth, columns = 270_000, 64, 8192
    a, left, right = normal(rows, depth), *normal(2, columns, depth, seed=1)
    z, out = linear.swiglu_product(a, left, right)
    assert z.numel() > 2**32 and out.numel() > 2**31
    for at in (0, rows // 2, rows - 300):
        some = slice(at, at + 300)
        expected, gated = linear.swiglu_product(a[some].contiguous(), left, right)
        assert torch.equal(z[some], expected) and torch.equal(out[some], gated)
    down = normal(depth, columns, seed=2)
    dz, again = linear.swiglu_product_backward(a, down, z, True)
    assert torch.equal(again, out)
    del again
    some = slice(rows - 300, rows)
    expected, _ = linear.swiglu_product_backward(a[some].contiguous(), down, z[some].contiguous(), True)
    assert torch.equal(dz[some], expected)
    del dz, z
    added = linear.added_product(a, left, out)
    assert torch.equal(added[some], linear.added_product(a[some].contiguous(), left, out[some].contiguous()))


@pytest.mark.cuda
def test_no_rows_and_opcheck():
    a, left, down, z = normal(40, 64), normal(48, 64, seed=1), normal(64, 48, seed=2), normal(40, 96, seed=3)
    operators = torch.ops.flash_xlstm
    calls = [
        (operators.joined_product, (a, [left])),
        (operators.added_product, (a, left, z[:, :48])),
        (operators.swiglu_product, (a, left, left)),
        (operators.swiglu_product_backward, (a, down, z, True)),
        (operators.swiglu_product_backward, (a, down, z, False)),
    ]
    for op, given in calls:
        torch.library.opcheck(op, given)
        none = tuple(t[:0] if torch.is_tensor(t) and t.shape[0] == 40 else t for t in given)
        results = op(*none)
        for result in results if isinstance(results, (tuple, list)) else [results]:
            assert result.shape[0] == 0


@pytest.mark.cuda
def test_what_the_layers_call(monkeypatch):
    """The layers' functions take the kernels, in both weight modes, and agree with torch's products."""
    rows, up, down = normal(300, 64), normal(2, 72, 64, seed=1), normal(64, 72, seed=2)
    x, joined = normal(300, 64, seed=3), torch.cat([up[0], up[1]])
    assert products.products_serve(rows, 64, 72)
    z, gated = products.swiglu_product(rows, (up[0], up[1]), None)
    of_joined = products.swiglu_product(rows, (joined,), None)
    assert torch.equal(z, of_joined[0]) and torch.equal(gated, of_joined[1])
    assert torch.equal(z, products.product(rows, (joined,), None))
    parts = products.product(rows, (joined[:128], joined[:128]), None)
    assert torch.equal(parts, torch.cat([z[:, :128]] * 2, 1))
    out = products.added_product(x, gated, down)
    dz, again = products.swiglu_gradient(rows, down, z, True, None)
    monkeypatch.setattr(products, "products_serve", lambda *given: False)
    close = {"rtol": 2e-2, "atol": 2e-2 * z.abs().max().item()}
    torch.testing.assert_close(z, products.product(rows, (joined,), None), **close)
    torch.testing.assert_close(out, products.added_product(x, gated, down), **close)
    torch.testing.assert_close(dz, products.swiglu_gradient(rows, down, z, True, None)[0], rtol=2e-2, atol=1.0)
    assert torch.equal(again, gated)


def test_other_devices_and_dtypes_take_torchs_products():
    x, rows, weight = (normal(*shape, device="cpu") for shape in ((5, 16), (5, 24), (16, 24)))
    assert not products.products_serve(rows, 24, 16)
    assert torch.equal(products.added_product(x, rows, weight), torch.addmm(x, rows, weight.t()))
    z, gated = products.swiglu_product(rows, (weight, weight), None)
    assert torch.equal(z, products.product(rows, (weight, weight), None)) and torch.equal(gated, ops.swiglu(z))
    dout, down = normal(5, 24, device="cpu", seed=1), normal(24, 16, device="cpu", seed=2)
    dz, again = products.swiglu_gradient(dout, down, z, True, None)
    assert torch.equal(again, gated)
    assert torch.equal(dz, torch.ops.flash_xlstm.swiglu_joined_backward(dout @ down, z, False)[0])


def test_vmap_passes_lists_of_weights_on():
    a, weight = normal(3, 6, 16, device="cpu"), normal(3, 24, 16, device="cpu")
    for call, given in (
        (lambda a: torch.ops.flash_xlstm.joined_product(a, [weight[0]]), (a,)),
        (lambda a, w: torch.ops.flash_xlstm.joined_product(a, [w]), (a, weight)),
    ):
        with pytest.raises(ValueError, match="a is on cpu; it must be on a CUDA device"):  # what the operator says
            torch.func.vmap(call)(*given)


@pytest.mark.cuda
def test_vmap_is_the_call_for_each_entry():
    a, weight = normal(3, 6, 16), normal(3, 24, 16, seed=1)
    got = torch.func.vmap(lambda a, w: torch.ops.flash_xlstm.joined_product(a, [w]))(a, weight)
    assert torch.equal(got, torch.stack([linear.joined_product(x, [w]) for x, w in zip(a, weight, strict=True)]))


ARGUMENTS = {
    "joined_product": {"a": (6, 16), "weights": (24, 16)},
    "added_product": {"a": (6, 16), "weight": (24, 16), "residual": (6, 24)},
    "swiglu_product": {"a": (6, 16), "left": (24, 16), "right": (24, 16)},
    "swiglu_product_backward": {"dout": (6, 16), "weight": (16, 24), "z": (6, 48)},
}


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [
        ("added_product", "a", lambda t: t[0], "a has shape (16,); it must be (rows, depth)"),
        ("added_product", "a", lambda t: t.float(), "a has dtype float32; it must be bfloat16 or float16"),
        ("added_product", "a", lambda t: t[:, :12], "a has shape (6, 12); its last dimension must be a multiple of 8"),
        ("added_product", "a", lambda t: t, "a is on cpu; it must be on a CUDA device"),
        ("joined_product", "a", lambda t: t, "a is on cpu; it must be on a CUDA device"),
        ("swiglu_product", "a", lambda t: t, "a is on cpu; it must be on a CUDA device"),
        ("swiglu_product_backward", "dout", lambda t: t, "dout is on cpu; it must be on a CUDA device"),
    ],
)
def test_bad_left_operands_are_named(op, name, change, message):
    assert_refused(op, name, change, message, "cpu")


def assert_refused(op, name, change, message, device):
    given = {key: normal(*shape, device=device) for key, shape in ARGUMENTS[op].items()}
    if "weights" in given:
        given["weights"] = [given["weights"]]
    given[name] = change(given[name])
    flags = (True,) if op.endswith("backward") else ()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        getattr(torch.ops.flash_xlstm, op)(*given.values(), *flags)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [
        ("joined_product", "weights", lambda t: [], "weights has 0 tensors; it must have 1 to 4"),
        ("joined_product", "weights", lambda t: t * 5, "weights has 5 tensors; it must have 1 to 4"),
        (
            "joined_product",
            "weights",
            lambda t: [t[0].half()],
            "weights[0] has dtype float16; it must be bfloat16, as a",
        ),
        (
            "joined_product",
            "weights",
            lambda t: [t[0][:20]],
            "weights[0] has shape (20, 16); its first dimension must be",
        ),
        ("joined_product", "weights", lambda t: t * 2, "its first dimension must be a multiple of 128"),
        ("added_product", "weight", lambda t: t[:, :8], "weight has shape (24, 8); it must be (columns, depth)"),
        ("added_product", "weight", lambda t: t.half(), "weight has dtype float16; it must be bfloat16, as a"),
        ("added_product", "weight", lambda t: t.cpu(), "weight is on cpu; it must be on the device of a"),
        ("added_product", "residual", lambda t: t[:5], "residual has shape (5, 24); it must be (rows, columns)"),
        ("swiglu_product", "right", lambda t: t[:16], "right has shape (16, 16); it must be the shape of left"),
        ("swiglu_product_backward", "weight", lambda t: t[:8], "weight has shape (8, 24); it must be (depth, columns)"),
        ("swiglu_product_backward", "z", lambda t: t[:, :24], "z has shape (6, 24); it must be (rows, 2 columns)"),
    ],
)
def test_bad_arguments_are_named(op, name, change, message):
    assert_refused(op, name, change, message, "cuda")


@pytest.mark.cuda
def test_columns_of_a_multiple_of_eight():
    a, weight = normal(6, 16), normal(20, 16, seed=1)
    with pytest.raises(ValueError, match="left has shape"):
        torch.ops.flash_xlstm.swiglu_product(a, weight, weight)
    with pytest.raises(ValueError, match="residual has shape"):
        torch.ops.flash_xlstm.added_product(a, weight, normal(6, 20))
    with pytest.raises(ValueError, match="no dimension may be above"):
        torch.ops.flash_xlstm.added_product(normal(1, 16).expand(2**31, -1), weight[:16], a)
    with pytest.raises(ValueError, match=r"weights\[0\] is on meta"):
        torch.ops.flash_xlstm.joined_product(a, [weight[:16].to("meta")])
    assert not linear.products_serve(a, 16, 20) and not linear.products_serve(a, 12, 24)
