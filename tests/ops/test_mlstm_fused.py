"""The mLSTM's forward with the state on the chip: bfloat16, 256 x 512, many sequences and heads.

Other GPUs take other kernels here. These must pass too, except where a test counts launches."""

from __future__ import annotations

import itertools

import pytest
import torch

from flash_xlstm import ops, reference

pytestmark = pytest.mark.cuda
CUDA = "cuda"
BF16 = torch.bfloat16
DQK, DV = 256, 512
NAMES = ("h", "dq", "dk", "dv", "di", "df")
ROUNDING = (3e-3, 6e-3, 6e-3, 6e-3, 6e-3, 1e-2)
FEW_TOKENS = (3e-3, 6e-3, 6e-3, 6e-3, 1e-2, 2e-2)  # some gates' gradients nearly cancel


def relative_error(actual, expected):
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()


def gates(kind, *shape):
    normal = lambda: torch.randn(shape, device=CUDA)  # noqa: E731
    if kind == "caps":  # over the whole range of a cap of 15
        return 15 * torch.tanh(1.5 * normal()), 15 * torch.tanh(1.5 * normal())
    if kind == "initial":  # the 7B model's initial gates
        return 0.1 * normal() - 10, torch.linspace(3, 6, shape[-1], device=CUDA).expand(shape).contiguous()
    if kind == "shut":
        return normal(), normal() - 8
    if kind == "padded":
        i, f = normal() - 3, normal() + 3
        hole = torch.rand(*shape[:2], 1, device=CUDA) < 0.3
        return i.masked_fill(hole, -torch.inf), f.masked_fill(hole, torch.inf)
    return normal() - 3, normal() + 3


def close(a, b):
    """Other kernels make elements again, with weights that are not rounded, where a product is not finite."""
    return torch.allclose(a, b, rtol=2**-6, atol=2**-6)


def draw(batch, seq, heads, kind="normal", seed=0):
    """Enough sequences and heads, 28 and more, that the clusters of four blocks which run at once are mostly busy."""
    torch.manual_seed(seed)
    q, k, v, dh = (torch.randn(batch, seq, heads, d, device=CUDA).to(BF16) for d in (DQK, DQK, DV, DV))
    return [q, k, v, *gates(kind, batch, seq, heads)], dh


def draw_state(states, heads):
    return tuple(torch.randn(states, heads, *shape, device=CUDA) for shape in ((DQK, DV), (DQK,), ()))


def run(form, inputs, dh, dtype=None, **options):
    inputs = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in inputs]
    h = form(*inputs, **options)
    return [h.detach(), *torch.autograd.grad(h, inputs, dh.to(h.dtype))]


def launches(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "flash_xlstm::cuda" in event.name]


def is_fused(function):
    return any("mlstm_fused" in name for name in launches(function))


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="counts Hopper's launches"
)


def assert_errors(inputs, dh, bounds, form=ops.mlstm, form64=reference.mlstm_chunkwise, **options):
    actual = run(form, inputs, dh, **options)
    if options.get("initial_state") is not None:
        options["initial_state"] = tuple(t.double() for t in options["initial_state"])
    expected = run(form64, inputs, dh, torch.float64, chunk_size=128, **options)
    errors = {name: relative_error(a, e) for name, a, e in zip(NAMES, actual, expected, strict=True)}
    assert all(errors[name] <= bound for name, bound in zip(NAMES, bounds, strict=True)), errors


@pytest.mark.parametrize("seq", [1, 63, 64, 65, 127, 128, 129, 193, 700])
def test_lengths(seq):
    # A token's weight and its output are rounded once each, by up to 2^-8.
    assert_errors(*draw(7, seq, 4, seed=seq), [2**-7] * 6 if seq == 1 else FEW_TOKENS)


@pytest.mark.parametrize(("batch", "seq", "heads"), [(14, 300, 4), (25, 130, 5), (1, 100, 28), (100, 64, 3)])
def test_several_tasks_a_cluster(batch, seq, heads):
    assert_errors(*draw(batch, seq, heads), FEW_TOKENS)


@pytest.mark.parametrize("kind", ["normal", "initial", "shut"])
def test_error_is_the_rounding_of_the_inputs(kind):
    inputs, dh = draw(7, 2048, 4, kind)
    assert_errors(inputs, dh, ROUNDING if kind != "shut" else FEW_TOKENS)


@pytest.mark.parametrize("seed", range(2))
def test_error_with_gates_over_the_whole_range(seed):
    assert_errors(*draw(7, 2048, 4, "caps", seed), (6e-3, *[2e-2] * 5))


def test_soft_cap():
    """A few tokens outweigh all others here, so that roundings do not average out. A sequence alone, with too few heads
    for the fused kernel, has errors of the same size."""
    inputs, dh = draw(7, 300, 4)
    inputs[3], inputs[4] = inputs[3] * 10, inputs[4] * 10
    options = {"gate_soft_cap": 15.0}
    actual = run(ops.mlstm, inputs, dh, **options)
    alone = [run(ops.mlstm, [t[row : row + 1] for t in inputs], dh[row : row + 1], **options) for row in range(7)]
    expected = run(reference.mlstm_chunkwise, inputs, dh, torch.float64, chunk_size=128, **options)
    for name, a, b, e in zip(NAMES, actual, zip(*alone, strict=True), expected, strict=True):
        assert relative_error(a, e) <= 1.25 * relative_error(torch.cat(b), e) + 1e-3, name


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["normal", "padded"])
def test_sigmoid_input_gate(normalize, kind):
    inputs, dh = draw(7, 300, 4, kind)
    options = {"form": ops.mlstm_sig, "form64": reference.mlstm_sig_chunkwise, "normalize": normalize}
    assert_errors(inputs, dh, FEW_TOKENS, **options)


def test_gates_in_bfloat16():
    inputs, dh = draw(7, 300, 4)
    inputs[3:] = [t.to(BF16) for t in inputs[3:]]
    assert_errors(inputs, dh, FEW_TOKENS)


@pytest.mark.parametrize("kind", ["normal", "padded", "caps"])
@pytest.mark.parametrize("seq", [1, 64, 200, 321])
def test_states(seq, kind):
    inputs, _ = draw(7, seq, 4, kind, seed=seq)
    state = draw_state(7, 4)
    with torch.no_grad():
        for first in (None, state):
            h, last = ops.mlstm(*inputs, initial_state=first, return_final_state=True)
            wide = None if first is None else tuple(t.double() for t in first)
            expected = reference.mlstm_chunkwise(
                *(t.double() for t in inputs), initial_state=wide, chunk_size=64, return_final_state=True
            )
            bound = 2**-7 if kind == "caps" or seq == 1 else 4e-3
            assert relative_error(h, expected[0]) < bound
            for name, a, b in zip("cnm", last, expected[1], strict=True):
                assert relative_error(a, b) < (4e-3 if name == "c" else 1e-5), name


def test_gradients_through_states():
    inputs, dh = draw(7, 200, 4)
    assert_errors(inputs, dh, FEW_TOKENS, initial_state=draw_state(7, 4))


def test_a_sequence_in_two_pieces():
    inputs, _ = draw(7, 300, 4)
    with torch.no_grad():
        whole, last = ops.mlstm(*inputs, return_final_state=True)
        h, state = [], None
        for piece in (slice(0, 128), slice(128, None)):
            part, state = ops.mlstm(*(t[:, piece] for t in inputs), initial_state=state, return_final_state=True)
            h.append(part)
    assert torch.allclose(torch.cat(h, 1), whole, rtol=2**-7, atol=2**-7)  # m is rounded between them
    for a, b in zip(last, state, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


OFFSETS = [(0, 0, 1, 64, 129, 129, 400, 464, 500), (0, 500), (0, 63, 63), (*range(0, 41), 300)]


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("offsets", OFFSETS, ids=["several", "one", "empty last", "many of one token"])
def test_packed(offsets, state):
    inputs, dh = draw(1, offsets[-1], 28)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=CUDA)
    states = draw_state(len(offsets) - 1, 28) if state else None
    assert_errors(inputs, dh, [2**-7] * 4 + [2e-2] * 2, cu_seqlens=cu_seqlens, initial_state=states)
    options = {"cu_seqlens": cu_seqlens, "return_final_state": True}
    with torch.no_grad():
        h, last = ops.mlstm(*inputs, initial_state=states, **options)
        for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
            own = None if states is None else tuple(t[s : s + 1] for t in states)
            if start == stop:
                for x, t in enumerate(last):
                    assert torch.equal(t[s], torch.zeros_like(t[s]) if own is None else own[x][0])
                continue
            alone, end = ops.mlstm(*(t[:, start:stop] for t in inputs), initial_state=own, return_final_state=True)
            assert torch.allclose(h[:, start:stop], alone, rtol=2**-7, atol=2**-7)
            assert all(torch.allclose(t[s], e[0], rtol=1e-4, atol=1e-5) for t, e in zip(last, end, strict=True))


def test_a_packed_neighbour_that_is_not_finite():
    inputs, _ = draw(1, 300, 28)
    cu_seqlens = torch.tensor([0, 70, 150, 300], dtype=torch.int32, device=CUDA)
    with torch.no_grad():
        clean = ops.mlstm(*inputs, cu_seqlens=cu_seqlens)
        for t in inputs[:3]:
            t[:, 70:150] = torch.nan
        dirty = ops.mlstm(*inputs, cu_seqlens=cu_seqlens)
    assert close(dirty[:, :70], clean[:, :70]) and close(dirty[:, 150:], clean[:, 150:])
    assert dirty[:, 70:150].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("token", [0, 63, 64, 100, 299])
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_not_finite_reaches_only_what_depends_on_it(which, token, bad):
    inputs, _ = draw(7, 300, 4)
    row, head, column = 3, 1, 77
    with torch.no_grad():
        clean = ops.mlstm(*inputs)
        inputs[which][row, token, head, column] = bad
        dirty = ops.mlstm(*inputs)
    h, h_clean = dirty[row, :, head], clean[row, :, head]
    others = torch.ones(7, 4, dtype=torch.bool)
    others[row, head] = False
    assert torch.equal(dirty.transpose(1, 2)[others], clean.transpose(1, 2)[others])
    assert close(h[:token], h_clean[:token])
    assert not h[token].isfinite().all()
    if which == 0:
        assert close(h[token + 1 :], h_clean[token + 1 :])
    if which == 1:
        assert not h[token:].isfinite().any()
    if which == 2:
        rest = torch.arange(DV) != column
        assert close(h[:, rest], h_clean[:, rest])
        assert not h[token:, column].isfinite().any()


def test_garbage_under_padding_stays_there():
    inputs, _ = draw(7, 300, 4)
    hole = torch.arange(300, device=CUDA) % 5 == 2
    inputs[3][:, hole], inputs[4][:, hole] = -torch.inf, torch.inf
    with torch.no_grad():
        expected, state = ops.mlstm(*inputs, return_final_state=True)
        inputs[1][:, hole], inputs[2][:, hole] = torch.nan, torch.inf
        actual, garbage_state = ops.mlstm(*inputs, return_final_state=True)
    assert close(actual[:, ~hole], expected[:, ~hole])
    assert all(map(close, state, garbage_state))


def test_nothing_but_padding():
    inputs, _ = draw(7, 150, 4)
    inputs[3].fill_(-torch.inf), inputs[4].fill_(torch.inf)
    state = draw_state(7, 4)
    with torch.no_grad():
        h, last = ops.mlstm(*inputs, return_final_state=True)
        assert not h.any() and not any(t.any() for t in last)
        _, last = ops.mlstm(*inputs, initial_state=state, return_final_state=True)
    assert all(map(torch.equal, last, state))


@pytest.mark.parametrize("name", ["q", "k", "v", "i", "f"])
def test_causal(name):
    inputs, _ = draw(7, 200, 4)
    state = draw_state(7, 4)
    with torch.no_grad():
        clean = ops.mlstm(*inputs, initial_state=state)
        inputs["qkvif".index(name)][:, 101:] = torch.nan
        h = ops.mlstm(*inputs, initial_state=state)
    assert close(h[:, :101], clean[:, :101])
    assert h[:, 101].isnan().any()


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_wider(t):
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def shared_by_heads(t):  # copied: the TMA does not map it
    return t[:, :, :1].expand(t.shape)


def misaligned(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("layout", [heads_first, part_of_wider, shared_by_heads, misaligned])
def test_layouts(layout):
    inputs, _ = draw(7, 150, 4)
    given = [layout(t) for t in inputs[:3]] + [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs[3:]]
    dense = [t.contiguous().clone() for t in given]
    with torch.no_grad():
        assert torch.equal(ops.mlstm(*given), ops.mlstm(*dense))
        if torch.cuda.get_device_capability() == (9, 0):
            assert is_fused(lambda: ops.mlstm(*given))


def test_poisoned_memory_and_repeats():
    calls = [draw(7, 333, 4)[0], draw(14, 100, 4)[0]]
    with torch.no_grad():
        expected = [ops.mlstm(*inputs) for inputs in calls]
        for _ in range(5):
            poison = torch.full((1 << 27,), torch.nan, device=CUDA)
            del poison
            for inputs, h in zip(calls, expected, strict=True):
                assert torch.equal(ops.mlstm(*inputs), h)


def test_streams_side_by_side():
    # Two grids of clusters, each as large as the device: they wait for room, not for each other.
    calls = [draw(14, 300, 4, seed=seed)[0] for seed in (1, 2)]
    with torch.no_grad():
        expected = [ops.mlstm(*inputs) for inputs in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        for _ in range(10):
            actual = []
            for stream, inputs in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    actual.append(ops.mlstm(*inputs))
            torch.cuda.synchronize()
            assert all(map(torch.equal, actual, expected))


def test_no_synchronization_and_graph_capture():
    inputs, _ = draw(7, 200, 4)
    with torch.no_grad():
        expected = ops.mlstm(*inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.mlstm(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        static = [t.clone() for t in inputs]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            ops.mlstm(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = ops.mlstm(*static)
        for t in static:
            t.zero_()
        for t, value in zip(static, inputs, strict=True):
            t.copy_(value)
        graph.replay()
    assert torch.equal(h, expected)


@needs_hopper
def test_launches():
    inputs, dh = draw(7, 300, 4)
    leaves = [t.requires_grad_() for t in inputs]
    ops.mlstm(*leaves)
    forward = launches(lambda: ops.mlstm(*leaves))
    h = ops.mlstm(*leaves)
    backward = launches(lambda: torch.autograd.grad(h, leaves, dh))
    assert len(forward) == 2 and sum("mlstm_fused" in name for name in forward) == 1, forward
    assert len(backward) == 5 and not any("mlstm_fused" in name for name in backward), backward


@needs_hopper
@pytest.mark.parametrize(("batch", "heads"), [(64, 8), (7, 4), (256, 1)])
def test_many_sequences_and_heads_take_it(batch, heads):
    inputs, _ = draw(batch, 64, heads)
    assert is_fused(lambda: ops.mlstm(*inputs))


@needs_hopper
def test_others_do_not_take_it():
    few, _ = draw(1, 300, 8)
    assert not is_fused(lambda: ops.mlstm(*few))
    many, _ = draw(7, 100, 4)
    half = [t.half() for t in many[:3]] + many[3:]
    assert not is_fused(lambda: ops.mlstm(*half))
    small = [many[0][..., :128], many[1][..., :128], *many[2:]]
    assert not is_fused(lambda: ops.mlstm(*small))
    assert not is_fused(lambda: ops.mlstm_state(*many[1:]))
    # Packed, one sequence may have nearly all tokens: the heads have to suffice.
    packed, _ = draw(1, 300, 8)
    cu_seqlens = torch.arange(0, 301, 10, dtype=torch.int32, device=CUDA)
    assert not is_fused(lambda: ops.mlstm(*packed, cu_seqlens=cu_seqlens))
