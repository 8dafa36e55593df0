"""Speech recognition: a bidirectional network from rnnfast.torch, trained with CTC on recordings and what they say.

    python speech.py                                             # Debian's recorded English prompts, if installed
    python speech.py --data prompts/ --transcripts prompts.txt --plot alignment.png --transcribe hello.wav
    python speech.py --data fsdd.tar.gz --unit recordings --split official  # spoken digits (FSDD)
    python speech.py --data fsdd.tar.gz --unit recordings --split nicolas   # … with this speaker left out

Recordings are WAV files in a folder or a .tar.gz, all of one sampling rate; transcripts are lines "name: text", and need
none where recordings are named as in the Free Spoken Digit Dataset (7_jackson_32.wav). What is no plain words, as
"[beep]" or "press 1", is left out, and so is what is longer than --longest.

The network hears log-mel energies or MFCCs of every 10 ms, some of which are stacked, and says at each of these steps
which symbol, a character or a word, is there, or none. CTC (Graves et al. 2006) sums over all alignments of a transcript.
Recognised is the likeliest symbol of each step, repetitions and nothings removed; no language model helps. With --unit
recordings, all that is said is one symbol, and the mean over a recording is the only step: CTC is then cross entropy.

Validation (a tenth, or a ninth of what a fixed test part leaves) alone chooses the weights and stops early: by the error
rate in per cent of its symbols, and of equally many errors by the lower loss. With --split random the test part has the
voices of the training part: where that is one voice, the figure says nothing about others. Symbols being characters, no
text is then in two parts.

Sizes in comments: N samples, T steps, B recordings of a batch, F features of a step, M mel bands, H hidden, V symbols.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import harness_torch
import numpy as np
from harness import Failure, Number, Run, Step
from harness_torch import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Settings:
    """What decides the weights, beside the recordings; kept in the file that a training is resumed from."""

    cell: str = "lstm"
    hidden: int = 128
    layers: int = 2
    dropout: float = 0.3
    features: str = "logmel"
    stack: int = 2
    unit: str = "characters"
    split: str = "random"
    longest: float = 5.0
    speeds: int = 3
    mask: float = 0.15
    batch: int = 16
    steps: int = 6000
    lr: float = 0.003
    clip: float = 5.0
    evaluate: int = 200
    patience: int = 15
    seed: int = 0


TINY = Settings(hidden=16, layers=1, speeds=1, batch=4, steps=30, evaluate=10)
SHOWN = 8  # recordings of the test part whose recognition is printed

# Recordings ----------------------------------------------------------------------------------------------------------

DEBIAN = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
DEBIAN_TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FSDD_NAME = re.compile(r"(?:.*/)?(?P<digit>\d)_(?P<speaker>[^_/]+)_(?P<index>\d+)")
FSDD_TEST = 5  # recordings of each speaker and digit that are the official test part


class Recording(NamedTuple):
    name: str
    text: str
    samples: np.ndarray  # [N], float32, -1 to 1


def read_wav(name: str, content: bytes) -> tuple[int, np.ndarray]:
    """Samples a second, and the samples [N] from -1 to 1; of several channels the mean."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        reason = str(error) or ("cut off" if content else "empty")
        raise Failure(f"{name}: expected a WAV file of PCM samples ({reason})") from error
    if width not in (1, 2, 4):
        raise Failure(f"{name}: expected samples of 8, 16 or 32 bits, got {8 * width}")
    frames = frames[: len(frames) // (width * channels) * (width * channels)]
    samples = np.frombuffer(frames, {1: "u1", 2: "<i2", 4: "<i4"}[width]).astype(np.float32)
    samples = (samples - 128.0 if width == 1 else samples) / 2.0 ** (8 * width - 1)
    return rate, samples.reshape(-1, channels).mean(axis=1)


def wav_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names without ".wav", and contents, of a folder's or an archive's WAV files, in the order of the names."""
    if path.is_dir():
        for file in sorted(path.rglob("*.wav")):
            yield file.relative_to(path).with_suffix("").as_posix(), harness.read_file(file)
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(harness.read_file(path))) as archive:
            members = [member for member in archive.getmembers() if member.isfile() and member.name.endswith(".wav")]
            for member in sorted(members, key=lambda member: member.name):
                content = archive.extractfile(member)
                yield member.name.removeprefix("./").removesuffix(".wav"), content.read() if content else b""
    except (tarfile.TarError, EOFError, OSError) as error:
        given = "a WAV file" if path.suffix.lower() == ".wav" else "something else, or a part of one"
        raise Failure(f"{path}: expected a folder or a .tar.gz of WAV files, got {given}") from error


def read_recordings(paths: Sequence[Path]) -> tuple[int, dict[str, np.ndarray]]:
    """The sampling rate of all, and the samples of each name."""
    rates: dict[int, str] = {}
    recordings = {}
    for path in paths:
        for name, content in wav_files(path):
            rate, recordings[name] = read_wav(f"{path}: {name}.wav", content)
            rates.setdefault(rate, name)
    if not recordings:
        raise Failure(f"{paths[0]}: expected WAV files, found none")
    if len(rates) > 1:
        (one, first), (other, second) = list(rates.items())[:2]
        raise Failure(f"{paths[0]}: expected one sampling rate, got {one} in {first} and {other} in {second}")
    return next(iter(rates)), recordings


def read_transcripts(path: Path) -> dict[str, str]:
    """What recordings say: lines "name: text" or "name<tab>text"; those that begin with a semicolon are comments."""
    if path.suffix == ".gz":
        try:
            lines = gzip.decompress(harness.read_file(path)).decode().splitlines()
        except (OSError, EOFError, ValueError) as error:
            raise Failure(f"{path}: expected compressed text in UTF-8 ({error})") from error
    else:
        lines = harness.read_text(path).splitlines()
    texts = {}
    for row, line in enumerate(lines, 1):
        name, separator, text = line.partition("\t" if "\t" in line else ":")
        if line.strip() and not line.startswith(";"):
            if not separator:
                raise Failure(f'{path}, line {row}: expected "name: text", got {line[:40]!r}')
            texts[name.strip().removesuffix(".wav")] = text.strip()
    return texts


def digit_names(names: Iterable[str]) -> dict[str, str]:
    """What the recordings of the Free Spoken Digit Dataset say."""
    matches = {name: FSDD_NAME.fullmatch(name) for name in names}
    return {name: DIGITS[int(match["digit"])] for name, match in matches.items() if match}


def plain_words(text: str) -> str:
    """In lower case, without punctuation; empty where anything else than words would have to be said."""
    words = " ".join(re.sub(r"[.,!?;:\"…-]", " ", text.lower()).split())
    return words if all(character.isalpha() or character in " '" for character in words) else ""


# Features ------------------------------------------------------------------------------------------------------------

MELS, COEFFICIENTS = 40, 13
WINDOW, HOP = 0.025, 0.010  # seconds
FEATURES = {"logmel": MELS, "mfcc": 3 * COEFFICIENTS}  # F of a step before stacking


def features_of(samples: np.ndarray, rate: int, kind: str) -> np.ndarray:
    """Samples [N] to [frames, F]; the loudness of the recording does not matter."""
    features = log_mel(samples, rate)
    features = features - features.mean()
    if kind == "logmel":
        return features
    cepstrum = features @ cosines().T
    return np.concatenate([cepstrum, slope(cepstrum), slope(slope(cepstrum))], axis=1)


def stack_frames(features: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """[frames, F] to steps [T, stack·F], float32, in deviations from the training part's means."""
    features = (features - info["mean"]) / info["deviation"]
    steps = -(-len(features) // info["stack"])
    features = np.pad(features, ((0, steps * info["stack"] - len(features)), (0, 0)))
    return features.reshape(steps, -1).astype(np.float32)


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray:
    """The logarithm of the energy in each mel band, [frames, M]: one frame every 10 ms, of 25 ms."""
    width, hop = round(WINDOW * rate), round(HOP * rate)
    samples = np.pad(samples, (0, max(0, width - len(samples))))
    frames = np.lib.stride_tricks.sliding_window_view(samples, width)[::hop] * np.hanning(width)
    spectrum = np.fft.rfft(frames, fft_size(rate))
    return np.log(np.abs(spectrum) ** 2 @ mel_filters(rate).T + 1e-6)


def fft_size(rate: int) -> int:
    return 1 << (round(WINDOW * rate) - 1).bit_length()


@cache
def mel_filters(rate: int) -> np.ndarray:
    """Triangles, equally wide on the mel scale, from 0 to half the rate: [M, bins]."""
    highest = 2595.0 * np.log10(1.0 + rate / 2.0 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, highest, MELS + 2) / 2595.0) - 1.0)
    low, centre, high = (edges[i : i + MELS, None] for i in range(3))
    bins = np.fft.rfftfreq(fft_size(rate), 1.0 / rate)
    return np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))


@cache
def cosines() -> np.ndarray:
    """The orthonormal DCT-II that makes cepstral coefficients of log-mel energies: [COEFFICIENTS, M]."""
    angles = np.pi / MELS * np.outer(np.arange(COEFFICIENTS), np.arange(MELS) + 0.5)
    return np.cos(angles) * np.sqrt(np.where(np.arange(COEFFICIENTS) == 0, 1.0, 2.0) / MELS)[:, None]


def slope(features: np.ndarray) -> np.ndarray:
    """How each feature changes, by a line fitted to five frames."""
    padded = np.pad(features, ((2, 2), (0, 0)), mode="edge")
    return (2.0 * (padded[4:] - padded[:-4]) + padded[3:-1] - padded[1:-3]) / 10.0


def faster(samples: np.ndarray, speed: float) -> np.ndarray:
    """The recording played faster (and higher)."""
    return np.interp(np.arange(0.0, len(samples) - 1, speed), np.arange(len(samples)), samples).astype(np.float32)


# The data ------------------------------------------------------------------------------------------------------------

Utterance = tuple[np.ndarray, str]  # features [T, F] and what was said


class Speech(NamedTuple):
    """What is trained on, validated with and tested on."""

    name: str
    digest: str
    info: dict[str, Any]  # rate, features, stack, unit, symbols; mean and deviation of the features [F]
    train: list[Utterance]
    valid: list[Utterance]
    test: list[Utterance]
    seconds: list[float]  # of the three parts
    skipped: int


def load(settings: Settings, options: dict[str, Any]) -> Speech:
    paths, transcripts = [Path(path) for path in options["data"] or ()], options.get("transcripts")
    if not paths:
        if not DEBIAN.is_dir():
            raise Failure(
                f"no recordings: {DEBIAN} is not there; apt install asterisk-core-sounds-en-wav (Debian, Ubuntu), or "
                "name a folder or .tar.gz of WAV files by --data, and their text by --transcripts"
            )
        paths, transcripts = [DEBIAN], transcripts or DEBIAN_TRANSCRIPTS
    rate, recordings = read_recordings(paths)
    texts = read_transcripts(transcripts) if transcripts else digit_names(recordings)
    if not texts.keys() & recordings.keys():
        example = next(iter(recordings))
        if not transcripts:
            raise Failure(f"{paths[0]}: expected names as 7_jackson_32.wav, got {example}; use --transcripts")
        named = repr(next(iter(texts))) if texts else "none"
        raise Failure(f"{transcripts}: expected names of recordings of {paths[0]}, such as {example!r}, got {named}")
    usable = [
        Recording(name, plain_words(texts.get(name, "")), samples)
        for name, samples in sorted(recordings.items())
        if len(samples) <= settings.longest * rate
    ]
    usable = [recording for recording in usable if recording.text and np.ptp(recording.samples) > 0.0]
    return prepare(paths[0].name, usable, rate, settings, len(recordings) - len(usable))


def prepare(name: str, recordings: list[Recording], rate: int, settings: Settings, skipped: int = 0) -> Speech:
    """Split, list the training part's symbols, compute features; the training part's also at other speeds."""
    if len(recordings) < 20:
        raise Failure(f"{name}: expected at least 20 recordings with plain words, got {len(recordings)}")
    first, *rest = parts = split(name, recordings, settings.split, settings.unit)
    symbols = sorted({symbol for recording in first for symbol in symbols_of(recording.text, settings.unit)})
    info = {"rate": rate, "features": settings.features, "stack": settings.stack, "unit": settings.unit}
    info["symbols"] = symbols
    heard = [at_speeds(first, settings.speeds), *rest]
    features = [[features_of(recording.samples, rate, settings.features) for recording in part] for part in heard]
    frames = np.concatenate(features[0])
    info |= {"mean": frames.mean(axis=0).tolist(), "deviation": (frames.std(axis=0) + 1e-3).tolist()}
    train, valid, test = [
        [(stack_frames(x, info), recording.text) for x, recording in zip(*pair, strict=True)]
        for pair in zip(features, heard, strict=True)
    ]
    train = [(x, text) for x, text in train if len(x) >= steps_needed(symbols_of(text, settings.unit))]
    seconds = [sum(len(recording.samples) for recording in part) / rate for part in parts]
    digest = harness.digest_of(*(part for recording in recordings for part in (recording.text, recording.samples)))
    return Speech(name, digest, info, train, valid, test, seconds, skipped)


def at_speeds(recordings: list[Recording], count: int) -> list[Recording]:
    """The recordings at `count` speeds from 0.9 to 1.1, or as they are."""
    speeds = np.linspace(0.9, 1.1, count) if count > 1 else [1.0]
    return [
        recording if speed == 1.0 else recording._replace(samples=faster(recording.samples, speed))
        for speed in speeds
        for recording in recordings
    ]


def split(name: str, recordings: list[Recording], how: str, unit: str) -> list[list[Recording]]:
    """Training, validation and test part: at random, FSDD's official one, or all of one speaker as the test."""
    shuffled = [recordings[i] for i in np.random.default_rng(0).permutation(len(recordings))]
    if how == "random":
        test, left = cut(shuffled, len(shuffled) // 10, unit)
        valid, train = cut(left, -(-len(left) // 9), unit)
        if not train:
            texts = len({recording.text for recording in recordings})
            raise Failure(
                f"{name}: expected more than {texts} different texts to spell; use --unit words or recordings"
            )
        return [train, valid, test]
    matches = [FSDD_NAME.fullmatch(recording.name) for recording in shuffled]
    pairs = [(match, recording) for match, recording in zip(matches, shuffled, strict=True) if match]
    chosen = [int(m["index"]) < FSDD_TEST if how == "official" else m["speaker"] == how for m, _ in pairs]
    if not any(chosen) or all(chosen) or len(pairs) < len(shuffled):
        speakers = ", ".join(sorted({match["speaker"] for match, _ in pairs})) or "none"
        raise Failure(f"--split {how}: expected names as 7_jackson_32.wav, speakers in {name}: {speakers}")
    test, left = ([r for (_, r), c in zip(pairs, chosen, strict=True) if c == part] for part in (True, False))
    count = -(-len(left) // 9)
    return [left[count:], left[:count], test]


def cut(recordings: list[Recording], count: int, unit: str) -> list[list[Recording]]:
    """The first `count` recordings and the others; with characters for symbols, no text is on both sides."""
    first, others = recordings[:count], recordings[count:]
    texts = {recording.text for recording in first} if unit == "characters" else set()
    same = [recording for recording in others if recording.text in texts]
    return [first + same, [recording for recording in others if recording.text not in texts]]


def symbols_of(text: str, unit: str) -> list[str]:
    return {"characters": list(text), "words": text.split(), "recordings": [text]}[unit]


def steps_needed(symbols: list[str]) -> int:
    """The least steps that CTC can say them in: between two that are the same there is a nothing."""
    return len(symbols) + sum(a == b for a, b in pairwise(symbols))


# The model -----------------------------------------------------------------------------------------------------------

NOTHING = 0  # CTC's blank; then the symbols


class Recogniser(nn.Module):
    """Features [T, B, F] and lengths [B] to log-probabilities of nothing and every symbol, [T, B, 1 + V], and lengths.

    T is 1 where a whole recording is one symbol.
    """

    def __init__(self, settings: Settings, features: int, symbols: int) -> None:
        super().__init__()
        layer, between = harness_torch.CELLS[settings.cell], settings.dropout if settings.layers > 1 else 0.0
        self.recurrent = layer(features, settings.hidden, settings.layers, dropout=between, bidirectional=True)
        self.dropout = nn.Dropout(settings.dropout)
        self.whole = settings.unit == "recordings"
        self.head = nn.Linear(2 * settings.hidden, 1 + symbols)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, _ = self.recurrent(x, lengths=lengths)  # zero past a recording's end
        if self.whole:
            output = output.sum(0, keepdim=True) / lengths.to(output.device)[:, None]
            lengths = torch.ones_like(lengths)
        return self.head(self.dropout(output)).log_softmax(2), lengths


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Recogniser, torch.optim.Optimizer]:
    harness_torch.begin_model(settings.seed, device)
    model = Recogniser(settings, FEATURES[info["features"]] * info["stack"], len(info["symbols"])).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=settings.lr)


def pad(features: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of several recordings side by side, [T, B, F], and their lengths [B], of the host."""
    lengths = torch.tensor([len(x) for x in features])
    return nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in features]).to(device), lengths


@torch.no_grad()
def recognise(run: Run, features: list[np.ndarray]) -> list[list[str]]:
    """The symbols of each recording; for a model in eval mode."""
    device, result = str(run.model.head.weight.device), []
    for first in range(0, len(features), 64):
        x, lengths = pad(features[first : first + 64], device)
        likely, lengths = run.model(x, lengths)
        best = likely.argmax(2).T.cpu()  # [B, T]
        result += [collapse(codes[:length], run.info["symbols"]) for codes, length in zip(best, lengths, strict=True)]
    return result


def collapse(codes: torch.Tensor, symbols: list[str]) -> list[str]:
    """The symbols of an alignment [T]: repetitions are one, and nothings nothing."""
    return [symbols[code - 1] for code in torch.unique_consecutive(codes).tolist() if code != NOTHING]


def edits(said: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest insertions, deletions and substitutions that make one of the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, symbol in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (symbol != other))
    return row[-1]


# Training ------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    x: torch.Tensor  # [T, B, F]
    lengths: torch.Tensor  # [B], of the host
    wanted: torch.Tensor  # the codes of all transcripts in a row
    sizes: torch.Tensor  # [B], of the transcripts


class Recognising(harness.Task):
    """Say what a recording says."""

    unit = "nats/symbol"
    valid_unit = "% wrong"
    items = "steps"

    def __init__(self, speech: Speech, device: str = "cpu") -> None:
        self.speech, self.device = speech, device
        self.codes = {symbol: code for code, symbol in enumerate(speech.info["symbols"], 1)}

    def batches(self, run: Run) -> Iterator[Batch]:
        for chosen in harness.shuffled_batches(run, len(self.speech.train), run.settings.batch):
            random = np.random.default_rng([run.settings.seed, run.step])
            part = [self.speech.train[i] for i in chosen]
            yield self.batch([(hide(x, run.settings, random), text) for x, text in part])

    def batch(self, part: list[Utterance]) -> Batch:
        x, lengths = pad([x for x, _ in part], self.device)
        texts = [symbols_of(text, self.speech.info["unit"]) for _, text in part]
        codes = [[self.codes[symbol] for symbol in symbols if symbol in self.codes] for symbols in texts]
        wanted = torch.tensor([code for row in codes for code in row], device=self.device)
        return Batch(x, lengths, wanted, torch.tensor([len(row) for row in codes]))

    def loss(self, run: Run, batch: Batch) -> torch.Tensor:
        """CTC, in nats per symbol; what cannot be said in so few steps does not count."""
        likely, lengths = run.model(batch.x, batch.lengths)
        total = functional.ctc_loss(
            likely, batch.wanted, lengths, batch.sizes, NOTHING, reduction="sum", zero_infinity=True
        )
        return total / batch.sizes.sum()

    def learn(self, run: Run, batch: Batch, rate: float) -> Step:
        loss = self.loss(run, batch)
        norm = harness_torch.descend(run, loss, rate, run.settings.clip)
        return Step(loss.item(), norm, int(batch.lengths.sum()))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    @torch.no_grad()
    def validate(self, run: Run) -> float:
        """Errors in per cent of the symbols."""
        wrong, symbols = self.errors(run, self.speech.valid, self.speech.info["unit"])
        return 100.0 * wrong / symbols

    @torch.no_grad()
    def score(self, run: Run, valid: float) -> float:
        """The loss, squeezed into the size of one error, decides between equally many errors."""
        parts, unit = self.speech.valid, self.speech.info["unit"]
        batches = [self.batch(parts[first : first + 64]) for first in range(0, len(parts), 64)]
        loss = sum(float(self.loss(run, batch)) for batch in batches) / len(batches)
        return valid + 100.0 * loss / (1.0 + loss) / sum(len(symbols_of(text, unit)) for _, text in parts)

    def errors(self, run: Run, utterances: list[Utterance], unit: str) -> tuple[int, int]:
        """Edits between what is said and what is recognised, in characters or words, and how many were said."""
        pairs = zip(utterances, self.texts(run, utterances), strict=True)
        said_heard = [(symbols_of(said, unit), symbols_of(heard, unit)) for (_, said), heard in pairs]
        return sum(edits(*pair) for pair in said_heard), sum(len(said) for said, _ in said_heard)

    def texts(self, run: Run, utterances: list[Utterance]) -> list[str]:
        return [spell(symbols, run.info["unit"]) for symbols in recognise(run, [x for x, _ in utterances])]

    def test(self, run: Run) -> dict[str, float]:
        """Error rates of characters and words, and the share of recordings without any error."""
        test = self.speech.test
        characters, words = (self.errors(run, test, unit) for unit in ("characters", "words"))
        heard = self.texts(run, test)
        run.notes["shown"] = [[said, text] for (_, said), text in zip(test, heard, strict=True)][:SHOWN]
        longest = max(test, key=lambda utterance: len(utterance[1]) if len(utterance[0]) <= 100 else 0)
        run.notes["plotted"] = [torch.from_numpy(longest[0]), longest[1]]
        exact = sum(said == text for (_, said), text in zip(test, heard, strict=True)) / len(test)
        return {"cer": characters[0] / characters[1], "wer": words[0] / words[1], "exact": exact}

    def example(self, run: Run) -> str:
        return f"{self.speech.valid[0][1]} → {self.texts(run, self.speech.valid[:1])[0]}"


def spell(symbols: list[str], unit: str) -> str:
    """Recognised symbols as a text."""
    return " ".join(("" if unit == "characters" else " ").join(symbols).split())


def hide(x: np.ndarray, settings: Settings, random: np.random.Generator) -> np.ndarray:
    """SpecAugment (Park et al. 2019): twice, a share of up to `mask` of the steps and of the features is the mean."""
    if settings.mask == 0.0:
        return x
    x = x.reshape(len(x), settings.stack, -1).copy()  # [T, stack, F]
    for _ in range(2):
        for axis in (0, 2):
            size = random.integers(int(settings.mask * x.shape[axis]) + 1)
            start = random.integers(x.shape[axis] - size + 1)
            x[(slice(None),) * axis + (slice(start, start + size),)] = 0.0
    return x.reshape(len(x), -1)


# What is shown -------------------------------------------------------------------------------------------------------


def describe(run: Run, speech: Speech) -> str:
    settings, size = run.settings, harness_torch.count_parameters(run.model)
    parts = " + ".join(f"{len(part):,}" for part in (speech.train, speech.valid, speech.test))
    minutes = " + ".join(f"{seconds / 60:.1f}" for seconds in speech.seconds)
    speeds = f", training at {settings.speeds} speeds" if settings.speeds > 1 else ""
    voices = "the voices of the training part" if settings.split == "random" else settings.split
    return (
        f"{speech.name}: {parts} recordings to train, validate and test, {minutes} minutes{speeds}; "
        f"{speech.skipped:,} left out; tested: {voices}\n"
        f"{run.model.recurrent}, {size:,} parameters, {len(run.info['symbols'])} symbols ({settings.unit}), "
        f"{harness.counted(settings.steps, 'steps')} "
        f"({settings.steps * settings.batch / len(speech.train):.1f} times the recordings)"
    )


def show(run: Run, asked: Sequence[tuple[Path, np.ndarray]]) -> None:
    """Some recordings of the test part, and the files that were asked for, with their features."""
    width = max(len(said) for said, _ in run.notes["shown"])
    for said, heard in run.notes["shown"]:
        click.echo(f"  {said:{width}} → {heard}")
    for file, x in asked:
        click.echo(f"{file} → {spell(recognise(run, [x])[0], run.info['unit'])}")


def read_features(run: Run, file: Path) -> np.ndarray:
    """The features [T, F] of a WAV file that is like those of the training."""
    rate, samples = read_wav(str(file), harness.read_file(file))
    if rate != run.info["rate"]:
        raise Failure(f"{file}: expected {run.info['rate']} samples a second, as in the training, got {rate}")
    if len(samples) == 0:
        raise Failure(f"{file}: expected a recording, got a WAV file without samples")
    return stack_frames(features_of(samples, rate, run.info["features"]), run.info)


@torch.no_grad()
def plot_alignment(run: Run, path: Path) -> None:
    """A test recording's features and which symbol is said when; and the learning curve."""
    x, said = run.notes["plotted"]
    symbols, stack = run.info["symbols"], run.info["stack"]
    likely, _ = run.model(x[:, None].to(run.model.head.weight.device), torch.tensor([len(x)]))
    likely = likely.exp()[:, 0].cpu().numpy()  # [T, 1 + V]
    figure = harness.new_figure(12.0, 6.0)
    axes = figure.subplot_mosaic([["heard", "curve"], ["said", "curve"]], width_ratios=(2, 1))
    bands = x.reshape(len(x) * stack, -1).numpy().T  # [F, frames]
    extent = (0.0, HOP * stack * len(x), -0.5, len(bands) - 0.5)
    axes["heard"].imshow(bands, origin="lower", aspect="auto", extent=extent, vmin=-3.0, vmax=3.0)
    axes["heard"].set(title=f'"{said}"', ylabel={"logmel": "mel band", "mfcc": "MFCC and slopes"}[run.info["features"]])
    draw_said(axes["said"], likely, ["nothing", *(symbol.replace(" ", "␣") for symbol in symbols)], HOP * stack)
    steps, _, valid = zip(*run.curve, strict=True)
    axes["curve"].plot(steps, valid, harness.MARKED)
    axes["curve"].set(xlabel="step", ylabel=f"validation: errors, % of the {run.settings.unit}", ylim=(0.0, None))
    axes["curve"].grid(alpha=0.3)
    harness.write_picture(figure, path)


def draw_said(axes: Any, likely: np.ndarray, symbols: list[str], step: float) -> None:
    """Probabilities [T, 1 + V]: of symbols that become likely, against time; of a whole recording, the likeliest."""
    if len(likely) == 1:
        best = np.argsort(-likely[0], kind="stable")[:10]
        axes.bar([symbols[code] for code in best], likely[0, best])
        axes.set(ylabel="probability", ylim=(0.0, 1.0))
        return
    seconds = step * (0.5 + np.arange(len(likely)))
    axes.plot(seconds, likely[:, NOTHING], color="lightgrey", label=symbols[NOTHING])
    for code in np.flatnonzero(likely[:, 1:].max(axis=0) > 0.2) + 1:
        (line,) = axes.plot(seconds, likely[:, code])
        rising = np.flatnonzero((likely[:, code] > 0.2) & (np.diff(likely[:, code], prepend=0.0) > 0.0))
        peaks = [t for t in rising if t + 1 == len(likely) or likely[t + 1, code] <= likely[t, code]]
        for t in peaks:
            axes.annotate(symbols[code], (seconds[t], likely[t, code]), color=line.get_color(), ha="center")
    axes.set(xlabel="seconds", ylabel="probability", ylim=(0.0, 1.15), xlim=(0.0, step * len(likely)))
    axes.legend(loc="upper right")


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("speech", Settings, TINY, load, build, harness_torch.TorchFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option(
    "--data",
    multiple=True,
    type=harness.FILE,
    help="WAV files: a folder or .tar.gz; may be given several times. Default: Debian's asterisk-core-sounds-en-wav.",
)
@click.option("--transcripts", type=harness.FILE, help='Lines "name: text", may be .gz. Default: by names as in FSDD.')
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    harness.LAYERS,
    harness.DROPOUT,
    ("--features", click.Choice(list(FEATURES)), "40 log-mel energies, or 13 MFCCs with two slopes."),
    ("--stack", click.IntRange(1), "Frames of 10 ms that are one step of the network."),
    ("--unit", click.Choice(["characters", "words", "recordings"]), "What is one symbol."),
    ("--split", str, "The test part: random, official (FSDD's), or a speaker's name (as in FSDD)."),
    ("--longest", harness.POSITIVE, "Leave out recordings of more seconds."),
    ("--speeds", click.IntRange(1), "Train at that many speeds from 0.9 to 1.1."),
    (
        "--mask",
        Number(0.0, 0.5),
        "Largest share of a recording's steps, or features, that SpecAugment hides.",
    ),
    ("--batch", click.IntRange(1), "Recordings side by side."),
    harness.LR,
    harness.CLIP,
)
@harness.run_options("an alignment and the learning curve")
@click.option(
    "--transcribe", "files", multiple=True, type=harness.FILE, help="At the end, say what this WAV file says."
)
def main(**options: Any) -> None:
    """Train a recogniser on recordings and their transcripts."""
    harness.check_outputs(options)
    console = harness.make_console()
    run, speech = harness.begin(SCRIPT, options)
    asked = [(file, read_features(run, file)) for file in options["files"]]  # refuse before the training
    if speech is None:
        console.print(f"{options['path']}: trained already", markup=False)
        run.model.eval()
    else:
        console.print(describe(run, speech), markup=False)
        task = Recognising(speech, options["device"])
        harness.train_and_show(SCRIPT, run, task, console, options["minutes"], options["path"])
    show(run, asked)
    if options["plot"] is not None:
        plot_alignment(run, options["plot"])
    test = run.test
    result = f"test: {100 * test['cer']:.1f} % of the characters wrong, {100 * test['wer']:.1f} % of the words"
    click.echo(harness.summary(run, Recognising, f"{result}; {100 * test['exact']:.1f} % exact"))


if __name__ == "__main__":
    main()
