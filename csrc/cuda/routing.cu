// Routing on a GPU: checks, memory and the stream around the kernels of routing.cuh. Schemas and
// semantics: fastfusion/ops/routing.py. PyTorch's stable ABI and a CUDA runtime of our own: nothing
// of PyTorch's CUDA libraries is linked, so that this builds and loads beside a CPU build too.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

#include "routing.cuh"

namespace fastfusion::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The tensor's device and PyTorch's current stream on it, until the end of the scope.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    const auto device = tensor.get_device_index();
    check(cudaSetDevice(device), "cudaSetDevice");  // our runtime's own notion of it
    stream_ = static_cast<cudaStream_t>(
        torch::stable::accelerator::getCurrentStream(device).nativeHandle());
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                  Arguments... arguments) const {
    kernel<<<grid, block, 0, stream_>>>(arguments...);
    check(cudaGetLastError(), name);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

int* ints(const Tensor& tensor) { return static_cast<int*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> routing_tables(const Tensor& given, int64_t groups,
                                                  int64_t block_rows) {
  const ScalarType dtype = given.scalar_type();
  STD_TORCH_CHECK(given.dim() == 1 && (dtype == ScalarType::Int || dtype == ScalarType::Long),
                  "ids: expected one dimension of int32 or int64");
  STD_TORCH_CHECK(groups >= 0 && groups < kMaxInt, "num_groups: expected 0 or more; got ", groups);
  STD_TORCH_CHECK(block_rows >= 1, "block_rows: expected 1 or more; got ", block_rows);
  const Tensor ids = torch::stable::contiguous(given);
  const int64_t rows = ids.size(0);
  STD_TORCH_CHECK(rows <= kMaxInt, "ids: expected row numbers that fit int32; got ", rows, " rows");
  const int64_t used = std::min(rows, groups + 1);
  const int64_t entries = used + (rows - used) / block_rows;
  const Scratch sizes(rows, groups);
  const Tensor order = torch::stable::new_empty(ids, {rows}, ScalarType::Int);
  const Tensor offsets = torch::stable::new_empty(ids, {groups + 2}, ScalarType::Int);
  const Tensor blocks = torch::stable::new_empty(ids, {entries, 3}, ScalarType::Int);
  const Tensor scratch = torch::stable::new_empty(ids, {sizes.counters()}, ScalarType::Int);
  const Stream launch(ids);
  const auto make = [&]<typename Id>(const Id* data) {
    launch_tables(launch, sizes, data, rows, static_cast<int>(groups),
                static_cast<int>(std::min(block_rows, kMaxInt)), entries, ints(scratch),
                ints(order), ints(offsets), ints(blocks));
  };
  if (dtype == ScalarType::Int) {
    make(static_cast<const int32_t*>(ids.const_data_ptr()));
  } else {
    make(static_cast<const int64_t*>(ids.const_data_ptr()));
  }
  return {order, offsets, blocks};
}

template <bool kScatter>
Tensor move_rows(const Tensor& given, const Tensor& given_order) {
  STD_TORCH_CHECK(given.dim() >= 1 && given_order.dim() == 1 && given_order.is_cuda() &&
                      given_order.get_device_index() == given.get_device_index() &&
                      given_order.scalar_type() == ScalarType::Int &&
                      given_order.size(0) == given.size(0),
                  "order: expected int32 and one entry per row of x, on its device");
  const Tensor x = torch::stable::contiguous(given);
  const Tensor order = torch::stable::contiguous(given_order);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  const int64_t rows = x.size(0);
  if (x.numel() == 0) return out;
  const Stream launch(x);
  launch_copy<kScatter>(launch, x.const_data_ptr(), out.mutable_data_ptr(),
                        static_cast<const int*>(order.const_data_ptr()), rows,
                        x.numel() / rows * static_cast<int64_t>(x.element_size()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CUDA, m) {
  m.impl("routing_tables", TORCH_BOX(&routing_tables));
  m.impl("gather_rows", TORCH_BOX(&move_rows<false>));
  m.impl("scatter_rows", TORCH_BOX(&move_rows<true>));
}

}  // namespace fastfusion::cuda
