// What the kernels work on: one layer in one direction, passed by value; and which rows of it a step reads.
//
// Everything the engine keeps is dense, whatever the lengths are (they are on the device): [steps][B][...], in arithmetic
// precision. A row that has ended, or is not yet reached, is skipped by every kernel and has gate gradients of zero.
// Sizes: T steps, B batch, I input, H hidden, P projection (or H), G gates, S slots of the cell.
#pragma once

#include "core/item.h"
#include "cuda/runtime.h"
#include "cuda/scalar.h"
#include "cuda/storage.h"

RNNFAST_BEGIN

constexpr int kMaxGates = 4;

template <class T>
struct Matrix {  // [rows, columns] with any strides; null: absent
  const T* data;
  int64_t row_stride, column_stride;

  RNNFAST_FN Arithmetic<T> operator()(int64_t row, int64_t column) const {
    return read(data[row * row_stride + column * column_stride]);
  }
};

template <class T>
struct Item {
  using A = Arithmetic<T>;

  int64_t steps, batch, I, H, P;
  int64_t first_kept;  // the step that comes first in `slots`
  bool reverse, projected;
  bool tf32;                                             // products of float32 are of operands rounded to TF32
  bool keep;                                             // slots, cells and raw of every step are there, for backward
  int gates, slot_count, recurrent;                      // of the cell: kGates, kSlots, kRecurrent
  int input_gate[kMaxGates], recurrent_gate[kMaxGates];  // kInputGate, kRecurrentGate

  Sequence<const T> x;
  Sequence<T> out;  // [T, B, P] of this direction; also where h of the previous step is read
  Sequence<const uint8_t> reset;
  const int64_t* lengths;  // [B] on the device, clamped here; null: all T
  const int32_t* order;    // [B] of the persistent kernels: sequences by falling length; null: as they come
  Rows<const T> h0, c0, reset_h, reset_c;
  Rows<T> hn, cn;
  Rows<A> running_c;  // if it is there, c before the first step and after the last: not c0 and cn
  Sequence<T> h_all, c_all;
  Matrix<T> w_ih, w_hh, w_hr, b_ih, b_hh;  // biases are [1, G * H]

  A* slots;        // [T, or steps of a chunk or window][B][S][H]
  A* cells;        // [T, window or 1][B][H]: c after each step
  A* raw;          // with projection, [T, window or 1][B][H]: h before it
  A* checkpoints;  // lean mode, [windows - 1][B][H]: c before each window but the first

  // Backward
  A* gate_grads;  // as slots; the same memory unless the slots are to be kept
  Sequence<const T> grad_out, grad_h_all, grad_c_all;
  Rows<const T> grad_hn, grad_cn;
  Rows<T> grad_h0, grad_c0, grad_reset_h, grad_reset_c;
  Sequence<T> record_h;              // dL/dh_t
  A *carry_h, *carry_c;              // [B][P], [B][H]: what reaches the previous step beside the recurrent product
  A *carry_reset_h, *carry_reset_c;  // likewise, collected for the reset state
  A* grad_raw;                       // with projection, dL/dh_t: [T][B][P]
};

// The directions of a layer, which share their launches.
template <class T>
struct Items {
  Item<T> item[2];
  int64_t count;
};

template <class T>
RNNFAST_FN T* at(const Sequence<T>& s, int64_t t, int64_t b) {
  return s.data + t * s.t_stride + b * s.b_stride;
}
template <class T>
RNNFAST_FN T* row_or_null(const Rows<T>& rows, int64_t b) {
  return rows.data ? rows.data + b * rows.b_stride : nullptr;
}

template <class T>
RNNFAST_FN int64_t length(const Item<T>& item, int64_t b) {
  return item.lengths ? clamp(item.lengths[b], int64_t{0}, item.steps) : item.steps;
}

// The sequence that a persistent kernel has in a place of the batch.
template <class T>
RNNFAST_FN int64_t sequence_at(const Item<T>& item, int64_t place) {
  return item.order ? item.order[place] : place;
}

// The n-th step in the order of the item's forward pass.
template <class T>
RNNFAST_FN int64_t step_number(const Item<T>& item, int64_t n) {
  return item.reverse ? item.steps - 1 - n : n;
}

// Is the state that enters step t of sequence b, which runs there, replaced (a new segment starts)?
template <class T>
RNNFAST_FN bool is_cut(const Item<T>& item, int64_t t, int64_t b) {
  if (!item.reset.data) return false;
  const int64_t at_step = item.reverse ? t + 1 : t;
  if (item.reverse && at_step >= length(item, b)) return false;
  return *at(item.reset, at_step, b) != 0;
}

// Is t the first, the last step that sequence b runs?
template <class T>
RNNFAST_FN bool is_first(const Item<T>& item, int64_t t, int64_t b) {
  return item.reverse ? t + 1 >= length(item, b) : t == 0;
}
template <class T>
RNNFAST_FN bool is_last(const Item<T>& item, int64_t t, int64_t b) {
  return item.reverse ? t == 0 : t + 1 >= length(item, b);
}

// Where h before step t of sequence b lies; null: it is zero.
template <class T>
RNNFAST_FN const T* previous_h(const Item<T>& item, int64_t t, int64_t b) {
  if (is_cut(item, t, b)) return row_or_null(item.reset_h, b);
  if (is_first(item, t, b)) return row_or_null(item.h0, b);
  return at(item.out, item.reverse ? t + 1 : t - 1, b);
}

// c of unit u after step t, kept for every step or only now.
template <class T>
RNNFAST_FN Arithmetic<T>& cell_state(const Item<T>& item, int64_t t, int64_t b, int64_t u) {
  return item.cells[((item.keep ? t * item.batch : 0) + b) * item.H + u];
}
template <class T>
RNNFAST_FN Arithmetic<T> read_unit(const T* row, int64_t u) {
  return row ? read(row[u]) : Arithmetic<T>(0);
}
template <class T>
RNNFAST_FN Arithmetic<T> previous_cell(const Item<T>& item, int64_t t, int64_t b, int64_t u) {
  if (is_cut(item, t, b)) return read_unit(row_or_null(item.reset_c, b), u);
  if (is_first(item, t, b))
    return item.running_c.data ? row_or_null(item.running_c, b)[u] : read_unit(row_or_null(item.c0, b), u);
  return cell_state(item, item.reverse ? t + 1 : t - 1, b, u);
}

// Slot 0 of unit u of sequence b at step t; slots are H apart.
template <class T>
RNNFAST_FN int64_t slot_index(const Item<T>& item, int64_t t, int64_t b, int64_t u) {
  return ((t - item.first_kept) * item.batch + b) * item.slot_count * item.H + u;
}
template <class T>
RNNFAST_FN Arithmetic<T>& raw_h(const Item<T>& item, int64_t t, int64_t b, int64_t u) {
  return item.raw[((item.keep ? t * item.batch : 0) + b) * item.H + u];
}

RNNFAST_END
