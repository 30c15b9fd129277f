"""Padding through the blocks: each row comes out as without it, convolutions included."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F

LENGTHS, SEQ = (5, 1, 12, 2, 3, 0), 12


def tokens(length, seed=0):
    return torch.randint(23, (length,), generator=torch.Generator().manual_seed(seed))


def padded(rows, side, seq=SEQ):
    """ids (batch, seq) with other tokens at padding, and the padding."""
    ids, padding = torch.stack([tokens(seq, 100 + n) for n in range(len(rows))]), torch.ones(len(rows), seq).bool()
    draw = random.Random(0)
    for n, row in enumerate(rows):
        free = seq - len(row)
        start = {"left": free, "right": 0, "both": draw.randint(0, free)}[side]
        ids[n, start : start + len(row)] = row
        padding[n, start : start + len(row)] = False
    return ids, padding


def gradients(model, logits, rows):
    model.zero_grad()
    F.cross_entropy(logits.float(), torch.cat(rows).to(logits.device)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def alone(model, rows):
    logits = torch.cat([model(row[None])[0] for row in rows if len(row)])
    return logits, gradients(model, logits, rows)


def together(model, rows, side, run=None):
    ids, padding = (t.to(rows[0].device) for t in padded(rows, side))
    logits = (model if run is None else run)(ids, padding=padding)
    assert logits.isfinite().all()
    return logits[~padding], gradients(model, logits[~padding], rows)


@pytest.fixture
def rows():
    return [tokens(length, seed) for seed, length in enumerate(LENGTHS)]


def kernel_size(size):
    return {"mlstm": {"conv1d_kernel_size": size}, "slstm": {"conv1d_kernel_size": size}}


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("size", [0, 1, 4, 9])  # 9 is beyond the op
def test_rows_come_out_as_alone(make, rows, side, size, device, check):
    model = make(**kernel_size(size))
    exact = alone(copy.deepcopy(model).double(), rows)
    check(together(copy.deepcopy(model).double(), rows, side), exact, exact)
    model, rows = model.to(device), [row.to(device) for row in rows]
    check(together(model, rows, side), alone(model, rows), exact)


def test_bfloat16(make, rows, device, check):
    model = make().bfloat16()
    exact = alone(copy.deepcopy(model).double(), rows)
    model, rows = model.to(device), [row.to(device) for row in rows]
    check(together(model, rows, "both"), alone(model, rows), exact)


def flat(state):
    return [t for block in state.values() for part in block.values() if part is not None
            for t in (part if isinstance(part, tuple) else [part])]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("changed", [False, True], ids=["", "convolution with a hook"])
@pytest.mark.parametrize("size", [1, 4])
def test_states_pass_by_padding(make, rows, side, changed, size, rel):
    """Rows in two parts, the second from the states behind the first, then a token of some of the rows."""
    model = make(**kernel_size(size))
    if changed:
        for module in model.modules():
            if isinstance(module, torch.nn.Conv1d):
                module.register_forward_hook(lambda module, args, y: 1.25 * y)
    more = [tokens(length, 50 + length) for length in (4, 0, 1, 12, 2, 3)]
    (a, a_padding), (b, b_padding) = padded(rows, side), padded(more, side)
    last, last_padding = tokens(6, 7)[:, None], torch.tensor([0, 1, 0, 0, 1, 0]).bool()[:, None]
    with torch.no_grad():
        _, state = model(a, return_last_state=True, padding=a_padding)
        logits, after = model(b, state, return_last_state=True, padding=b_padding)
        given = [t.data_ptr() for t in flat(after)]
        token_logits, stepped = model.step(last, after, padding=last_padding)
        assert given == [t.data_ptr() for t in flat(stepped)]
        states = []
        for n in range(6):
            whole = torch.cat([rows[n], more[n], last[n][~last_padding[n]]])
            expected, end = model(whole[None], return_last_state=True)
            got = torch.cat([logits[n, ~b_padding[n]], token_logits[n][~last_padding[n]]])
            assert rel(got, expected[0, len(rows[n]) :]) < 2e-6
            states.append(flat(end))
    for together, separate in zip(flat(stepped), zip(*states, strict=True), strict=True):
        assert rel(together, torch.cat(separate)) < 5e-6


def test_a_step_with_gradients(make):
    model, ids, padding = make(), tokens(2)[:, None], torch.tensor([[True], [False]])
    _, before = model(tokens(6).view(2, 3), return_last_state=True)
    kept = [t.detach().clone() for t in flat(before)]
    _, after = model.step(ids, before, padding=padding)
    for old, same, new in zip(kept, flat(before), flat(after), strict=True):
        assert torch.equal(old, same) and torch.equal(old[0], new[0]) and not torch.equal(old[1], new[1])


def test_compiles_whole(make, rows, rel):
    model = make(num_blocks=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(together(model, rows, "both", compiled)[0], together(model, rows, "both")[0]) < 1e-6


BETWEEN = torch.tensor([[False, False, False], [False, True, False]])


@pytest.mark.parametrize(
    ("padding", "options", "error", "message"),
    [
        (BETWEEN, {}, ValueError, "padding must be on the left and on the right of a row's tokens, not between"),
        (BETWEEN.long(), {}, TypeError, "padding has dtype int64; it must be bool, True at padding"),
        (BETWEEN[:1], {}, ValueError, r"padding has shape \(1, 3\); it must be that of x, \(2, 3\)"),
        (BETWEEN.tolist(), {}, TypeError, "padding is a list; it must be a tensor"),
        (BETWEEN.to("meta"), {}, ValueError, "padding is on meta; it must be on the device of x, cpu"),
        (BETWEEN[:1].view(1, 3), {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError,
         "padding is given beside cu_seqlens"),
    ],
)  # fmt: skip
def test_wrong_padding_is_refused(make, padding, options, error, message):
    model, batch = make(), 1 if options else 2
    stack, x = model.xlstm_block_stack, torch.zeros(batch, 3, 32)
    parts = [(model, torch.zeros(batch, 3, dtype=torch.long)), (stack, x)]
    parts += [(part, x) for block in stack.blocks for part in (block, block.xlstm)]
    for part, given in parts:
        with pytest.raises(error, match=message):
            part(given, padding=padding, **options)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu(make, rows):
    model = make().cuda()
    ids, padding = (t.cuda() for t in padded(rows, "both"))
    model(ids, padding=padding).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, padding=padding, return_last_state=True)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
