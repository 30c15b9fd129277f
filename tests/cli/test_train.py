from __future__ import annotations

import csv
import errno
import gc
import io
import json
import os
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM as StockXLSTM

from flash_xlstm.cli import main
from flash_xlstm.models import xLSTMConfig, xLSTMForCausalLM
from flash_xlstm.training import checkpoint, files
from flash_xlstm.training.trainer import Trainer


def _same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _state(run):
    return torch.load(checkpoint.newest(run) / checkpoint.STATE, weights_only=True)


def _rows(run):
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tokenizer_file(text, tmp_path):
    """A byte-pair tokenizer of 300 tokens that puts <s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_run_learns_and_says_so(train, capsys, leftovers):
    code, run = train("--steps", 60, "--learning-rate", 1e-2, "--eval-every", 20)
    assert code == 0
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-60"]
    assert not leftovers(run)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")

    rows = _rows(run)
    held_out = [(int(r["step"]), float(r["held_out_bits_per_byte"])) for r in rows if r["held_out_bits_per_byte"]]
    assert [step for step, _ in held_out] == [0, 20, 40, 60]
    assert 7 < held_out[0][1] < 10  # about log2(256) before training
    assert held_out[-1][1] < 0.7 * held_out[0][1]
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    assert losses[-1] < 0.7 * losses[0]

    printed = capsys.readouterr()
    result = f"held-out bits per byte: {held_out[0][1]:.3f} at the start, {held_out[-1][1]:.3f} now; xz -9e: "
    assert result in printed.out
    assert "bits/byte" in printed.err and "tokens/s" in printed.err


def test_killed_and_resumed_equals_uninterrupted(train, start, resume, weights, tmp_path, leftovers):
    options = ["--steps", 40, "--save-every", 4, "--accumulate", 2]
    _, whole = train(*options, out="whole")

    process = start(*options)
    run = tmp_path / "run"
    while checkpoint.newest(run) is None:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert _state(run)["step"] < 40

    code, _ = resume()
    assert code == 0
    assert _same(weights(run), weights(whole))
    first, second = _state(run), _state(whole)
    assert torch.equal(first["random"], second["random"])
    assert [r["step"] for r in first["history"]] == [r["step"] for r in second["history"]]
    assert not leftovers(run)


@pytest.mark.parametrize("change", [{"weight_mode": "fused"}, {"tie_word_embeddings": True}])
def test_resumed_models_in_another_form_equal_uninterrupted(text, weights, tmp_path, change):
    path = tmp_path / "config.json"
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 1}
    path.write_text(json.dumps({**sizes, **change}))
    options = ["--data", str(text), "--config", str(path), "--steps", "8", "--device", "cpu", "--threads", "1"]
    options += ["--batch-size", "2", "--sequence-length", "32", "--warmup", "2", "--learning-rate", "1e-2"]
    assert main(["train", *options, "--out", str(tmp_path / "whole")]) == 0

    save = Trainer.save

    def stop_after(self):
        folder = save(self)
        raise KeyboardInterrupt if self.step == 4 else AssertionError(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "save", stop_after)
        assert main(["train", *options, "--save-every", "4", "--out", str(tmp_path / "run")]) == 130
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert _same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_where(train, resume, weights, monkeypatch, error_line, number):
    step = Trainer._train_step

    def interrupted_step(self):
        step(self)
        if self.step == 7:
            os.kill(os.getpid(), number)

    options = ["--steps", 12]
    _, whole = train(*options, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted_step)
        handler = signal.getsignal(number)
        code, run = train(*options)
    assert code == 130
    assert signal.getsignal(number) == handler
    assert error_line() == f"interrupted: step 7 of 12 is saved in {run / 'checkpoint-7'}; --resume goes on"
    assert _state(run)["step"] == 7

    assert resume()[0] == 0
    assert _same(weights(run), weights(whole))


def test_a_second_interrupt_stops_at_once(train, monkeypatch, error_line):
    def twice(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", twice)
    code, run = train("--steps", 5)
    assert code == 130
    assert error_line() == "interrupted"
    assert checkpoint.newest(run) is None


def test_a_time_limit_saves_and_can_be_resumed(train, resume, weights, capsys):
    _, whole = train("--steps", 30, out="whole")
    code, run = train("--steps", 30, "--time-limit", 1e-9)
    assert code == 0
    assert "time limit: stopped at step 0 of 30" in capsys.readouterr().out
    assert resume()[0] == 0
    assert _same(weights(run), weights(whole))


def test_a_finished_run_resumes_to_itself(train, resume, weights):
    _, run = train("--steps", 3)
    before = weights(run)
    assert resume()[0] == 0
    assert _same(before, weights(run))


def test_memory_does_not_grow(train, monkeypatch):
    """Python's objects after 60 steps and 6 checkpoints are as many as after 20 and 2, except for the rows of the
    history. The checkpoints' figures are freed."""
    held, after = {}, Trainer._after_step

    def measured(self, progress):
        after(self, progress)
        if self.step in (20, 60):
            held[self.step] = len(gc.get_objects()), sys.getallocatedblocks()

    monkeypatch.setattr(Trainer, "_after_step", measured)
    assert train("--steps", 61, "--save-every", 10, "--accumulate", 2)[0] == 0
    (objects, blocks), (more_objects, more_blocks) = held[20], held[60]
    assert more_objects - objects < 30  # one a step would be 40
    assert more_blocks - blocks < 1000  # of 12 rows about 10 each; one figure has thousands


def test_accumulation_equals_a_larger_batch(train, weights):
    _, small = train("--steps", 3, "--batch-size", 2, "--accumulate", 4, out="small")
    _, large = train("--steps", 3, "--batch-size", 8, out="large")
    for name, expected in weights(large).items():
        torch.testing.assert_close(weights(small)[name], expected, rtol=1e-3, atol=1e-4)


def test_transformers_loads_the_checkpoint_and_agrees(train):
    _, run = train("--steps", 10)
    folder = checkpoint.newest(run)
    tokens = torch.randint(0, 256, (2, 45), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = StockXLSTM.from_pretrained(folder).eval()(tokens, use_cache=False).logits
        actual = xLSTMForCausalLM.from_pretrained(folder)(tokens, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_file(train, resume, tokenizer_file, weights, text, error_line, tmp_path, capsys):
    options = ["--tokenizer", tokenizer_file, "--steps", 6]
    code, run = train(*options)
    assert code == 0
    folder = checkpoint.newest(run)
    size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == size == 300
    sample = text.read_text()[:50]
    assert PreTrainedTokenizerFast.from_pretrained(folder).encode(sample) == (
        Tokenizer.from_file(str(tokenizer_file)).encode(sample).ids
    )
    first = float(_rows(run)[0]["held_out_bits_per_byte"])
    assert 1 < first < 8  # a token's bits, divided by its bytes

    assert resume()[0] == 0
    capsys.readouterr()
    assert main(["generate", str(run), "1: the", "--max-new-tokens", "5", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("1: the")

    other = json.loads(tokenizer_file.read_text())
    other["post_processor"] = None
    tokenizer_file.write_text(json.dumps(other))
    assert resume("--tokenizer", tokenizer_file)[0] == 2
    assert "the data, or the tokenizer, is not what it was trained on" in error_line()


def test_a_configuration_file(train, resume, tmp_path, error_line):
    path = tmp_path / "config.json"
    values = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 1, "num_heads": 1, "weight_mode": "fused"}
    path.write_text(json.dumps(values))
    arguments = ["--data", str(tmp_path / "text.txt"), "--config", str(path), "--out", str(tmp_path / "run")]
    arguments += ["--steps", "2", "--batch-size", "2", "--sequence-length", "32", "--device", "cpu"]
    assert main(["train", *arguments]) == 0
    config = xLSTMConfig.from_pretrained(checkpoint.newest(tmp_path / "run"))
    assert (config.hidden_size, config.weight_mode, config.eos_token_id) == (64, "fused", None)

    assert resume("--config", path)[0] == 0
    path.write_text(json.dumps({**values, "gate_soft_cap": 5.0}))
    assert resume("--config", path)[0] == 2
    assert "gate_soft_cap" in error_line()
    assert resume("--hidden-size", 64)[0] == 2
    assert "--hidden-size" in error_line()


@pytest.mark.parametrize(
    "option",
    [("--seed", 1), ("--hidden-size", 256), ("--steps", 9), ("--sequence-length", 16), ("--dtype", "bfloat16")],
)
def test_resuming_with_other_settings_is_refused(train, resume, weights, error_line, option):
    _, run = train("--steps", 2)
    before = weights(run)
    assert resume(*option)[0] == 2
    line = error_line()
    assert line.startswith("error: cannot resume") and f"{option[0]} {option[1]}" in line
    assert _same(before, weights(run))
    assert resume("--seed", 0, "--hidden-size", 128, "--save-every", 3)[0] == 0  # the same, or free


def test_resuming_with_other_data_is_refused(train, resume, text, error_line):
    train("--steps", 2)
    content = text.read_bytes()
    text.write_bytes(content[:-1] + b"x")
    assert resume()[0] == 2
    assert "the data, or the tokenizer, is not what it was trained on" in error_line()
    moved = text.with_name("moved.txt")
    moved.write_bytes(content)
    assert resume("--data", moved)[0] == 0


def test_an_existing_run_is_not_overwritten(train, weights, error_line):
    _, run = train("--steps", 2)
    before = weights(run)
    assert train("--steps", 4)[0] == 2
    assert "exists already" in error_line()
    assert _same(before, weights(run))


def test_resuming_nothing(resume, error_line):
    assert resume()[0] == 2
    assert "there is no checkpoint" in error_line()


def _vocabulary(text, tokenizer_file):
    config = text.with_name("config.json")
    config.write_text(json.dumps({"vocab_size": 299, "hidden_size": 128, "num_heads": 2, "num_hidden_layers": 1}))
    return config


@pytest.mark.parametrize("tokens", ["bytes", "tokenizer"])
def test_a_vocabulary_that_does_not_match(text, tokenizer_file, tmp_path, error_line, tokens):
    config = _vocabulary(text, tokenizer_file)
    options = ["--tokenizer", str(tokenizer_file)] if tokens == "tokenizer" else []
    out = tmp_path / "run"
    assert main(["train", "--data", str(text), "--config", str(config), "--out", str(out), *options]) == 2
    line = error_line()
    assert "the vocabulary does not match" in line and "299" in line
    assert not out.exists()


def test_wrong_input_files(train, tmp_path, error_line):
    garbage = tmp_path / "garbage.json"
    garbage.write_text("{")
    for option, start in (("--tokenizer", "cannot read tokenizer"), ("--config", "cannot use the configuration")):
        for path in (garbage, tmp_path / "nothing.json"):
            arguments = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), option, str(path)]
            assert main(["train", *arguments]) == 2
            assert error_line().startswith(f"error: {start} {path}")
    assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_divide(train, error_line):
    code, run = train("--heads", 3)
    assert code == 2 and "num_heads" in error_line()
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", 10**18), "--batch-size 1000000000000000000"),
        (("--hidden-size", 2**24), "a model of"),
        (("--layers", 10**4, "--hidden-size", 2**16), "a model of"),
        (("--config", "config.json"), "a model of"),
    ],
)
def test_sizes_that_no_memory_holds(train, tmp_path, error_line, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    large = {"vocab_size": 256, "hidden_size": 2**22, "num_hidden_layers": 100, "num_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(large))
    if "--config" in options:
        code, run = main(["train", "--data", "text.txt", "--out", "run", *options, "--device", "cpu"]), tmp_path / "run"
    else:
        code, run = train(*options)
    line = error_line()
    assert code == 2 and line.startswith("error: not enough memory: ") and message in line and "GiB" in line
    assert not run.exists()


def test_numbers_without_end_are_taken(train, resume, capsys):
    most = 2**63 - 1
    options = ["--steps", most, "--warmup", most, "--save-every", most, "--eval-every", most, "--log-every", most]
    assert train(*options, "--time-limit", 0.2)[0] == 0
    assert resume("--time-limit", 0.2)[0] == 0
    assert f"of {most}; --resume goes on" in capsys.readouterr().out


def test_a_signal_within_a_step(train, monkeypatch, error_line):
    """A signal does not wait for a step of many batches."""
    from flash_xlstm.training.data import Batches

    item, seen = Batches.__getitem__, []

    def interrupted(self, number):
        seen.append(number)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(seen) < 9
        return item(self, number)

    monkeypatch.setattr(Batches, "__getitem__", interrupted)
    code, run = train("--steps", 3, "--accumulate", 10**18)
    assert code == 130 and "step 0 of 3 is saved" in error_line()
    assert not _state(run)["optimizer"]["state"]


def test_held_out_text_that_diverges(train, monkeypatch, error_line):
    monkeypatch.setattr(Trainer, "held_out", lambda self: float("inf"))
    assert train("--steps", 2)[0] == 2
    assert "training diverged: at step 0 the held-out bits per byte are inf" in error_line()


def _last_id(values, number):
    name = max(values["model"]["vocab"], key=values["model"]["vocab"].get)
    values["model"]["vocab"][name] = number


def _special_id(values, number):
    values["post_processor"]["special_tokens"]["<s>"]["ids"] = [number]


@pytest.mark.parametrize(
    ("change", "number", "message"),
    [
        (_last_id, 2**31 - 2, "not enough memory"),
        (_last_id, 2**32 - 1, "vocab_size is 4294967296"),
        (_last_id, 5, "tokens the id of another"),
        (_special_id, 300, "the tokenizer gives the id 300, and its vocabulary ends at 299"),
        (_special_id, 2**32 - 1, "the tokenizer gives the id 4294967295"),
        (lambda values, number: values["post_processor"].update(special_tokens={}), 0, "cannot"),
        (lambda values, number: values["model"].update(continuing_subword_prefix="é"), 0, "cannot"),
        (lambda values, number: values.pop("model"), 0, "cannot read tokenizer"),
    ],
)
def test_odd_tokenizers(train, tokenizer_file, error_line, change, number, message):
    values = json.loads(tokenizer_file.read_text())
    change(values, number)
    tokenizer_file.write_text(json.dumps(values))
    code, run = train("--tokenizer", tokenizer_file, "--steps", 2)
    assert code == 2 and message in error_line()
    assert not run.exists()


def test_a_tokenizer_with_gaps_between_its_ids(train, tokenizer_file, capsys):
    values = json.loads(tokenizer_file.read_text())
    _last_id(values, 400)
    tokenizer_file.write_text(json.dumps(values))
    code, run = train("--tokenizer", tokenizer_file, "--steps", 2)
    assert code == 0 and json.loads((checkpoint.newest(run) / "config.json").read_text())["vocab_size"] == 401
    assert main(["generate", str(run), "1: the", "--max-new-tokens", "3"]) == 0


def test_paths_that_the_terminal_cannot_show(train, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert train("--steps", 1, out="é")[0] == 0
    out.flush()
    assert rb"\xe9/checkpoint-1" in out.buffer.getvalue()


def test_no_terminal_at_all(train, monkeypatch):
    """Outputs closed by a shell's >&- 2>&-."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    code, run = train("--steps", 1)
    assert code == 0
    assert main(["generate", str(run), "x", "--max-new-tokens", "2", "--device", "cpu"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no such names")
def test_a_folder_whose_name_is_not_utf8(train, error_line, tmp_path):
    assert train("--steps", 1, out="\udcff")[0] == 2
    assert "no path that is not UTF-8" in error_line()


def test_no_such_device(tmp_path, text, error_line):
    for device in ("cuda:63", "meta", "nonsense"):
        assert main(["train", "--data", str(text), "--out", str(tmp_path / "run"), "--device", device]) == 2
        assert f"--device {device}" in error_line()


def test_divergence_keeps_the_last_checkpoint(train, monkeypatch, error_line, leftovers):
    step = Trainer._train_step

    def diverging_step(self):
        step(self)
        if self.step == 8:
            self._interval.add_loss(torch.tensor(float("nan")))

    monkeypatch.setattr(Trainer, "_train_step", diverging_step)
    code, run = train("--steps", 20, "--save-every", 5)
    assert code == 2 and "training diverged" in error_line()
    assert checkpoint.newest(run).name == "checkpoint-5" and not leftovers(run)


def test_an_unwritable_folder(train, text, error_line):
    code, _ = train(out="text.txt")
    assert code == 2 and error_line().startswith("error: cannot write to")
    code, _ = train(out="text.txt/run")
    assert code == 2 and error_line().startswith("error: cannot write to")
    assert text.is_file()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(train, tmp_path, error_line):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, _ = train(out="locked")
    assert code == 2 and "Permission denied" in error_line()


@pytest.mark.parametrize(
    "where", ["os.replace", "os.fsync", "torch.save", "transformers.modeling_utils.safe_save_file"]
)
def test_a_full_disk_keeps_the_last_checkpoint(train, resume, monkeypatch, error_line, leftovers, where):
    options = ["--steps", 10, "--save-every", 4]
    _, run = train(*options, "--time-limit", 1e-9)  # checkpoint-0

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        assert resume()[0] == 2
    line = error_line()
    assert "No space left on device" in line and f"{run / 'checkpoint-0'} is whole" in line
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-0"]
    assert not leftovers(run)
    assert resume()[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [200_000, 1_500_000], ids=["weights", "state"])
def test_a_disk_that_fills_up_while_writing(start, tmp_path, leftovers, size):
    """A limit on the size of files really cuts off a file in the middle of a write."""
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    process = start("--steps", 2, prelude=limit)
    err = process.communicate()[1]
    assert process.returncode == 2, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("flash-xlstm: error: cannot write") and "File too large" in last
    assert not list((tmp_path / "run").glob("checkpoint-*")) and not leftovers(tmp_path / "run")


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_tensor(path):
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def _other_shape(path):
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


def _garble(path):
    path.write_text("{nonsense")


def _no_options(path):
    torch.save({name: x for name, x in torch.load(path, weights_only=True).items() if name != "options"}, path)


def _unknown_setting(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "settings": {**state["settings"], "nonsense": 1}}, path)


def _list(path):
    torch.save([1], path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", _truncate),
        ("model.safetensors", _drop_tensor),
        ("model.safetensors", _other_shape),
        ("model.safetensors", os.remove),
        ("config.json", _garble),
        (checkpoint.STATE, _truncate),
        (checkpoint.STATE, os.remove),
        (checkpoint.STATE, _no_options),
        (checkpoint.STATE, _unknown_setting),
        (checkpoint.STATE, _list),
    ],
)
def test_a_corrupt_checkpoint(train, resume, error_line, name, damage):
    _, run = train("--steps", 2)
    folder = checkpoint.newest(run)
    damage(folder / name)
    assert resume()[0] == 2
    assert str(folder) in error_line()
    if name != checkpoint.STATE:
        assert main(["generate", str(folder), "x", "--device", "cpu"]) == 2
        assert str(folder) in error_line()


def test_killed_between_writing_and_renaming(train, resume, monkeypatch, leftovers):
    """At every instant there is a whole checkpoint, even if the process never cleans up."""
    _, run = train("--steps", 4, "--time-limit", 1e-9)

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", lambda path: None)
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            resume()
    assert checkpoint.newest(run).name == "checkpoint-0"
    assert leftovers(run) == [".checkpoint-4.partial"]
    assert resume()[0] == 0
    assert checkpoint.newest(run).name == "checkpoint-4" and not leftovers(run)


def test_old_checkpoints_go_only_once_the_new_one_is_there(train, resume, monkeypatch):
    _, run = train("--steps", 8, "--save-every", 2, "--time-limit", 1e-9)
    replace, seen = os.replace, []

    def watched(source, target):
        replace(source, target)
        seen.append(sorted(p.name for p in run.glob("checkpoint-*")))

    monkeypatch.setattr(os, "replace", watched)
    assert resume()[0] == 0
    assert all(seen)
    assert ["checkpoint-0", "checkpoint-2"] in seen and seen[-1] == ["checkpoint-8"]


@pytest.mark.cuda
def test_cuda_trains_in_bfloat16_compiled(text, tmp_path, capsys):
    arguments = ["--data", str(text), "--hidden-size", "128", "--layers", "2", "--heads", "2", "--batch-size", "8"]
    arguments += ["--sequence-length", "64", "--learning-rate", "1e-2", "--warmup", "5", "--compile"]
    arguments += ["--out", str(tmp_path / "run"), "--device", "cuda"]
    assert main(["train", *arguments, "--steps", "80", "--save-every", "40"]) == 0
    assert "in bfloat16" in capsys.readouterr().out
    rows = _rows(tmp_path / "run")
    assert float(rows[-1]["held_out_bits_per_byte"]) < 0.7 * float(rows[0]["held_out_bits_per_byte"])
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--device", "cuda"]) == 0
