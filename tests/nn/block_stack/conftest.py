"""Small configurations, and models with no parameter left at zero."""

from __future__ import annotations

import pytest
import torch

from flash_xlstm.nn import block_stack


def _config(package=block_stack, *, slstm=None, mlstm=None, feedforward=None, **stack):
    """The same configuration of a language model, of this package or of NX-AI's."""
    options = {
        "vocab_size": 23, "num_blocks": 3, "embedding_dim": 32, "slstm_at": [1], "context_length": 24, **stack,
    }  # fmt: skip
    return package.xLSTMLMModelConfig(
        mlstm_block=package.mLSTMBlockConfig(
            mlstm=package.mLSTMLayerConfig(**{"num_heads": 2, "round_proj_up_to_multiple_of": 8, **(mlstm or {})})
        ),
        slstm_block=package.sLSTMBlockConfig(
            slstm=package.sLSTMLayerConfig(**{"num_heads": 2, "backend": "vanilla", **(slstm or {})}),
            feedforward=package.FeedForwardConfig(**{"round_proj_up_to_multiple_of": 8, **(feedforward or {})}),
        ),
        **options,
    )


def _randomize(model, seed=0):
    """Random normal values in place of zero or constant ones, so that every parameter matters."""
    torch.manual_seed(seed)
    model.reset_parameters()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.reset_parameters()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "_recurrent_kernel_" in name:
                p.normal_(std=0.4)
            elif p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
            elif "igate" in name or "fgate" in name:
                p.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def make_config():
    return _config


@pytest.fixture(scope="session")
def randomize():
    return _randomize


@pytest.fixture
def ids():
    return torch.randint(23, (3, 19), generator=torch.Generator().manual_seed(1))


def _rel(actual, expected):
    expected = expected.detach().double().cpu()
    return float((actual.detach().double().cpu() - expected).norm() / expected.norm().clamp_min(1e-300))


@pytest.fixture(scope="session")
def rel():
    return _rel


@pytest.fixture(scope="session")
def check():
    """That logits and gradients by name are as near to float64 as those of separate rows are, to a factor of 3."""

    def run(actual, separate, exact):
        assert _rel(actual[0], exact[0]) < 3 * _rel(separate[0], exact[0]) + 1e-6
        floor = 1e-7 * float(torch.stack([g.norm() for g in exact[1].values()]).norm())
        for name, wanted in exact[1].items():
            error, usual = (float((run[1][name].cpu().double() - wanted).norm()) for run in (actual, separate))
            assert error < 3 * usual + floor, name

    return run


@pytest.fixture
def make():
    return lambda **options: _randomize(block_stack.xLSTMLMModel(_config(**options)))
