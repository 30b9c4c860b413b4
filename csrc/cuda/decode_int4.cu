// 4-bit weights times 16-bit activations for up to 16 tokens.
//
// A tile is 16 rows x 128 columns: thread (g, t) of a warp, g = lane / 4, t = lane % 4, reads 16 bytes (32 codes) of the rows
// g and g + 8. Tensor cores do not care which columns meet in a product as long as weights and x agree, so a thread's
// own codes are its fragments: masking a word with 0x000f000f leaves columns c and c + 4 in place as the mantissas of two
// numbers whose exponent comes from one OR. They are code + 8 + kMagic; what is too much leaves as kMagic times the sum of
// x, which one more product (with ones) gives, in the layout that it is needed in.
#include "device.cuh"

namespace qrealign {
namespace {

template <typename T>
struct Magic;
template <>
struct Magic<__nv_bfloat16> {
  static constexpr uint32_t kExponent = 0x43004300u;  // 128, its last place is 1
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr float kOffset = 136.0f;
};
template <>
struct Magic<__half> {
  static constexpr uint32_t kExponent = 0x64006400u;  // 1024, its last place is 1
  static constexpr uint32_t kOnes = 0x3c003c00u;
  static constexpr float kOffset = 1032.0f;
};

template <typename T>
__device__ __forceinline__ void multiply(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Columns c and c + 4 of a word.
template <typename T>
__device__ __forceinline__ uint32_t decode(uint32_t word, int c) {
  return ((word >> (4 * c)) & 0x000f000fu) | Magic<T>::kExponent;
}

template <typename T, int kRowTiles, int kKTiles, int kTokenTiles, bool kSymmetric>
__global__ void __launch_bounds__(kMaxWarps* kWarp) decode_int4_kernel(const T* x, const uint8_t* codes, const float* scale, const int8_t* zero_point,
                                   const T* bias, T* out, int tokens, int rows, int columns, int groups) {
  constexpr int kRows = kRowTiles * kTileRows, kColumns = 2 * kTileBytes;
  extern __shared__ float shared[];  // [warps][kRows][kTokenTiles * 8]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, tiles = columns / kColumns, tiles_to_group = tiles / groups;
  const size_t row_bytes = columns / 2;

  float totals[kRowTiles][kTokenTiles][4] = {};
  for (int first = warp * kKTiles; first < tiles; first += warps * kKTiles) {
    uint4 words[kKTiles][kRowTiles][2];
    float scales[kKTiles][kRowTiles][2], points[kKTiles][kRowTiles][2];
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Rows and tiles past the end are read again from the last ones, and meet neither an output nor an x.
          const size_t row = min(first_row + r * kTileRows + half * 8 + g, rows - 1);
          const int tile = min(first + k, tiles - 1);
          words[k][r][half] = load_once(codes + row * row_bytes + tile * kTileBytes + t * 16);
          const size_t group = row * groups + tile / tiles_to_group;
          scales[k][r][half] = __ldg(scale + group);
          points[k][r][half] = kSymmetric ? Magic<T>::kOffset : Magic<T>::kOffset + __ldg(zero_point + group);
        }
      }
    }
    if (first == warp * kKTiles) wait_for_kernels_before();
#pragma unroll
    for (int k = 0; k < kKTiles; ++k) {
      float sums[kRowTiles][kTokenTiles][4] = {}, x_sums[kTokenTiles][4] = {};
      uint4 values[kTokenTiles][4] = {};
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = n * kTileTokensMma + g;
        if (token < tokens && first + k < tiles) {
          const T* from = x + static_cast<size_t>(token) * columns + (first + k) * kColumns + t * 32;
#pragma unroll
          for (int i = 0; i < 4; ++i) values[n][i] = load(from + 8 * i);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // words of 8 columns
        uint32_t b[kTokenTiles][4];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          const uint4 v = values[n][i];
          b[n][0] = __byte_perm(v.x, v.z, 0x5410);  // columns 0 and 4
          b[n][1] = __byte_perm(v.x, v.z, 0x7632);
          b[n][2] = __byte_perm(v.y, v.w, 0x5410);
          b[n][3] = __byte_perm(v.y, v.w, 0x7632);
          constexpr uint32_t kOnes = Magic<T>::kOnes;
          multiply<T>(x_sums[n], kOnes, kOnes, kOnes, kOnes, b[n][0], b[n][1]);
          multiply<T>(x_sums[n], kOnes, kOnes, kOnes, kOnes, b[n][2], b[n][3]);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint4 upper = words[k][r][0], lower = words[k][r][1];
          const uint32_t u = i == 0 ? upper.x : i == 1 ? upper.y : i == 2 ? upper.z : upper.w;
          const uint32_t l = i == 0 ? lower.x : i == 1 ? lower.y : i == 2 ? lower.z : lower.w;
#pragma unroll
          for (int c = 0; c < 4; c += 2) {
            const uint32_t a0 = decode<T>(u, c), a1 = decode<T>(l, c), a2 = decode<T>(u, c + 1), a3 = decode<T>(l, c + 1);
#pragma unroll
            for (int n = 0; n < kTokenTiles; ++n) multiply<T>(sums[r][n], a0, a1, a2, a3, b[n][c], b[n][c + 1]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals[r][n][i] += scales[k][r][i / 2] * (sums[r][n][i] - points[k][r][i / 2] * x_sums[n][i]);
          }
        }
      }
    }
  }
  let_next_kernel_start();

  constexpr int kTokens = kTokenTiles * kTileTokensMma;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = r * kTileRows + (i / 2) * 8 + g, token = n * kTileTokensMma + 2 * t + i % 2;
        shared[(warp * kTokens + token) * kRows + row] = totals[r][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * tokens; i += blockDim.x) {
    const int row = first_row + i % kRows, token = i / kRows;
    if (row >= rows) continue;
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += shared[w * kTokens * kRows + i];
    if (bias) total += to_float(bias[row]);
    out[static_cast<size_t>(token) * rows + row] = from_float<T>(total);
  }
}

template <typename T, int kRowTiles, int kKTiles>
int launch_tokens(const void* x, const void* codes, const float* scale, const int8_t* zero_point, const void* bias, void* out,
                  DecodeShape shape, int groups, DecodeLaunch launch, void* stream) {
  const int token_tiles = shape.tokens > kTileTokensMma ? 2 : 1;
  const auto kernel = token_tiles == 1 ? (zero_point ? decode_int4_kernel<T, kRowTiles, kKTiles, 1, false>
                                                     : decode_int4_kernel<T, kRowTiles, kKTiles, 1, true>)
                                       : (zero_point ? decode_int4_kernel<T, kRowTiles, kKTiles, 2, false>
                                                     : decode_int4_kernel<T, kRowTiles, kKTiles, 2, true>);
  const int block_rows = kRowTiles * kTileRows;
  const int shared_bytes = launch.warps * block_rows * token_tiles * kTileTokensMma * static_cast<int>(sizeof(float));
  return launch_kernel(kernel, (shape.rows + block_rows - 1) / block_rows, launch.warps * kWarp, shared_bytes, launch.overlap,
                       stream, static_cast<const T*>(x), static_cast<const uint8_t*>(codes), scale, zero_point,
                       static_cast<const T*>(bias), static_cast<T*>(out), shape.tokens, shape.rows, shape.columns, groups);
}

template <typename T>
int launch_tiles(const void* x, const void* codes, const float* scale, const int8_t* zero_point, const void* bias, void* out,
                 DecodeShape shape, int groups, DecodeLaunch launch, void* stream) {
  const auto chosen = launch.row_tiles == 1 && launch.k_tiles == 1   ? launch_tokens<T, 1, 1>
                      : launch.row_tiles == 1 && launch.k_tiles == 2 ? launch_tokens<T, 1, 2>
                      : launch.row_tiles == 1 && launch.k_tiles == 4 ? launch_tokens<T, 1, 4>
                      : launch.row_tiles == 2 && launch.k_tiles == 1 ? launch_tokens<T, 2, 1>
                      : launch.row_tiles == 2 && launch.k_tiles == 2 ? launch_tokens<T, 2, 2>
                                                                     : nullptr;
  return chosen ? chosen(x, codes, scale, zero_point, bias, out, shape, groups, launch, stream) : -1;
}

}  // namespace

int decode_int4(Element element, const void* x, const void* codes, const float* scale, const int8_t* zero_point,
                const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch launch, void* stream) {
  const auto chosen = element == Element::kBFloat16 ? launch_tiles<__nv_bfloat16> : launch_tiles<__half>;
  return chosen(x, codes, scale, zero_point, bias, out, shape, groups, launch, stream);
}

const char* error_text(int code) {
  return code < 0 ? "no kernel was compiled for this launch" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace qrealign
