// Root mean square normalisation, with the sum that comes before it.
#include "device.cuh"

struct RmsNorm {
  void* out;           // [rows][width]; may be `state`
  void* state;         // [rows][width]
  const void* delta;   // [rows][width], added to `state` first and rounded to its type; or null
  const void* weight;  // [width]
  uint32_t width;
  float eps;
};

// One block per row. What is read twice comes from the cache the second time.
template <class T>
__device__ void rms_norm(const RmsNorm& params) {
  SHARED(PerWarp, partials);
  unsigned width = params.width;
  T* state = (T*)params.state + size_t(blockIdx.x) * width;
  T* out = (T*)params.out + size_t(blockIdx.x) * width;
  const T* delta = params.delta ? (const T*)params.delta + size_t(blockIdx.x) * width : nullptr;
  const T* weight = (const T*)params.weight;
  constexpr unsigned kPack = Pack<T>::kCount;
  bool packed = whole_packs<T>(width, state, out, delta, weight);
  float squares = 0.0f;
  if (packed) {
    for (unsigned i = threadIdx.x; i < width / kPack; i += blockDim.x) {
      Pack<T> x = ((Pack<T>*)state)[i];
      if (delta) {
        Pack<T> y = ((const Pack<T>*)delta)[i];
#pragma unroll
        for (unsigned e = 0; e < kPack; e++) x.elements[e] = narrow<T>(widen(x.elements[e]) + widen(y.elements[e]));
        ((Pack<T>*)state)[i] = x;
      }
#pragma unroll
      for (unsigned e = 0; e < kPack; e++) squares += widen(x.elements[e]) * widen(x.elements[e]);
    }
  } else {
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) {
      T x = state[i];
      if (delta) state[i] = x = narrow<T>(widen(x) + widen(delta[i]));
      squares += widen(x) * widen(x);
    }
  }
  float factor = 1.0f / sqrtf(block_sum(squares, partials) / float(width) + params.eps);
  auto scale = [&](T state, T weight) { return narrow<T>(widen(state) * factor * widen(weight)); };
  // Each thread reads what it wrote itself.
  if (packed) {
    for (unsigned i = threadIdx.x; i < width / kPack; i += blockDim.x) {
      Pack<T> x = ((Pack<T>*)state)[i], w = ((const Pack<T>*)weight)[i];
#pragma unroll
    for (unsigned e = 0; e < kPack; e++) x.elements[e] = scale(x.elements[e], w.elements[e]);
      ((Pack<T>*)out)[i] = x;
    }
  } else {
    for (unsigned i = threadIdx.x; i < width; i += blockDim.x) out[i] = scale(state[i], weight[i]);
  }
}

KERNEL(rms_norm_f32, 1024, RmsNorm) { rms_norm<float>(params); }
KERNEL(rms_norm_f16, 1024, RmsNorm) { rms_norm<f16>(params); }
KERNEL(rms_norm_bf16, 1024, RmsNorm) { rms_norm<bf16>(params); }
