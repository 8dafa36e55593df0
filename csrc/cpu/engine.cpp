// One instruction set's engine for one element type: the build compiles this file once for each (RNNFAST_ISA,
// RNNFAST_REAL). Everything included here lives in the namespace of the instruction set.
//
// A call is one parallel region: pack the weights if asked to, then layer by layer all items (directions x batch slices),
// each run by its group of threads.
#include "core/registry.h"
#include "cpu/backward.h"
#include "cpu/dropout.h"
#include "cpu/pack.h"

RNNFAST_BEGIN

// Threads are dealt to the items of a layer: as many groups as there are items, or as there are threads.
struct Groups {
  int64_t groups;
  int64_t mine;  // -1: this thread has none
  Member member;

  Groups(Member team, int64_t items, Barrier* barriers, bool may_leave) {
    groups = least(items, team.size);
    const int64_t size = team.size / groups;
    mine = team.rank / size;
    if (mine >= groups) mine = -1;
    member = {team.rank % size, size, mine >= 0 ? barriers + mine : nullptr, team.waiting, may_leave};
  }
};

template <class T>
Scratch<T> scratch_of(const Network<T>& net, int64_t rank) {
  int64_t sequences = 0, rows = net.row_chunk;
  for (int64_t s = 0; s < net.slices; ++s) sequences = most(sequences, net.items[s].schedule.sequences);
  for (int64_t s = 0; s < net.slices; ++s) rows = most(rows, net.items[s].chunk * sequences);
  return Scratch<T>(net, rank, most(rows, sequences), sequences);
}

template <class T, class Cell>
void pack_all(const Network<T>& net, Member team) {
  for (int64_t i = 0; i < net.pack_count; ++i) {
    const Packer<T, Cell> packer(net.packs[i]);
    packer.run(share(packer.blocks(), team.rank, team.size));
  }
  if (net.pack_count) team.wait();
}

template <class T>
Worker worker_of(const Item<T>& item, Member group) {
  return Worker(group, Blocks<T>::count(item.H), Blocks<T>::count(item.P));
}

// One direction, one slice, one thread a layer; `before`: which layer it reads from, one less or one more.
template <class T>
Worker wavefront_worker(const Network<T>& net, int64_t layer, int64_t before, Member team) {
  constexpr int64_t kLine = 8;
  const bool first = before < 0 || before == net.layers;
  const Wavefront front{net.progress + layer * kLine, first ? nullptr : net.progress + before * kLine};
  const Item<T>& item = net.items[layer];
  return Worker({0, 1, nullptr, team.waiting, false}, Blocks<T>::count(item.H), Blocks<T>::count(item.P), front);
}

template <class T, class Cell>
void forward_wavefront(const Network<T>& net, Member team) {
  const Cell cell(net.parameters);
  Scratch<T> scratch = scratch_of(net, team.rank);
  for (int64_t layer = team.rank; layer < net.layers; layer += team.size)
    ForwardItem<T, Cell>(net.items[layer], cell, wavefront_worker(net, layer, layer - 1, team), scratch).run();
}

template <class T, class Cell>
void backward_wavefront(const Network<T>& net, Member team) {
  const Cell cell(net.parameters);
  Scratch<T> scratch = scratch_of(net, team.rank);
  for (int64_t layer = net.layers - 1 - team.rank; layer >= 0; layer -= team.size)
    BackwardItem<T, Cell>(net, layer, 0, 0, cell, wavefront_worker(net, layer, layer + 1, team), scratch).run();
}

template <class T, class Cell>
void forward_layers(const Network<T>& net, Member team, Barrier* barriers) {
  const Cell cell(net.parameters);
  Scratch<T> scratch = scratch_of(net, team.rank);
  const int64_t items = net.directions * net.slices;
  const Groups groups(team, items, barriers, true);
  for (int64_t layer = 0; layer < net.layers; ++layer) {
    if (groups.mine >= 0)
      for (int64_t i = groups.mine; i < items; i += groups.groups)
        ForwardItem<T, Cell>(net.items[layer * items + i], cell, worker_of(net.items[layer * items + i], groups.member),
                             scratch)
            .run();
    if (layer + 1 == net.layers) break;
    team.wait();
    if (!net.dropout) continue;
    mask_sequence(net.dropout[layer], net.steps, net.batch, net.items[layer * items].P * net.directions,
                  net.layer_output[layer], net.dropped[layer], team);
    team.wait();
  }
}

template <class T, class Cell>
void backward_layers(const Network<T>& net, Member team, Barrier* barriers) {
  const Cell cell(net.parameters);
  Scratch<T> scratch = scratch_of(net, team.rank);
  const int64_t items = net.directions * net.slices;
  const Groups groups(team, items, barriers, !net.input_turns);  // where two groups meet at dx, their sizes must agree
  for (int64_t layer = net.layers - 1; layer >= 0; --layer) {
    if (groups.mine >= 0)
      for (int64_t i = groups.mine; i < items; i += groups.groups)
        BackwardItem<T, Cell>(net, layer, i / net.slices, i % net.slices, cell,
                              worker_of(net.items[layer * items + i], groups.member), scratch)
            .run();
    team.wait();
    add_slices<T, Gates<Cell>>(net, layer, team);
    const Sequence<T>& grad_input = net.grad_input[layer];
    if (layer > 0 && net.dropout && grad_input.data)
      mask_sequence(net.dropout[layer - 1], net.steps, net.batch, items_of(net, layer, 0)->I, grad_input, grad_input,
                    team);
    team.wait();
  }
}

// Runs body(member, group barriers) on the network's threads; fewer if the runtime gives fewer. Tells how long a thread
// waited for the others, at most.
template <class T, class Body>
void run_team(const Network<T>& net, Body body) {
  constexpr int kMostGroups = 64;
  const int64_t start = now_ns();
  if (net.threads <= 1) {
    Waiting waiting{start, 0, net.patience};
    Barrier barriers[2];
    const FlushDenormals flush;
    return body(Member{0, 1, &barriers[0], &waiting, false}, &barriers[1]);
  }
  Barrier team, groups[kMostGroups];
  int64_t longest = 0;
#pragma omp parallel num_threads(static_cast<int>(least(net.threads, kMostGroups))) reduction(max : longest)
  {
    const FlushDenormals flush;
    Waiting waiting{start, 0, net.patience};
    const Member member{omp_get_thread_num(), omp_get_num_threads(), &team, &waiting, false};
    body(member, groups);
    member.wait();
    longest = waiting.waited;
  }
  if (net.waited) *net.waited = longest;
}

// What follows is this file's own: it is compiled for float and for double in one namespace.
namespace {

using Real = RNNFAST_REAL;

template <class Cell>
void forward(const Network<Real>& net) {
  run_team(net, [&](Member team, Barrier* barriers) {
    pack_all<Real, Gates<Cell>>(net, team);
    net.progress ? forward_wavefront<Real, Cell>(net, team) : forward_layers<Real, Cell>(net, team, barriers);
  });
}

template <class Cell>
void backward(const Network<Real>& net) {
  run_team(net, [&](Member team, Barrier* barriers) {
    pack_all<Real, Gates<Cell>>(net, team);
    net.progress ? backward_wavefront<Real, Cell>(net, team) : backward_layers<Real, Cell>(net, team, barriers);
  });
}

template <class Cell>
void pack(const Network<Real>& net) {
  run_team(net, [&](Member team, Barrier*) { pack_all<Real, Gates<Cell>>(net, team); });
}

using Entry = void (*)(const Network<Real>&);
#define RNNFAST_ROW(name, Type, parameters) \
  {forward<Type<Vec<Real>>>, backward<Type<Vec<Real>>>, pack<Type<Vec<Real>>>},
constexpr Entry kEntries[][3] = {RNNFAST_CELLS(RNNFAST_ROW)};
#undef RNNFAST_ROW

// Twelve independent chains of fused multiply-adds: the machine's peak, against which kernels are judged.
void fma_chains(int64_t iterations, Real* sink) {
  using V = Vec<Real>;
  V chain[12];
  for (int i = 0; i < 12; ++i) chain[i] = V(Real(i));
  const V a(Real(0.999)), b(Real(0.001));
  for (int64_t n = 0; n < iterations; ++n)
    RNNFAST_UNROLL
      for (int i = 0; i < 12; ++i) chain[i] = fma(chain[i], a, b);
  for (int i = 1; i < 12; ++i) chain[0] = chain[0] + chain[i];
  chain[0].store(sink);
}

// Seconds for so many barriers of `threads` threads that have nothing to do between them.
double barrier_seconds(int64_t barriers, int threads) {
  Barrier barrier;
  double longest = 0;
#pragma omp parallel num_threads(threads) reduction(max : longest)
  {
    Waiting waiting{now_ns(), 0, INT64_MAX};
    const int32_t members = omp_get_num_threads();
    const double start = omp_get_wtime();
    for (int64_t n = 0; n < barriers && members > 1; ++n) barrier.wait(members, omp_get_thread_num(), waiting, false);
    longest = omp_get_wtime() - start;
  }
  return longest;
}

// Seconds for `iterations` rounds of 12 * lanes * 2 operations on each of `threads` threads.
double fma_seconds(int64_t iterations, int threads) {
  double longest = 0;
#pragma omp parallel num_threads(threads) reduction(max : longest)
  {
    Real sink[64];
    fma_chains(1000, sink);
#pragma omp barrier
    const double start = omp_get_wtime();
    fma_chains(iterations, sink);
    longest = omp_get_wtime() - start;
    if (sink[0] == Real(-1)) longest = 0;  // keeps the sums alive
  }
  return longest;
}

}  // namespace

#define RNNFAST_JOIN2(a, b) a##_##b
#define RNNFAST_JOIN(a, b) RNNFAST_JOIN2(a, b)
extern const Engine<Real> RNNFAST_JOIN(engine, RNNFAST_REAL);
const Engine<Real> RNNFAST_JOIN(engine, RNNFAST_REAL) = {
    Vec<Real>::kLanes,
    [](int cell, const Network<Real>& net) { kEntries[cell][0](net); },
    [](int cell, const Network<Real>& net) { kEntries[cell][1](net); },
    [](int cell, const Network<Real>& net) { kEntries[cell][2](net); },
    barrier_seconds,
    fma_seconds,
};

RNNFAST_END
