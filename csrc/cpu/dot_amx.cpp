// The 8-bit product on AMX: a tile instruction multiplies 16 tokens x 64 columns by 64 columns x 16 rows. What AMX does not
// do, and calls of few tokens, are left to AVX-512.
#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET __attribute__((target("amx-tile,amx-int8,avx512f")))

namespace qrealign {
namespace {

constexpr int kTokens = 16;       // of a tile
constexpr int kColumns = 64;      // of a tile, one byte each
constexpr int kFewTokens = 4;     // up to here the weights' way from memory takes longer than AVX-512's arithmetic

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kLine = 64;  // bytes of the cache's lines

// Lines in each of `steps` parts of some bytes.
inline int64_t ceil_div_lines(int64_t bytes, int64_t steps) { return (bytes / kLine + steps - 1) / steps; }

// Tiles 0-3 hold sums of 2 x 2 tiles of out, 4 and 5 tokens, 6 and 7 weights.
template <bool kTwoTokenTiles, bool kTwoBlocks>
TARGET void tile_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, const uint8_t* ahead,
                                int64_t ahead_bytes, int32_t* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* second_tokens = x + kTokens * shape.token_stride;
  const uint8_t* second_block = weight + shape.block_stride;
  const int64_t columns = 4 * shape.quads;
  const int64_t ahead_step = ceil_div_lines(ahead_bytes, columns / kColumns);
  for (int64_t column = 0; column < columns; column += kColumns) {
    for (int64_t line = 0; line < ahead_step; ++line, ahead += kLine) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_loadd(4, x + column, shape.token_stride);
    _tile_loadd(6, weight + column * kBlockRows, kQuadBytes);
    _tile_dpbssd(0, 4, 6);
    if (kTwoBlocks) {
      _tile_loadd(7, second_block + column * kBlockRows, kQuadBytes);
      _tile_dpbssd(1, 4, 7);
    }
    if (kTwoTokenTiles) {
      _tile_loadd(5, second_tokens + column, shape.token_stride);
      _tile_dpbssd(2, 5, 6);
      if (kTwoBlocks) _tile_dpbssd(3, 5, 7);
    }
  }
  constexpr int kBlockOut = kTileTokens * kBlockRows, kTokensOut = kTokens * kBlockRows;
  _tile_stored(0, out, kQuadBytes);
  if (kTwoBlocks) _tile_stored(1, out + kBlockOut, kQuadBytes);
  if (kTwoTokenTiles) {
    _tile_stored(2, out + kTokensOut, kQuadBytes);
    if (kTwoBlocks) _tile_stored(3, out + kBlockOut + kTokensOut, kQuadBytes);
  }
}

TARGET void int8_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  if (shape.tokens <= kFewTokens) {
    dot_avx512vnni()->int8(shape, x, weight, out);
    return;
  }
  const TileConfig config;
  _tile_loadconfig(&config);
  const bool two_token_tiles = shape.tokens > kTokens;
  const int64_t ahead_bytes = shape.ahead_bytes / shape.blocks;  // for each block
  for (int block = 0; block < shape.blocks; block += 2) {
    const bool two_blocks = block + 2 <= shape.blocks;
    const auto product = two_token_tiles ? (two_blocks ? tile_product<true, true> : tile_product<true, false>)
                                         : (two_blocks ? tile_product<false, true> : tile_product<false, false>);
    product(shape, x, weight + block * shape.block_stride, shape.ahead + block * ahead_bytes,
            two_blocks ? 2 * ahead_bytes : ahead_bytes, out + block * kTileTokens * kBlockRows);
  }
  _tile_release();
}

// Linux gives the tiles' state only to processes that ask for it, and a sandbox may refuse.
bool permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool processor_has_amx_int8() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kInt8);
}

}  // namespace

const DotKernels* dot_amx() {
  static const bool usable = dot_avx512vnni() != nullptr && processor_has_amx_int8() && permitted();
  if (!usable) return nullptr;
  static const DotKernels& others = *dot_avx512vnni();
  static const DotKernels kernels = {"amx", int8_product, others.int4, others.float8, others.float4};
  return &kernels;
}

}  // namespace qrealign
#else
namespace qrealign {
const DotKernels* dot_amx() { return nullptr; }
}  // namespace qrealign
#endif
