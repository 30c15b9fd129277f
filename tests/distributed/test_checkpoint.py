"""Checkpoints of split models, on other ranks, and as Hugging Face folders."""

from __future__ import annotations

import pytest
import torch
from models_of_ranks import batch, make, whole
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flash_xlstm.distributed import load, load_pretrained, newest, parallelize, save, save_pretrained
from flash_xlstm.models import xLSTMForCausalLM

SHARDED, TP, BOTH = ("dp_shard",), ("tp",), ("dp_shard", "tp")


def _model(shape, names, **options):
    model = parallelize(make(**options), init_device_mesh("cpu", shape, mesh_dim_names=names))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def _step(model, optimizer, number):
    """The same batch on every rank."""
    ids, labels = batch(number)
    loss = model(ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _write(folder, shape, names, asynchronous):
    """Two steps, a save in mid-run, and the losses behind it."""
    model, optimizer = _model(shape, names)
    for number in range(2):
        _step(model, optimizer, number)
    optimizer.param_groups[0]["lr"] = 3e-2  # belongs to the checkpoint
    future = save(f"{folder}/2", model, optimizer, {"step": 2}, asynchronous=asynchronous)
    losses = [_step(model, optimizer, number) for number in (2, 3)]
    assert (future is not None) == asynchronous
    if asynchronous:
        future.result(60)
    return losses


def _read(folder, shape, names):
    model, optimizer = _model(shape, names)
    _step(model, optimizer, 9)  # what is loaded replaces it
    at = newest(folder)
    values = load(at, model, optimizer)
    assert values == {"step": 2} and at.name == "2"
    return [_step(model, optimizer, number) for number in (2, 3)]


@pytest.mark.parametrize(
    ("written", "read", "asynchronous"),
    [
        (((4,), SHARDED), ((2,), SHARDED), False),
        (((2, 2), BOTH), ((2,), SHARDED), True),
        (((2,), SHARDED), ((2,), TP), True),
        (((2,), TP), ((2, 2), ("dp_replicate", "dp_shard")), False),
    ],
)
def test_on_other_ranks(on_ranks, tmp_path, written, read, asynchronous):
    ranks = [torch.tensor(shape).prod().item() for shape, _ in (written, read)]
    losses = on_ranks(ranks[0], _write, str(tmp_path / "run"), *written, asynchronous)
    again = on_ranks(ranks[1], _read, str(tmp_path / "run"), *read)
    assert losses[0] == pytest.approx(again[0], rel=1e-5) and losses[0][0] != losses[0][1]


def _errors(folder):
    model, optimizer = _model((2,), SHARDED)
    with pytest.raises(ValueError, match="it must be a complete checkpoint"):
        load(f"{folder}/none", model, optimizer)
    with pytest.raises(TypeError, match="values are not as JSON"):
        save(f"{folder}/1", model, optimizer, {"step": torch.ones(2)})
    assert newest(folder) is None
    with pytest.raises(ValueError, match="with safetensors files"):
        load_pretrained(model, folder)
    fused, _ = _model((2,), SHARDED, weight_mode="fused")
    for call in (load_pretrained, save_pretrained):
        with pytest.raises(ValueError, match="weight_mode 'fused'; it must be 'single'"):
            call(fused, folder)
    with pytest.raises(TypeError, match="model is a Linear"):
        load_pretrained(torch.nn.Linear(2, 2), folder)


def test_errors(on_ranks, tmp_path):
    on_ranks(2, _errors, str(tmp_path / "run"))


def _from_folder(folder, shape, names, tied):
    """Into a model that has no weights before it is split."""
    with torch.device("meta"):
        model = xLSTMForCausalLM(xLSTMForCausalLM.config_class.from_pretrained(folder)).train()
    parallelize(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
    model.to_empty(device="cpu")
    load_pretrained(model, folder)
    if tied:
        assert model.lm_head.weight is model.backbone.embeddings.weight
    one, (ids, labels) = make(tie_word_embeddings=tied), batch(0)
    for name, p in one.named_parameters():
        assert torch.equal(whole(model.get_parameter(name)), p), name
    assert abs(model(ids, labels=labels).loss - one(ids, labels=labels).loss) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("shape", "names"), [((2,), SHARDED), ((2,), TP), ((2, 2), BOTH)])
def test_from_a_folder(on_ranks, tmp_path, shape, names, tied):
    make(tie_word_embeddings=tied).save_pretrained(tmp_path / "hf", max_shard_size="20kB")
    on_ranks(torch.tensor(shape).prod().item(), _from_folder, str(tmp_path / "hf"), shape, names, tied)


def _wrong_folder(folder):
    for options, said in (
        ({"num_hidden_layers": 3}, "which has no backbone.blocks.2"),
        ({"vocab_size": 50}, "has backbone.embeddings.weight of shape"),
    ):
        model = parallelize(make(**options), init_device_mesh("cpu", (2,), mesh_dim_names=SHARDED))
        before = [whole(p).clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=said):
            load_pretrained(model, folder)
        assert all(torch.equal(a, whole(b)) for a, b in zip(before, model.parameters(), strict=True))


def test_from_a_folder_of_another_model(on_ranks, tmp_path):
    make().save_pretrained(tmp_path / "hf")
    on_ranks(2, _wrong_folder, str(tmp_path / "hf"))


def _to_folder(folder, shape, names, tied, dtype):
    model, _ = _model(shape, names, tie_word_embeddings=tied)
    save_pretrained(model, folder, dtype=dtype, max_shard_size=20_000)
    with pytest.raises(ValueError, match="which has safetensors files"):
        save_pretrained(model, folder)
    dist.barrier()


@pytest.mark.parametrize(("shape", "names", "tied"), [((2,), SHARDED, True), ((2, 2), BOTH, False)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_to_a_folder(on_ranks, tmp_path, shape, names, tied, dtype):
    folder = tmp_path / "hf"
    on_ranks(torch.tensor(shape).prod().item(), _to_folder, str(folder), shape, names, tied, dtype)
    assert len(list(folder.glob("*.safetensors"))) > 2 and not (folder / "sharded").exists()
    loaded, one = xLSTMForCausalLM.from_pretrained(folder, dtype="auto"), make(tie_word_embeddings=tied)
    assert type(loaded) is xLSTMForCausalLM and loaded.dtype == (dtype or torch.float32)
    for name, p in one.named_parameters():
        assert torch.equal(loaded.get_parameter(name), p.to(loaded.dtype)), name
