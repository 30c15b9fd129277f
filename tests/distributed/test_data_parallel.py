"""Weights replicated, sharded, or both: loss and gradients are those of one process."""

from __future__ import annotations

import functools

import pytest
import torch
from models_of_ranks import batch, check_gradients, expected, make
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from flash_xlstm.distributed import mean_labels, parallelize
from flash_xlstm.models import modeling_xlstm
from flash_xlstm.training import convert_to_float8

MESHES = {
    "replicated": (2, ("dp_replicate",)),
    "sharded": (2, ("dp_shard",)),
    "both": ((2, 2), ("dp_replicate", "dp_shard")),
}
meshes = pytest.mark.parametrize("kind", MESHES)


def _mesh(kind):
    shape, names = MESHES[kind]
    return init_device_mesh("cpu", (shape,) if isinstance(shape, int) else shape, mesh_dim_names=names)


def _ranks(kind):
    return 4 if kind == "both" else 2


def _uneven(world, parts):
    """For each rank, as many batches as there are parts; each of another number of labels."""
    return [[batch(10 * r + p, ignored=3 * r + p) for p in range(parts)] for r in range(world)]


def _train(model, mesh, batches, sync=None):
    """A step's backward of this rank's batches; the loss of all ranks."""
    count = mean_labels([labels for _, labels in batches], mesh)
    total = torch.zeros(())
    for number, (ids, labels) in enumerate(batches):
        if sync is not None:
            sync(number == len(batches) - 1)
        output = model(ids, labels=labels, num_items_in_batch=count)
        assert output.logits is None  # the loss is made without them
        output.loss.backward()
        total += output.loss.detach()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _same(kind, parts, options, make_options):
    mesh, batches = _mesh(kind), _uneven(dist.get_world_size(), parts)
    loss, gradients = expected(make(**make_options), [b for own in batches for b in own])
    model = make(**make_options)
    assert parallelize(model, mesh, **options) is model
    found = _train(model, mesh, batches[dist.get_rank()], model.set_requires_gradient_sync)
    assert abs(found - loss) < 1e-5 * loss
    check_gradients(model, gradients)


@meshes
def test_uneven_batches_in_parts(on_ranks, kind):
    on_ranks(_ranks(kind), _same, kind, 2, {}, {})


@meshes
def test_checkpointing(on_ranks, kind):
    on_ranks(_ranks(kind), _same, kind, 1, {"checkpointing": True}, {})


@pytest.mark.parametrize("make_options", [{"weight_mode": "fused"}, {"tie_word_embeddings": True}, {"use_bias": True}])
def test_other_models(on_ranks, make_options):
    on_ranks(2, _same, "sharded", 1, {"reshard_after_forward": False}, make_options)


def _ddp():
    mesh, batches = _mesh("replicated"), _uneven(2, 1)
    loss, gradients = expected(make(), [b for own in batches for b in own])
    model = DistributedDataParallel(make())
    assert abs(_train(model, mesh, batches[dist.get_rank()]) - loss) < 1e-5 * loss
    check_gradients(model, gradients)


def test_torch_ddp(on_ranks):
    on_ranks(2, _ddp)


def _blocks_keep_little(checkpointing):
    """Checkpointing computes blocks again without another mLSTM, with sharded weights too."""
    model = parallelize(make(), _mesh("sharded"), checkpointing=checkpointing)
    calls, torchs = [], modeling_xlstm.checkpoint
    modeling_xlstm.checkpoint = lambda run, *args, **_: calls.append(run) or run(*args)
    for block in model.backbone.blocks:
        block._gradient_checkpointing_func = functools.partial(modeling_xlstm.checkpoint, use_reentrant=False)
    try:
        model(*batch(0)[:1], labels=batch(0)[1]).loss.backward()
    finally:
        modeling_xlstm.checkpoint = torchs
    return len(calls), [block.gradient_checkpointing for block in model.backbone.blocks]


@pytest.mark.parametrize(("checkpointing", "which"), [(True, [True, True]), (2, [True, False]), (0, [False, False])])
def test_checkpointing_is_the_blocks_own(on_ranks, checkpointing, which):
    assert on_ranks(2, _blocks_keep_little, checkpointing) == [(0, which)] * 2


def _unused(kind):
    """Embeddings that no rank uses, and frozen weights."""
    torch.manual_seed(1)
    embeds, labels = torch.randn(dist.get_world_size(), 2, 12, 32), batch(3)[1]

    def frozen():
        model = make()
        for name, p in model.named_parameters():
            p.requires_grad_(not ("blocks.0.ffn" in name or name.endswith("out_norm.weight") or ".q." in name))
        return model

    one = frozen()
    for part in embeds:
        (one(inputs_embeds=part, labels=labels).loss / len(embeds)).backward()
    model = parallelize(frozen(), _mesh(kind))
    model(inputs_embeds=embeds[dist.get_rank()], labels=labels).loss.backward()
    check_gradients(model, {name: p.grad for name, p in one.named_parameters()})


@meshes
def test_unused_and_frozen_weights(on_ranks, kind):
    on_ranks(_ranks(kind), _unused, kind)


def _mixed(kind):
    """Weights in bfloat16 from float32 shards: exactly what one process makes of bfloat16 weights; and gradients that
    are summed in float32."""
    mesh, world = _mesh(kind), dist.get_world_size()
    model, gradients = parallelize(make(), mesh, mixed_precision=torch.bfloat16), {}
    count = torch.tensor(16001.5)  # bfloat16 does not hold it
    for rank in range(world):
        ids, labels = batch(rank)
        one = make().to(torch.bfloat16)
        wanted = one(ids, labels=labels, num_items_in_batch=count).loss
        wanted.backward()
        for name, p in one.named_parameters():
            gradients[name] = gradients.get(name, 0) + p.grad.float() / world
        if rank == dist.get_rank():
            found = model(ids, labels=labels, num_items_in_batch=count).loss
            assert found.dtype == torch.float32 and torch.equal(found, wanted)
            found.backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_gradients(model, gradients)


@meshes
def test_mixed_precision(on_ranks, kind):
    on_ranks(_ranks(kind), _mixed, kind)


@pytest.mark.slow
def test_compiled(on_ranks):
    on_ranks(2, _same, "sharded", 1, {"compile": "aot_eager", "checkpointing": True}, {})


def _refused(make_options, mesh, options):
    shape, names = mesh
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = make(**make_options)
    before = list(model.parameters())
    with pytest.raises((ValueError, TypeError, ImportError)) as raised:
        parallelize(model, mesh, **options)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return str(raised.value)


SHARD = ((2,), ("dp_shard",))
TP = ((2,), ("tp",))
ASYNC = {"async_tensor_parallel": True, "compile": True}


@pytest.mark.parametrize(
    ("make_options", "mesh", "options", "said"),
    [
        ({}, ((2,), None), {}, "mesh has no mesh_dim_names"),
        ({}, ((2,), ("dp",)), {}, "mesh has a dimension 'dp'"),
        ({}, SHARD, {"mixed_precision": "bf16"}, "mixed_precision is 'bf16'; it must be one of"),
        ({}, ((2, 1), ("tp", "dp_shard")), {}, "they must be in the order of dp_replicate, dp_shard, cp, tp"),
        ({}, SHARD, {"compile": 3}, "compile is 3"),
        ({}, SHARD, {"checkpointing": "some"}, "checkpointing is 'some'"),
        ({}, SHARD, {"checkpointing": -1}, "checkpointing is -1"),
        ({}, TP, {"sequence_parallel": None}, "sequence_parallel is None"),
        ({}, SHARD, {"reshard_after_forward": "no"}, "reshard_after_forward is 'no'"),
        ({}, ((2,), ("dp_replicate",)), {"reshard_after_forward": True}, "reshard_after_forward is True, but mesh"),
        ({}, TP, {"mixed_precision": torch.bfloat16}, "mixed_precision is torch.bfloat16, but mesh has none of"),
        ({}, TP, {"float8": "rowwise"}, "float8 is 'rowwise', but mesh has a dimension 'tp'"),
        ({}, TP, {"async_tensor_parallel": 1}, "async_tensor_parallel is 1; it must be True or False"),
        ({}, SHARD, ASYNC, "async_tensor_parallel is True, but mesh has the dimensions ('dp_shard',)"),
        ({}, TP, {**ASYNC, "sequence_parallel": False}, "async_tensor_parallel is True, but sequence_parallel is"),
        ({}, TP, {**ASYNC, "compile": False}, "async_tensor_parallel is True, but compile is False"),
        ({}, TP, {**ASYNC, "compile": "aot_eager"}, "async_tensor_parallel is True, but compile is 'aot_eager'"),
        ({}, TP, ASYNC, "async_tensor_parallel is True, but mesh is of cpu devices; they must be cuda"),
        ({"num_heads": 1}, TP, {}, "mesh has 2 tp ranks; num_heads, which is 1"),
        ({"vocab_size": 49}, TP, {}, "vocab_size, which is 49"),
        ({"weight_mode": "fused"}, TP, {}, "model is in weight_mode 'fused'; it must be 'single'"),
    ],
)
def test_errors_on_every_rank(on_ranks, make_options, mesh, options, said):
    assert all(said in each for each in on_ranks(2, _refused, make_options, mesh, options))


def test_float8_without_torchao(on_ranks):
    try:
        import torchao  # noqa: F401
    except ImportError:
        assert all("float8 needs torchao" in each for each in on_ranks(2, _refused, {}, SHARD, {"float8": "rowwise"}))
    else:
        pytest.skip("torchao is installed")


def _float8(given):
    """Layers in float8, emulated, beside one process; and the argument, which exchanges the same layers."""
    mesh, world = _mesh("sharded"), dist.get_world_size()
    one, model = make(), make()
    for each in (one, model):
        convert_to_float8(each, emulate=True)
    for rank in range(world):
        ids, labels = batch(rank)
        (one(ids, labels=labels, num_items_in_batch=22).loss / world).backward()
    gradients = {name: p.grad for name, p in one.named_parameters()}
    parallelize(model, mesh)
    ids, labels = batch(dist.get_rank())
    model(ids, labels=labels, num_items_in_batch=22).loss.backward()
    check_gradients(model, gradients, 0.02)  # a value may round to its neighbour in float8
    converted = {name: type(m).__name__ for name, m in parallelize(make(), mesh, float8=given).named_modules()}
    assert converted == {name: type(m).__name__ for name, m in model.named_modules()}
    return sum(name == "Float8Linear" for name in converted.values())


def test_float8(on_ranks):
    pytest.importorskip("torchao")
    assert on_ranks(2, _float8, "rowwise") == [16, 16]  # q, k, v, output gate, output; up twice, down; of two blocks


def _twice():
    mesh = _mesh("sharded")
    model = parallelize(make(), mesh)
    with pytest.raises(ValueError, match="sharded already"):
        parallelize(model, mesh)
    with pytest.raises(TypeError, match="model is a Linear"):
        parallelize(torch.nn.Linear(2, 2), mesh)
    with pytest.raises(TypeError, match="mesh is a list"):
        parallelize(make(), [2])
    with pytest.raises(ValueError, match="labels has shape none"):
        mean_labels([], mesh)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        mean_labels(torch.zeros(3), mesh)


def test_wrong_arguments(on_ranks):
    on_ranks(2, _twice)
