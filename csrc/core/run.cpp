// From a checked call to a filled Network: every pointer and stride that the kernels read is set in this file.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/api.h"
#include "core/contention.h"
#include "core/dispatch.h"
#include "core/plan.h"
#include "core/registry.h"

namespace rnnfast {

// ---- packed weights ----

template <class T>
struct PackedPointers {
  T *w_ih, *w_hh, *bias, *w_hr;          // forward
  T *w_ih_rows, *w_hh_rows, *w_hr_rows;  // backward
};

namespace {

int64_t round_up(int64_t n, int64_t lanes) { return (n + lanes - 1) / lanes * lanes; }

struct Sizes {
  int64_t W, G, S, H, P, I;
  bool projected;

  Sizes(const Config& config, int64_t layer, int lanes)
      : W(lanes),
        G(kCells[config.cell].gates),
        S(kCells[config.cell].slots),
        H(config.hidden_size),
        P(config.output_size()),
        I(config.layer_input(layer)),
        projected(config.proj_size > 0) {}
  int64_t padded_h() const { return round_up(H, W); }
  int64_t padded_p() const { return round_up(P, W); }
  int64_t padded_i() const { return round_up(I, W); }
  // Whether dx takes fewer multiply-adds with units as lanes, and a sum of lanes (about eight) for each value.
  bool narrow_input() const { return W > 1 && I * (G * padded_h() / W + 8) < G * H; }
};

template <class T>
PackedPointers<T> carve_forward(Carver& carver, const Sizes& z) {
  PackedPointers<T> p{};
  p.w_ih = carver.take<T>(z.padded_h() * z.I * z.G);
  p.w_hh = carver.take<T>(z.padded_h() * z.P * z.G);
  p.bias = carver.take<T>(z.padded_h() * z.S);
  if (z.projected) p.w_hr = carver.take<T>(z.padded_p() * z.H);
  return p;
}

template <class T>
PackedPointers<T> carve_backward(Carver& carver, const Sizes& z, bool input, bool recurrent) {
  PackedPointers<T> p{};
  if (input && z.narrow_input())
    p.w_ih = carver.take<T>(z.padded_h() * z.I * z.G);
  else if (input)
    p.w_ih_rows = carver.take<T>(z.padded_i() * z.G * z.H);
  if (recurrent) p.w_hh_rows = carver.take<T>(z.padded_p() * z.G * z.H);
  if (z.projected) p.w_hr_rows = carver.take<T>(z.padded_h() * z.P);
  return p;
}

template <class T>
void add_job(std::vector<PackJob<T>>& jobs, typename PackJob<T>::Kind kind, const Array2& source, int64_t rows,
             int64_t K, bool recurrent, bool gates, T* target) {
  if (target)
    jobs.push_back({kind, static_cast<const T*>(source.data), nullptr, source.stride0, source.stride1, 0, rows, K,
                    recurrent ? 1 : 0, gates, target});
}

template <class T>
void add_jobs(std::vector<PackJob<T>>& jobs, const LayerWeights& w, const PackedPointers<T>& p, const Sizes& z) {
  using Job = PackJob<T>;
  add_job(jobs, Job::kColumns, w.w_ih, z.H, z.I, false, true, p.w_ih);
  add_job(jobs, Job::kColumns, w.w_hh, z.H, z.P, true, true, p.w_hh);
  add_job(jobs, Job::kColumns, w.w_hr, z.P, z.H, false, false, p.w_hr);
  add_job(jobs, Job::kRows, w.w_ih, z.H, z.I, false, true, p.w_ih_rows);
  add_job(jobs, Job::kRows, w.w_hh, z.H, z.P, true, true, p.w_hh_rows);
  add_job(jobs, Job::kRows, w.w_hr, z.P, z.H, false, false, p.w_hr_rows);
  if (p.bias)
    jobs.push_back({Job::kBias, static_cast<const T*>(w.b_ih.data), static_cast<const T*>(w.b_hh.data), w.b_ih.stride0,
                    1, w.b_hh.stride0, z.H, 1, 0, true, p.bias});
}

}  // namespace

struct Packed::Layout {
  // The same order every time, so that the layout need not be stored.
  template <class T>
  static std::vector<PackedPointers<T>> pointers(const Config& config, uint8_t* base, int lanes,
                                                 size_t* bytes = nullptr) {
    Carver carver(base);
    std::vector<PackedPointers<T>> all;
    for (int64_t layer = 0; layer < config.num_layers; ++layer)
      for (int64_t d = 0; d < config.num_directions; ++d)
        all.push_back(carve_forward<T>(carver, Sizes(config, layer, lanes)));
    if (bytes) *bytes = carver.used();
    return all;
  }
  template <class T>
  static size_t bytes(const Config& config, int lanes) {
    size_t used = 0;
    pointers<T>(config, nullptr, lanes, &used);
    return used;
  }
};

namespace {

int lanes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? engine<float>().lanes : engine<double>().lanes; }

template <class T>
Array3 shifted(Array3 a, int64_t elements) {
  if (a.data) a.data = static_cast<T*>(a.data) + elements;
  return a;
}
template <class T, class U = T>
Sequence<U> sequence(const Array3& a, int64_t shift = 0) {
  return {a.data ? static_cast<T*>(a.data) + shift : nullptr, a.stride0, a.stride1};
}
// Row `index` of [L * D, B, .] as rows by batch.
template <class T, class U = T>
Rows<U> rows(const Array3& a, int64_t index) {
  return {a.data ? static_cast<T*>(a.data) + index * a.stride0 : nullptr, a.stride1};
}
// [T, L * D, B, n] at one L * D.
template <class T, class U = T>
Sequence<U> states(const void* data, int64_t index, int64_t count, int64_t batch, int64_t n) {
  if (!data) return {nullptr, 0, 0};
  return {const_cast<T*>(static_cast<const T*>(data)) + index * batch * n, count * batch * n, n};
}

enum class Pass { kInference, kTraining, kBackward };

// Builds the networks of one call. The reserve and the workspace are carved in the same order by the counting pass and
// the real one, and the reserve again, identically, by the backward call.
template <class T>
class Builder {
 public:
  Builder(const Config& config, const ForwardArgs& args, const Plan& plan, Pass pass)
      : config_(config),
        args_(args),
        plan_(plan),
        pass_(pass),
        training_(pass != Pass::kInference),
        lean_(plan.segment > 0),
        lanes_(engine<T>().lanes) {}

  // Items, layer sequences and dropout; memory from `reserve` (kept) and `workspace` (this call).
  void build(Carver& reserve, Carver& workspace) {
    items_.clear(), output_.clear(), dropped_.clear(), dropout_.clear(), layer_x_.clear();
    const T* zeros = zero_row(workspace);
    sequences(training_ ? reserve : workspace);
    for (int64_t layer = 0; layer < config_.num_layers; ++layer)
      for (int64_t d = 0; d < config_.num_directions; ++d)
        for (int64_t s = 0; s < plan_.slices; ++s) items_.push_back(item(layer, d, s, zeros, reserve, workspace));
    scratch_ = workspace.take<uint8_t>(plan_.threads * scratch_bytes());
    if (!plan_.wavefront) return;
    progress_ = workspace.take<int64_t>(config_.num_layers * 8);
    if (progress_) std::fill_n(progress_, config_.num_layers * 8, 0);
  }

  void set_forward_weights(const std::vector<PackedPointers<T>>& packed) {
    for (size_t i = 0; i < items_.size(); ++i) {
      const PackedPointers<T>& p = packed[i / plan_.slices];
      items_[i].w_ih = p.w_ih, items_[i].w_hh = p.w_hh, items_[i].w_hr = p.w_hr, items_[i].bias = p.bias;
    }
  }

  Network<T> network(std::vector<PackJob<T>>& jobs) {
    Network<T> net{};
    net.layers = config_.num_layers, net.directions = config_.num_directions, net.slices = plan_.slices;
    net.threads = !plan_.forced.empty() || !contention().present() ? plan_.threads : 1;
    net.patience = plan_.patience;
    net.steps = args_.steps, net.batch = args_.batch;
    std::copy(config_.parameters, config_.parameters + 4, net.parameters);
    net.items = items_.data();
    net.packs = jobs.data(), net.pack_count = jobs.size();
    net.scratch = scratch_, net.scratch_bytes = scratch_bytes();
    net.row_chunk = plan_.row_chunk;
    net.progress = progress_;
    net.dropout = dropout_.empty() ? nullptr : dropout_.data();
    net.dropped = dropped_.data(), net.layer_output = output_.data();
    net.lengths = plan_.lengths.empty() ? nullptr : plan_.lengths.data();
    return net;
  }

  std::vector<Item<T>>& items() { return items_; }
  const Sequence<T>& layer_output(int64_t layer) const { return output_[layer]; }
  int64_t width() const { return config_.num_directions * config_.output_size(); }

 private:
  const T* zero_row(Carver& workspace) {
    int64_t n = std::max(config_.hidden_size, config_.output_size());
    for (int64_t layer = 0; layer < config_.num_layers; ++layer) n = std::max(n, config_.layer_input(layer));
    T* zeros = workspace.take<T>(n);
    if (zeros) std::memset(zeros, 0, n * sizeof(T));
    return zeros;
  }

  // The outputs of all layers; the last is the caller's. In inference two buffers serve in turn, if they can.
  void sequences(Carver& memory) {
    const int64_t size = args_.steps * args_.batch * width();
    const bool dropping = training_ && args_.dropout > 0;
    const auto fresh = [&] { return Sequence<T>{memory.take<T>(size), args_.batch * width(), width()}; };
    layer_x_.push_back(sequence<const T>(args_.x));
    for (int64_t layer = 0; layer + 1 < config_.num_layers; ++layer) {
      output_.push_back(training_ || plan_.wavefront || layer < 2 ? fresh() : output_[layer - 2]);
      if (dropping) {
        dropped_.push_back(fresh());
        dropout_.push_back(key(layer));
      }
      const Sequence<T>& next = dropping ? dropped_.back() : output_.back();
      layer_x_.push_back({next.data, next.t_stride, next.b_stride});
    }
    output_.push_back(sequence<T>(args_.output));
  }

  DropoutKey key(int64_t layer) const {
    const double p = args_.dropout;
    return {args_.seed,
            args_.call,
            static_cast<uint32_t>(layer),
            static_cast<uint32_t>(p * 4294967296.0 * (p < 1)),
            p < 1 ? 1 / (1 - p) : 0.0,
            p >= 1};
  }

  Item<T> item(int64_t layer, int64_t d, int64_t s, const T* zeros, Carver& reserve, Carver& workspace) {
    const Sizes z(config_, layer, lanes_);
    const int64_t index = layer * config_.num_directions + d, P = z.P;
    Item<T> item{};
    item.schedule = plan_.slice[s].schedule;
    item.reverse = d == 1;
    item.keep = pass_ == Pass::kBackward || (training_ && !lean_);
    item.gradient_steps = plan_.gradient_steps, item.chunk = plan_.chunk, item.segment = plan_.segment;
    item.I = z.I, item.H = z.H, item.P = P;
    item.projected = z.projected;
    item.x = layer_x_[layer];
    item.out = output_[layer];
    if (item.out.data) item.out.data += d * P;
    item.reset = sequence<const uint8_t>(args_.reset);
    item.h0 = rows<const T>(args_.h0, index), item.c0 = rows<const T>(args_.c0, index);
    item.reset_h = rows<const T>(args_.reset_h, index), item.reset_c = rows<const T>(args_.reset_c, index);
    item.hn = rows<T>(args_.hn, index), item.cn = rows<T>(args_.cn, index);
    item.h_all = states<T>(args_.h_all, index, config_.states(), args_.batch, P);
    item.c_all = states<T>(args_.c_all, index, config_.states(), args_.batch, z.H);
    item.zeros = zeros;
    if (kCells[config_.cell].cell_state && args_.reset.data)
      item.reset_rows = item.reset_c.data && item.reset_c.b_stride ? item.schedule.sequences : 1;
    const int64_t sequences = item.schedule.sequences, rows = item.schedule.rows;
    if (training_ && !lean_)
      slots_and_cells(item, z, rows, 0, reserve);
    else if (layer > 0 && !plan_.wavefront)
      share_memory(item, items_[d * plan_.slices + s]);
    else if (pass_ == Pass::kBackward)
      slots_and_cells(item, z, std::min(rows, plan_.segment * sequences), sequences, workspace);
    else
      slots_and_cells(item, z, std::min(rows, plan_.chunk * sequences), 0, workspace);
    if (training_ && lean_ && kCells[config_.cell].cell_state)
      item.checkpoints = reserve.take<T>((args_.steps + plan_.segment - 1) / plan_.segment * z.padded_h() * sequences);
    return item;
  }

  // `rows` of them at once, and for slots some to spare.
  void slots_and_cells(Item<T>& item, const Sizes& z, int64_t rows, int64_t spare, Carver& memory) {
    const int64_t sequences = item.schedule.sequences;
    item.slot_rows = rows + spare;
    item.slots = memory.take<T>(z.padded_h() * item.slot_rows * z.S);
    if (kCells[config_.cell].cell_state) {
      item.cell_rows = sequences + item.reset_rows + (item.keep ? rows : 0);
      item.cells = memory.take<T>(z.padded_h() * item.cell_rows);
    }
    if (z.projected) item.raw = memory.take<T>((item.keep ? rows : sequences) * z.H);
  }

  // Memory that is used up when a layer is done serves the next one.
  static void share_memory(Item<T>& item, const Item<T>& first) {
    item.slots = first.slots, item.slot_rows = first.slot_rows;
    item.cells = first.cells, item.cell_rows = first.cell_rows;
    item.raw = first.raw;
  }

  int64_t scratch_bytes() const {
    int64_t sequences = 0;
    for (const SlicePlan& slice : plan_.slice) sequences = std::max(sequences, slice.schedule.sequences);
    const int64_t rows = std::max({plan_.row_chunk, plan_.chunk * sequences, sequences});
    const int64_t used = (32 * 16 + plan_.row_chunk * 4 * lanes_) * sizeof(T) + rows * 8 + sequences * 17 + 6 * 64;
    return round_up(used, 64) + 4096;  // a page between threads, whose tiles begin on a cache line
  }

  const Config& config_;
  const ForwardArgs& args_;
  const Plan& plan_;
  const Pass pass_;
  const bool training_, lean_;
  const int lanes_;
  std::vector<Item<T>> items_;
  std::vector<Sequence<T>> output_, dropped_;
  std::vector<Sequence<const T>> layer_x_;
  std::vector<DropoutKey> dropout_;
  uint8_t* scratch_ = nullptr;
  int64_t* progress_ = nullptr;
};

template <class T>
void run_engine(void (*kernels)(int, const Network<T>&), int cell, Network<T> net) {
  if (net.threads == 1) return kernels(cell, net);
  int64_t waited = 0;
  net.waited = &waited;
  const int64_t start = monotonic_ns();
  kernels(cell, net);
  contention().report(waited, monotonic_ns() - start);
}

// Bytes of what a forward call returns: memory that nobody has touched yet.
template <class T>
double results(const Config& config, const ForwardArgs& args) {
  const int64_t states = (args.h_all ? config.output_size() : 0) + (args.c_all ? config.hidden_size : 0);
  const int64_t values = config.num_directions * config.output_size() + config.states() * states;
  return static_cast<double>(args.steps) * static_cast<double>(args.batch) * static_cast<double>(values) * sizeof(T);
}

template <class T>
void run_forward(const Config& config, const ForwardArgs& args, const Plan& plan,
                 const std::vector<LayerWeights>* weights, const Packed* packed, Context* context) {
  const int lanes = engine<T>().lanes;
  Builder<T> builder(config, args, plan, context ? Pass::kTraining : Pass::kInference);
  Carver count_reserve, count_workspace;
  builder.build(count_reserve, count_workspace);
  const size_t packed_size = packed ? 0 : Packed::Layout::bytes<T>(config, lanes);
  require_memory(static_cast<double>(packed_size + count_workspace.used() + count_reserve.used()) +
                 results<T>(config, args));
  Buffer fresh(packed_size), workspace(count_workspace.used());
  if (context) context->reserve = Buffer(count_reserve.used());
  Carver reserve(context ? context->reserve.data() : nullptr), work(workspace.data());
  builder.build(reserve, work);

  const auto pointers = Packed::Layout::pointers<T>(config, packed ? packed->buffer.data() : fresh.data(), lanes);
  std::vector<PackJob<T>> jobs;
  if (!packed)
    for (size_t i = 0; i < pointers.size(); ++i)
      add_jobs(jobs, (*weights)[i], pointers[i], Sizes(config, i / config.num_directions, lanes));
  builder.set_forward_weights(pointers);
  run_engine(engine<T>().forward, config.cell, builder.network(jobs));
}

// The pieces that only the backward pass needs, for all items.
template <class T>
class BackwardBuilder {
 public:
  BackwardBuilder(Context& context, const BackwardArgs& args)
      : context_(context), config_(context.config), args_(args), plan_(*context.plan) {}

  void run() {
    Builder<T> builder(config_, context_.args, plan_, Pass::kBackward);
    Carver count_reserve, count;
    builder.build(count_reserve, count);
    fill(builder, count);
    require_memory(static_cast<double>(count.used()) + grad_x_bytes());
    Buffer workspace(count.used());
    Carver reserve(context_.reserve.data()), work(workspace.data());
    builder.build(reserve, work);
    fill(builder, work);
    Network<T> net = builder.network(jobs_);
    net.grad_weights = grad_weights_.data();
    net.grad_input = grad_input_.data();
    net.input_turns = turns_;
    run_engine(engine<T>().backward, config_.cell, net);
  }

 private:
  void fill(Builder<T>& builder, Carver& work) {
    jobs_.clear(), grad_weights_.clear(), grad_input_.clear();
    const int lanes = engine<T>().lanes;
    inputs(builder.width(), work);
    sums(work);
    turns(work);
    std::vector<PackedPointers<T>> forward_weights;
    for (int64_t i = 0; i < config_.states(); ++i) {
      const int64_t layer = i / config_.num_directions, d = i % config_.num_directions;
      const Sizes z(config_, layer, lanes);
      const PackedPointers<T> packed =
          carve_backward<T>(work, z, layer > 0 || wants_x(), context_.args.steps > 1 || wants_states());
      add_jobs(jobs_, args_.weights[i], packed, z);
      if (plan_.segment) {
        forward_weights.push_back(carve_forward<T>(work, z));
        add_jobs(jobs_, args_.weights[i], forward_weights.back(), z);
      }
      for (int64_t s = 0; s < plan_.slices; ++s)
        item(builder.items()[i * plan_.slices + s], layer, d, i, z, packed, work);
      for (int64_t s = 0; s < plan_.slices; ++s)
        grad_weights_.push_back(s == 0 ? weight_gradients(i)
                                       : slice_gradients(i, z, part(sums_[d], (s - 1) * sums_size_)));
    }
    if (plan_.segment) builder.set_forward_weights(forward_weights);
  }

  // Untouched so far, as the results of a forward call.
  double grad_x_bytes() const {
    const ForwardArgs& forward = context_.args;
    return wants_x() ? static_cast<double>(forward.steps * forward.batch * config_.input_size) * sizeof(T) : 0;
  }
  bool wants_x() const { return args_.grad_x.data != nullptr; }
  bool wants_states() const { return args_.grad_h0.data || args_.grad_reset_h.data || args_.grad_reset_c.data; }

  // dL/d(input of each layer): the caller's for the first, two buffers in turn for the others if they can.
  void inputs(int64_t width, Carver& work) {
    const int64_t size = context_.args.steps * context_.args.batch * width;
    grad_input_.push_back(sequence<T>(args_.grad_x));
    for (int64_t layer = 1; layer < config_.num_layers; ++layer)
      grad_input_.push_back(layer <= 2 || plan_.wavefront
                                ? Sequence<T>{work.take<T>(size), context_.args.batch * width, width}
                                : grad_input_[layer - 2]);
  }

  // Sums of the slices after the first: as much as the largest layer needs, for each direction.
  void sums(Carver& work) {
    sums_size_ = 0;
    for (int64_t layer = 0; layer < config_.num_layers && !args_.grad_weights.empty(); ++layer) {
      const Sizes z(config_, layer, engine<T>().lanes);
      sums_size_ = std::max(sums_size_, round_up(z.G * z.H * (z.I + z.P + 2) + (z.projected ? z.P * z.H : 0), 64));
    }
    for (int64_t d = 0; d < config_.num_directions; ++d) sums_[d] = work.take<T>(sums_size_ * (plan_.slices - 1));
  }

  void turns(Carver& work) {
    if (config_.num_directions < 2) return;
    const int64_t pieces = (context_.args.steps + plan_.gradient_steps - 1) / plan_.gradient_steps;
    const int64_t count = pieces * plan_.slices * plan_.threads;
    turns_ = work.take<int32_t>(count);
    if (turns_) std::memset(turns_, 0, count * sizeof(int32_t));
  }

  void item(Item<T>& item, int64_t layer, int64_t d, int64_t index, const Sizes& z, const PackedPointers<T>& packed,
            Carver& work) {
    item.w_ih = packed.w_ih;
    item.w_ih_rows = packed.w_ih_rows, item.w_hh_rows = packed.w_hh_rows, item.w_hr_rows = packed.w_hr_rows;
    if (layer + 1 == config_.num_layers) {
      item.grad_out = sequence<const T>(args_.grad_output, d * z.P);
    } else {
      const Sequence<T>& next = grad_input_[layer + 1];
      item.grad_out = {next.data ? next.data + d * z.P : nullptr, next.t_stride, next.b_stride};
    }
    const int64_t count = config_.states(), batch = context_.args.batch;
    item.grad_hn = rows<const T>(args_.grad_hn, index), item.grad_cn = rows<const T>(args_.grad_cn, index);
    item.grad_h_all = states<const T>(args_.grad_h_all, index, count, batch, z.P);
    item.grad_c_all = states<const T>(args_.grad_c_all, index, count, batch, z.H);
    item.grad_h0 = rows<T>(args_.grad_h0, index), item.grad_c0 = rows<T>(args_.grad_c0, index);
    item.grad_reset_h = rows<T>(args_.grad_reset_h, index), item.grad_reset_c = rows<T>(args_.grad_reset_c, index);
    item.record_h = states<T>(args_.record_h, index, count, batch, z.P);
    const int64_t sequences = item.schedule.sequences;
    const auto carry = [&](int64_t n, bool wanted) { return wanted ? work.take<T>(n * sequences) : nullptr; };
    const bool cells = kCells[config_.cell].cell_state;
    item.carry_h = carry(z.padded_p(), true), item.carry_c = carry(z.padded_h(), cells);
    item.carry_reset_h = carry(z.padded_p(), args_.grad_reset_h.data);
    item.carry_reset_c = carry(z.padded_h(), args_.grad_reset_c.data);
    if (z.projected) item.grad_raw = work.take<T>(plan_.gradient_steps * sequences * z.P);
    if (args_.retain && !plan_.segment) keep_slots(item, z, work);
  }

  // The gate gradients overwrite the saved gates; when those must survive, a copy is used up instead.
  static void keep_slots(Item<T>& item, const Sizes& z, Carver& work) {
    const int64_t size = z.padded_h() * item.slot_rows * z.S;
    T* copy = work.take<T>(size);
    if (copy && item.slots) std::memcpy(copy, item.slots, size * sizeof(T));
    item.slots = copy;
  }

  WeightGradients<T> weight_gradients(int64_t i) const {
    if (args_.grad_weights.empty()) return {};
    const LayerWeights& g = args_.grad_weights[i];
    const auto p = [](const Array2& a) { return static_cast<T*>(a.data); };
    return {p(g.w_ih), p(g.w_hh), p(g.b_ih), p(g.b_hh), p(g.w_hr)};
  }

  // Null in the counting pass.
  static T* part(T* memory, int64_t offset) { return memory ? memory + offset : nullptr; }

  // The same arrays as the caller's, one after the other in `sums`.
  WeightGradients<T> slice_gradients(int64_t i, const Sizes& z, T* sums) const {
    WeightGradients<T> g = weight_gradients(i);
    const auto replace = [&](T*& values, int64_t n) {
      if (values) values = sums, sums = part(sums, n);
    };
    replace(g.w_ih, z.G * z.H * z.I), replace(g.w_hh, z.G * z.H * z.P);
    replace(g.b_ih, z.G * z.H), replace(g.b_hh, z.G * z.H), replace(g.w_hr, z.P * z.H);
    return g;
  }

  Context& context_;
  const Config& config_;
  const BackwardArgs& args_;
  const Plan& plan_;
  std::vector<PackJob<T>> jobs_;
  std::vector<WeightGradients<T>> grad_weights_;
  std::vector<Sequence<T>> grad_input_;
  T* sums_[2] = {};  // of each direction, [slices - 1][sums_size_]
  int64_t sums_size_ = 0;
  int32_t* turns_ = nullptr;
};

template <class T>
void run_pack(const Config& config, const Buffer& buffer, const std::vector<LayerWeights>& weights) {
  const int lanes = engine<T>().lanes;
  const auto pointers = Packed::Layout::pointers<T>(config, buffer.data(), lanes);
  std::vector<PackJob<T>> jobs;
  for (size_t i = 0; i < pointers.size(); ++i)
    add_jobs(jobs, weights[i], pointers[i], Sizes(config, i / config.num_directions, lanes));
  Network<T> net{};
  net.threads = 1;
  net.packs = jobs.data(), net.pack_count = jobs.size();
  engine<T>().pack(config.cell, net);
}

size_t packed_bytes(const Config& config) {
  return config.dtype == Dtype::kFloat32 ? Packed::Layout::bytes<float>(config, lanes_of(config.dtype))
                                         : Packed::Layout::bytes<double>(config, lanes_of(config.dtype));
}

}  // namespace

Packed::Packed(const Config& c, const std::vector<LayerWeights>& weights) : config(c), buffer(packed_bytes(c)) {
  if (config.dtype == Dtype::kFloat32)
    run_pack<float>(config, buffer, weights);
  else
    run_pack<double>(config, buffer, weights);
}

Context::Context(const Config& c, const ForwardArgs& a, std::shared_ptr<const Plan> p)
    : config(c), args(a), plan(std::move(p)) {}

std::unique_ptr<Context> forward(const Config& config, const ForwardArgs& args,
                                 const std::vector<LayerWeights>* weights, const Packed* packed, bool training) {
  auto plan = make_plan(config, args, training, lanes_of(config.dtype), get_num_threads());
  std::unique_ptr<Context> context;
  if (training) {
    ForwardArgs kept = args;
    kept.lengths = nullptr;  // the plan has its own copy; the caller's array may go
    context = std::make_unique<Context>(config, kept, plan);
  }
  if (config.dtype == Dtype::kFloat32)
    run_forward<float>(config, args, *plan, weights, packed, context.get());
  else
    run_forward<double>(config, args, *plan, weights, packed, context.get());
  return context;
}

void backward(Context& context, const BackwardArgs& args) {
  if (context.consumed)
    throw std::logic_error(
        "backward: this forward's reserve has been used up by an earlier backward; give that one retain=True");
  if (context.config.dtype == Dtype::kFloat32)
    BackwardBuilder<float>(context, args).run();
  else
    BackwardBuilder<double>(context, args).run();
  context.consumed = !args.retain;
}

}  // namespace rnnfast
