"""The reference convolution against explicit sums."""

from __future__ import annotations

import pytest
import torch

from flash_xlstm import reference


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", range(1, 9))
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_definition_by_hand(kernel, activation):
    x, weight, bias, state = normal(2, 6, 3), normal(3, kernel, seed=1), normal(3, seed=2), normal(2, kernel - 1, 3)
    y = reference.causal_conv1d(x, weight, bias, activation=activation, initial_state=state)
    for t in range(6):
        want = bias.clone().expand(2, 3)
        for k in range(kernel):
            at = t - kernel + 1 + k
            want = want + weight[:, k] * (x[:, at] if at >= 0 else state[:, at + kernel - 1])
        if activation:
            want = want * torch.sigmoid(want)
        assert torch.allclose(y[:, t], want)


@pytest.mark.parametrize("kernel", [1, 4])
def test_continues_from_its_final_state(kernel):
    x, weight = normal(2, 9, 3), normal(3, kernel, seed=1)
    whole, last = reference.causal_conv1d(x, weight, return_final_state=True)
    parts, state = [], None
    for start, stop in ((0, 1), (1, 3), (3, 9)):
        y, state = reference.causal_conv1d(x[:, start:stop], weight, initial_state=state, return_final_state=True)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole) and torch.equal(state, last)


def test_packed_sequences_are_separate_calls():
    x, weight, state, offsets = normal(1, 9, 3), normal(3, 4, seed=1), normal(3, 3, 3, seed=2), [0, 2, 2, 9]
    y, last = reference.causal_conv1d(
        x, weight, initial_state=state, cu_seqlens=torch.tensor(offsets), return_final_state=True
    )
    for s in (0, 2):
        part = x[:, offsets[s] : offsets[s + 1]]
        alone, end = reference.causal_conv1d(part, weight, initial_state=state[s : s + 1], return_final_state=True)
        assert torch.equal(y[:, offsets[s] : offsets[s + 1]], alone) and torch.equal(last[s : s + 1], end)
    assert torch.equal(last[1], state[1])


def test_step_is_a_sequence_of_one():
    x, weight, bias, state = normal(2, 3), normal(3, 4, seed=1), normal(3, seed=2), normal(2, 3, 3, seed=3)
    want, last = reference.causal_conv1d(x[:, None], weight, bias, initial_state=state, return_final_state=True)
    assert torch.equal(reference.causal_conv1d_step(x, weight, bias, state), want[:, 0])
    assert torch.equal(state, last)
