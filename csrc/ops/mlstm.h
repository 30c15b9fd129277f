// What the operators of the mLSTM over a sequence share.
#pragma once

#include <optional>

#include "ops/checks.h"
#include "ops/launch.h"

namespace flash_xlstm {

// Where the gradients of q, k and v go: (batch, seq, heads * dim) each, tokens evenly apart, as parts of a wider tensor
// are.
struct MlstmInto {
  Tensor dq, dk, dv;
};

// As the operators of these names; the backward is without states, and its dq, dk and dv are those of `into`.
Tensors<2> mlstm_forward(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                         OptTensor cu_seqlens, std::optional<double> scale, double eps,
                         std::optional<double> gate_soft_cap, int64_t chunk_size);
Tensors<8> mlstm_backward_into(const MlstmInto& into, const Tensor& dh, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& i, const Tensor& f, const OptTensor& cu_seqlens,
                               const Tensor& h, const Tensor& kept, std::optional<double> scale, double eps,
                               std::optional<double> gate_soft_cap, int64_t chunk_size);

}  // namespace flash_xlstm
