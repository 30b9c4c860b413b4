// The Python module qrealign_kernels._C: addresses and sizes in, nothing out. cpu.py checks tensors before it calls.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common.h"
#include "cpu/linear.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `grid` is `[7, rows]` float32 in the order of WeightGrid; the last row of a symmetric grid is left as it is.
qrealign::Grid grid_at(uintptr_t address, int64_t rows, bool symmetric) {
  float* base = pointer<float>(address);
  return {base,
          base + rows,
          base + 2 * rows,
          base + 3 * rows,
          base + 4 * rows,
          base + 5 * rows,
          symmetric ? nullptr : base + 6 * rows};
}

qrealign::CodeRange code_range(int num_bits) {
  return {-static_cast<float>(1 << (num_bits - 1)), static_cast<float>((1 << (num_bits - 1)) - 1)};
}

void fake_quant_weight(uintptr_t rows, uintptr_t low_share, uintptr_t high_share, uintptr_t fake, uintptr_t grid,
                       int64_t row_count, int64_t columns, int num_bits, bool symmetric, int scale_kind, int threads) {
  qrealign::fake_quant_weight(pointer<const float>(rows), pointer<const float>(low_share), pointer<const float>(high_share),
                              pointer<float>(fake), grid_at(grid, row_count, symmetric), row_count, columns,
                              code_range(num_bits), static_cast<qrealign::ScaleKind>(scale_kind), threads);
}

void weight_gradient_sums(uintptr_t grad, uintptr_t rows, uintptr_t grid, uintptr_t sums, int64_t row_count, int64_t columns,
                          int num_bits, bool symmetric, int threads) {
  float* out = pointer<float>(sums);
  qrealign::weight_gradient_sums(pointer<const float>(grad), pointer<const float>(rows), grid_at(grid, row_count, symmetric),
                                 out, out + row_count, out + 2 * row_count, row_count, columns, code_range(num_bits), threads);
}

void weight_gradient_rows(uintptr_t grad, uintptr_t rows, uintptr_t grid, uintptr_t at_minimum, uintptr_t at_maximum,
                          uintptr_t result, int64_t row_count, int64_t columns, int threads) {
  qrealign::weight_gradient_rows(pointer<const float>(grad), pointer<const float>(rows), grid_at(grid, row_count, true),
                                 pointer<const float>(at_minimum), pointer<const float>(at_maximum), pointer<float>(result),
                                 row_count, columns, threads);
}

void fake_quant_per_token(uintptr_t x, uintptr_t fake, int64_t row_count, int64_t columns, int num_bits, int threads) {
  qrealign::fake_quant_per_token(pointer<const float>(x), pointer<float>(fake), row_count, columns, code_range(num_bits),
                                 threads);
}

void quantize_per_token(uintptr_t x, uintptr_t codes, uintptr_t scale, int64_t row_count, int64_t columns, int num_bits,
                        int threads) {
  qrealign::quantize_per_token(pointer<const float>(x), pointer<int8_t>(codes), pointer<float>(scale), row_count, columns,
                               code_range(num_bits), threads);
}

void pack_codes(uintptr_t codes, uintptr_t packed, int64_t row_count, int64_t columns, int num_bits, int threads) {
  qrealign::pack_codes(pointer<const int8_t>(codes), pointer<int32_t>(packed), row_count, columns, num_bits, threads);
}

void unpack_codes(uintptr_t packed, uintptr_t codes, int64_t row_count, int64_t columns, int num_bits, int threads) {
  qrealign::unpack_codes(pointer<const int32_t>(packed), pointer<int8_t>(codes), row_count, columns, num_bits, threads);
}

const qrealign::DotKernels& dot_kernels(const std::string& name) {
  const qrealign::DotKernels* kernels = qrealign::find_dot_kernels(name.c_str());
  if (kernels) return *kernels;
  throw std::invalid_argument("the instruction set " + name + " is unknown or not usable on this processor");
}

std::string linear_isa(const std::string& name) { return dot_kernels(name).name; }

qrealign::PackedLinear packed_linear(uintptr_t codes, uintptr_t scale, uintptr_t zero_point, int64_t rows,
                                     int64_t columns, int64_t groups, int64_t quads, int num_bits) {
  return {pointer<const uint8_t>(codes),
          pointer<const float>(scale),
          pointer<const int8_t>(zero_point),
          rows,
          columns,
          groups,
          quads,
          num_bits};
}

void integer_linear(const std::string& isa, int token_kind, uintptr_t x, uintptr_t x_scale, int token_bits, int64_t tokens,
                    uintptr_t codes, uintptr_t scale, uintptr_t zero_point, int64_t rows, int64_t columns, int64_t groups,
                    int64_t quads, int num_bits, uintptr_t bias, uintptr_t out, bool bfloat16, int threads) {
  const qrealign::Tokens given = {static_cast<qrealign::TokenKind>(token_kind), pointer<const void>(x),
                                  pointer<const float>(x_scale), token_bits, tokens};
  qrealign::integer_linear(dot_kernels(isa), given,
                           packed_linear(codes, scale, zero_point, rows, columns, groups, quads, num_bits),
                           pointer<const float>(bias), {pointer<void>(out), bfloat16}, threads);
}

void float_linear(const std::string& isa, uintptr_t x, int64_t tokens, uintptr_t codes, uintptr_t scale, uintptr_t zero_point,
                  int64_t rows, int64_t columns, int64_t groups, int64_t quads, int num_bits, uintptr_t bias, uintptr_t out,
                  bool bfloat16, int threads) {
  qrealign::float_linear(dot_kernels(isa), pointer<const float>(x), tokens,
                         packed_linear(codes, scale, zero_point, rows, columns, groups, quads, num_bits),
                         pointer<const float>(bias), {pointer<void>(out), bfloat16}, threads);
}

std::string isa() {
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "Quantization ops for the CPU; arguments are addresses and sizes.";
  module.def("isa", &isa);
  module.def("fake_quant_weight", &fake_quant_weight, release());
  module.def("weight_gradient_sums", &weight_gradient_sums, release());
  module.def("weight_gradient_rows", &weight_gradient_rows, release());
  module.def("fake_quant_per_token", &fake_quant_per_token, release());
  module.def("quantize_per_token", &quantize_per_token, release());
  module.def("pack_codes", &pack_codes, release());
  module.def("unpack_codes", &unpack_codes, release());
  module.def("linear_isa", &linear_isa);
  module.def("integer_linear", &integer_linear, release());
  module.def("float_linear", &float_linear, release());
}
