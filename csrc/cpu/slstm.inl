// Inner loops of the sLSTM, a part of vector_kernels.inl.

// --- products of few rows ------------------------------------------------------------------------------------------

constexpr int vector_floats = 16;
typedef float UnalignedVector __attribute__((vector_size(vector_floats * sizeof(float)), aligned(4), may_alias));

// A tile of `rows` x (vectors * vector_floats) of the product, accumulated in registers.
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
                         int64_t m_stride, int64_t m_panel, int64_t depth, int64_t columns, bool add) {
  constexpr int64_t wide = product_panel / vector_floats;
  for (int64_t first = 0; first < columns; first += product_panel, m += m_panel, out += product_panel) {
    const int64_t count = columns - first < product_panel ? columns - first : product_panel;
    if (count == product_panel) {
      product_tile<rows, wide>(out, out_stride, a, a_row, a_k, m, m_stride, depth, add);
      continue;
    }
    int64_t x = 0;
    for (; x + vector_floats <= count; x += vector_floats) {
      product_tile<rows, 1>(out + x, out_stride, a, a_row, a_k, m + x, m_stride, depth, add);
    }
    for (; x < count; ++x) {
      for (int r = 0; r < rows; ++r) {
        float sum = 0.0f;
        for (int64_t k = 0; k < depth; ++k) sum += a[r * a_row + k * a_k] * m[k * m_stride + x];
        out[r * out_stride + x] = add ? out[r * out_stride + x] + sum : sum;
      }
    }
  }
}

void product(float* out, int64_t out_stride, const float* a, int64_t a_row, int64_t a_k, const float* m,
             int64_t m_stride, int64_t m_panel, int64_t rows, int64_t depth, int64_t columns, bool add) {
  for (int64_t r = 0; r < rows; r += 4) {
    const auto take = rows - r >= 4   ? product_rows<4>
                      : rows - r == 3 ? product_rows<3>
                      : rows - r == 2 ? product_rows<2>
                                      : product_rows<1>;
    take(out + r * out_stride, out_stride, a + r * a_row, a_row, a_k, m, m_stride, m_panel, depth, columns, add);
  }
}

// --- the cell ------------------------------------------------------------------------------------------------------

// log(1 + y) for y from 0 to 1: 2 atanh(y / (2 + y)).
IN_LOOPS float logarithm_1p(float y) {
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

template <bool keeps>
inline void slstm_units(const SlstmCell& cell) {
  const int64_t dim = cell.dim;
  const float *x_gates = cell.x, *recurrent = cell.recurrent, *bias = cell.bias;
  const auto gate = [=](int which, int64_t x) {
    const int64_t at = which * dim + x;
    return x_gates[at] + (recurrent[at] + bias[at]);
  };
  float *h = cell.h, *c = cell.c, *n = cell.n, *m = cell.m;
  float* kept = cell.kept;
#pragma GCC ivdep
  for (int64_t x = 0; x < dim; ++x) {
    const float i = gate(0, x), f = gate(1, x);
    const bool padding = (i == -infinity) & (f == infinity);
    const float h_before = h[x], c_before = c[x], n_before = n[x], m_before = m[x];
    const float y = exponential(-absolute(f));
    const float carried = (f < 0.0f ? f : 0.0f) - logarithm_1p(y) + m_before;
    const float forget = (f >= 0.0f ? y : 1.0f) / (1.0f + y);
    const float margin = i - carried;
    const bool reset = (n_before == 0.0f) | (margin >= 0.0f);
    const float log_keep = -margin < slstm_max_log_keep ? -margin : slstm_max_log_keep;
    const float weight = exponential(reset ? log_keep : margin);
    const float keep = reset ? weight : 1.0f, take = reset ? 1.0f : weight;
    const float z = hyperbolic_tangent(gate(2, x));
    const float o = 1.0f / (1.0f + exponential(-gate(3, x)));
    const float c_next = keep * c_before + take * z, n_next = keep * n_before + take;
    const float m_next = reset ? i : carried;
    const float h_next = o * (c_next / n_next);
    const float c_after = padding ? c_before : c_next, n_after = padding ? n_before : n_next;
    h[x] = padding ? h_before : h_next;
    c[x] = c_after;
    n[x] = n_after;
    m[x] = padding ? m_before : m_next;
    if (keeps) {
      kept[kept_margin * dim + x] = margin;
      kept[kept_z * dim + x] = z;
      kept[kept_o * dim + x] = o;
      kept[kept_forget * dim + x] = padding ? -1.0f : forget;
      kept[kept_c * dim + x] = c_after;
      kept[kept_n * dim + x] = n_after;
    }
  }
}

void slstm_cell(const SlstmCell& cell) {
  if (cell.kept == nullptr)
    slstm_units<false>(cell);
  else
    slstm_units<true>(cell);
}

void slstm_cell_backward(const SlstmCellBackward& cell) {
  const int64_t dim = cell.dim;
  const float *kept = cell.kept, *c_all = cell.c, *n_all = cell.n;
  float *dh_all = cell.dh, *dc_all = cell.dc, *dn_all = cell.dn, *excess_all = cell.excess;
  float *di = cell.dx, *df = di + dim, *dz = df + dim, *d_o = dz + dim;
#pragma GCC ivdep
  for (int64_t x = 0; x < dim; ++x) {
    const float margin = kept[kept_margin * dim + x], z = kept[kept_z * dim + x], o = kept[kept_o * dim + x];
    const float forget = kept[kept_forget * dim + x], c = kept[kept_c * dim + x], n = kept[kept_n * dim + x];
    const float c_before = c_all[x], n_before = n_all[x];
    const bool padding = forget < 0.0f;
    const bool reset = (n_before == 0.0f) | (margin >= 0.0f);
    const float log_keep = -margin < slstm_max_log_keep ? -margin : slstm_max_log_keep;
    const float weight = exponential(reset ? log_keep : margin);
    const float keep = reset ? weight : 1.0f, take = reset ? 1.0f : weight;
    const float ratio = c / n, dh = dh_all[x];
    const float dc_after = dc_all[x], dn_after = dn_all[x], excess = excess_all[x], through = dh * o / n;
    const float dc = dc_after + through, dn = dn_after - through * ratio;
    const float into_take = (dc * z + dn) * take, into_keep = (dc * c_before + dn * n_before) * keep;
    const float to_i = into_take + (reset ? excess : 0.0f), to_f = (into_keep + (reset ? 0.0f : excess)) * forget;
    const float to_z = dc * take * (1.0f - z * z), to_o = dh * ratio * o * (1.0f - o);
    const float dc_before = keep * dc, dn_before = keep * dn, excess_before = reset ? 0.0f : excess;
    di[x] = padding ? 0.0f : to_i;
    df[x] = padding ? 0.0f : to_f;
    dz[x] = padding ? 0.0f : to_z;
    d_o[x] = padding ? 0.0f : to_o;
    dh_all[x] = padding ? dh : 0.0f;
    dc_all[x] = padding ? dc_after : dc_before;
    dn_all[x] = padding ? dn_after : dn_before;
    excess_all[x] = padding ? excess : excess_before;
  }
}
