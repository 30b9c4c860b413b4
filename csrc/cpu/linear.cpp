// Linear layers on packed weights: lays out x, splits the work, and turns the sums of linear.h into outputs.
#include "linear.h"

#include <memory>
#include <string>

#include "../common.h"

namespace qrealign {
namespace {

static_assert(kBlockRows == kLanes, "a block's rows are one vector");

// 16 tokens at strides of a power of two would share a few sets of the cache.
constexpr int64_t kStridePadding = 64;
constexpr int kAmxTokens = 16;

// The activations as the products read them: groups padded to whole quads, tokens to whole AMX tiles.
template <typename T, typename Sum>
struct Activations {
  int64_t stride;
  std::unique_ptr<T[]> values;
  std::unique_ptr<Sum[]> group_sums;  // [tokens][groups]; null where nothing is subtracted
};

QREALIGN_CLONES void widen(const uint16_t* bfloat16, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(bfloat16[i]) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// `row(token, scratch)` gives the columns of a token, in scratch or elsewhere. With `even_first`, of eight columns the even
// ones come first: they meet the low halves of a lane's four bytes.
template <typename T, typename Sum, typename Row>
Activations<T, Sum> lay_out(const Row& row, int64_t tokens, const PackedLinear& weight, bool even_first, bool sums,
                            int threads) {
  const int64_t group_columns = weight.columns / weight.groups;
  const int64_t padded = weight.quads * (weight.num_bits == 4 ? 8 : 4);
  const int64_t padded_tokens = ceil_div(tokens, kAmxTokens) * kAmxTokens;
  const int64_t stride = padded * weight.groups + kStridePadding;
  Activations<T, Sum> result = {stride, std::unique_ptr<T[]>(new T[padded_tokens * stride]),
                                std::unique_ptr<Sum[]>(sums ? new Sum[tokens * weight.groups] : nullptr)};
  std::memset(result.values.get() + tokens * stride, 0, sizeof(T) * (padded_tokens - tokens) * stride);
  parallel_for(tokens, weight.columns, threads, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> scratch(new T[weight.columns]);
    for (int64_t token = begin; token < end; ++token) {
      const T* columns = row(token, scratch.get());
      for (int64_t group = 0; group < weight.groups; ++group) {
        const T* from = columns + group * group_columns;
        T* to = result.values.get() + token * stride + group * padded;
        if (padded != group_columns) std::memset(to, 0, sizeof(T) * padded);
        if (even_first) {
          for (int64_t k = 0; k < group_columns; ++k) to[(k & ~7) | ((k & 1) << 2) | ((k & 7) >> 1)] = from[k];
        } else {
          std::memcpy(to, from, sizeof(T) * group_columns);
        }
        if (!sums) continue;
        Sum sum = 0;
        for (int64_t k = 0; k < group_columns; ++k) sum += from[k];
        result.group_sums[token * weight.groups + group] = sum;
      }
    }
  });
  return result;
}

// Adds scale * (sum - zero_point * group_sum) of 16 rows to totals. An integer 4-bit sum is of code + 8.
QREALIGN_INLINE void add_scaled(const int32_t* sums, int32_t group_sum, const float* scale, const int8_t* zero_point,
                                int32_t offset, float* totals) {
  for (int row = 0; row < kBlockRows; ++row) {
    const int32_t point = offset + (zero_point ? zero_point[row] : 0);
    totals[row] += static_cast<float>(sums[row] - point * group_sum) * scale[row];
  }
}

QREALIGN_INLINE void add_scaled(const float* sums, float group_sum, const float* scale, const int8_t* zero_point, int32_t,
                                float* totals) {
  for (int row = 0; row < kBlockRows; ++row) {
    const float steps = zero_point ? sums[row] - static_cast<float>(zero_point[row]) * group_sum : sums[row];
    totals[row] += steps * scale[row];
  }
}

typedef uint16_t Halves __attribute__((vector_size(kBlockRows * sizeof(uint16_t))));

// Rounds to bfloat16, ties to even; NaN stays.
QREALIGN_INLINE Halves to_bfloat16(Lanes values) {
  IntLanes bits;
  std::memcpy(&bits, &values, sizeof bits);
  const IntLanes rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return __builtin_convertvector((values == values ? rounded : IntLanes{} + 0x7FC00000) >> 16, Halves);
}

template <typename Vector>
QREALIGN_INLINE void store(const Vector& values, void* to, size_t rows) {
  if (rows == kBlockRows) {
    std::memcpy(to, &values, sizeof values);  // of a size known at compile time: a register
  } else {
    std::memcpy(to, &values, sizeof values / kBlockRows * rows);
  }
}

// A tile's outputs: totals * x_scale + bias, rounded once. Rows behind the last are computed and not stored.
QREALIGN_CLONES void store_tile(const float* totals, const PackedLinear& weight, int64_t first_row, int blocks,
                                int64_t first_token, int tokens, const float* x_scale, const float* bias,
                                const LinearOutput& out) {
  float shifts[kTileBlocks * kBlockRows] = {};
  const int64_t all_rows = std::min<int64_t>(blocks * kBlockRows, weight.rows - first_row);
  if (bias) std::memcpy(shifts, bias + first_row, sizeof(float) * all_rows);
  for (int t = 0; t < tokens; ++t) {
    const float factor = x_scale ? x_scale[first_token + t] : 1.0f;
    for (int block = 0; block < blocks; ++block) {
      const int64_t row = first_row + block * kBlockRows, at = (first_token + t) * weight.rows + row;
      const size_t rows = static_cast<size_t>(std::min<int64_t>(kBlockRows, weight.rows - row));
      const float* from = totals + (block * kTileTokens + t) * kBlockRows;
      const Lanes values = load_lanes(from) * factor + load_lanes(shifts + block * kBlockRows);
      if (out.bfloat16) {
        store(to_bfloat16(values), static_cast<uint16_t*>(out.values) + at, rows);
      } else {
        store(values, static_cast<float*>(out.values) + at, rows);
      }
    }
  }
}

template <typename Sum>
QREALIGN_CLONES void add_tile(const Sum* sums, const Sum* group_sums, const PackedLinear& weight,
                              int64_t first_block, int64_t group, int blocks, int tokens, int32_t offset, float* totals) {
  const int64_t padded_rows = ceil_div(weight.rows, kBlockRows) * kBlockRows;
  for (int block = 0; block < blocks; ++block) {
    const int64_t at = group * padded_rows + (first_block + block) * kBlockRows;
    const int8_t* zero_point = weight.zero_point ? weight.zero_point + at : nullptr;
    for (int t = 0; t < tokens; ++t) {
      const int64_t tile = (block * kTileTokens + t) * kBlockRows;
      const Sum group_sum = group_sums ? group_sums[t * weight.groups + group] : 0;
      add_scaled(sums + tile, group_sum, weight.scale + at, zero_point, offset, totals + tile);
    }
  }
}

// Runs `product(shape, x, weight, sums)` over all tiles of the output.
template <typename T, typename Sum, typename Product>
void linear(const Activations<T, Sum>& x, int64_t tokens, const PackedLinear& weight, int32_t offset, const float* x_scale,
            const float* bias, const LinearOutput& out, int threads, const Product& product) {
  if (tokens == 0) return;
  const int64_t blocks = ceil_div(weight.rows, kBlockRows), groups = weight.groups;
  const int64_t code_sum_bytes = weight.num_bits == 8 ? kBlockRows * sizeof(int32_t) : 0;
  const int64_t group_bytes = weight.quads * kQuadBytes + code_sum_bytes, block_bytes = groups * group_bytes;
  const int64_t group_columns = weight.quads * (weight.num_bits == 4 ? 8 : 4);
  const int64_t panels = ceil_div(blocks, kTileBlocks), panel_bytes = kTileBlocks * block_bytes;
  const int64_t ahead_bytes = panel_bytes / (ceil_div(tokens, kTileTokens) * groups);
  parallel_for(panels, kTileBlocks * kBlockRows * weight.columns * tokens, threads, [&](int64_t begin, int64_t end) {
    alignas(64) Sum sums[kTileSize];
    alignas(64) float totals[kTileSize];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first_block = panel * kTileBlocks;
      for (int64_t token = 0; token < tokens; token += kTileTokens) {
        const uint8_t* panel_codes = weight.codes + first_block * block_bytes;
        DotShape shape = {static_cast<int>(std::min<int64_t>(kTileTokens, tokens - token)),
                          static_cast<int>(std::min<int64_t>(kTileBlocks, blocks - first_block)),
                          weight.quads,
                          x.stride,
                          block_bytes,
                          panel_codes + panel_bytes + token / kTileTokens * groups * ahead_bytes,
                          panel + 1 < panels ? ahead_bytes : 0};
        for (int block = 0; block < shape.blocks; ++block) {
          std::memset(totals + block * kTileTokens * kBlockRows, 0, sizeof(float) * shape.tokens * kBlockRows);
        }
        for (int64_t group = 0; group < groups; ++group) {
          product(shape, x.values.get() + token * x.stride + group * group_columns,
                  panel_codes + group * group_bytes, sums);
          shape.ahead += ahead_bytes;
          add_tile(sums, x.group_sums ? x.group_sums.get() + token * groups : nullptr, weight, first_block, group, shape.blocks,
                   shape.tokens, offset, totals);
        }
        store_tile(totals, weight, first_block * kBlockRows, shape.blocks, token, shape.tokens, x_scale, bias, out);
      }
    }
  });
}

const DotKernels* (*const kKernels[])() = {dot_amx, dot_avx512vnni, dot_avx2, dot_scalar};

}  // namespace

const DotKernels* find_dot_kernels(const char* name) {
  for (const auto& kernels : kKernels) {
    const DotKernels* found = kernels();
    if (found && (!*name || std::string(name) == found->name)) return found;
  }
  return nullptr;
}

void integer_linear(const DotKernels& kernels, const Tokens& x, const PackedLinear& weight, const float* bias,
                    const LinearOutput& out, int threads) {
  const int64_t columns = weight.columns;
  const bool four_bits = weight.num_bits == 4, given = x.kind == TokenKind::kCodes;
  const CodeRange range = {-static_cast<float>(1 << (x.num_bits - 1)), static_cast<float>((1 << (x.num_bits - 1)) - 1)};
  const std::unique_ptr<float[]> made(given ? nullptr : new float[x.count]);
  const auto codes_of = [&](int64_t token, int8_t* scratch) -> const int8_t* {
    if (given) return static_cast<const int8_t*>(x.values) + token * columns;
    if (x.kind == TokenKind::kFloat32) {
      made[token] = quantize_token(static_cast<const float*>(x.values) + token * columns, scratch, columns, range);
    } else {
      const std::unique_ptr<float[]> wide(new float[columns]);
      widen(static_cast<const uint16_t*>(x.values) + token * columns, wide.get(), columns);
      made[token] = quantize_token(wide.get(), scratch, columns, range);
    }
    return scratch;
  };
  const bool sums = four_bits || weight.zero_point;
  const auto laid_out = lay_out<int8_t, int32_t>(codes_of, x.count, weight, four_bits, sums, threads);
  linear(laid_out, x.count, weight, four_bits ? 8 : 0, given ? x.scale : made.get(), bias, out, threads,
         four_bits ? kernels.int4 : kernels.int8);
}

void float_linear(const DotKernels& kernels, const float* x, int64_t tokens, const PackedLinear& weight, const float* bias,
                  const LinearOutput& out, int threads) {
  const auto row = [&](int64_t token, float*) { return x + token * weight.columns; };
  const auto laid_out = lay_out<float, float>(row, tokens, weight, false, weight.zero_point != nullptr, threads);
  linear(laid_out, tokens, weight, 0, nullptr, bias, out, threads, weight.num_bits == 4 ? kernels.float4 : kernels.float8);
}

}  // namespace qrealign
