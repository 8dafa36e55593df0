// The forward pass: input products of many steps at once, then a launch for each step (two with a projection).
#pragma once

#include "cuda/product.cuh"

RNNFAST_BEGIN

// ---- the input product: slots[t][b][g][u] = W_ih x, without bias --------------------------------------------------

template <class T>
struct InputRows {  // x of the steps from `begin` on, a row for each (t, b); zero past a sequence's end
  using Raw = T;
  static constexpr bool kAlongK = true, kOnes = false;
  Item<T> item;
  int64_t begin;

  RNNFAST_FN int64_t period() const { return item.batch; }
  RNNFAST_FN Run<T> run(int64_t step, int64_t b) const {
    return {at(item.x, begin + step, b), 1, begin + step < length(item, b)};
  }
};

// gates[g], not by an index, which would put the array into local memory.
RNNFAST_FN int64_t chosen_gate(const int (&gates)[kMaxGates], int64_t g) {
  int64_t gate = gates[0];
  RNNFAST_UNROLL_ALL
  for (int i = 1; i < kMaxGates; ++i) gate = i == g ? gates[i] : gate;
  return gate;
}

template <class T>
struct InputWeights {  // column g * H + u: the row of weight_ih that feeds slot g of unit u
  using Raw = T;
  static constexpr bool kAlongK = true, kOnes = false;
  Item<T> item;

  RNNFAST_FN int64_t period() const { return item.H; }
  RNNFAST_FN Run<T> run(int64_t g, int64_t u) const {
    const int64_t row = chosen_gate(item.input_gate, g) * item.H + u;
    return {item.w_ih.data + row * item.w_ih.row_stride, item.w_ih.column_stride, true};
  }
};

template <class A>
struct DenseRows {  // rows `stride` apart
  A* data;
  int64_t stride;

  RNNFAST_FN void operator()(int64_t row, int64_t column, int64_t, A value) const {
    data[row * stride + column] = value;
  }
};

// ---- the states before the first step -----------------------------------------------------------------------------

// hn = h0 and cn = c0, for sequences of no steps; all others replace theirs.
template <class T>
__global__ void __launch_bounds__(kThreads) initial_state_kernel(Item<T> item) {
  const int64_t width = item.P > item.H ? item.P : item.H, n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = n / width, u = n % width;
  if (b >= item.batch) return;
  if (u < item.P) row_or_null(item.hn, b)[u] = rounded<T>(read_unit(row_or_null(item.h0, b), u));
  if (u < item.H && item.cn.data) row_or_null(item.cn, b)[u] = rounded<T>(read_unit(row_or_null(item.c0, b), u));
}

// ---- one step -----------------------------------------------------------------------------------------------------

template <class T>
RNNFAST_FN void write_h(const Item<T>& item, int64_t t, int64_t b, int64_t u, bool active, Arithmetic<T> h) {
  const T value = rounded<T>(active ? h : Arithmetic<T>(0));
  at(item.out, t, b)[u] = value;
  if (item.h_all.data) at(item.h_all, t, b)[u] = value;
  if (active && is_last(item, t, b)) row_or_null(item.hn, b)[u] = value;
}

template <class T>
RNNFAST_FN void write_c(const Item<T>& item, int64_t t, int64_t b, int64_t u, bool active, Arithmetic<T> c) {
  const T value = rounded<T>(active ? c : Arithmetic<T>(0));
  if (active) cell_state(item, t, b, u) = c;
  if (item.c_all.data) at(item.c_all, t, b)[u] = value;
  if (!active || !is_last(item, t, b)) return;
  if (item.running_c.data)
    row_or_null(item.running_c, b)[u] = c;
  else
    row_or_null(item.cn, b)[u] = value;
}

// What the cell needs of unit u beside the recurrent product: pre-activations from the input product with the biases of
// both products, and the previous states. To be asked for before the product, which then hides the memory's latency.
template <class Cell, class A>
struct Ahead {
  A slot[Cell::kSlots], h_prev = 0, c_prev = 0;
};
template <class Cell, class T, class A = Arithmetic<T>>
RNNFAST_FN Ahead<Cell, A> look_ahead(const Item<T>& item, int64_t t, int64_t b, int64_t u) {
  Ahead<Cell, A> ahead;
  const A* const stored = item.slots + slot_index(item, t, b, u);
  for (int s = 0; s < Cell::kSlots; ++s) {
    const int r = s - Cell::kRecurrent;
    A sum = s < Cell::kGates ? stored[s * item.H] : A(0);
    if (s < Cell::kGates && item.b_ih.data) sum = sum + item.b_ih(0, item.input_gate[s] * item.H + u);
    if (r >= 0 && r < Cell::kGates && item.b_hh.data) sum = sum + item.b_hh(0, item.recurrent_gate[r] * item.H + u);
    ahead.slot[s] = sum;
  }
  if (Cell::kReadsPreviousH) ahead.h_prev = read_unit(previous_h(item, t, b), u);
  if (Cell::kCellState) ahead.c_prev = previous_cell(item, t, b, u);
  return ahead;
}

// What a step makes of unit u.
template <class Cell, class A>
struct Made {
  A slot[Cell::kSlots], h = 0, c = 0;
};
// The cell itself; nothing is stored.
template <class Cell, class A>
RNNFAST_FN Made<Cell, A> make_step(const Cell& cell, const Ahead<Cell, A>& ahead, const A (&recurrent)[Cell::kGates]) {
  Made<Cell, A> made;
  for (int s = 0; s < Cell::kSlots; ++s) made.slot[s] = ahead.slot[s];
  for (int g = 0; g < Cell::kGates; ++g)
    made.slot[Cell::kRecurrent + g] = made.slot[Cell::kRecurrent + g] + recurrent[g];
  cell.gates(made.slot, ahead.c_prev, made.c);
  made.h = cell.output(made.slot, ahead.h_prev, made.c);
  return made;
}
// All but h, for a sequence that runs at t.
template <class Cell, class T, class A>
RNNFAST_FN void store_step(const Item<T>& item, int64_t t, int64_t b, int64_t u, const Made<Cell, A>& made) {
  A* const stored = item.slots + slot_index(item, t, b, u);
  if (item.keep)
    for (int s = 0; s < Cell::kSlots; ++s) stored[s * item.H] = made.slot[s];
  if (Cell::kCellState) write_c(item, t, b, u, true, made.c);
}

template <class Cell, class T, class A>
RNNFAST_FN A run_cell(const Item<T>& item, const Cell& cell, int64_t t, int64_t b, int64_t u,
                      const Ahead<Cell, A>& ahead, const A (&recurrent)[Cell::kGates]) {
  const Made<Cell, A> made = make_step(cell, ahead, recurrent);
  store_step(item, t, b, u, made);
  return made.h;
}

// Step number n of the forward order: the recurrent product of a tile, and the cell.
template <class T, class Cell>
__global__ void __launch_bounds__(kThreads) step_kernel(Items<T> items, Cell cell, int64_t n) {
  using A = Arithmetic<T>;
  const StepTile tile(blockIdx.x, items.item[0].batch, items.item[0].H);
  const Item<T>& item = items.item[tile.direction];
  const int64_t t = step_number(item, n), b = tile.batch0 + threadIdx.y, u = tile.unit0 + threadIdx.x;
  __shared__ const T* h_rows[kTile];  // of the tile's sequences; null: zero, or the sequence does not run
  if (threadIdx.x == 0) h_rows[threadIdx.y] = b < item.batch && t < length(item, b) ? previous_h(item, t, b) : nullptr;
  __syncthreads();
  bool any = false;
  for (int row = 0; row < kTile; ++row) any = any || h_rows[row];

  const bool active = b < item.batch && u < item.H && t < length(item, b);
  const Ahead<Cell, A> ahead = active ? look_ahead<Cell>(item, t, b, u) : Ahead<Cell, A>{};
  A sum[Cell::kGates][1][1] = {};
  if (any)
    multiply<true, true>(
        sum, 0, item.P, item.tf32, [&](int row, int64_t k) { return h_rows[row] ? read(h_rows[row][k]) : A(0); },
        [&](int g, int64_t k, int column) {
          const int64_t unit = tile.unit0 + column;
          return unit < item.H ? item.w_hh(item.recurrent_gate[g] * item.H + unit, k) : A(0);
        });
  if (b >= item.batch || u >= item.H) return;
  A recurrent[Cell::kGates];
  for (int g = 0; g < Cell::kGates; ++g) recurrent[g] = sum[g][0][0];
  const A h = active ? run_cell(item, cell, t, b, u, ahead, recurrent) : A(0);
  if (!active && Cell::kCellState) write_c(item, t, b, u, false, A(0));
  if (!item.projected)
    write_h(item, t, b, u, active, h);
  else
    raw_h(item, t, b, u) = h;
}

// h = W_hr raw, the second half of a projected step.
template <class T>
__global__ void __launch_bounds__(kThreads) projection_kernel(Items<T> items, int64_t n) {
  using A = Arithmetic<T>;
  const StepTile tile(blockIdx.x, items.item[0].batch, items.item[0].P);
  const Item<T>& item = items.item[tile.direction];
  const int64_t t = step_number(item, n), b = tile.batch0 + threadIdx.y, u = tile.unit0 + threadIdx.x;
  A sum[1][1][1] = {};
  multiply<true, true>(
      sum, 0, item.H, item.tf32,
      [&](int row, int64_t k) { return tile.batch0 + row < item.batch ? raw_h(item, t, tile.batch0 + row, k) : A(0); },
      [&](int, int64_t k, int column) {
        return tile.unit0 + column < item.P ? item.w_hr(tile.unit0 + column, k) : A(0);
      });
  if (b < item.batch && u < item.P) write_h(item, t, b, u, t < length(item, b), sum[0][0][0]);
}

RNNFAST_END
