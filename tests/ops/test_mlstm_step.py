from __future__ import annotations

import hypothesis
import pytest
import torch
import torch._dynamo.utils
from hypothesis import strategies as st

from flash_xlstm import ops, reference
from flash_xlstm._build import LIMITS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def normal(device, *shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(device, batch=3, heads=2, dqk=4, dv=6, dtype=torch.float32, gate_dtype=torch.float32, seed=0):
    shapes = {"q": (batch, heads, dqk), "k": (batch, heads, dqk), "v": (batch, heads, dv)}
    given = {name: normal(device, *s, dtype=dtype, seed=seed + x) for x, (name, s) in enumerate(shapes.items())}
    given["i"], given["f"] = (normal(device, batch, heads, dtype=gate_dtype, seed=seed + x) for x in (3, 4))
    return given


def pool(device, slots, heads=2, dqk=4, dv=6, dtype=torch.float32, seed=10):
    c = normal(device, slots, heads, dqk, dv, dtype=dtype, seed=seed)
    return c, normal(device, slots, heads, dqk, seed=seed + 1), normal(device, slots, heads, seed=seed + 2)


def clone(state, dtype=None):
    return tuple(t.clone() if dtype is None else t.to(dtype, copy=True) for t in state)


def indices(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def close(actual, expected, tolerance):
    return (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def tolerance(dtype):
    # Bounds of the output's own rounding: 2^-9 and 2^-12 at most.
    return {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


@DTYPES
@pytest.mark.parametrize("gate_dtype", ["float32", "same"])
@pytest.mark.parametrize(
    ("dqk", "dv", "heads", "batch"), [(1, 1, 1, 1), (5, 16, 3, 2), (33, 65, 2, 3), (64, 128, 4, 1), (256, 512, 1, 2)]
)
def test_steps_are_the_recurrence(device, dtype, gate_dtype, dqk, dv, heads, batch):
    gate_dtype = dtype if gate_dtype == "same" else torch.float32
    state = pool(device, batch, heads, dqk, dv)
    exact = clone(state, torch.float64)
    steps = [arguments(device, batch, heads, dqk, dv, dtype, gate_dtype, seed=100 * t) for t in range(1, 4)]
    for given in steps:
        h = ops.mlstm_step(**given, state=state)
        expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact)
        assert h.dtype == dtype and h.shape == given["v"].shape
        assert close(h, expected, tolerance(dtype))
    for t, want in zip(state, exact, strict=True):
        assert close(t, want, 1e-5)


@DTYPES
def test_is_one_token_of_the_sequence(device, dtype):
    state = pool(device, 3)
    given = arguments(device, dtype=dtype)
    sequence = [t[:, None] for t in given.values()]
    expected, last = ops.mlstm(*sequence, initial_state=clone(state), return_final_state=True)
    h = ops.mlstm_step(**given, state=state)
    assert close(h, expected[:, 0], 2 * tolerance(dtype))
    for name, t, want in zip("cnm", state, last, strict=True):
        # On a GPU the sequence's weighted keys are rounded to the operands' dtype before they enter c.
        assert close(t, want, 2 * tolerance(dtype) if name == "c" and device == "cuda" else 1e-5), name


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"eps": 0.1}, {"eps": 0.0}, {"gate_soft_cap": 0.3}], ids=str)
def test_options(device, options):
    state, exact, given = pool(device, 3), clone(pool(device, 3), torch.float64), arguments(device)
    expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact, **options)
    assert close(ops.mlstm_step(**given, state=state, **options), expected, 1e-5)


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_soft_cap(device, gate_dtype):
    given, state = arguments(device, dtype=torch.bfloat16, gate_dtype=gate_dtype), pool(device, 3)
    for name in "if":
        given[name] = 10 * given[name]
    copy = clone(state)
    capped = {**given, **{name: reference.soft_cap(given[name].float(), 3.0) for name in "if"}}
    expected = ops.mlstm_step(**capped, state=copy)
    h = ops.mlstm_step(**given, state=state, gate_soft_cap=3.0)
    assert close(h, expected, 3e-3)
    assert all(close(t, want, 1e-5) for t, want in zip(state, copy, strict=True))
    exact = clone(pool(device, 3), torch.float64)
    plain = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact, gate_soft_cap=3.0)
    assert close(h, plain, 3e-3) and all(close(t, want, 1e-5) for t, want in zip(state, exact, strict=True))


def test_gate_soft_cap_leaves_padding_alone(device):
    given, state = arguments(device), pool(device, 3)
    given["i"][1], given["f"][1] = -torch.inf, torch.inf
    before = clone(state)
    assert ops.mlstm_step(**given, state=state, gate_soft_cap=2.0).isfinite().all()
    assert all(torch.equal(t[1], was[1]) for t, was in zip(state, before, strict=True))


# The CUDA kernel's tiles: one or many tiles of columns, few or many rows and heads, about a block for each SM, single
# elements, several tiles a block, more keys than a batch of rows.
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "dqk", "dv"),
    [
        (1, 8, 256, 512),
        (13, 8, 64, 512),
        (26, 4, 33, 136),
        (13, 4, 68, 400),
        (2, 1, 16, 1040),
        (1, 1, 8, 4104),
        (2, 2, 40, 30),
        (1, 1, 600, 24),
        (97, 1, 8, 8),
    ],
)
def test_every_tiling(device, state_dtype, batch, heads, dqk, dv):
    given, state = arguments(device, batch, heads, dqk, dv), pool(device, batch, heads, dqk, dv, state_dtype)
    exact = clone(state, torch.float64)
    for _ in range(2):
        h = ops.mlstm_step(**given, state=state)
        expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact)
    wide = state_dtype == torch.bfloat16
    assert close(h, expected, 2e-2 if wide else 2e-5)
    assert close(state[0], exact[0], 5e-3 if wide else 1e-5)
    assert close(state[1], exact[1], 1e-5) and close(state[2], exact[2], 1e-5)


def test_gates_over_the_whole_range(device):
    for x, (i, f) in enumerate([(15, 15), (-15, 15), (15, -15), (-15, -15)]):
        state, given = pool(device, 3, seed=x), arguments(device, seed=x)
        given["i"].fill_(i), given["f"].fill_(f)
        exact = clone(state, torch.float64)
        expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact)
        assert close(ops.mlstm_step(**given, state=state), expected, 1e-5)
        assert all(close(t, want, 1e-5) for t, want in zip(state, exact, strict=True))


@DTYPES
def test_bfloat16_state(device, dtype):
    state, given = pool(device, 3, 2, 33, 20, torch.bfloat16), arguments(device, 3, 2, 33, 20, dtype)
    exact = clone(state, torch.float64)
    expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact)
    h = ops.mlstm_step(**given, state=state)
    assert state[0].dtype == torch.bfloat16
    assert close(h, expected, 5e-3)
    assert close(state[0], exact[0], 3e-3)
    assert close(state[1], exact[1], 1e-5) and close(state[2], exact[2], 1e-5)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1), (5, -1, 3), (-1, -1, -1), (6, 2, 0)], ids=str)
def test_state_indices(device, rows, state_dtype):
    given, state = arguments(device), pool(device, 7, dtype=state_dtype)
    before = clone(state)
    h = ops.mlstm_step(**given, state=state, state_indices=indices(device, *rows))
    for row, slot in enumerate(rows):
        if slot < 0:
            assert not h[row].any()
            continue
        own = tuple(t[slot : slot + 1].clone() for t in before)
        alone = ops.mlstm_step(**{name: t[row : row + 1] for name, t in given.items()}, state=own)
        assert torch.equal(h[row], alone[0])
        assert all(torch.equal(t[slot], mine[0]) for t, mine in zip(state, own, strict=True))
    for slot in set(range(7)) - set(rows):
        assert all(torch.equal(t[slot], was[slot]) for t, was in zip(state, before, strict=True))


@pytest.mark.parametrize("multiple", [4, 256])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "dqk", "dv"),
    [(3, 1, 5, 7), (3, 2, 16, 24), (1, 8, 256, 512), (13, 8, 64, 512), (26, 4, 33, 136), (2, 1, 16, 1040)],
)
def test_slots_a_stride_apart(page_pool, device, state_dtype, batch, heads, dqk, dv, multiple):
    """A pool cut out of pages, NaN where no row has its slot. With `multiple` 4, slots of c are not aligned."""
    paged, memory = page_pool(device, batch + 2, heads, dqk, dv, state_dtype, multiple)
    given, state = arguments(device, batch, heads, dqk, dv), pool(device, batch, heads, dqk, dv, state_dtype)
    rows = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(0))[:batch].to(device)
    for t, own in zip(paged, state, strict=True):
        t[rows] = own
    before, aligned = memory.clone(), all(t.data_ptr() % 16 == 0 for t in paged[0])
    expected = ops.mlstm_step(**given, state=state)
    h = ops.mlstm_step(**given, state=paged, state_indices=rows.int())
    if aligned or device == "cpu":
        assert torch.equal(h, expected) and all(torch.equal(t[rows], own) for t, own in zip(paged, state, strict=True))
    assert close(h, expected, 2e-5) and all(close(t[rows], own, 5e-3) for t, own in zip(paged, state, strict=True))
    after = memory.clone()
    memory.copy_(before)
    for t, own in zip(paged, state, strict=True):
        t[rows] = own
    assert not aligned or torch.equal(after, memory)
    in_order = tuple(t[:batch] for t in paged)  # without indices
    for t, own in zip(in_order, pool(device, batch, heads, dqk, dv, state_dtype), strict=True):
        t.copy_(own)
    assert close(ops.mlstm_step(**given, state=in_order), expected, 2e-5)


def test_no_row_and_no_slot(device):
    assert ops.mlstm_step(**arguments(device, batch=0), state=pool(device, 0)).shape == (0, 2, 6)
    nobody = ops.mlstm_step(**arguments(device), state=pool(device, 0), state_indices=indices(device, -1, -1, -1))
    assert not nobody.any()
    assert ops.mlstm_step(**arguments(device, heads=0), state=pool(device, 3, heads=0)).shape == (3, 0, 6)


def test_settled_state_changes_nothing(device):
    given, states = arguments(device), [pool(device, 3) for _ in range(2)]
    h = [ops.mlstm_step(**given, state=state, settled_state=bool(x)) for x, state in enumerate(states)]
    assert torch.equal(*h) and all(map(torch.equal, *states))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("batch", "heads", "dqk", "dv"),
    [(1, 8, 256, 512), (2, 8, 64, 64), (1, 2, 33, 65), (4, 8, 64, 128), (8, 8, 128, 512), (3, 8, 256, 512)],
)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_settled_states_in_turn(batch, heads, dqk, dv, state_dtype):
    # Three states in turn are as few as the promise allows. With nothing between the steps, a state that is read too
    # early shows.
    given = arguments("cuda", batch, heads, dqk, dv)
    start = [pool("cuda", batch, heads, dqk, dv, seed=20 * x) for x in range(3)]
    apart, in_turn = ([(c.to(state_dtype, copy=True), n.clone(), m.clone()) for c, n, m in start] for _ in range(2))
    expected = []
    for t in range(90):
        expected.append(ops.mlstm_step(**given, state=apart[t % 3]))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = [ops.mlstm_step(**given, state=in_turn[t % 3], settled_state=True) for t in range(90)]
    graph.replay()
    assert all(map(torch.equal, actual, expected))
    for ours, theirs in zip(in_turn, apart, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.cuda
def test_settled_states_of_different_shapes_in_turn():
    # A step of many rows must also keep the next one from starting while the previous one runs, which has the same
    # state.
    shapes = [(1, 8, 256, 512), (3, 8, 256, 64)]
    given = [arguments("cuda", *shape) for shape in shapes]
    start = [pool("cuda", *shape) for shape in shapes]
    apart, in_turn = ([clone(state) for state in start] for _ in range(2))
    expected = []
    for t in range(80):
        expected.append(ops.mlstm_step(**given[t % 2], state=apart[t % 2]))
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = [ops.mlstm_step(**given[t % 2], state=in_turn[t % 2], settled_state=True) for t in range(80)]
    graph.replay()
    assert all(map(torch.equal, actual, expected))
    for ours, theirs in zip(in_turn, apart, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", [7, 2**31 - 1, -2, -(2**31)])
def test_an_index_outside_the_pool_gives_nan_on_cuda(wrong):
    given, state = arguments("cuda"), pool("cuda", 7)
    before = clone(state)
    h = ops.mlstm_step(**given, state=state, state_indices=indices("cuda", 3, wrong, 1))
    torch.cuda.synchronize()
    assert h[1].isnan().all() and h[[0, 2]].isfinite().all()
    for slot in (0, 2, 4, 5, 6):
        assert all(torch.equal(t[slot], was[slot]) for t, was in zip(state, before, strict=True))
    assert not torch.equal(state[0][3], before[0][3])


@pytest.mark.parametrize("gate_soft_cap", [None, 2.0])
def test_padding_leaves_the_state_alone(device, gate_soft_cap):
    given, state = arguments(device), pool(device, 3)
    given["i"][1], given["f"][1] = -torch.inf, torch.inf
    given["k"][1], given["v"][1] = torch.nan, torch.nan
    before = clone(state)
    h = ops.mlstm_step(**given, state=state, gate_soft_cap=gate_soft_cap)
    assert h.isfinite().all()
    assert all(torch.equal(t[1], was[1]) for t, was in zip(state, before, strict=True))
    assert not torch.equal(state[0][0], before[0][0])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_row_and_head(device, name):
    given, state = arguments(device), pool(device, 3)
    clean_state = clone(state)
    clean = ops.mlstm_step(**given, state=clean_state)
    given[name][1, 0, 2] = torch.nan
    h = ops.mlstm_step(**given, state=state)
    assert h[1, 0, 2].isnan()
    for got, want in ((h, clean), *zip(state, clean_state, strict=True)):
        assert torch.equal(got[[0, 2]], want[[0, 2]]) and torch.equal(got[1, 1], want[1, 1])


def test_strided_inputs(device):
    given, state = arguments(device), pool(device, 3)
    copy = clone(state)
    expected = ops.mlstm_step(**given, state=state)
    wide = {name: torch.stack([t, t], 1)[:, 1] for name, t in given.items()}
    for name in "qkv":  # heads first in memory
        wide[name] = given[name].transpose(0, 1).contiguous().transpose(0, 1)
    for name in "if":
        wide[name] = given[name].t().contiguous().t()
    assert torch.equal(ops.mlstm_step(**wide, state=copy), expected)
    assert all(torch.equal(a, b) for a, b in zip(state, copy, strict=True))


@DTYPES
def test_writes_everything_and_repeats_itself(device, nan_memory, dtype):
    given, rows = arguments(device, dtype=dtype), indices(device, 2, -1, 0)
    first, second = pool(device, 3), pool(device, 3)
    h = ops.mlstm_step(**given, state=first, state_indices=rows)
    with nan_memory():
        again = ops.mlstm_step(**given, state=second, state_indices=rows)
    assert h.isfinite().all() and torch.equal(h, again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", [{}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [None, (4, -1, 2)])
def test_opcheck(device, variant, state_dtype, rows):
    state = pool(device, 3 if rows is None else 7, dtype=state_dtype)
    rows = None if rows is None else indices(device, *rows)
    operator, cap = torch.ops.flash_xlstm.mlstm_step, None if rows is None else 2.0
    torch.library.opcheck(operator, (*arguments(device, **variant).values(), *state, rows, None, 1e-6, cap))


def test_compiles_once_for_every_batch_and_pool(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def steps(given, state, rows):
        given = {name: 2 * t for name, t in given.items()}
        first = ops.mlstm_step(**given, state=state, state_indices=rows)
        return first + ops.mlstm_step(**given, state=state, state_indices=rows)  # sees what the first wrote

    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, slots in ((3, 7), (2, 5), (6, 6)):
        given, state = arguments(device, batch=batch), pool(device, slots)
        rows = torch.arange(batch, dtype=torch.int32, device=device)
        copy = clone(state)
        with torch.no_grad():
            assert torch.allclose(compiled(given, state, rows), steps(given, copy, rows), rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(state, copy, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exports(device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v, i, f, c, n, m):
            return ops.mlstm_step(q, k, v, i, f, (c, n, m)), c.sum()

    given = (*arguments(device).values(), *pool(device, 3))
    program = torch.export.export(Module(), given)
    got, expected = ([*given[:5], *clone(given[5:])] for _ in range(2))
    for a, b in zip(program.module()(*got), Module()(*expected), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_autocast(device):
    given, state = arguments(device), pool(device, 3)
    copy = clone(state)
    with torch.autocast(device, torch.bfloat16):
        h = ops.mlstm_step(**given, state=state)
    for name in "qkv":
        given[name] = given[name].bfloat16()
    assert h.dtype == torch.bfloat16 and torch.equal(h, ops.mlstm_step(**given, state=copy))
    assert all(torch.equal(a, b) for a, b in zip(state, copy, strict=True))


@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f", "c", "n", "m"])
def test_has_no_gradient_and_says_so(device, name):
    given, state = arguments(device), dict(zip("cnm", pool(device, 3), strict=True))
    {**given, **state}[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"mlstm_step has no gradient.*torch.no_grad\(\)"):
        ops.mlstm_step(**given, state=tuple(state.values()))
    with torch.no_grad():
        ops.mlstm_step(**given, state=tuple(state.values()))


def test_meta_tensors():
    h = ops.mlstm_step(**arguments("meta"), state=pool("meta", 3))
    assert h.is_meta and h.shape == (3, 2, 6)


# --- errors -----------------------------------------------------------------------------------------------------------

F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16
SHAPE, DTYPE = (ValueError, "has shape"), (TypeError, "has dtype")


def zeros(*shape, **options):
    return lambda device: torch.zeros(shape, device=device, **options)


def changed(place, make):
    """The state with a new tensor at `place`."""

    def state(device):
        parts = list(pool(device, 3))
        parts["cnm".index(place)] = make(device)
        return tuple(parts)

    return state


def slots(*values, **options):
    return lambda device: torch.tensor(values, **{"dtype": torch.int32, "device": device, **options})


# Cases as in test_mlstm: the arguments that differ from good ones, the error, its text, the argument that it names.
ERRORS = {
    "q of 4 dimensions": ({"q": zeros(3, 1, 2, 4)}, *SHAPE, "q"),
    "k of another dqk": ({"k": zeros(3, 2, 5)}, *SHAPE, "k"),
    "v of another batch": ({"v": zeros(2, 2, 6)}, *SHAPE, "v"),
    "i of other heads": ({"i": zeros(3, 3)}, *SHAPE, "i"),
    "f of 1 dimension": ({"f": zeros(3)}, *SHAPE, "f"),
    "q in float64": ({"q": zeros(3, 2, 4, dtype=F64)}, *DTYPE, "q"),
    "k in bfloat16": ({"k": zeros(3, 2, 4, dtype=BF16)}, *DTYPE, "k"),
    "v in float16": ({"v": zeros(3, 2, 6, dtype=F16)}, *DTYPE, "v"),
    "i in float64": ({"i": zeros(3, 2, dtype=F64)}, *DTYPE, "i"),
    "f in bfloat16": ({"f": zeros(3, 2, dtype=BF16)}, *DTYPE, "f"),
    "q not contiguous": ({"q": lambda d: torch.zeros(3, 4, 2, device=d).mT}, ValueError, "stride", "q"),
    "v not contiguous": ({"v": lambda d: torch.zeros(3, 6, 2, device=d).mT}, ValueError, "stride", "v"),
    "c of another batch": ({"state": changed("c", zeros(2, 2, 4, 6))}, *SHAPE, "state c"),
    "n of another dqk": ({"state": changed("n", zeros(3, 2, 5))}, *SHAPE, "state n"),
    "m of other heads": ({"state": changed("m", zeros(3, 3))}, *SHAPE, "state m"),
    "c in float16": ({"state": changed("c", zeros(3, 2, 4, 6, dtype=F16))}, *DTYPE, "state c"),
    "n in bfloat16": ({"state": changed("n", zeros(3, 2, 4, dtype=BF16))}, *DTYPE, "state n"),
    "m in float64": ({"state": changed("m", zeros(3, 2, dtype=F64))}, *DTYPE, "state m"),
    "c not contiguous": (
        {"state": changed("c", lambda d: torch.zeros(3, 2, 6, 4, device=d).mT)}, ValueError, "contiguous", "state c",
    ),
    "m not contiguous": (
        {"state": changed("m", lambda d: torch.zeros(2, 3, device=d).t())}, ValueError, "contiguous", "state m",
    ),
    "scale nan": ({"scale": float("nan")}, ValueError, "finite", "scale"),
    "eps negative": ({"eps": -1.0}, ValueError, "at least 0", "eps"),
    "gate_soft_cap 0": ({"gate_soft_cap": 0.0}, ValueError, "greater than 0", "gate_soft_cap"),
    "gate_soft_cap nan": ({"gate_soft_cap": float("nan")}, ValueError, "finite", "gate_soft_cap"),
    "cap infinite": ({"gate_soft_cap": float("inf")}, ValueError, "finite", "gate_soft_cap"),
    "too few indices": ({"state_indices": slots(0, 1)}, *SHAPE, "state_indices"),
    "indices of int64": ({"state_indices": slots(0, 1, 2, dtype=torch.int64)}, *DTYPE, "state_indices"),
    "indices strided": (
        {"state_indices": lambda d: slots(0, 9, 1, 9, 2, 9)(d)[::2]}, ValueError, "contiguous", "state_indices",
    ),
}  # fmt: skip
CPU_ERRORS = {
    "index too large": ({"state_indices": slots(0, 1, 3)}, ValueError, "is 3", "state_indices"),
    "index below -1": ({"state_indices": slots(0, 1, -2)}, ValueError, "is -2", "state_indices"),
    "index twice": ({"state_indices": slots(1, 0, 1)}, ValueError, "twice", "state_indices"),
}


def check_error(form, device, changes, error, says, names):
    given = {**arguments(device), "state": pool(device, 3)}
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    before = clone(given["state"])
    with pytest.raises(error, match=says) as raised:
        form(**given)
    assert type(raised.value) is error
    assert str(raised.value).startswith(names)
    assert all(torch.equal(a, b) for a, b in zip(given["state"], before, strict=True))


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors(device, wrong):
    check_error(ops.mlstm_step, device, *ERRORS[wrong])


@pytest.mark.parametrize("wrong", CPU_ERRORS)
def test_errors_of_indices_on_the_cpu(wrong):
    check_error(ops.mlstm_step, "cpu", *CPU_ERRORS[wrong])


@pytest.mark.parametrize("name", ["c", "n", "m"])
def test_slots_that_overlap(device, name):
    whole = dict(zip("cnm", pool(device, 3), strict=True))
    state = changed(name, lambda d: whole[name][:1].expand_as(whole[name]))
    check_error(ops.mlstm_step, device, {"state": state}, ValueError, "stride 0 between slots", f"state {name}")


@pytest.mark.slow
def test_errors_under_compile(device):
    for name, wrong in {**ERRORS, **(CPU_ERRORS if device == "cpu" else {})}.items():
        torch._dynamo.reset()
        try:
            form = torch.compile(ops.mlstm_step, fullgraph=True, backend="aot_eager")
            check_error(form, device, *wrong)
        except BaseException as e:
            raise AssertionError(f"{name}: {e}") from e


# These are found before an operator call that could fail at run time. Under compile torch wraps them.
WRAPPED_ERRORS = {
    "no state": ({"state": None}, TypeError, "it must be", "state"),
    "state of two": ({"state": lambda d: pool(d, 3)[:2]}, TypeError, "it must be", "state"),
    "state without n": ({"state": changed("n", lambda d: None)}, TypeError, "it must be", "state n"),
    "v on meta": ({"v": lambda d: torch.zeros(3, 2, 6, device="meta")}, ValueError, "it must be", "v"),
    "n on meta": (
        {"state": changed("n", lambda d: torch.zeros(3, 2, 4, device="meta"))},
        ValueError,
        "it must",
        "state n",
    ),
    "indices on meta": ({"state_indices": lambda d: slots(0, 1, 2)("meta")}, ValueError, "it must be", "state_indices"),
}


@pytest.mark.parametrize("wrong", WRAPPED_ERRORS)
def test_errors_that_torch_wraps_under_compile(device, wrong):
    changes, error, says, names = WRAPPED_ERRORS[wrong]
    given = {**arguments(device), "state": pool(device, 3)}
    given.update({name: make(device) if callable(make) else make for name, make in changes.items()})
    with pytest.raises(error, match=f"^{names} is .*{says}"):
        ops.mlstm_step(**given)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{names} is .*{says}"):
        torch.compile(ops.mlstm_step, fullgraph=True, backend="aot_eager")(**given)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k", "v", "i", "f", "state_indices", "c", "n", "m"])
def test_errors_of_devices(name):
    given = {**arguments("cuda"), "state_indices": indices("cuda", 0, 1, 2)}
    state = dict(zip("cnm", pool("cuda", 3), strict=True))
    where = state if name in state else given
    where[name] = where[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu"):
        ops.mlstm_step(**given, state=tuple(state.values()))


@pytest.mark.cuda
def test_sizes_in_turn():
    """The largest cluster depends on dqk. The value of one size must not be used for another."""
    most = LIMITS["mlstm_step_cuda_max_dqk"]
    for dqk in (8, most, 256, most // 2, most, 8):
        state = pool("cuda", 1, 2, dqk, 512)
        exact = clone(state, torch.float64)
        given = arguments("cuda", 1, 2, dqk, 512, torch.bfloat16, torch.float32)
        h = ops.mlstm_step(**given, state=state)
        expected = reference.mlstm_step(**{name: t.double() for name, t in given.items()}, state=exact)
        assert close(h, expected, 2 * tolerance(torch.bfloat16))
        for t, want in zip(state, exact, strict=True):
            assert close(t, want, 1e-5)


def test_random_problems(fuzz, device):
    sizes = [st.integers(1, most) for most in (4, 3, 40, 40)]

    @fuzz(300)
    @hypothesis.given(st.tuples(*sizes), st.integers(0, 1000), st.data())
    def run(sizes, seed, data):
        batch, heads, dqk, dv = sizes
        slots = batch + data.draw(st.integers(0, 3))
        order = data.draw(st.permutations(range(slots)))[:batch]
        left_out = data.draw(st.sets(st.integers(0, batch - 1)))
        where = [-1 if row in left_out else slot for row, slot in enumerate(order)]
        options = {
            "gate_soft_cap": data.draw(st.sampled_from([None, 15.0])),
            "eps": data.draw(st.sampled_from([1e-6, 0.0])),
        }
        state = pool(device, slots, heads, dqk, dv)
        exact = clone(state, torch.float64)
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        drawn = arguments(
            device, batch, heads, dqk, dv, dtype, data.draw(st.sampled_from([torch.float32, dtype])), seed=seed
        )
        h = ops.mlstm_step(**drawn, state=state, state_indices=indices(device, *where), **options)
        wide = {name: t.double() for name, t in drawn.items()}
        used = [row for row in range(batch) if where[row] >= 0]
        rows = tuple(t[[where[row] for row in used]].contiguous() for t in exact)
        given = clone(rows, torch.float64)
        expected = reference.mlstm_step(**{name: t[used] for name, t in wide.items()}, state=rows, **options)
        assert not h[sorted(left_out)].any()
        # q c and q n are sums whose terms may cancel: four times what a rounding of q changes is allowed.
        changes = [0.0]
        for draw in range(8):
            generator = torch.Generator().manual_seed(draw)
            signs = 1 - 2 * torch.randint(0, 2, wide["q"].shape, generator=generator).to(device)
            moved = {**wide, "q": wide["q"] * (1 + signs * torch.finfo(dtype).eps / 2)}
            rounded = reference.mlstm_step(
                **{name: t[used] for name, t in moved.items()}, state=clone(given, torch.float64), **options
            )
            changes.append((rounded - expected).norm().item())
        off = (h[used].double() - expected).norm()
        assert off <= max(2 * tolerance(dtype) * expected.norm().item(), 4 * max(changes))
        for t, want, new in zip(state, exact, rows, strict=True):
            want[[where[row] for row in used]] = new
            assert close(t, want, 1e-5)

    run()
