// Tiles of Intel AMX, where the compiler has them for this processor and the system grants them.
//
// A tile is 16 rows of 64 bytes. multiply_tiles adds to a tile of 16 x 16 floats the product of a
// tile of 16 rows of 32 bfloat16 and one of 16 pairs of 16 columns; see bfloat16.h for its bits.
#pragma once

#include "bfloat16.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define BATON_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace baton {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // Of a row.

#if defined(BATON_AMX)

// Asks the system, once and for all threads of this process.
static inline bool request_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID leaf 7, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

static inline bool has_amx() {
  static const bool granted = request_amx();
  return granted;
}

// Has everything in memory that tiles are about to be loaded from: GCC's intrinsics do not tell its
// optimiser that they read.
static inline void before_loads() { asm volatile("" : : : "memory"); }

// All eight tiles at full size, on this thread, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kTileBytes;
      config.rows[tile] = kTileRows;
    }
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#else

static inline bool has_amx() { return false; }

#endif

}  // namespace baton
