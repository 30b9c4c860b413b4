// 4-bit weights times bfloat16 tokens: two or three warp groups turn words into fragments of the tensor cores' left operand, in
// registers, while products run; another has the tokens brought to shared memory ahead of them.
//
// A step is 64 columns: two planes of a block of 256 (layouts.py). Thread (g, t) of a warp, g = lane / 4, t = lane % 4, holds of
// rows g and g + 8 the word pairs (2t, 2t + 1) + 8j, whose nibbles are just the columns that fragments of 16 columns want of it.
#include "matmul.h"

#include <algorithm>

#include "device.cuh"
#include "hopper.cuh"

namespace qrealign {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kStep = 64, kStepBytes = 2 * kStep, kBlock = 256;  // columns, bytes of a token's, columns
constexpr int kGroupRows = 64;                                   // of a warp group's product
constexpr int kPad = 8;                                          // elements between rows of the result, against bank conflicts
constexpr float kPlanted = 128.0f;                               // a nibble behind its leading bit
constexpr int kNoShift = 30;                                     // puts every half of a block into group 0

// How a product is cut: tiles of kRows of the weight by kTokens. A group has 64 rows; where two share them, each has half of the steps.
template <int kTokens_, int kRows_, int kCluster_, bool kSplit_>
struct Cut {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kCluster = kCluster_;
  static constexpr bool kSplit = kSplit_, kSharedRows = kRows == kGroupRows;
  static constexpr int kGroups = kSharedRows ? 2 : kRows / kGroupRows, kWorkers = kGroups * kGroupThreads;
  static constexpr int kThreads = kWorkers + kGroupThreads;
  static constexpr int kSums = kTokens / 2;            // of a thread
  static constexpr int kStride = kSharedRows ? 2 : 1;  // steps from a group's one to its next
  static constexpr int kStages = kTokens == 256 ? 4 : 8, kStageBytes = kTokens * kStepBytes;
  static constexpr int kWorkerRegisters = kGroups == 3 ? 160 : 232, kBringerRegisters = kGroups == 3 ? 32 : 40;
  // Bytes of shared memory in which results are turned over, and in which halves of sums meet.
  static constexpr int kTurned = kRows / kGroupRows * kTokens * (kGroupRows + kPad) * static_cast<int>(sizeof(__nv_bfloat16));
  static constexpr int kHalves = kSharedRows ? kGroupRows * kTokens * static_cast<int>(sizeof(float)) : 0;
};

// The tiles of a product, one row of tiles after the other.
struct Tiles {
  int of_rows;  // in a row of them, a multiple of the cluster
  int all;

  __device__ int row(int tile) const { return tile % of_rows; }
  __device__ int token(int tile) const { return tile / of_rows; }
};

// Where blocks that split a tile leave their sums, and how many of them have.
struct Runs {
  float4* sums;   // [block][2 places][kSums / 4][kWorkers]
  int* arrivals;  // [split tiles], zero before and after
};

// A run of a tile's blocks of 256 columns, and what comes after it. A worker is a cluster, whose blocks have neighbouring tiles, a set,
// and the same columns. Of n workers each takes every n-th set; with kSplit, the sets that are left for fewer than n are cut into n runs
// of like length: the end of one set and the beginning of the next.
template <class Cut>
class Work {
  static constexpr int kCluster = Cut::kCluster;
  static constexpr bool kSplit = Cut::kSplit;

 public:
  int tile, first, end;  // the present run, of this block of threads

  __device__ Work(int tiles, int blocks) : sets_(tiles / kCluster), blocks_(blocks), workers_(gridDim.x / kCluster) {
    const int worker = blockIdx.x / kCluster;
    next_ = worker;
    whole_ = kSplit ? sets_ / workers_ * workers_ : sets_;
    if (kSplit) {
      left_ = (sets_ - whole_) * blocks;
      runs_ = min(workers_, left_);  // none is empty
      at_ = begin(min(worker, runs_));
      stop_ = begin(min(worker + 1, runs_));
    }
    advance();
  }

  __device__ bool done() const { return set_ >= sets_; }
  __device__ bool is_whole() const { return !kSplit || end - first == blocks_; }

  __device__ void advance() {
    set_ = next_, first = 0, end = blocks_;
    if (set_ < whole_) {
      next_ += workers_;
    } else if (kSplit && at_ < stop_) {
      set_ = whole_ + at_ / blocks_;
      first = at_ % blocks_;
      end = min(blocks_, first + stop_ - at_);
      at_ += end - first;
    } else {
      set_ = sets_;
    }
    tile = set_ * kCluster + rank();
  }

  __device__ static int rank() { return blockIdx.x % kCluster; }
  __device__ int split_tile() const { return tile - whole_ * kCluster; }

  // The first and the last worker that has a run of the present tile.
  __device__ int first_owner() const { return owner((set_ - whole_) * blocks_); }
  __device__ int last_owner() const { return owner((set_ - whole_ + 1) * blocks_ - 1); }

 private:
  // Where a worker begins in what is left, and the last one that begins at or before a place there.
  __device__ int begin(int64_t worker) const { return runs_ ? worker * left_ / runs_ : 0; }
  __device__ int owner(int64_t place) const { return ((place + 1) * runs_ - 1) / left_; }

  int sets_, blocks_, workers_, set_, next_, whole_, left_, runs_, at_, stop_;
};

// What a thread has of a block of its two rows: words as they lie, scales and zero points of the block's halves.
struct Fetched {
  uint2 words[2][4];
  __nv_bfloat16 scale[2][2];
  int zero_point[2][2] = {};
};

// The weight, and a thread's two rows of the present tile.
template <class Cut, bool kSymmetric>
class WeightRows {
 public:
  __device__ WeightRows(const uint32_t* codes, const __nv_bfloat16* scale, const int8_t* zero_point, const TileShape& shape,
                        int group_shift)
      : codes_(codes), scale_(scale), zero_point_(zero_point), shape_(shape), group_shift_(group_shift) {}

  // `first` of the tile; rows behind the last one are read as that one.
  __device__ __forceinline__ void take(int first) {
    const int group = threadIdx.x / kGroupThreads, lane = threadIdx.x % kWarp;
    const int of_group = Cut::kSharedRows ? 0 : group * kGroupRows, of_warp = threadIdx.x / kWarp % 4 * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) rows_[r] = min(first + of_group + of_warp + lane / 4 + 8 * r, shape_.rows - 1);
  }

  __device__ __forceinline__ Fetched fetch(int block) const {
    const int t = threadIdx.x % 4;
    Fetched fetched;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t* from = codes_ + static_cast<size_t>(rows_[r]) * (shape_.row_bytes / 4) + block * (kBlock / 8) + 2 * t;
#pragma unroll
      for (int j = 0; j < 4; ++j) fetched.words[r][j] = __ldg(reinterpret_cast<const uint2*>(from + 8 * j));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const size_t at = static_cast<size_t>(rows_[r]) * shape_.groups + min(2 * block + half >> group_shift_, shape_.groups - 1);
        fetched.scale[r][half] = scale_[at];
        if (!kSymmetric) fetched.zero_point[r][half] = zero_point_[at];
      }
    }
    return fetched;
  }

  __device__ float bias(const __nv_bfloat16* biases, int r) const { return biases ? to_float(biases[rows_[r]]) : 0.0f; }

 private:
  const uint32_t* codes_;
  const __nv_bfloat16* scale_;
  const int8_t* zero_point_;
  const TileShape& shape_;
  int group_shift_;
  int rows_[2];
};

// What was fetched, ready to be decoded: pairs of half words, and what is subtracted from and multiplied to their weights. Lower half words
// hold planes 0, 1, 4 and 5, upper ones 2, 3, 6 and 7; where two warp groups share rows, each takes one kind.
template <bool kSharedRows>
struct Halves {
  uint32_t pairs[kSharedRows ? 1 : 2][2][4];
  __nv_bfloat162 scale[2][2], offset[2][2];

  __device__ Halves(const Fetched& fetched, int group) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 words = fetched.words[r][j];
        pairs[0][r][j] = __byte_perm(words.x, words.y, kSharedRows && group == 1 ? 0x7632 : 0x5410);
        if constexpr (!kSharedRows) pairs[1][r][j] = __byte_perm(words.x, words.y, 0x7632);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[r][half] = __bfloat162bfloat162(fetched.scale[r][half]);
        offset[r][half] = __float2bfloat162_rn(kPlanted + 8 + fetched.zero_point[r][half]);
      }
    }
  }

  // Makes the fragments of the group's step `index` of the block: nibbles are planted into the mantissas of 128, whose last place
  // is 1.
  __device__ __forceinline__ void decode(uint32_t (&left)[4][4], int index) const {
    const int half = kSharedRows ? index : index / 2;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int product = i / 4, r = i % 2, j = product % 2 * 2 + i % 4 / 2;
      uint32_t bits = (pairs[kSharedRows ? 0 : index % 2][r][j] >> (half * 4 + product / 2 * 8) & 0x000f000fu) | 0x43004300u;
      const __nv_bfloat162 codes = __hsub2(reinterpret_cast<__nv_bfloat162&>(bits), offset[r][half]);
      const __nv_bfloat162 weights = __hmul2(codes, scale[r][half]);
      left[product][i % 4] = reinterpret_cast<const uint32_t&>(weights);
    }
  }
};

template <class Cut>
__device__ __forceinline__ void meet_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(Cut::kWorkers) : "memory");
}

// Meets the warps that store rows together: those of the group, or of both where they share rows.
template <class Cut>
__device__ __forceinline__ void meet_storers(int group) {
  if constexpr (Cut::kSharedRows) {
    meet_workers<Cut>();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + group), "n"(kGroupThreads) : "memory");
  }
}

// Has tile after tile of the tokens brought, each when all blocks of the cluster have done with what lies in its place.
template <class Cut>
__device__ __forceinline__ void bring_tokens(const CUtensorMap* map, uint32_t ring, const uint64_t* full, const uint64_t* empty,
                                             Work<Cut> work, Tiles tiles) {
  constexpr int kStageBytes = Cut::kStageBytes, kCluster = Cut::kCluster, kShare = Cut::kTokens / kCluster;
  const int rank = work.rank();
  int stage = 0, parity = 1;
  for (; !work.done(); work.advance()) {
    for (int step = work.first * (kBlock / kStep); step < work.end * (kBlock / kStep); ++step) {
      const Barrier here{shared_address(full + stage)};
      Barrier{shared_address(empty + stage)}.wait(parity);
      here.expect(kStageBytes);
      copy_tile<kCluster>(ring + stage * kStageBytes + rank * (kStageBytes / kCluster), map, here, step * kStep,
                          tiles.token(work.tile) * Cut::kTokens + rank * kShare);
      if (++stage == Cut::kStages) stage = 0, parity ^= 1;
    }
  }
}

// Leaves the sums of a run for whoever comes last to the tile, or, if that is this block, adds those of all runs, in their order: the
// same bits every time. Returns whether it was the last.
template <class Cut>
__device__ __forceinline__ bool join_runs(float (&sums)[Cut::kSums], const Work<Cut>& work, Runs runs, int* arrived) {
  constexpr int kFours = Cut::kSums / 4, kWorkers = Cut::kWorkers, kCluster = Cut::kCluster;
  const int first = work.first_owner(), count = work.last_owner() - first + 1;
  const auto place = [&](int worker) {  // a block's second place is for the run that a tile begins with
    const int block = worker * kCluster + work.rank();
    return runs.sums + static_cast<size_t>(2 * block + (worker == first)) * kFours * kWorkers + threadIdx.x;
  };
  float4* const mine = place(blockIdx.x / kCluster);
#pragma unroll
  for (int i = 0; i < kFours; ++i) {
    __stcg(mine + i * kWorkers, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  }
  __threadfence();
  meet_workers<Cut>();
  if (threadIdx.x == 0) *arrived = atomicAdd(runs.arrivals + work.split_tile(), 1);
  meet_workers<Cut>();
  if (*arrived != count - 1) return false;
  __threadfence();
  if (threadIdx.x == 0) runs.arrivals[work.split_tile()] = 0;
#pragma unroll
  for (int i = 0; i < Cut::kSums; ++i) sums[i] = 0.0f;
  for (int run = 0; run < count; ++run) {
    const float4* from = place(first + run);
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const float4 four = __ldcg(from + i * kWorkers);
      sums[4 * i] += four.x, sums[4 * i + 1] += four.y, sums[4 * i + 2] += four.z, sums[4 * i + 3] += four.w;
    }
  }
  return true;
}

// Adds the biases of the thread's rows to its group's share of a tile, and the halves of groups that share rows; turns it over in
// `place`, of shared memory, and stores it. `first_row` is the first of the group's rows.
template <class Cut>
__device__ __forceinline__ void store_tile(float (&sums)[Cut::kSums], char* place, float upper_bias, float lower_bias,
                                           int first_token, int first_row, __nv_bfloat16* out, const TileShape& shape) {
  constexpr bool kSharedRows = Cut::kSharedRows;
  constexpr int kTokens = Cut::kTokens, kPitch = kGroupRows + kPad, kChunks = kGroupRows / 8;
  constexpr int kStorers = kSharedRows ? Cut::kWorkers : kGroupThreads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroupThreads / kWarp, group = threadIdx.x / kGroupThreads;
  if constexpr (kSharedRows) {
    float* halves = reinterpret_cast<float*>(place) + threadIdx.x % kGroupThreads;
    if (group == 1) {
#pragma unroll
      for (int i = 0; i < Cut::kSums; ++i) halves[i * kGroupThreads] = sums[i];
    }
    meet_workers<Cut>();
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < Cut::kSums; ++i) sums[i] += halves[i * kGroupThreads];
    }
    meet_workers<Cut>();
  }
  __nv_bfloat16* const turned = reinterpret_cast<__nv_bfloat16*>(place) + (kSharedRows ? 0 : group * kTokens * kPitch);
  if (!kSharedRows || group == 0) {
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {  // 16 tokens of 16 rows
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float bias = j % 2 ? lower_bias : upper_bias;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(sums[8 * i + 2 * j] + bias, sums[8 * i + 2 * j + 1] + bias);
        pairs[j] = reinterpret_cast<const uint32_t&>(pair);
      }
      const int token = 16 * i + lane / 16 * 8 + lane % 8;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared_address(turned + token * kPitch + warp * 16 + lane / 8 % 2 * 8)),
                   "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3])
                   : "memory");
    }
  }
  meet_storers<Cut>(group);
  for (int i = threadIdx.x % kStorers; i < kTokens * kChunks; i += kStorers) {
    const int token = first_token + i / kChunks, row = first_row + i % kChunks * 8;
    if (token >= shape.tokens || row >= shape.rows) continue;
    const __nv_bfloat16* from = turned + i / kChunks * kPitch + i % kChunks * 8;
    __nv_bfloat16* to = out + static_cast<size_t>(token) * shape.rows + row;
    if (shape.rows % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < min(8, shape.rows - row); ++j) to[j] = from[j];
    }
  }
  meet_storers<Cut>(group);  // the place is free again
}

// What a block shares: places for tiles of tokens, whether they are full or empty, and a place to turn results over.
struct Shared {
  uint32_t ring;
  uint64_t *full, *empty;
  char* result;
  int* arrived;
};

// Multiplies tile after tile, by the two or three groups that work.
template <class Cut, bool kSymmetric>
__device__ __forceinline__ void multiply_tiles(WeightRows<Cut, kSymmetric> weight, const __nv_bfloat16* bias, __nv_bfloat16* out,
                                               const TileShape& shape, Work<Cut> work, Tiles tiles, Runs runs, Shared shared) {
  constexpr bool kSharedRows = Cut::kSharedRows;
  constexpr int kTokens = Cut::kTokens, kStride = Cut::kStride, kSteps = kBlock / kStep / kStride;  // of a group, in a block
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kGroupThreads;
  const auto release = [&](int stage) {
    if (lane < Cut::kCluster) Barrier{shared_address(shared.empty + stage)}.arrive_at(lane);
  };
  int stage = kSharedRows ? group : 0, parity = 0;
  weight.take(tiles.row(work.tile) * Cut::kRows);
  Fetched next = weight.fetch(work.first);
  while (!work.done()) {
    float sums[Cut::kSums] = {};
    Halves<kSharedRows> here(next, group);
    next = weight.fetch(min(work.first + 1, work.end - 1));
    uint32_t left[2][4][4];  // of a step's four products, by turns: one is multiplied while the other is made
    here.decode(left[0], 0);
    int before = -1;  // the stage of the step before
    for (int block = work.first; block < work.end; ++block) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        Barrier{shared_address(shared.full + stage)}.wait(parity);
        begin_products();
        const uint64_t right = tile_descriptor(shared.ring + stage * Cut::kStageBytes);
#pragma unroll
        for (int product = 0; product < 4; ++product) multiply<kTokens>(sums, left[i % 2][product], right + 2 * product);
        commit_products();
        finish_products<1>();  // those of the step before: the tensor cores have these while the next ones are made
        if (before >= 0) release(before);
        before = stage;
        if (i + 1 < kSteps) {
          here.decode(left[(i + 1) % 2], i + 1);
        } else {  // what is made behind the last block is never multiplied
          here = Halves<kSharedRows>(next, group);
          next = weight.fetch(min(block + 2, work.end - 1));
          here.decode(left[(i + 1) % 2], 0);
        }
        stage += kStride;
        if (stage >= Cut::kStages) stage -= Cut::kStages, parity ^= 1;
      }
    }
    finish_products<0>();
    release(before);
    const float upper = weight.bias(bias, 0), lower = weight.bias(bias, 1);
    const Work<Cut> done = work;
    work.advance();
    if (!work.done()) {  // on its way while the result is stored
      weight.take(tiles.row(work.tile) * Cut::kRows);
      next = weight.fetch(work.first);
    } else {
      let_next_kernel_start();
    }
    if constexpr (Cut::kSplit) {
      if (!done.is_whole() && !join_runs<Cut>(sums, done, runs, shared.arrived)) continue;
    }
    const int first_row = tiles.row(done.tile) * Cut::kRows + (kSharedRows ? 0 : group * kGroupRows);
    store_tile<Cut>(sums, shared.result, upper, lower, tiles.token(done.tile) * kTokens, first_row, out, shape);
  }
}

template <class Cut, bool kSymmetric>
__global__ void __launch_bounds__(Cut::kThreads, 1)
    matmul_int4_kernel(const __grid_constant__ CUtensorMap x_map, const uint32_t* codes, const __nv_bfloat16* scale,
                       const int8_t* zero_point, const __nv_bfloat16* bias, __nv_bfloat16* out, TileShape shape, int group_shift,
                       Tiles tiles, Runs runs) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kCluster = Cut::kCluster, kDepth = Cut::kStages;
  extern __shared__ char unaligned[];
  __shared__ __align__(8) uint64_t full[kDepth], empty[kDepth];
  __shared__ int arrived;
  char* const ring = unaligned + (-shared_address(unaligned) & 1023);
  const Shared shared = {shared_address(ring), full, empty, ring + kDepth * Cut::kStageBytes, &arrived};
  const Work<Cut> work(tiles.all, shape.row_bytes / (kBlock / 2));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kDepth; ++i) {
      Barrier{shared_address(full + i)}.init(1);
      Barrier{shared_address(empty + i)}.init(kCluster * Cut::kWorkers / kWarp / Cut::kStride);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if constexpr (kCluster > 1) {
    meet_cluster();
  } else {
    __syncthreads();
  }
  if (threadIdx.x >= Cut::kWorkers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Cut::kBringerRegisters));
    wait_for_kernels_before();
    if (threadIdx.x == Cut::kWorkers) bring_tokens<Cut>(&x_map, shared.ring, full, empty, work, tiles);
    __syncwarp();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Cut::kWorkerRegisters));
    const WeightRows<Cut, kSymmetric> weight(codes, scale, zero_point, shape, group_shift);
    multiply_tiles<Cut, kSymmetric>(weight, bias, out, shape, work, tiles, runs, shared);
  }
  if constexpr (kCluster > 1) meet_cluster();  // no block leaves while another still arrives at its barriers
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function that describes a tensor to the copy engine; found at run time, so that nothing links to the driver.
EncodeTiled find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return code == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(found) : nullptr;
}

template <class Cut>
int launch(const void* x, const void* codes, const void* scale, const int8_t* zero_point, const void* bias, void* out,
           TileShape shape, Runs runs, void* stream) {
  static const EncodeTiled encode = find_encoder();
  if (!encode) return static_cast<int>(cudaErrorNotSupported);
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(shape.columns), static_cast<cuuint64_t>(shape.tokens)};
  const cuuint64_t strides[] = {2 * sizes[0]};
  const cuuint32_t box[] = {kStep, Cut::kTokens / Cut::kCluster}, steps[] = {1, 1};
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(x), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    return static_cast<int>(cudaErrorInvalidValue);
  }
  constexpr int kTokens = Cut::kTokens, kRows = Cut::kRows, kCluster = Cut::kCluster, kAlignment = 1024;
  int group_shift = 0;
  while (128 << group_shift < shape.columns / shape.groups) ++group_shift;
  if (shape.groups == 1) group_shift = kNoShift;
  const int row_tiles = ((shape.rows + kRows - 1) / kRows + kCluster - 1) / kCluster * kCluster;
  const Tiles tiles = {row_tiles, row_tiles * ((shape.tokens + kTokens - 1) / kTokens)};
  const auto kernel = zero_point ? matmul_int4_kernel<Cut, false> : matmul_int4_kernel<Cut, true>;
  const int most = multiprocessors() / kCluster * kCluster;
  const dim3 blocks(Cut::kSplit ? most : std::min(tiles.all, most));
  const int bytes = Cut::kStages * Cut::kStageBytes + std::max(Cut::kTurned, Cut::kHalves) + kAlignment;
  const Layout layout = {blocks, dim3(Cut::kThreads), bytes, true, kCluster};
  return launch_kernel(kernel, layout, stream, map, static_cast<const uint32_t*>(codes), static_cast<const __nv_bfloat16*>(scale),
                       zero_point, static_cast<const __nv_bfloat16*>(bias), static_cast<__nv_bfloat16*>(out), shape, group_shift,
                       tiles, runs);
}

}  // namespace

int matmul_int4(const void* x, const void* codes, const void* scale, const int8_t* zero_point, const void* bias, void* out,
                TileShape shape, TileLaunch cut, float* sums, int* arrivals, void* stream) {
  int code = -1;
  const auto launch_if_asked = [&](auto one) {
    if (cut.tokens != one.kTokens || cut.rows != one.kRows || cut.cluster != one.kCluster || one.kSplit != (sums != nullptr)) return;
    code = launch<decltype(one)>(x, codes, scale, zero_point, bias, out, shape, {reinterpret_cast<float4*>(sums), arrivals}, stream);
  };
  launch_if_asked(Cut<64, 64, 1, false>());
  launch_if_asked(Cut<128, 64, 1, false>());
  launch_if_asked(Cut<128, 64, 1, true>());
  launch_if_asked(Cut<128, 64, 2, false>());
  launch_if_asked(Cut<128, 128, 1, false>());
  launch_if_asked(Cut<128, 128, 1, true>());
  launch_if_asked(Cut<128, 192, 1, false>());
  launch_if_asked(Cut<128, 192, 1, true>());
  launch_if_asked(Cut<128, 192, 2, false>());
  launch_if_asked(Cut<128, 192, 2, true>());
  launch_if_asked(Cut<256, 128, 1, false>());
  launch_if_asked(Cut<256, 128, 1, true>());
  launch_if_asked(Cut<256, 128, 2, false>());
  launch_if_asked(Cut<256, 128, 2, true>());
  return code;
}

}  // namespace qrealign
