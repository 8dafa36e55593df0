"""A word model of a text, two LSTM layers of 200 as in Zaremba et al. (2014), trained with NumPy and rnnfast alone.

    python language_model.py                                     # the Python standard library's own source
    python language_model.py shakespeare.txt --minutes 5 --generate 100 --prompt "ROMEO:" --plot curve.png
    python language_model.py shakespeare.txt --save model.safetensors [--resume]

Words, marks of punctuation and ends of lines are tokens; what is not among the most frequent tokens of the training part
is one token, "unknown", which counts in the perplexity and is never written. The figure is the perplexity, exp of the
mean of -log p(token | all before it). How a text is read and split is text_generation.py's.

Sizes in comments: T steps of a window, B parallel streams, V tokens of the vocabulary, E embedding, H hidden size.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
import harness
import numpy as np
from harness import CELLS, Failure, Number, Run, Step
from text_generation import CharacterModel, cut_streams, draw, read_text, windows

import rnnfast


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the text."""

    cell: str = "lstm"
    hidden: int = 200
    layers: int = 2
    dropout: float = 0.3
    vocabulary: int = 10_000
    batch: int = 20
    window: int = 20
    steps: int = 6000
    lr: float = 0.004
    decay: float = 0.05
    clip: float = 1.0
    evaluate: int = 500
    patience: int = 5
    seed: int = 0


TINY = Settings(hidden=16, vocabulary=200, batch=4, window=8, steps=60, evaluate=20, lr=0.02)
TINY_TEXT = 20_000  # characters
UNKNOWN = "\ufffd"  # token 0
SHOWN_UNKNOWN = "<unk>"  # what an unknown word of the prompt is shown as
TOKEN = re.compile(r"\w+|[^\w\s]|\n")
TIGHT = set(".,;:!?)]}'\"_")  # no space before these when a text is put together


# The text ------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text as tokens, in its three parts."""

    name: str
    digest: str
    vocabulary: list[str]
    train: np.ndarray  # int64
    valid: np.ndarray
    test: np.ndarray

    @property
    def info(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary}


def load(settings: Settings, options: dict[str, Any]) -> Text:
    if options["file"] and options["data"]:
        raise click.UsageError("FILE and --data are the same; name one")
    limit = options["limit"] or (TINY_TEXT if options["tiny"] else None)
    return prepare(*read_text(options["file"] or options["data"], limit), settings)


def prepare(name: str, characters: str, settings: Settings) -> Text:
    """Split in order, the last tenth to test; the vocabulary is the training part's."""
    words = TOKEN.findall(characters)
    least = max(500, 20 * settings.batch * 2)
    if len(words) < least:
        raise Failure(f"{name}: expected at least {least} words for --batch {settings.batch}, got {len(words)}")
    bounds = [len(words) * share // 20 for share in (17, 18)]
    parts = words[: bounds[0]], words[bounds[0] : bounds[1]], words[bounds[1] :]
    frequent = Counter(parts[0]).most_common(settings.vocabulary)
    vocabulary = [UNKNOWN, *(word for word, _ in frequent)]
    places = {word: place for place, word in enumerate(vocabulary)}
    tokens = (np.array([places.get(word, 0) for word in part], np.int64) for part in parts)
    return Text(name, harness.digest_of(characters), vocabulary, *tokens)


def put_together(words: list[str]) -> str:
    """Tokens as a text: spaces between words, none before most marks or at the start of a line."""
    text = ""
    for word in words:
        space = "" if word in TIGHT or word == "\n" or text[-1:] in ("", "\n", "(", "[", "{", "_") else " "
        text += space + word
    return text


# The model: text_generation's, with words for characters --------------------------------------------------------------


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[CharacterModel, rnnfast.optim.Optimizer]:
    """Embedding [V, H], recurrent layers, dropout, Linear: tokens [T, B] and a state to logits [T, B, V]."""
    seeds, count = harness.seeds(settings.seed, 4), len(info["vocabulary"])
    between = settings.dropout if settings.layers > 1 else 0.0
    sizes = settings.hidden, settings.hidden, settings.layers
    model = CharacterModel(
        rnnfast.Sequential(
            rnnfast.Embedding(count, settings.hidden, device=device, seed=seeds[0]),
            CELLS[settings.cell](*sizes, dropout=between, device=device, seed=seeds[1]),
            rnnfast.Dropout(settings.dropout, seed=seeds[2]),
            rnnfast.Linear(settings.hidden, count, device=device, seed=seeds[3]),
        )
    )
    rnnfast.init.uniform_(model.layers[0].weight, -0.1, 0.1, seed=seeds[0])
    return model, rnnfast.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.decay)


def nats_per_token(model: CharacterModel, tokens: np.ndarray, streams: int = 16) -> float:
    """The mean of -log p(token | all before it in its stream), from zero states on; for a model in eval mode."""
    x, y = cut_streams(tokens, min(streams, max(1, len(tokens) // 8)))
    total = 0.0
    for window in rnnfast.tbptt(model, x, window=32):
        loss, _ = rnnfast.cross_entropy(window.output, y[window.start : window.stop], reduction="sum")
        total += float(loss)
    return total / y.size


# Training ------------------------------------------------------------------------------------------------------------


class Wording(harness.Task):
    """Predict the next word."""

    unit = "nats/word"
    items = "words"

    def __init__(self, text: Text) -> None:
        self.text = text

    def batches(self, run: Run) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return windows(run, self.text.train)

    def learn(self, run: Run, batch: tuple[np.ndarray, np.ndarray], rate: float) -> Step:
        logits, targets = batch
        loss, grad_logits = rnnfast.cross_entropy(logits, targets)
        run.model.backward(grad_logits)
        return Step(float(loss), harness.descend(run, rate, run.settings.clip), targets.size)

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    def validate(self, run: Run) -> float:
        return nats_per_token(run.model, self.text.valid)

    def test(self, run: Run) -> float:
        return nats_per_token(run.model, self.text.test)

    def example(self, run: Run) -> str:
        return f"perplexity {math.exp(run.curve[-1][2]):.1f}   {''.join(sample(run, '', 12, 0.8, None, run.step))!r}"


# Sampling ------------------------------------------------------------------------------------------------------------


def sample(run: Run, prompt: str, length: int, temperature: float, top_k: int | None, seed: int) -> Iterator[str]:
    """The prompt and words after it, as pieces of text: the model's own word is its next input."""
    embedding, recurrent, _, head = run.model.layers
    vocabulary = run.info["vocabulary"]
    places = {word: place for place, word in enumerate(vocabulary)}
    random = np.random.default_rng(seed)
    words = TOKEN.findall(prompt)
    yield put_together([word if word in places else SHOWN_UNKNOWN for word in words])
    with recurrent.stream(batch_size=1) as stream:
        for word in words or ["\n"]:
            output = stream.step(embedding.weight.data[[places.get(word, 0)]])
        for _ in range(length):
            place = draw(head(output)[0], temperature, top_k, random)
            words.append(vocabulary[place])
            yield put_together(words[-2:]).removeprefix(put_together(words[-2:-1]))
            output = stream.step(embedding.weight.data[[place]])


def unknown_words(run: Run, prompt: str) -> list[str]:
    """Words of the prompt that the model does not know, each once."""
    known = set(run.info["vocabulary"][1:])
    return [word for word in dict.fromkeys(TOKEN.findall(prompt)) if word not in known]


# The command line ----------------------------------------------------------------------------------------------------


def describe(run: Run, text: Text) -> str:
    parts = f"{len(text.train):,} + {len(text.valid):,} + {len(text.test):,}"
    unknown = 100 * float((text.test == 0).mean())
    return (
        f"{text.name}: {parts} words to train, validate and test, {len(text.vocabulary):,} different ones; "
        f"unknown in the test part: {unknown:.1f} %\n"
        f"{run.model.layers[1]}, {harness.count_parameters(run.model):,} parameters"
    )


def plot_curve(run: Run, path: Any) -> None:
    """Perplexity against steps, as a PNG."""
    figure = harness.new_figure()
    axes = figure.add_subplot(
        yscale="log", title=f"{run.settings.layers} × {run.settings.cell.upper()} {run.settings.hidden}"
    )
    shown = Run(run.settings, {}, "", None, None, test=math.exp(run.test))
    shown.curve = [[step, math.exp(train), math.exp(valid)] for step, train, valid in run.curve]
    harness.draw_curve(axes, shown, "perplexity")
    harness.write_picture(figure, path)


SCRIPT = harness.Example("language_model", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.argument("file", required=False, type=harness.FILE)
@click.option("--data", type=harness.FILE, help="The same as FILE: a text in UTF-8. Default: Python's own library.")
@click.option("--limit", type=click.IntRange(1), help="Use only that many characters of it.")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    harness.LAYERS,
    harness.DROPOUT,
    ("--vocabulary", click.IntRange(1), "The most frequent tokens that are known."),
    ("--batch", click.IntRange(1), "Streams side by side."),
    ("--window", click.IntRange(1), "Steps that gradients go back."),
    harness.LR,
    ("--decay", Number(0.0, 1e9), "Weight decay of AdamW."),
    harness.CLIP,
)
@harness.run_options("the learning curve")
@click.option("--generate", type=harness.WRITTEN, default=60, show_default=True, help="Words to write at the end.")
@click.option("--prompt", default="", help="What they shall follow.")
@click.option("--temperature", type=Number(0.0, 1e9), default=0.8, show_default=True, help="0: the likeliest.")
@click.option("--sample-seed", type=harness.SEED, default=0, show_default=True, help="Another sample.")
@click.option("--top-k", type=click.IntRange(1), help="Choose among the k likeliest only.")
def main(**options: Any) -> None:
    """Train a word model on the text in FILE, and let it write on."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, text = harness.begin(SCRIPT, options)
    if unknown := unknown_words(run, options["prompt"]):
        console.print(f"--prompt: unknown, read as {SHOWN_UNKNOWN}: {' '.join(unknown)}", markup=False)
    if text is None:
        console.print(f"{options['path']}: trained already", markup=False)
    else:
        console.print(describe(run, text), markup=False)
        harness.train_and_show(SCRIPT, run, Wording(text), console, options["minutes"], options["path"])
    if options["plot"] is not None:
        plot_curve(run, options["plot"])
    run.model.eval()
    if options["generate"]:
        how = options["temperature"], options["top_k"], options["sample_seed"]
        for piece in sample(run, options["prompt"], options["generate"], *how):
            click.echo(piece, nl=False)
        click.echo("\n")
    click.echo(harness.summary(run, Wording, f"test perplexity {math.exp(run.test):.2f} on the last tenth"))


if __name__ == "__main__":
    main()
