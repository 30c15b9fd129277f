"""The mLSTM's Hopper kernels: bfloat16 and float16, dqk and dv multiples of 8.

Other GPUs take the portable kernels here. These must pass too, except for the number of launches."""

from __future__ import annotations

import functools

import pytest
import torch

from flash_xlstm import ops, reference

pytestmark = pytest.mark.cuda
CUDA = "cuda"


def relative_error(actual, expected):
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()


def gates(kind, *shape):
    normal = lambda: torch.randn(shape, device=CUDA)  # noqa: E731
    if kind == "caps":  # over the whole range of a cap of 15
        return 15 * torch.tanh(1.5 * normal()), 15 * torch.tanh(1.5 * normal())
    if kind == "initial":  # the 7B model's initial gates
        return 0.1 * normal() - 10, torch.linspace(3, 6, shape[-1], device=CUDA).expand(shape).contiguous()
    return normal() - 3, normal() + 3


def draw(batch, seq, heads, dqk, dv, kind="normal", seed=0, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    q, k, v, dh = (torch.randn(batch, seq, heads, d, device=CUDA).to(dtype) for d in (dqk, dqk, dv, dv))
    return [q, k, v, *gates(kind, batch, seq, heads)], dh


def run(form, inputs, dh, dtype=None, **options):
    inputs = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in inputs]
    h = form(*inputs, **options)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh.to(h.dtype))]


NAMES = ("h", "dq", "dk", "dv", "di", "df")


def assert_errors(inputs, dh, bounds, **options):
    actual = run(ops.mlstm, inputs, dh, **options)
    expected = run(reference.mlstm_chunkwise, inputs, dh, torch.float64, chunk_size=128, **options)
    errors = {name: relative_error(a, e) for name, a, e in zip(NAMES, actual, expected, strict=True)}
    assert all(errors[name] <= bound for name, bound in zip(NAMES, bounds, strict=True)), errors


ROUNDING = (3e-3, 6e-3, 6e-3, 6e-3, 6e-3, 1e-2)
ROUNDING_F16 = (4e-4, 8e-4, 8e-4, 8e-4, 8e-4, 1.3e-3)  # float16 rounds 8 times as finely


@pytest.mark.parametrize("kind", ["normal", "initial"])
def test_error_is_the_rounding_of_the_inputs(kind):
    assert_errors(*draw(1, 4096, 2, 256, 512, kind), ROUNDING)


@pytest.mark.parametrize("kind", ["normal", "initial"])
def test_float16(kind):
    # "initial": all weights are below float16's smallest normal number.
    assert_errors(*draw(1, 4096, 2, 128, 256, kind, dtype=torch.float16), ROUNDING_F16)


def test_float16_few_heads_in_segments():
    assert_errors(*draw(1, 20000, 1, 64, 128, dtype=torch.float16), ROUNDING_F16)


@pytest.mark.parametrize(("dqk", "dv"), [(16, 24), (64, 128), (192, 320), (256, 512), (512, 256)])
@pytest.mark.parametrize("seq", [127, 300])
def test_float16_sizes(dqk, dv, seq):
    bounds = (4e-4, 8e-4, 8e-4, 8e-4, 1.3e-3, 2.6e-3)  # as in test_sizes
    assert_errors(*draw(2, seq, 2, dqk, dv, dtype=torch.float16), bounds)


def test_float16_gates_over_the_whole_range():
    inputs, dh = draw(1, 2048, 2, 128, 256, "caps", dtype=torch.float16)
    dh = dh * 1e-4  # or gradients leave the range of float16
    assert_errors(inputs, dh, (1.5e-3, *[3e-3] * 5))


@pytest.mark.slow
def test_error_does_not_grow_with_the_sequence():
    assert_errors(*draw(1, 131072, 1, 256, 512), ROUNDING)


@pytest.mark.parametrize("seed", range(3))
def test_error_with_gates_over_the_whole_range(seed):
    assert_errors(*draw(1, 4096, 2, 256, 512, "caps", seed), (6e-3, *[2e-2] * 5))


@pytest.mark.parametrize(
    ("dqk", "dv"),
    [(16, 16), (16, 512), (64, 64), (64, 256), (72, 200), (128, 128), (192, 320), (256, 128), (256, 1024)],
)
@pytest.mark.parametrize("seq", [1, 127, 128, 129, 700])
def test_sizes(dqk, dv, seq):
    # A token's weight and its output are rounded once each, by up to 2^-8. With few tokens some gates' gradients nearly
    # cancel. Their bound is looser than over a long sequence.
    assert_errors(*draw(2, seq, 2, dqk, dv), [2**-7] * 6 if seq == 1 else (3e-3, 6e-3, 6e-3, 6e-3, 1e-2, 2e-2))


@pytest.mark.parametrize(("dqk", "dv"), [(264, 64), (512, 512), (512, 1024), (1024, 512)])
def test_large_sizes(dqk, dv):
    assert_errors(*draw(1, 300, 2, dqk, dv), ROUNDING)
    assert takes_the_hopper_path(dqk, dv)


@pytest.mark.parametrize(("dqk", "dv"), [(64, 64), (128, 256), (256, 512)])
def test_few_heads_in_segments(dqk, dv):
    assert_errors(*draw(1, 20000, 1, dqk, dv), ROUNDING)


# The earlier tokens that a segment's start depends on: a chunk, all, all since about token 9,000.
@pytest.mark.parametrize("forgets", [slice(None), slice(0), slice(9000, 9400)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dqk", "dv"), [(64, 64), (128, 256)])
def test_segments_begin_with_what_is_not_forgotten(dqk, dv, dtype, forgets):
    inputs, dh = draw(1, 20000, 1, dqk, dv, dtype=dtype)
    inputs[4] += 20.0
    inputs[4][:, forgets] -= 25.0
    state = [torch.randn(1, 1, *shape, device=CUDA) for shape in ((dqk, dv), (dqk,), ())]
    actual = run(ops.mlstm, inputs, dh, initial_state=tuple(state))
    options = {"chunk_size": 128, "initial_state": tuple(t.double() for t in state)}
    expected = run(reference.mlstm_chunkwise, inputs, dh, torch.float64, **options)
    bounds = ROUNDING if dtype == torch.bfloat16 else ROUNDING_F16
    errors = {name: relative_error(a, e) for name, a, e in zip(NAMES, actual, expected, strict=True)}
    assert all(errors[name] <= bound for name, bound in zip(NAMES, bounds, strict=True)), errors


@pytest.mark.parametrize("kind", ["normal", "initial"])  # "initial": the state passes through many tiles
@pytest.mark.parametrize(("batch", "seq", "heads"), [(2, 5000, 8), (1, 3000, 17), (3, 900, 5)])
def test_gates_in_tiles(batch, seq, heads, kind):
    assert_errors(*draw(batch, seq, heads, 64, 64, kind), (3e-3, 6e-3, 6e-3, 6e-3, 1e-2, 2e-2))


@pytest.mark.parametrize("kind", ["normal", "initial"])
@pytest.mark.parametrize("offsets", [(0, 0, 9000, 9100, 12000), (*range(128), 3000)])
def test_packed_gates_in_tiles(offsets, kind):
    inputs, dh = draw(1, offsets[-1], 8, 64, 64, kind)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=CUDA)
    assert_errors(inputs, dh, (3e-3, 6e-3, 6e-3, 6e-3, 1e-2, 2e-2), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(3))
def test_not_finite_reaches_only_what_depends_on_it(which, bad):
    inputs, dh = draw(1, 700, 2, 64, 128)
    offsets = torch.tensor([0, 130, 480, 700], dtype=torch.int32, device=CUDA)
    clean = run(ops.mlstm, inputs, dh, cu_seqlens=offsets)
    token, head = 200, 1  # in the second sequence, and in the tile of the first one's end
    inputs[which][0, token, head, 5] = bad
    dirty = run(ops.mlstm, inputs, dh, cu_seqlens=offsets)
    # Elements that overflow in a product are computed again with weights that are not rounded.
    equal = lambda a, b: torch.allclose(a, b, rtol=2**-6, atol=2**-6)  # noqa: E731
    for name, a, b in zip(NAMES, dirty, clean, strict=True):
        assert equal(a[0, :130], b[0, :130]) and equal(a[0, 480:], b[0, 480:]), name
        assert torch.equal(a[0, :, 0], b[0, :, 0]), name
    h = dirty[0][0, :, head]
    assert equal(h[:token], clean[0][0, :token, head])
    assert not h[token].isfinite().all()


def test_poisoned_memory_and_repeats():
    inputs, dh = draw(2, 333, 3, 128, 256)
    expected = run(ops.mlstm, inputs, dh)
    for _ in range(3):
        poison = torch.full((1 << 27,), torch.nan, device=CUDA)
        del poison
        for name, a, b in zip(NAMES, run(ops.mlstm, inputs, dh), expected, strict=True):
            assert torch.equal(a, b), name


def test_outputs_beside_the_states():
    # h of heads up to 64 x 64 starts beside the walk over the states and waits for flags in memory that consecutive
    # calls reuse. A call that took the previous call's flags for its own would read that call's states, or none.
    shapes = [(32, 700, 4, 64, 64), (1, 9000, 4, 64, 64), (128, 300, 2, 48, 56), (3, 200, 40, 64, 32)]
    packed = {"cu_seqlens": torch.tensor([0, 1, 1000, 1000, 8990, 9000], dtype=torch.int32, device=CUDA)}
    calls = [(draw(*shape, seed=seed)[0], {}) for shape in shapes for seed in (1, 2)]
    calls += [(inputs, packed) for inputs, _ in calls[2:4]]
    with torch.no_grad():
        expected = []
        for inputs, options in calls:
            expected.append(ops.mlstm(*inputs, **options))
            torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for side_by_side in (False, True):
            for _ in range(5):
                actual = []
                for x, (inputs, options) in enumerate(calls):
                    with torch.cuda.stream(streams[x % 2 if side_by_side else 0]):
                        actual.append(ops.mlstm(*inputs, **options))
                torch.cuda.synchronize()
                assert all(map(torch.equal, actual, expected))


def takes_the_hopper_path(dqk, dv):
    if torch.cuda.get_device_capability() != (9, 0):
        return True
    inputs, dh = draw(1, 100, 1, dqk, dv)
    return sum("hopper" in name for name in launches(lambda: run(ops.mlstm, inputs, dh))) == 8


def launches(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "flash_xlstm::cuda" in event.name]


# An op, and the tensors of its state.
FORMS = {
    "mlstm": (ops.mlstm, 3),
    "mlstm_sig": (ops.mlstm_sig, 2),
    "mlstm_sig, no n": (functools.partial(ops.mlstm_sig, normalize=False), 1),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@EVERY_FORM
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("seq", "heads"), [(512, 2), (5000, 8), (20000, 8)])  # one tile of gates and many
def test_launches(seq, heads, packed, form):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("counts the Hopper kernels' launches")
    op, _ = FORMS[form]
    inputs, dh = draw(1, seq, heads, 128, 128)
    options = {"cu_seqlens": torch.tensor([0, 100, seq], dtype=torch.int32, device=CUDA)} if packed else {}
    inputs = [t.requires_grad_() for t in inputs]
    op(*inputs, **options)
    forward = launches(lambda: op(*inputs, **options))
    h = op(*inputs, **options)
    backward = launches(lambda: torch.autograd.grad(h, inputs, dh))
    assert len(forward) == 3, forward
    assert len(backward) == 5, backward
    h = op(*inputs, keep_states=False, **options)
    backward = launches(lambda: torch.autograd.grad(h, inputs, dh))
    assert len(backward) == 6, backward


def odd_strides(t):
    """The same values in rows that begin at multiples of 2 bytes, not of 16."""
    return torch.cat([t, t[..., :1]], -1)[..., :-1]


def misaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def shared_by_heads(t):
    return t[:, :, :1].expand(t.shape)


LAYOUTS = [odd_strides, misaligned, shared_by_heads]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, 2, 5], ids=["q", "k", "v", "dh"])
def test_inputs_that_the_tma_cannot_map_are_copied(which, layout):
    inputs, dh = draw(2, 300, 2, 64, 128)
    given = [*inputs, dh]
    given[which] = layout(given[which])
    dense = [t.contiguous().clone() for t in given]

    def run_both_ways(q, k, v, i, f, dh):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, i, f)]
        h = ops.mlstm(*leaves)
        return [h.detach(), *torch.autograd.grad(h, leaves, dh)]

    expected = run_both_ways(*dense)
    actual = run_both_ways(*given)
    assert all(map(torch.equal, actual, expected))
    if torch.cuda.get_device_capability() == (9, 0):
        names = launches(lambda: run_both_ways(*given))
        assert sum("::hopper::" in name for name in names) == 8, names
        assert not any("::portable::" in name for name in names), names


def test_gradient_of_a_mean_takes_the_hopper_path():
    """Its dh is expanded over the tokens."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("counts the Hopper kernels' launches")
    inputs, _ = draw(2, 300, 2, 64, 128)
    leaves = [t.requires_grad_() for t in inputs]
    h = ops.mlstm(*leaves)
    names = launches(lambda: torch.autograd.grad(h.mean(1).sum(), leaves))
    assert sum("::hopper::" in name for name in names) == 5, names
    assert not any("::portable::" in name for name in names), names


@pytest.mark.parametrize(("seq", "heads"), [(400, 2), (9000, 8)])
def test_no_synchronization_and_graph_capture(seq, heads):
    inputs, dh = draw(2, seq, heads, 64, 128)
    expected = run(ops.mlstm, inputs, dh)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ops.mlstm, inputs, dh)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static = [t.clone() for t in inputs]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(ops.mlstm, static, dh)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(ops.mlstm, static, dh)
    for t in static:
        t.zero_()
    for t, value in zip(static, inputs, strict=True):
        t.copy_(value)
    graph.replay()
    for name, a, b in zip(NAMES, results, expected, strict=True):
        assert torch.equal(a, b), name


# Apart from the 256 x 512 of 64 heads, whose forward without states is another kernel's.
KEPT = [
    (2, 300, 4, 256, 512, torch.bfloat16), (1, 128, 1, 256, 512, torch.bfloat16), (3, 127, 2, 64, 64, torch.bfloat16),
    (1, 5000, 2, 48, 200, torch.bfloat16), (2, 700, 3, 128, 256, torch.float16), (1, 999, 4, 512, 1024, torch.bfloat16),
]  # fmt: skip


def leaves(inputs, state=()):
    return [t.detach().requires_grad_() for t in (*inputs, *state)]


def state_of(rows, heads, dqk, dv, parts=3):
    n = torch.rand(rows, heads, dqk, device=CUDA)
    return (torch.randn(rows, heads, dqk, dv, device=CUDA), n, torch.randn(rows, heads, device=CUDA))[:parts]


@EVERY_FORM
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("sizes", KEPT, ids=str)
def test_kept_states_are_those_made_again(sizes, with_state, packed, form):
    (op, parts), (*sizes, dtype) = FORMS[form], sizes
    if packed:
        sizes[0], sizes[1] = 1, sizes[0] * sizes[1]
    (batch, seq, heads, dqk, dv), offsets = sizes, None
    if packed:
        offsets = torch.tensor([0, 0, seq // 3, seq // 3 + 1, seq], dtype=torch.int32, device=CUDA)
    inputs, dh = draw(*sizes, dtype=dtype)
    rows = 4 if packed else batch
    state, into = (state_of(rows, heads, dqk, dv, parts) for _ in range(2))
    found = []
    for keep in (True, False):
        given = leaves(inputs, state if with_state else ())
        absent = [None] if parts == 1 else []  # n
        options = {"initial_state": (*given[5:], *absent) if with_state else None, "cu_seqlens": offsets}
        h = op(*given[:5], return_final_state=with_state, keep_states=keep, **options)
        h, last = (h[0], h[1][:parts]) if with_state else (h, ())
        cotangents = [dh.to(h.dtype), *(into if with_state else ())]
        twice = [torch.autograd.grad([h, *last], given, cotangents, retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))  # the backward leaves them as they are
        found.append((h, *last, *twice[0]))
    for kept, again in zip(*found, strict=True):
        assert torch.equal(kept, again)


@EVERY_FORM
def test_kept_states_of_many_heads(form):
    """The forward of these sizes keeps its state in registers. The backward's own states are rounded otherwise."""
    op, _ = FORMS[form]
    inputs, dh = draw(16, 2048, 8, 256, 512, "initial")
    kept = run(op, inputs, dh)
    again = run(op, inputs, dh, keep_states=False)
    for name, a, b, bound in zip(NAMES, kept, again, ROUNDING, strict=True):
        assert relative_error(a, b) <= bound, name


@EVERY_FORM
def test_kept_states_take_the_memory_that_they_are_said_to_take(form):
    op, _ = FORMS[form]
    (q, k, v, i, f), _ = draw(2, 1024, 4, 256, 512)
    taken = []
    for keep in (False, True):
        given = leaves((q, k, v, i, f))
        before = torch.cuda.memory_allocated()
        h = op(*given, keep_states=keep)
        taken.append(torch.cuda.memory_allocated() - before)
        del h
    if torch.cuda.get_device_capability() == (9, 0):
        states = 2 * 1024 * 4 * (256 * 512 // 64 + 256 * 4 // 128)
        assert abs(taken[1] - taken[0] - states) <= 4096, taken
    else:
        assert taken[0] == taken[1]


@pytest.mark.parametrize("sizes", [KEPT[0], KEPT[4]], ids=str)
def test_kept_states_in_the_backward_in_two_parts(sizes):
    batch, seq, heads, dqk, dv, dtype = sizes
    (q, k, v, i, f), dh = draw(batch, seq, heads, dqk, dv, dtype=dtype)
    state, into = state_of(batch, heads, dqk, dv), state_of(batch, heads, dqk, dv)
    found = []
    for keep in (True, False):
        inputs = q, k, v, i, f, *state, None
        h, kept, *_ = torch.ops.flash_xlstm.mlstm(*inputs, None, 1e-6, None, 0, False, keep)
        rest = *inputs, h, kept, None, 1e-6, None, 0
        first = torch.ops.flash_xlstm.mlstm_initial_backward(dh, None, None, *rest)
        second = torch.ops.flash_xlstm.mlstm_remaining_backward(dh, *into, *rest, first[-1])
        found.append((*first[:-1], *second))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def operator_of(form):
    """The form's operator and its backward's, how many tensors their states have, and their last option, if any."""
    name, no_n = form.partition(",")[::2]
    operators = (getattr(torch.ops.flash_xlstm, name + of) for of in ("", "_backward"))
    return *operators, *((3, ()) if name == "mlstm" else (2, (not no_n,)))


@EVERY_FORM
def test_kept_states_compiled(form):
    (op, parts), (operator, _, all_parts, normalize) = FORMS[form], operator_of(form)
    inputs, dh = draw(2, 300, 4, 256, 512)
    scaled = lambda *given: op(*given) * 1.5  # noqa: E731
    actual, expected = run(torch.compile(scaled, fullgraph=True), inputs, dh), run(scaled, inputs, dh)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    # With an initial state every state is written: opcheck compares all of what is kept.
    given = *leaves(inputs, state_of(2, 4, 256, 512, parts)), *[None] * (all_parts - parts), None
    torch.library.opcheck(operator, (*given, None, 1e-6, None, 0, False, *normalize, True))


@EVERY_FORM
def test_what_was_kept_is_checked(form):
    operator, backward, parts, normalize = operator_of(form)
    inputs, dh = draw(1, 300, 2, 64, 64)
    absent, options = [None] * parts, (None, 1e-6, None, 0)
    given = *inputs, *absent, None
    h, kept, *_ = operator(*given, *options, False, *normalize, True)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only the Hopper kernels keep states")
    floats = 64 * 64 // 2 + 64  # c in 16 bits and n, for each of three chunks and two heads
    beside = 300 * 2 * {"mlstm": 2, "mlstm_sig": 1}.get(form, 0)
    assert kept.shape == (3 * 2 * floats + beside,)
    run_backward = lambda kept: backward(dh, *absent, *given, h, kept, *options, *normalize)  # noqa: E731
    run_backward(kept)
    for wrong in (kept[1:], kept[: kept.numel() - 300 * 2], kept[None], kept[:0]):  # shorter, by s, of two dimensions
        with pytest.raises(ValueError, match=r"kept has shape"):
            run_backward(wrong)
    with pytest.raises(TypeError, match=r"kept has dtype bfloat16"):
        run_backward(kept.bfloat16())
    with pytest.raises(ValueError, match=r"kept is on cpu; it must be on the device of q, cuda"):
        run_backward(kept.cpu())


@EVERY_FORM
def test_kept_states_where_vmap_maps_over_the_gradient(form):
    """What is kept with states does not join in one call: there is one for each gradient."""
    op, _ = FORMS[form]
    inputs, dh = draw(2, 300, 2, 64, 128)
    several = torch.stack([dh, 0.5 * dh])
    given = leaves(inputs)
    expected = [torch.autograd.grad(op(*given), given, each) for each in several]
    _, pull = torch.func.vjp(op, *inputs)
    batched = torch.autograd.grad(op(*given), given, several, is_grads_batched=True)
    for gradients in (torch.func.vmap(pull)(several), batched):
        for one, each, bound in zip(gradients, zip(*expected, strict=True), ROUNDING[1:], strict=True):
            assert relative_error(one, torch.stack(each)) <= bound


@EVERY_FORM
def test_kept_states_of_an_empty_batch(form):
    """What is kept has one dimension here too, as the fake kernel says."""
    (op, _), (operator, _, parts, normalize) = FORMS[form], operator_of(form)
    inputs, _ = draw(0, 300, 2, 64, 64)
    given = leaves(inputs)
    op(*given).sum().backward()
    assert all(t.grad.shape == t.shape for t in given)
    arguments = *given, *[None] * parts, None, None, 1e-6, None, 0, False, *normalize, True
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
