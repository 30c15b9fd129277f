"""The weight mode of a checkpoint, and the form in which checkpoints are saved."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from flash_xlstm.nn import FusableProjections, convert_weight_mode

HUB_ARGUMENTS = (
    "cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder",
)  # fmt: skip

_BLOCK = re.compile(r"(?:backbone\.)?blocks\.(\d{1,9})\.")
_OWN = re.compile(r"(?:backbone\.)?(?:blocks|embeddings|out_norm)\.|lm_head\.")
_FILE = re.compile(r"[^/\\]+\.safetensors")


def weight_modes(config_class: Any, path: Any, config: Any, kwargs: dict[str, Any]) -> tuple[str, str]:
    """The weight mode of a checkpoint, and the weight mode that its model gets.

    Args:
        config_class: the class that reads the configuration where `config` is not one.
        path: a folder, or a name on the hub; None where ``kwargs["state_dict"]`` holds the weights.
        config: a configuration or its path; None for the one at `path`.
        kwargs: the other arguments of ``from_pretrained``.

    Raises:
        ValueError: a file is damaged, or the folder's configuration has more blocks than its weights. Only headers have
            been read.
    """
    hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    wanted, read, blocks = getattr(config, "weight_mode", None), config, None
    if wanted is None:
        try:
            read = config_class.from_pretrained(path if config is None else config, **hub)
        except OSError:  # an adapter's folder, or none: from_pretrained handles these
            return "single", "single"
        wanted = kwargs.get("weight_mode", read.weight_mode)
        if config is None and not kwargs.keys() & {"num_hidden_layers", "num_blocks"}:
            blocks = read.num_hidden_layers
    if kwargs.get("state_dict") is not None:
        names: Iterable[str] = kwargs["state_dict"]
    else:
        given = kwargs.get("quantization_config") or getattr(read, "quantization_config", None)
        names = _weight_names(path, kwargs.get("variant"), hub, quantized=given is not None)
        found = max((int(match[1]) + 1 for match in map(_BLOCK.match, names) if match), default=None)
        if blocks is not None and found is not None and blocks > found:
            raise ValueError(
                f"num_hidden_layers is {blocks} in {path} (config.json, or the default without one); it must be "
                f"{found}, as many blocks as its weights have (give num_hidden_layers to add new ones)"
            )
    return _mode_of(names) or wanted, wanted


def _mode_of(names: Iterable[str]) -> str | None:
    for name in names:
        if name.endswith("mlstm_layer.qkv_opreact.weight"):
            return "fused"
        if name.endswith("mlstm_layer.q.weight"):
            return "single"
    return None


def _weight_names(path: Any, variant: str | None, hub: dict[str, Any], quantized: bool = True) -> list[str]:
    """Names of the tensors in a safetensors checkpoint; empty where none is found. Reads the headers of local files.

    Raises:
        ValueError: a file is damaged or holds what is no weight, or the index names what is no file beside it.
    """
    found = _weight_file(path, variant, hub)
    if found is None:
        return []
    if not found.endswith(".json"):
        return _header(found, quantized)
    named = weight_map(found)
    for file in sorted(set(named.values())) if os.path.isdir(path) else ():
        _header(os.fspath(Path(found).parent / file), quantized)
    return list(named)


def _header(file: str, quantized: bool) -> list[str]:
    """The names in a safetensors file."""
    if not os.path.isfile(file):
        raise ValueError(f"{file} is missing; the checkpoint's index names it")
    with readable(file), safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        for name in names if not quantized else ():
            dtype = tensors.get_slice(name).get_dtype()
            if _OWN.match(name) and not dtype.startswith(("F", "BF")):
                raise ValueError(f"{file} holds {name} as {dtype}; it must be a floating-point weight")
    return names


@contextlib.contextmanager
def readable(path: Any) -> Iterator[None]:
    """Errors of damaged weights become a ValueError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} holds no whole safetensors file: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds a pickle with more than tensors, which is not run; save its weights as safetensors"
        ) from error


def _weight_file(path: Any, variant: str | None, hub: dict[str, Any]) -> str | None:
    """The file of a safetensors checkpoint, or the index of several files."""
    for file_name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if variant is not None:
            stem, extension = file_name.split(".", 1)
            file_name = f"{stem}.{variant}.{extension}" if "index" not in extension else _index_name(variant)
        try:
            found = cached_file(path, file_name, **hub)
        except OSError:
            continue
        if found is not None:
            return os.fspath(found)
    return None


def weight_map(index: str) -> dict[str, str]:
    """The file of each tensor, from a checkpoint's index.

    Raises:
        ValueError: it is no index, or names what is no file beside it.
    """
    try:
        with open(index, encoding="utf-8") as file:
            named = json.load(file)["weight_map"]
        if not named or not all(isinstance(name, str) and _FILE.fullmatch(name) for name in named.values()):
            raise ValueError("weight_map must hold names of safetensors files beside it")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of a checkpoint: {type(error).__name__}: {error}") from error
    return named


def _index_name(variant: str) -> str:
    stem, *rest = SAFE_WEIGHTS_INDEX_NAME.split(".")  # model, safetensors, index, json
    return ".".join([stem, *rest[:-1], variant, rest[-1]])


def stored_quantization(config_class: Any, path: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The quantization settings in the checkpoint's configuration, or None."""
    if config is None or isinstance(config, (str, os.PathLike)):
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        return config_class.get_config_dict(path if config is None else config, **hub)[0].get("quantization_config")
    return getattr(config, "quantization_config", None)


def converted_state_dict(model: nn.Module, path: Any, kwargs: dict[str, Any], mode: str) -> dict[str, Tensor]:
    """The weights of a checkpoint in the weight mode `mode`, on the CPU.

    Args:
        model: a model of the checkpoint's sizes, with or without the LM head.
        path, kwargs: as for :func:`weight_modes`.
    """
    state_dict = kwargs.get("state_dict")
    if state_dict is None:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        file = _weight_file(path, kwargs.get("variant"), hub)
        assert file is not None  # which gives the mode
        files = {file}
        if file.endswith(".json"):
            files = {os.fspath(cached_file(path, name, **hub)) for name in weight_map(file).values()}
        state_dict = {}
        for file in sorted(files):
            state_dict.update(load_file(file))
    state_dict = dict(state_dict)
    base = f"{getattr(model, 'base_model_prefix', '')}."
    for name, module in model.named_modules():
        if isinstance(module, FusableProjections):
            plain = name.removeprefix(base)
            for prefix in (f"{plain}.", f"{base}{plain}."):
                convert_weight_mode(state_dict, prefix, module.projection_groups, mode)
    return state_dict


def portable_state_dict(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor] | None:
    """A state dict that every library reads: separate projections, and a tensor of its own for a tied LM head.

    None where the model's state dict already has this form, or where transformers saves another (an adapter's or a
    quantizer's). A state dict of a part of the weights is converted in part.
    """
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "hf_quantizer", None) is not None:
        return state_dict
    layers = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, FusableProjections) and module.weight_mode == "fused"
    }
    tied = bool(getattr(model.config, "tie_word_embeddings", False)) and hasattr(model, "lm_head")
    if not layers and not tied:
        return state_dict
    portable = dict(model.state_dict() if state_dict is None else state_dict)
    for prefix, module in layers.items():
        for name in [f"{prefix}{fused}.weight" for fused in module.projection_groups]:
            if name in portable:
                portable[name] = portable[name].cpu()  # a second copy fits there
        convert_weight_mode(portable, prefix, module.projection_groups, "single")
    if tied and "lm_head.weight" in portable:
        portable["lm_head.weight"] = portable["lm_head.weight"].clone()
    return portable
