"""The decoding loop against transformers' own loop."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from flash_xlstm.models import decoding

GREEDY = {"do_sample": False, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small need one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stock_loop(monkeypatch):
    """``stock_loop(model, ids, **options)``: the result of ``generate`` by transformers' loop."""

    def run(model, ids, **options):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "_loop_serves", lambda *args: False)
            return model.generate(ids, **options)

    return run


@pytest.fixture
def late_messages(monkeypatch):
    """Messages that reach the host as late as possible, as from a slow device."""

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
    """Whether the rows that ended last have the state of transformers' loop. In that loop other rows read padding."""
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


def ends_in_turn(model, ids, new):
    """End tokens for which the rows of a batch end after different numbers of new tokens, none at the last step."""
    made = likely_tokens(model, ids, new)
    for row in range(len(ids)):
        for token in made[row].tolist():
            first = [r.tolist().index(token) if token in r.tolist() else new for r in made]
            if len(set(first)) == len(ids) and max(first) == new and min(first) > 1:
                return token
    raise AssertionError("no such token; choose another seed")


def states(cache, row):
    return [t[row] for state in cache.rnn_state.values() for t in state]


@MESSAGES
@pytest.mark.parametrize("config", [{}, {"step_kernel": "native", "use_bias": True}], ids=["block step", "layers"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.0001}, {"criteria": True}], ids=str)
def test_rows_stay_where_they_ended(make_ours, tokens, stock_loop, tmp_path, on_time, config, options):
    model, ids = make_ours(**config), tokens(3, 5)
    eos = ends_in_turn(model, ids, 24)
    options = dict(options)
    if options.pop("criteria", False):
        options["stopping_criteria"] = StoppingCriteriaList([lambda seen, scores: False])
    options |= {"eos_token_id": eos, "max_new_tokens": 24, **GREEDY, "return_dict_in_generate": True}
    out = model.generate(ids, **options)
    assert torch.equal(out.sequences, stock_loop(model, ids, **options).sequences)

    cache, total = out.past_key_values, out.sequences.shape[1]
    lengths = [5 + r.tolist().index(eos) + 1 if eos in r.tolist() else total for r in out.sequences[:, 5:]]
    assert len(set(lengths)) == 3 and cache.get_seq_length() == total - 1
    assert (total - 1 - cache.unread).tolist() == [length - 1 for length in lengths]
    for row, length in enumerate(lengths):  # all but the last token, the end token
        with torch.no_grad():
            alone = model(out.sequences[row : row + 1, : length - 1]).cache_params
        torch.testing.assert_close(states(cache, row), states(alone, 0), rtol=1e-4, atol=1e-5)

    # The next turn: the whole sequence, or the new tokens with each row's last one before them.
    turn = tokens(3, 4, seed=7)
    whole = torch.cat([out.sequences, turn], 1)
    mask = torch.ones_like(whole)
    for row, length in enumerate(lengths):
        mask[row, length:total] = 0
    plain = {"max_new_tokens": 6, "eos_token_id": None, **GREEDY}
    expected = model.generate(whole, attention_mask=mask, **plain)[:, -6:]
    ours = model.generate(whole, attention_mask=mask, cache_params=cache.clone(), **plain)
    assert torch.equal(ours[:, -6:], expected)
    beams = {**plain, "num_beams": 2}
    ours = model.generate(whole, attention_mask=mask, cache_params=cache.clone(), **beams)
    assert torch.equal(ours, model.generate(whole, attention_mask=mask, **beams))
    last = torch.stack([out.sequences[row, length - 1] for row, length in enumerate(lengths)])
    seen = torch.cat([mask[:, : total - 1], torch.ones(3, 5, dtype=mask.dtype)], 1)
    new = torch.cat([last[:, None], turn], 1)
    advanced = cache.clone()
    ours = model.generate(new, attention_mask=seen, cache_params=advanced, **plain)
    assert torch.equal(ours[:, -6:], expected) and advanced.unread is None

    # Each row keeps its number of unread tokens.
    cache.save(tmp_path / "turn")
    for other in (type(cache).load(tmp_path / "turn"), cache.expand(2)):
        assert torch.equal(other.unread[:: len(other.unread) // 3], cache.unread)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    ours = model.generate(whole[[2, 0, 1]], attention_mask=mask[[2, 0, 1]], cache_params=cache, **plain)
    assert torch.equal(ours[:, -6:], expected[[2, 0, 1]])


def test_a_stream_left_early_leaves_its_cache_usable(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 6)
    options = {"eos_token_id": None, **GREEDY}
    expected = model.generate(ids, max_new_tokens=12, **options)
    with torch.no_grad():
        cache = model(ids[:, :3]).cache_params
    stream = model.stream(ids, cache_params=cache, max_new_tokens=12, **options)
    made = [next(stream) for _ in range(4)]
    stream.close()
    seen = torch.cat([ids, torch.stack(made, 1)], 1)
    assert cache.get_seq_length() == 9 and cache.slots is None
    assert torch.equal(model.generate(seen, cache_params=cache, max_new_tokens=8, **options), expected)


# --- criteria and processors of users' own ----------------------------------------------------------------------------


class _At(StoppingCriteria):
    """Ends at a length, and returns that in an unusual form."""

    def __init__(self, length, form):
        self.length, self.form, self.seen = length, form, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(scores)
        ended = [input_ids.shape[1] >= self.length + row for row in range(len(input_ids))]
        return self.form(ended)


FORMS = {
    "bool": (lambda ended: all(ended), True),
    "int": (lambda ended: int(all(ended)), True),
    "numpy bool": (lambda ended: np.all(ended), False),
    "0-d tensor": (lambda ended: torch.tensor(all(ended)), True),
    "1 row": (lambda ended: torch.tensor([all(ended)]), True),
    "int tensor": (lambda ended: torch.tensor(ended).long(), True),
    "list": (lambda ended: ended, False),
    "array": (lambda ended: np.array(ended), False),
    "column": (lambda ended: torch.tensor(ended)[:, None], False),
}


@pytest.mark.parametrize(("form", "stock_takes_it"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("eos", [None, 2])
def test_what_stopping_criteria_may_give(make_ours, tokens, stock_loop, form, stock_takes_it, eos):
    model, ids = make_ours(), tokens(2, 6)
    options = {"max_new_tokens": 30, "eos_token_id": eos, **GREEDY}
    stock = form if stock_takes_it else lambda ended: torch.as_tensor(form(ended)).flatten()
    expected = stock_loop(model, ids, stopping_criteria=[_At(12, stock)], **options)
    assert expected.shape[1] == 13
    criterion = _At(12, form)
    assert torch.equal(model.generate(ids, stopping_criteria=[criterion], **options), expected)
    assert criterion.seen == [None] * 7


@pytest.mark.parametrize("given", [None, "yes", [True] * 3, torch.zeros(2, 2)], ids=str)
def test_stopping_criteria_that_give_something_else(make_ours, tokens, given):
    with pytest.raises(TypeError, match=r"the stopping criterion _At gave .*; it must be 2 booleans"):
        make_ours().generate(tokens(2, 6), stopping_criteria=[_At(9, lambda ended: given)], max_new_tokens=5, **GREEDY)


class _LateEnd(EosTokenCriteria):
    """An end token ends a row only from some length on."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores, **kwargs) & (input_ids.shape[1] > 14)


class _Longer(MaxLengthCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids[:, 2:], scores, **kwargs)


def test_subclasses_of_criteria_are_asked(make_ours, tokens, stock_loop):
    model, ids = make_ours(), tokens(2, 6)
    often = list(range(3, 40))
    for criteria, config in (
        ([_LateEnd(often)], {"eos_token_id": None, "max_new_tokens": 30}),
        ([_LateEnd(often)], {"eos_token_id": 2, "max_new_tokens": 30}),
        ([_Longer(12)], {"eos_token_id": None, "max_new_tokens": 30}),
        ([_Longer(50)], {"eos_token_id": None, "max_new_tokens": 30}),
        ([EosTokenCriteria(often)], {"eos_token_id": None, "max_new_tokens": 30}),
        ([MaxLengthCriteria(9)], {"eos_token_id": None, "max_new_tokens": 30}),
    ):
        options = {**GREEDY, **config, "stopping_criteria": criteria}
        assert torch.equal(model.generate(ids, **options), stock_loop(model, ids, **options)), criteria


def test_an_end_token_needs_padding(make_ours, tokens):
    criteria = [EosTokenCriteria([2])]
    with pytest.raises(ValueError, match="pad_token_id is None"):
        make_ours(pad_token_id=None, eos_token_id=None).generate(
            tokens(2, 6), stopping_criteria=criteria, max_new_tokens=5, do_sample=False
        )


# --- nothing to draw from ---------------------------------------------------------------------------------------------


class _Ruin(LogitsProcessor):
    def __init__(self, value, length, row=1):
        self.value, self.length, self.row = value, length, row

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= self.length:
            scores[self.row] = self.value
        return scores


@MESSAGES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("eos", [None, 2])
def test_sampling_from_no_distribution_raises(make_ours, tokens, stock_loop, on_time, value, eos):
    model, ids = make_ours(), tokens(2, 6)
    options = {"do_sample": True, "max_new_tokens": 30, "eos_token_id": eos, "pad_token_id": 1}
    ruin = [_Ruin(value, 9)]
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        stock_loop(model, ids, logits_processor=ruin, **options)
    with pytest.raises(RuntimeError, match=r"cannot sample: for row\(s\) \[1\] the logits hold NaN or inf"):
        model.generate(ids, logits_processor=ruin, **options)
    made = []
    with pytest.raises(RuntimeError, match="cannot sample"):
        made.extend(model.stream(ids, logits_processor=ruin, **options))
    torch.manual_seed(0)
    model.generate(ids, logits_processor=[_Ruin(value, 99)], **options)  # the decoder no longer reports it
    options["do_sample"] = False
    assert torch.equal(
        model.generate(ids, logits_processor=ruin, **options), stock_loop(model, ids, logits_processor=ruin, **options)
    )


def test_sampling_from_nan_weights_raises(make_ours, tokens, recorded_graphs):
    model, ids = make_ours(), tokens(2, 6)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for new in (1, 40):
        with pytest.raises(RuntimeError, match=r"cannot sample: for row\(s\) \[0, 1\]"):
            model.generate(ids, do_sample=True, max_new_tokens=new, eos_token_id=None, pad_token_id=1)


# --- streamers --------------------------------------------------------------------------------------------------------


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
    # Two concurrent calls do not affect each other.
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
    """Replaces a captured graph: runs the step, and counts."""

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
    """Makes sessions on the CPU use fake graphs. Returns the graphs made."""
    made = {}

    def graph(self, model, choice):
        key = (id(self), choice.key)
        if key not in made:
            self.reset(going=False)
            logits = self.forward(model)  # overwrites the tensors of the decoder, as capture does
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
        # The numbers in out-of-memory errors differ.
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


def test_room_for_tokens_grows_as_they_come(make_ours, tokens, monkeypatch):
    model, ids = make_ours(), tokens(2, 6)
    options = {"eos_token_id": None, **GREEDY}
    expected = model.generate(ids, max_new_tokens=700, **options)
    rooms = []
    grow = decoding.Session._make_room
    monkeypatch.setattr(decoding.Session, "_make_room", lambda self, n: grow(self, n) or rooms.append(self.sequences))
    eos = int(expected[0, 20])
    end = expected[0, 6:].tolist().index(eos) + 7
    for most in (10**10, 10**30, float("inf")):
        stream = model.stream(ids, max_new_tokens=most, **options)
        made = torch.stack([next(stream) for _ in range(700)], 1)
        stream.close()
        assert torch.equal(made, expected[:, 6:])
        ended = model.generate(ids[:1], max_new_tokens=most, **{**options, "eos_token_id": eos})
        assert torch.equal(ended, expected[:1, :end]) and ended.untyped_storage().nbytes() == 8 * end
    assert max(room.shape[1] for room in rooms) <= 6 + 2 * 700
    assert len({room.data_ptr() for room in rooms}) < 30


def bytes_kept(model):
    return sum(decoder.nbytes for decoder in decoding._decoders[model]._idle.values())


def test_the_state_is_held_once_while_tokens_are_made(make_ours, tokens, recorded_graphs, monkeypatch):
    model, ids = make_ours(), tokens(2, 6)
    live, own = [], []
    first = decoding.Session.__init__

    def watch(self, model, cache, *args, **kwargs):
        live.append(weakref.ref(cache))
        own.append(cache.rnn_state[0][0].data_ptr())
        first(self, model, cache, *args, **kwargs)

    monkeypatch.setattr(decoding.Session, "__init__", watch)
    options = {"max_new_tokens": 9, "eos_token_id": None, **GREEDY}
    stream = model.stream(ids, **options)
    next(stream)
    # The decoder has taken over the prompt's cache.
    (made,) = recorded_graphs.values()
    cache = live[0]()
    assert cache is made.arguments[0].cache and cache.rnn_state[0][0].data_ptr() == own[0]
    stream.close()
    del cache
    assert live[0]() is not None and bytes_kept(model) == live[0]().nbytes  # kept, with its graph
    stream = model.stream(ids, **options)
    next(stream)
    assert live[1]() is None and live[0]() is not None  # copied into that, and freed
    stream.close()
    model.release_graphs()
    recorded_graphs.clear()
    del made, stream
    assert live[0]() is None


def test_large_states_are_not_kept_and_not_copied(make_ours, tokens, recorded_graphs, monkeypatch, stock_loop):
    model, ids = make_ours(), tokens(2, 6)
    with torch.no_grad():
        size = model(ids).cache_params.nbytes
    options = {"max_new_tokens": 9, "eos_token_id": None, **GREEDY}
    monkeypatch.setattr(decoding, "kept_bytes", lambda device: size - 1)
    with torch.no_grad():
        cache = model(ids[:, :3]).cache_params
    addresses = [t.data_ptr() for state in cache.rnn_state.values() for t in state]
    expected = stock_loop(model, ids, **options)
    assert torch.equal(model.generate(ids, cache_params=cache, **options), expected)
    (made,) = recorded_graphs.values()
    assert made.replays == 8 and bytes_kept(model) == 0 and not decoding._decoders[model]._idle
    assert addresses == [t.data_ptr() for state in cache.rnn_state.values() for t in state]
    assert cache.get_seq_length() == 14 and cache.slots is None

    # Within the bound, the last used are kept.
    monkeypatch.setattr(decoding, "kept_bytes", lambda device: 2 * size)
    recorded_graphs.clear()
    for batch in (1, 2, 3, 1, 2):
        model.generate(tokens(batch, 6), **options)
        assert bytes_kept(model) <= 2 * size
    assert [key[0] for key in decoding._decoders[model]._idle] == [1, 2]


def test_captured_memory_counts(make_ours, tokens, recorded_graphs, monkeypatch):
    model, ids = make_ours(), tokens(2, 6)
    options = {"max_new_tokens": 9, "eos_token_id": None, **GREEDY}
    graph = decoding.Decoder.graph

    def large(self, model, choice):
        self._graph_bytes = decoding.KEPT_BYTES
        return graph(self, model, choice)

    monkeypatch.setattr(decoding.Decoder, "graph", large)
    model.generate(ids, **options)
    assert not decoding._decoders[model]._idle


def test_keys_of_choices():
    from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

    warm = [decoding.Choice([TemperatureLogitsWarper(t), TopKLogitsWarper(5)], True) for t in (0.5, 0.5, 0.6)]
    assert warm[0].key == warm[1].key != warm[2].key
    assert decoding.Choice([RepetitionPenaltyLogitsProcessor(1.5)]).key is None
    assert decoding.Choice(criteria=[_FourOf([1])]).key is None
    assert decoding.Choice(eos=(1,)).key != decoding.Choice(eos=(2,)).key

    # A class of the same name, a subclass, an instance with another attribute: none is known to read the scores only.
    mine = type("TopKLogitsWarper", (LogitsProcessor,), {"__call__": lambda self, ids, scores: scores + ids.shape[1]})
    patched = TopKLogitsWarper(5)
    patched.extra = lambda scores: scores
    for processor in (mine(), type("Mine", (TopKLogitsWarper,), {})(5), patched):
        assert decoding.Choice([processor]).key is None


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


@pytest.mark.cuda
def test_cuda_keeps_and_takes_little_memory(make_ours, tokens, monkeypatch):
    monkeypatch.setattr(decoding, "kept_bytes", lambda device: decoding.KEPT_BYTES)
    config = {"hidden_size": 1024, "num_heads": 4, "num_hidden_layers": 8, "vocab_size": 512}
    model, ids = make_ours(**config).cuda().bfloat16(), tokens(64, 16).cuda()
    options = {"max_new_tokens": 40, "eos_token_id": None, **GREEDY}
    model.generate(ids, **options)  # libraries' workspaces
    model.release_graphs()
    with torch.no_grad():
        size = model(ids).cache_params.nbytes  # 512 MiB
    assert size > decoding.KEPT_BYTES
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    expected = model.generate(ids, **options)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * size
    assert torch.cuda.memory_allocated() - before < 2**20
    for batch in (1, 2, 4, 8, 16, 32, 64):
        made = model.generate(ids[:batch], **options)
        assert torch.cuda.memory_allocated() - before <= decoding.KEPT_BYTES + 2**20
    assert torch.equal(made, expected)
    del made, expected
    model.release_graphs()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.cuda
@pytest.mark.parametrize("kept", [True, False])
def test_cuda_rows_stay_where_they_ended(make_ours, tokens, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(decoding, "kept_bytes", lambda device: 0)
    model, ids = make_ours().cuda(), tokens(3, 5).cuda()
    eos = ends_in_turn(model, ids, 24)
    for options in ({}, {"repetition_penalty": 1.0001}):
        options |= {"eos_token_id": eos, "max_new_tokens": 24, **GREEDY, "return_dict_in_generate": True}
        out = model.generate(ids, **options)
        for row, unread in enumerate(out.past_key_values.unread.tolist()):
            with torch.no_grad():
                alone = model(out.sequences[row : row + 1, : -1 - unread]).cache_params
            torch.testing.assert_close(states(out.past_key_values, row), states(alone, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("eos", [None, 2])
def test_cuda_sampling_from_nan_raises(make_ours, tokens, eos):
    model, ids = make_ours().cuda(), tokens(2, 6).cuda()
    options = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": eos, "pad_token_id": 1}
    model.generate(ids, **options)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"cannot sample: for row\(s\) \[0, 1\]"):
        model.generate(ids, **options)


@pytest.mark.cuda
def test_cuda_capture_is_tried_again_after_a_failure(make_ours, tokens, monkeypatch):
    model, ids = make_ours().cuda(), tokens(2, 6).cuda()
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options)
    model.release_graphs()
    block = model.backbone.blocks[1]
    original = type(block).forward
    patched = lambda *args: (torch.cuda.synchronize(), original(*args))[1]  # noqa: E731  (not permitted in a capture)
    monkeypatch.setattr(type(block), "forward", patched)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(model.generate(ids, **options), expected)
    monkeypatch.setattr(type(block), "forward", original)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(model.generate(ids, **options), expected)
    (decoder,) = decoding._decoders[model]._idle.values()
    assert len(decoder._graphs) == 1


@pytest.mark.cuda
def test_cuda_inputs_on_the_cpu(make_ours, tokens):
    model, ids = make_ours().cuda(), tokens(2, 6)
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
    assert torch.equal(model.generate(ids, **options), model.generate(ids.cuda(), **options).cpu())


def test_what_changes_a_model_changes_the_key_of_its_graphs(make_ours, monkeypatch):
    model = make_ours()
    layer = model.backbone.blocks[1].mlstm_layer
    keys = [decoding._weights_key(model)]
    assert decoding._weights_key(model) == keys[0]
    layer.scaling = {"default": 0.5}
    keys.append(decoding._weights_key(model))
    layer.scaling["default"] = 2.0
    keys.append(decoding._weights_key(model))
    layer.switched_off = True
    keys.append(decoding._weights_key(model))
    layer.out_proj = torch.nn.Sequential(layer.out_proj)
    keys.append(decoding._weights_key(model))
    monkeypatch.setattr(type(layer), "forward", lambda *args: None)
    keys.append(decoding._weights_key(model))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    keys.append(decoding._weights_key(model))
    assert len(set(keys)) == len(keys)


def test_modules_that_run_python_of_their_own_are_found(make_ours):
    model = make_ours()
    assert decoding.looked_at(model) is None
    gate = model.backbone.blocks[0].mlstm_layer.ogate_preact
    handle = gate.register_forward_hook(lambda *args: None)
    assert decoding.looked_at(model) == "backbone.blocks.0.mlstm_layer.ogate_preact"
    handle.remove()
    gate.forward = gate.forward
    assert decoding.looked_at(model) == "backbone.blocks.0.mlstm_layer.ogate_preact"
    del gate.forward
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert decoding.looked_at(model) == "a hook of all modules"
    handle.remove()
    assert decoding.looked_at(model) is None


@pytest.mark.cuda
def test_cuda_hooks_are_called_for_every_token(make_ours, tokens):
    model, ids = make_ours().cuda(), tokens(2, 6).cuda()
    options = {"max_new_tokens": 12, "eos_token_id": None, **GREEDY}
    expected = model.generate(ids, **options)  # captures
    seen = []
    handle = model.backbone.blocks[0].ffn.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match=r"without a CUDA graph.*blocks\.0\.ffn has a hook"):
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(seen) == 12
    handle.remove()
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(seen) == 12
