// What ranks have computed of the same rows, side by side.
#include "device.cuh"

struct Join {
  float* out;          // [rows][width]
  const float* parts;  // [ranks][stride]: a rank's [rows][its part of width]
  uint32_t width;
  uint32_t ranks;
  uint32_t stride;
  uint32_t reserved;
};

// Rows along y, elements along x. Rank r has elements from r * width / ranks up to where the next rank's begin.
KERNEL(join_parts, 256, Join) {
  unsigned row = blockIdx.y, all = gridDim.x * blockDim.x;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < params.width; i += all) {
    unsigned rank = unsigned((uint64_t(i + 1) * params.ranks - 1) / params.width);
    unsigned first = unsigned(uint64_t(rank) * params.width / params.ranks);
    unsigned end = unsigned(uint64_t(rank + 1) * params.width / params.ranks);
    const float* part = params.parts + size_t(rank) * params.stride + size_t(row) * (end - first);
    params.out[size_t(row) * params.width + i] = part[i - first];
  }
}
