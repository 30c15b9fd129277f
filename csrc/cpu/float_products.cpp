// Products of float32 matrices on AMX tiles (amx.h). Operands are packed a stretch of depth at a time. With few rows
// every worker takes some columns: it packs a, and each panel of b just before its product. With many rows all workers
// pack some panels of b, and then each multiplies rows of its own. To pack a again for the next panels costs less than
// to read more of b from L3 and to map more memory. An element is summed in the same order either way.
#include <algorithm>
#include <vector>

#include "cpu/amx.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "params/linear.h"

namespace flash_xlstm::cpu {
namespace {

constexpr int64_t most_depth = 512;    // of a stretch
constexpr int64_t few_rows = 256;      // at most
constexpr int64_t block_rows = 192;    // packed, they take 576 KiB of L2
constexpr int64_t panel_columns = 64;  // packed, they take 192 KiB of L2
constexpr int64_t wide_columns = 256;  // of neighbours, which are multiplied together: 768 KiB
constexpr int64_t step_columns = 576;  // of a step's panels, 1.7 MiB

// Columns of one product, and where they lie among a step's.
struct Panel {
  const FloatProducts::Part* part;
  int64_t column, columns, at = 0;
};
struct Step {
  int64_t depth, deep;  // the stretch
  int64_t begin, end;   // panels
};

const float* from(const FloatProducts::Matrix& m, int64_t row, int64_t column) {
  return m.data + (m.transposed ? column * m.row + row : row * m.row + column);
}

class Product {
 public:
  explicit Product(const FloatProducts& p)
      : p_(p),
        has_few_rows_(p.rows <= few_rows),
        stretch_(amx::padded(ceil_div(p.depth, ceil_div(p.depth, most_depth)), amx::tile_depth)) {
    for (int64_t x = 0; x < p.count; ++x) {
      const int64_t columns = p.parts[x].columns;
      for (int64_t c = 0; c < columns; c += panel_columns) {
        panels_.push_back({&p.parts[x], c, std::min(panel_columns, columns - c)});
      }
    }
    const int64_t shares = has_few_rows_ ? std::ssize(panels_) : ceil_div(p.rows, rows_of_tiles);
    workers_ = std::clamp<int64_t>(shares, 1, thread_count());
    ranges_.resize(workers_);
    scratch_.reserve(a_, amx::packed_size(has_few_rows_ ? p.rows : block_rows, stretch_, 3), workers_);
    scratch_.reserve(b_, amx::packed_size(has_few_rows_ ? panel_columns : step_columns, stretch_, 3),
                     has_few_rows_ ? workers_ : 2);
    scratch_.allocate();
  }

  bool run() { return has_few_rows_ ? with_few_rows() : with_many_rows(); }

 private:
  static constexpr int64_t rows_of_tiles = 2 * amx::tile_rows;

  struct alignas(64) Ranges {
    amx::Range a, b;
  };
  bool are_exact() const {
    Ranges all;
    for (const Ranges& each : ranges_) all.a.add(each.a), all.b.add(each.b);
    return amx::is_exact(all.a, all.b);
  }

  template <typename F>
  void work(const F& f) {
    const auto on_tiles = [&](int64_t worker) {
      amx::begin();
      f(worker);
      amx::end();
    };
    workers_ == 1 ? on_tiles(0) : parallel(workers_, on_tiles);
  }
  // A worker's share of [0, count).
  template <typename F>
  void share(int64_t worker, int64_t count, const F& f) const {
    f(count * worker / workers_, count * (worker + 1) / workers_);
  }

  void pack_a(int64_t row, int64_t rows, int64_t depth, int64_t deep, int64_t worker) {
    ranges_[worker].a.add(
        amx::pack_left_floats(a_[worker], from(p_.a, row, depth), p_.a.row, p_.a.transposed, rows, deep));
  }
  void pack_b(uint16_t* to, const Panel& panel, int64_t depth, int64_t deep, int64_t worker) {
    const FloatProducts::Matrix& b = panel.part->b;
    ranges_[worker].b.add(
        amx::pack_right_floats(to, from(b, depth, panel.column), b.row, b.transposed, deep, panel.columns));
  }
  void multiply(const Panel& panel, const uint16_t* b, int64_t row, int64_t rows, int64_t depth, int64_t deep,
                int64_t worker) {
    const FloatProducts::Part& part = *panel.part;
    amx::multiply_floats(part.out + row * part.out_row + panel.column, part.out_row, depth > 0, a_[worker], b, rows,
                         panel.columns, deep);
  }

  bool with_few_rows() {
    work([&](int64_t worker) {
      for (int64_t depth = 0; depth < p_.depth; depth += stretch_) {
        const int64_t deep = std::min(stretch_, p_.depth - depth);
        pack_a(0, p_.rows, depth, deep, worker);
        share(worker, std::ssize(panels_), [&](int64_t begin, int64_t end) {
          for (int64_t x = begin; x < end; ++x) {
            pack_b(b_[worker], panels_[x], depth, deep, worker);
            multiply(panels_[x], b_[worker], 0, p_.rows, depth, deep, worker);
          }
        });
      }
    });
    return are_exact();
  }

  // Each step's product goes with the packing of the next one's panels, so that workers wait once a step.
  bool with_many_rows() {
    const std::vector<Step> steps = make_steps();
    for (int64_t x = 0; x <= std::ssize(steps); ++x) {
      work([&](int64_t worker) {
        if (x > 0) multiply_step(steps[x - 1], b_[(x - 1) % 2], worker);
        if (x < std::ssize(steps)) pack_step(steps[x], b_[x % 2], worker);
      });
      if (!are_exact()) return false;
    }
    return true;
  }
  std::vector<Step> make_steps() {
    std::vector<Step> steps;
    for (int64_t depth = 0; depth < p_.depth; depth += stretch_) {
      for (int64_t begin = 0, end; begin < std::ssize(panels_); begin = end) {
        int64_t columns = 0;
        for (end = begin; end < std::ssize(panels_); ++end) {
          const int64_t next = columns + amx::padded(panels_[end].columns, amx::tile_rows);
          if (next > step_columns) break;
          panels_[end].at = columns, columns = next;
        }
        steps.push_back({depth, std::min(stretch_, p_.depth - depth), begin, end});
      }
    }
    return steps;
  }
  void pack_step(const Step& step, uint16_t* b, int64_t worker) {
    share(worker, step.end - step.begin, [&](int64_t begin, int64_t end) {
      for (int64_t x = step.begin + begin; x < step.begin + end; ++x) {
        pack_b(b + amx::packed_size(panels_[x].at, step.deep, 3), panels_[x], step.depth, step.deep, worker);
      }
    });
  }
  void multiply_step(const Step& step, const uint16_t* b, int64_t worker) {
    share(worker, ceil_div(p_.rows, rows_of_tiles), [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * rows_of_tiles, p_.rows);
      for (int64_t row = begin * rows_of_tiles; row < last; row += block_rows) {
        const int64_t rows = std::min(block_rows, last - row);
        pack_a(row, rows, step.depth, step.deep, worker);
        for (int64_t x = step.begin; x < step.end;) {
          Panel all = panels_[x++];
          while (x < step.end && panels_[x].part == all.part && all.columns < wide_columns) {
            all.columns += panels_[x++].columns;
          }
          multiply(all, b + amx::packed_size(all.at, step.deep, 3), row, rows, step.depth, step.deep, worker);
        }
      }
    });
  }

  const FloatProducts& p_;
  bool has_few_rows_;
  int64_t stretch_, workers_ = 1;
  std::vector<Panel> panels_;
  std::vector<Ranges> ranges_;
  Scratch scratch_;
  Arrays<uint16_t> a_, b_;
};

}  // namespace

bool float_products(const FloatProducts& p) { return has_amx() && Product(p).run(); }

}  // namespace flash_xlstm::cpu
