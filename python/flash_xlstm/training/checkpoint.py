"""Checkpoint folders, which are whole or absent.

A run's folder holds one ``checkpoint-STEP``. A new one is written under a hidden name, flushed to the disk and renamed.
Then the old one is removed. A process killed at any instant leaves a whole checkpoint, and at most a hidden folder that
the next save removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import GENERATION_CONFIG_NAME

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.models.checkpoints import weight_modes
from flash_xlstm.training import files
from flash_xlstm.training.data import BYTES, load_tokenizer, vocabulary_size
from flash_xlstm.training.errors import TrainingError, reason
from flash_xlstm.training.files import STATE

_TOKENIZER = "tokenizer.json"
_NAME = re.compile(r"checkpoint-[0-9]{1,19}")


def newest(run: Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, or None."""
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return max(found, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def locate(path: str) -> Path:
    """The checkpoint folder meant by a path: the folder itself, or the newest checkpoint of a run.

    Raises:
        TrainingError: there is none.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    found = newest(folder)
    if found is None:
        raise TrainingError(f"no checkpoint: {path} " + ("holds none" if folder.is_dir() else "does not exist"))
    return found


def check_new(run: Path) -> None:
    """Checks that a run's folder has no checkpoint.

    Raises:
        TrainingError: it has one, which a new run would replace.
    """
    found = newest(run)
    if found is not None:
        raise TrainingError(f"{found} exists already; go on from it with `resume`, or choose another `out`")


def check_resumed(run: Path, step: int) -> None:
    """Checks that a run's folder has no other checkpoint than that of `step`.

    Raises:
        TrainingError: it has one, of a process that went on from the same checkpoint.
    """
    found = newest(run)
    if found is not None and step_of(found) != step:
        raise TrainingError(f"cannot go on at step {step}: another process has written {found} since; resume again")


@contextlib.contextmanager
def opened(run: Path, lock: bool) -> Iterator[None]:
    """Makes a run's folder, and checks that it can be written. With `lock`, it is locked until the context ends
    (:func:`.files.locked`).

    Raises:
        TrainingError: it cannot be written, or another process has it.
    """
    try:
        os.fspath(run).encode()
    except UnicodeEncodeError as error:
        raise TrainingError(f"cannot write to {run}: safetensors reads no path that is not UTF-8") from error
    try:
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run):
            pass
    except OSError as error:
        raise TrainingError(f"cannot write to {run}: {reason(error)}") from error
    with contextlib.ExitStack() as held:
        if lock:
            try:
                held.enter_context(files.locked(run))
            except BlockingIOError as error:
                raise TrainingError(f"cannot write to {run}: another process is training there") from error
        yield


def save(
    run: Path,
    step: int,
    model: xLSTMForCausalLM,
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes ``checkpoint-STEP`` into a run's folder, then removes older ones. `weights` are those of a model that is
    split over processes.

    Raises:
        TrainingError: it could not be written. The older checkpoint is kept.
    """
    folder = run / f"checkpoint-{step}"
    if folder.exists():
        return folder

    def write(partial: Path) -> None:
        model.save_pretrained(partial, state_dict=weights)
        if tokenizer is not None:
            PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(partial)
        with open(partial / STATE, "wb") as file:  # given a path, torch.save hides the system's error
            torch.save(state, file)

    with _whole(folder):
        partial = files.partial(folder)
        files.remove(partial)  # the remains of a killed run
        partial.mkdir()
        write(partial)
        files.publish(folder)
    _remove_others(run, folder)
    return folder


def write_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically.

    Raises:
        TrainingError: it could not be written.
    """
    with _whole(path):
        partial = files.partial(path)
        partial.write_bytes(content)
        files.flush(partial)
        os.replace(partial, path)


def discard(run: Path) -> None:
    """Removes a run's checkpoints."""
    with contextlib.suppress(FileNotFoundError):
        _remove_others(run, None)


def load_model(folder: Path, **options: Any) -> xLSTMForCausalLM:
    """Reads a model, in evaluation mode.

    Args:
        folder: a checkpoint folder.
        options: for ``from_pretrained``.

    Raises:
        TrainingError: the checkpoint is not whole.
    """
    with readable(folder):
        _check_sizes(folder)
        if (folder / GENERATION_CONFIG_NAME).is_file():  # from_pretrained ignores an unreadable one
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        model, report = xLSTMForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise TrainingError(f"corrupt checkpoint {folder}: weights do not fit config.json, among them {wrong[0]}")
    for name, ids in special_tokens(model).items():
        listed = ids if name == "eos_token_id" and isinstance(ids, list) and ids else [ids]
        if any(token is not None and (type(token) is not int or abs(token) >= 2**31) for token in listed):
            raise TrainingError(f"corrupt checkpoint {folder}: {name} is {str(ids)[:80]!r}; it must be a token id")
    return model


def special_tokens(model: xLSTMForCausalLM) -> dict[str, Any]:
    """The ids of the padding, begin and end tokens of generation."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(model.generation_config, name, None) for name in names}


def _check_sizes(folder: Path) -> None:
    """Compares the weights' shapes with config.json, before a model of that size is allocated."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not isinstance(values, dict) or values.get("model_type") != xLSTMConfig.model_type:
        raise ValueError(f"config.json does not have the model_type {xLSTMConfig.model_type!r}")
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})
    if not shapes:  # from_pretrained reads other files, or names what is missing
        return
    with readable(folder / "config.json"):
        config = xLSTMConfig.from_dict(values)
    if config.num_hidden_layers > len(shapes):  # building so many blocks takes time even on the meta device
        raise ValueError(f"weights do not fit config.json: num_hidden_layers is {config.num_hidden_layers}")
    config.weight_mode, _ = weight_modes(xLSTMConfig, folder, config, {})
    with torch.device("meta"):
        wanted = {name: list(t.shape) for name, t in xLSTMForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.setdefault("lm_head.weight", wanted["lm_head.weight"])
    wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    if wrong:
        raise ValueError(f"weights do not fit config.json, among them {wrong[0]}")


def load_state(folder: Path) -> dict[str, Any]:
    """Reads the trainer's state.

    Raises:
        TrainingError: it is missing or damaged.
    """
    if not (folder / STATE).is_file():
        raise TrainingError(f"cannot resume: {folder} has no {STATE}")
    with readable(folder / STATE):
        try:
            return torch.load(folder / STATE, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # its text advises to execute the file's contents
            raise ValueError("it is cut off, or holds other things than numbers, strings and tensors") from error


def load_tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer | None:
    """A checkpoint's tokenizer, or None if its tokens are bytes.

    Raises:
        TrainingError: it cannot be read, or does not fit the model.
    """
    path = folder / _TOKENIZER
    if path.is_file():
        tokenizer = load_tokenizer(path)
        check_vocabulary(vocab_size, tokenizer, str(folder))
        return tokenizer
    if vocab_size != BYTES:
        raise TrainingError(
            f"the vocabulary does not match: {folder} has no {_TOKENIZER}, and its vocab_size of {vocab_size} is not "
            f"the {BYTES} of bytes"
        )
    return None


def check_vocabulary(vocab_size: int, tokenizer: Tokenizer | None, where: str) -> None:
    """Checks that a model has an embedding for every token. A model of bytes must have exactly 256.

    Raises:
        TrainingError: it does not.
    """
    if tokenizer is None and vocab_size != BYTES:
        raise TrainingError(
            f"the vocabulary does not match: {where} has vocab_size {vocab_size}; bytes need {BYTES} "
            "(give `tokenizer` for another)"
        )
    if tokenizer is not None and vocab_size < vocabulary_size(tokenizer):
        raise TrainingError(
            f"the vocabulary does not match: {where} has vocab_size {vocab_size}, but the tokenizer has "
            f"{tokenizer.get_vocab_size()} tokens with ids up to {vocabulary_size(tokenizer) - 1}"
        )


def read_config(path: Path) -> xLSTMConfig:
    """Reads an xLSTMConfig from a JSON file.

    Raises:
        TrainingError: it cannot be read, or its values are wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold a JSON object")
        return xLSTMConfig.from_dict(values)
    except Exception as error:  # transformers raises errors of its own, deep nesting a RecursionError
        raise TrainingError(f"cannot use the configuration {path}: {reason(error)}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Removes a partly written `path`, and turns errors of writing into a TrainingError."""
    try:
        yield
    except BaseException as error:
        files.remove(files.partial(path))
        # torch.save and safetensors raise errors of their own for a failed write.
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            kept = newest(path.parent)
            rest = f"; {kept} is whole" if kept else ""
            raise TrainingError(f"cannot write {path}: {reason(_first_os_error(error))}{rest}") from error
        raise


def _first_os_error(error: BaseException) -> BaseException:
    """The OSError that caused an error, or the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns any error of reading a checkpoint folder, or a file of one, into a TrainingError that names it as
    corrupt."""
    try:
        yield
    except (TrainingError, MemoryError):
        raise
    except Exception as error:
        raise TrainingError(f"corrupt checkpoint {path}: {reason(error)}") from error


def _remove_others(run: Path, keep: Path | None) -> None:
    for path in run.glob("checkpoint-*"):
        if path != keep and _NAME.fullmatch(path.name):
            # Renamed first: half a checkpoint must never have a checkpoint's name.
            os.replace(path, files.partial(path))
    for path in run.glob(f".checkpoint-*{files.PARTIAL}"):
        files.remove(path)
