// Scratch memory from torch's allocator, in pieces that start on cache lines.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <vector>

#include "params/types.h"

namespace flash_xlstm::cpu {

// Arrays of equal size, each on cache lines of its own.
template <typename T>
struct Arrays {
  T* data = nullptr;
  int64_t stride = 0;
  T* operator[](int64_t index) const { return data + index * stride; }
};

class Scratch {
 public:
  template <typename T>
  void reserve(Arrays<T>& arrays, int64_t size, int64_t count) {
    constexpr int64_t line = 64 / sizeof(T);
    arrays.stride = ceil_div(size, line) * line;
    pieces_.push_back({[&arrays](char* at) { arrays.data = reinterpret_cast<T*>(at); }, used_});
    used_ += arrays.stride * count * static_cast<int64_t>(sizeof(T));
  }
  void allocate() {
    const std::array<int64_t, 1> size{used_};
    memory_ = torch::stable::empty({size.data(), 1}, torch::headeronly::ScalarType::Byte);
    for (const auto& [place, offset] : pieces_) place(static_cast<char*>(memory_.data_ptr()) + offset);
  }

 private:
  struct Piece {
    std::function<void(char*)> place;
    int64_t offset;
  };
  std::vector<Piece> pieces_;
  int64_t used_ = 0;
  torch::stable::Tensor memory_;
};

}  // namespace flash_xlstm::cpu
