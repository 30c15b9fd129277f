// Where a row's tokens lie: a row of the batch, or a packed sequence, whose offsets ops/checks.h has checked.
#pragma once

#include <cstdint>

namespace flash_xlstm::cpu {

struct Row {
  int64_t batch, start, length;
};

// Always inlined: vector_kernels.inl includes this, and its code must stay in its own namespaces.
template <typename Problem>
__attribute__((always_inline)) inline Row row_of(const Problem& p, int64_t row) {
  if (p.cu_seqlens == nullptr) return {.batch = row, .start = 0, .length = p.seq};
  const int64_t start = p.cu_seqlens[row];
  return {.batch = 0, .start = start, .length = p.cu_seqlens[row + 1] - start};
}

}  // namespace flash_xlstm::cpu
