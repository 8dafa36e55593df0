"""examples/forecasting.py: tiny runs, its losses, stop and resume, malformed tables, the naive forecast of ETTh1."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, example_script, refused, succeed

script = example_script("forecasting")
SIZES = ["--context", 12, "--horizon", 4, "--season", 6]


@pytest.fixture
def table(tmp_path):
    """Two waves of six rows, 200 rows, with dates."""
    t = np.arange(200)
    rows = [f"day {i},{np.sin(i * np.pi / 3) + 0.01 * i:.6f},{np.cos(i * np.pi / 3):.6f}" for i in t]
    path = tmp_path / "waves.csv"
    path.write_text("\n".join(["date,up,down", *rows]) + "\n")
    return path


def test_sunspots(script, tmp_path):
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    pytest.importorskip("matplotlib")
    output = succeed(script, "--plot", tmp_path / "forecast.png")
    assert re.search(r"^repeat season +1\.277 +0\.845$", output, re.MULTILINE)
    assert re.search(r"^test MSE \d\.\d+, repeating the last season 1\.2770", output.splitlines()[-1])
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("forecast", ["point", "gaussian", "quantile"])
def test_learns_waves(script, table, forecast):
    options = [*SIZES, "--forecast", forecast, "--steps", 400, "--evaluate", 50, "--hidden", 16, "--dropout", 0]
    output = succeed(script, "--data", table, *options, "--lr", 0.01)
    mse, naive = map(float, re.search(r"test MSE (\S+), repeating the last season (\S+) ", output).groups())
    assert naive == pytest.approx(0.5 * (0.06 / np.std(table_values(table)[:120, 0])) ** 2, rel=0.01)
    assert mse < 0.1
    assert ("80 % interval" in output) == (forecast != "point")


def table_values(path):
    return np.array([line.split(",")[1:] for line in path.read_text().splitlines()[1:]], float)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stopped_and_resumed(script, table, tmp_path, monkeypatch, cell):
    options = "--data", table, *SIZES, "--cell", cell, "--layers", 2, "--dropout", 0.3
    check_stop_and_resume(script, "Forecasting", tmp_path, monkeypatch, 17, *options)


@pytest.mark.parametrize("forecast", ["point", "gaussian", "quantile"])
def test_gradients_of_the_losses(script, forecast):
    random = np.random.default_rng(0)
    numbers, y = random.normal(size=(3, 4, script.OUTPUTS[forecast])), random.normal(size=(3, 4))
    loss = script.LOSSES[forecast]
    _, grad = loss(numbers, y)
    for place in np.ndindex(numbers.shape):
        step = np.zeros_like(numbers)
        step[place] = 1e-6
        slope = (loss(numbers + step, y)[0] - loss(numbers - step, y)[0]) / 2e-6
        assert grad[place] == pytest.approx(slope, abs=1e-5)


def test_a_table_without_a_header(script, table, tmp_path):
    rows = table.read_text().splitlines()[1:]
    bare, numbers = tmp_path / "bare.csv", tmp_path / "numbers.csv"
    bare.write_text("\n".join(rows))
    numbers.write_text("\n".join(row.partition(",")[2] for row in rows))
    for path, columns in ((bare, ["column 2", "column 3"]), (numbers, ["column 1", "column 2"])):
        name, found, values = script.read_table(path)
        assert (name, found) == (f"{path.name} (without a header)", columns)
        np.testing.assert_array_equal(values, table_values(table))
    bare.write_text("x,1\nx,2\nx,many\n")
    assert "row 3, 'column 2': expected a finite number" in refused(script, "--data", bare)


def test_windows_keep_the_parts_apart(script, table):
    data = script.load(script.Settings(context=12, horizon=4, season=6), {"data": table})
    assert data.bounds == (120, 160, 200)
    ends = {part: (data.windows(part)[0], data.windows(part)[-1] + 4) for part in ("train", "valid", "test")}
    assert ends == {"train": (12, 120), "valid": (120, 160), "test": (160, 200)}
    x, y = data.cut(np.array([20, 30]))
    np.testing.assert_array_equal(x[:, 1], data.values[18:30])
    np.testing.assert_array_equal(y[0], data.values[20:24])
    np.testing.assert_array_equal(script.repeat_season(x, data.info)[1], data.values[24:28])
    np.testing.assert_array_equal(script.repeat_last(x, data.info)[1], data.values[[29] * 4])


def test_repeating_the_day_on_etth1(script):
    """The figure that the forecasts are held against: 0.424."""
    folder = os.environ.get("RNNFAST_DATA")
    path = Path(folder or ".") / "timeseries" / "ETTh1.csv"
    if folder is None or not path.exists():
        pytest.skip("timeseries/ETTh1.csv of RNNFAST_DATA is not there")
    data = script.load(script.Settings(split="8640,2880,2880"), {"data": path})
    x, y = data.cut(data.windows("test"))
    assert script.errors(script.repeat_season(x, data.info), y)["mse"] == pytest.approx(0.424, abs=5e-4)


MALFORMED = {
    "empty": ("", "expected a header and rows of numbers, got 0 rows"),
    "header": ("date,a\n", "expected a header and rows of numbers, got 1 row"),
    "short": ("date,a\n" + "x,1\nx,2\n" * 10, "expected more rows for a context of 12"),
    "ragged": ("date,a\nx,1\nx,2,3\n", "row 3: expected 2 columns as in row 1, got 3"),
    "words": ("date,a\nx,1\nx,many\n", "row 3, 'a': expected a finite number, got 'many'"),
    "nan": ("date,a\nx,1\nx,nan\n", "row 3, 'a': expected a finite number, got 'nan'"),
    "dates": ("date\nx\ny\n", "expected columns of numbers, got only 'date'"),
    "constant": ("date,a\n" + "x,1\n" * 200, "expected series that change, got 'a', which is constant"),
    "binary": ("a,b\0c\n", "expected text, got a binary file"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_tables(script, tmp_path, case):
    content, message = MALFORMED[case]
    (tmp_path / "table.csv").write_text(content)
    assert message in refused(script, "--data", tmp_path / "table.csv", *SIZES)


def test_wrong_arguments(script, table, tmp_path):
    assert "cannot be read" in refused(script, "--data", tmp_path / "none.csv")
    assert "expected three positive numbers" in refused(script, "--data", table, *SIZES, "--split", "60,40")
    assert "expected the 900 rows" in refused(script, "--data", table, *SIZES, "--split", "300,300,300")
    assert "--season: expected at most the context" in refused(script, "--data", table, "--context", 5)


def test_no_statsmodels(script, monkeypatch):
    monkeypatch.setattr(script.harness, "find_spec", lambda name: None)
    assert "needs statsmodels: pip install 'rnnfast[examples]'" in refused(script)
