// Large arrays on the CPU whose memory is used again.
#pragma once

#include <vector>

#include "ops/checks.h"

namespace flash_xlstm {

// An uninitialized float32 CPU tensor. Fresh memory is zeroed by the kernel page by page, which for what a forward keeps
// takes a third as long as the forward itself. So freed arrays of 4 MiB and more are held, up to 256 MiB in all, for
// later calls. For tensors that only an op's backward reads.
Tensor reused_empty(const std::vector<int64_t>& sizes);

}  // namespace flash_xlstm
