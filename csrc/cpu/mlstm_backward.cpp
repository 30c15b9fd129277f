// The chunkwise mLSTM's backward on the CPU. It walks forward for the states at the chunks' starts, then back, batch by
// batch: of every chunk all that needs no gradient of the state at its end (dq; dk's and dv's terms within the chunk;
// what the chunk adds to that gradient), then the state's gradients from the last chunk to the first, then the rest of
// dk and dv. Where the states would take more than kept_bytes, the items are cut into segments: the first walk keeps
// the states at the segments' starts, and each segment is walked forward again. Where the forward has kept the states,
// no walk is needed.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/mlstm_gate_gradients.h"
#include "cpu/mlstm_plan.h"
#include "cpu/mlstm_states.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/scratch.h"
#include "cpu/vector_kernels.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {
namespace {

constexpr int64_t kept_bytes = int64_t{64} << 20;  // for all threads

class Backward {
 public:
  Backward(const Plan& plan, const MlstmBackward& params, GateSums& sums, Range range, int64_t workers)
      : plan_(plan),
        params_(params),
        sums_(sums),
        range_(range),
        workers_(workers),
        products_(plan.p.dtype, workers == 1 ? &ahead_ : nullptr),
        kept_(plan.kept(const_cast<float*>(params.kept_states), params.kept_floats)),  // they are only read
        states_(plan, products_, workers, kept_) {
    const MlstmProblem& p = plan.p;
    const int64_t length = plan.length, state = p.dqk * p.dv;
    const int64_t count = range.end - range.begin;
    batch_ = items_per_batch(count, workers, length * (2 * p.dqk + 3 * p.dv) + 3 * state);
    const int64_t fit = kept_bytes * workers / plan.threads / static_cast<int64_t>(sizeof(float)) / state;
    segment_ = std::clamp(kept_ != nullptr ? count : fit, batch_, std::max(count, batch_));
    states_.reserve(scratch_, batch_, kept_ != nullptr ? batch_ + 1 : segment_ + 1);
    scratch_.reserve(dk_, length * p.dqk, batch_);
    scratch_.reserve(dv_, length * p.dv, batch_);
    scratch_.reserve(dc_slots_, state, batch_ + 1);
    scratch_.reserve(dn_slots_, p.dqk, batch_ + 1);
    for (Arrays<float>* n : {&n_start_, &dn_update_}) scratch_.reserve(*n, p.dqk, batch_);
    for (Arrays<float>* rows : {&q_, &weighted_q_, &of_c_, &of_c_transposed_, &dq_}) {
      scratch_.reserve(*rows, length * p.dqk, workers);
    }
    scratch_.reserve(clean_, length * std::max(p.dqk, p.dv), workers);
    for (Arrays<float>* rows : {&dh_, &dc_k_}) scratch_.reserve(*rows, length * p.dv, workers);
    for (Arrays<float>* tiles : {&qk_, &gv_, &x_, &w_}) scratch_.reserve(*tiles, length * length, workers);
    for (Arrays<float>* tokens :
         {&weight_, &start_over_d_, &start_delta_, &inv_d_, &delta_, &s_, &across_, &across_n_}) {
      scratch_.reserve(*tokens, length, workers);
    }
    const int64_t left = std::max({products_.left_room(length, p.dqk), products_.left_room(length, p.dv),
                                   products_.left_room(length, length), products_.left_room(p.dqk, length),
                                   products_.left_room(p.dqk, p.dv)});
    scratch_.reserve(left_room_, left, workers);
    scratch_.reserve(dh_room_, products_.right_room(length, p.dv, Lies::as_it_is), workers);
    scratch_.reserve(v_room_, products_.right_room(p.dv, length, Lies::transposed), batch_);
    v_transposed_.resize(batch_);
    const auto right = [&](int64_t depth, int64_t columns) {
      return products_.right_room(depth, columns, Lies::as_it_is);
    };
    const auto right_transposed = [&](int64_t depth, int64_t columns) {
      return products_.right_room(depth, columns, Lies::transposed);
    };
    scratch_.reserve(right_room_,
                     std::max({right_transposed(p.dqk, length), right_transposed(p.dv, length), right(length, p.dqk),
                               right(length, p.dv), right(p.dqk, p.dv)}),
                     workers);
    scratch_.allocate();
  }

  void run() {
    const MlstmProblem& p = plan_.p;
    const int64_t state = p.dqk * p.dv, segments = ceil_div(range_.end - range_.begin, segment_);
    std::vector<float> saved_c((segments - 1) * state);
    std::vector<double> saved_n((segments - 1) * p.dqk);
    const auto walk = [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; x += batch_) {
        ahead_.clear();
        fetch_keys_and_values(std::min(x + batch_, end - 1));
        states_.walk(x, std::min(x + batch_, end), nullptr, nullptr);
      }
    };
    for (int64_t segment = 0; segment + 1 < segments; ++segment) {
      const int64_t begin = range_.begin + segment * segment_, end = begin + segment_;
      walk(begin, end);
      std::copy_n(states_.c_slot(end), state, &saved_c[segment * state]);
      std::copy_n(states_.n(end), p.dqk, &saved_n[segment * p.dqk]);
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t begin = range_.begin + segment * segment_, end = std::min(begin + segment_, range_.end);
      if (segment > 0) {
        std::copy_n(&saved_c[(segment - 1) * state], state, states_.c_slot(begin));
        std::copy_n(&saved_n[(segment - 1) * p.dqk], p.dqk, states_.n(begin));
      }
      if (kept_ == nullptr) walk(begin, end);
      for (int64_t last = end; last > begin; last -= batch_) {
        const int64_t first = std::max(begin, last - batch_);
        for (int64_t x = first; x < last && kept_ != nullptr; ++x) {
          if (plan_.items[x].lane_begin) states_.begin_n(x);
        }
        ahead_.clear();
        const Item& item = plan_.items[first];
        plan_.fetch_output(ahead_, params_.dq, item, p.dqk);
        plan_.fetch_output(ahead_, params_.dk, item, p.dqk);
        plan_.fetch_output(ahead_, params_.dv, item, p.dv);
        if (first > begin) {
          const Item& next = plan_.items[first - 1];
          fetch_keys_and_values(first - 1);
          plan_.fetch(ahead_, p.q, next, p.dqk);
          if (params_.dh.data != nullptr) plan_.fetch(ahead_, params_.dh, next, p.dv);
          const int64_t bytes = state * static_cast<int64_t>(sizeof(float));
          if (const float* const c = states_.c(first - 1); c != nullptr) ahead_.add(c, bytes, 1, bytes);
        }
        walk_back(first, last);
      }
    }
  }

  void fetch_keys_and_values(int64_t index) {
    plan_.fetch(ahead_, plan_.p.k, plan_.items[index], plan_.p.dqk);
    plan_.fetch(ahead_, plan_.p.v, plan_.items[index], plan_.p.dv);
  }

  // The gradient of the state at an item's end; nullptr: zeros.
  const float* dc(int64_t index) const {
    const Item& item = plan_.items[index];
    if (!item.lane_end) return dc_slots_[index % (batch_ + 1)];
    return params_.dc_last == nullptr ? nullptr : params_.dc_last + item.lane * plan_.p.dqk * plan_.p.dv;
  }
  const float* dn(int64_t index) const {
    const Item& item = plan_.items[index];
    if (!item.lane_end) return dn_slots_[index % (batch_ + 1)];
    return params_.dn_last == nullptr ? nullptr : params_.dn_last + item.lane * plan_.p.dqk;
  }
  // Where the gradient of the state at an item's start goes; nullptr: it is not wanted.
  float* dc_start(int64_t index) const {
    const Item& item = plan_.items[index];
    if (!item.lane_begin) return dc_slots_[(index - 1) % (batch_ + 1)];
    return params_.dc0 == nullptr ? nullptr : params_.dc0 + item.lane * plan_.p.dqk * plan_.p.dv;
  }
  float* dn_start(int64_t index) const {
    const Item& item = plan_.items[index];
    if (!item.lane_begin) return dn_slots_[(index - 1) % (batch_ + 1)];
    return params_.dn0 == nullptr ? nullptr : params_.dn0 + item.lane * plan_.p.dqk;
  }

  // All of the batch's item x that needs no gradient of the state at its end.
  void chunk(int64_t x, int64_t index, int64_t worker) {
    const MlstmProblem& p = plan_.p;
    const VectorKernels& kernels = vector_kernels();
    const Item& item = plan_.items[index];
    const ChunkGates gates = plan_.gates(index);
    const int64_t length = plan_.length, global = index * length;
    float *q = q_[worker], *dh = dh_[worker], *s = s_[worker], *inv_d = inv_d_[worker], *weight = weight_[worker];
    float *x_tile = x_[worker], *w_tile = w_[worker], *delta = delta_[worker], *start_over_d = start_over_d_[worker];
    float *start_delta = start_delta_[worker], *across = across_[worker], *across_n = across_n_[worker];
    float* const of_c = of_c_[worker];
    states_.pack(x, index, false);
    const float *k = states_.k[x], *c = states_.c(index);

    const bool q_finite = kernels.pack(q, plan_.rows(p.q, item), p.dtype, p.q.seq, item.tokens, p.dqk, length);
    const Matrix q_rows = states_.rows(p.q, index, q), k_rows = states_.rows(p.k, index, k);
    const Matrix dh_rows = states_.rows(params_.dh, index, dh);
    const auto pack_dh = [&] {
      return kernels.pack(dh, plan_.rows(params_.dh, item), p.dtype, params_.dh.seq,
                          params_.dh.data == nullptr ? 0 : item.tokens, p.dv, length);
    };
    bool dh_finite = dh_rows.halves != nullptr || pack_dh();
    multiply(worker, qk_[worker], q_rows, Lies::as_it_is, k_rows, Lies::transposed, length, length, p.dqk,
             Part::lower_out);
    v_transposed_[x] =
        products_.right(v_room_[x], states_.rows(p.v, index, states_.v[x]), Lies::transposed, p.dv, length);
    const Left dh_left =
        products_.left(left_room_[worker], dh_rows, Lies::as_it_is, length, p.dv, Rounding::to_one, &dh_finite);
    products_.multiply(gv_[worker], dh_left, v_transposed_[x], length, length, p.dv, Part::lower_out);
    const Right dh_right = products_.right(dh_room_[worker], dh_rows, Lies::as_it_is, length, p.dv);
    for (int64_t t = 0; t < length; ++t) {
      const int64_t token = (item.row * p.seq + item.first + t) * p.heads + item.head;
      s[t] = t < item.tokens && params_.s != nullptr ? params_.s[token] : 0.0f;
    }
    kernels.inverse_normalizer(inv_d, s, gates.m, p.eps, length);
    std::fill_n(inv_d + item.tokens, length - item.tokens, 0.0f);
    kernels.start_weights(weight, gates);
    for (int64_t t = 0; t < length; ++t) {
      weight[t] *= p.scale;
      start_over_d[t] = weight[t] * inv_d[t];
    }
    float* const n = n_start_[x];
    for (int64_t r = 0; r < p.dqk; ++r) n[r] = static_cast<float>(states_.n(index)[r]);
    std::fill_n(across, length, 0.0f);
    std::fill_n(across_n, length, 0.0f);
    if (c != nullptr) {
      multiply(worker, of_c_transposed_[worker], c, Lies::as_it_is, dh_rows, Lies::transposed, p.dqk, length, p.dv,
               Part::all, Rounding::to_two);
      kernels.transpose(of_c, p.dqk, of_c_transposed_[worker], length, p.dqk, length);
      kernels.row_dots(across, q, of_c, p.dqk, length, p.dqk);
      kernels.row_dots(across_n, q, n, 0, length, p.dqk);
      for (int64_t t = 0; t < length; ++t) {
        across[t] = start_over_d[t] == 0.0f ? 0.0f : start_over_d[t] * across[t];
        across_n[t] = start_over_d[t] == 0.0f ? 0.0f : start_over_d[t] * across_n[t];
      }
    }
    kernels.backward_tile(x_tile, w_tile, qk_[worker], gv_[worker], gates, p.scale, p.eps, inv_d, s, across, across_n,
                          delta, &sums_.e[global], &sums_.within[global], &sums_.column[global],
                          products_.ahead_between());
    for (int64_t t = 0; t < length; ++t) start_delta[t] = weight[t] * delta[t];
    if (float* const to = dc_start(index); to != nullptr) {
      kernels.weighted_sum(dn_update_[x], q, start_delta, length, p.dqk);
      kernels.weight_rows(weighted_q_[worker], p.dqk, q, start_over_d, length, p.dqk);
      const Left left =
          products_.left(left_room_[worker], weighted_q_[worker], Lies::transposed, p.dqk, length, Rounding::to_two);
      if (workers_ == 1) {
        products_.advance(to, dc(index), static_cast<float>(plan_.keep[index]), left, dh_right, p.dqk, p.dv, length);
      } else {
        products_.multiply(states_.update[x], left, dh_right, p.dqk, p.dv, length);
      }
    }
    if (params_.dk == nullptr) return;

    float *dq = dq_[worker], *dk = dk_[x], *dv = dv_[x];
    if (states_.k_finite[x]) {
      multiply(worker, dq, x_tile, Lies::as_it_is, k_rows, Lies::as_it_is, length, p.dqk, length, Part::lower_a);
    } else {
      multiply_guarded(worker, dq, x_tile, Lies::as_it_is, k, p.dqk, Part::lower_a);
    }
    if (q_finite) {
      multiply(worker, dk, x_tile, Lies::transposed, q_rows, Lies::as_it_is, length, p.dqk, length, Part::upper_a);
    } else {
      multiply_guarded(worker, dk, x_tile, Lies::transposed, q, p.dqk, Part::upper_a);
    }
    if (dh_finite) {
      const Left w_left = products_.left(left_room_[worker], w_tile, Lies::transposed, length, length);
      products_.multiply(dv, w_left, dh_right, length, p.dv, length, Part::upper_a);
    } else {
      if (dh_rows.halves != nullptr) pack_dh();
      multiply_guarded(worker, dv, w_tile, Lies::transposed, dh, p.dv, Part::upper_a);
    }
    if (c != nullptr) {
      kernels.add_state_term(dq, of_c, start_over_d, start_delta, n, q, &sums_.q_dq[global], length, p.dqk);
    }
    if (params_.dq == nullptr) return;
    kernels.unpack(plan_.output_rows(params_.dq, item, p.dqk), p.dtype, p.heads * p.dqk, dq, nullptr, item.tokens,
                   p.dqk);
  }

  // Items [begin, end), a batch.
  void walk_back(int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    products_.share(count, workers_, [&](int64_t x, int64_t worker) { chunk(x, begin + x, worker); });
    state_gradients(begin, count);
    if (params_.dk == nullptr) return;
    products_.share(count, workers_, [&](int64_t x, int64_t worker) { keys_and_values(x, begin + x, worker); });
  }

  // The state's gradients at the chunks' ends, from the last to the first, and <c, dc> + <n, dn>.
  void state_gradients(int64_t begin, int64_t count) {
    const MlstmProblem& p = plan_.p;
    const VectorKernels& kernels = vector_kernels();
    const int64_t state = p.dqk * p.dv, blocks = ceil_div(state, state_block);
    std::vector<double> through(count * blocks, 0.0);
    products_.share(blocks, std::min(workers_, blocks), [&](int64_t block, int64_t) {
      const int64_t from = block * state_block, size = std::min(state_block, state - from);
      for (int64_t x = count - 1; x >= 0; --x) {
        const int64_t index = begin + x;
        const float keep = static_cast<float>(plan_.keep[index]);
        const float *const at_end = dc(index), *const c = states_.c(index);
        if (at_end != nullptr && c != nullptr && keep != 0.0f) {
          through[x * blocks + block] = static_cast<double>(keep) * kernels.dot(c + from, at_end + from, size);
        }
        float* const to = dc_start(index);
        if (to == nullptr || workers_ == 1) continue;  // a single worker has made it
        kernels.advance(to + from, at_end == nullptr ? nullptr : at_end + from, keep, states_.update[x] + from, size);
      }
    });
    for (int64_t x = count - 1; x >= 0; --x) {
      const int64_t index = begin + x;
      const float keep = static_cast<float>(plan_.keep[index]);
      const float* const at_end = dn(index);
      double& sum = sums_.through[index];
      for (int64_t block = 0; block < blocks; ++block) sum += through[x * blocks + block];
      if (at_end != nullptr && keep != 0.0f) {
        sum += static_cast<double>(keep) * kernels.dot(n_start_[x], at_end, p.dqk);
      }
      float* const to = dn_start(index);
      if (to != nullptr) kernels.advance(to, at_end, keep, dn_update_[x], p.dqk);
    }
  }

  // dk and dv of the batch's item x: adds what comes through the state at the chunk's end.
  void keys_and_values(int64_t x, int64_t index, int64_t worker) {
    const MlstmProblem& p = plan_.p;
    const VectorKernels& kernels = vector_kernels();
    const Item& item = plan_.items[index];
    const int64_t length = plan_.length;
    const float *const dc_end = dc(index), *const dn_end = dn(index);
    float *dk = dk_[x], *dv = dv_[x], *weight = weight_[worker], *of_c = of_c_[worker];
    const float *k = states_.k[x], *dc_k = nullptr;
    if (dc_end != nullptr || dn_end != nullptr) {
      kernels.end_weights(weight, plan_.gates(index));
      if (dc_end != nullptr) {
        multiply(worker, dc_k_[worker], states_.rows(p.k, index, k), Lies::as_it_is, dc_end, Lies::as_it_is, length,
                 p.dv, p.dqk);
        dc_k = dc_k_[worker];
        const Left dc_left = products_.left(left_room_[worker], dc_end, Lies::as_it_is, p.dqk, p.dv, Rounding::to_two);
        products_.multiply(of_c_transposed_[worker], dc_left, v_transposed_[x], p.dqk, length, p.dv);
        kernels.transpose(of_c, p.dqk, of_c_transposed_[worker], length, p.dqk, length);
      } else {
        std::fill_n(of_c, length * p.dqk, 0.0f);
      }
      const std::vector<float> zeros(dn_end == nullptr ? p.dqk : 0);
      kernels.add_state_term(dk, of_c, weight, weight, dn_end == nullptr ? zeros.data() : dn_end, k,
                             &sums_.k_dk[index * length], length, p.dqk);
    }
    kernels.unpack(plan_.output_rows(params_.dk, item, p.dqk), p.dtype, p.heads * p.dqk, dk, nullptr, item.tokens,
                   p.dqk);
    kernels.add_and_unpack(plan_.output_rows(params_.dv, item, p.dv), p.dtype, p.heads * p.dv, dv, dc_k, weight,
                           nullptr, item.tokens, p.dv);
  }

  // out = a b, of matrices as they lie.
  void multiply(int64_t worker, float* out, const Matrix& a, Lies a_lies, const Matrix& b, Lies b_lies, int64_t rows,
                int64_t columns, int64_t depth, Part part = Part::all, Rounding rounding = Rounding::to_one) const {
    const Left left = products_.left(left_room_[worker], a, a_lies, rows, depth, rounding);
    const Right right = products_.right(right_room_[worker], b, b_lies, depth, columns);
    products_.multiply(out, left, right, rows, columns, depth, part);
  }

  // out = a b with a tile as a, without the terms whose weight is 0, of a b that holds what is not finite.
  void multiply_guarded(int64_t worker, float* out, const float* a, Lies a_lies, const float* b, int64_t columns,
                        Part part) const {
    const int64_t length = plan_.length;
    copy_finite(clean_[worker], b, length * columns);
    multiply(worker, out, a, a_lies, clean_[worker], Lies::as_it_is, length, columns, length, part);
    const bool transposed = a_lies == Lies::transposed;
    vector_kernels().add_not_finite(out, a, transposed ? 1 : length, transposed ? length : 1, b, length, columns,
                                    length);
  }

  const Plan& plan_;
  const MlstmBackward& params_;
  GateSums& sums_;
  Range range_;
  int64_t workers_, batch_, segment_;
  Ahead ahead_;
  Products products_;
  float* kept_;
  States states_;
  Scratch scratch_;
  Arrays<float> dc_slots_, dn_slots_;                     // of an item: at its number modulo batch + 1
  Arrays<float> dk_, dv_, n_start_, dn_update_, v_room_;  // of the batch's items
  std::vector<Right> v_transposed_;                       // the same
  // of workers
  Arrays<float> q_, weighted_q_, of_c_, of_c_transposed_, dq_, dh_, clean_, dc_k_, qk_, gv_, x_, w_;
  Arrays<float> weight_, start_over_d_, start_delta_, inv_d_, delta_, s_, across_, across_n_, left_room_, right_room_,
      dh_room_;
};

}  // namespace

void mlstm_backward(const MlstmBackward& params) {
  const Plan plan(params.p);
  const MlstmProblem& p = plan.p;
  GateSums sums(plan);
  share_parts(plan, [&](Range range, int64_t workers) { Backward(plan, params, sums, range, workers).run(); });
  if (params.dk == nullptr) {
    sum_open(plan, sums, params);
  } else {
    gate_gradients(plan, sums, params);
  }
  if (params.dc0 == nullptr) return;
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    if (plan.lane_begin[lane] < plan.lane_begin[lane + 1]) continue;
    pass_on(params.dc0, params.dc_last, lane, p.dqk * p.dv);
    pass_on(params.dn0, params.dn_last, lane, p.dqk);
  }
}

}  // namespace flash_xlstm::cpu
