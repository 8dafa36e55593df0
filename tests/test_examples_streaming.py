"""examples/streaming.py: what a stream hears, from a file and from standard input; stop and resume; malformed sounds."""

from __future__ import annotations

import re
import subprocess
import sys
import wave

import numpy as np
import pytest

from example_scripts import EXAMPLES, check_stop_and_resume, example_script, invoke, refused, succeed

script = example_script("streaming")


def write_wave(path, samples, rate=8000, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """A file of a finished training, and raw samples of keys that it has not heard."""
    folder = tmp_path_factory.mktemp("keys")
    options = "--steps", 120, "--evaluate", 40, "--hidden", 32, "--batch", 6
    output = succeed(script, *options, "--save", folder / "model")
    assert "telephone keys" in output
    run = script.harness.resume(script.SCRIPT, folder / "model")
    samples = (script.example_sound(run).ravel() * 32767).astype("<i2")
    return folder / "model", samples.tobytes()


def test_hears_frame_by_frame(script, trained, tmp_path):
    pytest.importorskip("matplotlib")
    model, _ = trained
    output = succeed(
        script,
        "--save",
        model,
        "--resume",
        "--steps",
        120,
        "--hidden",
        32,
        "--batch",
        6,
        "--evaluate",
        40,
        "--plot",
        tmp_path / "a.png",
    )
    assert "trained already" in output
    found = re.search(r"625 frames of 16 ms, from samples to answer: p50 (\d+) µs, p99 (\d+) µs; as the whole", output)
    assert 0 < int(found[1]) <= int(found[2])
    assert float(re.search(r"^test (\S+) % of the frames right", output, re.MULTILINE)[1]) > 40
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_from_a_file_and_from_standard_input(script, trained, tmp_path):
    model, samples = trained
    path = write_wave(tmp_path / "keys.wav", samples)
    again = "--save", model, "--resume", "--listen"
    heard = script_output(*again, path)
    assert heard == script_output(*again, "-", stdin=path.read_bytes()) == script_output(*again, "-", stdin=samples)
    stereo = np.repeat(np.frombuffer(samples, "<i2"), 2).tobytes()
    assert heard == script_output(*again, write_wave(tmp_path / "stereo.wav", stereo, channels=2))
    assert len(heard.split()) > 5


def script_output(*arguments, stdin=b""):
    """What was heard: the first line after "trained already"."""
    command = [sys.executable, str(EXAMPLES / "streaming.py"), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=True)
    return done.stdout.decode().splitlines()[1]


def test_a_difference_is_an_error(script, trained, monkeypatch):
    model, _ = trained
    monkeypatch.setattr(script, "DIFFERENCE", 0.0)
    monkeypatch.setattr(
        script, "spectra", lambda samples: np.zeros((len(samples) // script.HOP, script.FREQUENCIES), np.float32)
    )
    result = invoke(script, "--save", model, "--resume", "--steps", 120, "--hidden", 32, "--batch", 6, "--evaluate", 40)
    assert result.exit_code == 1
    assert "the stream and the whole sequence differ by" in result.output


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stopped_and_resumed(script, tmp_path, monkeypatch, cell):
    options = "--cell", cell, "--layers", 2, "--dropout", 0.3
    check_stop_and_resume(script, "Listening", tmp_path, monkeypatch, 15, *options)


def test_a_folder_of_sounds(script, tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "sounds").mkdir()
    for i in range(20):
        tone = np.sin(np.arange(int(random.integers(900, 1500))) * (0.2 + 0.3 * (i % 2)))
        name = f"sounds/{'low' if i % 2 == 0 else 'high'}_{i:02d}.wav"
        write_wave(tmp_path / name, (tone * 9000).astype("<i2").tobytes())
    folder, saved = tmp_path / "sounds", ("--save", tmp_path / "model")
    output = succeed(script, "--data", folder, "--steps", 100, "--evaluate", 50, *saved)
    assert "frames of 16 ms to train, validate and test, 2 labels" in output
    heard = re.search(r"^((low|high) )+$", output, re.MULTILINE)[0]
    assert float(re.search(r"^test (\S+) % of the frames right", output, re.MULTILINE)[1]) > 90
    again = *saved, "--resume", "--steps", 100, "--evaluate", 50
    assert heard in succeed(script, *again, "--data", folder)  # the same sound, not keys, which it does not know
    assert "expected a WAV file or -, or --data as in the training, of high, low" in refused(script, *again)


def test_frames_as_they_come(script):
    samples = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    frames = script.spectra(samples)
    assert frames.shape == (7, 129)
    np.testing.assert_array_equal(frames[3], script.spectrum(samples[4 * 128 - 256 : 4 * 128]))


def test_malformed_sounds(script, trained, tmp_path):
    model, samples = trained
    listen = "--save", model, "--resume", "--steps", 120, "--hidden", 32, "--batch", 6, "--evaluate", 40, "--listen"
    assert "cannot be read" in refused(script, *listen, tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no sound")
    assert "text.wav: expected a WAV file (PCM), got" in refused(script, *listen, tmp_path / "text.wav")
    (tmp_path / "empty.wav").write_bytes(b"")
    assert "(PCM), got: an empty or truncated file" in refused(script, *listen, tmp_path / "empty.wav")
    (tmp_path / "empty.wav").unlink()
    write_wave(tmp_path / "fast.wav", samples, rate=44100)
    assert "expected 8000 samples a second, as the model was trained with, got 44100" in refused(
        script, *listen, tmp_path / "fast.wav"
    )
    write_wave(tmp_path / "wide.wav", samples, width=4)
    assert "expected 16 bits a sample, got 32" in refused(script, *listen, tmp_path / "wide.wav")
    write_wave(tmp_path / "short.wav", samples[:100])
    assert "expected at least 128 samples, got 50" in refused(script, *listen, tmp_path / "short.wav")
    assert "expected a folder, got nothing of that name" in refused(script, "--data", tmp_path / "nowhere")
    assert "expected a folder, got a file" in refused(script, "--data", tmp_path / "text.wav")
    assert "expected files named LABEL_anything.wav, got fast.wav" in refused(script, "--data", tmp_path)
    for i in range(12):
        write_wave(tmp_path / f"{i % 2}_{i}.wav", samples[:4000], rate=8000 + i)
    for file in ("text", "fast", "wide", "short"):
        (tmp_path / f"{file}.wav").unlink()
    assert "expected one sample rate" in refused(script, "--data", tmp_path)


def test_every_file_a_label_of_its_own(script, tmp_path):
    for i in range(12):
        write_wave(tmp_path / f"take{i}_a.wav", bytes(1000))
    assert "not each with its own, got 12 files with 12 labels" in refused(script, "--data", tmp_path)


def test_what_to_listen_to_is_read_before_the_training(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.harness, "train", lambda *arguments: pytest.fail("trained"))
    write_wave(tmp_path / "fast.wav", bytes(1000), rate=44100)
    assert "expected 8000 samples a second" in refused(script, "--listen", tmp_path / "fast.wav")
