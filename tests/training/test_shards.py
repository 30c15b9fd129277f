from __future__ import annotations

import itertools
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from flash_xlstm import training
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import RunOptions, TrainingError, data, documents, files, shards


@pytest.fixture
def make_tokenizer(tmp_path):
    """``make_tokenizer(vocab_size, eos=None)``: the folder of a byte-pair tokenizer that puts <s> before every text."""

    made = []

    def make(vocab_size=300, eos=None):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(["the quick brown fox jumps over lazy dogs"] * 9, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path / f"tokenizer-{len(made)}"
        folder.mkdir()
        made.append(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        if eos is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        return folder

    return make


def _texts(count=200):
    random = np.random.default_rng(0)
    words = "the quick brown fox jumps over lazy dogs € naïve".split()
    return [f"{n}: " + " ".join(random.choice(words, random.integers(1, 30))) + "\n" for n in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A folder of 200 text files."""
    path = tmp_path / "texts"
    path.mkdir()
    for number, text in enumerate(_texts()):
        (path / f"{number}.txt").write_text(text, encoding="utf-8")
    return path


def _tokens(path, part, index):
    found = shards.Shards(path, part, index)
    return found.window(0, len(found))


@pytest.mark.parametrize("shard_tokens", [1, 100, 5000, 2**28])
@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_tokens_are_those_of_reading_into_memory(folder, tmp_path, make_tokenizer, monkeypatch, kind, shard_tokens):
    if shard_tokens == 1 and kind == "bytes":
        shard_tokens = 37
    monkeypatch.setattr(documents, "_BLOCK", 64)
    monkeypatch.setattr(shards, "_BATCH", 1000)
    path = make_tokenizer() if kind == "tokenizer" else None
    tokenizer = None if path is None else data.load_tokenizer(path)
    out = tmp_path / "out"
    shard_tokens = max(shard_tokens, 20)
    index = shards.write_shards([folder], out, tokenizer=path, held_out=1001, shard_tokens=shard_tokens)
    expected = data.load_corpus(folder, "/nowhere", tokenizer, 1001, 8)
    found = shards.load_prepared(out, 8)
    assert _tokens(out, "train", index).tolist() == expected.train.tolist()
    assert torch.equal(found.held_out.long(), expected.held_out.long())
    assert found.held_out_bytes == expected.held_out_bytes and len(found.held_out_bytes) <= 1001
    assert found.bytes_per_token == expected.bytes_per_token
    assert index.dtype == ("uint8" if path is None else "uint16")
    assert len(list(out.glob("train-*.tokens"))) == -(-index.train.tokens // shard_tokens)
    assert shards.verify(out) == shards.read_index(out) == index


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_the_ends_of_documents_are_kept(tmp_path, make_tokenizer, kind):
    texts = [text for text in _texts() if text]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:100], "", *texts[100:]]))
    tokenizer = make_tokenizer() if kind == "tokenizer" else None
    out = tmp_path / "out"
    index = shards.write_shards([path], out, tokenizer=tokenizer, held_out=500, shard_tokens=97)
    encode = (lambda text: list(text.encode())) if tokenizer is None else None
    if encode is None:
        model = data.load_tokenizer(tokenizer)
        encode = lambda text: model.encode(text).ids  # noqa: E731
    train = shards.Shards(out, "train", index)
    ends = train.document_ends(0, len(train))
    assert index.train.documents == len(ends) and index.train.documents + index.held_out.documents == len(texts)
    start = 0
    for text, end in zip(texts, ends.tolist(), strict=False):
        assert train.window(start, end - start).tolist() == encode(text)
        start = end
    for start, length in ((0, 1), (90, 20), (97, 97), (96, 1), (100, 500), (len(train) - 3, 3), (50, 0)):
        assert train.document_ends(start, length).tolist() == [
            end - start for end in ends.tolist() if start < end <= start + length
        ]
    for wrong in ((-1, 2), (0, len(train) + 1), (len(train), 1), (3, -1)):
        with pytest.raises(IndexError, match="are not within 0 to"):
            train.window(*wrong)


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>"}], ids=["text", "dict"])
def test_the_end_of_text_token(tmp_path, make_tokenizer, eos):
    tokenizer = make_tokenizer(eos=eos)
    (tmp_path / "a.txt").write_text("one|two|three|" + "four " * 50)
    model = data.load_tokenizer(tokenizer)
    for asked, end in (("auto", 1), (None, None), ("<s>", 0)):
        out = tmp_path / f"out-{asked}"
        inputs = [tmp_path / "a.txt"]
        index = shards.write_shards(inputs, out, tokenizer=tokenizer, separator="|", held_out=9, end_of_text=asked)
        assert index.end_of_text == end
        start = [*model.encode("one").ids, *([] if end is None else [end])]
        assert _tokens(out, "train", index)[: len(start)].tolist() == start
        assert index.train.documents == 3 and index.held_out.documents == 1
    with pytest.raises(TrainingError, match=r"`end_of_text` '<end>' is not a token of"):
        shards.write_shards(inputs, tmp_path / "no", tokenizer=tokenizer, end_of_text="<end>")
    with pytest.raises(TrainingError, match="`end_of_text` </s> needs a `tokenizer`"):
        shards.write_shards(inputs, tmp_path / "no", end_of_text="</s>")
    with pytest.raises(TrainingError, match=r"eos_token of .*tokenizer_config.json, '<end>' is not a token of"):
        shards.write_shards(inputs, tmp_path / "no", tokenizer=make_tokenizer(301, "<end>"))
    assert not (tmp_path / "no").exists()


def test_the_tokenizer_of_a_file_and_of_its_folder_are_the_same(tmp_path, make_tokenizer, folder):
    tokenizer = make_tokenizer()
    first = shards.write_shards([folder], tmp_path / "a", tokenizer=tokenizer)
    assert first == shards.write_shards([folder], tmp_path / "b", tokenizer=tokenizer / "tokenizer.json")


def test_larger_vocabularies_take_larger_tokens(tmp_path, folder):
    vocabulary = {"[UNK]": 0, **{f"w{n}": n for n in range(1, 70000)}, "fox": 70000}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    index = shards.write_shards([folder], tmp_path / "out", tokenizer=tmp_path / "tokenizer.json")
    assert index.dtype == "int32" and index.vocab_size == 70001
    assert _tokens(tmp_path / "out", "train", index).max() == 70000


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_preparing_takes_no_memory_for_the_data(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "_BLOCK", 2**19)
    path, size = tmp_path / name, 2**24
    line = b"x" * 1000 + b"\n" if name == "a.txt" else json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path.write_bytes(line * (size // len(line)))
    seen = []
    tracemalloc.start()
    try:
        index = shards.write_shards(
            [path], tmp_path / "out", shard_tokens=2**22, progress=lambda *args: seen.append(args)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert index.train.tokens > 0.9 * size and len(list((tmp_path / "out").glob("train-*.tokens"))) == 4
    assert peak < size / 4
    assert {total for _, total in seen} == {path.stat().st_size} == {sum(done for done, _ in seen)}


def test_training_takes_no_memory_for_the_data(tmp_path):
    """The data are 2^40 tokens in sparse files; whole files would not fit in memory."""
    tokens, shard = 2**40, 2**38
    facts = {
        f"train-{n:05}{kind}": {"size": size, "sha256": ""}
        for n in range(4)
        for kind, size in ((".tokens", shard), (".ends", 0))
    }
    facts |= {"held_out-00000.tokens": {"size": 9, "sha256": ""}, "held_out-00000.ends": {"size": 0, "sha256": ""}}
    facts |= {"held_out.text": {"size": 9, "sha256": ""}}
    for name, fact in facts.items():
        with open(tmp_path / name, "wb") as file:
            try:
                file.truncate(fact["size"])
            except OSError as error:
                pytest.skip(f"this file system has no sparse files of that size: {error}")
    part = {"documents": 0, "bytes": 9}
    index = {"format": 1, "dtype": "uint8", "vocab_size": 256, "tokenizer": None, "end_of_text": None}
    index |= {
        "shard_tokens": shard,
        "train": {"tokens": tokens, **part},
        "held_out": {"tokens": 9, **part},
        "files": facts,
    }
    (tmp_path / shards.INDEX).write_text(json.dumps(index))
    tracemalloc.start()
    try:
        train = shards.Shards(tmp_path, "train", shards.read_index(tmp_path))
        batches = shards.ShardBatches(train, 512, 8, seed=0)
        starts = [batches._start(n) for n in range(64)]
        for number in range(8):
            assert batches[number].shape == (8, 513)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert len({start // shard for start in starts}) == 4


def test_batches_read_windows_only(folder, tmp_path, monkeypatch):
    index = shards.write_shards([folder], tmp_path / "out", shard_tokens=1000)
    batches = shards.ShardBatches(shards.Shards(tmp_path / "out", "train", index), 16, 4, seed=0)
    read, window = [], shards.Shards.window
    monkeypatch.setattr(
        shards.Shards, "window", lambda self, start, length: read.append(length) or window(self, start, length)
    )
    monkeypatch.setattr(np, "fromfile", None)
    assert batches[3].shape == (4, 17) and read == [17] * 4


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 99, 1000, 4097])
def test_a_permutation_takes_every_value_once(count):
    for keys in ([0] * 6, [3, 1, 4, 1, 5, 9], [2**64 - 1] * 6):
        assert sorted(shards.permuted(n, count, keys) for n in range(count)) == list(range(count))


def test_permutations_are_random():
    count, orders = 64, 4000
    random = np.random.default_rng(0)
    places = np.zeros((count, count))
    for _ in range(orders):
        keys = random.integers(2**63, size=6).tolist()
        for index in (0, 1, 31, 63):
            places[index, shards.permuted(index, count, keys)] += 1
    for index in (0, 1, 31, 63):  # chi-squared with 63 degrees of freedom: 63 +- 11
        assert ((places[index] - orders / count) ** 2 / (orders / count)).sum() < 63 + 6 * 11.3


def test_batches_cover_an_epoch_once_and_depend_on_the_seed(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(200)) * 6)
    index = shards.write_shards([tmp_path / "a"], tmp_path / "out", held_out=1, shard_tokens=101)
    train = shards.Shards(tmp_path / "out", "train", index)
    make = lambda seed: shards.ShardBatches(train, sequence_length=10, batch_size=7, seed=seed)  # noqa: E731
    batches = make(5)
    assert batches.per_epoch == 118
    starts = [batches._start(n) for n in range(2 * 118)]
    for epoch in (starts[:118], starts[118:]):
        assert len(set(epoch)) == 118 and len({start % 10 for start in epoch}) == 1
        assert min(epoch) >= 0 and max(epoch) + 11 <= len(train)
    assert starts[:118] != starts[118:]
    joined = torch.cat([batches[n] for n in range(34)])
    assert joined.dtype == torch.int64 and joined.shape == (238, 11)
    for row, start in zip(joined[:236].tolist(), starts, strict=True):
        assert row == train.window(start, 11).tolist()
    assert torch.equal(make(5)[20], joined[140:147])  # independent of earlier calls
    assert not torch.equal(make(6)[0], joined[:7])
    with pytest.raises(ValueError, match="tokens has length"):
        shards.ShardBatches(train, len(train), 1, 0)


def test_the_documents_of_a_batch_do_not_see_each_other(tmp_path):
    """The model with the offsets of a batch gives what it gives for each document by itself."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text[:20]}) + "\n" for text in _texts()))
    index = shards.write_shards([tmp_path / "a.jsonl"], tmp_path / "out", held_out=100, shard_tokens=501)
    train = shards.Shards(tmp_path / "out", "train", index)
    batches = shards.ShardBatches(train, sequence_length=64, batch_size=3, seed=0)
    config = xLSTMConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_heads=1)
    torch.manual_seed(0)
    model = xLSTMForCausalLM(config).eval()
    ends = {int(end) for end in train.document_ends(0, len(train))}
    for number in range(5):
        offsets = batches.offsets(number)
        assert offsets.dtype == torch.int32
        inside = [n for row, start in enumerate(batches._starts_of(number)) for n in range(64 * row, 64 * (row + 1))
                  if n == 64 * row or start + n - 64 * row in ends]  # fmt: skip
        assert offsets.tolist() == [*inside, 3 * 64]
        inputs = batches[number][:, :-1]
        with torch.no_grad():
            packed = model(inputs, cu_seq_lens_q=offsets, use_cache=False).logits.flatten(0, 1)
            for first, last in itertools.pairwise(offsets.tolist()):
                alone = model(inputs.flatten()[None, first:last], use_cache=False).logits[0]
                torch.testing.assert_close(packed[first:last], alone, rtol=1e-4, atol=1e-5)


# --- files that are not whole -----------------------------------------------------------------------------------------


def test_a_folder_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda path: None)
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            shards.write_shards([folder], out)
    assert partial.is_dir() and not out.exists()
    (partial / "train-00009.tokens").write_bytes(b"of another call")
    index = shards.write_shards([folder], out)
    assert not partial.exists() and sorted(path.name for path in out.iterdir()) == sorted([*index.files, shards.INDEX])

    with monkeypatch.context() as patch:
        patch.setattr(shards._Writer, "_append", killed)
        with pytest.raises(Killed):
            shards.write_shards([folder], tmp_path / "other")
    assert not (tmp_path / ".other.partial").exists() and not (tmp_path / "other").exists()


def test_two_calls_do_not_write_one_folder(folder, tmp_path):
    def nested(done, total):
        with pytest.raises(TrainingError, match=r"cannot write .*out: another process is writing it"):
            shards.write_shards([folder], tmp_path / "out")

    shards.write_shards([folder], tmp_path / "out", progress=nested)
    shards.verify(tmp_path / "out")


def test_a_full_disk(folder, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._File, "write", full)
    with pytest.raises(TrainingError, match=r"cannot write .*out: No space left on device"):
        shards.write_shards([folder], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]


def test_text_in_files_of_tokens(folder, tmp_path):
    """As wiki.train.tokens of WikiText."""
    named = tmp_path / "wiki"
    named.mkdir()
    for file in folder.iterdir():
        file.rename(named / f"{file.name}.tokens")
    assert not shards.is_prepared(str(named))
    assert shards.write_shards([named], tmp_path / "out", format="text").train.tokens > 0


def test_wrong_arguments(folder, tmp_path, make_tokenizer):
    out = tmp_path / "out"
    for given, message in (
        ({"held_out": 0}, "held_out is 0; it must be a whole number from 1"),
        ({"shard_tokens": 1.5}, "shard_tokens is 1.5; it must be a whole number from 1"),
        ({"format": "csv"}, "format is 'csv'; it must be one of: auto, text, jsonl, parquet"),
        ({"separator": ""}, "`separator` is ''; it must have at least one character"),
        ({"tokenizer": tmp_path / "none"}, "cannot read tokenizer .*none: "),
    ):
        with pytest.raises(ValueError, match=message):
            shards.write_shards([folder], out, **given)
    shards.write_shards([folder], tmp_path / "first")
    for given in (tmp_path / "first", tmp_path / "first" / "train-00000.tokens", tmp_path):
        with pytest.raises(TrainingError, match="first is prepared already; train on it, or give its text"):
            shards.write_shards([given], out)
    with pytest.raises(ValueError, match="inputs is empty"):
        shards.write_shards([], out)
    with pytest.raises(TrainingError, match=r"no data: .*nothing does not exist"):
        shards.write_shards([tmp_path / "nothing"], out)
    (tmp_path / "empty").touch()
    with pytest.raises(TrainingError, match="too little data: 0 tokens to train on and 0 to hold out"):
        shards.write_shards([tmp_path / "empty"], out)
    (tmp_path / "binary").write_bytes(b"\xff" * 100)
    with pytest.raises(TrainingError, match="binary: it is not UTF-8 text, which a tokenizer needs"):
        shards.write_shards([tmp_path / "binary"], out, tokenizer=make_tokenizer())
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    with pytest.raises(TrainingError, match="out exists already; choose another `out`"):
        shards.write_shards([folder], out)


def test_a_document_too_long_for_a_tokenizer(tmp_path, make_tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "LONGEST", 100)
    (tmp_path / "a").write_text("one two\n" * 30)
    with pytest.raises(TrainingError, match=r"a: a document is longer than .*; set `separator`"):
        shards.write_shards([tmp_path / "a"], tmp_path / "out", tokenizer=make_tokenizer())
    shards.write_shards([tmp_path / "a"], tmp_path / "out", tokenizer=make_tokenizer(301), separator="\n")


@pytest.fixture
def prepared(folder, tmp_path):
    path = tmp_path / "prepared"
    shards.write_shards([folder], path, held_out=500, shard_tokens=5000)
    return path


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.tokens", lambda b: b[:-1], "train-00000.tokens has 4,999 bytes; it must have 5,000"),
        ("train-00001.tokens", lambda b: b + b"x", "train-00001.tokens has"),
        ("train-00000.ends", lambda b: b[:-8], "train-00000.ends has"),
        ("train-00000.tokens", None, "No such file or directory: .*train-00000.tokens"),
        ("held_out.text", lambda b: b"x" + b[1:], "held_out.text differs from its checksum"),
        ("shards.json", lambda b: b[:-9], "corrupt data"),
        ("shards.json", lambda b: b"[]", "shards.json is of another version of flash-xlstm, or corrupt"),
        ("shards.json", lambda b: b"\xff", "corrupt data"),
        ("shards.json", None, "it has files of tokens, but no shards.json"),
    ],
)
def test_damaged_files_are_refused(prepared, tmp_path, name, damage, message):
    path = prepared / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    settings = {"data": prepared, "hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16}
    with pytest.raises(TrainingError, match=message) as error:
        training.start(settings, {"out": tmp_path / "run", "device": "cpu"})
    assert str(prepared) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another version"),
        ({"dtype": "float32"}, "dtype is 'float32'; it must be one of: uint8, uint16, int32"),
        ({"dtype": ["uint8"]}, "dtype is"),
        ({"vocab_size": 257}, "vocab_size is 257; it must be one that dtype holds"),
        ({"vocab_size": 255}, "vocab_size is 255; it must be 256 for bytes"),
        ({"tokenizer": 3}, "tokenizer is 3"),
        ({"tokenizer": "abc"}, "tokenizer.json"),
        ({"end_of_text": 256}, "end_of_text is 256; it must be a token or null"),
        ({"shard_tokens": 0}, "shard_tokens is 0; it must be a positive number"),
        ({"shard_tokens": 4999}, "train-"),
        ({"train": {"tokens": 1}}, "train is {'tokens': 1}; it must be tokens, documents and bytes"),
        ({"train": {"tokens": 10**6, "documents": 1, "bytes": 1}}, "train has 1 documents, and .* bytes of their ends"),
        ({"files": {}}, "shards.json"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, "files is"),
        ({"more": 1}, "it must have"),
    ],
)
def test_a_wrong_index_is_refused(prepared, change, message):
    path = prepared / shards.INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TrainingError, match=f"^corrupt data {prepared}: .*{message}"):
        shards.read_index(prepared)


def test_changed_tokens_are_found(prepared, make_tokenizer, folder, tmp_path):
    index = shards.verify(prepared)
    path = prepared / "train-00001.tokens"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    assert shards.read_index(prepared) == index
    with pytest.raises(TrainingError, match=r"train-00001.tokens differs from its checksum; prepare the data again"):
        shards.verify(prepared)

    out = tmp_path / "out"
    index = shards.write_shards([folder], out, tokenizer=make_tokenizer())
    path = out / "train-00000.tokens"
    content = np.fromfile(path, "<u2")
    content[:] = 290
    content.tofile(path)
    with pytest.raises(TrainingError, match=r"train-00000.tokens has the token 290; it must be below 290"):
        shards.ShardBatches(shards.Shards(out, "train", index), 16, 2, 0)[0]


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(prepared):
    sizes = {"hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16, "batch_size": 2}
    return {"data": prepared, **sizes, "warmup": 2, "steps": 6, "accumulate": 2}


@pytest.fixture
def options(tmp_path):
    return {"out": tmp_path / "run", "device": "cpu", "log_every": 2, "eval_every": 3}


class _Stop(training.Progress):
    """Stops a run after some steps, as a signal does."""

    def __init__(self, trainer, steps):
        self.trainer, self.steps = trainer, steps

    def stepped(self, row):
        if self.trainer.step == self.steps:
            self.trainer._signals.received = True


def test_a_resumed_run_ends_with_the_same_weights(settings, options, tmp_path, prepared):
    whole = training.start(settings, {**options, "out": tmp_path / "whole"})
    expected = load_file(whole.run().folder / "model.safetensors")
    assert [row["step"] for row in whole.history if "held_out_bits_per_byte" in row] == [0, 3, 6]
    trainer = training.start(settings, options)
    assert trainer.run(_Stop(trainer, 2)).ended == "signal"
    moved = tmp_path / "moved"
    shutil.move(prepared, moved)
    last = training.resume({"data": moved}, options)
    assert last.step == 2
    found = load_file(last.run().folder / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_resuming_with_other_data_is_refused(settings, options, folder, tmp_path):
    trainer = training.start(settings, options)
    trainer.run(_Stop(trainer, 1))
    other = tmp_path / "other"
    shards.write_shards([folder], other, held_out=501, shard_tokens=5000)
    for path in (other, folder):
        with pytest.raises(TrainingError, match="the data, or the tokenizer, is not what it was trained on"):
            training.resume({"data": path}, options)


def test_what_prepared_data_decide_is_not_given_again(settings, options, make_tokenizer):
    for begin in (training.start, training.resume):
        if begin is training.resume:
            training.start(settings, options).run()
        with pytest.raises(TrainingError, match=r"`held_out`"):
            begin({**settings, "held_out": 100}, options)
        with pytest.raises(
            TrainingError, match=r"`tokenizer` .* is not the one that .* was prepared with; leave it out"
        ):
            begin({**settings, "tokenizer": make_tokenizer()}, options)
    with pytest.raises(TrainingError, match=r"too little data: .*prepared has"):
        training.start({**settings, "sequence_length": 10**6}, {**options, "out": options["out"] / "other"})


@pytest.mark.slow
def test_the_model_of_prepared_data(settings, options, folder, tmp_path, make_tokenizer):
    tokenizer = make_tokenizer(eos="</s>")
    out = tmp_path / "tokens"
    shards.write_shards([folder], out, tokenizer=tokenizer, held_out=500)
    given = {**settings, "data": out, "tokenizer": tokenizer}
    trainer = training.start(given, options)
    assert trainer.model.config.vocab_size == 290 and trainer.model.config.eos_token_id == 1
    result = trainer.run()
    assert (result.folder / "tokenizer.json").is_file()
    assert training.load_model(result.folder).generation_config.eos_token_id == 1
    assert training.resume({"hidden_size": 32, "tokenizer": tokenizer}, options).step == 6


@pytest.mark.slow
def test_a_trainer_of_shards_of_your_own(settings, options, prepared):
    corpus = shards.load_prepared(prepared, 16)
    model = training.start(settings, options).model
    own = training.TrainSettings(steps=2, warmup=1, sequence_length=16, batch_size=2)
    assert training.Trainer(own, RunOptions(**options), corpus, None, model).run().ended == "steps"
