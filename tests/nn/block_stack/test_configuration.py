from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from flash_xlstm.nn import block_stack

YAML = """
mlstm_block:
  mlstm:
    conv1d_kernel_size: 4
    qkv_proj_blocksize: 4
    num_heads: 4
slstm_block:
  slstm:
    backend: cuda
    num_heads: 4
    conv1d_kernel_size: 4
    bias_init: powerlaw_blockdependent
  feedforward:
    proj_factor: 1.3
    act_fn: gelu
context_length: 256
num_blocks: 7
embedding_dim: 128
slstm_at: [1]
"""


def test_yaml(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    config = block_stack.xLSTMBlockStackConfig.from_yaml(YAML)
    assert config.block_map == [0, 1, 0, 0, 0, 0, 0]
    assert config.mlstm_block.mlstm._inner_embedding_dim == 256  # 2 x 128
    assert config.slstm_block.feedforward._proj_up_dim == 192  # 1.3 x 128, up to a multiple of 64
    assert config.slstm_block.slstm.embedding_dim == config.mlstm_block.mlstm.embedding_dim == 128
    (tmp_path / "config.yaml").write_text(YAML)
    assert block_stack.xLSTMBlockStackConfig.from_yaml(tmp_path / "config.yaml") == config
    y = block_stack.xLSTMBlockStack(config)(torch.randn(1, 5, 128))
    assert y.shape == (1, 5, 128)
    with pytest.raises(ValueError, match="not YAML"):
        block_stack.xLSTMBlockStackConfig.from_yaml("a: [")
    with pytest.raises(TypeError, match="must be a mapping"):
        block_stack.xLSTMBlockStackConfig.from_yaml("7")


@pytest.mark.parametrize("slstm_at", [[1], [], "all"])
def test_dicts_there_and_back(make_config, slstm_at):
    config = make_config(slstm_at=slstm_at, slstm={"gradient_recurrent_clipval": 2}, dropout=0.25)
    values = config.to_dict()
    again = block_stack.xLSTMLMModelConfig.from_dict(values)
    assert again == config and again.to_dict() == values
    assert not any(name.startswith("_") for name in (*values, *values["slstm_block"], *values["slstm_block"]["slstm"]))


class _Mapping(Mapping):
    """A mapping that is not a dict, like omegaconf's."""

    def __init__(self, values):
        self._values = values

    def __getitem__(self, key):
        return _wrapped(self._values[key])

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


class _Sequence(Sequence):
    def __init__(self, values):
        self._values = values

    def __getitem__(self, index):
        return _wrapped(self._values[index])

    def __len__(self):
        return len(self._values)


def _wrapped(value):
    kinds = {dict: _Mapping, list: _Sequence}
    return kinds[type(value)](value) if type(value) in kinds else value


def test_any_mapping_and_sequence(make_config):
    slstm = {"constants": {"a": [1, {"b": 2}]}, "initial_val": [0.0, 1]}
    values = make_config(slstm=slstm, slstm_at=[0, 2]).to_dict()
    config = block_stack.xLSTMLMModelConfig.from_dict(_Mapping(values))
    assert config == block_stack.xLSTMLMModelConfig.from_dict(values)
    assert config.to_dict() == values  # of dicts and lists
    assert block_stack.xLSTMLMModelConfig.from_dict({**values, "slstm_at": (0, 2)}) == config
    for wrong in (_Sequence(["0"]), _Mapping({0: 2}), range(9)):
        with pytest.raises((TypeError, ValueError), match="slstm_at"):
            block_stack.xLSTMLMModelConfig.from_dict({**values, "slstm_at": wrong})
    with pytest.raises(TypeError, match=r"slstm_block is .*; it must be a mapping or None"):
        block_stack.xLSTMLMModelConfig.from_dict({**values, "slstm_block": [1]})


def test_omegaconf(make_config):
    omegaconf = pytest.importorskip("omegaconf", reason="omegaconf is not installed")
    values = make_config(slstm_at=[0, 2]).to_dict()
    config = block_stack.xLSTMLMModelConfig.from_dict(omegaconf.OmegaConf.create(values))
    assert config.to_dict() == values and type(config.slstm_at) is list


def test_block_configurations_are_copied():
    block = block_stack.mLSTMBlockConfig()
    for width in (64, 128):
        stack = block_stack.xLSTMBlockStackConfig(mlstm_block=block, embedding_dim=width)
        assert stack.mlstm_block.mlstm.embedding_dim == width
    assert block.mlstm.embedding_dim == -1


def test_which_blocks():
    both = {
        "mlstm_block": block_stack.mLSTMBlockConfig(),
        "slstm_block": block_stack.sLSTMBlockConfig(),
        "num_blocks": 3,
    }
    assert block_stack.xLSTMBlockStackConfig(**both).block_map == [0, 0, 0]
    assert block_stack.xLSTMBlockStackConfig(**both, slstm_at=[0, 2]).block_map == [1, 0, 1]
    assert block_stack.xLSTMBlockStackConfig(**both, slstm_at="all").block_map == [1, 1, 1]
    only = block_stack.xLSTMBlockStackConfig(slstm_block=block_stack.sLSTMBlockConfig(feedforward=None), num_blocks=2)
    assert only.block_map == [1, 1]
    assert block_stack.xLSTMBlockStack(only).blocks[0].ffn is None


def test_rounding_of_the_up_projection():
    up = {"proj_factor": 1.3, "embedding_dim": 100}
    assert block_stack.FeedForwardConfig(**up)._proj_up_dim == 192
    assert block_stack.FeedForwardConfig(**up, round_proj_up_dim_up=False)._proj_up_dim == 128
    assert block_stack.FeedForwardConfig(**up, round_proj_up_to_multiple_of=1)._proj_up_dim == 130
    with pytest.raises(ValueError, match=r"proj_factor is 0.1.*width of 0"):
        block_stack.FeedForwardConfig(proj_factor=0.1, embedding_dim=32, round_proj_up_dim_up=False)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_block": 3}, ValueError, "has no field num_block; its fields are .*num_blocks"),
        ({"mlstm_block": {"mlstm": {"heads": 3}}}, ValueError, "mlstm_block.mlstm has no field heads"),
        ({"mlstm_block": 3}, TypeError, "mlstm_block is 3; it must be a mapping or None"),
        ({"num_blocks": "3"}, TypeError, "num_blocks is '3'; it must be int"),
        ({"num_blocks": True}, TypeError, "num_blocks is True"),
        ({"num_blocks": 1.5}, TypeError, "num_blocks is 1.5"),
        ({"dropout": "1e-1"}, TypeError, "dropout is '1e-1'; it must be float"),
        ({"bias": 1}, TypeError, "bias is 1; it must be bool"),
        ({"slstm_at": "some"}, TypeError, "slstm_at is 'some'"),
        ({"slstm_at": [1, "2"]}, TypeError, "slstm_at is"),
        ({"slstm_at": [9], "slstm_block": {}}, ValueError, "slstm_at holds 9; .* 1 blocks"),
        ({"slstm_at": [0]}, ValueError, "slstm_block is None"),
        (
            {"slstm_block": {"slstm": {"backend": "fast"}}},
            TypeError,
            "backend is 'fast'; it must be 'vanilla' or 'cuda'",
        ),
        ({"slstm_block": {"slstm": {"function": "lstm"}}}, ValueError, "function is 'lstm'; it must be one of 'slstm'"),
        ({"slstm_block": {"slstm": {"forward_clipval": 1.0}}}, ValueError, "forward_clipval is 1.0"),
        ({"slstm_block": {"slstm": {"gradient_recurrent_clipval": 0.0}}}, ValueError, "greater than 0"),
        ({"slstm_block": {"slstm": {"num_heads": 3}}}, ValueError, "num_heads is 3; it must divide embedding_dim"),
        ({"slstm_block": {"slstm": {"num_heads": 0}}}, ValueError, "num_heads is 0; it must be at least 1"),
        (
            {"slstm_block": {"feedforward": {"act_fn": "tanh"}}},
            ValueError,
            "act_fn is 'tanh'; it must be one of 'gelu'",
        ),
        ({"mlstm_block": {"mlstm": {"num_heads": 5}}}, ValueError, "num_heads is 5; it must divide the inner width"),
        ({"mlstm_block": {"mlstm": {"conv1d_kernel_size": -1}}}, ValueError, "conv1d_kernel_size is -1"),
        ({"dropout": 1.5}, ValueError, "dropout is 1.5; it must be from 0 to 1"),
        ({"num_blocks": 0}, ValueError, "num_blocks is 0; it must be at least 1"),
    ],
)
def test_errors_name_the_field(values, error, message):
    given = {"mlstm_block": {}, **values}
    with pytest.raises(error, match=message):
        block_stack.xLSTMBlockStackConfig.from_dict(given)


def test_a_vocabulary_is_needed(make_config):
    with pytest.raises(ValueError, match="vocab_size is -1"):
        make_config(vocab_size=-1)
