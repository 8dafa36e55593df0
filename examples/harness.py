"""What the examples share: a training that can be killed and resumed, its progress bar, its file, its options, errors.

An example is a `Task` (its data, one step of learning, a figure for validation), a frozen dataclass of settings, and a
command line. This file reads from top to bottom: errors, the run and its file, the training loop, what is shown, the
command line. Nothing in it knows a library of models: whatever has `train`, `eval`, `state_dict` and `load_state_dict`
will do. Only `Files` writes models, here those of rnnfast; harness_torch.py has the same for PyTorch.

Validation alone chooses the weights that are kept and stops a training early; the test part is looked at once, at the
end. All that is random must be a function of the seed and of what `Run` counts (or be kept by the `Files`): resumed from
its last save, a training then ends with bitwise the same weights as one that was never stopped, on the same machine with
the same number of threads; unless --minutes lets the clock decide.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

# NumPy's part of the work is small, and the idle threads of its library would spin on the cores that rnnfast needs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import rnnfast

CELLS = {"lstm": rnnfast.LSTM, "gru": rnnfast.GRU, "rnn": rnnfast.RNN}


class Failure(click.ClickException):
    """An error of the user's or of their data, told in one line; exit status 1."""


class Diverged(Failure):
    """The loss or its gradient is no number any more."""


class Stopped(click.ClickException):
    """Ctrl-C."""

    exit_code = 130


def read_file(path: Path) -> bytes:
    """The bytes of a file of the user's."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})") from error


def read_text(path: Path) -> str:
    """The characters of a file of the user's, in UTF-8."""
    try:
        characters = read_file(path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Failure(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error
    if "\0" in characters:
        raise Failure(f"{path}: expected text, got a binary file (a zero byte at {characters.index(chr(0))})")
    return characters


def need(package: str, purpose: str, extra: str = "examples") -> None:
    """Refuse where a package of an extra is missing."""
    if find_spec(package) is None:
        raise Failure(f"{purpose} needs {package}: pip install 'rnnfast[{extra}]'")


def digest_of(*parts: Any) -> str:
    """What tells these data from others: SHA-256 of the bytes of arrays, strings and bytes."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(np.ascontiguousarray(content).tobytes() if isinstance(content, np.ndarray) else content)
    return total.hexdigest()


def counted(count: int, things: str) -> str:
    """1 step, 2,000 steps."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def seeds(seed: int, count: int) -> list[int]:
    """Independent seeds from one."""
    return [int(number) for number in np.random.SeedSequence(seed).generate_state(count)]


# The run and its file ------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training as far as it has come: all that must be saved to go on as if nothing had happened."""

    settings: Any  # a frozen dataclass with seed, steps, lr, evaluate and patience at least
    info: dict[str, Any]  # what the model must know of the data: a vocabulary, means and deviations; of plain values
    digest: str  # of the data
    model: Any
    optimizer: Any
    step: int = 0
    items: int = 0  # trained on: characters, frames, ...
    position: dict[str, Any] = field(default_factory=dict)  # in the data, with the states carried over; {}: the start
    best: float = math.inf  # the score of the best weights
    best_weights: dict[str, Any] = field(default_factory=dict)
    misses: int = 0  # validations since the best one
    curve: list[list[float]] = field(default_factory=list)  # [step, train, valid]
    seconds: float = 0.0
    test: Any = None  # where training is over
    notes: dict[str, Any] = field(default_factory=dict)  # whatever else a script keeps


COUNTERS = [entry.name for entry in fields(Run) if entry.name not in ("settings", "model", "optimizer")]


class Files:
    """How a run is written and read: rnnfast's safetensors. The seam for another library, see harness_torch.py."""

    def write(self, path: Path, model: Any, optimizer: Any, user: dict[str, Any]) -> None:
        """All at once: a file is always a whole one, with dropout's counters in it."""
        rnnfast.save(path, model, optimizer=optimizer, user=user)

    def read(self, path: Path) -> Any:
        """`user` as it was written, or None; ValueError where it is no such file."""
        return rnnfast.load_checkpoint(path).user

    def restore(self, path: Path, model: Any, optimizer: Any) -> None:
        """Weights, optimiser and all that decides random numbers, into a model and an optimiser of the same kind."""
        rnnfast.load_checkpoint(path, model, optimizer=optimizer)


class Chain(rnnfast.Module):
    """A `Sequential`, `layers`, that is called with more than a chain can be given: a state, lengths.

    Written to a file as that `Sequential`, which rnnfast can rebuild on its own.
    """

    def __init__(self, layers: rnnfast.Sequential) -> None:
        super().__init__()
        self.layers: Any = layers


class ChainFiles(Files):
    """The files of models that are a `Chain`."""

    def write(self, path: Path, model: Any, optimizer: Any, user: dict[str, Any]) -> None:
        super().write(path, model.layers, optimizer, user)

    def restore(self, path: Path, model: Any, optimizer: Any) -> None:
        super().restore(path, model.layers, optimizer)


class Example(NamedTuple):
    """What tells one script from another, for its command line and its file."""

    name: str
    settings: type  # the dataclass
    tiny: Any  # settings that take a second
    load: Callable[[Any, dict[str, Any]], Any]  # settings and options to data with `name`, `digest` and `info`
    build: Callable[[Any, dict[str, Any], str], tuple[Any, Any]]  # settings, info, device to model and optimiser
    files: Files = Files()


def save(example: Example, run: Run, path: Path | None) -> None:
    if path is None:
        return
    user = {name: getattr(run, name) for name in COUNTERS}
    user |= {"settings": asdict(run.settings), "script": example.name}
    try:
        example.files.write(path, run.model, run.optimizer, user)
    except OSError as error:
        raise not_written("--save", path, error) from error


def not_written(option: str, path: Path, error: OSError) -> Failure:
    return Failure(f"{option} {path}: cannot be written ({error.strerror or error})")


def resume(example: Example, path: Path, device: str = "cpu") -> Run:
    """The run of a file that `save` wrote."""
    try:
        user = example.files.read(path)
        if not isinstance(user, dict) or user.get("script") != example.name:
            raise ValueError("expected a file that this script saved, got another one")
        settings = example.settings(**user["settings"])
        model, optimizer = example.build(settings, user["info"], device)
        example.files.restore(path, model, optimizer)
        return Run(settings, model=model, optimizer=optimizer, **{name: user[name] for name in COUNTERS})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise Failure(f"--save {path}: cannot be resumed from: {error}") from error


SIZES = ("hidden", "layers", "embedding", "vocabulary", "parameters")  # settings that say how large a model is


def new_run(example: Example, settings: Any, data: Any, device: str = "cpu") -> Run:
    try:
        model, optimizer = example.build(settings, data.info, device)
    except (ValueError, RuntimeError, MemoryError) as error:  # sizes beyond the memory, a device that is not there
        reason = (str(error) or "not enough memory").splitlines()[0]
        sizes = [f"--{name} {value}" for name, value in asdict(settings).items() if name in SIZES]
        raise Failure(f"no model with {' '.join([*sizes, '--device', device])}: {reason}") from error
    return Run(settings, data.info, data.digest, model, optimizer)


# Training ------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One step of learning."""

    loss: float  # in the task's unit
    norm: float  # of the gradient, before clipping
    items: int


class Task:
    """What a script brings to `train`."""

    unit = "nats"  # of losses and of `validate`, of which less is better
    valid_unit = ""  # of `validate`, where it is another
    items = "steps"  # what throughput counts

    def batches(self, run: Run) -> Iterator[Any]:
        """Endless, from `run.position` on, which stands behind the batch that is yielded."""
        raise NotImplementedError

    def learn(self, run: Run, batch: Any, rate: float) -> Step:
        """Forward, backward, one step of the optimiser."""
        raise NotImplementedError

    def rate(self, run: Run, share: float) -> float:
        """The learning rate, when this share of the training is over."""
        return float(run.settings.lr)

    def validate(self, run: Run) -> float:
        """The figure of the validation part: what is shown."""
        raise NotImplementedError

    def score(self, run: Run, valid: float) -> float:
        """What chooses the weights, less is better: the figure, unless equal ones are to be told apart."""
        return valid

    def solved(self, run: Run) -> bool:
        """Whether the last validation was so good that there is nothing left to learn."""
        return False

    def test(self, run: Run) -> Any:
        """The figure or figures of the test part, as plain numbers; called once, with the best weights."""
        raise NotImplementedError

    def example(self, run: Run) -> str:
        """What the model can do by now, in a few words."""
        return ""


def train(
    example: Example, run: Run, task: Task, monitor: Monitor | None, minutes: float | None, path: Path | None
) -> None:
    """Train until the steps or the minutes are used up or validation gets no better; then test, once."""
    began = time.monotonic() - run.seconds
    losses: list[float] = []
    save(example, run, path)
    for batch in task.batches(run):
        step = task.learn(run, batch, task.rate(run, progress(run, minutes)))
        run.step, run.items = run.step + 1, run.items + step.items
        if not math.isfinite(step.loss + step.norm):
            raise Diverged(f"step {run.step}: the loss is {step.loss} and its gradient {step.norm}; try a lower --lr")
        losses.append(step.loss)
        run.seconds = time.monotonic() - began
        share = progress(run, minutes)
        if monitor is not None:
            monitor.step(task, share, step)
        if share >= 1.0 or run.step % run.settings.evaluate == 0:
            evaluate(run, task, sum(losses) / len(losses), monitor)
            if share >= 1.0 or run.misses >= run.settings.patience or task.solved(run):
                break
            losses.clear()
            save(example, run, path)
    finish(run, task)
    save(example, run, path)


def progress(run: Run, minutes: float | None) -> float:
    """The share of the budget that is used up."""
    return max(run.step / run.settings.steps, run.seconds / (60.0 * minutes) if minutes else 0.0)


def evaluate(run: Run, task: Task, train_loss: float, monitor: Monitor | None) -> None:
    """Validate, and keep the weights if they are the best so far."""
    run.model.eval()
    valid = float(task.validate(run))
    score = float(task.score(run, valid))
    run.curve.append([run.step, train_loss, valid])
    run.misses += 1
    if score < run.best:
        run.best, run.best_weights, run.misses = score, copy.deepcopy(run.model.state_dict()), 0
    if monitor is not None:
        monitor.evaluated(task, run, task.example(run))
    run.model.train()


def finish(run: Run, task: Task) -> None:
    """Take the best weights and look at the test part."""
    run.model.load_state_dict(run.best_weights or run.model.state_dict())
    run.best_weights = {}
    run.model.eval()
    run.test = task.test(run)


def half_cosine(highest: float, share: float, warm_up: float = 0.02, last: float = 0.02) -> float:
    """A short way up, then half a cosine down to a share `last`, as `share`, of the training, goes from 0 to 1."""
    up = min(1.0, 0.1 + share / warm_up)
    down = last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return highest * up * down


def descend(run: Run, rate: float, clip: float | None) -> float:
    """Clip, step, forget the gradients; the gradient's norm before. For rnnfast's parameters."""
    parameters = run.optimizer.parameters
    norm = rnnfast.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    run.optimizer.step(lr=rate)
    run.optimizer.zero_grad()
    return float(norm)


def shuffled_batches(run: Run, count: int, batch: int) -> Iterator[np.ndarray]:
    """Indices of the next examples, epoch after epoch, each in an order of its own; the last of an epoch may be fewer."""
    run.position = run.position or {"epoch": 0, "offset": 0}
    while True:
        place = run.position
        order = np.random.default_rng([run.settings.seed, place["epoch"]]).permutation(count)
        while place["offset"] < count:
            chosen = order[place["offset"] : place["offset"] + batch]
            place["offset"] += batch
            yield chosen
        place["epoch"], place["offset"] = place["epoch"] + 1, 0


# What is shown -------------------------------------------------------------------------------------------------------


class Monitor:
    """A progress bar that tells of every step, and a line for every validation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("{task.percentage:3.0f} %"),
            BarColumn(8),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.row = self.bar.add_task("", total=1.0)
        self.total, self.steps = 0.0, 0  # losses since the last validation, as in its line
        self.pace = 0.0  # seconds an item, smoothed
        self.last = time.monotonic()

    def step(self, task: Task, share: float, step: Step) -> None:
        now = time.monotonic()
        pace, self.last = (now - self.last) / max(step.items, 1), now
        self.pace += (0.05 if self.pace else 1.0) * (pace - self.pace)
        self.total, self.steps = self.total + step.loss, self.steps + 1
        loss, speed = self.total / self.steps, 1.0 / self.pace
        text = f"train {loss:.3f} {task.unit}  gradient {step.norm:.2f}  {speed:,.0f} {task.items}/s"
        self.bar.update(self.row, completed=share, description=text)

    def evaluated(self, task: Task, run: Run, example: str) -> None:
        step, train_loss, valid = run.curve[-1]
        train_unit = f" {task.unit}" if task.valid_unit else ""
        valid_unit = task.valid_unit or task.unit
        text = f"step {step:>6,.0f}   train {train_loss:.3f}{train_unit}   valid {valid:.3f} {valid_unit}   {example}"
        self.console.print(text.rstrip(), markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
        self.total, self.steps = 0.0, 0
        self.last = time.monotonic()


def make_console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def train_and_show(
    example: Example, run: Run, task: Task, console: Console, minutes: float | None, path: Path | None
) -> None:
    """`train` behind a progress bar; Ctrl-C says where to go on."""
    monitor = Monitor(console)
    try:
        with monitor.bar:
            train(example, run, task, monitor, minutes, path)
    except KeyboardInterrupt:
        where = f"go on from {path} with --resume" if path else "nothing was saved; --save would have"
        raise Stopped(f"stopped at step {run.step:,}; {where}") from None


def count_parameters(model: rnnfast.Module) -> int:
    return sum(parameter.data.size for parameter in model.parameters())


def summary(run: Run, task: Task | type[Task], result: str) -> str:
    """The last line: the result on the test part, and what it cost."""
    best = min(valid for _, _, valid in run.curve)
    unit = f" {task.valid_unit}" if task.valid_unit else ""
    cost = f"{counted(run.step, 'steps')}, about {counted(run.items, task.items)}, {run.seconds:.0f} s"
    return f"{result} (validation {best:.3f}{unit}, {cost})"


def new_figure(width: float = 7.0, height: float = 4.5) -> Any:
    """A matplotlib figure that no display has to show."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


MARKED = ".-"  # a line with its points, so that a single one is seen, too


def draw_curve(axes: Any, run: Run, unit: str) -> None:
    """The learning curve: training and validation loss against steps, and a float's test figure."""
    steps, train_loss, valid = zip(*run.curve, strict=True)
    axes.plot(steps, train_loss, MARKED, label="train")
    axes.plot(steps, valid, MARKED, label="valid")
    if isinstance(run.test, float):
        axes.axhline(run.test, color="black", linestyle=":", label=f"test {run.test:.3f}")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()


def write_picture(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise not_written("--plot", path, error) from error


# The command line ----------------------------------------------------------------------------------------------------


class Number(click.FloatRange):
    """click's own range lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"expected a number, got {value!r}", param, ctx)
        return number


POSITIVE = Number(min=0.0, min_open=True, max=1e9)
FILE = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**32 - 1)
WRITTEN = click.IntRange(0, 1_000_000)  # characters or words
DEVICE = re.compile(r"cpu|cuda(:\d+)?")

CELL = ("--cell", click.Choice(list(CELLS)), "The recurrent layers.")
HIDDEN = ("--hidden", click.IntRange(1), "Hidden units of a layer.")
LAYERS = ("--layers", click.IntRange(1), "Recurrent layers.")
DROPOUT = ("--dropout", Number(0.0, 1.0, max_open=True), "Before the output, and between layers.")
BATCH = ("--batch", click.IntRange(1), "Sequences side by side.")
LR = ("--lr", POSITIVE, "The learning rate, the highest where it changes.")
CLIP = ("--clip", POSITIVE, "The largest norm of a gradient.")


def settings_options(defaults: type, *rows: tuple[str, Any, str]) -> Callable[[Any], Any]:
    """Options for fields of a settings class: None unless given, so that a resumed file decides the others.

    What every training has (steps, evaluate, patience, seed) is added.
    """
    always = (
        ("--steps", click.IntRange(1), "Steps of the optimiser to train for."),
        ("--evaluate", click.IntRange(1), "Steps between validations, each followed by a save."),
        ("--patience", click.IntRange(1), "Stop after that many validations without a better one."),
        ("--seed", SEED, "Of everything random."),
    )

    def decorate(function: Any) -> Any:
        for flag, kind, text in reversed((*rows, *always)):
            default = getattr(defaults, flag.removeprefix("--").replace("-", "_"))
            shown = "" if default == "" else f" [default: {default}]"
            function = click.option(flag, type=kind, help=f"{text}{shown}")(function)
        return function

    return decorate


def run_options(picture: str) -> Callable[[Any], Any]:
    """The options that every script has and that decide no weights; `picture`: what --plot draws."""
    options = (
        click.option("--minutes", type=POSITIVE, help="Fit the training into this time; the clock decides then."),
        click.option("--device", default="cpu", show_default=True, help="Where the weights are."),
        click.option("--tiny", is_flag=True, help="Settings that take a second, to try things out."),
        click.option("--save", "path", type=FILE, help="Save here, at every validation and at the end."),
        click.option("--resume", "resumed", is_flag=True, help="Go on from the file of --save, if it is there."),
        click.option("--plot", type=FILE, help=f"Draw {picture} (PNG; needs matplotlib)."),
    )

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def check_outputs(options: dict[str, Any], *others: str) -> None:
    """Refuse before a long training what could not be written after it; `others`: more options that name outputs."""
    path, device = options["path"], options["device"]
    if DEVICE.fullmatch(device) is None:
        raise Failure(f"--device {device}: expected cpu or cuda")
    if options["resumed"] and path is None:
        raise click.UsageError("--resume needs --save, the file to go on from")
    if path is not None and path.exists() and not options["resumed"]:
        raise Failure(f"--save {path}: is there already; go on with --resume, or name another")
    if options["plot"] is not None:
        need("matplotlib", "--plot", "plot")
        if options["plot"].suffix.lower() != ".png":
            raise Failure(f"--plot {options['plot']}: expected a name that ends in .png")
    for option, name in (("--save", "path"), ("--plot", "plot"), *((f"--{other}", other) for other in others)):
        file = options[name]
        if file is not None:
            check_output(option, file)


def check_output(option: str, file: Path) -> None:
    """Refuse a file that could not be written."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise Failure(f"{option} {file}: expected an existing folder, got {folder}")
    if file.is_dir():
        raise Failure(f"{option} {file}: expected a file, got a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        raise Failure(f"{option} {file}: expected a folder that can be written to, got {folder}") from None


def begin(example: Example, options: dict[str, Any]) -> tuple[Run, Any]:
    """A new run or the one in the file of --save, and the data, which are None for a finished run.

    A finished run needs no data; where some are named all the same, they must be its own.
    """
    path, given = options["path"], given_settings(example, options)
    if not (options["resumed"] and path is not None and path.exists()):
        settings = example.settings(**given)
        data = example.load(settings, options)
        return new_run(example, settings, data, options["device"]), data
    run = resume(example, path, options["device"])
    for name, value in given.items():
        if value != getattr(run.settings, name):
            flag = name.replace("_", "-")
            raise Failure(f"--{flag}: expected {getattr(run.settings, name)}, as {path} was begun, got {value}")
    finished = run.test is not None
    if finished and not (options.get("file") or options.get("data")):
        return run, None
    data = example.load(run.settings, options)
    if data.digest != run.digest:
        raise Failure(f"{data.name}: expected the data that {path} was begun with, got another")
    return run, None if finished else data


def given_settings(example: Example, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line names, over those of --tiny."""
    names = [entry.name for entry in fields(example.settings)]
    given = {name: options[name] for name in names if options.get(name) is not None}
    return {**asdict(example.tiny), **given} if options["tiny"] else given
