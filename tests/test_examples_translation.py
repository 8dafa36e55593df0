"""examples/translation.py: tiny runs, symbols, search, stop and resume, malformed pairs."""

from __future__ import annotations

import gzip
import itertools
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, example_script, invoke, refused, succeed

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
script = example_script("translation")

WORDS = {"uno": "one", "dos": "two", "tres": "three", "rojo": "red", "casa": "house", "y": "and"}


@pytest.fixture
def pairs(tmp_path):
    """320 phrases of two to five words, translated word by word, in a file with a third column before them."""
    random = np.random.default_rng(0)
    phrases = [random.choice(list(WORDS), random.integers(2, 6)) for _ in range(320)]
    lines = [
        f"{i}\t{' '.join(phrase)}.\t{' '.join(WORDS[word] for word in phrase)}.\n" for i, phrase in enumerate(phrases)
    ]
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(lines))
    return path


def options_of(pairs, *more):
    return "--data", pairs, "--columns", "2,3", *more


def test_dates_are_the_default(script):
    pytest.importorskip("babel", reason="babel is not installed")
    output = succeed(script, "--translate", "3. Mai 2021")
    assert "dates in many languages: 160 + 20 + 20 pairs" in output
    assert "3. Mai 2021 → " in output
    assert re.match(r"test BLEU \d+\.\d, greedy \d+\.\d, \d+\.\d % exact \(", output.splitlines()[-1])


def test_dates_say_the_day(script):
    pytest.importorskip("babel", reason="babel is not installed")
    dates = script.dates(300)
    assert dates == script.dates(300)
    assert len(dict(dates).values()) == len({day for _, day in dates})
    for text, day in dates:
        assert day[:4] in text
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)


@pytest.mark.parametrize(("cell", "unit"), [("gru", "words"), ("lstm", "subwords")])
def test_learns(script, pairs, tmp_path, cell, unit):
    pytest.importorskip("matplotlib")
    options = options_of(pairs, "--cell", cell, "--unit", unit, "--hidden", 32, "--embedding", 16, "--dropout", 0)
    learning = "--steps", 160, "--evaluate", 80, "--lr", 0.02, "--beam", 3, "--plot", tmp_path / "attention.png"
    output = succeed(script, *options, *learning, "--translate", "uno y dos.")
    assert "uno y dos. → one and two." in output
    assert float(re.search(r"^test BLEU (\S+),", output, re.MULTILINE)[1]) > 80.0
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_stopped_and_resumed(script, pairs, tmp_path, monkeypatch, cell):
    options = options_of(pairs, "--cell", cell, "--dropout", 0.3, "--smoothing", 0.1)
    check_stop_and_resume(script, "Translating", tmp_path, monkeypatch, 14, *options)
    output = succeed(script, *options, "--save", tmp_path / "parts", "--resume", "--translate", "uno")
    assert "trained already" in output
    assert "uno → " in output


# Symbols -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["characters", "words", "subwords"])
def test_symbols_give_the_text_again(script, unit):
    texts = ["El principio, crió Dios: ¿los cielos?", "y la tierra... a los dos"] * 3
    side = script.Side(**script.learn_side(texts, unit, 40))
    for text in [*texts, "lo nuevo, ¡quizá!"]:
        assert "".join(side.split(text)).strip() == text
    assert [side.symbol(code) for code in side.encode(texts[0])] == side.split(texts[0])
    assert len(side.symbols) <= 40


def test_merges_are_those_of_the_definition(script):
    random = np.random.default_rng(1)
    words = Counter("".join(random.choice(list("abc"), random.integers(1, 8))) for _ in range(60))
    pieces, expected = {word: list(word) for word in words}, []
    for _ in range(25):
        counts = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(pieces[word]):
                counts[pair] += count
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        expected.append(list(best))
        pieces = {word: script.join(parts, best) for word, parts in pieces.items()}
    assert script.learn_merges(words, 25) == expected
    side = script.Side("subwords", [], expected)
    assert all(side.split_word(word) == parts for word, parts in pieces.items())


def test_unknown_words_come_from_the_source(script):
    sides = {"source": ["ver"], "target": ["see"]}
    info = {
        name: {"unit": "words", "symbols": [f" {word}" for word in words], "merges": []}
        for name, words in sides.items()
    }
    coder = script.Coder(info)
    attention = np.array([[0.1, 0.9], [0.8, 0.2]])
    assert coder.write([script.UNKNOWN, 2], "ver Belén", attention) == "Belén see"


def test_parts_have_no_source_in_common(script):
    pairs = [(str(i % 90), str(i)) for i in range(100)] + [("", "empty"), ("x" * 99, "long")]
    data = script.prepare("t", pairs, script.TINY)
    parts = [{source for source, _ in part} for part in (data.train, data.valid, data.test)]
    assert [len(part) for part in parts] == [72, 9, 9]
    assert len(set.union(*parts)) == 90
    assert dict(data.train + data.valid + data.test)["3"] == "3"


# Model and search ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(script):
    info = {"source": {"symbols": list("abcde")}, "target": {"symbols": list("xy")}}
    model, _ = script.build(script.TINY, info, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.eval()


def test_neighbours_in_a_batch_do_not_matter(script, model):
    source = torch.tensor([[2, 3, 4, 5], [6, 2, 0, 0]]).T
    lengths = torch.tensor([4, 2])
    given, wanted = torch.tensor([[0, 2, 3], [0, 3, 0]]).T, torch.tensor([[2, 3, 0], [3, 0, script.IGNORED]]).T
    both = model.loss(script.Batch(source, lengths, given, wanted, torch.tensor([3, 2])), reduction="sum")
    first = script.Batch(source[:, :1], lengths[:1], given[:, :1], wanted[:, :1], torch.tensor([3]))
    second = script.Batch(source[:2, 1:], lengths[1:], given[:2, 1:], wanted[:2, 1:], torch.tensor([2]))
    alone = model.loss(first, reduction="sum") + model.loss(second, reduction="sum")
    torch.testing.assert_close(both, alone)


def score(script, model, source, codes, done):
    """The mean of log p over a translation and its boundary, with the translation given."""
    given, wanted = torch.tensor([[0, *codes]]).T, torch.tensor([[*codes, 0 if done else script.IGNORED]]).T
    batch = script.Batch(source[:, None], torch.tensor([len(source)]), given, wanted, torch.tensor([len(codes) + 1]))
    return -float(model.loss(batch, reduction="sum").detach()) / (len(codes) + 1)


def test_a_beam_of_all_finds_the_best(script, model):
    """Up to three of three symbols: 40 translations, and only those of three need no boundary."""
    codes = [codes for size in range(4) for codes in itertools.product((1, 2, 3), repeat=size)]
    for seed in range(3):
        source = torch.tensor(np.random.default_rng(seed).integers(1, 7, 4 + seed))
        best = max(codes, key=lambda c: score(script, model, source, c, len(c) < 3))
        found, attention = script.search(model, source[:, None], torch.tensor([len(source)]), 64, 2)[0]
        assert tuple(found) == best
        np.testing.assert_allclose(attention.sum(axis=1), 1.0, atol=1e-5)


def test_a_beam_of_one_is_greedy(script, model):
    source, lengths = torch.tensor([[2, 3, 4, 5], [6, 2, 0, 0]]).T, torch.tensor([4, 2])
    for row, (found, _) in enumerate(script.search(model, source, lengths, 1, 5)):
        codes = []
        with torch.no_grad():
            annotations, state = model.read(source[: lengths[row], row : row + 1], lengths[row : row + 1])
            while len(codes) < 6:
                given = torch.tensor([[0, *codes]]).T
                written, _, _ = model.write(annotations, lengths[row : row + 1], given, state)
                codes.append(int(model.head(written[-1]).argmax()))
                if codes[-1] == script.BOUNDARY:
                    codes.pop()
                    break
        assert found == codes


def test_bleu(script):
    assert script.bleu(["the cat sat on the mat"], ["the cat sat on the mat"], "words") == pytest.approx(100.0)
    assert script.bleu(["1999-01-02"], ["1999-01-03"], "characters") == pytest.approx(
        100.0 * (9 / 10 * 8 / 9 * 7 / 8 * 6 / 7) ** 0.25
    )
    assert script.bleu(["one", "two"], ["one", "two"], "words") == pytest.approx(100.0)


# Malformed -----------------------------------------------------------------------------------------------------------

MALFORMED = {
    "missing": ("none.tsv", None, "none.tsv: cannot be read"),
    "one column": ("a.tsv", b"one\ttwo\nthree\n", "line 2: expected 2 columns between tabs, got 1"),
    "few": ("a.tsv", b"one\tuno\n", "expected at least 20 different pairs of 1 to 64 characters"),
    "not UTF-8": ("a.tsv", b"caf\xe9\tx\n", "expected text in UTF-8, got byte 0xe9 at 3"),
    "not compressed": ("a.tsv.gz", b"one\tuno\n", "expected compressed text in UTF-8"),
    "cut off": ("a.tsv.gz", gzip.compress(b"one\tuno\n" * 99)[:-9], "expected compressed text in UTF-8"),
    "compressed binary": ("a.tsv.gz", gzip.compress(b"\xff\xfe\xfd"), "expected compressed text in UTF-8"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pairs(script, tmp_path, case):
    name, content, message = MALFORMED[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in refused(script, "--data", tmp_path / name, "--save", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_bad_options(script, pairs, tmp_path, monkeypatch):
    assert "--columns: expected two numbers" in refused(script, "--data", pairs, "--columns", "2")
    assert "got 3; name two by --columns" in refused(script, "--data", pairs)
    assert "--translate: expected a text, got an empty one" in refused(script, *options_of(pairs), "--translate", " ")
    assert "expected 4 columns" in refused(script, "--data", pairs, "--columns", "2,4")
    assert "--device abacus" in refused(script, *options_of(pairs), "--device", "abacus")
    assert invoke(script, "--unit", "letters").exit_code == 2
    monkeypatch.setattr(script.harness, "find_spec", lambda name: None if name == "babel" else name)
    assert "needs babel: pip install 'rnnfast[examples]'" in refused(script)
    monkeypatch.setattr(script.harness, "find_spec", lambda name: None)
    assert "needs sacrebleu: pip install 'rnnfast[examples]'" in refused(script, *options_of(pairs))


def test_files_that_cannot_be_resumed_from(script, pairs, tmp_path):
    path = tmp_path / "model"
    resume = (*options_of(pairs), "--save", path, "--resume")
    for content in (b"not a model", b"", b"junk\n", bytes(99)):
        path.write_bytes(content)
        assert refused(script, *resume).endswith(
            "expected a file that this script saved, got a truncated or foreign one"
        )
    torch.save({"model": 1}, path)
    assert "expected a file that this script saved" in refused(script, *resume)


def test_verses(script):
    folder = os.environ.get("RNNFAST_DATA")
    path = Path(folder or ".") / "translation" / "kjv_rv1909_en_es.tsv.gz"
    if folder is None or not path.exists():
        pytest.skip("translation/kjv_rv1909_en_es.tsv.gz of RNNFAST_DATA is not there")
    verses = script.read_pairs(path, "5,4")
    assert len(verses) == 31_084
    assert verses[2] == (
        "Y dijo Dios: Sea la luz: y fué la luz.",
        "And God said, Let there be light: and there was light.",
    )
