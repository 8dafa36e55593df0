// The cells, one row each: name, type, header, Python-visible parameters.
#pragma once

#include "cell/gru.h"
#include "cell/leaky_rnn.h"
#include "cell/lstm.h"
#include "cell/rnn.h"

// X(name, template, parameters as a comma-separated string)
#define RNNFAST_CELLS(X)            \
  X(rnn_tanh, RnnTanh, "")          \
  X(rnn_relu, RnnRelu, "")          \
  X(lstm, Lstm, "")                 \
  X(gru, Gru, "")                   \
  X(leaky_tanh, LeakyTanh, "alpha") \
  X(leaky_relu, LeakyRelu, "alpha")

namespace rnnfast {

// What baseline code must know of a cell.
struct CellInfo {
  const char* name;
  const char* parameters;
  int gates, slots;
  bool cell_state;
};

extern const CellInfo kCells[];
extern const int kCellCount;

}  // namespace rnnfast
