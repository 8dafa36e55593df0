// Which engine runs: the best that this CPU and operating system can, or the one that RNNFAST_ISA names.
#pragma once

#include "core/item.h"

namespace rnnfast {

template <class T>
const Engine<T>& engine();

}  // namespace rnnfast
