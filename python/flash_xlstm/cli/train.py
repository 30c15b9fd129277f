"""``flash-xlstm train``."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from flash_xlstm.cli import checkpoint, state
from flash_xlstm.cli.data import BYTES, check_tokenizer, load_corpus, load_tokenizer, vocabulary_size
from flash_xlstm.cli.device import choose_device
from flash_xlstm.cli.errors import CommandError, reason
from flash_xlstm.cli.settings import MODEL_SIZES, PATHS, RunOptions, TrainSettings, flag, pick
from flash_xlstm.cli.trainer import Trainer
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

_NO_PARAMETERS = ("transformers_version", "architectures", "dtype", "_name_or_path")  # of a configuration


def run(args: argparse.Namespace) -> int:
    """Trains as the command line says."""
    given = pick(TrainSettings, vars(args))
    for name in PATHS:
        if name in given:  # to be found again when the run is resumed from elsewhere
            given[name] = os.path.abspath(given[name])
    given_options = pick(RunOptions, vars(args))
    start = _resume if given_options.get("resume") else _start
    start(given, given_options).run()
    return 0


def prepare(given: dict[str, Any], options: RunOptions) -> Trainer:
    """A run at its first step, with nothing written yet.

    Args:
        given: the settings asked for; the others have their defaults.
        options: where and how to run.

    Raises:
        CommandError: the settings, the data or the device do not do.
    """
    _use_threads(options.threads)
    device = choose_device(options.device)
    settings = TrainSettings(**given)
    settings = dataclasses.replace(settings, dtype=_resolve_dtype(settings.dtype, device))
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    config = _configuration(settings, given, tokenizer)
    _check_memory(settings, config, device)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    corpus = load_corpus(settings.data, options.out, tokenizer, settings.held_out, settings.sequence_length)
    torch.manual_seed(settings.seed)
    model = xLSTMForCausalLM(config).to(device)
    return Trainer(settings, options, corpus, tokenizer, model)


def _start(given: dict[str, Any], given_options: dict[str, Any]) -> Trainer:
    options = RunOptions(**given_options)
    found = checkpoint.newest(Path(options.out))
    if found is not None:
        raise CommandError(f"{found} exists already; go on from it with --resume, or choose another --out")
    return prepare(given, options)


def _resume(given: dict[str, Any], given_options: dict[str, Any]) -> Trainer:
    options = RunOptions(**given_options)
    device = choose_device(options.device)
    folder = checkpoint.newest(Path(options.out))
    if folder is None:
        raise CommandError(f"cannot resume: there is no checkpoint in {options.out}")
    saved = checkpoint.load_state(folder)
    with checkpoint.readable(folder / checkpoint.STATE):
        settings, kept = state.check_state(saved, checkpoint.step_of(folder))
    options = RunOptions(**{**kept, **given_options})
    _use_threads(options.threads)
    settings = _merge(settings, given, folder, device)
    model = _as_built(checkpoint.load_model(folder, dtype=torch.float32))
    tokenizer = checkpoint.load_tokenizer_of(folder, model.config.vocab_size)
    _check_model(settings, given, folder, model.config, tokenizer)
    _check_memory(settings, model.config, device)
    if "tokenizer" in given:
        tokenizer = load_tokenizer(given["tokenizer"])
        checkpoint.check_vocabulary(model.config.vocab_size, tokenizer, str(folder))
    corpus = load_corpus(settings.data, options.out, tokenizer, settings.held_out, settings.sequence_length)
    if corpus.fingerprint != saved["fingerprint"]:
        raise CommandError(f"cannot resume {folder}: the data, or the tokenizer, is not what it was trained on")
    trainer = Trainer(settings, options, corpus, tokenizer, model.to(device))
    with checkpoint.readable(folder / checkpoint.STATE):
        trainer.restore(saved)
    return trainer


def _as_built(loaded: xLSTMForCausalLM) -> xLSTMForCausalLM:
    """The model with its parameters in a new one's order, which the optimizer's state and the sum in the gradient's
    norm follow; weights that are stacked after loading come last in their layer."""
    with torch.device("meta"):
        model = xLSTMForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _merge(old: TrainSettings, given: dict[str, Any], folder: Path, device: torch.device) -> TrainSettings:
    """A checkpoint's settings, which those given must not contradict."""
    for name, value in given.items():
        if name == "dtype":
            value = _resolve_dtype(value, device)
        if name not in PATHS and value != getattr(old, name):
            raise CommandError(
                f"cannot resume {folder} with {flag(name)} {value}: it was trained with {getattr(old, name)}"
            )
    return dataclasses.replace(old, **{name: given[name] for name in PATHS if name in given})


def _check_model(
    settings: TrainSettings, given: dict[str, Any], folder: Path, config: xLSTMConfig, tokenizer: Tokenizer | None
) -> None:
    if settings.config is None:
        for name, key in MODEL_SIZES.items():
            said, size = getattr(settings, name), getattr(config, key)
            if said != size:
                raise CommandError(
                    f"corrupt checkpoint {folder}: {checkpoint.STATE} says {flag(name)} {said}, config.json {size}"
                )
    if "config" not in given and not any(name in given for name in MODEL_SIZES):
        return
    wanted, found = (
        {name: value for name, value in c.to_dict().items() if name not in _NO_PARAMETERS}
        for c in (_configuration(settings, given, tokenizer), config)
    )
    for name, value in wanted.items():
        if found.get(name) != value:
            raise CommandError(f"cannot resume {folder} with {name} {value}: its model has {found.get(name)}")


def _configuration(settings: TrainSettings, given: dict[str, Any], tokenizer: Tokenizer | None) -> xLSTMConfig:
    """The model's configuration, from a file or from the sizes."""
    if settings.config is not None:
        clash = [flag(name) for name in MODEL_SIZES if name in given]
        if clash:
            raise CommandError(f"--config and {clash[0]} exclude each other")
        config = checkpoint.read_config(Path(settings.config))
        checkpoint.check_vocabulary(config.vocab_size, tokenizer, settings.config)
        if tokenizer is None:  # every byte is text
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
            eos_token_id=None,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(reason(error)) from error


def _check_memory(settings: TrainSettings, config: xLSTMConfig, device: torch.device) -> None:
    """Refuses what cannot fit, counted low, before it takes memory or time.

    Raises:
        CommandError: the weights or a batch's logits are larger than all memory.
    """
    if device.type == "cuda":
        memory: float = torch.cuda.mem_get_info(device)[1]
    else:
        memory = _machine_memory()
    inner = 2 * config.qk_dim + 3 * config.v_dim + 3 * config.ffn_dim  # of a block's matrices; vectors are left out
    embeddings = config.vocab_size * (1 if config.tie_word_embeddings else 2)
    parameters = config.hidden_size * (embeddings + config.num_hidden_layers * inner)
    logits = settings.batch_size * settings.sequence_length * config.vocab_size
    for what, size in (
        (f"a model of {parameters:,} parameters, with gradients and the optimizer's moments", 16 * parameters),
        (
            f"the logits of a batch (--batch-size {settings.batch_size}, --sequence-length {settings.sequence_length}, "
            f"{config.vocab_size} tokens) and their gradient",
            2 * getattr(torch, settings.dtype).itemsize * logits,
        ),
    ):
        if size > memory:
            raise CommandError(
                f"not enough memory: {what} takes at least {size / 2**30:,.0f} GiB; {device} has {memory / 2**30:,.0f}"
            )


def _machine_memory() -> float:
    """Bytes of memory and swap, or infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    sizes = dict(line.split(":", 1) for line in lines)
    return 1024.0 * sum(int(sizes[name].split()[0]) for name in ("MemTotal", "SwapTotal"))


def _use_threads(number: int | None) -> None:
    if number is not None:
        torch.set_num_threads(number)


def _resolve_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
