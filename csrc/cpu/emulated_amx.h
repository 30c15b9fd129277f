// The tile instructions that amx.cpp uses, in plain C++ with AVX-512, in its place of <immintrin.h>'s: for machines
// without AMX, and for the address sanitizer, which does not see what tile instructions read and write. Sums have the
// instruction's order: even and odd depths apart, from 0, then both onto the tile's number. It rounds products and sums
// to the nearest and counts subnormal operands and results as 0; here subnormal results stay.
#pragma once

#include <immintrin.h>

#include <cstring>

namespace {

struct EmulatedTile {
  alignas(64) float sums[16][16];
};
thread_local EmulatedTile emulated_tiles[8];

inline void emulate_tile_load(int tile, const void* from, long stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(emulated_tiles[tile].sums[row], static_cast<const char*>(from) + row * stride, 64);
  }
}
inline void emulate_tile_store(int tile, void* to, long stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, emulated_tiles[tile].sums[row], 64);
  }
}
// sums += a b
inline void emulate_tile_product(int sums, int a, int b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000)), exponent = _mm512_set1_epi32(0x7f800000);
  const auto normal = [&](__m512i bits) {
    return _mm512_castsi512_ps(_mm512_maskz_mov_epi32(_mm512_test_epi32_mask(bits, exponent), bits));
  };
  for (int row = 0; row < 16; ++row) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int pair = 0; pair < 16; ++pair) {
      int bits;
      std::memcpy(&bits, &emulated_tiles[a].sums[row][pair], sizeof(bits));
      const __m512i left = _mm512_set1_epi32(bits), right = _mm512_loadu_si512(emulated_tiles[b].sums[pair]);
      even = _mm512_fmadd_ps(normal(_mm512_slli_epi32(left, 16)), normal(_mm512_slli_epi32(right, 16)), even);
      odd = _mm512_fmadd_ps(normal(_mm512_and_si512(left, high)), normal(_mm512_and_si512(right, high)), odd);
    }
    float* const to = emulated_tiles[sums].sums[row];
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_add_ps(even, odd)));
  }
}

}  // namespace

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_loadd(tile, from, stride) emulate_tile_load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulate_tile_store(tile, to, stride)
#define _tile_zero(tile) std::memset(&emulated_tiles[tile], 0, sizeof(EmulatedTile))
#define _tile_dpbf16ps(sums, a, b) emulate_tile_product(sums, a, b)
#define _tile_loadconfig(configuration) static_cast<void>(configuration)
#define _tile_release() static_cast<void>(0)
