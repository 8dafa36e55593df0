#include "core/registry.h"

namespace rnnfast {

#define RNNFAST_ROW(name, Type, parameters) \
  {#name, parameters, base::Type<float>::kGates, base::Type<float>::kSlots, base::Type<float>::kCellState},
const CellInfo kCells[] = {RNNFAST_CELLS(RNNFAST_ROW)};
const int kCellCount = sizeof(kCells) / sizeof(kCells[0]);

}  // namespace rnnfast
