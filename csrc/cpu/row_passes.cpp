#include "row_passes.h"

// One clone per instruction set, chosen when the library is loaded. Everything that a clone calls
// is always_inline, so that it is compiled for the clone's instructions. ifunc resolvers run before
// ASan is ready, so a sanitizer build has the plain version only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FASTFUSION_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTFUSION_CLONES
#endif

#define FASTFUSION_SIMD _Pragma("omp simd")

namespace fastfusion::cpu {
namespace {

template <int64_t code, typename T>
FASTFUSION_INLINE void activate_run(const T* y, const float* bias, float* z, int64_t begin,
                                    int64_t end) {
  FASTFUSION_SIMD
  for (int64_t j = begin; j < end; ++j) z[j] = activate<code>(load(y[j]) + bias[j]).value;
}

template <int64_t code, typename T>
FASTFUSION_INLINE void activate_run_with_slope(const T* y, const float* bias, float* z,
                                               float* slope, int64_t begin, int64_t end) {
  FASTFUSION_SIMD
  for (int64_t j = begin; j < end; ++j) {
    const ValueSlope result = activate<code>(load(y[j]) + bias[j]);
    z[j] = result.value;
    slope[j] = result.slope;
  }
}

// The only branch on an activation: once per row and run of columns. `slope` may be null.
template <typename T>
FASTFUSION_INLINE void activate_row(const Mixture& m, const T* y, float* z, float* slope) {
  for (const Run& run : m.runs) {
#define FASTFUSION_CASE(code)                                                          \
  case code:                                                                           \
    if (slope) {                                                                       \
      activate_run_with_slope<code>(y, m.b_down, z, slope, run.begin, run.end);        \
    } else {                                                                           \
      activate_run<code>(y, m.b_down, z, run.begin, run.end);                          \
    }                                                                                  \
    break;
    switch (run.activation) {
      FASTFUSION_CASE(kLinear)
      FASTFUSION_CASE(kRelu)
      FASTFUSION_CASE(kGelu)
      FASTFUSION_CASE(kGeluNew)
      FASTFUSION_CASE(kSilu)
      FASTFUSION_CASE(kTanh)
      FASTFUSION_CASE(kSigmoid)
      FASTFUSION_CASE(kLeakyRelu)
    }
#undef FASTFUSION_CASE
  }
}

FASTFUSION_INLINE void softmax(float* values, int64_t count) {
  float top = values[0];
  for (int64_t i = 1; i < count; ++i) top = values[i] > top ? values[i] : top;
  FASTFUSION_SIMD
  for (int64_t i = 0; i < count; ++i) values[i] = vexp(values[i] - top);
  float total = 0.f;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  const float inverse = 1.f / total;
  for (int64_t i = 0; i < count; ++i) values[i] *= inverse;
}

// oneDNN's bf16 products read a row's columns up to the next multiple of 32 and multiply them by
// zero (torch 2.13, AMX): what lies behind the columns in use must not be NaN. Score weights may
// have padding rows that hold anything, and the buffers' own padding is uninitialised.
template <typename T>
FASTFUSION_INLINE void zero(T* row, int64_t from, int64_t to) {
  FASTFUSION_SIMD
  for (int64_t j = from; j < to; ++j) row[j] = T{};
}

template <typename T>
FASTFUSION_INLINE void forward_rows_body(const Mixture& m, const ForwardRows<T>& rows,
                                         int64_t begin, int64_t end) {
  const int64_t columns = m.columns, adapters = m.adapters;
  float* z = rows.scratch;
  for (int64_t row = begin; row < end; ++row) {
    T* y = rows.y + row * rows.y_stride;
    activate_row<T>(m, y, z, nullptr);
    zero(y, m.used(), rows.y_stride);
    if (!m.scored) {
      FASTFUSION_SIMD
      for (int64_t j = 0; j < columns; ++j) store(y[j], z[j]);
      for (int64_t i = 0; i < adapters; ++i) store(y[columns + i], 1.f);
      continue;
    }
    const T* t = y + columns;
    const float offset = rows.offset ? rows.offset[row] : 0.f;
    float* p = rows.p + row * adapters;
    for (int64_t i = 0; i < adapters; ++i) {
      float score = load(t[columns + i]) + m.b_score[columns + i] + offset;
#pragma omp simd reduction(+ : score)
      for (int64_t j = m.starts[i]; j < m.starts[i + 1]; ++j) {
        score += z[j] * (load(t[j]) + m.b_score[j]);
      }
      p[i] = score * m.inv_temperature;
    }
    if (rows.mask) {
      for (int64_t i = 0; i < adapters; ++i) p[i] *= rows.mask[row * adapters + i];
    }
    softmax(p, adapters);
    // t has been read: p may overwrite its first columns
    for (int64_t i = 0; i < adapters; ++i) {
      const float weight = p[i];
      FASTFUSION_SIMD
      for (int64_t j = m.starts[i]; j < m.starts[i + 1]; ++j) store(y[j], weight * z[j]);
      store(y[columns + i], weight);
    }
  }
}

template <typename T>
FASTFUSION_INLINE void backward_rows_body(const Mixture& m, const BackwardRows<T>& rows,
                                          int64_t begin, int64_t end) {
  const int64_t columns = m.columns, adapters = m.adapters;
  float* z = rows.scratch;
  float* slope = rows.needs_pre ? z + columns : nullptr;
  float* ds = z + 2 * columns;
  for (int64_t row = begin; row < end; ++row) {
    T* y = rows.y + row * rows.y_stride;
    T* g = rows.g + row * rows.g_stride;
    activate_row<T>(m, y, z, slope);
    // without scores only the columns are written
    zero(y, m.scored ? m.used() : columns, rows.y_stride);
    zero(g, columns + adapters, rows.g_stride);
    if (!m.scored) {
      if (rows.needs_pre) {
        FASTFUSION_SIMD
        for (int64_t j = 0; j < columns; ++j) store(y[j], load(g[j]) * slope[j]);
      }
      FASTFUSION_SIMD
      for (int64_t j = 0; j < columns; ++j) store(g[j], z[j]);
      for (int64_t i = 0; i < adapters; ++i) store(g[columns + i], 1.f);
    } else {
      T* t = y + columns;
      const float* p = rows.p + row * adapters;
      float mean = 0.f;
      for (int64_t i = 0; i < adapters; ++i) {
        float dp = load(g[columns + i]);
#pragma omp simd reduction(+ : dp)
        for (int64_t j = m.starts[i]; j < m.starts[i + 1]; ++j) dp += load(g[j]) * z[j];
        ds[i] = dp;
        mean += p[i] * dp;
      }
      float doffset = 0.f;
      for (int64_t i = 0; i < adapters; ++i) {
        ds[i] = p[i] * (ds[i] - mean) * m.inv_temperature;
        if (rows.mask) ds[i] *= rows.mask[row * adapters + i];
        doffset += ds[i];
      }
      if (rows.doffset) rows.doffset[row] = doffset;
      for (int64_t i = 0; i < adapters; ++i) {
        const int64_t from = m.starts[i], to = m.starts[i + 1];
        const float weight = p[i], score_grad = ds[i];
        if (rows.needs_pre) {
          FASTFUSION_SIMD
          for (int64_t j = from; j < to; ++j) {
            const float t_j = load(t[j]) + m.b_score[j];
            store(y[j], (weight * load(g[j]) + score_grad * t_j) * slope[j]);
          }
        }
        if (rows.needs_score) {
          FASTFUSION_SIMD
          for (int64_t j = from; j < to; ++j) store(t[j], score_grad * z[j]);
          store(t[columns + i], score_grad);
        }
        FASTFUSION_SIMD
        for (int64_t j = from; j < to; ++j) store(g[j], weight * z[j]);
        store(g[columns + i], weight);
      }
      if (rows.sum_score) {
        FASTFUSION_SIMD
        for (int64_t j = 0; j < columns + adapters; ++j) rows.sum_score[j] += load(t[j]);
      }
    }
    if (rows.sum_pre) {
      FASTFUSION_SIMD
      for (int64_t j = 0; j < columns; ++j) rows.sum_pre[j] += load(y[j]);
    }
  }
}

// The biased standard deviation's inverse by two passes: a single pass over sums and squares would
// cancel. A row stays in L1 between them.
template <typename T, bool has_mix, bool has_input>
FASTFUSION_INLINE void norm_row(const NormRows<T>& rows, int64_t first) {
  const int64_t width = rows.width;
  const T* hidden = rows.hidden + first;
  const T* input = has_input ? rows.input + first : nullptr;
  const T* mix = has_mix ? rows.mix + first : nullptr;
  T* out = rows.out + first;
  auto summed = [&](int64_t j) __attribute__((always_inline)) {
    return has_input ? load(hidden[j]) + load(input[j]) : load(hidden[j]);
  };
  auto total = [&](int64_t j) __attribute__((always_inline)) {
    return has_mix ? load(mix[j]) + summed(j) : summed(j);
  };
  float mean = 0.f, variance = 0.f;
#pragma omp simd reduction(+ : mean)
  for (int64_t j = 0; j < width; ++j) mean += total(j);
  mean /= static_cast<float>(width);
#pragma omp simd reduction(+ : variance)
  for (int64_t j = 0; j < width; ++j) {
    const float centred = total(j) - mean;
    variance += centred * centred;
  }
  const float inverse = 1.f / __builtin_sqrtf(variance / static_cast<float>(width) + rows.eps);
  if (rows.summed) {
    T* to = rows.summed + first;
    FASTFUSION_SIMD
    for (int64_t j = 0; j < width; ++j) store(to[j], summed(j));
  }
  if (rows.total) {
    T* to = rows.total + first;
    FASTFUSION_SIMD
    for (int64_t j = 0; j < width; ++j) store(to[j], total(j));
  }
  FASTFUSION_SIMD
  for (int64_t j = 0; j < width; ++j) {
    store(out[j], (total(j) - mean) * inverse * rows.weight[j] + rows.bias[j]);
  }
}

template <typename T>
FASTFUSION_INLINE void norm_rows_body(const NormRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (rows.mix) {
      norm_row<T, true, true>(rows, row * rows.width);
    } else if (rows.input) {
      norm_row<T, false, true>(rows, row * rows.width);
    } else {
      norm_row<T, false, false>(rows, row * rows.width);
    }
  }
}

template <typename T>
FASTFUSION_INLINE void norm_grad_rows_body(const NormGradRows<T>& rows, int64_t begin,
                                           int64_t end) {
  const int64_t width = rows.width;
  const float inverse_width = 1.f / static_cast<float>(width);
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = rows.grad + row * width;
    const T* value = rows.value + row * width;
    T* out = rows.out + row * width;
    float mean = 0.f, variance = 0.f, grad_mean = 0.f, projection = 0.f;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < width; ++j) mean += load(value[j]);
    mean *= inverse_width;
#pragma omp simd reduction(+ : variance, grad_mean, projection)
    for (int64_t j = 0; j < width; ++j) {
      const float centred = load(value[j]) - mean, weighted = load(grad[j]) * rows.weight[j];
      variance += centred * centred;
      grad_mean += weighted;
      projection += weighted * centred;
    }
    const float inverse = 1.f / __builtin_sqrtf(variance * inverse_width + rows.eps);
    grad_mean *= inverse_width;
    projection *= inverse_width * inverse * inverse;
    const T* add = rows.add ? rows.add + row * width : nullptr;
    auto gradient = [&](int64_t j) __attribute__((always_inline)) {
      const float centred = load(value[j]) - mean;
      return (load(grad[j]) * rows.weight[j] - grad_mean - centred * projection) * inverse;
    };
    if (add) {
      FASTFUSION_SIMD
      for (int64_t j = 0; j < width; ++j) store(out[j], load(add[j]) + gradient(j));
    } else {
      FASTFUSION_SIMD
      for (int64_t j = 0; j < width; ++j) store(out[j], gradient(j));
    }
  }
}

template <typename T>
FASTFUSION_INLINE void add_values_body(T* out, const T* addend, int64_t count) {
  FASTFUSION_SIMD
  for (int64_t j = 0; j < count; ++j) store(out[j], load(out[j]) + load(addend[j]));
}

}  // namespace

FASTFUSION_CLONES
void forward_rows(const Mixture& m, const ForwardRows<float>& rows, int64_t begin, int64_t end) {
  forward_rows_body(m, rows, begin, end);
}
FASTFUSION_CLONES
void forward_rows(const Mixture& m, const ForwardRows<BFloat16>& rows, int64_t begin, int64_t end) {
  forward_rows_body(m, rows, begin, end);
}
FASTFUSION_CLONES
void backward_rows(const Mixture& m, const BackwardRows<float>& rows, int64_t begin, int64_t end) {
  backward_rows_body(m, rows, begin, end);
}
FASTFUSION_CLONES
void backward_rows(const Mixture& m, const BackwardRows<BFloat16>& rows, int64_t begin,
                   int64_t end) {
  backward_rows_body(m, rows, begin, end);
}
FASTFUSION_CLONES
void norm_rows(const NormRows<float>& rows, int64_t begin, int64_t end) {
  norm_rows_body(rows, begin, end);
}
FASTFUSION_CLONES
void norm_rows(const NormRows<BFloat16>& rows, int64_t begin, int64_t end) {
  norm_rows_body(rows, begin, end);
}
FASTFUSION_CLONES
void norm_grad_rows(const NormGradRows<float>& rows, int64_t begin, int64_t end) {
  norm_grad_rows_body(rows, begin, end);
}
FASTFUSION_CLONES
void norm_grad_rows(const NormGradRows<BFloat16>& rows, int64_t begin, int64_t end) {
  norm_grad_rows_body(rows, begin, end);
}
FASTFUSION_CLONES
void add_values(float* out, const float* addend, int64_t count) {
  add_values_body(out, addend, count);
}
FASTFUSION_CLONES
void add_values(BFloat16* out, const BFloat16* addend, int64_t count) {
  add_values_body(out, addend, count);
}
FASTFUSION_CLONES
void sum_rows(const float* partial, int64_t rows, int64_t stride, int64_t width, float* out) {
  FASTFUSION_SIMD
  for (int64_t j = 0; j < width; ++j) out[j] = 0.f;
  for (int64_t row = 0; row < rows; ++row) {
    FASTFUSION_SIMD
    for (int64_t j = 0; j < width; ++j) out[j] += partial[row * stride + j];
  }
}

}  // namespace fastfusion::cpu
