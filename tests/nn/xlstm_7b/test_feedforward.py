from __future__ import annotations

import torch
import torch.nn.functional as F

from flash_xlstm.nn import FeedForward


def test_is_a_gated_feed_forward():
    torch.manual_seed(0)
    layer = FeedForward(12, 20, use_bias=True)
    x = torch.randn(3, 12)
    expected = layer.proj_down(F.silu(layer.proj_up_gate(x)) * layer.proj_up(x))
    assert torch.allclose(layer(x), expected)
    fused = FeedForward(12, 20, use_bias=True, weight_mode="fused")
    fused.load_state_dict(layer.state_dict())
    assert torch.allclose(fused(x), expected, atol=1e-6)
    assert set(fused.state_dict()) == {
        f"{name}.{kind}" for name in ("proj_up_gate_z", "proj_down") for kind in ("weight", "bias")
    }
