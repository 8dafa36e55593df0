"""The command: its options, its exit status, its JSON, and that it leaves no process behind. Nothing is timed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import rnnfast
from rnnfast import _core, reference
from rnnfast.bench import report
from rnnfast.bench.records import FIELDS
from rnnfast.cli import bench, info, main, selftest, selftest_cases

QUICK_RUN = ["bench", "--shape", "4,2,3,5", "--rounds", "1", "--threads", "1"]

WRONG = """
from rnnfast.bench.rivals import Job, numpy as right

def available(device):
    return None

def version():
    return "0"

def prepare(row, arrays, setup):
    job = right.prepare(row, arrays, setup)
    return Job(job.call, lambda: {**job.result(), "hn": job.result()["hn"] + 0.01})
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def environment() -> dict[str, str]:
    folders = [str(Path(rnnfast.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def plan(**options: Any) -> bench.Plan:
    names = (
        "suite cells modes shapes layers bidirectional ragged reset dtype device against threads json_path plot_path"
    )
    return bench.make_plan({**dict.fromkeys(names.split()), "shapes": (), "rounds": 3, **options})


# --- help and info ---------------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_loads_none() -> None:
    code = (
        "import sys\n"
        "from rnnfast.cli import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "finally:\n"
        "    print([name for name in ('rich', 'rnnfast.bench', 'torch') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("info", "selftest", "bench"))
    assert done.stdout.strip().endswith("[]")


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "rnnfast", "bench", "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert "--against" in done.stdout


def test_an_unknown_command_is_a_usage_error() -> None:
    assert invoke("train").exit_code == 2


def test_the_version() -> None:
    assert invoke("--version").output == f"rnnfast {rnnfast.__version__}\n"


def test_info_as_json() -> None:
    facts = json.loads(invoke("info", "--json").output)
    assert facts["version"] == rnnfast.__version__
    assert facts["isa"] == _core.isa()
    assert set(facts["isas"]) <= set(facts["compiled_isas"])
    assert all(peak > 0 for peak in facts["fma_peak_gflops"].values())
    assert isinstance(facts["cuda_built"], bool)


def test_info_as_a_table() -> None:
    shown = invoke("info").output
    assert _core.isa() in shown
    assert "CUDA" in shown


@pytest.mark.parametrize(
    ("arguments", "module", "function"), [(["info"], info, "collect"), (["selftest"], selftest, "run_isa")]
)
def test_an_interrupt_is_told_from_a_failure(
    arguments: list[str], module: Any, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupt)
    done = invoke(*arguments)
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


# --- the self-test ---------------------------------------------------------------------------------------------------


def test_the_kernels_pass_on_the_isa_in_use() -> None:
    advanced: list[None] = []
    lines = selftest.with_tolerances(selftest.run_isa(_core.isa(), lambda: advanced.append(None)))
    assert len(lines) == len(advanced) == 2 * len(reference.CELLS)
    assert [line for line in lines if not selftest.passes(line)] == []


def test_a_kernel_out_of_tolerance_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"isa": "scalar", "cell": "gru", "dtype": "float64", "cases": 1, "worst": (1e-9, 0.0), "peer": (0.0, 0.0)}
    monkeypatch.setattr(selftest, "run_isa", lambda isa, advance: [dict(line)])
    done = invoke("selftest")
    assert done.exit_code == 1
    assert "FAILED" in done.output


def test_another_isa_than_the_forced_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    code = 'print(\'{"isa": "scalar"}\')'
    monkeypatch.setattr(selftest, "_WORKER", ["-c", code])
    assert selftest.run_isa("avx2", lambda: None) == [{"isa": "avx2", "error": "RNNFAST_ISA=avx2 ran scalar"}]
    monkeypatch.setattr(selftest, "_WORKER", ["-c", "import sys; sys.exit('no such instruction')"])
    (line,) = selftest.run_isa("avx2", lambda: None)
    assert not selftest.passes(line)
    assert "no such instruction" in line["error"]


def test_float32_is_held_to_the_reference_in_float32() -> None:
    assert selftest_cases.tolerances("float64", (1.0, 1.0)) == (1e-12, 1e-11)
    forward, gradients = selftest_cases.tolerances("float32", (0.0, 1e-6))
    assert forward == pytest.approx(4 * 2**-23)
    assert gradients == pytest.approx(4e-6)


# --- options of bench ------------------------------------------------------------------------------------------------


def test_without_options_the_quick_suite_meets_numpy() -> None:
    made = plan()
    assert {row.suite for row in made.rows} == {"quick"}
    assert made.contenders == ("rnnfast", "numpy")
    assert made.device == "cpu"
    assert made.threads == rnnfast.get_num_threads()


def test_options_choose_and_change_rows() -> None:
    made = plan(suite="quick", cells=("gru",), modes=("train", "step"), layers=2, ragged=0.5)
    assert {row.family for row in made.rows} == {"gru"}
    assert {row.layers for row in made.rows} == {2}
    assert {row.ragged for row in made.rows if row.mode == "train"} == {0.5}
    assert {row.ragged for row in made.rows if row.mode == "step"} == {0.0}
    assert any(row.name == "GRU 64,32,256,256 x2 ragged 0.5" for row in made.rows)


def test_streamed_steps_beside_others_are_noted() -> None:
    assert plan(suite="quick", ragged=0.5).note == "streamed steps run without --ragged"
    assert plan(suite="quick", modes=("infer",), ragged=0.5).note == ""
    assert plan(suite="quick", modes=("step",), layers=2).note == ""


def test_the_relu_row_belongs_to_the_cell_rnn() -> None:
    assert {row.cell for row in plan(suite="real", cells=("rnn",)).rows} == {"rnn", "rnn_relu"}


def test_shapes_stand_alone_or_beside_a_suite() -> None:
    assert {row.suite for row in plan(shapes=((4, 2, 3, 5),)).rows} == {"custom"}
    assert {row.suite for row in plan(suite="quick", shapes=((4, 2, 3, 5),)).rows} == {"quick", "custom"}


def test_the_gpu_suite_is_on_the_gpu() -> None:
    assert plan(suite="gpu").device == "cuda"
    assert plan(suite="gpu", device="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shape", "4,2,3"], "T,B,I,H"),
        (["--shape", "4,2,3,0"], "positive"),
        (["--cell", "lstm,elman"], "elman"),
        (["--mode", ""], "infer"),
        (["--ragged", "0"], "--ragged"),
        (["--reset", "2"], "--reset"),
        (["--rounds", "0"], "--rounds"),
        (["--against", "tensorflow"], "tensorflow"),
        (["--against", "torch,mine/torch.py"], "expected rivals of different names, got torch and mine/torch.py"),
        (["--against", "rnnfast.py"], "expected rivals of different names, got rnnfast and rnnfast.py"),
        (["--json", "a.png", "--plot", "a.png"], "expected another file than --json"),
        (["--json", "/no/such/folder/a.json"], "folder"),
        (["--suite", "all"], "quick"),
        (["--mode", "step", "--ragged", "0.5", "--bidirectional"], "--ragged, --bidirectional: expected rows"),
        (["--mode", "step", "--reset", "0.1"], "--reset: expected rows"),
        (["--layers", "4096"], "--layers"),
    ],
)
def test_a_bad_option_is_a_usage_error(arguments: list[str], named: str) -> None:
    done = invoke("bench", *arguments)
    assert done.exit_code == 2
    assert named in done.output


def test_the_next_command_leads_on() -> None:
    assert report.next_command(["quick"], ("numpy",), [], False, False).startswith("pip install torch")
    assert report.next_command(["quick"], ("numpy",), ["torch", "jax"], False, False).endswith("--against torch,jax")
    assert "--suite real" in report.next_command(["quick"], ("torch",), ["torch"], False, False)
    assert "--plot" in report.next_command(["real"], ("torch",), ["torch"], False, False)
    assert "--suite square" in report.next_command(["real"], ("torch",), ["torch"], True, False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.0456, "45.6 ms"), (12.34e-6, "12.3 µs"), (5e-9, "5 ns"), (0.9996, "1000 ms")],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert report.seconds_text(seconds) == text


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_row_beyond_the_memory_is_refused_in_words() -> None:
    done = invoke("bench", "--cell", "lstm", "--mode", "infer", "--shape", "2000000000,1000,1000,4")
    assert done.exit_code == 1
    assert re.search(r"memory: expected arrays that fit the memory of \S+ GB, got \S+ GB at least", done.output)


def test_a_tiny_run_checks_and_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    done = invoke(*QUICK_RUN, "--mode", "infer,train,step", "--json", str(path))
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    rows = content["rows"]
    assert len(rows) == 3 * 3 * 2
    assert all(tuple(row) == (*FIELDS, "floor_s") for row in rows)
    assert {row["library"] for row in rows} == {"rnnfast", "numpy"}
    assert all(row["max_error"] < 1e-5 and row["rounds"] == 1 for row in rows)
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert content["provenance"]["isa"] == _core.isa()
    assert content["provenance"]["threads"] == 1
    assert "rnnfast bench" in done.stdout.partition("next: ")[2]  # after what has to be installed for it
    told = done.stderr.splitlines()  # a line for each row where there is no terminal
    assert [line.split()[0] for line in told] == [f"[{n}/9]" for n in range(1, 10)]
    assert all(": rnnfast " in line and ", numpy " in line for line in told)


def test_a_wrong_result_is_not_timed_and_fails(tmp_path: Path) -> None:
    wrong, path = tmp_path / "wrong.py", tmp_path / "a.json"
    wrong.write_text(WRONG)
    done = invoke(*QUICK_RUN, "--cell", "gru", "--mode", "infer", "--against", str(wrong), "--json", str(path))
    assert done.exit_code == 1
    assert "wrong: wrong result: hn" in done.output
    assert {row["library"] for row in json.loads(path.read_text())["rows"]} == {"rnnfast"}


def test_a_missing_rival_fails_before_anything_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    done = invoke(*QUICK_RUN, "--against", str(tmp_path / "none.py"), "--json", str(path))
    assert done.exit_code == 1
    assert "cannot run none" in done.output
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "cannot run mine: TypeError: contender: expected a Python file with available, version, prepare"),
        (WRONG.replace("def version", "def name"), "mine.py without version"),
        (WRONG.replace("return None", "return True"), "available: expected None or the reason why not, got True"),
        (WRONG.replace("return Job(", "return ("), "mine: TypeError: prepare: expected a Job of"),
    ],
)
def test_a_file_that_is_no_rival_is_told(text: str, words: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    done = invoke(*QUICK_RUN, "--cell", "rnn", "--mode", "infer", "--against", str(mine))
    assert done.exit_code == 1
    assert words in done.output.replace("\n", "")  # a long path may break the line


def test_a_link_names_the_folder_it_leads_to(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "none" / "a.json")
    done = invoke(*QUICK_RUN, "--json", str(link))
    assert done.exit_code == 2
    assert f"--json: the folder {tmp_path / 'none'} does not exist" in done.output


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    assert invoke(*QUICK_RUN, "--cell", "rnn", "--mode", "infer", "--json", str(link)).exit_code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["rows"]


def test_what_cannot_be_is_said_before_anything_is_timed(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments, words in (
        (("--json", str(pipe)), "expected a file, got"),
        (("--json", "/proc/none.json"), "--json: "),  # where there is no /proc it is the folder that is missing
        (("--plot", str(tmp_path / "a.txt")), "expected a file that ends in .png"),
        (("--threads", "256"), "expected at most"),
        (("--dtype", "float16"), "expected float32 or float64 on the CPU, got float16"),
    ):
        done = invoke("bench", "--shape", "4,2,3,5", *arguments)
        assert (done.exit_code, words in done.output) == (2, True), done.output
    assert pipe.is_fifo()


def test_an_interrupt_leaves_no_process() -> None:
    if not Path("/proc/self/task").is_dir():
        pytest.skip("this system has no /proc")
    arguments = ["bench", "--shape", "50,4,32,32", "--rounds", "100000", "--threads", "1"]
    command = [sys.executable, "-m", "rnnfast", *arguments]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        children = _wait_for_children(parent.pid, 3)
        time.sleep(0.5)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.wait(timeout=30) == 130
    assert [pid for pid in children if _lives(pid)] == []


def _wait_for_children(pid: int, count: int) -> list[int]:
    """The children of a process, once there are `count`."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    raise AssertionError(f"expected {count} children of the benchmark, got {found}")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("arguments", [["--ragged", "nan"], ["--reset", "nan"], ["--shape", "99999999999999,1,4,4"]])
def test_bench_refuses_what_is_no_size(arguments: list[str]) -> None:
    from rnnfast.cli.bench import command

    result = CliRunner().invoke(command, ["--shape", "5,2,4,4", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output
