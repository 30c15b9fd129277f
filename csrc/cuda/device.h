// What launch functions ask about the current device, looked up once for each.
#pragma once

namespace flash_xlstm::cuda {

// Compute capability 9.0, whose 90a target has wgmma.
bool device_is_hopper();
// Multiprocessors; 1 on an error.
int processor_count();

}  // namespace flash_xlstm::cuda
