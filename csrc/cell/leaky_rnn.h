// Leaky RNN: the continuous-time network tau dh/dt = -h + f(W x + U h + b) by Euler steps with alpha = dt / tau, as used
// in models of neural circuits (Song, Yang & Wang 2016):
//
//   h = (1 - alpha) h' + alpha f(W x + U h' + b)
#pragma once

#include "cell/activation.h"

RNNFAST_BEGIN

template <class V, class F>
struct LeakyRnn {
  static constexpr int kGates = 1, kSlots = 1, kRecurrent = 0;
  static constexpr int kInputGate[kGates] = {0}, kRecurrentGate[kGates] = {0};
  static constexpr bool kCellState = false, kReadsPreviousH = true;

  explicit LeakyRnn(const double* parameters)
      : alpha(scalar_t<V>(parameters[0])), keep(scalar_t<V>(1 - parameters[0])) {}
  template <class G>
  LeakyRnn(const LeakyRnn<V, G>& other, F nonlinearity) : alpha(other.alpha), keep(other.keep), f(nonlinearity) {}

  RNNFAST_FN void gates(V*, V, V&) const {}
  RNNFAST_FN V output(V* slot, V h_prev, V) const {
    slot[0] = f.forward(slot[0]);
    return fma(keep, h_prev, alpha * slot[0]);
  }

  RNNFAST_FN void backward(V* slot, V, V, V, V dh, V&, V& dh_prev) const {
    slot[0] = f.backward(slot[0], alpha * dh);
    dh_prev = keep * dh;
  }

  V alpha, keep;
  F f;
};

template <class V>
using LeakyTanh = LeakyRnn<V, Tanh>;
template <class V>
using LeakyRelu = LeakyRnn<V, Relu>;

RNNFAST_END
