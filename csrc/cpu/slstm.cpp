// The sLSTM on the CPU. A task takes one head and a few rows and walks the tokens, with R in float32; the rows share
// the reads of R. The weights' gradients are products over all tokens afterwards, a task for each head and block of one
// gate's outputs. They use dx and h as rounded to their dtype.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/vector_kernels.h"
#include "params/slstm.h"

namespace flash_xlstm::cpu {
namespace {

constexpr int64_t rows_a_task = 4;
constexpr int64_t block = 64;  // outputs of R of a task of the weights' gradients, and its tokens at a time

const void* at(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * element_bytes(dtype);
}
void* at(void* data, int64_t index, DType dtype) { return static_cast<char*>(data) + index * element_bytes(dtype); }

void load(float* to, const void* data, int64_t index, DType dtype, int64_t stride, int64_t rows, int64_t columns) {
  vector_kernels().pack(to, at(data, index, dtype), dtype, stride, rows, columns, rows);
}
void store(void* data, int64_t index, DType dtype, int64_t stride, const float* from, int64_t rows, int64_t columns) {
  vector_kernels().unpack(at(data, index, dtype), dtype, stride, from, nullptr, rows, columns);
}

std::vector<float> load_bias(const SlstmProblem& p, int64_t head) {
  std::vector<float> bias(4 * p.dim);
  load(bias.data(), p.bias, head * p.dim, p.bias_dtype, p.heads * p.dim, 4, p.dim);
  return bias;
}

// R of every head in float32, as the right operand of a product, panel by panel: `depth` rows by `columns` columns.
// Forward: rows are in, columns (gate, out). Backward: the other way round.
struct Weights {
  Weights(const SlstmProblem& p, bool backward)
      : depth(backward ? 4 * p.dim : p.dim),
        columns(backward ? p.dim : 4 * p.dim),
        head_size(ceil_div(columns, product_panel) * product_panel * depth),
        values(p.heads * head_size) {
    const int64_t dim = p.dim;
    parallel(4 * p.heads, [&](int64_t item) {
      const int64_t gate = item / p.heads;
      float* to = values.data() + item % p.heads * head_size;
      std::vector<float> row(dim);
      for (int64_t out = 0; out < dim; ++out) {
        load(row.data(), p.weights, (item * dim + out) * dim, p.weight_dtype, dim, 1, dim);
        const int64_t wide = gate * dim + out;
        for (int64_t in = 0; in < dim; ++in) to[backward ? place(wide, in) : place(in, wide)] = row[in];
      }
    });
  }
  int64_t place(int64_t k, int64_t column) const {
    return (column / product_panel * depth + k) * product_panel + column % product_panel;
  }
  // out (rows, columns) = a (rows, depth) R
  void multiply(float* out, const float* a, int64_t head, int64_t rows) const {
    vector_kernels().product(out, columns, a, depth, 1, values.data() + head * head_size, product_panel,
                             product_panel * depth, rows, depth, columns, false);
  }

  int64_t depth, columns, head_size;
  std::vector<float> values;
};

// The rows of one task.
struct Tile {
  int64_t head, first, count, longest;
  Row rows[rows_a_task];
};

Tile tile_of(const SlstmProblem& p, int64_t task) {
  Tile tile{};
  tile.head = task % p.heads, tile.first = task / p.heads * rows_a_task;
  tile.count = std::min(rows_a_task, p.rows - tile.first);
  for (int64_t r = 0; r < tile.count; ++r) {
    tile.rows[r] = row_of(p, tile.first + r);
    tile.longest = std::max(tile.longest, tile.rows[r].length);
  }
  return tile;
}

int64_t tasks(const SlstmProblem& p) { return p.heads * ceil_div(p.rows, rows_a_task); }

// rows_a_task rows of `dim` floats, loaded from and stored to (rows, heads, dim). nullptr: loads zeros, stores nothing.
struct RowState {
  RowState(const SlstmProblem& p, const Tile& tile, const float* from) : dim(p.dim), heads(p.heads) {
    values.resize(rows_a_task * dim);
    for (int64_t r = 0; from != nullptr && r < tile.count; ++r) {
      std::memcpy(row(r), from + offset(tile, r), dim * sizeof(float));
    }
  }
  void store(const Tile& tile, float* to) {
    for (int64_t r = 0; to != nullptr && r < tile.count; ++r) {
      std::memcpy(to + offset(tile, r), row(r), dim * sizeof(float));
    }
  }
  float* row(int64_t r) { return values.data() + r * dim; }
  int64_t offset(const Tile& tile, int64_t r) const { return ((tile.first + r) * heads + tile.head) * dim; }

  int64_t dim, heads;
  std::vector<float> values;
};

void forward_tile(const SlstmForward& params, const Tile& tile, const Weights& weights) {
  const SlstmProblem& p = params.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t dim = p.dim, wide = 4 * dim;
  const std::vector<float> bias = load_bias(p, tile.head);
  std::vector<float> x(wide), recurrent(rows_a_task * wide);
  RowState h(p, tile, p.h0), c(p, tile, p.c0), n(p, tile, p.n0), m(p, tile, p.m0);
  for (int64_t t = 0; t < tile.longest; ++t) {
    weights.multiply(recurrent.data(), h.row(0), tile.head, tile.count);
    for (int64_t r = 0; r < tile.count; ++r) {
      const Row& row = tile.rows[r];
      if (t >= row.length) continue;
      const int64_t token = row.batch * p.seq + row.start + t;
      load(x.data(), params.x, row.batch * params.x_batch + (row.start + t) * params.x_seq + tile.head * params.x_head,
           p.dtype, params.x_gate, 4, dim);
      float* kept = params.kept == nullptr ? nullptr : params.kept + (token * p.heads + tile.head) * slstm_kept * dim;
      kernels.slstm_cell({.dim = dim,
                          .x = x.data(),
                          .recurrent = recurrent.data() + r * wide,
                          .bias = bias.data(),
                          .h = h.row(r),
                          .c = c.row(r),
                          .n = n.row(r),
                          .m = m.row(r),
                          .kept = kept});
      store(params.h, (token * p.heads + tile.head) * dim, p.dtype, dim, h.row(r), 1, dim);
    }
  }
  h.store(tile, params.h_last);
  c.store(tile, params.c_last);
  n.store(tile, params.n_last);
  m.store(tile, params.m_last);
}

// c and n before token t of a row.
const float* before(const SlstmBackward& params, const Tile& tile, int64_t r, int64_t t, SlstmKept which,
                    const float* initial, const float* zeros) {
  const SlstmProblem& p = params.p;
  const Row& row = tile.rows[r];
  if (t > 0) {
    const int64_t token = row.batch * p.seq + row.start + t - 1;
    return params.kept + ((token * p.heads + tile.head) * slstm_kept + which) * p.dim;
  }
  return initial == nullptr ? zeros : initial + ((tile.first + r) * p.heads + tile.head) * p.dim;
}

void backward_tile(const SlstmBackward& params, const Tile& tile, const Weights& weights) {
  const SlstmProblem& p = params.p;
  const VectorKernels& kernels = vector_kernels();
  const int64_t dim = p.dim, wide = 4 * dim;
  const float clip = params.clip;
  std::vector<float> dx(rows_a_task * wide), recurrent(rows_a_task * dim), dh_here(dim);
  const std::vector<float> zeros(dim);
  RowState dh(p, tile, params.dh_last), dc(p, tile, params.dc_last), dn(p, tile, params.dn_last),
      excess(p, tile, params.dm_last);
  const auto state = [&](int64_t r, int64_t t, SlstmKept which, const float* initial) {
    return before(params, tile, r, t, which, initial, zeros.data());
  };
  for (int64_t r = 0; r < tile.count; ++r) {
    const float *c = state(r, tile.rows[r].length, kept_c, p.c0), *n = state(r, tile.rows[r].length, kept_n, p.n0);
    for (int64_t x = 0; x < dim; ++x) excess.row(r)[x] -= dc.row(r)[x] * c[x] + dn.row(r)[x] * n[x];
  }
  for (int64_t t = tile.longest - 1; t >= 0; --t) {
    for (int64_t r = 0; r < tile.count; ++r) {
      const Row& row = tile.rows[r];
      if (t >= row.length) continue;
      const int64_t token = row.batch * p.seq + row.start + t;
      if (params.dh != nullptr) {
        load(dh_here.data(), params.dh,
             row.batch * params.dh_batch + (row.start + t) * params.dh_seq + tile.head * params.dh_head, p.dtype, dim,
             1, dim);
        for (int64_t x = 0; x < dim; ++x) dh.row(r)[x] += dh_here[x];
      }
      kernels.slstm_cell_backward({.dim = dim,
                                   .kept = params.kept + (token * p.heads + tile.head) * slstm_kept * dim,
                                   .c = state(r, t, kept_c, p.c0),
                                   .n = state(r, t, kept_n, p.n0),
                                   .dh = dh.row(r),
                                   .dc = dc.row(r),
                                   .dn = dn.row(r),
                                   .excess = excess.row(r),
                                   .dx = dx.data() + r * wide});
      store(params.dx, (token * 4 * p.heads + tile.head) * dim, p.dtype, p.heads * dim, dx.data() + r * wide, 4, dim);
    }
    weights.multiply(recurrent.data(), dx.data(), tile.head, tile.count);
    for (int64_t r = 0; r < tile.count; ++r) {
      if (t >= tile.rows[r].length) continue;
      for (int64_t x = 0; x < dim; ++x) {
        const float g = recurrent[r * dim + x];
        dh.row(r)[x] += g > clip ? clip : g < -clip ? -clip : g;
      }
    }
  }
  dh.store(tile, params.dh0);
  dc.store(tile, params.dc0);
  dn.store(tile, params.dn0);
  if (params.dm0 == nullptr) return;
  for (int64_t r = 0; r < tile.count; ++r) {
    const float *c = state(r, 0, kept_c, p.c0), *n = state(r, 0, kept_n, p.n0);
    for (int64_t x = 0; x < dim; ++x) excess.row(r)[x] += dc.row(r)[x] * c[x] + dn.row(r)[x] * n[x];
  }
  excess.store(tile, params.dm0);
}

// dR and db of outputs [first, first + count) of one gate and head.
void weight_gradients(const SlstmBackward& params, int64_t gate, int64_t head, int64_t first, int64_t count) {
  const SlstmProblem& p = params.p;
  const int64_t dim = p.dim;
  std::vector<float> dx(block * count), h(block * dim), dweights(count * dim), dbias(count);
  for (int64_t r = 0; r < p.rows; ++r) {
    const Row row = row_of(p, r);
    for (int64_t t = 0; t < row.length; t += block) {
      const int64_t tokens = std::min(block, row.length - t), token = row.batch * p.seq + row.start + t;
      load(dx.data(), params.dx, ((token * 4 + gate) * p.heads + head) * dim + first, p.dtype, 4 * p.heads * dim,
           tokens, count);
      const int64_t skipped = t == 0 ? 1 : 0;  // the first token takes h from the initial state
      if (skipped) {
        std::fill_n(h.data(), dim, 0.0f);
        if (p.h0 != nullptr) std::memcpy(h.data(), p.h0 + (r * p.heads + head) * dim, dim * sizeof(float));
      }
      if (tokens > skipped) {
        load(h.data() + skipped * dim, params.h, ((token + skipped - 1) * p.heads + head) * dim, p.dtype, p.heads * dim,
             tokens - skipped, dim);
      }
      vector_kernels().product(dweights.data(), dim, dx.data(), 1, count, h.data(), dim, product_panel, count, tokens,
                               dim, true);
      for (int64_t k = 0; k < tokens; ++k) {
        for (int64_t x = 0; x < count; ++x) dbias[x] += dx[k * count + x];
      }
    }
  }
  const int64_t item = gate * p.heads + head;
  store(params.dweights, (item * dim + first) * dim, p.weight_dtype, dim, dweights.data(), count, dim);
  store(params.dbias, item * dim + first, p.bias_dtype, dim, dbias.data(), 1, count);
}

}  // namespace

void slstm_forward(const SlstmForward& params) {
  const SlstmProblem& p = params.p;
  const Weights weights(p, false);
  parallel(tasks(p), [&](int64_t task) { forward_tile(params, tile_of(p, task), weights); });
}

void slstm_backward(const SlstmBackward& params) {
  const SlstmProblem& p = params.p;
  {
    const Weights weights(p, true);
    parallel(tasks(p), [&](int64_t task) { backward_tile(params, tile_of(p, task), weights); });
  }
  const int64_t blocks = ceil_div(p.dim, block);
  parallel(4 * p.heads * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * block, item = task / blocks;
    weight_gradients(params, item / p.heads, item % p.heads, first, std::min(block, p.dim - first));
  });
}

// Two passes: R h of every unit needs all of the old h, so no h may change before all R h are made.
void slstm_step(const SlstmStep& params) {
  const VectorKernels& kernels = vector_kernels();
  const int64_t dim = params.dim, heads = params.heads, wide = 4 * dim;
  std::vector<float> recurrent(params.batch * heads * wide);
  const int64_t blocks = ceil_div(dim, block);
  parallel(4 * heads * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * block, item = task / blocks, gate = item / heads, head = item % heads;
    const int64_t count = std::min(block, dim - first), from = (item * dim + first) * dim;
    std::vector<float> converted;
    const float* weights = static_cast<const float*>(params.weights) + from;
    if (params.weight_dtype != DType::float32) {
      converted.resize(count * dim);
      load(converted.data(), params.weights, from, params.weight_dtype, dim, count, dim);
      weights = converted.data();
    }
    for (int64_t row = 0; row < params.batch; ++row) {
      kernels.row_dots(recurrent.data() + (row * heads + head) * wide + gate * dim + first, weights,
                       params.h_state + (row * heads + head) * dim, 0, count, dim);
    }
  });
  parallel(params.batch * heads, [&](int64_t task) {
    const int64_t row = task / heads, head = task % heads;
    std::vector<float> x(wide), bias(wide);
    load(x.data(), params.x, row * params.x_batch + head * params.x_head, params.dtype, params.x_gate, 4, dim);
    load(bias.data(), params.bias, head * dim, params.bias_dtype, heads * dim, 4, dim);
    const int64_t offset = task * dim;
    kernels.slstm_cell({.dim = dim,
                        .x = x.data(),
                        .recurrent = recurrent.data() + task * wide,
                        .bias = bias.data(),
                        .h = params.h_state + offset,
                        .c = params.c_state + offset,
                        .n = params.n_state + offset,
                        .m = params.m_state + offset,
                        .kept = nullptr});
    store(params.h, offset, params.dtype, dim, params.h_state + offset, 1, dim);
  });
}

}  // namespace flash_xlstm::cpu
