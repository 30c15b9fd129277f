// The chunkwise mLSTM's forward on the CPU: h = (W v + weighted q c) / d chunk by chunk, c and n from mlstm_states.h.
// Inputs are converted to float32 once. The normalizer's sums are float64. Threads share lanes, or else a batch's
// chunks and the parts of the state; no sum depends on how.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/mlstm_plan.h"
#include "cpu/mlstm_pool.h"
#include "cpu/mlstm_states.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/scratch.h"
#include "cpu/vector_kernels.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {
namespace {

class Forward {
 public:
  Forward(const Plan& plan, const MlstmForward& params, Range range, int64_t workers)
      : plan_(plan),
        params_(params),
        range_(range),
        workers_(workers),
        products_(plan.p.dtype, workers == 1 ? &ahead_ : nullptr),
        states_(plan, products_, workers, plan.kept(params.kept_states, params.kept_floats)) {
    const MlstmProblem& p = plan.p;
    const int64_t length = plan.length;
    batch_ = items_per_batch(range.end - range.begin, workers, length * (p.dqk + 2 * p.dv) + 2 * p.dqk * p.dv);
    states_.reserve(scratch_, batch_, batch_ + 1);
    scratch_.reserve(q_, length * p.dqk, workers);
    scratch_.reserve(qk_, length * length, workers);
    scratch_.reserve(w_, length * length, workers);
    scratch_.reserve(h_, length * p.dv, workers);
    scratch_.reserve(of_state_, length * p.dv, workers);
    for (Arrays<float>* tokens : {&s_, &inv_d_, &start_}) scratch_.reserve(*tokens, length, workers);
    scratch_.reserve(gate_weights_, 2 * length, workers);
    scratch_.reserve(n_, p.dqk, workers);
    scratch_.reserve(q_room_, products_.left_room(length, p.dqk), workers);
    scratch_.reserve(w_room_, products_.left_room(length, length), workers);
    scratch_.reserve(k_room_, products_.right_room(p.dqk, length, Lies::transposed), workers);
    scratch_.reserve(c_room_, products_.right_room(p.dqk, p.dv, Lies::as_it_is), workers);
    scratch_.allocate();
  }

  void run() {
    for (int64_t begin = range_.begin; begin < range_.end; begin += batch_) {
      const int64_t end = std::min(begin + batch_, range_.end);
      ahead_.clear();
      plan_.fetch_output(ahead_, params_.h, plan_.items[begin], plan_.p.dv);
      if (end < range_.end) {
        const Item& next = plan_.items[end];
        plan_.fetch(ahead_, plan_.p.k, next, plan_.p.dqk);
        plan_.fetch(ahead_, plan_.p.v, next, plan_.p.dv);
        if (params_.h != nullptr) plan_.fetch(ahead_, plan_.p.q, next, plan_.p.dqk);
      }
      states_.walk(begin, end, params_.c_last, params_.n_last);
      if (params_.h == nullptr) continue;
      products_.share(end - begin, workers_, [&](int64_t x, int64_t worker) { output(x, begin + x, worker); });
    }
  }

 private:
  // h of the batch's item x.
  void output(int64_t x, int64_t index, int64_t worker) {
    const MlstmProblem& p = plan_.p;
    const VectorKernels& kernels = vector_kernels();
    const Item& item = plan_.items[index];
    const ChunkGates gates = plan_.gates(index);
    const int64_t length = plan_.length;
    float *q = q_[worker], *w = w_[worker], *h = h_[worker], *s = s_[worker], *inv_d = inv_d_[worker];
    float *start = start_[worker], *of_state = nullptr;
    const float *const k = states_.k[x], *const c = states_.c(index);

    kernels.pack(q, plan_.rows(p.q, item), p.dtype, p.q.seq, item.tokens, p.dqk, length);
    const Left q_left = products_.left(q_room_[worker], states_.rows(p.q, index, q), Lies::as_it_is, length, p.dqk);
    const Right k_right =
        products_.right(k_room_[worker], states_.rows(p.k, index, k), Lies::transposed, p.dqk, length);
    products_.multiply(qk_[worker], q_left, k_right, length, length, p.dqk, Part::lower_out);
    kernels.forward_tile(w, length, qk_[worker], gates, p.scale, products_.ahead_between());
    if (p.normalize) {
      double* const n = n_[worker];  // becomes that after the chunk
      std::copy_n(states_.n(index), p.dqk, n);
      kernels.normalizer(n, s, q, k, gates, p.scale, p.dqk, gate_weights_[worker], products_.ahead_between());
    } else {
      std::fill_n(s, length, 0.0f);
    }
    kernels.inverse_normalizer(inv_d, s, gates.m, p.eps, length);

    const Left w_left = products_.left(w_room_[worker], w, Lies::as_it_is, length, length);
    products_.multiply(h, w_left, states_.v_right[x], length, p.dv, length, Part::lower_a);
    if (!states_.v_finite[x]) kernels.add_not_finite(h, w, length, 1, states_.v[x], length, p.dv, length);
    if (c != nullptr) {
      of_state = of_state_[worker];
      kernels.start_weights(start, gates);
      for (int64_t t = 0; t < length; ++t) start[t] *= p.scale;
      const Right c_right = products_.right(c_room_[worker], c, Lies::as_it_is, p.dqk, p.dv);
      products_.multiply(of_state, q_left, c_right, length, p.dv, p.dqk);
    }
    kernels.add_and_unpack(plan_.output_rows(params_.h, item, p.dv), p.dtype, p.heads * p.dv, h, of_state, start, inv_d,
                           item.tokens, p.dv);
    for (int64_t t = 0; t < item.tokens; ++t) {
      const int64_t at = (item.row * p.seq + item.first + t) * p.heads + item.head;
      if (params_.s != nullptr) params_.s[at] = s[t];
      if (params_.m != nullptr) params_.m[at] = gates.m[t];
    }
  }

  const Plan& plan_;
  const MlstmForward& params_;
  Range range_;
  int64_t workers_, batch_;
  Ahead ahead_;
  Products products_;
  States states_;
  Scratch scratch_;
  Arrays<float> q_, qk_, w_, h_, of_state_, s_, inv_d_, start_, q_room_, w_room_, k_room_, c_room_;
  Arrays<double> gate_weights_, n_;
};

// What a forward leaves to do with a pool: the final m, states of sequences that are fresh and empty, and h of those
// left out.
void finish_pool(const Plan& plan, void* h) {
  const MlstmProblem& p = plan.p;
  const int64_t token_bytes = p.heads * p.dv * element_bytes(p.dtype);
  const std::vector<float> zeros(p.dqk * p.dv, 0.0f);
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    const int64_t seq = lane / p.heads;
    if (plan.leaves_out(seq)) {
      const auto [start, stop] = plan.bounds[seq];
      const int64_t row = p.cu_seqlens == nullptr ? seq : 0;
      std::memset(static_cast<char*>(h) + (row * p.seq + start) * token_bytes, 0, (stop - start) * token_bytes);
      lane += p.heads - 1;
      continue;
    }
    const LaneSlot slot = slot_of(p, lane);
    p.pool.m[slot.m] = plan.m_last[lane];
    if (!slot.is_fresh || plan.lane_begin[lane] < plan.lane_begin[lane + 1]) continue;
    write_pool(p, lane, zeros.data());
    std::fill_n(p.pool.n + slot.n, p.dqk, 0.0f);
  }
}

// Kept memory that holds no state, so that equal calls have equal results.
void clear_unused(const Plan& plan, const MlstmForward& params) {
  float* const kept = params.kept_states;
  const int64_t floats = mlstm_kept_states(plan.p.dqk, plan.p.dv).floats;
  const int64_t c = plan.p.dqk * plan.p.dv, n = kept_c_floats(plan.p.dqk, plan.p.dv), end = n + 2 * plan.p.dqk;
  const int64_t count = plan.kept(kept, params.kept_floats) == nullptr ? 0 : plan.inner_items();
  for (int64_t x = 0; x < count; ++x) {
    std::fill_n(kept + x * floats + c, n - c, 0.0f);
    std::fill_n(kept + x * floats + end, floats - end, 0.0f);
  }
  std::fill_n(kept + count * floats, params.kept_floats - count * floats, 0.0f);
}

}  // namespace

void mlstm_forward(const MlstmForward& params) {
  const Plan plan(params.p);
  const MlstmProblem& p = plan.p;
  share_parts(plan, [&](Range range, int64_t workers) { Forward(plan, params, range, workers).run(); });
  if (params.kept_states != nullptr) clear_unused(plan, params);
  if (is_pooled(p)) return finish_pool(plan, params.h);
  if (params.c_last == nullptr) return;
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    if (params.m_last != nullptr) params.m_last[lane] = plan.m_last[lane];
    if (params.log_decay != nullptr) params.log_decay[lane] = plan.log_decay[lane];
    if (plan.lane_begin[lane] < plan.lane_begin[lane + 1]) continue;
    pass_on(params.c_last, p.c0, lane, p.dqk * p.dv);
    pass_on(params.n_last, p.n0, lane, p.dqk);
  }
}

}  // namespace flash_xlstm::cpu
