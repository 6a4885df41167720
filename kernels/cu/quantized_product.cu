// Matrix products with rows of int8 and weights of int8 or int4, and with rows and weights of E4M3, on tensor cores. Whole numbers are added
// without rounding, and scaled once for each group of inputs that share a scale. What comes out is what `src/reference/quantized.rs` says.
#include "kv.cuh"
#include "matrix_tiles.cuh"

struct QuantizeRows {
  uint8_t* steps;  // [rows][padded]: int8, or codes of E4M3
  float* scales;   // [rows]
  const void* x;   // [rows][width]
  uint32_t width;
  uint32_t padded;  // what is beyond `width` becomes zero
};

__device__ __forceinline__ float scale_of(int8_t, float greatest) { return greatest / 127.0f; }
__device__ __forceinline__ float scale_of(e4m3, float greatest) { return e4m3_scale(greatest); }
__device__ __forceinline__ uint8_t step_of(int8_t, float value, float scale) { return uint8_t(quantize(value, scale)); }
__device__ __forceinline__ uint8_t step_of(e4m3, float value, float scale) {
  return uint8_t(f32_to_e4m3(value * inverse_power(scale), 0.0f));
}

// One block per row.
template <class T, class Step>
__device__ void quantize_rows(const QuantizeRows& params) {
  SHARED(PerWarp, partials);
  const T* x = (const T*)params.x + size_t(blockIdx.x) * params.width;
  uint8_t* steps = params.steps + size_t(blockIdx.x) * params.padded;
  float greatest = 0.0f;
  for (unsigned i = threadIdx.x; i < params.width; i += blockDim.x) greatest = fmaxf(greatest, fabsf(widen(x[i])));
  float scale = scale_of(Step{}, block_max(greatest, partials));
  if (threadIdx.x == 0) params.scales[blockIdx.x] = scale;
  for (unsigned i = threadIdx.x; i < params.padded; i += blockDim.x) steps[i] = i < params.width ? step_of(Step{}, widen(x[i]), scale) : 0;
}

KERNEL(quantize_rows_f32, 256, QuantizeRows) { quantize_rows<float, int8_t>(params); }
KERNEL(quantize_rows_f16, 256, QuantizeRows) { quantize_rows<f16, int8_t>(params); }
KERNEL(quantize_rows_bf16, 256, QuantizeRows) { quantize_rows<bf16, int8_t>(params); }
KERNEL(quantize_rows_f32_to_e4m3, 256, QuantizeRows) { quantize_rows<float, e4m3>(params); }
KERNEL(quantize_rows_f16_to_e4m3, 256, QuantizeRows) { quantize_rows<f16, e4m3>(params); }
KERNEL(quantize_rows_bf16_to_e4m3, 256, QuantizeRows) { quantize_rows<bf16, e4m3>(params); }

struct QuantizedProduct {
  void* out;              // [rows][outputs], of the type `out_dtype`
  const void* x;          // [rows][inputs]: int8, or codes of E4M3
  const float* x_scales;  // [rows]
  const void* w;          // [outputs][inputs]: int8, codes of E4M3, or int4 as `add_int4_stage` says
  const void* w_scales;   // int8 and E4M3: f32, [outputs]; int4: bf16, [inputs / group][scale_stride]
  const void* bias;       // [outputs] of the type `bias_dtype`, or null
  uint32_t rows;
  uint32_t inputs;        // a multiple of 128
  uint32_t outputs;
  uint32_t group;         // inputs of int4 that share a scale: 32, 64 or 128
  uint32_t scale_stride;  // a multiple of 8
  uint32_t out_dtype;     // a KvDtype without scales
  uint32_t bias_dtype;    // likewise
  uint32_t adds;          // whether to add to what `out` has
};

__device__ __forceinline__ void write_scaled(const QuantizedProduct& params, unsigned row, unsigned output, float sum) {
  float value = sum * params.x_scales[row];
  if (params.bias) value += kv_read(params.bias_dtype, (const uint8_t*)params.bias, output, 1.0f);
  size_t index = size_t(row) * params.outputs + output;
  if (params.adds) value += kv_read(params.out_dtype, (const uint8_t*)params.out, index, 1.0f);
  kv_write(params.out_dtype, (uint8_t*)params.out, index, value);
}

template <class Shape>
struct __align__(16) BytesStage {
  uint8_t x[Shape::kRows][Shape::kBytes + 16];
  uint8_t w[Shape::kOutputs][Shape::kBytes + 16];
};

// Rows and weights of one byte: `Step` is int8_t, whose sums are whole numbers, or e4m3.
template <class Shape, class Step, class Sum>
__device__ void multiply_bytes(const QuantizedProduct& params) {
  DYNAMIC_SHARED(BytesStage<Shape>, stages);
  Operand x{params.x, params.rows, params.inputs}, w{params.w, params.outputs, params.inputs};
  Sums<Shape, Sum> sums = {};
  stream_stages<Shape::kStages>(
      params.inputs / Shape::kBytes,
      [&](unsigned stage, unsigned step) {
        load_rows<Shape::kThreads>(stages[stage].x, x, Shape::first_row(), step * Shape::kBytes);
        load_rows<Shape::kThreads>(stages[stage].w, w, Shape::first_output(), step * Shape::kBytes);
      },
      [&](unsigned stage, unsigned) { add_stage<Shape, Step>(sums, stages[stage].x, stages[stage].w); });
  write_sums<Shape>(sums, params.rows, params.outputs, [&](unsigned row, unsigned output, Sum sum) {
    write_scaled(params, row, output, float(sum) * ((const float*)params.w_scales)[output]);
  });
}

// Inputs of a stage of int4, which has whole groups, and groups of the smallest kind in it.
constexpr unsigned kInt4Inputs = 128, kInt4Groups = kInt4Inputs / 32;

template <class Shape>
struct __align__(16) Int4Stage {
  uint8_t x[Shape::kRows][Shape::kBytes + 16];
  uint8_t w[Shape::kOutputs][kInt4Inputs / 2 + 16];
  uint8_t scales[kInt4Groups][Shape::kOutputs * 2 + 16];
};

// Sixteen bytes of an output's weights have 32 inputs: byte i has input i in its low half and input i + 16 in its high one. So a lane's four
// bytes have all that it needs for one product, as the high halves of bytes: steps times 16, which the scale takes back.
template <class Shape>
__device__ __forceinline__ void add_int4_stage(Sums<Shape, float>& sums, Sums<Shape, int32_t>& products, const Int4Stage<Shape>& stage,
                                               unsigned group) {
  uint32_t w[Shape::kOutputTiles][4];
#pragma unroll
  for (unsigned n = 0; n < Shape::kOutputTiles; n++) load_right<Shape>(w[n], stage.w, n, 0);
#pragma unroll
  for (unsigned part = 0; part < kInt4Groups; part++) {
#pragma unroll
    for (unsigned m = 0; m < Shape::kRowTiles; m++) {
      uint32_t a[4];
      load_left<Shape>(a, stage.x, m, part * 32);
#pragma unroll
      for (unsigned n = 0; n < Shape::kOutputTiles; n++)
        add_product(int8_t{}, products[m][n], a, w[n][part] << 4 & 0xf0f0f0f0, w[n][part] & 0xf0f0f0f0);
    }
    if ((part + 1) * 32 % group != 0) continue;
    // The end of a group.
#pragma unroll
    for (unsigned n = 0; n < Shape::kOutputTiles; n++) {
      const bf16* scales = (const bf16*)stage.scales[part * 32 / group] + Shape::output() + n * 8 + threadIdx.x % 4 * 2;
      float scale[2] = {widen(scales[0]) / 16.0f, widen(scales[1]) / 16.0f};
#pragma unroll
      for (unsigned m = 0; m < Shape::kRowTiles; m++)
#pragma unroll
        for (unsigned i = 0; i < 4; i++) sums[m][n][i] += float(products[m][n][i]) * scale[i % 2], products[m][n][i] = 0;
    }
  }
}

template <class Shape>
__device__ void multiply_int4(const QuantizedProduct& params) {
  static_assert(Shape::kBytes == kInt4Inputs, "a stage has whole groups");
  DYNAMIC_SHARED(Int4Stage<Shape>, stages);
  Operand x{params.x, params.rows, params.inputs}, w{params.w, params.outputs, params.inputs / 2};
  unsigned groups = kInt4Inputs / params.group;
  Sums<Shape, float> sums = {};
  Sums<Shape, int32_t> products = {};
  stream_stages<Shape::kStages>(
      params.inputs / kInt4Inputs,
      [&](unsigned stage, unsigned step) {
        load_rows<Shape::kThreads>(stages[stage].x, x, Shape::first_row(), step * kInt4Inputs);
        load_rows<Shape::kThreads>(stages[stage].w, w, Shape::first_output(), step * kInt4Inputs / 2);
        Operand scales{params.w_scales, (step + 1) * groups, params.scale_stride * 2};
        load_rows<Shape::kThreads>(stages[stage].scales, scales, step * groups, Shape::first_output() * 2);
      },
      [&](unsigned stage, unsigned) { add_int4_stage<Shape>(sums, products, stages[stage], params.group); });
  write_sums<Shape>(sums, params.rows, params.outputs,
                    [&](unsigned row, unsigned output, float sum) { write_scaled(params, row, output, sum); });
}

using FewRowsOfBytes = TileShape<1, 4, 1, 1, 128, 6>;
using SomeRowsOfBytes = TileShape<2, 2, 2, 4, 128, 4>;
using ManyRowsOfBytes = TileShape<2, 4, 4, 4, 64, 4>;
// Fewer bytes of weights in a stage, so more stages are needed to have as much in flight.
using FewRowsInt4 = TileShape<1, 4, 1, 1, kInt4Inputs, 10>;
using SomeRowsInt4 = TileShape<2, 2, 2, 4, kInt4Inputs, 4>;
using ManyRowsInt4 = TileShape<2, 4, 4, 4, kInt4Inputs, 3>;

KERNEL(multiply_few_int8, FewRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<FewRowsOfBytes, int8_t, int32_t>(params); }
KERNEL(multiply_some_int8, SomeRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<SomeRowsOfBytes, int8_t, int32_t>(params); }
KERNEL(multiply_many_int8, ManyRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<ManyRowsOfBytes, int8_t, int32_t>(params); }
KERNEL(multiply_few_e4m3, FewRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<FewRowsOfBytes, e4m3, float>(params); }
KERNEL(multiply_some_e4m3, SomeRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<SomeRowsOfBytes, e4m3, float>(params); }
KERNEL(multiply_many_e4m3, ManyRowsOfBytes::kThreads, QuantizedProduct) { multiply_bytes<ManyRowsOfBytes, e4m3, float>(params); }
KERNEL(multiply_few_int4, FewRowsInt4::kThreads, QuantizedProduct) { multiply_int4<FewRowsInt4>(params); }
KERNEL(multiply_some_int4, SomeRowsInt4::kThreads, QuantizedProduct) { multiply_int4<SomeRowsInt4>(params); }
KERNEL(multiply_many_int4, ManyRowsInt4::kThreads, QuantizedProduct) { multiply_int4<ManyRowsInt4>(params); }
