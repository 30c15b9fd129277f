"""The names of flashrnn: against the reference, and, where that package is installed, beside it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import types

import pytest
import torch

from flash_xlstm import reference
from flash_xlstm.integrations import flashrnn as ours

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("flashrnn") is None, reason="flashrnn is not installed: make test-dropin"
)
BATCH, SEQ, HEADS, DIM = 2, 9, 3, 8


@pytest.fixture
def inputs():
    """Wx, R, b, states; float32, in the default layouts."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    states = new(4, BATCH, 1, HEADS, DIM)
    states[2] = states[2].abs() + 1
    tensors = [new(BATCH, SEQ, 4, HEADS, DIM), new(4, HEADS, DIM, DIM) * 0.4, new(4, HEADS, DIM), states]
    return [t.requires_grad_() for t in tensors]


def _states(Wx, R, b, states):
    """The states after every token, (4, batch, seq, heads, dim) float64, by single tokens of the reference."""
    Wx, R, b = Wx.double(), R.double(), b.double()
    state = None if states is None else tuple(states.double().squeeze(2))
    every = []
    for t in range(Wx.shape[1]):
        _, state = reference.slstm(Wx[:, t : t + 1], R, b, initial_state=state, return_final_state=True)
        every.append(torch.stack(state))
    return torch.stack(every, dim=2)


def _permuted(t, shape, wanted):
    return t.permute([shape.index(letter) for letter in wanted]).contiguous()


@pytest.mark.parametrize("given", [True, False], ids=["state", "fresh"])
def test_states_and_gradients(given, inputs, agree):
    if not given:
        inputs[3] = None
    every, last = ours.flashrnn(*inputs, function="slstm")
    expected = _states(*inputs)
    assert every.shape == expected.shape and len(every) == 4 and every.dtype == torch.float32
    agree(every.stack().double(), expected, "all")
    agree(last.double(), expected[:, :, -1:], "last")
    agree(every[0].double(), expected[0], "h")
    y, c, n, m = every
    agree(torch.stack([y, c, n, m]).double(), expected, "unpacked")
    assert torch.equal(every[0, :, -1], every[0][:, -1]) and torch.equal(every[-1], m)
    tensors = inputs if given else inputs[:3]
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(expected.shape, generator=generator)
    for which in range(4):  # through each state
        mine = torch.autograd.grad(every[which], tensors, weight[which], retain_graph=True, allow_unused=True)
        exact = torch.autograd.grad(
            expected[which], tensors, weight[which].double(), retain_graph=True, allow_unused=True
        )
        for name, a, b in zip(("Wx", "R", "b", "states"), mine, exact, strict=False):
            agree(a, b, (which, name), bound=1e-4)
    mine = torch.autograd.grad(last, tensors, weight[:, :, -1:])
    exact = torch.autograd.grad(expected[:, :, -1:], tensors, weight[:, :, -1:].double())
    for name, a, b in zip(("Wx", "R", "b", "states"), mine, exact, strict=False):
        agree(a, b, ("last", name), bound=1e-4)


@pytest.mark.parametrize("recurrent_shape", ["GHDP", "HGDP", "HPGD", "HPDG"])
@pytest.mark.parametrize("output_shape", ["SBTHD", "SBHTD", "STBHD"])
def test_layouts(recurrent_shape, output_shape, inputs, agree):
    Wx, R, b, states = inputs
    input_shape, bias_shape = ("TBGHD", "HDG") if recurrent_shape == "HPDG" else ("BTGHD", "HGD")
    config = ours.FlashRNNConfig(
        function="slstm", backend="vanilla", num_heads=HEADS, head_dim=DIM, input_shape=input_shape,
        output_shape=output_shape, recurrent_shape=recurrent_shape, bias_shape=bias_shape,
    )  # fmt: skip
    every, last = ours.flashrnn(
        _permuted(Wx, "BTGHD", input_shape), _permuted(R, "GHDP", recurrent_shape), _permuted(b, "GHD", bias_shape),
        _permuted(states, "SBTHD", output_shape), config=config,
    )  # fmt: skip
    expected = _states(*inputs)
    agree(every.stack().double(), _permuted(expected, "SBTHD", output_shape))
    agree(last.double(), _permuted(expected[:, :, -1:], "SBTHD", output_shape))


@torch.no_grad()
def test_one_token_at_a_time(inputs, agree):
    Wx, R, b, states = inputs
    kept, expected = states.clone(), _states(*inputs)
    for t in range(SEQ):
        every, states = ours.flashrnn(Wx[:, t : t + 1], R, b, states, "slstm")
        agree(every[0].double(), expected[0, :, t : t + 1], t)
    agree(states.double(), expected[:, :, -1:])
    assert torch.equal(inputs[3], kept)


@pytest.mark.parametrize("seq", [1, SEQ])
@torch.no_grad()
def test_compiles(seq, inputs, agree):
    Wx, R, b, states = inputs

    def run(Wx, states):
        every, last = ours.flashrnn(Wx, R, b, states, "slstm")
        return every[0], last

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for mine, other in zip(compiled(Wx[:, :seq], states), run(Wx[:, :seq], states), strict=True):
        agree(mine, other)
    torch._dynamo.reset()


def test_dtypes(inputs):
    Wx, R, b, _ = (t.detach() for t in inputs)
    exact = _states(Wx, R, b, None)
    config = ours.FlashRNNConfig(function="slstm", num_heads=HEADS, head_dim=DIM)
    for every, last in (
        ours.flashrnn(Wx, R, b, config=config),  # to bfloat16, as a CUDA backend does
        ours.flashrnn(Wx.bfloat16(), R.bfloat16(), b.bfloat16(), function="slstm"),
    ):
        assert every[0].dtype == last.dtype == every.stack().dtype == torch.bfloat16
        assert (every.stack() - exact).norm() < 2e-2 * exact.norm()


def test_gradients_through_the_recurrence_are_cut_or_clipped(inputs):
    Wx, R, b, _ = inputs

    def gradient(**options):
        config = ours.FlashRNNConfig(function="slstm", backend="vanilla", num_heads=HEADS, head_dim=DIM, **options)
        every, _ = ours.flashrnn(Wx, R, b, config=config)
        return torch.autograd.grad(every[0].sum(), Wx)[0]

    whole, cut = gradient(), gradient(gradient_recurrent_cut=True)
    clipped, loose = (gradient(gradient_recurrent_clipval=clip) for clip in (0.05, 100.0))
    assert torch.equal(loose, whole) and not torch.allclose(clipped, whole) and not torch.allclose(cut, clipped)
    assert torch.equal(cut[:, -1], whole[:, -1])


def test_refusals(inputs):
    Wx, R, b, states = (t.detach() for t in inputs)
    for function in ("lstm", "gru", "elman"):
        with pytest.raises(ValueError, match=f"function is '{function}'; this package computes 'slstm' only"):
            ours.flashrnn(Wx, R, b, function=function)
    with pytest.raises(ValueError, match="function is 'lstm'"):
        ours.flashrnn(Wx, R, b)
    with pytest.raises(ValueError, match="function is 'rnn'; it must be 'slstm'"):
        ours.flashrnn(Wx, R, b, function="rnn")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        ours.flashrnn(Wx, R, b, function="slstm", backend="fast")
    with pytest.raises(ValueError, match="dtype is 'float64'; it must be one of float32, bfloat16, float16"):
        ours.flashrnn(Wx, R, b, function="slstm", dtype="float64")
    with pytest.raises(ValueError, match=r"Wx has shape \(2, 9, 4, 24\); it must have 5 dimensions, BTGHD"):
        ours.flashrnn(Wx.flatten(3), R, b, function="slstm")
    with pytest.raises(ValueError, match="its time, in SBTHD, must be 1"):
        ours.flashrnn(Wx, R, b, states.expand(-1, -1, 2, -1, -1), "slstm")
    with pytest.raises(ValueError, match="Wx has 3 heads of 8 units; by config they must be 4 of 8"):
        ours.flashrnn(Wx, R, b, config=ours.FlashRNNConfig(function="slstm", num_heads=4, head_dim=8))
    for field, value in {
        "forward_clipval": 1.0, "initial_val": 1.0, "constants": {"x": 1.0}, "recurrent_shape": "GHPD", "dtype": "int8",
        "dtype_b": "int8", "dtype_acc": "int8",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{field} is "):
            ours.FlashRNNConfig(function="slstm", **{field: value})


WRONG_SETTINGS = [
    ({"forward_clipval": 0.01}, ValueError, "forward_clipval is 0.01; it must be None"),
    ({"initial_val": 0.5}, ValueError, "initial_val is 0.5; it must be 0"),
    ({"initial_val": [0.0, 1.0, 0.0, 0.0]}, ValueError, "initial_val is .*; it must be 0"),
    ({"initial_val": None}, ValueError, "initial_val is None; it must be 0"),
    ({"constants": {"x": 1.0}}, ValueError, "constants is .*; it must be empty"),
    ({"num_gates_r": 3}, ValueError, "num_gates_r is 3; it must be 4"),
    ({"num_states": 2}, ValueError, "num_states is 2; it must be 4"),
    ({"head_dim": 9}, ValueError, "hidden_dim is 24; it must be num_heads . head_dim, and they are 3 and 9"),
    (
        {"gradient_recurrent_clipval": -1.0},
        ValueError,
        "gradient_recurrent_clipval is -1.0; it must be None, or greater",
    ),
    ({"gradient_recurrent_clipval": 1e-50}, ValueError, "gradient_recurrent_clipval is 1e-50; it must be None, or"),
    ({"gradient_recurrent_clipval": "x"}, TypeError, "gradient_recurrent_clipval is 'x'; it must be a number or None"),
    ({"backend": "fast"}, ValueError, "backend is 'fast'"),
    ({"input_shape": "BTHGD"}, ValueError, "input_shape is 'BTHGD'"),
    ({"dtype_s": "int8"}, ValueError, "dtype_s is 'int8'"),
    ({"function": "lstm"}, ValueError, "function is 'lstm'; this package computes 'slstm' only"),
]


@pytest.mark.parametrize(("settings", "error", "message"), WRONG_SETTINGS, ids=lambda value: str(value)[:40])
def test_any_configuration_is_checked(settings, error, message, inputs):
    """One of this class, one that has been changed since, and one of another class."""
    fine = {"function": "slstm", "backend": "vanilla", "hidden_dim": 24, "num_heads": 3, "head_dim": 8}
    with pytest.raises(error, match=message):
        ours.FlashRNNConfig(**fine | settings)
    config = ours.FlashRNNConfig(**fine)
    other = types.SimpleNamespace(**vars(config))
    assert torch.equal(ours.flashrnn(*inputs, config=config)[1], ours.flashrnn(*inputs, config=other)[1])
    for changed in (config, other):
        vars(changed).update(settings)
        with pytest.raises(error, match=message):
            ours.flashrnn(*inputs, config=changed)


def test_sizes_of_a_configuration(inputs):
    for sizes in ({"num_heads": 3}, {"head_dim": 3}):
        with pytest.raises(ValueError, match=r"hidden_dim is 16; it must be num_heads \* head_dim"):
            ours.FlashRNNConfig(function="slstm", hidden_dim=16, **sizes)
    with pytest.raises(TypeError, match=r"num_heads is 2\.0; it must be a whole number"):
        ours.FlashRNNConfig(function="slstm", hidden_dim=16, num_heads=2.0)
    one = ours.FlashRNNConfig(function="slstm", hidden_dim=16, num_gates_t=-1)
    assert (one.num_heads, one.head_dim, one.num_gates_t) == (1, 16, 4)
    with pytest.raises(TypeError, match="config is of type dict, without function; it must be a FlashRNNConfig or"):
        ours.flashrnn(*inputs, config={"function": "slstm"})


@pytest.mark.parametrize("seq", [1, SEQ])
@torch.no_grad()
def test_errors_name_the_arguments(seq, inputs):
    Wx, R, b, states = inputs
    Wx = Wx[:, :seq]
    run = lambda *tensors: ours.flashrnn(*tensors, "slstm")  # noqa: E731
    for wrong, text in (
        (states[:3], r"states has shape \(3, 2, 1, 3, 8\); its number of states \(h, c, n, m\), in SBTHD, must be 4"),
        (states[:, :1], "its batch, in SBTHD, must be 2"),
        (states[..., :2, :], "its number of heads, in SBTHD, must be 3"),
        (states[..., :7], "its number of units, in SBTHD, must be 8"),
    ):
        with pytest.raises(ValueError, match=text):
            run(Wx, R, b, wrong)
    with pytest.raises(
        ValueError, match=r"R has shape .*; its number of units at the previous time, in GHDP, must be 8"
    ):
        run(Wx, R[..., :7], b, states)
    with pytest.raises(ValueError, match=r"b has shape .*; its number of gates \(i, f, z, o\), in GHD, must be 4"):
        run(Wx, R, b[:3], states)
    with pytest.raises(ValueError, match=r"Wx has shape .*; its number of gates .*, in BTGHD, must be 4"):
        run(Wx[:, :, :3], R, b, states)
    with pytest.raises(ValueError, match=r"^Wx has seq 0; it must be at least 1"):
        run(Wx[:, :0], R, b, states)
    with pytest.raises(TypeError, match=r"^Wx has dtype float64"):
        run(Wx.double(), R, b, states)
    with pytest.raises(ValueError, match=r"^states is on meta; it must be on the device of Wx"):
        run(Wx, R, b, states.to("meta"))
    for place, name in enumerate(("Wx", "R", "b", "states")):
        for wrong in ([1.0], None, inputs[place].numpy()):
            if name == "states" and wrong is None:
                continue
            given = [Wx, R, b, states]
            given[place] = wrong
            with pytest.raises(TypeError, match=f"^{name} is .*; it must be a tensor"):
                run(*given)


@needs_package
def test_signature():
    import flashrnn

    names = lambda f: [(p.name, p.default) for p in inspect.signature(f).parameters.values()]  # noqa: E731
    assert names(ours.flashrnn) == names(flashrnn.flashrnn)
    fields = lambda c: [(f.name, f.default) for f in dataclasses.fields(c) if f.name[0] != "_"]  # noqa: E731
    assert fields(ours.FlashRNNConfig) == fields(flashrnn.FlashRNNConfig)
    for sizes in (
        {"hidden_dim": 24, "num_heads": 3},
        {"hidden_dim": 24, "head_dim": 8},
        {"num_heads": 3, "head_dim": 8},
    ):
        mine, other = (x.FlashRNNConfig(function="slstm", **sizes) for x in (ours, flashrnn))
        public = lambda c: {k: v for k, v in vars(c).items() if k[0] != "_"}  # noqa: E731
        assert public(mine) == public(other) and mine.input_dim == other.input_dim
        assert mine.torch_dtype_w == other.torch_dtype_w


@needs_package
@pytest.mark.parametrize("given", [True, False], ids=["state", "fresh"])
def test_beside_the_package(given, inputs, agree):
    import flashrnn

    if not given:
        inputs[3] = None
    mine, last = ours.flashrnn(*inputs, function="slstm", backend="vanilla")
    other, other_last = flashrnn.flashrnn(*inputs, function="slstm", backend="vanilla")
    agree(mine.stack(), other, "all")
    agree(last, other_last, "last")
    tensors = [t for t in inputs if t is not None]
    weight = torch.randn(other.shape[1:], generator=torch.Generator().manual_seed(1))
    for name, a, b in zip(
        ("Wx", "R", "b", "states"),
        torch.autograd.grad(mine[0], tensors, weight),
        torch.autograd.grad(other[0], tensors, weight),
        strict=False,
    ):
        agree(a, b, name, bound=1e-4)


@needs_package
def test_the_packages_own_configuration_is_checked(inputs):
    import flashrnn

    sizes = {"function": "slstm", "backend": "vanilla", "num_heads": HEADS, "head_dim": DIM}
    every, _ = ours.flashrnn(*inputs, config=flashrnn.FlashRNNConfig(**sizes))
    assert torch.equal(every[0], ours.flashrnn(*inputs, function="slstm")[0][0])
    for settings in ({"forward_clipval": 0.01}, {"initial_val": 0.5}, {"constants": {"x": 1.0}}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be "):
            ours.flashrnn(*inputs, config=flashrnn.FlashRNNConfig(**sizes, **settings))
