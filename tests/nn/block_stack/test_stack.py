"""The blocks and their stack: states, steps, lengths, dtypes, errors."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook

from flash_xlstm.nn import block_stack


@pytest.fixture
def model(make_config, randomize):
    return randomize(block_stack.xLSTMLMModel(make_config()))


@pytest.mark.parametrize("backend", ["cuda", "vanilla"], ids="layout {}".format)
def test_float32_beside_float64(make_config, randomize, ids, backend, device):
    """float64 runs the plain PyTorch forms. The compiled ops agree with them in a whole model, gradients included."""
    model = randomize(block_stack.xLSTMLMModel(make_config(slstm={"backend": backend})))
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
    model = randomize(block_stack.xLSTMLMModel(make_config(slstm=size, mlstm=size))).to(dtype)
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


def _parts(model):
    """Every step function, with the name of its input and the width that it must have."""
    stack = model.xlstm_block_stack
    mlstm, slstm = stack.blocks[0], stack.blocks[1]
    cell, width = mlstm.xlstm.mlstm_cell, mlstm.xlstm.mlstm_cell.outnorm.weight.shape[0]
    return {
        "stack": (stack.step, "x", 32),
        "mLSTM block": (mlstm.step, "x", 32),
        "sLSTM block": (slstm.step, "x", 32),
        "mLSTM layer": (mlstm.xlstm.step, "x", 32),
        "sLSTM layer": (slstm.xlstm.step, "x", 32),
        "mLSTM cell": (lambda x: cell(x, x, x, inplace=True), "q", width),
        "sLSTM cell": (lambda x: slstm.xlstm.slstm_cell(x, inplace=True), "x", 4 * 32),
        "convolution": (lambda x: slstm.xlstm.conv1d(x, x.new_zeros(x.shape[0], 3, 32), inplace=True), "x", 32),
    }


@pytest.mark.parametrize("gradients", [False, True])
def test_a_step_takes_one_token(model, ids, gradients):
    with torch.set_grad_enabled(gradients):
        for part, (step, name, width) in _parts(model).items():
            for shape in ((1, 5, width), (2, 0, width), (2, width), (2, 1, width + 1), (2, 1, 1, width)):
                message = (
                    rf"^{name} has shape \({', '.join(map(str, shape))}\); .*\(batch, 1, {width}\).*return_last_state"
                )
                with pytest.raises(ValueError, match=message):
                    step(torch.zeros(shape))
                    pytest.fail(f"{part} took {shape}")
        for wrong in (ids, ids[:, 0], ids[:, :0], ids[:, :1, None]):
            with pytest.raises(ValueError, match=r"^idx has shape .*\(batch, 1\).*return_last_state"):
                model.step(wrong)
        with pytest.raises(ValueError, match=r"^idx has shape \(3,\); it must be \(batch, seq\)"):
            model(ids[:, 0])
        for part in (model.xlstm_block_stack, *model.xlstm_block_stack.blocks):
            for shape in ((2, 32), (2, 5, 31), (2, 0, 32)):
                with pytest.raises(ValueError, match=r"^x has shape .*must be \(batch, seq, 32\)"):
                    part(torch.zeros(shape))


def test_another_stacks_state_is_refused(model, ids):
    _, state = model(ids, return_last_state=True)
    blocks = len(model.xlstm_block_stack.blocks)
    wrong = {**state, f"block_{blocks}": state["block_0"]}
    for call in (model, lambda ids, state: model.step(ids[:, :1], state)):
        with pytest.raises(ValueError, match=rf"state holds block_0, .*; this stack.s blocks are .*_{blocks - 1}$"):
            call(ids, wrong)
        with pytest.raises(TypeError, match="state is a Tensor; it must be a dict"):
            call(ids, ids)
    assert torch.equal(model(ids, {}), model(ids))  # as fresh


@pytest.mark.parametrize("gradients", [False, True])
def test_an_incomplete_state_is_refused(model, ids, gradients):
    with torch.set_grad_enabled(gradients):
        _, state = model(ids[:, :7], return_last_state=True)
        before = copy.deepcopy({k: {n: _detached(t) for n, t in v.items()} for k, v in state.items()})
        without = lambda block, part: {**state, block: {k: t for k, t in state[block].items() if k != part}}  # noqa: E731
        cases = [({k: v for k, v in state.items() if k != name}, ValueError, f"no {name}; it must") for name in state]
        cases += [(without(b, part), ValueError, f"{b} without {part}; it must") for b in state for part in state[b]]
        cases += [({**state, "block_1": None}, TypeError, "a NoneType as block_1; it must be a dict")]
        for wrong, error, message in cases:
            for call in (model, lambda ids, state: model.step(ids[:, :1], state)):
                with pytest.raises(error, match=rf"^state (has|holds) {message}"):
                    call(ids[:, 7:], wrong)
    _same(state, before, 0.0)


def test_a_state_needs_no_part_that_a_layer_has_not(make_config, randomize, ids):
    size = {"conv1d_kernel_size": 0}
    model = randomize(block_stack.xLSTMLMModel(make_config(slstm=size, mlstm=size)))
    whole, (_, state) = model(ids), model(ids[:, :7], return_last_state=True)
    tensors = {block: {k: t for k, t in parts.items() if t is not None} for block, parts in state.items()}
    assert all("conv_state" not in parts for parts in tensors.values())
    assert torch.allclose(model(ids[:, 7:], tensors), whole[:, 7:], atol=1e-4)


def test_a_refused_step_updates_nothing(model, ids):
    with torch.no_grad():
        _, state = model(ids[:, :3], return_last_state=True)
        before = copy.deepcopy(state)
        with pytest.raises(ValueError, match="one token"):
            model.step(ids, state)
    _same(state, before, 0.0)


def _same(state, other, tolerance):
    for block, parts in state.items():
        for name, t in parts.items():
            for a, b in zip(_flat(t), _flat(other[block][name]), strict=True):
                assert (a.double() - b.double()).norm() <= tolerance * b.double().norm(), (block, name)


def _cast(state, dtype):
    return {
        block: {name: tuple(p.to(dtype) for p in t) if isinstance(t, tuple) else t.to(dtype) for name, t in s.items()}
        for block, s in state.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gradients", [False, True])
def test_states_of_any_dtype(model, ids, dtype, gradients):
    tolerance = 1e-5 if dtype == torch.float64 else 5e-2

    def read():
        return model(ids[:, :7], return_last_state=True)[1]

    with torch.set_grad_enabled(gradients):
        expected_rest, expected_end = model(ids[:, 7:], read(), return_last_state=True)
        expected, expected_after = model.step(ids[:, 7:8], read())
        given = _cast(read(), dtype)
        rest, end = model(ids[:, 7:], given, return_last_state=True)
        logits, after = model.step(ids[:, 7:8], given)
    assert (rest - expected_rest).norm() <= tolerance * expected_rest.norm()
    assert (logits - expected).norm() <= tolerance * expected.norm()
    for actual, wanted in ((end, expected_end), (after, expected_after)):
        _same(actual, wanted, tolerance)
        for parts in actual.values():
            for name, t in parts.items():  # a c in bfloat16 stays so
                assert all(p.dtype == torch.float32 for p in _flat(t)[name == "mlstm_state" :])
    m = given["block_0"]["mlstm_state"][2]
    assert torch.equal(m, read()["block_0"]["mlstm_state"][2].to(dtype))  # a copy was updated


def test_states_between_autocast_dtypes_and_modes(model, ids):
    """A sequence read in one way can be continued in another: states are interchangeable."""
    with torch.no_grad():
        expected = model(ids[:, :8])[:, 7:]

        def close(logits, tolerance=5e-2):
            assert (logits.float() - expected).norm() <= tolerance * expected.norm()

        with torch.autocast("cpu", torch.bfloat16):
            _, state = model(ids[:, :7], return_last_state=True)
        close(model.step(ids[:, 7:8], state)[0])
        _, state = model(ids[:, :7], return_last_state=True)
        with torch.autocast("cpu", torch.bfloat16):
            close(model.step(ids[:, 7:8], state)[0])
        for first, second in itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2):
            _, state = copy.deepcopy(model).to(first)(ids[:, :7], return_last_state=True)
            other = copy.deepcopy(model).to(second)
            close(other(ids[:, 7:8], state))
            logits, state = other.step(ids[:, 7:8], state)
            close(logits)
            m = state["block_0"]["mlstm_state"][2]
            assert other.step(ids[:, 8:9], state)[1]["block_0"]["mlstm_state"][2] is m  # it fits: in place
    with torch.inference_mode():
        _, state = model(ids[:, :7], return_last_state=True)
    with torch.no_grad():
        close(model.step(ids[:, 7:8], state)[0], 1e-4)
        _, state = model(ids[:1, :7], return_last_state=True)
        expected = expected[:1].expand(3, -1, -1)
        spread = {
            block: {
                name: tuple(p.expand(3, *p.shape[1:]) for p in t) if isinstance(t, tuple) else t.expand(3, -1, -1)
                for name, t in parts.items()
            }
            for block, parts in state.items()
        }
        close(model.step(ids[:1, 7:8].expand(3, 1), spread)[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_empty_batch_gives_nothing(model, ids, dtype):
    model.to(dtype)
    logits, state = model(ids[:0], return_last_state=True)
    assert logits.shape == (0, 19, 23) and state["block_1"]["slstm_state"][0].shape == (0, 2, 16)
    logits.sum().backward()
    logits, _ = model.step(ids[:0, :1], state)
    with torch.no_grad():
        assert model.step(ids[:0, :1])[0].shape == model.step(ids[:0, :1], state)[0].shape == (0, 1, 23)


def _double(function):
    return lambda *args, **options: 2 * function(*args, **options)


class _Double(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def _replace_conv(conv1d):
    conv1d.conv = _Double(conv1d.conv)


_CHANGES = {
    "forward of the instance": lambda c: setattr(c.conv, "forward", _double(c.conv.forward)),
    "hook": lambda c: c.conv.register_forward_hook(lambda m, args, y: 2 * y) and None,
    "hook of all": lambda c: register_module_forward_hook(lambda m, args, y: 2 * y if m is c.conv else y),
    "forward of the class": lambda c: mock.patch.object(torch.nn.Conv1d, "forward", _double(torch.nn.Conv1d.forward)),
    "another module": _replace_conv,
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_what_changes_the_convolution_is_seen(change):
    torch.manual_seed(0)
    conv1d, x = block_stack.CausalConv1d(6, 4), torch.randn(2, 9, 6, requires_grad=True)
    state = torch.randn(2, 3, 6)
    padded = torch.cat([state, x], 1)
    expected = F.silu(2 * conv1d.conv(padded.mT).mT)
    with contextlib.ExitStack() as stack:
        handle = change(conv1d)
        if handle is not None and hasattr(handle, "remove"):
            stack.callback(handle.remove)
        elif handle is not None:
            stack.enter_context(handle)
        y, last = conv1d(x, state, return_state=True)
        assert torch.allclose(y, expected, atol=1e-6) and torch.equal(last, padded[:, -3:])
        y.sum().backward()
        assert torch.allclose(conv1d(x)[0][:, 3:], expected[:, 3:], atol=1e-6)
        with torch.no_grad():
            for t in range(9):
                y, after = conv1d(x[:, t : t + 1], state, inplace=True)
                assert after is state and torch.allclose(y, expected[:, t : t + 1], atol=1e-6)
    assert torch.equal(state, padded[:, -3:])


def test_gradient_hooks_of_the_convolution_are_called(model, ids):
    seen = []
    conv = model.xlstm_block_stack.blocks[0].xlstm.conv1d.conv
    conv.register_full_backward_hook(lambda *args: seen.append(args))
    model(ids).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("act_fn", ["gelu", "relu", "relu^2", "sigmoid", "swish", "selu"])
def test_models_can_be_pickled(make_config, ids, act_fn):
    model = block_stack.xLSTMLMModel(make_config(feedforward={"act_fn": act_fn})).eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))


def test_the_output_layer_can_be_another_module(make_config, ids):
    model = block_stack.xLSTMLMModel(make_config())
    model.lm_head = torch.nn.Identity()
    model.reset_parameters()
    assert model(ids).shape == (3, 19, 32) and model.step(ids[:, :1])[0].shape == (3, 1, 32)


@torch.no_grad()
def test_a_step_calls_what_changes_a_module(model, ids):
    _, state = model.step(ids[:, :1])
    for name, module in model.named_modules():
        if "step" in dir(module):
            calls = []
            handle = module.register_forward_hook(lambda module, args, y, calls=calls: calls.append(y))
            model.step(ids[:, 1:2], state)
            handle.remove()
            assert len(calls) == 1, name


@torch.no_grad()
def test_offloaded_parameters_are_there_in_a_step(model, ids):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected, state = model(ids[:, :7], return_last_state=True)
    next_expected, _ = model.step(ids[:, 7:8], copy.deepcopy(state))
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), "cpu")
    logits, state = offloaded(ids[:, :7], return_last_state=True)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert torch.allclose(offloaded.step(ids[:, 7:8], state)[0], next_expected, atol=1e-5)


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


@pytest.mark.slow
def test_compiles_whole(model, ids):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(ids), model(ids), atol=1e-5)


@torch.no_grad()
def test_a_step_compiles_whole(make_config, randomize, ids):
    model = randomize(block_stack.xLSTMLMModel(make_config(num_blocks=2)))
    _, state = model(ids[:, :7], return_last_state=True)
    compiled = torch.compile(model.step, backend="eager", fullgraph=True)
    logits, _ = compiled(ids[:, 7:8], copy.deepcopy(state))
    assert torch.allclose(logits, model.step(ids[:, 7:8], state)[0], atol=1e-5)


def test_the_recurrent_gradient_can_be_cut_and_clipped(make_config, randomize, ids):
    def gradients(**slstm):
        model = randomize(block_stack.xLSTMLMModel(make_config(slstm=slstm, slstm_at="all", num_blocks=1)))
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
    model = randomize(block_stack.xLSTMLMModel(make_config(dropout=0.5, add_embedding_dropout=True)))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert isinstance(model.emb_dropout, torch.nn.Dropout)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {
        0.5,
        0.0,
    }  # the feed-forward has its own


def test_tied_weights(make_config):
    model = block_stack.xLSTMLMModel(make_config(tie_weights=True))
    model.reset_parameters()
    assert model.lm_head.weight is model.token_embedding.weight
    assert sum("lm_head" in name for name, _ in model.named_parameters()) == 0


def test_every_parameter_is_in_one_weight_decay_group(make_config):
    for on_embedding in (False, True):
        model = block_stack.xLSTMLMModel(make_config(weight_decay_on_embedding=on_embedding))
        decay, rest = model.get_weight_decay_optim_groups()
        assert {id(p) for p in decay} | {id(p) for p in rest} == {id(p) for p in model.parameters()}
        assert len(decay) + len(rest) == len(list(model.parameters()))
        names, _ = model.get_weight_decay_optim_group_param_names()
        assert ("token_embedding.weight" in names) == on_embedding
        assert not any("norm" in name or "bias" in name for name in names)


@pytest.mark.parametrize("own", ["cuda", "vanilla"], ids="layout {}".format)
def test_layouts_convert_on_load(make_config, randomize, ids, own):
    other = "vanilla" if own == "cuda" else "cuda"
    saved = randomize(block_stack.xLSTMLMModel(make_config(slstm={"backend": other})))
    model = block_stack.xLSTMLMModel(make_config(slstm={"backend": own}))
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
        block_stack.mLSTMLayer(block_stack.mLSTMLayerConfig())
    with pytest.raises(ValueError, match="embedding_dim is -1"):
        block_stack.sLSTMLayer(block_stack.sLSTMLayerConfig())
