// What C++ cannot say: one function for each PTX instruction that we use, but those of Hopper alone (`hopper.cuh`). Their twins for the
// emulator, which give the same bits, are in `emulator/instructions.h`.
//
// Source: NVIDIA, "Parallel Thread Execution ISA", sections 9.7.9 (conversion, asynchronous copies) and 9.7.15 (matrices).
#pragma once

#include "e4m3.cuh"

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

#if __CUDA_ARCH__ < 890
// Two codes of E4M3 to half precision, which has all of their numbers.
__device__ __forceinline__ uint32_t e4m3_to_f16(uint16_t codes) {
  uint32_t spread = (codes & 0xff) | uint32_t(codes & 0xff00) << 8, magnitude = spread & 0x007f007f, wide = magnitude << 7;
  // The exponent's bias is 7 there and 15 here: times 2^8.
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(wide) : "r"(0x5c005c00));
  // 0x7f is no number; one more carries into the eighth bit.
  wide |= ((magnitude + 0x00010001) & 0x00800080) * 0xfe;
  return wide | (spread & 0x00800080) << 8;
}
#endif

// Two codes of E4M3 to f32, the low byte first. What is no number becomes one.
__device__ __forceinline__ void e4m3_to_f32(float (&wide)[2], uint16_t codes) {
#if 890 <= __CUDA_ARCH__
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  wide[0] = f16_to_f32(uint16_t(halves));
  wide[1] = f16_to_f32(uint16_t(halves >> 16));
#else
  wide[0] = by_bits::e4m3_to_f32(uint8_t(codes));
  wide[1] = by_bits::e4m3_to_f32(uint8_t(codes >> 8));
#endif
}

// The first becomes the low byte: to the nearest, ties to even; 448 of what is beyond it, 0x7f of what is no number.
__device__ __forceinline__ uint16_t f32_to_e4m3(float low, float high) {
#if 890 <= __CUDA_ARCH__
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
#else
  return uint16_t(by_bits::f32_to_e4m3(low) | by_bits::f32_to_e4m3(high) << 8);
#endif
}

// Copies from global to shared memory that go on while the thread does: 16 bytes, of which the first `taken` are read and
// the rest become zero. What is copied may be read by the thread once it waited for the group, and by others after a barrier.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, unsigned taken = 16) {
  unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(taken) : "memory");
}

// The same of 4 or 8 bytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the last few.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 rows of 8 elements of 16 bits, from shared memory to a warp: lane `8 * i + r` names row `r` of matrix `i`, 16 bytes
// that lie together. Of each matrix a lane gets the elements 2t and 2t + 1 of row g, where g is the lane's number over 4 and t the rest.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  unsigned from = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// The same of the transposed matrices: a lane gets the elements g of the rows 2t and 2t + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
  unsigned from = unsigned(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// Adds the product of a matrix of 16 rows and 16 columns and one of 16 rows and 8 columns. With g and t as above, of the first a
// lane has rows g and g + 8 of columns 2t, 2t + 1, then both of columns 2t + 8, 2t + 9; of the second, column g of rows 2t, 2t + 1, then
// of rows 2t + 8, 2t + 9; of the sum, columns 2t, 2t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void add_product_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void add_product_f16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of int8, twice as many columns of the first and rows of the second: where two elements of 16 bits are there, four are here.
__device__ __forceinline__ void add_product_int8(int32_t (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of E4M3, with sums of f32. GPUs without an instruction for it widen both sides to half precision, which has all of their
// numbers: of a lane's four bytes the first two are what it has of one matrix of 16 columns, the other two of its other half. That is another
// order of columns, for both sides.
__device__ __forceinline__ void add_product_e4m3(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if 890 <= __CUDA_ARCH__
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (unsigned half = 0; half < 2; half++) {
    uint32_t b = half == 0 ? b0 : b1;
    uint32_t wide[4] = {e4m3_to_f16(uint16_t(a[2 * half])), e4m3_to_f16(uint16_t(a[2 * half + 1])), e4m3_to_f16(uint16_t(a[2 * half] >> 16)),
                        e4m3_to_f16(uint16_t(a[2 * half + 1] >> 16))};
    add_product_f16(sum, wide, e4m3_to_f16(uint16_t(b)), e4m3_to_f16(uint16_t(b >> 16)));
  }
#endif
}

#endif
