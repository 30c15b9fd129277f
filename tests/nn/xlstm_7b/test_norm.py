from __future__ import annotations

import pytest
import torch

from flash_xlstm.nn import MultiHeadLayerNorm, RMSNorm


def _random(layer):
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, 1.0, 0.2, generator=generator)
    return layer


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-14)]
)
def test_rms_norm(dtype, tolerance, use_bias, device):
    layer = _random(RMSNorm(40, 1e-3, use_bias=use_bias)).to(device, dtype)
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    y = layer(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight.double()
    if use_bias:
        exact = exact + layer.bias.double()
    assert y.dtype == dtype
    assert (y.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-14)]
)
def test_multi_head_layer_norm(dtype, tolerance, use_bias, device):
    layer = _random(MultiHeadLayerNorm(3, 8, 1e-3, use_bias=use_bias)).to(device, dtype)
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    y = layer(x)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = (centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * layer.weight.double()
    if use_bias:
        exact = exact + layer.bias.double()
    assert y.dtype == dtype and y.shape == (2, 5, 24)
    assert (y.double() - exact).norm() < tolerance * exact.norm()


def test_multi_head_layer_norm_checks_its_input():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 4, 8\).*3 heads of 8"):
        MultiHeadLayerNorm(3, 8)(torch.zeros(2, 5, 4, 8))


@pytest.mark.parametrize("layer", [RMSNorm(24, use_bias=True), MultiHeadLayerNorm(3, 8, use_bias=True)])
def test_float32_weights_with_bfloat16_inputs(layer, device):
    layer = _random(layer).to(device)
    shape = (2, 5, 24) if isinstance(layer, RMSNorm) else (2, 5, 3, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    y = layer(x)
    exact = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
