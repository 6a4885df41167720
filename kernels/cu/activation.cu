// The gate of the feed-forward part.
#include "device.cuh"

struct SiluMul {
  void* out;         // [rows][width]
  const void* gate;  // [rows][stride], of which `width` count
  const void* up;    // likewise
  uint32_t width;
  uint32_t stride;
};

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Rows along y, elements along x.
template <class T>
__device__ void silu_mul(const SiluMul& params) {
  T* out = (T*)params.out + size_t(blockIdx.y) * params.width;
  const T* gate = (const T*)params.gate + size_t(blockIdx.y) * params.stride;
  const T* up = (const T*)params.up + size_t(blockIdx.y) * params.stride;
  unsigned first = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
  constexpr unsigned kPack = Pack<T>::kCount;
  if (whole_packs<T>(params.width, out, gate, up)) {
    for (unsigned i = first; i < params.width / kPack; i += all) {
      Pack<T> x = ((const Pack<T>*)gate)[i], y = ((const Pack<T>*)up)[i];
#pragma unroll
    for (unsigned e = 0; e < kPack; e++) x.elements[e] = narrow<T>(silu(widen(x.elements[e])) * widen(y.elements[e]));
      ((Pack<T>*)out)[i] = x;
    }
    return;
  }
  for (unsigned i = first; i < params.width; i += all) out[i] = narrow<T>(silu(widen(gate[i])) * widen(up[i]));
}

KERNEL(silu_mul_f32, 256, SiluMul) { silu_mul<float>(params); }
KERNEL(silu_mul_f16, 256, SiluMul) { silu_mul<f16>(params); }
KERNEL(silu_mul_bf16, 256, SiluMul) { silu_mul<bf16>(params); }
