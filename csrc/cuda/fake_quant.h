// Rounding whole weight rows to their grids while a model is calibrated, and the gradient of it: one stream over the weight.
//
// weight, grad and rounded weights are bfloat16 [N, K], row-major, K a multiple of 8; a row is one scale group. The definition is
// fake_quant_edited_weight_ref in reference_calibration.py: codes and rounded weights equal its bits. No call allocates, waits, or
// leaves its stream, and sums are taken in a fixed order.
#pragma once

#include <cstdint>

namespace qrealign {

// Symmetric codes from qmin to qmax, whose scales are bfloat16 values.
struct CodeGrid {
  int qmin;
  int qmax;
  float min_scale;
};

// What changes the weight and its bounds before it is rounded, float32; each may be null.
struct RowTransform {
  const float* low_logit;     // [N]
  const float* high_logit;    // [N]
  const float* column_scale;  // [K]
  const float* row_divisor;   // [N]
};

// `vectors` of 8 columns belong to a thread, of which a block has at most 512, and `blocks` run on a multiprocessor at once.
// round_rows knows 1 to 4 vectors, row_gradients 1 and 2.
struct RowLaunch {
  int vectors;
  int blocks;
  int multiprocessors;
};

// Where the results go; null for what is not wanted.
struct RoundedRows {
  void* weights;    // bfloat16 [N, K], or null where codes are wanted
  int8_t* codes;    // [N, K]
  float* scale;     // [N], with codes
  float* extremes;  // [2, N]: what the backward needs
};

struct RowGradients {
  float* low_logit;     // [N]
  float* high_logit;    // [N]
  float* partial;       // [blocks * multiprocessors, K]: scratch
  float* column_scale;  // [K]; never null, as the transform's
  float* row_divisor;   // [N]
};

// Each returns 0, or a CUDA error code; -1 for a launch that was not compiled.
int round_rows(const void* weight, RowTransform transform, CodeGrid grid, RoundedRows out, int rows, int columns, RowLaunch launch,
               void* stream);

int row_gradients(const void* grad, const void* weight, const float* extremes, RowTransform transform, CodeGrid grid,
                  RowGradients out, int rows, int columns, RowLaunch launch, void* stream);

}  // namespace qrealign
