// Forward and backward of the two ops on a CPU: the matrix products by PyTorch's BLAS and between
// them one vectorised pass over the rows (row_passes.h). Nothing of size [T, N, H] exists. Rows are
// taken in blocks to bound the memory of what does, not to keep it in cache: blocks small enough
// for that measured slower (kBlockRows).
//
// Products run outside parallel regions: the BLAS has threads of its own. Every split of work here
// depends on the shapes alone, sums are taken in a fixed order and there are no atomics: the same
// number of threads gives the same bits. With another number the BLAS may add up the weights'
// gradients, its longest sums, in another order.
#include "adapter_fusion.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace fastfusion::cpu {

Mixture lay_out(const int64_t* sizes, const int64_t* activations, int64_t adapters) {
  Mixture m{};
  m.adapters = adapters;
  m.starts.push_back(0);
  for (int64_t i = 0; i < adapters; ++i) {
    const int64_t begin = m.starts.back(), code = activations[i];
    STD_TORCH_CHECK(code >= 0 && code < kNumActivations, "activations: expected codes below ",
                    kNumActivations, "; got ", code);
    // the bound keeps the sum from overflowing
    STD_TORCH_CHECK(sizes[i] >= 0 && sizes[i] <= kMaxColumns - begin,
                    "sizes: expected none below 0 and a sum of at most ", kMaxColumns, "; got ",
                    sizes[i]);
    const int64_t end = begin + sizes[i];
    m.starts.push_back(end);
    if (m.runs.empty() || m.runs.back().activation != code) m.runs.push_back({begin, end, code});
    m.runs.back().end = end;
  }
  m.columns = m.starts.back();
  return m;
}

namespace {

// Rows of one block. Every product packs its weights anew for each block, so few large blocks are
// faster than many that fit L2: measured at T=1024, H=768 on two cores, blocks of 256 rows cost the
// products 10 to 20 %, of 512 rows 5 %.
constexpr int64_t kBlockRows = 1024;
// The tensors that both ops and their gradients share.
struct Weights {
  const Tensor& w_down;
  const Tensor& b_down;
  const OptionalTensor& w_score;
  const OptionalTensor& b_score;
  const Tensor& w_out;
  const OptionalTensor& temperature;
  const OptionalTensor& mask;
};

// Checks the weights and the inputs of `rows` rows like `like`.
Mixture describe(const Weights& w, const std::vector<int64_t>& sizes,
                 const std::vector<int64_t>& activations, const Tensor& like) {
  expect_matrix(like, "the input");
  expect_matrix(w.w_down, "w_down");
  if (w.w_score) expect_matrix(*w.w_score, "w_score");
  expect_matrix(w.w_out, "w_out");
  STD_TORCH_CHECK(!sizes.empty() && sizes.size() == activations.size(),
                  "expected one activation per size; got ", sizes.size(), " sizes and ",
                  activations.size(), " activations");
  int64_t rest = w.w_down.size(0);
  for (const int64_t size : sizes) rest = size < 0 || size > rest ? -1 : rest - size;
  STD_TORCH_CHECK(rest == 0, "sizes: expected none below 0 and the sum ", w.w_down.size(0),
                  " (w_down's rows); got ", text(sizes));
  Mixture m = lay_out(sizes.data(), activations.data(), static_cast<int64_t>(sizes.size()));
  m.scored = w.w_score.has_value();
  STD_TORCH_CHECK(m.scored == w.b_score.has_value(), "w_score and b_score: expected both or none");

  const ScalarType dtype = like.scalar_type();
  const int64_t width = like.size(1);
  const auto padded = [&](const Tensor& weight) {
    return std::max(weight.size(0), m.columns + m.adapters);
  };
  expect(w.w_down, "w_down", {m.columns, width}, dtype);
  expect(w.b_down, "b_down", {m.columns}, ScalarType::Float);
  expect(w.w_out, "w_out", {padded(w.w_out), width}, dtype);
  if (m.scored) {
    expect(w.w_score, "w_score", {padded(*w.w_score), width}, dtype);
    expect(w.b_score, "b_score", {padded(*w.w_score)}, ScalarType::Float);
  }
  expect(w.temperature, "temperature", {}, ScalarType::Float);
  expect(w.mask, "mask", {like.size(0), m.adapters}, ScalarType::Float);

  m.b_down = data<float>(w.b_down);
  m.b_score = data<float>(w.b_score);
  m.inv_temperature = w.temperature ? 1.f / *data<float>(w.temperature) : 1.f;
  return m;
}

// The columns of a row that ends with a cache line.
template <typename T>
int64_t whole_lines(int64_t columns) {
  const int64_t line = 64 / sizeof(T);
  return (columns + line - 1) / line * line;
}

// The first and the last product's operands, and the buffer between them: per row
// [D | score rows], at least D + N columns, in whole cache lines.
template <typename T>
class Projection {
 public:
  Projection(const Mixture& m, const Weights& w, const std::vector<Tensor>& x,
             const OptionalTensor& query)
      : m_(m), down_(matrix<T>(w.w_down)), out_(matrix<T>(w.w_out)) {
    for (const Tensor& input : x) x_.push_back(matrix<T>(input));
    query_ = query ? matrix<T>(*query) : x_[0];
    if (m.scored) score_ = matrix<T>(*w.w_score);
    // one product serves both where the score weights lie directly behind the down weights
    joint_ = m.scored && !query && x.size() == 1 &&
             score_.data == down_.data + down_.rows * down_.row_stride;
    buffer_stride = whole_lines<T>(m.columns + std::max(score_.rows, m.adapters));
  }

  int64_t buffer_stride;

  int64_t num_inputs() const { return static_cast<int64_t>(x_.size()); }
  const Matrix<T>& query() const { return query_; }
  const Matrix<T>& input(int64_t i) const { return x_[i]; }
  bool shared() const { return x_.size() == 1; }

  // The columns [first, first + count) that input i reads.
  std::pair<int64_t, int64_t> columns_of(int64_t i) const {
    if (shared()) return {0, m_.columns};
    return {m_.starts[i], m_.starts[i + 1] - m_.starts[i]};
  }

  Matrix<T> down() const { return down_; }
  Matrix<T> down_of(int64_t i) const {
    const auto [first, count] = columns_of(i);
    return down_.row_range(first, count);
  }
  // Without padding rows: they may hold anything.
  Matrix<T> score() const { return score_.row_range(0, m_.columns + m_.adapters); }
  Matrix<T> out() const { return out_.row_range(0, m_.columns + m_.adapters); }
  bool joint() const { return joint_; }
  Matrix<T> both() const {
    return {down_.data, down_.rows + m_.columns + m_.adapters, down_.columns, down_.row_stride};
  }

  // y = [x @ w_down.T ; query @ w_score.T] for the rows from `first` on. `x` replaces the shared
  // input unless null.
  void project(int64_t first, Matrix<T> y, const T* x, bool with_scores) const {
    const int64_t rows = y.rows;
    auto input = [&](int64_t i) {
      return x ? Matrix<T>{const_cast<T*>(x), rows, down_.columns, down_.columns}
               : x_[i].row_range(first, rows);
    };
    if (joint_ && with_scores) {
      const Matrix<T> weights{down_.data, down_.rows + score_.rows, down_.columns,
                              down_.row_stride};
      product(y.column_range(0, weights.rows), input(0), weights.transposed());
      return;
    }
    for (int64_t i = 0; i < num_inputs(); ++i) {
      const auto [column, count] = columns_of(i);
      product(y.column_range(column, count), input(i), down_of(i).transposed());
    }
    if (m_.scored && with_scores) {
      const Matrix<T> q = x ? input(0) : query_.row_range(first, rows);
      product(y.column_range(m_.columns, score_.rows), q, score_.transposed());
    }
  }

 private:
  const Mixture& m_;
  std::vector<Matrix<T>> x_;
  Matrix<T> query_{}, down_, score_{}, out_;
  bool joint_ = false;
};

// `before(first, rows)` may return the adapters' input for these rows, `after` sees them done.
template <typename T, typename Before, typename After>
void forward_blocks(const Mixture& m, const Projection<T>& projection, const OptionalTensor& mask,
                    const OptionalTensor& offset, const Tensor& result, float* p,
                    const Before& before, const After& after) {
  const Matrix<T> out = matrix<T>(result);
  const int64_t total = out.rows;
  const int64_t block = std::min(total, kBlockRows);
  const int64_t stride = projection.buffer_stride;
  const Tensor buffer = torch::stable::new_empty(result, {block, stride});
  const int64_t chunks = (block + kChunkRows - 1) / kChunkRows;
  const Tensor scratch = torch::stable::new_empty(result, {chunks, m.columns}, ScalarType::Float);
  for (int64_t first = 0; first < total; first += block) {
    const int64_t rows = std::min(block, total - first);
    const Matrix<T> y{data<T>(buffer), rows, stride, stride};
    projection.project(first, y, before(first, rows), true);
    const int64_t adapters = m.adapters;
    ForwardRows<T> pass{y.data, stride, nullptr, nullptr, p + first * adapters, nullptr};
    if (mask) pass.mask = data<float>(mask) + first * adapters;
    if (offset) pass.offset = data<float>(offset) + first;
    parallel_chunks(rows, [&](int64_t chunk, int64_t begin, int64_t end) {
      ForwardRows<T> mine = pass;
      mine.scratch = data<float>(scratch) + chunk * m.columns;
      forward_rows(m, mine, begin, end);
    });
    product(out.row_range(first, rows), y.column_range(0, m.columns + adapters), projection.out());
    after(first, rows);
  }
}

template <typename T>
void add_rows(const Matrix<T>& out, const T* addend) {
  const int64_t width = out.columns;
  parallel_rows(out.rows, [&](int64_t begin, int64_t end) {
    add_values(out.data + begin * width, addend + begin * width, (end - begin) * width);
  });
}

template <typename T>
void normalise(const NormRows<T>& pass, int64_t rows) {
  parallel_rows(rows, [&](int64_t begin, int64_t end) { norm_rows(pass, begin, end); });
}

template <typename T>
void normalise_backward(const NormGradRows<T>& pass, int64_t rows) {
  parallel_rows(rows, [&](int64_t begin, int64_t end) { norm_grad_rows(pass, begin, end); });
}

void expect_inputs(const Mixture& m, const std::vector<Tensor>& x, const OptionalTensor& query,
                   const std::vector<int64_t>& shape) {
  const ScalarType dtype = x[0].scalar_type();
  STD_TORCH_CHECK(x.size() == 1 || static_cast<int64_t>(x.size()) == m.adapters,
                  "x: expected 1 or ", m.adapters, " tensors; got ", x.size());
  for (const Tensor& input : x) expect(input, "x", shape, dtype);
  expect(query, "query", shape, dtype);
}

Tensor new_attention(const Tensor& like, const Mixture& m, int64_t rows) {
  if (!m.scored) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  return torch::stable::new_empty(like, {rows, m.adapters}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> adapter_fusion(
    std::vector<Tensor> x, OptionalTensor query, OptionalTensor residual, Tensor w_down,
    Tensor b_down, OptionalTensor w_score, OptionalTensor b_score, Tensor w_out,
    OptionalTensor temperature, OptionalTensor mask, OptionalTensor score_offset,
    std::vector<int64_t> sizes, std::vector<int64_t> activations) {
  const Weights weights{w_down, b_down, w_score, b_score, w_out, temperature, mask};
  const Mixture m = describe(weights, sizes, activations, first_of(x));
  const Tensor out = torch::stable::empty_like(x[0]);
  const std::vector<int64_t> shape = {out.size(0), out.size(1)};
  expect_inputs(m, x, query, shape);
  expect(residual, "residual", shape, out.scalar_type());
  expect(score_offset, "score_offset", {shape[0]}, ScalarType::Float);
  const Tensor p = new_attention(out, m, out.size(0));
  with_dtype(out, [&]<typename T>() {
    const Projection<T> projection(m, weights, x, query);
    forward_blocks(
        m, projection, mask, score_offset, out, data<float>(p),
        [](int64_t, int64_t) -> const T* { return nullptr; },
        [&](int64_t first, int64_t rows) {
          // 0.2 ms dearer when the product adds it (beta = 1): PyTorch copies it to `out` first
          if (residual) {
            const Matrix<T> to = matrix<T>(out).row_range(first, rows);
            add_rows(to, data<T>(residual) + first * to.columns);
          }
        });
  });
  return {out, p};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adapter_fusion_norm(
    Tensor hidden, Tensor input, Tensor ln_weight, Tensor ln_bias, double ln_eps, bool ln_before,
    Tensor w_down, Tensor b_down, OptionalTensor w_score, OptionalTensor b_score, Tensor w_out,
    OptionalTensor temperature, OptionalTensor mask, std::vector<int64_t> sizes,
    std::vector<int64_t> activations, bool save) {
  const Weights weights{w_down, b_down, w_score, b_score, w_out, temperature, mask};
  const Mixture m = describe(weights, sizes, activations, hidden);
  const Tensor out = torch::stable::empty_like(hidden);
  const std::vector<int64_t> shape = {out.size(0), out.size(1)};
  expect(hidden, "hidden", shape, out.scalar_type());
  expect(input, "input", shape, out.scalar_type());
  expect(ln_weight, "ln_weight", {shape[1]}, ScalarType::Float);
  expect(ln_bias, "ln_bias", {shape[1]}, ScalarType::Float);
  const Tensor p = new_attention(out, m, out.size(0));
  const auto kept = [&](bool is_kept) {
    return is_kept ? torch::stable::empty_like(hidden) : torch::stable::new_empty(hidden, {0});
  };
  const Tensor summed = kept(save && ln_before), total = kept(save);
  with_dtype(out, [&]<typename T>() {
    const Projection<T> projection(m, weights, {hidden}, std::nullopt);
    const Matrix<T> to = matrix<T>(out);
    const int64_t width = to.columns;
    auto pass_at = [&](int64_t first) {
      NormRows<T> pass{};
      pass.hidden = data<T>(hidden) + first * width;
      pass.input = data<T>(input) + first * width;
      pass.out = to.data + first * width;
      pass.weight = data<float>(ln_weight);
      pass.bias = data<float>(ln_bias);
      pass.eps = static_cast<float>(ln_eps);
      pass.width = width;
      return pass;
    };
    forward_blocks(
        m, projection, mask, std::nullopt, out, data<float>(p),
        [&](int64_t first, int64_t rows) -> const T* {
          if (!ln_before) return nullptr;
          // the adapters' input lies in the output's rows until the last product overwrites them
          const NormRows<T> pass = pass_at(first);
          normalise(pass, rows);
          return pass.out;
        },
        [&](int64_t first, int64_t rows) {
          NormRows<T> pass = pass_at(first);
          pass.mix = pass.out;
          if (save && ln_before) pass.summed = data<T>(summed) + first * width;
          if (save) pass.total = data<T>(total) + first * width;
          normalise(pass, rows);
        });
  });
  return {out, p, summed, total};
}

struct Needs {
  bool x, query, down, score, out, offset;
};

struct Gradients {
  Tensor dx, dquery, dw_down, db_down, dw_score, db_score, dw_out, doffset;
};

// Gradients for one given `grad_out`. The row-wise results are kept for all rows while a weight's
// gradient is wanted, because one long product per weight is faster than one per block and, in
// bf16, rounds once; otherwise one block's buffer is used again and again.
template <typename T>
Gradients backward(const Tensor& grad_out, const std::vector<Tensor>& x,
                   const OptionalTensor& query, const Weights& w, const Tensor& p,
                   const std::vector<int64_t>& sizes, const std::vector<int64_t>& activations,
                   const Needs& needs) {
  const Mixture m = describe(w, sizes, activations, first_of(x));
  STD_TORCH_CHECK(m.scored || !(needs.query || needs.offset),
                  "needs: without w_score neither query nor score_offset has a gradient");
  const std::vector<int64_t> shape = {x[0].size(0), x[0].size(1)};
  expect_inputs(m, x, query, shape);
  expect(grad_out, "grad_out", shape, x[0].scalar_type());
  if (m.scored) expect(p, "p", {shape[0], m.adapters}, ScalarType::Float);
  const Projection<T> projection(m, w, x, query);
  const Matrix<T> grad = matrix<T>(grad_out);
  const int64_t total = grad.rows, width = grad.columns, num_inputs = projection.num_inputs();
  const int64_t used = m.columns + m.adapters, stride = projection.buffer_stride;
  const int64_t out_rows = w.w_out.size(0), g_stride = whole_lines<T>(out_rows);

  auto empty = [&] { return torch::stable::new_empty(grad_out, {0}); };
  // the gradient of a weight with padding rows: those are zero, the others still to be computed
  auto new_padded = [&](bool needed, int64_t rows) {
    if (!needed) return empty();
    const Tensor gradient = torch::stable::new_empty(grad_out, {rows, width});
    std::fill_n(data<T>(gradient) + used * width, (rows - used) * width, T{});
    return gradient;
  };
  const bool score_weights = needs.score && m.scored;
  const int64_t score_rows = m.scored ? w.w_score->size(0) : 0;
  Gradients result{
      needs.x ? torch::stable::new_empty(grad_out, {num_inputs, total, width}) : empty(),
      needs.query ? torch::stable::new_empty(grad_out, {total, width}) : empty(),
      needs.down ? torch::stable::new_empty(grad_out, {m.columns, width}) : empty(),
      empty(),
      new_padded(score_weights, score_rows),
      empty(),
      new_padded(needs.out, out_rows),
      empty(),
  };
  const Tensor db_down = torch::stable::new_zeros(grad_out, {m.columns}, ScalarType::Float);
  const Tensor db_score =
      torch::stable::new_zeros(grad_out, {std::max(score_rows, used)}, ScalarType::Float);
  if (needs.offset) {
    result.doffset = torch::stable::new_empty(grad_out, {total}, ScalarType::Float);
  }

  const bool needs_pre = needs.x || needs.down;
  // dquery goes into dx[0] when the query is x[0]
  const bool query_is_x = m.scored && !query;
  const bool needs_score = m.scored && (needs.score || needs.query || (needs.x && query_is_x));
  const bool keep = needs.down || score_weights || needs.out;
  const int64_t block = std::min(total, kBlockRows), kept = keep ? total : block;
  const Tensor y_buffer = torch::stable::new_empty(grad_out, {kept, stride});
  const Tensor g_buffer = torch::stable::new_empty(grad_out, {kept, g_stride});
  // per chunk of a block: [sum_pre (D) | sum_score (D + N) | scratch (2 D + N)]
  const int64_t sums = m.columns + used, chunk_width = sums + 2 * m.columns + m.adapters;
  const int64_t block_chunks = (block + kChunkRows - 1) / kChunkRows;
  const int64_t all_chunks = (total + kChunkRows - 1) / kChunkRows;
  const Tensor scratch =
      torch::stable::new_empty(grad_out, {block_chunks, chunk_width - sums}, ScalarType::Float);
  const Tensor partial =
      torch::stable::new_zeros(grad_out, {all_chunks, sums}, ScalarType::Float);

  for (int64_t first = 0; first < total; first += block) {
    const int64_t rows = std::min(block, total - first), offset = keep ? first : 0;
    const Matrix<T> y{data<T>(y_buffer) + offset * stride, rows, stride, stride};
    const Matrix<T> g{data<T>(g_buffer) + offset * g_stride, rows, g_stride, g_stride};
    projection.project(first, y, nullptr, needs_pre);
    product(g.column_range(0, out_rows), grad.row_range(first, rows),
            matrix<T>(w.w_out).transposed());

    BackwardRows<T> pass{};
    pass.y = y.data, pass.g = g.data, pass.y_stride = stride, pass.g_stride = g_stride;
    pass.mask = w.mask ? data<float>(w.mask) + first * m.adapters : nullptr;
    pass.p = m.scored ? data<float>(p) + first * m.adapters : nullptr;
    pass.needs_pre = needs_pre, pass.needs_score = needs_score;
    pass.doffset = needs.offset ? data<float>(result.doffset) + first : nullptr;
    parallel_chunks(rows, [&](int64_t chunk, int64_t begin, int64_t end) {
      BackwardRows<T> mine = pass;
      float* mine_partial = data<float>(partial) + (first / kChunkRows + chunk) * sums;
      mine.sum_pre = needs.down ? mine_partial : nullptr;
      mine.sum_score = score_weights ? mine_partial + m.columns : nullptr;
      mine.scratch = data<float>(scratch) + chunk * (chunk_width - sums);
      backward_rows(m, mine, begin, end);
    });

    const Matrix<T> dscore = y.column_range(m.columns, used);
    if (needs.x) {
      const Matrix<T> dx{data<T>(result.dx), num_inputs * total, width, width};
      if (projection.joint()) {
        product(dx.row_range(first, rows), y.column_range(0, m.columns + used), projection.both());
      } else {
        for (int64_t i = 0; i < num_inputs; ++i) {
          const auto [column, count] = projection.columns_of(i);
          product(dx.row_range(i * total + first, rows), y.column_range(column, count),
                  projection.down_of(i));
        }
        if (query_is_x) product(dx.row_range(first, rows), dscore, projection.score(), true);
      }
    }
    if (needs.query) {
      product(matrix<T>(result.dquery).row_range(first, rows), dscore, projection.score());
    }
  }

  const Matrix<T> y{data<T>(y_buffer), total, stride, stride};
  const Matrix<T> g{data<T>(g_buffer), total, g_stride, g_stride};
  auto sum_partials = [&](const Tensor& to, int64_t column, int64_t count) {
    sum_rows(data<float>(partial) + column, all_chunks, sums, count, data<float>(to));
  };
  if (needs.down) {
    for (int64_t i = 0; i < num_inputs; ++i) {
      const auto [column, count] = projection.columns_of(i);
      product(matrix<T>(result.dw_down).row_range(column, count),
              y.column_range(column, count).transposed(), projection.input(i));
    }
    sum_partials(db_down, 0, m.columns);
    result.db_down = torch::stable::to(db_down, dtype_of<T>());
  }
  if (score_weights) {
    product(matrix<T>(result.dw_score).row_range(0, used),
            y.column_range(m.columns, used).transposed(), projection.query());
    sum_partials(db_score, m.columns, used);
    result.db_score = torch::stable::to(db_score, dtype_of<T>());
  }
  if (needs.out) {
    product(matrix<T>(result.dw_out).row_range(0, used), g.column_range(0, used).transposed(),
            grad);
  }
  return result;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_fusion_backward(
    Tensor grad_out, std::vector<Tensor> x, OptionalTensor query, Tensor w_down, Tensor b_down,
    OptionalTensor w_score, OptionalTensor b_score, Tensor w_out, OptionalTensor temperature,
    OptionalTensor mask, Tensor p, std::vector<int64_t> sizes, std::vector<int64_t> activations,
    bool needs_x, bool needs_query, bool needs_down, bool needs_score, bool needs_out,
    bool needs_offset) {
  const Weights weights{w_down, b_down, w_score, b_score, w_out, temperature, mask};
  const Needs needs{needs_x, needs_query, needs_down, needs_score, needs_out, needs_offset};
  return with_dtype(grad_out, [&]<typename T>() {
    const Gradients r =
        backward<T>(grad_out, x, query, weights, p, sizes, activations, needs);
    return std::tuple{r.dx,       r.dquery,   r.dw_down, r.db_down,
                      r.dw_score, r.db_score, r.dw_out,  r.doffset};
  });
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> adapter_fusion_norm_backward(
    Tensor grad_out, OptionalTensor hidden, Tensor summed, Tensor pre_norm, Tensor ln_weight,
    Tensor ln_bias, double ln_eps, bool ln_before, Tensor w_down, Tensor b_down,
    OptionalTensor w_score, OptionalTensor b_score, Tensor w_out, OptionalTensor temperature,
    OptionalTensor mask, Tensor p, std::vector<int64_t> sizes, std::vector<int64_t> activations,
    bool needs_x, bool needs_down, bool needs_score, bool needs_out) {
  const Weights weights{w_down, b_down, w_score, b_score, w_out, temperature, mask};
  const Needs needs{needs_x, false, needs_down, needs_score, needs_out, false};
  return with_dtype(grad_out, [&]<typename T>() {
    expect_matrix(pre_norm, "pre_norm");
    STD_TORCH_CHECK(ln_before || hidden, "hidden: needed without ln_before; got None");
    const int64_t rows = pre_norm.size(0), width = pre_norm.size(1);
    expect(pre_norm, "pre_norm", {rows, width}, grad_out.scalar_type());
    if (ln_before) expect(summed, "summed", {rows, width}, grad_out.scalar_type());
    expect(grad_out, "grad_out", {rows, width}, grad_out.scalar_type());
    expect(ln_weight, "ln_weight", {width}, ScalarType::Float);
    expect(ln_bias, "ln_bias", {width}, ScalarType::Float);
    const float* weight = data<float>(ln_weight);
    const float eps = static_cast<float>(ln_eps);
    const Tensor grad = torch::stable::empty_like(grad_out);
    normalise_backward<T>({data<T>(grad_out), data<T>(pre_norm), nullptr, data<T>(grad), weight,
                           eps, width},
                          rows);
    Tensor x = ln_before ? torch::stable::empty_like(grad_out) : *hidden;
    if (ln_before) {
      NormRows<T> pass{};
      pass.hidden = data<T>(summed), pass.out = data<T>(x);
      pass.weight = weight, pass.bias = data<float>(ln_bias), pass.eps = eps, pass.width = width;
      normalise(pass, rows);
    }
    Gradients r = backward<T>(grad, {x}, std::nullopt, weights, p, sizes, activations, needs);
    Tensor dhidden = torch::stable::new_empty(grad_out, {0});
    Tensor dinput = torch::stable::new_empty(grad_out, {0});
    if (needs_x) {
      dhidden = torch::stable::select(r.dx, 0, 0);
      if (ln_before) {
        normalise_backward<T>({data<T>(dhidden), data<T>(summed), data<T>(grad), data<T>(dhidden),
                               weight, eps, width},
                              rows);
      } else {
        add_rows(matrix<T>(dhidden), data<T>(grad));
        dinput = grad;
      }
    }
    return std::tuple{dhidden,    dinput,     r.dw_down, r.db_down,
                      r.dw_score, r.db_score, r.dw_out};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastfusion, CPU, m) {
  m.impl("adapter_fusion_cpu", TORCH_BOX(&adapter_fusion));
  m.impl("adapter_fusion_backward_cpu", TORCH_BOX(&adapter_fusion_backward));
  m.impl("adapter_fusion_norm_cpu", TORCH_BOX(&adapter_fusion_norm));
  m.impl("adapter_fusion_norm_backward_cpu", TORCH_BOX(&adapter_fusion_norm_backward));
}

}  // namespace fastfusion::cpu
