// Large arrays on the CPU whose memory is used again.
#pragma once

#include <vector>

#include "ops/checks.h"

namespace flash_xlstm {

// As new_empty. Fresh memory on the CPU is zeroed by the kernel page by page, which for what a forward keeps takes a third
// as long as the forward itself. So freed arrays of 4 MiB and more are held, up to 256 MiB in all, for later calls. For
// what only an op's backward reads, and for gradients: the storage cannot be resized.
Tensor reused_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);

}  // namespace flash_xlstm
