// What the CPU ops share: matrices inside tensors' memory, products by PyTorch's BLAS, checks of
// the arguments, and loops over rows on all threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "row_passes.h"

namespace fastfusion::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Rows that one thread takes at a time, and whose bias gradients are summed first.
inline constexpr int64_t kChunkRows = 32;

// A float or BFloat16 matrix inside somebody else's memory.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix row_range(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix column_range(int64_t first, int64_t count) const {
    return {data + first * column_stride, rows, count, row_stride, column_stride};
  }
};

template <typename T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == 4 ? ScalarType::Float : ScalarType::BFloat16;
}

template <typename T>
Tensor as_tensor(const Matrix<T>& matrix) {
  return torch::stable::from_blob(
      matrix.data, {matrix.rows, matrix.columns}, {matrix.row_stride, matrix.column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_of<T>());
}

// out = a @ b, or out += a @ b
template <typename T>
void product(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b,
             bool accumulate = false) {
  const Tensor to = as_tensor(out), left = as_tensor(a), right = as_tensor(b);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
  }
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}
template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <typename T>
Matrix<T> matrix(const Tensor& tensor) {
  return {data<T>(tensor), tensor.size(0), tensor.size(1), tensor.size(1)};
}

inline std::string text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string joined;
  for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + std::to_string(size);
  return "[" + joined + "]";
}

// The schemas say little about shapes, and a wrong one would read somebody else's memory.
inline void expect(const Tensor& tensor, const char* name, std::vector<int64_t> shape,
                   ScalarType dtype) {
  const bool fits = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                    tensor.sizes().equals(shape);
  if (fits) return;
  STD_TORCH_CHECK(false, name, ": expected a contiguous ", toString(dtype), " tensor ",
                  text(shape), " on the CPU; got ", toString(tensor.scalar_type()), " ",
                  text(tensor.sizes()));
}
inline void expect(const OptionalTensor& tensor, const char* name, std::vector<int64_t> shape,
                   ScalarType dtype) {
  if (tensor) expect(*tensor, name, std::move(shape), dtype);
}
inline void expect_matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected two dimensions; got ",
                  text(tensor.sizes()));
}
inline const Tensor& first_of(const std::vector<Tensor>& x) {
  STD_TORCH_CHECK(!x.empty(), "x: expected one tensor or more; got none");
  return x[0];
}

// `body(first, last)` over ranges of rows, on all threads when there is enough work.
template <typename Body>
void parallel_rows(int64_t rows, const Body& body) {
  torch::stable::parallel_for(0, rows, kChunkRows, body);
}

// `body(chunk, first, last)` over chunks of kChunkRows rows, the last one shorter.
template <typename Body>
void parallel_chunks(int64_t rows, const Body& body) {
  const int64_t chunks = (rows + kChunkRows - 1) / kChunkRows;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk, chunk * kChunkRows, std::min(rows, (chunk + 1) * kChunkRows));
    }
  });
}

// Calls body.operator()<float or BFloat16>().
template <typename Body>
auto with_dtype(const Tensor& tensor, const Body& body) {
  const bool single = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(single || tensor.scalar_type() == ScalarType::BFloat16,
                  "expected float32 or bfloat16; got another dtype");
  return single ? body.template operator()<float>() : body.template operator()<BFloat16>();
}

}  // namespace fastfusion::cpu
