"""Checkpoints of NX-AI's packages from and to Hugging Face folders, piece by piece, which takes little memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn
from transformers import initialization

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM, xLSTMLMModel, xLSTMLMModelConfig
from flash_xlstm.models.checkpoints import readable, weight_map
from flash_xlstm.nn import FusableProjections
from flash_xlstm.training.files import partial, publish, remove

HUGGING_FACE, LARGE, STACK = "huggingface", "xlstm_large", "xlstm"
_STACK_TYPE = "xlstm_block_stack"  # the model_type of a block stack's folder
_PIECE = 2**24  # bytes in memory at a time
_TEXTS = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
}  # fmt: skip
# The defaults of xlstm_large's configuration that are not those of transformers'. The others have the same names and
# values; the fields without a default must be given.
_LARGE_DEFAULTS = {
    "ffn_proj_factor": 2.6667, "chunkwise_kernel": "chunkwise--triton_limit_chunk", "step_kernel": "triton",
    "sequence_kernel": "native_sequence__triton",
}  # fmt: skip
_LARGE_NEEDED = ("embedding_dim", "num_heads", "num_blocks", "vocab_size")
_LARGE_FIELDS = (
    *_LARGE_NEEDED, "use_bias", "norm_eps", "norm_reduction_force_float32", "add_out_norm", "qk_dim_factor",
    "v_dim_factor", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states",
    "autocast_kernel_dtype", "eps", "inference_state_dtype", "ffn_proj_factor", "ffn_round_up_to_multiple_of",
    "gate_soft_cap", "output_logit_soft_cap", "weight_mode",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in a file. ``read(begin, end)`` gives bytes of it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], bytes]

    def rows(self, first: int, last: int) -> _Stored:
        row = self.nbytes // self.shape[0]
        return _Stored(
            self.dtype, (last - first, *self.shape[1:]), row * (last - first),
            lambda begin, end: self.read(first * row + begin, first * row + end),
        )  # fmt: skip

    def pieces(self) -> Iterator[bytes]:
        for begin in range(0, self.nbytes, _PIECE):
            yield self.read(begin, min(begin + _PIECE, self.nbytes))


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion made.

    Attributes:
        source, target: kinds of folder, "huggingface", "xlstm_large" or "xlstm".
        tensors, nbytes: number and size of the tensors written.
        files: the files of weights.
    """

    source: str
    target: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    max_shard_size: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Converts a checkpoint's folder between NX-AI's formats and Hugging Face's.

    ``source`` decides the direction:

    - xlstm_large (``config.yaml`` and ``model.safetensors`` or ``model_0.safetensors``, ...) to a Hugging Face folder,
      which :class:`~flash_xlstm.models.xLSTMForCausalLM` and transformers load;
    - a Hugging Face folder of an xLSTM, in either weight mode, to xlstm_large;
    - the language model of the package ``xlstm`` (``config.yaml`` with the fields of its xLSTMLMModelConfig, and its
      state dict as safetensors or in one file of ``torch.save``) to ``config.json`` and safetensors
      (:func:`load_block_stack`), and back.

    Values keep their dtypes and bits. At most 32 MiB of weights are in memory at a time. What was written is read again
    and compared with what was read. The folder appears whole or not at all.

    Args:
        source: a folder.
        target: the folder to make. It must not exist.
        max_shard_size: largest size of a file of weights in bytes; a larger tensor has a file of its own.
        progress: called with the number of bytes written or verified since the last call, and the number in all.

    Raises:
        ValueError: the source is no such checkpoint, is damaged, or its weights are not those of its configuration; or
            what was written differs from what was read.
        OSError: a file cannot be read or written, or the disk is too full.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise ValueError(f"target is {target}, which exists; give a folder that does not")
    if not source.is_dir():
        raise ValueError(f"source is {source}; it must be a folder")
    if not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size!r}; it must be a number of bytes")
    kind, config = _recognized(source)
    tensors = _tensors(source, kind)
    # Sorted as a model has them: embeddings first, blocks in order, so that a file holds what belongs together.
    if isinstance(config, xLSTMConfig):
        written, to = _xlstm(tensors, kind, config)
    else:
        written, to = _block_stack(tensors, config), HUGGING_FACE if kind == STACK else STACK
    total = sum(t.nbytes for t in written.values())
    free = shutil.disk_usage(target.absolute().parent).free
    if free < total:
        raise OSError(f"No space left on device: {target} needs {total:,} bytes, and {free:,} are free")
    report = lambda size: progress(size, 2 * total) if progress is not None else None  # noqa: E731
    hidden = partial(target)
    remove(hidden)
    try:
        hidden.mkdir()
        _write_config(hidden, config, to)
        files = _write(hidden, written, to, max_shard_size, report)
        for path in sorted(source.iterdir()):
            if path.name in _TEXTS or path.name.startswith(("tokenizer", "vocab", "merges")):
                shutil.copy(path, hidden / path.name)
        publish(target)
    except BaseException:
        remove(hidden)
        raise
    return Converted(kind, to, len(written), total, files)


def load_block_stack(folder: str | os.PathLike) -> xLSTMLMModel:
    """The language model of a block stack, from a folder that :func:`convert` made or of the package ``xlstm``.

    Raises:
        ValueError: the folder holds none, or its weights do not fit.
    """
    kind, config = _recognized(Path(folder))
    if not isinstance(config, xLSTMLMModelConfig):
        raise ValueError(f"{folder} is of an xLSTM; load it by xLSTMForCausalLM.from_pretrained")
    stored = _block_stack(_tensors(Path(folder), kind), config)
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    model = xLSTMLMModel(config)
    state = {
        name: torch.frombuffer(bytearray(t.read(0, t.nbytes)), dtype=dtypes[t.dtype]).view(t.shape)
        for name, t in stored.items()
    }
    model.load_state_dict(state)
    return model


# --- folders ---


def _recognized(folder: Path) -> tuple[str, xLSTMConfig | xLSTMLMModelConfig]:
    if (folder / "config.json").is_file():
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / 'config.json'} is not JSON: {error}") from error
        if isinstance(values, dict) and values.get("model_type") == _STACK_TYPE:
            fields = {name: value for name, value in values.items() if name not in ("model_type", "architectures")}
            return HUGGING_FACE, xLSTMLMModelConfig.from_dict(fields)
        return HUGGING_FACE, xLSTMConfig.from_pretrained(folder)
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(f"source is {folder}, which has neither config.json nor config.yaml")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; it must be a mapping of field names to values")
    if values.keys() & {"mlstm_block", "slstm_block", "slstm_at"}:
        return STACK, xLSTMLMModelConfig.from_dict(values)
    missing = [name for name in _LARGE_NEEDED if name not in values]
    unknown = [str(name) for name in values if name not in _LARGE_FIELDS]
    if missing or unknown:
        raise ValueError(
            f"{file} {'lacks ' + ', '.join(missing) if missing else 'holds ' + ', '.join(unknown)}; it must hold the "
            "fields of xlstm_large's xLSTMLargeConfig, or of xlstm's xLSTMLMModelConfig"
        )
    # Hugging Face's models return states and take any length.
    values = {**_LARGE_DEFAULTS, **values, "mode": "inference", "return_last_states": True, "weight_mode": "single"}
    return LARGE, xLSTMConfig(**values)


def _write_config(folder: Path, config: xLSTMConfig | xLSTMLMModelConfig, to: str) -> None:
    if isinstance(config, xLSTMLMModelConfig):
        if to == STACK:
            (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
            return
        values = {"architectures": ["xLSTMLMModel"], "model_type": _STACK_TYPE, **config.to_dict()}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    elif to == LARGE:
        values = {name: getattr(config, name) for name in _LARGE_FIELDS}
        values["weight_mode"] = "single"
        (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    else:
        config.architectures = ["xLSTMForCausalLM"]
        config.save_pretrained(folder)


# --- weights ---


def _tensors(folder: Path, kind: str) -> dict[str, _Stored]:
    """The tensors of a folder, unread."""
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file():
        if kind == HUGGING_FACE and index.is_file():
            files = [folder / name for name in sorted(set(weight_map(os.fspath(index)).values()))]
        else:
            numbered = (folder / f"model_{n}.safetensors" for n in range(10**6))
            files = []
            for path in numbered:
                if not path.is_file():
                    break
                files.append(path)
    if not files and kind == STACK:
        pickles = [path for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
        if len(pickles) == 1:
            return _of_torch(pickles[0])
    if not files:
        raise ValueError(f"source is {folder}, in which there are no weights of the format {kind}")
    tensors: dict[str, _Stored] = {}
    for path in files:
        for name, stored in _of_safetensors(path).items():
            if name in tensors:
                raise ValueError(f"{path} holds {name}, which another file holds too")
            tensors[name] = stored
    return tensors


def _of_safetensors(path: Path) -> dict[str, _Stored]:
    with readable(path), safe_open(os.fspath(path), framework="pt"):  # which checks the header
        pass
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)

    def stored(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> _Stored:
        if dtype not in _DTYPES.values():
            raise ValueError(f"{path} holds {name} as {dtype}; it must be one of {', '.join(_DTYPES.values())}")
        first, last = data_offsets

        def read(begin: int, end: int) -> bytes:
            with open(path, "rb", buffering=0) as file:
                file.seek(8 + length + first + begin)
                data = file.read(end - begin)
                while len(data) < end - begin:  # a read may be short
                    more = file.read(end - begin - len(data))
                    if not more:
                        raise OSError(f"{path} ends within {name}")
                    data += more
                return data

        return _Stored(dtype, tuple(shape), last - first, read)

    return {name: stored(name, **entry) for name, entry in header.items()}


def _of_torch(path: Path) -> dict[str, _Stored]:
    with readable(path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            raise ValueError(f"{path} is no file of torch.save, or one of before torch 1.6: {error}") from error
    for name in ("model", "state_dict", "model_state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path} holds no state dict; it must map names to tensors")

    def stored(name: str, t: Tensor) -> _Stored:
        if t.dtype not in _DTYPES:
            raise ValueError(f"{path} holds {name} as {t.dtype}; it must be a floating-point weight")
        data = t.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _Stored(_DTYPES[t.dtype], tuple(t.shape), t.nbytes, lambda begin, end: data[begin:end].tobytes())

    return {name: stored(name, t) for name, t in state.items()}


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"), initialization.no_init_weights():
        return make()


def _fit(found: Mapping[str, _Stored], wanted: Mapping[str, Tensor]) -> dict[str, _Stored]:
    """The tensors in the model's order.

    Raises:
        ValueError: they are not the model's.
    """
    for name, t in wanted.items():
        if name not in found:
            raise ValueError(f"source has no {name}, which its configuration asks for")
        if found[name].shape != tuple(t.shape):
            raise ValueError(f"{name} has shape {found[name].shape} in source; by its configuration {tuple(t.shape)}")
    extra = sorted(found.keys() - wanted.keys())
    if extra:
        raise ValueError(f"source has {extra[0]}, of which its configuration knows nothing")
    return {name: found[name] for name in wanted}


def _xlstm(tensors: dict[str, _Stored], kind: str, config: xLSTMConfig) -> tuple[dict[str, _Stored], str]:
    config.weight_mode = "single"
    model = _on_meta(lambda: xLSTMForCausalLM(config))
    named = dict(tensors)
    if kind == LARGE:
        named = {re.sub(r"^embedding\.", "backbone.embeddings.", name): t for name, t in named.items()}
        return _fit(named, model.state_dict()), HUGGING_FACE
    if config.tie_word_embeddings and "lm_head.weight" not in named and "backbone.embeddings.weight" in named:
        named["lm_head.weight"] = named["backbone.embeddings.weight"]
    for prefix, module in model.named_modules():
        if isinstance(module, FusableProjections):
            for fused, parts in module.projection_groups.items():
                for what in ("weight", "bias"):
                    _split(named, prefix, fused, parts, what)
    fitting = _fit(named, model.state_dict())
    return {re.sub(r"^backbone\.embeddings\.", "embedding.", name): t for name, t in fitting.items()}, LARGE


def _split(named: dict[str, _Stored], prefix: str, fused: str, parts: dict[str, int], what: str) -> None:
    """Replaces a stacked tensor by its parts, in place."""
    whole = named.get(f"{prefix}.{fused}.{what}")
    if whole is None or whole.shape[0] != sum(parts.values()):
        return
    del named[f"{prefix}.{fused}.{what}"]
    first = 0
    for part, size in parts.items():
        named[f"{prefix}.{part}.{what}"] = whole.rows(first, first + size)
        first += size


def _block_stack(tensors: dict[str, _Stored], config: xLSTMLMModelConfig) -> dict[str, _Stored]:
    return _fit(tensors, _on_meta(lambda: xLSTMLMModel(config)).state_dict())


def _shards(tensors: dict[str, _Stored], most: int) -> list[dict[str, _Stored]]:
    shards: list[dict[str, _Stored]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    return shards


def _write(
    folder: Path, tensors: dict[str, _Stored], to: str, most: int, report: Callable[[int], None]
) -> tuple[str, ...]:
    shards = _shards(tensors, most)
    if len(shards) == 1:
        files = ["model.safetensors"]
    elif to == HUGGING_FACE:
        files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    else:
        files = [f"model_{n}.safetensors" for n in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        _verify(folder / file, shard, _write_file(folder / file, shard, report), report)
    return tuple(files)


def _write_file(path: Path, tensors: dict[str, _Stored], report: Callable[[int], None]) -> dict[str, str]:
    """Writes a safetensors file. Returns each tensor's checksum, of what was read."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in tensors.items():
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sums = {}
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, t in tensors.items():
            found = hashlib.blake2b()
            for piece in t.pieces():
                found.update(piece)
                file.write(piece)
                report(len(piece))
            sums[name] = found.hexdigest()
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the disk is read, and not its cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sums


def _verify(path: Path, tensors: dict[str, _Stored], sums: dict[str, str], report: Callable[[int], None]) -> None:
    written = _of_safetensors(path)
    if written.keys() != tensors.keys():
        raise ValueError(f"{path} holds other tensors than were written")
    for name, t in written.items():
        found = hashlib.blake2b()
        for piece in t.pieces():
            found.update(piece)
            report(len(piece))
        if (t.dtype, t.shape, found.hexdigest()) != (tensors[name].dtype, tensors[name].shape, sums[name]):
            raise ValueError(f"{path} holds {name} with other values than were read; the disk may be faulty")
