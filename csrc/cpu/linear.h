// Products of activations with packed weights: what each instruction set offers, and the driver that calls it.
//
// Weights lie in blocks of 16 output rows. A block holds, for each run of 4 bytes along K, those 4 bytes of row 0, then of
// row 1, ... of row 15: 64 bytes, one AVX-512 register or one row of an AMX tile. A byte is an 8-bit code, or two 4-bit codes
// (code + 8, the earlier one low), so that a lane of 32 bits holds 4 or 8 consecutive codes of one row. Behind the 8-bit codes
// of a block's group stand their sums, an int32 for each of the 16 rows.
//
// Included by files of one instruction set: nothing of the standard library but integers, whose templates would otherwise
// be compiled for that instruction set and shared by the linker with machines that lack it.
#pragma once

#include <cstdint>

namespace qrealign {

constexpr int kBlockRows = 16;                   // output rows of a block
constexpr int kQuadBytes = 4 * kBlockRows;       // bytes of a block for 4 bytes along K
constexpr int kTileTokens = 32;                  // most tokens of one call
constexpr int kTileBlocks = 4;                   // most blocks of one call
constexpr int kTileSize = kTileBlocks * kTileTokens * kBlockRows;

// One call: `tokens` rows of x times `blocks` blocks, over `quads` runs of 4 weight bytes; results go to
// out[block][token][row] with kTileTokens tokens to a block.
struct DotShape {
  int tokens;
  int blocks;
  int64_t quads;
  int64_t token_stride;  // elements of x between tokens
  int64_t block_stride;  // bytes of weight between blocks
  const uint8_t* ahead;  // weights that calls after this one read: to be brought near meanwhile, `ahead_bytes` of them
  int64_t ahead_bytes;
};

// The products on one instruction set. All sets give the same bits: integer sums are exact, and those of floats add one column
// after the other, each by one fused multiply-add.
struct DotKernels {
  const char* name;
  // out = sum of x * code over 4 * quads columns. Of x, whole tiles of 16 tokens can be read.
  void (*int8)(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out);
  // out = sum of x * (code + 8) over 8 * quads columns; among each 8, x holds the even columns first.
  void (*int4)(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out);
  // out = sum of x * code over 4 * quads columns, in float32.
  void (*float8)(const DotShape& shape, const float* x, const uint8_t* weight, float* out);
  // out = sum of x * code over 8 * quads columns, in float32.
  void (*float4)(const DotShape& shape, const float* x, const uint8_t* weight, float* out);
};

// Each is null where the compiler or the processor does not know the instruction set.
const DotKernels* dot_scalar();
const DotKernels* dot_avx2();
const DotKernels* dot_avx512vnni();
const DotKernels* dot_amx();

// The fastest usable set, or the one named; null if that one is not usable. A choice by name is for tests and measurements.
const DotKernels* find_dot_kernels(const char* name);

// A weight [rows, columns] as above: codes are [blocks][groups][bytes], each group padded by zero codes to `quads` runs of 4
// bytes. Scales and zero points are [groups][rows, padded to whole blocks].
struct PackedLinear {
  const uint8_t* codes;
  const float* scale;
  const int8_t* zero_point;  // null if all are zero
  int64_t rows;
  int64_t columns;
  int64_t groups;
  int64_t quads;
  int num_bits;
};

struct LinearOutput {
  void* values;   // [tokens, rows]
  bool bfloat16;  // else float32
};

enum class TokenKind : int { kCodes = 0, kFloat32 = 1, kBFloat16 = 2 };

// Tokens [count, columns]: int8 codes and their scales, or floats that are rounded to `num_bits` on the way.
struct Tokens {
  TokenKind kind;
  const void* values;
  const float* scale;  // of codes, [count]
  int num_bits;        // of floats
  int64_t count;
};

// out = (sum over groups, in order, of scale * sum of x * (code - zero_point)) * x_scale + bias; columns < 65536.
void integer_linear(const DotKernels& kernels, const Tokens& x, const PackedLinear& weight, const float* bias,
                    const LinearOutput& out, int threads);

// The same with float x, without x_scale.
void float_linear(const DotKernels& kernels, const float* x, int64_t tokens, const PackedLinear& weight, const float* bias,
                  const LinearOutput& out, int threads);

}  // namespace qrealign
