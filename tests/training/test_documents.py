from __future__ import annotations

import json

import pytest

from flash_xlstm.training import TrainingError, documents


def _documents(path, format="auto", field="text", separator=None):
    """The documents of a file as whole bytes, and the sum of what was read."""
    found, parts, seen = [], [], []
    for piece in documents.pieces(path, format, field, separator, seen.append):
        parts.append(piece.data)
        if piece.ends:
            found.append(b"".join(parts))
            parts = []
    assert not parts
    return found, sum(seen)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("separator", ["\n", "<|end|>", "aa", "é", None])
def test_text_is_divided_as_split_does(tmp_path, monkeypatch, block, separator):
    monkeypatch.setattr(documents, "_BLOCK", block)
    content = "aaé\naaa<|end|><|end|>é<|end|end|>\n\n<|en".encode()
    path = tmp_path / "text"
    path.write_bytes(content)
    found, read = _documents(path, separator=separator)
    assert found == ([content] if separator is None else content.split(separator.encode()))
    assert read == len(content)


def test_no_piece_is_longer_than_a_block_and_a_separator(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 10)
    path = tmp_path / "text"
    path.write_bytes(b"x" * 1000)
    for separator in (None, "<|end|>"):
        assert max(len(piece.data) for piece in documents.pieces(path, "auto", "text", separator)) <= 16


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines(tmp_path, name):
    path = tmp_path / name
    texts = ["one", "zwei\nZeilen", "", "trois €"]
    path.write_text("\n".join(json.dumps({"id": n, "body": text}) for n, text in enumerate(texts)) + "\n\n")
    found, read = _documents(path, field="body")
    assert found == [text.encode() for text in texts] and read == path.stat().st_size
    assert _documents(path, format="text")[0] == [path.read_bytes()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: it is not JSON"),
        ("[" * 100000, "line 2: it is not JSON"),
        ("[1]", r"line 2: it is \[1\]; each line must be a JSON object"),
        ('{"body": "x"}', r"line 2: it has no field 'text', but \['body'\]; set `field`"),
        ('{"text": 3}', "line 2: 'text' is 3; it must be text"),
        ('{"text": null}', "line 2: 'text' is None; it must be text"),
        ('{"text": "\\ud800"}', "line 2: 'text' has half of a surrogate pair"),
        ('{"text": "' + "x" * 300 + '"}', "line 2: it is longer than"),
    ],
)
def test_wrong_json_lines(tmp_path, monkeypatch, line, message):
    if "longer" in message:
        monkeypatch.setattr(documents, "LONGEST", 200)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(TrainingError, match=message) as error:
        _documents(path)
    assert str(path) in str(error.value)


def test_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "_ROWS", 7)
    texts = [f"document {n} €" for n in range(100)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts, "id": range(100)}), path, row_group_size=30)
    found, read = _documents(path)
    assert found == [text.encode() for text in texts] and read == path.stat().st_size
    with pytest.raises(TrainingError, match=r"has no column 'body', but \['id', 'text'\]; set `field`"):
        _documents(path, field="body")
    with pytest.raises(TrainingError, match="row 1: 'id' is 0; it must be text"):
        _documents(path, field="id")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"cannot read .*a.parquet"):
        _documents(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainingError, match=r'parquet needs pyarrow, .* pip install "flash-xlstm\[parquet\]"'):
        _documents(tmp_path / "a.parquet")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TrainingError, match=r"a\.jsonl\.gz is compressed \(\.gz\); decompress it first"):
        _documents(tmp_path / "a.jsonl.gz")
    with pytest.raises(TrainingError, match="cannot read data: No such file"):
        _documents(tmp_path / "nothing")
