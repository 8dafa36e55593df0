// The backward pass: a launch for each step, from the last to the first (two with a projection), in which dL/dh of a step
// is finished and the cell's adjoint follows at once; then the products for the weights and the input, over all steps.
#pragma once

#include "cuda/forward.cuh"

RNNFAST_BEGIN

// ---- carries: what reaches the step before, or the initial states, beside the recurrent product -------------------

// carry = grad of the final states, and nothing has been collected for the reset states.
template <class T>
__global__ void __launch_bounds__(kThreads) load_carries_kernel(Item<T> item) {
  const int64_t width = item.P > item.H ? item.P : item.H, n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = n / width, u = n % width;
  if (b >= item.batch) return;
  if (u < item.P) {
    item.carry_h[b * item.P + u] = read_unit(row_or_null(item.grad_hn, b), u);
    item.carry_reset_h[b * item.P + u] = 0;
  }
  if (u < item.H && item.carry_c) {
    item.carry_c[b * item.H + u] = read_unit(row_or_null(item.grad_cn, b), u);
    item.carry_reset_c[b * item.H + u] = 0;
  }
}

template <class T>
RNNFAST_FN void store_row(const Rows<T>& rows, int64_t b, int64_t u, Arithmetic<T> value) {
  if (rows.data) row_or_null(rows, b)[u] = rounded<T>(value);
}
template <class T>
__global__ void __launch_bounds__(kThreads) store_carries_kernel(Item<T> item) {
  const int64_t width = item.P > item.H ? item.P : item.H, n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = n / width, u = n % width;
  if (b >= item.batch) return;
  if (u < item.P) {
    store_row(item.grad_h0, b, u, item.carry_h[b * item.P + u]);
    store_row(item.grad_reset_h, b, u, item.carry_reset_h[b * item.P + u]);
  }
  if (u < item.H && item.carry_c) {
    store_row(item.grad_c0, b, u, item.carry_c[b * item.H + u]);
    store_row(item.grad_reset_c, b, u, item.carry_reset_c[b * item.H + u]);
  }
}

// ---- one step -----------------------------------------------------------------------------------------------------

// Step t of sequence b, and the step `later` that follows it in the forward order; -1: there is none.
struct Moment {
  int64_t t, later, b;
  bool active;  // t is a step that the sequence runs
  bool sends;   // so is `later`: its gate gradients reach h and c before it
  bool cut;     // which are the reset state's
};

template <class T>
RNNFAST_FN Moment moment(const Item<T>& item, int64_t n, int64_t b, int64_t steps) {  // which the sequence runs
  Moment m{
      n < 0 ? -1 : step_number(item, n), n + 1 < item.steps ? step_number(item, n + 1) : -1, b, false, false, false};
  m.active = n >= 0 && m.t < steps;
  m.sends = m.later >= 0 && m.later < steps;
  m.cut = m.sends && is_cut(item, m.later, b);
  return m;
}
template <class T>
RNNFAST_FN Moment moment(const Item<T>& item, int64_t n, int64_t b) {
  return moment(item, n, b, length(item, b));
}

// The gradient that came back through `later`; what a reset has cut off is the reset state's.
template <class A>
RNNFAST_FN A divert(bool cut, A& collected, A gradient) {
  if (!cut) return gradient;
  collected = collected + gradient;
  return A(0);
}

// dL/dh of unit u that comes from above.
template <class T>
RNNFAST_FN Arithmetic<T> grad_out(const Item<T>& item, const Moment& m, int64_t u) {
  return m.active && item.grad_out.data ? read(at(item.grad_out, m.t, m.b)[u]) : Arithmetic<T>(0);
}
// dL/dh of unit u, from the product of the later step's gate gradients; where the sequence does not run it waits in the carry.
template <class T, class A>
RNNFAST_FN A grad_h(const Item<T>& item, const Moment& m, int64_t u, A product, A above) {
  const int64_t index = m.b * item.P + u;
  A dh = item.carry_h[index];
  if (m.sends) dh = divert(m.cut, item.carry_reset_h[index], product + dh);
  item.carry_h[index] = m.active ? A(0) : dh;
  if (m.active && item.grad_out.data) dh = dh + above;
  if (m.active && item.grad_h_all.data) dh = dh + read(at(item.grad_h_all, m.t, m.b)[u]);
  if (m.t >= 0 && item.record_h.data) at(item.record_h, m.t, m.b)[u] = rounded<T>(m.active ? dh : A(0));
  return m.active ? dh : A(0);
}

// What the forward pass has kept of unit u for its adjoint. To be asked for before the product, which hides the memory's
// latency.
template <class Cell, class A>
struct Kept {
  A slot[Cell::kSlots] = {}, h_prev = 0, c_prev = 0, c = 0;
};
template <class Cell, class T, class A = Arithmetic<T>>
RNNFAST_FN Kept<Cell, A> read_kept(const Item<T>& item, const Moment& m, int64_t u) {
  Kept<Cell, A> kept;
  if (!m.active) return kept;
  const A* const stored = item.slots + slot_index(item, m.t, m.b, u);
  for (int s = 0; s < Cell::kSlots; ++s) kept.slot[s] = stored[s * item.H];
  if (Cell::kReadsPreviousH) kept.h_prev = read_unit(previous_h(item, m.t, m.b), u);
  if (Cell::kCellState) kept.c_prev = previous_cell(item, m.t, m.b, u), kept.c = cell_state(item, m.t, m.b, u);
  return kept;
}

// The cell's adjoint for unit u: gate gradients (in `slot` too), and what goes on to c and h of the step before.
template <class Cell, class T, class A>
RNNFAST_FN void run_adjoint(const Item<T>& item, const Cell& cell, const Moment& m, int64_t u,
                            const Kept<Cell, A>& kept, A dh, A (&slot)[Cell::kSlots]) {
  A dc = 0, dh_prev = 0;
  for (int s = 0; s < Cell::kSlots; ++s) slot[s] = 0;
  const int64_t index = m.b * item.H + u;
  if (Cell::kCellState) {
    dc = divert(m.cut, item.carry_reset_c[index], item.carry_c[index]);
    if (!m.active) item.carry_c[index] = dc;
  }
  if (m.t < 0) return;
  const int64_t first = slot_index(item, m.t, m.b, u);
  if (m.active) {
    for (int s = 0; s < Cell::kSlots; ++s) slot[s] = kept.slot[s];
    if (Cell::kCellState && item.grad_c_all.data) dc = dc + read(at(item.grad_c_all, m.t, m.b)[u]);
    cell.backward(slot, kept.h_prev, kept.c_prev, kept.c, dh, dc, dh_prev);
    if (Cell::kCellState) item.carry_c[index] = dc;
    if (Cell::kReadsPreviousH) item.carry_h[index] = dh_prev;
  }
  for (int s = 0; s < Cell::kSlots; ++s) item.gate_grads[first + s * item.H] = slot[s];
}

// Asks for what the adjoint of unit u will read from far away, where there are no registers for it. It stays in this
// multiprocessor's cache only until the next load that acquires.
template <class Cell, class T>
__device__ void prefetch_adjoint(const Item<T>& item, const Moment& m, int64_t u) {
  if (!m.active) return;
  const int64_t first = slot_index(item, m.t, m.b, u);
  for (int s = 0; s < Cell::kSlots; ++s) cuda_runtime::prefetch(item.slots + first + s * item.H);
  if (item.grad_out.data) cuda_runtime::prefetch(at(item.grad_out, m.t, m.b) + u);
  if (Cell::kCellState) cuda_runtime::prefetch(&cell_state(item, m.t, m.b, u));  // c before it comes with the next step
}

// Step number n of the forward order, backwards; n = -1 only collects what the first step sends to the initial states.
template <class T, class Cell>
__global__ void __launch_bounds__(kThreads) step_adjoint_kernel(Items<T> items, Cell cell, int64_t n) {
  using A = Arithmetic<T>;
  const StepTile tile(blockIdx.x, items.item[0].batch, items.item[0].P);
  const Item<T>& item = items.item[tile.direction];
  const int64_t later = n + 1 < item.steps ? step_number(item, n + 1) : -1;
  A sum[1][1][1] = {};
  for (int g = 0; later >= 0 && g < Cell::kGates; ++g) {
    const int64_t first_row = item.recurrent_gate[g] * item.H, slot = (Cell::kRecurrent + g) * item.H;
    multiply<true, false>(
        sum, 0, item.H, item.tf32,
        [&](int row, int64_t k) {
          const int64_t b = tile.batch0 + row;
          return b < item.batch ? item.gate_grads[slot_index(item, later, b, slot + k)] : A(0);
        },
        [&](int, int64_t k, int column) {
          return tile.unit0 + column < item.P ? item.w_hh(first_row + k, tile.unit0 + column) : A(0);
        });
  }
  const int64_t b = tile.batch0 + threadIdx.y, u = tile.unit0 + threadIdx.x;
  if (b >= item.batch || u >= item.P) return;
  const Moment m = moment(item, n, b);
  const A dh = grad_h(item, m, u, sum[0][0][0], grad_out(item, m, u));
  A slot[Cell::kSlots];
  if (!item.projected)
    run_adjoint(item, cell, m, u, read_kept<Cell>(item, m, u), dh, slot);
  else if (m.t >= 0)
    item.grad_raw[(m.t * item.batch + b) * item.P + u] = dh;
}

// The second half of a projected step: d(raw) = W_hr^T dh, and the adjoint.
template <class T, class Cell>
__global__ void __launch_bounds__(kThreads) projection_adjoint_kernel(Items<T> items, Cell cell, int64_t n) {
  using A = Arithmetic<T>;
  const StepTile tile(blockIdx.x, items.item[0].batch, items.item[0].H);
  const Item<T>& item = items.item[tile.direction];
  A sum[1][1][1] = {};
  if (n >= 0)
    multiply<true, false>(
        sum, 0, item.P, item.tf32,
        [&](int row, int64_t k) {
          const int64_t b = tile.batch0 + row;
          return b < item.batch ? item.grad_raw[(step_number(item, n) * item.batch + b) * item.P + k] : A(0);
        },
        [&](int, int64_t k, int column) {
          return tile.unit0 + column < item.H ? item.w_hr(k, tile.unit0 + column) : A(0);
        });
  const int64_t b = tile.batch0 + threadIdx.y, u = tile.unit0 + threadIdx.x;
  A slot[Cell::kSlots];
  if (b >= item.batch || u >= item.H) return;
  const Moment m = moment(item, n, b);
  run_adjoint(item, cell, m, u, read_kept<Cell>(item, m, u), sum[0][0][0], slot);
}

// ---- the input gradient: dx = sum over directions of W_ih^T (gate gradients) --------------------------------------

template <class T>
struct
    GateGradientRows {  // a row for each (t, b); along it the gates that the input feeds, of one direction, then of the other
  using Raw = Arithmetic<T>;
  static constexpr bool kAlongK = true, kOnes = false;
  Items<T> items;

  struct TwoRuns {
    const Raw* data;
    int64_t width, jump;  // of the first, and what is added for the second
    bool there;

    RNNFAST_FN const Raw* at(int64_t i) const { return data + i + (i >= width ? jump : 0); }
  };
  RNNFAST_FN int64_t period() const { return 1; }
  RNNFAST_FN TwoRuns run(int64_t row, int64_t) const {
    const Item<T>& first = items.item[0];
    const int64_t width = first.gates * first.H;
    const int64_t jump = items.count > 1 ? items.item[1].gate_grads - first.gate_grads - width : 0;
    return {first.gate_grads + row * first.slot_count * first.H, width, jump, true};
  }
};

template <class T>
struct InputWeightRows {  // those of weight_ih in the same order
  using Raw = T;
  static constexpr bool kAlongK = false, kOnes = false;
  Items<T> items;

  RNNFAST_FN int64_t period() const { return items.item[0].H; }
  RNNFAST_FN Run<T> run(int64_t g, int64_t u) const {
    const Item<T>& item = items.item[0];
    const bool second = g >= item.gates;
    const T* const data = second ? items.item[1].w_ih.data : item.w_ih.data;
    const int64_t row_stride = second ? items.item[1].w_ih.row_stride : item.w_ih.row_stride;
    const int64_t column_stride = second ? items.item[1].w_ih.column_stride : item.w_ih.column_stride;
    const int64_t row = chosen_gate(item.input_gate, second ? g - item.gates : g) * item.H + u;
    return {data + row * row_stride, column_stride, true};
  }
};

template <class T>
struct SequenceRows {
  Sequence<T> target;
  int64_t batch;

  RNNFAST_FN void operator()(int64_t row, int64_t column, int64_t, Arithmetic<T> value) const {
    at(target, row / batch, row % batch)[column] = rounded<T>(value);
  }
};

// ---- the weight gradients: sums over (t, b) of outer products -----------------------------------------------------
//
// The depth is cut into parts, each summed by blocks of its own, and the parts are added in their order: the result does not
// depend on which block came first. A column of ones behind the others makes the bias gradient.

template <class A>
struct TimeColumns {  // of [T * B, stride], from a first column on
  using Raw = A;
  static constexpr bool kAlongK = false, kOnes = false;
  const A* data;
  int64_t stride;

  RNNFAST_FN int64_t period() const { return 1; }
  RNNFAST_FN Run<A> run(int64_t k, int64_t) const { return {data + k * stride, 1, true}; }
};

template <class T>
struct InputColumns {  // x, then ones
  using Raw = T;
  static constexpr bool kAlongK = false, kOnes = true;
  InputRows<T> x;

  RNNFAST_FN int64_t width() const { return x.item.I; }
  RNNFAST_FN int64_t period() const { return x.period(); }
  RNNFAST_FN Run<T> run(int64_t t, int64_t b) const { return x.run(t, b); }
};

template <class T>
struct PreviousColumns {  // h before each step, then ones
  using Raw = T;
  static constexpr bool kAlongK = false, kOnes = true;
  Item<T> item;

  RNNFAST_FN int64_t width() const { return item.P; }
  RNNFAST_FN int64_t period() const { return item.batch; }
  RNNFAST_FN Run<T> run(int64_t t, int64_t b) const {
    const T* const h = t < length(item, b) ? previous_h(item, t, b) : nullptr;
    return {h ? h : at(item.out, t, b), 1, h != nullptr};
  }
};

template <class A>
struct Partials {  // [parts][rows][columns]
  A* data;
  int64_t rows, columns;

  RNNFAST_FN void operator()(int64_t row, int64_t column, int64_t part, A value) const {
    data[(part * rows + row) * columns + column] = value;
  }
};

// Where the sums go: rows of the caller's matrix, gate by gate; the last column, if it is one of ones, to the bias.
template <class T>
struct WeightTarget {
  T *weight, *bias;
  int64_t width;        // of the weight
  int64_t H;            // rows of each gate
  int gate[kMaxGates];  // the caller's number of each gate

  RNNFAST_FN int64_t row(int64_t m) const {
    int64_t result = m;
    for (int g = 0; g < kMaxGates; ++g)  // not by an index, which would put the array into local memory
      if (m / H == g) result = gate[g] * H + m % H;
    return result;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(Partials<Arithmetic<T>> partials, int64_t parts, WeightTarget<T> target) {
  using A = Arithmetic<T>;
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = partials.rows * partials.columns;
  if (n >= size) return;
  A sum = partials.data[n];
  for (int64_t part = 1; part < parts; ++part) sum = sum + partials.data[part * size + n];
  const int64_t row = target.row(n / partials.columns), column = n % partials.columns;
  if (column < target.width)
    target.weight[row * target.width + column] = rounded<T>(sum);
  else if (target.bias)
    target.bias[row] = rounded<T>(sum);
}

RNNFAST_END
