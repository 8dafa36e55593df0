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


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """Files of 60 sequences: the first of two inputs summed up, the second's sign at the step before."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("sequences")
    x = random.standard_normal((60, 7, 2))
    np.savez(folder / "sums.npz", x=x, y=x[..., 0].sum(axis=1))
    signs = np.zeros((60, 7), np.int32)
    signs[:, 1:] = 1 + (x[:, :-1, 1] > 0)
    np.savez(folder / "signs.npz", x=x, y=signs)
    return folder


def test_own_sequences(script, sequences):
    options = "--cell", "gru", "--rates", 0.01, "--steps", 300, "--evaluate", 100
    output = succeed(script, "--data", sequences / "sums.npz", *options)
    found = re.search(r"^test loss on sums.npz: gru (\S+); guessing (\S+) \(2 trials", output, re.MULTILINE)
    assert float(found[1]) < 0.3 * float(found[2])
    output = succeed(script, "--data", sequences / "signs.npz", "--task", "copy", *options)
    found = re.search(r"^test loss on signs.npz: gru (\S+); guessing (\S+) \(2 trials", output, re.MULTILINE)
    assert float(found[1]) < 0.3 * float(found[2])


def test_own_sequences_are_split_once(script, sequences):
    problem = script.load(script.TINY, {"data": sequences / "sums.npz"})
    parts = problem.train, problem.valid, problem.test
    assert [x.shape for x, _ in parts] == [(7, 48, 2), (7, 6, 2), (7, 6, 2)]
    rows = np.concatenate([x.swapaxes(0, 1).reshape(-1, 14) for x, _ in parts])
    assert len(np.unique(rows, axis=0)) == 60
    for x, y in parts:
        np.testing.assert_allclose(x[..., 0].sum(axis=0), y[:, 0], atol=1e-5)
    assert problem.info["data"]["guess"] == pytest.approx(
        np.mean((problem.test[1] - problem.train[1].mean()) ** 2), rel=1e-5
    )


def test_own_sequences_resumed(script, sequences, tmp_path, monkeypatch):
    options = "--data", sequences / "signs.npz", "--task", "copy", "--cell", "gru"
    check_stop_and_resume(script, "Remembering", tmp_path, monkeypatch, 53, *options)
    again = "--save", tmp_path / "parts", "--resume", "--task", "copy", "--cell", "gru"
    assert "test loss on signs.npz: gru" in succeed(script, *again)
    with np.load(sequences / "signs.npz") as file:
        np.savez(tmp_path / "others.npz", x=file["x"] + 1, y=file["y"])
    assert "expected the data that" in refused(script, *again, "--data", tmp_path / "others.npz")


def test_malformed_sequences(script, tmp_path):
    def told(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return refused(script, "--data", tmp_path / "a.npz", *(("--task", "copy") if "task" in arrays else ()))

    x, y = np.ones((20, 4, 2)), np.ones(20)
    assert "cannot be read" in refused(script, "--data", tmp_path / "none.npz")
    assert "expected arrays x and y as numpy.savez writes them" in told(x=x)
    for content in (b"", b"PK\3\4 nothing", b"text"):
        (tmp_path / "b.npz").write_bytes(content)
        assert "expected arrays x and y as numpy.savez" in refused(script, "--data", tmp_path / "b.npz")
    np.save(tmp_path / "c.npy", x)
    assert "expected arrays x and y as numpy.savez" in refused(script, "--data", tmp_path / "c.npy")
    assert "expected arrays x and y as numpy.savez" in told(x=x, y=np.array([{}] * 20))
    assert "of 10 or more sequences, got float64 [20, 4]" in told(x=x[..., 0], y=y)
    assert "of 10 or more sequences, got float64 [9, 4, 2]" in told(x=x[:9], y=y[:9])
    assert "expected finite numbers x [N, T, I]" in told(x=x * np.nan, y=y)
    assert "numbers [N] or [N, O] as y, one for each of 20 sequences, got float64 [19]" in told(x=x, y=y[1:])
    assert "expected finite numbers [N] or [N, O] as y" in told(x=x, y=y * np.inf)
    assert "got <U1 [20]" in told(x=x, y=np.array(["a"] * 20))
    assert "expected finite integers [N, T] from 0 to at most 9999" in told(x=x, y=y, task=1)
    assert "expected finite integers [N, T] from 0 to at most 9999" in told(x=x, y=np.full((20, 4), -1), task=1)
