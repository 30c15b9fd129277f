"""Documents packed into rows: each comes out as in a row of its own."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from transformers import DataCollatorWithFlattening

from flash_xlstm.models import packing, xLSTMCache

WAYS = ("position_ids", "seq_idx", "cu_seq_lens_q", "attention_mask", "all")
LENGTHS = (5, 1, 70, 1, 1, 23)


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def packed(rows, way, padding=0):
    """What tells of documents of these lengths, a list a row, with so many places of padding at each row's end."""
    position_ids, numbers, bounds = [], [], [0]
    for lengths in rows:
        position_ids.append([t for n in lengths for t in range(n)] + [0] * padding)
        numbers.append([d + 1 for d, n in enumerate(lengths) for _ in range(n)] + [0] * padding)
        for n in [*lengths, padding] if padding else lengths:
            bounds.append(bounds[-1] + n)
    given = {
        "position_ids": torch.tensor(position_ids),
        "seq_idx": torch.tensor(numbers, dtype=torch.int32),
        "cu_seq_lens_q": offsets(*bounds),
        "attention_mask": torch.tensor(numbers),
    }
    mask = {"attention_mask": (given["attention_mask"] > 0).long()} if padding else {}
    return given if way == "all" else {**mask, way: given[way]}


def split(ids, rows):
    """The documents of `rows`, each (1, length)."""
    return [
        part for row, lengths in zip(ids, rows, strict=True) for part in row[: sum(lengths)][None].split(lengths, 1)
    ]


def alone(model, documents):
    """Logits of documents that each are a row, one after the other; the loss; gradients."""
    model.zero_grad()
    logits = [model(document).logits for document in documents]
    losses = [
        torch.nn.functional.cross_entropy(here[0, :-1].float(), document[0, 1:], reduction="sum")
        for here, document in zip(logits, documents, strict=True)
    ]
    loss = sum(losses) / sum(document.shape[1] - 1 for document in documents)
    loss.backward()
    return torch.cat(logits, 1), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def together(model, ids, rows, **given):
    """The same of packed rows."""
    model.zero_grad()
    output = model(ids, labels=ids, skip_logits=False, **given)
    output.loss.backward()
    logits = torch.cat(split(output.logits, rows), 1)
    return logits, output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def of_rounded_weights(double, documents):
    """`alone` of a float64 model whose weights are off by less than a rounding to float32."""
    generator, moved = torch.Generator().manual_seed(0), copy.deepcopy(double)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + (torch.rand(p.shape, generator=generator, dtype=p.dtype) * 2 - 1) * 2**-24)
    return alone(moved, documents)


def check(actual, separate, exact, rel, moved=None):
    """That packed rows are as near to float64 as rows of one document each are, to a factor of 3. The BLAS sums a
    product of other rows in another order. A gradient that roundings move far is therefore allowed what `moved`,
    of_rounded_weights, is off, besides what separate rows are: either may be small by chance."""
    for packed, one_each, wanted in zip(actual[:2], separate, exact, strict=False):
        assert rel(packed, wanted) < 3 * rel(one_each, wanted) + 1e-6
    floor = 1e-7 * float(torch.stack([g.norm() for g in exact[2].values()]).norm())
    for name, wanted in exact[2].items():
        error, usual = (float((run[2][name].double() - wanted).norm()) for run in (actual, separate))
        usual += 0.0 if moved is None else float((moved[2][name] - wanted).norm())
        if name.endswith("preact.bias"):  # a sum over tokens that may cancel, of terms as large as the weight's
            usual += torch.finfo(actual[2][name].dtype).eps * float(exact[2][name[:-4] + "weight"].norm())
        assert error < 3 * usual + floor, name


# --- equal to rows of their own ---


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [0, 7])
def test_documents_come_out_as_alone(make_ours, in_double, tokens, rel, way, padding, weight_mode):
    model, rows = make_ours(weight_mode=weight_mode), [LENGTHS]
    ids = tokens(1, sum(LENGTHS) + padding)
    double, documents = in_double(model), split(ids, rows)
    exact, separate = alone(double, documents), alone(model, documents)
    moved = of_rounded_weights(double, documents)
    check(together(model, ids, rows, **packed(rows, way, padding)), separate, exact, rel, moved)
    check(together(double, ids, rows, **packed(rows, way, padding)), exact, exact, rel)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", [0, 3])
def test_several_rows(make_ours, in_double, tokens, rel, way, padding):
    model, rows = make_ours(), [(3, 30, 1), (34,), (1, 1, 32)]
    ids = tokens(3, 34 + padding)
    exact, separate = alone(in_double(model), split(ids, rows)), alone(model, split(ids, rows))
    check(together(model, ids, rows, **packed(rows, way, padding)), separate, exact, rel)


@pytest.mark.parametrize("seed", range(4))
def test_random_lengths(make_ours, in_double, tokens, rel, seed):
    draw = random.Random(seed)
    seq, rows = draw.randint(20, 150), []
    for _ in range(draw.randint(1, 3)):
        cuts = sorted(draw.sample(range(1, seq), draw.randint(1, 8)))
        rows.append(tuple(b - a for a, b in itertools.pairwise([0, *cuts, seq])))
    model, ids = make_ours(seed), tokens(len(rows), seq, seed)
    exact, separate = alone(in_double(model), split(ids, rows)), alone(model, split(ids, rows))
    check(together(model, ids, rows, **packed(rows, draw.choice(WAYS))), separate, exact, rel)


def test_a_document_does_not_see_the_others(make_ours, tokens):
    model, rows = make_ours(), [(9, 5, 6)]
    ids = tokens(1, 20)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    output = model(inputs_embeds=embedded, **packed(rows, "cu_seq_lens_q"))
    (gradient,) = torch.autograd.grad(output.logits[:, 9:14].square().sum(), embedded)
    seen = gradient[0].abs().amax(1) > 0
    assert seen.tolist() == [False] * 9 + [True] * 5 + [False] * 6


@pytest.mark.parametrize("kernel", ["chunkwise--reference", "parallel--reference", "recurrent--reference"])
def test_plain_kernels(make_ours, tokens, rel, kernel):
    ids, given = tokens(1, 17), packed([(4, 1, 12)], "cu_seq_lens_q")
    expected = make_ours()(ids, **given).logits
    assert rel(make_ours(chunkwise_kernel=kernel)(ids, **given).logits, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_ours, in_double, tokens, rel, dtype):
    model, rows = make_ours(), [LENGTHS]
    ids = tokens(1, sum(LENGTHS))
    exact = alone(in_double(model.to(dtype)), split(ids, rows))
    separate = alone(model, split(ids, rows))
    check(together(model, ids, rows, **packed(rows, "cu_seq_lens_q")), separate, exact, rel)


def test_autocast(make_ours, tokens, rel):
    model, rows = make_ours(), [LENGTHS]
    ids = tokens(1, sum(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(model, split(ids, rows))
        actual = together(model, ids, rows, **packed(rows, "position_ids"))
    assert rel(actual[0], expected[0]) < 1e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_ours, tokens, rel, reentrant):
    model, rows = make_ours().train(), [(3, 30, 1), (34,)]
    ids, given = tokens(2, 34), packed(rows, "all")
    expected = together(model, ids, rows, **given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    actual = together(model, ids, rows, **given)
    for name, gradient in actual[2].items():
        assert torch.equal(gradient, expected[2][name]), name


# --- the ways of telling ---


def test_every_way_tells_the_same(make_ours, tokens):
    rows = [(3, 30, 1), (1, 33)]
    ids, model = tokens(2, 34), make_ours()
    given = packed(rows, "all")
    expected = model.backbone(ids, cu_seq_lens_q=given["cu_seq_lens_q"])
    assert expected.cu_seqlens.tolist() == [0, 3, 33, 34, 35, 68] and expected.cu_seqlens.dtype == torch.int32
    assert expected.cache_params is None
    others = [{name: value} for name, value in given.items()]
    others += [
        {"cu_seq_lens_k": given["cu_seq_lens_q"]},
        {"cu_seqlens": given["cu_seq_lens_q"].long()},
        {"cu_seq_lens_q": offsets(0, 3, 33, 34, 34, 35, 68, 68), "max_length_q": 40},  # with documents of no tokens
        {"seq_idx": given["seq_idx"] - 1},
        {"seq_idx": torch.tensor([7, 3, 9]).repeat_interleave(torch.tensor([3, 30, 1]))[None].repeat(2, 1)},
        {"position_ids": given["position_ids"] + 2},
        {
            **given,
            "cu_seq_lens_k": given["cu_seq_lens_q"].clone(),
            "max_length_q": 33,
            "max_length_k": torch.tensor(33),
        },
        {**given, "attention_mask": torch.ones(2, 34, dtype=torch.long)},
        {**given, "attention_mask": torch.ones(2, 34)},
    ]
    for other in others:
        output = model.backbone(ids, **other)
        if "seq_idx" in other and other["seq_idx"].max() == 9:  # both rows as the first
            assert output.cu_seqlens.tolist() == [0, 3, 33, 34, 37, 67, 68]
            continue
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state), other


def test_rows_of_one_document_are_dense(make_ours, tokens):
    model, ids = make_ours(), tokens(2, 6)
    expected = model.backbone(ids)
    for dense in (
        {"position_ids": torch.arange(6)[None]},
        {"seq_idx": torch.tensor([[0] * 6, [1] * 6])},
        {"attention_mask": torch.tensor([[1] * 6, [2] * 6])},
    ):
        output = model.backbone(ids, **dense)
        assert output.cu_seqlens is None and output.cache_params is not None
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


def test_padding_within_and_before_documents(make_ours, tokens, rel):
    """Padding is of no document, wherever it is."""
    model, ids = make_ours(seed=4), tokens(2, 9)  # others amplify the roundings of other shapes to 1e-6 and more
    mask = torch.tensor([[0, 0, 1, 1, 0, 2, 2, 2, 0], [1, 0, 2, 2, 2, 0, 2, 3, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 5, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3, 3, 0, 0]])
    documents = [ids[:1, 2:4], ids[:1, 5:8], ids[1:, :1], ids[1:, [2, 3, 4, 6]], ids[1:, 7:8]]
    expected = torch.cat([model(document).logits[0] for document in documents])
    zero_one = (mask > 0).long()
    seq_idx = mask.masked_fill(mask == 0, -1)
    bounds = offsets(0, 4, 9, 10, 16, 18)  # padding in front of a document, too
    for given in (
        {"attention_mask": mask},
        {"attention_mask": zero_one, "position_ids": positions},
        {"attention_mask": zero_one.bool(), "seq_idx": seq_idx},
        {"attention_mask": zero_one, "cu_seq_lens_q": bounds},
        {"attention_mask": mask, "position_ids": positions, "seq_idx": seq_idx, "cu_seq_lens_q": bounds},
    ):
        logits = model(ids, **given).logits
        assert rel(logits[mask > 0], expected) < 1e-6, given


def test_hidden_states_and_tuples(make_ours, tokens):
    model, ids, given = make_ours(), tokens(2, 5), packed([(3, 2), (1, 4)], "seq_idx")
    output = model(ids, output_hidden_states=True, **given)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 5, 128)] * 3
    hidden, states, bounds = model.backbone(ids, output_hidden_states=True, return_dict=False, **given)
    assert torch.equal(hidden, states[-1]) and bounds.tolist() == [0, 3, 5, 6, 10]
    assert torch.allclose(model(ids, **given, logits_to_keep=2).logits, output.logits[:, -2:], atol=1e-6)


def test_inputs_longer_than_a_piece(make_ours, in_double, tokens, rel):
    rows = [(20, 30)]
    ids, given = tokens(1, 50), packed(rows, "cu_seq_lens_q")
    with torch.no_grad():
        whole, exact = make_ours()(ids, **given).logits, in_double(make_ours())(ids, **given).logits
        pieces = make_ours(max_inference_chunksize=16)(ids, **given).logits
        in_pieces = in_double(make_ours(max_inference_chunksize=16))(ids, **given).logits
    assert rel(pieces, exact) < 1.5 * rel(whole, exact) + 1e-7 and rel(in_pieces, exact) < 1e-13


def test_random_layouts_are_told_alike(fuzz):
    """Documents with padding anywhere, told in any ways at once; and one of these ways with another document in it."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @fuzz(150)
    @hypothesis.given(st.data())
    def run(data):
        batch, seq = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
        changes = [[data.draw(st.booleans()) for _ in range(seq)] for _ in range(batch)]
        mask = torch.tensor([[data.draw(st.integers(0, 4)) > 0 for _ in range(seq)] for _ in range(batch)])
        if data.draw(st.booleans()):
            mask[:] = True
        given, bounds, numbers, positions = {}, [0], torch.zeros(batch, seq).long(), torch.zeros(batch, seq).long()
        for b in range(batch):
            number, position, seen = 1, 0, False
            for t in range(seq):
                if t and changes[b][t]:
                    number, position = number + seen, 0
                if (t and changes[b][t]) or (t == 0 and b):
                    bounds.append(b * seq + t)
                if mask[b, t]:
                    seen = True
                    numbers[b, t], positions[b, t] = number, position
                    position += 1
                else:
                    numbers[b, t] = positions[b, t] = data.draw(st.integers(0, 9))
                if t + 1 < seq and changes[b][t + 1] and not mask[b, : t + 1].any():
                    seen = False
        tokens_of = [numbers[b, t].item() + 100 * b for b in range(batch) for t in range(seq) if mask[b, t]]
        ways = {"cu_seq_lens_q": offsets(*bounds, batch * seq), "position_ids": positions, "seq_idx": numbers,
                "attention_mask": numbers * mask}  # fmt: skip
        chosen = data.draw(st.lists(st.sampled_from(sorted(ways)), min_size=1, unique=True))
        given = {name: ways[name] for name in chosen}
        documents = given.pop("attention_mask", mask if data.draw(st.booleans()) else mask.long())
        x = torch.zeros(batch, seq)

        def found(**given):
            cu = packing.offsets(given, given.pop("position_ids", None), documents, documents == 0, x)
            cu = torch.arange(0, batch * seq + 1, seq) if cu is None else cu
            assert cu[0] == 0 and cu[-1] == batch * seq and (cu.diff() >= 0).all()
            document = torch.searchsorted(cu.long(), torch.arange(batch * seq), right=True).view(batch, seq)
            return document[mask].tolist()

        told = found(**given)
        same = lambda groups: [a == b for a, b in itertools.pairwise(groups)]  # noqa: E731
        assert same(told) == same(tokens_of)
        real = mask.nonzero().tolist()
        if real and "seq_idx" in given and (len(given) > 1 or documents.max() > 1):  # and something it may differ from
            b, t = data.draw(st.sampled_from(real))
            other = numbers.clone()
            other[b, t] = 77  # a document of its own
            changed = [n + 100 * b for n, (b, t) in zip(other[mask].tolist(), real, strict=True)]
            if same(changed) != same(tokens_of):
                with pytest.raises(ValueError, match="seq_idx"):
                    found(**{**given, "seq_idx": other})

    run()


# --- labels ---


@pytest.mark.parametrize("way", WAYS)
def test_first_tokens_do_not_count(make_ours, tokens, way):
    """As where DataCollatorWithFlattening made the labels."""
    model, ids, given = make_ours(), tokens(2, 8), packed([(3, 1, 4), (5, 3)], way)
    masked = ids.clone()
    masked[0, [0, 3, 4]] = masked[1, [0, 5]] = -100
    loss = lambda **labels: model(ids, **labels, **given).loss  # noqa: E731
    expected = loss(labels=masked)
    assert torch.equal(loss(labels=ids), expected)
    assert torch.allclose(loss(labels=ids, num_items_in_batch=1), expected * 11)
    for kept in (5, torch.arange(3, 8)):
        expected_of_kept = loss(labels=masked[:, 3:], logits_to_keep=kept)
        assert torch.equal(loss(labels=ids[:, 3:], logits_to_keep=kept), expected_of_kept)
    others = torch.where(ids == 60, 59, ids)
    ignored = others.masked_fill(masked == -100, 60)
    assert torch.equal(loss(labels=others, ignore_index=60), loss(labels=ignored, ignore_index=60))
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)  # used as they are
    assert torch.equal(loss(shift_labels=shifted), loss(labels=ids, shift_labels=shifted))
    assert not torch.allclose(loss(shift_labels=shifted), expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_what_the_flattening_collator_makes(make_ours, tokens, rel, options):
    documents = [tokens(1, n, seed=n) for n in (7, 1, 12)]
    batch = DataCollatorWithFlattening(**options)([{"input_ids": d[0].tolist()} for d in documents])
    model = make_ours()
    expected = alone(model, documents)
    output = model(**batch)
    assert rel(output.logits, expected[0]) < 1e-6 and torch.allclose(output.loss, expected[1], rtol=1e-6)


# --- compiled ---


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_compiles_whole(make_ours, tokens, rel, weight_mode):
    model = make_ours(weight_mode=weight_mode).train()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in ([(3, 30, 1)], [(9, 9, 9, 9, 9)], [(1, 1, 5)], [(8, 8, 1, 1)], [(20, 20)]):
        ids = tokens(1, sum(rows[0]))
        given = {**packed(rows, "all"), "max_length_q": max(rows[0])}
        del given["attention_mask"]
        expected = together(model, ids, rows, **given)
        model.zero_grad()
        output = compiled(ids, labels=ids, skip_logits=False, **given)
        output.loss.backward()
        assert rel(output.logits, expected[0]) < 1e-6
        for name, p in model.named_parameters():
            assert rel(p.grad, expected[2][name]) < 1e-5, name
    assert counter.frame_count <= 2  # lengths become dynamic


def test_compiled_rows_of_one_document_take_positions(make_ours, tokens):
    model, ids = make_ours(), tokens(1, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model.backbone, fullgraph=True, backend="eager")
    expected = model.backbone(ids).last_hidden_state
    assert torch.equal(compiled(ids, position_ids=torch.arange(6)[None]).last_hidden_state, expected)
    for name, value in {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]]),
    }.items():
        with pytest.raises(RuntimeError, match=f"{name} .*cu_seq_lens_q"):
            compiled(ids, **{name: value})
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give cu_seq_lens_q beside seq_idx"):
        compiled(ids, seq_idx=seq_idx)
    torch._dynamo.reset()
    broken = torch.compile(model.backbone, backend="eager")  # may break its graph
    assert torch.equal(
        broken(ids, seq_idx=seq_idx).last_hidden_state, model.backbone(ids, seq_idx=seq_idx).last_hidden_state
    )
    with pytest.raises(RuntimeError, match="cu_seq_lens_q must begin with 0"):
        compiled(ids, cu_seq_lens_q=offsets(0, 3, 5))


# --- contradictions ---

SIX = torch.arange(6)[None]
NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 2]])
RESTART = torch.tensor([[0, 1, 2, 0, 1, 2]])

REFUSED = {
    "offsets that begin late": ({"cu_seq_lens_q": offsets(1, 3, 6)}, "cu_seq_lens_q must begin with 0"),
    "offsets that end early": ({"cu_seq_lens_q": offsets(0, 3, 5)}, "cu_seq_lens_q .* number of tokens, 6"),
    "offsets that end late": ({"cu_seq_lens_q": offsets(0, 3, 7)}, "cu_seq_lens_q .* number of tokens, 6"),
    "offsets that decrease": ({"cu_seq_lens_q": offsets(0, 4, 3, 6)}, "cu_seq_lens_q .* never decrease"),
    "one offset": ({"cu_seq_lens_q": offsets(0)}, r"cu_seq_lens_q has shape \(1,\)"),
    "offsets of two dimensions": ({"cu_seq_lens_q": offsets(0, 6)[None]}, r"cu_seq_lens_q has shape \(1, 2\)"),
    "cu_seq_lens_k alone": ({"cu_seq_lens_k": offsets(0, 3, 5)}, "cu_seq_lens_k .* number of tokens, 6"),
    "another cu_seq_lens_k": (
        {"cu_seq_lens_q": offsets(0, 3, 6), "cu_seq_lens_k": offsets(0, 2, 6)}, "cu_seq_lens_k must be equal to"
    ),
    "a longer cu_seq_lens_k": (
        {"cu_seq_lens_q": offsets(0, 3, 6), "cu_seq_lens_k": offsets(0, 3, 6, 6)}, "cu_seq_lens_k must be equal to"
    ),
    "max_length_q alone": ({"max_length_q": 3, "seq_idx": NUMBERS}, "max_length_q is given without cu_seq_lens_q"),
    "max_length_k too short": ({"cu_seq_lens_q": offsets(0, 2, 6), "max_length_k": 3}, "max_length_k must be at least"),
    "positions count on": (
        {"cu_seq_lens_q": offsets(0, 3, 6), "position_ids": SIX}, "position_ids must tell the same documents as cu_seq"
    ),
    "positions begin anew elsewhere": (
        {"cu_seq_lens_q": offsets(0, 2, 6), "position_ids": RESTART}, "position_ids must tell the same"
    ),
    "positions jump": ({"position_ids": torch.tensor([[0, 1, 2, 4, 5, 6]])}, "position_ids must count up"),
    "positions begin anew at 1": ({"position_ids": torch.tensor([[0, 1, 2, 1, 2, 3]])}, "position_ids must count up"),
    "seq_idx changes within": (
        {"cu_seq_lens_q": offsets(0, 6), "seq_idx": NUMBERS}, "seq_idx must tell the same documents as cu_seq_lens_q"
    ),
    "seq_idx does not change": (
        {"position_ids": RESTART, "seq_idx": torch.zeros_like(SIX)}, "seq_idx must tell the same documents as position"
    ),
    "seq_idx comes back": ({"seq_idx": torch.tensor([[0, 1, 1, 0, 0, 2]])}, "seq_idx must not come back"),
    "seq_idx of another shape": ({"seq_idx": NUMBERS[0]}, r"seq_idx has shape \(6,\); it must be \(1, 6\)"),
    "a mask's numbers come back": ({"attention_mask": torch.tensor([[1, 1, 2, 1, 0, 0]])}, "attention_mask must not"),
    "a mask's numbers are negative": ({"attention_mask": torch.tensor([[1, 1, 2, -1, 0, 0]])}, "attention_mask"),
    "a mask of fractions": ({"attention_mask": NUMBERS / 2}, "attention_mask holds other values"),
    "a mask of other documents": (
        {"attention_mask": NUMBERS, "seq_idx": torch.tensor([[1, 1, 2, 2, 2, 2]])},
        "attention_mask must tell the same documents as seq_idx",
    ),
    "a cache of documents": ({"cu_seq_lens_q": offsets(0, 3, 6), "use_cache": True}, "use_cache is True"),
    "a cache of documents told by positions": ({"position_ids": RESTART, "use_cache": True}, "use_cache is True"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(make_ours, tokens, given, message):
    model = make_ours()
    ran = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *args: ran.append(args))
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match=message):
            part(tokens(1, 6), **given)
    assert not ran


def test_rows_must_begin_with_a_document(make_ours, tokens):
    with pytest.raises(ValueError, match="cu_seq_lens_q must hold where each row begins"):
        make_ours()(tokens(2, 3), cu_seq_lens_q=offsets(0, 4, 6))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": [0, 3, 6]}, "cu_seq_lens_q is a list"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 6.0])}, "cu_seq_lens_q has dtype float32"),
        ({"seq_idx": NUMBERS.float()}, "seq_idx has dtype float32"),
        ({"seq_idx": NUMBERS.tolist()}, "seq_idx is a list"),
        ({"position_ids": RESTART.float()}, "position_ids has dtype float32"),
        ({"cu_seq_lens_q": offsets(0, 6), "max_length_q": 6.0}, "max_length_q is a float"),
    ],
)
def test_wrong_kinds_are_refused(make_ours, tokens, given, message):
    with pytest.raises(TypeError, match=message):
        make_ours()(tokens(1, 6), **given)


@pytest.mark.parametrize(
    "given",
    [{"cu_seq_lens_q": offsets(0, 3, 6)}, {"seq_idx": NUMBERS}, {"max_length_q": 3}, {"attention_mask": NUMBERS},
     {"position_ids": RESTART}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_packed_rows_beside_a_cache_are_refused(make_ours, tokens, given):
    model = make_ours()
    ids = tokens(1, 6)
    with torch.no_grad():
        for cache in (model(ids).cache_params, xLSTMCache(model.config, 1)):
            seen = cache.get_seq_length()
            with pytest.raises(ValueError, match=next(iter(given))):
                model(ids, cache_params=cache, **given)
            assert cache.get_seq_length() == seen


# --- on a GPU ---


@pytest.mark.cuda
@pytest.mark.parametrize("way", ["position_ids", "seq_idx", "cu_seq_lens_q", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_documents_come_out_as_alone(make_ours, in_double, tokens, rel, way, dtype):
    model, rows = make_ours(), [LENGTHS, LENGTHS[::-1]]
    ids = tokens(2, sum(LENGTHS))
    exact = alone(in_double(model.to(dtype)), split(ids, rows))
    model, ids = model.cuda(), ids.cuda()
    separate = alone(model, split(ids, rows))
    given = {name: value.cuda() for name, value in packed(rows, way).items()}
    on_cpu = lambda run: (run[0].cpu(), run[1].cpu(), {name: g.cpu() for name, g in run[2].items()})  # noqa: E731
    check(on_cpu(together(model, ids, rows, **given)), on_cpu(separate), exact, rel)


@pytest.mark.cuda
def test_offsets_that_are_given_wait_for_no_gpu(make_ours, tokens):
    model, rows = make_ours().train().cuda(), [(3, 30, 1), (34,)]
    ids, given = tokens(2, 34).cuda(), {k: v.cuda() for k, v in packed(rows, "all").items()}
    given |= {"cu_seq_lens_k": given["cu_seq_lens_q"].clone(), "max_length_q": 34, "max_length_k": 34}
    model(ids, labels=ids, **given).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(ids, labels=ids, **given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_documents_without_offsets_wait_for_the_gpu_once(make_ours, tokens):
    model, ids = make_ours().train().cuda(), tokens(1, 34).cuda()
    positions = packed([(3, 30, 1)], "position_ids")["position_ids"].cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            model(ids, labels=ids, position_ids=positions).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("what", ["end", "positions", "seq_idx", "mask", "mask alone"])
def test_cuda_contradictions_end_in_an_error(what):
    """In a process of its own, which the device's error ends."""
    given = {
        "end": "cu_seq_lens_q=offsets(0, 3, 5)",
        "positions": "cu_seq_lens_q=offsets(0, 2, 6), position_ids=restart",
        "seq_idx": "cu_seq_lens_q=offsets(0, 2, 6), seq_idx=numbers",
        "mask": "cu_seq_lens_q=offsets(0, 2, 6), attention_mask=numbers",
        "mask alone": "attention_mask=numbers",
    }[what]
    program = f"""
import torch
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
offsets = lambda *values: torch.tensor(values, dtype=torch.int32, device="cuda")
restart = torch.tensor([[0, 1, 2, 0, 1, 2]], device="cuda")
numbers = torch.tensor([[1, 1, 1, 2, 2, 2]], device="cuda")
none = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
model = xLSTMForCausalLM(xLSTMConfig(vocab_size=64, hidden_size=128, num_hidden_layers=1, num_heads=2, **none)).cuda()
model(numbers, {given})
torch.cuda.synchronize()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0 and "assert" in run.stderr.lower(), run.stderr
