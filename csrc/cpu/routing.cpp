// Routing on a CPU: a stable counting sort of rows by their group, and rows copied to and from that
// order. Schemas and semantics: fastfusion/ops/routing.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "../routing.h"

namespace fastfusion::cpu {
namespace {

using torch::stable::Tensor;

// Bytes that one thread copies at least.
constexpr int64_t kChunkBytes = 1 << 15;

// Base rows are the last bin.
template <typename Id>
void sort_rows(const Id* ids, int64_t rows, int64_t groups, int32_t* order, int32_t* offsets) {
  std::vector<int32_t> next(groups + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = ids[row];
    STD_TORCH_CHECK(id >= -1 && id < groups, "ids: expected groups from -1 to ", groups - 1,
                    "; got ", id, " in row ", row);
    ++next[id < 0 ? groups : id];
  }
  int32_t sum = 0;
  for (int64_t bin = 0; bin <= groups; ++bin) {
    offsets[bin] = sum;
    sum += next[bin];
    next[bin] = offsets[bin];
  }
  offsets[groups + 1] = sum;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t id = ids[row];
    order[next[id < 0 ? groups : id]++] = static_cast<int32_t>(row);
  }
}

void cut_blocks(const int32_t* offsets, int64_t groups, int64_t block_rows, int32_t* blocks,
                const int32_t* blocks_end) {
  for (int64_t bin = 0; bin <= groups; ++bin) {
    const int32_t group = bin < groups ? static_cast<int32_t>(bin) : -1;
    for (int64_t first = offsets[bin]; first < offsets[bin + 1]; first += block_rows) {
      *blocks++ = group;
      *blocks++ = static_cast<int32_t>(first);
      *blocks++ = static_cast<int32_t>(std::min(block_rows, offsets[bin + 1] - first));
    }
  }
  while (blocks < blocks_end) {
    *blocks++ = -1;
    *blocks++ = 0;
    *blocks++ = 0;
  }
}

std::tuple<Tensor, Tensor, Tensor> routing_tables(const Tensor& ids, int64_t groups,
                                                  int64_t block_rows) {
  const RoutingTables t = new_tables(ids, groups, block_rows);
  t.with_ids([&](const auto* data) {
    sort_rows(data, t.rows, groups, ints(t.order), ints(t.offsets));
  });
  cut_blocks(ints(t.offsets), groups, t.block_rows, ints(t.blocks),
             ints(t.blocks) + 3 * t.num_blocks);
  return {t.order, t.offsets, t.blocks};
}

// Rows of one number: a loop over them is several times faster than calls of memcpy.
template <typename Unit, bool kScatter>
void copy_units(Unit* to, const Unit* from, const int32_t* order, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if constexpr (kScatter) {
      to[order[i]] = from[i];
    } else {
      to[i] = from[order[i]];
    }
  }
}

template <bool kScatter>
void copy_rows(void* to, const void* from, const int32_t* order, int64_t row_bytes, int64_t begin,
               int64_t end) {
  const auto units = [&]<typename Unit>(Unit) {
    copy_units<Unit, kScatter>(static_cast<Unit*>(to), static_cast<const Unit*>(from), order,
                               begin, end);
  };
  switch (row_bytes) {
    case 1: return units(uint8_t{});
    case 2: return units(uint16_t{});
    case 4: return units(uint32_t{});
    case 8: return units(uint64_t{});
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t target = kScatter ? order[i] : i, source = kScatter ? i : order[i];
    std::memcpy(static_cast<char*>(to) + target * row_bytes,
                static_cast<const char*>(from) + source * row_bytes, row_bytes);
  }
}

void check_order(const int32_t* order, int64_t rows) {
  const auto limit = static_cast<uint32_t>(rows);
  const auto outside = [limit](int32_t row) { return static_cast<uint32_t>(row) >= limit; };
  uint32_t any = 0;  // of their own width and without an early exit: the loop is vectorised
  for (int64_t i = 0; i < rows; ++i) any |= outside(order[i]);
  STD_TORCH_CHECK(any == 0, "order: expected row numbers from 0 to ", rows - 1, "; got ",
                  *std::find_if(order, order + rows - 1, outside));
}

template <bool kScatter>
Tensor move_rows(const Tensor& given, const Tensor& given_order) {
  expect_order(given, given_order);
  const Tensor x = torch::stable::contiguous(given);
  const Tensor ordering = torch::stable::contiguous(given_order);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t rows = x.size(0);
  if (x.numel() == 0) return out;
  const int32_t* order = static_cast<const int32_t*>(ordering.const_data_ptr());
  check_order(order, rows);
  const void* from = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const int64_t row_bytes = x.numel() / rows * static_cast<int64_t>(x.element_size());
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kChunkBytes / row_bytes),
                              [&](int64_t begin, int64_t end) {
                                copy_rows<kScatter>(to, from, order, row_bytes, begin, end);
                              });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("routing_tables", TORCH_BOX(&routing_tables));
  m.impl("gather_rows", TORCH_BOX(&move_rows<false>));
  m.impl("scatter_rows", TORCH_BOX(&move_rows<true>));
}

}  // namespace fastfusion::cpu
