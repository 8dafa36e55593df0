"""A character model of a text, trained with NumPy and rnnfast alone: it learns to write on.

    python text_generation.py                                # the Python standard library's own source
    python text_generation.py shakespeare.txt --generate 500 --prompt "ROMEO:" --plot curve.png
    python text_generation.py shakespeare.txt --save model.safetensors            # stopped? go on:
    python text_generation.py shakespeare.txt --save model.safetensors --resume   # finished? write without training

The file reads from top to bottom: the text, the model, training by truncated backpropagation through time, sampling,
the file that a killed training resumes from, the command line.

The text is split in order: the last tenth is the test, looked at once, at the end; the twentieth before it is for
validation, which alone chooses the weights that are kept and stops the training early; the rest is trained on.

Resumed from its last save, a training ends with bitwise the same weights as one that was never stopped, on the same
machine with the same number of threads; unless --minutes lets the clock decide.

Sizes in comments: T steps of a window, B parallel streams, V symbols, E embedding, H hidden size.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the text; kept in the file that a training is resumed from."""

    cell: str = "lstm"
    hidden: int = 128
    layers: int = 1
    embedding: int = 64
    dropout: float = 0.0
    batch: int = 32
    window: int = 128
    steps: int = 6000
    lr: float = 0.02
    decay: float = 0.05
    clip: float = 1.0
    evaluate: int = 500
    patience: int = 8
    seed: int = 0


TINY = Settings(hidden=16, embedding=8, batch=4, window=16, steps=60, evaluate=10, lr=0.02)
TINY_TEXT = 20_000
OWN_TEXT = 2_000_000  # characters of the standard library that are used
WARM_UP = 0.02  # the share of the training in which the learning rate rises
LAST_RATE = 0.02  # the share of the learning rate that is left at the end


class Failure(click.ClickException):
    """An error of the user's or of their data, told in one line; exit status 1."""


class Stopped(click.ClickException):
    """Ctrl-C."""

    exit_code = 130


# The text ------------------------------------------------------------------------------------------------------------

UNKNOWN = "\ufffd"  # symbol 0: what the training part does not have, or has too rarely to count among 255
MAX_SYMBOLS = 256
EXAMPLE = 60  # characters that are shown at every validation


class Text(NamedTuple):
    """A text as symbols, in its three parts."""

    name: str
    digest: str
    vocabulary: str
    train: np.ndarray  # uint8
    valid: np.ndarray
    test: np.ndarray


def read_text(path: Path | None, limit: int | None) -> tuple[str, str]:
    """Name and characters of a UTF-8 file, or of the standard library where there is no path."""
    if path is None:
        return standard_library(limit or OWN_TEXT)
    try:
        characters = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise Failure(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise Failure(
            f"{path}: expected text in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
        ) from error
    if "\0" in characters:
        raise Failure(f"{path}: expected text, got a binary file (a zero byte at {characters.index(chr(0))})")
    return path.name, characters[:limit]


def standard_library(limit: int) -> tuple[str, str]:
    """The first `limit` characters of Python's own modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda file: file.name)
    if not files:
        raise Failure(f"{folder}: expected the source of Python's standard library, found none; name a FILE")
    characters = ""
    for file in files:
        with tokenize.open(file) as source:  # knows about coding cookies
            characters += source.read() + "\n"
        if len(characters) >= limit:
            break
    return f"the standard library of Python {sys.version.split()[0]}", characters[:limit]


def prepare(name: str, characters: str, settings: Settings) -> Text:
    """Split into train, valid and test; symbols are those of the training part."""
    least = max(2000, 2 * settings.batch * settings.window)
    if len(characters) < least:
        reason = f"for --batch {settings.batch} and --window {settings.window}"
        raise Failure(f"{name}: expected at least {least} characters {reason}, got {len(characters)}")
    codes = np.frombuffer(characters.encode("utf-32-le", "replace"), np.uint32)
    bounds = [len(codes) * share // 20 for share in (17, 18)]
    train, valid, test = np.split(codes, bounds)
    vocabulary = make_vocabulary(train)
    if vocabulary == UNKNOWN:
        raise Failure(f"{name}: expected text, got nothing but {UNKNOWN!a}")
    digest = hashlib.sha256(codes.tobytes()).hexdigest()
    return Text(name, digest, vocabulary, *(encode(part, vocabulary) for part in (train, valid, test)))


def make_vocabulary(codes: np.ndarray) -> str:
    """The unknown symbol and the most frequent characters, in the order of their code points."""
    characters, counts = np.unique(codes, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[: MAX_SYMBOLS - 1]
    return UNKNOWN + "".join(chr(code) for code in np.sort(characters[frequent]) if chr(code) != UNKNOWN)


def encode(codes: np.ndarray, vocabulary: str) -> np.ndarray:
    """Code points to symbols, places in the vocabulary: uint8."""
    table = np.zeros(sys.maxunicode + 1, np.uint8)
    for symbol, character in enumerate(vocabulary):
        table[ord(character)] = symbol
    return table[codes]


def cut_streams(symbols: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pieces side by side, x [T, B], and the symbol that follows each, y [T, B]."""
    length = (len(symbols) - 1) // count
    x, y = (part[: count * length].reshape(count, length) for part in (symbols, symbols[1:]))
    return np.ascontiguousarray(x.T), np.ascontiguousarray(y.T)


# The model -----------------------------------------------------------------------------------------------------------


class CharacterModel(rnnfast.Module):
    """Embedding, recurrent layers, dropout, Linear: symbols [T, B] and a state to logits [T, B, V] and the next state.

    The layers are a `Sequential`, because `rnnfast.load_checkpoint` rebuilds that from a file on its own.
    """

    def __init__(self, layers: rnnfast.Sequential) -> None:
        super().__init__()
        self.layers: Any = layers

    def forward(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        embedding, recurrent, dropout, head = self.layers
        output, state = recurrent(embedding(x), state)
        return head(dropout(output)), state

    def backward(self, grad_logits: np.ndarray) -> None:
        """Add the gradients into ``p.grad``; the state that came in is a constant, which truncates BPTT here."""
        self.layers.backward(grad_logits, need_grad_x=False)


def make_model(settings: Settings, symbols: int, device: str) -> CharacterModel:
    seeds = [int(seed) for seed in np.random.SeedSequence(settings.seed).generate_state(4)]
    between = settings.dropout if settings.layers > 1 else 0.0
    recurrent = CELLS[settings.cell](
        settings.embedding, settings.hidden, settings.layers, dropout=between, device=device, seed=seeds[1]
    )
    return CharacterModel(
        rnnfast.Sequential(
            rnnfast.Embedding(symbols, settings.embedding, device=device, seed=seeds[0]),
            recurrent,
            rnnfast.Dropout(settings.dropout, seed=seeds[2]),
            rnnfast.Linear(settings.hidden, symbols, device=device, seed=seeds[3]),
        )
    )


def bits_per_character(model: CharacterModel, symbols: np.ndarray, streams: int = 16) -> float:
    """The mean of -log2 p(symbol | all before it in its stream), from zero states on; for a model in eval mode.

    One stream would be the strictest reading of "all before it"; sixteen are faster, and dearer by 0.001 bits.
    """
    x, y = cut_streams(symbols, streams)
    total = 0.0
    for window in rnnfast.tbptt(model, x, window=512):
        loss, _ = rnnfast.cross_entropy(window.output, y[window.start : window.stop], reduction="sum")
        total += float(loss)
    return total / y.size / math.log(2)


# Training ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training as far as it has come: all that must be saved to go on as if nothing had happened.

    There is no random generator in it: all that is random is a function of the seed and of the counters here.
    """

    settings: Settings
    model: CharacterModel
    optimizer: rnnfast.optim.Optimizer
    vocabulary: str
    digest: str  # of the text
    step: int = 0
    epoch: int = 0
    offset: int = 0  # in the streams of this epoch
    state: Any = None  # of the recurrent layers there
    best: float = math.inf
    best_weights: dict[str, np.ndarray] = field(default_factory=dict)
    misses: int = 0  # evaluations since the best one
    curve: list[list[float]] = field(default_factory=list)  # [step, train, valid], in bits per character
    seconds: float = 0.0
    test: float | None = None  # where training is over


COUNTERS = [entry.name for entry in fields(Run) if entry.name not in ("settings", "model", "optimizer")]


def new_run(settings: Settings, text: Text, device: str) -> Run:
    model = make_model(settings, len(text.vocabulary), device)
    optimizer = rnnfast.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.decay)
    return Run(settings, model, optimizer, text.vocabulary, text.digest)


def windows(run: Run, train: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits [T, B, V] and targets [T, B], window after window and epoch after epoch, from where the run stands.

    The weights change between two windows, the state is carried on. Every epoch cuts the text in other places.
    """
    while True:
        random = np.random.default_rng([run.settings.seed, run.epoch])
        x, y = cut_streams(np.roll(train, -random.integers(len(train))), run.settings.batch)
        start = run.offset
        for window in rnnfast.tbptt(run.model, x[start:], run.settings.window, state=run.state):
            run.offset, run.state = start + window.stop, window.state
            yield window.output, y[start + window.start : start + window.stop]
        run.epoch, run.offset, run.state = run.epoch + 1, 0, None


def train_on(run: Run, logits: np.ndarray, targets: np.ndarray, rate: float) -> tuple[float, float]:
    """One step: the loss, in bits per character, and the norm of its gradient before clipping."""
    loss, grad_logits = rnnfast.cross_entropy(logits, targets)
    run.model.backward(grad_logits)
    norm = rnnfast.clip_grad_norm_(run.optimizer.parameters, run.settings.clip)
    run.optimizer.step(lr=rate)
    run.optimizer.zero_grad()
    run.step += 1
    bits = float(loss) / math.log(2)
    if not math.isfinite(bits + norm):
        raise Failure(f"step {run.step}: the loss is {bits} and its gradient {norm}; try a lower --lr")
    return bits, norm


def learning_rate(highest: float, share: float) -> float:
    """A short way up, then half a cosine down as `share`, of the training that is over, goes from 0 to 1."""
    up = min(1.0, 0.1 + share / WARM_UP)
    down = LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
    return highest * up * down


def train(run: Run, text: Text, monitor: Monitor, minutes: float | None, path: Path | None) -> None:
    """Train until the steps or the minutes are used up or validation gets no better; then test, once."""
    began = time.monotonic() - run.seconds
    losses: list[float] = []
    save(run, path)
    for logits, targets in windows(run, text.train):
        rate = learning_rate(run.settings.lr, progress(run, minutes))
        loss, norm = train_on(run, logits, targets, rate)
        losses.append(loss)
        run.seconds = time.monotonic() - began
        over = progress(run, minutes) >= 1.0
        monitor.step(run, progress(run, minutes), loss, norm, targets.size)
        if over or run.step % run.settings.evaluate == 0:
            example = evaluate(run, text, sum(losses) / len(losses))
            monitor.evaluated(run, example)
            if over or run.misses >= run.settings.patience:
                break
            losses.clear()
            save(run, path)
    finish(run, text)
    save(run, path)


def progress(run: Run, minutes: float | None) -> float:
    """The share of the budget that is used up."""
    return max(run.step / run.settings.steps, run.seconds / (60.0 * minutes) if minutes else 0.0)


def evaluate(run: Run, text: Text, train_bits: float) -> str:
    """Validate, keep the weights if they are the best so far, and show what the model writes by now."""
    run.model.eval()
    valid_bits = bits_per_character(run.model, text.valid)
    run.curve.append([run.step, train_bits, valid_bits])
    run.misses += 1
    if valid_bits < run.best:
        run.best, run.best_weights, run.misses = valid_bits, run.model.state_dict(), 0
    example = "".join(sample(run, "", EXAMPLE, temperature=0.8, top_k=None, seed=run.step))
    run.model.train()
    return example


def finish(run: Run, text: Text) -> None:
    """Take the best weights and look at the test part."""
    run.model.load_state_dict(run.best_weights)
    run.best_weights = {}
    run.model.eval()
    run.test = bits_per_character(run.model, text.test)


# Sampling ------------------------------------------------------------------------------------------------------------


def sample(run: Run, prompt: str, length: int, temperature: float, top_k: int | None, seed: int) -> Iterator[str]:
    """Characters one by one: the model's own output is its next input, a stream keeps the state in between."""
    embedding, recurrent, _, head = run.model.layers
    random = np.random.default_rng(seed)
    codes = np.array([ord(character) for character in prompt or "\n"])
    with recurrent.stream(batch_size=1) as stream:
        for symbol in encode(codes, run.vocabulary):
            output = stream.step(embedding.weight.data[[symbol]])
        for _ in range(length):
            symbol = draw(head(output)[0], temperature, top_k, random)
            yield run.vocabulary[symbol]
            output = stream.step(embedding.weight.data[[symbol]])


def draw(logits: np.ndarray, temperature: float, top_k: int | None, random: np.random.Generator) -> int:
    """A symbol from softmax(logits / temperature) over the `top_k` likeliest, never the unknown one; 0 is greedy."""
    logits = logits[1:].astype(np.float64)
    if temperature == 0.0:
        return 1 + int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits[np.argsort(-logits, kind="stable")[top_k:]] = -np.inf
    weights = np.exp((logits - logits.max()) / temperature)
    return 1 + int(random.choice(len(weights), p=weights / weights.sum()))


# The file ------------------------------------------------------------------------------------------------------------


def save(run: Run, path: Path | None) -> None:
    """Weights, optimiser, dropout counters and position in the data, at once: the file is always a whole one."""
    if path is None:
        return
    user = {name: getattr(run, name) for name in COUNTERS}
    user["settings"] = asdict(run.settings)
    try:
        rnnfast.save(path, run.model.layers, optimizer=run.optimizer, user=user)
    except OSError as error:
        raise Failure(f"--save {path}: {error}") from error


def resume(path: Path) -> Run:
    """The run of a file that `save` wrote."""
    try:
        checkpoint = rnnfast.load_checkpoint(path)
        module, user = checkpoint.module, checkpoint.user
        if not isinstance(module, rnnfast.Sequential) or "best_weights" not in (user or {}):
            raise ValueError("expected a file that this script saved, got another one of rnnfast")
        model = CharacterModel(module)
        settings = Settings(**user["settings"])
        optimizer = rnnfast.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.decay)
        optimizer.load_state_dict(checkpoint.optimizer or {})
        return Run(settings, model, optimizer, **{name: user[name] for name in COUNTERS})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Failure(f"--save {path}: cannot be resumed from: {error}") from error


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
        self.task = self.bar.add_task("", total=1.0)
        self.loss: float | None = None  # in bits, smoothed
        self.pace = 0.0  # seconds a character, smoothed
        self.last = time.monotonic()

    def step(self, run: Run, share: float, bits: float, norm: float, characters: int) -> None:
        now = time.monotonic()
        pace, self.last = (now - self.last) / characters, now
        self.pace += (0.05 if self.pace else 1.0) * (pace - self.pace)
        self.loss = bits if self.loss is None else self.loss + 0.05 * (bits - self.loss)
        text = f"loss {self.loss * math.log(2):.3f}  {self.loss:.3f} bits/char"
        text += f"  gradient {norm:.2f}  {0.001 / self.pace:,.0f}k char/s"
        self.bar.update(self.task, completed=share, description=text)

    def evaluated(self, run: Run, example: str) -> None:
        step, train_bits, valid_bits = run.curve[-1]
        text = f"step {step:>6,.0f}   train {train_bits:.3f}   valid {valid_bits:.3f} bits/char   {example!r}"
        self.console.print(text, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
        self.last = time.monotonic()


def plot_curve(run: Run, path: Path) -> None:
    """The learning curve, bits per character against steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, train_bits, valid_bits = zip(*run.curve, strict=True)
    axes.plot(steps, train_bits, label="train")
    axes.plot(steps, valid_bits, label="valid")
    if run.test is not None:
        axes.axhline(run.test, color="black", linestyle=":", label=f"test {run.test:.3f}")
    axes.set(xlabel="step", ylabel="bits per character", title=f"{run.settings.cell.upper()} {run.settings.hidden}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)


def describe(run: Run, text: Text) -> str:
    size = sum(parameter.data.size for parameter in run.model.parameters())
    parts = f"{len(text.train):,} + {len(text.valid):,} + {len(text.test):,}"
    epochs = run.settings.steps * run.settings.batch * run.settings.window / len(text.train)
    return (
        f"{text.name}: {parts} characters to train, validate and test, {len(text.vocabulary)} symbols\n"
        f"{run.model.layers[1]}, {size:,} parameters, {run.settings.steps:,} steps ({epochs:.1f} times the text)"
    )


def summary(run: Run) -> str:
    characters = run.step * run.settings.batch * run.settings.window
    return (
        f"test {run.test:.3f} bits per character on the last tenth "
        f"(validation {run.best:.3f}, {run.step:,} steps, about {characters:,} characters, {run.seconds:.0f} s)"
    )


# The command line ----------------------------------------------------------------------------------------------------


def setting(flag: str, kind: Any, text: str) -> Any:
    """An option for a field of `Settings`: None unless it is given, so that a resumed file decides the others."""
    return click.option(flag, type=kind, help=f"{text} [default: {getattr(Settings, flag.removeprefix('--'))}]")


POSITIVE = click.FloatRange(min=0.0, min_open=True, max=1e9)
FILE = click.Path(path_type=Path)


@click.command(context_settings={"max_content_width": 120})
@click.argument("file", required=False, type=FILE)
@click.option("--data", type=FILE, help="The same as FILE: a text in UTF-8. Default: Python's own library.")
@click.option("--limit", type=click.IntRange(1), help="Use only that many characters of it.")
@setting("--cell", click.Choice(list(CELLS)), "The recurrent layers.")
@setting("--hidden", click.IntRange(1), "Hidden units of a layer.")
@setting("--layers", click.IntRange(1), "Recurrent layers.")
@setting("--embedding", click.IntRange(1), "Size of a symbol's vector.")
@setting("--dropout", click.FloatRange(0.0, 1.0, max_open=True), "Before the output, and between layers.")
@setting("--batch", click.IntRange(1), "Streams side by side.")
@setting("--window", click.IntRange(1), "Steps that gradients go back.")
@setting("--steps", click.IntRange(1), "Windows to train on.")
@setting("--lr", POSITIVE, "The highest learning rate; it falls by half a cosine.")
@setting("--decay", click.FloatRange(0.0, 1e9), "Weight decay of AdamW.")
@setting("--clip", POSITIVE, "The largest norm of a gradient.")
@setting("--evaluate", click.IntRange(1), "Steps between validations, each followed by a save.")
@setting("--patience", click.IntRange(1), "Stop after that many validations without a better one.")
@setting("--seed", click.IntRange(0, 2**32 - 1), "Of everything random.")
@click.option("--minutes", type=POSITIVE, help="Fit the training into this time; the clock decides the weights then.")
@click.option("--device", default="cpu", show_default=True, help="Where the weights are.")
@click.option("--tiny", is_flag=True, help="Settings that take a second, to try things out.")
@click.option("--save", "path", type=FILE, help="Save here, at every validation and at the end.")
@click.option("--resume", "resumed", is_flag=True, help="Go on from the file of --save, if it is there.")
@click.option("--plot", type=FILE, help="Draw the learning curve (PNG; needs matplotlib).")
@click.option(
    "--generate", type=click.IntRange(0), default=400, show_default=True, help="Characters to write at the end."
)
@click.option("--prompt", default="", help="What they shall follow.")
@click.option(
    "--temperature", type=click.FloatRange(0.0, 1e9), default=0.8, show_default=True, help="0: the likeliest."
)
@click.option("--sample-seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Another sample.")
@click.option("--top-k", type=click.IntRange(1), help="Choose among the k likeliest only.")
def main(path: Path | None, resumed: bool, plot: Path | None, minutes: float | None, **options: Any) -> None:
    """Train a character model on the text in FILE, and let it write on."""
    check_outputs(path, resumed, plot)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    run, text = begin(path, resumed, options)
    if text is None:
        console.print(f"{path}: trained already", markup=False)
    else:
        console.print(describe(run, text), markup=False)
        train_and_show(run, text, console, minutes, path)
    if plot is not None:
        plot_curve(run, plot)
    write_on(run, options)
    click.echo(summary(run))


def check_outputs(path: Path | None, resumed: bool, plot: Path | None) -> None:
    """Refuse before a long training what could not be written after it."""
    if resumed and path is None:
        raise click.UsageError("--resume needs --save, the file to go on from")
    if path is not None and path.exists() and not resumed:
        raise Failure(f"--save {path}: is there already; go on with --resume, or name another")
    if plot is not None and find_spec("matplotlib") is None:
        raise Failure("--plot needs matplotlib: pip install 'rnnfast[plot]'")
    for option, file in (("--save", path), ("--plot", plot)):
        if file is not None and not file.absolute().parent.is_dir():
            raise Failure(f"{option} {file}: expected an existing folder, got {file.absolute().parent}")


def begin(path: Path | None, resumed: bool, options: dict[str, Any]) -> tuple[Run, Text | None]:
    """A new run or the one in the file, and the text, which a finished run needs no longer."""
    given = {name: options[name] for name in Settings.__dataclass_fields__ if options[name] is not None}
    if options["tiny"]:
        given = {**asdict(TINY), **given}
    if not (resumed and path is not None and path.exists()):
        settings = Settings(**given)
        text = load_text(settings, options)
        try:
            return new_run(settings, text, options["device"]), text
        except (ValueError, RuntimeError) as error:  # sizes beyond the memory, a device that is not there
            raise Failure(str(error)) from error
    run = resume(path)
    for name, value in given.items():
        if value != getattr(run.settings, name):
            raise Failure(f"--{name}: expected {getattr(run.settings, name)}, as {path} was begun, got {value}")
    if run.test is not None:
        return run, None
    text = load_text(run.settings, options)
    if text.digest != run.digest:
        raise Failure(f"{text.name}: expected the text that {path} was begun with, got another")
    return run, text


def load_text(settings: Settings, options: dict[str, Any]) -> Text:
    if options["file"] and options["data"]:
        raise click.UsageError("FILE and --data are the same; name one")
    limit = options["limit"] or (TINY_TEXT if options["tiny"] else None)
    return prepare(*read_text(options["file"] or options["data"], limit), settings)


def train_and_show(run: Run, text: Text, console: Console, minutes: float | None, path: Path | None) -> None:
    monitor = Monitor(console)
    try:
        with monitor.bar:
            train(run, text, monitor, minutes, path)
    except KeyboardInterrupt:
        where = f"go on from {path} with --resume" if path else "nothing was saved; --save would have"
        raise Stopped(f"stopped at step {run.step:,}; {where}") from None


def write_on(run: Run, options: dict[str, Any]) -> None:
    """Print the prompt and what follows, as it comes."""
    if not options["generate"]:
        return
    run.model.eval()
    click.echo(options["prompt"], nl=False)
    how = options["temperature"], options["top_k"], options["sample_seed"]
    for character in sample(run, options["prompt"], options["generate"], *how):
        click.echo(character, nl=False)
    click.echo("\n")


if __name__ == "__main__":
    main()
