"""examples/addition.py: tiny runs, the sums, kill and resume to the same bits, malformed data."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

from example_scripts import (
    EXAMPLES,
    assert_same_training,
    check_stop_and_resume,
    contents,
    example_script,
    refused,
    succeed,
)

torch = pytest.importorskip("torch", reason="torch is not installed")
script = example_script("addition")


def test_sums(script):
    train, valid, test = script.sums(2, 5000)
    assert [len(train), len(set(train))] == [5000, 5000]
    groups = [{frozenset(question.split("+")) for question, _ in part} for part in (train, valid, test)]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert len(groups[1]) == len(groups[2]) == 500
    for question, answer in train[:50] + valid[:50] + test[:50]:
        a, b = map(int, question.split("+"))
        assert a + b == int(answer)


def test_tiny(script, tmp_path):
    pytest.importorskip("matplotlib")
    output = succeed(script, "--ask", "12+30", "--plot", tmp_path / "answer.png")
    assert "sums of 2 digits: 300 + 989 + 995 questions" in output
    assert "12+30 → " in output
    assert re.match(r"test: \d+\.\d % of the answers right, \d+\.\d % of the characters", output.splitlines()[-1])
    assert (tmp_path / "answer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_learns_questions_of_a_file(script, tmp_path, cell):
    """The last letter comes first."""
    words = [a + b + c for a in "abcdef" for b in "abcdef" for c in "abcdef"]
    (tmp_path / "words.tsv").write_text("".join(f"{word}\t{word[2]}{word[:2]}\n" for word in words))
    options = "--data", tmp_path / "words.tsv", "--cell", cell, "--hidden", 32, "--steps", 700, "--evaluate", 350
    output = succeed(script, *options, "--batch", 16, "--lr", 0.02, "--ask", "abc")
    assert "abc → cab" in output
    assert float(re.search(r"(\S+) % of the characters", output)[1]) > 80.0


def test_accuracy(script):
    assert script.accuracy(["12", "3", "45"], ["12", "30", "46"], 3) == {"exact": 1 / 3, "characters": 7 / 9}


def test_questions_are_encoded_with_spaces_behind(script):
    codes = script.encode(["a", "bb", "x"], " ab", 2)
    assert codes.T.tolist() == [[1, 0], [2, 2], [0, 0]]


def test_stopped_and_resumed(script, tmp_path, monkeypatch):
    check_stop_and_resume(script, "Answering", tmp_path, monkeypatch, 14, "--cell", "gru")


def test_killed_and_resumed_ends_with_the_same_bits(script, tmp_path):
    options = ["--tiny", "--steps", "600", "--evaluate", "30", "--patience", "1000"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(EXAMPLES / "addition.py"), *options, "--save", str(killed), "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (killed.exists() and contents(killed)["user"]["step"]):
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    before = contents(killed)["user"]
    assert before["test"] is None, "killed too late to prove anything"
    succeed(script, *options, "--save", killed, "--resume")
    succeed(script, *options, "--save", whole)
    assert 0 < before["step"] < contents(killed)["user"]["step"] == 600
    assert_same_training(whole, killed)


MALFORMED = {
    "missing": (None, "cannot be read"),
    "one column": ("1+1\n" * 30, "line 1: expected 2 columns between tabs, got 1"),
    "few": ("1+1\t2\n" * 30, "expected at least 20 different questions, got 1"),
    "empty": ("".join(f"{i}\t\n" for i in range(30)), "expected questions and answers, got empty ones alone"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_questions(script, tmp_path, case):
    content, message = MALFORMED[case]
    if content is not None:
        (tmp_path / "pairs.tsv").write_text(content)
    assert message in refused(script, "--data", tmp_path / "pairs.tsv")


def test_more_sums_than_there_are(script):
    assert "--pairs: expected at most" in refused(script, "--digits", 1, "--pairs", 100)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "expected 1 to 5 characters, as the questions have, got ''"),
        ("123+456", "expected 1 to 5 characters, as the questions have, got '123+456'"),
        ("1-x", "expected characters among '+0123456789', got '-x'"),
    ],
)
def test_questions_that_cannot_be_read(script, question, message):
    assert message in refused(script, "--ask", question)


def test_the_file_has_the_permissions_of_any_new_one(script, tmp_path):
    (tmp_path / "new").touch()
    succeed(script, "--save", tmp_path / "model", "--steps", 1)
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "new"]


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_other_devices(script, device):
    assert f"--device {device}: expected cpu or cuda" in refused(script, "--device", device)
