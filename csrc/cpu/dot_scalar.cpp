// The products in plain C++: what every other instruction set must equal bit for bit.
#include "linear.h"

namespace qrealign {
namespace {

void int8_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  for (int block = 0; block < shape.blocks; ++block) {
    for (int token = 0; token < shape.tokens; ++token) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(weight + block * shape.block_stride);
      const int8_t* values = x + token * shape.token_stride;
      int32_t sums[kBlockRows] = {};
      for (int64_t quad = 0; quad < shape.quads; ++quad, codes += kQuadBytes, values += 4) {
        for (int i = 0; i < kQuadBytes; ++i) sums[i / 4] += codes[i] * values[i % 4];
      }
      for (int row = 0; row < kBlockRows; ++row) out[(block * kTileTokens + token) * kBlockRows + row] = sums[row];
    }
  }
}

void int4_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  for (int block = 0; block < shape.blocks; ++block) {
    for (int token = 0; token < shape.tokens; ++token) {
      const uint8_t* codes = weight + block * shape.block_stride;
      const int8_t* values = x + token * shape.token_stride;
      int32_t sums[kBlockRows] = {};
      for (int64_t quad = 0; quad < shape.quads; ++quad, codes += kQuadBytes, values += 8) {
        for (int i = 0; i < kQuadBytes; ++i) {
          sums[i / 4] += (codes[i] & 15) * values[i % 4] + (codes[i] >> 4) * values[4 + i % 4];
        }
      }
      for (int row = 0; row < kBlockRows; ++row) out[(block * kTileTokens + token) * kBlockRows + row] = sums[row];
    }
  }
}

void float8_product(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  for (int block = 0; block < shape.blocks; ++block) {
    for (int token = 0; token < shape.tokens; ++token) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(weight + block * shape.block_stride);
      const float* values = x + token * shape.token_stride;
      float sums[kBlockRows] = {};
      for (int64_t quad = 0; quad < shape.quads; ++quad, codes += kQuadBytes, values += 4) {
        for (int i = 0; i < kQuadBytes; ++i) {
          sums[i / 4] = __builtin_fmaf(values[i % 4], static_cast<float>(codes[i]), sums[i / 4]);
        }
      }
      for (int row = 0; row < kBlockRows; ++row) out[(block * kTileTokens + token) * kBlockRows + row] = sums[row];
    }
  }
}

void float4_product(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  for (int block = 0; block < shape.blocks; ++block) {
    for (int token = 0; token < shape.tokens; ++token) {
      const uint8_t* codes = weight + block * shape.block_stride;
      const float* values = x + token * shape.token_stride;
      float sums[kBlockRows] = {};
      for (int64_t quad = 0; quad < shape.quads; ++quad, codes += kQuadBytes, values += 8) {
        for (int i = 0; i < kQuadBytes; ++i) {
          const int low = (codes[i] & 15) - 8, high = (codes[i] >> 4) - 8;
          sums[i / 4] = __builtin_fmaf(values[2 * (i % 4)], static_cast<float>(low), sums[i / 4]);
          sums[i / 4] = __builtin_fmaf(values[2 * (i % 4) + 1], static_cast<float>(high), sums[i / 4]);
        }
      }
      for (int row = 0; row < kBlockRows; ++row) out[(block * kTileTokens + token) * kBlockRows + row] = sums[row];
    }
  }
}

}  // namespace

const DotKernels* dot_scalar() {
  static const DotKernels kernels = {"scalar", int8_product, int4_product, float8_product, float4_product};
  return &kernels;
}

}  // namespace qrealign
