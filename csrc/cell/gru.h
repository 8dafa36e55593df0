// GRU (Cho et al. 2014), as PyTorch and cuDNN write it: the reset gate applies after the recurrent product.
//
//   r, z = sigmoid(W x + U h' + b)
//   n = tanh(W_n x + b_in + r q),  q = U_n h' + b_hn
//   h = (1 - z) n + z h'
//
// Slots: n, r, z, q. The input product fills the first three, the recurrent product the last three.
#pragma once

#include "cell/activation.h"

RNNFAST_BEGIN

template <class V>
struct Gru {
  static constexpr int kGates = 3, kSlots = 4, kRecurrent = 1;
  static constexpr int kInputGate[kGates] = {2, 0, 1}, kRecurrentGate[kGates] = {0, 1, 2};  // weights are r, z, n
  static constexpr bool kCellState = false, kReadsPreviousH = true;

  explicit Gru(const double*) {}

  RNNFAST_FN void gates(V* slot, V, V&) const { slot[1] = sigmoid(slot[1]), slot[2] = sigmoid(slot[2]); }
  RNNFAST_FN V output(V* slot, V h_prev, V) const {
    const V n = slot[0] = tanh(fma(slot[1], slot[3], slot[0]));
    return fma(slot[2], h_prev - n, n);
  }

  RNNFAST_FN void backward(V* slot, V h_prev, V, V, V dh, V&, V& dh_prev) const {
    const V n = slot[0], r = slot[1], z = slot[2], q = slot[3], one = V(1);
    const V dn = dh * (one - z) * one_minus_square(n);
    slot[0] = dn;
    slot[1] = dn * q * r * (one - r);
    slot[2] = dh * (h_prev - n) * z * (one - z);
    slot[3] = dn * r;
    dh_prev = dh * z;
  }
};

RNNFAST_END
