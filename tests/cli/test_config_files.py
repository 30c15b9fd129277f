"""config.json, and the file of --config, with odd values: each is refused in one line, or has no effect."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flash_xlstm.cli import main
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

ODD = [
    None, True, -1, 0, 1, 2, 0.5, 10**29, 1e300, math.nan, math.inf, "", "x", "\0", "auto", "float32", [], [1], [[]],
    {}, {"x": 1}, {"x": {"y": [1]}},
]  # fmt: skip
OTHER_NAMES = [
    "attn_implementation", "_attn_implementation", "quantization_config", "rope_scaling", "rope_parameters",
    "text_config", "sub_configs", "save_pretrained", "from_dict", "attribute_map", "qk_dim", "ffn_dim", "check",
    "id2label", "label2id", "num_labels", "flash_xlstm", "layer_types", "return_dict", "output_hidden_states",
    "torch_dtype", "generation_config", "pruned_heads", "__class__", "__dict__", "_name_or_path", "nonsense", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of a tiny byte-level model, and what its config.json holds."""
    folder = tmp_path_factory.mktemp("model")
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    xLSTMForCausalLM(
        xLSTMConfig(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_heads=1, **special)
    ).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.fixture
def generate_with(model, capsys, error_line):
    """``generate_with(values)``: the error line of generate with that config.json, None if it succeeded."""

    def call(values):
        (model[0] / "config.json").write_text(json.dumps(values))
        capsys.readouterr()
        code = main(["generate", str(model[0]), "ab", "--max-new-tokens", "2", "--temperature", "0", "--device", "cpu"])
        assert code in (0, 2)
        return error_line() if code else None

    return call


@pytest.fixture
def train_with(text, tmp_path, capsys, error_line):
    """``train_with(values)``: the error line of train with that --config, None if it succeeded."""
    path, runs = tmp_path / "config.json", iter(range(10**9))

    def call(values):
        path.write_text(json.dumps(values))
        out = tmp_path / f"run{next(runs)}"
        capsys.readouterr()
        arguments = ["--data", str(text), "--config", str(path), "--out", str(out), "--steps", "1", "--batch-size", "1"]
        code = main(["train", *arguments, "--sequence-length", "8", "--held-out", "20", "--device", "cpu"])
        assert code in (0, 2)
        assert (code == 0) == out.exists()
        return error_line() if code else None

    return call


CASES = [
    ("text_config", 1), ("sub_configs", 1), ("save_pretrained", 1), ("rope_scaling", [1]), ("quantization_config", 1),
    ("id2label", 3), ("qk_dim", 7), ("ffn_dim", 7), ("attn_implementation", 3), ("chunk_size", 10**29),
    ("layer_types", [1]), ("use_bias", "x"), ("hidden_size", "32"), ("num_heads", 0), ("norm_eps", math.nan),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CASES)
@pytest.mark.parametrize("command", ["generate", "train"])
def test_odd_values(request, model, command, name, value):
    line = request.getfixturevalue(f"{command}_with")({**model[1], name: value})
    assert line is not None and name in line and "config" in line and len(line) < 600


@pytest.mark.parametrize("command", ["generate", "train"])
def test_fuzz(request, model, fuzz, command):
    given = pytest.importorskip("hypothesis").given
    st = pytest.importorskip("hypothesis.strategies")
    run = request.getfixturevalue(f"{command}_with")
    names = st.sampled_from([*model[1], *OTHER_NAMES])

    @fuzz(25)
    @given(st.dictionaries(names, st.sampled_from(ODD), min_size=1, max_size=3))
    def check(changes):
        run({**model[1], **changes})

    check()
