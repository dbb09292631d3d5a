// Scalar functions that gcc turns into SIMD code: no libm call, no branch, no table.
//
// The polynomials are weighted least-squares fits (Lawson iterations, close to minimax) made with
// 40-digit arithmetic; the bound beside each is the relative error of the fit in exact arithmetic.
// Rounding adds one or two units in the last place, as it does in PyTorch's own fp32 kernels.
#pragma once

#include <bit>
#include <cstdint>

#define FASTFUSION_INLINE inline __attribute__((always_inline))

namespace fastfusion::cpu {

// exp(x); 0 below -87.3 (the last normal result) and infinity above 88.37 = 127.5 ln(2), where the
// power of two below becomes the bits of infinity. NaN stays NaN.
FASTFUSION_INLINE float vexp(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: no conversion, which
  // would be undefined for NaN.
  constexpr float kRound = 12582912.f;
  const float clamped = x < -87.3f ? -87.3f : (x > 89.f ? 89.f : x);
  const float shifted = clamped * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * kLn2High) - n * kLn2Low;
  // exp(r) on [-ln(2)/2, ln(2)/2], 3.1e-9
  float poly = 1.381459638e-03f;
  poly = poly * r + 8.368717091e-03f;
  poly = poly * r + 4.166838809e-02f;
  poly = poly * r + 1.666652063e-01f;
  poly = poly * r + 4.999999345e-01f;
  poly = poly * (r * r) + r + 1.f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.3f ? 0.f : poly * power;
}

FASTFUSION_INLINE float vsigmoid(float x) {
  return 1.f / (1.f + vexp(-x));
}

FASTFUSION_INLINE float vtanh(float x) {
  const float magnitude = x < 0.f ? -x : x;
  // x + x^3 P(x^2) below 0.625, 4.4e-9
  const float square = x * x;
  float poly = -5.704990410e-03f;
  poly = poly * square + 2.063909066e-02f;
  poly = poly * square + -5.373971628e-02f;
  poly = poly * square + 1.333144222e-01f;
  poly = poly * square + -3.333328194e-01f;
  const float small = x + x * square * poly;
  const float large = 1.f - 2.f / (vexp(2.f * magnitude) + 1.f);
  return magnitude < 0.625f ? small : (x < 0.f ? -large : large);
}

struct Normal {
  float cdf, density;
};

// The normal distribution: (1 + erf(x / sqrt 2)) / 2 and its derivative, from one exponential.
FASTFUSION_INLINE Normal vnormal(float x) {
  const float magnitude = x < 0.f ? -x : x;
  const float gauss = vexp(-0.5f * x * x);
  const float t = 1.f / (1.f + 0.35f * magnitude);
  // the upper tail over exp(-x^2/2), a polynomial in 1 / (1 + 0.35 |x|) up to |x| = 13.5, 3.2e-8
  float poly = -2.912565657e-02f;
  poly = poly * t + 1.438716295e-01f;
  poly = poly * t + -2.555040940e-01f;
  poly = poly * t + 1.589295640e-01f;
  poly = poly * t + -2.293782458e-02f;
  poly = poly * t + 1.054334116e-01f;
  poly = poly * t + 1.198522773e-01f;
  poly = poly * t + 1.398591089e-01f;
  poly = poly * t + 1.396215681e-01f;
  const float tail = gauss * (poly * t);
  return {x > 0.f ? 1.f - tail : tail, gauss * 0.398942280f};
}

// The codes of fastfusion/ops/activations.py.
enum Activation : int64_t { kLinear, kRelu, kGelu, kGeluNew, kSilu, kTanh, kSigmoid, kLeakyRelu };
constexpr int64_t kNumActivations = 8;

struct ValueSlope {
  float value, slope;
};

// The function and its derivative; the compiler drops the half that a caller does not read.
template <int64_t code>
FASTFUSION_INLINE ValueSlope activate(float x) {
  if constexpr (code == kRelu) {
    return {x < 0.f ? 0.f : x, x > 0.f ? 1.f : 0.f};
  } else if constexpr (code == kGelu) {
    const Normal normal = vnormal(x);
    return {x * normal.cdf, normal.cdf + x * normal.density};
  } else if constexpr (code == kGeluNew) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u), exactly 0 or 1 at |x| = 20: clamped, x^2 does not overflow
    constexpr float kTwoSqrtTwoOverPi = 1.59576912f, kCubic = 0.044715f;
    const float c = x < -20.f ? -20.f : (x > 20.f ? 20.f : x), square = c * c;
    const float s = vsigmoid(kTwoSqrtTwoOverPi * (c + kCubic * square * c));
    return {x * s, s + c * s * (1.f - s) * kTwoSqrtTwoOverPi * (1.f + 3.f * kCubic * square)};
  } else if constexpr (code == kSilu) {
    const float s = vsigmoid(x);
    return {x * s, s * (1.f + x * (1.f - s))};
  } else if constexpr (code == kTanh) {
    const float y = vtanh(x);
    return {y, 1.f - y * y};
  } else if constexpr (code == kSigmoid) {
    const float s = vsigmoid(x);
    return {s, s * (1.f - s)};
  } else if constexpr (code == kLeakyRelu) {
    return {x > 0.f ? x : 0.01f * x, x > 0.f ? 1.f : 0.01f};
  } else {
    return {x, 1.f};
  }
}

// bf16 as its 16 bits; widening is a shift, narrowing rounds to nearest even and keeps NaN.
struct BFloat16 {
  uint16_t bits;
};

FASTFUSION_INLINE float load(const float& x) {
  return x;
}
FASTFUSION_INLINE float load(const BFloat16& x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
FASTFUSION_INLINE void store(float& to, float x) {
  to = x;
}
FASTFUSION_INLINE void store(BFloat16& to, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace fastfusion::cpu
