"""README and docs: links lead somewhere, the reference has every op, and benchmarks.md names every results file with a
command that parses."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = ROOT / "docs" / "benchmarks.md"


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    broken = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_reference_has_every_op():
    import importlib

    from flash_xlstm import ops

    text = (ROOT / "docs" / "reference.md").read_text()
    paths = re.findall(r"<!-- docstring: ([\w.]+)", text)
    modules = re.findall(r"<!-- docstrings: ([\w.]+) -->", text)
    assert len(paths) + len(modules) == text.count("<!-- docstring")
    paths += [f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__]
    assert len(paths) == len(set(paths))
    found = []
    for path in paths:
        module, _, name = path.rpartition(".")
        if module == "flash_xlstm.models" or module.startswith("flash_xlstm.models."):
            pytest.importorskip("transformers")
        found.append(getattr(importlib.import_module(module), name))
    assert all(value.__doc__ for value in found)
    public = [getattr(ops, name) for name in ops.__all__ if not name.endswith("State")]
    assert {value for value in found if value.__module__.startswith("flash_xlstm.ops.")} == set(public)


def test_paths_in_the_text_exist():
    text = "".join(page.read_text() for page in PAGES)
    paths = re.findall(r"`((?:csrc|python|tests|benchmarks|examples|docs)/[\w./]+)`", text)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_what_python_writes_beside_the_hooks_is_not_published():
    pathspec = pytest.importorskip("pathspec")  # what mkdocs reads the setting with
    text = (ROOT / "mkdocs.yml").read_text()
    lines = re.search(r"^exclude_docs: (?:\|\n)?((?:.+\n)(?:  .+\n)*)", text, re.M)[1].split()
    excluded = pathspec.GitIgnoreSpec.from_lines(lines)
    assert excluded.match_file("hooks.py") and excluded.match_file("__pycache__/hooks.cpython-311.pyc")
    assert not any(excluded.match_file(page.name) for page in PAGES)


def test_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_results_file_has_a_command():
    names = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert names == set(re.findall(r"\(\.\./benchmarks/results/([\w.]+)\)", TABLE.read_text()))


def commands():
    """The commands in the table of results files, without "the same"."""
    rows = TABLE.read_text().split("## Results files")[1].split("\n## ")[0].splitlines()
    found = [
        command for row in rows if row.startswith("| [") for command in re.findall(r"`([^`]+)`", row.split("|")[2])
    ]
    others = ("--", "python ", "flash-xlstm ", "torchrun ")
    return [command.split() for command in found if not command.startswith(others)]


def test_commands_parse(monkeypatch, capsys):
    """Those of the table, and those of `flash-xlstm bench`."""
    pytest.importorskip("transformers")
    bench = pytest.importorskip("flash_xlstm.cli.bench")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    assert len(commands()) > 20
    plans = (plan for kind in (bench.FULL, bench.QUICK) for plan in kind.values())
    planned = [[name, *options.split()] for plan in plans for name, options in plan.items()]
    for name, *options in [*commands(), *planned]:
        run.parse([name, *options])
    assert {name for name, *_ in commands()} == set(run.SUBJECTS)
    for module in {*run.SUBJECTS, "run", "peers", "graphs", "language_models", "processes", "triton_warmup"}:
        sys.modules.pop(module, None)
