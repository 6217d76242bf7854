// Intel AMX in plain code, in the place of the compiler's functions: what csrc/cpu/simd/amx.h takes in tests. A tile
// that was not configured, and a row outside of its tile, stop the process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Tiles {
  unsigned char config[64];
  unsigned char data[8][16][64];
};
inline thread_local Tiles tiles{};

inline int row_bytes(int tile) {
  uint16_t bytes;
  std::memcpy(&bytes, tiles.config + 16 + 2 * tile, 2);
  return bytes;
}
inline int rows(int tile) { return tiles.config[48 + tile]; }

inline void require(bool condition) {
  if (!condition) std::abort();
}

inline void require_tile(int tile) {
  require(tiles.config[0] == 1 && rows(tile) > 0 && rows(tile) <= 16 && row_bytes(tile) > 0 && row_bytes(tile) <= 64);
}

inline void loadconfig(const void* config) {
  std::memcpy(tiles.config, config, 64);
  for (int i = 1; i < 16; ++i) require(tiles.config[i] == 0);
  std::memset(tiles.data, 0, sizeof(tiles.data));
}

inline void release() { std::memset(&tiles, 0, sizeof(tiles)); }

inline void zero(int tile) {
  require_tile(tile);
  std::memset(tiles.data[tile], 0, sizeof(tiles.data[tile]));
}

inline void load(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int r = 0; r < rows(tile); ++r) {
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(from) + r * stride, row_bytes(tile));
  }
}

inline void store(int tile, void* to, int64_t stride) {
  require_tile(tile);
  for (int r = 0; r < rows(tile); ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[tile][r], row_bytes(tile));
  }
}

inline float widen(const unsigned char* half) {
  uint16_t bits;
  std::memcpy(&bits, half, 2);
  const uint32_t wide = (bits & 0x7f80) == 0 ? (bits & 0x8000u) << 16 : static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void dpbf16ps(int sums, int a, int b) {
  for (int tile : {sums, a, b}) require_tile(tile);
  require(rows(sums) == rows(a) && row_bytes(sums) == row_bytes(b) && row_bytes(a) == 4 * rows(b));
  for (int m = 0; m < rows(sums); ++m) {
    for (int n = 0; n < row_bytes(sums) / 4; ++n) {
      float sum;
      std::memcpy(&sum, tiles.data[sums][m] + 4 * n, 4);
      for (int k = 0; k < rows(b); ++k) {
        for (int half = 0; half < 2; ++half) {
          sum += widen(tiles.data[a][m] + 4 * k + 2 * half) * widen(tiles.data[b][k] + 4 * n + 2 * half);
        }
      }
      std::memcpy(tiles.data[sums][m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig ::emulated_amx::loadconfig
#define _tile_release ::emulated_amx::release
#define _tile_zero ::emulated_amx::zero
#define _tile_loadd ::emulated_amx::load
#define _tile_stored ::emulated_amx::store
#define _tile_dpbf16ps ::emulated_amx::dpbf16ps
