"""A character model of a text, trained with NumPy and rnnfast alone: it learns to write on.

    python text_generation.py                                # the Python standard library's own source
    python text_generation.py shakespeare.txt --generate 500 --prompt "ROMEO:" --plot curve.png
    python text_generation.py shakespeare.txt --save model.safetensors            # stopped? go on:
    python text_generation.py shakespeare.txt --save model.safetensors --resume   # finished? write without training

The file reads from top to bottom: the text, the model, training by truncated backpropagation through time, sampling,
the command line. What is not about text is in harness.py: the loop, the file that a killed training resumes from.

The text is split in order: the last tenth is the test, looked at once, at the end; the twentieth before it is for
validation, which alone chooses the weights that are kept and stops the training early; the rest is trained on.

Resumed from its last save, a training ends with bitwise the same weights as one that was never stopped, on the same
machine with the same number of threads; unless --minutes lets the clock decide.

Sizes in comments: T steps of a window, B parallel streams, V symbols, E embedding, H hidden size.
"""

from __future__ import annotations

import math
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import numpy as np
from harness import CELLS, Failure, Number, Run, Step

import rnnfast


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

    @property
    def info(self) -> dict[str, str]:
        return {"vocabulary": self.vocabulary}


def read_text(path: Path | None, limit: int | None) -> tuple[str, str]:
    """Name and characters of a UTF-8 file, or of the standard library where there is no path."""
    if path is None:
        return standard_library(limit or OWN_TEXT)
    return path.name, harness.read_text(path)[:limit]


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


def prepare(name: str, characters: str, settings: Settings, limit: int | None = None) -> Text:
    """Split into train, valid and test; symbols are those of the training part. `limit`: what cut the text, to say so."""
    least = max(2000, 2 * settings.batch * settings.window)
    if len(characters) < least:
        reason = f"for --batch {settings.batch} and --window {settings.window}"
        cause = f" (--limit {limit})" if limit == len(characters) else ""
        raise Failure(f"{name}: expected at least {least} characters {reason}, got {len(characters)}{cause}")
    codes = np.frombuffer(characters.encode("utf-32-le", "replace"), np.uint32)
    bounds = [len(codes) * share // 20 for share in (17, 18)]
    train, valid, test = np.split(codes, bounds)
    vocabulary = make_vocabulary(train)
    if vocabulary == UNKNOWN:
        raise Failure(f"{name}: expected text, got nothing but {UNKNOWN!a}")
    return Text(
        name, harness.digest_of(codes), vocabulary, *(encode(part, vocabulary) for part in (train, valid, test))
    )


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


class CharacterModel(harness.Chain):
    """Embedding, recurrent layers, dropout, Linear: symbols [T, B] and a state to logits [T, B, V] and the next state."""

    def forward(self, x: np.ndarray, state: Any = None) -> tuple[np.ndarray, Any]:
        embedding, recurrent, dropout, head = self.layers
        output, state = recurrent(embedding(x), state)
        return head(dropout(output)), state

    def backward(self, grad_logits: np.ndarray) -> None:
        """Add the gradients into ``p.grad``; the state that came in is a constant, which truncates BPTT here."""
        self.layers.backward(grad_logits, need_grad_x=False)


def make_model(settings: Settings, symbols: int, device: str) -> CharacterModel:
    seeds = harness.seeds(settings.seed, 4)
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


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[CharacterModel, rnnfast.optim.Optimizer]:
    model = make_model(settings, len(info["vocabulary"]), device)
    return model, rnnfast.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.decay)


def windows(run: Run, train: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Logits [T, B, V] and targets [T, B], window after window and epoch after epoch, from where the run stands.

    The weights change between two windows, the state is carried on. Every epoch cuts the text in other places.
    """
    run.position = place = run.position or {"epoch": 0, "offset": 0, "state": None}
    while True:
        random = np.random.default_rng([run.settings.seed, place["epoch"]])
        x, y = cut_streams(np.roll(train, -random.integers(len(train))), run.settings.batch)
        start = place["offset"]
        for window in rnnfast.tbptt(run.model, x[start:], run.settings.window, state=place["state"]):
            place.update(offset=start + window.stop, state=window.state)
            yield window.output, y[start + window.start : start + window.stop]
        place.update(epoch=place["epoch"] + 1, offset=0, state=None)


def train_on(run: Run, logits: np.ndarray, targets: np.ndarray, rate: float) -> Step:
    """One step: the loss, in bits per character, and the norm of its gradient."""
    loss, grad_logits = rnnfast.cross_entropy(logits, targets)
    run.model.backward(grad_logits)
    norm = harness.descend(run, rate, run.settings.clip)
    return Step(float(loss) / math.log(2), norm, targets.size)


class Writing(harness.Task):
    """Predict the next character."""

    unit = "bits/char"
    items = "characters"

    def __init__(self, text: Text) -> None:
        self.text = text

    def batches(self, run: Run) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return windows(run, self.text.train)

    def learn(self, run: Run, batch: tuple[np.ndarray, np.ndarray], rate: float) -> Step:
        return train_on(run, *batch, rate)

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    def validate(self, run: Run) -> float:
        return bits_per_character(run.model, self.text.valid)

    def test(self, run: Run) -> float:
        return bits_per_character(run.model, self.text.test)

    def example(self, run: Run) -> str:
        return repr("".join(sample(run, "", EXAMPLE, temperature=0.8, top_k=None, seed=run.step)))


# Sampling ------------------------------------------------------------------------------------------------------------


def sample(run: Run, prompt: str, length: int, temperature: float, top_k: int | None, seed: int) -> Iterator[str]:
    """Characters one by one: the model's own output is its next input, a stream keeps the state in between."""
    embedding, recurrent, _, head = run.model.layers
    random = np.random.default_rng(seed)
    codes = np.array([ord(character) for character in prompt or "\n"])
    with recurrent.stream(batch_size=1) as stream:
        for symbol in encode(codes, run.info["vocabulary"]):
            output = stream.step(embedding.weight.data[[symbol]])
        for _ in range(length):
            symbol = draw(head(output)[0], temperature, top_k, random)
            yield run.info["vocabulary"][symbol]
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


def check_prompt(run: Run, prompt: str) -> None:
    """Refuse characters that the model cannot read."""
    unknown = "".join(sorted(set(prompt) - set(run.info["vocabulary"][1:])))
    if unknown:
        raise Failure(f"--prompt: expected characters that the training part has, got {unknown!r}")


# What is shown -------------------------------------------------------------------------------------------------------


def plot_curve(run: Run, path: Path) -> None:
    """The learning curve, bits per character against steps, as a PNG."""
    figure = harness.new_figure()
    axes = figure.add_subplot(title=f"{run.settings.cell.upper()} {run.settings.hidden}")
    harness.draw_curve(axes, run, "bits per character")
    harness.write_picture(figure, path)


def describe(run: Run, text: Text) -> str:
    parts = f"{len(text.train):,} + {len(text.valid):,} + {len(text.test):,}"
    epochs = run.settings.steps * run.settings.batch * run.settings.window / len(text.train)
    size = harness.count_parameters(run.model)
    return (
        f"{text.name}: {parts} characters to train, validate and test, {len(text.vocabulary)} symbols\n"
        f"{run.model.layers[1]}, {size:,} parameters, {harness.counted(run.settings.steps, 'steps')} "
        f"({epochs:.1f} times the text)"
    )


# The command line ----------------------------------------------------------------------------------------------------


def load(settings: Settings, options: dict[str, Any]) -> Text:
    if options["file"] and options["data"]:
        raise click.UsageError("FILE and --data name the same thing; give one")
    limit = options["limit"] or (TINY_TEXT if options["tiny"] else None)
    return prepare(*read_text(options["file"] or options["data"], limit), settings, options["limit"])


SCRIPT = harness.Example("text_generation", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.argument("file", required=False, type=harness.FILE)
@click.option("--data", type=harness.FILE, help="The same as FILE: a text in UTF-8. Default: Python's own library.")
@click.option("--limit", type=click.IntRange(1), help="Use only that many characters of it.")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    harness.LAYERS,
    ("--embedding", click.IntRange(1), "Size of a symbol's vector."),
    harness.DROPOUT,
    ("--batch", click.IntRange(1), "Streams side by side."),
    ("--window", click.IntRange(1), "Steps that gradients go back."),
    harness.LR,
    ("--decay", Number(0.0, 1e9), "Weight decay of AdamW."),
    harness.CLIP,
)
@harness.run_options("the learning curve")
@click.option(
    "--generate", type=harness.WRITTEN, default=400, show_default=True, help="Characters to write at the end."
)
@click.option("--prompt", default="", help="What they shall follow.")
@click.option("--temperature", type=Number(0.0, 1e9), default=0.8, show_default=True, help="0: the likeliest.")
@click.option("--sample-seed", type=harness.SEED, default=0, show_default=True, help="Another sample.")
@click.option("--top-k", type=click.IntRange(1), help="Choose among the k likeliest only.")
def main(**options: Any) -> None:
    """Train a character model on the text in FILE, and let it write on."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, text = harness.begin(SCRIPT, options)
    check_prompt(run, options["prompt"])
    if text is None:
        console.print(f"{options['path']}: trained already", markup=False)
    else:
        console.print(describe(run, text), markup=False)
        harness.train_and_show(SCRIPT, run, Writing(text), console, options["minutes"], options["path"])
    if options["plot"] is not None:
        plot_curve(run, options["plot"])
    write_on(run, options)
    click.echo(harness.summary(run, Writing, f"test {run.test:.3f} bits per character on the last tenth"))


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
