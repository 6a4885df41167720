// Matrix products of few rows, as decode has them: bound by reading the weights, which is done once for every eight rows.
#include "product.cuh"

// A warp for each output along x, rows along y. The order of a row's sum depends on the number of inputs alone.
template <class T, unsigned kRows, class Out = T>
__device__ void multiply(const Product& params) {
  unsigned lane = threadIdx.x % kWarp, output = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (params.outputs <= output) return;
  unsigned inputs = params.inputs, first = blockIdx.y * kRows, rows = min(kRows, params.rows - first);
  const T* w = (const T*)params.w + size_t(output) * inputs;
  const T* x = (const T*)params.x + size_t(first) * inputs;
  float sums[kRows] = {};
  constexpr unsigned kPack = Pack<T>::kCount;
  if (whole_packs<T>(inputs, w, x)) {
    for (unsigned i = lane; i < inputs / kPack; i += kWarp) {
      Pack<T> weights = ((const Pack<T>*)w)[i];
#pragma unroll
      for (unsigned row = 0; row < kRows; row++) {
        if (rows <= row) break;
        Pack<T> values = ((const Pack<T>*)(x + size_t(row) * inputs))[i];
#pragma unroll
        for (unsigned e = 0; e < kPack; e++) sums[row] += widen(values.elements[e]) * widen(weights.elements[e]);
      }
    }
  } else {
    for (unsigned i = lane; i < inputs; i += kWarp) {
      float weight = widen(w[i]);
#pragma unroll
      for (unsigned row = 0; row < kRows; row++)
        if (row < rows) sums[row] += widen(x[size_t(row) * inputs + i]) * weight;
    }
  }
  float bias = params.bias ? widen(((const T*)params.bias)[output]) : 0.0f;
#pragma unroll
  for (unsigned row = 0; row < kRows; row++) {
    float sum = warp_sum(sums[row]) + bias;
    if (lane != 0 || rows <= row) continue;
    Out* out = (Out*)params.out + size_t(first + row) * params.outputs + output;
    *out = narrow<Out>(params.adds ? widen(*out) + sum : sum);
  }
}

KERNEL(multiply_row_f32, 128, Product) { multiply<float, 1>(params); }
KERNEL(multiply_row_f16, 128, Product) { multiply<f16, 1>(params); }
KERNEL(multiply_row_bf16, 128, Product) { multiply<bf16, 1>(params); }
KERNEL(multiply_rows_f32, 128, Product) { multiply<float, 8>(params); }
KERNEL(multiply_rows_f16, 128, Product) { multiply<f16, 8>(params); }
KERNEL(multiply_rows_bf16, 128, Product) { multiply<bf16, 8>(params); }

// Logits: what is chosen by them is not rounded once more.
KERNEL(multiply_row_f16_to_f32, 128, Product) { multiply<f16, 1, float>(params); }
KERNEL(multiply_row_bf16_to_f32, 128, Product) { multiply<bf16, 1, float>(params); }
KERNEL(multiply_rows_f16_to_f32, 128, Product) { multiply<f16, 8, float>(params); }
KERNEL(multiply_rows_bf16_to_f32, 128, Product) { multiply<bf16, 8, float>(params); }
