// Intel AMX: the configuration of its tiles, beside the compiler's own functions (_tile_loadd and so on, which want
// literal tile numbers). Tests put an emulation in the place of those and run the kernels on any machine.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(DEPTHPRUNE_AMX_EMULATION)
#include DEPTHPRUNE_AMX_EMULATION
#endif

namespace depthprune::amx {

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Memory is as the source says from here on: GCC 12 tells its optimiser nothing of what tile loads read, nor of more
// than the first 8 bytes of a configuration.
inline void settle() { __asm__ volatile("" : : : "memory"); }

// All eight tiles of this thread: 16 rows of 64 bytes.
__attribute__((target("amx-tile"))) inline void configure() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace depthprune::amx
