from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch._dynamo.utils
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_xlstm import ops, reference
from flash_xlstm._build import LIMITS

LONGEST = LIMITS["conv_max_kernel"]

# batch, seq, channels
SIZES = [(1, 1, 1), (2, 3, 5), (3, 70, 33), (2, 130, 64), (1, 200, 130), (5, 17, 8), (2, 31, 260)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dataclasses.dataclass
class Problem:
    """Inputs by name (x, weight and, where there are, bias, state), options of the op, gradients of y and last."""

    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    options: dict

    def __call__(self, form, through=("y", "last"), dtype=None) -> dict[str, Tensor]:
        inputs = {
            name: (t.detach() if dtype is None else t.to(dtype)).requires_grad_() for name, t in self.inputs.items()
        }
        y, last = form(
            inputs["x"], inputs["weight"], inputs.get("bias"), initial_state=inputs.get("state"),
            return_final_state=True, **self.options,
        )  # fmt: skip
        results = {"y": y, "last": last}
        gradients = torch.autograd.grad(
            [results[name] for name in through],
            list(inputs.values()),
            [self.cotangents[name].to(results[name].dtype) for name in through],
            allow_unused=True,
        )
        values = {name: t.detach() for name, t in results.items()}
        for (name, t), g in zip(inputs.items(), gradients, strict=True):
            values[f"d{name}"] = torch.zeros_like(t) if g is None else g
        return values


@pytest.fixture
def make_problem(device):
    """``make_problem(batch, seq, channels, kernel, ...)``: a random Problem on the device."""

    def make(
        batch, seq, channels, kernel=4, *, dtype=torch.float32, weight_dtype=None, bias=True, state=True, wide=False,
        cu_seqlens=None, seed=0, **options,
    ) -> Problem:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        rows = batch
        if cu_seqlens is not None:
            options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
            rows = len(cu_seqlens) - 1
        x = normal(batch, seq, channels).to(device, dtype)
        if wide:  # a slice of a wider tensor; odd offset and strides
            whole = torch.full((batch, seq, channels + 3), torch.nan, dtype=dtype, device=device)
            whole[..., 1:-2] = x
            x = whole[..., 1:-2]
        inputs = {"x": x, "weight": normal(channels, kernel).to(device, weight_dtype or dtype)}
        if bias:
            inputs["bias"] = normal(channels).to(device, weight_dtype or dtype)
        if state:
            inputs["state"] = normal(rows, kernel - 1, channels).to(device, dtype)
        cotangents = {
            "y": normal(batch, seq, channels).to(device, dtype),
            "last": normal(rows, kernel - 1, channels).to(device, dtype),
        }
        return Problem(inputs, cotangents, options)

    return make


def assert_exact(problem, through=("y", "last")):
    """Compares with float64. float32 is within 1e-5. 16 bits are within 1.5 times the error of the plain form in the
    same dtype, or of one rounding if that is larger. The bias's gradient, a sum over tokens that may cancel, is within
    float32's eps of the sum of their sizes."""
    expected, actual = problem(reference.causal_conv1d, through, torch.float64), problem(ops.causal_conv1d, through)
    plain, dtype = problem(reference.causal_conv1d, through), problem.inputs["x"].dtype
    wrong = {}
    for name, want in expected.items():
        assert actual[name].shape == want.shape, name
        size = max(want.norm().item(), 1e-30)
        error, other = ((t[name].double() - want).norm().item() / size for t in (actual, plain))
        bound = 1e-5 if dtype == torch.float32 else 1.5 * max(torch.finfo(dtype).eps / 2, other)
        of_bias = name == "dbias" and "y" in through
        sums = problem.cotangents["y"].double().abs().sum((0, 1)).norm().item() if of_bias else 0.0
        if want.numel() and not (error <= bound or error * size <= 1.2e-7 * sums):
            wrong[name] = (error, bound)
    assert not wrong, wrong


@DTYPES
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kernel", range(1, LONGEST + 1))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_value_and_gradients(make_problem, sizes, kernel, activation, dtype):
    turn = SIZES.index(sizes) + kernel
    weight_dtype = torch.float32 if turn % 2 else dtype
    problem = make_problem(
        *sizes, kernel, dtype=dtype, weight_dtype=weight_dtype, bias=turn % 3 != 0, state=turn % 4 != 1,
        wide=turn % 5 == 2, activation=activation, seed=turn,
    )  # fmt: skip
    assert_exact(problem)
    assert_exact(problem, ("y",))
    if kernel > 1:
        assert_exact(problem, ("last",))


@DTYPES
@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize("offsets", [(0, 130), (0, 0, 3, 130), (0, 1, 2, 3, 64, 65, 129, 130, 130), (0, 50, 50, 130)])
def test_packed(make_problem, offsets, kernel, dtype):
    problem = make_problem(1, 130, 20, kernel, cu_seqlens=offsets, dtype=dtype, activation="silu")
    assert_exact(problem)


def test_packed_equals_separate_calls(make_problem):
    offsets = (0, 5, 5, 70, 71, 130)
    problem = make_problem(1, 130, 20, cu_seqlens=offsets)
    got = problem(ops.causal_conv1d)
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start == stop:
            assert torch.equal(got["last"][s], problem.inputs["state"][s])
            assert torch.equal(got["dstate"][s], problem.cotangents["last"][s])
            continue
        inputs = {
            **problem.inputs,
            "x": problem.inputs["x"][:, start:stop],
            "state": problem.inputs["state"][s : s + 1],
        }
        cotangents = {"y": problem.cotangents["y"][:, start:stop], "last": problem.cotangents["last"][s : s + 1]}
        for name, t in Problem(inputs, cotangents, {})(ops.causal_conv1d).items():
            if name in ("y", "dx"):
                assert torch.equal(got[name][:, start:stop], t), name
            elif name in ("last", "dstate"):
                assert torch.equal(got[name][s : s + 1], t), name


def test_continues_from_its_final_state(make_problem):
    x, weight, bias, state = make_problem(2, 100, 20).inputs.values()
    options = {"activation": "silu", "return_final_state": True}
    whole, last = ops.causal_conv1d(x, weight, bias, initial_state=state, **options)
    parts = []
    for start, stop in itertools.pairwise((0, 1, 3, 64, 100)):
        y, state = ops.causal_conv1d(x[:, start:stop], weight, bias, initial_state=state, **options)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(state, last)


def test_strided_arguments(make_problem):
    problem = make_problem(2, 70, 24)
    expected = problem(ops.causal_conv1d)
    inputs = problem.inputs
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["weight"] = inputs["weight"].t().contiguous().t()
    inputs["state"] = inputs["state"].mT.contiguous().mT
    problem.cotangents["y"] = problem.cotangents["y"].mT.contiguous().mT
    for name, t in problem(ops.causal_conv1d).items():
        assert torch.equal(t, expected[name]), name


def test_expanded_gradient(make_problem, device):
    problem = make_problem(2, 70, 24)
    results = []
    for dy in (torch.ones(2, 70, 24, device=device), torch.ones((), device=device).expand(2, 70, 24)):
        problem.cotangents["y"] = dy
        results.append(problem(ops.causal_conv1d, ("y",)))
    assert all(torch.equal(t, results[1][name]) for name, t in results[0].items())


@pytest.mark.parametrize("kernel", [1, 3, 4, 6])
def test_not_finite_reaches_only_what_depends_on_it(make_problem, kernel):
    problem = make_problem(2, 70, 24, kernel)
    clean = problem(ops.causal_conv1d)
    problem.inputs["x"][0, 30, 5] = torch.nan
    got = problem(ops.causal_conv1d)
    assert got["y"][0, 30 : 30 + kernel, 5].isnan().all()
    got["y"][0, 30 : 30 + kernel, 5] = clean["y"][0, 30 : 30 + kernel, 5]
    for name in ("y", "last", "dx", "dbias", "dstate"):
        assert torch.equal(got[name], clean[name]), name
    assert got["dweight"][5].isnan().any() and torch.equal(got["dweight"][6:], clean["dweight"][6:])


@DTYPES
@pytest.mark.parametrize("offsets", [None, (0, 0, 30, 31, 150)], ids=["whole", "packed"])
@pytest.mark.parametrize("channels", [20, 33])
def test_writes_everything_and_repeats_itself(make_problem, nan_memory, dtype, offsets, channels):
    problem = make_problem(1 if offsets else 2, 150, channels, dtype=dtype, cu_seqlens=offsets, activation="silu")
    expected = problem(ops.causal_conv1d)
    with nan_memory():
        poisoned = problem(ops.causal_conv1d)
    again = problem(ops.causal_conv1d)
    for name, t in expected.items():
        assert t.isfinite().all(), name
        assert torch.equal(t, poisoned[name]) and torch.equal(t, again[name]), name


@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 5, 0)], ids=str)
def test_empty(make_problem, sizes):
    problem = make_problem(*sizes)
    got = problem(ops.causal_conv1d)
    for name, t in problem.inputs.items():
        assert got[f"d{name}"].shape == t.shape and not got[f"d{name}"].any()
    assert got["y"].shape == sizes and got["last"].shape == (sizes[0], 3, sizes[2])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("offsets", [(0, 500), (-7, 20, 30), (0, 30, 20, 30), (40, 50)], ids=str)
def test_wrong_offsets_stay_within_the_tensors(make_problem, offsets):
    problem = make_problem(1, 30, 24, cu_seqlens=offsets)
    before = {name: t.clone() for name, t in problem.inputs.items()}
    problem(ops.causal_conv1d)
    torch.cuda.synchronize()
    assert all(torch.equal(t, problem.inputs[name]) for name, t in before.items())


# --- the step ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("kernel", range(1, LONGEST + 1))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_step(make_problem, dtype, kernel, activation):
    problem = make_problem(3, 12, 37, kernel, dtype=dtype, bias=kernel % 2 == 0)
    x, weight, bias, state = (problem.inputs.get(name) for name in ("x", "weight", "bias", "state"))
    options = {"activation": activation, "initial_state": state, "return_final_state": True}
    want, last = ops.causal_conv1d(x, weight, bias, **options)
    state = state.clone()
    for t in range(12):
        y = ops.causal_conv1d_step(x[:, t], weight, bias, state, activation=activation)
        assert torch.allclose(y, want[:, t], rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert torch.equal(state, last)


def test_step_has_no_gradient(make_problem):
    x, weight, bias, state = make_problem(2, 1, 5).inputs.values()
    with pytest.raises(RuntimeError, match="causal_conv1d_step has no gradient"):
        ops.causal_conv1d_step(x[:, 0], weight.requires_grad_(), bias, state)


def test_step_opcheck_and_compile(make_problem):
    x, weight, bias, state = make_problem(2, 3, 5).inputs.values()
    torch.library.opcheck(torch.ops.flash_xlstm.causal_conv1d_step, (x[:, 0], weight, bias, state, True))
    torch._dynamo.reset()
    compiled, other = torch.compile(ops.causal_conv1d_step, fullgraph=True, backend="aot_eager"), state.clone()
    for t in range(3):
        want = ops.causal_conv1d_step(x[:, t], weight, bias, other, activation="silu")
        assert torch.equal(compiled(x[:, t], weight, bias, state, activation="silu"), want)
        assert torch.equal(state, other)


# --- autograd, fake tensors, compilation, export ----------------------------------------------------------------------

VARIANTS = [
    {},
    {"bias": False, "state": False},
    {"kernel": 1},
    {"cu_seqlens": (0, 2, 2, 9), "batch": 1},
    {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("final_state", [True, False])
def test_opcheck(make_problem, variant, final_state):
    problem = make_problem(**{"batch": 2, "seq": 9, "channels": 5, **variant})
    inputs = [problem.inputs.get(name) for name in ("x", "weight", "bias", "state")]
    inputs.append(problem.options.get("cu_seqlens"))
    y, last = torch.ops.flash_xlstm.causal_conv1d(*inputs, True, final_state)
    arguments = (torch.ones_like(y), torch.ones_like(last) if final_state else None, *inputs, True)
    torch.library.opcheck(torch.ops.flash_xlstm.causal_conv1d_backward, arguments)
    for t in inputs[:4]:
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.flash_xlstm.causal_conv1d, (*inputs, True, final_state))


def test_double_backward_raises(make_problem):
    x, weight, bias, _ = (t.requires_grad_() for t in make_problem(2, 9, 5).inputs.values())
    (dx,) = torch.autograd.grad(ops.causal_conv1d(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


def form(x, weight, bias, state):
    y, last = ops.causal_conv1d(2 * x, weight, bias, activation="silu", initial_state=state, return_final_state=True)
    return y.square(), last.sin()


def gradients_of(form, inputs):
    outputs = form(*inputs)
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs])


def test_compiles_once_for_every_length(make_problem):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in (7, 9, 64, 2):
        inputs = [t.detach().requires_grad_() for t in make_problem(2, seq, 12).inputs.values()]
        for a, b in zip(gradients_of(compiled, inputs), gradients_of(form, inputs), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports_with_any_length(make_problem):
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias):
            return ops.causal_conv1d(x, weight, bias, activation="silu", return_final_state=True)

    inputs = [make_problem(2, 7, 12).inputs[name] for name in ("x", "weight", "bias")]
    seq = torch.export.Dim("seq", min=2, max=4096)
    program = torch.export.export(Module(), tuple(inputs), dynamic_shapes=[{1: seq}, None, None])
    for length in (7, 2, 100):
        inputs[0] = make_problem(2, length, 12).inputs["x"]
        for a, b in zip(program.module()(*inputs), Module()(*inputs), strict=True):
            assert torch.equal(a, b)


def test_meta_tensors():
    empty = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    y, last = ops.causal_conv1d(empty(2, 9, 5), empty(5, 4), return_final_state=True)
    assert y.shape == (2, 9, 5) and last.shape == (2, 3, 5) and y.is_meta


# --- errors -----------------------------------------------------------------------------------------------------------


def zeros(*shape, **options):
    return lambda device: torch.zeros(shape, device=options.get("device", device), dtype=options.get("dtype"))


def offsets(*values, dtype=torch.int32):
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


SHAPE, DTYPE = (ValueError, "has shape"), (TypeError, "has dtype")
BF16, F64 = torch.bfloat16, torch.float64
ERRORS = {
    "x of 2 dimensions": ({"x": zeros(2, 5)}, *SHAPE, "x"),
    "seq of 0": ({"x": zeros(2, 0, 5)}, ValueError, "seq 0", "x"),
    "weight of other channels": ({"weight": zeros(6, 4)}, *SHAPE, "weight"),
    "weight of 3 dimensions": ({"weight": zeros(5, 1, 4)}, *SHAPE, "weight"),
    "kernel of 0": ({"weight": zeros(5, 0)}, ValueError, f"from 1 to {LONGEST}", "weight"),
    "a kernel too long": ({"weight": zeros(5, LONGEST + 1)}, ValueError, f"from 1 to {LONGEST}", "weight"),
    "bias of other channels": ({"bias": zeros(4)}, *SHAPE, "bias"),
    "x in float64": ({"x": zeros(2, 8, 5, dtype=F64)}, *DTYPE, "x"),
    "weight in bfloat16": ({"weight": zeros(5, 4, dtype=BF16)}, *DTYPE, "weight"),
    "bias in float64": ({"bias": zeros(5, dtype=F64)}, *DTYPE, "bias"),
    "state in bfloat16": ({"initial_state": zeros(2, 3, 5, dtype=BF16)}, *DTYPE, "initial_state"),
    "state of another kernel": ({"initial_state": zeros(2, 4, 5)}, *SHAPE, "initial_state"),
    "x not contiguous": ({"x": lambda d: torch.zeros(2, 5, 8, device=d).mT}, ValueError, "stride", "x"),
    "packing with batch 2": ({"cu_seqlens": offsets(0, 8)}, ValueError, "batch 2", "x"),
    "cu_seqlens of int64": (
        {"x": zeros(1, 8, 5), "cu_seqlens": offsets(0, 8, dtype=torch.int64)}, *DTYPE, "cu_seqlens",
    ),
}  # fmt: skip
WRAPPED_ERRORS = {
    "unknown activation": ({"activation": "relu"}, ValueError, "must be None or 'silu'", "activation"),
    "weight on meta": ({"weight": zeros(5, 4, device="meta")}, ValueError, "it must be", "weight"),
}


def check_error(form, device, wrong, grad):
    changes, error, says, names = ERRORS[wrong]
    given = {name: make(device) for name, make in {"x": zeros(2, 8, 5), "weight": zeros(5, 4), **changes}.items()}
    given["weight"].requires_grad_(grad)
    with pytest.raises(error, match=says) as raised:
        form(**given)
    assert str(raised.value).startswith(names)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrong", ERRORS)
def test_errors(device, wrong, grad):
    check_error(ops.causal_conv1d, device, wrong, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wrong", ["x of 2 dimensions", "a kernel too long", "x in float64", "state of another kernel"])
def test_errors_under_compile(device, wrong, grad):
    torch._dynamo.reset()
    check_error(torch.compile(ops.causal_conv1d, fullgraph=True, backend="aot_eager"), device, wrong, grad)


@pytest.mark.parametrize("wrong", WRAPPED_ERRORS)
def test_errors_that_torch_wraps_under_compile(device, wrong):
    changes, error, says, names = WRAPPED_ERRORS[wrong]
    given = {"x": zeros(2, 8, 5)(device), "weight": zeros(5, 4)(device)}
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    with pytest.raises(error, match=says) as raised:
        ops.causal_conv1d(**given)
    assert str(raised.value).startswith(names)


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        (zeros(2, 4, 5), ValueError, "has shape"),
        (zeros(2, 3, 5, dtype=BF16), TypeError, "has dtype"),
        (lambda d: torch.zeros(2, 5, 3, device=d).mT, ValueError, "contiguous"),
    ],
)
def test_step_errors(device, state, error, says):
    with pytest.raises(error, match=f"^state .*{says}"):
        ops.causal_conv1d_step(zeros(2, 5)(device), zeros(5, 4)(device), None, state(device))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["weight", "bias", "initial_state", "cu_seqlens"])
def test_errors_of_devices(name):
    given = {"x": zeros(1, 8, 5), "weight": zeros(5, 4), "bias": zeros(5), "initial_state": zeros(1, 3, 5)}
    given = {key: make("cuda") for key, make in {**given, "cu_seqlens": offsets(0, 8)}.items()}
    given[name] = given[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu"):
        ops.causal_conv1d(**given)


def test_random_problems(fuzz, make_problem):
    @fuzz(250)
    @given(st.data())
    def run(data):
        seq, dtype = (
            data.draw(st.integers(1, 80)),
            data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        )
        packed = (
            [0, *sorted(data.draw(st.lists(st.integers(0, seq), max_size=3))), seq]
            if data.draw(st.booleans())
            else None
        )
        problem = make_problem(
            1 if packed else data.draw(st.integers(1, 3)), seq, data.draw(st.integers(1, 70)),
            data.draw(st.integers(1, 8)),
            dtype=dtype, weight_dtype=data.draw(st.sampled_from([dtype, torch.float32])), bias=data.draw(st.booleans()),
            state=data.draw(st.booleans()), wide=data.draw(st.booleans()), cu_seqlens=packed,
            activation=data.draw(st.sampled_from([None, "silu"])), seed=data.draw(st.integers(0, 1000)),
        )  # fmt: skip
        assert_exact(problem)

    run()


def test_steps_of_random_problems(fuzz, make_problem):
    @fuzz(100)
    @given(
        st.tuples(*(st.integers(1, most) for most in (4, 6, 70, 8))), st.booleans(), st.booleans(),
        st.sampled_from([None, "silu"]), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        st.integers(0, 1000),
    )  # fmt: skip
    def run(sizes, bias, wide, activation, dtype, seed):
        problem = make_problem(*sizes, bias=bias, wide=wide, dtype=dtype, seed=seed)
        x, weight, bias, state = (problem.inputs.get(name) for name in ("x", "weight", "bias", "state"))
        state = state.contiguous()
        doubles = [None if t is None else t.double() for t in (weight, bias, state)]
        want = reference.causal_conv1d(x.double(), *doubles[:2], activation=activation, initial_state=doubles[2])
        for t in range(sizes[1]):
            y = ops.causal_conv1d_step(x[:, t], weight, bias, state, activation=activation)
            assert torch.allclose(y.double(), want[:, t], rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
        joined = torch.cat([doubles[2], x.double()], 1)
        assert torch.equal(state.double(), joined[:, joined.shape[1] - state.shape[1] :])

    run()
