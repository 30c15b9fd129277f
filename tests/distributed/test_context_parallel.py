"""One sequence over ranks: h, states and every gradient beside one process and float64."""

from __future__ import annotations

import itertools
import re

import models_of_ranks
import pytest
import torch
from torch import distributed as dist

from flash_xlstm import nn, ops, reference
from flash_xlstm.distributed import context

HEADS, DQK, DV = 2, 12, 20
STATE = ("c", "n", "m")


def draw(seq, *, batch=2, gates="normal", state=False, seed=0, rows=None):
    """A problem in float32: its inputs by name, with an initial state's parts among them if there is one, and
    gradients of h and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731

    def gate():
        shape = (batch, seq, HEADS)
        if gates == "spread":  # over the range of a cap of 15
            return torch.rand(shape, generator=generator) * 30 - 15
        return normal(*shape) * {"small": 0.1, "normal": 1.0}[gates]

    inputs = {name: normal(batch, seq, HEADS, dim) for name, dim in (("q", DQK), ("k", DQK), ("v", DV))}
    inputs |= {"i": gate(), "f": gate() + (2 if gates != "spread" else 0)}
    rows = batch if rows is None else rows
    shapes = {"c": (rows, HEADS, DQK, DV), "n": (rows, HEADS, DQK), "m": (rows, HEADS)}
    if state:
        inputs |= {name: normal(*shape) for name, shape in shapes.items()}
    weights = {"h": normal(batch, seq, HEADS, DV), **{f"last {name}": normal(*s) for name, s in shapes.items()}}
    return inputs, weights


def one_process(form, inputs, weights, dtype, through_state=True, **options):
    """h, the final state and all gradients."""
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    state = tuple(inputs[name] for name in STATE) if "c" in inputs else None
    h, last = form(*(inputs[x] for x in "qkvif"), initial_state=state, return_final_state=True, **options)
    results = {"h": h, **{f"last {name}": t for name, t in zip(STATE, last, strict=True)}}
    used = [name for name in results if name == "h" or through_state]
    gradients = torch.autograd.grad(
        [results[name] for name in used], list(inputs.values()), [weights[name].to(dtype) for name in used]
    )
    return {
        **{name: t.detach() for name, t in results.items()},
        **{f"d{name}": g for name, g in zip(inputs, gradients, strict=True)},
    }


def avoid_kinks(inputs, weights, **options):
    """Makes the loss independent of how c and n are scaled. Else it has a kink where m changes its branch, near which a
    rounding moves a whole gradient from one gate to another."""
    state = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, **options)
    shares = (weights[f"last {x}"].double() * state[f"last {x}"] for x in "cn")
    weights["last m"] = sum(share.flatten(2).sum(-1) for share in shares).float()


def bounds_of(pieces):
    return list(itertools.pairwise([0, *itertools.accumulate(pieces)]))


def this_ranks(t, pieces):
    return t[:, slice(*bounds_of(pieces)[dist.get_rank()])].clone()


def on_this_rank(inputs, weights, pieces, through_state, options):
    """What this rank has of :func:`one_process`. Every rank puts a share of the final state's gradient into its own
    copy."""
    inputs = {name: t.clone() if name in STATE else this_ranks(t, pieces) for name, t in inputs.items()}
    for t in inputs.values():
        t.requires_grad_()
    state = tuple(inputs[name] for name in STATE) if "c" in inputs else None
    out = context.mlstm(
        *(inputs[x] for x in "qkvif"), group=dist.group.WORLD, initial_state=state, return_final_state=through_state,
        **options,
    )  # fmt: skip
    h, last = out if through_state else (out, ())
    loss = (h * this_ranks(weights["h"], pieces)).sum()
    share = (dist.get_rank() + 1) / sum(range(1, len(pieces) + 1))
    for name, t in zip(STATE, last, strict=False):
        loss = loss + share * (t * weights[f"last {name}"]).sum()
    loss.backward()
    found = {"h": h.detach(), **{f"last {name}": t.detach() for name, t in zip(STATE, last, strict=False)}}
    return as_arrays(found | {f"d{name}": t.grad for name, t in inputs.items()})


def as_arrays(tensors):  # a tensor's memory goes with the process that made it
    return {name: None if t is None else t.numpy() for name, t in tensors.items()}


def as_tensors(found):
    return [{name: None if a is None else torch.from_numpy(a) for name, a in each.items()} for each in found]


def joined(found):
    """The ranks' results as one process's."""
    found, whole = as_tensors(found), {}
    for name, t in found[0].items():
        if name.startswith("last"):
            assert all(torch.equal(each[name], t) for each in found), f"{name} differs between ranks"
            whole[name] = t
        elif name[1:] in STATE:  # the first rank alone reads the initial state
            assert not any(each[name].any() for each in found[1:])
            whole[name] = t
        else:
            whole[name] = torch.cat([each[name] for each in found], 1)
    return whole


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_as_exact(found, alone, expected, tolerance=1e-5):
    """Within `tolerance` of float64, or no further from it than one process."""
    for name, t in found.items():
        assert t.shape == expected[name].shape, name
        ours, its = error(t, expected[name]), error(alone[name], expected[name])
        assert ours <= max(tolerance, 2 * its), f"{name}: {ours:.1e}, one process {its:.1e}"


PIECES = [(40, 40), (1, 129), (70, 1, 64), (64, 64, 128), (3, 100, 27, 1), (65, 64, 63, 66)]


@pytest.mark.parametrize("gates", ["small", "normal", "spread"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_one_sequence_over_ranks(on_ranks, pieces, state, gates):
    options = {"gate_soft_cap": 15.0} if gates == "spread" else {}
    inputs, weights = draw(sum(pieces), gates=gates, state=state, seed=len(pieces))
    avoid_kinks(inputs, weights, **options)
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, **options)
    alone = one_process(ops.mlstm, inputs, weights, torch.float32, **options)
    found = on_ranks(len(pieces), on_this_rank, inputs, weights, pieces, True, options)
    assert_as_exact(joined(found), alone, expected)


@pytest.mark.parametrize("pieces", [(40, 40), (3, 100, 27, 1)], ids=str)
def test_without_final_state(on_ranks, pieces):
    inputs, weights = draw(sum(pieces), state=True)
    options = {"scale": 0.7, "eps": 0.1, "chunk_size": 16}
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, False, **options)
    alone = one_process(ops.mlstm, inputs, weights, torch.float32, False, **options)
    found = joined(on_ranks(len(pieces), on_this_rank, inputs, weights, pieces, False, options))
    assert_as_exact(found, alone, expected)


@pytest.mark.parametrize("pieces", [(30, 30), (20, 1, 30, 25)], ids=str)
def test_no_token_makes_m_anew(on_ranks, pieces):
    """The initial m is that of every token on every rank, and counts through a large eps."""
    options = {"eps": 0.1}
    inputs, weights = draw(sum(pieces), gates="small", state=True)
    inputs["m"] += 5
    inputs["f"] += 4
    for through_state in (False, True):
        expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, through_state, **options)
        alone = one_process(ops.mlstm, inputs, weights, torch.float32, through_state, **options)
        found = joined(on_ranks(len(pieces), on_this_rank, inputs, weights, pieces, through_state, options))
        assert_as_exact(found, alone, expected)
        inner = sum((inputs[x].double() * expected[f"d{x}"]).flatten(2).sum(-1) for x in "cn")
        assert (expected["dm"] - inner).abs().max() > 1e-3  # what eps gives


def in_nodes(count, function, *args):
    """A rank's result where nodes have at most `count` ranks."""
    context._NODE = count
    return function(*args)


IN_NODES = [((20, 1, 40, 33), 2), ((9, 30, 1, 17, 40, 26), 2), ((9, 30, 1, 17, 40, 26), 3)]


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize(("pieces", "count"), IN_NODES, ids=str)
def test_nodes(on_ranks, pieces, count, state):
    """With a state no token makes m anew."""
    options = {"eps": 0.1} if state else {"gate_soft_cap": 15.0}
    inputs, weights = draw(sum(pieces), gates="small" if state else "spread", state=state, seed=7)
    if state:
        inputs["f"] += 4
        inputs["m"] += 5
    else:
        avoid_kinks(inputs, weights, **options)
    for through_state in (False, True) if state else (True,):
        expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, through_state, **options)
        alone = one_process(ops.mlstm, inputs, weights, torch.float32, through_state, **options)
        arguments = count, on_this_rank, inputs, weights, pieces, through_state, options
        assert_as_exact(joined(on_ranks(len(pieces), in_nodes, *arguments)), alone, expected)


# --- documents --------------------------------------------------------------------------------------------------------


def documents_of(offsets, first, stop):
    """The documents with tokens in [first, stop), and their offsets there."""
    here = [s for s, (a, b) in enumerate(itertools.pairwise(offsets)) if max(a, first) < min(b, stop)]
    return here, [max(offsets[s], first) - first for s in here] + [stop - first]


def packed_on_this_rank(inputs, weights, pieces, offsets, empty_first, options):
    """What this rank has of :func:`one_process`; states of documents that end here. A document that goes on from the
    rank before has NaN for an initial state here."""
    first, stop = bounds_of(pieces)[dist.get_rank()]
    here, local = documents_of(offsets, first, stop)
    continues = first != offsets[here[0]] or first == 0
    rows = torch.tensor(here)
    tensors = {name: t[rows].clone() if name in STATE else this_ranks(t, pieces) for name, t in inputs.items()}
    state = tuple(tensors[name] for name in STATE) if "c" in inputs else None
    if state and continues and first > 0:
        for t in state:
            t[0] = torch.nan
    if empty_first and not continues:
        local, continues = [0, *local], True
        if state:
            tensors |= {
                name: torch.cat((torch.full_like(tensors[name][:1], torch.nan), tensors[name])) for name in STATE
            }
    for t in tensors.values():
        t.requires_grad_()
    state = tuple(tensors[name] for name in STATE) if "c" in inputs else None
    h, last = context.mlstm(
        *(tensors[x] for x in "qkvif"), group=dist.group.WORLD, initial_state=state, return_final_state=True,
        cu_seqlens=torch.tensor(local, dtype=torch.int32), continues=continues, **options,
    )  # fmt: skip
    last = tuple(t[-len(here) :] for t in last)
    ends = [x for x, s in enumerate(here) if offsets[s + 1] <= stop]
    loss = (h * this_ranks(weights["h"], pieces)).sum()
    for name, t in zip(STATE, last, strict=True):
        loss = loss + (t[ends] * weights[f"last {name}"][rows[ends]]).sum()
    loss.backward()
    found = {"h": h.detach(), **{f"last {name}": t.detach()[ends] for name, t in zip(STATE, last, strict=True)}}
    begins = [x for x, s in enumerate(here) if offsets[s] >= first]
    for name, t in tensors.items():
        if name not in STATE:
            found[f"d{name}"] = t.grad
            continue
        own = (torch.zeros_like(t) if t.grad is None else t.grad)[-len(here) :]
        others = [x for x in range(len(here)) if x not in begins]
        assert not own[others].any(), f"{name} of a document that goes on has a gradient"
        found[f"d{name}"] = own[begins]
    return as_arrays(found)


PACKED = [
    ((50, 50), (0, 100)),
    ((50, 50), (0, 50, 100)),
    ((50, 50), (0, 20, 70, 100)),
    ((40, 30, 50), (0, 120)),
    ((40, 30, 50), (0, 40, 70, 120)),
    ((40, 30, 50), (0, 5, 6, 115, 120)),
    ((7, 64, 1, 68), (0, 71, 72, 140)),
    ((7, 64, 1, 68), (0, 3, 100, 101, 139, 140)),
    ((30, 70, 30, 10), (0, 10, 30, 99, 130, 131, 140)),
]


def join_packed(found):
    found = as_tensors(found)
    return {
        name: torch.cat([each[name] for each in found], 0 if name.startswith("last") or name[1:] in STATE else 1)
        for name in found[0]
    }


@pytest.mark.parametrize("gates", ["small", "spread"])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("empty_first", [False, True])
@pytest.mark.parametrize(("pieces", "offsets"), PACKED, ids=str)
def test_documents_across_ranks(on_ranks, pieces, offsets, empty_first, state, gates):
    options = {"gate_soft_cap": 15.0} if gates == "spread" else {}
    packed = {**options, "cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
    rows = len(offsets) - 1
    inputs, weights = draw(sum(pieces), batch=1, gates=gates, state=state, seed=rows, rows=rows)
    avoid_kinks(inputs, weights, **packed)
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, **packed)
    alone = one_process(ops.mlstm, inputs, weights, torch.float32, **packed)
    arguments = (inputs, weights, pieces, offsets, empty_first, options)
    assert_as_exact(join_packed(on_ranks(len(pieces), packed_on_this_rank, *arguments)), alone, expected)


@pytest.mark.parametrize("offsets", [(0, 123), (0, 30, 31, 123), (0, 9, 57, 123)], ids=str)
def test_documents_across_nodes(on_ranks, offsets):
    pieces, rows = IN_NODES[1][0], len(offsets) - 1
    packed = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
    inputs, weights = draw(sum(pieces), batch=1, state=True, seed=rows, rows=rows)
    avoid_kinks(inputs, weights, **packed)
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, **packed)
    alone = one_process(ops.mlstm, inputs, weights, torch.float32, **packed)
    arguments = 2, packed_on_this_rank, inputs, weights, pieces, offsets, False, {}
    assert_as_exact(join_packed(on_ranks(len(pieces), in_nodes, *arguments)), alone, expected)


def test_random_pieces_and_documents(on_ranks):
    generator = torch.Generator().manual_seed(1)
    draws = lambda low, high, count: torch.randint(low, high, (count,), generator=generator).tolist()  # noqa: E731
    for world in (2, 3, 4, 4):
        pieces = draws(1, 80, world)
        total = sum(pieces)
        offsets = sorted({0, total, *draws(1, total, draws(0, 6, 1)[0])})
        rows = len(offsets) - 1
        packed = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32)}
        inputs, weights = draw(total, batch=1, state=True, seed=total, rows=rows)
        avoid_kinks(inputs, weights, **packed)
        expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, **packed)
        alone = one_process(ops.mlstm, inputs, weights, torch.float32, **packed)
        found = join_packed(on_ranks(world, packed_on_this_rank, inputs, weights, pieces, offsets, False, {}))
        assert_as_exact(found, alone, expected)


# --- models -----------------------------------------------------------------------------------------------------------


def model_on_this_rank(batch, pieces, options):
    """The loss and gradients of all ranks together, and this rank's logits."""
    model = context.set_group(models_of_ranks.make(**options), dist.group.WORLD)
    cut = context.shard(batch, dist.group.WORLD, pieces)
    out = model(**cut, skip_logits=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for t in (*gradients.values(), loss := out.loss.detach().clone()):
        dist.all_reduce(t)
    return as_arrays({"loss": loss, "logits": out.logits.detach(), **gradients})


def packed_batch():
    ids, labels = models_of_ranks.batch(3, rows=2, seq=30)
    offsets = torch.tensor([0, 10, 19, 30, 31, 45, 60], dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "cu_seq_lens_q": offsets}


def padded_batch():
    ids, labels = models_of_ranks.batch(4, rows=2, seq=37, ignored=5)
    mask = torch.ones_like(ids)
    mask[0, :13], mask[1, 30:] = 0, 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


BATCHES = {
    "rows": lambda: dict(zip(("input_ids", "labels"), models_of_ranks.batch(1, rows=3, seq=41), strict=True)),
    "padding": padded_batch,
    "documents": packed_batch,
    "positions": lambda: {
        **dict(zip(("input_ids", "labels"), models_of_ranks.batch(2, rows=1, seq=60), strict=True)),
        "position_ids": torch.cat([torch.arange(n) for n in (15, 15, 29, 1)])[None],
    },
}


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("which", BATCHES)
def test_model(on_ranks, which, world, weight_mode):
    batch, options = BATCHES[which](), {"weight_mode": weight_mode}
    model = models_of_ranks.make(**options)
    out = model(**batch, skip_logits=False)
    out.loss.backward()
    found = as_tensors(on_ranks(world, model_on_this_rank, batch, None, options))
    logits = torch.cat([each["logits"] for each in found], 1).view(out.logits.shape)
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert torch.allclose(logits[kept], out.logits[kept], rtol=1e-4, atol=1e-5)
    for each in found:
        assert torch.allclose(each["loss"], out.loss, rtol=1e-5)
        for name, p in model.named_parameters():
            assert error(each[name], p.grad.double()) < 1e-5, name


def checkpointed_on_this_rank(batch):
    model = context.set_group(models_of_ranks.make(), dist.group.WORLD)
    gradients = []
    for again in (False, True):
        (model.gradient_checkpointing_enable if again else model.gradient_checkpointing_disable)()
        model.zero_grad()
        model(**context.shard(batch, dist.group.WORLD)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing(on_ranks):
    assert all(on_ranks(3, checkpointed_on_this_rank, BATCHES["documents"]()))


def prefill_on_this_rank(ids):
    model = context.set_group(models_of_ranks.make(max_inference_chunksize=4).eval(), dist.group.WORLD)
    with torch.no_grad():
        cut = context.shard({"input_ids": ids[:, :-1]}, dist.group.WORLD)
        cache = model(**cut, use_cache=True).cache_params
        with pytest.raises(ValueError, match="context_group is set"):
            model(ids[:, -1:], cache_params=cache)
        context.set_group(model, None)
        return model(ids[:, -1:], cache_params=cache).logits.numpy()


def test_a_cache_from_all_ranks(on_ranks):
    ids, _ = models_of_ranks.batch(5, rows=2, seq=32)
    with torch.no_grad():
        expected = models_of_ranks.make().eval()(ids).logits[:, -1:]
    for logits in on_ranks(3, prefill_on_this_rank, ids):
        assert torch.allclose(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-5)


# --- what a sequence over ranks must not do ---------------------------------------------------------------------------


def nan_on_this_rank(inputs, pieces, offsets):
    """Whether h and the gradients of each document's tokens on this rank are finite, beside the documents' numbers."""
    first, stop = bounds_of(pieces)[dist.get_rank()]
    here, local = documents_of(offsets, first, stop)
    tensors = {name: this_ranks(t, pieces).requires_grad_() for name, t in inputs.items()}
    h = context.mlstm(
        *(tensors[x] for x in "qkvif"), group=dist.group.WORLD, cu_seqlens=torch.tensor(local, dtype=torch.int32),
        continues=first not in offsets,
    )  # fmt: skip
    h.square().sum().backward()
    finite = torch.stack([t.isfinite().flatten(2).all(-1) for t in (h, *(t.grad for t in tensors.values()))]).all(0)
    return [(s, bool(finite[0, a:b].all())) for s, (a, b) in zip(here, itertools.pairwise(local), strict=True)]


def test_a_nan_stays_in_its_document(on_ranks):
    pieces, offsets = (40, 30, 50), (0, 20, 75, 90, 120)
    inputs, _ = draw(120, batch=1)
    inputs["k"][0, 25, 0, 0] = torch.nan  # document 1, on the first two ranks and the third
    found = on_ranks(3, nan_on_this_rank, inputs, pieces, offsets)
    assert found == [[(0, True), (1, False)], [(1, False)], [(1, False), (2, True), (3, True)]]


def frozen_on_this_rank(inputs, pieces, wanted):
    """Gradients of some inputs, with a loss that does not look at every rank's h."""
    tensors = {name: this_ranks(t, pieces).requires_grad_(name in wanted) for name, t in inputs.items()}
    h = context.mlstm(*(tensors[x] for x in "qkvif"), group=dist.group.WORLD)
    (h.square().sum() * (dist.get_rank() == len(pieces) - 1)).backward()
    return as_arrays({name: tensors[name].grad for name in wanted})


@pytest.mark.parametrize("wanted", ["q", "v", "f", "qi"])
def test_only_some_gradients(on_ranks, wanted):
    pieces = (20, 30, 10)
    inputs, _ = draw(60)
    found = as_tensors(on_ranks(3, frozen_on_this_rank, inputs, pieces, wanted))
    leaves = {name: t.double().requires_grad_(name in wanted) for name, t in inputs.items()}
    reference.mlstm_chunkwise(*(leaves[x] for x in "qkvif"))[:, 50:].square().sum().backward()
    for name in wanted:
        assert error(torch.cat([each[name] for each in found], 1), leaves[name].grad) < 1e-5, name


def sixteen_bit_on_this_rank(inputs, weights, pieces):
    tensors = {n: this_ranks(t, pieces).to(torch.bfloat16 if n in "qkv" else t.dtype) for n, t in inputs.items()}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    h = context.mlstm(*(tensors[x] for x in "qkvif"), group=dist.group.WORLD)
    h.backward(this_ranks(weights["h"], pieces).bfloat16())
    assert h.dtype == torch.bfloat16
    return as_arrays({"h": h.detach().float(), **{f"d{name}": t.grad.float() for name, t in tensors.items()}})


def test_bfloat16(on_ranks):
    pieces = (100, 60, 96)
    inputs, weights = draw(256)
    inputs = {name: t.bfloat16().float() if name in "qkv" else t for name, t in inputs.items()}
    weights["h"] = weights["h"].bfloat16().float()
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64, False)
    for name, t in joined(on_ranks(3, sixteen_bit_on_this_rank, inputs, weights, pieces)).items():
        assert error(t, expected[name]) < 6e-3, name


def compiled_on_this_rank(inputs, pieces):
    tensors = [this_ranks(inputs[x], pieces).requires_grad_() for x in "qkvif"]
    run = lambda *t: context.mlstm(*t, group=dist.group.WORLD).sin()  # noqa: E731
    results = []
    for form in (run, torch.compile(run, backend="aot_eager")):
        h = form(*tensors)
        results.append((h, *torch.autograd.grad(h.sum(), tensors)))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


def test_compiled(on_ranks):
    assert all(on_ranks(2, compiled_on_this_rank, draw(60)[0], (40, 20)))


def errors_on_this_rank(case):
    """The text of the error that `case` ends in on this rank. None of them waits for another rank."""
    zeros = torch.zeros
    sizes = {"q": (1, 8, 2, 4), "k": (1, 8, 2, 4), "v": (1, 8, 2, 6), "i": (1, 8, 2), "f": (1, 8, 2)}
    good = {name: zeros(size) for name, size in sizes.items()}
    group = dist.group.WORLD
    ids = zeros(2, 9, dtype=torch.long)
    state = zeros(1, 2, 4, 6), zeros(1, 2, 4), zeros(1, 2)
    stack = nn.block_stack.xLSTMBlockStack(
        nn.block_stack.xLSTMBlockStackConfig(
            num_blocks=1, embedding_dim=16, slstm_at=[0], slstm_block=nn.block_stack.sLSTMBlockConfig()
        )
    )
    cases = {
        "k": lambda: context.mlstm(**{**good, "k": zeros(1, 7, 2, 4)}, group=group),
        "float64": lambda: context.mlstm(**{name: t.double() for name, t in good.items()}, group=group),
        "group": lambda: context.mlstm(**good, group="cp"),
        "continues": lambda: context.mlstm(**good, group=group, continues=False),
        "cu_seqlens": lambda: context.mlstm(**good, group=group, cu_seqlens=[0, 8]),
        "state": lambda: context.mlstm(**good, group=group, initial_state=(state[0], state[1][:, :1], state[2])),
        "slstm": lambda: context.slstm(zeros(1)),
        "sLSTM layer": lambda: context.set_group(stack, group),
        "no layer": lambda: context.set_group(torch.nn.Linear(2, 2), group),
        "kernel": lambda: context.set_group(models_of_ranks.make(chunkwise_kernel="parallel--native_autograd"), group),
        "pieces": lambda: context.shard({"input_ids": ids}, group, [9, 0]),
        "shard": lambda: context.shard({"input_ids": ids, "pixels": ids}, group),
        "labels": lambda: context.shard({"input_ids": ids, "labels": ids[:, 1:]}, group),
        "rows of documents": lambda: context.set_group(models_of_ranks.make(), group)(
            ids, cu_seq_lens_q=torch.tensor([0, 9, 12, 18], dtype=torch.int32)
        ),
    }
    try:
        cases[case]()
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


ERRORS = {
    "k": "ValueError: k has shape .*; it must be",
    "float64": "TypeError: q has dtype float64",
    "group": "TypeError: group is a str; it must be",
    "continues": "ValueError: continues is False; .* it must be True",
    "cu_seqlens": "ValueError: cu_seqlens is .*; it must be",
    "state": "ValueError: initial_state n is of shape .*; it must be",
    "slstm": "NotImplementedError: the sLSTM is sequential",
    "sLSTM layer": "ValueError: .* of the block stack",
    "no layer": "ValueError: model is a Linear without",
    "kernel": "ValueError: .* has kernel .*; .* it must be 'flash'",
    "pieces": "ValueError: pieces are",
    "shard": "TypeError: batch has 'pixels'",
    "labels": "ValueError: labels has shape",
    "rows of documents": "ValueError: input_ids has 2 rows",
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(on_ranks, case):
    for text in on_ranks(2, errors_on_this_rank, case):
        assert re.match(ERRORS[case], text or "no error"), text


def test_a_group_of_one_is_one_process(on_ranks):
    inputs, weights = draw(50, state=True)
    found = joined(on_ranks(1, on_this_rank, inputs, weights, (50,), True, {}))
    for name, t in one_process(ops.mlstm, inputs, weights, torch.float32).items():
        assert torch.allclose(found[name], t, rtol=1e-6, atol=1e-7), name


def on_this_gpu(inputs, weights, pieces, dtype):
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl")
    tensors = {name: this_ranks(t, pieces).cuda().to(dtype if name in "qkv" else t.dtype) for name, t in inputs.items()}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    h, last = context.mlstm(*(tensors[x] for x in "qkvif"), group=group, return_final_state=True)
    loss = (h.float() * this_ranks(weights["h"], pieces).cuda()).sum()
    loss = loss + sum((t * weights[f"last {name}"].cuda()).sum() for name, t in zip(STATE, last, strict=True)) / len(
        pieces
    )
    loss.backward()
    found = {"h": h.detach(), **{f"last {name}": t.detach() for name, t in zip(STATE, last, strict=True)}}
    found |= {f"d{name}": t.grad for name, t in tensors.items()}
    return as_arrays({name: t.float().cpu() for name, t in found.items()})


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_gpus(on_ranks, dtype):
    pieces = (300, 211)
    inputs, weights = draw(511)
    inputs = {name: t.to(dtype).float() if name in "qkv" else t for name, t in inputs.items()}
    avoid_kinks(inputs, weights)
    expected = one_process(reference.mlstm_chunkwise, inputs, weights, torch.float64)
    for name, t in joined(on_ranks(2, on_this_gpu, inputs, weights, pieces, dtype, on_gpus=True)).items():
        assert error(t, expected[name]) < (1e-5 if dtype == torch.float32 else 1e-2), name
