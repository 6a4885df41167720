// From tokens to rows of the embedding table.
#include "device.cuh"

struct Embedding {
  void* out;               // [rows][width]
  const void* table;       // [vocabulary][width]
  const uint32_t* tokens;  // [rows]; with kOfChosen: the place of a token in `chosen`
  const uint32_t* chosen;  // what the step before chose
  uint32_t width;
  uint32_t vocabulary;
};

constexpr uint32_t kOfChosen = 0x80000000u;

// One block per row.
template <class T>
__device__ void embed(const Embedding& params) {
  uint32_t token = params.tokens[blockIdx.x];
  if (token & kOfChosen) {
    token = params.chosen[token & ~kOfChosen];
    // Where none could be chosen the host leaves the row alone.
    if (params.vocabulary <= token) token = 0;
  }
  const T* from = (const T*)params.table + size_t(token) * params.width;
  T* to = (T*)params.out + size_t(blockIdx.x) * params.width;
  if (whole_packs<T>(params.width, from, to)) {
    unsigned packs = params.width / Pack<T>::kCount;
    for (unsigned i = threadIdx.x; i < packs; i += blockDim.x) ((Pack<T>*)to)[i] = ((const Pack<T>*)from)[i];
    return;
  }
  for (unsigned i = threadIdx.x; i < params.width; i += blockDim.x) to[i] = from[i];
}

KERNEL(embed_f32, 256, Embedding) { embed<float>(params); }
KERNEL(embed_f16, 256, Embedding) { embed<f16>(params); }
KERNEL(embed_bf16, 256, Embedding) { embed<bf16>(params); }
