"""Sequences whose states lie in a pool: the results of ops.mlstm, without gathering and scattering the states."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from flash_xlstm import ops, reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
C_DTYPES = pytest.mark.parametrize("c_dtype", [F32, BF16], ids=str)


def normal(device, *shape, dtype=F32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def arguments(device, batch=1, seq=20, heads=2, dqk=8, dv=16, dtype=F32, gate_dtype=F32, seed=0):
    shapes = {name: (batch, seq, heads, dim) for name, dim in (("q", dqk), ("k", dqk), ("v", dv))}
    given = {name: normal(device, *shape, dtype=dtype, seed=seed + x) for x, (name, shape) in enumerate(shapes.items())}
    for x, name in enumerate("if"):
        given[name] = (normal(device, batch, seq, heads, seed=seed + 3 + x) + x).to(gate_dtype)
    return given


def integers(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def offsets(device, lengths):
    return integers(device, 0, *torch.tensor(lengths).cumsum(0).tolist())


def fill(state, slots, seed=10):
    """Random states in these slots."""
    for x, t in enumerate(state):
        for slot in slots:
            t[slot] = normal(t.device, *t.shape[1:], dtype=t.dtype, seed=seed + 7 * slot + x)


def gathered(state, slots, fresh):
    """What ops.mlstm takes in the pool's place. Sequences that are left out begin with zeros."""
    first = [t[slots.clamp_min(0).long()].float() for t in state]
    for t in first:
        t[fresh | (slots < 0)] = 0.0
    return tuple(first)


def check_equals_mlstm(given, state, memory, slots, fresh, lengths=None, exact=True, **options):
    """h and the states are those of ops.mlstm with its states gathered and scattered, and nothing else is written."""
    device, cu_seqlens = memory.device, None if lengths is None else offsets(memory.device, lengths)
    slots, fresh = integers(device, *slots), torch.tensor(fresh, device=device)
    expected, last = ops.mlstm(
        **given, initial_state=gathered(state, slots, fresh), cu_seqlens=cu_seqlens, return_final_state=True, **options
    )
    before = memory.clone()
    h = ops.mlstm_prefill(**given, state=state, state_indices=slots, cu_seqlens=cu_seqlens, fresh=fresh, **options)
    assert h.dtype == expected.dtype and h.shape == expected.shape
    rows = h.split(1) if lengths is None else h.split(lengths, 1)
    wanted = expected.split(1) if lengths is None else expected.split(lengths, 1)
    same = torch.equal if exact else close
    for s, slot in enumerate(slots.tolist()):
        assert not rows[s].any() if slot < 0 else same(rows[s], wanted[s]), s

    used = slots >= 0
    where = slots[used].long()
    after, got = memory.clone(), [t[where] for t in state]
    memory.copy_(before)
    for t, part in zip(state, last, strict=True):
        t[where] = part[used].to(t.dtype)
    assert all(same(t, whole[where]) for t, whole in zip(got, state, strict=True))
    if not exact:  # nothing but these slots is written
        for t, part in zip(state, got, strict=True):
            t[where] = part
    assert torch.equal(memory, after)
    # An empty sequence leaves its slot as it is.
    reads = used if lengths is None else used & (integers(device, *lengths) > 0)
    assert not reads.any() or not torch.equal(after, before)


def close(actual, expected, tolerance=1e-2):
    return (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


LENGTHS = [3, 0, 70, 200, 0, 1, 40]
SLOTS = [4, 2, -1, 0, 1, 5, 7]
FRESH = [True, False, False, False, True, True, False]


@C_DTYPES
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("heads", "dqk", "dv"), [(1, 5, 7), (3, 16, 24), (1, 64, 64), (2, 72, 200), (1, 130, 264)])
def test_packed(page_pool, device, dtype, c_dtype, heads, dqk, dv):
    state, memory = page_pool(device, 9, heads, dqk, dv, c_dtype)
    fill(state, [2, 0, 7])
    given = arguments(device, 1, sum(LENGTHS), heads, dqk, dv, dtype)
    check_equals_mlstm(given, state, memory, SLOTS, FRESH, LENGTHS)


@C_DTYPES
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("heads", "dqk", "dv"), [(1, 5, 7), (2, 64, 128)])
def test_a_batch(page_pool, device, dtype, c_dtype, heads, dqk, dv):
    state, memory = page_pool(device, 5, heads, dqk, dv, c_dtype)
    fill(state, [2, 0])
    given = arguments(device, 4, 150, heads, dqk, dv, dtype)
    check_equals_mlstm(given, state, memory, [2, -1, 0, 4], [False, False, False, True])


# The Hopper kernels' segments, where the state is read twice and another block writes it; the portable kernels' ranges.
@pytest.mark.cuda
@C_DTYPES
@pytest.mark.parametrize(
    ("dtype", "lengths", "heads", "dqk", "dv"),
    [
        (BF16, [9000], 1, 64, 64),
        (BF16, [5000, 1, 0, 4000], 1, 64, 64),
        (BF16, [9000], 1, 128, 256),
        (BF16, [20000, 700], 2, 256, 512),
        (F16, [9000], 1, 128, 64),
        (F16, [4000, 4000], 1, 256, 256),
        (F32, [9000, 0, 700], 2, 64, 65),
        (BF16, [3000, 3000], 8, 20, 30),
    ],
    ids=str,
)
def test_long_sequences_on_cuda(page_pool, dtype, c_dtype, lengths, heads, dqk, dv):
    for fresh in (False, True):
        state, memory = page_pool("cuda", len(lengths), heads, dqk, dv, c_dtype)
        fill(state, range(len(lengths)))
        given = arguments("cuda", 1, sum(lengths), heads, dqk, dv, dtype)
        slots = list(reversed(range(len(lengths))))
        check_equals_mlstm(given, state, memory, slots, [fresh] * len(lengths), lengths)
    state, memory = page_pool("cuda", 4, heads, dqk, dv, c_dtype)
    fill(state, range(4))
    given = arguments("cuda", 2, max(lengths), heads, dqk, dv, dtype)
    check_equals_mlstm(given, state, memory, [3, -1], [False, False])


@pytest.mark.parametrize("options", [{"scale": 0.7}, {"eps": 0.1}, {"gate_soft_cap": 2.0}], ids=str)
@pytest.mark.parametrize("gate_dtype", [F32, BF16], ids=str)
def test_options(page_pool, device, options, gate_dtype):
    state, memory = page_pool(device, 3, 2, 8, 16)
    fill(state, range(3))
    given = arguments(device, dtype=BF16, gate_dtype=gate_dtype)
    given["f"] = 3 * given["f"]
    check_equals_mlstm(given, state, memory, [2], [False], [20], **options)


@C_DTYPES
@pytest.mark.parametrize(("dqk", "dv"), [(16, 24), (64, 128)])
def test_slots_of_c_that_are_not_aligned(page_pool, device, c_dtype, dqk, dv):
    """As with one head of float32 after another and no padding. On CUDA other kernels than mlstm's may serve it."""
    state, memory = page_pool(device, 9, 1, dqk, dv, c_dtype, multiple=4)
    assert any(t.data_ptr() % 16 for t in state[0])
    fill(state, [2, 0, 7])
    given = arguments(device, 1, sum(LENGTHS), 1, dqk, dv, BF16)
    check_equals_mlstm(given, state, memory, SLOTS, FRESH, LENGTHS, exact=device == "cpu")


def test_contiguous_states(device):
    state = normal(device, 3, 2, 8, 16), normal(device, 3, 2, 8, seed=1), normal(device, 3, 2, seed=2)
    given, first = arguments(device, 3), tuple(t[[1, 2, 0]] for t in state)
    expected, last = ops.mlstm(**given, initial_state=first, return_final_state=True)
    assert torch.equal(ops.mlstm_prefill(**given, state=state, state_indices=integers(device, 1, 2, 0)), expected)
    assert all(torch.equal(t[[1, 2, 0]], want) for t, want in zip(state, last, strict=True))


@C_DTYPES
def test_is_the_reference(page_pool, device, c_dtype):
    state, _ = page_pool(device, 9, 2, 8, 16, c_dtype)
    fill(state, range(9))
    given, slots, fresh = arguments(device, 1, sum(LENGTHS)), integers(device, *SLOTS), torch.tensor(FRESH).to(device)
    options = {"state_indices": slots, "cu_seqlens": offsets(device, LENGTHS), "fresh": fresh, "gate_soft_cap": 15.0}
    exact = tuple(t.double() for t in state)
    expected = reference.mlstm_prefill(**{name: t.double() for name, t in given.items()}, state=exact, **options)
    assert close(ops.mlstm_prefill(**given, state=state, **options), expected, 1e-5)
    for t, want in zip(state, exact, strict=True):
        assert close(t, want, 1e-5 if t.dtype == F32 else 3e-3)


@C_DTYPES
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_pieces_then_steps_make_the_whole(page_pool, device, dtype, c_dtype):
    """Chunked prefill into a slot that holds NaN, then decoding."""
    state, _ = page_pool(device, 3, 2, 64, 64, c_dtype)
    given, row = arguments(device, 1, 40, 2, 64, 64, dtype), integers(device, 1)
    expected = ops.mlstm(**given)
    h = []
    for first, last in ((0, 1), (1, 18), (18, 37)):
        piece = {name: t[:, first:last] for name, t in given.items()}
        fresh = torch.tensor([first == 0], device=device)
        h.append(ops.mlstm_prefill(**piece, state=state, state_indices=row, fresh=fresh))
    for t in range(37, 40):
        token = {name: x[:, t] for name, x in given.items()}
        h.append(ops.mlstm_step(**token, state=state, state_indices=row)[:, None])
    assert close(torch.cat(h, 1), expected, 1e-5 if dtype == c_dtype == F32 else 2e-2)
    assert all(t[[0, 2]].isnan().all() for t in state)


def test_nobody(page_pool, device):
    given, (state, memory) = arguments(device, 3), page_pool(device, 4, 2, 8, 16)
    before, empty = memory.clone(), page_pool(device, 0, 2, 8, 16)[0]
    for pool in (state, empty):
        h = ops.mlstm_prefill(**given, state=pool, state_indices=integers(device, -1, -1, -1))
        assert h.shape == given["v"].shape and not h.any()
    assert torch.equal(memory, before)
    nothing = arguments(device, 0)
    assert ops.mlstm_prefill(**nothing, state=state, state_indices=integers(device)).shape == (0, 20, 2, 16)


@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f"])
def test_nan_of_a_sequence_that_is_left_out_goes_nowhere(page_pool, device, name):
    state, memory = page_pool(device, 3, 2, 8, 16)
    fill(state, range(3))
    before, given = memory.clone(), arguments(device, 2, dtype=BF16)
    given[name][1] = torch.nan
    h = ops.mlstm_prefill(**given, state=state, state_indices=integers(device, 2, -1))
    assert h[0].isfinite().all() and not h[1].any()
    size = memory.numel() // 3
    assert torch.equal(memory[: 2 * size], before[: 2 * size])


@pytest.mark.cuda
@pytest.mark.parametrize("wrong", [5, 2**31 - 1, -2, -(2**31)])
@pytest.mark.parametrize("sizes", [(8, 16), (5, 7), (64, 64), (128, 256)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_index_outside_the_pool_gives_nan_on_cuda(page_pool, dtype, sizes, wrong):
    state, memory = page_pool("cuda", 5, 2, *sizes)
    fill(state, range(5))
    size, before = memory.numel() // 5, memory.clone()
    given = arguments("cuda", 1, 300, 2, *sizes, dtype)
    slots, cu_seqlens = integers("cuda", 3, wrong, 1), integers("cuda", 0, 100, 250, 300)
    h = ops.mlstm_prefill(**given, state=state, state_indices=slots, cu_seqlens=cu_seqlens)
    assert h[:, 100:250].isnan().all() and h[:, :100].isfinite().all() and h[:, 250:].isfinite().all()
    for slot in range(5):
        part = slice(slot * size, (slot + 1) * size)
        assert torch.equal(memory[part], before[part]) == (slot not in (3, 1))


@pytest.mark.cuda
@pytest.mark.parametrize(("dqk", "dv"), [(64, 64), (128, 256), (5, 7)])
def test_cuda_graph(page_pool, dqk, dv):
    """The slots and the offsets of a replay are those that lie in memory then."""
    given = arguments("cuda", 1, 300, 2, dqk, dv, BF16)
    slots, fresh, cu_seqlens = integers("cuda", -1, -1), torch.ones(2).bool().cuda(), integers("cuda", 0, 1, 2)
    state, memory = page_pool("cuda", 4, 2, dqk, dv)
    options = {"state_indices": slots, "fresh": fresh, "cu_seqlens": cu_seqlens}
    with torch.no_grad():
        ops.mlstm_prefill(**given, state=state, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = ops.mlstm_prefill(**given, state=state, **options)
    fill(state, range(4))
    slots.copy_(integers("cuda", 2, 0))
    fresh.copy_(torch.tensor([False, True]))
    cu_seqlens.copy_(integers("cuda", 0, 130, 300))
    before = memory.clone()
    graph.replay()
    after, actual = memory.clone(), h.clone()
    memory.copy_(before)
    assert torch.equal(ops.mlstm_prefill(**given, state=state, **options), actual) and torch.equal(memory, after)


@pytest.mark.cuda
def test_prefill_and_steps_in_turn(page_pool):
    """With nothing between them on the stream, what one of them reads too early shows."""
    state, memory = page_pool("cuda", 2, 4, 64, 128)
    fill(state, range(2))
    start, slots = memory.clone(), integers("cuda", 1)
    given = arguments("cuda", 1, 65, 4, 64, 128, BF16)
    token = {name: t[:, 0] for name, t in given.items()}
    results = []
    for waits in (True, False):
        memory.copy_(start)
        h = []
        for _ in range(30):
            h.append(ops.mlstm_prefill(**given, state=state, state_indices=slots))
            torch.cuda.synchronize() if waits else None
            h.append(ops.mlstm_step(**token, state=state, state_indices=slots))
            torch.cuda.synchronize() if waits else None
        results.append([*h, memory.clone()])
    assert all(map(torch.equal, *results))


def test_writes_everything_and_repeats_itself(page_pool, device, nan_memory):
    given, cu_seqlens = arguments(device, 1, sum(LENGTHS), 2, 64, 64, BF16), offsets(device, LENGTHS)
    results = []
    for _ in range(2):
        state, memory = page_pool(device, 9, 2, 64, 64)
        fill(state, [2, 0, 7])
        with nan_memory():
            h = ops.mlstm_prefill(
                **given, state=state, state_indices=integers(device, *SLOTS), cu_seqlens=cu_seqlens,
                fresh=torch.tensor(FRESH, device=device),
            )  # fmt: skip
        results.append((h, memory))
    assert results[0][0].isfinite().all() and all(map(torch.equal, *results))


@pytest.mark.parametrize("packed", [False, True])
@C_DTYPES
def test_opcheck(page_pool, device, packed, c_dtype):
    given, (c, n, m) = arguments(device, 1 if packed else 2, 9), page_pool(device, 4, 2, 8, 16, c_dtype)[0]
    c, n, m = (torch.randn(4, 2 * t[0].numel(), device=device).to(t.dtype) for t in (c, n, m))  # memory of their own
    state = (t[:, : t.shape[1] // 2].view(4, 2, *shape) for t, shape in ((c, (8, 16)), (n, (8,)), (m, ())))
    cu_seqlens = integers(device, 0, 4, 9) if packed else None
    fresh = torch.tensor([True, False], device=device) if packed else None
    operator = torch.ops.flash_xlstm.mlstm_prefill
    arguments_ = (*given.values(), *state, integers(device, 3, -1), cu_seqlens, fresh, None, 1e-6, 15.0)
    torch.library.opcheck(operator, arguments_)


def test_compiles(device):
    def form(given, state, slots):
        given = {name: 2 * t for name, t in given.items()}
        first = ops.mlstm_prefill(**given, state=state, state_indices=slots)
        return first + ops.mlstm_prefill(**given, state=state, state_indices=slots)  # sees what the first wrote

    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    given, slots = arguments(device, 2), integers(device, 3, 1)
    first = normal(device, 4, 2, 8, 16), normal(device, 4, 2, 8), normal(device, 4, 2)
    state, copy = (tuple(t.clone() for t in first) for _ in range(2))
    with torch.no_grad():
        assert torch.allclose(compiled(given, state, slots), form(given, copy, slots), rtol=1e-6)
    assert all(map(torch.equal, state, copy))


def test_autocast(page_pool, device):
    given, slots = arguments(device), integers(device, 1)
    results = []
    for autocast in (True, False):
        state, memory = page_pool(device, 2, 2, 8, 16)
        fill(state, range(2))
        with torch.autocast(device, BF16, enabled=autocast):
            inputs = given if autocast else {n: t.bfloat16() if n in "qkv" else t for n, t in given.items()}
            results.append((ops.mlstm_prefill(**inputs, state=state, state_indices=slots), memory))
    assert results[0][0].dtype == BF16 and all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f", "c", "n", "m"])
def test_has_no_gradient_and_says_so(device, name):
    given = arguments(device)
    state = {"c": torch.zeros(1, 2, 8, 16), "n": torch.zeros(1, 2, 8), "m": torch.zeros(1, 2)}
    state = {part: t.to(device) for part, t in state.items()}
    {**given, **state}[name].requires_grad_()
    pool, slots = tuple(state.values()), integers(device, 0)
    with pytest.raises(RuntimeError, match=r"mlstm_prefill has no gradient.*torch.no_grad\(\)"):
        ops.mlstm_prefill(**given, state=pool, state_indices=slots)
    with torch.no_grad():
        before = [t._version for t in pool]
        ops.mlstm_prefill(**given, state=pool, state_indices=slots)
    assert all(t._version > was for t, was in zip(pool, before, strict=True))


def test_meta_tensors():
    state = (torch.empty(3, 2, *shape, device="meta") for shape in ((8, 16), (8,), ()))
    h = ops.mlstm_prefill(**arguments("meta", 2), state=tuple(state), state_indices=integers("meta", 1, 2))
    assert h.is_meta and h.shape == (2, 20, 2, 16)


# --- errors -----------------------------------------------------------------------------------------------------------

POOL = {"c": (3, 2, 8, 16), "n": (3, 2, 8), "m": (3, 2)}


def pool(**changes):
    """The state with other tensors in place of some."""
    return lambda device: tuple(changes.get(name, torch.zeros(shape)).to(device) for name, shape in POOL.items())


def on(*values, dtype=torch.int32):
    return lambda device: torch.tensor(values, dtype=dtype, device=device)


SHAPE, DTYPE = (ValueError, "has shape"), (TypeError, "has dtype")
ERRORS = {
    "no indices": ({"state_indices": lambda d: None}, TypeError, "must be a tensor", "state_indices"),
    "too few indices": ({"state_indices": on(1)}, *SHAPE, "state_indices"),
    "indices of int64": ({"state_indices": on(1, 2, dtype=torch.int64)}, *DTYPE, "state_indices"),
    "indices strided": ({"state_indices": lambda d: on(0, 9, 1, 9)(d)[::2]}, ValueError, "contiguous", "state_indices"),
    "fresh of one": ({"fresh": on(True, dtype=torch.bool)}, *SHAPE, "fresh"),
    "fresh of int32": ({"fresh": on(1, 0)}, *DTYPE, "fresh"),
    "fresh strided": (
        {"fresh": lambda d: on(True, True, False, False, dtype=torch.bool)(d)[::2]}, ValueError, "contiguous", "fresh",
    ),
    "offsets with a batch": ({"cu_seqlens": on(0, 20)}, ValueError, "has batch 2", "q"),
    "no state": ({"state": lambda d: None}, TypeError, "must be", "state"),
    "a state of two": ({"state": lambda d: pool()(d)[:2]}, TypeError, "must be", "state"),
    "no n": ({"state": lambda d: (pool()(d)[0], None, pool()(d)[2])}, TypeError, "must be", "state n"),
    "c of other sizes": ({"state": pool(c=torch.zeros(3, 2, 8, 15))}, *SHAPE, "state c"),
    "n of other slots": ({"state": pool(n=torch.zeros(2, 2, 8))}, *SHAPE, "state n"),
    "m of other heads": ({"state": pool(m=torch.zeros(3, 3))}, *SHAPE, "state m"),
    "c in float16": ({"state": pool(c=torch.zeros(POOL["c"]).half())}, *DTYPE, "state c"),
    "n in bfloat16": ({"state": pool(n=torch.zeros(POOL["n"]).bfloat16())}, *DTYPE, "state n"),
    "c transposed": ({"state": pool(c=torch.zeros(3, 2, 16, 8).mT)}, ValueError, "contiguous within", "state c"),
    "slots of n that overlap": (
        {"state": lambda d: (pool()(d)[0], torch.zeros(1, 2, 8, device=d).expand(3, 2, 8), pool()(d)[2])},
        ValueError, "stride 0", "state n",
    ),
    "k of other heads": ({"k": lambda d: torch.zeros(2, 20, 3, 8, device=d)}, *SHAPE, "k"),
    "i in float64": ({"i": lambda d: torch.zeros(2, 20, 2, device=d).double()}, *DTYPE, "i"),
    "scale nan": ({"scale": lambda d: float("nan")}, ValueError, "finite", "scale"),
    "eps negative": ({"eps": lambda d: -1.0}, ValueError, "at least 0", "eps"),
    "gate_soft_cap 0": ({"gate_soft_cap": lambda d: 0.0}, ValueError, "greater than 0", "gate_soft_cap"),
}  # fmt: skip
CPU_ERRORS = {
    "index too large": ({"state_indices": on(1, 3)}, ValueError, "is 3", "state_indices"),
    "index below -1": ({"state_indices": on(-2, 1)}, ValueError, "is -2", "state_indices"),
    "index twice": ({"state_indices": on(1, 1)}, ValueError, "twice", "state_indices"),
}


def check_error(device, changes, error, says, names):
    given = {**arguments(device, 2), "state": pool()(device), "state_indices": integers(device, 2, 0)}
    given.update({name: make(device) for name, make in changes.items()})
    with pytest.raises(error, match=says) as raised:
        ops.mlstm_prefill(**given)
    assert type(raised.value) is error and str(raised.value).startswith(names)
    assert not any(t.any() for t in given["state"] or () if t is not None)


@pytest.mark.parametrize("wrong", ERRORS)
def test_errors(device, wrong):
    check_error(device, *ERRORS[wrong])


@pytest.mark.parametrize("wrong", CPU_ERRORS)
def test_errors_of_indices_on_the_cpu(wrong):
    check_error("cpu", *CPU_ERRORS[wrong])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["k", "i", "state_indices", "cu_seqlens", "fresh", "c", "n", "m"])
def test_errors_of_devices(name):
    given = {
        **arguments("cuda"), "state_indices": integers("cuda", 1), "cu_seqlens": integers("cuda", 0, 20),
        "fresh": torch.ones(1, dtype=torch.bool, device="cuda"),
    }  # fmt: skip
    state = dict(zip("cnm", pool()("cuda"), strict=True))
    where = state if name in state else given
    where[name] = where[name].cpu()
    with pytest.raises(ValueError, match=f"{name} is on cpu"):
        ops.mlstm_prefill(**given, state=tuple(state.values()))


def test_random_problems(fuzz, page_pool, device):
    sizes = [st.integers(1, most) for most in (3, 40, 40)]

    @fuzz(40)
    @hypothesis.given(st.tuples(*sizes), st.lists(st.integers(0, 90), min_size=1, max_size=5), st.data())
    def run(sizes, lengths, data):
        slots = data.draw(st.permutations(range(len(lengths) + 2)))[: len(lengths)]
        slots = [-1 if data.draw(st.integers(0, 4)) == 0 else slot for slot in slots]
        fresh = [data.draw(st.booleans()) for _ in lengths]
        if sum(lengths) == 0:
            return
        c_dtype, dtype = data.draw(st.sampled_from([F32, BF16])), data.draw(st.sampled_from([F32, BF16, F16]))
        state, memory = page_pool(device, len(lengths) + 2, *sizes, c_dtype)
        fill(state, [slot for slot, new in zip(slots, fresh, strict=True) if slot >= 0 and not new])
        given = arguments(device, 1, sum(lengths), *sizes, dtype, data.draw(st.sampled_from([F32, dtype])))
        check_equals_mlstm(given, state, memory, slots, fresh, lengths)

    run()
