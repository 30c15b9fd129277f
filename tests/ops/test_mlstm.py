from __future__ import annotations

import functools
import itertools
import statistics

import pytest
import torch
import torch._dynamo.utils
from hypothesis import given
from hypothesis import strategies as st

from flash_xlstm import ops, reference

THROUGH = {"h": ("h",), "state": ("last c", "last n", "last m"), "all": ("h", "last c", "last n", "last m")}
SEQS = (1, 2, 63, 64, 65, 127, 300)
DIMS = ((5, 16), (33, 64), (64, 33), (16, 5), (80, 128), (128, 80), (64, 64))
LAYOUTS = ("contiguous", "heads first", "slice")
EPS = (1e-6, 0.1, 0.0)
EMPTY = (0, 1, 2, 3)


def _cases():
    """Every seq with every kind of gates; sizes, heads, layouts, eps and states take turns."""
    for turn, (seq, gates) in enumerate(itertools.product(SEQS, ("small", "normal", "spread"))):
        dqk, dv = DIMS[turn % len(DIMS)]
        options = {
            "seq": seq,
            "gates": gates,
            "dqk": dqk,
            "dv": dv,
            "heads": 1 + turn % 4,
            "layout": LAYOUTS[turn // 2 % 3],
            "eps": EPS[turn // 3 % 3],
            "state": turn % 5 != 0,
        }
        yield pytest.param(options, id=f"{seq}-{gates}-{dqk}x{dv}")


CASES = list(_cases())


def is_bitwise(a, b):
    """Equal, where NaN equals NaN."""
    return torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) and torch.equal(a.isnan(), b.isnan())


# --- outputs, states, gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("case", CASES)
def test_float32(make_problem, assert_float32_exact, case, through):
    problem = make_problem(**case, seed=case["seq"])
    assert_float32_exact(problem, ops.mlstm, THROUGH[through], strict=case["gates"] != "spread")


@pytest.mark.parametrize("gate_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[::2])
def test_16_bit(make_problem, assert_16_bit_exact, case, dtype, gate_dtype):
    gate_dtype = dtype if gate_dtype == "same" else torch.float32
    batch = max(2, 64 // case["seq"])  # relative errors of very few numbers would compare two roundings
    problem = make_problem(**case, batch=batch, dtype=dtype, gate_dtype=gate_dtype, seed=case["seq"])
    for through in ("h", "state"):
        assert_16_bit_exact(problem, ops.mlstm, THROUGH[through])


# Beyond the bound where products take states and weights as tf32 alone: h, dq, dk, dv, df, dn; last c, dq, dv, dc, dn.
@pytest.mark.parametrize(
    ("seq", "seeds"), [(1, (98, 167, 506, 3, 836, 1059, 753, 407)), (2, (471, 308, 477, 948, 681))], ids=["one", "two"]
)
def test_float16_results_of_few_terms(make_problem, assert_16_bit_exact, seq, seeds):
    """Seeds for which the roundings of an operand and of the result add up, or of two operands that nearly cancel."""
    for seed in seeds:
        problem = make_problem(seq, 2, 1, batch=1, heads=1, dtype=F16, gate_dtype=F16, seed=seed)
        assert_16_bit_exact(problem, ops.mlstm, ("h",), small=True)


@pytest.mark.parametrize("seq", [1, 65])
@pytest.mark.parametrize("gates", ["small", "normal"])
def test_dimensions_of_one(make_problem, assert_float32_exact, seq, gates):
    # Gates over the whole range are left out: at dqk 1, q cancels from h wherever |s| is the larger, and dq is 0.
    assert_float32_exact(make_problem(seq, 1, 1, gates=gates), ops.mlstm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_dimensions(make_problem, assert_float32_exact, assert_16_bit_exact, dtype):
    problem = make_problem(70, 256, 512, batch=1, heads=1, dtype=dtype)
    (assert_float32_exact if dtype == torch.float32 else assert_16_bit_exact)(problem, ops.mlstm)


@pytest.mark.parametrize("options", [{"scale": 1.0}, {"scale": -0.3}], ids=str)
def test_scale(make_problem, assert_float32_exact, options):
    assert_float32_exact(make_problem(70, 16, 16, **options), ops.mlstm)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 64, 200, 4096])
def test_chunk_size(make_problem, assert_float32_exact, chunk_size):
    assert_float32_exact(make_problem(130, 16, 24, chunk_size=chunk_size), ops.mlstm)


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize(
    ("seq", "gates", "cap"),
    # A single token with gates at a cap of 15 is left out: it dominates the state in h, and the gradients of its q and
    # k cancel.
    [
        *((seq, *gates) for seq in (1, 65, 200) for gates in (("normal", 0.7), ("spread", 3.0))),
        *((seq, "beyond", 15.0) for seq in (65, 200)),
    ],
)
def test_gate_soft_cap(make_problem, assert_float32_exact, seq, gates, cap, through):
    problem = make_problem(seq, 33, 20, gates=gates, layout="slice", gate_soft_cap=cap)
    assert_float32_exact(problem, ops.mlstm, THROUGH[through], strict=gates == "normal")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gate_soft_cap_in_16_bits(make_problem, assert_16_bit_exact, dtype):
    """The gates' dtype rounds neither the capped gates nor the cap's slope."""
    options = {"dtype": dtype, "gate_dtype": dtype, "cu_seqlens": (0, 70, 71, 200), "gate_soft_cap": 2.0}
    assert_16_bit_exact(make_problem(200, 16, 24, batch=1, gates="spread", **options), ops.mlstm)


def test_gate_soft_cap_is_a_soft_cap_before(make_problem):
    def capped_before(q, k, v, i, f, *, gate_soft_cap, **options):
        return ops.mlstm(q, k, v, ops.soft_cap(i, gate_soft_cap), ops.soft_cap(f, gate_soft_cap), **options)

    problem = make_problem(150, 16, 24, gate_soft_cap=2.0)
    expected = problem(capped_before)
    for name, t in problem(ops.mlstm).items():
        assert (t - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_long_sequence(make_problem, assert_float32_exact):
    assert_float32_exact(make_problem(2500, 32, 16, batch=1, gates="small"), ops.mlstm)


def test_more_states_than_the_backward_keeps(make_problem, assert_float32_exact):
    # On the CPU it keeps 64 MiB of them: 1,024 of these.
    problem = make_problem(2100, 128, 128, batch=1, heads=1, gates="small", chunk_size=1)
    assert_float32_exact(problem, ops.mlstm)


def test_without_final_state(make_problem):
    problem = make_problem(70, 16, 24)
    with_state = problem(ops.mlstm, ("h",))
    h = ops.mlstm(*(problem.inputs[x] for x in "qkvif"), initial_state=tuple(problem.inputs[x] for x in "cnm"))
    assert torch.equal(h, with_state["h"])


def test_only_some_gradients(make_problem):
    problem = make_problem(70, 16, 24)
    expected = problem(ops.mlstm, ("h",))
    inputs = {name: t.clone().requires_grad_(name in "kfm") for name, t in problem.inputs.items()}
    h = ops.mlstm(*(inputs[x] for x in "qkvif"), initial_state=tuple(inputs[x] for x in "cnm"))
    h.backward(problem.cotangents["h"])
    for name, t in inputs.items():
        assert torch.equal(t.grad, expected[f"d{name}"]) if name in "kfm" else t.grad is None


def test_gradient_of_expanded_and_strided_outputs(make_problem, device):
    """dh may come with any strides: 0 from a sum, not 1 in the last dimension from a transpose."""
    problem = make_problem(70, 16, 24)
    normal = torch.randn(24, 2, 70, 2, generator=torch.Generator().manual_seed(0))
    for dh in (torch.ones((), device=device).expand(2, 70, 2, 24), normal.to(device).permute(1, 2, 3, 0)):
        results = []
        for dense in (True, False):
            problem.cotangents["h"] = dh.contiguous() if dense else dh
            results.append(problem(ops.mlstm, ("h",)))
        for name, t in results[0].items():
            assert torch.allclose(t, results[1][name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("layout", ["heads first", "slice"])
def test_strides_change_nothing(make_problem, layout):
    dense, strided = make_problem(70, 16, 24)(ops.mlstm), make_problem(70, 16, 24, layout=layout)(ops.mlstm)
    for name, t in dense.items():
        assert torch.equal(t, strided[name]), name


def test_strided_state_and_gates(make_problem):
    problem = make_problem(70, 16, 24)
    expected = problem(ops.mlstm)
    c, n, m = (problem.inputs[x] for x in "cnm")
    problem.inputs["c"] = c.transpose(2, 3).contiguous().transpose(2, 3)
    problem.inputs["n"] = torch.stack([n, n], -1)[..., 0]
    problem.inputs["m"] = m.t().contiguous().t()
    problem.inputs["f"] = torch.stack([problem.inputs["f"]] * 3, -1)[..., 1]
    for name, t in problem(ops.mlstm).items():
        assert torch.equal(t, expected[name]), name


def test_continues_from_its_final_state(make_problem):
    problem = make_problem(150, 16, 24)
    q, k, v, i, f = (problem.inputs[x] for x in "qkvif")
    whole, last = ops.mlstm(q, k, v, i, f, return_final_state=True)
    parts, state = [], None
    for start, stop in itertools.pairwise((0, 1, 64, 70, 150)):
        part = (t[:, start:stop] for t in (q, k, v, i, f))
        h, state = ops.mlstm(*part, initial_state=state, return_final_state=True)
        parts.append(h)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    for a, b in zip(state, last, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_state(make_problem):
    problem = make_problem(70, 16, 24)
    problem.inputs["c"] = problem.inputs["c"].bfloat16()
    got = problem(ops.mlstm)
    assert got["last c"].dtype == got["dc"].dtype == torch.bfloat16
    assert got["last n"].dtype == got["last m"].dtype == torch.float32
    problem.inputs["c"] = problem.inputs["c"].float()
    problem.cotangents["last c"] = problem.cotangents["last c"].bfloat16().float()
    expected = problem(ops.mlstm)
    for name, t in expected.items():
        assert torch.equal(got[name], t.bfloat16() if name in ("last c", "dc") else t), name


# --- padding, packing, empty tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["left", "right", "scattered", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_soft_cap", [None, 2.0])
def test_padding(make_problem, assert_padding_changes_nothing, device, dtype, where, gate_soft_cap):
    seq = 200
    problem = make_problem(seq, 16, 24, dtype=dtype, gate_dtype=torch.float32, gate_soft_cap=gate_soft_cap)
    position, padding = torch.arange(seq), torch.zeros(2, seq, dtype=torch.bool)
    if where == "left":
        padding[0], padding[1] = position < 3, position < 130
    elif where == "right":
        padding[0], padding[1] = position >= 190, position >= 70
    elif where == "chunks":
        padding[0], padding[1] = (position >= 64) & (position < 128), (position >= 10) & (position < 150)
    else:
        padding = torch.rand(2, seq, generator=torch.Generator().manual_seed(0)) < 0.4
    assert_padding_changes_nothing(problem, ops.mlstm, padding.to(device))


@pytest.mark.parametrize("gate_soft_cap", [None, 2.0])
def test_padding_has_no_gradient_though_its_output_has(make_problem, device, gate_soft_cap):
    problem = make_problem(100, 16, 24, gate_soft_cap=gate_soft_cap)
    padding = (torch.arange(100, device=device) % 3 == 1).expand(2, -1)
    dh = problem.cotangents["h"].clone()
    problem.pad(padding)
    problem.cotangents["h"] = dh
    got = problem(ops.mlstm)
    assert all(t.isfinite().all() for t in got.values())
    for name in ("dk", "dv", "di", "df"):
        assert not got[name][padding].any(), name
    assert got["dq"][padding].any()  # h of padding reads the state, as every query does


@pytest.mark.parametrize("state", [True, False])
def test_nothing_but_padding(make_problem, device, state):
    problem = make_problem(70, 16, 24, state=state)
    problem.pad(torch.ones(2, 70, dtype=torch.bool, device=device))
    got = problem(ops.mlstm)
    assert all(t.isfinite().all() for t in got.values())
    for name in "cnm":
        if state:
            assert torch.equal(got[f"last {name}"], problem.inputs[name])
            assert torch.allclose(got[f"d{name}"], problem.cotangents[f"last {name}"], rtol=1e-5, atol=1e-5)
        else:
            assert not got[f"last {name}"].any()
    if not state:
        assert not got["h"].any()


def test_garbage_under_padding_stays_there(make_problem, device):
    problem = make_problem(150, 16, 24)
    padding = (torch.arange(150, device=device) % 4 == 2).expand(2, -1)
    problem.pad(padding)
    want = problem(ops.mlstm)
    for name in "kv":
        problem.inputs[name] = problem.inputs[name].clone()
        problem.inputs[name][padding] = torch.nan
    got = problem(ops.mlstm)
    for name in ("h", "last c", "last n", "last m"):
        t, w = (x[name] if name != "h" else x[name][~padding] for x in (got, want))
        assert torch.allclose(t, w, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "offsets",
    [(0, 200), (0, 0, 1, 1, 64, 65, 200), (0, 70, 134, 135, 200, 200), (0, *range(1, 41), 200)],
    ids=["one", "empty and short", "several", "many of one token"],
)
@pytest.mark.parametrize("state", [True, False])
def test_packed(make_problem, assert_float32_exact, assert_16_bit_exact, offsets, dtype, state):
    problem = make_problem(
        200, 16, 24, batch=1, dtype=dtype, state=state, cu_seqlens=offsets, seed=len(offsets), layout="heads first"
    )
    (assert_float32_exact if dtype == torch.float32 else assert_16_bit_exact)(problem, ops.mlstm)


def test_packed_equals_separate_calls(make_problem):
    offsets = (0, 5, 5, 70, 71, 150)
    problem = make_problem(150, 16, 24, batch=1, cu_seqlens=offsets)
    got = problem(ops.mlstm)
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        token, own = slice(start, stop), slice(s, s + 1)
        if start == stop:  # the state passes through, and so does its gradient
            for name in "cnm":
                assert torch.equal(got[f"last {name}"][own], problem.inputs[name][own])
                assert torch.equal(got[f"d{name}"][own], problem.cotangents[f"last {name}"][own])
            continue
        take = lambda name, t: t[own] if name[-1] in "cnm" else t[:, token]  # noqa: B023, E731
        inputs, cotangents = ({n: take(n, t) for n, t in d.items()} for d in (problem.inputs, problem.cotangents))
        for name, t in type(problem)(inputs, cotangents, {})(ops.mlstm).items():
            assert (take(name, got[name]) - t).norm() <= 1e-5 * t.norm(), name


@pytest.mark.cuda
@pytest.mark.parametrize(
    "offsets",
    [(0, 300), (5, 80), (0, -7, 100), (0, 90, 20, 100), (-(2**31), 2**31 - 1), (2**31 - 1, 0, 50, -1), (200, 300, 400)],
    ids=str,
)
def test_wrong_cu_seqlens_never_leave_the_tensors_on_cuda(offsets):
    # The tensors lie in the middle of larger ones whose rims must not change.
    def middle(*shape):
        size = torch.Size(shape).numel()
        whole = torch.full((3 * size,), torch.nan, device="cuda")
        whole[size : 2 * size] = torch.randn(size, device="cuda")
        return whole, whole[size : 2 * size].view(shape)

    count = len(offsets) - 1
    dims = (
        [(1, 100, 2, 16)] * 2 + [(1, 100, 2, 24)] + [(1, 100, 2)] * 2 + [(count, 2, 16, 24), (count, 2, 16), (count, 2)]
    )
    wholes, parts = zip(*(middle(*shape) for shape in dims), strict=True)
    before = [whole.clone() for whole in wholes]
    q, k, v, i, f, *state = (t.detach().requires_grad_() for t in parts)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    h, last = ops.mlstm(q, k, v, i, f, initial_state=tuple(state), cu_seqlens=cu_seqlens, return_final_state=True)
    torch.autograd.grad([h, *last], [q, k, v, i, f, *state], [torch.ones_like(t) for t in (h, *last)])
    torch.cuda.synchronize()
    assert all(is_bitwise(a, b) for a, b in zip(wholes, before, strict=True))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}, {"batch": 0, "heads": 0}], ids=str)
def test_empty(make_problem, sizes):
    problem = make_problem(5, 4, 6, **sizes)
    got = problem(ops.mlstm)
    for name in "qkvifcnm":
        assert got[f"d{name}"].shape == problem.inputs[name].shape
    assert got["h"].shape == problem.inputs["v"].shape
    assert got["last c"].shape == problem.inputs["c"].shape


# --- not-a-number, unwritten memory, repeatability --------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_reaches_only_what_depends_on_it(make_problem, name, dtype, value):
    problem = make_problem(150, 16, 24, dtype=dtype, state=False)
    t = 70
    clean = ops.mlstm(*(problem.inputs[x] for x in "qkvif"))
    problem.inputs[name] = problem.inputs[name].clone()
    problem.inputs[name][0, t, 1, 3] = value
    h = ops.mlstm(*(problem.inputs[x] for x in "qkvif"))
    assert torch.equal(h[1], clean[1]) and torch.equal(h[0, :, 0], clean[0, :, 0])
    assert torch.allclose(h[0, :t, 1], clean[0, :t, 1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    here = h[0, t, 1]
    assert not (here.isfinite() if name != "v" else here[3].isfinite()).all()
    if name == "q":
        assert torch.allclose(h[0, t + 1 :, 1], clean[0, t + 1 :, 1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    if name == "v":
        others = [x for x in range(24) if x != 3]
        assert torch.allclose(h[0][:, 1, others], clean[0][:, 1, others], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f"])
def test_causal(make_problem, name):
    """Outputs do not see later tokens."""
    problem = make_problem(200, 16, 24)
    state = tuple(problem.inputs[x] for x in "cnm")
    clean = ops.mlstm(*(problem.inputs[x] for x in "qkvif"), initial_state=state)
    problem.inputs[name] = problem.inputs[name].clone()
    problem.inputs[name][:, 101:] = torch.nan
    h = ops.mlstm(*(problem.inputs[x] for x in "qkvif"), initial_state=state)
    assert torch.allclose(h[:, :101], clean[:, :101], rtol=1e-5, atol=1e-6)
    assert h[:, 101].isnan().any()


def test_gradients_do_not_cross_heads(make_problem):
    problem = make_problem(100, 16, 24)
    clean = problem(ops.mlstm)
    for t in (problem.inputs["k"], problem.cotangents["h"]):
        t[0, 50, 1] = torch.nan
    got = problem(ops.mlstm)
    for name in ("dq", "dk", "dv", "di", "df"):
        assert torch.equal(got[name][1], clean[name][1]) and torch.equal(got[name][0, :, 0], clean[name][0, :, 0]), name
    for name in ("dc", "dn", "dm"):
        assert torch.equal(got[name][1], clean[name][1]) and torch.equal(got[name][0, 0], clean[name][0, 0]), name
        assert got[name][0, 1].isnan().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [None, (0, 0, 30, 31, 150)], ids=["whole", "packed"])
def test_writes_everything_and_repeats_itself(make_problem, nan_memory, dtype, offsets):
    problem = make_problem(150, 33, 20, batch=1 if offsets else 2, dtype=dtype, cu_seqlens=offsets)
    expected = problem(ops.mlstm)
    with nan_memory():
        poisoned = problem(ops.mlstm)
    again = problem(ops.mlstm)
    for name, t in expected.items():
        assert t.isfinite().all(), name
        assert torch.equal(t, poisoned[name]) and torch.equal(t, again[name]), name


@pytest.mark.cuda
@pytest.mark.slow
def test_offsets_of_64_bits():
    """v, h, dh and dv of more than 2^31 elements; the last tokens against the float64 reference.

    The gates forget within some hundred tokens, so that the last 2,000 tokens alone give the last 200, gradients too.
    """
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs a GPU with 70 GiB of memory")
    seq, heads, dqk, dv, window, tail = 2**19 + 77, 8, 64, 512, 2000, 200
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape, dtype: torch.randn(shape, generator=generator, dtype=dtype, device="cuda")  # noqa: E731
    q, k = (normal(1, seq, heads, dqk, dtype=torch.bfloat16) for _ in range(2))
    v, dh = (normal(1, seq, heads, dv, dtype=torch.bfloat16) for _ in range(2))
    assert v.numel() > 2**31
    i, f = (normal(1, seq, heads, dtype=torch.float32) for _ in range(2))
    inputs = [t.requires_grad_() for t in (q, k, v, i, f)]
    h = ops.mlstm(*inputs)
    gradients = torch.autograd.grad(h, inputs, dh)
    part = [t.detach()[:, -window:].double().requires_grad_() for t in inputs]
    want = reference.mlstm_chunkwise(*part)
    expected = torch.autograd.grad(want, part, dh[:, -window:].double())
    for name, got, good in zip(("h", "dq", "dk", "dv", "di", "df"), (h, *gradients), (want, *expected), strict=True):
        got, good = got[:, -tail:].detach().double(), good[:, -tail:].detach()
        assert (got - good).norm() <= 1e-2 * good.norm(), name
    # The first tokens: nothing was written there by an offset that wrapped.
    first = reference.mlstm_chunkwise(*(t.detach()[:, :tail].double() for t in inputs))
    assert (h[:, :tail].detach().double() - first).norm() <= 1e-2 * first.norm()


# --- autograd, fake tensors, compilation, export, autocast ------------------------------------------------------------


def operator_inputs(device, dtype=torch.float32, state=False, packed=False, requires_grad=True):
    """The first arguments of torch.ops.flash_xlstm.mlstm."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(requires_grad)

    batch, seq, heads, dqk, dv = 1 if packed else 2, 9, 2, 4, 6
    q, k = (normal(batch, seq, heads, dqk, dtype=dtype) for _ in range(2))
    v = normal(batch, seq, heads, dv, dtype=dtype)
    i, f = (normal(batch, seq, heads) for _ in range(2))
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device) if packed else None
    states = 3 if packed else batch
    shapes = (states, heads, dqk, dv), (states, heads, dqk), (states, heads)
    c, n, m = (normal(*shape) for shape in shapes) if state else (None, None, None)
    return q, k, v, i, f, c, n, m, cu_seqlens


VARIANTS = [
    {},
    {"state": True},
    {"state": True, "packed": True},
    {"packed": True, "dtype": torch.bfloat16},
    {"dtype": torch.float16, "state": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("final_state", [True, False])
def test_opcheck(device, variant, final_state):
    arguments = operator_inputs(device, **variant)
    scale, cap = (0.7, 2.0) if final_state else (None, None)
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm, (*arguments, scale, 1e-6, cap, 0, final_state))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck_without_gradients(device, variant):
    arguments = operator_inputs(device, **variant, requires_grad=False)
    for op in torch.ops.flash_xlstm.mlstm_h, torch.ops.flash_xlstm.mlstm_forward:
        torch.library.opcheck(op, (*arguments, 0.7, 1e-6, 2.0, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_h_is_the_same(make_problem, dtype):
    inputs = [make_problem(150, 16, 24, dtype=dtype).inputs[x] for x in "qkvif"]
    h = ops.mlstm(*inputs)  # none is required
    assert not h.requires_grad
    with torch.no_grad():
        assert torch.equal(ops.mlstm(*inputs), h)
        assert torch.equal(ops.mlstm(*inputs, return_final_state=True)[0], h)
        assert torch.equal(torch.ops.flash_xlstm.mlstm(*inputs, *[None] * 5, 1e-6, None, 0)[0], h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_eager_call_has_the_operators_gradients(make_problem, dtype):
    inputs = [make_problem(150, 16, 24, dtype=dtype).inputs[x].requires_grad_() for x in "qkvif"]
    h, kept, *_ = torch.ops.flash_xlstm.mlstm(*inputs, *[None] * 5, 1e-6, None, 0)
    assert h.requires_grad and not kept.requires_grad
    from_op = torch.autograd.grad(h.sum(), inputs)
    eager = ops.mlstm(*inputs)
    assert torch.equal(eager, h)
    for actual, expected in zip(torch.autograd.grad(eager.sum(), inputs), from_op, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("final_state", [True, False])
def test_opcheck_of_the_backward(device, variant, final_state):
    arguments, cap = operator_inputs(device, **variant, requires_grad=False), 2.0 if final_state else None
    h, kept, *last = torch.ops.flash_xlstm.mlstm(*arguments, None, 1e-6, cap, 0, True)
    last = [torch.ones_like(t) for t in last] if final_state else (None, None, None)
    torch.library.opcheck(
        torch.ops.flash_xlstm.mlstm_backward, (torch.ones_like(h), *last, *arguments, h, kept, None, 1e-6, cap, 0)
    )


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("state")], ids=str)
def test_opcheck_of_the_initial_backward(device, variant):
    arguments = operator_inputs(device, **variant, requires_grad=False)
    h, kept, *last = torch.ops.flash_xlstm.mlstm(*arguments, None, 1e-6, 2.0, 0, True)
    rest = (*arguments, h, kept, None, 1e-6, 2.0, 0)
    for into in ((None, None, None), [torch.ones_like(t) for t in last]):
        initial = (torch.ones_like(h), *into[:2], *rest)
        # Neither compiled nor traced: what `begun` holds is the device's.
        torch.library.opcheck(
            torch.ops.flash_xlstm.mlstm_initial_backward,
            initial,
            test_utils=("test_schema", "test_autograd_registration"),
        )
        *_, begun = torch.ops.flash_xlstm.mlstm_initial_backward(*initial)
        torch.library.opcheck(torch.ops.flash_xlstm.mlstm_remaining_backward, (torch.ones_like(h), *into, *rest, begun))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [None, (0, 0, 70, 71, 200)], ids=str)
@pytest.mark.parametrize("start", [0.0, 6.0])  # with 6 no token makes m anew
def test_gradients_of_the_initial_state_alone(make_problem, dtype, offsets, start):
    batch = 2 if offsets is None else 1
    problem = make_problem(200, 64, 64, batch=batch, dtype=dtype, cu_seqlens=offsets, gates="small", eps=0.1)
    problem.inputs["f"] = problem.inputs["f"] + 4
    problem.inputs["m"] = problem.inputs["m"] * 0.1 + start
    inputs = [problem.inputs[x] for x in "qkvifcnm"] + [problem.options.get("cu_seqlens")]
    h, kept, *last = torch.ops.flash_xlstm.mlstm(*inputs, None, 0.1, None, 0, True)
    dh, into = problem.cotangents["h"], [problem.cotangents["last c"], problem.cotangents["last n"]]
    dc, dn, into_m, is_open, *_ = torch.ops.flash_xlstm.mlstm_initial_backward(
        dh, *into, *inputs, h, kept, None, 0.1, None, 0
    )
    inner = lambda state, c, n: (state[0] * c).flatten(2).sum(-1) + (state[1] * n).sum(-1)  # noqa: E731
    # dm such that the final m, apart from what it means to c and n, has no gradient
    *_, want_dc, want_dn, want_dm = torch.ops.flash_xlstm.mlstm_backward(
        dh, *into, inner(last, *into), *inputs, h, kept, None, 0.1, None, 0
    )
    assert torch.allclose(dc, want_dc, rtol=1e-5, atol=1e-6) and torch.allclose(dn, want_dn, rtol=1e-5, atol=1e-6)
    sizes = (inputs[5].abs() * dc.abs()).flatten(2).sum(-1) + (inputs[6].abs() * dn.abs()).sum(-1)
    # In 16 bits dc is a sum of products with rounded operands, and dm, on CUDA, not the sum of these same numbers.
    bound = max(1e-5, torch.finfo(dtype).eps / 32)
    assert ((into_m - (want_dm - inner(inputs[5:7], dc, dn))).abs() <= bound * sizes + 1e-6).all()
    if start:
        assert is_open.all()
    else:
        lengths = torch.tensor([200, 200]) if offsets is None else torch.tensor(offsets).diff()
        assert not is_open[lengths > 50].any() and is_open[lengths == 0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [None, (0, 0, 1400, 1401, 3000)], ids=str)
@pytest.mark.parametrize("f", [4.0, 20.0])  # with 4 the ends remember a part of their sequences, with 20 all of them
def test_backward_in_two_parts(make_problem, device, dtype, offsets, f):
    problem = make_problem(3000, 128, 64, batch=2 if offsets is None else 1, dtype=dtype, cu_seqlens=offsets)
    problem.inputs["f"] = problem.inputs["f"] + f
    inputs = [problem.inputs[x] for x in "qkvifcnm"] + [problem.options.get("cu_seqlens")]
    h, kept, *_ = torch.ops.flash_xlstm.mlstm(*inputs, None, 1e-6, None, 0, True)
    rest = (*inputs, h, kept, None, 1e-6, None, 0)
    dh, into = problem.cotangents["h"], [problem.cotangents[f"last {x}"] for x in "cnm"]
    # The first part is of other gradients of the final state.
    dc, dn, _, _, dq, begun = torch.ops.flash_xlstm.mlstm_initial_backward(dh, None, None, *rest)
    *_, want_dc, want_dn, _ = torch.ops.flash_xlstm.mlstm_backward(dh, None, None, None, *rest)
    for actual, expected in ((dc, want_dc), (dn, want_dn)):  # sums of 3,000 terms, in another order
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    found = list(torch.ops.flash_xlstm.mlstm_remaining_backward(dh, *into, *rest, begun))
    if begun.numel() > 0:
        assert found[0].numel() == 0
        found[0] = dq
    for actual, expected in zip(found, torch.ops.flash_xlstm.mlstm_backward(dh, *into, *rest), strict=True):
        assert torch.equal(actual, expected)
    if device == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability() == (9, 0):
        assert begun.numel() > 0
        with pytest.raises(ValueError, match=r"begun has \d+ bytes; it must be what"):
            torch.ops.flash_xlstm.mlstm_remaining_backward(dh, *into, *rest, begun[1:])
    else:
        with pytest.raises(ValueError, match="begun has 8 bytes; it must be empty"):
            torch.ops.flash_xlstm.mlstm_remaining_backward(dh, *into, *rest, begun.new_zeros(8))


def test_opcheck_of_strided_inputs(device):
    q, k, v, i, f, *rest = operator_inputs(device)
    q, k, v = (t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm, (q, k, v, i, f, *rest, None, 1e-6, None, 0, True))


def test_double_backward_raises(make_problem):
    inputs = [make_problem(9, 4, 6).inputs[x].requires_grad_() for x in "qkvif"]
    (dq,) = torch.autograd.grad(ops.mlstm(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


def form(q, k, v, i, f, c, n, m):
    h, last = ops.mlstm(2 * q, k, v, i, f, initial_state=(c, n, m), gate_soft_cap=3.0, return_final_state=True)
    return h.float().square(), *(t.sin() for t in last)


def gradients_of(form, inputs):
    # No sum inside: the compiler chooses how to form one by its size, and compiles again for another.
    outputs = form(*inputs)
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])


def sequence_of(make_problem, seq, **options):
    return [t.detach().requires_grad_() for t in make_problem(seq, 16, 24, **options).inputs.values()]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_once_for_every_length(make_problem, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(form, fullgraph=True, dynamic=True, backend=backend)
    for seq in (37, 50, 64, 65, 130, 2):
        inputs = sequence_of(make_problem, seq)
        eager = gradients_of(form, inputs)
        with torch._dynamo.config.patch(error_on_recompile=seq != 37):
            gradients = gradients_of(compiled, inputs)
        for a, b in zip(gradients, eager, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiles_at_most_twice_by_default(make_problem):
    """Without dynamic=True torch assumes a varying dimension from the second length on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    for seq in (37, 50, 64, 65, 130):
        inputs = sequence_of(make_problem, seq)
        gradients_of(compiled, inputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiles_packed_sequences(make_problem, device):
    torch._dynamo.reset()

    def packed(q, k, v, i, f, cu_seqlens):
        h, (c, _, _) = ops.mlstm(q, k, v, i, f, cu_seqlens=cu_seqlens, return_final_state=True)
        return h.sum() + c.sum()

    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq, offsets in ((40, (0, 3, 40)), (70, (0, 64, 70)), (90, (0, 10, 20, 90))):
        inputs = sequence_of(make_problem, seq, batch=1, state=False)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
        eager = torch.autograd.grad(packed(*inputs, cu_seqlens), inputs)
        with torch._dynamo.config.patch(error_on_recompile=seq != 40):
            gradients = torch.autograd.grad(compiled(*inputs, cu_seqlens), inputs)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(gradients, eager, strict=True))


def test_exports_with_any_length(make_problem):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return ops.mlstm(q, k, v, i, f, return_final_state=True)

    seq = torch.export.Dim("seq", min=2, max=4096)
    inputs = sequence_of(make_problem, 37, state=False)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=[{1: seq}] * 5)
    for length in (37, 5, 130):
        inputs = sequence_of(make_problem, length, state=False)
        h, last = program.module()(*inputs)
        expected, expected_last = Module()(*inputs)
        assert torch.equal(h, expected)
        assert all(torch.equal(a, b) for a, b in zip(last, expected_last, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(make_problem, device, dtype, compiled):
    problem = make_problem(70, 16, 24)
    form = ops.mlstm
    if compiled:
        torch._dynamo.reset()
        form = torch.compile(ops.mlstm, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype):
        got = problem(form)
    assert got["h"].dtype == dtype
    assert all(got[name].dtype == torch.float32 for name in got if name != "h")
    for name in "qkv":
        problem.inputs[name] = problem.inputs[name].to(dtype)
    expected = problem(ops.mlstm)
    for name, t in expected.items():
        assert torch.equal(got[name], t.to(got[name].dtype)), name


def test_meta_tensors():
    shapes = [(2, 9, 2, 4)] * 2 + [(2, 9, 2, 6)] + [(2, 9, 2)] * 2
    h, (c, n, m) = ops.mlstm(*(torch.empty(shape, device="meta") for shape in shapes), return_final_state=True)
    assert h.is_meta and h.shape == (2, 9, 2, 6)
    assert (c.shape, n.shape, m.shape) == ((2, 2, 4, 6), (2, 2, 4), (2, 2))


# --- errors -----------------------------------------------------------------------------------------------------------


def shapes_of(batch=2, seq=8, heads=2, dqk=4, dv=6):
    inner, gate = (batch, seq, heads), (batch, seq, heads)
    return {"q": (*inner, dqk), "k": (*inner, dqk), "v": (*inner, dv), "i": gate, "f": gate}


def arguments(device, **sizes):
    return {name: torch.zeros(shape, device=device) for name, shape in shapes_of(**sizes).items()}


def zeros(*shape, **options):
    return lambda device: torch.zeros(shape, device=options.pop("device", device), **options)


def offsets(*values, dtype=torch.int32):
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


def state(c=(2, 2, 4, 6), n=(2, 2, 4), m=(2, 2), dtypes=(torch.float32,) * 3):
    make = lambda shape, dtype, device: None if shape is None else torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    return lambda device: tuple(make(s, d, device) for s, d in zip((c, n, m), dtypes, strict=True))


ONE_ROW = {name: zeros(*shape) for name, shape in shapes_of(batch=1).items()}
SHAPE, DTYPE = (ValueError, "has shape"), (TypeError, "has dtype")
F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16
# Cases: the arguments that differ from good ones, the error, the argument that it must name, and more text that it must
# contain.
ERRORS = {
    "q of 3 dimensions": ({"q": zeros(8, 2, 4)}, *SHAPE, "q"),
    "k of another seq": ({"k": zeros(2, 5, 2, 4)}, *SHAPE, "k"),
    "k of another dqk": ({"k": zeros(2, 8, 2, 5)}, *SHAPE, "k"),
    "v of other heads": ({"v": zeros(2, 8, 3, 6)}, *SHAPE, "v"),
    "i of other heads": ({"i": zeros(2, 8, 3)}, *SHAPE, "i"),
    "f of another batch": ({"f": zeros(1, 8, 2)}, *SHAPE, "f"),
    "f of 2 dimensions": ({"f": zeros(2, 8)}, *SHAPE, "f"),
    "seq of 0": ({n: zeros(*s) for n, s in shapes_of(seq=0).items()}, ValueError, "seq 0", "q"),
    "dqk of 0": ({n: zeros(*s) for n, s in shapes_of(dqk=0).items()}, ValueError, "dqk 0", "q"),
    "dv of 0": ({n: zeros(*s) for n, s in shapes_of(dv=0).items()}, ValueError, "dv 0", "v"),
    "q in float64": ({"q": zeros(2, 8, 2, 4, dtype=F64)}, *DTYPE, "q"),
    "q of integers": ({"q": zeros(2, 8, 2, 4, dtype=torch.int32)}, *DTYPE, "q"),
    "k in bfloat16": ({"k": zeros(2, 8, 2, 4, dtype=BF16)}, *DTYPE, "k"),
    "v in float16": ({"v": zeros(2, 8, 2, 6, dtype=F16)}, *DTYPE, "v"),
    "i in float64": ({"i": zeros(2, 8, 2, dtype=F64)}, *DTYPE, "i"),
    "f in bfloat16": ({"f": zeros(2, 8, 2, dtype=BF16)}, *DTYPE, "f"),
    "q not contiguous": ({"q": lambda d: torch.zeros(2, 8, 4, 2, device=d).mT}, ValueError, "stride", "q"),
    "k not contiguous": ({"k": lambda d: torch.zeros(2, 8, 2, 8, device=d)[..., ::2]}, ValueError, "stride", "k"),
    "v not contiguous": ({"v": lambda d: torch.zeros(2, 8, 6, 2, device=d).mT}, ValueError, "stride", "v"),
    "chunk_size below 1": ({"chunk_size": -1}, ValueError, "is -1", "chunk_size"),
    "chunk_size too large": ({"chunk_size": 4097}, ValueError, "is 4097", "chunk_size"),
    "scale nan": ({"scale": float("nan")}, ValueError, "finite", "scale"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "finite", "scale"),
    "scale 0": ({"scale": 0.0}, ValueError, "other than 0 in float32", "scale"),
    "scale 0 in float32": ({"scale": 1e-60}, ValueError, "other than 0 in float32", "scale"),
    "scale infinite in float32": ({"scale": 1e60}, ValueError, "finite", "scale"),
    "eps 0 in float32": ({"eps": 1e-60}, ValueError, "greater than 0 in float32", "eps"),
    "eps infinite in float32": ({"eps": 1e60}, ValueError, "finite", "eps"),
    "eps negative": ({"eps": -1e-6}, ValueError, "at least 0", "eps"),
    "eps nan": ({"eps": float("nan")}, ValueError, "finite", "eps"),
    "c of another batch": ({"initial_state": state((3, 2, 4, 6), (3, 2, 4), (3, 2))}, *SHAPE, "initial_state c"),
    "n of another dqk": ({"initial_state": state(n=(2, 2, 5))}, *SHAPE, "initial_state n"),
    "m of other heads": ({"initial_state": state(m=(2, 3))}, *SHAPE, "initial_state m"),
    "c without n": ({"initial_state": state(n=None)}, ValueError, "all of", "initial_state"),
    "no c": ({"initial_state": state(c=None)}, ValueError, "all of", "initial_state"),
    "n in bfloat16": ({"initial_state": state(dtypes=(torch.float32, BF16, torch.float32))}, *DTYPE, "initial_state n"),
    "m in float64": ({"initial_state": state(dtypes=(torch.float32, torch.float32, F64))}, *DTYPE, "initial_state m"),
    "gate_soft_cap 0": ({"gate_soft_cap": 0.0}, ValueError, "greater than 0", "gate_soft_cap"),
    "gate_soft_cap negative": ({"gate_soft_cap": -15.0}, ValueError, "greater than 0", "gate_soft_cap"),
    "gate_soft_cap 0 in float32": ({"gate_soft_cap": 1e-50}, ValueError, "greater than 0", "gate_soft_cap"),
    "gate_soft_cap nan": ({"gate_soft_cap": float("nan")}, ValueError, "finite", "gate_soft_cap"),
    "gate_soft_cap infinite": ({"gate_soft_cap": float("inf")}, ValueError, "finite", "gate_soft_cap"),
    "cu_seqlens of int64": ({**ONE_ROW, "cu_seqlens": offsets(0, 8, dtype=torch.int64)}, *DTYPE, "cu_seqlens"),
    "one offset": ({**ONE_ROW, "cu_seqlens": offsets(0)}, ValueError, "at least 2", "cu_seqlens"),
    "cu_seqlens of 2 dimensions": ({**ONE_ROW, "cu_seqlens": lambda d: offsets(0, 8)(d)[None]}, *SHAPE, "cu_seqlens"),
    "cu_seqlens strided": (
        {**ONE_ROW, "cu_seqlens": lambda d: offsets(0, 0, 8, 8)(d)[::2]}, ValueError, "contiguous", "cu_seqlens",
    ),
    "packing with batch 2": ({"cu_seqlens": offsets(0, 8)}, ValueError, "batch 2", "q"),
    "state of batch though packed": (
        {**ONE_ROW, "cu_seqlens": offsets(0, 3, 8), "initial_state": state((1, 2, 4, 6), (1, 2, 4), (1, 2))},
        *SHAPE, "initial_state c",
    ),
}  # fmt: skip
# Checked only where the offsets can be read without waiting for a GPU.
CPU_ERRORS = {
    "cu_seqlens not from 0": ({**ONE_ROW, "cu_seqlens": offsets(1, 8)}, ValueError, "must be 0", "cu_seqlens"),
    "cu_seqlens negative": ({**ONE_ROW, "cu_seqlens": offsets(0, -1, 8)}, ValueError, "decrease", "cu_seqlens"),
    "cu_seqlens unsorted": ({**ONE_ROW, "cu_seqlens": offsets(0, 5, 3, 8)}, ValueError, "decrease", "cu_seqlens"),
    "cu_seqlens too long": ({**ONE_ROW, "cu_seqlens": offsets(0, 9)}, ValueError, "seq = 8", "cu_seqlens"),
    "cu_seqlens too short": ({**ONE_ROW, "cu_seqlens": offsets(0, 4)}, ValueError, "seq = 8", "cu_seqlens"),
}


def check_error(form, device, changes, error, says, names, grad=False):
    given = arguments(device)
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    if grad and given["v"].is_floating_point():
        given["v"].requires_grad_()
    with pytest.raises(error, match=says) as raised:
        form(**given)
    assert type(raised.value) is error
    assert str(raised.value).startswith(names)


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors(device, wrong):
    check_error(ops.mlstm, device, *ERRORS[wrong])


@pytest.mark.parametrize("wrong", CPU_ERRORS)
def test_errors_of_offsets_on_the_cpu(wrong):
    check_error(ops.mlstm, "cpu", *CPU_ERRORS[wrong])


# With gradients the backward is traced too, before the forward raises: its fakes must accept wrong arguments.
WITH_GRADIENTS = [
    "q of 3 dimensions",
    "k of another seq",
    "f of 2 dimensions",
    "v in float16",
    "v not contiguous",
    "c of another batch",
    "c without n",
    "no c",
    "m of other heads",
    "n in bfloat16",
    "packing with batch 2",
    "state of batch though packed",
]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_errors_under_compile(device, grad):
    wrongs = {**ERRORS, **(CPU_ERRORS if device == "cpu" else {})}
    for name in WITH_GRADIENTS if grad else wrongs:
        torch._dynamo.reset()
        compiled = torch.compile(ops.mlstm, fullgraph=True, dynamic=grad, backend="aot_eager")
        try:
            check_error(compiled, device, *wrongs[name], grad=grad)
        except BaseException as e:
            raise AssertionError(f"{name}: {e}") from e


# These are found before an operator call that could fail at run time. Under compile torch wraps them.
WRAPPED_ERRORS = {
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "it must be", "chunk_size"),
    "chunk_size a list": ({"chunk_size": []}, TypeError, "whole number", "chunk_size"),
    "return_final_state a string": ({"return_final_state": "x"}, TypeError, "True or False", "return_final_state"),
    "state of two": ({"initial_state": lambda d: state()(d)[:2]}, TypeError, "it must be", "initial_state"),
    "state a tensor": ({"initial_state": zeros(3, 3)}, TypeError, "it must be", "initial_state"),
    "c in float16": (
        {"initial_state": state(dtypes=(F16, torch.float32, torch.float32))},
        TypeError,
        "it must be float32 or bfloat16",
        "initial_state c",
    ),
    "k on meta": ({"k": lambda d: torch.zeros(2, 8, 2, 4, device="meta")}, ValueError, "it must be", "k"),
    "i on meta": ({"i": lambda d: torch.zeros(2, 8, 2, device="meta")}, ValueError, "it must be", "i"),
    "cu_seqlens on meta": (
        {**ONE_ROW, "cu_seqlens": lambda d: offsets(0, 8)("meta")},
        ValueError,
        "it must be",
        "cu_seqlens",
    ),
    "state on meta": ({"initial_state": lambda d: state()("meta")}, ValueError, "it must be", "initial_state c"),
}


@pytest.mark.parametrize("wrong", WRAPPED_ERRORS)
def test_errors_that_torch_wraps_under_compile(device, wrong):
    changes, error, says, names = WRAPPED_ERRORS[wrong]
    check_error(ops.mlstm, device, changes, error, says, names)
    torch._dynamo.reset()
    given = arguments(device)
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    with pytest.raises(Exception, match=f"{names} (is|has) .*{says}"):
        torch.compile(ops.mlstm, fullgraph=True, backend="aot_eager")(**given)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k", "v", "i", "f", "cu_seqlens", "c", "n", "m"])
def test_errors_of_devices(name):
    given = arguments("cuda", batch=1)
    given["cu_seqlens"] = offsets(0, 8)("cuda")
    given["initial_state"] = list(state((1, 2, 4, 6), (1, 2, 4), (1, 2))("cuda"))
    if name in "cnm":
        place = "cnm".index(name)
        given["initial_state"][place] = given["initial_state"][place].cpu()
    else:
        given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu"):
        ops.mlstm(**given)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [F16, BF16, torch.float32], ids=str)
def test_h_is_kept_only_where_a_backward_reads_it(dtype):
    q, k, v, i, f = (
        torch.randn(2, 1024, 4, size, device="cuda", dtype=dtype, requires_grad=True) for size in (64, 64, 256, 1, 1)
    )
    ops.mlstm(q, k, v, i[..., 0], f[..., 0]).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = ops.mlstm(q, k, v, i[..., 0], f[..., 0]).sum()
    held, h = torch.cuda.memory_allocated() - before, v.numel() * v.element_size()
    assert (held > h) == (dtype == torch.float32), (held, h)
    loss.backward()


# --- on the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_not_finite_gradient_reaches_only_what_depends_on_it(make_problem, dtype, value):
    problem = make_problem(150, 16, 24, dtype=dtype, state=False)
    t = 70
    clean = problem(ops.mlstm)
    problem.cotangents["h"][0, t, 1, 3] = value
    got = problem(ops.mlstm)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(got[name][1], clean[name][1]) and torch.equal(got[name][0, :, 0], clean[name][0, :, 0]), name
        assert torch.equal(got[name][0, t + 1 :, 1], clean[name][0, t + 1 :, 1]), name
    assert not got["dq"][0, t, 1].isfinite().all() and not got["dk"][0, t, 1].isfinite().all()
    others = [x for x in range(24) if x != 3]
    assert torch.equal(got["dv"][:, :, :, others], clean["dv"][:, :, :, others])


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 16}, {"state": True}, {"cu_seqlens": [0, 1, 1, 130, 194, 300]}], ids=str
)
@pytest.mark.parametrize("dqk, dv", [(16, 24), (5, 3), (256, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_kept_states_change_nothing(make_problem, dtype, dqk, dv, options, threads):
    """The forward keeps states for the backward, which else makes them again: the same bits."""
    packed = options.get("cu_seqlens")
    problem = make_problem(
        **{"seq": 300, "dqk": dqk, "dv": dv, "batch": 1 if packed else 2, "heads": 2, "state": False, **options},
        dtype=dtype,
    )
    before, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        for keep in (True, False, True):
            results.append(problem(functools.partial(ops.mlstm, keep_states=keep)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def test_kept_states_take_the_memory_that_they_are_said_to_take():
    for dqk, dv, tokens in ((128, 128, 64), (256, 256, 128)):
        inputs = [torch.randn(2, 513, 3, *size) for size in ((dqk,), (dqk,), (dv,), (), ())]
        sizes = [
            torch.ops.flash_xlstm.mlstm_forward(*inputs, *[None] * 5, 1e-6, None, 0, keep)[1].numel()
            for keep in (True, False)
        ]
        assert sizes[0] - sizes[1] == 2 * 3 * (512 // tokens) * dqk * (dv + 2) + 16


# --- random problems --------------------------------------------------------------------------------------------------


@st.composite
def offsets_of(draw, seq):
    """None, or offsets of packed sequences, empty ones among them."""
    if draw(st.booleans()):
        return None
    return [0, *sorted(draw(st.lists(st.integers(0, seq), max_size=3))), seq]


@st.composite
def problems(draw):
    seq = draw(st.integers(1, 140))
    packed = draw(offsets_of(seq))
    return {
        "seq": seq,
        "dqk": draw(st.integers(2, 40)),  # with dqk 1, a single token's dq is 0 up to rounding
        "dv": draw(st.integers(1, 40)),
        "batch": 1 if packed else draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "layout": draw(st.sampled_from(["contiguous", "heads first", "slice"])),
        "gates": draw(st.sampled_from(["small", "normal"])),  # over the range of a cap: test_gate_soft_cap
        "gate_soft_cap": draw(st.sampled_from([None, None, 15.0])),
        "state": seq < 5 or draw(st.booleans()),  # without one, dq and dk of single tokens are 0 up to rounding
        "cu_seqlens": packed,
        "chunk_size": draw(st.sampled_from([None, None, 1, 16, 50])),
        "scale": draw(st.sampled_from([None, None, 0.5])),
        "seed": draw(st.integers(0, 1000)),
    }


def test_random_problems(fuzz, make_problem, assert_float32_exact, assert_16_bit_exact):
    ratios = {}

    @fuzz(500)
    @given(case=problems(), dtype=st.sampled_from([torch.float32, torch.float32, F16, BF16]), same=st.booleans())
    def run(case, dtype, same):
        if dtype == torch.float32:
            assert_float32_exact(make_problem(**case), ops.mlstm, strict=False, small=True)
        else:
            problem = make_problem(**case, dtype=dtype, gate_dtype=dtype if same else None)
            assert_16_bit_exact(problem, ops.mlstm, ("h",), small=True, ratios=ratios)

    run()
    means = {name: statistics.fmean(each) for name, each in ratios.items()}
    assert means and max(means.values()) <= 1.0, means
