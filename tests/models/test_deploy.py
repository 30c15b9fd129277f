"""Programs of the model and of the block stack: torch.export, AOTInductor in a fresh process, ONNX, torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from flash_xlstm.models import xLSTMForCausalLM, xLSTMLMModel, xLSTMLMModelConfig
from flash_xlstm.models.export import TensorModel
from flash_xlstm.reference.exported import decompose

SEQ = torch.export.Dim("seq", min=2, max=4096)
STACK = {
    "mlstm_block": {"mlstm": {"num_heads": 2}}, "slstm_block": {"slstm": {"num_heads": 2}, "feedforward": {}},
    "num_blocks": 2, "embedding_dim": 32, "slstm_at": [1], "vocab_size": 61,
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),  # torch's own use of a pytree class
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tensor_model(make_ours):
    """``tensor_model(device="cpu", **config)``: a TensorModel and its states after a few tokens."""

    def make(device="cpu", **config):
        model = TensorModel(make_ours(**{"hidden_size": 64, "num_hidden_layers": 1, **config}).to(device))
        states = model.initial_states(2)
        _, *states = model(torch.full((2, 5), 7, device=device), *states)
        return model, tuple(states)

    return make


def needs_compilers(device):
    """Inductor's compilations on the CPU take minutes, which CI has not."""
    if device == "cpu" and "FLASH_XLSTM_TEST_COMPILERS" not in os.environ:
        pytest.skip("takes minutes: make test-deploy")


def programs(model, ids, states):
    """For prompts of any length, and for a token."""
    shapes = {"input_ids": {1: SEQ}, "states": tuple(None for _ in states)}
    return (
        torch.export.export(model, (ids, *states), dynamic_shapes=shapes),
        torch.export.export(model, (ids[:, :1].contiguous(), *states)),
    )


def same(actual, expected, bound=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= bound * max(1.0, b.abs().max()), (a - b).abs().max()


def test_tensors_in_and_out(tensor_model, tokens):
    model, states = tensor_model(num_hidden_layers=2)
    ids, before = tokens(2, 9), [t.clone() for t in states]
    cache = model.model(torch.full((2, 5), 7)).cache_params
    expected = model.model(ids, cache_params=cache)
    logits, *after = model(ids, *states)
    assert torch.equal(logits, expected.logits)
    for a, b in zip(after, (t for state in cache.layer_states() for t in state), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
    one, *_ = model(ids[:, :1], *states)
    assert torch.allclose(one, logits[:, :1], atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


def test_errors_of_a_tensor_model(make_ours, tokens):
    with pytest.raises(TypeError, match="model is a Linear; it must be a "):
        TensorModel(torch.nn.Linear(2, 2))
    model = TensorModel(make_ours())
    with pytest.raises(ValueError, match="states has 3 tensors; it must have 6"):
        model(tokens(2, 3), *model.initial_states(2)[:3])
    with pytest.raises(ValueError, match="batch_size is -1; it must be at least 0"):
        model.initial_states(-1)
    with pytest.raises(TypeError, match="batch_size is '2'; it must be a whole number"):
        model.initial_states("2")
    with torch.enable_grad(), pytest.raises(RuntimeError, match="TensorModel has no gradient"):
        model(tokens(2, 3), *model.initial_states(2))


# --- torch's own operators ---


def test_decomposed_programs(tensor_model, tokens):
    model, states = tensor_model()
    ids, other = tokens(2, 9), tokens(2, 30, seed=1)
    for program, read in zip(programs(model, ids, states), (other, other[:, :1]), strict=True):
        plain = decompose(program)
        assert "flash_xlstm" in str(program.graph) and "flash_xlstm" not in str(plain.graph)
        before = [t.clone() for t in states]
        same(plain.module()(read, *states), model(read, *states))
        assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))


def test_only_a_program_is_decomposed():
    for wrong, name in ((None, "NoneType"), (torch.nn.Linear(2, 2), "Linear")):
        with pytest.raises(TypeError, match=f"program is of type {name}; it must be an ExportedProgram"):
            decompose(wrong)


def test_what_has_no_plain_form_is_told():
    class Cast(torch.nn.Module):
        def forward(self, x):
            return torch.ops.flash_xlstm.float8_cast([x], True, True)[1]

    program = torch.export.export(Cast(), (torch.randn(32, 32),))
    with pytest.raises(Exception, match="float8_cast, which has no plain form"):
        decompose(program)


class Stack(torch.nn.Module):
    """A block stack's language model with its states as tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, *states):
        if not states:
            logits, after = self.model(ids, return_last_state=True)
        else:
            state = torch.utils._pytree.tree_unflatten([t.clone() for t in states], self.spec)
            logits, after = self.model.step(ids, state)
        flat, self.spec = torch.utils._pytree.tree_flatten(after)
        return logits, *flat


def stack_programs(tokens):
    model = xLSTMLMModel(xLSTMLMModelConfig.from_dict(STACK)).eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.2)
    stack, ids = Stack(model), tokens(2, 7)
    _, *states = stack(ids)
    return stack, [
        (torch.export.export(stack, (ids,)), (tokens(2, 7, seed=1),)),
        (torch.export.export(stack, (ids[:, :1], *states)), (ids[:, 3:4], *states)),
    ]


def test_decomposed_programs_of_the_block_stack(tokens):
    stack, made = stack_programs(tokens)
    for program, given in made:
        plain = decompose(program)
        assert "flash_xlstm" in str(program.graph) and "flash_xlstm" not in str(plain.graph)
        same(plain.module()(*given), stack(*given))


# --- ONNX ---


@pytest.fixture
def onnx(tmp_path):
    """``onnx(program)``: a function of tensors that onnxruntime computes."""
    pytest.importorskip("onnxscript", reason="ONNX's packages are not installed: make test-deploy")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX's packages are not installed: make test-deploy")

    def make(program):
        path = tmp_path / "model.onnx"
        torch.onnx.export(decompose(program), dynamo=True, verbose=False).save(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]

        def run(*given):
            feeds = {name: t.numpy() for name, t in zip(names, given, strict=True)}
            return [torch.from_numpy(t) for t in session.run(None, feeds)]

        return run

    return make


@pytest.mark.filterwarnings("ignore")
def test_onnx(onnx, tensor_model, tokens):
    model, states = tensor_model(num_hidden_layers=2)
    ids, other = tokens(2, 9), tokens(2, 30, seed=1)
    prompt, step = map(onnx, programs(model, ids, states))
    same(prompt(other, *states), model(other, *states))
    same(prompt(ids, *states), model(ids, *states))
    same(step(ids[:, :1], *states), model(ids[:, :1], *states))


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_the_block_stack(onnx, tokens):
    stack, made = stack_programs(tokens)
    for program, given in made:
        same(onnx(program)(*given), stack(*given))


# --- AOTInductor ---

_FRESH = """
import sys
import torch
import flash_xlstm.ops

given = torch.load(sys.argv[1])
prompt, step = (torch._inductor.aoti_load_package(path) for path in sys.argv[2:4])
logits, *states = prompt(given["ids"], *given["states"])
outputs = [(logits, *states)]
for t in range(3):
    logits, *states = step(given["ids"][:, t : t + 1].contiguous(), *states)
    outputs.append((logits, *states))
torch.save(outputs, sys.argv[4])
assert "transformers" not in sys.modules
"""


@pytest.mark.slow
def test_aotinductor_in_a_fresh_process(tensor_model, tokens, tmp_path, device):
    needs_compilers(device)
    model, states = tensor_model(device)
    ids, other = tokens(2, 9).to(device), tokens(2, 30, seed=1).to(device)
    files = [tmp_path / "prompt.pt2", tmp_path / "step.pt2"]
    for program, path in zip(programs(model, ids, states), files, strict=True):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    torch.save({"ids": other, "states": states}, tmp_path / "given")
    command = [sys.executable, "-c", _FRESH, tmp_path / "given", *files, tmp_path / "out"]
    fresh = subprocess.run(command, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    outputs = torch.load(tmp_path / "out")
    expected = model(other, *states)
    same(outputs[0], expected, 1e-4 if device == "cuda" else 1e-5)
    for t in range(3):
        expected = model(other[:, t : t + 1], *expected[1:])
        same(outputs[t + 1], expected, 1e-4 if device == "cuda" else 1e-5)


# --- torch.compile ---

MODES = ["default", "reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_compile_modes(make_ours, tokens, device, mode):
    """Logits and gradients, and tokens read one by one from a cache."""
    needs_compilers(device)
    torch._dynamo.reset()
    model: xLSTMForCausalLM = make_ours(hidden_size=64, num_hidden_layers=1).to(device)
    ids = tokens(2, 9).to(device)
    bound = 1e-4 if device == "cuda" else 1e-5
    with torch.enable_grad():
        gradients = []
        for form in (model, torch.compile(model, mode=mode)):
            model.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            out = form(ids, labels=ids, skip_logits=False, use_cache=False)
            out.loss.backward()
            gradients.append([out.logits.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    same(gradients[1], gradients[0], bound)
    step, states = TensorModel(model), TensorModel(model).initial_states(2)
    compiled = torch.compile(step, mode=mode)
    for t in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        expected, actual = step(ids[:, t : t + 1], *states), compiled(ids[:, t : t + 1], *states)
        same(actual, expected, bound)
        states = tuple(state.clone() for state in actual[1:])
