// Reduces the gradient of rounded weight rows to the logits of their bounds, the column scale and the row divisor.
//
// A block walks over rows whole, kRows at a time: what goes to the columns stays in its threads' registers, and what the rows'
// extremes get, which is known only once a row is summed, is added by the threads that have met them: of the weights only those
// beyond the bounds, and the extremes, leave the straight path. A second kernel adds up what the blocks leave.
#include <algorithm>

#include "device.cuh"
#include "grid.cuh"
#include "pieces.cuh"

namespace qrealign {
namespace {

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

// Element `index`, not known at compile time, of an array that stays in registers.
__device__ __forceinline__ float element_of(const float (&values)[kVector], int index) {
  float found = values[0];
#pragma unroll
  for (int i = 1; i < kVector; ++i) found = i == index ? values[i] : found;
  return found;
}

// Adds to such an element.
__device__ __forceinline__ void add_to(float (&sums)[kVector], int index, float value) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i == index) sums[i] += value;
  }
}

__device__ __forceinline__ float from_shared(const uint4* eight, int index) {
  return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(eight)[index]);
}

// Stores the gradients of a row's logits and divisor; returns what goes to its extremes altogether.
__device__ __forceinline__ AtExtremes finish_row(const Sums& sums, const RowGrid& grid, const RowTransform& transform, float min_scale,
                                                 const RowGradients& out, int n) {
  // A clipped weight's error is that of its bound.
  float scale = sums.scale + sums.below * (grid.lowest - grid.low_steps) + sums.above * (grid.highest - grid.high_steps);
  if (!(grid.raw_scale >= min_scale)) scale = 0.0f;
  const float low = sums.below + scale * grid.low_part, high = sums.above + scale * grid.high_part;
  const AtExtremes at = {transform.low_logit ? low * grid.low_share : 0.0f, transform.high_logit ? high * grid.high_share : 0.0f};
  if (out.low_logit) out.low_logit[n] = at.minimum * grid.minimum * (1.0f - grid.low_share);
  if (out.high_logit) out.high_logit[n] = at.maximum * grid.maximum * (1.0f - grid.high_share);
  if (out.row_divisor) {
    out.row_divisor[n] = -(sums.divisor + at.minimum * grid.minimum + at.maximum * grid.maximum) * grid.divisor_reciprocal;
  }
  return at;
}

// kDivided: there is a row divisor, and its gradient is wanted; those of the column scale are always.
template <int kVectors, int kRows, bool kDivided>
__global__ void __launch_bounds__(kMostThreads, kVectors == 1 ? 2 : 1)
    row_gradients_kernel(const __nv_bfloat16* grads, const __nv_bfloat16* weights, const float* extremes, RowTransform transform,
                         CodeGrid codes, RowGradients out, int rows, int columns) {
  static_assert(kRows * kVectors * kVector <= 32, "the extremes that a thread has met are bits of a word");
  extern __shared__ __align__(16) char shared[];
  __shared__ RowGrid grids[kChunk];
  __shared__ float warp_sums[2][kMaxWarps][kRows * kSums];  // by turns, as `ties`
  __shared__ AtExtremes at_extremes[kRows];
  __shared__ int ties[2][kRows][2];  // [batch by turns][row][weights at the minimum, maximum]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int share = ((rows + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x) + kRows - 1) / kRows * kRows;
  const int first = blockIdx.x * share, last = min(first + share, rows);

  const Pieces<kVectors, kRows, 2> ring(shared);
  const auto fetch = [&](int from, int stage) {
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int r = i / kVectors, v = i % kVectors, column = ring.column(v);
      const bool inside = from + r < last && column < columns;
      const size_t at = inside ? static_cast<size_t>(from + r) * columns + column : 0;
      ring.fetch(stage, r, v, 0, weights + at, inside);
      ring.fetch(stage, r, v, 1, grads + at, inside);
    }
    ring.commit();
  };
#pragma unroll
  for (int stage = 0; stage < kAhead - 1; ++stage) fetch(first + stage * kRows, stage);

  float to_columns[kVectors][kVector] = {}, factors[kVectors][kVector] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = ring.column(v);
    if (column < columns) load_eight(transform.column_scale + column, factors[v]);
  }
  if (threadIdx.x < 2 * kRows * 2) (&ties[0][0][0])[threadIdx.x] = 0;
  int stage = 0, turn = 0;
  for (int row = first; row < last; row += kRows, turn ^= 1) {
    if ((row - first) % kChunk == 0) {
      __syncthreads();  // all have read the grids before
      for (int i = threadIdx.x; i < min(kChunk, last - row); i += blockDim.x) {
        grids[i] = row_grid(extremes[row + i], extremes[rows + row + i], RowInputs(transform, row + i), transform, codes);
      }
      __syncthreads();
    }
    fetch(row + (kAhead - 1) * kRows, stage == 0 ? kAhead - 1 : stage - 1);
    ring.wait();
    float sums[kRows * kSums] = {};
    uint32_t minima = 0, maxima = 0;  // of the batch's weights of this thread, those that are extremes
#pragma unroll
    for (int i = 0; i < kRows * kVectors; ++i) {
      const int v = i / kRows, r = i % kRows;
      if (row + r >= last || ring.column(v) >= columns) continue;
      const RowGrid& grid = grids[(row - first) % kChunk + r];
      const uint4 *raw_piece = ring.piece(stage, r, v, 0), *g_piece = ring.piece(stage, r, v, 1);
      float raw[kVector], values[kVector], g[kVector];
      unpack(*raw_piece, raw);
      unpack(*g_piece, g);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = raw[j];
      scale_eight(values, factors[v]);
      if (kDivided) divide_eight(values, grid);
      // At and beyond these a weight is clipped, or an extreme, and leaves the straight path.
      const float lowest = fmaxf(grid.low, grid.minimum), highest = fminf(grid.high, grid.maximum);
      bool any = false;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const bool special = values[j] >= highest || values[j] <= lowest;
        any |= special;
        // No weight between the bounds rounds to more than an end code: the scale's 16 bits are too few for that.
        const float quotient = divide<false>(values[j], grid.scale, grid.reciprocal);
        const float steps = __fsub_rn(__fadd_rn(quotient, kRounder), kRounder), inside = special ? 0.0f : g[j];
        sums[r * kSums] += inside * (steps - quotient);
        if (kDivided) sums[r * kSums + 3] += inside * values[j];
        to_columns[v][j] += (kDivided ? inside * grid.divisor_reciprocal : inside) * raw[j];
      }
      if (!any) continue;
      uint32_t left = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) left |= (values[j] >= highest || values[j] <= lowest ? 1u : 0u) << j;
      for (; left; left &= left - 1) {
        const int j = __ffs(left) - 1;
        const float value = element_of(values, j), grad = from_shared(g_piece, j);
        if (value == grid.minimum) minima |= 1u << (i * kVector + j), atomicAdd(&ties[turn][r][0], 1);
        if (value == grid.maximum) maxima |= 1u << (i * kVector + j), atomicAdd(&ties[turn][r][1], 1);
        if (value < grid.low) {
          sums[r * kSums + 1] += grad;
        } else if (value > grid.high) {
          sums[r * kSums + 2] += grad;
        } else {  // an extreme that its bound keeps
          const float quotient = divide<false>(value, grid.scale, grid.reciprocal);
          const float steps = clip(__fsub_rn(__fadd_rn(quotient, kRounder), kRounder), grid.lowest, grid.highest);
          sums[r * kSums] += grad * (steps - quotient);
          if (kDivided) sums[r * kSums + 3] += grad * value;
          add_to(to_columns[v], j, (kDivided ? grad * grid.divisor_reciprocal : grad) * from_shared(raw_piece, j));
        }
      }
    }
    constexpr int kLanes = kWarp / (kRows * kSums);
    const float sum = sum_over_warp(sums, lane);
    if (lane % kLanes == 0) warp_sums[turn][warp][lane / kLanes] = sum;
    __syncthreads();
    if (warp < kRows && row + warp < last) {
      // Lane 4w + s adds up sum s of the row over warps w, w + 8, ...; then lanes that differ in w, all in a fixed order.
      float total = 0.0f;
      for (int w = lane / kSums; w < warps; w += kWarp / kSums) total += warp_sums[turn][w][warp * kSums + lane % kSums];
#pragma unroll
      for (int distance = kSums; distance < kWarp; distance *= 2) total += __shfl_xor_sync(~0u, total, distance);
      const Sums all = {__shfl_sync(~0u, total, 0), __shfl_sync(~0u, total, 1), __shfl_sync(~0u, total, 2),
                        __shfl_sync(~0u, total, 3)};
      if (lane == 0) {
        const RowGrid& grid = grids[(row - first) % kChunk + warp];
        const AtExtremes at = finish_row(all, grid, transform, codes.min_scale, out, row + warp);
        // Over the divisor, as all that goes to the column scale.
        at_extremes[warp] = {at.minimum * grid.divisor_reciprocal / max(ties[turn][warp][0], 1),
                             at.maximum * grid.divisor_reciprocal / max(ties[turn][warp][1], 1)};
        ties[turn][warp][0] = ties[turn][warp][1] = 0;
      }
    }
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      constexpr uint32_t kOfVector = kRows * kVector == 32 ? ~0u : (1u << kRows * kVector) - 1;
      const int from = v * kRows * kVector;
      for (uint32_t left = (minima | maxima) & kOfVector << from; left; left &= left - 1) {
        const int bit = __ffs(left) - 1, r = (bit - from) / kVector, j = bit % kVector;
        const float passed = (minima >> bit & 1 ? at_extremes[r].minimum : 0.0f) + (maxima >> bit & 1 ? at_extremes[r].maximum : 0.0f);
        add_to(to_columns[v], j, passed * from_shared(ring.piece(stage, r, v, 0), j));
      }
    }
    stage = stage + 1 == kAhead ? 0 : stage + 1;
  }
  let_next_kernel_start();
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = ring.column(v);
    if (column >= columns) continue;
    float4* to = reinterpret_cast<float4*>(out.partial + static_cast<size_t>(blockIdx.x) * columns + column);
    to[0] = make_float4(to_columns[v][0], to_columns[v][1], to_columns[v][2], to_columns[v][3]);
    to[1] = make_float4(to_columns[v][4], to_columns[v][5], to_columns[v][6], to_columns[v][7]);
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
  const int vectors = (columns + kVector - 1) / kVector, of_a_thread = (vectors + kVectors - 1) / kVectors;
  const int threads = std::max((of_a_thread + kWarp - 1) / kWarp, kRows) * kWarp;
  if (threads > kMostThreads) return -1;
  const int blocks = launch.blocks * launch.multiprocessors, shared = Pieces<kVectors, kRows, 2>::bytes(threads);
  const auto kernel = transform.row_divisor ? row_gradients_kernel<kVectors, kRows, true>
                                            : row_gradients_kernel<kVectors, kRows, false>;
  const int code = launch_kernel(kernel, {dim3(blocks), dim3(threads), shared, false}, stream, static_cast<const __nv_bfloat16*>(grad),
                                 static_cast<const __nv_bfloat16*>(weight), extremes, transform, codes, out, rows, columns);
  if (code != 0) return code;
  const Layout summing = {dim3((columns + kSummedColumns - 1) / kSummedColumns), dim3(kSummedColumns, kSummers), 0, true};
  return launch_kernel(sum_columns_kernel, summing, stream, static_cast<const float*>(out.partial), out.column_scale, blocks, columns);
}

}  // namespace

int row_gradients(const void* grad, const void* weight, const float* extremes, RowTransform transform, CodeGrid grid,
                  RowGradients out, int rows, int columns, RowLaunch cut, void* stream) {
  if (cut.vectors == 1) return launch<1, 2>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  if (cut.vectors == 2) return launch<2, 2>(grad, weight, extremes, transform, grid, out, rows, columns, cut, stream);
  return -1;
}

}  // namespace qrealign
