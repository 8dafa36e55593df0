// The engine of one element type, made by engine.cu.
#pragma once

#include "cuda/api.h"

namespace rnnfast::cuda_engine {

struct Engine {
  Sizes (*forward_sizes)(const Config&, const ForwardArgs&, bool training);
  void (*forward)(const Config&, const ForwardArgs&, const std::vector<LayerWeights>&, bool training, Memory, void*);
  size_t (*backward_workspace)(const Config&, const ForwardArgs&, const BackwardArgs&);
  void (*backward)(const Config&, const ForwardArgs&, const BackwardArgs&, Memory, void*);
  std::string (*describe)(const Config&, const ForwardArgs&);
};

const std::string& path();  // by set_path

extern const Engine kEngine_float, kEngine_double, kEngine_Half, kEngine_Bfloat16;

}  // namespace rnnfast::cuda_engine
