// The time loop, forward, for any cell: one item (layer, direction, slice of the batch) by one group of threads.
//
// Each thread owns a range of hidden blocks for all steps and all rows. For a chunk of steps it makes the input products
// of its blocks; then, step by step, a register tile makes the recurrent product, adds those, applies the cell and writes
// c and h once. The products of a few inputs are made in that tile instead. Threads of a group meet at one barrier a
// step (two with a projection).
#pragma once

#include "cpu/microkernel.h"
#include "cpu/rows.h"

RNNFAST_BEGIN

constexpr int64_t kPanelsInCache = 1 << 20;  // weights of a thread that stay in its second-level cache
constexpr int64_t kSharedRows = 6;  // of a thread at least, where threads share a block: no tile gets smaller sums
constexpr int64_t kFewInputs = 8;   // whose product costs less than to store it and to load it again
constexpr int64_t kShortSum = 64;   // of so many units, whatever it starts from

// What one step needs, beside the item.
template <class T>
struct Step {
  int64_t t, rows;
  const T* const* h_prev;  // [rows]
  const T* const* x;       // [rows]; null: the slots hold the input products
  const int64_t* c_prev;   // [rows] rows of item.cells
  T* slots;                // of row 0 in block 0
  int64_t slot_stride;     // between blocks
  int64_t c_row;           // of row 0 in item.cells
  T* raw;                  // with projection, of row 0
  bool write_h;            // not when the slots are rebuilt: h is there
};

// What of a cell the products depend on: cells with one gate share their code.
struct OneGate {
  static constexpr int kGates = 1, kSlots = 1, kRecurrent = 0;
  static constexpr int kInputGate[kGates] = {0}, kRecurrentGate[kGates] = {0};
};
template <class Cell, bool = Cell::kGates == 1 && Cell::kSlots == 1>
struct GatesOf {
  using type = Cell;
};
template <class Cell>
struct GatesOf<Cell, true> {
  using type = OneGate;
};
template <class Cell>
using Gates = typename GatesOf<Cell>::type;

template <class Cell, class T>
RNNFAST_FN T* slot_of(const Item<T>& item, int64_t block, int64_t row) {
  return item.slots + (block * item.slot_rows + row) * Cell::kSlots * Vec<T>::kLanes;
}

// Which lines of the panel after `block` the tile at `row` asks for: the tiles of this panel share them. Null where all
// panels of a thread stay in the second-level cache anyway, or where there are too few tiles to hide them behind.
template <class T, int MR, int U, int G>
RNNFAST_FN Ahead<T> lines_ahead(const T* weights, int64_t stride, Range blocks, int64_t block, int64_t row,
                                int64_t rows) {
  constexpr int W = Vec<T>::kLanes, kMost = max_rows(G), kLines = U * G;
  if (rows <= kMost || (blocks.end - blocks.begin) * stride * int64_t(sizeof(T)) < kPanelsInCache)
    return {nullptr, nullptr};
  const int64_t tiles = (rows + kMost - 1) / kMost, tile = row * tiles / rows;
  const T* next = weights + (block + U < blocks.end ? block + U : blocks.begin) * stride;
  const auto line = [&](int64_t n) { return n < kLines ? next + n / G * stride + n % G * W : nullptr; };
  if (tiles >= kLines) return {line(tile), line(tile)};
  return {line(2 * tile), line(2 * tile + 1)};
}

template <class T, int MR, int U, int G>
RNNFAST_FN void short_product(Tile<T, MR, U, G>& tile, const T* const (&a)[MR], int64_t K, const T* w, int64_t w_stride,
                              Ahead<T> ahead) {
  if constexpr (looks_ahead(MR * U * G))
    if (ahead.first)
      return accumulate(tile, a, K, w, w_stride, ahead.second ? ahead : Ahead<T>{ahead.first, ahead.first});
  accumulate(tile, a, K, w, w_stride);
}

template <class T, int MR, int U, int G>
RNNFAST_FN void product(Tile<T, MR, U, G>& tile, const T* const (&a)[MR], int64_t K, const T* w, int64_t w_stride,
                        Ahead<T> ahead) {
  if (K < 2 * kLongSum) return short_product(tile, a, K, w, w_stride, ahead);
  constexpr int64_t kRow = G * Vec<T>::kLanes;
  const T* rest[MR];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) rest[m] = a[m];
  Tile<T, MR, U, G> total;
  int64_t left = K;
  for (; left >= 2 * kLongSum; left -= kLongSum) {
    short_product(tile, rest, kLongSum, w, w_stride, ahead);
    if (left < K) total.add(tile);
    if (left == K) total = tile;
    tile.clear();
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m) rest[m] += kLongSum;
    w += kLongSum * kRow;
    if (ahead.first) ahead.first += kLongSum * kRow;
    if (ahead.second) ahead.second += kLongSum * kRow;
  }
  short_product(tile, rest, left, w, w_stride, ahead);
  tile.add(total);
}

// bias + W_ih x for MR rows of U blocks: the slots [0, kGates).
template <class Cell, class T, int MR, int U>
RNNFAST_FN void input_product(const Item<T>& item, Tile<T, MR, U, Cell::kGates>& tile, const T* const* x_rows,
                              int64_t block, Ahead<T> ahead) {
  constexpr int W = Vec<T>::kLanes, G = Cell::kGates;
  const T* a[MR];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) a[m] = x_rows[m];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      load_vectors<T, U, G>(tile.acc[m], item.bias + block * Cell::kSlots * W, Cell::kSlots * W);
  const int64_t w_stride = item.I * G * W;
  product(tile, a, item.I, item.w_ih + block * w_stride, w_stride, ahead);
}

// The slots before the recurrent product; those that only it feeds get their bias.
template <class Cell, class T, int MR, int U>
void input_tile(const Item<T>& item, const T* const* x_rows, int64_t row, int64_t block, Ahead<T> ahead) {
  using V = Vec<T>;
  constexpr int W = V::kLanes, G = Cell::kGates;
  Tile<T, MR, U, G> tile;
  input_product<Cell>(item, tile, x_rows, block, ahead);
  const T* bias = item.bias + block * Cell::kSlots * W;
  RNNFAST_UNROLL
    for (int u = 0; u < U; ++u)
      RNNFAST_UNROLL
        for (int m = 0; m < MR; ++m) {
          T* slot = slot_of<Cell>(item, block + u, row + m);
          RNNFAST_UNROLL
            for (int g = 0; g < G; ++g) tile.acc[m][u * G + g].store(slot + g * W);
          RNNFAST_UNROLL
            for (int g = G; g < Cell::kSlots; ++g) V::load(bias + (u * Cell::kSlots + g) * W).store(slot + g * W);
        }
}

// Before the recurrent product: the slots that it does not feed, and what it is added to from the start, which is nothing
// where the slots were made before. A sum over many units that starts from a large value rounds each term to that value's
// digits.
template <class Cell, class T, int MR, int U>
RNNFAST_FN void start_tile(const Item<T>& item, const Step<T>& step, int64_t i, int64_t block,
                           Tile<T, MR, U, Cell::kGates>& tile, Vec<T> (&slots)[MR][U][Cell::kSlots]) {
  using V = Vec<T>;
  constexpr int W = V::kLanes, G = Cell::kGates, R = Cell::kRecurrent, S = Cell::kSlots;
  if (!step.x) {
    tile.clear();
    const T* kept = step.slots + block * step.slot_stride + i * S * W;
    RNNFAST_UNROLL
      for (int m = 0; m < MR; ++m)
        RNNFAST_UNROLL
          for (int u = 0; u < U; ++u)
            RNNFAST_UNROLL
              for (int s = 0; s < R; ++s) slots[m][u][s] = V::load(kept + u * step.slot_stride + (m * S + s) * W);
    return;
  }
  Tile<T, MR, U, G> input;
  input_product<Cell>(item, input, step.x + i, block, Ahead<T>{nullptr, nullptr});
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u) {
          RNNFAST_UNROLL
            for (int s = 0; s < R; ++s) slots[m][u][s] = input.acc[m][u * G + s];
          RNNFAST_UNROLL
            for (int g = 0; g < G; ++g)
              tile.acc[m][u * G + g] =
                  R + g < G ? input.acc[m][u * G + (R + g) % G] : V::load(item.bias + ((block + u) * S + R + g) * W);
        }
}

// After it: what the slots held.
template <class Cell, class T, int MR, int U>
RNNFAST_FN void add_slots(const Step<T>& step, int64_t i, int64_t block, Tile<T, MR, U, Cell::kGates>& tile) {
  using V = Vec<T>;
  constexpr int W = V::kLanes, G = Cell::kGates, S = Cell::kSlots;
  if (step.x) return;
  const T* kept = step.slots + block * step.slot_stride + (i * S + Cell::kRecurrent) * W;
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u)
          RNNFAST_UNROLL
            for (int g = 0; g < G; ++g)
              tile.acc[m][u * G + g] = tile.acc[m][u * G + g] + V::load(kept + u * step.slot_stride + (m * S + g) * W);
}

// The step itself for MR rows of U blocks: recurrent product, cell, c and h.
template <class Cell, class T, int MR, int U>
void cell_tile(const Item<T>& item, const Cell& cell, const Step<T>& step, int64_t i, int64_t block, Ahead<T> ahead) {
  using V = Vec<T>;
  constexpr int W = V::kLanes, G = Cell::kGates, R = Cell::kRecurrent, S = Cell::kSlots;
  Tile<T, MR, U, G> tile;
  V started[MR][U][S];
  start_tile<Cell>(item, step, i, block, tile, started);
  const T* a[MR];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) a[m] = step.h_prev[i + m];
  const int64_t w_stride = item.P * G * W;
  product(tile, a, item.P, item.w_hh + block * w_stride, w_stride, ahead);
  add_slots<Cell>(step, i, block, tile);

  T* slots = step.slots + block * step.slot_stride + i * S * W;
  RNNFAST_UNROLL
    for (int u = 0; u < U; ++u) {
      const int64_t lanes = Blocks<T>::lanes(item.H, block + u);
      T* cells = item.cells + (block + u) * item.cell_rows * W;
      V gates[MR][S], c[MR];
      RNNFAST_UNROLL
        for (int m = 0; m < MR; ++m) {
          V c_prev, *s = gates[m];
          RNNFAST_UNROLL
            for (int g = 0; g < R; ++g) s[g] = started[m][u][g];
          RNNFAST_UNROLL
            for (int g = 0; g < G; ++g) s[R + g] = tile.acc[m][u * G + g];
          if constexpr (Cell::kCellState) c_prev = V::load(cells + step.c_prev[i + m] * W);
          cell.gates(s, c_prev, c[m]);
          if constexpr (Cell::kCellState) c[m].store(cells + (step.c_row + i + m) * W);
        }
      RNNFAST_UNROLL
        for (int m = 0; m < MR; ++m) {
          T* slot = slots + u * step.slot_stride + m * S * W;
          V h_prev, *s = gates[m];
          if constexpr (Cell::kReadsPreviousH) h_prev = load_lanes(step.h_prev[i + m] + (block + u) * W, lanes);
          const V h = cell.output(s, h_prev, c[m]);
          if (item.keep)
            RNNFAST_UNROLL
              for (int g = 0; g < S; ++g) s[g].store(slot + g * W);
          if (item.projected)
            store_lanes(h, step.raw + (i + m) * item.H + (block + u) * W, lanes);
          else if (step.write_h)
            store_lanes(h, at(item.out, step.t, batch_index(item.schedule, i + m)) + (block + u) * W, lanes);
        }
    }
}

// Rows of a plain product (projection, and below the backward products) go to a small buffer that stays in L1.
template <class T, int MR, int U>
void rows_tile(T* target, const T* const* rows, int64_t K, const T* w, int64_t w_stride) {
  constexpr int W = Vec<T>::kLanes;
  Tile<T, MR, U, 1> tile;
  const T* a[MR];
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m) a[m] = rows[m];
  tile.clear();
  accumulate(tile, a, K, w, w_stride);
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u) tile.acc[m][u].store(target + (m * U + u) * W);
}

// run.template operator()<MR, U>() for the run-time values; MR up to what U * G vectors leave room for.
template <int U, int G, class Run>
RNNFAST_FN void with_rows(int64_t rows, Run&& run) {
  constexpr int kMost = max_rows(G);
  switch (rows) {
#define RNNFAST_CASE(n)                                        \
  case n:                                                      \
    if constexpr (n <= kMost) run.template operator()<n, U>(); \
    break;
    RNNFAST_CASE(1)
    RNNFAST_CASE(2)
    RNNFAST_CASE(3)
    RNNFAST_CASE(4)
    RNNFAST_CASE(5)
    RNNFAST_CASE(6)
    RNNFAST_CASE(7)
    RNNFAST_CASE(8)
#undef RNNFAST_CASE
  }
}

// Panels of one cell with G gates are as wide as keeps four vectors busy.
template <int G>
constexpr int panel_blocks = G >= 3 ? 1 : 4;

// Calls tile<MR, U>(first row, block) for all tiles of `rows` rows and the blocks of `range`; a panel of weights serves all
// row tiles before the next is touched.
template <int G, class TileFunction>
RNNFAST_FN void for_panels(Range range, int64_t rows, TileFunction&& tile) {
  for (int64_t block = range.begin; block < range.end;) {
    const int width = panel_width(range.end - block, panel_blocks<G>);
    const auto tiles = [&]<int U>() {
      for_tiles(rows, max_rows(G), [&](int64_t row, int64_t count) {
        with_rows<U, G>(count, [&]<int MR, int UU>() { tile.template operator()<MR, UU>(row, block); });
      });
    };
    if constexpr (panel_blocks<G> >= 4) {
      if (width == 4) tiles.template operator()<4>();
      if (width == 2) tiles.template operator()<2>();
    }
    if (width == 1) tiles.template operator()<1>();
    block += width;
  }
}

// What of all blocks and sequences is this thread's, forward and backward: whole blocks, and rows of those that are left where
// the threads do not divide them. Whoever asks for the states of every step, or has ends and cuts within a batch, gets whole
// blocks.
struct Portion {
  Range blocks, shared, sequences;
};
template <class T>
RNNFAST_FN Portion portion_of(const Item<T>& item, const Worker& me) {
  const int64_t blocks = Blocks<T>::count(item.H), left = blocks % me.size(), B = item.schedule.sequences;
  const bool states = item.h_all.data || item.c_all.data || item.grad_h_all.data || item.grad_c_all.data ||
                      item.record_h.data || item.checkpoints || item.segment;
  const bool plain = !states && !item.schedule.order && !item.reset.data && !item.projected;
  if (left == 0 || !plain || B < kSharedRows * me.size()) return {me.blocks, {0, 0}, {0, 0}};
  return {me.part(blocks - left), {blocks - left, blocks}, me.part(B)};
}
// run(blocks, sequences)
template <class Run>
RNNFAST_FN void for_parts(const Portion& mine, int64_t sequences, Run&& run) {
  run(mine.blocks, Range{0, sequences});
  if (mine.shared.begin < mine.shared.end) run(mine.shared, mine.sequences);
}

template <class T, class Cell>
class ForwardItem {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;

 public:
  ForwardItem(const Item<T>& item, const Cell& cell, const Worker& me, Scratch<T>& scratch)
      : item_(item), schedule_(item.schedule), cell_(cell), me_(me), scratch_(scratch) {}

  void run() {
    load_cells();
    window_ = {0, schedule_.steps, 0};
    for_pieces(item_, 0, schedule_.steps, item_.chunk, false, [&](int64_t begin, int64_t end) {
      if (item_.checkpoints && starts_segment(begin, end)) checkpoint(begin / item_.segment, true);
      slots_row0_ = item_.keep ? 0 : offset(schedule_, begin);
      me_.wait_for_input(end);
      if (!few_inputs()) input_products(begin, end);
      for_steps(item_, begin, end, false, [&](int64_t t) { step(t); });
      me_.have_done(end);
    });
    store_final();
  }

  // Lean mode: makes the slots, cells and raw rows of a segment again, from the inputs and from the h that the forward pass
  // has left, with the same tiles and so to the same bits. A thread reads nothing that the others write: no barriers.
  void rebuild(const Window& window) {
    load_cells();
    if (Cell::kCellState) checkpoint(window.begin / item_.segment, false);
    window_ = window;
    slots_row0_ = window.row0;
    for_pieces(item_, window.begin, window.end, item_.chunk, false, [&](int64_t begin, int64_t end) {
      if (!few_inputs()) input_products(begin, end);
      for_steps(item_, begin, end, false, [&](int64_t t) { cells(t, false); });
    });
  }

 private:
  bool few_inputs() const { return item_.I <= kFewInputs && item_.P <= kShortSum; }

  bool starts_segment(int64_t begin, int64_t end) const {
    return item_.reverse ? end % item_.segment == 0 || end == schedule_.steps : begin % item_.segment == 0;
  }

  // Every sequence's c, from `cells` to the checkpoint or back.
  void checkpoint(int64_t segment, bool save) const {
    const int64_t sequences = schedule_.sequences;
    for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block) {
      T* kept = item_.checkpoints + (segment * Blocks<T>::count(item_.H) + block) * sequences * W;
      T* cells = item_.cells + block * item_.cell_rows * W;
      for (int64_t i = 0; i < sequences; ++i)
        V::load((save ? cells : kept) + i * W).store((save ? kept : cells) + i * W);
    }
  }

  // run(blocks, sequences)
  template <class Run>
  RNNFAST_FN void for_portion(Run&& run) const {
    for_parts(portion_of(item_, me_), schedule_.sequences, run);
  }

  void load_cells() {
    if (!Cell::kCellState) return;
    for_portion([&](Range blocks, Range sequences) {
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        T* cells = item_.cells + block * item_.cell_rows * W;
        const int64_t lanes = Blocks<T>::lanes(item_.H, block);
        const auto put = [&](const Rows<const T>& rows, int64_t b, int64_t row) {
          load_lanes(initial_row(rows, b, item_.zeros) + block * W, lanes).store(cells + row * W);
        };
        for (int64_t i = sequences.begin; i < sequences.end; ++i) put(item_.c0, batch_index(schedule_, i), i);
        for (int64_t i = 0; i < item_.reset_rows; ++i)
          put(item_.reset_c, batch_index(schedule_, i), schedule_.sequences + i);
      }
    });
  }

  void input_products(int64_t begin, int64_t end) {
    const T** rows = scratch_.h_rows;
    const int64_t row0 = offset(schedule_, begin);
    for (int64_t t = begin; t < end; ++t)
      input_rows(item_, t, {0, active(schedule_, t)}, rows + offset(schedule_, t) - row0);
    const Portion mine = portion_of(item_, me_);
    input_tiles(mine.blocks, {0, offset(schedule_, end) - row0}, row0);
    if (mine.shared.begin == mine.shared.end) return;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = offset(schedule_, t) - row0;
      input_tiles(mine.shared, {first + mine.sequences.begin, first + mine.sequences.end}, row0);
    }
  }

  // Rows counted from `row0`, where those of the chunk begin.
  void input_tiles(Range blocks, Range rows, int64_t row0) {
    const int64_t count = rows.end - rows.begin;
    for_panels<Cell::kGates>(blocks, count, [&]<int MR, int U>(int64_t row, int64_t block) {
      const auto ahead =
          lines_ahead<T, MR, U, Cell::kGates>(item_.w_ih, item_.I * Cell::kGates * W, blocks, block, row, count);
      row += rows.begin;
      input_tile<Gates<Cell>, T, MR, U>(item_, scratch_.h_rows + row, row0 - slots_row0_ + row, block, ahead);
    });
  }

  void step(int64_t t) {
    cells(t, true);
    const int64_t rows = active(schedule_, t);
    if constexpr (Cell::kCellState)
      if (item_.projected) {
        me_.wait();
        project(t, rows);
      }
    if (item_.h_all.data || item_.c_all.data) export_states(t, rows);
    me_.wait();
  }

  // The tiles of one step.
  void cells(int64_t t, bool write_h) {
    const int64_t rows = active(schedule_, t);
    previous_h_rows(item_, t, {0, rows}, scratch_.h_rows);
    if (Cell::kCellState) previous_cell_rows(item_, window_, t, rows, scratch_.c_rows);
    if (few_inputs()) input_rows(item_, t, {0, rows}, scratch_.x_rows);
    const Step<T> step{t,
                       rows,
                       scratch_.h_rows,
                       few_inputs() ? scratch_.x_rows : nullptr,
                       scratch_.c_rows,
                       slot_of<Cell>(item_, 0, offset(schedule_, t) - slots_row0_),
                       item_.slot_rows * Cell::kSlots * W,
                       cell_row(item_, window_, t, 0),
                       raw_row(t, 0),
                       write_h};
    for_portion([&](Range blocks, Range sequences) {
      const int64_t first = sequences.begin, count = least(rows, sequences.end) - first;
      for_panels<Cell::kGates>(blocks, count, [&]<int MR, int U>(int64_t row, int64_t block) {
        const auto ahead =
            lines_ahead<T, MR, U, Cell::kGates>(item_.w_hh, item_.P * Cell::kGates * W, blocks, block, row, count);
        cell_tile<Cell, T, MR, U>(item_, cell_, step, first + row, block, ahead);
      });
    });
  }

  T* raw_row(int64_t t, int64_t i) const {
    return item_.projected ? item_.raw + (item_.keep ? kept_row(item_, window_, t, i) : i) * item_.H : nullptr;
  }

  // h = W_hr (o * tanh c)
  void project(int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) scratch_.h_rows[i] = raw_row(t, i);
    const int64_t w_stride = item_.H * W;
    for_panels<1>(me_.out_blocks, rows, [&]<int MR, int U>(int64_t row, int64_t block) {
      rows_tile<T, MR, U>(scratch_.tile, scratch_.h_rows + row, item_.H, item_.w_hr + block * w_stride, w_stride);
      for (int m = 0; m < MR; ++m)
        for (int u = 0; u < U; ++u)
          store_lanes(V::load(scratch_.tile + (m * U + u) * W),
                      at(item_.out, t, batch_index(schedule_, row + m)) + (block + u) * W,
                      Blocks<T>::lanes(item_.P, block + u));
    });
  }

  // Copies of this thread's own columns: nobody has to wait for them.
  void export_states(int64_t t, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t b = batch_index(schedule_, i);
      if (item_.h_all.data)
        for (int64_t block = me_.out_blocks.begin; block < me_.out_blocks.end; ++block)
          copy_lanes(at(item_.out, t, b), at(item_.h_all, t, b), item_.P, block);
      if (item_.c_all.data)
        for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block)
          store_lanes(cell_vector(cell_row(item_, window_, t, i), block), at(item_.c_all, t, b) + block * W,
                      Blocks<T>::lanes(item_.H, block));
    }
  }

  V cell_vector(int64_t row, int64_t block) const { return V::load(item_.cells + (block * item_.cell_rows + row) * W); }
  static void copy_lanes(const T* source, T* target, int64_t n, int64_t block) {
    const int64_t lanes = Blocks<T>::lanes(n, block);
    store_lanes(load_lanes(source + block * W, lanes), target + block * W, lanes);
  }

  // hn, cn: the state after each sequence's last step; and zeros past its end.
  void store_final() {
    for (int64_t i = 0; i < schedule_.sequences; ++i) {
      const int64_t b = batch_index(schedule_, i), end = length(schedule_, i);
      const int64_t last = item_.reverse ? 0 : end - 1;
      const T* h = end > 0 ? at(item_.out, last, b) : initial_row(item_.h0, b, item_.zeros);
      for (int64_t block = me_.out_blocks.begin; block < me_.out_blocks.end; ++block) {
        if (item_.hn.data) copy_lanes(h, item_.hn.data + b * item_.hn.b_stride, item_.P, block);
        for (int64_t t = end; t < schedule_.steps; ++t) {
          copy_lanes(item_.zeros, at(item_.out, t, b), item_.P, block);
          if (item_.h_all.data) copy_lanes(item_.zeros, at(item_.h_all, t, b), item_.P, block);
        }
      }
    }
    for_portion([&](Range blocks, Range sequences) {
      for (int64_t i = sequences.begin; i < sequences.end; ++i) store_cells(blocks, i);
    });
  }

  void store_cells(Range blocks, int64_t i) {
    const int64_t b = batch_index(schedule_, i), end = length(schedule_, i), last = item_.reverse ? 0 : end - 1;
    const int64_t row = end > 0 ? cell_row(item_, window_, last, i) : i;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      if (item_.cn.data)
        store_lanes(cell_vector(row, block), item_.cn.data + b * item_.cn.b_stride + block * W,
                    Blocks<T>::lanes(item_.H, block));
      if (item_.c_all.data)
        for (int64_t t = end; t < schedule_.steps; ++t) copy_lanes(item_.zeros, at(item_.c_all, t, b), item_.H, block);
    }
  }

  const Item<T>& item_;
  const Schedule& schedule_;
  const Cell& cell_;
  Worker me_;
  Scratch<T>& scratch_;
  Window window_{};
  int64_t slots_row0_ = 0;  // the packed row that lies first in `slots`
};

RNNFAST_END
