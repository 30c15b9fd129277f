// Products of float32 matrices in scratch memory. Problems in bfloat16 multiply on AMX tiles or by AVX512-BF16 where
// the machine has them (amx.h): operands are rounded to bfloat16, which changes nothing in inputs, and sums are
// float32. All others multiply in float32 (gemm.inl).
#pragma once

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

// How a matrix lies in memory: row by row, or transposed.
enum class Lies { as_it_is, transposed };

// How a left operand is rounded where products are of bfloat16: to it, or to the sum of two such numbers, where sums of
// other products must agree with this one's.
enum class Rounding { to_one, to_two };

// Operands as the product reads them, made by Products from matrices that must outlive them.
struct Left {
  const void* data;
  int64_t row, k;
  int parts;
};
struct Right {
  const void* data;
  int64_t row;
};
// A matrix to multiply: contiguous float32; or bfloat16, whose rows lie `row` apart and are zeros from `count` on.
struct Matrix {
  const float* floats;
  const uint16_t* halves = nullptr;
  int64_t row = 0, count = 0;

  Matrix(const float* floats) : floats(floats) {}
  Matrix(const uint16_t* halves, int64_t row, int64_t count)
      : floats(nullptr), halves(halves), row(row), count(count) {}
};

class Products {
 public:
  // `ahead`: what products prefetch, for a single worker.
  explicit Products(DType dtype, Ahead* ahead = nullptr)
      : packs_(dtype == DType::bfloat16 && has_bf16()), tiles_(packs_ && has_amx()), ahead_(ahead) {}

  // Floats of room that an operand needs.
  int64_t left_room(int64_t rows, int64_t depth) const { return packs_ ? amx::packed_size(rows, depth, 2) / 2 : 0; }
  int64_t right_room(int64_t depth, int64_t columns, Lies lies) const {
    if (packs_) return amx::packed_size(columns, depth, 1) / 2;
    return lies == Lies::transposed ? depth * columns : 0;
  }

  // Whether it takes matrices of bfloat16.
  bool takes_halves() const { return packs_; }

  // A matrix (rows x depth), or transposed (depth x rows). `finite`: where to say whether all of a matrix of bfloat16
  // is finite; may be null.
  Left left(float* room, const Matrix& from, Lies lies, int64_t rows, int64_t depth,
            Rounding rounding = Rounding::to_one, bool* finite = nullptr) const {
    const bool transposed = lies == Lies::transposed;
    const int parts = rounding == Rounding::to_two ? 2 : 1;
    if (!packs_)
      return {.data = from.floats, .row = transposed ? 1 : depth, .k = transposed ? rows : 1, .parts = parts};
    auto* packed = reinterpret_cast<uint16_t*>(room);
    if (from.halves == nullptr) {
      amx::pack_left(packed, from.floats, transposed ? rows : depth, transposed, rows, depth, parts, ahead_);
    } else {
      const bool all = amx::pack_left(packed, from.halves, from.row, from.count, transposed, rows, depth, ahead_);
      if (finite != nullptr) *finite = all;
    }
    return {.data = packed, .row = 0, .k = 0, .parts = parts};
  }
  // A matrix (depth x columns), or transposed (columns x depth).
  Right right(float* room, const Matrix& from, Lies lies, int64_t depth, int64_t columns,
              bool* finite = nullptr) const {
    const bool transposed = lies == Lies::transposed;
    if (packs_) {
      auto* packed = reinterpret_cast<uint16_t*>(room);
      if (from.halves == nullptr) {
        amx::pack_right(packed, from.floats, transposed ? depth : columns, transposed, depth, columns, ahead_);
      } else {
        const bool all = amx::pack_right(packed, from.halves, from.row, from.count, transposed, depth, columns, ahead_);
        if (finite != nullptr) *finite = all;
      }
      return {.data = packed, .row = 0};
    }
    if (!transposed) return {.data = from.floats, .row = columns};
    vector_kernels().transpose(room, columns, from.floats, depth, columns, depth);
    return {.data = room, .row = columns};
  }

  // out (rows x columns) = a b.
  void multiply(float* out, const Left& a, const Right& b, int64_t rows, int64_t columns, int64_t depth,
                Part part = Part::all) const {
    advance(out, nullptr, 0.0f, a, b, rows, columns, depth, part);
  }
  // out = keep from + a b; without `from`, a b.
  void advance(float* out, const float* from, float keep, const Left& a, const Right& b, int64_t rows, int64_t columns,
               int64_t depth, Part part = Part::all) const {
    if (packs_) {
      const auto multiply = tiles_ ? amx::multiply : amx::multiply_pairs;
      multiply(out, from, keep, static_cast<const uint16_t*>(a.data), a.parts, static_cast<const uint16_t*>(b.data),
               rows, columns, depth, part, ahead_);
    } else {
      vector_kernels().gemm({.out = out,
                             .out_row = columns,
                             .from = from,
                             .keep = keep,
                             .a = static_cast<const float*>(a.data),
                             .a_row = a.row,
                             .a_k = a.k,
                             .b = static_cast<const float*>(b.data),
                             .b_row = b.row,
                             .rows = rows,
                             .columns = columns,
                             .depth = depth,
                             .part = part,
                             .ahead = ahead_});
    }
  }

  // Calls f(x, worker) for x from 0 to count - 1. A worker takes consecutive x, one after the other, and may multiply.
  template <typename F>
  void share(int64_t count, int64_t workers, const F& f) const {
    const auto work = [&](int64_t worker) {
      if (tiles_) amx::begin();
      for (int64_t x = count * worker / workers; x < count * (worker + 1) / workers; ++x) f(x, worker);
      if (tiles_) amx::end();
    };
    if (workers == 1) return work(0);
    parallel(workers, work);
  }

  // What to fetch between products too. Those in float32 take long enough for all of it.
  Ahead* ahead_between() const { return packs_ ? ahead_ : nullptr; }

 private:
  bool packs_, tiles_;
  Ahead* ahead_;
};

}  // namespace flash_xlstm::cpu
