"""Parameters and modules: names, ties, modes, and loading that changes all or nothing."""

import copy

import numpy as np
import pytest

from rnnfast.base import Module, Parameter


class Leaf(Module):
    def __init__(self, value=0.0, dtype=np.float32):
        super().__init__()
        self.weight = Parameter(np.full((2, 3), value, dtype))
        self.bias = Parameter(np.full(2, value, dtype))
        self.modes = []

    def _mode_changed(self):
        self.modes.append(self.training)
        for parameter in self._parameters.values():
            parameter.data.flags.writeable = self.training


class Tree(Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Leaf(1.0), Leaf(2.0)


def test_names_order_and_repr():
    tree = Tree()
    names = [name for name, _ in tree.named_parameters()]
    assert names == ["left.weight", "left.bias", "right.weight", "right.bias"]
    assert next(tree.named_parameters("net"))[0] == "net.left.weight"
    assert [name for name, _ in tree.named_modules()] == ["", "left", "right"]
    assert repr(tree.left.weight) == "Parameter('weight', shape=(2, 3), dtype=float32)"


def test_reassigning_keeps_the_place_and_deleting_unregisters():
    leaf = Leaf()
    leaf.weight = Parameter(np.ones((2, 3), np.float32))
    assert list(leaf.state_dict()) == ["weight", "bias"]
    leaf.weight = None
    assert list(leaf.state_dict()) == ["bias"]
    del leaf.bias
    assert not list(leaf.parameters())
    with pytest.raises(AttributeError):
        del leaf.bias


def test_assignment_before_init_says_so():
    class Early(Module):
        def __init__(self):
            self.weight = Parameter(np.zeros(1))

    with pytest.raises(RuntimeError, match="weight: expected super"):
        Early()


def test_tied_parameters_and_shared_modules():
    tree = Tree()
    tree.right.weight = tree.left.weight
    assert [name for name, _ in tree.named_parameters()] == ["left.weight", "left.bias", "right.bias"]
    assert list(tree.state_dict()) == ["left.weight", "left.bias", "right.weight", "right.bias"]
    tree.right = tree.left
    assert len(list(tree.parameters())) == 2
    assert list(tree.state_dict()) == ["left.weight", "left.bias", "right.weight", "right.bias"]
    assert len(list(tree.modules())) == 2


def test_gradients_accumulate_and_vanish():
    parameter = Parameter(np.zeros(2))
    parameter.add_grad(np.ones(2))
    parameter.add_grad(np.ones(2))
    np.testing.assert_array_equal(parameter.grad, [2, 2])
    tree = Tree()
    for p in tree.parameters():
        p.add_grad(np.ones(p.shape, p.dtype))
    tree.zero_grad()
    assert all(p.grad is None for p in tree.parameters())


@pytest.mark.parametrize(
    ("grad", "error"),
    [
        (np.zeros(3), ValueError),
        (np.zeros(2, np.float32), TypeError),
        ([0.0, 0.0], TypeError),
        (np.broadcast_to(0.0, 2), ValueError),
    ],
)
def test_check_grad(grad, error):
    parameter = Parameter(np.zeros(2), "weight")
    parameter.check_grad()
    parameter.grad = grad
    with pytest.raises(error, match="weight.grad: expected"):
        parameter.check_grad()


def test_train_and_eval_reach_all():
    tree = Tree().eval()
    assert [m.training for m in tree.modules()] == [False] * 3
    assert tree.left.modes == [False]
    assert tree.train().right.training


def test_load_restores_values_and_each_mode():
    source, tree = Tree(), Tree()
    source.left.weight.data[...] = 7.0
    tree.left.eval()
    tree.load_state_dict(source.state_dict())
    assert (tree.left.weight.data == 7.0).all()
    assert (tree.training, tree.left.training, tree.right.training) == (True, False, True)
    assert not tree.left.weight.data.flags.writeable
    assert not np.shares_memory(tree.left.weight.data, source.left.weight.data)


def changed(**changes):
    state = Tree().state_dict()
    for name, value in changes.items():
        state[name.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state: expected a mapping"),
        ({}, KeyError, "missing"),
        (changed(other=np.zeros(1)), KeyError, "unexpected"),
        (changed(right__bias=np.zeros(3, np.float32)), ValueError, r"right.bias'\]: expected shape \(2,\), got \(3,\)"),
        (changed(right__bias=np.zeros(2)), TypeError, r"right.bias'\]: expected dtype float32, got float64"),
        (changed(right__bias=np.zeros(2, ">f4")), TypeError, "expected dtype float32, got >f4"),
        (changed(right__bias=[0.0, 0.0]), TypeError, "expected a numpy array, got builtins.list"),
        (changed(right__bias=None), TypeError, "expected a numpy array"),
    ],
)
def test_failed_load_changes_nothing(state, error, message):
    tree = Tree()
    tree.left.eval()
    before = tree.state_dict()
    with pytest.raises(error, match=message):
        tree.load_state_dict(state)
    for name, value in tree.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert not tree.left.training
    assert tree.right.training


def test_load_into_memory_that_cannot_be_written_changes_nothing():
    tree = Tree()
    tree.right.bias.data = np.broadcast_to(np.float32(0.0), 2)
    tree.right._mode_changed = lambda: None
    with pytest.raises(ValueError, match="right.bias: expected a writable array"):
        tree.load_state_dict(changed(left__weight=np.full((2, 3), 9.0, np.float32)))
    assert (tree.left.weight.data == 1.0).all()


def test_tied_names_must_agree_on_load():
    tree = Tree()
    tree.right.weight = tree.left.weight
    state = tree.state_dict()
    state["left.weight"][0, 0] = state["right.weight"][0, 0] = np.nan  # equal NaNs agree
    tree.load_state_dict(state)
    state["right.weight"] = state["right.weight"] + 1
    with pytest.raises(ValueError, match=r"right.weight'\]: expected the values of 'left.weight'"):
        tree.load_state_dict(state)


def test_load_takes_torch_tensors():
    torch = pytest.importorskip("torch")
    tree = Tree()
    state = {name: torch.full(value.shape, 3.0, requires_grad=True) for name, value in tree.state_dict().items()}
    tree.load_state_dict(state)
    assert (tree.right.weight.data == 3.0).all()


def test_deepcopy_is_independent_and_keeps_ties():
    tree = Tree()
    tree.right.weight = tree.left.weight
    twin = copy.deepcopy(tree)
    twin.left.weight.data[...] = 5.0
    assert twin.right.weight is twin.left.weight
    assert (tree.left.weight.data == 1.0).all()
    assert next(twin.parameters()) is twin.left.weight


def test_forward_must_be_written():
    with pytest.raises(NotImplementedError, match="Leaf has no forward"):
        Leaf()(1)
