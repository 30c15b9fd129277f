"""The loss without logits, beside float64."""

from __future__ import annotations

import itertools
import subprocess
import sys

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flash_xlstm import ops, reference
from flash_xlstm.ops import loss as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of gradients; float32's rounding, and the gradients' own in 16 bits (on CUDA that of the logits' gradients too).
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
OPTIONS = [
    {"soft_cap": cap, "label_smoothing": smoothing, "z_loss": z_loss}
    for cap, smoothing, z_loss in itertools.product((None, 3.0), (0.0, 0.1), (0.0, 1e-2))
] + [{"soft_cap": 30.0}, {"label_smoothing": 1.0}, {"soft_cap": 0.5, "ignore_index": 2}]


def problem(dtype, device, *shape, dim=24, vocabulary=37, seed=0):
    """hidden, weight and labels of which every fourth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, dim, generator=generator).to(device, dtype)
    weight = torch.randn(vocabulary, dim, generator=generator).to(device, dtype)
    labels = torch.randint(vocabulary, shape, generator=generator)
    labels.view(-1)[1::4] = -100
    return hidden, weight, labels.to(device)


def results(form, hidden, weight, labels, dtype=None, **options):
    """Loss and both gradients; `dtype`: computed in it."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    loss = form(*leaves, labels, **options)
    generator = torch.Generator().manual_seed(1)
    incoming = torch.randn(loss.shape, generator=generator).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, incoming)]


def off(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(hidden, weight, labels, bound=None, **options):
    actual = results(ops.linear_cross_entropy, hidden, weight, labels, **options)
    expected = results(reference.linear_cross_entropy, hidden, weight, labels, torch.float64, **options)
    assert actual[0].dtype == torch.float32 and actual[0].shape == expected[0].shape
    assert [t.dtype for t in actual[1:]] == [hidden.dtype] * 2
    bound = BOUNDS[hidden.dtype] if bound is None else bound
    for name, mine, right, most in zip(
        ("loss", "hidden", "weight"), actual, expected, (2e-6, bound, bound), strict=True
    ):
        assert off(mine, right) <= most, (name, options)
    return actual


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(device, dtype, options):
    if "ignore_index" in options:
        labels = problem(dtype, device, 2, 51)[2].clamp(min=0)
    for reduction in ("mean", "sum", "none"):
        hidden, weight, labels_ = problem(dtype, device, 2, 51)
        check(hidden, weight, labels if "ignore_index" in options else labels_, reduction=reduction, **options)


@pytest.mark.parametrize(
    ("shape", "dim", "vocabulary"), [((1,), 1, 1), ((3,), 5, 2), ((1,), 8, 1001), ((2, 3, 4), 7, 50), ((300,), 16, 259)]
)
def test_sizes(device, shape, dim, vocabulary):
    for dtype in DTYPES:
        hidden, weight, labels = problem(dtype, device, *shape, dim=dim, vocabulary=vocabulary)
        check(hidden, weight, labels.clamp(min=0).int(), reduction="sum", soft_cap=4.0, z_loss=1e-3, bound=5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pieces(device, monkeypatch, dtype, reduction):
    """Of 384 tokens and less, four parts each."""
    hidden, weight, labels = problem(dtype, device, 1000, vocabulary=103)
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 128)
    monkeypatch.setattr(module, "_ELEMENTS", 400 * 103)
    assert module._pieces(1000, 103) == (384, 128)
    check(hidden, weight, labels, reduction=reduction, soft_cap=5.0)


@pytest.mark.parametrize(
    ("tokens", "vocabulary"), [(1, 1), (1, 50304), (16384, 50304), (2049, 50304), (100, 262144), (10**6, 7)]
)
def test_pieces_hold_what_they_may(tokens, vocabulary):
    piece, part = module._pieces(tokens, vocabulary)
    assert 1 <= part <= piece <= tokens
    assert piece * vocabulary <= max(module._ELEMENTS, module._FEWEST_TOKENS * vocabulary)
    assert part * vocabulary <= max(module._ELEMENTS // 4, 256 * vocabulary)
    if vocabulary == 50304:
        assert (piece, part) == {1: (1, 1), 2049: (1152, 512), 16384: (2048, 512)}[tokens]


def test_a_saturated_cap(device):
    """The slope is right where tanh is all but 1, as far as the logits' own rounding lets it be."""
    hidden, weight, labels = problem(torch.float32, device, 40)
    check(8 * hidden / hidden.norm(dim=-1, keepdim=True), weight, labels, soft_cap=0.25)
    row = torch.full((1, 24), 0.1, device=device)
    wide = torch.rand(37, 24, generator=torch.Generator().manual_seed(0)).to(device) + 9.5
    check(row, wide, labels[:1], soft_cap=3.0, bound=5e-5)  # logits of 24 are 8 caps: slopes of 4e-7


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_its_token(device, dtype, soft_cap):
    hidden, weight, labels = problem(dtype, device, 9)
    good = results(ops.linear_cross_entropy, hidden, weight, labels, reduction="none", soft_cap=soft_cap)
    hidden[2, 3] = torch.nan
    loss, dhidden, dweight = results(
        ops.linear_cross_entropy, hidden, weight, labels, reduction="none", soft_cap=soft_cap
    )
    others = torch.arange(9, device=device) != 2
    assert loss[2].isnan() and dhidden[2].isnan().all() and dweight.isnan().all()
    assert torch.equal(loss[others], good[0][others]) and torch.equal(dhidden[others], good[1][others])
    assert results(ops.linear_cross_entropy, hidden, weight, labels, soft_cap=soft_cap)[0].isnan()


def test_layouts(device):
    hidden, weight, labels = problem(torch.float32, device, 6, 5)
    wide = torch.randn(6, 5, 48, device=device)
    check(wide[..., ::2], weight.t().contiguous().t(), labels.t().contiguous().t())
    check(hidden.transpose(0, 1), weight, labels.t())
    check(hidden[:1].expand(6, 5, 24), weight, labels)
    check(hidden, weight[:, :1].expand(37, 24), labels)


def test_only_what_is_needed_is_made(device):
    hidden, weight, labels = problem(torch.float32, device, 9)
    run = torch.ops.flash_xlstm.linear_cross_entropy
    for flags in itertools.product((False, True), repeat=2):
        _, _, dhidden, dweight = run(hidden, weight, labels, "mean", None, -100, 0.0, 0.0, *flags)
        assert (dhidden.shape == hidden.shape, dweight.shape == weight.shape) == flags
    expected = results(ops.linear_cross_entropy, hidden, weight, labels)
    for which in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaves[which].requires_grad_()
        loss = ops.linear_cross_entropy(*leaves, labels)
        incoming = torch.randn((), generator=torch.Generator().manual_seed(1)).to(device)
        (gradient,) = torch.autograd.grad(loss, leaves[which], incoming)
        assert torch.equal(gradient, expected[1 + which])
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(hidden.requires_grad_(), weight, labels), expected[0])


def test_no_tokens_and_none_that_count(device):
    hidden, weight, labels = problem(torch.float32, device, 4)
    ignored = torch.full_like(labels, -100)
    for given, where in (((hidden, weight, ignored), 4), ((hidden[:0], weight, labels[:0]), 0)):
        mean, dhidden, _ = results(ops.linear_cross_entropy, *given)
        assert mean.isnan() and F.cross_entropy(given[0] @ weight.T, given[2]).isnan()
        total, *gradients = results(ops.linear_cross_entropy, *given, reduction="sum")
        assert total == 0 and not any(t.any() for t in gradients) and dhidden.shape == (where, 24)
        assert results(ops.linear_cross_entropy, *given, reduction="none")[0].shape == (where,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_accumulated(device, reduction):
    hidden, weight, labels = problem(torch.bfloat16, device, 30)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = ops.linear_cross_entropy(*leaves, labels, reduction=reduction)
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    loss.backward(torch.full_like(loss, 0.5), retain_graph=True)
    loss.backward(torch.full_like(loss, 0.5))
    for leaf, part in zip(leaves, first, strict=True):
        assert torch.equal(leaf.grad, 2 * part)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(device, reduction):
    hidden, weight, labels = problem(torch.float32, device, 5)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = ops.linear_cross_entropy(*leaves, labels, reduction=reduction).sum()
    for gradient in torch.autograd.grad(loss, leaves, create_graph=True):
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)


def test_small_probabilities_survive_float16(device):
    """Over 8,192 tokens a mean's gradients of logits are below what float16 holds, but for the labels'."""
    hidden, weight, labels = problem(torch.float16, device, 8192, vocabulary=600)
    for options in ({}, {"reduction": "none"}):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        scale = 65536.0
        losses = [
            form(*of, labels, soft_cap=2.0, **options)
            for form, of in ((ops.linear_cross_entropy, leaves), (reference.linear_cross_entropy, exact))
        ]
        if options:
            losses = [loss.sum() / (labels != -100).sum() for loss in losses]
        got, right = (torch.autograd.grad(loss * scale, of) for loss, of in zip(losses, (leaves, exact), strict=True))
        for mine, expected in zip(got, right, strict=True):
            assert off(mine, expected) < 1e-3


def test_autocast(device):
    hidden, weight, labels = problem(torch.float32, device, 9)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device, torch.bfloat16):
        loss = ops.linear_cross_entropy(*leaves, labels, soft_cap=3.0)
    loss.backward()
    rounded = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = ops.linear_cross_entropy(*rounded, labels, soft_cap=3.0)
    expected.backward()
    assert torch.equal(loss, expected)
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)
    assert torch.equal(hidden.grad, rounded[0].grad.float())
    assert torch.equal(weight.grad.bfloat16(), rounded[1].grad) and not torch.equal(
        weight.grad, rounded[1].grad.float()
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_weights_of_16_bit_products(device, dtype, reduction):
    """The gradient is not rounded to the products' dtype; on CUDA those of the logits are."""
    hidden, weight, labels = problem(dtype, device, 40)
    actual = results(ops.linear_cross_entropy, hidden, weight.float() * 1.0001, labels, reduction=reduction)
    rounded = (weight.float() * 1.0001).to(dtype)
    expected = results(reference.linear_cross_entropy, hidden, rounded, labels, torch.float64, reduction=reduction)
    assert actual[1].dtype == dtype and actual[2].dtype == torch.float32
    assert off(actual[1], expected[1]) < BOUNDS[dtype]
    assert off(actual[2], expected[2]) < (3e-6 if device == "cpu" else BOUNDS[dtype])


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.most = max(self.most, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("flags", [(True, True), (False, False)])
def test_memory(device, monkeypatch, flags):
    """Neither the loss nor a backward that makes the logits again has a tensor of tokens x vocabulary."""
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 128)
    monkeypatch.setattr(module, "_ELEMENTS", 128 * 400)
    hidden, weight, labels = problem(torch.bfloat16, device, 2000, vocabulary=400)
    with _Largest() as largest:
        module._forward(hidden, weight, labels, "mean", 3.0, -100, 0.0, 0.0, *flags)
    assert 0 < largest.most <= max(128 * 400, 2000 * 24)
    dloss = torch.ones(2000, device=device)
    with _Largest() as largest:
        module._backward_of_each(dloss, hidden, weight, labels, 3.0, -100, 0.0, 0.0, True, True)
    assert 0 < largest.most <= max(128 * 400, 2000 * 24)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_operator(device, reduction):
    hidden, weight, labels = problem(torch.float32, device, 20)
    nodes = []

    def backend(graph, inputs):
        nodes.extend(node for node in graph.graph.nodes if "linear_cross_entropy" in str(node.target))
        return graph

    def loss(h, w, y):
        return ops.linear_cross_entropy(h, w, y, soft_cap=3.0, reduction=reduction).sum()

    def run(form):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        total = form(*leaves, labels)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    torch._dynamo.reset()
    expected = run(loss)
    for kind in (backend, "aot_eager"):
        compiled = torch.compile(loss, backend=kind, fullgraph=True)
        assert all(torch.equal(a, b) for a, b in zip(run(compiled), expected, strict=True))
    assert len(nodes) == 1
    makes = reduction == "mean"
    assert nodes[0].args[-2:] == (makes, makes)  # the gradients, along with the loss
    with torch.no_grad():
        assert torch.equal(
            torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden, weight, labels), expected[0]
        )


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("none", 4)])
def test_flops_are_counted(device, reduction, products):
    hidden, weight, labels = problem(torch.float32, device, 20)
    with FlopCounterMode(display=False) as counter:
        results(ops.linear_cross_entropy, hidden, weight, labels, reduction=reduction)
    assert counter.get_total_flops() == products * 2 * 20 * 24 * 37


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_are_sound(reduction):
    hidden, weight, labels = problem(torch.float32, "cpu", 2, 5)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    makes = reduction != "none"
    options = (3.0, -100, 0.1, 1e-3)
    torch.library.opcheck(
        torch.ops.flash_xlstm.linear_cross_entropy.default, (*leaves, labels, reduction, *options, makes, makes)
    )
    h, w = hidden.detach(), weight.detach()
    torch.library.opcheck(
        torch.ops.flash_xlstm.linear_cross_entropies_backward.default,
        (torch.ones(2, 5), h, w, labels, *options, True, False),
    )
    torch.library.opcheck(
        torch.ops.flash_xlstm.linear_cross_entropy_backward.default,
        (torch.tensor(2.0), torch.tensor(3.0), h, torch.randn(7, 5), torch.bfloat16),
    )


WRONG = [
    (
        {"labels": torch.full((3,), 37)},
        ValueError,
        r"^labels holds 37; they must be from 0 to 36 \(the vocabulary has 37",
    ),
    ({"labels": torch.full((3,), -1)}, ValueError, "^labels holds -1; "),
    ({"labels": torch.full((3,), -100), "ignore_index": 0}, ValueError, "^labels holds -100; .* or ignore_index, 0"),
    ({"labels": torch.zeros(4, dtype=torch.long)}, ValueError, r"^labels has shape \(4,\); it must be .* \(3,\)"),
    ({"labels": torch.zeros(3)}, TypeError, "^labels has dtype float32; it must be int64 or int32"),
    ({"hidden": torch.zeros(3, 24).double()}, TypeError, r"^hidden has dtype float64; .*flash_xlstm\.reference"),
    ({"weight": torch.zeros(37, 24).half()}, TypeError, "^weight has dtype float16; it must be float32$"),
    (
        {"hidden": torch.zeros(3, 24).bfloat16(), "weight": torch.zeros(37, 24).half()},
        TypeError,
        "^weight has dtype float16; it must be bfloat16, as hidden, or float32$",
    ),
    ({"weight": torch.zeros(37, 23)}, ValueError, r"^weight has shape \(37, 23\); it must be \(vocabulary, dim\)"),
    ({"weight": torch.zeros(0, 24)}, ValueError, r"^weight has shape \(0, 24\)"),
    ({"soft_cap": 0.0}, ValueError, "^soft_cap is 0; it must be None, or finite and greater than 0"),
    ({"soft_cap": -3.0}, ValueError, "^soft_cap is -3; "),
    ({"soft_cap": float("nan")}, ValueError, "^soft_cap is -?nan; "),
    ({"label_smoothing": 1.5}, ValueError, "^label_smoothing is 1.5; it must be from 0 to 1"),
    ({"label_smoothing": float("nan")}, ValueError, "^label_smoothing is -?nan; "),
    ({"z_loss": -1.0}, ValueError, "^z_loss is -1; it must be at least 0"),
    ({"z_loss": float("inf")}, ValueError, "^z_loss is inf; "),
    ({"reduction": "average"}, ValueError, "^reduction is 'average'; it must be 'mean', 'sum' or 'none'"),
    ({"ignore_index": 1.5}, TypeError, "^ignore_index is 1.5; it must be a whole number"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=[str(k)[:60] for k, _, _ in WRONG])
def test_wrong_arguments(wrong, kind, message):
    hidden, weight, labels = problem(torch.float32, "cpu", 3)
    with pytest.raises(kind, match=message):
        ops.linear_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **wrong})


def test_numbers_are_checked_of_no_tokens_too():
    with pytest.raises(ValueError, match=r"^soft_cap is 0; "):
        ops.linear_cross_entropy(torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(0, dtype=torch.long), soft_cap=0.0)


# --- CUDA ---


@pytest.mark.cuda
@pytest.mark.parametrize("vocabulary", [50304, 50257, 28700, 70001, 131072, 262147])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_vocabularies(nan_memory, vocabulary, dtype):
    """A row in one block, in clusters of two, four and eight, and read twice."""
    hidden, weight, labels = problem(dtype, "cuda", 300, dim=64, vocabulary=vocabulary)
    labels[7] = vocabulary - 1
    with nan_memory():
        for cap in (None, 30.0):
            first = check(hidden, weight, labels, soft_cap=cap, label_smoothing=0.1, z_loss=1e-4, bound=5e-3)
            again = results(
                ops.linear_cross_entropy, hidden, weight, labels, soft_cap=cap, label_smoothing=0.1, z_loss=1e-4
            )
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.cuda
def test_memory_on_cuda():
    tokens, dim, vocabulary = 16384, 2048, 50304
    hidden = torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, dim, device="cuda") / 32).bfloat16().requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), device="cuda")

    def run():
        return torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels, soft_cap=30.0), (hidden, weight))

    run()  # cuBLAS's own workspace stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = run()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 0.8 * 2**30
    del gradients


@pytest.mark.cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_waits_for_the_gpu(reduction):
    hidden, weight, labels = problem(torch.bfloat16, "cuda", 3000, vocabulary=1000)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    results(ops.linear_cross_entropy, hidden, weight, labels)
    ones = torch.ones((), device="cuda") if reduction == "mean" else torch.ones(3000, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = ops.linear_cross_entropy(*leaves, labels, soft_cap=30.0, reduction=reduction)
        torch.autograd.grad(loss, leaves, ones)
    finally:
        torch.cuda.set_sync_debug_mode("default")


OUT_OF_RANGE = """
import torch
from flash_xlstm import ops
hidden, weight = torch.randn(5, 16, device="cuda"), torch.randn(9, 16, device="cuda")
labels = torch.tensor([0, 1, {label}, 3, 4], device="cuda")
loss = ops.linear_cross_entropy(hidden, weight, labels)
print("a loss:", loss.item())
"""


@pytest.mark.cuda
@pytest.mark.parametrize("label", [9, -1, 2**40])
def test_labels_out_of_range_end_in_an_error(label):
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE.format(label=label)], capture_output=True, text=True)
    assert done.returncode != 0 and "a loss" not in done.stdout
    assert "labels are out of range" in done.stdout + done.stderr


def test_random_problems(fuzz, device):
    @fuzz(100)
    @hypothesis.given(
        st.lists(st.integers(4, 9), min_size=2, max_size=3), st.integers(4, 40), st.integers(2, 300),
        st.sampled_from(DTYPES), st.sampled_from(["mean", "sum", "none"]), st.sampled_from([None, 3.0, 30.0]),
        st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 1e-2]), st.booleans(), st.integers(0, 1000),
    )  # fmt: skip
    def run(shape, dim, vocabulary, dtype, reduction, cap, smoothing, z_loss, strided, seed):
        hidden, weight, labels = problem(dtype, device, *shape, dim=dim, vocabulary=vocabulary, seed=seed)
        if strided:
            hidden, weight = torch.stack([hidden, hidden], -1)[..., 0], weight.t().contiguous().t()
        check(
            hidden, weight, labels, reduction=reduction, soft_cap=cap, label_smoothing=smoothing, z_loss=z_loss,
            bound=max(1e-5, 2 * BOUNDS[dtype]),
        )  # fmt: skip

    run()
