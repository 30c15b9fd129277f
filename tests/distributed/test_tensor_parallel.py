"""Heads, features and vocabulary split over ranks, with and without sharded weights: loss and gradients are those of
one process."""

from __future__ import annotations

import copy
import functools
import importlib
from collections import Counter

import functorch.compile
import pytest
import torch
from models_of_ranks import VOCABULARY, batch, check_gradients, expected, make, whole
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flash_xlstm.distributed import mean_labels, parallelize, vocabulary_parallel_cross_entropy
from flash_xlstm.models import modeling_xlstm
from flash_xlstm.nn.xlstm_7b import residual
from flash_xlstm.ops import linear_cross_entropy

ALONE = ((2,), ("tp",))
SHARDED = ((2, 2), ("dp_shard", "tp"))
REPLICATED = ((2, 2), ("dp_replicate", "tp"))


def _batches(mesh, parts=1):
    """This data-parallel rank's, and those of all."""
    names = [name for name in mesh.mesh_dim_names if name.startswith("dp")]
    ranks, rank = (mesh[names[0]].size(), mesh[names[0]].get_local_rank()) if names else (1, 0)
    each = [[batch(10 * r + p, ignored=3 * r + p) for p in range(parts)] for r in range(ranks)]
    return each[rank], [b for own in each for b in own], ranks


def _same(mesh, options, make_options, how=None):
    mesh = init_device_mesh("cpu", mesh[0], mesh_dim_names=mesh[1])
    own, every, ranks = _batches(mesh, parts=2)
    loss, gradients = expected(make(**make_options), every)
    model = parallelize(make(**make_options), mesh, **options)
    placements = {name: p.placements for name, p in model.named_parameters()}
    count = mean_labels([labels for _, labels in own], mesh)
    total = torch.zeros(())
    for ids, labels in own:
        output = model(ids, labels=labels, num_items_in_batch=count)
        assert output.logits is None
        output.loss.backward()
        total += output.loss.detach()
    if ranks > 1:
        dist.all_reduce(total, group=mesh.get_group(mesh.mesh_dim_names[0]))
    assert abs(total / ranks - loss) < 1e-5 * loss
    check_gradients(model, gradients)
    assert all(p.grad.placements == placements[name] for name, p in model.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    wanted = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert abs(whole(norm) - wanted) < 1e-5 * wanted
    torch.optim.AdamW(model.parameters(), foreach=True).step()


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_alone(on_ranks, sequence_parallel):
    on_ranks(2, _same, ALONE, {"sequence_parallel": sequence_parallel}, {})


@pytest.mark.parametrize("mesh", [SHARDED, REPLICATED])
def test_with_data_parallel(on_ranks, mesh):
    on_ranks(4, _same, mesh, {"checkpointing": mesh is SHARDED}, {})


@pytest.mark.parametrize(
    "make_options",
    [
        {"use_bias": True},
        {"tie_word_embeddings": True},
        {"add_out_norm": False},
        {"output_logit_soft_cap": None, "gate_soft_cap": None},
        {"qk_dim_factor": 1.0, "num_hidden_layers": 1},
    ],
)
def test_other_models(on_ranks, make_options):
    on_ranks(2, _same, ALONE, {}, make_options)


def test_four_ranks(on_ranks):
    on_ranks(4, _same, ((4,), ("tp",)), {}, {})


def test_compiled(on_ranks):
    on_ranks(2, _same, ALONE, {"compile": "aot_eager"}, {})


def _pipelined():
    """What Inductor's pass for asynchronous tensor parallel makes of a block's graphs. Its operators run on GPUs only:
    the graphs before it are computed here."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import micro_pipeline_tp, post_grad
    from torch.distributed import _symmetric_memory

    parallel, found, asked = importlib.import_module("flash_xlstm.distributed.parallel"), [], []
    parallel._check_async = lambda *_: None
    _symmetric_memory.enable_symm_mem_for_group = asked.append
    dist.is_nccl_available = lambda: True

    def look(graph, _):
        copied = copy.deepcopy(graph)
        post_grad.view_to_reshape(copied)
        with _symmetric_memory._test_mode():
            micro_pipeline_tp.micro_pipeline_tp_pass(copied.graph)
        names = [str(node.target).split(".")[1] for node in copied.graph.nodes if "." in str(node.target)]
        found.append(Counter(name for name in names if "gather" in name or "scatter" in name))
        return functorch.compile.make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, bw_compiler=look, decompositions=select_decomp_table())
    compiled = torch.compile

    def compile(function, **given):
        asked.append(given)
        return compiled(function, backend=backend)

    torch.compile = compile
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    one, model = make(), parallelize(make(), mesh, compile=True, async_tensor_parallel=True)
    torch.compile = compiled
    group, *options = asked
    assert group == mesh.get_group().group_name
    assert options == [{"backend": "inductor", "options": {"_micro_pipeline_tp": True}}] * 2
    ids, labels = batch(0)
    one(ids, labels=labels).loss.backward()
    model(ids, labels=labels).loss.backward()
    check_gradients(model, {name: p.grad for name, p in one.named_parameters()})
    return [dict(graph) for graph in found]


def test_asynchronous(on_ranks):
    """All gathers and scatters of the forward, and the gathers of the backward, go with products. A scatter of the
    backward sums gradients of several."""
    for forward, backward in on_ranks(2, _pipelined):
        assert forward == {"fused_all_gather_matmul": 2, "fused_matmul_reduce_scatter": 2}
        assert backward["fused_all_gather_matmul"] == 2


def _halves(sequence_parallel, checkpointing):
    """Blocks run as two functions, and keep little with checkpointing; or module by module where one is looked at."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids, labels = batch(0)
    one = make()
    one(ids, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in one.named_parameters()}
    found = []
    for looked_at in (False, True):
        model = parallelize(make(), mesh, sequence_parallel=sequence_parallel, checkpointing=checkpointing)
        if looked_at:
            for block in model.backbone.blocks:
                block.ffn.proj_up.register_forward_hook(lambda *args: found.append("hook"))
        run, torchs = residual.run_mlstm, modeling_xlstm.checkpoint
        residual.run_mlstm = lambda *args, run=run: found.append(args[-1]) or run(*args)
        modeling_xlstm.checkpoint = lambda run, *args, **_: found.append("torch") or run(*args)
        for block in model.backbone.blocks:
            block._gradient_checkpointing_func = functools.partial(modeling_xlstm.checkpoint, use_reentrant=False)
        try:
            model(ids, labels=labels).loss.backward()
        finally:
            residual.run_mlstm, modeling_xlstm.checkpoint = run, torchs
        check_gradients(model, gradients)
    return found


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_blocks_are_two_functions(on_ranks, sequence_parallel, checkpointing):
    by_module = ["torch", "hook"] if checkpointing else ["hook"]
    found = on_ranks(2, _halves, sequence_parallel, checkpointing)
    assert found == [[checkpointing] * 2 + by_module * 2] * 2


def _packed_and_padded():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids, labels = batch(0)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = torch.cat((torch.arange(7), torch.arange(5))).repeat(2, 1)
    for given in ({"attention_mask": mask}, {"position_ids": positions}):
        one, model = make(), parallelize(make(), mesh)
        wanted, found = (each(ids, labels=labels, **given).loss for each in (one, model))
        wanted.backward()
        found.backward()
        assert abs(found - wanted) < 1e-5 * wanted
        check_gradients(model, {name: p.grad for name, p in one.named_parameters()})


def test_packed_and_padded(on_ranks):
    on_ranks(2, _packed_and_padded)


def _frozen():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids, labels = batch(0)
    one, model = make(), make()
    for each in (one, model):
        for name, p in each.named_parameters():
            p.requires_grad_(not ("embeddings" in name or ".ffn." in name or ".q." in name or "norm_mlstm" in name))
    parallelize(model, mesh)
    for each in (one, model):
        each(ids, labels=labels).loss.backward()
    check_gradients(model, {name: p.grad for name, p in one.named_parameters()})


def test_frozen_weights(on_ranks):
    on_ranks(2, _frozen)


def _adapted():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = make()
    model.backbone.blocks[1].mlstm_layer.q = torch.nn.Sequential(model.backbone.blocks[1].mlstm_layer.q)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlstm_layer\.q is a Sequential; it must be a torch"):
        parallelize(model, mesh)


def test_other_layers(on_ranks):
    on_ranks(2, _adapted)


def _logits():
    """With gradients, and without: loss and logits of evaluation."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids, labels = batch(0)
    one, model = make().eval(), parallelize(make(), mesh).eval()
    wanted, found = (each(ids, labels=labels) for each in (one, model))
    assert found.logits.shape == (2, 12, VOCABULARY)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    for output in (wanted, found):
        output.loss.backward()
    check_gradients(model, {name: p.grad for name, p in one.named_parameters()})
    with torch.no_grad():
        without = model(ids, labels=labels, use_cache=False)
    torch.testing.assert_close(without.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds has 11 tokens"):
        model(ids[:, :11])


def test_logits(on_ranks):
    on_ranks(2, _logits)


def _loss(dtype, soft_cap, reduction):
    torch.manual_seed(3)
    group, rank = dist.group.WORLD, dist.get_rank()
    hidden, weight = torch.randn(2, 700, 16).to(dtype), (3 * torch.randn(30, 16)).to(dtype)
    labels = torch.randint(0, 30, (2, 700))
    labels[0, 5:70] = -100
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    wanted = linear_cross_entropy(h, w, labels, soft_cap=soft_cap, reduction=reduction)
    wanted.backward(torch.tensor(0.7))
    part = weight[15 * rank : 15 * (rank + 1)].clone().requires_grad_()
    mine = hidden.clone().requires_grad_()
    given = {"soft_cap": soft_cap, "reduction": reduction}
    found = vocabulary_parallel_cross_entropy(mine, part, labels, group, **given)
    found.backward(torch.tensor(0.7))
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, wanted, rtol=near["rtol"], atol=0)
    for a, b in ((mine.grad, h.grad), (part.grad, w.grad[15 * rank : 15 * (rank + 1)])):
        scale = b.float().abs().max()
        torch.testing.assert_close(a.float() / scale, b.float() / scale, **near)
    frozen = vocabulary_parallel_cross_entropy(
        hidden.requires_grad_(), weight[15 * rank :][:15], labels, group, **given
    )
    frozen.backward()
    with torch.no_grad():
        assert not vocabulary_parallel_cross_entropy(mine, part, labels, group).requires_grad
    for wrong, said in (
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"soft_cap": -1.0}, "soft_cap is -1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            vocabulary_parallel_cross_entropy(mine, part, labels, group, **wrong)
    with pytest.raises(ValueError, match="labels holds 30; they must be from 0 to 29"):
        vocabulary_parallel_cross_entropy(mine, part, labels.masked_fill(labels == 3, 30), group)
    with pytest.raises(ValueError, match="weight has shape"):
        vocabulary_parallel_cross_entropy(mine, part[:, :3], labels, group)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "reduction"), [(torch.float32, "mean"), (torch.bfloat16, "sum")])
def test_loss(on_ranks, dtype, soft_cap, reduction):
    on_ranks(2, _loss, dtype, soft_cap, reduction)
