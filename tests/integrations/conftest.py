"""Models with random weights, and comparisons, for tests beside other libraries."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def randomize():
    """``randomize(module)``: random weights for all parameters. They are not zero, so that every one counts."""

    @torch.no_grad()
    def fill(module, seed=1):
        generator = torch.Generator().manual_seed(seed)
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 2 else p.shape[-1] ** -0.5))
        return module

    return fill


@pytest.fixture
def agree():
    """``agree(a, b, what)``: `a` is `b` within rounding, of the same shape and dtype."""

    def check(a, b, what="", bound=1e-5):
        assert a.shape == b.shape and a.dtype == b.dtype, (what, a.shape, b.shape, a.dtype, b.dtype)
        error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
        assert error <= bound, (what, error)

    return check
