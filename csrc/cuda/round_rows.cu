// Rounds weight rows: each is read once, waits in shared memory for its extremes, and leaves as codes or rounded weights.
//
// Blocks walk over the rows, kRows at a time, and the next ones are on their way while these are rounded.
#include <algorithm>

#include "device.cuh"
#include "grid.cuh"
#include "pieces.cuh"

namespace qrealign {
namespace {

// Integers in the order of the floats, for reductions by the hardware; NaN is not kept.
__device__ __forceinline__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }

// Rounds eight transformed weights; the codes stand on top of kRounder.
__device__ __forceinline__ void round_eight(float (&values)[8], const RowGrid& grid) {
  const float lowest = __fadd_rn(grid.lowest, kRounder), highest = __fadd_rn(grid.highest, kRounder);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = clip(__fadd_rn(divide<false>(values[i], grid.scale, grid.reciprocal), kRounder), lowest, highest);
  }
}

// Their two's complement stands in the lowest bits.
__device__ __forceinline__ uint2 codes_of(const float (&steps)[8]) {
  uint32_t bits[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) bits[i] = __float_as_uint(steps[i]);
  return make_uint2(__byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410),
                    __byte_perm(__byte_perm(bits[4], bits[5], 0x0040), __byte_perm(bits[6], bits[7], 0x0040), 0x5410));
}

// kRounder times so short a scale is exact, so that this rounds as the product of code and scale does.
__device__ __forceinline__ uint4 weights_of(const float (&steps)[8], float scale) {
  const float offset = __fmul_rn(scale, -kRounder);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair =
        __floats2bfloat162_rn(__fmaf_rn(steps[2 * i], scale, offset), __fmaf_rn(steps[2 * i + 1], scale, offset));
    pairs[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <int kVectors, int kRows>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2)
    round_rows_kernel(const __nv_bfloat16* weight, RowTransform transform, CodeGrid codes, RoundedRows out, int rows, int columns) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int extremes[2][kRows][kMaxWarps];
  __shared__ RowGrid grids[kRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int first = blockIdx.x * kRows, stride = gridDim.x * kRows;
  const Pieces<kVectors, kRows, 1> ring(shared);
  const auto fetch = [&](int from, int stage) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int row = from + i / kVectors, column = ring.column(i % kVectors);
      const bool inside = row < rows && column < columns;
      ring.fetch(stage, i / kVectors, i % kVectors, 0, weight + (inside ? static_cast<size_t>(row) * columns + column : 0), inside);
    }
    ring.commit();
  };
#pragma unroll
  for (int stage = 0; stage < kAhead - 1; ++stage) fetch(first + stage * stride, stage);
  float factors[kVectors][kVector] = {};
  if (transform.column_scale) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (ring.column(v) < columns) load_eight(transform.column_scale + ring.column(v), factors[v]);
    }
  }
  // Warp r makes the grid of the batch's row r; what it reads for that is on its way a batch ahead.
  RowInputs next(transform, min(first + min(warp, kRows - 1), rows - 1));
  int stage = 0;
  for (int row = first; row < rows; row += stride) {
    const RowInputs inputs = next;
    next = RowInputs(transform, min(row + stride + min(warp, kRows - 1), rows - 1));
    fetch(row + (kAhead - 1) * stride, stage == 0 ? kAhead - 1 : stage - 1);
    ring.wait();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float minimum = 0.0f, maximum = 0.0f;  // what lies outside the matrix was fetched as zeros
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float values[kVector];
        unpack(*ring.piece(stage, r, v, 0), values);
        if (transform.column_scale) scale_eight(values, factors[v]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          minimum = fminf(minimum, values[i]);
          maximum = fmaxf(maximum, values[i]);
        }
      }
      const int least = __reduce_min_sync(~0u, ordered(minimum)), most = __reduce_max_sync(~0u, ordered(maximum));
      if (lane == 0) {
        extremes[0][r][warp] = least;
        extremes[1][r][warp] = most;
      }
    }
    __syncthreads();
    if (warp < kRows && row + warp < rows) {
      const int at = min(lane, warps - 1), n = row + warp;
      float minimum = from_ordered(__reduce_min_sync(~0u, extremes[0][warp][at]));
      float maximum = from_ordered(__reduce_max_sync(~0u, extremes[1][warp][at]));
      if (transform.row_divisor) divide_extremes(minimum, maximum, inputs.divisor);
      const RowGrid grid = row_grid(minimum, maximum, inputs, transform, codes);
      if (lane == 0) {
        grids[warp] = grid;
        if (out.extremes) {
          out.extremes[n] = minimum;
          out.extremes[rows + n] = maximum;
        }
        if (out.scale) out.scale[n] = grid.scale;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int r = i / kVectors, v = i % kVectors, column = ring.column(v);
      if (column >= columns || row + r >= rows) continue;
      const RowGrid& grid = grids[r];
      float values[kVector];
      unpack(*ring.piece(stage, r, v, 0), values);
      if (transform.column_scale) scale_eight(values, factors[v]);
      if (transform.row_divisor) divide_eight(values, grid);
      round_eight(values, grid);
      const size_t at = static_cast<size_t>(row + r) * columns + column;
      if (out.codes) {
        *reinterpret_cast<uint2*>(out.codes + at) = codes_of(values);
      } else {
        *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(out.weights) + at) = weights_of(values, grid.scale);
      }
    }
    stage = stage + 1 == kAhead ? 0 : stage + 1;
  }
}

template <int kVectors, int kRows>
int launch(const void* weight, RowTransform transform, CodeGrid codes, RoundedRows out, int rows, int columns, RowLaunch launch,
           void* stream) {
  const int vectors = (columns + kVector - 1) / kVector, of_a_thread = (vectors + kVectors - 1) / kVectors;
  const int threads = std::max((of_a_thread + kWarp - 1) / kWarp, kRows) * kWarp;
  if (threads > kMaxWarps * kWarp) return -1;
  const int blocks = std::min(launch.blocks * launch.multiprocessors, (rows + kRows - 1) / kRows);
  const Layout layout = {dim3(blocks), dim3(threads), Pieces<kVectors, kRows, 1>::bytes(threads), false};
  return launch_kernel(round_rows_kernel<kVectors, kRows>, layout, stream, static_cast<const __nv_bfloat16*>(weight), transform,
                       codes, out, rows, columns);
}

}  // namespace

int round_rows(const void* weight, RowTransform transform, CodeGrid grid, RoundedRows out, int rows, int columns, RowLaunch cut,
               void* stream) {
  if (cut.vectors == 1) return launch<1, 4>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 2) return launch<2, 2>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 3) return launch<3, 1>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 4) return launch<4, 1>(weight, transform, grid, out, rows, columns, cut, stream);
  return -1;
}

}  // namespace qrealign
