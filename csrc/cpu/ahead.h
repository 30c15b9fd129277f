// Memory that will be read or written soon. A product prefetches some of it, a few lines at a time, while it
// multiplies. Rows of one head lie apart from one another and are slow to reach: too few requests are on their way at a
// time.
#pragma once

#include <cstdint>

namespace flash_xlstm::cpu {

// Single cache lines of it. A core has room for about 16 requests to memory.
struct Lines {
  const char* const* lines = nullptr;
  int64_t count = 0;
};

class Ahead {
 public:
  void clear() { count_ = at_ = 0; }
  void add(const void* data, int64_t stride_bytes, int64_t rows, int64_t row_bytes) {
    if (count_ < max_arrays) arrays_[count_++] = {static_cast<const char*>(data), stride_bytes, rows, row_bytes, 0, 0};
  }
  // Inlined, because code of every instruction set calls it.
  __attribute__((always_inline)) void prefetch(int64_t lines) {
    for (; lines > 0 && at_ < count_; --lines) {
      Array& a = arrays_[at_];
      __builtin_prefetch(a.data + a.row * a.stride + a.byte, 0, 2);
      a.byte += 64;
      if (a.byte < a.row_bytes) continue;
      a.byte = 0;
      if (++a.row == a.rows) ++at_;
    }
  }

 private:
  static constexpr int max_arrays = 8;
  struct Array {
    const char* data;
    int64_t stride, rows, row_bytes, row, byte;
  };
  Array arrays_[max_arrays];
  int count_ = 0, at_ = 0;
};

}  // namespace flash_xlstm::cpu
