#include "cpu/mlstm_states.h"

#include <algorithm>
#include <cmath>

#include "cpu/mlstm_pool.h"

namespace flash_xlstm::cpu {

int64_t items_per_batch(int64_t items, int64_t workers, int64_t floats) {
  constexpr int64_t worker_floats = int64_t{2} << 20;
  const int64_t each = workers == 1 ? 1 : std::clamp<int64_t>(worker_floats / floats, 2, 16);
  return std::clamp<int64_t>(each * workers, 1, std::max<int64_t>(items, 1));
}

void pass_on(float* to, const float* from, int64_t lane, int64_t size) {
  if (to == nullptr) return;
  if (from == nullptr) {
    std::fill_n(to + lane * size, size, 0.0f);
  } else {
    std::copy_n(from + lane * size, size, to + lane * size);
  }
}

void copy_finite(float* to, const float* from, int64_t count) {
  for (int64_t x = 0; x < count; ++x) to[x] = std::isfinite(from[x]) ? from[x] : 0.0f;
}

void States::reserve(Scratch& scratch, int64_t batch, int64_t slots) {
  const MlstmProblem& p = plan_.p;
  const int64_t length = plan_.length;
  slots_ = slots;
  scratch.reserve(k, length * p.dqk, batch);
  scratch.reserve(v, length * p.dv, batch);
  scratch.reserve(v_clean_, length * p.dv, batch);
  scratch.reserve(v_room_, products_.right_room(length, p.dv, Lies::as_it_is), batch);
  scratch.reserve(update, p.dqk * p.dv, batch);
  scratch.reserve(n_update_, p.dqk, batch);
  if (kept_ == nullptr) scratch.reserve(c_slots_, p.dqk * p.dv, slots);
  if (is_pooled(p)) scratch.reserve(c_final_, p.dqk * p.dv, batch);
  scratch.reserve(n_slots_, p.dqk, slots);
  scratch.reserve(weight_, length, workers_);
  scratch.reserve(weighted_k_, length * p.dqk, workers_);
  scratch.reserve(k_room_, products_.left_room(p.dqk, length), workers_);
  scratch.reserve(gate_weights_, 2 * length, workers_);
  v_right.resize(batch);
  k_finite.resize(batch);
  v_finite.resize(batch);
}

const float* States::c(int64_t index) const {
  const Item& item = plan_.items[index];
  if (item.lane_begin && begins_with_zeros(plan_.p, item.lane)) return nullptr;
  if (!item.lane_begin || is_pooled(plan_.p)) return c_slot(index);
  return plan_.p.c0 + item.lane * plan_.p.dqk * plan_.p.dv;
}

void States::pack(int64_t x, int64_t index, bool v_as_right) {
  const MlstmProblem& p = plan_.p;
  const Item& item = plan_.items[index];
  const VectorKernels& kernels = vector_kernels();
  const int64_t length = plan_.length;
  k_finite[x] = kernels.pack(k[x], plan_.rows(p.k, item), p.dtype, p.k.seq, item.tokens, p.dqk, length);
  if (products_.takes_halves()) {
    if (!v_as_right) return;
    bool finite = true;
    v_right[x] = products_.right(v_room_[x], rows(p.v, index, nullptr), Lies::as_it_is, length, p.dv, &finite);
    v_finite[x] = finite;
    if (finite) return;
  }
  v_finite[x] = kernels.pack(v[x], plan_.rows(p.v, item), p.dtype, p.v.seq, item.tokens, p.dv, length);
  if (!v_as_right) return;
  if (!v_finite[x]) copy_finite(v_clean_[x], v[x], length * p.dv);
  v_right[x] = products_.right(v_room_[x], v_finite[x] ? v[x] : v_clean_[x], Lies::as_it_is, length, p.dv);
}

// What the chunk adds to c and n. A single worker makes the next c at once.
void States::add_chunk(int64_t x, int64_t index, int64_t worker, float* c_next) {
  const MlstmProblem& p = plan_.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t length = plan_.length;
  const ChunkGates gates = plan_.gates(index);
  float *weight = weight_[worker], *weighted_k = weighted_k_[worker];
  kernels.end_weights(weight, gates);
  kernels.weight_rows(weighted_k, p.dqk, k[x], weight, length, p.dqk);
  std::fill_n(n_update_[x], p.dqk, 0.0);
  if (p.normalize) {
    kernels.normalizer(n_update_[x], nullptr, nullptr, k[x], gates, p.scale, p.dqk, gate_weights_[worker],
                       products_.ahead_between());
  }
  // In the backward, sums of c's and of k's gradients must agree with c.
  const Left left = products_.left(k_room_[worker], weighted_k, Lies::transposed, p.dqk, length, Rounding::to_two);
  if (workers_ == 1 && v_finite[x]) {
    products_.advance(c_next, c(index), static_cast<float>(plan_.keep[index]), left, v_right[x], p.dqk, p.dv, length);
    return;
  }
  products_.multiply(update[x], left, v_right[x], p.dqk, p.dv, length);
  if (!v_finite[x]) kernels.add_not_finite(update[x], weighted_k, 1, p.dqk, v[x], p.dqk, p.dv, length);
}

void States::begin_n(int64_t item) const {
  const float* const from = initial_n(plan_.p, plan_.items[item].lane);
  for (int64_t r = 0; r < plan_.p.dqk; ++r) n(item)[r] = from == nullptr ? 0.0 : from[r];
}

void States::walk(int64_t begin, int64_t end, float* c_last, float* n_last) {
  const MlstmProblem& p = plan_.p;
  const int64_t count = end - begin, state = p.dqk * p.dv;
  // Where the state at an item's end goes. nullptr: it is not wanted.
  const auto c_next = [&](int64_t x) {
    const Item& item = plan_.items[begin + x];
    if (!item.lane_end) return c_slot(begin + x + 1);
    if (is_pooled(p)) return c_final_[x];
    return c_last == nullptr ? nullptr : c_last + item.lane * state;
  };
  products_.share(count, workers_, [&](int64_t x, int64_t worker) {
    const Item& item = plan_.items[begin + x];
    if (item.lane_begin && is_pooled(p) && c(begin + x) != nullptr) read_pool(c_slot(begin + x), p, item.lane);
    pack(x, begin + x, true);
    if (c_next(x) != nullptr) add_chunk(x, begin + x, worker, c_next(x));
  });
  const int64_t blocks = ceil_div(state, state_block);
  products_.share(blocks, std::min(workers_, blocks), [&](int64_t block, int64_t) {
    const int64_t from = block * state_block, size = std::min(state_block, state - from);
    for (int64_t x = 0; x < count; ++x) {
      if (c_next(x) == nullptr || (workers_ == 1 && v_finite[x])) continue;
      const float* const c_start = c(begin + x);
      vector_kernels().advance(c_next(x) + from, c_start == nullptr ? nullptr : c_start + from,
                               static_cast<float>(plan_.keep[begin + x]), update[x] + from, size);
    }
  });
  for (int64_t x = 0; x < count; ++x) {
    const Item& item = plan_.items[begin + x];
    if (item.lane_end && is_pooled(p)) write_pool(p, item.lane, c_final_[x]);
    const double* const n_start = n(begin + x);
    if (item.lane_begin) begin_n(begin + x);
    if (c_next(x) == nullptr) continue;
    const auto n_end = [&](int64_t r) { return plan_.keep[begin + x] * n_start[r] + n_update_[x][r]; };
    if (!item.lane_end) {
      for (int64_t r = 0; r < p.dqk; ++r) n(begin + x + 1)[r] = n_end(r);
    } else if (float* const to = final_n(n_last, p, item.lane)) {
      for (int64_t r = 0; r < p.dqk; ++r) to[r] = static_cast<float>(n_end(r));
    }
  }
}

}  // namespace flash_xlstm::cpu
