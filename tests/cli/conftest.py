"""Tiny training runs, in this process and in others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

for _package in ("transformers", "tokenizers", "tqdm", "matplotlib"):
    pytest.importorskip(_package)

from safetensors.torch import load_file  # noqa: E402

from flash_xlstm.cli import main  # noqa: E402

MODEL = ["--hidden-size", "128", "--layers", "1", "--heads", "2", "--sequence-length", "32"]
TINY = [*MODEL, "--batch-size", "2", "--warmup", "2", "--log-every", "5", "--threads", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    """More threads do not speed up models this small, and threads that wait for a busy core are slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path):
    """A file of 20,000 bytes of text that is easy to learn."""
    path = tmp_path / "text.txt"
    lines = (f"{n}: the quick brown fox jumps over {n % 7} lazy dogs, é\n" for n in range(1000))
    path.write_bytes("".join(lines).encode()[:20000])
    return path


@pytest.fixture
def train(text, tmp_path):
    """``train(*options, out="run")``: the exit code of a tiny run, and its folder."""

    def run(*options, out="run"):
        folder = tmp_path / out
        arguments = ["--data", str(text), *TINY, *map(str, options)]
        return main(["train", *arguments, "--out", str(folder), "--device", "cpu"]), folder

    return run


@pytest.fixture
def resume(tmp_path):
    """``resume(*options, out="run")``: as `train`, with --resume and the options only."""

    def run(*options, out="run"):
        folder = tmp_path / out
        return main(["train", "--resume", "--out", str(folder), "--device", "cpu", *map(str, options)]), folder

    return run


@pytest.fixture
def start(text, tmp_path):
    """``start(*options, out="run", prelude="")``: a tiny run in a process of its own."""
    started = []

    def run(*options, out="run", prelude=""):
        code = f"import sys\n{prelude}\nfrom flash_xlstm.cli import main\nsys.exit(main(sys.argv[1:]))"
        arguments = ["train", "--data", str(text), *TINY, "--out", str(tmp_path / out), "--device", "cpu", *options]
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def weights():
    """``weights(run)``: the tensors of the only checkpoint in a run's folder."""

    def load(run):
        (folder,) = run.glob("checkpoint-*")
        return load_file(folder / "model.safetensors")

    return load


@pytest.fixture
def error_line(capsys):
    """``error_line()``: what a command said on stderr, which must be one error line (after progress bars)."""

    def read() -> str:
        captured = capsys.readouterr().err
        assert "Traceback" not in captured
        lines = [line for line in captured.replace("\r", "\n").splitlines() if line.startswith("flash-xlstm: ")]
        assert len(lines) == 1, captured
        assert captured.rstrip("\n").endswith(lines[0])
        return lines[0].removeprefix("flash-xlstm: ")

    return read


@pytest.fixture
def leftovers():
    """``leftovers(run)``: unexpected files in a run's folder."""

    def find(run):
        known = ("metrics.csv", "loss.png")
        return [p.name for p in run.iterdir() if p.name not in known and not p.name.startswith("checkpoint-")]

    return find
