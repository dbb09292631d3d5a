// Routing on a GPU: the kernels and the order in which they are launched. `launch(name, kernel,
// grid, block, arguments...)` is given from outside: routing.cu launches on a stream, tests/simt on
// the host, one thread after the other.
//
// A stable counting sort. Rows are taken in chunks, one thread block each, and chunks in tiles of
// one row per thread; a bin is a group, or the base rows, which come last:
//
//     count_rows   counts[chunk][bin] = rows of the bin in the chunk
//     scan_chunks  counts[chunk][bin] = rows of the bin in earlier chunks; totals[bin]
//     scan_bins    offsets and first_blocks: the bins' rows and blocks, summed up
//     place_rows   order[offsets[bin] + rows of the bin before this one] = row
//     cut_blocks   the block table, one thread per entry
//
// No atomics: the same bits every time. Memory: 4 * rows + 3 * bins + 2 counters at most, beside
// one chunk's.
#pragma once

#include <cstdint>

namespace fastfusion::cuda {

constexpr int kThreads = 256;       // of a thread block, and rows of a tile
constexpr int kScanThreads = 1024;  // of the one thread block that scans the bins
constexpr int kMinChunkRows = 1024;
constexpr int kLoads = 8;  // that scan_chunks has in flight

template <typename T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whatever the id is, a bin that exists.
template <typename Id>
__device__ int bin_of(Id id, int groups) {
  if (id < 0) return groups;
  return id < groups ? static_cast<int>(id) : larger(groups - 1, 0);
}

// Where a thread's row stands among the tile's rows of its bin.
struct Rank {
  int before, count;
};

__device__ inline Rank rank_in(const int* tile, int bin) {
  Rank rank{0, 0};
#pragma unroll 16
  for (int i = 0; i < kThreads; ++i) {
    const int same = tile[i] == bin;
    rank.count += same;
    rank.before += same & (i < static_cast<int>(threadIdx.x));
  }
  return rank;
}

template <typename Id>
__global__ void count_rows(const Id* ids, int64_t rows, int groups, int64_t chunk_rows,
                           int* counts) {
  alignas(16) __shared__ int tile[kThreads];
  int* own = counts + int64_t{blockIdx.x} * (groups + 1);
  for (int64_t bin = threadIdx.x; bin <= groups; bin += kThreads) own[bin] = 0;
  const int64_t begin = blockIdx.x * chunk_rows, end = smaller(begin + chunk_rows, rows);
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const int bin = row < end ? bin_of(ids[row], groups) : -1;
    tile[threadIdx.x] = bin;
    __syncthreads();
    const Rank rank = rank_in(tile, bin);
    if (bin >= 0 && rank.before == 0) own[bin] += rank.count;
    __syncthreads();
  }
}

// One thread per bin. Loads come before the stores, which they could not pass by themselves.
static __global__ void scan_chunks(int* counts, int bins, int64_t chunks, int* totals) {
  const int64_t bin = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (bin >= bins) return;
  int sum = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk += kLoads) {
    const int64_t count = smaller<int64_t>(kLoads, chunks - chunk);
    int* own = counts + chunk * bins + bin;
    int loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = i < count ? own[int64_t{i} * bins] : 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i < count) own[int64_t{i} * bins] = sum;
      sum += loaded[i];
    }
  }
  totals[bin] = sum;
}

// One thread block. Both sums have a leading zero: offsets [bins + 1], first_blocks [bins + 1].
static __global__ void scan_bins(const int* totals, int bins, int block_rows, int* offsets,
                                 int* first_blocks) {
  __shared__ int row_sums[2][kScanThreads], block_sums[2][kScanThreads];
  const int thread = threadIdx.x;
  int rows_before = 0, blocks_before = 0;
  for (int64_t first = 0; first < bins; first += kScanThreads) {
    const int64_t bin = first + thread;
    const int rows = bin < bins ? totals[bin] : 0;
    row_sums[0][thread] = rows;
    block_sums[0][thread] = rows / block_rows + (rows % block_rows != 0);
    __syncthreads();
    int from = 0;
    for (int step = 1; step < kScanThreads; step *= 2) {
      const bool adds = thread >= step;
      row_sums[1 - from][thread] =
          row_sums[from][thread] + (adds ? row_sums[from][thread - step] : 0);
      block_sums[1 - from][thread] =
          block_sums[from][thread] + (adds ? block_sums[from][thread - step] : 0);
      from = 1 - from;
      __syncthreads();
    }
    if (bin < bins) {
      offsets[bin + 1] = rows_before + row_sums[from][thread];
      first_blocks[bin + 1] = blocks_before + block_sums[from][thread];
    }
    rows_before += row_sums[from][kScanThreads - 1];
    blocks_before += block_sums[from][kScanThreads - 1];
    __syncthreads();
  }
  if (thread == 0) offsets[0] = first_blocks[0] = 0;
}

// Leaves in counts[chunk][bin] the rows of the bin in this chunk and earlier ones.
template <typename Id>
__global__ void place_rows(const Id* ids, int64_t rows, int groups, int64_t chunk_rows,
                           const int* offsets, int* counts, int* order) {
  alignas(16) __shared__ int tile[kThreads];
  int* own = counts + int64_t{blockIdx.x} * (groups + 1);
  const int64_t begin = blockIdx.x * chunk_rows, end = smaller(begin + chunk_rows, rows);
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t row = first + threadIdx.x;
    const int bin = row < end ? bin_of(ids[row], groups) : -1;
    tile[threadIdx.x] = bin;
    __syncthreads();
    const Rank rank = rank_in(tile, bin);
    if (bin >= 0) order[offsets[bin] + own[bin] + rank.before] = static_cast<int>(row);
    __syncthreads();
    if (bin >= 0 && rank.before == 0) own[bin] += rank.count;
  }
}

static __global__ void cut_blocks(const int* offsets, const int* first_blocks, int groups,
                                  int block_rows, int64_t entries, int* blocks) {
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= entries) return;
  int group = -1, first = 0, rows = 0;
  if (entry < first_blocks[groups + 1]) {
    // the bin with first_blocks[bin] <= entry < first_blocks[bin + 1]
    int bin = 0, above = groups + 1;
    while (above - bin > 1) {
      const int middle = bin + (above - bin) / 2;
      if (first_blocks[middle] <= entry) {
        bin = middle;
      } else {
        above = middle;
      }
    }
    first = offsets[bin] + (static_cast<int>(entry) - first_blocks[bin]) * block_rows;
    rows = smaller(block_rows, offsets[bin + 1] - first);
    if (bin < groups) group = bin;
  }
  blocks[3 * entry] = group;
  blocks[3 * entry + 1] = first;
  blocks[3 * entry + 2] = rows;
}

// Rows of `units` units; order[i] is the row that goes to i, or with kScatter where row i goes.
// Whatever `order` holds, no other memory is touched.
template <typename Unit, bool kScatter>
__global__ void copy_rows(const Unit* from, Unit* to, const int* order, int64_t rows,
                          int64_t units) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t other = smaller<int64_t>(larger(order[row], 0), rows - 1);
  const Unit* __restrict__ source = from + (kScatter ? row : other) * units;
  Unit* __restrict__ target = to + (kScatter ? other : row) * units;
  const int64_t step = int64_t{gridDim.y} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < units; i += step) {
    target[i] = source[i];
  }
}

// What a call needs beside its results.
struct Scratch {
  int64_t bins, chunk_rows, chunks;

  // chunks are large enough that their counters stay below four per row
  Scratch(int64_t rows, int64_t groups)
      : bins(groups + 1),
        chunk_rows(divide_up(larger<int64_t>(kMinChunkRows, bins / 4), kThreads) * kThreads),
        chunks(larger<int64_t>(1, divide_up(rows, chunk_rows))) {}

  int64_t counters() const { return chunks * bins + bins + bins + 1; }
};

template <typename Id, typename Launch>
void launch_tables(const Launch& launch, const Scratch& sizes, const Id* ids, int64_t rows,
                   int groups, int block_rows, int64_t entries, int* scratch, int* order,
                   int* offsets, int* blocks) {
  const int bins = groups + 1;
  int* counts = scratch;
  int* totals = counts + sizes.chunks * bins;
  int* first_blocks = totals + bins;
  const auto grid = [](int64_t threads) {
    return static_cast<unsigned>(divide_up(threads, kThreads));
  };
  const auto chunks = static_cast<unsigned>(sizes.chunks);
  launch("count_rows", count_rows<Id>, chunks, kThreads, ids, rows, groups, sizes.chunk_rows,
         counts);
  launch("scan_chunks", scan_chunks, grid(bins), kThreads, counts, bins, sizes.chunks, totals);
  launch("scan_bins", scan_bins, 1, kScanThreads, totals, bins, block_rows, offsets, first_blocks);
  launch("place_rows", place_rows<Id>, chunks, kThreads, ids, rows, groups, sizes.chunk_rows,
         offsets, counts, order);
  if (entries == 0) return;
  launch("cut_blocks", cut_blocks, grid(entries), kThreads, offsets, first_blocks, groups,
         block_rows, entries, blocks);
}

struct alignas(16) Sixteen {
  uint32_t words[4];
};

// Copies in the largest units that rows and addresses are multiples of. Neither may be empty.
template <bool kScatter, typename Launch>
void launch_copy(const Launch& launch, const void* from, void* to, const int* order, int64_t rows,
               int64_t row_bytes) {
  const auto addresses = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  const uint64_t divisor = addresses | static_cast<uint64_t>(row_bytes);
  const auto copy = [&]<typename Unit>(Unit) {
    const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
    unsigned lanes = 1;  // threads side by side in a row, as a power of two
    while (lanes < 32 && lanes < units) lanes *= 2;
    const dim3 block(lanes, kThreads / lanes);
    // four units per thread; the kernel loops where a grid has too few thread blocks for that
    const dim3 grid(static_cast<unsigned>(divide_up(rows, block.y)),
                    static_cast<unsigned>(smaller<int64_t>(65535, divide_up(units, lanes * 4))));
    launch("copy_rows", copy_rows<Unit, kScatter>, grid, block, static_cast<const Unit*>(from),
           static_cast<Unit*>(to), order, rows, units);
  };
  if (divisor % 16 == 0) return copy(Sixteen{});
  if (divisor % 8 == 0) return copy(uint64_t{});
  if (divisor % 4 == 0) return copy(uint32_t{});
  if (divisor % 2 == 0) return copy(uint16_t{});
  copy(uint8_t{});
}

}  // namespace fastfusion::cuda
