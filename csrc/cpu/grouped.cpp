// The op over groups of rows on a CPU: each group's rows go through a mixture of their own. Rows
// are indexed, not copied, where a block of them lies together; blocks go to the threads, each with
// products of its own.
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "adapter_fusion.h"
#include "tensors.h"

#if defined(__linux__)
// MKL's own, which PyTorch exports where it has MKL; null elsewhere.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
#endif

namespace fastfusion::cpu {
namespace {

// In a parallel region MKL runs a product on the calling thread alone, but still with the kernels
// for several threads, which copy both operands first. Told that it has one thread it reads them
// where they lie; in a profile `nocopy` kernels replace its `sgemm_copy*`. With the blocks
// dealt as threads get free, 32 of 128 rows, H=768, d=48 take 4.6 instead of 7.1 ms on two threads.
struct OneBlasThread {
#if defined(__linux__)
  const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
  OneBlasThread() = default;
  OneBlasThread(const OneBlasThread&) = delete;
  ~OneBlasThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  }
#endif
};

int64_t padded(int64_t rows) { return (rows + 7) / 8 * 8; }

// Where a group's parts lie in the stacked weights.
struct Group {
  Mixture mixture;
  int64_t first_adapter;
  int64_t in_row, in_rows;    // of w_in: the down-projections, then the score weights
  int64_t out_row, out_rows;  // of w_out
};

// The stacked weights of all groups.
struct Stack {
  const Tensor& w_in;
  const Tensor& b_in;
  const Tensor& w_out;
  const OptionalTensor& mask;
  const std::vector<int64_t>& sizes;
  const std::vector<int64_t>& activations;
  const std::vector<int64_t>& counts;
  const std::vector<int64_t>& scored;
};

struct Layout {
  std::vector<Group> groups;
  int64_t max_adapters = 0, max_columns = 0, max_width = 0;
};

Layout lay_out(const Stack& w, const Tensor& x) {
  STD_TORCH_CHECK(w.sizes.size() == w.activations.size(),
                  "expected one activation per size; got ", w.sizes.size(), " sizes and ",
                  w.activations.size(), " activations");
  STD_TORCH_CHECK(w.counts.size() == w.scored.size() && !w.counts.empty(),
                  "expected one flag per group and one group or more; got ", w.counts.size(),
                  " groups and ", w.scored.size(), " flags");
  expect_matrix(x, "x");
  expect_matrix(w.w_in, "w_in");
  expect_matrix(w.w_out, "w_out");
  const ScalarType dtype = x.scalar_type();
  const int64_t width = x.size(1), total = static_cast<int64_t>(w.sizes.size());
  Layout layout;
  int64_t adapter = 0, in_row = 0, out_row = 0;
  for (size_t g = 0; g < w.counts.size(); ++g) {
    const int64_t count = w.counts[g];
    STD_TORCH_CHECK(count > 0 && count <= total - adapter,
                    "counts: expected one adapter or more for each group, ", total,
                    " in all; got ", text(w.counts));
    Mixture m = cpu::lay_out(w.sizes.data() + adapter, w.activations.data() + adapter, count);
    m.scored = w.scored[g] != 0;
    m.inv_temperature = 1.f;
    const int64_t rows = padded(m.columns + count);
    const int64_t in_rows = m.columns + (m.scored ? rows : 0);
    layout.max_adapters = std::max(layout.max_adapters, m.scored ? count : 0);
    layout.max_columns = std::max(layout.max_columns, m.columns);
    layout.max_width = std::max(layout.max_width, m.columns + rows);
    layout.groups.push_back({std::move(m), adapter, in_row, in_rows, out_row, rows});
    adapter += count, in_row += in_rows, out_row += rows;
  }
  STD_TORCH_CHECK(adapter == total, "counts: expected ", total, " adapters in all; got ",
                  text(w.counts));
  expect(x, "x", {x.size(0), width}, dtype);
  expect(w.w_in, "w_in", {in_row, width}, dtype);
  expect(w.b_in, "b_in", {in_row}, ScalarType::Float);
  expect(w.w_out, "w_out", {out_row, width}, dtype);
  expect(w.mask, "mask", {x.size(0), layout.max_adapters}, ScalarType::Float);
  for (Group& group : layout.groups) {
    group.mixture.b_down = data<float>(w.b_in) + group.in_row;
    group.mixture.b_score = group.mixture.b_down + group.mixture.columns;
  }
  return layout;
}

// The tables of fastfusion/ops/routing.py; rows come from them as indices into memory.
struct Tables {
  const Tensor& order;
  const Tensor& offsets;
  const Tensor& blocks;

  void check(int64_t rows, int64_t groups) const {
    expect(order, "order", {rows}, ScalarType::Int);
    expect(offsets, "offsets", {groups + 2}, ScalarType::Int);
    STD_TORCH_CHECK(blocks.dim() == 2, "blocks: expected two dimensions");
    expect(blocks, "blocks", {blocks.size(0), 3}, ScalarType::Int);
    const auto is_row = [&](int32_t row) { return row >= 0 && row < rows; };
    STD_TORCH_CHECK(std::all_of(indices(), indices() + rows, is_row),
                    "order: expected row numbers below ", rows);
  }
  const int32_t* indices() const { return data<int32_t>(order); }
  // entries without rows end the list
  int64_t num_blocks() const {
    const int32_t* entries = data<int32_t>(blocks);
    int64_t count = 0;
    while (count < blocks.size(0) && entries[3 * count + 2] > 0) ++count;
    return count;
  }
  int64_t max_block_rows() const {
    const int32_t* entries = data<int32_t>(blocks);
    int32_t most = 1;
    for (int64_t i = 0; i < blocks.size(0); ++i) most = std::max(most, entries[3 * i + 2]);
    return most;
  }
};

struct Block {
  int32_t group, first, rows;
};

// Of rows in rising order, as `order` has them inside a group.
bool lie_together(const int32_t* index, int64_t count) {
  return index[count - 1] - index[0] == count - 1;
}

// Rows somewhere in a matrix.
template <typename T>
struct Rows {
  Matrix<T> all;
  const int32_t* index;
  int64_t count;

  bool together() const { return lie_together(index, count); }
  T* row(int64_t i) const { return all.data + index[i] * all.row_stride; }
  // The rows themselves where they lie together, else a copy in `buffer`.
  Matrix<T> read(T* buffer) const {
    if (together()) return all.row_range(index[0], count);
    for (int64_t i = 0; i < count; ++i) std::copy_n(row(i), all.columns, buffer + i * all.columns);
    return {buffer, count, all.columns, all.columns};
  }
};

template <typename T>
void forward_block(const Group& group, const Stack& w, const Rows<T>& x, const Rows<T>& residual,
                   const Rows<T>& out, const float* mask, float* p, int64_t p_stride, T* buffer,
                   float* scratch) {
  const Mixture& m = group.mixture;
  const int64_t rows = x.count, width = x.all.columns, used = m.columns + m.adapters;
  const int64_t line = 64 / sizeof(T);
  const int64_t stride = (m.columns + group.out_rows + line - 1) / line * line;
  const Matrix<T> copy{buffer, rows, width, width};
  const Matrix<T> y{buffer + rows * width, rows, stride, stride};
  const Matrix<T> w_in = matrix<T>(w.w_in).row_range(group.in_row, group.in_rows);
  const Matrix<T> w_out = matrix<T>(w.w_out).row_range(group.out_row, used);
  product(y.column_range(0, w_in.rows), x.read(copy.data), w_in.transposed());

  float* own_p = scratch + m.columns;
  float* own_mask = own_p + m.adapters;
  for (int64_t i = 0; i < rows; ++i) {
    // the mask is as wide as the widest scored group
    const bool masked = mask && m.scored;
    if (masked) std::copy_n(mask + x.index[i] * p_stride, m.adapters, own_mask);
    const ForwardRows<T> pass{y.data + i * stride, stride, masked ? own_mask : nullptr, nullptr,
                              own_p, scratch};
    forward_rows(m, pass, 0, 1);
    if (m.scored) std::copy_n(own_p, m.adapters, p + x.index[i] * p_stride);
  }

  const bool direct = out.together();
  const Matrix<T> to = direct ? out.all.row_range(out.index[0], rows) : copy;
  product(to, y.column_range(0, used), w_out);
  for (int64_t i = 0; i < rows; ++i) {
    if (residual.all.data) add_values(to.data + i * width, residual.row(i), width);
    if (!direct) std::copy_n(to.data + i * width, width, out.row(i));
  }
}

std::tuple<Tensor, Tensor> grouped(Tensor x, OptionalTensor residual, Tensor order, Tensor offsets,
                                   Tensor blocks, Tensor w_in, Tensor b_in, Tensor w_out,
                                   OptionalTensor mask, std::vector<int64_t> sizes,
                                   std::vector<int64_t> activations, std::vector<int64_t> counts,
                                   std::vector<int64_t> scored) {
  const Stack w{w_in, b_in, w_out, mask, sizes, activations, counts, scored};
  const Layout layout = lay_out(w, x);
  const int64_t total = x.size(0), width = x.size(1), num_groups = layout.groups.size();
  expect(residual, "residual", {total, width}, x.scalar_type());
  const Tables tables{order, offsets, blocks};
  tables.check(total, num_groups);
  const Tensor out = torch::stable::empty_like(x);
  const Tensor p = torch::stable::new_zeros(x, {total, layout.max_adapters}, ScalarType::Float);
  const int64_t block_rows = tables.max_block_rows();
  with_dtype(x, [&]<typename T>() {
    const Matrix<T> from = matrix<T>(x), to = matrix<T>(out);
    const Matrix<T> add = residual ? matrix<T>(*residual) : Matrix<T>{};
    const int64_t buffer_size = block_rows * (width + layout.max_width + 64 / sizeof(T));
    const int64_t scratch_size = layout.max_columns + 2 * std::max<int64_t>(layout.max_width, 1);
    // a thread takes the next block when it is done with one: blocks differ in size, and what they
    // compute does not depend on the thread
    const int64_t num_blocks = tables.num_blocks();
    const int64_t threads = std::min<int64_t>(num_blocks, torch::stable::get_num_threads());
    std::atomic<int64_t> next = 0;
    const Tensor buffers = torch::stable::new_empty(x, {threads, buffer_size});
    const Tensor scratches =
        torch::stable::new_empty(x, {threads, scratch_size}, ScalarType::Float);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
      const OneBlasThread alone;
      T* buffer = data<T>(buffers) + thread * buffer_size;
      float* scratch = data<float>(scratches) + thread * scratch_size;
      for (int64_t i = next++; i < num_blocks; i = next++) {
        const int32_t* entry = data<int32_t>(blocks) + 3 * i;
        const Block block{entry[0], entry[1], entry[2]};
        STD_TORCH_CHECK(block.group < num_groups && block.first >= 0 && block.rows > 0 &&
                            block.first <= total - block.rows,
                        "blocks: expected groups below ", num_groups, " and rows below ", total);
        const int32_t* index = tables.indices() + block.first;
        const Rows<T> own_out{to, index, block.rows}, own_add{add, index, block.rows};
        if (block.group < 0) {
          for (int64_t row = 0; row < block.rows; ++row) {
            if (residual) {
              std::copy_n(own_add.row(row), width, own_out.row(row));
            } else {
              std::fill_n(own_out.row(row), width, T{});
            }
          }
          continue;
        }
        forward_block<T>(layout.groups[block.group], w, {from, index, block.rows}, own_add, own_out,
                         data<float>(mask), data<float>(p), layout.max_adapters, buffer, scratch);
      }
    });
  });
  return {out, p};
}

// Copies of rows, at their places in another tensor or out of it.
template <typename T>
void gather(const Matrix<T>& from, const int32_t* index, const Matrix<T>& to) {
  parallel_rows(to.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(from.data + index[i] * from.row_stride, to.columns, to.data + i * to.row_stride);
    }
  });
}
template <typename T>
void scatter(const Matrix<T>& from, const int32_t* index, const Matrix<T>& to) {
  parallel_rows(from.rows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(from.data + i * from.row_stride, from.columns,
                  to.data + index[i] * to.row_stride);
    }
  });
}

// The gradients, one group after the other: the products of each are long and run on all threads.
std::tuple<Tensor, Tensor, Tensor, Tensor> grouped_backward(
    Tensor grad_out, Tensor x, Tensor order, Tensor offsets, Tensor blocks, Tensor w_in,
    Tensor b_in, Tensor w_out, OptionalTensor mask, Tensor p, std::vector<int64_t> sizes,
    std::vector<int64_t> activations, std::vector<int64_t> counts, std::vector<int64_t> scored,
    bool needs_x, bool needs_in, bool needs_out) {
  const Stack w{w_in, b_in, w_out, mask, sizes, activations, counts, scored};
  const Layout layout = lay_out(w, x);
  const int64_t total = x.size(0), width = x.size(1), num_groups = layout.groups.size();
  expect(grad_out, "grad_out", {total, width}, x.scalar_type());
  expect(p, "p", {total, layout.max_adapters}, ScalarType::Float);
  const Tables tables{order, offsets, blocks};
  tables.check(total, num_groups);
  auto zeros = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_zeros(like, {like.size(0), width})
                  : torch::stable::new_empty(like, {0});
  };
  // base rows and groups without rows keep zeros
  const Tensor dx = zeros(needs_x, x), dw_in = zeros(needs_in, w_in);
  const Tensor dw_out = zeros(needs_out, w_out);
  const Tensor db_in =
      torch::stable::new_zeros(x, {needs_in ? w_in.size(0) : 0}, x.scalar_type());
  with_dtype(x, [&]<typename T>() {
    for (int64_t g = 0; g < num_groups; ++g) {
      const Group& group = layout.groups[g];
      const Mixture& m = group.mixture;
      const int64_t first = data<int32_t>(offsets)[g];
      const int64_t rows = data<int32_t>(offsets)[g + 1] - first;
      STD_TORCH_CHECK(first >= 0 && rows >= 0 && first <= total - rows,
                      "offsets: expected rising ones up to ", total);
      if (rows == 0) continue;
      const int32_t* index = tables.indices() + first;
      auto part = [](const Tensor& tensor, int64_t row, int64_t count) {
        return torch::stable::narrow(const_cast<Tensor&>(tensor), 0, row, count);
      };
      // the group's rows of a tensor's first columns: the rows themselves where they lie together
      const bool together = lie_together(index, rows);
      auto own_rows = [&]<typename V>(const Tensor& tensor, int64_t columns, V) {
        if (together && columns == tensor.size(1)) return part(tensor, index[0], rows);
        const Tensor own = torch::stable::new_empty(tensor, {rows, columns});
        gather(matrix<V>(tensor), index, matrix<V>(own));
        return own;
      };
      OptionalTensor w_score, b_score, own_mask;
      const int64_t score_row = group.in_row + m.columns;
      if (m.scored) {
        w_score = part(w_in, score_row, group.out_rows);
        b_score = part(b_in, score_row, group.out_rows);
        if (mask) own_mask = own_rows(*mask, m.adapters, float{});
      }
      const auto begin = group.first_adapter, end = begin + m.adapters;
      const auto gradients = adapter_fusion_backward(
          own_rows(grad_out, width, T{}), {own_rows(x, width, T{})}, std::nullopt,
          part(w_in, group.in_row, m.columns), part(b_in, group.in_row, m.columns), w_score,
          b_score,
          part(w_out, group.out_row, group.out_rows), std::nullopt, own_mask,
          m.scored ? own_rows(p, m.adapters, float{}) : torch::stable::new_empty(p, {0}),
          {sizes.begin() + begin, sizes.begin() + end},
          {activations.begin() + begin, activations.begin() + end}, needs_x, false, needs_in,
          needs_in && m.scored, needs_out, false);
      auto store = [&](const Tensor& from, const Tensor& to, int64_t row) {
        const int64_t step = to.dim() == 2 ? to.size(1) : 1;
        std::copy_n(data<T>(from), from.numel(), data<T>(to) + row * step);
      };
      if (needs_x) {
        const Tensor own = torch::stable::select(const_cast<Tensor&>(std::get<0>(gradients)), 0, 0);
        scatter(matrix<T>(own), index, matrix<T>(dx));
      }
      if (needs_in) {
        store(std::get<2>(gradients), dw_in, group.in_row);
        store(std::get<3>(gradients), db_in, group.in_row);
        if (m.scored) {
          store(std::get<4>(gradients), dw_in, score_row);
          store(std::get<5>(gradients), db_in, score_row);
        }
      }
      if (needs_out) store(std::get<6>(gradients), dw_out, group.out_row);
    }
  });
  return {dx, dw_in, db_in, dw_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("adapter_fusion_grouped_cpu", TORCH_BOX(&grouped));
  m.impl("adapter_fusion_grouped_backward_cpu", TORCH_BOX(&grouped_backward));
}

}  // namespace fastfusion::cpu
