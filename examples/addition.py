"""Addition learnt from examples, as text: an encoder and a decoder from rnnfast.torch read "12+7" and write "19".

    python addition.py                                           # two digits, 5,000 examples
    python addition.py --digits 3 --pairs 50000 --steps 30000 --ask 123+456 --plot answer.png
    python addition.py --data pairs.tsv                          # any short questions and answers

After "Learning to execute" (Zaremba and Sutskever 2014) and Keras's example addition_rnn: one LSTM reads the question,
backwards, which brings the units of both numbers near to each other; its last output is given to another LSTM at each
step, and that says the characters of the answer. No test question was trained on, nor with its numbers swapped, and
validation data alone choose the weights. With --data, a tenth of the pairs each is for validation and for the test.

Sizes in comments: Q characters of a question, A of an answer, B questions of a batch, V characters there are, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import harness_torch
import numpy as np
from harness import Failure, Run, Step
from harness_torch import torch
from torch import nn
from torch.nn import functional
from translation import Pair, read_pairs


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the questions; kept in the file that a training is resumed from."""

    cell: str = "lstm"
    hidden: int = 128
    digits: int = 2
    pairs: int = 5000
    order: str = "backwards"
    batch: int = 32
    steps: int = 8635  # 55 times the 5,000 pairs
    lr: float = 0.005
    clip: float = 1.0
    evaluate: int = 471  # three times the pairs
    patience: int = 10
    seed: int = 0


TINY = Settings(hidden=16, pairs=300, steps=40, evaluate=10)
MOST = 1000  # questions of the validation and of the test part
SHOWN = 5

# Questions and answers -----------------------------------------------------------------------------------------------


class Questions(NamedTuple):
    """What is trained on, validated with and tested on."""

    name: str
    digest: str
    info: dict[str, Any]  # symbols, sorted; question, answer: how long the longest are
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def sums(digits: int, count: int) -> list[list[Pair]]:
    """`count` training questions, validation and test questions: a+b and b+a are never in two parts."""
    numbers = 10**digits
    groups = np.stack(np.triu_indices(numbers), axis=1)  # a <= b
    random = np.random.default_rng(0)
    groups = random.permutation(groups)
    part = min(len(groups) // 10, MOST // 2)
    parts = [groups[2 * part :], groups[:part], groups[part : 2 * part]]
    ordered = [np.concatenate([group, group[group[:, 0] != group[:, 1]][:, ::-1]]) for group in parts]
    if count > len(ordered[0]):
        raise Failure(f"--pairs: expected at most {len(ordered[0])} for {digits} digits, got {count}")
    ordered[0] = random.permutation(ordered[0])[:count]
    return [[(f"{a}+{b}", f"{a + b}") for a, b in rows.tolist()] for rows in ordered]


def split(name: str, pairs: list[Pair]) -> list[list[Pair]]:
    """Training, validation and test part of different questions."""
    pairs = list(dict(reversed(pairs)).items())
    if len(pairs) < 20:
        raise Failure(f"{name}: expected at least 20 different questions, got {len(pairs)}")
    shuffled = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    part = min(len(pairs) // 10, MOST)
    return [shuffled[2 * part :], shuffled[:part], shuffled[part : 2 * part]]


def load(settings: Settings, options: dict[str, Any]) -> Questions:
    path = options["data"]
    name = path.name if path else f"sums of {settings.digits} digits"
    parts = split(name, read_pairs(path)) if path else sums(settings.digits, settings.pairs)
    pairs = [pair for part in parts for pair in part]
    symbols = "".join(sorted({" "}.union(*(question + answer for question, answer in parts[0]))))
    lengths = {side: max(len(pair[i]) for pair in pairs) for i, side in enumerate(("question", "answer"))}
    if min(lengths.values()) == 0:
        raise Failure(f"{name}: expected questions and answers, got empty ones alone")
    digest = harness.digest_of(*(f"{question}\t{answer}\n" for question, answer in pairs))
    return Questions(name, digest, {"symbols": symbols, **lengths}, *parts)


def encode(texts: list[str], symbols: str, length: int) -> torch.Tensor:
    """Codes [length, B] of texts with spaces behind them; characters that were not trained on are spaces, too."""
    codes = [[max(symbols.find(character), 0) for character in text.ljust(length)[:length]] for text in texts]
    return torch.tensor(codes).T


def check_question(run: Run, question: str) -> None:
    """Refuse what the model cannot read."""
    longest, symbols = run.info["question"], run.info["symbols"]
    if not 0 < len(question) <= longest:
        raise Failure(f"--ask: expected 1 to {longest} characters, as the questions have, got {question!r}")
    if unknown := "".join(sorted(set(question) - set(symbols))):
        raise Failure(f"--ask {question}: expected characters among {symbols.strip()!r}, got {unknown!r}")


# The model -----------------------------------------------------------------------------------------------------------


class Answerer(nn.Module):
    """Codes of questions [Q, B] to logits of answers [A, B, V]."""

    def __init__(self, settings: Settings, symbols: int, answer: int) -> None:
        super().__init__()
        layer, hidden = harness_torch.CELLS[settings.cell], settings.hidden
        self.symbols, self.answer, self.order = symbols, answer, settings.order
        self.reader = layer(symbols, hidden)
        self.writer = layer(hidden, hidden)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, question: torch.Tensor) -> torch.Tensor:
        x = functional.one_hot(question.flip(0) if self.order == "backwards" else question, self.symbols)
        output, _ = self.reader(x.to(self.head.weight.dtype))  # [Q, B, H]
        output, _ = self.writer(output[-1:].expand(self.answer, -1, -1))  # [A, B, H]
        return self.head(output)


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Answerer, torch.optim.Optimizer]:
    harness_torch.begin_model(settings.seed, device)
    model = Answerer(settings, len(info["symbols"]), info["answer"]).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=settings.lr)


@torch.no_grad()
def likely(run: Run, questions: list[str]) -> np.ndarray:
    """Probabilities of each character of the answers [A, B, V]; for a model in eval mode."""
    codes = encode(questions, run.info["symbols"], run.info["question"])
    return run.model(codes.to(run.model.head.weight.device)).softmax(2).cpu().numpy()


def answers(run: Run, questions: list[str]) -> list[str]:
    symbols = np.array(list(run.info["symbols"]))
    return ["".join(characters).rstrip() for characters in symbols[likely(run, questions).argmax(2)].T]


# Training ------------------------------------------------------------------------------------------------------------


class Answering(harness.Task):
    """Say each character of the answer."""

    unit = "nats/character"
    items = "questions"

    def __init__(self, questions: Questions, device: str = "cpu") -> None:
        self.questions, self.device = questions, device

    def batches(self, run: Run) -> Iterator[list[Pair]]:
        for chosen in harness.shuffled_batches(run, len(self.questions.train), run.settings.batch):
            yield [self.questions.train[i] for i in chosen]

    def loss(self, run: Run, pairs: list[Pair]) -> torch.Tensor:
        questions, wanted = ([pair[side] for pair in pairs] for side in (0, 1))
        symbols = run.info["symbols"]
        logits = run.model(encode(questions, symbols, run.info["question"]).to(self.device))
        return functional.cross_entropy(
            logits.flatten(0, 1), encode(wanted, symbols, run.info["answer"]).flatten().to(self.device)
        )

    def learn(self, run: Run, batch: list[Pair], rate: float) -> Step:
        loss = self.loss(run, batch)
        return Step(loss.item(), harness_torch.descend(run, loss, rate, run.settings.clip), len(batch))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    @torch.no_grad()
    def validate(self, run: Run) -> float:
        return float(self.loss(run, self.questions.valid))

    def test(self, run: Run) -> dict[str, float]:
        questions, wanted = ([pair[side] for pair in self.questions.test] for side in (0, 1))
        given = answers(run, questions)
        run.notes["shown"] = [list(row) for row in zip(questions, wanted, given, strict=True)][:SHOWN]
        return accuracy(given, wanted, run.info["answer"])

    def example(self, run: Run) -> str:
        questions, wanted = ([pair[side] for pair in self.questions.valid] for side in (0, 1))
        given = answers(run, questions)
        share = accuracy(given, wanted, run.info["answer"])["exact"]
        return f"{100 * share:.1f} % right, {questions[0]} → {given[0]}"


def accuracy(given: list[str], wanted: list[str], length: int) -> dict[str, float]:
    """The shares of right answers and of right characters (the spaces behind an answer count, as in Keras's example)."""
    pairs = list(zip(given, wanted, strict=True))
    right = sum(a == b for one, other in pairs for a, b in zip(one.ljust(length), other.ljust(length), strict=True))
    return {"exact": sum(one == other for one, other in pairs) / len(pairs), "characters": right / length / len(pairs)}


# What is shown -------------------------------------------------------------------------------------------------------


def describe(run: Run, data: Questions) -> str:
    settings, size = run.settings, harness_torch.count_parameters(run.model)
    return (
        f"{data.name}: {len(data.train):,} + {len(data.valid):,} + {len(data.test):,} questions to train, validate and test"
        f"\n{run.model.reader}, {size:,} parameters, {harness.counted(settings.steps, 'steps')} "
        f"({settings.steps * settings.batch / len(data.train):.1f} times the questions)"
    )


def show(run: Run, asked: list[str]) -> None:
    """Some answers of the test part, and to what was asked."""
    for question, wanted, given in run.notes["shown"]:
        click.echo(f"  {question} → {given}" + ("" if given == wanted else f" (wrong: {wanted})"))
    for question in asked:
        click.echo(f"{question} → {answers(run, [question])[0]}")


def plot_answer(run: Run, question: str, path: Path) -> None:
    """How likely each character of an answer is, and the learning curve."""
    figure = harness.new_figure(10.0, 4.5)
    left, right = figure.subplots(1, 2)
    left.imshow(likely(run, [question])[:, 0].T, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    left.set_xticks(range(run.info["answer"]), range(1, run.info["answer"] + 1))
    left.set_yticks(range(len(run.info["symbols"])), run.info["symbols"].replace(" ", "␣"))
    left.set(xlabel="place in the answer", title=f"{question} → {answers(run, [question])[0]}")
    harness.draw_curve(right, run, Answering.unit)
    right.set_yscale("log")
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("addition", Settings, TINY, load, build, harness_torch.TorchFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option("--data", type=harness.FILE, help="Questions, a tab, answers; may be .gz. Default: sums.")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    ("--digits", click.IntRange(1, 3), "Digits of the numbers to add, at most."),
    ("--pairs", click.IntRange(1), "Sums to train on."),
    ("--order", click.Choice(["backwards", "forwards"]), "How a question is read."),
    ("--batch", click.IntRange(1), "Questions side by side."),
    harness.LR,
    harness.CLIP,
)
@harness.run_options("an answer and the learning curve")
@click.option("--ask", "asked", multiple=True, help="Answer this question at the end; may be given several times.")
def main(**options: Any) -> None:
    """Train a network to answer short questions: sums."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, data = harness.begin(SCRIPT, options)
    for question in options["asked"]:
        check_question(run, question)
    if data is None:
        console.print(f"{options['path']}: trained already", markup=False)
        run.model.eval()
    else:
        console.print(describe(run, data), markup=False)
        task = Answering(data, options["device"])
        harness.train_and_show(SCRIPT, run, task, console, options["minutes"], options["path"])
    show(run, list(options["asked"]))
    if options["plot"] is not None:
        plot_answer(run, (*options["asked"], run.notes["shown"][0][0])[0], options["plot"])
    test = run.test
    result = (
        f"test: {100 * test['exact']:.1f} % of the answers right, {100 * test['characters']:.1f} % of the characters"
    )
    click.echo(harness.summary(run, Answering, result))


if __name__ == "__main__":
    main()
