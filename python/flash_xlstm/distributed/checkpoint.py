"""Checkpoints of split models: each rank writes and reads its own parts, and the next run may have other ranks."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from flash_xlstm.distributed.mesh import cpu_group
from flash_xlstm.models import xLSTMForCausalLM

_COMPLETE = ".metadata"  # torch writes it when all else is written


def save(
    folder: str | os.PathLike,
    model: nn.Module,
    optimizer: Optimizer,
    values: dict[str, Any] | None = None,
    *,
    asynchronous: bool = False,
) -> Future | None:
    """Saves model and optimizer, by torch.distributed.checkpoint. All ranks must call this.

    Until a save is complete, its folder is no checkpoint to :func:`newest`: a run may be killed at any time.

    Args:
        folder: of this checkpoint alone, on storage that all ranks share.
        values: whatever else belongs to it, the same on every rank, as JSON has it: the step, say.
        asynchronous: return when the weights are copied to the CPU's memory, and write them beside the run.

    Returns:
        None; or, with `asynchronous`, a future: its ``result()`` waits, and raises what went wrong. Wait for it before
        the next save.

    Raises:
        TypeError: `values` are not as JSON has them.
        torch.distributed.checkpoint.CheckpointException: files could not be written.
    """
    try:
        text = json.dumps({} if values is None else values)
    except TypeError as error:
        raise TypeError(f"values are not as JSON has them: {error}") from None
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "values": text}
    options: dict[str, Any] = {"checkpoint_id": os.fspath(folder), "process_group": cpu_group()}
    if asynchronous:
        return dcp.async_save(state, **options)  # type: ignore[return-value]
    dcp.save(state, **options)
    return None


def load(folder: str | os.PathLike, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Loads what :func:`save` saved, on as many ranks as there are, split in any way. All ranks must call this.

    Load only what you trust: torch's checkpoints can hold code.

    Returns:
        The values.

    Raises:
        ValueError: `folder` holds no complete checkpoint; nothing has been changed then.
        torch.distributed.checkpoint.CheckpointException: it is of another model or optimizer, or cannot be read.
    """
    if not _is_complete(Path(folder)):
        raise ValueError(f"folder is {os.fspath(folder)!r}; it must be a complete checkpoint that save wrote")
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments, "values": ""}
    dcp.load(state, checkpoint_id=os.fspath(folder), process_group=cpu_group())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return json.loads(state["values"])


def newest(root: str | os.PathLike) -> Path | None:
    """The complete checkpoint under `root` that was completed last; None where there is none."""
    found = [folder for folder in Path(root).glob("*") if _is_complete(folder)]
    return max(found, key=lambda folder: (folder / _COMPLETE).stat().st_mtime_ns, default=None)


def load_pretrained(model: xLSTMForCausalLM, folder: str | os.PathLike) -> None:
    """Loads the weights of a Hugging Face folder into a model that is split already. Each rank reads its own parts of
    the files, so that the whole model is never in one process. All ranks must call this.

    To begin with no weights at all::

        with torch.device("meta"):
            model = xLSTMForCausalLM(xLSTMConfig.from_pretrained(folder))
        parallelize(model, mesh)
        model.to_empty(device="cuda")
        load_pretrained(model, folder)

    Raises:
        ValueError: `folder` has no safetensors files, lacks a weight, or one of them has another shape; `model` is in
            weight mode "fused". Nothing has been changed then.
    """
    _check_single(model)
    state = model.state_dict()
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"folder is {os.fspath(folder)!r}; it must be a folder with safetensors files")
    reader = HuggingFaceStorageReader(os.fspath(folder))
    found = reader.read_metadata().state_dict_metadata
    if "lm_head.weight" not in found and model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    for name, weight in state.items():
        if name not in found:
            raise ValueError(
                f"folder is {os.fspath(folder)!r}, which has no {name}; it must have all of model's weights"
            )
        if found[name].size != weight.shape:
            raise ValueError(
                f"folder has {name} of shape {tuple(found[name].size)}; it must be {tuple(weight.shape)} for this model"
            )
    dcp.load(state, storage_reader=reader, process_group=cpu_group())


def save_pretrained(
    model: xLSTMForCausalLM,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Saves a split model as a Hugging Face folder, which ``from_pretrained`` reads. Each rank writes its own parts;
    the first rank puts them together, one weight at a time. All ranks must call this.

    Args:
        folder: on storage that all ranks share; of this model alone. While it is written it takes twice the room.
        dtype: of the saved weights; None: the model's.
        max_shard_size: bytes of weights in a file.

    Raises:
        ValueError: `model` is in weight mode "fused", or `folder` has safetensors files already.
    """
    _check_single(model)
    folder = Path(folder)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"folder is {os.fspath(folder)!r}, which has safetensors files; it must have none")
    state = {name: weight if dtype is None else weight.to(dtype) for name, weight in model.state_dict().items()}
    files = file_numbers(state, max_shard_size)
    writer = HuggingFaceStorageWriter(
        os.fspath(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
    )
    dcp.save(state, storage_writer=writer, process_group=cpu_group())
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_config(model, folder, next(iter(state.values())).dtype)
        shutil.rmtree(folder / "sharded")
    if dist.is_initialized():
        dist.barrier(group=cpu_group())


def file_numbers(state: dict[str, Any], max_shard_size: int = 5 * 10**9) -> dict[str, int]:
    """For each weight of a state dict the number, from 1 on, of the file that it goes to."""
    files, size = {}, 0
    for name, weight in state.items():
        size += weight.numel() * weight.element_size()
        files[name] = 1 + (size - 1) // max_shard_size
    return {name: 1 + sorted(set(files.values())).index(number) for name, number in files.items()}


def write_config(model: xLSTMForCausalLM, folder: Path, dtype: torch.dtype) -> None:
    """The files of a Hugging Face folder that say what weights of `dtype` are of."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [xLSTMForCausalLM.__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _is_complete(folder: Path) -> bool:
    return (folder / _COMPLETE).is_file()


def _check_single(model: Any) -> None:
    if not isinstance(model, xLSTMForCausalLM):
        raise TypeError(f"model is a {type(model).__name__}; it must be an xLSTMForCausalLM")
    if model.config.weight_mode != "single":
        raise ValueError(
            f"model is in weight_mode {model.config.weight_mode!r}; it must be 'single', as Hugging Face folders are: "
            "call model.set_weight_mode('single') before it is split"
        )
