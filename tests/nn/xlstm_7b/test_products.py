"""A block's halves with torchao's float8 layers: equal to the layers one by one, which ones are taken, one graph."""

import dataclasses

import pytest
import torch
from torch import nn

from flash_xlstm.nn.xlstm_7b import FeedForward, mLSTMBlock, mLSTMLayer, products, residual

HIDDEN, HEADS, UP = 64, 4, 96
CPU_SCALES_ROWS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)


def emulates(device="cpu"):
    """Whether products have to be emulated on a device."""
    return not CPU_SCALES_ROWS if device == "cpu" else torch.cuda.get_device_capability() < (8, 9)


@pytest.fixture
def config():
    float8 = pytest.importorskip("torchao.float8", reason="torchao is not installed")
    return lambda recipe="rowwise", **options: dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name(recipe), **options
    )


def convert(module, config):
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(
        module,
        module_filter_fn=lambda _, name: not name.endswith("gate_preact") or name.endswith("ogate_preact"),
        config=config,
    )
    return module


def make_block(config, dtype=torch.float32, weight_mode="single", device="cpu"):
    torch.manual_seed(3)
    built = mLSTMBlock(
        HIDDEN, mLSTMLayer(HIDDEN, HEADS, weight_mode=weight_mode), FeedForward(HIDDEN, UP, weight_mode=weight_mode)
    )
    for p in built.parameters():
        nn.init.normal_(p, std=0.3)
    return convert(built.to(device, dtype).train(), config)


def gradients(built, x, again=False, forward=None):
    built.zero_grad()
    x = x.detach().requires_grad_()
    built._again = again
    y, _ = (built if forward is None else forward)(x)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape).to(y))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in built.named_parameters()}}


def modules_one_by_one(monkeypatch, built, x):
    with monkeypatch.context() as patch:
        patch.setattr(residual, "serves", lambda x: False)
        return gradients(built, x)


def used(monkeypatch):
    names = []
    for name in ("run_mlstm", "run_feed_forward"):
        run = getattr(residual, name)
        monkeypatch.setattr(residual, name, lambda *a, run=run, name=name: (names.append(name), run(*a))[1])
    return names


def distances(got, expected):
    return {
        name: ((got[name].double() - t.double()).norm() / t.double().norm().clamp(min=1e-30)).item()
        for name, t in expected.items()
    }


@pytest.fixture(params=["single", "fused"])
def weight_mode(request):
    return request.param


# Layer by layer, the gradient of a joined input is a sum of one rounded product a weight, each with scales of its own.
# With emulated products in float32 nothing else rounds, but a value next to the middle of two may go either way.
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    "emulate", [True, pytest.param(False, marks=pytest.mark.skipif(emulates(), reason="torch < 2.13"))]
)
def test_halves_equal_torchaos_layers(config, weight_mode, emulate, again, monkeypatch):
    built = make_block(config(emulate=emulate), weight_mode=weight_mode)
    x = torch.randn(4, 32, HIDDEN)
    expected = modules_one_by_one(monkeypatch, built, x)
    names = used(monkeypatch)
    far = distances(gradients(built, x, again), expected)
    assert names == ["run_mlstm", "run_feed_forward"]
    assert max(far.values()) < (2e-3 if emulate or weight_mode == "fused" else 0.05), far
    assert far["y"] < 1e-5 and far["ffn.proj_down.weight"] < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_in_16_bits(config, device, weight_mode, dtype, monkeypatch):
    built = make_block(config(emulate=emulates(device)), dtype, weight_mode, device)
    x = torch.randn(4, 32, HIDDEN, device=device).to(dtype)
    layers = modules_one_by_one(monkeypatch, built, x)
    got, again = gradients(built, x), gradients(built, x, again=True)
    plain = make_block(config(emulate=True), torch.float32, weight_mode, device)
    expected = modules_one_by_one(monkeypatch, plain, x.float())
    far, far_again, far_layers = (distances(g, expected) for g in (got, again, layers))
    for name in expected:
        if not name.endswith("preact.bias"):  # a sum over tokens that may cancel
            assert max(far[name], far_again[name]) < 1.5 * far_layers[name] + 0.03, name


@pytest.mark.cuda
def test_a_large_block_on_a_gpu(config, weight_mode, monkeypatch):
    """Sizes at which a GPU's products and casts go by the kernels that training uses."""
    if emulates("cuda"):
        pytest.skip("needs a GPU with float8 products")
    torch.manual_seed(0)
    built = mLSTMBlock(
        1024, mLSTMLayer(1024, 4, weight_mode=weight_mode), FeedForward(1024, 2752, weight_mode=weight_mode)
    )
    convert(built.to("cuda", torch.bfloat16).train(), config())
    x = torch.randn(2, 2048, 1024, device="cuda").bfloat16()
    layers = modules_one_by_one(monkeypatch, built, x)
    names = used(monkeypatch)
    got = gradients(built, x)
    assert names == ["run_mlstm", "run_feed_forward"]
    far = distances(got, layers)
    assert max(value for name, value in far.items() if not name.endswith("preact.bias")) < 0.08, far
    torch._dynamo.reset()
    compiled = distances(gradients(built, x, forward=torch.compile(built, fullgraph=True)), got)
    assert max(value for name, value in compiled.items() if not name.endswith("preact.bias")) < 0.05, compiled


@pytest.mark.skipif(emulates(), reason="torch < 2.13")
def test_one_graph(config, weight_mode):
    from torch._dynamo.backends.common import aot_autograd

    built = make_block(config(), torch.bfloat16, weight_mode)
    x = torch.randn(2, 16, HIDDEN).bfloat16()
    expected = gradients(built, x)
    calls = []

    def look(graph, inputs):
        calls.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    got = gradients(built, x, forward=torch.compile(built, fullgraph=True, backend=backend))
    forward, backward = (sum("scaled_mm" in call for call in graph) for graph in calls)
    assert (forward, backward) == (4, 8)  # of four layers, or groups of joined ones
    casts = [sum("float8_cast" in call for call in graph) for graph in calls]
    assert casts == [8, 12]  # forward rows and weights; backward each gradient once, weights, rows
    assert all(value == 0 for value in distances(got, expected).values())


def test_gradients_of_frozen_layers_are_not_made(config, weight_mode):
    built = make_block(config(emulate=True), torch.bfloat16, weight_mode)
    x = torch.randn(2, 16, HIDDEN).bfloat16()
    whole = gradients(built, x)
    for name, p in built.named_parameters():
        p.requires_grad_("norm" in name)
    got = gradients(built, x)
    assert torch.equal(got["x"], whole["x"])
    for name, g in got.items():
        assert (g is None) == (name not in ("x", "y") and "norm" not in name)


def _mixed(built, config):
    built.mlstm_layer.out_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)


def _other_recipe(built, config):
    built.mlstm_layer.out_proj = convert(
        nn.Sequential(nn.Linear(HIDDEN, HIDDEN, bias=False)), config("rowwise_with_gw_hp", emulate=True)
    )[0]


def _hook(built, config):
    built.mlstm_layer.out_proj.register_forward_hook(lambda *a: None)


def _backward_hook(built, config):
    built.mlstm_layer.out_proj.register_full_backward_hook(lambda *a: None)


@pytest.mark.parametrize("change", [_mixed, _other_recipe, _hook, _backward_hook])
def test_what_a_half_does_not_know_runs_layer_by_layer(config, change, monkeypatch):
    built = make_block(config(emulate=True))
    change(built, config)
    names = used(monkeypatch)
    gradients(built, torch.randn(2, 16, HIDDEN))
    assert names == ["run_feed_forward"]


@pytest.mark.parametrize(
    "recipe, options",
    [
        ("tensorwise", {}),
        ("rowwise_with_gw_hp", {}),
        ("rowwise", {"round_scales_to_power_of_2": False}),
        ("rowwise", {"pad_inner_dim": True}),
    ],
)
def test_other_configurations_run_layer_by_layer(config, recipe, options):
    built = make_block(config(recipe, emulate=True, **options))
    x = torch.randn(2, 16, HIDDEN)
    assert residual.mlstm_half(built, x) is None and residual.feed_forward_half(built, x) is None


@pytest.mark.skipif(emulates(), reason="torch < 2.13")
def test_scales_after_the_product(config, weight_mode, monkeypatch):
    """As on devices where torch's product with a scale for each row is slow."""
    built = make_block(config(), torch.bfloat16, weight_mode)
    x = torch.randn(2, 16, HIDDEN).bfloat16()
    expected = gradients(built, x)
    monkeypatch.setattr(products, "_scales_last", lambda device: True)
    shapes = []
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: (shapes.append(a[2].numel()), multiply(*a, **k))[1])
    far = distances(gradients(built, x), expected)
    assert all(value < 0.02 for name, value in far.items() if not name.endswith("preact.bias")), far
    assert shapes[:4] == [32] * 4 and shapes[4:] == [1] * 8  # fast sums forward
