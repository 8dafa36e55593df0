// The launch plans of the persistent CUDA kernels, over all shapes that have one: what a device has is enough, and every weight
// has exactly one place.
#include <set>

#include "cuda/plan.h"
#include "harness.h"

namespace rnnfast::test {
namespace {

constexpr int64_t kFloat = 4;
constexpr int kGates[] = {1, 3, 4};

// Which k of the depth the threads of one unit read: each once, by one of them.
void check_ownership(const PersistentPlan& plan, int64_t depth) {
  std::vector<int> owners(depth, 0);
  for (int slice = 0; slice < plan.slices; ++slice)
    for (int quad = 0; quad < plan.quads; ++quad)
      for (int i = 0; i < 4; ++i) {
        const int64_t k = int64_t{4} * plan.first_quad(quad, slice) + i;
        CHECK(k < int64_t{4} * plan.state_quads());
        if (k < depth) ++owners[k];
      }
  for (const int count : owners) CHECK(count == 1);
}

// The places in shared memory: none twice, all within, the states behind the weights.
void check_shared_memory(const PersistentPlan& plan, int gates) {
  std::set<int> places;
  for (int quad = plan.quads_held; quad < plan.quads; ++quad)
    for (int gate = 0; gate < gates; ++gate)
      for (int thread = 0; thread < plan.threads; ++thread) {
        const int place = plan.weight_index(gates, quad, gate, thread);
        CHECK(place >= 0 && place < plan.weight_quads(gates));
        CHECK(places.insert(place).second);
      }
  CHECK(static_cast<int>(places.size()) == plan.weight_quads(gates));
  for (int buffer = 0; buffer < 2; ++buffer)
    for (int row = 0; row < plan.rows; ++row) {
      const int end = plan.state_index(buffer, row) + plan.state_quads();
      CHECK(plan.weight_quads(gates) + end <= plan.shared_quads(gates));
      CHECK(plan.state_index(buffer, row) == (buffer * plan.rows + row) * plan.state_quads());
    }
}

void check_plan(const PersistentPlan& plan, const DeviceLimits& device, int gates, int64_t depth, int64_t units,
                int64_t batch) {
  const PersistentShape shape = plan.many_registers ? kManyRegisters : kManyThreads;
  CHECK(plan.threads >= units * plan.slices && plan.threads % kWarp == 0 && plan.threads <= shape.max_threads);
  CHECK(plan.slices <= kWarp && (plan.slices & (plan.slices - 1)) == 0 && kWarp % plan.slices == 0);
  CHECK(plan.rows <= plan.slices && plan.batch_slices * plan.rows >= batch);
  CHECK((plan.batch_slices - 1) * plan.rows < batch || batch == 0);
  CHECK(plan.quads_held == register_quads(shape, gates, plan.rows));
  CHECK(plan.rows == 1 || !plan.many_registers);  // of which there is no kernel
  CHECK(plan.shared_quads(gates) * 4 * kFloat <= device.shared_bytes);
  check_ownership(plan, depth);
  if (units % 13 == 0) check_shared_memory(plan, gates);
}

// The most hidden units for which both passes of a cell have a plan.
int64_t check_device(const DeviceLimits& device, int gates) {
  int64_t most = 0;
  for (int64_t H = 1; H <= 600; ++H)
    for (const int64_t batch : {int64_t{0}, int64_t{1}, int64_t{7}, device.multiprocessors + 1, int64_t{4096}}) {
      set_case("gates " + std::to_string(gates) + ", H " + std::to_string(H) + ", B " + std::to_string(batch));
      const PersistentPlan forward = plan_persistent(device, gates, H, H, batch, kFloat);
      const PersistentPlan backward = plan_persistent(device, 1, gates * H, H, batch, kFloat);
      if (forward.possible) check_plan(forward, device, gates, H, H, batch);
      if (backward.possible) check_plan(backward, device, 1, gates * H, H, batch);
      if (forward.possible && backward.possible) most = H;
    }
  return most;
}

void run() {
  CHECK(check_device(kH200, 4) >= 128);  // LSTM
  CHECK(check_device(kH200, 3) >= 140);  // GRU
  CHECK(check_device(kH200, 1) >= 256);  // RNN
  CHECK(check_device(kA100, 4) >= 112);
  CHECK(check_device(kA100, 3) >= 128);
  CHECK(check_device(kA100, 1) >= 224);
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::run();
  return rnnfast::test::finish();
}
