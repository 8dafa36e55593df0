// The time loop, backward, for any cell: one item by one group of threads, from the last step to the first.
//
// At each step a thread finishes its blocks of dL/dh in a register tile (the recurrent product of the later step's gate
// gradients), adds what else reaches h, and applies the cell's adjoint at once; gate gradients overwrite the saved gates.
// One barrier a step (two with a projection). After every few steps the weight and input gradients take these steps' rows
// in, while they are in cache (gradients.h). In lean mode there are slots for the steps of one segment only: before its
// last step is run backward, they are made again (ForwardItem::rebuild).
#pragma once

#include "cpu/gradients.h"

RNNFAST_BEGIN

template <class T, int MR, int U>
void gates_tile(T* target, const T* row0, const GateOperand& operand, const T* w, int64_t w_stride) {
  constexpr int W = Vec<T>::kLanes;
  Tile<T, MR, U, 1> tile;
  tile.clear();
  accumulate_gates<T, MR, U>(tile, row0, operand, w, w_stride);
  RNNFAST_UNROLL
    for (int m = 0; m < MR; ++m)
      RNNFAST_UNROLL
        for (int u = 0; u < U; ++u) tile.acc[m][u].store(target + (m * U + u) * W);
}

template <class T, class Cell>
class BackwardItem {
  using V = Vec<T>;
  static constexpr int64_t W = V::kLanes;
  static constexpr int S = Cell::kSlots;
  static constexpr int64_t kNone = -1;  // a step before the first or after the last

 public:
  BackwardItem(const Network<T>& net, int64_t layer, int64_t direction, int64_t slice, const Cell& cell,
               const Worker& me, Scratch<T>& scratch)
      : item_(items_of(net, layer, direction)[slice]),
        schedule_(item_.schedule),
        cell_(cell),
        me_(me),
        scratch_(scratch),
        weights_(net, layer, direction, slice, me_, scratch),
        input_(net, layer, direction, slice, me_, scratch) {}

  void run() {
    for_out_parts([&](Range blocks, Range sequences) {
      load(item_.grad_hn, item_.carry_h, item_.P, blocks, sequences);
      clear(item_.carry_reset_h, blocks, sequences);
    });
    if (Cell::kCellState)
      for_cell_parts([&](Range blocks, Range sequences) {
        load(item_.grad_cn, item_.carry_c, item_.H, blocks, sequences);
        clear(item_.carry_reset_c, blocks, sequences);
      });
    input_.zero_padding();
    window_ = window_of(item_, 0, schedule_.steps);
    for_pieces(item_, 0, schedule_.steps, item_.gradient_steps, true, [&](int64_t begin, int64_t end) {
      if (item_.segment && (begin < window_.begin || end > window_.end || later_ == kNone)) enter_segment(begin);
      me_.wait_for_input(schedule_.steps - begin);
      for_steps(item_, begin, end, true, [&](int64_t t) { step(t, begin); });
      const int64_t row = offset(schedule_, begin), count = offset(schedule_, end) - row;
      const ChunkRows<T> rows{begin, row, row + count, row - window_.row0};
      weights_.add(rows);
      input_.run(rows);
      me_.have_done(schedule_.steps - begin);
      if (item_.projected) me_.wait();  // the next steps overwrite grad_raw
    });
    weights_.finish();
    if (later_ != kNone && (item_.grad_h0.data || item_.carry_reset_h || item_.carry_reset_c)) finish();
    for_out_parts([&](Range blocks, Range sequences) {
      store(item_.carry_h, item_.grad_h0, item_.P, blocks, sequences);
      store(item_.carry_reset_h, item_.grad_reset_h, item_.P, blocks, sequences);
    });
    if (Cell::kCellState)
      for_cell_parts([&](Range blocks, Range sequences) {
        store(item_.carry_c, item_.grad_c0, item_.H, blocks, sequences);
        store(item_.carry_reset_c, item_.grad_reset_c, item_.H, blocks, sequences);
      });
    me_.wait();  // the next item of this group may use the same memory
  }

 private:
  // The slots of the segment that t belongs to. The gate gradients of the later step are needed once more: they move.
  void enter_segment(int64_t t) {
    const int64_t begin = t / item_.segment * item_.segment, end = least(begin + item_.segment, schedule_.steps);
    me_.wait();  // others may still read the gate gradients
    const int64_t spare = item_.slot_rows - schedule_.sequences;
    if (later_ != kNone)
      for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block) {
        const T* from = slot_of<Cell>(item_, block, later_row_);
        T* to = slot_of<Cell>(item_, block, spare);
        for (int64_t n = 0; n < active(schedule_, later_) * S; ++n) V::load(from + n * W).store(to + n * W);
      }
    later_row_ = spare;
    window_ = window_of(item_, begin, end);
    ForwardItem<T, Cell>(item_, cell_, me_, scratch_).rebuild(window_);
    me_.wait();
  }

  // One step. The gate gradients of `later_` are ready (it follows t in the direction of the item).
  void step(int64_t t, int64_t chunk_begin) {
    const int64_t rows = active(schedule_, t), from = later_ == kNone ? 0 : active(schedule_, later_);
    mark_cuts(later_, from);
    if (Cell::kReadsPreviousH) previous_h_rows(item_, t, {0, rows}, scratch_.h_rows);
    if (Cell::kCellState) previous_cell_rows(item_, window_, t, rows, scratch_.c_rows);
    raw_row0_ = offset(schedule_, t) - offset(schedule_, chunk_begin);
    grad_h(t, rows, from);
    if constexpr (Cell::kCellState)
      if (item_.projected) {
        me_.wait();
        project(t, rows, from);
      }
    end_cells(rows, from);
    me_.wait();
    later_ = t;
    later_row_ = kept_row(item_, window_, t, 0);
  }

  // What the first step's gate gradients send to the initial states.
  void finish() {
    const int64_t from = active(schedule_, later_);
    mark_cuts(later_, from);
    grad_h(kNone, 0, from);
    end_cells(0, from);
  }

  void mark_cuts(int64_t later, int64_t from) {
    for (int64_t i = 0; item_.reset.data && i < from; ++i) scratch_.cut[i] = is_cut(item_, later, i);
  }
  RNNFAST_FN bool cut(int64_t i) const { return item_.reset.data && scratch_.cut[i]; }

  // One block at one step: where its rows lie, from that of sequence 0 on. By value: as far as the compiler knows, a stored
  // vector may change any member, and each address would be made anew for each row.
  struct Place {
    int64_t block, lanes;  // the lanes of the output
    T *slots, *carry_h, *carry_c;
    const T *cells, *c, *grad_out;  // cells: all rows of the block
    const T* const* h_rows;
    const int64_t* c_rows;
    const int32_t* order;
    int64_t grad_out_stride, first_sequence;
    const uint8_t* cut;  // null: none is
    bool more;           // gradients of states, or a record of dL/dh
    // From a row to what the step that comes next in this loop reads in its place; null: there is none.
    int64_t slots_ahead, grad_out_ahead;
    const T* h_ahead;  // of batch index 0
    int64_t h_stride;
  };
  RNNFAST_FN Place place(int64_t t, int64_t block) const {
    const int64_t carried = block * schedule_.sequences * W;
    Place p{};
    p.block = block, p.lanes = Blocks<T>::lanes(item_.P, block);
    p.carry_h = item_.carry_h + carried;
    p.h_rows = scratch_.h_rows, p.c_rows = scratch_.c_rows;
    p.order = schedule_.order, p.first_sequence = schedule_.first;
    p.cut = item_.reset.data ? scratch_.cut : nullptr;
    p.more = item_.grad_h_all.data || item_.grad_c_all.data || item_.record_h.data;
    if (t == kNone) return p;
    p.slots = slot_of<Cell>(item_, block, kept_row(item_, window_, t, 0));
    if (item_.grad_out.data)
      p.grad_out = at(item_.grad_out, t, 0) + block * W, p.grad_out_stride = item_.grad_out.b_stride;
    if constexpr (Cell::kCellState) {
      p.carry_c = item_.carry_c + carried;
      p.cells = item_.cells + block * item_.cell_rows * W;
      p.c = p.cells + cell_row(item_, window_, t, 0) * W;
    }
    look_ahead(p, t);
    return p;
  }

  // Time runs from the end to the beginning of what was saved, which no hardware foresees, and a small layer is soon done with
  // a step: what the next one reads is asked for meanwhile, so that it comes from the second-level cache.
  RNNFAST_FN void look_ahead(Place& p, int64_t t) const {
    const int64_t towards = item_.reverse ? 1 : -1, next = t + towards, before = next + towards;
    if (next < window_.begin || next >= window_.end || before < 0 || before >= schedule_.steps) return;
    p.slots_ahead = kept_row(item_, window_, next, 0) - kept_row(item_, window_, t, 0);
    p.grad_out_ahead = towards * item_.grad_out.t_stride;
    p.h_ahead = at(item_.out, before, 0) + p.block * W;
    p.h_stride = item_.out.b_stride;
  }
  RNNFAST_FN void prefetch(const Place& p, int64_t i, int64_t b) const {
    if (!p.h_ahead) return;
    RNNFAST_UNROLL
      for (int g = 0; g < S; ++g) __builtin_prefetch(p.slots + ((i + p.slots_ahead) * S + g) * W, 1, 2);
    if constexpr (Cell::kCellState) __builtin_prefetch(p.cells + (p.c_rows[i] + p.slots_ahead) * W, 0, 2);
    if (p.grad_out) __builtin_prefetch(p.grad_out + b * p.grad_out_stride + p.grad_out_ahead, 0, 2);
    __builtin_prefetch(p.h_ahead + b * p.h_stride, 0, 2);
  }

  // run(blocks, sequences) for what is this thread's of the output, or of the cells.
  template <class Run>
  RNNFAST_FN void for_out_parts(Run&& run) const {
    Portion mine = portion_of(item_, me_);
    if (item_.projected) mine.blocks = me_.out_blocks;  // and nothing is shared
    for_parts(mine, schedule_.sequences, run);
  }
  template <class Run>
  RNNFAST_FN void for_cell_parts(Run&& run) const {
    for_parts(portion_of(item_, me_), schedule_.sequences, run);
  }

  // dL/dh of every sequence that runs at t or ran at `later`, for this thread's blocks.
  void grad_h(int64_t t, int64_t rows, int64_t from) {
    const GateOperand operand = gate_operand<Cell>(item_);
    const int64_t w_stride = item_.H * Cell::kGates * W;
    for_out_parts([&](Range blocks, Range sequences) {
      const int64_t first = sequences.begin, count = least(from, sequences.end) - first;
      if (from > 0)
        for_panels<1>(blocks, count, [&]<int MR, int U>(int64_t row, int64_t block) {
          row += first;
          const T* gates = slot_of<Cell>(item_, 0, later_row_ + row) + Cell::kRecurrent * W;
          gates_tile<T, MR, U>(scratch_.tile, gates, operand, item_.w_hh_rows + block * w_stride, w_stride);
          for (int u = 0; u < U; ++u)
            grad_h_rows(t, rows, from, {row, row + MR}, block + u, scratch_.tile + u * W, U * W);
        });
      for (int64_t block = blocks.begin; from < rows && block < blocks.end; ++block) {
        const Place p = place(t, block);
        for (int64_t i = most(from, first); i < least(rows, sequences.end); ++i)
          receive(p, t, from, i, V::load(p.carry_h + i * W));
      }
    });
  }

  // Adds what reaches h beside the recurrent product, whose rows lie `stride` apart. Sequences whose first step was the later
  // one are done: theirs goes to the carry, for h0.
  __attribute__((noinline)) void grad_h_rows(int64_t t, int64_t rows, int64_t from, Range tile, int64_t block,
                                             const T* product, int64_t stride) const {
    const Place p = place(t, block);
    for (int64_t i = tile.begin; i < tile.end; ++i, product += stride) {
      V dh = V::load(product);
      if constexpr (Cell::kReadsPreviousH) dh = dh + V::load(p.carry_h + i * W);
      if (p.cut && p.cut[i]) divert(item_.carry_reset_h, i, block, dh);
      if (i < rows)
        receive(p, t, from, i, dh);
      else
        dh.store(p.carry_h + i * W);
    }
  }

  // dL/dh_t is complete once the caller's gradients are added: the adjoint follows, or the projection's.
  RNNFAST_FN void receive(const Place& p, int64_t t, int64_t from, int64_t i, V dh) const {
    const int64_t b = p.order ? p.order[i] : p.first_sequence + i;
    prefetch(p, i, b);
    if (p.grad_out) dh = dh + load_lanes(p.grad_out + b * p.grad_out_stride, p.lanes);
    if (p.more) {
      if (item_.grad_h_all.data) dh = dh + load_lanes(at(item_.grad_h_all, t, b) + p.block * W, p.lanes);
      if (item_.record_h.data) store_lanes(dh, at(item_.record_h, t, b) + p.block * W, p.lanes);
    }
    if constexpr (Cell::kCellState)
      if (item_.projected) return store_lanes(dh, item_.grad_raw + (raw_row0_ + i) * item_.P + p.block * W, p.lanes);
    adjoint(p, t, from, i, dh);
  }

  RNNFAST_FN void adjoint(const Place& p, int64_t t, int64_t from, int64_t i, V dh) const {
    T* slot = p.slots + i * S * W;
    V s[S], h_prev, c_prev, c, dc, dh_prev;
    RNNFAST_UNROLL
      for (int g = 0; g < S; ++g) s[g] = V::load(slot + g * W);
    if constexpr (Cell::kReadsPreviousH) h_prev = load_lanes(p.h_rows[i] + p.block * W, p.lanes);
    if constexpr (Cell::kCellState) {
      c_prev = V::load(p.cells + p.c_rows[i] * W);
      c = V::load(p.c + i * W);
      dc = V::load(p.carry_c + i * W);
      if (p.cut && i < from && p.cut[i]) divert(item_.carry_reset_c, i, p.block, dc);
      if (p.more && item_.grad_c_all.data)
        dc = dc + load_lanes(at(item_.grad_c_all, t, batch_index(schedule_, i)) + p.block * W,
                             Blocks<T>::lanes(item_.H, p.block));
    }
    cell_.backward(s, h_prev, c_prev, c, dh, dc, dh_prev);
    RNNFAST_UNROLL
      for (int g = 0; g < S; ++g) s[g].store(slot + g * W);
    if constexpr (Cell::kCellState) dc.store(p.carry_c + i * W);
    if constexpr (Cell::kReadsPreviousH) dh_prev.store(p.carry_h + i * W);
  }

  // With a projection, d(o tanh c) = W_hr^T dh, then the adjoint.
  void project(int64_t t, int64_t rows, int64_t from) {
    const int64_t w_stride = item_.P * W;
    const T* grads = item_.grad_raw + raw_row0_ * item_.P;
    for_panels<1>(me_.blocks, rows, [&]<int MR, int U>(int64_t row, int64_t block) {
      const T* a[MR];
      for (int m = 0; m < MR; ++m) a[m] = grads + (row + m) * item_.P;
      rows_tile<T, MR, U>(scratch_.tile, a, item_.P, item_.w_hr_rows + block * w_stride, w_stride);
      for (int u = 0; u < U; ++u) adjoint_rows(t, from, {row, row + MR}, block + u, scratch_.tile + u * W, U * W);
    });
  }

  __attribute__((noinline)) void adjoint_rows(int64_t t, int64_t from, Range tile, int64_t block, const T* dh,
                                              int64_t stride) const {
    const Place p = place(t, block);
    for (int64_t i = tile.begin; i < tile.end; ++i, dh += stride) adjoint(p, t, from, i, V::load(dh));
  }

  // Sequences that ran at the later step but not at this one have their dL/dc0; a cut there sends it to the reset state.
  void end_cells(int64_t rows, int64_t from) {
    if (!Cell::kCellState) return;
    for (int64_t i = rows; i < from; ++i) {
      if (!cut(i)) continue;
      for (int64_t block = me_.blocks.begin; block < me_.blocks.end; ++block) {
        V dc = carry(item_.carry_c, i, block);
        divert(item_.carry_reset_c, i, block, dc);
        dc.store(carry_address(item_.carry_c, i, block));
      }
    }
  }

  // ---- carries: [blocks][sequences][W] ----

  RNNFAST_FN T* carry_address(T* carries, int64_t i, int64_t block) const {
    return carries + (block * schedule_.sequences + i) * W;
  }
  RNNFAST_FN V carry(const T* carries, int64_t i, int64_t block) const {
    return V::load(carries + (block * schedule_.sequences + i) * W);
  }
  RNNFAST_FN void divert(T* reset, int64_t i, int64_t block, V& gradient) const {
    if (reset) (carry(reset, i, block) + gradient).store(carry_address(reset, i, block));
    gradient = V(T(0));
  }
  void clear(T* carries, Range blocks, Range sequences) const {
    if (!carries) return;
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = sequences.begin; i < sequences.end; ++i) V(T(0)).store(carry_address(carries, i, block));
  }
  void load(const Rows<const T>& rows, T* carries, int64_t n, Range blocks, Range sequences) const {
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = sequences.begin; i < sequences.end; ++i)
        load_lanes(initial_row(rows, batch_index(schedule_, i), item_.zeros) + block * W, Blocks<T>::lanes(n, block))
            .store(carry_address(carries, i, block));
  }
  void store(const T* carries, const Rows<T>& rows, int64_t n, Range blocks, Range sequences) const {
    if (!rows.data) return;
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (int64_t i = sequences.begin; i < sequences.end; ++i)
        store_lanes(carry(carries, i, block), rows.data + batch_index(schedule_, i) * rows.b_stride + block * W,
                    Blocks<T>::lanes(n, block));
  }

  const Item<T>& item_;
  const Schedule& schedule_;
  const Cell& cell_;
  Worker me_;
  Scratch<T>& scratch_;
  WeightGradient<T, Gates<Cell>> weights_;
  InputGradient<T, Gates<Cell>> input_;
  Window window_{};
  int64_t later_ = kNone, later_row_ = 0;  // the step before (in the order of this loop), and where its slots lie
  int64_t raw_row0_ = 0;                   // where the step's rows lie in grad_raw
};

RNNFAST_END
