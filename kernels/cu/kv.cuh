// The paged KV cache as kernels see it: block addresses and distances, as in `src/kv.rs`.
#pragma once

#include "device.cuh"

enum KvDtype : uint32_t { kKvF32, kKvF16, kKvBf16, kKvInt8, kKvFp8 };
enum KvPart : uint32_t { kKey, kValue };

// Distances in bytes.
struct KvShape {
  uint32_t dtype;
  uint32_t block_len;
  uint32_t kv_heads;
  uint32_t head_size;
  uint32_t layer_stride;
  uint32_t value_offset;
  uint32_t key_scale_offset;
  uint32_t value_scale_offset;
  uint32_t token_stride;
  uint32_t head_stride;
  uint32_t scale_token_stride;
  uint32_t scale_head_stride;
};

// Whether rows of elements carry a scale.
__device__ __forceinline__ bool kv_has_scales(uint32_t dtype) { return dtype == kKvInt8 || dtype == kKvFp8; }

// The elements of one token and head.
struct KvRow {
  uint8_t* data;
  float* scale;  // Null for types without.
};

__device__ __forceinline__ KvRow kv_row(const KvShape& shape, uint8_t* block, unsigned layer, KvPart part, unsigned token,
                                        unsigned head) {
  uint8_t* first = block + size_t(layer) * shape.layer_stride;
  KvRow row;
  row.data = first + (part == kValue ? shape.value_offset : 0) + token * shape.token_stride + head * shape.head_stride;
  uint8_t* scales = first + (part == kValue ? shape.value_scale_offset : shape.key_scale_offset);
  row.scale = kv_has_scales(shape.dtype) ? (float*)(scales + token * shape.scale_token_stride + head * shape.scale_head_stride) : nullptr;
  return row;
}

__device__ __forceinline__ unsigned kv_element_bytes(const KvShape& shape) {
  return shape.dtype == kKvF32 ? 4 : kv_has_scales(shape.dtype) ? 1 : 2;
}

__device__ __forceinline__ unsigned kv_row_bytes(const KvShape& shape) { return shape.head_size * kv_element_bytes(shape); }

// One element of a row; `scale` is that of the row, or 1.
__device__ __forceinline__ float kv_read(uint32_t dtype, const uint8_t* data, size_t element, float scale) {
  switch (dtype) {
    case kKvF32:
      return ((const float*)data)[element];
    case kKvF16:
      return widen(((const f16*)data)[element]);
    case kKvBf16:
      return widen(((const bf16*)data)[element]);
    case kKvInt8:
      return scale * float(((const int8_t*)data)[element]);
    default: {
      float pair[2];
      e4m3_to_f32(pair, data[element]);
      return scale * pair[0];
    }
  }
}

// One element of a type without scales.
__device__ __forceinline__ void kv_write(uint32_t dtype, uint8_t* data, size_t element, float value) {
  switch (dtype) {
    case kKvF32:
      ((float*)data)[element] = value;
      break;
    case kKvF16:
      ((f16*)data)[element] = narrow<f16>(value);
      break;
    default:
      ((bf16*)data)[element] = narrow<bf16>(value);
  }
}

// Steps of `scale`, as in `src/reference/kv.rs`.
__device__ __forceinline__ int8_t quantize(float value, float scale) {
  if (scale == 0.0f) return 0;
  // The inverse of a subnormal number may be infinite.
  float steps = scale < 1.17549435e-38f ? value / scale : value * (1.0f / scale);
  if (!(steps == steps)) return 0;
  steps = rintf(steps);
  return int8_t(steps < -127.0f ? -127.0f : 127.0f < steps ? 127.0f : steps);
}

// The least power of two in whose units the greatest magnitude of a row rounds to 448 or less, but 2^-117 or more. 464, from which on it does
// not, is 1.8125 * 2^8: a greater fraction takes the next power.
__device__ __forceinline__ float e4m3_scale(float greatest) {
  uint32_t power = (__float_as_uint(greatest) + 0x17ffff) >> 23;
  return __uint_as_float((power < 18 ? 10 : power - 8) << 23);
}

// Of a power of two that is no subnormal number, nor is its inverse.
__device__ __forceinline__ float inverse_power(float power) { return __uint_as_float((254u << 23) - __float_as_uint(power)); }

// A warp writes a row: `value(element)` for each of its elements, which is asked for twice where there is a scale.
template <class Value>
__device__ __forceinline__ void kv_write_row(const KvShape& shape, const KvRow& row, Value value) {
  unsigned lane = threadIdx.x % kWarp;
  float scale = 1.0f;
  if (kv_has_scales(shape.dtype)) {
    float greatest = 0.0f;
    for (unsigned i = lane; i < shape.head_size; i += kWarp) greatest = fmaxf(greatest, fabsf(value(i)));
    greatest = warp_max(greatest);
    scale = shape.dtype == kKvInt8 ? greatest / 127.0f : e4m3_scale(greatest);
    if (lane == 0) *row.scale = scale;
  }
  for (unsigned i = lane; i < shape.head_size; i += kWarp) {
    switch (shape.dtype) {
      case kKvInt8:
        ((int8_t*)row.data)[i] = quantize(value(i), scale);
        break;
      case kKvFp8:
        row.data[i] = uint8_t(f32_to_e4m3(value(i) * inverse_power(scale), 0.0f));
        break;
      default:
        kv_write(shape.dtype, row.data, i, value(i));
    }
  }
}
