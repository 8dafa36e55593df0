// Whole time loops in one launch, for layers whose recurrent weights fit one multiprocessor: see cuda/plan.h for who holds
// what. The state that enters a step lies in shared memory, twice, so that one barrier a step will do. What happens to a unit
// once its sums are known is the generic path's (forward.cuh, backward.cuh).
#pragma once

#include "cuda/backward.cuh"
#include "cuda/forward.cuh"
#include "cuda/plan.h"

RNNFAST_BEGIN

template <class A>
struct alignas(4 * sizeof(A)) Quad {
  A value[4];
};

// Which thread this is, and the sequences of its block.
struct Place {
  int slice;
  int64_t unit, batch0;
  int direction;

  RNNFAST_FN Place(const PersistentPlan& plan, int64_t block, int thread)
      : slice(thread % plan.slices),
        unit(thread / plan.slices),
        batch0(block % plan.batch_slices * plan.rows),
        direction(static_cast<int>(block / plan.batch_slices)) {}
};

// The weights of this thread, from load(gate, k), which is asked for valid units and k below `depth` only.
template <int G, int kHeld, class A, class Load>
__device__ void load_weights(Quad<A> (&held)[kHeld][G], Quad<A>* shared, const PersistentPlan& plan, int slice,
                             int64_t depth, bool valid, const Load& load) {
  const auto quad_of = [&](int g, int j) {
    Quad<A> quad;
    RNNFAST_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      const int64_t k = int64_t{4} * plan.first_quad(j, slice) + i;
      quad.value[i] = valid && k < depth ? load(g, k) : A(0);
    }
    return quad;
  };
  RNNFAST_UNROLL_ALL
  for (int j = 0; j < kHeld; ++j) RNNFAST_UNROLL_ALL
  for (int g = 0; g < G; ++g) held[j][g] = quad_of(g, j);
  for (int j = kHeld; j < plan.quads; ++j)
    for (int g = 0; g < G; ++g) shared[plan.weight_index(G, j, g, threadIdx.x)] = quad_of(g, j);
}

template <class A>
RNNFAST_FN A dot(const Quad<A>& a, const Quad<A>& b, A sum) {
  RNNFAST_UNROLL_ALL
  for (int i = 0; i < 4; ++i) sum = fma(a.value[i], b.value[i], sum);
  return sum;
}

// sum[r][g] = dot of weight[g] and the state of each row, added.
template <int R, int G, class A>
RNNFAST_FN void add_quad(A (&sum)[R][G], const Quad<A> (&weight)[G], const Quad<A>* state, int row_stride) {
  RNNFAST_UNROLL_ALL
  for (int r = 0; r < R; ++r) {
    const Quad<A> quad = state[r * row_stride];
    RNNFAST_UNROLL_ALL
    for (int g = 0; g < G; ++g) sum[r][g] = dot(weight[g], quad, sum[r][g]);
  }
}

// sum[row][g]: the recurrent product of this thread's unit, the same in all of its slices. `state`: one of the two.
template <int R, int G, int kHeld, class A>
__device__ void recurrent_product(A (&sum)[R][G], const Quad<A> (&held)[kHeld][G], const Quad<A>* weights,
                                  const Quad<A>* state, const PersistentPlan& plan, int slice) {
  RNNFAST_UNROLL_ALL
  for (int r = 0; r < R; ++r) RNNFAST_UNROLL_ALL
  for (int g = 0; g < G; ++g) sum[r][g] = 0;
  const int stride = plan.state_quads();
  RNNFAST_UNROLL_ALL
  for (int j = 0; j < kHeld; ++j) add_quad(sum, held[j], state + plan.first_quad(j, slice), stride);
  for (int j = kHeld; j < plan.quads; ++j) {
    Quad<A> weight[G];
    RNNFAST_UNROLL_ALL
    for (int g = 0; g < G; ++g) weight[g] = weights[plan.weight_index(G, j, g, threadIdx.x)];
    add_quad(sum, weight, state + plan.first_quad(j, slice), stride);
  }
  for (int mask = plan.slices / 2; mask > 0; mask /= 2) RNNFAST_UNROLL_ALL
  for (int r = 0; r < R; ++r) RNNFAST_UNROLL_ALL
  for (int g = 0; g < G; ++g) sum[r][g] = sum[r][g] + cuda_runtime::exchange(sum[r][g], mask);
}

// The sums of the one row that this slice finishes.
template <int R, int G, class A>
RNNFAST_FN void own_sums(const A (&sum)[R][G], int slice, A (&own)[G]) {
  RNNFAST_UNROLL_ALL
  for (int g = 0; g < G; ++g) {
    own[g] = sum[0][g];
    RNNFAST_UNROLL_ALL
    for (int r = 1; r < R; ++r) own[g] = r == slice ? sum[r][g] : own[g];
  }
}

// The numbers of the steps that any sequence of the block runs.
struct StepRange {
  int64_t begin, end;
};
template <class T>
RNNFAST_FN StepRange steps_of_block(const Item<T>& item, int64_t batch0, int rows) {
  int64_t most = 0;
  for (int r = 0; r < rows && batch0 + r < item.batch; ++r) {
    const int64_t steps = length(item, sequence_at(item, batch0 + r));
    most = steps > most ? steps : most;
  }
  return {item.reverse ? item.steps - most : 0, item.reverse ? item.steps : most};
}

// The h that enters step number n of sequence b, which left the step before with `h`; `from_memory`: that is not known here.
template <class T>
RNNFAST_FN Arithmetic<T> entering_h(const Item<T>& item, int64_t n, int64_t b, int64_t u, Arithmetic<T> h,
                                    bool from_memory) {
  const int64_t t = step_number(item, n);
  if (t >= length(item, b)) return 0;
  if (from_memory || is_cut(item, t, b) || is_first(item, t, b)) return read_unit(previous_h(item, t, b), u);
  return read(rounded<T>(h));
}

// The steps with numbers [begin, end).
template <class T, class Cell, int R, int kHeld, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads, 1)
    persistent_forward_kernel(Items<T> items, Cell cell, PersistentPlan plan, int64_t begin, int64_t end) {
  using A = Arithmetic<T>;
  constexpr int G = Cell::kGates;
  const Place place(plan, blockIdx.x, threadIdx.x);
  const Item<T>& item = items.item[place.direction];
  const int64_t u = place.unit, number = place.batch0 + place.slice;
  const bool owner = place.slice < R && u < item.H && number < item.batch;  // of row b: this thread runs its cell
  const int64_t b = owner ? sequence_at(item, number) : 0;
  Quad<A>* const weights = cuda_runtime::shared_memory<Quad<A>>();
  Quad<A>* const states = weights + plan.weight_quads(G);
  A* const state_values = &states[0].value[0];
  Quad<A> held[kHeld][G];
  load_weights(held, weights, plan, place.slice, item.H, u < item.H,
               [&](int g, int64_t k) { return item.w_hh(item.recurrent_gate[g] * item.H + u, k); });
  for (int i = threadIdx.x; i < 8 * R * plan.state_quads(); i += plan.threads) state_values[i] = 0;
  __syncthreads();

  const StepRange range = steps_of_block(item, place.batch0, R);
  const int64_t first = begin > range.begin ? begin : range.begin, last = end < range.end ? end : range.end;
  if (owner && first < last)
    state_values[4 * plan.state_index(0, place.slice) + u] = entering_h(item, first, b, u, A(0), true);
  __syncthreads();
  int buffer = 0;
  for (int64_t n = first; n < last; ++n, buffer ^= 1) {
    const int64_t t = step_number(item, n);
    const bool active = owner && t < length(item, b);
    const Ahead<Cell, A> ahead = active ? look_ahead<Cell>(item, t, b, u) : Ahead<Cell, A>{};
    A sum[R][G], own[G], h = 0;
    recurrent_product(sum, held, weights, states + plan.state_index(buffer, 0), plan, place.slice);
    own_sums(sum, place.slice, own);
    if (active) {
      h = run_cell(item, cell, t, b, u, ahead, own);
      write_h(item, t, b, u, true, h);
    }
    if (owner && n + 1 < last)
      state_values[4 * plan.state_index(buffer ^ 1, place.slice) + u] = entering_h(item, n + 1, b, u, h, false);
    __syncthreads();
  }
}

// All steps, from the last to the first, and what the first sends to the initial states. The states are gate gradients.
template <class T, class Cell, int R, int kHeld, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads, 1)
    persistent_backward_kernel(Items<T> items, Cell cell, PersistentPlan plan) {
  using A = Arithmetic<T>;
  constexpr int G = Cell::kGates;
  const Place place(plan, blockIdx.x, threadIdx.x);
  const Item<T>& item = items.item[place.direction];
  const int64_t u = place.unit, number = place.batch0 + place.slice;
  const bool owner = place.slice < R && u < item.H && number < item.batch;
  const int64_t b = owner ? sequence_at(item, number) : 0;
  Quad<A>* const weights = cuda_runtime::shared_memory<Quad<A>>();
  Quad<A>* const states = weights + plan.weight_quads(1);
  A* const state_values = &states[0].value[0];
  Quad<A> held[kHeld][1];
  load_weights(held, weights, plan, place.slice, G * item.H, u < item.H, [&](int, int64_t k) {
    int64_t row = item.recurrent_gate[0] * item.H + k;
    RNNFAST_UNROLL_ALL
    for (int g = 1; g < G; ++g)  // by comparisons: the code of a division would be there for each register
      row = k >= g * item.H ? (item.recurrent_gate[g] - g) * item.H + k : row;
    return item.w_hh(row, u);
  });
  for (int i = threadIdx.x; i < 8 * R * plan.state_quads(); i += plan.threads) state_values[i] = 0;
  __syncthreads();

  const StepRange range = steps_of_block(item, place.batch0, R);
  int buffer = 0;
  for (int64_t n = range.end - 1; n >= range.begin - 1; --n, buffer ^= 1) {
    if (owner) prefetch_adjoint<Cell>(item, moment(item, n, b), u);
    A sum[R][1], own[1];
    recurrent_product(sum, held, weights, states + plan.state_index(buffer, 0), plan, place.slice);
    own_sums(sum, place.slice, own);
    if (owner) {
      const Moment m = moment(item, n, b);
      A slot[Cell::kSlots];
      run_adjoint(item, cell, m, u, read_kept<Cell>(item, m, u), grad_h(item, m, u, own[0], grad_out(item, m, u)),
                  slot);
      for (int g = 0; g < G; ++g)
        state_values[4 * plan.state_index(buffer ^ 1, place.slice) + g * item.H + u] = slot[Cell::kRecurrent + g];
    }
    __syncthreads();
  }
}

// ---- ragged batches -------------------------------------------------------------------------------------------------

// By falling length, ties as they come: sequences of one block end together, and the longest blocks are the first to start.
// A thread for each sequence counts those before it.
template <class T>
__global__ void __launch_bounds__(kThreads) sort_kernel(Item<T> item, int32_t* order) {
  const int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (b >= item.batch) return;
  const int64_t own = length(item, b);
  int64_t before = 0;
  for (int64_t other = 0; other < item.batch; ++other) {
    const int64_t steps = length(item, other);
    before += steps > own || (steps == own && other < b);
  }
  order[before] = static_cast<int32_t>(b);
}

// ---- what the loops leave out: steps past a sequence's end --------------------------------------------------------

// One thread for each (t, b, unit).
template <class T>
RNNFAST_FN bool in_padding(const Item<T>& item, int64_t n, int64_t& t, int64_t& b, int64_t& u) {
  u = n % item.H, b = n / item.H % item.batch, t = n / item.H / item.batch;
  return t < item.steps && t >= length(item, b);
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_padding_kernel(Item<T> item) {
  int64_t t, b, u;
  if (!in_padding(item, int64_t{blockIdx.x} * kThreads + threadIdx.x, t, b, u)) return;
  write_h(item, t, b, u, false, Arithmetic<T>(0));
  if (item.cells) write_c(item, t, b, u, false, Arithmetic<T>(0));
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_padding_kernel(Item<T> item) {
  int64_t t, b, u;
  if (!in_padding(item, int64_t{blockIdx.x} * kThreads + threadIdx.x, t, b, u)) return;
  for (int s = 0; s < item.slot_count; ++s) item.gate_grads[slot_index(item, t, b, u) + s * item.H] = 0;
  if (item.record_h.data) at(item.record_h, t, b)[u] = rounded<T>(Arithmetic<T>(0));
}

RNNFAST_END
