from __future__ import annotations

import inspect
import json

import pytest
from transformers.models.xlstm import xLSTMConfig as StockConfig

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM

DOCUMENTED = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "embedding_dim": None,
    "num_hidden_layers": 32,
    "num_blocks": None,
    "num_heads": 8,
    "use_bias": False,
    "norm_reduction_force_float32": True,
    "tie_word_embeddings": False,
    "add_out_norm": True,
    "norm_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
    "chunk_size": 64,
    "return_last_states": True,
    "autocast_kernel_dtype": "bfloat16",
    "eps": 1e-6,
    "inference_state_dtype": "float32",
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
    "weight_mode": "single",
    "use_cache": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "max_inference_chunksize": 16384,
}


def test_documented_parameters_have_their_defaults():
    parameters = inspect.signature(xLSTMConfig.__init__).parameters
    assert {name: parameters[name].default for name in DOCUMENTED} == DOCUMENTED
    config = xLSTMConfig()
    for name, default in DOCUMENTED.items():
        if default is not None:
            assert getattr(config, name) == default, name
    assert (config.embedding_dim, config.num_blocks) == (4096, 32)
    for name in DOCUMENTED:
        assert name in xLSTMConfig.__doc__


def test_two_names_of_one_size():
    config = xLSTMConfig(embedding_dim=256, num_blocks=3)
    assert (config.hidden_size, config.num_hidden_layers) == (256, 3)
    config = xLSTMConfig(hidden_size=256, num_hidden_layers=3)
    assert (config.embedding_dim, config.num_blocks) == (256, 3)
    assert xLSTMConfig(hidden_size=256, embedding_dim=256).hidden_size == 256
    with pytest.raises(ValueError, match="hidden_size is 4096 and embedding_dim is 256"):
        xLSTMConfig(hidden_size=4096, embedding_dim=256)
    with pytest.raises(ValueError, match="num_hidden_layers is 2 and num_blocks is 3"):
        xLSTMConfig(num_hidden_layers=2, num_blocks=3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chunkwise_kernel": "fast"}, "chunkwise_kernel is 'fast'.*chunkwise--native_autograd"),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, "chunkwise_kernel is"),
        ({"sequence_kernel": "native"}, "sequence_kernel is 'native'.*native_sequence__native"),
        ({"step_kernel": "fast"}, "step_kernel is 'fast'.*native, triton"),
        ({"mode": "eval"}, "mode is 'eval'.*train_with_padding"),
        ({"weight_mode": "double"}, "weight_mode is 'double'.*single, fused"),
        ({"inference_state_dtype": "float64"}, "inference_state_dtype is 'float64'.*float32, bfloat16"),
        ({"autocast_kernel_dtype": "int8"}, "autocast_kernel_dtype is 'int8'"),
        ({"num_heads": 3}, "qk_dim is 2048 .*multiple of num_heads.* 3"),
        ({"hidden_size": 96, "num_heads": 16, "qk_dim_factor": 1.0, "v_dim_factor": 1.25}, "v_dim is 120"),
        ({"hidden_size": 4, "num_heads": 8}, "qk_dim is 2"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": 2.5}, "num_heads is 2.5"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5; it must be a whole number"),
        ({"hidden_size": None, "embedding_dim": 64.5}, "hidden_size is 64.5"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_blocks": "2"}, "num_hidden_layers is '2'"),
        ({"vocab_size": 3.5}, "vocab_size is 3.5"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"gate_soft_cap": 0.0}, "gate_soft_cap is 0.0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
    ],
)
def test_contradictions_raise_at_construction(values, message):
    with pytest.raises(ValueError, match=message):
        xLSTMConfig(**values)


def test_values_set_later_are_checked_by_the_model():
    config = xLSTMConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_heads=2)
    config.step_kernel = "fast"
    with pytest.raises(ValueError, match="step_kernel is 'fast'"):
        xLSTMForCausalLM(config)


def test_kernel_names_select_compiled_or_reference():
    def kernels(**names):
        config = xLSTMConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_heads=2, **names)
        layer = xLSTMForCausalLM(config).backbone.blocks[0].mlstm_layer
        return layer.kernel, layer.step_kernel

    assert kernels() == ("flash", "flash")
    published = {"chunkwise_kernel": "chunkwise--triton_xl_chunk", "sequence_kernel": "native_sequence__triton"}
    assert kernels(**published, step_kernel="triton") == ("flash", "flash")
    assert kernels(chunkwise_kernel="parallel--native_autograd") == ("parallel", "flash")
    assert kernels(chunkwise_kernel="chunkwise--reference", step_kernel="reference") == ("chunkwise", "reference")
    assert kernels(chunkwise_kernel="recurrent--reference") == ("recurrent", "flash")


def test_saved_config_is_read_by_transformers_and_by_us(tmp_path):
    config = xLSTMConfig(
        hidden_size=128,
        num_blocks=2,
        num_heads=2,
        weight_mode="fused",
        chunkwise_kernel="chunkwise--reference",
        step_kernel="reference",
        eps=1e-5,
        gate_soft_cap=10.0,
        mode="train",
    )
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "xlstm"
    assert (config.weight_mode, config.step_kernel) == ("fused", "reference")  # saving changes nothing

    theirs = StockConfig.from_pretrained(tmp_path)
    assert (theirs.embedding_dim, theirs.num_blocks, theirs.eps, theirs.mode) == (128, 2, 1e-5, "train")
    assert (theirs.weight_mode, theirs.step_kernel) == ("single", "native")

    ours = xLSTMConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in ours.to_dict().items() if k in DOCUMENTED} == {
        k: v for k, v in config.to_dict().items() if k in DOCUMENTED
    }
    assert xLSTMConfig.from_pretrained(tmp_path, step_kernel="triton").step_kernel == "triton"


def test_reads_transformers_config(tmp_path):
    StockConfig(hidden_size=256, num_hidden_layers=3, use_bias=True, pad_token_id=7).save_pretrained(tmp_path)
    config = xLSTMConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_blocks, config.use_bias, config.pad_token_id) == (256, 3, True, 7)


def test_derived_sizes():
    config = xLSTMConfig(hidden_size=100, num_heads=2, qk_dim_factor=0.5, v_dim_factor=1.2)
    assert (config.qk_dim, config.v_dim, config.qk_head_dim, config.v_head_dim) == (50, 120, 25, 60)
    assert xLSTMConfig().ffn_dim == 10944
    assert xLSTMConfig(hidden_size=96, ffn_proj_factor=2.0, ffn_round_up_to_multiple_of=192).ffn_dim == 192
