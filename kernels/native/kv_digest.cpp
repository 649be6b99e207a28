// Digests of KV: the native side of kernels/kv_digest.py, which defines what is computed here.
//
// A vector of bytes costs six instructions besides its load. A copy may be digested from the
// registers that it passes through.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "digests are defined over little-endian words"
#endif

namespace {

constexpr int kLine = 64;        // Bytes.
constexpr int kChunkLines = 64;  // Of one pair of sums.
constexpr int kKeyLines = kChunkLines + 2;

#if defined(__AVX512F__)
constexpr int kVector = 64;
#elif defined(__AVX2__)
constexpr int kVector = 32;
#else
constexpr int kVector = 16;
#endif
constexpr int kParts = kLine / kVector;

// How bytes are copied while they are digested, if they are. Streamed stores do not read their
// target first, a third of the traffic where neither side fits into a cache; hardware then stops
// reading ahead at the end of each page, so that we do it.
enum class Copy { kNone, kCached, kStreamed };
constexpr int64_t kStreamedFrom = 32 << 20;  // Bytes in one call.
constexpr int64_t kAhead = 2048;             // Bytes.

typedef uint64_t Pairs __attribute__((vector_size(kVector)));
typedef uint32_t Words __attribute__((vector_size(kVector)));

inline Pairs load(const uint8_t* from) {
  Pairs value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Pairs add_words(Pairs a, Pairs b) {
  return reinterpret_cast<Pairs>(reinterpret_cast<Words>(a) + reinterpret_cast<Words>(b));
}

// Stores past the caches, to a multiple of kVector.
inline void stream(uint8_t* to, Pairs value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(value));
#else
  std::memcpy(to, &value, sizeof value);
#endif
}

// The products of the low words of each pair.
inline Pairs multiply_low(Pairs a, Pairs b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Pairs>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Pairs>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Pairs>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline bool is_aligned(const uint8_t* to) {
  return reinterpret_cast<uintptr_t>(to) % kVector == 0;
}

// The two sums of a chunk, as they grow.
struct Sums {
  void open(const uint8_t* key) {
    for (int part = 0; part < kParts; ++part) {
      same[part] = next[part] = Pairs{};
      last[part] = load(key + part * kVector);
    }
  }

  // Takes lines, and copies them as kCopy says; `key` is that of the first.
  template <Copy kCopy>
  void take(const uint8_t* from, uint8_t* to, const uint8_t* key, int64_t lines) {
#pragma GCC unroll 8
    for (int64_t at = 0; at < lines * kLine; at += kLine) {
      if (kCopy != Copy::kNone) __builtin_prefetch(from + at + kAhead, 0, 2);
      if (kCopy == Copy::kCached) __builtin_prefetch(to + at + kAhead, 1, 2);
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const Pairs bytes = load(from + at + part * kVector);
        if (kCopy == Copy::kCached) std::memcpy(to + at + part * kVector, &bytes, sizeof bytes);
        if (kCopy == Copy::kStreamed) stream(to + at + part * kVector, bytes);
        const Pairs keyed = add_words(bytes, load(key + at + part * kVector));
        const Pairs high = keyed >> 32;
        same[part] += multiply_low(keyed, high);
        next[part] += multiply_low(last[part], high);
        last[part] = keyed;
      }
    }
  }

  // `key` is the one after that of the last line.
  void close(const uint8_t* key) {
    for (int part = 0; part < kParts; ++part) {
      next[part] += multiply_low(last[part], load(key + part * kVector) >> 32);
    }
  }

  static uint64_t total(const Pairs (&sums)[kParts]) {
    Pairs all = sums[0];
    for (int part = 1; part < kParts; ++part) all += sums[part];
    uint64_t sum = 0;
    for (int lane = 0; lane < kVector / 8; ++lane) sum += all[lane];
    return sum;
  }

  Pairs same[kParts], next[kParts], last[kParts];
};

using Wide = unsigned __int128;
constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;

// Congruent modulo the prime, and below 2^61 + 8, for values below 2^124.
inline uint64_t fold(Wide value) {
  const uint64_t once = static_cast<uint64_t>(value & kPrime) + static_cast<uint64_t>(value >> 61);
  return (once & kPrime) + (once >> 61);
}

inline uint64_t reduce(uint64_t value) { return value >= kPrime ? value - kPrime : value; }

// A point at which polynomials are taken, and its powers.
struct Point {
  explicit Point(const uint8_t* key) {
    std::memcpy(powers, key, 8);
    powers[0] = reduce(powers[0] & kPrime);
    for (int i = 1; i < 4; ++i) powers[i] = reduce(fold(Wide{powers[i - 1]} * powers[0]));
  }
  uint64_t powers[4];
};

// A polynomial by Horner's rule.
class Polynomial {
 public:
  explicit Polynomial(const Point& point) : powers_(point.powers) {}

  // Takes the four words of two sums, low words first.
  void add(uint64_t first, uint64_t second) {
    const Wide words = Wide{first & 0xffffffff} * powers_[2] + Wide{first >> 32} * powers_[1] +
                       Wide{second & 0xffffffff} * powers_[0] + (second >> 32);
    value_ = fold(Wide{value_} * powers_[3] + words);
  }

  uint64_t finish(uint64_t bytes) const {
    return reduce(fold(Wide{value_} * powers_[0] + bytes));
  }

 private:
  const uint64_t* const powers_;
  uint64_t value_ = 0;
};

// Digests one unit, fed piece by piece.
class UnitDigest {
 public:
  UnitDigest(const uint8_t* key, const Point& first, const Point& second)
      : key_(key), first_(first), second_(second) {}

  template <Copy kCopy>
  void feed(const uint8_t* from, uint8_t* to, int64_t bytes) {
    constexpr Copy kPlain = kCopy == Copy::kNone ? Copy::kNone : Copy::kCached;
    bytes_ += bytes;
    if (held_ > 0) {
      const int64_t taken = bytes < kLine - held_ ? bytes : kLine - held_;
      hold<kCopy>(from, to, taken);
      from += taken;
      if (kCopy != Copy::kNone) to += taken;
      bytes -= taken;
      if (held_ == kLine) {
        held_ = 0;
        lines<Copy::kNone>(line_held_, nullptr, 1);
      }
    }
    while (bytes >= kLine) {
      const int64_t whole = bytes / kLine, room = kChunkLines - line_;
      const int64_t count = whole < room ? whole : room;
      if (count == kChunkLines) {
        // What is streamed is read ahead of: not beyond the piece.
        const bool streamed = bytes >= kChunkLines * kLine + kAhead && is_aligned(to);
        if (kCopy == Copy::kStreamed && streamed) {
          chunk<Copy::kStreamed>(from, to);
        } else {
          chunk<kPlain>(from, to);
        }
      } else {
        lines<kPlain>(from, to, count);
      }
      from += count * kLine;
      if (kCopy != Copy::kNone) to += count * kLine;
      bytes -= count * kLine;
    }
    if (bytes > 0) hold<kCopy>(from, to, bytes);
  }

  void finish(const uint8_t* label, uint8_t* digest) {
    if (held_ > 0) {
      std::memset(line_held_ + held_, 0, kLine - held_);
      lines<Copy::kNone>(line_held_, nullptr, 1);
    }
    lines<Copy::kNone>(label, nullptr, 1);
    if (line_ > 0) end_chunk();
    const uint64_t values[2] = {first_.finish(bytes_), second_.finish(bytes_)};
    std::memcpy(digest, values, sizeof values);
  }

 private:
  template <Copy kCopy>
  void hold(const uint8_t* from, uint8_t* to, int64_t bytes) {
    std::memcpy(line_held_ + held_, from, bytes);
    if (kCopy != Copy::kNone) std::memcpy(to, line_held_ + held_, bytes);
    held_ += bytes;
  }

  // A whole chunk at once, whose sums never leave the registers.
  template <Copy kCopy>
  void chunk(const uint8_t* from, uint8_t* to) {
    Sums sums;
    sums.open(key_);
    sums.take<kCopy>(from, to, key_ + kLine, kChunkLines);
    close(sums, kChunkLines);
  }

  // As many lines as the chunk has room for at most.
  template <Copy kCopy>
  void lines(const uint8_t* from, uint8_t* to, int64_t count) {
    if (line_ == 0) sums_.open(key_);
    sums_.take<kCopy>(from, to, key_ + (line_ + 1) * kLine, count);
    line_ += count;
    if (line_ == kChunkLines) end_chunk();
  }

  void end_chunk() {
    close(sums_, line_);
    line_ = 0;
  }

  void close(Sums& sums, int64_t lines) {
    sums.close(key_ + (lines + 1) * kLine);
    const uint64_t same = Sums::total(sums.same), next = Sums::total(sums.next);
    first_.add(same, next);
    second_.add(same, next);
  }

  const uint8_t* const key_;
  Polynomial first_, second_;
  uint64_t bytes_ = 0;
  int64_t line_ = 0, held_ = 0;
  Sums sums_;
  uint8_t line_held_[kLine];
};

// Unit u is the pieces from ends[u - 1] up to ends[u].
struct Pieces {
  const int64_t* offsets;
  const int64_t* lengths;
  const int64_t* ends;
  const int64_t* into;    // Where copies go.
  const uint8_t* labels;  // A line for each unit.
  int64_t count, units;
};

enum Result { kDone = 0, kUnordered = 1, kOutside = 2 };

bool in_order(const Pieces& pieces) {
  int64_t last = 0;
  for (int64_t unit = 0; unit < pieces.units; ++unit) {
    if (pieces.ends[unit] < last) return false;
    last = pieces.ends[unit];
  }
  return last == pieces.count;
}

bool within(const int64_t* offsets, const Pieces& pieces, int64_t bytes) {
  for (int64_t piece = 0; piece < pieces.count; ++piece) {
    const int64_t offset = offsets[piece], length = pieces.lengths[piece];
    if (offset < 0 || length < 0 || offset > bytes || length > bytes - offset) return false;
  }
  return true;
}

template <Copy kCopy>
void for_units(const uint8_t* key, const Pieces& pieces, const uint8_t* from, uint8_t* to,
               uint8_t* out) {
  alignas(kLine) uint8_t aligned[kKeyLines * kLine];
  std::memcpy(aligned, key, sizeof aligned);
  const Point first(key + sizeof aligned), second(key + sizeof aligned + 8);
  int64_t piece = 0;
  for (int64_t unit = 0; unit < pieces.units; ++unit) {
    UnitDigest digest(aligned, first, second);
    for (; piece < pieces.ends[unit]; ++piece) {
      uint8_t* const into = kCopy == Copy::kNone ? nullptr : to + pieces.into[piece];
      digest.feed<kCopy>(from + pieces.offsets[piece], into, pieces.lengths[piece]);
    }
    digest.finish(pieces.labels + kLine * unit, out + 16 * unit);
  }
#if defined(__SSE2__)
  if (kCopy == Copy::kStreamed) _mm_sfence();
#endif
}

}  // namespace

// ---- What Python calls; see kernels/native/kv_digest.py

extern "C" {

int baton_digest_vector_bytes() { return kVector; }

// The hash of each unit goes to `out`, 16 bytes each. Returns 0, or what is wrong with the pieces.
int baton_digest(const uint8_t* key, const uint8_t* memory, int64_t bytes, const int64_t* offsets,
                 const int64_t* lengths, const int64_t* ends, const uint8_t* labels, int64_t count,
                 int64_t units, uint8_t* out) {
  const Pieces pieces{offsets, lengths, ends, nullptr, labels, count, units};
  if (!in_order(pieces)) return kUnordered;
  if (!within(offsets, pieces, bytes)) return kOutside;
  for_units<Copy::kNone>(key, pieces, memory, nullptr, out);
  return kDone;
}

// The hashes of units whose chunks were summed elsewhere: [units, stride, (same, next)], of which a
// unit has as many as `chunks` says.
void baton_digest_of_sums(const uint8_t* key, const uint64_t* sums, const int64_t* chunks,
                          const int64_t* bytes, int64_t units, int64_t stride, uint8_t* out) {
  const Point first(key + kKeyLines * kLine), second(key + kKeyLines * kLine + 8);
  for (int64_t unit = 0; unit < units; ++unit, sums += 2 * stride) {
    Polynomial one(first), two(second);
    for (int64_t chunk = 0; chunk < chunks[unit]; ++chunk) {
      one.add(sums[2 * chunk], sums[2 * chunk + 1]);
      two.add(sums[2 * chunk], sums[2 * chunk + 1]);
    }
    const uint64_t values[2] = {one.finish(bytes[unit]), two.finish(bytes[unit])};
    std::memcpy(out + 16 * unit, values, sizeof values);
  }
}

// The same of what is copied meanwhile to the offsets `into`. Nothing overlaps.
int baton_copy_and_digest(const uint8_t* key, uint8_t* target, int64_t target_bytes,
                          const uint8_t* source, int64_t source_bytes, const int64_t* offsets,
                          const int64_t* lengths, const int64_t* ends, const int64_t* into,
                          const uint8_t* labels, int64_t count, int64_t units, uint8_t* out) {
  const Pieces pieces{offsets, lengths, ends, into, labels, count, units};
  if (!in_order(pieces)) return kUnordered;
  if (!within(offsets, pieces, source_bytes)) return kOutside;
  if (!within(into, pieces, target_bytes)) return kOutside;
  int64_t bytes = 0;
  for (int64_t piece = 0; piece < count; ++piece) bytes += lengths[piece];
  if (bytes >= kStreamedFrom) {
    for_units<Copy::kStreamed>(key, pieces, source, target, out);
  } else {
    for_units<Copy::kCached>(key, pieces, source, target, out);
  }
  return kDone;
}

}  // extern "C"
