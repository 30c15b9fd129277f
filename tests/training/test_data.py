from __future__ import annotations

import lzma
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from flash_xlstm.training import TrainingError, data


def _load(path, tokenizer=None, held_out=1000, sequence_length=8):
    return data.load_corpus(str(path), "/nowhere", tokenizer, held_out, sequence_length)


def test_bytes_are_tokens_and_the_end_is_held_out(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    (tmp_path / "file").write_bytes(content)
    corpus = _load(tmp_path / "file")
    joined = torch.cat([corpus.train, corpus.held_out])
    assert bytes(joined.tolist()) == content
    assert bytes(corpus.held_out.tolist()) == corpus.held_out_bytes
    assert 496 <= len(corpus.held_out_bytes) <= 500  # a tenth, as 1,000 would be more
    assert corpus.bytes_per_token == 1


def test_no_character_is_cut(tmp_path):
    (tmp_path / "file").write_text("€" * 1000, encoding="utf-8")
    for held_out in (100, 101, 102):
        corpus = _load(tmp_path / "file", held_out=held_out)
        assert corpus.held_out_bytes.decode() == "€" * (held_out // 3)


def test_a_folder_is_read_in_one_order_everywhere(tmp_path):
    names = ["a.txt", "b.txt", "sub/c.txt", "sub/d.txt"]
    for root in ("first", "second"):
        for name in names if root == "first" else reversed(names):
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name * 40)
    (tmp_path / "second" / ".hidden").write_text("x" * 100)
    (tmp_path / "second" / "run").mkdir()
    (tmp_path / "second" / "run" / "metrics.csv").write_text("x" * 100)
    first = _load(tmp_path / "first")
    second = data.load_corpus(str(tmp_path / "second"), str(tmp_path / "second" / "run"), None, 1000, 8)
    assert first.fingerprint == second.fingerprint
    assert len(first.train) + len(first.held_out) == sum(len(name) * 40 for name in names)
    for run in ("second", "second/sub/another"):  # that runs have written
        (tmp_path / run / "checkpoint-3").mkdir(parents=True)
        for name in ("checkpoint-3/trainer_state.pt", "checkpoint-3/config.json", "metrics.csv"):
            if run != "second" or "/" in name:
                (tmp_path / run / name).write_text("y" * 100)
    (tmp_path / "second" / "run" / "metrics.csv").unlink()
    assert _load(tmp_path / "second").fingerprint == first.fingerprint
    (tmp_path / "second" / "a.txt").write_text("a.txu" * 40)
    assert _load(tmp_path / "second").fingerprint != first.fingerprint


def test_the_default_is_the_standard_library():
    files = data.library_files()
    root = Path(sysconfig.get_path("stdlib"))
    assert root / "argparse.py" in files
    assert all(path.suffix == ".py" for path in files)
    assert not any("site-packages" in path.parts or "test" in path.relative_to(root).parts for path in files)


def test_a_tokenizer_sees_every_file_apart(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "file").write_text("one two " * 100)
    corpus = _load(tmp_path / "file", tokenizer)
    assert corpus.train.tolist() == [1, 2] * 90 and corpus.held_out.tolist() == [1, 2] * 10
    assert corpus.bytes_per_token == 4
    (tmp_path / "file").write_bytes(b"\xff" * 1000)
    with pytest.raises(TrainingError, match="not all UTF-8"):
        _load(tmp_path / "file", tokenizer)


def test_no_tokenizer_truncates_or_pads(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = data.encode(data.load_tokenizer(tmp_path), ["one two " * 10, "one"])
    assert found.tolist() == [1, 2] * 10 + [1]


def test_batches_cover_an_epoch_once_and_depend_on_the_seed():
    tokens = torch.arange(1000, dtype=torch.int32)
    batches = data.Batches(tokens, sequence_length=10, batch_size=3, seed=5)
    assert batches.per_epoch == 99
    epoch = torch.cat([batches[n] for n in range(33)])
    assert epoch.shape == (99, 11)
    assert torch.equal(epoch[:, 1:] - epoch[:, :-1], torch.ones(99, 10, dtype=torch.long))
    assert len(set(epoch[:, 0].tolist())) == 99 and len({int(s) % 10 for s in epoch[:, 0]}) == 1
    following = torch.cat([batches[n] for n in range(33, 66)])
    assert not torch.equal(epoch, following)

    again = data.Batches(tokens, sequence_length=10, batch_size=3, seed=5)
    assert torch.equal(again[40], following[21:24])  # independent of earlier calls
    assert not torch.equal(data.Batches(tokens, 10, 3, seed=6)[0], epoch[:3])


def test_xz_is_what_the_lzma_module_makes():
    text = b"some text, some more text, and some text again" * 20
    size = len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
    assert data.xz_bits_per_byte(text) == 8 * size / len(text)


@pytest.mark.parametrize("kind", ["missing", "empty-file", "empty-folder", "folder-of-empty-files", "too-short"])
def test_missing_or_empty_data(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "empty-file":
        path.touch()
    elif kind == "too-short":
        path.write_text("short")
    elif kind != "missing":
        path.mkdir()
        if kind == "folder-of-empty-files":
            (path / "empty").touch()
    with pytest.raises(TrainingError, match="^too little data" if kind == "too-short" else "^no data") as error:
        _load(path)
    assert str(path) in str(error.value)


def test_wrong_batches():
    with pytest.raises(ValueError, match="tokens has length 19; it must be at least 2 \\* sequence_length, 20"):
        data.Batches(torch.arange(19), 10, 3, 0)
    with pytest.raises(IndexError, match="number is -1; it must be at least 0"):
        data.Batches(torch.arange(20), 10, 3, 0)[-1]
