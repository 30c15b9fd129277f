// Which kernels serve an mLSTM problem: a table of paths, tried in order. A path for another GPU is a folder and a row.
#include <cstdint>
#include <string>

#include "cuda/mlstm/portable/portable.h"
#include "params/mlstm.h"
#ifdef FLASH_XLSTM_WITH_HOPPER  // FLASH_XLSTM_CUDA_ARCHS has 90a
#include "cuda/mlstm/fused/fused.h"
#include "cuda/mlstm/hopper/hopper.h"
#endif

namespace flash_xlstm::cuda {
namespace {

struct Path {
  std::string (*words)();                 // what it serves, for people
  bool (*runs_on)(int major, int minor);  // devices of this compute capability
  // On the current device, the faster ones before others; layouts: see `reads`.
  bool (*serves_forward)(const MlstmForward& params);
  bool (*serves_backward)(const MlstmBackward& params);
  bool (*reads)(const Strided& t, const MlstmProblem& p);  // whether it can read an input with its strides
  bool writes_apart;                                       // whether it writes dq, dk and dv that are not contiguous
  bool begins_backward;                                    // see mlstm_begins_backward
  int64_t (*kept_floats)(DType dtype, int64_t dqk, int64_t dv);  // see mlstm_kept_floats; of the backward's path
  int64_t (*forward_workspace_bytes)(const MlstmForward& params);
  cudaError_t (*forward)(const MlstmForward& params, void* workspace, cudaStream_t stream);
  int64_t (*backward_workspace_bytes)(const MlstmBackward& params);
  cudaError_t (*backward)(const MlstmBackward& params, void* workspace, cudaStream_t stream);
};

constexpr Path paths[] = {
#ifdef FLASH_XLSTM_WITH_HOPPER
    {.words = fused::words,
     .runs_on = [](int major, int minor) { return major == 9 && minor == 0; },
     .serves_forward = fused::serves,
     .serves_backward = [](const MlstmBackward&) { return false; },
     .reads = hopper::reads,
     .writes_apart = false,
     .begins_backward = false,
     .kept_floats = nullptr,
     .forward_workspace_bytes = fused::forward_workspace_bytes,
     .forward = fused::forward,
     .backward_workspace_bytes = nullptr,
     .backward = nullptr},
    {.words = hopper::words,
     .runs_on = [](int major, int minor) { return major == 9 && minor == 0; },
     .serves_forward = [](const MlstmForward& params) { return hopper::serves(params.p); },
     .serves_backward = [](const MlstmBackward& params) { return hopper::serves(params.p); },
     .reads = hopper::reads,
     .writes_apart = true,
     .begins_backward = true,
     .kept_floats = hopper::kept_floats,
     .forward_workspace_bytes = hopper::forward_workspace_bytes,
     .forward = hopper::forward,
     .backward_workspace_bytes = hopper::backward_workspace_bytes,
     .backward = hopper::backward},
#endif
    {.words = portable::words,
     .runs_on = [](int, int) { return true; },
     .serves_forward = [](const MlstmForward&) { return true; },
     .serves_backward = [](const MlstmBackward&) { return true; },
     .reads = [](const Strided&, const MlstmProblem&) { return true; },
     .writes_apart = false,
     .begins_backward = false,
     .kept_floats = [](DType, int64_t, int64_t) { return int64_t{0}; },
     .forward_workspace_bytes = portable::forward_workspace_bytes,
     .forward = portable::forward,
     .backward_workspace_bytes = portable::backward_workspace_bytes,
     .backward = portable::backward},
};

MlstmCopies copies(const Path& path, const MlstmProblem& p) {
  return {.q = !path.reads(p.q, p), .k = !path.reads(p.k, p), .v = !path.reads(p.v, p)};
}
MlstmCopies copies(const Path& path, const MlstmForward& params) { return copies(path, params.p); }
MlstmCopies copies(const Path& path, const MlstmBackward& params) {
  MlstmCopies all = copies(path, params.p);
  all.dh = params.dh.data != nullptr && !path.reads(params.dh, params.p);
  return all;
}

bool serves(const Path& path, const MlstmForward& params) { return path.serves_forward(params); }
bool serves(const Path& path, const MlstmBackward& params) { return path.serves_backward(params); }

// The first path that serves the problem with its strides. The last path serves every problem.
template <typename Params>
const Path& path_for(const Params& params) {
  const Path* path = paths;
  while (!serves(*path, params) || copies(*path, params).any()) ++path;
  return *path;
}

// The first path that serves it once its inputs are copied.
template <typename Params>
const Path& path_with_copies(const Params& params) {
  const Path* path = paths;
  while (!serves(*path, params)) ++path;
  return *path;
}

}  // namespace

MlstmCopies mlstm_copies(const MlstmForward& params) { return copies(path_with_copies(params), params); }
MlstmCopies mlstm_copies(const MlstmBackward& params) { return copies(path_with_copies(params), params); }
bool mlstm_begins_backward(const MlstmBackward& params) { return path_with_copies(params).begins_backward; }
int64_t mlstm_kept_floats(DType dtype, int64_t dqk, int64_t dv) {
  MlstmBackward params{};
  params.p.dtype = dtype, params.p.dqk = dqk, params.p.dv = dv;
  return path_with_copies(params).kept_floats(dtype, dqk, dv);
}
bool mlstm_writes_apart(const MlstmBackward& params) { return path_with_copies(params).writes_apart; }

int64_t mlstm_forward_workspace_bytes(const MlstmForward& params) {
  return path_for(params).forward_workspace_bytes(params);
}

cudaError_t mlstm_forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  return path_for(params).forward(params, workspace, stream);
}

int64_t mlstm_backward_workspace_bytes(const MlstmBackward& params) {
  return path_for(params).backward_workspace_bytes(params);
}

cudaError_t mlstm_backward(const MlstmBackward& params, void* workspace, cudaStream_t stream) {
  return path_for(params).backward(params, workspace, stream);
}

std::string mlstm_words(int major, int minor) {
  std::string all;
  for (const Path& path : paths) {
    if (path.runs_on(major, minor)) all += (all.empty() ? "" : ", else ") + path.words();
  }
  return all;
}

}  // namespace flash_xlstm::cuda
