"""Small random models, ours and transformers' own, with the same weights."""

from __future__ import annotations

import copy
import functools

import pytest

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402
from transformers import initialization  # noqa: E402
from transformers.models.xlstm import modeling_xlstm as stock  # noqa: E402

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM  # noqa: E402

# qk_dim is always a multiple of 64: transformers' cache does not fit other sizes.
TINY = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2, "chunk_size": 16}


def _randomize(model, seed: int) -> None:
    """Weights for which every parameter matters: gates depend on the input, norms and biases differ from their initial
    values."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float32)  # noqa: E731
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(noise(p) * 0.1 + (1.0 if name.endswith("weight") else 0.0))
            elif "gate_preact.bias" in name:
                p.copy_(noise(p) + (2.0 if "fgate" in name else -1.0))
            elif name.endswith("bias"):
                p.copy_(noise(p) * 0.1)
            else:
                p.copy_(noise(p) / p.shape[-1] ** 0.5)


@pytest.fixture
def make_ours():
    """``make_ours(seed=0, **config)``: our model with random weights, in eval mode."""

    def make(seed: int = 0, **config):
        model = xLSTMForCausalLM(xLSTMConfig(**{**TINY, **config}))
        mode = model.config.weight_mode
        model.set_weight_mode("single")  # the same weights in both modes
        _randomize(model, seed)
        model.set_weight_mode(mode)
        return model.eval()

    return make


@functools.cache
def _stock_runs() -> bool:
    """The first releases of transformers 5 fail on any sequence of at least one chunk."""
    config = transformers.models.xlstm.xLSTMConfig(**TINY)
    try:
        with torch.no_grad():
            stock.xLSTMModel(config)(torch.zeros(1, 16, dtype=torch.long), use_cache=False)
    except TypeError:
        return False
    return True


@pytest.fixture
def make_stock():
    """``make_stock(ours)``: transformers' model with our model's configuration and weights."""
    if not _stock_runs():
        pytest.skip(f"the xLSTM of transformers {transformers.__version__} does not run")

    def make(ours: xLSTMForCausalLM):
        values = {k: v for k, v in ours.config.to_dict().items() if k not in ("dtype", "architectures")}
        with initialization.no_init_weights():  # its own initialization fails for fused weights
            model = stock.xLSTMForCausalLM(transformers.models.xlstm.xLSTMConfig(**values))
        model.load_state_dict(ours.state_dict())
        return model.eval()

    return make


@pytest.fixture
def in_double():
    """``in_double(model)``: the same model on the CPU in float64, with the reference kernels."""

    def make(model: xLSTMForCausalLM):
        config = copy.deepcopy(model.config)
        config.chunkwise_kernel, config.step_kernel = "chunkwise--reference", "reference"
        double = type(model)(config).double().eval()
        double.load_state_dict(model.state_dict())
        return double

    return make


@pytest.fixture
def tokens():
    """``tokens(batch, seq, seed=0)``: random token ids that are no special tokens."""

    def make(batch: int, seq: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, TINY["vocab_size"], (batch, seq), generator=generator)

    return make


@pytest.fixture
def rel():
    """``rel(actual, expected)``: the relative error in the 2-norm."""

    def error(actual, expected) -> float:
        expected = expected.detach().double()
        return float((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))

    return error
