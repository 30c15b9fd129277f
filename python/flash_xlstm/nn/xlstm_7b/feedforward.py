"""The gated feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_xlstm import ops
from flash_xlstm.nn.linear import linear
from flash_xlstm.nn.xlstm_7b.projections import FusableProjections


class FeedForward(FusableProjections):
    """``proj_down(silu(proj_up_gate(x)) * proj_up(x))``.

    Args:
        hidden_size: size of input and output.
        up_dim: size in between.
        use_bias: whether the linear layers have biases.
        weight_mode: "single" for two layers, ``proj_up_gate`` and ``proj_up``; "fused" for one layer,
            ``proj_up_gate_z``, that stacks them.

    Shape: (..., hidden_size) in and out.
    """

    def __init__(self, hidden_size: int, up_dim: int, *, use_bias: bool = False, weight_mode: str = "single") -> None:
        super().__init__(weight_mode)
        self._build_projections(
            hidden_size,
            {"proj_up_gate_z": {"proj_up_gate": up_dim, "proj_up": up_dim}},
            {"proj_up_gate_z": use_bias},
        )
        self.proj_down = nn.Linear(up_dim, hidden_size, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_mode == "fused":
            z = linear(self.get_submodule("proj_up_gate_z"), x)
            if z.dtype != torch.float64:
                return linear(self.proj_down, ops.swiglu(z))
            gate, up = z.chunk(2, -1)
        else:
            gate, up = self._project(x, "proj_up_gate_z")
        wide = torch.float64 in (gate.dtype, up.dtype)
        return linear(self.proj_down, F.silu(gate) * up if wide else ops.swiglu(gate, up))
