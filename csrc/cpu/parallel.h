// Calls f(x) for x from 0 to count - 1 on torch's threads, each as a task of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace flash_xlstm::cpu {

template <typename F>
void parallel(int64_t count, F&& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) f(x);
  });
}

}  // namespace flash_xlstm::cpu
