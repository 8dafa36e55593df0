// LSTM (Hochreiter & Schmidhuber 1997; Gers et al. 2000), gates in PyTorch's order i, f, g, o:
//
//   i, f, o = sigmoid(W x + U h' + b)     g = tanh(W x + U h' + b)
//   c = f c' + i g                        h = o tanh(c)
//
// See cell/README.md for what a cell consists of.
#pragma once

#include "cell/activation.h"

RNNFAST_BEGIN

template <class V>
struct Lstm {
  static constexpr int kGates = 4, kSlots = 4, kRecurrent = 0;
  static constexpr int kInputGate[kGates] = {0, 1, 2, 3}, kRecurrentGate[kGates] = {0, 1, 2, 3};
  static constexpr bool kCellState = true, kReadsPreviousH = false;

  explicit Lstm(const double*) {}

  // slot: pre-activations in, gates out.
  RNNFAST_FN void gates(V* slot, V c_prev, V& c) const {
    const V i = sigmoid(slot[0]), f = sigmoid(slot[1]), g = tanh(slot[2]), o = sigmoid(slot[3]);
    c = fma(f, c_prev, i * g);
    slot[0] = i, slot[1] = f, slot[2] = g, slot[3] = o;
  }
  RNNFAST_FN V output(V* slot, V, V c) const { return slot[3] * tanh(c); }

  // slot: gates in, their gradients (of the pre-activations) out. dc: dL/dc in, dL/dc' out.
  RNNFAST_FN void backward(V* slot, V, V c_prev, V c, V dh, V& dc, V& dh_prev) const {
    const V i = slot[0], f = slot[1], g = slot[2], o = slot[3], one = V(1);
    const V tanh_c = tanh(c);
    dc = fma(dh * o, one_minus_square(tanh_c), dc);
    slot[0] = dc * g * i * (one - i);
    slot[1] = dc * c_prev * f * (one - f);
    slot[2] = dc * i * one_minus_square(g);
    slot[3] = dh * tanh_c * o * (one - o);
    dc = dc * f;
    dh_prev = V(0);
  }
};

RNNFAST_END
