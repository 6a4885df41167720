// Attention of whole prompts, or chunks of them, on Hopper: pages of the cache come to shared memory by themselves.
//
// A block has up to 64 rows of one sequence and two query heads of one group: a warpgroup for each, which share the tiles of K and V that
// a third one asks for. A warpgroup multiplies the next tile's keys while it makes weights of this one's. As in `prompt_attention.cu`, keys are
// cut into tiles from position 0 on, so a row is the same in whatever chunk it comes.
//
// Source: J. Shah and others, "FlashAttention-3", 2024: who does what, and which products go on during the exponentials.
#include "hopper.cuh"
#include "prompt_attention.cuh"
#include "tensor_core.cuh"

struct HopperAttention {
  TensorMap query;   // [rows][query_stride], 64 rows in a tile
  TensorMap keys;    // [blocks][layers][heads][tokens][elements], a block's tokens of one head in a tile
  TensorMap values;  // likewise
  PromptAttention prompt;
  uint64_t first_block;  // address
  uint64_t block_bytes;
  uint32_t reserved[2];
};

constexpr unsigned kWideAttentionThreads = 384, kTileKeys = 128, kRowElements = 64;

// Rows of `kHead` elements are `kHead / 64` matrices with rows of 64.
template <unsigned kHead, unsigned kRows>
struct __align__(1024) TileMatrix {
  uint16_t parts[kHead / kRowElements][kRows][kRowElements];
};

template <unsigned kHead, unsigned kStages>
struct WideAttentionMemory {
  TileMatrix<kHead, kPromptRows> query[2];
  TileMatrix<kHead, kTileKeys> keys[kStages], values[kStages];
  Barrier query_is_there, is_whole, keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

// What of a sequence's keys the block's rows see.
struct WideKeys {
  unsigned first;  // of a tile, from where on the rows are computed
  unsigned needed;  // what is before is seen by no row
  unsigned end;
  unsigned tiles;

  __device__ __forceinline__ WideKeys(const PromptAttention& params, const PromptTile& tile) {
    needed = params.window != 0 && params.window <= tile.first_position ? tile.first_position + 1 - params.window : 0;
    first = needed / kTileKeys * kTileKeys;
    end = tile.first_position + tile.rows;
    tiles = (end - first + kTileKeys - 1) / kTileKeys;
  }
};

// A warp brings a tile of K or V, block by block. Where the tile is not full of keys that are seen, what is left is zero: stale values could be
// infinite.
template <unsigned kHead>
__device__ __forceinline__ void bring_tile(TileMatrix<kHead, kTileKeys>& to, const TensorMap* map, Barrier* full, Barrier* is_whole,
                                           unsigned& is_whole_parity, const HopperAttention& params, uint8_t* const* blocks,
                                           unsigned kv_head, unsigned first, const WideKeys& keys) {
  constexpr unsigned kParts = kHead / kRowElements;
  unsigned lane = threadIdx.x % kWarp, block_len = params.prompt.shape.block_len;
  // Rows of the tile: whole blocks that have keys which are seen, and of them those up to the last key.
  unsigned skipped = first < keys.needed ? (keys.needed - first) / block_len * block_len : 0;
  unsigned last = min(keys.end - first, kTileKeys), pages = (last - skipped + block_len - 1) / block_len;
  bool whole = skipped == 0 && last == kTileKeys;
  Barrier* landed = whole ? full : is_whole;
  if (lane == 0) arrive_expecting(landed, pages * block_len * kHead * 2);
  __syncwarp();
  for (unsigned page = lane; page < pages; page += kWarp) {
    unsigned row = skipped + page * block_len;
    uint64_t block = (uint64_t(blocks[(first + row) / block_len]) - params.first_block) / params.block_bytes;
#pragma unroll
    for (unsigned part = 0; part < kParts; part++)
      copy_tile(to.parts[part][row], map, landed, part * kRowElements, 0, kv_head, params.prompt.layer, block);
  }
  __syncwarp();
  if (whole) return;
  wait_for_phase(is_whole, is_whole_parity);
  is_whole_parity ^= 1;
  constexpr unsigned kRowChunks = kRowElements / kChunk;
  for (unsigned i = lane; i < kTileKeys * kParts * kRowChunks; i += kWarp) {
    unsigned row = i / (kParts * kRowChunks), part = i / kRowChunks % kParts;
    if (row < skipped || last <= row) *(uint4*)&to.parts[part][row][i % kRowChunks * kChunk] = uint4{0, 0, 0, 0};
  }
  fence_proxies();
  __syncwarp();
  if (lane == 0) arrive(full);
}

// The part of one warpgroup: rows of one query head.
template <class T, unsigned kHead>
struct HeadRows {
  unsigned position[2];  // of rows g and g + 8 of the warp's sixteen
  float greatest[2] = {-infinity(), -infinity()}, weights[2] = {};

  // Makes weights of scores; what sums were so far is to be multiplied by `earlier`.
  __device__ __forceinline__ void weigh(float (&scores)[kTileKeys / 2], float (&earlier)[2], unsigned first, const PromptAttention& params) {
    unsigned t = threadIdx.x % 4;
    // By the warp's first row, so that lanes stay together.
    bool all_seen = params.window == 0 && first + kTileKeys <= position[0] - threadIdx.x % kWarp / 4 + 1;
    if (!all_seen) {
      // A key behind the row is further away than any other.
      unsigned reach = params.window != 0 ? params.window : 1u << 31;
#pragma unroll
      for (unsigned i = 0; i < kTileKeys / 2; i++) {
        unsigned key = first + i / 4 * 8 + t * 2 + i % 2;
        scores[i] = position[i / 2 % 2] - key < reach ? scores[i] : -infinity();
      }
    }
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
      float most = greatest[r];
#pragma unroll
      for (unsigned n = 0; n < kTileKeys / 8; n++) most = fmaxf(most, fmaxf(scores[4 * n + 2 * r], scores[4 * n + 2 * r + 1]));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      // A row that has seen nothing has nothing but minus infinity.
      float base = most == -infinity() ? 0.0f : most * params.scale;
      earlier[r] = power_of_two(greatest[r] * params.scale - base);
      greatest[r] = most;
      weights[r] *= earlier[r];
#pragma unroll
      for (unsigned n = 0; n < kTileKeys / 8; n++)
#pragma unroll
        for (unsigned e = 0; e < 2; e++) {
          float& score = scores[4 * n + 2 * r + e];
          score = power_of_two(score * params.scale - base);
          weights[r] += score;
        }
    }
  }

  __device__ __forceinline__ void write(const float (&sums)[kHead / 2], const PromptAttention& params, const PromptTile& tile, unsigned head) {
    unsigned lane = threadIdx.x % kWarp, t = lane % 4;
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
      weights[r] += __shfl_xor_sync(kAllLanes, weights[r], 1);
      weights[r] += __shfl_xor_sync(kAllLanes, weights[r], 2);
      float share = 1.0f / weights[r];
      unsigned row = position[r] - tile.first_position;
      T* out = (T*)params.out + (size_t(tile.first_row + row) * params.query_heads + head) * kHead;
#pragma unroll
      for (unsigned four = 0; four < kHead / 32; four++) {
        uint32_t words[4];
#pragma unroll
        for (unsigned n = 0; n < 4; n++) {
          unsigned i = (four * 4 + n) * 4 + 2 * r;
          words[n] = pair<T>(sums[i] * share, sums[i + 1] * share);
        }
        exchange_in_fours(words);
        if (row < tile.rows) *(uint4*)(out + (four * 4 + t) * 8) = uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
};

template <class T, unsigned kHead, unsigned kStages>
__device__ __forceinline__ void attend_head(const HopperAttention& params, WideAttentionMemory<kHead, kStages>& memory, const PromptTile& tile,
                                            unsigned head, unsigned member) {
  const PromptAttention& prompt = params.prompt;
  WideKeys keys(prompt, tile);
  unsigned thread = threadIdx.x % 128, lane = thread % kWarp;
  HeadRows<T, kHead> rows;
  rows.position[0] = tile.first_position + thread / kWarp * 16 + lane / 4;
  rows.position[1] = rows.position[0] + 8;
  RingPlace<kStages> place, behind;
  float scores[kTileKeys / 2], sums[kHead / 2] = {}, earlier[2];
  uint32_t left[kTileKeys / 16][4];

  auto release = [&](Barrier* empty) {
    if (lane == 0) arrive(empty);
  };
  // Sixteen elements are 32 bytes further, which descriptors count in packs of 16; every 64 there is another matrix.
  uint64_t query = describe_operand(memory.query[member].parts, 0, 1024);
  auto begin_scores = [&] {
    wait_for_phase(&memory.keys_full[place.stage], place.parity);
    uint64_t right = describe_operand(memory.keys[place.stage].parts, 0, 1024);
    begin_products(scores);
#pragma unroll
    for (unsigned k = 0; k < kHead / 16; k++)
      add_tile(T{}, scores, query + k / 4 * (kPromptRows * 8) + k % 4 * 2, right + k / 4 * (kTileKeys * 8) + k % 4 * 2, k != 0);
    end_products();
  };
  auto begin_values = [&] {
    wait_for_phase(&memory.values_full[behind.stage], behind.parity);
    uint64_t right = describe_operand(memory.values[behind.stage].parts, kTileKeys * 128, 1024);
    begin_products(sums, left);
    // Sixteen keys are as many rows of 128 bytes further.
#pragma unroll
    for (unsigned k = 0; k < kTileKeys / 16; k++) add_tile_transposed(T{}, sums, left[k], right + k * (16 * 8));
    end_products();
  };
  auto take_weights = [&] {
    // Where a lane has its part of a product is where it needs it of the next one's left side.
#pragma unroll
    for (unsigned i = 0; i < kTileKeys / 4; i++) left[i / 4][i % 4] = pair<T>(scores[2 * i], scores[2 * i + 1]);
  };

  wait_for_phase(&memory.query_is_there, 0);
  begin_scores();
  wait_for_products<0>(scores);
  release(&memory.keys_empty[place.stage]);
  rows.weigh(scores, earlier, keys.first, prompt);
  take_weights();
#pragma unroll 1
  for (unsigned number = 1; number < keys.tiles; number++) {
    place.advance();
    begin_scores();
    begin_values();
    wait_for_products<1>(scores);
    release(&memory.keys_empty[place.stage]);
    rows.weigh(scores, earlier, keys.first + number * kTileKeys, prompt);
    wait_for_products<0>(sums, left);
    release(&memory.values_empty[behind.stage]);
    behind.advance();
#pragma unroll
    for (unsigned i = 0; i < kHead / 2; i++) sums[i] *= earlier[i / 2 % 2];
    take_weights();
  }
  begin_values();
  wait_for_products<0>(sums, left);
  release(&memory.values_empty[behind.stage]);
  rows.write(sums, prompt, tile, head);
}

// Tiles along x, the last first, since it sees most keys; pairs of query heads along y.
template <class T, unsigned kHead, unsigned kStages>
__device__ void attend_prompt_by_warpgroups(const HopperAttention& params) {
  using Memory = WideAttentionMemory<kHead, kStages>;
  DYNAMIC_SHARED(Memory, memory);
  const PromptAttention& prompt = params.prompt;
  const PromptTile& tile = prompt.tiles[gridDim.x - 1 - blockIdx.x];
  unsigned group = prompt.query_heads / prompt.shape.kv_heads, pairs = (group + 1) / 2;
  unsigned kv_head = blockIdx.y / pairs, within = blockIdx.y % pairs * 2, members = min(2u, group - within);
  unsigned head = kv_head * group + within, thread = threadIdx.x, warpgroup = thread / 128;
  if (thread == 0) {
    make_barrier(&memory->query_is_there, 1);
    make_barrier(&memory->is_whole, 1);
    for (unsigned stage = 0; stage < kStages; stage++) {
      make_barrier(&memory->keys_full[stage], 1);
      make_barrier(&memory->values_full[stage], 1);
      // From each warp that has rows.
      make_barrier(&memory->keys_empty[stage], 4 * members);
      make_barrier(&memory->values_empty[stage], 4 * members);
    }
    make_barriers_known();
  }
  __syncthreads();

  if (warpgroup != 0) {
    take_registers<240>();
    unsigned member = warpgroup - 1;
    if (member < members) attend_head<T, kHead, kStages>(params, *memory, tile, head + member, member);
    return;
  }
  give_registers<24>();
  if (kWarp <= thread) return;
  WideKeys keys(prompt, tile);
  uint8_t* const* blocks = prompt.blocks + size_t(tile.sequence) * prompt.blocks_per_sequence;
  if (thread == 0) {
    arrive_expecting(&memory->query_is_there, members * sizeof(memory->query[0]));
    for (unsigned member = 0; member < members; member++)
#pragma unroll
      for (unsigned part = 0; part < kHead / kRowElements; part++)
        copy_tile(memory->query[member].parts[part], &params.query, &memory->query_is_there,
                  (head + member) * kHead + part * kRowElements, tile.first_row);
  }
  __syncwarp();
  RingPlace<kStages> place, behind;
  unsigned is_whole_parity = 0;
  auto bring_values = [&](unsigned number) {
    wait_for_phase(&memory->values_empty[behind.stage], behind.parity ^ 1);
    bring_tile<kHead>(memory->values[behind.stage], &params.values, &memory->values_full[behind.stage], &memory->is_whole,
                      is_whole_parity, params, blocks, kv_head, keys.first + number * kTileKeys, keys);
    behind.advance();
  };
  // In the order in which they are used.
#pragma unroll 1
  for (unsigned number = 0; number < keys.tiles; number++) {
    wait_for_phase(&memory->keys_empty[place.stage], place.parity ^ 1);
    bring_tile<kHead>(memory->keys[place.stage], &params.keys, &memory->keys_full[place.stage], &memory->is_whole, is_whole_parity,
                      params, blocks, kv_head, keys.first + number * kTileKeys, keys);
    place.advance();
    if (number != 0) bring_values(number - 1);
  }
  bring_values(keys.tiles - 1);
}

KERNEL(attend_prompt_wide_64_f16, kWideAttentionThreads, HopperAttention) { attend_prompt_by_warpgroups<f16, 64, 4>(params); }
KERNEL(attend_prompt_wide_64_bf16, kWideAttentionThreads, HopperAttention) { attend_prompt_by_warpgroups<bf16, 64, 4>(params); }
KERNEL(attend_prompt_wide_128_f16, kWideAttentionThreads, HopperAttention) { attend_prompt_by_warpgroups<f16, 128, 2>(params); }
KERNEL(attend_prompt_wide_128_bf16, kWideAttentionThreads, HopperAttention) { attend_prompt_by_warpgroups<bf16, 128, 2>(params); }
