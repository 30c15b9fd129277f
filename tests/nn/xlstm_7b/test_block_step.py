"""A block's step in one call against the step by separate ops."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from flash_xlstm.nn import FeedForward, mLSTMBlock, mLSTMLayer
from flash_xlstm.nn.xlstm_7b import block as block_module


def make_block(dtype=torch.float32, weight_mode="fused", use_bias=False, **options):
    torch.manual_seed(0)
    layer = mLSTMLayer(72, 2, qk_dim=36, v_dim=80, weight_mode=weight_mode, use_bias=use_bias, **options)
    ffn = FeedForward(72, 104, weight_mode=weight_mode, use_bias=use_bias)
    block = mLSTMBlock(72, layer, ffn, use_bias=use_bias).to(dtype)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return block


def make_state(slots, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(slots, 2, 18, 40).to(dtype), torch.randn(slots, 2, 18), torch.randn(slots, 2)


def tokens(rows, dtype):
    return torch.randn(rows, 1, 72, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    """The result of the one call, None where it is not supported."""
    made, original = [], block_module.block_step
    monkeypatch.setattr(block_module, "block_step", lambda *args: made.append(original(*args)) or made[-1])
    return made


def by_parts(block, *args):
    handle = block.ffn.register_forward_hook(lambda *args: None)
    try:
        return block(*args)
    finally:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_is_exactly_what_the_parts_give(calls, dtype, weight_mode, rows):
    block, slots = make_block(dtype, weight_mode), torch.tensor([2, -1, 4, 0][:rows], dtype=torch.int32)
    for state_dtype in (torch.float32, torch.bfloat16):
        for indices, count in ((None, rows), (slots, 5)):
            states = [make_state(count, state_dtype) for _ in range(2)]
            for x in (tokens(rows, dtype), tokens(2 * rows, dtype)[::2]):
                expected, state = by_parts(block, x, states[0], None, True, True, indices)
                actual, ours = block(x, states[1], None, True, True, indices)
                assert torch.equal(actual, expected) and actual.isfinite().all()
                assert ours[0] is states[1][0] and all(map(torch.equal, ours, state))
    assert [made is None for made in calls] == [True, False] * 8


@torch.no_grad()
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_slots_a_stride_apart(calls, page_pool, device, state_dtype):
    block, rows = make_block(torch.bfloat16).to(device), torch.tensor([2, -1, 4], dtype=torch.int32, device=device)
    paged, memory = page_pool(device, 5, 2, 18, 40, state_dtype)
    whole, x = tuple(t.to(device) for t in make_state(5, state_dtype)), tokens(3, torch.bfloat16).to(device)
    for t, own in zip(paged, whole, strict=True):
        t[[2, 4]] = own[[2, 4]]
    expected, _ = block(x, whole, None, True, True, rows)
    actual, _ = block(x, paged, None, True, True, rows)
    assert [made is None for made in calls] == [False, False]
    assert torch.equal(actual, expected)
    for t, own in zip(paged, whole, strict=True):
        assert torch.equal(t[[2, 4]], own[[2, 4]]) and t[[0, 1, 3]].isnan().all()
    start = memory.clone()
    by_parts(block, x, paged, None, True, True, rows)  # the layer does not copy the pool either
    assert not torch.equal(memory, start) and all(t[[0, 1, 3]].isnan().all() for t in paged)


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16])
def test_on_cuda_is_as_exact_as_the_parts(calls, weight_mode, rows, state_dtype):
    block = make_block(torch.bfloat16, weight_mode).cuda()
    exact = make_block(torch.float64, weight_mode, step_kernel="reference", kernel="recurrent")
    exact.load_state_dict({name: t.cpu().double() for name, t in block.state_dict().items()})
    slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(3))[:rows].int()
    for indices in (None, slots):
        x, count = tokens(rows, torch.bfloat16), rows if indices is None else rows + 3
        states = [tuple(t.cuda() for t in make_state(count, state_dtype)) for _ in range(2)]
        on_gpu = None if indices is None else indices.cuda()
        parts, parts_state = by_parts(block, x.cuda(), states[0], None, True, True, on_gpu)
        ours, our_state = block(x.cuda(), states[1], None, True, True, on_gpu)
        wide = [t.double() for t in make_state(count, state_dtype)]
        expected, state = exact(x.double(), tuple(wide), None, True, True, indices)

        def error(actual, wanted):
            return ((actual.cpu().double() - wanted).norm() / wanted.norm()).item()

        each = zip((ours, *our_state), (parts, *parts_state), (expected, *state), strict=True)
        for ours_part, parts_part, wanted in each:
            assert error(ours_part, wanted) <= 1.2 * error(parts_part, wanted) + 2e-3
    assert [made is None for made in calls] == [True, False, True] * 2  # the parts, the call, float64


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 16])
def test_on_cuda_steps_may_follow_at_once(rows):
    # The step reads the state while the previous product runs. The last step, eight launches earlier, has written it.
    block = make_block(torch.bfloat16).cuda()
    x = tokens(rows, torch.bfloat16).cuda()
    apart, together = (tuple(t.cuda() for t in make_state(rows)) for _ in range(2))
    expected = x
    for _ in range(50):
        expected, _ = block(expected, apart, None, True, True)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = x
        for _ in range(50):
            actual, _ = block(actual, together, None, True, True)
    graph.replay()
    assert torch.equal(actual, expected) and actual.isfinite().all() and all(map(torch.equal, together, apart))


@torch.no_grad()
@pytest.mark.cuda
def test_on_cuda_goes_by_parts_where_the_products_do_not_serve(calls):
    for block in (make_block(torch.float32), make_block(torch.float16)):
        dtype = next(block.parameters()).dtype
        block.cuda()(tokens(2, dtype).cuda(), tuple(t.cuda() for t in make_state(2)), None, True, True)
    block = make_block(torch.bfloat16).cuda()
    block(tokens(17, torch.bfloat16).cuda(), tuple(t.cuda() for t in make_state(17)), None, True, True)
    assert calls == [None] * 3


@torch.no_grad()
def test_everything_else_goes_by_parts(calls):
    x, state = tokens(2, torch.float32), make_state(2)

    def run(block, x=x, state=state, padding=None):
        return block(x, state, padding, True, True)[0]

    run(make_block(use_bias=True))
    run(make_block(step_kernel="reference"))
    run(make_block(), tokens(5, torch.float32), make_state(5))
    run(make_block(), state=make_state(2, torch.float16))
    run(make_block(), state=tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in state))
    run(make_block(torch.float64, step_kernel="reference", kernel="recurrent"), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        run(make_block())
    hooked = make_block()
    hooked.mlstm_layer.out_proj.register_forward_hook(lambda module, args, y: 0 * y)
    assert torch.equal(run(hooked), run(hooked))
    other = make_block()
    other.ffn.proj_down = torch.nn.Sequential(other.ffn.proj_down)
    run(other)
    replaced = make_block()
    replaced.ffn.forward = torch.zeros_like
    run(replaced)
    run(make_block(), torch.cat([x, x], 1))
    run(make_block(), padding=torch.zeros(2, 1, dtype=torch.bool))
    assert calls == [None] * len(calls)


def more(out):
    if isinstance(out, tuple):
        return more(out[0]), *out[1:]
    return out + torch.linspace(1, 2, out.shape[-1])


def replace_forward(part):
    forward = part.forward
    part.forward = lambda *args, **options: more(forward(*args, **options))


def add_accelerate_hook(part):
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    hook = hooks.ModelHook()
    hook.post_forward = lambda module, out: more(out)
    hooks.add_hook_to_module(part, hook)


def add_hook(part):
    part.register_forward_hook(lambda module, args, options, out: more(out), with_kwargs=True, always_call=True)


def hook_all(part):
    return register_module_forward_hook(lambda module, args, out: more(out) if module is part else out)


def replace_forward_of_the_class(part):
    forward = type(part).forward
    changed = lambda self, *args, **options: more(forward(self, *args, **options))  # noqa: E731
    return mock.patch.object(type(part), "forward", changed)


PARTS = [name for name, _ in make_block(weight_mode="single").named_modules() if name]


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [replace_forward, add_accelerate_hook, add_hook, hook_all, replace_forward_of_the_class]
)
def test_what_changes_a_part_is_seen(calls, change):
    x = tokens(2, torch.float32)
    before, _ = make_block(weight_mode="single")(x, make_state(2), None, True, True)
    assert calls.pop() is not None
    for name in PARTS:
        block = make_block(weight_mode="single")
        with change(block.get_submodule(name)) or contextlib.nullcontext() as handle:
            after, _ = block(x, make_state(2), None, True, True)
            if handle is not None and hasattr(handle, "remove"):
                handle.remove()
        assert calls.pop() is None and (after - before).norm() > 1e-3 * before.norm(), name


@torch.no_grad()
def test_counters_of_operations_see_the_products(calls):
    block, rows = make_block(), 2
    with FlopCounterMode(display=False) as counter:
        block(tokens(rows, torch.float32), make_state(rows), None, True, True)
    assert calls == [None]
    products = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    c = make_state(rows)[0]
    assert counter.get_total_flops() == 2 * rows * products + 4 * c.numel()
    with mock.patch("flash_xlstm.nn.linear.nothing_looks_on", return_value=True), FlopCounterMode(display=False) as one:
        block(tokens(rows, torch.float32), make_state(rows), None, True, True)
    assert [*one.get_flop_counts()["Global"].values()] == [counter.get_total_flops()]


@torch.no_grad()
def test_weights_and_states_of_another_kind_go_by_parts(calls):
    x = tokens(2, torch.float32)
    expected, _ = make_block()(x, make_state(2), None, True, True)
    assert calls.pop() is not None
    other = make_block()
    other.ffn.proj_down.weight = torch.nn.Parameter(other.ffn.proj_down.weight.t().contiguous().t())
    c, n, m = make_state(2)
    for block, state in ((other, (c.clone(), n, m)), (make_block(), (c, n.double(), m.double()))):
        assert torch.allclose(block(x, state, None, True, True)[0], expected, rtol=1e-4, atol=1e-4)
        assert calls.pop() is None
    assert make_block()(x[:0], make_state(0), None, True, True)[0].shape == (0, 1, 72)


@torch.no_grad()
def test_says_what_does_not_fit():
    block, x, (c, n, m) = make_block(), tokens(2, torch.float32), make_state(2)
    with pytest.raises(ValueError, match=r"^state n has shape"):
        block(x, (c, n[:, :1], m), None, True, True)
    with pytest.raises(ValueError, match=r"^state c has shape"):
        block(x, (c[:1], n, m), None, True, True)
    block.ffn.proj_down.weight = torch.nn.Parameter(torch.zeros(71, 104))
    with pytest.raises(ValueError, match=r"^down has shape \(71, 104\)"):
        block(x, (c, n, m), None, True, True)
    assert all(map(torch.equal, (c, n, m), make_state(2)))  # untouched


@torch.no_grad()
def test_opcheck():
    for weight_mode in ("single", "fused"):
        block = make_block(weight_mode=weight_mode)
        layer, ffn = block.mlstm_layer, block.ffn
        weights = lambda parts: [part.weight for part in parts]  # noqa: E731
        gates = layer.projections("ifgate_preact")
        made = (
            tokens(2, torch.float32), *make_state(2), None, block.norm_mlstm.weight,
            weights(layer.projections("qkv_opreact")), weights(gates), [part.bias for part in gates],
            layer.multihead_norm.weight, layer.out_proj.weight, block.norm_ffn.weight,
            weights(ffn.projections("proj_up_gate_z")), ffn.proj_down.weight, 1e-6, 1e-6, 1e-6, 1e-6, 15.0,
        )  # fmt: skip
        detached = [[t.detach() for t in x] if isinstance(x, list) else x for x in made]
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in detached]
        torch.library.opcheck(torch.ops.flash_xlstm.mlstm_block_step, tuple(detached))
