// Products of many rows with what follows them in a block (params/linear.h). They run on Hopper only. The layers
// compose the same from torch's products elsewhere (nn/xlstm_7b/products.py).
#include "ops/launch.h"
#include "params/linear.h"

namespace flash_xlstm {
namespace {

void check_multiple(const char* name, const Tensor& t) {
  if (t.size(1) % product_multiple == 0 && t.size(1) > 0) return;
  value_error(name, " has shape ", shape_text(t), "; its last dimension must be a multiple of ", product_multiple);
}

// The TMA counts in 32 bits.
void check_size(const char* name, const Tensor& t, int64_t dim) {
  if (t.size(dim) <= product_max_size) return;
  value_error(name, " has shape ", shape_text(t), "; no dimension may be above ", product_max_size);
}

// A left operand (rows, depth).
void check_left(const char* name, const Tensor& t) {
  check_shape(name, t, {-1, -1}, "(rows, depth)");
  if (t.scalar_type() != ScalarType::BFloat16 && t.scalar_type() != ScalarType::Half) {
    type_error(name, " has dtype ", dtype_text(t.scalar_type()), "; it must be bfloat16 or float16");
  }
  check_multiple(name, t);
  check_size(name, t, 0);
  check_size(name, t, 1);
  if (!t.is_cuda()) value_error(name, " is on ", device_text(t), "; it must be on a CUDA device");
}

void check_beside(const char* name, const Tensor& t, Sizes sizes, const char* want, const char* left_name,
                  const Tensor& left) {
  check_shape(name, t, sizes, want);
  check_dtype(name, t, left.scalar_type(), join_text(", as ", left_name).c_str());
  check_device(name, t, left, left_name);
  check_size(name, t, 0);
  check_size(name, t, 1);
}

// Contiguous, and aligned as tensor maps need it.
Tensor mappable(const Tensor& t) {
  Tensor whole = as_contiguous(t);
  return reinterpret_cast<uintptr_t>(whole.data_ptr()) % linear_alignment == 0 ? whole : copy_of(whole);
}

Product problem(Product::Then then, const Tensor& a, const std::vector<Tensor>& weights, int64_t columns) {
  Product p{};
  p.then = then;
  p.dtype = to_dtype(a.scalar_type());
  p.rows = a.size(0), p.depth = a.size(1), p.columns = columns;
  p.a = a.data_ptr();
  p.parts = static_cast<int>(weights.size());
  for (int part = 0; part < p.parts; ++part) {
    p.b[part] = weights[part].data_ptr();
    p.part_columns[part] = static_cast<int>(weights[part].size(0));
  }
  return p;
}

void run_product(const char* op, [[maybe_unused]] const Tensor& a, [[maybe_unused]] const Product& p) {
#ifdef FLASH_XLSTM_WITH_HOPPER
  if (p.rows > 0) on_cuda(op, a, [&](cudaStream_t stream) { return cuda::product(p, stream); });
#elif defined(FLASH_XLSTM_WITH_CUDA)
  throw std::runtime_error(join_text(op, ": this flash-xlstm was built without kernels for compute capability 9.0"));
#else
  no_cuda_build(op);
#endif
}

Tensor joined_product(Tensor a, std::vector<Tensor> weights) {
  check_left("a", a);
  const int64_t count = static_cast<int64_t>(weights.size());
  if (count < 1 || count > Product::max_parts) {
    value_error("weights has ", count, " tensors; it must have 1 to ", int64_t{Product::max_parts});
  }
  int64_t columns = 0;
  for (int64_t part = 0; part < count; ++part) {
    const std::string name = join_text("weights[", part, "]");
    check_beside(name.c_str(), weights[part], {-1, a.size(1)}, "(columns, depth)", "a", a);
    const int64_t own = weights[part].size(0), of = count > 1 ? product_part : product_multiple;
    if (own % of != 0 || own == 0) {
      value_error(name, " has shape ", shape_text(weights[part]), "; its first dimension must be a multiple of ", of);
    }
    weights[part] = mappable(weights[part]);
    columns += own;
  }
  if (columns > product_max_size)
    value_error("weights have ", columns, " columns; at most ", product_max_size, " may be");
  a = mappable(a);
  Product p = problem(Product::Then::nothing, a, weights, columns);
  Tensor out = new_empty(a, {p.rows, p.columns}, a.scalar_type());
  p.out = out.data_ptr();
  run_product("joined_product", a, p);
  return out;
}

Tensor added_product(Tensor a, Tensor weight, Tensor residual) {
  check_left("a", a);
  check_beside("weight", weight, {-1, a.size(1)}, "(columns, depth)", "a", a);
  check_beside("residual", residual, {a.size(0), weight.size(0)}, "(rows, columns)", "a", a);
  check_multiple("residual", residual);
  a = mappable(a), weight = mappable(weight), residual = mappable(residual);
  Product p = problem(Product::Then::residual, a, {weight}, weight.size(0));
  Tensor out = new_empty(a, {p.rows, p.columns}, a.scalar_type());
  p.residual = residual.data_ptr(), p.out = out.data_ptr();
  run_product("added_product", a, p);
  return out;
}

Tensors<2> swiglu_product(Tensor a, Tensor left, Tensor right) {
  check_left("a", a);
  check_beside("left", left, {-1, a.size(1)}, "(columns, depth)", "a", a);
  check_beside("right", right, {left.size(0), a.size(1)}, "the shape of left", "a", a);
  if (left.size(0) % product_multiple != 0 || left.size(0) == 0) {
    value_error("left has shape ", shape_text(left), "; its first dimension must be a multiple of ", product_multiple);
  }
  a = mappable(a), left = mappable(left), right = mappable(right);
  Product p = problem(Product::Then::swiglu, a, {left, right}, left.size(0));
  Tensor z = new_empty(a, {p.rows, 2 * p.columns}, a.scalar_type());
  Tensor out = new_empty(a, {p.rows, p.columns}, a.scalar_type());
  p.out = z.data_ptr(), p.second_out = out.data_ptr();
  run_product("swiglu_product", a, p);
  return {z, out};
}

Tensors<2> swiglu_product_backward(Tensor dout, Tensor weight, Tensor z, bool remake) {
  check_left("dout", dout);
  check_beside("weight", weight, {dout.size(1), -1}, "(depth, columns)", "dout", dout);
  check_multiple("weight", weight);
  check_beside("z", z, {dout.size(0), 2 * weight.size(1)}, "(rows, 2 columns)", "dout", dout);
  dout = mappable(dout), weight = mappable(weight), z = mappable(z);
  Product p = problem(Product::Then::swiglu_backward, dout, {weight}, weight.size(1));
  Tensor dz = new_empty(dout, {p.rows, 2 * p.columns}, dout.scalar_type());
  Tensor out = new_empty(dout, {remake ? p.rows : 0, remake ? p.columns : 0}, dout.scalar_type());
  p.z = z.data_ptr(), p.out = dz.data_ptr();
  p.second_out = remake ? out.data_ptr() : nullptr;
  run_product("swiglu_product_backward", dout, p);
  return {dz, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FLASH_XLSTM_OPS, lib) {
  lib.def("joined_product(Tensor a, Tensor[] weights) -> Tensor");
  lib.def("added_product(Tensor a, Tensor weight, Tensor residual) -> Tensor");
  lib.def("swiglu_product(Tensor a, Tensor left, Tensor right) -> (Tensor z, Tensor out)");
  lib.def("swiglu_product_backward(Tensor dout, Tensor weight, Tensor z, bool remake) -> (Tensor dz, Tensor out)");
}

IMPLEMENT_OPS(lib) {
  lib.impl("joined_product", TORCH_BOX(&joined_product));
  lib.impl("added_product", TORCH_BOX(&added_product));
  lib.impl("swiglu_product", TORCH_BOX(&swiglu_product));
  lib.impl("swiglu_product_backward", TORCH_BOX(&swiglu_product_backward));
}

}  // namespace flash_xlstm
