"""The benchmarks' subjects on the CPU: small runs, and parts of those that need a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def subject(monkeypatch):
    """Imports modules of the folder, and removes them from sys.modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield lambda name: __import__(name)
    for name in set(sys.modules) - before:
        if (FOLDER / f"{name}.py").exists():
            del sys.modules[name]


def run(tmp_path, *options):
    """The document that a run writes."""
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


def test_steps_on_a_cpu_have_no_floor(tmp_path):
    """Its caches may hold the state, which is then faster than a large copy."""
    options = "--batches 1 --heads 1 --dqk 16 --dv 16 --peers flash_xlstm --seconds-each 0.001 --device cpu".split()
    (row,) = [row for row in run(tmp_path, "step", *options)["results"] if row["what"] == "step"]
    assert row["time_us"] > 0 and row["gb_per_s"] > 0 and not {"floor_us", "share_of_copy"} & set(row)


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_pointwise_op_is_measured_both_ways(subject, tmp_path):
    options = "--rows 16 --columns 64 --dtype float32 --seconds-each 0.001 --device cpu".split()
    rows = [row for row in run(tmp_path, "pointwise", *options)["results"] if row.get("peer") == "flash_xlstm"]
    assert {(row["op"], row["pass"]) for row in rows} == {
        (op, name) for op in subject("pointwise").OPS for name in ("forward", "backward")
    }
    assert all("chain_time_us" in row for row in rows), rows


@pytest.mark.slow
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


def test_two_builds_in_turns(tmp_path):
    site, out = Path(importlib.util.find_spec("flash_xlstm").origin).parents[1], tmp_path / "results.json"
    options = ["--settings", "small", "--device", "cpu", "--milliseconds", "1", "--out", out]
    subprocess.run([sys.executable, FOLDER / "in_turns.py", site, site, *options], check=True)
    found = json.loads(out.read_text())
    assert len(found["results"]) == 4 and all(len(row["old_ms"]) == len(row["new_ms"]) == 2 for row in found["results"])
    assert all(0 < row["ratio"] < 100 for row in found["results"])
    assert [row["settings"] for row in found["summary"]] == [2, 2]


def test_training_steps_of_two_builds_in_turns(tmp_path):
    pytest.importorskip("transformers")
    site, out = Path(importlib.util.find_spec("flash_xlstm").origin).parents[1], tmp_path / "results.json"
    options = ["--subject", "train", "--cases", "eager", "checkpointed", "--size", "tiny", "--device", "cpu"]
    command = [sys.executable, FOLDER / "in_turns.py", site, site, *options, "--steps", "2", "--out", out]
    subprocess.run(command, check=True)
    found = json.loads(out.read_text())
    assert [row["case"] for row in found["results"]] == ["eager", "checkpointed"]
    assert all(len(row["old_ms"]) == len(row["new_ms"]) == 4 and row["ratio"] > 0 for row in found["results"])
    assert [line["of"] for line in found["summary"]] == ["eager", "checkpointed"]


@pytest.mark.slow
def test_training_steps(subject, tmp_path):
    pytest.importorskip("transformers")
    cases = ["eager", "checkpointed", "eager_fused", "tokens_2048", "transformers"]
    options = ["--steps", "2", "--warmup", "1", "--profile", "--profile-kernels", "2", "--device", "cpu"]
    document = run(tmp_path, "train", "--cases", *cases, "--size", "tiny", *options)
    rows = {row["case"]: row for row in document["results"] if row["what"] == "train"}
    assert list(rows) == cases
    assert all("error" not in row for row in rows.values()), rows
    (_, width, blocks, heads), (batch, seq) = subject("train").SIZES["tiny"]
    assert rows["eager"]["loss"] == pytest.approx(rows["transformers"]["loss"], rel=0.02)
    assert rows["tokens_2048"]["batch"] * rows["tokens_2048"]["seq"] == batch * seq
    for row in rows.values():
        without_embedding = row["parameters"] - 256 * width
        tflops = 6 * without_embedding * batch * seq / row["time_ms"] / 1e9
        assert row["tflops"] == pytest.approx(tflops)
        assert row["step_over_products"] == pytest.approx(row["time_ms"] / row["products_ms"])
    assert len({row["parameters"] for row in rows.values()}) == 1
    # three products a weight, four where a checkpoint makes the forward again
    multiplied = {name: row["products_tflops"] * row["products_ms"] * 1e9 for name, row in rows.items()}
    norms_and_biases = blocks * (3 * width + 2 * heads) + width
    head, in_blocks = 256 * width, rows["eager"]["parameters"] - norms_and_biases - 2 * 256 * width
    assert multiplied["eager"] == pytest.approx(6 * batch * seq * (in_blocks + head))
    assert multiplied["checkpointed"] == pytest.approx(batch * seq * (8 * in_blocks + 6 * head))
    profiles = [row for row in document["results"] if row["what"] == "profile"]
    assert [row["case"] for row in profiles] == cases
    classes = [f"{name}_ms" for name in (*subject("train").CLASSES, "rest")]
    for row in profiles:
        assert sum(row[name] for name in classes) == pytest.approx(row["all_ms"])
        assert min(row["products_ms"], row["optimizer_ms"], row["loss_ms"]) > 0, row
    assert all(row["mlstm_ms"] > 0 for row in profiles if row["case"] != "transformers")
    kernels = [row for row in document["results"] if row["what"] == "kernel" and row["case"] == "eager"]
    assert len(kernels) == 2 and kernels[0]["ms"] >= kernels[1]["ms"]
    steps, profile, constant = subject("report").report(document)
    assert all(f"| {name} |" in profile for name in cases) and "| 1 x 128 |" in constant
    assert all(f"| {name} |" in steps for name in cases if name != "tokens_2048")
    pytest.importorskip("matplotlib")
    (path,) = subject("plot").plot(document, tmp_path, "train")
    assert path.stat().st_size > 10_000


def test_a_peer_that_is_not_installed_is_a_row(subject, tmp_path):
    if importlib.util.find_spec("xlstm") is not None:
        pytest.skip("the xlstm package is installed")
    options = ["--steps", "1", "--warmup", "1", "--size", "tiny", "--device", "cpu"]
    (row,) = run(tmp_path, "train", "--cases", "xlstm_large", *options)["results"]
    assert row["case"] == "xlstm_large" and "No module named 'xlstm'" in row["error"]


@pytest.mark.slow
def test_dropin(tmp_path):
    pytest.importorskip("transformers")
    options = "--models transformers tirex2 --size tiny --device cpu --threads 1 --seconds 0.01".split()
    rows = run(tmp_path, "dropin", *options)["results"]
    assert [row["what"] for row in rows[:3]] == ["sequence", "training", "token"]
    assert all(row["ratio"] > 0 and row.get("difference", 0) < 1e-4 for row in rows[:3]), rows
    if importlib.util.find_spec("tirex2") is None:
        assert "No module named 'tirex2'" in rows[3]["error"]


KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "products",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>": "products",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<...>>": "optimizer",
    "void flash_xlstm::hopper::outputs_kernel<Makes<...>>": "mlstm",
    "void flash_xlstm::rms_norm_backward_kernel<...>": "pointwise",
    "flash_xlstm::sum_rows_kernel(float const*)": "pointwise",
    "triton_poi_fused__to_copy_add_mul_silu_3": "pointwise",
    "void flash_xlstm::cuda::(anonymous namespace)::float8_columns_kernel<...>": "pointwise",
    "triton_red_fused__log_softmax__to_copy_7": "loss",
    "void flash_xlstm::soft_cap_kernel<...>": "loss",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": "copies",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, ...>": "copies",
    "Memcpy DtoD (Device -> Device)": "copies",
    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<...>": "rest",
}


@pytest.mark.parametrize(("kernel", "group"), KERNELS.items())
def test_kernels_have_a_class(subject, kernel, group):
    assert subject("train").class_of(kernel) == group


def test_how_flat_a_token_is_at_constant_tokens(subject):
    rows = [
        {"what": "train", "case": f"tokens_{seq}", "batch": 8192 // seq, "seq": seq, "time_ms": ms}
        for seq, ms in ((8192, 11.0), (2048, 10.0))
    ]
    assert subject("train").summarize(rows)[-1] == {"case": "tokens_8192", "time_over_shortest": pytest.approx(1.1)}


@pytest.mark.slow
def test_precisions(subject, tmp_path):
    pytest.importorskip("transformers")
    text = tmp_path / "text"
    text.mkdir()
    for name in range(40):
        (text / f"{name:02}.txt").write_text(f"file {name}: the quick brown fox jumps over the lazy dog. " * 10)
    kinds = ["float32", "bfloat16_autocast", "bfloat16", "float16_scaled"]
    kinds += ["float8"] if importlib.util.find_spec("torchao") else []
    sizes = "--steps 40 --shape 4x32 --width 32 --blocks 1 --heads 2 --held-out-batches 2 --window 10 --device cpu"
    files = [str(path) for path in sorted(text.iterdir())]
    document = run(tmp_path, "precision", "--precisions", *kinds, "--text", *files, *sizes.split())
    rows = document["results"]
    assert [row["precision"] for row in rows] == kinds
    assert all("error" not in row and len(row["train_losses"]) == 4 for row in rows), rows
    reference = rows[0]["held_out_loss"]
    assert reference < rows[0]["train_losses"][0] - 0.5  # it learns
    assert rows[0]["over_float32"] == 0.0 and {line["precision"] for line in document["summary"]} == set(kinds)
    for row in rows[1:]:
        assert row["over_float32"] == pytest.approx(row["held_out_loss"] / reference - 1)
        assert row["train_losses"] != rows[0]["train_losses"]  # it is another precision
    assert abs(rows[1]["over_float32"]) < 0.01
    (precisions,) = subject("report").report(document)
    assert precisions.count("%") == len(kinds)
    pytest.importorskip("matplotlib")
    (path,) = subject("plot").plot(document, tmp_path, "precision")
    assert path.stat().st_size > 10_000


def test_every_precision_has_a_label(subject):
    assert set(subject("plot").PRECISIONS) == set(subject("precision").PRECISIONS)


def test_text_is_held_out_by_files(subject, tmp_path):
    files = []
    for name in range(41):
        files.append(tmp_path / f"{name:02}.py")
        files[-1].write_bytes(b"\xff" if name == 7 else f"<{name}>".encode())
    train, held_out = subject("precision").read_text(files)
    assert held_out == b"<0><21>" and train.count(b"<") == 38  # of 40, without the one that is no text
    train, held_out = subject("precision").read_text(None)
    assert len(train) > 10 * len(held_out) > 10**6


def test_learning_rates_rise_and_fall(subject):
    rates = [subject("precision").learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[4] == 2.0 == max(rates) and rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(0.2, rel=0.01)


@pytest.mark.slow
def test_cpu(tmp_path):
    options = "--slstm 2x8x1x16 --mlstm 1x128x2x16x16 --others --no-model --threads 1 2 --seconds 0"
    options = [*options.split(), "--dtypes", "float32"]
    rows = run(tmp_path, "cpu", *options)["results"]
    assert len(rows) == 2 * 2 * 2  # ops, passes, threads
    assert all(row["share"] > 0 and row["calls_each"] >= 5 for row in rows)
    assert {row["what"] for row in rows if "vs_lstm" in row} == {"slstm"}
