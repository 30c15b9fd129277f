#include "cpu/mlstm_gate_gradients.h"

#include "cpu/parallel.h"

namespace flash_xlstm::cpu {
void sum_open(const Plan& plan, const GateSums& sums, const MlstmBackward& params) {
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    const int64_t begin = plan.lane_begin[lane] * plan.length, end = plan.lane_begin[lane + 1] * plan.length;
    double sum = 0.0;
    int64_t at = begin;
    for (; at < end && !plan.reset[at]; ++at) sum += sums.e[at];
    params.open_e[lane] = static_cast<float>(sum);
    params.is_open[lane] = at == end ? 1.0f : 0.0f;
  }
}

// dlf_t is the sum of X S over the pairs j < t <= u. The pairs are summed by where j and u lie:
//   j before the chunk, u after it   through
//   j before it, u inside            q . dq from t on
//   j inside, u after it             k . dk before t
//   both inside                      within
// `a` is the gradient that flows through the stabilizer, where there is one. It is walked back over the whole lane.
void gate_gradients(const Plan& plan, const GateSums& sums, const MlstmBackward& params) {
  const MlstmProblem& p = plan.p;
  const int64_t length = plan.length;
  const bool stabilized = plan.stabilized();
  const VectorKernels& kernels = vector_kernels();
  parallel(plan.lanes(), [&](int64_t lane) {
    float raw[max_chunk], di[max_chunk], df[max_chunk];
    double i_slope[max_chunk], f_slope[max_chunk];
    const auto store = [&](void* gate, const Item& item, const float* values) {
      const int64_t first = (item.row * p.seq + item.first) * p.heads + item.head;
      kernels.unpack(static_cast<char*>(gate) + first * element_bytes(p.gate_dtype), p.gate_dtype, p.heads, values,
                     nullptr, item.tokens, 1);
    };
    const int64_t begin = plan.lane_begin[lane], end = plan.lane_begin[lane + 1];
    double a = params.dm_last == nullptr ? 0.0 : params.dm_last[lane];
    const double into_decay = params.dlog_decay == nullptr ? 0.0 : params.dlog_decay[lane];
    for (int64_t x = end - 1; x >= begin; --x) {
      const Item& item = plan.items[x];
      const int64_t at = x * length;
      double crossing_k = 0.0;
      for (int64_t t = 0; t < length; ++t) crossing_k += sums.k_dk[at + t];
      if (stabilized && x == end - 1) a -= sums.through[x] + crossing_k;  // <c, dc> + <n, dn> of the final state
      plan.read_gate(raw, p.i, item);
      kernels.gate_slopes(i_slope, raw, p.gate_soft_cap, !stabilized, item.tokens);
      plan.read_gate(raw, p.f, item);
      kernels.gate_slopes(f_slope, raw, p.gate_soft_cap, true, item.tokens);
      double later = sums.through[x], earlier = crossing_k;
      for (int64_t t = length - 1; t >= 0; --t) {
        later += sums.q_dq[at + t];
        earlier -= sums.k_dk[at + t];
        if (stabilized) a += sums.e[at + t];
        double input = static_cast<double>(sums.k_dk[at + t]) + sums.column[at + t];
        double dlf = later + earlier + sums.within[at + t] + into_decay;
        if (plan.reset[at + t]) {
          input += a;
          a = 0.0;
        } else {
          dlf += a;
        }
        if (t >= item.tokens) continue;
        di[t] = i_slope[t] == 0.0 ? 0.0f : static_cast<float>(input * i_slope[t]);
        df[t] = f_slope[t] == 0.0 ? 0.0f : static_cast<float>(dlf * f_slope[t]);
      }
      store(params.di, item, di);
      store(params.df, item, df);
      if (x == begin) {  // <c, dc> + <n, dn> of the initial state
        a += sums.through[x];
        for (int64_t t = 0; t < length; ++t) a += sums.q_dq[at + t];
      }
    }
    if (params.dm0 != nullptr) params.dm0[lane] = static_cast<float>(a);
  });
}

}  // namespace flash_xlstm::cpu
