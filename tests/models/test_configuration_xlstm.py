from __future__ import annotations

import copy
import dataclasses
import inspect
import json

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import PreTrainedConfig
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
        ({"norm_eps": 1e-300}, "norm_eps is 1e-300; it must be a number greater than 0, finite as float32"),
        ({"eps": 10**400}, "eps is a whole number of 1329 bits"),
        ({"chunk_size": 10**29}, f"chunk_size is {10**29}; it must be a whole number from 1 to 4096"),
        ({"hidden_size": 2**31}, "hidden_size is 2147483648; it must be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be"),
        ({"v_dim_factor": 1e30}, r"v_dim_factor is 1e\+30, which makes a layer of 4.1e\+33"),
        ({"ffn_round_up_to_multiple_of": 2**31 - 1}, "which makes a layer of"),
        ({"use_cache": "no"}, "use_cache is 'no'; it must be True or False"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"mode": ["inference"]}, r"mode is \['inference'\]; it must be one of: train, "),
        ({"pad_token_id": 1.5}, "pad_token_id is 1.5; it must be a token id or None"),
        ({"eos_token_id": [2, "a"]}, "eos_token_id is "),
        ({"eos_token_id": 2**40}, "eos_token_id is "),
        ({"model_type": "mamba"}, "model_type is 'mamba'; it must be 'xlstm'"),
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


# --- a file of any content ---

GOOD = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "ffn_round_up_to_multiple_of": 8}

# Names, and values of a wrong type, that transformers accepts and fails with later.
ODD = {
    "text_config": 5,
    "decoder": {"a": 1},
    "sub_configs": 5,
    "save_pretrained": 5,
    "to_dict": "x",
    "__class__": 5,
    "__dict__": {},
    "attribute_map": {},
    "keys_to_ignore_at_inference": 3,
    "is_encoder_decoder": True,
    "rope_scaling": 5,
    "rope_parameters": [1],
    "per_layer_config": {"0": {"num_heads": 1}},
    "layer_types": 5,
    "quantization_config": 5,
    "id2label": [1, 2],
    "label2id": "x",
    "num_labels": 10**12,
    "qk_dim": 7,
    "ffn_dim": 7,
    "check": None,
    "attn_implementation": "sdpa",
    "experts_implementation": [1],
    "dtype": "float3",
    "torch_dtype": 16,
    "architectures": "xLSTMForCausalLM",
    "problem_type": "x",
    "transformers_version": 5,
    "output_attentions": "x",
    "output_hidden_states": [1],
    "return_dict": 0,
    "flash_xlstm": [1],
    "auto_map": 1,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_are_named(tmp_path, name):
    values = {**GOOD, name: ODD[name], "model_type": "xlstm"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for make in (
        lambda: xLSTMConfig(**values),
        lambda: xLSTMConfig.from_dict(copy.deepcopy(values)),
        lambda: xLSTMConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"^{name} is "):
            make()


def test_arguments_of_from_pretrained_are_checked(tmp_path):
    xLSTMConfig(**GOOD).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained is an attribute"):
        xLSTMConfig.from_pretrained(tmp_path, save_pretrained=5)
    with pytest.raises(ValueError, match="chunk_size is 1000000"):
        xLSTMConfig.from_pretrained(tmp_path, chunk_size=10**6)


def _takes(name, value):
    """Whether transformers' own configuration does. Older ones refuse more."""
    try:
        PreTrainedConfig(**{name: value})
    except Exception:  # of huggingface_hub, and no ValueError
        return False
    return True


def test_what_transformers_writes_is_taken():
    label2id = {"a": 0, "b": 1, "c": "2"}
    fields = {
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": label2id if _takes("label2id", label2id) else {"a": "0", "b": "1", "c": "2"},
        "torch_dtype": "bfloat16",
    }
    fields.update(architectures=["xLSTMForCausalLM"], transformers_version="4.56.0", _name_or_path="x", auto_map={})
    fields.update(n_positions=512, _attn_implementation_autoset=True, problem_type="regression", eos_token_id=[2, 3])
    config = xLSTMConfig(**GOOD, **fields)
    assert (config.num_labels, config.dtype, config.n_positions) == (3, torch.bfloat16, 512)
    for values in (StockConfig().to_dict(), xLSTMConfig().to_dict(), StockConfig(**fields).to_dict()):
        assert xLSTMConfig.from_dict(values).to_dict()["hidden_size"] == 4096
    missing = {"num_labels": None, "attn_implementation": {"": "eager"}}
    missing |= {field.name: None for field in dataclasses.fields(PreTrainedConfig) if _takes(field.name, None)}
    xLSTMConfig(**GOOD, **missing, text_config=None, rope_scaling=None, per_layer_config=None)


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 10**29, -(10**29), 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(0, 9), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.integers(0, 9), st.text(max_size=3)), max_size=3),
)
_KNOWN = sorted(
    {*dir(xLSTMConfig), *xLSTMConfig(**GOOD).to_dict(), *ODD, "final_logit_softcapping", "initializer_range"}
)


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(st.one_of(st.sampled_from(_KNOWN), st.text(max_size=8)), _VALUES)
def test_any_name_and_value_is_taken_or_named(name, value):
    values = {**GOOD, name: value}
    try:
        config = xLSTMConfig.from_dict(copy.deepcopy(values))
    except (ValueError, TypeError) as error:
        other = xLSTMConfig.attribute_map.get(name, name)
        related = (
            ("qk_dim", "v_dim", "layer") if name.endswith("_factor") or name in ("hidden_size", "num_heads") else ()
        )
        assert any(word in str(error) for word in (name, other, *related)), (name, value, error)
        assert len(str(error)) < 500
        return
    assert type(config).save_pretrained is xLSTMConfig.save_pretrained and "save_pretrained" not in vars(config)
    json.dumps(config.to_dict())
    if all(getattr(config, size) == wanted for size, wanted in GOOD.items()) and config.ffn_dim < 1000:
        model = xLSTMForCausalLM(config)
        assert model(torch.zeros(1, 2, dtype=torch.long), return_dict=True).logits.shape == (1, 2, 61)


def test_the_soft_cap_goes_by_both_its_names(tmp_path):
    for values in ({"output_logit_soft_cap": 7.0}, {"final_logit_softcapping": 7.0}):
        config = xLSTMConfig(**GOOD, **values)
        assert config.output_logit_soft_cap == config.final_logit_softcapping == 7.0
    assert xLSTMConfig().final_logit_softcapping == 30.0
    assert xLSTMConfig(final_logit_softcapping=None).output_logit_soft_cap is None
    assert xLSTMConfig(output_logit_soft_cap=None).final_logit_softcapping is None
    xLSTMConfig(output_logit_soft_cap=7, final_logit_softcapping=7.0)
    for cap in (30.0, None):
        with pytest.raises(ValueError, match=r"output_logit_soft_cap is 7.0 and final_logit_softcapping is"):
            xLSTMConfig(output_logit_soft_cap=7.0, final_logit_softcapping=cap)
    with pytest.raises(ValueError, match=r"output_logit_soft_cap is 30.0 and final_logit_softcapping is 7.0"):
        xLSTMConfig(output_logit_soft_cap=30.0, final_logit_softcapping=7.0)
    config.final_logit_softcapping = 5.0
    assert config.output_logit_soft_cap == 5.0
    config.save_pretrained(tmp_path)
    assert StockConfig.from_pretrained(tmp_path).output_logit_soft_cap == 5.0
    again = xLSTMConfig.from_pretrained(tmp_path, output_logit_soft_cap=6.0)
    assert again.final_logit_softcapping == 6.0
