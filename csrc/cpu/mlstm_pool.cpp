#include "cpu/mlstm_pool.h"

#include "cpu/vector_kernels.h"

namespace flash_xlstm::cpu {

LaneSlot slot_of(const MlstmProblem& p, int64_t lane) {
  const int64_t seq = lane / p.heads, head = lane % p.heads, slot = p.pool.indices[seq];
  return {.c = slot * p.pool.c_stride + head * p.dqk * p.dv,
          .n = slot * p.pool.n_stride + head * p.dqk,
          .m = slot * p.pool.m_stride + head,
          .is_fresh = p.fresh != nullptr && p.fresh[seq]};
}

bool begins_with_zeros(const MlstmProblem& p, int64_t lane) {
  return is_pooled(p) ? slot_of(p, lane).is_fresh : p.c0 == nullptr;
}

void read_pool(float* to, const MlstmProblem& p, int64_t lane) {
  const char* const from = static_cast<const char*>(p.pool.c) + slot_of(p, lane).c * element_bytes(p.pool.c_dtype);
  const int64_t size = p.dqk * p.dv;
  vector_kernels().pack(to, from, p.pool.c_dtype, size, 1, size, 1);
}

void write_pool(const MlstmProblem& p, int64_t lane, const float* from) {
  char* const to = static_cast<char*>(p.pool.c) + slot_of(p, lane).c * element_bytes(p.pool.c_dtype);
  const int64_t size = p.dqk * p.dv;
  vector_kernels().unpack(to, p.pool.c_dtype, size, from, nullptr, 1, size);
}

const float* initial_n(const MlstmProblem& p, int64_t lane) {
  if (p.pool.indices == nullptr) return p.n0 == nullptr ? nullptr : p.n0 + lane * p.dqk;
  const LaneSlot slot = slot_of(p, lane);
  return slot.is_fresh ? nullptr : p.pool.n + slot.n;
}

float* final_n(float* n_last, const MlstmProblem& p, int64_t lane) {
  if (p.pool.indices != nullptr) return p.pool.n + slot_of(p, lane).n;
  return n_last == nullptr ? nullptr : n_last + lane * p.dqk;
}

float initial_m(const MlstmProblem& p, int64_t lane) {
  if (p.pool.indices == nullptr) return p.m0 == nullptr ? p.first_m : p.m0[lane];
  if (p.pool.indices[lane / p.heads] < 0) return 0.0f;
  const LaneSlot slot = slot_of(p, lane);
  return slot.is_fresh ? 0.0f : p.pool.m[slot.m];
}

}  // namespace flash_xlstm::cpu
