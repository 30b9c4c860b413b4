// Codes to 32-bit words and back, lowest bits first; the layout is described in packing.py. Words are handled as their bytes:
// tensors are little-endian wherever torch runs.
#include "../common.h"

namespace qrealign {
namespace {

QREALIGN_CLONES void pack4_range(const int8_t* codes, uint8_t* packed, int64_t begin, int64_t end, int64_t columns) {
  const int64_t row_bytes = 4 * ceil_div(columns, 8);
  for (int64_t r = begin; r < end; ++r) {
    const int8_t* row = codes + r * columns;
    uint8_t* out = packed + r * row_bytes;
    for (int64_t i = 0; i < columns / 2; ++i) {
      out[i] = static_cast<uint8_t>(((row[2 * i] + 8) & 15) | ((row[2 * i + 1] + 8) << 4));
    }
    std::memset(out + columns / 2, 0, row_bytes - columns / 2);
    if (columns % 2) out[columns / 2] = static_cast<uint8_t>((row[columns - 1] + 8) & 15);
  }
}

QREALIGN_CLONES void unpack4_range(const uint8_t* packed, int8_t* codes, int64_t begin, int64_t end, int64_t columns) {
  const int64_t row_bytes = 4 * ceil_div(columns, 8);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = packed + r * row_bytes;
    int8_t* out = codes + r * columns;
    for (int64_t i = 0; i < columns / 2; ++i) {
      out[2 * i] = static_cast<int8_t>((row[i] & 15) - 8);
      out[2 * i + 1] = static_cast<int8_t>((row[i] >> 4) - 8);
    }
    if (columns % 2) out[columns - 1] = static_cast<int8_t>((row[columns / 2] & 15) - 8);
  }
}

QREALIGN_CLONES void pack8_range(const int8_t* codes, uint8_t* packed, int64_t begin, int64_t end, int64_t columns) {
  const int64_t row_bytes = 4 * ceil_div(columns, 4);
  for (int64_t r = begin; r < end; ++r) {
    uint8_t* out = packed + r * row_bytes;
    for (int64_t k = 0; k < columns; ++k) out[k] = static_cast<uint8_t>(codes[r * columns + k] + 128);
    std::memset(out + columns, 0, row_bytes - columns);
  }
}

QREALIGN_CLONES void unpack8_range(const uint8_t* packed, int8_t* codes, int64_t begin, int64_t end, int64_t columns) {
  const int64_t row_bytes = 4 * ceil_div(columns, 4);
  for (int64_t r = begin; r < end; ++r) {
    const uint8_t* row = packed + r * row_bytes;
    for (int64_t k = 0; k < columns; ++k) codes[r * columns + k] = static_cast<int8_t>(row[k] - 128);
  }
}

}  // namespace

void pack_codes(const int8_t* codes, int32_t* packed, int64_t row_count, int64_t columns, int num_bits, int threads) {
  const auto pack_range = num_bits == 4 ? pack4_range : pack8_range;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(packed);
  parallel_for(row_count, columns, threads,
               [=](int64_t begin, int64_t end) { pack_range(codes, bytes, begin, end, columns); });
}

void unpack_codes(const int32_t* packed, int8_t* codes, int64_t row_count, int64_t columns, int num_bits, int threads) {
  const auto unpack_range = num_bits == 4 ? unpack4_range : unpack8_range;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(packed);
  parallel_for(row_count, columns, threads,
               [=](int64_t begin, int64_t end) { unpack_range(bytes, codes, begin, end, columns); });
}

}  // namespace qrealign
