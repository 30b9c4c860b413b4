// The Python module qrealign_kernels._C_cuda: addresses, sizes and a stream handle in. cuda.py checks tensors before it calls.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "decode.h"
#include "matmul.h"

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int code) {
  if (code != 0) throw std::runtime_error(std::string("a CUDA kernel was not launched: ") + qrealign::error_text(code));
}

qrealign::Element element_of(int code) { return static_cast<qrealign::Element>(code); }

void decode_int4(int element, uintptr_t x, uintptr_t codes, int scale_element, uintptr_t scale, uintptr_t zero_point,
                 uintptr_t bias, uintptr_t out, int tokens, int rows, int columns, int row_bytes, int groups, int warps,
                 int row_tiles, int stages, bool overlap, uintptr_t stream) {
  check(qrealign::decode_int4(element_of(element), pointer<void>(x), pointer<void>(codes), element_of(scale_element),
                              pointer<void>(scale), pointer<int8_t>(zero_point), pointer<void>(bias), pointer<void>(out),
                              {tokens, rows, columns, row_bytes}, groups, {warps, row_tiles, stages, overlap},
                              pointer<void>(stream)));
}

void decode_int8(int element, uintptr_t x, uintptr_t x_scale, uintptr_t codes, int scale_element, uintptr_t scale,
                 uintptr_t bias, uintptr_t out, int tokens, int rows, int columns, int row_bytes, int warps, int row_tiles,
                 int stages, bool overlap, uintptr_t stream) {
  check(qrealign::decode_int8(element_of(element), pointer<int8_t>(x), pointer<float>(x_scale), pointer<void>(codes),
                              element_of(scale_element), pointer<void>(scale), pointer<void>(bias), pointer<void>(out),
                              {tokens, rows, columns, row_bytes}, {warps, row_tiles, stages, overlap}, pointer<void>(stream)));
}

void quantize_decode_int8(int element, uintptr_t x, uintptr_t codes, int scale_element, uintptr_t scale, uintptr_t bias,
                          uintptr_t out, int tokens, int rows, int columns, int row_bytes, int warps, int row_tiles,
                          int stages, bool overlap, uintptr_t stream) {
  check(qrealign::quantize_decode_int8(element_of(element), pointer<void>(x), pointer<void>(codes), element_of(scale_element),
                                       pointer<void>(scale), pointer<void>(bias), pointer<void>(out),
                                       {tokens, rows, columns, row_bytes}, {warps, row_tiles, stages, overlap},
                                       pointer<void>(stream)));
}

void quantize_tokens(int element, uintptr_t x, uintptr_t codes, uintptr_t scale, int tokens, int columns, bool overlap,
                     uintptr_t stream) {
  check(qrealign::quantize_tokens(element_of(element), pointer<void>(x), pointer<int8_t>(codes),
                                  pointer<float>(scale), tokens, columns, overlap, pointer<void>(stream)));
}

void matmul_int4(uintptr_t x, uintptr_t codes, uintptr_t scale, uintptr_t zero_point, uintptr_t bias, uintptr_t out, int tokens,
                 int rows, int columns, int row_bytes, int groups, int tile_tokens, int tile_rows, int cluster, uintptr_t sums,
                 uintptr_t arrivals, uintptr_t stream) {
  check(qrealign::matmul_int4(pointer<void>(x), pointer<void>(codes), pointer<void>(scale), pointer<int8_t>(zero_point),
                              pointer<void>(bias), pointer<void>(out), {tokens, rows, columns, row_bytes, groups},
                              {tile_tokens, tile_rows, cluster}, pointer<float>(sums), pointer<int>(arrivals), pointer<void>(stream)));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
  module.doc() = "Kernels for NVIDIA GPUs; arguments are addresses, sizes and a stream handle.";
  module.def("unusable_reason", &qrealign::unusable_reason);
  module.def("decode_int4", &decode_int4);
  module.def("decode_int8", &decode_int8);
  module.def("quantize_decode_int8", &quantize_decode_int8);
  module.def("quantize_tokens", &quantize_tokens);
  module.def("matmul_int4", &matmul_int4);
}
