"""State dicts between torchtitan's checkpoints and Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from flash_xlstm.distributed.checkpoint import file_numbers
from flash_xlstm.integrations.torchtitan.model import XLSTM
from flash_xlstm.models import xLSTMConfig

_PREFIX = "model."
# What decides what a model of given weights computes.
_COMPUTES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "qk_dim", "v_dim", "ffn_dim", "use_bias",
    "add_out_norm", "tie_word_embeddings", "norm_eps", "eps", "gate_soft_cap", "output_logit_soft_cap",
)  # fmt: skip


class XLSTMStateDictAdapter(BaseStateDictAdapter):
    """Names in a Hugging Face folder lack the prefix "model." and hold a tied head once. Values are the same."""

    def __init__(self, model_config: XLSTM.Config, hf_assets_path: str | None) -> None:
        self.model_config = model_config
        self.hf_assets_path = hf_assets_path
        self.tied = model_config.xlstm().tie_word_embeddings
        weights = model_config.skeleton().state_dict()
        self.fqn_to_index_mapping = file_numbers(self.to_hf({_PREFIX + name: w for name, w in weights.items()}))

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        hf = {name.removeprefix(_PREFIX): value for name, value in state_dict.items()}
        if self.tied:
            hf.pop("lm_head.weight", None)
        return hf

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = {_PREFIX + name: value for name, value in hf_state_dict.items()}
        if self.tied:
            state_dict[f"{_PREFIX}lm_head.weight"] = state_dict[f"{_PREFIX}backbone.embeddings.weight"]
        return state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """A reader of a folder.

        Raises:
            ValueError: the folder is of a model that computes something else, has stacked weights, or is to be read as
                quantized.
        """
        if from_quantized:
            raise ValueError("checkpoint.initial_load_in_hf_quantized is True; it must be False for an xLSTM")
        if (Path(path) / "config.json").is_file():
            found, own = xLSTMConfig.from_pretrained(path), self.model_config.xlstm()
            for name in _COMPUTES:
                if getattr(found, name) != getattr(own, name):
                    raise ValueError(
                        f"{path} is of a model with {name} {getattr(found, name)}; it must be {getattr(own, name)}, as "
                        "the configuration's: give model_registry its settings"
                    )
        reader = HuggingFaceStorageReader(path)
        missing = set(self.fqn_to_index_mapping) - set(reader.read_metadata().state_dict_metadata)
        if missing:
            raise ValueError(
                f"{path} has no {min(missing)}; it must have all of the model's weights, in weight mode 'single'"
            )
        return reader
