// All that the engine asks of CUDA's runtime, or of its emulator (RNNFAST_EMULATE): streams, launches, errors, devices.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/plan.h"

#ifdef RNNFAST_EMULATE
#include "cuda/emulate.h"
#else
#include <cuda_runtime.h>
#endif

#ifdef __CUDACC__
#define RNNFAST_UNROLL_ALL _Pragma("unroll")  // so that what is indexed stays in registers
#define RNNFAST_UNROLL_NONE _Pragma("unroll 1")
#else
#define RNNFAST_UNROLL_ALL
#define RNNFAST_UNROLL_NONE
#endif

namespace rnnfast::cuda_runtime {

// What 4 and 16 bytes are moved as, whatever they hold.
struct [[gnu::may_alias]] Word {
  uint32_t value;
};
struct [[gnu::may_alias]] alignas(16) Words {
  uint32_t word[4];
};

#ifdef RNNFAST_EMULATE

using Stream = void*;
constexpr bool kEmulated = true, kHasClusters = true;

template <class... P, class... A>
void launch_shared(void (*kernel)(P...), int64_t blocks, dim3 block, size_t bytes, Stream, const A&... arguments) {
  if (blocks > 0) emulator::run_grid(dim3(static_cast<unsigned>(blocks)), block, bytes, [&] { kernel(arguments...); });
}

// Memory shared by a block, of the size that launch_shared was given.
template <class V>
V* shared_memory() {
  return reinterpret_cast<V*>(emulator::dynamic_shared);
}
// The value of the thread whose number differs in the bits of `mask`, within a warp. All threads of the warp take part.
template <class V>
V exchange(V value, unsigned mask) {
  emulator::exchanged[threadIdx.x] = value;
  __syncwarp();
  const V result = V(emulator::exchanged[threadIdx.x ^ mask]);
  __syncwarp();
  return result;
}

// Blocks that are all there at once, so that they may wait for each other.
template <class... P, class... A>
void launch_together(void (*kernel)(P...), int64_t blocks, dim3 block, size_t bytes, Stream, const A&... arguments) {
  emulator::run_grid(dim3(static_cast<unsigned>(blocks)), block, bytes, [&] { kernel(arguments...); }, blocks);
}
// Blocks in clusters, whose shared memory each of them can reach; the blocks of a cluster are there at once.
template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), int64_t blocks, int cluster, dim3 block, size_t bytes, Stream,
                     const A&... arguments) {
  emulator::run_grid(dim3(static_cast<unsigned>(blocks)), block, bytes, [&] { kernel(arguments...); }, cluster);
}
// How many clusters of blocks with so much shared memory the device holds at once.
template <class Kernel>
int64_t resident_clusters(Kernel, int cluster, int, size_t) {
  return emulator::emulation().multiprocessors / cluster;
}
// How many blocks of a kernel the device holds at once.
template <class Kernel>
int64_t resident_blocks(Kernel, int, size_t) {
  return emulator::emulation().multiprocessors;
}
inline void clear(void* memory, size_t bytes, Stream) { memset(memory, 0, bytes); }
inline void copy(void* to, const void* from, size_t bytes, Stream) { memcpy(to, from, bytes); }

// All threads of a block wait until each of the flags is at least `epoch`: what was written before they were set is there.
inline void await(const uint32_t* flags, int count, uint32_t epoch) {
  for (bool ready = false; !ready;) {
    __syncthreads();  // until the next one no other block runs: all threads see the same
    ready = true;
    for (int i = 0; i < count; ++i) ready = ready && flags[i] >= epoch;
    emulator::emulation().waits_in_vain = !ready;
  }
}
// After all that the threads of this block have written.
inline void publish(uint32_t* flag, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x == 0) *flag = epoch;
}
inline void prefetch(const void*) {}

// ---- within a cluster ----
// The shared memory of another block of it, where this one has `p`.
template <class V>
V* in_peer(V* p, int block) {
  const ptrdiff_t offset = reinterpret_cast<const char*>(p) - reinterpret_cast<const char*>(emulator::dynamic_shared);
  return reinterpret_cast<V*>(reinterpret_cast<char*>(emulator::shared_of_peer(block)) + offset);
}
// An mbarrier: its phase ends when so many arrivals have come.
struct ClusterBarrier {
  uint16_t count, arrived;
  uint32_t phase;
};
inline void init_barrier(ClusterBarrier* barrier, int count) { *barrier = {static_cast<uint16_t>(count), 0, 0}; }
inline void arrive_in_peer(ClusterBarrier* own, int block) {
  ClusterBarrier* const barrier = in_peer(own, block);
  if (++barrier->arrived == barrier->count) ++barrier->phase, barrier->arrived = 0;
}
// All threads of a block wait for the end of the phase of that parity, 0 or 1: what was written before the arrivals is there.
inline void await_phase(const ClusterBarrier* barrier, uint32_t parity) {
  for (bool ready = false; !ready;) {
    __syncthreads();
    ready = barrier->phase % 2 != parity;
    emulator::emulation().waits_in_vain = !ready;
  }
}
// All threads of all blocks of a cluster.
inline void sync_cluster() { emulator::sync_together(); }
// Of memory that other blocks write during the launch.
template <class V>
V load_shared_by_blocks(const V* p) {
  return *p;
}

inline DeviceLimits device_limits() {
  return {emulator::emulation().multiprocessors, kH200.shared_bytes, emulator::emulation().cluster};
}
inline int device_count() { return 0; }
inline std::string device_description() { return "none: the kernels are emulated on the CPU"; }

#else

using Stream = cudaStream_t;
constexpr bool kEmulated = false;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Of the current device.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&value, which, device), "an attribute of the device was refused");
  return value;
}

#ifdef __CUDACC__
// As much shared memory as a block can have, whatever a launch asks for: other threads may launch the kernel too.
template <class Kernel>
bool allow_shared_memory(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) == cudaSuccess;
}
// Grids are one-dimensional: 2^31 - 1 blocks, where the other dimensions end at 65,535.
template <class... P, class... A>
void launch_shared(void (*kernel)(P...), int64_t blocks, dim3 block, size_t bytes, Stream stream,
                   const A&... arguments) {
  if (blocks <= 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: expected at most 2147483647 blocks in a launch");
  constexpr size_t kAlwaysThere = 48 << 10;
  if (bytes > kAlwaysThere && !allow_shared_memory(kernel))
    check(cudaGetLastError(), "a kernel was refused its shared memory");
  kernel<<<dim3(static_cast<unsigned>(blocks)), block, bytes, stream>>>(P(arguments)...);
  check(cudaGetLastError(), "a kernel was not launched");
}

// Blocks that are all there at once, so that they may wait for each other; an error where the device cannot hold them.
template <class... P, class... A>
void launch_together(void (*kernel)(P...), int64_t blocks, dim3 block, size_t bytes, Stream stream,
                     const A&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = block;
  config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &together, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, P(arguments)...), "a cooperative kernel was not launched");
}
// How many blocks of a kernel the device holds at once; 0 where it refuses the shared memory.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int threads, size_t bytes) {
  int blocks = 0;
  if (!allow_shared_memory(kernel) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes) != cudaSuccess) {
    cudaGetLastError();  // forget it
    return 0;
  }
  return int64_t{blocks} * attribute(cudaDevAttrMultiProcessorCount);
}

// A launch of blocks in clusters, but for its stream. Whoever has it keeps it where it is: it points into itself.
struct ClusterLaunch {
  cudaLaunchAttribute clusters{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int64_t blocks, int cluster, dim3 block, size_t bytes) {
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = static_cast<unsigned>(cluster);
    clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
    config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = block, config.dynamicSmemBytes = bytes;
    config.attrs = &clusters, config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
  ClusterLaunch& operator=(const ClusterLaunch&) = delete;
};
// Blocks in clusters, whose shared memory each of them can reach; the blocks of a cluster are there at once.
template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), int64_t blocks, int cluster, dim3 block, size_t bytes, Stream stream,
                     const A&... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: expected at most 2147483647 blocks in a launch");
  ClusterLaunch launch(blocks, cluster, block, bytes);
  launch.config.stream = stream;
  check(cudaLaunchKernelEx(&launch.config, kernel, P(arguments)...), "a kernel of clusters was not launched");
}
// How many clusters of blocks with so much shared memory the device holds at once; 0 where it refuses them. It takes its time
// to say so: it is asked once for each kernel.
template <class Kernel>
int64_t resident_clusters(Kernel kernel, int cluster, int threads, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int>, int> known;
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "no current device");
  const std::scoped_lock lock(mutex);
  const auto found = known.find({kernel, device, cluster});
  if (found != known.end()) return found->second;
  const ClusterLaunch launch(cluster, cluster, dim3(static_cast<unsigned>(threads)), bytes);
  if (!allow_shared_memory(kernel) ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // forget it
    count = 0;
  }
  return known[{kernel, device, cluster}] = count;
}
inline void clear(void* memory, size_t bytes, Stream stream) {
  check(cudaMemsetAsync(memory, 0, bytes, stream), "memory was not cleared");
}
inline void copy(void* to, const void* from, size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "memory was not copied");
}

// All threads of a block wait until each of the flags is at least `epoch`: what was written before they were set is there.
// (Acquired by the threads that look, and handed to the others by the barrier.)
__device__ inline void await(const uint32_t* flags, int count, uint32_t epoch) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    uint32_t value;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flags + i) : "memory");
    while (value < epoch);
  }
  __syncthreads();
}
// After all that the threads of this block have written: the barrier hands it to the thread that releases it.
__device__ inline void publish(uint32_t* flag, uint32_t epoch) {
  __syncthreads();
  if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
// Of memory that other blocks write during the launch: from L2, past this multiprocessor's own cache.
template <class V>
__device__ V load_shared_by_blocks(const V* p) {
  return __ldcg(p);
}
template <>
__device__ inline Words load_shared_by_blocks(const Words* p) {
  const uint4 words = __ldcg(reinterpret_cast<const uint4*>(p));
  return {{words.x, words.y, words.z, words.w}};
}

// ---- within a cluster: nothing of it is there before sm_90 ----
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
struct ClusterBarrier {
  uint64_t state;  // an mbarrier
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// The shared memory of another block of it, where this one has `p`.
template <class V>
__device__ V* in_peer(V* p, int block) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(block));
  return reinterpret_cast<V*>(address);
}
// An mbarrier: its phase ends when so many arrivals have come. The caller's next sync_cluster() lets the others see it.
__device__ inline void init_barrier(ClusterBarrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// After all that this thread has written, or been handed by a barrier of its block.
__device__ inline void arrive_in_peer(ClusterBarrier* own, int block) {
  asm volatile(
      "{ .reg .b32 peer; mapa.shared::cluster.u32 peer, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [peer]; }" ::"r"(shared_address(own)),
      "r"(block)
      : "memory");
}
// All threads of a block wait for the end of the phase of that parity, 0 or 1: what was written before the arrivals is there.
__device__ inline void await_phase(const ClusterBarrier* barrier, uint32_t parity) {
  const unsigned address = shared_address(barrier);
  uint32_t ready;
  do
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2; "
        "selp.u32 %0, 1, 0, done; }"
        : "=r"(ready)
        : "r"(address), "r"(parity)
        : "memory");
  while (!ready);
  __syncthreads();  // so that none is ahead by more than one phase, and the caller may write what all have read
}
// All threads of all blocks of a cluster.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
#else
template <class V>
__device__ V* in_peer(V* p, int) {
  return p;
}
__device__ inline void init_barrier(ClusterBarrier*, int) {}
__device__ inline void arrive_in_peer(ClusterBarrier*, int) {}
__device__ inline void await_phase(const ClusterBarrier*, uint32_t) {}
__device__ inline void sync_cluster() {}
#endif

// Memory shared by a block, of the size that launch_shared was given.
template <class V>
__device__ V* shared_memory() {
  extern __shared__ Words rnnfast_dynamic_shared[];
  return reinterpret_cast<V*>(rnnfast_dynamic_shared);
}
// The value of the thread whose number differs in the bits of `mask`, within a warp. All threads of the warp take part.
template <class V>
__device__ V exchange(V value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
#endif

// Of the current device.
inline DeviceLimits device_limits() {
  constexpr int kMostBlocks = 16;  // of a cluster: 8 are always possible, 16 where the device says so
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          attribute(cudaDevAttrClusterLaunch) ? kMostBlocks : 0};
}

// 0 where there is no driver or no device: neither is an error.
inline int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // forget it
  return 0;
}

inline std::string device_description() {
  const auto version = [](int n) { return std::to_string(n / 1000) + "." + std::to_string(n % 1000 / 10); };
  int count = 0, driver = 0, device = 0;
  check(cudaDriverGetVersion(&driver), "no version of the driver");
  if (driver == 0) return "none: there is no NVIDIA driver";
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string("none: ") + cudaGetErrorString(status) + " (the driver is for CUDA " + version(driver) +
           ", rnnfast was built with " + version(CUDART_VERSION) + ")";
  }
  if (count == 0) return "none";
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "no current device");
  check(cudaGetDeviceProperties(&properties, device), "no properties of the device");
  return std::string(properties.name) + ", sm_" + std::to_string(properties.major) + std::to_string(properties.minor) +
         ", " + std::to_string(properties.multiProcessorCount) + " multiprocessors, " +
         std::to_string(properties.totalGlobalMem >> 20) + " MB, driver for CUDA " + version(driver);
}

#endif

#if defined(RNNFAST_EMULATE) || defined(__CUDACC__)
template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, dim3 block, Stream stream, const A&... arguments) {
  launch_shared(kernel, blocks, block, 0, stream, arguments...);
}
#endif

}  // namespace rnnfast::cuda_runtime
