"""examples/gradient_flow.py: the problems, a tiny run of every cell, stop and resume between and within trials."""

from __future__ import annotations

import re

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, contents, example_script, refused, succeed

script = example_script("gradient_flow")


def test_every_cell(script):
    output = succeed(script)
    rows = re.findall(r"^(\w+) +(1\.0|-) +0\.\d+ +\d\.\d+ ", output, re.MULTILINE)
    assert rows == [(cell, clip) for cell in script.CELLS for clip in ("1.0", "-")]
    assert "guessing 0.16667 (20 trials" in output.splitlines()[-1]


def test_what_is_named_twice_is_tried_once(script):
    output = succeed(script, "--cell", "rnn,rnn", "--rates", "0.01,1e-2")
    assert "(2 trials" in output.splitlines()[-1]


def test_plot(script, tmp_path):
    pytest.importorskip("matplotlib")
    succeed(script, "--cell", "rnn", "--rates", 0.01, "--plot", tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_theory_says(script):
    """Before training: the tanh RNN forgets, the identity keeps, a gate that is open for long keeps, too."""
    settings = script.Settings(length=100, parameters=600)
    factors = {}
    for trial in script.trials(settings):
        problem = script.load(settings, {})
        run = script.harness.new_run(script.SCRIPT, settings, problem._replace(info=trial))
        factors[trial["cell"]] = script.factor(script.Remembering(problem).flow(run))
    assert factors["rnn"] < 0.75
    assert 0.99 < factors["irnn"] < 1.01
    assert 0.9 < factors["lstm"] < 1.0
    assert 0.9 < factors["gru"] < 1.0


def test_short_sums_are_learnt(script):
    options = "--length", 8, "--cell", "gru", "--rates", 0.01, "--steps", 600, "--evaluate", 100, "--parameters", 2000
    output = succeed(script, *options, "--batch", 20)
    assert float(re.search(r"gru (\S+); guessing", output)[1]) < 0.01


def test_stopped_and_resumed(script, tmp_path, monkeypatch):
    """Stopped in the third of four trials; the file holds the last trial's weights and what the others came to."""
    options = "--cell", "lstm", "--task", "copy", "--length", 5
    check_stop_and_resume(script, "Remembering", tmp_path, monkeypatch, 53, *options)
    trials = [script.rnnfast.load_checkpoint(tmp_path / name).user["notes"]["done"] for name in ("whole", "parts")]
    for first, second in zip(*trials, strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert contents(tmp_path / "parts")["info"] == {"cell": "lstm", "lr": 0.01, "clip": None}
    assert "(4 trials" in succeed(script, *options, "--save", tmp_path / "parts", "--resume")


def test_divergence_is_a_result(script, monkeypatch):
    monkeypatch.setattr(script.Remembering, "rate", lambda self, run, share: 1e30)
    output = succeed(script, "--cell", "relu", "--rates", 1)
    assert "diverged in 1" in output


def test_adding(script):
    x, wanted = script.adding(np.random.default_rng(0), 10, 50)
    assert x.shape == (10, 50, 2)
    assert (x[:5, :, 1].sum(axis=0) == 1).all()
    assert (x[5:, :, 1].sum(axis=0) == 1).all()
    np.testing.assert_allclose(wanted[:, 0], (x[..., 0] * x[..., 1]).sum(axis=0))
    assert script.guess(script.Settings()) == pytest.approx(1 / 6)


def test_copying(script):
    x, wanted = script.copying(np.random.default_rng(0), 7, 3)
    symbols = x.argmax(axis=-1)
    assert x.shape == (27, 3, 10)
    np.testing.assert_array_equal(symbols[:10], wanted[-10:])
    assert set(wanted[-10:].ravel()) <= set(range(1, 9))
    assert not wanted[:-10].any()
    assert list(symbols[10:, 0]) == [0] * 6 + [9] + [0] * 10
    assert script.guess(script.Settings(task="copy", length=1000)) == pytest.approx(0.0204, abs=1e-4)


def test_parameters_are_about_equal(script):
    for cell, gates in {"rnn": 1, "gru": 3, "lstm": 4}.items():
        hidden = script.hidden_size(cell, 10, 16_000)
        assert 15_000 < gates * hidden * (hidden + 12) <= 16_000


def test_wrong_arguments(script):
    assert "--cell: expected some of rnn,relu,irnn,lstm,gru, got 'elman'" in refused(script, "--cell", "gru,elman")
    for rate in ("fast", "0", "-1", "nan", "inf", ""):
        message = f"--rates: expected positive numbers such as 0.001,0.01, got {rate!r}"
        assert message in refused(script, "--rates", f"0.1,{rate}")
    assert "device" in refused(script, "--device", "abacus")
