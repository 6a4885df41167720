// Attention of whole prompts, or chunks of them, over the paged cache, on tensor cores.
//
// A block has up to 64 rows of one sequence and one query head; a warp has 16 of them, with their sums in registers. K and V come in tiles
// of some keys, one tile ahead of the computation. What the sums are of depends on the row's position and the tile's first position:
// keys are cut into tiles from position 0 on, so a row is the same in whatever chunk it comes.
//
// Source: T. Dao, "FlashAttention-2", 2023: the order of loops, and weights that stay in registers between the two products.
#include "prompt_attention.cuh"
#include "tensor_core.cuh"

constexpr unsigned kPromptThreads = 128;

// Heads of up to `kHead` elements of the type `T`, `kKeys` keys at once. A row in shared memory is longer by 16 bytes than what is in it, so
// that eight rows lie in different banks.
template <class T, unsigned kHead, unsigned kKeys>
struct PromptMemory {
  static constexpr unsigned kStride = kHead + kChunk;
  T query[kPromptRows][kStride];
  T keys[2][kKeys][kStride];
  T values[2][kKeys][kStride];
};

// A tile of K or V from position `first` on; zeros at `end` and beyond, and beyond the elements of a head.
template <class T, unsigned kHead, unsigned kKeys>
__device__ __forceinline__ void load_tile(T (&tile)[kKeys][kHead + kChunk], const PromptAttention& params, uint8_t* const* blocks,
                                          KvPart part, unsigned head, unsigned first, unsigned end, bool as_they_are) {
  const KvShape& shape = params.shape;
  constexpr unsigned kChunks = kHead / kChunk;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kKeys * kChunks; i += kPromptThreads) {
    unsigned key = i / kChunks, chunk = i % kChunks, position = first + key;
    T* to = &tile[key][chunk * kChunk];
    bool there = position < end && chunk * kChunk < shape.head_size;
    position = there ? position : end - 1;
    KvRow row = kv_row(shape, blocks[position / shape.block_len], params.layer, part, position % shape.block_len, head);
    if (as_they_are) {
      copy_async_16(to, row.data + (there ? chunk * 16 : 0), there ? 16 : 0);
      continue;
    }
    float scale = row.scale ? *row.scale : 1.0f;
    Pack<T> pack;
#pragma unroll
    for (unsigned e = 0; e < kChunk; e++)
      pack.elements[e] = narrow<T>(there ? kv_read(shape.dtype, row.data, chunk * kChunk + e, scale) : 0.0f);
    *(Pack<T>*)to = pack;
  }
}

// Tiles along x, the last first, since it sees most keys; query heads along y; parts of a head's values along z, since the sums of a long
// one do not fit into registers.
template <class T, KvDtype kStored, unsigned kHead, unsigned kKeys, unsigned kParts = 1>
__device__ void attend_prompt(const PromptAttention& params) {
  using Memory = PromptMemory<T, kHead, kKeys>;
  DYNAMIC_SHARED(Memory, memory);
  constexpr unsigned kPart = kHead / kParts;
  const KvShape& shape = params.shape;
  const PromptTile& tile = params.tiles[gridDim.x - 1 - blockIdx.x];
  unsigned part = blockIdx.z * kPart, rows = tile.rows, first_position = tile.first_position, head = blockIdx.y, head_size = shape.head_size;
  unsigned kv_head = head / (params.query_heads / shape.kv_heads), end = first_position + rows;
  unsigned first_key = params.window != 0 && params.window <= first_position ? first_position + 1 - params.window : 0;
  uint8_t* const* blocks = params.blocks + size_t(tile.sequence) * params.blocks_per_sequence;
  bool as_they_are = shape.dtype == kStored;
  auto load = [&](unsigned stage, unsigned first) {
    load_tile<T, kHead, kKeys>(memory->keys[stage], params, blocks, kKey, kv_head, first, end, as_they_are);
    load_tile<T, kHead, kKeys>(memory->values[stage], params, blocks, kValue, kv_head, first, end, as_they_are);
  };

  const T* query = (const T*)params.query + size_t(tile.first_row) * params.query_stride + size_t(head) * head_size;
  constexpr unsigned kChunks = kHead / kChunk;
#pragma unroll 1
  for (unsigned i = threadIdx.x; i < kPromptRows * kChunks; i += kPromptThreads) {
    unsigned row = i / kChunks, chunk = i % kChunks;
    bool there = row < rows && chunk * kChunk < head_size;
    copy_async_16(&memory->query[row][chunk * kChunk], there ? query + size_t(row) * params.query_stride + chunk * kChunk : query,
                  there ? 16 : 0);
  }
  unsigned first = first_key / kKeys * kKeys;
  load(0, first);
  commit_copies();

  unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  // Of rows g and g + 8 of the warp's sixteen.
  unsigned position[2] = {first_position + warp * 16 + g, first_position + warp * 16 + g + 8};
  float greatest[2] = {-infinity(), -infinity()}, weights[2] = {}, sums[kPart / 8][4] = {};
#pragma unroll 1
  for (unsigned stage = 0; first < end; first += kKeys, stage ^= 1) {
    if (first + kKeys < end) load(stage ^ 1, first + kKeys);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();

    float scores[kKeys / 8][4] = {};
#pragma unroll
    for (unsigned k = 0; k < kHead / 16; k++) {
      uint32_t a[4];
      load_matrices(a, &memory->query[warp * 16 + lane % 16][k * 16 + lane / 16 * kChunk]);
#pragma unroll
      for (unsigned n = 0; n < kKeys / 16; n++) {
        uint32_t b[4];
        load_matrices(b, &memory->keys[stage][n * 16 + lane / 16 * 8 + lane % 8][k * 16 + lane / 8 % 2 * kChunk]);
        add_product(T{}, scores[2 * n], a, b[0], b[1]);
        add_product(T{}, scores[2 * n + 1], a, b[2], b[3]);
      }
    }

    float tile_greatest[2] = {greatest[0], greatest[1]};
#pragma unroll
    for (unsigned n = 0; n < kKeys / 8; n++)
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        unsigned key = first + n * 8 + t * 2 + i % 2, row = position[i / 2];
        bool seen = key <= row && key < end && (params.window == 0 || row < key + params.window);
        scores[n][i] = seen ? scores[n][i] * params.scale : -infinity();
        tile_greatest[i / 2] = fmaxf(tile_greatest[i / 2], scores[n][i]);
      }
#pragma unroll
    for (unsigned r = 0; r < 2; r++) {
      tile_greatest[r] = fmaxf(tile_greatest[r], __shfl_xor_sync(kAllLanes, tile_greatest[r], 1));
      tile_greatest[r] = fmaxf(tile_greatest[r], __shfl_xor_sync(kAllLanes, tile_greatest[r], 2));
      // What was seen of nothing has the weight zero.
      float earlier = -infinity() < greatest[r] ? exp2f(greatest[r] - tile_greatest[r]) : 0.0f;
      greatest[r] = tile_greatest[r];
      weights[r] *= earlier;
#pragma unroll
      for (unsigned n = 0; n < kPart / 8; n++) sums[n][2 * r] *= earlier, sums[n][2 * r + 1] *= earlier;
    }
#pragma unroll
    for (unsigned n = 0; n < kKeys / 8; n++)
#pragma unroll
      for (unsigned i = 0; i < 4; i++) {
        scores[n][i] = -infinity() < scores[n][i] ? exp2f(scores[n][i] - greatest[i / 2]) : 0.0f;
        weights[i / 2] += scores[n][i];
      }

    // Where a lane has its part of a product is where it needs it of the next one's left side.
#pragma unroll
    for (unsigned k = 0; k < kKeys / 16; k++) {
      const float(&low)[4] = scores[2 * k], (&high)[4] = scores[2 * k + 1];
      uint32_t a[4] = {pair<T>(low[0], low[1]), pair<T>(low[2], low[3]), pair<T>(high[0], high[1]), pair<T>(high[2], high[3])};
#pragma unroll
      for (unsigned n = 0; n < kPart / 16; n++) {
        uint32_t b[4];
        load_transposed(b, &memory->values[stage][k * 16 + lane % 16][part + n * 16 + lane / 16 * kChunk]);
        add_product(T{}, sums[2 * n], a, b[0], b[1]);
        add_product(T{}, sums[2 * n + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (unsigned r = 0; r < 2; r++) {
    weights[r] += __shfl_xor_sync(kAllLanes, weights[r], 1);
    weights[r] += __shfl_xor_sync(kAllLanes, weights[r], 2);
    unsigned row = warp * 16 + g + 8 * r;
    if (rows <= row) continue;
    T* out = (T*)params.out + (size_t(tile.first_row + row) * params.query_heads + head) * head_size + part;
    float share = 1.0f / weights[r];
#pragma unroll
    for (unsigned n = 0; n < kPart / 8; n++)
      if (part + n * 8 < head_size) *(uint32_t*)(out + n * 8 + t * 2) = pair<T>(sums[n][2 * r] * share, sums[n][2 * r + 1] * share);
  }
}

KERNEL(attend_prompt_64_f16, kPromptThreads, PromptAttention) { attend_prompt<f16, kKvF16, 64, 64>(params); }
KERNEL(attend_prompt_96_f16, kPromptThreads, PromptAttention) { attend_prompt<f16, kKvF16, 96, 64>(params); }
KERNEL(attend_prompt_128_f16, kPromptThreads, PromptAttention) { attend_prompt<f16, kKvF16, 128, 64>(params); }
KERNEL(attend_prompt_256_f16, kPromptThreads, PromptAttention) { attend_prompt<f16, kKvF16, 256, 32, 2>(params); }
KERNEL(attend_prompt_64_bf16, kPromptThreads, PromptAttention) { attend_prompt<bf16, kKvBf16, 64, 64>(params); }
KERNEL(attend_prompt_96_bf16, kPromptThreads, PromptAttention) { attend_prompt<bf16, kKvBf16, 96, 64>(params); }
KERNEL(attend_prompt_128_bf16, kPromptThreads, PromptAttention) { attend_prompt<bf16, kKvBf16, 128, 64>(params); }
KERNEL(attend_prompt_256_bf16, kPromptThreads, PromptAttention) { attend_prompt<bf16, kKvBf16, 256, 32, 2>(params); }
