// Compiled with AMX and AVX512-BF16 (cmake/cpu_isa.cmake), so no header with inline functions may be included: the
// linker might choose their code for the whole module.
#include "cpu/amx.h"

#ifdef FLASH_XLSTM_X86_ISAS
#include <immintrin.h>

namespace flash_xlstm::cpu::amx {
namespace {

// 16 x 16 float32 sums or 16 x 32 bfloat16 numbers in each of the eight tiles.
struct alignas(64) Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// 32 numbers as bfloat16: those of `low` first. And what rounding leaves of them, rounded.
struct Rounded {
  __m512i one, rest;
};
__m512 as_floats(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
template <int parts>
Rounded round(__m512 low, __m512 high) {
  const __m512i one = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (parts == 1) return {one, one};
  const __m512 low_rest = _mm512_sub_ps(low, as_floats(_mm512_castsi512_si256(one)));
  const __m512 high_rest = _mm512_sub_ps(high, as_floats(_mm512_extracti64x4_epi64(one, 1)));
  return {one, (__m512i)_mm512_cvtne2ps_pbh(high_rest, low_rest)};
}

__m512i places_across() {
  alignas(64) uint16_t places[32];
  for (int x = 0; x < 32; ++x) places[x] = static_cast<uint16_t>(x / 2 + x % 2 * 16);
  return _mm512_load_si512(places);
}

// 16 x 16 pairs: each pass interleaves rows that are half a block apart, and four transpose the block.
void transpose(__m512i (&rows)[16]) {
  alignas(64) uint32_t low[16], high[16];
  for (int x = 0; x < 16; ++x) low[x] = x / 2 + x % 2 * 16, high[x] = 8 + low[x];
  const __m512i of_low = _mm512_load_si512(low), of_high = _mm512_load_si512(high);
  for (int pass = 0; pass < 4; ++pass) {
    __m512i next[16];
    for (int x = 0; x < 8; ++x) {
      next[2 * x] = _mm512_permutex2var_epi32(rows[x], of_low, rows[x + 8]);
      next[2 * x + 1] = _mm512_permutex2var_epi32(rows[x], of_high, rows[x + 8]);
    }
    for (int x = 0; x < 16; ++x) rows[x] = next[x];
  }
}

// Tiles of both operands are blocks of 16 x 16 pairs of neighbours in depth. Writes those of a matrix whose rows, or with
// `across` whose columns, become the tiles' rows. Blocks of 16 rows lie `stride` apart, the second part's tiles at
// `rest`.
struct Tiles {
  uint16_t *to, *rest;
  int64_t stride;
  bool transposed;

  void put(__m512i (&block)[16], uint16_t* part, int64_t row, int64_t k) const {
    if (transposed) transpose(block);
    for (int x = 0; x < 16; ++x) _mm512_storeu_si512(part + row * stride + k * 16 + x * 32, block[x]);
  }
};
constexpr int64_t lines_a_block = 3;  // that arrive from L3 in the time of a block

template <int parts>
void pack_along(const Tiles& tiles, const float* from, int64_t from_row, int64_t rows, int64_t depth, Ahead* ahead) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      if (ahead != nullptr) ahead->prefetch(parts * lines_a_block);
      const __mmask16 low = first(depth - k), high = first(depth - k - 16);
      __m512i block[parts][16];
      for (int x = 0; x < 16; ++x) {
        const float* row = from + (r + x) * from_row + k;
        const bool is_row = r + x < rows;
        const Rounded both = round<parts>(_mm512_maskz_loadu_ps(is_row ? low : 0, row),
                                          _mm512_maskz_loadu_ps(is_row ? high : 0, row + 16));
        block[0][x] = both.one;
        if (parts == 2) block[parts - 1][x] = both.rest;
      }
      tiles.put(block[0], tiles.to, r, k);
      if (parts == 2) tiles.put(block[parts - 1], tiles.rest, r, k);
    }
  }
}
template <int parts>
void pack_across(const Tiles& tiles, const float* from, int64_t from_row, int64_t depth, int64_t columns,
                 Ahead* ahead) {
  const __m512i places = places_across();  // number x of the first row, then of the second
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first(columns - c);
    for (int64_t k = 0; k < depth; k += 32) {
      if (ahead != nullptr) ahead->prefetch(parts * lines_a_block);
      __m512i block[parts][16];
      for (int x = 0; x < 16; ++x) {
        const float* row = from + (k + 2 * x) * from_row + c;
        const __mmask16 here = k + 2 * x < depth ? mask : 0, next = k + 2 * x + 1 < depth ? mask : 0;
        const Rounded both =
            round<parts>(_mm512_maskz_loadu_ps(here, row), _mm512_maskz_loadu_ps(next, row + from_row));
        block[0][x] = _mm512_permutexvar_epi16(places, both.one);
        if (parts == 2) block[parts - 1][x] = _mm512_permutexvar_epi16(places, both.rest);
      }
      tiles.put(block[0], tiles.to, c, k);
      if (parts == 2) tiles.put(block[parts - 1], tiles.rest, c, k);
    }
  }
}

}  // namespace

void begin() {
  static constexpr Configuration configuration;
  _tile_loadconfig(&configuration);
}
void end() { _tile_release(); }

void pack_left(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows, int64_t depth,
               int parts, Ahead* ahead) {
  const int64_t part_depth = padded(depth, tile_depth);
  const Tiles tiles{to, to + part_depth * 16, parts * part_depth, transposed};
  if (parts == 2) {
    if (transposed) return pack_across<2>(tiles, from, from_row, depth, rows, ahead);
    return pack_along<2>(tiles, from, from_row, rows, depth, ahead);
  }
  if (transposed) return pack_across<1>(tiles, from, from_row, depth, rows, ahead);
  pack_along<1>(tiles, from, from_row, rows, depth, ahead);
}

void pack_right(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth, int64_t columns,
                Ahead* ahead) {
  const Tiles tiles{to, nullptr, padded(depth, tile_depth), transposed};
  if (transposed) return pack_along<1>(tiles, from, from_row, columns, depth, ahead);
  pack_across<1>(tiles, from, from_row, depth, columns, ahead);
}

namespace {

// Where a tile of 16 x 16 sums goes, cut to what exists.
struct Tile {
  float* out;
  const float* from;
  float keep;
  int64_t row_stride, rows, columns;

  bool is_whole() const { return rows >= 16 && columns >= 16 && from == nullptr; }
  // From `sums`, a copy of the tile.
  void finish(const float* sums) const {
    const __mmask16 mask = first(columns);
    const __m512 factor = _mm512_set1_ps(keep);
    for (int64_t r = 0; r < 16 && r < rows; ++r) {
      __m512 x = _mm512_load_ps(sums + r * 16);
      if (from != nullptr) x = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask, from + r * row_stride), x);
      _mm512_mask_storeu_ps(out + r * row_stride, mask, x);
    }
  }
};

// The tile's number must be known to the compiler.
#define STORE_TILE(number, tile)                               \
  do {                                                         \
    if ((tile).is_whole()) {                                   \
      _tile_stored(number, (tile).out, (tile).row_stride * 4); \
    } else {                                                   \
      _tile_stored(number, sums, 64);                          \
      (tile).finish(sums);                                     \
    }                                                          \
  } while (false)

}  // namespace

void multiply(float* out, const float* from, float keep, const uint16_t* a, int parts, const uint16_t* b, int64_t rows,
              int64_t columns, int64_t depth, Part part, Ahead* ahead) {
  const int64_t part_depth = padded(depth, tile_depth), stride = parts * part_depth;
  alignas(64) float sums[256];
  // Two by two tiles from row r and column c on.
  const auto block = [&](int64_t r, int64_t c) {
    const bool second_row = rows - r > 16, second_column = columns - c > 16;
    if (ahead != nullptr) ahead->prefetch(parts * depth / 16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t begin = part == Part::upper_a ? r : 0;
    const int64_t end = part == Part::lower_a && r + 32 < part_depth ? r + 32 : part_depth;
    for (int p = 0; p < parts; ++p) {
      const uint16_t *a0 = a + r * stride + p * part_depth * 16, *a1 = a0 + 16 * stride;
      const uint16_t *b0 = b + c * part_depth, *b1 = b0 + 16 * part_depth;
      for (int64_t k = begin; k < end; k += 32) {
        _tile_loadd(4, a0 + k * 16, 64);
        _tile_loadd(6, b0 + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (second_column) {
          _tile_loadd(7, b1 + k * 16, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (second_row) {
          _tile_loadd(5, a1 + k * 16, 64);
          _tile_dpbf16ps(2, 5, 6);
          if (second_column) _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    const auto tile = [&](int64_t row, int64_t column) {
      const int64_t at = (r + row) * columns + c + column;
      return Tile{out + at, from == nullptr ? nullptr : from + at, keep, columns, rows - r - row, columns - c - column};
    };
    STORE_TILE(0, tile(0, 0));
    if (second_column) STORE_TILE(1, tile(0, 16));
    if (second_row) STORE_TILE(2, tile(16, 0));
    if (second_row && second_column) STORE_TILE(3, tile(16, 16));
  };
  // Along the rows, so that memory is read and written in order.
  for (int64_t r = 0; r < rows; r += 32) {
    for (int64_t c = 0; c < (part == Part::lower_out ? r + 1 : columns); c += 32) block(r, c);
  }
}

}  // namespace flash_xlstm::cpu::amx

#else

namespace flash_xlstm::cpu::amx {
void begin() {}
void end() {}
void pack_left(uint16_t*, const float*, int64_t, bool, int64_t, int64_t, int, Ahead*) {}
void pack_right(uint16_t*, const float*, int64_t, bool, int64_t, int64_t, Ahead*) {}
void multiply(float*, const float*, float, const uint16_t*, int, const uint16_t*, int64_t, int64_t, int64_t, Part,
              Ahead*) {}
}  // namespace flash_xlstm::cpu::amx
#endif
