// 4-bit weights times 16-bit activations for up to 16 tokens.
//
// A unit is 16 rows x 256 columns: thread (g, t) of a warp, g = lane / 4, t = lane % 4, takes words 8t to 8t + 7 of rows g and
// g + 8. Tensor cores do not care which columns meet in a product as long as weights and x agree, so a thread's own words
// are its fragments: masking with 0x000f000f leaves a column and the one 64 further as the mantissas of two numbers whose
// exponent comes from one OR. They are code + 8 + 2^k; what is too much leaves as a multiple of the sum of x, which one
// more product, with ones, gives in the layout that it is needed in.
#include <algorithm>

#include "device.cuh"

namespace qrealign {
namespace {

constexpr int kPlane = 32;  // columns that the same nibble of 32 words holds; see layouts.py

template <typename T>
struct Magic;
template <>
struct Magic<__nv_bfloat16> {
  static constexpr uint32_t kExponent = 0x43004300u;  // 128, whose last place is 1
  static constexpr uint32_t kOnes = 0x3f803f80u;
  static constexpr float kOffset = 128.0f + 8.0f;
};
template <>
struct Magic<__half> {
  static constexpr uint32_t kExponent = 0x64006400u;  // 1024, whose last place is 1
  static constexpr uint32_t kOnes = 0x3c003c00u;
  static constexpr float kOffset = 1024.0f + 8.0f;
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

// Nibbles i and i + 4 of a word as numbers.
template <typename T>
__device__ __forceinline__ uint32_t decode(uint32_t word, int i) {
  return ((word >> (4 * i)) & 0x000f000fu) | Magic<T>::kExponent;
}

template <typename T, int kRowTiles, int kTokenTiles, int kStages, bool kSymmetric>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    decode_int4_kernel(const T* x, const uint8_t* codes, Element scale_element, const void* scale, const int8_t* zero_point,
                       const T* bias, T* out, DecodeShape shape, int groups) {
  constexpr int kRows = kRowTiles * kTileRows, kTokens = kTokenTiles * kTileTokens, kUnitColumns = 2 * kUnitBytes;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, units = (shape.row_bytes + kUnitBytes - 1) / kUnitBytes;
  const int group_halves = max(shape.columns / groups / 128, 1);  // halves of a unit in a group

  using Stream = WeightStream<kRows, kStages>;
  const Stream stream(shared + warp * Stream::kBytes, codes, shape.row_bytes, first_row, shape.rows);
  for (int stage = 0; stage < kStages; ++stage) {
    if (warp + stage * warps < units) stream.fetch(warp + stage * warps, stage);
    stream.commit();
  }
  // Scales come from memory as the weights do: they are read one unit ahead.
  float scales[2][kRowTiles][2], points[2][kRowTiles][2];  // [half of the unit][tile][row g or g + 8]
  const auto read_scales = [&](int unit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = min((2 * unit + half) / group_halves, groups - 1);
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const size_t at = static_cast<size_t>(min(first_row + 8 * i + g, shape.rows - 1)) * groups + group;
        scales[half][i / 2][i % 2] = read_float(scale_element, scale, at);
        points[half][i / 2][i % 2] = Magic<T>::kOffset;
        if (!kSymmetric) points[half][i / 2][i % 2] += zero_point[at];
      }
    }
  };
  read_scales(warp);
  wait_for_kernels_before();

  float totals[kRowTiles][kTokenTiles][4] = {};
  int stage = 0;
  for (int unit = warp; unit < units; unit += warps) {
    stream.wait();
    uint4 words[kRowTiles][2][2];  // [tile][row g or g + 8][first or last four words]
#pragma unroll
    for (int i = 0; i < 4 * kRowTiles; ++i) {
      words[i / 4][i / 2 % 2][i % 2] = stream.chunk(stage, i / 2 * 8 + g, 2 * t + i % 2);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[kRowTiles][kTokenTiles][4] = {}, x_sums[kTokenTiles][4] = {};
      uint4 values[kTokenTiles][4] = {};  // 8 columns of the 4 planes
#pragma unroll
      for (int i = 0; i < 4 * kTokenTiles; ++i) {
        const int token = i / 4 * kTileTokens + g, column = unit * kUnitColumns + (4 * half + i % 4) * kPlane + 8 * t;
        if (token < shape.tokens && column < shape.columns) {
          values[i / 4][i % 4] = load(x + static_cast<size_t>(token) * shape.columns + column);
        }
      }
#pragma unroll
      for (int word = 0; word < 8; ++word) {
        const int selector = word % 2 ? 0x7632 : 0x5410;
        uint32_t b0[kTokenTiles], b1[kTokenTiles];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) {
          b0[n] = __byte_perm(word_of(values[n][0], word / 2), word_of(values[n][2], word / 2), selector);
          b1[n] = __byte_perm(word_of(values[n][1], word / 2), word_of(values[n][3], word / 2), selector);
          constexpr uint32_t kOnes = Magic<T>::kOnes;
          multiply<T>(x_sums[n], kOnes, kOnes, kOnes, kOnes, b0[n], b1[n]);
        }
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const uint32_t upper = word_of(words[r][0][word / 4], word % 4), lower = word_of(words[r][1][word / 4], word % 4);
          const uint32_t a0 = decode<T>(upper, half), a1 = decode<T>(lower, half);
          const uint32_t a2 = decode<T>(upper, half + 2), a3 = decode<T>(lower, half + 2);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) multiply<T>(sums[r][n], a0, a1, a2, a3, b0[n], b1[n]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
        const int r = i / (kTokenTiles * 4), n = i / 4 % kTokenTiles, row = i % 4 / 2;
        totals[r][n][i % 4] += scales[half][r][row] * (sums[r][n][i % 4] - points[half][r][row] * x_sums[n][i % 4]);
      }
    }
    __syncwarp();
    if (unit + kStages * warps < units) stream.fetch(unit + kStages * warps, stage);
    stream.commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (unit + warps < units) read_scales(unit + warps);
  }
  let_next_kernel_start();

  const float* sums = sum_over_warps<float, kRowTiles, kTokenTiles>(totals, shared);
  for (int i = threadIdx.x; i < kRows * shape.tokens; i += blockDim.x) {
    const int row = first_row + i % kRows, token = i / kRows;
    if (row >= shape.rows) continue;
    float total = 0.0f;
    for (int w = 0; w < warps; ++w) total += sums[w * kTokens * kRows + i];
    if (bias) total += to_float(bias[row]);
    out[static_cast<size_t>(token) * shape.rows + row] = from_float<T>(total);
  }
}

// The same for rows that `warps` units span, where a warp keeps its unit of the tokens in registers as the fragments they become,
// and walks over tiles of 16 rows: tokens are fetched and turned once a multiprocessor, not once a tile.
template <typename T, int kTokenTiles, int kStages, bool kSymmetric>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    decode_int4_held_kernel(const T* x, const uint8_t* codes, Element scale_element, const void* scale, const int8_t* zero_point,
                            const T* bias, T* out, DecodeShape shape, int groups) {
  constexpr int kTokens = kTokenTiles * kTileTokens, kUnitColumns = 2 * kUnitBytes;
  extern __shared__ __align__(16) char shared[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int g = lane / 4, t = lane % 4, tiles = (shape.rows + kTileRows - 1) / kTileRows;
  const int group_halves = max(shape.columns / groups / 128, 1);  // halves of a unit in a group

  using Stream = WeightStream<kTileRows, kStages>;
  const auto stream_of = [&](int tile) {
    return Stream(shared + warp * Stream::kBytes, codes, shape.row_bytes, tile * kTileRows, shape.rows);
  };
  int ahead = blockIdx.x;  // the next tile to fetch
  const auto fetch = [&](int stage) {
    if (ahead < tiles) {
      stream_of(ahead).fetch(warp, stage);
      if (lane < kTileRows && warp % 4 == 0) {  // its scales, and those of the next three warps, come from memory too
        const size_t row = min(ahead * kTileRows + lane, shape.rows - 1), bytes = scale_element == Element::kFloat32 ? 4 : 2;
        const char* from = static_cast<const char*>(scale) + (row * groups + min(2 * warp / group_halves, groups - 1)) * bytes;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
      }
    }
    stream_of(ahead).commit();
    ahead += gridDim.x;
  };
  for (int stage = 0; stage < kStages; ++stage) fetch(stage);
  float scales[2][2], points[2][2];  // [half of the unit][row g or g + 8], read one tile ahead
  const auto read_scales = [&](int tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int group = min((2 * warp + i / 2) / group_halves, groups - 1);
      const size_t at = static_cast<size_t>(min(tile * kTileRows + 8 * (i % 2) + g, shape.rows - 1)) * groups + group;
      scales[i / 2][i % 2] = read_float(scale_element, scale, at);
      points[i / 2][i % 2] = Magic<T>::kOffset;
      if (!kSymmetric) points[i / 2][i % 2] += zero_point[at];
    }
  };
  read_scales(blockIdx.x);
  wait_for_kernels_before();

  uint32_t held[2][kTokenTiles][8][2];  // [half][tile of tokens][word][fragment]
  float x_sums[2][kTokenTiles][2];      // of tokens 2t and 2t + 1
#pragma unroll
  for (int i = 0; i < 2 * kTokenTiles; ++i) {
    const int half = i / kTokenTiles, n = i % kTokenTiles, token = n * kTileTokens + g;
    uint4 values[4] = {};  // 8 columns of the 4 planes
#pragma unroll
    for (int plane = 0; plane < 4; ++plane) {
      const int column = warp * kUnitColumns + (4 * half + plane) * kPlane + 8 * t;
      if (token < shape.tokens && column < shape.columns) {
        values[plane] = load(x + static_cast<size_t>(token) * shape.columns + column);
      }
    }
    float sums[4] = {};
#pragma unroll
    for (int word = 0; word < 8; ++word) {
      const int selector = word % 2 ? 0x7632 : 0x5410;
      constexpr uint32_t kOnes = Magic<T>::kOnes;
      uint32_t(&pair)[2] = held[half][n][word];
      pair[0] = __byte_perm(word_of(values[0], word / 2), word_of(values[2], word / 2), selector);
      pair[1] = __byte_perm(word_of(values[1], word / 2), word_of(values[3], word / 2), selector);
      multiply<T>(sums, kOnes, kOnes, kOnes, kOnes, pair[0], pair[1]);
    }
    x_sums[half][n][0] = sums[0];
    x_sums[half][n][1] = sums[1];
  }
  let_next_kernel_start();

  float* const all = reinterpret_cast<float*>(shared + warps * Stream::kBytes);  // [2][warps][kTokens][kPitch]
  int stage = 0, turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Stream stream = stream_of(tile);
    stream.wait();
    float totals[kTokenTiles][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[kTokenTiles][4] = {};
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const uint4 upper_words = stream.chunk(stage, g, 2 * t + four), lower_words = stream.chunk(stage, 8 + g, 2 * t + four);
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const uint32_t upper = word_of(upper_words, word), lower = word_of(lower_words, word);
          const uint32_t a0 = decode<T>(upper, half), a1 = decode<T>(lower, half);
          const uint32_t a2 = decode<T>(upper, half + 2), a3 = decode<T>(lower, half + 2);
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) {
            const uint32_t(&pair)[2] = held[half][n][4 * four + word];
            multiply<T>(sums[n], a0, a1, a2, a3, pair[0], pair[1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles * 4; ++i) {
        const int n = i / 4, row = i % 4 / 2;
        totals[n][i % 4] += scales[half][row] * (sums[n][i % 4] - points[half][row] * x_sums[half][n][i % 2]);
      }
    }
    __syncwarp();
    fetch(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (tile + static_cast<int>(gridDim.x) < tiles) read_scales(tile + gridDim.x);

    add_over_warps(totals, all, turn, tile, shape, [&](int row, int token, float total) {
      if (bias) total += to_float(bias[row]);
      out[static_cast<size_t>(token) * shape.rows + row] = from_float<T>(total);
    });
  }
}

template <typename T, int kRowTiles, int kStages>
int launch(const void* x, const void* codes, Element scale_element, const void* scale, const int8_t* zero_point,
           const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch launch, void* stream) {
  const bool wide = shape.tokens > kTileTokens, symmetric = zero_point == nullptr;
  const auto kernel = wide ? (symmetric ? decode_int4_kernel<T, kRowTiles, 2, kStages, true>
                                        : decode_int4_kernel<T, kRowTiles, 2, kStages, false>)
                           : (symmetric ? decode_int4_kernel<T, kRowTiles, 1, kStages, true>
                                        : decode_int4_kernel<T, kRowTiles, 1, kStages, false>);
  const int rows = kRowTiles * kTileRows, tokens = wide ? 2 * kTileTokens : kTileTokens;
  const Layout layout = {dim3((shape.rows + rows - 1) / rows), dim3(launch.warps * kWarp),
                         shared_bytes(launch.warps, rows, kStages, tokens), launch.overlap};
  return launch_kernel(kernel, layout, stream, static_cast<const T*>(x), static_cast<const uint8_t*>(codes), scale_element, scale,
                       zero_point, static_cast<const T*>(bias), static_cast<T*>(out), shape, groups);
}

template <typename T, int kStages>
int launch_held(const void* x, const void* codes, Element scale_element, const void* scale, const int8_t* zero_point,
                const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch launch, void* stream) {
  const bool wide = shape.tokens > kTileTokens, symmetric = zero_point == nullptr;
  const auto kernel = wide ? (symmetric ? decode_int4_held_kernel<T, 2, kStages, true> : decode_int4_held_kernel<T, 2, kStages, false>)
                           : (symmetric ? decode_int4_held_kernel<T, 1, kStages, true> : decode_int4_held_kernel<T, 1, kStages, false>);
  const int units = (shape.row_bytes + kUnitBytes - 1) / kUnitBytes, tiles = (shape.rows + kTileRows - 1) / kTileRows;
  if (units > kMaxWarps) return -1;
  const Layout layout = {dim3(std::min(tiles, multiprocessors())), dim3(units * kWarp),
                         held_bytes(units, kStages, wide ? 2 * kTileTokens : kTileTokens), launch.overlap};
  return launch_kernel(kernel, layout, stream, static_cast<const T*>(x), static_cast<const uint8_t*>(codes), scale_element, scale,
                       zero_point, static_cast<const T*>(bias), static_cast<T*>(out), shape, groups);
}

template <typename T>
auto find_launch(DecodeLaunch cut) {
  using Launch = decltype(&launch<T, 1, 2>);
  if (cut.row_tiles == 0 && cut.stages == 3) return launch_held<T, 3>;
  if (cut.row_tiles == 0 && cut.stages == 5) return launch_held<T, 5>;
  if (cut.row_tiles == 1 && cut.stages == 2) return launch<T, 1, 2>;
  if (cut.row_tiles == 1 && cut.stages == 3) return launch<T, 1, 3>;
  if (cut.row_tiles == 2 && cut.stages == 2) return launch<T, 2, 2>;
  if (cut.row_tiles == 2 && cut.stages == 3) return launch<T, 2, 3>;
  return Launch(nullptr);
}

}  // namespace

int decode_int4(Element element, const void* x, const void* codes, Element scale_element, const void* scale,
                const int8_t* zero_point, const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch cut,
                void* stream) {
  if (element == Element::kFloat32) return -1;
  const auto found = element == Element::kBFloat16 ? find_launch<__nv_bfloat16>(cut) : find_launch<__half>(cut);
  return found ? found(x, codes, scale_element, scale, zero_point, bias, out, shape, groups, cut, stream) : -1;
}

const char* unusable_reason() {
  constexpr int kMajor = 1000;  // a driver runs what an older one of its major version, or of an earlier one, runs
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess || driver / kMajor < runtime / kMajor) {
    return "the NVIDIA driver is older than the CUDA toolkit that built the extension";
  }
  return nullptr;
}

const char* error_text(int code) {
  return code < 0 ? "no kernel was compiled for this launch" : cudaGetErrorString(static_cast<cudaError_t>(code));
}

}  // namespace qrealign
