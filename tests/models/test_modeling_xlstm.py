from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
import transformers.modeling_layers
from transformers import DynamicCache
from transformers.models.xlstm import xLSTMConfig as StockConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMCache as StockCache

from flash_xlstm.models import (
    xLSTMCache,
    xLSTMCausalLMOutput,
    xLSTMConfig,
    xLSTMForCausalLM,
    xLSTMModel,
    xLSTMOutput,
    xLSTMPreTrainedModel,
)

SHAPES = [
    pytest.param({}, 37, id="odd-length"),
    pytest.param({}, 1, id="one-token"),
    pytest.param({"num_heads": 4, "use_bias": True}, 16, id="4-heads-biases"),
    pytest.param({"num_heads": 1, "qk_dim_factor": 1.0, "v_dim_factor": 2.0}, 33, id="1-head-wide"),
    pytest.param({"weight_mode": "fused", "use_bias": True}, 19, id="fused"),
    pytest.param({"hidden_size": 192, "num_heads": 3, "qk_dim_factor": 1.0, "gate_soft_cap": 2.0}, 20, id="3-heads"),
    pytest.param({"norm_eps": 1e-3, "eps": 1e-2, "ffn_proj_factor": 1.3, "output_logit_soft_cap": 2.0}, 18, id="eps"),
]


def _gradients(model, ids, **kwargs):
    model.zero_grad()
    output = model(ids, labels=ids, use_cache=False, **kwargs)
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


def _states(cache):
    return [t for layer in cache.rnn_state.values() for t in layer]


# --- against transformers ---


@pytest.mark.parametrize(("config", "seq"), SHAPES)
def test_logits_loss_and_gradients_match_transformers(make_ours, make_stock, in_double, tokens, rel, config, seq):
    ours = make_ours(**config)
    theirs = make_stock(ours)
    ids = tokens(2, seq)
    if seq == 1:  # no next token, no loss
        assert rel(ours(ids).logits, theirs(ids, use_cache=False).logits) < 1e-5
        return
    exact, exact_gradients = _gradients(in_double(ours), ids)
    a, a_gradients = _gradients(ours, ids)
    b, b_gradients = _gradients(theirs, ids)
    assert rel(a.logits, b.logits) < 1e-5
    assert rel(a.logits, exact.logits) < 1e-5
    assert abs(a.loss - b.loss) < 1e-4 * abs(b.loss)
    assert a_gradients.keys() == b_gradients.keys()
    scale = max(float(g.norm()) for g in exact_gradients.values())
    for name, exact_gradient in exact_gradients.items():
        # The gates' gradients are sums over all tokens that cancel: the norm after the heads removes a common factor of
        # the input gates. The bound is therefore transformers' own error against float64.
        noise = float((b_gradients[name] - exact_gradient).norm())
        bound = max(1e-4 * float(exact_gradient.norm()), (3 if "gate_preact" in name else 0) * noise) + 1e-6 * scale
        assert (a_gradients[name] - exact_gradient).norm() < bound, name
        assert (a_gradients[name] - b_gradients[name]).norm() < bound + noise, name


@pytest.mark.parametrize("config", [{}, {"num_heads": 4, "use_bias": True, "weight_mode": "fused"}])
def test_continuing_from_a_cache_matches_transformers(make_ours, make_stock, tokens, rel, config):
    ours = make_ours(**config)
    theirs = make_stock(ours)
    ids = tokens(2, 30)
    with torch.no_grad():
        a = ours(ids[:, :21])
        b = theirs(ids[:, :21], use_cache=True)
        for part in (slice(21, 28), slice(28, 29), slice(29, 30)):
            a = ours(ids[:, part], cache_params=a.cache_params)
            b = theirs(ids[:, part], cache_params=b.cache_params, use_cache=True)
            assert rel(a.logits, b.logits) < 1e-5
        whole = ours(ids)
    assert rel(a.logits[:, -1], whole.logits[:, -1]) < 1e-5
    for mine, other in zip(_states(a.cache_params), _states(b.cache_params), strict=True):
        assert rel(mine, other.reshape(mine.shape)) < 1e-5
    assert a.cache_params.get_seq_length() == 30


def test_hidden_states_match_transformers(make_ours, make_stock, tokens, rel):
    ours = make_ours()
    ids = tokens(2, 9)
    a = ours(ids, output_hidden_states=True).hidden_states
    b = make_stock(ours)(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(a) == len(b) == 3
    for mine, other in zip(a, b, strict=True):
        assert rel(mine, other) < 1e-5


def test_accepts_transformers_config(tokens):
    model = xLSTMForCausalLM(StockConfig(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_heads=2))
    assert isinstance(model.config, xLSTMConfig)
    assert model(tokens(1, 3)).logits.shape == (1, 3, 61)
    with pytest.raises(TypeError, match="config is a dict"):
        xLSTMModel({"hidden_size": 64})


# --- kernels, dtypes ---


@pytest.mark.parametrize(
    "kernel",
    ["parallel--native_autograd", "chunkwise--reference", "recurrent--reference", "chunkwise--triton_xl_chunk"],
)
def test_kernels_agree(make_ours, tokens, rel, kernel):
    ids = tokens(2, 21)
    step = "triton" if "triton" in kernel else "reference"
    with torch.no_grad():
        expected = make_ours()(ids)
        other = make_ours(chunkwise_kernel=kernel, step_kernel=step)
        actual = other(ids)
        assert rel(actual.logits, expected.logits) < 1e-5
        first = other(ids[:, :20])
        assert rel(other(ids[:, 20:], cache_params=first.cache_params).logits, expected.logits[:, 20:]) < 1e-5


def test_chunk_size_changes_speed_only(make_ours, tokens, rel):
    ids = tokens(2, 50)
    expected = make_ours(chunk_size=64)(ids).logits
    assert rel(make_ours(chunk_size=7)(ids).logits, expected) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 1e-2)])
def test_half_precision_weights_keep_float32_states(make_ours, tokens, rel, dtype, tolerance):
    model = make_ours()
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
        model.to(dtype)
        output = model(ids)
        assert output.logits.dtype == torch.float32
        assert rel(output.logits, expected) < tolerance
        assert all(t.dtype == torch.float32 for t in _states(output.cache_params))
        step = model(ids[:, -1:], cache_params=model(ids[:, :-1]).cache_params)
        assert rel(step.logits[:, -1], expected[:, -1]) < tolerance
        assert all(t.dtype == torch.float32 for t in _states(step.cache_params))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_inference_state_dtype(make_ours, tokens, rel, name):
    model = make_ours(inference_state_dtype=name)
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = make_ours()(ids).logits
        cache = None
        for part in (slice(0, 10), slice(10, 23), slice(23, 24)):
            output = model(ids[:, part], cache_params=cache)
            cache = output.cache_params
            for c, n, m in cache.rnn_state.values():
                assert (c.dtype, n.dtype, m.dtype) == (getattr(torch, name), torch.float32, torch.float32)
    assert rel(output.logits[:, -1], expected[:, -1]) < 2e-2


def test_autocast_runs_kernels_in_autocast_kernel_dtype(make_ours, tokens, rel):
    ids = tokens(2, 24)
    expected = make_ours()(ids).logits
    seen = []
    for name in ("bfloat16", "float32"):
        model = make_ours(autocast_kernel_dtype=name)
        layer = model.backbone.blocks[0].mlstm_layer
        original = layer._mlstm
        layer._mlstm = lambda q, *a, original=original, **k: (seen.append(q.dtype), original(q, *a, **k))[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(ids, labels=ids)
        output.loss.backward()
        assert rel(output.logits, expected) < 6e-2
    assert seen == [torch.bfloat16, torch.float32]


def test_norms_reduce_in_float32(make_ours, tokens):
    layer = make_ours(hidden_size=512).backbone.blocks[0].norm_mlstm.bfloat16()
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = torch.nn.functional.rms_norm(x.double(), (512,), layer.weight.double(), layer.eps)
    assert (layer(x).double() - exact).norm() / exact.norm() < 2e-3  # one rounding: 2**-9 at most


# --- padding ---


def _padded(prompts, side):
    length = max(p.shape[1] for p in prompts)
    ids = torch.full((len(prompts), length), 1)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, p in enumerate(prompts):
        where = slice(length - p.shape[1], length) if side == "left" else slice(0, p.shape[1])
        ids[row, where], mask[row, where] = p[0], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_every_row_as_if_alone(make_ours, tokens, rel, side):
    model = make_ours()
    prompts = [tokens(1, n, seed=n) for n in (5, 19, 33)]
    ids, mask = _padded(prompts, side)
    with torch.no_grad():
        together = model(ids, attention_mask=mask)
        for row, prompt in enumerate(prompts):
            alone = model(prompt)
            assert rel(together.logits[row][mask[row] == 1], alone.logits[0]) < 1e-5
            for mine, other in zip(_states(together.cache_params), _states(alone.cache_params), strict=True):
                assert rel(mine[row], other[0]) < 1e-5
    assert torch.isfinite(together.logits).all()


def test_padding_on_the_right_does_not_train(make_ours, tokens, rel):
    model = make_ours().train()
    prompts = [tokens(1, n, seed=n) for n in (5, 19)]
    ids, mask = _padded(prompts, "right")
    output, gradients = _gradients(model, ids, attention_mask=mask)

    model.zero_grad()
    counts = [p.shape[1] - 1 for p in prompts]
    losses = [model(p, labels=p).loss for p in prompts]
    expected = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    expected.backward()
    assert abs(output.loss - expected) < 1e-5 * expected
    scale = max(float(p.grad.norm()) for p in model.parameters())
    for name, p in model.named_parameters():
        error = (gradients[name] - p.grad).norm()
        assert error < 1e-4 * p.grad.norm() + 1e-6 * scale, name

    other = torch.where(mask == 1, ids, torch.full_like(ids, 7))
    again, gradients_again = _gradients(model, other, attention_mask=mask)
    assert torch.equal(again.loss, output.loss)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_labels_that_count_are_those_that_transformers_counts(make_ours, tokens, side):
    model = make_ours()
    lengths = (19, 19) if side == "none" else (5, 19)
    ids, mask = _padded([tokens(1, n, seed=n) for n in lengths], side)
    labels = ids.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()  # as transformers' Trainer
    output = model(ids, labels=labels, attention_mask=mask, num_items_in_batch=count)
    each = torch.nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    assert torch.allclose(output.loss, each.sum() / count)
    assert torch.allclose(output.loss, model(ids, labels=labels, attention_mask=mask).loss)
    assert torch.allclose(output.loss, model(ids, labels=ids, attention_mask=mask).loss)  # padding is no label
    assert (each != 0).sum() == count


def test_padding_in_front_sees_itself_only(make_ours, tokens):
    # The first token's label has no prediction. The loss must not depend on the amount of padding.
    model = make_ours()
    ids = tokens(2, 9)
    with torch.no_grad():
        losses = []
        for pads in (1, 6):
            padded = torch.nn.functional.pad(ids, (pads, 0), value=1)
            mask = torch.nn.functional.pad(torch.ones_like(ids), (pads, 0))
            labels = padded.masked_fill(mask == 0, -100)
            losses.append(model(padded, labels=labels, attention_mask=mask).loss)
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)


def test_one_padded_token_leaves_the_cache_alone(make_ours, tokens):
    model = make_ours()
    with torch.no_grad():
        cache = model(tokens(2, 6)).cache_params
        before = [t.clone() for t in _states(cache)]
        model(tokens(2, 1), cache_params=cache, attention_mask=torch.tensor([[0], [1]]))
    for old, new in zip(before, _states(cache), strict=True):
        assert torch.equal(old[0], new[0])
        assert not torch.equal(old[1], new[1])


# --- cache ---


def test_pieces_equal_the_whole(make_ours, tokens, rel):
    whole, pieces = make_ours(), make_ours(max_inference_chunksize=7)
    ids = tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        a = whole(ids, attention_mask=mask, output_hidden_states=True)
        b = pieces(ids, attention_mask=mask, output_hidden_states=True)
        no_cache = pieces(ids, attention_mask=mask, use_cache=False)
    real = mask == 1
    assert rel(b.logits[real], a.logits[real]) < 1e-5
    assert rel(no_cache.logits[real], a.logits[real]) < 1e-5
    assert no_cache.cache_params is None
    for mine, other in zip(b.hidden_states, a.hidden_states, strict=True):
        assert mine.shape == other.shape
        assert rel(mine[real], other[real]) < 1e-5
    for mine, other in zip(_states(b.cache_params), _states(a.cache_params), strict=True):
        assert rel(mine, other) < 1e-5
    assert b.cache_params.get_seq_length() == 23


def test_pieces_do_not_cut_gradients(make_ours, tokens):
    model = make_ours(max_inference_chunksize=4)
    output = model(tokens(1, 11), labels=tokens(1, 11))
    output.loss.backward()
    assert model.backbone.embeddings.weight.grad.abs().sum() > 0


def test_cache_only_where_asked_for(make_ours, tokens):
    model = make_ours()
    ids = tokens(1, 5)
    assert model(ids).cache_params is not None
    assert model(ids, use_cache=False).cache_params is None
    assert model(ids, labels=ids).cache_params is None
    with torch.no_grad():
        assert model(ids, labels=ids).cache_params is not None
    model.train()
    assert model(ids).cache_params is None
    assert model.backbone(ids).cache_params is None
    asked = model(ids, labels=ids, use_cache=True)
    assert asked.cache_params is not None
    asked.loss.backward()
    model.config.use_cache = False
    assert model.eval()(ids).cache_params is None
    assert model(ids, cache_params=xLSTMCache(model.config, 1)).cache_params is not None


def test_use_cache_false_leaves_the_given_cache_alone(make_ours, tokens):
    model = make_ours(max_inference_chunksize=2)
    with torch.no_grad():
        cache = model(tokens(1, 4)).cache_params
        before = [t.clone() for t in _states(cache)]
        for seq in (1, 3):
            output = model(tokens(1, seq), cache_params=cache, use_cache=False)
            assert output.cache_params is None
    assert all(torch.equal(a, b) for a, b in zip(before, _states(cache), strict=True))
    assert cache.get_seq_length() == 4


def test_without_gradients_the_cache_is_written_in_place(make_ours, tokens):
    model = make_ours()
    with torch.no_grad():
        cache = xLSTMCache(model.config, 2)
        addresses = [t.data_ptr() for t in _states(cache)]
        for seq in (5, 1):
            assert model(tokens(2, seq), cache_params=cache).cache_params is cache
    assert [t.data_ptr() for t in _states(cache)] == addresses
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("cut", [6, 10])  # the second part has several tokens, or one
def test_gradients_flow_through_the_cache(make_ours, tokens, rel, cut):
    model = make_ours()
    ids = tokens(2, 11)
    model(ids).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    first = model(ids[:, :cut])
    tensors = _states(first.cache_params)
    values = [t.detach().clone() for t in tensors]
    second = model(ids[:, cut:], cache_params=first.cache_params)
    assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    torch.cat([first.logits, second.logits], 1).square().mean().backward()
    scale = max(float(g.norm()) for g in expected.values())
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() < 1e-4 * expected[name].norm() + 1e-6 * scale, name


def test_cache_from_a_differentiated_pass_can_be_decoded_from(make_ours, tokens, rel):
    model = make_ours()
    ids = tokens(1, 8)
    first = model(ids[:, :7])
    with torch.no_grad():
        second = model(ids[:, 7:], cache_params=first.cache_params)
        assert rel(second.logits, model(ids).logits[:, 7:]) < 1e-5
    first.logits.sum().backward()  # no saved tensor was overwritten


def test_cache_made_in_inference_mode_can_be_used_outside(make_ours, tokens, rel):
    model = make_ours()
    ids = tokens(1, 8)
    with torch.inference_mode():
        cache = model(ids[:, :7]).cache_params
    with torch.no_grad():
        output = model(ids[:, 7:], cache_params=cache)
        assert rel(output.logits, model(ids).logits[:, 7:]) < 1e-5


# --- modes ---


@pytest.mark.parametrize("mode", ["train", "train_with_padding", "inference"])
def test_modes_take_any_length_and_agree(make_ours, tokens, rel, mode):
    ids = tokens(2, 23)
    with torch.no_grad():
        expected = make_ours()(ids)
        output = make_ours(mode=mode)(ids)
        assert rel(output.logits, expected.logits) < 1e-6
        assert output.cache_params is not None
        model = make_ours(mode=mode, return_last_states=False)
        if mode == "inference":
            assert model(ids).cache_params is not None
        else:
            assert model(ids).cache_params is None
            for options in ({"use_cache": True}, {"cache_params": xLSTMCache(model.config, 2)}):
                with pytest.raises(ValueError, match="return_last_states"):
                    model(ids, **options)


# --- the rest of the interface ---


def test_return_dict(make_ours, tokens):
    model = make_ours()
    ids = tokens(1, 4)
    output = model(ids, labels=ids, output_hidden_states=True, use_cache=True)
    assert isinstance(output, xLSTMCausalLMOutput)
    loss, logits, cache, hidden = model(ids, labels=ids, output_hidden_states=True, use_cache=True, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert isinstance(cache, xLSTMCache) and len(hidden) == 3
    assert isinstance(model.backbone(ids), xLSTMOutput)
    (last,) = model.backbone(ids, use_cache=False, return_dict=False)
    assert torch.equal(last, model.backbone(ids, use_cache=False).last_hidden_state)
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_logits_to_keep(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 6)
    logits = model(ids).logits
    assert torch.allclose(model(ids, logits_to_keep=2).logits, logits[:, -2:], atol=1e-6)
    assert torch.allclose(model(ids, num_logits_to_keep=1).logits, logits[:, -1:], atol=1e-6)
    which = torch.tensor([0, 3])
    assert torch.allclose(model(ids, logits_to_keep=which).logits, logits[:, which], atol=1e-6)


def test_num_items_in_batch_divides_the_loss(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 6)
    mean, total = model(ids, labels=ids).loss, model(ids, labels=ids, num_items_in_batch=1).loss
    assert torch.allclose(total, mean * 10)


def test_labels_of_minus_100_do_not_count(make_ours, tokens):
    model = make_ours()
    ids = tokens(1, 8)
    labels = ids.clone()
    labels[:, 5:] = -100
    assert torch.allclose(model(ids, labels=labels).loss, model(ids[:, :5], labels=ids[:, :5]).loss)


def test_inputs_embeds(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 5)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_ours, in_double, tokens, rel, reentrant):
    model = make_ours().train()
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    calls = []
    layer = model.backbone.blocks[0].mlstm_layer
    layer.register_forward_hook(lambda *a: calls.append(1))
    expected, gradients = _gradients(model, ids, attention_mask=mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls.clear()
    output, again = _gradients(model, ids, attention_mask=mask)
    assert len(calls) == 2  # forward, and once more in backward: a block with a hook goes by torch's checkpoint
    if reentrant:  # a block without gradients adds its residual behind a product, not within it: it rounds otherwise
        assert rel(output.loss, expected.loss) < 4 * torch.finfo(torch.float32).eps
    else:
        assert torch.equal(output.loss, expected.loss)
    double = in_double(make_ours()).train()
    exact = {name: g.clone() for name, g in _gradients(double, ids, attention_mask=mask)[1].items()}
    double.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in _gradients(double, ids, attention_mask=mask)[1].items():
        assert rel(gradient, exact[name]) < 1e-12, name
    for name, gradient in gradients.items():
        if reentrant:  # the forward is one without gradients, which rounds otherwise
            assert rel(again[name], exact[name]) < 3 * rel(gradient, exact[name]) + 1e-6, name
        else:
            assert torch.allclose(again[name], gradient, rtol=1e-5, atol=1e-7), name
    if not reentrant:
        model(ids, labels=ids, use_cache=True).loss.backward()  # a cache does not prevent it
    block, x = model.backbone.blocks[1], torch.randn(2, 9, model.config.hidden_size, requires_grad=True)
    if not reentrant:  # by name, as torch's checkpoint takes it
        assert torch.equal(block(x=x)[0], block(x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_wrapped_checkpointing_function(make_ours, in_double, tokens, rel, reentrant, monkeypatch):
    """It is called, and torch's checkpoint within it, as with other models: the forward runs twice."""
    # A reentrant forward is one without gradients, which rounds otherwise: in float64.
    model, ids = (in_double(make_ours()) if reentrant else make_ours()).train(), tokens(2, 9)
    _, gradients = _gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    block, calls = model.backbone.blocks[0], []
    inner = block._gradient_checkpointing_func
    with monkeypatch.context() as patch:
        patch.setattr(
            block,
            "_gradient_checkpointing_func",
            lambda run, *args: inner(lambda *given: calls.append(1) or run(*given), *args),
        )
        _, wrapped = _gradients(model, ids)
    assert len(calls) == 2
    _, again = _gradients(model, ids)
    assert len(calls) == 2 and block._gradient_checkpointing_func.args == inner.args  # the block's own again
    for name, gradient in gradients.items():
        for other in (wrapped, again):
            if reentrant:
                assert rel(other[name], gradient) < 1e-12, name
            else:
                assert torch.allclose(other[name], gradient, rtol=1e-5, atol=1e-7), name
    other = []
    block._gradient_checkpointing_func = functools.partial(lambda run, *args, **kwargs: other.append(1) or run(*args))
    _gradients(model, ids)
    assert other == [1]


def test_resize_token_embeddings(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 5)
    before = model(ids, labels=ids).logits.detach()  # in the form of the call below: with a cache it rounds elsewhere
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    output = model(ids, labels=ids + 9)
    assert output.logits.shape == (2, 5, 70)
    assert torch.allclose(output.logits[..., :61], before, atol=1e-5)
    output.loss.backward()


def test_tied_embeddings(make_ours, tokens):
    model = make_ours(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(64)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert make_ours().lm_head.weight is not make_ours().get_input_embeddings().weight


def test_add_out_norm(make_ours, tokens):
    with_norm, without = make_ours(), make_ours(add_out_norm=False)
    assert set(with_norm.state_dict()) - set(without.state_dict()) == {"backbone.out_norm.weight"}
    ids = tokens(1, 4)
    block = without.backbone.blocks[-1]
    seen = []
    block.register_forward_hook(lambda m, a, output: seen.append(output[0]))
    assert torch.equal(without.backbone(ids).last_hidden_state, seen[0])


def test_soft_caps(make_ours, tokens):
    ids = tokens(2, 9)
    assert make_ours(output_logit_soft_cap=0.5)(ids).logits.abs().max() <= 0.5
    uncapped = make_ours(output_logit_soft_cap=None, gate_soft_cap=None)(ids).logits
    assert torch.isfinite(uncapped).all()


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_initialization(mode):
    torch.manual_seed(0)
    config = xLSTMConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=4, num_heads=4, use_bias=True, weight_mode=mode
    )
    model = xLSTMForCausalLM(config)
    model.set_weight_mode("single")
    small = (2 / (5 * 256)) ** 0.5
    assert abs(model.backbone.embeddings.weight.std() / small - 1) < 0.05
    assert abs(model.lm_head.weight.std() / small - 1) < 0.05
    for block in model.backbone.blocks:
        layer, ffn = block.mlstm_layer, block.ffn
        assert torch.equal(layer.igate_preact.bias, torch.full((4,), -10.0))
        assert torch.allclose(layer.fgate_preact.bias, torch.linspace(3, 6, 4))
        for gate in (layer.igate_preact, layer.fgate_preact, layer.ogate_preact):
            assert not gate.weight.any()
        for linear in (layer.q, layer.k, layer.v, ffn.proj_up_gate, ffn.proj_up):
            assert abs(linear.weight.std() / small - 1) < 0.05
            assert not linear.bias.any()
        for linear in (layer.out_proj, ffn.proj_down):
            assert abs(linear.weight.std() / (2 / 4 / linear.in_features**0.5) - 1) < 0.05
        assert torch.equal(layer.multihead_norm.weight, torch.ones(256))
    ids = torch.randint(0, 512, (2, 16))
    assert abs(model(ids, labels=ids).loss - torch.tensor(512.0).log()) < 1.0


def test_a_few_steps_of_training_reduce_the_loss(tokens):
    torch.manual_seed(0)
    model = xLSTMForCausalLM(xLSTMConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_heads=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = tokens(2, 20)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_compiles_whole_in_training(make_ours, tokens, weight_mode):
    model = make_ours(weight_mode=weight_mode).train()
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, 9:] = 0
    expected, gradients = _gradients(model, tokens(2, 13), attention_mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    output = compiled(tokens(2, 13), labels=tokens(2, 13), attention_mask=mask)
    output.loss.backward()
    assert torch.allclose(output.loss, expected.loss, rtol=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-4, atol=1e-6), name


def test_compiled_training_does_not_recompile_for_each_length(make_ours, tokens, device):
    model = make_ours().train().to(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for seq in (9, 14, 23, 31):
        ids = tokens(2, seq).to(device)
        compiled(ids, labels=ids).loss.backward()
    assert counter.frame_count == 1


def test_compiled_decoding_takes_any_position(make_ours, tokens, rel):
    model = make_ours()
    ids = tokens(2, 9)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = model(ids).logits
        cache = model(ids[:, :3]).cache_params
        for position in range(3, 9):
            logits = compiled(ids[:, position : position + 1].clone(), cache_params=cache).logits
            assert rel(logits[:, 0], expected[:, position]) < 1e-5
    assert counter.frame_count <= 2  # the count of tokens seen becomes dynamic


# --- arguments ---


@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values"])
def test_a_cache_goes_by_any_of_its_names(make_ours, tokens, rel, name):
    model = make_ours()
    ids = tokens(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        for part in (model, model.backbone):
            first = part(ids[:, :6])
            assert getattr(first, name) is first.cache_params
            second = part(ids[:, 6:], **{name: first.cache_params})
            assert second.cache_params is first.cache_params and first.cache_params.get_seq_length() == 9
        logits = model(ids[:, 6:], **{name: model(ids[:, :6]).cache_params}).logits
    assert rel(logits, whole[:, 6:]) < 1e-5


@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values"])
def test_caches_of_other_models_are_refused(make_ours, tokens, name):
    model = make_ours()
    for foreign in (DynamicCache(), StockCache(StockConfig(**model.config.to_dict()), 1), {}):
        with pytest.raises(TypeError, match=f"{name} is a .*; it must be a flash_xlstm.models.xLSTMCache"):
            model(tokens(1, 3), **{name: foreign})
    caches = [xLSTMCache(model.config, 1) for _ in range(2)]
    with pytest.raises(ValueError, match="names of one argument"):
        model(tokens(1, 3), cache_params=caches[0], **{"cache" if name == "cache_params" else name: caches[1]})


@pytest.mark.parametrize("name", ["atention_mask", "caches", "encoder_hidden_states", "head_mask", "label"])
def test_unknown_arguments_are_refused(make_ours, tokens, name):
    model = make_ours()
    ids = tokens(1, 3)
    for part in (model, model.backbone):
        with pytest.raises(TypeError, match=f"{name} is no argument"):
            part(ids, **{name: torch.ones(1, 3)})
        part(ids, **{name: None})  # as generic code passes absent arguments


def test_arguments_that_change_nothing_are_taken(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 3)
    expected = model(ids).logits
    harmless = {"token_type_ids": torch.zeros_like(ids), "output_attentions": False, "is_causal": True}
    harmless.update(output_router_logits=False, cache_position=torch.arange(3), seq_idx=None)
    for name, value in harmless.items():
        assert torch.equal(model(ids, **{name: value}).logits, expected), name
        model.backbone(ids, **{name: value})
    for name, value in {"is_causal": False, "output_router_logits": True}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}; it must be {not value}"):
            model(ids, **{name: value})


@pytest.mark.parametrize(
    "packed",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 2, 3]])},
        {"position_ids": torch.tensor([[0, 1, 9, 3, 4]]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1]])},
        {"position_ids": torch.arange(5).expand(3, 1, 5)},
        {"cache_position": torch.tensor([0, 1, 0, 1, 2])},
        {"max_length_q": 3},
        {"max_length_k": 3},
        {"attention_mask": torch.tensor([[0.0, 0.0, 0.0, float("-inf"), 0.0]])},
        {"attention_mask": torch.ones(1, 5, 5)},
        {"attention_mask": torch.ones(1, 1, 5, 5)},
    ],
    ids=lambda packed: next(iter(packed)),
)
def test_what_is_no_row_of_documents_is_refused(make_ours, tokens, packed):
    model = make_ours()
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match=next(iter(packed))):
            part(tokens(1, 5), **packed)


def test_positions_that_count_up_are_taken(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    counted = mask.cumsum(1) - 1
    right = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(model(ids, position_ids=torch.arange(5)[None]).logits, expected)
        expected = model(ids, attention_mask=mask).logits
        for positions in (counted, counted.masked_fill(mask == 0, 1), torch.arange(5)[None]):
            assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, expected)
        assert model(ids, attention_mask=right, position_ids=(right.cumsum(1) - 1) * right).logits.isfinite().all()
        cache = model(ids).cache_params
        for positions in (torch.tensor([[5], [3]]), torch.tensor([[6]])):
            model(ids[:, :1], cache_params=cache, position_ids=positions)
        with pytest.raises(ValueError, match=r"position_ids must count up .* behind a cache of 7 tokens"):
            model(ids, cache_params=cache, position_ids=torch.arange(5)[None])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids, attention_mask=mask, position_ids=counted).logits, expected)
    with pytest.raises((ValueError, RuntimeError), match="position_ids must count up"):
        compiled(ids, attention_mask=mask, position_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.uint8])
def test_masks_of_any_dtype(make_ours, tokens, dtype):
    model = make_ours()
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    expected = model(tokens(1, 5), attention_mask=mask).logits
    assert torch.equal(model(tokens(1, 5), attention_mask=mask.to(dtype)).logits, expected)
    with pytest.raises(TypeError, match="attention_mask is a dict; it must be a tensor"):
        model(tokens(1, 5), attention_mask={"full_attention": mask})


def test_shifted_labels_and_another_ignored_index(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 6)
    loss = model(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.allclose(model(ids, shift_labels=shifted).loss, loss)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    expected = model(ids, labels=ids, attention_mask=mask).loss
    assert torch.allclose(model(ids, labels=ids, attention_mask=mask, ignore_index=60).loss, expected)


# --- other heads ---


def test_outputs_have_no_attentions(make_ours, tokens):
    model = make_ours()
    for part in (model, model.backbone):
        output = part(tokens(1, 3), output_attentions=True)
        assert output.attentions is None and "attentions" not in output
    out = model.generate(
        tokens(1, 3), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, do_sample=False
    )
    assert out.sequences.shape == (1, 5)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_transformers_generic_heads(make_ours, tokens, tmp_path, monkeypatch, kind):
    generic = getattr(transformers.modeling_layers, f"GenericFor{kind}")
    monkeypatch.setattr(transformers.modeling_layers.AutoModel, "from_config", lambda config: xLSTMModel(config))
    head = type(f"xLSTMFor{kind}", (generic, xLSTMPreTrainedModel), {})
    config = make_ours().config
    config.num_labels = 3
    model = head(config).eval()
    ids = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    where = torch.tensor([0, 2])
    labels = {
        "SequenceClassification": {"labels": where},
        "TokenClassification": {"labels": torch.zeros_like(ids)},
        "QuestionAnswering": {"start_positions": where, "end_positions": where},
    }[kind]
    output = model(ids, attention_mask=mask, output_attentions=True, **labels)
    output.loss.backward()
    assert output.attentions is None
    assert model.model.embeddings.weight.grad.any()
    model.save_pretrained(tmp_path)
    again = head.from_pretrained(tmp_path)
    assert torch.equal(again(ids, attention_mask=mask)[0], model(ids, attention_mask=mask)[0])


class _Quantized(torch.nn.Module):
    """A linear layer with an int8 weight, or one packed to bytes, as quantizing libraries make."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(dtype), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_any_module_serves_as_lm_head(make_ours, tokens, rel):
    model = make_ours(output_logit_soft_cap=None, tie_word_embeddings=True)
    ids = tokens(2, 4)
    own, expected = model.lm_head, model(ids).logits
    for head in (torch.nn.Sequential(own), _Quantized(own, torch.int8), _Quantized(own, torch.float8_e5m2)):
        model.lm_head = head
        model._tie_equal_weights()
        assert rel(model(ids, labels=ids).logits, expected) < 0.2
        with torch.no_grad():
            assert rel(model(ids).logits, expected) < 0.2
    model.lm_head = torch.nn.Identity()
    assert torch.equal(model(ids).logits, model.backbone(ids).last_hidden_state)


def test_errors(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 4)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(2, 4, 128))
    with pytest.raises(ValueError, match=r"input_ids has shape \(4,\); it must be \(batch, seq\)"):
        model(ids[0])
    with pytest.raises(TypeError, match="input_ids has dtype float32; it must be int64 or int32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"inputs_embeds has shape \(4, 128\); it must be \(batch, seq, hidden_size\)"):
        model(inputs_embeds=torch.zeros(4, 128))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(ids, attention_mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 4\)"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"cache_params has 2 layers of shape \(3, "):
        model(ids, cache_params=xLSTMCache(model.config, 3))


@pytest.mark.cuda
@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_cuda_matches_float64(make_ours, in_double, tokens, rel, weight_mode):
    model = make_ours(weight_mode=weight_mode)
    exact = in_double(model)
    ids = tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    expected, gradients = _gradients(exact, ids, attention_mask=mask)
    model.cuda()
    output, cuda_gradients = _gradients(model, ids.cuda(), attention_mask=mask.cuda())
    assert rel(output.logits.cpu()[mask == 1], expected.logits[mask == 1]) < 1e-5
    scale = max(float(g.norm()) for g in gradients.values())
    for name, gradient in gradients.items():
        error = (cuda_gradients[name].cpu() - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * scale, name
    with torch.no_grad():
        cache = model(ids[:, :69].cuda()).cache_params
        assert cache.rnn_state[0][0].device.type == "cuda"
        step = model(ids[:, 69:].cuda(), cache_params=cache).logits
        assert rel(step.cpu(), exact(ids).logits[:, 69:]) < 1e-5


@pytest.mark.cuda
def test_cuda_bfloat16_training_is_no_less_exact_than_transformers(make_ours, make_stock, in_double, tokens, rel):
    # In bfloat16, transformers trains only in this mode, and only whole chunks.
    model = make_ours(mode="train").train()
    ids = tokens(2, 64)
    expected, gradients = _gradients(in_double(model), ids, skip_logits=False)
    theirs = make_stock(model).cuda().bfloat16()
    a, a_gradients = _gradients(model.cuda().bfloat16(), ids.cuda(), skip_logits=False)
    b, b_gradients = _gradients(theirs, ids.cuda())
    assert rel(a.logits.cpu(), expected.logits) < 1.2 * rel(b.logits.cpu(), expected.logits)
    # In both, rounding in later layers affects the gradients of earlier ones.
    for name in ("lm_head.weight", "backbone.blocks.1.ffn.proj_down.weight", "backbone.blocks.1.mlstm_layer.v.weight"):
        exact = gradients[name]
        assert rel(a_gradients[name].cpu(), exact) < 1.3 * rel(b_gradients[name].cpu(), exact), name


@pytest.mark.cuda
def test_cuda_decoding_in_a_graph(make_ours, tokens, rel):
    model = make_ours().cuda()
    ids = tokens(2, 9).cuda()
    with torch.no_grad():
        expected = model(ids).logits
        cache = model(ids[:, :5]).cache_params
        token = ids[:, 5:6].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up on a copy: capture itself runs nothing
            model(token, cache_params=cache.clone())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(token, cache_params=cache).logits
        for position in range(5, 9):
            token.copy_(ids[:, position : position + 1])
            graph.replay()
            assert rel(logits[:, 0], expected[:, position]) < 1e-5


@pytest.mark.cuda
def test_cuda_compiled_training(make_ours, tokens):
    model = make_ours().train().cuda()
    ids = tokens(2, 40).cuda()
    expected, gradients = _gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    output = compiled(ids, labels=ids)
    output.loss.backward()
    assert torch.allclose(output.loss, expected.loss, rtol=1e-5)
    scale = max(float(g.norm()) for g in gradients.values())
    for name, p in model.named_parameters():
        error = (p.grad - gradients[name]).norm()
        assert error < 1e-4 * gradients[name].norm() + 1e-6 * scale, name


# --- pieces of long sequences ---


def test_truncated_backpropagation(make_ours, tokens, rel):
    """Pieces with ``detach`` between them, and the same with the states between them as plain numbers."""
    model, ids = make_ours().train(), tokens(2, 24)

    def gradients(between):
        model.zero_grad()
        cache = xLSTMCache(model.config, 2)
        for piece in ids.split(8, 1):
            model(piece, labels=piece, cache_params=cache, use_cache=True).loss.backward()
            cache = between(cache)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def numbers(cache):
        new = xLSTMCache(model.config, 2)
        with torch.no_grad():
            return new.copy_(cache)

    assert torch.equal(gradients(lambda cache: cache.detach()), gradients(numbers))
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(lambda cache: cache)


@torch.no_grad()
def test_a_row_begins_anew(make_ours, tokens, rel):
    model, cache = make_ours(), None
    a, b = tokens(3, 9), tokens(3, 5, seed=1)
    cache = model(a, use_cache=True).cache_params
    whole = model(torch.cat([a, b], 1)).logits[:, 9:]
    cache.reset([1])
    logits = model(b, cache_params=cache).logits
    assert rel(logits[[0, 2]], whole[[0, 2]]) < 1e-5 and rel(logits[1], model(b[1:2]).logits[0]) < 1e-5
