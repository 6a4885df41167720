// Matrix products in tiles, on tensor cores: how operands come to shared memory, and from there to the sums.
//
// To what is here a row of an operand is bytes; what they are only the instruction knows, which takes 32 of them from each row at a time.
// Every shape of a tile adds them in their order, so a row's sum depends on the number of inputs alone.
#pragma once

#include "tensor_core.cuh"

// Warps along rows and along outputs; of these, tiles of 16 rows and of 8 outputs that each warp has; bytes of a row of `x` that a stage
// has, and stages.
template <unsigned kRowWarps, unsigned kOutputWarps, unsigned kRowTiles_, unsigned kOutputTiles_, unsigned kBytes_, unsigned kStages_>
struct TileShape {
  static constexpr unsigned kThreads = kRowWarps * kOutputWarps * kWarp;
  static constexpr unsigned kRowTiles = kRowTiles_, kOutputTiles = kOutputTiles_, kBytes = kBytes_, kStages = kStages_;
  static constexpr unsigned kRows = kRowWarps * kRowTiles * 16, kOutputs = kOutputWarps * kOutputTiles * 8;

  // A block has rows along x and outputs along y; where it begins, and where the warp does within it.
  static __device__ __forceinline__ unsigned first_row() { return blockIdx.x * kRows; }
  static __device__ __forceinline__ unsigned first_output() { return blockIdx.y * kOutputs; }
  static __device__ __forceinline__ unsigned row() { return threadIdx.x / kWarp / kOutputWarps * kRowTiles * 16; }
  static __device__ __forceinline__ unsigned output() { return threadIdx.x / kWarp % kOutputWarps * kOutputTiles * 8; }
};

struct Operand {
  const void* first;
  uint32_t rows;
  uint32_t row_bytes;  // a multiple of 16
};

// Rows from `first` on, of each `kBytes` from `byte` on; zeros beyond both. A row in shared memory is longer by 16 bytes than what is in
// it, so that eight rows lie in different banks.
template <unsigned kThreads, unsigned kRows, unsigned kBytes>
__device__ __forceinline__ void load_rows(uint8_t (&tile)[kRows][kBytes], const Operand& from, unsigned first, unsigned byte) {
  constexpr unsigned kChunks = kBytes / 16 - 1, kAll = kRows * kChunks;
#pragma unroll
  for (unsigned n = 0; n < (kAll + kThreads - 1) / kThreads; n++) {
    unsigned i = n * kThreads + threadIdx.x;
    if (kAll % kThreads != 0 && kAll <= i) break;
    unsigned row = i / kChunks, column = i % kChunks * 16;
    bool there = first + row < from.rows && byte + column < from.row_bytes;
    const uint8_t* source = (const uint8_t*)from.first + (there ? size_t(first + row) * from.row_bytes + byte + column : 0);
    copy_async_16(&tile[row][column], source, there ? 16 : 0);
  }
}

// Calls `add(stage, step)` for each of `count` steps, when `load(stage, step)` has brought the stage, some steps earlier.
template <unsigned kStages, class Load, class Add>
__device__ __forceinline__ void stream_stages(unsigned count, Load load, Add add) {
  auto begin = [&](unsigned step) {
    if (step < count) load(step % kStages, step);
    // A group for each step, if of nothing, so that what is left in flight can be counted.
    commit_copies();
  };
#pragma unroll
  for (unsigned step = 0; step + 1 < kStages; step++) begin(step);
#pragma unroll 1
  for (unsigned step = 0; step < count; step++) {
    wait_for_copies<kStages - 2>();
    // Everybody's copies are there, and nobody reads the stage any more that is loaded next.
    __syncthreads();
    begin(step + kStages - 1);
    add(step % kStages, step);
  }
  wait_for_copies<0>();
}

template <class Shape, class Sum>
using Sums = Sum[Shape::kRowTiles][Shape::kOutputTiles][4];

// The left side of a warp's products: 32 bytes of 16 rows.
template <class Shape>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const uint8_t (&x)[Shape::kRows][Shape::kBytes + 16], unsigned tile,
                                          unsigned byte) {
  unsigned lane = threadIdx.x % kWarp;
  load_matrices(a, &x[Shape::row() + tile * 16 + lane % 16][byte + lane / 16 * 16]);
}

// The right side: 64 bytes of 8 outputs.
template <class Shape, unsigned kBytes>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], const uint8_t (&w)[Shape::kOutputs][kBytes], unsigned tile, unsigned byte) {
  unsigned lane = threadIdx.x % kWarp;
  load_matrices(b, &w[Shape::output() + tile * 8 + lane % 8][byte + lane / 8 * 16]);
}

// Adds the products of one stage, of the type `T`.
template <class Shape, class T, class Sum>
__device__ __forceinline__ void add_stage(Sums<Shape, Sum>& sums, const uint8_t (&x)[Shape::kRows][Shape::kBytes + 16],
                                          const uint8_t (&w)[Shape::kOutputs][Shape::kBytes + 16]) {
#pragma unroll
  for (unsigned byte = 0; byte < Shape::kBytes; byte += 64) {
    uint32_t b[Shape::kOutputTiles][4];
#pragma unroll
    for (unsigned n = 0; n < Shape::kOutputTiles; n++) load_right<Shape>(b[n], w, n, byte);
#pragma unroll
    for (unsigned half = 0; half < 2; half++)
#pragma unroll
      for (unsigned m = 0; m < Shape::kRowTiles; m++) {
        uint32_t a[4];
        load_left<Shape>(a, x, m, byte + half * 32);
#pragma unroll
        for (unsigned n = 0; n < Shape::kOutputTiles; n++) add_product(T{}, sums[m][n], a, b[n][2 * half], b[n][2 * half + 1]);
      }
  }
}

// Calls `write(row, output, sum)` for each sum of the lane that is within the product.
template <class Shape, class Sum, class Write>
__device__ __forceinline__ void write_sums(const Sums<Shape, Sum>& sums, unsigned rows, unsigned outputs, Write write) {
  unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (unsigned m = 0; m < Shape::kRowTiles; m++)
#pragma unroll
    for (unsigned n = 0; n < Shape::kOutputTiles; n++)
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        unsigned row = Shape::first_row() + Shape::row() + m * 16 + lane / 4 + i / 2 * 8;
        unsigned output = Shape::first_output() + Shape::output() + n * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && output < outputs) write(row, output, sums[m][n][i]);
      }
}
