// Kernels with one mistake each in what Hopper has, and how they should be: a part of `planted.cpp`.
#pragma once

namespace {

// Maps of `in` as a matrix of 64 rows of 64 elements.
struct PlantedTiles {
  TensorMap map;
  TensorMap without_swizzle;
  uint32_t* out;       // [128]
  const uint32_t* in;  // [2048]
  uint32_t wrong;
  uint32_t reserved[27];
};

struct __align__(1024) Tile {
  uint16_t elements[64 * 64];
};

// A block's way to a tile.
struct Tiles {
  Tile left, right;
  Barrier landed, released;
};

constexpr unsigned kTileBytes = sizeof(Tile);

inline void make_tiles_barriers(Tiles& tiles) {
  if (threadIdx.x == 0) {
    make_barrier(&tiles.landed, 1);
    make_barrier(&tiles.released, 4);
    make_barriers_known();
  }
  __syncthreads();
}

// A thread asks for the left tile alone.
inline void begin_left(Tiles& tiles, const PlantedTiles& params, unsigned bytes) {
  arrive_expecting(&tiles.landed, bytes);
  copy_tile(&tiles.left, &params.map, &tiles.landed, 0, 0);
}

inline void read_left(const Tiles& tiles, const PlantedTiles& params) {
  params.out[threadIdx.x] = tiles.left.elements[threadIdx.x];
}

// Both tiles, for all threads.
inline void bring_tiles(Tiles& tiles, const PlantedTiles& params) {
  make_tiles_barriers(tiles);
  if (threadIdx.x == 0) {
    arrive_expecting(&tiles.landed, 2 * kTileBytes);
    copy_tile(&tiles.left, &params.map, &tiles.landed, 0, 0);
    copy_tile(&tiles.right, &params.map, &tiles.landed, 0, 0);
  }
  wait_for_phase(&tiles.landed, 0);
}

inline void multiply(float (&sums)[32], const Tiles& tiles) {
  add_tile(bf16{}, sums, describe_operand(&tiles.left, 0, 1024), describe_operand(&tiles.right, 0, 1024), false);
  end_products();
}

}  // namespace

KERNEL(wait_for_a_tile, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) begin_left(*tiles, params, kTileBytes);
  if (!params.wrong || threadIdx.x != 77) wait_for_phase(&tiles->landed, 0);
  read_left(*tiles, params);
  if (threadIdx.x == 0) wait_for_phase(&tiles->landed, 0);
}

// The phase "before the first" is over from the beginning.
KERNEL(phase_of_a_barrier, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) begin_left(*tiles, params, kTileBytes);
  __syncthreads();
  wait_for_phase(&tiles->landed, params.wrong);
  read_left(*tiles, params);
  wait_for_phase(&tiles->landed, 0);
}

KERNEL(more_bytes_than_come, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) begin_left(*tiles, params, kTileBytes + 128 * params.wrong);
  wait_for_phase(&tiles->landed, 0);
  read_left(*tiles, params);
}

KERNEL(fewer_bytes_than_come, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) {
    arrive_expecting(&tiles->landed, kTileBytes - 128 * params.wrong);
    // What is beyond the tensor counts as well.
    copy_tile(&tiles->left, &params.map, &tiles->landed, 32, -16);
  }
  wait_for_phase(&tiles->landed, 0);
  read_left(*tiles, params);
}

KERNEL(barriers_are_known_to_copies, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  if (threadIdx.x == 0) {
    make_barrier(&tiles->landed, 1);
    if (!params.wrong) make_barriers_known();
    begin_left(*tiles, params, kTileBytes);
    wait_for_phase(&tiles->landed, 0);
    params.out[0] = tiles->left.elements[0];
  }
}

KERNEL(barriers_are_made_before_use, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  // In either order of threads the other one comes too early.
  if (threadIdx.x == 0 || threadIdx.x == 127) make_barrier(threadIdx.x == 0 ? &tiles->landed : &tiles->released, 1);
  if (!params.wrong) __syncthreads();
  if (threadIdx.x == 0 || threadIdx.x == 127) arrive(threadIdx.x == 0 ? &tiles->released : &tiles->landed);
  params.out[threadIdx.x] = 0;
}

// What threads tell each other by a barrier.
KERNEL(arrival_after_a_write, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  unsigned thread = threadIdx.x, warp = thread / kWarp;
  auto tell = [&] {
    __syncwarp();
    if (thread % kWarp == 0) arrive(&tiles->released);
  };
  if (params.wrong && warp == 2) tell();
  tiles->left.elements[thread] = uint16_t(thread);
  if (!params.wrong || warp != 2) tell();
  wait_for_phase(&tiles->released, 0);
  params.out[thread] = tiles->left.elements[127 - thread];
}

// Two of four warps meet.
KERNEL(meeting_of_some_warps, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  unsigned thread = threadIdx.x;
  if (thread < 64) {
    tiles->left.elements[thread] = uint16_t(thread);
    if (!params.wrong)
      meet_some(1, 64);
    else
      __syncwarp();
    params.out[thread] = tiles->left.elements[63 - thread];
  }
}

KERNEL(meeting_of_all_that_are_expected, 128, PlantedTiles) {
  if (threadIdx.x < 64) meet_some(1, params.wrong ? 96 : 64);
  params.out[threadIdx.x] = 0;
}

KERNEL(wait_for_a_product, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  float sums[32];
  begin_products(sums);
  multiply(sums, *tiles);
  if (params.wrong)
    wait_for_products<1>(sums);
  else
    wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
  wait_for_products<0>(sums);
}

KERNEL(fence_before_a_product, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  float sums[32];
  begin_products(sums);
  multiply(sums, *tiles);
  wait_for_products<0>(sums);
  for (unsigned i = 0; i < 32; i++) sums[i] *= 2.0f;
  if (!params.wrong) begin_products(sums);
  multiply(sums, *tiles);
  wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
}

KERNEL(fence_before_the_first_product, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  float sums[32];
  if (!params.wrong) begin_products(sums);
  multiply(sums, *tiles);
  wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
}

KERNEL(left_side_of_a_product, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  float sums[32] = {};
  uint32_t left[1][4] = {{params.in[0], params.in[1], params.in[2], params.in[3]}};
  begin_products(sums, left);
  add_tile_transposed(bf16{}, sums, left[0], describe_operand(&tiles->right, 0, 1024));
  end_products();
  if (params.wrong) left[0][2] = 0;
  wait_for_products<0>(sums, left);
  left[0][2] = 0;
  params.out[threadIdx.x] = uint32_t(sums[5]) + left[0][2];
}

KERNEL(swizzle_of_a_tile, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) {
    arrive_expecting(&tiles->landed, 2 * kTileBytes);
    copy_tile(&tiles->left, &params.map, &tiles->landed, 0, 0);
    copy_tile(&tiles->right, params.wrong ? &params.without_swizzle : &params.map, &tiles->landed, 0, 0);
  }
  wait_for_phase(&tiles->landed, 0);
  float sums[32];
  begin_products(sums);
  multiply(sums, *tiles);
  wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
}

KERNEL(fence_between_threads_and_products, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  if (threadIdx.x < 64) tiles->right.elements[threadIdx.x] = 0;
  if (!params.wrong) fence_proxies();
  __syncthreads();
  // Too late for what was written before the barrier.
  if (params.wrong) fence_proxies();
  float sums[32];
  begin_products(sums);
  multiply(sums, *tiles);
  wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
}

KERNEL(fence_between_threads_and_copies, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) {
    tiles->left.elements[9] = 0;
    if (!params.wrong) fence_proxies();
    begin_left(*tiles, params, kTileBytes);
  }
  wait_for_phase(&tiles->landed, 0);
  read_left(*tiles, params);
}

// A stage is loaded again once all warps have said that their products are over. One warp says it too early.
KERNEL(release_of_a_stage, 160, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  unsigned thread = threadIdx.x;
  if (128 <= thread) {
    if (thread == 128)
      for (unsigned round = 0; round < 2; round++) {
        wait_for_phase(&tiles->released, round ^ 1);
        arrive_expecting(&tiles->landed, 2 * kTileBytes);
        copy_tile(&tiles->left, &params.map, &tiles->landed, 0, 0);
        copy_tile(&tiles->right, &params.map, &tiles->landed, 0, 0);
      }
    return;
  }
  auto release = [&] {
    if (thread % kWarp == 0) arrive(&tiles->released);
  };
  float sums[32];
  for (unsigned round = 0; round < 2; round++) {
    wait_for_phase(&tiles->landed, round);
    bool early = params.wrong && thread / kWarp == 3 && round == 0;
    begin_products(sums);
    multiply(sums, *tiles);
    if (early) release();
    wait_for_products<0>(sums);
    if (!early) release();
  }
  params.out[thread] = uint32_t(sums[5]);
}

KERNEL(a_product_of_a_whole_warpgroup, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  bring_tiles(*tiles, params);
  float sums[32] = {};
  begin_products(sums);
  if (!params.wrong || threadIdx.x / kWarp != 1) multiply(sums, *tiles);
  wait_for_products<0>(sums);
  params.out[threadIdx.x] = uint32_t(sums[5]);
}

KERNEL(the_end_of_a_copy, 128, PlantedTiles) {
  DYNAMIC_SHARED(Tiles, tiles);
  make_tiles_barriers(*tiles);
  if (threadIdx.x == 0) begin_left(*tiles, params, kTileBytes);
  if (!params.wrong) wait_for_phase(&tiles->landed, 0);
  params.out[threadIdx.x] = 0;
}
