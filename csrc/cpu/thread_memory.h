// Memory for a kernel's time. A thread keeps 2 MiB for it, one huge page where the system gives one: kernels ask for a
// hundred arrays a call, and malloc takes a twentieth of a short call for them.
#pragma once

#include <cstdint>

namespace flash_xlstm::cpu {

// Starts at a cache line. Given back by the same thread; what was taken last is best given back first, because the
// memory behind another array is used again only when all of it has come back.
void* take_memory(int64_t bytes);
void give_memory(void* data, int64_t bytes);

}  // namespace flash_xlstm::cpu
