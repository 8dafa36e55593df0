// Matrix products through shared memory by blocks of 16 x 16 threads: those of one step, and those over all steps. Every sum
// has one order, whatever the shape of the rest.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/item.h"
#include "cuda/mma.cuh"

RNNFAST_BEGIN

constexpr int kTile = 16;  // threads along each side of a block, and the depth of a shared tile
constexpr int kThreads = kTile * kTile;

// The places of an operand with k from k0 on, from value(line, k); zero from `end` on. `kAlongK`: neighbouring k lie together
// in memory, else neighbouring lines (rows or columns) do. Thread (x, y) of a block has kLines / 16 of them.
template <bool kAlongK, int kLines, class A, int kRow, class Value>
__device__ void fill_tile(A (&tile)[kTile][kRow], int64_t k0, int64_t end, const Value& value) {
  const int x = threadIdx.x, y = threadIdx.y, k = kAlongK ? x : y;
  const bool inside = k0 + k < end;
  for (int m = 0; m < kLines / kTile; ++m) {
    const int line = (kAlongK ? y : x) + kTile * m;
    tile[k][line] = inside ? value(line, k0 + k) : A(0);
  }
}

// What is multiplied: float32 as it is, or rounded to TF32 where that was asked for.
template <class A>
RNNFAST_FN A operand(A value, bool tf32) {
  if constexpr (sizeof(A) == sizeof(float)) return tf32 ? rounded_to_tf32(value) : value;
  return value;
}

// sum[g][m][n] += over k in [begin, end) of left(row, k) * right(g, k, column), for this thread's rows y + 16 m and columns
// x + 16 n of the tile. Operands give zero outside their matrix. To be called by all threads of a block. The sums of a shared
// tile are made apart and then added: over thousands of k that loses a tenth of the digits that one long sum would.
template <bool kLeftAlongK, bool kRightAlongK, class A, int G, int RM, int RN, class Left, class Right>
__device__ void multiply(A (&sum)[G][RM][RN], int64_t begin, int64_t end, bool tf32, const Left& left,
                         const Right& right) {
  __shared__ A a[kTile][kTile * RM + 1];
  __shared__ A b[G][kTile][kTile * RN + 1];
  const int x = threadIdx.x, y = threadIdx.y;
  for (int64_t k0 = begin; k0 < end; k0 += kTile) {
    fill_tile<kLeftAlongK, kTile * RM>(a, k0, end, [&](int row, int64_t k) { return operand(left(row, k), tf32); });
    for (int g = 0; g < G; ++g)
      fill_tile<kRightAlongK, kTile * RN>(b[g], k0, end,
                                          [&](int column, int64_t k) { return operand(right(g, k, column), tf32); });
    __syncthreads();
    A part[G][RM][RN] = {};
    for (int k = 0; k < kTile; ++k)
      for (int g = 0; g < G; ++g)
        for (int m = 0; m < RM; ++m)
          for (int n = 0; n < RN; ++n) part[g][m][n] = fma(a[k][y + kTile * m], b[g][k][x + kTile * n], part[g][m][n]);
    for (int g = 0; g < G; ++g)
      for (int m = 0; m < RM; ++m)
        for (int n = 0; n < RN; ++n) sum[g][m][n] = sum[g][m][n] + part[g][m][n];
    __syncthreads();
  }
}

// ---- large products: target(row, column, part, value) of left(row, k) * right(k, column), k cut into parts --------
//
// An operand is a matrix of lines (rows of the left one, columns of the right one) by depth k. It lies in memory as runs:
//
//   Raw                 the type of what lies there
//   kAlongK             a run is a line, and its values go along k; else a run is a depth, and its values go along the lines
//   kOnes, width()      lines from `width` on are not in memory: ones
//   period()            runs are numbered high * period + low, and
//   run(high, low)      says where one lies: all divisions and lengths belong here, not to its values
//
// A slab of some depths is asked for while the one before it is multiplied: loads have no branch of their own and go to
// addresses that are there in any case; what lies outside is zero when it comes to shared memory.

// Values that lie `stride` apart; if they are not `there` they are zero, but may be read.
template <class Raw>
struct Run {
  const Raw* data;
  int64_t stride;
  bool there;

  RNNFAST_FN const Raw* at(int64_t i) const { return data + i * stride; }
};

// A number as high * period + low, which grows by fixed steps without another division.
struct Cut {
  int64_t high, low;

  RNNFAST_FN Cut(int64_t number, int64_t period) : high(number / period), low(number % period) {}
  RNNFAST_FN void advance(const Cut& step, int64_t period) {
    high += step.high, low += step.low;
    if (low >= period) low -= period, ++high;
  }
};

// Values that are loaded and stored at once.
template <class V, int kCount>
struct alignas(kCount * sizeof(V) < 16 ? kCount * sizeof(V) : 16) Chunk {
  V value[kCount];

  RNNFAST_FN void load(const V* from) { *this = *reinterpret_cast<const Chunk*>(from); }
  RNNFAST_FN void store(V* to) const { *reinterpret_cast<Chunk*>(to) = *this; }
};

struct ProductSize {
  int64_t rows, columns, depth, parts;

  static constexpr int kSide = 64;  // of a block's tile
  RNNFAST_FN int64_t column_tiles() const { return (columns + kSide - 1) / kSide; }
  RNNFAST_FN int64_t tiles() const { return (rows + kSide - 1) / kSide * column_tiles(); }
};

// What a thread brings of each slab of an operand: a chunk of one run.
template <class Operand, int kDepth>
class Feed {
 public:
  using Raw = typename Operand::Raw;
  static constexpr int kSide = ProductSize::kSide, kCount = kSide * kDepth / kThreads;
  static constexpr bool kAlongK = Operand::kAlongK;
  static constexpr int kChunks = (kAlongK ? kDepth : kSide) / kCount;  // of a run
  static constexpr bool kPacked = sizeof(Raw) < 4;
  using Words =
      std::conditional_t<kPacked, Chunk<cuda_runtime::Word, kCount* int(sizeof(Raw)) / 4>, Chunk<Raw, kCount>>;
  const int place, first;  // within the tile: which run, and the first value of it

  // The lines [line0, lines), the depths [begin, end).
  RNNFAST_FN Feed(const Operand& operand, int64_t line0, int64_t lines, int64_t begin, int64_t end)
      : place(thread() / kChunks),
        first(thread() % kChunks * kCount),
        operand_(operand),
        line0_(line0),
        end_(end),
        last_(kAlongK ? end - 1 : last_line(operand, lines)),
        cut_(clamped(kAlongK ? line0 + place : begin + place, kAlongK ? lines : end), operand.period()),
        step_(kDepth, operand.period()),
        run_(operand.run(cut_.high, cut_.low)) {}

  // Asks for the slab from k0 on; slabs come one after another.
  RNNFAST_FN void ask(int64_t k0) {
    if constexpr (!kAlongK) {
      run_ = operand_.run(cut_.high, cut_.low);
      there_ = run_.there && k0 + place < end_;
      if (k0 + place + kDepth < end_) cut_.advance(step_, operand_.period());
    } else {
      there_ = run_.there;
    }
    const int64_t i = (kAlongK ? k0 : line0_) + first;
    const Raw* const from = run_.at(i);
    together_ = i + kCount - 1 <= last_ && run_.at(i + kCount - 1) == from + (kCount - 1) &&
                reinterpret_cast<uintptr_t>(from) % alignof(Words) == 0;
    if (together_) {
      if constexpr (kPacked)
        words_ = *reinterpret_cast<const Words*>(from);
      else
        raw_.load(from);
    } else {
      RNNFAST_UNROLL_ALL
      for (int j = 0; j < kCount; ++j) raw_.value[j] = *run_.at(i + j < last_ ? i + j : last_);
    }
    if constexpr (kAlongK) beyond_ = static_cast<int>(end_ - i < kCount ? end_ - i : kCount);
  }

  // What came of it: value(raw) of each, zero outside.
  template <class V, class Value>
  RNNFAST_FN Chunk<V, kCount> take(V zero, const Value& value) const {
    Chunk<Raw, kCount> raw = raw_;
    if constexpr (kPacked)
      if (together_) raw = __builtin_bit_cast(Chunk<Raw, kCount>, words_);
    Chunk<V, kCount> chunk;
    RNNFAST_UNROLL_ALL
    for (int j = 0; j < kCount; ++j) {
      const bool inside = there_ && (!kAlongK || j < beyond_);
      chunk.value[j] = inside ? value(raw.value[j]) : zero;
      if constexpr (Operand::kOnes) chunk.value[j] = line0_ + first + j > last_ ? V(1) : chunk.value[j];
    }
    return chunk;
  }
  // As it came, if all of it is inside and came together.
  RNNFAST_FN bool store_whole(Raw* to) const {
    if (there_ && together_) *reinterpret_cast<Words*>(to) = words_;
    return there_ && together_;
  }

 private:
  static RNNFAST_FN int thread() { return static_cast<int>(threadIdx.y) * kTile + static_cast<int>(threadIdx.x); }
  static RNNFAST_FN int64_t clamped(int64_t number, int64_t end) { return number < end ? number : end - 1; }
  static RNNFAST_FN int64_t last_line(const Operand& operand, int64_t lines) {
    if constexpr (Operand::kOnes) return operand.width() - 1;
    return lines - 1;
  }

  const Operand& operand_;
  const int64_t line0_, end_, last_;  // the last value of a run that is in memory, or of this part
  Cut cut_;
  const Cut step_;
  decltype(std::declval<const Operand&>().run(0, 0)) run_;
  bool there_ = false, together_ = false;
  int beyond_ = 0;  // values of the chunk before the end of the depth
  // Of 16 bits one of them: unpacked where it was loaded, it would be waited for there.
  [[maybe_unused]] Words words_;
  Chunk<Raw, kCount> raw_;
};

// A block's tile of one part.
struct ProductTile {
  const ProductSize& size;
  const int64_t tile = blockIdx.x % size.tiles(), part = blockIdx.x / size.tiles();
  const int64_t row0 = tile / size.column_tiles() * ProductSize::kSide;
  const int64_t column0 = tile % size.column_tiles() * ProductSize::kSide;

  RNNFAST_FN int64_t begin() const { return size.depth * part / size.parts; }
  RNNFAST_FN int64_t end() const { return size.depth * (part + 1) / size.parts; }
  template <class Target, class A>
  RNNFAST_FN void store(const Target& target, int row, int column, A value) const {
    if (row0 + row < size.rows && column0 + column < size.columns) target(row0 + row, column0 + column, part, value);
  }

  // put(left, right, buffer) of each slab into one of two buffers, multiply(buffer); to be called by all threads.
  template <int kDepth, class Left, class Right, class Put, class Multiply>
  __device__ void in_slabs(const Left& left, const Right& right, const Put& put, const Multiply& multiply) const {
    if (begin() >= end()) return;
    Feed<Left, kDepth> rows(left, row0, size.rows, begin(), end());
    Feed<Right, kDepth> columns(right, column0, size.columns, begin(), end());
    rows.ask(begin()), columns.ask(begin());
    put(rows, columns, 0);
    int buffer = 0;
    for (int64_t k = begin(), last = end(); k < last; k += kDepth, buffer ^= 1) {
      __syncthreads();  // this buffer is full, and the other one has been read
      const bool more = k + kDepth < last;
      if (more) rows.ask(k + kDepth), columns.ask(k + kDepth);
      multiply(buffer);
      if (more) put(rows, columns, buffer ^ 1);
    }
  }
};

// A slab as [k][line].
template <class A, int kRow, class F>
__device__ void fill_slab(A (&to)[kTile][kRow], const F& feed) {
  const auto chunk = feed.take(A(0), [](typename F::Raw raw) { return A(read(raw)); });
  if constexpr (F::kAlongK)
    for (int j = 0; j < F::kCount; ++j) to[feed.first + j][feed.place] = chunk.value[j];
  else
    chunk.store(&to[feed.place][feed.first]);
}

// On FMA cores; a thread has 4 x 4 neighbouring sums. Those of a slab are made apart and then added: over thousands of k that
// loses a tenth of the digits that one long sum would.
template <class A, class Left, class Right, class Target>
__global__ void __launch_bounds__(kThreads, sizeof(A) > sizeof(float) ? 1 : 2)
    product_kernel(ProductSize size, Left left, Right right, Target target) {
  constexpr int R = ProductSize::kSide / kTile, kRow = ProductSize::kSide + int(16 / sizeof(A));
  alignas(16) __shared__ A a[2][kTile][kRow];
  alignas(16) __shared__ A b[2][kTile][kRow];
  const ProductTile tile{size};
  const int x = threadIdx.x, y = threadIdx.y;
  A sum[R][R] = {};
  tile.in_slabs<kTile>(
      left, right,
      [&](const auto& rows, const auto& columns, int n) { fill_slab(a[n], rows), fill_slab(b[n], columns); },
      [&](int n) {
        A part[R][R] = {};
        RNNFAST_UNROLL_ALL
        for (int k = 0; k < kTile; ++k) {
          Chunk<A, R> rows, columns;
          rows.load(&a[n][k][R * y]), columns.load(&b[n][k][R * x]);
          RNNFAST_UNROLL_ALL
          for (int i = 0; i < R; ++i) RNNFAST_UNROLL_ALL
          for (int j = 0; j < R; ++j) part[i][j] = fma(rows.value[i], columns.value[j], part[i][j]);
        }
        RNNFAST_UNROLL_ALL
        for (int i = 0; i < R; ++i) RNNFAST_UNROLL_ALL
        for (int j = 0; j < R; ++j) sum[i][j] = sum[i][j] + part[i][j];
      });
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < R; ++j) tile.store(target, R * y + i, R * x + j, sum[i][j]);
}

// What is in shared memory for tensor cores, of an operand: [run][value], in rows so long that the elements of a fragment lie
// in different banks. Operands of 16 bits along k are multiplied as they are (m16n8k16), others as TF32 (m16n8k8).
template <class Left, class Right>
struct Fragments {
  static constexpr bool kRaw = std::is_same_v<typename Left::Raw, typename Right::Raw> && Left::kAlongK &&
                               Right::kAlongK && sizeof(typename Left::Raw) == 2;
  static constexpr int kDepth = kRaw ? 2 * kTile : kTile;
  using Element = std::conditional_t<kRaw, typename Left::Raw, float>;

  template <class Operand>
  struct Tile {
    static constexpr int kSide = ProductSize::kSide;
    static constexpr int kRow = Operand::kAlongK ? kDepth + (kRaw ? 8 : 4) : kSide + 8;
    Element value[Operand::kAlongK ? kSide : kDepth][kRow];

    __device__ const Element& at(int line, int k) const { return Operand::kAlongK ? value[line][k] : value[k][line]; }
    template <class F>
    __device__ void fill(const F& feed) {
      Element* const to = &value[feed.place][feed.first];
      if constexpr (!kRaw)
        feed.take(0.0f, [](auto raw) { return sizeof(raw) < 4 ? read(raw) : rounded_to_tf32(read(raw)); }).store(to);
      else if (!feed.store_whole(to))
        feed.take(Element{0}, [](auto raw) { return raw; }).store(to);
    }
  };

  // part[n] += the product of 16 rows and 8 columns of each n, over the 16 depths from k on.
  template <int kColumnTiles>
  static __device__ void multiply(float (&part)[kColumnTiles][4], const Tile<Left>& a, const Tile<Right>& b, int row0,
                                  int column0, int k, int lane) {
    const auto word = [](const Element& e) { return reinterpret_cast<const cuda_runtime::Word*>(&e)->value; };
    uint32_t left[4], right[2];
    if constexpr (kRaw) {
      RNNFAST_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {  // two neighbouring depths, which lie together
        const FragmentPlace place = fragment_a(lane, 2 * i);
        left[i] = word(a.at(row0 + place.row, k + place.column));
      }
      RNNFAST_UNROLL_ALL
      for (int n = 0; n < kColumnTiles; ++n) {
        RNNFAST_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          const FragmentPlace place = fragment_b(lane, 2 * i);
          right[i] = word(b.at(column0 + 8 * n + place.column, k + place.row));
        }
        multiply_fragments<Element>(part[n], left, right);
      }
    } else {
      RNNFAST_UNROLL_ALL
      for (int half = 0; half < kTile; half += kTf32Tile.depth) {
        RNNFAST_UNROLL_ALL
        for (int i = 0; i < 4; ++i) {
          const FragmentPlace place = tf32_fragment_a(lane, i);
          left[i] = word(a.at(row0 + place.row, k + half + place.column));
        }
        RNNFAST_UNROLL_ALL
        for (int n = 0; n < kColumnTiles; ++n) {
          RNNFAST_UNROLL_ALL
          for (int i = 0; i < 2; ++i) {
            const FragmentPlace place = tf32_fragment_b(lane, i);
            right[i] = word(b.at(column0 + 8 * n + place.column, k + half + place.row));
          }
          multiply_tf32(part[n], left, right);
        }
      }
    }
  }
};

// On tensor cores: a warp has 16 rows and 32 columns. As above, the sums of 16 depths are made apart.
template <class Left, class Right, class Target>
__global__ void __launch_bounds__(kThreads, 2)
    tensor_product_kernel(ProductSize size, Left left, Right right, Target target) {
  using F = Fragments<Left, Right>;
  constexpr int kColumnTiles = 4;  // of a warp, of 8 columns each
  alignas(16) __shared__ typename F::template Tile<Left> a[2];
  alignas(16) __shared__ typename F::template Tile<Right> b[2];
  const ProductTile tile{size};
  const int thread = threadIdx.y * kTile + threadIdx.x, lane = thread % int(kWarp), warp = thread / int(kWarp);
  const int row0 = warp % 4 * 16, column0 = warp / 4 * 8 * kColumnTiles;
  float sum[kColumnTiles][4] = {};
  tile.in_slabs<F::kDepth>(
      left, right, [&](const auto& rows, const auto& columns, int n) { a[n].fill(rows), b[n].fill(columns); },
      [&](int n) {
        RNNFAST_UNROLL_ALL
        for (int k = 0; k < F::kDepth; k += kTile) {
          float part[kColumnTiles][4] = {};
          F::multiply(part, a[n], b[n], row0, column0, k, lane);
          RNNFAST_UNROLL_ALL
          for (int c = 0; c < kColumnTiles; ++c) RNNFAST_UNROLL_ALL
          for (int i = 0; i < 4; ++i) sum[c][i] = sum[c][i] + part[c][i];
        }
      });
  RNNFAST_UNROLL_ALL
  for (int n = 0; n < kColumnTiles; ++n) RNNFAST_UNROLL_ALL
  for (int i = 0; i < 4; ++i) {
    const FragmentPlace place = fragment_c(lane, i);
    tile.store(target, row0 + place.row, column0 + 8 * n + place.column, sum[n][i]);
  }
}

// Products of arrays of T. Those of 16 bits are on tensor cores, always: x, h and weights are TF32 numbers as they are, and
// rounding takes at most 2^-11 of a gate gradient, as much as storing it in float16 would. Those of float32 are where they
// are to be TF32.
template <class T, class Left, class Right, class Target>
void launch_product(ProductSize size, bool tf32, const Left& left, const Right& right, const Target& target,
                    cuda_runtime::Stream stream) {
  const int64_t blocks = size.tiles() * size.parts;
  const dim3 threads(kTile, kTile);
  const auto launch = [&](auto kernel) {
    cuda_runtime::launch(kernel, blocks, threads, stream, size, left, right, target);
  };
  if constexpr (sizeof(T) < sizeof(float))
    return launch(tensor_product_kernel<Left, Right, Target>);
  else if constexpr (sizeof(T) == sizeof(float))
    if (tf32) return launch(tensor_product_kernel<Left, Right, Target>);
  if constexpr (sizeof(T) >= sizeof(float)) launch(product_kernel<T, Left, Right, Target>);
}

// A step's tile: which 16 sequences and 16 units, of which direction, this block has.
struct StepTile {
  int direction;
  int64_t batch0, unit0;

  RNNFAST_FN StepTile(int64_t block, int64_t batch, int64_t units) {
    const int64_t across = (units + kTile - 1) / kTile, tiles = count(batch, units);
    direction = static_cast<int>(block / tiles);
    batch0 = block % tiles / across * kTile;
    unit0 = block % tiles % across * kTile;
  }
  static RNNFAST_FN int64_t count(int64_t batch, int64_t units) {
    return (batch + kTile - 1) / kTile * ((units + kTile - 1) / kTile);
  }
};

RNNFAST_END
