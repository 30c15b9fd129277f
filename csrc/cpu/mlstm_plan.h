// The chunks of an mLSTM problem on the CPU, and their gates.
//
// A lane is one head of one sequence. An item is one chunk of one lane, padded to `length` tokens with tokens that
// change nothing. Items are numbered lane by lane. The sums of gates and stabilizer are float64.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ahead.h"
#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {

struct Item {
  int64_t lane, seq, head, row, first, tokens;
  bool lane_begin, lane_end;
  int64_t inner;  // how many items before this one begin no lane
};

struct Range {
  int64_t begin, end;
};

// The chunks of a problem and their gates.
struct Plan {
  MlstmProblem p;
  int64_t length, threads;
  std::vector<Range> bounds;  // of each sequence: its first token within its row, and the end
  std::vector<Item> items;
  std::vector<int64_t> lane_begin;                                   // first item of each lane, and the end
  std::vector<float> row_high, row_low, column_high, column_low, m;  // [items][length], as in ChunkGates
  std::vector<float> m_start;                                        // [items]
  std::vector<double> keep;              // [items]: the weight of the state at the start in the state at the end
  std::vector<float> m_last, log_decay;  // [lanes]
  std::vector<char> reset;               // [items][length]: m took the input gate's branch

  explicit Plan(const MlstmProblem& problem);

  // Whether the sequence has no slot of the pool: it has no items then.
  bool leaves_out(int64_t seq) const { return p.pool.indices != nullptr && p.pool.indices[seq] < 0; }

  int64_t lanes() const { return p.num_seqs * p.heads; }
  bool stabilized() const { return p.input_gate == InputGate::exponential; }
  // Chunks that begin no lane.
  int64_t inner_items() const { return items.empty() ? 0 : items.back().inner + !items.back().lane_begin; }
  // Where the states at their starts are kept, if there is room for all of them.
  float* kept(float* states, int64_t floats) const {
    return inner_items() * mlstm_kept_states(p.dqk, p.dv).floats <= floats ? states : nullptr;
  }
  // A gate's pre-activations at an item's tokens, as given.
  void read_gate(float* to, const Strided& gate, const Item& item) const;
  ChunkGates gates(int64_t item) const {
    const int64_t at = item * length;
    return {.length = length,
            .row_high = &row_high[at],
            .row_low = &row_low[at],
            .column_high = &column_high[at],
            .column_low = &column_low[at],
            .m = &m[at],
            .m_start = m_start[item]};
  }
  // Where an item's rows of a (batch, seq, heads, dim) tensor start.
  const void* rows(const Strided& t, const Item& item) const {
    const int64_t offset = item.row * t.batch + item.first * t.seq + item.head * t.head;
    return static_cast<const char*>(t.data) + offset * element_bytes(p.dtype);
  }
  // The same for an output, contiguous.
  void* output_rows(void* t, const Item& item, int64_t dim) const {
    const int64_t offset = ((item.row * p.seq + item.first) * p.heads + item.head) * dim;
    return static_cast<char*>(t) + offset * element_bytes(p.dtype);
  }

  // Prefetches an item's rows of such tensors.
  void fetch(Ahead& ahead, const Strided& t, const Item& item, int64_t dim) const {
    const int64_t bytes = element_bytes(p.dtype);
    ahead.add(rows(t, item), t.seq * bytes, item.tokens, dim * bytes);
  }
  void fetch_output(Ahead& ahead, void* t, const Item& item, int64_t dim) const {
    const int64_t bytes = element_bytes(p.dtype);
    if (t != nullptr) ahead.add(output_rows(t, item, dim), p.heads * dim * bytes, item.tokens, dim * bytes);
  }

  // Whole lanes, in a part of about equal size for each thread; or all in one, if the parts would be too unequal.
  std::vector<Range> parts() const;

 private:
  void scan_gates();
};

// Calls f(range, workers) for ranges of a plan's items: parts, each on a thread of its own, or all of them with as many
// workers as there are threads.
template <typename F>
void share_parts(const Plan& plan, const F& f) {
  if (plan.items.empty()) return;
  const std::vector<Range> parts = plan.parts();
  if (parts.size() == 1) return f(parts[0], plan.threads);
  parallel(static_cast<int64_t>(parts.size()), [&](int64_t part) { f(parts[part], 1); });
}

// Floats of c before n in a kept state: n is float64.
inline int64_t kept_c_floats(int64_t dqk, int64_t dv) { return ceil_div(dqk * dv, 2) * 2; }

}  // namespace flash_xlstm::cpu
