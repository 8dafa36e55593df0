#include "cuda/api.h"

#include "cuda/engine.h"
#include "cuda/runtime.h"

namespace rnnfast::cuda_engine {
namespace {

const Engine& engine(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return kEngine_double;
    case Dtype::kFloat16:
      return kEngine_Half;
    case Dtype::kBfloat16:
      return kEngine_Bfloat16;
    default:
      return kEngine_float;
  }
}

}  // namespace

Sizes forward_sizes(const Config& config, const ForwardArgs& args, bool training) {
  return engine(config.dtype).forward_sizes(config, args, training);
}
void forward(const Config& config, const ForwardArgs& args, const std::vector<LayerWeights>& weights, bool training,
             Memory memory, void* stream) {
  engine(config.dtype).forward(config, args, weights, training, memory, stream);
}
size_t backward_workspace(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients) {
  return engine(config.dtype).backward_workspace(config, args, gradients);
}
void backward(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients, Memory memory,
              void* stream) {
  engine(config.dtype).backward(config, args, gradients, memory, stream);
}

std::string describe(const Config& config, const ForwardArgs& args) {
  return engine(config.dtype).describe(config, args);
}

namespace {
std::string& chosen_path() {
  static std::string path;
  return path;
}
}  // namespace
const std::string& path() { return chosen_path(); }
void set_path(const std::string& path) {
  if (path != "" && path != "generic" && path != "grid" && path != "cluster")
    throw std::invalid_argument("path: expected '', 'generic', 'grid' or 'cluster', got '" + path + "'");
  chosen_path() = path;
}

int device_count() { return cuda_runtime::device_count(); }
std::string device_description() { return cuda_runtime::device_description(); }
bool emulated() { return cuda_runtime::kEmulated; }
int64_t launches() {
#ifdef RNNFAST_EMULATE
  return emulator::emulation().launches;
#else
  return 0;
#endif
}
int64_t barriers() {
#ifdef RNNFAST_EMULATE
  return emulator::emulation().barriers;
#else
  return 0;
#endif
}
void run_backwards([[maybe_unused]] bool on) {
#ifdef RNNFAST_EMULATE
  emulator::emulation().backwards = on;
#endif
}
void set_multiprocessors([[maybe_unused]] int64_t count, [[maybe_unused]] int cluster) {
#ifdef RNNFAST_EMULATE
  emulator::emulation().multiprocessors = count, emulator::emulation().cluster = cluster;
#endif
}

}  // namespace rnnfast::cuda_engine
