// Fake quantization of weight rows (one row is one scale group) and its gradients; bit-equal to reference.py in the forward.
#include <cmath>
#include <cstring>

#include "../common.h"

namespace qrealign {
namespace {

struct Extremes {
  float minimum;
  float maximum;
};

// The row's smallest and largest entry, with 0 counted among them.
QREALIGN_INLINE Extremes find_extremes(const float* row, int64_t columns) {
  Lanes low = {}, high = {};
  int64_t k = 0;
  for (; k + kLanes <= columns; k += kLanes) {
    const Lanes x = load_lanes(row + k);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  Extremes extremes = {0.0f, 0.0f};
  for (int lane = 0; lane < kLanes; ++lane) {
    extremes.minimum = std::min(extremes.minimum, low[lane]);
    extremes.maximum = std::max(extremes.maximum, high[lane]);
  }
  for (; k < columns; ++k) {
    extremes.minimum = row[k] < extremes.minimum ? row[k] : extremes.minimum;
    extremes.maximum = row[k] > extremes.maximum ? row[k] : extremes.maximum;
  }
  return extremes;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Rounds a positive number to bfloat16, ties to even; NaN stays.
inline float round_to_bfloat16(float x) {
  if (x != x) return x;
  const uint32_t bits = to_bits(x);
  return from_bits((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

// Rounds a positive number to float16, ties to even: its last place is 2**-24 among subnormals, else 2**-10 of its power.
inline float round_to_float16(float x) {
  if (!(x < 65520.0f)) return x != x ? x : INFINITY;
  int exponent;
  std::frexp(x, &exponent);  // x = m * 2**exponent, 0.5 <= m < 1
  const int last_place = std::max(exponent - 11, -24);
  return std::ldexp(std::nearbyint(std::ldexp(x, -last_place)), last_place);
}

inline float round_scale(float x, ScaleKind kind) {
  if (kind == ScaleKind::kBFloat16) return round_to_bfloat16(x);
  return kind == ScaleKind::kFloat16 ? round_to_float16(x) : x;
}

// Fills the grid of row r from its extremes.
inline void fill_grid(const Grid& grid, int64_t r, Extremes extremes, const float* low_share, const float* high_share,
                      CodeRange range, ScaleKind kind) {
  const float low = low_share ? extremes.minimum * low_share[r] : extremes.minimum;
  const float high = high_share ? extremes.maximum * high_share[r] : extremes.maximum;
  const float raw = grid.zero_point ? (high - low) / (range.qmax - range.qmin) : std::max(high / range.qmax, low / range.qmin);
  const float scale = round_scale(raw < kMinScale ? kMinScale : raw, kind);
  grid.minimum[r] = extremes.minimum;
  grid.maximum[r] = extremes.maximum;
  grid.low[r] = low;
  grid.high[r] = high;
  grid.raw_scale[r] = raw;
  grid.scale[r] = scale;
  if (grid.zero_point) {
    grid.zero_point[r] = std::min(std::max(std::nearbyint(range.qmin - low / scale), range.qmin), range.qmax);
  }
}

// What a row's entries are clipped to, and the range of code - zero_point.
struct Clip {
  float low;
  float high;
  float scale;
  float first;
  float last;
};

inline Clip clip_of(const Grid& grid, int64_t r, CodeRange range) {
  const float offset = grid.zero_point ? grid.zero_point[r] : 0.0f;
  return {grid.low[r], grid.high[r], grid.scale[r], range.qmin - offset, range.qmax - offset};
}

// The fake-quantized value of clipped entries.
template <typename T>
QREALIGN_INLINE T fake_of(T clipped, T scale, T first, T last) {
  return clip(round_half_even(clipped / scale), first, last) * scale;
}

QREALIGN_CLONES void forward_range(const float* rows, const float* low_share, const float* high_share, float* fake,
                                   const Grid& grid, int64_t begin, int64_t end, int64_t columns, CodeRange range,
                                   ScaleKind kind) {
  for (int64_t r = begin; r < end; ++r) {
    const float* row = rows + r * columns;
    float* out = fake + r * columns;
    fill_grid(grid, r, find_extremes(row, columns), low_share, high_share, range, kind);
    const Clip c = clip_of(grid, r, range);
    for (int64_t k = 0; k < columns; ++k) out[k] = fake_of(clip(row[k], c.low, c.high), c.scale, c.first, c.last);
  }
}

QREALIGN_INLINE float sum_lanes(const Lanes& lanes) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return static_cast<float>(sum);
}

QREALIGN_INLINE Lanes broadcast(float x) { return Lanes{} + x; }

QREALIGN_CLONES void sums_range(const float* grad, const float* rows, const Grid& grid, float* below, float* above,
                                float* scale, int64_t begin, int64_t end, int64_t columns, CodeRange range) {
  for (int64_t r = begin; r < end; ++r) {
    const Clip c = clip_of(grid, r, range);
    const Lanes low = broadcast(c.low), high = broadcast(c.high), step = broadcast(c.scale);
    const Lanes first = broadcast(c.first), last = broadcast(c.last);
    Lanes sum_below = {}, sum_above = {}, sum_error = {};
    for (int64_t k = 0; k < columns; k += kLanes) {
      Lanes g = {}, w = {};  // missing entries count as weights of zero without a gradient
      const size_t bytes = sizeof(float) * std::min<int64_t>(kLanes, columns - k);
      if (bytes == sizeof(Lanes)) {
        g = load_lanes(grad + r * columns + k);
        w = load_lanes(rows + r * columns + k);
      } else {
        std::memcpy(&g, grad + r * columns + k, bytes);
        std::memcpy(&w, rows + r * columns + k, bytes);
      }
      const Lanes clipped = clip(w, low, high);
      sum_below += w < low ? g : Lanes{};
      sum_above += w > high ? g : Lanes{};
      sum_error += g * (fake_of(clipped, step, first, last) - clipped);
    }
    below[r] = sum_lanes(sum_below);
    above[r] = sum_lanes(sum_above);
    scale[r] = sum_lanes(sum_error) / c.scale;
  }
}

QREALIGN_INLINE float share_of(const float* row, int64_t columns, float extreme, float amount) {
  int32_t ties = 0;
  for (int64_t k = 0; k < columns; ++k) ties += row[k] == extreme;
  return amount / static_cast<float>(std::max(ties, 1));
}

QREALIGN_CLONES void rows_range(const float* grad, const float* rows, const Grid& grid, const float* at_minimum,
                                const float* at_maximum, float* result, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t r = begin; r < end; ++r) {
    const float* g = grad + r * columns;
    const float* w = rows + r * columns;
    float* out = result + r * columns;
    const float low = grid.low[r], high = grid.high[r], minimum = grid.minimum[r], maximum = grid.maximum[r];
    const float to_minimum = share_of(w, columns, minimum, at_minimum[r]);
    const float to_maximum = share_of(w, columns, maximum, at_maximum[r]);
    for (int64_t k = 0; k < columns; ++k) {
      const float passed = (w[k] < low) | (w[k] > high) ? 0.0f : g[k];
      out[k] = passed + (w[k] == minimum ? to_minimum : 0.0f) + (w[k] == maximum ? to_maximum : 0.0f);
    }
  }
}

}  // namespace

void fake_quant_weight(const float* rows, const float* low_share, const float* high_share, float* fake, const Grid& grid,
                       int64_t row_count, int64_t columns, CodeRange range, ScaleKind kind, int threads) {
  parallel_for(row_count, columns, threads, [&](int64_t begin, int64_t end) {
    forward_range(rows, low_share, high_share, fake, grid, begin, end, columns, range, kind);
  });
}

void weight_gradient_sums(const float* grad, const float* rows, const Grid& grid, float* below, float* above, float* scale,
                          int64_t row_count, int64_t columns, CodeRange range, int threads) {
  parallel_for(row_count, columns, threads, [&](int64_t begin, int64_t end) {
    sums_range(grad, rows, grid, below, above, scale, begin, end, columns, range);
  });
}

void weight_gradient_rows(const float* grad, const float* rows, const Grid& grid, const float* at_minimum,
                          const float* at_maximum, float* result, int64_t row_count, int64_t columns, int threads) {
  parallel_for(row_count, columns, threads, [&](int64_t begin, int64_t end) {
    rows_range(grad, rows, grid, at_minimum, at_maximum, result, begin, end, columns);
  });
}

}  // namespace qrealign
