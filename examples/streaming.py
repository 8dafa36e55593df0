"""A model that listens while the sound comes: one frame in, one answer out, microseconds each; NumPy and rnnfast alone.

    python streaming.py --plot keys.png                                  # learns telephone keys, then hears some
    python streaming.py --save keys.safetensors --resume --listen call.wav          # trained once, kept
    arecord -t raw -f S16_LE -r 8000 | python streaming.py --save keys.safetensors --resume --listen -
    python streaming.py --data FOLDER                                    # WAV files, LABEL_anything.wav, to learn instead

By default the sounds are made: pressed keys of a telephone, two tones each (ITU-T Q.23), in noise. A frame is the
logarithm of the power spectrum of the last 256 samples, a new one every 128 (at 8 kHz: of 32 ms, every 16 ms); the
answer is a probability for each label. Trained on whole sequences, the model then gets one frame after another from a
`stream`, which keeps its state. The script measures what a frame costs, from its samples to the answer, and checks that
the answers are those that the whole sequence gives at once.

Sizes in comments: T frames, B sequences, F frequencies, V labels, H hidden size.
"""

from __future__ import annotations

import io
import sys
import time
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import click
import harness
import numpy as np
from harness import CELLS, Failure, Run, Step

import rnnfast

HOP, WINDOW = 128, 256  # samples
FREQUENCIES = WINDOW // 2 + 1  # F
RATE = 8000  # samples a second of the made sounds
PARTS = ("train", "valid", "test")
QUIET = "-"  # the label of what is no key
KEYS = "123A456B789C*0#D"
TONES = (697, 770, 852, 941), (1209, 1336, 1477, 1633)  # Hz: a key's row and column
DIFFERENCE = 1e-4  # largest one between a stream's logits and those of the whole sequence


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the sounds."""

    cell: str = "gru"
    hidden: int = 64
    layers: int = 1
    dropout: float = 0.2
    batch: int = 16
    steps: int = 600
    lr: float = 0.01
    clip: float = 1.0
    evaluate: int = 50
    patience: int = 5
    seed: int = 0


TINY = Settings(hidden=16, batch=4, steps=30, evaluate=10)


# The sounds ----------------------------------------------------------------------------------------------------------


class Sound(NamedTuple):
    """Samples in [-1, 1] and a label for each frame."""

    samples: np.ndarray  # [N], float32
    labels: np.ndarray  # [T]


class Sounds(NamedTuple):
    """Sounds in three parts, and their frames."""

    name: str
    digest: str
    info: dict[str, Any]  # labels, rate, means and deviations of the frequencies
    parts: dict[str, list[Sound]]


def load(settings: Settings, options: dict[str, Any]) -> Sounds:
    """The WAV files of --data, or pressed keys."""
    counts = (6, 2, 2) if options["tiny"] else (300, 40, 40)
    if options["data"] is None:
        name, labels, rate = "telephone keys", [QUIET, *KEYS], RATE
        parts = {part: pressed_keys(settings.seed, p, n) for p, (part, n) in enumerate(zip(PARTS, counts, strict=True))}
    else:
        name, labels, rate, parts = read_folder(options["data"], sum(counts) if options["tiny"] else None)
    frames = np.concatenate([spectra(sound.samples) for sound in parts["train"]])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0) + 1e-3
    info = {"labels": labels, "rate": rate, "mean": mean.tolist(), "deviation": deviation.tolist()}
    digest = harness.digest_of(*(sound.samples for part in PARTS for sound in parts[part]))
    return Sounds(name, digest, info, parts)


def pressed_keys(seed: int, part: int, count: int, seconds: float = 3.0) -> list[Sound]:
    """Keys pressed for 60 to 250 ms with breaks between them, in noise of -5 to 20 dB."""
    random = np.random.default_rng([seed, part])
    return [press(random, int(seconds * RATE)) for _ in range(count)]


def press(random: np.random.Generator, length: int) -> Sound:
    samples, key_at = np.zeros(length), np.zeros(length, np.intp)  # 0: none
    place = int(random.uniform(0, 0.2) * RATE)
    while place < length:
        key, end = int(random.integers(len(KEYS))), place + int(random.uniform(0.06, 0.25) * RATE)
        seconds = np.arange(len(samples[place:end])) / RATE
        for tone in (TONES[0][key // 4], TONES[1][key % 4]):
            samples[place:end] += np.sin(2 * np.pi * tone * seconds + random.uniform(0, 2 * np.pi))
        key_at[place:end] = key + 1
        place = end + int(random.uniform(0.05, 0.3) * RATE)
    noise = random.standard_normal(length) * 10 ** (-random.uniform(-5, 20) / 20)
    samples = (samples + noise) * 10 ** random.uniform(-2.0, -0.8)
    middles = np.arange(length // HOP) * HOP + HOP - WINDOW // 2  # of the frames' windows
    return Sound(np.clip(samples, -1, 1).astype(np.float32), key_at[np.maximum(middles, 0)])


def read_folder(path: Path, limit: int | None) -> tuple[str, list[str], int, dict[str, list[Sound]]]:
    """Name, labels, samples a second, and the sounds: of every ten files one validates and one tests."""
    if not path.is_dir():
        raise Failure(f"--data {path}: expected a folder, got {'a file' if path.exists() else 'nothing of that name'}")
    files = sorted(path.glob("*.wav"))
    for file in files:
        if not file.name.partition("_")[1]:
            raise Failure(f"--data {path}: expected files named LABEL_anything.wav, got {file.name}")
    labels = sorted({file.name.partition("_")[0] for file in files})
    if len(files) < 10 or not 2 <= len(labels) < len(files):
        found = f"{harness.counted(len(files), 'files')} with {harness.counted(len(labels), 'labels')}"
        wanted = "10 or more WAV files, LABEL_anything.wav, with two or more labels, not each with its own"
        raise Failure(f"--data {path}: expected {wanted}, got {found}")
    files = files[:: max(1, len(files) // limit)] if limit else files
    parts: dict[str, list[Sound]] = {part: [] for part in PARTS}
    rates = {}
    for i, file in enumerate(files):
        with io.BytesIO(harness.read_file(file)) as content:
            samples, rates[file.name] = read_wave(content, str(file))
        label = labels.index(file.name.partition("_")[0])
        part = {0: "test", 1: "valid"}.get(i % 10, "train")
        parts[part].append(Sound(samples, np.full(len(samples) // HOP, label)))
    if len(set(rates.values())) > 1:
        raise Failure(f"{path}: expected one sample rate, got {sorted(set(rates.values()))}")
    return path.name, labels, next(iter(rates.values())), parts


def read_wave(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """Samples [N] in [-1, 1] and how many there are a second, of a WAV file of 16 bits; channels are averaged."""
    try:
        with wave.open(file) as sound:
            if sound.getsampwidth() != 2:
                raise Failure(f"{name}: expected 16 bits a sample, got {8 * sound.getsampwidth()}")
            content = sound.readframes(sound.getnframes())
            channels, rate = sound.getnchannels(), sound.getframerate()
    except (wave.Error, EOFError) as error:
        raise Failure(
            f"{name}: expected a WAV file (PCM), got: {str(error) or 'an empty or truncated file'}"
        ) from error
    samples = np.frombuffer(content[: len(content) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    if len(samples) < HOP:
        raise Failure(f"{name}: expected at least {HOP} samples, got {len(samples)}")
    return (samples.mean(axis=1) / 32768).astype(np.float32), rate


# Frames --------------------------------------------------------------------------------------------------------------

HANN = np.hanning(WINDOW).astype(np.float32)


def spectra(samples: np.ndarray) -> np.ndarray:
    """All frames [T, F] of a sound; before its first sample there is silence."""
    padded = np.concatenate([np.zeros(WINDOW - HOP, np.float32), samples])
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(samples) // HOP]
    return spectrum(windows)


def spectrum(windows: np.ndarray) -> np.ndarray:
    """Windows [..., WINDOW] of samples to the logarithms of their power spectra [..., F]."""
    return np.log(np.abs(np.fft.rfft(windows * HANN)) ** 2 + 1e-6).astype(np.float32)


def scaled(frames: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    return (frames - np.array(info["mean"], np.float32)) / np.array(info["deviation"], np.float32)


# The model and its training ------------------------------------------------------------------------------------------


class Listener(harness.Chain):
    """Recurrent layers, dropout, Linear: frames x [T, B, F] to logits [T, B, V]."""

    def forward(self, x: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
        recurrent, dropout, head = self.layers
        output, _ = recurrent(x, lengths=lengths)
        return head(dropout(output))


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Listener, rnnfast.optim.Optimizer]:
    seeds = harness.seeds(settings.seed, 3)
    between = settings.dropout if settings.layers > 1 else 0.0
    recurrent = CELLS[settings.cell](
        FREQUENCIES, settings.hidden, settings.layers, dropout=between, device=device, seed=seeds[0]
    )
    head = rnnfast.Linear(settings.hidden, len(info["labels"]), device=device, seed=seeds[1])
    model = Listener(rnnfast.Sequential(recurrent, rnnfast.Dropout(settings.dropout, seed=seeds[2]), head))
    return model, rnnfast.optim.AdamW(model.parameters(), lr=settings.lr)


IGNORED = -100  # a label past the end of its sequence


class Listening(harness.Task):
    """Say what every frame belongs to."""

    unit = "nats/frame"
    items = "frames"

    def __init__(self, sounds: Sounds) -> None:
        self.frames = {
            part: [(scaled(spectra(sound.samples), sounds.info), sound.labels) for sound in sounds.parts[part]]
            for part in PARTS
        }

    def batch(self, part: str, chosen: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Frames x [T, B, F], labels [T, B] and lengths [B]."""
        rows = [self.frames[part][i] for i in chosen]
        lengths = np.array([len(labels) for _, labels in rows])
        x = np.zeros((lengths.max(), len(rows), FREQUENCIES), np.float32)
        wanted = np.full(x.shape[:2], IGNORED)
        for b, (frames, labels) in enumerate(rows):
            x[: len(frames), b], wanted[: len(frames), b] = frames, labels
        return x, wanted, lengths

    def batches(self, run: Run) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for chosen in harness.shuffled_batches(run, len(self.frames["train"]), run.settings.batch):
            yield self.batch("train", chosen)

    def learn(self, run: Run, batch: tuple[np.ndarray, np.ndarray, np.ndarray], rate: float) -> Step:
        x, wanted, lengths = batch
        loss, grad = rnnfast.cross_entropy(run.model(x, lengths), wanted, ignore_index=IGNORED)
        run.model.layers.backward(grad, need_grad_x=False)
        return Step(float(loss), harness.descend(run, rate, run.settings.clip), int(lengths.sum()))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    def logits(self, run: Run, part: str) -> tuple[np.ndarray, np.ndarray]:
        x, wanted, lengths = self.batch(part, range(len(self.frames[part])))
        return run.model(x, lengths), wanted

    def validate(self, run: Run) -> float:
        return float(rnnfast.cross_entropy(*self.logits(run, "valid"), ignore_index=IGNORED)[0])

    def test(self, run: Run) -> float:
        """The share of frames that are told right."""
        logits, wanted = self.logits(run, "test")
        return float((logits.argmax(axis=-1) == wanted)[wanted != IGNORED].mean())


# Listening -----------------------------------------------------------------------------------------------------------


class Heard(NamedTuple):
    """What came out of a stream."""

    samples: np.ndarray  # [N]
    logits: np.ndarray  # [T, V]
    seconds: np.ndarray  # [T], from a frame's samples to its logits


def listen(run: Run, chunks: Iterable[np.ndarray], tell: Any) -> Heard:
    """Feed chunks of HOP samples to the model as they come; `tell(label)` hears each label when it changes."""
    recurrent, _, head = run.model.layers
    mean, deviation = (np.array(run.info[name], np.float32) for name in ("mean", "deviation"))
    labels, last = run.info["labels"], ""
    window = np.zeros(WINDOW, np.float32)
    samples, logits, seconds = [], [], []
    with recurrent.stream(batch_size=1) as stream:
        for chunk in chunks:
            began = time.perf_counter()
            window[:-HOP], window[-HOP:] = window[HOP:].copy(), chunk
            frame = (spectrum(window[None]) - mean) / deviation  # [1, F]
            answer = head(stream.step(frame))[0]  # [V]
            label = labels[int(answer.argmax())]
            seconds.append(time.perf_counter() - began)
            samples.append(chunk)
            logits.append(answer)
            if label != last:
                tell(label)
            last = label
    if not samples:
        raise Failure(f"--listen: expected at least {HOP} samples, got fewer")
    return Heard(np.concatenate(samples), np.array(logits), np.array(seconds))


def check(run: Run, heard: Heard) -> float:
    """The largest difference between the stream's logits and those of the whole sequence at once."""
    whole = run.model(scaled(spectra(heard.samples), run.info)[:, None])[:, 0]
    difference = float(np.abs(whole - heard.logits).max())
    if not difference <= DIFFERENCE:
        raise Failure(f"the stream and the whole sequence differ by {difference:.2g}, more than {DIFFERENCE:g}")
    return difference


def chunks_of(path: str, info: dict[str, Any]) -> Iterable[np.ndarray]:
    """HOP samples after another, from a WAV file or, for "-", standard input; refuses at once what is no sound."""
    if path == "-":
        return chunks_of_input(sys.stdin.buffer, read_header(sys.stdin.buffer, info))
    with io.BytesIO(harness.read_file(Path(path))) as file:
        samples, rate = read_wave(file, path)
    check_rate(path, rate, info)
    return whole_chunks(samples)


def whole_chunks(samples: np.ndarray) -> np.ndarray:
    """Samples [N] to [T, HOP], without those that fill no chunk."""
    return samples[: len(samples) // HOP * HOP].reshape(-1, HOP)


def read_header(source: BinaryIO, info: dict[str, Any]) -> int:
    """The channels of standard input: WAV, or raw samples of 16 bits and one channel."""
    channels, begin = 1, getattr(source, "peek", lambda n: b"RAW")(4)[:4]
    if not begin:
        raise Failure("standard input: expected WAV or raw samples, got nothing")
    if begin == b"RIFF":
        try:
            header = wave.open(source)  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise Failure(f"standard input: expected WAV or raw samples, got: {str(error) or 'its end'}") from error
        check_rate("standard input", header.getframerate(), info)
        if (channels := header.getnchannels()) < 1 or header.getsampwidth() != 2:
            raise Failure(f"standard input: expected 16 bits a sample, got {8 * header.getsampwidth()}")
    return channels


def chunks_of_input(source: BinaryIO, channels: int) -> Iterator[np.ndarray]:
    while len(content := source.read(2 * channels * HOP)) == 2 * channels * HOP:
        yield (np.frombuffer(content, "<i2").reshape(-1, channels).mean(axis=1) / 32768).astype(np.float32)


def check_rate(name: str, rate: int, info: dict[str, Any]) -> None:
    if rate != info["rate"]:
        raise Failure(f"{name}: expected {info['rate']} samples a second, as the model was trained with, got {rate}")


def chunks_to_hear(run: Run, sounds: Sounds | None, options: dict[str, Any]) -> Iterable[np.ndarray]:
    """What --listen names; else keys, or a sound of the test part of --data, whatever the model has learnt."""
    if options["source"] is not None:
        return chunks_of(options["source"], run.info)
    if run.info["labels"] == [QUIET, *KEYS]:
        return example_sound(run)
    if options["data"] is None:  # of a finished training, which needs none
        labels = ", ".join(run.info["labels"])
        raise Failure(f"--listen: expected a WAV file or -, or --data as in the training, of {labels}; got neither")
    sounds = load(run.settings, options) if sounds is None else sounds
    return whole_chunks(sounds.parts["test"][0].samples)


def example_sound(run: Run) -> np.ndarray:
    """Sounds that the model has not heard: samples [T, HOP]."""
    return whole_chunks(pressed_keys(run.settings.seed, len(PARTS), 1, seconds=10.0)[0].samples)


# What is shown -------------------------------------------------------------------------------------------------------


def describe(run: Run, sounds: Sounds) -> str:
    counts = [f"{sum(len(sound.labels) for sound in sounds.parts[part]):,}" for part in PARTS]
    labels = len(sounds.info["labels"])
    return (
        f"{sounds.name}: {' + '.join(counts)} frames of {frame_time(run)} to train, validate and test, {labels} labels\n"
        f"{run.model.layers[0]}, {harness.count_parameters(run.model):,} parameters"
    )


def frame_time(run: Run) -> str:
    return f"{1e3 * HOP / run.info['rate']:.3g} ms"


def tell(label: str) -> None:
    """Print what is heard when it begins; labels stand apart."""
    if label != QUIET:
        click.echo(f"{label} ", nl=False)


def latency(run: Run, heard: Heard, difference: float) -> str:
    p50, p99 = 1e6 * np.percentile(heard.seconds, (50, 99))
    return (
        f"{harness.counted(len(heard.logits), 'frames')} of {frame_time(run)}, "
        f"from samples to answer: p50 {p50:.0f} µs, p99 {p99:.0f} µs; "
        f"as the whole sequence at once to {difference:.1e}"
    )


def plot_heard(run: Run, heard: Heard, path: Path) -> None:
    """The spectrogram, and below it the probability of each label."""
    logits = heard.logits - heard.logits.max(axis=1, keepdims=True)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)  # [T, V]
    figure = harness.new_figure(11.0, 6.0)
    axes = figure.subplots(2, sharex=True)
    seconds, labels = len(logits) * HOP / run.info["rate"], run.info["labels"]
    extent = (0.0, seconds, 0.0, run.info["rate"] / 2000)
    axes[0].imshow(spectra(heard.samples).T, origin="lower", aspect="auto", extent=extent)
    axes[0].set(ylabel="kHz", title="heard")
    extent = (0.0, seconds, -0.5, len(labels) - 0.5)
    axes[1].imshow(probability.T, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent)
    axes[1].set(xlabel="seconds", title="probability of each label")
    axes[1].set_yticks(range(len(labels)), labels)
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("streaming", Settings, TINY, load, build, harness.ChainFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option("--data", type=harness.FILE, help="A folder of WAV files, LABEL_anything.wav. Default: telephone keys.")
@harness.settings_options(
    Settings, harness.CELL, harness.HIDDEN, harness.LAYERS, harness.DROPOUT, harness.BATCH, harness.LR, harness.CLIP
)
@harness.run_options("what was heard")
@click.option("--listen", "source", help="A WAV file, or - for standard input. Default: a test sound.")
def main(**options: Any) -> None:
    """Train a model to tell sounds, and let it listen frame by frame."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, sounds = harness.begin(SCRIPT, options)
    chunks = chunks_to_hear(run, sounds, options)  # refuse before the training
    if sounds is None:
        console.print(f"{options['path']}: trained already", markup=False)
    else:
        console.print(describe(run, sounds), markup=False)
        harness.train_and_show(SCRIPT, run, Listening(sounds), console, options["minutes"], options["path"])
    run.model.eval()
    heard = listen(run, chunks, tell)
    click.echo()
    difference = check(run, heard)
    if options["plot"] is not None:
        plot_heard(run, heard, options["plot"])
    click.echo(latency(run, heard, difference))
    click.echo(harness.summary(run, Listening, f"test {100 * run.test:.2f} % of the frames right"))


if __name__ == "__main__":
    main()
