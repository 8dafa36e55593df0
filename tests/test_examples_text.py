"""examples/text_generation.py: a tiny run, its parts, kill and resume to the same bits, malformed data."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import rnnfast
from example_scripts import EXAMPLES, example_script

FOX = "the quick brown fox jumps over the lazy dog.\n"
script = example_script("text_generation")


@pytest.fixture
def text(tmp_path):
    """2,200 characters: with --tiny an epoch has 29 windows."""
    path = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(FOX.split(), 600)
    path.write_text(" ".join(words)[:2200])
    return path


def invoke(script, *arguments):
    return CliRunner().invoke(script.main, ["--tiny", *map(str, arguments)])


def weights_of(path):
    checkpoint = rnnfast.load_checkpoint(path)
    return {**checkpoint.module.state_dict(), **checkpoint.optimizer, "curve": checkpoint.user["curve"]}


def assert_same_training(a, b):
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=isinstance(a[name], np.ndarray))


# The whole script ----------------------------------------------------------------------------------------------------


def test_default_text_is_the_standard_library(script):
    result = invoke(script, "--generate", 30)
    assert result.exit_code == 0, result.output
    last = result.output.strip().splitlines()[-1]
    bits = re.match(r"test (\d\.\d+) bits per character on the last tenth", last)
    assert bits is not None
    assert 3.0 < float(bits[1]) < 6.0
    assert "the standard library of Python" in result.output


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_learns_and_writes_on(script, tmp_path, cell):
    (tmp_path / "fox.txt").write_text(FOX * 100)
    options = ["--cell", cell, "--hidden", 48, "--dropout", 0, "--steps", 150, "--evaluate", 50, "--temperature", 0]
    result = invoke(script, tmp_path / "fox.txt", *options, "--prompt", "the quick", "--generate", 40)
    assert result.exit_code == 0, result.output
    assert float(re.search(r"^test (\S+)", result.output, re.MULTILINE)[1]) < 0.3
    assert (FOX + FOX)[:49] in result.output


def test_sampling_is_decided_by_its_seed(script, text, tmp_path):
    invoke(script, text, "--save", tmp_path / "a", "--steps", 5)
    finished = "--save", tmp_path / "a", "--resume", "--steps", 5, "--generate", 80
    first, again, other = (invoke(script, *finished, "--sample-seed", seed).output for seed in (1, 1, 2))
    assert first == again != other
    assert "trained already" in first


def test_runs_are_repeatable(script, text, tmp_path):
    for name in ("a", "b"):
        assert invoke(script, "--data", text, "--steps", 12, "--save", tmp_path / name).exit_code == 0
    assert_same_training(tmp_path / "a", tmp_path / "b")


def test_minutes_end_it(script, text):
    result = invoke(script, text, "--minutes", 0.005, "--steps", 10**6, "--evaluate", 10**6)
    assert result.exit_code == 0
    assert int(re.search(r"([\d,]+) steps, about", result.output)[1].replace(",", "")) < 10**5


def test_plot(script, text, tmp_path):
    pytest.importorskip("matplotlib")
    assert invoke(script, text, "--steps", 20, "--plot", tmp_path / "curve.png").exit_code == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(script, text, tmp_path, monkeypatch):
    monkeypatch.setattr(script.harness, "find_spec", lambda name: None)
    result = invoke(script, text, "--plot", tmp_path / "curve.png")
    assert result.exit_code == 1
    assert "rnnfast[plot]" in result.output


# Kill and resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("stop", [0, 9, 10, 31])
def test_stopped_and_resumed_ends_with_the_same_bits(script, text, tmp_path, monkeypatch, cell, stop):
    options = text, "--cell", cell, "--layers", 2, "--dropout", 0.3, "--steps", 45, "--generate", 0, "--save"
    assert invoke(script, *options, tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_on", interrupted(script.train_on, stop))
        result = invoke(script, *options, tmp_path / "parts")
        assert result.exit_code == 130
        assert f"stopped at step {stop}" in result.output
    assert invoke(script, *options, tmp_path / "parts", "--resume").exit_code == 0
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def interrupted(function, stop):
    def call(run, *arguments):
        if run.step == stop:
            raise KeyboardInterrupt
        return function(run, *arguments)

    return call


def test_killed_three_times_ends_with_the_same_bits(script, text, tmp_path):
    options = [text, "--dropout", 0.2, "--steps", 500, "--evaluate", 12, "--patience", 1000, "--generate", 0]
    arguments = list(map(str, ["--tiny", *options, "--save", tmp_path / "killed", "--resume"]))
    rng = np.random.default_rng()  # any moment must do
    for _ in range(3):
        run_and_kill(arguments, tmp_path / "killed", rng.uniform(0.0, 0.12))
        assert rnnfast.load_checkpoint(tmp_path / "killed").user["test"] is None, "killed too late to prove anything"
    subprocess.run(
        [sys.executable, str(EXAMPLES / "text_generation.py"), *arguments], check=True, stdout=subprocess.DEVNULL
    )
    assert invoke(script, *options, "--save", tmp_path / "whole").exit_code == 0
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


def run_and_kill(arguments, path, delay):
    """SIGKILL `delay` seconds after the script's first save."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "text_generation.py"), *arguments], stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()


def test_the_best_weights_are_kept(script, text, tmp_path, monkeypatch):
    scores = iter([3.0, 2.0, 2.5, 2.6, 9.0])  # four validations, then the test
    seen = []

    def score(model, symbols):
        seen.append(model.layers.state_dict())
        return next(scores)

    monkeypatch.setattr(script, "bits_per_character", score)
    options = text, "--generate", 0, "--evaluate", 5, "--patience", 2, "--save"
    assert invoke(script, *options, tmp_path / "early").exit_code == 0
    checkpoint = rnnfast.load_checkpoint(tmp_path / "early")
    assert [row[0] for row in checkpoint.user["curve"]] == [5, 10, 15, 20]
    assert (checkpoint.user["best"], checkpoint.user["test"]) == (2.0, 9.0)
    for name, value in checkpoint.module.state_dict().items():
        np.testing.assert_array_equal(value, seen[1][name])
        np.testing.assert_array_equal(value, seen[4][name])
        assert not np.array_equal(value, seen[3][name])


# Malformed -----------------------------------------------------------------------------------------------------------


def write(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


MALFORMED = {
    "missing": (lambda folder: folder / "none.txt", "none.txt: cannot be read"),
    "folder": (lambda folder: folder, "cannot be read"),
    "empty": (write("e.txt", b""), "expected at least 2000 characters"),
    "short": (
        write("s.txt", b"abc" * 600),
        "expected at least 2000 characters for --batch 4 and --window 16, got 1800",
    ),
    "not UTF-8": (write("l.txt", b"caf\xe9 " * 1000), "expected text in UTF-8, got byte 0xe9 at 3"),
    "binary": (write("b.bin", b"ab\0c" * 1000), "expected text, got a binary file (a zero byte at 2)"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_text(script, tmp_path, case):
    make, message = MALFORMED[case]
    result = invoke(script, make(tmp_path), "--save", tmp_path / "model")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "model").exists()


def test_no_standard_library(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    result = invoke(script)
    assert result.exit_code == 1
    assert "name a FILE" in result.output


def test_files_that_cannot_be_resumed_from(script, text, tmp_path):
    path = tmp_path / "model"
    resume = text, "--save", path, "--resume"
    path.write_bytes(b"not a model")
    assert "cannot be resumed from" in refused(script, *resume)
    rnnfast.save(path, rnnfast.LSTM(2, 3))
    assert "expected a file that this script saved" in refused(script, *resume)
    path.unlink()
    assert invoke(script, *resume, "--generate", 0).exit_code == 0
    path.write_bytes(path.read_bytes()[:-5])
    assert "cannot be resumed from" in refused(script, *resume)


def test_resuming_something_else_is_refused(script, text, tmp_path, monkeypatch):
    path = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(script, "train_on", interrupted(script.train_on, 10))
        invoke(script, text, "--save", path)
    before = path.read_bytes()
    assert "--hidden: expected 16" in refused(script, text, "--save", path, "--resume", "--hidden", 17)
    assert "is there already" in refused(script, text, "--save", path)
    text.write_text(text.read_text()[::-1])
    assert "expected the data that" in refused(script, text, "--save", path, "--resume")
    assert path.read_bytes() == before


def test_a_finished_run_is_of_its_own_text(script, text, tmp_path):
    finished = "--save", tmp_path / "model", "--resume", "--generate", 0
    assert invoke(script, text, *finished).exit_code == 0
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    assert "expected the data that" in refused(script, other, *finished)
    assert "expected the data that" in refused(script, "--data", other, *finished)
    assert "trained already" in invoke(script, *finished).output


def test_a_limit_that_leaves_too_little_is_named(script, text):
    assert "got 7 (--limit 7)" in refused(script, text, "--limit", 7)
    text.write_text("short")
    assert "--limit" not in refused(script, text, "--limit", 7)


def test_outputs_are_checked_first(script, text, tmp_path):
    nowhere = tmp_path / "none" / "file"
    assert "expected an existing folder" in refused(script, text, "--save", nowhere)
    assert "expected a file, got a folder" in refused(script, text, "--save", tmp_path, "--resume")
    assert "--resume needs --save" in refused(script, text, "--resume")
    assert "FILE and --data name the same thing" in refused(script, text, "--data", text)
    assert "device" in refused(script, text, "--device", "abacus")


def test_the_picture_is_checked_first(script, text, tmp_path):
    pytest.importorskip("matplotlib")
    nowhere = tmp_path / "none" / "file.png"
    assert "expected an existing folder" in refused(script, text, "--plot", nowhere)
    assert "expected a name that ends in .png" in refused(script, text, "--plot", tmp_path / "curve.foo")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, which takes no files even from root")
@pytest.mark.parametrize(("option", "name"), [("--save", "x"), ("--plot", "x.png")])
def test_a_folder_that_takes_no_files(script, text, option, name):
    if option == "--plot":
        pytest.importorskip("matplotlib")
    assert "expected a folder that can be written to, got /proc" in refused(script, text, option, f"/proc/{name}")


def test_characters_that_the_text_has_not(script, text):
    message = "--prompt: expected characters that the training part has, got 'QŠ'"
    assert message in refused(script, text, "--prompt", "Qui Š")


def test_what_is_too_large(script, text):
    assert "no model with --hidden 1000000000 --layers 1" in refused(script, text, "--hidden", 10**9)
    assert "--generate" in refused(script, text, "--generate", 10**12)


def test_the_bar_and_the_line_say_the_same(script, text, monkeypatch):
    monitors = []
    kind = script.harness.Monitor
    monkeypatch.setattr(script.harness, "Monitor", lambda console: monitors.append(kind(console)) or monitors[0])
    output = invoke(script, text, "--steps", 25, "--generate", 0).output
    line = re.search(r"step +25   train (\S+)", output)[1]
    assert monitors[0].bar.tasks[0].description.startswith(f"train {line} bits/char")


def test_one_of_a_kind(script):
    assert [script.harness.counted(count, "steps") for count in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_divergence_is_told(script, text):
    with np.errstate(all="ignore"):
        assert "try a lower --lr" in refused(script, text, "--lr", 1e9)


def refused(script, *arguments):
    result = invoke(script, *arguments)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit), result.exception
    return result.output


# The parts -----------------------------------------------------------------------------------------------------------


def test_symbols_are_those_of_the_training_part(script):
    text = script.prepare("t", "ab" * 1500 + "ac" * 170, script.TINY)
    assert text.vocabulary == script.UNKNOWN + "ab"
    assert set(text.test[-4:]) == {0, 1}
    assert len(text.train) + len(text.valid) + len(text.test) == 3340


def test_rare_characters_give_way(script):
    codes = np.concatenate([np.repeat(np.arange(1000, 1250), 3), np.arange(2000, 2100), np.repeat(50, 9)])
    vocabulary = script.make_vocabulary(codes)
    assert len(vocabulary) == script.MAX_SYMBOLS
    assert all(chr(code) in vocabulary for code in [50, *range(1000, 1250)])


def test_streams_follow_the_text(script):
    x, y = script.cut_streams(np.arange(101, dtype=np.uint8), 4)
    assert x.shape == y.shape == (25, 4)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[:, 2], np.arange(50, 75))


def test_the_metric(script):
    model = script.make_model(script.TINY, 8, "cpu").eval()
    symbols = np.random.default_rng(0).integers(0, 8, 1301).astype(np.uint8)
    logits, _ = model(symbols[:-1, None])
    loss, _ = rnnfast.cross_entropy(logits[:, 0], symbols[1:])
    assert script.bits_per_character(model, symbols, streams=1) == pytest.approx(loss / math.log(2), rel=1e-5)
    model.train()
    for parameter in model.layers[3].parameters():
        parameter.data[...] = 0.0
    assert script.bits_per_character(model.eval(), symbols, streams=16) == pytest.approx(3.0, rel=1e-6)


def test_draw(script):
    rng = np.random.default_rng(0)
    logits = np.array([9.0, 1.0, 3.0, 2.0, 0.0], np.float32)
    assert script.draw(logits, 0.0, None, rng) == script.draw(logits, 1.0, 1, rng) == 2
    assert {script.draw(logits, 1.0, 2, rng) for _ in range(100)} == {2, 3}
    drawn = np.bincount([script.draw(logits, 2.0, None, rng) for _ in range(2000)], minlength=5) / 2000
    wanted = np.exp(logits[1:] / 2) / np.exp(logits[1:] / 2).sum()
    np.testing.assert_allclose(drawn, [0.0, *wanted], atol=0.04)


def test_the_learning_rate(script):
    rates = [script.harness.half_cosine(0.01, share) for share in np.linspace(0.0, 1.2, 121)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == pytest.approx(0.01, rel=0.01)
    assert rates[100] == rates[-1] == pytest.approx(0.01 * 0.02)
    assert rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("option", ["--temperature", "--clip", "--minutes", "--lr", "--dropout"])
def test_not_a_number(script, option):
    result = invoke(script, option, "nan")
    assert result.exit_code == 2
    assert option in result.output
