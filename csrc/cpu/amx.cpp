// Compiled with AMX and AVX512-BF16 (cmake/cpu_isa.cmake), so no header with inline functions may be included: the
// linker might choose their code for the whole module.
#include "cpu/amx.h"

#ifdef FLASH_XLSTM_X86_ISAS
#include <immintrin.h>
#ifdef FLASH_XLSTM_EMULATE_AMX
#include "cpu/emulated_amx.h"
#endif

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
__attribute__((always_inline)) inline void transpose(__m512i (&rows)[16]) {
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

// Matrices to pack, whose rows from `rows` on are zeros. along: 32 numbers of a row, across: 16 of each of two rows, side
// by side. Of these the masks say which there are.
template <int number_of_parts>
struct Floats {
  static constexpr int parts = number_of_parts;
  static constexpr int64_t lines_a_block = 3 * parts;  // that arrive from L3 in the time of a block
  const float* from;
  int64_t row_stride, rows;

  Rounded along(int64_t row, int64_t k, __mmask16 low, __mmask16 high) {
    const float* at = from + row * row_stride + k;
    return round<parts>(_mm512_maskz_loadu_ps(low, at), _mm512_maskz_loadu_ps(high, at + 16));
  }
  Rounded across(int64_t row, int64_t c, __mmask16 here, __mmask16 next, __m512i places) {
    const float* at = from + row * row_stride + c;
    Rounded both = round<parts>(_mm512_maskz_loadu_ps(here, at), _mm512_maskz_loadu_ps(next, at + row_stride));
    both.one = _mm512_permutexvar_epi16(places, both.one);
    if (parts == 2) both.rest = _mm512_permutexvar_epi16(places, both.rest);
    return both;
  }
};
struct Halves {
  static constexpr int parts = 1;
  static constexpr int64_t lines_a_block = 2;
  const uint16_t* from;
  int64_t row_stride, rows;
  __m512i most = _mm512_setzero_si512();  // the largest magnitudes

  Rounded along(int64_t row, int64_t k, __mmask16 low, __mmask16 high) {
    return see(_mm512_maskz_loadu_epi16(_mm512_kunpackw(high, low), from + row * row_stride + k));
  }
  Rounded across(int64_t row, int64_t c, __mmask16 here, __mmask16 next, __m512i places) {
    const uint16_t* at = from + row * row_stride + c;
    const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(here, at));
    const __m512i both = _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(next, at + row_stride), 1);
    return see(_mm512_permutexvar_epi16(places, both));
  }
  Rounded see(__m512i values) {
    most = _mm512_max_epu16(most, _mm512_and_si512(values, _mm512_set1_epi16(0x7fff)));
    return {values, values};
  }
  bool finite() const { return _mm512_cmpgt_epu16_mask(most, _mm512_set1_epi16(0x7f7f)) == 0; }
};

// Both return the matrix, and take copies: what they write to could be part of what they read from otherwise.
template <typename Matrix>
Matrix pack_along(const Tiles tiles, Matrix from, int64_t rows, int64_t depth, Ahead* ahead) {
  constexpr int parts = Matrix::parts;
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      if (ahead != nullptr) ahead->prefetch(Matrix::lines_a_block);
      const __mmask16 low = first(depth - k), high = first(depth - k - 16);
      const int64_t here = from.rows - r;
      __m512i block[parts][16];
      for (int x = 0; x < 16; ++x) {
        const Rounded both = from.along(r + x, k, x < here ? low : 0, x < here ? high : 0);
        block[0][x] = both.one;
        if (parts == 2) block[parts - 1][x] = both.rest;
      }
      tiles.put(block[0], tiles.to, r, k);
      if (parts == 2) tiles.put(block[parts - 1], tiles.rest, r, k);
    }
  }
  return from;
}
template <typename Matrix>
Matrix pack_across(const Tiles tiles, Matrix from, int64_t depth, int64_t columns, Ahead* ahead) {
  constexpr int parts = Matrix::parts;
  const __m512i places = places_across();  // number x of the first row, then of the second
  for (int64_t c = 0; c < columns; c += 16) {
    const __mmask16 mask = first(columns - c);
    for (int64_t k = 0; k < depth; k += 32) {
      if (ahead != nullptr) ahead->prefetch(Matrix::lines_a_block);
      const int64_t here = from.rows - k;
      __m512i block[parts][16];
      for (int x = 0; x < 16; ++x) {
        const Rounded both = from.across(k + 2 * x, c, 2 * x < here ? mask : 0, 2 * x + 1 < here ? mask : 0, places);
        block[0][x] = both.one;
        if (parts == 2) block[parts - 1][x] = both.rest;
      }
      tiles.put(block[0], tiles.to, c, k);
      if (parts == 2) tiles.put(block[parts - 1], tiles.rest, c, k);
    }
  }
  return from;
}

template <typename Matrix>
Matrix pack_left(uint16_t* to, const Matrix& from, bool transposed, int64_t rows, int64_t depth, Ahead* ahead) {
  const int64_t part_depth = padded(depth, tile_depth);
  const Tiles tiles{to, to + part_depth * 16, Matrix::parts * part_depth, transposed};
  return transposed ? pack_across(tiles, from, depth, rows, ahead) : pack_along(tiles, from, rows, depth, ahead);
}
template <typename Matrix>
Matrix pack_right(uint16_t* to, const Matrix& from, bool transposed, int64_t depth, int64_t columns, Ahead* ahead) {
  const Tiles tiles{to, nullptr, padded(depth, tile_depth), transposed};
  return transposed ? pack_along(tiles, from, columns, depth, ahead) : pack_across(tiles, from, depth, columns, ahead);
}

}  // namespace

void begin() {
  static constexpr Configuration configuration;
  _tile_loadconfig(&configuration);
}
void end() { _tile_release(); }

void pack_left(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows, int64_t depth,
               int parts, Ahead* ahead) {
  const int64_t of_from = transposed ? depth : rows;
  if (parts == 2) {
    pack_left(to, Floats<2>{from, from_row, of_from}, transposed, rows, depth, ahead);
  } else {
    pack_left(to, Floats<1>{from, from_row, of_from}, transposed, rows, depth, ahead);
  }
}
void pack_right(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth, int64_t columns,
                Ahead* ahead) {
  pack_right(to, Floats<1>{from, from_row, transposed ? columns : depth}, transposed, depth, columns, ahead);
}
bool pack_left(uint16_t* to, const uint16_t* from, int64_t from_row, int64_t count, bool transposed, int64_t rows,
               int64_t depth, Ahead* ahead) {
  return pack_left(to, Halves{from, from_row, count}, transposed, rows, depth, ahead).finite();
}
bool pack_right(uint16_t* to, const uint16_t* from, int64_t from_row, int64_t count, bool transposed, int64_t depth,
                int64_t columns, Ahead* ahead) {
  return pack_right(to, Halves{from, from_row, count}, transposed, depth, columns, ahead).finite();
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

// --- pairs ---------------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t pair_rows = 8;

// `rows` rows by `tiles` times 16 columns, from depth `begin` to `end`, which are even.
template <int rows, int tiles>
void pair_block(const Tile& to, const uint16_t* a, int64_t a_part, int parts, const uint16_t* b, int64_t b_tile,
                int64_t begin, int64_t end) {
  __m512 sums[rows][tiles] = {};
  for (int part = 0; part < parts; ++part, a += a_part) {
    for (int64_t k = begin; k < end;) {
      const uint16_t *a_pair = a + k / 32 * 512 + k % 32, *b_pair = b + k / 32 * 512 + k % 32 * 16;
      const int64_t stop = k / 32 * 32 + 32 < end ? k / 32 * 32 + 32 : end;
      for (; k < stop; k += 2, a_pair += 2, b_pair += 32) {
        __m512bh of_b[tiles];
#pragma GCC unroll 4
        for (int x = 0; x < tiles; ++x) of_b[x] = (__m512bh)_mm512_loadu_si512(b_pair + x * b_tile);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          int pair;
          __builtin_memcpy(&pair, a_pair + r * 32, sizeof(pair));
          const __m512bh of_a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int x = 0; x < tiles; ++x) sums[r][x] = _mm512_dpbf16_ps(sums[r][x], of_b[x], of_a);
        }
      }
    }
  }
  // Unrolled, so that the sums stay in registers.
  const __m512 keep = _mm512_set1_ps(to.keep);
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    if (r >= to.rows) continue;
#pragma GCC unroll 4
    for (int x = 0; x < tiles; ++x) {
      const __mmask16 mask = first(to.columns - x * 16);
      const int64_t at = r * to.row_stride + x * 16;
      __m512 sum = sums[r][x];
      if (to.from != nullptr) sum = _mm512_fmadd_ps(keep, _mm512_maskz_loadu_ps(mask, to.from + at), sum);
      _mm512_mask_storeu_ps(to.out + at, mask, sum);
    }
  }
}

// Few rows take more columns: a row's sums wait for one another.
template <int rows>
auto pair_block_of(int64_t columns) {
  if (rows < pair_rows && columns > 48) return pair_block < rows, rows < pair_rows ? 4 : 2 > ;
  return columns > 16 ? pair_block<rows, 2> : pair_block<rows, 1>;
}

}  // namespace

void multiply_pairs(float* out, const float* from, float keep, const uint16_t* a, int parts, const uint16_t* b,
                    int64_t rows, int64_t columns, int64_t depth, Part part, Ahead* ahead) {
  const int64_t part_depth = padded(depth, tile_depth), stride = parts * part_depth, b_tile = 16 * part_depth;
  // Along the rows, so that memory is read and written in order.
  for (int64_t r = 0; r < rows; r += pair_rows) {
    const uint16_t* const a_rows = a + r / 16 * 16 * stride + r % 16 * 32;
    const int64_t begin = part == Part::upper_a ? r : 0;
    const int64_t end = part == Part::lower_a && r + pair_rows < part_depth ? r + pair_rows : part_depth;
    for (int64_t c = 0; c < columns && (part != Part::lower_out || c < r + pair_rows);) {
      if (ahead != nullptr) ahead->prefetch(parts * depth / 32);
      const int64_t at = r * columns + c, left = rows - r, wide = columns - c;
      const Tile to{out + at, from == nullptr ? nullptr : from + at, keep, columns, left, wide};
      const auto block = left == 1   ? pair_block_of<1>(wide)
                         : left == 2 ? pair_block_of<2>(wide)
                         : left <= 4 ? pair_block_of<4>(wide)
                                     : pair_block_of<pair_rows>(wide);
      block(to, a_rows, b_tile, parts, b + c * part_depth, b_tile, begin, end);
      c += left <= 4 && wide > 48 ? 64 : 32;
    }
  }
}

// --- float32 -------------------------------------------------------------------------------------------------------

namespace {

// 16 pairs (low, high) of float32 numbers as pairs of bfloat16 numbers, three times: each part is what the ones before
// leave, rounded. Depths that lie 16 apart make a pair, which takes no permutation; a product may sum in any order.
void split(__m512i (&to)[3], __m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000), mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int p = 0; p < 3; ++p) {
    __m512i low_bits = _mm512_castps_si512(low), high_bits = _mm512_castps_si512(high);
    if (p < 2) {  // nothing is left to round in the third
      low_bits = _mm512_add_epi32(low_bits, half);
      high_bits = _mm512_add_epi32(high_bits, half);
      low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(low_bits, mask)));
      high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(high_bits, mask)));
    }
    to[p] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low_bits, 16), high_bits);
  }
}

__m512i magnitudes(__m512 values) {
  return _mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(0x7fffffff));
}

// The least and the largest magnitude seen in each lane.
struct Magnitudes {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();

  void see(__m512 values) {
    const __m512i bits = magnitudes(values);
    least = _mm512_min_epu32(least, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));
    most = _mm512_max_epu32(most, bits);
  }
  bool within(const Range& range) const {
    const __m512i low = _mm512_set1_epi32(static_cast<int>(range.least)),
                  high = _mm512_set1_epi32(static_cast<int>(range.most));
    return (_mm512_cmplt_epu32_mask(least, low) | _mm512_cmpgt_epu32_mask(most, high)) == 0;
  }
  Range range() const {
    Seen seen;
    add_to(seen);
    return seen.range();
  }
  void add_to(Seen& seen) const {
    _mm512_store_si512(seen.least, _mm512_min_epu32(least, _mm512_load_si512(seen.least)));
    _mm512_store_si512(seen.most, _mm512_max_epu32(most, _mm512_load_si512(seen.most)));
  }
};

void put(uint16_t* to, int64_t part, __m512 low, __m512 high) {
  __m512i parts[3];
  split(parts, low, high);
  for (int p = 0; p < 3; ++p) _mm512_storeu_si512(to + p * part, parts[p]);
}
// A tile of each part from 16 rows of pairs, load(row, 0) and load(row, 1). With `across` the floats are transposed
// first: two blocks of them, where there are three of pairs. Copies, because stores to `to` could change what `load` and
// `all` refer to.
template <bool across, typename Load>
__attribute__((always_inline)) inline void put_tiles(uint16_t* to, int64_t part, Magnitudes& all, const Load load) {
  Magnitudes seen = all;
  __m512i blocks[2][16];
  for (int half = 0; half < 2 && across; ++half) {
#pragma GCC unroll 16
    for (int x = 0; x < 16; ++x) blocks[half][x] = _mm512_castps_si512(load(x, half));
    transpose(blocks[half]);
  }
  for (int x = 0; x < 16; ++x) {
    __m512 values[2];
    for (int half = 0; half < 2; ++half) {
      values[half] = across ? _mm512_castsi512_ps(blocks[half][x]) : load(x, half);
      seen.see(values[half]);
    }
    put(to + x * 32, part, values[0], values[1]);
  }
  all = seen;
}

// As above, in three parts.
template <bool transposed>
void split_along(uint16_t* to, const float* from, int64_t from_row, int64_t rows, int64_t depth, Magnitudes& seen) {
  const int64_t part = padded(depth, tile_depth) * 16;
  for (int64_t r = 0; r < rows; r += 16, to += 2 * part) {
    for (int64_t k = 0; k < depth; k += 32, to += 512) {
      const __mmask16 low = first(depth - k), high = first(depth - k - 16);
      const float* const at = from + r * from_row + k;
      const int64_t here = rows - r;
      put_tiles<transposed>(to, part, seen, [=](int64_t x, int half) {
        const float* const row = at + x * from_row + 16 * half;
        __builtin_prefetch(row + 16 * from_row, 0, 3);
        return _mm512_maskz_loadu_ps(x < here ? half == 0 ? low : high : 0, row);
      });
    }
  }
}
// Along the rows, so that memory is read in order. from(k) is the row of depth k.
template <bool transposed, typename Row>
void split_across(uint16_t* to, const Row from, int64_t depth, int64_t columns, Magnitudes& seen) {
  const int64_t part = padded(depth, tile_depth) * 16;
  for (int64_t k = 0; k < depth; k += 32, to += 512) {
    for (int64_t c = 0; c < columns; c += 16) {
      const __mmask16 mask = first(columns - c);
      put_tiles<transposed>(to + c / 16 * 3 * part, part, seen, [=](int64_t x, int half) {
        const int64_t row = k + x + 16 * half;
        if (row + 32 < depth) __builtin_prefetch(from(row + 32) + c, 0, 3);
        return row < depth ? _mm512_maskz_loadu_ps(mask, from(row) + c) : _mm512_setzero_ps();
      });
    }
  }
}

}  // namespace

Range pack_left_floats(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows,
                       int64_t depth) {
  Magnitudes seen;
  if (transposed) {
    split_across<true>(to, [=](int64_t row) { return from + row * from_row; }, depth, rows, seen);
  } else {
    split_along<false>(to, from, from_row, rows, depth, seen);
  }
  return seen.range();
}
Range pack_left_floats(uint16_t* to, const float* const* from, int64_t rows, int64_t depth) {
  Magnitudes seen;
  split_across<true>(to, [=](int64_t row) { return from[row]; }, depth, rows, seen);
  return seen.range();
}
Range pack_right_floats(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth,
                        int64_t columns) {
  Magnitudes seen;
  if (transposed) {
    split_along<true>(to, from, from_row, columns, depth, seen);
  } else {
    split_across<false>(to, [=](int64_t row) { return from + row * from_row; }, depth, columns, seen);
  }
  return seen.range();
}
Range pack_right_floats(uint16_t* to, const float* const* from, int64_t depth, int64_t columns) {
  Magnitudes seen;
  split_across<false>(to, [=](int64_t row) { return from[row]; }, depth, columns, seen);
  return seen.range();
}
void pack_left_floats(uint16_t* to, Seen& seen, uint16_t* outside, const Range& range, const float* from,
                      int64_t from_row, int64_t rows, int64_t depth) {
  const int64_t part = padded(depth, tile_depth) * 16;
  for (int64_t r = 0; r < rows; r += 16, to += 3 * part, ++outside) {
    *outside = 0;
    for (int64_t k = 0; k < depth; k += 32) {
      const __mmask16 low = first(depth - k), high = first(depth - k - 16);
      const float* const at = from + r * from_row + k;
      const int64_t count = rows - r;
      const auto load = [=](int64_t x, int half) {
        return _mm512_maskz_loadu_ps(x < count ? half == 0 ? low : high : 0, at + x * from_row + 16 * half);
      };
      Magnitudes here;
      put_tiles<false>(to + k * 16, part, here, load);
      here.add_to(seen);
      if (here.within(range)) continue;
      for (int64_t x = 0; x < 16; ++x) {
        Magnitudes of_row;
        of_row.see(load(x, 0));
        of_row.see(load(x, 1));
        if (!of_row.within(range)) *outside |= static_cast<uint16_t>(1u << x);
      }
    }
  }
}

#define LOAD(number, from) _tile_loadd(number, from, 64)
// Products of two rows' and two columns' tiles, with new tiles of the left or of the right operand. A load lies between
// products that do not wait for it.
#define MULTIPLY_LEFT(which)      \
  LOAD(4, a0 + (which) * a_part); \
  _tile_dpbf16ps(0, 4, 6);        \
  _tile_dpbf16ps(1, 4, 7);        \
  LOAD(5, a1 + (which) * a_part); \
  _tile_dpbf16ps(2, 5, 6);        \
  _tile_dpbf16ps(3, 5, 7)
#define MULTIPLY_RIGHT(which)     \
  LOAD(6, b0 + (which) * b_part); \
  _tile_dpbf16ps(0, 4, 6);        \
  _tile_dpbf16ps(2, 5, 6);        \
  LOAD(7, b1 + (which) * b_part); \
  _tile_dpbf16ps(1, 4, 7);        \
  _tile_dpbf16ps(3, 5, 7)
// One row's tile, whose parts are tiles 4, 5 and 6, and up to four columns' tiles, each of which is loaded once. The
// products of a column lie apart: each waits for the sum of the one before.
#define MULTIPLY_SMALL(column)                \
  LOAD(7, b0 + (column) * stride + 2 * part); \
  _tile_dpbf16ps(column, 4, 7)
#define MULTIPLY_MIDDLE(column)           \
  LOAD(7, b0 + (column) * stride + part); \
  _tile_dpbf16ps(column, 4, 7);           \
  _tile_dpbf16ps(column, 5, 7)
#define MULTIPLY_LARGE(column)     \
  LOAD(7, b0 + (column) * stride); \
  _tile_dpbf16ps(column, 5, 7);    \
  _tile_dpbf16ps(column, 6, 7);    \
  _tile_dpbf16ps(column, 4, 7)
#define ALL_COLUMNS(MULTIPLY) \
  MULTIPLY(0);                \
  if (columns_here > 16) {    \
    MULTIPLY(1);              \
  }                           \
  if (columns_here > 32) {    \
    MULTIPLY(2);              \
  }                           \
  if (columns_here > 48) {    \
    MULTIPLY(3);              \
  }

namespace {

// Of so many calls each fetches its share of the lines.
struct Fetches {
  Fetches(Lines ahead, int64_t calls) : ahead(ahead), share((ahead.count + calls - 1) / (calls > 0 ? calls : 1)) {}
  void operator()() {
    for (const int64_t stop = line + share; line < stop && line < ahead.count; ++line) {
      __builtin_prefetch(ahead.lines[line], 0, 2);
    }
  }
  Lines ahead;
  int64_t share, line = 0;
};

// Adds to tiles 0 to 3 what `size` elements of each part of two rows' and two columns' tiles give: the six products of
// parts, small ones first, and in one order for both.
void multiply_block(const uint16_t* a0, const uint16_t* a1, int64_t a_part, const uint16_t* b0, const uint16_t* b1,
                    int64_t b_part, int64_t size, Fetches& fetch) {
  for (int64_t k = 0; k < size; k += 512, a0 += 512, a1 += 512, b0 += 512, b1 += 512) {
    LOAD(6, b0 + 2 * b_part);
    LOAD(7, b1 + 2 * b_part);
    MULTIPLY_LEFT(0);
    MULTIPLY_RIGHT(1);
    fetch();
    MULTIPLY_LEFT(1);
    MULTIPLY_RIGHT(0);
    fetch();
    MULTIPLY_LEFT(2);
    MULTIPLY_LEFT(0);
    fetch();
  }
}

}  // namespace

void multiply_floats(float* out, int64_t out_row, bool add, const uint16_t* a, const uint16_t* b, int64_t rows,
                     int64_t columns, int64_t depth, Lines ahead) {
  constexpr int64_t most = 512 * 16;                                       // of a sum in one go
  const int64_t part = padded(depth, tile_depth) * 16, stride = 3 * part;  // of 16 rows or columns
  alignas(64) float sums[256];
  const bool last_alone = (rows - 1) % 32 < 16;
  const int64_t pairs = rows / 32 + (rows % 32 > 16);
  const int64_t blocks = pairs * ((columns + 31) / 32) + last_alone * ((columns + 63) / 64);
  Fetches fetch{ahead, 3 * blocks * (part / 512)};
  for (int64_t r = 0; r < rows; r += 32) {
    const bool two_rows = rows - r > 16;
    for (int64_t begin = 0; begin < part; begin += most) {
      const int64_t end = part - begin < most ? part : begin + most;
      for (int64_t c = 0; c < columns; c += two_rows ? 32 : 64) {
        const int64_t columns_here = columns - c;
        const uint16_t *a0 = a + r / 16 * stride + begin, *b0 = b + c / 16 * stride + begin;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        if (two_rows) {
          const uint16_t *a1 = a0 + stride, *b1 = columns_here > 16 ? b0 + stride : b0;
          multiply_block(a0, a1, part, b0, b1, part, end - begin, fetch);
        } else {
          for (int64_t k = begin; k < end; k += 512, a0 += 512, b0 += 512) {
            LOAD(4, a0);
            ALL_COLUMNS(MULTIPLY_SMALL);
            fetch();
            LOAD(5, a0 + part);
            ALL_COLUMNS(MULTIPLY_MIDDLE);
            fetch();
            LOAD(6, a0 + 2 * part);
            ALL_COLUMNS(MULTIPLY_LARGE);
            fetch();
          }
        }
        const auto tile = [&](int64_t row, int64_t column) {
          float* to = out + (r + row) * out_row + c + column;
          return Tile{to, add || begin > 0 ? to : nullptr, 1.0f, out_row, rows - r - row, columns_here - column};
        };
        STORE_TILE(0, tile(0, 0));
        if (columns_here > 16) STORE_TILE(1, tile(0, 16));
        if (two_rows) {
          STORE_TILE(2, tile(16, 0));
          if (columns_here > 16) STORE_TILE(3, tile(16, 16));
        } else {
          if (columns_here > 32) STORE_TILE(2, tile(0, 32));
          if (columns_here > 48) STORE_TILE(3, tile(0, 48));
        }
      }
    }
  }
}

void multiply_turned_floats(float* out, int64_t out_row, bool add, const uint16_t* a, int64_t a_depth,
                            const uint16_t* b, int64_t rows, int64_t columns, int64_t depth, Lines ahead) {
  Fetches fetch{ahead, 3 * rows * columns / 1024 * ((depth + 31) / 32)};
  alignas(64) uint16_t turned[2 * 3 * turned_depth * 16];  // stays in L1
  alignas(64) float sums[256];
  const int64_t a_part = padded(a_depth, tile_depth) * 16, from_part = columns * 16;
  const int64_t b_part = padded(depth, tile_depth) * 16;
  for (int64_t c = 0; c < columns; c += 32) {
    for (int64_t row = 0; row < padded(depth, tile_depth); row += 16) {
      for (int part = 0; part < 3; ++part) {
        const uint16_t* const from = b + row / 16 * 3 * from_part + part * from_part + c * 16;
        uint16_t* const to = turned + part * b_part + row * 16;
        const auto put = [&](int x, __m512i low, __m512i high) {
          _mm512_store_si512(to + x * 32, low);
          _mm512_store_si512(to + 3 * b_part + x * 32, high);
        };
        for (int x = 0; x < 8; ++x) {
          if (row >= depth) {
            put(x, _mm512_setzero_si512(), _mm512_setzero_si512());
            continue;
          }
          const __m512i one = _mm512_loadu_si512(from + x * 32), other = _mm512_loadu_si512(from + (x + 8) * 32);
          put(x, _mm512_mask_blend_epi16(0xaaaaaaaa, one, _mm512_slli_epi32(other, 16)),
              _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(one, 16), other));
        }
      }
    }
    for (int64_t r = 0; r < rows; r += 32) {
      const uint16_t* const a0 = a + r / 16 * 3 * a_part;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply_block(a0, a0 + 3 * a_part, a_part, turned, turned + 3 * b_part, b_part, b_part, fetch);
      const auto tile = [&](int64_t row, int64_t column) {
        float* const to = out + (r + row) * out_row + c + column;
        return Tile{to, add ? to : nullptr, 1.0f, out_row, 16, 16};
      };
      STORE_TILE(0, tile(0, 0));
      STORE_TILE(1, tile(0, 16));
      STORE_TILE(2, tile(16, 0));
      STORE_TILE(3, tile(16, 16));
    }
  }
}

}  // namespace flash_xlstm::cpu::amx

#else

namespace flash_xlstm::cpu::amx {
void begin() {}
void end() {}
void pack_left(uint16_t*, const float*, int64_t, bool, int64_t, int64_t, int, Ahead*) {}
void pack_right(uint16_t*, const float*, int64_t, bool, int64_t, int64_t, Ahead*) {}
bool pack_left(uint16_t*, const uint16_t*, int64_t, int64_t, bool, int64_t, int64_t, Ahead*) { return true; }
bool pack_right(uint16_t*, const uint16_t*, int64_t, int64_t, bool, int64_t, int64_t, Ahead*) { return true; }
void multiply(float*, const float*, float, const uint16_t*, int, const uint16_t*, int64_t, int64_t, int64_t, Part,
              Ahead*) {}
void multiply_pairs(float*, const float*, float, const uint16_t*, int, const uint16_t*, int64_t, int64_t, int64_t, Part,
                    Ahead*) {}
Range pack_left_floats(uint16_t*, const float*, int64_t, bool, int64_t, int64_t) { return {}; }
Range pack_left_floats(uint16_t*, const float* const*, int64_t, int64_t) { return {}; }
Range pack_right_floats(uint16_t*, const float* const*, int64_t, int64_t) { return {}; }
Range pack_right_floats(uint16_t*, const float*, int64_t, bool, int64_t, int64_t) { return {}; }
void pack_left_floats(uint16_t*, Seen&, uint16_t*, const Range&, const float*, int64_t, int64_t, int64_t) {}
void multiply_floats(float*, int64_t, bool, const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, Lines) {}
void multiply_turned_floats(float*, int64_t, bool, const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, int64_t,
                            Lines) {}
}  // namespace flash_xlstm::cpu::amx
#endif
