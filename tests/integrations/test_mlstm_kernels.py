"""The names of mlstm_kernels: against the reference, and, where that package is installed, beside it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect

import pytest
import torch

from flash_xlstm import ops, reference
from flash_xlstm.integrations import mlstm_kernels as ours

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("mlstm_kernels") is None, reason="mlstm_kernels is not installed: make test-dropin"
)


@pytest.fixture
def inputs():
    """q, k, v, i, f, c, n, m; float32, heads first."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 32, 8)] * 2 + [(2, 3, 32, 16)] + [(2, 3, 32)] * 2 + [(2, 3, 8, 16), (2, 3, 8), (2, 3, 1)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def _reference(q, k, v, i, f, c, n, m, **options):
    """The mLSTM in float64 in this layout, and its states."""
    q, k, v, i, f = (t.double().transpose(1, 2) for t in (q, k, v, i, f))
    h, (c, n, m) = reference.mlstm_recurrent(
        q,
        k,
        v,
        i,
        f,
        initial_state=(c.double(), n.double(), m.double().squeeze(-1)),
        return_final_state=True,
        **options,
    )
    return h.transpose(1, 2), c, n, m.unsqueeze(-1)


@pytest.mark.parametrize("name", [name for name in ours.get_available_mlstm_kernels() if "siging" not in name])
def test_kernels(name, inputs, agree):
    h, states = ours.get_mlstm_kernel(name)(*inputs, True, 1e-3)
    expected = _reference(*inputs, eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator) for t in expected]
    gradients = torch.autograd.grad((h, *states), inputs, weights)
    exact = torch.autograd.grad(expected, inputs, [w.double() for w in weights])
    for what, mine, right in zip("hcnm", (h, *states), expected, strict=True):
        agree(mine.double(), right, what)
    for what, mine, right in zip("qkvifcnm", gradients, exact, strict=True):
        agree(mine, right, what, bound=1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_kernels(normalize, inputs, agree):
    q, k, v, i, f, c, n, m = inputs
    for name in ours.get_available_mlstm_kernels():
        if "siging" not in name:
            continue
        h, (c_last, n_last) = ours.get_mlstm_kernel(name)(
            q, k, v, i, f, c, n, m, return_last_states=True, normalize=normalize, eps=1e-3
        )
        wide = [t.double().transpose(1, 2) for t in (q, k, v, i, f)]
        state = (c.double(), n.double() if normalize else None)
        right, last = reference.mlstm_sig_recurrent(
            *wide, normalize=normalize, initial_state=state, eps=1e-3, return_final_state=True
        )
        agree(h.double(), right.transpose(1, 2), name)
        agree(c_last.double(), last[0], name)
        assert (n_last is None) is not normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_and_sequences(dtype, inputs, agree):
    inputs = [t.detach() for t in inputs]
    kept = [t.clone() for t in inputs]
    step = ours.get_mlstm_step_kernel("triton")
    sequence = ours.get_mlstm_sequence_kernel("native_sequence__triton")
    *xs, c, n, m = inputs
    states, outputs = (c, n, m), []
    for t in range(32):
        q, k, v = (x[:, :, t] for x in xs[:3])
        h, states = step(q, k, v, xs[3][..., t : t + 1], xs[4][..., t : t + 1], *states, dtype_state=dtype)
        assert all(s.dtype == dtype for s in states)
        outputs.append(h)
    expected, *right = _reference(*inputs)
    bound = 1e-5 if dtype == torch.float32 else 0.1
    h, last = sequence(*inputs, return_last_states=True, dtype_state=dtype)
    agree(h.double(), expected, "sequence")
    agree(torch.stack(outputs, dim=2).double(), expected, "steps", bound)
    for mine, whole, exact in zip(states, last, right, strict=True):
        agree(mine.double(), exact, "steps", bound)
        agree(whole.double(), exact, "sequence", 1e-5 if dtype == torch.float32 else 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True))


def test_a_step_has_gradients(inputs, agree):
    q, k, v, i, f, c, n, m = inputs
    arguments = [q[:, :, 0], k[:, :, 0], v[:, :, 0], i[..., :1], f[..., :1], c, n, m]
    h, states = ours.mlstm_step(*arguments)
    expected = _reference(q[:, :, :1], k[:, :, :1], v[:, :, :1], i[..., :1], f[..., :1], c, n, m)
    mine = torch.autograd.grad(h.sum() + states[0].sum(), inputs)
    exact = torch.autograd.grad(expected[0].sum() + expected[1].sum(), inputs)
    for name, a, b in zip("qkvifcnm", mine, exact, strict=True):
        agree(a, b, name, bound=1e-4)


def test_backend(inputs, agree):
    *xs, c, n, m = [t.detach() for t in inputs]
    expected, *_ = _reference(*xs, c, n, m)
    backend = ours.mLSTMBackend(ours.mLSTMBackendConfig(mode="inference", inference_state_dtype="bfloat16"))
    h, states = backend(*xs, c_initial=c, n_initial=n, m_initial=m)
    agree(h.double(), expected)
    assert [t.dtype for t in states] == [torch.bfloat16] * 3
    h, states = backend(*(x[:, :, :1] for x in xs), c, n, m)
    agree(h.double(), expected[:, :, :1], bound=2e-2)
    assert [t.dtype for t in states] == [torch.bfloat16] * 3 and states[2].shape == m.shape
    h = backend(*xs, mode="train", return_last_states=False)
    assert h.shape == expected.shape
    fresh = backend(*(x[:, :, :1] for x in xs))  # without states
    agree(fresh[0], h[:, :, :1])
    assert "bfloat16" in repr(backend)


@torch.no_grad()
def test_steps_compile(inputs, agree):
    backend = ours.mLSTMBackend(ours.mLSTMBackendConfig(mode="inference"))
    q, k, v, i, f, *states = (t.detach() for t in inputs)
    arguments = [*(t[:, :, :1] for t in (q, k, v, i, f)), *states]
    kept = [t.clone() for t in states]
    compiled = torch.compile(backend, backend="aot_eager", fullgraph=True)
    h, last = compiled(*arguments)
    expected, right = backend(*arguments)
    for mine, other in zip((h, *last), (expected, *right), strict=True):
        agree(mine, other)
    assert all(torch.equal(a, b) for a, b in zip(states, kept, strict=True))
    torch._dynamo.reset()


def test_autocast(inputs):
    xs = [t.detach() for t in inputs[:5]]
    kernel = ours.get_mlstm_kernel("chunkwise--triton_xl_chunk")
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel(*xs).dtype == torch.float32  # the kernel's own default
        assert kernel(*xs, autocast_kernel_dtype=torch.float16).dtype == torch.float16
    assert kernel(*xs, autocast_kernel_dtype=torch.float16).dtype == torch.float32


@pytest.mark.parametrize(("recompute", "keeps"), [(None, True), (False, True), (True, False)])
def test_recomputed_states_are_not_kept(monkeypatch, inputs, recompute, keeps):
    """Left out, it does not have the other package's default, which is True."""
    found, given = [], {} if recompute is None else {"recompute_states_in_bw": recompute}
    for name in ("mlstm", "mlstm_sig"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, **o: found.append(o["keep_states"]) or op(*args, **o))
    *xs, c, n, m = inputs
    ours.mlstm_exponential(*xs, **given)
    ours.mlstm_sigmoid(*xs, **given)
    ours.mlstm_sequence(*xs, **given)
    ours.mlstm_step(*(x[:, :, 0] for x in xs[:3]), *(x[:, :, :1] for x in xs[3:]), c, n, m, **given)
    with torch.autocast("cpu", torch.bfloat16):
        ours.mlstm_exponential(*xs, **given)
    assert found == [keeps] * 5


def test_refusals(inputs):
    xs = [t.detach() for t in inputs]
    kernel = ours.get_mlstm_kernel("chunkwise--triton_xl_chunk")
    kernel(*xs, chunk_size_inter=64, num_warps_intra=4)
    with pytest.raises(TypeError, match="chunk_sise is no argument"):
        kernel(*xs, chunk_sise=64)
    for name, x in zip("if", xs[3:5], strict=True):
        wrong = dict(zip("qkvif", xs[:5], strict=True)) | {name: x[..., None]}
        with pytest.raises(ValueError, match=rf"{name} has shape .*, 1\); it must be \(batch, heads, seq\), as q"):
            kernel(**wrong)
    with pytest.raises(TypeError, match="recompute_states_in_bw is None; it must be True or False"):
        kernel(*xs, recompute_states_in_bw=None)
    with pytest.raises(ValueError, match="n_initial is None"):
        kernel(*xs[:6])
    with pytest.raises(ValueError, match="c_initial is None"):
        ours.mlstm_sigmoid(*xs[:5], None, xs[6])
    for get in (ours.get_mlstm_kernel, ours.get_mlstm_sequence_kernel, ours.get_mlstm_step_kernel):
        with pytest.raises(ValueError, match=r"name is 'fast'; it must be one of .*native"):
            get("fast")
    for field, value in {"mode": "eval", "step_kernel": "x", "autocast_kernel_dtype": "float64"}.items():
        with pytest.raises(ValueError, match=f"{field} is '{value}'"):
            ours.mLSTMBackendConfig(**{field: value})
    with pytest.raises(ValueError, match="mode is 'inference' with chunkwise_kernel"):
        ours.mLSTMBackendConfig("chunkwise--triton_xl_chunk_siging", mode="inference")
    for mode in ("step", "retrained", ""):
        with pytest.raises(ValueError, match=f"mode is '{mode}'; it must be one of train, train_with_padding, inf"):
            ours.mLSTMBackend(ours.mLSTMBackendConfig())(*xs[:5], mode=mode)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"eps": "x"}, TypeError, "eps is 'x'; it must be a number"),
        ({"eps": -1e-6}, ValueError, "eps is -1e-06; it must be at least 0, and finite"),
        ({"eps": float("nan")}, ValueError, "eps is nan; it must be at least 0, and finite"),
        ({"chunk_size": -1}, ValueError, "chunk_size is -1; it must be at least 1"),
        ({"chunk_size": 64.0}, TypeError, "chunk_size is 64.0; it must be a whole number"),
        ({"return_last_states": 2}, TypeError, "return_last_states is 2; it must be True or False"),
        ({"normalize_siging": None}, TypeError, "normalize_siging is None; it must be True or False"),
    ],
    ids=str,
)
def test_values_of_a_configuration(settings, error, message):
    with pytest.raises(error, match=message):
        ours.mLSTMBackendConfig(**settings)


def test_errors_name_the_arguments(inputs):
    xs = dict(zip(("q", "k", "v", "i", "f", "c_initial", "n_initial", "m_initial"), inputs, strict=True))
    xs = {name: t.detach() for name, t in xs.items()}
    backend = ours.mLSTMBackend(ours.mLSTMBackendConfig())
    for run in (ours.mlstm_exponential, ours.mlstm_sigmoid, ours.mlstm_sequence, backend):
        for wrong in (2, "x"):
            with pytest.raises(TypeError, match=f"^return_last_states is {wrong!r}; it must be True or False"):
                run(**xs, return_last_states=wrong)
        for name in "qkvif":
            for wrong in (None, [1.0], xs[name].numpy()):
                with pytest.raises(TypeError, match=f"^{name} is .*; it must be a tensor"):
                    run(**xs | {name: wrong})
        with pytest.raises(TypeError, match=r"^c_initial is of type ndarray; it must be a tensor or None"):
            run(**xs | {"c_initial": xs["c_initial"].numpy()})
    step = {name[0]: t[:, :, 0] if name in "qkv" else t[:, :, :1] if name in "if" else t for name, t in xs.items()}
    ours.mlstm_step(**step)
    for name in step:
        for wrong in (None, step[name].numpy()):
            with pytest.raises(TypeError, match=f"^{name} is .*; it must be a tensor"):
                ours.mlstm_step(**step | {name: wrong})


@needs_package
def test_names_and_signatures():
    theirs = importlib.import_module("mlstm_kernels.torch")
    module = importlib.import_module("mlstm_kernels.torch.backend_module")
    for kind in ("", "_sequence", "_step"):
        names = getattr(ours, f"get_available_mlstm{kind}_kernels")()
        assert set(names) >= set(getattr(theirs, f"get_available_mlstm{kind}_kernels")())
        for name in getattr(theirs, f"get_available_mlstm{kind}_kernels")():
            mine, other = (inspect.signature(getattr(x, f"get_mlstm{kind}_kernel")(name)) for x in (ours, theirs))
            for argument, parameter in other.parameters.items():
                if argument in mine.parameters and argument not in ("chunk_size", "autocast_kernel_dtype"):
                    assert mine.parameters[argument].default == parameter.default, (name, argument)
                elif parameter.kind is not parameter.VAR_KEYWORD and argument not in mine.parameters:
                    assert argument in ours._LAUNCH, (name, argument)
            first = 8 if kind == "_step" else 10  # in the same order
            assert list(mine.parameters)[:first] == list(other.parameters)[:first], name
    signature = lambda f: [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]  # noqa: E731
    assert signature(ours.mLSTMBackend.forward) == signature(module.mLSTMBackend.forward)
    fields = lambda c: [(f.name, f.default) for f in dataclasses.fields(c)]  # noqa: E731
    assert fields(ours.mLSTMBackendConfig) == fields(module.mLSTMBackendConfig)
    for name in ("ChunkwiseKernelType", "SequenceKernelType", "StepKernelType", "DtypeType", "BackendModeType"):
        assert getattr(ours, name) == getattr(module, name)


@needs_package
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_beside_the_package(mode, inputs, agree):
    module = importlib.import_module("mlstm_kernels.torch.backend_module")
    settings = {"mode": mode, "chunk_size": 16, "eps": 1e-3}
    mine = ours.mLSTMBackend(ours.mLSTMBackendConfig(**settings))(*inputs)
    other = module.mLSTMBackend(module.mLSTMBackendConfig(**settings))(*inputs)
    for name, a, b in zip("hcnm", (mine[0], *mine[1]), (other[0], *other[1]), strict=True):
        agree(a, b, name)
    weights = torch.randn(mine[0].shape, generator=torch.Generator().manual_seed(1))
    for name, a, b in zip(
        "qkvifcnm",
        torch.autograd.grad(mine[0], inputs, weights),
        torch.autograd.grad(other[0], inputs, weights),
        strict=True,
    ):
        agree(a, b, name, bound=1e-4)
