// The whole C++ surface: what the bindings (and the C++ tests) call. Shapes in PyTorch's words; everything here has
// been checked by the caller (bindings/array.h). Strides count elements; the last axis is always contiguous.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/buffer.h"

namespace rnnfast {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBfloat16 };  // the last two on CUDA only

// A stack of recurrent layers.
struct Config {
  int cell;  // index into kCells
  Dtype dtype;
  int64_t input_size, hidden_size, proj_size, num_layers, num_directions;  // proj_size 0: none
  bool bias;
  double parameters[4];
  bool tf32 = false;  // CUDA, float32: operands of products rounded to TF32; sums, gates and states are not

  int64_t output_size() const { return proj_size ? proj_size : hidden_size; }  // P
  int64_t layer_input(int64_t layer) const { return layer ? num_directions * output_size() : input_size; }
  int64_t states() const { return num_layers * num_directions; }  // L * D
};

struct Array2 {  // [., .] with any strides; null: absent
  void* data = nullptr;
  int64_t stride0 = 0, stride1 = 1;
};
struct Array3 {  // [outer0, outer1, n], the last axis contiguous
  void* data = nullptr;
  int64_t stride0 = 0, stride1 = 0;
};

struct LayerWeights {  // of one layer and direction
  Array2 w_ih, w_hh, b_ih, b_hh, w_hr;
};

// Weights in the kernels' order: made once, used by any number of calls.
class Packed {
 public:
  Packed(const Config& config, const std::vector<LayerWeights>& weights);
  struct Layout;  // pointers into the buffer, for each layer and direction
  const Config config;
  const Buffer buffer;
};

// Everything that one forward call is given. Sequences are [T, B, .] by (t, b) strides, whatever their axes were.
struct ForwardArgs {
  int64_t steps, batch;
  Array3 x;                                 // [T, B, I]
  Array3 output;                            // [T, B, D * P]
  Array3 reset;                             // uint8 [T, B] (stride0, stride1); null: none
  const int64_t* lengths = nullptr;         // [B], within [0, T]; null: all T
  Array3 h0, c0;                            // [L * D, B, .]; null: zeros
  Array3 reset_h, reset_c;                  // [L * D, B or 1, .] (stride1 0 when 1); null: zeros
  Array3 hn, cn;                            // [L * D, B, .]
  void *h_all = nullptr, *c_all = nullptr;  // [T, L * D, B, .] contiguous; null: unwanted
  Array3 running_c;  // CUDA: read in the place of c0, written in that of cn, in at least float32; null: those are
  double dropout = 0;
  uint64_t seed = 0, call = 0;
  // Training: keep no gates, and c only before every few steps (at least `checkpoint_every`; 0: as the plan likes). The
  // backward pass makes them again, to the same bits.
  bool lean = false;
  int64_t checkpoint_every = 0;
};

struct BackwardArgs {
  Array3 grad_output;                                       // [T, B, D * P]; null: zero
  Array3 grad_hn, grad_cn;                                  // [L * D, B, .]; null: zero
  const void *grad_h_all = nullptr, *grad_c_all = nullptr;  // [T, L * D, B, .] contiguous; null: zero
  Array3 grad_x;                                            // null: unwanted
  Array3 grad_h0, grad_c0;
  Array3 grad_reset_h, grad_reset_c;                // [L * D, B, .], one row a sequence; null: unwanted
  void* record_h = nullptr;                         // [T, L * D, B, P] contiguous; null: unwanted
  std::vector<LayerWeights> weights, grad_weights;  // gradients contiguous, all of them wanted, or `grad_weights` empty
  bool retain = false;
};

struct Plan;

// What a training-mode forward keeps for its backward: the reserve. The arrays named in `args` must outlive it.
class Context {
 public:
  Context(const Config& config, const ForwardArgs& args, std::shared_ptr<const Plan> plan);
  const Config config;
  const ForwardArgs args;
  const std::shared_ptr<const Plan> plan;
  Buffer reserve;
  bool consumed = false;
  size_t reserve_bytes() const { return reserve.size(); }
};

// One of `weights` and `packed` is given. Returns the context when training, else null.
std::unique_ptr<Context> forward(const Config& config, const ForwardArgs& args,
                                 const std::vector<LayerWeights>* weights, const Packed* packed, bool training);

// Throws std::logic_error when the reserve has been used up.
void backward(Context& context, const BackwardArgs& args);

// ---- the machine ----

int get_num_threads();
void set_num_threads(int n);               // n >= 1
void set_split(const std::string& split);  // see core/plan.cpp; "": the cost model (RNNFAST_SPLIT)
void choose_split();                       // reads RNNFAST_SPLIT; std::invalid_argument when it is none of these
std::string isa();                         // in use
std::vector<std::string> possible_isas();  // compiled, and this CPU and operating system can run them; best first
std::vector<std::string> compiled_isas();
void choose_isa();                 // reads RNNFAST_ISA; std::runtime_error when it names none of these
double barrier_time(int threads);  // seconds, the best of a few thousand in a row
double fma_peak(int threads, double seconds, Dtype dtype);  // GFLOP/s

}  // namespace rnnfast
