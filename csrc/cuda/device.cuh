// What the decode kernels share: fragments of the tensor cores' products, loads, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "decode.h"

namespace qrealign {

constexpr int kWarp = 32;
constexpr int kMaxWarps = 16;      // of a block: 128 registers a thread
constexpr int kTileRows = 16;      // output rows of one tensor-core product
constexpr int kTileTokens = 8;     // tokens of one
constexpr int kUnitBytes = 128;    // of each weight row that a warp works on at once
constexpr int kChunk = 16;         // bytes of one load
constexpr int kPitch = 20;         // numbers between tokens of a warp's sums in shared memory: a warp's meet all banks once
constexpr int kUnitStride = 144;   // bytes between rows in shared memory: eight rows' chunks meet all banks once

__device__ __forceinline__ uint4 load(const void* address) { return *static_cast<const uint4*>(address); }

// A warp's share of the weight, on its way through shared memory: of `kRows` rows, every `warps`-th unit, `kStages` of them
// in flight. That takes no registers, and only the warp itself waits.
template <int kRows, int kStages>
class WeightStream {
 public:
  static constexpr int kStageBytes = kRows * kUnitStride;
  static constexpr int kBytes = kStages * kStageBytes;

  // `ring`: kBytes of shared memory of this warp. Rows at and behind `rows` and bytes behind a row's end read as zeros.
  __device__ WeightStream(char* ring, const uint8_t* codes, size_t row_bytes, int first_row, int rows)
      : ring_(ring), codes_(codes), row_bytes_(row_bytes), first_row_(first_row), rows_(rows) {}

  __device__ void fetch(int unit, int stage) const {
    const int lane = threadIdx.x % kWarp;
    const size_t column = static_cast<size_t>(unit) * kUnitBytes + lane % 8 * kChunk;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) {
      const int row = 4 * i + lane / 8;
      const bool inside = first_row_ + row < rows_ && column < row_bytes_;
      const uint8_t* from = inside ? codes_ + (first_row_ + row) * row_bytes_ + column : codes_;
      const unsigned to = __cvta_generic_to_shared(ring_ + stage * kStageBytes + row * kUnitStride + lane % 8 * kChunk);
      asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
    }
  }

  __device__ void commit() const { asm volatile("cp.async.commit_group;"); }

  // After it, the oldest unit that was committed is there for the whole warp.
  __device__ void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1));
    __syncwarp();
  }

  __device__ uint4 chunk(int stage, int row, int chunk) const {
    return load(ring_ + stage * kStageBytes + row * kUnitStride + chunk * kChunk);
  }

 private:
  char* ring_;
  const uint8_t* codes_;
  size_t row_bytes_;
  int first_row_;
  int rows_;
};

// Ends when the kernels before have ended and their results are visible; what comes earlier in a kernel overlaps with them.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <typename T>
__device__ __forceinline__ float to_float(T value);
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}

// The component of a vector; the index is known at compile time.
__device__ __forceinline__ uint32_t word_of(const uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float value) {
  return __float2bfloat16(value);
}
template <>
__device__ __forceinline__ __half from_float(float value) {
  return __float2half(value);
}

// Element i of an array whose dtype is known at run time; all threads agree on it.
__device__ __forceinline__ float read_float(Element element, const void* values, size_t i) {
  if (element == Element::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[i]);
  if (element == Element::kFloat16) return __half2float(static_cast<const __half*>(values)[i]);
  return static_cast<const float*>(values)[i];
}

// Puts the sums of all warps side by side as [warps][tokens][rows], to be added in that order: the same bits every time.
template <typename Sum, int kRowTiles, int kTokenTiles>
__device__ const Sum* sum_over_warps(const Sum (&sums)[kRowTiles][kTokenTiles][4], char* shared) {
  constexpr int kRows = kRowTiles * kTileRows, kTokens = kTokenTiles * kTileTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  Sum* all = reinterpret_cast<Sum*>(shared);
  __syncthreads();  // the memory was the warps' streams
#pragma unroll
  for (int i = 0; i < kRowTiles * kTokenTiles * 4; ++i) {
    const int r = i / (4 * kTokenTiles), n = i / 4 % kTokenTiles;
    const int row = r * kTileRows + i % 4 / 2 * 8 + g, token = n * kTileTokens + 2 * t + i % 2;
    all[(warp * kTokens + token) * kRows + row] = sums[r][n][i % 4];
  }
  __syncthreads();
  return all;
}

// Adds the warps' sums of one of the tiles that a block walks over, in their order, and lets `store` have each total with its row of the
// weight and its token. `all` are [2][warps][tokens of the tile][kPitch]: two places by turns, so that one barrier a tile keeps a warp
// from writing where another still reads.
template <typename Sum, int kTokenTiles, typename Store>
__device__ __forceinline__ void add_over_warps(const Sum (&sums)[kTokenTiles][4], Sum* all, int& turn, int tile,
                                               const DecodeShape& shape, Store store) {
  constexpr int kTokens = kTokenTiles * kTileTokens;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, g = lane / 4, t = lane % 4;
  Sum* const place = all + turn * warps * kTokens * kPitch;
  turn ^= 1;
#pragma unroll
  for (int i = 0; i < kTokenTiles * 4; ++i) {
    const int token = i / 4 * kTileTokens + 2 * t + i % 2;
    place[(warp * kTokens + token) * kPitch + i % 4 / 2 * 8 + g] = sums[i / 4][i % 4];
  }
  __syncthreads();
  // Other warps by turns: those that add come last to the next tile.
  for (int i = (threadIdx.x + turn * blockDim.x / 2) % blockDim.x; i < kTileRows * shape.tokens; i += blockDim.x) {
    const int token = i / kTileRows, row = tile * kTileRows + i % kTileRows;
    if (row >= shape.rows) continue;
    Sum total = 0;
#pragma unroll 8
    for (int w = 0; w < warps; ++w) total += place[(w * kTokens + token) * kPitch + i % kTileRows];
    store(row, token, total);
  }
}

// What a block needs: its warps' streams, later their sums.
inline int shared_bytes(int warps, int rows, int stages, int tokens) {
  const int streams = rows * kUnitStride * stages, sums = rows * tokens * static_cast<int>(sizeof(float));
  return warps * (streams > sums ? streams : sums);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// What a block needs that walks over tiles of rows: its warps' streams, and two places for their sums.
inline int held_bytes(int warps, int stages, int tokens) {
  return warps * (stages * kTileRows * kUnitStride + 2 * tokens * kPitch * static_cast<int>(sizeof(float)));
}

// How a kernel is laid out on the GPU; `overlap` permits it to start before the kernel ahead in the stream has ended.
struct Layout {
  dim3 blocks;
  dim3 threads;
  int shared_bytes;
  bool overlap;
  int cluster = 1;  // neighbouring blocks that run together
};

template <typename... Parameters, typename... Arguments>
int launch_kernel(void (*kernel)(Parameters...), const Layout& layout, void* stream, Arguments... arguments) {
  constexpr int kWithoutAsking = 48 * 1024, kMostStatic = 8 * 1024;  // a kernel's fixed arrays count too
  if (layout.shared_bytes > kWithoutAsking - kMostStatic) {
    const cudaError_t refused = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, layout.shared_bytes);
    if (refused != cudaSuccess) return static_cast<int>(refused);
  }
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (layout.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (layout.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = layout.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = layout.blocks;
  config.blockDim = layout.threads;
  config.dynamicSmemBytes = layout.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace qrealign
