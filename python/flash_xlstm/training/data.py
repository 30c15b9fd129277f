"""The tokens that a model is trained on, and their order in training."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from flash_xlstm.training.errors import TrainingError, reason
from flash_xlstm.training.files import STATE

if TYPE_CHECKING:
    from flash_xlstm.training.shards import Shards

BYTES = 256  # vocabulary size without a tokenizer
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and held-out tokens from the end of the text.

    Attributes:
        train: a 1-D integer tensor, or the :class:`.Shards` of prepared data.
        held_out: a 1-D integer tensor.
        held_out_bytes: the text that `held_out` encodes.
        bytes_per_token: the training text's bytes divided by its tokens.
        fingerprint: a hash of all tokens. It is equal for equal data and tokenizers.
    """

    train: Tensor | Shards
    held_out: Tensor
    held_out_bytes: bytes
    bytes_per_token: float
    fingerprint: str


def tokenizer_file(path: str | Path) -> Path:
    """The tokenizer.json that a path means: the file itself, or the one in a Hugging Face tokenizer's folder."""
    return Path(path, "tokenizer.json") if os.path.isdir(path) else Path(path)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a folder. Truncation and padding are switched off: all text is encoded.

    Raises:
        TrainingError: it cannot be read.
    """
    with library_errors(f"cannot read tokenizer {path}"):
        tokenizer = Tokenizer.from_str(tokenizer_file(path).read_text(encoding="utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Checks that a tokenizer can be saved and read again. The check's time grows with the largest token id.

    Raises:
        TrainingError: it cannot; for example, two tokens have the same id.
    """
    ids = list(tokenizer.get_vocab().values())
    if len(set(ids)) < len(ids):  # which of the tokens it reads back depends on a hash
        raise TrainingError(f"the tokenizer gives {len(ids) - len(set(ids))} of {len(ids)} tokens the id of another")
    with library_errors("the tokenizer cannot be saved and read again"):
        Tokenizer.from_str(tokenizer.to_str())


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest token id plus one: the number of embeddings that a model needs. Ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode_each(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int32]]:
    """The tokens of each text.

    Raises:
        TrainingError: the tokenizer fails, or gives an id that it has no token for.
    """
    with library_errors("the tokenizer cannot encode the text"):
        parts = [np.array(encoding.ids, dtype=np.uint32) for encoding in tokenizer.encode_batch(texts)]
    size = vocabulary_size(tokenizer)
    for ids in parts:
        if len(ids) and (largest := np.max(ids)) >= size:
            raise TrainingError(f"the tokenizer gives the id {largest}, and its vocabulary ends at {size - 1}")
    return [ids.view(np.int32) for ids in parts]


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int32]:
    """The tokens of all texts, concatenated; errors as :func:`encode_each`."""
    parts = encode_each(tokenizer, texts)
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns the tokenizers library's errors into a TrainingError. The library raises Exception itself, and a
    BaseException for a bug."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise TrainingError(f"{what}: {reason(error)}") from error


def load_corpus(
    path: str | Path | None, exclude: str | Path, tokenizer: Tokenizer | None, held_out: int, sequence_length: int
) -> Corpus:
    """Reads the text, splits off the held-out part, and encodes both.

    Args:
        path: a file or a folder; None for the Python standard library.
        exclude: a folder within `path` to leave out, such as the one that a run writes.
        tokenizer: None for bytes.
        held_out: bytes to hold out, at most a tenth of the text.
        sequence_length: of training. The text must have enough tokens for it.

    Raises:
        TrainingError: there is no data, too little, or text that the tokenizer cannot encode.
    """
    where = str(path or "the Python standard library")
    documents = _read(path, exclude)
    total = sum(map(len, documents))
    if total == 0:
        raise TrainingError(f"no data: {where} is empty")
    train_documents, held_documents = split_at(documents, total - min(held_out, total // 10))
    train, held = _encode(train_documents, tokenizer, where), _encode(held_documents, tokenizer, where)
    check_enough(where, len(train), len(held), sequence_length)
    digest = hashlib.sha256()
    for tokens in (train, held):
        digest.update(f"{tokens.dtype} {len(tokens)} ".encode())
        digest.update(tokens.numpy().data)
    return Corpus(
        train, held, b"".join(held_documents), sum(map(len, train_documents)) / len(train), digest.hexdigest()
    )


def check_enough(where: str, train: int, held_out: int, sequence_length: int) -> None:
    """Checks that there are enough tokens to train on and to hold out.

    Raises:
        TrainingError: there are not.
    """
    if train < 2 * sequence_length or held_out < 2:
        raise TrainingError(
            f"too little data: {where} has {train:,} tokens to train on and {held_out:,} to hold out; "
            f"`sequence_length` {sequence_length} needs at least {2 * sequence_length:,} and 2"
        )


def xz_bits_per_byte(text: bytes) -> float:
    """The size of a text compressed by ``xz -9e``, in bits per byte."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


class Batches:
    """Sequences of a text in random order. Every epoch cuts the text at other places and shuffles the pieces.

    Batch number n is a pure function of the tokens, the sizes, the seed and n. The number of batches seen is therefore
    the whole position in the data.

    Args:
        tokens: (length,) integers, length at least twice `sequence_length`.
        sequence_length: tokens of a sequence that the model reads.
        batch_size: sequences of a batch.
        seed: of the order.

    Raises:
        ValueError: there are too few tokens.
    """

    def __init__(self, tokens: Tensor, sequence_length: int, batch_size: int, seed: int) -> None:
        if len(tokens) < 2 * sequence_length:
            raise ValueError(
                f"tokens has length {len(tokens)}; it must be at least 2 * sequence_length, {2 * sequence_length}"
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.per_epoch = (len(tokens) - sequence_length) // sequence_length
        self._epoch = -1
        self._starts: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> Tensor:
        """Batch `number`, from 0: (batch_size, sequence_length + 1) int64, with the target of the last token."""
        return self._windows(self._starts_of(number))

    def _starts_of(self, number: int) -> list[int]:
        if number < 0:
            raise IndexError(f"number is {number}; it must be at least 0")
        first = number * self.batch_size
        return [self._start(first + row) for row in range(self.batch_size)]

    def _windows(self, starts: list[int]) -> Tensor:
        return self.tokens[torch.tensor(starts)[:, None] + torch.arange(self.sequence_length + 1)].long()

    def _start(self, sequence: int) -> int:
        epoch, index = divmod(sequence, self.per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            offset = random.integers(self.sequence_length)
            self._starts = offset + self.sequence_length * random.permutation(self.per_epoch)
            self._epoch = epoch
        return int(self._starts[index])


def _read(path: str | Path | None, exclude: str | Path) -> list[bytes]:
    files = library_files() if path is None else list_files(Path(path), Path(exclude).resolve())
    try:
        return [file.read_bytes() for file in files]
    except OSError as error:
        raise TrainingError(f"cannot read data: {reason(error)}") from error


def list_files(path: Path, exclude: Path) -> list[Path]:
    """A file, or the files in a folder without hidden ones, without the folder `exclude` (a resolved path), and without
    the folders that runs have written.

    Raises:
        TrainingError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TrainingError(f"no data: {path} does not exist")
    inside = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    left_out = {exclude}
    for file in inside.values():
        if file.name == STATE:
            step, run = file.resolve().parents[:2]
            left_out.add(step if run == path.resolve() else run)
    files = {
        name: file
        for name, file in inside.items()
        if not any(part.startswith(".") for part in name.parts) and left_out.isdisjoint(file.resolve().parents)
    }
    if not files:
        raise TrainingError(f"no data: {path} has no files")
    return _mixed(files)


def library_files() -> list[Path]:
    """The source of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {file.relative_to(root): file for file in root.rglob("*.py")}
    return _mixed({name: file for name, file in files.items() if _NOT_LIBRARY.isdisjoint(name.parts)})


def _mixed(files: dict[Path, Path]) -> list[Path]:
    """Files in the order of a hash of their names. The order is the same on every machine, and makes the held-out end a
    random sample."""
    return [files[name] for name in sorted(files, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())]


def split_at(documents: list[bytes], size: int) -> tuple[list[bytes], list[bytes]]:
    """The first `size` bytes and the rest. The first part is longer where `size` would cut a UTF-8 character."""
    head: list[bytes] = []
    for index, document in enumerate(documents):
        if size < len(document):
            while size < len(document) and document[size] & 0xC0 == 0x80:
                size += 1
            parts = ([*head, document[:size]], [document[size:], *documents[index + 1 :]])
            return [part for part in parts[0] if part], [part for part in parts[1] if part]
        head.append(document)
        size -= len(document)
    return head, []


def _encode(documents: list[bytes], tokenizer: Tokenizer | None, where: str) -> Tensor:
    if tokenizer is None:
        return torch.from_numpy(np.frombuffer(b"".join(documents), dtype=np.uint8).copy())
    try:
        texts = [document.decode("utf-8") for document in documents]
    except UnicodeDecodeError as error:
        raise TrainingError(f"{where} is not all UTF-8 text, which a tokenizer needs; bytes need none") from error
    return torch.from_numpy(encode(tokenizer, texts))
