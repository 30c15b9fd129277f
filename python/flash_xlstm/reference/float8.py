"""The plain form of the casts to float8 (:mod:`flash_xlstm.ops.float8`)."""

from __future__ import annotations

import torch
from torch import Tensor


def float8_cast(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """x in float8_e4m3fn, with a scale for all values along `dim` (0 or 1), and the scales, by which its values are to
    be multiplied. Scales are powers of 2. x is a matrix, at most float32."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    ratio = (largest / x.abs().amax(dim, keepdim=True).double().clamp(min=1e-12)).float()
    factor = ratio.log2().floor().exp2()
    return (x.float() * factor).clamp(-largest, largest).to(torch.float8_e4m3fn), factor.reciprocal()
