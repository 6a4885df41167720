// What the emulator knows of a launch in progress, for the files that it is made of.
#pragma once
#include "hopper.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// ---- Fibers --------------------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarp = 32;

#if defined(__x86_64__)
// Keeps what a called function has to keep (System V ABI), and goes on where `to` was left.
extern "C" void tidemill_switch_stack(void** from, void* to);

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, void (*entry)()) {
    void** top = (void**)(uintptr_t(stack + kStackBytes) & ~uintptr_t(15));
    *--top = nullptr;  // The stack is off by eight where a function begins.
    *--top = (void*)entry;
    top -= 6;
    std::fill(top, top + 6, nullptr);
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) { tidemill_switch_stack(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// ---- Who accessed a byte, and when -----------------------------------------------------------------------------------------

// A thread, or all of those that the smallest common group of several threads has: warp, block, everything. The ids of a block's
// threads are followed by those of its barriers in shared memory, for whatever the copies wrote that such a barrier counts.
struct Owner {
  unsigned level : 2;
  unsigned atomic : 1;
  unsigned id : 29;
};

struct Cell {
  uint32_t write_time;
  Owner writer;
  uint32_t read_time;
  Owner reader;
};

// Times. The clock goes on with each meeting that orders memory.
constexpr uint32_t kNever = 0, kHost = 1, kInFlight = ~0u;

struct Region {
  char* first;
  size_t bytes;
  std::vector<Cell> cells;
};

// What one device has: allocations by their address.
struct Memory {
  std::map<uintptr_t, Region> regions;
  // Where the next launch begins: whatever is earlier comes before it.
  uint32_t clock = kHost + 1;
};

// By thread and barrier of a block: what they did before this time comes before. Empty: nothing is known.
using Knowledge = std::vector<uint32_t>;

enum class State { ready, at_barrier, in_warp, at_phase, at_named, in_warpgroup, done };

struct Copy {
  char* shared;
  const char* global;
  unsigned bytes, taken;
  unsigned group;
};

// A copy of a tile that is in flight.
struct TileCopy {
  TileMap map;
  int32_t coordinates[5];
  char* shared;
};

// A barrier in shared memory that counts arrivals and bytes.
struct PhaseBarrier {
  const void* place;
  unsigned number;
  Owner maker;
  uint32_t made_at;
  bool is_known;  // to copies
  unsigned expected, pending;
  int64_t bytes;  // that are expected and not there yet
  unsigned phases;  // that are over
  Knowledge arriving, completed;
  std::vector<TileCopy> copies;
};

// A barrier of some of the block's threads.
struct NamedBarrier {
  unsigned threads, arrived, generation;
  Knowledge arriving, completed[2];
};

// Products of a thread's warpgroup that add to the same registers and are in flight: what they come to.
struct Sums {
  float* place;
  std::vector<float> values;
  unsigned group;
};

// Registers that a product in flight reads.
struct LeftSide {
  const uint32_t* place;
  unsigned group;
};

struct Thread {
  Context context;
  Index index;
  unsigned number;  // In its block.
  State state;
  unsigned generation;
  unsigned groups;  // Of copies, begun so far.
  std::deque<Copy> copies;

  Knowledge seen;
  PhaseBarrier* awaited;
  unsigned parity;
  NamedBarrier* named;
  std::vector<uint32_t> proxy_fences;  // Times: whatever was written at them or before.
  unsigned product_groups;             // Of products, begun so far.
  std::vector<Sums> sums;
  std::vector<LeftSide> left_sides;
  unsigned register_fences;
  std::vector<uint32_t> touched;  // By word of the stack: after how many such fences it was used last.
};

struct Warp {
  uint64_t slots[2][kWarp];
  Fragment fragments[2][kWarp];
  unsigned arrived, generation;
  bool orders_memory;
  uint32_t ordered_at;
};

constexpr unsigned kWarpgroup = 128;

// Four warps, on their way into one product.
struct Warpgroup {
  unsigned arrived, generation;
  TileProduct product;
  float* sums[kWarpgroup];
  const uint32_t* left[kWarpgroup];
};

// Shared memory that a warpgroup's products read.
struct Reading {
  const char* first;
  size_t bytes;
  unsigned warpgroup, group;
  uint32_t over_at[4];  // For each warp: when it had waited, or `kNever`.
};

// Shared memory that a copy has written in this order.
struct Landed {
  const char* first;
  size_t bytes;
  unsigned swizzle;
};

struct Variable {
  const void* key;
  char* first;
  size_t bytes;
};

// One launch in progress.
struct Launch {
  Memory* memory;
  const Kernel* kernel;
  Index grid, block_size, block;
  unsigned threads, block_number;
  unsigned ids;  // Of a block: one for each thread and each barrier that it may have.
  unsigned dynamic_bytes;
  std::vector<char> params_memory;
  char* params;  // In it, aligned as a kernel's parameters are.

  std::vector<Thread> all;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> stacks;  // Not filled: most of it is never touched.
  Context scheduler;
  Thread* running;
  unsigned alive, waiting, generation;
  int count, counted, line;
  uint32_t ordered_at;

  Region shared;
  std::vector<Variable> variables;
  size_t shared_used;
  Region* last_region;

  std::deque<PhaseBarrier> barriers;
  NamedBarrier named[16];
  std::vector<Warpgroup> warpgroups;
  std::vector<Reading> readings;
  std::vector<Landed> landed;

  uint32_t clock, began;
  bool failed;
  char* message;
  size_t message_bytes;
};

// Barriers in shared memory that a block may have.
constexpr unsigned kBarriers = 64;

extern thread_local Launch* current;

// ---- What the files call of each other ---------------------------------------------------------------------------------------

[[noreturn]] void fail_with(const char* format, ...);
[[noreturn]] void fail_at(const char* what, const Region* region, const char* address, size_t bytes);
void leave_thread();
void look_at(const char* address, size_t bytes, Access kind);
// The allocation or the shared memory that has these bytes, or null.
Region* region_of(const char* address, size_t bytes);
// Whether what `owner` did at `time` comes before what a thread does now.
bool ordered(const Thread& thread, Owner owner, uint32_t time);

// Of `hopper.cpp`: before a block runs, when a thread is over, and whether one that waits may go on.
void begin_block(Launch& launch);
void end_thread(Thread& thread);
bool may_go_on(const Launch& launch, const Thread& thread);
// Lanes whose warp has met in `__syncwarp` know what each of them does.
void share_knowledge(Launch& launch, unsigned warp);
// Accesses to a local variable, and writes to shared memory.
void look_at_registers(Thread& thread, const char* address, size_t bytes, Access kind);
void look_at_readings(const char* address, size_t bytes);

}  // namespace emulator
