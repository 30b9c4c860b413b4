// The products on AVX2 with FMA: two registers hold the 16 rows of a block.
#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

namespace qrealign {
namespace {

constexpr int kHalves = 2;  // 8 rows each

TARGET_INLINE __m256i load(const uint8_t* address) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(address));
}

TARGET_INLINE void store(int32_t* address, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), value);
}

// Four x as 16-bit numbers, four times.
TARGET_INLINE __m256i widened4(const int8_t* x) {
  const __m128i four = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(*reinterpret_cast<const int32_t*>(x)));
  return _mm256_broadcastq_epi64(four);
}

TARGET_INLINE __m256i widened(const uint8_t* codes) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

// Bytes are widened to 16 bits first: the instruction that multiplies bytes saturates the sum of two products.
template <int kTokens>
TARGET_INLINE void int8_tile(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  __m256i pairs[kTokens][4];  // of 4 rows each: sums of columns 0 and 1, and of columns 2 and 3
  for (int token = 0; token < kTokens; ++token) {
    for (int part = 0; part < 4; ++part) pairs[token][part] = _mm256_setzero_si256();
  }
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    __m256i values[kTokens];
    for (int token = 0; token < kTokens; ++token) values[token] = widened4(x + token * shape.token_stride + 4 * quad);
    for (int part = 0; part < 4; ++part) {
      const __m256i codes = widened(weight + quad * kQuadBytes + 16 * part);
      for (int token = 0; token < kTokens; ++token) {
        pairs[token][part] = _mm256_add_epi32(pairs[token][part], _mm256_madd_epi16(values[token], codes));
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < kHalves; ++half) {
      // hadd works within 128 bits: rows 0 1 4 5 | 2 3 6 7.
      const __m256i sums = _mm256_hadd_epi32(pairs[token][2 * half], pairs[token][2 * half + 1]);
      store(out + token * kBlockRows + 8 * half, _mm256_permute4x64_epi64(sums, 0b11011000));
    }
  }
}

// Codes are at most 15 here, so the sum of two products with bytes stays within 16 bits.
template <int kTokens>
TARGET_INLINE void int4_tile(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  __m256i sums[kTokens][kHalves];
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < kHalves; ++half) sums[token][half] = _mm256_setzero_si256();
  }
  const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    for (int half = 0; half < kHalves; ++half) {
      const __m256i both = load(weight + quad * kQuadBytes + 32 * half);
      const __m256i even = _mm256_and_si256(both, nibble);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(both, 4), nibble);
      for (int token = 0; token < kTokens; ++token) {
        const int32_t* values = reinterpret_cast<const int32_t*>(x + token * shape.token_stride + 8 * quad);
        const __m256i products = _mm256_add_epi16(_mm256_maddubs_epi16(even, _mm256_set1_epi32(values[0])),
                                                  _mm256_maddubs_epi16(odd, _mm256_set1_epi32(values[1])));
        sums[token][half] = _mm256_add_epi32(sums[token][half], _mm256_madd_epi16(products, ones));
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < kHalves; ++half) store(out + token * kBlockRows + 8 * half, sums[token][half]);
  }
}

// The four or eight codes of each lane as floats, one after the other; `codes` moves on to the next.
struct EightBits {
  static constexpr int kColumns = 4;
  TARGET_INLINE static __m256 next(__m256i& codes) {
    const __m256i code = _mm256_srai_epi32(_mm256_slli_epi32(codes, 24), 24);
    codes = _mm256_srli_epi32(codes, 8);
    return _mm256_cvtepi32_ps(code);
  }
};

struct FourBits {
  static constexpr int kColumns = 8;
  TARGET_INLINE static __m256 next(__m256i& codes) {
    const __m256i code = _mm256_sub_epi32(_mm256_and_si256(codes, _mm256_set1_epi32(15)), _mm256_set1_epi32(8));
    codes = _mm256_srli_epi32(codes, 4);
    return _mm256_cvtepi32_ps(code);
  }
};

template <typename Codes, int kTokens>
TARGET_INLINE void float_tile(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  __m256 sums[kTokens][kHalves];
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < kHalves; ++half) sums[token][half] = _mm256_setzero_ps();
  }
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    __m256i codes[kHalves];
    for (int half = 0; half < kHalves; ++half) codes[half] = load(weight + quad * kQuadBytes + 32 * half);
    for (int column = 0; column < Codes::kColumns; ++column) {
      __m256 decoded[kHalves];
      for (int half = 0; half < kHalves; ++half) decoded[half] = Codes::next(codes[half]);
      for (int token = 0; token < kTokens; ++token) {
        const __m256 value = _mm256_broadcast_ss(x + token * shape.token_stride + Codes::kColumns * quad + column);
        for (int half = 0; half < kHalves; ++half) {
          sums[token][half] = _mm256_fmadd_ps(value, decoded[half], sums[token][half]);
        }
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int half = 0; half < kHalves; ++half) _mm256_storeu_ps(out + token * kBlockRows + 8 * half, sums[token][half]);
  }
}

TARGET void int8_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  for (int block = 0; block < shape.blocks; ++block, weight += shape.block_stride, out += kTileTokens * kBlockRows) {
    int token = 0;
    for (; token + 2 <= shape.tokens; token += 2) {
      int8_tile<2>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
    }
    if (token < shape.tokens) int8_tile<1>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
  }
}

TARGET void int4_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  for (int block = 0; block < shape.blocks; ++block, weight += shape.block_stride, out += kTileTokens * kBlockRows) {
    int token = 0;
    for (; token + 4 <= shape.tokens; token += 4) {
      int4_tile<4>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
    }
    for (; token < shape.tokens; ++token) {
      int4_tile<1>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
    }
  }
}

template <typename Codes>
TARGET void float_product(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  for (int block = 0; block < shape.blocks; ++block, weight += shape.block_stride, out += kTileTokens * kBlockRows) {
    int token = 0;
    for (; token + 4 <= shape.tokens; token += 4) {
      float_tile<Codes, 4>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
    }
    for (; token < shape.tokens; ++token) {
      float_tile<Codes, 1>(shape, x + token * shape.token_stride, weight, out + token * kBlockRows);
    }
  }
}

}  // namespace

const DotKernels* dot_avx2() {
  static const DotKernels kernels = {"avx2", int8_product, int4_product, float_product<EightBits>, float_product<FourBits>};
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : nullptr;
}

}  // namespace qrealign
#else
namespace qrealign {
const DotKernels* dot_avx2() { return nullptr; }
}  // namespace qrealign
#endif
