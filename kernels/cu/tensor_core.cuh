// What the kernels on tensor cores share.
#pragma once

#include "device.cuh"

// Elements of 16 bytes: what one asynchronous copy moves, and a row of a matrix that `load_matrices` takes.
constexpr unsigned kChunk = 8;

// As `add_product_bf16`, of either type.
__device__ __forceinline__ void add_product(bf16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_product_bf16(sum, a, b0, b1);
}
__device__ __forceinline__ void add_product(f16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_product_f16(sum, a, b0, b1);
}

// As `add_product_int8`.
__device__ __forceinline__ void add_product(int8_t, int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_product_int8(sum, a, b0, b1);
}

// As `add_product_e4m3`.
__device__ __forceinline__ void add_product(e4m3, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  add_product_e4m3(sum, a, b0, b1);
}

// Two numbers as a register has them.
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
}

// The sums of a row that a lane has, of columns 2t and 2t + 1 of four times eight, become those of eight columns: the ones of number t.
__device__ __forceinline__ void exchange_in_fours(uint32_t (&words)[4]) {
  unsigned t = threadIdx.x % 4;
#pragma unroll
  for (unsigned bit = 1; bit <= 2; bit *= 2) {
    bool upper = t & bit;
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
      if (i & bit) continue;
      uint32_t other = __shfl_xor_sync(kAllLanes, upper ? words[i] : words[i | bit], bit);
      words[i] = upper ? other : words[i];
      words[i | bit] = upper ? words[i | bit] : other;
    }
  }
}
