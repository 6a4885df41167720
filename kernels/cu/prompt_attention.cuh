// What the kernels of prompts' attention share.
#pragma once

#include "kv.cuh"

// Rows that are computed together: neighbours in one sequence.
struct PromptTile {
  uint32_t first_row;
  uint32_t rows;
  uint32_t first_position;
  uint32_t sequence;  // which row of `blocks`
};

struct PromptAttention {
  void* out;                // [rows][query_heads][head_size]
  const void* query;        // [rows][query_stride]
  uint8_t* const* blocks;   // [sequences][blocks_per_sequence], from position 0 on
  const PromptTile* tiles;  // [tiles]
  KvShape shape;
  uint32_t layer;
  uint32_t blocks_per_sequence;
  uint32_t query_heads;
  uint32_t query_stride;
  uint32_t window;  // a row sees at most this many keys, its own included; 0: all
  float scale;      // of a product of query and key, times log2(e)
};

// The most rows of a tile.
constexpr unsigned kPromptRows = 64;
