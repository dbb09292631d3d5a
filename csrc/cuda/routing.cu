// Routing on a GPU: checks, memory and the stream around the kernels of routing.cuh. Schemas and
// semantics: fastfusion/ops/routing.py. PyTorch's stable ABI and a CUDA runtime of our own: nothing
// of PyTorch's CUDA libraries is linked, so that this builds and loads beside a CPU build too.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>

#include "../routing.h"
#include "routing.cuh"

namespace fastfusion::cuda {
namespace {

using torch::stable::Tensor;

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

std::tuple<Tensor, Tensor, Tensor> routing_tables(const Tensor& ids, int64_t groups,
                                                  int64_t block_rows) {
  const RoutingTables t = new_tables(ids, groups, block_rows);
  const Scratch sizes(t.rows, groups);
  const Tensor scratch =
      torch::stable::new_empty(t.ids, {sizes.counters()}, torch::headeronly::ScalarType::Int);
  const Stream launch(t.ids);
  t.with_ids([&](const auto* data) {
    launch_tables(launch, sizes, data, t.rows, static_cast<int>(groups),
                  static_cast<int>(t.block_rows), t.num_blocks, ints(scratch), ints(t.order),
                  ints(t.offsets), ints(t.blocks));
  });
  return {t.order, t.offsets, t.blocks};
}

template <bool kScatter>
Tensor move_rows(const Tensor& given, const Tensor& given_order) {
  expect_order(given, given_order);
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
