from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch._dynamo.utils
from hypothesis import given
from hypothesis import strategies as st

from flash_xlstm import ops

THROUGH = {"h": ("h",), "state": ("last c", "last n"), "all": ("h", "last c", "last n")}
SEQS = (1, 2, 63, 64, 65, 127, 300)
DIMS = ((5, 16), (33, 64), (64, 33), (16, 5), (80, 128), (128, 80), (64, 64))
LAYOUTS = ("contiguous", "heads first", "slice")
GATES = (("small", None), ("normal", 0.7), ("spread", None), ("beyond", 15.0))
EPS = (1e-6, 0.1, 0.0)
NORMALIZE = pytest.mark.parametrize("normalize", [True, False])


def _cases():
    """Every seq with every kind of gates; sizes, heads, layouts, eps and states take turns."""
    for turn, (seq, (gates, cap)) in enumerate(itertools.product(SEQS, GATES)):
        dqk, dv = DIMS[turn % len(DIMS)]
        options = {
            "seq": seq,
            "gates": gates,
            "gate_soft_cap": cap,
            "dqk": dqk,
            "dv": dv,
            "heads": 1 + turn % 3,
            "layout": LAYOUTS[turn // 2 % 3],
            "eps": EPS[turn // 3 % 3],
            "state": turn % 5 != 0,
        }
        yield pytest.param(options, id=f"{seq}-{gates}-{dqk}x{dv}")


CASES = list(_cases())


# --- outputs, states, gradients ---------------------------------------------------------------------------------------


@NORMALIZE
@pytest.mark.parametrize("case", CASES)
def test_float32(make_problem, assert_float32_exact, device, case, normalize):
    problem = make_problem(**case, normalize=normalize, seed=case["seq"])
    strict = device == "cpu" or case["gates"] in ("small", "normal")  # the CPU sums the gates' gradients in float64
    for through in THROUGH.values():
        assert_float32_exact(problem, ops.mlstm_sig, through, strict=strict)


@NORMALIZE
@pytest.mark.parametrize("gate_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[::5])
def test_16_bit(make_problem, assert_16_bit_exact, case, dtype, gate_dtype, normalize):
    gate_dtype = dtype if gate_dtype == "same" else torch.float32
    # Relative errors of very few numbers would compare two roundings. With nearly closed forget gates the state depends
    # on the last token or two only, and its gradient in the input gates has as few numbers.
    batch = max(16 if case["gates"] == "beyond" else 2, 64 // case["seq"])
    problem = make_problem(
        **case, batch=batch, dtype=dtype, gate_dtype=gate_dtype, normalize=normalize, seed=case["seq"]
    )
    for through in ("h", "state"):
        assert_16_bit_exact(problem, ops.mlstm_sig, THROUGH[through])


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_dimensions(make_problem, assert_float32_exact, assert_16_bit_exact, dtype, normalize):
    problem = make_problem(70, 256, 512, batch=1, heads=1, dtype=dtype, normalize=normalize)
    (assert_float32_exact if dtype == torch.float32 else assert_16_bit_exact)(problem, ops.mlstm_sig)


@NORMALIZE
@pytest.mark.parametrize(
    "options", [{"scale": 1.0}, {"scale": -0.3}, {"chunk_size": 1}, {"chunk_size": 7}, {"chunk_size": 200}], ids=str
)
def test_options(make_problem, assert_float32_exact, options, normalize):
    assert_float32_exact(make_problem(130, 16, 24, normalize=normalize, **options), ops.mlstm_sig)


@NORMALIZE
def test_long_sequence(make_problem, assert_float32_exact, normalize):
    assert_float32_exact(make_problem(2500, 32, 16, batch=1, gates="small", normalize=normalize), ops.mlstm_sig)


def test_normalizer_below_its_floor_of_1(make_problem):
    problem = make_problem(70, 16, 24, normalize=True, state=False, scale=1e-3, eps=0.25)
    got = problem(ops.mlstm_sig, ("h",))
    del problem.cotangents["last n"]
    numerator = problem(ops.mlstm_sig, ("h",), normalize=False)
    for name in ("h", "dq", "dk", "dv", "di", "df"):
        assert (1.25 * got[name] - numerator[name]).norm() <= 1e-5 * numerator[name].norm(), name


def test_is_the_mlstm_without_a_stabilizer(make_problem):
    """log(sigmoid(i)) as the exponential gate: the numerator of h is that of the mLSTM times exp(m)."""
    q, k, v, i, f = make_problem(150, 16, 24, state=False).inputs.values()
    h = ops.mlstm_sig(q, k, v, i, f, normalize=False)
    _, (c, n, m) = ops.mlstm(q, k, v, torch.nn.functional.logsigmoid(i), f, return_final_state=True)
    _, (c_sig, n_sig) = ops.mlstm_sig(q, k, v, i, f, return_final_state=True)
    assert torch.allclose(c_sig, c * m.exp()[..., None, None], rtol=1e-4, atol=1e-5)
    assert torch.allclose(n_sig, n * m.exp()[..., None], rtol=1e-4, atol=1e-5)
    assert torch.allclose(h[:, -1], (q[:, -1, :, None] @ c_sig)[..., 0, :] / 4, rtol=1e-4, atol=1e-4)


@NORMALIZE
def test_saturated_gates_have_exact_gradients(make_problem, normalize):
    """Each gradient is exact down to slopes of 1e-6, where the difference 1 - tanh^2 would have lost all digits."""
    problem = make_problem(1, 16, 24, batch=40, normalize=normalize, gate_soft_cap=2.0)
    for tensors in (problem.inputs, problem.cotangents):
        tensors.update({name: t.abs() for name, t in tensors.items()})
    for name in "if":
        problem.inputs[name] = torch.linspace(-16, 16, 80, device=problem.inputs["q"].device).view(40, 1, 2)
    through = ("h",)
    if normalize:  # at a fixed normalizer, which would cancel most of the gradient
        problem.options["scale"] = 1e-3
    got, expected = problem(ops.mlstm_sig, through), problem.reference(through=through)
    for name in ("di", "df"):
        assert expected[name].abs().min() < 1e-5 * expected[name].abs().max()
        assert torch.allclose(got[name].double(), expected[name], rtol=1e-5, atol=0.0), name


@NORMALIZE
@pytest.mark.parametrize("layout", ["heads first", "slice"])
def test_strides_change_nothing(make_problem, layout, normalize):
    dense, strided = (
        make_problem(70, 16, 24, layout=x, normalize=normalize)(ops.mlstm_sig) for x in ("contiguous", layout)
    )
    for name, t in dense.items():
        assert torch.equal(t, strided[name]), name


def test_strided_state_and_gates(make_problem):
    problem = make_problem(70, 16, 24, normalize=True)
    expected = problem(ops.mlstm_sig)
    c, n, i, f = (problem.inputs[x] for x in "cnif")
    problem.inputs["c"] = c.transpose(2, 3).contiguous().transpose(2, 3)
    problem.inputs["n"] = torch.stack([n, n], -1)[..., 0]
    problem.inputs["i"], problem.inputs["f"] = (torch.stack([t] * 3, -1)[..., 1] for t in (i, f))
    for name, t in problem(ops.mlstm_sig).items():
        assert torch.equal(t, expected[name]), name


@NORMALIZE
def test_only_some_gradients(make_problem, normalize):
    problem = make_problem(70, 16, 24, normalize=normalize)
    expected = problem(ops.mlstm_sig, ("h",))
    inputs = {name: t.clone().requires_grad_(name in "kfc") for name, t in problem.inputs.items()}
    h = ops.mlstm_sig(*(inputs[x] for x in "qkvif"), initial_state=(inputs["c"], inputs.get("n")), normalize=normalize)
    h.backward(problem.cotangents["h"])
    for name, t in inputs.items():
        assert torch.equal(t.grad, expected[f"d{name}"]) if name in "kfc" else t.grad is None


@NORMALIZE
def test_continues_from_its_final_state(make_problem, normalize):
    q, k, v, i, f = make_problem(150, 16, 24, state=False).inputs.values()
    whole, last = ops.mlstm_sig(q, k, v, i, f, normalize=normalize, return_final_state=True)
    parts, state = [], None
    for start, stop in itertools.pairwise((0, 1, 64, 70, 150)):
        part = (t[:, start:stop] for t in (q, k, v, i, f))
        h, state = ops.mlstm_sig(*part, initial_state=state, normalize=normalize, return_final_state=True)
        parts.append(h)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    assert (last[1] is None) == (state[1] is None) == (not normalize)
    for a, b in zip(state, last, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@NORMALIZE
def test_bfloat16_state(make_problem, normalize):
    problem = make_problem(70, 16, 24, normalize=normalize)
    problem.inputs["c"] = problem.inputs["c"].bfloat16()
    got = problem(ops.mlstm_sig)
    assert got["last c"].dtype == got["dc"].dtype == torch.bfloat16
    problem.inputs["c"] = problem.inputs["c"].float()
    problem.cotangents["last c"] = problem.cotangents["last c"].bfloat16().float()
    for name, t in problem(ops.mlstm_sig).items():
        assert torch.equal(got[name], t.bfloat16() if name in ("last c", "dc") else t), name


# --- padding, packing, empty tensors ----------------------------------------------------------------------------------


@NORMALIZE
@pytest.mark.parametrize("gate_soft_cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding(make_problem, assert_padding_changes_nothing, device, dtype, gate_soft_cap, normalize):
    options = {"gate_dtype": torch.float32, "gate_soft_cap": gate_soft_cap, "normalize": normalize}
    problem = make_problem(200, 16, 24, dtype=dtype, **options)
    padding = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.4
    padding[0, :130], padding[1, 64:128], padding[1, 190:] = True, True, True
    assert_padding_changes_nothing(problem, ops.mlstm_sig, padding.to(device))


@NORMALIZE
@pytest.mark.parametrize("gate_soft_cap", [None, 2.0])
@pytest.mark.parametrize("state", [True, False])
def test_nothing_but_padding(make_problem, device, state, gate_soft_cap, normalize):
    problem = make_problem(70, 16, 24, state=state, gate_soft_cap=gate_soft_cap, normalize=normalize)
    dh = problem.cotangents["h"].clone()
    problem.pad(torch.ones(2, 70, dtype=torch.bool, device=device))
    problem.cotangents["h"] = dh  # the gradients of whose k, v, i and f are 0
    got = problem(ops.mlstm_sig)
    assert all(t.isfinite().all() for t in got.values())
    for name in ("di", "df"):
        assert not got[name].any(), name
    for name in "cn" if normalize else "c":
        if state:
            assert torch.equal(got[f"last {name}"], problem.inputs[name])
        else:
            assert not got[f"last {name}"].any()
    if not state:
        assert not got["h"].any()


@NORMALIZE
def test_garbage_under_padding_stays_there(make_problem, device, normalize):
    problem = make_problem(150, 16, 24, normalize=normalize)
    padding = (torch.arange(150, device=device) % 4 == 2).expand(2, -1)
    problem.pad(padding)
    want = problem(ops.mlstm_sig)
    for name in "kv":
        problem.inputs[name] = problem.inputs[name].clone()
        problem.inputs[name][padding] = torch.nan
    got = problem(ops.mlstm_sig)
    for name in ("h", "last c", "last n") if normalize else ("h", "last c"):
        t, w = (x[name] if name != "h" else x[name][~padding] for x in (got, want))
        assert torch.allclose(t, w, rtol=1e-4, atol=1e-5), name


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 1, 1, 64, 65, 200), (0, *range(1, 41), 200)], ids=["empty", "short"])
@pytest.mark.parametrize("state", [True, False])
def test_packed(make_problem, assert_float32_exact, assert_16_bit_exact, offsets, dtype, state, normalize):
    options = {"state": state, "cu_seqlens": offsets, "normalize": normalize, "layout": "heads first"}
    problem = make_problem(200, 16, 24, batch=1, dtype=dtype, seed=len(offsets), **options)
    (assert_float32_exact if dtype == torch.float32 else assert_16_bit_exact)(problem, ops.mlstm_sig)


@NORMALIZE
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}], ids=str)
def test_empty(make_problem, sizes, normalize):
    problem = make_problem(5, 4, 6, normalize=normalize, **sizes)
    got = problem(ops.mlstm_sig)
    for name, t in problem.inputs.items():
        assert got[f"d{name}"].shape == t.shape
    assert got["h"].shape == problem.inputs["v"].shape
    assert got["last c"].shape == problem.inputs["c"].shape


# --- not-a-number, unwritten memory, repeatability --------------------------------------------------------------------


@NORMALIZE
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_not_finite_reaches_only_what_depends_on_it(make_problem, name, dtype, normalize):
    inputs, t = make_problem(150, 16, 24, dtype=dtype, state=False).inputs, 70
    clean = ops.mlstm_sig(**inputs, normalize=normalize)
    inputs[name] = inputs[name].clone()
    inputs[name][0, t, 1, 3] = torch.nan
    h = ops.mlstm_sig(**inputs, normalize=normalize)
    assert torch.equal(h[1], clean[1]) and torch.equal(h[0, :, 0], clean[0, :, 0])
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(h[0, :t, 1], clean[0, :t, 1], rtol=tolerance, atol=1e-5)
    assert h[0, t, 1, 3].isnan()
    if name == "q":
        assert torch.allclose(h[0, t + 1 :, 1], clean[0, t + 1 :, 1], rtol=tolerance, atol=1e-5)


@NORMALIZE
@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f"])
def test_causal(make_problem, name, normalize):
    """Outputs do not see later tokens."""
    inputs = make_problem(200, 16, 24, state=False).inputs
    clean = ops.mlstm_sig(**inputs, normalize=normalize)
    inputs[name] = inputs[name].clone()
    inputs[name][:, 101:] = torch.nan
    h = ops.mlstm_sig(**inputs, normalize=normalize)
    assert torch.allclose(h[:, :101], clean[:, :101], rtol=1e-5, atol=1e-6)
    assert h[:, 101].isnan().any()


@NORMALIZE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offsets", [None, (0, 0, 30, 31, 150)], ids=["whole", "packed"])
def test_writes_everything_and_repeats_itself(make_problem, nan_memory, dtype, offsets, normalize):
    options = {"cu_seqlens": offsets, "normalize": normalize, "gate_soft_cap": 3.0}
    problem = make_problem(150, 33, 20, batch=1 if offsets else 2, dtype=dtype, **options)
    expected = problem(ops.mlstm_sig)
    with nan_memory():
        poisoned = problem(ops.mlstm_sig)
    again = problem(ops.mlstm_sig)
    for name, t in expected.items():
        assert t.isfinite().all(), name
        assert torch.equal(t, poisoned[name]) and torch.equal(t, again[name]), name


# --- autograd, fake tensors, compilation, export, autocast ------------------------------------------------------------


def operator_inputs(device, dtype=torch.float32, state=False, packed=False, normalize=True, requires_grad=True):
    """Arguments of torch.ops.flash_xlstm.mlstm_sig."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(requires_grad)

    batch, seq, heads, dqk, dv = 1 if packed else 2, 9, 2, 4, 6
    q, k = (normal(batch, seq, heads, dqk, dtype=dtype) for _ in range(2))
    v = normal(batch, seq, heads, dv, dtype=dtype)
    i, f = (normal(batch, seq, heads) for _ in range(2))
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device) if packed else None
    states = 3 if packed else batch
    c = normal(states, heads, dqk, dv) if state else None
    n = normal(states, heads, dqk) if state and normalize else None
    return q, k, v, i, f, c, n, cu_seqlens


VARIANTS = [
    {},
    {"state": True, "packed": True},
    {"dtype": torch.float16, "state": True, "normalize": False},
    {"packed": True, "dtype": torch.bfloat16, "normalize": False},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("final_state", [True, False])
def test_opcheck(device, variant, final_state):
    arguments, normalize = operator_inputs(device, **variant), variant.get("normalize", True)
    scale, cap = (0.7, 2.0) if final_state else (None, None)
    flags = final_state, normalize, not final_state  # the last: keep_states
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm_sig, (*arguments, scale, 1e-6, cap, 0, *flags))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("final_state", [True, False])
def test_opcheck_of_the_backward(device, variant, final_state):
    arguments = operator_inputs(device, **variant, requires_grad=False)
    normalize, cap = variant.get("normalize", True), 2.0 if final_state else None
    h, s, *last = torch.ops.flash_xlstm.mlstm_sig(*arguments, None, 1e-6, cap, 0, True, normalize)
    last = [torch.ones_like(t) if t.numel() else None for t in last] if final_state else (None, None)
    torch.library.opcheck(
        torch.ops.flash_xlstm.mlstm_sig_backward,
        (torch.ones_like(h), *last, *arguments, h, s, None, 1e-6, cap, 0, normalize),
    )


def test_double_backward_raises(make_problem):
    inputs = [t.requires_grad_() for t in make_problem(9, 4, 6, state=False).inputs.values()]
    (dq,) = torch.autograd.grad(ops.mlstm_sig(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dq.sum().backward()


@NORMALIZE
def test_states_are_kept_for_a_backward(make_problem, monkeypatch, normalize):
    module, found = importlib.import_module("flash_xlstm.ops.mlstm_sig"), []
    monkeypatch.setattr(
        module, "_mlstm_sig", lambda *args: found.append(args[-1]) or torch.ops.flash_xlstm.mlstm_sig(*args)
    )

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return ops.mlstm_sig(*inputs, normalize=normalize)

    inputs = [t.requires_grad_() for t in make_problem(9, 4, 6, state=False).inputs.values()]
    ops.mlstm_sig(*inputs, normalize=normalize)
    ops.mlstm_sig(*inputs, normalize=normalize, keep_states=False)
    with torch.no_grad():
        ops.mlstm_sig(*inputs, normalize=normalize)
    torch.export.export(Module(), tuple(inputs))
    assert found == [True, False, False, False]


@NORMALIZE
def test_compiles_once_for_every_length(make_problem, normalize):
    def form(q, k, v, i, f, c, n=None):
        options = {"normalize": normalize, "gate_soft_cap": 3.0, "return_final_state": True}
        h, last = ops.mlstm_sig(2 * q, k, v, i, f, initial_state=(c, n), **options)
        return h.float().square(), *(t.sin() for t in last if t is not None)

    def gradients_of(form, inputs):
        # No sum inside: the compiler chooses how to form one by its size, and compiles again for another.
        outputs = form(*inputs)
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in (37, 64, 130, 2):
        problem = make_problem(seq, 16, 24, normalize=normalize)
        inputs = [t.detach().requires_grad_() for t in problem.inputs.values()]
        eager = gradients_of(form, inputs)
        with torch._dynamo.config.patch(error_on_recompile=seq != 37):
            gradients = gradients_of(compiled, inputs)
        for a, b in zip(gradients, eager, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@NORMALIZE
def test_exports_with_any_length(make_problem, normalize):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, i, f):
            return ops.mlstm_sig(q, k, v, i, f, normalize=normalize, return_final_state=True)

    make = lambda seq: tuple(make_problem(seq, 16, 24, state=False).inputs.values())  # noqa: E731
    seq = torch.export.Dim("seq", min=2, max=4096)
    program = torch.export.export(Module(), make(37), dynamic_shapes=[{1: seq}] * 5)
    for length in (37, 5, 130):
        h, (c, n) = program.module()(*make(length))
        expected, (expected_c, expected_n) = Module()(*make(length))
        assert torch.equal(h, expected) and torch.equal(c, expected_c)
        assert n is expected_n is None or torch.equal(n, expected_n)


@NORMALIZE
def test_autocast(make_problem, device, normalize):
    problem = make_problem(70, 16, 24, normalize=normalize)
    with torch.autocast(device, torch.bfloat16):
        got = problem(ops.mlstm_sig)
    assert got["h"].dtype == torch.bfloat16
    assert all(got[name].dtype == torch.float32 for name in got if name != "h")
    for name in "qkv":
        problem.inputs[name] = problem.inputs[name].bfloat16()
    for name, t in problem(ops.mlstm_sig).items():
        assert torch.equal(got[name], t.to(got[name].dtype)), name


@NORMALIZE
def test_meta_tensors(normalize):
    shapes = [(2, 9, 2, 4)] * 2 + [(2, 9, 2, 6)] + [(2, 9, 2)] * 2
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    h, (c, n) = ops.mlstm_sig(*inputs, normalize=normalize, return_final_state=True)
    assert h.is_meta and h.shape == (2, 9, 2, 6) and c.shape == (2, 2, 4, 6)
    assert n.shape == (2, 2, 4) if normalize else n is None


# --- errors -----------------------------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return lambda device: torch.zeros(shape, **{"device": device, **options})


def state(c=(2, 2, 4, 6), n=(2, 2, 4), **options):
    return lambda device: tuple(None if shape is None else zeros(*shape, **options)(device) for shape in (c, n))


SHAPE, DTYPE = (ValueError, "has shape"), (TypeError, "has dtype")
# Cases as in test_mlstm: the arguments that differ from good ones, the error, its text, the argument that it names.
# Checks that both ops share have a few cases each.
ERRORS = {
    "q of 3 dimensions": ({"q": zeros(8, 2, 4)}, *SHAPE, "q"),
    "v of another batch": ({"v": zeros(1, 8, 2, 6)}, *SHAPE, "v"),
    "i of other heads": ({"i": zeros(2, 8, 3)}, *SHAPE, "i"),
    "k in bfloat16": ({"k": zeros(2, 8, 2, 4, dtype=torch.bfloat16)}, *DTYPE, "k"),
    "f in float64": ({"f": zeros(2, 8, 2, dtype=torch.float64)}, *DTYPE, "f"),
    "q not contiguous": ({"q": lambda d: torch.zeros(2, 8, 4, 2, device=d).mT}, ValueError, "stride", "q"),
    "scale infinite": ({"scale": float("inf")}, ValueError, "finite", "scale"),
    "eps negative": ({"eps": -1e-6}, ValueError, "at least 0", "eps"),
    "chunk_size too large": ({"chunk_size": 4097}, ValueError, "is 4097", "chunk_size"),
    "gate_soft_cap 0": ({"gate_soft_cap": 0}, ValueError, "greater than 0", "gate_soft_cap"),
    "gate_soft_cap nan": ({"gate_soft_cap": float("nan")}, ValueError, "finite", "gate_soft_cap"),
    "packing with batch 2": (
        {"cu_seqlens": lambda d: torch.tensor([0, 8], dtype=torch.int32, device=d)}, ValueError, "batch 2", "q",
    ),
    "c of another batch": ({"initial_state": state((3, 2, 4, 6), (3, 2, 4))}, *SHAPE, "initial_state c"),
    "n of another dqk": ({"initial_state": state(n=(2, 2, 5))}, *SHAPE, "initial_state n"),
    "c without n": ({"initial_state": state(n=None)}, ValueError, r"all of \(c, n\)", "initial_state"),
    "n without c": ({"initial_state": state(c=None)}, ValueError, r"all of \(c, n\)", "initial_state"),
    "n without normalizer": (
        {"initial_state": state(), "normalize": False}, ValueError, "must be None", "initial_state n",
    ),
    "only n without normalizer": (
        {"initial_state": state(c=None), "normalize": False}, ValueError, "must be None", "initial_state n",
    ),
}  # fmt: skip
# These are found before an operator call that could fail at run time. Under compile torch wraps them.
WRAPPED_ERRORS = {
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "it must be", "chunk_size"),
    "state of three": ({"initial_state": lambda d: (*state()(d), None)}, TypeError, "it must be", "initial_state"),
    "state a tensor": ({"initial_state": zeros(2, 2)}, TypeError, "it must be", "initial_state"),
    "c in float16": (
        {"initial_state": state(dtype=torch.float16)},
        TypeError,
        "it must be float32 or bfloat16",
        "initial_state c",
    ),
    "k on meta": ({"k": zeros(2, 8, 2, 4, device="meta")}, ValueError, "it must be", "k"),
    "state on meta": ({"initial_state": state(device="meta")}, ValueError, "it must be", "initial_state c"),
}


def check_error(form, device, changes, error, says, names):
    shapes = {"q": (2, 8, 2, 4), "k": (2, 8, 2, 4), "v": (2, 8, 2, 6), "i": (2, 8, 2), "f": (2, 8, 2)}
    given = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    with pytest.raises(error, match=says) as raised:
        form(**given)
    if error is not Exception:
        assert type(raised.value) is error
        assert str(raised.value).startswith(names)


@pytest.mark.parametrize("wrong", [*ERRORS, *WRAPPED_ERRORS])
def test_errors(device, wrong):
    check_error(ops.mlstm_sig, device, *{**ERRORS, **WRAPPED_ERRORS}[wrong])


@pytest.mark.slow
def test_errors_under_compile(device):
    for name, wrong in ERRORS.items():
        torch._dynamo.reset()
        try:
            check_error(torch.compile(ops.mlstm_sig, fullgraph=True, backend="aot_eager"), device, *wrong)
        except BaseException as e:
            raise AssertionError(f"{name}: {e}") from e


@pytest.mark.parametrize("wrong", WRAPPED_ERRORS)
def test_errors_that_torch_wraps_under_compile(device, wrong):
    changes, _, says, names = WRAPPED_ERRORS[wrong]
    torch._dynamo.reset()
    form = torch.compile(ops.mlstm_sig, fullgraph=True, backend="aot_eager")
    check_error(form, device, changes, Exception, f"{names} (is|has) .*{says}", names)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k", "v", "i", "f", "c", "n"])
def test_errors_of_devices(name):
    wrong = {
        "initial_state": lambda d: tuple(t.cpu() if x == name else t for x, t in zip("cn", state()(d), strict=True))
    }
    if name not in "cn":
        wrong = {name: zeros(*{"k": (2, 8, 2, 4), "v": (2, 8, 2, 6)}.get(name, (2, 8, 2)), device="cpu")}
    named = f"initial_state {name}" if name in "cn" else name
    check_error(ops.mlstm_sig, "cuda", wrong, ValueError, "is on cpu", named)


# --- random problems --------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    seq = draw(st.integers(1, 140))
    packed = [0, *sorted(draw(st.lists(st.integers(0, seq), max_size=3))), seq] if draw(st.booleans()) else None
    return {
        "seq": seq,
        "dqk": draw(st.integers(2, 40)),
        "dv": draw(st.integers(1, 40)),
        "batch": 1 if packed else draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 3)),
        "layout": draw(st.sampled_from(["contiguous", "heads first", "slice"])),
        "gates": draw(st.sampled_from(["small", "normal"])),
        "gate_soft_cap": draw(st.sampled_from([None, 15.0])),
        "state": seq < 5 or draw(st.booleans()),  # without one, dq and dk of single tokens are 0 up to rounding
        "cu_seqlens": packed,
        "chunk_size": draw(st.sampled_from([None, None, 1, 16, 50])),
        "normalize": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def test_random_problems(fuzz, make_problem, assert_float32_exact):
    @fuzz(250)
    @given(case=problems())
    def run(case):
        assert_float32_exact(make_problem(**case), ops.mlstm_sig, ("h", "last c", "last n"), strict=False, small=True)

    run()
