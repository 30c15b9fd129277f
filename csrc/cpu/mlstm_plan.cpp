#include "cpu/mlstm_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/isa.h"
#include "cpu/mlstm_pool.h"
#include "cpu/parallel.h"

namespace flash_xlstm::cpu {
namespace {

bool is_large(int64_t dqk, int64_t dv) { return dqk * dv >= int64_t{1} << 16; }
// Products with the state cost the same for every length, products within a chunk in proportion to it. A large state
// itself takes time: it is read and written once a chunk. Products of bfloat16 are cheap beside that.
int64_t default_chunk(const MlstmProblem& p, int64_t longest) {
  const int64_t most = !is_large(p.dqk, p.dv) ? 64 : p.dtype == DType::bfloat16 && has_bf16() ? 256 : 128;
  // Chunks of about equal length, in multiples of 32 tokens.
  return std::min(most, ceil_div(ceil_div(longest, ceil_div(longest, most)), int64_t{32}) * 32);
}

}  // namespace

KeptStates mlstm_kept_states(int64_t dqk, int64_t dv) {
  constexpr int64_t line = 16;
  return {.floats = ceil_div(kept_c_floats(dqk, dv) + 2 * dqk, line) * line, .tokens = is_large(dqk, dv) ? 128 : 64};
}

Plan::Plan(const MlstmProblem& problem) : p(problem), threads(torch::stable::get_num_threads()) {
  if (!p.normalize) p.eps = 0.0f;  // d = max(|s|, exp(-m)) + eps is then 1, with s and m of 0
  int64_t longest = 1;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    bounds.push_back(p.cu_seqlens == nullptr ? Range{0, p.seq} : Range{p.cu_seqlens[s], p.cu_seqlens[s + 1]});
    longest = std::max(longest, bounds[s].end - bounds[s].begin);
  }
  length = std::min({p.chunk_size > 0 ? p.chunk_size : default_chunk(p, longest), max_chunk, longest});
  int64_t inner = 0;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const auto [start, stop] = bounds[s];
    const bool out = leaves_out(s);
    for (int64_t head = 0; head < p.heads; ++head) {
      lane_begin.push_back(static_cast<int64_t>(items.size()));
      for (int64_t first = start; first < stop && !out; first += length) {
        items.push_back({.lane = s * p.heads + head,
                         .seq = s,
                         .head = head,
                         .row = p.cu_seqlens == nullptr ? s : 0,
                         .first = first,
                         .tokens = std::min(length, stop - first),
                         .lane_begin = first == start,
                         .lane_end = first + length >= stop,
                         .inner = inner});
        inner += first != start;
      }
    }
  }
  lane_begin.push_back(static_cast<int64_t>(items.size()));
  scan_gates();
}

void Plan::read_gate(float* to, const Strided& gate, const Item& item) const {
  const int64_t first = item.row * gate.batch + item.first * gate.seq + item.head * gate.head;
  const void* const from = static_cast<const char*>(gate.data) + first * element_bytes(p.gate_dtype);
  vector_kernels().pack(to, from, p.gate_dtype, gate.seq, item.tokens, 1, item.tokens);
}

std::vector<Range> Plan::parts() const {
  const int64_t count = static_cast<int64_t>(items.size());
  std::vector<Range> result;
  int64_t begin = 0, longest = 0;
  for (int64_t lane = 0; lane < lanes(); ++lane) {
    const int64_t end = lane_begin[lane + 1], number = static_cast<int64_t>(result.size()) + 1;
    if (end == begin || (end * threads < count * number && lane + 1 < lanes())) continue;
    result.push_back({.begin = begin, .end = end});
    longest = std::max(longest, end - begin);
    begin = end;
  }
  if (begin < count) result.push_back({.begin = begin, .end = count});
  if (8 * longest * threads > 9 * count) return {{.begin = 0, .end = count}};
  return result;
}

void Plan::scan_gates() {
  const int64_t count = static_cast<int64_t>(items.size());
  for (auto* v : {&row_high, &row_low, &column_high, &column_low, &m}) v->resize(count * length);
  m_start.resize(count);
  keep.resize(count);
  m_last.resize(lanes());
  log_decay.resize(lanes());
  reset.resize(count * length);
  const auto split = [](double x, float& high, float& low) {
    high = static_cast<float>(x);
    low = std::isinf(high) ? 0.0f : static_cast<float>(x - high);
  };
  const VectorKernels& kernels = vector_kernels();
  parallel(lanes(), [&](int64_t lane) {
    float raw[max_chunk];
    double inputs[max_chunk], forgets[max_chunk];
    double stabilizer = initial_m(p, lane), decay = 0.0;
    for (int64_t x = lane_begin[lane]; x < lane_begin[lane + 1]; ++x) {
      const Item& item = items[x];
      m_start[x] = static_cast<float>(stabilizer);
      read_gate(raw, p.i, item);
      kernels.gate_values(inputs, raw, p.gate_soft_cap, !stabilized(), item.tokens);
      read_gate(raw, p.f, item);
      kernels.gate_values(forgets, raw, p.gate_soft_cap, true, item.tokens);
      double b = 0.0;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = x * length + t;
        const bool is_there = t < item.tokens;
        const double input = is_there ? inputs[t] : -std::numeric_limits<double>::infinity();
        const double forget = is_there ? forgets[t] : 0.0;
        b += forget;
        const double carried = forget + stabilizer;
        reset[at] = stabilized() && input >= carried;
        if (stabilized()) stabilizer = input >= carried ? input : carried;
        // Every weight is relative to the float32 m. It cancels in the division, except for eps and the floor of d.
        // So its rounding does not matter, as long as both sides use the same m.
        m[at] = static_cast<float>(stabilizer);
        split(b - m[at], row_high[at], row_low[at]);
        split(input - b, column_high[at], column_low[at]);
      }
      keep[x] = std::exp(b - m[x * length + length - 1] + m_start[x]);
      decay += b;
    }
    m_last[lane] = static_cast<float>(stabilizer);
    log_decay[lane] = static_cast<float>(decay);
  });
}

}  // namespace flash_xlstm::cpu
