"""Wrong calls: each ends in an error that names the argument, or in a right result."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_xlstm import _C, _build, ops
from flash_xlstm.ops import _errors

BATCH, SEQ, HEADS, DQK, DV, DIM, CHANNELS = 2, 5, 2, 4, 6, 3, 5


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def mlstm_arguments(*rows):
    q, k, v = randn(*rows, HEADS, DQK), randn(*rows, HEADS, DQK), randn(*rows, HEADS, DV)
    return {"q": q, "k": k, "v": v, "i": randn(*rows, HEADS), "f": randn(*rows, HEADS)}


def mlstm_state():
    return randn(BATCH, HEADS, DQK, DV), randn(BATCH, HEADS, DQK), randn(BATCH, HEADS)


def slstm_arguments(*rows):
    return {"x": randn(*rows, 4, HEADS, DIM), "R": randn(4, HEADS, DIM, DIM), "b": randn(4, HEADS, DIM)}


def slstm_state():
    return tuple(randn(BATCH, HEADS, DIM) for _ in range(4))


GOOD = {
    "soft_cap": lambda: {"x": randn(2, 3), "cap": 2.0},
    "rms_norm": lambda: {"x": randn(2, 3), "weight": randn(3), "eps": 1e-6, "residual": randn(2, 3)},
    "gated_head_norm": lambda: {"h": randn(2, 3, 4), "gate": randn(2, 12), "weight": randn(12), "eps": 1e-6},
    "swiglu": lambda: {"x": randn(2, 3), "y": randn(2, 3)},
    "linear_rows": lambda: {"x": randn(2, 8), "weight": randn(3, 8), "bias": randn(3)},
    "fused_linear_rows": lambda: {
        "x": randn(2, 8), "weights": [randn(3, 8), randn(3, 8)], "biases": [randn(3), None], "swiglu": True,
    },
    "linear_cross_entropy": lambda: {
        "hidden": randn(2, 8), "weight": randn(3, 8), "labels": torch.tensor([2, 1]), "soft_cap": 30.0,
        "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1, "z_loss": 1e-4,
    },
    "causal_conv1d": lambda: {
        "x": randn(BATCH, SEQ, CHANNELS), "weight": randn(CHANNELS, 4), "bias": randn(CHANNELS), "activation": "silu",
        "initial_state": randn(BATCH, 3, CHANNELS), "return_final_state": True,
    },
    "causal_conv1d_step": lambda: {
        "x": randn(BATCH, CHANNELS), "weight": randn(CHANNELS, 4), "bias": None, "state": randn(BATCH, 3, CHANNELS),
    },
    "mlstm": lambda: {
        **mlstm_arguments(BATCH, SEQ), "initial_state": mlstm_state(), "chunk_size": 3, "keep_states": False,
    },
    "mlstm_step": lambda: {**mlstm_arguments(BATCH), "state": mlstm_state(), "gate_soft_cap": 15.0},
    "mlstm_prefill": lambda: {
        **mlstm_arguments(BATCH, SEQ), "state": mlstm_state(), "gate_soft_cap": 15.0,
        "state_indices": torch.tensor([1, 0], dtype=torch.int32), "fresh": torch.tensor([True, False]),
    },
    "mlstm_state": lambda: {
        **{name: t for name, t in mlstm_arguments(BATCH, SEQ).items() if name != "q"}, "gate_soft_cap": 15.0,
    },
    "mlstm_sig": lambda: {
        **mlstm_arguments(BATCH, SEQ), "initial_state": mlstm_state()[:2], "normalize": True, "keep_states": False,
    },
    "slstm": lambda: {**slstm_arguments(BATCH, SEQ), "initial_state": slstm_state(), "recurrent_grad_clip": 1.0},
    "slstm_step": lambda: {**slstm_arguments(BATCH), "state": slstm_state()},
}  # fmt: skip

ODD = {
    "None": lambda t: None,
    "0": lambda t: 0,
    "-1": lambda t: -1,
    "a large int": lambda t: 10**400,
    "a large float": lambda t: 1e300,
    "a small float": lambda t: 1e-300,
    "nan": lambda t: float("nan"),
    "inf": lambda t: float("inf"),
    "True": lambda t: True,
    "a string": lambda t: "15.0",
    "bytes": lambda t: b"15",
    "an empty list": lambda t: [],
    "a list": lambda t: [1.0, 2.0],
    "a tuple of tensors": lambda t: (torch.zeros(2), torch.zeros(2), torch.zeros(2)),
    "a tuple of ints": lambda t: (1, 2, 3),
    "a dict": lambda t: {"a": 1},
    "an object": lambda t: object(),
    "an array": lambda t: np.ones((2, 3), dtype=np.float32),
    "a number of numpy": lambda t: np.float64(3.0),
    "a tensor without dimensions": lambda t: torch.tensor(1.0),
    "a tensor without elements": lambda t: torch.zeros(0),
    "a tensor of 9 dimensions": lambda t: torch.ones([1] * 8 + [4]),
    "of integers": lambda t: t.int(),
    "of bytes": lambda t: t.to(torch.uint8),
    "of 16-bit integers": lambda t: t.to(torch.uint16),
    "of bools": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "float64": lambda t: t.double(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn() if torch.backends.mkldnn.is_available() else t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)) if t.dim() > 1 else t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda t: t.mT if t.dim() > 1 else t[None],
}

# A RuntimeError in torch's wording, for a flag that is a promise about the argument's tensor.
CASES = [(op, name) for op, make in GOOD.items() for name in inspect.signature(getattr(ops, op)).parameters]


def check(op, name, odd):
    arguments = GOOD[op]()
    value = arguments.get(name)
    in_list = isinstance(value, (list, tuple)) and odd in list(ODD)[-14:]
    try:
        template = value[0] if in_list else value if isinstance(value, torch.Tensor) else torch.ones(2, 3)
        changed = ODD[odd](template)
    except (RuntimeError, NotImplementedError):
        return  # torch itself makes no such tensor
    arguments[name] = type(value)([changed, *value[1:]]) if in_list else changed
    try:
        getattr(ops, op)(**arguments)
    except (TypeError, ValueError) as error:
        said = str(error).split("\n")[0]
        named = re.match(rf"{re.escape(name)}\b", said)
        # The text may name another argument that does not fit the odd one: k must have the dtype of q.
        other = any(re.match(rf"{re.escape(each)}\b", said) for each in inspect.signature(getattr(ops, op)).parameters)
        fits = isinstance(changed, (torch.Tensor, tuple)) and other
        assert named or fits, f"{op}({name}: {odd}) ended in {type(error).__name__}: {said}"
        assert re.search(r"\b(must|is for one weight|expected|only)\b", said), said
        assert "dtype number" not in said and len(said) < 400, said


@pytest.mark.filterwarnings("ignore")
def test_every_argument_and_every_odd_value():
    """Any error but a TypeError or a ValueError goes through."""
    for op, name in CASES:
        for odd in ODD:
            check(op, name, odd)


@pytest.mark.filterwarnings("ignore")
def test_several_odd_values(fuzz):
    @fuzz(500)
    @given(
        op=st.sampled_from(list(GOOD)),
        picks=st.lists(st.tuples(st.integers(0, 20), st.sampled_from(list(ODD))), min_size=2, max_size=4),
    )
    def run(op, picks):
        arguments = GOOD[op]()
        names = list(inspect.signature(getattr(ops, op)).parameters)
        for place, odd in picks:
            name = names[place % len(names)]
            value = arguments.get(name)
            try:
                arguments[name] = ODD[odd](value if isinstance(value, torch.Tensor) else torch.ones(2, 3))
            except (RuntimeError, NotImplementedError, TypeError, IndexError):
                return
        try:
            getattr(ops, op)(**arguments)
        except (TypeError, ValueError) as error:
            named = re.match(r"(\w+)", str(error))
            assert named and named[1] in names, f"{op} {picks}: {error}"

    run()


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments(op):
    getattr(ops, op)(**GOOD[op]())


def test_a_torch_that_hands_on_no_type():
    with pytest.raises(ValueError, match=r"^cap is -1; it must be") as raised:
        torch.ops.flash_xlstm.soft_cap(torch.ones(2), -1.0)
    message = str(raised.value)
    assert _C.argument_error() == ("ValueError", message)
    wrapped = RuntimeError(f"{message}\nException raised from ...")
    explained = _errors.explain(wrapped, ops.soft_cap, {"x": torch.ones(2), "cap": -1.0})
    assert type(explained) is ValueError and str(explained) == message
    other = RuntimeError("out of memory")
    assert _errors.explain(other, ops.soft_cap, {"x": torch.ones(2), "cap": -1.0}) is other


def test_sizes_past_63_bits():
    h = torch.zeros(0, 1, 1).expand(0, 2**32, 2**32)
    with pytest.raises(ValueError, match="h has 4294967296 x 4294967296 elements"):
        ops.gated_head_norm(h, torch.zeros(0, 4), torch.zeros(4))
    q, gates = torch.zeros(1).expand(1, 1, 2**22, 2**22), torch.zeros(1).expand(1, 1, 2**22)
    with pytest.raises(ValueError, match="q has stride 0"):
        ops.mlstm(q, q, q, gates, gates)
    with pytest.raises(ValueError, match="elements; there must be fewer"):
        state = torch.zeros(0, 1, 1, 1).expand(0, 2**32, 2**32, 1)
        weights = [torch.zeros(4, 4)]
        torch.ops.flash_xlstm.mlstm_block_step(
            torch.zeros(1, 4), state, torch.zeros(0, 1, 1).expand(0, 2**32, 2**32), torch.zeros(0, 1).expand(0, 2**32),
            torch.full((1,), -1, dtype=torch.int32), torch.zeros(4), weights, weights, [torch.zeros(4)], torch.zeros(4),
            torch.zeros(4, 4), torch.zeros(4), weights, torch.zeros(4, 4), 1e-6, 1e-6, 1e-6, 1e-6, None,
        )  # fmt: skip


@pytest.mark.parametrize("op", [ops.mlstm, ops.mlstm_sig])
@pytest.mark.parametrize("value", [1, None, "yes"])
def test_keep_states_is_a_flag(value, op):
    """Also where no gradient is needed, so that nothing is kept."""
    with pytest.raises(TypeError, match=r"keep_states is .*; it must be True or False"):
        op(**mlstm_arguments(BATCH, SEQ), keep_states=value)


# The operator, the tensors of its state, its last option, the numbers of a token and head that are kept beside states.
MLSTM_OPS = {
    "mlstm": (torch.ops.flash_xlstm.mlstm, 3, (), 2),
    "mlstm_sig": (torch.ops.flash_xlstm.mlstm_sig, 2, (True,), 1),
    "mlstm_sig, no n": (torch.ops.flash_xlstm.mlstm_sig, 2, (False,), 0),
}


def kept_alone(scalars, batch, seq):
    """The shape of what is kept, without states."""
    return (2, batch, seq, HEADS) if scalars == 2 else (scalars * batch, seq, HEADS)


@pytest.mark.parametrize("op", MLSTM_OPS)
def test_shape_of_what_is_kept(monkeypatch, op):
    """The fake kernels', on a device whose kernels keep 100 floats for each chunk of 128 tokens and head."""
    monkeypatch.setattr(_build, "kept_floats", lambda *args: 100)
    form, parts, normalize, scalars = MLSTM_OPS[op]
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    for batch, cu_seqlens, chunks in ((2, None, 2 * 3), (1, offsets, 3 + 3)):
        inputs = [t.to("meta") for t in mlstm_arguments(batch, 300).values()]
        arguments = *inputs, *[None] * parts, cu_seqlens, None, 1e-6, None, 0, False, *normalize
        assert form(*arguments, True)[1].shape == ((chunks * 100 + scalars * batch * 300) * HEADS,)
        assert form(*arguments, False)[1].shape == form(*arguments)[1].shape == kept_alone(scalars, batch, 300)


@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("op", MLSTM_OPS)
def test_what_was_kept_is_checked(op, keep_states):
    form, parts, normalize, scalars = MLSTM_OPS[op]
    inputs, options = (*mlstm_arguments(BATCH, SEQ).values(), *[None] * parts, None), (None, 1e-6, None, 0)
    run = getattr(torch.ops.flash_xlstm, form.__name__ + "_backward")
    backward = lambda dh, kept: run(dh, *[None] * parts, *inputs, h, kept, *options, *normalize)  # noqa: E731
    h, kept, *_ = form(*inputs, *options, False, *normalize, keep_states)
    # A CPU keeps states from the 65th token on.
    assert kept.shape == ((16 + scalars * BATCH * SEQ * HEADS,) if keep_states else kept_alone(scalars, BATCH, SEQ))
    backward(h, kept)
    with pytest.raises(TypeError, match="kept has dtype bfloat16"):
        backward(h, kept.bfloat16())
    for wrong in (kept.flatten()[1:], kept[None], torch.zeros(kept_alone(scalars or 1, BATCH + 1, SEQ))):
        with pytest.raises(ValueError, match="kept has shape"):
            backward(h, wrong)
    # With states it has one dimension. Such calls are not joined under vmap: the error is of one call.
    with pytest.raises(ValueError, match=r"kept has shape \(7,\)"):
        torch.func.vmap(lambda dh: backward(dh, torch.zeros(7)))(torch.stack([h, h]))
