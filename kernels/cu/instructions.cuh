// What C++ cannot say: one function for each PTX instruction that we use. Their twins for the emulator, which give the same bits, are in
// `emulator/instructions.h`.
//
// Source: NVIDIA, "Parallel Thread Execution ISA", sections 9.7.9 (conversion, asynchronous copies) and 9.7.15 (matrices).
#pragma once

#if defined(TIDEMILL_EMULATOR)
#include "emulator/instructions.h"
#else

__device__ __forceinline__ float f16_to_f32(uint16_t x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
}

__device__ __forceinline__ uint16_t f32_to_f16(float x) {
  uint16_t narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
  return narrow;
}

__device__ __forceinline__ uint16_t f32_to_bf16(float x) {
  uint16_t narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
  return narrow;
}

// Copies from global to shared memory that go on while the thread does: 16 bytes, of which the first `taken` are read and
// the rest become zero. What is copied may be read by the thread once it waited for the group, and by others after a barrier.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, unsigned taken = 16) {
  unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(taken) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the last few.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif
