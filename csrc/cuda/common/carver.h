#pragma once

#include "params/types.h"

namespace flash_xlstm::cuda {

// Hands out consecutive pieces of a scratch buffer, aligned to 256 bytes. With a null base it only counts bytes.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  void take(T*& out, int64_t count) {
    constexpr int64_t alignment = 256;
    out = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), alignment) * alignment;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace flash_xlstm::cuda
