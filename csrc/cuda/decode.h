// Linear layers for a few tokens (decoding), where reading the weights is all that takes time.
//
// x [tokens, K] and out [tokens, N] are row-major; weights lie in the layouts of layouts.py, which the Triton kernels read
// too: 8-bit codes in ROWS8, 4-bit codes in PLANES4. No call allocates, waits, or leaves its stream.
#pragma once

#include <cstdint>

namespace qrealign {

enum class Element : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

constexpr int kMaxTokens = 16;
constexpr int kMaxFusedTokens = 2;  // each block rounds all tokens again

// How a launch is cut: blocks of `row_tiles` x 16 output rows, whose `warps` share K and keep `stages` units of 128 bytes a row
// in flight each. No `row_tiles`: warps hold their share of the tokens, codes or floats, in registers, and as many blocks as there are
// multiprocessors walk over the rows; rows of at most 16 units of 4-bit weights, 96 of 8-bit ones. `overlap`: the weights may be read while the kernel before still runs (compute capability 9.0).
struct DecodeLaunch {
  int warps;
  int row_tiles;
  int stages;
  bool overlap;
};

struct DecodeShape {
  int tokens;     // 1 to kMaxTokens
  int rows;       // N
  int columns;    // K, a multiple of 16
  int row_bytes;  // of the weight
};

// Each returns 0, or a CUDA error code; -1 for a launch or dtype that was not compiled.

// out = x @ ((codes - zero_point) * scale).T + bias. x, bias and out are of `element`, bfloat16 or float16; scale of
// `scale_element`; scale and zero_point [N, groups], groups of a multiple of 128 columns.
int decode_int4(Element element, const void* x, const void* codes, Element scale_element, const void* scale,
                const int8_t* zero_point, const void* bias, void* out, DecodeShape shape, int groups, DecodeLaunch launch,
                void* stream);

// out = (x @ codes.T) * scale * x_scale + bias; x int8, x_scale [tokens], scale [N].
int decode_int8(Element element, const int8_t* x, const float* x_scale, const void* codes, Element scale_element,
                const void* scale, const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream);

// The same for x of `element`, at most kMaxFusedTokens, rounded on the way as quantize_per_token does with 8 bits.
int quantize_decode_int8(Element element, const void* x, const void* codes, Element scale_element, const void* scale,
                         const void* bias, void* out, DecodeShape shape, DecodeLaunch launch, void* stream);

// codes and scale [tokens] of quantize_per_token with 8 bits; columns a multiple of 8.
int quantize_tokens(Element element, const void* x, int8_t* codes, float* scale, int tokens, int columns, bool overlap,
                    void* stream);

const char* error_text(int code);

// Why no kernel of the extension can run with this driver, or null; asks for no device.
const char* unusable_reason();

}  // namespace qrealign
