// Matrix products of many rows, on tensor cores: for prompts, where cuBLASLt is not there.
//
// A block has 128 rows and 128 outputs, a warp 64 of the rows and 32 of the outputs, with its sums in registers. Inputs come 32 at a time,
// three such stages ahead of the computation. The order of a row's sum depends on the number of inputs alone.
#include "product.cuh"
#include "tensor_core.cuh"

constexpr unsigned kProductThreads = 256, kTile = 128, kDepth = 32, kStages = 4;

// A row in shared memory is longer by 16 bytes than what is in it, so that eight rows lie in different banks.
template <class T>
struct ProductStage {
  T x[kTile][kDepth + kChunk];
  T w[kTile][kDepth + kChunk];
};

// Rows from `first` on, inputs from `input` on; zeros beyond both.
template <class T>
__device__ __forceinline__ void load_operand(T (&tile)[kTile][kDepth + kChunk], const T* matrix, unsigned rows, unsigned inputs,
                                          unsigned first, unsigned input) {
  constexpr unsigned kChunks = kDepth / kChunk;
#pragma unroll
  for (unsigned n = 0; n < kTile * kChunks / kProductThreads; n++) {
    unsigned i = n * kProductThreads + threadIdx.x, row = i / kChunks, column = input + i % kChunks * kChunk;
    bool there = first + row < rows && column < inputs;
    const T* from = there ? matrix + size_t(first + row) * inputs + column : matrix;
    copy_async_16(&tile[row][i % kChunks * kChunk], from, there ? 16 : 0);
  }
}

// Rows along x, outputs along y.
template <class T, class Out>
__device__ void multiply_tiles(const Product& params) {
  DYNAMIC_SHARED(ProductStage<T>, stages);
  unsigned first_row = blockIdx.x * kTile, first_output = blockIdx.y * kTile;
  unsigned count = (params.inputs + kDepth - 1) / kDepth;
  auto load = [&](unsigned step) {
    ProductStage<T>& stage = stages[step % kStages];
    if (step < count) {
      load_operand<T>(stage.x, (const T*)params.x, params.rows, params.inputs, first_row, step * kDepth);
      load_operand<T>(stage.w, (const T*)params.w, params.outputs, params.inputs, first_output, step * kDepth);
    }
    // A group for each step, if of nothing, so that what is left in flight can be counted.
    commit_copies();
  };
  for (unsigned step = 0; step + 1 < kStages; step++) load(step);

  unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  unsigned row = warp / 4 * 64, output = warp % 4 * 32;
  float sums[4][4][4] = {};
#pragma unroll 1
  for (unsigned step = 0; step < count; step++) {
    wait_for_copies<kStages - 2>();
    // Everybody's copies are there, and nobody reads the stage any more that is loaded next.
    __syncthreads();
    load(step + kStages - 1);
    const ProductStage<T>& stage = stages[step % kStages];
#pragma unroll
    for (unsigned k = 0; k < kDepth; k += 16) {
      uint32_t b[2][4];
#pragma unroll
      for (unsigned n = 0; n < 2; n++)
        load_matrices(b[n], &stage.w[output + n * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * kChunk]);
#pragma unroll
      for (unsigned m = 0; m < 4; m++) {
        uint32_t a[4];
        load_matrices(a, &stage.x[row + m * 16 + lane % 16][k + lane / 16 * kChunk]);
#pragma unroll
        for (unsigned n = 0; n < 4; n++) add_product(T{}, sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
      }
    }
  }
  wait_for_copies<0>();

#pragma unroll
  for (unsigned m = 0; m < 4; m++)
#pragma unroll
    for (unsigned n = 0; n < 4; n++)
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        unsigned r = first_row + row + m * 16 + lane / 4 + i / 2 * 8;
        unsigned o = first_output + output + n * 8 + lane % 4 * 2 + i % 2;
        if (params.rows <= r || params.outputs <= o) continue;
        float sum = sums[m][n][i] + (params.bias ? widen(((const T*)params.bias)[o]) : 0.0f);
        Out* out = (Out*)params.out + size_t(r) * params.outputs + o;
        *out = narrow<Out>(params.adds ? widen(*out) + sum : sum);
      }
}

KERNEL(multiply_tiles_f16, kProductThreads, Product) { multiply_tiles<f16, f16>(params); }
KERNEL(multiply_tiles_bf16, kProductThreads, Product) { multiply_tiles<bf16, bf16>(params); }
KERNEL(multiply_tiles_f16_to_f32, kProductThreads, Product) { multiply_tiles<f16, float>(params); }
KERNEL(multiply_tiles_bf16_to_f32, kProductThreads, Product) { multiply_tiles<bf16, float>(params); }
