from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors

from flash_xlstm.cli import generate, main
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a byte-level model with random weights."""
    torch.manual_seed(1)
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = xLSTMConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, num_heads=2, **special)
    model = xLSTMForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that texts differ little between runs
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text_of(folder, capsysbinary):
    """``text_of(*options)``: what generate prints for the prompt "é: "."""

    def run(*options) -> bytes:
        capsysbinary.readouterr()  # what a test's own model has said
        assert main(["generate", str(folder), "é: ", "--device", "cpu", *map(str, options)]) == 0
        captured = capsysbinary.readouterr()
        assert not captured.err
        return captured.out

    return run


def test_greedy_is_what_the_model_finds_likeliest(folder, text_of):
    prompt = "é: ".encode()
    ids = torch.tensor([list(prompt)])
    model = xLSTMForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for _ in range(20):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    expected = bytes(ids[0].tolist()).decode(errors="replace").encode() + b"\n"
    assert text_of("--temperature", 0, "--max-new-tokens", 20) == expected


def test_a_seed_makes_sampling_repeatable(text_of):
    first = text_of("--seed", 3, "--max-new-tokens", 40)
    assert first.startswith("é: ".encode())
    assert text_of("--seed", 3, "--max-new-tokens", 40) == first
    assert text_of("--seed", 4, "--max-new-tokens", 40) != first


def test_restrictions_to_the_likeliest_token_are_greedy(text_of):
    greedy = text_of("--temperature", 0, "--max-new-tokens", 20)
    assert text_of("--temperature", 5, "--top-k", 1, "--max-new-tokens", 20) == greedy
    assert text_of("--temperature", 5, "--top-p", 1e-9, "--max-new-tokens", 20) == greedy
    assert text_of("--temperature", 5, "--seed", 0, "--max-new-tokens", 20) != greedy


def test_the_newest_checkpoint_of_a_run(folder, text_of, capsysbinary):
    run = folder.parent / "run"
    run.mkdir()
    (run / "checkpoint-9").mkdir()  # older than 10 as a number, newer as a name
    os.replace(folder, run / "checkpoint-10")
    assert main(["generate", str(run), "x", "--max-new-tokens", "3", "--device", "cpu"]) == 0


class _Pieces:
    """Replaces stdout and keeps each piece that is written."""

    encoding = "utf-8"

    def __init__(self):
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)

    def flush(self):
        pass


def test_bytes_become_text_as_soon_as_they_can(monkeypatch):
    out = _Pieces()
    monkeypatch.setattr(sys, "stdout", out)
    streamer = generate._Terminal("p", generate._byte_decoder())
    streamer.put(torch.tensor([[112]]))
    for byte in "aé".encode() + b"\xffb\xe2":
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert out.pieces == ["p", "a", "", "é", "\ufffd", "b", "", "\ufffd\n"]


def test_a_terminal_without_the_characters(monkeypatch):
    out = _Pieces()
    out.encoding = "ascii"
    monkeypatch.setattr(sys, "stdout", out)
    generate._print("aé")
    assert out.pieces == ["a?"]


def test_errors(folder, tmp_path, error_line, capsys):
    cases = [
        ([str(tmp_path / "nothing"), "x"], "no checkpoint"),
        ([str(tmp_path), "x"], "no checkpoint"),
        ([str(folder), ""], "the prompt is empty"),
        ([str(folder), "x", "--device", "cuda:63"], "--device cuda:63"),
    ]
    for arguments, message in cases:
        assert main(["generate", "--device", "cpu", *arguments]) == 2
        assert message in error_line()
    for option in (["--temperature", "-1"], ["--top-p", "1.5"], ["--top-k", "0"], ["--max-new-tokens", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(["generate", str(folder), "x", *option])
        assert stop.value.code == 2
    assert "argument --top-p: '1.5' is not a number from 0 to 1" in capsys.readouterr().err


def test_a_vocabulary_that_does_not_match(folder, error_line):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    xLSTMForCausalLM(xLSTMConfig.from_dict({**config, "vocab_size": 300})).save_pretrained(folder)
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert "the vocabulary does not match" in error_line()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: {}, "does not have the model_type 'xlstm'"),
        (lambda config: [], "does not have the model_type 'xlstm'"),
        (lambda config: {**config, "model_type": "llama"}, "does not have the model_type 'xlstm'"),
        (lambda config: {"model_type": "xlstm"}, "weights do not fit config.json"),
        (lambda config: {**config, "num_blocks": 3, "num_hidden_layers": 3}, "weights do not fit config.json"),
        (lambda config: {**config, "ffn_proj_factor": 50.0}, "weights do not fit config.json"),
        (lambda config: {**config, "num_blocks": 9999, "num_hidden_layers": 9999}, "weights do not fit config.json"),
    ],
)
def test_no_model_is_built_that_the_weights_do_not_fit(folder, error_line, monkeypatch, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    monkeypatch.setattr(xLSTMForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("built a model"))
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert message in error_line()


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", ["x", 0.5, True, [], [0.5], {"x": 1}, 10**29])
def test_odd_special_tokens(folder, error_line, name, value):
    (folder / "generation_config.json").write_text(json.dumps({name: value}))
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    line = error_line()
    assert line.startswith(f"error: corrupt checkpoint {folder}: ") and len(line) < 600


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', "\0", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_odd_files(folder, error_line, name, content):
    (folder / name).write_text(content)
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert str(folder) in error_line()


def test_a_prompt_with_ids_that_are_no_tokens(folder, error_line):
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="x"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert "the tokenizer gives the id 256, and its vocabulary ends at 0" in error_line()


def test_a_tokenizer_that_cannot_decode(folder, error_line, monkeypatch):
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(folder / "tokenizer.json"))

    class Broken:
        def __init__(self, **options):
            pass

        def step(self, tokenizer, token):
            raise Exception("Invalid prefix encountered")

    monkeypatch.setattr(generate, "DecodeStream", Broken)
    monkeypatch.setattr(Tokenizer, "id_to_token", lambda self, token: "x")
    assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
    assert "the tokenizer cannot decode" in error_line()


@pytest.mark.parametrize("change", [{"tie_word_embeddings": True}, {"weight_mode": "fused"}])
def test_models_that_are_saved_in_another_form(folder, capsys, change):
    config = xLSTMConfig.from_pretrained(folder)
    for name, value in change.items():
        setattr(config, name, value)
    xLSTMForCausalLM(config).save_pretrained(folder)
    if config.tie_word_embeddings:  # as transformers' own saves it
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(["generate", str(folder), "x", "--max-new-tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("x")


@pytest.mark.cuda
def test_cuda_generates_the_same(folder, text_of, capsysbinary):
    options = ["--temperature", "0", "--max-new-tokens", "30"]
    expected = text_of(*options)
    assert main(["generate", str(folder), "é: ", "--device", "cuda", *options]) == 0
    assert capsysbinary.readouterr().out == expected
