"""examples/speech.py: tiny runs on recordings of tones, features, CTC's parts, stop and resume, malformed data."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import re
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest

from example_scripts import check_stop_and_resume, example_script, invoke, refused, succeed

torch = pytest.importorskip("torch", reason="torch is not installed")
script = example_script("speech")
RATE = 8000


def wav(samples, rate=RATE, width=2, channels=1):
    """The bytes of a WAV file with these samples, -1 to 1."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(width)
        writer.setframerate(rate)
        scaled = np.round(np.asarray(samples) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
        scaled = scaled + 128 if width == 1 else scaled
        writer.writeframes(b"".join(int(s).to_bytes(width, "little", signed=width > 1) for s in scaled))
    return file.getvalue()


def tones(text, random):
    """Every letter has a tone of its own, of 60 to 90 ms, and there is noise."""
    pieces = []
    for letter in text:
        t = np.arange(int(RATE * random.uniform(0.06, 0.09))) / RATE
        pieces.append(0.5 * np.sin(2.0 * np.pi * 300.0 * (1 + ord(letter) - ord("a")) * t))
        pieces.append(np.zeros(int(RATE * 0.03)))
    samples = np.concatenate(pieces)
    return np.clip(samples + 0.01 * random.standard_normal(len(samples)), -1.0, 1.0)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Sixty recordings of two to five letters of abcd, one in a folder of its own, and their transcripts."""
    folder, random = tmp_path_factory.mktemp("spoken"), np.random.default_rng(0)
    (folder / "more").mkdir()
    lines = ["; letters\n", "\n"]
    for i in range(60):
        text = "".join(random.choice(list("abcd"), random.integers(2, 6)))
        name = f"more/{i}" if i == 7 else str(i)
        (folder / f"{name}.wav").write_bytes(wav(tones(text, random)))
        lines.append(f"{name}: {text.upper()}.\n")
    (folder / "texts.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Ten recordings of three digits by two speakers, named as in FSDD, as an archive."""
    path, random = tmp_path_factory.mktemp("digits") / "digits.tar.gz", np.random.default_rng(1)
    with tarfile.open(path, "w:gz") as archive:
        for speaker in ("ann", "bob"):
            for digit, text in enumerate(("a", "d", "h")):
                for index in range(10):
                    content = wav(tones(text, random))
                    entry = tarfile.TarInfo(f"./{digit}_{speaker}_{index}.wav")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return path


def options_of(spoken, *more):
    return "--data", spoken, "--transcripts", spoken / "texts.txt", *more


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_learns_to_spell(script, spoken, tmp_path):
    pytest.importorskip("matplotlib")
    learning = (
        "--steps",
        240,
        "--evaluate",
        80,
        "--lr",
        0.02,
        "--hidden",
        24,
        "--dropout",
        0,
        "--mask",
        0,
        "--batch",
        16,
    )
    output = succeed(
        script, *options_of(spoken, *learning), "--plot", tmp_path / "a.png", "--transcribe", spoken / "3.wav"
    )
    last = output.splitlines()[-1]
    assert float(re.match(r"test: (\S+) % of the characters wrong, \S+ % of the words; \S+ % exact", last)[1]) < 30.0
    assert "3.wav → " in output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("cell", "split"), [("gru", "official"), ("rnn", "bob")])
def test_learns_digits(script, digits, tmp_path, cell, split):
    pytest.importorskip("matplotlib")
    options = (
        "--data",
        digits,
        "--unit",
        "recordings",
        "--features",
        "mfcc",
        "--stack",
        1,
        "--speeds",
        2,
        "--cell",
        cell,
    )
    learning = "--split", split, "--steps", 60, "--lr", 0.01, "--dropout", 0, "--plot", tmp_path / "a.png"
    output = succeed(script, *options, *learning)
    assert float(re.search(r"^test: .* (\S+) % exact", output, re.MULTILINE)[1]) == 100.0


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_stopped_and_resumed(script, spoken, tmp_path, monkeypatch, cell):
    options = options_of(spoken, "--cell", cell, "--layers", 2, "--dropout", 0.3, "--mask", 0.2, "--speeds", 2)
    check_stop_and_resume(script, "Recognising", tmp_path, monkeypatch, 14, *options)
    output = succeed(script, *options[4:], "--save", tmp_path / "parts", "--resume", "--transcribe", spoken / "0.wav")
    assert "trained already" in output
    (tmp_path / "fast.wav").write_bytes(wav(np.zeros(900), rate=16_000))
    more = "--save", tmp_path / "parts", "--resume", "--transcribe", tmp_path / "fast.wav"
    assert "expected 8000 samples a second, as in the training, got 16000" in refused(script, *options[4:], *more)


def test_prompts_of_debian_are_the_default(script, spoken, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DEBIAN", tmp_path / "none")
    assert "apt install asterisk-core-sounds-en-wav" in refused(script)
    transcripts = tmp_path / "texts.txt.gz"
    transcripts.write_bytes(gzip.compress((spoken / "texts.txt").read_bytes()))
    monkeypatch.setattr(script, "DEBIAN", spoken)
    monkeypatch.setattr(script, "DEBIAN_TRANSCRIPTS", transcripts)
    assert "46 + 6 + 8 recordings" in " ".join(succeed(script, "--steps", 2).split())


# Recordings and their parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_wav(script, width):
    samples = np.linspace(-1.0, 1.0, 50)
    rate, read = script.read_wav("a", wav(samples, width=width))
    assert rate == RATE
    np.testing.assert_allclose(read, samples, atol=2.0 / 2 ** (8 * width - 1) + 1e-7)
    _, mean = script.read_wav("a", wav(samples, width=width, channels=2))
    np.testing.assert_allclose(mean, samples.reshape(-1, 2).mean(axis=1), atol=2.0 / 2 ** (8 * width - 1) + 1e-7)


def test_plain_words(script):
    assert script.plain_words("Please press, or say: 'star'!") == "please press or say 'star'"
    assert script.plain_words("De-activated.") == "de activated"
    assert script.plain_words("¡Olé") == ""
    assert script.plain_words("[beep]") == script.plain_words("press 1") == ""


@pytest.mark.parametrize("how", ["random", "official", "bob"])
def test_parts(script, how):
    names = [f"{digit}_{speaker}_{i}" for digit in range(3) for speaker in ("ann", "bob") for i in range(20)]
    recordings = [script.Recording(name, "zero", np.ones(9, np.float32)) for name in names]
    parts = [[recording.name for recording in part] for part in script.split("t", recordings, how, "words")]
    assert sorted(itertools.chain(*parts)) == sorted(names)
    assert [len(part) for part in parts] == {"random": [96, 12, 12], "official": [80, 10, 30], "bob": [53, 7, 60]}[how]
    if how == "official":
        assert {int(name.split("_")[2]) for name in parts[2]} == set(range(5))
    if how == "bob":
        assert {name.split("_")[1] for name in parts[2]} == {"bob"}


def test_no_text_is_in_two_parts(script):
    recordings = [script.Recording(str(i), f"text {i // 3}", np.ones(9, np.float32)) for i in range(90)]
    parts = [{recording.text for recording in part} for part in script.split("t", recordings, "random", "characters")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 30
    assert min(map(len, parts)) >= 3


# Features ------------------------------------------------------------------------------------------------------------


def test_log_mel_hears_a_tone(script):
    energies = script.log_mel(np.sin(2.0 * np.pi * 1000.0 * np.arange(RATE) / RATE), RATE)
    assert energies.shape == (98, 40)
    highest = 2595.0 * np.log10(1.0 + RATE / 2 / 700.0)
    band = 2595.0 * np.log10(1.0 + 1000.0 / 700.0) / highest * 41 - 1
    assert np.abs(energies.argmax(axis=1) - band).max() <= 1.0


@pytest.mark.parametrize("kind", ["logmel", "mfcc"])
def test_loudness_does_not_matter(script, kind):
    samples = 0.3 * np.random.default_rng(0).standard_normal(4000)
    loud, quiet = (script.features_of(gain * samples, RATE, kind) for gain in (1.0, 0.5))
    assert loud.shape == (48, script.FEATURES[kind])
    np.testing.assert_allclose(loud, quiet, atol=1e-3)
    assert script.features_of(samples[:7], RATE, kind).shape == (1, script.FEATURES[kind])


def test_cepstrum_and_slopes(script):
    np.testing.assert_allclose(script.cosines() @ script.cosines().T, np.eye(13), atol=1e-12)
    line = np.outer(np.arange(9.0), [1.0, -2.0])
    np.testing.assert_allclose(script.slope(line)[2:-2], np.broadcast_to([1.0, -2.0], (5, 2)))


def test_frames_are_stacked(script):
    info = {"mean": [1.0, 2.0], "deviation": [2.0, 4.0], "stack": 2}
    x = script.stack_frames(np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]]), info)
    np.testing.assert_array_equal(x, np.array([[0, 0, 1, 1], [2, 2, 0, 0]], np.float32))


def test_hiding(script):
    x, settings = np.ones((40, 20), np.float32), script.Settings(mask=0.25, stack=2)
    hidden = [script.hide(x, settings, np.random.default_rng(seed)) for seed in range(50)]
    rows = [(h == 0).all(axis=1).sum() for h in hidden]
    columns = [(h == 0).all(axis=0).sum() for h in hidden]
    assert 10 < max(rows) <= 20
    assert 4 <= max(columns) <= 8
    assert (x == 1).all()


# CTC -----------------------------------------------------------------------------------------------------------------


def test_collapse(script):
    assert script.collapse(torch.tensor([0, 1, 1, 0, 1, 2, 2, 0]), ["a", "b"]) == ["a", "a", "b"]
    assert script.collapse(torch.tensor([0, 0]), ["a"]) == []


def test_edits(script):
    assert script.edits("kitten", "sitting") == 3
    assert script.edits("", "abc") == script.edits("abc", "") == 3
    assert script.edits(["a", "b"], ["a", "b"]) == 0


def test_steps_needed(script):
    assert script.steps_needed(list("hello")) == 6
    assert script.steps_needed([]) == 0


@pytest.mark.parametrize("unit", ["characters", "recordings"])
def test_neighbours_in_a_batch_do_not_matter(script, unit):
    model, _ = script.build(
        script.Settings(hidden=8, unit=unit, dropout=0.0), {"features": "logmel", "stack": 1, "symbols": "ab"}, "cpu"
    )
    features = [
        np.random.default_rng(i).standard_normal((size, 40)).astype(np.float32) for i, size in enumerate((9, 4))
    ]
    with torch.no_grad():
        both, lengths = model(*script.pad(features, "cpu"))
        for i, x in enumerate(features):
            alone, length = model(*script.pad([x], "cpu"))
            assert lengths[i] == length[0] == (1 if unit == "recordings" else len(x))
            torch.testing.assert_close(both[: lengths[i], i], alone[:, 0])


# Malformed -----------------------------------------------------------------------------------------------------------


def test_missing_data(script, spoken, digits, tmp_path):
    assert "none: cannot be read" in refused(script, "--data", tmp_path / "none")
    assert "expected WAV files, found none" in refused(script, "--data", tmp_path)
    assert "none.txt: cannot be read" in refused(script, "--data", spoken, "--transcripts", tmp_path / "none.txt")
    assert "use --transcripts" in refused(script, "--data", spoken)
    assert "speakers in digits.tar.gz: ann, bob" in refused(script, "--data", digits, "--split", "carl")
    assert "--split official: expected names" in refused(script, *options_of(spoken), "--split", "official")
    assert "expected at least 20 recordings with plain words, got 0" in refused(
        script, "--data", digits, "--longest", 0.01
    )
    assert "expected more than 3 different texts to spell" in refused(script, "--data", digits)
    assert "--device abacus" in refused(script, *options_of(spoken), "--device", "abacus")
    assert invoke(script, "--unit", "letters").exit_code == 2


MALFORMED = {
    "no WAV": (b"no sound", "a.wav: expected a WAV file of PCM samples"),
    "cut off": (wav(np.zeros(99))[:20], "a.wav: expected a WAV file of PCM samples"),
    "empty": (b"", "a.wav: expected a WAV file of PCM samples"),
    "24 bits": (wav(np.zeros(99), width=3), "a.wav: expected samples of 8, 16 or 32 bits, got 24"),
    "other rate": (wav(np.zeros(99), rate=16_000), "expected one sampling rate, got 16000 in a and 8000 in b"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_recordings(script, tmp_path, case):
    content, message = MALFORMED[case]
    (tmp_path / "a.wav").write_bytes(content)
    (tmp_path / "b.wav").write_bytes(wav(np.zeros(99)))
    assert message in refused(script, "--data", tmp_path)


@pytest.mark.parametrize("content", [b"no sound", b"", wav([]), wav(np.zeros(99), rate=16_000)])
def test_recordings_to_transcribe_are_read_before_the_training(script, spoken, tmp_path, monkeypatch, content):
    monkeypatch.setattr(script.harness, "train", lambda *arguments: pytest.fail("trained"))
    (tmp_path / "a.wav").write_bytes(content)
    assert "a.wav: expected" in refused(script, *options_of(spoken), "--transcribe", tmp_path / "a.wav")


def test_validation_is_a_share_of_errors(script, spoken):
    """The loss decides between equals, but is no part of what is shown."""
    settings = script.TINY
    data = script.load(settings, {"data": [spoken], "transcripts": spoken / "texts.txt"})
    run, task = script.harness.new_run(script.SCRIPT, settings, data), script.Recognising(data)
    script.harness.evaluate(run, task, 1.0, None)
    run.model.eval()
    wrong, symbols = task.errors(run, data.valid, "characters")
    assert run.curve[0][2] == 100.0 * wrong / symbols
    assert 0.0 < run.best - run.curve[0][2] < 100.0 / symbols
    assert f"(validation {100.0 * wrong / symbols:.3f} % wrong, " in script.harness.summary(run, task, "test")


def test_malformed_archives_and_transcripts(script, digits, tmp_path):
    for name, content in (("a.tar.gz", b"no archive"), ("b.tar.gz", digits.read_bytes()[:-100])):
        (tmp_path / name).write_bytes(content)
        assert "expected a folder or a .tar.gz of WAV files" in refused(script, "--data", tmp_path / name)
    (tmp_path / "c.wav").write_bytes(wav(np.zeros(99)))
    assert "of WAV files, got a WAV file" in refused(script, "--data", tmp_path / "c.wav")
    for name, content, message in (
        ("d.txt", b"other: one\n", "expected names of recordings of"),
        ("e.txt", b"; nothing\n", "such as '0_ann_0', got none"),
        ("a.txt", b"ann\n", 'line 1: expected "name: text"'),
        ("b.txt", b"\xff\n", "expected text in UTF-8"),
        ("c.txt.gz", b"a: b\n", "expected compressed text in UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refused(script, "--data", digits, "--transcripts", tmp_path / name)


# The data of the figures ---------------------------------------------------------------------------------------------


def data_file(name):
    folder = os.environ.get("RNNFAST_DATA")
    path = Path(folder or ".") / "speech" / name
    if folder is None or not path.exists():
        pytest.skip(f"speech/{name} of RNNFAST_DATA is not there")
    return path


def test_spoken_digits(script):
    rate, recordings = script.read_recordings([data_file("fsdd_nicolas.tar.gz")])
    texts = script.digit_names(recordings)
    assert (rate, len(recordings), len(texts)) == (8000, 500, 500)
    assert texts["7_nicolas_32"] == "seven"


def test_prompts(script):
    rate, recordings = script.read_recordings([data_file("asterisk_en_le2s.tar.gz")])
    texts = script.read_transcripts(data_file("core-sounds-en.txt"))
    assert (rate, len(recordings), len(texts)) == (8000, 350, 569)
    assert all(name in texts for name in recordings)
    assert texts["auth-thankyou"] == "Thank you."
    assert sum(len(samples) for samples in recordings.values()) / rate / 60 == pytest.approx(6.25, abs=0.05)
