// Reduces the gradient of rounded weight rows to the logits of their bounds, the column scale and the row divisor.
//
// A block walks over rows whole, kRows at a time: what goes to the columns stays in its threads' registers, and what the rows'
// extremes get, which is known only once a row is summed, is added by the threads that have met them: of the weights only those
// beyond the bounds, and the extremes, leave the straight path. A second kernel adds up what the blocks leave.
#include <algorithm>

#include "device.cuh"
#include "grid.cuh"

namespace qrealign {
namespace {

constexpr int kVector = 8;   // columns of one load
constexpr int kAhead = 3;    // batches of rows on their way or at work
constexpr int kChunk = 64;   // rows whose grids are made at once
constexpr int kSums = 4;     // of a row: scale, clipped below, clipped above, row divisor
constexpr int kMostThreads = kMaxWarps * kWarp;

struct Sums {
  float scale, below, above, divisor;
};

// What the extremes of a row pass on to each weight that equals them.
struct AtExtremes {
  float minimum, maximum;
};

// The sums of kCount values a lane over a warp; lane l of the result holds value l / (kWarp / kCount). A lane first hands half of
// its values over for half of its partner's, so that all values together take hardly more exchanges than one.
template <int kCount>
__device__ __forceinline__ float sum_over_warp(float (&values)[kCount], int lane) {
  int distance = kWarp / 2;
#pragma unroll
  for (int left = kCount; left > 1; left /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < left / 2; ++i) {
      const float mine = upper ? values[i + left / 2] : values[i], other = upper ? values[i] : values[i + left / 2];
      values[i] = mine + __shfl_xor_sync(~0u, other, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) values[0] += __shfl_xor_sync(~0u, values[0], distance);
  return values[0];
}

// Where the straight path ends: a weight at or beyond these is clipped, or an extreme.
struct Edges {
  float lowest, highest;

  __device__ explicit Edges(const RowGrid& grid) : lowest(fmaxf(grid.low, grid.minimum)), highest(fminf(grid.high, grid.maximum)) {}
  __device__ bool reached_by(float value) const { return value >= highest || value <= lowest; }
};

template <bool kScaled, bool kDivided>
__device__ __forceinline__ float transform_one(float raw, const float* scale, const RowGrid& grid) {
  const float scaled = kScaled ? __fmul_rn(raw, *scale) : raw;
  return kDivided ? divide<true>(scaled, grid.divisor, grid.divisor_reciprocal) : scaled;
}

template <bool kScaled, bool kDivided>
__device__ __forceinline__ void transform_eight(const float (&raw)[8], float (&values)[8], const float* scales, const RowGrid& grid) {
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = raw[i];
  if (kScaled) scale_eight(values, scales);
  if (kDivided) divide_eight(values, grid);
}

// Adds to an element whose index is not known at compile time, without moving the array out of registers.
template <bool kWanted>
__device__ __forceinline__ void add_to(float (&sums)[kVector], int index, float value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (kWanted && i == index) sums[i] += value;
  }
}

// Stores the gradients of a row's logits and divisor; returns what goes to its extremes altogether.
__device__ __forceinline__ AtExtremes finish_row(const Sums& sums, const RowGrid& grid, const RowTransform& transform,
                                                 const CodeGrid& codes, const RowGradients& out, int n) {
  // A clipped weight's error is that of its bound.
  float scale = sums.scale + sums.below * (grid.lowest - grid.low_steps) + sums.above * (grid.highest - grid.high_steps);
  if (!(grid.raw_scale >= codes.min_scale)) scale = 0.0f;
  float low = sums.below, high = sums.above;
  const float qmin = codes.qmin, qmax = codes.qmax;
  // The side that sets the scale gets its gradient; equal sides share it.
  const float from_low = __fdiv_rn(grid.low, qmin), from_high = __fdiv_rn(grid.high, qmax);
  const float by_low = from_low > from_high ? 1.0f : from_low == from_high ? 0.5f : 0.0f;
  low += scale * by_low / qmin;
  high += scale * (1.0f - by_low) / qmax;
  const AtExtremes at = {transform.low_logit ? low * grid.low_share : 0.0f, transform.high_logit ? high * grid.high_share : 0.0f};
  if (out.low_logit) out.low_logit[n] = at.minimum * grid.minimum * (1.0f - grid.low_share);
  if (out.high_logit) out.high_logit[n] = at.maximum * grid.maximum * (1.0f - grid.high_share);
  if (out.row_divisor) {
    out.row_divisor[n] = -(sums.divisor + at.minimum * grid.minimum + at.maximum * grid.maximum) / grid.divisor;
  }
  return at;
}

// kScaled: there is a column scale, and its gradient is wanted; kDivided: the same of the row divisor.
template <int kVectors, int kRows, bool kScaled, bool kDivided>
__global__ void __launch_bounds__(kMostThreads)
    row_gradients_kernel(const __nv_bfloat16* grads, const __nv_bfloat16* weights, const float* extremes, RowTransform transform,
                         CodeGrid codes, RowGradients out, int rows, int columns) {
  extern __shared__ __align__(16) char shared[];
  __shared__ RowGrid grids[kChunk];
  __shared__ float warp_sums[2][kMaxWarps][kRows * kSums];  // by turns, as `ties`
  __shared__ AtExtremes at_extremes[kRows];
  __shared__ int ties[2][kRows][2];  // [batch by turns][row][weights at the minimum, maximum]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int share = ((rows + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x) + kRows - 1) / kRows * kRows;
  const int first = blockIdx.x * share, last = min(first + share, rows);

  // The ring holds a thread's own pieces alone: no thread waits for another's.
  uint4* ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;
  const auto piece = [&](int stage, int row, int v, int operand) -> uint4* {
    return ring + (((stage * kRows + row) * kVectors + v) * 2 + operand) * blockDim.x;
  };
  const auto fetch = [&](int from, int stage) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int r = i / kVectors, v = i % kVectors, column = (v * blockDim.x + threadIdx.x) * kVector;
      const bool inside = from + r < last && column < columns;
      const size_t at = inside ? static_cast<size_t>(from + r) * columns + column : 0;
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        const unsigned to = __cvta_generic_to_shared(piece(stage, r, v, operand));
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"((operand ? grads : weights) + at),
                     "r"(inside ? 16 : 0));
      }
    }
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (int stage = 0; stage < kAhead - 1; ++stage) fetch(first + stage * kRows, stage);

  float to_columns[kVectors][kVector] = {};
  if (threadIdx.x < 2 * kRows * 2) (&ties[0][0][0])[threadIdx.x] = 0;
  int stage = 0, turn = 0;
  for (int row = first; row < last; row += kRows, turn ^= 1) {
    if ((row - first) % kChunk == 0) {
      __syncthreads();  // all have read the grids before
      for (int i = threadIdx.x; i < min(kChunk, last - row); i += blockDim.x) {
        grids[i] = row_grid(extremes[row + i], extremes[rows + row + i], row + i, transform, codes);
      }
      __syncthreads();
    }
    fetch(row + (kAhead - 1) * kRows, stage == 0 ? kAhead - 1 : stage - 1);
    asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
    float sums[kRows * kSums] = {};
    uint32_t met = 0;  // vectors with weights at or beyond the bounds
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * blockDim.x + threadIdx.x) * kVector;
      if (column >= columns) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= last) continue;
        const RowGrid& grid = grids[(row - first) % kChunk + r];
        float raw[8], values[8], g[8];
        unpack(*piece(stage, r, v, 0), raw);
        unpack(*piece(stage, r, v, 1), g);
        transform_eight<kScaled, kDivided>(raw, values, transform.column_scale + column, grid);
        const Edges edges(grid);
        bool any = false;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const bool special = edges.reached_by(values[i]);
          any |= special;
          // No weight between the bounds rounds to more than an end code: the scale's 16 bits are too few for that.
          const float quotient = divide<false>(values[i], grid.scale, grid.reciprocal);
          const float steps = __fsub_rn(__fadd_rn(quotient, kRounder), kRounder);
          const float inside = special ? 0.0f : g[i];
          sums[r * kSums] += inside * (steps - quotient);
          if (kDivided) sums[r * kSums + 3] += inside * values[i];
          if (kScaled) to_columns[v][i] += (kDivided ? inside * grid.divisor_reciprocal : inside) * raw[i];
        }
        if (!any) continue;
        met |= 1u << (v * kRows + r);
        const __nv_bfloat16* raws = reinterpret_cast<const __nv_bfloat16*>(piece(stage, r, v, 0));
        const __nv_bfloat16* gs = reinterpret_cast<const __nv_bfloat16*>(piece(stage, r, v, 1));
#pragma unroll 1
        for (int i = 0; i < kVector; ++i) {
          const float raw = __bfloat162float(raws[i]), g = __bfloat162float(gs[i]);
          const float value = transform_one<kScaled, kDivided>(raw, transform.column_scale + column + i, grid);
          if (!edges.reached_by(value)) continue;
          if (value == grid.minimum) atomicAdd(&ties[turn][r][0], 1);
          if (value == grid.maximum) atomicAdd(&ties[turn][r][1], 1);
          if (value < grid.low) {
            sums[r * kSums + 1] += g;
          } else if (value > grid.high) {
            sums[r * kSums + 2] += g;
          } else {
            const float quotient = divide<false>(value, grid.scale, grid.reciprocal);
            sums[r * kSums] += g * (__fsub_rn(__fadd_rn(quotient, kRounder), kRounder) - quotient);
            sums[r * kSums + 3] += g * value;
            add_to<kScaled>(to_columns[v], i, g * (kDivided ? grid.divisor_reciprocal : 1.0f) * raw);
          }
        }
      }
    }
    constexpr int kLanes = kWarp / (kRows * kSums);
    const float sum = sum_over_warp(sums, lane);
    if (lane % kLanes == 0) warp_sums[turn][warp][lane / kLanes] = sum;
    __syncthreads();
    if (warp < kRows && row + warp < last) {
      // Lane l adds up sum l of the row over the warps, in their order.
      float total = 0.0f;
      for (int w = 0; w < warps; ++w) total += warp_sums[turn][w][warp * kSums + lane % kSums];
      const Sums all = {__shfl_sync(~0u, total, 0), __shfl_sync(~0u, total, 1), __shfl_sync(~0u, total, 2),
                        __shfl_sync(~0u, total, 3)};
      if (lane == 0) {
        const AtExtremes at = finish_row(all, grids[(row - first) % kChunk + warp], transform, codes, out, row + warp);
        at_extremes[warp] = {at.minimum / max(ties[turn][warp][0], 1), at.maximum / max(ties[turn][warp][1], 1)};
        ties[turn][warp][0] = ties[turn][warp][1] = 0;
      }
    }
    if (kScaled) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kRows * kVectors; ++i) {
        const int v = i / kRows, r = i % kRows, column = (v * blockDim.x + threadIdx.x) * kVector;
        if (!(met >> i & 1)) continue;
        const RowGrid& grid = grids[(row - first) % kChunk + r];
        const __nv_bfloat16* raws = reinterpret_cast<const __nv_bfloat16*>(piece(stage, r, v, 0));
#pragma unroll 1
        for (int j = 0; j < kVector; ++j) {
          const float raw = __bfloat162float(raws[j]);
          const float value = transform_one<kScaled, kDivided>(raw, transform.column_scale + column + j, grid);
          const float passed = (value == grid.minimum ? at_extremes[r].minimum : 0.0f) +
                               (value == grid.maximum ? at_extremes[r].maximum : 0.0f);
          add_to<kScaled>(to_columns[v], j, passed * (kDivided ? grid.divisor_reciprocal : 1.0f) * raw);
        }
      }
    }
    stage = stage + 1 == kAhead ? 0 : stage + 1;
  }
  let_next_kernel_start();
  if constexpr (kScaled) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * blockDim.x + threadIdx.x) * kVector;
      if (column >= columns) continue;
      float4* to = reinterpret_cast<float4*>(out.partial + static_cast<size_t>(blockIdx.x) * columns + column);
      to[0] = make_float4(to_columns[v][0], to_columns[v][1], to_columns[v][2], to_columns[v][3]);
      to[1] = make_float4(to_columns[v][4], to_columns[v][5], to_columns[v][6], to_columns[v][7]);
    }
  }
}

constexpr int kSummedColumns = 32, kSummers = 16;  // of a block of sum_columns_kernel

__global__ void sum_columns_kernel(const float* partial, float* out, int parts, int columns) {
  __shared__ float sums[kSummers][kSummedColumns];
  const int column = blockIdx.x * kSummedColumns + threadIdx.x;
  wait_for_kernels_before();
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (int part = threadIdx.y; part < parts; part += kSummers) sum += partial[static_cast<size_t>(part) * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int i = 1; i < kSummers; ++i) sum += sums[i][threadIdx.x];
  out[column] = sum;
}

template <int kVectors, int kRows>
int launch(const void* grad, const void* weight, const float* extremes, RowTransform transform, CodeGrid codes, RowGradients out,
           int rows, int columns, RowLaunch launch, void* stream) {
  const int vectors = (columns + kVector - 1) / kVector;
  const int threads = ((vectors + kVectors - 1) / kVectors + kWarp - 1) / kWarp * kWarp;
  const bool scaled = transform.column_scale, divided = transform.row_divisor;
  if (threads > kMostThreads || threads < kRows * kWarp) return -1;
  const int blocks = launch.blocks * launch.multiprocessors, shared = kAhead * kRows * kVectors * 2 * threads * 16;
  const auto kernel = scaled ? (divided ? row_gradients_kernel<kVectors, kRows, true, true>
                                        : row_gradients_kernel<kVectors, kRows, true, false>)
                             : (divided ? row_gradients_kernel<kVectors, kRows, false, true>
                                        : row_gradients_kernel<kVectors, kRows, false, false>);
  const int code = launch_kernel(kernel, {dim3(blocks), dim3(threads), shared, false}, stream, static_cast<const __nv_bfloat16*>(grad),
                                 static_cast<const __nv_bfloat16*>(weight), extremes, transform, codes, out, rows, columns);
  if (code != 0 || !scaled) return code;
  const Layout summing = {dim3((columns + kSummedColumns - 1) / kSummedColumns), dim3(kSummedColumns, kSummers), 0, true};
  return launch_kernel(sum_columns_kernel, summing, stream, static_cast<const float*>(out.partial), out.column_scale, blocks, columns);
}

}  // namespace

int row_gradients(const void* grad, const void* weight, const float* extremes, RowTransform transform, CodeGrid grid,
                  RowGradients out, int rows, int columns, RowLaunch cut, void* stream) {
  if (cut.vectors == 1) return launch<1, 2>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 2) return launch<2, 2>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 3) return launch<3, 1>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 4) return launch<4, 1>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  return -1;
}

}  // namespace qrealign
