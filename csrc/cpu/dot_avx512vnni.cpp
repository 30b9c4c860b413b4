// The products on AVX-512 with VNNI: one register holds the 16 rows of a block.
#include "linear.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

// On each function, not on the file: a compiler may then inline nothing of it into code for other machines.
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define TARGET_INLINE TARGET inline __attribute__((always_inline))

namespace qrealign {
namespace {

TARGET_INLINE __m512i load(const uint8_t* address) { return _mm512_loadu_si512(address); }

TARGET_INLINE int32_t* row_of(int32_t* out, int block, int token) {
  return out + (block * kTileTokens + token) * kBlockRows;
}

TARGET_INLINE float* row_of(float* out, int block, int token) { return out + (block * kTileTokens + token) * kBlockRows; }

TARGET_INLINE __m512i broadcast4(const int8_t* x) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }

// The instruction multiplies unsigned by signed bytes, so x enters as x + 128 and 128 * sum of the codes leaves again.
template <int kTokens, int kBlocks>
TARGET_INLINE void int8_tile(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  __m512i sums[kTokens][kBlocks];
  for (int block = 0; block < kBlocks; ++block) {
    const __m512i code_sums = load(weight + block * shape.block_stride + shape.quads * kQuadBytes);
    const __m512i excess = _mm512_slli_epi32(code_sums, 7);
    for (int token = 0; token < kTokens; ++token) sums[token][block] = _mm512_sub_epi32(_mm512_setzero_si512(), excess);
  }
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    __m512i codes[kBlocks];
    for (int block = 0; block < kBlocks; ++block) {
      codes[block] = load(weight + block * shape.block_stride + quad * kQuadBytes);
      _mm_prefetch(weight + block * shape.block_stride + quad * kQuadBytes + 1024, _MM_HINT_T0);
    }
    for (int token = 0; token < kTokens; ++token) {
      const __m512i values = _mm512_xor_si512(broadcast4(x + token * shape.token_stride + 4 * quad), sign);
      for (int block = 0; block < kBlocks; ++block) {
        sums[token][block] = _mm512_dpbusd_epi32(sums[token][block], values, codes[block]);
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int block = 0; block < kBlocks; ++block) _mm512_storeu_si512(row_of(out, block, token), sums[token][block]);
  }
}

template <int kTokens, int kBlocks>
TARGET_INLINE void int4_tile(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  __m512i sums[kTokens][kBlocks];
  for (int token = 0; token < kTokens; ++token) {
    for (int block = 0; block < kBlocks; ++block) sums[token][block] = _mm512_setzero_si512();
  }
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    __m512i even[kBlocks], odd[kBlocks];
    for (int block = 0; block < kBlocks; ++block) {
      const __m512i both = load(weight + block * shape.block_stride + quad * kQuadBytes);
      even[block] = _mm512_and_si512(both, nibble);
      odd[block] = _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble);
    }
    for (int token = 0; token < kTokens; ++token) {
      const int8_t* values = x + token * shape.token_stride + 8 * quad;
      const __m512i at_even = broadcast4(values), at_odd = broadcast4(values + 4);
      for (int block = 0; block < kBlocks; ++block) {
        sums[token][block] = _mm512_dpbusd_epi32(sums[token][block], even[block], at_even);
        sums[token][block] = _mm512_dpbusd_epi32(sums[token][block], odd[block], at_odd);
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int block = 0; block < kBlocks; ++block) _mm512_storeu_si512(row_of(out, block, token), sums[token][block]);
  }
}

// The four or eight codes of each lane as floats, one after the other; `codes` moves on to the next.
struct EightBits {
  static constexpr int kColumns = 4;
  TARGET_INLINE static __m512 next(__m512i& codes) {
    const __m512i code = _mm512_srai_epi32(_mm512_slli_epi32(codes, 24), 24);
    codes = _mm512_srli_epi32(codes, 8);
    return _mm512_cvtepi32_ps(code);
  }
};

// A permutation of a table of all 16 values needs no conversion: it reads the lowest 4 bits of each lane.
struct FourBits {
  static constexpr int kColumns = 8;
  TARGET_INLINE static __m512 next(__m512i& codes) {
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 decoded = _mm512_permutexvar_ps(codes, values);
    codes = _mm512_srli_epi32(codes, 4);
    return decoded;
  }
};

template <typename Codes, int kTokens, int kBlocks>
TARGET_INLINE void float_tile(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  __m512 sums[kTokens][kBlocks];
  for (int token = 0; token < kTokens; ++token) {
    for (int block = 0; block < kBlocks; ++block) sums[token][block] = _mm512_setzero_ps();
  }
  for (int64_t quad = 0; quad < shape.quads; ++quad) {
    __m512i codes[kBlocks];
    for (int block = 0; block < kBlocks; ++block) codes[block] = load(weight + block * shape.block_stride + quad * kQuadBytes);
    for (int column = 0; column < Codes::kColumns; ++column) {
      __m512 decoded[kBlocks];
      for (int block = 0; block < kBlocks; ++block) decoded[block] = Codes::next(codes[block]);
      for (int token = 0; token < kTokens; ++token) {
        const __m512 value = _mm512_set1_ps(x[token * shape.token_stride + Codes::kColumns * quad + column]);
        for (int block = 0; block < kBlocks; ++block) {
          sums[token][block] = _mm512_fmadd_ps(value, decoded[block], sums[token][block]);
        }
      }
    }
  }
  for (int token = 0; token < kTokens; ++token) {
    for (int block = 0; block < kBlocks; ++block) _mm512_storeu_ps(row_of(out, block, token), sums[token][block]);
  }
}

TARGET void int8_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  int token = 0;
  for (; token + 6 <= shape.tokens && shape.blocks == 4; token += 6) {
    int8_tile<6, 4>(shape, x + token * shape.token_stride, weight, row_of(out, 0, token));
  }
  for (; token < shape.tokens; ++token) {
    const int8_t* values = x + token * shape.token_stride;
    if (shape.blocks == 4) {
      int8_tile<1, 4>(shape, values, weight, row_of(out, 0, token));
      continue;
    }
    for (int block = 0; block < shape.blocks; ++block) {
      int8_tile<1, 1>(shape, values, weight + block * shape.block_stride, row_of(out, block, token));
    }
  }
}

TARGET void int4_product(const DotShape& shape, const int8_t* x, const uint8_t* weight, int32_t* out) {
  int token = 0;
  for (; token + 4 <= shape.tokens && shape.blocks == 4; token += 4) {
    int4_tile<4, 4>(shape, x + token * shape.token_stride, weight, row_of(out, 0, token));
  }
  for (; token < shape.tokens; ++token) {
    const int8_t* values = x + token * shape.token_stride;
    if (shape.blocks == 4) {
      int4_tile<1, 4>(shape, values, weight, row_of(out, 0, token));
      continue;
    }
    for (int block = 0; block < shape.blocks; ++block) {
      int4_tile<1, 1>(shape, values, weight + block * shape.block_stride, row_of(out, block, token));
    }
  }
}

template <typename Codes>
TARGET void float_product(const DotShape& shape, const float* x, const uint8_t* weight, float* out) {
  int token = 0;
  for (; token + 5 <= shape.tokens && shape.blocks == 4; token += 5) {
    float_tile<Codes, 5, 4>(shape, x + token * shape.token_stride, weight, row_of(out, 0, token));
  }
  for (; token < shape.tokens; ++token) {
    const float* values = x + token * shape.token_stride;
    if (shape.blocks == 4) {
      float_tile<Codes, 1, 4>(shape, values, weight, row_of(out, 0, token));
      continue;
    }
    for (int block = 0; block < shape.blocks; ++block) {
      float_tile<Codes, 1, 1>(shape, values, weight + block * shape.block_stride, row_of(out, block, token));
    }
  }
}

}  // namespace

const DotKernels* dot_avx512vnni() {
  static const DotKernels kernels = {"avx512vnni", int8_product, int4_product, float_product<EightBits>,
                                     float_product<FourBits>};
  __builtin_cpu_init();
  const bool usable = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return usable ? &kernels : nullptr;
}

}  // namespace qrealign
#else
namespace qrealign {
const DotKernels* dot_avx512vnni() { return nullptr; }
}  // namespace qrealign
#endif
