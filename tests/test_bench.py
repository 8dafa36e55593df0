"""The benchmark's parts: rows and flops, inputs, rivals, checks, floors, records, summaries. Nothing is timed."""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rnnfast.bench.rivals as rivals
from rnnfast import reference
from rnnfast.bench import check, contender, floor, machine, plot, probes, records, suites, summary
from rnnfast.bench.arrays import STREAM_STEPS, make_arrays, make_lengths, reversal, row_steps
from rnnfast.bench.rows import CELLS, Row, recurrent_weights, shape_name, useful_flops
from rnnfast.bench.worker import serve

ROOT = Path(__file__).resolve().parent.parent
TINY = Row("custom", "tiny", "lstm", "infer", T=5, B=3, I=4, H=6)


def variants(cell: str) -> list[Row]:
    """Rows of one cell with every option, alone and together."""
    base = TINY.with_(cell=cell, dtype="float64")
    found = [
        base.with_(mode=mode, layers=layers, bidirectional=both, ragged=ragged, reset=reset)
        for mode, (layers, both), ragged, reset in itertools.product(
            ("infer", "train"), ((1, False), (2, False), (2, True)), (0.0, 0.5), (0.0, 0.3)
        )
    ]
    return [*found, base.with_(mode="step", T=1), base.with_(mode="step", T=1, layers=2)]


# --- rows ------------------------------------------------------------------------------------------------------------


def test_flops_count_gate_products_of_valid_steps() -> None:
    assert useful_flops(TINY, 15) == 2 * 4 * 6 * (4 + 6) * 15
    assert useful_flops(TINY.with_(mode="train"), 15) == 3 * useful_flops(TINY, 15)
    assert useful_flops(TINY.with_(cell="gru"), 15) * 4 == useful_flops(TINY, 15) * 3
    assert useful_flops(TINY.with_(cell="rnn_relu"), 7) == 2 * 6 * (4 + 6) * 7


def test_flops_of_stacked_directions() -> None:
    stacked = TINY.with_(layers=2, bidirectional=True)
    assert useful_flops(stacked, 15) == 2 * (2 * 4 * 6) * ((4 + 6) + (12 + 6)) * 15


def test_recurrent_weights_include_the_input_ones_only_for_single_steps() -> None:
    assert recurrent_weights(TINY) == 4 * 6 * 6
    assert recurrent_weights(TINY.with_(T=1)) == 4 * 6 * (4 + 6)
    assert recurrent_weights(TINY.with_(layers=2, bidirectional=True)) == 4 * (4 * 6 * 6)


def test_size_classes() -> None:
    shapes = {(1, 128): "small", (16, 64): "small", (32, 256): "middle", (64, 512): "large"}
    for (batch, size), expected in shapes.items():
        assert TINY.with_(B=batch, I=size, H=size).size_class == expected


@pytest.mark.parametrize(
    ("field", "value"), [("cell", "elman"), ("mode", "both"), ("H", 0), ("ragged", 1.5), ("reset", -0.1)]
)
def test_a_bad_row_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        TINY.with_(**{field: value})


def test_a_streamed_step_has_one_step() -> None:
    with pytest.raises(ValueError, match="mode"):
        TINY.with_(mode="step")


def test_shape_names() -> None:
    assert shape_name(TINY) == "LSTM 5,3,4,6"
    assert shape_name(TINY.with_(layers=2, bidirectional=True, ragged=0.5)) == "LSTM 5,3,4,6 x2 bi ragged 0.5"


# --- suites ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", suites.SUITES)
def test_rows_of_a_suite_are_distinct_and_of_one_device(suite: str) -> None:
    rows = suites.rows_of(suite)
    assert len(set(rows)) == len(rows)
    assert {row.suite for row in rows} == {suite}
    assert {row.device for row in rows} == {"cuda" if suite == "gpu" else "cpu"}


def test_quick_has_all_cells_and_modes() -> None:
    rows = suites.rows_of("quick")
    assert {(row.cell, row.mode) for row in rows} >= set(itertools.product(CELLS, ("infer", "train", "step")))


def test_real_has_the_rows_of_its_issue() -> None:
    shapes = {row.name: (row.cell, row.layers, row.T, row.B, row.I, row.H) for row in suites.rows_of("real")}
    assert len(shapes) == 24
    assert shapes["TorchRL"] == ("gru", 1, 128, 128, 256, 256)
    assert shapes["AWD-LSTM"] == ("lstm", 3, 70, 40, 400, 1150)
    assert shapes["PsychRNN"] == ("rnn_relu", 1, 200, 64, 2, 50)
    assert {row.name for row in suites.rows_of("real") if row.ragged} == {"BiLSTM tagger", "speech BiLSTM", "chorales"}


def test_the_gpu_suite_fits_its_budget() -> None:
    assert 100 <= len(suites.rows_of("gpu")) <= 160


def test_shapes_become_rows_and_steps_have_one_step() -> None:
    rows = suites.rows_of_shapes([(7, 2, 3, 5)], ["lstm", "gru"], ["train", "step"], dtype="float64")
    assert [(row.cell, row.mode, row.T, row.dtype) for row in rows] == [
        ("lstm", "train", 7, "float64"),
        ("lstm", "step", 1, "float64"),
        ("gru", "train", 7, "float64"),
        ("gru", "step", 1, "float64"),
    ]


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_arrays_are_the_same_at_every_call_and_shaped_as_torch_has_them() -> None:
    row = TINY.with_(layers=2, bidirectional=True, ragged=0.5, reset=0.2, mode="train")
    first, second = make_arrays(row), make_arrays(row)
    assert first.x.shape == (5, 3, 4)
    assert [state.shape for state in first.hx] == [(4, 3, 6)] * 2
    assert first.weights["weight_ih_l1_reverse"].shape == (24, 12)
    assert first.grad_output.shape == (5, 3, 12)
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert np.array_equal(first.x, second.x)
    assert first.x.dtype == np.float32
    assert make_arrays(row.with_(dtype="float64")).x.dtype == np.float64


def test_narrow_types_get_inputs_that_they_hold_exactly() -> None:
    half = make_arrays(TINY.with_(dtype="float16"))
    assert np.array_equal(half.x.astype(np.float16).astype(np.float32), half.x)
    brain = make_arrays(TINY.with_(dtype="bfloat16"))
    assert not (brain.x.view(np.uint32) & 0xFFFF).any()
    assert np.abs(brain.x).max() > 0.5


def test_a_stream_is_checked_over_several_steps() -> None:
    assert make_arrays(TINY.with_(T=1, mode="step")).x.shape == (STREAM_STEPS, 3, 4)
    assert row_steps(TINY.with_(T=1, mode="step")) == 3


@pytest.mark.parametrize("fraction", [0.1, 0.37, 0.7, 1.0])
def test_lengths_have_the_mean_that_was_asked_for(fraction: float) -> None:
    lengths = make_lengths(TINY.with_(T=200, B=64, ragged=fraction), np.random.default_rng(0))
    assert lengths is not None
    assert lengths.min() >= 1
    assert lengths.max() == 200
    assert lengths.mean() / 200 == pytest.approx(fraction, abs=0.02)


def test_reversal_is_an_involution_about_each_end() -> None:
    x = np.arange(10.0).reshape(5, 2)
    index = reversal(np.array([3, 5]), 5, 2)
    assert x[index][:, 0].tolist() == [4, 2, 0, 6, 8]
    assert np.array_equal(x[index][index], x)


# --- rivals ----------------------------------------------------------------------------------------------------------

INSTALLED = [name for name in ("torch", "onnxruntime", "jax") if importlib.util.find_spec(name)]


def worst_error(library: str, row: Row) -> float:
    arrays = make_arrays(row)
    module, variant = rivals.load(library)
    job = module.prepare(row, arrays, rivals.Setup(1, "cpu", variant))
    job.call()  # a result must not depend on what was called before
    return max(check.errors(row, job.result(), check.compute_truth(row, arrays)).values())


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize("library", ["numpy", "rnnfast"])
def test_numpy_and_rnnfast_agree_with_the_reference(library: str, cell: str, restore_sharing: None) -> None:
    for row in variants(cell):
        assert worst_error(library, row) < 1e-11, row


def test_every_gradient_is_checked() -> None:
    row = TINY.with_(mode="train", layers=2)
    truth = check.compute_truth(row, make_arrays(row))
    names = [f"grad_{name}" for name in make_arrays(row).weights]
    assert set(truth) == {"output", "hn", "cn", "grad_x", *names}


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize("library", ["torch", "onnxruntime", "jax"])
def test_rivals_agree_with_the_reference(library: str, cell: str, restore_sharing: None) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    if library == "onnxruntime":
        pytest.importorskip("onnx", reason="onnx is not installed")
    rows = [row for row in variants(cell) if row.layers == 2 or row.mode == "step"]
    ran = 0
    for row in rows[::4] if library == "jax" else rows:
        try:
            error = worst_error(library, row.with_(dtype="float32"))
        except rivals.Unsupported:
            continue
        assert error < 1e-5, row
        ran += 1
    assert ran >= 4


def test_contenders_by_name_and_by_file(tmp_path: Path) -> None:
    assert rivals.load("torch-bf16" if "torch" in INSTALLED else "numpy")[1] in ("bf16", "")
    own = tmp_path / "mine.py"
    own.write_text("def version(): return '7'\navailable = prepare = print\n")
    assert rivals.load(str(own))[0].version() == "7"
    assert rivals.label(str(own)) == "mine"
    with pytest.raises(FileNotFoundError, match="contender"):
        rivals.load(str(tmp_path / "none.py"))
    assert not rivals.is_known("tensorflow")


# --- the child process -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/PID/maps here")
def test_a_rival_process_loads_no_extension_module() -> None:
    for name, loads in (("numpy", False), ("rnnfast", True)):
        with contender.Contender(name, threads=1) as child:
            assert child.open() is None
            assert ("/_core." in Path(f"/proc/{child._process.pid}/maps").read_text()) is loads


def test_a_file_may_be_about_this_package(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import rnnfast\n"
        "def available(device):\n"
        "    return repr(rnnfast.LSTM(2, 3))\n"
        "def version():\n"
        "    return rnnfast.__version__\n"
        "prepare = print\n"
    )
    with contender.Contender(str(own), threads=1) as child:
        assert child.open() == "LSTM(2, 3)"


def test_errors_come_back_and_the_child_goes_on() -> None:
    with contender.Contender("numpy", threads=1) as child:
        with pytest.raises(contender.ContenderError, match="KeyError"):
            child.ask("no such verb")
        assert child.open() is None
        assert child.version == np.__version__
    assert not child.alive


def test_a_dead_child_is_reported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import os\nos._exit(3)\n")
    with contender.Contender(str(bad), threads=1) as child:
        with pytest.raises(contender.ContenderError, match="status 3"):
            child.open()
        with pytest.raises(contender.ContenderError, match="status 3"):
            child.open()


def test_an_idle_child_is_stopped() -> None:
    stat = Path("/proc/self/stat")
    if not stat.exists():
        pytest.skip("this system has no /proc")
    with contender.Contender("numpy", threads=1) as child:
        child.open()
        text = Path(f"/proc/{child._process.pid}/stat").read_text()
    assert text.rpartition(")")[2].split()[0] == "T"


def test_thread_counts_are_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment = contender.child_environment(3, "cpu")
    assert {environment[name] for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")} == {"3"}
    assert "OMP_WAIT_POLICY" not in environment
    assert "multi_thread_eigen=false" in contender.child_environment(1, "cpu")["XLA_FLAGS"]


def test_the_protocol_answers_every_line() -> None:
    import io

    replies = io.BytesIO()
    requests = io.BytesIO(b'{"verb": "add", "a": 1}\n{"verb": "add", "b": 1}\n')
    serve({"add": lambda a: {"sum": a + 1}}, requests, replies)  # type: ignore[misc]
    first, second = replies.getvalue().splitlines()
    assert first == b'{"sum": 2}'
    assert second.startswith(b'{"error": "TypeError')


# --- checks ----------------------------------------------------------------------------------------------------------


def test_normwise_error() -> None:
    truth = np.array([1.0, -4.0])
    assert check.normwise_error(np.array([1.0, -3.0]), truth) == 0.25
    assert check.normwise_error(np.array([4.0, -4.0]), truth, 2) == pytest.approx(3 / math.sqrt(17))
    assert check.normwise_error(np.array([np.nan, -4.0]), truth) == math.inf
    assert check.normwise_error(np.zeros(3), truth) == math.inf
    assert check.normwise_error(np.zeros(2), np.zeros(2)) == 0.0
    assert check.normwise_error(np.ones(2), np.zeros(2)) == math.inf


def test_mismatches_name_the_tensor_and_the_tolerance() -> None:
    found = check.errors(TINY, {"hn": np.ones(2)}, {"hn": np.array([1.0, 1.001]), "output": np.ones(1)})
    assert found["output"] == math.inf
    words = check.mismatches(TINY, found)
    assert len(words) == 2
    assert words[0].startswith("hn: error 1.0e-03, tolerance 2e-05")
    assert check.mismatches(TINY, {"hn": 1e-6, "grad_x": 1e-5}) == []
    assert check.mismatches(TINY, {"hn": math.nan})


def test_one_flipped_relu_is_no_mismatch_and_a_wrong_gradient_is() -> None:
    row = TINY.with_(cell="rnn_relu", mode="train")
    truth = np.random.default_rng(0).standard_normal((200, 64))
    flipped = truth.copy()
    flipped[5, 5] *= 2
    assert check.mismatches(row, check.errors(row, {"grad_x": flipped}, {"grad_x": truth})) == []
    assert check.mismatches(row, check.errors(row, {"grad_x": truth * 1.02}, {"grad_x": truth}))


# --- floors, machine -------------------------------------------------------------------------------------------------

LEVELS = (floor.Level("L2", 2**20, 100e9), floor.Level("L3", 2**24, 50e9), floor.Level("memory", math.inf, 20e9))
MACHINE = floor.Machine(2, {"float32": 200.0}, LEVELS)


def test_large_batches_are_bound_by_flops() -> None:
    row = TINY.with_(T=100, B=64, I=512, H=512)
    assert floor.floor_seconds(row, 6400, MACHINE) == pytest.approx(useful_flops(row, 6400) / 200e9)


def test_single_rows_are_bound_by_reading_the_weights() -> None:
    row = TINY.with_(T=100, B=1, I=512, H=512)  # 4 MB of recurrent weights: 2 MB for each thread, in L3
    assert floor.floor_seconds(row, 100, MACHINE) == pytest.approx(100 * 4 * 512 * 512 * 4 / 50e9)
    assert floor.floor_seconds(row.with_(mode="train"), 100, MACHINE) == pytest.approx(200 * 4 * 512 * 512 * 4 / 50e9)
    meeting = floor.Machine(2, {"float32": 200.0}, LEVELS, barrier=1e-6)
    assert floor.floor_seconds(row, 100, meeting) == pytest.approx(100 * (4 * 512 * 512 * 4 / 50e9 + 1e-6))
    for more in ({"B": 2}, {"bidirectional": True}, {"layers": 2}):  # as many independent parts as threads
        several = row.with_(**more)
        assert floor.floor_seconds(several, 100, meeting) == floor.floor_seconds(several, 100, MACHINE)
    tiny = row.with_(I=8, H=8)  # one thread is faster than two that meet
    assert floor.floor_seconds(tiny, 100, meeting) == pytest.approx(useful_flops(tiny, 100) / 100e9)
    small = TINY.with_(T=100, B=1)
    assert floor.floor_seconds(small, 100, MACHINE) == pytest.approx(useful_flops(small, 100) / 200e9)
    assert floor.floor_seconds(row.with_(dtype="bfloat16"), 100, MACHINE) is None


def test_provenance_has_the_fields_of_the_design() -> None:
    found = machine.provenance(2, "avx2")
    wanted = {"cpu", "cores", "threads", "isa", "gpu", "driver", "versions", "commit", "date"}
    assert wanted == set(found)
    assert found["versions"]["numpy"] == np.__version__
    assert found["cpu"]
    assert str(ROOT) not in str(found)
    assert set(probes.cache_sizes()) >= {2, 3}


# --- records, summaries, pictures ------------------------------------------------------------------------------------


def make_records(**times: float) -> list[records.Record]:
    """One row, "first" and "second", for each library: `times` are the seconds of the first, doubled for the second."""
    rows = (TINY.with_(name="first"), TINY.with_(name="second", cell="gru", B=4))
    names = {name: name.replace("_", "-") for name in times}
    return [
        records.make_record(row, names[name], "1", [factor * seconds, 9.0], 1e-7, 200.0)
        for row, factor in zip(rows, (1, 2), strict=True)
        for name, seconds in times.items()
    ]


def test_records_have_exactly_the_fields_of_the_design(tmp_path: Path) -> None:
    design = (
        "suite, name, cell, mode, device, dtype, T, B, I, H, layers, bidirectional, ragged, reset, library, version, "
        "median_s, min_s, max_s, rounds, gflops, peak_fraction, max_error"
    )
    record = records.make_record(TINY, "numpy", "2", [3e-6, 1e-6, 2e-6], 1e-7, 100.0)
    assert list(record) == design.split(", ")
    assert (record["median_s"], record["min_s"], record["max_s"], record["rounds"]) == (2e-6, 1e-6, 3e-6, 3)
    assert record["gflops"] == pytest.approx(useful_flops(TINY, 15) / 2e-6 / 1e9)
    assert record["peak_fraction"] == pytest.approx(record["gflops"] / 100)
    assert records.row_of(record) == TINY
    path = tmp_path / "a.json"
    records.write_json(path, [record], {"cpu": "x"})
    assert records.read_json(path) == ([record], {"cpu": "x"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"rows": [{"suite": "x"}], "provenance": {}}')
    with pytest.raises(ValueError, match=r"a\.json: a record lacks name"):
        records.read_json(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="rows"):
        records.read_json(path)


def test_ratios_against_each_rival_and_the_best_at_full_precision() -> None:
    found = summary.ratios(make_records(rnnfast=1.0, torch=4.0, jax=2.0, torch_bf16=0.5)[:4])
    assert {ratio.rival: round(ratio.value, 3) for ratio in found} == {
        "torch": 1.3,
        "jax": 1.1,
        "torch-bf16": 0.95,
        "best": 1.1,
    }


def test_groups_have_geometric_mean_minimum_and_the_worst_row() -> None:
    fast, slow = (
        [
            records.make_record(row, name, "1", [seconds], 0.0, None)
            for name, seconds in (("rnnfast", 1.0), ("numpy", n))
        ]
        for row, n in ((TINY.with_(name="fast"), 8.0), (TINY.with_(name="slow", B=2), 2.0))
    )
    found = {(g.cell, g.mode, g.size_class): g for g in summary.groups(fast + slow)}
    assert set(found) == {("lstm", "infer", "small"), ("all", "infer", "all")}
    group = found["all", "infer", "all"]
    assert (group.count, group.minimum, group.worst) == (2, 2.0, "slow")
    assert group.mean == pytest.approx(4.0)
    assert summary.groups([fast[1]]) == []


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "a.png"
    plot.draw(make_records(rnnfast=1.0, numpy=2.0), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="records"):
        plot.draw([], path)


def test_readme_tables_are_made_from_the_records(tmp_path: Path) -> None:
    script = ROOT / "bench" / "plots.py"
    if not script.is_file():
        pytest.skip("bench/plots.py is not part of an installation")
    provenance = {**machine.provenance(2, "avx2"), "cpu": "Some CPU", "commit": "0123456789abcdef"}
    records.write_json(tmp_path / "quick.json", make_records(rnnfast=1.0, numpy=8.0), provenance)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench: quick -->\nold\n<!-- /bench -->\nafter\n")
    command = [sys.executable, str(script), "--results", str(tmp_path), "--readme", str(readme), "--check"]
    environment = {**contender.child_environment(1, "cpu"), "PYTHONPATH": str(Path(reference.__file__).parent.parent)}
    assert subprocess.run(command, env=environment, check=False).returncode == 1
    assert "old" in readme.read_text()
    readme.write_text(_filled(script, readme, tmp_path))
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    text = readme.read_text()
    assert re.search(r"\| infer \| gru \| small \| 1 \|", text)
    assert "| × numpy | row with the least × numpy |" in text
    assert "Some CPU" in text
    assert "old" not in text


def _filled(script: Path, readme: Path, results: Path) -> str:
    spec = importlib.util.spec_from_file_location("plots", script)
    assert spec is not None
    assert spec.loader is not None
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    text: str = plots.fill(readme.read_text(), {"quick": plots.table(*records.read_json(results / "quick.json"))})
    with pytest.raises(KeyError, match="other"):
        plots.fill(readme.read_text().replace("bench: quick", "bench: other"), {})
    return text
