"""Models under torch.func's transforms: gradients of each row, ensembles, and forward mode, which is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from flash_xlstm.nn import block_stack


@pytest.fixture
def stack_lm():
    torch.manual_seed(0)
    config = block_stack.xLSTMLMModelConfig(
        mlstm_block=block_stack.mLSTMBlockConfig(mlstm=block_stack.mLSTMLayerConfig(num_heads=2)),
        slstm_block=block_stack.sLSTMBlockConfig(slstm=block_stack.sLSTMLayerConfig(num_heads=2)),
        num_blocks=2, embedding_dim=16, slstm_at=[1], context_length=8, vocab_size=61,
    )  # fmt: skip
    model = block_stack.xLSTMLMModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(params=["single", "fused", "block stack"])
def case(request, make_ours):
    """A model, and its loss of parameters, a row and the row's padding."""
    if request.param == "block stack":
        model = request.getfixturevalue("stack_lm")

        def loss(parameters, row, padding):
            logits = functional_call(model, parameters, (row[None],), {"padding": padding[None]})
            return F.cross_entropy(logits[0], row, reduction="none").masked_fill(padding, 0.0).sum()

        return model, loss
    model = make_ours(weight_mode=request.param, hidden_size=32, num_heads=1).train()

    def loss_of_labels(parameters, row, padding):
        given = {"attention_mask": (~padding[None]).long(), "labels": row[None]}
        return functional_call(model, parameters, (row[None],), given).loss

    return model, loss_of_labels


def test_gradients_of_each_row(case, tokens, rel):
    model, loss = case
    ids, padding = tokens(3, 9), torch.arange(9) < torch.tensor([[0], [3], [5]])
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    every = vmap(grad(loss), (None, 0, 0))(parameters, ids, padding)
    for n in range(3):
        model.zero_grad()
        loss(dict(model.named_parameters()), ids[n], padding[n]).backward()
        one = grad(loss)(parameters, ids[n], padding[n])
        floor = 1e-6 * float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
        for name, p in model.named_parameters():
            assert (every[name][n] - p.grad).norm() < 1e-4 * p.grad.norm() + floor, name
            assert (one[name] - p.grad).norm() < 1e-4 * p.grad.norm() + floor, name


def test_padding_between_tokens_is_refused(stack_lm, tokens):
    padding = torch.tensor([[False] * 5, [False, True, False, False, False]])
    with pytest.raises(ValueError, match="padding must be on the left and on the right"):
        vmap(lambda row, padding: stack_lm(row[None], padding=padding[None]))(tokens(2, 5), padding)


def test_an_ensemble(stack_lm, tokens, rel):
    models = [copy.deepcopy(stack_lm) for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(0.7)
    parameters, buffers = stack_module_state(models)
    ids = tokens(2, 9)
    logits = vmap(lambda p, b: functional_call(stack_lm, (p, b), (ids,)))(parameters, buffers)
    for n, model in enumerate(models):
        assert rel(logits[n], model(ids)) < 1e-5


def test_forward_mode_is_refused(case, tokens):
    model, loss = case
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    row, padding = tokens(1, 5)[0], torch.zeros(5).bool()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            jvp(lambda p: loss(p, row, padding), (parameters,), (parameters,))
