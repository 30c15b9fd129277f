"""The block stack against NX-AI's package ``xlstm`` with plain PyTorch backends: outputs, gradients, steps, state
dicts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flash_xlstm.nn import block_stack

nxai = pytest.importorskip(
    "xlstm",
    reason="NX-AI's package is not installed: pip install --no-deps --target FOLDER xlstm, FOLDER on PYTHONPATH. (It "
    "is not in the test extra: where transformers finds it, its own xLSTM wants mlstm_kernels too.)",
)

CONFIGS = {
    "mixed": {},
    "deep": {"num_blocks": 4, "slstm_at": [0, 3], "tie_weights": True, "bias": True},
    "mlstm": {"slstm_at": [], "mlstm": {"num_heads": 4, "qkv_proj_blocksize": 8, "proj_factor": 1.3}},
    "slstm": {"slstm_at": "all", "slstm": {"num_heads": 4, "conv1d_kernel_size": 0, "group_norm_weight": False}},
    "gelu": {"slstm": {"conv1d_kernel_size": 3}, "feedforward": {"act_fn": "relu^2", "proj_factor": 2.1, "bias": True}},
    "selu": {"add_post_blocks_norm": False, "feedforward": {"act_fn": "selu"}, "mlstm": {"conv1d_kernel_size": 6}},
}


@pytest.fixture
def pair(make_config, randomize):
    """``pair(**options)``: the same random model, ours and theirs."""

    def make(**options):
        theirs = randomize(nxai.xLSTMLMModel(make_config(nxai, **options)))
        ours = block_stack.xLSTMLMModel(make_config(**options))
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    return make


def _agree(a, b, what, bound=1e-4):
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
    assert error <= bound, (what, error)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_outputs_and_gradients_of_a_sequence(pair, options, ids):
    ours, theirs = pair(**options)
    logits, expected = ours(ids), theirs(ids)
    _agree(logits, expected, "logits")
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert gradients[name].abs().max() > 0, name
        _agree(p.grad, gradients[name], name)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_steps(pair, options, ids):
    ours, theirs = pair(**options)
    state = their_state = None
    with torch.no_grad():
        for t in range(ids.shape[1]):
            logits, state = ours.step(ids[:, t : t + 1], state)
            expected, their_state = theirs.step(ids[:, t : t + 1], their_state)
            _agree(logits, expected, t)


def test_the_first_token(pair):
    """A fresh sLSTM has m = i in both. Another rule would show with the forget gate far above the input gate."""
    options = {"slstm_at": "all", "num_blocks": 1}
    ours, theirs = pair(**options)
    with torch.no_grad():
        for model in (ours, theirs):
            bias = model.xlstm_block_stack.blocks[0].xlstm.slstm_cell._bias_.view(4, -1)
            bias[0], bias[1] = -30.0, 20.0
        ids = torch.arange(5)[:, None]
        _agree(ours(ids), theirs(ids), "logits")
        _agree(ours.step(ids)[0], theirs.step(ids)[0], "step")


@pytest.mark.parametrize("slstm_at", [[1], "all", []])
def test_state_dicts_both_ways(make_config, randomize, slstm_at, ids):
    ours = randomize(block_stack.xLSTMLMModel(make_config(slstm_at=slstm_at)), seed=3)
    theirs = nxai.xLSTMLMModel(make_config(nxai, slstm_at=slstm_at))
    theirs.load_state_dict(ours.state_dict())
    _agree(ours(ids), theirs(ids), "logits")
    back = block_stack.xLSTMLMModel(make_config(slstm_at=slstm_at))
    back.load_state_dict(theirs.state_dict())
    state = ours.state_dict()
    assert list(state) == list(back.state_dict())
    assert set(state) == set(theirs.state_dict())
    assert all(torch.equal(t, state[name]) for name, t in back.state_dict().items())


def _cell(backend, seed):
    """NX-AI's sLSTM cell with random weights in the layout of a backend. This does not compile its CUDA kernels."""
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla, sLSTMCellConfig

    kind = sLSTMCell_cuda if backend == "cuda" else sLSTMCell_vanilla
    cell = kind(sLSTMCellConfig(hidden_size=12, num_heads=3, backend=backend), skip_backend_init=True)
    generator = torch.Generator().manual_seed(seed)
    cell.recurrent_kernel[:] = torch.randn(3, 4, 4, 4, generator=generator)
    cell.bias[:] = torch.randn(3, 4, 4, generator=generator)
    return cell


@pytest.mark.parametrize("saved", ["cuda", "vanilla"])
@pytest.mark.parametrize("own", ["cuda", "vanilla"])
def test_layouts_of_the_recurrent_weights(own, saved):
    theirs = _cell(saved, seed=5)
    ours = block_stack.sLSTMCell(block_stack.sLSTMLayerConfig(embedding_dim=12, num_heads=3, backend=own))
    ours.load_state_dict(theirs.state_dict())
    expected = _cell(own, seed=5).state_dict()  # the same weights in the layout of NX-AI's other backend
    for name, t in ours.state_dict().items():
        assert torch.equal(t, expected[name]), name
    R, b = ours.weights()
    assert torch.equal(R, theirs.recurrent_kernel.clone().permute(2, 0, 3, 1))
    assert torch.equal(b, theirs.bias.clone().permute(1, 0, 2))


@pytest.mark.parametrize("bias_init", ["powerlaw_blockdependent", "small_init", "standard"])
def test_initialization(make_config, bias_init):
    options = {
        "slstm": {"bias_init": bias_init, "recurrent_weight_init": "standard"}, "num_blocks": 4, "slstm_at": [1, 3],
        "embedding_dim": 128, "vocab_size": 300,
    }  # fmt: skip
    ours, theirs = block_stack.xLSTMLMModel(make_config(**options)), nxai.xLSTMLMModel(make_config(nxai, **options))
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.reset_parameters()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        want = expected[name]
        if want.std() == 0 or (name.endswith("_bias_") and bias_init != "standard") or "fgate.bias" in name:
            assert torch.allclose(p, want, atol=1e-6), name
        elif p.numel() > 1000:
            assert abs(p.std() / want.std() - 1) < 0.15 and abs(p.mean() - want.mean()) < 0.15 * want.std(), name


def test_configurations_have_the_same_fields_and_defaults():
    def defaults(cls):
        return {
            f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default
            for f in dataclasses.fields(cls)
            if not f.name.startswith("_") and not dataclasses.is_dataclass(f.default_factory)
        }

    for name in ("FeedForwardConfig", "mLSTMLayerConfig", "sLSTMLayerConfig", "xLSTMBlockStackConfig",
                 "xLSTMLMModelConfig"):  # fmt: skip
        assert defaults(getattr(block_stack, name)) == defaults(getattr(nxai, name)), name


def test_weight_decay_groups(pair):
    options = {"tie_weights": True}
    ours, theirs = pair(**options)
    for group, expected in zip(
        ours.get_weight_decay_optim_group_param_names(), theirs.get_weight_decay_optim_group_param_names(), strict=True
    ):
        assert sorted(group) == sorted(expected)


def test_dumps_of_their_configurations_load(make_config, ids, randomize):
    values = dataclasses.asdict(make_config(nxai))
    config = block_stack.xLSTMLMModelConfig.from_dict(values)
    slstm, expected = config.slstm_block.slstm, make_config().slstm_block.slstm
    for name in "bwrgsa":  # theirs fills them in
        setattr(slstm, f"dtype_{name}", getattr(expected, f"dtype_{name}"))
    assert config == make_config()
