"""States between the pieces of long sequences: cut from their history, and rows of them begun anew."""

from __future__ import annotations

import pytest
import torch

from flash_xlstm.nn import block_stack, detach_state, reset_rows


@pytest.fixture
def stack():
    torch.manual_seed(0)
    config = block_stack.xLSTMBlockStackConfig(
        mlstm_block=block_stack.mLSTMBlockConfig(mlstm=block_stack.mLSTMLayerConfig(num_heads=2)),
        slstm_block=block_stack.sLSTMBlockConfig(slstm=block_stack.sLSTMLayerConfig(num_heads=2)),
        num_blocks=2, embedding_dim=16, slstm_at=[1], context_length=8,
    )  # fmt: skip
    stack = block_stack.xLSTMBlockStack(config)
    for p in stack.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return stack


def tensors(state):
    return [t for block in state.values() for part in block.values()
            for t in (part if isinstance(part, tuple) else [part])]  # fmt: skip


def gradients(stack, run):
    stack.zero_grad()
    run()
    return torch.cat([p.grad.flatten() for p in stack.parameters()])


def test_truncated_backpropagation(stack):
    """The gradient of two pieces, and that of the same pieces with the state between them as plain numbers."""
    x = torch.randn(3, 2, 5, 16)

    def pieces(cut):
        def run():
            y, state = stack(x[0], return_last_state=True)
            y.square().mean().backward(retain_graph=True)
            stack(x[1], cut(state))[:, -1].square().mean().backward()

        return gradients(stack, run)

    expected = pieces(lambda state: {
        name: {key: tuple(t.data.clone() for t in part) if isinstance(part, tuple) else part.data.clone()
               for key, part in block.items()} for name, block in state.items()
    })  # fmt: skip
    assert torch.equal(pieces(detach_state), expected)
    assert not torch.allclose(pieces(lambda state: state), expected)


@pytest.mark.parametrize("rows", [[1], torch.tensor([False, True, False])], ids=["numbers", "bools"])
def test_reset_rows(stack, rows):
    x, more = torch.randn(3, 4, 16), torch.randn(3, 5, 16)
    _, state = stack(x, return_last_state=True)
    given = [t.clone() for t in tensors(state)]
    tensors(state)[0].retain_grad()
    after = reset_rows(state, rows)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), given, strict=True))
    y = stack(more, after)
    assert torch.allclose(y[1], stack(more[1:2])[0], atol=1e-6)
    assert torch.allclose(y[[0, 2]], stack(more, state)[[0, 2]], atol=1e-6)
    y.sum().backward()
    gradient = tensors(state)[0].grad
    assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="rows holds 3; they must be from 0 to 2"):
        reset_rows({"a": (torch.zeros(3, 2), None)}, [3])
    with pytest.raises(TypeError, match="state is a dict without tensors"):
        reset_rows({}, [0])
