"""torchtitan's trainer, validator, loss and checkpoints, where an xLSTM differs: the model makes the loss, documents
are told by offsets, and an exported folder has a configuration."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.checkpointer import BaseCheckpointManager, CheckpointManager
from torchtitan.components.loss import BaseLoss
from torchtitan.components.validate import Validator
from torchtitan.config import CompileConfig
from torchtitan.trainer import Trainer

from flash_xlstm.distributed import context
from flash_xlstm.distributed.checkpoint import write_config
from flash_xlstm.models import packing


def with_labels(input_dict: dict[str, Tensor], labels: Tensor, cp: DeviceMesh | None) -> dict[str, Tensor]:
    """A batch of torchtitan's as :class:`XLSTM` takes it: with labels, and with offsets in place of positions. With
    `cp`, this rank's piece of it."""
    rest = dict(input_dict)
    ids, positions = rest.pop("input"), rest.pop("positions", None)
    if cp is None:
        offsets = packing.offsets({}, positions, None, None, ids)
    else:
        piece = context.shard({"input_ids": ids, "shift_labels": labels, "position_ids": positions}, cp)
        ids, labels, offsets = piece["input_ids"], piece["shift_labels"], piece.get("cu_seq_lens_q")
    batch = {"input": ids, "labels": labels, **rest}
    return batch if offsets is None else {**batch, "cu_seqlens": offsets}


class XLSTMLoss(BaseLoss):
    """The loss that the model made: :class:`XLSTM` with labels returns it in place of logits."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = _made_already


def _made_already(loss: Tensor, labels: Tensor) -> Tensor:
    if loss.dim():
        raise ValueError(
            f"the model returned {tuple(loss.shape)}, not a loss; it must be given labels, by XLSTMTrainer and "
            "XLSTMValidator"
        )
    return loss


class XLSTMValidator(Validator):
    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    def post_dataloading_process(self, input_dict: Any, labels: Tensor, model_parts: Any) -> Any:
        rest = with_labels(input_dict, labels, self.parallel_dims.get_optional_mesh("cp"))
        return rest.pop("input"), rest["labels"], rest


class XLSTMCheckpointManager(CheckpointManager):
    """With ``last_save_in_hf``, the folder has config.json and the tokenizer's files too."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        pass

    def dcp_save(self, state_dict: Any, checkpoint_id: str, *args: Any, to_hf: bool = False, **kwargs: Any) -> Any:
        result = super().dcp_save(state_dict, checkpoint_id, *args, to_hf=to_hf, **kwargs)
        if to_hf and dist.get_rank() == 0:
            folder, (model,) = Path(checkpoint_id), self.states["model"].model
            write_config(model.model, folder, self.export_dtype)
            assets = self.sd_adapter.hf_assets_path
            for file in Path(assets).glob("*token*") if assets else ():
                shutil.copy(file, folder)
            shutil.rmtree(folder / "sharded")
        return result


class XLSTMTrainer(Trainer):
    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        loss: BaseLoss.Config = field(default_factory=XLSTMLoss.Config)
        validator: Validator.Config = field(default_factory=XLSTMValidator.Config)
        checkpoint: BaseCheckpointManager.Config = field(default_factory=XLSTMCheckpointManager.Config)

    def __init__(self, config: Config) -> None:
        if not isinstance(config.loss, XLSTMLoss.Config):
            raise ValueError(f"loss is {config.loss}; it must be an XLSTMLoss.Config: the model makes the loss")
        super().__init__(config)
        words, size = self.tokenizer.get_vocab_size(), self.model_config.xlstm().vocab_size
        if words > size:
            raise ValueError(
                f"hf_assets_path is {config.hf_assets_path!r}, whose tokenizer has {words} tokens; it must have at "
                f"most {size}, the model's vocab_size"
            )

    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[Any]:
        # On the CPU: offsets on a GPU would be waited for.
        cp = self.parallel_dims.get_optional_mesh("cp")
        for input_dict, labels in super().batch_generator(data_iterable):
            yield with_labels(input_dict, labels, cp), labels

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor) -> Any:
        rest = dict(input_dict)
        inputs, labels = rest.pop("input"), rest["labels"]
        self.ntokens_seen += labels.numel()
        return inputs, labels, rest
