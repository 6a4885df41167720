// The functions of `instructions.cuh` without a GPU: the same bits, and the same ways to go wrong.
#pragma once

#include "cuda.h"

#include "../e4m3.cuh"

inline float f16_to_f32(uint16_t x) {
  uint32_t magnitude = uint32_t(x & 0x7fff) << 13;
  // The exponent's bias is 15 there and 127 here; the product is exact for subnormal numbers too.
  float wide = __uint_as_float(magnitude) * 0x1p112f;
  uint32_t bits = (x & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : __float_as_uint(wide);
  return __uint_as_float(bits | uint32_t(x & 0x8000) << 16);
}

inline uint16_t f32_to_f16(float x) {
  uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  if (0x7f800000 < magnitude) return 0x7fff;
  uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (__float_as_uint(65520.0f) <= magnitude) return sign | 0x7c00;
  if (magnitude < __float_as_uint(0x1p-14f))
    // The sum has its last bit where the last bit of a subnormal number is.
    return sign | uint16_t(__float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f));
  uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return sign | uint16_t((rounded - (112u << 23)) >> 13);
}

inline uint16_t f32_to_bf16(float x) {
  uint32_t bits = __float_as_uint(x);
  if (0x7f800000 < (bits & 0x7fffffff)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void e4m3_to_f32(float (&wide)[2], uint16_t codes) {
  for (unsigned half = 0; half < 2; half++) wide[half] = by_bits::e4m3_to_f32(uint8_t(codes >> (8 * half)));
}

inline uint16_t f32_to_e4m3(float low, float high) {
  return uint16_t(by_bits::f32_to_e4m3(low) | by_bits::f32_to_e4m3(high) << 8);
}

inline void copy_async_16(void* shared, const void* global, unsigned taken = 16) {
  ::emulator::begin_copy(shared, global, 16, taken);
}

template <int kBytes>
inline void copy_async(void* shared, const void* global) {
  ::emulator::begin_copy(shared, global, kBytes, kBytes);
}

inline void commit_copies() { ::emulator::commit_copies(); }

template <int kLeft>
inline void wait_for_copies() {
  ::emulator::wait_for_copies(kLeft);
}

namespace emulator {
// The rows that the lanes name.
UNWATCHED inline void meet_with_rows(const uint16_t* (&rows)[32], const void* mine) {
  const uint64_t* brought = meet_warp(~0u, uintptr_t(mine), false);
  for (unsigned lane = 0; lane < 32; lane++) rows[lane] = (const uint16_t*)brought[lane];
}

// Of each matrix, the two elements that `pick` takes from its rows. These accesses are looked at.
template <class Pick>
inline void load_matrices(uint32_t (&to)[4], const void* row, Pick pick) {
  if (uintptr_t(row) % 16 != 0) fail("a row of a matrix is misaligned");
  const uint16_t* rows[32];
  meet_with_rows(rows, row);
  for (unsigned matrix = 0; matrix < 4; matrix++) to[matrix] = pick(rows + 8 * matrix, lane() / 4, lane() % 4);
}

inline float half_of(uint32_t pair, unsigned half, bool is_bf16) {
  uint16_t bits = uint16_t(pair >> (16 * half));
  return is_bf16 ? __uint_as_float(uint32_t(bits) << 16) : f16_to_f32(bits);
}

// A device does not say in which order it adds, nor how it rounds on the way; this one rounds the exact sum.
UNWATCHED inline void add_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16) {
  const Fragment* all = meet_fragments({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double exact = sum[i];
    for (unsigned k = 0; k < 16; k++) {
      const Fragment& left = all[row % 8 * 4 + k % 8 / 2];
      const Fragment& right = all[column * 4 + k % 8 / 2];
      exact += double(half_of(left.a[row / 8 + k / 8 * 2], k % 2, is_bf16)) * half_of(right.b[k / 8], k % 2, is_bf16);
    }
    sum[i] = float(exact);
  }
}

UNWATCHED inline float e4m3_of(uint32_t word, unsigned byte) { return by_bits::e4m3_to_f32(uint8_t(word >> (8 * byte))); }

UNWATCHED inline void add_product_of_e4m3(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragment* all = meet_fragments({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double exact = sum[i];
    for (unsigned k = 0; k < 32; k++) {
      const Fragment& left = all[row % 8 * 4 + k % 16 / 4];
      const Fragment& right = all[column * 4 + k % 16 / 4];
      exact += double(e4m3_of(left.a[row / 8 + k / 16 * 2], k % 4)) * e4m3_of(right.b[k / 16], k % 4);
    }
    sum[i] = float(exact);
  }
}

UNWATCHED inline int32_t byte_of(uint32_t word, unsigned byte) { return int8_t(word >> (8 * byte)); }

UNWATCHED inline void add_product(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Fragment* all = meet_fragments({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  for (unsigned i = 0; i < 4; i++) {
    unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 32; k++) {
      const Fragment& left = all[row % 8 * 4 + k % 16 / 4];
      const Fragment& right = all[column * 4 + k % 16 / 4];
      sum[i] += byte_of(left.a[row / 8 + k / 16 * 2], k % 4) * byte_of(right.b[k / 16], k % 4);
    }
  }
}
}  // namespace emulator

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  ::emulator::load_matrices(to, row, [](const uint16_t* const* rows, unsigned g, unsigned t) {
    return rows[g][2 * t] | uint32_t(rows[g][2 * t + 1]) << 16;
  });
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  ::emulator::load_matrices(to, row, [](const uint16_t* const* rows, unsigned g, unsigned t) {
    return rows[2 * t][g] | uint32_t(rows[2 * t + 1][g]) << 16;
  });
}

inline void add_product_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::emulator::add_product(sum, a, b0, b1, true);
}
inline void add_product_f16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::emulator::add_product(sum, a, b0, b1, false);
}
inline void add_product_int8(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::emulator::add_product(sum, a, b0, b1);
}
inline void add_product_e4m3(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::emulator::add_product_of_e4m3(sum, a, b0, b1);
}
