"""Makes a trainer from settings: of a new run, or of one that is resumed."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import checkpoint, shards, state
from flash_xlstm.training.data import BYTES, Corpus, check_tokenizer, load_corpus, load_tokenizer, vocabulary_size
from flash_xlstm.training.device import choose_device
from flash_xlstm.training.errors import TrainingError, reason
from flash_xlstm.training.ranks import Ranks
from flash_xlstm.training.settings import MODEL_SIZES, PATHS, RunOptions, TrainSettings, resolve_dtype
from flash_xlstm.training.trainer import Trainer

_NO_PARAMETERS = ("transformers_version", "architectures", "dtype", "_name_or_path")  # of config.json


def start(settings: Mapping[str, Any], options: Mapping[str, Any]) -> Trainer:
    """A new run before its first step. Nothing is written yet.

    Args:
        settings: fields of :class:`.TrainSettings`; the others have their defaults.
        options: fields of :class:`.RunOptions`; the others have their defaults.

    Raises:
        TrainingError: the settings, the data or the device are wrong, or ``out`` has a checkpoint.
        ValueError: a value is of another kind, or out of range.
        TypeError: a name is unknown.
    """
    given = RunOptions(**options)
    checkpoint.check_new(Path(given.out))
    return prepare(settings, given)


def resume(settings: Mapping[str, Any], options: Mapping[str, Any]) -> Trainer:
    """A run at the step of the newest checkpoint in the folder ``out``.

    Args:
        settings: fields of :class:`.TrainSettings`, which must equal the checkpoint's. ``data``, ``tokenizer`` and
            ``config`` may be other paths to the same contents. Absent fields are the checkpoint's.
        options: fields of :class:`.RunOptions`. Absent ``threads`` and ``..._every`` are the checkpoint's; other absent
            fields have their defaults.

    Raises:
        TrainingError: the checkpoint is missing or damaged, or settings or data differ from the run's.
        ValueError: a value is of another kind, or out of range.
        TypeError: a name is unknown.
    """
    given = _checked(settings)
    run = RunOptions(**options)
    device = choose_device(run.device)
    folder = checkpoint.newest(Path(run.out))
    if folder is None:
        raise TrainingError(f"cannot resume: there is no checkpoint in {run.out}")
    saved = checkpoint.load_state(folder)
    with checkpoint.readable(folder / checkpoint.STATE):
        old, kept = state.check_state(saved, checkpoint.step_of(folder))
    run = RunOptions(**{**kept, **options})
    _use_threads(run.threads)
    old = _merge(old, given, folder, device)
    model = _as_built(checkpoint.load_model(folder, dtype=torch.float32))
    tokenizer = checkpoint.load_tokenizer_of(folder, model.config.vocab_size)
    prepared = _prepared(old, given)
    _check_model(old, given, folder, model.config, tokenizer, prepared)
    _check_memory(old, run, model.config, device)
    if prepared is None and "tokenizer" in given:
        tokenizer = load_tokenizer(given["tokenizer"])
        checkpoint.check_vocabulary(model.config.vocab_size, tokenizer, str(folder))
    corpus = _corpus(old, run, tokenizer, prepared)
    if corpus.fingerprint != saved["fingerprint"]:
        raise TrainingError(f"cannot resume {folder}: the data, or the tokenizer, is not what it was trained on")
    trainer = Trainer(old, run, corpus, tokenizer, model.to(device))
    with checkpoint.readable(folder / checkpoint.STATE):
        trainer.restore(saved)
    return trainer


def prepare(given: Mapping[str, Any], options: RunOptions) -> Trainer:
    """As :func:`start`, but the folder may have a checkpoint."""
    given = _checked(given)
    _use_threads(options.threads)
    device = choose_device(options.device)
    settings = TrainSettings(**given)
    settings = dataclasses.replace(settings, dtype=resolve_dtype(settings.dtype, device))
    prepared = _prepared(settings, given)
    if prepared is not None:
        tokenizer = shards.tokenizer_of(str(settings.data), prepared)
    else:
        tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    config = _configuration(settings, given, tokenizer, prepared)
    _check_memory(settings, options, config, device)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    corpus = _corpus(settings, options, tokenizer, prepared)
    torch.manual_seed(settings.seed)
    model = xLSTMForCausalLM(config).to(device)
    return Trainer(settings, options, corpus, tokenizer, model)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, checked, with absolute paths."""
    settings = TrainSettings(**given)
    values = {name: getattr(settings, name) for name in given}
    return {name: os.path.abspath(v) if name in PATHS and v is not None else v for name, v in values.items()}


def _prepared(settings: TrainSettings, given: Mapping[str, Any]) -> shards.Index | None:
    """The index of prepared data, or None for text. Settings that prepared data has already are refused."""
    if not shards.is_prepared(settings.data):
        return None
    index = shards.read_index(str(settings.data))
    if "held_out" in given:
        raise TrainingError(
            f"`held_out` does not apply to prepared data: {settings.data} holds out {index.held_out.bytes:,} bytes"
        )
    if given.get("tokenizer") is not None:
        shards.check_same_tokenizer(str(settings.data), index, given["tokenizer"])
    return index


def _corpus(
    settings: TrainSettings, options: RunOptions, tokenizer: Tokenizer | None, prepared: shards.Index | None
) -> Corpus:
    if prepared is not None:
        return shards.load_prepared(str(settings.data), settings.sequence_length)
    return load_corpus(settings.data, options.out, tokenizer, settings.held_out, settings.sequence_length)


def _as_built(loaded: xLSTMForCausalLM) -> xLSTMForCausalLM:
    """The model with its parameters in the order of a new model's. The optimizer's state and the sum of the gradient's
    norm follow that order. Weights that are stacked after loading would come last in their layer."""
    with torch.device("meta"):
        model = xLSTMForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _merge(old: TrainSettings, given: dict[str, Any], folder: Path, device: torch.device) -> TrainSettings:
    """A checkpoint's settings. Given settings must equal them."""
    for name, value in given.items():
        if name == "dtype":
            value = resolve_dtype(value, device)
        if name not in PATHS and value != getattr(old, name):
            raise TrainingError(
                f"cannot resume {folder} with `{name}` {value}: it was trained with {getattr(old, name)}"
            )
    return dataclasses.replace(old, **{name: given[name] for name in PATHS if name in given})


def _check_model(
    settings: TrainSettings,
    given: dict[str, Any],
    folder: Path,
    config: xLSTMConfig,
    tokenizer: Tokenizer | None,
    prepared: shards.Index | None,
) -> None:
    if settings.config is None:
        for name, key in MODEL_SIZES.items():
            said, size = getattr(settings, name), getattr(config, key)
            if said != size:
                raise TrainingError(
                    f"corrupt checkpoint {folder}: {checkpoint.STATE} says `{name}` {said}, config.json {size}"
                )
    if "config" not in given and not any(name in given for name in MODEL_SIZES):
        return
    wanted, found = (
        {name: value for name, value in c.to_dict().items() if name not in _NO_PARAMETERS}
        for c in (_configuration(settings, given, tokenizer, prepared), config)
    )
    for name, value in wanted.items():
        if found.get(name) != value:
            raise TrainingError(f"cannot resume {folder} with {name} {value}: its model has {found.get(name)}")


def _configuration(
    settings: TrainSettings, given: dict[str, Any], tokenizer: Tokenizer | None, prepared: shards.Index | None
) -> xLSTMConfig:
    """The model's configuration, from a file or from the sizes. Prepared data's end-of-text token ends generation."""
    if settings.config is not None:
        clash = [name for name in MODEL_SIZES if name in given]
        if clash:
            raise TrainingError(f"`config` and `{clash[0]}` exclude each other")
        config = checkpoint.read_config(Path(settings.config))
        checkpoint.check_vocabulary(config.vocab_size, tokenizer, settings.config)
        if tokenizer is None:  # every byte is text: no special tokens
            config.pad_token_id = config.bos_token_id = config.eos_token_id = None
        return config
    try:
        return xLSTMConfig(
            vocab_size=BYTES if tokenizer is None else vocabulary_size(tokenizer),
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_heads=settings.heads,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None if prepared is None else prepared.end_of_text,
        )
    except (ValueError, TypeError) as error:
        raise TrainingError(reason(error)) from error


def _check_memory(settings: TrainSettings, options: RunOptions, config: xLSTMConfig, device: torch.device) -> None:
    """Refuses sizes that cannot fit in memory, by a low estimate, before anything is allocated.

    Raises:
        TrainingError: the weights or a batch's hidden states are larger than all memory.
    """
    if device.type == "cuda":
        memory: float = torch.cuda.mem_get_info(device)[1]
    else:
        memory = _machine_memory()
    inner = 2 * config.qk_dim + 3 * config.v_dim + 3 * config.ffn_dim  # a block's matrices, without vectors
    embeddings = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    parameters = config.hidden_size * (embeddings + config.num_hidden_layers * inner)
    hidden = settings.batch_size * settings.sequence_length * config.hidden_size * config.num_hidden_layers
    ranks = Ranks().size
    states = max(
        4.0, 16 / (ranks if options.shard else 1)
    )  # bytes a parameter; weights are whole before they are split
    for what, size in (
        (f"a model of {parameters:,} parameters, with gradients and the optimizer's moments", states * parameters),
        (
            f"the hidden states of a batch (`batch_size` {settings.batch_size}, `sequence_length` "
            f"{settings.sequence_length})",
            getattr(torch, settings.dtype).itemsize * hidden / ranks,
        ),
    ):
        if size > memory:
            raise TrainingError(
                f"not enough memory: {what} takes at least {size / 2**30:,.0f} GiB; {device} has {memory / 2**30:,.0f}"
            )


def _machine_memory() -> float:
    """Bytes of memory and swap, or infinity where they are unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024.0 * sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal"))


def _use_threads(number: int | None) -> None:
    if number is not None:
        torch.set_num_threads(number)
