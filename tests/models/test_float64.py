"""Models in float64. The compiled ops do not support it, so that layers take the plain PyTorch forms."""

from __future__ import annotations

import copy

import pytest
import torch


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_forward_backward_and_steps(make_ours, tokens, rel, weight_mode):
    narrow = make_ours(weight_mode=weight_mode)
    wide = copy.deepcopy(narrow).double()
    ids = tokens(2, 9)
    losses = [model(ids, labels=ids).loss for model in (narrow, wide)]
    assert rel(losses[0], losses[1]) < 1e-5
    losses[1].backward()
    assert all(p.grad.isfinite().all() for p in wide.parameters())
    with torch.no_grad():
        whole = wide(ids).logits
        assert whole.dtype == torch.float64
        out = wide(ids[:, :5], use_cache=True)
        for t in range(5, 9):
            out = wide(ids[:, t : t + 1], cache_params=out.cache_params)
            assert rel(out.logits, whole[:, t : t + 1]) < 1e-5
        made = wide.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(made, narrow.generate(ids, max_new_tokens=4, do_sample=False))
