from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flash_xlstm
from flash_xlstm.cli import command, main
from flash_xlstm.ops import kernel_for

EXTRAS = ("transformers", "tokenizers", "safetensors", "tqdm", "matplotlib")


def _without(packages, *arguments):
    code = (
        f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
        "from flash_xlstm.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_info_prints_the_build_and_the_kernels(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name, value in flash_xlstm.build_info().items():
        assert any(name.replace("_", " ") in line and value in line for line in out.splitlines()), name
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        table = out.split(f"kernels on {device}\n")[1]
        for op in ("mlstm", "mlstm_sig", "mlstm_step", "soft_cap"):
            assert any(line.split() == [op, *kernel_for(op, device).split()] for line in table.splitlines()), op
    if len(devices) == 1:
        assert "GPUs: none seen" in out


@pytest.mark.cuda
def test_cuda_info_names_the_gpu(capsys):
    main(["info"])
    assert torch.cuda.get_device_properties(0).name in capsys.readouterr().out


def test_info_needs_torch_only():
    result = _without(EXTRAS, "info")
    assert result.returncode == 0, result.stderr
    assert "kernels on cpu" in result.stdout


@pytest.mark.parametrize(
    ("command", "package"),
    [("train", "transformers"), ("train", "tqdm"), ("demo", "matplotlib"), ("generate", "tokenizers")],
)
def test_a_missing_extra_is_named(command, package):
    result = _without([package], command, *(["folder", "prompt"] if command == "generate" else []))
    assert result.returncode == 2
    # torchao, which transformers imports where it is installed, may warn of libraries that it cannot load.
    assert result.stderr.splitlines()[-1] == (
        f"flash-xlstm: error: {command} needs {package}, which cannot be imported; "
        'install it with: pip install "flash-xlstm[cli]"'
    )
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_an_interrupt_while_modules_are_imported(module, tmp_path):
    code = f"""
import contextlib, importlib.metadata, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell in the background ignores it
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            with contextlib.suppress(KeyboardInterrupt):  # as some imports do
                os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
(command,) = importlib.metadata.entry_points(group="console_scripts", name="flash-xlstm")
sys.exit(command.load()())
"""
    arguments = [sys.executable, "-c", code, "generate", str(tmp_path), "x"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 130
    assert result.stderr == "\nflash-xlstm: interrupted\n"


def test_wrong_usage_ends_with_2(capsys, monkeypatch):
    monkeypatch.setattr(command, "_import", lambda name: pytest.fail(f"{name} was about to run"))
    train = [
        ["--steps", "0"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "inf"],
        ["--seed", str(2**63)],
        ["--threads", "40000"],
    ]
    for arguments in ([], ["nonsense"], *(["train", *options] for options in train)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_help_tells_what_bytes_mean(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "vocabulary of 256" in out and "without an end-of-text token" in out
    assert "--hidden-size" in out and "(default: 256)" in out
