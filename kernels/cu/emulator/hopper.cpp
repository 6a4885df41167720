// What Hopper has beyond older GPUs, and how it is used wrongly: barriers in shared memory, copies of tiles, products of warpgroups.
//
// A copy of a tile lands as late as it may: when somebody waits for the barrier that counts it. A product is computed when all four warps
// have come to it, and is in its registers once a thread has waited. Found out are:
//
//   - reading or writing what such a copy writes, without having waited for its barrier's phase;
//   - a barrier that is used before others can know of it, gets more arrivals or bytes than it expects, or never ends its phase;
//   - writing shared memory that a product may still read, by a thread that did not learn from all four warps that it is over;
//   - products and copies that touch what a thread wrote without a fence between the two proxies (`fence.proxy.async`);
//   - tiles that lie in shared memory in another order than the product reads;
//   - registers that are used while a product has them, or are new to products with no `wgmma.fence` after their last use;
//   - threads, products or copies that are in flight at the end.
//
// An order between threads is known from what each of them has seen of the others (`Knowledge`), as vector clocks are; what a copy writes
// has an entry of its own, that of its barrier.
#include "instructions.h"
#include "state.h"

namespace emulator {
namespace {

Owner owner_of(unsigned number) { return {0, 0, current->block_number * current->ids + number}; }

void learn(Knowledge& knowledge, const Knowledge& more) {
  if (more.empty()) return;
  knowledge.resize(current->ids);
  for (size_t i = 0; i < more.size(); i++) knowledge[i] = std::max(knowledge[i], more[i]);
}

// The thread tells all that it has done and knows of.
void tell(Knowledge& knowledge, const Thread& thread) {
  Launch& launch = *current;
  knowledge.resize(launch.ids);
  learn(knowledge, thread.seen);
  unsigned first = thread.number / kWarp * kWarp;
  for (unsigned i = first; i < first + kWarp; i++) knowledge[i] = std::max(knowledge[i], launch.warps[first / kWarp].ordered_at);
  knowledge[thread.number] = ++launch.clock;
}

// ---- Barriers ---------------------------------------------------------------------------------------------------------------

PhaseBarrier& barrier_at(const void* place) {
  for (PhaseBarrier& barrier : current->barriers) {
    if (barrier.place != place) continue;
    if (!ordered(*current->running, barrier.maker, barrier.made_at)) fail_with("uses a barrier that another thread makes");
    return barrier;
  }
  fail_with("uses a barrier that nobody has made");
}

void end_phase_if_due(PhaseBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes > 0) return;
  if (barrier.bytes < 0) fail_with("a barrier gets %lld bytes more than it expects", (long long)-barrier.bytes);
  if (!barrier.copies.empty()) return;  // It gets more than it expects once they land.
  barrier.phases++;
  barrier.pending = barrier.expected;
  barrier.completed = barrier.arriving;
}

bool is_over(const PhaseBarrier& barrier, unsigned parity) { return (barrier.phases & 1) != parity; }

// ---- Copies -----------------------------------------------------------------------------------------------------------------

size_t tile_bytes(const TileMap& map) {
  size_t bytes = 2;
  for (unsigned i = 0; i < map.rank; i++) bytes *= map.tile[i];
  return bytes;
}

// Where 16 bytes go in an order of rows of `swizzle` bytes: as GPUs do, by the address itself.
size_t swizzled(size_t offset, unsigned swizzle) {
  unsigned chunks = swizzle / 16;
  return chunks == 0 ? offset : offset ^ (offset >> 7 & (chunks - 1)) << 4;
}

// Calls `row(offset in the tile, address or null, elements)` for the part of each row that is within the tensor; what is beyond it has no
// address.
template <class Row>
void for_each_row(const TileCopy& copy, Row row) {
  const TileMap& map = copy.map;
  size_t rows = tile_bytes(map) / 2 / map.tile[0];
  for (size_t number = 0; number < rows; number++) {
    uint64_t address = map.first;
    bool is_within = true;
    size_t rest = number;
    for (unsigned i = 1; i < map.rank; i++) {
      int64_t coordinate = int64_t(copy.coordinates[i]) + int64_t(rest % map.tile[i]);
      rest /= map.tile[i];
      is_within &= 0 <= coordinate && coordinate < int64_t(map.sizes[i]);
      address += uint64_t(coordinate) * map.strides[i - 1];
    }
    int64_t from = copy.coordinates[0], end = from + map.tile[0];
    int64_t first = std::max<int64_t>(from, 0), last = std::min<int64_t>(end, map.sizes[0]);
    size_t offset = number * map.tile[0] * 2;
    if (!is_within || last <= first) {
      row(offset, nullptr, 0, map.tile[0]);
      continue;
    }
    row(offset, (const char*)(address + uint64_t(first) * 2), unsigned(first - from), unsigned(last - first));
  }
}

// The source may be read at any time until the copy lands. What nobody wrote there is not written in the target either.
void look_at_source(const char* address, size_t bytes) {
  const Region* region = region_of(address, bytes);
  if (!region || region == &current->shared) fail_with("copies %zu bytes from %p, outside of every allocation", bytes, (const void*)address);
  for (const Cell* cell = region->cells.data() + (address - region->first); 0 < bytes; cell++, bytes--) {
    if (cell->write_time == kInFlight) fail_at("a copy is in flight that was not waited for", region, address, bytes);
    if (cell->write_time != kNever && !ordered(*current->running, cell->writer, cell->write_time))
      fail_at("race with another thread's write", region, address, bytes);
  }
}

// Whether the proxy of copies and products can know what a thread has written.
bool is_fenced(Owner writer, uint32_t time, const Thread& reader) {
  unsigned number = writer.id % current->ids;
  if (time < current->began || current->threads <= number) return true;
  const std::vector<uint32_t>& fences = current->all[number].proxy_fences;
  auto fence = std::lower_bound(fences.begin(), fences.end(), time);
  return fence != fences.end() && ordered(reader, writer, *fence);
}

void land(PhaseBarrier& barrier) {
  Launch& launch = *current;
  for (const TileCopy& copy : barrier.copies) {
    size_t first = size_t(copy.shared - launch.shared.first);
    Cell written{launch.clock, owner_of(launch.threads + barrier.number), kNever, {}};
    auto put = [&](size_t offset, const char* element, const Cell* state) {
      size_t place = swizzled(first + offset / 16 * 16, copy.map.swizzle) + offset % 16;
      for (unsigned byte = 0; byte < 2; byte++) {
        launch.shared.first[place + byte] = element ? element[byte] : 0;
        Cell& cell = launch.shared.cells[place + byte];
        cell = written;
        if (state && state[byte].write_time == kNever) cell.write_time = kNever;
      }
    };
    for_each_row(copy, [&](size_t offset, const char* address, unsigned skipped, unsigned count) {
      for (unsigned i = 0; i < copy.map.tile[0]; i++) put(offset + 2 * i, nullptr, nullptr);
      if (!address) return;
      look_at_source(address, 2 * count);
      const Region* region = region_of(address, 2 * count);
      for (unsigned i = 0; i < count; i++)
        put(offset + 2 * (skipped + i), address + 2 * i, region->cells.data() + (address + 2 * i - region->first));
    });
    size_t bytes = tile_bytes(copy.map);
    barrier.bytes -= int64_t(bytes);
    auto overlaps = [&](const Landed& it) { return it.first < copy.shared + bytes && copy.shared < it.first + it.bytes; };
    launch.landed.erase(std::remove_if(launch.landed.begin(), launch.landed.end(), overlaps), launch.landed.end());
    launch.landed.push_back({copy.shared, bytes, copy.map.swizzle});
  }
  if (barrier.copies.empty()) return;
  barrier.copies.clear();
  barrier.arriving.resize(launch.ids);
  barrier.arriving[launch.threads + barrier.number] = ++launch.clock;
  end_phase_if_due(barrier);
}

// ---- Products ---------------------------------------------------------------------------------------------------------------

// What `describe_operand` says.
struct Operand {
  size_t first, leading, stride;
  unsigned swizzle;

  explicit Operand(uint64_t text) {
    auto field = [&](unsigned bit) { return size_t(text >> bit & 0x3fff) << 4; };
    constexpr unsigned kSwizzles[] = {0, 128, 64, 32};
    first = field(0), leading = field(16), stride = field(32), swizzle = kSwizzles[text >> 62];
    if (swizzle == 0) fail_with("a product of matrices without swizzle is not modelled");
  }
  // Eight elements that lie together: of row or column `line`, elements `8 * half` and following.
  size_t chunk(unsigned line, unsigned half) const {
    return swizzled(first + line % 8 * swizzle + line / 8 * stride + half * 16, swizzle);
  }
  // Elements `element` of columns `8 * eight` and following.
  size_t chunk_transposed(unsigned eight, unsigned element) const {
    unsigned wide = swizzle / 16;
    return swizzled(first + eight % wide * 16 + eight / wide * leading + element % 8 * swizzle + element / 8 * stride, swizzle);
  }
};

// Reads for a warpgroup's product, of which every thread must know that it may.
class Reader {
 public:
  Reader(unsigned warpgroup, unsigned swizzle) : warpgroup(warpgroup), swizzle(swizzle) {}

  const uint16_t* read(size_t offset) {
    Launch& launch = *current;
    if (launch.shared.bytes < offset + 16) fail_with("a product reads beyond shared memory");
    const char* chunk = launch.shared.first + offset;
    if (!region_of(chunk, 16)) fail_with("a product reads 16 bytes at byte %zu of shared memory, outside of every variable", offset);
    for (unsigned byte = 0; byte < 16; byte++) look_at(launch.shared.cells[offset + byte], chunk);
    for (const Landed& it : launch.landed)
      if (it.first <= chunk && chunk < it.first + it.bytes && it.swizzle != swizzle)
        fail_with("a product reads rows of %u bytes that are swizzled; the copy has left them in rows of %u", swizzle, it.swizzle);
    first = std::min(first, offset);
    end = std::max(end, offset + 16);
    return (const uint16_t*)chunk;
  }

  // The product is in flight from now on.
  void note(unsigned group) const {
    Launch& launch = *current;
    const char* place = launch.shared.first + first;
    for (Reading& it : launch.readings)
      if (it.first == place && it.bytes == end - first && it.warpgroup == warpgroup) {
        it = {place, end - first, warpgroup, group, {}};
        return;
      }
    launch.readings.push_back({place, end - first, warpgroup, group, {}});
  }

 private:
  unsigned warpgroup, swizzle;
  size_t first = ~size_t(0), end = 0;
  Cell known{};

  void look_at(const Cell& cell, const char* chunk) {
    // Neighbours were mostly written together.
    if (cell.write_time == known.write_time && cell.writer.id == known.writer.id && known.write_time != kNever) return;
    const Region* region = &current->shared;
    if (cell.write_time == kInFlight) fail_at("a copy is in flight that was not waited for", region, chunk, 16);
    if (cell.write_time == kNever) fail_at("a product reads what nobody wrote", region, chunk, 16);
    for (unsigned i = 0; i < kWarpgroup; i++) {
      const Thread& thread = current->all[warpgroup * kWarpgroup + i];
      if (!ordered(thread, cell.writer, cell.write_time)) fail_at("a product's race with another thread's write", region, chunk, 16);
      if (!is_fenced(cell.writer, cell.write_time, thread))
        fail_at("a product reads what a thread wrote with no fence between", region, chunk, 16);
    }
    known = cell;
  }
};

float widened(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __uint_as_float(uint32_t(bits) << 16) : f16_to_f32(bits);
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  return (const char*)a < (const char*)b + b_bytes && (const char*)b < (const char*)a + a_bytes;
}

bool was_touched(const Thread& thread, const void* place, size_t bytes) {
  const char* stack = current->stacks.get() + thread.number * kStackBytes;
  size_t first = size_t((const char*)place - stack) / 4;
  auto begin = thread.touched.begin() + first;
  return std::find(begin, begin + bytes / 4, thread.register_fences) != begin + bytes / 4;
}

// The registers that the thread brings may be the product's now.
void check_registers(const Thread& thread, const float* sums, const uint32_t* left, const TileProduct& product) {
  size_t bytes = product.columns / 2 * sizeof(float);
  if (thread.register_fences == 0) fail_with("a product with no fence before it");
  bool in_flight = false;
  for (const Sums& it : thread.sums) {
    in_flight |= it.place == sums;
    if (it.place == sums ? it.values.size() * sizeof(float) != bytes : overlap(it.place, it.values.size() * sizeof(float), sums, bytes))
      fail_with("a product of another shape adds to the same registers while one is in flight");
  }
  if (!in_flight && was_touched(thread, sums, bytes)) fail_with("sums were used, and no fence comes before the product");
  if (left && was_touched(thread, left, 16)) fail_with("the left side was written, and no fence comes before the product");
}

Sums& sums_of(Thread& thread, float* place, unsigned count) {
  for (Sums& it : thread.sums)
    if (it.place == place) return it;
  thread.sums.push_back({place, std::vector<float>(place, place + count), 0});
  return thread.sums.back();
}

// A device does not say in which order it adds, nor how it rounds on the way; this one rounds the exact sum.
void compute(unsigned number, Warpgroup& group) {
  Launch& launch = *current;
  const TileProduct& product = group.product;
  constexpr unsigned kRows = 64, kDepth = 16;
  std::vector<double> left(kRows * kDepth), right(product.columns * kDepth);
  unsigned open = launch.all[number * kWarpgroup].product_groups;
  if (product.left_in_registers) {
    for (unsigned row = 0; row < kRows; row++)
      for (unsigned k = 0; k < kDepth; k++) {
        unsigned thread = row / 16 * kWarp + row % 8 * 4 + k % 8 / 2;
        uint32_t pair = group.left[thread][row % 16 / 8 + k / 8 * 2];
        left[row * kDepth + k] = widened(uint16_t(pair >> (16 * (k % 2))), product.is_bf16);
      }
  } else {
    Operand operand(product.left);
    Reader reader(number, operand.swizzle);
    for (unsigned row = 0; row < kRows; row++)
      for (unsigned half = 0; half < 2; half++) {
        const uint16_t* chunk = reader.read(operand.chunk(row, half));
        for (unsigned i = 0; i < 8; i++) left[row * kDepth + half * 8 + i] = widened(chunk[i], product.is_bf16);
      }
    reader.note(open);
  }
  Operand operand(product.right);
  Reader reader(number, operand.swizzle);
  for (unsigned n = 0; n < product.columns * 2; n++) {
    unsigned line = n / 2, half = n % 2;
    if (product.right_is_transposed) {
      // Sixteen rows, eight columns of each at a time.
      unsigned k = n % kDepth, eight = n / kDepth;
      const uint16_t* chunk = reader.read(operand.chunk_transposed(eight, k));
      for (unsigned i = 0; i < 8; i++) right[(eight * 8 + i) * kDepth + k] = widened(chunk[i], product.is_bf16);
    } else {
      const uint16_t* chunk = reader.read(operand.chunk(line, half));
      for (unsigned i = 0; i < 8; i++) right[line * kDepth + half * 8 + i] = widened(chunk[i], product.is_bf16);
    }
  }
  reader.note(open);

  for (unsigned thread = 0; thread < kWarpgroup; thread++) {
    Thread& owner = launch.all[number * kWarpgroup + thread];
    Sums& sums = sums_of(owner, group.sums[thread], product.columns / 2);
    sums.group = open;
    if (product.left_in_registers) owner.left_sides.push_back({group.left[thread], open});
    for (unsigned i = 0; i < product.columns / 2; i++) {
      unsigned row = thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double exact = product.adds ? sums.values[i] : 0.0;
      for (unsigned k = 0; k < kDepth; k++) exact += left[row * kDepth + k] * right[column * kDepth + k];
      sums.values[i] = float(exact);
    }
  }
}

}  // namespace

// ---- What the emulator calls ------------------------------------------------------------------------------------------------

void begin_block(Launch& launch) {
  launch.barriers.clear();
  for (NamedBarrier& barrier : launch.named) barrier = NamedBarrier{};
  for (Warpgroup& group : launch.warpgroups) group.arrived = 0;
  launch.readings.clear();
  launch.landed.clear();
  for (Thread& thread : launch.all) {
    thread.seen.clear();
    thread.proxy_fences.clear();
    thread.product_groups = thread.register_fences = 0;
    thread.sums.clear();
    thread.left_sides.clear();
    thread.touched.clear();
  }
}

void end_thread(Thread& thread) {
  if (!thread.sums.empty()) fail_with("ends with products in flight");
  if (1 < current->alive) return;
  for (const PhaseBarrier& barrier : current->barriers)
    if (!barrier.copies.empty()) fail_with("ends with copies of tiles in flight");
}

bool may_go_on(const Launch& launch, const Thread& thread) {
  switch (thread.state) {
    case State::at_phase:
      return is_over(*thread.awaited, thread.parity) || !thread.awaited->copies.empty();
    case State::at_named:
      return thread.generation != thread.named->generation;
    default:
      return thread.generation != launch.warpgroups[thread.number / kWarpgroup].generation;
  }
}

void share_knowledge(Launch& launch, unsigned warp) {
  auto first = launch.all.begin() + warp * kWarp, last = first + kWarp;
  if (std::all_of(first, last, [](const Thread& thread) { return thread.seen.empty(); })) return;
  Knowledge together;
  for (auto thread = first; thread < last; thread++) learn(together, thread->seen);
  for (auto thread = first; thread < last; thread++) thread->seen = together;
}

void look_at_registers(Thread& thread, const char* address, size_t bytes, Access kind) {
  for (const Sums& it : thread.sums)
    if (overlap(it.place, it.values.size() * sizeof(float), address, bytes)) fail_with("uses a sum while its product is in flight");
  if (kind != Access::read)
    for (const LeftSide& it : thread.left_sides)
      if (overlap(it.place, 16, address, bytes)) fail_with("writes the left side of a product in flight");
  if (thread.touched.empty()) return;
  size_t offset = size_t(address - (current->stacks.get() + thread.number * kStackBytes));
  for (size_t word = offset / 4; word <= (offset + bytes - 1) / 4; word++) thread.touched[word] = thread.register_fences;
}

void look_at_readings(const char* address, size_t bytes) {
  Launch& launch = *current;
  const Thread& self = *launch.running;
  auto is_past = [&](const Reading& it) {
    if (!overlap(it.first, it.bytes, address, bytes)) return false;
    for (unsigned warp = 0; warp < 4; warp++) {
      if (it.over_at[warp] == kNever) fail_with("writes %zu bytes of shared memory that a product in flight reads", bytes);
      // Any of its lanes may have told that the warp has waited.
      Owner lane = owner_of(it.warpgroup * kWarpgroup + warp * kWarp);
      bool is_known = false;
      for (unsigned i = 0; i < kWarp && !is_known; i++, lane.id++) is_known = ordered(self, lane, it.over_at[warp]);
      if (!is_known) fail_with("writes %zu bytes of shared memory that a product read, and does not know that it is over", bytes);
    }
    return true;
  };
  launch.readings.erase(std::remove_if(launch.readings.begin(), launch.readings.end(), is_past), launch.readings.end());
}

// ---- What kernels call ------------------------------------------------------------------------------------------------------

void make_barrier(void* place, unsigned arrivals) {
  Launch& launch = *current;
  look_at((const char*)place, 8, Access::write);
  if (uintptr_t(place) % 8 != 0 || region_of((const char*)place, 8) != &launch.shared) fail_with("a barrier lies in shared memory, in whole words");
  if (arrivals == 0 || launch.barriers.size() == kBarriers) fail_with("a barrier of no arrivals, or more than %u of them", kBarriers);
  unsigned number = unsigned(launch.barriers.size());
  launch.barriers.push_back({place, number, owner_of(launch.running->number), launch.clock, false, arrivals, arrivals, 0, 0, {}, {}, {}});
}

void make_barriers_known() {
  for (PhaseBarrier& barrier : current->barriers)
    barrier.is_known |= barrier.maker.id == owner_of(current->running->number).id;
}

void arrive(void* place, unsigned expected_bytes) {
  PhaseBarrier& barrier = barrier_at(place);
  if (barrier.pending == 0) fail_with("a barrier gets more arrivals than it expects");
  barrier.bytes += expected_bytes;
  barrier.pending--;
  tell(barrier.arriving, *current->running);
  if (barrier.copies.empty()) end_phase_if_due(barrier);
}

void wait_for_phase(void* place, unsigned parity) {
  PhaseBarrier& barrier = barrier_at(place);
  Thread& self = *current->running;
  while (!is_over(barrier, parity)) {
    land(barrier);
    if (is_over(barrier, parity)) break;
    self.awaited = &barrier;
    self.parity = parity;
    self.state = State::at_phase;
    leave_thread();
  }
  learn(self.seen, barrier.completed);
}

void copy_tile(void* shared, const TileMap& map, const int32_t* coordinates, unsigned rank, void* place) {
  Launch& launch = *current;
  PhaseBarrier& barrier = barrier_at(place);
  if (!barrier.is_known) fail_with("copies for a barrier that was not made known to them");
  if (map.rank != rank) fail_with("a copy of a tile of %u dimensions, by a map of %u", rank, map.rank);
  size_t bytes = tile_bytes(map);
  if (uintptr_t(shared) % 128 != 0) fail_with("a tile in shared memory is misaligned");
  if (map.swizzle != 0 && map.tile[0] * 2 != map.swizzle) fail_with("rows of %u bytes that are swizzled as %u", map.tile[0] * 2, map.swizzle);
  if (region_of((const char*)shared, bytes) != &launch.shared) fail_with("a copy of a tile goes to shared memory");
  Cell* cells = launch.shared.cells.data() + ((char*)shared - launch.shared.first);
  for (size_t byte = 0; byte < bytes; byte++)
    if (cells[byte].write_time != kInFlight && !is_fenced(cells[byte].writer, cells[byte].write_time, *launch.running))
      fail_with("a copy writes what a thread wrote with no fence between");
  look_at((const char*)shared, bytes, Access::write);
  TileCopy copy{map, {}, (char*)shared};
  std::copy_n(coordinates, rank, copy.coordinates);
  for_each_row(copy, [](size_t, const char* address, unsigned, unsigned count) {
    if (address) look_at_source(address, 2 * count);
  });
  for (size_t byte = 0; byte < bytes; byte++) cells[byte].write_time = kInFlight;
  barrier.copies.push_back(copy);
}

void fence_proxies() { current->running->proxy_fences.push_back(current->clock++); }

void meet_named(unsigned number, unsigned threads, bool waits) {
  if (number == 0 || 15 < number || threads % kWarp != 0) fail_with("a meeting of %u threads with the number %u", threads, number);
  NamedBarrier& barrier = current->named[number];
  Thread& self = *current->running;
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail_with("a meeting of %u threads, and others meet with the number %u for %u", threads, number, barrier.threads);
  tell(barrier.arriving, self);
  unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.completed[generation & 1] = std::move(barrier.arriving);
    barrier.arriving.clear();
    barrier.arrived = 0;
    barrier.generation++;
  } else if (waits) {
    self.named = &barrier;
    self.generation = generation;
    self.state = State::at_named;
    leave_thread();
  }
  if (waits) learn(self.seen, barrier.completed[generation & 1]);
}

uint64_t describe_operand(const void* shared, unsigned leading, unsigned stride) {
  size_t offset = size_t((const char*)shared - current->shared.first);
  if (current->shared.bytes <= offset) fail_with("a side of a product lies in shared memory");
  return uint64_t(offset >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

void fence_registers() {
  Thread& self = *current->running;
  if (self.touched.empty()) self.touched.resize(kStackBytes / 4);
  self.register_fences++;
}

void multiply_tile(float* sums, const uint32_t* left, const TileProduct& product) {
  Launch& launch = *current;
  Thread& self = *launch.running;
  unsigned number = self.number / kWarpgroup, lane = self.number % kWarpgroup;
  if (launch.warpgroups.size() <= number) fail_with("a product of a warpgroup, by a warp that is in none");
  Warpgroup& group = launch.warpgroups[number];
  check_registers(self, sums, left, product);
  if (group.arrived == 0) group.product = product;
  const TileProduct& first = group.product;
  if (first.left != product.left || first.right != product.right || first.columns != product.columns || first.adds != product.adds ||
      first.left_in_registers != product.left_in_registers)
    fail_with("threads of a warpgroup ask for different products");
  group.sums[lane] = sums;
  group.left[lane] = left;
  unsigned generation = group.generation;
  if (++group.arrived == kWarpgroup) {
    group.arrived = 0;
    group.generation++;
    compute(number, group);
    return;
  }
  self.generation = generation;
  self.state = State::in_warpgroup;
  leave_thread();
}

void commit_products() { current->running->product_groups++; }

void wait_for_products(unsigned groups_left) {
  meet_warp(~0u, 0, false);
  Thread& self = *current->running;
  auto is_over = [&](unsigned group) { return group + groups_left < self.product_groups; };
  for (const Sums& it : self.sums)
    if (is_over(it.group)) std::copy(it.values.begin(), it.values.end(), it.place);
  std::erase_if(self.sums, [&](const Sums& it) { return is_over(it.group); });
  std::erase_if(self.left_sides, [&](const LeftSide& it) { return is_over(it.group); });
  for (Reading& it : current->readings)
    if (it.warpgroup == self.number / kWarpgroup && is_over(it.group)) {
      uint32_t& over_at = it.over_at[self.number % kWarpgroup / kWarp];
      if (over_at == kNever) over_at = current->clock;
    }
}

}  // namespace emulator
