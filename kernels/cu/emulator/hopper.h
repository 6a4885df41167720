// The functions of `hopper.cuh` without a GPU, and what the emulator takes for them; it is modelled in `hopper.cpp`.
#pragma once

#include "cuda.h"

namespace emulator {

// What `TensorMap` in `src/cuda/tensor_map.rs` has, which a GPU's driver would encode.
struct TileMap {
  uint64_t first;
  uint64_t strides[4];  // In bytes, of all dimensions but the innermost.
  uint32_t sizes[5];
  uint32_t tile[5];
  uint32_t rank;
  uint32_t swizzle;  // Bytes of a row among which chunks of 16 change places; 0: none do.
  uint32_t reserved[10];
};
static_assert(sizeof(TileMap) == 128, "as long as a GPU's");

// A product of 64 rows, 16 elements of 16 bits each, with `columns`: what all threads of a warpgroup say alike.
struct TileProduct {
  uint64_t left;  // Unless it is in registers.
  uint64_t right;
  unsigned columns;
  bool left_in_registers, right_is_transposed, adds, is_bf16;
};

void make_barrier(void* place, unsigned arrivals);
void make_barriers_known();
void arrive(void* place, unsigned expected_bytes);
void wait_for_phase(void* place, unsigned parity);
void copy_tile(void* shared, const TileMap& map, const int32_t* coordinates, unsigned rank, void* barrier);
void fence_proxies();
void meet_named(unsigned number, unsigned threads, bool waits);

uint64_t describe_operand(const void* shared, unsigned leading, unsigned stride);
void fence_registers();
void multiply_tile(float* sums, const uint32_t* left, const TileProduct& product);
void commit_products();
void wait_for_products(unsigned groups_left);

}  // namespace emulator

struct Barrier;
struct TensorMap;
struct bf16;

inline void make_barrier(Barrier* barrier, unsigned arrivals) { ::emulator::make_barrier(barrier, arrivals); }
inline void make_barriers_known() { ::emulator::make_barriers_known(); }
inline void arrive(Barrier* barrier) { ::emulator::arrive(barrier, 0); }
inline void arrive_expecting(Barrier* barrier, unsigned bytes) { ::emulator::arrive(barrier, bytes); }
inline void wait_for_phase(Barrier* barrier, unsigned parity) { ::emulator::wait_for_phase(barrier, parity); }

template <class... Coordinates>
UNWATCHED inline void copy_tile(void* shared, const TensorMap* map, Barrier* barrier, Coordinates... coordinates) {
  const int32_t all[] = {int32_t(coordinates)...};
  ::emulator::copy_tile(shared, *(const ::emulator::TileMap*)map, all, sizeof...(Coordinates), barrier);
}

inline void fence_proxies() { ::emulator::fence_proxies(); }
inline void meet_some(unsigned number, unsigned threads) { ::emulator::meet_named(number, threads, true); }
inline void tell_some(unsigned number, unsigned threads) { ::emulator::meet_named(number, threads, false); }
template <unsigned kRegisters>
inline void take_registers() {}
template <unsigned kRegisters>
inline void give_registers() {}

inline uint64_t describe_operand(const void* shared, unsigned leading, unsigned stride) {
  return ::emulator::describe_operand(shared, leading, stride);
}

template <class... Registers>
inline void begin_products(Registers&...) {
  ::emulator::fence_registers();
}

template <class T, unsigned kSums>
inline void add_tile(T, float (&sums)[kSums], uint64_t left, uint64_t right, bool adds) {
  ::emulator::multiply_tile(sums, nullptr, {left, right, 2 * kSums, false, false, adds, __is_same(T, bf16)});
}

template <class T, unsigned kSums>
inline void add_tile_transposed(T, float (&sums)[kSums], const uint32_t (&left)[4], uint64_t right) {
  ::emulator::multiply_tile(sums, left, {0, right, 2 * kSums, true, true, true, __is_same(T, bf16)});
}

inline void end_products() { ::emulator::commit_products(); }

template <unsigned kLeft, class... Registers>
inline void wait_for_products(Registers&...) {
  ::emulator::wait_for_products(kLeft);
}

// A device's has the first 22 bits of it.
inline float power_of_two(float x) { return exp2f(x); }
