// 4-bit weights times bfloat16 tokens, more than decode.h is for, on GPUs of compute capability 9.0.
//
// x [tokens, K] and out [tokens, N] are row-major, K a multiple of 8; weights lie in the layout PLANES4 of layouts.py. No call
// allocates, waits, or leaves its stream.
#pragma once

#include <cstdint>

namespace qrealign {

// Tiles of `tokens` tokens by `rows` of the weight: a warp group works on 64 rows, or two on the same 64 (rows = 64) and half of the
// columns apiece. `cluster` blocks of neighbouring rows fetch their tokens together.
struct TileLaunch {
  int tokens;
  int rows;
  int cluster;
};

struct TileShape {
  int tokens;
  int rows;       // N
  int columns;    // K
  int row_bytes;  // of the weight
  int groups;     // of K; each is the whole row, or 128 columns times a power of two
};

// out = x @ ((codes - zero_point) * scale).T + bias, every weight rounded to bfloat16 before it is multiplied. All but codes and
// zero_point are bfloat16; scale and zero_point are [N, groups], zero_point and bias may be null. Returns 0, a CUDA error code, or -1
// for a launch that was not compiled.
//
// With `sums`, tiles that are left for fewer than all multiprocessors are split along K between all of them. `sums` are 2 * launch.tokens
// * max(launch.rows, 128) float32 a multiprocessor, aligned to 16 bytes, `arrivals` an int32 a multiprocessor, 0 before and after.
int matmul_int4(const void* x, const void* codes, const void* scale, const int8_t* zero_point, const void* bias, void* out,
                TileShape shape, TileLaunch launch, float* sums, int* arrivals, void* stream);

}  // namespace qrealign
