"""Forecasts of several series at once, with intervals, by a recurrent network; trained with NumPy and rnnfast alone.

    python forecasting.py                                          # yearly sunspots (statsmodels), 11 years ahead
    python forecasting.py --forecast gaussian --plot sunspots.png
    python forecasting.py --data ETTh1.csv --split 8640,2880,2880 --forecast point --plot ett.png

A table (CSV: a header, if there is one; a column of dates, if there is one, comes first; numbers) is split in order into
training, validation and test rows and scaled by the training part's means and deviations. The network reads `context`
rows and says, at once, of every series and each of the next `horizon` rows: a value (point), some quantiles, or a mean
and a deviation (gaussian). Two forecasts that cost nothing are printed beside it: the last value repeated, and the last
season (day, solar cycle) repeated. A forecast that does not beat them is worth nothing.

Sizes in comments: N rows, S series, C context, F horizon, B windows of a batch, K numbers for each value, Q quantiles.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import click
import harness
import numpy as np
from harness import CELLS, Failure, Number, Run, Step

import rnnfast


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the table. Sizes of 0 depend on the data: see `SUNSPOTS` and `FILES`."""

    cell: str = "gru"
    hidden: int = 64
    layers: int = 1
    dropout: float = 0.1
    forecast: str = "quantile"
    context: int = 0
    horizon: int = 0
    season: int = 0
    split: str = "60,20,20"
    batch: int = 32
    steps: int = 3000
    lr: float = 0.003
    decay: float = 0.01
    clip: float = 1.0
    evaluate: int = 50
    patience: int = 10
    seed: int = 0


TINY = Settings(hidden=8, steps=40, evaluate=10, batch=8)
SUNSPOTS = {"context": 44, "horizon": 11, "season": 11}  # years; a solar cycle has about eleven
FILES = {"context": 96, "horizon": 24, "season": 24}  # rows, of an hour each
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
OUTPUTS = {"point": 1, "gaussian": 2, "quantile": len(QUANTILES)}  # K


# The table -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """Series side by side, scaled, and where each part begins."""

    name: str
    digest: str
    info: dict[str, Any]  # columns, means, deviations, context, horizon, season
    values: np.ndarray  # [N, S], float32
    bounds: tuple[int, int, int]  # rows: training before the first, validation before the second, test before the third

    def windows(self, part: str) -> np.ndarray:
        """First rows of what is forecast, of every window whose forecast lies in the part: its context may not."""
        start, stop = {"train": (0, 0), "valid": (0, 1), "test": (1, 2)}[part]
        first = self.info["context"] if part == "train" else max(self.bounds[start], self.info["context"])
        return np.arange(first, self.bounds[stop] - self.info["horizon"] + 1)

    def cut(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Contexts x [C, B, S] and what follows, y [B, F, S], for windows that forecast from the rows `first` [B] on."""
        back, ahead = np.arange(-self.info["context"], 0), np.arange(self.info["horizon"])
        return self.values[back[:, None] + first], self.values[first[:, None] + ahead]


def load(settings: Settings, options: dict[str, Any]) -> Table:
    """The table of --data, or the sunspots, ready to be trained on."""
    path = options["data"]
    name, columns, values = sunspots() if path is None else read_table(path)
    sizes = {key: getattr(settings, key) or value for key, value in (FILES if path else SUNSPOTS).items()}
    bounds = split_rows(name, settings.split, len(values), sizes)
    mean, deviation = values[: bounds[0]].mean(axis=0), values[: bounds[0]].std(axis=0)
    for column in np.flatnonzero(deviation == 0.0):
        raise Failure(f"{name}: expected series that change, got {columns[column]!r}, which is constant")
    info = {"columns": columns, "mean": mean.tolist(), "deviation": deviation.tolist(), **sizes}
    scaled = ((values - mean) / deviation).astype(np.float32)
    return Table(name, harness.digest_of(values), info, scaled, bounds)


def sunspots() -> tuple[str, list[str], np.ndarray]:
    """Name, columns and values of the mean number of sunspots of every year from 1700 to 2008."""
    harness.need("statsmodels", "the default table, sunspots,")
    from statsmodels.datasets import sunspots as dataset

    values = dataset.load().data["SUNACTIVITY"].to_numpy(np.float64)
    return "sunspots 1700-2008", ["sunspots"], values[:, None]


def read_table(path: Path) -> tuple[str, list[str], np.ndarray]:
    """Name, columns and values [N, S] of a CSV file."""
    rows = [row for row in csv.reader(harness.read_text(path).splitlines()) if row]
    if len(rows) < 2:
        raise Failure(f"{path}: expected a header and rows of numbers, got {harness.counted(len(rows), 'rows')}")
    skip = 0 if is_number(rows[1][0]) else 1
    if all(map(is_number, rows[0][skip:])) and len(rows[0]) > skip:
        name, first, header = f"{path.name} (without a header)", 1, [f"column {j + 1}" for j in range(len(rows[0]))]
    else:
        name, first, header, rows = path.name, 2, rows[0], rows[1:]
    values = np.empty((len(rows), len(header) - skip))
    if values.shape[1] == 0:
        raise Failure(f"{path}: expected columns of numbers, got only {header[0]!r}")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise Failure(f"{path}: row {i + first}: expected {len(header)} columns as in row 1, got {len(row)}")
        for j, text in enumerate(row[skip:]):
            if not is_number(text):
                raise Failure(f"{path}: row {i + first}, {header[j + skip]!r}: expected a finite number, got {text!r}")
            values[i, j] = float(text)
    return name, header[skip:], values


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def split_rows(name: str, split: str, count: int, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Where the parts end: "60,20,20" are per cent, what sums to more than 100 are rows."""
    try:
        parts = [int(number) for number in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or min(parts) < 1:
        raise Failure(f"--split: expected three positive numbers such as 60,20,20, got {split!r}")
    if sum(parts) <= 100:
        parts = [count * part // 100 for part in parts]
    if sum(parts) > count:
        raise Failure(f"{name}: expected the {sum(parts)} rows of --split {split}, got {count}")
    if sizes["season"] > sizes["context"]:
        raise Failure(f"--season: expected at most the context, {sizes['context']}, got {sizes['season']}")
    least = sizes["context"] + sizes["horizon"]
    if parts[0] < least or min(parts[1:]) < sizes["horizon"]:
        reason = f"a context of {sizes['context']} and a horizon of {sizes['horizon']}"
        raise Failure(f"{name}: expected more rows for {reason}, got {parts[0]} + {parts[1]} + {parts[2]}")
    return parts[0], parts[0] + parts[1], sum(parts)


def repeat_last(x: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """x [C, B, S] -> [B, F, S]: the last value, again and again."""
    return np.repeat(x[-1][:, None], info["horizon"], axis=1)


def repeat_season(x: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """x [C, B, S] -> [B, F, S]: the last season, again and again."""
    steps = np.arange(info["horizon"]) % info["season"] - info["season"]
    return np.ascontiguousarray(x[steps].transpose(1, 0, 2))


# The model -----------------------------------------------------------------------------------------------------------


class Forecaster(harness.Chain):
    """Recurrent layers, dropout, Linear: contexts x [C, B, S] to the numbers of a forecast [B, F, S, K].

    The network sees each context around the mean of its last season, and speaks relative to that mean, so that it
    need not learn levels, which drift. (Relative to the last season itself it would repeat that season's noise.)
    """

    def __init__(self, layers: rnnfast.Sequential, info: dict[str, Any], outputs: int) -> None:
        super().__init__(layers)
        self.info, self.outputs = info, outputs

    def forward(self, x: np.ndarray) -> np.ndarray:
        recurrent, dropout, head = self.layers
        level = x[-self.info["season"] :].mean(axis=0)  # [B, S]
        output, _ = recurrent(x - level)
        numbers = head(dropout(output[-1])).reshape(x.shape[1], self.info["horizon"], x.shape[2], self.outputs)
        numbers[..., : self.outputs if self.outputs > 2 else 1] += level[:, None, :, None]  # not to a deviation
        return numbers

    def backward(self, grad: np.ndarray) -> None:
        """The gradient by the numbers [B, F, S, K]; it enters the recurrence at its last step."""
        recurrent, dropout, head = self.layers
        grad_last = dropout.backward(head.backward(grad.reshape(len(grad), -1)))  # [B, H]
        grad_output = np.zeros((self.info["context"], *grad_last.shape), np.float32)
        grad_output[-1] = grad_last
        recurrent.backward(grad_output, need_grad_x=False)


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Forecaster, rnnfast.optim.Optimizer]:
    seeds = harness.seeds(settings.seed, 3)
    series, outputs = len(info["columns"]), OUTPUTS[settings.forecast]
    between = settings.dropout if settings.layers > 1 else 0.0
    recurrent = CELLS[settings.cell](
        series, settings.hidden, settings.layers, dropout=between, device=device, seed=seeds[0]
    )
    head = rnnfast.Linear(settings.hidden, info["horizon"] * series * outputs, device=device, seed=seeds[1])
    layers = rnnfast.Sequential(recurrent, rnnfast.Dropout(settings.dropout, seed=seeds[2]), head)
    model = Forecaster(layers, info, outputs)
    return model, rnnfast.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.decay)


# Losses: numbers [..., K] and truth [...] to the mean loss and its gradient -------------------------------------------


def point_loss(numbers: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """The squared error."""
    return rnnfast.mse_loss(numbers, y[..., None])


def gaussian_loss(numbers: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """-log N(y; m, s²), without its constant, for numbers m and log s."""
    mean, log_deviation = numbers[..., 0], np.clip(numbers[..., 1], -7.0, 7.0)
    error = (y - mean) * np.exp(-log_deviation)  # in deviations
    grad = np.stack([-error * np.exp(-log_deviation), 1.0 - error * error], axis=-1)
    return float(np.mean(log_deviation + 0.5 * error * error, dtype=np.float64)), grad / np.float32(y.size)


def quantile_loss(numbers: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """The pinball loss: a quantile q pays q for each unit that the truth is above it, 1 - q for each below."""
    levels = np.array(QUANTILES, np.float32)
    error = y[..., None] - numbers
    slope = np.where(error > 0, levels, levels - 1)
    return float(np.mean(slope * error, dtype=np.float64)), -slope / np.float32(error.size)


LOSSES = {"point": point_loss, "gaussian": gaussian_loss, "quantile": quantile_loss}
UNITS = {"point": "squared error", "gaussian": "nats", "quantile": "pinball loss"}


def quantiles_of(numbers: np.ndarray, forecast: str) -> np.ndarray:
    """numbers [..., K] to quantiles [..., Q]; of a point forecast the point alone, [..., 1]."""
    if forecast == "quantile":
        return np.sort(numbers, axis=-1)
    if forecast == "point":
        return numbers
    deviations = np.array([NormalDist().inv_cdf(level) for level in QUANTILES], np.float32)
    return numbers[..., :1] + np.exp(np.clip(numbers[..., 1:], -7.0, 7.0)) * deviations


# Training ------------------------------------------------------------------------------------------------------------


class Forecasting(harness.Task):
    """Say what comes next."""

    items = "windows"

    def __init__(self, table: Table, forecast: str) -> None:
        self.table, self.forecast = table, forecast
        self.unit = UNITS[forecast]

    def batches(self, run: Run) -> Iterator[np.ndarray]:
        first = self.table.windows("train")
        for chosen in harness.shuffled_batches(run, len(first), run.settings.batch):
            yield first[chosen]

    def learn(self, run: Run, batch: np.ndarray, rate: float) -> Step:
        x, y = self.table.cut(batch)
        loss, grad = LOSSES[self.forecast](run.model(x), y)
        run.model.backward(grad)
        return Step(float(loss), harness.descend(run, rate, run.settings.clip), len(batch))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    def validate(self, run: Run) -> float:
        x, y = self.table.cut(self.table.windows("valid"))
        return float(LOSSES[self.forecast](run.model(x), y)[0])

    def test(self, run: Run) -> dict[str, Any]:
        """Errors of the model and of the naive forecasts in every window of the test part, in deviations."""
        x, y = self.table.cut(self.table.windows("test"))
        quantiles = quantiles_of(run.model(x), self.forecast)  # [B, F, S, Q]
        middle = quantiles[..., quantiles.shape[-1] // 2]
        result: dict[str, Any] = {"model": errors(middle, y)}
        result |= {name: errors(naive(x, self.table.info), y) for name, naive in NAIVE.items()}
        if quantiles.shape[-1] > 1:
            inside = (quantiles[..., 0] <= y) & (y <= quantiles[..., -1])
            result["inside"] = float(inside.mean())
            result["pinball"] = quantile_loss(quantiles, y)[0]
        return result


NAIVE = {"repeat last": repeat_last, "repeat season": repeat_season}


def errors(forecast: np.ndarray, y: np.ndarray) -> dict[str, float]:
    error = (forecast - y).astype(np.float64)
    return {"mse": float(np.mean(error * error)), "mae": float(np.mean(np.abs(error)))}


# What is shown -------------------------------------------------------------------------------------------------------


def describe(run: Run, table: Table) -> str:
    info, parts = run.info, [len(table.windows(part)) for part in ("train", "valid", "test")]
    size = harness.count_parameters(run.model)
    return (
        f"{table.name}: {len(info['columns'])} series, {parts[0]:,} + {parts[1]:,} + {parts[2]:,} windows of "
        f"{info['context']} rows, {info['horizon']} ahead\n{run.model.layers[0]}, {size:,} parameters"
    )


def results(run: Run) -> str:
    """The table of errors, the model's own line last."""
    lines = [f"{'':14}  {'MSE':>7}  {'MAE':>7}"]
    lines += [f"{name:14}  {run.test[name]['mse']:7.3f}  {run.test[name]['mae']:7.3f}" for name in (*NAIVE, "model")]
    if "inside" in run.test:
        inside, pinball = run.test["inside"], run.test["pinball"]
        lines.append(f"80 % interval: {100 * inside:.0f} % of the test values are inside; pinball loss {pinball:.3f}")
    return "\n".join(lines)


def plot_forecast(run: Run, table: Table, path: Path, periods: int = 6, most: int = 4) -> None:
    """The end of the test part, forecast again and again a horizon ahead, with intervals, in the table's own units."""
    info = run.info
    first = table.windows("test")[-1] - info["horizon"] * np.arange(periods)[::-1]
    first = first[first >= table.windows("test")[0]]
    quantiles = quantiles_of(run.model(table.cut(first)[0]), run.settings.forecast)  # [B, F, S, Q]
    series = list(range(len(info["columns"])))[-most:]
    figure = harness.new_figure(9.0, 1.0 + 2.0 * len(series))
    for axes, i in zip(figure.subplots(len(series), squeeze=False)[:, 0], series, strict=True):
        scale = lambda z, i=i: z * info["deviation"][i] + info["mean"][i]  # noqa: E731
        past = np.arange(first[0] - info["context"], first[-1] + info["horizon"])
        axes.plot(past, scale(table.values[past, i]), color="black", linewidth=1, label="truth")
        steps = (first[:, None] + np.arange(info["horizon"])).ravel()
        bands = scale(quantiles[:, :, i].reshape(len(steps), -1))  # [B·F, Q]
        axes.plot(steps, bands[:, bands.shape[1] // 2], color="C0", label=f"{info['horizon']} ahead")
        for k in range(bands.shape[1] // 2):
            axes.fill_between(steps, bands[:, k], bands[:, -1 - k], color="C0", alpha=0.2, linewidth=0)
        for start in first:
            axes.axvline(start, color="grey", linewidth=0.5, linestyle=":")
        axes.set_ylabel(info["columns"][i])
    axes.set_xlabel("row; at each dotted line a new forecast begins; bands: 50 % and 80 %")
    figure.axes[0].legend(loc="upper left")
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("forecasting", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option("--data", type=harness.FILE, help="A table of numbers (CSV). Default: sunspots, from statsmodels.")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    harness.LAYERS,
    harness.DROPOUT,
    ("--forecast", click.Choice(list(OUTPUTS)), "What is said of each value."),
    ("--context", click.IntRange(0), "Rows that the network reads; 0: 44 for sunspots, 96 for a file."),
    ("--horizon", click.IntRange(0), "Rows that it forecasts; 0: 11, 24."),
    ("--season", click.IntRange(0), "Rows of a season; 0: 11, 24."),
    ("--split", str, "Training, validation and test rows, or per cent of them."),
    harness.BATCH,
    harness.LR,
    ("--decay", Number(0.0, 1e9), "Weight decay of AdamW."),
    harness.CLIP,
)
@harness.run_options("forecasts of the test part")
def main(**options: Any) -> None:
    """Train a network to forecast every series of a table, and compare it with naive forecasts."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, table = harness.begin(SCRIPT, options)
    if table is None:
        console.print(f"{options['path']}: trained already", markup=False)
    else:
        console.print(describe(run, table), markup=False)
        task = Forecasting(table, run.settings.forecast)
        harness.train_and_show(SCRIPT, run, task, console, options["minutes"], options["path"])
    if options["plot"] is not None:
        plot_forecast(run, table or load(run.settings, options), options["plot"])
    click.echo(results(run))
    mse, naive = run.test["model"]["mse"], run.test["repeat season"]["mse"]
    click.echo(harness.summary(run, Forecasting, f"test MSE {mse:.4f}, repeating the last season {naive:.4f}"))


if __name__ == "__main__":
    main()
