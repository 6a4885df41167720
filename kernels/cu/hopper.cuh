// What Hopper (compute capability 9.0) has beyond older GPUs: copies of whole tiles (TMA), barriers in shared memory that count them, and
// products of a warpgroup's 64 rows that read shared memory themselves (wgmma). One function for each PTX instruction; their twins for
// the emulator, which also knows how they are used wrongly, are in `emulator/hopper.h`.
//
// Source: NVIDIA, "Parallel Thread Execution ISA", on `cp.async.bulk.tensor`, `mbarrier`, `setmaxnreg` and `wgmma`, with the layouts of its
// matrices in shared memory; CUTLASS, comments of `mma_traits_sm90_gmma.hpp`, on the same layouts.
#pragma once

#include "device.cuh"

// Where a tensor lies in memory and how a tile of it is copied: `TensorMap` in `src/cuda/tensor_map.rs`, as the driver encodes it.
struct __align__(128) TensorMap {
  uint64_t words[16];
};

// A barrier in shared memory. A phase of it is over when all arrivals, and all bytes that they said come, are there.
struct __align__(8) Barrier {
  uint64_t state;
};

#if !defined(TIDEMILL_EMULATOR)

__device__ __forceinline__ uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

// ---- Barriers ---------------------------------------------------------------------------------------------------------------

// One thread makes a barrier, and makes it known to copies; others use it after `__syncthreads`.
__device__ __forceinline__ void make_barrier(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void make_barriers_known() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and says how many bytes copies will bring besides.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over: 0 for the first, 1 for the second. That of parity 1 "before the first" is over.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, unsigned parity) {
  uint32_t is_over;
  do {
    asm volatile(
        "{\n.reg .pred over;\nmbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
        : "=r"(is_over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!is_over);
}

// Some warps of the block meet: `threads` of those that name the same number, from 1 to 15. `tell_some` arrives without waiting.
__device__ __forceinline__ void meet_some(unsigned number, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void tell_some(unsigned number, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What the thread has written to shared memory is seen by copies and products of whoever learns of it after this.
__device__ __forceinline__ void fence_proxies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// All warps of a warpgroup have this many registers from now on: more or less than the kernel began with.
template <unsigned kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <unsigned kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Copies of tiles --------------------------------------------------------------------------------------------------------

// One thread asks for a tile, whose first element has these coordinates, the innermost first. What is beyond the tensor is zero. The
// bytes of the whole tile arrive at the barrier. `shared` is a multiple of 128; with swizzle a tile should begin at a multiple of 1024.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_tile(void* shared, const TensorMap* map, Barrier* barrier, int32_t x, int32_t y, int32_t z,
                                          int32_t u, int32_t v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v)
      : "memory");
}

// ---- Products of a warpgroup --------------------------------------------------------------------------------------------------

// A matrix in shared memory, in rows of 128 bytes whose chunks of 16 are swizzled, as copies leave them. `stride`: from eight rows to the
// next eight. `leading`: of a transposed matrix, from 64 columns to the next 64. Both in bytes.
__device__ __forceinline__ uint64_t describe_operand(const void* shared, unsigned leading, unsigned stride) {
  return uint64_t(shared_address(shared) >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// The compiler does not move uses of a register over this.
template <unsigned kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (unsigned i = 0; i < kCount; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

template <unsigned kRows>
__device__ __forceinline__ void hold(uint32_t (&registers)[kRows][4]) {
#pragma unroll
  for (unsigned i = 0; i < 4 * kRows; i++) asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
}

// Before products that use registers which were used by anything but such products.
template <class... Registers>
__device__ __forceinline__ void begin_products(Registers&... registers) {
  (hold(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last few: then `registers` may be used, if they are those of a group that is over.
template <unsigned kLeft, class... Registers>
__device__ __forceinline__ void wait_for_products(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
  (hold(registers), ...);
}

// A thread's registers as operands, and their names in PTX.
#define SUMS_8(S, I) "+f"(S[I]), "+f"(S[I + 1]), "+f"(S[I + 2]), "+f"(S[I + 3]), "+f"(S[I + 4]), "+f"(S[I + 5]), "+f"(S[I + 6]), "+f"(S[I + 7])
#define SUMS_32(S, I) SUMS_8(S, I), SUMS_8(S, I + 8), SUMS_8(S, I + 16), SUMS_8(S, I + 24)
#define SUMS_64(S, I) SUMS_32(S, I), SUMS_32(S, I + 32)
#define SUMS_128(S, I) SUMS_64(S, I), SUMS_64(S, I + 64)
#define NAMES_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define NAMES_OF_32 NAMES_0
#define NAMES_OF_64 NAMES_0 ", " NAMES_32
#define NAMES_OF_128 NAMES_0 ", " NAMES_32 ", " NAMES_64 ", " NAMES_96

// Adds a product of 64 rows of 16 elements and as many columns as twice the sums of a thread. Both sides are in shared memory, rows of
// the one and columns of the other, with their 16 elements together. Where `adds` is false what is in the sums does not count. Of each
// eight columns a thread has the sums of columns 2t and 2t + 1 of row g, then of row g + 8, where g is its lane over 4 and t the rest;
// its warp has 16 rows.
#define ADD_TILE(COUNT, COLUMNS, ELEMENT, TYPE, LEFT, RIGHT, ADDS)                                                          \
  __device__ __forceinline__ void add_tile(ELEMENT, float (&sums)[COUNT], uint64_t left, uint64_t right, bool adds) {       \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS            \
                 "k16.f32." TYPE "." TYPE " {" NAMES_OF_##COUNT "}, " LEFT ", " RIGHT ", adds, 1, 1, 0, 0;\n}"               \
                 : SUMS_##COUNT(sums, 0)                                                                                    \
                 : "l"(left), "l"(right), "r"(int32_t(adds)));                                                              \
  }
ADD_TILE(32, "64", bf16, "bf16", "%32", "%33", "%34")
ADD_TILE(32, "64", f16, "f16", "%32", "%33", "%34")
ADD_TILE(64, "128", bf16, "bf16", "%64", "%65", "%66")
ADD_TILE(64, "128", f16, "f16", "%64", "%65", "%66")
ADD_TILE(128, "256", bf16, "bf16", "%128", "%129", "%130")
ADD_TILE(128, "256", f16, "f16", "%128", "%129", "%130")

// The same with the left side in registers, as sums come out but in pairs; of the right side the 16 elements of a column are in 16 rows.
#define ADD_TILE_TRANSPOSED(COUNT, COLUMNS, ELEMENT, TYPE, LEFT, RIGHT)                                                        \
  __device__ __forceinline__ void add_tile_transposed(ELEMENT, float (&sums)[COUNT], const uint32_t (&left)[4], uint64_t right) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES_OF_##COUNT "}, {" LEFT "}, " RIGHT \
                 ", 1, 1, 1, 1;"                                                                                              \
                 : SUMS_##COUNT(sums, 0)                                                                                      \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));                                       \
  }
ADD_TILE_TRANSPOSED(32, "64", bf16, "bf16", "%32, %33, %34, %35", "%36")
ADD_TILE_TRANSPOSED(32, "64", f16, "f16", "%32, %33, %34, %35", "%36")
ADD_TILE_TRANSPOSED(64, "128", bf16, "bf16", "%64, %65, %66, %67", "%68")
ADD_TILE_TRANSPOSED(64, "128", f16, "f16", "%64, %65, %66, %67", "%68")

// 2^x, to some 22 bits; nothing of minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

#else
#include "emulator/hopper.h"
#endif

// Where a block is in the ring of stages.
template <unsigned kStages>
struct RingPlace {
  unsigned stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};
