// The protocols of the grid-persistent kernels (cuda/grid_plan.h), in every interleaving of a few blocks: no block reads what
// another has not yet written, or has already written over, and none waits for ever. What the model is worth is shown by
// protocols that are wrong in one place each: in them it finds the fault.
#include <array>
#include <set>

#include "cuda/grid_plan.h"
#include "harness.h"

namespace rnnfast::test {
namespace {

constexpr int kMostParts = 4, kMostBuffers = 2;

struct Protocol {
  int buffers = kExchangeBuffers;
  bool waits_for_all = true;  // else only for the next part
  bool publishes_after_writing = true;
  bool reads_before_writing = true;  // else it writes for the next epoch before it has read its own
  int buffer(int64_t epoch) const { return buffers == kExchangeBuffers ? exchange_buffer(epoch) : 0; }
};

// What a part does in epoch e: waits, reads the place of each part, writes, publishes; each a move of its own. Before the first
// epoch it writes and publishes only.
enum class Act { kWait, kRead, kWrite, kPublish };

struct State {
  std::array<int, kMostParts> move{};                               // of each part, from 0 on
  std::array<int, kMostParts> flag{};                               // the last published epoch
  std::array<std::array<int, kMostBuffers>, kMostParts> written{};  // the epoch whose value lies in each place
  auto operator<=>(const State&) const = default;
};

class Model {
 public:
  Model(const Protocol& protocol, int parts, int epochs) : protocol_(protocol), parts_(parts), epochs_(epochs) {}

  // Tries every interleaving; false: some block read a wrong value, or none could go on.
  bool holds() {
    std::vector<State> open{State{}};
    std::set<State> seen{State{}};
    while (!open.empty()) {
      const State state = open.back();
      open.pop_back();
      bool moved = false, done = true;
      for (int part = 0; part < parts_; ++part) {
        done = done && finished(state, part);
        State next = state;
        if (finished(state, part) || !go_on(next, part)) continue;
        if (wrong_) return false;
        moved = true;
        if (seen.insert(next).second) open.push_back(next);
      }
      if (!moved && !done) return false;  // each waits for another
    }
    states = seen.size();
    return true;
  }
  size_t states = 0;

 private:
  int moves_of_epoch() const { return parts_ + 3; }
  bool finished(const State& s, int part) const { return s.move[part] == 2 + epochs_ * moves_of_epoch(); }

  Act act(int number, int& epoch, int& place) const {
    if (number < 2) {
      epoch = 0, place = 0;
      return number == (protocol_.publishes_after_writing ? 0 : 1) ? Act::kWrite : Act::kPublish;
    }
    epoch = 1 + (number - 2) / moves_of_epoch();
    const int move = (number - 2) % moves_of_epoch();
    if (move == 0) return Act::kWait;
    const int first_read = protocol_.reads_before_writing ? 1 : 2;
    place = move - first_read;
    if (place >= 0 && place < parts_) return Act::kRead;
    const bool last = move == parts_ + 2;
    if (!protocol_.reads_before_writing) return last ? Act::kPublish : Act::kWrite;
    return last == protocol_.publishes_after_writing ? Act::kPublish : Act::kWrite;
  }

  // One move of a part; false: it has to wait.
  bool go_on(State& s, int part) {
    int epoch = 0, place = 0;
    switch (act(s.move[part], epoch, place)) {
      case Act::kWait:
        for (int other = 0; other < parts_; ++other) {
          const bool asked = protocol_.waits_for_all || other == (part + 1) % parts_;
          if (asked && s.flag[other] < epoch) return false;
        }
        break;
      case Act::kRead:
        wrong_ = wrong_ || s.written[place][protocol_.buffer(epoch)] != epoch;
        break;
      case Act::kWrite:
        s.written[part][protocol_.buffer(epoch + 1)] = epoch + 1;
        break;
      case Act::kPublish:
        s.flag[part] = epoch + 1;
        break;
    }
    ++s.move[part];
    return true;
  }

  const Protocol protocol_;
  const int parts_, epochs_;
  bool wrong_ = false;
};

// ---- within a cluster: each part has what it reads, and one barrier, in its own memory ------------------------------------

struct ClusterProtocol {
  bool publishes_after_writing = true;
  bool parity_of_epoch = true;  // else it waits for the other parity
  bool two_buffers = true;
  int missing = 0;  // arrivals that a phase does not ask for
};

struct ClusterState {
  std::array<int, kMostParts> move{}, arrived{}, phase{};  // the phase as the hardware has it: its parity
  std::array<std::array<std::array<int, kMostBuffers>, kMostParts>, kMostParts>
      written{};  // [reader][writer][buffer]: epoch
  auto operator<=>(const ClusterState&) const = default;
};

// As Model; writing to each part and arriving at each barrier are moves of their own. Epochs are 1 .. `epochs`: before it
// waits for one, a part has written it.
class ClusterModel {
 public:
  ClusterModel(const ClusterProtocol& protocol, int parts, int epochs)
      : protocol_(protocol), parts_(parts), epochs_(epochs) {}

  bool holds() {
    std::vector<ClusterState> open{ClusterState{}};
    std::set<ClusterState> seen{ClusterState{}};
    while (!open.empty()) {
      const ClusterState state = open.back();
      open.pop_back();
      bool moved = false, done = true;
      for (int part = 0; part < parts_; ++part) {
        ClusterState next = state;
        const bool finished = state.move[part] == epochs_ * (3 * parts_ + 1);
        done = done && finished;
        if (finished || !go_on(next, part)) continue;
        if (wrong_) return false;
        moved = true;
        if (seen.insert(next).second) open.push_back(next);
      }
      if (!moved && !done) return false;
    }
    states = seen.size();
    return true;
  }
  size_t states = 0;

 private:
  int buffer(int epoch) const { return protocol_.two_buffers ? exchange_buffer(epoch) : 0; }

  // Of an epoch: a write and an arrival for each part, a wait, a read of each part's value; false: it has to wait.
  bool go_on(ClusterState& s, int part) {
    const int epoch = 1 + s.move[part] / (3 * parts_ + 1), move = s.move[part] % (3 * parts_ + 1);
    const int peer = move % parts_;
    if (move < 2 * parts_) {
      if ((move < parts_) == protocol_.publishes_after_writing)
        s.written[peer][part][buffer(epoch)] = epoch;
      else if (++s.arrived[peer] >= parts_ - protocol_.missing)
        s.arrived[peer] = 0, s.phase[peer] ^= 1;
    } else if (move == 2 * parts_) {
      const int parity = (epoch - 1 + !protocol_.parity_of_epoch) % 2;
      if (s.phase[part] == parity) return false;
    } else {
      const int source = move - 2 * parts_ - 1;
      wrong_ = wrong_ || s.written[part][source][buffer(epoch)] != epoch;
    }
    ++s.move[part];
    return true;
  }

  const ClusterProtocol protocol_;
  const int parts_, epochs_;
  bool wrong_ = false;
};

void check_cluster_protocol() {
  for (int parts = 1; parts <= 3; ++parts) {
    const int epochs = parts < 3 ? 5 : 3;
    ClusterModel model(ClusterProtocol{}, parts, epochs);
    set_case("cluster of " + std::to_string(parts) + ", " + std::to_string(epochs) + " epochs");
    CHECK(model.holds());
    CHECK(parts == 1 || model.states > 100);
  }
  const auto holds = [](const ClusterProtocol& protocol) { return ClusterModel(protocol, 3, 3).holds(); };
  set_case("cluster: arrives before it writes");
  CHECK(!holds({.publishes_after_writing = false}));
  set_case("cluster: the other parity");
  CHECK(!holds({.parity_of_epoch = false}));
  set_case("cluster: one buffer");
  CHECK(!holds({.two_buffers = false}));
  set_case("cluster: an arrival too few");
  CHECK(!holds({.missing = 1}));
}

void check_protocol() {
  for (int parts = 1; parts <= kMostParts; ++parts) {
    const int epochs = parts < kMostParts ? 5 : 3;
    Model model(Protocol{}, parts, epochs);
    set_case(std::to_string(parts) + " parts, " + std::to_string(epochs) + " epochs");
    CHECK(model.holds());
    CHECK(parts == 1 || model.states > 100);
  }
}

// The model can find faults.
void check_wrong_protocols() {
  const auto holds = [](const Protocol& protocol) { return Model(protocol, 3, 4).holds(); };
  set_case("one buffer");
  CHECK(!holds({.buffers = 1}));
  set_case("waits for one neighbour");
  CHECK(!holds({.waits_for_all = false}));
  set_case("publishes before it writes");
  CHECK(!holds({.publishes_after_writing = false}));
  set_case("one buffer, written before it is read");
  CHECK(!holds({.buffers = 1, .reads_before_writing = false}));
  set_case("two buffers, written before the other is read");  // which they allow
  CHECK(holds({.reads_before_writing = false}));
}

}  // namespace
}  // namespace rnnfast::test

int main() {
  rnnfast::test::check_protocol();
  rnnfast::test::check_wrong_protocols();
  rnnfast::test::check_cluster_protocol();
  return rnnfast::test::finish();
}
