"""The end state alone: against float64, and as what the pieces of a sequence make of the whole."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from flash_xlstm import ops, reference
from flash_xlstm.ops.mlstm_state import mlstm_piece

NAMES = ("c", "n", "m", "log_decay")
SEQS = (1, 2, 64, 65, 300)


def make(device, seq, dqk=20, dv=33, *, batch=2, heads=3, dtype=torch.float32, gates=1.0, gate_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, seq, heads, dim, generator=generator).to(device, dtype) for dim in (dqk, dv))
    i, f = ((2 * torch.rand(batch, seq, heads, generator=generator) - 1) * gates for _ in "if")
    return [k, v, *(t.to(device, gate_dtype or torch.float32) for t in (i, f + 1))]


def cotangents(outputs, without=()):
    """Without what makes the loss depend on how c and n are scaled, which would have a kink where m changes its
    branch."""
    generator = torch.Generator().manual_seed(1)
    c, n, _, decay = outputs
    dc, dn, into_decay = (torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in (c, n, decay))
    dm = (dc * c).flatten(2).sum(-1) + (dn * n).sum(-1)
    given = {"c": dc, "n": dn, "m": dm, "log_decay": into_decay}
    return [None if name in without else given[name].detach() for name in NAMES]


def gradients(form, inputs, weights, **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = form(*inputs, **options)
    pairs = [(out, w.to(out.dtype)) for out, w in zip(outputs, weights, strict=True) if w is not None]
    outputs_used, weights_used = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs_used, inputs, weights_used, materialize_grads=True, allow_unused=True)
    return [t.detach() for t in outputs], found


def error(actual, expected):
    return (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300)


def compare(inputs, without=(), **options):
    """Outputs and gradients, each beside float64."""
    wide = [t.double() for t in inputs]
    weights = cotangents(reference.mlstm_state(*wide, **options), without)
    expected = itertools.chain(*gradients(reference.mlstm_state, wide, weights, **options))
    actual = itertools.chain(*gradients(ops.mlstm_state, inputs, weights, **options))
    names = (*NAMES, "dk", "dv", "di", "df")
    return {name: (a, e) for name, a, e in zip(names, actual, expected, strict=True)}


@pytest.mark.parametrize("gates", [0.1, 1.0, 15.0])
@pytest.mark.parametrize("seq", SEQS)
def test_float32(device, seq, gates):
    for name, (actual, expected) in compare(make(device, seq, gates=gates)).items():
        assert actual.shape == expected.shape
        assert error(actual, expected) <= 1e-5 or (actual - expected).norm() <= 1e-6, name


@pytest.mark.parametrize("without", [("c",), ("n", "m"), ("c", "n", "log_decay"), ("c", "n", "m")], ids=str)
def test_gradients_of_some_results(device, without):
    for name, (actual, expected) in compare(make(device, 150), without).items():
        assert error(actual, expected) <= 1e-5, name


@pytest.mark.parametrize("gate_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit(device, dtype, gate_dtype):
    inputs = make(device, 300, 64, 64, dtype=dtype, gate_dtype=dtype if gate_dtype == "same" else None)
    for name, (actual, expected) in compare(inputs).items():
        # c is a sum of products of rounded factors. The gradients have the inputs' dtypes.
        assert error(actual, expected) <= (1e-5 if name in ("n", "m", "log_decay") else 5e-3), name


@pytest.mark.parametrize("cap", [0.7, 15.0])
def test_gate_soft_cap(device, cap):
    for name, (actual, expected) in compare(make(device, 200, gates=20.0), gate_soft_cap=cap).items():
        assert error(actual, expected) <= 1e-5, name


@pytest.mark.parametrize("offsets", [(0, 200), (0, 0, 1, 1, 64, 65, 200, 200), (0, *range(1, 41), 200)], ids=len)
def test_packed(device, offsets):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=device)
    for name, (actual, expected) in compare(make(device, 200, batch=1), cu_seqlens=cu_seqlens).items():
        assert error(actual, expected) <= 1e-5, name


def test_a_piece_of_padding_has_no_weight(device):
    k, v, i, f = make(device, 70)
    i, f = torch.full_like(i, -torch.inf), torch.full_like(f, torch.inf)
    c, n, m, decay = ops.mlstm_state(k, v, i, f)
    assert not c.any() and not n.any() and not decay.any()
    assert (m == torch.tensor(-1e30)).all()
    weights = [torch.randn_like(t) for t in (c, n, m, decay)]
    for gradient in gradients(ops.mlstm_state, (k, v, i, f), weights)[1]:
        assert not gradient.any()


@pytest.mark.parametrize("where", ["left", "right", "scattered"])
def test_padding_changes_nothing(device, where):
    inputs, position = make(device, 200, batch=1), torch.arange(200, device=device)
    padding = {"left": position < 130, "right": position >= 70, "scattered": position % 3 == 1}[where]
    padded = [t.clone() for t in inputs]
    padded[2][:, padding], padded[3][:, padding] = -torch.inf, torch.inf
    weights = cotangents(ops.mlstm_state(*padded))
    outputs, found = gradients(ops.mlstm_state, padded, weights)
    expected, wanted = gradients(ops.mlstm_state, [t[:, ~padding] for t in inputs], weights)
    for name, actual, want in zip(NAMES, outputs, expected, strict=True):
        assert error(actual, want) <= 1e-6, name
    for actual, want in zip(found, wanted, strict=True):
        assert not actual[:, padding].any()
        assert error(actual[:, ~padding], want) <= 1e-5


def combine(state, piece):
    (c, n, m), (piece_c, piece_n, piece_m, decay) = state, piece
    last = torch.maximum(decay + m, piece_m)
    kept, added = torch.exp(decay + m - last), torch.exp(piece_m - last)
    c = kept[..., None, None] * c + added[..., None, None] * piece_c
    return c, kept[..., None] * n + added[..., None] * piece_n, last


@pytest.mark.parametrize("gates", [1.0, 15.0])
@pytest.mark.parametrize("start", [0.0, -40.0, 40.0])
def test_pieces_make_the_whole(device, gates, start):
    """The final state of the mLSTM is that of its pieces' states combined, whatever m it starts from."""
    k, v, i, f = make(device, 150, gates=gates)
    heads = k.shape[0], k.shape[2]
    state = (
        torch.randn(*heads, 20, 33, device=device),
        torch.randn(*heads, 20, device=device),
        torch.full(heads, start, device=device),
    )
    _, expected = ops.mlstm(k, k, v, i, f, initial_state=state, return_final_state=True)
    for first, last in itertools.pairwise((0, 1, 64, 70, 150)):
        state = combine(state, ops.mlstm_state(*(t[:, first:last] for t in (k, v, i, f))))
    for actual, want in zip(state, expected, strict=True):
        assert error(actual, want) <= 1e-5


def test_layouts_and_strides(device):
    inputs = make(device, 70)
    expected = ops.mlstm_state(*inputs)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    for actual, want in zip(ops.mlstm_state(*strided), expected, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"heads": 0}], ids=str)
def test_empty(device, sizes):
    for t in ops.mlstm_state(*make(device, 5, **sizes)):
        assert t.numel() == 0 and t.dtype == torch.float32


def test_unwritten_memory(device, nan_memory):
    inputs = make(device, 70, batch=1)
    cu_seqlens = torch.tensor((0, 0, 40, 70), dtype=torch.int32, device=device)
    with nan_memory():
        weights = [torch.ones_like(t) for t in ops.mlstm_state(*inputs, cu_seqlens=cu_seqlens)]
        outputs, found = gradients(ops.mlstm_state, inputs, weights, cu_seqlens=cu_seqlens)
    assert all(t.isfinite().all() for t in (*outputs, *found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_opcheck(device, dtype, packed, cap):
    inputs = [t.requires_grad_() for t in make(device, 9, 4, 6, batch=1 if packed else 2, dtype=dtype)]
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device) if packed else None
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm_state, (*inputs, cu_seqlens, cap, 0))
    inputs = [t.detach() for t in inputs]
    grads = [torch.ones_like(t) for t in torch.ops.flash_xlstm.mlstm_state(*inputs, cu_seqlens, cap, 0)]
    for given in (grads, [grads[0], None, None, None], [None, None, None, grads[3]]):
        arguments = (*given, *inputs, cu_seqlens, cap, 0)
        torch.library.opcheck(torch.ops.flash_xlstm.mlstm_state_backward, arguments)


def test_autocast(device):
    inputs = make(device, 70)
    with torch.autocast(device, torch.bfloat16):
        actual = ops.mlstm_state(*inputs)
    expected = ops.mlstm_state(*(t.bfloat16() for t in inputs[:2]), *inputs[2:])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_double_backward_raises(device):
    inputs = [t.requires_grad_() for t in make(device, 9, 4, 6)]
    (dk,) = torch.autograd.grad(ops.mlstm_state(*inputs)[0].sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dk.sum().backward()


SHAPES = {"k": (2, 8, 2, 4), "v": (2, 8, 2, 6), "i": (2, 8, 2), "f": (2, 8, 2)}
ERRORS = {
    "k of 3 dimensions": ({"k": torch.zeros(8, 2, 4)}, ValueError, "k has shape"),
    "seq of 0": ({n: torch.zeros(s[0], 0, *s[2:]) for n, s in SHAPES.items()}, ValueError, "k has seq 0"),
    "v of another seq": ({"v": torch.zeros(2, 7, 2, 6)}, ValueError, "v has shape"),
    "k in float64": ({"k": torch.zeros(2, 8, 2, 4, dtype=torch.float64)}, TypeError, "k has dtype float64"),
    "v in bfloat16": ({"v": torch.zeros(2, 8, 2, 6).bfloat16()}, TypeError, "v has dtype bfloat16; .*as k"),
    "i in float16": ({"i": torch.zeros(2, 8, 2).half()}, TypeError, "i has dtype float16; .*the dtype of k"),
    "k not contiguous": ({"k": torch.zeros(2, 8, 4, 2).mT}, ValueError, "k has stride"),
    "f on meta": ({"f": torch.zeros(2, 8, 2, device="meta")}, ValueError, "f is on meta"),
    "a cap of 0": ({"gate_soft_cap": 0.0}, ValueError, "gate_soft_cap is 0"),
    "packed with batch 2": ({"cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, "k has batch 2"),
    "chunk_size of 0": ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    "k a list": ({"k": [1.0]}, TypeError, "k is of type list"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    changed, kind, text = ERRORS[case]
    arguments = {**{name: torch.zeros(shape) for name, shape in SHAPES.items()}, **changed}
    with pytest.raises(kind, match=f"^{text}"):
        ops.mlstm_state(**arguments)


def test_random_problems(fuzz, device):
    @fuzz(100)
    @hypothesis.given(
        st.tuples(*(st.integers(1, most) for most in (140, 40, 40, 3, 3))), st.lists(st.integers(0, 140), max_size=3),
        st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]), st.booleans(),
        st.sampled_from([None, 15.0]), st.integers(0, 1000),
    )  # fmt: skip
    def run(sizes, cuts, dtype, same, cap, seed):
        seq, dqk, dv, batch, heads = sizes
        options = {"gate_soft_cap": cap}
        if cuts:
            offsets = [0, *sorted(min(cut, seq) for cut in cuts), seq]
            options["cu_seqlens"], batch = torch.tensor(offsets, dtype=torch.int32, device=device), 1
        inputs = make(
            device, seq, dqk, dv, batch=batch, heads=heads, dtype=dtype, gate_dtype=dtype if same else None, seed=seed
        )
        wide = [torch.stack([t, t], -1)[..., 0] for t in inputs[2:]]  # gates of any strides
        for name, (actual, expected) in compare([*inputs[:2], *wide], **options).items():
            bound = 1e-5 if dtype == torch.float32 or name in ("n", "m", "log_decay") else 1e-2
            assert actual.shape == expected.shape
            # A gate's gradient may be a small difference of large sums.
            assert error(actual, expected) <= bound or (actual - expected).norm() <= bound * dqk * dv, name

    run()


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("dims", [(16, 32), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_one_tensor(device, dtype, dims, from_zero):
    """What ranks exchange. Behind a state of zeros it is what ops.mlstm ends with: no token makes m anew here."""
    k, v, i, f = make(device, 3, *dims, dtype=dtype)
    i -= 5
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm_piece, (k, v, i, f, 2.0, 0, from_zero))
    piece = mlstm_piece(k, v, i, f, 2.0, 0, from_zero)
    expected = ops.mlstm_state(k, v, i, f, gate_soft_cap=2.0)
    if from_zero:
        expected = *ops.mlstm(k, k, v, i, f, gate_soft_cap=2.0, return_final_state=True)[1], expected[3]
    assert piece.numel() % 4 == 0
    for t in expected:
        found, piece = piece[: t.numel()].view(t.shape), piece[t.numel() :]
        torch.testing.assert_close(found, t, rtol=1e-6, atol=1e-6)
    assert piece.numel() < 4
