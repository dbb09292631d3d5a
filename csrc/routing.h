// What the routing ops are given, checked, and their tables, still to be filled: the same on every
// device. Schemas and semantics: fastfusion/ops/routing.py.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastfusion {

struct RoutingTables {
  torch::stable::Tensor ids;  // contiguous
  int64_t rows, groups, block_rows, num_blocks;
  torch::stable::Tensor order, offsets, blocks;

  // Calls `function` with the ids in their own type.
  template <typename Function>
  void with_ids(const Function& function) const {
    if (ids.scalar_type() == torch::headeronly::ScalarType::Int) {
      function(static_cast<const int32_t*>(ids.const_data_ptr()));
    } else {
      function(static_cast<const int64_t*>(ids.const_data_ptr()));
    }
  }
};

inline int32_t* ints(const torch::stable::Tensor& tensor) {
  return static_cast<int32_t*>(tensor.mutable_data_ptr());
}

inline RoutingTables new_tables(const torch::stable::Tensor& given, int64_t groups,
                                int64_t block_rows) {
  using torch::headeronly::ScalarType;
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  const ScalarType dtype = given.scalar_type();
  STD_TORCH_CHECK(given.dim() == 1 && (dtype == ScalarType::Int || dtype == ScalarType::Long),
                  "ids: expected one dimension of int32 or int64");
  STD_TORCH_CHECK(groups >= 0 && groups < kMaxInt, "num_groups: expected 0 or more; got ", groups);
  STD_TORCH_CHECK(block_rows >= 1, "block_rows: expected 1 or more; got ", block_rows);
  const torch::stable::Tensor ids = torch::stable::contiguous(given);
  const int64_t rows = ids.size(0);
  STD_TORCH_CHECK(rows <= kMaxInt, "ids: expected row numbers that fit int32; got ", rows, " rows");
  block_rows = std::min(block_rows, kMaxInt);  // sums with it must not overflow
  const int64_t used = std::min(rows, groups + 1);
  const int64_t num_blocks = used + (rows - used) / block_rows;
  const auto new_ints = [&](const std::vector<int64_t>& shape) {
    return torch::stable::new_empty(ids, shape, ScalarType::Int);
  };
  return {ids, rows, groups, block_rows, num_blocks, new_ints({rows}), new_ints({groups + 2}),
          new_ints({num_blocks, 3})};
}

inline void expect_order(const torch::stable::Tensor& x, const torch::stable::Tensor& order) {
  STD_TORCH_CHECK(x.dim() >= 1 && order.dim() == 1 && order.is_cuda() == x.is_cuda() &&
                      order.get_device_index() == x.get_device_index() &&
                      order.scalar_type() == torch::headeronly::ScalarType::Int &&
                      order.size(0) == x.size(0),
                  "order: expected int32 and one entry per row of x, on its device");
}

}  // namespace fastfusion
