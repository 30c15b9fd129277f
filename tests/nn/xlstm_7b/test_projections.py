from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import prune

from flash_xlstm.nn import FeedForward, check_weight_mode, convert_weight_mode, mLSTMBlock, mLSTMLayer

GROUPS = {"ab": {"a": 2, "b": 3}}


def test_convert_there_and_back():
    single = {"x.a.weight": torch.randn(2, 4), "x.b.weight": torch.randn(3, 4), "other": torch.zeros(1)}
    state = dict(single)
    convert_weight_mode(state, "x.", GROUPS, "fused")
    assert set(state) == {"x.ab.weight", "other"}
    assert torch.equal(state["x.ab.weight"], torch.cat([single["x.a.weight"], single["x.b.weight"]]))
    convert_weight_mode(state, "x.", GROUPS, "fused")  # already there: nothing to do
    convert_weight_mode(state, "x.", GROUPS, "single")
    assert state.keys() == single.keys()
    assert all(torch.equal(state[name], single[name]) for name in single)
    storages = {state[name].untyped_storage().data_ptr() for name in ("x.a.weight", "x.b.weight")}
    assert len(storages) == 2


def test_incomplete_or_misshapen_groups_are_left_for_load_state_dict_to_report():
    state = {"a.weight": torch.zeros(2, 4)}
    convert_weight_mode(state, "", GROUPS, "fused")
    assert set(state) == {"a.weight"}
    state = {"ab.weight": torch.zeros(6, 4)}
    convert_weight_mode(state, "", GROUPS, "single")
    assert set(state) == {"ab.weight"}


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        layer = FeedForward(4, 8)
    with pytest.raises(ValueError, match="weights of proj_up_gate are offloaded"):
        layer.set_weight_mode("fused")


def _model(weight_mode="single", use_bias=True):
    """Two blocks: the second one's obstacle is found before the first one is converted."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(
            mLSTMBlock(
                8,
                mLSTMLayer(8, 2, use_bias=use_bias, weight_mode=weight_mode),
                FeedForward(8, 12, use_bias=use_bias, weight_mode=weight_mode),
            )
            for _ in range(2)
        )
    )


def _freeze(model):
    model[1].mlstm_layer.k.weight.requires_grad_(False)


def _share(model):
    model[1].mlstm_layer.k.weight = model[1].mlstm_layer.q.weight


def _share_across(model):
    model[1].ffn.proj_up = model[0].ffn.proj_up


def _wrap(model):
    wrapped = torch.nn.Module()
    wrapped.base_layer = model[1].ffn.proj_up
    model[1].ffn.proj_up = wrapped


def _subclass_parameter(model):
    class Quantized(torch.nn.Parameter):
        pass

    model[1].ffn.proj_up.weight = Quantized(model[1].ffn.proj_up.weight.detach())


_CANNOT = {
    "some frozen": (
        _freeze,
        r"parts of 1\.mlstm_layer\.qkv_opreact differ in weight\.requires_grad .*q: True, .*k: False",
    ),
    "some biases frozen": (
        lambda model: model[1].ffn.proj_up.bias.requires_grad_(False),
        r"1\.ffn\.proj_up_gate_z differ in bias\.requires_grad",
    ),
    "dtypes": (
        lambda model: model[1].ffn.proj_up.bfloat16(),
        r"1\.ffn\.proj_up_gate_z differ in weight\.dtype .*bfloat16",
    ),
    "devices": (lambda model: model[1].ffn.proj_up.to("meta"), r"1\.ffn\.proj_up are offloaded"),
    "a bias missing": (lambda model: setattr(model[1].ffn.proj_up, "bias", None), "differ in having a bias"),
    "another module": (
        _wrap,
        r"1\.ffn\.proj_up is a torch\.nn\.modules\.module\.Module; .* merge or unload the adapter first",
    ),
    "quantized": (
        lambda model: setattr(model[1].ffn, "proj_up", torch.nn.quantized.Linear(8, 12)),
        r"1\.ffn\.proj_up is a torch\.ao\..*Linear; .* must be a torch\.nn\.Linear",
    ),
    "none": (lambda model: setattr(model[1].ffn, "proj_up", None), r"1\.ffn\.proj_up is a builtins.NoneType"),
    "parametrized": (
        lambda model: torch.nn.utils.parametrizations.weight_norm(model[1].ffn.proj_up),
        r"1\.ffn\.proj_up is a .*ParametrizedLinear",
    ),
    "pruned": (
        lambda model: prune.identity(model[1].ffn.proj_up, "weight"),
        r"1\.ffn\.proj_up must have a weight, a bias or none, and nothing else",
    ),
    "another parameter class": (
        _subclass_parameter,
        r"1\.ffn\.proj_up\.weight is a .*Quantized; .* plain torch\.nn\.Parameter",
    ),
    "shared": (
        _share,
        r"1\.mlstm_layer\.k\.weight is shared with 1\.mlstm_layer\.q\.weight|q\.weight is shared with .*k",
    ),
    "shared across layers": (_share_across, r"ffn\.proj_up\.weight is shared with 0\.ffn\.proj_up\.weight"),
    "hook": (lambda model: model[1].ffn.proj_up.register_forward_hook(print), r"1\.ffn\.proj_up has hooks"),
    "state dict hook": (
        lambda model: model[1].ffn.proj_up.register_state_dict_post_hook(lambda *args: None),
        r"1\.ffn\.proj_up has hooks",
    ),
    "hook of a parameter": (
        lambda model: model[1].ffn.proj_up.weight.register_hook(print),
        r"1\.ffn\.proj_up\.weight has hooks",
    ),
    "forward": (
        lambda model: setattr(model[1].ffn.proj_up, "forward", print),
        r"1\.ffn\.proj_up has hooks or a forward",
    ),
    "buffer": (
        lambda model: model[1].ffn.proj_up.register_buffer("scale", torch.ones(1)),
        r"1\.ffn\.proj_up must have a weight, a bias or none, and nothing else",
    ),
    "shape": (
        lambda model: setattr(model[1].ffn, "proj_up", torch.nn.Linear(8, 13)),
        r"1\.ffn\.proj_up\.weight has shape \(13, 8\); .* must be \(12, 8\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), _CANNOT.values(), ids=_CANNOT)
def test_what_would_be_lost_is_refused_before_anything_changes(change, message):
    model = _model()
    change(model)
    with pytest.raises(ValueError, match=message):
        check_weight_mode(model, "fused")
    if change is _share_across:  # which a single layer cannot detect
        return
    layer = model[1].mlstm_layer if "mlstm_layer" in message else model[1].ffn
    before = list(layer.named_modules())
    with pytest.raises(ValueError, match=message.replace(r"1\.mlstm_layer\.", "").replace(r"1\.ffn\.", "")):
        layer.set_weight_mode("fused")
    assert list(layer.named_modules()) == before and layer.weight_mode == "single"


def test_what_can_be_kept_is_carried_over():
    model = _model()
    for block in model:
        for name in ("q", "k", "v", "ogate_preact"):
            block.mlstm_layer.get_submodule(name).weight.requires_grad_(False)
    x = torch.randn(2, 3, 8)
    model[1](model[0](x)[0])[0].sum().backward()
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    expected = model[0](x)[0]
    layers = check_weight_mode(model, "fused")
    assert len(layers) == 4 and {layer.weight_mode for layer in layers} == {"single"}
    for layer in layers:
        layer.set_weight_mode("fused")
    assert check_weight_mode(model, "fused") == []
    fused = model[1].mlstm_layer.qkv_opreact
    assert not fused.weight.requires_grad and fused.weight.grad is None
    assert fused.bias.requires_grad and fused.bias.grad is not None
    assert torch.allclose(model[0](x)[0], expected, atol=1e-6)
    for layer in check_weight_mode(model, "single"):
        layer.set_weight_mode("single")
    for name, p in model.named_parameters():
        t, requires_grad, grad = before[name]
        assert torch.equal(p, t) and p.requires_grad == requires_grad
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad)), name


def test_hooks_with_which_accelerate_places_a_layer_are_carried_over():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model, x = _model(), torch.randn(2, 3, 8)
    expected = model[0](x)[0]
    hooks.attach_execution_device_hook(model, "cpu")
    for layer in check_weight_mode(model, "fused"):
        layer.set_weight_mode("fused")
    assert torch.allclose(model[0](x)[0], expected, atol=1e-6)
    assert isinstance(model[0].mlstm_layer.qkv_opreact._hf_hook, hooks.AlignDevicesHook)
    hooks.remove_hook_from_module(model[1].ffn.proj_up_gate_z)
    hooks.add_hook_to_module(model[1].ffn.proj_up_gate_z, hooks.ModelHook())
    with pytest.raises(ValueError, match=r"1\.ffn\.proj_up_gate_z has hooks"):
        check_weight_mode(model, "single")
    offloaded = copy.deepcopy(_model())
    hooks.attach_align_device_hook(offloaded, execution_device="cpu", offload=True)
    with pytest.raises(ValueError, match="are offloaded"):
        check_weight_mode(offloaded, "fused")


def test_an_unknown_weight_mode():
    for function in (_model()[0].ffn.set_weight_mode, lambda mode: check_weight_mode(_model(), mode)):
        with pytest.raises(ValueError, match="mode is 'both'; it must be one of single, fused"):
            function("both")
