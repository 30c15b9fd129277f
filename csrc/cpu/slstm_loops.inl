// Inner loops of the sLSTM, a part of vector_kernels.inl.

// --- products of few rows ------------------------------------------------------------------------------------------

constexpr int vector_floats = 16;
typedef float UnalignedVector __attribute__((vector_size(vector_floats * sizeof(float)), aligned(4), may_alias));

// `rows` x (vectors * vector_floats) of the product, accumulated in registers.
template <int rows, int vectors>
inline void product_tile(float* out, int64_t out_stride, const float* a, int64_t a_row, int64_t a_k, const float* m,
                         int64_t m_stride, int64_t depth, bool add) {
  UnalignedVector sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const UnalignedVector* from = reinterpret_cast<const UnalignedVector*>(m + k * m_stride);
    for (int r = 0; r < rows; ++r) {
      const float factor = a[r * a_row + k * a_k];
      for (int v = 0; v < vectors; ++v) sum[r][v] += factor * from[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    UnalignedVector* to = reinterpret_cast<UnalignedVector*>(out + r * out_stride);
    for (int v = 0; v < vectors; ++v) to[v] = add ? to[v] + sum[r][v] : sum[r][v];
  }
}

template <int rows>
inline void product_rows(float* out, int64_t out_stride, const float* a, int64_t a_row, int64_t a_k, const float* m,
                         int64_t m_stride, int64_t depth, int64_t columns, bool add) {
  constexpr int wide = 4;
  int64_t x = 0;
  for (; x + wide * vector_floats <= columns; x += wide * vector_floats) {
    product_tile<rows, wide>(out + x, out_stride, a, a_row, a_k, m + x, m_stride, depth, add);
  }
  for (; x + vector_floats <= columns; x += vector_floats) {
    product_tile<rows, 1>(out + x, out_stride, a, a_row, a_k, m + x, m_stride, depth, add);
  }
  for (; x < columns; ++x) {
    for (int r = 0; r < rows; ++r) {
      float sum = 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += a[r * a_row + k * a_k] * m[k * m_stride + x];
      out[r * out_stride + x] = add ? out[r * out_stride + x] + sum : sum;
    }
  }
}

void product(float* out, int64_t out_stride, const float* a, int64_t a_row, int64_t a_k, const float* m,
             int64_t m_stride, int64_t rows, int64_t depth, int64_t columns, bool add) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    product_rows<4>(out + r * out_stride, out_stride, a + r * a_row, a_row, a_k, m, m_stride, depth, columns, add);
  }
  for (; r < rows; ++r) {
    product_rows<1>(out + r * out_stride, out_stride, a + r * a_row, a_row, a_k, m, m_stride, depth, columns, add);
  }
}

// --- the cell ------------------------------------------------------------------------------------------------------

// log(1 + y) for y from 0 to 1: 2 atanh(y / (2 + y)).
inline float logarithm_1p(float y) {
  const float s = y / (2.0f + y), square = s * s;
  float p = 2.0f / 15.0f;
  p = p * square + 2.0f / 13.0f;
  p = p * square + 2.0f / 11.0f;
  p = p * square + 2.0f / 9.0f;
  p = p * square + 2.0f / 7.0f;
  p = p * square + 2.0f / 5.0f;
  p = p * square + 2.0f / 3.0f;
  return p * square * s + 2.0f * s;
}

void slstm_cell(const SlstmCell& cell) {
  const int64_t dim = cell.dim;
  const auto gate = [&](int which, int64_t x) {
    const int64_t at = which * dim + x;
    return cell.x[at] + (cell.recurrent[at] + cell.bias[at]);
  };
  float *h = cell.h, *c = cell.c, *n = cell.n, *m = cell.m;
  float discarded[lanes];
  for (int64_t x = 0; x < dim; ++x) {
    const float i = gate(0, x), f = gate(1, x);
    const bool padding = i == -infinity && f == infinity;
    const float y = exponential(-absolute(f));
    const float log_forget = (f < 0.0f ? f : 0.0f) - logarithm_1p(y);
    const float forget = (f >= 0.0f ? y : 1.0f) / (1.0f + y);
    const float margin = i - (log_forget + m[x]);
    const bool fresh = n[x] == 0.0f, reset = fresh || margin >= 0.0f;
    const float log_keep = -margin < slstm_max_log_keep ? -margin : slstm_max_log_keep;
    const float keep = reset ? exponential(log_keep) : 1.0f, take = reset ? 1.0f : exponential(margin);
    const float z = hyperbolic_tangent(gate(2, x));
    const float o = 1.0f / (1.0f + exponential(-gate(3, x)));
    const float c_next = keep * c[x] + take * z, n_next = keep * n[x] + take;
    const float m_next = reset ? i : log_forget + m[x];
    const float h_next = o * (c_next / n_next);
    h[x] = padding ? h[x] : h_next;
    c[x] = padding ? c[x] : c_next;
    n[x] = padding ? n[x] : n_next;
    m[x] = padding ? m[x] : m_next;
    float* kept = cell.kept == nullptr ? discarded : cell.kept + x;
    const int64_t stride = cell.kept == nullptr ? 1 : dim;
    kept[kept_margin * stride] = margin;
    kept[kept_z * stride] = z;
    kept[kept_o * stride] = o;
    kept[kept_forget * stride] = padding ? -1.0f : forget;
    kept[kept_c * stride] = c[x];
    kept[kept_n * stride] = n[x];
  }
}

void slstm_cell_backward(const SlstmCellBackward& cell) {
  const int64_t dim = cell.dim;
  const float* kept = cell.kept;
  float *di = cell.dx, *df = di + dim, *dz = df + dim, *d_o = dz + dim;
  for (int64_t x = 0; x < dim; ++x) {
    const float margin = kept[kept_margin * dim + x], z = kept[kept_z * dim + x], o = kept[kept_o * dim + x];
    const float forget = kept[kept_forget * dim + x], c = kept[kept_c * dim + x], n = kept[kept_n * dim + x];
    const float c_before = cell.c[x], n_before = cell.n[x];
    const bool padding = forget < 0.0f;
    const bool reset = n_before == 0.0f || margin >= 0.0f;
    const float log_keep = -margin < slstm_max_log_keep ? -margin : slstm_max_log_keep;
    const float keep = reset ? exponential(log_keep) : 1.0f, take = reset ? 1.0f : exponential(margin);
    const float ratio = c / n, dh = cell.dh[x];
    const float dc = cell.dc[x] + dh * o / n, dn = cell.dn[x] - dh * o / n * ratio;
    const float into_take = (dc * z + dn) * take, into_keep = (dc * c_before + dn * n_before) * keep;
    const float excess = cell.excess[x];
    di[x] = padding ? 0.0f : into_take + (reset ? excess : 0.0f);
    df[x] = padding ? 0.0f : (into_keep + (reset ? 0.0f : excess)) * forget;
    dz[x] = padding ? 0.0f : dc * take * (1.0f - z * z);
    d_o[x] = padding ? 0.0f : dh * ratio * o * (1.0f - o);
    cell.dh[x] = padding ? dh : 0.0f;
    cell.dc[x] = padding ? cell.dc[x] : keep * dc;
    cell.dn[x] = padding ? cell.dn[x] : keep * dn;
    cell.excess[x] = padding || !reset ? excess : 0.0f;
  }
}
