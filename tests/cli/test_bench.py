"""``flash-xlstm bench``, with a subject of a second; comparisons of results files."""

from __future__ import annotations

import json

import pytest

from flash_xlstm.cli import main

pytest.importorskip("tqdm")
from flash_xlstm.cli import bench

SMALL = "--settings small --dtype float32 --seconds-each 0.001 --forget-gates 3"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.QUICK, "cpu", {"mlstm_forget": SMALL})


def document(*times, peer="flash_xlstm", cpu="a"):
    rows = [{"what": "mlstm", "peer": peer, "seq": 2**x, "time_ms": time_ms} for x, time_ms in enumerate(times)]
    rows = [row if row["time_ms"] else {**row, "error": "out of memory"} for row in rows]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    return {"subject": "mlstm", "environment": {"cpu": cpu, "torch": "2.13.0"}, "results": rows}


@pytest.fixture
def compare(tmp_path, capfd):
    """Compares two documents by the command line. Returns the exit code and what it printed."""

    def call(old, new, *options):
        for name, content in (("old", old), ("new", new)):
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        code = main(["bench", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return call


def test_a_quick_run_writes_tables_rows_and_pictures(small, tmp_path, capfd):
    out = tmp_path / "bench"
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capfd.readouterr()
    rows = json.loads((out / "mlstm_forget.json").read_text())["results"]
    assert len(rows) == 4 and all(row["time_ms"] > 0 for row in rows)
    report = (out / "report.md").read_text()
    assert report.startswith("## mlstm_forget") and "forward+backward" in report and report in printed.out
    assert "mlstm_forget: 100%" in printed.err
    # The same once more, compared with the first; nothing is a million percent slower.
    options = ["--compare", str(out / "mlstm_forget.json"), "--tolerance", "1e6"]
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "again"), *options]) == 0
    assert "0 of 4 rows" in capfd.readouterr().out
    assert main(["bench", "--compare", str(out), str(tmp_path / "again"), "--tolerance", "1e6"]) == 0
    assert "0 of 4 rows" in capfd.readouterr().out


def test_a_run_is_compared_with_what_was_in_its_folder_before(small, tmp_path, capfd):
    call = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path), "--compare", str(tmp_path)]
    assert main(call) == 2 and not list(tmp_path.iterdir())  # there is nothing yet, which is told before the run
    assert "--compare" in capfd.readouterr().err
    assert main(call[:-2]) == 0
    file = tmp_path / "mlstm_forget.json"
    kept = json.loads(file.read_text())
    for row in kept["results"]:
        row["time_ms"] /= 1e6
    file.write_text(json.dumps(kept))
    (tmp_path / "other.json").write_text(json.dumps(document(1.0)))  # of another run, not of this one
    capfd.readouterr()
    assert main([*call, "--tolerance", "5"]) == 1
    out = capfd.readouterr().out
    assert "4 of 4 rows slower" in out and "not in new: other" in out


def test_a_failed_subject_is_an_error_with_its_last_line(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(bench.QUICK, "cpu", {"mlstm_forget": "--settings nonsense"})
    assert main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "mlstm_forget failed: run.py: error: argument --settings: invalid choice" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "unknown subject nonsense; there are mlstm, "),
        (["--quick", "serving"], "--quick has no serving on this device"),
        (["--tolerance", "5"], "--tolerance needs --compare"),
        (["--compare", "a", "b", "c"], "--compare takes OLD or OLD NEW, not 3"),
        (["--compare", "a", "b", "--quick"], "give OLD alone"),
        (["--compare", "nowhere", "nowhere"], "flash-xlstm: error: --compare: "),
        (["--compare", "nowhere"], "nowhere"),
        (["--compare", "a", "b", "--tolerance", "-1"], "--tolerance"),
    ],
)
def test_wrong_arguments(arguments, message, capfd):
    try:
        code = main(["bench", "--device", "cpu", *arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 2 and message in capfd.readouterr().err


def test_slower_rows_of_ours_are_regressions(compare):
    old = document(1.0, 2.0)
    assert compare(old, document(1.04, 2.0), "--tolerance", "5")[0] == 0
    code, text = compare(old, document(1.06, 2.0), "--tolerance", "5")
    assert code == 1 and "1 of 2 rows slower" in text and "mlstm flash_xlstm 1" in text
    assert compare(old, document(1.06, 2.0))[0] == 0  # without a tolerance it only tells
    assert "not in new: 1 of old's settings" in compare(old, document(1.0))[1]
    code, text = compare(old, document(None, 2.0), "--tolerance", "5")
    assert code == 1 and "out of memory" in text
    assert compare(document(1.0, peer="tfla"), document(9.0, peer="tfla"), "--tolerance", "5")[0] == 0


def test_rates_are_better_when_higher(compare):
    def rates(value):
        row = {"what": "serving", "engine": "vllm", "tokens_per_s": value}
        return {**document(), "results": [row]}

    assert compare(rates(100.0), rates(90.0), "--tolerance", "5")[0] == 1
    assert compare(rates(100.0), rates(120.0), "--tolerance", "5")[0] == 0


def test_what_cannot_be_compared_is_an_error(compare):
    old = document(1.0)
    assert "one device; these are of a and b" in compare(old, document(1.0, cpu="b"), "--tolerance", "5")[1]
    assert compare(old, document(1.0, cpu="b"))[0] == 0
    code, text = compare(old, document(1.0, peer="tfla"))
    assert code == 2 and "OLD's old and NEW's new have no setting in common" in text and "usage" not in text
    code, text = compare({"environment": {}}, old)
    assert code == 2 and "is not a results file" in text


def test_files_of_other_names_are_found_by_their_subject(tmp_path, capfd):
    """A folder of many results, as the repository's, beside what a run writes."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, name, content in (
        (old, "mlstm_a", document(1.0, cpu="a")),
        (old, "mlstm_b", document(4.0, cpu="b")),
        (old, "slstm_a", {**document(1.0), "subject": "slstm"}),
        (new, "mlstm", document(2.0, cpu="b")),
    ):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    for path in (new, new / "mlstm.json"):
        assert main(["bench", "--compare", str(old), str(path), "--tolerance", "5"]) == 0
        out = capfd.readouterr().out
        assert "mlstm beside mlstm_b" in out and "not in new: mlstm_a, slstm_a" in out and "2.000" in out
    assert main(["bench", "--compare", str(old), str(new)]) == 0
    assert "mlstm beside mlstm_a" in capfd.readouterr().out
    for name in ("mlstm_a", "mlstm_b"):
        (old / f"{name}.json").unlink()
    (old / "cpu.json").write_text(json.dumps({**document(1.0), "subject": "cpu"}))
    assert main(["bench", "--compare", str(old), str(new)]) == 2
    assert "no subject in common: OLD has cpu, slstm; NEW has mlstm" in capfd.readouterr().err
