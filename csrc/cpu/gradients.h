// After the time loop: gradients of the weights and of the input, from the gate gradients of all rows.
//
//   dW_ih = sum_r dgates_r x_r^T     dW_hh = sum_r dgates_r h'_r^T     db = sum_r dgates_r     dx_r = W_ih^T dgates_r
//
// The rows are summed in blocks (net.row_chunk) that stay in cache, each block from zero, so that the error grows with
// the number of blocks and not with the number of rows. Every sum has one order: results do not depend on the threads.
#pragma once

#include "cpu/backward.h"

RNNFAST_BEGIN

template <class T>
const Item<T>* items_of(const Network<T>& net, int64_t layer, int64_t direction) {
  return net.items + (layer * net.directions + direction) * net.slices;
}

template <class T, class Cell>
class WeightGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int G = Cell::kGates, S = Cell::kSlots;
  static constexpr int64_t kTileColumns = least(6, max_rows(panel_blocks<G> * G));

 public:
  WeightGradient(const Network<T>& net, int64_t layer, int64_t direction, Scratch<T>& scratch)
      : net_(net),
        items_(items_of(net, layer, direction)),
        item_(items_[0]),
        targets_(net.grad_weights[layer * net.directions + direction]),
        scratch_(scratch) {}

  // The work is cut into units: for each panel of blocks the column tiles of dW_ih, those of dW_hh, and the bias. A thread
  // runs the units of its range; neighbouring ones of a panel share a pass over the rows.
  int64_t units() const { return panels() * panel_units(); }

  void run(Range units) {
    for (int64_t unit = units.begin; unit < units.end;) {
      const int64_t panel = unit / panel_units(), first = unit % panel_units();
      const int64_t count = least(units.end - unit, panel_units() - first);
      run_panel(panel * kWidth, first, first + count);
      unit += count;
    }
  }

  // dW_hr = sum_r dh_r (o tanh c)_r^T: plain rows on both sides, few columns; units are blocks of H.
  int64_t projection_units() const { return item_.projected && targets_.w_hr ? Blocks<T>::count(item_.H) : 0; }

  void run_projection(Range blocks) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t lanes = Blocks<T>::lanes(item_.H, block);
      clear(item_.P, 1);
      for_row_chunks([&](const Item<T>& item, int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; ++r) {
          const V raw = load_lanes(item.raw + r * item.H + block * W, lanes);
          for (int64_t p = 0; p < item.P; ++p) {
            T* sum = scratch_.gradient + p * W;
            fma(V(item.grad_raw[r * item.P + p]), raw, V::load(sum)).store(sum);
          }
        }
      });
      for (int64_t p = 0; p < item_.P; ++p)
        store_lanes(V::load(scratch_.gradient + p * W), targets_.w_hr + p * item_.H + block * W, lanes);
    }
  }

 private:
  static constexpr int kWidth = panel_blocks<G>;

  int64_t panels() const { return (Blocks<T>::count(item_.H) + kWidth - 1) / kWidth; }
  static int64_t tiles(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }
  int64_t input_units() const { return targets_.w_ih ? tiles(item_.I) : 0; }
  int64_t recurrent_units() const { return targets_.w_hh ? tiles(item_.P) : 0; }
  int64_t panel_units() const { return input_units() + recurrent_units() + (targets_.b_ih ? 1 : 0); }

  void run_panel(int64_t block, int64_t begin, int64_t end) {
    const int64_t inputs = input_units(), matrices = inputs + recurrent_units();
    if (begin < inputs) matrix(block, begin, least(end, inputs), false);
    if (begin < matrices && end > inputs) matrix(block, most(begin, inputs) - inputs, least(end, matrices) - inputs, true);
    if (end > matrices) bias(block);
  }

  // Columns [6 begin, 6 end) of dW_ih or dW_hh for one panel of blocks; sums are kept as [column][U][G][W].
  void matrix(int64_t block, int64_t begin, int64_t end, bool recurrent) {
    const int64_t columns = recurrent ? item_.P : item_.I;
    const Range range{begin * kTileColumns, least(end * kTileColumns, columns)};
    for (int64_t b = block, last = least(block + kWidth, Blocks<T>::count(item_.H)); b < last;) {
      const int width = panel_width(last - b, kWidth);
      if constexpr (kWidth >= 4) {
        if (width == 4) matrix_panel<4>(b, range, recurrent);
        if (width == 2) matrix_panel<2>(b, range, recurrent);
      }
      if (width == 1) matrix_panel<1>(b, range, recurrent);
      b += width;
    }
  }

  template <int U>
  void matrix_panel(int64_t block, Range columns, bool recurrent) {
    constexpr int kVectors = U * G;
    bool first = true;
    for_row_chunks([&](const Item<T>& item, int64_t begin, int64_t end, int64_t t) {
      fill_rows(item, begin, end, t, recurrent);
      const T* gates = slot_of<Cell>(item, block, begin) + (recurrent ? Cell::kRecurrent * W : 0);
      for_tiles(columns.end - columns.begin, kTileColumns, [&](int64_t c, int64_t count) {
        T* sums = scratch_.gradient + c * kVectors * W;
        with_rows<U, G>(count, [&]<int MR, int UU>() {
          Tile<T, MR, UU, G> tile;
          tile.clear();
          outer<T, MR, UU, G>(tile, scratch_.h_rows, columns.begin + c, end - begin, gates, S * W,
                              item.slot_rows * S * W);
          RNNFAST_UNROLL for (int m = 0; m < MR; ++m)
            RNNFAST_UNROLL for (int v = 0; v < kVectors; ++v) {
              T* sum = sums + (m * kVectors + v) * W;
              if (!first) tile.acc[m][v] = tile.acc[m][v] + V::load(sum);
              tile.acc[m][v].store(sum);
            }
        });
      });
      first = false;
    });
    if (first) clear(columns.end - columns.begin, kVectors);
    for (int u = 0; u < U; ++u) unpack(block + u, u, kVectors, columns, recurrent);
  }

  // [column][vector][W] -> rows gate * H + unit of the caller's [G * H, columns].
  void unpack(int64_t block, int u, int vectors, Range columns, bool recurrent) {
    const int64_t width = recurrent ? item_.P : item_.I;
    T* const target = recurrent ? targets_.w_hh : targets_.w_ih;
    for (int g = 0; g < G; ++g) {
      const int gate = recurrent ? Cell::kRecurrentGate[g] : Cell::kInputGate[g];
      for (int64_t lane = 0; lane < Blocks<T>::lanes(item_.H, block); ++lane) {
        T* row = target + (gate * item_.H + block * W + lane) * width;
        const T* sum = scratch_.gradient + (u * G + g) * W + lane;
        for (int64_t c = columns.begin; c < columns.end; ++c) row[c] = sum[(c - columns.begin) * vectors * W];
      }
    }
  }

  void bias(int64_t block0) {
    for (int64_t block = block0; block < least(block0 + kWidth, Blocks<T>::count(item_.H)); ++block) {
      V sum[S];
      RNNFAST_UNROLL for (int s = 0; s < S; ++s) sum[s] = V(T(0));
      for_row_chunks([&](const Item<T>& item, int64_t begin, int64_t end, int64_t) {
        V part[S];
        RNNFAST_UNROLL for (int s = 0; s < S; ++s) part[s] = V(T(0));
        const T* gates = slot_of<Cell>(item, block, begin);
        for (int64_t r = begin; r < end; ++r, gates += S * W)
          RNNFAST_UNROLL for (int s = 0; s < S; ++s) part[s] = part[s] + V::load(gates + s * W);
        RNNFAST_UNROLL for (int s = 0; s < S; ++s) sum[s] = sum[s] + part[s];
      });
      const int64_t lanes = Blocks<T>::lanes(item_.H, block);
      for (int g = 0; g < G; ++g) {
        store_lanes(sum[g], targets_.b_ih + Cell::kInputGate[g] * item_.H + block * W, lanes);
        store_lanes(sum[Cell::kRecurrent + g], targets_.b_hh + Cell::kRecurrentGate[g] * item_.H + block * W, lanes);
      }
    }
  }

  void clear(int64_t columns, int64_t vectors) {
    for (int64_t i = 0; i < columns * vectors; ++i) V(T(0)).store(scratch_.gradient + i * W);
  }

  // Addresses of the rows' inputs, or of their previous h.
  void fill_rows(const Item<T>& item, int64_t begin, int64_t end, int64_t t, bool recurrent) {
    for (int64_t r = begin; r < end; ++t) {
      const int64_t row0 = offset(item.schedule, t), stop = least(end, row0 + active(item.schedule, t));
      for (; r < stop; ++r)
        scratch_.h_rows[r - begin] = recurrent ? previous_h(item, t, r - row0)
                                               : at(item.x, t, batch_index(item.schedule, r - row0));
    }
  }

  // use(item, first row, end row, time of the first row) for blocks of rows over all slices.
  template <class Use>
  void for_row_chunks(Use&& use) {
    for (int64_t slice = 0; slice < net_.slices; ++slice) {
      const Item<T>& item = items_[slice];
      int64_t t = 0;
      for (int64_t row = 0; row < item.schedule.rows; row += net_.row_chunk) {
        while (offset(item.schedule, t) + active(item.schedule, t) <= row) ++t;
        use(item, row, least(row + net_.row_chunk, item.schedule.rows), t);
      }
    }
  }

  const Network<T>& net_;
  const Item<T>* items_;
  const Item<T>& item_;  // the first slice: what all slices share
  const WeightGradients<T> targets_;
  Scratch<T>& scratch_;
};

// dx of one layer for a thread's share of each slice's rows: both directions are summed in one tile.
template <class T, class Cell>
class InputGradient {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;

 public:
  InputGradient(const Network<T>& net, int64_t layer, Member team, Scratch<T>& scratch)
      : net_(net), layer_(layer), team_(team), scratch_(scratch), target_(net.grad_input[layer]) {}

  void run() {
    for (int64_t slice = 0; slice < net_.slices; ++slice) {
      const Schedule& schedule = items_of(net_, layer_, 0)[slice].schedule;
      const Range rows = share(schedule.rows, team_.rank, team_.size);
      for (int64_t row = rows.begin; row < rows.end; row += net_.row_chunk)
        chunk(slice, row, least(row + net_.row_chunk, rows.end));
      zero_padding(schedule);
    }
  }

 private:
  void chunk(int64_t slice, int64_t begin, int64_t end) {
    const Item<T>& item = items_of(net_, layer_, 0)[slice];
    T** targets = const_cast<T**>(scratch_.h_rows);
    fill_targets(item.schedule, begin, end, targets);
    const int64_t w_stride = item.H * Cell::kGates * W;
    for_panels<1>({0, Blocks<T>::count(item.I)}, end - begin, [&]<int MR, int U>(int64_t row, int64_t block) {
      Tile<T, MR, U, 1> tile;
      tile.clear();
      for (int64_t d = 0; d < net_.directions; ++d) {
        const Item<T>& source = items_of(net_, layer_, d)[slice];
        accumulate_gates<T, MR, U>(tile, slot_of<Cell>(source, 0, begin + row), gate_operand<Cell>(source),
                                   source.w_ih_rows + block * w_stride, w_stride);
      }
      RNNFAST_UNROLL for (int m = 0; m < MR; ++m)
        RNNFAST_UNROLL for (int u = 0; u < U; ++u)
          store_lanes(tile.acc[m][u], targets[row + m] + (block + u) * W, Blocks<T>::lanes(item.I, block + u));
    });
  }

  void fill_targets(const Schedule& schedule, int64_t begin, int64_t end, T** targets) {
    int64_t t = time_of(schedule, begin);
    for (int64_t r = begin; r < end; ++t) {
      const int64_t row0 = offset(schedule, t), stop = least(end, row0 + active(schedule, t));
      for (; r < stop; ++r) targets[r - begin] = at(target_, t, batch_index(schedule, r - row0));
    }
  }

  static int64_t time_of(const Schedule& schedule, int64_t row) {
    if (!schedule.offset) return row / schedule.sequences;
    int64_t low = 0, high = schedule.steps;  // offset is non-decreasing: the last t with offset(t) <= row that has rows
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (schedule.offset[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  void zero_padding(const Schedule& schedule) {
    const int64_t I = items_of(net_, layer_, 0)->I;
    const Range mine = share(schedule.sequences, team_.rank, team_.size);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      for (int64_t t = length(schedule, i); t < schedule.steps; ++t) {
        T* row = at(target_, t, batch_index(schedule, i));
        for (int64_t j = 0; j < I; ++j) row[j] = T(0);
      }
  }

  const Network<T>& net_;
  const int64_t layer_;
  const Member team_;
  Scratch<T>& scratch_;
  const Sequence<T> target_;
};

RNNFAST_END
