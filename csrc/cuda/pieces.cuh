// Rows on their way through shared memory, each thread's pieces of them for itself: no thread waits for another's.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace qrealign {

constexpr int kVector = 8;  // columns of a piece: 16 bytes of bfloat16
constexpr int kAhead = 3;   // batches of rows on their way or at work

// Of each batch of kRows rows, a thread has kVectors pieces of each row of kOperands matrices.
template <int kVectors, int kRows, int kOperands>
class Pieces {
 public:
  static int bytes(int threads) { return kAhead * kRows * kVectors * kOperands * threads * static_cast<int>(sizeof(uint4)); }

  __device__ explicit Pieces(char* shared) : mine_(reinterpret_cast<uint4*>(shared) + threadIdx.x) {}

  // First column of the thread's piece v.
  __device__ static int column(int v) { return (v * blockDim.x + threadIdx.x) * kVector; }

  __device__ uint4* piece(int stage, int row, int v, int operand) const {
    return mine_ + (((stage * kRows + row) * kVectors + v) * kOperands + operand) * blockDim.x;
  }

  // What is not `inside` becomes zeros; `from` may be read nevertheless.
  __device__ void fetch(int stage, int row, int v, int operand, const __nv_bfloat16* from, bool inside) const {
    const unsigned to = __cvta_generic_to_shared(piece(stage, row, v, operand));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
  }

  __device__ void commit() const { asm volatile("cp.async.commit_group;"); }

  // After it, the oldest of kAhead batches that were committed is there.
  __device__ void wait() const { asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory"); }

 private:
  uint4* mine_;
};

}  // namespace qrealign
