// 8-bit weights times 8-bit activations for up to 16 tokens, and the rounding of the activations.
//
// A unit is 16 rows x 128 columns: thread (g, t) of a warp takes chunks t and t + 4 (16 bytes each) of rows g and g + 8, and of
// token g. As in decode_int4.cu, these words are the fragments of tensor-core products as they come.
#include <algorithm>

#include "device.cuh"

namespace qrealign {
namespace {

constexpr float kZeroScaleReplacement = 1.1920928955078125e-07f;  // float32 epsilon, as in reference.py
constexpr int kVector = 8;                                        // elements of x in one load

__device__ __forceinline__ void multiply(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The largest magnitude of a token, for all threads of the block; `scratch` is of kWarp numbers. Magnitudes are compared
// as integers, which have the same order, and where NaN is above them all.
template <typename T>
__device__ float largest_of(const T* token, int columns, int* scratch) {
  int largest = 0;
  for (int k = threadIdx.x * kVector; k < columns; k += blockDim.x * kVector) {
    const uint4 eight = load(token + k);
    const T* values = reinterpret_cast<const T*>(&eight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) largest = max(largest, __float_as_int(fabsf(to_float(values[i]))));
  }
  for (int distance = kWarp / 2; distance; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  }
  __syncthreads();  // a token before may still be read from scratch
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (int warp = 0; warp < blockDim.x / kWarp; ++warp) largest = max(largest, scratch[warp]);
  return __int_as_float(largest);
}

__device__ __forceinline__ float scale_of(float largest) {
  return largest == 0.0f ? kZeroScaleReplacement : __fdiv_rn(largest, 127.5f);
}

__device__ __forceinline__ int8_t code_of(float value, float scale) {
  return static_cast<int8_t>(min(max(__float2int_rn(__fdiv_rn(value, scale)), -128), 127));
}

template <typename T>
__device__ __forceinline__ void store_scaled(int sum, int row, int token, const float* x_scale, Element scale_element,
                                             const void* scale, const T* bias, T* out, const DecodeShape& shape) {
  // Without the contraction of product and sum that nvcc would make: the reference rounds after each of them.
  float value = __fmul_rn(__fmul_rn(static_cast<float>(sum), read_float(scale_element, scale, row)), x_scale[token]);
  if (bias) value = __fadd_rn(value, to_float(bias[row]));
  out[static_cast<size_t>(token) * shape.rows + row] = from_float<T>(value);
}

// With kFused, x is of T and rounded here; else it is int8 and x_scale its scales.
template <typename T, int kRowTiles, int kTokenTiles, int kStages, bool kFused>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    decode_int8_kernel(const void* x, const float* x_scale, const uint8_t* codes, Element scale_element, const void* scale,
                       const T* bias, T* out, DecodeShape shape) {
  constexpr int kRows = kRowTiles * kTileRows, kTokens = kTokenTiles * kTileTokens;
  extern __shared__ __align__(16) char shared[];
  __shared__ int scratch[kWarp];
  __shared__ float fused_scale[kMaxFusedTokens];
  __shared__ __align__(16) uint32_t fused_codes[kFused ? kMaxWarps : 1][kMaxFusedTokens][kWarp];  // a unit of each warp
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, units = (shape.row_bytes + kUnitBytes - 1) / kUnitBytes;

  using Stream = WeightStream<kRows, kStages>;
  const Stream stream(shared + warp * Stream::kBytes, codes, shape.row_bytes, first_row, shape.rows);
  for (int stage = 0; stage < kStages; ++stage) {
    if (warp + stage * warps < units) stream.fetch(warp + stage * warps, stage);
    stream.commit();
  }
  wait_for_kernels_before();
  if (kFused) {
    for (int token = 0; token < shape.tokens; ++token) {
      const float largest = largest_of(static_cast<const T*>(x) + token * shape.columns, shape.columns, scratch);
      if (threadIdx.x == 0) fused_scale[token] = scale_of(largest);
    }
    __syncthreads();
    x_scale = fused_scale;
  }

  int sums[kRowTiles][kTokenTiles][4] = {};
  int stage = 0;
  for (int unit = warp; unit < units; unit += warps) {
    uint4 values[kTokenTiles][2] = {};
    if (kFused) {
      const int column = unit * kUnitBytes + 4 * lane;
      for (int token = 0; token < shape.tokens; ++token) {
        uint32_t four = 0;
        if (column < shape.columns) {
          const uint2 loaded = *reinterpret_cast<const uint2*>(static_cast<const T*>(x) + token * shape.columns + column);
          const T* from = reinterpret_cast<const T*>(&loaded);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            four |= static_cast<uint32_t>(static_cast<uint8_t>(code_of(to_float(from[i]), x_scale[token]))) << (8 * i);
          }
        }
        fused_codes[warp][token][lane] = four;
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (g < shape.tokens) values[0][i] = load(&fused_codes[warp][g][4 * (t + 4 * i)]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kTokenTiles; ++i) {
        const int token = i / 2 * kTileTokens + g, column = unit * kUnitBytes + (t + i % 2 * 4) * kChunk;
        if (token < shape.tokens && column < shape.columns) {
          values[i / 2][i % 2] = load(static_cast<const int8_t*>(x) + static_cast<size_t>(token) * shape.columns + column);
        }
      }
    }
    stream.wait();
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int r = i / 2, chunk = i % 2;
      const uint4 upper = stream.chunk(stage, r * kTileRows + g, t + 4 * chunk);
      const uint4 lower = stream.chunk(stage, r * kTileRows + 8 + g, t + 4 * chunk);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        multiply(sums[r][n], upper.x, lower.x, upper.y, lower.y, values[n][chunk].x, values[n][chunk].y);
        multiply(sums[r][n], upper.z, lower.z, upper.w, lower.w, values[n][chunk].z, values[n][chunk].w);
      }
    }
    __syncwarp();
    if (unit + kStages * warps < units) stream.fetch(unit + kStages * warps, stage);
    stream.commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  let_next_kernel_start();

  const int* warp_sums = sum_over_warps<int, kRowTiles, kTokenTiles>(sums, shared);
  for (int i = threadIdx.x; i < kRows * shape.tokens; i += blockDim.x) {
    const int row = first_row + i % kRows, token = i / kRows;
    if (row >= shape.rows) continue;
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += warp_sums[w * kTokens * kRows + i];
    store_scaled(sum, row, token, x_scale, scale_element, scale, bias, out, shape);
  }
}

// The same for codes, where a warp keeps its units of the tokens, at most kUnits, in registers and walks over tiles of 16 rows: tokens
// are fetched once a multiprocessor, not once a tile.
template <typename T, int kTokenTiles, int kUnits, int kStages>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    decode_int8_held_kernel(const int8_t* x, const float* x_scale, const uint8_t* codes, Element scale_element, const void* scale,
                            const T* bias, T* out, DecodeShape shape) {
  constexpr int kTokens = kTokenTiles * kTileTokens;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4, tiles = (shape.rows + kTileRows - 1) / kTileRows;

  using Stream = WeightStream<kTileRows, kStages>;
  int ahead_tile = blockIdx.x, ahead = 0;  // the next unit to fetch; what lies behind a row's end or the last tile is read as zeros
  const auto fetch = [&](int stage) {
    const Stream stream(shared + warp * Stream::kBytes, codes, shape.row_bytes, ahead_tile * kTileRows, shape.rows);
    stream.fetch(warp + ahead * warps, stage);
    stream.commit();
    if (++ahead == kUnits) ahead = 0, ahead_tile += gridDim.x;
  };
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  wait_for_kernels_before();

  uint4 held[kUnits][kTokenTiles][2] = {};
#pragma unroll
  for (int i = 0; i < kUnits * kTokenTiles * 2; ++i) {
    const int unit = warp + i / (2 * kTokenTiles) * warps, n = i / 2 % kTokenTiles;
    const int token = n * kTileTokens + g, column = unit * kUnitBytes + (t + i % 2 * 4) * kChunk;
    if (token < shape.tokens && column < shape.columns) {
      held[i / (2 * kTokenTiles)][n][i % 2] = load(x + static_cast<size_t>(token) * shape.columns + column);
    }
  }
  let_next_kernel_start();

  const Stream stream(shared + warp * Stream::kBytes, codes, shape.row_bytes, 0, shape.rows);
  int* const all = reinterpret_cast<int*>(shared + warps * Stream::kBytes);  // [2][warps][kTokens][kPitch]
  int stage = 0, turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    int sums[kTokenTiles][4] = {};
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      stream.wait();
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const uint4 upper = stream.chunk(stage, g, t + 4 * chunk), lower = stream.chunk(stage, 8 + g, t + 4 * chunk);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4 values = held[unit][n][chunk];
          multiply(sums[n], upper.x, lower.x, upper.y, lower.y, values.x, values.y);
          multiply(sums[n], upper.z, lower.z, upper.w, lower.w, values.z, values.w);
        }
      }
      __syncwarp();
      fetch(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    add_over_warps(sums, all, turn, tile, shape, [&](int row, int token, int sum) {
      store_scaled(sum, row, token, x_scale, scale_element, scale, bias, out, shape);
    });
  }
}

template <typename T>
__global__ void quantize_tokens_kernel(const T* x, int8_t* codes, float* scale, int columns) {
  __shared__ int scratch[kWarp];
  let_next_kernel_start();
  wait_for_kernels_before();
  const T* token = x + static_cast<size_t>(blockIdx.x) * columns;
  int8_t* to = codes + static_cast<size_t>(blockIdx.x) * columns;
  const float step = scale_of(largest_of(token, columns, scratch));
  for (int k = threadIdx.x * kVector; k < columns; k += blockDim.x * kVector) {
    const uint4 eight = load(token + k);
    const T* values = reinterpret_cast<const T*>(&eight);
    uint2 packed;
    int8_t* bytes = reinterpret_cast<int8_t*>(&packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) bytes[i] = code_of(to_float(values[i]), step);
    *reinterpret_cast<uint2*>(to + k) = packed;
  }
  if (threadIdx.x == 0) scale[blockIdx.x] = step;
}

template <typename T, int kRowTiles, int kStages>
int launch(bool fused, const void* x, const float* x_scale, const void* codes, Element scale_element, const void* scale,
           const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream) {
  const bool wide = shape.tokens > kTileTokens;
  const auto kernel = fused  ? decode_int8_kernel<T, kRowTiles, 1, kStages, true>
                      : wide ? decode_int8_kernel<T, kRowTiles, 2, kStages, false>
                             : decode_int8_kernel<T, kRowTiles, 1, kStages, false>;
  const int rows = kRowTiles * kTileRows, tokens = wide ? 2 * kTileTokens : kTileTokens;
  const Layout layout = {dim3((shape.rows + rows - 1) / rows), dim3(launch.warps * kWarp),
                         shared_bytes(launch.warps, rows, kStages, tokens), launch.overlap};
  return launch_kernel(kernel, layout, stream, x, x_scale,
                       static_cast<const uint8_t*>(codes), scale_element, scale, static_cast<const T*>(bias),
                       static_cast<T*>(out), shape);
}

template <typename T, int kStages>
int launch_held(bool fused, const void* x, const float* x_scale, const void* codes, Element scale_element, const void* scale,
                const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream) {
  const int units = (shape.row_bytes + kUnitBytes - 1) / kUnitBytes, warps = std::min(units, kMaxWarps);
  if (fused || units > 6 * kMaxWarps) return -1;
  const bool wide = shape.tokens > kTileTokens, many = units > 2 * kMaxWarps;
  const auto kernel = wide ? (many ? decode_int8_held_kernel<T, 2, 6, kStages> : decode_int8_held_kernel<T, 2, 2, kStages>)
                           : (many ? decode_int8_held_kernel<T, 1, 6, kStages> : decode_int8_held_kernel<T, 1, 2, kStages>);
  const int tiles = (shape.rows + kTileRows - 1) / kTileRows;
  const Layout layout = {dim3(std::min(tiles, multiprocessors())), dim3(warps * kWarp),
                         held_bytes(warps, kStages, wide ? 2 * kTileTokens : kTileTokens), launch.overlap};
  return launch_kernel(kernel, layout, stream, static_cast<const int8_t*>(x), x_scale, static_cast<const uint8_t*>(codes),
                       scale_element, scale, static_cast<const T*>(bias), static_cast<T*>(out), shape);
}

template <typename T>
auto find_launch(DecodeLaunch cut) {
  using Launch = decltype(&launch<T, 1, 2>);
  if (cut.row_tiles == 0 && cut.stages == 3) return launch_held<T, 3>;
  if (cut.row_tiles == 0 && cut.stages == 5) return launch_held<T, 5>;
  if (cut.row_tiles == 1 && cut.stages == 2) return launch<T, 1, 2>;
  if (cut.row_tiles == 1 && cut.stages == 4) return launch<T, 1, 4>;
  if (cut.row_tiles == 2 && cut.stages == 2) return launch<T, 2, 2>;
  if (cut.row_tiles == 2 && cut.stages == 4) return launch<T, 2, 4>;
  return Launch(nullptr);
}

int run(bool fused, Element element, const void* x, const float* x_scale, const void* codes, Element scale_element,
        const void* scale, const void* bias, void* out, DecodeShape shape, DecodeLaunch cut, void* stream) {
  if (element == Element::kFloat32 || (fused && shape.tokens > kMaxFusedTokens)) return -1;
  const auto found = element == Element::kBFloat16 ? find_launch<__nv_bfloat16>(cut) : find_launch<__half>(cut);
  return found ? found(fused, x, x_scale, codes, scale_element, scale, bias, out, shape, cut, stream) : -1;
}

}  // namespace

int decode_int8(Element element, const int8_t* x, const float* x_scale, const void* codes, Element scale_element,
                const void* scale, const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream) {
  return run(false, element, x, x_scale, codes, scale_element, scale, bias, out, shape, launch, stream);
}

int quantize_decode_int8(Element element, const void* x, const void* codes, Element scale_element, const void* scale,
                         const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream) {
  return run(true, element, x, nullptr, codes, scale_element, scale, bias, out, shape, launch, stream);
}

int quantize_tokens(Element element, const void* x, int8_t* codes, float* scale, int tokens, int columns, bool overlap,
                    void* stream) {
  const Layout layout = {dim3(tokens), dim3(512), 0, overlap};
  if (element == Element::kFloat32) return -1;
  if (element == Element::kBFloat16) {
    return launch_kernel(quantize_tokens_kernel<__nv_bfloat16>, layout, stream,
                         static_cast<const __nv_bfloat16*>(x), codes, scale, columns);
  }
  return launch_kernel(quantize_tokens_kernel<__half>, layout, stream, static_cast<const __half*>(x),
                       codes, scale, columns);
}

}  // namespace qrealign
