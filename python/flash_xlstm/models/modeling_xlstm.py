"""The xLSTM model: embeddings, mLSTM blocks, output norm and language-modelling head."""

from __future__ import annotations

import contextlib
import copy
import functools
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, logging

from flash_xlstm import ops
from flash_xlstm import reference as plain
from flash_xlstm.models import checkpoints, packing
from flash_xlstm.models.cache import one_cache, xLSTMCache
from flash_xlstm.models.configuration_xlstm import CHUNKWISE_KERNELS, STEP_KERNELS, xLSTMConfig
from flash_xlstm.models.generation import xLSTMGenerationMixin
from flash_xlstm.nn import FeedForward, RMSNorm, check_weight_mode, linear, mLSTMBlock, mLSTMLayer
from flash_xlstm.nn.linear import only_weight
from flash_xlstm.nn.packing import require

_logger = logging.get_logger(__name__)

# Arguments that transformers passes and that have no effect here, each with the value that agrees with what the model
# does. Ellipsis: any value does.
_WITHOUT_EFFECT = {
    "token_type_ids": ...,  # tokenizers return them
    "output_attentions": ...,  # there are no attentions
    "cache_position": ...,  # the forward checks it
    "is_causal": True,
    "output_router_logits": False,
}

_FOR_LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")

# The head's input is cast to its weight's dtype if that is one of these. A quantized weight has another; its layer
# takes any input.
_HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# With this chunk_size, the configuration's default, the compiled kernels choose.
_DEFAULT_CHUNK_SIZE = 64

# The linear layers of the gates, and the gates that each computes.
_GATES = {
    "igate_preact": ("input",),
    "fgate_preact": ("forget",),
    "ifgate_preact": ("input", "forget"),
}


def _gate_bias(gate: str, num_heads: int) -> Tensor:
    return torch.full((num_heads,), -10.0) if gate == "input" else torch.linspace(3.0, 6.0, num_heads)


class _StateOutput(ModelOutput):
    """An output with `cache_params`. `cache`, its name in transformers 5.24, and `past_key_values` give the same.

    `attentions` is always None: there are none, but transformers' generic heads and its generation read it.
    """

    attentions = None

    @property
    def cache(self) -> xLSTMCache | None:
        return self.cache_params

    @property
    def past_key_values(self) -> xLSTMCache | None:
        return self.cache_params

    def _replace_old_cache_name(self, key: str) -> str:  # transformers 5.24 calls it; its own maps the other way
        return "cache_params" if key in ("cache", "past_key_values") else key


def _keep_names(output: type) -> type:
    """Undoes transformers 5.24's wrapper of an output's constructor, which renames `cache_params`."""
    init = vars(output)["__init__"]
    type.__setattr__(output, "__init__", getattr(init, "__wrapped__", init))
    return output


@_keep_names
@dataclass
class xLSTMOutput(_StateOutput):
    """What :class:`xLSTMModel` returns.

    Attributes:
        last_hidden_state: (batch, seq, hidden_size), the output of the output norm.
        cache_params: the states after the last token, or None without a cache.
        hidden_states: with `output_hidden_states`, num_hidden_layers + 1 tensors (batch, seq, hidden_size): the
            embeddings, then the output of each block. The last block's output is given behind the output norm.
        cu_seqlens: if rows hold several documents, their offsets into the tokens of all rows, one row after the other:
            (num_documents + 1,), int32.
    """

    last_hidden_state: Tensor | None = None
    cache_params: xLSTMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cu_seqlens: Tensor | None = None


@_keep_names
@dataclass
class xLSTMCausalLMOutput(_StateOutput):
    """What :class:`xLSTMForCausalLM` returns.

    Attributes:
        loss: with `labels`, the mean cross entropy of the next token, a float32 scalar.
        logits: (batch, seq or logits_to_keep, vocab_size), float32. They may be None beside a loss (see
            `skip_logits`).
        cache_params, hidden_states: as in :class:`xLSTMOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: xLSTMCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class xLSTMBlock(GradientCheckpointingLayer, mLSTMBlock):
    """:class:`flash_xlstm.nn.mLSTMBlock` built from a configuration, with gradient checkpointing."""

    def __init__(self, config: xLSTMConfig) -> None:
        mlstm_layer = mLSTMLayer(
            config.hidden_size,
            config.num_heads,
            qk_dim=config.qk_dim,
            v_dim=config.v_dim,
            use_bias=config.use_bias,
            gate_soft_cap=config.gate_soft_cap,
            eps=config.eps,
            norm_eps=config.norm_eps,
            weight_mode=config.weight_mode,
            kernel=CHUNKWISE_KERNELS[config.chunkwise_kernel],
            step_kernel=STEP_KERNELS[config.step_kernel],
            chunk_size=None if config.chunk_size == _DEFAULT_CHUNK_SIZE else config.chunk_size,
            autocast_kernel_dtype=getattr(torch, config.autocast_kernel_dtype),
        )
        ffn = FeedForward(config.hidden_size, config.ffn_dim, use_bias=config.use_bias, weight_mode=config.weight_mode)
        super().__init__(
            config.hidden_size,
            mlstm_layer,
            ffn,
            norm_eps=config.norm_eps,
            use_bias=config.use_bias,
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                module.init_role = name.rpartition(".")[2]  # for _init_weights

    # transformers sets this function, and calls it in place of the forward. Instead of torch's checkpoint it gets a
    # block's own, which costs less: it repeats no mLSTM and no product that writes to the residual stream. Another
    # function is called as it is.
    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        function: Any = self._set_checkpoint
        if getattr(function, "func", None) is not checkpoint or function.keywords.keys() - {"use_reentrant"}:
            return function
        return functools.partial(self._checkpoint, function)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        if getattr(function, "func", None) == self._checkpoint:  # put back by what had taken its place
            function = function.args[0]  # type: ignore[attr-defined]
        self._set_checkpoint = function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self._set_checkpoint

    def _checkpoint(self, torchs: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
        if self._set_checkpoint is not torchs:  # a wrapper around this, which may rely on what torch's does
            return torchs(run, *args)
        x = args[0] if args else run.keywords["x"]  # type: ignore[attr-defined]  # transformers' partial
        if not self.makes_again(x):
            return torchs(run, *args)
        self._again = True
        try:
            return run(*args)
        finally:
            self._again = False


class xLSTMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization of the models."""

    config_class = xLSTMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    # Read by the Trainer, which then divides a loss by the number of accumulated batches: transformers' generic heads
    # pass num_items_in_batch on to the model instead of using it.
    accepts_loss_kwargs = False
    _no_split_modules = ["xLSTMBlock"]  # noqa: RUF012
    _is_stateful = True
    # With a model on several devices, accelerate must not move the cache. Each state is on the device of its block.
    _skip_keys_device_placement = ["cache", "cache_params", "past_key_values"]  # noqa: RUF012

    def __init__(self, config: xLSTMConfig) -> None:
        if not isinstance(config, xLSTMConfig):  # for example transformers' own
            if getattr(config, "model_type", None) != xLSTMConfig.model_type:
                raise TypeError(f"config is a {type(config).__name__}; it must be an xLSTMConfig")
            config = xLSTMConfig.from_dict(config.to_dict())
        config.check()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # As in the xLSTM 7B. Weights have the small init's std, sqrt(2 / (5 d)). Layers that write to the residual
        # stream have Wang's, 2 / layers / sqrt(d). The weights of all gates are zero. The biases nearly close the input
        # gates, and let the forget gates keep a state for about 20 to 400 tokens.
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            super()._init_weights(module)
            return
        config, role = self.config, getattr(module, "init_role", None)
        std = (2 / (5 * config.hidden_size)) ** 0.5
        if role in ("out_proj", "proj_down"):
            std = 2 / config.num_hidden_layers / module.in_features**0.5
        bias = torch.zeros_like(module.bias) if getattr(module, "bias", None) is not None else None
        if role in _GATES:
            std = 0.0
            bias = torch.cat([_gate_bias(gate, config.num_heads) for gate in _GATES[role]])
        weight = torch.empty_like(module.weight).normal_(0.0, std) if std else torch.zeros_like(module.weight)
        if role == "ogate_preact":
            weight.zero_()
        elif role == "qkv_opreact":
            weight[-config.v_dim :].zero_()  # the output gate's rows
        init.copy_(module.weight, weight)
        if bias is not None:
            init.copy_(module.bias, bias.to(module.bias))

    def set_weight_mode(self, mode: str) -> None:
        """Stacks ("fused") or splits ("single") parallel linear layers in place. Results stay the same up to rounding.

        Parameters become new objects. Call it before making an optimizer.

        Raises:
            ValueError: as :func:`flash_xlstm.nn.check_weight_mode`. Nothing is changed then.
        """
        for module in check_weight_mode(self, mode):
            module.set_weight_mode(mode)
        self.config.weight_mode = mode

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As ``PreTrainedModel.to``.

        Raises:
            ValueError: weights have no data. This happens where they were loaded by the names of the other weight mode.
        """
        try:
            return super().to(*args, **kwargs)
        except NotImplementedError as error:
            empty = [name for name, p in self.named_parameters() if p.is_meta]
            if not empty:
                raise
            raise ValueError(
                f"{len(empty)} weights, {empty[0]} among them, are on the meta device: they were not loaded. In a "
                "checkpoint of the other weight mode than the model's they have other names: load it by "
                "from_pretrained or load_state_dict, which convert it, or build the model in the checkpoint's mode"
            ) from error

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As ``PreTrainedModel.from_pretrained``. A checkpoint in another weight mode than the configuration's is
        converted: after it is loaded, or before if the model is to be quantized.

        Raises:
            ValueError: the checkpoint is quantized and in the other weight mode; or a file is damaged, holds what is no
                weight, or does not fit the folder's configuration, before anything is allocated.
        """
        found, wanted = checkpoints.weight_modes(cls.config_class, pretrained_model_name_or_path, config, kwargs)
        if found != wanted:
            stored = checkpoints.stored_quantization(cls.config_class, pretrained_model_name_or_path, config, kwargs)
            if stored is not None:
                raise ValueError(
                    f"weight_mode is {wanted!r}; it must be {found!r}: the checkpoint is quantized in that mode, and "
                    "quantized weights are neither stacked nor split"
                )
            if kwargs.get("quantization_config") is not None:
                return cls._from_converted(pretrained_model_name_or_path, *args, config=config, mode=wanted, **kwargs)
        if found != wanted:
            if hasattr(config, "weight_mode"):
                config = copy.deepcopy(config)
                config.weight_mode = found
            else:
                kwargs = {**kwargs, "weight_mode": found}
        with checkpoints.readable(pretrained_model_name_or_path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if found != wanted:
            model.set_weight_mode(wanted)
        model._tie_equal_weights()
        return loaded

    @classmethod
    def _from_converted(cls, path: Any, *args: Any, config: Any, mode: str, **kwargs: Any) -> Any:
        """``from_pretrained`` of weights that are first converted to the weight mode `mode`."""
        hub = {name: kwargs.pop(name) for name in checkpoints.HUB_ARGUMENTS if name in kwargs}
        if not isinstance(config, PreTrainedConfig):
            read = cls.config_class.from_pretrained(path if config is None else config, **hub)
            names = ({*vars(read), *read.attribute_map} & kwargs.keys()) - {"dtype"}
            own = {name: kwargs.pop(name) for name in names}
            config = cls.config_class.from_dict(read.to_dict(), **own)
        config = copy.deepcopy(config)
        config.weight_mode = mode
        with torch.device("meta"):
            skeleton = cls(copy.deepcopy(config))
        options = {"state_dict": kwargs.pop("state_dict", None), "variant": kwargs.pop("variant", None), **hub}
        weights = checkpoints.converted_state_dict(skeleton, path, options, mode)
        loaded = super().from_pretrained(None, *args, config=config, state_dict=weights, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if path is not None:
            model.config.name_or_path = model.name_or_path = os.fspath(path)
            if model.can_generate():
                with contextlib.suppress(OSError):  # the checkpoint may have none
                    model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        model._tie_equal_weights()
        return loaded

    def _tie_equal_weights(self) -> None:
        """Ties the head to the embeddings if the configuration says so and the weights are equal. Older versions of
        transformers leave them untied if a checkpoint holds both."""
        if not self.config.tie_word_embeddings:
            return
        head, embeddings = self.get_output_embeddings(), self.get_input_embeddings()
        if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
            return
        if head.weight is embeddings.weight or head.weight.is_meta or embeddings.weight.is_meta:
            return
        if torch.equal(head.weight, embeddings.weight):
            head.weight = embeddings.weight

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As ``PreTrainedModel.save_pretrained``. Transformers' own xLSTM can load the directory too: weights are
        written in single form, with the LM head even if it is tied to the embeddings."""
        state_dict = checkpoints.portable_state_dict(self, state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)


class xLSTMModel(xLSTMPreTrainedModel):
    """The xLSTM without a head: embeddings, mLSTM blocks and output norm."""

    caches_by_default = True  # False: `use_cache` of the configuration is not looked at

    def __init__(self, config: xLSTMConfig) -> None:
        super().__init__(config)
        config = self.config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([xLSTMBlock(config) for _ in range(config.num_hidden_layers)])
        self.out_norm = RMSNorm(config.hidden_size, config.norm_eps) if config.add_out_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: xLSTMCache | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: xLSTMCache | None = None,
        past_key_values: xLSTMCache | None = None,
        position_ids: Tensor | None = None,
        hidden_to_keep: int = 0,
        **kwargs: Any,
    ) -> xLSTMOutput | tuple:
        """Hidden states of a batch of sequences.

        Args:
            input_ids: (batch, seq) token ids. Give either these or `inputs_embeds`.
            inputs_embeds: (batch, seq, hidden_size) embeddings.
            cache_params: a cache to continue from. It is advanced.
            use_cache: return a cache. Default: yes if `cache_params` is given; else what the configuration says, but
                no in training mode with gradients on, and no with packed documents.
            attention_mask: (batch, seq or longer). It is 0 at padding, and 1 or the number of a document (see below) at
                tokens. The last seq columns of a longer mask count. Padding, on either side, leaves the states alone.
                The output at padding is that of a token that is read but not remembered.
            output_hidden_states: return the hidden states of every layer.
            return_dict: False for a tuple without the entries that are None.
            cache, past_key_values: other names of `cache_params`.
            position_ids: (batch, seq) or (1, seq). They count up by one from token to token. A document begins where
                they begin anew, at 0 or at the row's first position. Without ``cu_seq_lens_q`` this waits for the GPU,
                once. Under torch.compile they alone can describe only one document a row. With a cache they must go on
                counting.
            hidden_to_keep: if not 0, only this many last positions need hidden states. An input that is read in several
                pieces then takes memory that does not grow with its length. 0: all positions.
            kwargs: packed documents, as transformers' DataCollatorWithFlattening describes them (see below). Also what
                transformers passes to every model and has no effect on this one: None under any name,
                `token_type_ids`, `output_attentions` (`attentions` is always None), `is_causal` if True,
                `output_router_logits` if False, and `cache_position`, which must count up by one.

        Documents in one row do not see each other. Each has the output that it has in a row of its own. They have no
        cache. Any of these arguments describes them; those that are given must agree:

        - ``cu_seq_lens_q``, ``cu_seq_lens_k`` or ``cu_seqlens``: (num_documents + 1,) int32 offsets into the tokens of
          all rows, one row after the other. Nothing waits for a GPU. ``max_length_q`` and ``max_length_k`` may be given
          beside them, at least the length of the longest document.
        - ``seq_idx``: (batch, seq), a number for each document, beginning with any number. Alone it waits for the GPU,
          once.
        - `position_ids`.
        - `attention_mask` with numbers of documents in place of 1. On CUDA, or under torch.compile, a mask alone can
          only tell padding. Give the numbers as ``seq_idx`` too.

        Raises:
            TypeError: an argument that the model does not know, ids that are no integers, or a cache of another model.
            ValueError: arguments that contradict each other or do not fit, or packed documents with a cache or with
                `use_cache`. With ``cu_seq_lens_q`` on CUDA, the device raises for wrong values.
        """
        cache_params = one_cache(cache_params=cache_params, cache=cache, past_key_values=past_key_values)
        if kwargs:
            _check_unused(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        name, sizes = (
            ("input_ids", "batch, seq") if inputs_embeds is None else ("inputs_embeds", "batch, seq, hidden_size")
        )
        if inputs.dim() != sizes.count(",") + 1:
            raise ValueError(f"{name} has shape {tuple(inputs.shape)}; it must be ({sizes})")
        if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids has dtype {str(input_ids.dtype)[6:]}; it must be int64 or int32")
        if inputs.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(inputs.shape)}; seq must be at least 1")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        batch, seq = inputs.shape[:2]
        mask = _mask(attention_mask, inputs)
        padding = None if mask is None else mask.to(inputs.device) == 0
        seen = 0 if cache_params is None else cache_params.get_seq_length()
        cu_seqlens = None
        if cache_params is None:
            cu_seqlens = packing.offsets(kwargs, position_ids, mask, padding, inputs)
            if cu_seqlens is not None and batch > 1 and self._shares_sequences():
                raise ValueError(f"{name} has {batch} rows; where ranks share packed documents it must have one")
        elif kwargs or mask is not None or position_ids is not None:
            _check_one_sequence(kwargs, position_ids, mask, padding, inputs, seen)
        use_cache = self._resolve_use_cache(use_cache, cache_params, packed=cu_seqlens is not None)
        if kwargs.get("cache_position") is not None:
            _check_positions("cache_position", kwargs["cache_position"][None], inputs, None, seen)

        states: list[Any] = [None] * len(self.blocks)
        slots = None
        if cache_params is not None:
            cache_params.check(self.config, batch)
            states = cache_params.layer_states()
            slots = cache_params.slots if seq == 1 else None
        x, new_states, hidden_states = self._run(
            inputs, states, padding, use_cache, output_hidden_states, slots=slots, keep=hidden_to_keep,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if use_cache:
            if cache_params is None:
                dtype = getattr(torch, self.config.inference_state_dtype)
                cache_params = xLSTMCache.from_states(new_states, dtype, seq)
            else:
                cache_params.update(new_states, seq)

        output = xLSTMOutput(
            last_hidden_state=x,
            cache_params=cache_params if use_cache else None,
            hidden_states=hidden_states,
            cu_seqlens=cu_seqlens,
        )
        return output if return_dict else output.to_tuple()

    def _resolve_use_cache(self, use_cache: bool | None, cache: xLSTMCache | None, packed: bool) -> bool:
        available = self.config.mode == "inference" or self.config.return_last_states
        if use_cache is None:
            training = self.training and torch.is_grad_enabled()
            wanted = available and self.config.use_cache and self.caches_by_default
            use_cache = cache is not None or (wanted and not training and not packed)
        if use_cache and packed:
            raise ValueError("use_cache is True; it must be False where rows hold several documents")
        if use_cache and not available:
            raise ValueError(
                f"use_cache is True, but config.mode is {self.config.mode!r} and config.return_last_states "
                "is False; set mode to 'inference' or return_last_states to True"
            )
        return use_cache

    def _run(
        self,
        inputs: Tensor,
        states: list[Any],
        padding: Tensor | None,
        use_cache: bool,
        keep_hidden: bool,
        *,
        slots: Tensor | None,
        keep: int,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, list[Any], tuple[Tensor, ...] | None]:
        """All blocks and the output norm. Without gradients, long inputs are read in pieces.

        Args:
            inputs: token ids or embeddings. Ids are embedded piece by piece, so that the memory in use does not grow
                with the sequence.
            keep: if not 0, only the outputs of the last `keep` positions are needed.
            cu_seqlens: offsets of packed documents. Such inputs are read in one piece.
        """
        seq, piece = inputs.shape[1], self.config.max_inference_chunksize
        inplace = use_cache and not torch.is_grad_enabled()  # otherwise the caller's cache stays as it is

        def run_piece(part: slice, states: list[Any], return_states: bool) -> Any:
            x = inputs[:, part]
            if not x.is_floating_point():
                size = getattr(self.embeddings, "num_embeddings", self.config.vocab_size)
                x = _in_range("input_ids", x, size, lambda: self.embeddings(inputs[:, part]))
            part_padding = None if padding is None else padding[:, part].to(x.device)
            return self._run_piece(x, states, part_padding, return_states, inplace, keep_hidden, slots, cu_seqlens)

        if torch.is_grad_enabled() or seq <= piece or cu_seqlens is not None or self._shares_sequences():
            return run_piece(slice(None), states, use_cache)
        outputs, hidden = [], []
        for start in range(0, seq, piece):
            part = slice(start, min(start + piece, seq))
            y, states, layers = run_piece(part, states, use_cache or part.stop < seq)
            if keep and not keep_hidden:
                y = y[:, max(0, seq - keep - start) :].clone()  # a view would keep all of it
            outputs.append(y)
            hidden.append(layers)
        joined = tuple(torch.cat(parts, 1) for parts in zip(*hidden, strict=True)) if keep_hidden else None
        return torch.cat(outputs, 1), states, joined

    def _shares_sequences(self) -> bool:
        """Whether each rank has a piece of every sequence (:func:`flash_xlstm.distributed.context.set_group`)."""
        return any(getattr(module, "context_group", None) is not None for module in self.modules())

    def _run_piece(
        self,
        x: Tensor,
        states: list[Any],
        padding: Tensor | None,
        return_states: bool,
        inplace: bool,
        keep_hidden: bool,
        slots: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, list[Any], tuple[Tensor, ...] | None]:
        hidden = []
        new_states = []
        slots = None if slots is None else slots.to(x.device)
        rows = x.shape[:2]
        if cu_seqlens is not None:  # all rows as one, one after the other
            cu_seqlens, x = cu_seqlens.to(x.device), x.reshape(1, -1, x.shape[-1])
            padding = None if padding is None else padding.reshape(1, -1)
        for block, state in zip(self.blocks, states, strict=True):
            if keep_hidden:
                hidden.append(x)
            x, state = block(x, _where_it_runs(block, x, state), padding, return_states, inplace, slots, cu_seqlens)
            new_states.append(state)
        hidden.append(self.out_norm(x))
        if cu_seqlens is not None:
            hidden = [x.reshape(*rows, x.shape[-1]) for x in hidden]
        return hidden[-1], new_states, tuple(hidden) if keep_hidden else None


class xLSTMForCausalLM(xLSTMPreTrainedModel, xLSTMGenerationMixin):
    """The xLSTM with a language-modelling head."""

    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: xLSTMConfig) -> None:
        super().__init__(config)
        config = self.config
        self.backbone = xLSTMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: xLSTMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: xLSTMCache | None = None,
        past_key_values: xLSTMCache | None = None,
        position_ids: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> xLSTMCausalLMOutput | tuple:
        """Logits, and with `labels` the loss.

        In training mode the loss is made piece by piece, without the logits
        (:func:`flash_xlstm.ops.linear_cross_entropy`), and `logits` is None. In two cases the loss is made from the
        logits, which are then returned. One is a head in float64, or a head that is not a plain linear layer: an
        adapter, a quantized or sharded weight, hooks. This warns once. The other is a `loss_function` that is not
        transformers' own for causal models.

        Args:
            input_ids, inputs_embeds, cache_params, cache, past_key_values, attention_mask, output_hidden_states,
                return_dict, position_ids: as in :meth:`xLSTMModel.forward`.
            labels: (batch, seq) token ids, int64 or int32, normally `input_ids` again. The label of position t is
                compared with the logits of position t - 1. Labels of -100, labels at padding and the label of position
                0 do not count. The first token behind padding on the left does count, as transformers counts the labels
                of a batch. The padding before it stands for the beginning of the sequence: a token that sees only
                itself. The first token of a document that is packed behind another does not count, whatever its label
                is.
            use_cache: as in :meth:`xLSTMModel.forward`; with labels and gradients the default is no.
            logits_to_keep: a number n: only the logits of the last n positions, or all if n is 0. A 1-D tensor: the
                logits of the positions that it holds.
            skip_logits: whether `logits` may be None beside a loss. Default: yes in training mode, as with Liger's
                kernels. With False they are always returned beside a loss, with True never.
            kwargs: ``num_items_in_batch``: the summed loss is divided by it, not by the number of labels that count.
                ``ignore_index``: the label that does not count, in place of -100.
                ``shift_labels``: (batch, seq), for each position the token that follows. They replace `labels`.
                ``num_logits_to_keep``: another name of `logits_to_keep`.
                The rest is as in :meth:`xLSTMModel.forward`.

        Raises:
            TypeError, ValueError: as :meth:`xLSTMModel.forward` does.
        """
        cache_params = one_cache(cache_params=cache_params, cache=cache, past_key_values=past_key_values)
        for_loss = {name: kwargs.pop(name) for name in _FOR_LOSS if kwargs.get(name) is not None} if kwargs else {}
        if kwargs.get("num_logits_to_keep") is not None:
            logits_to_keep = kwargs.pop("num_logits_to_keep")
        if labels is None:
            labels = for_loss.get("shift_labels")
        _check_labels(labels, for_loss.get("shift_labels"))
        count = for_loss.get("num_items_in_batch")
        if count is not None and not isinstance(count, (Tensor, numbers.Real)):
            raise TypeError(f"num_items_in_batch is a {type(count).__name__}; it must be a number or a tensor")
        if use_cache is None and cache_params is None and labels is not None and torch.is_grad_enabled():
            use_cache = False
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.backbone(
            input_ids,
            inputs_embeds,
            cache_params,
            use_cache,
            attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            position_ids=position_ids,
            hidden_to_keep=0 if isinstance(logits_to_keep, Tensor) else logits_to_keep,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep or None, None)
        uncounted = []  # labels at padding, and those of documents' first tokens
        if labels is not None and attention_mask is not None:
            uncounted.append(attention_mask[:, -hidden.shape[1] :][:, kept] == 0)
        if labels is not None and outputs.cu_seqlens is not None and for_loss.get("shift_labels") is None:
            uncounted.append(packing.first_tokens(outputs.cu_seqlens, *hidden.shape[:2])[:, kept])
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            hidden = hidden[:, kept]
        loss = logits = None
        if labels is not None:
            if labels.shape != hidden.shape[:2]:
                raise ValueError(
                    f"labels has shape {tuple(labels.shape)}; it must be that of the logits, {tuple(hidden.shape[:2])}"
                )
            for positions in uncounted:
                labels = labels.masked_fill(positions.to(labels.device), for_loss.get("ignore_index", -100))
            if self.training if skip_logits is None else skip_logits:
                loss = self._loss_without_logits(hidden, labels, **for_loss)
        if loss is None:
            logits = self._logits(hidden)
            if labels is not None:  # torch's own loss takes int64 only
                if "shift_labels" in for_loss:
                    for_loss["shift_labels"] = for_loss["shift_labels"].long()
                size, named = logits.shape[-1], "shift_labels" if "shift_labels" in for_loss else "labels"
                loss = _in_range(
                    named,
                    for_loss.get("shift_labels", labels),
                    size,
                    lambda: self.loss_function(logits=logits, labels=labels.long(), vocab_size=size, **for_loss),
                    ignored=for_loss.get("ignore_index", -100),
                )
                logits = None if skip_logits else logits

        output = xLSTMCausalLMOutput(
            loss=loss,
            logits=logits,
            cache_params=outputs.cache_params,
            hidden_states=outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    def _head_input(self, hidden: Tensor) -> Tensor:
        # A head that a caller put in place may have no weight, or a quantized one.
        dtype = getattr(getattr(self.lm_head, "weight", None), "dtype", None)
        return hidden.to(dtype) if dtype in _HEAD_DTYPES else hidden

    def _loss_without_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
    ) -> Tensor | None:
        """The loss of transformers' ForCausalLMLoss. None if it can only be made from the logits."""
        if self.loss_function is not ForCausalLMLoss:
            return None
        hidden = self._head_input(hidden)
        weight = only_weight(self.lm_head, hidden)
        cross_entropy = getattr(self.lm_head, "cross_entropy", None)  # of one that is split by the vocabulary
        if cross_entropy is None and weight is not None:
            cross_entropy = functools.partial(ops.linear_cross_entropy, weight=weight)
        if cross_entropy is None or hidden.dtype == torch.float64:
            if not torch.compiler.is_compiling():
                what = type(self.lm_head).__name__ if weight is None else "in float64"
                _logger.warning_once(
                    f"lm_head is {what}; it must be a plain nn.Linear without bias, hooks or changes, of float32, "
                    "bfloat16 or float16, for a loss without logits: all logits are made"
                )
            return None
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        loss = cross_entropy(
            hidden,
            labels=shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
            soft_cap=self.config.output_logit_soft_cap,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = linear(self.lm_head, self._head_input(hidden))
        if logits.dtype == torch.float64:
            return plain.soft_cap(logits, self.config.output_logit_soft_cap)
        return ops.soft_cap(logits.float(), self.config.output_logit_soft_cap)


def _where_it_runs(block: nn.Module, x: Tensor, state: Any) -> Any:
    """`state` on the device where `block` runs on x. The weights do not tell this device: they may be offloaded."""
    if state is None:
        return None
    device = getattr(vars(block).get("_hf_hook"), "execution_device", None)  # accelerate's hook moves x there
    device = x.device if device is None else torch.device(device)
    return state if state[0].device == device else tuple(t.to(device) for t in state)


def _check_unused(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is None or name in packing.ARGUMENTS:
            continue
        if name not in _WITHOUT_EFFECT:
            raise TypeError(f"{name} is no argument of the model")
        meant = _WITHOUT_EFFECT[name]
        if meant is not ... and value is not meant:
            raise ValueError(f"{name} is {value!r}; it must be {meant}")


def _check_one_sequence(
    arguments: dict[str, Any],
    position_ids: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    x: Tensor,
    seen: int,
) -> None:
    """Checks that no argument describes packed documents in the rows of x, which continue from a cache."""
    for name in packing.ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given beside a cache; rows of several documents go without one")
    if mask is not None:
        packing.check_mask(mask)
    if position_ids is not None:
        _check_positions("position_ids", position_ids, x, padding, seen)


def _mask(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The part of `attention_mask` for the tokens of x: (batch, seq)."""
    if attention_mask is None:
        return None
    batch, seq = x.shape[:2]
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask is a {type(attention_mask).__name__}; it must be a tensor")
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < seq:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be ({batch}, {seq}), or longer "
            "where it covers tokens the cache has seen: 0 at padding, else 1 or the number of a document"
        )
    return attention_mask[:, -seq:]


def _check_positions(name: str, positions: Tensor, x: Tensor, padding: Tensor | None, seen: int) -> None:
    """Checks that positions (batch or 1, seq) count up by one from token to token, as those of one sequence do."""
    batch, seq = x.shape[:2]
    if positions.dim() != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != seq:
        raise ValueError(f"{name} has shape {tuple(positions.shape)}; it must be ({batch}, {seq})")
    positions = positions.to(x.device).expand(batch, seq)
    real = torch.ones_like(positions, dtype=torch.bool) if padding is None else ~padding
    start = positions - real.cumsum(1)  # the same for every token of a sequence
    first = start.gather(1, real.byte().argmax(1, keepdim=True))
    fits = (start == first) & (first >= 0) if seen else start == first
    require(
        (fits | ~real).all(),
        f"{name} must count up by one from token to token, and not from 0 behind a cache of {seen} tokens: a row goes "
        "on with one sequence there",
    )


def _in_range(name: str, ids: Tensor, size: int, call: Callable[[], Tensor], ignored: int | None = None) -> Tensor:
    """What `call` gives. Where torch finds an index out of range, as it does on a CPU, the error names it."""
    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except IndexError as error:
        wrong = ids[(ids < 0) | (ids >= size)]
        wrong = wrong if ignored is None else wrong[wrong != ignored]
        if wrong.numel() == 0:
            raise
        other = "" if ignored is None else f" or ignore_index, {ignored}"
        raise ValueError(f"{name} holds {wrong[0].item()}; they must be from 0 to {size - 1}{other}") from error


def _check_labels(labels: Tensor | None, shift_labels: Tensor | None) -> None:
    for name, given in (("shift_labels", shift_labels), ("labels", labels)):
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; it must be a tensor")
        if given is not None and given.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} has dtype {str(given.dtype)[6:]}; it must be int64 or int32")
    if labels is not None and shift_labels is not None and shift_labels.numel() != labels.numel():
        raise ValueError(
            f"shift_labels has shape {tuple(shift_labels.shape)}; it must be that of labels, {tuple(labels.shape)}"
        )
