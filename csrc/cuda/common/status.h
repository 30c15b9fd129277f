#pragma once

#include <cuda_runtime_api.h>

#define RETURN_IF_FAILED(call)                                             \
  do {                                                                     \
    if (cudaError_t status = (call); status != cudaSuccess) return status; \
  } while (0)
