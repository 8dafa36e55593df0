"""The leaky RNN: what is its own. Kernels, reference and adjoint of every cell are held together by the other tests."""

from __future__ import annotations

import numpy as np
import pytest

import rnnfast


def steps(layer: rnnfast.LeakyRNN, x: np.ndarray, f: object) -> np.ndarray:
    """The equation, written out."""
    w_ih, w_hh, b_ih, b_hh = (p.data for p in layer.parameters())
    h, out = np.zeros((x.shape[1], layer.hidden_size)), []
    for x_t in x:
        h = (1 - layer.alpha) * h + layer.alpha * f(x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh)  # type: ignore[operator]
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_equation(nonlinearity: str, alpha: float) -> None:
    f = np.tanh if nonlinearity == "tanh" else (lambda a: np.maximum(a, 0))
    layer = rnnfast.LeakyRNN(3, 17, nonlinearity=nonlinearity, alpha=alpha, dtype="float64", seed=1)
    x = np.random.default_rng(0).standard_normal((9, 4, 3))
    output, hn = layer(x)
    np.testing.assert_allclose(output, steps(layer, x, f), rtol=0, atol=1e-14)
    np.testing.assert_array_equal(hn[0], output[-1])


def test_alpha_one_is_the_vanilla_rnn() -> None:
    leaky = rnnfast.LeakyRNN(5, 33, alpha=1.0, dtype="float64", seed=1)
    vanilla = rnnfast.RNN(5, 33, dtype="float64", seed=2)
    vanilla.load_state_dict(leaky.state_dict())
    x = np.random.default_rng(0).standard_normal((6, 3, 5))
    (a, _), (b, _) = leaky(x), vanilla(x)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(leaky.backward(a)[0], vanilla.backward(b)[0], rtol=0, atol=1e-14)


def test_gradient_flows_past_the_nonlinearity() -> None:
    """With no recurrent weights, what reaches h0 from the last step is (1 - alpha)^T exactly in form."""
    layer = rnnfast.LeakyRNN(2, 4, alpha=0.25, dtype="float64", seed=1)
    layer.weight_hh_l0.data[...] = 0
    output, _ = layer(np.zeros((7, 1, 2)))
    _, grad_h0 = layer.backward(grad_state=np.ones((1, 1, 4)))
    np.testing.assert_allclose(grad_h0, 0.75**7, rtol=1e-14)
    assert output.shape == (7, 1, 4)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        rnnfast.LeakyRNN(2, 3, alpha=alpha)


def test_survives_saving(tmp_path) -> None:
    layer = rnnfast.LeakyRNN(2, 3, 2, "relu", alpha=0.3, bidirectional=True, seed=1)
    rnnfast.save(tmp_path / "leaky.safetensors", layer)
    again = rnnfast.load(tmp_path / "leaky.safetensors")
    x = np.ones((3, 1, 2), np.float32)
    assert again.alpha == 0.3
    np.testing.assert_array_equal(layer.eval()(x)[0], again.eval()(x)[0])
