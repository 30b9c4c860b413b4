// 8-bit weights times 8-bit activations for up to 16 tokens, and the quantization of the activations.
//
// A tile is 16 rows x 64 columns: thread (g, t) of a warp reads 16 bytes of the rows g and g + 8, and of token g. As in
// decode_int4.cu, these words are the fragments of two tensor-core products of 32 columns each, as they come.
#include "device.cuh"

namespace qrealign {
namespace {

constexpr float kZeroScaleReplacement = 1.1920928955078125e-07f;  // float32 epsilon, as in reference.py

__device__ __forceinline__ void multiply(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename T, int kRowTiles, int kKTiles, int kTokenTiles>
__global__ void __launch_bounds__(kMaxWarps* kWarp) decode_int8_kernel(const int8_t* x, const float* x_scale, const int8_t* codes, const float* scale,
                                   const T* bias, T* out, int tokens, int rows, int columns) {
  constexpr int kRows = kRowTiles * kTileRows, kTokens = kTokenTiles * kTileTokensMma;
  extern __shared__ int shared_sums[];  // [warps][kTokens][kRows]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, tiles = columns / kTileBytes;

  int sums[kRowTiles][kTokenTiles][4] = {};
  for (int first = warp * kKTiles; first < tiles; first += warps * kKTiles) {
    uint4 words[kKTiles][kRowTiles][2];
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Rows and tiles past the end are read again from the last ones, and meet neither an output nor an x.
          const size_t row = min(first_row + r * kTileRows + half * 8 + g, rows - 1);
          words[k][r][half] = load_once(codes + row * columns + min(first + k, tiles - 1) * kTileBytes + t * 16);
        }
      }
    }
    if (first == warp * kKTiles) wait_for_kernels_before();
    uint4 values[kKTiles][kTokenTiles] = {};
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = n * kTileTokensMma + g;
        if (token < tokens && first + k < tiles) {
          values[k][n] = load(x + static_cast<size_t>(token) * columns + (first + k) * kTileBytes + t * 16);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 upper = words[k][r][0], lower = words[k][r][1];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          multiply(sums[r][n], upper.x, lower.x, upper.y, lower.y, values[k][n].x, values[k][n].y);
          multiply(sums[r][n], upper.z, lower.z, upper.w, lower.w, values[k][n].z, values[k][n].w);
        }
      }
    }
  }
  let_next_kernel_start();

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = r * kTileRows + (i / 2) * 8 + g, token = n * kTileTokensMma + 2 * t + i % 2;
        shared_sums[(warp * kTokens + token) * kRows + row] = sums[r][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * tokens; i += blockDim.x) {
    const int row = first_row + i % kRows, token = i / kRows;
    if (row >= rows) continue;
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += shared_sums[w * kTokens * kRows + i];
    // Without the contraction of product and sum that nvcc would make: the reference rounds after each of them.
    float value = __fmul_rn(__fmul_rn(static_cast<float>(sum), x_scale[token]), scale[row]);
    if (bias) value = __fadd_rn(value, to_float(bias[row]));
    out[static_cast<size_t>(token) * rows + row] = from_float<T>(value);
  }
}

template <typename T>
__global__ void quantize_tokens_kernel(const T* x, int8_t* codes, float* scale, int columns) {
  constexpr int kVector = 8;
  __shared__ float warp_largest[kWarp];
  let_next_kernel_start();
  wait_for_kernels_before();
  const T* from = x + static_cast<size_t>(blockIdx.x) * columns;
  int8_t* to = codes + static_cast<size_t>(blockIdx.x) * columns;
  float largest = 0.0f;
  for (int k = threadIdx.x * kVector; k < columns; k += blockDim.x * kVector) {
    const uint4 eight = load(from + k);
    const T* values = reinterpret_cast<const T*>(&eight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = fmaxf(largest, fabsf(to_float(values[i])));
  }
  for (int distance = kWarp / 2; distance; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  if (threadIdx.x % kWarp == 0) warp_largest[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) largest = fmaxf(largest, warp_largest[warp]);
  const float step = largest == 0.0f ? kZeroScaleReplacement : __fdiv_rn(largest, 127.5f);
  for (int k = threadIdx.x * kVector; k < columns; k += blockDim.x * kVector) {
    const uint4 eight = load(from + k);
    const T* values = reinterpret_cast<const T*>(&eight);
    uint2 packed;
    int8_t* bytes = reinterpret_cast<int8_t*>(&packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      bytes[i] = static_cast<int8_t>(min(max(__float2int_rn(__fdiv_rn(to_float(values[i]), step)), -128), 127));
    }
    *reinterpret_cast<uint2*>(to + k) = packed;
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = step;
}

template <typename T, int kRowTiles, int kKTiles>
int launch_tokens(const int8_t* x, const float* x_scale, const int8_t* codes, const float* scale, const void* bias, void* out,
                  DecodeShape shape, DecodeLaunch launch, void* stream) {
  const int token_tiles = shape.tokens > kTileTokensMma ? 2 : 1;
  const auto kernel = token_tiles == 1 ? decode_int8_kernel<T, kRowTiles, kKTiles, 1> : decode_int8_kernel<T, kRowTiles, kKTiles, 2>;
  const int block_rows = kRowTiles * kTileRows;
  const int shared_bytes = launch.warps * block_rows * token_tiles * kTileTokensMma * static_cast<int>(sizeof(int));
  return launch_kernel(kernel, (shape.rows + block_rows - 1) / block_rows, launch.warps * kWarp, shared_bytes, launch.overlap,
                       stream, x, x_scale, codes, scale, static_cast<const T*>(bias), static_cast<T*>(out), shape.tokens,
                       shape.rows, shape.columns);
}

template <typename T>
int launch_tiles(const int8_t* x, const float* x_scale, const int8_t* codes, const float* scale, const void* bias, void* out,
                 DecodeShape shape, DecodeLaunch launch, void* stream) {
  const auto chosen = launch.row_tiles == 1 && launch.k_tiles == 1   ? launch_tokens<T, 1, 1>
                      : launch.row_tiles == 1 && launch.k_tiles == 2 ? launch_tokens<T, 1, 2>
                      : launch.row_tiles == 1 && launch.k_tiles == 4 ? launch_tokens<T, 1, 4>
                      : launch.row_tiles == 2 && launch.k_tiles == 1 ? launch_tokens<T, 2, 1>
                      : launch.row_tiles == 2 && launch.k_tiles == 2 ? launch_tokens<T, 2, 2>
                                                                     : nullptr;
  return chosen ? chosen(x, x_scale, codes, scale, bias, out, shape, launch, stream) : -1;
}

}  // namespace

int decode_int8(Element element, const int8_t* x, const float* x_scale, const int8_t* codes, const float* scale,
                const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream) {
  const auto chosen = element == Element::kBFloat16 ? launch_tiles<__nv_bfloat16> : launch_tiles<__half>;
  return chosen(x, x_scale, codes, scale, bias, out, shape, launch, stream);
}

int quantize_tokens(Element element, const void* x, int8_t* codes, float* scale, int tokens, int columns, bool overlap,
                    void* stream) {
  constexpr int kThreads = 512;
  if (element == Element::kBFloat16) {
    return launch_kernel(quantize_tokens_kernel<__nv_bfloat16>, tokens, kThreads, 0, overlap, stream,
                         static_cast<const __nv_bfloat16*>(x), codes, scale, columns);
  }
  return launch_kernel(quantize_tokens_kernel<__half>, tokens, kThreads, 0, overlap, stream, static_cast<const __half*>(x),
                       codes, scale, columns);
}

}  // namespace qrealign
