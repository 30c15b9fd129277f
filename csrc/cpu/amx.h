// Products of bfloat16 matrices with float32 sums on AMX tiles, or by AVX512-BF16 (amx.cpp, x86 only), and of float32
// matrices by way of tiles. Operands are packed from float32, which rounds them to bfloat16: exact for what came as
// bfloat16. Numbers below float32's normal range count as 0. Operands lie tile by tile, depth first, filled up with
// zeros to whole tiles. A left operand's tile holds 16 rows, 32 deep, row by row; a right operand's 16 columns, 32
// deep, with pairs of depths side by side, as the instruction reads them. A left operand of two parts holds behind the
// tiles of each 16 rows what their rounding left, rounded: together 16 bits and more of each number.
#pragma once

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu::amx {

constexpr int64_t tile_rows = 16, tile_depth = 32;

// Inlined, because code of every instruction set calls it.
__attribute__((always_inline)) constexpr int64_t padded(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile * tile;
}
// Elements of a packed operand: `size` rows or columns, `depth` deep, in `parts` parts.
__attribute__((always_inline)) constexpr int64_t packed_size(int64_t size, int64_t depth, int parts) {
  return parts * padded(size, tile_rows) * padded(depth, tile_depth);
}

// All of this only where has_bf16() of isa.h says so; begin, end, `multiply` and what is for float32 only where
// has_amx() does. Between the two, this thread's tiles have the shape that `multiply` needs.
void begin();
void end();

// from (rows x depth), or with `transposed` (depth x rows); rows of `from` are contiguous, from_row apart.
// `ahead` may be null, here and below.
void pack_left(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows, int64_t depth,
               int parts, Ahead* ahead);
// from (depth x columns), or with `transposed` (columns x depth).
void pack_right(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth, int64_t columns,
                Ahead* ahead);
// The same from bfloat16 numbers, in one part. `from` has `count` rows; those behind them are zeros. Returns whether all
// numbers are finite.
bool pack_left(uint16_t* to, const uint16_t* from, int64_t from_row, int64_t count, bool transposed, int64_t rows,
               int64_t depth, Ahead* ahead);
bool pack_right(uint16_t* to, const uint16_t* from, int64_t from_row, int64_t count, bool transposed, int64_t depth,
                int64_t columns, Ahead* ahead);

// out = keep from + a b with packed operands, a in `parts` parts. from == nullptr: out = a b. out and from are
// contiguous.
void multiply(float* out, const float* from, float keep, const uint16_t* a, int parts, const uint16_t* b, int64_t rows,
              int64_t columns, int64_t depth, Part part, Ahead* ahead);
// The same by AVX512-BF16's product of pairs, without tiles. A depth of two numbers is a step of the sum.
void multiply_pairs(float* out, const float* from, float keep, const uint16_t* a, int parts, const uint16_t* b,
                    int64_t rows, int64_t columns, int64_t depth, Part part, Ahead* ahead);

// --- float32 -------------------------------------------------------------------------------------------------------
// A float32 number is the sum of three bfloat16 numbers, each the rounded rest of the ones before. Of the nine products
// of parts, six are summed, in float32; the others come to less than 2^-24 of the whole. So errors are those of sums in
// float32 (0.6 of them at a depth of 512, measured) where no part and no product of parts leaves float32's normal
// range: tiles count smaller ones as 0, and a number that is not finite has parts that are NaN. `is_exact` says whether
// that holds; where it does not, the caller multiplies in float32.

// Bits of the magnitudes of an operand's numbers: the least that is not 0, less one, and the largest.
struct Range {
  uint32_t least = ~0u, most = 0;

  __attribute__((always_inline)) void add(const Range& other) {
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
  }
};

// The ranges of lanes, which become one in the end.
struct Seen {
  alignas(64) uint32_t least[16], most[16];

  __attribute__((always_inline)) Seen() { clear(); }
  __attribute__((always_inline)) void clear() {
    for (int x = 0; x < 16; ++x) least[x] = ~0u, most[x] = 0;
  }
  __attribute__((always_inline)) Range range() const {
    Range all;
    for (int x = 0; x < 16; ++x) all.add({least[x], most[x]});
    return all;
  }
};

// The other operand's numbers for which multiply_floats is as exact as sums in float32; 0 always is. An empty range,
// whose least is above its most, where none are.
__attribute__((always_inline)) inline Range exact_with(const Range& operand) {
  constexpr int32_t bias = 127, least_part = 103, most = 126, product = 100;  // powers of two
  const int32_t low = operand.least == ~0u ? 0 : static_cast<int32_t>((operand.least + 1) >> 23) - bias;
  const int32_t high = operand.most == 0 ? 0 : static_cast<int32_t>(operand.most >> 23) - bias;
  if (low < -least_part || high > most) return {~0u - 1, 0};
  const int32_t least = -product - low > -least_part ? -product - low : -least_part;
  const int32_t largest = product - high < most ? product - high : most;
  return {(static_cast<uint32_t>(bias + least) << 23) - 1, (static_cast<uint32_t>(bias + largest + 1) << 23) - 1};
}
__attribute__((always_inline)) inline bool is_within(const Range& a, const Range& b) {
  return a.least >= b.least && a.most <= b.most;
}
__attribute__((always_inline)) inline bool is_exact(const Range& a, const Range& b) {
  return is_within(a, exact_with(b));
}

// As pack_left and pack_right, with packed_size(size, depth, 3) elements.
Range pack_left_floats(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows, int64_t depth);
Range pack_right_floats(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth,
                        int64_t columns);
// from[k] is the row of depth k, which has `rows` or `columns` numbers: transposed, not transposed.
Range pack_left_floats(uint16_t* to, const float* const* from, int64_t rows, int64_t depth);
Range pack_right_floats(uint16_t* to, const float* const* from, int64_t depth, int64_t columns);
// Not transposed. Bit x of outside[y]: row 16 y + x has numbers outside of the range.
void pack_left_floats(uint16_t* to, Seen& seen, uint16_t* outside, const Range& range, const float* from,
                      int64_t from_row, int64_t rows, int64_t depth);

// out (rows x columns, out_row apart) = a b, or += with `add`. An element's sum depends on its row and column only, not
// on what lies beside them. Pieces of 512 of the depth are summed one after the other: each is then of few numbers.
// Between begin() and end().
void multiply_floats(float* out, int64_t out_row, bool add, const uint16_t* a, const uint16_t* b, int64_t rows,
                     int64_t columns, int64_t depth, Lines ahead = {});

// The same, where b is packed as a left operand, of `depth` rows, a multiple of 16. They are b's depth, and row x is
// depth_of(x) of a, which is packed `a_depth` deep, up to turned_depth. `rows` and `columns` are multiples of 32.
constexpr int64_t turned_depth = 64;
// Pairs of depths, 16 apart, are the rows of a tile. Eight pairs come from 16 rows.
__attribute__((always_inline)) constexpr int64_t depth_of(int64_t row) {
  return row / 32 * 32 + row / 16 % 2 * 8 + row / 8 % 2 * 16 + row % 8;
}
void multiply_turned_floats(float* out, int64_t out_row, bool add, const uint16_t* a, int64_t a_depth,
                            const uint16_t* b, int64_t rows, int64_t columns, int64_t depth, Lines ahead = {});

}  // namespace flash_xlstm::cpu::amx
