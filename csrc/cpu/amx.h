// Products of bfloat16 matrices with float32 sums on AMX tiles (amx.cpp, x86 only). Operands are packed from float32,
// which rounds them to bfloat16: exact for what came as bfloat16. Numbers below float32's normal range count as 0.
// Operands lie tile by tile, depth first, filled up with zeros to whole tiles. A left operand's tile holds 16 rows, 32
// deep, row by row; a right operand's 16 columns, 32 deep, with pairs of depths side by side, as the instruction reads
// them. A left operand of two parts holds behind the tiles of each 16 rows what their rounding left, rounded: together
// 16 bits and more of each number.
#pragma once

#include <cstdint>

#include "cpu/ahead.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu::amx {

constexpr int64_t tile_rows = 16, tile_depth = 32;

constexpr int64_t padded(int64_t size, int64_t tile) { return (size + tile - 1) / tile * tile; }
// Elements of a packed operand: `size` rows or columns, `depth` deep, in `parts` parts.
constexpr int64_t packed_size(int64_t size, int64_t depth, int parts) {
  return parts * padded(size, tile_rows) * padded(depth, tile_depth);
}

// Only where has_amx() of isa.h says so. Between the two, this thread's tiles have the shape that `multiply` needs.
void begin();
void end();

// from (rows x depth), or with `transposed` (depth x rows); rows of `from` are contiguous, from_row apart.
// `ahead` may be null, here and below.
void pack_left(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t rows, int64_t depth,
               int parts, Ahead* ahead);
// from (depth x columns), or with `transposed` (columns x depth).
void pack_right(uint16_t* to, const float* from, int64_t from_row, bool transposed, int64_t depth, int64_t columns,
                Ahead* ahead);

// out = keep from + a b with packed operands, a in `parts` parts. from == nullptr: out = a b. out and from are
// contiguous.
void multiply(float* out, const float* from, float keep, const uint16_t* a, int parts, const uint16_t* b, int64_t rows,
              int64_t columns, int64_t depth, Part part, Ahead* ahead);

}  // namespace flash_xlstm::cpu::amx
