"""The decoding loop against transformers' own, which every model here can be made to take."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from flash_xlstm.models import decoding

GREEDY = {"do_sample": False, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stock_loop(monkeypatch):
    """``stock_loop(model, ids, **options)``: what ``generate`` gives by transformers' loop."""

    def run(model, ids, **options):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_loop_serves", lambda *args: False)
            return model.generate(ids, **options)

    return run


@pytest.fixture
def late_messages(monkeypatch):
    """Messages that reach the host as late as it lets them, as from a slow device."""

    class Late(decoding.Message):
        def ready(self):
            return False

    monkeypatch.setattr(decoding, "Message", Late)


@pytest.fixture
def on_time(request):
    return request.getfixturevalue("late_messages") if request.param == "late" else None


MESSAGES = pytest.mark.parametrize("on_time", ["at once", "late"], indirect=True)


def likely_tokens(model, ids, count):
    """Tokens that greedy search makes, by the step at which each row makes them."""
    return model.generate(ids, max_new_tokens=count, eos_token_id=None, **GREEDY)[:, ids.shape[1] :]


def same_cache(ours, theirs, **tolerance):
    """Whether the rows that ended last have the state that transformers' loop gives; it lets others read padding."""
    assert ours.get_seq_length() == theirs.get_seq_length() and ours.slots is None
    last = slice(None) if ours.unread is None else ours.unread == 0
    for mine, other in zip(ours.rnn_state.values(), theirs.rnn_state.values(), strict=True):
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a[last], b[last], **{"rtol": 0, "atol": 0, **tolerance})


@MESSAGES
@pytest.mark.parametrize("step", [0, 1, 3, 7, 15, 16, 17, 30])
def test_stops_where_the_last_row_ends(make_ours, tokens, stock_loop, on_time, step):
    model, ids = make_ours(), tokens(2, 5)
    made = likely_tokens(model, ids, 40)
    options = {"max_new_tokens": 40, "eos_token_id": sorted({int(t) for t in made[:, step]}), **GREEDY}
    options["return_dict_in_generate"] = True
    expected, actual = stock_loop(model, ids, **options), model.generate(ids, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    same_cache(actual.past_key_values, expected.past_key_values)
    assert actual.past_key_values.get_seq_length() == actual.sequences.shape[1] - 1


@MESSAGES
def test_rows_that_end_early_are_padded(make_ours, tokens, stock_loop, on_time):
    model, ids = make_ours(), tokens(3, 5)
    made = likely_tokens(model, ids, 24)
    for eos in made[:, 4].tolist():
        options = {"max_new_tokens": 24, "eos_token_id": eos, **GREEDY}
        assert torch.equal(model.generate(ids, **options), stock_loop(model, ids, **options))


@pytest.mark.parametrize("new", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("eos", [None, 2])
def test_any_number_of_tokens(make_ours, tokens, stock_loop, new, eos):
    model, ids = make_ours(), tokens(2, 3)
    options = {"max_new_tokens": new, "eos_token_id": eos, **GREEDY}
    assert torch.equal(model.generate(ids, **options), stock_loop(model, ids, **options))


def test_the_host_stays_few_steps_ahead(make_ours, tokens, late_messages, monkeypatch):
    model, ids = make_ours(), tokens(1, 5)
    eos = int(likely_tokens(model, ids, 1)[0, 0])
    steps = []
    forward = decoding.Decoder.forward
    monkeypatch.setattr(decoding.Decoder, "forward", lambda self, m: steps.append(0) or forward(self, m))
    options = {"max_new_tokens": 100, "eos_token_id": eos, **GREEDY}
    assert model.generate(ids, **options).shape == (1, 6)
    assert 0 < len(steps) <= decoding.CHECK_EVERY * (decoding.CHECKS_AHEAD + 1)


@MESSAGES
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01},
        {"do_sample": True, "repetition_penalty": 1.5, "top_k": 0},
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 61))},
        {"forced_eos_token_id": 5, "suppress_tokens": [7, 8]},
    ],
    ids=str,
)
def test_chooses_as_transformers_does(make_ours, tokens, stock_loop, options, on_time):
    model, ids = make_ours(), tokens(2, 6)
    options = {"eos_token_id": [2, 11], **GREEDY, "max_new_tokens": 20, **options}
    torch.manual_seed(0)
    expected = stock_loop(model, ids, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, **options), expected)


class _FourOf(StoppingCriteria):
    """Ends a row after four tokens of a kind."""

    def __init__(self, kinds):
        self.kinds = torch.tensor(kinds)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids, self.kinds).sum(-1) >= 4


@MESSAGES
@pytest.mark.parametrize("eos", [None, 2])
def test_stopping_criteria(make_ours, tokens, stock_loop, on_time, eos):
    model, ids = make_ours(), tokens(2, 6)
    criteria = StoppingCriteriaList([_FourOf(range(0, 61, 3))])
    options = {"max_new_tokens": 40, "eos_token_id": eos, "stopping_criteria": criteria, **GREEDY}
    expected = stock_loop(model, ids, **options)
    assert 6 < expected.shape[1] < 46
    assert torch.equal(model.generate(ids, **options), expected)
    assert model.generate(ids, max_time=0.0, max_new_tokens=9, **GREEDY).shape == (2, 7)


class _Collect(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


@MESSAGES
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}], ids=str)
def test_streamers_get_every_token(make_ours, tokens, options, on_time):
    model, ids = make_ours(), tokens(1, 6)
    eos = int(likely_tokens(model, ids, 20)[0, 17])
    options = {"max_new_tokens": 40, "eos_token_id": eos, **GREEDY, **options}
    expected, streamer = model.generate(ids, **options), _Collect()
    assert torch.equal(model.generate(ids, streamer=streamer, **options), expected)
    assert streamer.ended and torch.equal(streamer.values[0], ids)
    assert all(value.shape == (1,) and not value.is_cuda for value in streamer.values[1:])
    assert torch.equal(torch.cat(streamer.values[1:]), expected[0, 6:])


@MESSAGES
def test_stream_iterates(make_ours, tokens, on_time):
    model, ids = make_ours(), tokens(2, 6)
    options = {"max_new_tokens": 21, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options)
    made = list(model.stream(ids, **options))
    assert torch.equal(torch.stack(made, 1), expected[:, 6:])
    assert not any(t.requires_grad for t in made)

    first = model.stream(ids, **options)
    assert torch.equal(next(first), expected[:, 6])
    first.close()
    # Two at once keep to themselves.
    others = [model.stream(tokens(2, 6, seed=s), **options) for s in (0, 1)]
    pairs = list(zip(*others, strict=True))
    assert torch.equal(torch.stack([a for a, _ in pairs], 1), expected[:, 6:])
    alone = model.generate(tokens(2, 6, seed=1), **options)
    assert torch.equal(torch.stack([b for _, b in pairs], 1), alone[:, 6:])


def test_stream_needs_the_loop(make_ours, tokens):
    model, ids = make_ours(), tokens(1, 6)
    with pytest.raises(ValueError, match=r"stream\(\) needs greedy search or sampling with a cache"):
        model.stream(ids, use_cache=False, max_new_tokens=3, **GREEDY)


def test_under_inference_mode_and_back(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 6)
    options = {"max_new_tokens": 9, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)


def test_models_that_have_generated_can_be_copied(make_ours, tokens):
    model, ids = make_ours(), tokens(1, 6)
    options = {"max_new_tokens": 9, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options)
    assert torch.equal(copy.deepcopy(model).generate(ids, **options), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model)).generate(ids, **options), expected)
    assert model in decoding._decoders
    model.release_graphs()
    assert model not in decoding._decoders
    assert torch.equal(model.generate(ids, **options), expected)


# --- graphs, without a GPU --------------------------------------------------------------------------------------------


class _Recorded:
    """In place of a captured graph: runs the step, and counts."""

    def __init__(self, decoder, model, choice, logits):
        self.arguments, self.logits, self.replays = (decoder, model, choice), logits, 0

    def replay(self):
        decoder, model, choice = self.arguments
        self.logits.copy_(decoder.forward(model))
        if choice.key is not None:
            decoder.choose(self.logits, choice)
        self.replays += 1


@pytest.fixture
def recorded_graphs(monkeypatch):
    """Makes sessions on the CPU use graphs that are none; gives those made."""
    made = {}

    def graph(self, model, choice):
        key = (id(self), choice.key)
        if key not in made:
            self.reset(going=False)
            logits = self.forward(model)  # leaves rubbish in the tensors of the decoder, as capture does
            made[key] = _Recorded(self, model, choice, logits)
        return made[key], made[key].logits

    monkeypatch.setattr(decoding.Decoder, "graph", graph)
    create = decoding.Session.__init__

    def with_graph(self, *args, **kwargs):
        create(self, *args, **{**kwargs, "use_graph": True})

    monkeypatch.setattr(decoding.Session, "__init__", with_graph)
    return made


@MESSAGES
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}, {"do_sample": True, "top_k": 5}], ids=str)
def test_graphs_are_captured_once_and_replayed(make_ours, tokens, stock_loop, recorded_graphs, options, on_time):
    model = make_ours()
    eos = int(likely_tokens(model, tokens(2, 6), 20)[0, 17])
    recorded_graphs.clear()
    for seed, new in ((0, 40), (1, 17), (2, 40)):
        ids = tokens(2, 6, seed=seed)
        given = {"max_new_tokens": new, "eos_token_id": eos, **GREEDY, **options, "return_dict_in_generate": True}
        torch.manual_seed(0)
        expected = stock_loop(model, ids, **given)
        torch.manual_seed(0)
        actual = model.generate(ids, **given)
        assert torch.equal(actual.sequences, expected.sequences)
        same_cache(actual.past_key_values, expected.past_key_values)
    assert len(recorded_graphs) == 1
    assert next(iter(recorded_graphs.values())).replays > 40
    model.generate(tokens(3, 6), **{**given, "max_new_tokens": 9})
    assert len(recorded_graphs) == 2


def test_a_short_generation_does_not_capture(make_ours, tokens, recorded_graphs):
    make_ours().generate(tokens(1, 6), max_new_tokens=decoding.STEPS_TO_CAPTURE, **GREEDY)
    assert not recorded_graphs


def test_a_user_cache_is_advanced_though_a_graph_has_its_own(make_ours, tokens, recorded_graphs):
    model, ids = make_ours(), tokens(2, 20)
    options = {"eos_token_id": None, **GREEDY}
    expected = model.generate(ids, max_new_tokens=20, **options)
    with torch.no_grad():
        cache = model(ids[:, :13]).cache_params
    first = model.generate(ids, cache_params=cache, max_new_tokens=9, **options)
    assert cache.get_seq_length() == 28
    assert torch.equal(model.generate(first, cache_params=cache, max_new_tokens=11, **options), expected)


def test_falls_back_where_capture_fails_and_tries_again(make_ours, tokens, stock_loop, recorded_graphs, monkeypatch):
    model, ids = make_ours(), tokens(2, 6)
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    graph, tried = decoding.Decoder.graph, []

    def fail(self, model, choice):
        tried.append(self)
        self.reset(going=False)
        self.forward(model)
        # The numbers of an out-of-memory error differ from one to the next.
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {len(tried)}.00 MiB")

    monkeypatch.setattr(decoding.Decoder, "graph", fail)
    cache = model(ids[:, :3]).cache_params
    for given in ({}, {"cache_params": cache}):
        with pytest.warns(UserWarning, match="without a CUDA graph.*out of memory") if not given else nullcontext():
            actual = model.generate(ids, **options, **given)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(actual, model.generate(ids, **options))
        assert torch.equal(actual, stock_loop(model, ids, **options))
    assert len(tried) == 4
    assert cache.get_seq_length() == 17 and cache.slots is None
    assert all(decoder.nbytes == 0 and decoder.cache is None for decoder in tried)

    monkeypatch.setattr(decoding.Decoder, "graph", graph)
    recorded_graphs.clear()
    assert torch.equal(actual, model.generate(ids, **options))
    assert next(iter(recorded_graphs.values())).replays == 11


def test_keys_of_choices():
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

    warm = [decoding.Choice([TemperatureLogitsWarper(t), TopKLogitsWarper(5)], True) for t in (0.5, 0.5, 0.6)]
    assert warm[0].key == warm[1].key != warm[2].key
    assert decoding.Choice([RepetitionPenaltyLogitsProcessor(1.5)]).key is None
    assert decoding.Choice(criteria=[_FourOf([1])]).key is None
    assert decoding.Choice(eos=(1,)).key != decoding.Choice(eos=(2,)).key


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("config", [{}, {"weight_mode": "fused"}, {"inference_state_dtype": "bfloat16"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.7}, {"do_sample": True, "top_k": 5}], ids=str)
def test_cuda_graphs_give_what_the_stock_loop_does(make_ours, tokens, stock_loop, config, options):
    model = make_ours(**config).cuda()
    eos = int(likely_tokens(model, tokens(2, 6).cuda(), 20)[0, 17])
    for seed, new in ((0, 40), (1, 17), (2, 40)):
        ids = tokens(2, 6, seed=seed).cuda()
        given = {"max_new_tokens": new, "eos_token_id": eos, **GREEDY, **options, "return_dict_in_generate": True}
        torch.manual_seed(0)
        expected = stock_loop(model, ids, **given)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            actual = model.generate(ids, **given)
        assert torch.equal(actual.sequences, expected.sequences)
        same_cache(actual.past_key_values, expected.past_key_values, rtol=1e-3, atol=1e-3)
    (decoder,) = decoding._decoders[model]._idle.values()
    assert len(decoder._graphs) == 2  # with and without an end token, or processors between the steps


@pytest.mark.cuda
def test_cuda_graphs_follow_the_weights(make_ours, tokens):
    model, ids = make_ours().cuda(), tokens(2, 6).cuda()
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
    model.generate(ids, **options)
    other = make_ours(seed=5)
    expected = other.generate(ids.cpu(), **options)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(ids, **options).cpu(), expected)
    model.set_weight_mode("fused")  # new parameters
    assert torch.equal(model.generate(ids, **options).cpu(), expected)


@pytest.mark.cuda
def test_cuda_stream(make_ours, tokens):
    model, ids = make_ours().cuda(), tokens(2, 6).cuda()
    options = {"max_new_tokens": 40, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options).cpu()
    assert torch.equal(torch.stack(list(model.stream(ids, **options)), 1), expected[:, 6:])


@pytest.mark.cuda
def test_cuda_bfloat16_logits_agree_with_the_eager_path(make_ours, tokens, rel):
    model, ids = make_ours().cuda().bfloat16(), tokens(2, 6).cuda()
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY, "return_dict_in_generate": True}
    graph = model.generate(ids, **options)
    with torch.no_grad():
        whole = model(graph.sequences).logits
    picked = whole[:, 5:-1].gather(-1, graph.sequences[:, 6:, None])
    assert (whole[:, 5:-1].amax(-1, keepdim=True) - picked).max() < 3e-2 * whole.abs().max()
