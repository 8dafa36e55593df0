// Gradients of the weights and of the input, from the gate gradients of the rows of a few steps:
//
//   dW_ih = sum_r dgates_r x_r^T     dW_hh = sum_r dgates_r h'_r^T     db = sum_r dgates_r     dx_r = W_ih^T dgates_r
//
// Both are taken while the rows are in cache. The sums of an item (direction, slice of the batch) are its own; a thread
// makes those of its own blocks, whose gate gradients it has just made, and its part of the units of a shared one. Within a
// product a sum starts from zero, so that the error grows with the number of products and not with that of rows. Rows are
// added as the loop goes, backwards: a large initial state comes last, and nothing is rounded to its digits after it. In the
// end the slices are added in their order.
#pragma once

#include "cpu/forward.h"

RNNFAST_BEGIN

// Rows [begin, end) of the schedule, of the steps from t on; the first of them lies at row `kept` of slots and raw.
template <class T>
struct ChunkRows {
  int64_t t, begin, end, kept;
  RNNFAST_FN int64_t count() const { return end - begin; }
};

// The gradients of the gates as the left operand of a product.
template <class Cell, class T>
RNNFAST_FN GateOperand gate_operand(const Item<T>& item) {
  constexpr int64_t W = Vec<T>::kLanes;
  return {Cell::kSlots * W, item.slot_rows * Cell::kSlots * W, item.H / W, item.H % W, Cell::kGates};
}

template <class T>
const Item<T>* items_of(const Network<T>& net, int64_t layer, int64_t direction) {
  return net.items + (layer * net.directions + direction) * net.slices;
}

// The sums of one item, for the blocks of one thread: straight into the caller's layout for the first slice of the batch,
// into memory of the same layout for the others.
//
// A tile holds a few units of one gate (scalars) times four vectors of columns: a row's inputs are read as whole lines, and
// the sums are written so. Inputs narrower than half a vector take the units as lanes instead.
template <class T, class Cell>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;
  static constexpr int64_t kProductRows = 128;  // of one sum that starts from zero
  static constexpr int64_t kNarrow = W / 2;

 public:
  WeightGradient(const Network<T>& net, int64_t layer, int64_t direction, int64_t slice, const Worker& me,
                 Scratch<T>& scratch)
      : item_(items_of(net, layer, direction)[slice]),
        sums_(net.grad_weights[(layer * net.directions + direction) * net.slices + slice]),
        me_(me),
        most_rows_(net.row_chunk),
        scratch_(scratch) {}

  // Where there was no row at all.
  void finish() {
    if (!sums_.w_ih || !first_) return;
    for_units([&](int64_t block, int gate, int64_t unit, int64_t lanes) {
      zero(sums_.w_ih + unit * item_.I, lanes * item_.I), zero(sums_.w_hh + unit * item_.P, lanes * item_.P);
      if (sums_.b_ih) zero(sums_.b_ih + unit, lanes), zero(sums_.b_hh + unit, lanes);
      for (int64_t p = 0; gate == 0 && item_.projected && p < item_.P; ++p)
        zero(sums_.w_hr + p * item_.H + block * W, lanes);
    });
  }

  void add(const ChunkRows<T>& rows) {
    if (!sums_.w_ih) return;
    for (int64_t row = rows.begin; row < rows.end; row += most_rows_) {
      const int64_t done = row - rows.begin;
      add({rows.t, row, least(row + most_rows_, rows.end), rows.kept + done}, done);
    }
  }

 private:
  // `done` rows of the same steps came before. The first product of all replaces what was in the sums.
  void add(const ChunkRows<T>& rows, int64_t done) {
    matrix(rows, false);
    matrix(rows, true);
    for_blocks([&](int64_t block, Range units) {
      if (sums_.b_ih && units.begin == 0) bias(rows, block);
      if (item_.projected) projection(rows, block, done);
    });
    first_ = false;
  }

  // dW_ih or dW_hh, a panel of columns after the other. The inputs of a panel are copied, so that they lie in as few cache
  // lines (and, with strides like 4 KB, in more than a few sets) as they can. All products of a block come in turn, while
  // its sums are in the first-level cache.
  void matrix(const ChunkRows<T>& rows, bool recurrent) {
    fill_rows(rows, recurrent);
    const int64_t width = recurrent ? item_.P : item_.I;
    if (width <= kNarrow) return for_products(rows, recurrent, [&](const Product& p) { narrow(p, width); });
    for (int64_t column = 0; column < width;) {
      const int64_t left = width - column;
      const int U = panel_width(Blocks<T>::count(left), 4);
      copy_panel(column, rows.count(), U, left);
      const auto panel = [&](const Product& p) {
        if (U == 4) wide<4>(p, column, width);
        if (U == 2) wide<2>(p, column, width);
        if (U == 1) wide<1>(p, column, width);
      };
      for_products(rows, recurrent, panel);
      column += U * W;
    }
  }

  struct Product {
    bool recurrent;
    int64_t block;
    Range units;              // of the block
    int64_t last, row, rows;  // `last`: the first to be added, among the slots; `row`: the same among the addresses
    bool add;
  };
  template <class Run>
  void for_products(const ChunkRows<T>& rows, bool recurrent, Run&& run) const {
    for_blocks([&](int64_t block, Range units) {
      for (int64_t r = 0; r < rows.count(); r += kProductRows)
        run({recurrent, block, units, rows.kept + rows.count() - 1 - r, r, least(kProductRows, rows.count() - r),
             !first_ || r > 0});
    });
  }

  // run(block, units) for what is this thread's: whole blocks, and units of those whose rows the threads share.
  template <class Run>
  void for_blocks(Run&& run) const {
    const Portion mine = portion_of(item_, me_);
    for (int64_t block = mine.blocks.begin; block < mine.blocks.end; ++block)
      run(block, Range{0, Blocks<T>::lanes(item_.H, block)});
    for (int64_t block = mine.shared.begin; block < mine.shared.end; ++block)
      if (const Range units = me_.part(Blocks<T>::lanes(item_.H, block)); units.begin < units.end) run(block, units);
  }

  void copy_panel(int64_t column, int64_t rows, int U, int64_t left) {
    T* target = scratch_.panel;
    for (int64_t r = 0; r < rows; ++r)
      for (int u = 0; u < U; ++u, target += W)
        load_lanes(scratch_.h_rows[r] + column + u * W, least(W, left - u * W)).store(target);
  }

  template <int U>
  void wide(const Product& p, int64_t column, int64_t width) {
    const int64_t first = (p.recurrent ? R * W : 0) + p.units.begin;
    const int64_t next = p.block + 1 < me_.blocks.end ? p.block + 1 : me_.blocks.begin;
    const T* gates = slot_of<Cell>(item_, p.block, p.last) + first;
    const T* ahead = slot_of<Cell>(item_, next, p.last) + first;
    T* const sums = (p.recurrent ? sums_.w_hh : sums_.w_ih) + column;
    for (int g = 0; g < G; ++g)
      outer_units<T, U>({gates + g * W, ahead + g * W, -S * W, scratch_.panel + p.row * U * W, p.rows,
                         sums + first_unit(p, g) * width, width, least(W, width - column - (U - 1) * W), p.add},
                        p.units.end - p.units.begin);
  }

  // Row of the sums that belongs to the first of the units and the g-th gate in kernel order.
  RNNFAST_FN int64_t first_unit(const Product& p, int g) const {
    return (p.recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g]) * item_.H + p.block * W + p.units.begin;
  }

  void narrow(const Product& p, int64_t width) {
    const T* gates = slot_of<Cell>(item_, p.block, p.last) + (p.recurrent ? R * W : 0);
    for_tiles(width, max_rows(G), [&](int64_t column, int64_t count) {
      with_rows<1, G>(count, [&]<int MR, int U>() {
        Tile<T, MR, 1, G> tile;
        tile.clear();
        outer<T, MR, 1, G>(tile, scratch_.h_rows + p.row, column, p.rows, gates, -S * W, 0);
        for (int m = 0; m < MR; ++m)
          for (int g = 0; g < G; ++g) {
            T* sums = (p.recurrent ? sums_.w_hh : sums_.w_ih) + first_unit(p, g) * width + column + m;
            T values[W];
            tile.acc[m][g].store(values);
            for (int64_t lane = p.units.begin; lane < p.units.end; ++lane, sums += width)
              *sums = p.add ? values[lane] + *sums : values[lane];
          }
      });
    });
  }

  void bias(const ChunkRows<T>& rows, int64_t block) {
    V part[S];
    RNNFAST_UNROLL
      for (int s = 0; s < S; ++s) part[s] = V(T(0));
    const T* gates = slot_of<Cell>(item_, block, rows.kept);
    for (int64_t r = 0; r < rows.count(); ++r, gates += S * W)
      RNNFAST_UNROLL
        for (int s = 0; s < S; ++s) part[s] = part[s] + V::load(gates + s * W);
    const auto put = [&](const V& value, T* sums, int gate) {
      const int64_t lanes = Blocks<T>::lanes(item_.H, block);
      T* sum = sums + gate * item_.H + block * W;
      store_lanes(first_ ? value : value + load_lanes(sum, lanes), sum, lanes);
    };
    for (int g = 0; g < G; ++g) {
      put(part[g], sums_.b_ih, Cell::kInputGate[g]);
      put(part[R + g], sums_.b_hh, Cell::kRecurrentGate[g]);
    }
  }

  // dW_hr = sum_r dh_r (o tanh c)_r^T: plain rows on both sides, and few of them.
  void projection(const ChunkRows<T>& rows, int64_t block, int64_t done) {
    const int64_t lanes = Blocks<T>::lanes(item_.H, block), P = item_.P;
    T* const sums = sums_.w_hr + block * W;
    for (int64_t p = 0; first_ && p < P; ++p) zero(sums + p * item_.H, lanes);
    for (int64_t p = 0; p < P; ++p) {
      V sum(T(0));
      for (int64_t r = 0; r < rows.count(); ++r)
        sum = multiply_add(V(item_.grad_raw[(done + r) * P + p]),
                           load_lanes(item_.raw + (rows.kept + r) * item_.H + block * W, lanes), sum);
      T* target = sums + p * item_.H;
      store_lanes(first_ ? sum : sum + load_lanes(target, lanes), target, lanes);
    }
  }

  // run(block, gate, first row of the sums, units) for what is this thread's.
  template <class Run>
  void for_units(Run&& run) const {
    for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block)
      for (int gate = 0; gate < G; ++gate)
        run(block, gate, gate * item_.H + block * W, Blocks<T>::lanes(item_.H, block));
  }
  static void zero(T* values, int64_t n) {
    for (int64_t i = 0; i < n; ++i) values[i] = T(0);
  }

  // Addresses of the rows' inputs, or of their previous h, from the last row to the first.
  void fill_rows(const ChunkRows<T>& rows, bool recurrent) {
    const Schedule& schedule = item_.schedule;
    for (int64_t r = rows.begin, t = rows.t; r < rows.end; ++t) {
      const int64_t row0 = offset(schedule, t), stop = least(rows.end, row0 + active(schedule, t));
      const T** target = scratch_.h_rows + (r - rows.begin);
      const Range sequences{r - row0, stop - row0};
      recurrent ? previous_h_rows(item_, t, sequences, target) : input_rows(item_, t, sequences, target);
      r = most(r, stop);
    }
    for (const T **a = scratch_.h_rows, **b = a + rows.count() - 1; a < b; ++a, --b) {
      const T* const kept = *a;
      *a = *b, *b = kept;
    }
  }

  const Item<T>& item_;
  const WeightGradients<T> sums_;
  const Worker& me_;
  const int64_t most_rows_;
  Scratch<T>& scratch_;
  bool first_ = true;
};

// Adds the sums of the other slices to those of the first; the team shares the values.
template <class T, class Cell>
void add_slices(const Network<T>& net, int64_t layer, Member team) {
  const Item<T>& item = *items_of(net, layer, 0);
  const int64_t units = Cell::kGates * item.H;
  const auto add = [&](T* sums, const T* slice, int64_t n) {
    if (!sums) return;
    const Range mine = share(n, team.rank, team.size);
    for (int64_t i = mine.begin; i < mine.end; ++i) sums[i] += slice[i];
  };
  for (int64_t d = 0; d < net.directions; ++d)
    for (int64_t s = 1; s < net.slices; ++s) {
      const WeightGradients<T>* all = net.grad_weights + (layer * net.directions + d) * net.slices;
      add(all[0].w_ih, all[s].w_ih, units * item.I), add(all[0].w_hh, all[s].w_hh, units * item.P);
      add(all[0].b_ih, all[s].b_ih, units), add(all[0].b_hh, all[s].b_hh, units);
      add(all[0].w_hr, all[s].w_hr, item.P * item.H);
    }
}

// dx of the rows of one item. Of two directions the second to come adds to what the first has written: a sum of two has
// no order. They may come at once, on different threads; those of one rank meet at the same rows, and take turns.
template <class T, class Cell>
class InputGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;

 public:
  InputGradient(const Network<T>& net, int64_t layer, int64_t direction, int64_t slice, const Worker& me,
                Scratch<T>& scratch)
      : item_(items_of(net, layer, direction)[slice]),
        target_(net.grad_input[layer]),
        me_(me),
        scratch_(scratch),
        first_direction_(direction == 0),
        busy_(static_cast<int32_t>(2 * layer + 1)) {
    const int64_t pieces = (item_.schedule.steps + item_.gradient_steps - 1) / item_.gradient_steps;
    if (net.input_turns) turns_ = net.input_turns + (slice * me.size() + me.rank()) * pieces;
  }

  void run(const ChunkRows<T>& rows) {
    if (!target_.data) return;
    const Range mine = part(rows.end - rows.begin);
    if (mine.begin == mine.end) return;
    int32_t* const turn = turns_ ? turns_ + rows.t / item_.gradient_steps : nullptr;
    const bool add = turn && !is_first(turn);
    products(rows, mine, add);
    if (turn && !add) __atomic_store_n(turn, busy_ + 1, __ATOMIC_RELEASE);
  }

  // Past the end of each sequence: zero.
  void zero_padding() const {
    if (!target_.data || !first_direction_) return;
    const Schedule& schedule = item_.schedule;
    const Range mine = me_.part(schedule.sequences);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      for (int64_t t = length(schedule, i); t < schedule.steps; ++t) {
        T* row = at(target_, t, batch_index(schedule, i));
        for (int64_t j = 0; j < item_.I; ++j) row[j] = T(0);
      }
  }

 private:
  // My rows of n: so many that no tile is so small that it sums in another order, however many threads share them.
  Range part(int64_t n) const {
    constexpr int64_t kLeast = 6;
    const Range all = me_.part(me_.size());
    const int64_t parts = most(1, least(me_.size(), n / kLeast));
    return {n * least(all.begin, parts) / parts, n * least(all.end, parts) / parts};
  }

  // Claims the rows; false once the other direction has written them. Other layers have left other values.
  bool is_first(int32_t* turn) const {
    for (int32_t seen = __atomic_load_n(turn, __ATOMIC_ACQUIRE);;) {
      if (seen == busy_ + 1) return false;
      if (seen == busy_)
        seen = __atomic_load_n(turn, __ATOMIC_ACQUIRE);
      else if (__atomic_compare_exchange_n(turn, &seen, busy_, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return true;
    }
  }

  void products(const ChunkRows<T>& rows, Range mine, bool add) {
    T** targets = const_cast<T**>(scratch_.h_rows);
    fill_targets(rows.begin + mine.begin, rows.begin + mine.end, rows.t, targets);
    if (!item_.w_ih_rows) return narrow(rows.kept + mine.begin, mine.end - mine.begin, targets, add);
    const int64_t w_stride = item_.H * Cell::kGates * W, row0 = rows.kept + mine.begin;
    for_panels<1>({0, Blocks<T>::count(item_.I)}, mine.end - mine.begin,
                  [&]<int MR, int U>(int64_t row, int64_t block) {
                    Tile<T, MR, U, 1> tile;
                    tile.clear();
                    accumulate_gates<T, MR, U>(tile, slot_of<Cell>(item_, 0, row0 + row), gate_operand<Cell>(item_),
                                               item_.w_ih_rows + block * w_stride, w_stride);
                    RNNFAST_UNROLL
                      for (int m = 0; m < MR; ++m)
                        RNNFAST_UNROLL
                          for (int u = 0; u < U; ++u) {
                            const int64_t lanes = Blocks<T>::lanes(item_.I, block + u);
                            T* target = targets[row + m] + (block + u) * W;
                            V value = tile.acc[m][u];
                            if (add) value = value + load_lanes(target, lanes);
                            store_lanes(value, target, lanes);
                          }
                  });
  }

  // Inputs so narrow that a vector of them would be mostly empty (core/run.cpp decides): the units are the lanes.
  void narrow(int64_t row0, int64_t rows, T* const* targets, bool add) const {
    constexpr int G = Cell::kGates;
    const int64_t blocks = Blocks<T>::count(item_.H), block_stride = item_.slot_rows * Cell::kSlots * W;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < item_.I; ++j) {
        const T *gates = slot_of<Cell>(item_, 0, row0 + r), *weights = item_.w_ih + j * G * W;
        V part[G];
        RNNFAST_UNROLL
          for (int g = 0; g < G; ++g) part[g] = V(T(0));
        for (int64_t block = 0; block < blocks; ++block, gates += block_stride, weights += item_.I * G * W)
          RNNFAST_UNROLL
            for (int g = 0; g < G; ++g)
              part[g] = multiply_add(load_lanes(gates + g * W, Blocks<T>::lanes(item_.H, block)),
                                     V::load(weights + g * W), part[g]);  // padded gates may be NaN
        for (int g = 1; g < G; ++g) part[0] = part[0] + part[g];
        targets[r][j] = add ? targets[r][j] + sum_of_lanes(part[0]) : sum_of_lanes(part[0]);
      }
  }

  void fill_targets(int64_t begin, int64_t end, int64_t t, T** targets) {
    const Schedule& schedule = item_.schedule;
    while (offset(schedule, t) + active(schedule, t) <= begin) ++t;
    for (int64_t r = begin; r < end; ++t) {
      const int64_t row0 = offset(schedule, t), stop = least(end, row0 + active(schedule, t));
      for (; r < stop; ++r) targets[r - begin] = at(target_, t, batch_index(schedule, r - row0));
    }
  }

  const Item<T>& item_;
  const Sequence<T> target_;
  const Worker& me_;
  Scratch<T>& scratch_;
  const bool first_direction_;
  const int32_t busy_;  // of a layer: one value for "being written", the next for "written"
  int32_t* turns_ = nullptr;
};

RNNFAST_END
