// The functions of `instructions.cuh` without a GPU: the same bits, and the same ways to go wrong.
#pragma once

#include "cuda.h"

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

inline void copy_async_16(void* shared, const void* global, unsigned taken = 16) {
  ::emulator::begin_copy(shared, global, 16, taken);
}

inline void commit_copies() { ::emulator::commit_copies(); }

template <int kLeft>
inline void wait_for_copies() {
  ::emulator::wait_for_copies(kLeft);
}
