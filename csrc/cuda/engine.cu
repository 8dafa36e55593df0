// The engine of one element type (RNNFAST_ELEMENT): what is launched, in which order. Everything goes to the caller's
// stream; only pointers and sizes are looked at here.
#include <optional>

#include "cuda/backward.cuh"
#include "cuda/call.h"
#include "cuda/dropout.cuh"
#include "cuda/engine.h"
#include "cuda/forward.cuh"
#include "cuda/grid_launch.cuh"
#include "cuda/persistent.cuh"
#include "cuda/window.cuh"

RNNFAST_BEGIN
namespace {

using cuda_engine::Memory;
using cuda_engine::Sizes;
using cuda_runtime::launch;
using cuda_runtime::Stream;
using T = RNNFAST_ELEMENT;
using A = Arithmetic<T>;

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// One thread for each sequence and unit of h or c.
template <class Kernel, class... Arguments>
void launch_states(Kernel kernel, const Item<T>& item, Stream stream, const Arguments&... arguments) {
  launch(kernel, blocks_for(item.batch * std::max(item.P, item.H)), dim3(kThreads), stream, item, arguments...);
}

template <class Kernel, class... Arguments>
void launch_step(Kernel kernel, const Items<T>& items, int64_t units, Stream stream, const Arguments&... arguments) {
  const int64_t tiles = StepTile::count(items.item[0].batch, units);
  launch(kernel, items.count * tiles, dim3(kTile, kTile), stream, items, arguments...);
}

void launch_dropout(const Call<T>& call, int64_t layer, const Sequence<T>& source, const Sequence<T>& target,
                    Stream stream) {
  const int64_t groups = (call.width() + 3) / 4, rows = call.args().steps * call.args().batch;
  launch(dropout_kernel<T>, blocks_for(rows * groups), dim3(kThreads), stream, call.dropout_key(layer),
         call.args().steps, call.args().batch, call.width(), source, target);
}

// ---- persistent kernels -------------------------------------------------------------------------------------------

constexpr bool kHasPersistent = sizeof(T) == sizeof(float);  // of the element types, for float32
constexpr bool kHasGrid = sizeof(T) <= sizeof(float);        // not for float64
constexpr int64_t kLeastGridSteps = 4;                       // fewer are done before the weights have been loaded
constexpr int64_t kMostSorted = 8192;                        // sequences: each is compared with all others

// How the time loop of a pass runs: the first of these that is possible, else a launch for each step.
struct Plan {
  PersistentPlan block;
  GridPlan grid;

  bool in_one_launch() const { return block.possible || grid.possible; }
};

// G gates of each unit over `depth` values, in a block; over a grid as the pass says.
template <class Cell, GridPass kPass>
Plan make_plan(const Config& config, const ForwardArgs& args) {
  const std::string& path = cuda_engine::path();
  Plan plan;
  if (path == "generic" || config.proj_size > 0) return plan;
  constexpr bool kForward = kPass == GridPass::kForward;
  constexpr int kSums = kForward ? Cell::kGates : 1, kDepth = kForward ? 1 : Cell::kGates;
  const bool forced = !path.empty();
  if (kHasPersistent && !forced)
    plan.block = plan_persistent(cuda_runtime::device_limits(), kSums, kDepth * config.hidden_size, config.hidden_size,
                                 args.batch, sizeof(A));
  const bool wanted = !plan.block.possible && (forced || args.steps >= kLeastGridSteps);
  if constexpr (kHasGrid)
    if (wanted) plan.grid = GridLoop<T, Cell, kPass>::plan(config, args, {path != "cluster", path != "grid"});
  return plan;
}
template <class Cell>
Plan forward_plan(const Config& config, const ForwardArgs& args) {
  return make_plan<Cell, GridPass::kForward>(config, args);
}
template <class Cell>
Plan backward_plan(const Config& config, const ForwardArgs& args) {
  return make_plan<Cell, GridPass::kBackward>(config, args);
}

// The plan of a pass and what its blocks exchange, laid out behind the rest of the workspace.
template <class Cell, GridPass kPass>
struct Loop {
  using V = std::conditional_t<kPass == GridPass::kForward, T, A>;
  Plan plan;
  GlobalExchange<V> exchange{};
  int32_t* order = nullptr;

  Loop(const Config& config, const ForwardArgs& args, Carver& workspace) : plan(make_plan<Cell, kPass>(config, args)) {
    if constexpr (kHasGrid) exchange = GridLoop<T, Cell, kPass>::take(plan.grid, workspace);
    if (plan.in_one_launch() && args.lengths && args.batch <= kMostSorted) order = workspace.take<int32_t>(args.batch);
  }

  // Once for a call: every layer has the same lengths.
  void sort(const Item<T>& item, Stream stream) const {
    if (order) launch(sort_kernel<T>, blocks_for(item.batch), dim3(kThreads), stream, item, order);
  }
  Items<T> sorted(Items<T> items) const {
    for (int64_t d = 0; d < items.count; ++d) items.item[d].order = order;
    return items;
  }
};
template <class Cell>
using ForwardLoop = Loop<Cell, GridPass::kForward>;
template <class Cell>
using BackwardLoop = Loop<Cell, GridPass::kBackward>;

template <class Kernel, class... Arguments>
void launch_persistent(Kernel kernel, const PersistentPlan& plan, int gates, const Items<T>& items, Stream stream,
                       const Arguments&... arguments) {
  cuda_runtime::launch_shared(kernel, items.count * plan.batch_slices, dim3(plan.threads),
                              sizeof(Quad<A>) * plan.shared_quads(gates), stream, items, arguments...);
}

// The kernels of a plan, of which there are three: two shapes for one sequence in a block, one of them for four.
template <PersistentShape kShape, int R, class Cell>
void launch_forward(const PersistentPlan& plan, const Items<T>& items, const Cell& cell, int64_t begin, int64_t end,
                    Stream stream) {
  constexpr int kHeld = register_quads(kShape, Cell::kGates, R);
  launch_persistent(persistent_forward_kernel<T, Cell, R, kHeld, kShape.max_threads>, plan, Cell::kGates, items, stream,
                    cell, plan, begin, end);
}
template <PersistentShape kShape, int R, class Cell>
void launch_backward(const PersistentPlan& plan, const Items<T>& items, const Cell& cell, Stream stream) {
  constexpr int kHeld = register_quads(kShape, 1, R);
  launch_persistent(persistent_backward_kernel<T, Cell, R, kHeld, kShape.max_threads>, plan, 1, items, stream, cell,
                    plan);
}
template <class Cell, class... Arguments>
void persistent_forward(const PersistentPlan& plan, const Arguments&... arguments) {
  if (plan.many_registers)
    launch_forward<kManyRegisters, 1>(plan, arguments...);
  else
    plan.rows == 1 ? launch_forward<kManyThreads, 1>(plan, arguments...)
                   : launch_forward<kManyThreads, kMostRows>(plan, arguments...);
}
template <class Cell, class... Arguments>
void persistent_backward(const PersistentPlan& plan, const Arguments&... arguments) {
  if (plan.many_registers)
    launch_backward<kManyRegisters, 1>(plan, arguments...);
  else
    plan.rows == 1 ? launch_backward<kManyThreads, 1>(plan, arguments...)
                   : launch_backward<kManyThreads, kMostRows>(plan, arguments...);
}

// What the persistent loops leave out: steps past a sequence's end.
template <class Kernel>
void launch_padding(Kernel kernel, const Items<T>& items, Stream stream) {
  for (int64_t d = 0; d < items.count && items.item[0].lengths; ++d) {
    const Item<T>& item = items.item[d];
    launch(kernel, blocks_for(item.steps * item.batch * item.H), dim3(kThreads), stream, item);
  }
}

// ---- forward ------------------------------------------------------------------------------------------------------

// The input products of the steps with numbers [begin, end), whose slots lie together.
void input_products(Items<T>& items, int64_t begin, int64_t end, Stream stream) {
  for (int64_t d = 0; d < items.count; ++d) {
    Item<T>& item = items.item[d];
    const int64_t first = item.reverse ? item.steps - end : begin;
    item.first_kept = item.keep ? 0 : first;
    launch_product<T>({(end - begin) * item.batch, item.gates * item.H, item.I, 1}, item.tf32,
                      InputRows<T>{item, first}, InputWeights<T>{item},
                      DenseRows<A>{item.slots + slot_index(item, first, 0, 0), item.slot_count * item.H}, stream);
  }
}

template <class Cell>
void forward_steps(const Items<T>& items, const Cell& cell, const ForwardLoop<Cell>& loop, int64_t begin, int64_t end,
                   Stream stream) {
  if constexpr (kHasPersistent)
    if (loop.plan.block.possible) return persistent_forward<Cell>(loop.plan.block, items, cell, begin, end, stream);
  if constexpr (kHasGrid)
    if (loop.plan.grid.possible)
      return GridLoop<T, Cell, GridPass::kForward>::launch(loop.plan.grid, items, cell, loop.exchange, stream, begin,
                                                           end);
  const Item<T>& item = items.item[0];
  for (int64_t n = begin; n < end; ++n) {
    launch_step(step_kernel<T, Cell>, items, item.H, stream, cell, n);
    if (item.projected) launch_step(projection_kernel<T>, items, item.P, stream, n);
  }
}

// c as it is now, if the item has checkpoints.
void save_checkpoint(const Item<T>& item, int64_t number, Stream stream) {
  const int64_t size = item.batch * item.H;
  if (item.checkpoints && size > 0)
    cuda_runtime::copy(item.checkpoints + number * size, item.cells, size * sizeof(A), stream);
}

template <class Cell>
void forward_layer(const Call<T>& call, Items<T> items, const Cell& cell, const ForwardLoop<Cell>& loop,
                   Stream stream) {
  const Item<T>& item = items.item[0];
  for (int64_t d = 0; d < items.count; ++d) launch_states(initial_state_kernel<T>, items.item[d], stream);
  if (loop.plan.in_one_launch()) launch_padding(forward_padding_kernel<T>, items, stream);
  for (int64_t begin = 0, end; begin < item.steps; begin = end) {
    end = std::min({begin + call.chunk(), (begin / call.window() + 1) * call.window(), item.steps});
    input_products(items, begin, end, stream);
    forward_steps(items, cell, loop, begin, end, stream);
    for (int64_t d = 0; d < items.count && end < item.steps && end % call.window() == 0; ++d)
      save_checkpoint(items.item[d], end / call.window() - 1, stream);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------

// Lean mode: gradients of the weights of a direction, summed over windows.
struct WeightSums {
  A *input, *recurrent, *projection;
};

// What only the backward pass needs.
class BackwardMemory {
 public:
  BackwardMemory(Call<T>& call, const BackwardArgs& gradients, Carver& workspace) : call_(call), gradients_(gradients) {
    const Config& config = call_.config();
    const int64_t batch = call_.args().batch, rows = call_.window() * batch;
    const int64_t P = config.output_size(), H = config.hidden_size;
    for (int64_t d = 0; d < config.num_directions; ++d) {
      Item<T>& item = shared_.item[d];
      item.carry_h = workspace.take<A>(batch * P), item.carry_reset_h = workspace.take<A>(batch * P);
      if (call_.gates().cell_state)
        item.carry_c = workspace.take<A>(batch * H), item.carry_reset_c = workspace.take<A>(batch * H);
      if (call_.lean())
        window_[d].lay_out(workspace, call_.window(), batch, P, H, call_.gates().cell_state, config.proj_size > 0);
      else if (config.proj_size)
        item.grad_raw = workspace.take<A>(rows * P);
      if (gradients_.retain && !call_.lean()) item.gate_grads = workspace.take<A>(rows * call_.gates().slots * H);
      if (call_.lean() && !gradients_.grad_weights.empty()) sums_[d] = take_sums(workspace);
    }
    if (call_.lean() && config.num_directions > 1)
      input_sums_ = workspace.take<A>(call_.args().steps * batch * widest_input());
    for (int64_t i = 0; i < std::min<int64_t>(2, config.num_layers - 1); ++i)
      grad_sequence_[i] = call_.fresh_sequence(workspace);
    partials_ = workspace.take<A>(most_partials());
  }

  // The items of a layer, for backward.
  Items<T> items(int64_t layer) const {
    Items<T> items = call_.layer(layer);
    const Config& config = call_.config();
    for (int64_t d = 0; d < items.count; ++d) {
      Item<T>& item = items.item[d];
      const Item<T>& own = shared_.item[d];
      const int64_t index = layer * config.num_directions + d, batch = item.batch;
      item.carry_h = own.carry_h, item.carry_reset_h = own.carry_reset_h;
      item.carry_c = own.carry_c, item.carry_reset_c = own.carry_reset_c;
      item.grad_raw = own.grad_raw;
      item.gate_grads = own.gate_grads ? own.gate_grads : item.slots;
      item.grad_out = grad_output(layer, d * item.P);
      item.grad_h_all = states<const T>(gradients_.grad_h_all, index, config.states(), batch, item.P);
      item.grad_c_all = states<const T>(gradients_.grad_c_all, index, config.states(), batch, item.H);
      item.record_h = states<T>(gradients_.record_h, index, config.states(), batch, item.P);
      item.grad_hn = rows<const T>(gradients_.grad_hn, index), item.grad_cn = rows<const T>(gradients_.grad_cn, index);
      item.grad_h0 = rows<T>(gradients_.grad_h0, index), item.grad_c0 = rows<T>(gradients_.grad_c0, index);
      item.grad_reset_h = rows<T>(gradients_.grad_reset_h, index);
      item.grad_reset_c = rows<T>(gradients_.grad_reset_c, index);
    }
    return items;
  }

  // Where the gradient of a layer's input goes.
  Sequence<T> grad_input(int64_t layer) const {
    return layer ? grad_sequence_[(layer - 1) % 2] : sequence<T>(gradients_.grad_x);
  }
  A* partials() const { return partials_; }

  // Lean mode: the item of a window, sums over the windows of a direction's weight gradients, and of the input's.
  const WindowMemory<T>& window(int64_t d) const { return window_[d]; }
  const WeightSums& sums(int64_t d) const { return sums_[d]; }
  A* input_sums() const { return input_sums_; }

  static ProductSize weight_size(int64_t rows, int64_t columns, int64_t depth) {
    constexpr int64_t kBlocks = 264, kLeastDepth = 256;  // two blocks for each multiprocessor of a large GPU
    ProductSize size{rows, columns, depth, 1};
    size.parts = std::max<int64_t>(1, std::min(kBlocks / std::max<int64_t>(1, size.tiles()), depth / kLeastDepth));
    return size;
  }

 private:
  Sequence<const T> grad_output(int64_t layer, int64_t shift) const {
    if (layer + 1 == call_.config().num_layers) return sequence<const T>(gradients_.grad_output, shift);
    const Sequence<T>& grad = grad_sequence_[layer % 2];
    return {grad.data + shift, grad.t_stride, grad.b_stride};
  }

  int64_t most_partials() const {
    const Config& config = call_.config();
    const int64_t depth = call_.window() * call_.args().batch, rows = call_.gates().gates * config.hidden_size;
    const auto values = [&](int64_t m, int64_t n) { return weight_size(m, n, depth).parts * m * n; };
    int64_t most = values(rows, config.output_size() + 1);
    for (int64_t layer = 0; layer < std::min<int64_t>(2, config.num_layers); ++layer)
      most = std::max(most, values(rows, config.layer_input(layer) + 1));
    return std::max(most, values(config.output_size(), config.hidden_size));
  }
  int64_t widest_input() const {
    return std::max(call_.config().input_size, call_.config().num_layers > 1 ? call_.width() : 0);
  }
  WeightSums take_sums(Carver& workspace) const {
    const int64_t rows = call_.gates().gates * call_.config().hidden_size, P = call_.config().output_size();
    return {workspace.take<A>(rows * (widest_input() + 1)), workspace.take<A>(rows * (P + 1)),
            call_.config().proj_size ? workspace.take<A>(P * call_.config().hidden_size) : nullptr};
  }

  Call<T>& call_;
  const BackwardArgs& gradients_;
  Items<T> shared_{};
  Sequence<T> grad_sequence_[2] = {};
  A* partials_ = nullptr;
  WindowMemory<T> window_[2] = {};
  WeightSums sums_[2] = {};
  A* input_sums_ = nullptr;
};

// Adds the parts up and gives them to the caller.
struct StoreParts {
  Stream stream;

  void operator()(const Partials<A>& parts, int64_t count, A*, const WeightTarget<T>& target) const {
    launch(add_parts_kernel<T>, blocks_for(parts.rows * parts.columns), dim3(kThreads), stream, parts, count, target);
  }
};
// Adds them to the sums of later windows.
struct CollectParts {
  Stream stream;
  bool first;

  void operator()(const Partials<A>& parts, int64_t count, A* sums, const WeightTarget<T>&) const {
    launch(collect_parts_kernel<A>, blocks_for(parts.rows * parts.columns), dim3(kThreads), stream, parts, count,
           Partials<A>{sums, parts.rows, parts.columns}, first);
  }
};

// For each weight of an item: product(rows, columns, left, right, sums, target), left and right its operands over time.
template <class Product>
void for_each_weight(const Item<T>& item, const LayerWeights& target, const WeightSums& sums, const Product& product) {
  const int64_t rows = item.gates * item.H, stride = item.slot_count * item.H, ones = target.b_ih.data ? 1 : 0;
  const auto pointer = [](const Array2& a) { return static_cast<T*>(a.data); };
  WeightTarget<T> input{pointer(target.w_ih), pointer(target.b_ih), item.I, item.H, {}};
  WeightTarget<T> recurrent{pointer(target.w_hh), pointer(target.b_hh), item.P, item.H, {}};
  std::copy(item.input_gate, item.input_gate + kMaxGates, input.gate);
  std::copy(item.recurrent_gate, item.recurrent_gate + kMaxGates, recurrent.gate);
  product(rows, item.I + ones, TimeColumns<A>{item.gate_grads, stride}, InputColumns<T>{{item, 0}}, sums.input, input);
  product(rows, item.P + ones, TimeColumns<A>{item.gate_grads + item.recurrent * item.H, stride},
          PreviousColumns<T>{item}, sums.recurrent, recurrent);
  if (item.projected)
    product(item.P, item.H, TimeColumns<A>{item.grad_raw, item.P}, TimeColumns<A>{item.raw, item.H}, sums.projection,
            WeightTarget<T>{pointer(target.w_hr), nullptr, item.H, item.P, {}});
}

template <class Finish>
void weight_gradients(const Item<T>& item, const LayerWeights& target, const WeightSums& sums, A* partials,
                      Stream stream, const Finish& finish) {
  for_each_weight(item, target, sums,
                  [&](int64_t rows, int64_t columns, const auto& left, const auto& right, A* sum, const auto& weight) {
                    const ProductSize size = BackwardMemory::weight_size(rows, columns, item.steps * item.batch);
                    const Partials<A> parts{partials, rows, columns};
                    launch_product<T>(size, item.tf32, left, right, parts, stream);
                    finish(parts, size.parts, sum, weight);
                  });
}
// What the windows have summed up.
void store_weight_sums(const Item<T>& item, const LayerWeights& target, const WeightSums& sums, Stream stream) {
  for_each_weight(item, target, sums,
                  [&](int64_t rows, int64_t columns, const auto&, const auto&, A* sum, const auto& weight) {
                    StoreParts{stream}(Partials<A>{sum, rows, columns}, 1, nullptr, weight);
                  });
}

template <class Cell>
void backward_steps(const Items<T>& items, const Cell& cell, const BackwardLoop<Cell>& loop, Stream stream) {
  if constexpr (kHasPersistent)
    if (loop.plan.block.possible) return persistent_backward<Cell>(loop.plan.block, items, cell, stream);
  if constexpr (kHasGrid)
    if (loop.plan.grid.possible)
      return GridLoop<T, Cell, GridPass::kBackward>::launch(loop.plan.grid, items, cell, loop.exchange, stream);
  const Item<T>& item = items.item[0];
  for (int64_t n = item.steps - 1; n >= -1; --n) {
    launch_step(step_adjoint_kernel<T, Cell>, items, item.P, stream, cell, n);
    if (item.projected) launch_step(projection_adjoint_kernel<T, Cell>, items, item.H, stream, cell, n);
  }
}

template <class Cell>
void backward_layer(const Items<T>& items, const Cell& cell, const BackwardLoop<Cell>& loop, Stream stream) {
  for (int64_t d = 0; d < items.count; ++d) launch_states(load_carries_kernel<T>, items.item[d], stream);
  if (loop.plan.in_one_launch()) launch_padding(backward_padding_kernel<T>, items, stream);
  backward_steps(items, cell, loop, stream);
  for (int64_t d = 0; d < items.count; ++d) launch_states(store_carries_kernel<T>, items.item[d], stream);
}

// target(row, column, part, value) of the gradient of the items' input.
template <class Target>
void input_gradient(const Items<T>& items, const Target& target, Stream stream) {
  const Item<T>& item = items.item[0];
  launch_product<T>({item.steps * item.batch, item.I, items.count * item.gates * item.H, 1}, item.tf32,
                    GateGradientRows<T>{items}, InputWeightRows<T>{items}, target, stream);
}

// The products of a layer, `grad_weights` its own or null.
void layer_products(const Items<T>& items, const BackwardMemory& memory, const LayerWeights* grad_weights,
                    const Sequence<T>& grad_x, Stream stream) {
  for (int64_t d = 0; d < items.count && grad_weights; ++d)
    weight_gradients(items.item[d], grad_weights[d], {}, memory.partials(), stream, StoreParts{stream});
  if (grad_x.data) input_gradient(items, SequenceRows<T>{grad_x, items.item[0].batch}, stream);
}

// ---- backward in windows --------------------------------------------------------------------------------------------

// A window of a layer: forward, its gates kept this time, then backward.
template <class Cell>
Items<T> run_window(const Items<T>& whole, const BackwardMemory& memory, const WindowRange& range, int64_t number,
                    const Cell& cell, const ForwardLoop<Cell>& forward, const BackwardLoop<Cell>& loop, Stream stream) {
  Items<T> items{{}, whole.count};
  for (int64_t d = 0; d < whole.count; ++d) {
    const Item<T>& item = whole.item[d];
    const A* checkpoint = item.checkpoints ? item.checkpoints + (number - 1) * item.batch * item.H : nullptr;
    items.item[d] = memory.window(d).item(item, range);
    launch_states(enter_window_kernel<T>, item, stream, checkpoint, memory.window(d).states, range.begin,
                  range.first_time(item));
  }
  input_products(items, 0, range.steps(), stream);
  forward_steps(items, cell, forward, 0, range.steps(), stream);
  for (int64_t d = 0; d < whole.count; ++d) items.item[d].running_c.data = memory.window(d).states.c;
  if (loop.plan.in_one_launch()) launch_padding(backward_padding_kernel<T>, items, stream);
  backward_steps(items, cell, loop, stream);
  for (int64_t d = 0; d < whole.count; ++d)
    if (whole.item[d].reverse) launch_states(leave_window_kernel<T>, whole.item[d], stream, range.begin);
  return items;
}

// The products of a window, which add to those of the later ones.
void window_products(const Items<T>& items, const Items<T>& whole, const BackwardMemory& memory,
                     const LayerWeights* grad_weights, const WindowRange& range, const Sequence<T>& grad_x,
                     Stream stream) {
  const bool last = range.end >= whole.item[0].steps;
  for (int64_t d = 0; d < items.count && grad_weights; ++d)
    weight_gradients(items.item[d], grad_weights[d], memory.sums(d), memory.partials(), stream,
                     CollectParts{stream, last});
  if (!grad_x.data) return;
  const int64_t batch = whole.item[0].batch, I = whole.item[0].I;
  if (items.count == 1) return input_gradient(items, SequenceRows<T>{from_time(grad_x, range.begin), batch}, stream);
  for (int64_t d = 0; d < items.count; ++d) {
    const int64_t t0 = range.first_time(whole.item[d]);
    input_gradient(Items<T>{{items.item[d]}, 1}, AddedRows<A>{memory.input_sums() + t0 * batch * I, I}, stream);
  }
}

template <class Cell>
void backward_in_windows(const Call<T>& call, const Items<T>& whole, const BackwardMemory& memory,
                         const LayerWeights* grad_weights, const Sequence<T>& grad_x, const Cell& cell,
                         const ForwardLoop<Cell>& forward, const BackwardLoop<Cell>& loop, Stream stream) {
  const int64_t steps = whole.item[0].steps, rows = steps * whole.item[0].batch, I = whole.item[0].I;
  const bool adds = grad_x.data && whole.count > 1;
  if (adds) cuda_runtime::clear(memory.input_sums(), rows * I * sizeof(A), stream);
  for (int64_t d = 0; d < whole.count; ++d) launch_states(load_carries_kernel<T>, whole.item[d], stream);
  for (int64_t number = call.windows() - 1; number >= 0; --number) {
    const WindowRange range{number * call.window(), std::min((number + 1) * call.window(), steps)};
    const Items<T> items = run_window(whole, memory, range, number, cell, forward, loop, stream);
    window_products(items, whole, memory, grad_weights, range, grad_x, stream);
  }
  for (int64_t d = 0; d < whole.count; ++d) launch_states(store_carries_kernel<T>, whole.item[d], stream);
  for (int64_t d = 0; d < whole.count && grad_weights; ++d)
    store_weight_sums(whole.item[d], grad_weights[d], memory.sums(d), stream);
  if (adds)
    launch(store_rows_kernel<T>, blocks_for(rows * I), dim3(kThreads), stream, memory.input_sums(), rows, I,
           SequenceRows<T>{grad_x, whole.item[0].batch});
}

template <class Cell>
void backward_call(Call<T>& call, const BackwardMemory& memory, const BackwardArgs& gradients, const Cell& cell,
                   const ForwardLoop<Cell>* forward, const BackwardLoop<Cell>& loop, Stream stream) {
  loop.sort(call.layer(0).item[0], stream);
  for (int64_t layer = call.config().num_layers - 1; layer >= 0; --layer) {
    const Items<T> items = loop.sorted(memory.items(layer));
    const bool dropped = layer > 0 && call.drops();
    const LayerWeights* grad_weights =
        gradients.grad_weights.empty() ? nullptr : &gradients.grad_weights[layer * items.count];
    const Sequence<T> target = memory.grad_input(layer);
    if (call.lean() && dropped)
      launch_dropout(call, layer - 1, call.output(layer - 1), call.dropped(layer - 1), stream);
    if (call.lean()) {
      backward_in_windows(call, items, memory, grad_weights, target, cell, *forward, loop, stream);
    } else {
      backward_layer(items, cell, loop, stream);
      layer_products(items, memory, grad_weights, target, stream);
    }
    if (target.data && dropped) launch_dropout(call, layer - 1, target, target, stream);
  }
}

// ---- the entries --------------------------------------------------------------------------------------------------

// A third fewer kernels, which take minutes to compile: tanh and ReLU share theirs.
template <class Cell>
Cell compiled(const Cell& cell) {
  return cell;
}
template <class F>
Rnn<A, TanhOrRelu> compiled(const Rnn<A, F>& cell) {
  return Rnn<A, TanhOrRelu>(either(cell.f));
}
template <class F>
LeakyRnn<A, TanhOrRelu> compiled(const LeakyRnn<A, F>& cell) {
  return LeakyRnn<A, TanhOrRelu>(cell, either(cell.f));
}

// run(cell) for the cell of that number.
template <class Run>
void with_cell(const Config& config, Run&& run) {
  int index = 0;
#define RNNFAST_CASE(name, Type, words) \
  if (config.cell == index++) return run(compiled(Type<A>(config.parameters)));
  RNNFAST_CELLS(RNNFAST_CASE)
#undef RNNFAST_CASE
}

Sizes forward_sizes(const Config& config, const ForwardArgs& args, bool training) {
  Carver reserve, workspace;
  with_cell(config, [&]<class Cell>(const Cell&) {
    Call<T>(config, args, Gates::of<Cell>(), training).lay_out(reserve, workspace);
    ForwardLoop<Cell>(config, args, workspace);
  });
  return {reserve.used(), workspace.used()};
}

void forward(const Config& config, const ForwardArgs& args, const std::vector<LayerWeights>& weights, bool training,
             Memory memory, void* stream) {
  Carver reserve(memory.reserve), workspace(memory.workspace);
  with_cell(config, [&]<class Cell>(const Cell& cell) {
    Call<T> call(config, args, Gates::of<Cell>(), training);
    call.lay_out(reserve, workspace);
    call.set_weights(weights);
    const ForwardLoop<Cell> loop(config, args, workspace);
    loop.sort(call.layer(0).item[0], static_cast<Stream>(stream));
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      forward_layer(call, loop.sorted(call.layer(layer)), cell, loop, static_cast<Stream>(stream));
      if (call.drops() && layer + 1 < config.num_layers)
        launch_dropout(call, layer, call.output(layer), call.dropped(layer), static_cast<Stream>(stream));
    }
  });
}

// The backward pass's memory, laid out in one order whether it is counted or used; in lean mode it runs the forward loop too.
template <class Cell>
struct Backward {
  Call<T> call;
  BackwardMemory memory;
  std::optional<ForwardLoop<Cell>> forward;
  BackwardLoop<Cell> loop;

  Backward(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients, Carver& reserve,
           Carver& workspace)
      : call(laid_out(config, args, reserve, workspace)),
        memory(call, gradients, workspace),
        forward(loop_again(config, args, call.lean(), workspace)),
        loop(config, args, workspace) {}

 private:
  static Call<T> laid_out(const Config& config, const ForwardArgs& args, Carver& reserve, Carver& workspace) {
    Call<T> call(config, args, Gates::of<Cell>(), true);
    call.lay_out(reserve, workspace, true);
    return call;
  }
  static std::optional<ForwardLoop<Cell>> loop_again(const Config& config, const ForwardArgs& args, bool lean,
                                                     Carver& workspace) {
    if (!lean) return std::nullopt;
    return ForwardLoop<Cell>(config, args, workspace);
  }
};

size_t backward_workspace(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients) {
  Carver reserve, workspace;
  with_cell(config, [&]<class Cell>(const Cell&) { Backward<Cell>(config, args, gradients, reserve, workspace); });
  return workspace.used();
}

void backward(const Config& config, const ForwardArgs& args, const BackwardArgs& gradients, Memory memory,
              void* stream) {
  Carver reserve(memory.reserve), workspace(memory.workspace);
  with_cell(config, [&]<class Cell>(const Cell& cell) {
    Backward<Cell> pass(config, args, gradients, reserve, workspace);
    pass.call.set_weights(gradients.weights);
    backward_call(pass.call, pass.memory, gradients, cell, pass.forward ? &*pass.forward : nullptr, pass.loop,
                  static_cast<Stream>(stream));
  });
}

// Why no persistent kernel serves a call.
std::string generic_reason(const Config& config, const ForwardArgs& args) {
  if (!kHasGrid) return "persistent kernels are not for float64";
  if (cuda_engine::path() == "generic") return "set_path asks for it";
  if (config.proj_size > 0) return "persistent kernels have no projection";
  if (cuda_engine::path().empty() && args.steps < kLeastGridSteps) return "so few steps are sooner done one by one";
  if (cuda_engine::path() == "cluster") return "no cluster of blocks has room for the recurrent weights";
  return "the recurrent weights do not fit the multiprocessors";
}

std::string describe(const Config& config, const ForwardArgs& args, const Plan& plan) {
  const PersistentPlan& block = plan.block;
  if (block.possible)
    return "all steps in one launch (persistent kernel: " + std::to_string(block.batch_slices) + " blocks of " +
           std::to_string(block.threads) + " threads, each with " + std::to_string(block.rows) +
           (block.rows == 1 ? " sequence)" : " sequences)");
  const std::string tf32 = config.tf32 ? " in tf32" : "";
  const std::string kind = plan.grid.cluster ? "cluster kernel" : "grid kernel";
  if (plan.grid.possible) return "all steps in one launch (" + kind + tf32 + ": " + in_words(plan.grid) + ")";
  return "a launch for each step (generic kernel" + tf32 + ": " + generic_reason(config, args) + ")";
}

std::string describe(const Config& config, const ForwardArgs& args) {
  std::string text;
  with_cell(config, [&]<class Cell>(const Cell&) {
    text = "forward " + describe(config, args, forward_plan<Cell>(config, args)) + "; backward " +
           describe(config, args, backward_plan<Cell>(config, args)) +
           (config.tf32 ? "; products over all steps in tf32" : "");
  });
  return text;
}

}  // namespace
RNNFAST_END

#define RNNFAST_JOIN_(a, b) a##b
#define RNNFAST_JOIN(a, b) RNNFAST_JOIN_(a, b)
const rnnfast::cuda_engine::Engine rnnfast::cuda_engine::RNNFAST_JOIN(kEngine_, RNNFAST_ELEMENT) = {
    rnnfast::cuda::forward_sizes, rnnfast::cuda::forward, rnnfast::cuda::backward_workspace, rnnfast::cuda::backward,
    rnnfast::cuda::describe};
