// After the time loop: gradients of the weights and of the input, from the gate gradients of all rows.
//
//   dW_ih = sum_r dgates_r x_r^T     dW_hh = sum_r dgates_r h'_r^T     db = sum_r dgates_r     dx_r = W_ih^T dgates_r
//
// The rows are taken in chunks (net.row_chunk); everything that a chunk is needed for is done while it is in cache. Within
// a chunk a sum starts from zero, so that the error grows with the number of chunks and not with that of rows. Each sum
// belongs to one thread and has one order: results do not depend on the threads.
#pragma once

#include "cpu/backward.h"

RNNFAST_BEGIN

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

// The weight gradients of one layer and direction. The work is cut into units: for each panel of blocks the column tiles
// of dW_ih, those of dW_hh, and the bias with a block of dW_hr. A thread runs the units of its range.
template <class T, class Cell>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots, R = Cell::kRecurrent;
  static constexpr int kWidth = panel_blocks<G>;
  static constexpr int64_t kTileColumns = least(6, max_rows(kWidth* G));

 public:
  WeightGradient(const Network<T>& net, int64_t layer, int64_t direction, Scratch<T>& scratch)
      : item_(items_of(net, layer, direction)[0]),
        targets_(net.grad_weights[layer * net.directions + direction]),
        sums_(net.gradient_sums + direction * net.gradient_sums_stride, item_, static_cast<const Cell*>(nullptr)),
        scratch_(scratch) {}

  int64_t units() const { return targets_.w_ih ? panels() * panel_units() : 0; }

  // Adds rows [begin, end) of `item`, which start at time t; `first` rows replace what was there.
  void add(Range units, const Item<T>& item, int64_t begin, int64_t end, int64_t t, bool first) {
    const Rows rows{item, begin, end, first};
    for (int k = 0; k < 2; ++k) {
      const bool recurrent = k == 1;
      fill_rows(item, begin, end, t, recurrent);
      for_units(units, [&](int64_t panel, Range mine) {
        const Range tiles = recurrent ? within(mine, input_units(), recurrent_units()) : within(mine, 0, input_units());
        if (tiles.begin < tiles.end) matrix(rows, panel, tiles, recurrent);
      });
    }
    for_units(units, [&](int64_t panel, Range mine) {
      if (mine.end < panel_units()) return;
      bias(rows, panel);
      if (item_.projected) projection(rows, panel);
    });
  }

  // The sums, in the caller's layout.
  void finish(Range units) const {
    for_units(units, [&](int64_t panel, Range mine) {
      for (int64_t block = panel; block < panel_end(panel); ++block) {
        unpack(block, columns(within(mine, 0, input_units()), item_.I), false);
        unpack(block, columns(within(mine, input_units(), recurrent_units()), item_.P), true);
        if (mine.end < panel_units()) continue;
        unpack_bias(block);
        if (item_.projected) unpack_projection(block);
      }
    });
  }

 private:
  struct Rows {
    const Item<T>& item;
    int64_t begin, end;
    bool first;
  };

  int64_t blocks() const { return Blocks<T>::count(item_.H); }
  int64_t panels() const { return (blocks() + kWidth - 1) / kWidth; }
  int64_t panel_end(int64_t block) const { return least(block + kWidth, blocks()); }
  static int64_t tiles(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }
  int64_t input_units() const { return tiles(item_.I); }
  int64_t recurrent_units() const { return tiles(item_.P); }
  int64_t panel_units() const { return input_units() + recurrent_units() + 1; }

  static Range within(Range r, int64_t begin, int64_t count) {
    return {most(r.begin - begin, 0), least(r.end - begin, count)};
  }
  static Range columns(Range tiles, int64_t count) {
    return {tiles.begin * kTileColumns, least(tiles.end * kTileColumns, count)};
  }

  // use(first block of the panel, units within the panel)
  template <class Use>
  void for_units(Range units, Use&& use) const {
    for (int64_t unit = units.begin; unit < units.end;) {
      const int64_t panel = unit / panel_units(), first = unit % panel_units();
      const int64_t count = least(units.end - unit, panel_units() - first);
      use(panel * kWidth, Range{first, first + count});
      unit += count;
    }
  }

  void matrix(const Rows& rows, int64_t panel, Range tiles, bool recurrent) {
    const Range range = columns(tiles, recurrent ? item_.P : item_.I);
    for (int64_t block = panel; block < panel_end(panel);) {
      const int width = panel_width(panel_end(panel) - block, kWidth);
      if constexpr (kWidth >= 4) {
        if (width == 4) matrix_panel<4>(rows, block, range, recurrent);
        if (width == 2) matrix_panel<2>(rows, block, range, recurrent);
      }
      if (width == 1) matrix_panel<1>(rows, block, range, recurrent);
      block += width;
    }
  }

  template <int U>
  void matrix_panel(const Rows& rows, int64_t block, Range range, bool recurrent) {
    const int64_t width = recurrent ? item_.P : item_.I, block_stride = width * G * W;
    T* const sums = (recurrent ? sums_.w_hh : sums_.w_ih) + block * block_stride;
    const T* gates = slot_of<Cell>(rows.item, block, rows.begin) + (recurrent ? R * W : 0);
    const int64_t gate_stride = rows.item.slot_rows * S * W;
    for_tiles(range.end - range.begin, kTileColumns, [&](int64_t c, int64_t count) {
      const int64_t column = range.begin + c;
      with_rows<U, G>(count, [&]<int MR, int UU>() {
        Tile<T, MR, UU, G> tile;
        tile.clear();
        outer<T, MR, UU, G>(tile, scratch_.h_rows, column, rows.end - rows.begin, gates, S * W, gate_stride);
        RNNFAST_UNROLL
          for (int m = 0; m < MR; ++m)
            RNNFAST_UNROLL
              for (int u = 0; u < UU; ++u)
                RNNFAST_UNROLL
                  for (int g = 0; g < G; ++g) {
                    T* sum = sums + u * block_stride + ((column + m) * G + g) * W;
                    V& value = tile.acc[m][u * G + g];
                    if (!rows.first) value = value + V::load(sum);
                    value.store(sum);
                  }
      });
    });
  }

  void bias(const Rows& rows, int64_t panel) {
    for (int64_t block = panel; block < panel_end(panel); ++block) {
      V part[S];
      RNNFAST_UNROLL
        for (int s = 0; s < S; ++s) part[s] = V(T(0));
      const T* gates = slot_of<Cell>(rows.item, block, rows.begin);
      for (int64_t r = rows.begin; r < rows.end; ++r, gates += S * W)
        RNNFAST_UNROLL
          for (int s = 0; s < S; ++s) part[s] = part[s] + V::load(gates + s * W);
      for (int s = 0; s < S; ++s) {
        T* sum = sums_.bias + (block * S + s) * W;
        (rows.first ? part[s] : part[s] + V::load(sum)).store(sum);
      }
    }
  }

  // dW_hr = sum_r dh_r (o tanh c)_r^T: plain rows on both sides, and few of them.
  void projection(const Rows& rows, int64_t panel) {
    for (int64_t block = panel; block < panel_end(panel); ++block) {
      const int64_t lanes = Blocks<T>::lanes(item_.H, block), P = item_.P;
      T* const sums = sums_.w_hr + block * P * W;
      if (rows.first)
        for (int64_t p = 0; p < P; ++p) V(T(0)).store(sums + p * W);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const V raw = load_lanes(rows.item.raw + r * item_.H + block * W, lanes);
        const T* gradient = rows.item.grad_raw + r * P;
        for (int64_t p = 0; p < P; ++p) multiply_add(V(gradient[p]), raw, V::load(sums + p * W)).store(sums + p * W);
      }
    }
  }

  // [column][G][W] of a block -> rows gate * H + unit of the caller's [G * H, columns].
  void unpack(int64_t block, Range range, bool recurrent) const {
    const int64_t width = recurrent ? item_.P : item_.I;
    const T* const sums = (recurrent ? sums_.w_hh : sums_.w_ih) + block * width * G * W;
    T* const target = recurrent ? targets_.w_hh : targets_.w_ih;
    for (int g = 0; g < G; ++g) {
      const int gate = recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g];
      for (int64_t lane = 0; lane < Blocks<T>::lanes(item_.H, block); ++lane) {
        T* row = target + (gate * item_.H + block * W + lane) * width;
        for (int64_t c = range.begin; c < range.end; ++c) row[c] = sums[(c * G + g) * W + lane];
      }
    }
  }

  void unpack_bias(int64_t block) const {
    if (!targets_.b_ih) return;
    const int64_t lanes = Blocks<T>::lanes(item_.H, block);
    const T* sums = sums_.bias + block * S * W;
    for (int g = 0; g < G; ++g) {
      store_lanes(V::load(sums + g * W), targets_.b_ih + Cell::kInputGate[g] * item_.H + block * W, lanes);
      store_lanes(V::load(sums + (R + g) * W), targets_.b_hh + Cell::kRecurrentGate[g] * item_.H + block * W, lanes);
    }
  }

  void unpack_projection(int64_t block) const {
    for (int64_t p = 0; p < item_.P; ++p)
      store_lanes(V::load(sums_.w_hr + (block * item_.P + p) * W), targets_.w_hr + p * item_.H + block * W,
                  Blocks<T>::lanes(item_.H, block));
  }

  // Addresses of the rows' inputs, or of their previous h.
  void fill_rows(const Item<T>& item, int64_t begin, int64_t end, int64_t t, bool recurrent) {
    for (int64_t r = begin; r < end; ++t) {
      const int64_t row0 = offset(item.schedule, t), stop = least(end, row0 + active(item.schedule, t));
      for (; r < stop; ++r)
        scratch_.h_rows[r - begin] =
            recurrent ? previous_h(item, t, r - row0) : at(item.x, t, batch_index(item.schedule, r - row0));
    }
  }

  const Item<T>& item_;  // the first slice: what all slices share
  const WeightGradients<T> targets_;
  const GradientSums<T> sums_;
  Scratch<T>& scratch_;
};

// dx of one layer: both directions are summed in one tile.
template <class T, class Cell>
class InputGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;

 public:
  InputGradient(const Network<T>& net, int64_t layer, Scratch<T>& scratch)
      : net_(net), layer_(layer), scratch_(scratch), target_(net.grad_input[layer]) {}

  bool wanted() const { return target_.data; }

  // Rows [begin, end) of a slice, which start at time t or later.
  void run(int64_t slice, int64_t begin, int64_t end, int64_t t) {
    if (begin >= end) return;
    const Item<T>& item = items_of(net_, layer_, 0)[slice];
    T** targets = const_cast<T**>(scratch_.h_rows);
    fill_targets(item.schedule, begin, end, t, targets);
    const int64_t w_stride = item.H * Cell::kGates * W;
    for_panels<1>({0, Blocks<T>::count(item.I)}, end - begin, [&]<int MR, int U>(int64_t row, int64_t block) {
      Tile<T, MR, U, 1> tile;
      tile.clear();
      for (int64_t d = 0; d < net_.directions; ++d) {
        const Item<T>& source = items_of(net_, layer_, d)[slice];
        accumulate_gates<T, MR, U>(tile, slot_of<Cell>(source, 0, begin + row), gate_operand<Cell>(source),
                                   source.w_ih_rows + block * w_stride, w_stride);
      }
      RNNFAST_UNROLL
        for (int m = 0; m < MR; ++m)
          RNNFAST_UNROLL
            for (int u = 0; u < U; ++u)
              store_lanes(tile.acc[m][u], targets[row + m] + (block + u) * W, Blocks<T>::lanes(item.I, block + u));
    });
  }

  // Past the end of each sequence: zero.
  void zero_padding(int64_t slice, Member team) const {
    const Schedule& schedule = items_of(net_, layer_, 0)[slice].schedule;
    const int64_t I = items_of(net_, layer_, 0)->I;
    const Range mine = share(schedule.sequences, team.rank, team.size);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      for (int64_t t = length(schedule, i); t < schedule.steps; ++t) {
        T* row = at(target_, t, batch_index(schedule, i));
        for (int64_t j = 0; j < I; ++j) row[j] = T(0);
      }
  }

 private:
  void fill_targets(const Schedule& schedule, int64_t begin, int64_t end, int64_t t, T** targets) {
    while (offset(schedule, t) + active(schedule, t) <= begin) ++t;
    for (int64_t r = begin; r < end; ++t) {
      const int64_t row0 = offset(schedule, t), stop = least(end, row0 + active(schedule, t));
      for (; r < stop; ++r) targets[r - begin] = at(target_, t, batch_index(schedule, r - row0));
    }
  }

  const Network<T>& net_;
  const int64_t layer_;
  Scratch<T>& scratch_;
  const Sequence<T> target_;
};

// Everything that follows the time loop of one layer, by all threads together.
template <class T, class Cell>
class LayerGradients {
 public:
  LayerGradients(const Network<T>& net, int64_t layer, Member team, Scratch<T>& scratch)
      : net_(net), layer_(layer), team_(team), scratch_(scratch), input_(net, layer, scratch) {
    for (int64_t d = 0; d < net.directions; ++d) units_ += WeightGradient<T, Cell>(net, layer, d, scratch).units();
    mine_ = share(units_, team.rank, team.size);
  }

  void run() {
    bool first = true;
    for (int64_t slice = 0; slice < net_.slices; ++slice) {
      const Schedule& schedule = items_of(net_, layer_, 0)[slice].schedule;
      int64_t t = 0;
      for (int64_t row = 0; row < schedule.rows || first; row += net_.row_chunk) {
        while (row < schedule.rows && offset(schedule, t) + active(schedule, t) <= row) ++t;
        chunk(slice, row, least(row + net_.row_chunk, schedule.rows), t, first);
        first = false;
      }
      if (input_.wanted()) input_.zero_padding(slice, team_);
    }
    for_directions([&](WeightGradient<T, Cell>& gradient, Range units, int64_t) { gradient.finish(units); });
  }

 private:
  void chunk(int64_t slice, int64_t begin, int64_t end, int64_t t, bool first) {
    if (input_.wanted()) {
      const Range mine = share(end - begin, team_.rank, team_.size);
      input_.run(slice, begin + mine.begin, begin + mine.end, t);
    }
    for_directions([&](WeightGradient<T, Cell>& gradient, Range units, int64_t d) {
      gradient.add(units, items_of(net_, layer_, d)[slice], begin, end, t, first);
    });
  }

  // Units are numbered through both directions, so that the threads share them evenly.
  template <class Use>
  void for_directions(Use&& use) {
    if (units_ == 0) return;
    for (int64_t d = 0, base = 0; d < net_.directions; ++d) {
      WeightGradient<T, Cell> gradient(net_, layer_, d, scratch_);
      use(gradient, Range{most(mine_.begin - base, 0), least(mine_.end - base, gradient.units())}, d);
      base += gradient.units();
    }
  }

  const Network<T>& net_;
  const int64_t layer_;
  const Member team_;
  Scratch<T>& scratch_;
  InputGradient<T, Cell> input_;
  int64_t units_ = 0;
  Range mine_;
};

RNNFAST_END
