// Digests of granules of blocks, as `kvtransfer/proto/src/digest.rs` takes them: XXH3 of 64 bits with a seed, of more than 240 bytes
// (Yann Collet, xxHash, `doc/xxhash_spec.md`). Of every byte of a granule, or of a sample: some of its lines, one behind the other.
//
// A granule is cut into pieces of 16 stripes. What a piece adds to the eight lanes of the state does not depend on the state, so warps take
// pieces side by side; only the turn of the state behind each piece goes one after the other, in eight threads.
#include "device.cuh"

struct GranuleOfBlock {
  const uint8_t* bytes;
  uint64_t seed;
  uint32_t sum;  // which of the sums the digest is added to
  uint32_t reserved;
};

struct DigestGranules {
  unsigned long long* sums;
  const GranuleOfBlock* granules;  // a block of threads for each
  uint64_t secret[24];
  uint32_t bytes;  // of a granule: more than 240, a multiple of eight as its address is
  uint32_t reserved;
};

constexpr unsigned kSampleLines = 4, kLineBytes = 64, kSampleBytes = kSampleLines * kLineBytes;

struct SampleOfBlock {
  const uint8_t* lines[kSampleLines];
  uint64_t seed;
  uint32_t sum;  // which of the sums the digest is added to
  uint32_t reserved;
};

struct DigestSamples {
  unsigned long long* sums;
  const SampleOfBlock* samples;  // a block of threads for each
  uint64_t secret[24];
};

constexpr unsigned kStateLanes = 8, kStripeBytes = 64, kStripes = 16, kPieceBytes = kStripes * kStripeBytes;
constexpr unsigned kDigestThreads = 256, kPiecesAtOnce = 64;
constexpr uint64_t kPrime32First = 0x9e3779b1u, kPrime32Second = 0x85ebca77u, kPrime32Third = 0xc2b2ae3du;
constexpr uint64_t kPrime64First = 0x9e3779b185ebca87u, kPrime64Second = 0xc2b2ae3d27d4eb4fu, kPrime64Third = 0x165667b19e3779f9u;
constexpr uint64_t kPrime64Fourth = 0x85ebca77c2b2ae63u, kPrime64Fifth = 0x27d4eb2f165667c5u, kAvalanche = 0x165667919e3779f9u;
// Places in the secret, in bytes: of the keys of the last stripe, and of the end.
constexpr unsigned kLastStripeKeys = 121, kEndKeys = 11;

struct DigestMemory {
  uint64_t pieces[kPiecesAtOnce][kStateLanes];
  uint64_t state[kStateLanes];
  uint64_t passed[kStateLanes];
};

// A word of the secret that the seed makes.
__device__ __forceinline__ uint64_t key(const uint64_t* secret, uint64_t seed, unsigned word) {
  return word % 2 == 0 ? secret[word] + seed : secret[word] - seed;
}

__device__ __forceinline__ uint64_t key_at(const uint64_t* secret, uint64_t seed, unsigned byte) {
  unsigned shift = byte % 8 * 8;
  uint64_t low = key(secret, seed, byte / 8);
  return shift == 0 ? low : (low >> shift) | (key(secret, seed, byte / 8 + 1) << (64 - shift));
}

__device__ __forceinline__ uint64_t product_of_halves(uint64_t x) { return uint64_t(uint32_t(x)) * (x >> 32); }

__device__ __forceinline__ uint64_t first_state(unsigned lane) {
  switch (lane) {
    case 0: return kPrime32Third;
    case 1: return kPrime64First;
    case 2: return kPrime64Second;
    case 3: return kPrime64Third;
    case 4: return kPrime64Fourth;
    case 5: return kPrime32Second;
    case 6: return kPrime64Fifth;
    default: return kPrime32First;
  }
}

// What some stripes add to the lane of the state that this thread has, for all threads of a warp.
__device__ __forceinline__ uint64_t piece_sum(const uint64_t* secret, const uint8_t* bytes, uint64_t seed, unsigned stripes) {
  unsigned lane = threadIdx.x % kStateLanes;
  uint64_t product = 0, passed = 0;
  for (unsigned stripe = threadIdx.x % kWarp / kStateLanes; stripe < stripes; stripe += kWarp / kStateLanes) {
    uint64_t data = *(const uint64_t*)(bytes + stripe * kStripeBytes + lane * 8);
    product += product_of_halves(data ^ key(secret, seed, stripe + lane));
    passed += data;
  }
  // Data goes to the neighbour.
  uint64_t sum = product + __shfl_xor_sync(kAllLanes, passed, 1);
  sum += __shfl_xor_sync(kAllLanes, sum, kStateLanes);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2 * kStateLanes);
}

// Both halves of the product of 128 bits.
__device__ __forceinline__ uint64_t fold(uint64_t a, uint64_t b) {
  uint64_t low_a = uint32_t(a), high_a = a >> 32, low_b = uint32_t(b), high_b = b >> 32;
  uint64_t low = low_a * low_b, middle = (low >> 32) + uint32_t(high_a * low_b) + low_a * high_b;
  uint64_t high = ((high_a * low_b) >> 32) + (middle >> 32) + high_a * high_b;
  return high ^ ((middle << 32) | uint32_t(low));
}

// The digest of some bytes, for thread 0 of a block. Every thread takes part.
__device__ __forceinline__ uint64_t digest_of(const uint64_t* secret, const uint8_t* all, unsigned count, uint64_t seed, DigestMemory& memory) {
  unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // The last byte is never of a whole piece: that has a turn behind it.
  unsigned whole = (count - 1) / kPieceBytes, rest = (count - 1) % kPieceBytes / kStripeBytes;
  uint64_t state = first_state(lane % kStateLanes);
  for (unsigned first = 0; first <= whole; first += kPiecesAtOnce) {
    unsigned end = first + kPiecesAtOnce < whole + 1 ? first + kPiecesAtOnce : whole + 1;
    for (unsigned piece = first + warp; piece < end; piece += kDigestThreads / kWarp) {
      const uint8_t* bytes = all + size_t(piece) * kPieceBytes;
      uint64_t sum = piece_sum(secret, bytes, seed, piece < whole ? kStripes : rest);
      if (lane < kStateLanes) memory.pieces[piece - first][lane] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kStateLanes) {
      for (unsigned piece = first; piece < end; piece++) {
        state += memory.pieces[piece - first][lane];
        if (piece < whole) state = (state ^ (state >> 47) ^ key(secret, seed, kStripes + lane)) * kPrime32First;
      }
    }
    __syncthreads();
  }
  // The last stripe is that of the last bytes, whether they were looked at or not.
  if (threadIdx.x < kStateLanes) {
    uint64_t data = *(const uint64_t*)(all + count - kStripeBytes + lane * 8);
    memory.state[lane] = state + product_of_halves(data ^ key_at(secret, seed, kLastStripeKeys + lane * 8));
    memory.passed[lane] = data;
  }
  __syncthreads();
  if (threadIdx.x != 0) return 0;
  uint64_t digest = count * kPrime64First;
  for (unsigned i = 0; i < kStateLanes; i += 2) {
    uint64_t even = memory.state[i] + memory.passed[i + 1], odd = memory.state[i + 1] + memory.passed[i];
    digest += fold(even ^ key_at(secret, seed, kEndKeys + i * 8), odd ^ key_at(secret, seed, kEndKeys + i * 8 + 8));
  }
  digest = (digest ^ (digest >> 37)) * kAvalanche;
  return digest ^ (digest >> 32);
}

KERNEL(digest_granules, kDigestThreads, DigestGranules) {
  SHARED(DigestMemory, memory);
  const GranuleOfBlock granule = params.granules[blockIdx.x];
  uint64_t digest = digest_of(params.secret, granule.bytes, params.bytes, granule.seed, memory);
  if (threadIdx.x == 0) atomicAdd(&params.sums[granule.sum], (unsigned long long)digest);
}

struct SampleMemory {
  uint64_t words[kSampleBytes / 8];
  DigestMemory digest;
};

KERNEL(digest_samples, kDigestThreads, DigestSamples) {
  SHARED(SampleMemory, memory);
  const SampleOfBlock* sample = &params.samples[blockIdx.x];
  constexpr unsigned kWords = kLineBytes / 8;
  if (threadIdx.x < kSampleLines * kWords) {
    memory.words[threadIdx.x] = ((const uint64_t*)sample->lines[threadIdx.x / kWords])[threadIdx.x % kWords];
  }
  __syncthreads();
  uint64_t digest = digest_of(params.secret, (const uint8_t*)memory.words, kSampleBytes, sample->seed, memory.digest);
  if (threadIdx.x == 0) atomicAdd(&params.sums[sample->sum], (unsigned long long)digest);
}
