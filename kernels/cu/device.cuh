// What all kernels share: the words of the language, element types, and sums over a warp and a block.
//
// Three compilers read these files: nvcc, NVRTC, and the C++ compiler of a machine without a GPU (`emulator/`). So there is no
// header of the CUDA toolkit, a kernel takes one structure (the same as in `src/cuda/params.rs`), shared memory is declared by
// SHARED and DYNAMIC_SHARED, and what C++ cannot say is in `instructions.cuh`.
#pragma once

#if defined(TIDEMILL_EMULATOR)
#include "emulator/cuda.h"
#else
#if defined(__CUDACC_RTC__)
using uint8_t = unsigned char;
using int8_t = signed char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int32_t = int;
using uint64_t = unsigned long long;
using size_t = decltype(sizeof(0));
#else
#include <cstdint>
#endif
#define KERNEL(NAME, MAX_THREADS, PARAMS) \
  extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) NAME(const __grid_constant__ PARAMS params)
#define SHARED(TYPE, NAME) __shared__ TYPE NAME
#define DYNAMIC_SHARED(TYPE, NAME)                          \
  extern __shared__ __align__(1024) unsigned char dynamic_shared[]; \
  TYPE* NAME = (TYPE*)dynamic_shared
#endif

#include "instructions.cuh"

constexpr unsigned kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// ---- Elements -------------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return f16_to_f32(x.bits); }

// To the nearest, ties to even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {f32_to_bf16(x)};
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) {
  return {f32_to_f16(x)};
}

// As many elements as one access of 16 bytes moves.
template <class T>
struct __align__(16) Pack {
  static constexpr unsigned kCount = 16 / sizeof(T);
  T elements[kCount];
};

// Whether rows of `width` elements that begin at these addresses are whole packs.
template <class T, class... Pointers>
__device__ __forceinline__ bool whole_packs(unsigned width, Pointers... rows) {
  uint64_t bits = uint64_t(width) * sizeof(T);
  ((bits |= uint64_t(rows)), ...);
  return bits % 16 == 0;
}

// ---- Sums, in one fixed order ------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
  for (unsigned distance = kWarp / 2; 0 < distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (unsigned distance = kWarp / 2; 0 < distance; distance /= 2) {
    float other = __shfl_xor_sync(kAllLanes, x, distance);
    x = x < other ? other : x;
  }
  return x;
}

using PerWarp = float[kWarp];

// Every thread of a block of one dimension gets the sum. `partials` may be used again after a barrier.
__device__ __forceinline__ float block_sum(float x, PerWarp& partials) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = x;
  __syncthreads();
  unsigned lane = threadIdx.x % kWarp;
  return warp_sum(lane < blockDim.x / kWarp ? partials[lane] : 0.0f);
}

__device__ __forceinline__ float block_max(float x, PerWarp& partials) {
  x = warp_max(x);
  if (threadIdx.x % kWarp == 0) partials[threadIdx.x / kWarp] = x;
  __syncthreads();
  unsigned lane = threadIdx.x % kWarp;
  return warp_max(lane < blockDim.x / kWarp ? partials[lane] : -infinity());
}
