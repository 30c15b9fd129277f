"""Every code block of README, CONTRIBUTING and docs is run or checked, by its language.

- ``python``: the blocks of a page run one after the other, in one namespace and an empty folder. A block behind the
  line ``<!-- not run: REASON -->`` is compiled, and the names and arguments that it takes from this package are looked
  up.
- ``sh``, and lines of ``console`` that begin with ``$``: commands of this repository must parse, with their flags.
- ``mermaid``: what arrows join must have been declared.
- ``text``: no code.

Other languages, blocks without one and indented blocks are refused.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("transformers")

from flash_xlstm.cli import command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()

# Python blocks that are not run, and other programs' commands, which are not checked: how many a page has.
NOT_RUN = {"context_parallel.md": 1, "deploy.md": 3, "hub.md": 1, "migration.md": 1, "scaling.md": 4}
OTHER_COMMANDS = {
    "CONTRIBUTING.md": {".": 1, "pre-commit": 1},
    "scaling.md": {"torchtitan.train": 2},
    "serving.md": {"vllm": 1, "curl": 1},
    "training.md": {"export": 1},
}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # not to run it


def blocks_of(page: Path) -> list[Block]:
    found, lines = [], page.read_text().splitlines()
    begin = None
    for number, line in enumerate(lines):
        fence = re.match(r" *```(.*)$", line)
        if not fence:
            indented = line.startswith("    ") and begin is None and not (number and lines[number - 1].strip())
            assert not indented, f"{page.name}:{number + 1} is an indented code block: fence it, with its language"
        elif begin is None:
            begin = number
        else:
            mark = re.fullmatch(r"<!-- not run: (.+) -->", lines[begin - 1].strip()) if begin else None
            language = lines[begin].strip().removeprefix("```")
            code = inspect.cleandoc("\n".join(lines[begin + 1 : number]))
            found.append(Block(page, begin + 2, language, code, mark and mark[1]))
            begin = None
    assert begin is None, f"{page.name}: a fence is not closed"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def names(blocks: list[Block]) -> list[str]:
    return [f"{block.page.name}:{block.line}" for block in blocks]


def test_every_block_has_a_language():
    known = {"python", "sh", "console", "text", "mermaid"}
    assert not [
        f"{block.page.name}:{block.line}: {block.language!r}" for block in BLOCKS if block.language not in known
    ]
    assert len(of("python")) > 10 and len(of("sh")) > 5 and len(of("console")) > 1


def test_blocks_that_are_not_run_are_counted():
    assert Counter(block.page.name for block in of("python") if block.reason) == NOT_RUN
    assert not [block for block in BLOCKS if block.reason and block.language != "python"]


# --- python


def prepare_training(folder: Path) -> None:
    """The text and the tokenizer that training.md has."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    (folder / "src").mkdir()
    (folder / "src" / "text.py").write_text("x = 1\n" * 4000)
    tokenizer = Tokenizer(models.BPE({chr(byte): byte for byte in range(128)} | {"Ċ": 128, "Ġ": 129}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


PREPARE = {"training.md": prepare_training}


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}), ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PREPARE.get(page.name, lambda folder: None)(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in of("python"):
        if block.page == page and not block.reason:
            # The line numbers of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def source_of(module: str) -> Path:
    path = ROOT.joinpath("python", *module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


NOT_RUN_BLOCKS = [block for block in of("python") if block.reason]


@pytest.mark.parametrize("block", NOT_RUN_BLOCKS, ids=names(NOT_RUN_BLOCKS))
def test_python_that_is_not_run_names_what_exists(block):
    tree = ast.parse(block.code)
    imported = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("flash_xlstm"):
            continue
        for alias in node.names:
            found: dict = {}
            try:
                exec(f"from {node.module} import {alias.name}", found)
                imported[alias.asname or alias.name] = found[alias.name]
            except ImportError:  # a wrong name, or a library that is not installed
                assert re.search(rf"\b{alias.name}\b", source_of(node.module).read_text()), alias.name
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = call.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            called = getattr(imported.get(function.value.id), function.attr, None)
        else:
            called = imported.get(getattr(function, "id", None))
        if inspect.isfunction(called):
            parameters = inspect.signature(called).parameters
            assert not [word.arg for word in call.keywords if word.arg not in parameters], ast.unparse(call)


# --- commands


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, in words. A loop's own words are left out."""
    lines = re.sub(r"\\\n\s*(> )?", " ", block.code).splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        for part in re.split(r" && |; ", line):
            words = shlex.split(part, comments=True)
            while words and (words[0] == "do" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
                words = words[1:]
            if words and words[0] not in ("for", "done"):
                found.append(words)
    return found


SHELL = [block for block in BLOCKS if block.language in ("sh", "console")]
CHECKED = {"flash-xlstm", "make", "pip", "python", "torchrun"}
# `tool name`, in the text, with flags or arguments.
INLINE = [
    Block(page, number + 1, "inline", code, None)
    for page in PAGES
    for number, line in enumerate(page.read_text().splitlines())
    for code in re.findall(r"(?<!`)`((?:flash-xlstm|make|pip install|torchrun|python \w+/\w+\.py) [^`]*)`", line)
]


def options(parser, words: list[str]) -> None:
    """Every flag is one of the parser's. What follows a flag is not looked at: texts leave required ones out."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    assert not [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]


def check(words: list[str], block: Block, parse_benchmark) -> str | None:
    """Checks one command. The name of another program's, which is not checked."""
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "flash-xlstm":
        parser = command._parser()
        if block.language != "inline":
            parser.parse_args(rest)
        elif rest[0] != "COMMAND":
            choices = next(action.choices for action in parser._actions if action.dest == "command")
            options(choices[rest[0]], rest[1:])
    elif name == "make":
        for word in rest:
            variable, is_assignment, _ = word.partition("=")
            pattern = rf"^{variable} \?=" if is_assignment else rf"^{re.escape(word)}:"
            assert re.search(pattern, MAKEFILE, re.M), f"make {word}"
    elif name == "pip":
        for extras in re.findall(r"(?:flash-xlstm|\.)\[([\w,]+)\]", " ".join(rest)):
            assert not [extra for extra in extras.split(",") if not re.search(rf"^{extra} = \[", PYPROJECT, re.M)]
    elif name == "python" and rest[:2] == ["-m", "pytest"]:
        known = (ROOT / "tests" / "conftest.py").read_text()
        assert all(f'"{word}"' in known for word in rest[2:] if word.startswith("--"))
        assert all((ROOT / word).exists() for word in rest[2:] if word.startswith("tests"))
    elif name == "python" and rest[0] == "benchmarks/run.py":
        parse_benchmark(["mlstm" if word == "SUBJECT" else word for word in rest[1:]])
    elif name == "python":
        script = ROOT / rest[0]
        assert script.is_file(), rest[0]
        flags = [word.partition("=")[0] for word in rest[1:] if word.startswith("--") and word != "--help"]
        assert not [flag for flag in flags if f'"{flag}"' not in script.read_text()], " ".join(words)
    elif name == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        if not args.module:
            return check(["python", args.training_script, *args.training_script_args], block, parse_benchmark)
        if args.training_script != "flash_xlstm.cli":
            return args.training_script
        return check(["flash-xlstm", *args.training_script_args], block, parse_benchmark)
    else:
        return name
    return None


@pytest.fixture(scope="module")
def parse_benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        before = set(sys.modules)
        import run

        yield run.parse
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
                del sys.modules[name]


def test_commands_have_the_flags_that_the_text_gives_them(parse_benchmark):
    others: dict[str, Counter] = {}
    failed = []
    for block in SHELL + INLINE:
        for words in commands_of(block):
            try:
                other = check(words, block, parse_benchmark)
            except (AssertionError, SystemExit, KeyError) as error:
                failed.append(f"{block.page.name}:{block.line}: {' '.join(words)}: {error!r}")
                continue
            if other:
                others.setdefault(block.page.name, Counter())[other] += 1
    assert not failed, "\n".join(failed)
    assert others == OTHER_COMMANDS


# --- drawings

NODE = r'\w+(?:\[/?"[^"]*"/?\]|\("[^"]*"\)|\{\{"[^"]*"\}\})?'
NODES = rf"{NODE}(?: & {NODE})*"
STATEMENT = re.compile(
    r'flowchart (?:LR|TB)|direction (?:LR|TB)|subgraph \w+\["[^"]*"\]|end'
    rf'|{NODES}|{NODES}(?: (?:-->|-\.->)(?:\|"[^"]*"\|)? {NODES})+'
)


@pytest.mark.parametrize("block", of("mermaid"), ids=names(of("mermaid")))
def test_drawings_join_what_they_declare(block):
    statements = [line.strip() for line in block.code.splitlines()]
    assert statements[0].startswith("flowchart")
    assert not [line for line in statements if not STATEMENT.fullmatch(line)]
    depth = 0
    for line in statements:
        depth += line.startswith("subgraph ") - (line == "end")
        assert depth >= 0
    assert depth == 0
    declared = set(re.findall(r'(\w+)(?=[\[(]/?")', block.code))
    bare = re.sub(r'"[^"]*"', "", block.code)
    used = {word for line in bare.splitlines() if ">" in line for word in re.findall(r"\w+", line)}
    assert used and not used - declared
