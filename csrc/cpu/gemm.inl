// Float32 matrix products and transposes, a part of vector_kernels.inl. A block of `block_rows` rows and
// `block_vectors` vectors of the result stays in registers while a runs past it element by element and b vector by
// vector. a may have any strides. b's rows are contiguous; where they are long, its part for a column of blocks is
// copied first: lines at the distance of such rows push one another out of the first cache. A result depends on its own
// row and column only, not on the block that it falls in: the sums run over k in order.

#if defined(__AVX512F__)
constexpr int block_rows = 8, block_vectors = 2;
#elif defined(__AVX__)
constexpr int block_rows = 6, block_vectors = 2;
#elif defined(__aarch64__)
constexpr int block_rows = 6, block_vectors = 4;
#else
constexpr int block_rows = 4, block_vectors = 2;
#endif
constexpr int64_t block_columns = block_vectors * vector_lanes;

// The depths that count for `rows` rows of a from `row` on.
struct Depths {
  int64_t begin, end;
};
inline Depths depths_of(const Gemm& g, int64_t row, int64_t rows) {
  switch (g.part) {
    case Part::lower_a: return {0, row + rows < g.depth ? row + rows : g.depth};
    case Part::upper_a: return {row, g.depth};
    default: return {0, g.depth};
  }
}

template <int rows>
IN_LOOPS void gemm_block(float* out, int64_t out_row, const float* from, float keep, const float* a, int64_t a_row,
                         int64_t a_k, const float* b, int64_t b_row, int64_t depth, Ahead* ahead) {
  if (from != nullptr) {  // large, and seldom in a cache
    for (int r = 0; r < rows; ++r) {
      for (int64_t x = 0; x < block_columns; x += 16) {
        __builtin_prefetch(from + r * out_row + x);
        __builtin_prefetch(out + r * out_row + x, 1);
      }
    }
  }
  Vector sums[rows][block_vectors] = {};
  constexpr int64_t piece = 8;
  for (int64_t k = 0; k < depth;) {
    if (ahead != nullptr) ahead->prefetch(2);
    for (const int64_t stop = k + piece < depth ? k + piece : depth; k < stop; ++k, a += a_k, b += b_row) {
      Vector values[block_vectors];
      for (int v = 0; v < block_vectors; ++v) load_vector(values[v], b + v * vector_lanes);
      for (int r = 0; r < rows; ++r) {
        const float x = a[r * a_row];
        for (int v = 0; v < block_vectors; ++v) sums[r][v] += x * values[v];
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < block_vectors; ++v) {
      const int64_t at = r * out_row + v * vector_lanes;
      if (from != nullptr) {
        Vector before;
        load_vector(before, from + at);
        sums[r][v] = keep * before + sums[r][v];
      }
      std::memcpy(out + at, &sums[r][v], sizeof(Vector));
    }
  }
}

// A block of the result, for which b, and out and from, have whole vectors.
template <int rows>
IN_LOOPS void gemm_at(const Gemm& g, int64_t row, int64_t column) {
  const Depths k = depths_of(g, row, rows);
  const int64_t at = row * g.out_row + column;
  gemm_block<rows>(g.out + at, g.out_row, g.from == nullptr ? nullptr : g.from + at, g.keep,
                   g.a + row * g.a_row + k.begin * g.a_k, g.a_row, g.a_k, g.b + k.begin * g.b_row + column, g.b_row,
                   k.end - k.begin, g.ahead);
}

// Columns [begin, end), whole blocks. Down the columns, so that b's part of a block stays in the first cache; but along
// the rows where they are read and written as well, so that memory is read in order.
void gemm_columns(const Gemm& g, int64_t begin, int64_t end) {
  Gemm part = g;
  const auto down = [&](int64_t row, int64_t last, int64_t column) {
    for (; row + block_rows <= last; row += block_rows) gemm_at<block_rows>(part, row, column);
    for (; row + 2 <= last; row += 2) gemm_at<2>(part, row, column);
    for (; row < last; ++row) gemm_at<1>(part, row, column);
  };
  if (g.from != nullptr) {
    for (int64_t row = 0; row < g.rows; row += block_rows) {
      const int64_t last = row + block_rows < g.rows ? row + block_rows : g.rows;
      for (int64_t column = begin; column < end; column += block_columns) down(row, last, column);
    }
  } else {
    constexpr int64_t most = 16384;  // floats of a copy
    alignas(64) float copy[most];
    const bool copies = g.b_row >= 256 && g.rows >= 4 * block_rows && g.depth * block_columns <= most;
    for (int64_t column = begin; column < end; column += block_columns) {
      if (copies) {
        for (int64_t k = 0; k < g.depth; ++k) {
          std::memcpy(copy + k * block_columns, g.b + k * g.b_row + column, sizeof(float) * block_columns);
        }
        part.b = copy - column, part.b_row = block_columns;
      }
      down(g.part == Part::lower_out ? column / block_rows * block_rows : 0, g.rows, column);
    }
  }
}

void gemm(const Gemm& g) {
  const int64_t column = g.columns / block_columns * block_columns;
  gemm_columns(g, 0, column);
  if (column == g.columns) return;
  // The last columns, by way of copies that are whole vectors wide.
  const int64_t rest = g.columns - column;
  const auto copy = [rest](float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_row, from + r * from_row, 4 * rest);
  };
  const Floats copies((g.depth + 2 * g.rows) * block_columns);
  float *const b = copies.data(), *const out = b + g.depth * block_columns, *const from = out + g.rows * block_columns;
  copy(b, block_columns, g.b + column, g.b_row, g.depth);
  if (g.from != nullptr) copy(from, block_columns, g.from + column, g.out_row, g.rows);
  Gemm last = g;
  last.b_row = last.out_row = block_columns;
  last.b = b - column, last.out = out - column, last.from = g.from == nullptr ? nullptr : from - column;
  gemm_columns(last, column, column + block_columns);
  copy(g.out + column, g.out_row, out, block_columns, g.rows);
}

// to (columns x rows) = from (rows x columns) transposed.
void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int64_t rows, int64_t columns) {
  constexpr int size = vector_lanes;
  const int64_t whole_rows = rows / size * size, whole_columns = columns / size * size;
  for (int64_t r = 0; r < whole_rows; r += size) {
    for (int64_t c = 0; c < whole_columns; c += size) {
      Vector block[size];
      for (int x = 0; x < size; ++x) load_vector(block[x], from + (r + x) * from_row + c);
      transpose(block);
      for (int x = 0; x < size; ++x) store_vector(to + (c + x) * to_row + r, block[x]);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
  }
}
