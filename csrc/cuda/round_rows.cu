// Rounds weight rows: each is read once, waits in registers for its extremes, and leaves as codes or rounded weights.
//
// Blocks walk over the rows, kRows at a time, and the next ones are on their way while these are rounded.
#include <algorithm>

#include "device.cuh"
#include "grid.cuh"

namespace qrealign {
namespace {

constexpr int kVector = 8;  // columns of one load

// Integers in the order of the floats, for reductions by the hardware; NaN is not kept.
__device__ __forceinline__ int ordered(float value) {
  const int bits = __float_as_int(value);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }

template <int kVectors, int kRows>
struct Rows {
  uint4 packed[kRows][kVectors];

  __device__ __forceinline__ void load(const __nv_bfloat16* weight, int first, int rows, int columns) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int row = first + i / kVectors, column = (i % kVectors * blockDim.x + threadIdx.x) * kVector;
      packed[i / kVectors][i % kVectors] = make_uint4(0, 0, 0, 0);
      if (row < rows && column < columns) {
        packed[i / kVectors][i % kVectors] =
            __ldcs(reinterpret_cast<const uint4*>(weight + static_cast<size_t>(row) * columns + column));
      }
    }
  }
};

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
__global__ void __launch_bounds__(512)
    round_rows_kernel(const __nv_bfloat16* weight, RowTransform transform, CodeGrid codes, RoundedRows out, int rows, int columns) {
  __shared__ int extremes[2][kRows][kMaxWarps];
  __shared__ RowGrid grids[kRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  Rows<kVectors, kRows> next;
  int first = blockIdx.x * kRows;
  next.load(weight, first, rows, columns);
  for (; first < rows; first += gridDim.x * kRows) {
    const Rows<kVectors, kRows> rows_here = next;
    next.load(weight, first + gridDim.x * kRows, rows, columns);
    // Scaled values are made twice, for the extremes and for the codes: registers are dearer than a product.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float minimum = 0.0f, maximum = 0.0f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = (v * blockDim.x + threadIdx.x) * kVector;
        if (column >= columns) continue;
        float values[8];
        unpack(rows_here.packed[r][v], values);
        if (transform.column_scale) scale_eight(values, transform.column_scale + column);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
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
    if (warp < kRows && first + warp < rows) {
      const int at = min(lane, warps - 1), n = first + warp;
      float minimum = from_ordered(__reduce_min_sync(~0u, extremes[0][warp][at]));
      float maximum = from_ordered(__reduce_max_sync(~0u, extremes[1][warp][at]));
      if (transform.row_divisor) divide_extremes(minimum, maximum, transform.row_divisor[n]);
      const RowGrid grid = row_grid(minimum, maximum, n, transform, codes);
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
    for (int r = 0; r < kRows; ++r) {
      const RowGrid& grid = grids[r];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = (v * blockDim.x + threadIdx.x) * kVector;
        if (column >= columns || first + r >= rows) continue;
        float values[8];
        unpack(rows_here.packed[r][v], values);
        if (transform.column_scale) scale_eight(values, transform.column_scale + column);
        if (transform.row_divisor) divide_eight(values, grid);
        round_eight(values, grid);
        const size_t at = static_cast<size_t>(first + r) * columns + column;
        if (out.codes) {
          *reinterpret_cast<uint2*>(out.codes + at) = codes_of(values);
        } else {
          *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(out.weights) + at) = weights_of(values, grid.scale);
        }
      }
    }
  }
}

template <int kVectors, int kRows>
int launch(const void* weight, RowTransform transform, CodeGrid codes, RoundedRows out, int rows, int columns, RowLaunch launch,
           void* stream) {
  const int vectors = (columns + kVector - 1) / kVector, threads = ((vectors + kVectors - 1) / kVectors + kWarp - 1) / kWarp * kWarp;
  if (threads > kMaxWarps * kWarp) return -1;
  const int blocks = std::min(launch.blocks * launch.multiprocessors, (rows + kRows - 1) / kRows);
  const Layout layout = {dim3(blocks), dim3(std::max(threads, kRows * kWarp)), 0, false};
  return launch_kernel(round_rows_kernel<kVectors, kRows>, layout, stream, static_cast<const __nv_bfloat16*>(weight), transform, codes, out, rows, columns);
}

}  // namespace

int round_rows(const void* weight, RowTransform transform, CodeGrid grid, RoundedRows out, int rows, int columns, RowLaunch cut,
               void* stream) {
  if (cut.vectors == 1) return launch<1, 2>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 2) return launch<2, 2>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 3) return launch<3, 1>(weight, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 4) return launch<4, 1>(weight, transform, grid, out, rows, columns, cut, stream);
  return -1;
}

}  // namespace qrealign
