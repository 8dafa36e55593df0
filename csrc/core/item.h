// What the time loops work on. Plain data: baseline code fills it (core/run.cpp), the code of each instruction set
// reads it (cpu/*.h). No functions here, so that nothing can be linked across instruction sets.
//
// Sizes: T time, B batch, I input, H hidden, P projection (or H), G gates, W lanes of a vector.
// A *block* is W hidden units. Blocked arrays are [blocks][rows][...][W], so that all of a thread's units lie together
// and every access is a whole vector; the last block is padded.
#pragma once

#include <cstdint>

namespace rnnfast {

// Row r of a slice's time-major packed rows: at time t the first active(t) of the slice's sequences run, sorted by
// falling length; their rows are offset(t) + [0, active(t)).
struct Schedule {
  int64_t steps;           // T
  int64_t sequences;       // of this slice
  int64_t first;           // batch index of sequence 0, when `order` is null
  int64_t rows;            // sum of active(t)
  const int32_t* order;    // [sequences] sequence -> batch index; null: first + i
  const int32_t* active;   // [T]; null: all sequences
  const int64_t* offset;   // [T + 1]; null: t * sequences
  const int32_t* lengths;  // [sequences], falling; null: all T
};

// A sequence in the caller's layout: element (t, b, j) at data[t * t_stride + b * b_stride + j].
template <class T>
struct Sequence {
  T* data;
  int64_t t_stride, b_stride;
};

// One row for each batch index, data[b * b_stride + j]; b_stride 0: one row for all. Null data: zeros (reading),
// unwanted (writing).
template <class T>
struct Rows {
  T* data;
  int64_t b_stride;
};

// One layer, one direction, one slice of the batch: what a group of threads runs from the first step to the last.
template <class T>
struct Item {
  Schedule schedule;
  bool reverse;
  bool keep;  // slots and cells of more than one step are there at once: of all, or in lean mode of a segment
  // Steps, as multiples of each other, counted from t = 0 whatever the direction:
  int64_t gradient_steps;  // of one block of the gradient products
  int64_t chunk;           // whose input product is made at once
  int64_t segment;         // lean mode: whose slots are rebuilt at once; else 0
  int64_t I, H, P;
  bool projected;

  Sequence<const T> x;
  Sequence<T> out;  // [T, B, P] of this direction; also where h of the previous step is read
  Sequence<const uint8_t> reset;
  Rows<const T> h0, c0, reset_h, reset_c;
  Rows<T> hn, cn;
  Sequence<T> h_all, c_all;
  const T* zeros;  // max(I, H, P) of them

  // Packed weights (cpu/pack.h)
  const T *w_ih, *w_hh, *w_hr;  // [blocks][I or P][G][W], [blocks of P][H][W]
  const T* bias;                // [blocks][slots][W]
  // For the backward products: [blocks][G*H][W], [blocks][P][W]. Narrow inputs have w_ih in the place of w_ih_rows.
  const T *w_ih_rows, *w_hh_rows, *w_hr_rows;

  // Reserve or workspace
  T* slots;           // [blocks][slot_rows][slots][W]
  int64_t slot_rows;  // all rows when kept, else those of one chunk; in lean mode of a segment, and then one step's
  T* cells;           // [blocks][cell_rows][W]: c0, the reset rows, then (when kept) one for each row
  int64_t cell_rows, reset_rows;
  T* raw;          // with projection, o * tanh(c): [rows or sequences][H]
  T* checkpoints;  // lean mode, [segments][blocks][sequences][W]: c before each segment

  // Backward
  Sequence<const T> grad_out, grad_h_all, grad_c_all;
  Rows<const T> grad_hn, grad_cn;
  Rows<T> grad_h0, grad_c0, grad_reset_h, grad_reset_c;
  Sequence<T> record_h;  // dL/dh_t
  T *carry_h, *carry_c;  // [blocks][sequences][W]: what reaches the previous step beside the recurrent product
  T *carry_reset_h, *carry_reset_c;  // likewise, collected for the reset state; null: not wanted
  T* grad_raw;  // with projection, dL/dh_t of the rows of one block of the gradient products: [rows][P]
};

// The weight gradients of one layer and direction, in the caller's layout (contiguous); null: not wanted.
template <class T>
struct WeightGradients {
  T *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
};

// One matrix to be packed.
template <class T>
struct PackJob {
  enum Kind { kColumns, kRows, kBias } kind;
  const T *source, *source2;  // matrix; or b_ih and b_hh
  int64_t row_stride, column_stride;
  int64_t stride2;
  int64_t rows;   // H (of each gate) or P
  int64_t K;      // columns
  int recurrent;  // which of the cell's gate orders
  bool gates;     // G gates interleaved, or a plain matrix
  T* target;
};

// Dropout between two layers: keep[t, b, unit] by Philox (reference.py has the definition).
struct DropoutKey {
  uint64_t seed, call;
  uint32_t layer, threshold;
  double scale;
  bool all;  // drop everything
};

// One call: every layer, both directions, all slices.
template <class T>
struct Network {
  int64_t layers, directions, slices, threads;
  int64_t steps, batch;
  double parameters[4];  // of the cell
  Item<T>* items;        // [layer][direction][slice]
  PackJob<T>* packs;
  int64_t pack_count;
  uint8_t* scratch;  // [threads][scratch_bytes]
  int64_t scratch_bytes;
  int64_t row_chunk;  // the most rows that the weight gradients take in at once
  int64_t* progress;  // [layers][8] steps done, zero at first; null: the layers do not run at once

  DropoutKey* dropout;               // [layers - 1]; null: none
  Sequence<T>* dropped;              // [layers - 1] the masked outputs
  Sequence<T>* layer_output;         // [layers] all directions: width directions * P
  WeightGradients<T>* grad_weights;  // [layer][direction][slice]: the first slice's are the caller's
  int32_t*
      input_turns;  // [slices][blocks of gradient_steps][threads]: which direction has written dx; null: one direction
  Sequence<T>* grad_input;  // [layers], data null: not wanted
  const int32_t* lengths;   // [batch] in the caller's order; null: all T
  int64_t patience;         // nanoseconds of waiting after which a thread goes on alone (cpu/team.h)
  int64_t* waited;          // out: how long a thread has waited for others, at most; null: not asked
};

// The kernels of one instruction set, for one element type.
template <class T>
struct Engine {
  int lanes;
  void (*forward)(int cell, const Network<T>&);
  void (*backward)(int cell, const Network<T>&);
  void (*pack)(int cell, const Network<T>&);
  double (*barrier_seconds)(int64_t barriers, int threads);
  double (*fma_seconds)(int64_t iterations, int threads);  // rounds of 24 * lanes operations on each thread
};

}  // namespace rnnfast
