// The chunkwise mLSTM on the CPU. Matrix products are torch's batched product (BLAS). Vectorised loops
// (vector_kernels.inl) do the rest. Threads share the chunks, or the rows of the state.
//
// A lane is one head of one sequence. An item is one chunk of one lane, padded to `length` tokens with tokens that
// change nothing. Items are numbered lane by lane and worked through in segments of a bounded number of items, so that
// scratch memory does not grow with the sequence. A segment's end cuts at most one lane, whose state is carried to the
// next segment. The backward first walks forward for the states at the segments' starts, then takes the segments from
// the last to the first. Inputs are converted to float32 once. The sums of gates, stabilizer and normalizer are
// float64.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vector_kernels.h"
#include "params/mlstm.h"

namespace flash_xlstm::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t default_chunk = 64, max_chunk = 256;
// Scratch memory of a segment for each thread, so that it fits a core's caches. Measured on 2 cores (forward at 2,048
// tokens, forward and backward at 1,024, 4 heads x 128 x 128): 2 to 4 MiB a thread are equally fast, 12 take a third
// longer.
constexpr int64_t segment_bytes = int64_t{3} << 20;
constexpr int64_t state_block = 2048;  // floats of a state for one task of a scan

// Where the state of a lane, a head of a sequence, lies in the pool.
struct LaneSlot {
  int64_t c, n, m;  // elements from the pool's start
  bool is_fresh;
};

LaneSlot slot_of(const MlstmProblem& p, int64_t lane) {
  const int64_t seq = lane / p.heads, head = lane % p.heads, slot = p.pool.indices[seq];
  return {.c = slot * p.pool.c_stride + head * p.dqk * p.dv,
          .n = slot * p.pool.n_stride + head * p.dqk,
          .m = slot * p.pool.m_stride + head,
          .is_fresh = p.fresh != nullptr && p.fresh[seq]};
}

// Elements [at, at + size) of a lane's initial c.
void read_initial_c(float* to, const MlstmProblem& p, int64_t lane, int64_t at, int64_t size) {
  const bool pooled = p.pool.indices != nullptr;
  if (pooled ? slot_of(p, lane).is_fresh : p.c0 == nullptr) {
    std::fill_n(to, size, 0.0f);
  } else if (!pooled) {
    std::copy_n(p.c0 + lane * p.dqk * p.dv + at, size, to);
  } else {
    const char* const from =
        static_cast<const char*>(p.pool.c) + (slot_of(p, lane).c + at) * element_bytes(p.pool.c_dtype);
    vector_kernels().pack(to, from, p.pool.c_dtype, size, 1, size, 1);
  }
}

const float* initial_n(const MlstmProblem& p, int64_t lane) {  // nullptr: zeros
  if (p.pool.indices == nullptr) return p.n0 == nullptr ? nullptr : p.n0 + lane * p.dqk;
  const LaneSlot slot = slot_of(p, lane);
  return slot.is_fresh ? nullptr : p.pool.n + slot.n;
}

float initial_m(const MlstmProblem& p, int64_t lane) {
  if (p.pool.indices == nullptr) return p.m0 == nullptr ? p.first_m : p.m0[lane];
  if (p.pool.indices[lane / p.heads] < 0) return 0.0f;
  const LaneSlot slot = slot_of(p, lane);
  return slot.is_fresh ? 0.0f : p.pool.m[slot.m];
}

// Writes elements [at, at + size) of a lane's final c to c_last, or to the pool.
void write_final_c(float* c_last, const MlstmProblem& p, int64_t lane, int64_t at, int64_t size, const float* from) {
  if (p.pool.indices == nullptr) {
    if (c_last != nullptr) std::copy_n(from, size, c_last + lane * p.dqk * p.dv + at);
    return;
  }
  char* const to = static_cast<char*>(p.pool.c) + (slot_of(p, lane).c + at) * element_bytes(p.pool.c_dtype);
  vector_kernels().unpack(to, p.pool.c_dtype, size, from, nullptr, 1, size);
}

float* final_n(float* n_last, const MlstmProblem& p, int64_t lane) {  // nullptr: not wanted
  if (p.pool.indices != nullptr) return p.pool.n + slot_of(p, lane).n;
  return n_last == nullptr ? nullptr : n_last + lane * p.dqk;
}

// A batch of matrices in memory.
struct Matrices {
  float* data;
  int64_t batch_stride, rows, columns, row_stride, column_stride;
  Matrices transposed() const {
    return {.data = data,
            .batch_stride = batch_stride,
            .rows = columns,
            .columns = rows,
            .row_stride = column_stride,
            .column_stride = row_stride};
  }
};

Matrices dense(float* data, int64_t rows, int64_t columns) {
  return {.data = data,
          .batch_stride = rows * columns,
          .rows = rows,
          .columns = columns,
          .row_stride = columns,
          .column_stride = 1};
}

Tensor as_tensor(const Matrices& m, int64_t count) {
  const std::array<int64_t, 3> sizes{count, m.rows, m.columns};
  const std::array<int64_t, 3> strides{m.batch_stride, m.row_stride, m.column_stride};
  return torch::stable::from_blob(m.data, {sizes.data(), 3}, {strides.data(), 3},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

// out = a b for each of `count` matrices. The `out` overload, which autocast does not change.
void multiply(const Matrices& out, const Matrices& a, const Matrices& b, int64_t count) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(as_tensor(a, count)),
                                    torch::stable::detail::from(as_tensor(b, count)),
                                    torch::stable::detail::from(as_tensor(out, count))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the returned reference
}

// Scratch memory from torch's allocator, in pieces that start on cache lines.
class Scratch {
 public:
  template <typename T>
  void reserve(T** piece, int64_t count) {
    pieces_.push_back({[piece](char* at) { *piece = reinterpret_cast<T*>(at); }, used_});
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }
  void allocate() {
    const std::array<int64_t, 1> size{used_};
    memory_ = torch::stable::empty({size.data(), 1}, ScalarType::Byte);
    for (const auto& [place, offset] : pieces_) place(static_cast<char*>(memory_.data_ptr()) + offset);
  }

 private:
  struct Piece {
    std::function<void(char*)> place;
    int64_t offset;
  };
  std::vector<Piece> pieces_;
  int64_t used_ = 0;
  Tensor memory_;
};

float load_gate(const Strided& gate, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(gate.data)[index];
  float value;
  vector_kernels().pack(&value, static_cast<const uint16_t*>(gate.data) + index, dtype, 1, 1, 1, 1);
  return value;
}

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double log_sigmoid(double x) { return x >= 0.0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x)); }

double cap_gate(double x, double cap) { return cap == 0.0 || std::isinf(x) ? x : cap * std::tanh(x / cap); }
// 1 - tanh^2 without the difference, which would be all rounding error where tanh is near 1. 0 for an infinite x.
double cap_gate_slope(double x, double cap) {
  if (cap == 0.0) return 1.0;
  const double e = std::exp(-2.0 * std::abs(x / cap));
  return 4.0 * e / ((1.0 + e) * (1.0 + e));
}

struct Item {
  int64_t lane, seq, head, row, first, tokens;
  bool lane_begin, lane_end;
};

// Items of consecutive chunks of one lane within a segment.
struct Run {
  int64_t begin, count;  // relative to the segment
};

// The chunks of a problem and their gates.
struct Plan {
  MlstmProblem p;
  int64_t length;
  std::vector<std::pair<int64_t, int64_t>> bounds;  // of each sequence: its first token within its row, and the end
  std::vector<Item> items;
  std::vector<int64_t> lane_begin;  // first item of each lane, and the end
  std::vector<float> row_high, row_low, column_high, column_low, m;  // [items][length], as in ChunkGates
  std::vector<float> m_start;  // [items]
  std::vector<double> keep;    // [items]: the weight of the state at the start in the state at the end
  std::vector<float> m_last, log_decay;  // [lanes]
  std::vector<char> reset;           // [items][length]: m took the input gate's branch

  explicit Plan(const MlstmProblem& problem) : p(problem) {
    if (!p.normalize) p.eps = 0.0f;  // d = max(|s|, exp(-m)) + eps is then 1, with s and m of 0
    const auto bounds_of = [&](int64_t s) {
      return p.cu_seqlens == nullptr ? std::pair<int64_t, int64_t>{0, p.seq}
                                     : std::pair<int64_t, int64_t>{p.cu_seqlens[s], p.cu_seqlens[s + 1]};
    };
    int64_t longest = 1;
    for (int64_t s = 0; s < p.num_seqs; ++s) {
      bounds.push_back(bounds_of(s));
      longest = std::max(longest, bounds[s].second - bounds[s].first);
    }
    length = std::min({p.chunk_size > 0 ? p.chunk_size : default_chunk, max_chunk, longest});
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
                           .lane_end = first + length >= stop});
        }
      }
    }
    lane_begin.push_back(static_cast<int64_t>(items.size()));
    scan_gates();
  }

  // Whether the sequence has no slot of the pool: it has no items then.
  bool leaves_out(int64_t seq) const { return p.pool.indices != nullptr && p.pool.indices[seq] < 0; }

  int64_t lanes() const { return p.num_seqs * p.heads; }
  bool stabilized() const { return p.input_gate == InputGate::exponential; }
  int64_t gate_index(const Strided& gate, const Item& item, int64_t t) const {
    return item.row * gate.batch + (item.first + t) * gate.seq + item.head * gate.head;
  }
  // The pre-activation of a gate, as given.
  float raw_gate(const Strided& gate, const Item& item, int64_t t) const {
    return load_gate(gate, p.gate_dtype, gate_index(gate, item, t));
  }
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
  std::vector<Run> runs(int64_t begin, int64_t end) const {
    std::vector<Run> result;
    for (int64_t x = begin; x < end; ++x) {
      if (x == begin || items[x].lane_begin) result.push_back({.begin = x - begin, .count = 0});
      ++result.back().count;
    }
    return result;
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

 private:
  void scan_gates() {
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
    parallel(lanes(), [&](int64_t lane) {
      double stabilizer = initial_m(p, lane), decay = 0.0;
      for (int64_t x = lane_begin[lane]; x < lane_begin[lane + 1]; ++x) {
        const Item& item = items[x];
        m_start[x] = static_cast<float>(stabilizer);
        double b = 0.0;
        for (int64_t t = 0; t < length; ++t) {
          const int64_t at = x * length + t;
          double input = -std::numeric_limits<double>::infinity(), forget = 0.0;
          if (t < item.tokens) {
            input = cap_gate(raw_gate(p.i, item, t), p.gate_soft_cap);
            if (!stabilized()) input = log_sigmoid(input);
            forget = log_sigmoid(cap_gate(raw_gate(p.f, item, t), p.gate_soft_cap));
          }
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
};

// Scratch that both directions need for the states at the chunks' starts. n is float64.
struct StateScratch {
  float *k, *weighted_k, *update, *carry_c[2];
  double *n_update, *n_start, *carry_n[2];
  std::vector<char> finite;

  void reserve(Scratch& scratch, const MlstmProblem& p, int64_t length, int64_t items) {
    scratch.reserve(&k, items * length * p.dqk);
    scratch.reserve(&weighted_k, items * length * p.dqk);
    scratch.reserve(&update, items * p.dqk * p.dv);
    scratch.reserve(&n_update, items * p.dqk);
    scratch.reserve(&n_start, items * p.dqk);
    for (int x = 0; x < 2; ++x) {
      scratch.reserve(&carry_c[x], p.dqk * p.dv);
      scratch.reserve(&carry_n[x], p.dqk);
    }
    finite.resize(items);
  }
};

// to (dqk x dv) = weighted^T z, without the terms whose weight is 0: z may hold what is not finite.
void guarded_update(float* to, const float* weighted, const float* z, int64_t length, int64_t dqk, int64_t dv) {
  std::memset(to, 0, sizeof(float) * dqk * dv);
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t r = 0; r < dqk; ++r) {
      const float weight = weighted[t * dqk + r];
      if (weight == 0.0f) continue;
      for (int64_t c = 0; c < dv; ++c) to[r * dv + c] += weight * z[t * dv + c];
    }
  }
}

// Writes the states at the starts of the segment's items to `slots` (c, slot_stride apart), from the items' k and v.
// The lane that the segment's start cuts begins with the carried state carry_in. The lane that its end cuts leaves its
// state in the other one.
void segment_states(const Plan& plan, StateScratch& s, int64_t begin, int64_t end, const Matrices& v, float* slots,
                    int64_t slot_stride, int carry_in, float* c_last, float* n_last) {
  const MlstmProblem& p = plan.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t count = end - begin, length = plan.length, state = p.dqk * p.dv;
  parallel(count, [&](int64_t x) {
    const Item& item = plan.items[begin + x];
    float* k = s.k + x * length * p.dqk;
    const bool k_finite =
        kernels.pack(k, plan.rows(p.k, item), p.dtype, p.k.seq, item.tokens, p.dqk, length);
    float* rows = v.data + x * v.batch_stride;
    const bool v_finite =
        kernels.pack(rows, plan.rows(p.v, item), p.dtype, p.v.seq, item.tokens, p.dv, length);
    s.finite[x] = k_finite && v_finite;
    const ChunkGates gates = plan.gates(begin + x);
    std::vector<float> weight(length);
    kernels.end_weights(weight.data(), gates);
    kernels.weight_rows(s.weighted_k + x * length * p.dqk, p.dqk, k, weight.data(), length, p.dqk);
    std::vector<double> weights(2 * length);
    double* n = s.n_update + x * p.dqk;
    std::fill_n(n, p.dqk, 0.0);
    if (p.normalize) kernels.normalizer(n, nullptr, nullptr, k, gates, p.scale, p.dqk, weights.data());
  });
  multiply(dense(s.update, p.dqk, p.dv), dense(s.weighted_k, length, p.dqk).transposed(), v, count);
  for (int64_t x = 0; x < count; ++x) {
    if (s.finite[x]) continue;
    guarded_update(s.update + x * state, s.weighted_k + x * length * p.dqk, v.data + x * v.batch_stride, length, p.dqk,
                   p.dv);
  }

  const std::vector<Run> runs = plan.runs(begin, end);
  const int carry_out = carry_in ^ 1;
  const int64_t blocks = ceil_div(state, state_block);
  parallel(static_cast<int64_t>(runs.size()) * blocks, [&](int64_t task) {
    const Run& run = runs[task / blocks];
    const int64_t at = task % blocks * state_block, size = std::min(state_block, state - at);
    const Item &first = plan.items[begin + run.begin], &last = plan.items[begin + run.begin + run.count - 1];
    std::array<float, state_block> c;
    if (!first.lane_begin) {
      std::copy_n(s.carry_c[carry_in] + at, size, c.data());
    } else {
      read_initial_c(c.data(), p, first.lane, at, size);
    }
    kernels.scan(c.data(), slots + run.begin * slot_stride + at, slot_stride, s.update + run.begin * state + at, state,
                 &plan.keep[begin + run.begin], run.count, size);
    if (!last.lane_end) {
      std::copy_n(c.data(), size, s.carry_c[carry_out] + at);
    } else {
      write_final_c(c_last, p, first.lane, at, size, c.data());
    }
  });
  for (const Run& run : runs) {
    const Item &first = plan.items[begin + run.begin], &last = plan.items[begin + run.begin + run.count - 1];
    std::vector<double> n(p.dqk, 0.0);
    if (!first.lane_begin) {
      std::copy_n(s.carry_n[carry_in], p.dqk, n.data());
    } else if (const float* from = initial_n(p, first.lane)) {
      std::copy_n(from, p.dqk, n.data());
    }
    for (int64_t x = run.begin; x < run.begin + run.count; ++x) {
      std::copy_n(n.data(), p.dqk, s.n_start + x * p.dqk);
      const double keep = plan.keep[begin + x];
      for (int64_t r = 0; r < p.dqk; ++r) n[r] = keep * n[r] + s.n_update[x * p.dqk + r];
    }
    if (!last.lane_end) {
      std::copy_n(n.data(), p.dqk, s.carry_n[carry_out]);
    } else if (float* to = final_n(n_last, p, first.lane)) {
      for (int64_t r = 0; r < p.dqk; ++r) to[r] = static_cast<float>(n[r]);
    }
  }
}

// An empty sequence passes its state, and the state's gradient, through. from == nullptr: zeros. to == nullptr: not
// wanted.
void pass_on(float* to, const float* from, int64_t lane, int64_t size) {
  if (to == nullptr) return;
  if (from == nullptr) {
    std::fill_n(to + lane * size, size, 0.0f);
  } else {
    std::copy_n(from + lane * size, size, to + lane * size);
  }
}

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
    write_final_c(nullptr, p, lane, 0, p.dqk * p.dv, zeros.data());
    std::fill_n(p.pool.n + slot.n, p.dqk, 0.0f);
  }
}

int64_t items_per_segment(int64_t floats_per_item, int64_t items) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fit = threads * segment_bytes / static_cast<int64_t>(sizeof(float)) / floats_per_item;
  return std::clamp(fit, std::min<int64_t>(items, 2 * threads), std::max<int64_t>(items, 1));
}

}  // namespace

void mlstm_forward(const MlstmForward& params) {
  const Plan plan(params.p);
  const MlstmProblem& p = plan.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t length = plan.length, count = static_cast<int64_t>(plan.items.size());
  const int64_t inner = length + p.dqk;  // h = [W | weighted q] [v; c]
  const int64_t per_segment =
      items_per_segment(3 * length * p.dqk + 2 * length * inner + 2 * inner * p.dv + 4 * p.dqk, count);

  StateScratch states;
  Scratch scratch;
  float *q, *qk, *left, *right, *h, *s, *inv_d;
  states.reserve(scratch, p, length, per_segment);
  scratch.reserve(&q, per_segment * length * p.dqk);
  scratch.reserve(&qk, per_segment * length * length);
  scratch.reserve(&left, per_segment * length * inner);
  scratch.reserve(&right, per_segment * inner * p.dv);
  scratch.reserve(&h, per_segment * length * p.dv);
  scratch.reserve(&s, per_segment * length);
  scratch.reserve(&inv_d, per_segment * length);
  scratch.allocate();

  int carry_in = 0;
  for (int64_t begin = 0; begin < count; begin += per_segment, carry_in ^= 1) {
    const int64_t end = std::min(begin + per_segment, count), items = end - begin;
    Matrices v = dense(right, length, p.dv);
    v.batch_stride = inner * p.dv;
    segment_states(plan, states, begin, end, v, right + length * p.dv, inner * p.dv, carry_in, params.c_last,
                   params.n_last);
    if (params.h == nullptr) continue;
    parallel(items, [&](int64_t x) {
      const Item& item = plan.items[begin + x];
      kernels.pack(q + x * length * p.dqk, plan.rows(p.q, item), p.dtype, p.q.seq, item.tokens, p.dqk, length);
    });
    multiply(dense(qk, length, length), dense(q, length, p.dqk), dense(states.k, length, p.dqk).transposed(), items);
    parallel(items, [&](int64_t x) {
      const ChunkGates gates = plan.gates(begin + x);
      std::vector<float> weight(length);
      kernels.start_weights(weight.data(), gates);
      for (float& w : weight) w *= p.scale;
      float* a = left + x * length * inner;
      const float* rows = q + x * length * p.dqk;
      kernels.weight_rows(a + length, inner, rows, weight.data(), length, p.dqk);
      kernels.forward_tile(a, inner, qk + x * length * length, gates, p.scale);
      std::vector<double> weights(2 * length);
      if (p.normalize) {
        kernels.normalizer(states.n_start + x * p.dqk, s + x * length, rows, states.k + x * length * p.dqk, gates,
                           p.scale, p.dqk, weights.data());
      } else {
        std::fill_n(s + x * length, length, 0.0f);
      }
      kernels.inverse_normalizer(inv_d + x * length, s + x * length, gates.m, p.eps, length);
    });
    multiply(dense(h, length, p.dv), dense(left, length, inner), dense(right, inner, p.dv), items);
    parallel(items, [&](int64_t x) {
      const Item& item = plan.items[begin + x];
      float* rows = h + x * length * p.dv;
      if (!states.finite[x]) {
        const float *a = left + x * length * inner, *z = right + x * inner * p.dv;
        kernels.guarded_product(rows, a, inner, z, false, length, p.dv);
        for (int64_t t = 0; t < length; ++t) {
          for (int64_t r = 0; r < p.dqk; ++r) {
            const float weight = a[t * inner + length + r];
            if (weight == 0.0f) continue;
            for (int64_t c = 0; c < p.dv; ++c) rows[t * p.dv + c] += weight * z[(length + r) * p.dv + c];
          }
        }
      }
      kernels.unpack(plan.output_rows(params.h, item, p.dv), p.dtype, p.heads * p.dv, rows, inv_d + x * length,
                     item.tokens, p.dv);
      for (int64_t t = 0; t < item.tokens; ++t) {
        const int64_t at = (item.row * p.seq + item.first + t) * p.heads + item.head;
        if (params.s != nullptr) params.s[at] = s[x * length + t];
        if (params.m != nullptr) params.m[at] = plan.m[(begin + x) * length + t];
      }
    });
  }
  if (p.pool.indices != nullptr) return finish_pool(plan, params.h);
  if (params.c_last == nullptr) return;
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    if (params.m_last != nullptr) params.m_last[lane] = plan.m_last[lane];
    if (params.log_decay != nullptr) params.log_decay[lane] = plan.log_decay[lane];
    if (plan.lane_begin[lane] < plan.lane_begin[lane + 1]) continue;
    pass_on(params.c_last, p.c0, lane, p.dqk * p.dv);
    pass_on(params.n_last, p.n0, lane, p.dqk);
  }
}

namespace {

// The terms of the gates' gradients, [items][length]. q_dq and k_dk are a token's shares of the pairs that cross the
// chunk's start and end. within and column are its shares of the pairs inside the chunk (backward_tile).
struct GateSums {
  std::vector<float> q_dq, k_dk, within, column, e;
  std::vector<double> through;  // [items] keep (<c, dc> + <n, dn>), c at the chunk's start, dc at its end

  explicit GateSums(const Plan& plan) : through(plan.items.size(), 0.0) {
    for (auto* v : {&q_dq, &k_dk, &within, &column, &e}) v->resize(plan.items.size() * plan.length);
  }
};

void store_gate(void* gate, DType dtype, int64_t index, double value) {
  const float x = static_cast<float>(value);
  if (dtype == DType::float32) {
    static_cast<float*>(gate)[index] = x;
  } else {
    vector_kernels().unpack(static_cast<uint16_t*>(gate) + index, dtype, 1, &x, nullptr, 1, 1);
  }
}

// Of every lane the sum of e before the first reset, and whether there is none.
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
  parallel(plan.lanes(), [&](int64_t lane) {
    const int64_t begin = plan.lane_begin[lane], end = plan.lane_begin[lane + 1];
    double a = params.dm_last == nullptr ? 0.0 : params.dm_last[lane];
    const double into_decay = params.dlog_decay == nullptr ? 0.0 : params.dlog_decay[lane];
    for (int64_t x = end - 1; x >= begin; --x) {
      const Item& item = plan.items[x];
      const int64_t at = x * length;
      double crossing_k = 0.0;
      for (int64_t t = 0; t < length; ++t) crossing_k += sums.k_dk[at + t];
      if (stabilized && x == end - 1) a -= sums.through[x] + crossing_k;  // <c, dc> + <n, dn> of the final state
      double later = sums.through[x], earlier = crossing_k;
      for (int64_t t = length - 1; t >= 0; --t) {
        later += sums.q_dq[at + t];
        earlier -= sums.k_dk[at + t];
        if (stabilized) a += sums.e[at + t];
        double di = static_cast<double>(sums.k_dk[at + t]) + sums.column[at + t];
        double dlf = later + earlier + sums.within[at + t] + into_decay;
        if (plan.reset[at + t]) {
          di += a;
          a = 0.0;
        } else {
          dlf += a;
        }
        if (t >= item.tokens) continue;
        const int64_t out = (item.row * p.seq + item.first + t) * p.heads + item.head;
        const double i = plan.raw_gate(p.i, item, t), f = plan.raw_gate(p.f, item, t), cap = p.gate_soft_cap;
        double i_slope = cap_gate_slope(i, cap);
        if (!stabilized) i_slope *= sigmoid(-cap_gate(i, cap));
        const double f_slope = cap_gate_slope(f, cap) * sigmoid(-cap_gate(f, cap));
        store_gate(params.di, p.gate_dtype, out, i_slope == 0.0 ? 0.0 : di * i_slope);
        store_gate(params.df, p.gate_dtype, out, f_slope == 0.0 ? 0.0 : dlf * f_slope);
      }
      if (x == begin) {  // <c, dc> + <n, dn> of the initial state
        a += sums.through[x];
        for (int64_t t = 0; t < length; ++t) a += sums.q_dq[at + t];
      }
    }
    if (params.dm0 != nullptr) params.dm0[lane] = static_cast<float>(a);
  });
}

}  // namespace

void mlstm_backward(const MlstmBackward& params) {
  const Plan plan(params.p);
  const MlstmProblem& p = plan.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t length = plan.length, count = static_cast<int64_t>(plan.items.size()), state = p.dqk * p.dv;
  const int64_t tile = length * length;
  const int64_t per_segment = items_per_segment(7 * length * p.dqk + 4 * length * p.dv + 4 * tile + 3 * state, count);
  const int64_t segments = count == 0 ? 0 : ceil_div(count, per_segment);

  StateScratch states;
  Scratch scratch;
  float *q, *v, *dh, *c, *dc, *qk, *gv, *x_tile, *w_tile;
  float *c_dh, *x_k, *x_q, *dc_v, *w_dh, *dc_k, *dn_end, *dn_update, *n_start;
  float *carry_dc[2], *carry_dn[2];
  states.reserve(scratch, p, length, per_segment);
  for (float** rows : {&q, &c_dh, &x_k, &x_q, &dc_v}) scratch.reserve(rows, per_segment * length * p.dqk);
  for (float** rows : {&v, &dh, &w_dh, &dc_k}) scratch.reserve(rows, per_segment * length * p.dv);
  for (float** tiles : {&qk, &gv, &x_tile, &w_tile}) scratch.reserve(tiles, per_segment * tile);
  for (float** matrices : {&c, &dc}) scratch.reserve(matrices, per_segment * state);
  for (float** vectors : {&dn_end, &dn_update, &n_start}) scratch.reserve(vectors, per_segment * p.dqk);
  for (int x = 0; x < 2; ++x) {
    scratch.reserve(&carry_dc[x], state);
    scratch.reserve(&carry_dn[x], p.dqk);
  }
  // For each token of the segment: weights of the state's terms, 1 / d, delta, s.
  float *end_weight, *start_weight, *start_over_d, *start_delta, *inv_d, *delta, *s;
  for (float** tokens : {&end_weight, &start_weight, &start_over_d, &start_delta, &inv_d, &delta, &s}) {
    scratch.reserve(tokens, per_segment * length);
  }
  scratch.allocate();
  const Matrices v_rows = dense(v, length, p.dv), dh_rows = dense(dh, length, p.dv), c_slots = dense(c, p.dqk, p.dv),
                 dc_slots = dense(dc, p.dqk, p.dv), k_rows = dense(states.k, length, p.dqk),
                 q_rows = dense(q, length, p.dqk);

  // States at the segments' starts.
  std::vector<float> saved_c(std::max<int64_t>(segments - 1, 0) * state);
  std::vector<double> saved_n(std::max<int64_t>(segments - 1, 0) * p.dqk);
  for (int64_t segment = 0; segment + 1 < segments; ++segment) {
    const int carry_in = segment % 2;
    const int64_t begin = segment * per_segment;
    segment_states(plan, states, begin, begin + per_segment, v_rows, c, state, carry_in, nullptr, nullptr);
    std::copy_n(states.carry_c[carry_in ^ 1], state, &saved_c[segment * state]);
    std::copy_n(states.carry_n[carry_in ^ 1], p.dqk, &saved_n[segment * p.dqk]);
  }

  GateSums sums(plan);
  std::vector<char> finite(per_segment);
  int carry_in = 0;
  for (int64_t segment = segments - 1; segment >= 0; --segment, carry_in ^= 1) {
    const int64_t begin = segment * per_segment, end = std::min(begin + per_segment, count), items = end - begin;
    if (segment > 0) {
      std::copy_n(&saved_c[(segment - 1) * state], state, states.carry_c[0]);
      std::copy_n(&saved_n[(segment - 1) * p.dqk], p.dqk, states.carry_n[0]);
    }
    segment_states(plan, states, begin, end, v_rows, c, state, 0, nullptr, nullptr);
    parallel(items, [&](int64_t x) {
      const Item& item = plan.items[begin + x];
      const bool q_finite =
          kernels.pack(q + x * length * p.dqk, plan.rows(p.q, item), p.dtype, p.q.seq, item.tokens, p.dqk, length);
      const bool dh_finite = kernels.pack(dh + x * length * p.dv, plan.rows(params.dh, item), p.dtype, params.dh.seq,
                                          params.dh.data == nullptr ? 0 : item.tokens, p.dv, length);
      finite[x] = states.finite[x] && q_finite && dh_finite;
    });
    multiply(dense(qk, length, length), q_rows, k_rows.transposed(), items);
    multiply(dense(gv, length, length), dh_rows, v_rows.transposed(), items);
    multiply(dense(c_dh, length, p.dqk), dh_rows, c_slots.transposed(), items);

    parallel(items, [&](int64_t x) {
      const Item& item = plan.items[begin + x];
      const ChunkGates gates = plan.gates(begin + x);
      const int64_t at = x * length, global = (begin + x) * length;
      for (int64_t t = 0; t < length; ++t) {
        const int64_t token = (item.row * p.seq + item.first + t) * p.heads + item.head;
        const bool inside = t < item.tokens;
        s[at + t] = inside && params.s != nullptr ? params.s[token] : 0.0f;
      }
      kernels.inverse_normalizer(inv_d + at, s + at, gates.m, p.eps, length);
      std::fill_n(inv_d + at + item.tokens, length - item.tokens, 0.0f);
      kernels.end_weights(end_weight + at, gates);
      kernels.start_weights(start_weight + at, gates);
      float* n = n_start + x * p.dqk;
      for (int64_t r = 0; r < p.dqk; ++r) n[r] = static_cast<float>(states.n_start[x * p.dqk + r]);
      std::vector<float> across(length), across_n(length);
      const float* q_item = q + at * p.dqk;
      kernels.row_dots(across.data(), q_item, c_dh + at * p.dqk, p.dqk, length, p.dqk);
      kernels.row_dots(across_n.data(), q_item, n, 0, length, p.dqk);
      for (int64_t t = 0; t < length; ++t) {
        start_weight[at + t] *= p.scale;
        const float weight = start_over_d[at + t] = start_weight[at + t] * inv_d[at + t];
        across[t] = weight == 0.0f ? 0.0f : weight * across[t];
        across_n[t] = weight == 0.0f ? 0.0f : weight * across_n[t];
      }
      kernels.backward_tile(x_tile + x * tile, w_tile + x * tile, qk + x * tile, gv + x * tile, gates, p.scale, p.eps,
                            inv_d + at, s + at, across.data(), across_n.data(), delta + at, &sums.e[global],
                            &sums.within[global], &sums.column[global]);
      for (int64_t t = 0; t < length; ++t) start_delta[at + t] = start_weight[at + t] * delta[at + t];
      kernels.weighted_sum(dn_update + x * p.dqk, q_item, start_delta + at, length, p.dqk);
      kernels.weight_rows(states.weighted_k + at * p.dqk, p.dqk, q_item, start_over_d + at, length, p.dqk);
    });

    // The states' gradients at the chunks' ends, from the last to the first.
    multiply(dense(states.update, p.dqk, p.dv), dense(states.weighted_k, length, p.dqk).transposed(), dh_rows, items);
    const std::vector<Run> runs = plan.runs(begin, end);
    const int64_t blocks = ceil_div(state, state_block);
    std::vector<double> through(items * blocks, 0.0);  // [block][item]
    const int carry_out = carry_in ^ 1;
    parallel(static_cast<int64_t>(runs.size()) * blocks, [&](int64_t task) {
      const Run& run = runs[task / blocks];
      const int64_t block = task % blocks, start = block * state_block, size = std::min(state_block, state - start);
      const Item &first = plan.items[begin + run.begin], &last = plan.items[begin + run.begin + run.count - 1];
      std::array<float, state_block> piece;
      if (!last.lane_end) {
        std::copy_n(carry_dc[carry_in] + start, size, piece.data());
      } else if (params.dc_last != nullptr) {
        std::copy_n(params.dc_last + last.lane * state + start, size, piece.data());
      } else {
        std::fill_n(piece.data(), size, 0.0f);
      }
      const int64_t offset = run.begin * state + start;
      kernels.scan_back(piece.data(), dc + offset, state, states.update + offset, state, &plan.keep[begin + run.begin],
                        c + offset, state, &through[block * items + run.begin], run.count, size);
      if (!first.lane_begin) {
        std::copy_n(piece.data(), size, carry_dc[carry_out] + start);
      } else if (params.dc0 != nullptr) {
        std::copy_n(piece.data(), size, params.dc0 + first.lane * state + start);
      }
    });
    for (const Run& run : runs) {
      const Item &first = plan.items[begin + run.begin], &last = plan.items[begin + run.begin + run.count - 1];
      std::vector<float> n(p.dqk, 0.0f);
      if (!last.lane_end) {
        std::copy_n(carry_dn[carry_in], p.dqk, n.data());
      } else if (params.dn_last != nullptr) {
        std::copy_n(params.dn_last + last.lane * p.dqk, p.dqk, n.data());
      }
      const int64_t offset = run.begin * p.dqk;
      kernels.scan_back(n.data(), dn_end + offset, p.dqk, dn_update + offset, p.dqk, &plan.keep[begin + run.begin],
                        n_start + offset, p.dqk, &sums.through[begin + run.begin], run.count, p.dqk);
      if (!first.lane_begin) {
        std::copy_n(n.data(), p.dqk, carry_dn[carry_out]);
      } else if (params.dn0 != nullptr) {
        std::copy_n(n.data(), p.dqk, params.dn0 + first.lane * p.dqk);
      }
    }
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t x = 0; x < items; ++x) sums.through[begin + x] += through[block * items + x];
    }

    if (params.dk == nullptr) continue;
    multiply(dense(x_k, length, p.dqk), dense(x_tile, length, length), k_rows, items);
    multiply(dense(x_q, length, p.dqk), dense(x_tile, length, length).transposed(), q_rows, items);
    multiply(dense(dc_v, length, p.dqk), v_rows, dc_slots.transposed(), items);
    multiply(dense(w_dh, length, p.dv), dense(w_tile, length, length).transposed(), dh_rows, items);
    multiply(dense(dc_k, length, p.dv), k_rows, dc_slots, items);
    parallel(items, [&](int64_t x) {
      const Item& item = plan.items[begin + x];
      const int64_t at = x * length, global = (begin + x) * length;
      const std::vector<float> none(std::max({length, p.dqk, p.dv}), 0.0f);
      std::vector<float> unused(length);
      float *dq_rows = x_k + at * p.dqk, *dk_rows = x_q + at * p.dqk, *dv_rows = w_dh + at * p.dv;
      const float *q_item = q + at * p.dqk, *k_item = states.k + at * p.dqk, *dh_item = dh + at * p.dv;
      if (!finite[x]) {
        kernels.guarded_product(dq_rows, x_tile + x * tile, length, k_item, false, length, p.dqk);
        kernels.guarded_product(dk_rows, x_tile + x * tile, length, q_item, true, length, p.dqk);
        kernels.guarded_product(dv_rows, w_tile + x * tile, length, dh_item, true, length, p.dv);
      }
      kernels.add_state_term(dq_rows, c_dh + at * p.dqk, start_over_d + at, start_delta + at,
                             n_start + x * p.dqk, q_item, &sums.q_dq[global], length, p.dqk);
      kernels.add_state_term(dk_rows, dc_v + at * p.dqk, end_weight + at, end_weight + at, dn_end + x * p.dqk, k_item,
                             &sums.k_dk[global], length, p.dqk);
      kernels.add_state_term(dv_rows, dc_k + at * p.dv, end_weight + at, none.data(), none.data(), dv_rows,
                             unused.data(), length, p.dv);
      if (params.dq != nullptr) {
        kernels.unpack(plan.output_rows(params.dq, item, p.dqk), p.dtype, p.heads * p.dqk, dq_rows, nullptr,
                       item.tokens, p.dqk);
      }
      kernels.unpack(plan.output_rows(params.dk, item, p.dqk), p.dtype, p.heads * p.dqk, dk_rows, nullptr, item.tokens,
                     p.dqk);
      kernels.unpack(plan.output_rows(params.dv, item, p.dv), p.dtype, p.heads * p.dv, dv_rows, nullptr, item.tokens,
                     p.dv);
    });
  }
  if (params.dk == nullptr) {
    sum_open(plan, sums, params);
  } else {
    gate_gradients(plan, sums, params);
  }
  if (params.dc0 == nullptr) return;
  for (int64_t lane = 0; lane < plan.lanes(); ++lane) {
    if (plan.lane_begin[lane] < plan.lane_begin[lane + 1]) continue;
    pass_on(params.dc0, params.dc_last, lane, state);
    pass_on(params.dn0, params.dn_last, lane, p.dqk);
  }
}

}  // namespace flash_xlstm::cpu
