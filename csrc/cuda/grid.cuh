// The grid of a weight row, with the bits that reference.py gives: every rounding that stands there is spelled out here, because nvcc
// would fuse products into sums.
#pragma once

#include "fake_quant.h"

namespace qrealign {

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a float that large has no bits for a fraction

struct RowGrid {
  float low, high;              // bounds
  float scale, reciprocal;      // of a step
  float lowest, highest;        // codes at the bounds
  float low_steps, high_steps;  // the bounds over the scale
  float minimum, maximum;
  float low_share, high_share;  // of the extremes that the bounds keep
  float raw_scale;
  float divisor, divisor_reciprocal;
  float low_part, high_part;  // of the scale's gradient that the bounds get
};

__device__ __forceinline__ float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, expf(-x))); }

// x / y with the reciprocal of y known, as `divide` in triton_math.py; kExact for a y of more than 11 significant bits.
template <bool kExact>
__device__ __forceinline__ float divide(float x, float y, float reciprocal) {
  float quotient = __fmul_rn(x, reciprocal);
  quotient = __fmaf_rn(__fmaf_rn(-quotient, y, x), reciprocal, quotient);
  if (kExact) quotient = __fmaf_rn(__fmaf_rn(-quotient, y, x), reciprocal, quotient);
  return quotient;
}

// What is beyond a bound becomes the bound; a NaN stays one.
__device__ __forceinline__ float clip(float x, float low, float high) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
}

// What a transform says of row n; 0 and 1 where it says nothing.
struct RowInputs {
  float low_logit = 0.0f, high_logit = 0.0f, divisor = 1.0f;

  __device__ RowInputs(const RowTransform& transform, int n) {
    if (transform.low_logit) low_logit = transform.low_logit[n];
    if (transform.high_logit) high_logit = transform.high_logit[n];
    if (transform.row_divisor) divisor = transform.row_divisor[n];
  }
};

// The grid of a row whose extremes, zero among them, are known.
__device__ inline RowGrid row_grid(float minimum, float maximum, const RowInputs& inputs, const RowTransform& transform,
                                   const CodeGrid& codes) {
  RowGrid grid;
  grid.minimum = minimum;
  grid.maximum = maximum;
  grid.low_share = transform.low_logit ? sigmoid(inputs.low_logit) : 1.0f;
  grid.high_share = transform.high_logit ? sigmoid(inputs.high_logit) : 1.0f;
  grid.low = __fmul_rn(minimum, grid.low_share);
  grid.high = __fmul_rn(maximum, grid.high_share);
  const float qmin = codes.qmin, qmax = codes.qmax;
  // The side that sets the scale gets its gradient; equal sides share it.
  const float from_low = __fdiv_rn(grid.low, qmin), from_high = __fdiv_rn(grid.high, qmax);
  const float by_low = from_low > from_high ? 1.0f : from_low == from_high ? 0.5f : 0.0f;
  grid.low_part = by_low / qmin;
  grid.high_part = (1.0f - by_low) / qmax;
  grid.raw_scale = fmaxf(from_high, from_low);
  grid.scale = __bfloat162float(__float2bfloat16_rn(fmaxf(grid.raw_scale, codes.min_scale)));
  grid.reciprocal = __fdiv_rn(1.0f, grid.scale);
  grid.low_steps = __fdiv_rn(grid.low, grid.scale);
  grid.high_steps = __fdiv_rn(grid.high, grid.scale);
  grid.lowest = fmaxf(rintf(grid.low_steps), qmin);
  grid.highest = fminf(rintf(grid.high_steps), qmax);
  grid.divisor = inputs.divisor;
  grid.divisor_reciprocal = __fdiv_rn(1.0f, grid.divisor);
  return grid;
}

// Eight bfloat16 values as float32: each is the upper half of one.
__device__ __forceinline__ void unpack(const uint4& packed, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = word_of(packed, i);
    values[2 * i] = __uint_as_float(pair << 16);
    values[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
  }
}

__device__ __forceinline__ void load_eight(const float* from, float (&values)[8]) {
  const float4 first = *reinterpret_cast<const float4*>(from), last = *reinterpret_cast<const float4*>(from + 4);
  values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
  values[4] = last.x, values[5] = last.y, values[6] = last.z, values[7] = last.w;
}

__device__ __forceinline__ void scale_eight(float (&values)[8], const float (&factors)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(values[i], factors[i]);
}

__device__ __forceinline__ void divide_eight(float (&values)[8], const RowGrid& grid) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = divide<true>(values[i], grid.divisor, grid.divisor_reciprocal);
}

// Quotients rounded to nearest keep the order of what is divided, so that those of the extremes are the extremes.
__device__ __forceinline__ void divide_extremes(float& minimum, float& maximum, float divisor) {
  const float low = __fdiv_rn(minimum, divisor), high = __fdiv_rn(maximum, divisor);
  minimum = fminf(low, high);
  maximum = fmaxf(low, high);
}

}  // namespace qrealign
