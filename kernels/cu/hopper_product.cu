// Matrix products of many rows on Hopper: tiles come to shared memory by themselves, and a warpgroup multiplies them there.
//
// A block has one warpgroup that asks for tiles, stage by stage in a ring, and two that multiply 64 rows each. It goes on from tile to
// tile of the result, so that stages of the next one come while a result is written. Inputs are added in their order, 16 at a time, whatever the
// number of rows and outputs: a row's sum depends on nothing but the row.
#include "hopper.cuh"
#include "product.cuh"
#include "tensor_core.cuh"

struct HopperProduct {
  TensorMap x;  // rows of `x`, `kWideRows` in a tile
  TensorMap w;  // rows of `w`, as many in a tile as it has outputs
  Product product;
  uint32_t reserved[20];
};

constexpr unsigned kWideRows = 128, kWideThreads = 384, kStageInputs = 64, kMultipliers = 2;
// Tiles of rows that are computed with the same outputs before others are: what they read stays in the cache.
constexpr unsigned kBandTiles = 16;

template <unsigned kOutputs>
struct __align__(1024) WideStage {
  uint16_t x[kWideRows][kStageInputs];
  uint16_t w[kOutputs][kStageInputs];
};

template <unsigned kOutputs, unsigned kStages>
struct WideMemory {
  WideStage<kOutputs> stages[kStages];
  Barrier full[kStages], empty[kStages];
};

// Which rows and outputs a tile of the result has: bands of some tiles of rows, in each of them output after output.
struct WideTile {
  unsigned first_row, first_output;
};

template <unsigned kOutputs>
__device__ __forceinline__ WideTile wide_tile(unsigned number, unsigned row_tiles, unsigned output_tiles) {
  unsigned band = number / (kBandTiles * output_tiles), within = number % (kBandTiles * output_tiles);
  unsigned rows = min(kBandTiles, row_tiles - band * kBandTiles);
  return {(band * kBandTiles + within % rows) * kWideRows, within / rows * kOutputs};
}

template <class T, unsigned kOutputs>
__device__ __forceinline__ void write_tile(const Product& params, const float (&sums)[kOutputs / 2], unsigned first_row,
                                           unsigned first_output) {
  unsigned lane = threadIdx.x % kWarp, t = lane % 4, row = first_row + threadIdx.x % 128 / kWarp * 16 + lane / 4;
  const T* bias = (const T*)params.bias;
  auto sum_of = [&](unsigned i, unsigned output) { return sums[i] + (bias ? widen(bias[output]) : 0.0f); };
  T* out = (T*)params.out;
  if (whole_packs<T>(params.outputs, out)) {
#pragma unroll
    for (unsigned four = 0; four < kOutputs / 32; four++)
#pragma unroll
      for (unsigned half = 0; half < 2; half++) {
        unsigned of_half = row + half * 8, eight = first_output + (four * 4 + t) * 8;
        bool is_there = of_half < params.rows && eight < params.outputs;
        uint4* to = (uint4*)(out + (is_there ? size_t(of_half) * params.outputs + eight : 0));
        uint32_t words[4] = {};
        if (params.adds) {
          uint4 before = is_there ? *to : uint4{0, 0, 0, 0};
          words[0] = before.x, words[1] = before.y, words[2] = before.z, words[3] = before.w;
          exchange_in_fours(words);
        }
#pragma unroll
        for (unsigned n = 0; n < 4; n++) {
          unsigned i = (four * 4 + n) * 4 + half * 2, output = first_output + (four * 4 + n) * 8 + 2 * t;
          float low = output < params.outputs ? sum_of(i, output) : 0.0f, high = output < params.outputs ? sum_of(i + 1, output + 1) : 0.0f;
          if (params.adds) low = widen(T{uint16_t(words[n])}) + low, high = widen(T{uint16_t(words[n] >> 16)}) + high;
          words[n] = pair<T>(low, high);
        }
        exchange_in_fours(words);
        if (is_there) *to = uint4{words[0], words[1], words[2], words[3]};
      }
    return;
  }
#pragma unroll
  for (unsigned i = 0; i < kOutputs / 2; i++) {
    unsigned of_half = row + i / 2 % 2 * 8, output = first_output + i / 4 * 8 + 2 * t + i % 2;
    if (params.rows <= of_half || params.outputs <= output) continue;
    T* to = out + size_t(of_half) * params.outputs + output;
    float sum = sum_of(i, output);
    *to = narrow<T>(params.adds ? widen(*to) + sum : sum);
  }
}

template <class T, unsigned kOutputs, unsigned kStages>
__device__ void multiply_wide(const HopperProduct& params) {
  using Memory = WideMemory<kOutputs, kStages>;
  DYNAMIC_SHARED(Memory, memory);
  const Product& product = params.product;
  unsigned thread = threadIdx.x, steps = (product.inputs + kStageInputs - 1) / kStageInputs;
  unsigned row_tiles = (product.rows + kWideRows - 1) / kWideRows, output_tiles = (product.outputs + kOutputs - 1) / kOutputs;
  if (thread == 0) {
    for (unsigned stage = 0; stage < kStages; stage++) {
      make_barrier(&memory->full[stage], 1);
      // From each warp that multiplies.
      make_barrier(&memory->empty[stage], kMultipliers * 4);
    }
    make_barriers_known();
  }
  __syncthreads();

  RingPlace<kStages> place;
  if (thread < 128) {
    give_registers<40>();
    if (thread != 0) return;
    for (unsigned number = blockIdx.x; number < row_tiles * output_tiles; number += gridDim.x) {
      WideTile tile = wide_tile<kOutputs>(number, row_tiles, output_tiles);
      for (unsigned step = 0; step < steps; step++, place.advance()) {
        WideStage<kOutputs>& stage = memory->stages[place.stage];
        Barrier* full = &memory->full[place.stage];
        wait_for_phase(&memory->empty[place.stage], place.parity ^ 1);
        arrive_expecting(full, sizeof(stage));
        copy_tile(stage.x, &params.x, full, step * kStageInputs, tile.first_row);
        copy_tile(stage.w, &params.w, full, step * kStageInputs, tile.first_output);
      }
    }
    return;
  }

  take_registers<232>();
  unsigned rows = thread / 128 * 64 - 64;
  auto release = [&](unsigned stage) {
    if (thread % kWarp == 0) arrive(&memory->empty[stage]);
  };
  float sums[kOutputs / 2];
  for (unsigned number = blockIdx.x; number < row_tiles * output_tiles; number += gridDim.x) {
    unsigned before = 0;
#pragma unroll 1
    for (unsigned step = 0; step < steps; step++, place.advance()) {
      const WideStage<kOutputs>& stage = memory->stages[place.stage];
      wait_for_phase(&memory->full[place.stage], place.parity);
      uint64_t x = describe_operand(stage.x[rows], 0, 1024), w = describe_operand(stage.w, 0, 1024);
      begin_products(sums);
      // Sixteen inputs are 32 bytes further, which descriptors count in packs of 16.
#pragma unroll
      for (unsigned k = 0; k < kStageInputs / 16; k++) add_tile(T{}, sums, x + 2 * k, w + 2 * k, step + k != 0);
      end_products();
      // While these go on, those of the stage before are over.
      wait_for_products<1>();
      if (step != 0) release(before);
      before = place.stage;
    }
    wait_for_products<0>(sums);
    release(before);
    WideTile tile = wide_tile<kOutputs>(number, row_tiles, output_tiles);
    write_tile<T, kOutputs>(product, sums, tile.first_row + rows, tile.first_output);
  }
}

KERNEL(multiply_wide_128_f16, kWideThreads, HopperProduct) { multiply_wide<f16, 128, 6>(params); }
KERNEL(multiply_wide_128_bf16, kWideThreads, HopperProduct) { multiply_wide<bf16, 128, 6>(params); }
KERNEL(multiply_wide_256_f16, kWideThreads, HopperProduct) { multiply_wide<f16, 256, 4>(params); }
KERNEL(multiply_wide_256_bf16, kWideThreads, HopperProduct) { multiply_wide<bf16, 256, 4>(params); }
