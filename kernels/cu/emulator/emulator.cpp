// Runs CUDA kernels on a CPU, to find out whether they are right where there is no GPU.
//
// A fiber for each thread of a block; blocks one after another. A thread runs until it meets others (`__syncthreads`, a
// shuffle) or ends, and the caller chooses the order in which threads get their turns.
//
// The kernels call `__tsan_read…` and `__tsan_write…` before each access (see `cuda.h`). Each byte of device and shared memory has
// a cell that says who wrote and who read it last, and when. Found out are, with kernel, block, thread and place:
//
//   - an access outside of every allocation, of the kernel's parameters and of shared memory;
//   - reading what nobody has written;
//   - two threads that access the same byte, one of them writing, with nothing between them that orders the two:
//     a barrier of the block, a `__syncwarp` of the warp, or the end of the launch;
//   - reading what `cp.async` copies before the copy was waited for;
//   - what can go wrong with the instructions of Hopper (`hopper.cpp`);
//   - threads that wait for others that never come, or at different barriers; misaligned accesses.
//
// Ends of local variables are not looked at: `../check` lets no kernel have local variables in memory.
//
// Not modelled: memory orders weaker than that, warps that diverge around a meeting, partial masks, textures, clusters. Time is not
// either: nothing here says how fast a kernel is.
#include "state.h"

#include <cstdarg>
#include <cstdio>

namespace emulator {

thread_local Launch* current = nullptr;

#if defined(__x86_64__)
asm(R"(
.text
.globl tidemill_switch_stack
.type tidemill_switch_stack,@function
tidemill_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size tidemill_switch_stack, .-tidemill_switch_stack
)");
#endif

namespace {

// A block of any device of the last years has at least this much; what is beyond it a kernel has to ask for.
constexpr size_t kSharedBytes = 227 << 10;
// Between variables, so that the end of one is not the beginning of another.
constexpr size_t kGap = 64;

// The shared memory of the blocks that run on a thread of the host, kept from launch to launch: to take it each time costs more than
// a small kernel.
struct SharedMemory {
  std::vector<char> bytes = std::vector<char>(kSharedBytes + 1024, 0x7f);
  Region region{(char*)((uintptr_t(bytes.data()) + 1023) / 1024 * 1024), kSharedBytes, std::vector<Cell>(kSharedBytes)};
  size_t used = 0;
};

thread_local SharedMemory shared_memory;

// A launch has fewer meetings than there are times after this one.
constexpr uint32_t kLatest = 1u << 31;

// Times begin again: whatever was so far was at the time of the host.
void begin_again(Memory& memory) {
  for (auto& [first, region] : memory.regions)
    for (Cell& cell : region.cells) {
      cell.read_time = kNever;
      if (cell.write_time != kNever && cell.write_time != kInFlight) cell.write_time = kHost;
    }
  memory.clock = kHost + 1;
}

}  // namespace

void leave_thread() { Context::swap(current->running->context, current->scheduler); }

[[noreturn]] void fail_with(const char* format, ...) {
  Launch& launch = *current;
  int used = snprintf(launch.message, launch.message_bytes, "%s, block (%u, %u, %u), ", launch.kernel->name, launch.block.x,
                      launch.block.y, launch.block.z);
  if (launch.running) {
    const Index& index = launch.running->index;
    used += snprintf(launch.message + used, launch.message_bytes - used, "thread (%u, %u, %u): ", index.x, index.y, index.z);
  }
  va_list values;
  va_start(values, format);
  vsnprintf(launch.message + used, launch.message_bytes - used, format, values);
  va_end(values);
  launch.failed = true;
  leave_thread();
  __builtin_unreachable();  // The scheduler gives no turn after a failure.
}

namespace {

unsigned group_size(unsigned level) { return level == 0 ? 1 : level == 1 ? kWarp : current->ids; }

unsigned group_of(Owner owner, unsigned level) {
  // Ids of groups are those of their first thread, so that one field holds all levels.
  return level == 3 ? 0 : owner.id / group_size(level) * group_size(level);
}

}  // namespace

bool ordered(const Thread& thread, Owner owner, uint32_t time) {
  const Launch& launch = *current;
  if (time < launch.began) return true;
  Owner self{0, 0, launch.block_number * launch.ids + thread.number};
  if (owner.level == 0 && owner.id == self.id) return true;
  if (2 < owner.level || group_of(owner, 2) != group_of(self, 2)) return false;
  if (time < launch.ordered_at) return true;
  const Warp& warp = launch.warps[thread.number / kWarp];
  if (owner.level <= 1 && group_of(owner, 1) == group_of(self, 1) && time < warp.ordered_at) return true;
  if (thread.seen.empty()) return false;
  // Of a block all threads that there are.
  unsigned first = owner.id % launch.ids, last = owner.level == 2 ? launch.threads : first + group_size(owner.level);
  return std::all_of(thread.seen.begin() + first, thread.seen.begin() + last, [&](uint32_t seen) { return time < seen; });
}

namespace {

bool ordered(Owner owner, uint32_t time) { return ordered(*current->running, owner, time); }

Owner united(Owner a, Owner b) {
  for (unsigned level = std::max(a.level, b.level); level < 3; level++)
    if (group_of(a, level) == group_of(b, level)) return {level, 0, group_of(a, level)};
  return {3, 0, 0};
}

}  // namespace

Region* region_of(const char* address, size_t bytes) {
  Launch& launch = *current;
  auto holds = [&](const Region* region) {
    return region && region->first <= address && address + bytes <= region->first + region->bytes;
  };
  if (holds(&launch.shared)) {
    for (const Variable& variable : launch.variables)
      if (variable.first <= address && address + bytes <= variable.first + variable.bytes) return &launch.shared;
    return nullptr;
  }
  if (holds(launch.last_region)) return launch.last_region;
  auto after = launch.memory->regions.upper_bound(uintptr_t(address));
  if (after == launch.memory->regions.begin()) return nullptr;
  Region* region = &std::prev(after)->second;
  if (!holds(region)) return nullptr;
  return launch.last_region = region;
}

namespace {

const char* room(const Region* region) { return region == &current->shared ? "shared memory" : "an allocation"; }

}  // namespace

[[noreturn]] void fail_at(const char* what, const Region* region, const char* address, size_t bytes) {
  fail_with("%s: %zu bytes at byte %zu of %s of %zu", what, bytes, size_t(address - region->first), room(region), region->bytes);
}

namespace {

// Shared variables of the block itself or of the emulator are not memory of the device: the stacks, and the parameters.
bool is_private(const char* address, size_t bytes, Access kind) {
  Launch& launch = *current;
  auto within = [&](const char* memory, size_t size) { return memory <= address && address + bytes <= memory + size; };
  if (within(launch.stacks.get(), launch.threads * kStackBytes)) {
    size_t stack = size_t(address - launch.stacks.get()) / kStackBytes;
    if (stack != launch.running->number) fail_with("access to a local variable of thread %zu", stack);
    look_at_registers(*launch.running, address, bytes, kind);
    return true;
  }
  return kind == Access::read && within(launch.params, launch.kernel->params_bytes);
}

}  // namespace

void look_at(const char* address, size_t bytes, Access kind) {
  Launch& launch = *current;
  if (is_private(address, bytes, kind)) return;
  Region* region = region_of(address, bytes);
  if (!region) {
    const char* verb = kind == Access::read ? "reads" : "writes";
    fail_with("%s %zu bytes at %p, outside of every allocation", verb, bytes, (const void*)address);
  }
  if (region == &launch.shared && kind != Access::read) look_at_readings(address, bytes);
  Owner self{0, kind == Access::atomic, launch.block_number * launch.ids + launch.running->number};
  Cell* cells = region->cells.data() + (address - region->first);
  for (Cell* cell = cells; cell < cells + bytes; cell++) {
    if (cell->write_time == kInFlight) fail_at("a copy is in flight that was not waited for", region, address, bytes);
    if (cell->write_time == kNever && kind != Access::write) fail_at("reads what nobody wrote", region, address, bytes);
    bool both_atomic = kind == Access::atomic && cell->writer.atomic;
    if (cell->write_time != kNever && !both_atomic && !ordered(cell->writer, cell->write_time))
      fail_at("race with another thread's write", region, address, bytes);
    if (kind == Access::read) {
      bool replaced = cell->read_time == kNever || ordered(cell->reader, cell->read_time);
      cell->reader = replaced ? self : united(cell->reader, self);
      cell->read_time = launch.clock;
      continue;
    }
    if (cell->read_time != kNever && !ordered(cell->reader, cell->read_time))
      fail_at("race with another thread's read", region, address, bytes);
    cell->writer = self;
    cell->write_time = launch.clock;
    cell->read_time = kNever;
  }
}

namespace {

// ---- Turns ---------------------------------------------------------------------------------------------------------------------

void thread_body() {
  Launch& launch = *current;
  launch.kernel->run(launch.params);
  if (!launch.running->copies.empty()) fail_with("ends with copies in flight");
  end_thread(*launch.running);
  launch.running->state = State::done;
  launch.alive--;
  leave_thread();
}

bool may_run(Launch& launch, Thread& thread) {
  switch (thread.state) {
    case State::ready:
      return true;
    case State::at_barrier:
      if (thread.generation != launch.generation) return true;
      if (launch.waiting != launch.alive) return false;
      launch.waiting = 0;
      launch.counted = launch.count;
      launch.count = 0;
      launch.generation++;
      launch.ordered_at = ++launch.clock;
      return true;
    case State::in_warp:
      return thread.generation != launch.warps[thread.number / kWarp].generation;
    case State::at_phase:
    case State::at_named:
    case State::in_warpgroup:
      return may_go_on(launch, thread);
    case State::done:
      return false;
  }
  return false;
}

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

void shuffle_order(std::vector<unsigned>& order, uint64_t& random) {
  for (size_t i = order.size(); 1 < i; i--) std::swap(order[i - 1], order[next_random(random) % i]);
}

// Forwards, backwards, and from there on at random.
std::vector<unsigned> first_order(unsigned count, unsigned seed) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; i++) order[i] = seed == 1 ? count - 1 - i : i;
  return order;
}

void run_block(Launch& launch, unsigned seed) {
  for (unsigned number = 0; number < launch.threads; number++) {
    Thread& thread = launch.all[number];
    const Index& size = launch.block_size;
    thread.index = {number % size.x, number / size.x % size.y, number / (size.x * size.y)};
    thread.number = number;
    thread.state = State::ready;
    thread.groups = 0;
    thread.copies.clear();
    thread.context.prepare(launch.stacks.get() + number * kStackBytes, thread_body);
  }
  for (Warp& warp : launch.warps) warp = Warp{};
  launch.alive = launch.threads;
  launch.waiting = 0;
  launch.count = 0;
  launch.ordered_at = ++launch.clock;
  // As on a device: what an earlier block left, in no order that may be relied on.
  std::fill_n(launch.shared.first, launch.shared_used, char(0x7f));
  std::fill_n(launch.shared.cells.begin(), launch.shared_used, Cell{});
  launch.shared_used = 0;
  launch.variables.clear();
  begin_block(launch);

  uint64_t random = seed * 0x9e3779b97f4a7c15ull + launch.block_number + 1;
  std::vector<unsigned> order = first_order(launch.threads, seed);
  while (launch.alive) {
    if (1 < seed) shuffle_order(order, random);
    bool some_ran = false;
    for (unsigned number : order) {
      Thread& thread = launch.all[number];
      if (!may_run(launch, thread)) continue;
      some_ran = true;
      thread.state = State::ready;
      launch.running = &thread;
      Context::swap(launch.scheduler, thread.context);
      launch.running = nullptr;
      if (launch.failed) return;
    }
    if (some_ran || !launch.alive) continue;
    auto count = [&](State state) {
      return unsigned(std::count_if(launch.all.begin(), launch.all.end(), [&](const Thread& thread) { return thread.state == state; }));
    };
    snprintf(launch.message, launch.message_bytes,
             "%s, block (%u, %u, %u): %u threads wait at a barrier, %u for a phase in shared memory, %u in their warpgroups and %u in "
             "their warps for others that never come",
             launch.kernel->name, launch.block.x, launch.block.y, launch.block.z, launch.waiting + count(State::at_named),
             count(State::at_phase), count(State::in_warpgroup), count(State::in_warp));
    launch.failed = true;
    return;
  }
}

size_t aligned(size_t offset, size_t alignment) { return (offset + alignment - 1) / alignment * alignment; }

char* take_shared(const void* key, size_t bytes, size_t alignment) {
  Launch& launch = *current;
  for (const Variable& variable : launch.variables)
    if (variable.key == key) return variable.first;
  size_t first = aligned(launch.shared_used, std::max<size_t>(alignment, 16));
  if (launch.shared.bytes < first + bytes + kGap) fail_with("%zu bytes of shared memory are more than a block has", first + bytes);
  launch.variables.push_back({key, launch.shared.first + first, bytes});
  launch.shared_used = first + bytes + kGap;
  return launch.shared.first + first;
}

}  // namespace

// ---- What kernels call ---------------------------------------------------------------------------------------------------------

Index thread_index() { return current->running->index; }
Index block_index() { return current->block; }
Index block_size() { return current->block_size; }
Index grid_size() { return current->grid; }
unsigned lane() { return current->running->number % kWarp; }

void fail(const char* what) { fail_with("%s", what); }

int meet_block(int predicate, int line) {
  Launch& launch = *current;
  Thread& self = *launch.running;
  if (launch.waiting == 0) launch.line = line;
  if (launch.line != line) fail_with("waits at the barrier of line %d, others at that of line %d", line, launch.line);
  launch.count += predicate != 0;
  launch.waiting++;
  self.generation = launch.generation;
  self.state = State::at_barrier;
  leave_thread();
  return launch.counted;
}

const uint64_t* meet_warp(unsigned mask, uint64_t value, bool orders_memory) {
  Launch& launch = *current;
  Thread& self = *launch.running;
  Warp& warp = launch.warps[self.number / kWarp];
  unsigned generation = warp.generation;
  if (mask != ~0u) fail_with("a meeting of some lanes of a warp (mask %08x) is not modelled", mask);
  if (warp.arrived == 0) warp.orders_memory = orders_memory;
  if (warp.orders_memory != orders_memory) fail_with("lanes of one warp meet in different operations");
  warp.slots[generation & 1][self.number % kWarp] = value;
  warp.arrived |= 1u << self.number % kWarp;
  if (warp.arrived == ~0u) {
    warp.arrived = 0;
    warp.generation++;
    if (orders_memory) {
      warp.ordered_at = ++launch.clock;
      share_knowledge(launch, self.number / kWarp);
    }
  } else {
    self.generation = generation;
    self.state = State::in_warp;
    leave_thread();
  }
  return warp.slots[generation & 1];
}

const Fragment* meet_fragments(const Fragment& brought) {
  const Thread& self = *current->running;
  Warp& warp = current->warps[self.number / kWarp];
  Fragment* fragments = warp.fragments[warp.generation & 1];
  fragments[self.number % kWarp] = brought;
  meet_warp(~0u, 0, false);
  return fragments;
}

void* shared_variable(const void* key, size_t bytes, size_t alignment) { return take_shared(key, bytes, alignment); }

void* dynamic_shared(size_t alignment) {
  if (current->dynamic_bytes == 0) fail_with("uses dynamic shared memory, and the launch gives none");
  return take_shared(nullptr, current->dynamic_bytes, alignment);
}

void access(const void* address, size_t bytes, Access kind) {
  if (!current) return;
  if (uintptr_t(address) % bytes != 0) fail_with("%zu bytes at %p are misaligned", bytes, address);
  look_at((const char*)address, bytes, kind);
}

void begin_copy(void* shared, const void* global, unsigned bytes, unsigned taken) {
  Thread& self = *current->running;
  if (uintptr_t(shared) % bytes != 0 || uintptr_t(global) % bytes != 0) fail_with("a copy of %u bytes is misaligned", bytes);
  if (taken != 0) look_at((const char*)global, taken, Access::read);
  look_at((const char*)shared, bytes, Access::write);
  Region* region = region_of((const char*)shared, bytes);
  if (region != &current->shared) fail_with("an asynchronous copy goes to shared memory");
  Cell* cells = region->cells.data() + ((char*)shared - region->first);
  for (unsigned byte = 0; byte < bytes; byte++) cells[byte].write_time = kInFlight;
  self.copies.push_back({(char*)shared, (const char*)global, bytes, taken, self.groups});
}

void commit_copies() { current->running->groups++; }

void wait_for_copies(unsigned groups_left) {
  Thread& self = *current->running;
  while (!self.copies.empty() && self.copies.front().group + groups_left < self.groups) {
    const Copy copy = self.copies.front();
    self.copies.pop_front();
    // The device may have read it as late as now.
    if (copy.taken != 0) look_at(copy.global, copy.taken, Access::read);
    Cell* cells = current->shared.cells.data() + (copy.shared - current->shared.first);
    for (unsigned byte = 0; byte < copy.bytes; byte++) {
      cells[byte].write_time = current->clock;
      copy.shared[byte] = byte < copy.taken ? copy.global[byte] : 0;
    }
  }
}

}  // namespace emulator

// ---- What the compiler calls ---------------------------------------------------------------------------------------------------

using emulator::Access;

#define ACCESS(BYTES)                                                                                                   \
  extern "C" void __tsan_read##BYTES(void* address) { emulator::access(address, BYTES, Access::read); }                 \
  extern "C" void __tsan_write##BYTES(void* address) { emulator::access(address, BYTES, Access::write); }               \
  extern "C" void __tsan_unaligned_read##BYTES(void* address) { emulator::access(address, BYTES, Access::read); }       \
  extern "C" void __tsan_unaligned_write##BYTES(void* address) { emulator::access(address, BYTES, Access::write); }     \
  extern "C" void __tsan_read_write##BYTES(void* address) {                                                             \
    emulator::access(address, BYTES, Access::read);                                                                     \
    emulator::access(address, BYTES, Access::write);                                                                    \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  if (emulator::current) emulator::look_at((const char*)address, bytes, Access::read);
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  if (emulator::current) emulator::look_at((const char*)address, bytes, Access::write);
}
extern "C" void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  __tsan_read_range((void*)from, bytes);
  __tsan_write_range(to, bytes);
  return memcpy(to, from, bytes);
}
extern "C" void* __tsan_memset(void* to, int value, size_t bytes) {
  __tsan_write_range(to, bytes);
  return memset(to, value, bytes);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}

// ---- What Rust calls (`src/cuda/emulator.rs`) ------------------------------------------------------------------------------------

using emulator::Memory;

extern "C" Memory* tidemill_emulator_open() { return new Memory(); }
extern "C" void tidemill_emulator_close(Memory* memory) { delete memory; }

extern "C" void tidemill_emulator_add(Memory* memory, char* first, size_t bytes) {
  memory->regions[uintptr_t(first)] = {first, bytes, std::vector<emulator::Cell>(bytes)};
}
extern "C" void tidemill_emulator_remove(Memory* memory, uintptr_t first) { memory->regions.erase(first); }

// The cells of part of an allocation, which has to be there.
static emulator::Cell* cells_of(Memory* memory, uintptr_t first, size_t offset, size_t bytes) {
  auto found = memory->regions.find(first);
  if (found == memory->regions.end() || found->second.bytes < offset || found->second.bytes - offset < bytes) abort();
  return found->second.cells.data() + offset;
}

// The host wrote part of an allocation.
extern "C" void tidemill_emulator_written(Memory* memory, uintptr_t first, size_t offset, size_t bytes) {
  emulator::Cell written{};
  written.write_time = emulator::kHost;
  std::fill_n(cells_of(memory, first, offset, bytes), bytes, written);
}

// A copy to part of an allocation is under way.
extern "C" void tidemill_emulator_in_flight(Memory* memory, uintptr_t first, size_t offset, size_t bytes) {
  for (emulator::Cell* cell = cells_of(memory, first, offset, bytes); 0 < bytes; cell++, bytes--) cell->write_time = emulator::kInFlight;
}

// Bytes of one allocation are as written as those of another.
extern "C" void tidemill_emulator_copied(Memory* memory, uintptr_t to_first, size_t to_offset, uintptr_t from_first, size_t from_offset,
                                         size_t bytes) {
  emulator::Cell* to = cells_of(memory, to_first, to_offset, bytes);
  const emulator::Cell* from = cells_of(memory, from_first, from_offset, bytes);
  for (size_t i = 0; i < bytes; i++) {
    to[i] = emulator::Cell{};
    to[i].write_time = from[i].write_time == emulator::kNever ? emulator::kNever : emulator::kHost;
  }
}

// Whether all of these bytes were written by somebody.
extern "C" bool tidemill_emulator_is_written(Memory* memory, uintptr_t first, size_t offset, size_t bytes) {
  const emulator::Cell* cells = cells_of(memory, first, offset, bytes);
  return std::none_of(cells, cells + bytes, [](const emulator::Cell& cell) { return cell.write_time == emulator::kNever; });
}

// Runs every thread of the grid; the order is 0: forwards, 1: backwards, more: at random. False, and why, when the kernel does
// what it may not.
extern "C" bool tidemill_emulator_launch(Memory* memory, const emulator::Kernel* kernel, const unsigned* grid, const unsigned* block,
                                         unsigned dynamic_bytes, const char* params, unsigned order, char* message,
                                         size_t message_bytes) {
  emulator::Launch launch{};
  launch.memory = memory;
  launch.kernel = kernel;
  launch.grid = {grid[0], grid[1], grid[2]};
  launch.block_size = {block[0], block[1], block[2]};
  launch.threads = block[0] * block[1] * block[2];
  launch.dynamic_bytes = dynamic_bytes;
  launch.ids = launch.threads + emulator::kBarriers;
  launch.params_memory.resize(kernel->params_bytes + 128);
  launch.params = (char*)((uintptr_t(launch.params_memory.data()) + 127) / 128 * 128);
  std::copy_n(params, kernel->params_bytes, launch.params);
  launch.message = message;
  launch.message_bytes = message_bytes;
  uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  if (launch.threads == 0 || launch.threads % emulator::kWarp != 0 || kernel->max_threads < launch.threads || blocks == 0 ||
      (1u << 29) < blocks * launch.ids) {
    snprintf(message, message_bytes, "%s: %llu blocks of %u threads (whole warps, at most %u)", kernel->name,
             (unsigned long long)blocks, launch.threads, kernel->max_threads);
    return false;
  }
  launch.all.resize(launch.threads);
  launch.warps.resize(launch.threads / emulator::kWarp);
  launch.warpgroups.resize(launch.threads / emulator::kWarpgroup);
  launch.stacks.reset(new char[launch.threads * emulator::kStackBytes]);
  emulator::SharedMemory& shared = emulator::shared_memory;
  launch.shared = std::move(shared.region);
  launch.shared_used = shared.used;
  if (emulator::kLatest < memory->clock) emulator::begin_again(*memory);
  launch.began = launch.clock = memory->clock;
  emulator::current = &launch;
  for (uint64_t turn = 0; turn < blocks && !launch.failed; turn++) {
    uint64_t number = order == 1 ? blocks - 1 - turn : turn;
    launch.block_number = unsigned(number);
    launch.block = {unsigned(number % grid[0]), unsigned(number / grid[0] % grid[1]), unsigned(number / grid[0] / grid[1])};
    emulator::run_block(launch, order);
  }
  emulator::current = nullptr;
  shared.region = std::move(launch.shared);
  shared.used = launch.shared_used;
  memory->clock = launch.clock + 1;
  return !launch.failed;
}
