// Attention of single rows over the paged cache: decode, and whatever the kernels for whole prompts do not take.
//
// Bound by reading K and V once for each query group. A block has one row and some query heads of one KV head, so that keys that
// are read serve them all. Eight lanes hold a key; sixteen keys are looked at together, while the next ones come: a thread copies what it
// reads itself, so no thread waits for another. Keys are cut into splits of a fixed number, so the order of all sums depends on the
// row's position alone and not on what else is in the step.
#include "kv.cuh"

struct Attention {
  void* out;                  // [rows][query_heads][head_size]
  const void* query;          // [rows][query_stride]
  uint8_t* const* blocks;     // [sequences][blocks_per_sequence], from position 0 on
  const uint32_t* positions;  // [rows]
  const uint32_t* sequences;  // [rows]: which row of `blocks`
  float* partials;            // [rows][query_heads][splits][head_size + 2]: sums, the greatest score, the sum of weights
  KvShape shape;
  uint32_t dtype;  // of query and out: a KvDtype without scales
  uint32_t layer;
  uint32_t blocks_per_sequence;
  uint32_t query_heads;
  uint32_t query_stride;
  uint32_t window;  // a row sees at most this many keys, its own included; 0: all
  uint32_t splits;
  float scale;  // of a product of query and key, times log2(e)
};

constexpr unsigned kAttentionThreads = 128, kAttentionWarps = kAttentionThreads / kWarp;
constexpr unsigned kLanes = 8, kPack8 = 8;
constexpr unsigned kKeysAtOnce = kAttentionThreads / kLanes;
constexpr unsigned kSplitKeys = 512;

// The keys of a row, and their splits.
struct Keys {
  unsigned first, end;

  __device__ __forceinline__ unsigned first_split() const { return first / kSplitKeys; }
  __device__ __forceinline__ unsigned last_split() const { return (end - 1) / kSplitKeys; }
};

__device__ __forceinline__ Keys keys_of(const Attention& params, unsigned row) {
  unsigned end = params.positions[row] + 1;
  return Keys{params.window != 0 && params.window < end ? end - params.window : 0, end};
}

template <class T>
__device__ __forceinline__ void widen_pack(float (&values)[kPack8], const Pack<T>& pack) {
#pragma unroll
  for (unsigned e = 0; e < kPack8; e++) values[e] = widen(pack.elements[e]);
}

// Copies eight elements of a row.
__device__ __forceinline__ void copy_pack(uint8_t* to, const uint8_t* from, unsigned bytes) {
  switch (bytes) {
    case 32:
      copy_async_16(to + 16, from + 16);
      copy_async_16(to, from);
      break;
    case 16:
      copy_async_16(to, from);
      break;
    default:
      copy_async<8>(to, from);
  }
}

// Eight elements of a row; each type takes as few accesses as it can.
__device__ __forceinline__ void read_pack(float (&values)[kPack8], uint32_t dtype, const uint8_t* data, unsigned pack, float scale) {
  switch (dtype) {
    case kKvF32: {
      Pack<float> low = ((const Pack<float>*)data)[2 * pack], high = ((const Pack<float>*)data)[2 * pack + 1];
#pragma unroll
      for (unsigned e = 0; e < 4; e++) values[e] = low.elements[e], values[e + 4] = high.elements[e];
      break;
    }
    case kKvF16:
      widen_pack(values, ((const Pack<f16>*)data)[pack]);
      break;
    case kKvBf16:
      widen_pack(values, ((const Pack<bf16>*)data)[pack]);
      break;
    case kKvInt8: {
      uint64_t steps = ((const uint64_t*)data)[pack];
#pragma unroll
      for (unsigned e = 0; e < kPack8; e++) values[e] = scale * float(int8_t(steps >> (8 * e)));
      break;
    }
    default: {
      uint64_t codes = ((const uint64_t*)data)[pack];
#pragma unroll
      for (unsigned e = 0; e < kPack8; e += 2) {
        float wide[2];
        e4m3_to_f32(wide, uint16_t(codes >> (8 * e)));
        values[e] = scale * wide[0];
        values[e + 1] = scale * wide[1];
      }
    }
  }
}

// What was seen of some keys: `sums` are of values, each with the weight 2^(score - greatest).
template <unsigned kPacks>
struct Seen {
  float greatest, weights, sums[kPacks][kPack8];
};

// What was seen of nothing has the weight zero.
__device__ __forceinline__ float rescale(float greatest, float common) { return -infinity() < greatest ? exp2f(greatest - common) : 0.0f; }

// Joins with the lanes at a distance: both get the same.
template <unsigned kPacks>
__device__ __forceinline__ void join(Seen<kPacks>& seen, unsigned distance) {
  float other = __shfl_xor_sync(kAllLanes, seen.greatest, distance), common = fmaxf(seen.greatest, other);
  float mine = rescale(seen.greatest, common), theirs = rescale(other, common);
  seen.greatest = common;
  seen.weights = seen.weights * mine + __shfl_xor_sync(kAllLanes, seen.weights, distance) * theirs;
#pragma unroll
  for (unsigned p = 0; p < kPacks; p++)
#pragma unroll
    for (unsigned e = 0; e < kPack8; e++)
      seen.sums[p][e] = seen.sums[p][e] * mine + __shfl_xor_sync(kAllLanes, seen.sums[p][e], distance) * theirs;
}

template <unsigned kPacks, unsigned kHeads>
struct AttentionMemory {
  float greatest[kAttentionWarps][kHeads], weights[kAttentionWarps][kHeads];
  float sums[kAttentionWarps][kHeads][kPacks * kLanes * kPack8];
};

// Where a thread's copies of keys lie: `kStages` of these. Dynamic memory, since its size depends on the type of K and V.
template <unsigned kPacks>
struct Ring {
  uint8_t* first;
  unsigned pack_bytes;

  __device__ __forceinline__ uint8_t* pack(unsigned stage, unsigned part, unsigned p) const {
    return first + (((stage * 2 + part) * kPacks + p) * kAttentionThreads + threadIdx.x) * pack_bytes;
  }
  // Behind all packs.
  __device__ __forceinline__ float* scale(unsigned stages, unsigned stage, unsigned part) const {
    return (float*)(first + stages * 2 * kPacks * kAttentionThreads * pack_bytes) + (stage * 2 + part) * kAttentionThreads + threadIdx.x;
  }
};

// Heads of up to `kPacks * 64` elements, a multiple of 8; `kHeads` query heads at once. Rows along x, parts of query groups along y,
// splits along z.
template <unsigned kPacks, unsigned kHeads, unsigned kStages>
__device__ void attend(const Attention& params) {
  using Memory = AttentionMemory<kPacks, kHeads>;
  SHARED(Memory, memory);
  DYNAMIC_SHARED(uint8_t, dynamic);
  const KvShape& shape = params.shape;
  unsigned row = blockIdx.x, head_size = shape.head_size, group = params.query_heads / shape.kv_heads;
  unsigned parts = (group + kHeads - 1) / kHeads, kv_head = blockIdx.y / parts, part = blockIdx.y % parts * kHeads;
  unsigned first_head = kv_head * group + part, heads = min(kHeads, group - part);
  Keys keys = keys_of(params, row);
  unsigned begin = max(keys.first, blockIdx.z * kSplitKeys), end = min(keys.end, (blockIdx.z + 1) * kSplitKeys);
  if (end <= begin) return;
  unsigned lane = threadIdx.x % kLanes;

  float query[kHeads][kPacks][kPack8];
  Seen<kPacks> seen[kHeads];
#pragma unroll
  for (unsigned h = 0; h < kHeads; h++) {
    seen[h].greatest = -infinity();
    seen[h].weights = 0.0f;
#pragma unroll
    for (unsigned p = 0; p < kPacks; p++) {
#pragma unroll
      for (unsigned e = 0; e < kPack8; e++) query[h][p][e] = seen[h].sums[p][e] = 0.0f;
      unsigned pack = p * kLanes + lane;
      if (heads <= h || head_size <= pack * kPack8) continue;
      unsigned bytes = params.dtype == kKvF32 ? 4 : 2;
      const uint8_t* from = (const uint8_t*)params.query + (size_t(row) * params.query_stride + (first_head + h) * head_size) * bytes;
      read_pack(query[h][p], params.dtype, from, pack, 1.0f);
    }
  }
  uint8_t* const* blocks = params.blocks + size_t(params.sequences[row]) * params.blocks_per_sequence;
  Ring<kPacks> ring{dynamic, kPack8 * kv_element_bytes(shape)};
  bool scaled = kv_has_scales(shape.dtype);
  auto fetch = [&](unsigned first, unsigned stage) {
    unsigned key = first + threadIdx.x / kLanes;
    if (key < end) {
      uint8_t* block = blocks[key / shape.block_len];
#pragma unroll
      for (unsigned part = 0; part < 2; part++) {
        KvRow from = kv_row(shape, block, params.layer, KvPart(part), key % shape.block_len, kv_head);
#pragma unroll
        for (unsigned p = 0; p < kPacks; p++) {
          unsigned pack = p * kLanes + lane;
          if (pack * kPack8 < head_size) copy_pack(ring.pack(stage, part, p), from.data + pack * ring.pack_bytes, ring.pack_bytes);
        }
        if (scaled) copy_async<4>(ring.scale(kStages, stage, part), from.scale);
      }
    }
    // A group for each stage, if of nothing, so that what is left in flight can be counted.
    commit_copies();
  };
#pragma unroll
  for (unsigned stage = 0; stage + 1 < kStages; stage++) fetch(begin + stage * kKeysAtOnce, stage);
#pragma unroll 1
  for (unsigned first = begin, stage = 0; first < end; first += kKeysAtOnce, stage = (stage + 1) % kStages) {
    wait_for_copies<kStages - 2>();
    fetch(first + (kStages - 1) * kKeysAtOnce, (stage + kStages - 1) % kStages);
    unsigned key = first + threadIdx.x / kLanes;
    float scores[kHeads] = {};
    if (key < end) {
      float scale = scaled ? *ring.scale(kStages, stage, kKey) : 1.0f;
#pragma unroll
      for (unsigned p = 0; p < kPacks; p++) {
        if (head_size <= (p * kLanes + lane) * kPack8) continue;
        float values[kPack8];
        read_pack(values, shape.dtype, ring.pack(stage, kKey, p), 0, scale);
#pragma unroll
        for (unsigned h = 0; h < kHeads; h++)
#pragma unroll
          for (unsigned e = 0; e < kPack8; e++) scores[h] += query[h][p][e] * values[e];
      }
    }
#pragma unroll
    for (unsigned h = 0; h < kHeads; h++)
#pragma unroll
      for (unsigned distance = kLanes / 2; 0 < distance; distance /= 2) scores[h] += __shfl_xor_sync(kAllLanes, scores[h], distance);
    if (end <= key) continue;
    float weights[kHeads];
#pragma unroll
    for (unsigned h = 0; h < kHeads; h++) {
      float score = scores[h] * params.scale, greatest = fmaxf(seen[h].greatest, score);
      float earlier = rescale(seen[h].greatest, greatest);
      weights[h] = exp2f(score - greatest);
      seen[h].greatest = greatest;
      seen[h].weights = seen[h].weights * earlier + weights[h];
#pragma unroll
      for (unsigned p = 0; p < kPacks; p++)
#pragma unroll
        for (unsigned e = 0; e < kPack8; e++) seen[h].sums[p][e] *= earlier;
    }
    float scale = scaled ? *ring.scale(kStages, stage, kValue) : 1.0f;
#pragma unroll
    for (unsigned p = 0; p < kPacks; p++) {
      if (head_size <= (p * kLanes + lane) * kPack8) continue;
      float values[kPack8];
      read_pack(values, shape.dtype, ring.pack(stage, kValue, p), 0, scale);
#pragma unroll
      for (unsigned h = 0; h < kHeads; h++)
#pragma unroll
        for (unsigned e = 0; e < kPack8; e++) seen[h].sums[p][e] += weights[h] * values[e];
    }
  }
  wait_for_copies<0>();

  unsigned warp = threadIdx.x / kWarp;
#pragma unroll
  for (unsigned h = 0; h < kHeads; h++) {
#pragma unroll
    for (unsigned distance = kLanes; distance < kWarp; distance *= 2) join(seen[h], distance);
    if (kLanes <= threadIdx.x % kWarp) continue;
    if (lane == 0) memory.greatest[warp][h] = seen[h].greatest, memory.weights[warp][h] = seen[h].weights;
#pragma unroll
    for (unsigned p = 0; p < kPacks; p++)
#pragma unroll
      for (unsigned e = 0; e < kPack8; e++) memory.sums[warp][h][(p * kLanes + lane) * kPack8 + e] = seen[h].sums[p][e];
  }
  __syncthreads();
  bool alone = keys.first_split() == keys.last_split();
  for (unsigned i = threadIdx.x; i < heads * head_size; i += kAttentionThreads) {
    unsigned h = i / head_size, element = i % head_size;
    float greatest = -infinity(), weights = 0.0f, sum = 0.0f;
    for (unsigned w = 0; w < kAttentionWarps; w++) greatest = fmaxf(greatest, memory.greatest[w][h]);
    for (unsigned w = 0; w < kAttentionWarps; w++) {
      float factor = rescale(memory.greatest[w][h], greatest);
      weights += memory.weights[w][h] * factor;
      sum += memory.sums[w][h][element] * factor;
    }
    size_t head = size_t(row) * params.query_heads + first_head + h;
    if (alone) {
      kv_write(params.dtype, (uint8_t*)params.out, head * head_size + element, sum / weights);
      continue;
    }
    float* partial = params.partials + (head * params.splits + blockIdx.z) * (head_size + 2);
    partial[element] = sum;
    if (element == 0) partial[head_size] = greatest, partial[head_size + 1] = weights;
  }
}

KERNEL(attention_64, kAttentionThreads, Attention) { attend<1, 4, 4>(params); }
KERNEL(attention_128, kAttentionThreads, Attention) { attend<2, 4, 4>(params); }
KERNEL(attention_256, kAttentionThreads, Attention) { attend<4, 2, 2>(params); }

// Joins the splits of rows that have several. Rows along x, query heads along y.
KERNEL(attention_join, kAttentionThreads, Attention) {
  Keys keys = keys_of(params, blockIdx.x);
  if (keys.first_split() == keys.last_split()) return;
  unsigned head_size = params.shape.head_size;
  size_t head = size_t(blockIdx.x) * params.query_heads + blockIdx.y;
  const float* partials = params.partials + head * params.splits * (head_size + 2);
  float greatest = -infinity();
  for (unsigned split = keys.first_split(); split <= keys.last_split(); split++)
    greatest = fmaxf(greatest, partials[split * (head_size + 2) + head_size]);
  for (unsigned element = threadIdx.x; element < head_size; element += kAttentionThreads) {
    float weights = 0.0f, sum = 0.0f;
    for (unsigned split = keys.first_split(); split <= keys.last_split(); split++) {
      const float* partial = partials + split * (head_size + 2);
      float factor = rescale(partial[head_size], greatest);
      weights += partial[head_size + 1] * factor;
      sum += partial[element] * factor;
    }
    kv_write(params.dtype, (uint8_t*)params.out, head * head_size + element, sum / weights);
  }
}
