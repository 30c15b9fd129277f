// The mLSTM over a sequence, for operators that contain it.
#pragma once

#include <optional>

#include "ops/checks.h"
#include "ops/launch.h"

namespace flash_xlstm {

// Where gradients are written. Those of q, k and v are (batch, seq, heads * dim), those of the gates (batch, seq,
// heads), if wanted there. Each has one stride between tokens, as a part of a wider tensor has. All have q's dtype.
struct MlstmInto {
  Tensor dq, dk, dv;
  OptTensor di, df;
};

// As the operators mlstm_forward and mlstm_backward. The backward has no states. It writes to `into`.
Tensors<2> mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                         OptTensor cu_seqlens, std::optional<double> scale, double eps,
                         std::optional<double> gate_soft_cap, int64_t chunk_size, bool keep_states);
Tensors<8> mlstm_backward_into(const MlstmInto& into, const Tensor& dh, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& i, const Tensor& f, const OptTensor& cu_seqlens,
                               const Tensor& h, const Tensor& kept, std::optional<double> scale, double eps,
                               std::optional<double> gate_soft_cap, int64_t chunk_size);

}  // namespace flash_xlstm
