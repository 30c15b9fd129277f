"""trainer_state.pt with odd contents: the run is refused in one line, or goes on unaffected."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flash_xlstm import training
from flash_xlstm.training import checkpoint, state

TENSOR = torch.arange(4.0)
ODD = [
    None, True, False, -1, 0, 1, 3, 10**18, 2**63, 10**400, -0.5, 0.5, 1e300, math.nan, math.inf, -math.inf,
    "", "x", "\0", "\ud800", "float16", b"x", [], [1], [[]], {}, {"x": 1}, {1: 2}, (), (1, 2),
    TENSOR, TENSOR[:0], torch.tensor(math.nan), TENSOR.to_sparse(), TENSOR[:1].expand(3), TENSOR.to("meta"),
    TENSOR.byte(), torch.zeros(5056, dtype=torch.uint8), torch.nn.Parameter(TENSOR), torch.tensor(2), torch.tensor(2.0),
]  # fmt: skip
TENSORS = {
    "not a number": lambda t: t.double().masked_fill(torch.arange(t.numel()).view(t.shape) == 0, math.nan).to(t.dtype),
    "infinite": lambda t: t.double().masked_fill(torch.arange(t.numel()).view(t.shape) == 0, math.inf).to(t.dtype),
    "negative": lambda t: -1 - t.abs(),
    "larger": lambda t: torch.cat([t.flatten(), t.flatten()]),
    "smaller": lambda t: t.flatten()[:-1].clone(),
    "flat": lambda t: t.flatten(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() == 2 and min(t.shape) > 1 else t[None].clone(),
    "spread": lambda t: t.flatten()[:1].clone().expand(t.numel()).view(t.shape) if t.numel() > 1 else t.double(),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "parameter": lambda t: torch.nn.Parameter(t.float()),
    "part of another": lambda t: torch.cat([t.flatten(), t.flatten()])[: t.numel()].view(t.shape),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps that was stopped at step 4, and its final weights."""
    folder = tmp_path_factory.mktemp("state")
    text = "".join(f"{n}: the quick brown fox jumps over {n % 7} lazy dogs\n" for n in range(300))
    (folder / "text.txt").write_text(text)
    settings = {"data": folder / "text.txt", "hidden_size": 32, "layers": 1, "heads": 1, "sequence_length": 16}
    settings |= {"batch_size": 2, "warmup": 2, "steps": 8}
    options = {"out": folder / "whole", "device": "cpu", "threads": 1, "log_every": 2, "save_every": 4}
    save = checkpoint.save

    def keep(out, step, *args):
        written = save(out, step, *args)
        if step == 4:
            shutil.copytree(written, folder / "kept" / written.name)
        return written

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", keep)
        training.start(settings, options).run()
    return folder / "kept", load_file(folder / "whole" / "checkpoint-8" / "model.safetensors")


@pytest.fixture
def resumed(run, tmp_path):
    """``resumed(state)``: the error of a run that is resumed from that trainer_state.pt, None if it reached the same
    weights."""
    kept, weights = run

    def call(saved):
        out = tmp_path / "run"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(kept, out)
        torch.save(saved, out / "checkpoint-4" / checkpoint.STATE)
        try:
            training.resume({}, {"out": out, "device": "cpu", "time_limit": 20}).run()
        except training.TrainingError as error:
            assert [path.name for path in out.iterdir()] == ["checkpoint-4"] and "\n" not in str(error)
            return str(error)
        ended = load_file(out / "checkpoint-8" / "model.safetensors")
        assert all(torch.equal(ended[name], tensor) for name, tensor in weights.items()), "other weights"
        return None

    return call


@pytest.fixture
def saved(run):
    return torch.load(run[0] / "checkpoint-4" / checkpoint.STATE, weights_only=True)


def _places(values, above=()):
    """The paths of all values in nested dicts, lists and tuples."""
    yield above
    if isinstance(values, (list, tuple)):
        values = dict(enumerate(values))
    for key, value in values.items() if isinstance(values, dict) else ():
        yield from _places(value, (*above, key))


def _at(values, place):
    for key in place:
        values = values[key]
    return values


def _changed(values, place, change):
    """A copy with `change` applied to the part at a place. Without a change the part is removed."""
    if not place:
        return change(values)
    values = list(values) if isinstance(values, tuple) else copy.copy(values)
    if len(place) == 1 and change is None:
        del values[place[0]]
    else:
        values[place[0]] = _changed(values[place[0]], place[1:], change)
    return values


@pytest.mark.parametrize(
    "new",
    [
        {"steps": 10**18}, {"batch_size": 10**18}, {"accumulate": 10**18}, {"steps": 3}, {"steps": 9.0}, {"steps": "9"},
        {"steps": True}, {"sequence_length": 0}, {"learning_rate": math.nan}, {"learning_rate": -1.0}, {"seed": -1},
        {"weight_decay": math.inf}, {"dtype": "float16"}, {"dtype": ["float32"]}, {"compile": 1}, {"data": "\0"},
        {"data": 3}, {"hidden_size": 64}, {"held_out": 10**400}, {"nonsense": 1}, {"clip": 0.5}, {"warmup": 3},
    ],
    ids=str,
)  # fmt: skip
def test_odd_settings(saved, resumed, new):
    line = resumed(_changed(saved, ("settings",), lambda old: {**old, **new}))
    (name,) = new
    assert f"/checkpoint-4/{checkpoint.STATE}: " in line
    assert name in line or "its values are not those that were saved" in line


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("step",), -1, "step is -1; it must be the 4 of the folder's name"),
        (("step",), 5, "step is 5; it must be the 4 of the folder's name"),
        (("step",), 4.0, "step is 4.0"),
        (("format",), 3, "another version"),
        (("fingerprint",), TENSOR, "fingerprint is a tensor of torch.float32, shape (4,); it must be a string"),
        (("history",), [], "history has the rows of other steps"),
        (("history", 0, "step"), 2, "history has the rows of other steps"),
        (("history", 1, "loss"), math.nan, "row 1 of history is"),
        (("random",), TENSOR, "random is a tensor"),
        (("random",), torch.zeros(3, dtype=torch.uint8), "no state of a generator"),
        (("cuda_random",), 1, "cuda_random is 1"),
        (("options", "log_every"), 0, "log_every is 0; it must be a whole number from 1 to 2^63 - 1"),
        (
            ("options",),
            {"threads": 1, "save_every": 4, "eval_every": 0, "log_every": 2, "out": "x"},
            "options has 'out'",
        ),
        (("options",), {"threads": 1, "save_every": 4, "eval_every": 0}, "options has no log_every"),
        (("optimizer",), [], "optimizer is []"),
        (("optimizer", "param_groups", 0, "betas"), (0.5, 0.5), "betas of the optimizer's group 0 is (0.5, 0.5)"),
        (("optimizer", "param_groups", 0, "params"), [0], "params of the optimizer's group 0 is [0]"),
        (("optimizer", "param_groups", 1, "weight_decay"), 0.1, "weight_decay of the optimizer's group 1 is 0.1"),
        (("optimizer", "state"), {}, "the optimizer's state must be that of"),
        (("optimizer", "state", 0, "step"), torch.tensor(5.0), "step is 5.0; it must be the run's, 4"),
        (("optimizer", "state", 0, "exp_avg"), TENSOR, "exp_avg is a tensor of torch.float32, shape (4,)"),
        (("digest",), "", "its values are not those that were saved"),
    ],
)
def test_odd_values(saved, resumed, place, value, message):
    assert message in resumed(_changed(saved, place, lambda old: value))


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", ["step", "exp_avg_sq"])
def test_odd_moments(saved, resumed, name, kind):
    line = resumed(_changed(saved, ("optimizer", "state", 1, name), TENSORS[kind]))
    if name == "step" and kind in ("part of another", "flat"):
        assert line is None or "step is" in line
    else:
        assert f"the optimizer's state of tensor 1: {name}" in line


def test_moments_that_share_memory(saved, resumed):
    entry = saved["optimizer"]["state"][0]
    entry["exp_avg_sq"] = entry["exp_avg"] = entry["exp_avg"].abs()
    assert "share memory" in resumed(saved)


def test_a_state_without_a_digest_is_taken(saved, resumed):
    """The first format had none."""
    del saved["digest"]
    assert resumed({**saved, "format": 1}) is None
    assert "it has no digest" in resumed(saved)


def test_nothing_odd(saved, resumed):
    assert saved["digest"] == state.digest(saved)
    assert resumed(saved) is None


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02c__main__\nX\n."])
def test_no_state_at_all(run, tmp_path, content):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / checkpoint.STATE).write_bytes(content)
    with pytest.raises(training.TrainingError) as error:
        training.resume({}, {"out": tmp_path / "run", "device": "cpu"})
    line = str(error.value)
    assert f"corrupt checkpoint {tmp_path / 'run' / 'checkpoint-4' / checkpoint.STATE}: " in line
    assert "weights_only" not in line


def test_fuzz(saved, resumed, fuzz):
    given = pytest.importorskip("hypothesis").given
    st = pytest.importorskip("hypothesis.strategies")
    places = list(_places(saved))
    tensors = [place for place in places if isinstance(_at(saved, place), torch.Tensor)]
    any_tensor = [change for name, change in TENSORS.items() if name != "negative"]  # a mean may be negative
    changes = st.one_of(
        st.tuples(st.sampled_from(places), st.sampled_from(ODD).map(lambda value: lambda old: value)),
        st.tuples(st.sampled_from(places[1:]), st.none()),  # removed
        st.tuples(st.sampled_from(tensors), st.sampled_from(any_tensor)),
        st.tuples(
            st.sampled_from([place for place in places if isinstance(_at(saved, place), dict)]),
            st.sampled_from([*ODD[:5], "x", (1, 2)]).map(lambda key: lambda old: {**old, key: 1}),
        ),
    )

    @fuzz(25)
    @given(changes)
    def check(change):
        resumed(_changed(saved, *change))

    check()
