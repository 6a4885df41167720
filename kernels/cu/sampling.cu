// From logits to a token, as `engine/src/sampler` does it: greatest logit, or temperature, min-p, top-k, top-p and a draw; and to what
// log-probabilities are made of.
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

// ---- Log-probabilities ----------------------------------------------------------------------------------------------------------

struct LogprobsRow {
  uint32_t token;  // whose log-probability is wanted; kChosen: of the one that `sample` chose
  uint32_t count;  // of the most likely tokens, at most kMostLikely; kLeftOut: nothing of the row is wanted
};

// A token's log-probability is `logit - greatest - ln(total)`, which the host computes: it has one logarithm for all.
struct LogprobsSum {
  double total;  // of exp(logit - greatest)
  float greatest;
  float chosen;   // the token's logit
  uint32_t rank;  // how many logits are not less
  uint32_t reserved;
};

struct LikelyToken {
  uint32_t token;
  float logit;
};

struct Logprobs {
  LogprobsSum* sums;        // [rows]
  LikelyToken* likely;      // [rows][places], greatest first, equal ones by rising id
  const float* logits;      // [rows][vocabulary]
  uint64_t* weights;        // [rows][vocabulary], memory to work in
  const LogprobsRow* rows;  // [rows]
  const uint32_t* chosen;   // [rows]
  uint32_t vocabulary;      // at most 2^19
  uint32_t places;          // at least any row's count
};

constexpr uint32_t kChosen = 0xffffffffu, kLeftOut = 0xffffffffu;
constexpr unsigned kMostLikely = 32;

struct Candidate {
  uint64_t weight;
  uint32_t token;
};

struct LogprobsMemory {
  SamplingMemory order;
  PerWarp partials;
  double sums[kThreads];
  Candidate likely[kMostLikely];
  unsigned rank;
  unsigned found;
};

// A whole number that rises with the logit; equal for both zeros, and never zero itself.
__device__ __forceinline__ uint64_t weight_of(float logit) {
  uint32_t bits = __float_as_uint(logit + 0.0f);
  return uint64_t(bits & 0x80000000u ? ~bits : bits | 0x80000000u) + 1;
}

// The `count` greatest logits, of which there are as many at least.
__device__ __forceinline__ void most_likely(const float* logits, uint64_t* weights, unsigned vocabulary, unsigned count,
                                            LikelyToken* likely, LogprobsMemory& memory) {
  for (unsigned token = threadIdx.x; token < vocabulary; token += kThreads) weights[token] = weight_of(logits[token]);
  Place last = reach(weights, vocabulary, true, count, memory.order);
  for (unsigned token = threadIdx.x; token < vocabulary; token += kThreads) {
    uint64_t weight = weights[token];
    if (last.weight < weight) memory.likely[atomicAdd(&memory.found, 1u)] = Candidate{weight, token};
  }
  // Of those that are equal to the last the first ones count.
  unsigned greater = unsigned(last.before.count), missing = count - greater, found = 0;
  for (unsigned first = 0; first < vocabulary && found < missing; first += kThreads) {
    unsigned token = first + threadIdx.x;
    bool equal = token < vocabulary && weights[token] == last.weight;
    unsigned here = __syncthreads_count(equal);
    if (here == 0) continue;
    unsigned place = found + unsigned(block_scan(Tally{0, equal}, memory.order).count);
    if (equal && place < missing) memory.likely[greater + place] = Candidate{last.weight, token};
    found += here;
  }
  __syncthreads();
  if (count <= threadIdx.x) return;
  Candidate mine = memory.likely[threadIdx.x];
  unsigned place = 0;
  for (unsigned i = 0; i < count; i++) {
    Candidate other = memory.likely[i];
    place += mine.weight < other.weight || (mine.weight == other.weight && other.token < mine.token);
  }
  likely[place] = LikelyToken{mine.token, logits[mine.token]};
}

// One block per row. The sum goes by threads and then by halves, as `engine/src/sampler/logprobs.rs` adds it up.
KERNEL(logprobs, kThreads, Logprobs) {
  SHARED(LogprobsMemory, memory);
  const LogprobsRow row = params.rows[blockIdx.x];
  if (row.count == kLeftOut) return;
  const float* logits = params.logits + size_t(blockIdx.x) * params.vocabulary;
  uint32_t token = row.token == kChosen ? params.chosen[blockIdx.x] : row.token;
  // Where none could be chosen the row is refused.
  float chosen = token < params.vocabulary ? logits[token] : infinity();
  float most = -infinity();
  for (unsigned i = threadIdx.x; i < params.vocabulary; i += kThreads) {
    float logit = logits[i];
    if (most < logit) most = logit;
  }
  most = block_max(most, memory.partials);
  double sum = 0;
  unsigned rank = 0;
  for (unsigned i = threadIdx.x; i < params.vocabulary; i += kThreads) {
    float logit = logits[i];
    sum += exp(double(logit - most));
    rank += chosen <= logit;
  }
  memory.sums[threadIdx.x] = sum;
  if (threadIdx.x == 0) memory.rank = 0, memory.found = 0;
  __syncthreads();
  atomicAdd(&memory.rank, rank);
  for (unsigned half = kThreads / 2; 0 < half; half /= 2) {
    if (threadIdx.x < half) memory.sums[threadIdx.x] += memory.sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) params.sums[blockIdx.x] = LogprobsSum{memory.sums[0], most, chosen, memory.rank, 0};
  unsigned count = row.count < params.vocabulary ? row.count : params.vocabulary;
  uint64_t* weights = params.weights + size_t(blockIdx.x) * params.vocabulary;
  LikelyToken* likely = params.likely + size_t(blockIdx.x) * params.places;
  if (0 < count) most_likely(logits, weights, params.vocabulary, count, likely, memory);
}
