"""What ``--config`` names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from flash_xlstm.integrations.torchtitan.model import model_registry
from flash_xlstm.integrations.torchtitan.trainer import XLSTMCheckpointManager, XLSTMTrainer, XLSTMValidator

__all__ = [
    "xlstm_1_4b",
    "xlstm_1_4b_float8",
    "xlstm_7b",
    "xlstm_7b_float8",
    "xlstm_debugmodel",
    "xlstm_debugmodel_float8_emulate",
]


def xlstm_debugmodel(converters: Sequence[Any] = ()) -> XLSTMTrainer.Config:
    """As torchtitan's other debug models, on its tests' tokenizer and text."""
    return _config(
        "debugmodel", converters,
        hf_assets_path="./tests/assets/tokenizer",
        optimizer=_adamw(8e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.8),
        training=TrainingConfig(local_batch_size=8, seq_len=2048, steps=10, disable_cuda_graphs=True),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test"),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=XLSTMCheckpointManager.Config(interval=10, last_save_model_only=False),
        validator=XLSTMValidator.Config(freq=5, steps=10),
    )  # fmt: skip


def xlstm_debugmodel_float8_emulate() -> XLSTMTrainer.Config:
    """Rounds to float8 and multiplies in the layers' own dtype: slow, and runs anywhere."""
    return xlstm_debugmodel([Float8LinearConverter.Config(emulate=True)])


def xlstm_1_4b(converters: Sequence[Any] = ()) -> XLSTMTrainer.Config:
    return _config(
        "1.4B", converters,
        hf_assets_path="./assets/hf/xLSTM-7b",
        optimizer=_adamw(7e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=750, decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(local_batch_size=2, seq_len=8192, steps=10000, max_norm=0.5, disable_cuda_graphs=True),
        activation_checkpoint=None,
    )  # fmt: skip


def xlstm_1_4b_float8() -> XLSTMTrainer.Config:
    return _compiled(xlstm_1_4b(_FLOAT8))


def xlstm_7b(converters: Sequence[Any] = ()) -> XLSTMTrainer.Config:
    """Of one node or more: ``--parallelism.data_parallel_replicate_degree`` is the number of nodes, to shard within."""
    return _config(
        "7B", converters,
        hf_assets_path="./assets/hf/xLSTM-7b",
        optimizer=_adamw(5e-4),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=750, decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(local_batch_size=1, seq_len=8192, steps=10000, max_norm=0.5, disable_cuda_graphs=True),
        activation_checkpoint=FullAC.Config(),
    )  # fmt: skip


def xlstm_7b_float8() -> XLSTMTrainer.Config:
    return _compiled(xlstm_7b(_FLOAT8))


_FLOAT8 = [Float8LinearConverter.Config(model_compile_enabled=True)]


def _config(flavor: str, converters: Sequence[Any], **options: Any) -> XLSTMTrainer.Config:
    return XLSTMTrainer.Config(
        **{
            "model_spec": model_registry(flavor, converters),
            "parallelism": ParallelismConfig(context_parallel_load_balancer=None),
            "dataloader": HuggingFaceTextDataLoader.Config(dataset="c4"),
            "metrics": MetricsProcessor.Config(enable_tensorboard=True),
            "activation_checkpoint": None,
            **options,
        }
    )


def _compiled(config: XLSTMTrainer.Config) -> XLSTMTrainer.Config:
    """Without torch.compile, rounding to float8 takes longer than the products save."""
    config.compile = CompileConfig(enable=True, components=["model"])
    return config


def _adamw(lr: float) -> OptimizersContainer.Config:
    """Matrices decay, biases and norms do not."""
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    return OptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(
                pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={**options, "weight_decay": decay}
            )
            for pattern, decay in ((r"norm|\.bias$", 0.0), (r".*", 0.1))
        ]
    )
