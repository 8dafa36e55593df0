// The CUDA engine as the bindings see it: core/api.h's arguments with device pointers, memory that the caller brings, and a
// stream. Nothing here allocates, waits for the device or reads device memory on the host: a call may be captured in a graph.
// (`lengths` of ForwardArgs is on the device too; values out of range are clamped there.)
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/api.h"

namespace rnnfast::cuda_engine {

struct Sizes {  // bytes
  size_t reserve, workspace;
};
struct
    Memory {  // aligned to 64 bytes; the reserve from a training-mode forward to its backward, the workspace for the call
  uint8_t *reserve, *workspace;
};

// Of the arguments' arrays only which of them are there counts.
Sizes forward_sizes(const Config& config, const ForwardArgs& args, bool training);
void forward(const Config& config, const ForwardArgs& args, const std::vector<LayerWeights>& weights, bool training,
             Memory memory, void* stream);

// With `retain` the reserve stays as it is, else it is used up.
size_t backward_workspace(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients);
void backward(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients, Memory memory,
              void* stream);

std::string describe(const Config& config, const ForwardArgs& args);  // which kernels serve a call, in words
// "": the best that a shape allows; "grid", "cluster": spread over blocks, also where one would do, which exchange through
// global memory or within a cluster; "generic": a launch for each step.
void set_path(const std::string& path);

int device_count();                // 0 where there is no driver
std::string device_description();  // of the current device, or why there is none
bool emulated();                   // "device" memory is the host's (cuda/emulate.h)
int64_t launches();                // by this thread, of the emulator
int64_t barriers();                // that its blocks have come to: a measure of the steps they did
void run_backwards(bool on);       // the emulator's threads in the opposite order: a missing barrier shows
// Of the device that the emulator is; `cluster`: blocks of its largest cluster.
void set_multiprocessors(int64_t count, int cluster);

}  // namespace rnnfast::cuda_engine
