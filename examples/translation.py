"""Translation by an encoder and a decoder with attention, built from rnnfast.torch.

    python translation.py                                        # dates of many languages to ISO dates (Babel)
    python translation.py --translate "12. maaliskuuta 1987" --plot attention.png
    python translation.py --data verses.tsv.gz --columns 5,4 --unit subwords --longest 24 --hidden 256 --dropout 0.4

A bidirectional encoder reads the source. The decoder has two recurrent layers, with attention between them: the first
reads what was translated so far and looks up a place in the source, the second sees what was found there, now and
before, and says the next symbol. So training, where the translation is known (teacher forcing), is three calls of a
kernel for a whole batch, however ragged; nothing is packed or padded for it. A translation is searched with `--beam`
hypotheses side by side; a beam of one is greedy.

Symbols are characters, words, or pieces of words (byte-pair encoding: Sennrich et al. 2016), learnt from the training
part; others are unknown. An unknown one in a translation is replaced by the one of the source that the decoder looks
at. Sources are never in two parts, nor are dates; a tenth of the pairs is for validation, which alone chooses the
weights and stops early, another tenth is the test, at most 1,000 pairs each. Validation is in nats per symbol, the test
in BLEU, as sacrebleu counts it.

Sizes in comments: S symbols of the source, T of the translation, B sentences, K hypotheses, E embedding, H hidden.
"""

from __future__ import annotations

import datetime
import gzip
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
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
    """What decides the weights, beside the pairs; kept in the file that a training is resumed from."""

    cell: str = "gru"
    hidden: int = 128
    embedding: int = 128
    dropout: float = 0.1
    smoothing: float = 0.0
    pairs: int = 20_000
    columns: str = ""
    unit: str = "characters"
    vocabulary: int = 4000
    longest: int = 64
    beam: int = 4
    batch: int = 64
    steps: int = 1000
    lr: float = 0.003
    clip: float = 1.0
    evaluate: int = 100
    patience: int = 6
    seed: int = 0


TINY = Settings(hidden=16, embedding=8, pairs=200, beam=2, batch=16, steps=30, evaluate=10)
MOST = 1000  # pairs of the validation and of the test part
SHOWN = 5  # translations of the test part that are printed

# The pairs -----------------------------------------------------------------------------------------------------------

Pair = tuple[str, str]  # source, target
DATES = "dates in many languages"
LANGUAGES = (
    "ar bg bn ca cs da de el en es et eu fa fi fr he hi hu hy id it ja ka ko lt lv nb nl pl pt ro ru sk sv sw th "
    "tr uk vi zh"
)
STYLES = ("medium", "long", "full")  # Babel's; "short" has years of two digits, and months and days in any order
FIRST_DAY, LAST_DAY = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)


def dates(count: int) -> list[Pair]:
    """Different days, each as one language writes it and as ISO 8601 does; the same ones at every call."""
    harness.need("babel", "the default task, dates,")
    from babel.dates import format_date

    days = LAST_DAY.toordinal() - FIRST_DAY.toordinal() + 1
    if count > days:
        raise Failure(f"--pairs: expected at most {days}, the days from {FIRST_DAY} to {LAST_DAY}, got {count}")
    languages, random = LANGUAGES.split(), np.random.default_rng(0)
    pairs = []
    for day in FIRST_DAY.toordinal() + random.permutation(days)[:count]:
        date = datetime.date.fromordinal(int(day))
        style, language = STYLES[random.integers(len(STYLES))], languages[random.integers(len(languages))]
        pairs.append((format_date(date, style, locale=language), date.isoformat()))
    return pairs


def read_pairs(path: Path, columns: str = "", hint: str = "") -> list[Pair]:
    """Two columns, counted from 1, of a tab-separated file in UTF-8, which may be compressed (.gz).

    Where `columns` is empty, there must be no others; `hint`: what to do where there are.
    """
    if columns and not re.fullmatch(r"[1-9]\d{0,5},[1-9]\d{0,5}", columns):
        raise Failure(f"--columns: expected two numbers from 1 on, such as 1,2, got {columns!r}")
    numbers = [int(number) for number in (columns or "1,2").split(",")]
    pairs = []
    for row, line in enumerate(read_lines(path), 1):
        entries = line.split("\t")
        if line and len(entries) < max(numbers):
            raise Failure(f"{path}, line {row}: expected {max(numbers)} columns between tabs, got {len(entries)}")
        if not columns and len(entries) > 2:
            raise Failure(f"{path}, line {row}: expected 2 columns between tabs, got {len(entries)}{hint}")
        if line:
            source, target = (" ".join(entries[number - 1].split()) for number in numbers)
            pairs.append((source, target))
    return pairs


def read_lines(path: Path) -> list[str]:
    if path.suffix != ".gz":
        return harness.read_text(path).split("\n")
    try:
        content = gzip.decompress(harness.read_file(path))
        return content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, EOFError, ValueError) as error:  # ValueError: no UTF-8
        raise Failure(f"{path}: expected compressed text in UTF-8 ({error})") from error


# Symbols -------------------------------------------------------------------------------------------------------------

BOUNDARY, UNKNOWN = 0, 1  # the end of a sentence, and what stands before its beginning; then the vocabulary
IGNORED = -100  # what cross_entropy leaves out
UNKNOWN_SIGN = "\ufffd"
WORD = re.compile(r" \w+| ?[^\w\s]|\w+")


class Side:
    """Symbols of the sources or of the translations. They give the text again when joined: a word has its space."""

    def __init__(self, unit: str, symbols: list[str], merges: list[list[str]]) -> None:
        self.unit, self.symbols = unit, symbols
        self.codes = {symbol: code for code, symbol in enumerate(symbols, 2)}
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self.pieces: dict[str, list[str]] = {}  # of words met before

    def split(self, text: str) -> list[str]:
        if self.unit != "subwords":
            return words_of(text, self.unit)
        return [piece for word in words_of(text, self.unit) for piece in self.split_word(word)]

    def split_word(self, word: str) -> list[str]:
        """Join neighbours in the order that was learnt, as long as there are any to join."""
        if word not in self.pieces:
            pieces = list(word)
            while len(pieces) > 1:
                rank, pair = min((self.ranks.get(pair, len(self.ranks)), pair) for pair in pairwise(pieces))
                if rank == len(self.ranks):
                    break
                pieces = join(pieces, pair)
            self.pieces[word] = pieces
        return self.pieces[word]

    def encode(self, text: str) -> list[int]:
        return [self.codes.get(symbol, UNKNOWN) for symbol in self.split(text)]

    def symbol(self, code: int) -> str:
        return UNKNOWN_SIGN if code == UNKNOWN else self.symbols[code - 2]


def words_of(text: str, unit: str) -> list[str]:
    """Characters, or words and punctuation marks, each with the space before it."""
    return list(text) if unit == "characters" else WORD.findall(" " + text)


def join(pieces: list[str], pair: Pair) -> list[str]:
    """The two of the pair as one, wherever they are neighbours."""
    joined, i = [], 0
    while i < len(pieces):
        size = 2 if tuple(pieces[i : i + 2]) == pair else 1
        joined.append("".join(pieces[i : i + size]))
        i += size
    return joined


def learn_merges(words: Counter[str], most: int) -> list[list[str]]:
    """Byte-pair encoding: again and again the most frequent pair of neighbours becomes one, until there are `most`."""
    pieces = {word: list(word) for word in words}
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[str]] = defaultdict(set)  # words that a pair is, or was, in
    heap: list[tuple[int, Pair]] = []  # every pair with its count, and others with counts that they had once

    def count(changes: dict[Pair, int]) -> None:
        for pair, change in changes.items():
            if change:
                counts[pair] += change
                heappush(heap, (-counts[pair], pair))

    changes: Counter[Pair] = Counter()
    for word in words:
        add_pairs(changes, places, word, pieces[word], words[word])
    count(changes)
    merges: list[list[str]] = []
    while len(merges) < most:
        while heap and -heap[0][0] != counts[heap[0][1]]:
            heappop(heap)
        if not heap or heap[0][0] > -2:
            break
        best = heappop(heap)[1]
        merges.append(list(best))
        changes = Counter()
        for word in places.pop(best):
            joined = join(pieces[word], best)
            if len(joined) < len(pieces[word]):
                add_pairs(changes, places, word, pieces[word], -words[word])
                add_pairs(changes, places, word, joined, words[word])
                pieces[word] = joined
        count(changes)
    return merges


def add_pairs(
    changes: Counter[Pair], places: defaultdict[Pair, set[str]], word: str, pieces: list[str], count: int
) -> None:
    for pair in pairwise(pieces):
        changes[pair] += count
        places[pair].add(word)


def learn_side(sentences: list[str], unit: str, most: int) -> dict[str, Any]:
    """The arguments of a `Side`: the most frequent symbols, `most` at most, and how they are joined from others.

    What occurs once alone is left out: from that, the model learns what to do with the unknown.
    """
    words = Counter(word for sentence in sentences for word in words_of(sentence, unit))
    merges = []
    if unit == "subwords":
        letters = {letter for word in words for letter in word}
        merges = learn_merges(words, max(most - len(letters), 0))
    side = Side(unit, [], merges)
    counts = Counter(symbol for sentence in sentences for symbol in side.split(sentence))
    frequent = sorted((-count, symbol) for symbol, count in counts.items() if count > 1)[:most]
    return {"unit": unit, "symbols": [symbol for _, symbol in frequent], "merges": merges}


class Batch(NamedTuple):
    """Sentences side by side, int64."""

    source: torch.Tensor  # [S, B]
    source_lengths: torch.Tensor  # [B], of the host
    given: torch.Tensor  # [T, B], the translation behind a boundary
    wanted: torch.Tensor  # [T, B], the translation and a boundary, then IGNORED
    lengths: torch.Tensor  # [B], of the host


class Coder:
    """From sentences to symbols and back."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.source, self.target = Side(**info["source"]), Side(**info["target"])

    def read(self, texts: list[str], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Sentences to translate: [S, B] and lengths [B]."""
        codes = [torch.tensor(self.source.encode(text)) for text in texts]
        return nn.utils.rnn.pad_sequence(codes).to(device), torch.tensor([len(code) for code in codes])

    def batch(self, pairs: list[Pair], device: str) -> Batch:
        source, source_lengths = self.read([source for source, _ in pairs], device)
        codes = [self.target.encode(target) for _, target in pairs]
        given = nn.utils.rnn.pad_sequence([torch.tensor([BOUNDARY, *code]) for code in codes])
        wanted = nn.utils.rnn.pad_sequence([torch.tensor([*code, BOUNDARY]) for code in codes], padding_value=IGNORED)
        lengths = torch.tensor([len(code) + 1 for code in codes])
        return Batch(source, source_lengths, given.to(device), wanted.to(device), lengths)

    def write(self, codes: list[int], source: str, attention: np.ndarray) -> str:
        """The text of a translation; `attention` [T, S] says what symbol of the source an unknown one is."""
        places, looked_at = self.source.split(source), attention.argmax(1)
        symbols = [places[looked_at[t]] if c == UNKNOWN else self.target.symbol(c) for t, c in enumerate(codes)]
        return "".join(symbols).strip()


class Pairs(NamedTuple):
    """What is trained on, validated with and tested on."""

    name: str
    digest: str
    info: dict[str, Any]  # source, target: the arguments of each `Side`; longest: of the translations
    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


def load(settings: Settings, options: dict[str, Any]) -> Pairs:
    path = options["data"]
    if path is None:
        return prepare(DATES, dates(settings.pairs), settings)
    return prepare(path.name, read_pairs(path, settings.columns, "; name two by --columns"), settings)


def prepare(name: str, pairs: list[Pair], settings: Settings) -> Pairs:
    """Leave out what is too long, empty or there twice, shuffle, split, and list the training part's symbols."""
    unique = dict(reversed(pairs))  # of several translations, the first
    unit, longest = settings.unit, settings.longest
    usable = [pair for pair in unique.items() if all(0 < len(words_of(text, unit)) <= longest for text in pair)]
    if len(usable) < 20:
        limit = f"1 to {longest} {'characters' if unit == 'characters' else 'words'} (--longest) on both sides"
        raise Failure(f"{name}: expected at least 20 different pairs of {limit}, got {len(usable)}")
    chosen = [usable[i] for i in np.random.default_rng(0).permutation(len(usable))]
    part = min(len(chosen) // 10, MOST)
    test, valid, train = chosen[:part], chosen[part : 2 * part], chosen[2 * part :]
    sides = [learn_side([pair[side] for pair in train], unit, settings.vocabulary) for side in (0, 1)]
    target_side = Side(**sides[1])
    longest = max(len(target_side.split(target)) for _, target in train)
    info = {"source": sides[0], "target": sides[1], "longest": longest}
    return Pairs(name, harness.digest_of(*(text for pair in chosen for text in pair)), info, train, valid, test)


# The model -----------------------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """Encoder, decoder, attention: see the top of the file."""

    def __init__(self, settings: Settings, sources: int, targets: int) -> None:
        super().__init__()
        layer, hidden, embedding = harness_torch.CELLS[settings.cell], settings.hidden, settings.embedding
        self.has_memory = settings.cell == "lstm"
        self.dropout = nn.Dropout(settings.dropout)
        self.source = nn.Embedding(sources + 2, embedding)
        self.encoder = layer(embedding, hidden, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.target = nn.Embedding(targets + 2, embedding)
        self.reader = layer(embedding, hidden)
        self.query = nn.Linear(hidden, 2 * hidden, bias=False)
        self.writer = layer(3 * hidden, hidden)
        self.head = nn.Linear(hidden, targets + 2)

    def read(self, source: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """The source [S, B] to annotations [B, S, 2·H] and the decoder's first state."""
        annotations, last = self.encoder(self.dropout(self.source(source)), lengths=lengths)
        last = last[0] if self.has_memory else last  # [2, B, H], both directions
        h = torch.tanh(self.bridge(last.transpose(0, 1).flatten(1))).unsqueeze(0)  # [1, B, H]
        zero = torch.zeros_like(h)
        return annotations.transpose(0, 1), [(h, zero), (zero, zero)] if self.has_memory else [h, zero]

    def write(
        self,
        annotations: torch.Tensor,
        source_lengths: torch.Tensor,
        given: torch.Tensor,
        state: list[Any],
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """What follows each of the symbols `given` [T, B]: outputs [T, B, H], attention [B, T, S] and the state."""
        read, first = self.reader(self.dropout(self.target(given)), state[0], lengths=lengths)
        attention = self.attend(read, annotations, source_lengths)
        found = (attention @ annotations).transpose(0, 1)  # [T, B, 2·H]
        written, second = self.writer(torch.cat([read, found], 2), state[1], lengths=lengths)
        return self.dropout(written), attention, [first, second]

    def attend(self, read: torch.Tensor, annotations: torch.Tensor, source_lengths: torch.Tensor) -> torch.Tensor:
        """Weights [B, T, S] of the places of the source: Luong et al. 2015, "general", scaled."""
        query = self.query(read).transpose(0, 1)  # [B, T, 2·H]
        scores = query @ annotations.transpose(1, 2) / query.shape[2] ** 0.5
        places = torch.arange(annotations.shape[1], device=annotations.device)
        outside = places >= source_lengths.to(places.device)[:, None]  # [B, S]
        return scores.masked_fill(outside[:, None], -torch.inf).softmax(2)

    def loss(self, batch: Batch, smoothing: float = 0.0, reduction: str = "mean") -> torch.Tensor:
        """Cross entropy in nats, with the translation so far always given."""
        annotations, state = self.read(batch.source, batch.source_lengths)
        written, _, _ = self.write(annotations, batch.source_lengths, batch.given, state, batch.lengths)
        valid = batch.wanted != IGNORED
        logits = self.head(written[valid])
        return functional.cross_entropy(logits, batch.wanted[valid], label_smoothing=smoothing, reduction=reduction)


def build(settings: Settings, info: dict[str, Any], device: str) -> tuple[Translator, torch.optim.Optimizer]:
    harness_torch.begin_model(settings.seed, device)
    model = Translator(settings, len(info["source"]["symbols"]), len(info["target"]["symbols"])).to(device)
    return model, torch.optim.Adam(model.parameters(), lr=settings.lr)


# Searching a translation ---------------------------------------------------------------------------------------------


class Hypotheses(NamedTuple):
    """K partial translations of each of B sentences, the likeliest first; rows are B·K."""

    scores: torch.Tensor  # [B, K], log-probabilities
    symbols: torch.Tensor  # [T, B·K], a boundary first
    attention: torch.Tensor  # [B·K, T, S]
    state: list[Any]  # the decoder's
    done: torch.Tensor  # [B·K], whether a boundary was reached


@torch.no_grad()
def search(
    model: Translator, source: torch.Tensor, lengths: torch.Tensor, beam: int, longest: int
) -> list[tuple[list[int], np.ndarray]]:
    """For each sentence of `source` [S, B] the best translation found, of at most `longest` symbols, and [T, S]."""
    annotations, state = model.read(source, lengths)
    count = source.shape[1]
    rows = torch.arange(count, device=source.device).repeat_interleave(beam)
    annotations, lengths = annotations[rows], lengths[rows.cpu()]
    scores = torch.full((count, beam), -torch.inf, device=source.device)
    scores[:, 0] = 0.0  # the K rows are the same in the beginning
    begin = torch.full((1, count * beam), BOUNDARY, device=source.device)
    attention = annotations.new_zeros(count * beam, 0, annotations.shape[1])
    found = Hypotheses(scores, begin, attention, pick(state, rows), torch.zeros_like(begin[0], dtype=torch.bool))
    for _ in range(longest + 1):
        found = extend(model, annotations, lengths, found)
        if bool(found.done.all()):
            break
    return best_of(found)


def extend(model: Translator, annotations: torch.Tensor, lengths: torch.Tensor, found: Hypotheses) -> Hypotheses:
    """One symbol more for each; those that are done stay as they are."""
    count, beam = found.scores.shape
    written, attention, state = model.write(annotations, lengths, found.symbols[-1:], found.state)
    likely = model.head(written[0]).log_softmax(1)  # [B·K, V]
    stay = torch.full_like(likely[0], -torch.inf)
    stay[BOUNDARY] = 0.0
    likely = torch.where(found.done[:, None], stay, likely).view(count, beam, -1)
    scores, chosen = (found.scores[:, :, None] + likely).flatten(1).topk(beam)  # [B, K] out of K·V
    parents = chosen // likely.shape[2] + torch.arange(count, device=chosen.device)[:, None] * beam
    rows, symbols = parents.flatten(), (chosen % likely.shape[2]).flatten()
    return Hypotheses(
        scores,
        torch.cat([found.symbols[:, rows], symbols[None]]),
        torch.cat([found.attention, attention], 1)[rows],
        pick(state, rows),
        found.done[rows] | (symbols == BOUNDARY),
    )


def pick(state: list[Any], rows: torch.Tensor) -> list[Any]:
    """Some rows of the states of both layers, [1, B, H] or pairs of such."""
    return [tuple(part[:, rows] for part in s) if isinstance(s, tuple) else s[:, rows] for s in state]


def best_of(found: Hypotheses) -> list[tuple[list[int], np.ndarray]]:
    """The hypothesis with the best score per symbol of each sentence: codes without boundaries, attention [T, S]."""
    count, beam = found.scores.shape
    symbols = found.symbols[1:].T.view(count, beam, -1).cpu()
    sizes = (symbols != BOUNDARY).sum(2)
    best = (found.scores.cpu() / (sizes + 1)).argmax(1)
    attention = found.attention.view(count, beam, *found.attention.shape[1:]).cpu().numpy()
    result = []
    for b, k in enumerate(best.tolist()):
        size = int(sizes[b, k])
        result.append((symbols[b, k, :size].tolist(), attention[b, k, :size]))
    return result


def translate(run: Run, texts: list[str], beam: int) -> list[tuple[str, np.ndarray]]:
    """Translations, each with its attention [T, S]; for a model in eval mode."""
    coder, device = Coder(run.info), str(run.model.head.weight.device)
    longest = run.info["longest"] + run.info["longest"] // 4
    result = []
    for first in range(0, len(texts), 64):
        part = texts[first : first + 64]
        for text, (codes, attention) in zip(
            part, search(run.model, *coder.read(part, device), beam, longest), strict=True
        ):
            result.append((coder.write(codes, text, attention), attention))
    return result


def bleu(translations: list[str], references: list[str], unit: str) -> float:
    """BLEU of a corpus, 0 to 100: of words in sacrebleu's standard tokens (13a), or of characters.

    Where no translation has four tokens, of as many in a row as there are (effective order): it were 0 otherwise.
    """
    import sacrebleu

    tokens = "char" if unit == "characters" else "13a"
    return float(sacrebleu.corpus_bleu(translations, [references], tokenize=tokens, use_effective_order=True).score)


# Training ------------------------------------------------------------------------------------------------------------


class Translating(harness.Task):
    """Say the next symbol of a translation."""

    unit = "nats/symbol"
    items = "symbols"

    def __init__(self, pairs: Pairs, device: str = "cpu") -> None:
        self.pairs, self.coder, self.device = pairs, Coder(pairs.info), device

    def batches(self, run: Run) -> Iterator[Batch]:
        train = self.pairs.train
        for chosen in harness.shuffled_batches(run, len(train), run.settings.batch):
            yield self.coder.batch([train[i] for i in chosen], self.device)

    def learn(self, run: Run, batch: Batch, rate: float) -> Step:
        loss = run.model.loss(batch, run.settings.smoothing)
        return Step(loss.item(), harness_torch.descend(run, loss, rate, run.settings.clip), int(batch.lengths.sum()))

    def rate(self, run: Run, share: float) -> float:
        return harness.half_cosine(run.settings.lr, share)

    @torch.no_grad()
    def validate(self, run: Run) -> float:
        total = symbols = 0.0
        for first in range(0, len(self.pairs.valid), 64):
            batch = self.coder.batch(self.pairs.valid[first : first + 64], self.device)
            total += float(run.model.loss(batch, reduction="sum"))
            symbols += int(batch.lengths.sum())
        return total / symbols

    def test(self, run: Run) -> dict[str, float]:
        """BLEU of greedy and of beam search, and the share of translations that are the reference itself."""
        sources, references = zip(*self.pairs.test, strict=True)
        greedy = [text for text, _ in translate(run, list(sources), 1)]
        best = [text for text, _ in translate(run, list(sources), run.settings.beam)]
        run.notes["shown"] = [list(row) for row in zip(sources, references, best, strict=True)][:SHOWN]
        same = sum(text == reference for text, reference in zip(best, references, strict=True))
        unit = run.settings.unit
        return {
            "bleu": bleu(best, list(references), unit),
            "greedy": bleu(greedy, list(references), unit),
            "exact": same / len(references),
        }

    def example(self, run: Run) -> str:
        source = self.pairs.valid[0][0]
        return f"{source} → {translate(run, [source], 1)[0][0]}"


# What is shown -------------------------------------------------------------------------------------------------------


def describe(run: Run, pairs: Pairs) -> str:
    parts, info, settings = [len(part) for part in (pairs.train, pairs.valid, pairs.test)], pairs.info, run.settings
    size = harness_torch.count_parameters(run.model)
    return (
        f"{pairs.name}: {parts[0]:,} + {parts[1]:,} + {parts[2]:,} pairs to train, validate and test; "
        f"{len(info['source']['symbols']):,} and {len(info['target']['symbols']):,} {settings.unit}\n"
        f"{run.model.encoder}, {size:,} parameters, {harness.counted(settings.steps, 'steps')} "
        f"({settings.steps * settings.batch / parts[0]:.1f} times the pairs)"
    )


def show(run: Run, texts: list[str]) -> None:
    """Some translations of the test part, and those that were asked for."""
    for source, reference, translation in run.notes["shown"]:
        click.echo(f"  source       {source}\n  reference    {reference}\n  translation  {translation}\n")
    for text, (translation, _) in zip(texts, translate(run, texts, run.settings.beam), strict=True):
        click.echo(f"{text} → {translation}")


def plot_attention(run: Run, source: str, path: Path) -> None:
    """Where in the source the decoder looked for each symbol of the translation, beside the learning curve."""
    coder, device = Coder(run.info), str(run.model.head.weight.device)
    codes, weights = search(run.model, *coder.read([source], device), run.settings.beam, run.info["longest"])[0]
    figure = harness.new_figure(12.0, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    places = coder.source.split(source)
    left.set_xticks(range(len(places)), places, rotation=0 if run.settings.unit == "characters" else 90)
    left.set_yticks(range(len(codes)), [coder.target.symbol(code) for code in codes])
    left.set(xlabel="source", ylabel="translation", title="attention")
    harness.draw_curve(right, run, Translating.unit)
    harness.write_picture(figure, path)


# The command line ----------------------------------------------------------------------------------------------------

SCRIPT = harness.Example("translation", Settings, TINY, load, build, harness_torch.TorchFiles())


@click.command(context_settings={"max_content_width": 120})
@click.option("--data", type=harness.FILE, help="Pairs: a tab-separated file, may be .gz. Default: dates, from Babel.")
@harness.settings_options(
    Settings,
    harness.CELL,
    harness.HIDDEN,
    ("--embedding", click.IntRange(1), "Size of a symbol's vector."),
    ("--dropout", Number(0.0, 1.0, max_open=True), "Of embeddings and before the output."),
    ("--smoothing", Number(0.0, 1.0), "Probability that training spreads over all symbols."),
    ("--pairs", click.IntRange(1), "Dates to make."),
    ("--columns", str, "Source and target, such as 1,2, where --data has more than two columns."),
    ("--unit", click.Choice(["characters", "words", "subwords"]), "What is read and written one by one."),
    ("--vocabulary", click.IntRange(1), "Symbols of each side at most."),
    ("--longest", click.IntRange(1), "Leave out pairs with more characters (else words) on a side."),
    ("--beam", click.IntRange(1), "Hypotheses of a search; 1: greedy."),
    harness.BATCH,
    harness.LR,
    harness.CLIP,
)
@harness.run_options("attention and the learning curve")
@click.option("--translate", "texts", multiple=True, help="Translate this at the end; may be given several times.")
def main(**options: Any) -> None:
    """Train a translator on pairs of sentences, and let it translate."""
    harness.check_outputs(options)
    harness.need("sacrebleu", "the BLEU of the test part")
    texts = list(options["texts"])
    if not all(text.strip() for text in texts):
        raise Failure("--translate: expected a text, got an empty one")
    console = harness.make_console()
    run, pairs = harness.begin(SCRIPT, options)
    if pairs is None:
        console.print(f"{options['path']}: trained already", markup=False)
        run.model.eval()
    else:
        console.print(describe(run, pairs), markup=False)
        task = Translating(pairs, options["device"])
        harness.train_and_show(SCRIPT, run, task, console, options["minutes"], options["path"])
    show(run, texts)
    if options["plot"] is not None:
        plot_attention(run, (texts or [run.notes["shown"][0][0]])[0], options["plot"])
    test = run.test
    result = f"test BLEU {test['bleu']:.1f}, greedy {test['greedy']:.1f}, {100 * test['exact']:.1f} % exact"
    click.echo(harness.summary(run, Translating, result))


if __name__ == "__main__":
    main()
