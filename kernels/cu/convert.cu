// From blocks of one layout to blocks of another: the sender's side of a handoff between unequal workers, and, with equal layouts, gather
// and scatter.
#include "kv.cuh"

struct ConvertBlocks {
  uint8_t* const* from;  // blocks of the sequence, from position 0 on
  uint8_t* const* to;    // the first one holds the token `first_token`
  KvShape from_shape;
  KvShape to_shape;
  uint32_t first_token;
  uint32_t tokens;
  uint32_t first_layer;     // in the source
  uint32_t to_first_layer;  // where that one goes
  uint32_t layers;
  uint32_t first_head;      // in the source
  uint32_t to_first_head;   // where that one goes
  uint32_t heads;
};

__device__ __forceinline__ void copy_row(uint8_t* to, const uint8_t* from, unsigned bytes) {
  unsigned lane = threadIdx.x % kWarp;
  if (whole_packs<uint8_t>(bytes, to, from)) {
    for (unsigned i = lane; i < bytes / 16; i += kWarp) ((Pack<uint8_t>*)to)[i] = ((const Pack<uint8_t>*)from)[i];
    return;
  }
  for (unsigned i = lane; i < bytes; i += kWarp) to[i] = from[i];
}

// A warp for each row (K or V of a token and head), in the order of the source's tokens. Equal types keep their bits and scales.
__device__ __forceinline__ void convert_row(const ConvertBlocks& params, unsigned index) {
  const KvShape &source = params.from_shape, &target = params.to_shape;
  KvPart part = KvPart(index % 2);
  unsigned head = index / 2 % params.heads, token = index / 2 / params.heads % params.tokens;
  unsigned layer = index / 2 / params.heads / params.tokens;
  unsigned position = params.first_token + token;
  KvRow from = kv_row(source, params.from[position / source.block_len], params.first_layer + layer, part,
                      position % source.block_len, params.first_head + head);
  unsigned block = position / target.block_len - params.first_token / target.block_len;
  KvRow to = kv_row(target, params.to[block], params.to_first_layer + layer, part, position % target.block_len,
                    params.to_first_head + head);
  if (source.dtype == target.dtype) {
    copy_row(to.data, from.data, kv_row_bytes(source));
    if (to.scale && threadIdx.x % kWarp == 0) *to.scale = *from.scale;
    return;
  }
  float scale = from.scale ? *from.scale : 1.0f;
  kv_write_row(target, to, [&](unsigned i) { return kv_read(source.dtype, from.data, i, scale); });
}

KERNEL(convert_blocks, 256, ConvertBlocks) {
  unsigned warps = blockDim.x / kWarp, rows = 2 * params.heads * params.tokens * params.layers;
  for (unsigned index = blockIdx.x * warps + threadIdx.x / kWarp; index < rows; index += gridDim.x * warps)
    convert_row(params, index);
}

struct ZeroTail {
  uint8_t* const* blocks;       // [blocks]
  const uint32_t* from_token;   // [blocks]: tokens from this one on become zero, in all layers
  KvShape shape;
  uint32_t layers;
  uint32_t reserved;
};

// Blocks along x, layers along y; a warp for each row.
KERNEL(zero_tail, 256, ZeroTail) {
  const KvShape& shape = params.shape;
  unsigned from_token = params.from_token[blockIdx.x], warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (shape.block_len <= from_token) return;
  unsigned rows = 2 * shape.kv_heads * (shape.block_len - from_token), bytes = kv_row_bytes(shape);
  for (unsigned index = threadIdx.x / kWarp; index < rows; index += warps) {
    KvRow row = kv_row(shape, params.blocks[blockIdx.x], blockIdx.y, KvPart(index % 2), from_token + index / 2 / shape.kv_heads,
                       index / 2 % shape.kv_heads);
    for (unsigned i = lane; i < bytes; i += kWarp) row.data[i] = 0;
    if (row.scale && lane == 0) *row.scale = 0.0f;
  }
}
