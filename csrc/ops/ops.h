// The operators' entry points, one for CPU and CUDA: each checks its arguments, allocates its outputs and
// dispatches to a kernel. Schemas: library.cpp.
#pragma once

#include <tuple>

#include "ops/checks.h"

namespace flash_xlstm {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors2 mlstm(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
               OptTensor cu_seqlens, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
               int64_t chunk_size);
Tensor mlstm_h(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
               OptTensor cu_seqlens, std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
               int64_t chunk_size);
Tensors5 mlstm_with_state(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m,
                          OptTensor cu_seqlens, std::optional<double> scale, double eps,
                          std::optional<double> gate_soft_cap, int64_t chunk_size);

Tensors8 mlstm_backward(OptTensor dh, OptTensor dc_last, OptTensor dn_last, OptTensor dm_last, Tensor q, Tensor k,
                        Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor m, OptTensor cu_seqlens,
                        OptTensor h, Tensor kept, std::optional<double> scale, double eps,
                        std::optional<double> gate_soft_cap, int64_t chunk_size);

Tensors4 mlstm_sig(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, OptTensor c, OptTensor n, OptTensor cu_seqlens,
                   std::optional<double> scale, double eps, std::optional<double> gate_soft_cap, int64_t chunk_size,
                   bool return_final_state, bool normalize);

Tensors7 mlstm_sig_backward(OptTensor dh, OptTensor dc_last, OptTensor dn_last, Tensor q, Tensor k, Tensor v, Tensor i,
                            Tensor f, OptTensor c, OptTensor n, OptTensor cu_seqlens, OptTensor h, Tensor s,
                            std::optional<double> scale, double eps, std::optional<double> gate_soft_cap,
                            int64_t chunk_size, bool normalize);

Tensor mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor c, Tensor n, Tensor m,
                  OptTensor state_indices, std::optional<double> scale, double eps,
                  std::optional<double> gate_soft_cap, bool settled_state);

Tensor mlstm_block_step(Tensor x, Tensor c, Tensor n, Tensor m, OptTensor state_indices, Tensor norm_mlstm,
                        std::vector<Tensor> qkvo, std::vector<Tensor> gates, std::vector<Tensor> gate_biases,
                        Tensor head_norm, Tensor out_proj, Tensor norm_ffn, std::vector<Tensor> up, Tensor down,
                        double norm_mlstm_eps, double eps, double head_norm_eps, double norm_ffn_eps,
                        std::optional<double> gate_soft_cap, bool constant_weights);

Tensors6 slstm(Tensor x, Tensor R, Tensor b, OptTensor h0, OptTensor c0, OptTensor n0, OptTensor m0,
               OptTensor cu_seqlens, double recurrent_grad_clip, bool keep, bool return_final_state);

Tensors7 slstm_backward(OptTensor dh, OptTensor dh_last, OptTensor dc_last, OptTensor dn_last, OptTensor dm_last,
                        Tensor R, Tensor b, OptTensor h0, OptTensor c0, OptTensor n0, OptTensor m0,
                        OptTensor cu_seqlens, Tensor h, Tensor kept, double recurrent_grad_clip);

Tensor slstm_step(Tensor x, Tensor R, Tensor b, Tensor h, Tensor c, Tensor n, Tensor m);

Tensors2 causal_conv1d(Tensor x, Tensor weight, OptTensor bias, OptTensor state, OptTensor cu_seqlens, bool silu,
                       bool return_final_state);
Tensors4 causal_conv1d_backward(OptTensor dy, OptTensor dlast, Tensor x, Tensor weight, OptTensor bias,
                                OptTensor state, OptTensor cu_seqlens, bool silu);
Tensor causal_conv1d_step(Tensor x, Tensor weight, OptTensor bias, Tensor state, bool silu);

Tensor soft_cap(Tensor x, double cap);
Tensor soft_cap_backward(Tensor dy, Tensor x, double cap);

Tensor rms_norm(Tensor x, Tensor weight, double eps);
std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward(Tensor dy, OptTensor dsum, Tensor x, Tensor weight, double eps,
                                             bool weight_gradient);

Tensor gated_head_norm(Tensor h, Tensor gate, Tensor weight, double eps);
std::tuple<Tensor, Tensor, Tensor> gated_head_norm_backward(Tensor dy, Tensor h, Tensor gate, Tensor weight, double eps,
                                                            bool weight_gradient);

Tensor linear_rows(Tensor x, Tensor weight, OptTensor bias, bool constant_weights);
std::vector<Tensor> fused_linear_rows(Tensor x, std::vector<Tensor> weights, std::vector<OptTensor> biases,
                                      OptTensor residual, bool swiglu, bool constant_weights);

Tensor swiglu(Tensor x, Tensor y);
std::tuple<Tensor, Tensor> swiglu_backward(Tensor dout, Tensor x, Tensor y);

}  // namespace flash_xlstm
