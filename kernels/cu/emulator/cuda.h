// CUDA C++ as far as our kernels use it, for the C++ compiler of the machine: what a kernel sees instead of CUDA's own words.
//
// The kernels are compiled with `-fsanitize=thread`, which makes the compiler call a function before each access to memory.
// Those functions are ours (`emulator.cpp`, which also says what is found out); no sanitizer's library is linked.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
// For what is no part of a kernel: its accesses are the emulator's own.
#define UNWATCHED __attribute__((no_sanitize("thread")))

namespace emulator {

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

// All threads of the block meet, on the same line. Says for how many of them `predicate` is not zero.
int meet_block(int predicate, int line);
// All 32 lanes of the warp meet; what each brought, by lane, until they meet again. `orders_memory` as `__syncwarp` does.
const uint64_t* meet_warp(unsigned mask, uint64_t value, bool orders_memory);
unsigned lane();

// What a lane brings to a product of matrices.
struct Fragment {
  uint32_t a[4], b[2];
};
// All 32 lanes of the warp meet; what each brought, by lane, until they meet again.
const Fragment* meet_fragments(const Fragment& brought);

// A variable in shared memory: the same one for all threads of a block that ask with the same key.
void* shared_variable(const void* key, size_t bytes, size_t alignment);
// The shared memory whose size is given at launch.
void* dynamic_shared(size_t alignment);

// An access by an operation that is not the compiler's own: an atomic one, or one of several lanes together.
enum class Access { read, write, atomic };
void access(const void* address, size_t bytes, Access kind);

// Copies that are in flight until the thread waits for their group.
void begin_copy(void* shared, const void* global, unsigned bytes, unsigned taken);
void commit_copies();
void wait_for_copies(unsigned groups_left);

[[noreturn]] void fail(const char* what);

// A kernel by name. Its parameters are one structure.
struct Kernel {
  const char* name;
  unsigned max_threads;
  size_t params_bytes;
  void (*run)(const void* params);
  const Kernel* next;
};

// Links a kernel into the list of its file.
struct Registration {
  Registration(Kernel& kernel, const Kernel*& list) {
    kernel.next = list;
    list = &kernel;
  }
};

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())

// Whoever includes kernels defines `kernel_list` first.
#define KERNEL(NAME, MAX_THREADS, PARAMS)                                                                \
  static void NAME(const PARAMS& params);                                                                \
  static ::emulator::Kernel NAME##_kernel{                                                               \
      #NAME, MAX_THREADS, sizeof(PARAMS), [](const void* params) { NAME(*(const PARAMS*)params); }, nullptr}; \
  static const ::emulator::Registration NAME##_registration{NAME##_kernel, kernel_list};                 \
  static void NAME(const PARAMS& params)

// The key is the address of a variable of the declaration's own.
#define SHARED(TYPE, NAME)       \
  static const char NAME##_key = 0; \
  TYPE& NAME = *(TYPE*)::emulator::shared_variable(&NAME##_key, sizeof(TYPE), alignof(TYPE))
#define DYNAMIC_SHARED(TYPE, NAME) TYPE* NAME = (TYPE*)::emulator::dynamic_shared(1024)

inline void __syncthreads(int line = __builtin_LINE()) { ::emulator::meet_block(0, line); }
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) { return ::emulator::meet_block(predicate, line); }
inline void __syncwarp(unsigned mask = ~0u) { ::emulator::meet_warp(mask, 0, true); }

namespace emulator {
template <class T>
UNWATCHED inline T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "lanes exchange at most eight bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  const uint64_t* brought = meet_warp(mask, bits, false);
  // A lane beyond the warp leaves the value as it is.
  bits = source < 32 ? brought[source] : bits;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, unsigned source) {
  return ::emulator::shuffle(mask, value, source % 32);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  return ::emulator::shuffle(mask, value, ::emulator::lane() ^ distance);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return ::emulator::shuffle(mask, value, ::emulator::lane() - distance);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return ::emulator::shuffle(mask, value, ::emulator::lane() + distance);
}
UNWATCHED inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* brought = ::emulator::meet_warp(mask, predicate != 0, false);
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < 32; lane++) lanes |= unsigned(brought[lane]) << lane;
  return lanes;
}

template <class T>
UNWATCHED inline T atomicAdd(T* address, T value) {
  ::emulator::access(address, sizeof(T), ::emulator::Access::atomic);
  T old;
  __builtin_memcpy(&old, address, sizeof(T));
  T sum = old + value;
  __builtin_memcpy(address, &sum, sizeof(T));
  return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
