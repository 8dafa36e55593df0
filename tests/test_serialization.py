"""Files: what goes in comes out, and what is damaged, foreign or refused leaves everything as it was."""

from __future__ import annotations

import contextlib
import json
import os
import stat

import numpy as np
import pytest

from rnnfast import serialization
from rnnfast.base import Module, Parameter
from rnnfast.cells import GRUCell, LSTMCell, RNNCell
from rnnfast.layers import Dropout, Embedding, Linear, Sequential
from rnnfast.modules import GRU, LSTM, RNN
from rnnfast.optim import SGD, Adam, AdamW, RMSprop
from rnnfast.serialization import load, load_checkpoint, read_file, save, write_file

IN, H = 4, 5
MODULES = {
    "rnn": lambda: RNN(IN, H, 2, "relu", bidirectional=True, seed=1),
    "lstm": lambda: LSTM(IN, H, 2, proj_size=3, dropout=0.5, batch_first=True, dtype="float64", seed=2**64 - 1),
    "gru": lambda: GRU(IN, H, bias=False),
    "rnn_cell": lambda: RNNCell(IN, H, nonlinearity="relu"),
    "lstm_cell": lambda: LSTMCell(IN, H, dtype="float64"),
    "gru_cell": lambda: GRUCell(IN, H, bias=False),
    "linear": lambda: Linear(IN, H),
    "linear_plain": lambda: Linear(IN, H, bias=False, dtype="float64"),
    "embedding": lambda: Embedding(7, IN, padding_idx=2),
    "dropout": lambda: Dropout(0.3, seed=4),
    "sequential": lambda: Sequential(Embedding(7, IN), Sequential(GRU(IN, H), Dropout(0.2)), Linear(H, 7)),
    "empty": lambda: Sequential(),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


class Model(Module):
    """A module of the user's."""

    def __init__(self, size=H):
        super().__init__()
        self.embed, self.rnn, self.out = Embedding(7, IN), GRU(IN, size, num_layers=2, dropout=0.5), Linear(size, 7)


def same_state(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


def names_in(directory):
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("name", MODULES)
def test_modules_come_back(name, path):
    module = MODULES[name]()
    save(path, module)
    twin = load(path)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    same_state(twin, module)
    assert twin.training
    if hasattr(module, "config"):
        assert twin.config() == module.config()
    for parameter in twin.parameters():
        parameter.data += 1  # writeable
    assert names_in(path.parent) == [path.name]


def test_from_eval_and_into_eval(path):
    module = LSTM(IN, H, seed=0).eval()
    save(str(path), module)
    assert load(path).training
    other = LSTM(IN, H, seed=1).eval()
    x = np.ones((2, 1, IN), np.float32)
    other(x)
    assert load(path, other) is other
    assert not other.training
    np.testing.assert_array_equal(other(x)[0], module(x)[0])


def test_seeds_and_counters_of_dropout(path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, IN)).astype(np.float32)
    layer = GRU(IN, H, num_layers=2, dropout=0.5)
    layer(x)
    save(path, layer)
    want = layer(x)[0]
    twin = load(path)
    assert twin.call_count == 1
    np.testing.assert_array_equal(twin(x)[0], want)
    other = load(path, module=GRU(IN, H, num_layers=2, dropout=0.5))
    np.testing.assert_array_equal(other(x)[0], want)
    chain = Sequential(Linear(IN, H), Dropout(0.5))
    chain(x)
    save(path, chain)
    want = chain(x)
    np.testing.assert_array_equal(load(path)(x), want)


def test_modules_of_the_user_s_are_filled(path):
    model = Model()
    model.rnn.call_count = 5
    save(path, model)
    with pytest.raises(ValueError, match="module="):
        load(path)
    other = Model()
    load(path, other)
    same_state(other, model)
    assert (other.rnn.call_count, other.rnn.seed) == (5, model.rnn.seed)


def test_tied_parameters_stay_tied(path):
    model = Sequential(Embedding(H, H), GRU(H, H, num_layers=2), Linear(H, H))
    model[2].weight = model[0].weight
    model[1].weight_hh_l1 = model[1].weight_hh_l0
    save(path, model)
    twin = load(path)
    assert twin[2].weight is twin[0].weight
    assert twin[1].weight_hh_l1 is twin[1].weight_hh_l0
    same_state(twin, model)
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    other = load(path, Sequential(Embedding(H, H), GRU(H, H, num_layers=2), Linear(H, H)))
    same_state(other, model)


@pytest.mark.parametrize("kind", [SGD, RMSprop, Adam, AdamW], ids=lambda k: k.__name__)
def test_optimisers_go_on(kind, path):
    def train(model, optimiser, steps):
        x = np.random.default_rng(0).standard_normal((6, 2, IN)).astype(np.float32)
        for _ in range(steps):
            model.zero_grad()
            model.backward(model(x))
            optimiser.step()

    options = {"momentum": 0.9} if kind in (SGD, RMSprop) else {}
    model = Sequential(GRU(IN, H, seed=0), Linear(H, 3, seed=0))
    optimiser = kind(model.parameters(), lr=0.01, **options)
    train(model, optimiser, 3)
    save(path, model, optimizer=optimiser)
    train(model, optimiser, 2)

    checkpoint = load_checkpoint(path)
    resumed = kind(checkpoint.module.parameters(), lr=0.5, **options)
    resumed.load_state_dict(checkpoint.optimizer)
    train(checkpoint.module, resumed, 2)
    same_state(checkpoint.module, model)

    other = Sequential(GRU(IN, H), Linear(H, 3))
    resumed = kind(other.parameters(), lr=0.5, **options)
    assert load(path, other, optimizer=resumed) is other
    train(other, resumed, 2)
    same_state(other, model)


def test_user_data(path):
    rng = np.random.default_rng(0)
    rng.standard_normal(3)
    user = {
        "step": 12,
        "loss": [1.5, float("inf"), None, True, "ünï"],
        "big": 2**100,
        "arrays": {"a": rng.standard_normal((2, 3)), "b": [np.arange(3, dtype=np.int16), np.array(4.5, np.float16)]},
        "scalar": np.float32(0.5),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 3)),
        "strided": np.arange(12.0).reshape(3, 4).T[::2],
        "swapped": np.arange(3, dtype=">i4"),
        "rng": rng.bit_generator.state,
        "pair": (1, 2),
    }
    save(path, GRU(IN, H), user=user)
    got = load_checkpoint(path).user
    assert got["step"] == 12
    assert got["loss"] == user["loss"]
    assert got["big"] == 2**100
    assert got["scalar"] == 0.5
    assert got["pair"] == [1, 2]
    for a, b in [
        (got["arrays"]["a"], user["arrays"]["a"]),
        (got["arrays"]["b"][0], user["arrays"]["b"][0]),
        (got["arrays"]["b"][1], user["arrays"]["b"][1]),
        (got["mask"], user["mask"]),
        (got["empty"], user["empty"]),
        (got["strided"], user["strided"]),
        (got["swapped"], user["swapped"].astype("=i4")),
    ]:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)
    got["arrays"]["a"][0] = 0  # writeable
    other = np.random.default_rng()
    other.bit_generator.state = got["rng"]
    assert other.random() == rng.random()
    assert load_checkpoint(path).optimizer is None


@pytest.mark.parametrize(
    "bad",
    [
        {"a": object()},
        {1: 2},
        {"__array__": "weight"},
        [1j],
        {"a": [np.array([None])]},
        {"a": np.array(["text"])},
        np.zeros(2, np.complex128),
        {"a": {3, 4}},
    ],
    ids=str,
)
def test_unfit_user_data_is_refused_and_the_file_kept(bad, path):
    save(path, GRU(IN, H, seed=0), user=1)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="user"):
        save(path, GRU(IN, H, seed=1), user=bad)
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


def test_other_bad_arguments(path):
    with pytest.raises(TypeError, match="module"):
        save(path, {"weight": 1})
    with pytest.raises(TypeError, match="optimizer"):
        save(path, GRU(IN, H), optimizer=3)
    with pytest.raises(FileNotFoundError):
        save(path.parent / "nowhere" / "file", GRU(IN, H))
    with pytest.raises(PermissionError, match="regular file"):
        save(path.parent, GRU(IN, H))
    with pytest.raises(FileNotFoundError):
        load(path)
    with pytest.raises(IsADirectoryError):
        load(path.parent)
    assert names_in(path.parent) == []


# Writing -------------------------------------------------------------------------------------------------------------


def test_the_bytes_are_plain_safetensors(path):
    from safetensors.numpy import load_file

    layer = GRU(IN, H, seed=0)
    save(path, layer)
    same_state(load_file(path), layer)


def test_torch_reads_the_file(path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    layer = LSTM(IN, H, bidirectional=True, seed=0)
    save(path, layer)
    twin = torch.nn.LSTM(IN, H, bidirectional=True)
    twin.load_state_dict(load_file(path))
    np.testing.assert_array_equal(twin.weight_hh_l0.detach().numpy(), layer.weight_hh_l0.data)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_keeps_the_old_file(step, path, monkeypatch):
    save(path, GRU(IN, H, seed=0))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    if step == "write":
        original = os.fdopen

        def fdopen(*args):
            file = original(*args)

            class Full:
                def __enter__(self):
                    return self

                def __exit__(self, *exception):
                    file.close()

                write = staticmethod(fail)

            return Full()

        monkeypatch.setattr(serialization.os, "fdopen", fdopen)
    else:
        monkeypatch.setattr(serialization.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, GRU(IN, H, seed=1))
    assert path.read_bytes() == before
    assert names_in(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_permissions(path):
    umask = os.umask(0o027)
    try:
        save(path, GRU(IN, H))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        os.chmod(path, 0o604)
        save(path, GRU(IN, H))
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(umask)


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_link_stays_a_link(path):
    link = path.parent / "latest"
    save(path, GRU(IN, H, seed=0))
    link.symlink_to(path.name)
    new = GRU(IN, H, seed=1)
    save(link, new)
    assert link.is_symlink()
    same_state(load(path), new)


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="there is no /dev/null")
def test_devices_are_not_replaced():
    with pytest.raises(PermissionError, match="regular file"):
        save("/dev/null", GRU(IN, H))
    assert not os.path.isfile("/dev/null")


# Reading what is wrong -----------------------------------------------------------------------------------------------


def assert_refused(path, match=None):
    """Nothing is loaded from the file, and nothing is changed by the attempt."""
    module = Sequential(GRU(IN, H, num_layers=2, dropout=0.5, seed=3), Linear(H, 2, seed=3))
    optimiser = Adam(module.parameters(), lr=0.1)
    module.backward(module(np.ones((3, 2, IN), np.float32)))
    optimiser.step()
    state, moments = module.state_dict(), optimiser.state_dict()
    with pytest.raises(ValueError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=match):
        load(path, module, optimizer=optimiser)
    same_state(module, state)
    assert module[0].call_count == 1
    assert module[0].seed == 3
    for name, value in optimiser.state_dict().items():
        np.testing.assert_array_equal(value, moments[name])


def good_file(path):
    module = Sequential(GRU(IN, H, num_layers=2, dropout=0.5, seed=5), Linear(H, 2, seed=5))
    optimiser = Adam(module.parameters(), lr=0.1)
    module.backward(module(np.ones((3, 2, IN), np.float32)))
    optimiser.step()
    save(path, module, optimizer=optimiser, user={"a": np.arange(3)})
    return path.read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, 0.9, -1])
def test_truncated_files(keep, path):
    data = good_file(path)
    size = keep if isinstance(keep, int) and keep >= 0 else int(keep * len(data)) if keep > 0 else len(data) + keep
    path.write_bytes(data[:size])
    assert_refused(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        b"\xff" * 1000,
        b"\x93NUMPY" + bytes(200),
        (5).to_bytes(8, "little") + b"[1,2]",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"null",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
    ids=range(10),
)
def test_foreign_files(data, path):
    path.write_bytes(data)
    assert_refused(path)


def test_safetensors_of_others(path):
    from safetensors.numpy import save_file

    layer = GRU(IN, H)
    save_file(layer.state_dict(), path)
    assert_refused(path, "header")
    save_file(layer.state_dict(), path, {"format": "pt"})
    assert_refused(path, "header")
    for text in ("", "3", "[]", "{}", '{"version": "1"}', '{"version": true}', "{"):
        save_file(layer.state_dict(), path, {"rnnfast": text})
        assert_refused(path, "rnnfast")


def test_longer_files(path):
    path.write_bytes(good_file(path) + b"x")
    assert_refused(path)


def test_newer_versions(path):
    good_file(path)
    header, arrays = read_file(path)
    write_file(path, {**header, "version": 2, "library": "99.0"}, arrays)
    assert_refused(path, r"version 1 or older, got 2, written by rnnfast 99\.0")


def damages():
    """Changes of a header and its arrays, each of which makes the file unfit."""

    def change(**entries):
        return lambda header, arrays: header.update(entries)

    def config(**entries):
        return lambda header, arrays: header["module"]["children"][0]["config"].update(entries)

    def drop(name):
        return lambda header, arrays: arrays.pop(name)

    def put(name, value):
        return lambda header, arrays: arrays.update({name: value})

    return {
        "no module": change(module=None),
        "module a list": change(module=[]),
        "unknown class": change(module={"class": "os.system", "config": {}}),
        "class no string": change(module={"class": 3, "config": {}}),
        "no children": change(module={"class": "Sequential"}),
        "a child too few": lambda header, arrays: header["module"]["children"].pop(),
        "children a number": change(module={"class": "Sequential", "children": 3}),
        "tied to nothing": change(tied={"0.weight_hh_l0": "nothing"}),
        "tied a list": change(tied=[1]),
        "tied of nothing": change(tied={"nowhere.at_all": "1.weight"}),
        "dropout a list": change(dropout=[]),
        "dropout of nothing": change(dropout={"nothing": {"seed": 1, "call_count": 1}}),
        "dropout without a seed": change(dropout={"0": {"call_count": 1}}),
        "dropout no number": change(dropout={"0": {"seed": None, "call_count": 1}}),
        "user's array missing": change(user={"__array__": "user/99"}),
        "size": config(hidden_size=H + 1),
        "size zero": config(hidden_size=0),
        "size text": config(hidden_size="5"),
        "layers": config(num_layers=1),
        "bias": config(bias=False),
        "dtype": config(dtype="float64"),
        "parameter missing": drop("0.weight_hh_l0"),
        "parameter too many": put("0.weight_xx_l0", np.zeros(3, np.float32)),
        "parameter's shape": put("1.weight", np.zeros((3, H), np.float32)),
        "parameter's dtype": put("1.weight", np.zeros((2, H))),
        "moment missing": lambda header, arrays: arrays.pop(next(n for n in arrays if n.startswith("optimizer/"))),
    }


@pytest.mark.filterwarnings("ignore:dropout:UserWarning")  # where num_layers was changed to 1
@pytest.mark.parametrize("name", damages())
def test_damaged_headers(name, path):
    good_file(path)
    header, arrays = read_file(path)
    damages()[name](header, arrays)
    write_file(path, header, arrays)
    assert_refused(path)


def test_arguments_of_another_version(path):
    """What this version does not know cannot be rebuilt; what the file does not know yet can be filled."""
    save(path, GRU(IN, H, seed=0))
    header, arrays = read_file(path)
    header["module"]["config"].update(colour="red")
    del header["module"]["config"]["bidirectional"]
    write_file(path, header, arrays)
    with pytest.raises(ValueError, match="colour"):
        load(path)
    same_state(load(path, GRU(IN, H, seed=1)), GRU(IN, H, seed=0))


def test_incomplete_headers(path):
    good_file(path)
    header, arrays = read_file(path)
    for name in ("module", "tied", "dropout", "optimizer", "user", "library"):
        write_file(path, {key: value for key, value in header.items() if key != name}, arrays)
        assert_refused(path, name)


def test_random_damage_never_gets_further_than_a_value_error(path):
    data = good_file(path)
    rng = np.random.default_rng(0)
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        damaged = bytearray(data)
        for position in rng.integers(0, end, rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_checkpoint(path)


def test_a_file_for_another_module_changes_nothing(path):
    save(path, RNN(IN, H, seed=0))
    for other, text in [
        (RNN(IN, H, nonlinearity="relu", seed=1), "nonlinearity"),
        (RNN(IN, H + 1, seed=1), "hidden_size"),
        (RNN(IN, H, dtype="float64", seed=1), "dtype"),
        (GRU(IN, H, seed=1), "GRU"),
        (Linear(IN, H), "Linear"),
        (Sequential(RNN(IN, H)), "Sequential"),
        (Model(), "missing"),
    ]:
        before = other.state_dict()
        with pytest.raises(ValueError, match=text):
            load(path, other)
        same_state(other, before)
    load(path, RNN(IN, H, batch_first=True, seed=1))  # that is the caller's choice
    save(path, Model())
    with pytest.raises(ValueError, match="rnn"):
        load(path, Model(H + 1))


def test_an_optimiser_that_does_not_fit_changes_nothing(path):
    module = GRU(IN, H, seed=0)
    save(path, module)
    other = GRU(IN, H, seed=1)
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"optimizer: expected .* of Adam, got None"):
        load(path, other, optimizer=Adam(other.parameters()))
    optimiser = SGD(module.parameters(), lr=0.1)
    save(path, module, optimizer=optimiser)
    with pytest.raises(ValueError, match="of Adam, got SGD"):
        load(path, other, optimizer=Adam(other.parameters()))
    same_state(other, before)


def test_an_optimiser_is_put_back_when_the_module_refuses(path):
    module = GRU(IN, H, seed=0)
    save(path, module, optimizer=SGD(module.parameters(), lr=0.1))
    other = GRU(IN, H, seed=1)
    optimiser = SGD(other.parameters(), lr=0.7)
    frozen = np.frombuffer(other.weight_hh_l0.data.tobytes(), np.float32).reshape(other.weight_hh_l0.shape)
    other.weight_hh_l0 = Parameter(frozen)
    with pytest.raises(ValueError, match="weight_hh_l0"):
        load(path, other, optimizer=optimiser)
    assert optimiser.lr == 0.7


def test_names_with_a_slash_are_refused(path):
    model = Sequential()
    setattr(model, "user/0", Parameter(np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="user/0"):
        save(path, model)


def test_the_header_is_readable_json(path):
    save(path, Sequential(GRU(IN, H, seed=0), Dropout(0.5, seed=1)), user={"note": "hello"})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["rnnfast"])
    assert header["version"] == 1
    assert header["module"]["children"][0] == {"class": "GRU", "config": GRU(IN, H, seed=0).config()}
    assert header["user"] == {"note": "hello"}
    assert header["dropout"]["1"] == {"seed": 1, "call_count": 0}


def test_load_wants_a_module(tmp_path):
    save(tmp_path / "a.safetensors", LSTM(2, 3, seed=0))
    with pytest.raises(TypeError, match=r"module: expected a Module, got int"):
        load(tmp_path / "a.safetensors", 3)
    with pytest.raises(TypeError, match=r"path: expected a path, got int"):
        load(3)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tied", 5), ("tied", {"weight": "nothing"}), ("module", 3), ("module", {"class": "Linear", "config": 3})],
)
def test_damaged_header_is_told_as_such(key, value, path):
    save(path, Linear(IN, H))
    header, arrays = read_file(path)
    write_file(path, {**header, key: value}, arrays)
    with pytest.raises(ValueError, match=f"{path.name}: damaged header: {key}"):
        load(path)


def test_errors_of_the_system_show_the_path_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = "x" * 300
    with pytest.raises(OSError, match=long) as told:
        save(long, LSTM(2, 3))
    assert told.value.filename == long
    assert ".tmp" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_another_module(path):
    model = LSTM(2, 3, seed=0)
    save(path, model, optimizer=Adam(model.parameters()))
    other = LSTM(2, 3, seed=1)
    before = other.state_dict()
    with pytest.raises(ValueError, match="optimizer: expected one over parameters of module, got Adam"):
        load(path, other, optimizer=Adam(model.parameters()))
    for name, value in other.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    load(path, other, optimizer=Adam(other.parameters()))
