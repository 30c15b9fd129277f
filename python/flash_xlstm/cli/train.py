"""``flash-xlstm train``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from flash_xlstm.cli import checkpoint
from flash_xlstm.cli.data import BYTES, load_corpus, load_tokenizer
from flash_xlstm.cli.device import choose_device
from flash_xlstm.cli.errors import CommandError
from flash_xlstm.cli.settings import MODEL_SIZES, PATHS, RunOptions, TrainSettings, flag, pick
from flash_xlstm.cli.trainer import STATE_FORMAT, Trainer
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
    state = checkpoint.load_state(folder)
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise CommandError(f"cannot resume: {folder} is of another version of flash-xlstm, or corrupt")
    try:
        options = RunOptions(**{**state["options"], **given_options})
        settings = TrainSettings(**state["settings"])
    except (KeyError, TypeError) as error:
        raise CommandError(f"cannot resume: corrupt checkpoint {folder}: its state does not fit ({error})") from error
    _use_threads(options.threads)
    settings = _merge(settings, given, folder, device)
    model = checkpoint.load_model(folder, dtype=torch.float32)
    tokenizer = checkpoint.load_tokenizer_of(folder, model.config.vocab_size)
    _check_model(settings, given, folder, model.config, tokenizer)
    if "tokenizer" in given:
        tokenizer = load_tokenizer(given["tokenizer"])
        checkpoint.check_vocabulary(model.config.vocab_size, tokenizer, str(folder))
    corpus = load_corpus(settings.data, options.out, tokenizer, settings.held_out, settings.sequence_length)
    if corpus.fingerprint != state["fingerprint"]:
        raise CommandError(f"cannot resume {folder}: the data, or the tokenizer, is not what it was trained on")
    trainer = Trainer(settings, options, corpus, tokenizer, model.to(device))
    trainer.restore(folder, state)
    return trainer


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
            vocab_size=BYTES if tokenizer is None else tokenizer.get_vocab_size(),
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_heads=settings.heads,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error


def _use_threads(number: int | None) -> None:
    if number is not None:
        torch.set_num_threads(number)


def _resolve_dtype(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" else "float32"
