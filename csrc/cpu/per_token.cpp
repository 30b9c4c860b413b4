// Dynamic symmetric quantization of each token, in one pass over memory; bit-equal to reference.py.
#include <cmath>

#include "../common.h"

namespace qrealign {
namespace {

QREALIGN_INLINE float scale_of(const float* row, int64_t columns, CodeRange range) {
  // As integers, magnitudes without a sign have the order of the floats, and NaN is above them all.
  IntLanes lanes = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    IntLanes magnitude;
    std::memcpy(&magnitude, row + k, sizeof magnitude);
    magnitude &= 0x7FFFFFFF;
    lanes = magnitude > lanes ? magnitude : lanes;
  }
  int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits = std::max(bits, lanes[lane]);
  for (; k < columns; ++k) {
    int32_t magnitude;
    std::memcpy(&magnitude, row + k, sizeof magnitude);
    bits = std::max(bits, magnitude & 0x7FFFFFFF);
  }
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float scale = largest / ((range.qmax - range.qmin) / 2);
  return scale == 0.0f ? kZeroScaleReplacement : scale;
}

template <typename T>
QREALIGN_INLINE T code_of(T x, float scale, CodeRange range) {
  return clip(round_half_even(x / scale), range.qmin, range.qmax);
}

QREALIGN_CLONES void fake_range(const float* x, float* fake, int64_t begin, int64_t end, int64_t columns, CodeRange range) {
  for (int64_t r = begin; r < end; ++r) {
    const float* row = x + r * columns;
    float* out = fake + r * columns;
    const float scale = scale_of(row, columns, range);
    for (int64_t k = 0; k < columns; ++k) out[k] = code_of(row[k], scale, range) * scale;
  }
}

}  // namespace

QREALIGN_CLONES float quantize_token(const float* x, int8_t* codes, int64_t columns, CodeRange range) {
  const float scale = scale_of(x, columns, range);
  typedef int8_t Codes __attribute__((vector_size(kLanes)));
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const Lanes rounded = code_of(load_lanes(x + k), scale, range);
    const Codes lanes = __builtin_convertvector(__builtin_convertvector(rounded, IntLanes), Codes);
    std::memcpy(codes + k, &lanes, sizeof lanes);
  }
  for (; k < columns; ++k) codes[k] = static_cast<int8_t>(static_cast<int32_t>(code_of(x[k], scale, range)));
  return scale;
}

void fake_quant_per_token(const float* x, float* fake, int64_t row_count, int64_t columns, CodeRange range, int threads) {
  parallel_for(row_count, columns, threads,
               [&](int64_t begin, int64_t end) { fake_range(x, fake, begin, end, columns, range); });
}

void quantize_per_token(const float* x, int8_t* codes, float* scale, int64_t row_count, int64_t columns, CodeRange range,
                        int threads) {
  parallel_for(row_count, columns, threads,
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   scale[r] = quantize_token(x + r * columns, codes + r * columns, columns, range);
                 }
               });
}

}  // namespace qrealign
