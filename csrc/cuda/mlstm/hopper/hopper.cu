// The Hopper mLSTM, kernel by kernel.
//   Forward: gate scan; states at every chunk's start; h.
//     Without h: the gate scan and the final state, which keeps no other.
//   Backward: gate scan and states again; dq with u, delta and e; the states' gradients in place of the states; dk and
//     dv; the gates' gradients. Without dh: no dq, and zeros in the place of what its kernel leaves to the others.
//     In two parts: the first ends with dq and the gradient of the initial state alone, the second goes on from there.
// The backward makes the states again, or finds those that the forward has kept: two thirds of the memory of q, k, v and
// h together (at dqk 256, dv 512).
#include "cuda/common/device.h"
#include "cuda/common/status.h"
#include "cuda/common/tensor_map.h"
#include "cuda/mlstm/hopper/hopper.h"
#include "cuda/mlstm/hopper/work.h"

namespace flash_xlstm::cuda::hopper {
namespace {

// What a pass is for: h, the final state alone, or gradients.
enum class Pass { h, state, gradients };

// m: scratch for the forward's m_t, which the outputs read, where the caller wants none. nullptr: not needed.
// kept: the states' memory between a forward and a backward; nullptr: they are scratch.
int64_t carve(const MlstmProblem& p, Pass pass, void* workspace, Work& w, const float* kept, float** m = nullptr) {
  const bool backward = pass == Pass::gradients, keeps = pass != Pass::state;
  Carver carver(workspace);
  w = Work{};
  describe(p, w);
  const Layout& l = w.layout;
  w.dqk_pitch = ceil_div(p.dqk, 8) * 8;
  w.blocks_k = static_cast<int>(ceil_div(p.dqk, box));
  w.blocks_v = static_cast<int>(ceil_div(p.dv, box));
  w.dq_tiles = static_cast<int>(ceil_div(p.dqk, column_tile(p.dqk)));
  w.dk_tiles = w.dq_tiles;

  const int64_t items = l.max_chunks * p.heads, tokens = items * chunk_tokens;
  carver.take(w.alpha, tokens);
  carver.take(w.beta, tokens);
  carver.take(w.alpha_last, items);
  carver.take(w.m_start, items);
  if (m != nullptr) carver.take(*m, p.batch * p.seq * p.heads);
  const int64_t c_items = items * w.blocks_k * w.blocks_v * box * box, n_items = items * p.dqk;
  const bool scaled = p.dtype == DType::float16;
  if (kept != nullptr) {
    const KeptStates states = kept_states(w, const_cast<float*>(kept));  // the backward only reads them
    w.c = states.c, w.n = states.n, w.state_log = states.log;
  } else if (keeps) {
    carver.take(w.c, c_items);
    carver.take(w.n, n_items);
    if (scaled) carver.take(w.state_log, items);
  }
  if (pass == Pass::h) carver.take(w.n_parts, items * 3 * w.dqk_pitch);
  if (backward) {
    w.dc = w.c, w.dn = w.n;
    if (kept != nullptr) {
      carver.take(w.dc, c_items);
      carver.take(w.dn, n_items);
    }
    if (scaled) carver.take(w.grad_log, items);
  }
  const Segments segments = choose_segments(p, processor_count());
  w.segments = segments.count;
  w.num_flags = static_cast<int>(segments.flags) * (backward ? 3 : 1);
  carver.take(w.segment_ends, segments.floats);
  carver.take(w.segment_flags, w.num_flags);
  if (pass == Pass::h && has_small_tiles(p)) {
    w.num_state_flags = items + 1;
    carver.take(w.state_flags, w.num_state_flags);
  }
  if (backward) {
    carver.take(w.tile_totals, w.tiles.count * p.heads);
    w.num_tile_flags = (w.tiles.count + 1) * p.heads;
    carver.take(w.tile_flags, w.num_tile_flags);
  }
  carve_table(carver, w);
  if (backward) {
    carver.take(w.reset, tokens);
    carver.take(w.inv_d, tokens);
    carver.take(w.delta, tokens);
    carver.take(w.e, tokens);
    carver.take(w.q_dq, tokens * (w.dq_tiles + 1));
    carver.take(w.k_dk, tokens * (w.dk_tiles + 2));
    carver.take(w.through, items * state_tiles(p));
  }
  return carver.used();
}

int64_t carve_forward(const MlstmForward& params, void* workspace, Work& w, float*& m) {
  m = params.m;
  if (params.h == nullptr) return carve(params.p, Pass::state, workspace, w, nullptr);
  const bool given = params.m != nullptr || params.p.input_gate == InputGate::sigmoid;
  return carve(params.p, Pass::h, workspace, w, params.kept_states, given ? nullptr : &m);
}

uint64_t items_of(const Work& w) { return static_cast<uint64_t>(w.layout.max_chunks * w.p.heads); }

// Of an array with `rows` rows of `row` 16-bit numbers for each item.
cudaError_t encode_item(CUtensorMap& map, const Work& w, const void* data, uint64_t row, uint64_t rows,
                        uint32_t box_row) {
  return encode<3>(map, data, {row, rows, items_of(w)}, {row * 2, row * rows * 2},
                   {box_row, static_cast<uint32_t>(rows), 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// The maps of w.c and w.n.
cudaError_t make_state_maps(const Work& w, Maps& maps) {
  const uint64_t block_rows = static_cast<uint64_t>(w.blocks_k) * w.blocks_v * box;
  RETURN_IF_FAILED(encode<3>(maps.c, w.c, {box, block_rows, items_of(w)}, {box * 2, block_rows * box * 2},
                             {box, box, 1}, CU_TENSOR_MAP_SWIZZLE_NONE));
  if (!has_small_tiles(w.p) || w.dn == nullptr) return cudaSuccess;
  return encode_item(maps.n, w, w.n, static_cast<uint64_t>(w.p.dqk) * 2, 1, 2 * box);
}

// Called after the first launch. Encoding needs the device's context to be current in this thread, and a launch makes
// it so: an autograd thread may not have used the device before. That first kernel, which needs no maps, runs
// meanwhile.
cudaError_t make_maps(const Work& w, const Strided* dh, Maps& maps) {
  const MlstmProblem& p = w.p;
  RETURN_IF_FAILED(encode_rows(maps.k, p.k, p, p.dqk));
  RETURN_IF_FAILED(encode_rows(maps.v, p.v, p, p.dv));
  if (w.c == nullptr) return cudaSuccess;
  if (dh != nullptr && dh->data == w.inv_d) {  // zeros: the TMA reads 0 past eight elements of them
    RETURN_IF_FAILED(encode<4>(maps.q, dh->data, {8, 1, 1, 1}, {16, 16, 16}, {box, 1, box, 1}));
    maps.dh = maps.q;
  } else {
    RETURN_IF_FAILED(encode_rows(maps.q, p.q, p, p.dqk));
    if (dh != nullptr) RETURN_IF_FAILED(encode_rows(maps.dh, *dh, p, p.dv));
  }
  RETURN_IF_FAILED(make_state_maps(w, maps));
  if (has_small_tiles(p)) {
    RETURN_IF_FAILED(encode_item(maps.alpha, w, w.alpha, 256, 2, 256));
    RETURN_IF_FAILED(encode_item(maps.beta, w, w.beta, 256, 2, 256));
    if (dh != nullptr) {
      RETURN_IF_FAILED(encode_item(maps.inv_d, w, w.inv_d, 256, 1, 256));
      RETURN_IF_FAILED(encode_item(maps.delta, w, w.delta, 256, 1, 256));
    }
  }
  if (w.n_parts != nullptr) {
    const uint64_t n_row = static_cast<uint64_t>(w.dqk_pitch * 2);
    RETURN_IF_FAILED(encode<3>(maps.n_parts, w.n_parts, {static_cast<uint64_t>(p.dqk), 3, items_of(w)},
                               {n_row, n_row * 3}, {box, 8, 1}));
  }
  return cudaSuccess;
}

// In the place of output_dq where dh is 0.
cudaError_t no_dq(const Work& w, const MlstmBackward& params, cudaStream_t stream) {
  static_assert(most_dim * 2 <= 5 * chunk_tokens * 4, "the zeros have a row of q and of dh");
  const auto clear = [&](void* from, int64_t bytes) {
    return cudaMemsetAsync(from, 0, static_cast<size_t>(bytes), stream);
  };
  const int64_t tokens = w.layout.max_chunks * w.p.heads * chunk_tokens;
  RETURN_IF_FAILED(clear(w.inv_d, reinterpret_cast<char*>(w.k_dk) - reinterpret_cast<char*>(w.inv_d)));
  RETURN_IF_FAILED(clear(w.k_dk + w.dk_tiles * tokens, 2 * tokens * 4));
  if (params.dq == nullptr) return cudaSuccess;
  return clear(params.dq, w.p.batch * w.p.seq * w.p.heads * w.p.dqk * 2);  // contiguous: parts come with a dh
}

}  // namespace

KeptStates kept_states(const Work& w, float* memory) {
  const MlstmProblem& p = w.p;
  const int64_t items = w.layout.max_chunks * p.heads;
  float* const n = memory + items * ceil_div(p.dqk, box) * ceil_div(p.dv, box) * (box * box / 2);
  return {
      .c = reinterpret_cast<uint16_t*>(memory), .n = n, .log = p.dtype == DType::float16 ? n + items * p.dqk : nullptr};
}

void describe(const MlstmProblem& p, Work& w) {
  w.p = p;
  w.starts_empty = p.c0 == nullptr && p.n0 == nullptr && p.pool.indices == nullptr;
  Layout& l = w.layout;
  l.batch = p.batch, l.seq = p.seq, l.heads = p.heads, l.dqk = p.dqk, l.dv = p.dv, l.num_seqs = p.num_seqs;
  l.chunks_per_seq = ceil_div(p.seq, chunk_tokens);
  l.max_chunks = p.cu_seqlens != nullptr ? l.chunks_per_seq + p.num_seqs : l.chunks_per_seq * p.batch;
  l.range_end = l.max_chunks;
  w.tiles = choose_tiles(p);
}

void carve_table(Carver& carver, Work& w) {
  if (w.p.cu_seqlens == nullptr) return;
  carver.take(w.first_chunk, w.p.num_seqs + 1);
  carver.take(w.first_token, w.p.num_seqs + 1);
  carver.take(w.seq_of_chunk, w.layout.max_chunks);
  w.layout.first_chunk = w.first_chunk;
  w.layout.first_token = w.first_token;
  w.layout.seq_of_chunk = w.seq_of_chunk;
}

cudaError_t encode_rows(CUtensorMap& map, const Strided& t, const MlstmProblem& p, int64_t dim) {
  // The driver checks the stride of a dimension of size 1 too, though it is never used.
  const auto bytes = [&](int64_t stride, int64_t size) {
    return static_cast<uint64_t>((size == 1 ? dim : stride) * 2);
  };
  return encode<4>(map, t.data,
                   {static_cast<uint64_t>(dim), static_cast<uint64_t>(p.heads), static_cast<uint64_t>(p.seq),
                    static_cast<uint64_t>(p.batch)},
                   {bytes(t.head, p.heads), bytes(t.seq, p.seq), bytes(t.batch, p.batch)}, {box, 1, box, 1});
}

bool serves(const MlstmProblem& p) {
  const auto good = [](int64_t dim) { return dim % dim_step == 0 && dim >= least_dim && dim <= most_dim; };
  const int64_t c_item = element_bytes(p.pool.c_dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(p.pool.c) % 16 == 0 && p.pool.c_stride * c_item % 16 == 0;
  return p.dtype != DType::float32 && good(p.dqk) && good(p.dv) && aligned && device_is_hopper() &&
         encode_function() != nullptr;
}

bool reads(const Strided& t, const MlstmProblem& p) {
  const auto good = [](int64_t stride, int64_t size) { return size == 1 || (stride > 0 && stride % 8 == 0); };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && good(t.batch, p.batch) && good(t.seq, p.seq) &&
         good(t.head, p.heads);
}

int64_t kept_floats(DType dtype, int64_t dqk, int64_t dv) {
  return ceil_div(dqk, box) * ceil_div(dv, box) * (box * box / 2) + dqk + (dtype == DType::float16 ? 1 : 0);
}

int64_t forward_workspace_bytes(const MlstmForward& params) {
  Work w;
  float* m;
  return carve_forward(params, nullptr, w, m);
}

cudaError_t forward(const MlstmForward& params, void* workspace, cudaStream_t stream) {
  Work w;
  float* m;
  carve_forward(params, workspace, w, m);
  RETURN_IF_FAILED(scan_gates(w, m, params.m_last, params.log_decay, stream));
  Maps maps;
  RETURN_IF_FAILED(make_maps(w, nullptr, maps));
  RETURN_IF_FAILED(forward_states(w, maps, params.c_last, params.n_last, params.h, stream));
  return params.h == nullptr ? cudaSuccess : output_h(w, maps, params.h, params.s, m, stream);
}

int64_t backward_workspace_bytes(const MlstmBackward& params) {
  Work w;
  return carve(params.p, Pass::gradients, nullptr, w, params.kept_states);
}

cudaError_t backward(const MlstmBackward& given, void* workspace, cudaStream_t stream) {
  MlstmBackward params = given;
  Work w;
  carve(params.p, Pass::gradients, workspace, w, params.kept_states);
  const bool has_dh = params.dh.data != nullptr;
  // Zeros, a row's for every token: inv_d and what lies behind it up to k_dk have at least 2,560 bytes.
  if (!has_dh) params.dh = w.p.q = Strided{.data = w.inv_d};
  w.ends_empty = params.dc_last == nullptr && params.dn_last == nullptr;
  Maps maps;
  if (params.is_begun) {
    RETURN_IF_FAILED(cudaFree(nullptr));  // makes the context current, as a launch does
    RETURN_IF_FAILED(make_maps(w, &params.dh, maps));
  } else {
    RETURN_IF_FAILED(scan_gates(w, nullptr, nullptr, nullptr, stream));
    RETURN_IF_FAILED(make_maps(w, &params.dh, maps));
    if (params.kept_states == nullptr) {
      RETURN_IF_FAILED(forward_states(w, maps, nullptr, nullptr, nullptr, stream));
    }
    if (has_dh) {
      RETURN_IF_FAILED(output_dq(w, maps, params, stream));
    } else {
      RETURN_IF_FAILED(no_dq(w, params, stream));
    }
  }
  if (params.dk == nullptr && params.dc0 == nullptr) return cudaSuccess;  // a first part without an initial state
  RETURN_IF_FAILED(backward_states(w, maps, params, stream));
  if (params.dk == nullptr) return sum_open_tokens(w, params, stream);
  if (w.dc != w.c) {
    w.c = w.dc, w.n = w.dn;
    RETURN_IF_FAILED(make_state_maps(w, maps));
  }
  RETURN_IF_FAILED(output_dk_dv(w, maps, params, stream));
  return gate_gradients(w, params, stream);
}

}  // namespace flash_xlstm::cuda::hopper
