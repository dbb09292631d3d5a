// What the grouped op takes from the op of one mixture.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace fastfusion::cpu {

// The most bottleneck columns of one mixture.
inline constexpr int64_t kMaxColumns = int64_t{1} << 32;

// The columns of `adapters` adapters; the weights' pointers are left to the caller.
Mixture lay_out(const int64_t* sizes, const int64_t* activations, int64_t adapters);

// The gradients of one mixture: dx, dquery, dw_down, db_down, dw_score, db_score, dw_out, doffset.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_fusion_backward(
    Tensor grad_out, std::vector<Tensor> x, OptionalTensor query, Tensor w_down, Tensor b_down,
    OptionalTensor w_score, OptionalTensor b_score, Tensor w_out, OptionalTensor temperature,
    OptionalTensor mask, Tensor p, std::vector<int64_t> sizes, std::vector<int64_t> activations,
    bool needs_x, bool needs_query, bool needs_down, bool needs_score, bool needs_out,
    bool needs_offset);

}  // namespace fastfusion::cpu
