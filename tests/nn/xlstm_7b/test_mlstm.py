from __future__ import annotations

import copy

import pytest
import torch

from flash_xlstm import reference
from flash_xlstm.nn import FeedForward, mLSTMBlock, mLSTMLayer


def _layer(**options):
    torch.manual_seed(0)
    layer = mLSTMLayer(24, 2, qk_dim=12, v_dim=20, **options)
    for name, p in layer.named_parameters():
        if "gate" in name:
            torch.nn.init.normal_(p)
    return layer


def _x(batch, seq, size=24):
    return torch.randn(batch, seq, size, generator=torch.Generator().manual_seed(1))


def test_is_projections_op_norm_and_gate():
    layer = _layer(gate_soft_cap=3.0, eps=1e-2).double()
    x = _x(2, 9).double()
    q, k, v = (proj(x).view(2, 9, 2, -1) for proj in (layer.q, layer.k, layer.v))
    i, f = (3.0 * torch.tanh(proj(x) / 3.0) for proj in (layer.igate_preact, layer.fgate_preact))
    h = reference.mlstm_recurrent(q, k, v, i, f, eps=1e-2)
    expected = layer.out_proj(torch.sigmoid(layer.ogate_preact(x)) * layer.multihead_norm(h))
    for kernel in ("chunkwise", "parallel", "recurrent"):
        other = _layer(gate_soft_cap=3.0, eps=1e-2, kernel=kernel).double()
        y, state = other(x)
        assert state is None
        assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    y, _ = _layer(gate_soft_cap=3.0, eps=1e-2)(x.float())
    assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"step_kernel": "reference", "kernel": "recurrent"}])
def test_state_and_step(options):
    layer, x = _layer(**options), _x(2, 9)
    whole, last = layer(x, return_state=True)
    first, state = layer(x[:, :8], return_state=True)
    kept = tuple(t.detach().clone() for t in state)
    second, new = layer(x[:, 8:], state, return_state=True, inplace=True)  # gradients on: not in place
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    with torch.no_grad():
        stepped, written = layer(x[:, 8:], kept, return_state=True, inplace=True)
        assert layer(x[:, 8:], state)[1] is None
    if options == {}:
        assert written is kept
    for y in (second, stepped):
        assert torch.allclose(torch.cat([first, y], 1), whole, atol=1e-5)
    for a, b, c in zip(last, new, written, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and torch.allclose(a, c, atol=1e-5)


@pytest.mark.parametrize("weight_mode", ["single", "fused"])
def test_gates_in_the_dtype_of_q(weight_mode):
    """The kernels cap 16-bit gates in float32."""
    exact, layer = _layer(gate_soft_cap=0.5, kernel="recurrent").double(), _layer(gate_soft_cap=0.5).bfloat16()
    exact.load_state_dict(layer.state_dict())
    layer.set_weight_mode(weight_mode)
    x = _x(2, 30).bfloat16()
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[0, :20] = True
    expected, want = exact(x.double(), None, padding, return_state=True)
    y, state = layer(x, None, padding, return_state=True)
    assert y.dtype == torch.bfloat16
    assert (y - expected)[~padding].norm() <= 2e-2 * expected[~padding].norm()
    assert all((a - b).norm() <= 2e-2 * b.norm() for a, b in zip(state, want, strict=True))


@pytest.mark.parametrize("gate_soft_cap", [15.0, None])
def test_padding_leaves_the_state_alone(gate_soft_cap):
    layer, x = _layer(gate_soft_cap=gate_soft_cap), _x(2, 9)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, :4] = True
    padding[1, 6:] = True
    y, state = layer(x, None, padding, return_state=True)
    first, first_state = layer(x[:1, 4:], return_state=True)
    second, second_state = layer(x[1:, :6], return_state=True)
    assert torch.allclose(y[0, 4:], first[0], atol=1e-6) and torch.allclose(y[1, :6], second[0], atol=1e-6)
    for a, b, c in zip(state, first_state, second_state, strict=True):
        assert torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1], c[0], atol=1e-6)
    assert torch.isfinite(y).all()


def test_float16_state_is_kept():
    layer, x = _layer(), _x(1, 5)
    with torch.no_grad():
        expected, _ = layer(x)
        _, (c, n, m) = layer(x[:, :4], return_state=True)
        half = c.half()
        y, state = layer(x[:, 4:], (half, n, m), return_state=True, inplace=True)
    assert state[0] is half and torch.allclose(y, expected[:, 4:], atol=1e-2)


@pytest.mark.parametrize("use_bias", [False, True])
def test_float64_takes_the_plain_forms(use_bias):
    """Kernel names do not change with the dtype. float64 and float32 layers differ by rounding only."""
    wide = mLSTMBlock(24, _layer(use_bias=use_bias), FeedForward(24, 48, use_bias=use_bias), use_bias=use_bias)
    narrow = copy.deepcopy(wide)
    wide.double()
    x = _x(2, 9)
    outputs, gradients = [], []
    for block, inputs in ((narrow, x), (wide, x.double())):
        y, state = block(inputs[:, :8], return_state=True)
        last, state = block(inputs[:, 8:], state, None, True)
        (last.sum() + y.square().sum()).backward()
        outputs.append((y, last, *state))
        gradients.append([p.grad for p in block.parameters()])
    assert all(t.dtype == torch.float64 for t in outputs[1])
    for a, b in zip(outputs[0] + tuple(gradients[0]), outputs[1] + tuple(gradients[1]), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9
    with torch.no_grad():
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            _, (c, n, m) = wide(x[:, :8].double(), return_state=True)
            c = c.to(dtype)
            stepped, state = wide(x[:, 8:].double(), (c, n, m), None, True, True)
            assert state[0] is c
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-1}[dtype]
            for a, b in zip((stepped, *state), outputs[1][1:], strict=True):
                assert (a - b).norm() <= tolerance * b.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_of_any_dtype(dtype):
    layer, x = _layer(), _x(5, 9)
    _, given = layer(x[:, :8], return_state=True)
    expected, after = layer(x[:, 8:], given, return_state=True)
    given = tuple(t.to(dtype) for t in given)
    strided = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in given)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 5e-2
    y, new = layer(x[:, 8:], given, return_state=True)
    assert new[1].dtype == torch.float32 and torch.allclose(y, expected, atol=tolerance)
    for state in (given, strided):
        y, written = layer(x[:, 8:], state, return_state=True, inplace=True)
        assert all(a is b for a, b in zip(written, state, strict=True))
        assert (y - expected).norm() <= tolerance * expected.norm()
        for a, b in zip(written, after, strict=True):
            assert a.dtype == dtype and (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("use_bias", [False, True])
def test_an_empty_batch_gives_nothing(dtype, use_bias):
    block = mLSTMBlock(24, _layer(use_bias=use_bias), FeedForward(24, 48, use_bias=use_bias)).to(dtype)
    x = _x(0, 5).to(dtype)
    y, state = block(x, return_state=True)
    assert y.shape == x.shape and [t.shape for t in state] == [(0, 2, 6, 10), (0, 2, 6), (0, 2)]
    y.sum().backward()
    assert all(not p.grad.any() for p in block.parameters())
    with torch.no_grad():
        y, state = block(x[:, :1], state, None, True, True)
    assert y.shape == (0, 1, 24) and state[0].shape[0] == 0


def test_block_is_residual():
    layer = _layer()
    block = mLSTMBlock(24, layer, FeedForward(24, 48), use_bias=True)
    x = _x(1, 5)
    y, _ = block(x)
    middle = x + layer(block.norm_mlstm(x))[0]
    assert torch.allclose(y, middle + block.ffn(block.norm_ffn(middle)), atol=1e-6)


@pytest.mark.parametrize("kernel", ["flash", "chunkwise", "parallel", "recurrent"])
def test_packed_sequences(kernel):
    layer, x, cu_seqlens = _layer(kernel=kernel), _x(1, 9), torch.tensor([0, 2, 3, 9], dtype=torch.int32)
    whole, state = layer(x, return_state=True, cu_seqlens=cu_seqlens)
    parts, states = zip(*(layer(part, return_state=True) for part in x.split([2, 1, 6], 1)), strict=True)
    assert torch.allclose(whole, torch.cat(parts, 1), rtol=1e-5, atol=1e-6)
    for together, alone in zip(state, zip(*states, strict=True), strict=True):
        assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    ffn = FeedForward(24, 32)
    block = mLSTMBlock(24, layer, ffn)
    y, _ = block(x, cu_seqlens=cu_seqlens)
    assert torch.allclose(y, torch.cat([block(part)[0] for part in x.split([2, 1, 6], 1)], 1), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seqlens is given, but a step takes one token"):
        block(x[:, :1], state=tuple(t[:1] for t in state), inplace=True, cu_seqlens=cu_seqlens)


def test_errors():
    with pytest.raises(ValueError, match=r"qk_dim is 10.*multiple of num_heads, which is 4"):
        mLSTMLayer(20, 4)
    with pytest.raises(ValueError, match="v_dim is 3"):
        mLSTMLayer(8, 4, v_dim=3)
    with pytest.raises(ValueError, match=r"kernel is 'fast'.*flash, chunkwise"):
        mLSTMLayer(8, 4, kernel="fast")
    with pytest.raises(ValueError, match="step_kernel is 'fast'"):
        mLSTMLayer(8, 4, step_kernel="fast")
    with pytest.raises(ValueError, match="weight_mode is 'both'"):
        mLSTMLayer(8, 4, weight_mode="both")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("padding", "error", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.long), TypeError, "padding has dtype int64; it must be bool, True at padding"),
        (torch.zeros(2, 1).bool(), ValueError, r"padding has shape \(2, 1\); it must be that of x, \(2, 9\)"),
        ([[False] * 9] * 2, TypeError, "padding is a list; it must be a tensor"),
        (torch.zeros(2, 9, device="meta").bool(), ValueError, "padding is on meta; it must be on the device of x, cpu"),
    ],
)
def test_wrong_padding_is_refused(padding, error, message, grad):
    layer = _layer()
    for part in (layer, mLSTMBlock(24, layer, FeedForward(24, 32))):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
            part(_x(2, 9), padding=padding)
