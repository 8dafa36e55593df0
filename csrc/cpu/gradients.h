// Gradients of the weights and of the input, from the gate gradients of the rows of a few steps:
//
//   dW_ih = sum_r dgates_r x_r^T     dW_hh = sum_r dgates_r h'_r^T     db = sum_r dgates_r     dx_r = W_ih^T dgates_r
//
// Both are taken while the rows are in cache. The sums of an item (direction, slice of the batch) are its own; a thread
// makes those of its own blocks, whose gate gradients it has just made. Within a product a sum starts from zero, so that the
// error grows with the number of products and not with that of rows. In the end the slices are added in their order.
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

// The sums of one layer and direction, blocked like packed weights.
template <class T>
struct GradientSums {
  T *w_ih, *w_hh, *bias, *w_hr;  // [blocks][I][G][W], [blocks][P][G][W], [blocks][slots][W], [blocks][P][W]

  template <class Cell>
  GradientSums(T* base, const Item<T>& item, const Cell*) {
    const int64_t padded = Blocks<T>::count(item.H) * Vec<T>::kLanes;
    w_ih = base;
    w_hh = w_ih + padded * item.I * Cell::kGates;
    bias = w_hh + padded * item.P * Cell::kGates;
    w_hr = bias + padded * Cell::kSlots;
  }
};

// The sums of one item, for the blocks of one thread.
template <class T, class Cell>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;
  static constexpr int kWidth = panel_blocks<G>;
  static constexpr int64_t kTileColumns = least(6, max_rows(G));

 public:
  WeightGradient(const Network<T>& net, int64_t layer, int64_t direction, int64_t slice, const Worker& me,
                 Scratch<T>& scratch)
      : item_(items_of(net, layer, direction)[slice]),
        wanted_(net.grad_weights[layer * net.directions + direction].w_ih),
        sums_(net.gradient_sums + (direction * net.slices + slice) * net.gradient_sums_stride, item_,
              static_cast<const Cell*>(nullptr)),
        me_(me),
        most_rows_(net.row_chunk),
        scratch_(scratch) {}

  // Where there was no row at all.
  void finish() {
    if (!wanted_ || !first_) return;
    const auto zero = [&](T* sums, int64_t vectors) {
      for (int64_t n = me_.blocks.begin * vectors; n < me_.blocks.end * vectors; ++n) V(T(0)).store(sums + n * W);
    };
    zero(sums_.w_ih, item_.I * G), zero(sums_.w_hh, item_.P * G), zero(sums_.bias, S);
    if (item_.projected) zero(sums_.w_hr, item_.P);
  }

  void add(const ChunkRows<T>& rows) {
    if (!wanted_) return;
    for (int64_t row = rows.begin; row < rows.end; row += most_rows_) {
      const int64_t done = row - rows.begin;
      add({rows.t, row, least(row + most_rows_, rows.end), rows.kept + done}, done);
    }
  }

 private:
  // `done` rows of the same steps came before. The first product of all replaces what was in the sums.
  void add(const ChunkRows<T>& rows, int64_t done) {
    for (int k = 0; k < 2; ++k) {
      const bool recurrent = k == 1;
      fill_rows(rows, recurrent);
      for (int64_t block = me_.blocks.begin; block < me_.blocks.end;) {
        const int width = panel_width(me_.blocks.end - block, kWidth);
        if constexpr (kWidth >= 4) {
          if (width == 4) matrix<4>(rows, block, recurrent);
          if (width == 2) matrix<2>(rows, block, recurrent);
        }
        if (width == 1) matrix<1>(rows, block, recurrent);
        block += width;
      }
    }
    for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block) {
      bias(rows, block);
      if (item_.projected) projection(rows, block, done);
    }
    first_ = false;
  }

  template <int U>
  void matrix(const ChunkRows<T>& rows, int64_t block, bool recurrent) {
    const int64_t width = recurrent ? item_.P : item_.I, block_stride = width * G * W;
    T* const sums = (recurrent ? sums_.w_hh : sums_.w_ih) + block * block_stride;
    const T* gates = slot_of<Cell>(item_, block, rows.kept) + (recurrent ? R * W : 0);
    const int64_t gate_stride = item_.slot_rows * S * W;
    for_tiles(width, kTileColumns, [&](int64_t column, int64_t count) {
      with_rows<U, G>(count, [&]<int MR, int UU>() {
        Tile<T, MR, UU, G> tile;
        tile.clear();
        outer<T, MR, UU, G>(tile, scratch_.h_rows, column, rows.count(), gates, S * W, gate_stride);
        RNNFAST_UNROLL
          for (int m = 0; m < MR; ++m)
            RNNFAST_UNROLL
              for (int u = 0; u < UU; ++u)
                RNNFAST_UNROLL
                  for (int g = 0; g < G; ++g) {
                    T* sum = sums + u * block_stride + ((column + m) * G + g) * W;
                    V& value = tile.acc[m][u * G + g];
                    if (!first_) value = value + V::load(sum);
                    value.store(sum);
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
    for (int s = 0; s < S; ++s) {
      T* sum = sums_.bias + (block * S + s) * W;
      (first_ ? part[s] : part[s] + V::load(sum)).store(sum);
    }
  }

  // dW_hr = sum_r dh_r (o tanh c)_r^T: plain rows on both sides, and few of them.
  void projection(const ChunkRows<T>& rows, int64_t block, int64_t done) {
    const int64_t lanes = Blocks<T>::lanes(item_.H, block), P = item_.P;
    T* const sums = sums_.w_hr + block * P * W;
    if (first_)
      for (int64_t p = 0; p < P; ++p) V(T(0)).store(sums + p * W);
    for (int64_t r = 0; r < rows.count(); ++r) {
      const V raw = load_lanes(item_.raw + (rows.kept + r) * item_.H + block * W, lanes);
      const T* gradient = item_.grad_raw + (done + r) * P;
      for (int64_t p = 0; p < P; ++p) multiply_add(V(gradient[p]), raw, V::load(sums + p * W)).store(sums + p * W);
    }
  }

  // Addresses of the rows' inputs, or of their previous h.
  void fill_rows(const ChunkRows<T>& rows, bool recurrent) {
    const Schedule& schedule = item_.schedule;
    for (int64_t r = rows.begin, t = rows.t; r < rows.end; ++t) {
      const int64_t row0 = offset(schedule, t), stop = least(rows.end, row0 + active(schedule, t));
      for (; r < stop; ++r)
        scratch_.h_rows[r - rows.begin] =
            recurrent ? previous_h(item_, t, r - row0) : at(item_.x, t, batch_index(schedule, r - row0));
    }
  }

  const Item<T>& item_;
  const bool wanted_;
  const GradientSums<T> sums_;
  const Worker& me_;
  const int64_t most_rows_;
  Scratch<T>& scratch_;
  bool first_ = true;
};

// The sums of one layer and direction, over its slices, in the caller's layout. A unit of work is a block.
template <class T, class Cell>
class WeightGradientResult {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;

 public:
  WeightGradientResult(const Network<T>& net, int64_t layer, int64_t direction)
      : item_(items_of(net, layer, direction)[0]),
        targets_(net.grad_weights[layer * net.directions + direction]),
        sums_(net.gradient_sums + direction * net.slices * net.gradient_sums_stride, item_,
              static_cast<const Cell*>(nullptr)),
        slices_(net.slices),
        stride_(net.gradient_sums_stride) {}

  int64_t blocks() const { return targets_.w_ih ? Blocks<T>::count(item_.H) : 0; }

  void run(int64_t block) const {
    matrix(block, false);
    matrix(block, true);
    if (targets_.b_ih) bias(block);
    if (item_.projected)
      for (int64_t p = 0; p < item_.P; ++p)
        store_lanes(sum(sums_.w_hr + (block * item_.P + p) * W), targets_.w_hr + p * item_.H + block * W, lanes(block));
  }

 private:
  int64_t lanes(int64_t block) const { return Blocks<T>::lanes(item_.H, block); }

  V sum(const T* first) const {
    V total = V::load(first);
    for (int64_t s = 1; s < slices_; ++s) total = total + V::load(first + s * stride_);
    return total;
  }

  // [column][G][W] of a block -> rows gate * H + unit of the caller's [G * H, columns]; in strips, so that the lines
  // that are written stay in the first cache.
  void matrix(int64_t block, bool recurrent) const {
    constexpr int64_t kStrip = 16;
    const int64_t width = recurrent ? item_.P : item_.I;
    const T* const sums = (recurrent ? sums_.w_hh : sums_.w_ih) + block * width * G * W;
    T* const target = recurrent ? targets_.w_hh : targets_.w_ih;
    T strip[kStrip][W];
    for (int g = 0; g < G; ++g) {
      const int gate = recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g];
      T* const rows = target + (gate * item_.H + block * W) * width;
      for (int64_t c = 0; c < width; c += kStrip) {
        const int64_t count = least(kStrip, width - c);
        for (int64_t k = 0; k < count; ++k) sum(sums + ((c + k) * G + g) * W).store(strip[k]);
        for (int64_t lane = 0; lane < lanes(block); ++lane)
          for (int64_t k = 0; k < count; ++k) rows[lane * width + c + k] = strip[k][lane];
      }
    }
  }

  void bias(int64_t block) const {
    const T* sums = sums_.bias + block * S * W;
    const auto put = [&](int slot, T* target, int gate) {
      store_lanes(sum(sums + slot * W), target + gate * item_.H + block * W, lanes(block));
    };
    for (int g = 0; g < G; ++g) {
      put(g, targets_.b_ih, Cell::kInputGate[g]);
      put(R + g, targets_.b_hh, Cell::kRecurrentGate[g]);
    }
  }

  const Item<T>& item_;  // the first slice: what all slices share
  const WeightGradients<T> targets_;
  const GradientSums<T> sums_;
  const int64_t slices_, stride_;
};

// The weight gradients of a layer, once all its items are through; the team shares the blocks.
template <class T, class Cell>
void finish_gradients(const Network<T>& net, int64_t layer, Member team) {
  for (int64_t d = 0; d < net.directions; ++d) {
    const WeightGradientResult<T, Cell> result(net, layer, d);
    const Range mine = share(result.blocks(), team.rank, team.size);
    for (int64_t block = mine.begin; block < mine.end; ++block) result.run(block);
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
