// Matrix products on tensor cores: for decode, where reading the weights is what takes the time and some tens of rows cost no more than
// one, and for prompts.
#include "matrix_tiles.cuh"
#include "product.cuh"

using FewRows = TileShape<1, 4, 1, 1, 128, 6>;
using SomeRows = TileShape<2, 2, 2, 4, 128, 4>;
using ManyRows = TileShape<2, 4, 4, 4, 64, 4>;

template <class Shape>
struct __align__(16) ProductStage {
  uint8_t x[Shape::kRows][Shape::kBytes + 16];
  uint8_t w[Shape::kOutputs][Shape::kBytes + 16];
};

template <class Shape, class T, class Out = T>
__device__ void multiply_tiles(const Product& params) {
  DYNAMIC_SHARED(ProductStage<Shape>, stages);
  unsigned row_bytes = params.inputs * sizeof(T);
  Operand x{params.x, params.rows, row_bytes}, w{params.w, params.outputs, row_bytes};
  Sums<Shape, float> sums = {};
  stream_stages<Shape::kStages>(
      (row_bytes + Shape::kBytes - 1) / Shape::kBytes,
      [&](unsigned stage, unsigned step) {
        load_rows<Shape::kThreads>(stages[stage].x, x, Shape::first_row(), step * Shape::kBytes);
        load_rows<Shape::kThreads>(stages[stage].w, w, Shape::first_output(), step * Shape::kBytes);
      },
      [&](unsigned stage, unsigned) { add_stage<Shape, T>(sums, stages[stage].x, stages[stage].w); });
  write_sums<Shape>(sums, params.rows, params.outputs, [&](unsigned row, unsigned output, float sum) {
    sum += params.bias ? widen(((const T*)params.bias)[output]) : 0.0f;
    Out* out = (Out*)params.out + size_t(row) * params.outputs + output;
    *out = narrow<Out>(params.adds ? widen(*out) + sum : sum);
  });
}

KERNEL(multiply_few_f16, FewRows::kThreads, Product) { multiply_tiles<FewRows, f16>(params); }
KERNEL(multiply_few_bf16, FewRows::kThreads, Product) { multiply_tiles<FewRows, bf16>(params); }
KERNEL(multiply_some_f16, SomeRows::kThreads, Product) { multiply_tiles<SomeRows, f16>(params); }
KERNEL(multiply_some_bf16, SomeRows::kThreads, Product) { multiply_tiles<SomeRows, bf16>(params); }
KERNEL(multiply_many_f16, ManyRows::kThreads, Product) { multiply_tiles<ManyRows, f16>(params); }
KERNEL(multiply_many_bf16, ManyRows::kThreads, Product) { multiply_tiles<ManyRows, bf16>(params); }

// Logits: what is chosen by them is not rounded once more. There are never many rows of them.
KERNEL(multiply_few_f16_to_f32, FewRows::kThreads, Product) { multiply_tiles<FewRows, f16, float>(params); }
KERNEL(multiply_few_bf16_to_f32, FewRows::kThreads, Product) { multiply_tiles<FewRows, bf16, float>(params); }
KERNEL(multiply_some_f16_to_f32, SomeRows::kThreads, Product) { multiply_tiles<SomeRows, f16, float>(params); }
KERNEL(multiply_some_bf16_to_f32, SomeRows::kThreads, Product) { multiply_tiles<SomeRows, bf16, float>(params); }
