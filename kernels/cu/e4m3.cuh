// E4M3, eight bits of floating point, by arithmetic on bits: for GPUs that have no instructions for it, and what the emulator has in
// the place of these. As in `src/reference/e4m3.rs`.
#pragma once

namespace by_bits {
__device__ __forceinline__ float e4m3_to_f32(uint8_t code) {
  uint32_t magnitude = code & 0x7f;
  if (magnitude == 0x7f) return __uint_as_float(0x7fffffff);
  // The exponent's bias is 7 there and 127 here; subnormal numbers are counted.
  float value = magnitude < 8 ? float(magnitude) * (1.0f / 512.0f) : __uint_as_float((magnitude << 20) + (120u << 23));
  return code & 0x80 ? -value : value;
}

// To the nearest, ties to even; 448 of what is beyond it, 0x7f of what is no number.
__device__ __forceinline__ uint8_t f32_to_e4m3(float value) {
  uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  if (0x7f800000 < magnitude) return 0x7f;
  // 448.
  magnitude = magnitude < 0x43e00000 ? magnitude : 0x43e00000;
  // Below 2^-6 the last bit of the sum is where that of a subnormal number is.
  uint32_t code = magnitude < 0x3c800000 ? __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000
                                         : ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  return uint8_t(code | (bits >> 24 & 0x80));
}
}  // namespace by_bits
