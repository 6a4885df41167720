// The rotary embedding of query and key in the NeoX order, and the writing of key and value into the paged cache.
#include "kv.cuh"

struct RopeAndWrite {
  void* query;                  // [rows][query_stride], turned in place
  const void* key;              // [rows][kv_stride]
  const void* value;            // [rows][kv_stride]
  const float* cos;             // [position][half]
  const float* sin;             // likewise
  const uint32_t* positions;    // [rows]
  const uint32_t* sequences;    // [rows]: which row of `blocks`
  uint8_t* const* blocks;       // [sequences][blocks_per_sequence], from position 0 on
  KvShape shape;
  uint32_t layer;
  uint32_t blocks_per_sequence;
  uint32_t query_heads;
  uint32_t half;                // elements `i` and `i + half` are turned together; those from `2 * half` on stay
  uint32_t query_stride;
  uint32_t kv_stride;
};

// Element `i` of a turned head.
template <class T>
__device__ __forceinline__ float turned(const T* head, unsigned i, unsigned half, const float* cos, const float* sin) {
  float x = widen(head[i]);
  if (i < half) return x * cos[i] - widen(head[i + half]) * sin[i];
  if (i < 2 * half) return x * cos[i - half] + widen(head[i - half]) * sin[i - half];
  return x;
}

// Rows along x; a warp for each head: those of the query, of the key, of the value.
template <class T>
__device__ void rope_and_write(const RopeAndWrite& params) {
  const KvShape& shape = params.shape;
  unsigned row = blockIdx.x, lane = threadIdx.x % kWarp;
  unsigned head = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (params.query_heads + 2 * shape.kv_heads <= head) return;
  unsigned position = params.positions[row];
  const float* cos = params.cos + size_t(position) * params.half;
  const float* sin = params.sin + size_t(position) * params.half;
  if (head < params.query_heads) {
    T* query = (T*)params.query + size_t(row) * params.query_stride + head * shape.head_size;
    for (unsigned i = lane; i < params.half; i += kWarp) {
      float low = turned(query, i, params.half, cos, sin), high = turned(query, i + params.half, params.half, cos, sin);
      query[i] = narrow<T>(low);
      query[i + params.half] = narrow<T>(high);
    }
    return;
  }
  head -= params.query_heads;
  KvPart part = head < shape.kv_heads ? kKey : kValue;
  head -= part == kValue ? shape.kv_heads : 0;
  const T* from = (const T*)(part == kKey ? params.key : params.value) + size_t(row) * params.kv_stride + head * shape.head_size;
  size_t place = size_t(params.sequences[row]) * params.blocks_per_sequence + position / shape.block_len;
  KvRow to = kv_row(shape, params.blocks[place], params.layer, part, position % shape.block_len, head);
  unsigned half = part == kKey ? params.half : 0;
  kv_write_row(shape, to, [&](unsigned i) { return turned(from, i, half, cos, sin); });
}

KERNEL(rope_and_write_f32, 256, RopeAndWrite) { rope_and_write<float>(params); }
KERNEL(rope_and_write_f16, 256, RopeAndWrite) { rope_and_write<f16>(params); }
KERNEL(rope_and_write_bf16, 256, RopeAndWrite) { rope_and_write<bf16>(params); }
