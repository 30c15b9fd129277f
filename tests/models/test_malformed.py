"""Damaged and hostile files: each is refused by a ValueError, TypeError or OSError, runs no code, takes no memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flash_xlstm.models import xLSTMCache, xLSTMConfig, xLSTMForCausalLM

SIZES = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
REFUSED = (ValueError, TypeError, OSError)


class Bomb:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model's folder, and one with an index and several files."""
    root = tmp_path_factory.mktemp("models")
    model = xLSTMForCausalLM(xLSTMConfig(**SIZES))
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    assert (root / "sharded" / INDEX).exists()
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """``folder("whole")``: a copy to damage."""

    def make(name):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(folders / name, tmp_path / name)

    return make


@pytest.fixture
def takes_no_memory():
    """The process grows by less than 256 MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024


pytestmark = [pytest.mark.usefixtures("takes_no_memory"), pytest.mark.filterwarnings("ignore")]


def json_of(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(path, **changes):
    tensors = {**load_file(path), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def header(declared, size=0):
    """A safetensors file with this header, and `size` bytes that are not on the disk."""
    text = json.dumps(declared).encode()
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + size


def write_header(path, declared, size=0):
    head, length = header(declared, size)
    path.write_bytes(head)
    os.truncate(path, length)


TERABYTE = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
# transformers before 5.18 reads the file before our configuration sees it.
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
NO_MAPPING = "list indices must" if OLD else r"is \[1, 2\]; it must be a mapping"
WHOLE = {
    "cut in its header": (lambda f: os.truncate(f / WEIGHTS, 100), "holds no whole safetensors file"),
    "cut in its data": (lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 4), "holds no whole"),
    "empty": (lambda f: os.truncate(f / WEIGHTS, 0), "holds no whole"),
    "a header of 4 EiB": (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}"), "holds no whole"),
    "sizes beyond the file": (lambda f: write_header(f / WEIGHTS, {"a": TERABYTE}), "holds no whole"),
    "of whole numbers": (
        lambda f: retensor(f / WEIGHTS, **{"lm_head.weight": torch.zeros(11, 32, dtype=torch.int32)}),
        "lm_head.weight as I32; it must be a floating-point",
    ),
    "more blocks than weights": (
        lambda f: json_of(f / CONFIG, num_hidden_layers=50_000, num_blocks=50_000), "num_hidden_layers is 50000",
    ),
    "no mapping": (lambda f: (f / CONFIG).write_text("[1, 2]"), NO_MAPPING),
    "no JSON": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{"), "not a valid JSON"),
    "nested": (lambda f: (f / CONFIG).write_text("[" * 100_000), "nested too deeply"),
    "another model's": (lambda f: json_of(f / CONFIG, model_type="mamba"), "model_type is 'mamba'"),
    "a dtype by name": (lambda f: json_of(f / CONFIG, dtype="os.system"), "dtype is 'os.system'"),
    "a layer beyond any memory": (
        lambda f: json_of(f / CONFIG, hidden_size=2**27, embedding_dim=2**27, ffn_proj_factor=1e6), "ffn_proj_factor",
    ),
}  # fmt: skip
SHARDED = {
    "no JSON": (lambda f: (f / INDEX).write_text("{"), "is no index of a checkpoint: JSONDecodeError"),
    "a list": (lambda f: (f / INDEX).write_text("[]"), "is no index of a checkpoint"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "is no index of a checkpoint: KeyError"),
    "no names": (lambda f: json_of(f / INDEX, weight_map={"a": 3}), "must hold names of safetensors files"),
    "another folder": (lambda f: json_of(f / INDEX, weight_map={"a": "../whole/model.safetensors"}), "beside it"),
    "a path": (lambda f: json_of(f / INDEX, weight_map={"a": "/etc/passwd"}), "beside it"),
    "a file that is missing": (lambda f: sorted(f.glob("model-*"))[1].unlink(), "is missing; the checkpoint's index"),
    "a file that was cut": (lambda f: os.truncate(sorted(f.glob("model-*"))[1], 1000), "holds no whole"),
}


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [(kind, *case) for kind, cases in (("whole", WHOLE), ("sharded", SHARDED)) for case in cases.values()],
    ids=[*WHOLE, *SHARDED],
)
def test_a_damaged_checkpoint(folder, kind, damage, message):
    path = folder(kind)
    damage(path)
    with pytest.raises(REFUSED, match=message):
        xLSTMForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("sizes", [{"vocab_size": 2**31 - 1}, {"hidden_size": 2**17, "embedding_dim": 2**17}], ids=str)
def test_a_configuration_of_a_larger_model(folder, sizes):
    path = folder("whole")
    json_of(path / CONFIG, **sizes)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # transformers' own
        xLSTMForCausalLM.from_pretrained(path)


@pytest.mark.parametrize("wrap", [lambda bomb: pickle.dumps(bomb), None], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_no_code_of_a_pickle_is_run(folder, tmp_path, wrap, name):
    path, bomb = folder("whole"), Bomb(tmp_path / "exploded")
    (path / WEIGHTS).unlink()
    if wrap is None:
        torch.save({"lm_head.weight": bomb}, path / name)
    else:
        (path / name).write_bytes(wrap(bomb))
    with pytest.raises(ValueError, match=r"holds (a pickle with more than tensors|no whole safetensors file)"):
        xLSTMForCausalLM.from_pretrained(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "exploded").exists()  # it would have


def test_blocks_beside_those_of_the_checkpoint(folder):
    model = xLSTMForCausalLM.from_pretrained(folder("whole"), num_hidden_layers=3)
    assert len(model.backbone.blocks) == 3


def _damaged(draw, data: bytes) -> bytes:
    """Cut, lengthened, or with other bytes, in the header most of the time."""
    data = bytearray(data)
    if draw(st.integers(0, 3)) == 0:
        del data[draw(st.integers(0, len(data) - 1)) :]
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 8
    for _ in range(draw(st.integers(0, 4))):
        if data:
            place = draw(st.integers(0, min(len(data), 8 + length if draw(st.booleans()) else len(data)) - 1))
            data[place] = draw(st.integers(0, 255))
    return bytes(data) + draw(st.binary(max_size=3))


def test_damaged_bytes_of_checkpoints(fuzz, folder):
    path = folder("whole")
    good = {name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG)}

    @fuzz(60)
    @given(st.data())
    def run(data):
        name = data.draw(st.sampled_from([WEIGHTS, WEIGHTS, CONFIG]))
        for each, content in good.items():
            (path / each).write_bytes(_damaged(data.draw, content) if each == name else content)
        try:
            model = xLSTMForCausalLM.from_pretrained(path)
        except (*REFUSED, RuntimeError) as error:  # RuntimeError: transformers', of shapes
            assert type(error) is not RuntimeError or "ignore_mismatched_sizes" in str(error)
        else:
            model(torch.zeros(1, 3, dtype=torch.long))

    run()


# --- caches ---


@pytest.fixture
def cache_file(tmp_path):
    """``cache_file(change)``: a cache's file, and its configuration; `change` edits the header."""

    def make(change=None):
        config, path = xLSTMConfig(**SIZES), tmp_path / "cache.safetensors"
        xLSTMCache(config, 2).save(path)
        if change is not None:
            data = path.read_bytes()
            length = struct.unpack("<Q", data[:8])[0]
            declared = json.loads(data[8 : 8 + length])
            change(declared)
            path.write_bytes(header(declared)[0] + data[8 + length :])
        return path, config

    return make


def _fact(**facts):
    return lambda declared: declared["__metadata__"].update(facts)


@pytest.mark.parametrize("fit", [True, False], ids=["of a model", "of any"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_fact(layers="-1"), "layers is -1"),
        (_fact(layers="true"), "layers is True"),
        (_fact(layers="1e30"), r"layers is 1e\+30"),
        (_fact(layers="1000000000"), "2.c"),
        (_fact(layers="1"), "tensors beside the states"),
        (_fact(layers="{"), "holds no xLSTM cache"),
        (_fact(layers="[" * 10**5), "holds no xLSTM cache"),
        (_fact(seq_length='"7"'), "seq_length is '7'"),
        (_fact(seq_length="-1"), "seq_length is -1"),
        (_fact(format='"other"'), "holds no xLSTM cache that this version reads"),
        (lambda declared: declared.pop("__metadata__"), "holds no xLSTM cache"),
        (lambda declared: declared["__metadata__"].pop("seq_length"), "seq_length is None"),
        (lambda declared: declared["0.c"].update(dtype="I32"), "c must be floating-point"),
        (lambda declared: declared["1.n"].update(dtype="I32"), "n of shape"),
        (lambda declared: declared["1.c"]["shape"].reverse(), "in layer 1; it must have shape"),
        (lambda declared: declared["0.c"].update(shape=[2, 2, 128]), "c has 3 dimensions|c of shape|layers of shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_damaged_cache(cache_file, change, message, fit):
    path, config = cache_file(change)
    with pytest.raises(ValueError, match=message) as raised:
        xLSTMCache.load(path, config if fit else None)
    assert str(path) in str(raised.value)


def test_a_huge_cache_is_refused_unread(cache_file, tmp_path):
    """A sparse file of 16 GiB, whole by its header."""
    path, config = cache_file()
    facts = {"format": json.dumps("flash_xlstm cache 1"), "layers": "1", "seq_length": "5"}
    size = 2**34
    declared = {
        "__metadata__": facts,
        "0.c": {"dtype": "F32", "shape": [1, 1, 2**16, 2**16], "data_offsets": [0, size]},
        "0.n": {"dtype": "F32", "shape": [1, 1, 2**16], "data_offsets": [size, size + 2**18]},
        "0.m": {"dtype": "F32", "shape": [1, 1], "data_offsets": [size + 2**18, size + 2**18 + 4]},
    }
    try:
        write_header(path, declared, size + 2**18 + 4)
    except OSError:
        pytest.skip("the file system holds no sparse file of 16 GiB")
    with pytest.raises(ValueError, match="it must have 2 of shape"):
        xLSTMCache.load(path, config)


def test_damaged_bytes_of_caches(fuzz, cache_file):
    path, config = cache_file()
    good = path.read_bytes()

    @fuzz(300)
    @given(st.data(), st.booleans())
    def run(data, fit):
        path.write_bytes(_damaged(data.draw, good))
        try:
            cache = xLSTMCache.load(path, config if fit else None)
        except (ValueError, OSError):
            return
        cache.clone()
        cache.check(config, 2)

    run()
