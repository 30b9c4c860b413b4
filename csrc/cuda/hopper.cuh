// Hopper's own instructions: barriers in shared memory, tiles copied by the tensor memory accelerator, and products of whole warp
// groups whose left operand lies in registers.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace qrealign {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier of shared memory, by its address; its phases are told apart by their parity.
struct Barrier {
  uint32_t address;

  __device__ void init(int arrivals) const { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(arrivals)); }

  // Counts as an arrival; `bytes` more have to come before the phase ends.
  __device__ void expect(int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
  }

  __device__ void wait(int parity) const {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra ready;\nbra again;\nready:\n}" ::"r"(address),
        "r"(parity)
        : "memory");
  }

  // Arrives at the barrier of the same place in another block of the cluster.
  __device__ void arrive_at(int block) const {
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(address),
        "r"(block)
        : "memory");
  }
};

// Copies the tile at (x, y) of a map; in clusters of more than one block, to the same place in each of them.
template <int kCluster>
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap* map, Barrier barrier, int x, int y) {
  if constexpr (kCluster == 1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map),
        "r"(barrier.address), "r"(x), "r"(y)
        : "memory");
  } else {
    constexpr uint16_t kAll = (1 << kCluster) - 1;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], "
        "%5;" ::"r"(to),
        "l"(map), "r"(barrier.address), "r"(x), "r"(y), "h"(kAll)
        : "memory");
  }
}

// Meets all threads of a cluster; whole warps call it.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Tells where `multiply` finds a tile of bfloat16 in shared memory: rows of 128 bytes, swizzled over as many, aligned to 1,024 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzled128 = uint64_t(1) << 62, kEightRows = uint64_t(1024 >> 4) << 32, kUnused = uint64_t(1) << 16;
  return kSwizzled128 | kEightRows | kUnused | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until no more than the last `kLeft` groups of products are under way.
template <int kLeft>
__device__ __forceinline__ void finish_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// sums += left [64, 16] @ right [kWidth, 16].T in bfloat16, by a warp group. `left` are this thread's fragments, `right` a descriptor.
template <int kWidth>
__device__ __forceinline__ void multiply(float (&sums)[kWidth / 2], const uint32_t (&left)[4], uint64_t right);

#define QREALIGN_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define QREALIGN_16(i) QREALIGN_4(i), QREALIGN_4(i + 4), QREALIGN_4(i + 8), QREALIGN_4(i + 12)
#define QREALIGN_64(i) QREALIGN_16(i), QREALIGN_16(i + 16), QREALIGN_16(i + 32), QREALIGN_16(i + 48)
#define QREALIGN_LEFT "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right)

template <>
__device__ __forceinline__ void multiply<64>(float (&sums)[32], const uint32_t (&left)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : QREALIGN_16(0), QREALIGN_16(16)
      : QREALIGN_LEFT);
}

template <>
__device__ __forceinline__ void multiply<128>(float (&sums)[64], const uint32_t (&left)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
      : QREALIGN_64(0)
      : QREALIGN_LEFT);
}

template <>
__device__ __forceinline__ void multiply<256>(float (&sums)[128], const uint32_t (&left)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "{%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
      : QREALIGN_64(0), QREALIGN_64(64)
      : QREALIGN_LEFT);
}

#undef QREALIGN_4
#undef QREALIGN_16
#undef QREALIGN_64
#undef QREALIGN_LEFT

}  // namespace qrealign
