// The kernels of csrc/cuda/routing.cuh on the host, against a stable sort.
//
//     routing forward|reverse [line of a barrier to leave out]
//
// Prints the lines of the barriers it met. Exits with 1 and a message where a result is wrong.
#include "simt.h"
// after the shim, which stands in for CUDA's words
#include "../../csrc/cuda/routing.cuh"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>

namespace {

using namespace fastfusion::cuda;

std::mt19937_64 random_bits(0);

void expect(bool correct, const char* what, int64_t rows, int64_t groups, int64_t block_rows) {
  if (correct) return;
  std::printf("wrong %s: %ld rows, %ld groups, block_rows %ld\n", what, rows, groups, block_rows);
  std::exit(1);
}

// vectors are exactly as long as they must be: the sanitizer sees what goes beyond
template <typename Id>
void check_tables(const std::vector<Id>& ids, int groups, int block_rows) {
  const auto rows = static_cast<int64_t>(ids.size());
  const int64_t used = std::min<int64_t>(rows, groups + 1);
  const int64_t entries = used + (rows - used) / block_rows;
  const Scratch sizes(rows, groups);
  std::vector<int> scratch(sizes.counters(), -77), order(rows, -77), offsets(groups + 2, -77);
  std::vector<int> blocks(3 * entries, -77);
  launch_tables(simt::Launch{}, sizes, ids.data(), rows, groups, block_rows, entries,
                scratch.data(), order.data(), offsets.data(), blocks.data());

  std::vector<int> bins(rows), expected(rows), expected_offsets(1), expected_blocks;
  for (int64_t row = 0; row < rows; ++row) {
    const auto id = std::clamp<int64_t>(ids[row], -1, groups - 1);
    bins[row] = id < 0 ? groups : static_cast<int>(id);
  }
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(), [&](int a, int b) { return bins[a] < bins[b]; });
  for (int bin = 0; bin <= groups; ++bin) {
    const int begin = expected_offsets.back();
    const int end = begin + static_cast<int>(std::count(bins.begin(), bins.end(), bin));
    expected_offsets.push_back(end);
    for (int first = begin; first < end; first += std::min(block_rows, end - first)) {
      expected_blocks.insert(expected_blocks.end(), {bin < groups ? bin : -1, first,
                                                     std::min(block_rows, end - first)});
    }
  }
  while (expected_blocks.size() < blocks.size()) {
    expected_blocks.insert(expected_blocks.end(), {-1, 0, 0});
  }
  expect(order == expected, "order", rows, groups, block_rows);
  expect(offsets == expected_offsets, "offsets", rows, groups, block_rows);
  expect(blocks == expected_blocks, "blocks", rows, groups, block_rows);
}

template <typename Id>
std::vector<Id> draw(int64_t rows, int64_t low, int64_t high) {
  std::uniform_int_distribution<int64_t> distribution(low, high);
  std::vector<Id> ids(rows);
  for (Id& id : ids) id = static_cast<Id>(distribution(random_bits));
  return ids;
}

template <typename Id>
void check_all_tables() {
  // around a tile, a chunk, several chunks; groups around the threads of the scan
  for (int64_t rows : {0, 1, 256, 257, 1023, 1025, 5000}) {
    for (auto [groups, block_rows] : {std::pair{0, 16}, {1, 1000}, {7, 16}, {300, 1}}) {
      check_tables(draw<Id>(rows, -1, groups - 1), groups, block_rows);
    }
  }
  for (int groups : {1023, 1024, 2500, 9000}) {
    check_tables(draw<Id>(3000, -1, groups - 1), groups, 4);
  }
  check_tables(std::vector<Id>(3000, Id{-1}), 5, 64);  // base rows alone
  check_tables(std::vector<Id>(3000, Id{4}), 5, 64);
  check_tables(std::vector<Id>(3000, Id{4}), 5, std::numeric_limits<int>::max());
  auto sorted = draw<Id>(4000, -1, 40);
  std::sort(sorted.begin(), sorted.end());
  check_tables(sorted, 41, 16);
  // ids that nobody checked
  constexpr auto low = std::numeric_limits<Id>::min(), high = std::numeric_limits<Id>::max();
  check_tables(draw<Id>(2000, low, high), 9, 16);
  check_tables(draw<Id>(2000, low, high), 0, 16);
}

template <bool kScatter>
void check_copy(int64_t rows, int64_t row_bytes, int64_t misaligned) {
  std::vector<char> storage(rows * row_bytes + misaligned + 16), result(rows * row_bytes, 77);
  // an address that is a multiple of 16, and a little more
  char* x = storage.data() + (16 - reinterpret_cast<uintptr_t>(storage.data()) % 16) % 16;
  x += misaligned;
  for (int64_t i = 0; i < rows * row_bytes; ++i) x[i] = static_cast<char>(random_bits());
  std::vector<int> order(rows);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_bits);
  launch_copy<kScatter>(simt::Launch{}, x, result.data(), order.data(), rows, row_bytes);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t to = kScatter ? order[i] : i, from = kScatter ? i : order[i];
    const bool same = std::memcmp(&result[to * row_bytes], x + from * row_bytes, row_bytes) == 0;
    expect(same, kScatter ? "scattered row" : "gathered row", rows, row_bytes, misaligned);
  }
  // row numbers that nobody checked: no other memory is touched
  for (int& row : order) row = static_cast<int>(random_bits());
  launch_copy<kScatter>(simt::Launch{}, x, result.data(), order.data(), rows, row_bytes);
}

void check_copies() {
  for (int64_t rows : {1, 7, 100}) {
    for (int64_t row_bytes : {1, 2, 6, 8, 16, 36, 96, 1536, 5000}) {
      for (int64_t misaligned : {0, 2, 8}) {
        check_copy<false>(rows, row_bytes, misaligned);
        check_copy<true>(rows, row_bytes, misaligned);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  simt::reversed = count > 1 && std::string(arguments[1]) == "reverse";
  if (count > 2) simt::dropped_line = std::atoi(arguments[2]);
  check_all_tables<int64_t>();
  check_all_tables<int32_t>();
  check_copies();
  for (int line : simt::lines_seen) std::printf("%d\n", line);
}
