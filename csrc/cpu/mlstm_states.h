// The mLSTM's states at the starts of the chunks, made from k and v.
//
// Items are worked through in batches of a bounded number of items. The state at the start of item i, unless that
// begins a lane, lies in slot i modulo the number of slots; or where the problem keeps it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/mlstm_plan.h"
#include "cpu/products.h"
#include "cpu/scratch.h"

namespace flash_xlstm::cpu {

// Elements of a state that a task takes through a batch.
constexpr int64_t state_block = 2048;

// Items of a batch: one for a single worker, whose caches then hold all of it, and some for each of several workers, so
// that they seldom wait for one another. `floats`: the scratch memory of an item.
int64_t items_per_batch(int64_t items, int64_t workers, int64_t floats);

// An empty sequence passes its state, and the state's gradient, through. from == nullptr: zeros. to == nullptr: not
// wanted.
void pass_on(float* to, const float* from, int64_t lane, int64_t size);

class States {
 public:
  // kept: memory that keeps all states but those that begin a lane; nullptr: none does.
  States(const Plan& plan, const Products& products, int64_t workers, float* kept)
      : plan_(plan),
        products_(products),
        workers_(workers),
        kept_(kept),
        kept_floats_(mlstm_kept_states(plan.p.dqk, plan.p.dv).floats) {}

  // `slots` is at least batch + 1.
  void reserve(Scratch& scratch, int64_t batch, int64_t slots);

  // Packs items [begin, end), a batch, and makes the states at the starts of [begin + 1, end + 1) from that at the
  // start of `begin`. Final states are written where not null, (lanes, dqk, dv) and (lanes, dqk), or to the pool.
  void walk(int64_t begin, int64_t end, float* c_last, float* n_last);
  // k and v of an item as the batch's item x, and v as a right operand where wanted. Without, what v_finite says may be
  // unknown.
  void pack(int64_t x, int64_t item, bool v_as_right);

  // The state at the start of an item; c == nullptr stands for zeros.
  const float* c(int64_t item) const;
  float* c_slot(int64_t item) const { return kept_ == nullptr ? c_slots_[item % slots_] : kept(item); }
  double* n(int64_t item) const {
    if (kept_ == nullptr || plan_.items[item].lane_begin) return n_slots_[item % slots_];
    return reinterpret_cast<double*>(kept(item) + kept_c_floats(plan_.p.dqk, plan_.p.dv));
  }
  // Sets n at the start of an item that begins a lane.
  void begin_n(int64_t item) const;

  // An item's rows of an input for products: the problem's own if they take these, or else `floats`.
  Matrix rows(const Strided& t, int64_t item, const float* floats) const {
    if (!products_.takes_halves() || t.data == nullptr) return floats;
    const Item& of = plan_.items[item];
    return {static_cast<const uint16_t*>(plan_.rows(t, of)), t.seq, of.tokens};
  }

  // Of the batch's item x: k as float32, and v where products do not take the problem's own or not all of it is finite;
  // v as the right operand of a product, with zeros for what is not finite; whether all of k, and all of v, is finite;
  // what a chunk adds to c, free for use between walks.
  Arrays<float> k, v, update;
  std::vector<Right> v_right;
  std::vector<char> k_finite, v_finite;

 private:
  float* kept(int64_t item) const { return kept_ + plan_.items[item].inner * kept_floats_; }
  void add_chunk(int64_t x, int64_t item, int64_t worker, float* c_next);

  const Plan& plan_;
  const Products& products_;
  int64_t workers_, slots_ = 0;
  float* kept_;
  int64_t kept_floats_;
  Arrays<float> c_slots_, c_final_, v_room_, v_clean_, weight_, weighted_k_, k_room_;
  Arrays<double> n_slots_, n_update_, gate_weights_;
};

// to = from with zeros for what is not finite.
void copy_finite(float* to, const float* from, int64_t count);

}  // namespace flash_xlstm::cpu
