"""The blocks by themselves: states, steps, lengths, dtypes, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from flash_xlstm.nn import blocks


@pytest.fixture
def model(make_config, randomize):
    return randomize(blocks.xLSTMLMModel(make_config()))


@pytest.mark.parametrize("backend", ["cuda", "vanilla"], ids="layout {}".format)
def test_float32_beside_float64(make_config, randomize, ids, backend, device):
    """float64 runs the plain PyTorch forms: the compiled ops agree with them in a whole model, gradients too."""
    model = randomize(blocks.xLSTMLMModel(make_config(slstm={"backend": backend})))
    wide = copy.deepcopy(model).double()
    model.to(device)
    weight = torch.randn(*ids.shape, 23)
    (model(ids.to(device)).cpu() * weight).sum().backward()
    (wide(ids) * weight.double()).sum().backward()
    for (name, p), q in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert (p.grad.cpu().double() - q.grad).norm() <= 1e-4 * q.grad.norm(), name


@pytest.mark.parametrize("conv1d_kernel_size", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_and_steps_are_the_whole(make_config, randomize, ids, conv1d_kernel_size, dtype):
    size = {"conv1d_kernel_size": conv1d_kernel_size}
    model = randomize(blocks.xLSTMLMModel(make_config(slstm=size, mlstm=size))).to(dtype)
    whole, last = model(ids, return_last_state=True)
    assert torch.allclose(model(ids), whole, atol=1e-5)
    first, state = model(ids[:, :7], return_last_state=True)
    kept = copy.deepcopy({k: {n: _detached(t) for n, t in v.items()} for k, v in state.items()})
    second, end = model(ids[:, 7:], state, return_last_state=True)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-4)

    # With gradients enabled, a step leaves its state alone and is differentiable.
    logits, _ = model.step(ids[:, 7:8], state)
    assert torch.allclose(logits, whole[:, 7:8], atol=1e-4) and logits.requires_grad
    for block, parts in kept.items():
        for name, t in parts.items():
            assert all(torch.equal(a, b) for a, b in zip(_flat(state[block][name]), _flat(t), strict=True))
    with torch.no_grad():
        for t in range(7, ids.shape[1]):
            logits, kept = model.step(ids[:, t : t + 1], kept)
            assert torch.allclose(logits, whole[:, t : t + 1], atol=1e-4), t
    for block, parts in last.items():
        for name, t in parts.items():
            for a, b, c in zip(_flat(t), _flat(end[block][name]), _flat(kept[block][name]), strict=True):
                assert torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)


def _flat(state):
    return () if state is None else state if isinstance(state, tuple) else (state,)


def _detached(state):
    return tuple(t.detach() for t in state) if isinstance(state, tuple) else state if state is None else state.detach()


def test_a_step_without_gradients_is_in_place(model, ids):
    with torch.no_grad():
        _, state = model.step(ids[:, :1])
        m = state["block_0"]["mlstm_state"][2]
        _, after = model.step(ids[:, 1:2], state)
    assert after["block_0"]["mlstm_state"][2] is m


def test_context_length_bounds_nothing(model):
    long = torch.randint(23, (1, 500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(long)
        assert model.config.context_length < 500 and torch.isfinite(logits).all()
        assert torch.allclose(model(long[:, :30]), logits[:, :30], atol=1e-4)


def test_bfloat16_and_autocast(model, ids):
    expected = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids)
    half = copy.deepcopy(model).bfloat16()(ids)
    for logits in (mixed, half):
        assert (logits.float() - expected).norm() <= 0.1 * expected.norm()
    mixed.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiles_whole(model, ids):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(ids), model(ids), atol=1e-5)


def test_the_recurrent_gradient_can_be_cut_and_clipped(make_config, randomize, ids):
    def gradients(**slstm):
        model = randomize(blocks.xLSTMLMModel(make_config(slstm=slstm, slstm_at="all", num_blocks=1)))
        model(ids)[:, -1].sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    free, cut = gradients(), gradients(gradient_recurrent_cut=True)
    loose, tight = gradients(gradient_recurrent_clipval=1e6), gradients(gradient_recurrent_clipval=1e-12)
    name = "xlstm_block_stack.blocks.0.xlstm.zgate.weight"
    assert torch.equal(free[name], loose[name])
    assert torch.allclose(cut[name], tight[name], rtol=1e-4, atol=1e-8)
    assert (cut[name] - free[name]).norm() > 0.01 * free[name].norm()
    assert cut["xlstm_block_stack.blocks.0.xlstm.slstm_cell._recurrent_kernel_"].norm() > 0


def test_dropout_is_where_it_is_said(make_config, randomize, ids):
    model = randomize(blocks.xLSTMLMModel(make_config(dropout=0.5, add_embedding_dropout=True)))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert isinstance(model.emb_dropout, torch.nn.Dropout)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {
        0.5,
        0.0,
    }  # the feed-forward has its own


def test_tied_weights(make_config):
    model = blocks.xLSTMLMModel(make_config(tie_weights=True))
    model.reset_parameters()
    assert model.lm_head.weight is model.token_embedding.weight
    assert sum("lm_head" in name for name, _ in model.named_parameters()) == 0


def test_every_parameter_is_in_one_weight_decay_group(make_config):
    for on_embedding in (False, True):
        model = blocks.xLSTMLMModel(make_config(weight_decay_on_embedding=on_embedding))
        decay, rest = model.get_weight_decay_optim_groups()
        assert {id(p) for p in decay} | {id(p) for p in rest} == {id(p) for p in model.parameters()}
        assert len(decay) + len(rest) == len(list(model.parameters()))
        names, _ = model.get_weight_decay_optim_group_param_names()
        assert ("token_embedding.weight" in names) == on_embedding
        assert not any("norm" in name or "bias" in name for name in names)


@pytest.mark.parametrize("own", ["cuda", "vanilla"], ids="layout {}".format)
def test_layouts_convert_on_load(make_config, randomize, ids, own):
    other = "vanilla" if own == "cuda" else "cuda"
    saved = randomize(blocks.xLSTMLMModel(make_config(slstm={"backend": other})))
    model = blocks.xLSTMLMModel(make_config(slstm={"backend": own}))
    state = saved.state_dict()
    before = {name: t.shape for name, t in state.items()}
    model.load_state_dict(state)
    assert {name: t.shape for name, t in state.items()} == before  # the caller's is left alone
    assert torch.allclose(model(ids), saved(ids), atol=1e-5)


def test_a_wrong_recurrent_shape_is_reported(model):
    state = model.state_dict()
    name = "xlstm_block_stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"
    state[name] = state[name][:, :-1]
    with pytest.raises(RuntimeError, match="_recurrent_kernel_"):
        model.load_state_dict(state)


def test_layers_need_a_width():
    with pytest.raises(ValueError, match="embedding_dim is -1"):
        blocks.mLSTMLayer(blocks.mLSTMLayerConfig())
    with pytest.raises(ValueError, match="embedding_dim is -1"):
        blocks.sLSTMLayer(blocks.sLSTMLayerConfig())
