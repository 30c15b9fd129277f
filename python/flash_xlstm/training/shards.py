"""Prepared data: tokens in files that are memory-mapped, with an index.

A folder of prepared data holds

- ``shards.json``: the index (:class:`Index`);
- ``train-00000.tokens``, ...: tokens, little endian, ``shard_tokens`` in each file but the last;
- ``train-00000.ends``, ...: where documents end in that file, as int64 positions after their last token, counted from
  the first token of the first file;
- ``held_out-00000.tokens``, ``.ends`` and ``held_out.text``: the held-out end of the data, and its text;
- ``tokenizer.json``, unless tokens are bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from flash_xlstm.training import files
from flash_xlstm.training.data import (
    BYTES,
    Batches,
    Corpus,
    check_enough,
    check_tokenizer,
    encode_each,
    list_files,
    load_tokenizer,
    split_at,
    tokenizer_file,
    vocabulary_size,
)
from flash_xlstm.training.documents import FORMATS, LONGEST, Piece, pieces
from flash_xlstm.training.errors import TrainingError, reason, short
from flash_xlstm.training.settings import POSITIVE_INT

INDEX = "shards.json"
_FORMAT = 1
_TOKENIZER = "tokenizer.json"
_TEXT = "held_out.text"
_DTYPES = {"uint8": 2**8, "uint16": 2**16, "int32": 2**31}  # with the vocabularies that they hold
_BATCH = 2**23  # bytes of text that a tokenizer encodes at once
_ROUNDS = 6


@dataclass(frozen=True)
class Part:
    """Sizes of the data to train on, or of the held-out data.

    Attributes:
        tokens: number of tokens, end-of-text tokens included.
        documents: documents that end in this part.
        bytes: of the text.
    """

    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class Index:
    """The index of prepared data.

    Attributes:
        dtype: of the tokens: "uint8", "uint16" or "int32".
        vocab_size: tokens are below it.
        tokenizer: SHA-256 of tokenizer.json; None: tokens are bytes.
        end_of_text: the token after each document, or None.
        shard_tokens: tokens of a file.
        train, held_out: sizes of the two parts.
        files: size in bytes and SHA-256 of every other file of the folder.
    """

    dtype: str
    vocab_size: int
    tokenizer: str | None
    end_of_text: int | None
    shard_tokens: int
    train: Part
    held_out: Part
    files: dict[str, dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for equal tokens in equal files."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def is_prepared(path: str | None) -> bool:
    """Whether a path is a folder of prepared data.

    Raises:
        TrainingError: the folder has files of tokens, but no index.
    """
    if path is None or not os.path.isdir(path):
        return False
    if Path(path, INDEX).is_file():
        return True
    if Path(path, "train-00000.tokens").is_file():  # text may be in files of that suffix, too
        raise TrainingError(f"corrupt data {path}: it has files of tokens, but no {INDEX}")
    return False


def read_index(folder: str | Path) -> Index:
    """Reads the index of prepared data, and compares it with the sizes of the files.

    Raises:
        TrainingError: the index is malformed, or a file is missing or of another size.
    """
    path = Path(folder, INDEX)
    try:
        index = _index_of(json.loads(path.read_text(encoding="utf-8")))
        for name, facts in index.files.items():
            size = Path(folder, name).stat().st_size
            if size != facts["size"]:
                raise ValueError(f"{name} has {size:,} bytes; it must have {facts['size']:,}")
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"corrupt data {path.parent}: {reason(error)}") from error
    return index


def verify(folder: str | Path, progress: Callable[[int, int], None] = lambda size, total: None) -> Index:
    """Compares every file of prepared data with its checksum.

    Args:
        folder: of prepared data.
        progress: is called with the bytes that were read since the last call, and the bytes of all files.

    Raises:
        TrainingError: the index is malformed, or a file differs from its checksum.
    """
    index = read_index(folder)
    total = sum(facts["size"] for facts in index.files.values())
    for name, facts in index.files.items():
        digest = hashlib.sha256()
        try:
            with open(Path(folder, name), "rb") as file:
                while block := file.read(_BATCH):
                    digest.update(block)
                    progress(len(block), total)
        except OSError as error:
            raise TrainingError(f"cannot read data: {reason(error)}") from error
        if digest.hexdigest() != facts["sha256"]:
            raise TrainingError(f"corrupt data {folder}: {name} differs from its checksum; prepare the data again")
    return index


def _index_of(values: Any) -> Index:
    if type(values) is not dict or values.get("format") != _FORMAT:
        raise ValueError(f"{INDEX} is of another version of flash-xlstm, or corrupt")
    whole = lambda value: type(value) is int and 0 <= value < 2**63  # noqa: E731
    text = lambda value: type(value) is str  # noqa: E731
    part = lambda value: (  # noqa: E731
        type(value) is dict and value.keys() == set(Part.__annotations__) and all(map(whole, value.values()))
    )
    facts = lambda value: (  # noqa: E731
        type(value) is dict and value.keys() == {"size", "sha256"} and whole(value["size"]) and text(value["sha256"])
    )
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "dtype": (lambda value: text(value) and value in _DTYPES, f"one of: {', '.join(_DTYPES)}"),
        "vocab_size": (lambda value: whole(value) and 1 <= value <= _DTYPES[values["dtype"]], "one that dtype holds"),
        "tokenizer": (lambda value: value is None or text(value), "a checksum or null"),
        "end_of_text": (
            lambda value: value is None or (whole(value) and value < values["vocab_size"]),
            "a token or null",
        ),
        "shard_tokens": (lambda value: whole(value) and value > 0, "a positive number"),
        "train": (part, "tokens, documents and bytes"),
        "held_out": (part, "tokens, documents and bytes"),
        "files": (
            lambda value: type(value) is dict and all(os.path.basename(n) == n and facts(f) for n, f in value.items()),
            "file names with size and sha256",
        ),
    }
    if values.keys() != {"format", *rules}:
        raise ValueError(f"{INDEX} has {short(sorted(values))}; it must have {short(sorted(rules))} and format")
    for name, (holds, rule) in rules.items():
        if not holds(values[name]):
            raise ValueError(f"{INDEX}: {name} is {short(values[name])}; it must be {rule}")
    values = {name: values[name] for name in rules}
    index = Index(**{**values, "train": Part(**values["train"]), "held_out": Part(**values["held_out"])})
    _check_files(index)
    return index


def _check_files(index: Index) -> None:
    item = np.dtype(index.dtype).itemsize
    wanted = {_TEXT: index.held_out.bytes}
    for name in ("train", "held_out"):
        part: Part = getattr(index, name)
        ends = 0
        for number in range(-(-part.tokens // index.shard_tokens)):
            tokens = min(index.shard_tokens, part.tokens - number * index.shard_tokens)
            wanted[f"{name}-{number:05}.tokens"] = item * tokens
            ends += index.files.get(f"{name}-{number:05}.ends", {"size": 0})["size"]
            wanted[f"{name}-{number:05}.ends"] = index.files.get(f"{name}-{number:05}.ends", {"size": 0})["size"]
        if ends != 8 * part.documents:
            raise ValueError(f"{INDEX}: {name} has {part.documents:,} documents, and {ends:,} bytes of their ends")
    if index.tokenizer is not None:
        wanted[_TOKENIZER] = index.files.get(_TOKENIZER, {"size": 0})["size"]
    found = {name: facts["size"] for name, facts in index.files.items()}
    if wanted != found:
        odd = min(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise ValueError(f"{INDEX}: {odd} is of {found.get(odd)} bytes; by the other entries of {wanted.get(odd)}")
    if index.tokenizer is not None and index.tokenizer != index.files[_TOKENIZER]["sha256"]:
        raise ValueError(f"{INDEX}: the checksums of tokenizer and {_TOKENIZER} differ")
    if index.tokenizer is None and index.vocab_size != BYTES:
        raise ValueError(f"{INDEX}: vocab_size is {index.vocab_size}; it must be {BYTES} for bytes")


class Shards:
    """The tokens of one part of prepared data, read by memory map.

    Args:
        folder: of prepared data.
        part: "train" or "held_out".
        index: the folder's.

    Attributes:
        vocab_size: tokens are below it.
    """

    def __init__(self, folder: str | Path, part: str, index: Index) -> None:
        sizes: Part = getattr(index, part)
        self.folder, self.tokens, self.shard_tokens = Path(folder), sizes.tokens, index.shard_tokens
        self.vocab_size = index.vocab_size
        self._names = [f"{part}-{number:05}" for number in range(-(-sizes.tokens // index.shard_tokens))]
        self._maps = [self._map(f"{name}.tokens", index.dtype) for name in self._names]
        self._ends = [self._map(f"{name}.ends", "int64") for name in self._names]

    def _map(self, name: str, dtype: str) -> NDArray[Any]:
        path, kind = self.folder / name, np.dtype(dtype).newbyteorder("<")
        try:
            # A plain array over the mapping: memmap's own slices are slow.
            return np.asarray(np.memmap(path, kind, "r")) if path.stat().st_size else np.empty(0, kind)
        except (OSError, ValueError) as error:
            raise TrainingError(f"corrupt data {self.folder}: cannot map {name}: {reason(error)}") from error

    def __len__(self) -> int:
        return self.tokens

    def window(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to ``start + length``.

        Raises:
            IndexError: the window is not within the tokens.
            TrainingError: a token is not in the vocabulary.
        """
        self._check(start, length)
        out = np.empty(length, np.int64)
        for shard, first, last, place in self._parts(start, length):
            found = self._maps[shard][first:last]
            for token in (found.min(), found.max()):
                if not 0 <= token < self.vocab_size:
                    raise TrainingError(
                        f"corrupt data {self.folder}: {self._names[shard]}.tokens has the token {token}; it must be "
                        f"below {self.vocab_size}"
                    )
            out[place : place + last - first] = found
        return out

    def document_ends(self, start: int, length: int) -> NDArray[np.int64]:
        """Where documents end in a window: positions after their last token, from 1 to `length`, ascending.

        Raises:
            IndexError: the window is not within the tokens.
        """
        self._check(start, length)
        found = [np.empty(0, np.int64)]
        for shard, _, _, _ in self._parts(start, length):
            ends = self._ends[shard]
            first, last = np.searchsorted(ends, np.array([start, start + length], ends.dtype), "right")
            found.append(ends[first:last] - start)
        return np.concatenate(found)

    def _check(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.tokens:
            raise IndexError(f"tokens {start} to {start + length} are not within 0 to {self.tokens}")

    def _parts(self, start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """The shards of a window: each with its first token, its last one, and the first one's place in the window."""
        place = 0
        while place < length:
            shard, first = divmod(start + place, self.shard_tokens)
            last = min(self.shard_tokens, first + length - place)
            yield shard, first, last, place
            place += last - first


def load_prepared(folder: str | Path, sequence_length: int) -> Corpus:
    """The corpus of prepared data. The held-out part is read; the other one is mapped.

    Args:
        folder: of prepared data.
        sequence_length: of training. There must be enough tokens for it.

    Raises:
        TrainingError: the folder's files are malformed, or have too few tokens.
    """
    index = read_index(folder)
    train, held = Shards(folder, "train", index), Shards(folder, "held_out", index)
    check_enough(str(folder), len(train), len(held), sequence_length)
    text = _read(folder, _TEXT, index)
    tokens = torch.from_numpy(held.window(0, len(held)).astype(np.uint8 if index.tokenizer is None else np.int32))
    return Corpus(train, tokens, text, index.train.bytes / index.train.tokens, index.fingerprint)


def tokenizer_of(folder: str | Path, index: Index) -> Tokenizer | None:
    """The tokenizer of prepared data; None for bytes."""
    if index.tokenizer is None:
        return None
    _read(folder, _TOKENIZER, index)
    return load_tokenizer(Path(folder, _TOKENIZER))


def check_same_tokenizer(folder: str | Path, index: Index, path: str) -> None:
    """Checks that a tokenizer is the one of prepared data.

    Raises:
        TrainingError: it is another one, or cannot be read.
    """
    try:
        digest = hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()
    except OSError as error:
        raise TrainingError(f"cannot read tokenizer {path}: {reason(error)}") from error
    if digest != index.tokenizer:
        raise TrainingError(f"`tokenizer` {path} is not the one that {folder} was prepared with; leave it out")


def _read(folder: str | Path, name: str, index: Index) -> bytes:
    try:
        content = Path(folder, name).read_bytes()
    except OSError as error:
        raise TrainingError(f"cannot read data: {reason(error)}") from error
    if hashlib.sha256(content).hexdigest() != index.files[name]["sha256"]:
        raise TrainingError(f"corrupt data {folder}: {name} differs from its checksum; prepare the data again")
    return content


class ShardBatches(Batches):
    """As :class:`.data.Batches`, for prepared data of any size: memory does not grow with the data.

    The order of an epoch is a permutation that is computed element by element from the seed and the epoch.

    Args:
        tokens: prepared data, length at least twice `sequence_length`.
        sequence_length, batch_size, seed: as for :class:`.data.Batches`.

    Raises:
        ValueError: there are too few tokens.
    """

    tokens: Shards  # type: ignore[assignment]

    def offsets(self, number: int) -> Tensor:
        """Where documents begin in the inputs of batch `number`, all but each row's last token.

        Returns:
            (num_documents + 1,) int32 offsets into the tokens of all rows, one row after the other: the model's
            ``cu_seq_lens_q``, with which documents do not see each other.
        """
        length = self.sequence_length
        begins = [0]
        for row, start in enumerate(self._starts_of(number)):
            ends = self.tokens.document_ends(start, length)
            begins += (row * length + ends[ends < length]).tolist()
            begins.append((row + 1) * length)
        return torch.tensor(begins, dtype=torch.int32)

    def _start(self, sequence: int) -> int:
        epoch, index = divmod(sequence, self.per_epoch)
        if epoch != self._epoch:
            state = np.random.SeedSequence([self.seed, epoch]).generate_state(_ROUNDS + 1, np.uint64)
            self._offset, *self._keys = (int(value) for value in state)
            self._epoch = epoch
        return self._offset % self.sequence_length + self.sequence_length * permuted(index, self.per_epoch, self._keys)

    def _windows(self, starts: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.tokens.window(start, self.sequence_length + 1) for start in starts]))


def permuted(index: int, count: int, keys: Sequence[int]) -> int:
    """The image of `index` under a permutation of 0 to ``count - 1`` that the keys select.

    It is a Feistel network over the least even number of bits that holds `count`. Values beyond `count` are mapped
    again until one is below it, which takes four rounds at most on average.
    """
    bits = max(1, (count - 1).bit_length() + 1 >> 1)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << bits | right
        if index < count:
            return index


def _mixed(value: int) -> int:
    """The finalizer of SplitMix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shards(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    format: str = "auto",
    field: str = "text",
    separator: str | None = None,
    end_of_text: str | None = "auto",
    held_out: int = 262144,
    shard_tokens: int = 2**28,
    progress: Callable[[int, int], None] = lambda size, total: None,
) -> Index:
    """Prepares data: tokenizes files into a folder that training reads by memory map.

    Memory does not grow with the data: it takes a document at a time (for bytes, a part of one), and `held_out`. The
    folder appears once it is whole. The remains of a killed call are removed by the next one.

    Args:
        inputs: files, or folders of files. Their documents follow one another in this order.
        out: the folder to make; it must not exist, or be empty.
        tokenizer: a tokenizer.json, or a folder that holds one; None: tokens are bytes.
        format: "text", "jsonl" or "parquet"; "auto" goes by each file's suffix (.jsonl, .ndjson, .json, .parquet).
        field: of each JSON line, or the parquet column, that holds the text.
        separator: text between the documents of a text file; None: a file is a document.
        end_of_text: the token to put after each document; None: none; "auto": the eos_token in the tokenizer folder's
            tokenizer_config.json, if there is one.
        held_out: bytes at the end of the text to hold out, at most a tenth of it.
        shard_tokens: tokens of a file.
        progress: is called with the bytes of input that were read since the last call, and the bytes of all input.

    Returns:
        The index.

    Raises:
        TrainingError: a file cannot be read or written, there is no text, or the tokenizer cannot encode it.
        ValueError: an argument is wrong.
    """
    for name, value in (("held_out", held_out), ("shard_tokens", shard_tokens)):
        if not POSITIVE_INT.takes(value):
            raise ValueError(f"{name} is {short(value)}; it must be {POSITIVE_INT.text}")
    if format not in FORMATS:
        raise ValueError(f"format is {short(format)}; it must be one of: {', '.join(FORMATS)}")
    if separator == "":
        raise TrainingError("`separator` is ''; it must have at least one character, or be None")
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise TrainingError(f"{out} exists already; choose another `out`")
    listed = [file for path in inputs for file in list_files(Path(path), out.resolve())]
    for folder in {file.parent: None for file in listed}:
        if is_prepared(str(folder)):
            raise TrainingError(f"{folder} is prepared already; train on it, or give its text")
    if not listed:
        raise ValueError("inputs is empty; it must have a file or a folder")
    model = None if tokenizer is None else load_tokenizer(tokenizer)
    if model is not None:
        check_tokenizer(model)
    end = _end_token(end_of_text, tokenizer, model)
    total = sum(file.stat().st_size for file in listed)

    def stream() -> Iterator[Piece]:
        for file in listed:
            yield from pieces(file, format, field, separator, lambda size: progress(size, total))

    with _new_folder(out) as partial:
        index = _write(partial, stream(), tokenizer, model, end, held_out, shard_tokens)
        (partial / INDEX).write_text(json.dumps({"format": _FORMAT, **asdict(index)}, indent=1) + "\n")
    return index


def _end_token(asked: str | None, path: str | Path | None, tokenizer: Tokenizer | None) -> int | None:
    if tokenizer is None or path is None:
        if asked not in ("auto", None):
            raise TrainingError(f"`end_of_text` {asked} needs a `tokenizer`; of bytes, each is text")
        return None
    where = "`end_of_text`"
    if asked == "auto":
        config = tokenizer_file(path).with_name("tokenizer_config.json")
        if not os.path.isdir(path) or not config.is_file():
            return None
        try:
            token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise TrainingError(f"cannot read {config}: {reason(error)}") from error
        asked, where = token.get("content") if isinstance(token, dict) else token, f"eos_token of {config},"
    if asked is None:
        return None
    found = tokenizer.token_to_id(asked)
    if found is None:
        raise TrainingError(f"{where} {short(asked)} is not a token of {path}")
    return found


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder, for this process alone, that becomes `out` unless an error is raised."""
    partial = files.partial(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with files.locked(partial):
            try:
                for file in partial.iterdir():  # the remains of a killed call
                    file.unlink()
                yield partial
                files.publish(out)
            except BaseException:
                files.remove(partial)
                raise
    except BlockingIOError as error:
        raise TrainingError(f"cannot write {out}: another process is writing it") from error
    except OSError as error:
        raise TrainingError(f"cannot write {out}: {reason(error)}") from error


def _write(
    folder: Path,
    stream: Iterable[Piece],
    path: str | Path | None,
    tokenizer: Tokenizer | None,
    end: int | None,
    held_out: int,
    shard_tokens: int,
) -> Index:
    size = BYTES if tokenizer is None else vocabulary_size(tokenizer)
    dtype = next(name for name, most in _DTYPES.items() if size <= most)
    made: dict[str, dict[str, Any]] = {}
    train, held = (_Writer(folder, name, tokenizer, dtype, end, shard_tokens, made) for name in ("train", "held_out"))
    with train, held:
        text = _distribute(_whole(stream) if tokenizer is not None else stream, held_out, train, held)
    with _File(folder, _TEXT, made) as file:
        file.write(text)
    if path is not None:
        with _File(folder, _TOKENIZER, made) as file:
            file.write(tokenizer_file(path).read_bytes())
    if train.part.tokens == 0 or held.part.tokens == 0:
        raise TrainingError(
            f"too little data: {train.part.tokens:,} tokens to train on and {held.part.tokens:,} to hold out"
        )
    digest = None if path is None else made[_TOKENIZER]["sha256"]
    return Index(dtype, size, digest, end, shard_tokens, train.part, held.part, made)


def _whole(stream: Iterable[Piece]) -> Iterator[Piece]:
    """Whole documents, which a tokenizer needs."""
    parts: list[bytes] = []
    size = 0
    for piece in stream:
        parts.append(piece.data)
        size += len(piece.data)
        if size > LONGEST:
            raise TrainingError(
                f"{piece.where}: a document is longer than {LONGEST >> 20} MiB, which is too much for a tokenizer; "
                "set `separator`"
            )
        if piece.ends:
            yield Piece(b"".join(parts), True, piece.where)
            parts, size = [], 0


def _distribute(stream: Iterable[Piece], held_out: int, train: _Writer, held: _Writer) -> bytes:
    """Writes the last `held_out` bytes, at most a tenth, to `held` and the rest to `train`. Returns the held-out text.

    The end of the stream is not known, so that the last `held_out` bytes are kept until it comes.
    """
    kept: deque[Piece] = deque()
    size = total = 0
    ended = True
    for piece in stream:
        if not piece.data and (ended or not piece.ends):
            continue
        ended = piece.ends
        kept.append(piece)
        size += len(piece.data)
        total += len(piece.data)
        while size - len(kept[0].data) >= held_out:
            size -= len(kept[0].data)
            train.add(kept.popleft())
    documents: list[bytes] = []
    parts: list[bytes] = []
    where = kept[-1].where if kept else ""
    for piece in kept:
        parts.append(piece.data)
        if piece.ends:
            documents.append(b"".join(parts))
            parts = []
    head, tail = split_at(documents, size - min(held_out, total // 10))
    ends, position = set(np.cumsum([len(document) for document in documents]).tolist()), 0
    for writer, texts in ((train, head), (held, tail)):
        for text in texts:
            position += len(text)
            writer.add(Piece(text, position in ends, where))
    return b"".join(tail)


class _File:
    """A new file, with its size and checksum at the end."""

    def __init__(self, folder: Path, name: str, made: dict[str, dict[str, Any]]) -> None:
        self._name, self._made = name, made
        self._file = open(folder / name, "wb")
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self) -> None:
        self._file.close()
        self._made[self._name] = {"size": self._size, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Writer:
    """Writes one part: encodes documents, several at once, and begins a new file after `shard_tokens`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        tokenizer: Tokenizer | None,
        dtype: str,
        end: int | None,
        shard_tokens: int,
        made: dict[str, dict[str, Any]],
    ) -> None:
        self._folder, self._name, self._made = folder, name, made
        self._tokenizer, self._dtype, self._end = tokenizer, np.dtype(dtype).newbyteorder("<"), end
        self._shard_tokens = shard_tokens
        self._files: tuple[_File, _File] | None = None
        self._waiting: list[Piece] = []
        self._waiting_bytes = 0
        self._tokens = self._documents = self._bytes = self._ended = 0

    @property
    def part(self) -> Part:
        return Part(self._tokens, self._documents, self._bytes)

    def add(self, piece: Piece) -> None:
        """Takes a document, or a part of one: bytes may come in parts, as may a document that is held out in part."""
        self._bytes += len(piece.data)
        if self._tokenizer is None:
            self._append(np.frombuffer(piece.data, np.uint8), piece.ends)
            return
        self._waiting.append(piece)
        self._waiting_bytes += len(piece.data)
        if self._waiting_bytes >= _BATCH:
            self._encode()

    def _encode(self) -> None:
        if not self._waiting or self._tokenizer is None:
            return
        texts = []
        for piece in self._waiting:
            try:
                texts.append(piece.data.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise TrainingError(
                    f"{piece.where}: it is not UTF-8 text, which a tokenizer needs; bytes need none"
                ) from error
        for piece, ids in zip(self._waiting, encode_each(self._tokenizer, texts), strict=True):
            if piece.ends and self._end is not None and (len(ids) == 0 or ids[-1] != self._end):
                ids = np.append(ids, np.int32(self._end))
            self._append(ids, piece.ends)
        self._waiting, self._waiting_bytes = [], 0

    def _append(self, ids: NDArray[Any], ends: bool) -> None:
        while len(ids):
            room = -self._tokens % self._shard_tokens
            if room == 0:
                self._close()
                stem = f"{self._name}-{self._tokens // self._shard_tokens:05}"
                self._files = tuple(_File(self._folder, stem + kind, self._made) for kind in (".tokens", ".ends"))  # type: ignore[assignment]
                room = self._shard_tokens
            assert self._files is not None
            self._files[0].write(np.ascontiguousarray(ids[:room], self._dtype).view(np.uint8).data)
            self._tokens += len(ids[:room])
            ids = ids[room:]
        if ends and self._files is not None and self._tokens > self._ended:
            self._files[1].write(np.array([self._tokens], "<i8").view(np.uint8).data)
            self._documents += 1
            self._ended = self._tokens

    def _close(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._encode()
        self._close()
