"""A model of polyphonic music: which of a piano's 88 keys sound in the next step; trained with NumPy and rnnfast alone.

    python music.py --midi chorale.mid --plot roll.png           # Bach's chorales from music21's corpus
    python music.py --data jsb-chorales-quarter.json --midi chorale.mid
    python music.py --data FOLDER                                # MIDI or MusicXML files of your own

A piece is a piano roll of quarter notes. Given all steps before it, a step's keys are taken as independent, each with a
probability of its own: the figure is the mean over all steps of a step's negative log-likelihood, in nats, summed over
the keys. The first step of a piece is predicted from silence. This is the framing of Boulanger-Lewandowski et al. (2012)
and of Chung et al. (2014), whose noise on the weights is here, too (--noise).

Sizes in comments: T steps, B pieces of a batch, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import numpy as np
from harness import CELLS, Failure, Number, Run, Step

import rnnfast

LOWEST, KEYS = 21, 88  # of a piano, the lowest as MIDI counts
PARTS = ("train", "valid", "test")
SUFFIXES = (".mid", ".midi", ".xml", ".musicxml", ".mxl", ".abc", ".krn")
NAMES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the pieces."""

    cell: str = "lstm"
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.2
    noise: float = 0.05
    transpose: int = 5
    batch: int = 8
    steps: int = 6000
    lr: float = 0.003
    schedule: str = "cosine"
    clip: float = 1.0
    evaluate: int = 100
    patience: int = 15
    seed: int = 0


TINY = Settings(hidden=16, steps=30, evaluate=10, batch=4, lr=0.01)


# The pieces ----------------------------------------------------------------------------------------------------------

Piece = np.ndarray  # bool [T, 88]


class Music(NamedTuple):
    """Pieces in three parts."""

    name: str
    digest: str
    parts: dict[str, list[Piece]]

    @property
    def info(self) -> dict[str, Any]:
        """The model need not know anything."""
        return {}


def load(settings: Settings, options: dict[str, Any]) -> Music:
    """The pieces of --data: a file of the JSB chorales, or a folder of scores; or music21's chorales."""
    path, limit = options["data"], options["limit"] or (8 if options["tiny"] else None)
    if path is not None and path.is_file():
        name, parts = path.name, {part: pieces[:limit] for part, pieces in read_json(path).items()}
    else:
        name, pieces = read_corpus(limit) if path is None else read_folder(path, limit)
        parts = split(name, pieces)
    return Music(name, harness.digest_of(*(piece for part in parts.values() for piece in part)), parts)


def split(name: str, pieces: list[Piece]) -> dict[str, list[Piece]]:
    """Three fifths, a fifth, a fifth, in their order."""
    if len(pieces) < 5:
        raise Failure(f"{name}: expected at least 5 pieces, got {len(pieces)}")
    bounds = [len(pieces) * 3 // 5, len(pieces) * 4 // 5]
    return dict(zip(PARTS, (pieces[: bounds[0]], pieces[bounds[0] : bounds[1]], pieces[bounds[1] :]), strict=True))


def read_json(path: Path) -> dict[str, list[Piece]]:
    """{"train": pieces, ...}: a piece is a list of steps, a step a list of MIDI pitches."""
    try:
        content = json.loads(harness.read_text(path))
    except json.JSONDecodeError as error:
        raise Failure(f"{path}: expected JSON, got something else: {error}") from error
    if not isinstance(content, dict) or not all(content.get(part) for part in PARTS):
        raise Failure(f"{path}: expected an object with pieces in {', '.join(PARTS)}")
    try:
        return {part: [roll_of(piece) for piece in content[part]] for part in PARTS}
    except (TypeError, ValueError) as error:
        raise Failure(f"{path}: expected pieces that are lists of steps, lists of pitches: {error}") from error


def roll_of(steps: Iterable[Iterable[int]]) -> Piece:
    """The piano roll [T, 88] of steps that are pitches. ValueError: there is none, or one is not on the piano."""
    steps = [[int(pitch) for pitch in step] for step in steps]
    roll = np.zeros((len(steps), KEYS), bool)
    for t, step in enumerate(steps):
        for pitch in step:
            if not LOWEST <= pitch < LOWEST + KEYS:
                raise ValueError(f"step {t}: expected pitches from {LOWEST} to {LOWEST + KEYS - 1}, got {pitch}")
            roll[t, pitch - LOWEST] = True
    if not steps:
        raise ValueError("a piece without steps")
    return roll


def read_corpus(limit: int | None) -> tuple[str, list[Piece]]:
    """Bach's chorales as music21 brings them."""
    harness.need("music21", "the default corpus")
    from music21 import corpus

    names = list(corpus.chorales.Iterator(returnType="filename"))[:limit]
    return f"music21's {len(names)} chorales", [quantised(corpus.parse(name)) for name in names]


def read_folder(path: Path, limit: int | None) -> tuple[str, list[Piece]]:
    """Every score in a folder, in the order of their names."""
    if not path.is_dir():
        raise Failure(f"{path}: expected a JSON file or a folder with scores, found neither")
    harness.need("music21", "--data with a folder")
    from music21 import converter

    pieces = []
    for file in sorted(path.iterdir())[:limit]:
        if file.suffix.lower() in SUFFIXES:
            try:
                pieces.append(quantised(converter.parse(file, forceSource=True)))
            except Exception as error:  # whatever music21 and its parsers raise for a file that is none
                raise Failure(f"{file}: expected a score that music21 can read, got: {error}") from error
    return path.name, pieces


def quantised(score: Any) -> Piece:
    """What sounds at every quarter note of a score of music21; pitches beyond a piano are left out."""
    roll = np.zeros((max(1, int(np.ceil(float(score.highestTime)))), KEYS), bool)
    for note in score.flatten().notes:
        begin, end = (int(np.ceil(float(time))) for time in (note.offset, note.offset + note.quarterLength))
        keys = np.array([pitch.midi - LOWEST for pitch in note.pitches], np.intp)
        roll[begin:end, keys[(keys >= 0) & (keys < KEYS)]] = True
    return roll


def as_batch(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps before, x [T, B, 88], steps to predict, y [T, B, 88], and lengths [B]; x begins with silence."""
    lengths = np.array([len(piece) for piece in pieces])
    y = np.zeros((lengths.max(), len(pieces), KEYS), np.float32)
    for b, piece in enumerate(pieces):
        y[: len(piece), b] = piece
    x = np.zeros_like(y)
    x[1:] = y[:-1]
    return x, y, lengths


def transposed(piece: Piece, semitones: int) -> Piece:
    """The piece higher or lower; as it is where a note would leave the piano."""
    keys = np.flatnonzero(piece.any(axis=0)) + semitones
    return np.roll(piece, semitones, axis=1) if len(keys) and min(keys) >= 0 and max(keys) < KEYS else piece


# The model -----------------------------------------------------------------------------------------------------------


class MusicModel(harness.Chain):
    """Recurrent layers, dropout, Linear: steps x [T, B, 88] to logits [T, B, 88] of the steps that follow."""

    def forward(self, x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        recurrent, dropout, head = self.layers
        output, _ = recurrent(x, lengths=lengths)
        return head(dropout(output))

    def backward(self, grad_logits: np.ndarray) -> None:
        self.layers.backward(grad_logits, need_grad_x=False)


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[MusicModel, rnnfast.optim.Optimizer]:
    seeds = harness.seeds(settings.seed, 3)
    between = settings.dropout if settings.layers > 1 else 0.0
    recurrent = CELLS[settings.cell](
        KEYS, settings.hidden, settings.layers, dropout=between, device=device, seed=seeds[0]
    )
    head = rnnfast.Linear(settings.hidden, KEYS, device=device, seed=seeds[1])
    model = MusicModel(rnnfast.Sequential(recurrent, rnnfast.Dropout(settings.dropout, seed=seeds[2]), head))
    return model, rnnfast.optim.RMSprop(model.parameters(), lr=settings.lr)


def nats_and_gradient(logits: np.ndarray, y: np.ndarray, lengths: np.ndarray) -> tuple[float, np.ndarray]:
    """Nats a step, over all steps of the batch, and the gradient."""
    mask = np.arange(len(y))[:, None] < lengths  # [T, B]
    loss, grad = rnnfast.bce_with_logits(logits, y, mask=mask, reduction="sum")
    return float(loss) / lengths.sum(), grad / np.float32(lengths.sum())


def nats_per_step(model: MusicModel, pieces: list[Piece]) -> float:
    x, y, lengths = as_batch(pieces)
    return float(nats_and_gradient(model(x, lengths), y, lengths)[0])


# Training ------------------------------------------------------------------------------------------------------------


class Composing(harness.Task):
    """Predict the keys of the next step."""

    unit = "nats/step"
    items = "steps"

    def __init__(self, music: Music) -> None:
        self.parts = music.parts

    def batches(self, run: Run) -> Iterator[list[Piece]]:
        pieces, most = self.parts["train"], run.settings.transpose
        for chosen in harness.shuffled_batches(run, len(pieces), run.settings.batch):
            random = np.random.default_rng([run.settings.seed, run.step, 1])
            shifts = random.integers(-most, most + 1, len(chosen))
            yield [transposed(pieces[i], int(shift)) for i, shift in zip(chosen, shifts, strict=True)]

    def learn(self, run: Run, batch: list[Piece], rate: float) -> Step:
        """One step, with noise on the weights while the gradient is computed (Graves 2011)."""
        x, y, lengths = as_batch(batch)
        weights = [(parameter, parameter.data.copy()) for parameter in run.optimizer.parameters]
        random = np.random.default_rng([run.settings.seed, run.step, 2])
        for parameter, clean in weights if run.settings.noise else []:
            parameter.data += run.settings.noise * random.standard_normal(clean.shape, np.float32)
        loss, grad = nats_and_gradient(run.model(x, lengths), y, lengths)
        run.model.backward(grad)
        for parameter, clean in weights:
            parameter.data[...] = clean
        return Step(loss, harness.descend(run, rate, run.settings.clip), int(lengths.sum()))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share) if run.settings.schedule == "cosine" else run.settings.lr

    def validate(self, run: Run) -> float:
        return nats_per_step(run.model, self.parts["valid"])

    def test(self, run: Run) -> float:
        return nats_per_step(run.model, self.parts["test"])

    def example(self, run: Run) -> str:
        return " | ".join(spell(step) for step in compose(run, 4, 4, temperature=0.5, seed=0))


# Composing -----------------------------------------------------------------------------------------------------------


def compose(run: Run, length: int, voices: int, temperature: float, seed: int) -> Piece:
    """A piece [T, 88]: the model's own notes are its next input, a stream keeps the state in between.

    As many keys as there are voices are drawn one after another, without putting back, by their odds to the power of
    1 / temperature (which is what Gumbel noise on the logits does); 0 takes the likeliest. Keys drawn independently, as
    the model's likelihood has them, would be too many in one step and none in the next.
    """
    recurrent, _, head = run.model.layers
    random = np.random.default_rng(seed)
    roll = np.zeros((length, KEYS), bool)
    step = np.zeros((1, KEYS), np.float32)
    with recurrent.stream(batch_size=1) as stream:
        for t in range(length):
            logits = head(stream.step(step))[0].astype(np.float64)
            if temperature > 0.0:
                logits += temperature * random.gumbel(size=KEYS)
            roll[t, np.argsort(-logits, kind="stable")[:voices]] = True
            step[0] = roll[t]
    return roll


def name_of(pitch: int) -> str:
    return f"{NAMES[pitch % 12]}{pitch // 12 - 1}"


def spell(step: np.ndarray) -> str:
    """The notes of a step, low to high."""
    return " ".join(name_of(LOWEST + int(key)) for key in np.flatnonzero(step)) or "-"


def write_midi(roll: Piece, path: Path, beats_per_minute: int = 80) -> None:
    """A MIDI file with a track; a note that goes on is held."""
    import mido

    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(beats_per_minute))])
    file = mido.MidiFile(tracks=[track])
    silence = np.zeros((1, KEYS), np.int8)
    changes = np.diff(np.concatenate([silence, roll, silence]).astype(np.int8), axis=0)
    waited = 0
    for change in changes:
        for kind, sign in (("note_off", -1), ("note_on", 1)):
            for key in np.flatnonzero(change == sign):
                track.append(mido.Message(kind, note=int(LOWEST + key), velocity=64, time=waited))
                waited = 0
        waited += file.ticks_per_beat
    try:
        file.save(path)
    except OSError as error:
        raise harness.not_written("--midi", path, error) from error


def keys_to_show(roll: Piece) -> tuple[int, int]:
    """The first key that sounds and the end of those that do, with one more on each side, as far as there are keys."""
    used = np.flatnonzero(roll.any(axis=0))
    return (max(int(used[0]) - 1, 0), min(int(used[-1]) + 2, KEYS)) if len(used) else (0, KEYS)


def plot_rolls(run: Run, roll: Piece, path: Path) -> None:
    """What was composed, as a piano roll, and below it how likely the model held each key."""
    x, _, lengths = as_batch([roll])
    probability = 1.0 / (1.0 + np.exp(-np.clip(run.model(x, lengths)[:, 0], -50.0, 50.0)))  # [T, 88]
    low, high = keys_to_show(roll | (probability > 0.1))
    figure = harness.new_figure(10.0, 7.0)
    axes = figure.subplots(2, sharex=True)
    for panel, content, title in zip(axes, (roll, probability), ("composed", "probability before it"), strict=True):
        extent = (0, len(roll), LOWEST + low - 0.5, LOWEST + high - 0.5)
        panel.imshow(content.T[low:high], origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent)
        ticks = [pitch for pitch in range(LOWEST + low, LOWEST + high) if pitch % 12 in (0, 7)]
        panel.set_yticks(ticks, [name_of(pitch) for pitch in ticks])
        panel.set_title(title, loc="left")
    axes[1].set_xlabel("step (quarter note)")
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------


def describe(run: Run, music: Music) -> str:
    counts = [f"{len(pieces)} ({harness.counted(sum(map(len, pieces)), 'steps')})" for pieces in music.parts.values()]
    size = harness.count_parameters(run.model)
    return (
        f"{music.name}: {' + '.join(counts)} pieces to train, validate and test\n"
        f"{run.model.layers[0]}, {size:,} parameters"
    )


SCRIPT = harness.Example("music", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option(
    "--data", type=harness.FILE, help="JSON of the JSB chorales, or a folder with scores. Default: music21's."
)
@click.option("--limit", type=click.IntRange(5), help="Use only that many pieces (of JSON: in each part).")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    harness.LAYERS,
    harness.DROPOUT,
    ("--noise", Number(0.0, 1e9), "Deviation of the noise on the weights."),
    ("--transpose", click.IntRange(0, 24), "Train on pieces up to that many semitones higher or lower."),
    harness.BATCH,
    harness.LR,
    ("--schedule", click.Choice(("cosine", "constant")), "How the learning rate goes on."),
    harness.CLIP,
)
@harness.run_options("the piano roll of what was composed")
@click.option(
    "--generate", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Steps to compose at the end."
)
@click.option("--voices", type=click.IntRange(1, KEYS), default=4, show_default=True, help="Keys of a step.")
@click.option("--temperature", type=Number(0.0, 1e9), default=0.5, show_default=True, help="0: the likeliest.")
@click.option("--sample-seed", type=harness.SEED, default=0, show_default=True, help="Another piece.")
@click.option("--midi", type=harness.FILE, help="Write what was composed as a MIDI file (needs mido).")
def main(**options: Any) -> None:
    """Train a network on polyphonic music, and let it compose."""
    harness.check_outputs(options, "midi")
    if options["midi"] is not None:
        harness.need("mido", "--midi")
    console = harness.make_console()
    run, music = harness.begin(SCRIPT, options)
    if music is None:
        console.print(f"{options['path']}: trained already", markup=False)
    else:
        console.print(describe(run, music), markup=False)
        harness.train_and_show(SCRIPT, run, Composing(music), console, options["minutes"], options["path"])
    run.model.eval()
    roll = compose(run, options["generate"], options["voices"], options["temperature"], options["sample_seed"])
    click.echo(" | ".join(spell(step) for step in roll[:8]))
    if options["midi"] is not None:
        write_midi(roll, options["midi"])
    if options["plot"] is not None:
        plot_rolls(run, roll, options["plot"])
    click.echo(harness.summary(run, Composing, f"test {run.test:.3f} nats per step"))


if __name__ == "__main__":
    main()
