from __future__ import annotations

import pytest
import torch

from flash_xlstm.models import xLSTMCache

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        pytest.param({}, 7, id="short"),
        pytest.param({}, 35, id="long-odd"),
        pytest.param({}, 1, id="one-token"),
        pytest.param({"num_heads": 4, "use_bias": True}, 16, id="4-heads-biases"),
        pytest.param({"weight_mode": "fused"}, 18, id="fused"),
    ],
)
def test_greedy_matches_transformers(make_ours, make_stock, tokens, config, prompt):
    ours = make_ours(**config)
    ids = tokens(2, prompt)
    expected = make_stock(ours).generate(ids, max_new_tokens=24, **GREEDY)
    assert torch.equal(ours.generate(ids, max_new_tokens=24, **GREEDY), expected)
    assert torch.equal(ours.generate(ids, max_new_tokens=24, use_cache=False, **GREEDY), expected)


def test_left_padded_batch_generates_what_each_prompt_alone_does(make_ours, tokens):
    model = make_ours()
    prompts = [tokens(1, n, seed=n) for n in (3, 17, 26)]
    length = max(p.shape[1] for p in prompts)
    ids = torch.cat([torch.nn.functional.pad(p, (length - p.shape[1], 0), value=1) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (length - p.shape[1], 0)) for p in prompts])
    together = model.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY)
    without_cache = model.generate(ids, attention_mask=mask, max_new_tokens=16, use_cache=False, **GREEDY)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=16, **GREEDY)[0, prompt.shape[1] :]
        assert torch.equal(together[row, length:], alone)
        assert torch.equal(without_cache[row, length:], alone)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_prompts_that_end_with_padding_are_refused(make_ours, tokens, options):
    model, ids = make_ours(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with pytest.raises(ValueError, match=r"attention_mask is 0 at the last token .* pad prompts on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, **GREEDY, **options)


def test_default_attention_mask_ignores_padding(make_ours, tokens):
    # generate() makes the mask itself where the prompt holds pad tokens
    model = make_ours()
    prompt = tokens(1, 9)
    padded = torch.nn.functional.pad(prompt, (4, 0), value=1)
    options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 1, "min_new_tokens": 10, "max_new_tokens": 10}
    assert torch.equal(model.generate(padded, **options)[:, 13:], model.generate(prompt, **options)[:, 9:])


def test_beam_search_with_a_cache(make_ours, make_stock, tokens):
    ours = make_ours()
    ids = tokens(2, 9)
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 14}
    with_cache = ours.generate(ids, **options)
    assert with_cache.shape == (4, 23)
    assert torch.equal(with_cache, ours.generate(ids, use_cache=False, **options))
    assert torch.equal(with_cache, make_stock(ours).generate(ids, use_cache=False, **options))
    assert not torch.equal(with_cache[::2], ours.generate(ids, max_new_tokens=14, **GREEDY))


def test_beam_search_on_a_left_padded_batch(make_ours, tokens):
    model = make_ours()
    short, long = tokens(1, 4, seed=1), tokens(1, 11, seed=2)
    ids = torch.cat([torch.nn.functional.pad(short, (7, 0), value=1), long])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    together = model.generate(ids, attention_mask=mask, **options)[:, 11:]
    assert torch.equal(together[0], model.generate(short, **options)[0, 4:])
    assert torch.equal(together[1], model.generate(long, **options)[0, 11:])


def test_sampling_does_not_depend_on_the_cache(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 6)
    options = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8, "max_new_tokens": 12}
    options |= {"eos_token_id": None, "pad_token_id": 1, "num_return_sequences": 2}
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        samples.append(model.generate(ids, use_cache=use_cache, **options))
    assert torch.equal(*samples)
    assert not torch.equal(samples[0][0], samples[0][1])


def test_from_embeddings(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 8)
    expected = model.generate(ids, max_new_tokens=10, **GREEDY)
    embeds = model.get_input_embeddings()(ids)
    alone = model.generate(inputs_embeds=embeds, max_new_tokens=10, **GREEDY)
    assert torch.equal(alone, expected[:, 8:])
    both = model.generate(ids, inputs_embeds=embeds, max_new_tokens=10, **GREEDY)
    assert torch.equal(both, expected)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    masked = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, **GREEDY)
    assert torch.equal(masked[0], model.generate(ids[:1, 3:], max_new_tokens=10, **GREEDY)[0, 5:])
    no_cache = model.generate(inputs_embeds=embeds, max_new_tokens=10, use_cache=False, **GREEDY)
    assert torch.equal(no_cache, alone)


def test_continuing_from_a_returned_cache(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 8)
    expected = model.generate(ids, max_new_tokens=20, **GREEDY)
    first = model.generate(ids, max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
    cache = first.past_key_values
    assert cache.get_seq_length() == 8 + 9 - 1  # the last token has not been read
    rest = {"max_new_tokens": 11, **GREEDY}
    assert torch.equal(model.generate(first.sequences, cache_params=cache.clone(), **rest), expected)
    assert torch.equal(model.generate(first.sequences, past_key_values=cache.clone(), **rest), expected)

    new, mask = first.sequences[:, -1:], torch.ones_like(first.sequences)
    only_new = model.generate(new, attention_mask=mask, cache_params=cache.clone(), **rest)
    assert torch.equal(only_new, expected[:, 16:])

    embeds = model.get_input_embeddings()(first.sequences)
    assert torch.equal(model.generate(inputs_embeds=embeds, cache_params=cache.clone(), **rest), expected[:, 17:])


def test_continuing_with_a_prompt_of_several_tokens(make_ours, tokens):
    model = make_ours()
    ids = tokens(2, 20)
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)
    with torch.no_grad():
        cache = model(ids[:, :13]).cache_params
    assert torch.equal(model.generate(ids, cache_params=cache.clone(), max_new_tokens=8, **GREEDY), expected)
    mask = torch.ones_like(ids)
    new = model.generate(ids[:, 13:], attention_mask=mask, cache_params=cache.clone(), max_new_tokens=8, **GREEDY)
    assert torch.equal(new, expected[:, 13:])
    # one cached prompt, several beams
    beams = {"num_beams": 3, "max_new_tokens": 6, **GREEDY}
    assert torch.equal(model.generate(ids, cache_params=cache.clone(), **beams), model.generate(ids, **beams))


def test_a_cache_that_does_not_fit_the_inputs(make_ours, tokens):
    model = make_ours()
    with torch.no_grad():
        cache = model(tokens(1, 6)).cache_params
    with pytest.raises(ValueError, match=r"input.* has 6 tokens.*cache_params has seen 6"):
        model.generate(tokens(1, 6), cache_params=cache, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="attention_mask 9, but"):
        model.generate(tokens(1, 5), attention_mask=torch.ones(1, 9), cache_params=cache, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize("name", ["cache_params", "cache", "past_key_values"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_caches_of_other_classes(make_ours, tokens, name, options):
    from transformers import DynamicCache
    from transformers.models.xlstm.modeling_xlstm import xLSTMCache as StockCache

    model, ids = make_ours(), tokens(1, 6)
    for foreign in (DynamicCache(), StockCache(model.config, 1)):
        with pytest.raises(TypeError, match=rf"{name} is a transformers\..*Cache; it must be a flash_xlstm"):
            model.generate(ids, max_new_tokens=2, **{name: foreign}, **options, **GREEDY)


def test_inputs_of_a_wrong_shape(make_ours, tokens):
    model, ids = make_ours(), tokens(1, 6)
    with pytest.raises(ValueError, match=r"inputs is of shape \(6,\); expected \(batch, tokens\)"):
        model.generate(ids[0], max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match=r"input_ids is of shape \(6,\)"):
        next(model.stream(input_ids=ids[0], max_new_tokens=2))
    with pytest.raises(
        ValueError, match=r"inputs_embeds is of shape \(1, 6\); expected \(batch, tokens, hidden_size\)"
    ):
        model.generate(inputs_embeds=ids.float(), max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match=r"attention_mask is of shape \(6,\)"):
        model.generate(ids, attention_mask=torch.ones(6), max_new_tokens=2, **GREEDY)
    with torch.no_grad():
        cache = model(ids).cache_params
    with pytest.raises(ValueError, match="cache_params needs inputs"):
        model.generate(cache_params=cache, max_new_tokens=2, **GREEDY)
    assert cache.get_seq_length() == 6


def test_scores_and_hidden_states(make_ours, tokens):
    model = make_ours()
    output = model.generate(
        tokens(1, 5),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        **GREEDY,
    )
    assert [s.shape for s in output.scores] == [(1, 61)] * 3
    assert [layers[0].shape[1] for layers in output.hidden_states] == [5, 1, 1]


def test_mode_train_without_states_cannot_use_a_cache(make_ours, tokens):
    model = make_ours(mode="train", return_last_states=False)
    with pytest.raises(ValueError, match="mode is 'train'"):
        model.generate(tokens(1, 5), max_new_tokens=3, **GREEDY)
    expected = make_ours().generate(tokens(1, 5), max_new_tokens=3, **GREEDY)
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=3, use_cache=False, **GREEDY), expected)


def test_prompts_longer_than_a_piece(make_ours, tokens):
    ids = tokens(2, 21)
    expected = make_ours().generate(ids, max_new_tokens=8, **GREEDY)
    pieces = make_ours(max_inference_chunksize=4)
    assert torch.equal(pieces.generate(ids, max_new_tokens=8, **GREEDY), expected)


def test_one_saved_prompt_begins_many(make_ours, tokens, tmp_path):
    model, prefix = make_ours(), tokens(1, 13)
    with torch.no_grad():
        model(prefix).cache_params.save(tmp_path / "prefix")
    loaded = xLSTMCache.load(tmp_path / "prefix", model.config)
    questions = tokens(3, 4, seed=1)
    whole = torch.cat([prefix.expand(3, -1), questions], 1)
    options = {"max_new_tokens": 8, **GREEDY}
    actual = model.generate(whole, cache_params=loaded.expand(3), **options)
    assert torch.equal(actual, model.generate(whole, **options))
    assert loaded.get_seq_length() == 13 and loaded.batch_size == 1


def test_a_cache_of_another_model_is_refused_and_stays_as_it_is(make_ours, tokens):
    with torch.no_grad():
        cache = make_ours(num_heads=1).backbone(tokens(1, 6)).cache_params
        before = cache.clone()
        with pytest.raises(ValueError, match="cache_params has 2 layers of shape"):
            make_ours()(tokens(1, 1), cache_params=cache)
    for state, was in zip(cache.rnn_state.values(), before.rnn_state.values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state, was, strict=True))
    assert cache.get_seq_length() == 6


def test_prefill_embeds_and_keeps_no_more_than_a_piece(make_ours, tokens):
    model, ids = make_ours(max_inference_chunksize=4), tokens(2, 30)
    seen, kept = [], []
    model.backbone.embeddings.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    model.backbone.register_forward_hook(lambda module, args, out: kept.append(out.last_hidden_state))
    with torch.no_grad():
        last = model(ids, logits_to_keep=3).logits
    assert max(seen) == 4 and sum(seen) == 30
    assert kept[0].shape[1] == 3 and kept[0].untyped_storage().nbytes() == kept[0].numel() * 4
    with torch.no_grad():
        assert torch.allclose(last, model(ids).logits[:, -3:], atol=1e-5)
        for keep in (1, 2, 4, 5, 9, 30, 99):
            assert torch.allclose(model(ids, logits_to_keep=keep).logits, model(ids).logits[:, -keep:], atol=1e-5)


@pytest.mark.cuda
def test_cuda_prefill_takes_constant_memory(make_ours, tokens):
    model = make_ours(max_inference_chunksize=256).cuda()
    peaks = []
    for seq in (1024, 4096):
        ids = tokens(1, seq).cuda()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model(ids, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + 2**17  # far below the 1.5 MiB of hidden states of 3,072 more tokens


@pytest.mark.cuda
@pytest.mark.parametrize("num_beams", [1, 3])
def test_cuda_generates_what_float64_does(make_ours, in_double, tokens, num_beams):
    model = make_ours()
    ids = tokens(3, 21)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"max_new_tokens": 24, "num_beams": num_beams, **GREEDY}
    expected = in_double(model).generate(ids, attention_mask=mask, **options)
    actual = model.cuda().generate(ids.cuda(), attention_mask=mask.cuda(), **options)
    assert torch.equal(actual.cpu(), expected)
