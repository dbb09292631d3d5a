// The vectorised passes over rows between the matrix products. All of them are serial: the caller
// splits the rows over threads. Sums and intermediate values are fp32; `T` is float or BFloat16.
//
// Symbols: D columns in all, N adapters, adapter i owns columns [starts[i], starts[i + 1]).
#pragma once

#include <cstdint>
#include <vector>

#include "vector_math.h"

namespace fastfusion::cpu {

// Neighbouring columns with one activation.
struct Run {
  int64_t begin, end, activation;
};

// What all rows of a mixture share.
struct Mixture {
  int64_t columns, adapters;
  std::vector<int64_t> starts;
  std::vector<Run> runs;
  bool scored;           // false: every adapter has weight 1
  const float* b_down;   // [D]
  const float* b_score;  // [D + N]
  float inv_temperature;

  // the columns of a row of `y` that a product writes or reads
  int64_t used() const { return columns + adapters + (scored ? columns : 0); }
};

// pre, t, c -> p, and [p*z ; p] for the last product.
//   y: rows of [x @ w_down.T (D) ; query @ w_score.T (D + N)], without biases; the first D + N
//      columns become [p*z ; p]. Zero behind them.
template <typename T>
struct ForwardRows {
  T* y;
  int64_t y_stride;
  const float* mask;    // [rows, N] or null
  const float* offset;  // [rows] or null
  float* p;             // [rows, N]
  float* scratch;       // [D]
};

// The same recomputed, with its gradients.
//   y: in as above, out [dpre (D) ; ds*z (D) ; ds (N)], zero behind.
//   g: in grad_out @ w_out.T = [dw ; dp], out w = [p*z ; p], zero behind.
template <typename T>
struct BackwardRows {
  T* y;
  T* g;
  int64_t y_stride, g_stride;
  const float* mask;
  const float* p;
  bool needs_pre, needs_score;  // whether dpre, and whether ds*z and ds, are wanted
  float* doffset;               // [rows] or null
  float* sum_pre;               // [D]: dpre summed over the rows, or null
  float* sum_score;             // [D + N], or null
  float* scratch;               // [2 * D + N]
};

// total = mix + (hidden + input); out = layer_norm(total). `mix` and `input` may be null;
// hidden + input goes to `summed` and total to `total`, each unless null. `out` may be `mix`.
template <typename T>
struct NormRows {
  const T* mix;
  const T* hidden;
  const T* input;
  T* summed;
  T* total;
  T* out;
  const float* weight;
  const float* bias;
  float eps;
  int64_t width;
};

// out = (add or 0) + the input's gradient of layer_norm(value). `out` may be `grad`.
template <typename T>
struct NormGradRows {
  const T* grad;
  const T* value;
  const T* add;
  T* out;
  const float* weight;
  float eps;
  int64_t width;
};

void forward_rows(const Mixture& m, const ForwardRows<float>& rows, int64_t begin, int64_t end);
void forward_rows(const Mixture& m, const ForwardRows<BFloat16>& rows, int64_t begin, int64_t end);
void backward_rows(const Mixture& m, const BackwardRows<float>& rows, int64_t begin, int64_t end);
void backward_rows(const Mixture& m, const BackwardRows<BFloat16>& rows, int64_t begin,
                   int64_t end);
void norm_rows(const NormRows<float>& rows, int64_t begin, int64_t end);
void norm_rows(const NormRows<BFloat16>& rows, int64_t begin, int64_t end);
void norm_grad_rows(const NormGradRows<float>& rows, int64_t begin, int64_t end);
void norm_grad_rows(const NormGradRows<BFloat16>& rows, int64_t begin, int64_t end);

// out += addend, over `count` values.
void add_values(float* out, const float* addend, int64_t count);
void add_values(BFloat16* out, const BFloat16* addend, int64_t count);

// out[j] = sum over `rows` of partial[row * stride + j], in the order of the rows.
void sum_rows(const float* partial, int64_t rows, int64_t stride, int64_t width, float* out);

}  // namespace fastfusion::cpu
