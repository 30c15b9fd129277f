"""Checkpoints of NX-AI's packages from and to Hugging Face folders."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flash_xlstm.integrations import convert as module
from flash_xlstm.integrations.convert import convert, load_block_stack
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM, xLSTMLMModel, xLSTMLMModelConfig

SIZES = {"vocab_size": 61, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 2}
STACK = {
    "mlstm_block": {"mlstm": {"num_heads": 2}}, "slstm_block": {"slstm": {"num_heads": 2}, "feedforward": {}},
    "num_blocks": 2, "embedding_dim": 32, "slstm_at": [1], "vocab_size": 31, "context_length": 16,
}  # fmt: skip
IDS = torch.arange(24).view(2, 12)


def random(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def model_of(**config):
    return random(xLSTMForCausalLM(xLSTMConfig(**{**SIZES, **config})))


def logits(model):
    with torch.no_grad():
        out = model(IDS)
    return getattr(out, "logits", out)


def weights(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_mode": "fused", "use_bias": True}, {"tie_word_embeddings": True}, {"add_out_norm": False}],
    ids=str,
)
@pytest.mark.parametrize("most", [10**9, 60_000], ids=["one file", "several"])
def test_from_hugging_face_and_back(tmp_path, options, most):
    model = model_of(**options)
    model.save_pretrained(tmp_path / "hf", max_shard_size=most)
    seen = []
    there = convert(
        tmp_path / "hf",
        tmp_path / "large",
        max_shard_size=most,
        progress=lambda size, total: seen.append((size, total)),
    )
    assert (there.source, there.target) == ("huggingface", "xlstm_large")
    assert (len(there.files) > 1) == (most < 10**6)
    assert sum(size for size, _ in seen) == seen[0][1] == 2 * there.nbytes
    assert "embedding.weight" in weights(tmp_path / "large")
    back = convert(tmp_path / "large", tmp_path / "again", max_shard_size=most)
    assert (back.source, back.target, back.nbytes) == ("xlstm_large", "huggingface", there.nbytes)
    again = xLSTMForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    model.set_weight_mode("single")
    for name, t in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    assert sorted(os.listdir(tmp_path)) == ["again", "hf", "large"]


def test_bits_and_dtypes_are_kept(tmp_path):
    """NaN with a payload, and a dtype for each tensor."""
    model = model_of()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for n, name in enumerate(state):
        state[name] = state[name].to((torch.float32, torch.bfloat16, torch.float16)[n % 3])
    name = "backbone.embeddings.weight"
    state[name] = torch.full_like(state[name], 1.0).view(torch.int32).fill_(0x7FC12345).view(torch.float32)
    model.config.save_pretrained(tmp_path / "hf")
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "large")
    convert(tmp_path / "large", tmp_path / "again")
    again = weights(tmp_path / "again")
    for name, t in state.items():
        assert again[name].dtype == t.dtype and torch.equal(again[name].view(torch.uint8), t.view(torch.uint8)), name


def large_folder(tmp_path, **values):
    """xlstm_large's folder of a small model, with its own defaults."""
    model_of(ffn_proj_factor=2.6667).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "large")
    text = {"embedding_dim": 128, "num_heads": 2, "num_blocks": 2, "vocab_size": 61, **values}
    (tmp_path / "large" / "config.yaml").write_text(yaml.safe_dump(text))
    return tmp_path / "large"


def test_defaults_of_xlstm_large(tmp_path):
    convert(large_folder(tmp_path), tmp_path / "again")
    config = xLSTMConfig.from_pretrained(tmp_path / "again")
    assert config.ffn_proj_factor == 2.6667 and (config.mode, config.return_last_states) == ("inference", True)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == ["xLSTMForCausalLM"]
    again = xLSTMForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.allclose(logits(again), logits(model_of()), atol=1e-5)


def test_xlstm_large_itself(tmp_path):
    pytest.importorskip("mlstm_kernels", reason="NX-AI's packages are not installed: make test-dropin")
    theirs = pytest.importorskip("xlstm.xlstm_large.from_pretrained")
    names = {"chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native"}
    names["step_kernel"] = "native"
    large = large_folder(tmp_path, **names)
    loaded = theirs.load_from_pretrained(large, backend_mode="inference", return_last_states=False).eval()
    expected = loaded(IDS)
    assert torch.allclose(logits(model_of()), expected, atol=1e-4)
    save_file({name: t.contiguous() for name, t in loaded.state_dict().items()}, large / "model.safetensors")
    convert(large, tmp_path / "again")
    assert torch.allclose(logits(xLSTMForCausalLM.from_pretrained(tmp_path / "again")), expected, atol=1e-4)


@pytest.mark.parametrize("form", ["safetensors", "torch", "torch within a dict"])
def test_the_block_stack(tmp_path, form):
    model = random(xLSTMLMModel(xLSTMLMModelConfig.from_dict(STACK)))
    (tmp_path / "nx").mkdir()
    (tmp_path / "nx" / "config.yaml").write_text(yaml.safe_dump(STACK))
    if form == "safetensors":
        save_file(model.state_dict(), tmp_path / "nx" / "model.safetensors")
    else:
        state = model.state_dict()
        torch.save(state if form == "torch" else {"model_state_dict": state, "step": 3}, tmp_path / "nx" / "last.pt")
    made = convert(tmp_path / "nx", tmp_path / "hf", max_shard_size=9000)
    assert (made.source, made.target) == ("xlstm", "huggingface") and len(made.files) > 1
    back = convert(tmp_path / "hf", tmp_path / "again")
    assert (back.source, back.target) == ("huggingface", "xlstm")
    for folder in ("hf", "again", "nx"):
        assert torch.equal(logits(load_block_stack(tmp_path / folder).eval()), logits(model)), folder


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "nx").mkdir()
    (tmp_path / "nx" / "config.yaml").write_text(yaml.safe_dump(STACK))
    torch.save({"a": Bomb()}, tmp_path / "nx" / "last.pt")
    with pytest.raises(ValueError, match="a pickle with more than tensors"):
        convert(tmp_path / "nx", tmp_path / "out")
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "out").exists()


def _without(name):
    def change(folder):
        path = folder / "model.safetensors"
        save_file({n: t for n, t in load_file(path).items() if n != name}, path)

    return change


def _with(name, t):
    def change(folder):
        path = folder / "model.safetensors"
        save_file({**load_file(path), name: t}, path)

    return change


def _yaml(**changes):
    def change(folder):
        path = folder / "config.yaml"
        values = {**yaml.safe_load(path.read_text()), **changes}
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value != "gone"}))

    return change


WRONG = {
    "no folder": (shutil.rmtree, "it must be a folder"),
    "no configuration": (lambda f: (f / "config.yaml").unlink(), "neither config.json nor config.yaml"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights of the format xlstm_large"),
    "no YAML": (lambda f: (f / "config.yaml").write_text("{"), "is not YAML"),
    "code in YAML": (lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.getcwd []"), "is not YAML"),
    "a list": (lambda f: (f / "config.yaml").write_text("[1]"), "holds a list"),
    "a field less": (_yaml(num_heads="gone"), "lacks num_heads"),
    "a field more": (_yaml(heads=3), "holds heads; it must hold the fields of xlstm_large"),
    "a wrong value": (_yaml(num_heads=7), "multiple of num_heads"),
    "other sizes": (_yaml(vocab_size=62), r"embeddings.weight has shape \(61, 128\) in source; by its .* \(62, 128\)"),
    "more blocks": (_yaml(num_blocks=3), "source has no backbone.blocks.2"),
    "fewer blocks": (_yaml(num_blocks=1), "source has backbone.blocks.1.* knows nothing"),
    "a tensor less": (_without("lm_head.weight"), "source has no lm_head.weight"),
    "a tensor more": (_with("extra", torch.zeros(2)), "source has extra, of which"),
    "whole numbers": (_with("lm_head.weight", torch.zeros(61, 128, dtype=torch.int8)), "holds lm_head.weight as I8"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), "holds no whole safetensors file"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(tmp_path, wrong):
    change, message = WRONG[wrong]
    change(large_folder(tmp_path))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "large", tmp_path / "out")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_a_target_that_exists(tmp_path):
    large = large_folder(tmp_path)
    with pytest.raises(ValueError, match=r"target is .*, which exists"):
        convert(large, tmp_path / "hf")


def test_a_full_disk_and_an_interrupt_leave_nothing(tmp_path, monkeypatch):
    large = large_folder(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
            convert(large, tmp_path / "out")

    def stop(size, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(large, tmp_path / "out", progress=stop)
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_a_faulty_disk_is_noticed(tmp_path, monkeypatch):
    large, write = large_folder(tmp_path), module._write_file

    def flipped(path, tensors, report):
        sums = write(path, tensors, report)
        with open(path, "r+b") as file:
            file.seek(-3, os.SEEK_END)
            byte = file.read(1)
            file.seek(-3, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
        return sums

    monkeypatch.setattr(module, "_write_file", flipped)
    with pytest.raises(ValueError, match="with other values than were read"):
        convert(large, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def sparse_folder(folder, config):
    """A Hugging Face folder of a model of any size, whose weights take no place on the disk."""
    with torch.device("meta"):
        state = xLSTMForCausalLM(config).state_dict()
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, t in state.items():
        size = 2 * t.numel()
        header[name] = {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return end


_MEASURED = """
import resource, sys
from flash_xlstm.integrations.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
made = convert(sys.argv[1], sys.argv[2])
print(made.nbytes, (peak() - before) * 1024, peak() * 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 115 MB, whose embeddings alone have 51 MB, in a process that grows by less than 40 MB."""
    config = xLSTMConfig(vocab_size=50304, hidden_size=512, num_hidden_layers=2, num_heads=4)
    size = sparse_folder(tmp_path / "hf", config)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path / "hf", tmp_path / "out"], capture_output=True, text=True, check=True
    )
    written, grown, peak = map(int, done.stdout.split())
    assert written == size > 1.1e8
    assert grown < 4e7 and peak < 2**31


def test_the_command(tmp_path, capsys):
    from flash_xlstm.cli import main

    large, out = large_folder(tmp_path), tmp_path / "out"
    assert main(["convert", str(large), str(out)]) == 0
    printed = capsys.readouterr()
    assert re.search(
        rf"tensors, [\d,]+ bytes, from the format xlstm_large to huggingface in 1 file; {out}", printed.out
    )
    assert re.search(r"memory of this process: [\d,]{3,} MiB at most$", printed.out.rstrip())
    assert "converting and verifying: 100%" in printed.err
    assert main(["convert", str(large), str(out)]) == 2
    assert re.search(r"flash-xlstm: error: target is .*, which exists", capsys.readouterr().err)
