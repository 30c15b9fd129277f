"""A block's halves as one autograd function each: equal to the modules one by one, and what they keep."""

import pytest
import torch
from torch import nn

from flash_xlstm import ops
from flash_xlstm.nn.xlstm_7b import FeedForward, RMSNorm, block, mLSTMBlock, mLSTMLayer, products, residual
from flash_xlstm.ops.mlstm_gated import mlstm_gated

HIDDEN, HEADS = 64, 2


def make_block(device="cpu", dtype=torch.float32, weight_mode="single", heads=HEADS, **layer):
    torch.manual_seed(3)
    built = mLSTMBlock(
        HIDDEN,
        mLSTMLayer(HIDDEN, heads, weight_mode=weight_mode, **layer),
        FeedForward(HIDDEN, 96, weight_mode=weight_mode),
    )
    for p in built.parameters():
        nn.init.normal_(p, std=0.3)
    return built.to(device, dtype).train()


def gradients(built, x, again=False, **arguments):
    built.zero_grad()
    x = x.detach().requires_grad_()
    built._again = again
    y, state = built(x, **arguments)
    assert state is None
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape).to(y))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in built.named_parameters()}}


def modules_one_by_one(monkeypatch, built, x, **arguments):
    with monkeypatch.context() as patch:
        patch.setattr(residual, "serves", lambda x: False)
        return gradients(built, x, **arguments)


def check_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_close(actual, expected):
    """Equal but for the order of sums: in float32 a few roundings apart, in 16 bits one."""
    bound = max(torch.finfo(actual.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    assert (actual - expected).double().norm() <= bound * expected.double().norm()


def error(name, got, expected):
    """Of the gradients called `name`. A gate's bias gets a sum over tokens that may cancel: it is as exact as what the
    gate's weight gets, a sum of the same terms times the norm's outputs."""
    size = expected[name].double().norm()
    if name.endswith("preact.bias"):
        size = max(size, expected[name.replace("bias", "weight")].double().norm())
    return ((got[name].double() - expected[name].double()).norm() / size).item()


@pytest.fixture(params=["single", "fused"])
def weight_mode(request):
    return request.param


# With one head the gates' gradients, 8 bytes a row, do not lie beside the projections'.
@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_halves_equal_the_modules(device, weight_mode, heads, again, padded, monkeypatch):
    built = make_block(device, weight_mode=weight_mode, heads=heads)
    x = torch.randn(2, 37, HIDDEN, device=device)
    padding = None
    if padded:
        padding = torch.zeros(2, 37, dtype=torch.bool, device=device)
        padding[0, :5] = padding[1, 30:] = True
    expected = modules_one_by_one(monkeypatch, built.double(), x.double(), padding=padding)
    built.float()
    plain = modules_one_by_one(monkeypatch, built, x, padding=padding)
    used = []
    for name in ("run_mlstm", "run_feed_forward"):
        run = getattr(residual, name)
        monkeypatch.setattr(residual, name, lambda *a, run=run, name=name: (used.append(name), run(*a))[1])
    got = gradients(built, x, again, padding=padding)
    assert used == ["run_mlstm", "run_feed_forward"]
    if padded:  # what comes out at padding means nothing
        for all_of in (expected, plain, got):
            all_of.update(x=all_of["x"][~padding], y=all_of["y"][~padding])
    for name in expected:
        assert error(name, got, expected) < max(2e-6, 2 * error(name, plain, expected)), name


@pytest.mark.parametrize("heads", [HEADS, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_in_16_bits_are_as_exact_as_the_modules(device, weight_mode, heads, dtype, monkeypatch):
    built = make_block(device, dtype, weight_mode, heads)
    x = torch.randn(4, 64, HIDDEN, device=device).to(dtype)
    plain = modules_one_by_one(monkeypatch, built, x)
    got, again = gradients(built, x), gradients(built, x, again=True)
    expected = modules_one_by_one(monkeypatch, built.double(), x.double())
    for name in expected:
        bound = 1.5 * error(name, plain, expected) + torch.finfo(dtype).eps
        assert error(name, got, expected) < bound and error(name, again, expected) < bound, name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_of_sizes_that_hopper_multiplies(weight_mode, dtype, monkeypatch):
    """Of projections of 128 columns and more: none is joined where the package's products take them."""
    torch.manual_seed(3)
    layer, ffn = mLSTMLayer(256, 2, weight_mode=weight_mode), FeedForward(256, 384, weight_mode=weight_mode)
    built = mLSTMBlock(256, layer, ffn).cuda()
    for p in built.parameters():
        nn.init.normal_(p, std=0.15)
    built, x = built.to(dtype).train(), torch.randn(4, 100, 256, device="cuda").to(dtype)
    plain = modules_one_by_one(monkeypatch, built, x)
    got, again = gradients(built, x), gradients(built, x, again=True)
    compiled = {}
    for dynamic in (False, True):
        torch._dynamo.reset()
        call = torch.compile(built, fullgraph=True, dynamic=dynamic)
        compiled[dynamic] = x.detach().clone().requires_grad_()
        built.zero_grad()
        built._again = False
        y, _ = call(compiled[dynamic])
        torch.manual_seed(5)
        y.backward(torch.randn(y.shape).to(y))
    expected = modules_one_by_one(monkeypatch, built.double(), x.double())
    for name in expected:
        bound = 1.5 * error(name, plain, expected) + torch.finfo(dtype).eps
        assert error(name, got, expected) < bound and error(name, again, expected) < bound, name
    assert torch.equal(got["ffn.proj_down.weight"], again["ffn.proj_down.weight"])  # z is made again by the same kernel
    for leaf in compiled.values():
        check_close(leaf.grad, got["x"])


def test_gradients_are_the_same_from_run_to_run(device, weight_mode):
    built = make_block(device, torch.bfloat16, weight_mode, 4)
    x = torch.randn(2, 100, HIDDEN, device=device).bfloat16()
    first, second = gradients(built, x), gradients(built, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "frozen", ["mlstm_layer.q", "ifgate", "igate", "norm", "ffn.proj_up", "proj_down", "out_proj", ""]
)
def test_frozen_parameters_get_no_gradient(weight_mode, frozen, monkeypatch):
    built = make_block(weight_mode=weight_mode)
    for name, p in built.named_parameters():
        p.requires_grad_(frozen not in name)
    x = torch.randn(1, 9, HIDDEN)
    expected, got = modules_one_by_one(monkeypatch, built, x), gradients(built, x)
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-5), name


def saved_bytes(built, x, again=False):
    """Of the tensors that a forward keeps beside the parameters, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in built.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    built._again = again
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = built(x)
    del y
    return sum(kept.values())


def test_what_is_kept(weight_mode):
    built, tokens = make_block(weight_mode=weight_mode), 128
    x = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    qk, v, up = HIDDEN // 2, HIDDEN, 96
    small = 2 * HEADS + 2 * HEADS  # gates; s and m
    states = qk * (v // HEADS + 2) + 16  # at the 64th token
    # x of both halves, q, k, v, o, h, the mLSTM's output, SwiGLU's inputs
    assert saved_bytes(built, x) == 4 * tokens * (2 * HIDDEN + 2 * qk + 2 * v + 2 * v + 2 * up + small) + 4 * states
    assert saved_bytes(built, x, again=True) == 4 * tokens * (2 * HIDDEN + v + 2 * HEADS)


def test_a_compiled_block_is_one_graph_with_the_halves(weight_mode, monkeypatch):
    built = make_block(weight_mode=weight_mode)
    x = torch.randn(2, 20, HIDDEN)
    expected = gradients(built, x)
    names = set()

    def look(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(built, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    x = x.detach().requires_grad_()
    built.zero_grad()
    y, _ = compiled(x)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape))
    assert {"flash_xlstm.mlstm_gated_backward.default", "flash_xlstm.swiglu_joined_backward.default"} <= names
    assert torch.allclose(y, expected["y"], rtol=1e-5, atol=1e-5)
    for name, p in built.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-4), name


def test_a_block_compiled_with_dynamic_shapes_is_one_graph(weight_mode):
    """The width of x is the block's, not a symbol: torch 2.11 fails where one is settled within a half."""
    built = make_block(weight_mode=weight_mode)
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq in (20, 24):
        x = torch.randn(3, seq, HIDDEN)
        expected, leaf = gradients(built, x), x.clone().requires_grad_()
        y, _ = compiled(leaf)
        torch.manual_seed(5)
        y.backward(torch.randn(y.shape))
        check_close(leaf.grad, expected["x"])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, HIDDEN // 2), (9, HIDDEN)])
def test_x_of_another_shape_is_refused(shape, train):
    built = make_block().requires_grad_(train)
    with pytest.raises(ValueError, match=rf"^x has shape \({shape[0]}, .*; it must be \(batch, seq, {HIDDEN}\)"):
        built(torch.randn(shape))


@pytest.mark.parametrize(
    "longer, shorter, first",
    [(11008, 2048, 8448), (5504, 2048, 4224), (6152, 2048, None), (2048, 2048, None), (21888, 4096, None)],
)
def test_the_first_part_of_a_weights_gradient(longer, shorter, first):
    """Of 5.2, 2.6, 2.9, 0.97 and 20.7 waves of an H200's SMs: whole waves, and no part where little is left unused."""
    assert products._first_part(longer, shorter, 132) == first
    assert products._first_part(longer, shorter, 0) is None and products._first_part(260, 260, 1) is None


@pytest.mark.parametrize("sizes", [(300, 256), (256, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weights_gradient_in_two_parts(device, sizes, dtype, monkeypatch):
    monkeypatch.setattr(products, "_sms", lambda device: 1)
    assert products._first_part(max(sizes), min(sizes), 1) == 128
    left, right = (torch.randn(70, size, device=device).to(dtype) for size in sizes)
    calls = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **kw: (calls.append(a[0].shape), mm(*a, **kw))[1])
    with torch.no_grad():
        got = products.weight_gradient(left, right, None)
    assert len(calls) == 2 and got.is_contiguous()
    assert error("", {"": got}, {"": left.double().t() @ right.double()}) < torch.finfo(dtype).eps
    with torch.enable_grad():  # as torch.compile traces it
        assert torch.equal(products.weight_gradient(left, right, None), got)
    assert products.weight_gradient(left.float(), right.float(), None).dtype == torch.float32 and len(calls) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_whose_weights_gradients_are_made_in_two_parts(device, weight_mode, dtype, monkeypatch):
    torch.manual_seed(3)
    layer, ffn = mLSTMLayer(256, 2, weight_mode=weight_mode), FeedForward(256, 300, weight_mode=weight_mode)
    built = mLSTMBlock(256, layer, ffn)
    for p in built.parameters():
        nn.init.normal_(p, std=0.15)
    built, x = built.to(device, dtype).train(), torch.randn(2, 40, 256, device=device).to(dtype)
    whole = gradients(built, x)
    monkeypatch.setattr(products, "_sms", lambda device: 1)
    assert products._first_part(300, 256, 1) == 128 and products._first_part(600, 256, 1) is None
    for again in (False, True):
        parted = gradients(built, x, again)
        for name in whole:
            check_close(parted[name], whole[name])
    built.zero_grad()
    built._again, leaf = False, x.clone().requires_grad_()
    torch._dynamo.reset()
    y, _ = torch.compile(built, fullgraph=True, backend="aot_eager")(leaf)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape).to(y))
    check_close(leaf.grad, whole["x"])
    check_close(built.ffn.proj_down.weight.grad, whole["ffn.proj_down.weight"])
    y, _ = built(leaf)
    several = torch.randn(3, *y.shape, device=device).to(dtype)
    down = built.ffn.proj_down.weight
    vmapped = torch.func.vmap(lambda g: torch.autograd.grad(y, down, g, retain_graph=True)[0])(several)
    batched = torch.autograd.grad(y, (leaf, down), several, is_grads_batched=True, retain_graph=True)
    for n, of in enumerate(several):
        expected = torch.autograd.grad(y, (leaf, down), of, retain_graph=True)
        check_close(vmapped[n], expected[1])
        check_close(batched[0][n], expected[0])
        check_close(batched[1][n], expected[1])


class _OtherLinear(nn.Linear):
    pass


def _hook_norm(built):
    built.norm_ffn.register_forward_hook(lambda *a: None)


def _other_out(built):
    built.mlstm_layer.out_proj = _OtherLinear(HIDDEN, HIDDEN, bias=False)


def _biased_down(built):
    built.ffn.proj_down = nn.Linear(96, HIDDEN)


@pytest.mark.parametrize(
    "change, halves", [(_hook_norm, ["run_mlstm"]), (_other_out, ["run_feed_forward"]), (_biased_down, ["run_mlstm"])]
)
def test_what_a_half_does_not_know_runs_as_modules(change, halves, monkeypatch):
    built = make_block()
    change(built)
    x = torch.randn(1, 11, HIDDEN)
    expected = modules_one_by_one(monkeypatch, built, x)
    used = []
    for name in ("run_mlstm", "run_feed_forward"):
        run = getattr(residual, name)
        monkeypatch.setattr(residual, name, lambda *a, run=run, name=name: (used.append(name), run(*a))[1])
    got = gradients(built, x)
    assert used == halves
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_see_every_module(weight_mode, kind):
    built = make_block(weight_mode=weight_mode)
    for name, part in built.named_modules():
        seen = []
        handle = getattr(part, kind)(lambda module, *a, seen=seen: seen.append(module))
        gradients(built, torch.randn(1, 5, HIDDEN))
        handle.remove()
        assert seen == [part], name


@pytest.mark.parametrize("kind", ["forward", "full_backward", "full_backward_pre"])
def test_hooks_of_all_modules_see_every_module(weight_mode, kind):
    built, seen = make_block(weight_mode=weight_mode), []
    register = getattr(nn.modules.module, f"register_module_{kind}_hook")
    handle = register(lambda module, *a: seen.append(module))
    try:
        gradients(built, torch.randn(1, 5, HIDDEN))
    finally:
        handle.remove()
    assert {id(module) for module in seen} == {id(module) for module in built.modules()}


def test_the_output_may_be_changed_in_place(weight_mode):
    built = make_block(weight_mode=weight_mode)
    x = torch.randn(2, 7, HIDDEN, requires_grad=True)
    (expected,) = torch.autograd.grad((2 * built(x)[0] + 1).square().mean(), x)
    y, _ = built(x)
    y.mul_(2).add_(1)
    (got,) = torch.autograd.grad(y.square().mean(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("again", [False, True])
def test_a_backward_within_autocast_is_in_the_dtype_of_the_forward(weight_mode, again):
    built = make_block(weight_mode=weight_mode)
    built._again = again
    x = torch.randn(2, 7, HIDDEN, requires_grad=True)
    wanted = [x, *built.parameters()]
    expected = torch.autograd.grad(built(x)[0].square().mean(), wanted)
    loss = built(x)[0].square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(loss, wanted)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


def test_transforms_and_autocast_go_by_the_modules(monkeypatch):
    built = make_block()
    x = torch.randn(1, 5, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not residual.serves(x)
    seen = []
    torch.func.grad(lambda t: (seen.append(residual.serves(t)), t.sum())[1])(x)
    with torch.no_grad():
        seen.append(residual.serves(x))
    assert seen == [False, False] and residual.serves(x)
    with pytest.raises(RuntimeError, match="double backward"):
        y, _ = built(x.requires_grad_())
        (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        g.sum().backward()


def test_swiglu_of_one_tensor(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(3, 7, 50, device=device, dtype=dtype)
        z, dout = wide[..., 4:46], torch.randn(3, 7, 21, device=device, dtype=dtype)
        dz, out = torch.ops.flash_xlstm.swiglu_joined_backward(dout, z, True)
        dx, dy = torch.ops.flash_xlstm.swiglu_backward(dout, z[..., :21], z[..., 21:])
        assert torch.equal(dz, torch.cat((dx, dy), -1))
        assert torch.equal(out, ops.swiglu(z[..., :21], z[..., 21:])) and torch.equal(ops.swiglu(z), out)
        assert torch.ops.flash_xlstm.swiglu_joined_backward(dout, z, False)[1].numel() == 0
        leaf = z.clone().requires_grad_()
        ops.swiglu(leaf).backward(dout)
        assert torch.equal(leaf.grad, dz)
    with pytest.raises(ValueError, match="x has shape"):
        ops.swiglu(z[..., :41])
    with pytest.raises(ValueError, match="dout has shape"):
        torch.ops.flash_xlstm.swiglu_joined_backward(dout[..., :20], z, True)
    torch.library.opcheck(torch.ops.flash_xlstm.swiglu_joined_backward, (dout, z, True))
    torch.library.opcheck(torch.ops.flash_xlstm.swiglu_joined, (z,))


# On CUDA: 64 x 64 and 128 x 256 go by Hopper's kernels where there are such, 24 x 40 by those for every size.
@pytest.mark.parametrize("dqk, dv", [(64, 64), (128, 256), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_mlstm_gated(device, dqk, dv, dtype, packed):
    # Beside the gates of 3 heads no row is a multiple of 16 bytes, and kernels sum in another order.
    batch, seq, heads = (1, 300, 3) if packed else (2, 150, 4)
    same = check_close if packed else check_equal
    sizes = [heads * dqk, heads * dqk, heads * dv, heads * dv]
    z = torch.randn(batch, seq, sum(sizes), device=device, dtype=dtype, requires_grad=True)
    q, k, v, gate = z.detach().split(sizes, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
    i, f = (torch.randn(batch, seq, heads, device=device).add(shift).requires_grad_() for shift in (0, 3))
    weight = torch.randn(heads * dv, device=device, dtype=dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 130, 300], dtype=torch.int32, device=device) if packed else None
    options = (None, 1e-6, 15.0, 0)
    inputs = (z, i, f, weight, cu_seqlens, heads, heads * dqk, *options, 1e-6)
    y, h, kept = mlstm_gated(*inputs)
    dy = torch.randn_like(y)
    dz, di, df, dweight = torch.autograd.grad(y, (z, i, f, weight), dy)
    with torch.no_grad():
        h_alone, kept_alone = torch.ops.flash_xlstm.mlstm_forward(q, k, v, i, f, None, None, None, cu_seqlens, *options)
        assert torch.equal(y, ops.gated_head_norm(h_alone, gate, weight, 1e-6))
        assert torch.equal(h, h_alone) and torch.equal(kept, kept_alone)
        dh, dgate, dweight_alone = torch.ops.flash_xlstm.gated_head_norm_backward(dy, h, gate, weight, 1e-6, True)
        dq, dk, dv_, di_alone, df_alone, *_ = torch.ops.flash_xlstm.mlstm_backward(
            dh, None, None, None, q, k, v, i, f, None, None, None, cu_seqlens, h, kept, *options
        )
    assert torch.equal(dz, torch.cat([t.flatten(2) for t in (dq, dk, dv_)] + [dgate], -1))
    assert torch.equal(di, di_alone) and torch.equal(df, df_alone) and torch.equal(dweight, dweight_alone)
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm_gated, inputs)
    strided = torch.randn(batch, seq, sum(sizes) + 5, device=device, dtype=dtype)[..., 5:]
    again = [t.detach() for t in (dy, strided.copy_(z.detach()), i, f, weight)]
    again += [cu_seqlens, h.detach(), kept.detach(), *inputs[5:], True]
    assert torch.equal(torch.ops.flash_xlstm.mlstm_gated_backward(*again, False)[0], dz)
    beside, *empty = torch.ops.flash_xlstm.mlstm_gated_backward(*again, True)
    same(beside, torch.cat((dz, di.to(dtype), df.to(dtype)), -1))
    assert all(t.numel() == 0 for t in empty[:2])
    again[2:4] = i.detach().to(dtype), f.detach().to(dtype)  # gates of z's dtype: kernels write beside dz themselves
    apart, di, df, _ = torch.ops.flash_xlstm.mlstm_gated_backward(*again, False)
    beside = torch.ops.flash_xlstm.mlstm_gated_backward(*again, True)[0]
    same(beside, torch.cat((apart, di, df), -1))
    torch.library.opcheck(torch.ops.flash_xlstm.mlstm_gated_backward, (*again, True))


def test_mlstm_gated_names_what_is_wrong():
    z, i = torch.randn(1, 4, 24), torch.randn(1, 4, 2)
    good = dict(z=z, i=i, f=i, weight=torch.ones(8), cu_seqlens=None, heads=2, qk_dim=4)
    rest = (None, 1e-6, 15.0, 0, 1e-6)
    mlstm_gated(*good.values(), *rest)
    for name, value, message in (
        ("z", z[0], "z has shape"),
        ("z", z[..., :22], "z has shape"),
        ("z", z.double(), "z has dtype"),
        ("heads", 0, "heads is 0"),
        ("qk_dim", 3, "qk_dim is 3"),
        ("qk_dim", 12, "z has shape"),
        ("i", i[:, :3], "i has shape"),
        ("weight", torch.ones(9), "weight has shape"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            mlstm_gated(*{**good, name: value}.values(), *rest)


def test_rms_norm_backward_makes_the_output_again(device):
    for dtype, dim in ((torch.float32, 48), (torch.bfloat16, 2048), (torch.float16, 33)):
        norm = RMSNorm(dim).to(device, dtype)
        nn.init.normal_(norm.weight)
        x, dy = (torch.randn(5, 11, dim, device=device, dtype=dtype) for _ in range(2))
        dx, dweight, y = torch.ops.flash_xlstm.rms_norm_backward(dy, None, x, norm.weight, 1e-6, True, True)
        alone = torch.ops.flash_xlstm.rms_norm_backward(dy, None, x, norm.weight, 1e-6, True, False)
        assert torch.equal(dx, alone[0]) and torch.equal(dweight, alone[1]) and alone[2].numel() == 0
        assert torch.allclose(y, norm(x), rtol=4e-7 if dtype == torch.float32 else torch.finfo(dtype).eps, atol=0)


def test_the_block_uses_the_halves_only_for_training():
    assert block.residual is residual
    built = make_block()
    x = torch.randn(1, 4, HIDDEN)
    y, _ = built(x)
    with torch.no_grad():
        assert torch.allclose(built(x)[0], y, rtol=1e-5, atol=1e-5)
    y_state, state = built(x, return_state=True)
    assert state is not None and torch.allclose(y_state, y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_knows_the_operators_before_it_meets_them(monkeypatch):
    """Else torch 2.11 writes the graph before an operator into a log line, which doubles with every half block."""
    from torch._inductor import graph, lowering

    for op in [op for op in lowering.lowerings if getattr(op, "namespace", None) == "flash_xlstm"]:
        monkeypatch.delitem(lowering.lowerings, op)  # known from another test
    make_fallback = graph.make_fallback

    def refuse(op, *args, **kwargs):  # what is called for an operator that Inductor meets first
        assert op.namespace != "flash_xlstm", op
        return make_fallback(op, *args, **kwargs)

    monkeypatch.setattr(graph, "make_fallback", refuse)
    built = make_block()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        y, _ = torch.compile(built, fullgraph=True)(torch.randn(1, 8, HIDDEN))
        y.sum().backward()
