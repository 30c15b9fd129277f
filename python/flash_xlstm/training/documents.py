"""The documents of text files, JSON lines and parquet files, read in pieces of bounded size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flash_xlstm.training.errors import TrainingError, reason, short

FORMATS = ("auto", "text", "jsonl", "parquet")
LONGEST = 2**26  # bytes of a document that must be read whole: a JSON line, or a tokenizer's text
_BLOCK = 2**22  # bytes of a read
_ROWS = 64  # rows of a parquet file that are decoded at once
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z"}


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        data: UTF-8 text, or any bytes of a text file.
        ends: whether the document ends with it.
        where: the file, and the line or row.
    """

    data: bytes
    ends: bool
    where: str


def pieces(
    file: Path, format: str, field: str, separator: str | None, read: Callable[[int], None] = lambda size: None
) -> Iterator[Piece]:
    """The documents of a file, in order.

    Args:
        file: to read.
        format: one of :data:`FORMATS`. "auto" goes by the file's suffix: .jsonl, .ndjson and .json are JSON lines,
            .parquet is parquet, all others are text.
        field: of a JSON object or the column of a parquet file that holds the text.
        separator: text between the documents of a text file; None: a file is a document.
        read: is called with the number of bytes of the file that were read.

    Raises:
        TrainingError: the file cannot be read, or a document is not text. The error names the line or the row.
    """
    if format == "auto":
        if file.suffix in _COMPRESSED:
            raise TrainingError(f"{file} is compressed ({file.suffix}); decompress it first")
        format = _SUFFIXES.get(file.suffix, "text")
    try:
        if format == "parquet":
            yield from _parquet(file, field, read)
        elif format == "jsonl":
            yield from _json_lines(file, field, read)
        else:
            yield from _text(file, separator, read)
    except OSError as error:
        raise TrainingError(f"cannot read data: {reason(error)}") from error


def _text(file: Path, separator: str | None, read: Callable[[int], None]) -> Iterator[Piece]:
    mark, where, rest = (separator or "").encode(), str(file), b""
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            read(len(block))
            if not mark:
                yield Piece(block, False, where)
                continue
            *documents, rest = (rest + block).split(mark)
            for document in documents:
                yield Piece(document, True, where)
            if keep := max(0, len(rest) - len(mark) + 1):  # the last bytes may begin a separator
                yield Piece(rest[:keep], False, where)
                rest = rest[keep:]
    yield Piece(rest, True, where)


def _json_lines(file: Path, field: str, read: Callable[[int], None]) -> Iterator[Piece]:
    with open(file, "rb") as stream:
        number = 0
        while line := stream.readline(LONGEST):
            number += 1
            where = f"{file}, line {number}"
            read(len(line))
            if len(line) == LONGEST and not line.endswith(b"\n"):
                raise TrainingError(f"{where}: it is longer than {LONGEST >> 20} MiB")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TrainingError(
                    f"{where}: it is not JSON ({reason(error)}); each line must be an object"
                ) from error
            if type(value) is not dict:
                raise TrainingError(f"{where}: it is {short(value)}; each line must be a JSON object")
            if field not in value:
                raise TrainingError(f"{where}: it has no field {field!r}, but {short(sorted(value))}; set `field`")
            yield Piece(_utf8(value[field], field, where), True, where)


def _parquet(file: Path, field: str, read: Callable[[int], None]) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TrainingError(
            f"{file}: parquet needs pyarrow, which cannot be imported; install it with: "
            'pip install "flash-xlstm[parquet]"'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise TrainingError(f"{file} has no column {field!r}, but {short(sorted(names))}; set `field`")
            size, rows, row, done = file.stat().st_size, table.metadata.num_rows, 0, 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{file}, row {row}"
                    yield Piece(_utf8(text, field, where), True, where)
                read(size * row // rows - done)
                done = size * row // rows
    except pyarrow.ArrowException as error:
        raise TrainingError(f"cannot read {file}: {reason(error)}") from error


def _utf8(text: Any, field: str, where: str) -> bytes:
    if type(text) is not str:
        raise TrainingError(f"{where}: {field!r} is {short(text)}; it must be text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TrainingError(f"{where}: {field!r} has half of a surrogate pair, which no UTF-8 text has") from error
