// Linear layers on packed weights: lays out x, splits the work, and turns the sums of linear.h into outputs.
#include "linear.h"

#include <memory>
#include <string>

#include "../common.h"

namespace qrealign {
namespace {

// 16 tokens at strides of a power of two would share a few sets of the cache.
constexpr int64_t kStridePadding = 64;
constexpr int kAmxTokens = 16;

// The activations as the products read them: groups padded to whole quads, tokens to whole AMX tiles, and the sum of each group.
template <typename T, typename Sum>
struct Activations {
  int64_t stride;
  std::unique_ptr<T[]> values;
  std::unique_ptr<Sum[]> group_sums;  // [tokens][groups]
};

// Columns of x that meet the four bytes of a lane: as they come, or the even ones of eight first.
QREALIGN_INLINE int64_t place_of(int64_t column, bool even_first) {
  return even_first ? (column & ~7) | ((column & 1) << 2) | ((column & 7) >> 1) : column;
}

template <typename T, typename Sum>
Activations<T, Sum> lay_out(const T* x, int64_t tokens, const PackedLinear& weight, bool even_first, int threads) {
  const int64_t group_columns = weight.columns / weight.groups;
  const int64_t padded = weight.quads * (weight.num_bits == 4 ? 8 : 4);
  const int64_t padded_tokens = ceil_div(tokens, kAmxTokens) * kAmxTokens;
  const int64_t stride = padded * weight.groups + kStridePadding;
  Activations<T, Sum> result = {stride, std::unique_ptr<T[]>(new T[padded_tokens * stride]),
                                std::unique_ptr<Sum[]>(new Sum[tokens * weight.groups])};
  std::memset(result.values.get() + tokens * stride, 0, sizeof(T) * (padded_tokens - tokens) * stride);
  parallel_for(tokens, weight.columns, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t group = 0; group < weight.groups; ++group) {
        const T* from = x + token * weight.columns + group * group_columns;
        T* to = result.values.get() + token * stride + group * padded;
        if (padded != group_columns) std::memset(to, 0, sizeof(T) * padded);
        if (even_first) {
          for (int64_t k = 0; k < group_columns; ++k) to[place_of(k, true)] = from[k];
        } else {
          std::memcpy(to, from, sizeof(T) * group_columns);
        }
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

QREALIGN_INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

// A tile's outputs: totals * x_scale + bias, rounded once. Rows behind the last are computed and not stored.
QREALIGN_CLONES void store_tile(const float* totals, const PackedLinear& weight, int64_t first_row, int blocks,
                                int64_t first_token, int tokens, const float* x_scale, const float* bias,
                                const LinearOutput& out) {
  for (int block = 0; block < blocks; ++block) {
    const int64_t row = first_row + block * kBlockRows;
    const size_t rows = static_cast<size_t>(std::min<int64_t>(kBlockRows, weight.rows - row));
    float shift[kBlockRows] = {};
    if (bias) std::memcpy(shift, bias + row, sizeof(float) * rows);
    for (int t = 0; t < tokens; ++t) {
      const float* from = totals + (block * kTileTokens + t) * kBlockRows;
      const float factor = x_scale ? x_scale[first_token + t] : 1.0f;
      const int64_t at = (first_token + t) * weight.rows + row;
      float values[kBlockRows];
      for (int i = 0; i < kBlockRows; ++i) values[i] = from[i] * factor + shift[i];
      if (!out.bfloat16) {
        std::memcpy(static_cast<float*>(out.values) + at, values, sizeof(float) * rows);
        continue;
      }
      uint16_t rounded[kBlockRows];
      for (int i = 0; i < kBlockRows; ++i) rounded[i] = to_bfloat16(values[i]);
      std::memcpy(static_cast<uint16_t*>(out.values) + at, rounded, sizeof(uint16_t) * rows);
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
      add_scaled(sums + tile, group_sums[t * weight.groups + group], weight.scale + at, zero_point, offset, totals + tile);
    }
  }
}

// Runs `product(shape, x, weight, sums)` over all tiles of the output.
template <typename T, typename Sum, typename Product>
void linear(const Activations<T, Sum>& x, int64_t tokens, const PackedLinear& weight, int32_t offset, const float* x_scale,
            const float* bias, const LinearOutput& out, int threads, const Product& product) {
  const int64_t blocks = ceil_div(weight.rows, kBlockRows), groups = weight.groups;
  const int64_t code_sum_bytes = weight.num_bits == 8 ? kBlockRows * sizeof(int32_t) : 0;
  const int64_t group_bytes = weight.quads * kQuadBytes + code_sum_bytes, block_bytes = groups * group_bytes;
  const int64_t group_columns = weight.quads * (weight.num_bits == 4 ? 8 : 4);
  const int64_t panels = ceil_div(blocks, kTileBlocks);
  parallel_for(panels, kTileBlocks * kBlockRows * weight.columns * tokens, threads, [&](int64_t begin, int64_t end) {
    alignas(64) Sum sums[kTileSize];
    alignas(64) float totals[kTileSize];
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first_block = panel * kTileBlocks;
      for (int64_t token = 0; token < tokens; token += kTileTokens) {
        const DotShape shape = {static_cast<int>(std::min<int64_t>(kTileTokens, tokens - token)),
                                static_cast<int>(std::min<int64_t>(kTileBlocks, blocks - first_block)), weight.quads,
                                x.stride, block_bytes};
        for (int block = 0; block < shape.blocks; ++block) {
          std::memset(totals + block * kTileTokens * kBlockRows, 0, sizeof(float) * shape.tokens * kBlockRows);
        }
        for (int64_t group = 0; group < groups; ++group) {
          product(shape, x.values.get() + token * x.stride + group * group_columns,
                  weight.codes + first_block * block_bytes + group * group_bytes, sums);
          add_tile(sums, x.group_sums.get() + token * groups, weight, first_block, group, shape.blocks,
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

void integer_linear(const DotKernels& kernels, const int8_t* x, const float* x_scale, int64_t tokens,
                    const PackedLinear& weight, const float* bias, const LinearOutput& out, int threads) {
  const bool four_bits = weight.num_bits == 4;
  const auto laid_out = lay_out<int8_t, int32_t>(x, tokens, weight, four_bits, threads);
  linear(laid_out, tokens, weight, four_bits ? 8 : 0, x_scale, bias, out, threads, four_bits ? kernels.int4 : kernels.int8);
}

void float_linear(const DotKernels& kernels, const float* x, int64_t tokens, const PackedLinear& weight, const float* bias,
                  const LinearOutput& out, int threads) {
  const auto laid_out = lay_out<float, float>(x, tokens, weight, false, threads);
  linear(laid_out, tokens, weight, 0, nullptr, bias, out, threads,
         weight.num_bits == 4 ? kernels.float4 : kernels.float8);
}

}  // namespace qrealign
