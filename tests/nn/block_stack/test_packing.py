"""Packed sequences through the blocks: each comes out as in a row of its own, convolutions included."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F

LENGTHS = (5, 1, 70, 1, 2, 3, 23)


def offsets(*lengths, dtype=torch.int32):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def tokens(count, seed=0):
    return torch.randint(23, (1, count), generator=torch.Generator().manual_seed(seed))


def gradients(model, logits, ids):
    model.zero_grad()
    F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def alone(model, ids, lengths):
    logits = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
    return logits, gradients(model, logits, ids)


def together(model, ids, lengths):
    logits = model(ids, cu_seqlens=offsets(*lengths).to(ids.device))
    return logits, gradients(model, logits, ids)


def kernel_size(size):
    return {"mlstm": {"conv1d_kernel_size": size}, "slstm": {"conv1d_kernel_size": size}}


@pytest.mark.parametrize("size", [0, 1, 4, 9])  # 9 is beyond the op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_sequences_come_out_as_alone(make, size, dtype, device, check):
    model = make(**kernel_size(size))
    ids = tokens(sum(LENGTHS))
    exact = alone(copy.deepcopy(model).double(), ids, LENGTHS)
    model, ids = model.to(device, dtype), ids.to(device)
    check(together(model, ids, LENGTHS), alone(model, ids, LENGTHS), exact)


@pytest.mark.parametrize("seed", range(4))
def test_random_lengths(make, seed, device, check):
    draw = random.Random(seed)
    lengths = [draw.choice([1, 2, 3, draw.randint(1, 40)]) for _ in range(draw.randint(1, 9))]
    model, ids = make(), tokens(sum(lengths), seed)
    exact = alone(copy.deepcopy(model).double(), ids, lengths)
    model, ids = model.to(device), ids.to(device)
    check(together(model, ids, lengths), alone(model, ids, lengths), exact)


def test_bfloat16(make, device, check):
    model, ids = make().bfloat16(), tokens(sum(LENGTHS))
    exact = alone(copy.deepcopy(model).double(), ids, LENGTHS)
    model, ids = model.to(device), ids.to(device)
    check(together(model, ids, LENGTHS), alone(model, ids, LENGTHS), exact)


def flat(state):
    return [t for block in state.values() for part in block.values() if part is not None
            for t in (part if isinstance(part, tuple) else [part])]  # fmt: skip


@pytest.mark.parametrize("changed", [False, True], ids=["", "convolution with a hook"])
@pytest.mark.parametrize("size", [1, 4])
def test_states_are_of_sequences(make, size, changed, rel):
    """Sequences in two parts, the second from the states behind the first; one has no token in it."""
    model = make(**kernel_size(size))
    if changed:
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.register_forward_hook(lambda module, args, y: 1.25 * y)
    first, second = (4, 1, 6), (2, 0, 5)
    a, b = tokens(sum(first)), tokens(sum(second), seed=1)
    with torch.no_grad():
        _, state = model(a, return_last_state=True, cu_seqlens=offsets(*first))
        logits, after = model(b, state, return_last_state=True, cu_seqlens=offsets(*second))
        parts, states = [], []
        for x, y in zip(a.split(first, 1), b.split(second, 1), strict=True):
            whole, last = model(torch.cat([x, y], 1), return_last_state=True)
            parts.append(whole[:, x.shape[1] :])
            states.append(flat(last))
    assert rel(logits, torch.cat(parts, 1)) < 1e-6
    for packed, separate in zip(flat(after), zip(*states, strict=True), strict=True):
        assert rel(packed, torch.cat(separate)) < 5e-6


def test_a_changed_convolution_does_not_look_over_a_boundary(make, check):
    model, ids = make(), tokens(sum(LENGTHS))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(lambda module, args, y: y + y.square())
    exact = alone(model.double(), ids, LENGTHS)
    check(together(model, ids, LENGTHS), exact, exact)


@pytest.mark.slow
def test_compiles_whole(make, rel):
    model = make(num_blocks=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 1, 7], [5, 5], [1, 2, 3, 4]):
        ids = tokens(sum(lengths))
        expected = together(model, ids, lengths)
        actual = together(compiled, ids, lengths)
        assert rel(actual[0], expected[0]) < 1e-6
    with pytest.raises(RuntimeError, match="cu_seqlens must begin with 0"):
        compiled(ids, cu_seqlens=offsets(1, 2, 3))


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "error", "message"),
    [
        (tokens(6), offsets(3, 2), ValueError, "cu_seqlens must begin with 0, .* number of tokens, 6"),
        (tokens(6), torch.tensor([1, 6], dtype=torch.int32), ValueError, "cu_seqlens must begin with 0"),
        (tokens(6), torch.tensor([0, 4, 3, 6], dtype=torch.int32), ValueError, "never decrease"),
        (tokens(6).view(2, 3), offsets(3, 3), ValueError, "x has batch 2; with cu_seqlens it must be 1"),
        (tokens(6), offsets(6)[None], ValueError, r"cu_seqlens has shape \(1, 2\)"),
        (tokens(6), [0, 6], TypeError, "cu_seqlens is a list"),
        (tokens(6), offsets(6).float(), TypeError, "cu_seqlens has dtype float32"),
        (tokens(6), offsets(6).long(), TypeError, "cu_seqlens has dtype int64"),
    ],
)
def test_wrong_offsets_are_refused(make, ids, cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        make()(ids, cu_seqlens=cu_seqlens)


@torch.no_grad()
def test_a_step_takes_no_offsets(make):
    model = make()
    for part, x in (
        (model, tokens(1)),
        (model.xlstm_block_stack, torch.zeros(1, 1, 32)),
        *((block.xlstm, torch.zeros(1, 1, 32)) for block in model.xlstm_block_stack.blocks),
    ):
        with pytest.raises(ValueError, match="cu_seqlens is given, but a step takes"):
            part(x, inplace=True, cu_seqlens=offsets(1))


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu(make):
    model, ids, bounds = make().cuda(), tokens(sum(LENGTHS)).cuda(), offsets(*LENGTHS).cuda()
    model(ids, cu_seqlens=bounds).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, cu_seqlens=bounds).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
