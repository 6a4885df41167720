// From logits to a token, as `engine/src/sampler` does it: greatest logit, or temperature, min-p, top-k, top-p and a draw.
//
// The sampler sorts tokens by falling weight, equal ones by rising id, keeps a head of that order, and takes the first token
// at which the running sum of weights passes a share of the head's sum. Nothing is sorted here: weights become whole numbers, and
// the place at which a running sum passes is found digit by digit. Sums of whole numbers do not depend on their order, so a row's
// token is the same on every device and in every batch. It is also the CPU's, unless the share falls on a boundary between two tokens
// to about one part in 10^12.
#include "device.cuh"

struct SampleRow {
  uint64_t seed;
  uint32_t position;  // of the output token
  float temperature;
  uint32_t top_k;  // 0: all
  float top_p;
  float min_p;
  uint32_t reserved;
};

struct Sample {
  uint32_t* tokens;       // [rows]; or one of the two below
  const float* logits;    // [rows][vocabulary]
  uint64_t* weights;      // [rows][vocabulary], memory to work in
  const SampleRow* rows;  // [rows]
  uint32_t vocabulary;    // at most 2^19
  uint32_t reserved;
};

constexpr uint32_t kNotFinite = 0xffffffffu;
constexpr uint32_t kNothingLeft = 0xfffffffeu;
constexpr float kGreedyBelow = 1e-5f;
constexpr unsigned kThreads = 512;
// The weight of the greatest logit. 2^19 of these fit 64 bits.
constexpr unsigned kWeightBits = 44, kDigitBits = 11, kDigits = 1 << kDigitBits;
constexpr unsigned kPerThread = kDigits / kThreads;

struct Tally {
  uint64_t weight;
  uint64_t count;
};

struct Best {
  float logit;
  uint32_t token;
};

// A place in the order: tokens of this weight, with what lies before the first of them.
struct Place {
  uint64_t weight;
  uint64_t equals;
  Tally before;
};

struct SamplingMemory {
  unsigned long long weights[kDigits];
  unsigned counts[kDigits];
  Tally partials[kThreads / kWarp];
  Best best[kThreads / kWarp];
  unsigned bad;
  unsigned chosen;
  Place place;
};

__device__ __forceinline__ Best better(Best a, Best b) {
  bool second = a.logit < b.logit || (a.logit == b.logit && b.token < a.token);
  return second ? b : a;
}

// The first of the greatest logits, for all threads.
__device__ __forceinline__ Best greatest(const float* logits, unsigned vocabulary, SamplingMemory& memory) {
  Best best{-infinity(), kNothingLeft};
  bool bad = false;
  for (unsigned token = threadIdx.x; token < vocabulary; token += kThreads) {
    float logit = logits[token];
    bad |= !(logit < infinity());
    if (-infinity() < logit) best = better(best, Best{logit, token});
  }
  for (unsigned distance = kWarp / 2; 0 < distance; distance /= 2) {
    float logit = __shfl_xor_sync(kAllLanes, best.logit, distance);
    uint32_t token = __shfl_xor_sync(kAllLanes, best.token, distance);
    best = better(best, Best{logit, token});
  }
  if (threadIdx.x % kWarp == 0) memory.best[threadIdx.x / kWarp] = best;
  if (__syncthreads_count(bad)) return Best{infinity(), kNotFinite};
  for (unsigned warp = 0; warp < kThreads / kWarp; warp++) best = better(best, memory.best[warp]);
  return best;
}

__device__ __forceinline__ Tally warp_scan(Tally tally) {
  unsigned lane = threadIdx.x % kWarp;
  for (unsigned distance = 1; distance < kWarp; distance *= 2) {
    uint64_t weight = __shfl_up_sync(kAllLanes, tally.weight, distance);
    uint64_t count = __shfl_up_sync(kAllLanes, tally.count, distance);
    if (distance <= lane) tally.weight += weight, tally.count += count;
  }
  return tally;
}

// Sums over all threads before this one.
__device__ __forceinline__ Tally block_scan(Tally own, SamplingMemory& memory) {
  Tally upto = warp_scan(own);
  if (threadIdx.x % kWarp == kWarp - 1) memory.partials[threadIdx.x / kWarp] = upto;
  __syncthreads();
  Tally before{upto.weight - own.weight, upto.count - own.count};
  for (unsigned warp = 0; warp < threadIdx.x / kWarp; warp++) {
    before.weight += memory.partials[warp].weight;
    before.count += memory.partials[warp].count;
  }
  return before;
}

// The first place at which the running count, or the running sum of weights, is `target` or more; there is one.
__device__ __forceinline__ Place reach(const uint64_t* weights, unsigned vocabulary, bool by_count, uint64_t target,
                                       SamplingMemory& memory) {
  Place place{0, 0, {0, 0}};
  for (int shift = kWeightBits - kDigitBits; 0 <= shift; shift -= kDigitBits) {
    for (unsigned digit = threadIdx.x; digit < kDigits; digit += kThreads) memory.weights[digit] = 0, memory.counts[digit] = 0;
    __syncthreads();
    for (unsigned token = threadIdx.x; token < vocabulary; token += kThreads) {
      uint64_t weight = weights[token];
      if (weight == 0 || weight >> (shift + kDigitBits) != place.weight) continue;
      unsigned digit = unsigned(weight >> shift) % kDigits;
      atomicAdd(&memory.weights[digit], (unsigned long long)weight);
      atomicAdd(&memory.counts[digit], 1u);
    }
    __syncthreads();
    // Falling digits: the first thread has the greatest.
    unsigned top = kDigits - 1 - threadIdx.x * kPerThread;
    Tally own{0, 0};
    for (unsigned i = 0; i < kPerThread; i++) own.weight += memory.weights[top - i], own.count += memory.counts[top - i];
    Tally before = block_scan(own, memory);
    before.weight += place.before.weight;
    before.count += place.before.count;
    for (unsigned i = 0; i < kPerThread; i++) {
      Tally digit{memory.weights[top - i], memory.counts[top - i]};
      uint64_t reached = by_count ? before.count : before.weight, more = by_count ? digit.count : digit.weight;
      if (reached < target && target <= reached + more)
        memory.place = Place{place.weight << kDigitBits | (top - i), digit.count, before};
      before.weight += digit.weight;
      before.count += digit.count;
    }
    __syncthreads();
    place = memory.place;
    __syncthreads();
  }
  return place;
}

// The token number `number` of those with this weight, by rising id.
__device__ __forceinline__ uint32_t nth_of_weight(const uint64_t* weights, unsigned vocabulary, uint64_t weight, uint64_t number,
                                                  SamplingMemory& memory) {
  uint64_t found = 0;
  for (unsigned first = 0; first < vocabulary; first += kThreads) {
    unsigned token = first + threadIdx.x;
    bool equal = token < vocabulary && weights[token] == weight;
    unsigned here = __syncthreads_count(equal);
    if (found + here <= number) {
      found += here;
      continue;
    }
    Tally before = block_scan(Tally{0, equal}, memory);
    if (equal && found + before.count == number) memory.chosen = token;
    __syncthreads();
    break;
  }
  return memory.chosen;
}

// Philox4x32-10 (Salmon and others, "Parallel random numbers: as easy as 1, 2, 3", SC'11), as `engine/src/sampler/philox.rs` uses it:
// from 0 up to but not 1.
__device__ __forceinline__ double uniform(uint64_t seed, uint32_t position) {
  uint32_t a = position, b = 0, c = 0, d = 0, low = uint32_t(seed), high = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t first = uint64_t(a) * 0xd2511f53u, second = uint64_t(c) * 0xcd9e8d57u;
    a = uint32_t(second >> 32) ^ b ^ low;
    b = uint32_t(second);
    c = uint32_t(first >> 32) ^ d ^ high;
    d = uint32_t(first);
    low += 0x9e3779b9u;
    high += 0xbb67ae85u;
  }
  return double((uint64_t(a) << 32 | b) >> 11) * (1.0 / double(1ull << 53));
}

__device__ __forceinline__ uint32_t draw(const float* logits, uint64_t* weights, unsigned vocabulary, const SampleRow& row,
                                         float greatest, SamplingMemory& memory) {
  double inverse = 1.0 / double(row.temperature), min_p = row.min_p < 1.0f ? row.min_p : 1.0f;
  Tally own{0, 0};
  for (unsigned token = threadIdx.x; token < vocabulary; token += kThreads) {
    // Subtracted before it is scaled: no temperature can then overflow.
    double weight = exp(double(logits[token] - greatest) * inverse);
    uint64_t whole = min_p <= weight ? uint64_t(weight * double((1ull << kWeightBits) - 1)) : 0;
    weights[token] = whole;
    own.weight += whole;
    own.count += whole != 0;
  }
  // The last thread knows the sum of all.
  Tally before = block_scan(own, memory);
  if (threadIdx.x == kThreads - 1) memory.place.before = Tally{before.weight + own.weight, before.count + own.count};
  __syncthreads();
  Tally kept = memory.place.before;
  __syncthreads();
  if (0 < row.top_k && row.top_k < kept.count) {
    Place last = reach(weights, vocabulary, true, row.top_k, memory);
    kept.weight = last.before.weight + last.weight * last.equals;
  }
  if (row.top_p < 1.0f) {
    double share = double(row.top_p) * double(kept.weight);
    uint64_t target = uint64_t(ceil(share));
    target = target < 1 ? 1 : kept.weight < target ? kept.weight : target;
    Place last = reach(weights, vocabulary, false, target, memory);
    uint64_t equals = (target - last.before.weight + last.weight - 1) / last.weight;
    kept.weight = last.before.weight + last.weight * equals;
  }
  uint64_t passed = uint64_t(uniform(row.seed, row.position) * double(kept.weight));
  if (kept.weight <= passed) passed = kept.weight - 1;
  Place place = reach(weights, vocabulary, false, passed + 1, memory);
  return nth_of_weight(weights, vocabulary, place.weight, (passed - place.before.weight) / place.weight, memory);
}

// One block per row.
KERNEL(sample, kThreads, Sample) {
  SHARED(SamplingMemory, memory);
  const float* logits = params.logits + size_t(blockIdx.x) * params.vocabulary;
  uint64_t* weights = params.weights + size_t(blockIdx.x) * params.vocabulary;
  const SampleRow row = params.rows[blockIdx.x];
  Best best = greatest(logits, params.vocabulary, memory);
  uint32_t token = best.token;
  if (token < kNothingLeft && kGreedyBelow <= row.temperature)
    token = draw(logits, weights, params.vocabulary, row, best.logit, memory);
  if (threadIdx.x == 0) params.tokens[blockIdx.x] = token;
}
