// Linear layers for a few tokens (decoding), where reading the weights is all that takes time.
//
// Everything is addressed as torch lays it out: x and out [tokens, K] and [tokens, N] row-major, 4-bit codes as
// packing.py describes them (K / 8 words a row), 8-bit codes row-major. No call allocates, waits, or leaves its stream.
#pragma once

#include <cstdint>

namespace qrealign {

enum class Element : int { kBFloat16 = 0, kFloat16 = 1 };

constexpr int kMaxTokens = 16;

// How a launch is cut: `warps` of a block share K, `row_tiles` x 16 output rows a block, `k_tiles` x 64 bytes of each row in
// flight at once. `overlap`: let the weights be read while the kernel before still runs (compute capability 9.0).
struct DecodeLaunch {
  int warps;
  int row_tiles;
  int k_tiles;
  bool overlap;
};

struct DecodeShape {
  int tokens;   // 1 to kMaxTokens
  int rows;     // N
  int columns;  // K: a multiple of 128 (4-bit codes) or 64 (8-bit codes)
};

// Each returns 0, or a CUDA error code; -1 for a launch that was not compiled.

// out = x @ ((codes - zero_point) * scale).T + bias; scale and zero_point [N, groups], groups of a multiple of 128 columns.
int decode_int4(Element element, const void* x, const void* codes, const float* scale, const int8_t* zero_point,
                const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch launch, void* stream);

// out = (x @ codes.T) * x_scale * scale + bias; x int8, x_scale [tokens], scale [N].
int decode_int8(Element element, const int8_t* x, const float* x_scale, const int8_t* codes, const float* scale,
                const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream);

// codes and scale [tokens] of quantize_per_token with 8 bits.
int quantize_tokens(Element element, const void* x, int8_t* codes, float* scale, int tokens, int columns, bool overlap,
                    void* stream);

const char* error_text(int code);

}  // namespace qrealign
