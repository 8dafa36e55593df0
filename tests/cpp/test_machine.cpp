// Instruction sets, threads, memory: what is chosen, what is refused, and calls that meet in one process.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <stdexcept>
#include <thread>

#include "bindings/digest.h"
#include "core/registry.h"
#include "engine_call.h"
#include "naive.h"

namespace rnnfast::test {
namespace {

Problem lstm_problem(uint64_t seed) {
  int cell = 0;
  while (std::string(kCells[cell].name) != "lstm") ++cell;
  return draw_problem({cell, 20, 4, 33}, seed);
}

void instruction_sets() {
  const std::vector<std::string> possible = possible_isas(), compiled = compiled_isas();
  CHECK(!possible.empty() && possible.back() == "scalar");
  for (const std::string& name : possible) {
    CHECK(std::find(compiled.begin(), compiled.end(), name) != compiled.end());
    setenv("RNNFAST_ISA", name.c_str(), 1);
    choose_isa();
    CHECK(isa() == name);
    CHECK(fma_peak(1, 0.005, Dtype::kFloat32) > 0 && fma_peak(2, 0.005, Dtype::kFloat64) > 0);
  }
  setenv("RNNFAST_ISA", "sse17", 1);
  CHECK_THROWS(std::runtime_error, choose_isa());
  CHECK(isa() == possible.back());  // a refused one changes nothing
  unsetenv("RNNFAST_ISA");
  choose_isa();
  CHECK(isa() == possible.front());
}

void splits_and_threads() {
  CHECK_THROWS(std::invalid_argument, set_split("diagonal"));
  for (const int n : {1, 2, 3}) {
    set_num_threads(n);
    CHECK(get_num_threads() == n);
  }
  set_split("");
}

void buffers() {
  release_pool();
  CHECK(pooled_bytes() == 0);
  {
    const Buffer empty(0), small(1), large(size_t{5} << 20);
  }
  CHECK(pooled_bytes() >= size_t{5} << 20);
  {
    const Buffer again(size_t{5} << 20);
    CHECK(reinterpret_cast<uintptr_t>(again.data()) % 64 == 0 && again.size() == size_t{5} << 20);
    CHECK(pooled_bytes() < size_t{5} << 20);
  }
  release_pool();
  CHECK(pooled_bytes() == 0);
  CHECK_THROWS(std::bad_alloc, Buffer(SIZE_MAX));
}

// Two threads at once in calls of their own, and with one set of packed weights.
void simultaneous_calls() {
  set_num_threads(2);
  const Problem first = lstm_problem(1), second = lstm_problem(2);
  EngineCall<float> pinned(first);
  const auto packed = pinned.pack();
  const auto work = [&](const Problem& problem) {
    EngineCall<float> call(problem);
    Outputs out = call.forward(true);
    call.backward();
    return out.output;
  };
  const Tensor expected_first = work(first), expected_second = work(second);
  const Tensor expected_packed = pinned.forward(false, packed.get()).output;
  const auto repeat = [&](const Problem& problem, const Tensor& expected) {
    for (int i = 0; i < 10; ++i) {
      check_same("simultaneous call", work(problem), expected);
      EngineCall<float> call(first);
      check_same("shared packed weights", call.forward(false, packed.get()).output, expected_packed);
    }
  };
  std::thread other(repeat, std::cref(first), std::cref(expected_first));
  repeat(second, expected_second);
  other.join();
}

// A child that was forked after a parallel region must neither hang nor differ.
void forked_child() {
  set_num_threads(2);
  set_split("hidden");
  const Problem problem = lstm_problem(3);
  const Outputs expected = naive_forward(problem, true);
  EngineCall<double> parent(problem);
  check_outputs(parent.forward(true), expected, 1e-12);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    EngineCall<double> call(problem);
    check_outputs(call.forward(true), expected, 1e-12);
    call.backward();
    _exit(finish());
  }
  int status = -1;
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  set_split("");
}

// Every bit counts, wherever it lies, and so do the order of blocks and the number of bytes.
template <class Lanes>
void digests() {
  std::vector<uint8_t> bytes(3 * Lanes::kBlock + 20);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * i >> 3);
  std::set<uint64_t> seen;
  size_t tries = 0;
  const auto see = [&] { seen.insert(bindings::digest_in<Lanes>(bytes.data(), bytes.size(), 1)), ++tries; };
  see();
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    see();
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  }
  for (size_t block = 1; block < 3; ++block) {
    const auto first = bytes.begin(), other = first + static_cast<int64_t>(block * Lanes::kBlock);
    std::swap_ranges(first, first + Lanes::kBlock, other);
    see();
    std::swap_ranges(first, first + Lanes::kBlock, other);
  }
  std::fill(bytes.begin(), bytes.end(), uint8_t{0});
  for (; !bytes.empty(); bytes.pop_back()) see();
  CHECK(seen.size() == tries);
}

void run() {
  set_case("digests");
  digests<bindings::WordLanes>();
#ifdef RNNFAST_AES
  if (__builtin_cpu_supports("aes")) digests<bindings::AesLanes>();
#endif
  set_case("instruction sets");
  instruction_sets();
  set_case("splits and threads");
  splits_and_threads();
  set_case("buffers");
  buffers();
  set_case("simultaneous calls");
  simultaneous_calls();
  set_case("forked child");
  forked_child();
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::run();
  return rnnfast::test::finish();
}
