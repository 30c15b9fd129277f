"""The arguments of each command, and how its errors are printed."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any

from flash_xlstm.cli import interrupt_ends_imports
from flash_xlstm.cli.errors import CommandError, Interrupted
from flash_xlstm.training.errors import TrainingError, reason
from flash_xlstm.training.settings import (
    DTYPES,
    FRACTION,
    NOT_NEGATIVE_FLOAT,
    NUMBERS,
    POSITIVE_FLOAT,
    POSITIVE_INT,
    THREADS,
    WHOLE_NUMBER,
    Number,
    RunOptions,
    TrainSettings,
)

_TRAIN_HELP = """
Trains a language model and writes a Hugging Face checkpoint folder, OUT/checkpoint-STEP: config.json and
model.safetensors, which transformers' own xLSTMForCausalLM loads too, and trainer_state.pt, from which --resume
goes on. Beside it are loss.png and metrics.csv. Checkpoints appear whole or not at all; only the newest is kept.

--data is text, which is tokenized in memory, or a folder that `flash-xlstm prepare` made, which may be larger than
memory.

Without --tokenizer the tokens are bytes: a vocabulary of 256, each byte its own id, no special tokens. Files
follow one another without an end-of-text token, and generation goes on to its token limit. With --tokenizer,
files get the special tokens that the tokenizer's own post-processor adds, if any.

--resume takes all settings from the newest checkpoint in OUT. Settings given again must be the same; only --out,
--device, --threads, --time-limit, --tensorboard, --shard and the --...-every options may differ. On the CPU, a run
that was killed and resumed has bit for bit the weights of one that was not (with as many threads, on the same kind of
machine).

Under torchrun, each process has its rows of every batch: --batch-size is that of all together. A run may go on with
another number of processes. Where torchrun starts them again, because one had died, they go on from OUT by themselves.

On the CPU, threads wait for one another by spinning: where other programs keep a core busy, fewer --threads can be
many times as fast.
"""
_PREPARE_HELP = """
Tokenizes text files, JSON lines and parquet files into a folder that `train --data OUT` reads by memory map. Neither
preparing nor training needs memory for the data. OUT appears once it is whole; the remains of a killed run are
removed by the next one.

A text file is one document, unless --separator divides it. A JSON line and a row of a parquet file are a document
each. The ends of documents are kept in OUT. The last --held-out bytes are kept for evaluation.
"""
_TASKS_HELP = """
Trains small models of the first xLSTM, two blocks each: xLSTM[1:0] (mLSTM), xLSTM[0:1] (sLSTM) and xLSTM[1:1] (an
mLSTM block, then an sLSTM block), on sequences drawn on the fly: state tracking (parity, cycle navigation, modular
arithmetic without brackets, even pairs) and multi-query associative recall. Every prefix's answer is trained on; tested
is the answer to the whole sequence, at the longest length trained on and at longer ones (recall: every query's answer).

Training ends early where accuracy on new sequences of the longest length stays at 99.9 percent or more. On a GPU steps
are replayed from CUDA graphs.

Writes OUT/tasks.json, tasks.txt and tasks.png after each model. --small is for CPUs: parity only, unless --tasks asks
for more, and smaller models.
"""
_CONVERT_HELP = """
Converts a checkpoint's folder:

  xlstm_large (config.yaml, model.safetensors or model_0.safetensors, ...)   to a Hugging Face folder
  a Hugging Face folder of an xLSTM, in either weight mode                   to xlstm_large
  xlstm's language model (config.yaml, safetensors or a file of torch.save)  to config.json and safetensors
  such a folder                                                             back

Weights keep their bits. They pass through memory in small pieces, so that a model of any size takes little of it; what
was written is read again and compared. TARGET appears whole or not at all.
"""
_TASKS = ("parity", "cycle-navigation", "modular-arithmetic", "even-pairs", "mqar")
_BENCH_HELP = """
Measures the ops and models of this package on this machine, beside the other libraries that are installed. Writes to
OUT for each SUBJECT the rows with the machine's and the versions' names (SUBJECT.json), its pictures and its output
(SUBJECT.log), and all tables (report.md), which are printed too. An idle machine gives steady figures.

Results, files or folders, are compared by --compare: OLD/*.json are kept from an earlier run.
"""
_DATA_HELP = (
    "file, folder of files, or folder that `prepare` made; default: the source of Python's standard library on this "
    "machine, without its tests"
)


_FLAGS = {
    *(field.name for kind in (TrainSettings, RunOptions) for field in fields(kind)),
    *("resume", "field", "separator", "end_of_text"),
}


def run(argv: Sequence[str] | None) -> int:
    """As :func:`flash_xlstm.cli.main`, which calls this."""
    _open_streams()
    try:
        args = _parser().parse_args(argv)
        return _import(args.command).run(args)
    except (CommandError, TrainingError) as error:
        print(f"flash-xlstm: error: {_with_flags(str(error))}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"flash-xlstm: interrupted: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\nflash-xlstm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, for example) has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, OSError):
            text = reason(error)
        elif isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            text = "not enough memory"
            if args.command == "train":
                text += "; try a smaller --batch-size (and --accumulate more of them)"
        else:
            raise
        print(f"flash-xlstm: error: {text}", file=sys.stderr)
        return 2


def _flag(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def _with_flags(text: str) -> str:
    """An error's text, with names of settings (in backquotes) replaced by their flags."""
    return re.sub(r"`(\w+)`", lambda match: _flag(match[1]) if match[1] in _FLAGS else match[0], text)


def _open_streams() -> None:
    """Opens outputs that the shell has closed (>&-), and escapes characters that an output cannot encode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _import(command: str) -> ModuleType:
    """Imports a command's module. Every command but `info` needs optional packages."""
    try:
        with interrupt_ends_imports():
            module = importlib.import_module(f"flash_xlstm.cli.{command}")
            if sys.modules.get("transformers"):  # transformers prints no advice and no bars
                logging = importlib.import_module("transformers.utils.logging")
                logging.set_verbosity_error()
                logging.disable_progress_bar()
            return module
    except ImportError as error:
        cause = error
        while cause.name is None and isinstance(cause.__cause__, ImportError):
            cause = cause.__cause__
        missing = (cause.name or str(error)).partition(".")[0]
        raise CommandError(
            f'{command} needs {missing}, which cannot be imported; install it with: pip install "flash-xlstm[cli]"'
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flash-xlstm", description="Fast and exact xLSTM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("info", help="the build, the GPUs seen, and the kernel each op takes there")
    _add_prepare(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_tasks(commands)
    _add_bench(commands)
    _add_convert(commands)
    return parser


def _add_prepare(commands: Any) -> None:
    parser = commands.add_parser(
        "prepare",
        help="tokenize data for training",
        description=_PREPARE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file, or folder of files; their documents keep this order")
    add("--out", required=True, metavar="FOLDER", help="folder to make")
    add("--tokenizer", metavar="PATH", help="tokenizer.json, or a Hugging Face tokenizer's folder; default: bytes")
    add(
        "--format",
        choices=("auto", "text", "jsonl", "parquet"),
        default="auto",
        help="auto: by the suffix; .jsonl, .ndjson and .json are JSON lines, .parquet is parquet, all others text",
    )
    add("--field", default="text", metavar="NAME", help="JSON field or parquet column with the text (default: text)")
    add("--separator", metavar="TEXT", help="text between the documents of a text file; default: a file is a document")
    add(
        "--end-of-text", default="auto", metavar="TOKEN",
        help="token to put after each document, or none; auto: the eos_token of the tokenizer's folder, if it has one",
    )  # fmt: skip
    add(
        "--held-out", type=_reader(POSITIVE_INT), default=262144, metavar="N",
        help="bytes at the end of the data to hold out, at most a tenth of it (default: %(default)s)",
    )  # fmt: skip
    add(
        "--shard-tokens", type=_reader(POSITIVE_INT), default=2**28, metavar="N",
        help="tokens of a file (default: %(default)s)",
    )  # fmt: skip
    add("--verify", action="store_true", help="compare the files in OUT with their checksums instead")


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a language model",
        description=_TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = _Options(parser.add_argument_group("data"), TrainSettings)
    data.add("data", _DATA_HELP, metavar="PATH")
    data.add("tokenizer", "tokenizer.json, or a Hugging Face tokenizer's folder; default: bytes", metavar="PATH")
    data.add("held_out", "bytes at the end of the data to hold out, at most a tenth of it")

    model = _Options(parser.add_argument_group("model"), TrainSettings)
    model.add("config", "xLSTMConfig as JSON, instead of the sizes below", metavar="FILE")
    model.add("hidden_size", "width of the residual stream")
    model.add("layers", "number of blocks")
    model.add("heads", "heads of each block")

    course = _Options(parser.add_argument_group("training"), TrainSettings)
    course.add("steps", "optimizer steps")
    course.add("sequence_length", "tokens of a training sequence")
    course.add("batch_size", "sequences of a batch")
    course.add("accumulate", "batches whose gradients make one step")
    course.add("learning_rate", "peak learning rate of AdamW")
    course.add("final_learning_rate", "what the cosine ends at, as a fraction of the peak")
    course.add("warmup", "steps of linear warm-up")
    course.add("weight_decay", "of matrices; biases and norms have none")
    course.add("clip", "largest norm of the gradient")
    course.add("seed", "of initialization and data order")
    course.add("dtype", "auto: bfloat16 on a GPU, else float32", choices=["auto", *DTYPES])
    course.switch("compile", "torch.compile the model")

    run = _Options(parser.add_argument_group("run"), RunOptions)
    run.add("out", "folder for checkpoints, metrics and the loss curve", metavar="FOLDER")
    run.switch("resume", "go on from the newest checkpoint in OUT")
    run.add("device", "cpu, cuda or cuda:N; auto: a GPU if there are kernels for it")
    run.add("threads", "CPU threads; default: one a core")
    run.add("time_limit", "save and stop after so many seconds", metavar="SECONDS")
    run.add("save_every", "steps between checkpoints")
    run.add("eval_every", "steps between evaluations on held-out data; 0: first and last only")
    run.add("log_every", "steps between points of the loss curve")
    run.switch("tensorboard", "write the history for TensorBoard too, to OUT/tensorboard")
    run.switch("shard", "under torchrun: keep a part of the weights in each process (FSDP2), not all in each")


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", description="Continues a prompt.")
    add = parser.add_argument
    add("checkpoint", help="checkpoint folder, or folder of a training run: its newest checkpoint")
    add("prompt", help="text to continue")
    add("--max-new-tokens", type=_reader(POSITIVE_INT), default=256, metavar="N", help="(default: %(default)s)")
    add(
        "--temperature", type=_reader(NOT_NEGATIVE_FLOAT), default=0.8, metavar="T",
        help="0: always the likeliest token (default: %(default)s)",
    )  # fmt: skip
    add("--top-k", type=_reader(POSITIVE_INT), metavar="K", help="sample from the K likeliest tokens only")
    add("--top-p", type=_reader(FRACTION), metavar="P", help="sample from the likeliest tokens that make up P only")
    add("--seed", type=_reader(WHOLE_NUMBER), metavar="N", help="makes sampling repeatable")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there are kernels for it")


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small model for about two minutes, sample from it, check it against transformers",
        description="Trains a small byte-level model on the source of Python's standard library, prints held-out bits "
        "per byte beside those of xz, prints a sample, and checks that transformers' own xLSTM loads the checkpoint "
        "and gives the same logits.",
    )
    add = parser.add_argument
    add("--out", default="demo", metavar="FOLDER", help="a checkpoint there is replaced (default: %(default)s)")
    add("--data", metavar="PATH", help=_DATA_HELP)
    add(
        "--seconds",
        type=_reader(POSITIVE_FLOAT),
        metavar="S",
        help="training time (default: 100 on the CPU, 20 on a GPU)",
    )
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there are kernels for it")


def _add_tasks(commands: Any) -> None:
    parser = commands.add_parser(
        "tasks",
        help="train small xLSTMs on state tracking and recall, and test them at longer lengths",
        description=_TASKS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="tasks", metavar="FOLDER", help="for the table and the plot (default: %(default)s)")
    add("--small", action="store_true", help="smaller models, and parity only by default")
    add("--tasks", nargs="+", choices=_TASKS, metavar="TASK", help=f"of {', '.join(_TASKS)} (default: all)")
    add("--models", nargs="+", choices=("1:0", "0:1", "1:1"), metavar="A:B", help="of 1:0, 0:1, 1:1 (default: all)")
    add("--steps", type=_reader(POSITIVE_INT), metavar="N", help="instead of each task's own number of optimizer steps")
    add(
        "--seconds", type=_reader(POSITIVE_FLOAT), metavar="S",
        help="time for all of it: each model's training is cut to an even share of what is left (default: no limit)",
    )  # fmt: skip
    add("--eager", action="store_true", help="no CUDA graphs")
    add("--seed", type=_reader(WHOLE_NUMBER), default=0, metavar="N", help="of weights and data (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    add("--threads", type=_reader(THREADS), metavar="N", help="CPU threads; default: 1 with --small, else one a core")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there are kernels for it")


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure this machine: the tables and plots of the docs",
        description=_BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("subjects", nargs="*", metavar="SUBJECT", help="default: those of the docs for this device")
    add("--out", default="bench", metavar="FOLDER", help="results there are replaced (default: %(default)s)")
    add("--quick", action="store_true", help="a few small settings, within a minute")
    add("--device", default="auto", help="cpu, cuda or cuda:N; auto: a GPU if there are kernels for it")
    add("--compare", nargs="+", metavar="RESULTS", help="OLD: with what is measured; OLD NEW: measure nothing")
    add(
        "--tolerance", type=_reader(NOT_NEGATIVE_FLOAT), metavar="PERCENT",
        help="with --compare: exit with status 1 if anything of ours is slower than in OLD by more than this",
    )  # fmt: skip


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert checkpoints of NX-AI's packages from and to Hugging Face folders",
        description=_CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", help="folder of a checkpoint; its format decides TARGET's")
    add("target", help="folder to make")
    add(
        "--max-shard-size", type=_reader(POSITIVE_INT), default=5 * 10**9, metavar="N",
        help="bytes of a file of weights (default: %(default)s)",
    )  # fmt: skip


def _reader(number: Number) -> Callable[[str], Any]:
    """An argparse type that accepts these numbers."""

    def read(text: str) -> Any:
        try:
            value = number.kind(text)
        except ValueError:
            value = None
        if not number.takes(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {number.text}")
        return value

    return read


class _Options:
    """Adds fields of a dataclass as options. An option that is not given is absent from the namespace: a resumed run
    takes it from its checkpoint."""

    def __init__(self, group: Any, settings: type) -> None:
        self.group = group
        self.settings = settings

    def add(self, name: str, text: str, **extra: Any) -> None:
        default = getattr(self.settings, name)
        if default is not None:
            text += f" (default: {default})"
        if "choices" not in extra:
            extra.setdefault("metavar", "X" if isinstance(default, float) else "N")
        self.group.add_argument(
            _flag(name),
            type=_reader(NUMBERS[name]) if name in NUMBERS else str,
            default=argparse.SUPPRESS,
            help=text,
            **extra,
        )

    def switch(self, name: str, text: str) -> None:
        self.group.add_argument(_flag(name), action="store_true", default=argparse.SUPPRESS, help=text)
