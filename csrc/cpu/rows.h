// Which rows a step works on and where their previous states lie. Lengths, resets and the direction are settled here, as
// row addresses, so that the tiles know nothing of them.
#pragma once

#include "core/item.h"
#include "cpu/team.h"

RNNFAST_BEGIN

RNNFAST_FN int64_t active(const Schedule& s, int64_t t) { return s.active ? s.active[t] : s.sequences; }
RNNFAST_FN int64_t offset(const Schedule& s, int64_t t) { return s.offset ? s.offset[t] : t * s.sequences; }
RNNFAST_FN int64_t batch_index(const Schedule& s, int64_t i) { return s.order ? s.order[i] : s.first + i; }
RNNFAST_FN int64_t length(const Schedule& s, int64_t i) { return s.lengths ? s.lengths[i] : s.steps; }

template <class T>
RNNFAST_FN T* at(const Sequence<T>& s, int64_t t, int64_t b) {
  return s.data + t * s.t_stride + b * s.b_stride;
}

// The blocked shape of n units.
template <class T>
struct Blocks {
  static constexpr int64_t W = Vec<T>::kLanes;
  RNNFAST_FN static int64_t count(int64_t n) { return (n + W - 1) / W; }
  RNNFAST_FN static int64_t lanes(int64_t n, int64_t block) { return least(W, n - block * W); }
};

template <class T>
RNNFAST_FN Vec<T> load_lanes(const T* p, int64_t n) {
  return n == Vec<T>::kLanes ? Vec<T>::load(p) : Vec<T>::load(p, n);
}
template <class T>
RNNFAST_FN void store_lanes(Vec<T> v, T* p, int64_t n) {
  n == Vec<T>::kLanes ? v.store(p) : v.store(p, n);
}

// Is the state that enters step t of sequence i replaced (a new segment starts)?
template <class T>
RNNFAST_FN bool is_cut(const Item<T>& item, int64_t t, int64_t i) {
  if (!item.reset.data) return false;
  const int64_t at_step = item.reverse ? t + 1 : t;
  if (item.reverse && at_step >= length(item.schedule, i)) return false;
  return *at(item.reset, at_step, batch_index(item.schedule, i)) != 0;
}

// Is t the first step that sequence i runs?
template <class T>
RNNFAST_FN bool is_first(const Item<T>& item, int64_t t, int64_t i) {
  return item.reverse ? t + 1 >= length(item.schedule, i) : t == 0;
}

template <class T>
RNNFAST_FN const T* initial_row(const Rows<const T>& rows, int64_t b, const T* zeros) {
  return rows.data ? rows.data + b * rows.b_stride : zeros;
}

// Where h of the step before (t, i) lies.
template <class T>
RNNFAST_FN const T* previous_h(const Item<T>& item, int64_t t, int64_t i) {
  const int64_t b = batch_index(item.schedule, i);
  if (is_cut(item, t, i)) return initial_row(item.reset_h, b, item.zeros);
  if (is_first(item, t, i)) return initial_row(item.h0, b, item.zeros);
  return at(item.out, item.reverse ? t + 1 : t - 1, b);
}

// The steps [begin, end) whose rows lie in slots, cells and raw, the first of them at 0: all steps, or in lean mode those
// of a segment.
struct Window {
  int64_t begin, end, row0;
};
template <class T>
RNNFAST_FN Window window_of(const Item<T>& item, int64_t begin, int64_t end) {
  return {begin, end, offset(item.schedule, begin)};
}
template <class T>
RNNFAST_FN int64_t kept_row(const Item<T>& item, const Window& window, int64_t t, int64_t i) {
  return offset(item.schedule, t) - window.row0 + i;
}

// Rows of `cells`: first every sequence's c before the window (c0, or a checkpoint), then the reset state (one row, or one
// a sequence), then, when kept, a row for each step. Otherwise a sequence's c is replaced in place.
template <class T>
RNNFAST_FN int64_t cell_row(const Item<T>& item, const Window& window, int64_t t, int64_t i) {
  return item.keep ? item.schedule.sequences + item.reset_rows + kept_row(item, window, t, i) : i;
}
template <class T>
RNNFAST_FN int64_t previous_cell_row(const Item<T>& item, const Window& window, int64_t t, int64_t i) {
  if (is_cut(item, t, i)) return item.schedule.sequences + (item.reset_rows > 1 ? i : 0);
  const int64_t before = item.reverse ? t + 1 : t - 1;
  if (is_first(item, t, i) || !item.keep || before < window.begin || before >= window.end) return i;
  return cell_row(item, window, before, i);
}

// Where x of some sequences at step t lies.
template <class T>
RNNFAST_FN void input_rows(const Item<T>& item, int64_t t, Range sequences, const T** rows) {
  for (int64_t i = sequences.begin; i < sequences.end; ++i) *rows++ = at(item.x, t, batch_index(item.schedule, i));
}

// Does every sequence's step before t lie one row below the other, at the same step?
template <class T>
RNNFAST_FN bool has_even_past(const Item<T>& item, int64_t t) {
  const int64_t before = item.reverse ? t + 1 : t - 1;
  return !item.reset.data && !item.schedule.order && before >= 0 && before < item.schedule.steps;
}

// previous_h of some sequences.
template <class T>
RNNFAST_FN void previous_h_rows(const Item<T>& item, int64_t t, Range sequences, const T** rows) {
  if (has_even_past(item, t)) {
    const T* row = previous_h(item, t, sequences.begin);
    for (int64_t i = sequences.begin; i < sequences.end; ++i, row += item.out.b_stride) *rows++ = row;
  } else {
    for (int64_t i = sequences.begin; i < sequences.end; ++i) *rows++ = previous_h(item, t, i);
  }
}

// previous_cell_row of the first `count` sequences.
template <class T>
RNNFAST_FN void previous_cell_rows(const Item<T>& item, const Window& window, int64_t t, int64_t count, int64_t* rows) {
  if (has_even_past(item, t)) {
    const int64_t first = previous_cell_row(item, window, t, 0);
    for (int64_t i = 0; i < count; ++i) rows[i] = first + i;
  } else {
    for (int64_t i = 0; i < count; ++i) rows[i] = previous_cell_row(item, window, t, i);
  }
}

// One thread's private memory, carved from the network's scratch.
template <class T>
struct Scratch {
  const T** h_rows;  // [rows of a step, or of a chunk]
  const T** x_rows;  // [sequences]
  int64_t* c_rows;   // [sequences]
  uint8_t* cut;      // [sequences]
  T* tile;           // one register tile
  T* panel;          // [row_chunk][4 * W] inputs of the weight gradients

  Scratch(const Network<T>& net, int64_t rank, int64_t rows, int64_t sequences) {
    uint8_t* p = net.scratch + rank * net.scratch_bytes;
    tile = take<T>(p, kTileValues);
    panel = take<T>(p, net.row_chunk * kPanelVectors * Vec<T>::kLanes);
    h_rows = take<const T*>(p, rows);
    x_rows = take<const T*>(p, sequences);
    c_rows = take<int64_t>(p, sequences);
    cut = take<uint8_t>(p, sequences);
  }

  static constexpr int64_t kTileValues = 32 * 16, kPanelVectors = 4;

 private:
  template <class U>
  static U* take(uint8_t*& p, int64_t n) {
    U* here = reinterpret_cast<U*>(p);
    p += (n * sizeof(U) + 63) / 64 * 64;
    return here;
  }
};

// Calls run(t) for the steps [begin, end) in the order of the item's forward pass, or against it.
template <class T, class Run>
RNNFAST_FN void for_steps(const Item<T>& item, int64_t begin, int64_t end, bool backward, Run&& run) {
  if (item.reverse != backward)
    for (int64_t t = end - 1; t >= begin; --t) run(t);
  else
    for (int64_t t = begin; t < end; ++t) run(t);
}

// The same for pieces of `size` steps, counted from t = 0: run(begin, end).
template <class T, class Run>
RNNFAST_FN void for_pieces(const Item<T>& item, int64_t begin, int64_t end, int64_t size, bool backward, Run&& run) {
  const int64_t count = (end - begin + size - 1) / size;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t start = begin + (item.reverse != backward ? count - 1 - n : n) * size;
    run(start, least(start + size, end));
  }
}

RNNFAST_END
