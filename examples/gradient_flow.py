"""Vanishing and exploding gradients, measured: which recurrent cells learn what happened long ago; NumPy and rnnfast.

    python gradient_flow.py --plot adding.png                             # the adding problem over 200 steps, all cells
    python gradient_flow.py --task copy --length 20 --steps 16000 --evaluate 1000 --plot copy.png
    python gradient_flow.py --task copy --length 1000 --rates 0.01       # too long for any of them
    python gradient_flow.py --data sequences.npz                         # yours: what do they ask for?

The adding problem: numbers in [0, 1) go by, two of them marked; say their sum at the end. Who cannot remember says 1 and
has a squared error of 1/6. Copy memory: ten symbols out of eight, `length` empty steps, then the ten are to be repeated;
who cannot remember guesses among eight, 10·ln 8 / (length + 20) nats a step. (Hochreiter and Schmidhuber 1997; Arjovsky
et al. 2016; Bai et al. 2018.)

Sequences of your own come as numpy.savez writes them: x [N, T, I] and y, as --task has it, the numbers to be said at the
end, [N] or [N, O] (adding), or a symbol for every step, [N, T] (copy). A tenth of them validates, another tests; who
remembers nothing says the mean, or has the symbols' frequencies alone.

The cells: rnn (tanh), relu, irnn (ReLU, its recurrent weights begin as the identity: Le et al. 2015), lstm and gru, whose
gates begin as open as the length asks for (chrono: Tallec and Ollivier 2018; --gates torch: as PyTorch has them). All
have about as many parameters, the same budget of steps and the same grid: each learning rate, with and without clipping
of the gradient. Validation chooses the learning rate.

What is measured is |dL/dh_t|, how much of the loss's gradient reaches step t. One step back multiplies it by the
Jacobian of the recurrence: for a tanh RNN at most the weights' gain, so it vanishes as a power of a number below one (or
explodes, as one above); the gated cells add to their state, and the factor of a step stays near one.

Sizes in comments: T steps, B sequences, I inputs, H hidden size.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import numpy as np
from harness import Failure, Run, Step

import rnnfast

CELLS = ("rnn", "relu", "irnn", "lstm", "gru")
RATES = (0.001, 0.01)
INPUTS = {"adding": 2, "copy": 10}
SYMBOLS, DIGITS = 10, 8  # of copy memory: empty, eight digits, "now"
MEMORY = 10  # digits to be remembered
MOST_SYMBOLS = 10_000  # of --data
SOLVED = {"adding": 3e-4, "copy": 1e-3}  # validation losses at which there is nothing left to learn


@dataclass(frozen=True)
class Settings:
    """What decides the weights."""

    task: str = "adding"
    length: int = 200
    cell: str = ",".join(CELLS)
    rates: str = ",".join(map(str, RATES))
    gates: str = "chrono"
    parameters: int = 16_000
    batch: int = 20
    clip: float = 1.0
    steps: int = 4000
    evaluate: int = 200
    patience: int = 1000
    seed: int = 0

    @property
    def cells(self) -> list[str]:
        """Those to try, each once."""
        return list(dict.fromkeys(self.cell.split(",")))


TINY = Settings(length=10, parameters=600, batch=8, steps=20, evaluate=10)


# The problems --------------------------------------------------------------------------------------------------------


Sequences = tuple[np.ndarray, np.ndarray]  # x [T, B, I] and what is wanted: numbers [B, O], or symbols [T, B]


class Problem(NamedTuple):
    """Sequences without end or those of a file, and those to validate and to test with."""

    name: str
    digest: str
    settings: Settings
    info: dict[str, Any]  # the first trial; data: the `facts` of a file
    valid: Sequences
    test: Sequences
    train: Sequences | None = None  # of a file


def load(settings: Settings, options: dict[str, Any]) -> Problem:
    for cell in settings.cells:
        if cell not in CELLS:
            raise Failure(f"--cell: expected some of {','.join(CELLS)}, got {cell!r}")
    for text in settings.rates.split(","):
        if not is_rate(text):
            raise Failure(f"--rates: expected positive numbers such as 0.001,0.01, got {text!r}")
    if options.get("data"):
        return problem_of(options["data"], *read_sequences(options["data"], settings.task), settings)
    name = f"{settings.task}, {settings.length} steps"
    count = max(10, min(500, 100_000 // settings.length))
    valid, test = (draw(settings, count, [settings.seed, part]) for part in (0, 1))
    return Problem(name, harness.digest_of(*valid), settings, trials(settings)[0], valid, test)


def is_rate(text: str) -> bool:
    try:
        return 0.0 < float(text) < math.inf
    except ValueError:
        return False


def read_sequences(path: Path, task: str) -> Sequences:
    """x and y of a file of numpy.savez."""
    try:
        with np.load(io.BytesIO(harness.read_file(path)), allow_pickle=False) as file:
            x, y = file["x"], file["y"]
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise Failure(f"{path}: expected arrays x and y as numpy.savez writes them, got something else") from error
    if x.ndim != 3 or x.dtype.kind not in "fiub" or min(x.shape) < 1 or len(x) < 10 or not np.isfinite(x).all():
        raise Failure(f"{path}: expected finite numbers x [N, T, I] of 10 or more sequences, got {told(x)}")
    if task == "adding":
        right, wanted = y.ndim in (1, 2) and y.dtype.kind in "fiub" and np.isfinite(y).all(), "numbers [N] or [N, O]"
    else:
        right, wanted = y.dtype.kind in "iu" and y.shape == x.shape[:2], "integers [N, T]"
        right = right and y.min() >= 0 and y.max() < MOST_SYMBOLS
        wanted += f" from 0 to at most {MOST_SYMBOLS - 1}"
    if not right or len(y) != len(x) or y.size == 0:
        raise Failure(f"{path}: expected finite {wanted} as y, one for each of {len(x)} sequences, got {told(y)}")
    return x.astype(np.float32), y.astype(np.intp) if task == "copy" else y.reshape(len(y), -1).astype(np.float32)


def told(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def problem_of(path: Path, x: np.ndarray, y: np.ndarray, settings: Settings) -> Problem:
    """The sequences x [N, T, I] and y [N, ...], shuffled and split."""
    order, part = np.random.default_rng(0).permutation(len(x)), len(x) // 10
    parts = {"test": order[:part], "valid": order[part : 2 * part], "train": order[2 * part :]}
    adding = settings.task == "adding"
    split = {
        name: (np.ascontiguousarray(x[rows].swapaxes(0, 1)), y[rows] if adding else np.ascontiguousarray(y[rows].T))
        for name, rows in parts.items()
    }
    outputs = y.shape[1] if adding else int(y.max()) + 1
    data = {"name": path.name, "steps": x.shape[1], "inputs": x.shape[2], "outputs": outputs}
    data["guess"] = blind_loss(split["train"][1], split["test"][1], outputs, settings.task)
    return Problem(path.name, harness.digest_of(x, y), settings, {**trials(settings)[0], "data": data}, **split)


def blind_loss(train: np.ndarray, test: np.ndarray, outputs: int, task: str) -> float:
    """The loss on the test part of who says the mean, or the frequencies, of the training part."""
    if task == "adding":
        return float(np.mean((test - train.mean(axis=0)) ** 2, dtype=np.float64))
    counts = np.bincount(train.ravel(), minlength=outputs) + 1.0  # none is impossible
    return float(-np.log(counts / counts.sum())[test].mean())


def facts(settings: Settings, info: dict[str, Any]) -> dict[str, Any]:
    """Steps, inputs, outputs, and the loss of who remembers nothing; `info`: a trial's."""
    if "data" in info:
        return info["data"]
    outputs = 1 if settings.task == "adding" else SYMBOLS
    return {"steps": settings.length, "inputs": INPUTS[settings.task], "outputs": outputs, "guess": guess(settings)}


def draw(settings: Settings, count: int, seed: list[int]) -> Sequences:
    """Sequences x [T, B, I] and what is wanted: a number [B, 1], or symbols [T, B]."""
    random = np.random.default_rng(seed)
    return {"adding": adding, "copy": copying}[settings.task](random, settings.length, count)


def adding(random: np.random.Generator, length: int, count: int) -> Sequences:
    """A number in each half is marked: x [T, B, 2] and their sums [B, 1]."""
    x = np.zeros((length, count, 2), np.float32)
    x[..., 0] = random.random((length, count), np.float32)
    half, rows = length // 2, np.arange(count)
    for low, high in ((0, half), (half, length)):
        x[random.integers(low, high, count), rows, 1] = 1.0
    return x, (x[..., 0] * x[..., 1]).sum(axis=0)[:, None]


def copying(random: np.random.Generator, length: int, count: int) -> Sequences:
    """Ten digits, then nothing, then "now": x [length + 20, B, 10], one-hot, and the symbols wanted [length + 20, B]."""
    digits = random.integers(1, DIGITS + 1, (MEMORY, count))
    symbols = np.zeros((length + 2 * MEMORY, count), np.intp)
    wanted = symbols.copy()
    symbols[:MEMORY], symbols[length + MEMORY - 1], wanted[-MEMORY:] = digits, SYMBOLS - 1, digits
    return np.eye(SYMBOLS, dtype=np.float32)[symbols], wanted


def guess(settings: Settings) -> float:
    """The loss of who remembers nothing."""
    return 1 / 6 if settings.task == "adding" else MEMORY * math.log(DIGITS) / (settings.length + 2 * MEMORY)


# The models ----------------------------------------------------------------------------------------------------------


def trials(settings: Settings) -> list[dict[str, Any]]:
    """What is tried, cell after cell: {"cell", "lr", "clip"}; clip None: the gradient as it is."""
    rates = list(dict.fromkeys(float(rate) for rate in settings.rates.split(",")))
    return [
        {"cell": cell, "lr": rate, "clip": clip}
        for cell in settings.cells
        for clip in (settings.clip, None)
        for rate in rates
    ]


def hidden_size(cell: str, inputs: int, parameters: int) -> int:
    """The largest H for which a layer of G gates has at most that many parameters, G·H·(H + I + 2)."""
    gates = {"lstm": 4, "gru": 3}.get(cell, 1)
    half = (inputs + 2) / 2
    return max(1, int(math.sqrt(parameters / gates + half * half) - half))


def make_recurrent(settings: Settings, info: dict[str, Any], hidden: int, device: str, seed: int) -> Any:
    cell, inputs, steps = info["cell"], facts(settings, info)["inputs"], facts(settings, info)["steps"]
    if cell in ("lstm", "gru"):
        layer = harness.CELLS[cell](inputs, hidden, device=device, seed=seed)
        return chrono_(layer, cell, steps, seed) if settings.gates == "chrono" else layer
    nonlinearity = "tanh" if cell == "rnn" else "relu"
    layer = harness.CELLS["rnn"](inputs, hidden, nonlinearity=nonlinearity, device=device, seed=seed)
    return rnnfast.init.irnn_(layer) if cell == "irnn" else layer


def chrono_(layer: Any, cell: str, length: int, seed: int) -> Any:
    """Biases of the gates that keep: log(u - 1) with u in [2, length], so that each unit forgets in about u steps.

    The LSTM's input gate is as closed as its forget gate is open; the GRU has one gate, z, for both.
    """
    hidden = layer.hidden_size
    keep = np.log(np.random.default_rng(seed).uniform(1.0, max(length - 1, 1.0), hidden))
    bias_ih, bias_hh = layer.bias_ih_l0.data, layer.bias_hh_l0.data
    bias_hh[: 2 * hidden] = bias_ih[: 2 * hidden] = 0.0
    bias_ih[hidden : 2 * hidden] = keep  # LSTM: i, f, g, o; GRU: r, z, n
    if cell == "lstm":
        bias_ih[:hidden] = -keep
    return layer


class Rememberer(harness.Chain):
    """A recurrent layer and Linear: x [T, B, I] to an answer [B, O] at the end (adding), or [T, B, O] (copy)."""

    def __init__(self, layers: rnnfast.Sequential, at_the_end: bool) -> None:
        super().__init__(layers)
        self.at_the_end = at_the_end
        self.shape: tuple[int, ...] = ()

    def forward(self, x: np.ndarray) -> np.ndarray:
        recurrent, head = self.layers
        output, _ = recurrent(x)
        self.shape = output.shape
        return head(output[-1] if self.at_the_end else output)

    def grad_output(self, grad: np.ndarray) -> np.ndarray:
        """From the gradient by the answer to that by the recurrent layer's output [T, B, H]."""
        grad = self.layers[1].backward(grad)
        if not self.at_the_end:
            return grad
        whole = np.zeros(self.shape, grad.dtype)
        whole[-1] = grad
        return whole


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Rememberer, rnnfast.optim.Optimizer]:
    seeds = harness.seeds(settings.seed, 2)
    known = facts(settings, info)
    hidden = hidden_size(info["cell"], known["inputs"], settings.parameters)
    recurrent = make_recurrent(settings, info, hidden, device, seeds[0])
    head = rnnfast.Linear(hidden, known["outputs"], device=device, seed=seeds[1])
    model = Rememberer(rnnfast.Sequential(recurrent, head), settings.task == "adding")
    return model, rnnfast.optim.Adam(model.parameters(), lr=info["lr"])


# Training ------------------------------------------------------------------------------------------------------------


class Remembering(harness.Task):
    """One trial: a cell, a learning rate, with or without clipping."""

    items = "sequences"

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.loss = rnnfast.mse_loss if problem.settings.task == "adding" else rnnfast.cross_entropy
        self.unit = "squared error" if problem.settings.task == "adding" else "nats"

    def batches(self, run: Run) -> Iterator[Sequences]:
        while True:
            seed = [run.settings.seed, 2, run.step]
            yield (
                self.chosen(seed, run.settings) if self.problem.train else draw(run.settings, run.settings.batch, seed)
            )

    def chosen(self, seed: list[int], settings: Settings) -> Sequences:
        """Some sequences of the file."""
        assert self.problem.train is not None
        x, wanted = self.problem.train
        rows = np.random.default_rng(seed).integers(x.shape[1], size=settings.batch)
        wanted = wanted[rows] if settings.task == "adding" else np.ascontiguousarray(wanted[:, rows])
        return np.ascontiguousarray(x[:, rows]), wanted

    def learn(self, run: Run, batch: Sequences, rate: float) -> Step:
        x, wanted = batch
        if run.step == 0:
            run.notes["flow at first"] = self.flow(run)
        loss, grad = self.loss(run.model(x), wanted)
        run.model.layers[0].backward(run.model.grad_output(grad), need_grad_x=False)
        norm = harness.descend(run, rate, run.info["clip"])
        run.notes["largest norm"] = max(norm, run.notes.get("largest norm", 0.0))
        return Step(float(loss), norm, x.shape[1])

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.info["lr"], share)

    def validate(self, run: Run) -> float:
        x, wanted = self.problem.valid
        return float(self.loss(run.model(x), wanted)[0])

    def solved(self, run: Run) -> bool:
        return self.problem.train is None and run.best < SOLVED[run.settings.task]

    def test(self, run: Run) -> float:
        x, wanted = self.problem.test
        loss = float(self.loss(run.model(x), wanted)[0])
        run.model.train()
        run.notes["flow at last"] = self.flow(run)
        run.model.eval()
        return loss

    def flow(self, run: Run, count: int = 20) -> list[float]:
        """|dL/dh_t| of every step t, over some sequences of the validation part; no gradient is left behind."""
        x, wanted = self.problem.valid
        x, wanted = x[:, :count].copy(), wanted[:count] if run.settings.task == "adding" else wanted[:, :count]
        _, grad = self.loss(run.model(x), wanted)
        norms = rnnfast.gradient_flow(run.model.layers[0], run.model.grad_output(grad))[:, 0]
        run.model.zero_grad()
        return [float(norm) for norm in norms]


def run_trials(run: Run, problem: Problem, console: Any, options: dict[str, Any]) -> list[dict[str, Any]]:
    """All trials that are left, the run's own first; what each came to."""
    todo = trials(problem.settings)
    while True:
        if run.test is None:
            train_trial(run, problem, console, options)
        done = [*run.notes.get("done", []), outcome(run)]
        if len(done) == len(todo):
            return done
        info = {**problem.info, **todo[len(done)]}
        run = harness.new_run(SCRIPT, problem.settings, problem._replace(info=info), options["device"])
        run.notes["done"] = done


def problem_again(run: Run, options: dict[str, Any]) -> Problem:
    """The problem of a run whose last trial is over. When all trials are, nothing but its name is needed."""
    if "data" not in run.info or options["data"]:
        return load(run.settings, options)
    if len(run.notes.get("done", [])) + 1 < len(trials(run.settings)):
        raise Failure(f"--data: expected {run.info['data']['name']}, which {options['path']} was begun with")
    nothing = np.empty(0), np.empty(0)
    return Problem(run.info["data"]["name"], run.digest, run.settings, run.info, nothing, nothing)


def train_trial(run: Run, problem: Problem, console: Any, options: dict[str, Any]) -> None:
    what = ", ".join(f"{name} {run.info[name]}" for name in ("cell", "lr", "clip"))
    minutes = options["minutes"] and options["minutes"] / len(trials(run.settings))
    console.print(f"{what}: {run.model.layers[0]}, {harness.count_parameters(run.model):,} parameters", markup=False)
    try:
        with np.errstate(all="ignore"):
            harness.train_and_show(SCRIPT, run, Remembering(problem), console, minutes, options["path"])
    except harness.Diverged as error:
        console.print(error.message, markup=False)
        run.test, run.notes["diverged"] = facts(run.settings, run.info)["guess"], run.step
        harness.save(SCRIPT, run, options["path"])


def outcome(run: Run) -> dict[str, Any]:
    """What is kept of a trial."""
    notes = {name: value for name, value in run.notes.items() if name != "done"}
    return {
        **run.info,
        **notes,
        "valid": run.best,
        "test": run.test,
        "steps": run.step,
        "seconds": run.seconds,
        "curve": run.curve,
    }


# What is shown -------------------------------------------------------------------------------------------------------


def best_of(done: list[dict[str, Any]], cell: str, clipped: bool) -> dict[str, Any]:
    """Of the learning rates of a cell the one that validation chooses."""
    return min(
        (trial for trial in done if trial["cell"] == cell and (trial["clip"] is not None) == clipped),
        key=lambda trial: trial["valid"],
    )


def factor(norms: list[float]) -> float:
    """What a step back multiplies the gradient by, from the last step to the first: the geometric mean.

    Where the norm has fallen below what float32 holds, from the last step to the first that is not zero.
    """
    first = next((t for t, norm in enumerate(norms) if norm > 0.0), len(norms) - 1)
    steps = len(norms) - 1 - first
    return (norms[first] / norms[-1]) ** (1 / steps) if steps and norms[-1] > 0 else math.nan


def results(done: list[dict[str, Any]], settings: Settings) -> str:
    """One row for each cell, with and without clipping."""
    heads = (
        "cell",
        "clip",
        "lr",
        "test",
        "of guess",
        "steps",
        "largest norm",
        "|dL/dh_0| / |dL/dh_T| at first, at last",
    )
    blind = facts(settings, done[0])["guess"]
    lines = ["{:5} {:>5} {:>6} {:>9} {:>9} {:>6} {:>13}   {} (a step)".format(*heads)]
    for cell in settings.cells:
        for clipped in (True, False):
            trial = best_of(done, cell, clipped)
            flows = [trial.get(f"flow at {when}") for when in ("first", "last")]
            ratios = [
                f"{flow[0] / flow[-1]:9.2e} ({factor(flow):.3f})" if flow and flow[-1] else f"{'':17}" for flow in flows
            ]
            diverged = f"   diverged in {count}" if (count := diverged_count(done, cell, clipped)) else ""
            numbers = f"{trial['lr']:6g} {trial['test']:9.5f} {trial['test'] / blind:9.3f} {trial['steps']:6,}"
            lines.append(
                f"{cell:5} {trial['clip'] or '-':>5} {numbers} {trial['largest norm']:13.3g}   {'   '.join(ratios)}{diverged}"
            )
    return "\n".join(lines)


def diverged_count(done: list[dict[str, Any]], cell: str, clipped: bool) -> int:
    return sum(
        "diverged" in trial and trial["cell"] == cell and (trial["clip"] is not None) == clipped for trial in done
    )


def plot_all(done: list[dict[str, Any]], settings: Settings, path: Any) -> None:
    """Above, |dL/dh_t| against t before and after training; below, the losses with and without clipping."""
    figure = harness.new_figure(11.0, 8.0)
    axes = figure.subplots(2, 2)
    for i, cell in enumerate(settings.cells):
        for panel, when in zip(axes[0], ("first", "last"), strict=True):
            norms = np.array(best_of(done, cell, True).get(f"flow at {when}", [math.nan]))
            panel.semilogy(np.where(norms > 1e-30, norms, math.nan), color=f"C{i}", label=cell)
        for panel, clipped in zip(axes[1], (True, False), strict=True):
            steps, _, valid = zip(*best_of(done, cell, clipped)["curve"] or [(0, 0, math.nan)], strict=True)
            panel.semilogy(steps, valid, harness.MARKED, color=f"C{i}", label=cell)
    for panel, title in zip(axes[0], ("before training", "after training"), strict=True):
        panel.set(title=title, xlabel="t", ylabel=r"$|dL/dh_t|$")
    for panel, title in zip(axes[1], (f"gradients clipped to {settings.clip:g}", "not clipped"), strict=True):
        panel.axhline(facts(settings, done[0])["guess"], color="black", linestyle=":", label="guess")
        panel.set(title=title, xlabel="step of the optimiser", ylabel="validation loss")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.legend()
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("gradient_flow", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option("--data", type=harness.FILE, help="Your sequences, x and y of numpy.savez. Default: generated.")
@harness.settings_options(
    Settings,
    ("--task", click.Choice(list(INPUTS)), "The problem, or what kind yours is of."),
    ("--length", click.IntRange(2), "Steps of the adding problem; empty steps of copy memory; yours have their own."),
    ("--cell", str, "Cells to try."),
    ("--rates", str, "Learning rates to try, each the highest of half a cosine."),
    ("--gates", click.Choice(("chrono", "torch")), "How the gates of lstm and gru begin."),
    ("--parameters", click.IntRange(16), "Of the recurrent layer, about."),
    harness.BATCH,
    harness.CLIP,
)
@harness.run_options("gradients against time, and the losses")
def main(**options: Any) -> None:
    """Train each cell with and without clipping on a problem of long memory, and look at its gradients."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, problem = harness.begin(SCRIPT, options)
    problem = problem or problem_again(run, options)
    done = run_trials(run, problem, console, options)
    if options["plot"] is not None:
        plot_all(done, run.settings, options["plot"])
    click.echo(results(done, run.settings))
    best = {cell: min(best_of(done, cell, clipped)["test"] for clipped in (True, False)) for cell in run.settings.cells}
    losses = ", ".join(f"{cell} {loss:.5f}" for cell, loss in best.items())
    seconds = sum(trial["seconds"] for trial in done)
    click.echo(
        f"test loss on {problem.name}: {losses}; guessing {facts(run.settings, run.info)['guess']:.5f} "
        f"({len(done)} trials, {seconds:.0f} s)"
    )


if __name__ == "__main__":
    main()
