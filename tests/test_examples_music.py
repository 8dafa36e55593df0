"""examples/music.py: tiny runs, its parts, stop and resume, MIDI, malformed pieces."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, example_script, refused, succeed

script = example_script("music")


@pytest.fixture
def pieces(tmp_path):
    """Scales in thirds, of different lengths."""
    random = np.random.default_rng(0)
    parts = {
        part: [
            [[60 + (t + key) % 12, 64 + (t + key) % 12] for t in range(int(random.integers(3, 20)))]
            for key in range(12)
        ]
        for part in ("train", "valid", "test")
    }
    path = tmp_path / "pieces.json"
    path.write_text(json.dumps(parts))
    return path


def test_chorales_of_music21(script):
    pytest.importorskip("music21", reason="music21 is not installed")
    output = succeed(script, "--generate", 4)
    assert "music21's 8 chorales: 4 (195 steps) + 2 (100 steps) + 2 (191 steps) pieces" in output
    assert re.match(r"test \d+\.\d+ nats per step", output.splitlines()[-1])


def test_learns_scales_and_writes_them(script, pieces, tmp_path):
    mido = pytest.importorskip("mido", reason="mido is not installed")
    pytest.importorskip("matplotlib")
    options = "--data", pieces, "--hidden", 32, "--dropout", 0, "--noise", 0, "--transpose", 0
    outputs = "--midi", tmp_path / "a.mid", "--plot", tmp_path / "roll.png", "--voices", 2, "--temperature", 0
    output = succeed(script, *options, "--steps", 300, "--evaluate", 100, *outputs, "--generate", 12)
    assert float(re.search(r"^test (\S+) nats", output, re.MULTILINE)[1]) < 3.5  # the first step cannot be known: 2.5
    assert (tmp_path / "roll.png").read_bytes().startswith(b"\x89PNG")
    notes = [message for message in mido.MidiFile(tmp_path / "a.mid").tracks[0] if message.type.startswith("note")]
    on = {message.note for message in notes if message.type == "note_on"}
    assert len(on) > 4
    assert sum(message.type == "note_on" for message in notes) == sum(message.type == "note_off" for message in notes)
    assert sum(message.time for message in notes) == 12 * 480


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stopped_and_resumed(script, pieces, tmp_path, monkeypatch, cell):
    options = "--data", pieces, "--cell", cell, "--dropout", 0.3, "--noise", 0.05, "--transpose", 3
    check_stop_and_resume(script, "Composing", tmp_path, monkeypatch, 14, *options)


def test_the_figure(script):
    """Mean over all steps of all pieces of the sum over keys."""
    data = [script.roll_of([[60], [62, 64]]), script.roll_of([[60]] * 5)]
    model, _ = script.build(script.TINY, {}, "cpu")
    model.eval()
    total = 0.0
    for piece in data:
        x = np.concatenate([np.zeros((1, 88)), piece[:-1]]).astype(np.float32)
        logits = model(x[:, None], np.array([len(piece)]))[:, 0].astype(np.float64)
        total += np.log1p(np.exp(np.where(piece, -logits, logits))).sum()
    assert script.nats_per_step(model, data) == pytest.approx(total / 7, rel=1e-5)


def test_transposing(script):
    piece = script.roll_of([[60, 64], [21]])
    np.testing.assert_array_equal(script.transposed(piece, 2), script.roll_of([[62, 66], [23]]))
    assert script.transposed(piece, -1) is piece
    assert script.spell(piece[0]) == "C4 E4"


@pytest.mark.parametrize("keys", [[0, 39, 43], [40, 47], [60, 87], [0, 87]])
def test_every_note_is_drawn(script, tmp_path, monkeypatch, keys):
    """The pixel in the middle of every note is dark, and those of the other keys are not."""
    matplotlib_image = pytest.importorskip("matplotlib.image")
    roll = np.zeros((200, 88), bool)
    roll[np.arange(200), np.resize(keys, 200)] = True
    figures = []
    write = script.harness.write_picture
    monkeypatch.setattr(
        script.harness, "write_picture", lambda figure, path: (figures.append(figure), write(figure, path))
    )
    run = script.harness.new_run(script.SCRIPT, script.TINY, script.Music("t", "", {}))
    run.model.eval()
    script.plot_rolls(run, roll, tmp_path / "a.png")
    figure = figures[0]
    figure.set_dpi(150)
    pixels = matplotlib_image.imread(tmp_path / "a.png")
    steps, pitches = (part.ravel() for part in np.meshgrid(np.arange(200), np.arange(88), indexing="ij"))
    places = np.column_stack([steps + 0.5, pitches + script.LOWEST])
    x, y = figure.axes[0].transData.transform(places).astype(int).T
    dark = pixels[len(pixels) - 1 - y, x, 0] < 0.5
    np.testing.assert_array_equal(dark.reshape(200, 88), roll)


def test_keys_to_show(script):
    for pitches, keys in (([60, 64], (38, 45)), ([21], (0, 2)), ([108], (86, 88)), ([], (0, 88))):
        assert script.keys_to_show(script.roll_of([pitches])) == keys


def test_pitches_are_spelt_with_flats(script):
    assert script.spell(script.roll_of([[56, 58, 63]])[0]) == "Ab3 Bb3 Eb4"


def test_scores_in_a_folder(script, tmp_path):
    pytest.importorskip("music21", reason="music21 is not installed")
    pytest.importorskip("mido", reason="mido is not installed")
    roll = script.roll_of([[60, 64], [60, 65], [], [62]])
    for i in range(5):
        script.write_midi(roll, tmp_path / f"{i}.mid")
    _, pieces = script.read_folder(tmp_path, None)
    np.testing.assert_array_equal(pieces[0][:4], roll)
    (tmp_path / "9.mid").write_bytes(b"no music")
    assert "9.mid: expected a score that music21 can read" in refused(script, "--data", tmp_path)


def test_chorales_of_the_published_figures(script):
    folder = os.environ.get("RNNFAST_DATA")
    path = Path(folder or ".") / "music" / "jsb-chorales-quarter.json"
    if folder is None or not path.exists():
        pytest.skip("music/jsb-chorales-quarter.json of RNNFAST_DATA is not there")
    parts = script.read_json(path)
    assert [len(parts[part]) for part in script.PARTS] == [229, 76, 77]
    roll = np.concatenate(parts["train"])
    p = np.clip(roll.mean(axis=0), 1e-4, None)
    test = np.concatenate(parts["test"])
    marginal = -(test * np.log(p) + ~test * np.log1p(-p)).sum(axis=1).mean()
    assert marginal == pytest.approx(11.09, abs=0.1)


MALFORMED = {
    "no JSON": ("{", "expected JSON, got something else"),
    "a list": ("[]", "expected an object with pieces in train, valid, test"),
    "no test": ('{"train": [[[60]]], "valid": [[[60]]]}', "expected an object with pieces"),
    "numbers": ('{"train": [1], "valid": [1], "test": [1]}', "expected pieces that are lists of steps"),
    "words": ('{"train": [[["C"]]], "valid": [[[60]]], "test": [[[60]]]}', "expected pieces that are lists of steps"),
    "pitch": ('{"train": [[[6]]], "valid": [[[60]]], "test": [[[60]]]}', "expected pitches from 21 to 108, got 6"),
    "nothing": ('{"train": [[]], "valid": [[[60]]], "test": [[[60]]]}', "a piece without steps"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pieces(script, tmp_path, case):
    content, message = MALFORMED[case]
    (tmp_path / "pieces.json").write_text(content)
    assert message in refused(script, "--data", tmp_path / "pieces.json")


def test_missing_data(script, tmp_path, monkeypatch):
    assert "expected a JSON file or a folder with scores, found neither" in refused(script, "--data", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    pytest.importorskip("music21", reason="music21 is not installed")
    assert "expected at least 5 pieces, got 0" in refused(script, "--data", tmp_path / "empty")
    monkeypatch.setattr(script.harness, "find_spec", lambda name: None)
    assert "needs music21" in refused(script)
    assert "--midi needs mido" in refused(script, "--midi", tmp_path / "a.mid")
