"""The model as torchtitan builds, splits and initializes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from torchtitan.components.quantization import Float8Linear
from torchtitan.models.common import Linear
from torchtitan.protocols import BaseModel
from torchtitan.protocols.model_spec import ModelSpec

from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import mfu
from flash_xlstm.training.float8 import _fits

FLAVORS: dict[str, dict[str, Any]] = {
    # As large as torchtitan's other debug models, and of the vocabulary of the tokenizer in its tests.
    "debugmodel": {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6, "num_heads": 4},
    "1.4B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4},
    "7B": {},
}


class XLSTM(BaseModel):
    """:class:`~flash_xlstm.models.xLSTMForCausalLM`, as `model`, so that names in a state dict begin with "model.".

    Its modules are not torchtitan's, and are initialized as a whole.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        settings: dict[str, Any] = field(default_factory=dict)
        """Arguments of :class:`flash_xlstm.models.xLSTMConfig`."""

        names: list[str] = field(default_factory=list)
        """The linear layers that torchtitan's converters may exchange: those that
        :func:`flash_xlstm.training.convert_to_float8` converts, without the gates and the head."""

        linears: list[Any] = field(default_factory=list)
        """Their configurations."""

        def __post_init__(self) -> None:
            if not self.names:
                model = self.skeleton()
                found = {name: module for name, module in model.named_modules() if _fits(model, name, module)}
                self.names = list(found)
                self.linears = [
                    Linear.Config(in_features=m.in_features, out_features=m.out_features, bias=m.bias is not None)
                    for m in found.values()
                ]

        def xlstm(self) -> xLSTMConfig:
            return xLSTMConfig(**self.settings)

        def skeleton(self) -> xLSTMForCausalLM:
            """The model without data."""
            with torch.device("meta"):
                return xLSTMForCausalLM(self.xlstm())

        def traverse(
            self, config_cls: type, *, recurse: bool = False, _prefix: str = ""
        ) -> Iterator[tuple[str, Any, Any, Any]]:
            """The layers by their names in the model, such as ``backbone.blocks.0.ffn.proj_up``."""
            if isinstance(self, config_cls):
                yield _prefix, self, None, None
                if not recurse:
                    return
            for number, (name, linear) in enumerate(zip(self.names, self.linears, strict=True)):
                if isinstance(linear, config_cls):
                    yield f"{_prefix}.{name}" if _prefix else name, linear, self.linears, number

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            """Checks torchtitan's settings.

            Raises:
                ValueError: one cannot be had with this model.
            """
            parallelism = config.parallelism
            for name, value, right, why in (
                ("parallelism.spmd_backend", parallelism.spmd_backend, "spmd_types", "whose mesh is the model's"),
                ("parallelism.expert_parallel_degree", parallelism.expert_parallel_degree, 1, "for want of experts"),
                ("debug.spmd_typechecking", config.debug.spmd_typechecking, False, "for want of annotations"),
                (
                    "training.disable_cuda_graphs", config.training.disable_cuda_graphs, True,
                    "because the number of documents differs from batch to batch",
                ),
            ):  # fmt: skip
                if value != right:
                    raise ValueError(f"{name} is {value!r}; it must be {right!r} for an xLSTM, {why}")
            balancer = parallelism.context_parallel_load_balancer
            if parallelism.context_parallel_degree > 1 and balancer is not None:
                raise ValueError(
                    f"parallelism.context_parallel_load_balancer is {balancer!r}; it must be None for an xLSTM, whose "
                    "tokens all cost the same"
                )

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            return sum(p.numel() for p in model.parameters()), mfu.flops_per_token(model.model)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = xLSTMForCausalLM(config.xlstm())
        for name, linear in zip(config.names, config.linears, strict=True):
            if type(linear) is not Linear.Config:
                self._exchange(name, linear.build())

    def _exchange(self, name: str, new: nn.Module) -> None:
        old: Any = self.model.get_submodule(name)
        kept = [parameter for parameter, _ in old.named_parameters()]
        found = [parameter for parameter, _ in new.named_parameters()]
        if not isinstance(new, nn.Linear) or found != kept:
            raise ValueError(
                f"a converter made {name} a {type(new).__name__} with {', '.join(found)}; it must be a linear layer "
                f"with {', '.join(kept)}: of float8, say"
            )
        if Float8Linear is not None and type(new) is Float8Linear:
            # torchao's own, of which blocks know what it does. torchtitan's adds an initialization that is not used.
            new.__class__ = Float8Linear.__bases__[0]
        new.init_role = old.init_role
        self.model.set_submodule(name, new)

    def verify_module_protocol(self) -> None:
        """Nothing to verify: :meth:`init_states` does not ask the modules to initialize themselves."""

    @torch.no_grad()
    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        """Initializes all weights, split or not. There are no buffers."""
        with implicit_replication():  # biases of the gates are made whole, and each rank takes its part
            for module in self.model.modules():
                self.model._init_weights(module)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits, or with `labels` their loss, without logits.

        Args:
            tokens: (batch, seq), int64.
            positions: (batch, seq), which begin anew at 0 with each document. They are waited for on a GPU; give
                `cu_seqlens` instead.
            labels: (batch, seq): the token that follows each; -100 where none counts.
            cu_seqlens: (documents + 1,) int32 offsets into the tokens of all rows; None if each row is one document.

        Returns:
            (batch, seq, vocab_size) float32; with `labels` the cross entropies' sum, a float32 scalar.
        """
        documents = {"position_ids": positions, "cu_seq_lens_q": cu_seqlens, "use_cache": False}
        if labels is None:
            return self.model(tokens, **documents).logits
        return self.model(tokens, shift_labels=labels, num_items_in_batch=1, skip_logits=True, **documents).loss


def model_registry(flavor: str, converters: Sequence[Any] = (), **settings: Any) -> ModelSpec:
    """A model of a size.

    Args:
        flavor: "debugmodel", "1.4B" or "7B".
        converters: of torchtitan, which exchange linear layers for others with the same weights:
            ``Float8LinearConverter.Config``, say.
        settings: arguments of :class:`flash_xlstm.models.xLSTMConfig` that differ from the size's.

    Raises:
        ValueError: `flavor` or a setting is unknown or wrong.
    """
    from flash_xlstm.integrations.torchtitan.parallelize import parallelize_xlstm
    from flash_xlstm.integrations.torchtitan.state_dict_adapter import XLSTMStateDictAdapter

    if flavor not in FLAVORS:
        raise ValueError(f"flavor is {flavor!r}; it must be one of {', '.join(FLAVORS)}")
    config = XLSTM.Config(settings={**FLAVORS[flavor], **settings})
    for converter in converters:
        config = converter.build().convert(config)
    return ModelSpec(
        name="xlstm",
        flavor=flavor,
        model=config,
        parallelize_fn=parallelize_xlstm,
        pipelining_fn=None,
        post_optimizer_build_fn=None,
        state_dict_adapter=XLSTMStateDictAdapter,
    )
