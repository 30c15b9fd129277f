"""The benchmarks' subjects on the CPU: small runs, and what can be shown of those that need a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def subject(monkeypatch):
    """Imports a module of the folder; none of them stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def run(tmp_path, *options):
    """The document that a run leaves."""
    out = tmp_path / "results.json"
    command = [sys.executable, str(FOLDER / "run.py"), *options, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_forget_gates(tmp_path):
    options = "--settings small --dtype float32 --seconds-each 0.001 --forget-gates 3 20 --device cpu".split()
    rows = run(tmp_path, "mlstm_forget", *options)["results"]
    assert len(rows) == 8  # two gates, sizes and passes each
    assert {row["forget_gate"] for row in rows} == {3.0, 20.0}
    assert all(row["time_ms"] > 0 for row in rows)


def test_repeated_runs(tmp_path):
    options = "--runs 2 --settings small --dtype float32 --seconds-each 0.001 --peers flash_xlstm --device cpu".split()
    rows = run(tmp_path, "mlstm_repeated", *options)["results"]
    assert len(rows) == 2
    assert all(len(row["times_ms"]) == 2 and min(row["times_ms"]) > 0 for row in rows)


def test_runs_without_a_time_keep_their_place(subject):
    merge = subject("mlstm_repeated").merge
    setting = {"peer": "p", "pass": "forward", "batch": 1, "seq": 2, "heads": 3, "dqk": 4, "dv": 5, "dtype": "float32"}
    row = {"what": "mlstm", **setting}
    merged = merge([[{**row, "error": "lost"}], [], [{**row, "time_ms": 7.0}, {"what": "rates"}]])
    assert merged == [{"what": "mlstm_repeated", **setting, "times_ms": [None, None, 7.0]}]


NCU = """==PROF== Connected to process 12
==PROF== Profiling "scan" - 0: 0%....100% - 1 pass
"ID","Process ID","Process Name","Kernel Name","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","12","python","void outputs_kernel<One<0, 256>>(OutputArgs)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","2,630,000,000"
"0","12","python","void outputs_kernel<One<0, 256>>(OutputArgs)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","801,020"
"0","12","python","void outputs_kernel<One<0, 256>>(OutputArgs)","0","9.0","Command line profiler metrics","lts__throughput.avg.pct_of_peak_sustained_elapsed","%","84.55"
"1","12","python","scan_gates_kernel(Work)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","16,100"
"""  # noqa: E501


def test_counters_are_read(subject):
    first, second = subject("mlstm_counters").parse(NCU)
    assert first.pop("kernel") == "void outputs_kernel<One<0, 256>>(OutputArgs)"
    assert first == {"what": "mlstm_counters", "dram_mb": 2630.0, "time_us": 801.02, "l2_percent": 84.55}
    assert second == {"what": "mlstm_counters", "kernel": "scan_gates_kernel(Work)", "time_us": 16.1}
    assert subject("mlstm_counters").parse("==ERROR== no permission") == []
    with pytest.raises(ValueError, match="is Gbyte; it must be byte"):
        subject("mlstm_counters").parse(NCU.replace('"byte","2,630,000,000"', '"Gbyte","2.63"'))


def test_counters_say_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (row,) = run(tmp_path, "mlstm_counters")["results"]
    assert row["what"] == "absent" and "ncu" in row["error"]


def test_pictures_are_named_after_their_results(subject, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("mlstm_peers_h200", "decode_h200", "prefill_h200"):
        document = json.loads((FOLDER / "results" / f"{name}.json").read_text())
        for path in subject("plot").plot(document, tmp_path, name):
            assert (FOLDER / "results" / path.name).exists()


def test_every_pointwise_op_is_measured_both_ways(subject, tmp_path):
    options = "--rows 16 --columns 64 --dtype float32 --seconds-each 0.001 --device cpu".split()
    rows = [row for row in run(tmp_path, "pointwise", *options)["results"] if row.get("peer") == "flash_xlstm"]
    assert {(row["op"], row["pass"]) for row in rows} == {
        (op, name) for op in subject("pointwise").OPS for name in ("forward", "backward")
    }
    assert all("chain_time_us" in row for row in rows), rows


def test_losses_beside_peers(tmp_path):
    options = "--tokens 40 --dim 16 --vocabulary 100 --dtype float32 --seconds-each 0.001 --device cpu".split()
    rows = [row for row in run(tmp_path, "loss", *options)["results"] if row["what"] == "loss"]
    assert {(row["peer"], row["soft_cap"]) for row in rows} >= {
        (peer, cap) for peer in ("flash_xlstm", "logits", "torch", "products") for cap in (30.0, None)
    }
    assert all(row["time_ms"] > 0 for row in rows), rows
    assert all(row["loss_error"] < 1e-5 for row in rows if row["peer"] in ("flash_xlstm", "logits", "torch"))


def test_before_after_says_what_it_takes():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "before_after.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "OLD NEW --out FILE" in done.stdout
