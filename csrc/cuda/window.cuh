// Lean mode: a forward pass keeps the outputs of all layers, and c before each window of steps. The backward pass goes over
// the windows from the last to the first: it runs each again, now keeping gates and c, then its adjoint, and adds to the
// gradients of the weights. A window is an item of its own, of fewer steps, whose initial states are those that enter it: the
// kernels of the time loop know of none of this, and what a window's first step sends on is what the window before starts from.
#pragma once

#include <algorithm>

#include "core/buffer.h"
#include "cuda/backward.cuh"

RNNFAST_BEGIN

// ---- kernels ------------------------------------------------------------------------------------------------------

// The states that enter a window, which begins at step number n of `whole`, and how many of its steps each sequence runs.
// c twice: running it again writes the last c over the first (`running_c`), and the adjoint wants the first.
template <class T>
struct WindowStates {
  T* h;                         // [B][P]
  Arithmetic<T>*c, *running_c;  // [B][H]
  int64_t* lengths;             // [B]
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    enter_window_kernel(Item<T> whole, const Arithmetic<T>* checkpoint, WindowStates<T> states, int64_t n, int64_t t0) {
  using A = Arithmetic<T>;
  const int64_t width = whole.P > whole.H ? whole.P : whole.H, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = i / width, u = i % width;
  if (b >= whole.batch) return;
  const int64_t t = step_number(whole, n);
  const bool runs = n < whole.steps && t < length(whole, b);
  if (u == 0) states.lengths[b] = length(whole, b) > t0 ? length(whole, b) - t0 : 0;
  if (u < whole.P)
    states.h[b * whole.P + u] = rounded<T>(read_unit(runs ? previous_h(whole, t, b) : row_or_null(whole.h0, b), u));
  if (u >= whole.H || !states.c) return;
  A c = read_unit(row_or_null(whole.c0, b), u);
  if (runs && is_cut(whole, t, b))
    c = read_unit(row_or_null(whole.reset_c, b), u);
  else if (runs && !is_first(whole, t, b))
    c = checkpoint[b * whole.H + u];
  states.c[b * whole.H + u] = states.running_c[b * whole.H + u] = c;
}

// In the reverse direction a window does not see a cut between its first step and the one before: what it has sent on is the
// reset state's.
template <class T>
__global__ void __launch_bounds__(kThreads) leave_window_kernel(Item<T> whole, int64_t n) {
  const int64_t width = whole.P > whole.H ? whole.P : whole.H, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = i / width, u = i % width, t = step_number(whole, n);
  if (b >= whole.batch || n >= whole.steps || t >= length(whole, b) || !is_cut(whole, t, b)) return;
  if (u < whole.P)
    whole.carry_h[b * whole.P + u] = divert(true, whole.carry_reset_h[b * whole.P + u], whole.carry_h[b * whole.P + u]);
  if (u < whole.H && whole.carry_c)
    whole.carry_c[b * whole.H + u] = divert(true, whole.carry_reset_c[b * whole.H + u], whole.carry_c[b * whole.H + u]);
}

// total += the parts, in their order; of the first window there is nothing to add to.
template <class A>
__global__ void __launch_bounds__(kThreads)
    collect_parts_kernel(Partials<A> partials, int64_t parts, Partials<A> total, bool first) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = partials.rows * partials.columns;
  if (n >= size) return;
  A sum = partials.data[n];
  for (int64_t part = 1; part < parts; ++part) sum = sum + partials.data[part * size + n];
  total.data[n] = first ? sum : total.data[n] + sum;
}

// The gradient of the input of two directions, whose windows lie at different times: [T * B][I], from zero.
template <class A>
struct AddedRows {
  A* data;
  int64_t width;

  RNNFAST_FN void operator()(int64_t row, int64_t column, int64_t, A value) const {
    data[row * width + column] = data[row * width + column] + value;
  }
};
template <class T>
__global__ void __launch_bounds__(kThreads)
    store_rows_kernel(const Arithmetic<T>* sums, int64_t rows, int64_t width, SequenceRows<T> target) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < rows * width) target(n / width, n % width, 0, sums[n]);
}

// ---- items --------------------------------------------------------------------------------------------------------

// The steps with numbers [begin, end) of a direction, and the first of them in time.
struct WindowRange {
  int64_t begin, end;

  int64_t steps() const { return end - begin; }
  template <class T>
  int64_t first_time(const Item<T>& whole) const {
    return whole.reverse ? whole.steps - end : begin;
  }
};

template <class V>
Sequence<V> from_time(Sequence<V> s, int64_t t) {
  if (s.data) s.data += t * s.t_stride;
  return s;
}

// What a direction needs while a window of it is run, beside the gates of its steps.
template <class T>
struct WindowMemory {
  using A = Arithmetic<T>;
  T *out, *hn;
  A* grad_raw;
  WindowStates<T> states;

  void lay_out(Carver& memory, int64_t steps, int64_t batch, int64_t P, int64_t H, bool cell_state, bool projected) {
    out = memory.take<T>(steps * batch * P), hn = memory.take<T>(batch * P);
    grad_raw = projected ? memory.take<A>(steps * batch * P) : nullptr;
    states = {memory.take<T>(batch * P), nullptr, nullptr, memory.take<int64_t>(batch)};
    if (cell_state) states.c = memory.take<A>(batch * H), states.running_c = memory.take<A>(batch * H);
  }

  // The item of a window; its gates lie where those of `whole` do.
  Item<T> item(const Item<T>& whole, const WindowRange& range) const {
    const int64_t t0 = range.first_time(whole);
    Item<T> item = whole;
    item.steps = range.steps(), item.first_kept = 0, item.keep = true;
    item.x = from_time(whole.x, t0), item.reset = from_time(whole.reset, t0);
    item.out = {out, whole.batch * whole.P, whole.P};
    item.lengths = states.lengths;
    item.h0 = {states.h, whole.P}, item.c0 = {nullptr, 0};
    item.hn = {hn, whole.P}, item.cn = {nullptr, 0};
    item.running_c = {states.running_c, whole.H};
    item.h_all = item.c_all = {nullptr, 0, 0};
    item.gate_grads = whole.slots, item.grad_raw = grad_raw;
    item.grad_out = from_time(whole.grad_out, t0), item.record_h = from_time(whole.record_h, t0);
    item.grad_h_all = from_time(whole.grad_h_all, t0), item.grad_c_all = from_time(whole.grad_c_all, t0);
    return item;
  }
};

RNNFAST_END
