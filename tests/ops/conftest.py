"""Random mLSTM problems, their outputs and gradients, and bounds of the error against float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_xlstm import reference

STATE = ("c", "n", "m")
_GATES = ("di", "df", "dm")


@dataclasses.dataclass
class Problem:
    """A random problem. It has inputs by name (q, k, v, i, f and, with an initial state, c, n, m), options of the op,
    and gradients of the results: h, "last c", "last n" and "last m". `parts` are the names of the state's parts; a
    gradient may be None. `plain` is the chunkwise form to compare with."""

    inputs: dict[str, Tensor]
    cotangents: dict[str, Tensor]
    options: dict
    parts: tuple[str, ...] = STATE
    plain: Callable = reference.mlstm_chunkwise

    def __call__(self, form, through=("h", "last c", "last n", "last m"), dtype=None, **options) -> dict[str, Tensor]:
        """Results of `form` and the gradients of the inputs ("dq", ...) through the results `through`. With `dtype` the
        inputs are converted first."""
        inputs = {}
        for name, t in self.inputs.items():
            # The layout is kept: detach() shares the memory.
            inputs[name] = (t.detach() if dtype is None else t.to(dtype)).requires_grad_()
        state = tuple(inputs.get(name) for name in self.parts) if "c" in inputs else None
        h, last = form(
            *(inputs[name] for name in "qkvif"),
            initial_state=state,
            return_final_state=True,
            **{**self.options, **options},
        )
        results = {"h": h, **{f"last {name}": t for name, t in zip(self.parts, last, strict=True) if t is not None}}
        assert set(results) == set(self.cotangents)
        through = [name for name in through if name in results]
        gradients = torch.autograd.grad(
            [results[name] for name in through],
            list(inputs.values()),
            [self.cotangents[name].to(results[name].dtype) for name in through],
            allow_unused=True,
        )
        values = {name: t.detach() for name, t in results.items()}
        for (name, t), g in zip(inputs.items(), gradients, strict=True):
            values[f"d{name}"] = torch.zeros_like(t) if g is None else g
        return values

    def pad(self, padding: Tensor) -> None:
        """Makes the tokens `padding` (batch, seq) neutral, with a gradient of 0 for their h."""
        i, f = (self.inputs[x].clone() for x in "if")
        i[padding], f[padding] = -torch.inf, torch.inf
        self.inputs.update(i=i, f=f)
        self.cotangents["h"][padding] = 0.0

    def avoid_kinks(self) -> None:
        """Sets the gradient of the final m such that the loss does not depend on the scaling of c and n. Otherwise the
        loss has a kink where the stabilizer changes its branch. A rounding near the kink then moves a whole gradient
        from one gate to another."""
        if "last m" not in self.cotangents:
            return
        state = self.reference(through=("h",))
        shares = (self.cotangents[f"last {x}"].double() * state[f"last {x}"] for x in "cn")
        self.cotangents["last m"] = sum(share.flatten(2).sum(-1) for share in shares).float()

    def row_without(self, row: int, padding: Tensor) -> Problem:
        """One batch row without its padding."""
        kept = ~padding[row]
        take = lambda name, t: t[row : row + 1] if name[-1] in STATE else t[row : row + 1, kept]  # noqa: E731
        inputs, cotangents = ({n: take(n, t) for n, t in d.items()} for d in (self.inputs, self.cotangents))
        return dataclasses.replace(self, inputs=inputs, cotangents=cotangents)

    def reference(self, **call) -> dict[str, Tensor]:
        call.setdefault("chunk_size", 64)
        return self(self.plain, dtype=torch.float64, **call)

    def conditioning(self, expected, through) -> dict[str, float]:
        """The change of the float64 results for a change of the inputs by a float32 rounding. No float32 kernel can be
        more exact."""
        moved = dict.fromkeys(expected, 0.0)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            noise = lambda t: torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device)  # noqa: B023, E731
            inputs = {name: t.double() * (1 + (2 * noise(t) - 1) * 2**-24) for name, t in self.inputs.items()}
            values = dataclasses.replace(self, inputs=inputs).reference(through=through)
            moved = {name: max(was, relative_error(values[name], expected[name])) for name, was in moved.items()}
        return moved

    def shared(self, expected, through) -> float:
        """The size of the sums dh . h, <c, dc> + <n, dn> and dm. The gates' gradients add up to these."""
        per_state = lambda t: t.flatten(2).sum(-1) if t.dim() > 2 else t  # noqa: E731
        parts = []
        if "h" in through:
            parts.append((self.cotangents["h"].double() * expected["h"]).sum(-1))
        for name in ("last c", "last n"):
            if name in through and name in expected:
                parts.append(per_state(self.cotangents[name].double() * expected[name]))
        if "last m" in through and "last m" in expected:
            parts.append(self.cotangents["last m"].double())
        return torch.cat([part.flatten() for part in parts]).norm().item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|, in float64; 0 of nothing."""
    difference, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return difference / max(size, 1e-300)


def _draw(device, batch, seq, heads, dqk, dv, dtype, gate_dtype, gates, layout, state, num_states, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731

    def laid_out(t: Tensor, dtype: torch.dtype) -> Tensor:
        t = t.to(device, dtype)
        if layout == "contiguous":
            return t
        if layout == "heads first":  # (batch, heads, seq, dim) in memory
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        assert layout == "slice"  # of a wider tensor; odd offset and strides
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=dtype, device=device)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    def gate() -> Tensor:
        shape = (batch, seq, heads)
        if gates == "spread":  # over the range of a cap of 15
            return torch.rand(shape, generator=generator) * 30 - 15
        if gates == "beyond":  # a cap of 15: up to where its slope is 1e-3
            return torch.rand(shape, generator=generator) * 120 - 60
        return normal(*shape) * {"small": 0.1, "normal": 1.0}[gates]

    inputs = {
        name: laid_out(normal(batch, seq, heads, dim), dtype) for name, dim in (("q", dqk), ("k", dqk), ("v", dv))
    }
    for name in "if":
        inputs[name] = laid_out(gate(), gate_dtype or torch.float32)
    shapes = {"c": (num_states, heads, dqk, dv), "n": (num_states, heads, dqk), "m": (num_states, heads)}
    shapes = {name: shapes[name] for name in parts}
    if state:
        inputs.update({name: normal(*shape).to(device) for name, shape in shapes.items()})
    cotangents = {"h": normal(batch, seq, heads, dv).to(device, dtype)}
    cotangents.update({f"last {name}": normal(*shape).to(device) for name, shape in shapes.items()})
    return inputs, cotangents


@pytest.fixture
def make_problem(device):
    """``make_problem(seq, dqk, dv, ...)``: a random Problem on the device; for mlstm, or with `normalize` True or False
    for mlstm_sig."""

    def make(
        seq, dqk, dv, *, batch=2, heads=2, dtype=torch.float32, gate_dtype=None, gates="normal", layout="contiguous",
        state=True, seed=0, cu_seqlens=None, normalize=None, **options,
    ) -> Problem:  # fmt: skip
        num_states = batch
        if cu_seqlens is not None:
            options["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
            num_states = len(cu_seqlens) - 1
        parts, plain, drawn = STATE, reference.mlstm_chunkwise, STATE
        if normalize is not None:
            parts, plain, options["normalize"] = ("c", "n"), reference.mlstm_sig_chunkwise, normalize
            drawn = parts if normalize else ("c",)
        sizes = (batch, seq, heads, dqk, dv)
        inputs, cotangents = _draw(device, *sizes, dtype, gate_dtype, gates, layout, state, num_states, drawn, seed)
        return Problem(inputs, cotangents, options, parts, plain)

    return make


def _float32_excess(problem, actual, expected, through, strict, small) -> list[str]:
    wrong = []
    conditioning = functools.cache(lambda: problem.conditioning(expected, through))
    plain = functools.cache(lambda: problem(problem.plain, through, chunk_size=64))
    shared = problem.shared(expected, through)
    for name, want in expected.items():
        assert actual[name].shape == want.shape, name
        size, error = want.norm().item(), relative_error(actual[name], want)
        # A gradient may be 0 up to rounding, or below float32's range.
        if error <= 1e-5 or error * size <= 1e-15 * shared + 1e-37:
            continue
        # A gate's gradient may be a small difference of the sums that all gates' gradients add up to.
        if not strict and name in _GATES and error * size <= 1e-6 * shared:
            continue
        if not strict and error <= 4 * conditioning()[name]:
            continue
        if small and (error * size <= 2e-7 * shared or error <= 4 * relative_error(plain()[name], want)):
            continue
        wrong.append(f"{name}: error {error:.1e} of {size:.1e}, from sums of {shared:.1e}")
    return wrong


@pytest.fixture
def assert_float32_exact():
    """``assert_float32_exact(problem, form, through, strict=True)``: within 1e-5 of float64, tensor by tensor.

    strict=False is for gates over the whole range of a cap. Random inputs then come close to singular ones (s_t = 0 is
    a divisor), and some gates' gradients nearly cancel. It allows 4 times the effect of a rounding of the inputs on the
    float64 result, and for gates' gradients 1e-6 of the sums that they add up to.

    `small` is for problems of a token or two, in which whole gradients may be 0 up to rounding (h of a single token
    does not depend on the size of q). It allows 4 times the error of the plain form in float32, or 2e-7 of those sums.
    """

    def check(problem, form, through=("h", "last c", "last n", "last m"), strict=True, small=False):
        expected = problem.reference(through=through)
        wrong = _float32_excess(problem, problem(form, through), expected, through, strict, small)
        assert not wrong, "; ".join(wrong)

    return check


@pytest.fixture
def assert_16_bit_exact():
    """``assert_16_bit_exact(problem, form, through)``: at most 1.5 times the error of the plain chunkwise form in the
    same dtype, and at most 1e-2. Where the plain form's error is below a rounding of the inputs (few tokens; a gradient
    that it keeps in float32), at most 1.5 times that rounding. A step of the result's subnormal numbers is allowed.

    `small` is for problems of a token or two, whose terms may cancel. The plain form's error may then be of any size,
    and a gate's gradient, or dn, may be off by a rounding of the sums that the gates' gradients add up to.

    `ratios`, a dict, is for many random problems. Of a result of few numbers, one or two hold most of the error, and
    the plain form's may be small by chance. Fewer than 1,000 may then be four times as far off; the dict gets by how
    much each is, in lists by name, and the caller looks at their means."""

    def check(problem, form, through=("h", "last c", "last n", "last m"), small=False, ratios=None):
        expected = problem.reference(through=through)
        actual = problem(form, through)
        plain = problem(problem.plain, through, chunk_size=64)
        shared = problem.shared(expected, through)
        wrong = []
        rounding = torch.finfo(problem.inputs["q"].dtype).eps / 2
        for name, want in expected.items():
            assert actual[name].shape == want.shape, name
            largest = torch.finfo(actual[name].dtype).max
            fits = want.abs() <= largest * (1 - 2e-3)
            # Beyond the dtype, infinite or next to it.
            assert (actual[name][~fits].abs() >= largest * (1 - 4e-3)).all(), name
            ours, of_plain = (relative_error(t[name][fits], want[fits]) for t in (actual, plain))
            times, least = 1.5, max(rounding, of_plain if of_plain == of_plain else 1.0)
            if ratios is not None and want.numel() < 1000:
                times = 4
                ratios.setdefault(name, []).append(ours / least)
            bound = min(1.0 if small else 1e-2, times * least)
            size, info = want.norm().item(), torch.finfo(actual[name].dtype)
            step = info.tiny * info.eps * want.numel() ** 0.5
            if ours <= bound or ours * size <= max(step, 1e-15 * shared + 1e-37):
                continue
            if small and name in (*_GATES, "dn") and ours * size <= rounding * shared:
                continue
            wrong.append(
                f"{name}: error {ours:.1e} of {size:.1e}, bound {bound:.1e}, plain {of_plain:.1e}, sums {shared:.1e}"
            )
        assert not wrong, "; ".join(wrong)

    return check


@pytest.fixture
def assert_padding_changes_nothing():
    """``assert_padding_changes_nothing(problem, form, padding)``: results are those without the tokens `padding` (2,
    seq), and the gradients of these tokens are 0."""

    def check(problem, form, padding):
        problem.pad(padding)
        problem.avoid_kinks()
        got = problem(form)
        assert all(t.isfinite().all() for t in got.values())
        tolerance = 1e-5 if problem.inputs["q"].dtype == torch.float32 else 1e-2
        for row in range(2):
            for name, t in problem.row_without(row, padding)(form).items():
                mine = got[name][row]
                if name[-1] not in STATE:
                    if name != "h":
                        assert not mine[padding[row]].any(), name
                    mine = mine[~padding[row]]
                assert (mine - t[0]).norm() <= tolerance * t.norm(), name

    return check


@pytest.fixture
def nan_memory():
    """``with nan_memory():`` allocated memory holds NaN until it is written, so that unwritten results show."""

    class Filled:
        def __enter__(self):
            self.before = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(True)
            assert torch.utils.deterministic.fill_uninitialized_memory
            assert torch.empty(3).isnan().all()
            if torch.cuda.is_available():  # scratch that is not a tensor comes from the allocator's free blocks
                torch.cuda.empty_cache()
                blocks = [torch.full((size,), torch.nan, device="cuda") for size in [1 << 18] * 16 + [1 << 26]]
                del blocks

        def __exit__(self, *exception):
            torch.use_deterministic_algorithms(self.before)

    return Filled
