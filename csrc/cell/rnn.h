// Vanilla RNN (Elman 1990): h = f(W x + U h' + b), f tanh or ReLU.
#pragma once

#include "cell/activation.h"

RNNFAST_BEGIN

template <class V, class F>
struct Rnn {
  static constexpr int kGates = 1, kSlots = 1, kRecurrent = 0;
  static constexpr int kInputGate[kGates] = {0}, kRecurrentGate[kGates] = {0};
  static constexpr bool kCellState = false, kReadsPreviousH = false;

  explicit Rnn(const double*) {}
  explicit Rnn(F nonlinearity) : f(nonlinearity) {}

  RNNFAST_FN void gates(V*, V, V&) const {}
  RNNFAST_FN V output(V* slot, V, V) const { return slot[0] = f.forward(slot[0]); }

  RNNFAST_FN void backward(V* slot, V, V, V, V dh, V&, V& dh_prev) const {
    slot[0] = f.backward(slot[0], dh);
    dh_prev = V(0);
  }

  F f;
};

template <class V>
using RnnTanh = Rnn<V, Tanh>;
template <class V>
using RnnRelu = Rnn<V, Relu>;

RNNFAST_END
