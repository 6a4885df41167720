// Kernels with one mistake each, and how they should be: the emulator must find the mistake and nothing else. The tests are in
// `tests/emulator.rs`.
#define TIDEMILL_EMULATOR
#include "cuda.h"

static const emulator::Kernel* kernel_list = nullptr;

#include "../hopper.cuh"

namespace {

struct Planted {
  uint32_t* out;       // [threads of the grid]
  const uint32_t* in;  // likewise
  uint32_t wrong;      // whether to make the mistake
  uint32_t reserved;
};

using Numbers = uint32_t[128];

}  // namespace

// Each thread reads what its neighbour wrote.
KERNEL(barrier_between_write_and_read, 128, Planted) {
  SHARED(Numbers, numbers);
  unsigned thread = threadIdx.x;
  numbers[thread] = params.in[thread];
  if (!params.wrong) __syncthreads();
  params.out[thread] = numbers[thread ^ 1];
}

// The same memory is used again.
KERNEL(barrier_between_read_and_write, 128, Planted) {
  SHARED(Numbers, numbers);
  unsigned thread = threadIdx.x;
  uint32_t sum = 0;
  for (unsigned round = 0; round < 2; round++) {
    numbers[thread] = params.in[thread] + round;
    __syncthreads();
    sum += numbers[(thread + 64) % 128];
    if (!params.wrong) __syncthreads();
  }
  params.out[thread] = sum;
}

// Lanes of a warp wait for each other, but a shuffle is no promise about memory.
KERNEL(warp_barrier, 128, Planted) {
  SHARED(Numbers, numbers);
  unsigned thread = threadIdx.x;
  numbers[thread] = params.in[thread];
  if (params.wrong)
    __shfl_xor_sync(kAllLanes, thread, 1);
  else
    __syncwarp();
  params.out[thread] = numbers[thread ^ 31];
}

// Blocks are not ordered.
KERNEL(sum_of_blocks, 128, Planted) {
  if (params.wrong)
    params.out[threadIdx.x] += params.in[threadIdx.x];
  else
    atomicAdd(&params.out[threadIdx.x], params.in[threadIdx.x]);
}

KERNEL(bounds_of_an_allocation, 128, Planted) {
  unsigned thread = threadIdx.x;
  params.out[thread] = params.in[thread + params.wrong];
}

KERNEL(bounds_of_shared_memory, 128, Planted) {
  SHARED(Numbers, numbers);
  unsigned thread = threadIdx.x;
  numbers[thread + params.wrong] = params.in[thread];
  params.out[thread] = numbers[thread + params.wrong];
}

KERNEL(written_before_it_is_read, 128, Planted) {
  SHARED(Numbers, numbers);
  unsigned thread = threadIdx.x;
  if (!params.wrong || thread != 77) numbers[thread] = params.in[thread];
  __syncthreads();
  params.out[thread] = numbers[127 - thread];
}

KERNEL(barrier_for_all_threads, 128, Planted) {
  if (!params.wrong || threadIdx.x < 64)
    __syncthreads();
  else
    __syncwarp();
  params.out[threadIdx.x] = params.in[threadIdx.x];
  __syncthreads();
}

KERNEL(shuffle_for_all_lanes, 128, Planted) {
  unsigned lane = threadIdx.x % kWarp;
  uint32_t other = 0;
  if (!params.wrong || lane != 3) other = __shfl_xor_sync(kAllLanes, lane, 1);
  params.out[threadIdx.x] = other;
}

KERNEL(alignment, 128, Planted) {
  const uint8_t* bytes = (const uint8_t*)params.in + params.wrong;
  params.out[threadIdx.x] = *(const uint32_t*)bytes;
}

// Each thread copies 16 bytes, of which it then reads the first four; only the first 32 threads.
struct __align__(16) Copied {
  uint32_t numbers[128];
};

KERNEL(wait_for_a_copy, 128, Planted) {
  SHARED(Copied, copied);
  unsigned thread = threadIdx.x;
  if (thread < 32) {
    copy_async_16(&copied.numbers[4 * thread], &params.in[4 * thread]);
    commit_copies();
    // One group may be left, which is the one that is needed.
    if (params.wrong)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    params.out[thread] = copied.numbers[4 * thread];
    wait_for_copies<0>();
  }
}

// The thread that waits may read; others may after a barrier.
KERNEL(barrier_after_a_copy, 128, Planted) {
  SHARED(Copied, copied);
  unsigned thread = threadIdx.x;
  if (thread < 32) {
    copy_async_16(&copied.numbers[4 * thread], &params.in[4 * thread]);
    commit_copies();
    wait_for_copies<0>();
  }
  if (!params.wrong) __syncthreads();
  if (thread < 32) params.out[thread] = copied.numbers[4 * (31 - thread)];
}

// A copy may read its source at any time until it is waited for.
KERNEL(source_of_a_copy, 128, Planted) {
  SHARED(Copied, copied);
  unsigned thread = threadIdx.x;
  if (thread < 32 && blockIdx.x == 0) {
    copy_async_16(&copied.numbers[4 * thread], &params.out[4 * thread]);
    commit_copies();
    if (!params.wrong) wait_for_copies<0>();
  }
  __syncthreads();
  if (blockIdx.x == 0) params.out[thread] = thread;
  wait_for_copies<0>();
}

// A warp loads matrices whose rows other threads wrote.
struct __align__(16) Matrices {
  uint16_t rows[32][8];
};

KERNEL(barrier_before_matrices, 128, Planted) {
  SHARED(Matrices, matrices);
  unsigned thread = threadIdx.x;
  for (unsigned i = 0; i < 2; i++) matrices.rows[thread / 4][thread % 4 * 2 + i] = uint16_t(params.in[thread]);
  if (!params.wrong) __syncthreads();
  uint32_t loaded[4];
  load_matrices(loaded, matrices.rows[thread % 32]);
  params.out[thread] = loaded[0] + loaded[3];
}

KERNEL(rows_of_matrices_are_aligned, 128, Planted) {
  SHARED(Matrices, matrices);
  unsigned thread = threadIdx.x;
  for (unsigned i = 0; i < 2; i++) matrices.rows[thread / 4][thread % 4 * 2 + i] = uint16_t(params.in[thread]);
  __syncthreads();
  uint32_t loaded[4];
  load_transposed(loaded, (const uint8_t*)matrices.rows[thread % 16] + (params.wrong ? 8 : 0));
  params.out[thread] = loaded[1];
}

KERNEL(a_product_of_all_lanes, 128, Planted) {
  unsigned thread = threadIdx.x;
  uint32_t a[4] = {params.in[thread], 0, 0, 0};
  float sum[4] = {};
  if (!params.wrong || thread % kWarp != 9) add_product_bf16(sum, a, 0, 0);
  params.out[thread] = uint32_t(sum[0]);
}

// The same of what Hopper has: a file of its own, in the same list.
#include "planted_hopper.h"

extern "C" const emulator::Kernel* tidemill_emulator_planted() { return kernel_list; }
