// The sLSTM on the CPU, a part of vector_kernels.inl. R is packed once a call. A task takes a block of rows of a head
// or some and walks the tokens. A product of the block with a panel of R (the four gates of one register of units)
// stays in registers, and the cell follows at once, while R's panel stays in L1 for the block's other rows. With one
// row, the bandwidth for R bounds it. Operands packed for tiles or pairs (amx.h) are multiplied for all of a token, and
// the cells follow. The weights' gradients are one product over all tokens afterwards; they use dx
// and h as rounded to their dtype.
//
// An element's products are summed in one order, whatever the block and the tile it lies in, so results do not depend
// on the number of threads.

namespace {

// --- products ------------------------------------------------------------------------------------------------------

constexpr int panel_vectors = 4;  // of a panel of the right operand
constexpr int64_t panel_columns = panel_vectors * vector_lanes;
#if defined(__AVX512F__)
constexpr int tile_rows = 6;  // 24 of 32 registers hold sums
#else
constexpr int tile_rows = 3;  // 12 of 16
#endif
constexpr int paired_rows = tile_rows / 2;  // up to so many rows take two panels at once: four sums a row are too few

struct Product {
  float* out;  // row r at r * out_stride: panel after panel
  int64_t out_stride;
  const float* a;  // (rows, depth)
  int64_t a_row, a_k;
  const float* m;  // panels of (depth, columns), contiguous, m_panel apart
  int64_t m_panel, depth;
  bool add;
  Lines ahead = {};
};

template <int rows, int panels, int vectors>
void product_tile(const Product& p) {
  constexpr int64_t columns = vectors * vector_lanes;
  Vector sum[rows][panels][vectors];
  for (int r = 0; r < rows; ++r) {
    for (int panel = 0; panel < panels; ++panel) {
      for (int v = 0; v < vectors; ++v) sum[r][panel][v] = Vector{};
    }
  }
  const float *a = p.a, *m = p.m;
  const int64_t a_row = p.a_row, a_k = p.a_k, m_panel = p.m_panel;
  constexpr int64_t piece = 8;
  const int64_t lines = p.ahead.count, at_once = ceil_div(lines * piece, p.depth + 1);
  for (int64_t k = 0, line = 0; k < p.depth;) {
    for (const int64_t stop = line + at_once; line < stop && line < lines; ++line)
      __builtin_prefetch(p.ahead.lines[line], 0, 2);
    for (const int64_t stop = k + piece < p.depth ? k + piece : p.depth; k < stop; ++k, a += a_k, m += columns) {
      for (int panel = 0; panel < panels; ++panel) {
        for (int v = 0; v < vectors; ++v) {
          const Vector right = load_vector(m + panel * m_panel + v * vector_lanes);
          for (int r = 0; r < rows; ++r) sum[r][panel][v] += a[r * a_row] * right;
        }
      }
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int panel = 0; panel < panels; ++panel) {
      for (int v = 0; v < vectors; ++v) {
        float* out = p.out + r * p.out_stride + panel * columns + v * vector_lanes;
        store_vector(out, p.add ? load_vector(out) + sum[r][panel][v] : sum[r][panel][v]);
      }
    }
  }
}

template <int panels, int vectors>
void product_rows(int64_t rows, const Product& p) {
  switch (rows) {
    case 1: return product_tile<1, panels, vectors>(p);
#if defined(__AVX512F__)
    case 2: return product_tile<2, panels, vectors>(p);
    case 3: return product_tile<3, panels, vectors>(p);
#endif
  }
  if constexpr (panels == 1) {
    switch (rows) {
#if defined(__AVX512F__)
      case 4: return product_tile<4, panels, vectors>(p);
      case 5: return product_tile<5, panels, vectors>(p);
#else
      case 2: return product_tile<2, panels, vectors>(p);
#endif
      default: return product_tile<tile_rows, panels, vectors>(p);
    }
  }
}

// `vectors` of one panel.
void product_panel(int64_t rows, int64_t vectors, const Product& p) {
  switch (vectors) {
    case 1: return product_rows<1, 1>(rows, p);
    case 2: return product_rows<1, 2>(rows, p);
    case 3: return product_rows<1, 3>(rows, p);
    default: return product_rows<1, 4>(rows, p);
  }
}

// `count` rows in tiles of nearly the same size: f(first row, rows) for each.
template <typename F>
void for_tiles(int64_t count, const F& f) {
  const int64_t tiles = ceil_div(count, int64_t{tile_rows}), least = count / tiles, more = count % tiles;
  for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
    const int64_t rows = least + (tile < more);
    f(row, rows);
    row += rows;
  }
}

// out (rows, columns) (+)= a (rows, depth) m, whose panels are `whole_depth` deep. So much of the depth at a time that a
// panel stays in L1.
void product(int64_t rows, int64_t columns, const Product& whole) {
  constexpr int64_t piece = 128;
  const int64_t vectors = ceil_div(columns, int64_t{vector_lanes});
  const int64_t calls =
      ceil_div(vectors, int64_t{panel_vectors}) * ceil_div(whole.depth, piece) * ceil_div(rows, int64_t{tile_rows});
  Lines ahead = whole.ahead;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v, wide = left < panel_vectors ? left : panel_vectors;
    const int64_t panels = rows <= paired_rows && left >= 2 * panel_vectors ? 2 : 1;
    for (int64_t k = 0; k < whole.depth; k += piece) {
      Product p = whole;
      p.depth = whole.depth - k < piece ? whole.depth - k : piece;
      p.m = whole.m + v / panel_vectors * whole.m_panel + k * wide * vector_lanes;
      p.add = whole.add || k > 0;
      for_tiles(rows, [&](int64_t row, int64_t count) {
        p.out = whole.out + row * whole.out_stride + v * vector_lanes;
        p.a = whole.a + row * whole.a_row + k * whole.a_k;
        const int64_t left = whole.ahead.count - (ahead.lines - whole.ahead.lines);
        const int64_t lines = ceil_div(whole.ahead.count * panels, calls);
        p.ahead = {ahead.lines, lines < left ? lines : left};
        ahead.lines += p.ahead.count;
        if (panels == 2) {
          product_rows<2, panel_vectors>(count, p);
        } else {
          product_panel(count, wide, p);
        }
      });
    }
    v += panels * panel_vectors;
  }
}

// The operands of products: float32; three bfloat16 parts of float32 on AMX tiles (amx.h); or bfloat16, on tiles or as
// pairs. They depend on dtypes and sizes only: tiles must be full enough to beat sums in float32. Rows with numbers that
// the three parts cannot hold are multiplied in float32. Whether a row is, depends on the row and R only: results do not
// depend on the number of threads here either.
enum class Operands { floats, parts, halves };
constexpr int64_t most_parts_dim = 320;
Operands operands_of(const SlstmProblem& p) {
  const bool is_half = p.dtype == DType::bfloat16 && p.weight_dtype == DType::bfloat16;
  if (is_half && has_bf16()) return Operands::halves;
  const bool are_full = 4 * p.rows > 3 * amx::padded(p.rows, amx::tile_rows) && p.rows >= amx::tile_rows;
  const bool fit = p.dim % amx::tile_depth == 0 && p.dim >= 64 && p.dim <= most_parts_dim;
  return has_amx() && are_full && fit ? Operands::parts : Operands::floats;
}
// Elements of a packed operand.
int64_t packed_size(Operands operands, int64_t size, int64_t depth) {
  const int parts = operands == Operands::parts ? 3 : operands == Operands::halves ? 1 : 0;
  return amx::packed_size(size, depth, parts);
}

// out (rows x columns, contiguous) = a b, or += with `add`, of packed bfloat16 operands.
void multiply_halves(float* out, bool add, const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns,
                     int64_t depth) {
  const auto multiply = has_amx() ? amx::multiply : amx::multiply_pairs;
  multiply(out, add ? out : nullptr, 1.0f, a, 1, b, rows, columns, depth, Part::all, nullptr);
}

// While it lives, this thread's tiles may multiply.
struct TilesInUse {
  explicit TilesInUse(Operands operands) : are(operands != Operands::floats && has_amx()) {
    if (are) amx::begin();
  }
  ~TilesInUse() {
    if (are) amx::end();
  }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
  bool are;
};

// Packed operands.
struct Parts {
  explicit Parts(int64_t count) : memory((count + 1) / 2, false) {}
  uint16_t* at(int64_t index) const { return reinterpret_cast<uint16_t*>(memory.data()) + index; }
  Floats memory;
};

// The left operand of products with `rows` rows on tiles.
struct LeftParts {
  LeftParts(int64_t rows, int64_t depth, const amx::Range& right)
      : rows(rows), depth(depth), exact(amx::exact_with(right)), parts(amx::packed_size(rows, depth, 3)) {}
  void pack(const float* from, int64_t from_row) { pack(0, rows, from, from_row); }
  // `count` rows from row `first` on, the first of a tile.
  void pack(int64_t first, int64_t count, const float* from, int64_t from_row) {
    amx::pack_left_floats(of(first), seen, outside + first / amx::tile_rows, exact, from, from_row, count, depth);
  }
  // From row `first` on, the first of a tile.
  uint16_t* of(int64_t first) const { return parts.at(amx::packed_size(first, depth, 3)); }
  // Rows [begin, end) from row `from` on, all whose numbers tiles cannot hold: f(begin, end).
  template <typename F>
  void for_outside(int64_t from, int64_t end, const F& f) const {
    for (int64_t row = from; row < end; ++row) {
      const auto is_outside = [&] { return (outside[row / 16] >> row % 16 & 1) != 0; };
      if (row % 16 == 0 && outside[row / 16] == 0) {
        row += 15;
      } else if (is_outside()) {
        const int64_t begin = row;
        for (++row; row < end && is_outside();) ++row;
        f(begin, row);
      }
    }
  }

  int64_t rows, depth;
  amx::Range exact;
  Parts parts;
  amx::Seen seen;
  uint16_t outside[8];
};

// --- R -------------------------------------------------------------------------------------------------------------

// tile[x] is vector_lanes values at from + x * line, with stride `lane`, of which `lanes` are there. There are `lines` of
// them. One of the strides is 1.
template <typename Type>
IN_LOOPS void load_tile(Vector (&tile)[vector_lanes], const typename Type::Bits* from, int64_t line, int64_t lane,
                        int64_t lines, int64_t lanes) {
  if (lines == vector_lanes && lanes == vector_lanes) {
    const int64_t step = lane == 1 ? line : lane;
    in_turn<vector_lanes>([&](int x) IN_LAMBDA { tile[x] = load_lanes<Type>(from + x * step, vector_lanes); });
    if (lane != 1) transpose(tile);
    return;
  }
  if (lane == 1) {
    for (int64_t x = 0; x < vector_lanes; ++x) {
      tile[x] = x < lines ? load_lanes<Type>(from + x * line, lanes) : Vector{};
    }
    return;
  }
  for (int64_t x = 0; x < vector_lanes; ++x) {
    tile[x] = x < lanes ? load_lanes<Type>(from + x * lane, lines) : Vector{};
  }
  transpose(tile);
}

// The heads whose R is packed.
struct Heads {
  int64_t first, count;
};

// Whether R's parts for tiles are made from R itself. Its floats are then packed by who needs them: rows with numbers
// outside of the parts' range.
bool packs_directly(const SlstmProblem& p, Operands operands) {
  return operands == Operands::parts && p.weight_dtype == DType::float32 && p.weights_in == 1;
}

// R of a head in float32. Packed when first asked for, unless it is already.
template <typename Weights>
class HeadFloats {
 public:
  HeadFloats(const Weights& weights, int64_t head) : weights_(weights), head_(head) {}
  ~HeadFloats() { delete own_; }
  HeadFloats(const HeadFloats&) = delete;
  HeadFloats& operator=(const HeadFloats&) = delete;
  const float* data() {
    if (!weights_.direct) return weights_.of(head_);
    if (own_ == nullptr) {
      own_ = new Floats(weights_.head_floats, false);
      for (int64_t item = 0; item < weights_.head_items; ++item) weights_.pack(own_->data(), head_, item);
    }
    return own_->data();
  }

 private:
  const Weights& weights_;
  int64_t head_;
  Floats* own_ = nullptr;
};

// In the forward, a panel has the four gates of vector_lanes units, and `dim` rows.
struct ForwardWeights {
  ForwardWeights(const SlstmProblem& p, Heads heads)
      : p(p),
        first(heads.first),
        groups(ceil_div(p.dim, int64_t{vector_lanes})),
        panel(p.dim * panel_columns),
        head_items(groups),
        head_floats(groups * panel),
        operands(operands_of(p)),
        direct(packs_directly(p, operands)),
        values(direct ? 0 : heads.count * head_floats, false),
        panel_parts(packed_size(operands, panel_columns, p.dim)),
        parts(heads.count * groups * panel_parts),
        ranges(new amx::Range[heads.count * groups]) {
    parallel(heads.count * groups, ceil_div(int64_t{1} << 15, panel), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = first + item / groups, group = item % groups;
        uint16_t* const to = parts.at(item * panel_parts);
        if (direct) {
          for (int64_t gate = 0; gate < 4; ++gate) {
            const float* const units = static_cast<const float*>(p.weights) + gate * p.weights_gate +
                                       head * p.weights_head + group * vector_lanes * p.weights_out;
            ranges[item].add(amx::pack_right_floats(to + packed_size(operands, gate * vector_lanes, p.dim), units,
                                                    p.weights_out, true, p.dim, vector_lanes));
          }
          continue;
        }
        float* const floats = values.data() + item * panel;
        pack(floats - group * panel, head, group);
        if (operands == Operands::parts) {
          ranges[item] = amx::pack_right_floats(to, floats, panel_columns, false, p.dim, panel_columns);
        } else if (operands == Operands::halves) {
          amx::pack_right(to, floats, panel_columns, false, p.dim, panel_columns, nullptr);
        }
      }
    });
  }
  ~ForwardWeights() { delete[] ranges; }
  ForwardWeights(const ForwardWeights&) = delete;
  ForwardWeights& operator=(const ForwardWeights&) = delete;

  // One of a head's panels, which begin at `head_to`.
  void pack(float* head_to, int64_t head, int64_t group) const {
    with_dtype(p.weight_dtype, [&](auto type) { pack<decltype(type)>(head_to + group * panel, head, group); });
  }
  template <typename Type>
  void pack(float* to, int64_t head, int64_t group) const {
    const auto* from = static_cast<const typename Type::Bits*>(p.weights);
    const int64_t dim = p.dim, unit = group * vector_lanes;
    const int64_t units = dim - unit < vector_lanes ? dim - unit : vector_lanes;
    for (int64_t gate = 0; gate < 4; ++gate) {
      const auto* rows = from + gate * p.weights_gate + head * p.weights_head + unit * p.weights_out;
      for (int64_t k = 0; k < dim; k += vector_lanes) {
        const int64_t count = dim - k < vector_lanes ? dim - k : vector_lanes;
        Vector tile[vector_lanes];
        load_tile<Type>(tile, rows + k * p.weights_in, p.weights_in, p.weights_out, count, units);
        float* const out = to + k * panel_columns + gate * vector_lanes;
        if (count == vector_lanes) {
          in_turn<vector_lanes>([&](int x) IN_LAMBDA { store_vector(out + x * panel_columns, tile[x]); });
        } else {
          for (int64_t x = 0; x < count; ++x) store_vector(out + x * panel_columns, tile[x]);
        }
      }
    }
  }

  const float* of(int64_t head) const { return values.data() + (head - first) * head_floats; }
  const uint16_t* parts_of(int64_t head) const { return parts.at((head - first) * groups * panel_parts); }
  amx::Range range(int64_t head) const {
    amx::Range all;
    for (int64_t group = 0; group < groups; ++group) all.add(ranges[(head - first) * groups + group]);
    return all;
  }

  const SlstmProblem& p;
  int64_t first, groups, panel, head_items, head_floats;
  Operands operands;
  bool direct;
  Floats values;
  int64_t panel_parts;
  Parts parts;
  amx::Range* ranges;
};

// The order of dx's columns, the depth of R^T dx: gate by gate. Where cells pack dx for tiles, the gates of a register of
// units one after the other: the tiles' pairs are then of two gates, which one cell has.
struct GateOrder {
  int64_t dim;
  bool in_cells;

  int64_t operator()(int64_t gate, int64_t unit) const {
    if (!in_cells) return gate * dim + unit;
    return unit / vector_lanes * panel_columns + gate * vector_lanes + unit % vector_lanes;
  }
};

// In the backward, a panel has panel_columns inputs, the last what is left, and a row for each (gate, output), in
// `order`.
struct BackwardWeights {
  BackwardWeights(const SlstmProblem& p, Heads heads)
      : p(p),
        first(heads.first),
        order{.dim = p.dim, .in_cells = operands_of(p) == Operands::parts && p.dtype == DType::float32},
        columns(ceil_div(p.dim, int64_t{vector_lanes}) * vector_lanes),
        depth(4 * p.dim),
        panels(ceil_div(columns, panel_columns)),
        head_items(4),
        head_floats(depth * columns),
        operands(operands_of(p)),
        direct(packs_directly(p, operands) && order.in_cells),
        values(direct ? 0 : heads.count * head_floats, false),
        parts(heads.count * packed_size(operands, columns, depth)),
        ranges(new amx::Range[heads.count * panels]) {
    parallel(direct ? 0 : heads.count * 4, ceil_div(int64_t{1} << 15, p.dim * p.dim), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        pack(values.data() + item / 4 * head_floats, first + item / 4, item % 4);
      }
    });
    if (operands == Operands::floats) return;
    parallel(heads.count * panels, ceil_div(int64_t{1} << 15, depth * panel_columns), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t head = first + item / panels, input = item % panels * panel_columns;
        const int64_t wide = columns - input < panel_columns ? columns - input : panel_columns;
        uint16_t* const to = parts_of(head) + packed_size(operands, input, depth);
        if (direct) {
          const float* rows[4 * most_parts_dim];
          for (int64_t k = 0; k < depth; ++k) {
            const int64_t gate = k % panel_columns / vector_lanes,
                          out = k / panel_columns * vector_lanes + k % vector_lanes;
            rows[k] = static_cast<const float*>(p.weights) + gate * p.weights_gate + head * p.weights_head +
                      out * p.weights_out + input;
          }
          ranges[item] = amx::pack_right_floats(to, rows, depth, wide);
        } else if (operands == Operands::parts) {
          ranges[item] = amx::pack_right_floats(to, of(head) + input * depth, wide, false, depth, wide);
        } else {
          amx::pack_right(to, of(head) + input * depth, wide, false, depth, wide, nullptr);
        }
      }
    });
  }
  ~BackwardWeights() { delete[] ranges; }
  BackwardWeights(const BackwardWeights&) = delete;
  BackwardWeights& operator=(const BackwardWeights&) = delete;

  // One gate of a head's panels, which begin at `head_to`.
  void pack(float* head_to, int64_t head, int64_t gate) const {
    with_dtype(p.weight_dtype, [&](auto type) { pack<decltype(type)>(head_to, head, gate); });
  }
  template <typename Type>
  void pack(float* head_to, int64_t head, int64_t gate) const {
    const int64_t dim = p.dim;
    const auto* from =
        static_cast<const typename Type::Bits*>(p.weights) + gate * p.weights_gate + head * p.weights_head;
    for (int64_t input = 0; input < dim; input += panel_columns) {
      const int64_t wide = columns - input < panel_columns ? columns - input : panel_columns;
      for (int64_t out = 0; out < dim; out += vector_lanes) {
        float* to = head_to + input * depth + order(gate, out) * wide;
        const int64_t count = dim - out < vector_lanes ? dim - out : vector_lanes;
        for (int64_t x = 0; x < wide; x += vector_lanes) {
          const auto* place = from + out * p.weights_out + (input + x) * p.weights_in;
          Vector tile[vector_lanes];
          load_tile<Type>(tile, place, p.weights_out, p.weights_in, count, dim - input - x);
          for (int64_t y = 0; y < count; ++y) store_vector(to + y * wide + x, tile[y]);
        }
      }
    }
  }

  const float* of(int64_t head) const { return values.data() + (head - first) * head_floats; }
  uint16_t* parts_of(int64_t head) const { return parts.at((head - first) * packed_size(operands, columns, depth)); }
  amx::Range range(int64_t head) const {
    amx::Range all;
    for (int64_t panel = 0; panel < panels; ++panel) all.add(ranges[(head - first) * panels + panel]);
    return all;
  }

  const SlstmProblem& p;
  int64_t first;
  GateOrder order;
  int64_t columns, depth, panels, head_items, head_floats;
  Operands operands;
  bool direct;
  Floats values;
  Parts parts;
  amx::Range* ranges;
};

// --- the cell ------------------------------------------------------------------------------------------------------

// c and n after a token. Every copy of this code rounds alike: the c and n that the backward makes again are the
// forward's.
template <int rows>
IN_LOOPS void advance(const Masks<rows>& reset, const Vectors<rows>& weight, const Vectors<rows>& z, Vectors<rows>& c,
                      Vectors<rows>& n) {
  c = multiply_add(weight, choose(reset, c, z), choose(reset, z, c));
  n = multiply_add(weight, choose(reset, n, 1.0f), choose(reset, 1.0f, n));
}

template <int rows>
struct Units {
  Vectors<rows> h, c, n, m;
};

// One token of vector_lanes units of several rows. `gates` are the pre-activations. load() gives the state before the
// token: a call, because until the gates' exponentials are done, registers are short.
template <bool keeps, int rows, typename Load>
IN_LOOPS Units<rows> slstm_cell(const Vectors<rows> (&gates)[4], const Load& load, Vectors<rows> (&kept)[kept_c]) {
  const Vectors<rows> i = gates[0], f = gates[1];
  Vectors<rows> z, exp_o;
  const Vectors<rows> y = exp_tanh_exp(negative(f), gates[2], -gates[3], z, exp_o);
  Units<rows> u = load();
  const Masks<rows> padding = (i == -infinity) & (f == infinity);
  const Vectors<rows> carried = minus_logarithm_1p(at_most(f, 0.0f), y) + u.m;
  const Vectors<rows> margin = i - carried;
  const Masks<rows> reset = (u.n == 0.0f) | (margin >= 0.0f);
  const Vectors<rows> weight = exponential_up_to_89(choose(reset, at_most(-margin, slstm_max_log_keep), margin));
  const Vectors<rows> one_over_o = 1.0f + exp_o;
  Vectors<rows> c = u.c, n = u.n;
  advance(reset, weight, z, c, n);
  c = choose(padding, u.c, c), n = choose(padding, u.n, n);
  u.h = choose(padding, u.h, c / (n * one_over_o));
  u.c = c;
  u.n = n;
  u.m = choose(padding, u.m, choose(reset, i, carried));
  if constexpr (keeps) {
    kept[kept_margin] = choose(reset, -absolute(weight), absolute(weight));  // saves the backward its exp
    kept[kept_z] = z;
    kept[kept_o] = 1.0f / one_over_o;
    kept[kept_forget] = choose(padding, -1.0f, reciprocal(1.0f + y) * choose(f >= 0.0f, y, 1.0f));
  }
  return u;
}

inline int64_t padded_dim(int64_t dim) { return ceil_div(dim, int64_t{vector_lanes}) * vector_lanes; }

// --- rows ----------------------------------------------------------------------------------------------------------

// Blocks of 24 rows hide that each reads R from L2; where R does not fit L2, more rows share the reads.
constexpr int64_t most_rows = 96;
inline int64_t most_block_rows(const SlstmProblem& p) {
  return p.dim > 320 ? most_rows : operands_of(p) == Operands::floats ? 24 : 32;
}
// The fewest rows that are worth a block of their own: half a tile, or `least` of float32.
inline int64_t least_block_rows(const SlstmProblem& p, int64_t least) {
  return operands_of(p) == Operands::floats ? least : amx::tile_rows / 2;
}
// `each` rows a block, in whole tiles where rows fill more than one.
inline int64_t whole_tiles(const SlstmProblem& p, int64_t each) {
  const bool in_tiles = operands_of(p) != Operands::floats && each > amx::tile_rows;
  return in_tiles ? amx::padded(each, amx::tile_rows) : each;
}

// Some heads of a block of rows. All heads of a token lie in a page of memory or two, and the address of a page that
// was not used lately takes longer to look up than its lines to read. So heads whose R fits L2 walk tokens in turns.
struct Block {
  int64_t head, heads, first, rows;

  // Tokens of a turn: enough that x is several times as large as R, which is read again in the next turn.
  int64_t tokens(int64_t dim, int64_t longest) const { return heads == 1 ? longest : ceil_div(4 * dim, rows); }
};

// The most of the heads, a divisor of them, whose R takes up to 1 MiB.
inline int64_t heads_together(const SlstmProblem& p) {
  int64_t most = 1;
  for (int64_t x = 2; x <= p.heads && x * p.dim * p.dim <= int64_t{1} << 16; ++x) most = p.heads % x == 0 ? x : most;
  return most;
}

// The rows of each head in `parts` blocks of up to `each`, such that the blocks of all heads make every thread busy.
struct Blocks {
  explicit Blocks(const SlstmProblem& p) {
    const int64_t threads = thread_count();
    const int64_t most = most_block_rows(p);
    int64_t common = threads;  // their greatest common divisor
    for (int64_t rest = p.heads % threads; rest != 0;) {
      const int64_t next = common % rest;
      common = rest;
      rest = next;
    }
    const int64_t even = threads / common, useful = ceil_div(p.rows, least_block_rows(p, tile_rows));
    if (p.rows == 0) return;
    parts = ceil_div(ceil_div(p.rows, most), even) * even;
    parts = parts < useful ? parts : useful;
    each = whole_tiles(p, ceil_div(p.rows, parts));
    parts = ceil_div(p.rows, each);
    const int64_t fit = heads_together(p);
    for (int64_t x = 2; x <= fit; ++x) {
      if (fit % x == 0 && p.heads / x * parts % threads == 0) together = x;
    }
  }
  // Calls f(block) for each block.
  template <typename F>
  void run(const SlstmProblem& p, const F& f) const {
    parallel(p.heads / together * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % parts * each, left = p.rows - first;
        f(Block{.head = task / parts * together, .heads = together, .first = first, .rows = left < each ? left : each});
      }
    });
  }
  int64_t parts = 0, each = 0, together = 1;
};

// The rows of one block: where their tokens lie.
struct BlockRows {
  BlockRows(const SlstmProblem& p, int64_t first, int64_t count) : rows(new Row[count]) {
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = row_of(p, first + r);
      longest = rows[r].length > longest ? rows[r].length : longest;
    }
  }
  ~BlockRows() { delete[] rows; }
  BlockRows(const BlockRows&) = delete;
  BlockRows& operator=(const BlockRows&) = delete;
  const Row& operator[](int64_t r) const { return rows[r]; }
  int64_t longest = 0;
  Row* rows;
};

// Rows [first, end) that have a token t, in pairs where two of them lie side by side: f(Constant<1 or 2>, row).
template <typename F>
void for_active(const BlockRows& rows, int64_t t, int64_t first, int64_t end, const F& f) {
  for (int64_t r = first; r < end;) {
    if (t >= rows[r].length) {
      ++r;
    } else if (r + 1 < end && t < rows[r + 1].length) {
      f(Constant<2>{}, r);
      r += 2;
    } else {
      f(Constant<1>{}, r);
      ++r;
    }
  }
}

// One array of a block's state: a row of `padded` floats for each head and row, loaded from and stored to (rows, heads,
// dim). nullptr: loads zeros, stores nothing.
struct BlockState {
  BlockState(const SlstmProblem& p, const Block& block, const float* from)
      : p(p), block(block), padded(padded_dim(p.dim)), values(block.heads * block.rows * padded) {
    for (int64_t x = 0; from != nullptr && x < block.heads * block.rows; ++x) {
      std::memcpy(values.data() + x * padded, from + offset(x), p.dim * sizeof(float));
    }
  }
  void store(float* to) const {
    for (int64_t x = 0; to != nullptr && x < block.heads * block.rows; ++x) {
      std::memcpy(to + offset(x), values.data() + x * padded, p.dim * sizeof(float));
    }
  }
  // The block's rows of its head `head`.
  float* of(int64_t head) const { return values.data() + head * block.rows * padded; }

  const SlstmProblem& p;
  Block block;
  int64_t padded;
  Floats values;

 private:
  int64_t offset(int64_t x) const {
    return ((block.first + x % block.rows) * p.heads + block.head + x / block.rows) * p.dim;
  }
};

// What is kept of a row of the batch.
template <typename T>
T* kept_of(const SlstmProblem& p, T* kept, const Row& row, int64_t head) {
  return kept + (row.batch * p.heads + head) * slstm_kept_arrays(p.seq) * p.dim;
}

// b of one head, as a panel: the four gates of vector_lanes units, and so on.
void load_bias(float* to, const void* bias, DType dtype, int64_t heads, int64_t dim, int64_t head) {
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    const auto* from = static_cast<const typename Type::Bits*>(bias);
    for (int64_t first = 0; first < dim; first += vector_lanes, to += panel_columns) {
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t at = (gate * heads + head) * dim + first;
        store_vector(to + gate * vector_lanes, load_lanes<Type>(from + at, dim - first));
      }
    }
  });
}

// The four gates of up to vector_lanes units of x, of any dtype. A call, so that cells are compiled for float32 only.
__attribute__((noinline)) void load_gates(float* to, const void* from, DType dtype, int64_t stride, int64_t count) {
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    for (int64_t gate = 0; gate < 4; ++gate) {
      const auto* units = static_cast<const typename Type::Bits*>(from) + gate * stride;
      store_vector(to + gate * vector_lanes, load_lanes<Type>(units, count));
    }
  });
}

// --- forward -------------------------------------------------------------------------------------------------------

// A block's state, and what its heads share.
struct ForwardBlock {
  ForwardBlock(const SlstmForward& params, const Block& block)
      : params(params),
        block(block),
        rows(params.p, block.first, block.rows),
        h{{params.p, block, params.p.h0}, {params.p, block, params.p.h0}},
        c(params.p, block, params.p.c0),
        n(params.p, block, params.p.n0),
        m(params.p, block, params.p.m0),
        bias(block.heads * 4 * c.padded) {
    for (int64_t x = 0; x < block.heads; ++x) {
      load_bias(bias.data() + x * 4 * c.padded, params.p.bias, params.p.bias_dtype, params.p.heads, params.p.dim,
                block.head + x);
    }
  }
  const SlstmForward& params;
  const Block block;
  const BlockRows rows;
  const BlockState h[2], c, n, m;  // token t reads h[t % 2] and writes the other
  const Floats bias;
};

// Where a row's token lies.
struct TokenPlaces {
  const char* x;
  char* h;
  float* kept;
  bool is_there, is_first, has_next;  // first: of two tokens, before which c and n are kept. Next: to be fetched
};

// One token of rows [first, end) and units [unit, unit_end).
struct ForwardCells {
  const TokenPlaces* places;
  int64_t first, end, unit, unit_end, dim, padded, x_gate;
  DType dtype;
  const float* h_now;
  float *h_after, *c, *n, *m;
  const float *bias, *product;  // panels, of the first unit on; of the first row
  int64_t product_stride;
  int64_t next;  // from x to the next token's, in bytes: to be fetched where it is there
  bool stream_h, stream_kept;
  bool pair_units;  // of one row: two registers in step
};

struct Any {};
template <typename A, typename B>
constexpr bool same = false;
template <typename A>
constexpr bool same<A, A> = true;

// Registers of units in step: of `count` rows, or of one row, side by side.
enum class InStep { rows, units };

// `count` registers of units, the first of row `row` and units from `unit` on. Type: of x and h where registers are
// whole, else Any. A call: in a loop the compiler computes all addresses and constants before it, for which there are no
// registers.
template <bool keeps, typename Type, int count, InStep in_step = InStep::rows>
__attribute__((noinline)) void forward_unit(const ForwardCells& s, int64_t row, int64_t unit) {
  constexpr bool whole = !same<Type, Any>, along = in_step == InStep::units;
  constexpr int row_step = along ? 0 : 1, unit_step = along ? vector_lanes : 0;
  const int64_t state_step = along ? vector_lanes : s.padded, product_step = along ? panel_columns : s.product_stride;
  const TokenPlaces* const places = s.places + row;
  const int64_t at = row * s.padded + unit, left = whole ? vector_lanes : s.dim - unit;
  const DType dtype = same<Type, Float32> ? DType::float32 : same<Type, BFloat16> ? DType::bfloat16 : s.dtype;
  const int64_t bytes = element_bytes(dtype), gate_bytes = s.x_gate * bytes;
  const char* x_of[count];
  for (int x = 0; x < count; ++x) {
    const TokenPlaces& place = places[x * row_step];
    const int64_t first = unit + x * unit_step;
    x_of[x] = place.x + first * bytes;
    if (!place.has_next || first * bytes % 64 != 0) continue;
    const char* const next = x_of[x] + s.next;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + gate_bytes, 0, 2);
    __builtin_prefetch(next + 2 * gate_bytes, 0, 2);
    __builtin_prefetch(next + 3 * gate_bytes, 0, 2);
  }
  Vectors<count> gates[4], kept[kept_c];
  alignas(64) float converted[whole ? 1 : count][panel_columns];
  for (int x = 0; x < count && !whole; ++x) load_gates(converted[x], x_of[x], s.dtype, s.x_gate, left);
  const float* const biases = s.bias + (unit - s.unit) * 4;
  const float* const products = s.product + (row - s.first) * s.product_stride + (unit - s.unit) * 4;
  in_turn<count>([&](int x) IN_LAMBDA {
    const float *const product = products + x * product_step, *const bias = biases + x * 4 * unit_step;
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t place = gate * vector_lanes;
      Vector value;
      if constexpr (whole) {
        value = load_lanes<Type>(reinterpret_cast<const typename Type::Bits*>(x_of[x] + gate * gate_bytes), left);
      } else {
        value = load_vector(converted[x] + place);
      }
      gates[gate].v[x] = value + (load_vector(product + place) + load_vector(bias + place));
    }
  });
  const auto of_state = [&](const float* state) IN_LAMBDA {
    return each<count>([&](int x) IN_LAMBDA { return load_vector(state + at + x * state_step); });
  };
  const auto load = [&]() IN_LAMBDA {
    const Units<count> u{.h = of_state(s.h_now), .c = of_state(s.c), .n = of_state(s.n), .m = of_state(s.m)};
    if constexpr (keeps) {
      in_turn<count>([&](int x) IN_LAMBDA {
        const TokenPlaces& place = places[x * row_step];
        float* const to = place.kept + unit + x * unit_step;
        if (!place.is_first) return;
        stream_lanes(to - 2 * s.dim, u.c.v[x], left, s.stream_kept);
        stream_lanes(to - s.dim, u.n.v[x], left, s.stream_kept);
      });
    }
    return u;
  };
  const Units<count> u = slstm_cell<keeps>(gates, load, kept);
  in_turn<count>([&](int x) IN_LAMBDA {
    const TokenPlaces& place = places[x * row_step];
    const int64_t first = unit + x * unit_step, to = at + x * state_step;
    store_vector(s.h_after + to, u.h.v[x]);
    store_vector(s.c + to, u.c.v[x]);
    store_vector(s.n + to, u.n.v[x]);
    store_vector(s.m + to, u.m.v[x]);
    if constexpr (same<Type, BFloat16>) {
      store_lanes<BFloat16>(reinterpret_cast<uint16_t*>(place.h) + first, u.h.v[x], left);
    } else if (dtype == DType::float32) {
      stream_lanes(reinterpret_cast<float*>(place.h) + first, u.h.v[x], left, s.stream_h);
    }
    if constexpr (keeps) {
      for (int which = 0; which < kept_c; ++which) {
        stream_lanes(place.kept + which * s.dim + first, kept[which].v[x], left, s.stream_kept);
      }
    }
  });
}

template <bool keeps, typename Type>
void forward_cells(const ForwardCells& s) {
  for (int64_t row = s.first; row < s.end;) {
    const bool is_there = s.places[row].is_there, both = is_there && row + 1 < s.end && s.places[row + 1].is_there;
    for (int64_t unit = s.unit; is_there && unit < s.unit_end;) {
      constexpr int64_t lanes = vector_lanes;
      if (both) {
        forward_unit<keeps, Type, 2>(s, row, unit);
      } else if (!same<Type, Any> && s.pair_units && unit + 2 * lanes <= s.unit_end) {
        forward_unit<keeps, Type, 2, InStep::units>(s, row, unit);
        unit += lanes;
      } else {
        forward_unit<keeps, Type, 1>(s, row, unit);
      }
      unit += lanes;
    }
    row += both ? 2 : 1;
  }
}

// Tokens [begin, end) of the block's head `place`. After them token `next` of head `next_head` is walked.
template <bool keeps>
void forward_tokens(const ForwardBlock& all, const ForwardWeights& weights, int64_t place, int64_t begin, int64_t end,
                    int64_t next, int64_t next_head) {
  const SlstmForward& params = all.params;
  const SlstmProblem& p = params.p;
  const BlockRows& rows = all.rows;
  const int64_t dim = p.dim, heads = p.heads, bytes = element_bytes(p.dtype), count = all.block.rows;
  const int64_t head = all.block.head + place, padded = all.c.padded, x_seq = params.x_seq, x_gate = params.x_gate;
  HeadFloats panels(weights, head);
  const float* const bias = all.bias.data() + place * 4 * padded;
  float *const c = all.c.of(place), *const n = all.n.of(place), *const m = all.m.of(place);
  const float* h_now = all.h[begin % 2].of(place);
  float* h_after = all.h[1 - begin % 2].of(place);
  alignas(64) float recurrent[tile_rows * 2 * panel_columns];
  const char* ahead[tile_rows * 2 * 4];
  const int64_t elements = p.batch * p.seq * heads * dim;
  const bool stream_h = streams(params.h, elements * 4, dim);
  const bool stream_kept = streams(params.kept, elements * kept_c * 4, dim);
  // 0.97 of the time on Xeons with AMX at 1 x 64, 4 x 128, 1.03 to 1.05 on an AMD EPYC.
  const bool pair_units = has_amx();
  TokenPlaces places[most_rows];
  // Where a row's arrays begin, kept: of the batch's row. To multiply sizes for each token takes longer than a cell.
  struct Begin {
    const char* x;
    char* h;
    float* kept;
    int64_t start, length;
  };
  Begin begins[most_rows];
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const int64_t x_at = row.batch * params.x_batch + row.start * x_seq + head * params.x_head;
    const int64_t h_at = ((row.batch * p.seq + row.start) * heads + head) * dim;
    begins[r] = {.x = static_cast<const char*>(params.x) + x_at * bytes,
                 .h = static_cast<char*>(params.h) + h_at * bytes,
                 .kept = keeps ? kept_of(p, params.kept, row, head) : nullptr,
                 .start = row.start,
                 .length = row.length};
  }
  const int64_t x_step = x_seq * bytes, h_step = heads * dim * bytes;

  const int64_t groups = weights.groups;
  // Rows whose products are made at once.
  const Operands operands = weights.operands;
  const bool products_first = operands != Operands::floats;
  const int64_t chunks = ceil_div(count, int64_t{tile_rows});
  const int64_t least = count / chunks, more = count % chunks;
  // All of a token's products are made before its cells: a product of tiles slows down the multiplications that follow
  // it, and one of pairs takes more rows at a time than a panel's sums have registers for.
  LeftParts left_parts(operands == Operands::parts ? count : 0, dim, weights.range(head));
  const Parts left_halves(operands == Operands::halves ? amx::packed_size(count, dim, 1) : 0);
  const int64_t product_stride = groups * panel_columns;
  const Floats products(products_first ? count * product_stride : 0, false);
  const auto multiply_parts = [&] {
    left_parts.pack(h_now, padded);
    for (int64_t group = 0; group < groups; ++group) {
      float* const out = products.data() + group * panel_columns;
      const uint16_t* const right = weights.parts_of(head) + group * weights.panel_parts;
      amx::multiply_floats(out, product_stride, false, left_parts.parts.at(0), right, count, panel_columns, dim);
    }
    left_parts.for_outside(0, count, [&](int64_t from, int64_t to) {
      product(to - from, product_stride,
              {.out = products.data() + from * product_stride,
               .out_stride = product_stride,
               .a = h_now + from * padded,
               .a_row = padded,
               .a_k = 1,
               .m = panels.data(),
               .m_panel = weights.panel,
               .depth = dim,
               .add = false});
    });
  };
  // Lines of x that are fetched side by side: memory likes them, but with few groups the cells read them too soon.
  const int64_t run = groups > 4 && groups % 4 == 0 ? 4 : 1;
  // Where L1 has room for one panel, but not for two, the one at the turn is alone, and the next token finds it there.
  const bool turns = weights.panel > 5 << 10 && weights.panel <= 10 << 10;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t after = t + 1 < end ? t + 1 : next, after_head = t + 1 < end ? head : next_head;
    const int64_t to_after = ((after - t) * x_seq + (after_head - head) * params.x_head) * bytes;  // from x on
    for (int64_t r = 0; r < count; ++r) {
      const int64_t token = begins[r].start + t;
      places[r] = {.x = begins[r].x + t * x_step,
                   .h = begins[r].h + t * h_step,
                   .kept = keeps ? begins[r].kept + slstm_kept_at(token) * dim : nullptr,
                   .is_there = t < begins[r].length,
                   .is_first = token % 2 == 0,
                   .has_next = products_first && after < begins[r].length};
    }
    if (operands == Operands::parts) multiply_parts();
    if (operands == Operands::halves) {
      amx::pack_left(left_halves.at(0), h_now, padded, false, count, dim, 1, nullptr);
      multiply_halves(products.data(), false, left_halves.at(0), weights.parts_of(head), count, product_stride, dim);
    }
    // Units [unit, unit_end), of rows [row, row + tile), whose products begin at `product`.
    const auto walk_cells = [&](int64_t row, int64_t tile, int64_t unit, int64_t unit_end, const float* product,
                                int64_t stride) {
      ForwardCells cells{.places = places,
                         .first = row,
                         .end = row + tile,
                         .unit = unit,
                         .unit_end = unit_end,
                         .dim = dim,
                         .padded = padded,
                         .x_gate = x_gate,
                         .dtype = p.dtype,
                         .h_now = h_now,
                         .h_after = h_after,
                         .c = c,
                         .n = n,
                         .m = m,
                         .bias = bias + unit * 4,
                         .product = product,
                         .product_stride = stride,
                         .next = to_after,
                         .stream_h = stream_h,
                         .stream_kept = stream_kept,
                         .pair_units = pair_units};
      if (dim % vector_lanes == 0 && p.dtype == DType::bfloat16) return forward_cells<keeps, BFloat16>(cells);
      const int64_t whole = unit_end <= dim ? unit_end : dim / vector_lanes * vector_lanes;
      if (p.dtype == DType::float32 && whole > unit) {
        cells.unit_end = whole;
        forward_cells<keeps, Float32>(cells);
        cells.product += (whole - unit) * 4;
        cells.bias += (whole - unit) * 4;
        cells.unit = whole;
        cells.unit_end = unit_end;
      }
      if (cells.unit < unit_end) forward_cells<keeps, Any>(cells);
    };
    if (products_first) walk_cells(0, count, 0, padded, products.data(), product_stride);
    // Back and forth, as the panels last used lie in L1.
    const bool forth = t % 2 == 0;
    for (int64_t done = 0; !products_first && done < groups;) {
      const bool end = turns && (done == 0 || done + 1 == groups);
      const int64_t pair = count <= paired_rows && done + 2 <= groups && !end ? 2 : 1;
      const int64_t group = forth ? done : groups - done - pair;
      int64_t offsets[2 * 4], offset_count = 0;  // the next token's cache lines, in the order in which it reads them
      const int64_t last = groups - group - pair;
      for (int64_t place = 4 * last; place < 4 * (last + pair); ++place) {
        const int64_t gate = place / run % 4, unit = (place / (4 * run) * run + place % run) * vector_lanes;
        if (unit * bytes % 64 == 0) offsets[offset_count++] = to_after + (gate * x_gate + unit) * bytes;
      }
      for (int64_t chunk = 0, row = 0; chunk < chunks; ++chunk) {
        const int64_t tile = least + (chunk < more);
        int64_t lines = 0;
        for (int64_t r = row; r < row + tile && after < rows[r].length; ++r) {
          for (int64_t line = 0; line < offset_count; ++line) ahead[lines++] = places[r].x + offsets[line];
        }
        const Product here{.out = recurrent,
                           .out_stride = pair * panel_columns,
                           .a = h_now + row * padded,
                           .a_row = padded,
                           .a_k = 1,
                           .m = panels.data() + group * weights.panel,
                           .m_panel = weights.panel,
                           .depth = dim,
                           .add = false,
                           .ahead = {ahead, lines}};
        if (pair == 2) {
          product_rows<2, panel_vectors>(tile, here);
        } else {
          product_rows<1, panel_vectors>(tile, here);
        }
        walk_cells(row, tile, group * vector_lanes, (group + pair) * vector_lanes, recurrent, pair * panel_columns);
        row += tile;
      }
      done += pair;
    }
    for (int64_t r = 0; r < count; ++r) {  // ended, so its state stays
      if (t >= rows[r].length) {
        std::memcpy(h_after + r * padded, h_now + r * padded, padded * sizeof(float));
      } else if (p.dtype == DType::float16 || (p.dtype == DType::bfloat16 && dim % vector_lanes != 0)) {
        unpack(places[r].h, p.dtype, dim, h_after + r * padded, nullptr, 1, dim);
      }
    }
    float* const before = const_cast<float*>(h_now);
    h_now = h_after;
    h_after = before;
  }
}

// `weights` nullptr: each head's are packed when its tokens are walked, all in one turn.
template <bool keeps>
void forward_block(const SlstmForward& params, const ForwardWeights* weights, const Block& block) {
  const ForwardBlock all(params, block);
  const int64_t longest = all.rows.longest, turn = block.tokens(params.p.dim, longest);
  const TilesInUse tiles(operands_of(params.p));
  for (int64_t begin = 0; begin < longest; begin += turn) {
    const int64_t end = longest - begin < turn ? longest : begin + turn;
    for (int64_t x = 0; x < block.heads; ++x) {
      const bool last = x + 1 == block.heads;
      const auto walk = [&](const ForwardWeights& weights) {
        forward_tokens<keeps>(all, weights, x, begin, end, last ? end : begin, block.head + (last ? 0 : x + 1));
      };
      if (weights == nullptr) {
        walk(ForwardWeights(params.p, {block.head + x, 1}));
      } else {
        walk(*weights);
      }
    }
  }
  end_streams();
  all.h[longest % 2].store(params.h_last);
  all.c.store(params.c_last);
  all.n.store(params.n_last);
  all.m.store(params.m_last);
}

// --- backward ------------------------------------------------------------------------------------------------------

VECTORS_FUNCTION clipped(const Vectors<count>& x, float clip) { return at_least(at_most(x, clip), -clip); }

// exp(log_keep) and exp(log_take), of which one is 1.
template <int rows>
struct Weights {
  Masks<rows> reset;
  Vectors<rows> keep, take;
};
template <int rows>
IN_LOOPS Weights<rows> weights_of(const Masks<rows>& reset, const Vectors<rows>& weight) {
  return {.reset = reset, .keep = choose(reset, weight, 1.0f), .take = choose(reset, 1.0f, weight)};
}

// Where the arrays of a row's token lie. c and n are those before it, or before the first of two tokens where this is
// the second.
struct CellPlaces {
  const float *kept, *c, *n;
  const float* dh;  // nullptr: zeros
  float* dx;        // nullptr: written elsewhere
  bool second;
};

template <bool whole>
IN_LOOPS Vectors<1> load_unit(const float* from, int64_t left) {
  return {load_lanes<Float32>(from, whole ? vector_lanes : left)};
}

// c and n after a token from those before it.
template <bool whole = false>
IN_LOOPS void walk(const float* kept, int64_t dim, int64_t unit, int64_t left, Vectors<1>& c, Vectors<1>& n) {
  const auto load = [&](SlstmKept which) IN_LAMBDA { return load_unit<whole>(kept + which * dim + unit, left); };
  const Vectors<1> margin = load(kept_margin), z = load(kept_z);
  const Masks<1> padding = load(kept_forget) < 0.0f;
  const Vectors<1> c_before = c, n_before = n;
  advance(is_negative(margin), absolute(margin), z, c, n);
  c = choose(padding, c_before, c), n = choose(padding, n_before, n);
}

// c and n before a token.
template <bool whole = false>
IN_LOOPS void load_before(const CellPlaces& from, int64_t dim, int64_t unit, int64_t left, Vectors<1>& c,
                          Vectors<1>& n) {
  c = load_unit<whole>(from.c + unit, left), n = load_unit<whole>(from.n + unit, left);
  if (from.second) walk<whole>(from.kept - kept_c * dim, dim, unit, left, c, n);
}

// One token of some rows.
struct BackwardCells {
  const CellPlaces* places;
  int64_t dim, padded;
  float *dh, *dc, *dn, *excess;
  const float* recurrent;
  float* dx;
  int64_t dx_stride;
  GateOrder order;
  int64_t dx_gate;
  float clip;
  bool stream;

  // From row `row` on. A copy: the compiler knows that no store changes it.
  BackwardCells from(int64_t row) const {
    BackwardCells s = *this;
    s.places += row, s.dx += row * dx_stride;
    for (auto state : {&BackwardCells::dh, &BackwardCells::dc, &BackwardCells::dn, &BackwardCells::excess}) {
      s.*state += row * padded;
    }
    s.recurrent += row * padded;
    return s;
  }
};

// emit(gates): takes the gradients of the pre-activations.
template <bool whole, int rows, typename Emit>
IN_LOOPS void backward_unit(const BackwardCells& s, const CellPlaces (&places)[rows], int64_t unit, int64_t left,
                            const Emit& emit) {
  using Values = Vectors<rows>;
  const auto load = [&](SlstmKept which) IN_LAMBDA {
    return each<rows>([&](int x)
                          IN_LAMBDA { return load_unit<whole>(places[x].kept + which * s.dim + unit, left).v[0]; });
  };
  const auto state = [&](const float* from) IN_LAMBDA {
    return each<rows>([&](int x) IN_LAMBDA { return load_vector(from + x * s.padded + unit); });
  };
  const auto store = [&](float* to, const Values& values) IN_LAMBDA {
    in_turn<rows>([&](int x) IN_LAMBDA { store_vector(to + x * s.padded + unit, values.v[x]); });
  };
  Values c_0, n_0;
  in_turn<rows>([&](int x) IN_LAMBDA {
    Vectors<1> c, n;
    load_before<whole>(places[x], s.dim, unit, left, c, n);
    c_0.v[x] = c.v[0], n_0.v[x] = n.v[0];
  });
  const Values margin = load(kept_margin), z = load(kept_z), o = load(kept_o), forget = load(kept_forget);
  Values dh_t = state(s.dh) + clipped(state(s.recurrent), s.clip);
  if (places[0].dh != nullptr) {
    dh_t = dh_t + each<rows>([&](int x) IN_LAMBDA { return load_unit<whole>(places[x].dh + unit, left).v[0]; });
  }
  const Values dc_t = state(s.dc), dn_t = state(s.dn), excess_t = state(s.excess);
  const Masks<rows> padding = forget < 0.0f;
  const Weights<rows> w = weights_of(is_negative(margin), absolute(margin));
  Values c = c_0, n = n_0;
  advance(w.reset, absolute(margin), z, c, n);  // of padding these do not count
  const Values inverse = 1.0f / n, ratio = c * inverse, through = dh_t * o * inverse;
  const Values dc_all = dc_t + through, dn_all = dn_t - through * ratio;
  const Values into_take = (dc_all * z + dn_all) * w.take, into_keep = multiply_add(dc_all, c_0, dn_all * n_0) * w.keep;
  // All before the stores, in one piece: pairs of rows and single ones have to round alike.
  const Values gates[4] = {into_take + choose(w.reset, excess_t, 0.0f),
                           (into_keep + choose(w.reset, 0.0f, excess_t)) * forget, dc_all * w.take * (1.0f - z * z),
                           dh_t * ratio * o * (1.0f - o)};
  const Values masked[4] = {choose(padding, 0.0f, gates[0]), choose(padding, 0.0f, gates[1]),
                            choose(padding, 0.0f, gates[2]), choose(padding, 0.0f, gates[3])};
  emit(masked);
  store(s.dh, choose(padding, dh_t, 0.0f));
  store(s.dc, choose(padding, dc_t, w.keep * dc_all));
  store(s.dn, choose(padding, dn_t, w.keep * dn_all));
  store(s.excess, choose(padding, excess_t, choose(w.reset, 0.0f, excess_t)));
}

template <bool whole, int rows>
IN_LOOPS void stream_dx(const BackwardCells& s, const CellPlaces (&places)[rows], int64_t unit, int64_t left,
                        const Vectors<rows> (&gates)[4]) {
  const auto gate = [&](int gate) IN_LAMBDA {
    in_turn<rows>([&](int x) IN_LAMBDA {
      if (places[x].dx == nullptr) return;
      stream_lanes(places[x].dx + gate * s.dx_gate + unit, gates[gate].v[x], whole ? vector_lanes : left, s.stream);
    });
  };
  gate(0);
  gate(1);
  gate(2);
  gate(3);
}
// Cells that leave dx in its slots.
template <bool whole, int rows>
IN_LOOPS void backward_unit(const BackwardCells& s, const CellPlaces (&places)[rows], int64_t unit, int64_t left) {
  backward_unit<whole>(s, places, unit, left, [&](const Vectors<rows>(&gates)[4]) IN_LAMBDA {
    const auto gate = [&](int gate) IN_LAMBDA {
      float* const to = s.dx + s.order(gate, unit);
      in_turn<rows>([&](int x) IN_LAMBDA {
        store_lanes<Float32>(to + x * s.dx_stride, gates[gate].v[x], whole ? vector_lanes : left);
      });
    };
    gate(0);
    gate(1);
    gate(2);
    gate(3);
    stream_dx<whole>(s, places, unit, left, gates);
  });
}

// The last units, fewer than a register. One copy of the code for pairs of rows and single ones, so that both round
// alike.
__attribute__((noinline)) void backward_rest(const BackwardCells& all, int64_t row, int64_t unit) {
  const BackwardCells s = all.from(row);
  const CellPlaces places[1] = {s.places[0]};
  backward_unit<false>(s, places, unit, s.dim - unit);
}

template <int rows>
__attribute__((noinline)) void backward_cells(const BackwardCells& all, int64_t row) {
  const BackwardCells s = all.from(row);
  CellPlaces places[rows];
  for (int x = 0; x < rows; ++x) places[x] = s.places[x];
  int64_t unit = 0;
  for (; unit + vector_lanes <= s.dim; unit += vector_lanes) backward_unit<true>(s, places, unit, vector_lanes);
  for (int x = 0; unit < s.dim && x < rows; ++x) backward_rest(all, row + x, unit);
}

// dx of a tile's 16 rows, packed in three parts (amx.h) as R^T's left operand, and what of it tiles can hold.
struct CellParts {
  uint16_t* left;
  int64_t part;
  float* dbias;
  amx::Seen* seen;
};

#if defined(__AVX512F__)
// Of two rows, 8 apart, and a register of units. Pairs are two gates.
IN_LOOPS void put_parts(const CellParts& to, int64_t row, int64_t unit, const Vectors<2> (&gates)[4], __m512i& least,
                        __m512i& most) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000)),
                magnitude = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1);
  __m512 rest[4][2];
#pragma GCC unroll 4
  for (int gate = 0; gate < 4; ++gate) {
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      rest[gate][x] = (__m512)gates[gate].v[x];
      const __m512i bits = _mm512_and_si512(_mm512_castps_si512(rest[gate][x]), magnitude);
      least = _mm512_min_epu32(least, _mm512_sub_epi32(bits, one));
      most = _mm512_max_epu32(most, bits);
    }
  }
  const auto pair = [](__m512i low, __m512i high)
                        IN_LAMBDA { return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high); };
  uint16_t* left = to.left + unit / 16 * 1024 + row * 32;
#pragma GCC unroll 3
  for (int part = 0; part < 3; ++part, left += to.part) {
    __m512i bits[4][2];
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        bits[gate][x] = _mm512_castps_si512(rest[gate][x]);
        if (part == 2) continue;  // nothing is left to round
        bits[gate][x] = _mm512_add_epi32(bits[gate][x], half);
        rest[gate][x] = _mm512_sub_ps(rest[gate][x], _mm512_castsi512_ps(_mm512_and_si512(bits[gate][x], upper)));
      }
    }
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      _mm512_storeu_si512(left + x * 256, pair(bits[0][x], bits[1][x]));
      _mm512_storeu_si512(left + x * 256 + 512, pair(bits[2][x], bits[3][x]));
    }
  }
}

// Cells of a tile's 16 rows, all of which are there.
__attribute__((noinline)) void backward_tile_cells(const BackwardCells& all, int64_t first, const CellParts to) {
  __m512i least = _mm512_set1_epi32(-1), most = _mm512_setzero_si512();
  for (int64_t row = 0; row < 8; ++row) {
    BackwardCells s = all.from(first + row);
    const CellPlaces places[2] = {s.places[0], s.places[8]};
    s.padded *= 8;  // to the second of the two rows
    for (int64_t unit = 0; unit < s.dim; unit += vector_lanes) {
      backward_unit<true>(s, places, unit, vector_lanes, [&](const Vectors<2>(&gates)[4]) IN_LAMBDA {
        stream_dx<true>(s, places, unit, vector_lanes, gates);
        float* const dbias = to.dbias + s.order(0, unit);
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) {
          float* const sum = dbias + gate * vector_lanes;
          store_vector(sum, load_vector(sum) + (gates[gate].v[0] + gates[gate].v[1]));
        }
        put_parts(to, row, unit, gates, least, most);
      });
    }
  }
  _mm512_store_si512(to.seen->least, least);
  _mm512_store_si512(to.seen->most, most);
}
#else
void backward_tile_cells(const BackwardCells&, int64_t, const CellParts&) {}  // there are no tiles
#endif

// Adds the block's share of dR and db to `share`, of which dR has none yet unless `begun`.
void backward_block(const SlstmBackward& params, const BackwardWeights& weights, int64_t head, int64_t first,
                    int64_t count, float* share, bool& begun) {
  const SlstmProblem& p = params.p;
  const int64_t dim = p.dim, heads = p.heads, wide = 4 * dim, bytes = element_bytes(p.dtype);
  const bool is_float = p.dtype == DType::float32;
  const float clip = params.clip;
  const BlockRows rows(p, first, count);
  const Block block{.head = head, .heads = 1, .first = first, .rows = count};
  const BlockState dh(p, block, params.dh_last), dc(p, block, params.dc_last), dn(p, block, params.dn_last),
      excess(p, block, params.dm_last), recurrent(p, block, nullptr);
  const int64_t padded = dh.padded;
  const GateOrder order = weights.order;
  // dx and h of some tokens, the operands of dR: as many of a row's sums at a time as a panel in L1 has room for. Of rows
  // whose cells pack dx there is none in its slots.
  const Operands operands = weights.operands;
  const bool tiles = operands == Operands::parts, halves = operands == Operands::halves;
  const int64_t slot_rows = tiles ? amx::padded(count, amx::tile_rows) : count,
                most_depth = tiles ? amx::turned_depth : 128;
  const int64_t slots = slot_rows < most_depth ? most_depth / slot_rows : 1, depth = slots * slot_rows;
  const int64_t dx_stride = wide + 16;  // spreads an output's floats over L1's sets
  // Zeros where a slot has more rows than the block, and until a shorter row's last token.
  const Floats dx_slots(depth * dx_stride, slot_rows > count || p.cu_seqlens != nullptr), zeros(padded);
  const Floats h_slots(tiles && is_float ? 0 : depth * padded, !tiles);
  float* dx = dx_slots.data();
  const bool stream = streams(params.dx, p.batch * p.seq * heads * dim * 16, dim);
  const Floats converted(is_float ? 0 : (count + 1) * dim, false);  // dh of a token, and h of a row

  // As in forward_tokens.
  struct Begin {
    const char *dh, *h;
    char* dx;
    const float* kept;
    int64_t start, length;
  };
  Begin begins[most_rows];
  for (int64_t r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const int64_t token = row.batch * p.seq + row.start;
    const int64_t dh_at = row.batch * params.dh_batch + row.start * params.dh_seq + head * params.dh_head;
    begins[r] = {.dh = static_cast<const char*>(params.dh) + dh_at * bytes,
                 .h = static_cast<const char*>(params.h) + (token * heads + head) * dim * bytes,
                 .dx = static_cast<char*>(params.dx) + (token * 4 * heads + head) * dim * bytes,
                 .kept = kept_of(p, params.kept, row, head),
                 .start = row.start,
                 .length = row.length};
  }
  const int64_t dh_step = params.dh_seq * bytes, h_step = heads * dim * bytes;
  const auto dh_of = [&](int64_t r, int64_t t) { return begins[r].dh + t * dh_step; };
  const auto dx_of = [&](int64_t r, int64_t t) { return begins[r].dx + t * 4 * h_step; };
  const auto h_before = [&](int64_t r, int64_t t) { return begins[r].h + (t - 1) * h_step; };

  const auto initial = [&](const float* from, int64_t r) {
    return from == nullptr ? zeros.data() : from + ((first + r) * heads + head) * dim;
  };
  CellPlaces places[most_rows];
  const auto place = [&](int64_t r, int64_t t) {
    const int64_t token = begins[r].start + t;
    const float* const pair = begins[r].kept + slstm_kept_pair(token) * dim;
    const float* given = nullptr;
    if (params.dh != nullptr)
      given = is_float ? reinterpret_cast<const float*>(dh_of(r, t)) : converted.data() + r * dim;
    places[r] = {.kept = pair + (2 + token % 2 * kept_c) * dim,
                 .c = t > 0 ? pair : initial(p.c0, r),
                 .n = t > 0 ? pair + dim : initial(p.n0, r),
                 .dh = given,
                 .dx = is_float ? reinterpret_cast<float*>(dx_of(r, t)) : nullptr,
                 .second = token % 2 != 0 && t > 0};
  };
  // excess -= or += dc c + dn n, of the last or the initial state
  const auto change_excess = [&](int64_t r, bool last) {
    if (last && rows[r].length > 0) place(r, rows[r].length - 1);
    for (int64_t unit = 0; unit < dim; unit += vector_lanes) {
      Vectors<1> c, n;
      if (last && rows[r].length > 0) {
        load_before(places[r], dim, unit, dim - unit, c, n);
        walk(places[r].kept, dim, unit, dim - unit, c, n);
      } else {
        c = {load_lanes<Float32>(initial(p.c0, r) + unit, dim - unit)};
        n = {load_lanes<Float32>(initial(p.n0, r) + unit, dim - unit)};
      }
      const auto state = [&](const BlockState& s) { return s.of(0) + r * padded + unit; };
      const Vector change = load_vector(state(dc)) * c.v[0] + load_vector(state(dn)) * n.v[0];
      const Vector before = load_vector(state(excess));
      store_vector(state(excess), last ? before - change : before + change);
    }
  };
  // h before token t of row r, as row k of dR's right operand or, on tiles, of those to be packed; a row without the token
  // has no share.
  const float* h_rows[amx::turned_depth];
  for (const float*& row : h_rows) row = zeros.data();
  const auto take_h = [&](int64_t k, int64_t t, int64_t r) {
    const int64_t length = begins[r].length;
    const float* h = nullptr;
    if (t == 0 && length > 0 && p.h0 != nullptr) {
      h = p.h0 + ((first + r) * heads + head) * dim;
    } else if (t > 0 && t < length) {
      h = reinterpret_cast<const float*>(h_before(r, t));
      if (!is_float) {
        float* const to = tiles ? h_slots.data() + k * padded : converted.data() + count * dim;
        pack(to, h, p.dtype, dim, 1, dim, 1);
        h = to;
      }
    }
    if (tiles) h_rows[amx::depth_of(k)] = h == nullptr ? zeros.data() : h;
    for (int64_t unit = 0; !tiles && unit < dim; unit += vector_lanes) {
      const int64_t panel = unit / panel_columns, left = padded - panel * panel_columns;
      const int64_t columns = left < panel_columns ? left : panel_columns;
      const Vector value = h == nullptr ? Vector{} : load_lanes<Float32>(h + unit, dim - unit);
      store_vector(h_slots.data() + panel * depth * panel_columns + k * columns + unit % panel_columns, value);
    }
  };
  LeftParts left_parts(tiles ? depth : 0, wide, weights.range(head));
  const Parts left_halves(halves ? amx::packed_size(count, wide, 1) : 0);
  const Parts right_halves(halves ? amx::packed_size(wide, depth, 1) : 0),
      h_parts(packed_size(operands, padded, depth));
  amx::Range seen;  // of dx in dR's operand
  // dx of row r's token t, back to its slot.
  const auto take_dx = [&](int64_t k, int64_t t, int64_t r) {
    float* const to = dx_slots.data() + k * dx_stride;
    const float* const from = reinterpret_cast<const float*>(dx_of(r, t));
    for (int64_t gate = 0; gate < 4; ++gate) {
      for (int64_t unit = 0; unit < dim; unit += vector_lanes) {
        std::memcpy(to + order(gate, unit), from + gate * heads * dim + unit, vector_lanes * sizeof(float));
      }
    }
  };
  // What the token before token t needs of dh and h, and half of what is kept of two tokens before that. Where rows are
  // as long as one another, lines move by the same steps from token to token.
  const int64_t half_kept = (1 + kept_c) * dim * 4;
  const int64_t pieces[3] = {params.dh == nullptr ? 0 : ceil_div(dim * bytes, int64_t{64}),
                             ceil_div(dim * bytes, int64_t{64}), ceil_div(half_kept, int64_t{64})};
  const char** const ahead = new const char*[count * (pieces[0] + pieces[1] + pieces[2])];
  int64_t fetched = -1;  // this token's and the one's before it
  int64_t listed = -1;   // the token of which `ahead` has the lines
  const auto list = [&](int64_t t) {
    const char** to = ahead;
    for (int piece = 0; piece < (t > 1 ? 3 : 1); ++piece) {
      for (int64_t r = 0; r < count; ++r) {
        if (t > begins[r].length) continue;
        const char* const from =
            piece == 0   ? dh_of(r, t - 1)
            : piece == 1 ? h_before(r, t - 1)
                         : reinterpret_cast<const char*>(begins[r].kept) + (begins[r].start + t - 2) * half_kept;
        for (int64_t x = 0; x < pieces[piece]; ++x) *to++ = from + 64 * x;
      }
    }
    return to - ahead;
  };
  const auto move = [&](const char** from, int64_t lines, int64_t step) {
    for (int64_t x = 0; x < lines; ++x) from[x] -= step;
  };
  const auto lines_of = [&](int64_t t) {
    if (t == 0) return Lines{};
    const bool moves = p.cu_seqlens == nullptr && listed == t + 1 && t > 1;
    listed = t;
    if (!moves) return Lines{ahead, list(t)};
    const int64_t of_dh = count * pieces[0], of_h = count * pieces[1], of_kept = count * pieces[2];
    move(ahead, of_dh, dh_step);
    move(ahead + of_dh, of_h, h_step);
    move(ahead + of_dh + of_h, of_kept, half_kept);
    return Lines{ahead, of_dh + of_h + of_kept};
  };
  // Tokens' share of dR on tiles, transposed: h is smaller to transpose than dx.
  const auto add_on_tiles = [&](int64_t filled, Lines lines) {
    for (int64_t k = filled; k < depth; ++k) h_rows[amx::depth_of(k)] = zeros.data();
    const amx::Range h_range = amx::pack_left_floats(h_parts.at(0), h_rows, dim, depth);
    const bool exact = amx::is_exact(h_range, seen);
    seen = {};
    if (exact) {
      amx::multiply_turned_floats(share, wide, begun, h_parts.at(0), depth, left_parts.parts.at(0), dim, wide, filled,
                                  lines);
      begun = true;
    }
    return exact;
  };
  const auto add_halves = [&](int64_t filled) {
    for (int64_t unit = 0; unit < padded; unit += panel_columns) {
      const int64_t columns = padded - unit < panel_columns ? padded - unit : panel_columns;
      uint16_t* const to = h_parts.at(amx::packed_size(unit, filled, 1));
      amx::pack_left(to, h_slots.data() + unit * depth, columns, true, columns, filled, 1, nullptr);
    }
    amx::pack_right(right_halves.at(0), dx_slots.data(), dx_stride, false, filled, wide, nullptr);
    multiply_halves(share, begun, h_parts.at(0), right_halves.at(0), dim, wide, filled);
    begun = true;
  };
  // h as products in float32 read it: its rows are dx's.
  const auto order_h = [&](float* to) {
    for (int64_t unit = 0; unit < padded; unit += panel_columns) {
      const int64_t columns = padded - unit < panel_columns ? padded - unit : panel_columns;
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(to + unit * depth + k * columns, h_rows[amx::depth_of(k)] + unit, columns * sizeof(float));
      }
    }
  };
  float* const dbias = share + wide * padded;
  // Of rows [k, end) of dx, a few at a time: they are read along the rows.
  const auto add_dbias = [&](int64_t k, int64_t end) {
    constexpr int64_t together = 16;
    for (; k < end; k += together) {
      for (int64_t x = 0; x < wide; x += vector_lanes) {
        Vector sum = load_lanes<Float32>(dbias + x, wide - x);
        for (int64_t r = k; r < k + together && r < end; ++r) sum += load_vector(dx_slots.data() + r * dx_stride + x);
        store_lanes<Float32>(dbias + x, sum, wide - x);
      }
    }
  };
  // Up to slot `last`, which is token t's.
  const auto add_share = [&](int64_t last, int64_t t) {
    const int64_t filled = (last + 1) * slot_rows;
    if (halves) return add_halves(filled);
    if (!tiles) add_dbias(0, filled);
    if (tiles && t > 0) fetched = t;
    if (tiles && add_on_tiles(filled, t > 0 ? lines_of(t - 1) : Lines{})) return;
    for (int64_t slot = 0; order.in_cells && slot <= last; ++slot) {
      for (int64_t r = 0; r < count; ++r) {
        if (t + last - slot < rows[r].length) take_dx(slot * slot_rows + r, t + last - slot, r);
      }
    }
    const Floats ordered(tiles ? depth * padded : 0, false), outside(tiles ? wide * padded : 0, false);
    if (tiles) order_h(ordered.data());
    product(wide, dim,
            {.out = tiles ? outside.data() : share,
             .out_stride = padded,
             .a = dx_slots.data(),
             .a_row = 1,
             .a_k = dx_stride,
             .m = tiles ? ordered.data() : h_slots.data(),
             .m_panel = depth * panel_columns,
             .depth = filled,
             .add = begun && !tiles});
    for (int64_t x = 0; tiles && x < wide * dim; ++x) {
      const float sum = outside.data()[x % wide * padded + x / wide];
      share[x] = begun ? share[x] + sum : sum;
    }
    begun = true;
  };

  HeadFloats panels(weights, head);
  const TilesInUse in_use(operands);
  // Without these gradients nothing changes, and of a row c and n after its last token need not be made.
  const bool of_last = params.dc_last != nullptr || params.dn_last != nullptr;
  for (int64_t r = 0; of_last && r < count; ++r) change_excess(r, true);
  for (int64_t t = rows.longest - 1, slot = 0; t >= 0; --t, ++slot) {
    if (slot == slots) slot = 0;
    dx = dx_slots.data() + slot * slot_rows * dx_stride;
    for (int64_t r = 0; !is_float && params.dh != nullptr && r < count; ++r) {
      if (t < rows[r].length) pack(converted.data() + r * dim, dh_of(r, t), p.dtype, dim, 1, dim, 1);
    }
    for (int64_t r = 0; r < count; ++r) place(r, t);
    const BackwardCells cells{.places = places,
                              .dim = dim,
                              .padded = padded,
                              .dh = dh.of(0),
                              .dc = dc.of(0),
                              .dn = dn.of(0),
                              .excess = excess.of(0),
                              .recurrent = recurrent.of(0),
                              .dx = dx,
                              .dx_stride = dx_stride,
                              .order = order,
                              .dx_gate = heads * dim,
                              .clip = clip,
                              .stream = stream};
    const auto walk_cells = [&](int64_t begin, int64_t end) {
      for_active(rows, t, begin, end, [&](auto some, int64_t r) { backward_cells<decltype(some)::value>(cells, r); });
    };
    const auto unpack_dx = [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; !is_float && r < end; ++r) {
        if (t < rows[r].length) unpack(dx_of(r, t), p.dtype, heads * dim, dx + r * dx_stride, nullptr, 4, dim);
      }
    };
    if (!tiles) {
      walk_cells(0, count);
      unpack_dx(0, count);
    }
    for (int64_t first = 0; tiles && first < count; first += amx::tile_rows) {
      const int64_t end = first + amx::tile_rows < count ? first + amx::tile_rows : count,
                    at = slot * slot_rows + first;
      bool in_cells = order.in_cells && end - first == amx::tile_rows;
      for (int64_t r = first; r < end; ++r) in_cells &= t < rows[r].length;
      amx::Seen here;
      if (in_cells) {
        backward_tile_cells(cells, first,
                            {.left = left_parts.of(at),
                             .part = amx::packed_size(amx::tile_rows, wide, 1),
                             .dbias = dbias,
                             .seen = &here});
        left_parts.outside[at / amx::tile_rows] = 0;
        seen.add(here.range());
        if (amx::is_within(here.range(), left_parts.exact)) continue;
        for (int64_t r = first; r < end; ++r) take_dx(slot * slot_rows + r, t, r);
      } else {
        walk_cells(first, end);
        unpack_dx(first, end);
        add_dbias(at, at + end - first);
      }
      left_parts.pack(at, end - first, dx + first * dx_stride, dx_stride);
      seen.add(left_parts.seen.range());
      left_parts.seen.clear();
    }
    for (int64_t r = 0; operands == Operands::floats && r < count; ++r) take_h(slot * slot_rows + r, t, r);
    const Lines lines = t + 1 == fetched ? Lines{} : lines_of(t);
    const auto multiply = [&](int64_t begin, int64_t end, Lines ahead) {
      product(end - begin, dim,
              {.out = recurrent.of(0) + begin * padded,
               .out_stride = padded,
               .a = dx + begin * dx_stride,
               .a_row = dx_stride,
               .a_k = 1,
               .m = panels.data(),
               .m_panel = wide * panel_columns,
               .depth = wide,
               .add = false,
               .ahead = ahead});
    };
    if (tiles) {
      for (int64_t r = 0; r < count; ++r) take_h(slot * slot_rows + r, t, r);
      const int64_t at = slot * slot_rows;
      amx::multiply_floats(recurrent.of(0), padded, false, left_parts.of(at), weights.parts_of(head), count, padded,
                           wide, lines);
      left_parts.for_outside(at, at + count, [&](int64_t begin, int64_t end) { multiply(begin - at, end - at, {}); });
    } else if (halves) {
      amx::pack_left(left_halves.at(0), dx, dx_stride, false, count, wide, 1, nullptr);
      for (int64_t r = 0; r < count; ++r) {
        take_h(slot * slot_rows + r, t, r);
        for (int64_t line = r * lines.count / count; line < (r + 1) * lines.count / count; ++line) {
          __builtin_prefetch(lines.lines[line], 0, 2);
        }
      }
      add_dbias(slot * slot_rows, slot * slot_rows + count);
      multiply_halves(recurrent.of(0), false, left_halves.at(0), weights.parts_of(head), count, padded, wide);
    } else {
      multiply(0, count, lines);
    }
    if (slot + 1 == slots || t == 0) add_share(slot, t);
  }
  delete[] ahead;
  end_streams();
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t unit = 0; unit < padded; unit += vector_lanes) {
      const int64_t at = r * padded + unit;
      const Vectors<1> through{load_vector(recurrent.of(0) + at)};
      store_vector(dh.of(0) + at, load_vector(dh.of(0) + at) + clipped(through, clip).v[0]);
    }
  }
  dh.store(params.dh0);
  dc.store(params.dc0);
  dn.store(params.dn0);
  if (params.dm0 == nullptr) return;
  for (int64_t r = 0; r < count; ++r) change_excess(r, false);
  excess.store(params.dm0);
}

// A group's share of dR and db: (4 dim, padded) floats, where operands are packed (dim, 4 dim), and 4 dim.
int64_t share_floats(int64_t dim) { return 4 * dim * padded_dim(dim) + 4 * dim; }

// dR and db of outputs [begin, end) of a gate and head, which lie side by side: the sums of the groups' shares, which
// are made in the first.
void sum_shares(const SlstmBackward& params, const GateOrder& order, bool packed, float* shares, int64_t groups,
                int64_t gate, int64_t head, int64_t begin, int64_t end) {
  const SlstmProblem& p = params.p;
  const int64_t dim = p.dim, padded = padded_dim(dim), wide = 4 * dim, item = gate * p.heads + head;
  const int64_t place = order(gate, begin), bias = wide * padded + place, count = end - begin;
  const int64_t lines = packed ? dim : count, line = packed ? wide : padded, size = packed ? count : dim;
  float* const sum = shares + head * groups * share_floats(dim) + (packed ? place : place * padded);
  float* const bias_sum = shares + head * groups * share_floats(dim) + bias;
  for (int64_t group = 1; group < groups; ++group) {
    const int64_t share = group * share_floats(dim);
    for (int64_t x = 0; x < lines; ++x) {
      for (int64_t y = 0; y < size; ++y) sum[x * line + y] += sum[share + x * line + y];
    }
    for (int64_t x = 0; x < count; ++x) bias_sum[x] += bias_sum[share + x];
  }
  with_dtype(p.weight_dtype, [&](auto type) {
    using Type = decltype(type);
    auto* const to = static_cast<typename Type::Bits*>(params.dweights) + (item * dim + begin) * dim;
    for (int64_t out = 0; out < count; out += vector_lanes) {
      const int64_t outs = count - out < vector_lanes ? count - out : vector_lanes;
      for (int64_t in = 0; in < dim; in += vector_lanes) {
        const int64_t ins = dim - in < vector_lanes ? dim - in : vector_lanes;
        const int64_t of_out = packed ? 1 : padded, of_in = packed ? wide : 1;
        Vector tile[vector_lanes];
        load_tile<Float32>(tile, sum + out * of_out + in * of_in, of_out, of_in, outs, ins);
        for (int64_t x = 0; x < outs; ++x) store_lanes<Type>(to + (out + x) * dim + in, tile[x], ins);
      }
    }
  });
  unpack(static_cast<char*>(params.dbias) + (item * dim + begin) * element_bytes(p.bias_dtype), p.bias_dtype, count,
         bias_sum, nullptr, 1, count);
}

}  // namespace

CPU_KERNEL(slstm_forward, SlstmForward) {
  const int64_t elements = p.p.batch * p.p.seq * p.p.heads * p.p.dim;
  wants_huge_pages(p.h, elements * element_bytes(p.p.dtype));
  const Blocks blocks(p.p);
  const auto run = [&](const ForwardWeights* weights) {
    blocks.run(p.p, [&](const Block& block) {
      if (p.kept == nullptr) {
        forward_block<false>(p, weights, block);
      } else {
        forward_block<true>(p, weights, block);
      }
    });
  };
  // Where a head is walked once, its R is packed then, to where the head's before lay: what is in L2 is written fastest.
  const Block first{.head = 0, .heads = blocks.together, .first = 0, .rows = blocks.each};
  if (blocks.parts == 1 && first.tokens(p.p.dim, p.p.seq) >= p.p.seq) return run(nullptr);
  const ForwardWeights weights(p.p, {0, p.p.heads});
  run(&weights);
}

CPU_KERNEL(slstm_backward, SlstmBackward) {
  const SlstmProblem& problem = p.p;
  const int64_t dim = problem.dim, heads = problem.heads, rows = problem.rows;
  wants_huge_pages(p.dx, problem.batch * problem.seq * 4 * heads * dim * element_bytes(problem.dtype));
  // The partition depends on the sizes only: a group's blocks add up their shares of dR one after the other.
  constexpr int64_t least_tasks = 4, most_groups = 16;
  const int64_t wanted = ceil_div(rows, most_block_rows(problem)), apart = ceil_div(least_tasks, heads);
  const int64_t useful = ceil_div(rows, least_block_rows(problem, 6)), split = apart < useful ? apart : useful;
  const int64_t blocks = wanted > split ? wanted : split;
  const int64_t each = blocks > 0 ? whole_tiles(problem, ceil_div(rows, blocks)) : 0;
  const int64_t groups = blocks < 1 ? 1 : blocks < most_groups ? blocks : most_groups;
  const Floats shares(heads * groups * share_floats(dim), false);
  // As in the forward.
  const bool at_use = groups == 1;
  const BackwardWeights all_weights(problem, {0, at_use ? 0 : heads});
  // A group's heads one after the other: its pages of dh and h are looked up once.
  parallel(heads * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads, group = task / heads;
      const BackwardWeights own(problem, {head, at_use ? 1 : 0});
      const BackwardWeights& weights = at_use ? own : all_weights;
      float* share = shares.data() + (head * groups + group) * share_floats(dim);
      bool begun = false;
      const int64_t padded = padded_dim(dim), wide = 4 * dim;
      std::memset(share + wide * padded, 0, wide * sizeof(float));
      for (int64_t block = blocks * group / groups; block < blocks * (group + 1) / groups; ++block) {
        const int64_t first = block * each, left = rows - first;
        if (left <= 0) continue;
        backward_block(p, weights, head, first, left < each ? left : each, share, begun);
      }
      if (!begun) std::memset(share, 0, wide * padded * sizeof(float));
    }
  });
  const int64_t at_once = all_weights.order.in_cells ? vector_lanes : 32;  // outputs
  const int64_t pieces = ceil_div(dim, at_once);
  parallel(4 * heads * pieces, 1 + (int64_t{1} << 14) / (at_once * dim * (groups + 1)),
           [&](int64_t begin, int64_t end) {
             for (int64_t task = begin; task < end; ++task) {
               const int64_t item = task / pieces, first = task % pieces * at_once;
               sum_shares(p, all_weights.order, all_weights.operands != Operands::floats, shares.data(), groups,
                          item / heads, item % heads, first, dim - first < at_once ? dim : first + at_once);
             }
           });
}

// Two passes: R h of every unit needs all of the old h, so no h may change before all R h are made.
CPU_KERNEL(slstm_step, SlstmStep) {
  constexpr int64_t block = 64;  // outputs of a task
  const int64_t dim = p.dim, heads = p.heads, blocks = ceil_div(dim, block);
  const int64_t padded = ceil_div(dim, int64_t{vector_lanes}) * vector_lanes;
  const Floats recurrent(p.batch * heads * 4 * padded);  // (batch, heads, 4, padded)
  parallel(4 * heads * blocks, 1, [&](int64_t begin, int64_t end) {
    const Floats converted(p.weight_dtype == DType::float32 ? 0 : block * dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * block, item = task / blocks, gate = item / heads, head = item % heads;
      const int64_t count = dim - first < block ? dim - first : block, from = (item * dim + first) * dim;
      const float* weights = static_cast<const float*>(p.weights) + from;
      if (p.weight_dtype != DType::float32) {
        pack(converted.data(), static_cast<const uint16_t*>(p.weights) + from, p.weight_dtype, dim, count, dim, count);
        weights = converted.data();
      }
      for (int64_t row = 0; row < p.batch; ++row) {
        const int64_t at = row * heads + head;
        row_dots(recurrent.data() + (at * 4 + gate) * padded + first, weights, p.h_state + at * dim, 0, count, dim);
      }
    }
  });
  with_dtype(p.dtype, [&](auto type) {
    using Type = decltype(type);
    using Bits = typename Type::Bits;
    parallel(p.batch * heads, 1, [&](int64_t begin, int64_t end) {
      const Floats bias(4 * padded);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / heads, head = task % heads;
        const Bits* x = static_cast<const Bits*>(p.x) + row * p.x_batch + head * p.x_head;
        load_bias(bias.data(), p.bias, p.bias_dtype, heads, dim, head);
        for (int64_t unit = 0; unit < dim; unit += vector_lanes) {
          const int64_t at = task * dim + unit, left = dim - unit;
          Vectors<1> gates[4], kept[kept_c];
          for (int64_t gate = 0; gate < 4; ++gate) {
            gates[gate].v[0] = load_lanes<Type>(x + gate * p.x_gate + unit, left) +
                               (load_vector(recurrent.data() + (task * 4 + gate) * padded + unit) +
                                load_vector(bias.data() + unit * 4 + gate * vector_lanes));
          }
          const auto load = [&](const float* state) { return Vectors<1>{load_lanes<Float32>(state + at, left)}; };
          const auto loaded = [&] {
            return Units<1>{.h = load(p.h_state), .c = load(p.c_state), .n = load(p.n_state), .m = load(p.m_state)};
          };
          const Units<1> u = slstm_cell<false>(gates, loaded, kept);
          store_lanes<Float32>(p.h_state + at, u.h.v[0], left);
          store_lanes<Float32>(p.c_state + at, u.c.v[0], left);
          store_lanes<Float32>(p.n_state + at, u.n.v[0], left);
          store_lanes<Float32>(p.m_state + at, u.m.v[0], left);
          store_lanes<Type>(static_cast<Bits*>(p.h) + at, u.h.v[0], left);
        }
      }
    });
  });
}
