"""examples/language_model.py: tiny runs, its parts, stop and resume, malformed texts."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, example_script, refused, succeed

script = example_script("language_model")
FOX = "The quick brown fox jumps, over the lazy dog.\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(FOX.split(), 900)))
    return path


def test_default_text_is_the_standard_library(script):
    output = succeed(script, "--generate", 5, "--top-k", 5)
    assert "the standard library of Python" in output
    assert 5.0 < float(re.search(r"^test perplexity (\S+) on the last tenth", output, re.MULTILINE)[1]) < 201.0


@pytest.mark.parametrize("cell", ["lstm", "rnn"])
def test_learns_and_writes_on(script, tmp_path, cell):
    pytest.importorskip("matplotlib")
    (tmp_path / "fox.txt").write_text(FOX * 100)
    options = "--cell", cell, "--hidden", 32, "--dropout", 0, "--steps", 200, "--evaluate", 100
    written = "--prompt", "The quick", "--generate", 20, "--temperature", 0, "--plot", tmp_path / "curve.png"
    output = succeed(script, tmp_path / "fox.txt", *options, *written)
    assert float(re.search(r"^test perplexity (\S+)", output, re.MULTILINE)[1]) < 1.5
    assert FOX in output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_and_resumed(script, text, tmp_path, monkeypatch):
    options = text, "--dropout", 0.3, "--generate", 0
    check_stop_and_resume(script, "Wording", tmp_path, monkeypatch, 33, *options)


def test_unknown_words_of_the_prompt_are_told(script, text):
    output = succeed(script, text, "--prompt", "quick unheard fox of", "--generate", 1, "--steps", 2)
    assert "--prompt: unknown, read as <unk>: unheard of\n" in output
    assert re.search(r"^quick <unk> fox <unk>", output, re.MULTILINE)


def test_words(script):
    text = script.prepare("t", "a b c_d\n" * 200 + "a z\n" * 40, script.TINY)
    assert text.vocabulary[0] == script.UNKNOWN
    assert set(text.vocabulary[1:]) == {"a", "b", "c_d", "\n"}
    assert set(text.test[-3:]) == {0, text.vocabulary.index("a"), text.vocabulary.index("\n")}
    assert script.put_together(script.TOKEN.findall("So, (he) said: no!\nYes.")) == "So, (he) said: no!\nYes."


def test_the_figure(script):
    model, _ = script.build(script.TINY, {"vocabulary": list("abcdefgh")}, "cpu")
    for parameter in model.layers[3].parameters():
        parameter.data[...] = 0.0
    tokens = np.random.default_rng(0).integers(0, 8, 400)
    assert script.nats_per_token(model.eval(), tokens) == pytest.approx(math.log(8), rel=1e-6)


def test_malformed_texts(script, tmp_path):
    assert "cannot be read" in refused(script, tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("a few words")
    assert "expected at least 500 words for --batch 4, got 3" in refused(script, "--data", tmp_path / "short.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    assert "expected text in UTF-8, got byte 0xe9 at 3" in refused(script, tmp_path / "latin.txt")
    (tmp_path / "binary").write_bytes(b"a\0b" * 1000)
    assert "expected text, got a binary file" in refused(script, tmp_path / "binary")
