// Shared by the native ops: row-parallel loops, argument structs, and the choice of an instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

// One body, compiled for several instruction sets; the loader picks one. No fused multiply-add is ever contracted
// (-ffp-contract=off), so every clone gives the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define QREALIGN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QREALIGN_CLONES
#endif
#define QREALIGN_INLINE inline __attribute__((always_inline))

namespace qrealign {

// How the storage dtype rounds a scale.
enum class ScaleKind : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct CodeRange {
  float qmin;
  float qmax;
};

// The grid of each row, as WeightGrid in reference.py; zero_point is null for symmetric grids.
struct Grid {
  float* minimum;
  float* maximum;
  float* low;
  float* high;
  float* raw_scale;
  float* scale;
  float* zero_point;
};

constexpr float kMinScale = 5.9604644775390625e-08f;              // 2**-24
constexpr float kZeroScaleReplacement = 1.1920928955078125e-07f;  // float32 epsilon

// Sixteen partial results of a row's reduction: the same ones on every instruction set, so sums have the same bits.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(kLanes * sizeof(int32_t))));

QREALIGN_INLINE Lanes load_lanes(const float* p) {
  Lanes lanes;
  std::memcpy(&lanes, p, sizeof lanes);
  return lanes;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// threads.cpp: calls part(body, i) for each i in [0, parts), on as many threads.
using Part = void (*)(const void* body, int i);
void run_parts(int parts, Part part, const void* body);

// Calls body(begin, end) on ranges of [0, count). A thread is worth its wake-up for at least 1 << 17 elements.
template <typename Body>
void parallel_for(int64_t count, int64_t elements_per_item, int threads, const Body& body) {
  const int64_t useful = std::max<int64_t>(1, count * elements_per_item >> 17);
  const int64_t workers = std::min<int64_t>({useful, count, static_cast<int64_t>(std::max(threads, 1))});
  if (workers <= 1) {
    body(0, count);
    return;
  }
  struct Ranges {
    const Body& body;
    int64_t count;
    int64_t size;
  };
  const Ranges ranges = {body, count, ceil_div(count, workers)};
  run_parts(
      static_cast<int>(ceil_div(count, ranges.size)),
      [](const void* context, int i) {
        const Ranges& all = *static_cast<const Ranges*>(context);
        all.body(i * all.size, std::min((i + 1) * all.size, all.count));
      },
      &ranges);
}

// Rounds to the nearest integer, ties to even, for |x| < 2**22: adding 1.5 * 2**23 leaves no bits for a fraction.
template <typename T>
QREALIGN_INLINE T round_half_even(T x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// Sets x to the nearer end where it lies outside [low, high]; NaN stays.
template <typename T, typename Bound>
QREALIGN_INLINE T clip(T x, Bound low, Bound high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// fake_quant_weight.cpp
void fake_quant_weight(const float* rows, const float* low_share, const float* high_share, float* fake, const Grid& grid,
                       int64_t row_count, int64_t columns, CodeRange range, ScaleKind kind, int threads);
void weight_gradient_sums(const float* grad, const float* rows, const Grid& grid, float* below, float* above, float* scale,
                          int64_t row_count, int64_t columns, CodeRange range, int threads);
void weight_gradient_rows(const float* grad, const float* rows, const Grid& grid, const float* at_minimum,
                          const float* at_maximum, float* result, int64_t row_count, int64_t columns, int threads);

// per_token.cpp
void fake_quant_per_token(const float* x, float* fake, int64_t row_count, int64_t columns, CodeRange range, int threads);
float quantize_token(const float* x, int8_t* codes, int64_t columns, CodeRange range);  // returns the scale
void quantize_per_token(const float* x, int8_t* codes, float* scale, int64_t row_count, int64_t columns, CodeRange range,
                        int threads);

// pack.cpp
void pack_codes(const int8_t* codes, int32_t* packed, int64_t row_count, int64_t columns, int num_bits, int threads);
void unpack_codes(const int32_t* packed, int8_t* codes, int64_t row_count, int64_t columns, int num_bits, int threads);

}  // namespace qrealign
