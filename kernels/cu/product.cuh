// What the kernels of matrix products share.
#pragma once

#include "device.cuh"

struct Product {
  void* out;         // [rows][outputs], of the other's type or of f32
  const void* x;     // [rows][inputs]
  const void* w;     // [outputs][inputs]
  const void* bias;  // [outputs] or null
  uint32_t rows;
  uint32_t inputs;
  uint32_t outputs;
  uint32_t adds;  // whether to add to what `out` has
};
