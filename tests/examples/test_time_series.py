from __future__ import annotations

import datetime
import sys

import pytest
import torch

for _package in ("matplotlib", "tqdm"):
    pytest.importorskip(_package)


@pytest.fixture(scope="module")
def example(load_example):
    torch.set_num_threads(1)  # as the example does
    return load_example("time_series")


def test_beats_the_seasonal_naive_forecast(example):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    months, values = example.load_series()
    assert len(months) == len(values) > 500 and torch.isfinite(values).all()
    model, scaling = example.train(values[: -example.HELD_OUT], steps=30, seed=0)
    errors = example.mean_absolute_errors(example.evaluate(model, scaling, values, example.HELD_OUT))
    assert errors["slstm"] < errors["seasonal_naive"]


def test_forecasts_line_up_and_do_not_look_ahead(example):
    """A series rises by the same amount every year. Every forecast but the seasonal one is exact, and does not depend
    on later months."""
    torch.manual_seed(0)
    values = torch.arange(300.0) / 12
    model, scaling = example.Forecaster().eval(), example.Scaling(1.0, 0.5)
    torch.nn.init.zeros_(model.predict.weight)
    torch.nn.init.zeros_(model.predict.bias)
    forecasts = example.evaluate(model, scaling, values, 48)
    errors = example.mean_absolute_errors(forecasts)
    assert len(forecasts["truth"]) == 48 - 12 + 1
    assert torch.equal(forecasts["truth"][0], values[252:264]) and torch.equal(forecasts["truth"][-1], values[288:])
    assert errors["slstm"] < 1e-4 and errors["seasonal_naive"] == pytest.approx(1.0, abs=1e-4)

    torch.nn.init.normal_(model.predict.weight)
    before = example.evaluate(model, scaling, values, 48)["slstm"]
    values[270:] += torch.randn(30)
    after = example.evaluate(model, scaling, values, 48)["slstm"]
    assert torch.equal(before[:7], after[:7]) and not torch.equal(before[20], after[20])


def test_runs_on_a_series_that_is_made_here(example, tmp_path, monkeypatch, capsys):
    """Without statsmodels, whose series the example reads: twenty-five years that rise, with a season and noise."""
    t = torch.arange(300.0)
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0))
    values = 300 + t / 4 + torch.sin(t * torch.pi / 6) + noise / 5
    months = [datetime.date(1970 + n // 12, n % 12 + 1, 1) for n in range(300)]
    monkeypatch.setattr(example, "load_series", lambda: (months, values))
    monkeypatch.setattr("sys.argv", ["time_series.py", "--out", str(tmp_path), "--steps", "20"])
    assert example.main() == 0  # better than the seasonal naive forecast
    assert "mean absolute error" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "forecast.png"}


def test_a_missing_series_is_told_with_what_brings_it(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install statsmodels pandas \("):
        example.load_series()
