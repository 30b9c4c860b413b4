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
constexpr int kTileTokensMma = 8;  // tokens of one
constexpr int kTileBytes = 64;     // of each weight row that a warp reads with one load: 4 threads x 16 bytes

// Weights are read once: they should not push anything else out of the caches.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ uint4 load(const void* address) { return *static_cast<const uint4*>(address); }

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

// Launches with the permission to start before the kernel ahead in the stream has ended, where `overlap` asks for it.
template <typename... Parameters, typename... Arguments>
int launch_kernel(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, bool overlap, void* stream,
                  Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace qrealign
