"""accelerate(): models of other libraries, before, with and after it. Those that are not installed are skipped; `make
test-dropin` has them all."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import types

import pytest
import torch
from torch import nn

from flash_xlstm import reference
from flash_xlstm.integrations import _tirex, accelerate, undo
from flash_xlstm.nn import RMSNorm
from flash_xlstm.ops import linear

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of the packages
IDS = torch.randint(64, (2, 37), generator=torch.Generator().manual_seed(0))


def need(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-dropin")


def transformers_model(**options):
    transformers = pytest.importorskip("transformers")
    if importlib.util.find_spec("xlstm") is not None:
        need("mlstm_kernels")
    settings = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 16}
    return transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**{**settings, **options}))


def large_model(**options):
    need("xlstm", "mlstm_kernels")
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    settings = {
        "embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "vocab_size": 64, "chunk_size": 16, "mode": "inference",
        "return_last_states": True, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    }  # fmt: skip
    return xLSTMLarge(xLSTMLargeConfig(**{**settings, **options}))


def block_stack_model(**options):
    need("xlstm", "mlstm_kernels")
    from xlstm import (
        FeedForwardConfig,
        mLSTMBlockConfig,
        mLSTMLayerConfig,
        sLSTMBlockConfig,
        sLSTMLayerConfig,
        xLSTMLMModel,
        xLSTMLMModelConfig,
    )

    return xLSTMLMModel(
        xLSTMLMModelConfig(
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=4)),
            slstm_block=sLSTMBlockConfig(
                slstm=sLSTMLayerConfig(num_heads=4, backend="vanilla", **options),
                feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
            ),
            context_length=48, num_blocks=2, embedding_dim=32, slstm_at=[1], vocab_size=64,
        )
    )  # fmt: skip


def tirex2_model():
    need("tirex2", "flashrnn", "mlstm_kernels")
    from tirex2.model.tirex2 import TiRex2

    def block(kind):
        return {
            "time_mixer": {"model_type": kind, "embedding_dim": 32, "num_heads": 4},
            "variate_mixer": {"embedding_dim": 32, "num_heads": 4}, "dropout": 0.0, "eps": 1e-6,
        }  # fmt: skip

    return TiRex2(
        stack_config={"templates": {"m": block("bi-mlstm"), "s": block("bi-slstm")}, "recipe": ["m", "s"]},
        num_blocks=2, embedding_dim=32, input_patch_size=8, output_patch_size=8, quantiles=[0.1, 0.5, 0.9],
        tokenizer_cfg={"output_patch_size": 8, "input_patch_size": 8, "input_patch_stride": 8}, scaler_cfg={},
        h_expand=2, context_len=128, future_len=32, input_ff_dim=64, act_func="SiLU", dropout=0.0, device="cpu",
    )  # fmt: skip


def tirex_model():
    need("tirex", "sklearn")
    from tirex.models.tirex import TiRexZero

    settings = {
        "input_patch_size": 8, "output_patch_size": 8, "quantiles": [0.1, 0.5, 0.9], "input_ff_dim": 64,
        "block_kwargs": {"embedding_dim": 32, "num_heads": 4, "num_blocks": 2},
    }  # fmt: skip
    return TiRexZero("torch", settings, train_ctx_len=128)


def run_tirex2(model, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    batch = {
        "x": torch.randn(5, 160, generator=generator),
        "group_vector": torch.tensor([0, 0, 0, 1, 1]),
        "target_mask": torch.tensor([True, False, False, True, False]),
    }
    return model({key: t.to(device) for key, t in batch.items()})


def run_tirex(model):
    return model._forward_model(torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(2)))


MODELS = {
    "transformers": (transformers_model, lambda m, device="cpu": m(IDS.to(device), use_cache=False).logits, 2),
    "transformers, padding": (
        lambda: transformers_model(mode="train_with_padding", return_last_states=False).backbone.blocks[0].mlstm_layer,
        lambda m, device="cpu": m.mlstm_backend(*(t.to(device) for t in _cell_inputs())),
        1,
    ),
    "xlstm_large": (large_model, lambda m, device="cpu": m(IDS.to(device))[0], 2),
    "xlstm_large, fused": (lambda: large_model(weight_mode="fused"), lambda m, device="cpu": m(IDS.to(device))[0], 2),
    "xlstm_large, train": (lambda: large_model(mode="train"), lambda m, device="cpu": m(IDS[:, :32].to(device))[0], 2),
    "xlstm": (block_stack_model, lambda m, device="cpu": m(IDS.to(device)), 2),
    "tirex2": (tirex2_model, run_tirex2, 3),  # an mLSTM layer and its backend, an sLSTM layer
}


def _cell_inputs():
    """q, k, v, i, f of a backend."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 4, 37, 16)] * 2 + [(2, 4, 37, 32)] + [(2, 4, 37)] * 2
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.fixture
def make(randomize):
    return lambda name: (randomize(MODELS[name][0]()), MODELS[name][1], MODELS[name][2])


def _gradients(model, run):
    model.zero_grad()
    y = run(model)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.device)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name, make, agree):
    model, run, cells = make(name)
    weights = {key: t.clone() for key, t in model.state_dict().items()}
    before, gradients = _gradients(model, run)
    entries = [dict(module.__dict__) for module in model.modules()]
    with accelerate(model) as accelerated:
        assert len(accelerated.changed) == cells
        assert all(key in dict(model.named_modules()) for key in accelerated.changed)
        y, ours = _gradients(model, run)
        agree(y, before, "output")
        assert not torch.equal(y, before)  # by another way
        assert gradients.keys() == ours.keys() and (gradients or "padding" in name)
        for key, gradient in gradients.items():
            # A gate's bias gets a sum over tokens that may cancel: it is as exact as what its weight gets.
            of_weight = gradients.get(key.replace("preact.bias", "preact.weight"), gradient)
            larger = (of_weight.abs().max() / gradient.abs().max().clamp(min=1e-3)).clamp(1, 2).item()
            agree(ours[key], gradient, key, bound=1e-4 * larger)
        with torch.no_grad():
            agree(run(model), before, "output without gradients")
    assert [dict(module.__dict__) for module in model.modules()] == entries
    after, again = _gradients(model, run)
    assert torch.equal(after, before) and all(torch.equal(again[key], gradients[key]) for key in gradients)
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
    accelerated.undo()  # does nothing


def _prompt_and_token(model):
    """Logits of a prompt and of the token behind it, and the states after both."""
    prompt = model(IDS, use_cache=True)
    name = "cache" if hasattr(prompt, "cache") else "cache_params"  # older versions
    cache = getattr(prompt, name)
    states = [t.clone() for layer in cache.rnn_state.values() for t in layer]
    token = model(IDS[:, :1], use_cache=True, **{name: cache})
    return [prompt.logits, token.logits, *states, *(t for layer in cache.rnn_state.values() for t in layer)]


@torch.no_grad()
def test_generation_of_transformers(make, agree):
    model = make("transformers")[0].eval()
    before, sequence = _prompt_and_token(model), model.generate(IDS[:, :7], max_new_tokens=12, do_sample=False)
    with accelerate(model):
        for which, (mine, other) in enumerate(zip(_prompt_and_token(model), before, strict=True)):
            agree(mine, other, which)
        assert torch.equal(model.generate(IDS[:, :7], max_new_tokens=12, do_sample=False), sequence)


@torch.no_grad()
def test_bfloat16_is_at_least_as_near_to_float32(make):
    model = make("transformers")[0].eval()
    exact = _prompt_and_token(model)
    theirs = _prompt_and_token(model.bfloat16())
    with accelerate(model):
        ours = _prompt_and_token(model)
    for which, (mine, other, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        own = 1.1 * (other - right).norm() if which < 2 else 0.03 * right.norm()  # logits, and states, which are few
        assert (mine - right).norm() <= own <= 0.1 * right.norm(), which


@pytest.mark.parametrize("name", ["transformers", "xlstm_large", "xlstm", "tirex2"])
def test_compile(name, make, agree):
    model, run, _ = make(name)
    backend = "aot_eager"
    with torch.no_grad():
        before = run(model)
        with accelerate(model) as accelerated:
            for key in accelerated.changed:
                model.get_submodule(key).compile(backend=backend, fullgraph=True)
            agree(run(model), before, "output")
            for key in accelerated.changed:
                model.get_submodule(key)._compiled_call_impl = None
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["transformers", "xlstm", "tirex2"])
def test_copies(name, make, agree):
    """A copy's cells read the weights of the copy. `undo` restores it, and the model itself."""
    model, run, cells = make(name)
    with torch.no_grad():
        before = run(model)
        with accelerate(model) as accelerated:
            twins = [copy.deepcopy(model)]
            if name != "xlstm":  # whose cells do not load, accelerated or not
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                twins.append(torch.load(file, weights_only=False))
        for m in twins:
            for p in m.parameters():
                p.mul_(1.1)
            with pytest.raises(ValueError, match=r"is accelerated already. flash_xlstm\.integrations\.undo\(model\) "):
                accelerate(m)
            ours = run(m)
            assert undo(m) == accelerated.changed and len(accelerated.changed) == cells
            agree(ours, run(m))
            assert not torch.equal(ours, run(m)) and undo(m) == []
            accelerate(m).undo()
        with accelerate(model) as again:
            assert undo(model) == again.changed
            assert torch.equal(run(model), before)


def test_nothing_to_accelerate():
    with pytest.raises(ValueError, match=r"Linear has no cell .*\.xLSTMBackend, mlstm_kernels\."):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Sequential is made of this package's layers; it has nothing to accelerate"):
        accelerate(nn.Sequential(RMSNorm(2)))
    for function in (accelerate, undo):
        with pytest.raises(TypeError, match="model is of type int"):
            function(3)


def test_a_wrapped_model(make, agree):
    """TiRex-2's ForecastModel is no module, but passes attributes on."""
    model = make("tirex2")[0].eval()
    from tirex2 import TimeseriesType
    from tirex2.api_adapter.forecast import ForecastModel

    wrapper = ForecastModel(model)
    generator = torch.Generator().manual_seed(2)
    series = [
        TimeseriesType(target=torch.randn(1, 100, generator=generator), past_covariates=None, future_covariates=None)
    ]
    before = wrapper.forecast(series, prediction_length=20)
    with accelerate(wrapper) as accelerated:
        assert len(accelerated.changed) == 3
        agree(wrapper.forecast(series, prediction_length=20)[0], before[0])
        assert "forward" in model.stack[0].time_mixer.fwd_cell.mlstm_backend.__dict__


def test_refusals_change_nothing(make):
    model = make("transformers")[0]
    first, second = (block.mlstm_layer.mlstm_backend for block in model.backbone.blocks)
    second.forward = lambda *args: None
    with pytest.raises(ValueError, match=r"blocks\.1\.mlstm_layer\.mlstm_backend .*its forward has been replaced"):
        accelerate(model)
    assert "forward" not in first.__dict__
    del second.forward
    accelerated = accelerate(model)
    with pytest.raises(ValueError, match="its forward is accelerated already"):
        accelerate(model)
    ours = second.forward
    second.forward = lambda *args: None
    with pytest.raises(RuntimeError, match=r"mlstm_backend\.forward is not what accelerate set"):
        accelerated.undo()
    with pytest.raises(RuntimeError, match=r"mlstm_backend\.forward is not what accelerate set"):
        undo(model)
    assert "forward" in first.__dict__
    second.forward = ours
    accelerated.undo()
    with pytest.raises(RuntimeError, match="has been undone"), accelerated:
        pass
    for function in (accelerate, undo):
        with pytest.raises(TypeError, match=r"model is the class Linear; it must be .* an instance"):
            function(torch.nn.Linear)
    second.__class__ = type("Other", (type(second),), {"forward": lambda self: None})
    with pytest.raises(ValueError, match=r"mlstm_backend \(Other\): its class has another forward than"):
        accelerate(model)


def test_a_wrong_configuration_is_refused(make):
    model = make("transformers")[0]
    model.backbone.blocks[1].mlstm_layer.mlstm_backend.config = types.SimpleNamespace(
        mode="train", autocast_kernel_dtype="int8", inference_state_dtype="float32", chunkwise_kernel="",
        sequence_kernel="", step_kernel="",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"blocks\.1\..*: (autocast_kernel_dtype|chunkwise_kernel) is "):
        accelerate(model)


# Cells of xlstm


def test_steps_of_the_block_stack(make, agree):
    model = make("xlstm")[0]
    states = [None, None]
    with torch.no_grad():
        for t in range(6):
            token = IDS[:, t : t + 1]
            expected, states[0] = model.step(token, states[0])
            with accelerate(model):
                y, states[1] = model.step(token, states[1])
            agree(y, expected, t)
        theirs, ours = ([t for block in s.values() for x in block.values() for t in _tensors(x)] for s in states)
        for mine, other in zip(ours, theirs, strict=True):
            agree(mine, other, "state")


def _tensors(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def test_steps_of_the_mlstm_cell_have_gradients(make, agree):
    """The package's own steps have no backward. They are compared with its sequence."""
    cell = make("xlstm")[0].xlstm_block_stack.blocks[0].xlstm.mlstm_cell
    sequence = torch.randn(3, 2, 4, 64, generator=torch.Generator().manual_seed(2))  # q, k, v

    def steps(cell):
        state, outputs = None, []
        for t in range(sequence.shape[2]):
            y, state = cell.step(*sequence[:, :, t : t + 1], state)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    before, gradients = _gradients(cell, lambda cell: cell(*sequence))
    with accelerate(cell):
        y, ours = _gradients(cell, steps)
    agree(y, before)
    for key, gradient in gradients.items():
        agree(ours[key], gradient, key, bound=1e-3)  # behind the norm the input gate's gradients nearly cancel


SHAPES = [("BSGNH", "BNSH"), ("SBGNH", "SBNH"), ("BSGNH", "BSH"), ("SBGNH", "SBH")]


def slstm_cells(**options):
    """xlstm's vanilla cell and its cuda cell, without the latter's kernels, with the same weights."""
    need("xlstm", "mlstm_kernels")
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla, sLSTMCellConfig

    cells = [
        kind(sLSTMCellConfig(hidden_size=24, num_heads=3, dtype="float32", **options), skip_backend_init=True)
        for kind in (sLSTMCell_vanilla, sLSTMCell_cuda)
    ]
    generator = torch.Generator().manual_seed(1)
    R, b = torch.randn(3, 8, 4, 8, generator=generator) * 0.5, torch.randn(3, 4, 8, generator=generator)
    for cell in cells:
        cell.recurrent_kernel[:], cell.bias[:] = R, b
    return cells


@pytest.mark.parametrize(("input_shape", "output_shape"), SHAPES)
def test_slstm_cells(input_shape, output_shape, agree):
    vanilla, cuda = slstm_cells(input_shape=input_shape, output_shape=output_shape)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*((2, 9) if input_shape[0] == "B" else (9, 2)), 96, generator=generator)
    state = torch.randn(4, 2, 24, generator=generator)
    state[2] = state[2].abs() + 1
    for given in (None, state):
        y, last = vanilla(x, given)
        for cell in (vanilla, cuda):
            with accelerate(cell), torch.no_grad():
                ours, our_last = cell(x, given)
                agree(ours, y, output_shape)
                agree(our_last, last, "state")
                if given is not None:  # one token, another kernel
                    first = x[:, :1] if input_shape[0] == "B" else x[:1]
                    with torch.enable_grad():
                        expected = vanilla(first, given) if cell is cuda else None
                    if expected is not None:
                        agree(cell(first, given)[0], expected[0].detach(), "token")


def test_refused_slstm_cells():
    vanilla, _ = slstm_cells(function="slstm")
    vanilla.config.function = "lstm"
    with pytest.raises(ValueError, match="its function is 'lstm'"):
        accelerate(vanilla)
    for options in ({"gradient_recurrent_clipval": 0.5}, {"constants": {"X": 1.0}}):
        vanilla, cuda = slstm_cells(**options)
        accelerate(vanilla)  # its package ignores the option
        with pytest.raises(ValueError, match=rf"its {next(iter(options))} "):
            accelerate(cuda)


def test_clipped_gradients_of_the_cuda_cell():
    _, cuda = slstm_cells(gradient_recurrent_cut=True)
    x = torch.randn(1, 5, 96, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with accelerate(cuda):
        (cut,) = torch.autograd.grad(cuda(x)[0][:, :, -1, :].sum(), x)
        cuda.config.gradient_recurrent_cut = False
        (whole,) = torch.autograd.grad(cuda(x)[0][:, :, -1, :].sum(), x)
    assert torch.equal(cut[:, -1], whole[:, -1]) and not torch.allclose(cut[:, :-1], whole[:, :-1])


def test_other_backends_of_the_mlstm_cell_are_refused(make):
    model = make("xlstm")[0]
    cell = model.xlstm_block_stack.blocks[0].xlstm.mlstm_cell
    with accelerate(model), pytest.raises(ValueError, match="its backend_fn is accelerated already"):
        accelerate(cell)
    cell.backend_fn = lambda **kwargs: None
    with pytest.raises(ValueError, match=r"mlstm_cell \(mLSTMCell\): its backend_fn is .*; it must be parallel_stab"):
        accelerate(model)


# mlstm_kernels' backend


@pytest.mark.parametrize("kernel", ["parallel--native_siging_autograd", "parallel--native_autograd"])
@pytest.mark.parametrize("normalize", [True, False])
def test_kernels_of_a_backend(kernel, normalize, agree):
    need("mlstm_kernels")
    from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

    backend = mLSTMBackend(
        # parallel kernels without a sigmoid start at m of minus infinity instead of 0, which moves eps's part of h
        mLSTMBackendConfig(
            kernel, return_last_states=False, normalize_siging=normalize, eps=1e-3 if "siging" in kernel else 1e-6
        )
    )
    inputs = _cell_inputs()
    y = backend(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad(y, inputs, dy)
    with accelerate(backend) as accelerated:
        assert accelerated.changed == [""]
        ours = backend(*inputs)
        agree(ours, y, kernel, bound=1e-5)
        for name, mine, other in zip("qkvif", torch.autograd.grad(ours, inputs, dy), gradients, strict=True):
            agree(mine, other, name, bound=1e-4)


def test_a_sigmoid_gate_has_no_inference_mode():
    need("mlstm_kernels")
    from mlstm_kernels.torch.backend_module import mLSTMBackend, mLSTMBackendConfig

    config = mLSTMBackendConfig("parallel--native_siging_autograd", return_last_states=False)
    backend = mLSTMBackend(config)
    with accelerate(backend), pytest.raises(ValueError, match=r"mode is 'inference' with .*siging"):
        backend(*_cell_inputs(), mode="inference")
    config.mode = "inference"
    with pytest.raises(ValueError, match=r"mode is 'inference' with .*siging"):
        accelerate(backend)


# TiRex


def test_tirex_is_at_least_as_near_to_float64(make_tirex):
    """TiRex rounds every state to bfloat16, so that its own error is the measure."""
    model = make_tirex
    cell = model.blocks[0].slstm_layer.slstm_cell
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 40, 128, generator=generator)
    state = torch.randn(4, 3, 32, generator=generator)
    state[2] = state[2].abs() + 1
    wide = x.bfloat16().double().view(3, 40, 4, 4, 8)
    R = cell._recurrent_kernel_.double().view(4, 8, 4, 8).permute(2, 0, 3, 1)
    b = cell._bias_.double().view(4, 4, 8).transpose(0, 1)
    for given in (None, state):
        initial = None if given is None else tuple(given.bfloat16().double().view(4, 3, 4, 8))
        h, last = reference.slstm(wide, R, b, initial_state=initial, return_final_state=True)
        expected = h.transpose(1, 2), torch.stack(last).flatten(2)
        theirs = cell(x, given)
        with accelerate(model):
            ours = cell(x, given if given is None else given.bfloat16().float())
        for mine, other, exact in zip(ours, theirs, expected, strict=True):
            assert mine.shape == other.shape and mine.dtype == other.dtype
            assert (mine - exact).abs().max() <= (other - exact).abs().max() <= 0.1 * exact.abs().max()
            assert (mine - exact).abs().max() <= 5e-3 * exact.abs().max()


@pytest.fixture
def make_tirex(randomize):
    return randomize(tirex_model())


def test_tirex_trains(make_tirex):
    model = make_tirex
    before, gradients = _gradients(model, run_tirex)
    with accelerate(model) as accelerated, _whole_layers(True):
        assert len(accelerated.changed) == 4  # layers and their cells
        y, ours = _gradients(model, run_tirex)
        with torch.no_grad():
            assert (run_tirex(model) - y).norm() <= 1e-6 * y.norm()
    assert (y - before).norm() < 2e-2 * before.norm() and gradients.keys() == ours.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() < 5e-2 * gradient.norm(), name
    assert torch.equal(_gradients(model, run_tirex)[0], before)


def test_states_of_tirex2(make, agree):
    model = make("tirex2")[0]
    layer = model.stack[1].time_mixer.fwd_cell
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2))
    for gradients in (torch.no_grad, contextlib.nullcontext):
        state = our_state = None
        for t in range(6):
            with gradients():
                y, state = layer.step(x[:, t : t + 1], slstm_state=(state or {}).get("slstm_state"))
                with accelerate(model):
                    ours, our_state = layer.step(x[:, t : t + 1], slstm_state=(our_state or {}).get("slstm_state"))
            agree(ours, y, t)
            agree(our_state["slstm_state"], state["slstm_state"], t)


# TiRex-2's layers as a whole


@pytest.fixture
def layers(make):
    """The mLSTM and the sLSTM layer."""
    return {name: block.time_mixer.fwd_cell for name, block in zip("ms", make("tirex2")[0].stack, strict=True)}


def _series(rows=5, dtype=torch.float32):
    return torch.randn(rows, 64, 32, generator=torch.Generator().manual_seed(2)).to(dtype)


@contextlib.contextmanager
def _whole_layers(expected):
    """Whether calls within take a whole layer: all, or none."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        find = _tirex._parameters

        def spy(*args, **kwargs):
            taken.append(find(*args, **kwargs))
            return taken[-1]

        patch.setattr(_tirex, "_parameters", spy)
        yield
    assert taken and all((t is not None) == expected for t in taken)


@pytest.mark.parametrize("kind", "ms")
def test_rows_in_pieces(kind, layers, agree, monkeypatch):
    layer, x = layers[kind], _series(7).requires_grad_()
    monkeypatch.setattr(_tirex, "_SLSTM_ROWS", 2)
    monkeypatch.setattr(_tirex, "_TOKENS", 128)
    assert [len(piece) for piece, _ in _tirex._pieces(x, x, 2)] == [3, 3, 1]
    with torch.no_grad():
        expected = layer(x)
        with accelerate(layer), _whole_layers(True):
            y, strided = layer(x), layer(x.mT.contiguous().mT)
            agree(y, expected)
            agree(strided, y)  # a BLAS may sum the products of another layout in another order
            assert torch.equal(layer(x[3:6]), y[3:6])


@pytest.mark.parametrize("kind", "ms")
def test_only_some_gradients_of_a_layer(kind, layers, agree):
    layer = layers[kind]
    names = [name for name, _ in layer.named_parameters()]
    for wanted in ({"x"}, {names[0]}, {names[-1], "x"}, {"igate.weight", "igate_preact.bias"}, set(names[1:])):
        for name, p in layer.named_parameters():
            p.requires_grad_(name in wanted)
        x = _series().requires_grad_("x" in wanted)
        before, gradients = _gradients(layer, lambda layer, x=x: layer(x))
        dx, x.grad = x.grad, None
        with accelerate(layer), _whole_layers(True):
            y, ours = _gradients(layer, lambda layer, x=x: layer(x))
        agree(y, before)
        assert ours.keys() == gradients.keys() == wanted & set(names)
        for key, gradient in gradients.items():
            agree(ours[key], gradient, key, bound=1e-4)
        assert (dx is None) == (x.grad is None)
        if dx is not None:
            agree(x.grad, dx, "x", bound=1e-4)


@pytest.mark.parametrize("kind", "ms")
def test_a_layer_in_16_bits_is_at_least_as_near_to_float32(kind, layers):
    layer, x = layers[kind].bfloat16(), _series(dtype=torch.bfloat16)
    exact = copy.deepcopy(layer).float()(x.float())
    theirs = layer(x)
    with accelerate(layer), _whole_layers(True):
        ours, without = layer(x), torch.no_grad()(layer)(x)
    for mine in (ours, without):
        assert mine.dtype == theirs.dtype
        assert (mine - exact).norm() <= 1.1 * (theirs - exact).norm() <= 0.1 * exact.norm()


def test_a_layer_is_at_least_as_near_to_float64(layers, monkeypatch):
    """With its products on AMX tiles, where this machine has them."""
    layer, x, taken = layers["m"], _series(9).requires_grad_(), []
    products = linear._float_products
    monkeypatch.setattr(linear, "_float_products", lambda *args: taken.append(products(*args)) or taken[-1])

    def results(layer, x):
        y, gradients = _gradients(layer, lambda layer: layer(x))
        return {"y": y, "x": x.grad, **gradients}

    theirs = results(layer, x)
    exact = results(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    twin = copy.deepcopy(layer)
    accelerate(twin)
    ours = results(twin, x.detach().requires_grad_())
    with torch.no_grad():
        assert torch.equal(twin(x), ours["y"])
    for name in exact.keys() - {"igate_preact.bias"}:  # a sum that cancels
        near, nearer = ((t[name] - exact[name]).norm() for t in (theirs, ours))
        assert nearer <= (1.0 if linear._TILES else 1.5) * near, name
    assert taken == ([True] * 7 if linear._TILES else [])
    x = x.detach()
    x[4, 3, 2] = torch.inf
    with torch.no_grad():
        got = twin(x)
        monkeypatch.setattr(linear, "_TILES", False)
        assert torch.equal(got.nan_to_num(7.0), twin(x).nan_to_num(7.0)) and got.isnan().any()


PARTS = {
    "m": ["", "q", "ogate_preact", "igate_preact", "out_proj", "multihead_norm", "mlstm_backend", "ogate_act_fn"],
    "s": ["", "fgate", "ogate", "group_norm", "dropout"],
    "tirex": ["", "zgate", "group_norm", "slstm_cell"],
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the backend's inputs are keywords
@pytest.mark.parametrize("how", ["forward hook", "backward hook", "parametrization", "subclass", "forward"])
@pytest.mark.parametrize("kind", PARTS)
def test_what_a_layer_has_beside_its_weights_still_runs(kind, how, layers, make_tirex, agree, monkeypatch):
    monkeypatch.setattr(_tirex, "_SLSTM_ROWS", 1)
    monkeypatch.setattr(_tirex, "_TOKENS", 64)
    original = make_tirex.blocks[0].slstm_layer if kind == "tirex" else layers[kind]
    x, parts = _series(), PARTS[kind][how != "parametrization" :]
    for name in parts:
        layer, calls = copy.deepcopy(original), []
        accelerate(layer)
        part = layer.get_submodule(name)
        if how == "forward hook":
            part.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        elif how == "backward hook":
            part.register_full_backward_pre_hook(lambda *args, calls=calls: calls.append(1))
        elif how == "parametrization":
            weight = next((weight for weight, _ in part.named_parameters(recurse=False)), None)
            if weight is None:
                continue
            torch.nn.utils.parametrize.register_parametrization(part, weight, _Counted(calls))
        elif how == "subclass":
            part.__class__ = type("Other", (type(part),), {"forward": _counting(type(part).forward, calls)})
            part.__dict__.pop("forward", None)
        else:
            own = part.forward
            part.forward = lambda *args, own=own, calls=calls, **kwargs: calls.append(1) or own(*args, **kwargs)
        layer(x.requires_grad_()).sum().backward()
        assert calls, name
        with torch.no_grad():
            agree(layer(x), original(x), name, bound=2e-2 if kind == "tirex" else 1e-5)
        assert how != "forward hook" or len(calls) == 2, name  # with all rows at once


class _Counted(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, p):
        self.calls.append(1)
        return p


def _counting(forward, calls):
    return lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs)


@pytest.mark.parametrize("kind", "ms")
def test_other_calls_take_the_layers_own_forward(kind, layers, agree):
    layer, x = layers[kind], _series()
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with accelerate(layer), _whole_layers(False):
            agree(layer(x), expected, "autocast", bound=0.1)
    with accelerate(layer), _whole_layers(False):
        weights = {name: p.detach() for name, p in layer.named_parameters()}
        jacobian = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).sum())(weights)
        dx = torch.func.grad(lambda x: layer(x).sum())(x)
    layer(x.requires_grad_()).sum().backward()
    for name, p in layer.named_parameters():
        agree(jacobian[name], p.grad, name, bound=1e-4)
    agree(dx, x.grad, bound=1e-4)
    other = copy.deepcopy(layer)
    other.__class__ = type("Other", (type(other),), {})
    with accelerate(other) as accelerated:
        assert ("" in accelerated.changed) == (kind == "s")  # its op alone
        assert "forward" not in other.__dict__
        agree(other(x), layer(x))


def test_dropout_in_a_layer(layers, agree):
    layer, x = copy.deepcopy(layers["s"]), _series()
    layer.dropout.p = 1.0
    with accelerate(layer), _whole_layers(True):
        assert not layer(x).any() and not torch.no_grad()(layer)(x).any()
        agree(layer.eval()(x), layers["s"](x))


def test_a_layer_with_other_settings_keeps_its_forward(layers, agree):
    layer, x, calls = layers["s"], _series(), []
    accelerate(layer)
    op = layer.slstm_flashrnn
    layer.slstm_flashrnn = lambda *args: calls.append(1) or op(*args)
    layer(x)
    assert calls
    layer = layers["m"]
    for name in ("q", "out_proj"):
        twin = copy.deepcopy(layer)
        part = twin.get_submodule(name)
        part.bias = nn.Parameter(torch.randn(part.out_features))
        expected = twin(x)
        with accelerate(twin), _whole_layers(False):
            agree(twin(x), expected, name)
    layer.config.gate_soft_cap = None
    expected = layer(x)
    with accelerate(layer), _whole_layers(True):
        agree(layer(x), expected, "no cap")
        layer.mlstm_backend.config.return_last_states = True
        with pytest.raises(AttributeError):  # as in the original, which expects a tensor
            layer(x)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda(name, make, agree):
    """Beside the originals' plain PyTorch code on the GPU, in float32."""
    model, run, _ = make(name)
    model.cuda()
    before, gradients = _gradients(model, lambda m: run(m, "cuda"))
    with accelerate(model):
        y, ours = _gradients(model, lambda m: run(m, "cuda"))
        with torch.no_grad():
            agree(run(model, "cuda"), before, "output without gradients", bound=1e-4)
    agree(y, before, "output", bound=1e-4)
    for key, gradient in gradients.items():
        agree(ours[key], gradient, key, bound=1e-3)


@pytest.mark.cuda
def test_triton_kernels_of_xlstm_large(randomize):
    """Beside the package's own kernels, in bfloat16: at least as near to float32 as they are."""
    triton = {"chunkwise_kernel": "chunkwise--triton_xl_chunk", "sequence_kernel": "native_sequence__triton"}
    model = randomize(large_model(**triton, step_kernel="triton", embedding_dim=256, chunk_size=64)).cuda()
    exact = randomize(large_model(embedding_dim=256, chunk_size=64)).cuda()
    ids = torch.randint(64, (2, 256), generator=torch.Generator().manual_seed(0)).cuda()

    @torch.no_grad()
    def logits(model):
        y, state = model(ids)
        return torch.cat([y, *(model(ids[:, t : t + 1], state)[0] for t in range(3))], dim=1).float()

    right = logits(exact)
    with torch.autocast("cuda", torch.bfloat16):
        theirs = logits(model)
        with accelerate(model):
            ours = logits(model)
    assert (ours - right).norm() <= 1.1 * (theirs - right).norm() <= 0.1 * right.norm()
